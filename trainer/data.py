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
import re
import struct
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
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
MEMBERS = {"counts": "counts.blosc", "sites": "sites.blosc", "json": "json"}  # of a sample, and what their names end in
# Keys of the index that the model folder repeats, and those of each of its slices.
FACTS = (
    *("m", "h", "w", "target_sum", "layout", "pitch_um", "selection"),
    *("allow_contamination", "simulated", "n_samples"),
)
SLICE_FACTS = ("slice", "source", "organism", "donor", "layout", "pitch_um", "n_windows")
LAYOUTS = ("offset", "rank", "bin")
BLOCK = 512  # of a tar
REBUILD = "rebuild the shards (delete the folder, run `snakemake data`)"

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
        mean, variance = (np.array([float(row[name]) for row in rows]) for name in ("mean", "variance"))
        return cls([row["gene_id"] for row in rows], mean, variance, sha256(file))


@dataclasses.dataclass(frozen=True)
class Batch:
    """Samples as they are stored; normalising and masking wait until they are on the device."""

    counts: Tensor  # uint16 [B, m, h, w]
    genes: Tensor  # int32 [B, m]: rows of the vocabulary, ascending
    totals: Tensor  # float32 [B, h, w]: 0 where nothing was observed
    positions: Tensor  # int64 [B]: place of each sample in the epoch's order
    epoch: Tensor  # int64 []; a tensor, so that a compiled step outlives its epoch
    rows: Tensor | None = None  # int32 [B, h]: array row of each line, -1 in padding; where the objective asks for it
    cols: Tensor | None = None  # int32 [B, w]: array column of each column (its half in layout `offset`), -1 in padding
    layouts: Tensor | None = None  # uint8 [B]: place in LAYOUTS

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
        epoch, start = divmod(consumed, n)
        while True:
            for begin in range(start, n, self.batch_size):
                yield epoch, np.arange(begin, min(begin + self.batch_size, n))
            epoch, start = epoch + 1, 0

    def after(self, n: int, consumed: int) -> int:
        """The state after one more global batch."""
        return consumed + min(self.batch_size, n - consumed % n)

    def share(self, positions: np.ndarray) -> list[np.ndarray]:
        """This rank's ``accumulate`` parts of a global batch; of a small one some hold nothing."""
        mine = positions[self.rank :: self.ranks]
        size = -(-self.batch_size // (self.ranks * self.accumulate))
        return [mine[k * size : (k + 1) * size] for k in range(self.accumulate)]

    def rows(self, shard: np.ndarray, n_shards: int, epoch: int) -> np.ndarray:
        """The order of an epoch, int64 [n]: raw Philox words, whose stream numpy promises to keep, sorted.

        ``shard`` [n] is the shard of each row of ``samples.npy``.
        """
        philox = np.random.Philox(key=[self.seed, epoch])
        if self.shuffle == "full":
            return philox.random_raw(len(shard)).argsort(kind="stable")
        place = philox.random_raw(n_shards).argsort(kind="stable").argsort()  # of each shard among the shards
        return np.lexsort((philox.random_raw(len(shard)), place[shard] // self.block_shards))


class Split:
    """What is known of one split without its samples: ``index.json``, vocabulary, components.

    Raises
    ------
    DamagedShards
        Names the file that is missing, of another version, or that does not hash to what the index recorded.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.index = index = _read_index(self.folder / "index.json")
        self.m, self.h, self.w = index["m"], index["h"], index["w"]
        self.vocabulary = Vocabulary.read(self._checked("genes"))
        self.components = self._checked("components") if index.get("components") else None  # a file, where there is one
        self.slices = [entry["slice"] for entry in index["slices"]]

    def __len__(self) -> int:
        return self.index["n_samples"]

    def facts(self) -> dict[str, object]:
        """What the model folder records of its data."""
        facts = {name: self.index[name] for name in FACTS}
        facts["genes"] = {"n": len(self.vocabulary.gene_ids), "sha256": self.vocabulary.sha256}
        return facts | {"slices": self.index["slices"]}

    def identity(self) -> dict[str, str]:
        """Hashes that tell these samples, and nothing else, from others."""
        parts = {
            part: self.index[part]["sha256"] for part in ("genes", "samples", "components") if self.index.get(part)
        }
        tars = "".join(shard["sha256"] for shard in self.index["shards"])
        return parts | {"tars": hashlib.sha256(tars.encode()).hexdigest()}

    def check_matches(self, other: Split) -> None:
        """Raise VocabularyMismatch unless both splits use one vocabulary, window and normalisation."""
        for name in ("m", "h", "w", "target_sum", "genes"):
            mine, theirs = self.facts()[name], other.facts()[name]
            if mine != theirs:
                file = other.folder / "index.json"
                expected = f"{mine} as in {self.folder / 'index.json'}"
                raise VocabularyMismatch(file, found=f"{name} = {theirs}", expected=expected, next_step=REBUILD)

    def _checked(self, part: str) -> Path:
        """The file of this part, which must hash to what the index recorded."""
        file = self.folder / self.index[part]["file"]
        found = sha256(file) if file.is_file() else "no such file"
        if found != self.index[part]["sha256"]:
            expected = f"sha256 {self.index[part]['sha256']} (index.json)"
            raise DamagedShards(file, found=found, expected=expected, next_step=REBUILD)
        return file

    def batch(
        self, samples: list, positions: np.ndarray, epoch: int, read: Callable, coordinates: bool, pinned: bool
    ) -> Batch:
        """Fill a batch: ``read(sample)`` says where the sample stands, and gives a function from a member to its bytes."""
        n = len(samples)

        def empty(dtype: torch.dtype, *shape: int) -> Tensor:
            return torch.empty(n, *shape, dtype=dtype, pin_memory=pinned)

        counts, genes = empty(torch.uint16, self.m, self.h, self.w), empty(torch.int32, self.m)
        totals, where = empty(torch.float32, self.h, self.w), empty(torch.int64)
        where.numpy()[:] = positions
        rows, cols, layouts = (
            (empty(torch.int32, self.h), empty(torch.int32, self.w), empty(torch.uint8))
            if coordinates
            else (None, None, None)
        )
        for i, sample in enumerate(samples):
            name, member = read(sample)
            decode_into(member("counts"), counts[i].numpy(), name)
            sites = decode(member("sites"), "<i4", self.m + self.h * self.w, name)
            check_genes(sites[: self.m], len(self.vocabulary.gene_ids), name)
            genes[i].numpy()[:] = sites[: self.m]
            totals[i].numpy()[:] = sites[self.m :].view("<f4").reshape(self.h, self.w)
            if coordinates:
                try:
                    rows[i].numpy()[:], cols[i].numpy()[:], layouts[i] = lattice_lines(
                        json.loads(bytes(member("json")))
                    )
                except (ValueError, KeyError, TypeError) as error:
                    found, expected = f"{type(error).__name__}: {error}", "the coordinates of a sample"
                    raise DamagedShards(name, found=found, expected=expected, next_step=REBUILD) from error
        return Batch(counts, genes, totals, where, torch.tensor(epoch), rows, cols, layouts)


class Shards(Split):
    """One split's folder of shards, checked against its index when it is opened.

    Raises
    ------
    DamagedShards
        Names the file that is missing, cut, exchanged, of another version, or that does not hold what the index recorded.
        (The tars, which may be large, are not hashed: their size, their extents and one sample of each are checked when
        they are opened, the headers of a sample's members whenever it is read.)
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(folder)
        self.samples = self._read_samples(self._checked("samples"))
        self.names = [shard["name"] for shard in self.index["shards"]]
        self.files = [str(self.folder / name) for name in self.names]
        by_shard = np.argsort(self.samples["shard"], kind="stable")
        ends = np.cumsum([shard["samples"] for shard in self.index["shards"]], dtype=int)
        self.tars: list[mmap.mmap] = []
        for shard, rows in zip(self.index["shards"], np.split(by_shard, ends)[:-1], strict=True):
            self._map(shard, rows)

    def batches(
        self, order: Order, consumed: int = 0, workers: int = 1, coordinates: bool = False, pinned: bool = False
    ) -> Iterator[Batch]:
        """The parts of this rank's share of one global batch after the other, without end, decoded ahead by threads.

        Parameters
        ----------
        consumed
            The state: samples of all ranks so far, the end of a global batch.
        workers
            Threads that decode; 0: the caller's own, when it asks.
        coordinates
            Fill ``rows``, ``cols`` and ``layouts`` too.
        pinned
            Into memory that a GPU copies from while the host goes on.
        """

        def jobs() -> Iterator[tuple]:
            known, rows = -1, np.zeros(0, int)
            for epoch, positions in order.steps(len(self), consumed):
                if epoch != known:
                    known, rows = epoch, order.rows(self.samples["shard"], len(self.names), epoch)
                for part in order.share(positions):
                    yield rows[part], part, epoch, coordinates, pinned

        return read_ahead(self.read, jobs(), workers)

    def first(self, n: int, order: Order, epoch: int, coordinates: bool = False) -> Iterator[Batch]:
        """This rank's share of the first ``n`` samples as they are stored, which is a random order of its own."""
        for begin in range(0, n, order.batch_size):
            for rows in order.share(np.arange(begin, min(begin + order.batch_size, n))):
                yield self.read(rows, rows, epoch, coordinates)

    def read(
        self, rows: np.ndarray, positions: np.ndarray, epoch: int, coordinates: bool = False, pinned: bool = False
    ) -> Batch:
        """Decode the samples of these rows of ``samples.npy``."""

        def open_sample(row: int) -> tuple[str, Callable]:
            sample = self.samples[row]
            return f"{self.files[sample['shard']]}, sample {row}", partial(self._member, sample)

        return self.batch(rows, positions, epoch, open_sample, coordinates, pinned)

    def _member(self, sample: np.void, part: str) -> memoryview:
        """The bytes of a member, whose header must name it and give its size."""
        tar, offset, nbytes = self.tars[sample["shard"]], int(sample[f"{part}_offset"]), int(sample[f"{part}_nbytes"])
        name = f"{self.slices[sample['slice']]}_{sample['window']:06d}.{MEMBERS[part]}"
        header = tar[offset - BLOCK : offset]
        if header[:100] != name.encode()[:100].ljust(100, b"\0") or header[124:135] != b"%011o" % nbytes:
            raise self._unexpected(sample["shard"], offset - BLOCK, f"{name} of {nbytes} bytes (samples.npy)")
        return memoryview(tar)[offset : offset + nbytes]

    def _unexpected(self, shard: int, at: int, expected: str) -> DamagedShards:
        header = self.tars[shard][at : at + BLOCK]
        name, size = (header[cut].split(b"\0")[0].decode(errors="replace") for cut in (np.s_[:100], np.s_[124:136]))
        found = f"{f'member {name!r}' if name else 'no member'} of size {size!r} at byte {at}"
        return DamagedShards(self.files[shard], found=found, expected=expected, next_step=REBUILD)

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
        if len(samples) and samples["slice"].max() >= len(self.slices):
            found, expected = f"slice {samples['slice'].max()}", f"less than {len(self.slices)} (index.json)"
            raise DamagedShards(file, found=found, expected=expected, next_step=REBUILD)
        return samples

    def _map(self, shard: dict, rows: np.ndarray) -> None:
        """Map a tar; its size must be that recorded, and its samples must fill it."""
        file = self.folder / shard["name"]
        found = file.stat().st_size if file.is_file() else "no such file"
        if found != shard["bytes"]:
            expected = f"{shard['bytes']} bytes (index.json)"
            raise DamagedShards(file, found=f"{found} bytes", expected=expected, next_step=REBUILD)
        with open(file, "rb") as opened:
            tar = mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ)
        self.tars.append(tar)
        self._check_extents(len(self.tars) - 1, self.samples[rows])
        for part in MEMBERS:
            self._member(self.samples[rows[0]], part)

    def _check_extents(self, shard: int, samples: np.ndarray) -> None:
        """The samples' members, one behind the other, must be all that a tar holds."""
        offset, nbytes = (
            np.concatenate([samples[f"{part}_{what}"] for part in MEMBERS]).astype(np.int64)
            for what in ("offset", "nbytes")
        )
        digits = 6 + np.searchsorted(10 ** np.arange(6, 10), samples["window"], side="right")
        length = np.array([len(name) for name in self.slices])[samples["slice"]] + digits + len("_.")
        length = np.concatenate([length + len(suffix) for suffix in MEMBERS.values()])
        header = np.where(length < 100, BLOCK, 2 * BLOCK + _padded(length + 1))  # a long name has a member of its own
        begin, end = np.sort(offset - header), np.sort(offset + _padded(nbytes))
        whole = np.append(begin, begin[-1]) == np.insert(end, 0, 0)
        whole[-1] = True
        tail = self.tars[shard][end[-1] :]
        if whole.all() and 2 * BLOCK <= len(tail) <= 40 * BLOCK and not any(tail):
            return
        for sample in samples[np.argsort(samples["counts_offset"])]:  # say where it goes wrong
            for part in MEMBERS:
                self._member(sample, part)
        if not whole.all():
            first = int(np.argmin(whole))
            raise self._unexpected(shard, int(end[first - 1]) if first else 0, "a member that samples.npy lists")
        raise self._unexpected(shard, int(end[-1]), "the end of the tar")


def read_ahead(read: Callable[..., Batch], jobs: Iterator[tuple], workers: int) -> Iterator[Batch]:
    """``read(*job)`` of each job in order, up to two ahead of the caller for each thread."""
    if not workers:
        yield from (read(*job) for job in jobs)
        return
    with ThreadPoolExecutor(workers, thread_name_prefix="decode") as pool:
        ahead = deque(pool.submit(read, *job) for job in islice(jobs, 2 * workers))
        while ahead:
            batch = ahead.popleft().result()
            ahead.extend(pool.submit(read, *job) for job in islice(jobs, 1))
            yield batch


def decode(buffer: bytes | memoryview, dtype: str, n: int | None, where: str) -> np.ndarray:
    """``n`` numbers (None: as many as there are) from one Blosc buffer; raises DamagedShards if it holds others."""
    size = np.dtype(dtype).itemsize
    if n is None:
        nbytes = struct.unpack_from("<I", buffer, 4)[0] if len(buffer) >= 16 else 0
        if nbytes % size:
            expected = f"a multiple of {size} bytes"
            raise DamagedShards(where, found=f"{nbytes} bytes", expected=expected, next_step=REBUILD)
        n = nbytes // size
    array = np.empty(n, dtype)
    decode_into(buffer, array, where)
    return array


def decode_into(buffer: bytes | memoryview, array: np.ndarray, where: str) -> None:
    """Fill an array, which lies together in memory, from one Blosc buffer; raises DamagedShards if it holds others."""
    nbytes, _, cbytes = struct.unpack_from("<III", buffer, 4) if len(buffer) >= 16 else (0, 0, 0)
    problem = f"a Blosc buffer of {nbytes} bytes in {cbytes}"
    if cbytes == len(buffer) and nbytes == array.nbytes:
        try:
            numcodecs.blosc.decompress(buffer, array)
            return
        except (RuntimeError, ValueError) as error:
            problem = f"a Blosc buffer that does not decode ({error})"
    expected = f"{array.nbytes} bytes in {len(buffer)}"
    raise DamagedShards(where, found=problem, expected=expected, next_step=REBUILD)


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
        expected = f"ascending gene indices below {n_genes}"
        raise DamagedShards(where, found="others", expected=expected, next_step=REBUILD)


def _padded(nbytes: np.ndarray) -> np.ndarray:
    return -(-nbytes // BLOCK) * BLOCK


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
    files = [index[part]["file"] for part in ("genes", "samples", "components") if index.get(part)]
    named = [*files, *(shard["name"] for shard in index["shards"]), *(entry["slice"] for entry in index["slices"])]
    for name in named:  # of files beside the index: nothing that an index names may lie elsewhere
        if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9_.-]*", name):
            expected = "letters, digits, '_', '-' and '.'"
            raise DamagedShards(file, found=f"the name {name!r}", expected=expected, next_step=REBUILD)
    return index
