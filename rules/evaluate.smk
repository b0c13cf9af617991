"""What was measured, of all datasets, in one table each; also the target `evaluate`.

In: `<results>/metrics/{dataset}/{stage}.tsv` and `{stage}.notes.tsv` of the stages that the config asks for;
`comparisons.tsv` of `score`, `mlp.comparisons.tsv`.
Out: `<results>/metrics/scores.tsv`, `comparisons.tsv`, `notes.tsv`.
"""


# Also the target: snakemake evaluate
rule evaluate:
    input:
        scores=lambda w: measured(),
        notes=lambda w: measured(part=".notes"),
        comparisons=lambda w: expand(
            "<results>/metrics/{dataset}/{table}.tsv",
            dataset=filter(admitted, DATASETS),
            table=["comparisons", *(["mlp.comparisons"] if "mlp" in STAGES else [])],
        ),
    output:
        scores="<results>/metrics/scores.tsv",
        notes="<results>/metrics/notes.tsv",
        comparisons="<results>/metrics/comparisons.tsv",
    log:
        "<results>/logs/evaluate/evaluate.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 1000 * attempt,
    script:
        "../workflow/evaluate.py"
