"""Files between our own stages, read so that damage is told by its file."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tokenize import TokenError

import anndata
import numpy as np
from safetensors import SafetensorError, safe_open

from workflow.errors import DamagedFile, SliceError

# What h5py, zarr, numpy, zipfile and safetensors raise over flipped bits.
STUMBLES = (
    *(AttributeError, EOFError, KeyError, NotImplementedError, OSError, OverflowError, RuntimeError, TypeError, ValueError),
    *(SafetensorError, SyntaxError, TokenError, zipfile.BadZipFile, zlib.error),
)  # fmt: skip


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
        raise DamagedFile(
            slice=Path(path).stem,
            file=str(path),
            found=f"{type(error).__name__}: {error}",
            expected="a whole file, as a stage wrote it",
            next_step=f"delete {path} and run again",
        ) from error


def read_slice(path: str | Path) -> anndata.AnnData:
    """A curated slice, whole in memory."""
    with reading(path):
        return anndata.read_h5ad(path)


def read_tensors(path: str | Path) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """``X``, ``spot`` and the metadata of an embeddings file."""
    with reading(path), safe_open(str(path), framework="numpy") as file:
        return file.get_tensor("X"), file.get_tensor("spot"), file.metadata() or {}
