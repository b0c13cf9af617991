"""The smallest corpus that goes through every stage up to an annotated slice, and the one number that says what came out. All simulated."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import yaml

from tests.conftest import ROOT
from workflow.catalogue import columns
from workflow.simulate import choose_genes, tiny_slice

TARGETS = ("data", "results/pretrain/model/model.safetensors", "results/annotated/tiny_a.h5ad")
CLOCK = {"seconds", "patches_per_s", "data_wait", "peak_memory_mb", "mfu"}  # of a line of metrics.jsonl
CONFIG = {
    "catalogue": "slices.tsv",
    "downstream": "evaluated.tsv",
    "window": [8, 8],
    "genes": 24,
    "windows_per_slice": 24,
    "max_coverage": 0,
    "min_genes": 0,
    "components": 8,
    "component_spots": 50,
    "shard_mb": 1,
    "min_free_gb": -1000,
    "pretrain": {
        "config": str(ROOT / "trainer/configs/demo.yaml"),
        **{"steps": 6, "batch_size": 8, "width": 16, "depth": 1, "heads": 2, "feed_forward": 16, "decoder_width": 16},
        **{"val_every": 3, "val_samples": 8, "log_every": 1, "snapshot_every": 1},
    },
}
ROWS = (
    {"slice": "tiny_a", "split": "train", "source": "file", "url": "tiny_a.h5ad", "format": "h5ad"},
    {"slice": "tiny_b", "split": "train", "source": "file", "url": "tiny_b.h5ad", "format": "h5ad"},
    {
        "slice": "sim_c",
        "split": "val",
        "source": "simulated",
        "accession": "cellxgene?n_genes=60",
        "format": "cellxgene",
    }
    | {"url": "resources/simulated/sim_c", "donor": "sim_c"},
)


def write_corpus(folder: Path) -> None:
    """Catalogue, config and two small files of simulated counts; the third slice is simulated by the pipeline itself."""
    folder.mkdir(parents=True, exist_ok=True)
    genes, _ = choose_genes(ROOT / "catalogue/aux/genes_human.tsv", 60)  # those of the simulated slice
    for seed, name in enumerate(("tiny_a", "tiny_b")):
        made = tiny_slice(seed=seed, name=name)
        made.var_names = genes
        del made.uns["stpatch"]
        made.write_h5ad(folder / f"{name}.h5ad")
    blank = dict.fromkeys(columns(), "") | {"dataset": "Simulated", "organism": "human", "evidence": "simulated"}
    lines = ["\t".join(columns()), *("\t".join((blank | row).values()) for row in ROWS)]
    (folder / "slices.tsv").write_text("\n".join(lines) + "\n")
    (folder / "evaluated.tsv").write_text(lines[0] + "\n")
    (folder / "tiny.yaml").write_text(yaml.safe_dump(CONFIG))


def final_files(results: Path) -> dict[str, str]:
    """sha256 of every file that a finished run leaves, but for logs, benchmarks and what tells the time or how often it was resumed."""
    found = {}
    for path in sorted(results.rglob("*")):
        name = str(path.relative_to(results))
        if path.is_file() and path.name != ".snakemake_timestamp" and not name.startswith(("logs/", "benchmarks/")):
            found[name] = hashlib.sha256(_without_clock(path)).hexdigest()
    return found


def manifest(results: Path) -> str:
    """One sha256 over the names and hashes of `final_files`."""
    return hashlib.sha256(json.dumps(final_files(results)).encode()).hexdigest()


def _without_clock(path: Path) -> bytes:
    content = path.read_bytes()
    if path.parent.parent.name != "pretrain":
        return content
    if path.name == "metrics.jsonl":
        lines = [json.loads(line) for line in content.splitlines()]
        return json.dumps([{key: line[key] for key in line if key not in CLOCK} for line in lines]).encode()
    if path.name == "config.json":
        facts = json.loads(content)
        del facts["run"]["resumed"]
        return json.dumps(facts).encode()
    return content
