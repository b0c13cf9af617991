"""Masked region reconstruction: which spots are hidden, what interpolation makes of the others, and the table; planted answers."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, Matern, WhiteKernel
from sklearn.metrics import mean_absolute_error, mean_squared_error

from tests.conftest import ROOT
from workflow import reconstruct
from workflow.assemble import COLUMNS, Notes
from workflow.curate import curate
from workflow.errors import DamagedFile, TooFewGenes
from workflow.expression import log_normalise
from workflow.grid import Grid, make_grid, read_grid, write_grid
from workflow.reconstruct import Field, baselines, errors, load_prediction, measure, metrics, note_missing, table
from workflow.regions import draw, encode, read_regions, valid_corners, variable_genes
from workflow.simulate import tiny_slice

SETTINGS = {
    "windows": [12],
    "sides": [4, 7],
    "repeats": 5,
    "n_genes": 20,
    "min_observed": 0.5,
    "target_sum": 1e4,
    "seed": 0,
}


@pytest.fixture(scope="module")
def grid() -> Grid:
    return make_grid(tiny_slice(), "auto", 100)


def drawn(grid: Grid, **changes):
    return draw(grid, list(map(str, grid.gene_ids)), **SETTINGS | changes)


def expression(grid: Grid, columns=slice(None)) -> np.ndarray:
    flat = grid.counts.reshape(-1, grid.counts.shape[2])[:, columns]
    return log_normalise(flat, grid.total_counts.reshape(-1, 1), 1e4)


# Regions


def test_a_region_lies_in_the_middle_of_its_window_and_hides_every_observed_cell_of_it(grid):
    regions = drawn(grid)
    assert len(regions.region) == 10
    width = grid.mask.shape[1]
    for (window, side, _, y, x), hidden, visible in zip(regions.region, regions.hidden, regions.visible, strict=True):
        inside, around = np.zeros_like(grid.mask), np.zeros_like(grid.mask)
        inner = (window - side) // 2
        inside[y + inner : y + inner + side, x + inner : x + inner + side] = True
        around[y : y + window, x : x + window] = True
        assert around.sum() == window**2
        assert np.array_equal(hidden, np.flatnonzero(inside & grid.mask))
        assert np.array_equal(visible, np.flatnonzero(around & ~inside & grid.mask))
        assert len(hidden) >= side**2 / 2
        assert len(visible) >= (window**2 - side**2) / 2
        assert visible.max() // width < y + window


@pytest.mark.parametrize(("window", "side"), [(5, 2), (6, 3), (7, 6), (8, 8), (11, 3)])
def test_windows_that_can_be_drawn_equal_brute_force(window, side):
    observed = np.random.default_rng(1).random((10, 13)) < 0.6
    inner, expected = (window - side) // 2, []
    for y in range(10 - window + 1):
        for x in range(13 - window + 1):
            within = observed[y + inner : y + inner + side, x + inner : x + inner + side].sum()
            around = observed[y : y + window, x : x + window].sum() - within
            if side < window and within >= 0.6 * side**2 and around >= 0.6 * (window**2 - side**2):
                expected.append((y, x))
    assert valid_corners(observed, window, side, 0.6).tolist() == [list(corner) for corner in expected]


def test_spots_without_a_count_are_neither_hidden_nor_shown(grid):
    totals = grid.total_counts.copy()
    totals[:, 8:12] = 0
    regions = drawn(dataclasses.replace(grid, total_counts=totals), min_observed=0.1)
    assert len(regions.region)
    for cells in regions.hidden + regions.visible:
        assert (totals.ravel()[cells] > 0).all()


def test_the_same_seed_draws_the_same_windows_and_more_repeats_add_to_them(grid):
    few, again, many = drawn(grid), drawn(grid), drawn(grid, repeats=8)
    assert np.array_equal(few.region, again.region)
    of_many = many.region[many.region[:, 2] < 5]
    assert np.array_equal(of_many, few.region)
    assert len(np.unique(many.region[many.region[:, 1] == 4][:, 3:], axis=0)) == 8
    assert not np.array_equal(drawn(grid, seed=1).region, few.region)
    assert not np.array_equal(drawn(dataclasses.replace(grid, slice="other")).region, few.region)
    assert np.array_equal(drawn(grid, sides=[7]).region, few.region[5:])


def test_genes_are_the_most_variable_of_those_in_the_vocabulary(grid):
    variance = expression(grid)[grid.mask.ravel()].var(axis=0)
    names = list(map(str, grid.gene_ids))
    most = int(np.argmax(variance))
    vocabulary = ["ENSG00000000001", *(name for i, name in enumerate(names) if i != most)]
    genes, columns = variable_genes(grid, vocabulary, 15, 1e4)
    assert [vocabulary[gene] for gene in genes] == [names[column] for column in columns]
    assert (np.diff(genes) > 0).all()
    expected = np.delete(np.argsort(-variance), np.flatnonzero(np.argsort(-variance) == most))[:15]
    assert set(columns) == set(expected)
    assert len(variable_genes(grid, vocabulary, 500, 1e4)[0]) == len(names) - 1
    with pytest.raises(TooFewGenes):
        variable_genes(grid, ["ENSG00000000001"], 15, 1e4)


def test_a_section_without_room_is_noted_by_size(grid):
    regions, notes = drawn(grid, windows=[12, 40], sides=[4, 12], repeats=5000), Notes()
    note_missing(grid, regions, 5000, 20, notes)
    n = regions.placements[12, 4]
    assert len(regions.region) == n < 5000
    shape = " x ".join(map(str, grid.mask.shape))
    found = {row["head"]: (row["kind"], row["detail"]) for row in notes.rows}
    assert found == {
        "window12_side4": ("few_regions", f"{n} different windows for 5000 repeats"),
        "window12_side12": ("no_region", "a side of 12 is not below the window's 12"),
        "window40_side4": ("no_region", f"no window of 40 x 40 cells with enough tissue in {shape}"),
        "window40_side12": ("no_region", f"no window of 40 x 40 cells with enough tissue in {shape}"),
    }
    assert {(row["section"], row["protocol"]) for row in notes.rows} == {(grid.slice, "reconstruction")}


def test_a_section_that_measured_too_few_genes_is_noted(grid):
    notes = Notes()
    note_missing(grid, drawn(grid, n_genes=500), 5, 500, notes)
    assert [(row["kind"], row["detail"]) for row in notes.rows] == [("genes", "60 genes for 500, all it measured")]


@pytest.mark.parametrize("changes", [{}, {"windows": [40]}])
def test_regions_are_read_as_they_were_written_and_only_for_their_grid(grid, tmp_path, changes):
    regions, file = drawn(grid, **changes), tmp_path / "r.safetensors"
    content = [encode(regions, grid, genes_sha256="ab", seed=0, simulated=True) for _ in range(2)]
    assert content[0] == content[1]
    file.write_bytes(content[0])
    read = read_regions(file, grid)
    for name in ("genes", "columns", "region"):
        assert np.array_equal(getattr(read, name), getattr(regions, name))
    for name in ("hidden", "visible"):
        pairs = zip(getattr(read, name), getattr(regions, name), strict=True)
        assert all(np.array_equal(a, b) for a, b in pairs)
    assert read.placements == regions.placements
    with pytest.raises(DamagedFile, match="other"):
        read_regions(file, dataclasses.replace(grid, slice="other"))
    flipped = bytearray(content[0])
    flipped[-1] ^= 1
    for damaged in (content[0][:-40], flipped):
        file.write_bytes(damaged)
        with pytest.raises(DamagedFile):
            read_regions(file, grid)


# Baselines


def test_the_mean_of_16_is_over_the_16_nearest():
    visible = np.array([[x, 0.0] for x in range(1, 31)] + [[-x, 0.0] for x in range(1, 31)])
    values = np.concatenate([np.arange(1.0, 31), np.full(30, 100.0)])[:, None]
    found = baselines(np.array([[0.0, 0.0], [40.0, 0.0]]), visible, values)["mean_16"]
    assert found.ravel().tolist() == [(36 + 8 * 100) / 16, np.mean(range(15, 31))]  # 1 to 8 on both sides; 15 to 30


def test_of_spots_equally_far_the_first_are_nearest():
    corners = np.array([[0.0, 1], [1, 0], [0, -1], [-1, 0], [0, 0.5]])
    index, distance = reconstruct.nearest(np.zeros((1, 2)), corners, 3)
    assert index.tolist() == [[4, 0, 1]]
    assert distance.tolist() == [[0.5, 1, 1]]


def test_inverse_distance_weighs_by_the_inverse_square():
    hidden, visible, values = np.zeros((1, 2)), np.array([[1.0, 0], [0, 2.0]]), np.array([[0.0, 5.0], [10.0, 5.0]])
    index, distance = reconstruct.nearest(hidden, visible)
    assert distance.tolist() == [[1.0, 2.0]]
    np.testing.assert_allclose(reconstruct.inverse_distance(values, index, distance), [[2.0, 5.0]])


def plane(n: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0, 12, (n, 2))


def smooth(places: np.ndarray) -> np.ndarray:
    return np.sin(places[:, 0] / 3) + np.cos(places[:, 1] / 4)


def test_kriging_of_each_gene_equals_scikit_learn_with_the_same_kernel():
    visible, hidden, rng = plane(60, 0), plane(20, 1), np.random.default_rng(2)
    values = np.column_stack([smooth(visible) + 0.2 * rng.normal(size=60), rng.normal(3, 1, 60), smooth(visible)])
    field = Field(visible, 4.0)
    likelihood, best, mean = field.fit(values)
    predicted = field.predict(values, hidden)
    for gene, nugget in enumerate(reconstruct.NUGGETS[best]):
        inverse = np.linalg.inv(Matern(4.0, nu=1.5)(visible) + nugget * np.eye(60))
        assert mean[gene] == pytest.approx((inverse @ values[:, gene]).sum() / inverse.sum())  # least squares
        residual = values[:, gene] - mean[gene]
        variance = residual @ inverse @ residual / 60
        kernel = ConstantKernel(variance) * Matern(4.0, nu=1.5) + WhiteKernel(variance * nugget)
        process = GaussianProcessRegressor(kernel, alpha=0.0, optimizer=None).fit(visible, residual)
        np.testing.assert_allclose(predicted[:, gene], process.predict(hidden) + mean[gene], rtol=1e-6, atol=1e-8)
        constant = 30 * np.log(60) - 30 - 30 * np.log(2 * np.pi)
        assert process.log_marginal_likelihood_value_ == pytest.approx(likelihood[gene] + constant)
    assert best[2] < best[0] < best[1]  # no noise, some, nothing else


def test_no_other_nugget_of_the_list_is_likelier():
    visible = plane(40, 3)
    values = smooth(visible) + 0.5 * np.random.default_rng(0).normal(size=40)
    likelihood, (best,), _ = Field(visible, 2.0).fit(values[:, None])
    found = []
    for nugget in reconstruct.NUGGETS:
        inverse = np.linalg.inv(Matern(2.0, nu=1.5)(visible) + nugget * np.eye(40))
        residual = values - (inverse @ values).sum() / inverse.sum()
        found.append(-20 * np.log(residual @ inverse @ residual) + np.linalg.slogdet(inverse)[1] / 2)
    assert best == np.argmax(found)
    assert likelihood[0] == pytest.approx(max(found))


def test_a_longer_field_gets_a_longer_kernel():
    visible, rng = plane(200, 5), np.random.default_rng(0)
    lengths = {}
    for length in (1.0, 8.0):
        root = np.linalg.cholesky(Matern(length, nu=1.5)(visible) + 0.1 * np.eye(200))
        lengths[length] = reconstruct.likeliest_length(visible, root @ rng.normal(size=(200, 30)))
    assert lengths == {1.0: 1.0, 8.0: 8.0}


def test_a_constant_gene_is_predicted_as_its_value_and_changes_no_length():
    visible, hidden = plane(50, 0), plane(9, 1)
    values = np.column_stack([smooth(visible), np.zeros(50), np.full(50, 2.5)])
    found = baselines(hidden, visible, values)
    for method in found:
        np.testing.assert_allclose(found[method][:, 1], 0, atol=1e-9)
        np.testing.assert_allclose(found[method][:, 2], 2.5, atol=1e-9)
    assert reconstruct.likeliest_length(visible, values) == reconstruct.likeliest_length(visible, values[:, :1])


def test_kriging_beats_the_nearest_on_a_smooth_field_and_components_beat_single_genes_where_genes_move_together():
    rng, visible, hidden = np.random.default_rng(0), plane(150, 0), plane(40, 1)
    loadings = rng.normal(size=60)
    values = smooth(visible)[:, None] * loadings + rng.normal(0, 1.5, (150, 60))
    truth = smooth(hidden)[:, None] * loadings
    found = {method: ((y - truth) ** 2).mean() for method, y in baselines(hidden, visible, values).items()}
    assert found["kriging"] < 0.8 * found["mean_16"] < 0.8 * found["window_mean"]
    assert found["kriging_pca"] < 0.8 * found["kriging"]


def test_two_visible_spots_are_enough():
    found = baselines(np.zeros((3, 2)), np.array([[1.0, 0], [0, 2.0]]), np.array([[0.0, 5.0], [10.0, 5.0]]))
    for method, y in found.items():
        assert y.shape == (3, 2), method
        assert np.isfinite(y).all(), method


# Metrics


def test_errors_equal_scikit_learn_and_correlations_numpy():
    rng = np.random.default_rng(0)
    truth, y = rng.normal(size=(9, 5)), rng.normal(size=(9, 5))
    truth[:, 3] = 1.0  # its truth does not vary: not counted
    y[:, 4] = 2.0  # the prediction does not vary: counts as 0
    found = metrics(errors(truth, y), errors(truth, np.zeros_like(truth)))
    assert found["mse"] == pytest.approx(mean_squared_error(truth, y))
    assert found["mae"] == pytest.approx(mean_absolute_error(truth, y))
    assert found["pearson"] == pytest.approx(sum(np.corrcoef(truth[:, k], y[:, k])[0, 1] for k in range(3)) / 4)
    assert found["r2"] == pytest.approx(1 - ((truth - y) ** 2).sum() / (truth**2).sum())


def test_two_spots_have_no_correlation_and_a_flawless_gene_mean_no_r2():
    truth = np.array([[1.0, 2.0], [2.0, 1.0]])
    assert set(metrics(errors(truth, truth + 1), errors(truth, truth))) == {"mse", "mae"}


def test_pooled_scores_weigh_every_entry_alike():
    def one(*sums):
        return {"gene_mean": np.array([10.0, 1, sums[2], 0, 0]), "mine": np.array(sums, dtype=float)}

    by_section = {
        "a": {(24, 8, 0): one(4, 2, 4, 1.5, 2)},
        "b": {(24, 8, 0): one(1, 3, 12, 0.5, 2), (24, 8, 1): one(9, 9, 9, 0, 0)},
    }
    found = table("set", by_section)
    assert list(found.columns) == COLUMNS
    mine = found[found["method"] == "mine"].set_index(["section", "split", "metric"])["value"]
    assert dict(mine["pooled"][0]) == {"mse": 5 / 16, "mae": 5 / 16, "pearson": 0.5, "r2": 0.75}
    assert dict(mine["a"][0]) == {"mse": 1.0, "mae": 0.5, "pearson": 0.75, "r2": 0.6}
    assert dict(mine["pooled"][1]) == dict(mine["b"][1]) == {"mse": 1.0, "mae": 1.0, "r2": pytest.approx(0.1)}
    assert set(found["head"]) == {"window24_side8"}
    assert set(found["protocol"]) == {"reconstruction"}


# A section


def test_the_truth_as_prediction_is_flawless_and_the_gene_mean_is_that_of_all_spots_outside_the_region(grid):
    regions = drawn(grid)
    values = expression(grid, regions.columns)
    found = dict(measure(grid, regions, {"stpatch": values[np.concatenate(regions.hidden)]}, 1e4))
    assert list(found) == [(12, side, repeat) for side in (4, 7) for repeat in range(5)]
    observed = grid.mask.ravel()
    for methods, hidden in zip(found.values(), regions.hidden, strict=True):
        flawless = metrics(methods["stpatch"], methods["gene_mean"])
        assert flawless == pytest.approx({"mse": 0, "mae": 0, "pearson": 1, "r2": 1})
        outside = observed.copy()
        outside[hidden] = False
        expected = ((values[hidden] - values[outside].mean(axis=0)) ** 2).mean()
        of_mean = metrics(methods["gene_mean"], methods["gene_mean"])
        assert of_mean == pytest.approx({"mse": expected, "mae": of_mean["mae"], "pearson": 0, "r2": 0})
        assert list(methods) == [
            "gene_mean", "window_mean", "mean_16", "inverse_distance", "kriging", "kriging_pca", "stpatch"
        ]  # fmt: skip


def test_interpolation_never_sees_a_hidden_spot(grid):
    """With other counts at the hidden cells every prediction stays; the errors tell it, against a truth of zeros."""
    regions = drawn(grid, repeats=1, sides=[4])
    (hidden,) = regions.hidden
    values = expression(grid, regions.columns)
    places = reconstruct.plane("staggered", grid.array_row.ravel(), grid.array_col.ravel())
    (_, found), = measure(grid, regions, {}, 1e4)  # fmt: skip
    expected = baselines(places[hidden], places[regions.visible[0]], values[regions.visible[0]])
    for method, y in expected.items():
        np.testing.assert_allclose(found[method], errors(values[hidden], y))


def test_distances_are_those_of_the_lattice_where_rows_are_missing():
    """The grid closes the gap of the lost rows; spots across it are no neighbours."""
    adata = tiny_slice(shape=(30, 48), holes=False)
    row = adata.obs["array_row"].to_numpy()
    grid = make_grid(adata[(row < 12) | (row >= 18)].copy(), "auto", 100)
    regions = drawn(grid, sides=[4], repeats=10**6, n_genes=8)
    across = [i for i, y in enumerate(regions.region[:, 3]) if y == 6][:3]  # hidden: two rows on each side of the gap
    hidden, visible = ([cells[i] for i in across] for cells in (regions.hidden, regions.visible))
    regions = regions._replace(region=regions.region[across], hidden=hidden, visible=visible)
    values, (_, width) = expression(grid, regions.columns), grid.mask.shape
    found = [methods["inverse_distance"] for _, methods in measure(grid, regions, {}, 1e4)]
    assert len(found) == 3
    for i, (hidden, visible) in enumerate(zip(regions.hidden, regions.visible, strict=True)):
        expected = {}
        rows, cols = grid.array_row.ravel(), grid.array_col.ravel()
        for name, x, y in (
            ("lattice", cols / 2, rows * np.sqrt(3) / 2),
            ("compacted", cols / 2, np.arange(rows.size) // width),
        ):
            places = np.column_stack([x, y])
            nearest = reconstruct.nearest(places[hidden], places[visible])
            expected[name] = errors(values[hidden], reconstruct.inverse_distance(values[visible], *nearest))
        np.testing.assert_allclose(found[i], expected["lattice"])
        assert not np.allclose(found[i], expected["compacted"])


@pytest.mark.parametrize("change", ["slice", "cells", "genes", "nan", "version"])
def test_predictions_of_other_regions_are_refused(grid, tmp_path, change):
    regions = drawn(grid)
    cell = np.concatenate(regions.hidden)
    y, about = np.zeros((len(cell), 20), np.float32), {"format_version": "1", "slice": grid.slice, "unit": "patch"}
    file = tmp_path / "p.safetensors"
    save_file({"Y": y, "cell": cell}, file, about)
    assert load_prediction(file, grid.slice, regions)[1] == about
    if change == "slice":
        about["slice"] = "other"
    elif change == "cells":
        cell = cell[::-1].copy()
    elif change == "genes":
        y = y[:, 1:].copy()
    elif change == "nan":
        y[3, 3] = np.nan
    else:
        about["format_version"] = "2"
    save_file({"Y": y, "cell": cell}, file, about)
    with pytest.raises(DamagedFile):
        load_prediction(file, grid.slice, regions)


def test_without_a_lattice_distances_are_those_of_the_bins(tmp_path):
    adata = tiny_slice(shape=(26, 52), kind="none")
    adata.uns["stpatch"]["lattice"]["um_per_px"] = 1.0
    write_grid(make_grid(adata, "auto", 150), tmp_path / "g.zarr")
    grid = read_grid(tmp_path / "g.zarr")
    assert grid.n_merged
    regions = drawn(grid, sides=[4], repeats=2)
    values = expression(grid, regions.columns)
    y, x = np.divmod(np.arange(grid.mask.size), grid.mask.shape[1])
    places = np.column_stack([x, y]).astype(float)
    found = [methods for _, methods in measure(grid, regions, {}, 1e4)]
    for methods, hidden, visible in zip(found, regions.hidden, regions.visible, strict=True):
        index, distance = reconstruct.nearest(places[hidden], places[visible])
        expected = reconstruct.inverse_distance(values[visible], index, distance)
        np.testing.assert_allclose(methods["inverse_distance"], errors(values[hidden], expected))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Variable names are not unique", "ignore:Observation")
def test_on_real_cortex_kriging_beats_the_nearest_and_the_mean(real_data):
    file = real_data / "visium/dlpfc_151673_crop_allgenes.h5ad"
    row = {"slice": "cortex", "source": "file", "url": str(file), "format": "h5ad", "organism": "human"}
    grid = make_grid(curate(row | {"labels": "", "label_column": ""}, ROOT / "catalogue/aux"), "auto", 100)
    regions = drawn(grid, windows=[24], sides=[8], repeats=3, n_genes=128)
    found = table("set", {"cortex": dict(measure(grid, regions, {}, 1e4))}).query(
        "section == 'pooled' and metric == 'mse'"
    )
    mse = found.groupby("method")["value"].mean()
    assert mse["kriging_pca"] < mse["mean_16"] < mse["gene_mean"]
    assert mse["kriging"] < mse["window_mean"]
