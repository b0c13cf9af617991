"""Gene statistics over the training slices, and with them the vocabulary.

In: <results>/grids/{slice}.zarr and <results>/slices/{slice}.h5ad (for the symbols) of the admitted training slices
Out: <results>/stats/moments/{slice}.npz, <results>/stats/genes.tsv
"""


rule moments:
    input:
        grid="<results>/grids/{slice}.zarr",
        slice="<results>/slices/{slice}.h5ad",
    output:
        "<results>/stats/moments/{slice}.npz",
    log:
        "<results>/logs/moments/{slice}.log",
    benchmark:
        "<results>/benchmarks/moments/{slice}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    params:
        target_sum=config["target_sum"],
    script:
        "../workflow/moments.py"


rule stats:
    input:
        moments=lambda wildcards: expand("<results>/stats/moments/{slice}.npz", slice=admitted("train")),
    output:
        "<results>/stats/genes.tsv",
    log:
        "<results>/logs/stats/genes.log",
    benchmark:
        "<results>/benchmarks/stats/genes.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    script:
        "../workflow/stats.py"
