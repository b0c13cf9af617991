"""Frozen embeddings and controls through the same probes on the same splits, dataset by dataset.

In: `<results>/slices/{slice}.h5ad`, `<results>/embeddings/{model}/{slice}.safetensors`.
Out: `<results>/metrics/{dataset}/score.tsv`, `score.notes.tsv`, `comparisons.tsv` and `predictions.tsv.gz`.
"""


rule score:
    input:
        slices=lambda w: expand("<results>/slices/{slice}.h5ad", slice=admitted(w.dataset)),
        embeddings=embeddings,
        published=ROOT / "catalogue/aux/published.tsv",
    output:
        scores="<results>/metrics/{dataset}/score.tsv",
        notes="<results>/metrics/{dataset}/score.notes.tsv",
        comparisons="<results>/metrics/{dataset}/comparisons.tsv",
        predictions="<results>/metrics/{dataset}/predictions.tsv.gz",
    log:
        "<results>/logs/score/{dataset}.log",
    benchmark:
        "<results>/benchmarks/score/{dataset}.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
    params:
        models=MODELS,
        heads=[head for head in config["evaluate"]["heads"] if head != "mlp"],
        protocols=[
            protocol
            for protocol in config["evaluate"]["protocols"]
            if protocol not in ("clustering", "reconstruction")
        ],
        splits=config["evaluate"]["splits"],
        window=config["window"],
        seed=config["seed"],
        target_sum=config["target_sum"],
    script:
        "../workflow/score.py"
