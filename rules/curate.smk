"""One slice, whatever its source, made into the curated form of docs/format.md, or set apart with the reason.

In: the slice's own files; for remote ones resources/download/{slice}/files.json and labels that are local; for simulated ones
resources/simulated/{slice}/deposit.json; the map of raw labels where the slice's evaluation set has one; the tables of gene names.
Out: <results>/slices/{slice}.h5ad (a rejected slice has no spots, and its reason inside).
"""

from workflow.catalogue import label_maps
from workflow.sources import curate_inputs

LABEL_MAPS = label_maps(ROLES, ROOT)


rule curate:
    input:
        unpack(lambda wildcards: curate_inputs(SLICES[wildcards.slice])),
        label_map=lambda wildcards: LABEL_MAPS.get(wildcards.slice, []),
        genes=expand(ROOT / "catalogue/aux/genes_{organism}.tsv", organism=["human", "mouse"]),
    output:
        "<results>/slices/{slice}.h5ad",
    log:
        "<results>/logs/curate/{slice}.log",
    benchmark:
        "<results>/benchmarks/curate/{slice}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    params:
        row=lambda wildcards: SLICES[wildcards.slice],
        gene_tables=lambda wildcards, input: str(Path(input.genes[0]).parent),
    script:
        "../workflow/curate.py"
