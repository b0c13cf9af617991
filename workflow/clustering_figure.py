"""How well domains found without labels meet the true ones, and how raggedly they lie; a row a method."""

import numpy as np
import pandas as pd

from workflow.intervals import is_control, split_suffix
from workflow.plotting import CONTROL, MODEL, empty_figure, headline, list_rows, new_figure, save
from workflow.score_tables import ordered
from workflow.scoreboard import read_notes, read_table
from workflow.verdicts import REFERENCE, TITLES

MARKERS = {"kmeans": "o", "gmm": "s", "leiden": "D", "none": "X"}
PANELS = ("ari", "chaos", "pas")


def draw(dataset: str, scores: pd.DataFrame):
    """ARI, CHAOS and PAS of every method's best post-processing, by clusterer; sections as dots, their mean larger.

    Parameters
    ----------
    scores
        The clustering table. Post-processing is chosen by the mean ARI; dashed lines are the true domains' own CHAOS and PAS.
    """
    rows = scores[scores["section"] != "pooled"]
    by_section = rows.groupby(["method", "head", "metric", "section"], sort=False)["value"].mean().reset_index()
    by_section["base"] = by_section["method"].map(lambda method: split_suffix(method)[0])
    mean_ari = by_section[by_section["metric"] == "ari"].groupby(["base", "method"], sort=False)["value"].mean()
    best = {base: of.idxmax()[1] for base, of in mean_ari.groupby(level="base", sort=False)}
    bases = ordered(best)
    heads = [head for head in MARKERS if head in set(by_section["head"])]
    figure, axes = new_figure(1, len(PANELS), figsize=(14, 1.8 + 0.34 * len(bases)), sharey=True)
    for axis, metric in zip(axes, PANELS, strict=True):
        of_metric = by_section[by_section["metric"] == metric]
        for place, base in enumerate(bases):
            colour = CONTROL if is_control(base) else MODEL
            for step, head in enumerate(heads):
                values = of_metric[(of_metric["method"] == best[base]) & (of_metric["head"] == head)]["value"]
                if len(values):
                    y = place if head == "none" else place + 0.22 * (step - (len(heads) - 2) / 2)
                    axis.plot(values, np.full(len(values), y), ".", color=colour, markersize=4, alpha=0.4)
                    axis.plot(values.mean(), y, MARKERS[head], color=colour, markersize=6)
        true = of_metric.loc[of_metric["method"] == REFERENCE, "value"]
        if len(true):
            axis.axvline(true.mean(), color="black", linestyle="--", linewidth=1)
        axis.set(xlabel=TITLES[metric] + ("" if metric == "ari" else " (low: smooth; dashed: the true domains)"))
        axis.locator_params(axis="x", nbins=6)
        axis.grid(axis="y", color="#EEEEEE")
        axis.set_axisbelow(True)
    list_rows(axes[0], [best[base] for base in bases])
    for label in axes[0].get_yticklabels():
        label.set_color(CONTROL if is_control(label.get_text()) else MODEL)
    for head in heads:
        if head != "none":
            axes[0].plot([], [], MARKERS[head], color="grey", label=head)
    axes[0].plot([], [], ".", color="grey", label="one section")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    headline(figure, f"{dataset}: domains found without labels")
    return figure


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    scores, dataset = read_table(snakemake.input.scores), snakemake.wildcards.dataset
    if len(scores):
        figure = draw(dataset, scores)
    else:
        figure = empty_figure(f"{dataset}: nothing was clustered; the notes of rule cluster say why")
    notes = read_notes(snakemake.input.notes)
    save(figure, snakemake.output[0], simulated=bool((notes["kind"] == "simulated").any()))
