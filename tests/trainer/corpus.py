"""A tiny simulated corpus in the shards' format, written without the pipeline: the trainer's tests need only docs/format.md.

Planted structure: expression is of low rank. Every site has a few smooth factors, every gene loads on them, so that a
hidden entry can be told from the visible genes of its site and its neighbours.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from pathlib import Path

import numpy as np
from numcodecs import Blosc
from safetensors.numpy import save

BLOSC = Blosc("lz4", shuffle=Blosc.BITSHUFFLE)
BLOSC4 = Blosc("lz4", shuffle=Blosc.SHUFFLE)
SAMPLE = [
    ("shard", "<u4"), ("slice", "<u4"), ("window", "<u4"),
    ("counts_offset", "<u8"), ("counts_nbytes", "<u4"), ("sites_offset", "<u8"), ("sites_nbytes", "<u4"),
    ("json_offset", "<u8"), ("json_nbytes", "<u4"),
]  # fmt: skip
TARGET_SUM = 10000.0


class Tissue:
    """Simulated slices that share gene programmes: ``counts`` [n_genes, H, W], ``totals`` [H, W], ``cell`` [n_spots]."""

    def __init__(self, n_genes: int = 60, rank: int = 3, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        self.loadings = rng.normal(0, 1.0, (n_genes, rank))
        self.base = rng.normal(-1, 1.0, n_genes)

    def slice(self, H: int, W: int, seed: int, holes: float = 0.1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:H, :W] / 2.5
        angle = rng.uniform(0, 2 * np.pi, (2, self.loadings.shape[1], 1, 1))
        factors = np.sin(y * np.cos(angle[0]) + x * np.sin(angle[0]) + angle[1])  # [rank, H, W]
        rate = np.exp(self.base[:, None, None] + np.einsum("gr,ryx->gyx", self.loadings, factors))
        rate *= 1500 / rate.sum(0) * rng.lognormal(0, 0.3, (H, W))
        counts = rng.poisson(rate).astype(np.uint16)
        observed = rng.random((H, W)) >= holes
        counts[:, ~observed] = 0
        cell = rng.permutation(np.flatnonzero(observed)).astype(np.int32)  # spots come in any order
        return counts, counts.sum(0).astype(np.float32), cell


def blosc(array: np.ndarray, codec: Blosc = BLOSC) -> bytes:
    return bytes(codec.encode(np.ascontiguousarray(array)))


def sites(genes: np.ndarray, totals: np.ndarray) -> bytes:
    return blosc(np.concatenate([genes.astype("<i4"), totals.astype("<f4").ravel().view("<i4")]), BLOSC4)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def expression(slices: list[tuple]) -> list[np.ndarray]:
    """Normalised expression [n_genes, n_spots] of each slice."""
    seen = [totals > 0 for _, totals, _ in slices]
    return [
        np.log1p(counts[:, at] * (TARGET_SUM / totals[at]))
        for (counts, totals, _), at in zip(slices, seen, strict=True)
    ]


def vocabulary(slices: list[tuple]) -> bytes:
    """``genes.tsv`` of these training slices."""
    values = np.concatenate(expression(slices), axis=1)
    rows = ["# stpatch genes 1", "index\tgene_id\tsymbol\tn_slices\tn_spots\tmean\tvariance"]
    for k, row in enumerate(values):
        mean, variance = float(row.mean()), float(row.var())
        rows.append(f"{k}\tENSG{k:011d}\tG{k}\t{len(slices)}\t{len(row)}\t{mean!r}\t{variance!r}")
    return ("\n".join(rows) + "\n").encode()


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> list[int]:
    """Write the members; returns where the data of each begin."""
    with tarfile.open(file, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    with tarfile.open(file) as tar:
        return [member.offset_data for member in tar]


def write_split(
    folder: Path, split: str, slices: list[tuple], genes_tsv: bytes, n_windows: int, m: int, h: int, w: int,
    seed: int = 0, per_shard: int = 25, min_observed: float = 0.5,
) -> Path:  # fmt: skip
    """``n_windows`` windows of each slice, shuffled, in tars of ``per_shard`` samples."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    n_genes = len(slices[0][0]) if slices else 0
    todo = rng.permutation([(s, i) for s in range(len(slices)) for i in range(n_windows)]) if slices else []
    rows, shards = [], []
    for shard, begin in enumerate(range(0, len(todo), per_shard)):
        members, labels = [], []
        for s, window in todo[begin : begin + per_shard]:
            counts, totals, _ = slices[s]
            while True:
                y, x = (int(rng.integers(0, n - size + 1)) for n, size in zip(totals.shape, (h, w), strict=True))
                crop = np.s_[y : y + h, x : x + w]
                if (totals[crop] > 0).mean() >= min_observed:
                    break
            genes = np.sort(rng.choice(n_genes, m, replace=False))
            name = f"{split}{s}"
            facts = {"slice": name, "window": int(window), "y": y, "x": x, "h": h, "w": w, "m": m}
            facts |= {
                "array_row": y,
                "array_col": x,
                "array_rows": [*range(y, y + h)],
                "array_cols": [*range(x, x + w)],
            }
            facts |= {"pitch_um": 100.0, "layout": "offset"}
            key = f"{name}_{window:06d}"
            members += [
                (f"{key}.counts.blosc", blosc(counts[genes][(slice(None), *crop)])),
                (f"{key}.sites.blosc", sites(genes, totals[crop])),
                (f"{key}.json", json.dumps(facts).encode()),
            ]
            labels.append((s, window))
        name = f"{split}-{shard:06d}.tar"
        offsets = write_tar(folder / name, members)
        lengths = [len(content) for _, content in members]
        for i, (s, window) in enumerate(labels):
            where = [number for k in range(3 * i, 3 * i + 3) for number in (offsets[k], lengths[k])]
            rows.append((shard, s, window, *where))
        content = (folder / name).read_bytes()
        shards.append({"name": name, "samples": len(labels), "bytes": len(content), "sha256": sha256(content)})
    np.save(folder / "samples.npy", np.array(rows, dtype=SAMPLE))
    (folder / "genes.tsv").write_bytes(genes_tsv)
    index = {
        "format_version": 1, "split": split, "m": m, "h": h, "w": w, "codec": "lz4", "layout": "auto",
        "pitch_um": 100, "allow_contamination": False, "selection": "random", "epsilon": 1e-6, "min_observed": min_observed, "target_sum": TARGET_SUM, "seed": seed,
        "n_samples": len(rows), "simulated": True, "config_sha256": "", "catalogue_sha256": "",
        "genes": {"file": "genes.tsv", "n": n_genes, "sha256": sha256(genes_tsv)},
        "samples": {"file": "samples.npy", "sha256": sha256((folder / "samples.npy").read_bytes())},
        "slices": [
            {"slice": f"{split}{s}", "source": "simulated", "organism": "human", "donor": f"d{s}", "layout": "offset",
             "pitch_um": 100.0, "n_windows": n_windows}
            for s in range(len(slices))
        ],
        "shards": shards,
    }  # fmt: skip
    (folder / "index.json").write_text(json.dumps(index))
    return folder


def add_part(folder: Path, part: str, tensors: dict[str, np.ndarray], **metadata: str) -> Path:
    """Put ``{part}.safetensors`` beside the index, which vouches for it."""
    file, index = folder / f"{part}.safetensors", json.loads((folder / "index.json").read_text())
    file.write_bytes(save(tensors, metadata))
    index[part] = {"file": file.name, "sha256": sha256(file.read_bytes())}
    (folder / "index.json").write_text(json.dumps(index))
    return file


def add_components(folder: Path, axes: np.ndarray, noise: np.ndarray | None = None) -> Path:
    """Components [n_genes, k] of the folder's vocabulary; noise 1 of each gene unless given."""
    noise = np.ones(len(axes)) if noise is None else noise
    tensors = {"components": axes.astype(np.float32), "noise": noise.astype(np.float32)}
    return add_part(
        folder, "components", tensors, format_version="1", genes_sha256=sha256((folder / "genes.tsv").read_bytes())
    )


def add_means(folder: Path, slices: list[tuple]) -> Path:
    """Means of these slices, those of the index."""
    means = np.array([values.mean(1) for values in expression(slices)], np.float32)
    return add_part(folder, "means", {"means": means}, format_version="1")


def write_whole(
    file: Path, counts: np.ndarray, totals: np.ndarray, cell: np.ndarray, genes_tsv: bytes, genes=None, **more
) -> Path:
    """A whole slice; ``genes`` names the rows of the vocabulary that it measured (default: all), ``more`` other facts."""
    genes = np.arange(len(counts)) if genes is None else genes
    name, (m, h, w) = file.stem, counts.shape
    facts = {"slice": name, "window": 0, "y": 0, "x": 0, "h": h, "w": w, "m": m, "array_row": 0, "array_col": 0}
    facts |= {"array_rows": [*range(h)], "array_cols": [*range(w)], "pitch_um": 100.0, "layout": "offset"}
    facts |= {"genes_sha256": sha256(genes_tsv), "target_sum": TARGET_SUM, "format_version": 1, "simulated": True}
    facts |= more
    file.parent.mkdir(parents=True, exist_ok=True)
    members = [
        (f"{name}.counts.blosc", blosc(counts)),
        (f"{name}.sites.blosc", sites(genes, totals)),
        (f"{name}.json", json.dumps(facts).encode()),
        (f"{name}.cell.blosc", blosc(cell, BLOSC4)),
    ]
    write_tar(file, members)
    return file
