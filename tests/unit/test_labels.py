"""Labels in the shapes in which the six evaluation sets publish them (barcodes and labels here are made up)."""

from __future__ import annotations

import csv
import json

import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tests.conftest import ROOT
from tests.unit.simulated import GENE_TABLES, row, small_slice
from workflow.curate import curate
from workflow.deposits import domain_names, write_deposit
from workflow.errors import BadLabels
from workflow.keys import Keys
from workflow.labels import spot_labels
from workflow.readers import Deposit

BARCODES = ["AAACAAGTATCTCCCA-1", "AAACACCAATAACTGC-1", "AAACAGAGCGACTCCT-1", "AAACAGCTTTCAGAAG-1"]
LABEL_MAPS = ROOT / "catalogue" / "aux"
COL = "Pathologist Annotations|Pathologist Annotation|Pathologist annotation|Pathologist_KH"


def deposit(folder, spots=BARCODES, **obs) -> Deposit:
    n = len(spots)
    return Deposit(
        file=folder / "adata_RNA.h5ad",
        files=[folder / "adata_RNA.h5ad"],
        counts=sparse.csr_matrix(np.ones((n, 1))),
        spots=np.array(spots, dtype=object),
        ids=np.array(["ENSG00000000003"], dtype=object),
        symbols=np.array([""], dtype=object),
        in_tissue=np.ones(n, bool),
        array=None,
        pixels=None,
        obs=pd.DataFrame(obs, index=spots),
    )


def read(folder, text, column, *, label_map=None, spots=BARCODES):
    (folder / "labels.tsv").write_text(text)  # the name that a fetched table has, whatever its format
    labels = spot_labels("a", deposit(folder, spots), column, folder / "labels.tsv", label_map)
    return [None if pd.isna(label) else label for label in labels]


def made_map(folder, **labels):
    path = folder / "labels_Set.tsv"
    path.write_text("raw\tlabel\n" + "".join(f"{raw}\t{label}\n" for raw, label in labels.items()))
    return path


@pytest.mark.parametrize("header", COL.split("|"))
def test_colorectal_annotations_are_read_under_each_of_their_four_headers(header, tmp_path):
    text = f"Barcode,{header}\n{BARCODES[1]},tumor\n{BARCODES[0]},submucosa\n{BARCODES[2]},exclude\n{BARCODES[3]},\n"
    assert read(tmp_path, text, COL, label_map=LABEL_MAPS / "labels_Col.tsv") == ["submucosa", "tumor", None, None]


def test_the_first_column_named_that_the_table_has_is_taken(tmp_path):
    text = f"Barcode,first,second\n{BARCODES[0]},x,y\n"
    assert read(tmp_path, text, "none|second|first")[0] == "y"
    with pytest.raises(BadLabels, match="found the columns Barcode, first, second; expected a column 'none' or 'No'"):
        read(tmp_path, text, "none|No")


def test_typos_and_spellings_of_one_colorectal_class_become_one_label(tmp_path):
    raw = [
        "IC aggragate_stroma or muscularis",
        "IC aggreates_stroma or muscularis",
        "IC aggregate_muscularis or stroma",
    ]
    rows = "".join(
        f"{barcode},{text}\n" for barcode, text in zip(BARCODES, [*raw, "epitehlium&submucosa"], strict=True)
    )
    labels = read(tmp_path, "Barcode,Pathologist_KH\n" + rows, COL, label_map=LABEL_MAPS / "labels_Col.tsv")
    assert labels == ["IC aggregate muscularis or stroma"] * 3 + ["epithelium & submucosa"]


def test_a_raw_string_that_the_map_lacks_is_an_error_that_names_it(tmp_path):
    text = f"Barcode,domain\n{BARCODES[0]},tumour\n{BARCODES[1]},tumor\n"
    with pytest.raises(BadLabels, match=r"slice a .*raw labels 'tumour' \(1 in all\).*labels_Col.tsv lists"):
        read(tmp_path, text, "domain", label_map=LABEL_MAPS / "labels_Col.tsv")


def test_a_map_with_a_row_for_all_others_keeps_their_spelling(tmp_path):
    text = f"barcode,manual-anno\n{BARCODES[0]},Exclude\n{BARCODES[1]},medulla cords\n{BARCODES[2]},cortex\n"
    labels = read(tmp_path, text, "manual-anno", label_map=LABEL_MAPS / "labels_LND.tsv")
    assert labels == [None, "medulla cords", "cortex", None]


def test_a_map_that_leaves_no_label_is_refused(tmp_path):
    with pytest.raises(BadLabels, match="no label in column 'domain'"):
        read(tmp_path, f"b,domain\n{BARCODES[0]},x\n", "domain", label_map=made_map(tmp_path, x=""))


@pytest.mark.parametrize("key", ["Barcode", "barcode", ""])
def test_lymph_node_annotations_are_joined_whatever_their_key_column_is_called(key, tmp_path):
    rows = "".join(f"{b},{label}\n" for b, label in zip(BARCODES[::-1], "dcba", strict=True))
    assert read(tmp_path, f"{key},manual-anno\n{rows}", "manual-anno") == list("abcd")


@pytest.mark.parametrize("prefix", ["s1_", "s1-", "A1_LN#"])
@pytest.mark.parametrize("prefixed", ["table", "slice"])
def test_one_prefix_before_all_barcodes_is_stripped_on_either_side(prefix, prefixed, tmp_path):
    longer = [prefix + barcode for barcode in BARCODES]
    inside, spots = (longer, BARCODES) if prefixed == "table" else (BARCODES, longer)
    rows = "".join(f"{b},{label}\n" for b, label in zip(inside, "abcd", strict=True))
    assert read(tmp_path, f"Barcode,manual-anno\n{rows}", "manual-anno", spots=spots) == list("abcd")


def test_prefixes_of_two_sections_in_one_table_are_not_stripped(tmp_path):
    rows = "".join(f"s{i % 2 + 1}_{b},{i}\n" for i, b in enumerate(BARCODES))
    with pytest.raises(BadLabels, match="none of the slice's 4 spots among its 4 rows"):
        read(tmp_path, f"Barcode,manual-anno\n{rows}", "manual-anno")


def test_an_r_export_one_short_in_the_header_is_keyed_by_its_row_names(tmp_path):
    text = "orig.ident\tfine_annot_type\n" + "".join(f"{b}\tBRCA1\tTumor_{i}\n" for i, b in enumerate(BARCODES))
    assert read(tmp_path, text, "fine_annot_type") == ["Tumor_0", "Tumor_1", "Tumor_2", "Tumor_3"]


def test_tonsil_labels_come_from_a_column_of_the_slices_own_file(tmp_path):
    own = deposit(tmp_path, final_annot=pd.Categorical(["follicle", None, "epithelium", "follicle"]))
    labels = spot_labels("a", own, "final_annot", None)
    assert [None if pd.isna(x) else x for x in labels] == ["follicle", None, "epithelium", "follicle"]
    mapped = spot_labels("a", own, "final_annot", None, made_map(tmp_path, follicle="F", epithelium="E"))
    assert list(mapped.categories) == ["E", "F"]


@pytest.mark.parametrize("path", sorted(LABEL_MAPS.glob("labels_*.tsv")), ids=lambda path: path.stem)
def test_a_shipped_map_is_sorted_lists_each_string_once_and_maps_labels_to_themselves_or_not_at_all(path):
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    assert rows == sorted(rows, key=lambda row: (row["label"], row["raw"])) or path.stem == "labels_LND"
    raw = {row["raw"]: row["label"] for row in rows}
    assert len(raw) == len(rows)
    assert all(raw.get(label, label) == label for label in raw.values())


def test_a_curated_slice_has_the_mapped_labels_and_names_the_map_among_its_inputs(tmp_path):
    area = small_slice()
    places = write_deposit(area, "spaceranger-2", tmp_path)
    given = row(url=str(tmp_path / places["url"]), labels=str(tmp_path / places["labels"]), label_column="no|domain")
    spelling = made_map(tmp_path, domain_1="", **{f"domain_{i}": f"Domain {i}" for i in range(2, 6)})
    adata = curate(given, GENE_TABLES, label_map=spelling)
    deposited = domain_names(area.domain)[area.in_tissue]
    expected = [None if d == "domain_1" else d.replace("domain_", "Domain ") for d in deposited]
    assert [None if pd.isna(x) else x for x in adata.obs[Keys.LABEL]] == expected
    assert str(spelling) in [entry["path"] for entry in json.loads(adata.uns[Keys.STPATCH]["inputs"])]
