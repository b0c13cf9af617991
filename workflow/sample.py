"""Algorithm 1: windows of a slice, their genes drawn by the variance that each shows within the window.

A window's origin and genes are a function of (seed, slice, window number) alone. Windows are visited in spatial order,
and the sums over a window are carried to the next by adding the cells that enter and taking away those that leave. The
sums are 64-bit integers (fixed point), so that this is exact: no order of visits changes a bit of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numba import njit

from workflow.errors import TooFewGenes, WindowTooLarge
from workflow.expression import log_normalise
from workflow.grid import Grid
from workflow.layout import lattice_lines, observed_in_windows, pad

SELECTIONS = ("weighted", "hvg", "random")


@dataclass(frozen=True)
class Window:
    """One training sample.

    Attributes
    ----------
    number
        Number of the window within its slice.
    y, x
        Origin in the grid.
    genes
        int32 [m], indices of the vocabulary, ascending.
    counts
        uint16 [m, h, w], channels first.
    totals
        float32 [h, w], 0 where nothing was observed.
    array_row, array_col
        Original coordinates of the observed cell nearest the origin.
    array_rows, array_cols
        int64 [h], int64 [w]: what the lines stand for (`workflow.layout.lattice_lines`), -1 in padding.
    """

    number: int
    y: int
    x: int
    genes: np.ndarray
    counts: np.ndarray
    totals: np.ndarray
    array_row: int
    array_col: int
    array_rows: np.ndarray
    array_cols: np.ndarray


class Field:
    """A slice laid out for cutting windows: only genes of the vocabulary, padded to at least one window.

    Counts are held twice: dense and gene by gene, because a window copies few genes; and sparse, cell by cell, because
    its variances read all genes of few cells.

    Parameters
    ----------
    grid
        The slice.
    vocabulary
        str [V], gene ids; the position is the gene's index.
    window
        (h, w).
    target_sum
        Of the normalised expression.

    Attributes
    ----------
    genes
        int32 [K], vocabulary indices of the measured genes, ascending.
    counts
        uint16 [K, H', W'], raw counts in the order of `genes`.
    mask, totals, array_row, array_col
        As in the grid, padded.
    array_rows, array_cols
        int64 [H'], int64 [W']: `workflow.layout.lattice_lines`.
    """

    def __init__(self, grid: Grid, vocabulary, window: tuple[int, int], target_sum: float) -> None:
        index = {gene: i for i, gene in enumerate(vocabulary)}
        in_vocabulary = np.array([index.get(gene, -1) for gene in grid.gene_ids], dtype=np.int64)
        self.slice, self.window = grid.slice, (int(window[0]), int(window[1]))
        self.genes = np.sort(in_vocabulary[in_vocabulary >= 0]).astype(np.int32)
        position = np.where(in_vocabulary < 0, -1, np.searchsorted(self.genes, in_vocabulary))
        # A spot without a count has no normalised expression: it is no observation, here as in the trainer.
        self.mask = pad(grid.mask & (grid.total_counts > 0), self.window, False)
        self.totals = pad(grid.total_counts, self.window, np.float32(0))
        self.array_row, self.array_col = pad(grid.array_row, self.window, -1), pad(grid.array_col, self.window, -1)
        self.array_rows, self.array_cols = lattice_lines(self.array_row, self.array_col, grid.layout)
        # made here, as numpy asks for huge pages and numba does not: crops jump about in this array
        self.counts = np.zeros((len(self.genes), *self.mask.shape), dtype=np.uint16)
        self._cells, self._codes, self._genes, levels, level_of = _unpack(
            np.ascontiguousarray(grid.counts), position, np.count_nonzero(grid.counts), self.counts
        )
        # The few distinct counts of a cell are normalised once each; the sparse entries point at them.
        values = log_normalise(levels, np.repeat(self.totals.ravel(), np.diff(level_of)), target_sum)
        bound = max(1.0, float(values.max(initial=0.0)) ** 2) * self.window[0] * self.window[1]
        self._scale = 2.0 ** np.floor(62 - np.log2(bound))  # the sum of squares over a window stays below 2^62
        self._level_of = level_of
        self._levels = np.rint(np.stack([values, values**2], axis=1) * self._scale).astype(np.int64)
        self._minus_levels = -self._levels
        self._sums = np.zeros((len(self.genes), 2), dtype=np.int64)
        self._at = (-1, -1)

    def origins(self, min_observed: float) -> np.ndarray:
        """Origins of which at least `min_observed` of the window (and one cell) is observed: int64 [n, 2], row-major.

        Raises
        ------
        WindowTooLarge
            There is none.
        """
        cells = self.window[0] * self.window[1]
        observed = observed_in_windows(self.mask, self.window)
        least = max(1, int(np.ceil(min_observed * cells - 1e-9)))
        found = np.argwhere(observed >= least)
        if not len(found):
            raise WindowTooLarge(
                slice=self.slice,
                found=f"at most {observed.max()} of the {cells} cells of a {self.window[0]} x {self.window[1]} window "
                f"observed (grid of {self.mask.shape[0]} x {self.mask.shape[1]} cells, padded)",
                expected=f"at least {least} (min_observed: {min_observed:g})",
                next_step="choose a smaller window or a lower min_observed",
            )
        return found

    def variance(self, y: int, x: int) -> np.ndarray:
        """Population variance of each gene's normalised expression over the observed cells of a window: float64 [K].

        Cheap for a window near the last one asked for; the result does not depend on which that was.
        """
        h, w = self.window
        _move(self._sums, self._cells, self._genes, self._codes, self._level_of, self._levels, self._minus_levels,
              self.mask.shape[1], *self._at, y, x, h, w)  # fmt: skip
        self._at = (y, x)
        return _finish(self._sums, int(self.mask[y : y + h, x : x + w].sum()), self._scale)

    def crop(self, number: int, y: int, x: int, positions: np.ndarray) -> Window:
        """The window at an origin, with the genes at these ascending positions of `genes`."""
        h, w = self.window
        rows, cols = slice(y, y + h), slice(x, x + w)
        near_y, near_x = _nearest(self.mask, y, x, h, w)
        return Window(
            number=number,
            y=y,
            x=x,
            genes=self.genes[positions],
            counts=self.counts[positions, rows, cols],
            totals=self.totals[rows, cols],
            array_row=int(self.array_row[near_y, near_x]),
            array_col=int(self.array_col[near_y, near_x]),
            array_rows=self.array_rows[rows],
            array_cols=self.array_cols[cols],
        )


def window_rng(seed: int, slice: str, number: int) -> np.random.Generator:
    """The random numbers of one window: a function of (seed, slice, window number) alone."""
    digest = hashlib.sha256(f"{seed}/{slice}/{number}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def draw_genes(variance: np.ndarray, m: int, selection: str, epsilon: float, rng: np.random.Generator) -> np.ndarray:
    """Positions of the m genes of a window, ascending (the order of the draw would leak their rank).

    ``weighted`` draws without replacement, each time with probability proportional to ``variance + epsilon`` (Eq. 7),
    by the exponential race of Efraimidis and Spirakis (2006): the m smallest of E_k / weight_k, with E_k exponential.
    ``hvg`` takes the m largest variances (of equals the first), ``random`` draws uniformly.

    Parameters
    ----------
    variance
        float64 [K], K >= m.
    m
        Number of genes.
    selection
        ``weighted``, ``hvg`` or ``random``.
    epsilon
        Added to the variance, so that a flat gene can be drawn.
    rng
        Of the window.

    Returns
    -------
    numpy.ndarray
        int64 [m].
    """
    if selection == "hvg":
        return np.sort(np.argsort(-variance, kind="stable")[:m])
    keys = rng.standard_exponential(len(variance))
    if selection == "weighted":
        keys /= variance + epsilon
    elif selection != "random":
        raise ValueError(f"selection {selection!r}: expected one of {', '.join(SELECTIONS)}")
    return np.sort(smallest(keys, m))


def smallest(keys: np.ndarray, m: int) -> np.ndarray:
    """Positions of the m smallest keys, in no particular order: int64 [m].

    A pivot read from every eighth key leaves few candidates, which is thrice as fast as a partition of all.
    """
    near = m // 8 + 5 * int(m**0.5)
    if near < len(keys) // 8:
        candidates = np.flatnonzero(keys <= np.partition(keys[::8], near)[near])
        if len(candidates) > m:
            return candidates[np.argpartition(keys[candidates], m - 1)[:m]]
    return np.argpartition(keys, m - 1)[:m]


def draw_windows(
    field: Field, n: int, m: int, selection: str, epsilon: float, min_observed: float, seed: int
) -> Iterator[Window]:
    """The n windows of a slice (Algorithm 1), in spatial order.

    The origin is uniform over those valid origins whose window is observed enough (Eq. 6): the same distribution as
    drawing uniformly and redrawing while too little is observed.

    Raises
    ------
    TooFewGenes
        Fewer measured genes of the vocabulary than m.
    WindowTooLarge
        No window is observed enough.
    """
    if len(field.genes) < m:
        raise TooFewGenes(
            slice=field.slice,
            found=f"{len(field.genes)} measured genes of the vocabulary",
            expected=f"at least the {m} that a window draws (genes: {m})",
            next_step="lower `genes`, or leave the slice out (targeted panels measure few genes)",
        )
    origins = field.origins(min_observed)
    rngs = [window_rng(seed, field.slice, number) for number in range(n)]
    drawn = origins[[rng.integers(len(origins)) for rng in rngs]]
    for number in _nearby_order(drawn):
        y, x = map(int, drawn[number])
        positions = draw_genes(field.variance(y, x), m, selection, epsilon, rngs[number])
        yield field.crop(int(number), y, x, positions)


def _nearby_order(origins: np.ndarray, band: int = 4) -> np.ndarray:
    """An order in which windows follow near ones: back and forth along bands of rows."""
    strip = origins[:, 0] // band
    return np.lexsort((origins[:, 0], np.where(strip % 2, -origins[:, 1], origins[:, 1]), strip))


@njit(cache=True)
def _unpack(counts, position, nonzero, by_gene):
    """Fill the dense counts by gene; give the sparse ones by cell, each a gene and a row of the cell's distinct counts."""
    _, height, width = by_gene.shape
    cells = np.zeros(height * width + 1, dtype=np.int64)
    genes = np.empty(nonzero, dtype=np.uint32)
    codes = np.empty(nonzero, dtype=np.uint16)
    levels = np.empty(nonzero, dtype=np.uint16)
    level_of = np.zeros(height * width + 1, dtype=np.int64)
    code_of = np.full(65536, -1, dtype=np.int64)
    columns = np.empty(counts.shape[2] + 1, dtype=np.int64)
    at, n_levels = 0, 0
    for cell in range(height * width):
        y, x = cell // width, cell % width
        first = n_levels
        if y < counts.shape[0] and x < counts.shape[1]:
            n_columns = 0
            for k in range(counts.shape[2]):  # without a branch: most counts are 0, unforeseeably
                columns[n_columns] = k
                n_columns += counts[y, x, k] != 0
            for k in columns[:n_columns]:
                gene, count = position[k], counts[y, x, k]
                if gene >= 0:
                    if code_of[count] < 0:
                        code_of[count] = n_levels - first
                        levels[n_levels] = count
                        n_levels += 1
                    genes[at], codes[at] = gene, code_of[count]
                    by_gene[gene, y, x] = count
                    at += 1
        for level in range(first, n_levels):
            code_of[levels[level]] = -1
        cells[cell + 1], level_of[cell + 1] = at, n_levels
    return cells, codes[:at], genes[:at], levels[:n_levels].copy(), level_of  # of the views, little is left over


@njit(cache=True)
def _add(sums, genes, codes, levels):
    for i in range(len(genes)):
        gene, code = genes[i], codes[i]
        sums[gene, 0] += levels[code, 0]
        sums[gene, 1] += levels[code, 1]


@njit(cache=True)
def _move(sums, cells, genes, codes, level_of, levels, minus_levels, width, old_y, old_x, y, x, h, w):
    """Carry sums [K, 2] of values and squares from the window at the old origin (none: -1) to that at (y, x)."""
    shared = max(0, h - abs(y - old_y)) * max(0, w - abs(x - old_x))
    if old_y < 0 or shared < h * w // 2:  # starting anew is cheaper
        sums[:] = 0
        old_y, old_x = -h, -w
    for entering in (True, False):
        here_y, here_x, there_y, there_x = (y, x, old_y, old_x) if entering else (old_y, old_x, y, x)
        if here_y < 0:
            continue
        table = levels if entering else minus_levels
        for i in range(here_y, here_y + h):
            for j in range(here_x, here_x + w):
                if not (there_y <= i < there_y + h and there_x <= j < there_x + w):
                    cell = i * width + j
                    here = slice(cells[cell], cells[cell + 1])
                    _add(sums, genes[here], codes[here], table[level_of[cell] : level_of[cell + 1]])


@njit(cache=True)
def _finish(sums, n, scale):
    """Population variance from integer sums over n cells."""
    variance = np.empty(len(sums))
    unit = 1.0 / (scale * n)
    for gene in range(len(sums)):
        mean = sums[gene, 0] * unit
        variance[gene] = max(0.0, sums[gene, 1] * unit - mean * mean)
    return variance


@njit(cache=True)
def _nearest(mask, y, x, h, w):
    """The observed cell of a window nearest its corner (of equals the first, row by row)."""
    best, best_y, best_x = h * h + w * w, -1, -1
    for i in range(h):
        if i * i >= best:
            break
        for j in range(w):
            if mask[y + i, x + j] and i * i + j * j < best:
                best, best_y, best_x = i * i + j * j, y + i, x + j
    return best_y, best_x
