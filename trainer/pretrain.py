"""Pretrain the masked autoencoder: ``python -m trainer.pretrain --shards DIR --out DIR``.

In: a folder of shards for training, one for validation. Out: a model folder (docs/format.md), its
``model.safetensors`` written last. The same shards, settings and number of CPU threads give the same weights.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from trainer import config, masks
from trainer.card import model_card
from trainer.config import knob
from trainer.data import Batch, Shards
from trainer.errors import ConfigError, NonFiniteLoss, TrainerError
from trainer.expression import log_normalise
from trainer.files import as_json, as_safetensors, write_whole
from trainer.model import MaskedAutoencoder, ModelConfig, build
from trainer.progress import Progress

TAME = "lower --lr, add --warmup, or set --clip 1"  # what helps against a loss that is not finite


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    epochs: float = knob(40.0, "passes over the training windows")
    steps: int = knob(0, "optimizer steps; 0: as many as --epochs makes")
    batch_size: int = knob(32, "windows a step")
    optimizer: str = knob("adam", "adam (decay added to the gradient) or adamw (decay apart from it)")
    lr: float = knob(1e-4, "peak learning rate")
    beta1: float = knob(0.9, "decay of the gradient's running mean")
    beta2: float = knob(0.999, "decay of its running square")
    weight_decay: float = knob(0.01, "on the weight matrices of the layers, not on gene embeddings, biases and norms")
    warmup: int = knob(0, "steps of linear warm-up before the cosine")
    clip: float = knob(0.0, "largest norm of the gradient; 0: no limit")
    mask_ratio: float = knob(0.3, "fraction of the (site, gene) entries that is hidden")
    seed: int = knob(0, "of the first weights, the order and the masks")
    device: str = knob("auto", "auto (a GPU if there is one), cpu, cuda, cuda:1, ...")
    workers: int = knob(1, "threads that decode ahead")
    log_every: int = knob(20, "steps between two lines of progress")
    val_every: int = knob(500, "steps between two validations")
    val_samples: int = knob(512, "held-out windows to validate on, the first of their shards; 0: all")

    def __post_init__(self) -> None:
        least = dict.fromkeys(("epochs", "steps", "lr", "weight_decay", "warmup", "clip", "seed", "val_samples"), 0)
        least |= dict.fromkeys(("batch_size", "workers", "log_every", "val_every"), 1)
        for name, bound in least.items():
            if not bound <= getattr(self, name) < math.inf:
                raise _refuse(name, getattr(self, name), f"at least {bound}, and finite")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise _refuse(name, getattr(self, name), "at least 0 and below 1")
        if self.seed >= 2**63:
            raise _refuse("seed", self.seed, "below 2**63")
        if not 0 < self.mask_ratio < 1:
            raise _refuse("mask_ratio", self.mask_ratio, "between 0 and 1")
        if self.optimizer not in ("adam", "adamw"):
            raise _refuse("optimizer", self.optimizer, "adam or adamw")


def _refuse(name: str, value: object, expected: str) -> ConfigError:
    next_step = f"change --{name.replace('_', '-')}, or `{name}` in the config file"
    return ConfigError("training", found=f"{name} {value}", expected=expected, next_step=next_step)


def train(
    model: MaskedAutoencoder,
    optimizer: torch.optim.Optimizer,
    shards: Shards,
    val: Shards | None,
    cfg: TrainConfig,
    progress: Progress,
    step: int = 0,
    consumed: int = 0,
) -> None:
    """The training loop: from after ``step`` steps, which ``consumed`` so many samples, to ``cfg.steps``.

    The host waits for the device only where a line is due, and learns only then whether all was finite; so nothing is
    reported, validated or written before that is known.
    """
    device, target_sum = next(model.parameters()).device, shards.index["target_sum"]
    losses, finite = [], torch.ones((), dtype=torch.bool, device=device)
    sound = (step, consumed)  # where all was last known to be finite
    if step == 0:
        progress.validated(0, consumed, validate, model, val, cfg)
    batches = shards.batches(cfg.batch_size, cfg.seed, consumed, cfg.workers)
    for done, batch in enumerate(islice(batches, cfg.steps - step), step + 1):
        lr = learning_rate(done - 1, cfg)
        for group in optimizer.param_groups:
            group["lr"] = lr

        squared_error, n_masked = model(*inputs(batch.to(device), target_sum, cfg))
        loss = squared_error / n_masked.clamp(min=1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip or math.inf)
        finite &= loss.isfinite() & norm.isfinite()
        optimizer.step()

        consumed += len(batch)
        losses.append(loss.detach())
        log = done in (1, cfg.steps) or done % cfg.log_every == 0
        validation = done == cfg.steps or done % cfg.val_every == 0
        if log or validation:
            if not finite:
                raise diverged(sound, (done, consumed), lr, shards)
            sound = (done, consumed)
        if log:
            progress.trained(done, consumed, torch.stack(losses).mean().item(), lr)
            losses.clear()
        if validation:
            progress.validated(done, consumed, validate, model, val, cfg)


def inputs(batch: Batch, target_sum: float, cfg: TrainConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the model takes: values [B, S, m], genes [B, m], observed [B, S], masked [B, S, m]; S = h * w."""
    counts = batch.counts.flatten(2).transpose(1, 2)  # [B, m, h, w] -> [B, S, m]
    totals = batch.totals.flatten(1)  # [B, S]
    values = log_normalise(counts, totals, target_sum).contiguous()
    masked = masks.entry_mask(cfg.seed, batch.epoch, batch.positions, totals.shape[1], batch.genes, cfg.mask_ratio)
    return values, batch.genes, totals > 0, masked


@torch.no_grad()
def validate(model: MaskedAutoencoder, val: Shards | None, cfg: TrainConfig) -> dict[str, float]:
    """Masked MSE of the model and of each gene's training mean over the same entries, and the number of windows.

    The first ``val_samples`` windows of the shards (whose order is a random one), with the same masks every time.
    """
    if val is None:
        return {}
    n = min(cfg.val_samples or len(val), len(val))
    device, means = next(model.parameters()).device, torch.from_numpy(val.vocabulary.mean).float()
    sums = torch.zeros(3, dtype=torch.float64)
    for begin in range(0, n, cfg.batch_size):
        rows = np.arange(begin, min(begin + cfg.batch_size, n))
        batch = val.read(rows, rows, masks.VALIDATION).to(device)
        values, genes, observed, masked = inputs(batch, val.index["target_sum"], cfg)
        squared_error, n_masked = model(values, genes, observed, masked)
        by_mean = means.to(device)[genes.long()][:, None, :].expand_as(values)
        baseline, _ = model.loss(by_mean, values, observed, masked)
        sums += torch.stack([squared_error, baseline, n_masked]).double().cpu()
    if not sums.isfinite().all():
        found = f"a held-out loss of {sums[0].item()}"
        raise NonFiniteLoss(val.folder, found=found, expected="finite numbers", next_step=TAME)
    masked_mse, gene_mean_mse = (sums[:2] / sums[2].clamp(min=1)).tolist()
    return {"masked_mse": masked_mse, "gene_mean_mse": gene_mean_mse, "n_windows": n}


def learning_rate(step: int, cfg: TrainConfig) -> float:
    """Linear warm-up, then half a cosine down to zero: a pure function of the step."""
    if step < cfg.warmup:
        return cfg.lr * (step + 1) / (cfg.warmup + 1)
    progress = (step - cfg.warmup) / max(1, cfg.steps - cfg.warmup)
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * progress))


def make_optimizer(model: MaskedAutoencoder, cfg: TrainConfig) -> torch.optim.Optimizer:
    """Adam or AdamW. Only the matrices of layers decay: Adam would drive genes that a batch does not hold to zero."""
    matrices = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
    decayed = {id(weight) for weight in matrices}
    groups = [
        {"params": matrices, "weight_decay": cfg.weight_decay},
        {"params": [p for p in model.parameters() if id(p) not in decayed], "weight_decay": 0.0},
    ]
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[cfg.optimizer]
    return kind(groups, lr=cfg.lr, betas=(cfg.beta1, cfg.beta2))


def diverged(sound: tuple[int, int], now: tuple[int, int], lr: float, shards: Shards) -> NonFiniteLoss:
    """The error that names the steps and samples among which a loss or gradient was not finite."""
    found = (
        f"a loss or gradient that is not finite in steps {sound[0] + 1} to {now[0]} "
        f"(samples {sound[1] + 1} to {now[1]}), learning rate {lr:.3g}"
    )
    next_step = f"{TAME}; --log-every 1 names the very step"
    return NonFiniteLoss(shards.folder, found=found, expected="finite numbers", next_step=next_step)


def run(shards: Shards, val: Shards | None, out: Path, model_cfg: ModelConfig, cfg: TrainConfig) -> None:
    """Train and write the model folder; an earlier model in it is replaced."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "model.safetensors").unlink(missing_ok=True)  # its presence says that a run has finished
    cfg = dataclasses.replace(cfg, steps=cfg.steps or math.ceil(cfg.epochs * math.ceil(len(shards) / cfg.batch_size)))
    model = build(model_cfg, shards.vocabulary.mean, cfg.seed).to(pick_device(cfg.device))
    facts = {
        "format_version": config.FORMAT_VERSION,
        "model": dataclasses.asdict(model_cfg),
        "train": dataclasses.asdict(cfg),
        "data": shards.facts() | {"held_out": val.facts()["slices"] if val else []},
    }
    simulated = " (simulated data)" if shards.index["simulated"] else ""
    n_weights = sum(p.numel() for p in model.parameters())
    print(f"{len(shards):,} windows of {shards.h} x {shards.w} x {shards.m}{simulated}, "
          f"{len(val) if val else 0:,} held out; {n_weights:,} weights; {cfg.steps:,} steps "
          f"of {cfg.batch_size} on {next(model.parameters()).device}", flush=True)  # fmt: skip

    with Progress(out / "metrics.jsonl", cfg.steps, len(shards)) as progress:
        train(model, make_optimizer(model, cfg), shards, val, cfg, progress)
    weights = {name: weight.cpu().numpy() for name, weight in model.state_dict().items()}
    if not all(np.isfinite(weight).all() for weight in weights.values()):  # the last step may have made them so
        found = f"weights that are not finite after step {cfg.steps}"
        raise NonFiniteLoss(out, found=found, expected="finite numbers", next_step=TAME)

    write_whole(out / "config.json", as_json(facts))
    write_whole(out / "genes.tsv", (shards.folder / shards.index["genes"]["file"]).read_bytes())
    write_whole(out / "README.md", model_card(facts, progress.scores, n_weights).encode())
    write_whole(out / "model.safetensors", as_safetensors(weights, {"format": "pt"}))
    print(f"wrote {out / 'model.safetensors'}", flush=True)


def pick_device(name: str) -> torch.device:
    """The device of this name; ``auto`` is the first GPU if there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise _refuse("device", name, "auto, cpu, cuda or cuda:N") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise _refuse("device", name, "a device that this machine has (torch finds no GPU)")
    return device


def open_shards(folder: Path, val_folder: Path | None) -> tuple[Shards, Shards | None]:
    """Both splits; None for a validation split that is not there or is empty."""
    shards = Shards(folder)
    if not len(shards):
        next_step = "admit slices of split `train` and rebuild"
        raise ConfigError(folder, found="no windows", expected="some to train on", next_step=next_step)
    if val_folder is None:
        sibling = folder.resolve().parent / "val"
        val_folder = sibling if sibling.is_dir() else None
    val = Shards(val_folder) if val_folder else None
    if val is None or not len(val):
        return shards, None
    shards.check_matches(val)
    return shards, val


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m trainer.pretrain", description="Flags win over the config file, the file over the defaults."
    )
    parser.add_argument("--shards", type=Path, required=True, metavar="DIR", help="shards to train on")
    parser.add_argument(
        "--val-shards", type=Path, metavar="DIR", help="held-out shards (default: `val` beside --shards)"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the model folder to write")
    parser.add_argument("--config", type=Path, metavar="FILE", help="a YAML file of the knobs below (underscores)")
    config.add_flags(parser, ModelConfig, TrainConfig)
    flags = vars(parser.parse_args(argv))
    folder, val_folder, out, file = (flags.pop(name) for name in ("shards", "val_shards", "out", "config"))
    try:
        model_knobs, train_knobs = config.settings(file, flags, ModelConfig, TrainConfig)
        cfg = TrainConfig(**train_knobs)
        shards, val = open_shards(folder, val_folder)
        facts = {"n_genes": len(shards.vocabulary.gene_ids), "m": shards.m, "h": shards.h, "w": shards.w}
        run(shards, val, out, ModelConfig(**facts, **model_knobs), cfg)
    except TrainerError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
