"""The ranks of a run, started by torchrun: gloo between CPUs, nccl between GPUs; without torchrun one rank, and no group.

Gradients are summed in one message by hand. DistributedDataParallel would average over ranks (the loss divides by the number
of hidden entries of the global batch, which only the sum knows), wait for ranks that hold no sample of an epoch's last batch,
and group its messages in an order of its own; the model is small enough that overlapping them with the backward pass gains
little.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import signal
from collections.abc import Iterable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.errors import ConfigError, RankLost

PATIENCE = datetime.timedelta(minutes=10)  # a rank that waits longer for the others gives up
PREEMPTED = 75  # exit code of a run that was asked to stop and has saved a snapshot: try again (EX_TEMPFAIL)


@dataclasses.dataclass(frozen=True)
class Ranks:
    device: torch.device
    rank: int = 0
    number: int = 1
    here: int = 1  # ranks on this machine

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def name(self) -> str:
        """What computes, as people call it."""
        return torch.cuda.get_device_name(self.device) if self.on_gpu else str(self.device)

    @property
    def first(self) -> bool:
        """Whether this rank writes and prints; the others only count."""
        return self.rank == 0

    def add(self, tensor: Tensor) -> None:
        """Sum a tensor over all ranks, in place. A rank that is lost ends the others here."""
        if self.number > 1:
            with self._or_lost():
                there = tensor.to(self.device)
                dist.all_reduce(there)
                tensor.copy_(there)

    def share(self, content: bytes) -> bytes:
        """The first rank's bytes, on all ranks."""
        if self.number == 1:
            return content
        with self._or_lost():
            size = torch.tensor([len(content)], device=self.device)
            dist.broadcast(size, 0)
            data = torch.zeros(int(size) + 1, dtype=torch.uint8)  # one more, since no message may be empty
            if self.first:
                data[:-1] = torch.from_numpy(np.frombuffer(content, np.uint8).copy())
            data = data.to(self.device)
            dist.broadcast(data, 0)
        return data[:-1].cpu().numpy().tobytes()

    @contextlib.contextmanager
    def _or_lost(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            raise RankLost(f"rank {self.rank}", " ".join(str(error).split())[:200], "all ranks") from error


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """This process among those that torchrun started; ``device`` as the flag has it."""
    rank, number, local, here = (
        int(os.environ.get(name, default))
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1))
    )
    chosen = pick_device(device)
    if number == 1:
        yield Ranks(chosen)
        return
    if chosen.type == "cuda":
        if chosen.index is not None or local >= torch.cuda.device_count():
            expected = f"one of {torch.cuda.device_count()} GPUs a rank"
            next_step = "leave --device to itself, or lower --nproc-per-node"
            raise ConfigError("torchrun", f"device {device} for rank {local} here", expected, next_step)
        chosen = torch.device("cuda", local)
        torch.cuda.set_device(chosen)
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=PATIENCE)
    yield Ranks(chosen, rank, number, here)
    dist.destroy_process_group()  # not after an error: it would wait for ranks that wait for this one


def pick_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is the first GPU if there is one."""
    try:
        device = torch.device({"auto": "cuda" if torch.cuda.is_available() else "cpu"}.get(name, name))
        if device.type == "cuda" and not torch.cuda.is_available():
            raise RuntimeError
    except RuntimeError:
        expected = "auto, or a device that this machine has: cpu" + ", cuda or cuda:N" * torch.cuda.is_available()
        next_step = "change --device, or `device` in the config file"
        raise ConfigError("settings", f"device {name}", expected, next_step) from None
    return device


class Asked:
    """Whether SIGTERM or SIGUSR1 (a scheduler's preemption) has come, while it is open."""

    def __enter__(self) -> Asked:
        self.to_stop = False
        self.before = {number: signal.signal(number, self._note) for number in (signal.SIGTERM, signal.SIGUSR1)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, *_: object) -> None:
        self.to_stop = True


class Sums:
    """All gradients in one buffer, and behind them the loss, the number of its entries, and whether to stop.

    The parameters' ``grad`` are views of it: a backward pass adds to it in place, and one message sums it over the ranks.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], ranks: Ranks) -> None:
        self.ranks, parameters = ranks, [p for p in parameters if p.requires_grad]
        ends = torch.tensor([-(-p.numel() // 64) * 64 for p in parameters]).cumsum(0).tolist()  # aligned
        self.buffer = torch.zeros(ends[-1] + 3, device=ranks.device)
        self.gradients, self.loss, self.stop = self.buffer.split([ends[-1], 2, 1])
        for parameter, begin in zip(parameters, [0, *ends], strict=False):
            parameter.grad = self.buffer[begin : begin + parameter.numel()].view_as(parameter)

    def over_ranks(self, stop: bool) -> None:
        """Sum over the ranks, then divide the gradients by the number of hidden entries of the global batch."""
        if stop:
            self.stop.fill_(1)
        self.ranks.add(self.buffer)
        self.gradients.div_(self.loss[1].clamp(min=1))

    def clip(self, largest: float) -> Tensor:
        """Scale the gradients so that their norm is at most this (0: any); whether loss and gradients are finite, bool []."""
        norm = torch.linalg.vector_norm(self.gradients)
        if largest:
            self.gradients.mul_((largest / (norm + 1e-6)).clamp(max=1))
        return norm.isfinite() & self.loss.isfinite().all()

    def asked_to_stop(self, asked: Asked, due: bool) -> bool:
        """Whether any rank was, the same answer on all; ranks on GPUs look only where they wait anyway (``due``)."""
        if self.ranks.number == 1:
            return asked.to_stop
        return (due or not self.ranks.on_gpu) and bool(self.stop > 0)
