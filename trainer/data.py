"""The reader: a folder of shards -> batches of raw counts in a reproducible order (docs/format.md, shards).

The tars are memory-mapped and read through ``samples.npy``, so any sample can be reached at once; nothing here parses tar,
but every header passed on the way must be the one expected. The order of an epoch is a pure function of (seed, epoch) over
the index. Global batch b of an epoch holds its positions [b * B, (b + 1) * B), the last one what is left of them; rank r of R
reads every R-th of these, from the r-th on. So the whole state is one integer, the samples consumed so far, whatever the
number of ranks and threads.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import json
import mmap
import os
import re
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import islice
from pathlib import Path
from tokenize import TokenError

import numcodecs.blosc
import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.numpy import load_file
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
MEMBERS = {"counts": "counts.blosc", "sites": "sites.blosc", "json": "json"}  # of a sample, and what their names end in
# Keys of the index that the model folder repeats, and those of each of its slices.
FACTS = "m h w target_sum layout pitch_um selection allow_contamination simulated n_samples".split()
SLICE_FACTS = "slice source organism donor layout pitch_um n_windows".split()
PARTS = ("genes", "samples", "components", "means")  # the other files of the index
OPTIONAL = {"components", "means"}  # of these
LAYOUTS = ("offset", "rank", "bin")
NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"  # of a file beside the index, of a slice: nothing that leads elsewhere
NOT_NUMPY = (OSError, EOFError, ValueError, SyntaxError, RecursionError, MemoryError, TokenError)  # what np.load raises
LARGEST = 2**31  # number of samples, or side of a window
BLOCK = 512  # of a tar
MAPPED = 256  # tars at a time: a mapping holds an open file, of which a process may often have 1,024

# Blosc's own threads share one context; without it each of our decoding threads has its own and releases the lock.
numcodecs.blosc.use_threads = False


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """Row number = gene index = row of the model's embedding."""

    gene_ids: list[str]
    mean: np.ndarray  # float64 [n_genes]: mean normalised expression over the training slices' observed spots
    variance: np.ndarray  # float64 [n_genes]: population variance of the same
    sha256: str

    @classmethod
    def read(cls, file: Path) -> Vocabulary:
        """Read ``genes.tsv``; raises DamagedShards where it is not one of version 1."""
        try:
            with open(file, newline="", encoding="utf-8") as table:
                version = table.readline().rstrip("\n")
                rows = list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))
            if version != f"# stpatch genes {FORMAT_VERSION}":
                raise ValueError(f"first line {version!r}")
            if [row["index"] for row in rows] != [str(i) for i in range(len(rows))]:
                raise ValueError("gaps in `index`")
            mean, variance = (np.array([float(row[name]) for row in rows]) for name in ("mean", "variance"))
            return cls([row["gene_id"] for row in rows], mean, variance, sha256(file))
        except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
            expected = f"a vocabulary, beginning '# stpatch genes {FORMAT_VERSION}'"
            raise DamagedShards(file, str(error) or type(error).__name__, expected) from error


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples as they are stored; normalising and masking wait until they are on the device."""

    counts: Tensor  # uint16 [B, m, h, w]
    genes: Tensor  # int32 [B, m]: rows of the vocabulary, ascending
    totals: Tensor  # float32 [B, h, w]: 0 where nothing was observed
    positions: Tensor  # int64 [B]: place of each sample in the epoch's order
    epoch: Tensor  # int64 []; a tensor, so that a compiled step outlives its epoch
    rows: Tensor | None = None  # int32 [B, h]: array row of each line, -1 in padding; where the reader is to tell them
    cols: Tensor | None = None  # int32 [B, w]: array column of each column (its half in layout `offset`), -1 in padding
    layouts: Tensor | None = None  # uint8 [B]: place in LAYOUTS
    centres: Tensor | None = (
        None  # float32 [B, m]: the genes' means in the sample's slice; where the reader is to tell them
    )

    def __len__(self) -> int:
        return len(self.positions)

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device; from pinned memory the host does not wait for the copy."""
        return Batch(**{name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {name: tensor for name, tensor in vars(self).items() if tensor is not None}


@dataclasses.dataclass(frozen=True)
class Order:
    """Which samples each step reads, and which of them this rank."""

    batch_size: int  # of all ranks
    seed: int
    shuffle: str = "full"  # or block: shards in random order, every `block_shards` of them shuffled among themselves
    block_shards: int = 8
    rank: int = 0
    ranks: int = 1
    accumulate: int = 1  # parts that a rank reads its share in

    def steps(self, n: int, consumed: int) -> Iterator[tuple[int, np.ndarray]]:
        """(epoch, positions) of every global batch from the state ``consumed`` on, without end."""
        while True:
            epoch, begin = divmod(consumed, n)
            positions = np.arange(begin, min(begin + self.batch_size, n))
            yield epoch, positions
            consumed += len(positions)

    def after(self, n: int, consumed: int) -> int:
        """The state after one more global batch."""
        return consumed + min(self.batch_size, n - consumed % n)

    @property
    def part(self) -> int:
        """The most samples that one part of a rank's share holds."""
        return -(-self.batch_size // (self.ranks * self.accumulate))

    def share(self, positions: np.ndarray) -> list[np.ndarray]:
        """This rank's ``accumulate`` parts of a global batch; of a small one some hold nothing."""
        mine = positions[self.rank :: self.ranks]
        return [mine[k * self.part : (k + 1) * self.part] for k in range(self.accumulate)]

    def rows(self, shard: np.ndarray, n_shards: int, epoch: int) -> np.ndarray:
        """The order of an epoch, int64 [n], ``shard`` [n] being that of each row: sorted raw Philox words (numpy keeps them)."""
        philox = np.random.Philox(key=[self.seed, epoch])
        if self.shuffle == "full":
            return philox.random_raw(len(shard)).argsort(kind="stable")
        place = philox.random_raw(n_shards).argsort(kind="stable").argsort()  # of each shard among the shards
        return np.lexsort((philox.random_raw(len(shard)), place[shard] // self.block_shards))


class Split:
    """What is known of one split without its samples: ``index.json``, vocabulary, components, the slices' means.

    `Shards` and `trainer.stream.Stream` bring the samples: ``jobs`` (arguments of `read`, batch after batch), ``first`` (this
    rank's share of the first n samples as they are stored, which is a random order of its own), ``member`` (the bytes of a
    sample's part), ``slice_of`` (its slice's place in the index) and ``name`` (where a sample stands, for errors). DamagedShards names the file that is missing, of another
    version, or that does not hash to what the index recorded.
    """

    coordinates = False  # fill ``rows``, ``cols`` and ``layouts`` of batches
    centred = False  # fill ``centres``
    pinned = False  # batches lie in memory that a GPU copies from while the host goes on

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = _read_index(self.folder / "index.json")
        self.m, self.h, self.w = (self.index[name] for name in "mhw")
        self.vocabulary = Vocabulary.read(self._checked("genes"))
        self.components = self._checked("components") if self.index.get("components") else None
        self.slices = [entry["slice"] for entry in self.index["slices"]]

    @cached_property
    def means(self) -> np.ndarray:
        """Mean normalised expression of each gene in each slice, float32 [n_slices, n_genes]; 0 where it was not measured."""
        if not self.index.get("means"):
            raise DamagedShards(self.folder, "no means.safetensors", "the slices' means", "build the shards again")
        file = self._checked("means")
        try:
            means = load_file(file)["means"]
        except (OSError, KeyError, SafetensorError) as error:
            raise DamagedShards(file, " ".join(str(error).split()), "a tensor `means`") from error
        shape = len(self.slices), len(self.vocabulary.gene_ids)
        if means.shape != shape or means.dtype != np.float32:
            raise DamagedShards(file, f"{means.dtype} {list(means.shape)}", f"float32 {list(shape)}")
        return means

    def __len__(self) -> int:
        return self.index["n_samples"]

    def facts(self) -> dict[str, object]:
        """What the model folder records of its data."""
        genes = {"n": len(self.vocabulary.gene_ids), "sha256": self.vocabulary.sha256}
        return {name: self.index[name] for name in FACTS} | {"genes": genes, "slices": self.index["slices"]}

    def identity(self) -> dict[str, str]:
        """Hashes that tell these samples, and nothing else, from others."""
        parts = {part: self.index[part]["sha256"] for part in PARTS if self.index.get(part)}
        tars = "".join(shard["sha256"] for shard in self.index["shards"])
        return parts | {"tars": hashlib.sha256(tars.encode()).hexdigest()}

    def check_matches(self, other: Split) -> None:
        """Raise VocabularyMismatch unless both splits use one vocabulary, window and normalisation."""
        for name in ("m", "h", "w", "target_sum", "genes"):
            mine, theirs = self.facts()[name], other.facts()[name]
            if mine != theirs:
                file, expected = other.folder / "index.json", f"{mine} as in {self.folder / 'index.json'}"
                raise VocabularyMismatch(file, f"{name} = {theirs}", expected)

    def check_tars(self, part: int = 0, of: int = 1) -> None:
        """Hash every ``of``-th tar, from the ``part``-th on; DamagedShards names one that has changed. A stream is hashed as it
        passes."""

    def _checked(self, part: str) -> Path:
        """The file of this part, which must hash to what the index recorded."""
        file, expected = self.folder / self.index[part]["file"], self.index[part]["sha256"]
        found = sha256(file) if file.is_file() else "no such file"
        if found != expected:
            raise DamagedShards(file, found, f"sha256 {expected} (index.json)")
        return file

    def batches(self, order: Order, consumed: int = 0, workers: int = 1) -> Iterator[Batch]:
        """The parts of this rank's share of one global batch after the other, without end.

        ``consumed`` is the state: samples of all ranks so far, the end of a global batch. ``workers`` threads decode ahead of
        the caller; 0: its own, when it asks.
        """
        return read_ahead(self.read, self.jobs(order, consumed), workers)

    def read(self, samples: list | np.ndarray, positions: np.ndarray, epoch: int) -> Batch:
        """Decode these samples (of `Shards`: rows of ``samples.npy``), which stand at these positions of the epoch."""
        m, h, w, lines = self.m, self.h, self.w, {}
        shapes = {"counts": (torch.uint16, m, h, w), "genes": (torch.int32, m), "totals": (torch.float32, h, w)}
        if self.coordinates:
            lines = {"rows": (torch.int32, h), "cols": (torch.int32, w), "layouts": (torch.uint8,)}
        centres = {"centres": (torch.float32, m)} if self.centred else {}
        tensors = {
            name: torch.empty(len(samples), *shape, dtype=dtype, pin_memory=self.pinned)
            for name, (dtype, *shape) in (shapes | lines | centres).items()
        }
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        for i, sample in enumerate(samples):
            name = self.name(sample)
            decode(self.member(sample, "counts"), name, "<u2", m * h * w, into=arrays["counts"][i])
            sites = decode(self.member(sample, "sites"), name, "<i4", m + h * w)
            check_genes(sites[:m], len(self.vocabulary.gene_ids), name)
            arrays["genes"][i], arrays["totals"][i] = sites[:m], sites[m:].view("<f4").reshape(h, w)
            if self.centred:
                arrays["centres"][i] = self.means[self.slice_of(sample), sites[:m]]
            if lines:
                try:
                    found = lattice_lines(json.loads(bytes(self.member(sample, "json"))))
                    for part, line in zip(lines, found, strict=True):
                        arrays[part][i] = line
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise DamagedShards(name, f"{type(error).__name__}: {error}", "a sample's coordinates") from error
        positions = torch.tensor(positions, pin_memory=self.pinned)
        return Batch(**tensors, positions=positions, epoch=torch.tensor(epoch, pin_memory=self.pinned))


class Shards(Split):
    """One split's folder of shards, checked against its index when it is opened.

    DamagedShards names the file that is missing, cut, exchanged, or that does not hold what the index recorded. The tars,
    which may be large, are hashed by `check_tars` alone: their size, their extents and one sample of each are checked when they
    are opened, the headers of a sample's members whenever it is read.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        shards = self.index["shards"]
        self.names = [shard["name"] for shard in shards]
        self.samples = self._read_samples(self._checked("samples"))
        by_shard = np.argsort(self.samples["shard"], kind="stable")
        ends = np.cumsum([shard["samples"] for shard in shards], dtype=int)
        self.tar = lru_cache(MAPPED)(self._open)  # of each number the mapping
        for i, rows in enumerate(np.split(by_shard, ends)[:-1]):
            self._check_frame(i, rows)

    def check_tars(self, part: int = 0, of: int = 1) -> None:
        tars = {self.folder / shard["name"]: shard["sha256"] for shard in self.index["shards"][part::of]}
        with ThreadPoolExecutor(max(1, min(4, os.cpu_count() // of))) as pool:
            for (file, promised), found in zip(tars.items(), pool.map(sha256, tars), strict=True):
                if found != promised:
                    raise DamagedShards(file, f"sha256 {found}", f"{promised} (index.json)")

    def jobs(self, order: Order, consumed: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
        known, rows = -1, np.zeros(0, int)
        for epoch, positions in order.steps(len(self), consumed):
            if epoch != known:
                known, rows = epoch, order.rows(self.samples["shard"], len(self.names), epoch)
            yield from ((rows[part], part, epoch) for part in order.share(positions))

    def first(self, n: int, order: Order, epoch: int) -> Iterator[Batch]:
        for begin in range(0, n, order.batch_size):
            yield from (self.read(rows, rows, epoch) for rows in order.share(np.arange(n)[begin:][: order.batch_size]))

    def slice_of(self, row: int) -> int:
        return self.samples["slice"][row]

    def name(self, row: int) -> str:
        return f"{self.folder / self.names[self.samples['shard'][row]]}, sample {row}"

    def member(self, row: int, part: str) -> memoryview:
        """The bytes of a member, whose header must name it and give its size."""
        sample = self.samples[row]
        shard, offset, nbytes = (int(sample[field]) for field in ("shard", f"{part}_offset", f"{part}_nbytes"))
        tar = self.tar(shard)
        name = f"{self.slices[sample['slice']]}_{sample['window']:06d}.{MEMBERS[part]}"
        header = tar[max(0, offset - BLOCK) : offset]
        if header[:100] != name.encode()[:100].ljust(100, b"\0") or header[124:135] != b"%011o" % nbytes:
            raise self._unexpected(shard, offset - BLOCK, f"{name} of {nbytes} bytes (samples.npy)")
        return memoryview(tar)[offset : offset + nbytes]

    def _unexpected(self, shard: int, at: int, expected: str) -> DamagedShards:
        header = self.tar(shard)[max(0, at) : max(0, at + BLOCK)]
        name, size = (header[cut].split(b"\0")[0].decode(errors="replace") for cut in (np.s_[:100], np.s_[124:136]))
        found = f"{f'member {name!r}' if name else 'no member'} of size {size!r} at byte {at}"
        return DamagedShards(self.folder / self.names[shard], found, expected)

    def _read_samples(self, file: Path) -> np.ndarray:
        promised = [shard["samples"] for shard in self.index["shards"]]
        try:
            samples = np.load(file, allow_pickle=False)
            if samples.dtype != SAMPLE or samples.ndim != 1:
                raise ValueError(f"{samples.dtype} {samples.shape}")
        except NOT_NUMPY as error:
            raise DamagedShards(file, error, f"a plain array of {SAMPLE}") from error
        for name, known in (("shard", len(promised)), ("slice", len(self.slices))):
            if len(samples) and samples[name].max() >= known:
                raise DamagedShards(file, f"{name} {samples[name].max()}", f"less than {known} (index.json)")
        found = np.bincount(samples["shard"], minlength=len(promised)).tolist()
        if found != promised or len(samples) != len(self):
            expected = f"{len(self)} samples, {promised} by shard (index.json)"
            raise DamagedShards(file, f"{len(samples)} samples, {found} by shard", expected)
        return samples

    def _open(self, shard: int) -> mmap.mmap:
        with open(self.folder / self.names[shard], "rb") as opened:
            return mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)

    def _check_frame(self, shard: int, rows: np.ndarray) -> None:
        """A tar: of the size recorded, and with the samples' members, one behind the other, as all that it holds."""
        file, promised = self.folder / self.names[shard], self.index["shards"][shard]["bytes"]
        found = file.stat().st_size if file.is_file() else "no such file"
        if found != promised:
            raise DamagedShards(file, f"{found} bytes", f"{promised} bytes (index.json)")
        begin, end = self._extents(self.samples[rows])
        gaps = np.flatnonzero(begin != np.insert(end[:-1], 0, 0))
        tail = memoryview(self.tar(shard))[max(0, end[-1]) :]
        whole = not len(gaps) and 2 * BLOCK <= len(tail) <= 40 * BLOCK and not any(tail)
        for row in (
            rows[:1] if whole else rows[np.argsort(self.samples["counts_offset"][rows])]
        ):  # says where it goes wrong
            for part in MEMBERS:
                self.member(row, part)
        if len(gaps):
            raise self._unexpected(shard, int(end[gaps[0] - 1]) if gaps[0] else 0, "a member that samples.npy lists")
        if not whole:
            raise self._unexpected(shard, int(end[-1]), "the end of the tar")

    def _extents(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the members of these samples begin, with their headers, and end: int64 [3 n] each, ascending."""
        offset, nbytes = (
            np.concatenate([samples[f"{part}_{what}"] for part in MEMBERS]).astype(np.int64)
            for what in ("offset", "nbytes")
        )
        digits = 6 + np.searchsorted(10 ** np.arange(6, 10), samples["window"], side="right")
        length = np.array([len(name) for name in self.slices])[samples["slice"]] + digits + len("_.")
        length = np.concatenate([length + len(suffix) for suffix in MEMBERS.values()])
        header = np.where(length < 100, BLOCK, 2 * BLOCK + _padded(length + 1))  # a long name has a member of its own
        return np.sort(offset - header), np.sort(offset + _padded(nbytes))


def read_ahead(read: Callable[..., Batch], jobs: Iterator[tuple], workers: int) -> Iterator[Batch]:
    """``read(*job)`` of each job in order, by threads; one more is ahead of the caller than there are threads."""
    if not workers:
        yield from (read(*job) for job in jobs)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        ahead = deque(pool.submit(read, *job) for job in islice(jobs, workers + 1))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(read, *job) for job in islice(jobs, 1))
            yield batch


def decode(
    buffer: bytes | memoryview, where: str, dtype: str, n: int | None = None, into: np.ndarray | None = None
) -> np.ndarray:
    """``n`` numbers (None: all) from a Blosc buffer, into a new array or one without gaps; DamagedShards if it holds others."""
    nbytes, _, cbytes = struct.unpack_from("<III", buffer, 4) if len(buffer) >= 16 else (0, 0, 0)
    size = np.dtype(dtype).itemsize
    expected = (nbytes // size if n is None else n) * size
    problem = f"a Blosc buffer of {nbytes} bytes in {cbytes}"
    if cbytes == len(buffer) and nbytes == expected > 0:  # before memory is taken for them
        array = np.empty(nbytes // size, dtype) if into is None else into
        try:
            numcodecs.blosc.decompress(buffer, array)
            return array
        except (RuntimeError, ValueError) as error:
            problem = f"a Blosc buffer that does not decode ({error})"
    raise DamagedShards(where, problem, f"{expected or 'some'} bytes in {len(buffer)}")


def lattice_lines(facts: dict) -> tuple[np.ndarray, np.ndarray, int]:
    """Array rows int32 [h] and columns int32 [w] of a sample's JSON, -1 in padding, and the place of its layout in LAYOUTS.

    In layout ``offset`` a column's number is half the array column, 2 * half + row % 2 = array column: where row + column is
    odd on the whole lattice, its rows count one more, which changes no distance.
    """
    rows, cols = (np.array(facts[name], np.int32) for name in ("array_rows", "array_cols"))
    if facts["layout"] == "offset":
        rows[rows >= 0] += (facts["array_row"] + facts["array_col"]) % 2
    return rows, cols, LAYOUTS.index(facts["layout"])


def check_genes(genes: np.ndarray, n_genes: int, where: str) -> None:
    """Raise DamagedShards unless the gene indices ascend within the vocabulary."""
    if (genes[1:] <= genes[:-1]).any() or genes[0] < 0 or genes[-1] >= n_genes:
        raise DamagedShards(where, "others", f"ascending gene indices below {n_genes}")


def _padded(nbytes: np.ndarray) -> np.ndarray:
    return -(-nbytes // BLOCK) * BLOCK


def _read_index(file: Path) -> dict:
    """``index.json``, with all that is asked of it later."""
    try:
        index = json.loads(file.read_text())
        if index.get("format_version") != FORMAT_VERSION:
            next_step = "update stpatch, or rebuild the shards"
            raise DamagedShards(file, f"format_version {index.get('format_version')}", FORMAT_VERSION, next_step)
        missing = {*FACTS, "genes", "samples", "slices", "shards"} - set(index)
        missing |= {f"slices: {name}" for entry in index.get("slices", []) for name in set(SLICE_FACTS) - set(entry)}
        if missing:
            raise DamagedShards(file, f"no {sorted(missing)}", "a complete index")
        parts = [index[part] for part in PARTS if part not in OPTIONAL or index.get(part)]
        named = [part["file"] for part in parts] + [shard["name"] for shard in index["shards"]]
        for name in [*named, *(entry["slice"] for entry in index["slices"])]:
            if not re.fullmatch(NAME, name):
                raise DamagedShards(file, f"the name {name!r}", "letters, digits, '_', '-' and '.'")
        sizes = [shard[name] for shard in index["shards"] for name in ("samples", "bytes")]
        for size in [*sizes, *(index[name] for name in "mhw")]:
            if type(size) is not int or size < 1:
                raise DamagedShards(file, f"the size {size!r}", "whole numbers above 0")
        n_samples = index["n_samples"]
        if type(n_samples) is not int or not 0 <= n_samples <= LARGEST or max(index[name] for name in "mhw") > LARGEST:
            raise DamagedShards(file, f"{n_samples!r} samples of that size", f"whole numbers up to {LARGEST}")
        if not 0 < index["target_sum"] < float("inf"):
            raise DamagedShards(file, f"target_sum {index['target_sum']}", "a number above 0")
        if not all(isinstance(entry["sha256"], str) for entry in [*parts, *index["shards"]]):
            raise DamagedShards(file, "hashes of another kind", "text")
    except DamagedShards:
        raise
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise DamagedShards(file, f"{type(error).__name__}: {error}", "the index of a split") from error
    return index
