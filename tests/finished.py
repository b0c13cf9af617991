"""A folder as a finished run leaves it, made of tiny simulated slices without running the pipeline."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.numpy import save_file

from tests.trainer import corpus
from workflow.assemble import COLUMNS, NOTES
from workflow.grid import make_grid, write_grid
from workflow.simulate import tiny_slice

SLICES = {"train0": "train", "train1": "train", "val0": "val", "test_a": "Tiny", "test_b": "Tiny"}
QUARANTINE = {
    "slice": "broken",
    "stage": "curate",
    "code": "not_counts",
    "file": "broken.h5ad",
    "found": "values with fractions, such as 0.693",
    "expected": "raw integer counts",
    "next_step": "give the raw counts",
}


def embeddings(slice_, noise: float, seed: int) -> dict[str, np.ndarray]:
    """The planted domain, one-hot, under noise."""
    codes = slice_.obs["label"].cat.codes.to_numpy()
    x = np.eye(codes.max() + 1)[codes] + noise * np.random.default_rng(seed).normal(size=(len(codes), codes.max() + 1))
    return {"X": x.astype(np.float32), "spot": np.arange(len(codes), dtype=np.int32)}


def write_table(path: Path, name: str, rows: list[dict], columns: list[str]) -> None:
    text = pd.DataFrame(rows, columns=columns).to_csv(sep="\t", index=False, lineterminator="\n")
    path.write_text(f"# stpatch {name} 1\n{text}")


def reconstructions() -> pd.DataFrame:
    """A table of rule reconstruct, made up: stpatch errs less than each control, the more so the less is hidden."""
    rng, rows = np.random.default_rng(0), []
    for section in ("pooled", "test_a", "test_b"):
        for method, error in (
            ("gene_mean", 0.9),
            ("mean_16", 0.8),
            ("kriging", 0.7),
            ("untrained", 0.85),
            ("stpatch", 0.6),
        ):
            for side, repeat in itertools.product((2, 4), range(4)):
                mse = error + 0.02 * side + 0.01 * rng.normal()
                values = {"mse": mse, "mae": mse / 2, "pearson": 1 - mse, "r2": 1 - mse / 0.9}
                rows += [
                    ("Tiny", section, method, f"window8_side{side}", "reconstruction", repeat, *value)
                    for value in values.items()
                ]
    return pd.DataFrame(rows, columns=COLUMNS)


def make(results: Path) -> None:
    """Everything below `results` that the rules which score and report read."""
    for folder in ("slices", "grids", "curate", "pretrain/model", "embeddings/stpatch", "embeddings/untrained"):
        (results / folder).mkdir(parents=True)
    gridded, rows = {}, []
    for seed, (name, split) in enumerate(SLICES.items()):
        slice_ = tiny_slice(seed=seed // 2, shape=(30, 60), n_genes=60, name=name)
        slice_.write_h5ad(results / f"slices/{name}.h5ad")
        grid = make_grid(slice_, "offset", 100)
        write_grid(grid, results / f"grids/{name}.zarr")
        gridded[name] = (np.moveaxis(grid.counts, -1, 0), grid.total_counts, grid.spot)
        told = {"slice": name, "dataset": "tiny", "split": split, "source": "simulated", "accession": "", "url": ""}
        rows.append({**told, "donor": "", "n_spots": slice_.n_obs})
        if split == "Tiny":
            for model, noise in (("stpatch", 0.3), ("untrained", 2.0)):
                about = {"format_version": "1", "slice": name, "model": model, "simulated": "true"}
                path = results / f"embeddings/{model}/{name}.safetensors"
                save_file(embeddings(slice_, noise, seed), path, metadata=about)

    write_table(results / "curate/admitted.tsv", "admitted", rows, list(rows[0]))
    write_table(results / "curate/quarantine.tsv", "quarantine", [QUARANTINE], list(QUARANTINE))
    write_table(results / "curate/duplicates.tsv", "duplicates", [], ["slice", "duplicate_of", "evidence"])
    write_table(results / "curate/notes.tsv", "notes", [], ["slice", "kind", "detail"])
    train = [gridded["train0"], gridded["train1"]]
    for split, slices in (("train", train), ("val", [gridded["val0"]])):
        genes_tsv = corpus.vocabulary(train)
        corpus.write_split(results / f"shards/{split}", split, slices, genes_tsv, n_windows=30, m=20, h=8, w=8)

    metrics = results / "metrics/Tiny"
    metrics.mkdir(parents=True)
    told = pd.DataFrame(
        [{"kind": "simulated", "section": name, "detail": "simulated slice"} for name in ("test_a", "test_b")]
    )
    told = told.reindex(columns=NOTES)
    for path, frame in (("reconstruct.tsv", reconstructions()), ("reconstruct.notes.tsv", told)):
        frame.to_csv(metrics / path, sep="\t", index=False, lineterminator="\n")

    steps = range(10, 1001, 10)
    lines = [{"kind": "train", "step": step, "loss": 0.5 + 0.3 * np.exp(-step / 200)} for step in steps]
    held_out = {"gene_mean_mse": 0.8, "n_windows": 30}
    lines += [
        {"kind": "val", "step": step, "masked_mse": 0.55 + 0.3 * np.exp(-step / 200)} | held_out
        for step in range(100, 1001, 100)
    ]
    model = results / "pretrain/model"
    (model / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (model / "config.json").write_text(json.dumps({"format_version": 1, "data": {"simulated": True}}))


SNAKEFILE = """
import os
import sys
from pathlib import Path

ROOT, RUN, DATASETS = Path({root!r}), "model", ["Empty", "Tiny"]
ROLES = [{{"slice": "test_a", "split": "Tiny", "source": {source!r}}}]

configfile: ROOT / "config.yaml"

pathvars:
    results=config["results"],

# Rule files and jobs find `workflow` here as they do below the repository's own Snakefile.
sys.path.insert(0, str(ROOT))
os.environ["PYTHONPATH"] = str(ROOT)

checkpoint admit:
    input:
        "made/admitted.tsv",
    output:
        admitted="<results>/curate/admitted.tsv",
    shell:
        "cp {{input}} {{output}}"

def admitted(*splits):
    lines = Path(checkpoints.admit.get().output.admitted).read_text().splitlines()[1:]
    rows = [dict(zip(lines[0].split("\\t"), line.split("\\t"))) for line in lines[1:]]
    return sorted({{row["slice"] for row in rows if not splits or row["split"] in splits}})

rule all:
    default_target: True
    input:
        "<results>/metrics/scores.tsv",
        "<results>/report.html",

include: ROOT / "rules/measured.smk"
include: ROOT / "rules/score.smk"
include: ROOT / "rules/cluster.smk"
include: ROOT / "rules/evaluate.smk"
include: ROOT / "rules/report.smk"
"""
