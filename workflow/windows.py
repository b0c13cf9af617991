"""The windows of one slice, drawn and encoded: a pack that holds each sample as it will stand in a shard."""

import logging
from pathlib import Path

import numpy as np

from workflow import tar
from workflow.codec import codec, encode_counts, encode_facts, encode_sites
from workflow.estimate import windows_of
from workflow.grid import plain, read_grid
from workflow.sample import Field, draw_windows
from workflow.stats import read_vocabulary

# Where a sample lies in its pack, and its members' data within it.
PACK_DTYPE = np.dtype(
    [
        ("offset", "<u8"),
        ("nbytes", "<u4"),
        ("counts_offset", "<u4"),
        ("counts_nbytes", "<u4"),
        ("sites_offset", "<u4"),
        ("sites_nbytes", "<u4"),
        ("json_offset", "<u4"),
        ("json_nbytes", "<u4"),
    ]
)


def write_pack(
    field: Field,
    facts: dict,
    pack: str | Path,
    index: str | Path,
    *,
    n: int,
    m: int,
    selection: str,
    epsilon: float,
    min_observed: float,
    seed: int,
    codec_name: str,
) -> None:
    """Draw and encode the n windows of a slice.

    Parameters
    ----------
    field
        The slice.
    facts
        ``pitch_um`` and ``layout``, copied into each sample's JSON.
    pack, index
        Written: samples in the order they were drawn; array of `PACK_DTYPE`, row i for window i.
    n, m, selection, epsilon, min_observed, seed
        See `workflow.sample.draw_windows`.
    codec_name
        ``lz4`` or ``zstd``.
    """
    blosc_codec = codec(codec_name)
    rows = np.zeros(n, dtype=PACK_DTYPE)
    at = 0
    with open(pack, "wb") as file:
        for window in draw_windows(field, n, m, selection, epsilon, min_observed, seed):
            key = f"{field.slice}_{window.number:06d}"
            about = {
                "slice": field.slice,
                "window": window.number,
                "y": window.y,
                "x": window.x,
                "h": field.window[0],
                "w": field.window[1],
                "m": m,
                "array_row": window.array_row,
                "array_col": window.array_col,
                "array_rows": window.array_rows.tolist(),
                "array_cols": window.array_cols.tolist(),
                **facts,
            }
            data, spans = tar.sample(
                [
                    (f"{key}.counts.blosc", encode_counts(window.counts, blosc_codec)),
                    (f"{key}.sites.blosc", encode_sites(window.genes, window.totals, blosc_codec)),
                    (f"{key}.json", encode_facts(about)),
                ]
            )
            file.write(data)
            rows[window.number] = (at, len(data), *spans[0], *spans[1], *spans[2])
            at += len(data)
    np.save(index, rows, allow_pickle=False)
    logging.info(
        "%d windows of %s, %.0f bytes each (counts %.0f)", n, field.slice, at / n, rows["counts_nbytes"].mean()
    )


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    params = snakemake.params
    grid = read_grid(snakemake.input.grid)
    vocabulary = read_vocabulary(snakemake.input.genes)
    write_pack(
        Field(grid, vocabulary.gene_id, params.window, params.target_sum),
        {"pitch_um": plain(grid.pitch_um), "layout": grid.layout},
        snakemake.output.pack,
        snakemake.output.index,
        n=windows_of(params.windows_per_slice, params.max_coverage, int(grid.mask.sum()), params.window),
        m=params.genes,
        selection=params.selection,
        epsilon=params.epsilon,
        min_observed=params.min_observed,
        seed=params.seed,
        codec_name=params.codec,
    )
