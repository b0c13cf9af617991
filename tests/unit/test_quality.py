"""The command behind docs/experiments.md, on planted labels of simulated sections; nothing is pretrained."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks import quality
from tests.unit.sections import full_section
from workflow.controls import Section
from workflow.intervals import COMPARISONS

CLASSES = 3


def sections() -> list[Section]:
    """Two simulated sections of four blocks, whose classes lie in tiles of 8 x 8 cells at random and change no count."""
    made = []
    for seed, name in enumerate("ab"):
        section = full_section(name, rows=32, cols=64, seed=seed)
        tile = np.random.default_rng(seed).integers(0, CLASSES, (4, 4))
        row, col = (section.array // [8, 16]).T
        section.labels = np.array([f"class{label}" for label in tile[row, col]], dtype=object)
        section.simulated = True
        made.append(section)
    return made


def planted(of: list[Section], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    codes = [np.unique(section.labels.astype(str), return_inverse=True)[1] for section in of]
    return [np.eye(CLASSES)[code] + 0.3 * rng.normal(size=(len(code), CLASSES)) for code in codes]


def noise(of: list[Section], seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(section.n_spots, CLASSES)) for section in of]


@pytest.fixture(scope="module")
def of_planted() -> quality.Row:
    """The trained tells the classes, the untrained does not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "N_SPLITS", 2)
        patch.setattr(quality, "N_DRAWS", 2)
        of = sections()
        methods = {f"stpatch_seed{seed}": planted(of, seed) for seed in (0, 1)}
        methods |= {f"untrained_seed{seed}": noise(of, 9 + seed) for seed in (0, 1)}
        return quality.measure(of, methods, [5], 1e4)


@pytest.fixture(scope="module")
def of_equals() -> quality.Row:
    """Training changed nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quality, "N_SPLITS", 2)
        patch.setattr(quality, "N_DRAWS", 2)
        of = sections()
        same = planted(of, 0)
        return quality.measure(of, {"stpatch_seed0": same, "untrained_seed0": same}, [5], 1e4)


def against(comparisons: pd.DataFrame, control: str) -> pd.DataFrame:
    rows = comparisons.query("compared == 'against' and section == 'pooled'")
    return rows[rows["control"].str.partition("+")[0] == control]


def test_few_labels_are_as_many_of_every_class_and_all_of_a_rare_one():
    y, of_section = np.repeat([0, 1, 2, 0, 1, 2], [40, 50, 3, 60, 30, 7]), np.repeat([0, 1], [93, 97])
    for left_out, (train, test) in enumerate(quality.few_labels(y, of_section, 5, 0)):
        assert np.bincount(y[train]).tolist() == [5, 5, [5, 3][left_out]]
        assert (of_section[train] != left_out).all()
        assert np.array_equal(test, np.flatnonzero(of_section == left_out))
        assert (np.diff(train) > 0).all()


def test_few_labels_are_the_same_again_and_others_in_another_draw():
    y, of_section = np.arange(400) % 4, np.arange(400) // 200
    drawn = {
        (n, draw): [train.tolist() for train, _ in quality.few_labels(y, of_section, n, draw)]
        for n in (5, 6)
        for draw in (0, 1)
    }
    assert drawn[5, 0] == [train.tolist() for train, _ in quality.few_labels(y, of_section, 5, 0)]
    assert drawn[5, 0] != drawn[5, 1]
    assert not set(drawn[5, 0][0]) <= set(drawn[6, 0][0])  # a number of its own is drawn anew


def test_an_encoder_that_tells_the_classes_leads_every_control_with_many_labels_and_with_few(of_planted):
    for comparisons, protocols in ((of_planted.comparisons, quality.PROTOCOLS), (of_planted.few, ["few_5"])):
        for control in quality.AGAINST:
            rows = against(comparisons, control)
            wanted = {(protocol, head) for protocol in protocols for head in quality.HEADS}
            assert set(zip(rows["protocol"], rows["head"], strict=True)) == wanted
            rows = rows[rows["metric"].isin(quality.METRICS)]
            assert len(rows) == len(wanted) * len(quality.METRICS)
            assert (rows["low"] > 0).all()
            assert np.allclose(rows["difference"], rows["value"] - rows["control_value"])
        strongest = comparisons.query("compared == 'best'")
        assert len(strongest) == len(protocols) * len(quality.HEADS) * 4
        assert (strongest["difference"] > 0).all()
    assert (against(of_planted.few, "untrained")["n_seeds"] == 2).all()


def test_an_encoder_that_training_did_not_change_differs_from_its_untrained_self_by_nothing(of_equals):
    for comparisons in (of_equals.comparisons, of_equals.few):
        rows = against(comparisons, "untrained")
        assert len(rows)
        assert (rows[["difference", "low", "high"]] == 0).all(axis=None)
        assert (rows["value"] > 0.7).sum() >= len(quality.HEADS)  # no tie of two that know nothing


def test_with_few_labels_each_method_keeps_the_post_processing_that_was_best_with_all(of_planted):
    kept = quality.best(of_planted.comparisons).query("protocol == 'leave_section'")
    kept = set(zip(kept["head"], kept["method"], strict=True))
    few = of_planted.few.query("compared == 'method'")
    assert set(zip(few["head"], few["method"], strict=True)) == kept
    assert {"spatial_directions_18", "spatial_directions_36"} <= {method.partition("+")[0] for _, method in kept}


def test_the_best_post_processing_is_that_of_the_greatest_accuracy():
    rows = [
        ("blocks", method, "knn", "pooled", "method", metric, value)
        for method, values in {"pca": (0.5, 0.9), "pca+centred": (0.6, 0.1), "raw": (0.7, 0.2)}.items()
        for metric, value in zip(("accuracy", "ari"), values, strict=True)
    ]
    names = ["protocol", "method", "head", "section", "compared", "metric", "value"]
    found = quality.best(pd.DataFrame(rows, columns=names)).set_index("base")
    assert found["method"].to_dict() == {"pca": "pca+centred", "raw": "raw"}
    assert found["ari"].to_dict() == {"pca": 0.1, "raw": 0.2}


def test_tables_show_every_method_once_and_say_that_data_are_simulated(of_planted):
    facts = {"stpatch_seed0": (10.0, 0.8), "stpatch_seed1": (14.0, 0.9)}
    text = quality.tables(of_planted, facts)
    first = text.split("\n\n")[1].splitlines()
    methods = [line.split(" | ")[0].strip("| ") for line in first[2:]]
    assert sorted(methods) == sorted(
        ["stpatch", "untrained", "majority", "coordinates", "coordinates_section", "raw", "pca"]
        + [f"neighbour_mean_{n}" for n in (6, 18, 36)]
        + [f"spatial_directions_{n}" for n in (18, 36)]
    )
    assert methods[0] == "stpatch"
    headings = [part for part in text.split("\n\n") if not part.startswith("|")]
    assert len(headings) == 5
    assert all(heading.endswith("(simulated)") for heading in headings)
    assert "| mean | 12.000 ± 2.000 | .850 ± .050 |" in text
    assert "**+." in text
    assert [part for part in quality.tables(of_planted, facts, bare=True).split("\n\n") if part[0] != "|"] == headings[
        :1
    ]


def test_figures_lose_their_leading_zero_alone():
    assert [quality.short(value) for value in (0.8124, -0.004, 1.0, 10.04)] == [".812", "-.004", "1.000", "10.040"]
    assert [quality.short(value, "+") for value in (0.012, -0.2, 0.0)] == ["+.012", "-.200", "+.000"]


def test_written_tables_are_tidy(of_planted, tmp_path):
    quality.write(of_planted, tmp_path)
    found = {path.stem: pd.read_csv(path, sep="\t") for path in tmp_path.iterdir()}
    assert set(found) == {"scores", "comparisons", "few", "notes"}
    assert list(found["few"].columns) == list(found["comparisons"].columns) == COMPARISONS
    keys = ["section", "method", "head", "protocol", "split", "metric"]
    assert not found["scores"].duplicated(keys).any()
    assert not found["notes"].duplicated().any()


class Trainer:
    """Stands for the trainer: notes what it is asked for and leaves the files that it would."""

    def __init__(self) -> None:
        self.asked: list[list[str]] = []

    def __call__(self, module: str, *arguments: object) -> None:
        given = [str(argument) for argument in arguments]
        self.asked.append([module, *given])
        out = Path(given[given.index("--out") + 1])
        out.mkdir(parents=True, exist_ok=True)
        tars = [Path(argument) for argument in given if argument.endswith(".tar")]
        for file in ["model.safetensors"] if module == "pretrain" else [f"{tar.stem}.safetensors" for tar in tars]:
            (out / file).touch()


@pytest.fixture
def fake_trainer(monkeypatch) -> Trainer:
    made = Trainer()
    monkeypatch.setattr(quality, "trainer", made)
    return made


def test_a_run_that_was_stopped_makes_only_what_is_missing(tmp_path, fake_trainer):
    command = ["--results", "r", "--out", str(tmp_path), "--sections", "b", "a", "--", "--steps", "5"]
    args = quality.parse(command)
    model = quality.pretrained(args, 3)
    assert fake_trainer.asked == [
        ["pretrain", "--shards", "r/shards/train", "--out", str(model), "--seed", "3", "--steps", "5"]
    ]
    files = quality.embedded(args, 3, model, "--untrained")
    assert [file.name for file in files] == ["a.safetensors", "b.safetensors"]
    assert fake_trainer.asked[1][-1] == "--untrained"
    files[1].unlink()
    fake_trainer.asked.clear()
    quality.pretrained(args, 3)
    quality.embedded(args, 3, model, "--untrained")
    ((module, *given),) = fake_trainer.asked
    assert module == "embed"
    assert [argument for argument in given if argument.endswith(".tar")] == ["r/shards/slices/b.tar"]
    fake_trainer.asked.clear()
    assert quality.embedded(args, 3, model) != files  # the trained model's lie elsewhere
    assert len(fake_trainer.asked) == 1


def test_embeddings_older_than_their_model_are_made_again(tmp_path, fake_trainer):
    args = quality.parse(["--results", "r", "--out", str(tmp_path)])
    model = quality.pretrained(args, 0)
    for file in quality.embedded(args, 0, model):
        os.utime(file, (1, 1))
    fake_trainer.asked.clear()
    quality.embedded(args, 0, model)
    assert [asked[0] for asked in fake_trainer.asked] == ["embed"]


def test_a_folder_of_another_row_is_refused(tmp_path):
    command = ["--results", "r", "--out", str(tmp_path / "row")]
    quality.same_row(quality.parse([*command, "--", "--steps", "5"]))
    quality.same_row(quality.parse([*command, "--seeds", "7", "--", "--steps", "5"]))  # more seeds of the same row
    with pytest.raises(SystemExit, match="another row"):
        quality.same_row(quality.parse([*command, "--", "--steps", "6"]))


def test_finished_models_are_taken_as_one_a_seed_and_must_be_finished(tmp_path, fake_trainer, capsys):
    models = [str(tmp_path / name) for name in "xy"]
    command = ["--results", "r", "--out", str(tmp_path / "out"), "--models", *models]
    with pytest.raises(SystemExit):
        quality.parse(command)
    assert "has no model.safetensors" in capsys.readouterr().err
    for model in models:
        Path(model).mkdir()
        (Path(model) / "model.safetensors").touch()
    args = quality.parse(command)
    assert args.seeds == [0, 1]
    assert [str(quality.pretrained(args, seed)) for seed in args.seeds] == models
    assert fake_trainer.asked == []
    with pytest.raises(SystemExit):
        quality.parse([*command, "--", "--steps", "5"])
    assert "are finished" in capsys.readouterr().err


def test_minutes_and_held_out_error_are_those_of_the_last_lines(tmp_path):
    lines = [
        {"kind": "val", "step": 0, "masked_mse": 0.6, "gene_mean_mse": 0.6},
        {"kind": "train", "step": 5, "seconds": 30.0},
        {"kind": "train", "step": 9, "seconds": 90.0},
        {"kind": "val", "step": 9, "masked_mse": 0.45, "gene_mean_mse": 0.6},
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert quality.pretraining(tmp_path) == (1.5, pytest.approx(0.75))
    (tmp_path / "metrics.jsonl").write_text(json.dumps(lines[1]))
    assert np.isnan(quality.pretraining(tmp_path)[1])  # nothing was held out
