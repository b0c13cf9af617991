"""Tables of `python -m workflow.ablate`: ours for every variant, with the spread over seeds, and the paper's beside them.

`{table}.tsv` holds every method of every run; `{table}.md`, `.html` and, where the variants lie on an axis, `.png` show stpatch
beside the strongest control. The paper's figures are labelled "paper", and its inconsistencies stand below.
"""

import base64
import html
from pathlib import Path

import pandas as pd

from workflow.paper_tables import footnotes, paper_scores
from workflow.plotting import new_figure, page, save

METRICS = ("accuracy", "ari")  # in the paper's order
PROTOCOLS = {  # that the tables show, and how they call them
    "random20": "random 20% of the spots train (the paper's split, which leaks)",
    "blocks": "blocks of 16 x 16 spots",
    "blocks_buffered": "blocks of 16 x 16 spots, a window apart",
    "leave_section": "leave one section out",
    "leave_donor": "leave one donor out",
    "clustering": "clustering, number of domains given",
}
PER_DATASET = {"mlp": 1, "knn": 3}  # the paper's tables that give some windows dataset by dataset
COLUMNS = ["table", "variant", "seed", "dataset", "protocol", "head", "method", "metric", "value"]
OURS = "stpatch"


def gather(table, runs) -> pd.DataFrame:
    """The scores of all runs, mean over splits of what is pooled over sections: `COLUMNS`."""
    parts = []
    for run in runs:
        scores = pd.read_csv(run.scores, sep="\t", keep_default_na=False)
        scores = scores[scores["section"] == "pooled"].astype({"value": float})
        keys = ["dataset", "protocol", "head", "method", "metric"]
        mean = scores.groupby(keys, sort=True)["value"].mean().reset_index()
        parts.append(mean.assign(table=table.name, variant=run.variant.name, seed=run.seed))
    return pd.concat(parts)[COLUMNS] if parts else pd.DataFrame(columns=COLUMNS)


def cell(values: dict[str, list[float]]) -> str:
    """Accuracy / ARI, each the mean over seeds ± half their range; "" where nothing was measured."""
    if not any(values.values()):
        return ""
    return " / ".join(_spread(values[metric]) if values[metric] else "-" for metric in METRICS)


def _spread(values: list[float]) -> str:
    text = _number(sum(values) / len(values))
    return text + (f" ± {_number((max(values) - min(values)) / 2)}" if len(values) > 1 else "")


def _number(value: float) -> str:
    return f"{value:.3f}".replace("0.", ".", 1)


def by_dataset(found: pd.DataFrame, datasets: list[str]) -> list[dict[str, list[float]]]:
    """Of one row of a table: for each dataset and for their mean (of each seed) the values of each metric, one a seed.

    A seed that lacks a dataset has no mean.
    """
    columns = [
        {metric: here.loc[here["metric"] == metric, "value"].tolist() for metric in METRICS}
        for here in (found[found["dataset"] == dataset] for dataset in datasets)
    ]
    means = {}
    for metric in METRICS:
        seeds = found[found["metric"] == metric].groupby("seed")["value"]
        means[metric] = seeds.mean()[seeds.count() == len(datasets)].tolist()
    return [*columns, means]


def strongest(found: pd.DataFrame, datasets: list[str]) -> list[str]:
    """For each dataset, and for the mean of all, the control with the best accuracy (ARI where there is none) and its scores."""
    controls = found[~found["method"].str.startswith((OURS, "untrained"))]
    cells = []
    for wanted in [*([dataset] for dataset in datasets), datasets]:
        here = controls[controls["dataset"].isin(wanted)]
        ranked = here[here["metric"] == (METRICS[0] if METRICS[0] in set(here["metric"]) else METRICS[1])]
        if not len(ranked):
            cells.append("")
            continue
        best = ranked.groupby("method", sort=True)["value"].mean().idxmax()
        rows = here[here["method"] == best].groupby(["seed", "metric"])["value"].mean().reset_index()
        values = {metric: rows.loc[rows["metric"] == metric, "value"].tolist() for metric in METRICS}
        cells.append(f"{cell(values)} ({best})")
    return cells


def papers_rows(mirrors: int | None, head: str, name: str) -> pd.DataFrame:
    """The paper's rows of a variant under this head: the mean from the table mirrored, the datasets from Tables 1 and 3."""
    rows = [paper_scores(table=mirrors, head=head, method=name)] if mirrors else []
    rows += [paper_scores(table=PER_DATASET[head], head=head, method=name)] if head in PER_DATASET else []
    rows = pd.concat(rows) if name and rows else paper_scores(table=-1)
    return rows.drop_duplicates(["dataset", "metric"])  # the table mirrored comes first


def papers_cells(rows: pd.DataFrame, datasets: list[str]) -> list[str]:
    """The paper's figures for these datasets and the mean of its six, marked by the notes that belong to them."""
    cells = []
    for dataset in [*datasets, "mean"]:
        here = rows[rows["dataset"] == dataset].set_index("metric")
        text = " / ".join(_number(here.loc[metric, "value"]) if metric in here.index else "-" for metric in METRICS)
        notes = ", ".join(footnotes(here)) if len(here) else ""
        cells.append((text + (f" [{notes}]" if notes else "")) if len(here) else "")
    return cells


def blocks(table, scores: pd.DataFrame) -> list[tuple[str, list[str], list[list[str]], list[str]]]:
    """What is shown: (heading, header, rows, notes) for every protocol and head, and the paper's own table.

    Figures of the paper stand in the blocks of its own protocol alone (`random20`, MLP or k-NN); where its head did not run here, in
    a block of their own.
    """
    names = [variant.name for variant in table.variants if variant.name in set(scores["variant"])]
    papers = {variant.name: variant.paper for variant in table.variants}
    found, shown_heads = [], set()
    for protocol, wording in PROTOCOLS.items():
        here = scores[scores["protocol"] == protocol]
        for head in sorted(set(here.loc[here["method"] == OURS, "head"])):
            rows, used = [], []
            of_head = here[here["head"] == head]
            datasets = sorted(set(of_head["dataset"]))
            for name in names:
                of_variant = of_head[of_head["variant"] == name]
                for method in (OURS, "untrained"):
                    ours = of_variant[of_variant["method"] == method]
                    rows.append([name, method, *map(cell, by_dataset(ours, datasets))])
                paper = papers_rows(table.mirrors, head, papers[name]) if protocol == "random20" else ()
                if len(paper):
                    rows.append([name, "paper", *papers_cells(paper, datasets)])
                    used.append(paper[paper["dataset"].isin([*datasets, "mean"])])
            rows.append(["", "strongest control", *strongest(of_head[of_head["variant"] == names[0]], datasets)])
            if used:
                shown_heads.add(head)
            notes = footnotes(pd.concat(used)) if used else {}
            header = ["variant", "method", *datasets, "mean"]
            found.append((f"{wording}; head: {head}", header, rows, [f"[{key}] {text}" for key, text in notes.items()]))
    if table.mirrors and "mlp" not in shown_heads:
        rows = paper_scores(table=table.mirrors, head="mlp")
        named = {name: rows[rows["method"] == paper] for name, paper in papers.items()}
        cells = [[name, "paper", *papers_cells(own, [])] for name, own in named.items() if len(own)]
        notes = [f"[{key}] {text}" for key, text in footnotes(rows).items()]
        heading = f"the paper's Table {table.mirrors} (random 20%, head: mlp; the head mlp did not run here)"
        found.append((heading, ["variant", "method", "mean of six datasets"], cells, notes))
    return found


def curve(table, scores: pd.DataFrame, path: Path, simulated: bool) -> bool:
    """Accuracy and ARI along the table's axis, mean of the datasets: a line for each protocol (head k-NN, where that did not run
    the first), bars for the range over seeds, the paper's line dashed. False where fewer than two variants lie on an axis."""
    x = {variant.name: variant.x for variant in table.variants if variant.x is not None}
    if len(set(scores["variant"]) & set(x)) < 2:
        return False
    figure, panels = new_figure(1, 2, figsize=(9, 3.6))
    for axes, metric in zip(panels, METRICS, strict=True):
        for number, protocol in enumerate(PROTOCOLS):
            here = scores[(scores["protocol"] == protocol) & (scores["method"] == OURS) & (scores["metric"] == metric)]
            heads = sorted(set(here["head"]))
            if not heads:
                continue
            head = "knn" if "knn" in heads else heads[0]
            here = here[(here["head"] == head) & here["variant"].isin(list(x))]
            mean = here.groupby(["variant", "seed"])["value"].mean().groupby("variant")
            line = pd.DataFrame({"mean": mean.mean(), "half": (mean.max() - mean.min()) / 2})
            line = line.assign(x=[x[name] for name in line.index]).sort_values("x")
            axes.errorbar(
                line["x"], line["mean"], line["half"], marker="o", label=f"{protocol}, {head}", color=f"C{number}"
            )
        if table.mirrors:
            paper = paper_scores(table=table.mirrors, head="mlp", metric=metric).set_index("method")["value"]
            known = sorted((v.x, paper[v.paper]) for v in table.variants if v.x is not None and v.paper in paper)
            label = "paper (random20, mlp; its six datasets)"
            axes.plot([at for at, _ in known], [value for _, value in known], "s--", color="#666666", label=label)
        axes.set(xlabel=table.axis, ylabel=metric, xscale="log" if max(x.values()) >= 8 * min(x.values()) else "linear")
        axes.set_xticks(sorted(x.values()), [f"{value:g}" for value in sorted(x.values())], minor=False)
        axes.minorticks_off()
    panels[0].legend(fontsize=7)
    save(figure, path, simulated)
    return True


def markdown(table, found: list, notes: list[str], picture: str) -> str:
    """The table as Markdown."""
    lines = [f"# Ablation: {table.title}", "", *(f"{note}\n" for note in notes)]
    lines += [f"![{table.title}]({picture})", ""] if picture else []
    for heading, header, rows, below in found:
        lines += [f"## {heading[0].upper()}{heading[1:]}", ""]
        lines += [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows]
        lines += ["", *(f"{note}\n" for note in below)]
    return "\n".join(lines).rstrip("\n") + "\n"


def web_page(table, found: list, notes: list[str], picture: Path | None) -> str:
    """The table as a page that needs nothing beside it."""
    parts = [f"<p>{html.escape(note)}</p>" for note in notes]
    if picture:
        parts.append(f'<img alt="{html.escape(table.title)}" src="data:image/png;base64,{_base64(picture)}">')
    for heading, header, rows, below in found:
        parts += [f"<h2>{html.escape(heading[0].upper() + heading[1:])}</h2>", "<table><thead><tr>"]
        parts += [f"<th>{html.escape(name)}</th>" for name in header]
        parts.append("</tr></thead><tbody>")
        for row in rows:
            kind = {OURS: "model", "paper": "small"}.get(row[1], "")
            parts.append(f'<tr class="{kind}">' + "".join(f"<td>{html.escape(text)}</td>" for text in row) + "</tr>")
        parts.append("</tbody></table>")
        parts += [f'<p class="small">{html.escape(note)}</p>' for note in below]
    return page(f"Ablation: {table.title}", "\n".join(parts))


def _base64(path: Path) -> str:
    return base64.b64encode(path.read_bytes()).decode()


def write(table, runs, folder: Path) -> list[Path]:
    """Write the table's files into a folder; returns their paths.

    Parameters
    ----------
    table
        `workflow.ablate.Table`.
    runs
        `workflow.ablate.Run`, all scored.
    """
    scores = gather(table, runs)
    kinds = [pd.read_csv(run.scores.parent / "notes.tsv", sep="\t", keep_default_na=False)["kind"] for run in runs]
    simulated = any((kind == "simulated").any() for kind in kinds)
    seeds = sorted({run.seed for run in runs})
    missing = [variant.name for variant in table.variants if variant.name not in {run.variant.name for run in runs}]
    notes = ["Accuracy / ARI of the spots tested, pooled over sections, mean over splits."]
    notes += [f"{len(seeds)} seed(s): {', '.join(map(str, seeds))}; ± is half the range over seeds, not an interval."]
    notes += [
        'Rows called "paper" are the paper\'s own figures, of its corpus and its six datasets; nothing here measured them.'
    ]
    notes += ["SIMULATED DATA: these figures say nothing of tissue."] if simulated else []
    notes += [f"Not built yet: {', '.join(missing)}."] if missing else []
    paths = [folder / f"{table.name}.{ending}" for ending in ("tsv", "md", "html", "png")]
    found = blocks(table, scores)
    drawn = curve(table, scores, paths[3], simulated)
    scores.to_csv(paths[0], sep="\t", index=False, float_format="%.6f", lineterminator="\n")
    paths[1].write_text(markdown(table, found, notes, paths[3].name if drawn else ""))
    paths[2].write_text(web_page(table, found, notes, paths[3] if drawn else None))
    return paths if drawn else paths[:3]
