"""The contamination guard: ids, kin, fingerprints; nothing is fetched to find out."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from tests.conftest import ROOT
from workflow.catalogue import columns, load_catalogue, load_ids
from workflow.errors import CatalogueError
from workflow.fingerprints import FIRST_LINE, KEPT, fingerprint, read_fingerprints, read_table, recognise, update
from workflow.guard import barred, main
from workflow.keys import Keys
from workflow.simulate import tiny_slice
from workflow.sketch import sketch_slice, write_sketch

IDS = load_ids(ROOT / "catalogue/aux/evaluation_ids.tsv")
FINGERPRINTS = ROOT / "catalogue/aux/fingerprints.tsv"
UUID = "12345678-1234-1234-1234-123456789abc"


def row(slice, split="train", source="url", **fields):
    blank = dict.fromkeys(columns(), "")
    return {**blank, "slice": slice, "split": split, "source": source, "url": f"https://host/{slice}.h5", **fields}


def known(kind, id, relation="same"):
    return {"set": "Set", "kind": kind, "id": id, "relation": relation, "evidence": "a paper"}


@pytest.mark.parametrize(
    ("entry", "fields"),
    [
        (known("gsm", "GSM77"), {"source": "geo", "accession": "GSE1 GSM77"}),
        (known("gse", "GSE1"), {"source": "geo", "accession": "GSE1 GSM78"}),
        (known("10x_name", "V1_Breast"), {"source": "10x", "accession": "v1-breast"}),
        (
            known("10x_name", "V1_Breast"),
            {"url": "https://cf.10xgenomics.com/samples/spatial-exp/1.0.0/V1_Breast/x.h5"},
        ),
        (known("zenodo", "123456"), {"url": "https://zenodo.org/records/123456/files/a.zip#member=other.h5ad"}),
        (known("cellxgene_dataset", UUID), {"source": "cellxgene", "accession": UUID}),
        (known("cellxgene_collection", UUID), {"source": "cellxgene", "accession": f"{UUID} x"}),
        (known("dlpfc_sample", "151673"), {"url": "https://elsewhere/data/151673_filtered.h5"}),
    ],
)
def test_a_known_id_bars_a_slice_to_pretrain_on_and_nothing_else(entry, fields):
    other = known(entry["kind"], "999" if entry["kind"] != "10x_name" else "V1_Breast_2")
    assert barred([row("a", **fields)], [entry]).keys() == {"a"}
    assert barred([row("a", **fields)], [other]) == {}
    assert barred([row("a", split="Set", **fields)], [entry]) == {}


@pytest.mark.parametrize("relation", ["same", "sibling", "suspected"])
def test_siblings_and_suspects_are_barred_too_and_told_apart(relation):
    found = barred([row("a", source="geo", accession="GSM77")], [known("gsm", "GSM77", relation)])["a"]
    assert {"same": "is of", "sibling": "is kin to", "suspected": "may be of"}[relation] in found


def test_the_second_section_of_the_breast_block_is_barred_by_the_shipped_ids():
    section = row("mine", source="10x", accession="V1_Breast_Cancer_Block_A_Section_2")
    assert "is kin to the evaluation set BrC" in barred([section], IDS)["mine"]


def test_every_evaluation_slice_is_barred_by_its_own_row_once_it_is_to_be_pretrained_on():
    rows = load_catalogue(ROOT / "catalogue/downstream.tsv")
    roles = [{**row, "split": "train", "slice": f"other_name_{i}"} for i, row in enumerate(rows)]
    assert len(roles) > 30
    assert set(barred(roles, IDS)) == {role["slice"] for role in roles}  # without the table of evaluation slices


def test_no_slice_of_the_shipped_corpus_is_barred():
    roles = [
        role
        for table in ("visium_human", "visium_mouse", "downstream")
        for role in load_catalogue(ROOT / f"catalogue/{table}.tsv")
    ]
    assert barred(roles, IDS) == {}


def test_the_guard_asks_no_server(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the guard opened a connection")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)
    assert barred([row("a", source="geo", accession="GSM8195494")], IDS).keys() == {"a"}
    assert read_fingerprints(FINGERPRINTS)


@pytest.fixture
def results(tmp_path):
    """A run in which the evaluation slice `seen` was curated and sketched: simulated."""
    (tmp_path / "slices").mkdir()
    (tmp_path / "sketches").mkdir()
    adata = tiny_slice(seed=5, n_genes=400, shape=(40, 80), median_depth=6000.0, name="seen")
    adata.uns[Keys.STPATCH]["inputs"] = '[{"path": "somewhere/seen.h5", "bytes": 1, "sha256": "abc"}]'
    adata.write_h5ad(tmp_path / "slices/seen.h5ad")
    write_sketch(sketch_slice(tmp_path / "slices/seen.h5ad"), tmp_path / "sketches/seen.npz")
    return tmp_path


def sketched(adata, tmp_path, **lattice):
    adata.uns[Keys.STPATCH]["lattice"] |= lattice
    adata.write_h5ad(tmp_path / "other.h5ad")
    return sketch_slice(tmp_path / "other.h5ad")


def test_a_fingerprint_recognises_a_part_a_turned_copy_and_no_other_section(results):
    table = results / "fingerprints.tsv"
    update(table, [row("seen", "Set")], results, "")
    (seen,) = read_fingerprints(table)
    adata = tiny_slice(seed=5, n_genes=400, shape=(40, 80), median_depth=6000.0)
    part = adata[adata.obs.array_row.to_numpy() < 20][:, np.arange(0, 400, 2)].copy()
    (match,), unchecked = recognise(sketched(part, results), [seen])
    assert not unchecked
    assert match.containment == 1.0
    turned = adata.copy()
    turned.obs["array_row"] = 50 - turned.obs["array_row"]
    (match,), _ = recognise(sketched(turned, results, source="pixels"), [seen])
    assert match.containment > 0.9
    sister = tiny_slice(seed=6, n_genes=400, shape=(40, 80), median_depth=6000.0)
    assert recognise(sketched(sister, results), [seen]) == ([], 0)
    shallow = adata.copy()
    shallow.X.data[:] = 1
    assert recognise(sketched(shallow, results, source="pixels"), [seen]) == ([], 1)


def test_the_table_keeps_what_was_seen_before_and_leaves_the_rest_blank(results, tmp_path):
    table = tmp_path / "fingerprints.tsv"
    rows = [row("seen", "Set"), row("never", "Set")]
    assert update(table, rows, results, "the whole section") == (1, 1)
    first = read_table(table)
    assert [(r["slice"], bool(r["rare"])) for r in first] == [("never", False), ("seen", True)]
    assert first[1]["evidence"].endswith("400 genes of seen.h5, sha256 abc; the whole section")
    assert update(table, [*rows, row("new", "Set")], tmp_path / "nothing here", "") == (0, 1)
    assert [r["rare"] for r in read_table(table) if r["slice"] == "seen"] == [first[1]["rare"]]


def test_a_fingerprint_holds_the_lowest_hashes_and_survives_its_cells(results):
    sketch = sketch_slice(results / "slices/seen.h5ad")
    cells = fingerprint(sketch)
    assert len(cells["sites"].split()) == KEPT
    assert KEPT <= len(cells["rare"].split()) < KEPT + 4
    update(results / "f.tsv", [row("seen", "Set")], results, "")
    (again,) = read_fingerprints(results / "f.tsv")
    assert np.isin(again.sites, sketch.sites).all()
    assert again.sites_threshold < sketch.sites_threshold


def test_the_command_writes_the_table(results, capsys):
    header = "slice\tdataset\tsplit\tsource\turl\tformat\torganism"
    (results / "sets.tsv").write_text(f"{header}\nseen\tD\tSet\tfile\tseen.h5\th5ad\thuman\n")
    table = results / "f.tsv"
    main(["--write-fingerprints", str(results), "--table", str(table), "--downstream", str(results / "sets.tsv")])
    assert "1 slices from" in capsys.readouterr().out
    assert len(read_fingerprints(table)) == 1


def test_a_table_of_another_version_is_refused(tmp_path):
    (tmp_path / "f.tsv").write_text("# stpatch fingerprints 2\nslice\n")
    with pytest.raises(CatalogueError, match="expected '# stpatch fingerprints 1'"):
        read_fingerprints(tmp_path / "f.tsv")


def test_the_shipped_fingerprints_are_of_the_evaluation_slices_and_say_what_they_were_made_of():
    rows = read_table(FINGERPRINTS)
    assert FINGERPRINTS.read_text().startswith(FIRST_LINE)
    evaluated = {role["slice"]: role["split"] for role in load_catalogue(ROOT / "catalogue/downstream.tsv")}
    assert {r["slice"]: r["dataset"] for r in rows} == evaluated
    for r in rows:
        assert bool(r["rare"]) == bool(r["evidence"])
