"""Admission: who goes on, who is left out and why, and when the run stops."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pytest

from workflow.admit import admit, check_quarantine, read_curated, write_table
from workflow.catalogue import columns
from workflow.errors import CatalogueError, DamagedFile, NotCounts
from workflow.fingerprints import read_fingerprints, update
from workflow.guard import barred
from workflow.keys import Keys
from workflow.simulate import tiny_slice
from workflow.sketch import sketch_slice, write_sketch

WINDOWS = {"layout": "auto", "pitch_um": 100, "window": [8, 8], "genes": 16, "min_observed": 0.5}


def curated(tmp_path, name, seed=0, files=None, **fields):
    adata = tiny_slice(seed=seed, name=name, **fields)
    inputs = [{"path": f"{name}.h5", "bytes": 1, "sha256": sha} for sha in files or [f"{name:0>64}"]]
    adata.uns[Keys.STPATCH]["inputs"] = json.dumps(inputs)
    adata.write_h5ad(tmp_path / f"{name}.h5ad")
    return read_curated(tmp_path / f"{name}.h5ad")


def sketches_of(slices):
    return [sketch_slice(slice.path) for slice in slices]


def copied(tmp_path, name, of, spots=slice(None), genes=slice(None)):
    """The same tissue deposited again: other barcodes, another file, only these spots and genes."""
    adata = ad.read_h5ad(of.path)[spots, genes].copy()
    adata.obs_names = [f"{name}{i}" for i in range(adata.n_obs)]
    adata.uns[Keys.STPATCH]["slice"] = name
    adata.uns[Keys.STPATCH]["inputs"] = json.dumps([{"path": f"{name}.h5", "bytes": 1, "sha256": f"{name:0>64}"}])
    adata.write_h5ad(tmp_path / f"{name}.h5ad")
    return read_curated(tmp_path / f"{name}.h5ad")


def rejected(tmp_path, name):
    error = NotCounts(slice=name, file="x.h5", found="values of -1.5", expected="counts", next_step="find raw counts")
    adata = ad.AnnData(np.zeros((0, 0), np.float32))
    adata.uns[Keys.STPATCH] = {"slice": name, "format_version": 1, Keys.QUARANTINE: error.as_row()}
    adata.write_h5ad(tmp_path / f"{name}.h5ad")
    return read_curated(tmp_path / f"{name}.h5ad")


def role(slice, split="train", **fields):
    blank = dict.fromkeys(columns(), "")
    return {**blank, "slice": slice, "split": split, "url": f"{slice}.h5", "organism": "human", **fields}


def decide(slices, roles, allow=False, **given):
    """Admission as the rule runs it: barred by the rows, the rest by content."""
    given = {**WINDOWS, "barred": barred(roles, []), "sketches": sketches_of(s for s in slices if s.n_spots), **given}
    decision = admit(slices, roles, organism="human", allow_contamination=allow, **given)
    kept = [(row["slice"], row["split"]) for row in decision.admitted]
    return kept, {row["slice"]: row for row in decision.quarantined}, decision


def test_a_good_slice_is_admitted_with_its_size(tmp_path):
    slice = curated(tmp_path, "a")
    kept, out, *_ = admit([slice], [role("a")], organism="human", allow_contamination=False, **WINDOWS)
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
    kept, out, decision = decide(slices, [role("a"), role("b")], sketches=[])
    assert kept == [("a", "train")]
    assert out["b"]["code"] == "duplicate"
    assert decision.duplicates == [{"slice": "b", "duplicate_of": "a", "evidence": "the same counts file by sha256"}]


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
    kept, out, decision = decide(slices, [role("t"), train, test], allow=True)
    assert kept == [("t", "train"), ("a", "train"), (test["slice"], "Set")]
    assert not out
    assert [(note["slice"], note["kind"]) for note in decision.notes] == [("a", "contamination")]


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
    adata = ad.read_h5ad(curated(tmp_path, "a").path)
    adata.obs["total_counts"] = 0
    adata.write_h5ad(tmp_path / "a.h5ad")
    _, out, _ = decide([read_curated(tmp_path / "a.h5ad")], [role("a")])
    assert "is 0% observed" in out["a"]["found"]


def test_a_curated_slice_of_another_version_is_refused(tmp_path):
    adata = tiny_slice(name="a")
    adata.uns[Keys.STPATCH]["format_version"] = 2
    adata.write_h5ad(tmp_path / "a.h5ad")
    with pytest.raises(DamagedFile, match="found format_version 2; expected 1"):
        read_curated(tmp_path / "a.h5ad")


def test_the_run_fails_only_above_the_allowed_fraction(tmp_path):
    rows = [rejected(tmp_path, name).quarantine for name in ("a", "b")]
    check_quarantine(10, rows, 0.2)
    with pytest.raises(CatalogueError, match="2 of 9 slices were rejected") as caught:
        check_quarantine(9, rows, 0.2)
    assert "b: [not_counts] found values of -1.5" in str(caught.value)


@pytest.mark.parametrize(
    "code", ["other_organism", "multiple_organisms", "targeted_panel", "duplicate", "contamination"]
)
def test_slices_set_aside_on_purpose_do_not_count_as_rejected(code):
    check_quarantine(1, [{"slice": "m", "code": code, "found": "", "next_step": ""}], 0.0)


def test_of_one_tissue_the_slice_with_more_spots_is_kept_whatever_the_order(tmp_path):
    whole = curated(tmp_path, "whole", 1)
    crop = copied(tmp_path, "acrop", whole, spots=np.random.default_rng(0).permutation(whole.n_spots)[:300])
    other = curated(tmp_path, "other", 2)
    decisions = []
    for slices in ([whole, crop, other], [other, crop, whole]):
        kept, out, decision = decide(slices, [role(slice.slice) for slice in slices])
        assert sorted(kept) == [("other", "train"), ("whole", "train")]
        assert out["acrop"]["code"] == "duplicate"
        decisions.append(decision.duplicates)
    assert decisions[0] == decisions[1]
    assert (decisions[0][0]["slice"], decisions[0][0]["duplicate_of"]) == ("acrop", "whole")
    assert decisions[0][0]["evidence"].startswith("containment 1.00 of ")


def test_of_equal_spots_more_genes_win_then_a_pin_then_the_name(tmp_path):
    a = curated(tmp_path, "a", 1)
    fewer = copied(tmp_path, "Fewer", a, genes=np.arange(50))
    b, c = copied(tmp_path, "b", a), copied(tmp_path, "c", a)
    kept, _, _ = decide([fewer, c, b, a], [role("Fewer"), role("c"), role("b", sha256="f" * 64), role("a")])
    assert kept == [("b", "train")]
    kept, _, _ = decide([fewer, c, b, a], [role("Fewer"), role("c"), role("b"), role("a")])
    assert kept == [("a", "train")]


def test_two_rows_of_one_geo_sample_are_duplicates_even_if_their_counts_differ(tmp_path):
    slices = [curated(tmp_path, name, seed) for seed, name in enumerate("abc")]
    geo = {"source": "geo", "accession": "GSE1 GSM77"}
    roles = [role("a", **geo), role("b", **geo), role("c", source="geo", accession="GSE1 GSM78")]
    kept, out, decision = decide(slices, roles)
    assert len(kept) == 2
    assert ("c", "train") in kept
    assert {row["evidence"] for row in decision.duplicates} == {"the same GSM GSM77"}
    assert [row["code"] for row in out.values()] == ["duplicate"]


def test_the_kept_twin_is_one_that_can_be_used(tmp_path):
    whole = curated(tmp_path, "whole", 1, shape=(24, 48))
    sparse = ad.read_h5ad(whole.path)
    sparse.obs["total_counts"] = 0  # no window of it can be drawn
    sparse.write_h5ad(whole.path)
    crop = copied(tmp_path, "crop", whole, spots=np.arange(400))
    adata = ad.read_h5ad(crop.path)
    adata.obs["total_counts"] = 100
    adata.write_h5ad(crop.path)
    kept, out, _ = decide([whole, crop], [role("whole"), role("crop")])
    assert kept == [("crop", "train")]
    assert out["whole"]["code"] == "window_too_large"


def test_evaluated_tissue_under_another_name_and_file_is_contamination(tmp_path):
    evaluated, other = curated(tmp_path, "e", 1), curated(tmp_path, "t", 2)
    copy = copied(tmp_path, "copy", evaluated, spots=np.arange(evaluated.n_spots)[::-1], genes=np.arange(0, 60, 2))
    roles = [role("t"), role("copy"), role("e", split="Set")]
    kept, out, decision = decide([evaluated, other, copy], roles)
    assert kept == [("t", "train"), ("e", "Set")]
    assert out["copy"]["code"] == "contamination"
    assert out["copy"]["found"].startswith("the tissue of e, evaluated in Set: containment 1.00")
    assert not decision.notes
    kept, _, decision = decide([evaluated, other, copy], roles, allow=True)
    assert ("copy", "train") in kept
    assert decision.notes[0]["detail"].startswith("pretrained on although: the tissue of e")


def test_a_shipped_fingerprint_bars_tissue_that_is_not_evaluated_here(tmp_path):
    seen = curated(tmp_path, "seen", 1)
    (tmp_path / "sketches").mkdir()
    (tmp_path / "slices").mkdir()
    write_sketch(sketch_slice(seen.path), tmp_path / "sketches/seen.npz")
    (tmp_path / "slices/seen.h5ad").symlink_to(seen.path)
    table = tmp_path / "fingerprints.tsv"
    assert update(table, [role("seen", split="Set"), role("never", split="Set")], tmp_path, "") == (1, 1)
    copy, other = copied(tmp_path, "copy", seen, spots=np.arange(100, 400)), curated(tmp_path, "t", 2)
    roles = [role("t"), role("copy")]
    kept, out, _ = decide([copy, other], roles, fingerprints=read_fingerprints(table))
    assert kept == [("t", "train")]
    assert "the tissue of seen, an evaluation slice" in out["copy"]["found"]


def test_a_barred_slice_needs_no_file_and_is_listed(tmp_path):
    roles = [role("t"), role("gone")]
    kept, out, _ = decide(
        [curated(tmp_path, "t")], roles, barred={"gone": "zenodo 1, which is of the evaluation set X"}
    )
    assert kept == [("t", "train")]
    assert (out["gone"]["code"], out["gone"]["found"]) == (
        "contamination",
        "zenodo 1, which is of the evaluation set X",
    )


def test_a_targeted_panel_is_set_apart_by_its_genes_or_by_its_sources_word(tmp_path):
    slices = [curated(tmp_path, "t"), curated(tmp_path, "few", 1, n_genes=30), curated(tmp_path, "said", 2)]
    roles = [role("t"), role("few"), role("said", technology="Visium, Targeted gene panel")]
    kept, out, _ = decide(slices, roles, min_genes=40)
    assert kept == [("t", "train")]
    assert {row["code"] for row in out.values()} == {"targeted_panel"}
    assert out["few"]["found"] == "30 genes, fewer than min_genes = 40"


def test_a_slice_too_shallow_to_compare_is_noted_not_passed_over(tmp_path):
    shallow = curated(tmp_path, "shallow", 3)
    adata = ad.read_h5ad(shallow.path)
    adata.X.data[20:] = 1  # entries that the sketch may not sample
    adata.write_h5ad(shallow.path)
    slices = [curated(tmp_path, "a", 1), curated(tmp_path, "b", 2), shallow]
    _, _, decision = decide(slices, [role("a"), role("b"), role("shallow")])
    notes = {note["slice"]: note for note in decision.notes}
    assert notes["shallow"]["kind"] == "too_shallow"
    assert "with 2 other slices" in notes["shallow"]["detail"]


def test_a_field_with_tabs_or_line_ends_stays_one_field(tmp_path):
    write_table(tmp_path / "t.tsv", "quarantine", ["slice", "found"], [{"slice": "a", "found": "x\ty\nz"}])
    assert (tmp_path / "t.tsv").read_text() == "# stpatch quarantine 1\nslice\tfound\na\tx y z\n"
