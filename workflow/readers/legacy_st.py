"""Legacy Spatial Transcriptomics: a table of spots x genes whose spot ids are array coordinates, ``10x13`` for x 10 and y 13.

Pixels, and which spots are selected, come from a second table if one is given (columns x, y, pixel_x, pixel_y, selected): a spot that is
not in it, or not selected, is not in tissue. Coordinates may be fractions (aligned spots, ``10.02x12.97``): they are rounded.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse

from workflow.errors import MissingFile, MissingPositions, Transposed
from workflow.readers.deposit import FARTHEST_SITE, Deposit, open_text, reading, refuse_far, strings

PITCH_UM = 200.0  # centre to centre of neighbouring spots
SPOT = re.compile(r"^(?:X)?(-?\d+(?:\.\d+)?)[x_](-?\d+(?:\.\d+)?)$")


def is_spot_table(path: Path) -> bool:
    """Whether a text file is such a table of counts, either way round (and not one of spots or labels, which have x and y)."""
    if not path.stat().st_size:
        return False
    with open_text(path) as file:
        header = file.readline().rstrip("\r\n").split("\t")
        first = file.readline().split("\t")[0]
    if {"x", "y"} <= set(header):
        return False
    return bool(SPOT.match(first)) or sum(bool(SPOT.match(name)) for name in header) > len(header) / 2


def read_legacy_st(slice: str, files: list[Path]) -> Deposit:
    """Read a table of counts and, if there is one, its table of spots.

    Raises
    ------
    MissingFile, Unreadable, Transposed, MissingPositions
    """
    with reading(slice, files[0]):
        tables = [path for path in files if is_spot_table(path)]
    if len(tables) != 1:
        raise MissingFile(
            slice=slice,
            file=str(files[0]),
            found=f"{len(tables)} tables of spots x genes among {', '.join(path.name for path in files[:5])}",
            expected="one table whose first column holds ids like 10x13",
            next_step="name the table of counts, and after it that of the spots, in the catalogue's url",
        )
    path = tables[0]
    with reading(slice, path), open_text(path) as file:
        table = pd.read_csv(file, sep="\t", index_col=0)
        if not table.size:
            raise ValueError(f"a table of {table.shape[0]} spots and {table.shape[1]} genes")
    if SPOT.match(str(table.columns[0])):
        raise Transposed(
            slice=slice,
            file=str(path),
            found=f"genes in rows ({table.index[0]}) and spots in columns ({table.columns[0]})",
            expected="spots in rows, genes in columns",
            next_step="transpose the table",
        )
    with reading(slice, path):
        values = table.to_numpy()
        if values.dtype == object:
            raise ValueError("cells that are not numbers")
        matches = [SPOT.match(name) for name in strings(table.index)]
        if not all(matches):
            raise ValueError(f"row names that are no spots, such as {table.index[matches.index(None)]!r}")
        counts = sparse.csr_matrix(values)
    sites = np.array([[float(part) for part in match.groups()] for match in matches])
    refuse_far(slice, path, sites, "array positions", FARTHEST_SITE)
    x, y = np.rint(sites).astype(np.int64).T
    others = [other for other in files if other != path]
    covered, pixels = np.ones(len(x), bool), None
    if others:
        covered, pixels = _selected(slice, others[0], x, y)
    names = strings(table.columns)
    return Deposit(
        file=path,
        files=[path, *others[:1]],
        counts=counts,
        spots=strings(table.index),
        ids=names,
        symbols=names,
        in_tissue=covered,
        array=np.column_stack([y, x]),
        pixels=pixels,
        pitch_um=PITCH_UM,
    )


def _selected(slice: str, path: Path, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which spots a spot file selects [n], and their pixels [n, 2] (NaN elsewhere)."""
    with reading(slice, path):
        with open_text(path) as file:
            header = file.readline()
        with open_text(path) as file:
            table = pd.read_csv(file, sep=next((sep for sep in "\t,;" if sep in header), r"\s+"))
        lacking = [name for name in ("x", "y", "pixel_x", "pixel_y") if name not in table]
        if lacking:
            raise ValueError(f"no column {', '.join(lacking)} among {', '.join(map(str, table.columns))}")
        if "selected" in table:
            table = table[table["selected"] == 1]
        refuse_far(slice, path, table[["x", "y"]].astype(float), "array positions", FARTHEST_SITE)
        sites = pd.MultiIndex.from_arrays([table[name].astype(float).round().astype(int) for name in ("x", "y")])
        listed = table[["pixel_x", "pixel_y"]].to_numpy(float)[~sites.duplicated()]
    at = sites[~sites.duplicated()].get_indexer(pd.MultiIndex.from_arrays([x, y]))
    covered = at >= 0
    if not covered.any():
        raise MissingPositions(
            slice=slice,
            file=str(path),
            found=f"none of the {len(x)} spots among its {len(table)}",
            expected="the spots of this section",
            next_step="find the spot file that belongs to this table of counts",
        )
    return covered, np.where(covered[:, None], listed[at], np.nan)
