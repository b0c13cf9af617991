"""How the ranks of a run are started: here, by torchrun, or by srun on the nodes of a SLURM job."""

from __future__ import annotations

import pytest

from trainer.errors import ConfigError
from trainer.launch import command

FLAGS = ["--shards", "a folder", "--out", "out"]
JOB = {"SLURM_JOB_ID": "1230007"}


def start(nodes: int, ranks: int, env=JOB) -> list[str]:
    return command(nodes, ranks, cpus=6, flags=FLAGS, python="/venv/python", host="node17", env=env)


def test_one_rank_is_the_trainer_itself():
    assert start(1, 1, env={}) == ["/venv/python", "-m", "trainer.pretrain", *FLAGS]


def test_several_ranks_on_one_machine_need_no_slurm():
    started = start(1, 4, env={})
    assert started[:4] == ["/venv/python", "-m", "torch.distributed.run", "--standalone"]
    assert started[started.index("--nproc-per-node") + 1] == "4"
    assert started[-len(FLAGS) - 2 :] == ["-m", "trainer.pretrain", *FLAGS]


def test_on_several_nodes_each_gets_one_torchrun_with_all_its_cpus():
    started = start(3, 2)
    assert started[0] == "srun"
    for flag, value in {"--nodes": "3", "--ntasks": "3", "--ntasks-per-node": "1", "--cpus-per-task": "6"}.items():
        assert started[started.index(flag) + 1] == value
    shell = started.index("sh")
    assert started[shell + 3] == "/venv/python"
    assert '--node-rank "$SLURM_NODEID"' in started[shell + 2]
    for flag, value in {"--nnodes": "3", "--nproc-per-node": "2", "--master-addr": "node17"}.items():
        assert started[started.index(flag) + 1] == value


def test_a_signal_of_the_scheduler_reaches_ranks_behind_torchrun():
    for nodes, ranks in ((1, 2), (2, 1)):
        started = start(nodes, ranks)
        assert {"SIGTERM", "SIGUSR1"} <= set(started[started.index("--signals-to-handle") + 1].split(","))


def test_two_jobs_on_one_node_meet_at_different_ports():
    ports = []
    for job in ("1230007", "1230008"):
        started = start(2, 1, env={"SLURM_JOB_ID": job})
        ports.append(int(started[started.index("--master-port") + 1]))
    assert ports[0] != ports[1]
    assert all(1024 < port < 32768 for port in ports)  # below those that systems hand out by themselves


def test_several_nodes_outside_of_a_slurm_job_are_refused_with_the_way_out():
    with pytest.raises(ConfigError, match="found 2; expected 1 outside of a SLURM job"):
        start(2, 1, env={})
