"""Principal axes of the corpus, on tiny simulated slices and on planted axes."""

import json

import numpy as np
import pytest
import scipy.sparse as sp
from safetensors import safe_open
from threadpoolctl import threadpool_limits

from workflow.components import Sample, components, principal_axes, sample_spots, write_components
from workflow.expression import log_normalise
from workflow.grid import make_grid, write_grid
from workflow.moments import moments
from workflow.simulate import tiny_slice
from workflow.stats import merge_moments

K = 4


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
    axes, explained = components(paths, vocabulary, k=K, spots=10**6, target_sum=1e4, seed=0)
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


def test_the_same_corpus_gives_the_same_bytes_on_any_number_of_threads(paths, vocabulary, tmp_path):
    written = []
    for threads in (1, 2, 1):
        with threadpool_limits(limits=threads):
            found = components(paths, vocabulary, k=K, spots=60, target_sum=1e4, seed=0)
        write_components(tmp_path / "c.safetensors", *found, "abc")
        written.append((tmp_path / "c.safetensors").read_bytes())
    assert written[0] == written[1] == written[2]
    other = components(paths, vocabulary, k=K, spots=60, target_sum=1e4, seed=1)
    assert not np.array_equal(other[0], found[0])


def test_the_file_says_its_version_and_the_vocabulary_it_was_made_for(tmp_path):
    axes = np.arange(12, dtype=np.float32).reshape(3, 4).T
    write_components(tmp_path / "c.safetensors", axes, np.ones(3, np.float32), "abc")
    with safe_open(tmp_path / "c.safetensors", "np") as opened:
        assert opened.metadata() == {"format_version": "1", "genes_sha256": "abc"}
        np.testing.assert_array_equal(opened.get_tensor("components"), axes)
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
