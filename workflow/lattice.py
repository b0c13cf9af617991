"""The capture lattice: told apart by its array coordinates, or inferred from pixel coordinates where a source gives only those.

Visium spots are staggered: site (row, col) exists where row + col is even, and lies at (col / 2, row * sqrt(3) / 2) pitches.
Legacy Spatial Transcriptomics is square: site (row, col) lies at (col, row) pitches.

Inference is linear algebra on the whole slice at once, so that holes and islands don't matter:
1. pitch: median distance to the nearest spot; pairs within 1.25 pitches are neighbours;
2. kind and rotation: the mean of exp(6 i angle) over neighbours is near 1 in size on a staggered lattice, that of exp(4 i angle) on a square one;
3. the neighbours' displacements, as whole numbers of two lattice steps, give the steps by least squares;
4. sites by rounding, then an affine least-squares fit of pixels on sites, until no site changes;
5. the fit must leave less than a tenth of the pitch (root mean square), and no two spots on one site.
Which of the three directions of a staggered lattice its rows follow can't be seen from spots alone: the one nearest to an axis of the
image is taken. The neighbours of a spot are the same for each choice, also where the image is rotated or mirrored.

Given coordinates are believed only if the pixels agree: the affine fit must leave less than half a pitch (real Visium slices: 0.02 at
most, her2st 0.09; shuffled spots: several pitches) and stretch no axis to twice the other (real slices: 1.02 at most; pixels that are
column and row themselves: 1.7; row and column exchanged on a staggered lattice: 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from workflow.errors import NoLattice, PositionsMismatch

MAX_RESIDUAL = 0.1  # rms in pitches
MAX_DISAGREEMENT = 0.5  # the same, of given coordinates
MAX_STRETCH = 2.0  # of one axis against the other, of given coordinates
MIN_OTHER_PARITY = 0.1  # of the spots on a square lattice; about a half have either
MIN_WIDTH = 1e-3  # of positions across, as part of that along; the narrowest lattice (2 rows of 224 columns) has 0.008
FEWEST_SPOTS = 10
VISIUM_PITCH_UM = 100.0


@dataclass(frozen=True)
class Lattice:
    """Where the spots sit, and how well pixels agree."""

    kind: str  # "staggered" or "square"
    row: np.ndarray  # int32 [n]
    col: np.ndarray  # int32 [n]
    pitch_px: float  # centre to centre of neighbours; NaN where pixels don't tell
    residual: float  # rms distance of spots from the fitted lattice, in pitches; NaN where not fitted

    def plane(self) -> np.ndarray:
        """Positions [n, 2] (x, y) of the spots' sites, in pitches."""
        return plane(self.kind, self.row, self.col)


def plane(kind: str, row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Positions [n, 2] (x, y) of sites, in pitches."""
    if kind == "staggered":
        return np.column_stack([col / 2, row * np.sqrt(3) / 2])
    return np.column_stack([col, row]).astype(float)


def known_lattice(
    row: np.ndarray, col: np.ndarray, pixels: np.ndarray | None, slice: str = "", file: str = ""
) -> Lattice:
    """The lattice of given array coordinates: staggered if row + col has one parity, else square.

    Parameters
    ----------
    row, col
        int [n]: array coordinates.
    pixels
        float64 [n, 2] (x, y), or None; tell pitch and residual, unless they (or the sites) are all in one line.
    slice, file
        For the error.

    Raises
    ------
    PositionsMismatch
        A few spots of the other parity (row + col), which neither lattice has; pixels half a pitch or more from the lattice, or a lattice
        that has to be stretched twofold.
    """

    def refuse(found: str, expected: str) -> PositionsMismatch:
        return PositionsMismatch(
            slice=slice,
            file=file,
            found=found,
            expected=expected,
            next_step="find the positions that belong to these spots; where the pixels are right, take array_row and array_col "
            "out of the file, so that the lattice is found from the pixels",
        )

    row, col = np.asarray(row, np.int32), np.asarray(col, np.int32)
    odd = int(((row + col) % 2).sum())
    other = min(odd, len(row) - odd)
    if 0 < other < MIN_OTHER_PARITY * len(row):
        raise refuse(
            f"{other} of {len(row)} spots whose array row + column is {'odd' if other == odd else 'even'}, unlike the others",
            f"none (a staggered lattice) or {MIN_OTHER_PARITY:.0%} at least (a square one)",
        )
    kind = "square" if other else "staggered"
    pitch_px = residual = float("nan")
    sites = plane(kind, row, col)
    if pixels is not None and _is_plane(sites) and _is_plane(pixels):
        affine, pitch_px, residual = _fit(sites, pixels)
        stretch = np.linalg.cond(affine[:2])
        if not (residual < MAX_DISAGREEMENT and stretch < MAX_STRETCH):
            raise refuse(
                f"pixels {residual:.2f} pitches (root mean square) from where the array coordinates put them, one axis stretched "
                f"{stretch:.2f} times",
                f"less than {MAX_DISAGREEMENT} and {MAX_STRETCH:g}: coordinates of the same spots, row and column not exchanged",
            )
    return Lattice(kind, row, col, pitch_px, residual)


def _is_plane(points: np.ndarray) -> bool:
    """Whether points [n, 2] spread in two directions: not all at one place or in one line."""
    spread = np.linalg.svd(points - points.mean(0), compute_uv=False)
    return len(spread) == 2 and spread[1] > MIN_WIDTH * spread[0]


def infer_lattice(pixels: np.ndarray, slice: str = "") -> Lattice:
    """Array coordinates from pixel coordinates alone, whatever the rotation, mirroring, holes and islands.

    Parameters
    ----------
    pixels
        float64 [n, 2]: x, y of the spots.
    slice
        Name of the slice, for the error.

    Returns
    -------
    Lattice whose rows and columns start at 0 (a staggered one with row + col even).

    Raises
    ------
    NoLattice
        Fewer than 10 spots, no regular neighbours, two spots on one site, or a residual of a tenth of the pitch or more.
    """

    def refuse(found: str) -> NoLattice:
        return NoLattice(
            slice=slice,
            found=found,
            expected=f"a staggered or square lattice, residual below {MAX_RESIDUAL} pitches",
            next_step="give array_row and array_col, or spot_diameter_fullres for layout `bin`",
        )

    pixels = np.asarray(pixels, float)
    if len(pixels) < FEWEST_SPOTS:
        raise refuse(f"{len(pixels)} spots")
    tree = cKDTree(pixels)
    pitch = float(np.median(tree.query(pixels, 2)[0][:, 1]))
    if not pitch > 0:
        raise refuse("most spots at the position of another")
    first, second = tree.query_pairs(1.25 * pitch, output_type="ndarray").T
    steps = pixels[second] - pixels[first]
    angle = np.arctan2(steps[:, 1], steps[:, 0])
    symmetry = {"staggered": np.exp(6j * angle).mean(), "square": np.exp(4j * angle).mean()}
    kind = max(symmetry, key=lambda k: abs(symmetry[k]))
    fold = 6 if kind == "staggered" else 4
    basis = pitch * _directions(np.angle(symmetry[kind]) / fold, fold)
    for _ in range(3):  # the true pitch and a slight shear, from the neighbours' displacements
        whole = np.rint(steps @ np.linalg.inv(basis))
        if np.linalg.matrix_rank(whole) < 2:
            raise refuse(f"neighbours in one line only ({len(pixels)} spots)")
        basis = np.linalg.lstsq(whole, steps, rcond=None)[0]
        if abs(np.linalg.det(basis)) < 0.5 * pitch**2:
            raise refuse("neighbours without two regular directions")
    # The origin is the circular mean of the fractional sites: no single spot decides it.
    fractional = pixels @ np.linalg.inv(basis)
    origin = np.angle(np.exp(2j * np.pi * fractional).mean(0)) / (2 * np.pi)
    sites = np.rint(fractional - origin)
    for _ in range(20):
        affine, pitch_px, residual = _fit(sites @ _unit(fold), pixels)
        moved = np.rint((pixels - affine[2]) @ np.linalg.inv(_unit(fold) @ affine[:2]))
        if np.array_equal(moved, sites):
            break
        sites = moved
    shared = len(sites) - len(np.unique(sites, axis=0))
    if shared or not residual < MAX_RESIDUAL:
        raise refuse(f"a residual of {residual:.3f} pitches ({pitch_px:.1f} px) with {shared} spots on another's site")
    first, second = sites.astype(np.int32).T
    row, col = (second, 2 * first + second) if kind == "staggered" else (second, first)
    row, col = row - row.min(), col - col.min()
    if kind == "staggered":
        col += (row[0] + col[0]) % 2
    return Lattice(kind, row, col, pitch_px, residual)


def _unit(fold: int) -> np.ndarray:
    """The two lattice steps [2, 2] in pitches: along the row, and to the next row at 60 (staggered) or 90 degrees."""
    turn = 2 * np.pi / fold
    return np.array([[1.0, 0.0], [np.cos(turn), np.sin(turn)]])


def _directions(phase: float, fold: int) -> np.ndarray:
    """Unit steps [2, 2]: the lattice direction nearest to an image axis, towards +x (or +y), then the next row's."""
    turn = 2 * np.pi / fold
    angles = phase + turn * np.arange(fold)
    off_axis = np.abs((angles + np.pi / 4) % (np.pi / 2) - np.pi / 4)
    nearest = angles[off_axis < off_axis.min() + 1e-6]
    along = nearest[np.argmax(np.cos(nearest) + 0.5 * np.sin(nearest))]
    rotation = np.array([[np.cos(along), np.sin(along)], [-np.sin(along), np.cos(along)]])
    return _unit(fold) @ rotation


def _fit(sites: np.ndarray, pixels: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Affine map [3, 2] of sites (in pitches) to pixels by least squares, its pitch in pixels, and the rms residual in pitches."""
    design = np.column_stack([sites, np.ones(len(sites))])
    affine = np.linalg.lstsq(design, pixels, rcond=None)[0]
    pitch_px = float(np.sqrt(abs(np.linalg.det(affine[:2]))))
    residual = float(np.sqrt(((design @ affine - pixels) ** 2).sum(1).mean()) / pitch_px) if pitch_px else float("inf")
    return affine, pitch_px, residual
