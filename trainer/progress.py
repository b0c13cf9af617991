"""Progress of a run: lines for people on the terminal, for programs in ``metrics.jsonl``, and where wanted in a log of theirs."""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from trainer.errors import ConfigError


class Progress:
    """Writes while it is open, keeps the time and the figures of the last validation (``scores``).

    ``metrics`` is the file, whose content is replaced; None: says and writes nothing (a rank that isn't the first). ``steps``
    is of the whole run, ``n_samples`` of an epoch. An interrupted run goes on from the ``samples`` consumed, the ``lines`` of
    its metrics and the ``seconds`` it took so far. ``machine`` tells ``mfu`` and ``peak_memory_mb`` of so many patches/s;
    ``log`` takes each line too, as a dict.
    """

    def __init__(
        self, metrics: Path | None, steps: int, n_samples: int, samples: int = 0, lines: bytes = b"", seconds: float = 0.0,
        machine: Callable[[float], dict] = lambda speed: {"mfu": None, "peak_memory_mb": None},
        log: Callable[[dict], None] | None = None,
    ) -> None:  # fmt: skip
        self.metrics, self.steps, self.n_samples, self.machine, self.log = metrics, steps, n_samples, machine, log
        validations = [line for line in map(json.loads, lines.splitlines()) if line["kind"] == "val"]
        scores = validations[-1].items() if validations else ()
        self.scores = {name: value for name, value in scores if name not in ("kind", "step", "samples")}
        self.file = open(metrics, "wb", buffering=0) if metrics else None
        if self.file:
            self.file.write(lines)
        self.logged, self.waited = samples, 0.0  # at the last line; seconds since
        self.began = None  # step and time of the first line, which says nothing of the pace of what is left
        self.resumed = time.perf_counter()  # when the training since the last line began, less what was no training
        self.started = self.resumed - seconds

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.file:
            self.file.close()

    @property
    def seconds(self) -> float:
        """Time that the run took so far, in all its sessions."""
        return time.perf_counter() - self.started

    def lines(self) -> bytes:
        """The content of ``metrics`` so far."""
        return self.metrics.read_bytes() if self.metrics else b""

    def wait(self, call: Callable, *arguments: object) -> object:
        """The result of a call that fetches data; the time it takes counts as waiting for them."""
        began = time.perf_counter()
        result = call(*arguments)
        self.waited += time.perf_counter() - began
        return result

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Hold the clock of the training speed meanwhile."""
        began = time.perf_counter()
        yield
        self.resumed += time.perf_counter() - began

    def trained(self, step: int, samples: int, loss: float, lr: float) -> None:
        """One line of training: the mean loss since the last line, and how fast it goes."""
        now = time.perf_counter()
        took, epoch = now - self.resumed, samples / self.n_samples
        speed, wait = (samples - self.logged) / took, self.waited / took
        machine = self.machine(speed)
        self.logged, self.resumed, self.waited = samples, now, 0.0
        self._write(kind="train", step=step, samples=samples, epoch=epoch, loss=loss, lr=lr, patches_per_s=speed,
                    data_wait=wait, **machine, seconds=now - self.started)  # fmt: skip
        pace = f"{speed:,.0f} patches/s  data wait {wait:.0%}  "
        pace += f"MFU {machine['mfu']:.0%}  " if machine["mfu"] else ""
        if self.began is None:
            self.began, pace = (step, now), f"{took:.1f} s with the first step"
        else:
            left = round((now - self.began[1]) / (step - self.began[0]) * (self.steps - step))
            pace += f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        held_out = f"  {self._held_out()}" if self.scores else ""
        self.say(f"step {step}/{self.steps}  epoch {epoch:.2f}  loss {loss:.4f}{held_out}  lr {lr:.2e}  {pace}")

    def validated(self, step: int, samples: int, scores: dict[str, float]) -> None:
        """The figures of a validation, if there was one."""
        self.scores = scores
        if scores:
            self._write(kind="val", step=step, samples=samples, **scores)
            if step == 0:
                self.say(f"before training: {self._held_out()}")

    def say(self, text: str) -> None:
        """A line on the terminal."""
        if self.metrics:
            print(text, flush=True)

    def _held_out(self) -> str:
        return f"held-out {self.scores['masked_mse']:.4f} (gene mean {self.scores['gene_mean_mse']:.4f})"

    def _write(self, **line: object) -> None:
        if self.file:
            self.file.write(json.dumps(line, allow_nan=False).encode() + b"\n")
        if self.log:
            self.log(line)


def open_log(name: str, out: Path, facts: dict) -> Callable[[dict], None] | None:
    """What ``--log`` names: takes lines of ``metrics.jsonl``; ConfigError where its package is not installed."""
    if name == "none":
        return None
    try:
        module = importlib.import_module({"tensorboard": "torch.utils.tensorboard"}.get(name, name))
    except ImportError as error:
        next_step = f"`pip install {name}`, or leave --log out: metrics.jsonl has it all"
        raise ConfigError("--log", f"no package {name}", "it", next_step) from error
    if name == "tensorboard":
        writer = module.SummaryWriter(str(out / "tensorboard"))

        def write(figures: dict[str, float], step: int) -> None:
            for tag, value in figures.items():
                writer.add_scalar(tag, value, step)
    else:
        write = module.init(project="stpatch", name=out.name, dir=str(out), config=facts).log

    def log(line: dict) -> None:
        others = {key: value for key, value in line.items() if key not in ("kind", "step") and value is not None}
        write({f"{line['kind']}/{key}": value for key, value in others.items()}, step=line["step"])

    return log
