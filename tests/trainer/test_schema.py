"""The pipeline's config lists the trainer's knobs, which it can't import: here both lists are compared."""

from __future__ import annotations

import yaml

from tests.conftest import ROOT
from trainer.config import knobs
from trainer.pretrain import SETTINGS

TYPES = {int: "integer", float: "number", str: "string"}


def test_the_pipelines_schema_lists_every_knob_of_the_trainer_with_its_type():
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
    listed = {name: field["type"] for name, field in schema["properties"]["pretrain"]["properties"].items()}
    del listed["config"]
    assert listed == {name: TYPES[type(field.default)] for name, field in knobs(*SETTINGS).items()}
