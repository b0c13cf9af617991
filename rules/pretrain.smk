"""Shards become a pretrained encoder.

In: `<results>/shards/{train,val}/index.json`, the trainer's settings (`pretrain.config`).
Out: `<results>/pretrain/model/` with `model.safetensors`, `config.json`, `genes.tsv`, `metrics.jsonl` and the model
card `README.md`. On a cluster without GPUs, say `--set-resources pretrain:gpu=0 embed:gpu=0`.
"""


# Also the target: snakemake pretrain
rule pretrain:
    input:
        train="<results>/shards/train/index.json",
        val="<results>/shards/val/index.json",
        config=resolve(config["pretrain"]["config"], ROOT),
    output:
        model=f"<results>/pretrain/{RUN}/model.safetensors",
        config=f"<results>/pretrain/{RUN}/config.json",
        genes=f"<results>/pretrain/{RUN}/genes.tsv",
        metrics=f"<results>/pretrain/{RUN}/metrics.jsonl",
        card=f"<results>/pretrain/{RUN}/README.md",
    log:
        f"<results>/logs/pretrain/{RUN}.log",
    benchmark:
        f"<results>/benchmarks/pretrain/{RUN}.tsv"
    conda:
        "../envs/train.yaml"
    threads: 8
    resources:
        mem_mb=8000,
        gpu=1,
    params:
        shards=lambda w, input: Path(input.train).parent,
        val_shards=lambda w, input: Path(input.val).parent,
        out=lambda w, output: Path(output.model).parent,
        # Fields of the `pretrain` section lie over its file: `batch_size: 64` becomes `--batch-size 64`.
        flags=[
            f"--{name.replace('_', '-')}={value}"
            for name, value in config["pretrain"].items()
            if name != "config"
        ],
    shell:
        # The progress shows on the terminal too.
        "$PYTHON -m trainer.pretrain --shards {params.shards:q} --val-shards {params.val_shards:q}"
        " --out {params.out:q} --config {input.config:q} {params.flags:q} 2>&1 | tee {log:q}"
