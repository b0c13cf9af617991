"""The embedded default, run for real: what `make demo` builds, and that it can be built again byte for byte."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys

import anndata as ad
import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.pipeline.conftest import DEMO, snakemake
from tests.rulegraph import embedded, rulegraph

pytestmark = [pytest.mark.pipeline, pytest.mark.filterwarnings("ignore::UserWarning:anndata")]


def digests(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="module")
def admitted(built_demo):
    return pd.read_csv(built_demo / "results/curate/admitted.tsv", sep="\t", skiprows=1, keep_default_na=False)


def test_every_simulated_slice_is_admitted(admitted, built_demo):
    quarantine = pd.read_csv(built_demo / "results/curate/quarantine.tsv", sep="\t", skiprows=1)
    assert len(quarantine) == 0
    assert set(admitted["split"]) == {"train", "val", "SimDomains"}
    assert {"spaceranger", "cellxgene", "geo"} <= set(admitted["format"])


def test_a_second_run_has_nothing_to_do(built_demo):
    printed = snakemake("--cores", 2, *DEMO, "all", directory=built_demo).stdout
    assert "Nothing to be done" in printed


def test_the_readmes_rule_graph_is_the_workflows(built_demo):
    assert embedded((ROOT / "README.md").read_text()) == rulegraph(built_demo)


def test_shards_are_byte_identical_for_one_core_and_for_two(built_demo, tmp_path):
    snakemake("--cores", 1, *DEMO, "data", directory=tmp_path)
    theirs = digests(built_demo / "results/shards")
    ours = digests(tmp_path / "results/shards")
    for name in ours:
        assert ours[name] == theirs[name], name
    assert {f"{split}/index.json" for split in ("train", "val")} <= set(ours)

    shutil.rmtree(tmp_path / "results/shards")
    snakemake("--cores", 2, *DEMO, "data", directory=tmp_path)
    assert digests(tmp_path / "results/shards") == ours


def test_the_model_predicts_held_out_windows_better_than_each_genes_mean(built_demo):
    lines = (built_demo / "results/pretrain/model/metrics.jsonl").read_text().splitlines()
    held_out = [row for row in map(json.loads, lines) if row["kind"] == "val"]
    assert held_out[-1]["masked_mse"] < 0.97 * held_out[-1]["gene_mean_mse"]


def test_every_observed_spot_of_every_slice_is_annotated(built_demo, admitted):
    for name in sorted(set(admitted["slice"])):
        slice = ad.read_h5ad(built_demo / f"results/annotated/{name}.h5ad")
        embedding = slice.obsm["X_stpatch"]
        assert embedding.shape[0] == slice.n_obs
        assert np.isfinite(embedding).all()
        assert embedding.std(axis=0).max() > 0


def test_the_scores_hold_the_model_beside_its_controls(built_demo):
    scores = pd.read_csv(built_demo / "results/metrics/scores.tsv", sep="\t", comment="#")
    assert list(scores) == "dataset section method head protocol split metric value".split()
    controls = {"majority", "coordinates", "pca", "neighbour_mean_6", "neighbour_mean_18", "neighbour_mean_36"}
    assert {*controls, "untrained", "stpatch"} <= set(scores["method"])
    assert {"random20", "leave_section", "leave_donor"} <= set(scores["protocol"])
    assert {"knn", "logistic"} <= set(scores["head"])
    assert {"clustering", "reconstruction"} <= set(scores["protocol"])
    bounded = scores[scores["metric"].isin(["accuracy", "macro_f1", "ari", "nmi", "homogeneity", "pearson"])]
    assert bounded["value"].between(-1, 1).all()
    assert set(bounded["protocol"]) == set(scores["protocol"])


def test_a_users_own_h5ad_is_embedded_by_one_command(built_demo, tmp_path):
    source = ad.read_h5ad(built_demo / "results/slices/sim_d.h5ad")
    mine = ad.AnnData(source.X.astype(np.float32), obs=source.obs[["array_row", "array_col"]], var=source.var[[]])
    mine.obsm["spatial"] = source.obsm["spatial"]
    mine.write_h5ad(tmp_path / "mine.h5ad")
    command = [sys.executable, "-m", "workflow.annotate", "--model", built_demo / "results/pretrain/model"]
    command += ["--h5ad", tmp_path / "mine.h5ad", "--out", tmp_path / "out.h5ad"]
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT)
    ours = ad.read_h5ad(tmp_path / "out.h5ad")
    pipeline = ad.read_h5ad(built_demo / "results/annotated/sim_d.h5ad")
    np.testing.assert_array_equal(ours.obsm["X_stpatch"], pipeline.obsm["X_stpatch"])
    assert list(ours.obs_names) == list(mine.obs_names)


def test_a_bad_slice_ends_in_quarantine_and_does_not_stop_the_others(built_demo, tmp_path):
    good = ad.read_h5ad(built_demo / "results/slices/sim_d.h5ad")
    good.obs = good.obs[["array_row", "array_col"]]
    for name, change in {"good": 0.0, "scaled": -0.5}.items():
        slice = ad.AnnData(good.X.astype(np.float32), obs=good.obs, var=good.var[[]], obsm=good.obsm)
        slice.X.data += change
        slice.write_h5ad(tmp_path / f"{name}.h5ad")
    header = "slice\tdataset\tsplit\tsource\turl\tformat\torganism"
    rows = [f"{name}\tmine\ttrain\tfile\t{name}.h5ad\th5ad\thuman" for name in ("good", "scaled")]
    (tmp_path / "mine.tsv").write_text("\n".join([header, *rows]) + "\n")
    (tmp_path / "none.tsv").write_text(header + "\n")
    (tmp_path / "mine.yaml").write_text(
        "{catalogue: mine.tsv, downstream: none.tsv, max_quarantined: 0.5, window: [12, 12], genes: 64, "
        "windows_per_slice: 4}\n"
    )
    snakemake("--cores", 2, "data", "--configfile", "mine.yaml", directory=tmp_path)
    quarantine = pd.read_csv(tmp_path / "results/curate/quarantine.tsv", sep="\t", skiprows=1)
    assert quarantine[["slice", "code"]].values.tolist() == [["scaled", "normalised"]]
    train = json.loads((tmp_path / "results/shards/train/index.json").read_text())
    assert [(s["slice"], s["n_windows"]) for s in train["slices"]] == [("good", 4)]
    assert json.loads((tmp_path / "results/shards/val/index.json").read_text())["n_samples"] == 0
