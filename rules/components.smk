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
    threads: 4
    resources:
        # A grid a thread is in memory at a time; of every slice its axes stay (5 MB, three times while they are put together).
        mem_mb=lambda wildcards, input, threads, attempt: (1500 + 2500 * threads + 15 * len(input.grids))
        * attempt,
    params:
        method=config["component_method"],
        k=config["components"],
        spots=config["component_spots"],
        target_sum=config["target_sum"],
        seed=config["seed"],
    script:
        "../workflow/components.py"
