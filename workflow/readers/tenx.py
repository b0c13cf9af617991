"""Space Ranger folders and flat GEO files: the same files, in folders or behind a common prefix.

What a file is, its name's end tells; how positions are laid out, their content tells:

=============  ==========================================================================================
matrix         ``*.h5`` (but molecule_info and probes), or ``matrix.mtx`` + ``features.tsv`` or ``genes.tsv`` + ``barcodes.tsv``
positions      ``tissue_positions.csv`` or ``tissue_positions_list.csv`` (``.txt``, ``.tsv``), with a header line or without
scale factors  ``scalefactors_json.json`` in the same folder and after the same prefix as the positions; may be missing
=============  ==========================================================================================

Each may be gzipped (not an h5), lie in a folder or follow a prefix that ends in ``_``, ``.`` or ``-``. Filtered matrices are preferred
to unnamed ones, these to raw ones, h5 to MEX. Of a raw matrix the spots in tissue count; features that are no 'Gene Expression'
(antibodies) are dropped. Archives are not looked into: what fetches a deposit unpacks it.

``barcodes.tsv`` may be missing (GSE263617). Space Ranger writes the columns in the lexicographic order of their barcodes, so where
there are as many columns as spots in tissue, the columns are these spots in that order; otherwise the matrix is refused.

Barcodes of matrix and positions must agree. Where fewer than half do, their ``-1`` suffixes are taken off on both sides,
if that leaves them distinct. Positions belong to another sample where they then hold less than 90% of the barcodes, or where,
of a matrix that is not raw and has fewer than 95% of the listed spots, less than 98% lie in tissue: Space Ranger filters by
tissue, so that all of them should.
"""

from __future__ import annotations

import io
import json
import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.io import mmread

from workflow.errors import (
    MissingFile,
    MissingPositions,
    PositionsMismatch,
    Transposed,
    UnknownFormat,
    Unreadable,
    WrongHeader,
)
from workflow.readers.deposit import (
    FARTHEST_SITE,
    Deposit,
    looks_like_barcodes,
    open_bytes,
    open_text,
    reading,
    refuse_far,
    scale,
    strings,
)
from workflow.readers.hdf5 import vet

logger = logging.getLogger("curate")

NAMED_H5 = re.compile(r"(feature|gene)_bc_matri(x|ces)(_h5)?\.h5$", re.IGNORECASE)
H5 = re.compile(r"(?<!molecule_info)(?<!probe_bc_matrix)\.h5$", re.IGNORECASE)
MTX = re.compile(r"matrix\.mtx(\.gz)?$", re.IGNORECASE)
BARCODES = re.compile(r"barcodes\.tsv(\.gz)?$", re.IGNORECASE)
FEATURES = re.compile(r"(features|genes)\.tsv(\.gz)?$", re.IGNORECASE)
POSITIONS = re.compile(r"tissue_positions(_list)?\.(csv|txt|tsv)(\.gz)?$", re.IGNORECASE)
PARQUET = re.compile(r"tissue_positions\.parquet$", re.IGNORECASE)
ARCHIVE = re.compile(r"\.(tar|tar\.gz|tgz|zip)$", re.IGNORECASE)
SCALE = re.compile(r"scalefactors_json\.json(\.gz)?$", re.IGNORECASE)
COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]

FEWEST_SHARED = 0.9
FEWEST_INSIDE = 0.98
FILTERED_BELOW = 0.95
CAPTURE_AREAS = (4992, 14336)  # spots of 6.5 mm and 11 mm slides; Space Ranger lists all of them


@dataclass(frozen=True)
class Matrix:
    """A matrix among the files: an h5, or a MEX (matrix, features and, unless they are missing, barcodes)."""

    paths: tuple[Path, ...]
    rank: tuple[int, bool]  # filtered before unnamed before raw; h5 before MEX

    @property
    def file(self) -> Path:
        return self.paths[0]


def read_tenx(slice: str, files: list[Path]) -> Deposit:
    """Read a Space Ranger folder or flat prefixed files: matrix and positions, Gene Expression features only.

    Raises
    ------
    MissingFile, UnknownFormat, Unreadable, Transposed, MissingPositions, PositionsMismatch
    """
    matrix = choose_matrix(slice, files)
    table, path = read_positions(slice, files, matrix)
    if len(matrix.paths) == 1:
        counts, spots, features = read_h5(slice, matrix.paths)
    else:
        counts, spots, features = read_mex(slice, matrix.paths, table["barcode"][table["in_tissue"] == 1])
    at = match_spots(slice, spots, table, path, raw=matrix.rank[0] == 2)
    um_per_px, factors = read_scale(slice, files, path)
    expressed = (features["type"] == "Gene Expression").to_numpy()
    table = table.iloc[at]  # -1, a barcode without position, takes the last row: it does not count as in tissue
    return Deposit(
        file=matrix.file,
        files=[*matrix.paths, path, *factors],
        counts=counts[:, expressed],
        spots=spots,
        ids=features["id"].to_numpy()[expressed],
        symbols=features["name"].to_numpy()[expressed],
        in_tissue=(at >= 0) & (table["in_tissue"] == 1).to_numpy(),
        array=table[["array_row", "array_col"]].to_numpy(np.int64),
        pixels=table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy(float),
        um_per_px=um_per_px,
    )


def choose_matrix(slice: str, files: list[Path]) -> Matrix:
    """The best matrix among the files; more than one of the best kind is refused, for they may be several samples."""
    found = [Matrix((path,), (_rank(path), False)) for path in files if H5.search(path.name)]
    lonely = []
    for mtx in (path for path in files if MTX.search(path.name)):
        prefix = MTX.sub("", mtx.name)
        features, barcodes = (
            next(
                (
                    p
                    for p in files
                    if p.parent == mtx.parent and pattern.sub("", p.name) == prefix and pattern.search(p.name)
                ),
                None,
            )
            for pattern in (FEATURES, BARCODES)
        )
        if features:
            found.append(Matrix((mtx, features, *filter(None, [barcodes])), (_rank(mtx), True)))
        else:
            lonely.append(mtx)
    if not found:
        raise MissingFile(
            slice=slice,
            file=str(lonely[0] if lonely else files[0].parent),
            found="matrix.mtx without features.tsv (genes.tsv) of the same prefix" if lonely else "no matrix",
            expected="a 10x h5, or matrix.mtx, barcodes.tsv and features.tsv (genes.tsv) side by side",
            next_step=unpack(files) or "check the folder or the prefix in the catalogue's url",
        )
    best = min(matrix.rank for matrix in found)
    candidates = [matrix for matrix in found if matrix.rank == best]
    if len(candidates) > 1:
        raise UnknownFormat(
            slice=slice,
            file=str(candidates[0].file),
            found=f"{len(candidates)} matrices: {', '.join(str(m.file) for m in candidates[:4])}",
            expected="the files of one slice",
            next_step="give the slice's own folder, or the full prefix of its files, as the catalogue's url",
        )
    return candidates[0]


def _rank(path: Path) -> int:
    name = path.name.lower()
    if path.parent.name.lower().endswith("bc_matrix"):
        name = f"{path.parent.name.lower()}/{name}"
    which = re.findall(r"(?<![a-z])(filtered|raw)(?=[_.-])", name)  # neither "unfiltered" nor a sample named "draw"
    return {"filtered": 0, "raw": 2}[which[-1]] if which else 1


def unpack(files: list[Path]) -> str:
    """What to do where an archive may hold what is missing; "" if there is none."""
    archives = [path.name for path in files if ARCHIVE.search(path.name)]
    return f"unpack {archives[0]} and name its folder in the catalogue's url too" if archives else ""


def has_matrix(files: list[Path]) -> bool:
    """Whether a 10x matrix of whatever kind is among the files, by its name."""
    return any(MTX.search(path.name) or NAMED_H5.search(path.name) for path in files)


def read_h5(slice: str, paths: tuple[Path, ...]) -> tuple[sparse.csr_matrix, np.ndarray, pd.DataFrame]:
    """A 10x h5 (Cell Ranger 3 layout): counts [spots, features] as CSR, barcodes, and features (id, name, type)."""
    (path,) = paths
    with reading(slice, path):
        vet(slice, path)
    with reading(slice, path), h5py.File(path, "r") as file:
        group = file["matrix"]
        spots = strings(group["barcodes"][:])
        named = group["features"]
        features = pd.DataFrame(
            {
                "id": strings(named["id"][:]),
                "name": strings(named["name"][:]),
                "type": strings(named["feature_type"][:]),
            },
            dtype=object,
        )
        shape = tuple(int(n) for n in group["shape"][:])
        _check_shape(slice, path, shape, features["id"], spots)
        # The file holds features x barcodes by column, which read by row is barcodes x features.
        values = group["data"][:]
        if values.dtype.kind not in "iuf" or values.dtype.itemsize > 8 or values.dtype == np.float16:
            # A damaged header may announce these, and scipy can't slice them.
            raise ValueError(f"counts of type {values.dtype}")
        values = values.astype(values.dtype.newbyteorder("="), copy=False)
        parts = (values, group["indices"][:].astype(np.int64), group["indptr"][:].astype(np.int64))
        counts = sparse.csr_matrix(parts, shape=shape[::-1])
        counts.check_format()
    return counts, spots, features


def read_mex(
    slice: str, paths: tuple[Path, ...], covered: Iterable[str] = ()
) -> tuple[sparse.csr_matrix, np.ndarray, pd.DataFrame]:
    """matrix.mtx, features.tsv (or genes.tsv, without types), barcodes.tsv: as `read_h5`.

    Without barcodes.tsv the columns are the barcodes in ``covered``, sorted: see the top of this module.
    """
    mtx, names, *barcodes = paths
    spots = np.array(sorted(covered), dtype=object)
    for path in barcodes:
        with reading(slice, path), open_text(path) as file:
            spots = strings([line.split("\t")[0].strip().strip('"') for line in file if line.strip()])
    with reading(slice, names), open_text(names) as file:
        rows = [line.rstrip("\r\n").split("\t") for line in file if line.strip()]
        features = pd.DataFrame(
            {
                "id": strings([row[0].strip('"') for row in rows]),
                "name": strings([row[1].strip('"') if len(row) > 1 else "" for row in rows]),
                "type": strings([row[2].strip('"') if len(row) > 2 else "Gene Expression" for row in rows]),
            },
            dtype=object,
        )
    with reading(slice, mtx), open_bytes(mtx) as file:
        text = file.read()
        if b"\0" in text:  # on which mmread leaves its memory
            raise ValueError("NUL bytes in a text file")
        first = re.match(rb"(?:%.*\n)*", text).end()
        if b"integer" in text[:100].split(b"\n")[0] and text.find(b".", first) >= 0:  # mmread would cut fractions off
            raise ValueError("fractions in a matrix whose header says integer")
        sizes = text[first:].split(b"\n", 1)[0].split() if b"coordinate" in text[:100] else ()
        if len(sizes) == 3 and int(sizes[2]) > len(text):  # mmread would take memory for them
            raise ValueError(f"{int(sizes[2])} entries announced in {len(text)} bytes")
        matrix = mmread(io.BytesIO(text))
        del text  # 13 bytes an entry
    if not barcodes:
        if matrix.shape[1] != len(spots):
            raise MissingFile(
                slice=slice,
                file=str(mtx),
                found=f"no barcodes.tsv, and {matrix.shape[1]} columns for {len(spots)} spots in tissue",
                expected="barcodes.tsv, or as many columns as spots in tissue",
                next_step="get barcodes.tsv from the source: without it nothing tells which column is which spot",
            )
        logger.warning("%s: %s has no barcodes.tsv; its columns are taken as the sorted spots in tissue", slice, mtx)
    _check_shape(slice, mtx, matrix.shape, features["id"], spots)
    return sparse.csr_matrix(matrix.T), spots, features


def _check_shape(slice: str, path: Path, shape: tuple[int, ...], genes, spots) -> None:
    """features x barcodes, as 10x writes it; the other way round is told apart from a file that is merely broken."""
    if looks_like_barcodes(genes) and not looks_like_barcodes(spots):
        raise Transposed(
            slice=slice,
            file=str(path),
            found=f"barcodes where features belong ({genes[0]}) and features where barcodes belong ({spots[0]})",
            expected="features x barcodes",
            next_step="exchange the two lists and transpose the matrix",
        )
    wanted = (len(genes), len(spots))
    if shape == wanted:
        return
    kind, found = (Transposed, "barcodes x features") if shape == wanted[::-1] else (Unreadable, "a matrix")
    if sorted(abs(a - b) for a, b in zip(shape, wanted, strict=True)) == [0, 1]:
        kind = WrongHeader
    raise kind(
        slice=slice,
        file=str(path),
        found=f"{found} of {shape[0]} x {shape[1]} with {wanted[0]} features and {wanted[1]} barcodes listed",
        expected=f"features x barcodes, {wanted[0]} x {wanted[1]}",
        next_step="compare the first lines of the two lists with the source's: one is a header, or was taken for one"
        if kind is WrongHeader
        else "check that the three lists belong together, and transpose the matrix if it is the wrong way round",
    )


def read_positions(slice: str, files: list[Path], matrix: Matrix) -> tuple[pd.DataFrame, Path]:
    """The positions that go with a matrix, columns as Space Ranger 2 names them.

    Of several, those with the matrix's own prefix count, and ``tissue_positions`` before ``tissue_positions_list``.
    """
    found = [path for path in files if POSITIONS.search(path.name)]
    if len(found) > 1:
        prefix = _sample(matrix.file)
        found = [path for path in found if POSITIONS.sub("", path.name).removesuffix("spatial_") == prefix] or found
    if len(found) > 1:
        found = [path for path in found if "_list" not in path.name] or found
    if len(found) != 1:
        parquet = [path.name for path in files if PARQUET.search(path.name)]
        raise (MissingPositions if not found else PositionsMismatch)(
            slice=slice,
            file=str(matrix.file),
            found=", ".join(str(path) for path in found[:4])
            or f"no positions{' but ' + parquet[0] if parquet else ''}",
            expected="one tissue_positions.csv or tissue_positions_list.csv",
            next_step=unpack(files) or "give the positions' path in the catalogue's url too, after the matrix"
            if not found
            else "give the slice's own folder, or the full prefix of its files, as the catalogue's url",
        )
    path = found[0]
    with reading(slice, path):
        with open_text(path) as file:
            first = file.readline()
        separator = "\t" if "\t" in first else ","
        header = first.split(separator)[0].strip().strip('"').lower() == "barcode"
        with open_text(path) as file:
            given = {"sep": separator, "header": 0 if header else None, "dtype": {0: str, "barcode": str}}
            table = pd.read_csv(file, float_precision="round_trip", **given)
        if not header and len(table.columns) == len(COLUMNS):
            table.columns = COLUMNS
        if lacking := [name for name in COLUMNS if name not in table]:
            raise ValueError(f"{len(table.columns)} columns, without {', '.join(lacking)}")
        if table["barcode"].isna().any():
            raise ValueError("blank barcodes")
        numbers = table[COLUMNS[1:]].apply(pd.to_numeric)
        if not np.isfinite(numbers.to_numpy(float)).all():
            raise ValueError("positions that are blank or infinite")
        fractions = (numbers[COLUMNS[1:4]] % 1 != 0).any(axis=1).to_numpy()
        if fractions.any():
            # Read as a header and written again, a spot's 0,0,0 has become 0,0.1,0.2: names that are to differ.
            if not header and fractions[0] and not fractions[1:].any():
                raise WrongHeader(
                    slice=slice,
                    file=str(path),
                    found=f"a first line that was once taken for a header: {first.strip()[:100]}",
                    expected="each spot as the source lists it",
                    next_step="get the source's own table of positions",
                )
            raise ValueError("array positions that are fractions")
        refuse_far(slice, path, numbers[COLUMNS[2:4]], "array positions", FARTHEST_SITE)
    if table["barcode"].duplicated().any():
        raise PositionsMismatch(
            slice=slice,
            file=str(path),
            found=f"{int(table['barcode'].duplicated().sum())} barcodes listed twice",
            expected="each barcode once",
            next_step="give the positions of this slice alone",
        )
    return numbers.assign(barcode=table["barcode"]), path


def read_scale(slice: str, files: list[Path], positions: Path) -> tuple[float, list[Path]]:
    """Micrometres a pixel by the scale factors that lie beside the positions (see `scale`), and their file, if there is one."""
    prefix = POSITIONS.sub("", positions.name)
    for path in files:
        if SCALE.search(path.name) and path.parent == positions.parent and SCALE.sub("", path.name) == prefix:
            with reading(slice, path), open_text(path) as file:
                return scale(json.load(file)), [path]
    return float("nan"), []


def _sample(path: Path) -> str:
    """The prefix that a sample's flat files share: the matrix's name without what says that it is a matrix."""
    name = re.sub(r"(filtered_|raw_)?feature_bc_matrix\.h5$", "", MTX.sub("", path.name), flags=re.IGNORECASE)
    return re.sub(r"(filtered_|raw_)?feature_bc_matrix[_.]?$", "", name, flags=re.IGNORECASE)


def match_spots(slice: str, spots: np.ndarray, table: pd.DataFrame, path: Path, raw: bool) -> np.ndarray:
    """Row of ``table`` for each barcode of a matrix, int64 [n], -1 where it has none; by the rule at the top of this module."""
    at = pd.Index(table["barcode"]).get_indexer(pd.Index(spots))
    if (at >= 0).mean() < 0.5:
        bare, listed = (
            pd.Index(pd.Series(v, dtype=object).str.replace(r"-\d+$", "", regex=True))
            for v in (spots, table["barcode"])
        )
        if bare.is_unique and listed.is_unique:
            at = listed.get_indexer(bare)
    if (at < 0).sum() == 1 and len(table) + 1 in CAPTURE_AREAS:
        raise WrongHeader(
            slice=slice,
            file=str(path),
            found=f"{len(table)} spots listed, one less than a slide has, without {spots[at < 0][0]} of the matrix",
            expected=f"{len(table) + 1} spots",
            next_step="get the source's own table of positions: its first spot was taken for a header and dropped",
        )
    shared = float((at >= 0).mean()) if len(at) else 1.0
    problem = (
        f"{shared:.0%} of the matrix's {len(at)} barcodes among its {len(table)}" if shared < FEWEST_SHARED else ""
    )
    if not problem and not raw and len(spots) < FILTERED_BELOW * len(table):
        inside = float((table["in_tissue"].to_numpy()[at[at >= 0]] == 1).mean()) if len(at) else 1.0
        if inside < FEWEST_INSIDE and (table["in_tissue"] == 1).any():  # without any, curate says so
            problem = f"{inside:.1%} of the filtered matrix's {len(at)} barcodes in tissue"
    if problem:
        raise PositionsMismatch(
            slice=slice,
            file=str(path),
            found=problem,
            expected=f"{FEWEST_SHARED:.0%} listed and {FEWEST_INSIDE:.0%} in tissue at least: these positions are another sample's",
            next_step="find the positions that belong to this matrix",
        )
    return at
