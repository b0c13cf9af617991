"""What the paper's MLP head costs: trainer.probe beside what one would write without it, in one run.

    python benchmarks/probe.py [--d 50 256 512] [--steps N] [--rounds N] [--json FILE]

Features are simulated (Gaussian classes), as many as DLPFC's 12 sections have under the paper's split: 9,466 training spots,
7 classes. All sides take the same steps, batches of 32 through layers of 512, 256 and 128, on one core, in turns:

probe, K together  `trainer.probe.train`, K splits side by side; the probe itself takes TOGETHER on a CPU
torch loop         one network of torch.nn after the other, autograd, torch.optim.Adam as it comes, batches by index
torch DataLoader   the same, the batches from a shuffling DataLoader
scikit-learn       MLPClassifier, one after the other, without its penalty

Printed is the CPU time of a step of one network (median over rounds, and the fastest), and what it makes of 10 splits of 800
epochs in core-hours.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits
from torch.utils.data import DataLoader, TensorDataset

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.probe import TOGETHER, Clock, Head, Member, train  # noqa: E402

N_TRAIN, N_CLASSES, BATCH = 9466, 7, 32
STEPS = 10 * 800 * -(-N_TRAIN // BATCH)  # of a representation: splits, epochs, batches
HIDDEN = Head().hidden


def simulated(d: int, n: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [n, d] and classes [n]."""
    rng = np.random.default_rng(0)
    y = rng.integers(N_CLASSES, size=n)
    x = rng.normal(size=(N_CLASSES, d))[y] + 2 * rng.normal(size=(n, d))
    return torch.from_numpy(x.astype(np.float32)), torch.from_numpy(y)


def probe(x: torch.Tensor, y: torch.Tensor, k: int) -> int:
    """One epoch of K networks; how many steps that was."""
    members = [Member(split, 0, np.arange(len(x)), np.arange(0)) for split in range(k)]
    steps = k * -(-len(x) // BATCH)
    train(Head(epochs=1), members, [x] * k, y, N_CLASSES, Clock(2 * steps, every=float("inf")))
    return steps


def torch_loop(x: torch.Tensor, y: torch.Tensor, loader: bool) -> int:
    sizes = [x.shape[1], *HIDDEN, N_CLASSES]
    layers = [
        part for pair in zip(sizes, sizes[1:], strict=False) for part in (torch.nn.Linear(*pair), torch.nn.ReLU())
    ]
    network = torch.nn.Sequential(*layers[:-1])
    adam = torch.optim.Adam(network.parameters(), lr=1e-3)
    if loader:
        batches = DataLoader(TensorDataset(x, y), batch_size=BATCH, shuffle=True)
    else:
        batches = ((x[some], y[some]) for some in torch.randperm(len(x)).split(BATCH))
    for some_x, some_y in batches:
        adam.zero_grad()
        torch.nn.functional.cross_entropy(network(some_x), some_y).backward()
        adam.step()
    return -(-len(x) // BATCH)


def scikit_learn(x: torch.Tensor, y: torch.Tensor) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # one epoch is asked for
        MLPClassifier(HIDDEN, alpha=0.0, batch_size=BATCH, max_iter=1, random_state=0).fit(x.numpy(), y.numpy())
    return -(-len(x) // BATCH)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--d", type=int, nargs="+", default=[50, 256, 512], help="width of the features (50 256 512)")
    parser.add_argument("--steps", type=int, default=150, help="of each network and round (default 150)")
    parser.add_argument("--rounds", type=int, default=5, help="(default 5)")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    with threadpool_limits(limits=1):
        compare(args)


def compare(args: argparse.Namespace) -> None:
    figures = []
    for d in args.d:
        x, y = simulated(d, args.steps * BATCH)
        sides: dict[str, Callable[[], int]] = {
            f"probe, {k} together" + " (as shipped)" * (k == TOGETHER): lambda x=x, y=y, k=k: probe(x, y, k)
            for k in (1, 2, 5, 10)
        }
        sides["torch loop"] = lambda x=x, y=y: torch_loop(x, y, loader=False)
        sides["torch DataLoader"] = lambda x=x, y=y: torch_loop(x, y, loader=True)
        sides["scikit-learn"] = lambda x=x, y=y: scikit_learn(x, y)
        took: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(args.rounds + 1):
            for name, side in sides.items():
                began = time.process_time()
                steps = side()
                if number:  # the first round warms up
                    took[name].append((time.process_time() - began) / steps)
        print(f"\nd {d} (simulated features), one core\n{'':30}{'ms a step':>10}{'fastest':>10}{'core-hours':>12}")
        for name, seconds in took.items():
            median, fastest = statistics.median(seconds), min(seconds)
            figures.append({"d": d, "side": name, "ms": 1e3 * median, "fastest_ms": 1e3 * fastest})
            print(f"{name:30}{1e3 * median:10.3f}{1e3 * fastest:10.3f}{STEPS * median / 3600:12.2f}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
