"""Which domains are taken for which, by stpatch and by the strongest control."""

import numpy as np
import pandas as pd

from workflow.maps import best_columns, correct
from workflow.plotting import empty_figure, headline, new_figure, save
from workflow.scoreboard import read_notes, read_table

NUMBERED = 12  # with more domains the cells are too small for figures


def shares(predictions: pd.DataFrame, column: str, domains: list[str]) -> np.ndarray:
    """Of each true domain's predicted spots the share taken for each domain, float [K, K]; rows of NaN without any."""
    tested = predictions[predictions[column] != ""]
    counts = pd.crosstab(tested["label"], tested[column]).reindex(index=domains, columns=domains, fill_value=0)
    with np.errstate(invalid="ignore"):
        return counts.to_numpy() / counts.to_numpy().sum(axis=1, keepdims=True)


def draw(dataset: str, predictions: pd.DataFrame, comparisons: pd.DataFrame):
    """One matrix a side, true domains down, predicted ones across; of all sections together."""
    domains, columns = sorted(predictions["label"].unique()), best_columns(predictions, comparisons)
    side = 2.2 + 0.42 * len(domains)
    figure, axes = new_figure(1, len(columns), figsize=((side + 0.6) * len(columns) + 1, side + 1.4), squeeze=False)
    for axis, (title, column) in zip(axes[0], columns.items(), strict=True):
        values = shares(predictions, column, domains)
        image = axis.imshow(values, cmap="Blues", vmin=0, vmax=1)
        if len(domains) <= NUMBERED:
            for (row, col), value in np.ndenumerate(values):
                if value >= 0.005:
                    ink = "white" if value > 0.5 else "black"
                    axis.text(col, row, f"{value:.2f}", ha="center", va="center", color=ink, fontsize=7)
        protocol, method, head = column.split(":")
        axis.set_title(f"{title}: accuracy {correct(predictions, column):.3f}\n{method}, {head}", fontsize=9)
        axis.set(xticks=range(len(domains)), yticks=range(len(domains)), yticklabels=domains, xlabel="predicted")
        axis.set_xticklabels(domains, rotation=90)
    axes[0, 0].set_ylabel("true")
    figure.colorbar(image, ax=axes[0].tolist(), label="share of the true domain", shrink=0.8)
    headline(figure, f"{dataset}, {protocol}")
    return figure


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, dataset = snakemake.input, snakemake.wildcards.dataset
    predictions = pd.read_csv(given.predictions, sep="\t", keep_default_na=False, dtype=str)
    if len(predictions):
        figure = draw(dataset, predictions, read_table(given.comparisons))
    else:
        figure = empty_figure(f"{dataset}: no section has labels, nothing to confuse")
    save(figure, snakemake.output[0], simulated=bool((read_notes(given.notes)["kind"] == "simulated").any()))
