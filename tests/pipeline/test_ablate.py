"""Two variants of a tiny ablation, run for real: shared where they may be, and the same as when built from nothing. Simulated."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT
from tests.faults.corpus import final_files
from tests.pipeline.conftest import snakemake
from workflow import ablate
from workflow.catalogue import columns
from workflow.simulate import choose_genes, tiny_slice

pytestmark = pytest.mark.pipeline

CONFIG = {
    "catalogue": "slices.tsv", "downstream": "evaluated.tsv", "window": [8, 8], "genes": 24, "windows_per_slice": 24,
    "max_coverage": 0, "min_genes": 0, "components": 0, "shard_mb": 1, "min_free_gb": -1000,
    "allow_contamination": True,
    "pretrain": {
        "config": str(ROOT / "trainer/configs/demo.yaml"), "steps": 6, "batch_size": 8, "width": 16, "depth": 1,
        "heads": 2, "feed_forward": 16, "decoder_width": 16, "val_every": 6, "val_samples": 8,
    },
    "evaluate": {"genes": 0, "heads": ["knn"], "protocols": ["random20", "blocks"], "splits": 2},
}  # fmt: skip
TABLE = {
    "title": "Width of the window",
    "mirrors": 4,
    "axis": "cells",
    "variants": {
        "window_8": {"config": {"window": [8, 8]}, "x": 8, "paper": "patch_8"},
        "window_6": {"config": {"window": [6, 6]}, "x": 6},
    },
}


def write_corpus(folder: Path) -> None:
    """Two small files of simulated counts, each to pretrain on and to evaluate; a config and a table of two variants."""
    genes, _ = choose_genes(ROOT / "catalogue/aux/genes_human.tsv", 60)
    (folder / "files").mkdir()
    blank = dict.fromkeys(columns(), "") | {"source": "file", "format": "h5ad", "organism": "human"}
    rows = {"slices": [], "evaluated": []}
    for seed, split in enumerate(("train", "val")):
        made = tiny_slice(seed=seed, name=f"tiny_{split}")
        made.var_names = genes
        del made.uns["stpatch"]
        made.write_h5ad(folder / f"files/{split}.h5ad")
        row = blank | {"slice": f"tiny_{split}", "dataset": "SimTiny", "url": f"files/{split}.h5ad"}
        row |= {"donor": split, "label_column": "label", "evidence": "simulated"}
        rows["slices"].append(row | {"split": split})
        rows["evaluated"].append(row | {"split": "SimTiny"})
    for name, table in rows.items():
        lines = ["\t".join(columns()), *("\t".join(row.values()) for row in table)]
        (folder / f"{name}.tsv").write_text("\n".join(lines) + "\n")
    (folder / "base.yaml").write_text(yaml.safe_dump(CONFIG))
    (folder / "width.yaml").write_text(yaml.safe_dump(TABLE))


def digests(folder: Path) -> dict[str, tuple[int, str]]:
    """Time and sha256 of every file below a folder, but for what grows in place."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not {"logs", "benchmarks", "ablations"} & set(path.relative_to(folder).parts)
    }


@pytest.fixture(scope="module")
def ablated(tmp_path_factory):
    """Working directory after the user's own run of the base config up to the shards, and then the two variants."""
    folder = tmp_path_factory.mktemp("ablate")
    write_corpus(folder)
    snakemake("--cores", 2, "--configfile", "base.yaml", "--", "data", directory=folder)
    before = digests(folder / "results")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert ablate.main(["width.yaml", "--configfile", "base.yaml", "--cores", "2"]) == 0
    return folder, before


def test_nothing_that_the_variants_share_is_written_again(ablated):
    folder, before = ablated
    assert digests(folder / "results") == before
    mine, theirs = (folder / "results", folder / "results/ablations/width/window_6/seed0/results")
    for kept in ("slices/tiny_train.h5ad", "stats/genes.tsv", "grids/tiny_val.zarr/counts/zarr.json"):
        assert (mine / kept).samefile(theirs / kept)
    assert not (mine / "shards/train/index.json").samefile(theirs / "shards/train/index.json")
    assert not (theirs / "logs/curate").exists()  # no job of it ran there
    assert (theirs / "logs/windows").exists()


def test_a_variant_is_what_a_run_from_nothing_gives(ablated, tmp_path):
    folder, _ = ablated
    for name in ("files", "slices.tsv", "evaluated.tsv"):
        (shutil.copytree if (folder / name).is_dir() else shutil.copy2)(folder / name, tmp_path / name)
    variant = folder / "results/ablations/width/window_6/seed0"
    snakemake("--cores", 2, "--configfile", variant / ablate.CONFIG, "--", *ablate.TARGETS, directory=tmp_path)
    scratch, shared = final_files(tmp_path / "results"), final_files(variant / "results")
    assert scratch.keys() == shared.keys()
    assert [name for name in scratch if scratch[name] != shared[name]] == []


def test_the_same_command_again_has_nothing_to_do(ablated, monkeypatch, capfd):
    folder, _ = ablated
    monkeypatch.chdir(folder)
    kept = digests(folder / "results/ablations/width/window_6/seed0/results")
    assert ablate.main(["width.yaml", "--configfile", "base.yaml", "--variants", "window_6"]) == 0
    printed = "".join(capfd.readouterr())
    assert "0 of 1 runs to do" in printed
    assert "Nothing to be done" in printed
    assert digests(folder / "results/ablations/width/window_6/seed0/results") == kept


def test_the_table_has_ours_and_the_papers_labelled_as_such(ablated):
    folder, _ = ablated
    top = folder / "results/ablations"
    scores = pd.read_csv(top / "width.tsv", sep="\t")
    assert set(scores["variant"]) == {"window_6", "window_8"}
    own = pd.read_csv(top / "width/window_6/seed0/results/metrics/scores.tsv", sep="\t")
    where = {"method": "stpatch", "head": "knn", "protocol": "blocks", "metric": "ari"}
    values = own[(own["section"] == "pooled") & (own[list(where)] == where).all(axis=1)]["value"]
    row = scores[(scores["variant"] == "window_6") & (scores[list(where)] == where).all(axis=1)]
    assert row["value"].item() == pytest.approx(values.mean(), abs=1e-6)
    for ending in ("md", "html"):
        text = (top / f"width.{ending}").read_text()
        assert "paper" in text
        assert ".622" in text  # Table 4, window 8
