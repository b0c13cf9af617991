"""The ways in which GEO's depositors package a section, and the CELLXGENE h5ad, made from one Space Ranger output.

`PACKAGINGS` maps a name to a function (output, prefix) -> {file name: bytes}. Files that nobody needs lie among them, as they do.
"""

from __future__ import annotations

import gzip
import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.io import mmwrite

from workflow.keys import Keys

COLUMNS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]
N_ANTIBODIES = 35


@dataclass(frozen=True)
class Outs:
    """A Space Ranger output in memory."""

    counts: sparse.csr_matrix  # int [spots, features]
    barcodes: np.ndarray  # str [spots], sorted, as Space Ranger does
    ids: np.ndarray  # str [features]
    symbols: np.ndarray  # str [features]
    types: np.ndarray  # str [features]
    positions: pd.DataFrame  # COLUMNS, numbers as text; every spot of the array
    scale: dict[str, float]


def from_outs(folder: Path) -> Outs:
    """Read a Space Ranger folder that has an h5 and positions with a header, without the readers under test."""
    with h5py.File(folder / "filtered_feature_bc_matrix.h5") as file:
        group = file["matrix"]
        genes, n_spots = (int(n) for n in group["shape"][:])
        parts = [group[name][:] for name in ("data", "indices", "indptr")]
        counts = sparse.csr_matrix(tuple(parts), shape=(n_spots, genes))
        texts = {name: group["features"][name].asstr()[:] for name in ("id", "name", "feature_type")}
        barcodes = group["barcodes"].asstr()[:]
    positions = pd.read_csv(folder / "spatial" / "tissue_positions.csv", dtype=str)
    scale = json.loads((folder / "spatial" / "scalefactors_json.json").read_text())
    return Outs(counts, barcodes, texts["id"], texts["name"], texts["feature_type"], positions, scale)


def from_h5ad(path: Path) -> Outs:
    """A Visium h5ad with ``array_row``, ``array_col`` and pixels as the Space Ranger output that it may have come from."""
    adata = anndata.read_h5ad(path)
    adata = adata[np.argsort(adata.obs_names.to_numpy().astype(str))]
    library = next(iter(adata.uns["spatial"].values()))
    pixels = pd.DataFrame(adata.obsm["spatial"][:, ::-1]).map(repr).to_numpy()
    table = np.column_stack([adata.obs_names, adata.obs[["in_tissue", "array_row", "array_col"]].astype(str), pixels])
    return Outs(
        counts=sparse.csr_matrix(adata.X).astype(np.int64),
        barcodes=adata.obs_names.to_numpy().astype(str),
        ids=adata.var_names.to_numpy().astype(str),
        symbols=adata.var["gene_symbol"].to_numpy().astype(str),
        types=np.full(adata.n_vars, "Gene Expression"),
        positions=pd.DataFrame(table, columns=COLUMNS),
        scale={name: float(value) for name, value in library["scalefactors"].items()},
    )


def unfiltered(outs: Outs) -> Outs:
    """All spots of the array; those off the tissue hold three of the first gene each."""
    barcodes = np.sort(outs.positions["barcode"].to_numpy().astype(str))
    at = np.searchsorted(barcodes, outs.barcodes)
    counts = sparse.lil_matrix((len(barcodes), outs.counts.shape[1]), dtype=outs.counts.dtype)
    counts[np.setdiff1d(np.arange(len(barcodes)), at), 0] = 3
    to = sparse.csr_matrix((np.ones(len(at), int), (at, np.arange(len(at)))), shape=(len(barcodes), len(at)))
    return replace(outs, counts=sparse.csr_matrix(to @ outs.counts + counts.tocsr()), barcodes=barcodes)


def with_antibodies(outs: Outs) -> Outs:
    """35 rows of antibodies in the middle of the features, each counted in each spot."""
    n, middle = len(outs.ids), len(outs.ids) // 2
    antibodies = sparse.csr_matrix(np.full((len(outs.barcodes), N_ANTIBODIES), 9, outs.counts.dtype))
    names = np.array([f"CD{i}.1" for i in range(N_ANTIBODIES)])
    order = np.concatenate([np.arange(middle), np.arange(n, n + N_ANTIBODIES), np.arange(middle, n)])
    return replace(
        outs,
        counts=sparse.hstack([outs.counts, antibodies]).tocsr()[:, order],
        ids=np.concatenate([outs.ids, names])[order],
        symbols=np.concatenate([outs.symbols, names])[order],
        types=np.concatenate([outs.types, np.full(N_ANTIBODIES, "Antibody Capture")])[order],
    )


def zipped(text: str | bytes) -> bytes:
    return gzip.compress(text.encode() if isinstance(text, str) else text, compresslevel=1, mtime=0)


def mex(outs: Outs) -> dict[str, bytes]:
    matrix = io.BytesIO()
    mmwrite(matrix, sparse.csc_matrix(outs.counts.T), comment="made from a Space Ranger folder", field="integer")
    lines = zip(outs.ids, outs.symbols, outs.types, strict=True)
    return {
        "matrix.mtx.gz": zipped(matrix.getvalue()),
        "barcodes.tsv.gz": zipped("".join(f"{barcode}\n" for barcode in outs.barcodes)),
        "features.tsv.gz": zipped("".join("\t".join(line) + "\n" for line in lines)),
    }


def tenx_h5(outs: Outs) -> bytes:
    data = io.BytesIO()
    with h5py.File(data, "w") as file:
        group = file.create_group("matrix")
        parts = {"data": outs.counts.data, "indices": outs.counts.indices, "indptr": outs.counts.indptr}
        named = {"features/id": outs.ids, "features/name": outs.symbols, "features/feature_type": outs.types}
        parts |= {"shape": np.array(outs.counts.shape[::-1]), "barcodes": outs.barcodes.astype("S")}
        for name, values in (parts | {name: values.astype("S") for name, values in named.items()}).items():
            group.create_dataset(name, data=values, compression="gzip", compression_opts=1)
    return data.getvalue()


def positions(outs: Outs, header: bool) -> str:
    return outs.positions.to_csv(index=False, header=header)


def h5ad(outs: Outs, change: Callable[[np.ndarray], np.ndarray] = lambda counts: counts) -> bytes:
    """The spots in tissue as authors deposit them: symbols and ids, pixels, no array coordinates."""
    table = outs.positions.set_index("barcode").loc[outs.barcodes].astype(float)
    adata = anndata.AnnData(
        X=change(outs.counts.astype(np.float32)),
        obs=table[["in_tissue", "array_row", "array_col"]].astype(int),
        var=pd.DataFrame({"gene_symbol": outs.symbols.astype(object)}, index=pd.Index(outs.ids.astype(object))),
        obsm={"spatial": table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()},
    )
    return written(adata)


def scaled(counts: sparse.csr_matrix) -> np.ndarray:
    """z-scores of the first genes' logarithms, zeros elsewhere: not counts, and not large."""
    logs = np.log1p(counts[:, :50].toarray())
    dense = np.zeros(counts.shape, np.float32)
    dense[:, :50] = (logs - logs.mean(0)) / (logs.std(0) + 1e-6)
    return dense


def written(adata: anndata.AnnData) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "a.h5ad")
        adata.write_h5ad(path, compression="gzip", compression_opts=1)
        return path.read_bytes()


def cellxgene(outs: Outs, organism: str = "NCBITaxon:9606") -> bytes:
    """The CELLXGENE schema, version 7: every spot of the array, raw counts in ``raw.X``, normalised ones in ``X``."""
    everywhere = unfiltered(outs)
    table = outs.positions.set_index("barcode").loc[everywhere.barcodes].astype(float)
    counts = everywhere.counts.astype(np.float32)
    normalised = counts.copy()
    normalised.data = np.log1p(normalised.data)
    library = {"scalefactors": {name: outs.scale[name] for name in ("spot_diameter_fullres", "tissue_hires_scalef")}}
    adata = anndata.AnnData(
        X=normalised,
        obs=table[["in_tissue", "array_row", "array_col"]].astype(int),
        var=pd.DataFrame({"feature_is_filtered": False}, index=pd.Index(outs.ids.astype(object))),
        obsm={"spatial": table[["pxl_col_in_fullres", "pxl_row_in_fullres"]].to_numpy()},
        uns={"organism_ontology_term_id": organism, "spatial": {"is_single": True, "section": library}},
    )
    adata.raw = anndata.AnnData(X=counts, var=pd.DataFrame(index=adata.var.index))
    return written(adata)


def tree(outs: Outs) -> dict[str, bytes]:
    """The members of a Space Ranger folder, with what macOS leaves between them."""
    return {
        "._outs": b"left by macOS",
        "outs/filtered_feature_bc_matrix.h5": tenx_h5(outs),
        "outs/._filtered_feature_bc_matrix.h5": b"left by macOS",
        "outs/raw_feature_bc_matrix/matrix.mtx.gz": b"not read",
        "outs/raw_feature_bc_matrix/features.tsv.gz": b"not read",
        "outs/molecule_info.h5": b"not read",
        "outs/web_summary.html": b"not read",
        "outs/spatial/tissue_positions.csv": positions(outs, header=True).encode(),
        "outs/spatial/scalefactors_json.json": json.dumps(outs.scale).encode(),
        "outs/spatial/tissue_hires_image.png": b"not read",
    }


def spatial(outs: Outs) -> dict[str, bytes]:
    return {name.removeprefix("outs/"): data for name, data in tree(outs).items() if name.startswith("outs/spatial/")}


def tarred(files: dict[str, bytes], mode: str = "w:gz") -> bytes:
    """A tar with its files in order (and, compressed, without the time in it)."""
    data = io.BytesIO()
    options = {"compresslevel": 1} if mode == "w:gz" else {}
    with tarfile.open(fileobj=data, mode=mode, **options) as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return data.getvalue()


def flat_positions(outs: Outs, prefix: str, name: str = "tissue_positions_list.csv.gz") -> dict[str, bytes]:
    return {
        f"{prefix}{name}": zipped(positions(outs, header="list" not in name)),
        f"{prefix}scalefactors_json.json.gz": zipped(json.dumps(outs.scale)),
        f"{prefix}tissue_lowres_image.png.gz": b"not read",
    }


def flat_mex(outs: Outs, prefix: str) -> dict[str, bytes]:
    return {f"{prefix}_{name}": data for name, data in mex(outs).items()} | flat_positions(outs, f"{prefix}_")


def flat_h5(outs: Outs, prefix: str) -> dict[str, bytes]:
    decoys = {f"{prefix}_raw_feature_bc_matrix.h5": b"not read", f"{prefix}_molecule_info.h5": b"not read"}
    matrix = {f"{prefix}_filtered_feature_bc_matrix.h5": tenx_h5(outs)}
    return matrix | decoys | flat_positions(outs, f"{prefix}_")


def h5_and_archive(outs: Outs, prefix: str) -> dict[str, bytes]:
    archive = {f"{prefix}_spatial.tar.gz": tarred(spatial(outs)), f"{prefix}_analysis.tar.gz": b"not read"}
    return {f"{prefix}_filtered_feature_bc_matrix.h5": tenx_h5(outs)} | archive


def mex_and_zip(outs: Outs, prefix: str) -> dict[str, bytes]:
    """GSM6506110 is packaged so."""
    return {f"{prefix}_{name}": data for name, data in mex(outs).items()} | {
        f"{prefix}_spatial.zip": zip_of(spatial(outs))
    }


def whole_archive(outs: Outs, prefix: str) -> dict[str, bytes]:
    return {f"{prefix}.tar.gz": tarred(tree(outs)), f"{prefix}_image.tif.gz": b"not read"}


def raw_mex(outs: Outs, prefix: str) -> dict[str, bytes]:
    files = {f"{prefix}_raw_feature_bc_matrix_{name}": data for name, data in mex(unfiltered(outs)).items()}
    return files | flat_positions(outs, f"{prefix}_spatial_")


def dots_and_capitals(outs: Outs, prefix: str) -> dict[str, bytes]:
    files = {f"{prefix}.{name.replace('features', 'Genes')}": data for name, data in mex(outs).items()}
    return files | flat_positions(outs, f"{prefix.upper()}-", "Tissue_Positions_List.CSV.gz")


def scaled_h5ad_and_mex(outs: Outs, prefix: str) -> dict[str, bytes]:
    """GSE263617: scaled h5ad, counts without barcodes and with antibodies, no scale factors."""
    files = {f"{prefix}_{name}": data for name, data in mex(with_antibodies(outs)).items() if "barcodes" not in name}
    files |= {f"{prefix}_tissue_positions.csv.gz": zipped(positions(outs, header=True))}
    sample, section = prefix.split("_", 1)
    return files | {f"{sample}_{section[:2]}_{section[2:]}.h5ad": h5ad(outs, scaled)}


def lone_h5ad(outs: Outs, prefix: str) -> dict[str, bytes]:
    return {f"{prefix}.h5ad": h5ad(outs)}


PACKAGINGS: dict[str, Callable[[Outs, str], dict[str, bytes]]] = {
    "flat MEX": flat_mex,
    "flat h5": flat_h5,
    "h5 and spatial.tar.gz": h5_and_archive,
    "MEX and spatial.zip": mex_and_zip,
    "Space Ranger tar.gz": whole_archive,
    "raw MEX": raw_mex,
    "dots and capitals": dots_and_capitals,
    "scaled h5ad and MEX without barcodes": scaled_h5ad_and_mex,
    "h5ad": lone_h5ad,
}


def without_positions(outs: Outs, prefix: str) -> dict[str, bytes]:
    return {f"{prefix}_filtered_feature_bc_matrix.h5": tenx_h5(outs)}


def same(curated, original) -> bool:
    """Every number of the curated slice is the original's."""
    assert list(curated.obs_names) == list(original.obs_names)
    assert list(curated.var_names) == list(original.var_names)
    assert (curated.X != original.X).nnz == 0
    for column in (Keys.ARRAY_ROW, Keys.ARRAY_COL, Keys.TOTAL_COUNTS):
        np.testing.assert_array_equal(curated.obs[column], original.obs[column])
    np.testing.assert_array_equal(curated.obsm[Keys.SPATIAL], original.obsm[Keys.SPATIAL])
    return curated.n_obs > 1000 and curated.X.sum() > 0
