"""Components of the corpus: gene embeddings may start from them, or consist of them.

*Principal*: the axes of greatest variance of a sample of each training slice's spots, normalised expression about each gene's
training mean; a gene that a slice did not measure counts as at its mean.

*Spatial*: what varies smoothly in space. Of each training slice the leading eigenvectors of the covariance between a spot and
the mean of its adjacent spots (the numerator of Moran's I, for all genes at once; `MULTISPATI <https://doi.org/10.3170/2007-8-18312>`_
without its scaling): the counting noise of two spots is independent, so it drops out of the expectation, and a tissue whose genes vary
little next to those of another keeps axes of its own. The slices' axes are then put together by a singular value decomposition.

Matrices stay sparse: means are subtracted as they are multiplied.
"""

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.sparse as sp
from joblib import Parallel, delayed
from safetensors.numpy import save
from scipy.sparse.linalg import LinearOperator, eigsh, svds
from scipy.spatial import cKDTree
from threadpoolctl import threadpool_limits

from workflow.expression import log_normalise
from workflow.grid import Grid, read_grid
from workflow.lattice import plane
from workflow.stats import Vocabulary, read_vocabulary

FORMAT_VERSION = 1
AXES_OF_SLICE = 16  # spatial ones; more only where a few slices must give all components
LEAST_VARIANCE = 1e-3  # of a gene hardly ever seen: its few values must not become loud
ADJACENT = 1.05  # pitches
SPOTS_PER_BLOCK = 512  # bounds the dense float64 values in memory
NEGLIGIBLE = 1e-6  # of the greatest singular value: rounding, which no two machines share


@dataclass(frozen=True)
class Sample:
    """Spots of one slice: `values` CSR float64 [n, V], normalised expression; `measured` bool [V]."""

    values: sp.csr_matrix
    measured: np.ndarray


def expression(grid: Grid, vocabulary: list[str], cells: np.ndarray, target_sum: float) -> Sample:
    """Normalised expression at these flat cells, as columns of the vocabulary."""
    index = {gene: i for i, gene in enumerate(vocabulary)}
    in_vocabulary = np.array([index.get(gene, -1) for gene in grid.gene_ids])
    columns = np.flatnonzero(in_vocabulary >= 0)
    counts, totals = grid.counts.reshape(-1, len(grid.gene_ids)), grid.total_counts.ravel()
    measured = np.zeros(len(vocabulary), dtype=bool)
    measured[in_vocabulary[columns]] = True
    blocks = [sp.csr_matrix((0, len(vocabulary)))]
    for begin in range(0, len(cells), SPOTS_PER_BLOCK):
        here = cells[begin : begin + SPOTS_PER_BLOCK]
        values = log_normalise(counts[here][:, columns], totals[here, None], target_sum)
        rows, at = values.nonzero()
        where = (rows, in_vocabulary[columns[at]])
        blocks.append(sp.csr_matrix((values[rows, at], where), shape=(len(here), len(vocabulary))))
    return Sample(sp.vstack(blocks, format="csr"), measured)


def counted_cells(grid: Grid) -> np.ndarray:
    """Flat cells that were observed and have a count, ascending."""
    return np.flatnonzero((grid.mask & (grid.total_counts > 0)).ravel())


def variance_of(sample: Sample) -> np.ndarray:
    """Population variance of each gene over the sample's spots, float64 [V]."""
    values = sample.values
    mean = np.asarray(values.mean(axis=0)).ravel()
    return np.maximum(np.asarray(values.multiply(values).mean(axis=0)).ravel() - mean**2, 0.0)


def sample_spots(grid: Grid, vocabulary: list[str], n: int, *, target_sum: float, seed: int) -> Sample:
    """At most `n` of a slice's spots that have a count, drawn by (seed, slice) alone."""
    key = hashlib.sha256(f"{seed}/components/{grid.slice}".encode()).digest()[:16]
    cells = counted_cells(grid)
    drawn = np.sort(np.random.Philox(key=int.from_bytes(key, "little")).random_raw(len(cells)).argsort()[:n])
    return expression(grid, vocabulary, cells[drawn], target_sum)


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
    return upright(axes[order].T), (scale[order] ** 2 / n).astype(np.float32)


def upright(axes: np.ndarray) -> np.ndarray:
    """The same axes [V, k] in float32, of each the entry of the greatest size positive."""
    return (axes * np.sign(axes[np.abs(axes).argmax(axis=0), np.arange(axes.shape[1])])).astype(np.float32)


def adjacent(grid: Grid, cells: np.ndarray) -> sp.csr_matrix:
    """What each cell's adjacent ones (six on a staggered lattice, else four) weigh in their mean: CSR [n, n], rows sum to 1 or 0."""
    kind = "staggered" if grid.lattice.get("kind") == "staggered" and grid.layout != "bin" else "square"
    points = plane(kind, grid.array_row.ravel()[cells], grid.array_col.ravel()[cells])
    pairs = cKDTree(points).query_pairs(ADJACENT, output_type="ndarray")
    ones = np.ones(len(pairs))
    near = sp.coo_matrix((ones, (pairs[:, 0], pairs[:, 1])), shape=(len(cells),) * 2).tocsr()
    near = near + near.T
    return sp.diags_array(1 / np.maximum(np.asarray(near.sum(axis=1)).ravel(), 1)) @ near


def spatial_axes(sample: Sample, near: sp.csr_matrix, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Of one slice, whose spots weigh ``near`` in each other's means (`adjacent`), the leading eigenvectors of S C S.

    C is the covariance of a spot's normalised expression with the mean of its adjacent spots, made symmetric; S = diag(variance^-1/4)
    lets a gene of low variance count for more than its variance and for less than if it were standardised.

    Returns
    -------
    axes, weight
        float64 [V, k], columns of unit length, zero in genes that the slice did not measure; float64 [k], their share of what the k
        eigenvalues sum to. Fewer than k in a slice of fewer spots; only axes of positive eigenvalue.
    """
    values, (n, V) = sample.values, sample.values.shape
    k = min(k, n - 2, int(sample.measured.sum()) - 2)
    if k < 1 or not near.nnz:
        return np.zeros((V, 0)), np.zeros(0)
    mean, variance = np.asarray(values.mean(axis=0)).ravel(), variance_of(sample)
    scale = np.where(sample.measured, np.maximum(variance, LEAST_VARIANCE) ** -0.25, 0.0)
    transposed, near_transposed = values.T.tocsr(), near.T.tocsr()

    def times(vector: np.ndarray) -> np.ndarray:
        scaled = scale * vector.ravel()
        scores = values @ scaled - mean @ scaled
        scores = (near @ scores + near_transposed @ scores) / 2
        return scale * (transposed @ scores - mean * scores.sum()) / n

    covariance = LinearOperator((V, V), matvec=times, dtype=np.float64)
    with threadpool_limits(limits=1):  # sums in the same order on any number of cores
        found, axes = eigsh(covariance, k=k, which="LA", v0=np.ones(V), tol=1e-4)
    least = 1e-9 * (scale**2 @ variance)  # rounding of an eigenvalue of 0, of which few spots leave many
    order = [i for i in np.argsort(-found, kind="stable") if found[i] > least]
    axes = axes[:, order] * scale[:, None]
    return axes / np.linalg.norm(axes, axis=0), found[order] / found[order].sum()


def merge_axes(slices: list[tuple[np.ndarray, np.ndarray, int]], V: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The `k` leading left singular vectors of all slices' axes side by side, each weighing sqrt(share) n^(1/4) of its n spots.

    So a slice of sixteen times the spots counts four times as much in the squares, and no more.
    """
    columns = np.hstack([axes * np.sqrt(share) * n**0.25 for axes, share, n in slices] or [np.zeros((V, 0))])
    k = min(k, *(side - 1 for side in columns.shape))
    if k < 1:
        return np.zeros((V, 0), dtype=np.float32), np.zeros(0, dtype=np.float32)
    with threadpool_limits(limits=1):
        axes, scale, _ = svds(columns, k=k, v0=np.ones(min(columns.shape)), solver="arpack")
    order = [i for i in np.argsort(-scale, kind="stable") if scale[i] > NEGLIGIBLE * scale.max()]
    return upright(axes[:, order]), (scale[order] ** 2 / np.vdot(columns, columns)).astype(np.float32)


def write_components(
    path: str | Path, axes: np.ndarray, explained: np.ndarray, noise: np.ndarray, genes_sha256: str
) -> None:
    """Write ``components.safetensors``; the header in sorted order, since the library's own is random."""
    tensors = {"components": np.ascontiguousarray(axes), "explained_variance": explained, "noise": noise}
    raw = save(tensors, {"format_version": str(FORMAT_VERSION), "genes_sha256": genes_sha256})
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.dumps(json.loads(raw[8:end]), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    Path(path).write_bytes(len(header).to_bytes(8, "little") + header + raw[end:])


def of_slice(
    grid: str | Path, genes: list[str], *, method: str, spots: int, axes: int, target_sum: float, seed: int
) -> tuple[object, np.ndarray, np.ndarray]:
    """What `components` takes from one slice: its sample of `spots` spots, or its `axes` spatial axes; variance; what it measured."""
    grid = read_grid(grid)
    if method == "principal":
        sample = sample_spots(grid, genes, spots, target_sum=target_sum, seed=seed)
        return sample, variance_of(sample), sample.measured
    cells = counted_cells(grid)
    sample = expression(grid, genes, cells, target_sum)
    found = *spatial_axes(sample, adjacent(grid, cells), axes), len(cells)
    return found, variance_of(sample), sample.measured


def components(
    grids: list[str | Path],
    vocabulary: Vocabulary,
    *,
    method: str,
    k: int,
    spots: int,
    target_sum: float,
    seed: int,
    threads: int = 1,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``components``, ``explained_variance`` and ``noise`` of docs/format.md; `threads` grids in memory at a time.

    Parameters
    ----------
    method
        ``principal``: `principal_axes` of at most `spots` spots, as many of each slice. ``spatial``: `spatial_axes` of every slice, put
        together; the second array is then the share of each in what all slices' axes hold.
    threads
        Processes that look at slices; the same numbers whatever it is.
    """
    genes, found = vocabulary.gene_id, []
    how = {"method": method, "spots": max(2, spots // max(1, len(grids))), "target_sum": target_sum, "seed": seed}
    how["axes"] = max(AXES_OF_SLICE, -(-k // max(1, len(grids))) + 1)
    within, measured = np.zeros((2, len(genes)))
    in_order = Parallel(threads, return_as="generator", pre_dispatch=2 * threads)
    for grid, (one, variance, known) in zip(
        grids, in_order(delayed(of_slice)(g, genes, **how) for g in grids), strict=True
    ):
        found.append(one)
        within += variance
        measured += known
        logging.info("%s: %d of %d", Path(grid).stem, len(found), len(grids))
    noise = (within / np.maximum(measured, 1)).astype(np.float32)
    if method == "principal":
        return *principal_axes(found, vocabulary.mean, k), noise
    return *merge_axes(found, len(genes), k), noise


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    genes = Path(snakemake.input.genes)
    params = snakemake.params
    axes, explained, noise = components(
        snakemake.input.grids,
        read_vocabulary(genes),
        method=params.method,
        k=params.k,
        spots=params.spots,
        target_sum=params.target_sum,
        seed=params.seed,
        threads=snakemake.threads,
    )
    write_components(snakemake.output[0], axes, explained, noise, hashlib.sha256(genes.read_bytes()).hexdigest())
    logging.info("%d %s components of %d slices", len(explained), params.method, len(snakemake.input.grids))
