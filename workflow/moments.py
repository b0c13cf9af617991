"""One slice's share of the gene statistics: sums and centred sums of squares of its normalised expression."""

from pathlib import Path

import numpy as np

from workflow.expression import log_normalise
from workflow.grid import Grid, read_grid

GENES_PER_BLOCK = 1024  # bounds the float64 values in memory


def moments(grid: Grid, target_sum: float) -> dict[str, np.ndarray]:
    """Sum and centred sum of squares of each gene's normalised expression over the observed cells.

    Returns
    -------
    dict
        ``n_spots`` int64 [] (observed cells), ``sum`` and ``m2`` float64 [K], ``m2`` about the slice's own mean.
    """
    observed = grid.mask & (grid.total_counts > 0)  # without a count there is nothing to normalise
    totals, n_genes = grid.total_counts[observed][:, None], grid.counts.shape[2]
    sums, m2 = np.empty(n_genes), np.empty(n_genes)
    for start in range(0, n_genes, GENES_PER_BLOCK):
        block = slice(start, start + GENES_PER_BLOCK)
        values = log_normalise(grid.counts[:, :, block][observed], totals, target_sum)
        sums[block] = values.sum(axis=0)
        m2[block] = ((values - sums[block] / len(values)) ** 2).sum(axis=0)
    return {"n_spots": np.int64(len(totals)), "sum": sums, "m2": m2}


def write_moments(path: str | Path, gene_ids, symbols, found: dict[str, np.ndarray]) -> None:
    """Write moments with the genes they belong to as npz (plain arrays, the same bytes each time)."""
    text = {"gene_ids": list(map(str, gene_ids)), "symbols": list(map(str, symbols))}
    with open(path, "wb") as file:
        np.savez(file, **{name: np.array(lines, dtype=str) for name, lines in text.items()}, **found)


if __name__ == "__main__":
    import anndata

    from workflow.keys import Keys
    from workflow.logs import log_to
    from workflow.reading import reading

    log_to(snakemake.log[0])
    grid = read_grid(snakemake.input.grid)
    with reading(snakemake.input.slice):
        var = anndata.read_h5ad(snakemake.input.slice, backed="r").var
    symbols = var[Keys.SYMBOL].astype(str).reindex(grid.gene_ids.astype(object))
    write_moments(snakemake.output[0], grid.gene_ids, symbols, moments(grid, snakemake.params.target_sum))
