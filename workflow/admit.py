"""Which curated slices go on, and why the others don't.

Everything that must hold for all slices at once is decided here, before any grid is made: organism, targeted panels, the contamination
guard, duplicates, and whether a slice can be cut into windows at all. A slice that fails one test is listed and left out; the run
fails only when more than `max_quarantined` of the slices do. docs/hygiene.md says what is recognised and what isn't.
"""

import json
import logging
import math
from dataclasses import dataclass
from typing import NamedTuple

import anndata as ad
import h5py
import numpy as np
from anndata.io import read_elem

from workflow.catalogue import PRETRAINED, columns, repeated
from workflow.errors import CatalogueError, DamagedFile, SliceError, TooFewGenes, WindowTooLarge
from workflow.fingerprints import recognise
from workflow.keys import Keys
from workflow.layout import most_observed, place
from workflow.reading import reading
from workflow.sketch import Sketch
from workflow.twins import find_twins

FORMAT_VERSION = 1  # of the four tables, and of the curated slices read
QUARANTINE = ("slice", "stage", "code", "file", "found", "expected", "next_step")
DUPLICATES = ("slice", "duplicate_of", "evidence")
NOTES = ("slice", "kind", "detail")
# Left out on purpose: no fault of the slice.
SET_ASIDE = ("other_organism", "multiple_organisms", "targeted_panel", "duplicate", "contamination")

log = logging.getLogger("admit")


@dataclass(frozen=True)
class Curated:
    """What admission needs to know of a curated slice; all else stays on disk, read when it is asked for: a thousand slices must fit.

    Attributes
    ----------
    quarantine
        The row of the quarantine table if curation rejected the slice, else None.
    matrix
        sha256 of the file that held the counts ("" of a rejected slice).
    """

    path: str
    slice: str
    n_spots: int
    n_genes: int
    quarantine: dict | None
    matrix: str

    def outline(self) -> ad.AnnData:
        """The slice without X: obs, obsm and uns."""
        with reading(self.path), h5py.File(self.path) as file:
            return ad.AnnData(**{name: read_elem(file[name]) for name in ("obs", "obsm", "uns")})

    def genes(self) -> set[str]:
        """Gene ids."""
        with reading(self.path), h5py.File(self.path) as file:
            return set(read_elem(file["var"]).index)


def read_curated(path) -> Curated:
    """Read what a curated slice says of itself.

    Raises
    ------
    DamagedFile
        Of another version, or not to be read.
    """
    with reading(path), h5py.File(path) as file:
        facts = read_elem(file["uns"])[Keys.STPATCH]
        n_spots, n_genes = map(int, file["X"].attrs["shape"] if "shape" in file["X"].attrs else file["X"].shape)
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
        n_spots=n_spots,
        n_genes=n_genes,
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
    outline = curated.outline()
    placed = place(outline, layout, pitch_um)
    counted = outline.obs[Keys.TOTAL_COUNTS].to_numpy() > 0
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


class Decision(NamedTuple):
    """Rows of the four tables (docs/format.md)."""

    admitted: list[dict]
    quarantined: list[dict]
    duplicates: list[dict]
    notes: list[dict]


def admit(
    slices: list[Curated],
    roles: list[dict],
    *,
    organism: str,
    allow_contamination: bool,
    sketches: list[Sketch] = (),
    fingerprints: list[Sketch] = (),
    barred: dict[str, str] | None = None,
    min_genes: int = 0,
    **windows,
) -> Decision:
    """Decide on every (slice, split) of the tables; the order of slices and roles doesn't matter.

    Parameters
    ----------
    slices
        Every curated slice, rejected ones included; barred ones may be missing.
    roles
        Rows of the tables, one a (slice, split).
    organism
        The corpus' organism; slices of another are set apart.
    allow_contamination
        Keep pretraining slices that match an evaluated one, with a note.
    sketches
        Of the curated slices, to find the same tissue by.
    fingerprints
        Of evaluation slices that may not be here.
    barred
        Slices that must not be pretrained on, and why (`workflow.guard.barred`).
    min_genes
        A pretraining slice with fewer genes is a targeted panel.
    **windows
        `layout`, `pitch_um`, `window`, `genes`, `min_observed`, for `check_windows` of the pretraining slices.
    """
    by_name = {curated.slice: curated for curated in slices}
    barred = barred or {}
    quarantined: dict[tuple[str, str], dict] = {}
    duplicates, notes = [], []

    def leave_out(role, code, found, expected, next_step):
        row = (role["slice"], "admit", code, role["url"], found, expected, next_step)
        quarantined.setdefault((role["slice"], code), dict(zip(QUARANTINE, row, strict=True)))

    def contaminated(role, how):
        """Leave a pretraining slice out, or note that it stays."""
        if allow_contamination:
            notes.append(
                dict(zip(NOTES, (role["slice"], "contamination", f"pretrained on although: {how}"), strict=True))
            )
            return False
        leave_out(
            role,
            "contamination",
            how,
            "no evaluated tissue among the pretraining slices",
            "none needed: the slice is left out; `allow_contamination: true` keeps it, and the report says so",
        )
        return True

    usable = []
    for role in roles:
        name, pretrained = role["slice"], role["split"] in PRETRAINED
        if pretrained and name in barred and contaminated(role, barred[name]):
            continue
        curated = by_name[name]
        if curated.quarantine is not None:
            quarantined.setdefault((name, curated.quarantine["code"]), curated.quarantine)
            continue
        if role["organism"] != organism:
            remedy = f"set `organism: {role['organism']}` to build that corpus"
            leave_out(role, "other_organism", f"organism {role['organism']}", organism, remedy)
            continue
        if pretrained and (panel := targeted(role, curated, min_genes)):
            leave_out(
                role, "targeted_panel", panel, "the whole transcriptome", "none needed; `min_genes` sets the line"
            )
            continue
        usable.append(role)

    kin, unchecked = find_kin(usable, by_name, sketches, fingerprints)
    candidates = []
    for role in usable:
        pretrained = role["split"] in PRETRAINED
        if pretrained and role["slice"] in kin.evaluated and role["slice"] not in barred:
            if contaminated(role, kin.evaluated[role["slice"]]):
                continue
        try:
            if pretrained:
                check_windows(by_name[role["slice"]], **windows)
            else:
                place(by_name[role["slice"]].outline(), windows["layout"], windows["pitch_um"])
        except SliceError as error:
            quarantined.setdefault((role["slice"], error.code), error.as_row())
            continue
        candidates.append(role)

    twin_of = choose_twins([role for role in candidates if role["split"] in PRETRAINED], by_name, kin)
    for role in candidates:
        if role["split"] in PRETRAINED and role["slice"] in twin_of:
            kept, evidence = twin_of[role["slice"]]
            duplicates.append(dict(zip(DUPLICATES, (role["slice"], kept, evidence), strict=True)))
            leave_out(
                role,
                "duplicate",
                f"{kept} again: {evidence}",
                "each tissue once",
                "none needed; duplicates.tsv lists it",
            )
    candidates = [role for role in candidates if role["split"] not in PRETRAINED or role["slice"] not in twin_of]

    trained = [by_name[role["slice"]] for role in candidates if role["split"] == "train"]
    vocabulary: set[str] = set()
    for curated in trained:
        vocabulary |= curated.genes()
    admitted = []
    for role in candidates:
        curated = by_name[role["slice"]]
        try:
            if role["split"] != "train":
                check_vocabulary(curated, vocabulary, windows["genes"] if role["split"] == "val" else 1)
            admitted.append({**role, "n_spots": curated.n_spots, "n_genes": curated.n_genes})
        except TooFewGenes as error:
            quarantined.setdefault((role["slice"], error.code), error.as_row())
    for name, n in unchecked.items():
        detail = f"too shallow to compare by content with {n} other slices or fingerprints: too few sampled entries on common genes"
        notes.append(dict(zip(NOTES, (name, "too_shallow", detail), strict=True)))
    in_order = [sorted(rows, key=lambda row: list(row.values())) for rows in (duplicates, notes)]
    return Decision(admitted, list(quarantined.values()), *in_order)


def targeted(role: dict, curated: Curated, min_genes: int) -> str:
    """Why a slice is a targeted panel ("" if it isn't): its source says so, or it measured too few genes."""
    if "targeted" in role["technology"].lower():
        return f"technology {role['technology']!r}"
    return f"{curated.n_genes} genes, fewer than min_genes = {min_genes}" if curated.n_genes < min_genes else ""


class Kin(NamedTuple):
    """What is the same tissue by its content.

    Attributes
    ----------
    evaluated
        Pretraining slice -> which evaluated slice it matches, and how.
    twins
        {(slice, slice): evidence} of two pretraining slices, both ways round.
    """

    evaluated: dict[str, str]
    twins: dict[tuple[str, str], str]


def find_kin(roles: list[dict], by_name: dict[str, Curated], sketches, fingerprints) -> tuple[Kin, dict[str, int]]:
    """Slices of one tissue, by counts file and by sketch; and for each slice, how many it could not be compared with."""
    splits: dict[str, set[str]] = {}
    for role in roles:
        splits.setdefault(role["slice"], set()).add(role["split"])
    evaluated = {name: sorted(own - set(PRETRAINED))[0] for name, own in splits.items() if own - set(PRETRAINED)}
    pretrained = {name for name, own in splits.items() if own & set(PRETRAINED)}
    kin = Kin({}, {})

    def note(one, other, evidence):
        for a, b in ((one, other), (other, one)):
            if a in pretrained and b in evaluated:
                kin.evaluated.setdefault(a, f"the tissue of {b}, evaluated in {evaluated[b]}: {evidence}")
            if a in pretrained and b in pretrained:
                kin.twins.setdefault((a, b), evidence)

    by_file: dict[str, list[str]] = {}
    for name in sorted(splits):
        for other in by_file.setdefault(by_name[name].matrix, []):
            note(name, other, "the same counts file by sha256")
        by_file[by_name[name].matrix].append(name)
    sketches = [sketch for sketch in sketches if sketch.slice in splits]
    simulated = {
        role["slice"] for role in roles if role["source"] == "simulated"
    }  # no tissue that anyone could have seen
    matches, unchecked = find_twins(sketches)
    for match in matches:
        note(match.first, match.second, match.evidence)
    here = {sketch.slice for sketch in sketches}
    away = [known for known in fingerprints if known.slice not in here]
    for sketch in sketches:
        if sketch.slice in pretrained - simulated:
            matches, n_unchecked = recognise(sketch, away)
            for match in matches:
                how = f"the tissue of {match.second}, an evaluation slice: {match.evidence}"
                kin.evaluated.setdefault(sketch.slice, how)
            if n_unchecked:
                unchecked[sketch.slice] = unchecked.get(sketch.slice, 0) + n_unchecked
    return kin, dict(sorted(unchecked.items()))


def choose_twins(roles: list[dict], by_name: dict[str, Curated], kin: Kin) -> dict[str, tuple[str, str]]:
    """Of slices that are the same tissue one is kept: slice left out -> (slice kept, evidence).

    The one with more spots is kept, then that with more genes, then a pinned one, then the first by name.
    """

    def rank(role):
        curated = by_name[role["slice"]]
        return -curated.n_spots, -curated.n_genes, not role["sha256"], role["slice"]

    ranked = sorted(roles, key=rank)
    named: dict[str, list[tuple[str, str]]] = {}
    for better, worse, what in repeated(ranked):
        named.setdefault(worse, []).append((better, f"the same {what}"))
    kept, twin_of = [], {}
    for role in ranked:
        name = role["slice"]
        # By id also what is the twin of a twin: an id is the same or it isn't, while containment fades along a chain.
        by_id = ((twin_of[other][0] if other in twin_of else other, what) for other, what in named.get(name, ()))
        by_content = ((other, kin.twins[name, other]) for other in kept if (name, other) in kin.twins)
        twin = next(by_content, None) or next(by_id, None)
        if twin:
            twin_of[name] = twin
        else:
            kept.append(name)
    return twin_of


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
    """Write one of the four tables, version line first; tabs and line ends inside a field become spaces."""
    with open(path, "w", encoding="utf-8") as table:
        table.write(f"# stpatch {kind} {FORMAT_VERSION}\n")
        for fields in [header, *([row[name] for name in header] for row in rows)]:
            table.write("\t".join(" ".join(str(field).split()) for field in fields) + "\n")


if __name__ == "__main__":
    from workflow.fingerprints import read_fingerprints
    from workflow.logs import log_to
    from workflow.sketch import read_sketch

    log_to(snakemake.log[0])
    given, params, output = snakemake.input, dict(snakemake.params.items()), snakemake.output
    most, roles = params.pop("max_quarantined"), params.pop("roles")
    slices = [read_curated(path) for path in given.slices]
    sketches, fingerprints = map(read_sketch, given.sketches), read_fingerprints(given.fingerprints)
    decision = admit(slices, roles, sketches=list(sketches), fingerprints=fingerprints, **params)
    for row in decision.quarantined:
        log.warning("%s left out: [%s] found %s; expected %s", row["slice"], row["code"], row["found"], row["expected"])
    for row in decision.notes:
        log.warning("%s: [%s] %s", row["slice"], row["kind"], row["detail"])
    check_quarantine(len({role["slice"] for role in roles}), decision.quarantined, most)
    write_table(output.admitted, "admitted", [*columns(), "n_spots", "n_genes"], decision.admitted)
    write_table(output.quarantine, "quarantine", QUARANTINE, decision.quarantined)
    write_table(output.duplicates, "duplicates", DUPLICATES, decision.duplicates)
    write_table(output.notes, "notes", NOTES, decision.notes)
