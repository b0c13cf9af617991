"""The tables of slices that ship, and what finds a slice that stands twice or belongs to an evaluation set."""

from __future__ import annotations

import csv
import re
from collections import defaultdict

import pytest

from tests.conftest import ROOT
from workflow.catalogue import contaminated, identities, label_maps, load_catalogue, load_ids, main, repeated
from workflow.locators import parse

AUX = ROOT / "catalogue" / "aux"
PRETRAINING = ["visium_human", "visium_mouse"]
HOSTS = {
    "ftp.ncbi.nlm.nih.gov",
    "cf.10xgenomics.com",
    "exampledata.scverse.org",
    "datasets.cellxgene.cziscience.com",
    "zenodo.org",
    "spatial-dlpfc.s3.us-east-2.amazonaws.com",
    "raw.githubusercontent.com",
}
TISSUES = set(
    "bladder|bone|brain|breast|cerebellum|cervix|colon|colon and rectum|digit|dorsolateral prefrontal cortex|embryo|endometrium|heart|"
    "heart left ventricle|joint|kidney|lacrimal gland|large intestine|liver|lung|lymph node|mouth|olfactory bulb|"
    "olfactory epithelium|ovary|pancreas|prostate|salivary gland|skeletal muscle|skin|spinal cord|spleen|stomach|tendon|thymus|tonsil|".split(
        "|"
    )
)
SETS = {"DLPFC": 12, "LNA": 1, "LND": 1, "Col": 14, "BrC": 1, "Ton": 3}


def table(name):
    return load_catalogue(ROOT / "catalogue" / f"{name}.tsv")


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def plain(text):
    return re.sub(r" \(.*", "", text)


def row(slice="a", **fields):
    blank = dict.fromkeys(("dataset", "accession", "url", "sha256", "spots", "tissue"), "")
    return blank | {"slice": slice, "split": "train", "source": "geo", "url": f"https://host/{slice}"} | fields


def test_the_command_counts_the_shipped_tables_and_finds_nothing_twice(capsys):
    assert main([]) == 0
    told = capsys.readouterr().out
    count, spots, known = re.search(
        r"visium_human.tsv: (\d+) slices, ([\d,]+) spots by the sources' figures \(given for (\d+)", told
    ).groups()
    human = table("visium_human")
    assert int(count) == len(human) >= 500
    assert int(spots.replace(",", "")) == sum(int(row["spots"] or 0) for row in human) >= 1_000_000
    assert int(known) == sum(bool(row["spots"]) for row in human)
    assert told.count("no slice stands twice; none to pretrain on is an evaluation slice") == 3


@pytest.mark.parametrize("name", [*PRETRAINING, "downstream"])
def test_every_row_names_its_evidence_and_its_files_at_a_known_host(name):
    rows = table(name)
    for row in rows:
        assert row["evidence"], row["slice"]
        assert "unverified" not in row["evidence"]
        for address in [*row["url"].split(), *row["labels"].split()]:
            locator = parse(address)
            assert locator.url.startswith("https://"), row["slice"]
            assert locator.host in HOSTS, row["slice"]
        if row["source"] == "geo":
            gsm = re.search(r"GSM\d+", row["accession"]).group()
            assert row["url"] == f"https://ftp.ncbi.nlm.nih.gov/geo/samples/{gsm[:-3]}nnn/{gsm}/suppl/"
            assert row["format"] == "geo"
        if row["source"] == "10x":
            assert [parse(url).url.rpartition(row["accession"])[2] for url in row["url"].split()] == [
                "_filtered_feature_bc_matrix.h5",
                "_spatial.tar.gz",
            ]
    key = (lambda row: row["slice"]) if name != "downstream" else (lambda row: (row["dataset"], row["slice"]))
    assert rows == sorted(rows, key=key)


@pytest.mark.parametrize("name", [*PRETRAINING, "downstream"])
def test_tissues_keep_to_one_vocabulary_and_ids_stand_behind_the_term(name):
    for row in table(name):
        assert plain(row["tissue"]) in TISSUES, row["slice"]
        assert re.fullmatch(r"[^()]*( \(UBERON:\d{7}\))?", row["tissue"]), row["slice"]
        assert row["disease"] == row["disease"].strip()


@pytest.mark.parametrize("name", PRETRAINING)
def test_no_series_donor_publication_or_equal_count_stands_on_both_sides_of_the_split(name):
    rows = table(name)
    sides = defaultdict(set)
    for row in rows:
        assert row["split"] in ("train", "val")
        sides["dataset", row["dataset"]].add(row["split"])
        sides["donor", row["donor"] or row["slice"]].add(row["split"])
        for pmid in re.findall(r"(?<=pmid )[\d,]+", row["evidence"]):
            for one in pmid.split(","):
                sides["pmid", one].add(row["split"])
        if row["spots"] and row["spots"] != "4992":
            sides["count", plain(row["tissue"]), row["spots"]].add(row["split"])
    assert [key for key, found in sides.items() if len(found) > 1] == []
    assert 0.03 <= sum(row["split"] == "val" for row in rows) / len(rows) <= 0.08


@pytest.mark.parametrize("name", PRETRAINING)
def test_rows_of_one_tissue_and_one_count_have_a_written_verdict(name):
    judged = {frozenset((v["slice_a"], v["slice_b"])) for v in rows_of(AUX / "verdicts.tsv")}
    equal = defaultdict(list)
    for row in table(name):
        if row["spots"]:
            equal[plain(row["tissue"]), row["spots"]].append(row["slice"])
    pairs = [frozenset((a, b)) for same in equal.values() for a in same for b in same if a < b]
    assert pairs
    assert [sorted(pair) for pair in pairs if pair not in judged] == []


def test_verdicts_are_legal_and_what_was_called_a_duplicate_is_not_listed():
    slices = {row["slice"]: row for name in PRETRAINING for row in table(name)}
    verdicts = rows_of(AUX / "verdicts.tsv")
    assert {v["verdict"] for v in verdicts} <= {"distinct", "duplicate", "unresolved"}
    for v in verdicts:
        assert v["slice_a"] in slices
        assert v["reason"]
        assert v["spots"] == slices[v["slice_a"]]["spots"]
        assert v["verdict"] != "duplicate" or v["slice_b"] not in slices


def test_the_six_evaluation_sets_are_whole_and_replicates_share_their_donor():
    rows = table("downstream")
    assert {name: sum(row["split"] == name for row in rows) for name in SETS} == SETS
    assert all(row["label_column"] for row in rows)
    patients = defaultdict(list)
    for row in rows:
        if row["split"] == "Col":
            patients[row["donor"]].append(row["slice"])
            assert parse(row["url"]).md5
            assert parse(row["labels"]).members == (f"*Pathologist_Annotations_{row['slice']}.csv",)
    assert sorted(map(len, patients.values())) == [2] * 7
    assert len({row["donor"] for row in rows if row["split"] == "DLPFC"}) == 3


def test_every_evaluation_slice_would_be_noticed_among_those_to_pretrain_on():
    ids = load_ids()
    assert {entry["set"] for entry in ids} == set(SETS)
    assert {entry["relation"] for entry in ids} == {"same", "sibling", "suspected"}
    assert {entry["kind"] for entry in ids} <= set(identities(row()))
    assert all(entry["evidence"] for entry in ids)
    for known in table("downstream"):
        found = contaminated([known | {"split": "train"}], ids)
        assert known["split"] in {entry["set"] for _, entry in found}, known["slice"]
        assert contaminated([known], ids) == []


@pytest.mark.parametrize(
    ("fields", "set_", "relation"),
    [
        ({"source": "10x", "accession": "V1 Breast Cancer Block A, Section 2"}, "BrC", "sibling"),
        ({"url": "https://x.org/samples/spatial-exp/9.0.0/V1_Breast_Cancer_Block_A_Section_1/a.h5"}, "BrC", "same"),
        ({"url": "https://zenodo.org/api/records/7760264/files/a.zip/content"}, "Col", "same"),
        ({"url": "https://datasets.cellxgene.cziscience.com/f4960511-686c-4955-989a-cf2b033231fc.h5ad"}, "Col", "same"),
        ({"dataset": "68cba939-4e72-4405-80ef-512a05044fba"}, "Col", "same"),
        ({"slice": "GSM8195494"}, "LNA", "same"),
        ({"url": "https://x.org/GSE1_RAW.tar#prefix=GSM8195497_D1"}, "Ton", "suspected"),
        ({"url": "https://x.org/h5/151673_filtered_feature_bc_matrix.h5"}, "DLPFC", "same"),
    ],
)
def test_an_evaluation_slice_is_found_by_each_kind_of_id(fields, set_, relation):
    found = contaminated([row(**fields)], load_ids())
    assert (set_, relation) in {(entry["set"], entry["relation"]) for _, entry in found}
    assert contaminated([row(**fields) | {"split": set_}], load_ids()) == []


def test_numbers_that_only_look_like_ids_are_none():
    known = identities(row(url="https://ftp/geo/samples/GSM4565nnn/GSM4565823/suppl/", accession="GSE151673 s1515071"))
    assert known["gsm"] == {"GSM4565823"}
    assert known["dlpfc_sample"] == set()
    assert contaminated([row(accession="GSE1516731")], load_ids()) == []


@pytest.mark.parametrize(
    ("first", "second", "what"),
    [
        ({"accession": "GSE1 GSM12"}, {"url": "https://h/GSM12nnn/GSM12/suppl/"}, "GSM GSM12"),
        (
            {"source": "10x", "accession": "V1_Human_Heart", "url": "https://h/spatial-exp/1.0.0/a"},
            {"url": "https://h/samples/spatial-exp/1.1.0/V1_Human_Heart/b"},
            "10x name v1humanheart",
        ),
        (
            {"url": "https://c/b5e5b9f2-1d74-4590-8dd1-6fc505ca6f5b.h5ad"},
            {"accession": "b5e5b9f2-1d74-4590-8dd1-6fc505ca6f5b"},
            "dataset id b5e5b9f2-1d74-4590-8dd1-6fc505ca6f5b",
        ),
        ({"url": "https://h/f.h5ad?download=1#md5=" + 32 * "0"}, {"url": "https://h/f.h5ad"}, "url https://h/f.h5ad"),
        ({"sha256": 64 * "a"}, {"sha256": 64 * "a" + " " + 64 * "b"}, "sha256 " + 64 * "a"),
    ],
)
def test_two_rows_of_one_slice_are_found(first, second, what):
    assert repeated([row("a", **first), row("b", **second), row("c")]) == [("a", "b", what)]


def test_sections_that_prefix_or_member_tell_apart_are_two_slices():
    assert (
        repeated(
            [
                row("a", url="https://h/GSE1_RAW.tar#prefix=GSM12_A1_"),
                row("b", url="https://h/GSE1_RAW.tar#prefix=GSM12_B1_"),
                row("c", url="https://h/x.zip#member=*/s1.h5ad"),
                row("d", url="https://h/x.zip#member=*/s2.h5ad"),
            ]
        )
        == []
    )


def test_the_command_fails_on_a_table_with_an_evaluation_slice_or_a_repeated_one(tmp_path, capsys):
    header = "slice dataset split source url format organism".split()
    lines = [
        ["a", "d", "train", "geo", "https://h/GSM12/", "geo", "human"],
        ["b", "d", "val", "geo", "https://h/x/GSM12/", "geo", "human"],
        ["c", "d", "train", "zenodo", "https://zenodo.org/records/12654113/files/x.h5ad", "h5ad", "human"],
    ]
    path = tmp_path / "mine.tsv"
    path.write_text("\n".join("\t".join(line) for line in [header, *lines]) + "\n")
    assert main([str(path)]) == 1
    told = capsys.readouterr().out
    assert "twice: a and b are one slice (GSM GSM12)" in told
    assert "evaluation slice: c is same as Ton (zenodo 12654113)" in told


def test_a_slices_label_map_is_that_of_its_evaluation_set_and_only_where_it_has_labels(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    roles = [
        {"slice": "a", "split": "train", "label_column": "x"},
        {"slice": "a", "split": "Col", "label_column": "x"},
        {"slice": "b", "split": "Col", "label_column": ""},
        {"slice": "c", "split": "DLPFC", "label_column": "x"},
    ]
    assert label_maps(roles, ROOT) == {"a": str(AUX / "labels_Col.tsv")}
