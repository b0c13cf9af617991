"""The pipeline's config lists the trainer's knobs, which it can't import: here both lists are compared."""

from __future__ import annotations

import jsonschema
import pytest
import yaml

from tests.conftest import ROOT
from trainer.config import knobs, settings
from trainer.model import ModelConfig
from trainer.pretrain import SETTINGS

TYPES = {int: "integer", float: "number", str: "string"}


def test_the_pipelines_schema_lists_every_knob_of_the_trainer_with_its_type():
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
    listed = {name: field["type"] for name, field in schema["properties"]["pretrain"]["properties"].items()}
    del listed["config"]
    assert listed == {name: TYPES[type(field.default)] for name, field in knobs(*SETTINGS).items()}


@pytest.mark.parametrize(
    "preset", [ROOT / "config.yaml", *(ROOT / "presets").glob("*.yaml")], ids=lambda path: path.stem
)
def test_a_preset_is_valid_and_its_shards_have_what_its_model_asks_for(preset):
    default, over = (yaml.safe_load(path.read_text()) for path in (ROOT / "config.yaml", preset))
    config = default | over | {"evaluate": default["evaluate"] | over["evaluate"]}
    jsonschema.validate(config, yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text()))
    model, _, _ = settings(ROOT / config["pretrain"]["config"], {}, *SETTINGS)
    h, w = config["window"]
    model = ModelConfig(n_genes=20000, m=config["genes"], h=h, w=w, **model)
    assert model.gene_embeddings == "random" or model.axes <= config["components"]
