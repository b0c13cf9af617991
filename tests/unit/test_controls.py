"""Neighbours and features of the controls, against brute force."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import sparse

from tests.unit.sections import full_section, tiny_section
from workflow import controls
from workflow.controls import (
    control_features,
    hexagonal_offsets,
    load_section,
    neighbour_mean,
    neighbours,
    spatial_directions,
)
from workflow.errors import TooFewCommonGenes
from workflow.simulate import tiny_slice


def rings_by_brute_force(array: np.ndarray, rings: int) -> np.ndarray:
    """Hexagonal distance from the positions in the plane: a disc of r rings holds what lies within r pitches."""
    plane = array[:, ::-1] * np.array([0.5, np.sqrt(3) / 2])
    row = array[:, 0][:, None] - array[:, 0]
    # On the hexagon of r rings: |rows| <= r, and along the slanted axes x +- y / sqrt(3) <= r.
    across = np.abs(plane[:, 0][:, None] - plane[:, 0])
    return (np.abs(row) <= rings) & (across + np.abs(row) / 2 <= rings + 1e-9)


# Neighbours


@pytest.mark.parametrize(("n", "rings"), [(6, 1), (18, 2), (36, 3)])
def test_rings_of_hexagons_hold_6_18_and_36_neighbours_and_the_spot(n, rings):
    steps = hexagonal_offsets(rings)
    assert len(np.unique(steps, axis=0)) == len(steps) == n + 1
    assert (steps.sum(axis=1) % 2 == 0).all()
    inner = full_section()
    counted = np.asarray(neighbours(inner, n).sum(axis=1)).ravel()
    assert counted.max() == n + 1
    assert counted.min() < n + 1  # at the border


@pytest.mark.parametrize("n", [6, 18, 36])
def test_neighbours_equal_brute_force_on_a_slice_with_holes(tmp_path, n):
    section = tiny_section(tmp_path, shape=(20, 40))
    expected = rings_by_brute_force(section.array, controls.RINGS[n])
    assert np.array_equal(neighbours(section, n).toarray() > 0, expected)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_neighbours_equal_brute_force_on_a_real_slice(real_data):
    import anndata as ad

    obs = ad.read_h5ad(real_data / "visium/dlpfc_151673_crop_allgenes.h5ad", backed="r").obs
    section = full_section()
    section.array = obs[["array_row", "array_col"]].to_numpy(dtype=np.int64)
    section.counts = sparse.csr_matrix((len(obs), 1))
    for n, rings in controls.RINGS.items():
        assert np.array_equal(neighbours(section, n).toarray() > 0, rings_by_brute_force(section.array, rings))


@pytest.mark.parametrize("kind", ["square", "none"])
def test_without_a_staggered_lattice_the_n_nearest_and_the_spot_itself_are_taken(tmp_path, kind):
    section = tiny_section(tmp_path, shape=(12, 14), kind=kind)
    place = section.position if section.array is None else section.array
    distance = np.linalg.norm(place[:, None] - place, axis=2)
    near = neighbours(section, 6).toarray() > 0
    assert near.diagonal().all()
    assert (near.sum(axis=1) == 7).all()
    farthest_in = np.where(near, distance, -np.inf).max(axis=1)
    nearest_out = np.where(near, np.inf, distance).min(axis=1)
    assert (farthest_in <= nearest_out + 1e-9).all()


def test_a_missing_row_does_not_shift_neighbours():
    section = full_section()
    kept = section.array[:, 0] != 10
    with_row = neighbours(section, 6).toarray()[np.ix_(kept, kept)]
    section.array, section.counts = section.array[kept], section.counts[kept]
    assert np.array_equal(neighbours(section, 6).toarray(), with_row)


def test_the_neighbour_mean_includes_the_spot_itself():
    section = full_section(rows=6, cols=12)
    x = np.random.default_rng(0).normal(size=(section.n_spots, 3))
    near = rings_by_brute_force(section.array, 1)
    expected = np.array([x[row].mean(axis=0) for row in near])
    np.testing.assert_allclose(neighbour_mean(x, neighbours(section, 6)), expected)


def test_spatial_directions_keep_a_weak_pattern_that_is_smooth_and_leave_strong_noise():
    rng, of = np.random.default_rng(0), [full_section("a", rows=32, cols=64), full_section("b", rows=32, cols=64)]
    waves = [np.sin(section.position[:, 1] / 600) for section in of]
    pca = [np.column_stack([5 * rng.normal(size=(len(wave), 3)), wave + rng.normal(size=len(wave))]) for wave in waves]
    found = spatial_directions(of, pca)
    assert list(found) == ["spatial_directions_18", "spatial_directions_36"]
    for by_section in found.values():
        for x, wave in zip(by_section, waves, strict=True):
            assert x.shape == (len(wave), 4)
            assert abs(np.corrcoef(x[:, 0], wave)[0, 1]) > 0.9


def test_spatial_directions_solve_the_generalised_eigenproblem():
    """Before they are averaged they are found again from the averages: (near / n) is a full matrix of known weights."""
    rng, section = np.random.default_rng(1), full_section(rows=8, cols=16)
    x = rng.normal(size=(section.n_spots, 3)).cumsum(axis=0)
    average = {n: neighbours(section, n).toarray() / neighbours(section, n).sum(axis=1) for n in (18, 36)}
    mean = np.asarray(average[18] @ (x - x.mean(axis=0)))
    smooth, rest = np.cov(mean.T), np.cov((x - x.mean(axis=0) - mean).T)
    values, vectors = np.linalg.eig(np.linalg.solve(rest, smooth))
    order = np.argsort(-values)
    for n, found in spatial_directions([section], [x]).items():
        expected = np.asarray(average[int(n[-2:])] @ (x - x.mean(axis=0))) @ vectors[:, order]
        for mine, theirs in zip(found[0].T, expected.T, strict=True):
            assert abs(np.corrcoef(mine, theirs)[0, 1]) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("spread", "d"), [(0.0, 3), (1.0, 3), (1.0, 1)])
def test_lonely_spots_and_constant_components_have_spatial_directions_without_meaning(spread, d):
    """A spot without neighbours is its own mean: nothing is left of it, and still there are numbers."""
    section = full_section(rows=4, cols=8)
    section.array = section.array * 50
    x = spread * np.random.default_rng(0).normal(size=(section.n_spots, d))
    for values in spatial_directions([section], [x]).values():
        assert np.isfinite(values[0]).all()


# Features


def test_components_equal_those_of_a_singular_value_decomposition():
    sections = [full_section(seed=1), full_section(seed=2)]
    genes = controls.common_genes(sections)
    expression = [controls.normalised(section, genes, 1e4) for section in sections]
    found = np.concatenate(controls.principal_components(expression, 5))
    dense = np.concatenate([matrix.toarray() for matrix in expression])
    u, s, _ = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(u[:, :5] * s[:5]), atol=1e-8)


def test_normalised_expression_uses_totals_over_all_genes_of_the_source():
    section = full_section()
    section.totals = section.totals * 2
    dense = np.log1p(section.counts.toarray() / section.totals[:, None] * 1e4)
    np.testing.assert_allclose(controls.normalised(section, section.genes, 1e4).toarray(), dense)


def test_only_genes_measured_by_every_section_are_used():
    first, second = full_section(), full_section(seed=1)
    second.genes = second.genes.copy()
    second.genes[:3] = ["ENSG99999999991", "ENSG99999999992", "ENSG99999999993"]
    assert list(controls.common_genes([first, second])) == list(first.genes[3:])


@pytest.mark.parametrize("n_shared", [0, 49])
def test_sections_that_share_too_few_genes_are_named_and_counted(n_shared):
    first, second = full_section("one"), full_section("two")
    second.genes = np.array([*first.genes[:n_shared], *(f"ENSMUSG{i}" for i in range(70 - n_shared))], dtype=object)
    with pytest.raises(TooFewCommonGenes, match=f"slice one, two: found {n_shared} genes .* expected at least 50"):
        control_features([first, second], 1e4)


def test_labels_do_not_touch_the_features():
    labelled, unlabelled = full_section(), full_section()
    unlabelled.labels = np.full(unlabelled.n_spots, None, dtype=object)
    for method, values in control_features([labelled], 1e4).items():
        assert np.array_equal(values[0], control_features([unlabelled], 1e4)[method][0]), method


def test_the_donor_is_that_of_the_catalogue(tmp_path):
    path = tmp_path / "one.h5ad"
    slice_ = tiny_slice(name="one")
    row = json.loads(slice_.uns["stpatch"]["row"]) | {"donor": "Br8100"}
    slice_.uns["stpatch"]["row"] = json.dumps(row)
    slice_.write_h5ad(path)
    assert load_section(path).donor == "Br8100"
