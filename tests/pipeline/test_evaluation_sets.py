"""The real rules on rows of catalogue/downstream.tsv, whose sources a server on loopback stands in for (sections are simulated)."""

from __future__ import annotations

import csv

import anndata
import pandas as pd
import pytest
import yaml
from safetensors import safe_open

from tests.conftest import ROOT
from tests.pipeline.conftest import snakemake
from tests.pipeline.test_acquire import write_table
from tests.server import serving
from tests.unit.evaluation_deposits import deposited, h5ad, repinned, section
from workflow.catalogue import load_catalogue
from workflow.keys import Keys

pytestmark = pytest.mark.pipeline

CHOSEN = ["LNA_Human_Lymph_Node_A1", "LND_Human_Lymph_Node_D1", "SN123_A551763_Rep1", "SN124_A551763_Rep2"]

TRAIN = {"slice": "train_1", "source": "file", "format": "h5ad", "url": "train.h5ad"}  # evaluation needs a vocabulary


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory):
    """(directory, what was deposited) after slices of three sets were fetched, curated and admitted, and one method was skipped."""
    directory = tmp_path_factory.mktemp("evaluated")
    rows = [row for row in load_catalogue(ROOT / "catalogue/downstream.tsv") if row["slice"] in CHOSEN]
    found = deposited(rows)
    with serving() as server:
        for url, data in found.files.items():
            server.put(url, data)
        write_table(directory / "mine.tsv", [repinned(row, found.files) for row in rows])
        (directory / "train.h5ad").write_bytes(h5ad(section("train_1", "train_1", 320)))
        write_table(directory / "train.tsv", [TRAIN])
        config = {"catalogue": "train.tsv", "downstream": "mine.tsv", "mirrors": server.mirrors, "min_free_gb": -1000}
        config |= {"min_genes": 0, "genes": 50, "evaluate": {"foreign": ["scgpt"]}}
        (directory / "mine.yaml").write_text(yaml.safe_dump(config))
        skipped = [f"results/embeddings/scgpt/{name}.safetensors" for name in CHOSEN if name.startswith("SN")]
        targets = ("results/curate/quarantine.tsv", *skipped)
        snakemake("--cores", 2, *targets, "--configfile", "mine.yaml", directory=directory)
    return directory, found


def test_each_slice_is_admitted_under_its_set_with_its_labels(evaluated):
    directory, found = evaluated
    with open(directory / "results/curate/admitted.tsv") as table:
        assert next(table).startswith("# stpatch admitted")
        admitted = {row["slice"]: row for row in csv.DictReader(table, delimiter="\t")}
    assert {name: row["split"] for name, row in admitted.items()} == {
        "train_1": "train",
        "LNA_Human_Lymph_Node_A1": "LNA",
        "LND_Human_Lymph_Node_D1": "LND",
        "SN123_A551763_Rep1": "Col",
        "SN124_A551763_Rep2": "Col",
    }
    for name in CHOSEN:
        adata = anndata.read_h5ad(directory / f"results/slices/{name}.h5ad")
        assert adata.n_obs == found.sections[name].in_tissue.sum()
        raw = pd.Series(found.labels[name])[adata.obs_names]
        unlabelled = raw.isin(["", "Exclude", "exclude"]).to_numpy()
        assert (adata.obs[Keys.LABEL].isna().to_numpy() == unlabelled).all()
    assert admitted["SN123_A551763_Rep1"]["donor"] == admitted["SN124_A551763_Rep2"]["donor"] == "Col_A551763"


def test_excluded_spots_and_typos_are_mapped_by_the_rule_of_the_set(evaluated):
    directory, found = evaluated
    lnd = anndata.read_h5ad(directory / "results/slices/LND_Human_Lymph_Node_D1.h5ad")
    assert "Exclude" in set(found.labels["LND_Human_Lymph_Node_D1"].values())
    assert "Exclude" not in set(lnd.obs[Keys.LABEL].dropna())
    col = anndata.read_h5ad(directory / "results/slices/SN124_A551763_Rep2.h5ad")
    assert not {label for label in col.obs[Keys.LABEL].dropna() if "aggra" in label or "epitehlium" in label}
    assert "IC aggregate muscularis or stroma" in set(col.obs[Keys.LABEL].dropna())


def test_a_method_of_others_that_cannot_run_leaves_its_reason_for_each_slice(evaluated):
    directory, _ = evaluated
    for name in CHOSEN:
        if name.startswith("SN"):
            with safe_open(directory / f"results/embeddings/scgpt/{name}.safetensors", framework="numpy") as file:
                assert file.get_tensor("X").shape == (0, 0)
                about = file.metadata()
            assert about["slice"] == name
            assert "evaluate.foreign_weights.scgpt" in about["skipped"]
            assert "--forcerun results/foreign/scgpt/Col.safetensors" in about["skipped"]
    assert "scgpt is skipped" in (directory / "results/logs/foreign/scgpt/Col.log").read_text()
