"""Algorithm 1, on tiny simulated slices and planted cases."""

import itertools

import numpy as np
import pytest
from scipy.stats import chisquare

from workflow.errors import TooFewGenes, WindowTooLarge
from workflow.expression import log_normalise
from workflow.grid import make_grid
from workflow.layout import pad
from workflow.sample import Field, draw_genes, draw_windows, smallest, window_rng
from workflow.simulate import tiny_slice

WINDOW = (8, 6)
DRAW = {"n": 40, "m": 20, "selection": "weighted", "epsilon": 1e-6, "min_observed": 0.5, "seed": 3}


@pytest.fixture(scope="module")
def grid():
    return make_grid(tiny_slice(), "auto", 100)


@pytest.fixture
def field(grid):
    return Field(grid, sorted(grid.gene_ids), WINDOW, 1e4)


def dense_variance(grid, y, x, window):
    """Variance as Algorithm 1 states it, in dense float64."""
    h, w = window
    mask = pad(grid.mask, window, False)[y : y + h, x : x + w]
    counts = pad(grid.counts, window)[y : y + h, x : x + w][mask]
    totals = pad(grid.total_counts, window)[y : y + h, x : x + w][mask]
    return log_normalise(counts, totals[:, None], 1e4).var(axis=0)


@pytest.mark.parametrize("window", [(8, 6), (3, 3), (24, 30)])
def test_variance_is_that_of_the_dense_window_in_any_order_of_windows(grid, window):
    field = Field(grid, list(grid.gene_ids), window, 1e4)
    origins = field.origins(0.01)
    expected = {(y, x): dense_variance(grid, y, x, window) for y, x in origins.tolist()}
    seen = {}
    for order in (origins, origins[::-1], np.random.default_rng(0).permutation(origins)):
        for y, x in order.tolist():
            variance = field.variance(y, x)
            np.testing.assert_allclose(variance, expected[y, x], rtol=1e-6, atol=1e-12)
            assert (seen.setdefault((y, x), variance) == variance).all()  # to the last bit


def test_variance_holds_where_counts_are_large_and_nearly_flat(grid):
    deep = grid.counts.astype(np.int64)
    deep[..., 0], deep[..., 1] = 60_000, 30_000 + np.arange(grid.mask.size).reshape(grid.mask.shape) % 2
    deep[~grid.mask] = 0
    totals = np.where(grid.mask, 1e6, 0).astype(np.float32)
    changed = type(grid)(**{**vars(grid), "counts": deep.astype(np.uint16), "total_counts": totals})
    field = Field(changed, list(grid.gene_ids), WINDOW, 1e4)
    y, x = field.origins(0.9)[0].tolist()
    expected = dense_variance(changed, y, x, WINDOW)
    assert expected[0] == pytest.approx(0, abs=1e-12)
    assert 0 < expected[1] < 1e-8
    np.testing.assert_allclose(field.variance(y, x), expected, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("m", [1, 2, 3])
def test_gene_subsets_are_drawn_with_the_frequencies_of_exact_enumeration(m):
    weights = np.array([0.05, 0.3, 1.0, 2.0, 4.0])
    epsilon = 0.05

    def probability(subset):
        total = 0.0
        for order in itertools.permutations(subset):  # successive draws without replacement
            left, product = (weights + epsilon).sum(), 1.0
            for gene in order:
                product *= (weights[gene] + epsilon) / left
                left -= weights[gene] + epsilon
            total += product
        return total

    subsets = list(itertools.combinations(range(5), m))
    exact = np.array([probability(subset) for subset in subsets])
    assert exact.sum() == pytest.approx(1)
    n = 20_000
    seen = dict.fromkeys(subsets, 0)
    for number in range(n):
        seen[tuple(draw_genes(weights, m, "weighted", epsilon, window_rng(0, "case", number)).tolist())] += 1
    assert chisquare([seen[subset] for subset in subsets], exact * n).pvalue > 1e-3


def test_random_selection_ignores_the_variance():
    seen = np.zeros(5)
    for number in range(5000):
        seen[draw_genes(np.array([0, 0, 1.0, 10, 1000]), 2, "random", 1e-6, window_rng(0, "case", number))] += 1
    assert chisquare(seen).pvalue > 1e-3


def test_hvg_takes_the_most_variable_and_of_equals_the_first():
    variance = np.array([1.0, 3.0, 2.0, 3.0, 2.0, 0.0])
    assert draw_genes(variance, 3, "hvg", 1e-6, window_rng(0, "s", 0)).tolist() == [1, 2, 3]


def test_an_unknown_selection_is_refused():
    with pytest.raises(ValueError, match="best.*weighted, hvg, random"):
        draw_genes(np.ones(3), 2, "best", 1e-6, window_rng(0, "s", 0))


@pytest.mark.parametrize(("n", "m"), [(5, 5), (100, 1), (100, 99), (3000, 40), (12_000, 512), (20_000, 2500)])
def test_the_smallest_keys_are_found(n, m):
    for seed in range(5):
        keys = np.random.default_rng(seed).standard_exponential(n)
        assert sorted(smallest(keys, m)) == sorted(np.argsort(keys)[:m])
    ties = np.repeat(0.5, n)
    assert len(set(smallest(ties, m))) == m


def test_windows_hold_what_the_grid_holds(grid, field):
    for window in draw_windows(field, **DRAW):
        y, x = slice(window.y, window.y + WINDOW[0]), slice(window.x, window.x + WINDOW[1])
        assert (np.diff(window.genes) > 0).all()
        assert window.counts.shape == (20, *WINDOW)
        ids = np.array(sorted(grid.gene_ids))[window.genes]
        columns = [list(grid.gene_ids).index(gene) for gene in ids]
        np.testing.assert_array_equal(window.counts, grid.counts[y, x][:, :, columns].transpose(2, 0, 1))
        np.testing.assert_array_equal(window.totals, grid.total_counts[y, x])
        assert grid.mask[y, x].mean() >= 0.5


def test_each_window_names_the_observed_cell_nearest_its_corner(grid, field):
    for window in draw_windows(field, **DRAW):
        inside = np.argwhere(grid.mask[window.y : window.y + WINDOW[0], window.x : window.x + WINDOW[1]])
        nearest = (inside**2).sum(axis=1).min()
        at = np.argwhere((grid.array_row == window.array_row) & (grid.array_col == window.array_col))
        assert ((at - [window.y, window.x]) ** 2).sum() == nearest


def test_a_window_depends_on_seed_slice_and_number_alone(field):
    def drawn(**changes):
        windows = draw_windows(field, **{**DRAW, **changes})
        return {window.number: (window.y, window.x, window.genes.tolist()) for window in windows}

    forty = drawn()
    assert sorted(forty) == list(range(40))
    assert drawn(n=7) == {number: forty[number] for number in range(7)}
    assert drawn(seed=4) != forty
    field.slice = "another"
    assert drawn() != forty


def test_origins_are_uniform_over_the_windows_observed_enough(grid, field):
    origins = field.origins(0.8)
    drawn = [(w.y, w.x) for w in draw_windows(field, **{**DRAW, "n": 8000, "m": 1, "min_observed": 0.8})]
    times = [drawn.count(origin) for origin in map(tuple, origins.tolist())]
    assert sum(times) == 8000
    assert chisquare(times).pvalue > 1e-3


def test_genes_outside_the_vocabulary_and_unmeasured_ones_never_enter(grid):
    measured = sorted(grid.gene_ids)
    vocabulary = ["ENSG0", *measured[::2], "ENSGZ"]
    field = Field(grid, vocabulary, WINDOW, 1e4)
    assert field.genes.tolist() == list(range(1, 31))
    for window in draw_windows(field, **{**DRAW, "m": 30}):
        assert window.genes.tolist() == list(range(1, 31))
        columns = [list(grid.gene_ids).index(vocabulary[gene]) for gene in window.genes]
        expected = grid.counts[window.y : window.y + 8, window.x : window.x + 6][:, :, columns]
        np.testing.assert_array_equal(window.counts, expected.transpose(2, 0, 1))


def test_a_slice_smaller_than_the_window_is_padded_at_its_far_side(grid):
    field = Field(grid, list(grid.gene_ids), (30, 10), 1e4)
    window = next(draw_windows(field, **DRAW))
    height = grid.mask.shape[0]
    assert (window.counts.shape, window.y) == ((20, 30, 10), 0)
    assert not window.counts[:, height:].any()
    assert not window.totals[height:].any()
    np.testing.assert_array_equal(window.totals[:height], grid.total_counts[:, window.x : window.x + 10])


def test_a_window_larger_than_the_slice_is_refused_where_too_little_is_observed(grid):
    field = Field(grid, list(grid.gene_ids), (60, 60), 1e4)
    with pytest.raises(WindowTooLarge, match=r"slice tiny.*60 x 60 window.*min_observed: 0\.5.*smaller window"):
        next(draw_windows(field, **DRAW))


def test_fewer_genes_than_a_window_draws_are_refused(field):
    with pytest.raises(TooFewGenes, match="slice tiny.*found 60 measured genes.*at least the 61.*lower `genes`"):
        next(draw_windows(field, **{**DRAW, "m": 61}))
