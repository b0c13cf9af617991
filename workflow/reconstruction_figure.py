"""Error at hidden spots against the size of what was hidden, a line a method."""

import pandas as pd

from workflow.intervals import is_control, seedless
from workflow.plotting import DOMAINS, MODEL, empty_figure, headline, new_figure, save
from workflow.score_tables import ordered
from workflow.scoreboard import read_notes, read_table
from workflow.verdicts import TITLES, interval

PANELS = ("mse", "pearson")


def draw(dataset: str, scores: pd.DataFrame):
    """A row a metric, a column a window; bars are 95% intervals over repeats.

    Parameters
    ----------
    scores
        The reconstruction table; drawn is what was pooled over sections.
    """
    rows = scores[(scores["section"] == "pooled") & scores["metric"].isin(PANELS)]
    size = rows["head"].str.extract(r"^window(?P<window>\d+)_side(?P<side>\d+)$").astype(int)
    rows = rows.assign(**size, method=rows["method"].map(seedless))
    methods, windows = ordered(rows["method"].unique()), sorted(rows["window"].unique())
    controls = [method for method in methods if is_control(method)]
    colours = dict(zip(controls, [colour for colour in DOMAINS if colour != MODEL] * 4, strict=False))
    figure, axes = new_figure(
        len(PANELS), len(windows), figsize=(3.5 + 5 * len(windows), 7.5), sharey="row", sharex="col", squeeze=False
    )
    for line, metric in enumerate(PANELS):
        for axis, window in zip(axes[line], windows, strict=True):
            of = rows[(rows["metric"] == metric) & (rows["window"] == window)]
            sides = sorted(of["side"].unique())
            step = min((b - a for a, b in zip(sides, sides[1:], strict=False)), default=1) / (6 * len(methods))
            for number, method in enumerate(methods):
                of_side = of[of["method"] == method].groupby(["side", "split"])["value"].mean().groupby("side")
                told = {side: interval(values) for side, values in of_side}
                if not told:
                    continue
                x = [side + step * (number - len(methods) / 2) for side in told]
                mean = [one.mean for one in told.values()]
                error = [[one.mean - one.low for one in told.values()], [one.high - one.mean for one in told.values()]]
                look = {"color": colours.get(method, MODEL), "linewidth": 1.2 if is_control(method) else 2.4}
                axis.errorbar(x, mean, yerr=error, fmt="o-", markersize=4, label=method, **look)
            axis.set(xticks=sides, ylabel=TITLES[metric] if axis is axes[line, 0] else "")
            if line == 0:
                axis.set_title(f"window of {window} cells")
            else:
                axis.set_xlabel("side of the hidden square, cells")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside right center")
    headline(figure, f"{dataset}: expression told at hidden spots")
    return figure


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    scores, dataset = read_table(snakemake.input.scores), snakemake.wildcards.dataset
    if len(scores):
        figure = draw(dataset, scores)
    else:
        figure = empty_figure(f"{dataset}: nothing was hidden; the notes of rule reconstruct say why")
    notes = read_notes(snakemake.input.notes)
    save(figure, snakemake.output[0], simulated=bool((notes["kind"] == "simulated").any()))
