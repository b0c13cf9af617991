"""The paper's head, a multilayer perceptron, under the paper's protocol, random20: only where `evaluate.heads` has mlp.

In: `<results>/slices/{slice}.h5ad`, `<results>/embeddings/{model}/{slice}.safetensors`.
Out: `<results>/probe/{dataset}/` with `splits.safetensors`, `notes.tsv`, `{method}.features.safetensors` and
`{method}.predictions.safetensors`; `<results>/metrics/{dataset}/mlp.tsv`, `mlp.notes.tsv` and `mlp.comparisons.tsv`.
"""

# PROBED: what the paper puts its head on, and further encoders; a core-hour each on a dozen sections.
PROBED = ["raw", "pca", *(model for model in ENCODERS if model != "untrained")]


rule probe_inputs:
    input:
        slices=lambda w: expand("<results>/slices/{slice}.h5ad", slice=admitted(w.dataset)),
        embeddings=embeddings,
    output:
        splits="<results>/probe/{dataset}/splits.safetensors",
        notes="<results>/probe/{dataset}/notes.tsv",
        features=expand("<results>/probe/{{dataset}}/{method}.features.safetensors", method=PROBED),
    log:
        "<results>/logs/probe_inputs/{dataset}.log",
    benchmark:
        "<results>/benchmarks/probe_inputs/{dataset}.tsv"
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 8000 * attempt,
    params:
        models=MODELS,
        methods=PROBED,
        splits=config["evaluate"]["splits"],
        seed=config["seed"],
        target_sum=config["target_sum"],
    script:
        "../workflow/probe_inputs.py"


rule probe:
    input:
        features="<results>/probe/{dataset}/{method}.features.safetensors",
        splits="<results>/probe/{dataset}/splits.safetensors",
    output:
        "<results>/probe/{dataset}/{method}.predictions.safetensors",
    log:
        "<results>/logs/probe/{dataset}/{method}.log",
    benchmark:
        "<results>/benchmarks/probe/{dataset}/{method}.tsv"
    wildcard_constraints:
        method="|".join(PROBED),
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        gpu=1,
    params:
        hidden=config["evaluate"]["mlp"]["hidden"],
        epochs=config["evaluate"]["mlp"]["epochs"],
        batch_size=config["evaluate"]["mlp"]["batch_size"],
        lr=config["evaluate"]["mlp"]["lr"],
        seed=config["seed"],
    shell:
        "$PYTHON -m trainer.probe --features {input.features:q} --splits {input.splits:q} --out {output:q}"
        " --hidden {params.hidden} --epochs {params.epochs} --batch-size {params.batch_size} --lr {params.lr}"
        " --seed {params.seed} --threads {threads} > {log:q} 2>&1"


rule mlp:
    input:
        splits="<results>/probe/{dataset}/splits.safetensors",
        notes="<results>/probe/{dataset}/notes.tsv",
        predictions=expand("<results>/probe/{{dataset}}/{method}.predictions.safetensors", method=PROBED),
    output:
        scores="<results>/metrics/{dataset}/mlp.tsv",
        notes="<results>/metrics/{dataset}/mlp.notes.tsv",
        comparisons="<results>/metrics/{dataset}/mlp.comparisons.tsv",
    log:
        "<results>/logs/mlp/{dataset}.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    params:
        methods=PROBED,
        seed=config["seed"],
    script:
        "../workflow/mlp.py"
