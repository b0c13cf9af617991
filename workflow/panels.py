"""The paper's Figure 2 for one slice: spots in place, compacted grid, one window, its normalised expression."""

import json
from pathlib import Path

import anndata as ad
import numpy as np
from matplotlib.patches import Polygon, Rectangle

from workflow.drawn import Window, first_window
from workflow.expression import log_normalise
from workflow.grid import read_grid
from workflow.keys import Keys
from workflow.layout import observed_in_windows, pad
from workflow.plotting import ACCENT, COUNTS, EXPRESSION, draw_cells, draw_spots, headline, new_figure, save


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


def outline(window: Window, spot: np.ndarray, xy: np.ndarray) -> np.ndarray:
    """Corners of the window among the source's pixels, float [4, 2], where the lattice may lie turned or mirrored.

    Parameters
    ----------
    spot
        int [H', W'], row of `xy` that each cell of the grid holds; -1 where nothing was observed.
    xy
        float [n_spots, 2], pixels of the spots.
    """
    h, w = window.totals.shape
    inside = spot[window.y : window.y + h, window.x : window.x + w]
    y, x = np.nonzero(inside >= 0)
    # The affine map from cells to pixels that fits the window's own spots: rows that are missing elsewhere don't shift it.
    cells = np.column_stack([x, y, np.ones(len(x))])
    to_pixels, *_ = np.linalg.lstsq(cells, xy[inside[y, x]], rcond=None)
    left, top, right, bottom = -0.5, -0.5, w - 0.5, h - 0.5
    return np.array([(left, top, 1), (right, top, 1), (right, bottom, 1), (left, bottom, 1)]) @ to_pixels


def brightest(values: np.ndarray) -> float:
    """Upper end of a colour range: the 99% quantile, lest one spot leave all others dark; the maximum where that is 0."""
    return float(np.quantile(values, 0.99) or values.max())


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
    choice = f"the {len(window.counts)} drawn" if drawn else "all"

    depth = np.log10(np.maximum(slice_.obs[Keys.TOTAL_COUNTS].to_numpy(), 1))
    low, high = np.quantile(depth, [0.01, 0.99])
    figure, axes = new_figure(1, 4, figsize=(15, 4.9))
    spots = draw_spots(axes[0], slice_.obsm[Keys.SPATIAL], depth, cmap=COUNTS, clim=(low, high))
    axes[0].set(title=f"1  original: {slice_.n_obs:,} spots", xlabel="in pixels of the source's image")
    on_grid = draw_cells(axes[1], np.log10(np.maximum(grid.total_counts, 1)), grid.mask, vmin=low, vmax=high)
    rows, cols = grid.mask.shape
    axes[1].set(title=f"2  compacted: {rows} x {cols}", xlabel=f"{grid.mask.mean():.0%} of the cells observed")
    frame = {"fill": False, "edgecolor": ACCENT, "linewidth": 2.2, "clip_on": False}
    axes[0].add_patch(Polygon(outline(window, grid.spot, slice_.obsm[Keys.SPATIAL]), **frame))
    axes[1].add_patch(Rectangle((window.x - 0.5, window.y - 0.5), w, h, **frame))
    counts = draw_cells(axes[2], window.counts[gene], observed, vmin=0, vmax=brightest(window.counts[gene, observed]))
    axes[2].set(
        title=f"3  window at row {window.y}, column {window.x}", xlabel=f"{name}\nvaries most of {choice} genes"
    )
    values = draw_cells(
        axes[3], expression[gene], observed, cmap=EXPRESSION, vmin=0, vmax=brightest(expression[gene, observed])
    )
    axes[3].set(title="4  normalised", xlabel=f"{name}\nlog1p(count / total x {target_sum:g})")
    bars = ((spots, "log10 counts of the spot"), (on_grid, "log10 counts of the spot"), (counts, "raw counts"))
    for panel, (image, label) in zip(axes, (*bars, (values, "normalised expression")), strict=True):
        extend = "both" if panel in axes[:2] else "max"  # values beyond the colours' range
        figure.colorbar(image, ax=panel, label=label, location="bottom", shrink=0.8, pad=0.03, aspect=30, extend=extend)
        panel.set(xticks=[], yticks=[])
        for side in panel.spines.values():
            framed = panel in axes[2:]
            side.set(visible=framed, edgecolor=ACCENT, linewidth=2.2)
    headline(figure, slice_.uns[Keys.STPATCH]["slice"])
    return figure


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, target_sum = snakemake.input, snakemake.params.target_sum
    slice_, grid = ad.read_h5ad(given.slice), read_grid(given.grid)
    index = Path(given.index[0]) if given.index else None
    name = snakemake.wildcards.slice
    if index:
        window = first_window(index, name)
    else:
        symbols = slice_.var[Keys.SYMBOL].to_numpy(dtype=object)
        window = central_window(grid, symbols, tuple(snakemake.params.window), target_sum)
    simulated = json.loads(slice_.uns[Keys.STPATCH]["row"]).get("source") == "simulated"
    save(draw(slice_, grid, window, index is not None, target_sum), snakemake.output[0], simulated)
