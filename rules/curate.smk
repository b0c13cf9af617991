"""One slice, whatever its source, made into the curated form of docs/format.md, or set apart with the reason.

In: the slice's own files; for remote ones resources/download/{slice}/files.json, for simulated ones
resources/simulated/{slice}/deposit.json; the tables of gene names.
Out: <results>/slices/{slice}.h5ad (a rejected slice has no spots, and its reason inside).
"""

from workflow.sources import files_at


def slice_files(wildcards):
    """The listing of a slice that is simulated or fetched; else its own files, those that exist (curate names the missing)."""
    row = SLICES[wildcards.slice]
    if row["source"] == "simulated":
        return {"listing": f"resources/simulated/{wildcards.slice}/deposit.json"}
    if row["source"] != "file":
        return {"listing": f"resources/download/{wildcards.slice}/files.json"}
    places = row["url"].split() + ([row["labels"]] if row["labels"] else [])
    return {"files": [file for place in places for file in files_at(place)]}


rule curate:
    input:
        unpack(slice_files),
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
