"""Files between our own stages, read so that damage is told by its file.

Curated slices and what the trainer writes are sealed: they carry a sha256 of themselves, so that not one flipped bit passes.
"""

from __future__ import annotations

import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError

import anndata
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load

from workflow.errors import DamagedFile, SliceError

# What h5py, zarr, numpy, zipfile and safetensors raise over flipped bits.
STUMBLES = (
    *(AttributeError, EOFError, KeyError, NotImplementedError, OSError, OverflowError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, SyntaxError, TokenError, zipfile.BadZipFile, zlib.error),
)  # fmt: skip
TAG, DIGITS = b"\nstpatch sha256 ", re.compile(rb"[0-9a-f]{64}")
RECORD = re.compile(rb'"([^"]*)":"([^"]{64})"')  # of the metadata of safetensors
BLANK = b"0" * 64
OTHERS = "other bytes than were written, by the sha256 that it carries"


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Whatever a reader of `path`, a file that a stage of ours wrote, stumbles over is raised as damage of that file.

    Raises
    ------
    DamagedFile
        Names the file, and to delete it. Typed errors pass as they are.
    """
    try:
        yield
    except SliceError:
        raise
    except STUMBLES as error:
        raise damage(path, f"{type(error).__name__}: {error}") from error


def damage(path: str | Path, found: str = OTHERS) -> DamagedFile:
    """The error that says so of a file that a stage of ours wrote, and to delete it."""
    return DamagedFile(
        slice=Path(path).stem,
        file=str(path),
        found=found,
        expected="a whole file, as a stage wrote it",
        next_step=f"delete {path} and run again",
    )


def seal(path: str | Path) -> None:
    """Append ``\\nstpatch sha256 {hex}\\n``, of all bytes before: behind the end that an HDF5 file knows of, where no reader looks."""
    with open(path, "r+b") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        file.write(b"%b%b\n" % (TAG, digest.encode()))


def seal_holds(content: bytes) -> bool | None:
    """Whether all bytes of a file are those that `seal` hashed; None without a seal. Of a damaged seal one half is still known."""
    tag, digits = content[-len(TAG) - 65 : -65], content[-65:-1]
    if tag != TAG and not DIGITS.fullmatch(digits):
        return None
    digest = hashlib.sha256(memoryview(content)[: -len(TAG) - 65]).hexdigest()
    return content.endswith(b"%b%b\n" % (TAG, digest.encode()))


def tensors_hold(content: bytes) -> bool | None:
    """Whether a safetensors file hashes to the ``sha256`` of its metadata, zeros standing for these 64 digits; None without.

    A damaged record is no missing one: 64 hex digits under a name that does not end in ``sha256`` are one, too.
    """
    end, holds = min(8 + int.from_bytes(content[:8], "little"), len(content)), None
    for record in RECORD.finditer(content, 8, end):
        if record[1] == b"sha256":
            digest = hashlib.sha256(content[: record.start(2)] + BLANK)
            digest.update(memoryview(content)[record.end(2) :])
            holds = holds is not False and digest.hexdigest().encode() == record[2]
        elif DIGITS.fullmatch(record[2]) and not record[1].endswith(b"sha256"):
            holds = False
    return holds


def check_seal(path: str | Path) -> None:
    """Raise DamagedFile where a curated slice has other bytes than were written; one without a seal passes."""
    with reading(path):
        content = Path(path).read_bytes()
    if seal_holds(content) is False:
        raise damage(path)


def read_slice(path: str | Path) -> anndata.AnnData:
    """A curated slice, whole in memory."""
    check_seal(path)
    with reading(path):
        return anndata.read_h5ad(path)


def read_safetensors(path: str | Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Tensors and metadata of a safetensors file; raises DamagedFile where they do not hash to what the metadata record."""
    with reading(path):
        content = Path(path).read_bytes()
        if tensors_hold(content) is False:
            raise damage(path)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return load(content), header.get("__metadata__", {})


def read_tensors(path: str | Path) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """``X``, ``spot`` and the metadata of an embeddings file."""
    with reading(path):
        tensors, facts = read_safetensors(path)
        return tensors["X"], tensors["spot"], facts
