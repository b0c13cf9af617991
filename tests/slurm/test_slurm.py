"""The profile for SLURM on a real cluster of two nodes: the demo's corpus, jobs that fail, and a preempted training run."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import run
from tests.slurm.conftest import PROFILE, QUICK, Run, profile, table

pytestmark = pytest.mark.slurm

DEMO = ("--configfile", ROOT / "demo/config.yaml")
# Small enough to be over in a minute, with enough steps to be interrupted.
TRAINING = {
    "config": str(ROOT / "trainer/configs/demo.yaml"),
    **{"width": 32, "heads": 2, "feed_forward": 64, "decoder_width": 32, "decoder_heads": 2},
    **{"batch_size": 4, "steps": 80, "val_every": 1000, "val_samples": 8, "snapshot_every": 20, "log_every": 5},
}


@pytest.fixture(scope="module", autouse=True)
def environment():
    """One thread a process, and ranks that find each other on loopback; jobs take their environment from here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("GLOO_SOCKET_IFNAME", "lo")
        yield


@pytest.fixture(scope="module")
def corpora(cluster, tmp_path_factory):
    """The demo's corpus built here and on the cluster: the two folders, the seconds each took, the cluster's jobs."""
    folder = tmp_path_factory.mktemp("corpora")
    here = Run(folder / "here", "--cores", 2, *DEMO, "--", "data").wait(400)
    there = Run(folder / "there", "--profile", PROFILE.parent, *QUICK, *DEMO, "--", "data").wait(600)
    return folder / "here", folder / "there", here, there, cluster.jobs()


def digests(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_corpus_built_on_the_cluster_is_the_local_one_byte_for_byte(corpora, capsys):
    here, there, seconds_here, seconds_there, jobs = corpora
    shards = digests(here / "results/shards")
    assert any(name.endswith(".tar") for name in shards)
    assert digests(there / "results/shards") == shards
    with capsys.disabled():
        print(f"\nThe demo's corpus: {seconds_here:.0f} s here on two cores, {seconds_there:.0f} s through SLURM:")
        print(table(jobs))


def test_slices_share_jobs_and_small_tables_need_none(corpora):
    jobs = [job["Comment"] for job in corpora[-1]]
    log = (corpora[1] / "snakemake.log").read_text()
    steps = int(re.findall(r"(\d+) of \d+ steps \(100%\) done", log)[-1])
    assert 0 < len(jobs) < steps / 3
    assert sum("curate" in job for job in jobs) == 1  # of seven slices
    assert not any("dataset_card" in job for job in jobs)
    assert {job["JobState"] for job in corpora[-1]} == {"COMPLETED"}


FAULTS = """
rule all:
    input: "hungry.txt", "slow.txt"

rule hungry:
    output: "hungry.txt"
    resources: mem_mb=lambda wildcards, attempt: 700 * attempt
    shell: "{python} -c 'import time; held = bytearray(800_000_000); time.sleep(5)'; echo {{resources.mem_mb}} > {{output}}"

rule slow:
    output: "slow.txt"
    params: wait=lambda wildcards, resources: 300 if resources.trial == 1 else 0
    resources: trial=lambda wildcards, attempt: attempt
    shell: "sleep {{params.wait}}; echo {{resources.trial}} > {{output}}"
"""


@pytest.fixture(scope="module")
def faults(cluster, tmp_path_factory):
    """A run in which SLURM kills one job for its memory and a person cancels another: its folder, the jobs by rule."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "Snakefile").write_text(FAULTS.format(python=sys.executable))
    before = {job["JobId"] for job in cluster.jobs()}
    here = Run(folder, "--profile", PROFILE.parent, *QUICK, snakefile=folder / "Snakefile")

    def running():
        return [job for job in cluster.jobs() if job["Comment"] == "rule_slow" and job["JobState"] == "RUNNING"]

    run("scancel", here.until(running, 90)[0]["JobId"])
    here.wait(240)
    jobs = [job for job in cluster.jobs() if job["JobId"] not in before]
    return folder, {rule: [job for job in jobs if job["Comment"] == f"rule_{rule}"] for rule in ("hungry", "slow")}


def test_a_job_killed_for_its_memory_is_run_again_with_more(faults):
    folder, jobs = faults
    assert [job["MinMemoryNode"] for job in jobs["hungry"]] == ["700M", "1400M"]
    assert jobs["hungry"][0]["JobState"] not in ("COMPLETED", "RUNNING")
    assert (folder / "hungry.txt").read_text() == "1400\n"


def test_a_job_that_someone_cancels_is_run_again(faults):
    folder, jobs = faults
    assert [job["JobState"] for job in jobs["slow"]] == ["CANCELLED", "COMPLETED"]
    assert (folder / "slow.txt").read_text() == "2\n"


def test_training_on_two_nodes_survives_a_preemption_with_the_same_weights(cluster, corpora, tmp_path, capsys):
    there = corpora[1]
    (there / "training.yaml").write_text(json.dumps({"pretrain": TRAINING}))
    two_nodes = profile(tmp_path / "two", nodes=2, gpus=1, cpus=2, memory_gb=4)
    log, before = there / "results/logs/pretrain/model.log", {job["JobId"] for job in cluster.jobs()}
    here = Run(there, "--profile", two_nodes, *QUICK, *DEMO, "training.yaml", "--", "pretrain")

    here.until(lambda: log.exists() and "step 10/" in log.read_text(), 180)
    urgent = ("--partition", "urgent", "--nodes", "2", "--exclusive", "--output", os.devnull, "--wrap", "sleep 3")
    run("sbatch", "--comment", "urgent", *urgent)
    stopped = here.until(lambda: re.search(r"asked to stop: saved step (\d+)", log.read_text()), 60)
    assert 10 <= int(stopped[1]) < TRAINING["steps"]
    here.wait(300)
    assert f"going on after step {stopped[1]}," in log.read_text()
    jobs = [job for job in cluster.jobs() if job["JobId"] not in before]
    training = [job for job in jobs if job["Comment"] == "rule_pretrain"]
    assert {job["NumNodes"] for job in training} == {"2"}
    assert training[-1]["JobState"] == "COMPLETED"
    assert len(training) == 2 or training[0]["Restarts"] == "1"  # submitted again, or started again by SLURM

    flags = [f"--{name.replace('_', '-')}={value}" for name, value in TRAINING.items()]
    shards = ("--shards", there / "results/shards/train", "--val-shards", there / "results/shards/val")
    # Undisturbed, on one machine: two ranks of two threads each, as on the two nodes.
    launch = [sys.executable, "-m", "trainer.launch", "--ranks", 2, "--cpus", 4, "--"]
    launch += [*shards, "--out", tmp_path / "alone", *flags]
    subprocess.run(list(map(str, launch)), cwd=ROOT, check=True, capture_output=True, timeout=200)
    weights = (there / "results/pretrain/model/model.safetensors").read_bytes()
    assert weights == (tmp_path / "alone/model.safetensors").read_bytes()
    with capsys.disabled():
        print(f"\nTraining on two nodes, preempted after step {stopped[1]} of 80:")
        print(table(jobs))
