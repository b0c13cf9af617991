"""One split's windows in one shuffled order, copied into tars, with an index that lets a reader jump to each.

Each tar is put together in memory, so a pack is opened once a tar however its samples are scattered. ``index.json`` is
written last: where it lies, everything that it names is whole.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from workflow import tar
from workflow.sealed import as_safetensors
from workflow.stats import read_moments, read_vocabulary

FORMAT_VERSION = 1
MB = 10**6
# Settings that the index repeats for the reader.
CARRIED = (
    *("codec", "layout", "pitch_um", "selection", "epsilon", "min_observed", "target_sum"),
    *("seed", "allow_contamination"),
)

SAMPLE_DTYPE = np.dtype(
    [
        ("shard", "<u4"),
        ("slice", "<u4"),
        ("window", "<u4"),
        ("counts_offset", "<u8"),
        ("counts_nbytes", "<u4"),
        ("sites_offset", "<u8"),
        ("sites_nbytes", "<u4"),
        ("json_offset", "<u8"),
        ("json_nbytes", "<u4"),
    ]
)


def permutation(n: int, seed: int, split: str) -> np.ndarray:
    """The order of a split's n samples: a function of (seed, split, n)."""
    key = hashlib.sha256(f"{seed}/shards/{split}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little"))).permutation(n)


def canonical_sha256(value) -> str:
    """sha256 of a value's JSON with sorted keys and without spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_shards(
    folder: str | Path,
    packs: list[tuple[str | Path, str | Path]],
    genes_tsv: str | Path,
    *,
    split: str,
    rows: list[dict[str, str]],
    settings: dict,
    components: str | Path | None = None,
    moments: Sequence[str | Path] = (),
) -> dict:
    """Write a split's folder: tars, ``samples.npy``, ``genes.tsv``, components, means and, last, ``index.json``.

    Parameters
    ----------
    folder
        Of the split; tars of an earlier run are removed first.
    packs
        (pack, index) of each slice (`workflow.windows.write_pack`).
    genes_tsv
        The vocabulary that the samples' indices mean.
    split
        Name of the split.
    rows
        Catalogue row of each slice, in the order of `packs`.
    settings
        The config's keys that shaped the samples.
    components
        The corpus' components, which the folder repeats; none where there are none.
    moments
        Of each slice, in the order of `packs` (`workflow.moments`): its genes' means go into ``means.safetensors``. None: no such file.

    Returns
    -------
    dict
        The content of ``index.json``.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    parts = ("index.json", "components.safetensors", "means.safetensors")
    for stale in [*(folder / name for name in parts), *folder.glob(f"{split}-*.tar")]:
        stale.unlink(missing_ok=True)

    indices = [np.load(index, allow_pickle=False) for _, index in packs]
    n_windows = [len(index) for index in indices]
    order = permutation(sum(n_windows), settings["seed"], split)
    slice_of = np.repeat(np.arange(len(packs)), n_windows)[order]
    window_of = np.concatenate([np.arange(n) for n in n_windows] or [np.zeros(0, dtype=np.int64)])[order]
    nbytes = np.array([indices[s]["nbytes"][w] for s, w in zip(slice_of, window_of, strict=True)], dtype=np.int64)

    samples = np.zeros(len(order), dtype=SAMPLE_DTYPE)
    samples["slice"], samples["window"] = slice_of, window_of
    shards = []
    for first, last in _cut(nbytes, settings["shard_mb"] * MB):
        starts = np.concatenate([[0], nbytes[first:last].cumsum()])
        content = bytearray(int(starts[-1]) + len(tar.END))
        for s in np.unique(slice_of[first:last]):
            here = first + np.flatnonzero(slice_of[first:last] == s)
            index = indices[s][window_of[here]]
            for member in ("counts", "sites", "json"):
                samples[f"{member}_offset"][here] = starts[here - first] + index[f"{member}_offset"]
                samples[f"{member}_nbytes"][here] = index[f"{member}_nbytes"]
            with open(packs[s][0], "rb") as pack:
                for i in np.argsort(index["offset"]):
                    pack.seek(int(index["offset"][i]))
                    start, size = int(starts[here[i] - first]), int(index["nbytes"][i])
                    content[start : start + size] = pack.read(size)
        samples["shard"][first:last] = len(shards)
        name = f"{split}-{len(shards):06d}.tar"
        (folder / name).write_bytes(content)
        shards.append(
            {
                "name": name,
                "samples": int(last - first),
                "bytes": len(content),
                "sha256": hashlib.sha256(content).hexdigest(),
            }
        )

    np.save(folder / "samples.npy", samples, allow_pickle=False)
    shutil.copyfile(genes_tsv, folder / "genes.tsv")
    if components:
        shutil.copyfile(components, folder / "components.safetensors")
    if moments:
        found = {"means": slice_means(read_moments(moments), read_vocabulary(genes_tsv).gene_id)}
        facts = {"format_version": str(FORMAT_VERSION), "genes_sha256": _sha256(genes_tsv)}
        (folder / "means.safetensors").write_bytes(as_safetensors(found, facts))
    made = {"components": bool(components), "means": bool(moments)}
    h, w = settings["window"]
    index = {
        "format_version": FORMAT_VERSION,
        "split": split,
        "m": settings["genes"],
        "h": h,
        "w": w,
        **{key: settings[key] for key in CARRIED},
        "n_samples": len(samples),
        "simulated": any(row["source"] == "simulated" for row in rows),
        "config_sha256": canonical_sha256(settings),
        "catalogue_sha256": canonical_sha256(rows),
        "genes": {
            "file": "genes.tsv",
            "n": len((folder / "genes.tsv").read_text().splitlines()) - 2,
            "sha256": _sha256(folder / "genes.tsv"),
        },
        **{
            name: {"file": f"{name}.safetensors", "sha256": _sha256(folder / f"{name}.safetensors")}
            for name, there in made.items()
            if there
        },
        "samples": {"file": "samples.npy", "sha256": _sha256(folder / "samples.npy")},
        "slices": [
            {**{key: row[key] for key in ("slice", "source", "organism", "donor")}, **_geometry(*pack), "n_windows": n}
            for row, pack, n in zip(rows, packs, n_windows, strict=True)
        ],
        "shards": shards,
    }
    (folder / "index.json").write_text(json.dumps(index, indent=1) + "\n")
    logging.info("%d samples of %d slices in %d tars", len(samples), len(packs), len(shards))
    return index


def slice_means(slices: Iterable[dict], vocabulary: list[str]) -> np.ndarray:
    """Mean normalised expression of each gene over a slice's observed spots, float32 [n_slices, V]; 0 where it was not measured."""
    index, rows = {gene: i for i, gene in enumerate(vocabulary)}, []
    for found in slices:
        row = np.zeros(len(vocabulary))
        at = np.array([index.get(gene, -1) for gene in np.asarray(found["gene_ids"]).tolist()], dtype=int)
        row[at[at >= 0]] = np.asarray(found["sum"])[at >= 0] / found["n_spots"]
        rows.append(row)
    return np.array(rows, dtype=np.float32).reshape(len(rows), len(vocabulary))


def _geometry(pack: str | Path, index: str | Path) -> dict:
    """Layout and pitch of a slice's windows, from the JSON of the first."""
    first = np.load(index, allow_pickle=False)[0]
    with open(pack, "rb") as file:
        file.seek(int(first["offset"]) + int(first["json_offset"]))
        facts = json.loads(file.read(int(first["json_nbytes"])))
    return {"layout": facts["layout"], "pitch_um": facts["pitch_um"]}


def _cut(nbytes: np.ndarray, limit: int) -> list[tuple[int, int]]:
    """(first, last) of each tar: as many samples in order as stay within the limit, at least one."""
    cuts, first, size = [], 0, len(tar.END)
    for i, sample in enumerate(nbytes.tolist()):
        if i > first and size + sample > limit:
            cuts.append((first, i))
            first, size = i, len(tar.END)
        size += sample
    return [*cuts, (first, len(nbytes))] if len(nbytes) else []


def _sha256(path: Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    write_shards(
        Path(snakemake.output.index).parent,
        list(zip(snakemake.input.packs, snakemake.input.indices, strict=True)),
        snakemake.input.genes,
        split=snakemake.wildcards.split,
        rows=snakemake.params.rows,
        settings=dict(snakemake.params.settings),
        components=snakemake.input.components or None,
        moments=snakemake.input.moments,
    )
