"""Keeps evaluation slices out of pretraining, by what is known before anything is fetched: nothing is downloaded to find out.

A slice to pretrain on is barred if it is evaluated in this run (its name, address, checksum or accession), or if it carries an id of
`catalogue/aux/evaluation_ids.tsv`: those of the evaluation sets, of sibling sections of their blocks, and of what is suspected to be either.
What only the counts tell (`catalogue/aux/fingerprints.tsv`, evaluation slices curated in this run) is asked at admission.

    python -m workflow.guard --write-fingerprints results

adds the fingerprints of the evaluation slices that were curated and sketched below `results`.
Imports stay light: every dry run loads this module.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from workflow.catalogue import PRETRAINED, contaminated, load_catalogue, repeated

ROOT = Path(__file__).parent.parent
FINGERPRINTS = ROOT / "catalogue/aux/fingerprints.tsv"
DOWNSTREAM = ROOT / "catalogue/downstream.tsv"


def barred(roles: list[dict[str, str]], ids: list[dict[str, str]]) -> dict[str, str]:
    """Slices to pretrain on that are, as their rows say, evaluated or kin to what is evaluated: name -> how it is known.

    Parameters
    ----------
    roles
        Rows of the tables of slices, one a (slice, split).
    ids
        Rows of the table of known ids (`workflow.catalogue.load_ids`).
    """
    pretrained = [role for role in roles if role["split"] in PRETRAINED]
    evaluated = {role["slice"]: role["split"] for role in roles if role["split"] not in PRETRAINED}
    found = {}
    for role in pretrained:
        if role["slice"] in evaluated:
            found[role["slice"]] = f"the slice is evaluated in {evaluated[role['slice']]}"
    # Evaluated rows come first: whatever they share with another is theirs.
    for other, name, what in repeated([*(r for r in roles if r["split"] not in PRETRAINED), *pretrained]):
        if other in evaluated and name not in evaluated:
            found.setdefault(name, f"{what}, as {other} has, which is evaluated in {evaluated[other]}")
    for name, entry in contaminated(pretrained, ids):
        kinship = {"same": "is of", "sibling": "is kin to", "suspected": "may be of"}[entry["relation"]]
        found.setdefault(name, f"{entry['kind']} {entry['id']}, which {kinship} the evaluation set {entry['set']}")
    return found


def kept_although(notes: Path) -> list[str]:
    """Pretraining slices that admission kept although they match an evaluation slice; none before it has run."""
    lines = notes.read_text().splitlines()[2:] if notes.exists() else []
    return sorted({name for name, kind, _ in (line.split("\t") for line in lines) if kind == "contamination"})


def main(arguments: list[str] | None = None) -> None:
    """Add the fingerprints of curated evaluation slices to the shipped table."""
    parser = argparse.ArgumentParser(prog="python -m workflow.guard", description=main.__doc__)
    parser.add_argument("--write-fingerprints", required=True, type=Path, metavar="RESULTS", help="a run's results")
    parser.add_argument("--table", type=Path, default=FINGERPRINTS, help="where fingerprints are kept")
    parser.add_argument("--downstream", type=Path, default=DOWNSTREAM, help="the table of evaluation slices")
    parser.add_argument("--remark", default="", help="added to the evidence of what is new")
    given = parser.parse_args(arguments)

    from workflow.fingerprints import update  # numpy and h5py, which a dry run must not need

    rows = load_catalogue(given.downstream)
    written, seen = update(given.table, rows, given.write_fingerprints, given.remark)
    print(f"{given.table}: {written} slices from {given.write_fingerprints}, {seen} of {len(rows)} were ever seen")


if __name__ == "__main__":
    main()
