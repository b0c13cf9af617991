"""The main job on real slices, by the documented config (docs/real-slices.md): from h5ad and tables to scores."""

from __future__ import annotations

import json

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.pipeline.conftest import snakemake

pytestmark = [pytest.mark.real, pytest.mark.pipeline]


@pytest.fixture(scope="module")
def built(real_data, tmp_path_factory):
    directory = tmp_path_factory.mktemp("real")
    # A short training run: what is tested here is the path. The documented command trains longer.
    (directory / "short.yaml").write_text("{windows_per_slice: 32, pretrain: {steps: 300}, evaluate: {splits: 1}}\n")
    config = ("--configfile", ROOT / "tests/real/config.yaml", "short.yaml")
    snakemake("--cores", 2, "all", *config, directory=directory)
    return directory


def test_mouse_slices_are_set_apart_and_all_human_ones_admitted(built):
    quarantine = pd.read_csv(built / "results/curate/quarantine.tsv", sep="\t", skiprows=1)
    assert set(quarantine["slice"]) == {"mouse_brain", "mouse_placenta"}
    assert set(quarantine["code"]) == {"other_organism"}
    admitted = pd.read_csv(built / "results/curate/admitted.tsv", sep="\t", skiprows=1)
    assert len(set(admitted["slice"])) == 13
    assert set(admitted.loc[admitted["split"] == "DLPFC", "slice"]) == {"dlpfc_151673", "dlpfc_151674"}


def test_held_out_donors_are_predicted_better_than_by_each_genes_mean(built):
    lines = (built / "results/pretrain/model/metrics.jsonl").read_text().splitlines()
    held_out = [row for row in map(json.loads, lines) if row["kind"] == "val"]
    assert held_out[-1]["masked_mse"] < held_out[-1]["gene_mean_mse"]


def test_both_cortex_sections_are_embedded_and_scored_beside_their_controls(built):
    for name in ("dlpfc_151673", "dlpfc_151674"):
        slice = ad.read_h5ad(built / f"results/annotated/{name}.h5ad")
        assert np.isfinite(slice.obsm["X_stpatch"]).all()
        assert slice.obs["label"].nunique() == 7
    scores = pd.read_csv(built / "results/metrics/scores.tsv", sep="\t", comment="#")
    accuracy = scores.query("metric == 'accuracy' and protocol == 'leave_section' and section == 'pooled'")
    best = accuracy.groupby("method")["value"].max()
    assert best["stpatch"] > best["majority"]
    # Known from these sections (docs/method.md, controls): a mean over neighbours beats single spots.
    assert best["neighbour_mean_18"] > best["pca"] > best["majority"]


def test_the_report_says_that_the_evaluated_sections_were_trained_on(built):
    sentence = "The scores of stpatch are not those of unseen tissue"  # of the box on the start page alone
    assert sentence in (built / "results/report.html").read_text()
    assert json.loads((built / "results/pretrain/model/config.json").read_text())["data"]["allow_contamination"] is True
    notes = pd.read_csv(built / "results/metrics/DLPFC/score.notes.tsv", sep="\t")
    assert {"shared_donor", "protocol_skipped"} <= set(notes["kind"])  # both sections are of one donor
