"""Read a slice from the files that its source deposits, whatever their layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py

from workflow.errors import UnknownFormat
from workflow.readers.deposit import Deposit, reading
from workflow.readers.h5ad import read_h5ad
from workflow.readers.legacy_st import is_spot_table, read_legacy_st
from workflow.readers.tenx import H5, MTX, read_tenx

READERS: dict[str, Callable[[str, list[Path]], Deposit]] = {
    "h5ad": read_h5ad,
    "cellxgene": read_h5ad,
    "spaceranger": read_tenx,
    "geo": read_tenx,
    "legacy_st": read_legacy_st,
}


def read_deposit(slice: str, files: list[Path], format: str = "auto") -> Deposit:
    """Read the files of one slice.

    Parameters
    ----------
    slice
        Its name, for messages.
    files
        Every file there is, at least one (see `workflow.sources.files_at`); the reader takes what it needs.
    format
        A catalogue format; ``auto`` looks at the files.

    Raises
    ------
    SliceError
        `UnknownFormat`, and what the format's own reader raises.
    """
    return READERS[detect(slice, files) if format == "auto" else format](slice, files)


def detect(slice: str, files: list[Path]) -> str:
    """The catalogue format of files: by name for h5ad and 10x, by content for tables."""
    if any(path.suffix.lower() == ".h5ad" for path in files):
        return "h5ad"
    if any(MTX.search(path.name) for path in files):
        return "spaceranger"
    for path in files:
        if H5.search(path.name):
            with reading(slice, path), h5py.File(path) as file:
                return "spaceranger" if "matrix" in file else "h5ad"
    tables = [path for path in files if path.name.lower().removesuffix(".gz").endswith((".tsv", ".txt"))]
    for path in tables:
        with reading(slice, path):
            if is_spot_table(path):
                return "legacy_st"
    raise UnknownFormat(
        slice=slice,
        file=str(files[0]),
        found=f"{len(files)} files: {', '.join(path.name for path in files[:6])}",
        expected="an h5ad, a Space Ranger folder, flat 10x files, or a table of spots like 10x13",
        next_step="name the format in the catalogue, or convert the slice to h5ad",
    )


__all__ = ["READERS", "Deposit", "detect", "read_deposit"]
