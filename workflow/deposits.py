"""Write a simulated slice the way a source deposits it, files, names and quirks included (used by rule `simulate`).

Layouts: ``spaceranger-2`` (h5, positions with header), ``spaceranger-1`` (MEX, positions without header), ``cellxgene`` (h5ad of the
CELLXGENE schema), ``geo`` (flat prefixed files). Nothing here depends on the time, so that the same slice gives the same bytes.
"""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
from scipy import sparse
from scipy.io import mmwrite
from scipy.spatial import cKDTree

PITCH_PX = 137.7  # centre to centre of neighbouring spots, as on a scanned 6.5 mm slide
SPOT_PX = 96.4  # what Space Ranger calls the spot's diameter there
HIRES_PX = 2000
GSM = "GSM900001"  # no such sample: all GSM9xxxxx here are simulated
POSITIONS = ["barcode", "in_tissue", "array_row", "array_col", "pxl_row_in_fullres", "pxl_col_in_fullres"]


@dataclass(frozen=True)
class Slice:
    """A simulated slice, all spots of the capture area, sorted by barcode."""

    name: str
    donor: str
    barcodes: np.ndarray  # str [4992]
    array_row: np.ndarray  # int64 [4992]
    array_col: np.ndarray  # int64 [4992]
    pixels: np.ndarray  # float64 [4992, 2], x then y
    in_tissue: np.ndarray  # bool [4992]
    domain: np.ndarray  # int64 [4992]; -1 without tissue
    counts: sparse.csr_matrix  # int32 [4992, G]
    gene_ids: np.ndarray  # str [G]
    symbols: np.ndarray  # str [G]


def domain_names(domain: np.ndarray) -> np.ndarray:
    """``domain_1``.. for 0.., ``""`` for -1."""
    return np.array([f"domain_{d + 1}" if d >= 0 else "" for d in domain], dtype=object)


def write_deposit(simulated: Slice, layout: str, folder: Path) -> dict[str, str]:
    """Write a slice in a layout; returns ``url`` and ``labels`` of its catalogue row, relative to ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    url = WRITERS[layout](simulated, folder)
    if layout == "cellxgene":  # carries its labels itself, as obs["domain"]
        return {"url": url, "labels": ""}
    covered = simulated.in_tissue
    table = pd.DataFrame({"barcode": simulated.barcodes, "domain": domain_names(simulated.domain)})
    table[covered].to_csv(folder / "labels.tsv", sep="\t", index=False)
    return {"url": url, "labels": "labels.tsv"}


def positions(simulated: Slice, header: bool) -> str:
    """The positions of all spots as CSV: integer pixels without header (version 1), fractions with one (version 2)."""
    pixels = simulated.pixels[:, ::-1]  # row first
    pixels = pixels.round(4) if header else pixels.round().astype(int)
    table = pd.DataFrame(
        {
            "barcode": simulated.barcodes,
            "in_tissue": simulated.in_tissue.astype(int),
            "array_row": simulated.array_row,
            "array_col": simulated.array_col,
            "pxl_row": pixels[:, 0],
            "pxl_col": pixels[:, 1],
        }
    ).set_axis(POSITIONS, axis=1)
    return table.sort_values(["array_row", "array_col"]).to_csv(index=False, header=header)


def scalefactors(simulated: Slice) -> dict[str, float]:
    """What Space Ranger writes to ``scalefactors_json.json``."""
    hires = HIRES_PX / full_size(simulated).max()
    return {
        "spot_diameter_fullres": SPOT_PX,
        "tissue_hires_scalef": hires,
        "fiducial_diameter_fullres": 1.5 * SPOT_PX,
        "tissue_lowres_scalef": hires * 0.3,
    }


def full_size(simulated: Slice) -> np.ndarray:
    """Width and height of the full-resolution image in pixels."""
    return np.ceil(simulated.pixels.max(0) + 5 * PITCH_PX)


def mex(simulated: Slice) -> dict[str, bytes]:
    """The three files of a MEX folder (in-tissue spots), gzipped, by name."""
    covered = simulated.in_tissue
    matrix = io.BytesIO()
    mmwrite(matrix, sparse.csc_matrix(simulated.counts[covered].T), comment="simulated", field="integer")
    features = "".join(
        f"{i}\t{s}\tGene Expression\n" for i, s in zip(simulated.gene_ids, simulated.symbols, strict=True)
    )
    texts = {
        "matrix.mtx.gz": matrix.getvalue(),
        "barcodes.tsv.gz": "".join(f"{b}\n" for b in simulated.barcodes[covered]).encode(),
        "features.tsv.gz": features.encode(),
    }
    return {name: gzip.compress(text, compresslevel=4, mtime=0) for name, text in texts.items()}


def write_tenx_h5(simulated: Slice, path: Path) -> None:
    """``filtered_feature_bc_matrix.h5``: genes x barcodes as CSC, in-tissue spots."""
    covered = simulated.in_tissue
    counts = simulated.counts[covered]  # CSR of spots x genes is CSC of genes x spots
    n = len(simulated.gene_ids)
    with h5py.File(path, "w") as file:
        file.attrs.update(
            chemistry_description="Visium V1 Slide (simulated)",
            filetype="matrix",
            library_ids=np.array([simulated.name.encode()]),
            original_gem_groups=np.array([1]),
            software_version="spaceranger-2.1.0",
            version=2,
        )
        group = file.create_group("matrix")
        fields = {
            "barcodes": simulated.barcodes[covered].astype("S"),
            "data": counts.data,
            "indices": counts.indices.astype(np.int64),
            "indptr": counts.indptr.astype(np.int64),
            "shape": np.array(counts.shape[::-1], np.int32),
            "features/_all_tag_keys": np.array([b"genome"]),
            "features/feature_type": np.full(n, b"Gene Expression"),
            "features/genome": np.full(n, b"GRCh38"),
            "features/id": simulated.gene_ids.astype("S"),
            "features/name": simulated.symbols.astype("S"),
        }
        for name, values in fields.items():
            group.create_dataset(name, data=values, compression="gzip", compression_opts=1)


def write_spaceranger_2(simulated: Slice, folder: Path) -> str:
    """Space Ranger 2: ``outs/`` with an h5 and ``tissue_positions.csv`` that has a header."""
    spatial = folder / "outs" / "spatial"
    spatial.mkdir(parents=True, exist_ok=True)
    write_tenx_h5(simulated, folder / "outs" / "filtered_feature_bc_matrix.h5")
    (spatial / "tissue_positions.csv").write_text(positions(simulated, header=True))
    (spatial / "scalefactors_json.json").write_text(json.dumps(scalefactors(simulated)))
    return "outs"


def write_spaceranger_1(simulated: Slice, folder: Path) -> str:
    """Space Ranger 1: ``outs/`` with a MEX folder and ``tissue_positions_list.csv`` that has no header."""
    spatial, matrix = folder / "outs" / "spatial", folder / "outs" / "filtered_feature_bc_matrix"
    for made in (spatial, matrix):
        made.mkdir(parents=True, exist_ok=True)
    for name, data in mex(simulated).items():
        (matrix / name).write_bytes(data)
    (spatial / "tissue_positions_list.csv").write_text(positions(simulated, header=False))
    (spatial / "scalefactors_json.json").write_text(json.dumps(scalefactors(simulated)))
    return "outs"


def write_geo(simulated: Slice, folder: Path) -> str:
    """GEO: flat gzipped files that share a prefix."""
    prefix = f"{GSM}_{simulated.name}"
    files = mex(simulated) | {
        "tissue_positions_list.csv.gz": gzip.compress(positions(simulated, header=False).encode(), mtime=0),
        "scalefactors_json.json.gz": gzip.compress(json.dumps(scalefactors(simulated)).encode(), mtime=0),
    }
    for name, data in files.items():
        (folder / f"{prefix}_{name}").write_bytes(data)
    return prefix


def write_cellxgene(simulated: Slice, folder: Path) -> str:
    """CELLXGENE schema 7: all 4,992 spots, normalised ``X``, raw counts in ``raw.X``."""
    n = len(simulated.barcodes)
    constant = {
        "assay_ontology_term_id": "EFO:0022857",  # Visium Spatial Gene Expression V1
        "cell_type_ontology_term_id": "unknown",
        "development_stage_ontology_term_id": "unknown",
        "disease_ontology_term_id": "PATO:0000461",  # normal
        "donor_id": simulated.donor,
        "self_reported_ethnicity_ontology_term_id": "unknown",
        "sex_ontology_term_id": "unknown",
        "suspension_type": "na",
        "tissue_ontology_term_id": "UBERON:0000955",  # brain
        "tissue_type": "tissue",
    }
    obs = pd.DataFrame({name: pd.Categorical([value] * n) for name, value in constant.items()})
    obs["is_primary_data"] = True
    obs["in_tissue"] = simulated.in_tissue.astype(int)
    obs["array_row"], obs["array_col"] = simulated.array_row, simulated.array_col
    obs["domain"] = pd.Categorical([name or "off tissue" for name in domain_names(simulated.domain)])
    obs.index = pd.Index(simulated.barcodes.astype(object))
    var = pd.DataFrame({"feature_is_filtered": False}, index=pd.Index(simulated.gene_ids))

    counts = simulated.counts.astype(np.float32)
    totals = np.maximum(np.asarray(counts.sum(1)).ravel(), 1)
    normalised = sparse.csr_matrix(sparse.diags_array((1e4 / totals).astype(np.float32)) @ counts)
    normalised.data = np.log1p(normalised.data)
    adata = anndata.AnnData(
        X=normalised,
        obs=obs,
        var=var,
        obsm={"spatial": simulated.pixels.round(4)},
        uns={
            "title": f"Simulated Visium section {simulated.name} (simulated data, no patient)",
            "organism_ontology_term_id": "NCBITaxon:9606",
            "spatial": {
                "is_single": True,
                simulated.name: {
                    "images": {"hires": hires_image(simulated)},
                    "scalefactors": {
                        name: scalefactors(simulated)[name] for name in ("spot_diameter_fullres", "tissue_hires_scalef")
                    },
                },
            },
        },
    )
    adata.raw = anndata.AnnData(X=counts, var=pd.DataFrame(index=var.index))
    adata.write_h5ad(folder / f"{simulated.name}.h5ad", compression="gzip", compression_opts=1)
    return f"{simulated.name}.h5ad"


def hires_image(simulated: Slice) -> np.ndarray:
    """A stained section as it may look, uint8 [height, width, 3] with largest side 2,000: tissue pink, domains in shades."""
    step = 8  # drawn at an eighth of the size
    size = full_size(simulated)
    width, height = np.ceil(np.round(size / size.max() * HIRES_PX / step, 6)).astype(int)  # 2,000 stays 2,000
    y, x = np.mgrid[:height, :width]
    points = (np.column_stack([x.ravel(), y.ravel()]) + 0.5) * step * size.max() / HIRES_PX
    distance, nearest = cKDTree(simulated.pixels).query(points)
    domain = np.where(distance < PITCH_PX, simulated.domain[nearest], -1)
    shades = np.array([[226 - 12 * d, 150 - 18 * d, 190 - 6 * d] for d in range(domain.max() + 1)] + [[242, 240, 243]])
    small = shades.clip(0, 255).astype(np.uint8)[domain].reshape(height, width, 3)
    return small.repeat(step, axis=0).repeat(step, axis=1)


WRITERS: dict[str, Callable[[Slice, Path], str]] = {
    "spaceranger-2": write_spaceranger_2,
    "spaceranger-1": write_spaceranger_1,
    "cellxgene": write_cellxgene,
    "geo": write_geo,
}
