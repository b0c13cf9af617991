"""The score table of one dataset: methods by heads and protocols, controls beside the model, and who wins."""

import html
from pathlib import Path

import numpy as np
import pandas as pd

from workflow.plotting import CONTROL, MODEL, headline, list_rows, new_figure, page, save, table

SUFFIX_MARKS = {"": "o", "+centred": "D", "+standardised": "^"}
SHOWN = {"accuracy": "accuracy", "ari": "ARI"}
PROTOCOLS = {
    "random20": "Neighbours of training spots are tested, so position alone, without a gene, does well.",
    "blocks": "Whole blocks of 16 x 16 spots train; at their borders tested spots still neighbour training spots.",
    "leave_section": "Serial sections of one donor share their layout, so position alone can do well: this split leaks "
    "less than random20 and is to be read beside the coordinates. The notes name sections whose donor also trains.",
    "leave_donor": "No tissue of the tested donor trains: this split does not leak.",
}
ORDER = ["majority", "coordinates", "coordinates_section", "raw", "pca"]
ORDER += ["neighbour_mean_6", "neighbour_mean_18", "neighbour_mean_36", "untrained", "stpatch"]


def split_suffix(method: str) -> tuple[str, str]:
    """`pca+centred` -> (`pca`, `+centred`)."""
    base, plus, suffix = method.partition("+")
    return base, plus + suffix


def is_control(method: str) -> bool:
    """Everything but the pretrained model itself; the untrained encoder is a control."""
    return not method.startswith("stpatch")


def pooled(scores: pd.DataFrame) -> pd.DataFrame:
    """One row a (protocol, head, method, split), a column a metric, over all tested spots of the split.

    The majority class, which has no head, stands under every head.
    """
    rows = scores[scores["section"] == "pooled"]
    heads = [head for head in rows["head"].unique() if head != "none"]
    headless = rows[rows["head"] == "none"]
    rows = pd.concat([rows[rows["head"] != "none"]] + [headless.assign(head=head) for head in heads])
    return rows.pivot(index=["protocol", "head", "method", "split"], columns="metric", values="value")


def strongest(by_split: pd.DataFrame, protocol: str, metric: str) -> dict[str, tuple[str, str]]:
    """Of either side, `model` and `control`, the method and head with the highest mean over the protocol's splits."""
    mean = by_split.loc[protocol][metric].groupby(level=["method", "head"], sort=False).mean()
    control = np.array([is_control(method) for method, _ in mean.index])
    return {side: mean[of].idxmax() for side, of in (("model", ~control), ("control", control)) if of.any()}


def worded(difference: pd.Series) -> str:
    """What the model's lead over the control in each split comes to; only a lead in every split is called a win."""
    if (difference > 0).all():
        return "beats it"
    if difference.mean() <= 0 or not (difference > 0).any():
        return "does not beat it"
    return "undecided"


def verdicts(by_split: pd.DataFrame) -> pd.DataFrame:
    """The model's best against the strongest control, for each protocol and metric.

    Each side is chosen among all its variants and heads by its mean over the tests themselves. There are more
    variants of controls than of the model, so the choice favours the controls. `higher_in` counts the splits in which
    the model's side scores higher.
    """
    rows = []
    for protocol in by_split.index.unique("protocol"):
        for metric in SHOWN:
            best = strongest(by_split, protocol, metric)
            if len(best) < 2:
                continue
            values = by_split.loc[protocol][metric]
            split = {side: values.xs(key, level=["method", "head"]).sort_index() for side, key in best.items()}
            difference = split["model"] - split["control"]
            rows.append(
                {
                    "protocol": protocol,
                    "metric": metric,
                    "model": ", ".join(best["model"]),
                    "model_value": split["model"].mean(),
                    "control": ", ".join(best["control"]),
                    "control_value": split["control"].mean(),
                    "difference": difference.mean(),
                    "higher_in": f"{int((difference > 0).sum())} of {len(difference)} splits",
                    "verdict": worded(difference),
                }
            )
    return pd.DataFrame(rows)


def ordered(methods) -> list[str]:
    """Methods in the order of the table: controls first, the model last, suffixes after the plain method."""
    rank = {name: index for index, name in enumerate(ORDER)}
    return sorted(methods, key=lambda method: (rank.get(split_suffix(method)[0], len(ORDER)), split_suffix(method)))


def draw(dataset: str, by_split: pd.DataFrame):
    """Every method's splits and their mean, a row a protocol; a line where the strongest control stands."""
    names, heads = by_split.index.unique("protocol"), by_split.index.unique("head")
    bases = list(dict.fromkeys(split_suffix(method)[0] for method in ordered(by_split.index.unique("method"))))
    columns = [(metric, head) for metric in SHOWN for head in heads]
    size = (3 + 3 * len(columns), 1 + (1 + 0.27 * len(bases)) * len(names))
    figure, axes = new_figure(len(names), len(columns), figsize=size, sharey=True, squeeze=False)
    lowest = by_split.min()
    limits = {metric: (min(0, lowest[metric]) - 0.02, 1.02) for metric in SHOWN}
    for row, protocol in enumerate(names):
        for axis, (metric, head) in zip(axes[row], columns, strict=True):
            of_method = by_split.loc[(protocol, head), metric].groupby(level="method")
            means = of_method.mean()
            best = means[[is_control(method) for method in means.index]].max()
            axis.axvline(best, color=CONTROL, linestyle=":", linewidth=1.5)
            for method, values in of_method:
                base, suffix = split_suffix(method)
                place = bases.index(base) + {"": 0, "+centred": 0.22, "+standardised": -0.22}[suffix]
                colour = CONTROL if is_control(method) else MODEL
                look = {"marker": SUFFIX_MARKS[suffix], "color": colour, "markersize": 5, "zorder": 3}
                if is_control(method) and means[method] == best:
                    look |= {"markersize": 8, "markeredgecolor": "black", "zorder": 4}
                axis.plot(values, np.full(len(values), place), "-", color=colour, linewidth=0.8, alpha=0.5)
                axis.plot(values, np.full(len(values), place), ".", color=colour, markersize=4, alpha=0.7)
                axis.plot(means[method], place, linestyle="none", **look)
            axis.set(title=f"{protocol}, {head}", xlabel=SHOWN[metric], xlim=limits[metric])
            axis.grid(axis="y", color="#EEEEEE")
            axis.set_axisbelow(True)
        list_rows(axes[row, 0], bases)
        for label in axes[row, 0].get_yticklabels():
            label.set_color(CONTROL if is_control(label.get_text()) else MODEL)
    for suffix, mark in SUFFIX_MARKS.items():
        axes[0, 0].plot([], [], mark, color="grey", label=f"each section {suffix[1:]}" if suffix else "as it is")
    axes[0, 0].plot([], [], ".", color="grey", markersize=4, label="single split")
    for colour, label in ((CONTROL, "control"), (MODEL, "stpatch (pretrained)")):
        axes[0, 0].plot([], [], "s", color=colour, label=label)
    axes[0, 0].plot([], [], ":", color=CONTROL, label="strongest control of the column (ringed)")
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7)
    headline(figure, f"{dataset}: each split and the mean over splits, all tested spots")
    return figure


def score_table(by_split: pd.DataFrame, protocol: str) -> str:
    """Table of one protocol in HTML: a row a method, mean ± standard deviation over splits, best controls starred."""
    by_method = by_split.loc[protocol].groupby(level=["head", "method"], sort=False)
    means, spreads = by_method.mean(), by_method.std()
    columns = [(head, metric) for head in means.index.unique("head") for metric in SHOWN]
    methods = ordered(means.index.unique("method"))
    controls = [method for method in methods if is_control(method)]
    strongest = {(head, metric): means.loc[head].loc[controls, metric].idxmax() for head, metric in columns}
    titles = "".join(f"<th>{html.escape(head)}, {SHOWN[metric]}</th>" for head, metric in columns)
    body = []
    for method in methods:
        cells = []
        for head, metric in columns:
            mean, spread = means.loc[(head, method), metric], spreads.loc[(head, method), metric]
            star = method == strongest[head, metric]
            text = f"{mean:.3f}" + (f" ± {spread:.3f}" if np.isfinite(spread) else "") + (" ★" if star else "")
            cells.append(f'<td class="number{" best" if star else ""}">{text}</td>')
        role, style = ("control", "") if is_control(method) else ("pretrained", ' class="model"')
        body.append(f"<tr{style}><td>{html.escape(method)}</td><td>{role}</td>{''.join(cells)}</tr>")
    head_row = f"<tr><th>method</th><th></th>{titles}</tr>"
    return f"<table><thead>{head_row}</thead><tbody>\n" + "\n".join(body) + "</tbody></table>"


def _worded(found: pd.DataFrame) -> pd.DataFrame:
    """Verdicts with the figures beside the names, as the page shows them."""
    if not len(found):
        return found
    named = {side: found[side] + found[f"{side}_value"].map(": {:.3f}".format) for side in ("model", "control")}
    return pd.DataFrame(
        {
            "protocol": found["protocol"],
            "metric": found["metric"].map(SHOWN),
            "stpatch at its best": named["model"],
            "strongest control": named["control"],
            "difference": found["difference"].map("{:+.3f}".format),
            "stpatch is higher in": found["higher_in"],
            "stpatch": found["verdict"],
        }
    )


def scores_page(dataset: str, scores: pd.DataFrame, notes: pd.DataFrame, allow_contamination: bool) -> str:
    """The whole page: alarm and stamp where they belong, verdicts, table, notes."""
    parts = []
    if allow_contamination:
        parts.append(
            '<p class="alarm">allow_contamination is on: pretraining slices that match an evaluation slice are kept '
            "(see the duplicates). Scores of stpatch below are not those of unseen tissue.</p>"
        )
    simulated = notes[notes["kind"] == "simulated"]
    if len(simulated):
        what = sorted(set(simulated["section"]) - {""}) + sorted(set(simulated["detail"][simulated["method"] != ""]))
        parts.append(f'<p class="simulated">Simulated data: {html.escape(", ".join(what))}.</p>')
    if not len(scores):
        parts.append("<p>There is nothing to score; the notes say why.</p>")
    else:
        by_split = pooled(scores)
        parts.append("<h2>Does pretraining beat the strongest control?</h2>")
        parts.append(table(_worded(verdicts(by_split)), "Only controls were scored."))
        for protocol in by_split.index.unique("protocol"):
            parts.append(f"<h2>All methods: {html.escape(protocol)}</h2>")
            parts.append(f'<p class="small">{PROTOCOLS[protocol]}</p>')
            parts.append(score_table(by_split, protocol))
        parts.append(
            '<p class="small">Mean ± standard deviation over splits, over all tested spots of a split. ★ strongest '
            "control of the column. Macro F1, NMI and single sections are in metrics/scores.tsv. stpatch beats a "
            "control if it is higher in every split. Both are chosen by their mean over these splits; there are more "
            "variants of controls, so the choice favours the controls.</p>"
        )
    parts.append("<h2>Notes</h2>")
    parts.append(table(notes[notes["kind"] != "simulated"], "Nothing was left out."))
    return page(f"Scores: {dataset}", "\n".join(parts))


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    scores = pd.read_csv(snakemake.input.scores, sep="\t")
    notes = pd.read_csv(snakemake.input.notes, sep="\t", dtype=str, keep_default_na=False)
    dataset, output = snakemake.wildcards.dataset, snakemake.output
    contaminated = snakemake.params.allow_contamination
    if len(scores):
        figure = draw(dataset, pooled(scores))
    else:
        figure, axes = new_figure(figsize=(8, 2))
        axes.set_axis_off()
        axes.text(0, 0.5, f"{dataset}: nothing to score; the notes say why")
    if contaminated:
        figure.text(0.5, 0.995, "allow_contamination is on", color="#CC3311", ha="center", va="top", fontweight="bold")
    save(figure, output.figure, simulated=bool((notes["kind"] == "simulated").any()))
    Path(output.page).write_text(scores_page(dataset, scores, notes, contaminated), encoding="utf-8")
