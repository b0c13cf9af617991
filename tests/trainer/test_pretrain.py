"""The training run as a user starts it: settings, loop, model folder, errors."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import sys
import types
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.conftest import ROOT
from tests.trainer import corpus
from tests.trainer.conftest import FIXED, SMALL
from trainer import budget, config, pretrain
from trainer.data import Batch, Shards, Vocabulary
from trainer.errors import ConfigError, DamagedFile
from trainer.files import as_safetensors
from trainer.model import ModelConfig, build, load
from trainer.objective import Objective, ObjectiveConfig
from trainer.pretrain import SETTINGS, TrainConfig, learning_rate
from trainer.progress import Progress
from trainer.ranks import Asked, Ranks, pick_device
from trainer.report import curve, model_card


def lines(folder, kind):
    return [
        line for line in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind
    ]


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def pretrain_in(out, shards, *flags):
    pretrain.main(["--shards", str(shards / "train"), "--out", str(out), *SMALL, *map(str, flags)])
    return out


def test_a_short_run_predicts_held_out_windows_better_than_the_gene_means(model_folder):
    """On a simulated corpus of low rank, starting from exactly the gene means."""
    first, *_, last = lines(model_folder, "val")
    assert first["step"] == 0
    assert first["masked_mse"] == pytest.approx(first["gene_mean_mse"], rel=1e-6)
    assert last["gene_mean_mse"] == first["gene_mean_mse"]  # the same windows, the same masks
    assert last["masked_mse"] < 0.8 * last["gene_mean_mse"]
    assert last["n_windows"] == 40


def test_the_model_folder_is_complete(model_folder, shards):
    assert sorted(file.name for file in model_folder.iterdir()) == [
        "README.md", "config.json", "curve.svg", "genes.tsv", "metrics.jsonl", "model.safetensors"
    ]  # fmt: skip
    facts = json.loads((model_folder / "config.json").read_text())
    assert facts["format_version"] == 1
    assert facts["train"]["steps"] == 250
    assert (facts["train"]["dtype"], facts["train"]["compile"]) == ("float32", "off")  # what `auto` came to
    assert facts["objective"]["mask_ratio"] == 0.3
    assert facts["run"] == {"device": "cpu", "ranks": 1, "torch": torch.__version__, "resumed": []}
    assert facts["data"]["simulated"] is True
    assert (
        facts["data"]["genes"]["sha256"] == sha256(model_folder / "genes.tsv") == sha256(shards / "train" / "genes.tsv")
    )
    model, _, vocabulary = load(model_folder)
    assert model.gene_embedding.weight.shape == (len(vocabulary.gene_ids), 32)
    assert not model.training


def test_the_card_says_simulated_and_gives_both_figures(model_folder):
    card, last = (model_folder / "README.md").read_text(), lines(model_folder, "val")[-1]
    assert "Trained on simulated data" in card
    assert f"| model | {last['masked_mse']:.5f} |" in card
    assert f"| each gene's training mean | {last['gene_mean_mse']:.5f} |" in card
    assert "below the gene means" in card
    assert "over 40 of 40 held-out windows" in card
    assert "| train0 | simulated | human | d0 | offset | 100 um | 40 | training |" in card
    assert "| val0 | simulated | human | d0 | offset | 100 um | 40 | held out |" in card
    assert "may be among" not in card
    assert "; 30% of its (spot, gene) entries are hidden" in card
    assert "model.encode(values, genes, observed)  # [B, S, m], [B, m], [B, S] -> [B, S, width]" in card
    assert "{" not in card


def test_the_card_of_a_model_about_the_slices_mean_says_what_it_was_compared_with_and_what_it_takes(
    fixed_shards, tmp_path
):
    flags = [*FIXED, *"--mask-ratio 0 --mask-genes 0.4 --mask-sites 0.2 --steps 60 --lr 3e-3 --optimizer adamw".split()]
    pretrain_in(tmp_path, fixed_shards, *flags)
    card, (first, *_, last) = (tmp_path / "README.md").read_text(), lines(tmp_path, "val")
    assert first["masked_mse"] == pytest.approx(first["gene_mean_mse"], rel=1e-6)
    assert last["masked_mse"] < 0.9 * last["gene_mean_mse"]
    assert "; 40% of its genes at every spot and 20% of its spots whole are hidden and predicted from the" in card
    assert f"| each gene's mean in its slice | {last['gene_mean_mse']:.5f} |" in card
    assert "log1p(count * 10000 / total), less the gene's mean in its slice." in card
    assert "model.encode(values, genes, observed, None, places)" in card
    assert (tmp_path / "components.safetensors").read_bytes() == (
        fixed_shards / "train/components.safetensors"
    ).read_bytes()


def test_the_card_says_of_how_many_windows_the_figures_are(shards, tmp_path):
    pretrain_in(tmp_path, shards, "--steps", 1, "--val-samples", 10)
    assert "over 10 of 40 held-out windows" in (tmp_path / "README.md").read_text()
    assert [line["n_windows"] for line in lines(tmp_path, "val")] == [10, 10]


def test_the_card_says_that_evaluation_slices_may_be_among_the_training_slices(model_folder):
    facts = json.loads((model_folder / "config.json").read_text())
    facts["data"]["allow_contamination"] = True
    card = model_card(facts, {}, 1)
    facts["data"]["slices"][1]["pitch_um"] = None  # square lattices may lack a scale
    assert "| train1 | simulated | human | d1 | offset | an unknown pitch | 40 | training |" in model_card(facts, {}, 1)
    assert "simulated data" in card
    assert "**Evaluation slices may be among the training slices (`allow_contamination`)" in card


def test_the_metrics_follow_the_format(model_folder):
    train = lines(model_folder, "train")
    assert [line["step"] for line in train] == [1, 50, 100, 150, 200, 250]
    keys = ["kind", "step", "samples", "epoch", "loss", "lr", "patches_per_s", "data_wait", "mfu", "peak_memory_mb"]
    assert all(list(line) == [*keys, "seconds"] for line in train)
    assert all(0 <= line["data_wait"] <= 1 and line["mfu"] is None and line["peak_memory_mb"] > 50 for line in train)
    assert train[-1]["samples"] == 250 * 16  # 160 windows make 10 full batches
    assert train[-1]["epoch"] == 25
    assert [line["step"] for line in lines(model_folder, "val")] == [0, 125, 250]


def test_two_runs_of_one_seed_give_the_same_bytes(shards, tmp_path):
    flags = ("--steps", 12, "--lr", 1e-3)
    runs = [
        pretrain_in(tmp_path / name, shards, *flags, "--seed", seed, "--workers", workers)
        for name, seed, workers in (("a", 0, 0), ("b", 0, 3), ("c", 1, 1))
    ]
    hashes = [sha256(run / "model.safetensors") for run in runs]
    assert hashes[0] == hashes[1] != hashes[2]


def test_the_progress_line_gives_loss_speed_and_time_left(shards, tmp_path, capsys):
    pretrain_in(tmp_path, shards, "--steps", 4, "--log-every", 2)
    out = capsys.readouterr().out
    assert "160 windows of 6 x 5 x 24 (simulated data), 40 held out" in out
    assert "before training: held-out " in out
    assert [line.split("  ")[0] for line in out.splitlines()[2:-1]] == ["step 1/4", "step 2/4", "step 4/4"]
    assert "step 4/4  epoch 0.80  loss " in out
    assert "(gene mean " in out
    assert re.search(r" patches/s  data wait [0-9]+%  0:00:00 left", out)
    assert "4 steps of 32 on 1 x cpu, float32, compile off" in out


def test_an_interrupted_run_goes_on_with_its_lines_and_adds_to_its_time(tmp_path, capsys, monkeypatch):
    clock = iter([100.0, 101.0, 102.0, 104.0, 108.0])  # opened; data fetched in a second; two lines
    monkeypatch.setattr("trainer.progress.time.perf_counter", lambda: next(clock))
    earlier = [
        {"kind": "train", "step": 10, "samples": 80, "loss": 0.5},
        {"kind": "val", "step": 10, "samples": 80, "masked_mse": 0.4, "gene_mean_mse": 0.6, "n_windows": 3},
    ]
    lines = b"".join(json.dumps(line).encode() + b"\n" for line in earlier)
    machine = lambda speed: {"mfu": speed / 40, "peak_memory_mb": 7.0}  # noqa: E731
    with Progress(tmp_path / "metrics.jsonl", 40, 100, 80, lines, 50.0, machine) as progress:
        assert progress.scores == {"masked_mse": 0.4, "gene_mean_mse": 0.6, "n_windows": 3}
        assert progress.wait(lambda: "data") == "data"
        progress.trained(20, 160, 0.3, 1e-4)
        progress.trained(30, 240, 0.2, 1e-4)
    *first, line, _ = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert first == earlier
    assert (line["patches_per_s"], line["data_wait"], line["mfu"], line["peak_memory_mb"]) == (20, 0.25, 0.5, 7)
    assert (line["seconds"], line["epoch"]) == (54, 1.6)
    first, second = capsys.readouterr().out.splitlines()
    held_out = "held-out 0.4000 (gene mean 0.6000)  lr 1.00e-04"
    assert first == f"step 20/40  epoch 1.60  loss 0.3000  {held_out}  4.0 s with the first step"
    assert (
        second == f"step 30/40  epoch 2.40  loss 0.2000  {held_out}  20 patches/s  data wait 0%  MFU 50%  0:00:04 left"
    )


def test_neither_the_first_validation_nor_the_first_step_counts_for_the_time_left(tmp_path, capsys, monkeypatch):
    clock = iter([0.0, 0.0, 60.0, 65.0, 67.0])  # opened; a minute of validation; steps 1 and 2
    monkeypatch.setattr("trainer.progress.time.perf_counter", lambda: next(clock))
    with Progress(tmp_path / "metrics.jsonl", steps=11, n_samples=100) as progress:
        with progress.pause():
            progress.validated(0, 0, {"masked_mse": 0.4, "gene_mean_mse": 0.6, "n_windows": 3})
        progress.trained(1, 8, 0.3, 1e-4)
        progress.trained(2, 16, 0.3, 1e-4)
    before, first, second = capsys.readouterr().out.splitlines()
    assert before == "before training: held-out 0.4000 (gene mean 0.6000)"
    assert first.endswith("  5.0 s with the first step")
    assert second.endswith("  4 patches/s  data wait 0%  0:00:18 left")


def test_a_rank_that_is_not_the_first_says_and_writes_nothing(capsys):
    with Progress(None, steps=11, n_samples=100) as progress:
        progress.validated(0, 0, {"masked_mse": 0.4, "gene_mean_mse": 0.6, "n_windows": 3})
        progress.trained(1, 8, 0.3, 1e-4)
        progress.say("hello")
    assert capsys.readouterr().out == ""
    assert progress.scores["masked_mse"] == 0.4


def test_a_step_asks_the_device_for_no_number(shards, tmp_path):
    """Else the host would wait for a GPU at every step. (SGD, since Adam counts its steps on the host.)"""
    reader = Shards(shards / "train")
    facts = {"n_genes": 60, "m": 24, "h": 6, "w": 5, "width": 16, "depth": 1, "heads": 2, "decoder_depth": 1}
    asked = {}

    class Counted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            asked[steps] += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
            return function(*args, **(kwargs or {}))

    for steps in (3, 9):
        asked[steps], cfg = 0, TrainConfig(steps=steps, batch_size=8, log_every=100, clip=1.0, workers=1)
        model = build(ModelConfig(**facts), reader.vocabulary, 0)
        objective = Objective(model, reader.index["target_sum"], ObjectiveConfig(0))
        state = {"step": 0, "consumed": 0, "seen": [0.0, 0.0], "best": None}
        optimizer, ranks = torch.optim.SGD(model.parameters(), 0.0), Ranks(torch.device("cpu"))
        with Asked() as signals, Progress(tmp_path / "metrics.jsonl", steps, len(reader)) as progress, Counted():
            done = pretrain.train(
                objective, optimizer, reader, None, cfg, ranks, progress, state, save=None, asked=signals
            )
        assert done
        assert state["step"] == steps
    assert asked[3] == asked[9] > 0


def test_bfloat16_and_compile_are_recorded_and_give_nearly_the_same(shards, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda module, **options: compiled.append(options) or module)
    flags = ("--steps", 6, "--lr", 1e-3)
    pretrain_in(tmp_path / "a", shards, *flags)
    pretrain_in(tmp_path / "b", shards, *flags, "--dtype", "bfloat16", "--compile", "on")
    assert compiled == [{"fullgraph": True, "dynamic": False, "mode": "default"}]
    facts = json.loads((tmp_path / "b" / "config.json").read_text())["train"]
    assert (facts["dtype"], facts["compile"]) == ("bfloat16", "on")
    losses = [[line["loss"] for line in lines(tmp_path / name, "train")] for name in "ab"]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert load(tmp_path / "b")[0].widen.weight.dtype == torch.float32


def test_the_curve_is_drawn_and_says_simulated(model_folder):
    root = ElementTree.parse(model_folder / "curve.svg").getroot()
    text = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"simulated data", "step 250", "held-out windows"} <= set(text)
    drawn = [line.get("points").split() for line in root.iter("{http://www.w3.org/2000/svg}polyline")]
    assert [len(points) for points in drawn] == [7, 4, 4]  # the last twice
    heights = [float(point.split(",")[1]) for point in drawn[1]]
    assert heights == sorted(heights)  # y points down, and the error fell
    assert b"simulated" not in curve((model_folder / "metrics.jsonl").read_bytes(), simulated=False)
    assert "![learning curve](curve.svg)" in (model_folder / "README.md").read_text()


def test_a_curve_without_lines_or_change_is_still_a_picture():
    for metrics in (b"", b'{"kind": "train", "step": 1, "loss": 0.5}\n'):
        assert ElementTree.fromstring(curve(metrics, simulated=False)).tag.endswith("svg")


def test_a_log_gets_every_figure_of_every_line(shards, tmp_path, monkeypatch):
    logged = []
    run = types.SimpleNamespace(log=lambda values, step: logged.extend((step, item) for item in values.items()))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: run))
    pretrain_in(tmp_path, shards, "--steps", 4, "--log", "wandb", "--log-every", 2)
    found = {(step, name): value for step, (name, value) in logged}
    for kind in ("train", "val"):
        for line in lines(tmp_path, kind):
            for name in set(line) & {"loss", "masked_mse", "gene_mean_mse", "patches_per_s"}:
                assert found[line["step"], f"{kind}/{name}"] == line[name]
    assert (4, "train/mfu") not in found  # unknown on a CPU


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_log_whose_package_is_absent_is_refused_with_the_next_step(shards, tmp_path, monkeypatch, name):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match=f"found no package {name}; .*pip install {name}"):
        pretrain_in(tmp_path, shards, "--steps", 4, "--log", name)


def test_too_little_memory_names_the_batch_that_fits_before_the_first_step(shards, tmp_path, monkeypatch):
    objective_bytes = []
    measure = budget.cost
    monkeypatch.setattr(budget, "cost", lambda *a: objective_bytes.append(measure(*a)) or objective_bytes[-1])
    monkeypatch.setattr(budget, "available_bytes", lambda _: 40_000_000)
    with pytest.raises(SystemExit, match="^error: cpu: found 4096 windows at a time") as error:
        pretrain_in(tmp_path, shards, "--batch-size", 4096)
    (cost,) = objective_bytes
    fits = int(re.search(r"expected at most (\d+)", str(error.value))[1])
    assert cost.bytes(fits) <= 40_000_000 < cost.bytes(fits + 1)
    parts = int(re.search(r"--accumulate (\d+)", str(error.value))[1])
    pretrain_in(tmp_path, shards, "--batch-size", 4096, "--accumulate", parts, "--steps", 1)
    with pytest.raises(SystemExit, match="found 4096.*at most"):
        pretrain_in(tmp_path, shards, "--batch-size", 4096, "--accumulate", 1, "--resume", "never")


def test_the_cost_of_a_window_counts_its_matrix_products_and_what_is_kept(shards):
    """A window of 30 sites x 24 genes; width 16, one encoder layer with 32 hidden units, no decoder layer."""
    reader = Shards(shards / "train")
    facts = {"n_genes": 60, "m": 24, "h": 6, "w": 5, "width": 16, "depth": 1, "heads": 2, "feed_forward": 32}
    model = build(ModelConfig(**facts, decoder_depth=0, decoder_width=8, decoder_heads=2), reader.vocabulary, 0)
    objective = Objective(model, reader.index["target_sum"], ObjectiveConfig(0))
    costs = [budget.cost(objective, reader.read(np.arange(n), np.arange(n), 0)) for n in (1, 2)]
    S, m, d = 30, 24, 16
    layer = S * d * (3 * d + d + 2 * 32)
    products = S * m * d + layer + S * d * 8 * 2 + S * d * m
    once, backward = 2 * products, 2 * 2 * products - 2 * S * m * d  # no gradient goes to the values
    attention = 3 * 4 * S * S * d
    assert costs[0].flops == once + backward + attention
    assert costs[1].flops == 2 * costs[0].flops
    assert costs[1].kept == pytest.approx(2 * costs[0].kept, rel=0.05)
    assert costs[0].fixed == 4 * 4 * sum(p.numel() for p in model.parameters())
    assert costs[0].kept > 4 * S * (m + 10 * d)
    assert all(weight.grad is None for weight in model.parameters())


@pytest.mark.parametrize(("unit", "least", "most"), [("patch", 9e9, 11e9), ("spot", 5e9, 8.3e9)])
def test_the_papers_model_takes_about_ten_gflop_a_window(unit, least, most):
    """Forward and backward, attention included; a site alone has none, nor queries and keys."""
    mean = np.ones(600)
    vocabulary = Vocabulary([str(k) for k in range(600)], mean, mean, "")
    model = build(ModelConfig(n_genes=600, m=512, h=16, w=16, unit=unit), vocabulary, 0)
    counts, genes = torch.ones(1, 512, 16, 16).to(torch.uint16), torch.arange(512, dtype=torch.int32)[None]
    window = Batch(counts, genes, torch.full((1, 16, 16), 500.0), torch.zeros(1).long(), torch.tensor(0))
    assert least < budget.cost(Objective(model, 1e4, ObjectiveConfig(0)), window).flops < most


def test_the_batch_that_fits_is_told_beside_the_parts_there_are_already():
    """Also where the estimate said that all would fit, and the GPU had no memory left."""
    cost = budget.Cost(kept=1_000_000, fixed=0, flops=0)
    for available, fits, parts in ((14_000_000, 10, 10), (10**12, 39, 4)):
        error = budget.too_little(cost, 40, 2, available, torch.device("cpu"))
        assert f"expected at most {fits}, for" in str(error)
        assert f"--accumulate {2 * -(-40 // fits)} " in str(error)
        assert 2 * -(-40 // fits) == (8 if parts == 10 else parts)


def test_epochs_count_where_no_steps_are_given(shards, tmp_path):
    pretrain_in(tmp_path, shards, "--epochs", 1.5, "--batch-size", 64)  # 3 batches an epoch: 64, 64, 32
    last = lines(tmp_path, "train")[-1]
    assert (last["step"], last["samples"]) == (5, 160 + 128)


def test_flags_win_over_the_file_and_the_file_over_the_defaults(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("lr: 1e-3\nwidth: 64\nepochs: 3\n")
    model, _, train = config.settings(file, {"lr": "5e-4", "heads": None}, *SETTINGS)
    assert model == {"width": 64}
    assert train == {"lr": 5e-4, "epochs": 3.0}
    assert TrainConfig(**train).batch_size == 32


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("bach_size: 32", "unknown key 'bach_size'.*did you mean 'batch_size'"),
        ("steps: .inf", "key 'steps': found inf; expected a whole number"),
        ("steps: 1.5", "key 'steps': found 1.5; expected a whole number"),
        ("steps: true", "key 'steps': found True; expected a whole number"),
        ("lr: fast", "key 'lr': found 'fast'; expected a number"),
        ("optimizer: 3", "key 'optimizer': found 3; expected text"),
        ("- lr", "expected `knob: value` lines"),
        ("lr: [", "expected a YAML file"),
    ],
)
def test_a_wrong_setting_is_refused_and_named(tmp_path, text, message):
    file = tmp_path / "run.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=f"run.yaml.*{message}"):
        config.settings(file, {}, *SETTINGS)


@pytest.mark.parametrize(
    "wrong",
    [
        {"batch_size": 0}, {"optimizer": "sgd"}, {"lr": -1.0}, {"lr": math.nan}, {"workers": -2}, {"accumulate": 0},
        {"shuffle": "some"}, {"dtype": "float16"}, {"resume": "yes"}, {"compile": "true"}, {"log": "paper"}, {"keep": 0},
        {"beta1": 1.0}, {"beta2": -0.1}, {"beta2": math.nan}, {"epochs": math.inf}, {"epochs": math.nan},
        {"seed": 2**63}, {"seed": -1},
    ],
)  # fmt: skip
def test_a_setting_out_of_range_is_refused(wrong):
    name = next(iter(wrong))
    flag = name.replace("_", "-")
    with pytest.raises(ConfigError, match=f"found {name} .*; expected .*change --{flag}, or `{name}` in the config"):
        TrainConfig(**wrong)


def test_the_greatest_seed_works(shards, tmp_path):
    pretrain_in(tmp_path, shards, "--steps", 1, "--seed", 2**63 - 1)
    assert (tmp_path / "model.safetensors").exists()


def test_an_error_ends_the_command_with_one_readable_line(shards, tmp_path):
    with pytest.raises(SystemExit, match="^error: .*found steps -1; expected at least 0"):
        pretrain_in(tmp_path, shards, "--steps", -1)
    with pytest.raises(SystemExit, match="^error: .*nowhere/index.json"):
        pretrain.main(["--shards", str(tmp_path / "nowhere"), "--out", str(tmp_path / "out")])


@pytest.mark.parametrize("name", ["paper.yaml", "small.yaml", "gpu.yaml", "demo.yaml"])
def test_the_shipped_configs_are_valid(name):
    model, objective, train = config.settings(ROOT / "trainer/configs" / name, {}, *SETTINGS)
    ModelConfig(n_genes=1000, m=512, h=16, w=16, **model)
    ObjectiveConfig(0, **objective)
    TrainConfig(**train)


def test_the_papers_config_holds_the_papers_settings():
    model, objective, train = config.settings(ROOT / "trainer/configs/paper.yaml", {}, *SETTINGS)
    assert {"width": 256, "depth": 6, "heads": 8, "feed_forward": 1024, "decoder_depth": 2}.items() <= model.items()
    paper = {"optimizer": "adam", "lr": 1e-4, "beta1": 0.9, "beta2": 0.999, "weight_decay": 0.01, "epochs": 40.0}
    assert (paper | {"batch_size": 32}).items() <= train.items()
    assert objective == {"mask_ratio": 0.3}
    for cls, values in zip(SETTINGS, (model, objective, train), strict=True):  # and so do the defaults
        assert all(config.knobs(cls)[name].default == value for name, value in values.items())


def test_the_learning_rate_warms_up_and_falls_along_half_a_cosine():
    cfg = TrainConfig(steps=110, warmup=10, lr=1.0)
    rates = [learning_rate(step, cfg) for step in range(110)]
    assert np.allclose(rates[:11], np.arange(1, 12) / 11)
    assert rates[60] == pytest.approx(0.5)
    assert np.all(np.diff(rates[10:]) < 0)
    assert 0 < rates[-1] < 1e-3


def test_a_loss_that_is_not_finite_stops_the_run_and_leaves_no_model(shards, tmp_path):
    message = r"not finite in steps 2 to 20, learning rate .*e.29; expected finite .*--clip"
    with pytest.raises(SystemExit, match=message):
        pretrain_in(tmp_path, shards, "--steps", 30, "--lr", 1e30)
    assert [line["step"] for line in lines(tmp_path, "train")] == [1]
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("flags", [(), ("--val-every", 4), ("--log-every", 4)])
def test_one_gradient_that_is_not_finite_is_noticed_before_anything_is_told(shards, tmp_path, monkeypatch, flags):
    """Also where the loss itself, and all that follows, is finite."""
    norms = iter([1.0, 1.0, math.inf] + 10 * [1.0])
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda *_: torch.tensor(next(norms)))
    steps = "2 to 4" if flags else "2 to 7"
    with pytest.raises(SystemExit, match=f"not finite in steps {steps}"):
        pretrain_in(tmp_path, shards, "--steps", 7, *flags)
    assert [line["step"] for line in lines(tmp_path, "val")] == [0]
    assert not (tmp_path / "model.safetensors").exists()


def test_weights_that_the_last_step_made_infinite_are_not_written(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(
        pretrain, "train", lambda objective, *_: objective.model.narrow.weight.data.fill_(math.inf).any()
    )
    with pytest.raises(SystemExit, match="weights that are not finite after step"):
        pretrain_in(tmp_path, shards, "--steps", 3)
    assert not (tmp_path / "model.safetensors").exists()


def test_a_rerun_that_fails_leaves_no_older_model_behind(shards, tmp_path):
    pretrain_in(tmp_path, shards, "--steps", 1)
    assert (tmp_path / "model.safetensors").exists()
    with pytest.raises(SystemExit):
        pretrain_in(tmp_path, shards, "--steps", 30, "--lr", 1e30)
    assert not (tmp_path / "model.safetensors").exists()


def test_only_the_matrices_of_layers_decay(model_folder):
    model, _, _ = load(model_folder)
    decayed, rest = pretrain.make_optimizer(model, TrainConfig(weight_decay=0.1)).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    found = [{names[id(p)] for p in group["params"]} for group in (decayed, rest)]
    layers = [f"{part}.0.{layer}" for part in ("encoder", "decoder")
              for layer in ("query_key_value", "project", "feed_forward.0", "feed_forward.2")]  # fmt: skip
    assert found[0] == {f"{name}.weight" for name in (*layers, "narrow", "widen")}
    assert found[1] == set(names.values()) - found[0]
    assert {"gene_embedding.weight", "gene_bias.weight", "encoder_norm.weight", "narrow.bias"} < found[1]
    assert (decayed["weight_decay"], rest["weight_decay"]) == (0.1, 0)


def test_a_run_without_held_out_windows_says_so(shards, tmp_path):
    genes_tsv = (shards / "train" / "genes.tsv").read_bytes()
    empty = corpus.write_split(tmp_path / "val", "val", [], genes_tsv, 0, 24, 6, 5)
    out = pretrain_in(tmp_path / "out", shards, "--steps", 2, "--val-shards", empty)
    assert lines(out, "val") == []
    assert "There were none" in (out / "README.md").read_text()


def test_an_empty_training_split_is_refused(shards, tmp_path):
    genes_tsv = (shards / "train" / "genes.tsv").read_bytes()
    empty = corpus.write_split(tmp_path / "train", "train", [], genes_tsv, 0, 24, 6, 5)
    with pytest.raises(SystemExit, match="found no windows"):
        pretrain.main(["--shards", str(empty), "--out", str(tmp_path / "out")])


def test_a_device_that_is_not_there_is_refused():
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert pick_device("auto").type == "cpu"
    for name in ("cuda", "abacus"):
        with pytest.raises(ConfigError, match=f"found device {name}"):
            pick_device(name)


def test_a_model_folder_with_another_vocabulary_is_refused(model_folder, tmp_path):
    for file in model_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "genes.tsv").write_text((tmp_path / "genes.tsv").read_text().replace("G1\t", "G01\t"))
    with pytest.raises(ValueError, match="genes.tsv: found sha256 .*config.json"):
        load(tmp_path)


def test_an_unfinished_model_folder_is_refused(model_folder, tmp_path):
    with pytest.raises(ConfigError, match="expected a model folder"):
        load(tmp_path)
    for name in ("config.json", "genes.tsv"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    with pytest.raises(ConfigError, match="model.safetensors: found .*let the training finish"):
        load(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((model_folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(DamagedFile, match="model.safetensors: found"):
        load(tmp_path)


def test_safetensors_have_the_same_bytes_whatever_the_order_of_their_metadata():
    from safetensors.numpy import load as read

    tensors = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.arange(3, dtype=np.int32)}
    metadata = {str(i): str(i * i) for i in range(20)}
    written = {as_safetensors(tensors, metadata) for _ in range(5)}
    written.add(as_safetensors(dict(reversed(tensors.items())), dict(reversed(metadata.items()))))
    assert len(written) == 1
    back = read(written.pop())
    assert all(np.array_equal(back[name], tensors[name]) for name in tensors)


def test_every_knob_has_a_flag_and_a_line_of_help(capsys):
    with pytest.raises(SystemExit):
        pretrain.main(["--help"])
    text = capsys.readouterr().out
    for cls in SETTINGS:
        for field in dataclasses.fields(cls):
            if field.default is not dataclasses.MISSING:
                assert f"--{field.name.replace('_', '-')} X" in text
