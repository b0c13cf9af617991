"""What the tests of the download rule share: files in the sources' forms, and a row that asks for them."""

from __future__ import annotations

import hashlib
import io
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np

from workflow.download import fetch_slice
from workflow.lock import Lock


def h5(seed: int = 0, n: int = 1_000_000) -> bytes:
    """A whole HDF5 file of about `n` bytes."""
    packed = io.BytesIO()
    with h5py.File(packed, "w") as file:
        file["noise"] = np.random.default_rng(seed).integers(0, 256, n, dtype=np.uint8)
    return packed.getvalue()


BODY = h5()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def row(server, *paths: str, **columns: str) -> dict[str, str]:
    blank = {"slice": "s1", "sha256": "", "bytes": "", "format": "h5ad", "labels": ""}
    return blank | {"url": " ".join(server.base + path for path in paths or ("/a.h5ad",))} | columns


def lock(folder: Path) -> Lock:
    return Lock("s1", folder.with_name(f"{folder.name}.lock.tsv"), [])


def get(row, folder, **options):
    return fetch_slice(row, folder, lock(folder), backoff=0.01, **options)


def files_below(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def archive(*members: tuple[str, bytes | tarfile.TarInfo]) -> bytes:
    """A tar.gz."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


def zipped(*members: tuple[str | zipfile.ZipInfo, bytes]) -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return packed.getvalue()


POSITIONS = b"AAACAAGTATCTCCCA-1,1,50,102,7237,8479\n"
SPATIAL = archive(
    ("spatial/tissue_hires_image.png", b"\x89PNG" * 1000),
    ("spatial/._tissue_positions_list.csv", b"AppleDouble"),
    ("spatial/tissue_positions_list.csv", POSITIONS),
    ("spatial/scalefactors_json.json", b'{"spot_diameter_fullres": 96.4}'),
)
# A Space Ranger folder, and what a reader needs of it.
WHOLE = [
    ("S1/outs/filtered_feature_bc_matrix.h5", BODY),
    ("S1/outs/raw_feature_bc_matrix.h5", h5(3, 1000)),
    ("S1/outs/._filtered_feature_bc_matrix.h5", b"AppleDouble"),
    ("S1/outs/spatial/tissue_positions.csv", POSITIONS),
    ("S1/outs/spatial/scalefactors_json.json", b'{"spot_diameter_fullres": 96.4}'),
    ("S1/outs/spatial/tissue_hires_image.png", b"\x89PNG"),
    ("S1/outs/web_summary.html", b"<html>"),
]
PLACES = {
    "outs/filtered_feature_bc_matrix.h5": BODY,
    "outs/spatial/tissue_positions.csv": POSITIONS,
    "outs/spatial/scalefactors_json.json": b'{"spot_diameter_fullres": 96.4}',
}
