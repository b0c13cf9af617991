"""One row of docs/experiments.md: pretrain, embed two sections, probe them, and set them against the controls.

    python -m benchmarks.quality --results DIR --out DIR --seeds 0 1 2 3 4 -- --gene-embeddings components ...
    python -m benchmarks.quality --results DIR --out DIR --models seed0 seed1 ...

What stands behind ``--`` goes to ``trainer.pretrain``; ``--models`` takes finished model folders, one a seed, instead.
DIR of ``--results`` is the `results` folder of a corpus (docs/real-slices.md) with the whole slices of the sections
probed; their labels train no encoder. The same command goes on where it was stopped: a finished model and finished
embeddings are not made again. Tables for docs/experiments.md go to stdout; scores.tsv, comparisons.tsv, few.tsv and
notes.tsv to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from workflow import probes, protocols
from workflow.assemble import Notes, assemble, load
from workflow.controls import Section
from workflow.intervals import compare, seedless, split_suffix
from workflow.score import score

DATASET = "quality"  # splits are drawn by it
PROTOCOLS, HEADS = ["leave_section", "blocks"], ["knn", "logistic"]
AGAINST = ["neighbour_mean_18", "neighbour_mean_36", "untrained"]  # and the strongest control of all
METRICS = {"accuracy": "accuracy", "macro_f1": "macro F1", "ari": "ARI"}
N_SPLITS = 10  # of blocks
N_DRAWS = 10  # of few labels
ALL_GENES = 100_000  # more than any slice measured
SEED = 0  # of splits, draws and intervals: the same for every row


class Row(NamedTuple):
    """All that a row of the notebook measured."""

    scores: pd.DataFrame  # workflow.assemble.COLUMNS
    comparisons: pd.DataFrame  # workflow.intervals.COMPARISONS; the strongest control is that of the row's head
    few: pd.DataFrame  # likewise, protocol `few_{labels a class}`
    notes: pd.DataFrame  # workflow.assemble.NOTES


# Models and embeddings


def trainer(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", f"trainer.{module}", *map(str, arguments)], check=True, stdout=sys.stderr)


def pretrained(args: argparse.Namespace, seed: int) -> Path:
    """The model folder of a seed, pretrained unless it is finished."""
    if args.models:
        return args.models[seed]
    model = args.out / f"seed{seed}"
    if not (model / "model.safetensors").exists():
        trainer("pretrain", "--shards", args.results / "shards/train", "--out", model, "--seed", seed, *args.flags)
    return model


def embedded(args: argparse.Namespace, seed: int, model: Path, *control: str) -> list[Path]:
    """The sections' embeddings by a model (`control` is empty) or by its untrained self (``--untrained``)."""
    folder = (
        args.out / "embeddings" / "-".join([f"seed{seed}", str(args.genes), *(flag.strip("-") for flag in control)])
    )
    files = [folder / f"{name}.safetensors" for name in args.sections]
    made = (model / "model.safetensors").stat().st_mtime_ns
    due = [file.stem for file in files if not file.exists() or file.stat().st_mtime_ns < made]
    if due:
        tars = [args.results / f"shards/slices/{name}.tar" for name in due]
        trainer("embed", "--model", model, "--shards", *tars, "--out", folder, "--genes", args.genes, *control)
    return files


def pretraining(model: Path) -> tuple[float, float]:
    """Minutes of pretraining, and the last held-out MSE over that of the genes' training means (NaN without either)."""
    lines = [json.loads(line) for line in (model / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    seconds = [line["seconds"] for line in lines if "seconds" in line]
    held_out = [line["masked_mse"] / line["gene_mean_mse"] for line in lines if line["kind"] == "val"]
    return (seconds or [np.nan])[-1] / 60, (held_out or [np.nan])[-1]


def same_row(args: argparse.Namespace) -> None:
    """What stands in ``--out`` is of this row: it goes on, or the command ends and says why."""
    models = [str(model.resolve()) for model in args.models]
    row = {"results": str(args.results.resolve()), "flags": args.flags, "models": models}
    file = args.out / "row.json"
    if not file.exists():
        args.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(row, indent=2) + "\n", encoding="utf-8")
    elif (found := json.loads(file.read_text(encoding="utf-8"))) != row:
        sys.exit(f"error: {file} is of another row: {found}, not {row}; name another --out")


# Controls and probes


def few_labels(y: np.ndarray, of_section: np.ndarray, n: int, draw: int) -> Iterator[probes.Spots]:
    """For each section left out: up to n spots of each class of the other sections, and all spots of this one."""
    order = protocols.generator(SEED, DATASET, f"few_{n}", draw).permutation(len(y))
    for _, train, test in protocols.leave_section(of_section):
        others = order[np.isin(order, train)]
        nth = pd.Series(y[others]).groupby(y[others]).cumcount().to_numpy()
        yield np.sort(others[nth < n]), test


def best(comparisons: pd.DataFrame) -> pd.DataFrame:
    """Of each protocol, head and method the post-processing of the greatest accuracy; columns of `METRICS` and `base`."""
    rows = comparisons.query("compared == 'method' and section == 'pooled'")
    rows = rows.drop_duplicates(["protocol", "head", "method", "metric"])  # `majority` stands beside every head
    wide = rows.pivot(index=["protocol", "head", "method"], columns="metric", values="value").reset_index()
    wide["base"] = [split_suffix(method)[0] for method in wide["method"]]
    return wide.loc[wide.groupby(["protocol", "head", "base"])["accuracy"].idxmax()]


def measure_few(
    sections: list[Section],
    embeddings: dict[str, list[np.ndarray]],
    comparisons: pd.DataFrame,
    numbers: list[int],
    target_sum: float,
    notes: Notes,
) -> list[pd.DataFrame]:
    """Every method taught with few labels, and its comparisons; its post-processing is the best one with all labels."""
    data = assemble(sections, embeddings, target_sum, notes)
    first = np.cumsum([0, *(section.n_spots for section in sections)])
    cell = np.concatenate([protocols.cells(section.lattice, section.array, section.position) for section in sections])
    block = protocols.blocks_of(data.of_section, cell[first[data.of_section] + data.spot])
    fits = {
        n: [fit for draw in range(N_DRAWS) for fit in few_labels(data.y, data.of_section, n, draw)] for n in numbers
    }
    draw = np.repeat(np.arange(N_DRAWS), len(np.unique(data.of_section)))
    every = [fit for of in fits.values() for fit in of]
    chosen = best(comparisons).query("protocol == 'leave_section'")
    found = []
    for head in HEADS:
        predicted = {("majority", "none"): probes.majority(data.y, every)}
        methods = set(chosen[chosen["head"] == head]["method"])
        for method in (name for name in data.x if seedless(name) in methods):
            with warnings.catch_warnings():  # told by `converged`
                warnings.simplefilter("ignore", ConvergenceWarning)
                made = predicted[method, head] = probes.HEADS[head](data.x[method], data.y, every)
            if stopped := sum(not one.converged for one in made):
                notes.add(
                    "not_converged", protocol="few", method=method, head=head, detail=f"{stopped} of {len(made)} fits"
                )
        print(f"few labels, {head}: {len(predicted)} methods, {len(every)} fits each", file=sys.stderr, flush=True)
        for number, (n, of) in enumerate(fits.items()):
            own = slice(number * len(of), (number + 1) * len(of))
            runs = {
                key: [
                    (split, test, one.classes) for split, ((_, test), one) in enumerate(zip(of, made[own], strict=True))
                ]
                for key, made in predicted.items()
            }
            settings = {"sections": [section.name for section in sections], "draw": draw, "against": AGAINST}
            found.append(compare(DATASET, f"few_{n}", runs, data.y, data.of_section, block, seed=SEED, **settings))
    return found


def measure(
    sections: list[Section],
    embeddings: dict[str, list[np.ndarray]],
    numbers: list[int],
    target_sum: float,
    *,
    notes: Notes | None = None,
    threads: int = 1,
) -> Row:
    """Embeddings and controls through all probes.

    Parameters
    ----------
    sections, embeddings, notes
        As by `workflow.assemble.load`; embeddings of `stpatch_seed{k}` and `untrained_seed{k}`.
    numbers
        Labelled spots of a class of the protocols of few labels.
    """
    notes = notes or Notes()
    settings = {"protocol_names": PROTOCOLS, "n_splits": N_SPLITS, "window": (16, 16), "seed": SEED}
    settings |= {"target_sum": target_sum, "threads": threads, "notes": notes, "against": AGAINST}
    # A head at a time: either side's best is then its best under this head.
    scored = [score(DATASET, sections, embeddings, heads=[head], **settings) for head in HEADS]
    comparisons = pd.concat([one.comparisons for one in scored])
    few = [pd.DataFrame(columns=comparisons.columns)]
    if numbers and len(comparisons):
        few = measure_few(sections, embeddings, comparisons, numbers, target_sum, notes)
    scores = pd.concat([one.scores for one in scored]).drop_duplicates()
    return Row(scores, comparisons, pd.concat(few), notes.frame().drop_duplicates())


# Tables


def short(value: float, sign: str = "") -> str:
    """`.812`, `-.004`; with the sign `+` also `+.012`."""
    return re.sub(r"\b0\.", ".", f"{value:{sign}.3f}")


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    columns = list(columns)
    lines = ["| " + " | ".join(line) + " |" for line in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def table_of_methods(comparisons: pd.DataFrame) -> str:
    """A row a method: accuracy / macro F1 / ARI of its best post-processing, by protocol and head."""
    found = best(comparisons).set_index(["base", "protocol", "head"])
    columns = [(protocol, head) for protocol in dict.fromkeys(comparisons["protocol"]) for head in HEADS]

    def cell(base: str, protocol: str, head: str) -> str:
        row = found.loc[base, protocol, head if (base, protocol, head) in found.index else "none"]
        return " / ".join(short(row[metric]) for metric in METRICS) + " " + split_suffix(row["method"])[1]

    order = found.groupby("base")["accuracy"].mean().sort_values(ascending=False, kind="stable").index
    rows = [[base, *(cell(base, *column).strip() for column in columns)] for base in order]
    return table(["method", *(f"{protocol}, {head}" for protocol, head in columns)], rows)


def table_of_seeds(row: Row, facts: dict[str, tuple[float, float]]) -> str:
    """A row a seed, then mean and half range: minutes, held-out error, accuracy / macro F1 / ARI at their best."""
    chosen = best(row.comparisons).query("base == 'stpatch'").sort_values(["protocol", "head"], ascending=[False, True])
    by_split = row.scores.query("section == 'pooled'").groupby(["protocol", "head", "method", "metric"])["value"].mean()
    columns = [np.array([list(of)]).T for of in zip(*facts.values(), strict=True)]  # [seeds, figures of a cell]
    names = ["minutes", "held-out MSE / gene mean"]
    for protocol, head, method in chosen[["protocol", "head", "method"]].itertuples(index=False):
        of_seed = [seed + split_suffix(method)[1] for seed in facts]
        columns.append(np.array([[by_split[protocol, head, of, metric] for metric in METRICS] for of in of_seed]))
        names.append(f"{protocol}, {head}")
    rows = [
        [seed.removeprefix("stpatch_seed"), *(" / ".join(map(short, column[number])) for column in columns)]
        for number, seed in enumerate(facts)
    ]
    spread = [zip(column.mean(axis=0), np.ptp(column, axis=0) / 2, strict=True) for column in columns]
    rows.append(["mean", *(" / ".join(f"{short(mean)} ± {short(half)}" for mean, half in cell) for cell in spread)])
    return table(["seed", *names], rows)


def table_of_differences(comparisons: pd.DataFrame) -> str:
    """stpatch less each rival, either at its best, with the 95% interval; bold where the interval lies above 0."""
    chosen = comparisons.query("compared in ('against', 'best') and section == 'pooled'")
    base = chosen["control"].map(lambda method: split_suffix(method)[0])
    chosen = chosen.assign(rival=base.where(chosen["compared"] == "against", "strongest control"))
    rows = []
    for protocol in dict.fromkeys(chosen["protocol"]):
        for head in HEADS:
            for rival in (*AGAINST, "strongest control"):
                found = chosen.query("protocol == @protocol and head == @head and rival == @rival").set_index("metric")
                name = rival if rival in AGAINST else f"{rival} ({found.loc['accuracy', 'control']})"
                rows.append([protocol, head, name, *(_difference(found.loc[metric]) for metric in METRICS)])
    return table(["protocol", "head", "stpatch less", *METRICS.values()], rows)


def _difference(row: pd.Series) -> str:
    text = f"{short(row['difference'], '+')} [{short(row['low'], '+')}, {short(row['high'], '+')}]"
    return f"**{text}**" if row["low"] > 0 else text


def table_of_few(few: pd.DataFrame) -> str:
    """stpatch, the controls of `AGAINST` and the strongest one with few labels, means and 95% intervals over draws and blocks."""
    rows = []
    plain = few.query("compared == 'method' and section == 'pooled'")
    for protocol in dict.fromkeys(plain["protocol"]):
        for head in HEADS:
            of_head = plain.query("protocol == @protocol and head == @head")
            strongest = of_head[of_head["metric"] == "accuracy"]["control"].iloc[0]
            for method in dict.fromkeys(of_head["method"]):
                if split_suffix(method)[0] in {"stpatch", *AGAINST} or method == strongest:
                    found = of_head[of_head["method"] == method].set_index("metric")
                    cells = [_with_interval(found.loc[metric]) for metric in METRICS]
                    rows.append([protocol.removeprefix("few_"), head, method, *cells])
    return table(["labels a class", "head", "method", *METRICS.values()], rows)


def _with_interval(row: pd.Series) -> str:
    return f"{short(row['value'])} [{short(row['value_low'])}, {short(row['value_high'])}]"


def tables(row: Row, facts: dict[str, tuple[float, float]], *, bare: bool = False) -> str:
    """What goes into docs/experiments.md; `facts` are `pretraining` of each seed's method."""
    of = " (simulated)" if "simulated" in set(row.notes["kind"]) else ""
    found = [f"Accuracy / macro F1 / ARI{of}", table_of_methods(row.comparisons)]
    if not bare:
        found += [f"Seeds{of}", table_of_seeds(row, facts)]
        found += [f"Differences and their 95% intervals{of}", table_of_differences(row.comparisons)]
        if len(row.few):
            found += [f"Few labels{of}", table_of_few(row.few)]
            found += [f"Few labels, differences{of}", table_of_differences(row.few)]
    return "\n\n".join(found)


def write(row: Row, out: Path) -> None:
    """A TSV a table; a few.tsv that stands is not overwritten by a run without few labels."""
    for name, frame in row._asdict().items():
        if name == "few" and not len(frame):
            continue
        frame.to_csv(out / f"{name}.tsv", sep="\t", index=False, lineterminator="\n", float_format="%.6f")


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="models, embeddings and tables of this row alone")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--models", type=Path, nargs="+", default=[], help="finished model folders, one a seed")
    parser.add_argument("--genes", type=int, default=ALL_GENES, help="genes a site shows when embedding (default: all)")
    parser.add_argument("--sections", nargs="+", default=["dlpfc_151673", "dlpfc_151674"], help="two or more")
    parser.add_argument("--few", type=int, nargs="*", default=[10, 25, 50, 100], help="labelled spots of a class")
    parser.add_argument("--bare", action="store_true", help="only the table of the probes")
    parser.add_argument("--threads", type=int, default=1, help="methods probed at a time; changes no result")
    parser.add_argument("flags", nargs="*", help="of trainer.pretrain, behind --")
    args = parser.parse_args(argv)
    args.sections = sorted(set(args.sections))  # as workflow.assemble wants them
    if len(args.sections) < 2:
        parser.error("--sections: two at least, one is tested by what the others taught")
    if args.models and args.flags:
        parser.error(f"--models are finished: {' '.join(args.flags)} would change nothing")
    for model in args.models:
        if not (model / "model.safetensors").exists():
            parser.error(f"--models: {model} has no model.safetensors")
    if args.models:
        args.seeds = list(range(len(args.models)))
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    same_row(args)
    files, facts = {}, {}
    for seed in args.seeds:
        model = pretrained(args, seed)
        facts[f"stpatch_seed{seed}"] = pretraining(model)
        files[f"stpatch_seed{seed}"] = embedded(args, seed, model)
        files[f"untrained_seed{seed}"] = embedded(args, seed, model, "--untrained")
    target_sum = json.loads((model / "config.json").read_text(encoding="utf-8"))["data"]["target_sum"]
    with threadpool_limits(limits=1):  # sums in the same order on any machine
        slices = [args.results / f"slices/{name}.h5ad" for name in args.sections]
        sections, embeddings, notes = load(slices, files)
        numbers = [] if args.bare else args.few
        row = measure(sections, embeddings, numbers, target_sum, notes=notes, threads=args.threads)
    write(row, args.out)
    if not len(row.comparisons):
        sys.exit(f"error: no spot of {', '.join(args.sections)} has a label: nothing to score")
    print(tables(row, facts, bare=args.bare))


if __name__ == "__main__":
    main()
