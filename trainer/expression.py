"""Normalised expression and its expectation; torch twin of ``workflow/expression.py`` (a test holds them together)."""

from __future__ import annotations

import torch
from torch import Tensor

TERMS = 32  # counts that `expected_log_normalised` sums one by one


def log_normalise(counts: Tensor, totals: Tensor, target_sum: float) -> Tensor:
    """``log1p(count * target_sum / total)``, [..., m] of the type of ``totals``; zero where the total is zero.

    ``counts`` [..., m] of any integer type; ``totals`` float [...]: over *all* measured genes, 0 where nothing was observed.
    """
    scale = torch.where(totals > 0, target_sum / totals, 0.0)
    return torch.log1p(counts.to(totals.dtype) * scale[..., None])


def expected_log_normalised(mean: Tensor, scale: Tensor, dispersion: Tensor | None = None) -> Tensor:
    """E[log1p(count * scale)] of a Poisson count, or of a negative-binomial one: what minimises the squared error.

    Not ``log1p(mean * scale)``, which is far higher where counts are few (Jensen). The first ``TERMS`` counts are
    summed one by one; of the tail, mean and variance are exact and its shape is taken as log-normal. ``mean`` [..., m] is of
    counts; ``scale`` (target_sum / total) and ``dispersion`` (r, the variance being mean + mean^2 / r) broadcast with it.
    """
    if dispersion is None:
        p = torch.exp(-mean)  # of the count 0
    else:
        p = torch.exp(dispersion * (torch.log(dispersion) - torch.log(dispersion + mean)))
        odds = mean / (dispersion + mean)
    expected, mass, first, second = torch.zeros_like(p), p, torch.zeros_like(p), torch.zeros_like(p)
    for n in range(1, TERMS):
        p = p * (mean / n if dispersion is None else odds * (dispersion + n - 1) / n)
        expected, mass = expected + p * torch.log1p(n * scale), mass + p
        first, second = first + n * p, second + n * n * p
    rest = (1 - mass).clamp(min=1e-6)
    tail = (mean - first).clamp(min=0) / rest  # its mean
    square = (mean + mean.square() * (1 if dispersion is None else 1 + 1 / dispersion) - second) / rest
    spread = torch.log((square / tail.square().clamp(min=1)).clamp(min=1)) / 2
    return expected + torch.where(mass < 1 - 1e-6, rest * (torch.log1p(tail * scale) - spread), 0.0)
