"""The corpus' principal axes: gene embeddings may start from them.

Of a sample of each training slice's spots, normalised expression about each gene's training mean; a gene that a slice
did not measure counts as at its mean. The matrix stays sparse: the means are subtracted as it is multiplied.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from safetensors.numpy import save
from scipy.sparse.linalg import LinearOperator, svds
from threadpoolctl import threadpool_limits

from workflow.expression import log_normalise
from workflow.grid import Grid, read_grid
from workflow.stats import Vocabulary, read_vocabulary

FORMAT_VERSION = 1


@dataclass(frozen=True)
class Sample:
    """Spots of one slice: `values` CSR float64 [n, V], normalised expression; `measured` bool [V]."""

    values: sp.csr_matrix
    measured: np.ndarray


def sample_spots(grid: Grid, vocabulary: list[str], n: int, *, target_sum: float, seed: int) -> Sample:
    """At most `n` of a slice's spots that have a count, drawn by (seed, slice) alone."""
    key = hashlib.sha256(f"{seed}/components/{grid.slice}".encode()).digest()[:16]
    cells = np.flatnonzero((grid.mask & (grid.total_counts > 0)).ravel())
    drawn = np.sort(np.random.Philox(key=int.from_bytes(key, "little")).random_raw(len(cells)).argsort()[:n])
    index = {gene: i for i, gene in enumerate(vocabulary)}
    in_vocabulary = np.array([index.get(gene, -1) for gene in grid.gene_ids])
    columns = np.flatnonzero(in_vocabulary >= 0)
    counts = grid.counts.reshape(-1, len(grid.gene_ids))[cells[drawn]][:, columns]
    values = log_normalise(counts, grid.total_counts.ravel()[cells[drawn], None], target_sum)
    measured = np.zeros(len(vocabulary), dtype=bool)
    measured[in_vocabulary[columns]] = True
    rows, at = values.nonzero()
    where = (rows, in_vocabulary[columns[at]])
    return Sample(sp.csr_matrix((values[rows, at], where), shape=(len(drawn), len(vocabulary))), measured)


def principal_axes(samples: list[Sample], mean: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `k` principal axes of all spots, by Lanczos iteration from a fixed start.

    Parameters
    ----------
    samples
        Of each slice.
    mean
        float64 [V]: of each gene, subtracted where it was measured.
    k
        Fewer come back where there are fewer spots or genes than k + 1.

    Returns
    -------
    axes, explained
        float32 [V, k], columns of unit length by descending variance, the entry of the greatest size positive;
        float32 [k], the variance along each (mean square over the spots).
    """
    n, V = sum(sample.values.shape[0] for sample in samples), len(mean)
    k = min(k, n - 1, V - 1)
    if k < 1:
        return np.zeros((V, 0), dtype=np.float32), np.zeros(0, dtype=np.float32)
    values = sp.vstack([sample.values for sample in samples], format="csr")
    slice_of = np.repeat(np.arange(len(samples)), [sample.values.shape[0] for sample in samples])
    means = np.array([sample.measured * mean for sample in samples])  # [slices, V]

    def times(vector: np.ndarray) -> np.ndarray:
        return values @ vector.ravel() - (means @ vector.ravel())[slice_of]

    def transposed_times(vector: np.ndarray) -> np.ndarray:
        of_slice = np.bincount(slice_of, weights=vector.ravel(), minlength=len(samples))
        return values.T @ vector.ravel() - of_slice @ means

    centred = LinearOperator((n, V), matvec=times, rmatvec=transposed_times, dtype=np.float64)
    with threadpool_limits(limits=1):  # sums in the same order on any number of cores
        _, scale, axes = svds(centred, k=k, v0=np.ones(min(n, V)), solver="arpack")
    order = np.argsort(-scale, kind="stable")
    axes, explained = axes[order].T, scale[order] ** 2 / n
    axes = axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(k)])
    return axes.astype(np.float32), explained.astype(np.float32)


def write_components(path: str | Path, axes: np.ndarray, explained: np.ndarray, genes_sha256: str) -> None:
    """Write ``components.safetensors``; the header in sorted order, since the library's own is random."""
    tensors = {"components": np.ascontiguousarray(axes), "explained_variance": explained}
    raw = save(tensors, {"format_version": str(FORMAT_VERSION), "genes_sha256": genes_sha256})
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


def components(
    grids: list[str | Path], vocabulary: Vocabulary, *, k: int, spots: int, target_sum: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """`principal_axes` of at most `spots` spots, as many of each of the slices whose grids lie there; one grid in memory."""
    draw = {"n": max(2, spots // max(1, len(grids))), "target_sum": target_sum, "seed": seed}
    samples = [sample_spots(read_grid(grid), vocabulary.gene_id, **draw) for grid in grids]
    return principal_axes(samples, vocabulary.mean, k)


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    genes = Path(snakemake.input.genes)
    params = snakemake.params
    axes, explained = components(
        snakemake.input.grids,
        read_vocabulary(genes),
        k=params.k,
        spots=params.spots,
        target_sum=params.target_sum,
        seed=params.seed,
    )
    write_components(snakemake.output[0], axes, explained, hashlib.sha256(genes.read_bytes()).hexdigest())
    logging.info("%d components of %d slices explain %.4g", len(explained), len(snakemake.input.grids), explained.sum())
