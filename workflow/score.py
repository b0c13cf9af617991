"""Score one dataset: frozen embeddings and controls through the same probes on the same splits."""

import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
from sklearn.exceptions import ConvergenceWarning
from threadpoolctl import threadpool_limits

from workflow import probes, protocols
from workflow.assemble import COLUMNS, Assembled, Notes, assemble, by_model, load, tested
from workflow.controls import Section
from workflow.intervals import COMPARISONS, compare, metrics_of
from workflow.published import PUBLISHED, check

PLACE = ["section", "spot", "label"]  # of the predictions, before the methods' columns

Key = tuple[str, str]  # method and head


class Scored(NamedTuple):
    scores: pd.DataFrame  # COLUMNS
    notes: pd.DataFrame  # assemble.NOTES
    comparisons: pd.DataFrame  # COMPARISONS
    predictions: pd.DataFrame  # PLACE, then a column `protocol:method:head` each


@dataclass
class Shown:
    """One split of one protocol: of the fit with this number, the predictions of these tested spots."""

    split: int
    fit: int
    test: np.ndarray


def score(
    dataset: str,
    sections: list[Section],
    embeddings: dict[str, list[np.ndarray]],
    *,
    heads: list[str],
    protocol_names: list[str],
    n_splits: int,
    window: tuple[int, int],
    seed: int,
    target_sum: float,
    threads: int = 1,
    notes: Notes | None = None,
    published: str | Path = PUBLISHED,
    against: Sequence[str] = (),
) -> Scored:
    """Scores of all methods on a dataset.

    Parameters
    ----------
    sections, embeddings, notes
        As by `assemble.load`.
    heads, protocol_names
        Keys of `probes.HEADS`; names of functions in `protocols`, and `blocks_buffered`.
    window
        Height and width of the model's windows in cells, for `blocks_buffered`.
    threads
        Methods at a time; the result is the same for any number.
    published
        Table of the counts that the sources state (`workflow.published`).
    against
        Controls that the best of each pretrained model is compared with, as by `intervals.compare`.

    Returns
    -------
    Scored
        The score table, for each split by section and pooled over all tested spots of the split; notes on what the
        scores leave out; every method beside the strongest control; predictions of the protocol that maps are drawn of:
        `leave_section`, else the first one (its split 0). Empty, but for notes, where no spot has a label.
    """
    notes = notes or Notes()
    for section, detail in check(dataset, sections, published):
        notes.add("published_count", section=section, detail=detail)
    data = assemble(sections, embeddings, target_sum, notes)
    rows, comparisons, columns = [], [pd.DataFrame(columns=COMPARISONS)], {}
    if len(data.y):
        cell = _cells(data, notes)
        block, donor = protocols.blocks_of(data.of_section, cell), _donors(data)
        fits, plan = _plan(dataset, data, cell, block, donor, protocol_names, n_splits, window, seed, notes)
        predicted = _predict(data, fits, heads, threads)
        names = [section.name for section in sections]
        mapped = "leave_section" if "leave_section" in plan else next(iter(plan), None)
        for protocol, shown in plan.items():
            runs = {key: list(_runs(run, fits, shown)) for key, run in predicted.items()}
            _note_fits(protocol, shown, predicted, notes)
            rows += _rows(dataset, protocol, runs, data)
            where = {"sections": names, "donor": donor, "against": against, "seed": seed}
            found = compare(dataset, protocol, runs, data.y, data.of_section, block, **where)
            comparisons.append(found)
            if protocol == mapped:
                columns = _columns(protocol, runs, data)
            _say(f"{protocol}: {len(shown)} splits scored and compared")
    place = [[sections[index].name for index in data.of_section], data.spot, data.classes[data.y]]
    return Scored(
        pd.DataFrame(rows, columns=COLUMNS),
        notes.frame(),
        pd.concat([frame for frame in comparisons if len(frame)] or comparisons),
        pd.DataFrame({**dict(zip(PLACE, place, strict=True)), **columns}),
    )


def _cells(data: Assembled, notes: Notes) -> np.ndarray:
    by_section = []
    for index, section in enumerate(data.sections):
        spots = data.spot[data.of_section == index]
        by_section.append(protocols.cells(section.lattice, section.array, section.position)[spots])
        if section.array is None and len(spots):
            width = f"{protocols.pitch(section.position):.4g} {section.position_unit}"
            detail = f"no capture lattice: cells are bins of {width}, the median distance of nearest spots"
            notes.add("binned_positions", section=section.name, detail=detail)
    return np.concatenate(by_section)


def _donors(data: Assembled) -> np.ndarray:
    """Rank of each spot's donor among those of labelled sections, int [n]; -1 where it is unknown."""
    donors = sorted({data.sections[index].donor for index in np.unique(data.of_section)} - {""})
    rank = {donor: index for index, donor in enumerate(donors)}
    return np.array([rank.get(section.donor, -1) for section in data.sections])[data.of_section]


def _plan(
    dataset, data, cell, block, donor, protocol_names, n_splits, window, seed, notes
) -> tuple[list[probes.Spots], dict[str, list[Shown]]]:
    """What is fitted, and what each protocol shows of it: `blocks_buffered` shows part of what `blocks` tests."""
    fits: list[probes.Spots] = []
    number: dict[tuple[str, int], int] = {}  # of a split's fit
    plan: dict[str, list[Shown]] = {}
    for protocol in protocol_names:
        fitted = "blocks" if protocol == "blocks_buffered" else protocol
        for split, train, all_tested in _splits(fitted, dataset, data, block, donor, n_splits, seed, notes):
            test = all_tested
            if protocol == "blocks_buffered":
                ((_, _, test),) = protocols.buffered([(split, train, test)], data.of_section, cell, window)
                detail = f"{len(test)} of {len(all_tested)} tested spots remain"
                notes.add("buffered", protocol=protocol, split=split, detail=detail)
            if not len(train) or not len(test):
                found = f"{len(train)} training and {len(test)} tested spots"
                notes.add("split_skipped", protocol=protocol, split=split, detail=found)
                continue
            for name in data.classes[~np.isin(np.arange(len(data.classes)), data.y[train])]:
                notes.add("class_absent_from_training", protocol=protocol, split=split, detail=name)
            if (fitted, split) not in number:
                number[fitted, split] = len(fits)
                fits.append((train, all_tested))
            plan.setdefault(protocol, []).append(Shown(split, number[fitted, split], test))
    return fits, plan


def _splits(protocol, dataset, data, block, donor, n_splits, seed, notes) -> Iterator[protocols.Split]:
    labelled = [data.sections[index] for index in np.unique(data.of_section)]
    if protocol == "random20":
        yield from protocols.random20(len(data.y), n_splits, seed, dataset)
    elif protocol == "blocks":
        yield from protocols.blocks(block, n_splits, seed, dataset)
    elif protocol == "leave_section":
        if len(labelled) < 2:
            notes.add("protocol_skipped", protocol=protocol, detail="fewer than two labelled sections")
            return
        _note_shared_donors(labelled, notes)
        yield from protocols.leave_section(data.of_section)
    elif protocol == "leave_donor":
        if donor.max() < 1:
            notes.add("protocol_skipped", protocol=protocol, detail="fewer than two known donors of labelled sections")
            return
        for section in labelled:
            if not section.donor:
                notes.add("unknown_donor", protocol=protocol, section=section.name, detail="neither trains nor tested")
        yield from protocols.leave_donor(donor)
    else:
        known = "random20, blocks, blocks_buffered, leave_section, leave_donor"
        raise ValueError(f"unknown protocol {protocol!r}; known: {known}")


def _note_shared_donors(labelled: list[Section], notes: Notes) -> None:
    """A left-out section is familiar where other sections of its donor train; a blank donor is unknown, not shared."""
    for split, section in enumerate(labelled):
        others = [other.name for other in labelled if other.donor == section.donor and other.name != section.name]
        if section.donor and others:
            where = {"protocol": "leave_section", "split": split, "section": section.name}
            verb = "trains" if len(others) == 1 else "train"
            notes.add("shared_donor", detail=f"{', '.join(others)} of donor {section.donor} {verb}", **where)


def _predict(
    data: Assembled, fits: list[probes.Spots], heads: list[str], threads: int
) -> dict[Key, list[probes.Prediction]]:
    """(method, head) -> a prediction a fit; classes in the smallest int, as there are thousands of predictions."""
    small = np.min_scalar_type(-len(data.classes))

    def shrunk(predictions: list[probes.Prediction]) -> list[probes.Prediction]:
        return [made._replace(classes=made.classes.astype(small)) for made in predictions]

    def of(method: str) -> list[list[probes.Prediction]]:
        x, found, took = data.x[method], [], []
        for head in heads:
            began = time.thread_time()
            found.append(shrunk(probes.HEADS[head](x, data.y, fits)))
            took.append(f"{head} {time.thread_time() - began:.1f} s")
        _say(f"{method}: {len(fits)} fits, CPU: {', '.join(took)}")
        return found

    predicted = {("majority", "none"): shrunk(probes.majority(data.y, fits))}
    # Threads, for nearly all time is spent in BLAS and compiled loops. Told apart by `converged`, and noted:
    with warnings.catch_warnings(), ThreadPoolExecutor(threads) as pool:
        warnings.simplefilter("ignore", ConvergenceWarning)
        for method, found in zip(data.x, pool.map(of, data.x), strict=True):
            predicted |= {(method, head): run for head, run in zip(heads, found, strict=True)}
    return predicted


def _runs(
    run: list[probes.Prediction], fits: list[probes.Spots], shown: list[Shown]
) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    for one in shown:
        yield one.split, one.test, run[one.fit].classes[np.searchsorted(fits[one.fit][1], one.test)]


def _note_fits(protocol, shown, predicted, notes) -> None:
    for one in shown:
        for (method, head), run in predicted.items():
            if not run[one.fit].converged:
                where = {"protocol": protocol, "split": one.split, "method": method, "head": head}
                notes.add("not_converged", detail=f"stopped after {probes.MAX_ITER} iterations", **where)


def _rows(dataset: str, protocol: str, runs: dict[Key, list], data: Assembled) -> Iterator[tuple]:
    """Rows of the score table: split by split, method by method, pooled before the sections."""
    for shown in zip(*runs.values(), strict=True):
        split, test, _ = shown[0]
        scopes = list(tested(data.sections, data.of_section[test]))
        truth = [data.y[test[of]] for _, of in scopes]
        for (method, head), (_, _, classes) in zip(runs, shown, strict=True):
            counts = [
                probes.confusion(true, classes[of], len(data.classes))
                for true, (_, of) in zip(truth, scopes, strict=True)
            ]
            found = metrics_of(np.array(counts))
            for at, (section, _) in enumerate(scopes):
                for metric, values in found.items():
                    yield dataset, section, method, head, protocol, split, metric, values[at]


def _columns(protocol: str, runs: dict[Key, list], data: Assembled) -> dict[str, np.ndarray]:
    """Predicted names of all tested spots, "" elsewhere: of every split of `leave_section`, else of the first."""
    columns = {}
    for (method, head), run in runs.items():
        column = columns[f"{protocol}:{method}:{head}"] = np.full(len(data.y), "", dtype=object)
        for _, test, classes in run if protocol == "leave_section" else run[:1]:
            column[test] = data.classes[classes]
    return columns


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def write(
    scored: Scored, scores: str | Path, notes: str | Path, comparisons: str | Path, predictions: str | Path
) -> None:
    """The four tables, tab-separated; the same bytes for the same values."""
    table = {"sep": "\t", "index": False, "lineterminator": "\n"}
    scored.scores.to_csv(scores, float_format="%.6f", **table)
    scored.notes.to_csv(notes, **table)
    scored.comparisons.to_csv(comparisons, float_format="%.6f", **table)
    scored.predictions.to_csv(predictions, compression={"method": "gzip", "mtime": 0}, **table)


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, params, output = snakemake.input, snakemake.params, snakemake.output
    with threadpool_limits(limits=1):  # sums in the same order on any machine
        sections, embedded, notes = load(given.slices, by_model(params.models, given.embeddings))
        scored = score(
            snakemake.wildcards.dataset,
            sections,
            embedded,
            heads=params.heads,
            protocol_names=params.protocols,
            n_splits=params.splits,
            window=tuple(params.window),
            seed=params.seed,
            target_sum=params.target_sum,
            threads=snakemake.threads,
            notes=notes,
            published=given.published,
            against=["untrained"],
        )
    write(scored, output.scores, output.notes, output.comparisons, output.predictions)
