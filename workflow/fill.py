"""How full the grids are, how many windows were drawn of each slice, and how much of each was observed."""

import numpy as np
import zarr

from workflow.drawn import origins, read_index
from workflow.layout import observed_in_windows
from workflow.plotting import CONTROL, MODEL, draw_ranges, headline, list_rows, new_figure, save

SPLIT_COLOURS = {"train": MODEL, "val": CONTROL}


def draw(rows: list[tuple[str, str, float, np.ndarray]], n_slices: int, about: dict):
    """Grid fill, windows drawn and observed fraction of the windows, one row a slice.

    Parameters
    ----------
    rows
        Slice, split, filled fraction of its grid, observed fractions of its windows.
    about
        The `index.json` of a split: window, genes, selection, layout, `min_observed`.
    """
    names, colours = [row[0] for row in rows], [SPLIT_COLOURS[row[1]] for row in rows]
    figure, axes = new_figure(1, 3, figsize=(13, 1.9 + 0.3 * max(len(rows), 1)), sharey=True)
    axes[0].barh(range(len(rows)), [row[2] for row in rows], color=colours, alpha=0.8)
    axes[0].set(title="grid fill", xlabel="observed cells / cells of the grid", xlim=(0, 1))
    axes[1].barh(range(len(rows)), [len(row[3]) for row in rows], color=colours, alpha=0.8)
    axes[1].set(title="windows drawn", xlabel="windows")
    draw_ranges(axes[2], [row[3] for row in rows], colours)
    axes[2].axvline(about["min_observed"], color="black", linestyle=":", linewidth=1, label="least allowed")
    axes[2].set(title="observed part of a window", xlabel="fraction (5-95%, 25-75%, median)", xlim=(0, 1.02))
    list_rows(axes[0], names)
    for split, colour in SPLIT_COLOURS.items():
        axes[0].plot([], [], "s", color=colour, label=split)
    handles = [axis.get_legend_handles_labels() for axis in (axes[0], axes[2])]
    figure.legend(
        sum((h for h, _ in handles), []), sum((t for _, t in handles), []), loc="outside lower center", ncols=3
    )
    shown = "" if len(rows) == n_slices else f" (the first {len(rows)} of {n_slices} slices)"
    headline(figure, f"Windows of {about['h']} x {about['w']} cells x {about['m']} genes ({about['selection']}){shown}")
    return figure


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    grids = dict(zip(snakemake.params.slices, snakemake.input.grids, strict=True))
    rows, simulated, n_slices = [], False, 0
    for path in snakemake.input.index:
        about, _ = read_index(path)
        simulated |= about["simulated"]
        n_slices += len(about["slices"])
        for name, places in origins(path):
            if name in grids:
                mask = zarr.open_group(grids[name], mode="r")["mask"][:]
                seen = observed_in_windows(mask, (about["h"], about["w"]))[*places.T]
                rows.append((name, about["split"], float(mask.mean()), seen / (about["h"] * about["w"])))
    save(draw(rows, n_slices, about), snakemake.output[0], simulated)
