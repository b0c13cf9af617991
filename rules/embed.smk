"""Every spot of a slice gets a vector: from the trained encoder, from the same one before its first step, and from further
encoders that the config names.

In: `<results>/pretrain/{run}/` or a folder of `evaluate.models` (`model.safetensors`, `config.json`, `genes.tsv`),
`<results>/shards/slices/{slice}.tar`.
Out: `<results>/embeddings/{model}/{slice}.safetensors`, model being `untrained`, `stpatch` or a name of `evaluate.models`.
"""


rule embed:
    input:
        weights=lambda w: f"{ENCODERS[w.model]}/model.safetensors",
        config=lambda w: f"{ENCODERS[w.model]}/config.json",
        genes=lambda w: f"{ENCODERS[w.model]}/genes.tsv",
        slice="<results>/shards/slices/{slice}.tar",
    output:
        "<results>/embeddings/{model}/{slice}.safetensors",
    log:
        "<results>/logs/embed/{model}/{slice}.log",
    benchmark:
        "<results>/benchmarks/embed/{model}/{slice}.tsv"
    wildcard_constraints:
        model="|".join(ENCODERS),
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        gpu=1,
    params:
        folder=lambda w, input: Path(input.weights).parent,
        untrained=lambda w: "--untrained" if w.model == "untrained" else "",
        genes=f"--genes {config['evaluate']['genes']}" if config["evaluate"]["genes"] else "",
    shell:
        # Errors show on the terminal too: the disk that the log lies on may be full.
        "$PYTHON -m trainer.embed --model {params.folder:q} --shards {input.slice:q} --out {output:q}"
        " {params.untrained} {params.genes} > {log:q} 2> >(tee -a {log:q} >&2)"
