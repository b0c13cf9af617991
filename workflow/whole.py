"""A whole slice as one sample, for embedding: every measured gene of the vocabulary at every cell of the grid."""

import hashlib
from pathlib import Path

import numpy as np

from workflow import tar
from workflow.codec import codec, encode_counts, encode_facts, encode_sites
from workflow.errors import TooFewGenes
from workflow.grid import Grid, plain, read_grid
from workflow.layout import lattice_lines
from workflow.stats import read_vocabulary

FORMAT_VERSION = 1


def whole_slice(
    grid: Grid, vocabulary: list[str], *, genes_sha256: str, target_sum: float, codec_name: str, simulated: bool
) -> bytes:
    """A tar of one sample (docs/format.md) that holds the slice.

    Parameters
    ----------
    grid
        The slice.
    vocabulary
        Gene ids; the position is the gene's index.
    genes_sha256
        Of the file that the vocabulary was read from.
    target_sum
        Of the normalised expression that the model was or will be trained on.
    codec_name
        ``lz4`` or ``zstd``.
    simulated
        Whether the slice is.

    Raises
    ------
    TooFewGenes
        The slice measured no gene of the vocabulary.
    """
    index = {gene: i for i, gene in enumerate(vocabulary)}
    in_vocabulary = np.array([index.get(gene, -1) for gene in grid.gene_ids])
    columns = np.argsort(in_vocabulary)[(in_vocabulary < 0).sum() :]
    if not len(columns):
        raise TooFewGenes(
            slice=grid.slice,
            found=f"none of its {len(grid.gene_ids)} genes in the vocabulary of {len(vocabulary)}",
            expected="at least one",
            next_step="check the organism, and that gene ids are Ensembl ids without version",
        )
    y, x = np.argwhere(grid.mask)[np.argmin((np.argwhere(grid.mask) ** 2).sum(axis=1))]
    height, width = grid.mask.shape
    rows, cols = lattice_lines(grid.array_row, grid.array_col, grid.layout)
    blosc_codec = codec(codec_name)
    facts = {
        "slice": grid.slice,
        "window": 0,
        "y": 0,
        "x": 0,
        "h": height,
        "w": width,
        "m": len(columns),
        "array_row": int(grid.array_row[y, x]),
        "array_col": int(grid.array_col[y, x]),
        "array_rows": rows.tolist(),
        "array_cols": cols.tolist(),
        "pitch_um": plain(grid.pitch_um),
        "layout": grid.layout,
        "format_version": FORMAT_VERSION,
        "genes_sha256": genes_sha256,
        "target_sum": target_sum,
        "simulated": simulated,
    }
    data, _ = tar.sample(
        [
            (f"{grid.slice}.counts.blosc", encode_counts(grid.counts[:, :, columns].transpose(2, 0, 1), blosc_codec)),
            (f"{grid.slice}.sites.blosc", encode_sites(in_vocabulary[columns], grid.total_counts, blosc_codec)),
            (f"{grid.slice}.json", encode_facts(facts)),
            (f"{grid.slice}.cell.blosc", blosc_codec.encode(np.ascontiguousarray(grid.cell, dtype="<i4"))),
        ]
    )
    return data + tar.END


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    genes = Path(snakemake.input.genes)
    content = whole_slice(
        read_grid(snakemake.input.grid),
        read_vocabulary(genes).gene_id,
        genes_sha256=hashlib.sha256(genes.read_bytes()).hexdigest(),
        target_sum=snakemake.params.target_sum,
        codec_name=snakemake.params.codec,
        simulated=snakemake.params.simulated,
    )
    Path(snakemake.output[0]).write_bytes(content)
