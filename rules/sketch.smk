"""A sample of each curated slice's entries, by which admission recognises the same tissue under another name.

In: `<results>/slices/{slice}.h5ad`
Out: `<results>/sketches/{slice}.npz`
"""


rule sketch:
    input:
        "<results>/slices/{slice}.h5ad",
    output:
        "<results>/sketches/{slice}.npz",
    log:
        "<results>/logs/sketch/{slice}.log",
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 1500 * attempt,
    script:
        "../workflow/sketch.py"
