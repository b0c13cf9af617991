"""Who goes on: every curated slice is looked at once, and the rules from grid on expand over what was admitted.

In: `<results>/slices/{slice}.h5ad` and `<results>/sketches/{slice}.npz` of every slice of the two tables, rejected ones included
(but not of slices that are barred by their ids), and the fingerprints of evaluation slices.
Out: `<results>/curate/admitted.tsv`, `quarantine.tsv`, `duplicates.tsv`, `notes.tsv`.
"""


checkpoint admit:
    input:
        slices=expand("<results>/slices/{slice}.h5ad", slice=CURATED),
        sketches=expand("<results>/sketches/{slice}.npz", slice=CURATED),
        fingerprints=ROOT / "catalogue/aux/fingerprints.tsv",
    output:
        admitted="<results>/curate/admitted.tsv",
        quarantine="<results>/curate/quarantine.tsv",
        duplicates="<results>/curate/duplicates.tsv",
        notes="<results>/curate/notes.tsv",
    log:
        "<results>/logs/admit/admit.log",
    benchmark:
        "<results>/benchmarks/admit/admit.tsv"
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 3000 * attempt,
    params:
        roles=ROLES,
        barred=BARRED,
        organism=config["organism"],
        layout=config["layout"],
        pitch_um=config["pitch_um"],
        window=config["window"],
        genes=config["genes"],
        min_observed=config["min_observed"],
        min_genes=config["min_genes"],
        max_quarantined=config["max_quarantined"],
        allow_contamination=config["allow_contamination"],
    script:
        "../workflow/admit.py"
