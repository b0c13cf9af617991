"""Maps of the true domains beside those predicted from stpatch and from the strongest control."""

import anndata as ad
import numpy as np
import pandas as pd

from workflow.keys import Keys
from workflow.plotting import domain_colours, draw_spots, headline, new_figure, save
from workflow.scoreboard import pooled, strongest

MAX_SECTIONS = 4


def best_columns(predictions: pd.DataFrame, scores: pd.DataFrame) -> dict[str, str]:
    """Of either side the column `protocol:method:head` that the scoreboard ranks first by accuracy."""
    predicted = [name for name in predictions.columns if name.count(":") == 2]
    if not predicted:
        return {}
    protocol = predicted[0].split(":")[0]
    best, columns = strongest(pooled(scores), protocol, "accuracy"), {}
    for side, title in (("model", "stpatch"), ("control", "strongest control")):
        if side in best:
            method, head = best[side]
            # The majority class has no head; the scoreboard shows it under every one.
            columns[title] = f"{protocol}:{method}:{'none' if method == 'majority' else head}"
    return columns


def correct(predictions: pd.DataFrame, column: str) -> float:
    """Fraction of the predicted spots whose label was met; NaN without any."""
    tested = predictions[predictions[column] != ""]
    return float((tested[column] == tested["label"]).mean())


def draw(dataset: str, predictions: pd.DataFrame, scores: pd.DataFrame, places: dict[str, np.ndarray]):
    """One row a section: truth, stpatch, strongest control; spots that were not predicted stay white.

    Parameters
    ----------
    scores
        The dataset's score table, by which the shown methods are chosen.
    places
        Section name -> float [n_spots, 2], pixels of the curated slice's spots.
    """
    sections = sorted(predictions["section"].unique())
    shown, domains = sections[:MAX_SECTIONS], sorted(predictions["label"].unique())
    columns = {"true": "label", **best_columns(predictions, scores)}
    colours = domain_colours(len(domains))
    size = (3.9 * len(columns), 1.2 + 3.6 * len(shown))
    figure, axes = new_figure(len(shown), len(columns), figsize=size, squeeze=False)
    for row, section in enumerate(shown):
        of_section = predictions[predictions["section"] == section]
        xy = places[section][of_section["spot"]]
        for axis, (title, column) in zip(axes[row], columns.items(), strict=True):
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
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(domains), 8))
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
        figure = draw(dataset, predictions, pd.read_csv(given.scores, sep="\t"), places)
    else:
        figure, axes = new_figure(figsize=(8, 2))
        axes.set_axis_off()
        axes.text(0, 0.5, f"{dataset}: no section has labels, nothing to map")
    save(figure, snakemake.output[0], simulated=bool((notes["kind"] == "simulated").any()))
