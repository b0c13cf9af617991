"""Admission: who goes on, who is left out and why, and when the run stops."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest

from workflow.admit import admit, check_quarantine, read_outline, write_table
from workflow.catalogue import columns
from workflow.errors import CatalogueError, DamagedFile, NotCounts
from workflow.keys import Keys
from workflow.simulate import tiny_slice

WINDOWS = {"layout": "auto", "pitch_um": 100, "window": [8, 8], "genes": 16, "min_observed": 0.5}


def curated(tmp_path, name, seed=0, files=None, **fields):
    adata = tiny_slice(seed=seed, name=name, **fields)
    inputs = [{"path": f"{name}.h5", "bytes": 1, "sha256": sha} for sha in files or [f"{name:0>64}"]]
    adata.uns[Keys.STPATCH]["inputs"] = json.dumps(inputs)
    adata.write_h5ad(tmp_path / f"{name}.h5ad")
    return read_outline(tmp_path / f"{name}.h5ad")


def rejected(tmp_path, name):
    error = NotCounts(slice=name, file="x.h5", found="values of -1.5", expected="counts", next_step="find raw counts")
    adata = ad.AnnData(np.zeros((0, 0), np.float32))
    adata.uns[Keys.STPATCH] = {"slice": name, "format_version": 1, Keys.QUARANTINE: error.as_row()}
    adata.write_h5ad(tmp_path / f"{name}.h5ad")
    return read_outline(tmp_path / f"{name}.h5ad")


def role(slice, split="train", **fields):
    blank = dict.fromkeys(columns(), "")
    return {**blank, "slice": slice, "split": split, "url": f"{slice}.h5", "organism": "human", **fields}


def decide(slices, roles, allow=False, **windows):
    kept, out, twins = admit(slices, roles, organism="human", allow_contamination=allow, **{**WINDOWS, **windows})
    return [(r["slice"], r["split"]) for r in kept], {r["slice"]: r for r in out}, twins


def test_a_good_slice_is_admitted_with_its_size(tmp_path):
    slice = curated(tmp_path, "a")
    kept, out, _ = admit([slice], [role("a")], organism="human", allow_contamination=False, **WINDOWS)
    assert not out
    assert (kept[0]["n_spots"], kept[0]["n_genes"]) == (slice.n_spots, 60)


def test_a_rejected_slice_is_listed_and_the_others_go_on(tmp_path):
    kept, out, _ = decide([curated(tmp_path, "a"), rejected(tmp_path, "b")], [role("a"), role("b")])
    assert kept == [("a", "train")]
    assert out["b"]["code"] == "not_counts"
    assert out["b"]["found"] == "values of -1.5"


def test_another_organism_is_set_apart(tmp_path):
    kept, out, _ = decide([curated(tmp_path, "a"), curated(tmp_path, "m", 1)], [role("a"), role("m", organism="mouse")])
    assert kept == [("a", "train")]
    assert out["m"]["code"] == "other_organism"


def test_the_same_files_under_another_name_are_a_duplicate(tmp_path):
    slices = [curated(tmp_path, "a", files=["0" * 64]), curated(tmp_path, "b", files=["0" * 64])]
    kept, out, twins = decide(slices, [role("a"), role("b")])
    assert kept == [("a", "train")]
    assert out["b"]["code"] == "duplicate"
    assert twins == [{"slice": "b", "duplicate_of": "a", "evidence": "the same counts file by sha256"}]


@pytest.mark.parametrize(
    ("train", "test"),
    [
        (role("a"), role("a", split="Set")),
        (role("a"), role("b", split="Set", url="a.h5")),
        (role("a", sha256="f" * 64), role("b", split="Set", sha256=f"{'f' * 64} {'e' * 64}")),
    ],
)
def test_a_pretraining_slice_that_is_evaluated_is_left_out_unless_allowed(tmp_path, train, test):
    slices = [curated(tmp_path, "a"), curated(tmp_path, "b", 1)]
    slices.append(curated(tmp_path, "t", 2))
    kept, out, _ = decide(slices, [role("t"), train, test])
    assert kept == [("t", "train"), (test["slice"], "Set")]
    assert out["a"]["code"] == "contamination"
    kept, out, _ = decide(slices, [role("t"), train, test], allow=True)
    assert kept == [("t", "train"), ("a", "train"), (test["slice"], "Set")]
    assert not out


def test_the_same_counts_file_counts_as_contamination_whatever_labels_and_url(tmp_path):
    slices = [curated(tmp_path, "a", files=["0" * 64]), curated(tmp_path, "b", files=["0" * 64, "1" * 64])]
    _, out, _ = decide(slices, [role("a"), role("b", split="Set")])
    assert out["a"]["code"] == "contamination"


def test_a_window_that_no_part_of_the_slice_fills_is_named_with_its_numbers(tmp_path):
    _, out, _ = decide([curated(tmp_path, "a")], [role("a")], window=[64, 64])
    assert out["a"]["code"] == "window_too_large"
    assert "best 64 x 64 window is" in out["a"]["found"]
    assert "smaller window" in out["a"]["next_step"]


def test_fewer_genes_than_a_window_draws_are_named(tmp_path):
    _, out, _ = decide([curated(tmp_path, "a")], [role("a")], genes=61)
    assert (out["a"]["code"], out["a"]["found"]) == ("too_few_genes", "60 genes")


def test_an_evaluated_slice_needs_no_window(tmp_path):
    slices = [curated(tmp_path, "t", shape=(64, 128)), curated(tmp_path, "a", 1)]
    kept, out, _ = decide(slices, [role("t"), role("a", split="Set")], window=[32, 32])
    assert kept == [("t", "train"), ("a", "Set")]
    assert not out


@pytest.mark.parametrize("split", ["train", "Set"])
def test_a_slice_that_cannot_be_laid_out_is_left_out_whatever_its_role(tmp_path, split):
    slices = [curated(tmp_path, "t"), curated(tmp_path, "square", 1, kind="square")]
    _, out, _ = decide(slices, [role("t"), role("square", split=split)], layout="offset")
    assert out["square"]["code"] == "cell_collision"


def test_genes_that_no_training_slice_measured_are_noticed_before_any_window_is_drawn(tmp_path):
    slices = [
        curated(tmp_path, "t"),
        curated(tmp_path, "v", 1, gene_offset=50),
        curated(tmp_path, "e", 2, gene_offset=60),
    ]
    kept, out, _ = decide(slices, [role("t"), role("v", split="val"), role("e", split="Set")])
    assert kept == [("t", "train")]
    assert out["v"]["found"].startswith("10 of its 60 genes among the 60")
    assert out["e"]["code"] == "too_few_genes"


def test_evaluation_without_a_training_slice_says_what_is_missing(tmp_path):
    kept, out, _ = decide([curated(tmp_path, "a")], [role("a", split="Set")])
    assert not kept
    assert "admit a training slice" in out["a"]["next_step"]


def test_spots_without_a_count_do_not_fill_a_window(tmp_path):
    slice = curated(tmp_path, "a")
    slice.outline.obs["total_counts"] = 0
    _, out, _ = decide([slice], [role("a")])
    assert "is 0% observed" in out["a"]["found"]


def test_a_curated_slice_of_another_version_is_refused(tmp_path):
    adata = tiny_slice(name="a")
    adata.uns[Keys.STPATCH]["format_version"] = 2
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(DamagedFile, match="found format_version 2; expected 1"):
        read_outline(tmp_path / "a.h5ad")


def test_the_run_fails_only_above_the_allowed_fraction(tmp_path):
    rows = [rejected(tmp_path, name).quarantine for name in ("a", "b")]
    check_quarantine(10, rows, 0.2)
    with pytest.raises(CatalogueError, match="2 of 9 slices were rejected") as caught:
        check_quarantine(9, rows, 0.2)
    assert "b: [not_counts] found values of -1.5" in str(caught.value)


def test_slices_set_aside_on_purpose_do_not_count_as_rejected():
    aside = [{"slice": "m", "code": "other_organism", "found": "", "next_step": ""}]
    check_quarantine(1, aside, 0.0)


def test_a_field_with_tabs_or_line_ends_stays_one_field(tmp_path):
    write_table(tmp_path / "t.tsv", "quarantine", ["slice", "found"], [{"slice": "a", "found": "x\ty\nz"}])
    assert (tmp_path / "t.tsv").read_text() == "# stpatch quarantine 1\nslice\tfound\na\tx y z\n"
