"""Whether the corpus holds tissue of an evaluated dataset: what was compared with it, what was barred, what nobody could compare.

All of it is read from the tables that admission wrote (docs/format.md); nothing is compared again here.
"""

import re

import pandas as pd

from workflow.catalogue import PRETRAINED, identities
from workflow.findings import counted

BY_CONTENT = "the tissue of "  # how admission's evidence begins where counts told, not ids
NEVER_COMPARED = {"other_organism", "targeted_panel"}  # set apart by admission before any comparison of content
AFTER = ["admit", "grid", "shards"]  # stages that admission's own refusals name; others' came before it
SAME_STUDY = ("gse", "zenodo", "cellxgene_collection")
NAMED = 5  # slices named in a sentence


def matched(dataset: str, evidence: str, known: set[str]) -> bool:
    """Whether admission's evidence against a slice is about this dataset.

    Parameters
    ----------
    known
        Slices of the dataset: evidence by a shipped fingerprint names the slice alone.
    """
    if re.search(rf"(evaluation set|evaluated in) {re.escape(dataset)}(?![\w-])", evidence):
        return True
    found = re.search(rf"{BY_CONTENT}([\w-]+), an evaluation slice", evidence)
    return bool(found) and found[1] in known


def kept_of(dataset: str, notes: pd.DataFrame, known: set[str]) -> list[str]:
    """Slices that are trained on although they match this dataset (`allow_contamination`), by admission's notes."""
    rows = notes[notes["kind"] == "contamination"]
    return sorted({row.slice for row in rows.itertuples() if matched(dataset, row.detail, known)})


def status(
    dataset: str,
    pretrained: list[str],
    rows: list[str],
    admitted: pd.DataFrame,
    quarantine: pd.DataFrame,
    duplicates: pd.DataFrame,
    notes: pd.DataFrame,
    fingerprints: list[dict[str, str]],
    elsewhere: list[str] = (),
) -> list[str]:
    """Sentences on the corpus against one dataset.

    Parameters
    ----------
    pretrained, rows
        Slices that the tables list for pretraining, and for this dataset.
    admitted, quarantine, duplicates, notes
        Admission's tables.
    fingerprints
        Rows of `catalogue/aux/fingerprints.tsv`.
    elsewhere
        Scored encoders that were pretrained outside this run, on a corpus that admission never saw.
    """
    ours = {row["slice"] for row in fingerprints if row["dataset"] == dataset} | set(rows)
    of_corpus = quarantine[quarantine["slice"].isin(set(pretrained))]
    barred = of_corpus[of_corpus["code"] == "contamination"]
    by_content = barred["found"].str.startswith(BY_CONTENT).to_numpy(dtype=bool)
    here = barred["found"].map(lambda evidence: matched(dataset, evidence, ours)).to_numpy(dtype=bool)
    said = []
    parts = []
    for way, chosen in (("by their ids", ~by_content), ("by their counts", by_content)):
        names = sorted(set(barred.loc[chosen & here, "slice"]))
        n_barred = barred.loc[chosen, "slice"].nunique()
        parts.append(f"{n_barred} {way}, of them {len(names)} because of {dataset}{_named(names)}")
    said.append(f"Of {counted(len(set(pretrained)), 'slice')} listed for pretraining were barred: {'; '.join(parts)}.")
    kept = kept_of(dataset, notes, ours)
    if kept:
        said.append(
            f"KEPT ALTHOUGH THEY MATCH {dataset} (allow_contamination): {counted(len(kept), 'pretraining slice')}{_named(kept)}. "
            "Scores of stpatch are not those of unseen tissue."
        )

    # Whoever got as far as having its counts compared: not the barred by id, nor those set apart earlier.
    earlier = ~of_corpus["stage"].isin(AFTER) | of_corpus["code"].isin(NEVER_COMPARED)
    out = set(of_corpus.loc[earlier, "slice"]) | set(barred.loc[~by_content, "slice"])
    n_compared = len(set(pretrained) - out)
    curated = set(admitted.loc[admitted["split"] == dataset, "slice"])
    printed = {row["slice"] for row in fingerprints if row["dataset"] == dataset and row["rare"]} - curated
    n_known = len(ours | curated)
    n_blind = n_known - len(curated | printed)
    if curated | printed:
        end = f"; the other {n_blind} can be recognised by id alone" if n_blind else ""
        said.append(
            f"Compared by content: {counted(n_compared, 'pretraining slice')} with {len(curated | printed)} of this set's {n_known} "
            f"sections ({len(curated)} curated in this run, {len(printed)} by shipped fingerprints){end}."
        )
    else:
        said.append(f"No section of {dataset} could be compared by content: only ids were.")
    shallow = sorted(set(notes.loc[notes["kind"] == "too_shallow", "slice"]) & (set(pretrained) | curated))
    if shallow:
        said.append(
            f"Too shallow to compare with all others by content: {counted(len(shallow), 'slice')}{_named(shallow)}."
        )
    n_twins = duplicates["slice"].nunique()
    if n_twins:
        said.append(f"Left out as duplicates of other pretraining slices, whatever is evaluated: {n_twins}.")
    return said + _kin(dataset, admitted) + _elsewhere(elsewhere)


def _kin(dataset: str, admitted: pd.DataFrame) -> list[str]:
    """Training slices that are other tissue of the same donors or studies: allowed, but to be known."""
    corpus = admitted[admitted["split"].isin(PRETRAINED)]
    tested = admitted[admitted["split"] == dataset]
    donors = set(tested["donor"]) - {""}
    same_donor = sorted(set(corpus.loc[corpus["donor"].isin(donors), "slice"]))
    studies = set(tested["dataset"]).union(*map(_studies, tested.to_dict("records")))
    same_study = sorted(
        row["slice"] for row in corpus.to_dict("records") if ({row["dataset"]} | _studies(row)) & studies
    )
    said = []
    for what, names in (("a donor", same_donor), ("a study", same_study)):
        said.append(
            f"{len(names)} of {corpus['slice'].nunique()} slices pretrained on share {what} with it{_named(names)}."
        )
    blank = corpus.loc[corpus["donor"] == "", "slice"].nunique()
    if blank or not donors:
        whose = "this set names no donor" if not donors else f"{blank} of them name no donor"
        said.append(f"Shared donors can't be ruled out: {whose}.")
    return said


def _studies(row: dict[str, str]) -> set[str]:
    ids = identities(row)
    return {f"{kind} {name}" for kind in SAME_STUDY for name in ids[kind]}


def _elsewhere(models: list[str]) -> list[str]:
    if not models:
        return []
    return [f"Pretrained outside this run, on corpora that were not compared: {', '.join(models)}."]


def _named(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f" ({', '.join(names[:NAMED])}{more})"
