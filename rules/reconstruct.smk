"""Masked region reconstruction: squares of tissue are hidden and filled in from the spots around them, by each model and by
interpolation.

In: `<results>/grids/{slice}.zarr`, `<results>/stats/genes.tsv`, `<results>/shards/slices/{slice}.tar`, and the folder of
each model (`model.safetensors`, `config.json`, `genes.tsv`).
Out: `<results>/regions/{slice}.safetensors`, `<results>/inpainted/{model}/{slice}.safetensors` (temporary),
`<results>/metrics/{dataset}/reconstruct.tsv` and `reconstruct.notes.tsv`.
"""


rule regions:
    input:
        grid="<results>/grids/{slice}.zarr",
        genes="<results>/stats/genes.tsv",
    output:
        "<results>/regions/{slice}.safetensors",
    log:
        "<results>/logs/regions/{slice}.log",
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    params:
        windows=config["evaluate"]["reconstruction"]["windows"],
        sides=config["evaluate"]["reconstruction"]["sides"],
        repeats=config["evaluate"]["reconstruction"]["repeats"],
        genes=config["evaluate"]["reconstruction"]["genes"],
        min_observed=config["min_observed"],
        target_sum=config["target_sum"],
        seed=config["seed"],
        simulated=lambda w: SLICES[w.slice]["source"] == "simulated",
    script:
        "../workflow/regions.py"


rule inpaint:
    input:
        weights=lambda w: f"{ENCODERS[w.model]}/model.safetensors",
        config=lambda w: f"{ENCODERS[w.model]}/config.json",
        genes=lambda w: f"{ENCODERS[w.model]}/genes.tsv",
        slice="<results>/shards/slices/{slice}.tar",
        regions="<results>/regions/{slice}.safetensors",
    output:
        temp("<results>/inpainted/{model}/{slice}.safetensors"),
    log:
        "<results>/logs/inpaint/{model}/{slice}.log",
    benchmark:
        "<results>/benchmarks/inpaint/{model}/{slice}.tsv"
    wildcard_constraints:
        model="|".join(ENCODERS),
    conda:
        "../envs/train.yaml"
    threads: 2
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
        gpu=1,
    params:
        folder=lambda w, input: Path(input.weights).parent,
        untrained=lambda w: "--untrained" if w.model == "untrained" else "",
    shell:
        "$PYTHON -m trainer.inpaint --model {params.folder:q} --shards {input.slice:q} --regions {input.regions:q}"
        " --out {output:q} {params.untrained} > {log:q} 2>&1"


rule reconstruct:
    input:
        grids=lambda w: expand("<results>/grids/{slice}.zarr", slice=admitted(w.dataset)),
        regions=lambda w: expand("<results>/regions/{slice}.safetensors", slice=admitted(w.dataset)),
        inpainted=lambda w: expand(
            "<results>/inpainted/{model}/{slice}.safetensors", model=ENCODERS, slice=admitted(w.dataset)
        ),
    output:
        scores="<results>/metrics/{dataset}/reconstruct.tsv",
        notes="<results>/metrics/{dataset}/reconstruct.notes.tsv",
    log:
        "<results>/logs/reconstruct/{dataset}.log",
    benchmark:
        "<results>/benchmarks/reconstruct/{dataset}.tsv"
    conda:
        "../envs/eval.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    params:
        models=list(ENCODERS),
        repeats=config["evaluate"]["reconstruction"]["repeats"],
        genes=config["evaluate"]["reconstruction"]["genes"],
        target_sum=config["target_sum"],
        simulated=lambda w: [name for name in admitted(w.dataset) if SLICES[name]["source"] == "simulated"],
    script:
        "../workflow/reconstruct.py"
