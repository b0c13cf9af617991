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
import http.client
import re
import shutil
import tarfile
import tempfile
import urllib.request
import weakref
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import urlsplit

import numpy as np
from webdataset.tariterators import group_by_keys, tar_file_expander

from trainer.data import MEMBERS, Batch, Order, Split
from trainer.errors import ConfigError, DamagedShards

TIMEOUT_S = 60
MAGIC = b"ustar"  # at byte 257 of a tar that isn't compressed
MEMBER = rf"[A-Za-z0-9_-]+\.({'|'.join(map(re.escape, MEMBERS.values()))})"
LOST = (OSError, http.client.HTTPException)  # what a server, or a disk, does not give; urllib's errors are among them


WEB = urllib.request.OpenerDirector()  # opens http and https and nothing else, unlike urllib's own, wherever it is sent
for kind in "Proxy HTTP HTTPS HTTPRedirect HTTPDefaultError Unknown".split():
    WEB.add_handler(getattr(urllib.request, f"{kind}Handler")())
WEB.add_handler(urllib.request.HTTPErrorProcessor())


def open_address(address: str) -> BinaryIO:
    """A path, or an http(s) or file URL, for reading; whatever else is refused (`pipe:` above all)."""
    scheme = urlsplit(address).scheme
    if scheme not in ("", "file", "http", "https"):
        next_step = "name a folder, or the http(s) URL of one"
        raise ConfigError(address, f"the scheme {scheme!r}", "http, https or a path", next_step)
    try:
        if scheme in ("http", "https"):
            return WEB.open(address, timeout=TIMEOUT_S)
        return open(urllib.request.url2pathname(urlsplit(address).path) if scheme else address, "rb")
    except LOST as error:
        raise DamagedShards(address, " ".join(str(error).split()), "the file", "check the address") from error


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
        for what, found in {"bytes": self.at, "sha256": self.digest.hexdigest(), "samples": self.samples}.items():
            if found != self.shard[what]:
                raise self.damaged(f"{what} {found}", f"{self.shard[what]} (index.json)")

    def damaged(self, found: str, expected: str) -> DamagedShards:
        return DamagedShards(f"{self.address}, byte {self.at}", found, expected)


class Stream(Split):
    """One split's folder of shards at an address, read from front to back."""

    def __init__(self, address: str) -> None:
        self.address, here = str(address).rstrip("/"), Path(tempfile.mkdtemp(prefix="stpatch-"))
        weakref.finalize(self, shutil.rmtree, here)
        for name in ("index.json", "genes.tsv", "components.safetensors", "means.safetensors"):
            if not name.endswith(".safetensors") or f'"{name}"' in (here / "index.json").read_text():
                self._fetch(f"{self.address}/{name}", here / name)
        super().__init__(here)

    def _fetch(self, address: str, file: Path) -> None:
        try:
            with contextlib.closing(open_address(address)) as source, open(file, "wb") as target:
                shutil.copyfileobj(source, target)
        except LOST as error:
            raise DamagedShards(address, error, "the whole file", "try again") from error

    def jobs(self, order: Order, consumed: int) -> Iterator[tuple[list[dict], np.ndarray, int]]:
        known, samples = -1, iter(())
        for epoch, positions in order.steps(len(self), consumed):
            if epoch != known:
                drawn = np.random.Philox(key=[order.seed, epoch]).random_raw(len(self.index["shards"]))
                known, samples = epoch, enumerate(self.samples(drawn.argsort(kind="stable")))
            yield from ((*part, epoch) for part in self._share(samples, positions, order))

    def first(self, n: int, order: Order, epoch: int) -> Iterator[Batch]:
        samples = enumerate(self.samples(range(len(self.index["shards"]))))
        for begin in range(0, n, order.batch_size):
            for part in self._share(samples, np.arange(n)[begin:][: order.batch_size], order):
                yield self.read(*part, epoch)

    def samples(self, shards: Iterable[int]) -> Iterator[dict]:
        """webdataset's samples of these shards, one behind the other.

        DamagedShards names the address, and how far it was read, of what is no tar, is cut, or holds other members than a
        shard does.
        """
        passing = None

        def sources() -> Iterator[dict]:
            nonlocal passing
            for shard in (self.index["shards"][i] for i in shards):
                passing = Passing(f"{self.address}/{shard['name']}", shard)
                with contextlib.closing(passing.stream):
                    yield {"url": passing.address, "stream": passing}
                    passing.finish()

        def expected(name: str) -> bool:
            if not re.fullmatch(MEMBER, name):
                raise passing.damaged(f"member {name!r}", "members of samples")
            return True

        try:
            for sample in group_by_keys(tar_file_expander(sources(), select_files=expected)):
                passing.samples += 1
                yield sample
        except DamagedShards as error:  # webdataset adds its own words to what passes through it
            raise DamagedShards(error.file, error.found, error.expected, error.next_step) from error
        except (tarfile.TarError, ValueError, *LOST) as error:
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
            raise DamagedShards(self.address, "fewer", f"{len(self)} samples (index.json)")
        yield from (([found[int(position)] for position in part], part) for part in parts)

    def slice_of(self, sample: dict) -> int:
        slice = sample["__key__"].rpartition("_")[0]
        if slice not in self.slices:
            raise DamagedShards(self.name(sample), f"slice {slice!r}", "one of index.json")
        return self.slices.index(slice)

    def name(self, sample: dict) -> str:
        return f"{sample['__url__']}, sample {sample['__key__']}"

    def member(self, sample: dict, part: str) -> bytes:
        if MEMBERS[part] not in sample:
            raise DamagedShards(self.name(sample), f"no .{MEMBERS[part]}", ", ".join(MEMBERS.values()))
        return sample[MEMBERS[part]]
