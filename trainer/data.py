"""The reader: a folder of shards -> batches of raw counts in a reproducible order (docs/format.md, shards).

The tars are memory-mapped and read through ``samples.npy``, so any sample can be reached at once; what is here knows
nothing of tar. The order of an epoch is a pure function of (seed, epoch), and the reader's whole state is one integer:
the samples consumed so far.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import mmap
import struct
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numcodecs.blosc
import numpy as np
import torch
from torch import Tensor

from trainer.errors import DamagedShards, VocabularyMismatch
from trainer.files import sha256

FORMAT_VERSION = 1  # of shards, whole slices and the vocabulary
SAMPLE = np.dtype(
    [("shard", "<u4"), ("slice", "<u4"), ("window", "<u4")]
    + [("counts_offset", "<u8"), ("counts_nbytes", "<u4")]
    + [("sites_offset", "<u8"), ("sites_nbytes", "<u4")]
    + [("json_offset", "<u8"), ("json_nbytes", "<u4")]
)
# Keys of the index that the model folder repeats, and those of each of its slices.
FACTS = (
    *("m", "h", "w", "target_sum", "layout", "pitch_um", "selection"),
    *("allow_contamination", "simulated", "n_samples"),
)
SLICE_FACTS = ("slice", "source", "organism", "donor", "layout", "pitch_um", "n_windows")
REBUILD = "rebuild the shards (delete the folder, run `snakemake data`)"

# Blosc's own threads share one context; without it each of our decoding threads has its own and releases the lock.
numcodecs.blosc.use_threads = False


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Row number = gene index = row of the model's embedding."""

    gene_ids: list[str]
    mean: np.ndarray  # float64 [n_genes]: mean normalised expression over the training slices' observed spots
    sha256: str

    @classmethod
    def read(cls, file: Path) -> Vocabulary:
        """Read ``genes.tsv``; raises DamagedShards where it is not one of version 1."""
        if not file.is_file():
            raise DamagedShards(file, found="no such file", expected="the vocabulary", next_step=REBUILD)
        with open(file, newline="", encoding="utf-8") as table:
            version = table.readline().rstrip("\n")
            rows = list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))
        if version != f"# stpatch genes {FORMAT_VERSION}":
            expected = f"'# stpatch genes {FORMAT_VERSION}'"
            raise DamagedShards(file, found=f"first line {version!r}", expected=expected, next_step=REBUILD)
        if [row["index"] for row in rows] != [str(i) for i in range(len(rows))]:
            raise DamagedShards(file, found="gaps in `index`", expected="0, 1, 2, ...", next_step=REBUILD)
        return cls([row["gene_id"] for row in rows], np.array([float(row["mean"]) for row in rows]), sha256(file))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples as they are stored; normalising and masking wait until they are on the device."""

    counts: Tensor  # uint16 [B, m, h, w]
    genes: Tensor  # int32 [B, m]: rows of the vocabulary, ascending
    totals: Tensor  # float32 [B, h, w]: 0 where nothing was observed
    positions: Tensor  # int64 [B]: place of each sample in the epoch's order
    epoch: int

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device. From pinned memory, since other copies wait for all that a GPU has queued."""
        pinned = device.type == "cuda"
        tensors = (self.counts, self.genes, self.totals, self.positions)
        moved = [(t.pin_memory() if pinned else t).to(device, non_blocking=pinned) for t in tensors]
        return Batch(*moved, self.epoch)


class Shards:
    """One split's folder of shards, checked against its index when it is opened.

    Raises
    ------
    DamagedShards
        Names the file that is missing, cut, exchanged, of another version, or that does not hash to what the index
        recorded. (The tars themselves, which may be large, are checked by size and by one sample each.)
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = index = _read_index(self.folder / "index.json")
        self.m, self.h, self.w = index["m"], index["h"], index["w"]
        for part in ("genes", "samples"):
            file = self.folder / index[part]["file"]
            found = sha256(file) if file.is_file() else "no such file"
            if found != index[part]["sha256"]:
                expected = f"sha256 {index[part]['sha256']} (index.json)"
                raise DamagedShards(file, found=found, expected=expected, next_step=REBUILD)
        self.vocabulary = Vocabulary.read(self.folder / index["genes"]["file"])
        self.samples = self._read_samples(self.folder / index["samples"]["file"])
        self.names = [shard["name"] for shard in index["shards"]]
        self.tars = [self._map(row, shard) for row, shard in enumerate(index["shards"])]

    def __len__(self) -> int:
        return len(self.samples)

    def batches(self, batch_size: int, seed: int, consumed: int = 0, workers: int = 1) -> Iterator[Batch]:
        """Batches without end, from the state ``consumed`` on, decoded ahead by ``workers`` threads.

        A batch never straddles two epochs: the last one of an epoch is smaller where the batch size does not divide
        the number of samples.
        """
        plan = self._plan(batch_size, seed, consumed)
        with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
            ahead = deque(pool.submit(self.read, *next(plan)) for _ in range(2 * workers))
            while True:
                batch = ahead.popleft().result()
                ahead.append(pool.submit(self.read, *next(plan)))
                yield batch

    def _plan(self, batch_size: int, seed: int, consumed: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        epoch, start = divmod(consumed, len(self))
        while True:
            rows = order(len(self), seed, epoch)
            for begin in range(start, len(self), batch_size):
                positions = np.arange(begin, min(begin + batch_size, len(self)))
                yield rows[positions], positions, epoch
            epoch, start = epoch + 1, 0

    def read(self, rows: np.ndarray, positions: np.ndarray, epoch: int) -> Batch:
        """Decode the samples of these rows of ``samples.npy``."""
        n = len(rows)
        counts = np.empty((n, self.m, self.h, self.w), "<u2")
        genes = np.empty((n, self.m), "<i4")
        totals = np.empty((n, self.h, self.w), "<f4")
        for i, row in enumerate(rows):
            self.read_into(int(row), counts[i], genes[i], totals[i])
        tensors = [torch.from_numpy(array) for array in (counts, genes, totals, np.asarray(positions, np.int64))]
        return Batch(*tensors, epoch)

    def read_into(self, row: int, counts: np.ndarray, genes: np.ndarray, totals: np.ndarray) -> None:
        """Decode one sample into arrays of its shape: uint16 [m, h, w], int32 [m], float32 [h, w]."""
        sample = self.samples[row]
        where = f"{self.folder / self.names[sample['shard']]}, sample {row}"
        counts[:] = decode(self._member(sample, "counts"), "<u2", counts.size, where).reshape(counts.shape)
        sites = decode(self._member(sample, "sites"), "<i4", genes.size + totals.size, where)
        genes[:] = sites[: genes.size]
        totals[:] = sites[genes.size :].view("<f4").reshape(totals.shape)
        check_genes(genes, len(self.vocabulary.gene_ids), where)

    def facts(self) -> dict[str, object]:
        """What the model folder records of its data."""
        facts = {name: self.index[name] for name in FACTS}
        facts["genes"] = {"n": len(self.vocabulary.gene_ids), "sha256": self.vocabulary.sha256}
        return facts | {"slices": self.index["slices"]}

    def check_matches(self, other: Shards) -> None:
        """Raise VocabularyMismatch unless both splits use one vocabulary, window and normalisation."""
        for name in ("m", "h", "w", "target_sum", "genes"):
            mine, theirs = self.facts()[name], other.facts()[name]
            if mine != theirs:
                file = other.folder / "index.json"
                expected = f"{mine} as in {self.folder / 'index.json'}"
                raise VocabularyMismatch(file, found=f"{name} = {theirs}", expected=expected, next_step=REBUILD)

    def _member(self, sample: np.void, member: str) -> memoryview:
        offset, nbytes = int(sample[f"{member}_offset"]), int(sample[f"{member}_nbytes"])
        return memoryview(self.tars[sample["shard"]])[offset : offset + nbytes]

    def _read_samples(self, file: Path) -> np.ndarray:
        try:
            samples = np.load(file, allow_pickle=False)
        except ValueError as error:
            raise DamagedShards(file, found=str(error), expected="a plain array", next_step=REBUILD) from error
        if samples.dtype != SAMPLE:
            raise DamagedShards(file, found=str(samples.dtype), expected=str(SAMPLE), next_step=REBUILD)
        promised = [shard["samples"] for shard in self.index["shards"]]
        found = np.bincount(samples["shard"], minlength=len(promised)).tolist()
        if found != promised or len(samples) != self.index["n_samples"]:
            expected = f"{self.index['n_samples']} samples, {promised} by shard (index.json)"
            found = f"{len(samples)} samples, {found} by shard"
            raise DamagedShards(file, found=found, expected=expected, next_step=REBUILD)
        return samples

    def _map(self, row: int, shard: dict) -> mmap.mmap:
        """Map a tar; its size and the name in its first sample must be those recorded."""
        file = self.folder / shard["name"]
        found = file.stat().st_size if file.is_file() else "no such file"
        if found != shard["bytes"]:
            expected = f"{shard['bytes']} bytes (index.json)"
            raise DamagedShards(file, found=f"{found} bytes", expected=expected, next_step=REBUILD)
        with open(file, "rb") as opened:
            tar = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        first = self.samples[np.flatnonzero(self.samples["shard"] == row)[0]]
        begin, nbytes = int(first["json_offset"]), int(first["json_nbytes"])
        expected = [self.index["slices"][first["slice"]]["slice"], int(first["window"])]
        try:
            facts = json.loads(tar[begin : begin + nbytes])
            found = [facts["slice"], facts["window"]]
        except (ValueError, KeyError):
            found = f"{nbytes} bytes that are not a sample's JSON at {begin}"
        if found != expected:
            raise DamagedShards(file, found=str(found), expected=f"{expected} (samples.npy)", next_step=REBUILD)
        return tar


def order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of ``n`` samples in an epoch, int64 [n]: raw Philox words, whose stream numpy promises to keep, sorted."""
    return np.random.Philox(key=[seed, epoch]).random_raw(n).argsort(kind="stable")


def decode(buffer: bytes | memoryview, dtype: str, n: int | None, where: str) -> np.ndarray:
    """``n`` numbers (None: as many as there are) from one Blosc buffer; raises DamagedShards if it holds others."""
    size = np.dtype(dtype).itemsize
    nbytes, _, cbytes = struct.unpack_from("<III", buffer, 4) if len(buffer) >= 16 else (0, 0, 0)
    problem = f"a Blosc buffer of {nbytes} bytes in {cbytes}"
    if cbytes == len(buffer) and (nbytes % size == 0 if n is None else nbytes == n * size):
        try:
            array = np.empty(nbytes // size, dtype)
            numcodecs.blosc.decompress(buffer, array)
            return array
        except (RuntimeError, ValueError) as error:
            problem = f"a Blosc buffer that does not decode ({error})"
    expected = f"{f'a multiple of {size}' if n is None else n * size} bytes in {len(buffer)}"
    raise DamagedShards(where, found=problem, expected=expected, next_step=REBUILD)


def check_genes(genes: np.ndarray, n_genes: int, where: str) -> None:
    """Raise DamagedShards unless the gene indices ascend within the vocabulary."""
    if (np.diff(genes) <= 0).any() or genes[0] < 0 or genes[-1] >= n_genes:
        expected = f"ascending gene indices below {n_genes}"
        raise DamagedShards(where, found="others", expected=expected, next_step=REBUILD)


def _read_index(file: Path) -> dict:
    try:
        index = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise DamagedShards(file, found=str(error), expected="the index of a split", next_step=REBUILD) from error
    if index.get("format_version") != FORMAT_VERSION:
        found = f"format_version {index.get('format_version')}"
        raise DamagedShards(file, found=found, expected=str(FORMAT_VERSION), next_step="update stpatch or " + REBUILD)
    missing = {*FACTS, "genes", "samples", "slices", "shards"} - set(index)
    missing |= {f"slices: {name}" for entry in index.get("slices", []) for name in set(SLICE_FACTS) - set(entry)}
    if missing:
        raise DamagedShards(file, found=f"no {sorted(missing)}", expected="a complete index", next_step=REBUILD)
    return index
