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
import json
import math
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trainer import budget, config, masks
from trainer.config import knob
from trainer.data import Batch, Order, Shards, Split
from trainer.errors import ConfigError, NonFiniteLoss, TrainerError
from trainer.files import as_safetensors, room_for, write_whole
from trainer.model import ModelConfig, build
from trainer.objective import Objective, ObjectiveConfig
from trainer.progress import Progress, open_log
from trainer.ranks import PREEMPTED, Asked, Ranks, Sums, joined
from trainer.report import curve, model_card
from trainer.snapshots import Snapshots, check_same_run, restore, tensors_of, unpack
from trainer.stream import Stream


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    epochs: float = knob(40.0, "passes over the training windows")
    steps: int = knob(0, "optimizer steps; 0: as many as --epochs makes")
    batch_size: int = knob(32, "windows a step, of all ranks together", least=1)
    accumulate: int = knob(1, "parts that a rank takes its windows of a step in, to save memory", least=1, free=True)
    optimizer: str = knob("adam|adamw", "adam adds the decay to the gradient, adamw applies it apart")
    lr: float = knob(1e-4, "peak learning rate")
    beta1: float = knob(0.9, "decay of the gradient's running mean", below=1)
    beta2: float = knob(0.999, "decay of its running square", below=1)
    weight_decay: float = knob(0.01, "on the weight matrices of the layers, not on gene embeddings, biases and norms")
    warmup: int = knob(0, "steps of linear warm-up before the cosine")
    clip: float = knob(0.0, "largest norm of the gradient; 0: no limit")
    seed: int = knob(0, "of the first weights, the order and the masks", below=2**63)
    shuffle: str = knob("full|block", "block: whole shards in random order, a few at a time mixed (network disks)")
    block_shards: int = knob(8, "shards that --shuffle block mixes", least=1)
    reader: str = knob("mmap|webdataset", "webdataset: shards by URL, in their stored order, slower")
    check_tars: str = knob("on|off", "hash every tar before the first step (some 2 GB/s a core)", free=True)
    workers: int = knob(-1, "threads that decode ahead; 0: none, -1: one, on a GPU up to four", least=-1, free=True)
    device: str = knob("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...", free=True)
    dtype: str = knob("auto|float32|bfloat16", "of the matrix products; auto: bfloat16 on a GPU that has it")
    compile: str = knob("auto|on|off", "torch.compile; auto: on a GPU, for runs of 200 steps or more", free=True)
    log_every: int = knob(20, "steps between two lines of progress", least=1, free=True)
    log: str = knob("none|tensorboard|wandb", "besides metrics.jsonl", free=True)
    val_every: int = knob(500, "steps between two validations", least=1, free=True)
    val_samples: int = knob(512, "held-out windows to validate on, the first of their shards; 0: all")
    resume: str = knob("auto|never", "auto: go on from the latest snapshot in --out; never: start anew", free=True)
    snapshot_every: int = knob(500, "steps between two snapshots", least=1, free=True)
    keep: int = knob(2, "latest snapshots to keep, besides the best", least=1, free=True)

    def __post_init__(self) -> None:
        config.check(self)


SETTINGS = (ModelConfig, ObjectiveConfig, TrainConfig)


def train(
    objective: Objective, optimizer: torch.optim.Optimizer, shards: Split, val: Split | None, cfg: TrainConfig,
    ranks: Ranks, progress: Progress, state: dict, save: Callable[[], None], asked: Asked,
) -> bool:  # fmt: skip
    """The training loop: from ``state`` to ``cfg.steps``; whether it got there, or was asked to stop before.

    The host waits for the device only where a line is due, and learns only then whether all was finite; so nothing is
    reported, validated or saved before that is known.
    """
    sums, order, forward = Sums(objective.parameters(), ranks), order_of(cfg, ranks), compiled(objective, cfg, ranks)
    seen = torch.tensor(state["seen"], device=ranks.device)  # loss and number of hidden entries since the last line
    finite = torch.ones((), dtype=torch.bool, device=ranks.device)
    sound = state["step"]  # where all was last known to be finite
    batches = on_device(shards.batches(order, state["consumed"], cfg.workers), ranks.device, progress.wait)
    if not state["step"]:
        with progress.pause():
            progress.validated(0, 0, validate(objective, val, cfg, ranks))

    while state["step"] < cfg.steps:
        sums.buffer.zero_()
        for batch in islice(batches, cfg.accumulate):
            if len(batch):
                with autocast(cfg, ranks):
                    loss = forward(batch)
                sums.loss.add_(loss.detach())
                loss[0].backward()
        sums.over_ranks(asked.to_stop)
        finite &= sums.clip(cfg.clip)
        seen += sums.loss
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
        if log or validation or snapshot:
            if not finite:
                found = f"a loss or gradient that is not finite in steps {sound + 1} to {step}, learning rate {lr:.3g}"
                raise NonFiniteLoss(shards.folder, found, "finite numbers")
            sound = step
        if log:
            progress.trained(step, consumed, (seen[0] / seen[1].clamp(min=1)).item(), lr)
            seen.zero_()
        with progress.pause():
            if validation:
                progress.validated(step, consumed, validate(objective, val, cfg, ranks))
                if not last and progress.scores and not at_most(state["best"], progress.scores):
                    state["best"], snapshot = {"step": step, **progress.scores}, True
            if snapshot:
                state["seen"] = seen.tolist()
                save()
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
    small = ranks.on_gpu and order_of(cfg, ranks).part <= 64
    return torch.compile(objective, fullgraph=True, dynamic=False, mode="reduce-overhead" if small else "default")


def autocast(cfg: TrainConfig, ranks: Ranks) -> contextlib.AbstractContextManager:
    """Matrix products in bfloat16 where the settings say so; weights, sums and the loss stay float32."""
    return torch.autocast(ranks.device.type, torch.bfloat16, enabled=cfg.dtype == "bfloat16")


def validate(objective: Objective, val: Split | None, cfg: TrainConfig, ranks: Ranks) -> dict[str, float]:
    """Masked MSE of the model and of each gene's training mean over the same entries, and the number of windows.

    The first ``val_samples`` windows of the shards (whose order is a random one), with the same masks every time; each
    rank takes its share.
    """
    if val is None:
        return {}
    n = min(cfg.val_samples or len(val), len(val))
    parts = [torch.zeros(3, device=ranks.device)]
    for batch in val.first(n, order_of(cfg, ranks), masks.VALIDATION):
        if len(batch):
            with autocast(cfg, ranks):
                parts.append(objective.evaluate(batch.to(ranks.device)))
    sums = torch.stack(parts).cpu().double().sum(0)
    ranks.add(sums)
    if not sums.isfinite().all():
        raise NonFiniteLoss(val.folder, f"a held-out loss of {sums[0].item()}", "finite numbers")
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
    return kind(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2), fused=matrices[0].device.type in ("cpu", "cuda"))


def resolved(cfg: TrainConfig, n_samples: int, ranks: Ranks) -> TrainConfig:
    """The settings with what the data and the device decide: steps, workers, dtype, compile."""
    steps = cfg.steps or math.ceil(cfg.epochs * math.ceil(n_samples / cfg.batch_size))
    dtype, compile, workers = cfg.dtype, cfg.compile, cfg.workers
    if workers < 0:
        workers = max(1, min(4, os.cpu_count() // ranks.here - 1)) if ranks.on_gpu else 1
    if dtype == "auto":
        dtype = "bfloat16" if ranks.on_gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    if compile == "auto":
        compile = "on" if ranks.on_gpu and steps >= 200 and importlib.util.find_spec("triton") else "off"
    return dataclasses.replace(cfg, steps=steps, workers=workers, dtype=dtype, compile=compile)


def run(
    shards: Split, val: Split | None, out: Path, model_cfg: ModelConfig, objective_cfg: ObjectiveConfig, cfg: TrainConfig,
    ranks: Ranks, asked: Asked,
) -> bool:  # fmt: skip
    """Train and write the model folder, from the latest snapshot in it if there is one; whether the run came to its end.

    An earlier model in the folder is replaced.
    """
    cfg = resolved(cfg, len(shards), ranks)
    sections = {"model": model_cfg, "objective": objective_cfg, "train": cfg}
    identity = {name: config.fixed(section) for name, section in sections.items()}
    identity |= {"data": shards.identity(), "held_out": val.identity() if val else {}}
    snapshots = Snapshots(out / "snapshots", cfg.keep)
    state, tensors = start(out, identity, snapshots, cfg, ranks)
    lines = tensors.pop("metrics", np.zeros(0, np.uint8)).tobytes()
    model = build(model_cfg, shards.vocabulary, cfg.seed, shards.components)
    objective = Objective(model, shards.index["target_sum"], objective_cfg).to(ranks.device)
    optimizer = make_optimizer(model, cfg)
    if tensors:
        restore(model, optimizer, tensors)
    for split in filter(None, (shards, val)):
        split.coordinates, split.centred, split.pinned = (
            objective.needs_coordinates,
            objective.needs_centres,
            ranks.on_gpu,
        )
    facts = {"format_version": config.FORMAT_VERSION}
    facts |= {name: dataclasses.asdict(section) for name, section in sections.items()}
    facts["data"] = shards.facts() | {"held_out": val.facts()["slices"] if val else []}
    facts["run"] = {
        "device": ranks.name,
        "ranks": ranks.number,
        "torch": torch.__version__,
        "resumed": state["resumed"],
    }

    part, peak = order_of(cfg, ranks).part, budget.peak_flops(ranks.device, cfg.dtype)
    cost = budget.cost(objective, next(shards.first(1, Order(1, cfg.seed), 0)).to(ranks.device))
    available = budget.available_bytes(ranks.device)
    if not ranks.on_gpu and available is not None and cost.bytes(part) * ranks.here > available:
        raise budget.too_little(cost, part, cfg.accumulate, available // ranks.here, ranks.device)

    def machine(speed: float) -> dict[str, float | None]:
        mfu = speed * cost.flops / (peak * ranks.number) if peak else None
        return {"mfu": mfu, "peak_memory_mb": budget.peak_memory_mb(ranks.device)}

    def save() -> None:
        state["seconds"] = progress.seconds
        if ranks.first:
            metrics = {"metrics": np.frombuffer(progress.lines(), np.uint8)}
            snapshots.save(state, tensors_of(model, optimizer) | metrics)

    with Progress(
        out / "metrics.jsonl" if ranks.first else None, cfg.steps, len(shards), state["consumed"], lines,
        state["seconds"], machine, open_log(cfg.log, out, facts) if ranks.first else None,
    ) as progress:  # fmt: skip
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
            raise budget.too_little(cost, part, cfg.accumulate, there_is, ranks.device) from error
        if not done:
            progress.say(f"asked to stop: saved step {state['step']}; the same command goes on from there")
        elif ranks.first:
            write_model(out, shards, model, facts, progress, state, snapshots)
        return done


def start(
    out: Path, identity: dict, snapshots: Snapshots, cfg: TrainConfig, ranks: Ranks
) -> tuple[dict, dict[str, np.ndarray]]:
    """The state that the run goes on from and the tensors of its latest snapshot (none where it begins).

    The first rank reads it for all, which need not share its disk, and clears the folder of an earlier model.
    """
    content, damaged = b"", []
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
        raise NonFiniteLoss(out, f"weights that are not finite after step {state['step']}", "finite numbers")
    n_weights = sum(weight.numel() for weight in model.parameters())
    write_whole(out / "config.json", (json.dumps(facts, indent=2, allow_nan=False) + "\n").encode())
    write_whole(out / "genes.tsv", (shards.folder / shards.index["genes"]["file"]).read_bytes())
    if model.cfg.gene_embeddings != "random":
        write_whole(out / "components.safetensors", shards.components.read_bytes())
    write_whole(out / "curve.svg", curve(progress.lines(), shards.index["simulated"]))
    write_whole(out / "README.md", model_card(facts, progress.scores, n_weights).encode())
    best = state["best"]
    if at_most(best, progress.scores) and (content := snapshots.read(best["step"])):
        progress.say(f"held-out error was lowest at step {best['step']}: best.safetensors")
        part = {name.removeprefix("model."): x for name, x in content[1].items() if name.startswith("model.")}
        write_whole(out / "best.safetensors", as_safetensors(part, {"format": "pt", "step": str(best["step"])}))
    write_whole(out / "model.safetensors", as_safetensors(weights, {"format": "pt"}))
    snapshots.remove()
    progress.say(f"wrote {out / 'model.safetensors'}")


def open_shards(address: str, val_address: str | None, reader: str) -> tuple[Split, Split | None]:
    """Both splits; None for a validation split that is not there or is empty."""
    kind = {"mmap": Shards, "webdataset": Stream}[reader]
    shards = kind(address)
    if not len(shards):
        raise ConfigError(address, "no windows", "some to train on", "admit slices of split `train` and rebuild")
    sibling = Path(address).resolve().parent / "val"
    if val_address is None and not sibling.is_dir():
        return shards, None
    val = kind(val_address or sibling)
    if not len(val):
        return shards, None
    shards.check_matches(val)
    return shards, val


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.pretrain", description="Flags win over the config file, the file over the defaults."
    )
    parser.add_argument("--shards", required=True, metavar="DIR", help="shards to train on (or the folder's URL)")
    parser.add_argument("--val-shards", metavar="DIR", help="held-out shards (default: `val` beside a folder --shards)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model folder to write")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of the knobs below (underscores)")
    config.add_flags(parser, *SETTINGS)
    flags = vars(parser.parse_args(argv))
    address, val_address, out, file = (flags.pop(name) for name in ("shards", "val_shards", "out", "config"))
    try:
        model_knobs, objective_knobs, train_knobs = config.settings(file, flags, *SETTINGS)
        cfg = TrainConfig(**train_knobs)
        with room_for(out), Asked() as asked, joined(cfg.device) as ranks:
            shards, val = open_shards(address, val_address, cfg.reader)
            for split in filter(None, (shards, val)):
                if cfg.check_tars == "on":  # every machine its own copy
                    split.check_tars(ranks.rank % ranks.here, ranks.here)
            facts = {"n_genes": len(shards.vocabulary.gene_ids), "m": shards.m, "h": shards.h, "w": shards.w}
            model_cfg, objective_cfg = ModelConfig(**facts, **model_knobs), ObjectiveConfig(cfg.seed, **objective_knobs)
            done = run(shards, val, out, model_cfg, objective_cfg, cfg, ranks, asked)
    except TrainerError as error:
        sys.exit(f"error: {error}")
    if not done:
        sys.exit(PREEMPTED)


if __name__ == "__main__":
    main()
