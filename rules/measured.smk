"""What the stages that measure have in common: whose embeddings, which stages, and where their tables lie.

In: the section `evaluate` of the config.
Out: no files; the names below.
"""

# ENCODERS: model -> its folder. MODELS: all whose embeddings are measured, those of others' methods included.
ENCODERS = dict.fromkeys(["untrained", "stpatch"], f"<results>/pretrain/{RUN}") | config["evaluate"]["models"]
MODELS = [*ENCODERS, *config["evaluate"]["foreign"]]


def embeddings(wildcards):
    """Files of all models for the slices of a dataset, model after model: `workflow.assemble.by_model` parts them."""
    return expand(
        "<results>/embeddings/{model}/{slice}.safetensors", model=MODELS, slice=admitted(wildcards.dataset)
    )


# STAGES that measure; what asks for them stands in the section `evaluate` of the config.
STAGES = ["score"]
STAGES += ["mlp"] if "mlp" in config["evaluate"]["heads"] else []
STAGES += ["cluster"] if "clustering" in config["evaluate"]["protocols"] else []
STAGES += ["reconstruct"] if "reconstruction" in config["evaluate"]["protocols"] else []


def measured(*datasets, part=""):
    """The stages' tables of these datasets (all if none is named); with `part=".notes"` their notes."""
    return expand(
        "<results>/metrics/{dataset}/{stage}{part}.tsv",
        dataset=datasets or filter(admitted, DATASETS),
        stage=STAGES,
        part=part,
    )


def compared(dataset):
    """The comparisons of every stage that puts probes on features."""
    stages = {"score": "", "mlp": "mlp."}
    return [
        f"<results>/metrics/{dataset}/{prefix}comparisons.tsv"
        for stage, prefix in stages.items()
        if stage in STAGES
    ]


def drawn(stage, *figures):
    """The figures of a stage, of all datasets, where the config asks for it."""
    asked = figures if stage in STAGES else ()
    return expand("<results>/report/{figure}/{dataset}.png", figure=asked, dataset=filter(admitted, DATASETS))
