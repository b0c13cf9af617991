"""What every stage that measures starts from: the sections of a dataset, and all methods' features of their spots.

Spots without a label take part in neighbourhoods, components and per-section statistics; only those that have a label
and an embedding by every model are scored.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from workflow.controls import (
    Section,
    centre,
    common_genes,
    control_features,
    load_section,
    neighbour_mean,
    neighbours,
    standardise,
)
from workflow.errors import DamagedFile
from workflow.reading import read_tensors

COLUMNS = ["dataset", "section", "method", "head", "protocol", "split", "metric", "value"]  # of every score table
NOTES = ["kind", "protocol", "split", "section", "method", "head", "detail"]
AVERAGED = "+averaged"
BY_SECTION = {"": lambda x: x, "+centred": centre, "+standardised": standardise}
PLACES = {"coordinates", "coordinates_section"}  # methods that go without suffix
# Methods that average neighbours themselves, and `pca`, whose averages are the neighbour means.
AVERAGING = {"pca", "neighbour_mean_6", "neighbour_mean_18", "neighbour_mean_36", "stofm", "novae", "banksy", "spagcn"}
AVERAGING |= {"spatial_directions_18", "spatial_directions_36"}
N_AVERAGED = 6  # neighbours that `+averaged` takes in


class Notes:
    """What a reader of the scores must know, collected row by row."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, kind: str, **fields) -> None:
        self.rows.append(defaultdict(str, kind=kind, **fields))

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame([[row[name] for name in NOTES] for row in self.rows], columns=NOTES)


class Lazy(Mapping):
    """Values made each time they are asked for: all methods' variants at once would take gigabytes.

    Parameters
    ----------
    names
        The keys, in order.
    make
        Key -> value.
    """

    def __init__(self, names: list[str], make: Callable) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str):
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


@dataclass
class Assembled:
    """The labelled and embedded spots of a dataset, section after section; n of them.

    Attributes
    ----------
    sections
        All sections, in the order of their names.
    x
        Method -> float64 [n, d], made each time it is asked for; empty where no spot has a label.
    y
        int [n], index into `classes`.
    classes
        str, ordered by name.
    of_section
        int [n], index into `sections`.
    spot
        int [n], row in the section's slice.
    array
        int [n, 2], row and column on the capture lattice; None where a section has none.
    """

    sections: list[Section]
    x: Mapping[str, np.ndarray]
    y: np.ndarray
    classes: np.ndarray
    of_section: np.ndarray
    spot: np.ndarray
    array: np.ndarray | None


def load_embedding(path: str | Path, section: Section) -> tuple[np.ndarray, dict[str, str]]:
    """Embeddings in the order of the curated slice, float64 [n_spots, d], NaN where a spot has none; the metadata.

    Raises
    ------
    DamagedFile
        If the file belongs to another slice, has another version, names a spot twice or out of range, or is not finite.
    """
    x, spot, about = read_tensors(path)
    wrong = ""
    if about.get("format_version") != "1":
        wrong = f"format_version {about.get('format_version')}"
    elif about.get("slice") != section.name:
        wrong = f"embeddings of slice {about.get('slice')}"
    elif len(x) != len(spot) or len(np.unique(spot)) != len(spot):
        wrong = f"{len(x)} embeddings for {len(np.unique(spot))} distinct spots"
    elif len(spot) and (spot.min() < 0 or spot.max() >= section.n_spots):
        wrong = f"spots {spot.min()} to {spot.max()} of {section.n_spots}"
    elif not np.isfinite(x).all():
        wrong = f"{int((~np.isfinite(x).all(axis=1)).sum())} spots with values that are not finite"
    if wrong:
        raise DamagedFile(
            slice=section.name,
            file=str(path),
            found=wrong,
            expected="version 1, one finite embedding a spot of this slice",
            next_step="delete the file and run again, so that its rule writes it anew",
        )
    full = np.full((section.n_spots, x.shape[1]), np.nan)
    full[spot] = x
    return full, about


def by_model(models: list[str], paths: list[str]) -> dict[str, list[str]]:
    """The files of each model, from the list that a rule has of them: the first model's of all slices, then the next's."""
    each = len(paths) // max(len(models), 1)
    return {model: list(paths[index * each : (index + 1) * each]) for index, model in enumerate(models)}


def load(
    slices: list[str | Path], embeddings: dict[str, list[str | Path]]
) -> tuple[list[Section], dict[str, list[np.ndarray]], Notes]:
    """Sections, embeddings (model -> one float64 [n_spots, d] a section) and first notes, from a dataset's files.

    A model that skipped a slice (metadata `skipped`, the reason) is left out, and the notes say so.
    """
    sections, notes, found = [load_section(path) for path in slices], Notes(), {}
    for model, paths in embeddings.items():
        loaded = [load_embedding(path, section) for path, section in zip(paths, sections, strict=True)]
        reasons = dict.fromkeys(about["skipped"] for _, about in loaded if "skipped" in about)
        if reasons:
            notes.add("method_skipped", method=model, detail="; ".join(reasons))
            continue
        found[model] = [x for x, _ in loaded]
        if model.startswith("stpatch") and any(about.get("simulated", "").lower() == "true" for _, about in loaded):
            notes.add("simulated", method=model, detail="pretrained on simulated slices")
    return sections, found, notes


def features(
    sections: list[Section], embeddings: dict[str, list[np.ndarray]], target_sum: float
) -> Mapping[str, list[np.ndarray]]:
    """Method -> one float64 [n_spots, d] a section, for controls, embeddings and their variants.

    Controls get whatever post-processing a model gets. `+averaged`: mean over the spot and its 6 neighbours that have
    features; not of methods that average by themselves. `+centred`, `+standardised`: by section; not with
    one section alone, whose splits lie within it. Positions have no variants.
    """
    plain = {**control_features(sections, target_sum), **embeddings}
    near = [neighbours(section, N_AVERAGED) for section in sections]
    names = []
    for method in plain:
        for averaged in ("",) if method in PLACES | AVERAGING else ("", AVERAGED):
            treatments = list(BY_SECTION) if len(sections) > 1 and method not in PLACES else [""]
            names += [method + averaged + treatment for treatment in treatments]

    def make(name: str) -> list[np.ndarray]:
        method, *suffixes = name.split("+")
        by_section = plain[method]
        for suffix in suffixes:
            if "+" + suffix == AVERAGED:
                by_section = [_averaged(x, of_whom) for x, of_whom in zip(by_section, near, strict=True)]
            else:
                by_section = [BY_SECTION["+" + suffix](x) for x in by_section]
        return by_section

    return Lazy(names, make)


def _averaged(x: np.ndarray, near) -> np.ndarray:
    known = np.isfinite(x).all(axis=1)
    mean = np.full(x.shape, np.nan)
    mean[known] = neighbour_mean(x[known], near[known][:, known])
    return mean


def assemble(
    sections: list[Section], embeddings: dict[str, list[np.ndarray]], target_sum: float, notes: Notes
) -> Assembled:
    """All methods' features of the spots that have a label and an embedding by every model.

    Parameters
    ----------
    sections
        All admitted sections, in the order of their names.
    embeddings
        Model -> one float [n_spots, d] a section, rows of NaN for spots without embedding.
    notes
        Are added to: what is left out, and facts of the data.
    """
    for section in sections:
        if section.simulated:
            notes.add("simulated", section=section.name, detail="simulated slice")
    labels = np.concatenate([section.labels for section in sections]) if sections else np.empty(0, dtype=object)
    labelled = np.array([label is not None for label in labels], dtype=bool)
    if not labelled.any():
        notes.add("no_labels", detail=f"{len(sections)} sections, none with labels: nothing to score")
        none = np.empty(0, dtype=np.int64)
        return Assembled(sections, {}, none, np.empty(0, dtype=str), none, none, None)

    by_section = features(sections, embeddings, target_sum)
    notes.add("genes", detail=f"{len(common_genes(sections))} genes measured by all {len(sections)} sections")
    for unit in sorted({section.position_unit for section in sections} - {"micrometres"}):
        notes.add("position", detail=f"positions in {unit}: the source gives no scale")

    of_section = np.repeat(np.arange(len(sections)), [section.n_spots for section in sections])
    embedded = np.ones(len(labels), dtype=bool)
    for model in embeddings:
        embedded &= np.isfinite(np.concatenate(embeddings[model])).all(axis=1)
    for kind, absent in (("unlabelled", ~labelled), ("without_embedding", labelled & ~embedded)):
        for section, n in zip(sections, np.bincount(of_section[absent], minlength=len(sections)), strict=True):
            if n:
                notes.add(kind, section=section.name, detail=f"{n} of {section.n_spots} spots left out")
    chosen = np.flatnonzero(labelled & embedded)

    classes, y = np.unique(labels[chosen].astype(str), return_inverse=True)
    array = None
    if all(section.array is not None for section in sections):
        array = np.concatenate([section.array for section in sections])[chosen]
    return Assembled(
        sections=sections,
        x=Lazy(list(by_section), lambda name: np.concatenate(by_section[name])[chosen]),
        y=y,
        classes=classes,
        of_section=of_section[chosen],
        spot=np.concatenate([np.arange(section.n_spots) for section in sections])[chosen],
        array=array,
    )


def tested(sections: list[Section], of_section: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Whose scores a split gives: `pooled` and each section, with the places of its spots among those tested."""
    yield "pooled", np.arange(len(of_section))
    for index in np.unique(of_section):
        yield sections[index].name, np.flatnonzero(of_section == index)
