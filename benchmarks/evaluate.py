"""Time of evaluating one model on twelve simulated sections of the size of DLPFC's, with the default heads and protocols.

    python benchmarks/evaluate.py [--threads 2] [--parts score cluster]

Sections hold 3,600 to 4,400 spots of seven layers, 8,000 genes of low rank, and embeddings of 256 numbers for a model and
its untrained self: enough for the time, which is all that is told. CPU seconds are those of all threads and processes.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
from scipy import sparse  # noqa: E402
from threadpoolctl import threadpool_limits  # noqa: E402

from workflow.cluster import cluster  # noqa: E402
from workflow.controls import Section, neighbour_mean, neighbours  # noqa: E402
from workflow.score import score  # noqa: E402

N_GENES, N_LATENT, WIDTH, LAYERS = 8000, 20, 256, 7
SHARED = {"seed": 0, "target_sum": 1e4}
PROTOCOLS = ["random20", "blocks", "blocks_buffered", "leave_section", "leave_donor"]


def make(index: int, n_spots: int) -> tuple[Section, np.ndarray]:
    """A simulated section, its layers as bands of a round piece of tissue, and an embedding of its spots."""
    rng, of_all = np.random.default_rng(index), np.random.default_rng(99)
    row, col = (axis.ravel() for axis in np.mgrid[:78, :128])
    array = np.column_stack([row, col])[(row + col) % 2 == 0]
    position = array[:, ::-1] * np.array([50.0, 50 * np.sqrt(3)])
    inside = np.sort(np.argsort(np.linalg.norm(position - position.mean(axis=0), axis=1))[:n_spots])
    array, position = array[inside], position[inside]
    layer = (array[:, 0] * LAYERS // 78).astype(int)
    latent = of_all.normal(size=(LAYERS, N_LATENT))[layer] + rng.normal(size=(n_spots, N_LATENT))
    rate = np.exp(latent @ of_all.normal(size=(N_LATENT, N_GENES)) * 0.1 + of_all.normal(size=N_GENES) - 2.5)
    counts = sparse.csr_matrix(rng.poisson(rate).astype(np.int32))
    section = Section(
        name=f"simulated{index:02d}",
        counts=counts,
        totals=np.asarray(counts.sum(axis=1)).ravel(),
        genes=np.array([f"ENSG{gene:011d}" for gene in range(N_GENES)], dtype=object),
        labels=np.array([f"L{number}" for number in layer], dtype=object),
        lattice="staggered",
        array=array,
        position=position,
        simulated=True,
        donor=f"donor{index // 4}",
    )
    smooth = neighbour_mean(latent, neighbours(section, 6))
    embedding = smooth @ of_all.normal(size=(N_LATENT, WIDTH)) + rng.normal(size=(n_spots, WIDTH))
    return section, embedding.astype(np.float32).astype(np.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=int, default=12)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--parts", nargs="+", choices=["score", "cluster"], default=["score", "cluster"])
    args = parser.parse_args()
    made = [make(index, int(n)) for index, n in enumerate(np.linspace(3600, 4400, args.sections))]
    sections = [section for section, _ in made]
    noise = np.random.default_rng(1)
    embeddings = {
        "untrained": [noise.permuted(x, axis=1) for _, x in made],
        "stpatch": [x for _, x in made],
    }
    print(f"{len(sections)} simulated sections, {sum(section.n_spots for section in sections):,} spots")
    print("| part | wall, s | CPU, s |\n|---|---|---|", flush=True)
    for part in args.parts:
        wall, cpu = time.perf_counter(), sum(os.times()[:4])
        with threadpool_limits(limits=1):
            if part == "score":
                settings = {"heads": ["knn", "logistic"], "protocol_names": PROTOCOLS, "n_splits": 10}
                score("DLPFC12", sections, embeddings, window=(16, 16), threads=args.threads, **settings, **SHARED)
            else:
                methods = ["kmeans", "gmm", "leiden"]
                cluster("DLPFC12", sections, embeddings, clusterers=methods, processes=args.threads, **SHARED)
        print(f"| {part} | {time.perf_counter() - wall:.0f} | {sum(os.times()[:4]) - cpu:.0f} |", flush=True)


if __name__ == "__main__":
    main()
