"""Pretrain the masked autoencoder: ``python -m trainer.pretrain --shards DIR --out DIR``, or the same by torchrun.

In: a folder of shards for training, one for validation. Out: a model folder (docs/format.md), its
``model.safetensors`` written last; until then snapshots, from which the same command goes on. The same shards, settings,
ranks and number of CPU threads give the same weights, however often the run was interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import math
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer import budget, config, masks
from trainer.card import model_card
from trainer.config import knob
from trainer.curve import curve
from trainer.data import Batch, Order, Shards, Split
from trainer.errors import ConfigError, NonFiniteLoss, TrainerError
from trainer.files import as_json, as_safetensors, write_whole
from trainer.model import ModelConfig, build
from trainer.objective import Objective, ObjectiveConfig
from trainer.progress import Progress, open_log
from trainer.ranks import PREEMPTED, Asked, Ranks, Sums, joined, pick_device
from trainer.snapshots import Snapshots, check_same_run, restore, tensors_of, unpack
from trainer.stream import Stream

__all__ = ["main", "pick_device", "run", "train"]
TAME = "lower --lr, add --warmup, or set --clip 1"  # what helps against a loss that is not finite


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    epochs: float = knob(40.0, "passes over the training windows")
    steps: int = knob(0, "optimizer steps; 0: as many as --epochs makes")
    batch_size: int = knob(32, "windows a step, of all ranks together")
    accumulate: int = knob(1, "parts that a rank takes its windows of a step in, to save memory", free=True)
    optimizer: str = knob("adam", "adam (decay added to the gradient) or adamw (decay apart from it)")
    lr: float = knob(1e-4, "peak learning rate")
    beta1: float = knob(0.9, "decay of the gradient's running mean")
    beta2: float = knob(0.999, "decay of its running square")
    weight_decay: float = knob(0.01, "on the weight matrices of the layers, not on gene embeddings, biases and norms")
    warmup: int = knob(0, "steps of linear warm-up before the cosine")
    clip: float = knob(0.0, "largest norm of the gradient; 0: no limit")
    seed: int = knob(0, "of the first weights, the order and the masks")
    shuffle: str = knob(
        "full", "full, or block: whole shards in random order, a few at a time shuffled (network disks)"
    )
    block_shards: int = knob(8, "shards that --shuffle block mixes")
    reader: str = knob("mmap", "mmap, or webdataset: shards by URL, in their stored order, slower")
    workers: int = knob(1, "threads that decode ahead; 0: none", free=True)
    device: str = knob("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...", free=True)
    dtype: str = knob("auto", "of the matrix products: float32, bfloat16, or auto (bfloat16 on a GPU that has it)")
    compile: str = knob("auto", "torch.compile: on, off, or auto (on a GPU, for runs of 200 steps or more)", free=True)
    log_every: int = knob(20, "steps between two lines of progress", free=True)
    log: str = knob("none", "besides metrics.jsonl: none, tensorboard or wandb", free=True)
    val_every: int = knob(500, "steps between two validations", free=True)
    val_samples: int = knob(512, "held-out windows to validate on, the first of their shards; 0: all")
    resume: str = knob("auto", "auto: go on from the latest snapshot in --out; never: start anew", free=True)
    snapshot_every: int = knob(500, "steps between two snapshots", free=True)
    keep: int = knob(2, "latest snapshots to keep, besides the best", free=True)

    def __post_init__(self) -> None:
        least = dict.fromkeys(("epochs", "steps", "lr", "weight_decay", "warmup", "clip", "seed", "val_samples"), 0)
        least |= dict.fromkeys(("batch_size", "accumulate", "block_shards", "log_every", "val_every"), 1)
        least |= dict.fromkeys(("snapshot_every", "keep"), 1) | {"workers": 0}
        for name, bound in least.items():
            if not bound <= getattr(self, name) < math.inf:
                raise _refuse(name, getattr(self, name), f"at least {bound}, and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise _refuse(name, getattr(self, name), "at least 0 and below 1")
        if self.seed >= 2**63:
            raise _refuse("seed", self.seed, "below 2**63")
        choices = {"optimizer": ("adam", "adamw"), "shuffle": ("full", "block"), "reader": ("mmap", "webdataset")}
        choices |= {"dtype": ("auto", "float32", "bfloat16"), "compile": ("auto", "on", "off")}
        choices |= {"log": ("none", "tensorboard", "wandb"), "resume": ("auto", "never")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise _refuse(name, getattr(self, name), " or ".join(allowed))


SETTINGS = (ModelConfig, ObjectiveConfig, TrainConfig)


def _refuse(name: str, value: object, expected: str) -> ConfigError:
    next_step = f"change --{name.replace('_', '-')}, or `{name}` in the config file"
    return ConfigError("training", found=f"{name} {value}", expected=expected, next_step=next_step)


def train(
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    shards: Split,
    val: Split | None,
    cfg: TrainConfig,
    ranks: Ranks,
    progress: Progress,
    state: dict,
    save: Callable[[], None],
    asked: Asked,
) -> bool:
    """The training loop: from ``state`` to ``cfg.steps``; whether it got there, or was asked to stop before.

    The host waits for the device only where a line is due, and learns only then whether all was finite; so nothing is
    reported, validated or saved before that is known.
    """
    sums, order, forward = Sums(objective.parameters(), ranks), order_of(cfg, ranks), compiled(objective, cfg, ranks)
    seen = torch.tensor(state["seen"], device=ranks.device)  # loss and number of hidden entries since the last line
    finite = torch.ones((), dtype=torch.bool, device=ranks.device)
    sound = (state["step"], state["consumed"])  # where all was last known to be finite
    batches = shards.batches(order, state["consumed"], cfg.workers, objective.needs_coordinates, ranks.on_gpu)
    batches = on_device(batches, ranks.device, progress.wait)
    if not state["step"] and not progress.scores:
        progress.validated(0, 0, validate, objective, val, cfg, ranks)

    while state["step"] < cfg.steps:
        sums.buffer.zero_()
        for batch in islice(batches, cfg.accumulate):
            if len(batch):
                with autocast(cfg, ranks):
                    loss = forward(batch)
                sums.loss.add_(loss.detach())
                loss[0].backward()
        sums.over_ranks(asked.to_stop)
        norm = torch.linalg.vector_norm(sums.gradients)
        finite &= norm.isfinite() & sums.loss.isfinite().all()
        seen += sums.loss
        if cfg.clip:
            sums.gradients.mul_((cfg.clip / (norm + 1e-6)).clamp(max=1))
        lr = learning_rate(state["step"], cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()

        step = state["step"] = state["step"] + 1
        consumed = state["consumed"] = order.after(len(shards), state["consumed"])
        last = step == cfg.steps
        log = last or step == 1 or step % cfg.log_every == 0
        validation = last or step % cfg.val_every == 0
        stop = not last and sums.asked_to_stop(asked, log)
        snapshot = stop or not last and step % cfg.snapshot_every == 0
        if step == progress.first + 1 and not log:
            ranks.wait()
            progress.warmed(step, consumed)
        if log or validation or snapshot:
            if not finite:
                raise diverged(sound, (step, consumed), lr, shards)
            sound = (step, consumed)
        if log:
            progress.trained(step, consumed, (seen[0] / seen[1].clamp(min=1)).item(), lr)
            seen.zero_()
        if validation:
            progress.validated(step, consumed, validate, objective, val, cfg, ranks)
            if not last and progress.scores and not at_most(state["best"], progress.scores):
                state["best"], snapshot = {"step": step, **progress.scores}, True
        if snapshot:
            state["seen"] = seen.tolist()
            progress.pause(save, step)
        if stop:
            return False
    return True


def on_device(batches: Iterator[Batch], device: torch.device, wait: Callable) -> Iterator[Batch]:
    """The batches on their device; ``wait`` counts the time that fetching takes.

    A GPU copies the next batch while it computes on this one. The host stays two batches ahead of it and no more, else what
    it waits for data would not be what the GPU waits.
    """
    if device.type != "cuda":
        while True:
            yield wait(next, batches).to(device)
    copies, computed = torch.cuda.Stream(device), deque()

    def fetch() -> Batch:
        batch = wait(next, batches)
        with torch.cuda.stream(copies):
            return batch.to(device)

    ahead = fetch()
    while True:
        ready, here = ahead, torch.cuda.current_stream(device)
        here.wait_stream(copies)
        for tensor in ready.tensors().values():
            tensor.record_stream(here)
        ahead = fetch()
        yield ready
        computed.append(here.record_event())
        if len(computed) > 2:
            computed.popleft().synchronize()


def order_of(cfg: TrainConfig, ranks: Ranks) -> Order:
    """Which samples each step of this rank reads."""
    return Order(cfg.batch_size, cfg.seed, cfg.shuffle, cfg.block_shards, ranks.rank, ranks.number, cfg.accumulate)


def compiled(objective: Objective, cfg: TrainConfig, ranks: Ranks) -> Callable[[Batch], torch.Tensor]:
    """The objective, compiled for the batch's very shape; in CUDA graphs where batches are small and launching takes longest."""
    if cfg.compile != "on":
        return objective
    small = ranks.on_gpu and cfg.batch_size <= 64 * ranks.number * cfg.accumulate
    return torch.compile(objective, fullgraph=True, dynamic=False, mode="reduce-overhead" if small else "default")


def autocast(cfg: TrainConfig, ranks: Ranks) -> contextlib.AbstractContextManager:
    """Matrix products in bfloat16 where the settings say so; weights, sums and the loss stay float32."""
    if cfg.dtype != "bfloat16":
        return contextlib.nullcontext()
    return torch.autocast(ranks.device.type, torch.bfloat16)


def validate(objective: Objective, val: Split | None, cfg: TrainConfig, ranks: Ranks) -> dict[str, float]:
    """Masked MSE of the model and of each gene's training mean over the same entries, and the number of windows.

    The first ``val_samples`` windows of the shards (whose order is a random one), with the same masks every time; each
    rank takes its share.
    """
    if val is None:
        return {}
    n = min(cfg.val_samples or len(val), len(val))
    batches = val.first(n, order_of(cfg, ranks), masks.VALIDATION, objective.needs_coordinates)
    parts = [torch.zeros(3, device=ranks.device)]
    for batch in batches:
        if len(batch):
            with autocast(cfg, ranks):
                parts.append(objective.evaluate(batch.to(ranks.device)))
    sums = torch.stack(parts).cpu().double().sum(0)
    ranks.add(sums)
    if not sums.isfinite().all():
        found = f"a held-out loss of {sums[0].item()}"
        raise NonFiniteLoss(val.folder, found=found, expected="finite numbers", next_step=TAME)
    masked_mse, gene_mean_mse = (sums[:2] / sums[2].clamp(min=1)).tolist()
    return {"masked_mse": masked_mse, "gene_mean_mse": gene_mean_mse, "n_windows": n}


def at_most(best: dict | None, scores: dict[str, float]) -> bool:
    """Whether an earlier validation was as good."""
    return best is not None and best["masked_mse"] <= scores["masked_mse"]


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to zero: a pure function of the step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / (cfg.warmup + 1)
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: nn.Module, cfg: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW. Only the matrices of layers decay: Adam would drive genes that a batch does not hold to zero."""
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    decayed = {id(weight) for weight in matrices}
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[cfg.optimizer]
    fused = matrices[0].device.type in ("cpu", "cuda")
    return kind(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=fused)


def diverged(sound: tuple[int, int], now: tuple[int, int], lr: float, shards: Split) -> NonFiniteLoss:
    """The error that names the steps and samples among which a loss or gradient was not finite."""
    found = (
        f"a loss or gradient that is not finite in steps {sound[0] + 1} to {now[0]} "
        f"(samples {sound[1] + 1} to {now[1]}), learning rate {lr:.3g}"
    )
    next_step = f"{TAME}; --log-every 1 names the very step"
    return NonFiniteLoss(shards.folder, found=found, expected="finite numbers", next_step=next_step)


def resolved(cfg: TrainConfig, n_samples: int, ranks: Ranks) -> TrainConfig:
    """The settings with what the data and the device decide: steps, dtype, compile."""
    steps = cfg.steps or math.ceil(cfg.epochs * math.ceil(n_samples / cfg.batch_size))
    dtype, compile = cfg.dtype, cfg.compile
    if dtype == "auto":
        dtype = "bfloat16" if ranks.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if compile == "auto":
        compile = "on" if ranks.on_gpu and steps >= 200 and importlib.util.find_spec("triton") else "off"
    return dataclasses.replace(cfg, steps=steps, dtype=dtype, compile=compile)


def run(
    shards: Split,
    val: Split | None,
    out: Path,
    model_cfg: ModelConfig,
    objective_cfg: ObjectiveConfig,
    cfg: TrainConfig,
    ranks: Ranks,
    asked: Asked,
) -> bool:
    """Train and write the model folder, from the latest snapshot in it if there is one; whether the run came to its end.

    An earlier model in the folder is replaced.
    """
    cfg = resolved(cfg, len(shards), ranks)
    sections = {"model": model_cfg, "objective": objective_cfg, "train": cfg}
    identity = {name: config.fixed(section) for name, section in sections.items()}
    identity |= {"data": shards.identity(), "held_out": val.identity() if val else {}}
    state, tensors = start(out, identity, cfg, ranks)
    lines = tensors.pop("metrics", np.zeros(0, np.uint8)).tobytes()
    model = build(model_cfg, shards.vocabulary, cfg.seed, shards.components)
    objective = Objective(model, shards.index, shards.vocabulary, objective_cfg).to(ranks.device)
    optimizer = make_optimizer(model, cfg)
    if tensors:
        restore(model, optimizer, tensors)
    snapshots = Snapshots(out / "snapshots", cfg.keep)
    facts = {"format_version": config.FORMAT_VERSION}
    facts |= {name: dataclasses.asdict(section) for name, section in sections.items()}
    facts["data"] = shards.facts() | {"held_out": val.facts()["slices"] if val else []}
    facts["run"] = {"device": ranks.name, "ranks": ranks.number, "torch": torch.__version__}
    facts["run"]["resumed"] = state["resumed"]

    one = next(shards.first(1, Order(1, cfg.seed), 0, objective.needs_coordinates)).to(ranks.device)
    cost = budget.cost(objective, one)
    share = -(-cfg.batch_size // (ranks.number * cfg.accumulate))  # windows that this process takes at a time
    available = budget.available_bytes(ranks.device)
    if not ranks.on_gpu and available is not None and cost.bytes(share) * ranks.here > available:
        raise budget.too_little(cost, share, available // ranks.here, ranks.device)
    peak = budget.peak_flops(ranks.device, cfg.dtype)

    with Progress(
        out / "metrics.jsonl" if ranks.first else None, cfg.steps, len(shards), state["step"], state["consumed"],
        lines, state["seconds"],
        mfu=lambda speed: speed * cost.flops / (peak * ranks.number) if peak else None,
        peak_memory_mb=lambda: budget.peak_memory_mb(ranks.device),
        log=open_log(cfg.log, out, facts) if ranks.first else None,
    ) as progress:  # fmt: skip

        def save() -> None:
            state["seconds"] = progress.seconds
            if ranks.first:
                metrics = {"metrics": np.frombuffer(progress.lines(), np.uint8)}
                snapshots.save(state, tensors_of(model, optimizer) | metrics)

        simulated = " (simulated data)" if shards.index["simulated"] else ""
        progress.say(
            f"{len(shards):,} windows of {shards.h} x {shards.w} x {shards.m}{simulated}, "
            f"{len(val) if val else 0:,} held out; {sum(p.numel() for p in model.parameters()):,} weights; "
            f"{cfg.steps:,} steps of {cfg.batch_size} on {ranks.number} x {ranks.name}, {cfg.dtype}, compile {cfg.compile}"
        )
        if state["resumed"]:
            progress.say(f"going on after step {state['step']}, {state['consumed']:,} windows")
        try:
            done = train(objective, optimizer, shards, val, cfg, ranks, progress, state, save, asked)
        except torch.OutOfMemoryError as error:
            there_is = torch.cuda.mem_get_info(ranks.device)[1]
            raise budget.too_little(cost, share, there_is, ranks.device) from error
        if not done:
            progress.say(f"asked to stop: saved step {state['step']}; the same command goes on from there")
        elif ranks.first:
            write_model(out, shards, model, facts, progress, state, snapshots)
        return done


def start(out: Path, identity: dict, cfg: TrainConfig, ranks: Ranks) -> tuple[dict, dict[str, np.ndarray]]:
    """The state that the run goes on from and the tensors of its latest snapshot (none where it begins).

    The first rank reads it for all, which need not share its disk, and clears the folder of an earlier model.
    """
    content, damaged, snapshots = b"", [], Snapshots(out / "snapshots", cfg.keep)
    if ranks.first:
        if cfg.resume == "never":
            snapshots.remove()
        content, damaged = snapshots.latest()
    content = ranks.share(content)
    state = {"step": 0, "consumed": 0, "seen": [0.0, 0.0], "seconds": 0.0, "best": None, "resumed": [], "run": identity}
    tensors = {}
    if content:
        state, tensors = unpack(content, snapshots.folder)
        check_same_run(snapshots.file(state["step"]), state["run"], identity)
        state["resumed"].append({"step": state["step"], "ranks": ranks.number, "damaged": damaged})
    if ranks.first:
        out.mkdir(parents=True, exist_ok=True)
        for name in ("model.safetensors", "best.safetensors"):  # the first one's presence says that a run has finished
            (out / name).unlink(missing_ok=True)
    return state, tensors


def write_model(
    out: Path, shards: Split, model: nn.Module, facts: dict, progress: Progress, state: dict, snapshots: Snapshots
) -> None:
    """The model folder (docs/format.md), its weights last; then the snapshots go."""
    weights = {name: weight.cpu().numpy() for name, weight in model.state_dict().items()}
    if not all(np.isfinite(weight).all() for weight in weights.values()):  # the last step may have made them so
        found = f"weights that are not finite after step {state['step']}"
        raise NonFiniteLoss(out, found=found, expected="finite numbers", next_step=TAME)
    best = state["best"]
    if not at_most(best, progress.scores or {"masked_mse": -math.inf}):
        best = None
    write_whole(out / "config.json", as_json(facts))
    write_whole(out / "genes.tsv", (shards.folder / shards.index["genes"]["file"]).read_bytes())
    if model.cfg.gene_embeddings == "components":
        write_whole(out / "components.safetensors", shards.components.read_bytes())
    write_whole(out / "curve.svg", curve(progress.lines(), shards.index["simulated"]))
    write_whole(out / "README.md", model_card(facts, progress.scores, sum(w.size for w in weights.values())).encode())
    if best:
        progress.say(f"held-out error was lowest at step {best['step']}: best.safetensors")
        _, tensors = unpack(snapshots.file(best["step"]).read_bytes(), snapshots.file(best["step"]))
        part = {name.removeprefix("model."): array for name, array in tensors.items() if name.startswith("model.")}
        write_whole(out / "best.safetensors", as_safetensors(part, {"format": "pt", "step": str(best["step"])}))
    write_whole(out / "model.safetensors", as_safetensors(weights, {"format": "pt"}))
    snapshots.remove()
    progress.say(f"wrote {out / 'model.safetensors'}")


def open_shards(address: str, val_address: str | None, reader: str) -> tuple[Split, Split | None]:
    """Both splits; None for a validation split that is not there or is empty."""
    kind = {"mmap": Shards, "webdataset": Stream}[reader]
    shards = kind(address)
    if not len(shards):
        next_step = "admit slices of split `train` and rebuild"
        raise ConfigError(address, found="no windows", expected="some to train on", next_step=next_step)
    sibling = Path(address).resolve().parent / "val"
    if val_address is None and sibling.is_dir():
        val_address = str(sibling)
    val = kind(val_address) if val_address else None
    if val is None or not len(val):
        return shards, None
    shards.check_matches(val)
    return shards, val


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.pretrain", description="Flags win over the config file, the file over the defaults."
    )
    parser.add_argument(
        "--shards", required=True, metavar="DIR", help="shards to train on (or the URL of their folder)"
    )
    parser.add_argument("--val-shards", metavar="DIR", help="held-out shards (default: `val` beside a folder --shards)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model folder to write")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of the knobs below (underscores)")
    config.add_flags(parser, *SETTINGS)
    flags = vars(parser.parse_args(argv))
    address, val_address, out, file = (flags.pop(name) for name in ("shards", "val_shards", "out", "config"))
    try:
        model_knobs, objective_knobs, train_knobs = config.settings(file, flags, *SETTINGS)
        cfg = TrainConfig(**train_knobs)
        with Asked() as asked, joined(cfg.device) as ranks:
            shards, val = open_shards(address, val_address, cfg.reader)
            facts = {"n_genes": len(shards.vocabulary.gene_ids), "m": shards.m, "h": shards.h, "w": shards.w}
            model_cfg, objective_cfg = ModelConfig(**facts, **model_knobs), ObjectiveConfig(cfg.seed, **objective_knobs)
            done = run(shards, val, out, model_cfg, objective_cfg, cfg, ranks, asked)
    except TrainerError as error:
        sys.exit(f"error: {error}")
    if not done:
        sys.exit(PREEMPTED)


if __name__ == "__main__":
    main()
