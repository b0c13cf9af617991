"""Figures with captions, and the one HTML file that holds them all.

In: slices, grids, shards, the model's `metrics.jsonl`, the tables of `admit` and of the stages that measure.
Out: `<results>/report/*`, `<results>/report.html`.
"""

from workflow.catalogue import PRETRAINED
from workflow.guard import kept_although

MAX_PANELS = 24  # slices that get four panels of their own; the captions say so
MAX_OVERVIEW = 60  # rows of the overview figures


report: "captions/workflow.rst"


rule panels:
    input:
        slice="<results>/slices/{slice}.h5ad",
        grid="<results>/grids/{slice}.zarr",
        index=lambda w: [
            f"<results>/shards/{split}/index.json"
            for split in ("train", "val")
            if w.slice in admitted(split)
        ][:1],
    output:
        report(
            "<results>/report/panels/{slice}.png",
            caption="captions/panels.rst",
            category="1 Slices",
            labels={"figure": "{slice}: from slice to window"},
        ),
    log:
        "<results>/logs/panels/{slice}.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 6000 * attempt,
    params:
        window=config["window"],
        target_sum=config["target_sum"],
    script:
        "../workflow/panels.py"


rule qc:
    input:
        slices=lambda w: expand("<results>/slices/{slice}.h5ad", slice=admitted()[:MAX_OVERVIEW]),
        admitted="<results>/curate/admitted.tsv",
        quarantine="<results>/curate/quarantine.tsv",
        duplicates="<results>/curate/duplicates.tsv",
        notes="<results>/curate/notes.tsv",
    output:
        figure=report(
            "<results>/report/qc.png",
            caption="captions/qc.rst",
            category="1 Slices",
            labels={"figure": "(all) spots, counts, genes"},
        ),
        rejected=report(
            "<results>/report/quarantine.html",
            caption="captions/quarantine.rst",
            category="1 Slices",
            labels={"figure": "(all) rejected and duplicate slices"},
        ),
    log:
        "<results>/logs/qc/qc.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    script:
        "../workflow/qc.py"


rule fill:
    input:
        index=expand("<results>/shards/{split}/index.json", split=["train", "val"]),
        grids=lambda w: expand("<results>/grids/{slice}.zarr", slice=admitted("train", "val")[:MAX_OVERVIEW]),
    output:
        report(
            "<results>/report/fill.png",
            caption="captions/fill.rst",
            category="2 Windows",
            labels={"figure": "grid fill and windows"},
        ),
    log:
        "<results>/logs/fill/fill.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    params:
        slices=lambda w: admitted("train", "val")[:MAX_OVERVIEW],
    script:
        "../workflow/fill.py"


rule curve:
    input:
        metrics=f"<results>/pretrain/{RUN}/metrics.jsonl",
        config=f"<results>/pretrain/{RUN}/config.json",
    output:
        report(
            "<results>/report/curve.png",
            caption="captions/curve.rst",
            category="3 Pretraining",
            labels={"figure": "loss"},
        ),
    log:
        "<results>/logs/curve/curve.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
    script:
        "../workflow/curve.py"


rule scoreboard:
    input:
        scores=lambda w: measured(w.dataset),
        notes=lambda w: measured(w.dataset, part=".notes"),
        comparisons=lambda w: compared(w.dataset),
        admitted="<results>/curate/admitted.tsv",
        quarantine="<results>/curate/quarantine.tsv",
        duplicates="<results>/curate/duplicates.tsv",
        remarks="<results>/curate/notes.tsv",
        fingerprints=ROOT / "catalogue/aux/fingerprints.tsv",
    output:
        figure=report(
            "<results>/report/scores/{dataset}.png",
            caption="captions/scoreboard.rst",
            category="4 Scores",
            labels={"figure": "{dataset}: methods and controls"},
        ),
        page=report(
            "<results>/report/scores/{dataset}.html",
            caption="captions/scoreboard.rst",
            category="4 Scores",
            labels={"figure": "{dataset}: table and verdicts"},
        ),
    log:
        "<results>/logs/scoreboard/{dataset}.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
    params:
        allow_contamination=config["allow_contamination"],
        pretrained=sorted({row["slice"] for row in ROLES if row["split"] in PRETRAINED}),
        rows=lambda w: sorted({row["slice"] for row in ROLES if row["split"] == w.dataset}),
    script:
        "../workflow/scoreboard.py"


rule clustering_figure:
    input:
        scores="<results>/metrics/{dataset}/cluster.tsv",
        notes="<results>/metrics/{dataset}/cluster.notes.tsv",
    output:
        report(
            "<results>/report/clustering/{dataset}.png",
            caption="captions/clustering_figure.rst",
            category="4 Scores",
            labels={"figure": "{dataset}: domains found without labels"},
        ),
    log:
        "<results>/logs/clustering_figure/{dataset}.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
    script:
        "../workflow/clustering_figure.py"


rule reconstruction_figure:
    input:
        scores="<results>/metrics/{dataset}/reconstruct.tsv",
        notes="<results>/metrics/{dataset}/reconstruct.notes.tsv",
    output:
        report(
            "<results>/report/reconstruction/{dataset}.png",
            caption="captions/reconstruction_figure.rst",
            category="4 Scores",
            labels={"figure": "{dataset}: hidden squares filled in"},
        ),
    log:
        "<results>/logs/reconstruction_figure/{dataset}.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
    script:
        "../workflow/reconstruction_figure.py"


rule maps:
    input:
        slices=lambda w: expand("<results>/slices/{slice}.h5ad", slice=admitted(w.dataset)),
        comparisons="<results>/metrics/{dataset}/comparisons.tsv",
        predictions="<results>/metrics/{dataset}/predictions.tsv.gz",
        notes="<results>/metrics/{dataset}/score.notes.tsv",
    output:
        report(
            "<results>/report/maps/{dataset}.png",
            caption="captions/maps.rst",
            category="5 Maps",
            labels={"figure": "{dataset}: true and predicted domains"},
        ),
    log:
        "<results>/logs/maps/{dataset}.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    script:
        "../workflow/maps.py"


rule confusion:
    input:
        comparisons="<results>/metrics/{dataset}/comparisons.tsv",
        predictions="<results>/metrics/{dataset}/predictions.tsv.gz",
        notes="<results>/metrics/{dataset}/score.notes.tsv",
    output:
        report(
            "<results>/report/confusion/{dataset}.png",
            caption="captions/confusion.rst",
            category="5 Maps",
            labels={"figure": "{dataset}: which domains are taken for which"},
        ),
    log:
        "<results>/logs/confusion/{dataset}.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
    script:
        "../workflow/confusion.py"


# Local: the nested call reads the run's own records.
rule report:
    input:
        lambda w: expand("<results>/report/panels/{slice}.png", slice=admitted()[:MAX_PANELS]),
        rules.qc.output,
        rules.fill.output,
        rules.curve.output,
        lambda w: expand("<results>/report/scores/{dataset}.html", dataset=filter(admitted, DATASETS)),
        lambda w: drawn("score", "scores", "maps", "confusion"),
        lambda w: drawn("cluster", "clustering", "clusters"),
        lambda w: drawn("reconstruct", "reconstruction"),
    output:
        "<results>/report.html",
    log:
        "<results>/logs/report/report.log",
    localrule: True
    conda:
        "../envs/report.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 2000 * attempt,
    params:
        config=config,
        snakefile=str(workflow.main_snakefile),
    script:
        "../workflow/report.py"


# The start page's template sees nothing but the config. A copy: the rules' params keep the user's own.
config = {
    **config,
    "simulated": any(row["source"] == "simulated" for row in ROLES),
    "contaminated": kept_although(Path(config["results"]) / "curate/notes.tsv"),
}
