"""How many patches a second reach the trainer: stpatch's reader beside what one would do without it, in one run.

    python benchmarks/loader.py [SLICE.h5ad] [--windows N] [--workers 0 1 2] [--codec lz4|zstd] [--json FILE]

SLICE is a curated slice or any h5ad with raw counts and array coordinates; without one, a simulated slice is used, and
the output says so. All sides hand over batches of uint16 counts [B, 512, 16, 16] as torch tensors with their genes and
totals, read from warm files, in turns, and the median over rounds is printed:

raw copy         memory-mapped, uncompressed counts, copied at random positions: the limit of any reader
decode alone     the compressed samples, already in memory, decoded one after the other: the limit of these shards
stpatch          `trainer.data.Shards`, random order, by the index; 0 workers: decoded in the main thread
tarfile          Python's `tarfile` over the same shards, front to back, decoded by the documented ten lines
webdataset       `WebDataset` over the same shards with the same decoder; with workers: in torch's DataLoader
litdata          the same samples, rewritten as litdata chunks and streamed with shuffling (where it is installed)
live zarr        no shards: random windows read from the slice's zarr grid, 512 genes drawn and cropped on the fly
live anndata     no shards: random windows cut from the curated h5ad, held open on disk (`backed`)

Patches a CPU-second counts the time of all of a side's processes and threads; first batch is the time from opening to
the first batch; bytes are those on disk.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import anndata
import numpy as np
import torch
import webdataset
import zarr
from corpus import build, load  # puts the repository on the path, too
from numcodecs import blosc

from trainer.data import Order, Shards

B = 32
M, H, W = 512, 16, 16


def decode(sample: dict) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Counts, genes and totals of a sample, as docs/format.md has it."""
    facts = json.loads(bytes(sample["json"]))
    m, h, w = facts["m"], facts["h"], facts["w"]
    sites = blosc.decompress(sample["sites.blosc"])
    counts = np.frombuffer(blosc.decompress(sample["counts.blosc"]), "<u2").reshape(m, h, w)
    return counts, np.frombuffer(sites, "<i4", count=m), np.frombuffer(sites, "<f4", offset=4 * m).reshape(h, w)


def batched(samples: Iterator[tuple]) -> Iterator[list[torch.Tensor]]:
    """Samples B at a time, stacked."""
    some = []
    for sample in samples:
        some.append(sample)
        if len(some) == B:
            yield [torch.from_numpy(np.stack(parts)) for parts in zip(*some, strict=True)]
            some = []


class Sides:
    """Each method opens one way of reading and yields batches, at least as many as there are samples."""

    def __init__(self, folder: Path, slice_file: Path, codec: str) -> None:
        self.folder, self.slice_file, self.codec = folder, slice_file, codec
        self.tars = sorted(map(str, (folder / "train").glob("*.tar")))
        shards = Shards(folder / "train")
        batch = shards.read(np.arange(len(shards)), np.arange(len(shards)), 0)
        self.n = len(shards)
        self.genes, self.totals = batch.genes.numpy(), batch.totals.numpy()
        np.save(folder / "raw.npy", batch.counts.numpy())
        self.members = [
            tuple(bytes(shards.member(row, part)) for part in ("counts", "sites")) for row in range(len(shards))
        ]

    def raw(self) -> Iterator:
        counts = np.load(self.folder / "raw.npy", mmap_mode="r")
        rows = np.random.default_rng(0).permutation(self.n)
        for begin in range(0, self.n, B):
            some = rows[begin : begin + B]
            yield [torch.from_numpy(array[some]) for array in (counts, self.genes, self.totals)]

    def decoding(self) -> Iterator:
        def samples():
            for packed, sites in self.members:
                sites = blosc.decompress(sites)
                counts = np.frombuffer(blosc.decompress(packed), "<u2").reshape(M, H, W)
                yield counts, np.frombuffer(sites, "<i4", count=M), np.frombuffer(sites, "<f4", offset=4 * M)

        return batched(samples())

    def stpatch(self, workers: int) -> Iterator:
        yield from Shards(self.folder / "train").batches(Order(B, seed=0), workers=workers)

    def tarfile(self) -> Iterator:
        def samples():
            for path in self.tars:
                with tarfile.open(path) as tar:
                    sample = {}
                    for member in tar:
                        sample[member.name.partition(".")[2]] = tar.extractfile(member).read()
                        if len(sample) == 3:
                            yield decode(sample)
                            sample = {}

        return batched(samples())

    def webdataset(self, workers: int) -> Iterator:
        # A worker needs a shard of its own: with fewer shards than workers the idle ones are what a user gets too.
        stock = webdataset.WebDataset(self.tars, shardshuffle=False, empty_check=False).shuffle(256).map(decode)
        stock = stock.batched(B, partial=False)
        if workers:
            stock = webdataset.WebLoader(stock, batch_size=None, num_workers=workers)
        for batch in stock:
            yield [torch.as_tensor(part) for part in batch]

    def litdata(self, workers: int) -> Iterator:
        import litdata

        dataset = litdata.StreamingDataset(str(self.folder / "litdata"), shuffle=True, transform=from_chunk)
        yield from litdata.StreamingDataLoader(dataset, batch_size=B, num_workers=workers)

    def zarr(self) -> Iterator:
        grid = zarr.open_group(self.folder / "grid.zarr", mode="r")
        counts, totals = grid["counts"], grid["total_counts"]
        rng = np.random.default_rng(0)

        def samples():
            while True:
                y, x = rng.integers(counts.shape[0] - H + 1), rng.integers(counts.shape[1] - W + 1)
                genes = np.sort(rng.choice(counts.shape[2], M, replace=False)).astype(np.int32)
                window = counts[y : y + H, x : x + W]
                yield window[:, :, genes].transpose(2, 0, 1), genes, totals[y : y + H, x : x + W]

        return batched(samples())

    def anndata(self) -> Iterator:
        adata = anndata.read_h5ad(self.slice_file, backed="r")
        spot = zarr.open_group(self.folder / "grid.zarr", mode="r")["spot"][:]
        total = adata.obs["total_counts"].to_numpy(np.float32)
        rng = np.random.default_rng(0)

        def samples():
            while True:
                y, x = rng.integers(spot.shape[0] - H + 1), rng.integers(spot.shape[1] - W + 1)
                rows = spot[y : y + H, x : x + W].ravel()
                seen = np.flatnonzero(rows >= 0)
                if not len(seen):
                    continue
                genes = np.sort(rng.choice(adata.n_vars, M, replace=False)).astype(np.int32)
                order = np.argsort(rows[seen])  # h5 is read in ascending order
                counts, totals = np.zeros((M, H * W), np.uint16), np.zeros(H * W, np.float32)
                counts[:, seen[order]] = adata.X[rows[seen][order]][:, genes].toarray().T
                totals[seen] = total[rows[seen]]
                yield counts.reshape(M, H, W), genes, totals.reshape(H, W)

        return batched(samples())


def from_chunk(sample: dict) -> tuple[torch.Tensor, ...]:
    """A sample of litdata's, whose names have no dots."""
    return tuple(map(torch.from_numpy, decode({name.replace("_", "."): part for name, part in sample.items()})))


def as_it_is(sample: dict) -> dict:
    """litdata hands each sample to a function, in a process of its own."""
    return sample


def write_litdata(sides: Sides) -> str | None:
    """Rewrite the samples as litdata chunks; why not, where it can't be."""
    try:
        import litdata
    except ImportError:
        return "not installed"
    samples = []
    for path in sides.tars:
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, part = member.name.partition(".")
                if part == "counts.blosc":
                    samples.append({})
                samples[-1][part.replace(".", "_")] = tar.extractfile(member).read()
    with warnings.catch_warnings(action="ignore"):
        litdata.optimize(
            fn=as_it_is,
            inputs=samples,
            output_dir=str(sides.folder / "litdata"),
            chunk_bytes="64MB",
            num_workers=1,
        )
    return None


def cpu_seconds() -> float:
    """CPU time of this process and of its children that have ended."""
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in (own, children))


def time_one(open_side: Callable[[], Iterator], n: int) -> tuple[float, float, float]:
    """First batch in seconds, patches a second after it, patches a CPU-second over all, of the first n patches."""
    cpu, begin, first, seen = cpu_seconds(), time.perf_counter(), 0.0, 0
    batches = open_side()
    for batch in batches:
        counts = batch.counts if hasattr(batch, "counts") else batch[0]
        if not first:
            first, began, before = time.perf_counter() - begin, time.perf_counter(), len(counts)
        seen += len(counts)
        if seen >= n:
            break
    seconds = time.perf_counter() - began
    del batches, batch  # ends its workers, so that their time is counted
    return first, (seen - before) / seconds, seen / (cpu_seconds() - cpu)


def folder_bytes(*paths: Path | str) -> int:
    return sum(
        f.stat().st_size
        for path in map(Path, paths)
        for f in ([path] if path.is_file() else path.rglob("*"))
        if f.is_file()
    )


def main() -> None:
    """Measure, print a table, write the figures as JSON if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("slice", nargs="?", help="h5ad; default: a simulated slice")
    parser.add_argument("--organism", default="human", choices=["human", "mouse"])
    parser.add_argument("--windows", type=int, default=2048, help="samples in the shards, read once a round")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--codec", default="lz4", choices=["lz4", "zstd"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures here")
    args = parser.parse_args()

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        adata = load(args.slice, args.organism)
        curated = folder / "slice.h5ad"
        adata.write_h5ad(curated)
        grid = build(folder, adata, args.windows, args.codec, shard_mb=16)
        sides = Sides(folder, curated, args.codec)
        no_litdata = write_litdata(sides)
        multiprocessing.set_start_method("fork", force=True)  # litdata changes it for everybody
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

        n, few = args.windows, 2 * B
        tar_bytes = folder_bytes(*sides.tars)
        rows = {
            "raw copy": (sides.raw, n, folder_bytes(folder / "raw.npy")),
            "decode alone": (sides.decoding, n, tar_bytes),
        }
        for workers in args.workers:
            rows[f"stpatch, {workers} workers"] = (
                lambda w=workers: sides.stpatch(w),
                n,
                folder_bytes(folder / "train"),
            )
        rows["tarfile"] = (sides.tarfile, n - B, tar_bytes)
        for workers in args.workers:
            rows[f"webdataset, {workers} workers"] = (lambda w=workers: sides.webdataset(w), n - 8 * B, tar_bytes)
        if not no_litdata:
            for workers in args.workers:
                rows[f"litdata, {workers} workers"] = (
                    lambda w=workers: sides.litdata(w), n - 8 * B, folder_bytes(folder / "litdata"),
                )  # fmt: skip
        rows["live zarr"] = (sides.zarr, few, folder_bytes(folder / "grid.zarr"))
        rows["live anndata"] = (sides.anndata, few, folder_bytes(curated))

        seen = {name: [] for name in rows}
        for _ in range(args.rounds):
            for name, (side, patches, _) in rows.items():
                seen[name].append(time_one(side, patches))
        shutil.rmtree(folder / "litdata", ignore_errors=True)
    found = {
        name: dict(
            zip(("first_batch_s", "patches_per_s", "patches_per_cpu_s"), map(float, np.median(values, axis=0)), strict=True),
            bytes=rows[name][2],
        )
        for name, values in seen.items()
    }  # fmt: skip

    name = Path(args.slice).name if args.slice else "a simulated slice"
    print(
        f"{name}: {grid.n_spots} spots, {len(grid.gene_ids)} genes; {args.windows} windows {H} x {W} x {M}, {args.codec},"
    )
    print(f"{len(sides.tars)} tars; batches of {B}, {os.cpu_count()} cores, median of {args.rounds} rounds")
    print(f"{'':22s} {'patches/s':>10s} {'per CPU-s':>10s} {'first batch, ms':>16s} {'MB on disk':>11s}")
    for side, row in found.items():
        print(
            f"{side:22s} {row['patches_per_s']:10.0f} {row['patches_per_cpu_s']:10.0f} "
            f"{1000 * row['first_batch_s']:16.0f} {row['bytes'] / 1e6:11.1f}"
        )
    if no_litdata:
        print(f"litdata: {no_litdata}, left out")
    best = {
        kind: max(r["patches_per_s"] for s, r in found.items() if s.startswith(kind))
        for kind in ("stpatch", "webdataset")
    }
    ratios = {
        "best stpatch / best webdataset": best["stpatch"] / best["webdataset"],
        "per CPU-second, stpatch / webdataset, 0 workers": found["stpatch, 0 workers"]["patches_per_cpu_s"]
        / found["webdataset, 0 workers"]["patches_per_cpu_s"],
        "decode alone / stpatch, 0 workers": found["decode alone"]["patches_per_s"]
        / found["stpatch, 0 workers"]["patches_per_s"],
    }  # fmt: skip
    for what, ratio in ratios.items():
        print(f"{what}: {ratio:.2f}")
    if args.json:
        args.json.write_text(json.dumps({"slice": name, "ratios": ratios, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
