"""Overview of the admitted slices (spots, counts, genes) and of those that were rejected or set apart."""

import html
from pathlib import Path

import h5py
import numpy as np
import pandas as pd

from workflow.keys import Keys
from workflow.plotting import ACCENT, CONTROL, MODEL, draw_ranges, headline, list_rows, new_figure, page, save, table

ROLES = {"pretraining": MODEL, "evaluation": CONTROL, "pretraining and evaluation": ACCENT}


def read_table(path: str | Path) -> pd.DataFrame:
    """A table of rule admit, all strings, without its version line."""
    return pd.read_csv(path, sep="\t", skiprows=1, dtype=str, keep_default_na=False, quoting=3)


def depth(path: str | Path) -> tuple[np.ndarray, np.ndarray]:
    """Counts and genes seen of each spot, int64 [n_spots] each; the matrix itself is not read."""
    with h5py.File(path, "r") as slice_:
        return slice_[f"obs/{Keys.TOTAL_COUNTS}"][:], np.diff(slice_["X/indptr"][:].astype(np.int64))


def draw(names: list[str], depths: list[tuple[np.ndarray, np.ndarray]], roles: dict[str, str], n_admitted: int):
    """Spots, counts and genes a spot, one row a slice, in the colour of its role."""
    colours = [ROLES[roles[name]] for name in names]
    figure, axes = new_figure(1, 3, figsize=(13, 1.7 + 0.3 * len(names)), sharey=True)
    axes[0].barh(range(len(names)), [len(counts) for counts, _ in depths], color=colours, alpha=0.8)
    axes[0].set(title="spots in tissue", xlabel="spots")
    draw_ranges(axes[1], [counts[counts > 0] for counts, _ in depths], colours)
    axes[1].set(title="counts of a spot", xlabel="counts (5-95%, 25-75%, median)", xscale="log")
    draw_ranges(axes[2], [genes for _, genes in depths], colours)
    axes[2].set(title="genes seen in a spot", xlabel="genes (5-95%, 25-75%, median)")
    list_rows(axes[0], names)
    shown = "" if len(names) == n_admitted else f" (the first {len(names)} of {n_admitted})"
    for role, colour in ROLES.items():
        if role in roles.values():
            axes[0].plot([], [], "s", color=colour, label=role)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    headline(figure, f"Admitted slices{shown}")
    return figure


def rejected(quarantine: pd.DataFrame, duplicates: pd.DataFrame, notes: pd.DataFrame, simulated: bool) -> str:
    """The page of rejected and duplicate slices, and of what admission remarked on; contamination that was let in is in red."""
    stamp = '<p class="simulated">Simulated data.</p>' if simulated else ""
    kept = sorted(set(notes.loc[notes["kind"] == "contamination", "slice"]))
    alarm = (
        f'<p class="alarm">Pretrained on although they match an evaluation slice: {html.escape(", ".join(kept))}.</p>'
    )
    return page(
        "Rejected slices",
        f"{stamp}{alarm if kept else ''}<h2>Quarantine: {len(quarantine)}</h2>"
        + table(quarantine, "No slice was rejected.")
        + f"<h2>Duplicates: {len(duplicates)}</h2>"
        + table(duplicates, "No two slices are the same tissue.")
        + f"<h2>Remarks: {len(notes)}</h2>"
        + table(notes, "Every slice could be compared with every other.")
        + '<p class="small">Codes are those of workflow/errors.py; each row says what to do next.</p>',
    )


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given = snakemake.input
    admitted = read_table(given.admitted)
    splits = (
        admitted["split"]
        .where(admitted["split"].isin(["train", "val"]), "evaluation")
        .replace({"train": "pretraining", "val": "pretraining"})
    )
    roles = {name: " and ".join(sorted(set(part), reverse=True)) for name, part in splits.groupby(admitted["slice"])}
    names = sorted(roles)
    simulated = bool((admitted["source"] == "simulated").any())
    depths = [depth(path) for path in given.slices]  # of the first slices by name
    save(draw(names[: len(depths)], depths, roles, len(names)), snakemake.output.figure, simulated)
    tables = read_table(given.quarantine), read_table(given.duplicates), read_table(given.notes)
    Path(snakemake.output.rejected).write_text(rejected(*tables, simulated))
