"""Embed whole slices: ``python -m trainer.embed --model DIR --shards FILES... --out FILE``.

In: a model folder and whole-slice tars; out: a safetensors file a slice (docs/format.md, embeddings). Nothing is masked. Where
the paper states no rule, it is this:

- *Unit patch*: the mean of the encoder's features over the windows that cover a spot's cell. Windows of the trained size come
  every ``stride`` cells (default: half their shorter side), the last one flush with the border; a slice smaller than the
  window is padded with unobserved cells at its far side.
- *Units spot, multispot, slice*: no windows; every site by itself, then its neighbours and domains in the whole slice.
- *Genes*: the ``genes`` (default: as many as a training window has) of the greatest variance of normalised expression
  over the slice's observed cells, ties to the lower index; all, where the slice measured fewer.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.config import FORMAT_VERSION
from trainer.data import FORMAT_VERSION as SHARDS_VERSION
from trainer.data import NAME, check_genes, decode, lattice_lines
from trainer.errors import ConfigError, DamagedShards, TrainerError, VocabularyMismatch
from trainer.expression import log_normalise
from trainer.files import as_safetensors, room_for, write_whole
from trainer.model import MaskedAutoencoder, load
from trainer.ranks import pick_device
from trainer.report import in_um
from trainer.units import lattice_places

FACTS = "slice m h w array_row array_col array_rows array_cols layout pitch_um simulated".split()  # of the JSON
AT_ONCE = 2**26  # values of normalised expression, four bytes each


@dataclasses.dataclass(frozen=True)
class WholeSlice:
    """One slice with every gene of the vocabulary that it measured."""

    name: str
    counts: np.ndarray  # uint16 [m, H, W]
    genes: np.ndarray  # int32 [m]: rows of the vocabulary, ascending
    totals: np.ndarray  # float32 [H, W]: 0 where nothing was observed
    cell: np.ndarray  # int32 [n_spots]: flat cell y * W + x of every spot of the curated slice
    facts: dict  # the sample's JSON

    @classmethod
    def read(cls, file: Path) -> WholeSlice:
        """Read ``shards/slices/{slice}.tar``; raises DamagedShards if it is not whole or of another version."""
        try:
            with tarfile.open(file, "r:") as tar:  # nothing compressed, which could swell
                members = {member.name.partition(".")[2]: tar.extractfile(member).read() for member in tar}
            facts = json.loads(members["json"])
            counts, sites, cell = (members[f"{name}.blosc"] for name in ("counts", "sites", "cell"))
            name, m, h, w, *_ = (facts[key] for key in FACTS)
            if not re.fullmatch(NAME, name):  # it becomes the name of a file
                raise ValueError(f"slice {name!r}")
            if facts.get("format_version") != SHARDS_VERSION:
                raise ValueError(f"format_version {facts.get('format_version')}, not {SHARDS_VERSION}")
            if not all(type(size) is int and size > 0 for size in (m, h, w)):
                raise ValueError(f"{m} genes of {h} x {w} cells")
        except (OSError, tarfile.TarError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            found = f"{type(error).__name__}: {error}"
            raise DamagedShards(file, found, f"a whole slice in a tar, version {SHARDS_VERSION}") from error
        counts = decode(counts, f"{file}, counts", "<u2", m * h * w).reshape(m, h, w)
        sites = decode(sites, f"{file}, sites", "<i4", m + h * w)
        cell = decode(cell, f"{file}, cell", "<i4")
        if cell.min() < 0 or cell.max() >= h * w:
            raise DamagedShards(file, f"cells {cell.min()} to {cell.max()}", f"cells of a grid of {h} x {w}")
        return cls(name, counts, sites[:m], sites[m:].view("<f4").reshape(h, w), cell, facts)


def read_for(config: dict, file: Path) -> WholeSlice:
    """Read a slice that the model of this ``config.json`` can embed.

    Raises VocabularyMismatch where its gene indices count rows of another vocabulary, or its total is to be another.
    """
    whole, data = WholeSlice.read(file), config["data"]
    for key, trained in {"genes_sha256": data["genes"]["sha256"], "target_sum": data["target_sum"]}.items():
        if whole.facts.get(key) != trained:
            next_step = "make the slice's tar with the model's genes.tsv and settings, or name the model made with it"
            expected = f"{trained}, as the model was trained with"
            raise VocabularyMismatch(file, f"{key} {whole.facts.get(key)}", expected, next_step)
    check_genes(whole.genes, data["genes"]["n"], str(file))
    return whole


def warn_if_unfamiliar(config: dict, whole: WholeSlice, file: Path) -> None:
    """One line on stderr where the model of this ``config.json`` saw no slice of this layout and pitch."""
    rows = (whole.facts, *config["data"]["slices"])
    mine, *trained = (f"layout {row['layout']} at {in_um(row['pitch_um'])}" for row in rows)
    if mine not in trained:
        trained = ", ".join(sorted(set(trained)))
        print(f"warning: {file}: {mine}, but the model was trained on {trained}", file=sys.stderr, flush=True)


def most_variable(whole: WholeSlice, target_sum: float, n: int) -> np.ndarray:
    """Positions among the slice's genes of the ``n`` most variable ones, ascending.

    Population variance of normalised expression over the observed cells, float64; ties go to the lower index.
    """
    observed = whole.totals > 0
    totals = torch.from_numpy(whole.totals[observed]).double()
    variance = np.zeros(len(whole.genes))
    for begin in range(0, len(whole.genes), 1024):  # a slice of 18,000 genes would take gigabytes at once
        counts = torch.from_numpy(whole.counts[begin : begin + 1024, observed].astype(np.int32)).T  # [spots, genes]
        if len(totals):
            variance[begin : begin + 1024] = log_normalise(counts, totals, target_sum).var(0, correction=0).numpy()
    return np.sort(np.argsort(-variance, kind="stable")[:n])


def gene_means(whole: WholeSlice, chosen: np.ndarray, cells: np.ndarray, target_sum: float) -> np.ndarray:
    """Mean normalised expression of the genes at these positions over these flat cells, float32 [len(chosen)]; 0 over none."""
    totals = torch.from_numpy(whole.totals.ravel()[cells]).double()
    mean = np.zeros(len(chosen))
    for begin in range(0, len(chosen) if len(cells) else 0, 1024):
        counts = whole.counts[chosen[begin : begin + 1024]].reshape(-1, whole.totals.size)[:, cells]
        values = log_normalise(torch.from_numpy(counts.astype(np.int32)).T, totals, target_sum)
        mean[begin : begin + 1024] = values.mean(0).numpy()
    return mean.astype(np.float32)


def lattice(whole: WholeSlice) -> Tensor:
    """Where each cell of the slice lies, y and x in pitches: float64 [H * W, 2]."""
    rows, cols, layout = (torch.from_numpy(np.asarray(lines))[None] for lines in lattice_lines(whole.facts))
    return lattice_places(rows, cols, layout, torch.from_numpy(whole.totals.ravel() > 0)[None])[0]


def origins(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along an axis: every ``stride`` cells, and one flush with the end."""
    last = max(0, length - window)
    return sorted({*range(0, last, stride), last})


@torch.no_grad()
def embed(
    model: MaskedAutoencoder, whole: WholeSlice, target_sum: float, stride: int, n_genes: int, batch_size: int
) -> dict[str, np.ndarray]:
    """Features of every spot: ``X`` float32 [n_spots, d] and ``spot`` int32 [n_spots], 0, 1, 2, ..."""
    cfg, (H, W) = model.cfg, whole.totals.shape
    chosen = most_variable(whole, target_sum, n_genes)
    pad = [(0, max(0, cfg.h - H)), (0, max(0, cfg.w - W))] if cfg.unit == "patch" else [(0, 0), (0, 0)]
    arrays = whole.genes[chosen], np.pad(whole.counts[chosen], [(0, 0), *pad]), np.pad(whole.totals, pad)
    genes, counts, totals = (torch.from_numpy(array).to(model.gene_mean.device) for array in arrays)
    cells = cfg.h * cfg.w
    step = max(1, min(batch_size, AT_ONCE // (cells * len(genes))))  # windows, or as many cells
    centre = torch.zeros(len(genes), device=genes.device)
    if cfg.inputs == "slice":
        centre += torch.from_numpy(gene_means(whole, chosen, np.flatnonzero(whole.totals > 0), target_sum)).to(centre)

    def show(cells: tuple[slice, slice]) -> Tensor:
        values = log_normalise(counts[:, *cells].permute(1, 2, 0), totals[cells], target_sum)
        return values.flatten(0, 1) - centre  # [S, m]

    y, x = np.divmod(whole.cell, W)
    if cfg.unit == "patch":
        has_spot = np.zeros(totals.shape, bool)
        has_spot[y, x] = True
        windows = [
            np.s_[i : i + cfg.h, j : j + cfg.w] for i in origins(H, cfg.h, stride) for j in origins(W, cfg.w, stride)
        ]
        windows = [window for window in windows if has_spot[window].any()]
        if model.needs_places:  # of padding any: it is never a key
            places = torch.from_numpy(np.pad(lattice(whole).numpy().reshape(H, W, 2), [*pad, (0, 0)]))
        features = torch.zeros(*totals.shape, cfg.width, dtype=torch.float64)  # summed on the CPU, in a fixed order
        covered = torch.zeros(*totals.shape, 1, dtype=torch.float64)
        for begin in range(0, len(windows), step):
            some = windows[begin : begin + step]
            values = torch.stack([show(window) for window in some])
            observed = torch.stack([totals[window].flatten() > 0 for window in some])
            where = None
            if model.needs_places:
                where = torch.stack([places[window].flatten(0, 1) for window in some]).to(genes.device)
            encoded = model.encode(values, genes.expand(len(some), -1), observed, None, where).cpu()  # [B, S, d]
            for window, sites in zip(some, encoded, strict=True):
                features[window] += sites.view(cfg.h, cfg.w, -1)
                covered[window] += 1
        features = features[y, x] / covered[y, x]
    else:  # every site by itself, some lines by turns; then its neighbours and domain in the whole slice
        lines, shown, alone = max(1, step * cells // W), [], []
        for begin in range(0, H, lines):
            shown.append(model.sum_genes(show(np.s_[begin : begin + lines, :])[None], genes[None]))
            alone.append(model.transform(shown[-1]))
        observed, places = totals.flatten()[None] > 0, None
        if cfg.unit == "multispot":
            places = lattice(whole)[None].to(genes.device)
        features = model.surround(torch.cat(shown, dim=1), torch.cat(alone, dim=1), observed, places)[0].cpu()[
            whole.cell
        ]
    return {"X": features.float().numpy(), "spot": np.arange(len(whole.cell), dtype=np.int32)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.embed", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the folder trainer.pretrain wrote")
    parser.add_argument("--shards", type=Path, required=True, nargs="+", metavar="FILE", help="whole-slice tars")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file, or a folder for several slices")
    parser.add_argument("--stride", type=int, help="cells between windows (default: half the shorter side)")
    parser.add_argument("--genes", type=int, help="genes of a site, up to all measured (default: as trained)")
    parser.add_argument("--batch-size", type=int, default=32, help="windows at a time (default 32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--untrained", action="store_true", help="the same model before its first step: the control")
    args = parser.parse_args(argv)
    try:
        with room_for(args.out):
            run(args)
    except TrainerError as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    """Embed each slice of the command line."""
    single = args.out.suffix == ".safetensors"
    if single and len(args.shards) > 1:
        raise ConfigError("--out", f"one file for {len(args.shards)} slices", "a folder", "name a folder")
    model, config, _ = load(args.model, untrained=args.untrained)
    cfg, target_sum = model.cfg, config["data"]["target_sum"]
    stride = max(1, min(cfg.h, cfg.w) // 2) if args.stride is None else args.stride
    n_genes = cfg.m if args.genes is None else args.genes
    if not (1 <= stride <= min(cfg.h, cfg.w) and n_genes >= 1 and args.batch_size >= 1):
        found = f"stride {stride}, genes {n_genes}, batch size {args.batch_size}"
        expected = f"a stride of 1 to {min(cfg.h, cfg.w)} (else spots lie between windows), the others at least 1"
        raise ConfigError("embed", found, expected, "change the flag")
    model.to(pick_device(args.device))

    for file in args.shards:
        whole = read_for(config, file)
        warn_if_unfamiliar(config, whole, file)
        embeddings = embed(model, whole, target_sum, stride, n_genes, args.batch_size)
        out = args.out if single else args.out / f"{whole.name}.safetensors"
        out.parent.mkdir(parents=True, exist_ok=True)
        simulated = bool(whole.facts["simulated"] or config["data"]["simulated"])
        metadata = {
            "format_version": str(FORMAT_VERSION), "slice": whole.name,
            "model": "untrained" if args.untrained else args.model.resolve().name,
            "genes_used": str(min(n_genes, len(whole.genes))),
            "stride": str(stride) if cfg.unit == "patch" else "none", "simulated": str(simulated).lower(),
        }  # fmt: skip
        write_whole(out, as_safetensors(embeddings, metadata))
        name = whole.name + " (simulated)" * simulated
        print(f"{name}: {len(embeddings['spot']):,} spots, {metadata['genes_used']} genes -> {out}", flush=True)


if __name__ == "__main__":
    main()
