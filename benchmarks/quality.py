"""One row of docs/experiments.md: pretrain, judge the held-out windows, embed two sections and probe them.

python -m benchmarks.quality --results DIR --out DIR --seeds 0 1 [--genes 2048] -- --gene-embeddings components ...

What stands behind ``--`` goes to ``trainer.pretrain``. DIR is the `results` folder of a corpus (docs/real-slices.md)
with the whole slices of the sections probed. Prints, for each seed and as mean and half range: held-out masked MSE over
that of the gene means, and accuracy / ARI of a logistic head, each section tested by what the others taught. Labels
train no encoder.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
from safetensors import safe_open

from workflow.keys import Keys
from workflow.probes import logistic, metrics
from workflow.protocols import leave_section


def trainer(module: str, *arguments: object) -> None:
    subprocess.run([sys.executable, "-m", f"trainer.{module}", *map(str, arguments)], check=True, stdout=sys.stderr)


def probe(results: Path, embeddings: Path, sections: list[str]) -> tuple[float, float]:
    """Accuracy and ARI of all labelled spots, pooled."""
    features, labels = [], []
    for name in sections:
        with safe_open(embeddings / f"{name}.safetensors", "np") as opened:
            features.append(opened.get_tensor("X"))
        labels.append(anndata.read_h5ad(results / f"slices/{name}.h5ad", backed="r").obs[Keys.LABEL])
    section = np.repeat(np.arange(len(sections)), [len(label) for label in labels])
    label = np.concatenate([label.astype(object).to_numpy() for label in labels])
    known = np.array([isinstance(value, str) for value in label])
    x, section = np.concatenate(features)[known], section[known]
    y = np.unique(label[known].astype(str), return_inverse=True)[1]
    predicted = np.empty_like(y)
    splits = [(train, test) for _, train, test in leave_section(section)]
    for (_, test), prediction in zip(splits, logistic(x, y, splits), strict=True):
        predicted[test] = prediction.classes
    scores = metrics(y, predicted)
    return scores["accuracy"], scores["ari"]


def run(args: argparse.Namespace, seed: int) -> list[float]:
    """Held-out ratio, accuracy, ARI of every number of genes, and minutes of pretraining."""
    model, began = args.out / f"seed{seed}", time.perf_counter()
    trainer("pretrain", "--shards", args.results / "shards/train", "--out", model, "--seed", seed, *args.flags)
    minutes = (time.perf_counter() - began) / 60
    lines = [json.loads(line) for line in (model / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "val"][-1]
    row = [last["masked_mse"] / last["gene_mean_mse"]]
    for genes in args.genes:
        out, tars = args.out / f"seed{seed}-{genes}", [args.results / f"shards/slices/{s}.tar" for s in args.sections]
        trainer("embed", "--model", model, "--shards", *tars, "--out", out, "--genes", genes)
        row += probe(args.results, out, args.sections)
    return [*row, minutes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--genes", type=int, nargs="+", default=[512], help="genes that a site shows when embedding")
    parser.add_argument("--sections", nargs="+", default=["dlpfc_151673", "dlpfc_151674"])
    parser.add_argument("flags", nargs="*")
    args = parser.parse_args()
    rows = np.array([run(args, seed) for seed in args.seeds])
    columns = ["held-out MSE / gene mean"]
    columns += [f"{metric} ({genes} genes)" for genes in args.genes for metric in ("accuracy", "ARI")] + ["minutes"]
    print(f"| seed | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for seed, row in zip(args.seeds, rows, strict=True):
        print(f"| {seed} | " + " | ".join(f"{value:.3f}" for value in row) + " |")
    half = np.ptp(rows, axis=0) / 2
    print("| mean | " + " | ".join(f"{a:.3f} ± {b:.3f}" for a, b in zip(rows.mean(0), half, strict=True)) + " |")


if __name__ == "__main__":
    main()
