"""The paper's head in the pipeline: what the probe reads, and the scores of what it predicts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from sklearn.metrics import accuracy_score, adjusted_rand_score, f1_score, normalized_mutual_info_score

from tests.unit.sections import full_section
from workflow import mlp, probe_inputs, protocols
from workflow.assemble import COLUMNS, Notes, assemble
from workflow.controls import Section
from workflow.errors import DamagedFile
from workflow.intervals import COMPARISONS

ROOT = Path(__file__).resolve().parents[2]


def section(name: str, seed: int, labelled: bool = True, rows: int = 20, cols: int = 40) -> Section:
    """A staggered rectangle in four quadrants, of which every tenth spot has no label."""
    made = full_section(name, rows, cols, seed)
    made.labels[:: 10 if labelled else 1] = None
    return made


def assembled(labelled: bool = True):
    """Two sections whose embedding is the one-hot quadrant under some noise, and their notes."""
    sections = [section(name, seed, labelled) for seed, name in enumerate(["a", "b"])]
    rng = np.random.default_rng(5)
    quadrant = [2 * (s.array[:, 0] >= 10) + (s.array[:, 1] >= 20) for s in sections]
    embedding = [3 * np.eye(4)[q] + rng.normal(size=(len(q), 4)) for q in quadrant]
    notes = Notes()
    return assemble(sections, {"stpatch": embedding}, 1e4, notes), notes


@pytest.fixture(scope="module")
def spots():
    return assembled()[0]


@pytest.fixture(scope="module")
def splits(spots):
    return probe_inputs.splits_of("set", spots, 3, 0, Notes())


def test_the_splits_are_those_that_the_other_heads_get(spots, splits):
    tensors, facts = splits
    expected = list(protocols.random20(len(spots.y), 3, 0, "set"))
    assert facts["splits"] == [0, 1, 2]
    for row, (_, train, test) in enumerate(expected):
        assert np.array_equal(np.flatnonzero(tensors["train"][row]), train)
        assert np.array_equal(np.flatnonzero(tensors["test"][row]), test)
    assert [facts["classes"][k] for k in tensors["y"]] == list(spots.classes[spots.y])


def test_every_spot_is_named_by_section_row_and_block(spots, splits):
    tensors, facts = splits
    assert facts["sections"] == ["a", "b"]
    for index, one in enumerate(spots.sections):
        mine = tensors["section"] == index
        array = one.array[tensors["spot"][mine]]
        corner = np.unique(array // [16, 32], axis=0, return_inverse=True)[1].ravel()
        assert len(set(zip(corner, tensors["block"][mine], strict=True))) == len(set(corner)) == 4
    assert len(np.unique(tensors["block"])) == 8


def test_the_head_learns_what_the_embedding_tells_and_scores_say_so(spots, splits, tmp_path):
    """Through the files and the command; `raw` guesses."""
    given, features, out = (tmp_path / f"{name}.safetensors" for name in ("splits", "features", "predictions"))
    given.write_bytes(probe_inputs.encode(*splits))
    probe_inputs.write(features, "set", spots, "stpatch", simulated=True)
    command = [sys.executable, "-m", "trainer.probe", "--features", features, "--splits", given, "--out", out]
    flags = "--device cpu --hidden 32 16 --epochs 100 --threads 1".split()
    subprocess.run([*map(str, command), *flags], check=True, cwd=ROOT)
    tensors, facts = mlp.read_splits(given)
    guess = np.random.default_rng(0).integers(4, size=tensors["test"].shape)
    predicted = {
        "raw": np.where(tensors["test"], guess, -1),
        "stpatch": mlp.read_predictions(out, tensors, "set", "stpatch"),
    }
    scores, compared = mlp.scores(tensors, facts, predicted, seed=0)

    assert list(scores.columns) == COLUMNS
    assert set(scores["section"]) == {"pooled", "a", "b"}
    assert set(scores["head"]) == {"mlp"}
    assert set(scores["protocol"]) == {"random20"}
    assert len(scores) == 2 * 3 * 3 * 4  # methods, splits, scopes, metrics
    pooled = scores.query("section == 'pooled' and metric == 'accuracy'").groupby("method")["value"].mean()
    assert pooled["stpatch"] > 0.9
    assert pooled["raw"] < 0.4
    assert list(compared.columns) == COMPARISONS
    assert set(zip(compared["method"], compared["head"], strict=True)) >= {
        ("raw", "mlp"), ("stpatch", "mlp"), ("majority", "none")
    }  # fmt: skip
    row = compared.query(
        "method == 'stpatch' and section == 'pooled' and metric == 'accuracy' and compared == 'method'"
    )
    assert float(row["low"].iloc[0]) > 0.3


def test_scores_are_scikit_learns_on_the_tested_spots(splits):
    tensors, facts = splits
    guess = np.random.default_rng(0).integers(4, size=(3, len(tensors["y"])))
    scores, _ = mlp.scores(tensors, facts, {"pca": np.where(tensors["test"], guess, -1)}, seed=0)
    assert len(scores) == 36  # splits, scopes, metrics
    scopes = {"pooled": np.ones_like(tensors["test"][0]), "b": tensors["section"] == 1}
    for (scope, split), rows in scores.query("section != 'a'").groupby(["section", "split"]):
        some = tensors["test"][split] & scopes[scope]
        truth, said, found = tensors["y"][some], guess[split][some], rows.set_index("metric")["value"]
        assert found["accuracy"] == pytest.approx(accuracy_score(truth, said))
        assert found["macro_f1"] == pytest.approx(f1_score(truth, said, average="macro"))
        assert found["ari"] == pytest.approx(adjusted_rand_score(truth, said))
        assert found["nmi"] == pytest.approx(normalized_mutual_info_score(truth, said))


def test_without_labels_the_tables_are_headers_and_the_notes_say_why(tmp_path):
    spots, notes = assembled(labelled=False)
    tensors, facts = probe_inputs.splits_of("set", spots, 3, 0, notes)
    probe_inputs.write(tmp_path / "x.safetensors", "set", spots, "pca", simulated=False)
    (tmp_path / "s.safetensors").write_bytes(probe_inputs.encode(tensors, facts))
    tensors, facts = mlp.read_splits(tmp_path / "s.safetensors")
    assert tensors["train"].shape == tensors["test"].shape == (0, 0)
    scores, compared = mlp.scores(tensors, facts, {"pca": np.empty((0, 0), dtype=np.int64)}, seed=0)
    assert (list(scores.columns), len(scores)) == (COLUMNS, 0)
    assert (list(compared.columns), len(compared)) == (COMPARISONS, 0)
    assert "no_labels" in {row["kind"] for row in notes.rows}


def test_a_class_that_a_split_does_not_train_on_is_noted(spots):
    notes, y = Notes(), spots.y.copy()
    y[:] = 0
    y[np.setdiff1d(np.arange(len(y)), next(protocols.random20(len(y), 1, 0, "set"))[1])[0]] = (
        3  # one test spot of split 0
    )
    altered = type(spots)(**{**vars(spots), "y": y})
    probe_inputs.splits_of("set", altered, 1, 0, notes)
    assert [row["detail"] for row in notes.rows if row["kind"] == "class_absent_from_training"] == ["q1", "q2", "q3"]


def test_the_same_spots_give_the_same_bytes(spots, splits, tmp_path):
    again = probe_inputs.splits_of("set", assembled()[0], 3, 0, Notes())
    assert probe_inputs.encode(*again) == probe_inputs.encode(*splits)
    for name in ("one", "two"):
        probe_inputs.write(tmp_path / name, "set", spots, "pca", simulated=False)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


@pytest.mark.parametrize(
    ("about", "shape", "said"),
    [
        ({"method": "raw"}, (3, 1), "version 1, raw of set"),
        ({"format_version": "2"}, (3, 1), "version 2, pca of set"),
        ({}, (2, 1), r"predictions \[2, 1, \d+\] that are not of these test spots"),
    ],
)
def test_predictions_of_something_else_are_refused(splits, tmp_path, about, shape, said):
    tensors, _ = splits
    predicted = np.where(tensors["test"][: shape[0]], 0, -1).astype(np.int16)[:, None]
    save_file(
        {"predicted": predicted}, tmp_path / "p", {"format_version": "1", "method": "pca", "dataset": "set"} | about
    )
    with pytest.raises(DamagedFile, match=rf"{said}.*expected version 1, pca of set.*delete the file"):
        mlp.read_predictions(tmp_path / "p", tensors, "set", "pca")


def test_splits_of_another_version_are_refused(splits, tmp_path):
    tensors, facts = splits
    save_file(tensors, tmp_path / "s", {"facts": json.dumps({**facts, "format_version": 9})})
    with pytest.raises(DamagedFile, match="found version 9; expected version 1"):
        mlp.read_splits(tmp_path / "s")
