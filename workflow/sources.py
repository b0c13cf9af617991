"""Where a slice's files lie: light enough for rule files to import.

A place is a file, a folder (everything below it) or the common prefix of flat files, as GEO has them.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SKIPPED = (
    ".tif",
    ".tiff",
    ".png",
    ".jpg",
    ".jpeg",
    ".svg",
    ".html",
    ".cloupe",
    ".bam",
    ".bai",
)  # never read: no counts, no positions


def files_at(place: str | Path) -> list[Path]:
    """Files that a place stands for, sorted; none if there is nothing there.

    Images and hidden files (``._`` of macOS among them) are left out, except where ``place`` names one of them itself.
    """
    place = Path(place)
    if place.is_file():
        return [place]
    if place.is_dir():
        found = place.rglob("*")
    else:
        found = place.parent.glob(place.name.replace("[", "[[]") + "*") if place.parent.is_dir() else []
    return sorted(
        p for p in found if p.is_file() and not p.name.startswith(".") and not p.name.lower().endswith(SKIPPED)
    )


def sha256_of(path: Path) -> str:
    """sha256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def curate_inputs(row: dict[str, str]) -> dict[str, str | list[Path]]:
    """What a slice's `curate` job waits for, by input name.

    ``listing``: the listing of a slice that is simulated or fetched. Else ``files``: its own files, those that exist;
    curate says which are missing, so that one slice doesn't stop the others.
    """
    if row["source"] == "simulated":
        return {"listing": f"resources/simulated/{row['slice']}/deposit.json"}
    if row["source"] != "file":
        return {"listing": f"resources/download/{row['slice']}/files.json"}
    places = [*row["url"].split(), *filter(None, [row["labels"]])]
    return {"files": [file for place in places for file in files_at(place)]}
