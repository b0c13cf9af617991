# stpatch: from public spatial-transcriptomics slices to shards, a pretrained encoder and its report card.
# This file is the table of contents: each part lies in the rule file of its name, in the order it runs.

from pathlib import Path


# Anchored to this file, so that --directory and --configfile keep the repository's defaults.
configfile: Path(workflow.basedir) / "config.yaml"


include: "rules/common.smk"
include: "rules/measured.smk"


pathvars:
    results=config["results"],


rule data:
    default_target: True
    input:
        "<results>/curate/quarantine.tsv",
        "<results>/shards/train/index.json",
        "<results>/shards/val/index.json",
        "<results>/shards/README.md",


rule all:
    input:
        rules.data.input,
        f"<results>/pretrain/{RUN}/model.safetensors",
        "<results>/metrics/scores.tsv",
        lambda wildcards: expand("<results>/annotated/{slice}.h5ad", slice=admitted()),
        "<results>/report.html",


# The targets `pretrain` and `evaluate` are rules of their own.
include: "rules/simulate.smk"
include: "rules/download.smk"
include: "rules/curate.smk"
include: "rules/sketch.smk"
include: "rules/admit.smk"
include: "rules/grid.smk"
include: "rules/stats.smk"
include: "rules/components.smk"
include: "rules/shards.smk"
include: "rules/dataset_card.smk"
include: "rules/pretrain.smk"
include: "rules/embed.smk"
include: "rules/foreign.smk"
include: "rules/annotate.smk"
include: "rules/score.smk"
include: "rules/mlp.smk"
include: "rules/cluster.smk"
include: "rules/reconstruct.smk"
include: "rules/evaluate.smk"
include: "rules/report.smk"
include: "rules/estimate.smk"


# On a cluster these stay where Snakemake runs: what needs the network, and small tables. So does `report`.
localrules:
    download,
    dataset_card,
    evaluate,
    curve,
    scoreboard,
    foreign_slice,
    cluster_maps,
    clustering_figure,
    confusion,
    reconstruction_figure,


onstart:
    if workflow.is_main_process:
        refuse_a_disk_too_small()
        start_jobs_as_fast_as_may_be()
