"""Shards become a pretrained encoder.

In: `<results>/shards/{train,val}/index.json`, the trainer's settings (`pretrain.config`).
Out: `<results>/pretrain/model/` with `model.safetensors`, `config.json`, `genes.tsv`, `metrics.jsonl`, `curve.svg` and
the model card `README.md`. Snapshots lie beside them in `snapshots/`, undeclared, so that a retry goes on from the last
one; a finished run removes them. A job that is asked to stop (SIGTERM, SIGUSR1) saves one and ends with code 75. On a
cluster without GPUs, say `--set-resources pretrain:gpu=0 embed:gpu=0 inpaint:gpu=0 probe:gpu=0`.
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
        curve=f"<results>/pretrain/{RUN}/curve.svg",
        card=f"<results>/pretrain/{RUN}/README.md",
    log:
        f"<results>/logs/pretrain/{RUN}.log",
    benchmark:
        f"<results>/benchmarks/pretrain/{RUN}.tsv"
    conda:
        "../envs/train.yaml"
    threads: 8
    resources:
        # 7 GB on a CPU with 128 windows of 8,192 genes a step; on a GPU up to six such batches, 0.5 GB each, are read ahead
        mem_mb=lambda wildcards, attempt: 16000 * min(attempt, 2),
        gpu=1,
        # One rank on one machine, unless a profile says otherwise (`--set-resources pretrain:ranks=4 pretrain:gpu=4`).
        nodes=1,
        ranks=1,  # on each node
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
        # The progress shows on the terminal too. The shell and tee outlive a signal to stop, which is the trainer's.
        "trap : TERM USR1; $PYTHON -m trainer.launch --nodes {resources.nodes} --ranks {resources.ranks} --cpus {threads}"
        " -- --shards {params.shards:q} --val-shards {params.val_shards:q}"
        " --out {params.out:q} --config {input.config:q} {params.flags:q} 2>&1"
        " | (trap '' TERM USR1; exec tee {log:q})"
