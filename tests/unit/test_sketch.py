"""Sketches and what is recognised by them: the planted twin, and nobody else."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import ROOT
from workflow.curate import curate, rejected, write_slice
from workflow.errors import MultipleOrganisms, NotCounts
from workflow.genes import genomes_of
from workflow.keys import Keys
from workflow.lattice import infer_lattice
from workflow.simulate import tiny_slice
from workflow.sketch import (
    ENTRIES_PER_BLOCK,
    EVERYTHING,
    gene_numbers,
    mix,
    pair_hash,
    read_sketch,
    site_hash,
    sketch_slice,
    write_sketch,
)
from workflow.twins import find_twins, most_votes, symmetries


@pytest.fixture(scope="module")
def tissue():
    """A slice deep enough to have rare entries: simulated."""
    return tiny_slice(seed=5, n_genes=400, shape=(40, 80), median_depth=6000.0, name="tissue")


def sketched(adata, tmp_path, name=None, **lattice):
    adata = adata.copy()
    adata.uns[Keys.STPATCH]["slice"] = name or str(adata.uns[Keys.STPATCH]["slice"])
    adata.uns[Keys.STPATCH]["lattice"] |= lattice
    adata.write_h5ad(tmp_path / "slice.h5ad")
    return sketch_slice(tmp_path / "slice.h5ad")


def hidden(adata, turn):
    """The slice as a source without array coordinates gives it, its image turned."""
    adata = adata.copy()
    adata.obsm[Keys.SPATIAL] = adata.obsm[Keys.SPATIAL] @ np.asarray(turn, float)
    lattice = infer_lattice(adata.obsm[Keys.SPATIAL])
    adata.obs[Keys.ARRAY_ROW], adata.obs[Keys.ARRAY_COL] = lattice.row, lattice.col
    return adata


def twins(*sketches):
    matches, _ = find_twins(list(sketches))
    return {(match.first, match.second): match for match in matches}


def test_order_barcodes_and_other_genes_change_no_sampled_entry(tissue, tmp_path):
    rng = np.random.default_rng(0)
    changed = tissue[rng.permutation(tissue.n_obs)][:, rng.permutation(tissue.n_vars)[:200]].copy()
    changed.obs_names = [f"spot{i}" for i in range(changed.n_obs)]
    whole, half = sketched(tissue, tmp_path), sketched(changed, tmp_path)
    assert half.sites_threshold >= whole.sites_threshold
    kept = np.isin(whole.sites["gene"], gene_numbers(changed.var_names))
    assert kept.any()
    fields = ("gene", "row", "col", "count")
    within = half.sites[site_hash(*(half.sites[field] for field in fields)) <= whole.sites_threshold]
    np.testing.assert_array_equal(within, whole.sites[kept])


def test_every_sampled_entry_is_one_of_the_slices(tissue, tmp_path):
    sketch = sketched(tissue, tmp_path)
    column = dict(zip(gene_numbers(tissue.var_names).tolist(), range(tissue.n_vars), strict=True))
    spot = {site: i for i, site in enumerate(zip(tissue.obs.array_row, tissue.obs.array_col, strict=True))}
    for entry in [*sketch.sites[:200].tolist(), *sketch.rare[:200].tolist()]:
        gene, row, col, count = entry
        assert tissue.X[spot[row, col], column[gene]] == count >= 2


def test_a_rare_count_of_a_gene_is_one_that_few_spots_have(tissue, tmp_path):
    sketch = sketched(tissue, tmp_path)
    column = dict(zip(gene_numbers(tissue.var_names).tolist(), range(tissue.n_vars), strict=True))
    pairs = {(gene, count) for gene, _, _, count in sketch.rare.tolist()}
    assert len(pairs) > 100
    for gene, count in list(pairs)[:50]:
        n_spots = (tissue.X[:, column[gene]].toarray() == count).sum()
        assert n_spots == (pair_hash(sketch.rare["gene"], sketch.rare["count"]) == _pair(gene, count)).sum() <= 4


def _pair(gene, count):
    return pair_hash(np.array([gene], np.uint64), np.array([count]))[0]


def test_the_hash_is_splitmix64s_finaliser():
    assert mix(np.array([0, 1], np.uint64)).tolist() == [0, 0x5692161D100B05E5]


def test_a_sketch_survives_its_file_and_the_file_is_the_same_each_time(tissue, tmp_path):
    sketch = sketched(tissue, tmp_path)
    write_sketch(sketch, tmp_path / "a.npz")
    write_sketch(read_sketch(tmp_path / "a.npz"), tmp_path / "b.npz")
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()
    again = read_sketch(tmp_path / "b.npz")
    for name in ("spots", "genes", "sites", "rare"):
        np.testing.assert_array_equal(getattr(again, name), getattr(sketch, name))
    assert (again.slice, again.kind, again.source) == ("tissue", "staggered", "array")
    assert (again.sites_threshold, again.rare_threshold) == (sketch.sites_threshold, sketch.rare_threshold)


def test_reading_the_matrix_in_blocks_changes_nothing(tissue, tmp_path, monkeypatch):
    whole = sketched(tissue, tmp_path)
    assert tissue.X.nnz < ENTRIES_PER_BLOCK
    monkeypatch.setattr("workflow.sketch.ENTRIES_PER_BLOCK", 1000)
    np.testing.assert_array_equal(sketched(tissue, tmp_path).sites, whole.sites)


def test_a_sketch_of_another_version_is_refused(tmp_path):
    np.savez(tmp_path / "old.npz", format_version=np.int64(0))
    with pytest.raises(ValueError, match="found format_version 0, expected 1"):
        read_sketch(tmp_path / "old.npz")


def test_a_rejected_slice_has_an_empty_sketch(tmp_path):
    error = NotCounts(slice="bad", found="-1", expected="counts", next_step="none")
    write_slice(rejected({"slice": "bad"}, error), tmp_path / "bad.h5ad")
    sketch = sketch_slice(tmp_path / "bad.h5ad")
    assert (sketch.slice, len(sketch.sites), len(sketch.rare), len(sketch.genes)) == ("bad", 0, 0, 0)


def test_a_crop_with_half_of_the_genes_is_a_twin_and_other_sections_are_not(tissue, tmp_path):
    rng = np.random.default_rng(1)
    crop = tissue[tissue.obs.array_row.to_numpy() < 20][:, rng.permutation(400)[:200]]
    sister = tiny_slice(seed=6, n_genes=400, shape=(40, 80), median_depth=6000.0)
    found = twins(
        sketched(tissue, tmp_path), sketched(crop, tmp_path, "crop"), sketched(sister, tmp_path, "other section")
    )
    assert list(found) == [("crop", "tissue")]
    assert found["crop", "tissue"].containment == 1.0


@pytest.mark.parametrize("kind", ["staggered", "square"])
@pytest.mark.parametrize("turn", [[[0, 1], [-1, 0]], [[1, 0], [0, -1]], [[0.5, 0.8660254], [-0.8660254, 0.5]]])
def test_a_slice_whose_lattice_was_inferred_is_recognised_however_it_lies(kind, turn, tmp_path):
    if kind == "square" and turn[0][0] == 0.5:
        turn = [[0, -1], [-1, 0]]
    one = tiny_slice(seed=3, n_genes=400, shape=(20, 40), median_depth=9000.0, kind=kind, name="array")
    other = tiny_slice(seed=4, n_genes=400, shape=(20, 40), median_depth=9000.0, kind=kind, name="other")
    turned = sketched(hidden(one, turn), tmp_path, "pixels", source="pixels")
    assert len(turned.sites) == 0
    found = twins(sketched(one, tmp_path), turned, sketched(other, tmp_path))
    assert list(found) == [("array", "pixels")]
    assert found["array", "pixels"].containment > 0.95


def test_renumbered_array_coordinates_are_seen_through(tissue, tmp_path):
    shifted = tissue.copy()
    shifted.obs["array_row"] = 45 - shifted.obs["array_row"]
    shifted.obs["array_col"] += 7
    found = twins(sketched(tissue, tmp_path), sketched(shifted, tmp_path, "shifted"))
    assert found["shifted", "tissue"].containment == 1.0
    assert "turned, mirrored or shifted" in found["shifted", "tissue"].evidence


def test_without_a_lattice_the_contents_of_spots_tell(tissue, tmp_path):
    bare = tissue[np.random.default_rng(2).permutation(tissue.n_obs)].copy()
    bare.obs = bare.obs.drop(columns=["array_row", "array_col"])
    without = sketched(bare, tmp_path, "without", kind="none", source="pixels")
    sister = tiny_slice(seed=6, n_genes=400, shape=(40, 80), median_depth=6000.0, name="sister")
    found = twins(sketched(tissue, tmp_path), without, sketched(sister, tmp_path))
    assert list(found) == [("tissue", "without")]
    assert "no common lattice" in found["tissue", "without"].how


def test_the_symmetries_of_a_lattice_are_distinct_and_keep_neighbours():
    for kind, n in (("staggered", 12), ("square", 8)):
        found = symmetries(kind)
        assert len({matrix.tobytes() for matrix in found}) == n
        assert all(abs(round(np.linalg.det(matrix))) == 1 for matrix in found)
        steps = {(1, 0), (0, 1), (-1, 0), (0, -1)} | ({(1, -1), (-1, 1)} if kind == "staggered" else set())
        for matrix in found:
            assert {tuple(matrix @ step) for step in steps} == steps


def test_votes_count_entries_that_one_translation_brings_together():
    entries = np.zeros(6, [("gene", "<u8"), ("row", "<i4"), ("col", "<i4"), ("count", "<u2")])
    entries["row"], entries["col"] = [0, 3, 5, 9, 11, 2], [0, 8, 1, 4, 7, 6]
    keys = np.arange(6, dtype=np.uint64)
    other = entries.copy()
    other["row"], other["col"] = 30 - entries["col"], entries["row"] + 5  # a quarter turn and a shift
    other["row"][5] += 1  # one entry lies elsewhere
    assert most_votes(entries, keys, other, keys, "square") == 5


def test_slices_that_cannot_be_compared_are_counted(tissue, tmp_path):
    shallow = tissue.copy()
    shallow.X.data[:] = 1
    sketch = sketched(shallow, tmp_path, "shallow")
    assert sketch.sites_threshold == EVERYTHING
    matches, unchecked = find_twins([sketched(tissue, tmp_path), sketch])
    assert not matches
    assert unchecked == {"shallow": 1, "tissue": 1}


def test_a_shallow_slice_is_sampled_more_densely(tissue, tmp_path):
    thin = tissue.copy()
    thin.X.data = np.random.default_rng(0).binomial(thin.X.data, 0.02)
    sparse, dense = sketched(tissue, tmp_path), sketched(thin, tmp_path, "thin")
    assert dense.sites_threshold > sparse.sites_threshold
    assert len(dense.sites) >= 1000


def test_genes_of_two_organisms_are_numbered_apart():
    numbers = gene_numbers(["ENSG00000000005", "ENSMUSG00000000005"])
    assert numbers.tolist() == [5, 10**11 + 5]
    with pytest.raises(ValueError, match="ENSRNOG"):
        gene_numbers(["ENSRNOG00000000005"])


def test_a_slice_with_genes_of_two_genomes_is_set_apart(tmp_path):
    human = tiny_slice(seed=1)
    ids = [f"ENSG{i:011d}" for i in range(40)] + [f"ENSMUSG{i:011d}" for i in range(20)]
    human.var_names = ids
    human.write_h5ad(tmp_path / "mixed.h5ad")
    row = {"slice": "mixed", "url": str(tmp_path / "mixed.h5ad"), "format": "h5ad", "organism": "human"}
    with pytest.raises(MultipleOrganisms, match=r"ENSG \(40 features\) and ENSMUSG \(20 features\)"):
        curate(row, ROOT / "catalogue/aux")
    assert genomes_of(["GRCh38_TP53", "GRCh38_ACTB", "mm10___Actb"]) == {"GRCh38": 2, "mm10": 1}
    assert genomes_of([*ids[:40] * 10, "ENSMUSG00000000001"]) == {"ENSG": 400}
