"""Components of the corpus, from which gene embeddings may start, or of which they consist.

In: <results>/grids/{slice}.zarr of the admitted training slices, <results>/stats/genes.tsv
Out: <results>/stats/components.safetensors
"""


rule components:
    input:
        grids=lambda wildcards: expand("<results>/grids/{slice}.zarr", slice=admitted("train")),
        genes="<results>/stats/genes.tsv",
    output:
        "<results>/stats/components.safetensors",
    log:
        "<results>/logs/components/components.log",
    benchmark:
        "<results>/benchmarks/components/components.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        # The sample is bounded whatever the number of slices, and one grid is in memory at a time.
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    params:
        method=config["component_method"],
        k=config["components"],
        spots=config["component_spots"],
        target_sum=config["target_sum"],
        seed=config["seed"],
    script:
        "../workflow/components.py"
