"""The six evaluation sets as their sources deposit them, with simulated sections in place of the real ones.

`deposited(rows)` takes rows of catalogue/downstream.tsv and returns what lies at each of their addresses, archives with their
folders and with the files that nobody asked for, and the label of each spot. `repinned(row, files)` is that row for these bytes.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import io
import json
import tempfile
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import unquote

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from tests.unit.geo_deposits import tarred, written
from tests.unit.simulated import GENE_TABLES, SETTINGS
from workflow.deposits import Slice, mex, positions, scalefactors, write_tenx_h5
from workflow.locators import parse
from workflow.simulate import simulate_slice

N_SPOTS = 320  # of a section in tissue, so that 32 of them are quick
UNLABELLED_EACH = 40  # every 40th spot has no label
COLORECTAL_HEADERS = ("Pathologist Annotations", "Pathologist Annotation", "Pathologist annotation", "Pathologist_KH")
CLASSES = {
    "DLPFC": [f"Layer{i}" for i in range(1, 7)] + ["WM"],
    "BrC": [f"IDC_{i}" for i in range(1, 9)]
    + [f"Tumor_edge_{i}" for i in range(1, 7)]
    + ["DCIS/LCIS_1", "DCIS/LCIS_2", "DCIS/LCIS_4", "DCIS/LCIS_5", "Healthy_1", "Healthy_2"],
    "LNA": ["capsule", "cortex", "follicle", "hilum", "medulla cords", "medulla sinuses", "medulla vessels"]
    + ["paracortex", "pericapsular adipose tissue", "subcapsular sinus"],
    "Ton": ["epithelium", "follicle", "germinal centre", "interfollicular"],
}
CLASSES["LND"] = [*CLASSES["LNA"], "Exclude"]


@dataclass
class Deposited:
    """What the sources have.

    Attributes
    ----------
    files
        Address without its fragment -> bytes.
    labels
        Slice -> barcode -> the raw string there, "" where the source gives none.
    sections
        Slice -> the section as simulated; its spots in tissue are those that curate should keep.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    labels: dict[str, dict[str, str]] = field(default_factory=dict)
    sections: dict[str, Slice] = field(default_factory=dict)


def deposited(rows: list[dict[str, str]], n_spots: int = N_SPOTS) -> Deposited:
    """Deposits of these rows; each section has its own spots and counts."""
    found = Deposited()
    for number, row in enumerate(rows):
        found.sections[row["slice"]] = section(row["slice"], row["donor"] or row["slice"], n_spots)
        found.labels[row["slice"]] = labels_of(found.sections[row["slice"]], raw_strings(row["split"]), number)
    makers = {
        "DLPFC": layered,
        "BrC": breast,
        "Col": colorectal,
        "LNA": spatial_glue,
        "LND": spatial_glue,
        "Ton": tonsil,
    }
    for make in dict.fromkeys(makers.values()):
        make(found, [row for row in rows if makers[row["split"]] is make])
    return found


def repinned(row: dict[str, str], files: dict[str, bytes]) -> dict[str, str]:
    """The same row with digests and sizes of these files where it pins the source's own; everything else stays."""
    urls = row["url"].split()
    digests = [hashlib.sha256(files[parse(url).url]).hexdigest() for url in urls]
    sizes = [str(len(files[parse(url).url])) for url in urls]
    return row | {
        "url": " ".join(_repinned(url, files) for url in urls),
        "labels": _repinned(row["labels"], files) if row["labels"] else "",
        "sha256": " ".join(digests[: len(row["sha256"].split())]),
        "bytes": " ".join(sizes[: len(row["bytes"].split())]),
    }


def _repinned(address: str, files: dict[str, bytes]) -> str:
    at = parse(address)
    for name, pinned in (("sha256", at.sha256), ("md5", at.md5)):
        if pinned:
            address = address.replace(f"{name}={pinned}", f"{name}={hashlib.new(name, files[at.url]).hexdigest()}")
    return address


@functools.cache
def section(name: str, donor: str, n_spots: int) -> Slice:
    """A capture area of 120 genes with so many spots in tissue, those in its middle (simulated)."""
    whole = simulate_slice(name, donor, GENE_TABLES / "genes_human.tsv", replace(SETTINGS, n_genes=120))
    away = np.hypot(whole.array_row - 38.5, (whole.array_col - 63.5) / 2)
    near = np.argsort(np.where(whole.in_tissue, away, np.inf), kind="stable")[:n_spots]
    return replace(whole, in_tissue=np.isin(np.arange(len(away)), near) & whole.in_tissue)


def raw_strings(dataset: str) -> list[str]:
    """Every label that the source uses, as it spells them; of the colorectal set all strings of its map."""
    if dataset != "Col":
        return CLASSES[dataset]
    with open(GENE_TABLES / "labels_Col.tsv", newline="", encoding="utf-8") as table:
        return [row["raw"] for row in csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE)]


def labels_of(of: Slice, strings: list[str], number: int) -> dict[str, str]:
    """Barcode -> string, each string in turn, from another one on in each section; every 40th spot has none."""
    spots = of.barcodes[of.in_tissue]
    return {
        str(spot): "" if i % UNLABELLED_EACH == 0 else strings[(i + 7 * number) % len(strings)]
        for i, spot in enumerate(spots)
    }


def layered(found: Deposited, rows: list[dict[str, str]]) -> None:
    """DLPFC: a matrix of the bucket, positions and scale factors of HumanPilot, SEDR's export of the metadata."""
    for row in rows:
        of, (matrix, place, scale) = found.sections[row["slice"]], row["url"].split()
        found.files[matrix] = h5(of)
        found.files[place] = positions(of, header=False).encode()
        found.files[scale] = json.dumps(scalefactors(of)).encode()
        spots = r_table(
            of, found.labels[row["slice"]], "layer_guess", sample_name=row["accession"], subject=row["donor"]
        )
        found.files[parse(row["labels"]).url] = spots


def breast(found: Deposited, rows: list[dict[str, str]]) -> None:
    """BrC: 10x's matrix and spatial.tar.gz, SEDR's export of the metadata."""
    for row in rows:
        of, (matrix, spatial) = found.sections[row["slice"]], row["url"].split()
        found.files[matrix] = h5(of)
        found.files[spatial] = tarred({f"spatial/{name}": data for name, data in space_ranger_1(of).items()})
        spots = r_table(of, found.labels[row["slice"]], "fine_annot_type", orig_ident="BRCA1", annot_type="IDC")
        found.files[parse(row["labels"]).url] = spots


def colorectal(found: Deposited, rows: list[dict[str, str]]) -> None:
    """Col: one zip a section, and one with the annotations of all, whose headers differ."""
    annotations = {}
    for number, row in enumerate(rows):
        of, sample = found.sections[row["slice"]], row["accession"].split()[1]
        files = {f"{sample}/filtered_feature_bc_matrix.h5": h5(of), f"{sample}/raw_feature_bc_matrix.h5": b"not read"}
        files |= {f"{sample}/filtered_feature_bc_matrix/{name}": data for name, data in mex(of).items()}
        files |= {f"{sample}/spatial/{name}": data for name, data in space_ranger_1(of).items()}
        files |= {f"{sample}/web_summary.html": b"not read", f"{sample}/metrics_summary.csv": b"not read"}
        found.files[parse(row["url"]).url] = zip_by_macos(files)
        header = COLORECTAL_HEADERS[number % len(COLORECTAL_HEADERS)]
        annotations[f"Pathology_SpotAnnotations/Pathologist_Annotations_{sample}.csv"] = csv_table(
            ["Barcode", header], found.labels[row["slice"]].items()
        )
    for address in {parse(row["labels"]).url for row in rows}:
        found.files[address] = zip_by_macos(annotations)


def spatial_glue(found: Deposited, rows: list[dict[str, str]]) -> None:
    """LNA, LND: folders of one zip, each with RNA, antibodies and annotations keyed `Barcode` and `barcode`."""
    files = {"Data_SpatialGlue/Dataset1_Mouse_Spleen1/adata_RNA.h5ad": b"not read"}
    for row in rows:
        of, folder = found.sections[row["slice"]], unquote(parse(row["url"]).members[0]).removeprefix("*").split("/")[0]
        key = "Barcode" if row["split"] == "LNA" else "barcode"
        spots = sorted(found.labels[row["slice"]].items(), reverse=True)  # not in the order of the matrix
        files[f"Data_SpatialGlue/{folder}/adata_RNA.h5ad"] = h5ad(of)
        files[f"Data_SpatialGlue/{folder}/adata_ADT.h5ad"] = b"not read"
        files[f"Data_SpatialGlue/{folder}/annotation.csv"] = csv_table([key, "manual-anno"], spots)
    for address in {parse(row["url"]).url for row in rows}:
        found.files[address] = zip_by_macos(files)


def tonsil(found: Deposited, rows: list[dict[str, str]]) -> None:
    """Ton: three sections in one zip, labels in their obs."""
    files = {}
    for row in rows:
        of, member = found.sections[row["slice"]], unquote(parse(row["url"]).members[0]).removeprefix("*")
        labels = [found.labels[row["slice"]][spot] or None for spot in of.barcodes[of.in_tissue]]
        files[f"data_imputation/{member}"] = h5ad(of, final_annot=pd.Categorical(labels))
        files[f"data_imputation/{member.replace('_rna', '_adt')}"] = b"not read"
    for address in {parse(row["url"]).url for row in rows}:
        found.files[address] = zip_by_macos(files)


def h5(of: Slice) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        write_tenx_h5(of, Path(folder, "m.h5"))
        return Path(folder, "m.h5").read_bytes()


def h5ad(of: Slice, **obs) -> bytes:
    """Spots in tissue: counts as float32, symbols for names, pixels; no array coordinates, as multi-omics deposits have them."""
    spots = of.in_tissue
    adata = anndata.AnnData(
        X=sparse.csr_matrix(of.counts[spots].astype(np.float32)),
        obs=pd.DataFrame(obs, index=of.barcodes[spots].astype(object)),
        var=pd.DataFrame({"feature_types": "Gene Expression"}, index=pd.Index(of.symbols)),
        obsm={"spatial": of.pixels[spots].round().astype(np.int64)},
    )
    return written(adata)


def space_ranger_1(of: Slice) -> dict[str, bytes]:
    """The folder `spatial` of Space Ranger 1."""
    return {
        "aligned_fiducials.jpg": b"not read",
        "detected_tissue_image.jpg": b"not read",
        "scalefactors_json.json": json.dumps(scalefactors(of)).encode(),
        "tissue_hires_image.png": b"not read",
        "tissue_lowres_image.png": b"not read",
        "tissue_positions_list.csv": positions(of, header=False).encode(),
    }


def r_table(of: Slice, labels: dict[str, str], column: str, **constant: str) -> bytes:
    """What R's write.table makes of the spots: row names that the header leaves out, NA for what is missing."""
    header = [*constant, "row", "col", column, f"{column}_short"]
    lines = ["\t".join(header)]
    place = {b: (r, c) for b, r, c in zip(of.barcodes, of.array_row, of.array_col, strict=True)}
    for spot, label in labels.items():
        lines.append("\t".join([spot, *constant.values(), *map(str, place[spot]), label or "NA", label[-1:] or "NA"]))
    return ("\n".join(lines) + "\n").encode()


def csv_table(header: list[str], rows) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text)  # quotes where it must, lines end in CR LF
    writer.writerow(header)
    writer.writerows(rows)
    return text.getvalue().encode()


def zip_by_macos(files: dict[str, bytes]) -> bytes:
    """A zip with entries for folders, and the AppleDouble twin that macOS packs beside every file."""
    data = io.BytesIO()
    folders = sorted({f"{parent}/" for name in files for parent in map(str, Path(name).parents) if parent != "."})
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as packed:
        for folder in folders:
            packed.writestr(folder, b"")
        for name, content in files.items():
            packed.writestr(name, content)
            packed.writestr(f"__MACOSX/{Path(name).parent}/._{Path(name).name}", b"left by macOS")
    return data.getvalue()


def layer_map(found: Deposited) -> bytes:
    """HumanPilot's barcode_level_layer_map.tsv: barcode, section, layer of all sections in one table without a header."""
    lines = [
        f"{spot}\t{name.removeprefix('DLPFC_')}\t{label.replace('Layer', 'L')}\n"
        for name, labels in found.labels.items()
        for spot, label in labels.items()
        if label
    ]
    return "".join(lines).encode()
