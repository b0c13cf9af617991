"""Fill in hidden regions: ``python -m trainer.inpaint --model DIR --shards FILE --regions FILE --out FILE``.

In: a model folder, one whole-slice tar, and its regions; out: normalised expression at every hidden cell, as predicted from
the visible cells of its window alone (docs/format.md, regions and inpainted). The genes shown are those asked for. Where the
paper states no rule, it is this:

- *A hidden cell* is one that was observed: the model is told that a spot lies there, and nothing of what it holds. Its counts
  and its total are never gathered. A likelihood of counts needs a depth: the mean total of the window's visible spots.
- *Unit patch*: a hidden site is hidden whole and asks the visible ones. It is asked by others only where the model was trained
  with `mask_sites`: to another model a site that shows nothing is foreign (on cortex it cost .01 of R2). A window larger than
  those trained on is cut into tiles of the trained size, half a tile apart, the last flush with the border; a site's
  prediction is the mean over the tiles that cover it, each weighing one more than the visible spots it holds. A smaller
  window is padded at its far side.
- *Unit spot*: a hidden site sees nothing, so all get the same prediction, the model's bias.
- *Unit multispot*: the nearest visible sites, as many as in training; the site itself, which shows nothing, is none of them.
- *Unit slice*: the site that shows nothing, with the domain of its nearest visible site; domains are of the window's visible spots.
- *Offset*: what the visible spots of the window hold on average beyond what the model tells of them, gene by gene, is added to the
  hidden ones, times 1 - (sum over genes of its squared standard error) / (sum of its squares), 0 if that is negative (James and
  Stein, 1961; spots taken as independent, so rather too little shrunk): a model of a few axes can't raise one gene alone where tissue or depth does. ``--no-offset`` leaves it out. The unit
  spot has none: what it tells of a visible spot, it tells from that spot itself.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from trainer import units
from trainer.config import FORMAT_VERSION
from trainer.embed import WholeSlice, gene_means, lattice, origins, read_for, warn_if_unfamiliar
from trainer.errors import ConfigError, DamagedShards, TrainerError
from trainer.expression import log_normalise
from trainer.files import as_safetensors, read_sealed, room_for, write_whole
from trainer.model import MaskedAutoencoder, load
from trainer.ranks import pick_device

REGIONS_VERSION = 1
REDRAW = "delete the file and draw the regions again"


@dataclasses.dataclass(frozen=True)
class Regions:
    """Regions of one slice: R of them, m genes; cells are flat, y * W + x."""

    genes: np.ndarray  # int32 [m]: rows of the vocabulary, ascending
    region: np.ndarray  # int32 [R, 5]: window, side, repeat, y and x of the window's corner
    hidden: np.ndarray  # int32 [n]: hidden cells, region after region
    n_hidden: np.ndarray  # int32 [R]
    visible: np.ndarray  # int32: visible cells, region after region
    n_visible: np.ndarray  # int32 [R]

    @classmethod
    def read(cls, file: Path, whole: WholeSlice) -> Regions:
        """Read the regions of this slice; raises ConfigError where they are of another slice, or damaged."""
        try:
            content = read_sealed(file, REDRAW)
            tensors = safetensors.torch.load(content)
            regions = cls(*(tensors[field.name].numpy() for field in dataclasses.fields(cls)))
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            found = [header["__metadata__"][key] for key in ("format_version", "slice", "h", "w", "genes_sha256")]
        except TrainerError:
            raise
        except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
            raise ConfigError(file, " ".join(str(error).split()), "a file of regions", REDRAW) from error
        expected = [str(x) for x in (REGIONS_VERSION, whole.name, *whole.totals.shape, whole.facts["genes_sha256"])]
        if found != expected:
            next_step = "draw the regions of this slice's grid, with the vocabulary of its tar"
            raise ConfigError(file, f"format_version, slice, h, w, vocabulary {found}", expected, next_step)
        for cells, n in ((regions.hidden, regions.n_hidden), (regions.visible, regions.n_visible)):
            if len(n) != len(regions.region) or n.sum() != len(cells) or not np.isin(cells, _observed(whole)).all():
                raise ConfigError(file, "cells that were not observed", "those of its regions", REDRAW)
        return regions


def _observed(whole: WholeSlice) -> np.ndarray:
    return np.flatnonzero(whole.totals > 0)


@dataclasses.dataclass(frozen=True)
class Tile:
    """S = h * w sites that the model sees at once, of one region."""

    cells: np.ndarray  # int64 [S]: flat cell of each site; that of the visible ones alone is ever looked up
    visible: np.ndarray  # bool [S]
    hidden: np.ndarray  # bool [S]
    row: (
        np.ndarray
    )  # int64: of the hidden and visible sites, where they lie among all regions' hidden, then visible cells
    depth: float  # mean total of the window's visible spots, over target_sum
    region: int


def tiles(model: MaskedAutoencoder, whole: WholeSlice, regions: Regions, target_sum: float) -> list[Tile]:
    """What the model is shown of each region: tiles of the trained size for the unit patch, else the whole window."""
    cfg, (H, W) = model.cfg, whole.totals.shape
    totals = whole.totals.ravel().astype(np.float64)
    ends = np.cumsum(regions.n_hidden), np.cumsum(regions.n_visible)
    found = []
    for i, (window, _, _, y, x) in enumerate(regions.region.tolist()):
        hidden = regions.hidden[ends[0][i] - regions.n_hidden[i] : ends[0][i]]
        visible = regions.visible[ends[1][i] - regions.n_visible[i] : ends[1][i]]
        state = np.zeros(H * W, np.int8)
        state[visible], state[hidden] = 1, 2
        place = np.full(H * W, -1)
        place[hidden] = np.arange(ends[0][i] - regions.n_hidden[i], ends[0][i])
        place[visible] = len(regions.hidden) + np.arange(ends[1][i] - regions.n_visible[i], ends[1][i])
        depth = totals[visible].mean() / target_sum if len(visible) else 1.0
        h, w = (cfg.h, cfg.w) if cfg.unit == "patch" else (window, window)
        stride = max(1, min(h, w) // 2)
        for top in origins(window, h, stride):
            for left in origins(window, w, stride):
                rows, cols = y + top + np.arange(h)[:, None], x + left + np.arange(w)
                inside = (rows < min(y + window, H)) & (cols < min(x + window, W))
                cells = np.where(inside, rows * W + cols, 0).ravel()
                seen = np.where(inside.ravel(), state[cells], 0)
                if (seen == 2).any():
                    found.append(Tile(cells, seen == 1, seen == 2, place[cells[seen > 0]], depth, i))
    return found


def features(
    model: MaskedAutoencoder, values: Tensor, genes: Tensor, visible: Tensor, hidden: Tensor, attended: Tensor, places
) -> Tensor:
    """Features [B, S, d] of all sites, those of the hidden ones from the visible ones alone.

    ``values`` float [B, S, m], of no meaning where not visible; ``visible``, ``hidden``, ``attended`` bool [B, S]; ``places`` float64
    [B, S, 2] for the units multispot and slice, and for positions by distance.
    """
    cfg, masked = model.cfg, hidden[:, :, None].expand(values.shape)
    if cfg.unit == "patch":
        return model.encode(values, genes, attended, masked, places)
    shown = model.sum_genes(values, genes, masked)
    alone = model.transform(shown)
    if cfg.unit == "multispot":  # itself and k - 1 others in place of itself, which is not visible: k
        return units.mean_of_neighbours(alone, places, visible, cfg.neighbours - 1)
    if cfg.unit == "slice":
        nearest = units.neighbour_weights(places, visible, 0).argmax(2)  # a visible site's is itself
        domain = units.macro_domains(shown, visible, cfg.domains).gather(1, nearest)
        return units.mean_with_domain(alone, domain, visible, cfg.domains)
    return alone


def offset(residual: Tensor) -> Tensor:
    """Mean of float64 [v, m] over its rows, shrunk towards 0 by what chance would make of it; [m]. 0 of fewer than two rows."""
    if len(residual) < 2:
        return residual.new_zeros(residual.shape[1])
    mean, error = residual.mean(0), residual.var(0) / len(residual)
    return mean * (1 - error.sum() / mean.square().sum().clamp(min=1e-30)).clamp(min=0)


@torch.no_grad()
def inpaint(
    model: MaskedAutoencoder,
    whole: WholeSlice,
    regions: Regions,
    target_sum: float,
    batch_size: int,
    attend_hidden: bool = False,
    with_offset: bool = True,
) -> np.ndarray:
    """Predicted normalised expression at all hidden cells, float32 [n, m], in the order of ``regions.hidden``.

    ``attend_hidden``: whether hidden sites are keys of the attention, as they are under ``mask_sites`` unless positions are by
    distance. ``with_offset``: see the top. Raises DamagedShards where the slice did not measure the regions' genes.
    """
    device, m, n = model.gene_mean.device, len(regions.genes), len(regions.hidden)
    at = np.searchsorted(whole.genes, regions.genes).clip(max=len(whole.genes) - 1)
    if (whole.genes[at] != regions.genes).any():
        raise DamagedShards(whole.name, "a slice without some of the regions' genes", f"all {m} of them")
    counts, totals = whole.counts.reshape(len(whole.genes), -1)[at].T, whole.totals.ravel()  # [H * W, m], [H * W]
    genes = torch.from_numpy(regions.genes).to(device)
    places = lattice(whole) if model.needs_places or model.cfg.unit == "slice" else None
    centres = np.zeros((len(regions.region), m), np.float32)
    if model.cfg.inputs == "slice":  # about the mean of what is not hidden, region by region
        hidden_in = np.split(regions.hidden, np.cumsum(regions.n_hidden)[:-1])
        for i, gone in enumerate(hidden_in):
            centres[i] = gene_means(whole, at, np.setdiff1d(np.flatnonzero(totals > 0), gone), target_sum)

    rows = n + len(regions.visible)
    total, weight = torch.zeros(rows, m, dtype=torch.float64), torch.zeros(rows, 1, dtype=torch.float64)
    todo = tiles(model, whole, regions, target_sum)
    todo.sort(key=lambda tile: len(tile.cells))  # stable: windows of one size go together
    begin = 0
    while begin < len(todo):
        S = len(todo[begin].cells)
        batch = [tile for tile in todo[begin : begin + batch_size] if len(tile.cells) == S]
        begin += len(batch)
        visible, hidden = (np.stack([getattr(tile, name) for tile in batch]) for name in ("visible", "hidden"))
        cells = np.stack([tile.cells for tile in batch])
        shown, depth = np.zeros((len(batch), S, m), np.int32), np.zeros((len(batch), S), np.float32)
        shown[visible], depth[visible] = counts[cells[visible]], totals[cells[visible]]  # of no other cell
        tensors = (torch.from_numpy(array).to(device) for array in (shown, depth, visible, hidden))
        shown, depth, visible, hidden = tensors
        centre = torch.from_numpy(centres[[tile.region for tile in batch]])[:, None].to(device)  # [B, 1, m]
        values, chosen = log_normalise(shown, depth, target_sum) - centre, genes.expand(len(batch), -1)
        where = None if places is None else places[torch.from_numpy(cells)].to(device)
        attended = visible | hidden if attend_hidden else visible
        found = features(model, values, chosen, visible, hidden, attended, where)
        mean = torch.tensor([tile.depth for tile in batch], device=device, dtype=values.dtype)[:, None].expand(-1, S)
        scores = model.decode(found, chosen, attended, where)
        predicted = (model.predict(scores, chosen, mean) + centre).double().cpu()
        for tile, sites in zip(batch, predicted, strict=True):  # summed on the CPU, in a fixed order
            row, share = torch.from_numpy(tile.row), 1 + int(tile.visible.sum())
            total[row] += share * sites[torch.from_numpy(tile.hidden | tile.visible)]
            weight[row] += share
    n_hidden, n_visible = regions.n_hidden.tolist(), regions.n_visible.tolist()
    told = (total / weight).split([*n_hidden, *n_visible])  # NaN where no tile has been
    hidden, visible = told[: len(n_hidden)], told[len(n_hidden) :]
    if with_offset and model.cfg.unit != "spot":
        seen = counts[regions.visible].astype(np.int32), totals[regions.visible].astype(np.float64)
        held = log_normalise(*map(torch.from_numpy, seen), target_sum).split(n_visible)
        for region, values, known in zip(hidden, held, visible, strict=True):
            region += offset((values - known)[~known.isnan().any(1)])
    return torch.cat(hidden).float().numpy()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m trainer.inpaint", description=__doc__.partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="the folder trainer.pretrain wrote")
    parser.add_argument("--shards", type=Path, required=True, metavar="FILE", help="a whole-slice tar")
    parser.add_argument("--regions", type=Path, required=True, metavar="FILE", help="what to hide, and which genes")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="a .safetensors file")
    parser.add_argument("--batch-size", type=int, default=16, help="windows at a time (default 16)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--untrained", action="store_true", help="the same model before its first step: the control")
    parser.add_argument("--no-offset", action="store_true", help="what the model tells alone")
    args = parser.parse_args(argv)
    try:
        with room_for(args.out):
            run(args)
    except TrainerError as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    """Fill in the regions of the command line."""
    if args.batch_size < 1:
        raise ConfigError("inpaint", f"batch size {args.batch_size}", "at least 1", "change the flag")
    model, config, _ = load(args.model, untrained=args.untrained)
    model.to(pick_device(args.device))
    whole = read_for(config, args.shards)
    warn_if_unfamiliar(config, whole, args.shards)
    regions = Regions.read(args.regions, whole)
    attend_hidden = config["objective"]["mask_sites"] > 0 and model.cfg.positions != "distance"
    predicted = inpaint(
        model, whole, regions, config["data"]["target_sum"], args.batch_size, attend_hidden, not args.no_offset
    )
    simulated = {name: bool(facts["simulated"]) for name, facts in (("slice", whole.facts), ("model", config["data"]))}
    metadata = {
        "format_version": str(FORMAT_VERSION), "slice": whole.name,
        "model": "untrained" if args.untrained else args.model.resolve().name, "unit": model.cfg.unit,
        "simulated": str(any(simulated.values())).lower(),
        "pretrained_on_simulated": str(simulated["model"]).lower(),
        "offset": str(not args.no_offset and model.cfg.unit != "spot").lower(),
    }  # fmt: skip
    args.out.parent.mkdir(parents=True, exist_ok=True)
    tensors = {"Y": predicted, "cell": regions.hidden, "n_hidden": regions.n_hidden}
    write_whole(args.out, as_safetensors(tensors, metadata))
    name = whole.name + " (simulated)" * any(simulated.values())
    print(f"{name}: {len(regions.region):,} regions, {len(predicted):,} hidden spots -> {args.out}", flush=True)


if __name__ == "__main__":
    main()
