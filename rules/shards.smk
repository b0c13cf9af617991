"""Training samples: windows of each slice, then tars of all windows of a split; and whole slices for embedding.

In: <results>/grids/{slice}.zarr, <results>/stats/{genes.tsv,components.safetensors}, <results>/stats/moments/{slice}.npz
Out: <results>/windows/{slice}.bin and .npy (temporary), <results>/shards/{train,val}/ (index.json, samples.npy, genes.tsv,
means.safetensors, components.safetensors where the config asks for components, and as many tars as the windows fill),
<results>/shards/slices/{slice}.tar
"""

SAMPLE_SETTINGS = [
    "layout",
    "pitch_um",
    "window",
    "genes",
    "windows_per_slice",
    "max_coverage",
    "selection",
    "epsilon",
    "min_observed",
    "target_sum",
    "codec",
    "shard_mb",
    "seed",
    "allow_contamination",
]


rule windows:
    input:
        grid="<results>/grids/{slice}.zarr",
        genes="<results>/stats/genes.tsv",
    output:
        pack=temp("<results>/windows/{slice}.bin"),
        index=temp("<results>/windows/{slice}.npy"),
    log:
        "<results>/logs/windows/{slice}.log",
    benchmark:
        "<results>/benchmarks/windows/{slice}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    params:
        window=config["window"],
        genes=config["genes"],
        windows_per_slice=config["windows_per_slice"],
        max_coverage=config["max_coverage"],
        selection=config["selection"],
        epsilon=config["epsilon"],
        min_observed=config["min_observed"],
        target_sum=config["target_sum"],
        codec=config["codec"],
        seed=config["seed"],
    script:
        "../workflow/windows.py"


# The number of tars is known only once they are written: the index, written last, stands for them.
rule shards:
    input:
        packs=lambda wildcards: expand("<results>/windows/{slice}.bin", slice=admitted(wildcards.split)),
        indices=lambda wildcards: expand("<results>/windows/{slice}.npy", slice=admitted(wildcards.split)),
        moments=lambda wildcards: expand(
            "<results>/stats/moments/{slice}.npz", slice=admitted(wildcards.split)
        ),
        genes="<results>/stats/genes.tsv",
        components="<results>/stats/components.safetensors" if config["components"] else [],
    output:
        index="<results>/shards/{split}/index.json",
        samples="<results>/shards/{split}/samples.npy",
        genes="<results>/shards/{split}/genes.tsv",
    log:
        "<results>/logs/shards/{split}.log",
    benchmark:
        "<results>/benchmarks/shards/{split}.tsv"
    wildcard_constraints:
        split="train|val",
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: (1000 + 2 * config["shard_mb"]) * attempt,
    params:
        # rows without the places of their files: the same slices give the same index on any machine
        rows=lambda wildcards: [
            {key: value for key, value in SLICES[name].items() if key not in ("url", "labels")}
            for name in admitted(wildcards.split)
        ],
        settings={key: config[key] for key in SAMPLE_SETTINGS},
    script:
        "../workflow/shards.py"


rule whole:
    input:
        grid="<results>/grids/{slice}.zarr",
        genes="<results>/stats/genes.tsv",
    output:
        "<results>/shards/slices/{slice}.tar",
    log:
        "<results>/logs/whole/{slice}.log",
    benchmark:
        "<results>/benchmarks/whole/{slice}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=lambda wildcards, attempt: 4000 * attempt,
    params:
        target_sum=config["target_sum"],
        codec=config["codec"],
        simulated=lambda wildcards: SLICES[wildcards.slice]["source"] == "simulated",
    script:
        "../workflow/whole.py"
