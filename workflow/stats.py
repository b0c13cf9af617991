"""The vocabulary: every gene that a training slice measured, with its mean and variance over those slices."""

import logging
import math
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

HEADER = "# stpatch genes 1"
COLUMNS = ("index", "gene_id", "symbol", "n_slices", "n_spots", "mean", "variance")


@dataclass(frozen=True)
class Vocabulary:
    """Rows of ``stats/genes.tsv``; the position in each array [V] is the gene's index."""

    gene_id: list[str]
    symbol: list[str]
    n_slices: np.ndarray
    n_spots: np.ndarray
    mean: np.ndarray
    variance: np.ndarray


def merge_moments(slices: list[dict]) -> Vocabulary:
    """Mean and population variance of each gene over all slices that measured it.

    With n_s, m_s and M_s of slice s (spots, mean, centred sum of squares), N = sum n_s and mean = sum(n_s m_s) / N,

        N variance = sum_s M_s + sum_s n_s (m_s - mean)^2.

    The sums over slices are exact before they are rounded (`math.fsum`), so the order of slices changes no bit.

    Parameters
    ----------
    slices
        ``gene_ids``, ``symbols``, ``n_spots``, ``sum``, ``m2`` of each (`workflow.moments`).
    """
    genes = sorted({str(gene) for slice in slices for gene in slice["gene_ids"]})
    index = {gene: i for i, gene in enumerate(genes)}
    n, sums, m2 = (np.zeros((len(genes), len(slices))) for _ in range(3))
    names: list[Counter] = [Counter() for _ in genes]
    for s, slice in enumerate(slices):
        rows = [index[str(gene)] for gene in slice["gene_ids"]]
        n[rows, s], sums[rows, s], m2[rows, s] = slice["n_spots"], slice["sum"], slice["m2"]
        for row, symbol in zip(rows, slice["symbols"], strict=True):
            if symbol:
                names[row][str(symbol)] += 1
    n_spots = n.sum(axis=1)
    mean = np.array([math.fsum(row) for row in sums]) / n_spots
    apart = n * (np.divide(sums, n, out=np.zeros_like(sums), where=n > 0) - mean[:, None]) ** 2
    variance = np.array([math.fsum(row) for row in np.hstack([m2, apart])]) / n_spots
    return Vocabulary(
        gene_id=genes,
        # slices may name a gene differently: the most frequent name, of equals the first in the alphabet
        symbol=[min(name, key=lambda symbol: (-name[symbol], symbol), default="") for name in names],
        n_slices=(n > 0).sum(axis=1),
        n_spots=n_spots.astype(np.int64),
        mean=mean,
        variance=variance,
    )


def write_vocabulary(vocabulary: Vocabulary, path: str | Path) -> None:
    """Write ``genes.tsv``; floats with as many digits as tell them apart (`repr`)."""
    lines = [HEADER, "\t".join(COLUMNS)]
    for i, gene in enumerate(vocabulary.gene_id):
        numbers = (vocabulary.n_slices[i], vocabulary.n_spots[i])
        statistics = (repr(float(vocabulary.mean[i])), repr(float(vocabulary.variance[i])))
        lines.append("\t".join(map(str, (i, gene, vocabulary.symbol[i], *numbers, *statistics))))
    Path(path).write_text("\n".join(lines) + "\n")


def read_vocabulary(path: str | Path) -> Vocabulary:
    """Read ``genes.tsv``.

    Raises
    ------
    ValueError
        Another version, other columns, or rows that aren't numbered in order.
    """
    lines = Path(path).read_text().splitlines()
    if lines[:2] != [HEADER, "\t".join(COLUMNS)]:
        raise ValueError(f"{path}: found {lines[:2]}; expected the lines '{HEADER}' and '{' '.join(COLUMNS)}'")
    rows = [line.split("\t") for line in lines[2:]]
    if [row[0] for row in rows] != [str(i) for i in range(len(rows))]:
        raise ValueError(f"{path}: rows out of order; expected index 0, 1, 2, ... Next step: make it again")
    columns = list(zip(*rows, strict=True)) or [()] * len(COLUMNS)
    _, gene_id, symbol, n_slices, n_spots, mean, variance = columns
    return Vocabulary(
        gene_id=list(gene_id),
        symbol=list(symbol),
        n_slices=np.array(n_slices, dtype=np.int64),
        n_spots=np.array(n_spots, dtype=np.int64),
        mean=np.array(mean, dtype=np.float64),
        variance=np.array(variance, dtype=np.float64),
    )


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    slices = []
    for path in snakemake.input.moments:
        with np.load(path, allow_pickle=False) as file:
            slices.append(dict(file))
    vocabulary = merge_moments(slices)
    write_vocabulary(vocabulary, snakemake.output[0])
    logging.info("%d genes of %d training slices", len(vocabulary.gene_id), len(slices))
