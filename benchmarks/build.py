"""How many patches a CPU-second makes: stpatch beside a plain dense-numpy transcription of Algorithm 1, in one run.

    python benchmarks/build.py [SLICE.h5ad] [--organism human|mouse] [--windows N] [--json FILE]

SLICE is a curated slice or any h5ad with raw counts and array coordinates; without one, a simulated slice is used, and
the output says so. Both sides draw windows, take variances of the normalised expression over the observed cells, draw
genes, crop, encode with the same Blosc codec and write a tar, one core each, in turns; CPU time is that of the process.

The plain side is what one would write straight from the paper: normalised expression once as a dense array, `np.var`
over the observed cells of a window, `Generator.choice(p=..., replace=False)`, fancy indexing, `tarfile`. It is run in
float64, the accuracy to which stpatch's variances hold, and in float32, which is faster and less exact. Both sides are
given the slice's grid in memory; what each lays out once a slice is shown apart, and included in the last column.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from corpus import load  # puts the repository on the path, too

from workflow import codec as samples
from workflow.grid import Grid, make_grid
from workflow.sample import Field
from workflow.windows import write_pack

WINDOW, M, EPSILON, MIN_OBSERVED, TARGET_SUM, CODEC = (16, 16), 512, 1e-6, 0.5, 1e4, "lz4"


class Plain:
    """Algorithm 1, transcribed."""

    def __init__(self, grid: Grid, dtype=np.float64) -> None:
        self.grid = grid
        totals = np.where(grid.mask, grid.total_counts, 1)[..., None].astype(dtype)
        self.values = np.log1p(grid.counts * (dtype(TARGET_SUM) / totals))
        self.codec = samples.codec(CODEC)

    def write(self, path: Path, n: int) -> None:
        grid, (h, w) = self.grid, WINDOW
        height, width, n_genes = grid.counts.shape
        rng = np.random.default_rng(0)
        with tarfile.open(path, "w") as archive:
            for number in range(n):
                while True:
                    y, x = rng.integers(height - h + 1), rng.integers(width - w + 1)
                    seen = grid.mask[y : y + h, x : x + w]
                    if seen.mean() >= MIN_OBSERVED:
                        break
                weight = self.values[y : y + h, x : x + w][seen].var(axis=0).astype(np.float64) + EPSILON
                genes = np.sort(rng.choice(n_genes, M, replace=False, p=weight / weight.sum()))
                counts = grid.counts[y : y + h, x : x + w][:, :, genes].transpose(2, 0, 1)
                totals = grid.total_counts[y : y + h, x : x + w]
                facts = {"slice": grid.slice, "window": number, "y": int(y), "x": int(x), "h": h, "w": w, "m": M}
                for member, data in (
                    ("counts.blosc", samples.encode_counts(counts, self.codec)),
                    ("sites.blosc", samples.encode_sites(genes, totals, self.codec)),
                    ("json", json.dumps(facts).encode()),
                ):
                    info = tarfile.TarInfo(f"{grid.slice}_{number:06d}.{member}")
                    info.size = len(data)
                    archive.addfile(info, io.BytesIO(data))


class Stpatch:
    """What the rule `windows` does."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.field = Field(grid, sorted(grid.gene_ids), WINDOW, TARGET_SUM)

    def write(self, path: Path, n: int) -> None:
        facts = {"pitch_um": self.grid.pitch_um, "layout": self.grid.layout}
        draw = {"selection": "weighted", "epsilon": EPSILON, "min_observed": MIN_OBSERVED, "seed": 0}
        write_pack(self.field, facts, path, path.with_suffix(".npy"), n=n, m=M, codec_name=CODEC, **draw)


def cpu(call) -> tuple[float, object]:
    """CPU seconds of the process, and the result."""
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def measure(grid: Grid, n_windows: int, rounds: int = 3) -> dict[str, dict[str, float]]:
    """Median over rounds of set-up seconds and patches per CPU-second; the sides take turns."""
    few = max(32, n_windows // 4)
    sides = {
        "plain, float64": (Plain, few),
        "plain, float32": (partial(Plain, dtype=np.float32), few),
        "stpatch": (Stpatch, n_windows),
    }
    seen = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as folder:
        Stpatch(grid).write(Path(folder) / "warm.tar", 2)  # compiles, or reads what was compiled before
        for _ in range(rounds):
            for name, (side, n) in sides.items():
                setup, maker = cpu(lambda side=side: side(grid))
                seconds, _ = cpu(lambda maker=maker, n=n: maker.write(Path(folder) / "out.tar", n))
                seen[name].append((setup, n / seconds))
    found = {}
    for name, values in seen.items():
        setup, rate = np.median(values, axis=0)
        found[name] = {
            "setup_s": float(setup),
            "patches_per_cpu_s": float(rate),
            "patches_per_cpu_s_with_setup": float(n_windows / (setup + n_windows / rate)),
        }
    return found


def main() -> None:
    """Measure, print a table, write the figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slice", nargs="?", help="h5ad; default: a simulated slice")
    parser.add_argument("--organism", default="human", choices=["human", "mouse"])
    parser.add_argument("--windows", type=int, default=512, help="windows a slice")
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()

    grid = make_grid(load(args.slice, args.organism), "auto", 100)
    found = measure(grid, args.windows)
    name = Path(args.slice).name if args.slice else "a simulated slice"
    print(
        f"{name}: {grid.n_spots} spots, {len(grid.gene_ids)} genes, grid {grid.mask.shape[0]} x {grid.mask.shape[1]};"
    )
    print(f"windows {WINDOW[0]} x {WINDOW[1]} x {M}, {CODEC}, one core, median of 3 rounds")
    print(f"{'':14s} {'set-up, s':>10s} {'patches per CPU-s':>18s} {f'with set-up over {args.windows}':>22s}")
    for side, figures in found.items():
        setup, rate, whole = figures.values()
        print(f"{side:14s} {setup:10.2f} {rate:18.0f} {whole:22.0f}")
    ours = found["stpatch"]["patches_per_cpu_s"]
    ratios = {side: ours / found[side]["patches_per_cpu_s"] for side in found if side != "stpatch"}
    print(
        "stpatch makes " + " and ".join(f"{ratio:.1f} times ({side})" for side, ratio in ratios.items()) + " as many."
    )
    if args.json:
        args.json.write_text(json.dumps({"slice": name, "ratios": ratios, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
