"""A run that is interrupted, killed, damaged or moved goes on as if it had not been."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.trainer import corpus
from tests.trainer.conftest import FIXED
from tests.trainer.processes import Job
from trainer import pretrain, snapshots
from trainer.errors import DamagedSnapshot
from trainer.files import sha256
from trainer.snapshots import Snapshots

TINY = "--width 16 --depth 1 --heads 2 --feed-forward 16 --decoder-width 8 --decoder-depth 1 --decoder-heads 2".split()
FLAGS = "--device cpu --steps 12 --batch-size 48 --lr 1e-3 --val-every 6 --log-every 5".split()
# 160 windows make epochs of 4 steps, the last of 16 windows.
VARIANTS = {
    "plain": [],
    "by components": [*FIXED, *"--mask-ratio 0 --mask-genes 0.4 --mask-sites 0.2".split()],
    "fixed, streamed": [*FIXED, *"--mask-genes 0.2 --reader webdataset".split()],
}


def pretrain_in(out, shards, *flags):
    pretrain.main(["--shards", str(shards / "train"), "--out", str(out), *TINY, *FLAGS, *map(str, flags)])


def metrics(out, *leave_out):
    """The lines, without what depends on the clock."""
    clock = {"patches_per_s", "data_wait", "seconds", "peak_memory_mb"}
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


@pytest.fixture(scope="module")
def wholes(fixed_shards, tmp_path_factory):
    """Runs that nobody interrupted, of each variant, made when asked for."""
    made = {}

    def make(variant: str):
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp("whole")
            pretrain_in(made[variant], fixed_shards, *VARIANTS[variant])
        return made[variant]

    return make


@pytest.fixture(scope="module")
def whole(shards, tmp_path_factory):
    """The plain run that nobody interrupted, on shards without components and means."""
    out = tmp_path_factory.mktemp("whole")
    pretrain_in(out, shards)
    return out


@pytest.fixture
def signal_at(monkeypatch):
    """Sends this process a signal while the step after ``done`` steps runs."""

    def at(done, number=signal.SIGTERM):
        rate = pretrain.learning_rate

        def learning_rate(step, cfg):
            if step == done:
                os.kill(os.getpid(), number)
            return rate(step, cfg)

        monkeypatch.setattr(pretrain, "learning_rate", learning_rate)

    return at


def stop_after(out, shards, signal_at, step, number=signal.SIGTERM, flags=()):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "learning_rate", pretrain.learning_rate)
        signal_at(step - 1, number)
        with pytest.raises(SystemExit) as ended:
            pretrain_in(out, shards, *flags)
    assert ended.value.code == 75
    assert not (out / "model.safetensors").exists()
    assert Snapshots(out / "snapshots", 1).steps()[-1] == step


STOPS = {
    "first step": [1], "mid-epoch": [2], "before an epoch's last batch": [3], "epoch boundary": [4], "after it": [5],
    "validation": [6], "last but one": [11], "twice in a row": [3, 4], "three in a row": [1, 2, 3], "two boundaries": [4, 8],
}  # fmt: skip


@pytest.mark.parametrize(
    ("variant", "stops"),
    [*(("plain", stops) for stops in STOPS.values()), ("by components", [3, 4]), ("fixed, streamed", [5])],
    ids=[*STOPS, "by components", "fixed, streamed"],
)
def test_a_run_stopped_by_a_signal_ends_at_the_same_bytes_and_lines(
    wholes, fixed_shards, tmp_path, signal_at, variant, stops
):
    whole, flags = wholes(variant), VARIANTS[variant]
    for step in stops:
        stop_after(tmp_path, fixed_shards, signal_at, step, flags=flags)
    pretrain_in(tmp_path, fixed_shards, *flags)
    assert sha256(tmp_path / "model.safetensors") == sha256(whole / "model.safetensors")
    assert metrics(tmp_path) == metrics(whole)
    assert [entry["step"] for entry in json.loads((tmp_path / "config.json").read_text())["run"]["resumed"]] == stops
    assert not (tmp_path / "snapshots").exists()


def test_means_of_other_slices_than_the_snapshots_are_refused(fixed_shards, tmp_path, signal_at):
    flags = VARIANTS["by components"]
    stop_after(tmp_path / "out", fixed_shards, signal_at, 3, flags=flags)
    other = shutil.copytree(fixed_shards, tmp_path / "shards")
    means = load_file(other / "train/means.safetensors")["means"]
    corpus.add_part(other / "train", "means", {"means": means + 1})
    with pytest.raises(SystemExit, match="means"):
        pretrain_in(tmp_path / "out", other, *flags)


def test_a_run_interrupted_before_its_first_step_starts_over(whole, shards, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(pretrain, "learning_rate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            pretrain_in(tmp_path, shards)
    pretrain_in(tmp_path, shards)
    assert sha256(tmp_path / "model.safetensors") == sha256(whole / "model.safetensors")
    assert metrics(tmp_path) == metrics(whole)


def test_sigusr1_saves_too_and_other_handlers_are_left_as_they_were(shards, tmp_path, signal_at):
    before = signal.getsignal(signal.SIGUSR1)
    stop_after(tmp_path, shards, signal_at, 2, signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_signal_in_the_last_step_lets_the_run_finish(whole, shards, tmp_path, signal_at):
    signal_at(11)
    pretrain_in(tmp_path, shards)
    assert sha256(tmp_path / "model.safetensors") == sha256(whole / "model.safetensors")


def test_workers_accumulation_and_logging_may_change_on_the_way(whole, shards, tmp_path, signal_at):
    stop_after(tmp_path, shards, signal_at, 3, flags=("--workers", 0))
    stop_after(tmp_path, shards, signal_at, 7, flags=("--workers", 2))
    pretrain_in(tmp_path, shards, "--workers", 1, "--log-every", 1)
    assert sha256(tmp_path / "model.safetensors") == sha256(whole / "model.safetensors")


def test_accumulation_gives_the_same_model_but_for_rounding(whole, shards, tmp_path):
    pretrain_in(tmp_path, shards, "--accumulate", 3)
    mine, theirs = load_file(tmp_path / "model.safetensors"), load_file(whole / "model.safetensors")
    for name in mine:
        if not name.endswith("query_key_value.bias"):  # a key's bias has no effect: its gradient is rounding alone
            np.testing.assert_allclose(mine[name], theirs[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--steps", 13), r"train.steps 12; expected train.steps 13"),
        (
            ("--lr", 2e-3, "--mask-ratio", 0.4),
            r"objective.mask_ratio 0.3, train.lr 0.001; expected .* 0.4, train.lr 0.002",
        ),
        (("--width", 32), "model.width 16; expected model.width 32"),
        (("--shuffle", "block"), "train.shuffle 'full'; expected train.shuffle 'block'"),
    ],
)
def test_other_settings_than_the_snapshots_are_refused_and_named(shards, tmp_path, signal_at, flags, named):
    stop_after(tmp_path, shards, signal_at, 2)
    with pytest.raises(SystemExit, match=f"00000002.safetensors: found {named}.*--resume never"):
        pretrain_in(tmp_path, shards, *flags)
    assert Snapshots(tmp_path / "snapshots", 1).steps() == [2]
    pretrain_in(tmp_path, shards, *flags, "--resume", "never")
    assert (tmp_path / "model.safetensors").exists()


def test_other_shards_than_the_snapshots_are_refused_and_named(shards, tmp_path, signal_at):
    stop_after(tmp_path, shards, signal_at, 2)
    command = ["--shards", str(shards / "train"), "--val-shards", str(shards / "train"), "--out", str(tmp_path)]
    with pytest.raises(SystemExit, match="found held_out.samples '.*expected held_out.samples '"):
        pretrain.main([*command, *TINY, *FLAGS])


def test_of_a_damaged_snapshot_the_run_says_so_and_goes_on_from_the_one_before(
    whole, shards, tmp_path, signal_at, capsys
):
    stop_after(tmp_path, shards, signal_at, 3)
    stop_after(tmp_path, shards, signal_at, 7)
    file = tmp_path / "snapshots" / "00000007.safetensors"
    content = bytearray(file.read_bytes())
    content[-5] ^= 1
    file.write_bytes(content)
    pretrain_in(tmp_path, shards)
    assert "warning: " in (said := capsys.readouterr().err)
    assert "00000007.safetensors: found content that does not hash" in said
    assert sha256(tmp_path / "model.safetensors") == sha256(whole / "model.safetensors")
    resumed = json.loads((tmp_path / "config.json").read_text())["run"]["resumed"]
    assert resumed == [
        {"step": 3, "ranks": 1, "damaged": []},
        {"step": 6, "ranks": 1, "damaged": ["00000007.safetensors"]},  # of the validation there
    ]


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_without_a_whole_snapshot_the_run_stops_and_says_what_to_do(shards, tmp_path, signal_at, size):
    stop_after(tmp_path, shards, signal_at, 3)
    file = tmp_path / "snapshots" / "00000003.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(
        SystemExit, match="found .*00000003.*damaged; expected a whole one. Next step: remove the folder"
    ):
        pretrain_in(tmp_path, shards)


def test_the_last_snapshots_and_the_best_are_kept(shards, tmp_path, monkeypatch):
    """The lowest held-out error comes first here, and stays."""
    errors = iter([1.0, 0.1, *[0.5] * 10])
    scores = {"gene_mean_mse": 1.0, "n_windows": 1}
    monkeypatch.setattr(pretrain, "validate", lambda *_: {"masked_mse": next(errors), **scores})
    kept = []
    save = Snapshots.save
    monkeypatch.setattr(Snapshots, "save", lambda self, *a: (save(self, *a), kept.append(self.steps())))
    pretrain_in(tmp_path, shards, "--val-every", 2, "--snapshot-every", 3, "--keep", 2)
    assert kept == [[2], [2, 3], [2, 3, 6], [2, 6, 9]]
    assert not (tmp_path / "snapshots").exists()
    best = load_file(tmp_path / "best.safetensors")
    assert best.keys() == load_file(tmp_path / "model.safetensors").keys()


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_damaged_snapshot_of_the_best_weights_does_not_keep_the_run_from_its_end(
    shards, tmp_path, monkeypatch, capsys, damage
):
    errors = iter([1.0, 0.1, *[0.5] * 10])
    monkeypatch.setattr(
        pretrain, "validate", lambda *_: {"masked_mse": next(errors), "gene_mean_mse": 1.0, "n_windows": 1}
    )
    save = Snapshots.save

    def save_and_damage(self, *content):
        save(self, *content)
        if self.steps()[-1] > 2:
            self.file(2).unlink(missing_ok=True) if damage == "gone" else self.file(2).write_bytes(b"half")

    monkeypatch.setattr(Snapshots, "save", save_and_damage)
    pretrain_in(tmp_path, shards, "--val-every", 2, "--snapshot-every", 3)
    assert (tmp_path / "model.safetensors").exists()
    assert not (tmp_path / "best.safetensors").exists()
    assert "00000002.safetensors" in capsys.readouterr().err


def test_what_a_kill_left_of_a_snapshot_goes_with_the_others(shards, tmp_path):
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "00000007.safetensors.part").write_bytes(b"half")
    pretrain_in(tmp_path, shards)
    assert not (tmp_path / "snapshots").exists()


def test_a_model_whose_last_validation_is_its_best_has_no_other(whole):
    assert not (whole / "best.safetensors").exists()


def test_a_snapshot_holds_no_pickle_and_all_that_was_put_in(tmp_path):
    state, tensors = {"step": 5, "best": None, "x": [0.1, 2]}, {"a": np.arange(3.0), "b": np.array(7, np.float32)}
    content = snapshots.pack(state, tensors)
    back, arrays = snapshots.unpack(content, tmp_path)
    assert back == state
    assert all(np.array_equal(arrays[name], tensors[name]) for name in tensors)
    assert content[8:9] == b"{"


@pytest.mark.parametrize("metadata", ["{}", "[]", '{"sha256": "", "state": "{}"}', "[" * 100_000])
def test_what_is_no_snapshot_is_called_damaged(tmp_path, metadata):
    header = f'{{"__metadata__": {metadata}}}'.encode()
    with pytest.raises(DamagedSnapshot, match="found .*expected a whole snapshot"):
        snapshots.unpack(len(header).to_bytes(8, "little") + header, tmp_path)


def test_twenty_random_kills_end_at_the_same_weights(shards, tmp_path):
    """kill -9 at random moments, snapshots being written among them."""
    flags = [
        *TINY,
        *FLAGS,
        "--steps",
        120,
        "--batch-size",
        8,
        "--log-every",
        1,
        "--snapshot-every",
        2,
        "--val-every",
        50,
    ]
    command = ["--shards", shards / "train", *flags, "--out"]
    undisturbed = Job([*command, tmp_path / "whole"], tmp_path / "whole.log")
    assert undisturbed.codes() == [0], undisturbed.said()

    rng, out = random.Random(0), tmp_path / "out"
    reached = []
    for _ in range(20):
        job = Job([*command, out], tmp_path / "log")
        start = max(Snapshots(out / "snapshots", 1).steps(), default=0)
        until, end = start + rng.randint(1, 5), time.monotonic() + 30
        while last_step(out) < until and job.processes[0].is_alive() and time.monotonic() < end:
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.01))
        job.kill()
        assert job.processes[0].exitcode == -signal.SIGKILL, job.said()
        reached.append(last_step(out))
    assert reached[-1] < 90
    assert Job([*command, out], tmp_path / "log").codes() == [0]
    assert sha256(out / "model.safetensors") == sha256(tmp_path / "whole" / "model.safetensors")
    assert metrics(out) == metrics(tmp_path / "whole")


def last_step(out):
    lines = (out / "metrics.jsonl").read_bytes().splitlines() if (out / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines and lines[-1].endswith(b"}") else 0
