"""The paper's MLP head on frozen features: ``python -m trainer.probe --features FILE --splits FILE --out FILE``.

In: features of spots, and the spots' classes and splits; out: the class predicted for every tested spot, split by split and
seed by seed (docs/format.md, probe). Layers of 512, 256 and 128, ReLU, Adam at 1e-3, batches of 32 and 800 epochs are the
paper's; where it states no rule, it is this:

- Nothing regularises: no dropout, no weight decay, no early stop, and the last epoch's weights predict.
- Every feature is standardised on the training spots of its split (``--no-standardise`` leaves features as they are).
- Weights and biases start as PyTorch's linear layers do, uniform within 1 / sqrt(inputs); Adam's betas are .9 and .999.
- Each epoch sees every training spot once, in a new order; the last batch is what is left over.

One *member* is one split with one seed. Members learn side by side as one batched network (weights [K, in, out]), each as if
alone: its start is a function of (seed, split), its order of (seed, split, epoch), and Adam works element by element.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor, as_completed
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from trainer.errors import ConfigError, DamagedProbeInput, NonFiniteLoss, TrainerError
from trainer.files import as_safetensors, write_whole
from trainer.ranks import pick_device

FORMAT_VERSION = 1  # of the files in and out
# Members that a CPU trains together: parameters, gradients and Adam's moments of more fall out of its cache, of fewer the
# calls weigh more (benchmarks/probe.py). A constant, so that no sum depends on the number of cores.
TOGETHER = 2
SECONDS = 10.0  # between two lines of progress
ROWS = 4096  # predicted at a time


@dataclasses.dataclass(frozen=True)
class Head:
    """What a member is and how it learns; the defaults are the paper's, where it states them."""

    hidden: tuple[int, ...] = (512, 256, 128)
    epochs: int = 800
    batch_size: int = 32
    lr: float = 1e-3
    standardise: bool = True


@dataclasses.dataclass(frozen=True)
class Member:
    """One split with one seed; ``train`` and ``test`` are rows of the features, ascending."""

    split: int
    seed: int
    train: np.ndarray
    test: np.ndarray

    def draw(self, *key: object) -> np.random.Generator:
        """Randomness as a function of the seed, the split and what it is for."""
        digest = hashlib.sha256("/".join(map(str, (self.seed, self.split, *key))).encode()).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))

    def order(self, epoch: int) -> np.ndarray:
        """The places of the training spots in the order of an epoch, int64 [n_train]."""
        return self.draw("order", epoch).permutation(len(self.train))

    def start(self, sizes: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Weights [in, out] and biases [out] of each layer before the first step, float64."""
        draw = self.draw("start")
        return [
            tuple(draw.uniform(-(n_in**-0.5), n_in**-0.5, shape) for shape in ((n_in, n_out), n_out))
            for n_in, n_out in zip(sizes, sizes[1:], strict=False)
        ]


class Standard:
    """Features with mean 0 and standard deviation 1 each over the training spots; constant ones become 0 there."""

    def __init__(self, train: Tensor) -> None:
        train = train.double()
        constant = train.amin(0) == train.amax(0)
        self.mean = torch.where(constant, train[0], train.mean(0))
        self.spread = torch.where(constant, 1.0, train.std(0, correction=0))

    def __call__(self, x: Tensor) -> Tensor:
        return ((x.double() - self.mean) / self.spread).to(x.dtype)


class Networks:
    """K multilayer perceptrons side by side, all their parameters in one vector, and Adam on it.

    ``weights`` are views [K, in, out] of it, ``biases`` [K, 1, out], one each a layer. The backward pass is written out and
    fills views of one gradient: with so small matrices the bookkeeping of autograd, and fresh memory at every step, would
    add more than half to the time.
    """

    def __init__(self, members: list[Member], sizes: list[int], lr: float, like: Tensor) -> None:
        shapes = list(zip(sizes, sizes[1:], strict=False))
        per_member = sum(n_in * n_out + n_out for n_in, n_out in shapes)
        flat = torch.empty(len(members) * per_member, dtype=like.dtype, device=like.device)
        self.weights, self.biases = self._views(flat, len(members), shapes)
        for k, member in enumerate(members):
            for layer, (weight, bias) in enumerate(member.start(sizes)):
                self.weights[layer][k] = torch.from_numpy(weight)
                self.biases[layer][k, 0] = torch.from_numpy(bias)
        parameter = torch.nn.Parameter(flat)
        parameter.grad = torch.zeros_like(flat)
        self.d_weights, self.d_biases = self._views(parameter.grad, len(members), shapes)
        self.adam = torch.optim.Adam([parameter], lr=lr, fused=True)

    @staticmethod
    def _views(flat: Tensor, k: int, shapes: list[tuple[int, int]]) -> tuple[list[Tensor], list[Tensor]]:
        parts = iter(flat.split([size for n_in, n_out in shapes for size in (k * n_in * n_out, k * n_out)]))
        pairs = [(next(parts).view(k, n_in, n_out), next(parts).view(k, 1, n_out)) for n_in, n_out in shapes]
        return tuple(map(list, zip(*pairs, strict=True)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """What each layer receives, and last the logits [K, B, n_classes]; x [K, B, d]."""
        seen = [x]
        for weight, bias in zip(self.weights, self.biases, strict=True):
            seen.append(torch.baddbmm(bias, seen[-1], weight))
            if weight is not self.weights[-1]:
                seen[-1].relu_()
        return seen

    def step(self, x: Tensor, target: Tensor) -> Tensor:
        """One step of Adam on the mean cross-entropy of a batch; each member's sum over the batch before it, [K].

        ``target`` [K, B, n_classes] is 1 at the class and 0 elsewhere.
        """
        *seen, logits = self.forward(x)
        log_p = logits.log_softmax(-1)
        loss = -(target * log_p).sum((1, 2))
        gradient = log_p.exp_().sub_(target).div_(x.shape[1])  # [K, B, out], from the last layer to the first
        for layer in reversed(range(len(self.weights))):
            torch.bmm(seen[layer].mT, gradient, out=self.d_weights[layer])
            torch.sum(gradient, 1, keepdim=True, out=self.d_biases[layer])
            if layer:
                gradient = torch.bmm(gradient, self.weights[layer].mT)
                gradient = torch.ops.aten.threshold_backward(gradient, seen[layer], 0)
        self.adam.step()
        return loss

    def classes(self, k: int, x: Tensor) -> Tensor:
        """Predictions of member k, int16 [n]; x [n, d]."""
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.addmm(bias[k], x if layer == 0 else x.relu_(), weight[k])
        return x.argmax(1).short()


class Clock:
    """Says now and then how far all members are and how long the rest will take.

    Once it is ``stopped`` (a member failed, the user interrupts), whoever still trains ends with the epoch.
    """

    def __init__(self, n_steps: int, every: float = SECONDS) -> None:
        self.n_steps, self.every, self.done, self.stopped = n_steps, every, 0, False
        self.began = self.said = time.perf_counter()
        self.lock = threading.Lock()

    def advance(self, steps: int, loss: float) -> None:
        """So many steps of a member were made; ``loss`` is the latest epoch's mean."""
        if self.stopped:
            raise CancelledError
        with self.lock:
            self.done += steps
            now = time.perf_counter()
            if now - self.said < self.every and self.done < self.n_steps:
                return
            self.said, pace = now, self.done / (now - self.began)
            left = round((self.n_steps - self.done) / pace)
            left = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d} left"
            print(f"{self.done / self.n_steps:4.0%}  loss {loss:.4f}  {pace:,.0f} steps/s  {left}", flush=True)


@torch.no_grad()
def train(
    head: Head, members: list[Member], x: list[Tensor], y: Tensor, n_classes: int, clock: Clock
) -> tuple[Networks, Tensor]:
    """Train members that have equally many training spots.

    Parameters
    ----------
    x
        Each member's training features, [n_train, d]; their dtype and device are the network's.
    y
        int64 [n], classes of all spots.

    Returns
    -------
    networks, loss
        The trained `Networks`, and each member's mean loss over the last epoch, float64 [K].

    Raises
    ------
    NonFiniteLoss
        If a member's loss became infinite or NaN.
    """
    n, k = len(members[0].train), len(members)
    features = torch.cat(x)  # [K * n_train, d]
    rows = torch.from_numpy(np.concatenate([member.train for member in members])).to(features.device)
    target = torch.nn.functional.one_hot(y[rows], n_classes).to(features.dtype)
    networks = Networks(members, [features.shape[1], *head.hidden, n_classes], head.lr, features)
    for epoch in range(head.epochs):
        order = np.stack([member.order(epoch) + i * n for i, member in enumerate(members)])
        order = torch.from_numpy(order).to(features.device)
        loss = torch.zeros(k, dtype=torch.float64, device=features.device)
        for begin in range(0, n, head.batch_size):
            batch = order[:, begin : begin + head.batch_size]
            drawn = (part.index_select(0, batch.flatten()).view(*batch.shape, -1) for part in (features, target))
            loss += networks.step(*drawn)
        loss = loss.cpu() / n
        if not loss.isfinite().all():
            failed = members[int((~loss.isfinite()).nonzero()[0])]
            where = f"split {failed.split}, seed {failed.seed}, epoch {epoch + 1}"
            raise NonFiniteLoss(
                where, "a loss that is not finite", "a finite one", "lower --lr, or leave out --no-standardise"
            )
        clock.advance(k * -(-n // head.batch_size), float(loss.mean()))
    return networks, loss


@torch.no_grad()
def fit_predict(
    head: Head, members: list[Member], x: Tensor, y: Tensor, n_classes: int, clock: Clock
) -> Iterator[tuple[Member, np.ndarray, float]]:
    """Train members together; of each what it predicts for its test spots, int16 [n_test], and its last loss."""
    scales = [Standard(x[member.train]) if head.standardise else (lambda x: x) for member in members]
    known = [scale(x[member.train]) for member, scale in zip(members, scales, strict=True)]
    networks, loss = train(head, members, known, y, n_classes, clock)
    for k, (member, scale) in enumerate(zip(members, scales, strict=True)):
        parts = [
            networks.classes(k, scale(x[some])) for some in np.split(member.test, range(ROWS, len(member.test), ROWS))
        ]
        yield member, torch.cat(parts).cpu().numpy(), float(loss[k])


def together(members: list[Member], most: int) -> list[list[Member]]:
    """Members that train side by side: equally many training spots, at most so many of them.

    Where that makes several groups, the last members go one by one, so that two cores end at the same time.
    """
    by_size: dict[int, list[Member]] = {}
    for member in members:
        by_size.setdefault(len(member.train), []).append(member)
    groups = []
    for alike in by_size.values():
        n = len(alike) - most if len(alike) > most else len(alike)
        groups += [alike[i : min(i + most, n)] for i in range(0, n, most)] + [[member] for member in alike[n:]]
    return groups


def probe(
    head: Head, x: np.ndarray, y: np.ndarray, train: np.ndarray, test: np.ndarray, *, seeds: list[int],
    device: torch.device, threads: int = 1, every: float = SECONDS,
) -> tuple[np.ndarray, np.ndarray]:  # fmt: skip
    """Train the head for every split and seed, and predict.

    Parameters
    ----------
    x
        float [n, d]; the networks compute in its dtype.
    y
        int [n], classes 0, 1, 2, ...
    train, test
        bool [n_splits, n].
    threads
        Groups of members at a time on a CPU, each on one core; the result does not depend on it.
    every
        Seconds between two lines of progress.

    Returns
    -------
    predicted, loss
        int16 [n_splits, n_seeds, n], -1 where a split does not test a spot; float32 [n_splits, n_seeds], the mean training
        loss of the last epoch.

    Raises
    ------
    NonFiniteLoss
        If a member's loss became infinite or NaN.
    """
    predicted = np.full((len(train), len(seeds), len(y)), -1, dtype=np.int16)
    loss = np.full(predicted.shape[:2], np.nan, dtype=np.float32)
    members = [
        Member(split, seed, np.flatnonzero(train[split]), np.flatnonzero(test[split]))
        for seed in seeds
        for split in range(len(train))
    ]
    if not members:
        return predicted, loss
    on_cpu = device.type == "cpu"
    features, classes = torch.from_numpy(x).to(device), torch.from_numpy(y).long().to(device)
    clock = Clock(sum(head.epochs * -(-len(member.train) // head.batch_size) for member in members), every)

    def run(some: list[Member]) -> None:
        torch.set_flush_denormal(on_cpu)  # of this thread; moments that fade away would slow every step down
        for member, classes_of_test, last in fit_predict(head, some, features, classes, int(y.max()) + 1, clock):
            k = seeds.index(member.seed)
            predicted[member.split, k, member.test] = classes_of_test
            loss[member.split, k] = last

    pool = ThreadPoolExecutor(threads if on_cpu else 1)
    try:
        groups = together(members, TOGETHER if on_cpu else len(members))
        for done in as_completed([pool.submit(run, some) for some in groups]):
            done.result()
    finally:
        clock.stopped = True
        pool.shutdown(cancel_futures=True)
    return predicted, loss


def read(file: Path, *names: str) -> tuple[list[np.ndarray], dict]:
    """Tensors and facts of a safetensors file; DamagedProbeInput where they are not there or of another version."""
    expected = f"safetensors version {FORMAT_VERSION} with {', '.join(names)}"
    try:
        with safe_open(str(file), framework="numpy") as opened:
            facts = json.loads((opened.metadata() or {})["facts"])
            tensors = [opened.get_tensor(name) for name in names]
        version = facts["format_version"]
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise DamagedProbeInput(file, f"{type(error).__name__}: {error}", expected) from error
    if version != FORMAT_VERSION:
        raise DamagedProbeInput(file, f"format_version {version}", expected)
    return tensors, facts


def check(features: Path, x: np.ndarray, splits: Path, y: np.ndarray, train: np.ndarray, test: np.ndarray) -> None:
    """Raise DamagedProbeInput where features, classes and splits do not fit together."""
    n = len(y)
    if x.ndim != 2 or x.dtype != np.float32 or len(x) != n:
        raise DamagedProbeInput(features, f"X {x.dtype} {list(x.shape)}", f"float32 [{n}, d], a row a spot of {splits}")
    if not np.isfinite(x).all():
        rows = int((~np.isfinite(x).all(axis=1)).sum())
        raise DamagedProbeInput(features, f"{rows} spots with features that are not finite", "finite ones")
    if y.ndim != 1 or y.dtype != np.int16 or n and y.min() < 0:
        raise DamagedProbeInput(splits, f"y {y.dtype} {list(y.shape)}", "int16 [n], classes from 0 on")
    for name, mask in (("train", train), ("test", test)):
        if mask.dtype != np.bool_ or mask.shape != (len(train), n):
            raise DamagedProbeInput(splits, f"{name} {mask.dtype} {list(mask.shape)}", f"bool [n_splits, {n}]")
    for split in range(len(train)):
        found = f"split {split} with {train[split].sum()} training spots, {test[split].sum()} test spots"
        found += f", {(train[split] & test[split]).sum()} spots both"
        if not train[split].any() or not test[split].any() or (train[split] & test[split]).any():
            raise DamagedProbeInput(splits, found, "some of each, none both")


def run(args: argparse.Namespace) -> None:
    """Probe the features of the command line."""
    (x,), about = read(args.features, "X")
    (y, train, test), _ = read(args.splits, "y", "train", "test")
    check(args.features, x, args.splits, y, train, test)
    head = Head(tuple(args.hidden), args.epochs, args.batch_size, args.lr, args.standardise)
    counts = {"hidden": min(head.hidden), "epochs": head.epochs, "batch-size": head.batch_size, "seeds": args.seeds}
    for name, value in {**counts, "threads": args.threads}.items():
        if value < 1:
            raise ConfigError(f"--{name}", value, "at least 1", "change the flag")
    if not 0 < head.lr < float("inf"):
        raise ConfigError("--lr", head.lr, "a finite number above 0", "change the flag")
    device = pick_device(args.device)
    torch.set_num_threads(1)  # a group runs on one core, so that sums are made in one order on any machine
    seeds = list(range(args.seed, args.seed + args.seeds))
    began = time.perf_counter()
    predicted, loss = probe(head, x, y, train, test, seeds=seeds, device=device, threads=args.threads)
    metadata = {
        "dataset": str(about.get("dataset", "")), "method": str(about.get("method", "")),
        "simulated": str(bool(about.get("simulated", False))).lower(),
        "format_version": str(FORMAT_VERSION), "head": json.dumps(dataclasses.asdict(head)), "seeds": json.dumps(seeds),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, as_safetensors({"predicted": predicted, "loss": loss}, metadata))
    tested = predicted >= 0
    right = f", {(predicted == y)[tested].mean():.1%} of tested spots right" if tested.any() else ""
    print(f"{len(train)} splits x {len(seeds)} seeds in {time.perf_counter() - began:,.0f} s{right} -> {args.out}")


def main(argv: list[str] | None = None) -> None:
    default = Head()
    parser = argparse.ArgumentParser(prog="python -m trainer.probe", description=__doc__.partition("\n")[0])
    parser.add_argument("--features", type=Path, required=True, metavar="FILE", help="X float32 [n, d]")
    parser.add_argument(
        "--splits", type=Path, required=True, metavar="FILE", help="y int16 [n]; train, test bool [splits, n]"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="predicted int16 [splits, seeds, n]")
    parser.add_argument("--hidden", type=int, nargs="+", default=default.hidden, help="layer widths (512 256 128)")
    parser.add_argument("--epochs", type=int, default=default.epochs, help=f"(default {default.epochs})")
    parser.add_argument("--batch-size", type=int, default=default.batch_size, help=f"(default {default.batch_size})")
    parser.add_argument("--lr", type=float, default=default.lr, help=f"of Adam (default {default.lr})")
    parser.add_argument(
        "--standardise",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="features, on each split's training spots",
    )
    parser.add_argument("--seed", type=int, default=0, help="the first one (default 0)")
    parser.add_argument("--seeds", type=int, default=1, help="how many, one after the other (default 1)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument(
        "--threads", type=int, default=torch.get_num_threads(), help="cores, without a GPU (default: all; same bytes)"
    )
    args = parser.parse_args(argv)
    try:
        run(args)
    except TrainerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
