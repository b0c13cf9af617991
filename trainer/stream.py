"""Shards read as a stream, also from a web server: ``--reader webdataset``, the second and slower way.

The address is that of a split's folder, a path or an http(s) URL; its ``index.json`` names the rest. webdataset's own stages
parse the tars and group members into samples; only what it would open, decode or look up in the environment by itself is left
out: this module opens the addresses, and only its own decoder sees a member. A stream cannot jump: shards come in an order
drawn by (seed, epoch), their samples as they are stored, every rank reads all and decodes its share, and a run that goes on
skips what it has consumed. A shard's size and hash are checked as it passes, so a wrong one is known when it ends.
"""

from __future__ import annotations

import contextlib
import hashlib
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from trainer.data import MEMBERS, REBUILD, Batch, Order, Split, read_ahead
from trainer.errors import ConfigError, DamagedShards

TIMEOUT_S = 60
MAGIC = b"ustar"  # at byte 257 of a tar that isn't compressed


def opener() -> urllib.request.OpenerDirector:
    """Opens http and https and, unlike urllib's default, nothing else, wherever a server sends it."""
    director = urllib.request.OpenerDirector()
    for handler in (
        *(urllib.request.ProxyHandler, urllib.request.HTTPHandler, urllib.request.HTTPSHandler),
        *(urllib.request.HTTPRedirectHandler, urllib.request.HTTPErrorProcessor),
        *(urllib.request.HTTPDefaultErrorHandler, urllib.request.UnknownHandler),
    ):
        director.add_handler(handler())
    return director


def open_address(address: str) -> BinaryIO:
    """A path, or an http(s) or file URL, for reading; whatever else is refused (`pipe:` above all)."""
    scheme = urlsplit(address).scheme
    if scheme not in ("", "file", "http", "https"):
        next_step = "name a folder, or the http(s) URL of one"
        raise ConfigError(
            address, found=f"the scheme {scheme!r}", expected="http, https or a path", next_step=next_step
        )
    try:
        if scheme in ("http", "https"):
            return opener().open(address, timeout=TIMEOUT_S)
        return open(urllib.request.url2pathname(urlsplit(address).path) if scheme else address, "rb")
    except OSError as error:  # urllib's are too
        raise DamagedShards(address, found=str(error), expected="the file", next_step="check the address") from error


class Passing:
    """A shard's bytes on their way: counted and hashed, no more of them than the index promised."""

    def __init__(self, address: str, shard: dict) -> None:
        self.address, self.shard, self.at, self.digest = address, shard, 0, hashlib.sha256()
        self.samples = 0  # that came of it
        self.stream = open_address(address)

    def read(self, size: int) -> bytes:
        data = self.stream.read(min(size, self.shard["bytes"] + 1 - self.at))
        if self.at == 0 and data[257:262] != MAGIC:
            raise self.damaged("no plain tar", "a tar")
        self.at += len(data)
        self.digest.update(data)
        if self.at > self.shard["bytes"]:
            raise self.damaged(f"more than {self.shard['bytes']} bytes", f"{self.shard['bytes']} (index.json)")
        return data

    def finish(self) -> None:
        """Read what is left, and compare."""
        while self.read(1 << 20):
            pass
        passed = {"bytes": self.at, "sha256": self.digest.hexdigest(), "samples": self.samples}
        for what, found in passed.items():
            if found != self.shard[what]:
                raise self.damaged(f"{what} {found}", f"{self.shard[what]} (index.json)")

    def damaged(self, found: str, expected: str) -> DamagedShards:
        return DamagedShards(f"{self.address}, byte {self.at}", found=found, expected=expected, next_step=REBUILD)


class Stream(Split):
    """One split's folder of shards at an address, read from front to back."""

    def __init__(self, address: str) -> None:
        self.address = str(address).rstrip("/")
        here = Path(tempfile.mkdtemp(prefix="stpatch-"))
        weakref.finalize(self, shutil.rmtree, here)
        self._fetch("index.json", here)
        for part in ("genes.tsv", "components.safetensors"):
            if part == "genes.tsv" or f'"{part}"' in (here / "index.json").read_text():
                self._fetch(part, here)
        super().__init__(here)

    def _fetch(self, name: str, folder: Path) -> None:
        with contextlib.closing(open_address(f"{self.address}/{name}")) as source, open(folder / name, "wb") as target:
            shutil.copyfileobj(source, target)

    def batches(
        self, order: Order, consumed: int = 0, workers: int = 1, coordinates: bool = False, pinned: bool = False
    ) -> Iterator[Batch]:
        """As `Shards.batches`; the order is another."""

        def jobs() -> Iterator[tuple]:
            known, samples = -1, iter(())
            for epoch, positions in order.steps(len(self), consumed):
                if epoch != known:
                    drawn = np.random.Philox(key=[order.seed, epoch]).random_raw(len(self.index["shards"]))
                    known, samples = epoch, enumerate(self.samples(drawn.argsort(kind="stable")))
                yield from ((*job, epoch, coordinates, pinned) for job in self._share(samples, positions, order))

        return read_ahead(self._read, jobs(), workers)

    def first(self, n: int, order: Order, epoch: int, coordinates: bool = False) -> Iterator[Batch]:
        """As `Shards.first`."""
        samples = enumerate(self.samples(range(len(self.index["shards"]))))
        for begin in range(0, n, order.batch_size):
            positions = np.arange(begin, min(begin + order.batch_size, n))
            for job in self._share(samples, positions, order):
                yield self._read(*job, epoch, coordinates)

    def samples(self, shards: Iterable[int]) -> Iterator[dict]:
        """webdataset's samples of these shards, one behind the other.

        Raises
        ------
        DamagedShards
            Names the address, and how far it was read, of what is no tar, is cut, or holds other members than a shard does.
        """
        passing = None

        def sources() -> Iterator[dict]:
            nonlocal passing
            for i in shards:
                shard = self.index["shards"][i]
                passing = Passing(f"{self.address}/{shard['name']}", shard)
                with contextlib.closing(passing.stream):
                    yield {"url": passing.address, "stream": passing}
                    passing.finish()

        def expected(files: Iterable[dict]) -> Iterator[dict]:
            for file in files:
                if file and not re.fullmatch(
                    rf"[A-Za-z0-9_-]+\.({'|'.join(map(re.escape, MEMBERS.values()))})", file["fname"]
                ):
                    raise passing.damaged(f"member {file['fname']!r}", "members of samples")
                yield file

        try:
            for sample in group_by_keys(expected(tar_file_expander(sources()))):
                passing.samples += 1
                yield sample
        except DamagedShards as error:  # webdataset adds its own words to what passes through it
            parts = {"found": error.found, "expected": error.expected, "next_step": error.next_step}
            raise DamagedShards(error.file, **parts) from error
        except (tarfile.TarError, OSError, ValueError) as error:
            raise passing.damaged(f"{type(error).__name__}: {error}", "a whole tar of samples") from error

    def _share(self, samples: Iterator[tuple[int, dict]], positions: np.ndarray, order: Order) -> Iterator[tuple]:
        """Read on to the last of these positions; this rank's parts of them, with their positions."""
        parts, found = order.share(positions), {}
        mine = {int(position) for part in parts for position in part}
        for position, sample in samples:
            if position in mine:
                found[position] = sample
            if position == positions[-1]:
                break
        if len(found) < len(mine):
            wanted, next_step = f"{len(self)} samples (index.json)", REBUILD
            raise DamagedShards(self.address, found="fewer", expected=wanted, next_step=next_step)
        yield from (([found[int(position)] for position in part], part) for part in parts)

    def _read(
        self, samples: list[dict], positions: np.ndarray, epoch: int, coordinates: bool = False, pinned: bool = False
    ) -> Batch:
        def open_sample(sample: dict) -> tuple[str, Callable]:
            name = f"{sample['__url__']}, sample {sample['__key__']}"
            return name, partial(_member, sample, name)

        return self.batch(samples, positions, epoch, open_sample, coordinates, pinned)


def _member(sample: dict, name: str, part: str) -> bytes:
    if MEMBERS[part] not in sample:
        found, expected = f"no .{MEMBERS[part]}", ", ".join(MEMBERS.values())
        raise DamagedShards(name, found=found, expected=expected, next_step=REBUILD)
    return sample[MEMBERS[part]]
