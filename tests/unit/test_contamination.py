"""What the score page says of the corpus against a dataset, on tables of admission with planted matches."""

from __future__ import annotations

import pandas as pd

from workflow.admit import DUPLICATES, NOTES, QUARANTINE
from workflow.contamination import kept_of, matched, status

CORPUS = [f"t{index}" for index in range(8)]
COLUMNS = ["slice", "dataset", "split", "source", "accession", "url", "donor"]


def row(name: str, split: str, dataset: str = "", donor: str = "", accession: str = "") -> tuple:
    return name, dataset or name, split, "geo", accession, "", donor


def barred(name: str, found: str, stage: str = "admit", code: str = "contamination") -> tuple:
    return name, stage, code, "", found, "", ""


def said(admitted=(), quarantined=(), duplicates=(), notes=(), fingerprints=(), elsewhere=()) -> str:
    tables = (
        pd.DataFrame(list(rows), columns=list(columns), dtype=str)
        for rows, columns in ((admitted, COLUMNS), (quarantined, QUARANTINE), (duplicates, DUPLICATES), (notes, NOTES))
    )
    return "\n".join(status("Set", CORPUS, ["e1", "e2"], *tables, list(fingerprints), list(elsewhere)))


def printed(name: str, rare: str = "1:2:3:4", dataset: str = "Set") -> dict[str, str]:
    return {"slice": name, "dataset": dataset, "rare": rare}


def test_slices_barred_by_id_and_by_content_are_counted_apart_and_those_of_this_set_named():
    text = said(
        quarantined=[
            barred("t0", "gse GSE1, which is of the evaluation set Set"),
            barred("t1", "gse GSE2, which is kin to the evaluation set Set2"),
            barred("t2", "the tissue of e1, evaluated in Set: the same counts file by sha256"),
            barred("t3", "no such file", stage="download", code="download_failed"),
        ]
    )
    assert "Of 8 slices listed for pretraining were barred: 2 by their ids, of them 1 because of Set (t0); " in text
    assert "; 1 by their counts, of them 1 because of Set (t2)." in text


def test_evidence_is_of_a_set_only_if_it_names_it_or_a_slice_of_it():
    assert matched("Set", "the slice is evaluated in Set", set())
    assert not matched("Set", "the slice is evaluated in Set_2", set())
    assert matched("Set", "the tissue of e9, an evaluation slice: .9 of 99", {"e9"})
    assert not matched("Set", "the tissue of e9, an evaluation slice: .9 of 99", {"e8"})


def test_at_most_five_slices_are_named():
    names = "(t0, t1, t2, t3, t4 and 2 more)"
    assert names in said(quarantined=[barred(name, "the slice is evaluated in Set") for name in CORPUS[:7]])


def test_what_was_compared_by_content_is_what_admission_had_the_counts_of():
    text = said(
        admitted=[row("e1", "Set"), row("t0", "train")],
        quarantined=[
            barred("t1", "gse GSE1, which is of the evaluation set Set"),  # by id, before its counts were there
            barred("t2", "no such file", stage="download", code="download_failed"),
            barred("t3", "400 genes", code="targeted_panel"),
            barred("t4", "a small grid", stage="shards", code="window_too_large"),  # was compared
            barred("t5", "t0 again", code="duplicate"),
        ],
        duplicates=[("t5", "t0", "the same GSM")],
        fingerprints=[printed("e1"), printed("e2"), printed("e3", rare=""), printed("x", dataset="Other")],
    )
    assert "Compared by content: 5 pretraining slices with 2 of this set's 3 sections" in text
    assert "(1 curated in this run, 1 by shipped fingerprints); the other 1 can be recognised by id alone" in text
    assert "Left out as duplicates of other pretraining slices, whatever is evaluated: 1." in text


def test_without_counts_of_the_set_only_ids_were_compared():
    assert "No section of Set could be compared by content" in said(fingerprints=[printed("e1", rare="")])


def test_what_is_kept_although_it_matches_is_named_loudly_and_only_on_its_own_sets_page():
    notes = [("t6", "contamination", "pretrained on although: the slice is evaluated in Set")]
    assert "KEPT ALTHOUGH THEY MATCH Set (allow_contamination): 1 pretraining slice (t6)" in said(notes=notes)
    assert kept_of("Other", pd.DataFrame(notes, columns=NOTES), set()) == []
    assert "KEPT" not in said()


def test_shallow_slices_and_corpora_of_other_encoders_are_what_nobody_compared():
    text = said(
        notes=[("t1", "too_shallow", "x"), ("elsewhere", "too_shallow", "x")], elsewhere=["novae", "stpatch_spot"]
    )
    assert "Too shallow to compare with all others by content: 1 slice (t1)." in text
    assert "on corpora that were not compared: novae, stpatch_spot." in text


def test_training_slices_of_the_same_donor_or_study_are_named_and_unknown_donors_are_not_ruled_out():
    admitted = [
        row("e1", "Set", dataset="study", donor="p1", accession="GSE7 GSM1"),
        row("t0", "train", donor="p1"),
        row("t1", "train", donor="p2", accession="GSE7 GSM2"),
        row("t2", "val", donor="p3", dataset="study"),
        row("t3", "train", donor="p4", accession="GSE70"),
    ]
    text = said(admitted=admitted)
    assert "1 of 4 slices pretrained on share a donor with it (t0)." in text
    assert "2 of 4 slices pretrained on share a study with it (t1, t2)." in text
    assert "ruled out" not in text
    assert "1 of them name no donor" in said(admitted=[*admitted, row("t4", "train")])
    assert "this set names no donor" in said(admitted=[row("e1", "Set"), row("t0", "train", donor="p1")])
