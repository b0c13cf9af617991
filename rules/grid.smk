"""Curated slices as images: every spot in a cell of a dense grid.

In: <results>/slices/{slice}.h5ad
Out: <results>/grids/{slice}.zarr
"""


rule grid:
    input:
        slice="<results>/slices/{slice}.h5ad",
    output:
        directory("<results>/grids/{slice}.zarr"),
    log:
        "<results>/logs/grid/{slice}.log",
    benchmark:
        "<results>/benchmarks/grid/{slice}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    params:
        layout=config["layout"],
        pitch_um=config["pitch_um"],
    script:
        "../workflow/grid.py"
