"""Components of the corpus, principal and spatial, on tiny simulated slices and on planted programmes."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from safetensors import safe_open
from threadpoolctl import threadpool_limits

from workflow.components import (
    LEAST_VARIANCE,
    Sample,
    adjacent,
    components,
    counted_cells,
    expression,
    merge_axes,
    principal_axes,
    sample_spots,
    spatial_axes,
    variance_of,
    write_components,
)
from workflow.errors import DamagedFile
from workflow.expression import log_normalise
from workflow.grid import make_grid, write_grid
from workflow.moments import moments
from workflow.simulate import tiny_slice
from workflow.stats import merge_moments

K = 4
METHODS = ("spatial", "principal")


@pytest.fixture(scope="module")
def grids():
    """The second measured ten genes that the first did not, and not the first one's first ten."""
    slices = [tiny_slice(seed=i, n_genes=50, gene_offset=10 * i, name=f"s{i}") for i in range(2)]
    return [make_grid(slice, "auto", 100) for slice in slices]


@pytest.fixture(scope="module")
def vocabulary(grids):
    return merge_moments([{"gene_ids": g.gene_ids, "symbols": g.gene_ids, **moments(g, 1e4)} for g in grids])


@pytest.fixture(scope="module")
def paths(grids, tmp_path_factory):
    folder = tmp_path_factory.mktemp("grids")
    for grid in grids:
        write_grid(grid, folder / f"{grid.slice}.zarr")
    return [folder / f"{grid.slice}.zarr" for grid in grids]


def test_the_axes_are_those_of_the_centred_matrix_with_unmeasured_genes_at_their_mean(grids, vocabulary, paths):
    """Against a dense decomposition, written out."""
    rows = []
    for grid in grids:
        for y, x in np.argwhere(grid.mask & (grid.total_counts > 0)):
            row = np.zeros(len(vocabulary.gene_id))
            values = log_normalise(grid.counts[y, x], grid.total_counts[y, x], 1e4)
            for gene, value in zip(grid.gene_ids, values, strict=True):
                k = vocabulary.gene_id.index(gene)
                row[k] = value - vocabulary.mean[k]
            rows.append(row)
    _, scale, expected = np.linalg.svd(np.array(rows), full_matrices=False)
    axes, explained, _ = components(paths, vocabulary, method="principal", k=K, spots=10**6, target_sum=1e4, seed=0)
    assert axes.shape == (60, K)
    assert axes.dtype == explained.dtype == np.float32
    np.testing.assert_allclose(explained, scale[:K] ** 2 / len(rows), rtol=1e-5)
    for found, axis in zip(axes.T, expected[:K], strict=True):
        np.testing.assert_allclose(found, axis * np.sign(axis @ found), atol=1e-5)
        assert found[np.abs(found).argmax()] > 0


def test_planted_axes_are_found_in_order_of_their_variance():
    rng = np.random.default_rng(0)
    planted, _ = np.linalg.qr(rng.normal(size=(40, 3)))
    spread = np.array([1.0, 5.0, 2.0])
    values = rng.normal(size=(400, 3)) * spread @ planted.T + 0.01 * rng.normal(size=(400, 40)) + 7
    sample = Sample(sp.csr_matrix(values), np.ones(40, dtype=bool))
    axes, explained = principal_axes([sample], np.full(40, 7.0), 3)
    overlap = np.abs(planted.T @ axes)
    assert overlap.argmax(axis=0).tolist() == [1, 2, 0]
    assert overlap.max(axis=0).min() > 0.99
    np.testing.assert_allclose(explained, [25, 4, 1], rtol=0.2)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_corpus_gives_the_same_bytes_on_any_number_of_threads(paths, vocabulary, tmp_path, method):
    settings = {"method": method, "k": K, "spots": 60, "target_sum": 1e4}
    written = []
    for threads in (1, 2, 1):
        with threadpool_limits(limits=threads):
            found = components(paths, vocabulary, **settings, seed=0, threads=threads)
        write_components(tmp_path / "c.safetensors", *found, "abc")
        written.append((tmp_path / "c.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]
    other = components(paths, vocabulary, **settings, seed=1)
    assert np.array_equal(other[0], found[0]) == (method == "spatial")  # which takes every spot and draws none


def test_a_damaged_grid_is_named_whichever_process_looked_at_it(paths, vocabulary, tmp_path):
    settings = {"method": "spatial", "k": K, "spots": 0, "target_sum": 1e4, "seed": 0}
    for threads in (1, 2):
        with pytest.raises(DamagedFile, match="slice gone .*no zarr group.*Next step: delete"):
            components([*paths, tmp_path / "gone.zarr"], vocabulary, **settings, threads=threads)


def test_the_file_says_its_version_and_the_vocabulary_it_was_made_for(tmp_path):
    axes = np.arange(12, dtype=np.float32).reshape(3, 4).T
    noise = np.arange(4, dtype=np.float32)
    write_components(tmp_path / "c.safetensors", axes, np.ones(3, np.float32), noise, "abc")
    with safe_open(tmp_path / "c.safetensors", "np") as opened:
        assert opened.metadata() == {"format_version": "1", "genes_sha256": "abc"}
        np.testing.assert_array_equal(opened.get_tensor("components"), axes)
        np.testing.assert_array_equal(opened.get_tensor("noise"), noise)
        assert opened.get_tensor("explained_variance").shape == (3,)
    content = (tmp_path / "c.safetensors").read_bytes()
    header = content[8 : 8 + int.from_bytes(content[:8], "little")]
    assert list(json.loads(header)) == sorted(json.loads(header))


def test_a_slice_gives_no_more_spots_than_asked_and_which_ones_depends_on_seed_and_slice(grids, vocabulary):
    settings = {"target_sum": 1e4, "seed": 0}
    few = sample_spots(grids[0], vocabulary.gene_id, 25, **settings)
    assert few.values.shape == (25, 60)
    again = sample_spots(grids[0], vocabulary.gene_id, 25, **settings)
    assert (few.values != again.values).nnz == 0
    other = sample_spots(grids[0], vocabulary.gene_id, 25, target_sum=1e4, seed=1)
    assert (few.values != other.values).nnz > 0
    every = sample_spots(grids[0], vocabulary.gene_id, 10**6, **settings)
    assert every.values.shape[0] == (grids[0].mask & (grids[0].total_counts > 0)).sum()
    assert few.measured.sum() == 50
    assert few.values[:, ~few.measured].nnz == 0


def test_a_corpus_of_fewer_spots_than_components_gives_as_many_as_it_can(grids, vocabulary):
    sample = sample_spots(grids[0], vocabulary.gene_id, 3, target_sum=1e4, seed=0)
    assert principal_axes([sample], vocabulary.mean, K)[0].shape == (60, 2)
    none, explained = principal_axes([], vocabulary.mean, K)
    assert none.shape == (60, 0)
    assert len(explained) == 0


def values_at(grid, gene_ids) -> np.ndarray:
    """Normalised expression [n, genes] of a slice's counted spots, those it measured, one spot after another."""
    at = [list(grid.gene_ids).index(gene) for gene in gene_ids]
    places = np.argwhere(grid.mask & (grid.total_counts > 0))
    return np.array([log_normalise(grid.counts[y, x], grid.total_counts[y, x], 1e4)[at] for y, x in places])


@pytest.mark.parametrize("method", METHODS)
def test_the_noise_of_a_gene_is_its_mean_variance_within_the_slices_that_measured_it(grids, vocabulary, paths, method):
    *_, noise = components(paths, vocabulary, method=method, k=K, spots=10**6, target_sum=1e4, seed=0)
    assert noise.dtype == np.float32
    measured_by = {gene: [grid for grid in grids if gene in set(grid.gene_ids)] for gene in vocabulary.gene_id}
    expected = [np.mean([values_at(grid, [gene]).var() for grid in measured_by[gene]]) for gene in vocabulary.gene_id]
    assert sorted({len(some) for some in measured_by.values()}) == [1, 2]
    np.testing.assert_allclose(noise, expected, rtol=1e-5)


STEPS = {
    "staggered": [(0, 2), (0, -2), (1, 1), (1, -1), (-1, 1), (-1, -1)],
    "square": [(0, 1), (0, -1), (1, 0), (-1, 0)],
}


@pytest.mark.parametrize("kind", STEPS)
def test_adjacent_spots_are_the_six_or_four_around_one_and_weigh_alike(kind):
    """Against a search over all pairs of array coordinates; of every fifth spot alone some have no neighbour at all."""
    grid = make_grid(tiny_slice(seed=1, n_genes=30, kind=kind), "auto", 100)
    every = counted_cells(grid)
    alone = 0
    for cells in (every, every[::5]):
        sites = list(zip(grid.array_row.ravel()[cells], grid.array_col.ravel()[cells], strict=True))
        expected = np.array([[(r2 - r1, c2 - c1) in STEPS[kind] for r2, c2 in sites] for r1, c1 in sites], dtype=float)
        number = expected.sum(1)
        expected /= np.maximum(number, 1)[:, None]
        near = adjacent(grid, cells)
        np.testing.assert_allclose(near.toarray(), expected, atol=1e-12)
        assert set(near.sum(axis=1).ravel().round(12).tolist()) <= {0.0, 1.0}
        assert number.max() == (len(STEPS[kind]) if cells is every else number.max())
        alone += (number == 0).sum()
    assert alone


def test_bins_have_four_neighbours_whatever_lattice_their_spots_had():
    grid = make_grid(tiny_slice(seed=1, n_genes=30), "bin", 180)
    cells = counted_cells(grid)
    near, (y, x) = adjacent(grid, cells).toarray(), np.divmod(cells, grid.mask.shape[1])
    apart = np.abs(y[:, None] - y) + np.abs(x[:, None] - x)
    assert np.array_equal(near > 0, apart == 1)
    assert (near > 0).sum(1).max() == 4


def dense_axes(sample, near, k):
    """`spatial_axes` by a dense eigendecomposition: axes [V, k] and their share of the eigenvalues' sum."""
    X, W = sample.values.toarray(), near.toarray()
    X = X - X.mean(0)
    scale = sample.measured / np.maximum(X.var(0), LEAST_VARIANCE) ** 0.25
    found, axes = np.linalg.eigh(scale[:, None] * (X.T @ ((W + W.T) / 2) @ X / len(X)) * scale)
    axes, found = scale[:, None] * axes[:, ::-1][:, :k], found[::-1][:k]
    return axes / np.linalg.norm(axes, axis=0), found / found.sum()


def test_spatial_axes_are_the_eigenvectors_of_the_covariance_with_adjacent_spots(grids, vocabulary):
    for grid in grids:
        cells = counted_cells(grid)
        sample, near = expression(grid, vocabulary.gene_id, cells, 1e4), adjacent(grid, cells)
        np.testing.assert_allclose(
            sample.values.toarray()[:, sample.measured],
            values_at(grid, np.array(vocabulary.gene_id)[sample.measured]),
            rtol=1e-12,
        )
        np.testing.assert_allclose(variance_of(sample), sample.values.toarray().var(0), atol=1e-12)
        axes, share = spatial_axes(sample, near, K)
        expected, shares = dense_axes(sample, near, K)
        np.testing.assert_allclose(share, shares, rtol=1e-3)
        np.testing.assert_allclose(np.linalg.norm(axes, axis=0), 1, rtol=1e-12)
        assert np.abs((axes * expected).sum(0)).min() > 0.999
        assert (axes[~sample.measured] == 0).all()


def planted_sample(grid, smooth, loose, seed=0) -> Sample:
    """Two programmes of genes of variance 1, one a wave over the slice, one drawn spot by spot, and noise."""
    rng, cells = np.random.default_rng(seed), counted_cells(grid)
    wave = np.sin(np.divmod(cells, grid.mask.shape[1])[0] / 4)
    scores = np.column_stack([wave, rng.permutation(wave)])  # the same values, in no order
    scores = (scores - scores.mean(0)) / scores.std(0)
    values = scores @ np.array([smooth, loose]) + 0.2 * rng.normal(size=(len(cells), len(smooth))) + 5
    return Sample(sp.csr_matrix(values), np.ones(len(smooth), dtype=bool))


def programme(genes, V=40):
    """Alternating weights of unit length on these genes."""
    axis = np.zeros(V)
    axis[genes] = np.where(np.arange(len(genes)) % 2, 1, -1) / len(genes) ** 0.5
    return axis


def test_a_programme_that_is_smooth_in_space_is_found_and_one_of_equal_variance_that_is_not_stays_out(grids):
    smooth, loose = programme(range(10)), programme(range(10, 20))
    sample = planted_sample(grids[0], smooth, loose)
    axes, share = spatial_axes(sample, adjacent(grids[0], counted_cells(grids[0])), 16)
    assert abs(axes[:, 0] @ smooth) > 0.98
    assert share[0] > 0.6
    assert (share * (loose @ axes) ** 2).sum() < 0.1 * (share * (smooth @ axes) ** 2).sum()
    principal, _ = principal_axes([sample], np.full(40, 5.0), 2)
    for axis in (smooth, loose):  # variance alone can't tell them apart
        assert np.linalg.norm(axis @ principal) > 0.98


def test_the_axes_of_all_slices_are_put_together_by_singular_values(grids):
    """Each slice its own programme: both are found, that of the slice of more spots first; against numpy's decomposition."""
    slices = []
    for seed, (grid, n) in enumerate(zip(grids, (256, 4096), strict=True)):
        sample = planted_sample(grid, programme(range(10 * seed, 10 * seed + 10)), np.zeros(40), seed)
        slices.append((*spatial_axes(sample, adjacent(grid, counted_cells(grid)), 5), n))
    axes, explained = merge_axes(slices, 40, 3)
    columns = np.hstack([axes * np.sqrt(share * n**0.5) for axes, share, n in slices])
    left, scale, _ = np.linalg.svd(columns)
    assert axes.dtype == explained.dtype == np.float32
    np.testing.assert_allclose(explained, scale[:3] ** 2 / (scale**2).sum(), rtol=1e-5)
    for found, axis in zip(axes.T, left.T, strict=False):
        np.testing.assert_allclose(found, axis * np.sign(axis @ found), atol=1e-5)
        assert found[np.abs(found).argmax()] > 0
    overlap = np.abs(np.array([programme(range(10)), programme(range(10, 20))]) @ axes)
    assert overlap[:, :2].argmax(axis=1).tolist() == [1, 0]
    assert overlap.max(axis=1).min() > 0.95


def test_a_gene_that_one_slice_lacks_has_the_axes_of_the_other(grids, vocabulary, paths):
    axes, share, _ = components(paths, vocabulary, method="spatial", k=8, spots=0, target_sum=1e4, seed=0)
    assert axes.shape == (60, 8)
    assert (np.diff(share) <= 0).all()
    assert 0.3 < share.sum() <= 1
    np.testing.assert_allclose(np.linalg.norm(axes, axis=0), 1, rtol=1e-5)
    assert (np.abs(axes).max(axis=1) > 0).all()  # each gene was measured by one of them
    alone, _, noise = components(paths[:1], vocabulary, method="spatial", k=8, spots=0, target_sum=1e4, seed=0)
    lacking = [gene not in set(grids[0].gene_ids) for gene in vocabulary.gene_id]
    assert sum(lacking) == 10
    np.testing.assert_allclose(alone[lacking], 0, atol=1e-6)
    assert (noise[lacking] == 0).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 12, 20])
def test_a_slice_of_few_spots_has_as_many_axes_as_it_can_tell_apart(grids, vocabulary, n):
    grid = grids[0]
    cells = counted_cells(grid)[:n]
    sample, near = expression(grid, vocabulary.gene_id, cells, 1e4), adjacent(grid, cells)
    axes, share = spatial_axes(sample, near, 16)
    size = np.linalg.eigvalsh(dense_covariance(sample, near))
    assert axes.shape == (60, len(share))
    assert len(share) == min(16, max(0, n - 2), (size > 1e-9 * np.abs(size).max()).sum())
    assert np.isfinite(axes).all()
    assert (share > 0).all()
    assert (axes[~sample.measured] == 0).all()
    np.testing.assert_allclose(np.linalg.norm(axes, axis=0), 1, rtol=1e-9)
    merged, _ = merge_axes([(axes, share, n)], 60, K)
    assert merged.shape == (60, min(K, max(0, len(share) - 1)))


def dense_covariance(sample, near):
    """C of `spatial_axes` [V, V], in the genes measured."""
    X, W = sample.values.toarray(), near.toarray()
    X = X - X.mean(0)
    return X.T @ ((W + W.T) / 2) @ X / len(X)


def test_a_corpus_without_slices_has_no_spatial_axes(vocabulary):
    axes, share, noise = components([], vocabulary, method="spatial", k=K, spots=0, target_sum=1e4, seed=0)
    assert (axes.shape, share.shape, noise.tolist()) == ((60, 0), (0,), [0.0] * 60)
