"""Spots, labelled spots and classes of the evaluation sets, against what their sources say they are."""

import csv
from pathlib import Path

from workflow.controls import Section

PUBLISHED = Path(__file__).parent.parent / "catalogue" / "aux" / "published.tsv"
COUNTS = {
    "spots": lambda sections: sum(section.n_spots for section in sections),
    "labelled": lambda sections: sum(label is not None for section in sections for label in section.labels),
    "classes": lambda sections: len({label for section in sections for label in section.labels} - {None}),
}


def check(dataset: str, sections: list[Section], table: str | Path = PUBLISHED) -> list[tuple[str, str]]:
    """Where a dataset differs from the published counts.

    A difference is no error: a source may have been corrected, or a section set apart. It must be seen beside the scores.

    Parameters
    ----------
    dataset
        Name of the evaluation set; one that the table lacks has nothing to differ from.
    sections
        Its admitted sections.
    table
        TSV with the columns set, slice (blank: the whole set), what (a key of `COUNTS`), value, evidence.

    Returns
    -------
    (slice, detail) of each count that differs, in the order of the table; slice is "" for the whole set.
    """
    with open(table, newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE) if row["set"] == dataset]
    by_name = {section.name: section for section in sections}
    expected = {row["slice"] for row in rows} - {""}
    missing = sorted(expected - set(by_name))
    differing = []
    for row in rows:
        if row["slice"] in missing:
            continue
        counted = [by_name[row["slice"]]] if row["slice"] else sections
        found, value = COUNTS[row["what"]](counted), int(row["value"])
        if found != value:
            differing.append((row["slice"], f"{row['what']}: found {found}, published {value} ({row['evidence']})"))
    if missing:
        differing.append(("", f"sections: {', '.join(missing)} of the {len(expected)} published are not there"))
    return differing
