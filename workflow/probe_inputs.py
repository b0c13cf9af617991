"""What `python -m trainer.probe` reads: the features of a dataset's spots, method by method, and their classes and splits.

The spots and the splits are those of `score` under random20, so that heads can be compared.
"""

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from workflow import protocols
from workflow.assemble import Assembled, Notes

FORMAT_VERSION = 1
PROTOCOL = "random20"


def splits_of(
    dataset: str, spots: Assembled, n_splits: int, seed: int, notes: Notes
) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors and facts of the splits file (docs/format.md); a split without spots to train or test is noted and left out."""
    n, numbers, train, test = len(spots.y), [], [], []
    for split, trains, tested in protocols.random20(n, n_splits, seed, dataset) if n else ():
        if not len(trains) or not len(tested):
            found = f"{len(trains)} training and {len(tested)} tested spots"
            notes.add("split_skipped", protocol=PROTOCOL, split=split, detail=found)
            continue
        for name in spots.classes[~np.isin(np.arange(len(spots.classes)), spots.y[trains])]:
            notes.add("class_absent_from_training", protocol=PROTOCOL, split=split, detail=name)
        numbers.append(split)
        train.append(np.isin(np.arange(n), trains))
        test.append(np.isin(np.arange(n), tested))
    tensors = {
        "y": spots.y.astype(np.int16),
        "train": np.array(train, dtype=bool).reshape(len(numbers), n),
        "test": np.array(test, dtype=bool).reshape(len(numbers), n),
        "section": spots.of_section.astype(np.int16),
        "spot": spots.spot.astype(np.int32),
        "block": _blocks(spots).astype(np.int32),
    }
    facts = {
        "format_version": FORMAT_VERSION,
        "dataset": dataset,
        "protocol": PROTOCOL,
        "splits": numbers,
        "classes": [str(name) for name in spots.classes],
        "sections": [section.name for section in spots.sections],
    }
    return tensors, facts


def _blocks(spots: Assembled) -> np.ndarray:
    if not len(spots.y):
        return np.empty(0, dtype=np.int64)
    cells = [protocols.cells(section.lattice, section.array, section.position) for section in spots.sections]
    first = np.cumsum([0] + [section.n_spots for section in spots.sections])
    return protocols.blocks_of(spots.of_section, np.concatenate(cells)[first[spots.of_section] + spots.spot])


def encode(tensors: dict[str, np.ndarray], facts: dict) -> bytes:
    """A safetensors file, the same bytes for the same content: of several metadata the library shuffles the order."""
    return save(tensors, {"facts": json.dumps(facts, sort_keys=True)})


def write(path: str | Path, dataset: str, spots: Assembled, method: str, simulated: bool) -> None:
    """One method's features; empty, [0, 0], where no spot has a label."""
    x = spots.x[method] if len(spots.y) else np.empty((0, 0))
    facts = {"format_version": FORMAT_VERSION, "dataset": dataset, "method": method, "simulated": simulated}
    Path(path).write_bytes(encode({"X": np.ascontiguousarray(x, dtype=np.float32)}, facts))


if __name__ == "__main__":
    from threadpoolctl import threadpool_limits

    from workflow.assemble import assemble, by_model, load
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, params, output = snakemake.input, snakemake.params, snakemake.output
    dataset = snakemake.wildcards.dataset
    with threadpool_limits(limits=1):  # sums in the same order on any machine
        sections, embeddings, notes = load(given.slices, by_model(params.models, given.embeddings))
        spots = assemble(sections, embeddings, params.target_sum, notes)
        Path(output.splits).write_bytes(encode(*splits_of(dataset, spots, params.splits, params.seed, notes)))
        simulated = {row["method"] for row in notes.rows if row["kind"] == "simulated"}  # "": of a slice
        for method, path in zip(params.methods, output.features, strict=True):
            write(path, dataset, spots, method, bool(simulated & {"", method}))
    notes.frame().to_csv(output.notes, sep="\t", index=False, lineterminator="\n")
