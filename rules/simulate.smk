"""Simulated slices, written as their sources deposit them.

In: the shipped table of human genes (real ids and symbols).
Out: resources/simulated/{slice}/deposit.json, which lists the files of the deposit that lies beside it.
"""


rule simulate:
    input:
        genes=ROOT / "catalogue/aux/genes_human.tsv",
    output:
        manifest="resources/simulated/{slice}/deposit.json",
    log:
        "<results>/logs/simulate/{slice}.log",
    benchmark:
        "<results>/benchmarks/simulate/{slice}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 2500 * attempt,
    params:
        row=lambda wildcards: {
            name: SLICES[wildcards.slice][name] for name in ("donor", "accession", "format")
        },
    script:
        "../workflow/simulate.py"
