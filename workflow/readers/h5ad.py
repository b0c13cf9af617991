"""h5ad files, plain ones and those of the CELLXGENE schema (all 4,992 spots, raw counts in ``raw.X``).

The matrix is chosen by content, not by name: the first of ``raw.X``, ``layers["counts"]``, ``X`` that holds raw counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from workflow.errors import MissingPositions, MultipleSections, NotCounts, Transposed, UnknownFormat
from workflow.genes import strip_version
from workflow.readers.deposit import (
    FARTHEST_SITE,
    Deposit,
    looks_like_barcodes,
    reading,
    refuse_far,
    scale,
    strings,
    why_not_counts,
)
from workflow.readers.hdf5 import vet

SYMBOL_COLUMNS = ("symbol", "gene_symbol", "gene_symbols", "feature_name", "gene_name", "gene_names", "SYMBOL")
TYPE_COLUMNS = ("feature_types", "feature_type")
COVERED = {"1", "1.0", "true", "yes"}


def read_h5ad(slice: str, files: list[Path]) -> Deposit:
    """Read one h5ad file.

    Raises
    ------
    UnknownFormat, Unreadable, UnsafeHdf5, MultipleSections, Transposed, NotCounts, MissingPositions
    """
    found = [path for path in files if path.suffix.lower() in (".h5ad", ".h5")]
    if len(found) != 1:
        raise UnknownFormat(
            slice=slice,
            file=str(files[0].parent),
            found=f"{len(found)} h5ad files: {', '.join(path.name for path in found[:5])}",
            expected="one h5ad file a slice",
            next_step="name the file itself in the catalogue's url, one row a slice",
        )
    with reading(slice, found[0]):
        return _parse(slice, found[0])


def _parse(slice: str, path: Path) -> Deposit:
    """One h5ad file; any other error than those of `read_h5ad` means that the file is not what it should be."""
    vet(slice, path)
    adata = anndata.read_h5ad(path)
    _refuse_several_sections(slice, path, adata)
    counts, var = _counts(slice, path, adata)
    obs = adata.obs
    covered = np.ones(adata.n_obs, bool)
    if "in_tissue" in obs:
        covered = obs["in_tissue"].astype(str).str.lower().isin(COVERED).to_numpy()
    array, pixels = _array(slice, path, obs, covered), _pixels(slice, path, adata)
    if array is None and pixels is None:
        raise MissingPositions(
            slice=slice,
            file=str(path),
            found=f"obs columns {_some(obs.columns)} and obsm keys {_some(adata.obsm)}",
            expected='obs["array_row"] and obs["array_col"], or obsm["spatial"]',
            next_step="add the positions to the file, or take the row out of the catalogue",
        )
    ids, symbols, expressed = _names(var)
    return Deposit(
        file=path,
        files=[path],
        counts=sparse.csr_matrix(counts)[:, expressed],
        spots=strings(adata.obs_names),
        ids=ids[expressed],
        symbols=symbols[expressed],
        in_tissue=covered,
        array=array,
        pixels=pixels,
        obs=obs,
        organism=_organism(adata),
        um_per_px=float("nan") if pixels is None else _um_per_px(adata),
    )


def _refuse_several_sections(slice: str, path: Path, adata: anndata.AnnData) -> None:
    spatial = adata.uns.get("spatial", {})
    single = spatial.get("is_single") if hasattr(spatial, "get") else None
    found = ""
    if single is not None and not bool(single):
        found = 'uns["spatial"]["is_single"] is false'
    elif not adata.obs_names.is_unique:
        found = f"{int(adata.obs_names.duplicated().sum())} spot names that occur twice"
    if found:
        raise MultipleSections(
            slice=slice,
            file=str(path),
            found=found,
            expected="one section in a file",
            next_step="split the file, one h5ad and one catalogue row a section",
        )


def _counts(slice: str, path: Path, adata: anndata.AnnData):
    """The matrix that holds raw counts, and the table of its columns."""
    candidates = [("X", adata.X, adata.var)]
    if "counts" in adata.layers:
        candidates.insert(0, ('layers["counts"]', adata.layers["counts"], adata.var))
    if adata.raw is not None:
        candidates.insert(0, ("raw.X", adata.raw.X, adata.raw.var))
    candidates = [(name, matrix, var) for name, matrix, var in candidates if matrix is not None]
    for name, matrix, var in candidates:
        if matrix.shape != (adata.n_obs, len(var)):
            raise ValueError(f"{name} of shape {matrix.shape} for {adata.n_obs} spots and {len(var)} genes")
        if sparse.issparse(matrix):  # anndata takes its indices on trust, and scipy would follow them out of memory
            matrix.check_format(full_check=True)
    barcodes = looks_like_barcodes(adata.var_names) and not looks_like_barcodes(adata.obs_names)
    if barcodes or _mostly_ensembl(strings(adata.obs_names)):
        raise Transposed(
            slice=slice,
            file=str(path),
            found=f"genes in rows ({_some(adata.obs_names)}) and spots in columns ({_some(adata.var_names)})",
            expected="spots in rows, genes in columns",
            next_step="transpose the file (adata.T)",
        )
    problems = []
    for name, matrix, var in candidates:
        problem = why_not_counts(matrix)
        if problem is None:
            return matrix, var
        problems.append((problem[0], f"{name}: {problem[1]}"))
    kind = problems[0][0] if problems else NotCounts  # of the matrix that comes closest to counts
    raise kind(
        slice=slice,
        file=str(path),
        found="; ".join(words for _, words in problems) or "no matrix",
        expected='raw integer counts in raw.X, layers["counts"] or X',
        next_step="get the raw counts from the authors' other files; normalised values cannot be used",
    )


def _names(var: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ids, symbols, and which columns are gene expression (neither antibodies nor spike-ins)."""
    index = strings(var.index)
    nothing = np.full(len(var), "", dtype=object)
    ids, symbols = index, nothing
    if not _mostly_ensembl(index):
        symbols = index
        texts = [strings(var[name]) for name in var.columns if not pd.api.types.is_numeric_dtype(var[name])]
        ids = next((column for column in texts if _mostly_ensembl(column)), nothing)
    named = next((name for name in SYMBOL_COLUMNS if name in var), None)
    if named:
        symbols = np.where(var[named].isna(), "", strings(var[named]))
    expressed = np.ones(len(var), bool)
    kind = next((name for name in TYPE_COLUMNS if name in var), None)
    if kind:  # of 10x: "Gene Expression", "Antibody Capture" and others; of CELLXGENE: a gene's biotype
        kinds = var[kind].astype(str)
        expressed = (kinds == "Gene Expression").to_numpy()
        if not expressed.any():
            expressed = ~kinds.str.contains("Capture|Custom|Multiplexing|Peaks", case=False).to_numpy()
    if "feature_biotype" in var:
        expressed &= (var["feature_biotype"].astype(str) != "spike-in").to_numpy()
    return ids, symbols, expressed


def _mostly_ensembl(names: np.ndarray) -> bool:
    return len(names) > 0 and sum(strip_version(name) is not None for name in names) >= len(names) / 2


def _array(slice: str, path: Path, obs: pd.DataFrame, covered: np.ndarray) -> np.ndarray | None:
    """Array coordinates [n, 2], None where a covered spot has none or they are fractions; -1 where another spot has none."""
    if "array_row" not in obs or "array_col" not in obs:
        return None
    given = obs[["array_row", "array_col"]].astype(str).apply(pd.to_numeric, errors="coerce").to_numpy(float)
    whole = (np.isfinite(given) & (given == np.rint(given))).all(1)
    if not whole[covered].all():
        return None
    refuse_far(slice, path, given[whole], "array positions", FARTHEST_SITE)
    return np.where(whole[:, None], given, -1).astype(np.int64)


def _pixels(slice: str, path: Path, adata: anndata.AnnData) -> np.ndarray | None:
    """Pixels [n, 2] (x, y) of ``obsm["spatial"]``, None where there is none."""
    key = next((key for key in ("spatial", "X_spatial") if key in adata.obsm), None)
    if key is None:
        return None
    pixels = np.asarray(adata.obsm[key], float)
    if pixels.ndim != 2 or pixels.shape[1] < 2:
        raise MissingPositions(
            slice=slice,
            file=str(path),
            found=f'obsm["{key}"] of shape {pixels.shape}',
            expected="two columns, x and y",
            next_step="complete the positions in the file, or take the row out of the catalogue",
        )
    return pixels[:, :2]


def _um_per_px(adata: anndata.AnnData) -> float:
    """Micrometres a pixel by the scale factors in ``uns["spatial"]``, NaN where it has none or those of several libraries."""
    spatial = adata.uns.get("spatial")
    libraries = spatial.values() if isinstance(spatial, Mapping) else ()
    factors = [
        library["scalefactors"] for library in libraries if isinstance(library, Mapping) and "scalefactors" in library
    ]
    return scale(factors[0]) if len(factors) == 1 else float("nan")


def _organism(adata: anndata.AnnData) -> str:
    """What the CELLXGENE schema says of the organism: in uns since 6.0.0, in obs before."""
    key = "organism_ontology_term_id"
    terms = (
        {str(adata.uns[key])} if key in adata.uns else set(adata.obs[key].astype(str)) if key in adata.obs else set()
    )
    names = {"NCBITaxon:9606": "human", "NCBITaxon:10090": "mouse"}
    return " and ".join(sorted(names.get(term, term) for term in terms))


def _some(names) -> str:
    listed = [str(name) for name in names]
    return ", ".join(listed[:6]) + (", ..." if len(listed) > 6 else "") if listed else "none"
