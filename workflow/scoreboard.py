"""The score page of one dataset: what the numbers show, then a table a protocol with every control; and the probes' figure."""

import html
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from workflow import contamination, verdicts
from workflow.findings import findings
from workflow.intervals import is_control, split_suffix
from workflow.plotting import CONTROL, MODEL, empty_figure, headline, list_rows, new_figure, page, save, table
from workflow.score_tables import (
    HEADS,
    beside_paper,
    clustering_tables,
    folded,
    ordered,
    probe_tables,
    reconstruction_of_paper,
    reconstruction_table,
    verdict_table,
)

PROTOCOLS = {
    "random20": "The paper's: a fifth of the spots of all sections trains. Neighbours of training spots are tested, so position "
    "alone, without a gene, does well: this split leaks and proves nothing of a model.",
    "blocks": "Whole blocks of 16 x 16 spots train; at their borders tested spots still neighbour training spots.",
    "blocks_buffered": "As blocks, without the tested spots that a window of the model could see together with a training "
    "spot; the notes say how many remain.",
    "leave_section": "Serial sections of one donor share their layout, so position alone can do well: this split leaks "
    "less than random20 and is to be read beside the coordinates. The notes name sections whose donor also trains.",
    "leave_donor": "No tissue of the tested donor trains: this split does not leak.",
    "clustering": "Domains found without labels, their number given. CHAOS and PAS measure how ragged domains lie, not "
    "whether they are right: smoother than the true ones (row labels) is no merit.",
    "reconstruction": "Squares of tissue are hidden, and the expression of their spots is told from the visible rest of a "
    "window. 8 of 24: a square 8 cells wide in a window of 24.",
}
PRETRAINED_ELSEWHERE = {"scgpt", "scgpt_spatial", "stofm", "novae"}  # foreign encoders that come with weights
LEADING = {"accuracy", "ari", "mse"}  # metrics in the table of verdicts; all are in the sentences
MARKERS = {"knn": "o", "logistic": "s", "mlp": "D", "none": "o"}


def draw(dataset: str, comparisons: pd.DataFrame):
    """A column a protocol: every method's best variant and head with its interval, all others as dots.

    Parameters
    ----------
    comparisons
        The dataset's comparisons; the dotted line is the strongest control.
    """
    rows = comparisons[(comparisons["section"] == "pooled") & (comparisons["compared"] == "method")]
    names = [name for name in PROTOCOLS if name in set(rows["protocol"])]
    rows = rows.assign(base=rows["method"].map(lambda method: split_suffix(method)[0]))
    bases = ordered(rows["base"].unique())
    shown = {"accuracy": "accuracy", "ari": "ARI"}
    size = (2.2 + 2.7 * len(names), 1.5 + (0.6 + 0.25 * len(bases)) * len(shown))
    figure, axes = new_figure(len(shown), len(names), figsize=size, sharey=True, sharex="row", squeeze=False)
    for row, (metric, title) in enumerate(shown.items()):
        for axis, protocol in zip(axes[row], names, strict=True):
            of = rows[(rows["protocol"] == protocol) & (rows["metric"] == metric)]
            axis.axvline(of["control_value"].max(), color=CONTROL, linestyle=":", linewidth=1.5)
            for place, base in enumerate(bases):
                mine = of[of["base"] == base]
                if not len(mine):
                    continue
                colour = CONTROL if is_control(base) else MODEL
                best = mine.loc[mine["value"].idxmax()]
                axis.plot(mine["value"], np.full(len(mine), place), ".", color=colour, markersize=4, alpha=0.35)
                axis.plot([best["value_low"], best["value_high"]], [place, place], "-", color=colour, linewidth=2)
                look = {"markeredgecolor": "black"} if best["value"] == of["control_value"].max() else {}
                axis.plot(best["value"], place, MARKERS[best["head"]], color=colour, markersize=6, **look)
            axis.set(title=protocol if not row else "", xlabel=title)
            axis.set_xlim(min(0, rows.loc[rows["metric"] == metric, "value"].min()) - 0.02, 1.02)
            axis.grid(axis="y", color="#EEEEEE")
            axis.set_axisbelow(True)
        list_rows(axes[row, 0], bases)
        for label in axes[row, 0].get_yticklabels():
            label.set_color(CONTROL if is_control(label.get_text()) else MODEL)
    for head in [head for head in HEADS if head in set(rows["head"])]:
        axes[0, 0].plot([], [], MARKERS[head], color="grey", label=f"best, by {HEADS[head]}")
    axes[0, 0].plot([], [], "-", color="grey", linewidth=2, label="its 95% interval")
    axes[0, 0].plot([], [], ".", color="grey", markersize=4, label="other variants and heads")
    axes[0, 0].plot([], [], ":", color=CONTROL, label="strongest control (ringed)")
    for colour, label in ((CONTROL, "control"), (MODEL, "pretrained")):
        axes[0, 0].plot([], [], "s", color=colour, label=label)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=1 + len(names))
    headline(figure, f"{dataset}: mean over splits, all tested spots")
    return figure


def _said(found: pd.DataFrame) -> str:
    """The verdicts of one protocol as sentences, and of what they speak."""
    if not len(found):
        return "<p>Only controls were scored.</p>"
    lines = "".join(f"<li>{html.escape(verdicts.sentence(row))}</li>" for row in found.itertuples())
    scopes = dict.fromkeys(verdicts.scope(row) for row in found.itertuples())
    return f"<ul>{lines}</ul><p class=small>{html.escape(' '.join(scopes))}</p>"


def _listed(title: str, sentences: Sequence[str]) -> list[str]:
    lines = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in sentences)
    return [f"<h2>{title}</h2><ul>{lines}</ul>"] if lines else []


def _probes(dataset: str, protocol: str, comparisons: pd.DataFrame) -> str:
    rows = comparisons[(comparisons["protocol"] == protocol) & (comparisons["compared"] == "method")]
    pooled = rows[rows["section"] == "pooled"]
    parts = [_said(verdicts.of_probes(comparisons[comparisons["protocol"] == protocol])), probe_tables(pooled)]
    if protocol == "random20":
        parts.append(beside_paper(dataset, pooled))
    sections = [section for section in rows["section"].unique() if section != "pooled"]
    by_section = "".join(
        f"<h3>{html.escape(section)}</h3>" + probe_tables(rows[rows["section"] == section]) for section in sections
    )
    parts.append(folded(f"By section ({len(sections)})", by_section))
    return "".join(parts)


def _clustering(scores: pd.DataFrame) -> str:
    sections = scores[scores["section"] != "pooled"]
    by_section = "".join(
        f"<h3>{html.escape(section)}</h3>" + clustering_tables(rows) for section, rows in sections.groupby("section")
    )
    return (
        _said(verdicts.of_clusterings(scores))
        + clustering_tables(sections)
        + folded(f"By section ({sections['section'].nunique()})", by_section)
    )


def _reconstruction(dataset: str, scores: pd.DataFrame) -> str:
    found = verdicts.of_reconstructions(scores)
    parts = [_said(found[found["metric"] == "mse"])]
    for section, rows in scores.groupby("section", sort=False):
        windows = rows["head"].str.partition("_")[0]
        tables = "".join(
            reconstruction_table(of, metric)
            for _, of in rows.groupby(windows, sort=False)
            for metric in ("mse", "mae", "pearson", "r2")
        )
        parts.append(tables if section == "pooled" else folded(section, tables))
    return "".join([*parts, reconstruction_of_paper(dataset, list(scores["head"].unique()))])


def scores_page(
    dataset: str,
    comparisons: pd.DataFrame,
    scores: pd.DataFrame,
    notes: pd.DataFrame,
    allow_contamination: bool,
    said: Sequence[str] = (),
    status: Sequence[str] = (),
) -> str:
    """The whole page: alarm and stamp where they belong, what it shows, verdicts, a section a protocol, notes.

    Parameters
    ----------
    comparisons
        Of all heads, one below the other.
    scores
        Of all stages; of them the rows of `clustering` and `reconstruction` are shown.
    notes
        `stage`, then the columns of the stages' notes.
    said, status
        Sentences of `workflow.findings` and of `workflow.contamination`.
    """
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
    parts += _listed("What this shows, and what it does not", said)
    parts += _listed("Was this tissue pretrained on?", status)
    of = {name: scores[scores["protocol"] == name] for name in ("clustering", "reconstruction")}
    sections = {name: _probes(dataset, name, comparisons) for name in comparisons["protocol"].unique()}
    if len(of["clustering"]):
        sections["clustering"] = _clustering(of["clustering"])
    if len(of["reconstruction"]):
        sections["reconstruction"] = _reconstruction(dataset, of["reconstruction"])
    if not sections:
        parts.append("<p>There is nothing to score; the notes say why.</p>")
    else:
        found = joined(
            [
                verdicts.of_probes(comparisons),
                verdicts.of_clusterings(of["clustering"]),
                verdicts.of_reconstructions(of["reconstruction"]),
            ]
        )
        parts.append("<h2>Does pretraining beat the strongest control?</h2>")
        found = found.sort_values("protocol", key=lambda names: names.map(list(PROTOCOLS).index), kind="stable")
        parts.append(verdict_table(found[found["metric"].isin(LEADING)]))
        parts.append(
            '<p class="small">Either side is the best of its heads and post-processings, chosen by one rule: under the '
            "probes on other blocks of tissue than those judged, elsewhere by its mean over all. It beats, or does not, where the "
            "95% interval of the paired difference lies on one side of 0. Tests are not corrected for their number. In "
            "the tables ★ is the strongest control of a metric, over all heads; ▲ a lead over it whose interval lies "
            "above 0. Below each mean is its 95% interval.</p>"
        )
    for name, body in sorted(sections.items(), key=lambda item: list(PROTOCOLS).index(item[0])):
        parts.append(f"<h2>{name}</h2><p class=small>{PROTOCOLS[name]}</p>{body}")
    missing = [name for name in PROTOCOLS if name not in sections]
    if missing:
        parts.append(
            f"<p>Not measured here: {', '.join(missing)}. Either evaluate.protocols does not ask for them, or the notes say "
            "why they were skipped.</p>"
        )
    rest = notes[notes["kind"] != "simulated"]
    parts.append("<h2>Notes</h2>")
    told = table(rest, "Nothing was left out.")
    parts.append(folded(f"{len(rest)} notes", told) if len(rest) > 20 else told)
    return page(f"Scores: {dataset}", "\n".join(parts))


def read_table(path: str | Path) -> pd.DataFrame:
    """A tidy table of scores or comparisons: text stays text, a section called NA included."""
    numbers = ["value", "value_low", "value_high", "control_value", "difference", "low", "high", "p"]
    return pd.read_csv(path, sep="\t", keep_default_na=False, na_values={name: [""] for name in numbers})


def read_notes(path: str | Path) -> pd.DataFrame:
    """The notes of one stage, all text, after the stage's name, which the path tells."""
    notes = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    notes.insert(0, "stage", Path(path).name.removesuffix(".notes.tsv"))
    return notes


def joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    """The tables one below the other; one without rows counts only where all are."""
    return pd.concat([table for table in tables if len(table)] or tables[:1], ignore_index=True)


if __name__ == "__main__":
    from workflow import fingerprints, qc
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, output, dataset = snakemake.input, snakemake.output, snakemake.wildcards.dataset
    comparisons = joined([read_table(path) for path in given.comparisons])
    notes = joined([read_notes(path) for path in given.notes])
    contaminated = snakemake.params.allow_contamination
    if len(comparisons):
        figure = draw(dataset, comparisons)
    else:
        figure = empty_figure(f"{dataset}: nothing to score; the notes say why")
    if contaminated:
        figure.text(0.5, 0.995, "allow_contamination is on", color="#CC3311", ha="center", va="top", fontweight="bold")
    save(figure, output.figure, simulated=bool((notes["kind"] == "simulated").any()))
    scores = joined([read_table(path) for path in given.scores])
    admitted, quarantine, duplicates, remarks = (
        qc.read_table(path) for path in (given.admitted, given.quarantine, given.duplicates, given.remarks)
    )
    printed = fingerprints.read_table(given.fingerprints)
    rows = list(snakemake.params.rows)
    known = {row["slice"] for row in printed if row["dataset"] == dataset} | set(rows)
    kept = contamination.kept_of(dataset, remarks, known)
    bases = sorted({split_suffix(method)[0] for method in scores["method"]})
    elsewhere = [base for base in bases if base.startswith("stpatch_") or base in PRETRAINED_ELSEWHERE]
    listed = list(snakemake.params.pretrained)
    status = contamination.status(dataset, listed, rows, admitted, quarantine, duplicates, remarks, printed, elsewhere)
    said = findings(dataset, scores, comparisons, notes, admitted[admitted["split"] == dataset], kept)
    text = scores_page(dataset, comparisons, scores, notes, contaminated, said, status)
    Path(output.page).write_text(text, encoding="utf-8")
