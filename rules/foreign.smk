"""Encoders and baselines of others, by `evaluate.foreign`; one whose package or weights are absent is skipped with the reason.

In: `<results>/slices/{slice}.h5ad` of a dataset; the folders of weights that `evaluate.foreign_weights` names.
Out: `<results>/foreign/{method}/{dataset}.safetensors`; of it
`<results>/embeddings/{method}/{slice}.safetensors`, as our own encoders write theirs.
"""

# The evaluation set with which a slice is embedded: the first, if it is in several.
EVALUATED = {row["slice"]: row["split"] for row in reversed(ROLES) if row["split"] in DATASETS}


rule foreign:
    input:
        slices=lambda w: expand("<results>/slices/{slice}.h5ad", slice=admitted(w.dataset)),
    output:
        "<results>/foreign/{method}/{dataset}.safetensors",
    log:
        "<results>/logs/foreign/{method}/{dataset}.log",
    benchmark:
        "<results>/benchmarks/foreign/{method}/{dataset}.tsv"
    wildcard_constraints:
        method="scgpt|scgpt_spatial|stofm|novae|banksy|spagcn",
    conda:
        "../envs/foreign_{method}.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 12000 * attempt,
        gpu=lambda wildcards: int(wildcards.method not in ("banksy", "spagcn")),
    params:
        weights=lambda w: config["evaluate"]["foreign_weights"].get(w.method, ""),
        seed=config["seed"],
        target_sum=config["target_sum"],
    script:
        "../workflow/foreign.py"


rule foreign_slice:
    input:
        lambda w: f"<results>/foreign/{w.method}/{EVALUATED[w.slice]}.safetensors",
    output:
        "<results>/embeddings/{method}/{slice}.safetensors",
    log:
        "<results>/logs/foreign_slice/{method}/{slice}.log",
    wildcard_constraints:
        method="scgpt|scgpt_spatial|stofm|novae|banksy|spagcn",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * attempt,
    script:
        "../workflow/foreign_slice.py"
