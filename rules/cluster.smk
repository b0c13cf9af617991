"""Domains found without labels, and their maps beside the true ones.

In: `<results>/slices/{slice}.h5ad`, `<results>/embeddings/{model}/{slice}.safetensors`.
Out: `<results>/metrics/{dataset}/cluster.tsv`, `cluster.notes.tsv`, `clusters.tsv.gz`; `<results>/report/clusters/{dataset}.png`.
"""


rule cluster:
    input:
        slices=lambda w: expand("<results>/slices/{slice}.h5ad", slice=admitted(w.dataset)),
        embeddings=embeddings,
    output:
        scores="<results>/metrics/{dataset}/cluster.tsv",
        notes="<results>/metrics/{dataset}/cluster.notes.tsv",
        domains="<results>/metrics/{dataset}/clusters.tsv.gz",
    log:
        "<results>/logs/cluster/{dataset}.log",
    benchmark:
        "<results>/benchmarks/cluster/{dataset}.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
    params:
        models=MODELS,
        clusterers=config["evaluate"]["clusterers"],
        seed=config["seed"],
        target_sum=config["target_sum"],
    script:
        "../workflow/cluster.py"


rule cluster_maps:
    input:
        slices=lambda w: expand("<results>/slices/{slice}.h5ad", slice=admitted(w.dataset)),
        scores="<results>/metrics/{dataset}/cluster.tsv",
        notes="<results>/metrics/{dataset}/cluster.notes.tsv",
        domains="<results>/metrics/{dataset}/clusters.tsv.gz",
    output:
        report(
            "<results>/report/clusters/{dataset}.png",
            caption="captions/cluster_maps.rst",
            category="5 Maps",
            labels={"figure": "{dataset}: domains found without labels"},
        ),
    log:
        "<results>/logs/cluster_maps/{dataset}.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    script:
        "../workflow/cluster_maps.py"
