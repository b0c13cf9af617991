"""Grid and variance on every real slice beside the checkout."""

import csv
from functools import cache

import anndata
import numpy as np
import pytest

from tests.conftest import REAL, ROOT
from workflow.curate import curate
from workflow.errors import RankOnPixels
from workflow.expression import log_normalise
from workflow.grid import make_grid
from workflow.layout import compact
from workflow.sample import Field

pytestmark = [
    pytest.mark.real,
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:Variable names are not unique", "ignore:Observation"),
]
WHOLE = {"slice": "whole_151673", "url": "../shared/data/visium/dlpfc_151673_whole_hvg5000.h5ad", "format": "h5ad"}
with open(ROOT / "tests/real/catalogue.tsv", newline="") as table:
    ROWS = {row["slice"]: row for row in csv.DictReader(table, delimiter="\t")}
ROWS["whole_151673"] = {**WHOLE, "organism": "human"}


@cache
def curated(name: str) -> anndata.AnnData:
    row = dict(ROWS[name])
    row["url"] = " ".join(url.replace("../shared/data", str(REAL)) for url in row["url"].split())
    return curate(row, ROOT / "catalogue/aux")


@pytest.mark.parametrize("name", ROWS)
def test_every_spot_lands_in_exactly_one_cell_and_the_inverse_is_exact(real_data, name):
    adata = curated(name)
    grid = make_grid(adata, "auto", 100)
    observed = grid.spot[grid.mask]
    assert sorted(observed) == list(range(adata.n_obs))
    assert (grid.spot[~grid.mask] == -1).all()
    assert grid.counts.sum(dtype=np.int64) == adata.X.sum(dtype=np.int64)
    for start in range(0, adata.n_obs, 500):
        part = slice(start, start + 500)
        np.testing.assert_array_equal(grid.counts[grid.mask][part], adata.X[observed[part]].toarray())
    np.testing.assert_array_equal(grid.array_row[grid.mask], adata.obs["array_row"].to_numpy()[observed])
    np.testing.assert_array_equal(grid.array_col[grid.mask], adata.obs["array_col"].to_numpy()[observed])
    assert grid.layout == ("rank" if name.startswith("her2st") else "offset")
    assert grid.n_merged == 0


def test_rank_leaves_151673_half_empty_and_offset_fills_it(real_data):
    fill = {layout: make_grid(curated("whole_151673"), layout, 100).mask.mean() for layout in ("rank", "offset")}
    assert 0.41 <= fill["rank"] <= 0.46
    assert 0.77 <= fill["offset"] <= 0.93


@pytest.mark.parametrize(
    "name", ["whole_151673", "dlpfc_151674", "lymph_node", "breast_brca0", "her2st_A1", "her2st_C1"]
)
def test_real_pixel_coordinates_are_refused_as_ranks(real_data, name):
    adata = curated(name)
    turn = np.deg2rad(3)
    pixels = adata.obsm["spatial"] @ [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    with pytest.raises(RankOnPixels, match=f"slice {name}.*own row and column"):
        compact(*np.round(pixels).T, "rank", slice=name)


def test_bins_of_a_real_slice_keep_every_count(real_data):
    adata = curated("whole_151673")
    grid = make_grid(adata, "bin", 300)
    assert grid.n_merged > adata.n_obs / 2
    assert grid.counts.sum(dtype=np.int64) == adata.X.sum(dtype=np.int64)
    assert grid.total_counts.sum(dtype=np.float64) == adata.obs["total_counts"].sum()


@pytest.mark.parametrize("name", ["dlpfc_151673", "lymph_node", "her2st_A1"])
def test_variance_of_real_windows_is_that_of_dense_float64(real_data, name):
    grid = make_grid(curated(name), "auto", 100)
    field = Field(grid, sorted(grid.gene_ids), (16, 16), 1e4)
    order = np.argsort(grid.gene_ids)
    origins = field.origins(0.4)
    origins = origins[np.random.default_rng(0).permutation(len(origins))[:6]]
    seen = {}
    for y, x in [*origins.tolist(), *origins[::-1].tolist()]:
        cells = grid.mask[y : y + 16, x : x + 16]
        counts = grid.counts[y : y + 16, x : x + 16][cells][:, order]
        expected = log_normalise(counts, grid.total_counts[y : y + 16, x : x + 16][cells][:, None], 1e4).var(axis=0)
        variance = field.variance(y, x)
        np.testing.assert_allclose(variance, expected, rtol=1e-6, atol=1e-13)
        assert (seen.setdefault((y, x), variance) == variance).all()
