"""Progress of a run: lines for people on the terminal, for programs in ``metrics.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable
from pathlib import Path


class Progress:
    """Writes both while it is open, keeps the time and the figures of the last validation (``scores``).

    Parameters
    ----------
    metrics
        The file; what it held is replaced.
    steps, n_samples
        Of the whole run, and of one epoch.
    step, samples, lines
        Where an interrupted run goes on, and its lines up to there. Time counts from this start.
    """

    def __init__(
        self, metrics: Path, steps: int, n_samples: int, step: int = 0, samples: int = 0, lines: Iterable[dict] = ()
    ) -> None:
        self.steps, self.n_samples, self.first = steps, n_samples, step
        self.timed = step  # steps done when the clock `training` began, from which the time left is reckoned
        self.logged = samples  # at the last line
        self.scores: dict[str, float] = {}
        self.file = open(metrics, "w", buffering=1)
        for line in lines:
            self._write(**line)
            if line["kind"] == "val":
                self.scores = {name: line[name] for name in line if name not in ("kind", "step", "samples")}
        self.started = self.training = self.resumed = time.perf_counter()  # `resumed`: since the last line

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def trained(self, step: int, samples: int, loss: float, lr: float) -> None:
        """One line of training: the mean loss since the last line, and how fast it goes."""
        now = time.perf_counter()
        speed, seconds = (samples - self.logged) / (now - self.resumed), now - self.started
        epoch = samples / self.n_samples
        if step == self.first + 1:  # it warms up whatever it touches, so its pace says nothing of the others'
            pace = f"first step {now - self.training:.1f} s"
            self.timed, self.training = step, now
        else:
            left = round((now - self.training) / (step - self.timed) * (self.steps - step))
            pace = f"{speed:,.0f} patches/s  {left // 60}:{left % 60:02d} left"
        self.logged, self.resumed = samples, now
        self._write(kind="train", step=step, samples=samples, epoch=epoch, loss=loss, lr=lr,
                    patches_per_s=speed, seconds=seconds)  # fmt: skip
        held_out = f"  {self._held_out()}" if self.scores else ""
        print(
            f"step {step}/{self.steps}  epoch {epoch:.2f}  loss {loss:.4f}{held_out}  lr {lr:.2e}  {pace}", flush=True
        )

    def validated(self, step: int, samples: int, validate: Callable[..., dict[str, float]], *arguments: object) -> None:
        """Validate, and hold the clock of the training speed meanwhile."""
        began = time.perf_counter()
        self.scores = validate(*arguments)
        if self.scores:
            self._write(kind="val", step=step, samples=samples, **self.scores)
            if step == 0:
                print(f"before training: {self._held_out()}", flush=True)
        pause = time.perf_counter() - began
        self.resumed += pause
        if step == self.first:  # later ones are part of what is left
            self.training += pause

    def _held_out(self) -> str:
        return f"held-out {self.scores['masked_mse']:.4f} (gene mean {self.scores['gene_mean_mse']:.4f})"

    def _write(self, **line: object) -> None:
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
