"""Where a slice's files lie: light enough for rule files to import.

A place is a file, a folder (everything below it) or the common prefix of flat files, as GEO has them.
"""

from __future__ import annotations

import glob
import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

from workflow.locators import parse

REMOTE_SOURCES = ("cellxgene", "geo", "10x", "zenodo", "url")
AT_ONCE = 4  # downloads from one host at a time, unless the profile or --resources says otherwise
AT_ONCE_NCBI = 3

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

    Images, hidden files (``._`` of macOS among them) and what lies in hidden folders are left out, except where ``place``
    names one of them itself.
    """
    place = Path(place)
    if place.is_file():
        return [place]
    if place.is_dir():
        folder, found = place, place.rglob("*")
    else:
        folder, found = place.parent, place.parent.glob(glob.escape(place.name) + "*")
    return sorted(
        p
        for p in found
        if p.is_file()
        and not any(part.startswith(".") for part in p.relative_to(folder).parts)
        and not p.name.lower().endswith(SKIPPED)
    )


def sha256_of(path: Path) -> str:
    """sha256 of a file, as hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def curate_inputs(row: dict[str, str]) -> dict[str, str | list[Path]]:
    """What a slice's `curate` job waits for, by input name.

    ``listing``: the listing of a slice that is simulated or fetched. ``files``: files of its own that are local (of a slice
    that is fetched, the labels if they are), those that exist; curate says which are missing, so that one slice doesn't stop
    the others.
    """
    if row["source"] == "simulated":
        return {"listing": f"resources/simulated/{row['slice']}/deposit.json"}
    labels = files_at(row["labels"]) if row["labels"] and "://" not in row["labels"] else []
    if row["source"] == "file":
        return {"files": [file for place in row["url"].split() for file in files_at(place)] + labels}
    listing = {"listing": f"resources/download/{row['slice']}/files.json"}
    return listing | {"files": labels} if labels else listing


def hosts_of(row: dict[str, str]) -> list[str]:
    """Hosts that a row's urls and labels lie on, sorted; checks every address.

    Raises
    ------
    CatalogueError
        A fragment that `workflow.locators` doesn't know.
    """
    addresses = row["url"].split() + ([row["labels"]] if "://" in row["labels"] else [])
    return sorted({host for host in (parse(address).host for address in addresses) if host})


def host_resource(host: str) -> str:
    """Name of the Snakemake resource that bounds the downloads from a host: all of NCBI counts as one."""
    return "from_" + ("ncbi" if host.endswith("ncbi.nlm.nih.gov") else re.sub(r"[^a-z0-9]", "_", host.lower()))


def concerning(row: dict[str, str], by_host: dict) -> dict:
    """The entries of a mapping from hosts or ``https://host`` that concern a row: others must not rerun its download."""
    hosts = hosts_of(row) if by_host else []
    return {at: value for at, value in by_host.items() if (urlsplit(at).hostname or at) in hosts}


def taken_from(resource: str, remote: dict[str, set[str]]) -> Callable[..., int]:
    """How much of a host's resource the download of a slice takes: a function of the wildcards, for the rule."""
    return lambda wildcards: int(resource in remote[wildcards.slice])
