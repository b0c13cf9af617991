"""Who goes on: every curated slice is looked at once, and the rules from grid on expand over what was admitted.

In: `<results>/slices/{slice}.h5ad` of every slice of the two tables, rejected ones included.
Out: `<results>/curate/admitted.tsv`, `quarantine.tsv`, `duplicates.tsv`.
"""


checkpoint admit:
    input:
        expand("<results>/slices/{slice}.h5ad", slice=SLICES),
    output:
        admitted="<results>/curate/admitted.tsv",
        quarantine="<results>/curate/quarantine.tsv",
        duplicates="<results>/curate/duplicates.tsv",
    log:
        "<results>/logs/admit/admit.log",
    conda:
        "../envs/data.yaml"
    resources:
        mem_mb=2000,
    params:
        roles=ROLES,
        organism=config["organism"],
        layout=config["layout"],
        pitch_um=config["pitch_um"],
        window=config["window"],
        genes=config["genes"],
        min_observed=config["min_observed"],
        max_quarantined=config["max_quarantined"],
        allow_contamination=config["allow_contamination"],
    script:
        "../workflow/admit.py"
