"""Every spot of a slice gets a vector: from the trained encoder, and from the same one before its first step.

In: `<results>/pretrain/{run}/` (`model.safetensors`, `config.json`, `genes.tsv`), `<results>/shards/slices/{slice}.tar`.
Out: `<results>/embeddings/{model}/{slice}.safetensors`, model being `stpatch` or `untrained`.
"""


rule embed:
    input:
        weights=f"<results>/pretrain/{RUN}/model.safetensors",
        config=f"<results>/pretrain/{RUN}/config.json",
        genes=f"<results>/pretrain/{RUN}/genes.tsv",
        slice="<results>/shards/slices/{slice}.tar",
    output:
        "<results>/embeddings/{model}/{slice}.safetensors",
    log:
        "<results>/logs/embed/{model}/{slice}.log",
    benchmark:
        "<results>/benchmarks/embed/{model}/{slice}.tsv"
    wildcard_constraints:
        model="stpatch|untrained",
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        gpu=1,
    params:
        folder=lambda w, input: Path(input.weights).parent,
        untrained=lambda w: "--untrained" if w.model == "untrained" else "",
    shell:
        "$PYTHON -m trainer.embed --model {params.folder:q} --shards {input.slice:q} --out {output:q}"
        " {params.untrained} > {log:q} 2>&1"
