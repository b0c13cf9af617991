"""Which spots of a section masked region reconstruction hides, and which genes are asked for.

A region of `side` x `side` cells is hidden in the middle of a window of `window` x `window` cells; where the difference is
odd, the far side has the extra line. The window lies wholly in the grid. It can be drawn where at least `min_observed` of
the region's cells and at least as much of the ring around it were observed.
"""

import hashlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from workflow.errors import DamagedFile, TooFewGenes
from workflow.grid import Grid, read_grid
from workflow.moments import moments
from workflow.reading import read_safetensors, reading
from workflow.sealed import as_safetensors
from workflow.stats import read_vocabulary

FORMAT_VERSION = 1


class Regions(NamedTuple):
    """Regions of one section (docs/format.md): R of them, m genes; cells are flat, y * W' + x.

    Attributes
    ----------
    genes, columns
        int32 [m]: rows of the vocabulary, ascending, and the same genes' columns of the grid.
    region
        int32 [R, 5]: window, side, repeat, then y and x of the window's corner in the grid.
    hidden, visible
        Of each region the observed cells within, and those around it in its window; int32, ascending.
    placements
        (window, side) -> the number of windows that could be drawn.
    """

    genes: np.ndarray
    columns: np.ndarray
    region: np.ndarray
    hidden: list[np.ndarray]
    visible: list[np.ndarray]
    placements: dict[tuple[int, int], int]


def variable_genes(grid: Grid, vocabulary: list[str], n: int, target_sum: float) -> tuple[np.ndarray, np.ndarray]:
    """The `n` genes of the vocabulary of the greatest variance of normalised expression over all observed cells.

    All of them, where the slice measured fewer; ties to the lower row of the vocabulary. Rows of the vocabulary,
    ascending, and columns of the grid, int32 [m] each.

    Raises
    ------
    TooFewGenes
        If the slice measured none.
    """
    index = {gene: row for row, gene in enumerate(vocabulary)}
    in_vocabulary = np.array([index.get(gene, -1) for gene in grid.gene_ids])
    columns = np.argsort(in_vocabulary)[(in_vocabulary < 0).sum() :]  # by row of the vocabulary
    if not len(columns):
        raise TooFewGenes(
            slice=grid.slice,
            found=f"none of its {len(grid.gene_ids)} genes in the vocabulary of {len(vocabulary)}",
            expected="at least one",
            next_step="check the organism, and that gene ids are Ensembl ids without version",
        )
    m2 = moments(grid, target_sum)["m2"][columns]
    columns = columns[np.sort(np.argsort(-m2, kind="stable")[:n])]
    return in_vocabulary[columns].astype(np.int32), columns.astype(np.int32)


def valid_corners(observed: np.ndarray, window: int, side: int, min_observed: float) -> np.ndarray:
    """Corners (y, x) of the windows that can be drawn, int [n, 2], row by row.

    Parameters
    ----------
    observed
        bool [H', W'].
    """
    height, width = observed.shape
    if side >= window or window > min(height, width):
        return np.empty((0, 2), dtype=np.int64)
    sums = np.pad(observed.astype(np.int64).cumsum(0).cumsum(1), [(1, 0), (1, 0)])

    def in_squares(size: int) -> np.ndarray:  # observed cells of the square at each corner
        return sums[size:, size:] - sums[:-size, size:] - sums[size:, :-size] + sums[:-size, :-size]

    inner = (window - side) // 2
    places = (height - window + 1, width - window + 1)
    within = in_squares(side)[inner : inner + places[0], inner : inner + places[1]]
    around = in_squares(window) - within
    enough = (within >= max(1, min_observed * side**2)) & (around >= max(1, min_observed * (window**2 - side**2)))
    return np.argwhere(enough)


def draw(
    grid: Grid,
    vocabulary: list[str],
    *,
    windows: Iterable[int],
    sides: Iterable[int],
    repeats: int,
    n_genes: int,
    min_observed: float,
    target_sum: float,
    seed: int,
) -> Regions:
    """Up to `repeats` different windows for each size of window and region, each as likely as any other.

    Which ones is a function of (seed, slice, window, side, repeat) alone: more repeats add to the earlier ones. A section
    with fewer places than `repeats` gives each of them once; a region not smaller than its window has none.

    Parameters
    ----------
    grid
        The section. Spots without a count have no expression to predict and count as unobserved.
    vocabulary
        Gene ids; the position is the gene's index.
    """
    genes, columns = variable_genes(grid, vocabulary, n_genes, target_sum)
    observed = grid.mask & (grid.total_counts > 0)
    cells = np.arange(observed.size, dtype=np.int32).reshape(observed.shape)
    rows, hidden, visible, placements = [], [], [], {}
    for window in windows:
        for side in sides:
            corners = valid_corners(observed, window, side, min_observed)
            placements[window, side] = len(corners)
            key = hashlib.sha256(f"{seed}/regions/{grid.slice}/{window}/{side}".encode()).digest()[:16]
            order = np.random.Philox(key=int.from_bytes(key, "little")).random_raw(len(corners)).argsort()
            inner = (window - side) // 2
            for repeat, (y, x) in enumerate(corners[order[:repeats]].tolist()):
                shown = np.zeros_like(observed)
                shown[y : y + window, x : x + window] = True
                region = np.s_[y + inner : y + inner + side, x + inner : x + inner + side]
                shown[region] = False
                rows.append((window, side, repeat, y, x))
                hidden.append(cells[region][observed[region]])
                visible.append(cells[shown & observed])
    region = np.array(rows, dtype=np.int32).reshape(-1, 5)
    return Regions(genes, columns, region, hidden, visible, placements)


def encode(regions: Regions, grid: Grid, *, genes_sha256: str, seed: int, simulated: bool) -> bytes:
    """The regions as a safetensors file (docs/format.md), the same bytes for the same regions."""
    tensors = {"genes": regions.genes, "columns": regions.columns, "region": regions.region}
    for name, cells in (("hidden", regions.hidden), ("visible", regions.visible)):
        tensors[name] = np.concatenate([np.empty(0, dtype=np.int32), *cells])
        tensors[f"n_{name}"] = np.array([len(some) for some in cells], dtype=np.int32)
    height, width = grid.mask.shape
    facts = {
        "format_version": FORMAT_VERSION,
        "slice": grid.slice,
        "h": height,
        "w": width,
        "genes_sha256": genes_sha256,
        "seed": seed,
        "placements": json.dumps([[*sizes, n] for sizes, n in regions.placements.items()]),
        "simulated": str(simulated).lower(),
    }
    return as_safetensors(tensors, {key: str(value) for key, value in facts.items()})


def read_regions(path: str | Path, grid: Grid) -> Regions:
    """The regions of this grid.

    Raises
    ------
    DamagedFile
        If the file can't be read, is of another version, or belongs to another slice or grid.
    """
    with reading(path):
        tensors, facts = read_safetensors(path)
        found = [facts[key] for key in ("format_version", "slice", "h", "w")]
        expected = [str(value) for value in (FORMAT_VERSION, grid.slice, *grid.mask.shape)]
        if found != expected:
            raise DamagedFile(
                slice=grid.slice,
                file=str(path),
                found=f"format_version, slice, h and w {found}",
                expected=str(expected),
                next_step=f"delete {path} and run again",
            )
        cells = {}
        for name in ("hidden", "visible"):
            ends = np.cumsum(tensors[f"n_{name}"])
            cells[name] = np.split(tensors[name], ends[:-1]) if len(ends) else []
        placements = {(window, side): n for window, side, n in json.loads(facts["placements"])}
        return Regions(*(tensors[name] for name in ("genes", "columns", "region")), **cells, placements=placements)


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    params, vocabulary = snakemake.params, Path(snakemake.input.genes)
    grid = read_grid(snakemake.input.grid)
    regions = draw(
        grid,
        read_vocabulary(vocabulary).gene_id,
        windows=params.windows,
        sides=params.sides,
        repeats=params.repeats,
        n_genes=params.genes,
        min_observed=params.min_observed,
        target_sum=params.target_sum,
        seed=params.seed,
    )
    logging.info("%s: %d regions, %d genes", grid.slice, len(regions.region), len(regions.genes))
    Path(snakemake.output[0]).write_bytes(
        encode(
            regions,
            grid,
            genes_sha256=hashlib.sha256(vocabulary.read_bytes()).hexdigest(),
            seed=params.seed,
            simulated=params.simulated,
        )
    )
