"""Read a slice from the files that its source deposits, whatever their layout."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import h5py

from workflow.errors import UnknownFormat
from workflow.readers.deposit import Deposit, reading
from workflow.readers.h5ad import read_h5ad
from workflow.readers.hdf5 import vet
from workflow.readers.legacy_st import is_spot_table, read_legacy_st
from workflow.readers.tenx import H5, MTX, POSITIONS, has_matrix, read_tenx, unpack


def read_geo(slice: str, files: list[Path]) -> Deposit:
    """What GEO has: flat 10x files, or, only where there is no matrix of these, an h5ad (deposited ones are often scaled)."""
    h5ad = any(path.suffix.lower() == ".h5ad" for path in files) and not has_matrix(files)
    return (read_h5ad if h5ad else read_tenx)(slice, files)


READERS: dict[str, Callable[[str, list[Path]], Deposit]] = {
    "h5ad": read_h5ad,
    "cellxgene": read_h5ad,
    "spaceranger": read_tenx,
    "geo": read_geo,
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
    """The catalogue format of files: by name for h5ad and 10x, by content for tables.

    An h5ad beside a 10x matrix and its positions is taken as made from them.
    """
    counts = has_matrix(files) and any(POSITIONS.search(path.name) for path in files)
    if any(path.suffix.lower() == ".h5ad" for path in files) and not counts:
        return "h5ad"
    if any(MTX.search(path.name) for path in files):
        return "spaceranger"
    for path in files:
        if H5.search(path.name):
            with reading(slice, path):
                vet(slice, path)
                with h5py.File(path, "r") as file:
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
        next_step=unpack(files) or "name the format in the catalogue, or convert the slice to h5ad",
    )


__all__ = ["READERS", "Deposit", "detect", "read_deposit"]
