"""The paper's Figure 2 for one slice: spots in place, compacted grid, one window, its normalised expression."""

from __future__ import annotations

import json
from pathlib import Path

import anndata as ad
import numpy as np
from matplotlib.patches import Rectangle

from workflow.drawn import Window, first_window
from workflow.expression import log_normalise
from workflow.grid import read_grid
from workflow.keys import Keys
from workflow.layout import observed_in_windows, pad
from workflow.plotting import ACCENT, COUNTS, EXPRESSION, draw_cells, draw_spots, new_figure, save


def central_origin(mask: np.ndarray, shape: tuple[int, int]) -> tuple[int, int]:
    """Origin of the window that is observed most and, among equals, lies nearest the middle of the grid.

    Along a side that is shorter than the window the origin is 0.
    """
    seen = observed_in_windows(mask, shape)
    y, x = np.nonzero(seen == seen.max())
    nearest = np.hypot(y - (seen.shape[0] - 1) / 2, x - (seen.shape[1] - 1) / 2).argmin()
    return int(y[nearest]), int(x[nearest])


def central_window(grid, symbols: np.ndarray, shape: tuple[int, int], target_sum: float) -> Window:
    """The central window with the gene that varies most in it: for a slice of which no window was drawn.

    Parameters
    ----------
    grid
        As `workflow.grid.read_grid` gives it.
    symbols
        str [K], symbols of the grid's genes.
    """
    y, x = central_origin(grid.mask, shape)
    place = np.s_[y : y + shape[0], x : x + shape[1]]
    counts = np.moveaxis(pad(grid.counts[place], shape), -1, 0)
    totals, seen = pad(grid.total_counts[place], shape), pad(grid.mask[place], shape)
    gene = log_normalise(counts[:, seen], totals[seen], target_sum).var(axis=1).argmax()
    return Window(y, x, counts[[gene]], totals * seen, grid.gene_ids[[gene]], symbols[[gene]])


def draw(slice_: ad.AnnData, grid, window: Window, drawn: bool, target_sum: float):
    """The four panels as a figure.

    Parameters
    ----------
    drawn
        Whether the window comes from the shards; else it is the central one of a slice that is only evaluated.
    """
    h, w = window.totals.shape
    observed = window.totals > 0
    expression = log_normalise(window.counts, window.totals, target_sum)
    gene = expression[:, observed].var(axis=1).argmax()
    name = window.symbols[gene] or window.gene_ids[gene]

    figure, axes = new_figure(1, 4, figsize=(15, 4.6), width_ratios=[1, 1, 0.95, 0.95])
    depth = np.log10(np.maximum(slice_.obs[Keys.TOTAL_COUNTS].to_numpy(), 1))
    limits = {"clim": tuple(np.quantile(depth, [0.01, 0.99]))}
    spots = draw_spots(axes[0], slice_.obsm[Keys.SPATIAL], depth, cmap=COUNTS, **limits)
    axes[0].set_title(f"1  original: {slice_.n_obs:,} spots")
    axes[0].set_xlabel("pixels of the source image")
    low, high = limits["clim"]
    on_grid = np.log10(np.maximum(grid.total_counts, 1))
    draw_cells(axes[1], on_grid, grid.mask, cmap=COUNTS, vmin=low, vmax=high)
    rows, cols = grid.mask.shape
    axes[1].set_title(f"2  compacted: {rows} x {cols} cells, {grid.mask.mean():.0%} observed")
    axes[1].set_xlabel(f"layout {grid.layout}; grey: nothing observed")
    axes[1].add_patch(Rectangle((window.x - 0.5, window.y - 0.5), w, h, fill=False, edgecolor=ACCENT, linewidth=2.2))
    axes[1].set(xticks=[], yticks=[])
    figure.colorbar(spots, ax=axes[:2], label="log10 counts of the spot", shrink=0.75, pad=0.01)

    counts = draw_cells(axes[2], window.counts[gene], observed, cmap=COUNTS)
    axes[2].set_title(f"3  window at ({window.y}, {window.x}): raw counts")
    values = draw_cells(axes[3], expression[gene], observed, cmap=EXPRESSION)
    axes[3].set_title("4  normalised: log1p(count / total x 1e4)".replace("1e4", f"{target_sum:g}"))
    for panel, image in ((axes[2], counts), (axes[3], values)):
        panel.set_xlabel(
            f"{name}, varies most of {len(window.counts)} drawn" if drawn else f"{name}, varies most of all"
        )
        panel.set(xticks=[], yticks=[])
        for side in panel.spines.values():
            side.set(visible=True, edgecolor=ACCENT, linewidth=2.2)
        figure.colorbar(image, ax=panel, shrink=0.75, pad=0.02)
    figure.suptitle(slice_.uns[Keys.STPATCH]["slice"], x=0.01, ha="left", fontweight="bold", fontsize=13)
    return figure


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])  # noqa: F821
    given, target_sum = snakemake.input, snakemake.params.target_sum  # noqa: F821
    slice_, grid = ad.read_h5ad(given.slice), read_grid(given.grid)
    index = Path(given.index[0]) if given.index else None
    name = snakemake.wildcards.slice  # noqa: F821
    if index:
        window = first_window(index, name)
    else:
        symbols = slice_.var[Keys.SYMBOL].to_numpy(dtype=object)
        window = central_window(grid, symbols, tuple(snakemake.params.window), target_sum)  # noqa: F821
    simulated = json.loads(slice_.uns[Keys.STPATCH]["row"]).get("source") == "simulated"
    save(draw(slice_, grid, window, index is not None, target_sum), snakemake.output[0], simulated)  # noqa: F821
