"""Several ranks train the model that one does, change their number on the way, and end together."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.conftest import ROOT
from tests.trainer.conftest import SMALL
from tests.trainer.processes import Job
from tests.trainer.test_hostile_shards import copy_of, overwrite
from trainer import pretrain
from trainer.data import Order, Shards
from trainer.ranks import Ranks, Sums
from trainer.snapshots import Snapshots

FLAGS = "--steps 9 --batch-size 48 --lr 1e-3 --val-every 5 --log-every 1 --optimizer adamw --clip 1".split()
# 160 windows make epochs of 4 steps, the last of 16 windows.


def command(shards, out, *flags):
    return ["--shards", str(shards / "train"), "--out", str(out), *SMALL, *FLAGS, *map(str, flags)]


def torchrun(ranks, argv):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [*words, "-m", "trainer.pretrain", *argv], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def lines(out, kind):
    return [line for line in map(json.loads, (out / "metrics.jsonl").read_text().splitlines()) if line["kind"] == kind]


def assert_same_but_for_rounding(mine: Path, theirs: Path):
    """Weights and all losses, to 1e-5."""
    mine_, theirs_ = load_file(mine / "model.safetensors"), load_file(theirs / "model.safetensors")
    for name in theirs_:
        if name.endswith(
            "query_key_value.bias"
        ):  # a key's bias has no effect: its gradient is rounding, which Adam blows up
            mine_[name], theirs_[name] = (np.delete(w[name].reshape(3, -1), 1, 0) for w in (mine_, theirs_))
        np.testing.assert_allclose(mine_[name], theirs_[name], atol=1e-5, err_msg=name)
    for kind, key in (("train", "loss"), ("val", "masked_mse"), ("val", "gene_mean_mse")):
        found, expected = ([(line["step"], line[key]) for line in lines(out, kind)] for out in (mine, theirs))
        np.testing.assert_allclose(found, expected, rtol=1e-5)


@pytest.fixture(scope="module")
def single(shards, tmp_path_factory):
    """The run of one rank."""
    out = tmp_path_factory.mktemp("single")
    pretrain.main(command(shards, out))
    return out


@pytest.mark.parametrize("shuffle", ["full", "block"])
def test_ranks_and_workers_may_change_on_the_way_and_every_sample_is_seen_once_an_epoch(shards, shuffle):
    reader, n, batch_size, seen, consumed = Shards(shards / "train"), 160, 24, [], 0
    for ranks, workers, steps in ((1, 0, 3), (2, 1, 6), (4, 2, 9), (1, 1, 4), (3, 0, 6)):  # 7 steps an epoch
        shares = []
        for rank in range(ranks):
            order = Order(batch_size, 5, shuffle, 2, rank, ranks)
            for batch in islice(reader.batches(order, consumed, workers), steps):
                rows = order.rows(reader.samples["shard"], len(reader.names), int(batch.epoch))
                shares += [(int(batch.epoch), int(row)) for row in rows[batch.positions.numpy()]]
        seen += shares
        for _ in range(steps):
            consumed = order.after(n, consumed)
    assert consumed == 4 * n == len(seen)
    assert Counter(seen) == Counter((epoch, row) for epoch in range(4) for row in range(n))


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("accumulate", [1, 2, 4])
def test_the_shares_of_a_global_batch_make_it_up_whatever_its_size(ranks, accumulate):
    for size in (1, 2, 7, 24):
        parts = [
            part
            for rank in range(ranks)
            for part in Order(24, 0, rank=rank, ranks=ranks, accumulate=accumulate).share(np.arange(100, 100 + size))
        ]
        assert len(parts) == ranks * accumulate
        assert sorted(np.concatenate(parts)) == [*range(100, 100 + size)]


def test_two_ranks_train_the_model_of_one_and_only_the_first_writes(shards, single, tmp_path):
    job = torchrun(2, command(shards, tmp_path))
    said, _ = job.communicate(timeout=180)
    assert job.returncode == 0, said
    assert_same_but_for_rounding(tmp_path, single)
    assert said.count("wrote ") == 1
    assert json.loads((tmp_path / "config.json").read_text())["run"]["ranks"] == 2


def test_a_run_goes_on_with_other_numbers_of_ranks(shards, single, tmp_path):
    """One, two, four, one; the signal reaches one rank, which need not be the first. Some hold no sample of a last batch."""
    out, at = tmp_path / "out", 0
    for ranks, told, signalled, stop in (
        (1, 0, 1, 2),
        (2, 1, 2, 4),
        (4, 3, 5, 7),
    ):  # others hear of it in their next message
        job = Job(command(shards, out), tmp_path / f"log{ranks}", ranks, {told: f"SIGTERM:{signalled}"})
        assert job.codes() == [75] * ranks, job.said()
        at = Snapshots(out / "snapshots", 1).steps()[-1]
        assert at == stop
    job = Job(command(shards, out), tmp_path / "log")
    assert job.codes() == [0], job.said()
    assert_same_but_for_rounding(out, single)
    resumed = json.loads((out / "config.json").read_text())["run"]["resumed"]
    assert [(entry["step"], entry["ranks"]) for entry in resumed] == [(2, 2), (4, 4), (7, 1)]


def test_a_rank_without_a_sample_of_the_last_batch_joins_all_the_same(shards, tmp_path):
    flags = ("--batch-size", 53, "--steps", 5, "--val-samples", 1)  # the fourth batch of an epoch holds one window
    pretrain.main(command(shards, tmp_path / "one", *flags))
    job = Job(command(shards, tmp_path / "three", *flags), tmp_path / "log", ranks=3)
    assert job.codes() == [0, 0, 0], job.said()
    assert_same_but_for_rounding(tmp_path / "three", tmp_path / "one")


def test_a_rank_that_fails_ends_the_others_with_its_error(shards, tmp_path):
    job = Job(command(shards, tmp_path / "out"), tmp_path / "log", 2, {1: "raise:3"})
    assert job.codes() == [1, 1]
    assert "this rank's own trouble" in (tmp_path / "log.1").read_text()
    assert "error: rank 0: found " in (tmp_path / "log.0").read_text()
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_a_killed_rank_ends_the_job_and_a_rerun_goes_on(shards, single, tmp_path):
    """kill -9 of the second rank under torchrun."""
    job = torchrun(2, command(shards, tmp_path, "--steps", 100000, "--snapshot-every", 10))
    end = time.monotonic() + 150
    while not Snapshots(tmp_path / "snapshots", 1).steps() and time.monotonic() < end:
        time.sleep(0.05)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children").read_text().split()
    second = [pid for pid in children if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()]
    os.kill(int(second[0]), signal.SIGKILL)
    said, _ = job.communicate(timeout=150)
    assert job.returncode != 0
    assert re.search(r"exitcode\s*: -9", said)
    with pytest.raises(SystemExit, match="train.steps 100000"):  # the snapshot is there, of that run
        pretrain.main(command(shards, tmp_path))


def test_a_damaged_sample_that_one_rank_reads_is_named_and_ends_the_job(shards, tmp_path):
    folder = copy_of(shards, tmp_path)
    reader = Shards(folder)
    row = int(Order(48, 0).rows(reader.samples["shard"], len(reader.names), 0)[1])  # position 1: the second rank's
    overwrite(reader, row, "counts", 4, b"\xff")
    argv = ["--shards", folder, "--out", tmp_path / "out", *SMALL, *FLAGS, "--check-tars", "off"]
    job = Job(argv, tmp_path / "log", ranks=2)
    assert job.codes() == [1, 1]
    assert f"sample {row}: found a Blosc buffer" in (tmp_path / "log.1").read_text()


def test_gradients_and_sums_share_one_buffer_that_is_divided_by_the_global_count():
    weights = [torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(2, 2))]
    sums = Sums(weights, Ranks(torch.device("cpu")))
    ((weights[0] * 2).sum() + (weights[1] * 3).sum()).backward()
    sums.loss += torch.tensor([8.0, 4.0])
    sums.over_ranks(stop=False)
    assert torch.equal(weights[0].grad, torch.full((3,), 0.5))
    assert torch.equal(weights[1].grad, torch.full((2, 2), 0.75))
    assert sums.gradients.data_ptr() == weights[0].grad.data_ptr()
