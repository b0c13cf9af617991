"""Progress of a run: lines for people on the terminal, for programs in ``metrics.jsonl``, and where wanted in a log of theirs."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from pathlib import Path

from trainer.errors import ConfigError


class Progress:
    """Writes while it is open, keeps the time and the figures of the last validation (``scores``).

    Parameters
    ----------
    metrics
        The file; what it held is replaced. None: says and writes nothing (a rank that isn't the first).
    steps, n_samples
        Of the whole run, and of one epoch.
    step, samples, lines, seconds
        Where an interrupted run goes on, the content of its ``metrics`` so far, and the time it took.
    mfu
        From patches/s to the share of the device's arithmetic that is used; None where that is not known.
    peak_memory_mb
        Says the most memory taken so far.
    log
        Takes each line too, as a dict.
    """

    def __init__(
        self,
        metrics: Path | None,
        steps: int,
        n_samples: int,
        step: int = 0,
        samples: int = 0,
        lines: bytes = b"",
        seconds: float = 0.0,
        mfu: Callable[[float], float | None] = lambda speed: None,
        peak_memory_mb: Callable[[], float | None] = lambda: None,
        log: Callable[[dict], None] | None = None,
    ) -> None:
        self.metrics, self.steps, self.n_samples, self.first = metrics, steps, n_samples, step
        self.mfu, self.peak_memory_mb, self.log = mfu, peak_memory_mb, log
        self.timed = step  # steps done when the clock `training` began, from which the time left is reckoned
        self.logged = samples  # at the last line
        self.waited = 0.0  # seconds, since the last line
        validations = [line for line in map(json.loads, lines.splitlines()) if line["kind"] == "val"]
        self.scores = _scores(validations[-1]) if validations else {}
        self.file = open(metrics, "wb", buffering=0) if metrics else None
        if self.file:
            self.file.write(lines)
        now = time.perf_counter()
        self.started = now - seconds
        self.training = self.resumed = now  # `resumed`: since the last line

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

    def trained(self, step: int, samples: int, loss: float, lr: float) -> None:
        """One line of training: the mean loss since the last line, and how fast it goes."""
        now = time.perf_counter()
        speed, share = (samples - self.logged) / (now - self.resumed), self.waited / (now - self.resumed)
        epoch, mfu = samples / self.n_samples, self.mfu(speed)
        if step == self.first + 1:  # it warms up whatever it touches, so its pace says nothing of the others'
            pace = f"first step {now - self.training:.1f} s"
            self.timed, self.training = step, now
        else:
            left = round((now - self.training) / (step - self.timed) * (self.steps - step))
            pace = f"{speed:,.0f} patches/s  data wait {share:.0%}  " + (f"MFU {mfu:.0%}  " if mfu else "")
            pace += f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
        self.logged, self.resumed, self.waited = samples, now, 0.0
        self._write(kind="train", step=step, samples=samples, epoch=epoch, loss=loss, lr=lr,
                    patches_per_s=speed, data_wait=share, mfu=mfu, peak_memory_mb=self.peak_memory_mb(),
                    seconds=now - self.started)  # fmt: skip
        held_out = f"  {self._held_out()}" if self.scores else ""
        self.say(f"step {step}/{self.steps}  epoch {epoch:.2f}  loss {loss:.4f}{held_out}  lr {lr:.2e}  {pace}")

    def validated(self, step: int, samples: int, validate: Callable[..., dict[str, float]], *arguments: object) -> None:
        """Validate, and hold the clock of the training speed meanwhile."""
        began = time.perf_counter()
        self.scores = validate(*arguments)
        if self.scores:
            self._write(kind="val", step=step, samples=samples, **self.scores)
            if step == 0:
                self.say(f"before training: {self._held_out()}")
        self._hold(time.perf_counter() - began, step)

    def pause(self, call: Callable[[], None], step: int) -> None:
        """Call what is no training, and hold the clock of its speed meanwhile."""
        began = time.perf_counter()
        call()
        self._hold(time.perf_counter() - began, step)

    def warmed(self, step: int, samples: int) -> None:
        """The first step of a session that ends without a line: its pace says nothing of the others'."""
        self.timed, self.logged, self.waited = step, samples, 0.0
        self.training = self.resumed = time.perf_counter()

    def _hold(self, took: float, step: int) -> None:
        self.resumed += took
        if step == self.first:  # later ones are part of what is left
            self.training += took

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


def _scores(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if name not in ("kind", "step", "samples")}


def open_log(name: str, out: Path, facts: dict) -> Callable[[dict], None] | None:
    """What ``--log`` names: takes lines of ``metrics.jsonl``; the package is imported only now.

    Raises
    ------
    ConfigError
        The package is not installed.
    """
    if name == "none":
        return None
    try:
        if name == "tensorboard":
            importlib.import_module("tensorboard")
            write = (
                importlib.import_module("torch.utils.tensorboard").SummaryWriter(str(out / "tensorboard")).add_scalar
            )
        else:
            run = importlib.import_module("wandb").init(project="stpatch", name=out.name, dir=str(out), config=facts)

            def write(tag: str, value: float, step: int) -> None:
                run.log({tag: value}, step=step)

    except ImportError as error:
        next_step = f"`pip install {name}`, or leave --log out: metrics.jsonl has it all"
        raise ConfigError("--log", found=f"no package {name}", expected="it", next_step=next_step) from error

    def log(line: dict) -> None:
        for key, value in line.items():
            if key not in ("kind", "step") and value is not None:
                write(f"{line['kind']}/{key}", value, line["step"])

    return log
