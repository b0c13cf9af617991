"""Which curated slices go on, and why the others don't.

Everything that must hold for all slices at once is decided here, before any grid is made: organism, duplicates, the
contamination guard, and whether a slice can be cut into windows at all. A slice that fails one test is listed and left
out; the run fails only when more than `max_quarantined` of the slices do.
"""

import json
import logging
import math
from dataclasses import dataclass

import anndata as ad
import h5py
import numpy as np
from anndata.io import read_elem

from workflow.catalogue import columns
from workflow.errors import CatalogueError, DamagedFile, SliceError, TooFewGenes, WindowTooLarge
from workflow.keys import Keys
from workflow.layout import most_observed, place

FORMAT_VERSION = 1  # of the three tables, and of the curated slices read
QUARANTINE = ("slice", "stage", "code", "file", "found", "expected", "next_step")
DUPLICATES = ("slice", "duplicate_of", "evidence")
PRETRAINING = ("train", "val")
SET_ASIDE = ("other_organism", "duplicate", "contamination")  # left out on purpose: no fault of the slice

log = logging.getLogger("admit")


@dataclass(frozen=True)
class Curated:
    """What admission needs to know of a curated slice; the matrix stays on disk.

    Attributes
    ----------
    outline
        AnnData without X: obs, obsm and uns.
    quarantine
        The row of the quarantine table if curation rejected the slice, else None.
    matrix
        sha256 of the file that held the counts ("" of a rejected slice).
    """

    path: str
    slice: str
    n_spots: int
    n_genes: int
    outline: ad.AnnData
    quarantine: dict | None
    matrix: str

    def genes(self) -> set[str]:
        """Gene ids, read from the file each time: those of a thousand slices would not fit."""
        with h5py.File(self.path) as file:
            return set(read_elem(file["var"]).index)


def read_outline(path) -> Curated:
    """Read a curated slice without its matrix.

    Raises
    ------
    DamagedFile
        Of another version.
    """
    with h5py.File(path) as file:
        obs, obsm, uns = (read_elem(file[name]) for name in ("obs", "obsm", "uns"))
        n_genes = file["var"][file["var"].attrs["_index"]].shape[0]
    facts = uns[Keys.STPATCH]
    if facts["format_version"] != FORMAT_VERSION:
        raise DamagedFile(
            slice=str(facts["slice"]),
            file=str(path),
            found=f"format_version {facts['format_version']}",
            expected=str(FORMAT_VERSION),
            next_step="delete the file and run again",
        )
    rejected = facts.get(Keys.QUARANTINE)
    return Curated(
        path=str(path),
        slice=str(facts["slice"]),
        n_spots=len(obs),
        n_genes=n_genes,
        outline=ad.AnnData(obs=obs, obsm=obsm, uns=uns),
        quarantine=None if rejected is None else {name: str(rejected[name]) for name in QUARANTINE},
        matrix=json.loads(facts["inputs"])[0]["sha256"] if rejected is None else "",  # readers list it first
    )


def check_windows(curated: Curated, layout, pitch_um, window, genes, min_observed) -> None:
    """Raise if no window of the config can be cut from the slice.

    Raises
    ------
    WindowTooLarge
        Even the best window has less than `min_observed` of its cells observed.
    TooFewGenes
        Fewer genes than a window draws.
    """
    placed = place(curated.outline, layout, pitch_um)
    counted = curated.outline.obs[Keys.TOTAL_COUNTS].to_numpy() > 0
    mask = np.zeros(placed.shape, dtype=bool)
    mask[placed.y[counted], placed.x[counted]] = True
    best = most_observed(mask, tuple(window))
    if best < min_observed:
        raise WindowTooLarge(
            slice=curated.slice,
            found=f"a grid of {placed.shape[0]} x {placed.shape[1]} cells whose best {window[0]} x {window[1]} window "
            f"is {best:.0%} observed",
            expected=f"at least {min_observed:.0%} (min_observed)",
            next_step="use a smaller window or min_observed, or leave the slice out",
        )
    if curated.n_genes < genes:
        raise TooFewGenes(
            slice=curated.slice,
            found=f"{curated.n_genes} genes",
            expected=f"at least the {genes} that a window draws",
            next_step="lower `genes`, or leave the slice out (a targeted panel?)",
        )


def admit(slices: list[Curated], roles: list[dict], organism: str, allow_contamination: bool, **windows):
    """Decide on every (slice, split) of the tables.

    Parameters
    ----------
    slices
        Every curated slice, rejected ones included.
    roles
        Rows of the tables, one a (slice, split).
    organism
        The corpus' organism; slices of another are set apart.
    allow_contamination
        Keep pretraining slices that are also evaluated.
    **windows
        `layout`, `pitch_um`, `window`, `genes`, `min_observed`, for `check_windows` of the pretraining slices.

    Returns
    -------
    admitted, quarantined, duplicates
        Rows of the three tables (docs/format.md).
    """
    by_name = {curated.slice: curated for curated in slices}
    evaluated = {role["slice"]: role for role in roles if role["split"] not in PRETRAINING}
    admitted, quarantined, duplicates = [], {}, []

    def leave_out(role, code, found, expected, next_step):
        row = (role["slice"], "admit", code, role["url"], found, expected, next_step)
        quarantined.setdefault((role["slice"], code), dict(zip(QUARANTINE, row, strict=True)))

    kept_matrices = {}
    for role in roles:
        name, curated = role["slice"], by_name[role["slice"]]
        if curated.quarantine is not None:
            quarantined.setdefault((name, curated.quarantine["code"]), curated.quarantine)
            continue
        if role["organism"] != organism:
            found = f"organism {role['organism']}"
            leave_out(
                role, "other_organism", found, organism, f"set `organism: {role['organism']}` to build that corpus"
            )
            continue
        if role["split"] in PRETRAINING:
            twin = kept_matrices.setdefault(curated.matrix, name)
            if twin != name:
                duplicates.append(dict(zip(DUPLICATES, (name, twin, "the same counts file by sha256"), strict=True)))
                leave_out(role, "duplicate", f"the counts file of {twin}", "a file of its own", "remove the row")
                continue
            match = contaminates(role, curated, evaluated, by_name)
            if match and not allow_contamination:
                leave_out(
                    role,
                    "contamination",
                    match,
                    "no evaluated slice among the pretraining slices",
                    "none needed: the slice is left out; `allow_contamination: true` keeps it, and the report says so",
                )
                continue
        try:
            place(curated.outline, windows["layout"], windows["pitch_um"])
            if role["split"] in PRETRAINING:
                check_windows(curated, **windows)
        except SliceError as error:
            quarantined.setdefault((name, error.code), error.as_row())
            continue
        admitted.append({**role, "n_spots": curated.n_spots, "n_genes": curated.n_genes})

    vocabulary = set().union(*(by_name[row["slice"]].genes() for row in admitted if row["split"] == "train"))
    kept = []
    for row in admitted:
        try:
            if row["split"] != "train":
                check_vocabulary(by_name[row["slice"]], vocabulary, windows["genes"] if row["split"] == "val" else 1)
            kept.append(row)
        except TooFewGenes as error:
            quarantined.setdefault((row["slice"], error.code), error.as_row())
    return kept, list(quarantined.values()), duplicates


def check_vocabulary(curated: Curated, vocabulary: set[str], least: int) -> None:
    """Raise TooFewGenes if a slice that isn't trained on measured too few of the training slices' genes."""
    shared = len(curated.genes() & vocabulary)
    if shared < least:
        raise TooFewGenes(
            slice=curated.slice,
            found=f"{shared} of its {curated.n_genes} genes among the {len(vocabulary)} of the training slices",
            expected=f"at least {least}",
            next_step="check organism and gene ids, or lower `genes`"
            if vocabulary
            else "admit a training slice: validation and evaluation need a vocabulary",
        )


def contaminates(role: dict, curated: Curated, evaluated: dict, by_name: dict) -> str:
    """How a pretraining slice matches an evaluated one ("" if it doesn't): by name, url or counts file."""
    url, pin = role["url"].split()[0], role["sha256"].split()[:1]
    if role["slice"] in evaluated:
        return f"the slice is evaluated in {evaluated[role['slice']]['split']}"
    for name, other in evaluated.items():
        same_source = url == other["url"].split()[0] or (pin and pin == other["sha256"].split()[:1])
        if same_source or (curated.matrix and curated.matrix == by_name[name].matrix):
            return f"the counts file of {name}, evaluated in {other['split']}"
    return ""


def check_quarantine(n_slices: int, quarantined: list[dict], max_quarantined: float) -> None:
    """Fail when too many slices were rejected; slices set aside on purpose don't count.

    Raises
    ------
    CatalogueError
        Lists every rejected slice with its reason.
    """
    rejected = {row["slice"]: row for row in quarantined if row["code"] not in SET_ASIDE}
    allowed = math.floor(max_quarantined * n_slices + 1e-9)
    if len(rejected) > allowed:
        lines = [f"  {r['slice']}: [{r['code']}] found {r['found']}; {r['next_step']}" for r in rejected.values()]
        raise CatalogueError(
            f"{len(rejected)} of {n_slices} slices were rejected, more than max_quarantined = {max_quarantined} allows "
            f"({allowed}). Next step: mend or remove them, or raise max_quarantined.\n" + "\n".join(lines)
        )


def write_table(path, kind: str, header, rows: list[dict]) -> None:
    """Write one of the three tables, version line first; tabs and line ends inside a field become spaces."""
    with open(path, "w", encoding="utf-8") as table:
        table.write(f"# stpatch {kind} {FORMAT_VERSION}\n")
        for fields in [header, *([row[name] for name in header] for row in rows)]:
            table.write("\t".join(" ".join(str(field).split()) for field in fields) + "\n")


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    params = dict(snakemake.params.items())
    most, roles = params.pop("max_quarantined"), params.pop("roles")
    slices = [read_outline(path) for path in snakemake.input]
    admitted, quarantined, duplicates = admit(slices, roles, **params)
    for row in quarantined:
        log.warning("%s left out: [%s] found %s; expected %s", row["slice"], row["code"], row["found"], row["expected"])
    check_quarantine(len(slices), quarantined, most)
    output = snakemake.output
    write_table(output.admitted, "admitted", [*columns(), "n_spots", "n_genes"], admitted)
    write_table(output.quarantine, "quarantine", QUARANTINE, quarantined)
    write_table(output.duplicates, "duplicates", DUPLICATES, duplicates)
