"""Windows read back from the shards by their index (docs/format.md), for the report's pictures."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from workflow.codec import decode


class Window(NamedTuple):
    """One drawn window: m genes, h x w cells."""

    y: int
    x: int
    counts: np.ndarray  # uint16 [m, h, w]
    totals: np.ndarray  # float32 [h, w], 0 where nothing was observed
    gene_ids: np.ndarray  # str [m]
    symbols: np.ndarray  # str [m]


def read_index(path: str | Path) -> tuple[dict, np.ndarray]:
    """`index.json` and its samples, as docs/format.md has them."""
    index = json.loads(Path(path).read_text())
    if index["format_version"] != 1:
        raise ValueError(f"{path}: found format_version {index['format_version']}; expected 1. Next step: rebuild it.")
    return index, np.load(Path(path).parent / index["samples"]["file"], allow_pickle=False)


def origins(path: str | Path) -> Iterator[tuple[str, np.ndarray]]:
    """Slice by slice, in the index's order, the origins (y, x) of all its windows, int [n_windows, 2]."""
    index, samples = read_index(path)
    found = [[] for _ in index["slices"]]
    for shard, entry in enumerate(index["shards"]):
        tar = np.memmap(Path(path).parent / entry["name"], dtype=np.uint8, mode="r")
        for sample in samples[samples["shard"] == shard]:
            about = json.loads(_member(tar, sample, "json"))
            found[sample["slice"]].append((about["y"], about["x"]))
    for entry, places in zip(index["slices"], found, strict=True):
        yield entry["slice"], np.array(places, dtype=np.int64).reshape(-1, 2)


def first_window(path: str | Path, name: str) -> Window:
    """Window 0 of the slice, exactly as a training run reads it."""
    index, samples = read_index(path)
    folder, row = Path(path).parent, [entry["slice"] for entry in index["slices"]].index(name)
    sample = samples[(samples["slice"] == row) & (samples["window"] == 0)][0]
    tar = np.memmap(folder / index["shards"][sample["shard"]]["name"], dtype=np.uint8, mode="r")
    parts = (_member(tar, sample, part) for part in ("counts", "sites", "json"))
    counts, genes, totals, about = decode(*parts)
    vocabulary = pd.read_csv(folder / index["genes"]["file"], sep="\t", comment="#", keep_default_na=False)
    ids, symbols = (vocabulary[column].to_numpy(dtype=object)[genes] for column in ("gene_id", "symbol"))
    return Window(about["y"], about["x"], counts, totals, ids, symbols)


def _member(tar: np.ndarray, sample: np.void, name: str) -> bytes:
    start = int(sample[f"{name}_offset"])
    return tar[start : start + int(sample[f"{name}_nbytes"])].tobytes()
