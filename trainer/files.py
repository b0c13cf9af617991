"""Small file helpers: hashes, files that appear whole or not at all, safetensors with stable bytes and a seal of their own."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from trainer.errors import DamagedFile, DiskFull

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
BLANK = b"0" * 64  # stands in the place of the digest while it is computed
SEAL = re.compile(rb'"([^"]*)":"([^"]{64})"')


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def room_for(path: Path) -> Iterator[None]:
    """A disk that is full, or a quota that is used up, is said of ``path``: raises DiskFull with the free space and the remedy."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        place = next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())
        found = f"{os.strerror(error.errno)}, {shutil.disk_usage(place).free / 1e6:,.1f} MB free"
        raise DiskFull(path, found, f"room for it on the disk of {place}") from error


def write_whole(path: Path, content: bytes) -> None:
    """Write beside the target, then rename: a reader never sees half a file. DiskFull leaves no part behind."""
    part = path.with_name(path.name + ".part")
    with room_for(path):
        try:
            with open(part, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        except OSError:
            part.unlink(missing_ok=True)
            raise
    os.replace(part, path)


def as_safetensors(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file whose bytes depend on its content alone: the library writes metadata in random order.

    ``sha256`` in its metadata is that of the whole file with zeros for these 64 digits (docs/format.md).
    """
    raw = save(dict(tensors), {**metadata, "sha256": BLANK.decode()})
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # the data begin at a multiple of 8
    blank = len(header).to_bytes(8, "little") + header + raw[end:]
    digest = hashlib.sha256(blank).hexdigest().encode()
    return blank.replace(b'"sha256":"%b"' % BLANK, b'"sha256":"%b"' % digest, 1)


def sealed(content: bytes) -> bool | None:
    """Whether a safetensors file hashes to the ``sha256`` of its metadata; None where they record none.

    A damaged record is no missing one: 64 hex digits under a name that does not end in ``sha256`` are a broken seal, too.
    """
    end, holds = min(8 + int.from_bytes(content[:8], "little"), len(content)), None
    for match in SEAL.finditer(content, 8, end):
        if match[1] == b"sha256":
            digest = hashlib.sha256(content[: match.start(2)] + BLANK)
            digest.update(memoryview(content)[match.end(2) :])
            holds = holds is not False and digest.hexdigest().encode() == match[2]
        elif re.fullmatch(rb"[0-9a-f]{64}", match[2]) and not match[1].endswith(b"sha256"):
            holds = False
    return holds


def read_sealed(file: Path, next_step: str = "") -> bytes:
    """The bytes of a safetensors file; raises DamagedFile where its seal is broken. One without a seal passes."""
    content = file.read_bytes()
    if sealed(content) is False:
        raise DamagedFile(file, "other bytes than were written", "those of the sha256 in its metadata", next_step)
    return content
