"""What every reader returns, and the errors that reading a damaged file ends in."""

from __future__ import annotations

import contextlib
import gzip
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from workflow.errors import (
    ImpossiblePositions,
    Negative,
    Normalised,
    NotCounts,
    NotFinite,
    Scaled,
    SliceError,
    Truncated,
    Unreadable,
    ZeroBytes,
)

BARCODE = r"^[ACGTN]{8,}(-\d+)?$"
SPOT_UM = 65.0
FARTHEST_SITE = 100_000  # rows or columns; Visium HD has 3,350 of 2 um
FARTHEST_PIXEL = 1e9


@dataclass
class Deposit:
    """A slice as its source has it: all its spots, its own gene names, nothing judged yet but the shape."""

    file: Path  # the one that holds the matrix; errors name it
    files: list[Path]  # every file that was read
    counts: sparse.csr_matrix  # [spots, features], whatever the source's dtype
    spots: np.ndarray  # str [spots]: barcodes or spot ids
    ids: np.ndarray  # str [features]: the source's gene ids, "" where it has none
    symbols: np.ndarray  # str [features]: the source's symbols, "" where it has none
    in_tissue: np.ndarray  # bool [spots]
    array: np.ndarray | None  # int64 [spots, 2]: array row, array column; None where not given
    pixels: np.ndarray | None  # float64 [spots, 2]: x, y; None where not given
    obs: pd.DataFrame = field(default_factory=pd.DataFrame)  # the source's other columns, if it has any
    organism: str = ""  # as the file itself states it
    um_per_px: float = float("nan")  # by the source's scale factors (`scale`), NaN where it has none
    pitch_um: float = float("nan")  # of a square lattice, where the format tells it


@contextlib.contextmanager
def reading(slice: str, path: Path) -> Iterator[None]:
    """Turn what libraries raise on a damaged file, whatever its class, into `Unreadable`; what a reader parses belongs in here too.

    Raises
    ------
    ZeroBytes, Truncated, Unreadable
    """
    try:
        yield
    except (SliceError, MemoryError):  # memory that is short is told by whoever set its limit
        raise
    except Exception as error:
        cut = isinstance(error, EOFError) or "truncated file" in str(error)  # gzip's words and HDF5's
        kind = Truncated if cut else Unreadable
        raise (kind if not path.is_file() or path.stat().st_size else ZeroBytes)(
            slice=slice,
            file=str(path),
            found=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}",
            expected="a whole, readable file",
            next_step="fetch or copy the file again and compare its size or checksum with the source's",
        ) from error


def open_text(path: Path) -> io.TextIOBase:
    """A text file, gzipped or not: told by its first bytes, not by its name."""
    return io.TextIOWrapper(open_bytes(path), encoding="utf-8-sig")


def open_bytes(path: Path) -> io.BufferedIOBase:
    """The bytes of a file, unpacked if it is gzipped; EOFError where it has none."""
    with open(path, "rb") as file:
        if not (begin := file.read(2)):
            raise EOFError("a file of no bytes")
        gzipped = begin == b"\x1f\x8b"
    return gzip.open(path) if gzipped else open(path, "rb")


def strings(values) -> np.ndarray:
    """Any array of texts or bytes as an object array of `str`; ValueError where HDF5 could not hold one of them."""
    values = values if isinstance(values, list) else np.asarray(values)  # of a list it would be as wide as the longest
    texts = [v.decode() if isinstance(v, bytes) else str(v) for v in values]
    "".join(texts).encode()  # fails on lone surrogates
    if any("\0" in text for text in texts):
        raise ValueError("NUL characters in names")
    return np.array(texts, dtype=object)


def refuse_far(slice: str, path: Path, values, what: str, farthest: float) -> None:
    """Refuse positions beyond any capture area or image, which whole numbers of 32 bits or a fit could not hold.

    Raises
    ------
    ImpossiblePositions
    """
    largest = np.nanmax(np.abs(np.asarray(values, float)), initial=0)
    if largest > farthest:
        raise ImpossiblePositions(
            slice=slice,
            file=str(path),
            found=f"{what} up to {largest:.6g}",
            expected=f"{farthest:.6g} at most",
            next_step="look at the positions: columns exchanged with others, or a damaged file",
        )


def scale(factors: Mapping) -> float:
    """Micrometres a pixel of the full-resolution image by Space Ranger's scale factors, NaN where they don't tell.

    Visium HD says it outright (``microns_per_pixel``). Else ``spot_diameter_fullres`` is documented by 10x as the diameter
    in pixels of a theoretical spot of 65 um, which is approximate: of real slices, right to 0.3% for four, 7% short for three
    (DLPFC, CytAssist). So it is asked only where no known lattice tells the scale.
    """
    told, spot_px = (
        np.asarray(factors.get(name, np.nan), float).item() for name in ("microns_per_pixel", "spot_diameter_fullres")
    )
    if 0 < told < np.inf:
        return told
    return SPOT_UM / spot_px if 0 < spot_px < np.inf else float("nan")


def looks_like_barcodes(names) -> bool:
    """Whether most names are barcodes."""
    names = pd.Series(names[:1000], dtype=object).astype(str)
    return bool(len(names)) and bool(names.str.match(BARCODE).mean() > 0.5)


def why_not_counts(matrix) -> tuple[type[NotCounts], str] | None:
    """What is wrong with a matrix that should hold raw counts: the error to raise, and the words; None if nothing is.

    Parameters
    ----------
    matrix
        Sparse or dense [spots, features], any dtype.
    """
    values = matrix.data if sparse.issparse(matrix) else np.asarray(matrix).ravel()
    if values.dtype.kind not in "iuf":
        return NotCounts, f"values of type {values.dtype}"
    if np.issubdtype(values.dtype, np.floating):
        if broken := int((~np.isfinite(values)).sum()):
            return NotFinite, f"{broken} values that are NaN or infinite, of {values.size}"
    fractions = values != np.rint(values)
    if values.size and values.min() < 0:
        kind, why = (Scaled, "scaled or centred data") if fractions.any() else (Negative, "a background taken off")
        return kind, f"{int((values < 0).sum())} negative values, the least {values.min():.6g}: {why}"
    if fractions.any():
        some = values[fractions][0]
        return (
            Normalised,
            f"{int(fractions.sum())} fractions among {values.size} values, such as {some:.6g}: normalised data",
        )
    return None
