"""Scores of the paper's head, from what `python -m trainer.probe` predicted."""

import json
from pathlib import Path

import numpy as np
import pandas as pd

from workflow import probes
from workflow.assemble import COLUMNS
from workflow.errors import DamagedFile
from workflow.intervals import compare
from workflow.reading import read_safetensors

FORMAT_VERSION = 1
HEAD = "mlp"


def read_splits(path: str | Path) -> tuple[dict[str, np.ndarray], dict]:
    """Tensors and facts of a splits file; raises DamagedFile where it is not of this version."""
    tensors, metadata = read_safetensors(path)
    facts = json.loads(metadata.get("facts", "{}"))
    if facts.get("format_version") != FORMAT_VERSION:
        _refuse(path, Path(path).parent.name, f"version {facts.get('format_version')}", f"version {FORMAT_VERSION}")
    return tensors, facts


def read_predictions(path: str | Path, splits: dict[str, np.ndarray], dataset: str, method: str) -> np.ndarray:
    """Class of each spot by each split's first seed, int [n_splits, n], -1 where it is not tested.

    Raises
    ------
    DamagedFile
        If the file is of another version, method or dataset, or tests other spots than the splits say.
    """
    tensors, facts = read_safetensors(path)
    predicted, wrong = tensors.get("predicted", np.empty(0)), ""
    expected = (
        f"version {FORMAT_VERSION}, {method} of {dataset}, a class for every test spot of {len(splits['test'])} splits"
    )
    if any(
        facts.get(key) != value
        for key, value in (("format_version", str(FORMAT_VERSION)), ("method", method), ("dataset", dataset))
    ):
        wrong = f"version {facts.get('format_version')}, {facts.get('method')} of {facts.get('dataset')}"
    elif predicted.ndim != 3 or not predicted.shape[1] or not np.array_equal(predicted[:, 0] >= 0, splits["test"]):
        wrong = f"predictions {list(predicted.shape)} that are not of these test spots"
    if wrong:
        _refuse(path, dataset, wrong, expected)
    return predicted[:, 0].astype(np.int64)


def _refuse(path, dataset: str, found: str, expected: str) -> None:
    step = "delete the file and run again, so that its rule writes it anew"
    raise DamagedFile(slice=dataset, file=str(path), found=found, expected=expected, next_step=step)


def scores(
    splits: dict[str, np.ndarray], facts: dict, predicted: dict[str, np.ndarray], seed: int
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The score table and the comparisons, both empty where there is no split.

    Parameters
    ----------
    splits, facts
        Of the splits file.
    predicted
        Method -> int [n_splits, n], as by `read_predictions`.

    Returns
    -------
    scores, comparisons
        COLUMNS of `workflow.assemble`, for each split by section and pooled; COMPARISONS of `workflow.intervals`, with
        the majority class among the controls.
    """
    y, section = splits["y"].astype(np.int64), splits["section"].astype(np.int64)
    spots = [
        (np.flatnonzero(train), np.flatnonzero(test))
        for train, test in zip(splits["train"], splits["test"], strict=True)
    ]
    rows, runs = [], {}
    for method, of_splits in predicted.items() if spots else ():
        runs[method, HEAD] = []
        for split, (_, test), classes in zip(facts["splits"], spots, of_splits, strict=True):
            runs[method, HEAD].append((split, test, classes[test]))
            scopes = {"pooled": test}
            scopes |= {facts["sections"][index]: test[section[test] == index] for index in np.unique(section[test])}
            for name, some in scopes.items():
                for metric, value in probes.metrics(y[some], classes[some]).items():
                    rows.append((facts["dataset"], name, method, HEAD, facts["protocol"], split, metric, value))
    if runs:
        constant = probes.majority(y, spots)
        runs["majority", "none"] = [
            (split, test, prediction.classes)
            for split, (_, test), prediction in zip(facts["splits"], spots, constant, strict=True)
        ]
    compared = compare(
        facts["dataset"], facts["protocol"], runs, y, section, splits["block"], sections=facts["sections"], seed=seed
    )
    return pd.DataFrame(rows, columns=COLUMNS), compared


if __name__ == "__main__":
    import shutil

    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, params, output = snakemake.input, snakemake.params, snakemake.output
    splits, facts = read_splits(given.splits)
    predicted = {
        method: read_predictions(path, splits, snakemake.wildcards.dataset, method)
        for method, path in zip(params.methods, given.predictions, strict=True)
    }
    for table, path in zip(
        scores(splits, facts, predicted, params.seed), (output.scores, output.comparisons), strict=True
    ):
        table.to_csv(path, sep="\t", index=False, lineterminator="\n", float_format="%.6f")
    shutil.copyfile(given.notes, output.notes)
