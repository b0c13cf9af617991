"""The embedding goes back to the slice it came from.

In: `<results>/slices/{slice}.h5ad`, `<results>/embeddings/stpatch/{slice}.safetensors`.
Out: `<results>/annotated/{slice}.h5ad`, the slice with `obsm["X_stpatch"]`.
"""


rule annotate:
    input:
        slice="<results>/slices/{slice}.h5ad",
        embedding="<results>/embeddings/stpatch/{slice}.safetensors",
    output:
        "<results>/annotated/{slice}.h5ad",
    log:
        "<results>/logs/annotate/{slice}.log",
    conda:
        "../envs/eval.yaml"
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    script:
        "../workflow/annotate.py"
