"""One's own labelled slices: a row and a CSV of labels become a scored dataset (the slice is simulated)."""

from __future__ import annotations

import pandas as pd

from tests.unit.sections import noise
from tests.unit.simulated import GENE_TABLES, small_slice
from workflow.catalogue import load_roles, merge_roles
from workflow.controls import load_section
from workflow.curate import curate
from workflow.deposits import domain_names, write_deposit
from workflow.score import score

COLUMNS = ["slice", "dataset", "split", "source", "url", "format", "organism", "donor", "labels", "label_column"]


def test_a_row_and_a_csv_of_labels_make_a_scored_set_named_by_the_split(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the rows name relative paths
    area = small_slice()
    places = write_deposit(area, "spaceranger-2", tmp_path)
    truth = pd.read_csv(tmp_path / places["labels"], sep="\t", dtype=str)
    key, label = truth.columns
    mine = truth.rename(columns={key: "spot id", label: "my layers"}).sample(frac=1, random_state=0)
    mine.loc[mine.index[:100], "my layers"] = "NA"  # not annotated
    mine.to_csv(tmp_path / "annotated.csv", index=False)
    own = [
        "own_1",
        "mystudy",
        "MySet",
        "file",
        places["url"],
        "auto",
        "human",
        "patient 1",
        "annotated.csv",
        "my layers",
    ]
    corpus = ["other", "mystudy", "train", "file", "elsewhere", "auto", "human", "", "", ""]
    for name, line in (("downstream.tsv", own), ("train.tsv", corpus)):
        (tmp_path / name).write_text("\t".join(COLUMNS) + "\n" + "\t".join(line) + "\n")

    roles = load_roles(["train.tsv", "downstream.tsv"], root=tmp_path)
    curated = curate(merge_roles(roles)["own_1"], GENE_TABLES)
    curated.write_h5ad("own_1.h5ad")
    section = load_section("own_1.h5ad")
    settings = {"heads": ["knn"], "n_splits": 1, "window": (6, 6), "seed": 0, "target_sum": 1e4}
    scored = score("MySet", [section], noise([section]), protocol_names=["random20"], **settings)

    kept = dict(zip(mine["spot id"], mine["my layers"], strict=True))
    assert section.donor == "patient 1"
    assert {role["split"] for role in roles} == {"train", "MySet"}
    assert set(scored.predictions["label"]) == set(domain_names(area.domain)[area.in_tissue])
    assert len(scored.predictions) == sum(kept[barcode] != "NA" for barcode in curated.obs_names)
    assert set(scored.scores["dataset"]) == {"MySet"}
    assert set(scored.scores["section"]) == {"own_1", "pooled"}
    accuracy = scored.scores.query("metric == 'accuracy' and section == 'pooled'").set_index("method")["value"]
    assert accuracy["coordinates"] > accuracy["majority"] + 0.2  # the labels lie where they were planted
    assert accuracy["stpatch"] < accuracy["majority"] + 0.05  # an embedding of noise
