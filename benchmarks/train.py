"""Patches a second through a training step: batch x dtype x compile x unit, each a run of `python -m trainer.pretrain`.

    python benchmarks/train.py [--config FILE] [--batch 32 256] [--dtype float32 bfloat16] [--compile off on]
                               [--unit patch spot] [--steps N] [--device auto|cpu|cuda] [--json FILE] [-- --flag value ...]

The windows are cut from a simulated slice of Visium size (16 x 16 x 512; speed does not depend on what they show). Each run
is a process of its own with the stock trainer, the config's model (default: the paper's) and fixed steps; the figures are
those of its own metrics.jsonl, over the lines after warm-up: patches a second, share of the step spent waiting for data,
MFU (blank where the device's peak is unknown), peak memory. The first combination, plain eager float32 if it is among them,
is what the last column compares with. A run that fails is shown with its last line, not left out. What follows `--` goes to
every run.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from corpus import ROOT, build, load

AXES = ("unit", "batch_size", "dtype", "compile")


def run(shards: Path, out: Path, flags: dict[str, object], more: list[str]) -> dict:
    """The figures of one training run, or `error`: the last line it printed."""
    command = [
        sys.executable,
        "-m",
        "trainer.pretrain",
        "--shards",
        str(shards),
        "--out",
        str(out),
        "--resume",
        "never",
    ]
    command += [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()] + more
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        return {"error": lines[-1] if lines else f"exit code {done.returncode}"}
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if line["kind"] == "train"][2:]  # the first two hold compiling and warming up
    found = {name: statistics.median(line[name] for line in lines) for name in ("patches_per_s", "data_wait")}
    mfu = [line["mfu"] for line in lines if line["mfu"] is not None]
    return found | {
        "mfu": statistics.median(mfu) if mfu else None,
        "peak_memory_mb": max(line["peak_memory_mb"] for line in lines),
        "seconds": time.perf_counter() - began,
    }


def main() -> None:
    """Measure, print a table, write the figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "trainer/configs/paper.yaml")
    parser.add_argument("--batch", type=int, nargs="+", default=[32, 256], dest="batch_size")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--compile", nargs="+", default=["off", "on"])
    parser.add_argument("--unit", nargs="+", default=["patch"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--log-every", type=int, default=20)
    parser.add_argument("--windows", type=int, default=2048)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write the figures here")
    own, _, more = (list(group) for group in _split(sys.argv[1:]))
    args = parser.parse_args(own)
    if args.steps < 4 * args.log_every:
        parser.error("--steps must be at least four times --log-every: the first two lines are warming up")

    device = args.device if args.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    machine = torch.cuda.get_device_name() if device.startswith("cuda") else f"{os.cpu_count()} CPU cores"
    fixed = {
        "config": args.config,
        "steps": args.steps,
        "log_every": args.log_every,
        "val_every": args.steps,
        "device": device,
        "workers": args.workers,
    }
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build(folder, load(None, "human"), args.windows)
        print(
            f"{args.config.name} on {machine}, {args.steps} steps a run, {args.windows} simulated windows", flush=True
        )
        print(f"{'unit':10s} {'batch':>6s} {'dtype':9s} {'compile':8s} {'patches/s':>10s} {'MFU':>7s} "
              f"{'data wait':>10s} {'peak, MB':>9s} {'ratio':>6s}", flush=True)  # fmt: skip
        for number, values in enumerate(itertools.product(*(getattr(args, axis) for axis in AXES))):
            setting = dict(zip(AXES, values, strict=True))
            found = run(folder / "train", folder / f"run{number}", fixed | setting, more)
            rows.append(setting | found)
            head = "{unit:10s} {batch_size:6d} {dtype:9s} {compile:8s}".format(**setting)
            if "error" in found:
                print(f"{head} failed: {found['error']}", flush=True)
                continue
            first = next(row for row in rows if "error" not in row)
            ratio = found["patches_per_s"] / first["patches_per_s"]
            mfu = "" if found["mfu"] is None else f"{found['mfu']:.1%}"
            print(f"{head} {found['patches_per_s']:10,.0f} {mfu:>7s} {found['data_wait']:10.1%} "
                  f"{found['peak_memory_mb']:9,.0f} {ratio:6.2f}", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(
            json.dumps({"machine": machine, "config": args.config.name, "rows": rows}, indent=1) + "\n"
        )


def _split(words: list[str]) -> tuple[list[str], list[str], list[str]]:
    """What stands before `--`, the mark, what stands after."""
    at = words.index("--") if "--" in words else len(words)
    return words[:at], words[at : at + 1], words[at + 1 :]


if __name__ == "__main__":
    main()
