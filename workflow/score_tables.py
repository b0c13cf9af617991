"""Tables of the score page in HTML: a row a method, mean and 95% interval, controls, models and the paper's figures."""

import html
from itertools import product

import numpy as np
import pandas as pd

from workflow.intervals import METRICS, Interval, is_control, split_suffix
from workflow.paper_tables import footnotes, paper_scores
from workflow.plotting import table
from workflow.verdicts import LOWER_IS_BETTER, TITLES, interval, judged, sides_of, size

ORDER = ["labels", "majority", "one_domain", "coordinates", "coordinates_section", "raw", "pca"]
ORDER += ["neighbour_mean_6", "neighbour_mean_18", "neighbour_mean_36"]
ORDER += ["spatial_directions_18", "spatial_directions_36"]
ORDER += ["gene_mean", "mean_16", "inverse_distance", "kriging", "kriging_pca"]
LAST = ["untrained", "stpatch"]  # after everything that the order does not name; further models of ours at the very end
HEADS = {"knn": "k nearest neighbours", "logistic": "logistic", "mlp": "MLP"}
MARKS = {"best": " ★", "beats": " ▲"}


def ordered(methods) -> list[str]:
    """Methods in the order of the tables: controls, foreign encoders, untrained, stpatch; suffixes after the plain one."""

    def rank(method: str):
        base, suffix = split_suffix(method)
        if base in ORDER:
            place = ORDER.index(base)
        elif base in LAST:
            place = 101 + LAST.index(base)
        else:
            place = 100 if is_control(base) else 200
        return place, base, suffix

    return sorted(methods, key=rank)


def cell(value: float, low: float, high: float, mark: str = "", digits: int = 2) -> str:
    """Mean, mark, and the interval below it; an empty cell where nothing was measured."""
    if not np.isfinite(value):
        return "<td></td>"
    ends = ", ".join(f"{round(end, digits) + 0.0:.{digits}f}" for end in (low, high))  # no -0.00
    below = f"<i>{ends}</i>" if np.isfinite(low) else ""
    return f'<td class="number {mark}">{value:.3f}{MARKS.get(mark, "")}{below}</td>'


def _rows(methods: list[str], cells: dict[str, list[str]]) -> str:
    rows = []
    for method in methods:
        base, suffix = split_suffix(method)
        name = (
            html.escape(base) if not suffix else f'<span class="small">{html.escape(base)} {html.escape(suffix)}</span>'
        )
        rows.append(f"<tr{'' if is_control(method) else ' class=model'}><td>{name}</td>{''.join(cells[method])}</tr>")
    return "\n".join(rows)


def _table(groups: dict[str, list[str]], methods: list[str], cells: dict[str, list[str]]) -> str:
    """A table with two lines of headings: groups of columns, then the columns."""
    over = "".join(f'<th colspan="{len(names)}">{html.escape(group)}</th>' for group, names in groups.items())
    names = "".join(f'<th class="number">{html.escape(name)}</th>' for of in groups.values() for name in of)
    head = f'<thead><tr><th rowspan="2">method</th>{over}</tr><tr>{names}</tr></thead>'
    return f'<table class="scores">{head}<tbody>\n{_rows(methods, cells)}</tbody></table>'


def probe_tables(rows: pd.DataFrame) -> str:
    """All methods of one protocol and section, a group of columns a head; the MLP, put on few methods, has its own table.

    Parameters
    ----------
    rows
        Of a comparisons table: one protocol and section, `compared` `method`. The strongest control of each metric is
        starred; a triangle says that a method's lead over it has an interval above 0.
    """
    heads = [head for head in HEADS if head in set(rows["head"])]
    tables = [[head for head in heads if head != "mlp"], [head for head in heads if head == "mlp"]]
    return "".join(_probe_table(rows, of) for of in tables if of)


def _probe_table(rows: pd.DataFrame, heads: list[str]) -> str:
    found = {(row.method, row.head, row.metric): row for row in rows.itertuples()}
    cells = {}
    for method in rows.loc[rows["head"].isin([*heads, "none"]), "method"].unique():
        cells[method] = []
        for head, metric in product(heads, METRICS):
            row = found.get((method, head, metric)) or found.get((method, "none", metric))  # the majority has no head
            if row is None:
                cells[method].append("<td></td>")
                continue
            strongest = (row.method, row.head) == (row.control, row.control_head)
            mark = "best" if strongest else "beats" if row.low > 0 else ""
            cells[method].append(cell(row.value, row.value_low, row.value_high, mark))
    groups = {HEADS[head]: [TITLES[metric] for metric in METRICS] for head in heads}
    return _table(groups, ordered(cells), cells)


def clustering_tables(scores: pd.DataFrame) -> str:
    """All methods, a group of columns a clusterer: agreement with the labels, then raggedness; means over sections.

    Parameters
    ----------
    scores
        The clustering table, rows of sections; with one section alone there is no interval.
    """
    heads = [head for head in scores["head"].unique() if head != "none"]
    by_section = scores.groupby(["method", "head", "metric", "section"], sort=False)[
        "value"
    ].mean()  # of repeats, seeds
    found = {key: interval(values) for key, values in by_section.groupby(level=[0, 1, 2], sort=False)}
    tables = []
    for metrics in (["ari", "nmi", "homogeneity"], ["chaos", "pas"]):
        cells = {method: [] for method in scores.loc[scores["metric"].isin(metrics), "method"].unique()}
        for head, metric in product(heads, metrics):
            of = {key[0]: told.mean for key, told in found.items() if key[1:] == (head, metric) and is_control(key[0])}
            best = max(of, key=of.get, default=None) if metric not in ("chaos", "pas") else None
            for method in cells:
                told = found.get((method, head, metric)) or found.get((method, "none", metric))
                mark = "best" if method == best else ""
                digits = 3 if metric == "chaos" else 2  # it is small
                cells[method].append(cell(*within(metric, told)[:3], mark, digits) if told else "<td></td>")
        tables.append(_table({head: [TITLES[metric] for metric in metrics] for head in heads}, ordered(cells), cells))
    return "".join(tables)


def reconstruction_table(scores: pd.DataFrame, metric: str) -> str:
    """All methods under one metric, a group of columns a window, a column a size of what was hidden in it.

    Parameters
    ----------
    scores
        The reconstruction table of one section or `pooled`; means over repeats.
    """
    scores = scores[scores["metric"] == metric]
    heads, sign = list(scores["head"].unique()), -1 if metric in LOWER_IS_BETTER else 1
    values = scores.groupby(["method", "head"], sort=False)["value"]
    found = {key: interval(of) for key, of in values}
    cells = {method: [] for method in scores["method"].unique()}
    for head in heads:
        of = {method: sign * found[method, head].mean for method in cells if (method, head) in found}
        best = max((method for method in of if is_control(method)), key=of.get, default=None)
        for method in cells:
            told = found.get((method, head))
            cells[method].append(cell(*told[:3], "best" if method == best else "", 3) if told else "<td></td>")
    return _table({TITLES[metric]: [size(head) for head in heads]}, ordered(cells), cells)


def reconstruction_of_paper(dataset: str, heads: list[str]) -> str:
    """The paper's Table 7 for the sizes that were measured; empty for other datasets."""
    paper = paper_scores(table=7, dataset=dataset)
    heads = [head for head in heads if head in set(paper["head"])]
    shown = {head: {head, head.partition("_")[2]} for head in heads}  # of scgpt_spatial no window is stated
    groups, cells = {}, {method: [] for method in paper["method"].unique()}
    for metric in ("mse", "mae"):
        groups[f"{TITLES[metric]} (paper)"] = [size(head) for head in heads]
        for method, head in product(cells, heads):
            told = paper[(paper["method"] == method) & (paper["metric"] == metric) & paper["head"].isin(shown[head])]
            cells[method].append(f'<td class="number">{told["value"].iloc[0]:.3f}</td>' if len(told) else "<td></td>")
    cells = {method: of for method, of in cells.items() if set(of) - {"<td></td>"}}
    if not cells:
        return ""
    notes = " ".join(footnotes(paper).values())
    return _table(groups, list(cells), cells) + (
        "<p class=small>The paper's own figures (Table 7), not measured here. Normalisation, genes and how the square lies in "
        f"the window are not stated there, so the scales need not agree. {html.escape(notes)}</p>"
    )


def within(metric: str, told: Interval) -> Interval:
    """An interval that ends where the metric does: Student's goes beyond where units are few."""
    least = {"ari": -0.5}.get(metric, 0.0)
    low, high = np.clip([told.low, told.high], least, np.inf if metric == "chaos" else 1.0)
    return told._replace(low=low, high=high)


def beside_paper(dataset: str, rows: pd.DataFrame) -> str:
    """The paper's accuracy and ARI (its Tables 1-3) beside ours under the same head; empty without figures of the paper.

    Parameters
    ----------
    rows
        As for `probe_tables`, pooled, under the paper's protocol.
    """
    paper = paper_scores(dataset=dataset)
    paper = paper[paper["table"] <= 3]
    if not len(paper):
        return ""
    measured = set(rows["head"])
    heads = [head for head in ("mlp", "knn") if head in set(paper["head"])]
    notes = footnotes(paper)
    number = {note: str(index) for index, note in enumerate(notes, 1)}
    columns = list(product(heads, ("accuracy", "ari")))
    plain = rows[~rows["method"].str.contains("+", regex=False)]
    lines = []
    for method in ordered(plain["method"].unique()):
        of = plain[plain["method"] == method].set_index(["head", "metric"])["value"]
        told = [
            of.get((head, metric), of.get(("none", metric))) if head in measured else None for head, metric in columns
        ]
        cells = "".join("<td></td>" if value is None else f'<td class="number">{value:.3f}</td>' for value in told)
        role = "" if is_control(method) else ' class="model"'
        lines.append(f"<tr{role}><td>measured here</td><td>{html.escape(method)}</td>{cells}</tr>")
    for method, of in paper.groupby("method", sort=False):
        told = {(row.head, row.metric): (row.value, row.note) for row in of.itertuples()}
        cells = []
        for value, note in (told.get(column, (None, "")) for column in columns):
            marks = ",".join(number[name] for name in note.split(",") if name)
            cells.append("<td></td>" if value is None else f'<td class="number">{value:.3f}<sup>{marks}</sup></td>')
        lines.append(f'<tr class="paper"><td>paper</td><td>{method}</td>{"".join(cells)}</tr>')
    titles = "".join(f'<th class="number">{HEADS[head]}, {TITLES[metric]}</th>' for head, metric in columns)
    below = "".join(f"<p class=small><sup>{number[note]}</sup> {html.escape(text)}</p>" for note, text in notes.items())
    return (
        f'<table class="scores"><thead><tr><th>source</th><th>method</th>{titles}</tr></thead><tbody>\n'
        + "\n".join(lines)
        + "</tbody></table><p class=small>Rows marked paper are the paper's own figures (Tables 1-3), not measured here: "
        "patch_16 is its encoder with windows 16 cells wide. Pooling, stratification and normalisation are not stated "
        f"there.</p>{below}"
    )


def verdict_table(found: pd.DataFrame) -> str:
    """The verdicts on the leading metrics, one line each, the word coloured."""
    lines = []
    for row in found.itertuples():
        what = row.protocol if row.protocol != "reconstruction" else f"reconstruction, {size(row.head)}"
        word = judged(row)
        lead = f"{row.difference:+.3f}" + (f" [{row.low:+.3f}, {row.high:+.3f}]" if pd.notna(row.low) else "")
        # Names of methods may break behind a plus: unbroken they are wider than the page of a report.
        sides = "".join(f"<td>{html.escape(side).replace('+', '+<wbr>')}</td>" for side in sides_of(row))
        lines.append(
            f'<tr><td>{what}</td><td>{TITLES[row.metric]}</td>{sides}<td class="number">{lead}</td>'
            f'<td class="{word.replace(" ", "-")}">{word}</td></tr>'
        )
    if not lines:
        return table(found, "Only controls were scored.")
    head = "<th>protocol</th><th>metric</th><th>stpatch at its best</th><th>strongest control</th>"
    head += "<th>difference [95%]</th><th>stpatch</th>"
    return f'<table class="verdicts"><thead><tr>{head}</tr></thead><tbody>\n' + "\n".join(lines) + "</tbody></table>"


def folded(title: str, body: str) -> str:
    """Something to open by a click."""
    return f"<details><summary>{html.escape(title)}</summary>{body}</details>"
