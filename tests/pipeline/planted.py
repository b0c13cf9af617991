"""Corpora with a planted answer, from counts to probes, by the stages' own functions and the trainer's commands. All simulated.

`python -m tests.pipeline.planted KIND SEED` prints one comparison, for docs/evaluation.md.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from tests.conftest import ROOT
from workflow import probes, protocols
from workflow.assemble import Assembled, Notes, assemble, load
from workflow.components import principal_axes, sample_spots, write_components
from workflow.grid import Grid, make_grid
from workflow.intervals import compare
from workflow.keys import Keys
from workflow.moments import moments
from workflow.sample import Field
from workflow.shards import write_shards
from workflow.simulate import tiny_slice
from workflow.stats import merge_moments, write_vocabulary
from workflow.whole import whole_slice
from workflow.windows import write_pack

WINDOW = (8, 8)
N_SECTIONS, N_SPLITS = 3, 5
SETTINGS = {
    "layout": "auto", "pitch_um": 100, "window": list(WINDOW), "genes": 48, "windows_per_slice": 400,
    "selection": "weighted", "epsilon": 1e-6, "min_observed": 0.5, "target_sum": 10000, "codec": "lz4", "shard_mb": 16,
    "seed": 0, "allow_contamination": False,
}  # fmt: skip
DEPTH = {"arrangement": 100.0, "marker": 400.0, "permuted": 400.0}  # median counts of a spot, of 60 genes
STEPS = {"arrangement": 1000, "marker": 250, "permuted": 250}
# One budget for every unit. Sites are hidden whole, so that their surroundings must be used.
FLAGS = (
    "--width 48 --depth 2 --heads 4 --feed-forward 96 --decoder-width 32 --decoder-depth 1 --positions relative "
    "--inputs centred --gene-embeddings components --mask-ratio 0.3 --mask-sites 0.5 --optimizer adamw --lr 3e-3 "
    "--warmup 30 --clip 1 --batch-size 16 --val-every 10000 --val-samples 32 --log-every 10000 --device cpu"
)


@dataclass
class Corpus:
    """Slices of one kind: `train` for the model, `sections` to be probed, of other draws."""

    folder: Path
    train: list[str]
    sections: list[str]


def write_corpus(folder: Path, kind: str, seed: int = 0) -> Corpus:
    """Shards of some slices, and others whole; none is labelled for the trainer."""
    train, sections = ([f"{role}{number}" for number in range(N_SECTIONS)] for role in ("train", "eval"))
    grids: dict[str, Grid] = {}
    symbols: dict[str, pd.Series] = {}
    for number, name in enumerate((*train, *sections)):
        made = tiny_slice(
            seed=1000 * seed + number, shape=(48, 96), n_domains=2, median_depth=DEPTH[kind], holes=False, name=name, planted=kind
        )  # fmt: skip
        grids[name], symbols[name] = make_grid(made, "auto", 100), made.var[Keys.SYMBOL]
        made.write_h5ad(folder / f"{name}.h5ad")
    target_sum, genes = SETTINGS["target_sum"], folder / "genes.tsv"
    vocabulary = merge_moments(
        {"gene_ids": grids[name].gene_ids, "symbols": symbols[name].to_numpy(), **moments(grids[name], target_sum)}
        for name in train
    )
    write_vocabulary(vocabulary, genes)
    genes_sha256 = hashlib.sha256(genes.read_bytes()).hexdigest()
    samples = [sample_spots(grids[name], vocabulary.gene_id, 500, target_sum=target_sum, seed=0) for name in train]
    axes = principal_axes(samples, vocabulary.mean, 16)
    write_components(folder / "components.safetensors", *axes, vocabulary.variance.astype(np.float32), genes_sha256)
    packs = []
    for name in train:
        packs.append((folder / f"{name}.bin", folder / f"{name}.npy"))
        write_pack(
            Field(grids[name], vocabulary.gene_id, WINDOW, target_sum), {"pitch_um": 100.0, "layout": "offset"}, *packs[-1],
            n=SETTINGS["windows_per_slice"], m=SETTINGS["genes"], codec_name="lz4",
            **{key: SETTINGS[key] for key in ("selection", "epsilon", "min_observed", "seed")},
        )  # fmt: skip
    rows = [{"slice": name, "source": "simulated", "organism": "human", "donor": name} for name in train]
    write_shards(
        folder / "shards/train", packs, genes, split="train", rows=rows, settings=SETTINGS,
        components=folder / "components.safetensors",
    )  # fmt: skip
    for name in sections:
        content = whole_slice(
            grids[name], vocabulary.gene_id, genes_sha256=genes_sha256, target_sum=target_sum, codec_name="lz4", simulated=True
        )  # fmt: skip
        (folder / f"{name}.tar").write_bytes(content)
    return Corpus(folder, train, sections)


def _trainer(*arguments: object) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", *map(str, arguments)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def embeddings(corpus: Corpus, unit: str, steps: int, seed: int = 0) -> dict[str, list[Path]]:
    """Files of the sections' embeddings by a model pretrained with this unit, and by the same before its first step."""
    model = corpus.folder / unit
    arguments = ["--shards", corpus.folder / "shards/train", "--out", model, "--unit", unit, "--steps", steps]
    _trainer("trainer.pretrain", *arguments, "--seed", seed, *FLAGS.split())
    found = {}
    for name, flags in {unit: [], f"untrained_{unit}": ["--untrained"]}.items():
        out = corpus.folder / f"embeddings/{name}"
        tars = [corpus.folder / f"{section}.tar" for section in corpus.sections]
        _trainer("trainer.embed", "--model", model, "--shards", *tars, "--out", out, "--genes", 60, *flags)
        found[name] = [out / f"{section}.safetensors" for section in corpus.sections]
    return found


@dataclass
class Probed:
    """Predictions of every method under `blocks` and `blocks_buffered`, and what `workflow.intervals.compare` asks for."""

    data: Assembled
    block: np.ndarray
    runs: dict[str, dict[tuple[str, str], list]]  # protocol -> (method, head) -> (split, test, predicted)

    def accuracy(self, protocol: str, method: str, head: str) -> float:
        """Mean over splits."""
        return float(
            np.mean([np.mean(self.data.y[test] == found) for _, test, found in self.runs[protocol][method, head]])
        )

    def lead(self, protocol: str, one: tuple[str, str], other: tuple[str, str]) -> pd.Series:
        """Accuracy of one method less that of another: `difference`, `low`, `high` over blocks of tissue."""
        runs = self.runs[protocol]
        pair = {("stpatch", "one"): runs[one], ("rival", "other"): runs[other]}
        names = [section.name for section in self.data.sections]
        table = compare("planted", protocol, pair, self.data.y, self.data.of_section, self.block, sections=names)
        rows = table[(table["section"] == "pooled") & (table["metric"] == "accuracy") & (table["compared"] == "method")]
        return rows[rows["method"] == "stpatch"].iloc[0]


def probe(corpus: Corpus, embedded: dict[str, list[Path]], methods: list[str], heads: list[str]) -> Probed:
    """Fit the heads on each of `methods` (and `majority`) with whole blocks of tissue left out."""
    slices = [corpus.folder / f"{name}.h5ad" for name in corpus.sections]
    data = assemble(*load(slices, embedded)[:2], SETTINGS["target_sum"], Notes())
    cell = protocols.cells("staggered", data.array, data.array)
    block = protocols.blocks_of(data.of_section, cell)
    splits = list(protocols.blocks(block, N_SPLITS, 0, "planted"))
    buffered = list(protocols.buffered(splits, data.of_section, cell, WINDOW))
    fits = [(train, test) for _, train, test in splits]
    predicted = {("majority", "none"): probes.majority(data.y, fits)}
    for method in methods:
        predicted |= {(method, head): probes.HEADS[head](data.x[method], data.y, fits) for head in heads}
    runs = {"blocks": {}, "blocks_buffered": {}}
    for key, found in predicted.items():
        pairs = list(zip(splits, buffered, found, strict=True))
        runs["blocks"][key] = [(split, test, made.classes) for (split, _, test), _, made in pairs]
        runs["blocks_buffered"][key] = [
            (split, kept, made.classes[np.searchsorted(test, kept)]) for (split, _, test), (_, _, kept), made in pairs
        ]
    return Probed(data, block, runs)


def compared(folder: Path, kind: str, seed: int = 0) -> Probed:
    """Patch and spot, pretrained alike on one corpus, beside controls."""
    corpus = write_corpus(folder, kind, seed)
    embedded = embeddings(corpus, "patch", STEPS[kind], seed) | embeddings(corpus, "spot", STEPS[kind], seed)
    methods = ["raw", "pca", "neighbour_mean_6", "neighbour_mean_18", "neighbour_mean_36", "coordinates", *embedded]
    return probe(corpus, embedded, methods, ["knn", "logistic"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        result = compared(Path(temporary), sys.argv[1], int(sys.argv[2]))
    for protocol, runs in result.runs.items():
        for method, head in runs:
            print(f"{protocol}\t{method}\t{head}\t{result.accuracy(protocol, method, head):.3f}")
        for head in ("knn", "logistic"):
            lead = result.lead(protocol, ("patch", head), ("spot", head))
            print(
                f"{protocol}\tpatch - spot\t{head}\t{lead['difference']:+.3f} [{lead['low']:+.3f}, {lead['high']:+.3f}]"
            )
