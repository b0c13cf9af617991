"""The vocabulary: every gene that a training slice measured, with its mean and variance over those slices."""

import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from workflow.reading import reading

HEADER = "# stpatch genes 1"
GENES_PER_BLOCK = 1024  # of all slices side by side, in float64
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


def merge_moments(slices: Iterable[dict]) -> Vocabulary:
    """Mean and population variance of each gene over all slices that measured it.

    With n_s, m_s and M_s of slice s (spots, mean, centred sum of squares), N = sum n_s and mean = sum(n_s m_s) / N,

        N variance = sum_s M_s + sum_s n_s (m_s - mean)^2.

    The sums over slices are exact before they are rounded (`math.fsum`), so the order of slices changes no bit.

    Parameters
    ----------
    slices
        ``gene_ids``, ``symbols``, ``n_spots``, ``sum``, ``m2`` of each (`workflow.moments`). Each is looked at once and
        only its numbers are kept, 20 bytes a gene: a thousand slices may come one by one.
    """
    seen: dict[str, int] = {}  # gene -> number, in the order of first sight
    names: list[Counter] = []
    shares = []
    for slice in slices:
        numbers = [seen.setdefault(gene, len(seen)) for gene in np.asarray(slice["gene_ids"]).tolist()]
        names += [Counter() for _ in range(len(seen) - len(names))]
        for number, symbol in zip(numbers, np.asarray(slice["symbols"]).tolist(), strict=True):
            if symbol:
                names[number][symbol] += 1
        shares.append(
            (np.array(numbers, dtype=np.int32), slice["n_spots"], np.array(slice["sum"]), np.array(slice["m2"]))
        )
    genes = sorted(seen)
    row_of = np.empty(len(genes), dtype=np.int32)
    row_of[[seen[gene] for gene in genes]] = np.arange(len(genes))
    shares = [(row_of[numbers], *found) for numbers, *found in shares]
    blocks = [
        _pool(shares, np.s_[i : i + GENES_PER_BLOCK], len(genes)) for i in range(0, len(genes) or 1, GENES_PER_BLOCK)
    ]
    n_slices, n_spots, mean, variance = map(np.concatenate, zip(*blocks, strict=True))
    return Vocabulary(
        gene_id=genes,
        # slices may name a gene differently: the most frequent name, of equals the first in the alphabet
        symbol=[
            min(names[seen[gene]].items(), key=lambda item: (-item[1], item[0]), default=("",))[0] for gene in genes
        ],
        n_slices=n_slices,
        n_spots=n_spots,
        mean=mean,
        variance=variance,
    )


def _pool(shares: list[tuple], block: slice, n_genes: int) -> tuple[np.ndarray, ...]:
    """``n_slices``, ``n_spots``, ``mean`` and ``variance`` of the genes in the rows of a block, from each slice's share."""
    n, sums, m2 = np.zeros((3, min(block.stop, n_genes) - block.start, len(shares)))
    for s, (row, spots, total, squares) in enumerate(shares):
        here = np.flatnonzero((row >= block.start) & (row < block.stop))
        at = row[here] - block.start
        n[at, s], sums[at, s], m2[at, s] = spots, total[here], squares[here]
    n_spots = n.sum(axis=1)
    mean = np.array([math.fsum(row) for row in sums.tolist()]) / n_spots
    apart = n * (np.divide(sums, n, out=np.zeros_like(sums), where=n > 0) - mean[:, None]) ** 2
    variance = np.array([math.fsum(row) for row in np.hstack([m2, apart]).tolist()]) / n_spots
    return (n > 0).sum(axis=1), n_spots.astype(np.int64), mean, variance


def read_moments(paths: Iterable[str | Path]) -> Iterator[dict]:
    """What `workflow.moments` wrote for each slice, one at a time."""
    for path in paths:
        with reading(path), np.load(path, allow_pickle=False) as file:
            found = dict(file)
        yield found


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
    vocabulary = merge_moments(read_moments(snakemake.input.moments))
    write_vocabulary(vocabulary, snakemake.output[0])
    logging.info("%d genes of %d training slices", len(vocabulary.gene_id), len(snakemake.input.moments))
