"""Progress of a run: lines for people on the terminal, for programs in ``metrics.jsonl``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path


class Progress:
    """Writes both while it is open, and keeps the time."""

    def __init__(self, metrics: Path, steps: int, n_samples: int) -> None:
        self.steps, self.n_samples = steps, n_samples
        self.file = open(metrics, "w", buffering=1)
        self.started = self.resumed = time.perf_counter()
        self.logged = 0  # samples at the last line
        self.held_out = ""

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def trained(self, step: int, samples: int, loss: float, lr: float) -> None:
        """One line of training: the mean loss since the last line, and how fast it goes."""
        now = time.perf_counter()
        speed, seconds = (samples - self.logged) / (now - self.resumed), now - self.started
        epoch, left = samples / self.n_samples, round(seconds / step * (self.steps - step))
        self.logged, self.resumed = samples, now
        self._write(kind="train", step=step, samples=samples, epoch=epoch, loss=loss, lr=lr,
                    patches_per_s=speed, seconds=seconds)  # fmt: skip
        print(
            f"step {step}/{self.steps}  epoch {epoch:.2f}  loss {loss:.4f}{self.held_out}  lr {lr:.2e}  "
            f"{speed:,.0f} patches/s  {left // 60}:{left % 60:02d} left",
            flush=True,
        )

    def validated(
        self, step: int, samples: int, validate: Callable[..., dict[str, float]], *arguments: object
    ) -> dict[str, float]:
        """Validate, and hold the clock of the training speed meanwhile."""
        began = time.perf_counter()
        scores = validate(*arguments)
        if scores:
            self._write(kind="val", step=step, samples=samples, **scores)
            self.held_out = f"  held-out {scores['masked_mse']:.4f} (gene mean {scores['gene_mean_mse']:.4f})"
        self.resumed += time.perf_counter() - began
        return scores

    def _write(self, **line: object) -> None:
        self.file.write(json.dumps(line, allow_nan=False) + "\n")
