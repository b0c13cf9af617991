"""The grid, on tiny simulated slices."""

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import zarr
from scipy import sparse

from workflow.errors import CellCollision, CountOverflow, DamagedFile, EmptySlice, NoLattice, RankOnPixels
from workflow.grid import ARRAYS, make_grid, read_grid, write_grid
from workflow.layout import compact, lattice_lines, most_observed, observed_in_windows, pad, place
from workflow.simulate import tiny_slice


def without_lattice(n: int = 400, um_per_px: float = 0.5, seed: int = 0):
    """A simulated slice with positions drawn at random, and a known pixel size."""
    adata = tiny_slice(seed=seed, kind="none")[:n].copy()
    adata.uns["stpatch"]["lattice"]["um_per_px"] = um_per_px
    return adata


def assert_inverse_is_exact(adata, grid):
    """Every spot in one cell, every observed cell one spot, and the cell holds what the spot counted."""
    observed = grid.spot[grid.mask]
    assert sorted(observed) == list(range(adata.n_obs))
    assert (grid.spot[~grid.mask] == -1).all()
    assert not grid.counts[~grid.mask].any()
    assert not grid.total_counts[~grid.mask].any()
    np.testing.assert_array_equal(grid.counts[grid.mask], adata.X[observed].toarray())
    np.testing.assert_array_equal(grid.total_counts[grid.mask], adata.obs["total_counts"].to_numpy()[observed])
    np.testing.assert_array_equal(grid.array_row[grid.mask], adata.obs["array_row"].to_numpy()[observed])
    np.testing.assert_array_equal(grid.array_col[grid.mask], adata.obs["array_col"].to_numpy()[observed])
    np.testing.assert_array_equal(grid.spot.ravel()[grid.cell], np.arange(adata.n_obs))


@pytest.mark.parametrize(
    ("kind", "layout", "resolved"),
    [
        ("staggered", "auto", "offset"),
        ("staggered", "rank", "rank"),
        ("square", "auto", "rank"),
    ],
)
def test_every_spot_lands_in_exactly_one_cell_and_the_inverse_is_exact(kind, layout, resolved):
    adata = tiny_slice(kind=kind)
    adata = adata[np.random.default_rng(0).permutation(adata.n_obs)].copy()
    grid = make_grid(adata, layout, 100)
    assert grid.layout == resolved
    assert (grid.n_spots, grid.n_merged) == (adata.n_obs, 0)
    assert_inverse_is_exact(adata, grid)


def test_offset_closes_the_rows_up_where_rank_leaves_a_checkerboard():
    adata = tiny_slice(holes=False)
    offset, rank = (make_grid(adata, layout, 100).mask for layout in ("offset", "rank"))
    assert offset.all()
    assert offset.shape == (24, 24)
    assert rank.shape == (24, 48)
    np.testing.assert_array_equal(rank, (np.indices(rank.shape).sum(axis=0) % 2) == 0)


@pytest.mark.parametrize("layout", ["offset", "rank"])
def test_the_lines_of_the_grid_tell_every_spots_array_position_even_where_a_row_is_missing(layout):
    adata = tiny_slice()
    adata = adata[adata.obs["array_row"] != 5].copy()
    grid = make_grid(adata, layout, 100)
    rows, cols = lattice_lines(grid.array_row, grid.array_col, layout)
    y, x = np.nonzero(grid.mask)
    np.testing.assert_array_equal(rows[y], grid.array_row[y, x])
    col = 2 * cols[x] + rows[y] % 2 if layout == "offset" else cols[x]
    np.testing.assert_array_equal(col, grid.array_col[y, x])


def test_a_missing_row_and_column_take_no_room():
    row, col = np.array([0, 0, 3, 3]), np.array([0, 8, 0, 8])
    y, x, shape = compact(row, col, "rank", slice="s")
    assert (y.tolist(), x.tolist(), shape) == ([0, 0, 1, 1], [0, 1, 0, 1], (2, 2))


@pytest.mark.parametrize("layout", ["offset", "rank"])
def test_a_slice_without_lattice_is_refused_ranks_with_the_reason(layout):
    with pytest.raises(RankOnPixels, match="rotated section.*own row and column.*layout 'bin'"):
        place(tiny_slice(kind="none"), layout, 100)


def test_pixels_passed_off_as_array_coordinates_are_refused():
    pixels = np.random.default_rng(0).integers(0, 20_000, (3000, 2))
    with pytest.raises(RankOnPixels, match="slice rotated.*found 3000 spots on 2[0-9]+ rows"):
        compact(pixels[:, 0], pixels[:, 1], "rank", slice="rotated")
    with pytest.raises(RankOnPixels):
        compact([0.5, 1.0], [0.0, 1.0], "rank", slice="s")


def test_two_spots_in_one_cell_are_refused_with_their_coordinates():
    with pytest.raises(CellCollision, match=r"slice legacy.*share.*layout 'offset'.*'auto'"):
        place(tiny_slice(kind="square", name="legacy"), "offset", 100)


def test_a_slice_without_spots_is_refused():
    with pytest.raises(EmptySlice, match="slice none"):
        compact([], [], "rank", slice="none")


def test_spots_of_one_bin_are_summed_and_counted():
    adata = without_lattice()
    grid = make_grid(adata, "auto", 300)
    assert grid.layout == "bin"
    um = adata.obsm["spatial"] * 0.5
    bins = np.floor((um - um.min(axis=0)) / 300).astype(int)
    expected = np.zeros(grid.counts.shape, dtype=np.int64)
    np.add.at(expected, (bins[:, 1], bins[:, 0]), adata.X.toarray())
    np.testing.assert_array_equal(grid.counts, expected)
    _, first, times = np.unique(bins, axis=0, return_index=True, return_counts=True)
    assert grid.n_merged == times[times > 1].sum() > 0
    assert sorted(grid.spot[grid.mask]) == sorted(first)
    assert grid.total_counts.sum() == adata.obs["total_counts"].sum()
    assert grid.mask.sum() == len(times)


def test_bins_need_a_known_and_sane_pixel_size():
    with pytest.raises(NoLattice, match="micrometres a pixel"):
        place(without_lattice(um_per_px=float("nan")), "bin", 100)
    with pytest.raises(NoLattice, match="check the pixel size"):
        place(without_lattice(um_per_px=500.0), "bin", 100)


def test_an_unknown_layout_is_refused():
    with pytest.raises(ValueError, match="hexagonal"):
        place(tiny_slice(), "hexagonal", 100)


def test_a_count_beyond_16_bits_is_refused_and_its_gene_named():
    adata = tiny_slice(name="deep")
    counts = adata.X.toarray()
    counts[5, 7] = 65_536
    adata.X = sparse.csr_matrix(counts)
    with pytest.raises(CountOverflow, match=f"slice deep.*65536 counts of gene {adata.var_names[7]}.*65535"):
        make_grid(adata, "auto", 100)
    adata.X.data[adata.X.data == 65_536] = 65_535
    assert make_grid(adata, "auto", 100).counts.max() == 65_535


@pytest.fixture
def written(tmp_path):
    grid = make_grid(tiny_slice(n_genes=1500), "auto", 100)  # two blocks of genes
    write_grid(grid, tmp_path / "tiny.zarr")
    return grid, tmp_path / "tiny.zarr"


def test_a_grid_reads_back_as_it_was_written(written):
    grid, path = written
    again = read_grid(path)
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(again, name), getattr(grid, name))
        assert getattr(again, name).dtype == getattr(grid, name).dtype
    assert again.slice == "tiny"
    assert again.lattice == pytest.approx(grid.lattice, nan_ok=True)


def test_arrays_have_the_documented_types_and_dimensions(written):
    group = zarr.open_group(written[1], mode="r")
    found = {name: (str(group[name].dtype), group[name].metadata.dimension_names) for name in ARRAYS}
    assert {name: dtype for name, (dtype, _) in found.items() if name != "gene_ids"} == {
        "counts": "uint16", "mask": "bool", "spot": "int32", "cell": "int32", "total_counts": "float32",
        "array_row": "int32", "array_col": "int32",
    }  # fmt: skip
    assert found["counts"][1] == ("y", "x", "gene")
    assert found["gene_ids"][1] == ("gene",)
    assert found["cell"][1] == ("spot",)
    assert group.metadata.zarr_format == 3


def test_the_same_slice_gives_the_same_bytes(tmp_path):
    def digest(folder: Path) -> list:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        return [(str(path.relative_to(folder)), hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]

    for name in ("a", "b"):
        write_grid(make_grid(tiny_slice(), "auto", 100), tmp_path / name)
    assert digest(tmp_path / "a") == digest(tmp_path / "b")


def test_a_lost_chunk_is_noticed(written):
    chunks = sorted(path for path in (written[1] / "counts" / "c").rglob("*") if path.is_file())
    assert len(chunks) == 2
    chunks[-1].unlink()
    with pytest.raises(DamagedFile, match=r"slice tiny.*'counts'.*a chunk is lost.*delete .*tiny\.zarr"):
        read_grid(written[1])


def test_a_missing_grid_array_or_an_unknown_version_is_named(written, tmp_path):
    with pytest.raises(DamagedFile, match="no zarr group"):
        read_grid(tmp_path / "nothing.zarr")
    group = zarr.open_group(written[1])
    group.attrs["format_version"] = 2
    with pytest.raises(DamagedFile, match="format_version 2"):
        read_grid(written[1])
    group.attrs["format_version"] = 1
    del group["mask"]
    with pytest.raises(DamagedFile, match="no array 'mask'"):
        read_grid(written[1])


@pytest.mark.parametrize("window", [(3, 5), (12, 2), (9, 20)])
def test_observed_cells_of_every_window_are_those_of_a_plain_count(window):
    mask = np.random.default_rng(0).random((9, 11)) < 0.6
    padded = pad(mask, window, False)
    h, w = window
    expected = [
        [padded[y : y + h, x : x + w].sum() for x in range(padded.shape[1] - w + 1)]
        for y in range(padded.shape[0] - h + 1)
    ]
    np.testing.assert_array_equal(observed_in_windows(mask, window), expected)
    assert most_observed(mask, window) == np.max(expected) / (h * w)


def test_padding_adds_unobserved_cells_at_the_far_side():
    padded = pad(np.ones((2, 5)), (4, 3), 0)
    assert padded.tolist() == [[1] * 5, [1] * 5, [0] * 5, [0] * 5]


def test_layouts_can_be_asked_for_without_loading_zarr_or_numba():
    code = "import workflow.layout, sys; sys.exit(bool({'zarr', 'numba', 'anndata'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


def test_a_pitch_that_nobody_knows_survives_as_null(tmp_path):
    adata = tiny_slice(kind="square")
    adata.uns["stpatch"]["lattice"]["pitch_um"] = float("nan")
    write_grid(make_grid(adata, "auto", 100), tmp_path / "g.zarr")
    assert "NaN" not in (tmp_path / "g.zarr/zarr.json").read_text()
    assert np.isnan(read_grid(tmp_path / "g.zarr").pitch_um)


@pytest.mark.parametrize("damage", [b"{", b"\xa0", b"Blosc"])
def test_metadata_that_zarr_cannot_read_is_damage_and_names_the_grid(tmp_path, damage):
    write_grid(make_grid(tiny_slice(), "offset", 100), tmp_path / "g.zarr")
    path = tmp_path / "g.zarr/counts/zarr.json"
    path.write_bytes(damage if damage != b"Blosc" else path.read_bytes().replace(b"blosc", damage))
    with pytest.raises(DamagedFile, match="g.zarr.*delete"):
        read_grid(tmp_path / "g.zarr")
