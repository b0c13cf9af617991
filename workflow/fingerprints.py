"""Fingerprints of evaluation slices: the lowest hashes of their sketches, small enough to ship, enough to recognise the tissue.

A fingerprint knows no list of measured genes and no list of spots. It is therefore looked for in a slice: of its entries at genes and
spots that the slice has, how many the slice holds. So the slice may be a part of what the fingerprint was made of, or the reverse.
"""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
from anndata.io import read_elem

from workflow.errors import CatalogueError
from workflow.keys import Keys
from workflow.sketch import ENTRY, Sketch, pair_hash, read_sketch, site_hash
from workflow.twins import DUPLICATE, FEWEST, Match, align, rare_within, sites_within

FORMAT_VERSION = 1
FIRST_LINE = f"# stpatch fingerprints {FORMAT_VERSION}"
COLUMNS = ("slice", "dataset", "kind", "sites_threshold", "sites", "rare_threshold", "rare", "evidence")
KEPT = 256  # entries of each sample


def fingerprint(sketch: Sketch) -> dict[str, str]:
    """The cells `kind`, `sites_threshold`, `sites`, `rare_threshold`, `rare` of a sketch; entries are gene:row:col:count."""
    hashes = {
        "sites": site_hash(*(sketch.sites[field] for field in ("gene", "row", "col", "count"))),
        "rare": pair_hash(sketch.rare["gene"], sketch.rare["count"]),
    }
    cells = {"kind": sketch.kind}
    for sample, keys in hashes.items():
        # All entries up to a hash: several spots share the hash of a rare (gene, count).
        threshold = np.sort(keys)[min(KEPT, len(keys)) - 1] if len(keys) else np.uint64(0)
        entries = getattr(sketch, sample)[keys <= threshold]
        cells[f"{sample}_threshold"] = f"{threshold:016x}"
        cells[sample] = " ".join(":".join(str(int(part)) for part in entry) for entry in entries.tolist())
    return cells


def read_fingerprints(path: str | Path) -> list[Sketch]:
    """Fingerprints of the slices that were seen, as sketches without genes and spots.

    Raises
    ------
    CatalogueError
        A table of another version.
    """
    return [_as_sketch(row) for row in read_table(path) if row["rare"]]


def _as_sketch(row: dict[str, str]) -> Sketch:
    samples = {
        sample: np.array([tuple(map(int, entry.split(":"))) for entry in row[sample].split()], dtype=ENTRY)
        for sample in ("sites", "rare")
    }
    return Sketch(
        slice=row["slice"],
        kind=row["kind"],
        source="array" if row["sites"] else "pixels",
        spots=np.zeros((0, 2), np.int32),
        genes=np.zeros(0, np.uint64),
        sites_threshold=np.uint64(int(row["sites_threshold"], 16)),
        rare_threshold=np.uint64(int(row["rare_threshold"], 16)),
        **samples,
    )


def recognise(sketch: Sketch, fingerprints: list[Sketch]) -> tuple[list[Match], int]:
    """The fingerprints that a slice holds, and the number of those that there was too little to compare with."""
    places = np.sort(_place(*sketch.spots.T))
    _, site_keys = sites_within(sketch, sketch.sites_threshold)
    # Of the rare entries no fingerprint asks for more than these.
    most = max((known.rare_threshold for known in fingerprints), default=np.uint64(0))
    rare, rare_keys = rare_within(sketch, most)
    sketch, site_keys = replace(sketch, rare=rare), np.sort(site_keys)
    matches, n_unchecked = [], 0
    for known in fingerprints:
        match, compared = None, 0
        if sketch.source == known.source == "array":
            entries, keys = sites_within(known, sketch.sites_threshold)
            keys = keys[_among(entries["gene"], sketch.genes) & _among(_place(entries["row"], entries["col"]), places)]
            compared, shared = len(keys), int(_among(keys, site_keys).sum())
            if compared >= FEWEST and shared >= DUPLICATE * compared:
                how = "its fingerprint, same array positions"
                match = Match(sketch.slice, known.slice, shared / compared, compared, how)
        n_rare = min((rare_keys <= known.rare_threshold).sum(), _among(known.rare["gene"], sketch.genes).sum())
        match = match or align(sketch, known)
        matches += [match] if match else []
        n_unchecked += match is None and max(compared, n_rare) < FEWEST
    return matches, n_unchecked


def _place(row: np.ndarray, col: np.ndarray) -> np.ndarray:
    return row.astype(np.int64) << 32 | (col.astype(np.int64) & 0xFFFFFFFF)


def _among(values: np.ndarray, ascending: np.ndarray) -> np.ndarray:
    """Which values are among others, which are sorted: many small questions of one large array."""
    if not len(ascending):
        return np.zeros(len(values), dtype=bool)
    return ascending[np.searchsorted(ascending[:-1], values)] == values


def read_table(path: str | Path) -> list[dict[str, str]]:
    """Rows of the table.

    Raises
    ------
    CatalogueError
        Another version or another header.
    """
    with open(path, newline="", encoding="utf-8") as table:
        version = table.readline().rstrip("\n")
        reader = csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE)
        if version != FIRST_LINE or tuple(reader.fieldnames or ()) != COLUMNS:
            raise CatalogueError(
                f"{path}: found {version!r} and the columns {reader.fieldnames}; expected {FIRST_LINE!r} and {list(COLUMNS)}. "
                "Next step: take the table of this version of stpatch."
            )
        return list(reader)


def update(path: Path, evaluated: list[dict[str, str]], results: Path, remark: str) -> tuple[int, int]:
    """Write the table anew: a row for each evaluated slice, blank where none was ever seen.

    Returns
    -------
    Slices taken from `results`, and slices that have a fingerprint now.
    """
    known = {row["slice"]: row for row in read_table(path)} if path.exists() else {}
    rows, written = [], 0
    for role in sorted(evaluated, key=lambda role: (role["split"], role["slice"])):
        name = role["slice"]
        row = known.get(name) or dict.fromkeys(COLUMNS, "")
        sketch_file = results / f"sketches/{name}.npz"
        sketch = read_sketch(sketch_file) if sketch_file.exists() else None
        if sketch and len(sketch.rare):
            row = {**fingerprint(sketch), "evidence": _evidence(results / f"slices/{name}.h5ad", remark)}
            written += 1
        rows.append({**row, "slice": name, "dataset": role["split"]})
    lines = [FIRST_LINE, "\t".join(COLUMNS), *("\t".join(row[name] for name in COLUMNS) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return written, sum(bool(row["rare"]) for row in rows)


def _evidence(slice_file: Path, remark: str) -> str:
    """What the fingerprint was made of."""
    with h5py.File(slice_file) as file:
        n_spots, n_genes = file["X"].attrs["shape"]
        counts_file = json.loads(read_elem(file["uns"])[Keys.STPATCH]["inputs"])[0]
    made_of = f"{n_spots} spots x {n_genes} genes of {Path(counts_file['path']).name}, sha256 {counts_file['sha256']}"
    return f"{made_of}; {remark}" if remark else made_of
