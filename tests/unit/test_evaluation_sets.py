"""The rows of catalogue/downstream.tsv from their sources' own packagings to curated slices with labels (sections are simulated)."""

from __future__ import annotations

import csv
from collections import Counter, defaultdict
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT
from tests.server import serving
from tests.unit.evaluation_deposits import (
    CLASSES,
    COLORECTAL_HEADERS,
    N_SPOTS,
    deposited,
    h5ad,
    layer_map,
    repinned,
    section,
)
from tests.unit.simulated import GENE_TABLES
from workflow.catalogue import label_maps, load_catalogue
from workflow.controls import load_section
from workflow.curate import curate, located, write_slice
from workflow.download import download
from workflow.errors import BadLabels
from workflow.keys import Keys
from workflow.labels import spot_labels
from workflow.locators import parse
from workflow.lock import Lock
from workflow.published import PUBLISHED, check
from workflow.readers import read_deposit

ROWS = load_catalogue(ROOT / "catalogue" / "downstream.tsv")
MAPS = label_maps(ROWS, ROOT)
SETS = ["DLPFC", "LNA", "LND", "Col", "BrC", "Ton"]


def rows_of(dataset: str) -> list[dict[str, str]]:
    return [row for row in ROWS if row["split"] == dataset]


def fetched(row: dict[str, str], folder: Path, server) -> dict:
    """What the download stage says of a row."""
    lock = Lock(row["slice"], folder / "lock.tsv", [])
    wanted = {name: row[name] for name in ("slice", "url", "sha256", "bytes", "format", "labels")}
    shared = folder.parent / "archives"
    return download(wanted, folder, lock, shared=shared, mirrors=server.mirrors, backoff=0.01)


def curated(row: dict[str, str], folder: Path) -> anndata.AnnData:
    files, labels = located(row, folder / "files.json")
    label_map = MAPS.get(row["slice"])
    return curate(row, GENE_TABLES, files, labels, Path(label_map) if label_map else None)


@pytest.fixture(scope="module")
def acquired(tmp_path_factory):
    """Function set -> (what was deposited, slice -> curated slice), through the real download and curate stages."""
    kept = {}
    with serving() as server:

        def acquire(dataset: str):
            if dataset not in kept:
                deposit = deposited(rows_of(dataset))
                for url, data in deposit.files.items():
                    server.put(url, data)
                folder, slices = tmp_path_factory.mktemp(dataset), {}
                for row in rows_of(dataset):
                    pinned = repinned(row, deposit.files)
                    listed = fetched(pinned, folder / row["slice"], server)
                    assert listed["quarantine"] is None, listed["quarantine"]
                    slices[row["slice"]] = curated(pinned, folder / row["slice"])
                kept[dataset] = deposit, slices
            return kept[dataset]

        yield acquire


def as_mapped(dataset: str, raw: str) -> str | None:
    """The label that a raw string should become: by the set's map if it has one, none where the source gives none."""
    path = GENE_TABLES / f"labels_{dataset}.tsv"
    if raw and path.exists():
        with open(path, newline="", encoding="utf-8") as table:
            spelled = {
                row["raw"]: row["label"] for row in csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE)
            }
        raw = spelled.get(raw, raw)
    return raw or None


@pytest.mark.parametrize("dataset", SETS)
def test_every_slice_of_a_set_arrives_whole_with_the_counts_that_were_deposited(acquired, dataset):
    deposit, slices = acquired(dataset)
    assert sorted(slices) == sorted(row["slice"] for row in rows_of(dataset))
    for name, adata in slices.items():
        of = deposit.sections[name]
        assert list(adata.obs_names) == list(of.barcodes[of.in_tissue])
        order = pd.Index(adata.var_names).get_indexer(of.gene_ids.astype(str))
        assert (order >= 0).all()
        assert (adata.X[:, order] != of.counts[of.in_tissue]).nnz == 0
        lattice = adata.uns[Keys.STPATCH]["lattice"]
        assert lattice["kind"] == "staggered"
        array = adata.obs[[Keys.ARRAY_ROW, Keys.ARRAY_COL]].to_numpy()
        if lattice["source"] == "array":
            assert (array == np.column_stack([of.array_row, of.array_col])[of.in_tissue]).all()
        else:  # inferred of pixels: the same up to a shift
            shift = array - np.column_stack([of.array_row, of.array_col])[of.in_tissue]
            assert len(np.unique(shift, axis=0)) == 1


@pytest.mark.parametrize("dataset", SETS)
def test_the_labels_of_a_set_arrive_on_the_spots_that_the_source_gives_them_to(acquired, dataset):
    deposit, slices = acquired(dataset)
    for name, adata in slices.items():
        expected = [as_mapped(dataset, deposit.labels[name][spot]) for spot in adata.obs_names]
        assert [None if pd.isna(label) else label for label in adata.obs[Keys.LABEL]] == expected
        assert 0 < sum(label is None for label in expected) < N_SPOTS / 4


@pytest.mark.parametrize(("dataset", "n_classes"), [("DLPFC", 7), ("LNA", 10), ("LND", 10), ("BrC", 20), ("Ton", 4)])
def test_a_set_has_the_published_number_of_classes(acquired, dataset, n_classes):
    _, slices = acquired(dataset)
    found = {label for adata in slices.values() for label in adata.obs[Keys.LABEL].dropna()}
    assert len(found) == n_classes
    assert found == set(CLASSES[dataset]) - {"Exclude"}


def test_the_strings_of_the_colorectal_pathologist_become_26_classes_and_no_label_of_excluded_spots(acquired):
    deposit, slices = acquired("Col")
    found = {label for adata in slices.values() for label in adata.obs[Keys.LABEL].dropna()}
    assert len(found) == 26
    excluded = [(name, spot) for name in slices for spot, raw in deposit.labels[name].items() if raw == "exclude"]
    assert len(excluded) > 14
    assert all(pd.isna(slices[name].obs[Keys.LABEL][spot]) for name, spot in excluded)


def test_all_four_headers_of_the_colorectal_annotations_are_among_the_fixtures_and_in_every_row(acquired):
    assert {row["label_column"] for row in rows_of("Col")} == {"|".join(COLORECTAL_HEADERS)}
    assert len(rows_of("Col")) >= len(COLORECTAL_HEADERS)


def test_of_an_archive_that_several_slices_share_each_takes_its_own_members_and_it_is_fetched_once(tmp_path, server):
    pair = rows_of("LNA") + rows_of("LND")
    deposit = deposited(pair)
    (address,) = deposit.files
    path = server.put(address, deposit.files[address])
    for row in pair:
        listed = fetched(repinned(row, deposit.files), tmp_path / row["slice"], server)
        members = [entry["member"] for entry in listed["files"]]
        assert [Path(member).name for member in members] == ["adata_RNA.h5ad", "annotation.csv"]
        (folder,) = {Path(member).parent.name for member in members}
        assert folder.endswith(row["slice"].split("_", 1)[1])
    assert [asked for asked, _ in server.seen] == [path]


def test_a_row_with_the_sources_own_digest_sets_the_fixture_apart(tmp_path, server):
    """The pins are live: what the helper replaces is what the download stage compares."""
    (row,) = rows_of("BrC")
    for url, data in deposited([row]).files.items():
        server.put(url, data)
    assert fetched(row, tmp_path / "real", server)["quarantine"]["code"] == "source_changed"


def test_repinning_changes_digests_and_sizes_alone():
    for dataset in SETS:
        rows = rows_of(dataset)
        files = deposited(rows).files
        for row in rows:
            changed = repinned(row, files)
            assert {name for name in row if row[name] != changed[name]} <= {"url", "labels", "sha256", "bytes"}
            for before, after in zip(row["url"].split(), changed["url"].split(), strict=True):
                assert (parse(before).url, parse(before).members) == (parse(after).url, parse(after).members)
            assert len(changed["sha256"]) == len(row["sha256"])


def test_both_replicates_of_a_colorectal_patient_carry_one_donor():
    """So that leave_donor never trains on the section beside the one it tests."""
    by_patient = defaultdict(set)
    for row in rows_of("Col"):
        by_patient[row["slice"].split("_")[1]].add(row["donor"])
    assert len(by_patient) == 7
    assert all(len(donors) == 1 for donors in by_patient.values())
    assert Counter(row["donor"] for row in rows_of("Col")) == dict.fromkeys(
        (donor for donors in by_patient.values() for donor in donors), 2
    )
    assert "" not in {row["donor"] for row in rows_of("Col") + rows_of("DLPFC")}


def test_the_layer_map_of_all_cortex_sections_is_not_taken_for_the_labels_of_one(tmp_path):
    """It has no header and repeats barcodes: the rows name the metadata of each section instead."""
    rows = rows_of("DLPFC")[:2]
    deposit = deposited(rows)
    path = tmp_path / "labels.tsv"
    path.write_bytes(layer_map(deposit))
    name = rows[0]["slice"]
    (tmp_path / "s.h5ad").write_bytes(h5ad(deposit.sections[name]))
    with pytest.raises(BadLabels, match="layer_guess"):
        spot_labels(name, read_deposit(name, [tmp_path / "s.h5ad"], "h5ad"), "layer_guess", path)
    counted = Counter(line.split("\t")[1] for line in path.read_text().splitlines())
    assert counted == {row["accession"]: sum(map(bool, deposit.labels[row["slice"]].values())) for row in rows}


def published() -> list[dict[str, str]]:
    with open(PUBLISHED, newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))


def test_the_published_counts_add_up_and_are_those_of_the_catalogue():
    rows = published()
    labelled = [
        int(row["value"]) for row in rows if (row["set"], row["what"]) == ("DLPFC", "labelled") and row["slice"]
    ]
    assert len(labelled) == 12
    assert sum(labelled) == 47329
    spots = {row["slice"]: row["value"] for row in rows if row["what"] == "spots" and row["slice"]}
    assert spots == {row["slice"]: row["spots"] for row in ROWS if row["spots"]}
    assert {row["set"] for row in rows} == set(SETS)
    assert all(row["evidence"] for row in rows)


@pytest.fixture(scope="module")
def sections(acquired, tmp_path_factory):
    """The three tonsil sections as evaluation reads them."""
    folder, found = tmp_path_factory.mktemp("sections"), []
    for name, adata in acquired("Ton")[1].items():
        write_slice(adata, folder / f"{name}.h5ad")
        found.append(load_section(folder / f"{name}.h5ad"))
    return found


def counts_table(folder, *rows: tuple) -> Path:
    path = folder / "published.tsv"
    path.write_text("set\tslice\twhat\tvalue\tevidence\n" + "".join("\t".join(map(str, row)) + "\n" for row in rows))
    return path


def test_a_dataset_with_the_published_counts_has_no_difference(sections, tmp_path):
    labelled = sum(label is not None for label in sections[1].labels)
    table = counts_table(
        tmp_path,
        ("Ton", "", "spots", 3 * N_SPOTS, "a"),
        ("Ton", "", "classes", 4, "b"),
        ("Ton", "Ton_slice2", "labelled", labelled, "c"),
        ("Other", "", "spots", 1, "d"),
    )
    assert labelled == N_SPOTS - 8
    assert check("Ton", sections, table) == []
    assert check("mine", sections, table) == []


def test_a_difference_names_slice_count_found_published_and_source(sections, tmp_path):
    table = counts_table(
        tmp_path, ("Ton", "", "classes", 5, "their page"), ("Ton", "Ton_slice3", "spots", 4000, "their table")
    )
    assert check("Ton", sections, table) == [
        ("", "classes: found 4, published 5 (their page)"),
        ("Ton_slice3", f"spots: found {N_SPOTS}, published 4000 (their table)"),
    ]


def test_a_section_that_was_set_apart_is_told(sections, tmp_path):
    table = counts_table(
        tmp_path, ("Ton", "Ton_slice1", "spots", N_SPOTS, "a"), ("Ton", "Ton_slice2", "spots", N_SPOTS, "a")
    )
    assert check("Ton", sections[:1], table) == [("", "sections: Ton_slice2 of the 2 published are not there")]


def test_the_shipped_counts_tell_a_simulated_tonsil_from_the_real_one(sections):
    assert [slice for slice, _ in check("Ton", sections)] == [""]
    assert "published 13366" in check("Ton", sections)[0][1]


def test_sections_of_the_fixtures_differ():
    a, b = (section(name, "Br5292", N_SPOTS) for name in ("DLPFC_151507", "DLPFC_151508"))
    assert a.in_tissue.sum() == b.in_tissue.sum() == N_SPOTS
    assert (a.counts != b.counts).nnz > 1000
