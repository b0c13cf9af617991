"""Embeddings go back to the spots they belong to, in ``obsm["X_stpatch"]``.

In the pipeline the embedding is already there. For a file of one's own, one command takes it the whole way:

    python -m workflow.annotate --model results/pretrain/model --h5ad mine.h5ad --out mine.stpatch.h5ad

curates the slice, lays it on its grid, runs ``python -m trainer.embed`` and writes a copy of the file with the new field.
Spots off the tissue get NaN. Nothing else in the file changes.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import anndata as ad
import h5py
import numpy as np

from workflow.catalogue import columns
from workflow.child import HEADROOM, confined
from workflow.curate import curate, rejected, write_slice
from workflow.errors import DamagedFile, SliceError, Unreadable
from workflow.grid import make_grid
from workflow.keys import Keys
from workflow.reading import read_slice, read_tensors, seal
from workflow.stats import read_vocabulary
from workflow.whole import whole_slice

ROOT = Path(__file__).resolve().parent.parent
TRAINER_FLAGS = ("stride", "genes", "batch-size", "device")  # handed on to trainer.embed


def read_embedding(path, n_spots: int, slice: str) -> np.ndarray:
    """Embedding of every spot, float32 [n_spots, d], in the order of the curated slice.

    Raises
    ------
    DamagedFile
        The file does not hold each of the slice's spots once.
    """
    X, spot, _ = read_tensors(path)
    if not np.array_equal(np.sort(spot), np.arange(n_spots)):
        raise DamagedFile(
            slice=slice,
            file=str(path),
            found=f"embeddings of {len(np.unique(spot))} spots",
            expected=f"one of each of the {n_spots} observed spots",
            next_step="delete the file and run again",
        )
    ordered = np.empty_like(X)
    ordered[spot] = X
    return ordered


def read_model(model: Path) -> dict:
    """Facts of the data that a model was trained on (``data`` of its ``config.json``).

    Raises
    ------
    FileNotFoundError
        Not a finished model folder; says what to do.
    """
    for name in ("config.json", "genes.tsv", "model.safetensors"):
        if not (model / name).is_file():
            raise FileNotFoundError(
                f"{model}: found no {name}; expected a finished model folder. Next step: name the folder that "
                "trainer.pretrain wrote (results/pretrain/model after `snakemake pretrain`)"
            )
    return json.loads((model / "config.json").read_text())["data"]


def apart(work, h5ad: Path) -> None:
    """Run ``work()``, which reads a file of the user's, in a process of its own that may take all of this machine's memory.

    Raises
    ------
    Unreadable
        The file brought that process down.
    """
    memory_mb = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // (HEADROOM * 2**20)
    if why := confined(work, memory_mb):
        raise Unreadable(
            slice=h5ad.stem,
            file=str(h5ad),
            found=why,
            expected="an h5ad that this machine can read",
            next_step="write it anew with anndata, or use a machine with more memory",
        )


def curated_apart(row: dict[str, str], h5ad: Path, folder: Path):
    """The curated slice of `h5ad`, by a process of its own.

    Raises
    ------
    SliceError
        The file can't be used.
    """
    out = folder / "curated.h5ad"

    def work() -> None:
        try:
            slice = curate(row, ROOT / "catalogue/aux", files=[h5ad])
        except SliceError as error:
            slice = rejected(row, error)
        write_slice(slice, out)

    apart(work, h5ad)
    slice = read_slice(out)
    if reason := slice.uns[Keys.STPATCH].get(Keys.QUARANTINE):
        raise SliceError.from_row(reason)
    return slice


def write_annotated(h5ad: Path, out: Path, X: np.ndarray, spots: list[str]) -> int:
    """Write a copy of `h5ad` with the embedding ``X`` of these spots, NaN for the others, whole or not at all; how many there are."""
    part = out.with_name(out.name + ".part")

    def work() -> None:
        mine = ad.read_h5ad(h5ad)
        embedding = np.full((mine.n_obs, X.shape[1]), np.nan, dtype=np.float32)
        embedding[mine.obs_names.get_indexer(spots)] = X
        mine.obsm[Keys.EMBEDDING] = embedding
        mine.write_h5ad(part, convert_strings_to_categoricals=False)

    apart(work, h5ad)
    os.replace(part, out)
    with h5py.File(out) as file:
        return len(file["obsm"][Keys.EMBEDDING])


def embed_file(model: Path, h5ad: Path, organism: str, trainer_flags: list[str]) -> tuple[np.ndarray, list[str]]:
    """Embed a slice that is in no catalogue, on a grid of the layout that the model was trained on.

    Returns
    -------
    X, spots
        float32 [n, d] of the spots in tissue, and their names.

    Raises
    ------
    SliceError
        The file can't be used (`workflow.curate`, `workflow.layout.place`).
    FileNotFoundError
        `model` is no finished model folder.
    subprocess.CalledProcessError
        The trainer refused; its message is on stderr.
    """
    data = read_model(model)
    blank = dict.fromkeys(columns(), "")
    name = "".join(c if c.isalnum() or c in "-_" else "_" for c in h5ad.stem)
    row = {**blank, "slice": name, "source": "file", "url": str(h5ad), "format": "h5ad", "organism": organism}
    genes = model / "genes.tsv"
    vocabulary = read_vocabulary(genes).gene_id
    with tempfile.TemporaryDirectory() as folder:
        slice = curated_apart(row, h5ad, Path(folder))
        shared = len(set(slice.var_names) & set(vocabulary))
        print(
            f"{slice.n_obs} spots in tissue; {shared} of {slice.n_vars} genes are among the model's {len(vocabulary)}"
        )
        content = whole_slice(
            make_grid(slice, data["layout"], data["pitch_um"]),
            vocabulary,
            genes_sha256=hashlib.sha256(genes.read_bytes()).hexdigest(),
            target_sum=data["target_sum"],
            codec_name="lz4",
            simulated=False,
        )
        tar, out = Path(folder) / f"{name}.tar", Path(folder) / f"{name}.safetensors"
        tar.write_bytes(content)
        command = [sys.executable, "-m", "trainer.embed", "--model", model.resolve(), "--shards", tar, "--out", out]
        subprocess.run([*map(str, command), *trainer_flags], check=True, cwd=ROOT)
        return read_embedding(out, slice.n_obs, name), list(slice.obs_names)


def main(argv: list[str] | None = None) -> None:
    """Command line: see the module's first lines."""
    parser = argparse.ArgumentParser(
        prog="python -m workflow.annotate",
        description='Writes a copy of an h5ad with an embedding of every observed spot in obsm["X_stpatch"].',
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="model folder of a pretraining run")
    parser.add_argument("--h5ad", type=Path, required=True, metavar="FILE", help="raw counts of one Visium section")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="the annotated copy")
    parser.add_argument("--organism", choices=["human", "mouse"], default="human")
    for flag in TRAINER_FLAGS:
        parser.add_argument(f"--{flag}", metavar="X", help="as in `python -m trainer.embed --help`")
    arguments = parser.parse_args(argv)
    given = {flag: getattr(arguments, flag.replace("-", "_")) for flag in TRAINER_FLAGS}
    trainer_flags = [f"--{flag}={value}" for flag, value in given.items() if value is not None]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    try:
        X, spots = embed_file(arguments.model, arguments.h5ad, arguments.organism, trainer_flags)
        n_spots = write_annotated(arguments.h5ad, arguments.out, X, spots)
    except (SliceError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(error.returncode)
    print(f"{arguments.out}: {len(X)} of {n_spots} spots have {X.shape[1]} numbers in obsm['{Keys.EMBEDDING}']")


if __name__ == "__main__":
    if "snakemake" in globals():
        from workflow.logs import log_to

        log_to(snakemake.log[0])
        slice = read_slice(snakemake.input.slice)
        name = str(slice.uns[Keys.STPATCH]["slice"])
        slice.obsm[Keys.EMBEDDING] = read_embedding(snakemake.input.embedding, slice.n_obs, name)
        slice.write_h5ad(
            snakemake.output[0], compression="gzip", compression_opts=1, convert_strings_to_categoricals=False
        )
        seal(snakemake.output[0])
    else:
        main()
