"""Where each spot lies on the grid: the three layouts, and how full the windows of a grid are.

Only numpy is imported: `admit` asks here whether a slice can be cut into windows, without opening a grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from workflow.errors import CellCollision, EmptySlice, NoLattice, RankOnPixels
from workflow.keys import Keys

LAYOUTS = ("offset", "rank", "bin")
AUTO = {"staggered": "offset", "square": "rank", "none": "bin"}  # kind of lattice -> what `auto` means

# Coordinates are pixels, not a lattice, where both have more distinct values than the largest capture area has rows
# (11 mm Visium: 128 x 224) and the spots fill hardly any of the cells (full-resolution pixels: less than a hundredth).
MOST_LINES, LEAST_FILL = 128, 0.05


@dataclass(frozen=True)
class Placement:
    """The cell of every spot.

    Attributes
    ----------
    layout
        ``offset``, ``rank`` or ``bin``.
    y, x
        int64 [n]: cell of spot i.
    shape
        (H', W') of the grid.
    array_row, array_col
        int32 [n]: original coordinates; for ``bin`` without a lattice, of the bin.
    pitch_um
        Distance of neighbouring spots, or the width of a bin.
    """

    layout: str
    y: np.ndarray
    x: np.ndarray
    shape: tuple[int, int]
    array_row: np.ndarray
    array_col: np.ndarray
    pitch_um: float


def ranks(values) -> np.ndarray:
    """Rank of each value among the distinct ones, from 0 (Eq. 5). int64 [n]."""
    return np.unique(values, return_inverse=True)[1].reshape(-1).astype(np.int64)


def compact(array_row, array_col, layout: str, *, slice: str) -> tuple[np.ndarray, np.ndarray, tuple[int, int]]:
    """Grid cell of each spot from its lattice coordinates (Eq. 5).

    ``rank`` takes the ranks of row and column; on a staggered lattice half of its cells stay empty. ``offset`` takes
    the rank of ``array_col // 2`` instead: rows of opposite parity close up, and no structured holes remain.

    Parameters
    ----------
    array_row, array_col
        Integers [n]: coordinates on the capture lattice.
    layout
        ``offset`` or ``rank``.
    slice
        Name of the slice, for messages.

    Returns
    -------
    y, x, shape
        int64 [n], int64 [n], (H', W').

    Raises
    ------
    EmptySlice
        No spot.
    RankOnPixels
        Coordinates that are no lattice: fractions, or many lines with hardly a spot on each.
    CellCollision
        Two spots in one cell (``offset`` on a square lattice, or a spot listed twice).
    """
    row, col = np.asarray(array_row), np.asarray(array_col)
    if len(row) == 0:
        raise EmptySlice(slice=slice, found="no spot", expected="at least one", next_step="remove the slice")
    rows, cols = len(np.unique(row)), len(np.unique(col))
    sparse = min(rows, cols) > MOST_LINES and len(row) < LEAST_FILL * rows * cols
    if sparse or np.any(row != np.floor(row)) or np.any(col != np.floor(col)):
        raise _pixels(slice, f"{len(row)} spots on {rows} rows and {cols} columns")
    row, col = row.astype(np.int64), col.astype(np.int64)
    y, x = ranks(row), ranks(col // 2 if layout == "offset" else col)
    shape = (int(y.max()) + 1, int(x.max()) + 1)
    cells, first, times = np.unique(y * shape[1] + x, return_index=True, return_counts=True)
    if len(cells) < len(y):
        at = first[np.argmax(times)]
        raise CellCollision(
            slice=slice,
            found=f"{len(y)} spots in {len(cells)} cells; row {row[at]}, column {col[at]} shares its cell",
            expected=f"one spot a cell in layout '{layout}'",
            next_step="use layout 'auto' (or 'rank' on a square lattice), and look for spots listed twice",
        )
    return y, x, shape


def _pixels(slice: str, found: str) -> RankOnPixels:
    return RankOnPixels(
        slice=slice,
        found=found,
        expected="coordinates on a lattice: pixels rank badly, as a rotated section gives every spot its own row and "
        "column and the grid stays empty but for one cell a line",
        next_step="give array_row and array_col, or use layout 'bin'",
    )


def place(adata, layout: str, pitch_um: float) -> Placement:
    """Cells of a curated slice's spots in the layout that the config asks for.

    Parameters
    ----------
    adata
        Curated slice (docs/format.md); its matrix isn't touched.
    layout
        ``auto``, ``offset``, ``rank`` or ``bin``; ``auto`` is ``offset`` where rows are staggered, ``rank`` on a
        square lattice, ``bin`` where there is none.
    pitch_um
        Width of a bin in micrometres; used by ``bin`` alone.

    Raises
    ------
    RankOnPixels
        ``offset`` or ``rank`` of a slice without lattice.
    NoLattice
        ``bin`` of a slice whose pixel size isn't known, or whose positions spread over absurdly many bins.
    EmptySlice, CellCollision
        See `compact`.
    """
    facts = adata.uns[Keys.STPATCH]
    slice, lattice = str(facts["slice"]), facts["lattice"]
    kind = str(lattice["kind"])
    layout = AUTO[kind] if layout == "auto" else layout
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: expected 'auto' or one of {', '.join(LAYOUTS)}")
    if layout == "bin":
        return _bins(slice, np.asarray(adata.obsm[Keys.SPATIAL]), float(lattice["um_per_px"]), float(pitch_um))
    if kind == "none":
        raise _pixels(slice, "pixel coordinates alone, and no lattice that fits them")
    row, col = adata.obs[Keys.ARRAY_ROW].to_numpy(), adata.obs[Keys.ARRAY_COL].to_numpy()
    y, x, shape = compact(row, col, layout, slice=slice)
    return Placement(
        layout, y, x, shape, row.astype(np.int32), col.astype(np.int32), pitch_um=float(lattice["pitch_um"])
    )


def _bins(slice: str, pixels: np.ndarray, um_per_px: float, pitch_um: float) -> Placement:
    if len(pixels) == 0:
        raise EmptySlice(slice=slice, found="no spot", expected="at least one", next_step="remove the slice")
    if not um_per_px > 0:
        raise NoLattice(
            slice=slice,
            found=f"{um_per_px} micrometres a pixel",
            expected="a known pixel size: bins are measured in micrometres",
            next_step="give scale factors or array coordinates, or leave the slice out",
        )
    bins = np.floor((pixels - pixels.min(axis=0)) * um_per_px / pitch_um).astype(np.int64)
    x, y = bins[:, 0], bins[:, 1]
    shape = (int(y.max()) + 1, int(x.max()) + 1)
    if shape[0] * shape[1] > 100 * len(y) + 10_000:
        raise NoLattice(
            slice=slice,
            found=f"{shape[0]} x {shape[1]} bins of {pitch_um:g} um for {len(y)} spots",
            expected="a grid of which at least a hundredth is observed",
            next_step="check the pixel size for outliers and unit, or raise pitch_um",
        )
    return Placement("bin", y, x, shape, y.astype(np.int32), x.astype(np.int32), pitch_um=pitch_um)


def lattice_lines(array_row: np.ndarray, array_col: np.ndarray, layout: str) -> tuple[np.ndarray, np.ndarray]:
    """What a grid's lines stand for on the capture lattice, so that neighbours can be told from positions in a crop.

    Parameters
    ----------
    array_row, array_col
        int [H', W'] of a grid, -1 where nothing was observed.
    layout
        ``offset``, ``rank`` or ``bin``.

    Returns
    -------
    rows, cols
        int64 [H'], int64 [W']: the array row of each line; the array column of each column, its half in `offset`
        (the column is then ``2 * half + row % 2``, or one more where the lattice counts so); -1 for a line of bins
        without a spot.
    """
    cols = array_col // 2 if layout == "offset" else array_col
    return array_row.max(axis=1).astype(np.int64), cols.max(axis=0).astype(np.int64)


def pad(array: np.ndarray, window: tuple[int, int], fill=0) -> np.ndarray:
    """`array` [H', W', ...] enlarged at its far sides to at least the window with `fill` (unobserved cells)."""
    (h, w), (height, width) = window, array.shape[:2]
    if height >= h and width >= w:
        return array
    larger = np.full((max(height, h), max(width, w), *array.shape[2:]), fill, dtype=array.dtype)
    larger[:height, :width] = array
    return larger


def observed_in_windows(mask: np.ndarray, window: tuple[int, int]) -> np.ndarray:
    """Number of observed cells of the window at each valid origin of the padded grid.

    Parameters
    ----------
    mask
        bool [H', W'].
    window
        (h, w).

    Returns
    -------
    numpy.ndarray
        int64 [max(H', h) - h + 1, max(W', w) - w + 1].
    """
    h, w = window
    mask = pad(np.asarray(mask, dtype=bool), window)
    above = np.zeros((mask.shape[0] + 1, mask.shape[1] + 1), dtype=np.int64)
    above[1:, 1:] = mask.cumsum(axis=0).cumsum(axis=1)
    return above[h:, w:] - above[:-h, w:] - above[h:, :-w] + above[:-h, :-w]


def most_observed(mask: np.ndarray, window: tuple[int, int]) -> float:
    """Greatest observed fraction over all windows of the padded grid: below `min_observed`, none can be drawn."""
    return float(observed_in_windows(mask, window).max() / (window[0] * window[1]))
