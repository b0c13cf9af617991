"""Score one dataset: frozen embeddings and controls through the same probes on the same splits.

Spots without a label stay out of the probes but in neighbourhoods, components and per-section statistics.
"""

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from workflow import probes, protocols
from workflow.controls import Section, centre, common_genes, control_features, load_section, standardise
from workflow.errors import DamagedFile
from workflow.reading import read_tensors

COLUMNS = ["dataset", "section", "method", "head", "protocol", "split", "metric", "value"]
NOTES = ["kind", "protocol", "split", "section", "method", "head", "detail"]
SUFFIXES = {"+centred": centre, "+standardised": standardise}
PLAIN = {"coordinates", "coordinates_section"}  # methods that go without suffix


class Scored(NamedTuple):
    scores: pd.DataFrame  # COLUMNS
    predictions: pd.DataFrame  # section, spot, label, then a column `protocol:method:head` each
    notes: pd.DataFrame  # NOTES


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
            next_step="delete the file and run again, so that rule embed writes it anew",
        )
    full = np.full((section.n_spots, x.shape[1]), np.nan)
    full[spot] = x
    return full, about


def with_suffixes(features: dict[str, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """Every method but positions alone also centred and standardised by section, so that controls get what a model gets.

    With one section alone nothing is added: the splits then lie within it.
    """
    extended = dict(features)
    for method, by_section in features.items():
        if method not in PLAIN and len(by_section) > 1:
            for suffix, treat in SUFFIXES.items():
                extended[method + suffix] = [treat(x) for x in by_section]
    return extended


def score(
    dataset: str,
    sections: list[Section],
    embeddings: dict[str, list[np.ndarray]],
    *,
    heads: list[str],
    protocol_names: list[str],
    n_splits: int,
    seed: int,
    target_sum: float,
    pretrained_on_simulated: bool = False,
) -> Scored:
    """Scores of all methods on a dataset.

    Parameters
    ----------
    sections
        All admitted sections, in the order of their names.
    embeddings
        Method name -> one float [n_spots, d] a section, rows of NaN for spots without embedding.
    heads, protocol_names
        Keys of `probes.HEADS`; names of functions in `protocols`.

    Returns
    -------
    Scored
        The score table, for each split by section and pooled over all tested spots of the split; predictions of the
        protocol that maps are drawn of: `leave_section`, else the first one (its split 0); and notes on what the
        scores leave out. Empty, but for notes, where no spot has a label.
    """
    notes = Notes()
    for section in sections:
        if section.simulated:
            notes.add("simulated", section=section.name, detail="simulated slice")
    if pretrained_on_simulated:
        notes.add("simulated", method="stpatch", detail="pretrained on simulated slices")
    if not any(label is not None for section in sections for label in section.labels):
        notes.add("no_labels", detail=f"{len(sections)} sections, none with labels: nothing to score")
        return Scored(pd.DataFrame(columns=COLUMNS), pd.DataFrame(columns=["section", "spot", "label"]), notes.frame())

    features = with_suffixes({**control_features(sections, target_sum), **embeddings})
    notes.add("genes", detail=f"{len(common_genes(sections))} genes measured by all {len(sections)} sections")
    for unit in sorted({section.position_unit for section in sections} - {"micrometres"}):
        notes.add("position", detail=f"positions in {unit}: the source gives no scale")

    everything = {method: np.concatenate(by_section) for method, by_section in features.items()}
    labels = np.concatenate([section.labels for section in sections])
    of_section = np.repeat(np.arange(len(sections)), [section.n_spots for section in sections])
    labelled = np.array([label is not None for label in labels])
    embedded = np.all([np.isfinite(everything[method]).all(axis=1) for method in embeddings], axis=0)
    for kind, absent in (("unlabelled", ~labelled), ("without_embedding", labelled & ~embedded)):
        for section, n in zip(sections, np.bincount(of_section[absent], minlength=len(sections)), strict=True):
            if n:
                notes.add(kind, section=section.name, detail=f"{n} of {section.n_spots} spots left out")
    chosen = np.flatnonzero(labelled & embedded)

    classes, y = np.unique(labels[chosen].astype(str), return_inverse=True)
    of_section = of_section[chosen]
    x = {method: values[chosen] for method, values in everything.items()}
    rows, predicted = [], {}
    mapped = "leave_section" if "leave_section" in protocol_names and len(np.unique(of_section)) > 1 else None
    for protocol in protocol_names:
        splits = list(_splits(protocol, dataset, sections, of_section, chosen, n_splits, seed, notes))
        mapped = mapped or (protocol if splits else None)
        for split, train, test in splits:
            if not len(train) or not len(test):
                found = f"{len(train)} training and {len(test)} tested spots"
                notes.add("split_skipped", protocol=protocol, split=split, detail=found)
                continue
            for name in classes[~np.isin(np.arange(len(classes)), y[train])]:
                notes.add("class_absent_from_training", protocol=protocol, split=split, detail=name)
            for method, head, prediction in _predict(x, y, train, test, heads):
                if not prediction.converged:
                    where = {"protocol": protocol, "split": split, "method": method, "head": head}
                    notes.add("not_converged", detail=f"stopped after {probes.MAX_ITER} iterations", **where)
                for section, of in _tested(sections, of_section[test]):
                    for metric, value in probes.metrics(y[test][of], prediction.classes[of]).items():
                        rows.append((dataset, section, method, head, protocol, split, metric, value))
                if protocol == mapped and (split == 0 or protocol == "leave_section"):
                    column = predicted.setdefault(f"{protocol}:{method}:{head}", np.full(len(y), "", dtype=object))
                    column[test] = classes[prediction.classes]

    first = np.cumsum([0] + [section.n_spots for section in sections])[:-1]
    place = {
        "section": np.array([section.name for section in sections], dtype=object)[of_section],
        "spot": chosen - first[of_section],
        "label": classes[y],
    }
    return Scored(pd.DataFrame(rows, columns=COLUMNS), pd.DataFrame({**place, **predicted}), notes.frame())


class Notes:
    """What a reader of the scores must know, collected row by row."""

    def __init__(self) -> None:
        self.rows: list[dict] = []

    def add(self, kind: str, **fields) -> None:
        self.rows.append(defaultdict(str, kind=kind, **fields))

    def frame(self) -> pd.DataFrame:
        return pd.DataFrame([[row[name] for name in NOTES] for row in self.rows], columns=NOTES)


def _splits(protocol, dataset, sections, of_section, chosen, n_splits, seed, notes) -> Iterator[protocols.Split]:
    if protocol == "random20":
        yield from protocols.random20(len(of_section), n_splits, seed, dataset)
    elif protocol == "blocks":
        if any(section.array is None for section in sections):
            notes.add("protocol_skipped", protocol=protocol, detail="a section has no capture lattice to lay blocks on")
            return
        array = np.concatenate([section.array for section in sections])[chosen]
        yield from protocols.blocks(of_section, array, n_splits, seed, dataset)
    elif protocol == "leave_section":
        if len(np.unique(of_section)) < 2:
            notes.add("protocol_skipped", protocol=protocol, detail="fewer than two labelled sections")
            return
        _note_shared_donors([sections[index] for index in np.unique(of_section)], notes)
        yield from protocols.leave_section(of_section)
    elif protocol == "leave_donor":
        labelled = [sections[index] for index in np.unique(of_section)]
        donors = sorted({section.donor for section in labelled} - {""})
        if len(donors) < 2:
            notes.add("protocol_skipped", protocol=protocol, detail="fewer than two known donors of labelled sections")
            return
        for section in labelled:
            if not section.donor:
                notes.add("unknown_donor", protocol=protocol, section=section.name, detail="neither trains nor tested")
        rank = {donor: index for index, donor in enumerate(donors)}
        yield from protocols.leave_donor(np.array([rank.get(section.donor, -1) for section in sections])[of_section])
    else:
        known = "random20, blocks, leave_section, leave_donor"
        raise ValueError(f"unknown protocol {protocol!r}; known: {known}")


def _note_shared_donors(labelled: list[Section], notes: Notes) -> None:
    """A left-out section is familiar where other sections of its donor train; a blank donor is unknown, not shared."""
    for split, section in enumerate(labelled):
        others = [other.name for other in labelled if other.donor == section.donor and other.name != section.name]
        if section.donor and others:
            where = {"protocol": "leave_section", "split": split, "section": section.name}
            verb = "trains" if len(others) == 1 else "train"
            notes.add("shared_donor", detail=f"{', '.join(others)} of donor {section.donor} {verb}", **where)


def _predict(x, y, train, test, heads) -> Iterator[tuple[str, str, probes.Prediction]]:
    yield "majority", "none", probes.majority(y[train], len(test))
    for method, values in x.items():
        for head in heads:
            yield method, head, probes.HEADS[head](values[train], y[train], values[test])


def _tested(sections, of_section) -> Iterator[tuple[str, np.ndarray]]:
    yield "pooled", np.arange(len(of_section))
    for index in np.unique(of_section):
        yield sections[index].name, np.flatnonzero(of_section == index)


def write(scored: Scored, scores: str | Path, predictions: str | Path, notes: str | Path) -> None:
    """The three tables, tab-separated; the same bytes for the same values."""
    table = {"sep": "\t", "index": False, "lineterminator": "\n"}
    scored.scores.to_csv(scores, float_format="%.6f", **table)
    scored.predictions.to_csv(predictions, compression={"method": "gzip", "mtime": 0}, **table)
    scored.notes.to_csv(notes, **table)


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, params, output = snakemake.input, snakemake.params, snakemake.output
    with threadpool_limits(limits=1):  # sums in the same order on any machine
        sections = [load_section(path) for path in given.slices]
        embedded = {
            model: [load_embedding(path, section) for path, section in zip(given[model], sections, strict=True)]
            for model in ("untrained", "stpatch")
        }
        scored = score(
            snakemake.wildcards.dataset,
            sections,
            {model: [x for x, _ in by_section] for model, by_section in embedded.items()},
            heads=params.heads,
            protocol_names=params.protocols,
            n_splits=params.splits,
            seed=params.seed,
            target_sum=params.target_sum,
            pretrained_on_simulated=any(
                about.get("simulated", "").lower() == "true" for _, about in embedded["stpatch"]
            ),
        )
    write(scored, output.scores, output.predictions, output.notes)
