"""The tables of all datasets under one header."""

from __future__ import annotations

import pytest

from workflow.assemble import COLUMNS, NOTES
from workflow.evaluate import gather, gather_notes


def test_tables_are_gathered_under_one_header(tmp_path):
    header = "\t".join(COLUMNS) + "\n"
    for name in "ab":
        (tmp_path / name).write_text(header + f"{name}\n")
    assert gather([tmp_path / "a", tmp_path / "b"], COLUMNS) == header + "a\nb\n"
    assert gather([], COLUMNS) == header
    (tmp_path / "c").write_text("other\n")
    with pytest.raises(ValueError, match="header"):
        gather([tmp_path / "c"], COLUMNS)


def test_notes_are_gathered_with_the_dataset_and_stage_that_they_are_of(tmp_path):
    header = "\t".join(NOTES) + "\n"
    for dataset, stage in (("d", "score"), ("e", "cluster")):
        (tmp_path / dataset).mkdir()
        (tmp_path / dataset / f"{stage}.notes.tsv").write_text(header + "simulated\t\n")
    tables = [tmp_path / "d/score.notes.tsv", tmp_path / "e/cluster.notes.tsv"]
    expected = "dataset\tstage\t" + header + "d\tscore\tsimulated\t\n" + "e\tcluster\tsimulated\t\n"
    assert gather_notes(tables) == expected
