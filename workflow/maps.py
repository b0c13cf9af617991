"""Maps of the true domains, of those predicted from stpatch and from the strongest control, and of who errs where."""

import anndata as ad
import numpy as np
import pandas as pd
from matplotlib.colors import ListedColormap

from workflow.intervals import split_suffix
from workflow.keys import Keys
from workflow.plotting import (
    CONTROL,
    MODEL,
    UNOBSERVED,
    domain_colours,
    draw_spots,
    empty_figure,
    headline,
    new_figure,
    save,
)
from workflow.scoreboard import read_table

MAX_SECTIONS = 4
ERRORS = {"none": UNOBSERVED, "stpatch": MODEL, "control": CONTROL, "both": "#222222"}  # who is wrong: colour


def best_columns(predictions: pd.DataFrame, comparisons: pd.DataFrame) -> dict[str, str]:
    """Of either side the column `protocol:method:head` that the comparisons name best by accuracy."""
    predicted = [name for name in predictions.columns if name.count(":") == 2]
    if not predicted:
        return {}
    protocol = predicted[0].split(":")[0]
    rows = comparisons[(comparisons["protocol"] == protocol) & (comparisons["section"] == "pooled")]
    rows = rows[rows["metric"] == "accuracy"]
    models = rows[(rows["compared"] == "best") & (rows["method"].map(lambda name: split_suffix(name)[0]) == "stpatch")]
    columns = {"stpatch": ":".join(models.iloc[0][["protocol", "method", "head"]])} if len(models) else {}
    return columns | {"strongest control": ":".join(rows.iloc[0][["protocol", "control", "control_head"]])}


def correct(predictions: pd.DataFrame, column: str) -> float:
    """Fraction of the predicted spots whose label was met; NaN without any."""
    tested = predictions[predictions[column] != ""]
    return float((tested[column] == tested["label"]).mean())


def errors(of_section: pd.DataFrame, columns: list[str]) -> np.ndarray:
    """Index into ERRORS of each spot: who of the two columns missed its label, float [n]; NaN where one did not predict."""
    wrong = [(of_section[column] != of_section["label"]).to_numpy() for column in columns]
    predicted = (of_section[columns] != "").all(axis=1).to_numpy()
    return np.where(predicted, wrong[0] + 2.0 * wrong[1], np.nan)


def draw(dataset: str, predictions: pd.DataFrame, comparisons: pd.DataFrame, places: dict[str, np.ndarray]):
    """One row a section: truth, stpatch, strongest control, the errors of both; spots that were not predicted stay white.

    Parameters
    ----------
    comparisons
        The dataset's comparisons, by which the shown methods are chosen.
    places
        Section name -> float [n_spots, 2], pixels of the curated slice's spots.
    """
    sections = sorted(predictions["section"].unique())
    shown, domains = sections[:MAX_SECTIONS], sorted(predictions["label"].unique())
    columns = {"true": "label", **best_columns(predictions, comparisons)}
    colours = domain_colours(len(domains))
    both = [column for column in columns.values() if column != "label"]
    n_panels = len(columns) + (len(both) == 2)
    size = (3.9 * n_panels, 1.6 + 3.6 * len(shown))
    figure, axes = new_figure(len(shown), n_panels, figsize=size, squeeze=False)
    for row, section in enumerate(shown):
        of_section = predictions[predictions["section"] == section]
        xy = places[section][of_section["spot"]]
        if len(both) == 2:
            of_both = ListedColormap(list(ERRORS.values()))
            draw_spots(axes[row, -1], xy, errors(of_section, both), cmap=of_both, clim=(-0.5, len(ERRORS) - 0.5))
            axes[row, -1].set_title("wrong")
        for axis, (title, column) in zip(axes[row], columns.items(), strict=False):
            code = pd.Categorical(of_section[column], categories=domains).codes.astype(float)
            code[code < 0] = np.nan
            draw_spots(axis, xy, code, cmap=colours, clim=(-0.5, len(domains) - 0.5))
            if column == "label":
                axis.set_title(f"{section}: {title}")
            else:
                _, method, head = column.split(":")
                axis.set_title(f"{title}: accuracy {correct(of_section, column):.3f}\n{method}, {head}")
    for index, name in enumerate(domains):
        axes[0, 0].plot([], [], "o", color=colours(index), label=name)
    if len(both) == 2:
        for name, colour in ERRORS.items():
            axes[0, 0].plot([], [], "s", color=colour, label=f"wrong: {name}")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(domains) + 4, 6))
    protocols = {column.split(":")[0] for column in columns.values()} - {"label"}
    rest = "" if len(shown) == len(sections) else f" (the first {len(shown)} of {len(sections)} sections)"
    title = f"{dataset}, {', '.join(protocols)}{rest}"
    headline(figure, title)
    return figure


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, dataset = snakemake.input, snakemake.wildcards.dataset
    predictions = pd.read_csv(given.predictions, sep="\t", keep_default_na=False, dtype=str)
    predictions["spot"] = predictions["spot"].astype(int)
    notes = pd.read_csv(given.notes, sep="\t", dtype=str, keep_default_na=False)
    if len(predictions):
        places = {}
        for path in given.slices:
            slice_ = ad.read_h5ad(path, backed="r")
            places[str(slice_.uns[Keys.STPATCH]["slice"])] = slice_.obsm[Keys.SPATIAL]
            slice_.file.close()
        figure = draw(dataset, predictions, read_table(given.comparisons), places)
    else:
        figure = empty_figure(f"{dataset}: no section has labels, nothing to map")
    save(figure, snakemake.output[0], simulated=bool((notes["kind"] == "simulated").any()))
