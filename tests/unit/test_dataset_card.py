"""The dataset card: what went in, what was left out, whom to cite; nothing that no row states."""

from __future__ import annotations

import re

import pytest
import yaml

from workflow.catalogue import columns
from workflow.dataset_card import card, read_rows, references

SETTINGS = {
    "catalogue": "catalogue/visium_human.tsv", "downstream": "catalogue/downstream.tsv", "organism": "human",
    "genes": 512, "window": [16, 16], "allow_contamination": False, "min_genes": 2000,
}  # fmt: skip


def row(slice, split="train", source="geo", **fields):
    blank = dict.fromkeys(columns(), "")
    sizes = {"n_spots": "1000", "n_genes": "18000", "organism": "human", "url": "https://host/x.h5"}
    return {**blank, **sizes, "slice": slice, "split": split, "source": source, **fields}


def index(split, rows, n_windows=10):
    return {
        "split": split, "h": 16, "w": 16, "m": 512, "n_samples": n_windows * len(rows), "shards": [{}],
        "config_sha256": "c" * 64, "catalogue_sha256": "d" * 64,
        "slices": [{"slice": row["slice"], "n_windows": n_windows} for row in rows],
    }  # fmt: skip


def write(admitted, quarantine=(), duplicates=(), notes=(), **settings):
    tables = {"admitted": admitted, "quarantine": quarantine, "duplicates": duplicates, "notes": notes}
    tables = {name: list(rows) for name, rows in tables.items()}
    indices = {split: index(split, [row for row in admitted if row["split"] == split]) for split in ("train", "val")}
    return card(tables, indices, {**SETTINGS, **settings})


def header(text):
    return yaml.safe_load(text.split("---\n")[1])


ROWS = [
    row("a", tissue="brain", donor="d1", licence="CC BY 4.0", accession="GSE1 GSM2"),
    row("b", tissue="brain", donor="d2", n_spots="500", accession="GSM3"),
    row("v", split="val", tissue="heart", licence="CC BY 4.0", source="10x", accession="V1_Human_Heart"),
    row("e", split="DLPFC", tissue="cortex", licence="CC0"),
]


def test_the_header_is_what_a_dataset_hub_reads():
    told = header(write(ROWS))
    assert told["license"] == "other"
    assert told["size_categories"] == ["n<1K"]
    assert told["configs"][0]["data_files"] == [
        {"split": "train", "path": "train/train-*.tar"},
        {"split": "validation", "path": "val/val-*.tar"},
    ]
    assert header(write([row for row in ROWS if row["licence"] == "CC BY 4.0"]))["license"] == "cc-by-4.0"


def test_totals_are_of_the_slices_that_went_into_the_shards():
    text = write(ROWS)
    assert "cut from 3 slices (2,500 spots in tissue)" in text
    assert "| train | 2 | 2 | 1,500 | 20 |" in text
    assert "| val | 1 | 0 | 1,000 | 10 |" in text
    assert "| human | brain | 2 | 1,500 |" in text
    assert "cortex" not in text  # evaluated only: no window of it is in the shards


def test_a_licence_that_nobody_states_is_unknown_and_counted():
    licences = write(ROWS).split("## Licences")[1]
    assert "| human | CC BY 4.0 | 2 | 2,000 |" in licences
    assert "| human | unknown | 1 | 500 |" in licences


def test_what_was_left_out_is_counted_by_reason_and_listed():
    out = [
        {"slice": name, "stage": "admit", "code": code, "file": "/data/me/x.h5", "found": "x | y", "expected": "z"}
        for name, code in (("p", "duplicate"), ("q", "duplicate"), ("r", "not_counts"))
    ]
    twins = [{"slice": "p", "duplicate_of": "a", "evidence": "containment 1.00"}]
    text = write(ROWS, quarantine=out, duplicates=twins)
    assert "| `duplicate` | 2 | the same tissue under another name |" in text
    assert "| `not_counts` | 1 |" in text
    assert "| p | admit | duplicate | x \\| y | z |" in text
    assert "| p | a | containment 1.00 |" in text
    assert "/data/me" not in text


def test_citations_are_built_from_identifiers_and_name_no_author():
    found = references(
        row("a", accession="GSE12 GSM34", evidence="table; doi 10.1016/j.labinv.2023.100258; pmid 123,456; x")
    )
    assert set(found) == {"GSE12", "doi_10_1016_j_labinv_2023_100258", "pmid_123", "pmid_456"}
    assert found["doi_10_1016_j_labinv_2023_100258"] == {"type": "article", "doi": "10.1016/j.labinv.2023.100258"}
    assert found["GSE12"]["url"].endswith("acc.cgi?acc=GSE12")
    assert set(references(row("b", accession="GSM34"))) == {"GSM34"}
    assert set(references(row("z", source="zenodo", url="https://zenodo.org/records/77/files/a.zip"))) == {"zenodo_77"}
    assert set(references(row("t", source="10x", accession="V1_Heart"))) == {"tenx_V1_Heart"}
    uuid = "12345678-1234-1234-1234-123456789abc"
    url = f"https://datasets.cellxgene.cziscience.com/{uuid}.h5ad"
    assert references(row("c", source="cellxgene", url=url))[f"cellxgene_{uuid}"]["url"] == url
    text = write([*ROWS, row("n")])
    assert "author" not in text.split("```bibtex")[1].split("```")[0]
    assert "Without an identifier to cite: n." in text


def test_every_bibtex_entry_has_a_key_of_its_own_and_closed_braces():
    entries = write(ROWS).split("```bibtex\n")[1].split("```")[0]
    keys = re.findall(r"^@\w+\{(\w+),$", entries, re.MULTILINE)
    assert sorted(keys) == sorted(set(keys)) == ["GSE1", "GSM3", "tenx_V1_Human_Heart"]
    assert entries.count("{") == entries.count("}")


def test_a_simulated_corpus_says_so_at_the_top():
    text = write([row("a", source="simulated")])
    assert "**Slices of this corpus are simulated" in text.split("## ")[0]
    assert "(simulated)" in header(text)["pretty_name"]
    assert "simulated" in header(text)["tags"]
    assert "simulated" not in write(ROWS).split("## ")[0]


def test_contamination_that_was_let_in_is_said_at_the_top_and_only_then():
    notes = [{"slice": "a", "kind": "contamination", "detail": "pretrained on although: the tissue of e"}]
    text = write(ROWS, notes=notes, allow_contamination=True)
    assert "**`allow_contamination` is on: 1 of the slices match an evaluation slice" in text.split("## ")[0]
    assert "| a | contamination | pretrained on although: the tissue of e |" in text
    assert "contaminated" in header(text)["tags"]
    assert "allow_contamination` is on" not in write(ROWS, allow_contamination=True)


def test_the_card_says_how_to_rebuild_and_by_which_hashes():
    text = write(ROWS)
    assert yaml.safe_load(text.split("```yaml\n")[1].split("```")[0]) == SETTINGS
    assert f"| train | 20 | 1 | `{'c' * 64}` | `{'d' * 64}` |" in text


def test_the_order_of_the_tables_changes_no_byte():
    assert write(ROWS) == write(ROWS[::-1])


@pytest.mark.parametrize("cell", ["<b>x</b>", "a|b", "[link](x)", "`code`"])
def test_a_cell_from_elsewhere_starts_no_markup(cell):
    (line,) = [line for line in write([row("a", tissue=cell)]).splitlines() if line.startswith("| human | ")][:1]
    assert len(re.findall(r"(?<!\\)\|", line)) == 5
    assert not re.search(r"(?<!\\)[<>`\[]", line)


def test_an_empty_corpus_still_has_a_card():
    text = write([])
    assert "cut from 0 slices" in text
    assert "No row names an identifier" in text


def test_tables_are_read_as_admission_writes_them(tmp_path):
    (tmp_path / "t.tsv").write_text('# stpatch notes 1\nslice\tkind\tdetail\na\tx\t"quoted\n')
    assert read_rows(tmp_path / "t.tsv") == [{"slice": "a", "kind": "x", "detail": '"quoted'}]
