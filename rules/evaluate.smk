"""Frozen embeddings and controls through the same probes on the same splits, dataset by dataset.

In: `<results>/slices/{slice}.h5ad`, `<results>/embeddings/{stpatch,untrained}/{slice}.safetensors`.
Out: `<results>/metrics/{dataset}/scores.tsv`, `predictions.tsv.gz` and `notes.tsv`; all datasets in
`<results>/metrics/scores.tsv`.
"""


rule score:
    input:
        slices=lambda w: expand("<results>/slices/{slice}.h5ad", slice=admitted(w.dataset)),
        stpatch=lambda w: expand(
            "<results>/embeddings/stpatch/{slice}.safetensors", slice=admitted(w.dataset)
        ),
        untrained=lambda w: expand(
            "<results>/embeddings/untrained/{slice}.safetensors", slice=admitted(w.dataset)
        ),
    output:
        scores="<results>/metrics/{dataset}/scores.tsv",
        predictions="<results>/metrics/{dataset}/predictions.tsv.gz",
        notes="<results>/metrics/{dataset}/notes.tsv",
    log:
        "<results>/logs/score/{dataset}.log",
    benchmark:
        "<results>/benchmarks/score/{dataset}.tsv"
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
    params:
        heads=config["evaluate"]["heads"],
        protocols=config["evaluate"]["protocols"],
        splits=config["evaluate"]["splits"],
        seed=config["seed"],
        target_sum=config["target_sum"],
    script:
        "../workflow/score.py"


# Also the target: snakemake evaluate
rule evaluate:
    input:
        lambda w: expand("<results>/metrics/{dataset}/scores.tsv", dataset=filter(admitted, DATASETS)),
    output:
        "<results>/metrics/scores.tsv",
    log:
        "<results>/logs/evaluate/evaluate.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * attempt,
    script:
        "../workflow/evaluate.py"
