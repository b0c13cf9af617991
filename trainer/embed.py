"""Embed whole slices: ``python -m trainer.embed --model DIR --shards FILES... --out FILE``.

In: a model folder and whole-slice tars; out: a safetensors file a slice (docs/format.md, embeddings).

The rule, where the paper states none:

- *Unit patch*: windows of the trained size every ``stride`` cells (default: half their shorter side), the last one
  flush with the border; a slice smaller than the window is padded with unobserved cells at its far side. The embedding
  of a spot is the mean of the encoder's features over the windows that cover its cell.
- *Units spot, multispot, slice*: no windows; every site by itself, then its neighbours and domains in the whole slice.
- *Genes*: the ``genes`` (default: as many as a training window has) of the greatest variance of normalised expression
  over the slice's observed cells, ties to the lower index; all, where the slice measured fewer.
- Spots that layout ``bin`` merged into one cell share its embedding. Nothing is masked.

Memory is bounded, whatever ``genes`` and the batch: at most ``AT_ONCE`` values are normalised at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.config import FORMAT_VERSION
from trainer.data import FORMAT_VERSION as SHARDS_VERSION
from trainer.data import REBUILD, check_genes, decode, lattice_lines
from trainer.errors import ConfigError, DamagedShards, TrainerError, VocabularyMismatch
from trainer.expression import log_normalise
from trainer.files import as_safetensors, write_whole
from trainer.model import MaskedAutoencoder, load
from trainer.ranks import pick_device
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
            with tarfile.open(file) as tar:
                members = {member.name.partition(".")[2]: tar.extractfile(member).read() for member in tar}
            facts = json.loads(members["json"])
            counts, sites, cell = (members[f"{name}.blosc"] for name in ("counts", "sites", "cell"))
            name, m, h, w, *_ = (facts[key] for key in FACTS)
        except (OSError, tarfile.TarError, KeyError, ValueError, AttributeError) as error:
            found = f"{type(error).__name__}: {error}"
            raise DamagedShards(file, found=found, expected="a whole slice in a tar", next_step=REBUILD) from error
        if facts.get("format_version") != SHARDS_VERSION:
            found = f"format_version {facts.get('format_version')}"
            raise DamagedShards(file, found=found, expected=str(SHARDS_VERSION), next_step="update stpatch")
        sites = decode(sites, "<i4", m + h * w, f"{file}, sites")
        cell = decode(cell, "<i4", None, f"{file}, cell")
        if cell.min() < 0 or cell.max() >= h * w:
            found, expected = f"cells {cell.min()} to {cell.max()}", f"cells of a grid of {h} x {w}"
            raise DamagedShards(file, found=found, expected=expected, next_step=REBUILD)
        return cls(
            name=name,
            counts=decode(counts, "<u2", m * h * w, f"{file}, counts").reshape(m, h, w),
            genes=sites[:m],
            totals=sites[m:].view("<f4").reshape(h, w),
            cell=cell,
            facts=facts,
        )


def read_for(config: dict, file: Path) -> WholeSlice:
    """Read a slice that the model of this ``config.json`` can embed.

    Raises
    ------
    VocabularyMismatch
        Its gene indices count rows of another vocabulary, or it is to be normalised to another total.
    """
    whole, data = WholeSlice.read(file), config["data"]
    pairs = {"genes_sha256": data["genes"]["sha256"], "target_sum": data["target_sum"]}
    for key, trained in pairs.items():
        if whole.facts.get(key) != trained:
            next_step = "make the slice's tar with the model's genes.tsv and settings, or name the model made with it"
            expected = f"{trained}, as the model was trained with"
            raise VocabularyMismatch(
                file, found=f"{key} {whole.facts.get(key)}", expected=expected, next_step=next_step
            )
    check_genes(whole.genes, data["genes"]["n"], str(file))
    return whole


def warn_if_unfamiliar(config: dict, whole: WholeSlice, file: Path) -> None:
    """One line on stderr where the model of this ``config.json`` saw no slice of this layout and pitch."""
    trained = {(row["layout"], row["pitch_um"]) for row in config["data"]["slices"]}
    mine = (whole.facts["layout"], whole.facts["pitch_um"])
    if mine not in trained:
        *seen, mine = (f"layout {layout} at {pitch_um:g} um" for layout, pitch_um in [*sorted(trained), mine])
        print(f"warning: {file}: {mine}, but the model was trained on {', '.join(seen)}", file=sys.stderr, flush=True)


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


def origins(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along an axis: every ``stride`` cells, and one flush with the end."""
    last = max(0, length - window)
    return sorted({*range(0, last, stride), last})


@torch.no_grad()
def embed(
    model: MaskedAutoencoder, whole: WholeSlice, target_sum: float, stride: int, n_genes: int, batch_size: int
) -> dict[str, np.ndarray]:
    """Features of every spot.

    Returns
    -------
    ``X`` float32 [n_spots, d] and ``spot`` int32 [n_spots], 0, 1, 2, ...
    """
    chosen = most_variable(whole, target_sum, n_genes)
    counts = np.ascontiguousarray(whole.counts[chosen].transpose(1, 2, 0))  # [H, W, m]
    genes = torch.from_numpy(whole.genes[chosen]).to(model.gene_mean.device)
    if model.cfg.unit == "patch":
        features = embed_windows(model, whole, counts, genes, target_sum, stride, batch_size)
    else:
        features = embed_sites(model, whole, counts, genes, target_sum, batch_size * model.cfg.h * model.cfg.w)
    return {"X": features.float().numpy(), "spot": np.arange(len(whole.cell), dtype=np.int32)}


def embed_windows(
    model: MaskedAutoencoder,
    whole: WholeSlice,
    counts: np.ndarray,
    genes: Tensor,
    target_sum: float,
    stride: int,
    batch_size: int,
) -> Tensor:
    """Features of every spot, averaged over the windows that cover it: float64 [n_spots, d]."""
    cfg, (H, W) = model.cfg, whole.totals.shape
    pad = [(0, max(0, cfg.h - H)), (0, max(0, cfg.w - W))]
    counts, totals = np.pad(counts, [*pad, (0, 0)]), np.pad(whole.totals, pad)
    of_spot = np.divmod(whole.cell, W)  # y, x of every spot
    has_spot = np.zeros(totals.shape, bool)
    has_spot[of_spot] = True
    corners = [(y, x) for y in origins(H, cfg.h, stride) for x in origins(W, cfg.w, stride)]
    windows = [np.s_[y : y + cfg.h, x : x + cfg.w] for y, x in corners]
    windows = [window for window in windows if has_spot[window].any()]
    step = max(1, min(batch_size, AT_ONCE // (cfg.h * cfg.w * len(genes))))
    features = torch.zeros(*totals.shape, cfg.width, dtype=torch.float64)  # summed on the CPU, in a fixed order
    covered = torch.zeros(*totals.shape, 1, dtype=torch.float64)
    for begin in range(0, len(windows), step):
        some = windows[begin : begin + step]
        values, observed = expression(
            model, *(np.stack([a[window] for window in some]) for a in (counts, totals)), target_sum
        )
        encoded = model.encode(values, genes.expand(len(some), -1), observed).cpu()  # [B, S, d]
        for window, sites in zip(some, encoded, strict=True):
            features[window] += sites.view(cfg.h, cfg.w, -1)
            covered[window] += 1
    return features[of_spot] / covered[of_spot]


def embed_sites(
    model: MaskedAutoencoder, whole: WholeSlice, counts: np.ndarray, genes: Tensor, target_sum: float, at_once: int
) -> Tensor:
    """Features of every spot from its site alone, ``at_once`` by turns, then from the whole slice: [n_spots, d]."""
    counts, totals = counts.reshape(1, -1, len(genes)), whole.totals.reshape(1, -1)  # one sample of H * W sites
    step = max(1, min(at_once, AT_ONCE // len(genes)))
    shown, alone = [], []
    for begin in range(0, totals.size, step):
        values, _ = expression(model, *(a[:, begin : begin + step] for a in (counts, totals)), target_sum)
        shown.append(model.sum_genes(values, genes[None]))
        alone.append(model.transform(shown[-1]))
    observed, places = torch.from_numpy(totals > 0).to(genes.device), None
    if model.cfg.unit == "multispot":
        lines = (torch.from_numpy(np.asarray(lines)).to(genes.device) for lines in lattice_lines(whole.facts))
        places = lattice_places(*(line[None] for line in lines), observed)
    features = model.surround(torch.cat(shown, dim=1), torch.cat(alone, dim=1), observed, places)
    return features[0].cpu()[whole.cell]


def expression(
    model: MaskedAutoencoder, counts: np.ndarray, totals: np.ndarray, target_sum: float
) -> tuple[Tensor, Tensor]:
    """Values [B, S, m] and observed sites [B, S] on the model's device, of uint16 [B, ..., m] and float32 [B, ...]."""
    device = model.gene_mean.device
    totals = torch.from_numpy(np.ascontiguousarray(totals)).to(device).flatten(1)
    counts = torch.from_numpy(np.ascontiguousarray(counts)).to(device)
    return log_normalise(counts.flatten(1, -2), totals, target_sum), totals > 0


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.embed", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the folder trainer.pretrain wrote")
    parser.add_argument("--shards", type=Path, required=True, nargs="+", metavar="FILE", help="whole-slice tars")
    parser.add_argument("--out", type=Path, required=True, help="a .safetensors file, or a folder for several slices")
    parser.add_argument(
        "--stride", type=int, help="cells between windows of the unit patch (default: half the shorter side)"
    )
    parser.add_argument(
        "--genes", type=int, help="genes that a site shows, any number up to all measured (default: as trained)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="windows at a time (default 32)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--untrained", action="store_true", help="the same model before its first step: the control")
    args = parser.parse_args(argv)
    try:
        run(args)
    except TrainerError as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    """Embed each slice of the command line."""
    single = args.out.suffix == ".safetensors"
    if single and len(args.shards) > 1:
        found, expected = f"one file for {len(args.shards)} slices", "a folder"
        raise ConfigError("--out", found=found, expected=expected, next_step="name a folder")
    model, config, _ = load(args.model, untrained=args.untrained)
    cfg, target_sum = model.cfg, config["data"]["target_sum"]
    stride = max(1, min(cfg.h, cfg.w) // 2) if args.stride is None else args.stride
    n_genes = cfg.m if args.genes is None else args.genes
    if not (1 <= stride <= min(cfg.h, cfg.w) and n_genes >= 1 and args.batch_size >= 1):
        found = f"stride {stride}, genes {n_genes}, batch size {args.batch_size}"
        expected = f"a stride of 1 to {min(cfg.h, cfg.w)} (else spots lie between windows), the others at least 1"
        raise ConfigError("embed", found=found, expected=expected, next_step="change the flag")
    model.to(pick_device(args.device))

    for file in args.shards:
        whole = read_for(config, file)
        warn_if_unfamiliar(config, whole, file)
        embeddings = embed(model, whole, target_sum, stride, n_genes, args.batch_size)
        out = args.out if single else args.out / f"{whole.name}.safetensors"
        out.parent.mkdir(parents=True, exist_ok=True)
        simulated = bool(whole.facts["simulated"] or config["data"]["simulated"])
        metadata = {
            "format_version": str(FORMAT_VERSION),
            "slice": whole.name,
            "model": "untrained" if args.untrained else args.model.resolve().name,
            "genes_used": str(min(n_genes, len(whole.genes))),
            "stride": str(stride) if cfg.unit == "patch" else "none",
            "simulated": str(simulated).lower(),
        }
        write_whole(out, as_safetensors(embeddings, metadata))
        mark = " (simulated)" if simulated else ""
        print(
            f"{whole.name}{mark}: {len(embeddings['spot']):,} spots, {metadata['genes_used']} genes -> {out}",
            flush=True,
        )


if __name__ == "__main__":
    main()
