"""What the corpus is made of, for whoever gets the shards: slices, sources, licences, citations, and what was left out.

In: `<results>/curate/*.tsv`, `<results>/shards/{train,val}/index.json`
Out: `<results>/shards/README.md`
"""


rule dataset_card:
    input:
        **{name: f"<results>/curate/{name}.tsv" for name in ("admitted", "quarantine", "duplicates", "notes")},
        indices=expand("<results>/shards/{split}/index.json", split=["train", "val"]),
    output:
        "<results>/shards/README.md",
    log:
        "<results>/logs/dataset_card/dataset_card.log",
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=1000,
    params:
        settings={
            key: config[key]
            for key in ("catalogue", "downstream", "organism", *SAMPLE_SETTINGS, "min_genes")
        },
    script:
        "../workflow/dataset_card.py"
