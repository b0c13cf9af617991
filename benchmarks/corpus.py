"""A split of shards, and the grid it was cut from, for the benchmarks: made by the pipeline's own functions, without Snakemake."""

from __future__ import annotations

import math
import sys
import warnings
from pathlib import Path

import anndata
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from workflow.curate import curate  # noqa: E402
from workflow.grid import Grid, make_grid, write_grid  # noqa: E402
from workflow.moments import moments  # noqa: E402
from workflow.sample import Field  # noqa: E402
from workflow.shards import write_shards  # noqa: E402
from workflow.simulate import tiny_slice  # noqa: E402
from workflow.stats import merge_moments, write_vocabulary  # noqa: E402
from workflow.windows import write_pack  # noqa: E402

SETTINGS = {
    "window": [16, 16],
    "genes": 512,
    "selection": "weighted",
    "epsilon": 1e-6,
    "min_observed": 0.5,
    "target_sum": 1e4,
    "layout": "auto",
    "pitch_um": 100,
    "seed": 0,
    "shard_mb": 64,
    "allow_contamination": False,
}


def load(path: str | None, organism: str) -> anndata.AnnData:
    """A curated slice: read, curated on the spot, or (without a path) simulated in the size of a Visium slice."""
    if path is None:
        return tiny_slice(n_genes=12_000, shape=(78, 128), median_depth=3500.0, name="simulated")
    with warnings.catch_warnings(action="ignore"):
        adata = anndata.read_h5ad(path)
        if "stpatch" in adata.uns:
            return adata
        row = {"slice": Path(path).stem, "url": str(path), "format": "h5ad", "organism": organism}
        return curate(row, ROOT / "catalogue/aux", files=[Path(path)])


def build(folder: Path, adata: anndata.AnnData, n_windows: int, codec: str = "lz4", **changes) -> Grid:
    """Write `folder/train` (shards), `folder/grid.zarr` and `folder/genes.tsv` of one slice; return its grid."""
    settings = SETTINGS | {"codec": codec, "windows_per_slice": n_windows} | changes
    grid = make_grid(adata, settings["layout"], settings["pitch_um"])
    write_grid(grid, folder / "grid.zarr")
    symbols = adata.var["symbol"].astype(str).reindex(grid.gene_ids.astype(object))
    facts = {"gene_ids": np.array(list(grid.gene_ids), dtype=str), "symbols": np.array(list(symbols), dtype=str)}
    vocabulary = merge_moments([facts | moments(grid, settings["target_sum"])])
    write_vocabulary(vocabulary, folder / "genes.tsv")
    pack, index = folder / "pack.bin", folder / "pack.npy"
    write_pack(
        Field(grid, vocabulary.gene_id, settings["window"], settings["target_sum"]),
        {"pitch_um": None if math.isnan(grid.pitch_um) else grid.pitch_um, "layout": grid.layout},
        pack,
        index,
        n=n_windows,
        m=settings["genes"],
        codec_name=codec,
        **{name: settings[name] for name in ("selection", "epsilon", "min_observed", "seed")},
    )
    source = "simulated" if grid.slice == "simulated" else "file"
    row = {"slice": grid.slice, "source": source, "organism": "", "donor": ""}
    write_shards(folder / "train", [(pack, index)], folder / "genes.tsv", split="train", rows=[row], settings=settings)
    pack.unlink()
    index.unlink()
    return grid
