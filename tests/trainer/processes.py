"""Training runs in processes of their own, forked from one that has torch imported already: a start takes no seconds."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from pathlib import Path

import torch
import torch._dynamo  # optimizers import it, which takes seconds: once here, not in every run

from trainer import pretrain

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.trainer.processes"])
PATIENCE_S = 150  # on a busy machine


def _run(argv: list[str], environment: dict[str, str], log: Path, act: str) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))
    if act:
        what, _, step = act.partition(":")
        rate = pretrain.learning_rate

        def learning_rate(done: int, cfg: pretrain.TrainConfig) -> float:
            if done == int(step):
                if what == "raise":
                    raise RuntimeError("this rank's own trouble")
                os.kill(os.getpid(), getattr(signal, what))
            return rate(done, cfg)

        pretrain.learning_rate = learning_rate
    pretrain.main(argv)


class Job:
    """A run of ``python -m trainer.pretrain`` with these flags, in as many ranks as wanted, as torchrun would start them.

    ``acts`` says what befalls a rank at a step: ``{1: "SIGTERM:5"}`` or ``{1: "raise:5"}``.
    """

    def __init__(self, argv: list, log: Path, ranks: int = 1, acts: dict[int, str] | None = None) -> None:
        self.log, self.processes = log, []
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        for rank in range(ranks):
            environment = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            arguments = (
                [str(word) for word in argv],
                {name: str(value) for name, value in environment.items()},
                log.with_suffix(f".{rank}"),
                (acts or {}).get(rank, ""),
            )
            process = SERVER.Process(target=_run, args=arguments)
            process.start()
            self.processes.append(process)

    def codes(self) -> list[int]:
        """Exit codes of all ranks; fails where one has not ended in time."""
        end = time.monotonic() + PATIENCE_S
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in self.processes]
        if None in codes:
            self.kill()
            raise AssertionError(f"ranks hang: {codes}; {self.said()}")
        return codes

    def kill(self) -> None:
        """kill -9 of every rank."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def said(self) -> str:
        return "".join(self.log.with_suffix(f".{rank}").read_text() for rank in range(len(self.processes)))
