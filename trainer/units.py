"""What a site's feature is made of besides the site itself, in the units multispot (Eq. 3) and slice (Eq. 4).

The paper leaves open how neighbours weigh and how domains are found. Here a neighbour at a distance of r pitches
has the weight 1 / (1 + r), and domains are k-means clusters of what the sites show, without a random draw.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from trainer.data import LAYOUTS

ROUNDS = 10  # of Lloyd's iteration
FAR = 2**62
AT_ONCE = 2**24  # pairs of sites: bounds the memory


def lattice_places(rows: Tensor, cols: Tensor, layouts: Tensor, observed: Tensor) -> Tensor:
    """Where the sites of windows lie on the capture lattice, y and x in pitches: float64 [B, S, 2].

    From ``rows`` [B, h] and ``cols`` [B, w], lattice lines (-1 in padding), never from ranks: a grid closes the gap where a
    whole row is missing. ``layouts`` [B] are places in LAYOUTS; beside `offset`, staggered lattices are known by their
    ``observed`` [B, S] sites, which all have row + column even, or all odd.
    """
    shape = (len(rows), rows.shape[1], cols.shape[1])
    row = rows.double()[:, :, None].expand(shape).flatten(1)  # [B, S]
    col = cols.double()[:, None, :].expand(shape).flatten(1)
    offset = (layouts == LAYOUTS.index("offset"))[:, None]
    col = torch.where(offset, 2 * col + row % 2, col)
    odd = (row + col) % 2 > 0
    one_parity = ~((odd & observed).any(1) & (~odd & observed).any(1))
    staggered = offset | (one_parity & (layouts == LAYOUTS.index("rank")))[:, None]
    return torch.stack([torch.where(staggered, row * 0.75**0.5, row), torch.where(staggered, col / 2, col)], dim=2)


def mean_of_neighbours(features: Tensor, places: Tensor, observed: Tensor, k: int) -> Tensor:
    """Eq. 3: the weighted mean over a site and its ``k`` nearest observed sites (or all there are), [B, S, d]."""
    B, S, _ = features.shape
    step = max(1, AT_ONCE // (B * S))
    parts = [
        neighbour_weights(places, observed, k, slice(begin, begin + step)).to(features.dtype) @ features
        for begin in range(0, S, step)
    ]
    return torch.cat(parts, dim=1)


def neighbour_weights(places: Tensor, observed: Tensor, k: int, queries: slice = slice(None)) -> Tensor:
    """What each site (column) weighs in the mean of each queried one (row): float64 [B, queries, S], rows sum to 1.

    Of sites equally far, those that come first in the grid: whole-number keys, so that every device agrees.
    """
    S = places.shape[1]
    apart = [(places[:, queries, None, axis] - places[:, None, :, axis]).square() for axis in (0, 1)]  # [B, queries, S]
    key = (4 * (apart[0] + apart[1])).round().long() * S  # four squared pitches are whole on every lattice
    key = (key + torch.arange(S, device=key.device)).masked_fill(~observed[:, None, :], FAR)
    nearest, sites = key.topk(min(k + 1, S), dim=2, largest=False)
    weight = torch.where(nearest < FAR, 1 / (1 + (nearest // S).double().sqrt() / 2), 0.0)
    weights = torch.zeros(key.shape, dtype=weight.dtype, device=key.device).scatter(2, sites, weight)
    return weights / weights.sum(2, keepdim=True).clamp(min=1e-9)  # nothing observed: all zero


def mean_with_domain(features: Tensor, domain: Tensor, observed: Tensor, n_domains: int) -> Tensor:
    """Eq. 4: the mean of a site's feature and of the mean feature of its domain's observed sites, [B, S, d]."""
    member = F.one_hot(domain, n_domains).to(features.dtype)  # [B, S, n_domains]
    mean = _means(member * observed[:, :, None], features)
    return (features + member @ mean) / 2


@torch.no_grad()
def macro_domains(x: Tensor, observed: Tensor, n_domains: int) -> Tensor:
    """k-means clusters of the observed sites: int64 [B, S]; unobserved sites get the nearest, which they don't move.

    Of ``x`` [B, S, d], what the sites show. Deterministic: the centres start at observed sites evenly spread over the grid's
    order, ties go to the first cluster, and a cluster that loses all of its sites keeps its centre.
    """

    def nearest() -> Tensor:
        return (centres.square().sum(2)[:, None, :] - 2 * x @ centres.transpose(1, 2)).argmin(2)

    with torch.autocast(x.device.type, enabled=False):  # rounded distances would move sites between clusters
        x = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        ranks = (torch.arange(n_domains, device=x.device) + 0.5) / n_domains * observed.sum(1, keepdim=True)
        start = (~observed).int().argsort(dim=1, stable=True).gather(1, ranks.long().clamp(max=x.shape[1] - 1))
        centres = x.gather(1, start[:, :, None].expand(-1, -1, x.shape[2]))  # [B, n_domains, d]
        for _ in range(ROUNDS):
            member = F.one_hot(nearest(), n_domains).to(x.dtype) * observed[:, :, None]
            centres = torch.where((member.sum(1) > 0)[:, :, None], _means(member, x), centres)
        return nearest()


def _means(member: Tensor, x: Tensor) -> Tensor:
    """Mean of each cluster, [B, n_domains, d]; zero of an empty one."""
    return member.transpose(1, 2) @ x / member.sum(1)[:, :, None].clamp(min=1)
