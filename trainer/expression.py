"""Normalised expression, the torch twin of ``workflow/expression.py`` (a test holds them together)."""

from __future__ import annotations

import torch
from torch import Tensor


def log_normalise(counts: Tensor, totals: Tensor, target_sum: float) -> Tensor:
    """``log1p(count * target_sum / total)``; zero where the total is zero.

    Parameters
    ----------
    counts
        [..., m], any integer type: raw counts, the genes last.
    totals
        [...], float: a site's total over *all* measured genes, 0 where nothing was observed.
    target_sum
        The total that every site is scaled to.

    Returns
    -------
    Float tensor [..., m] of the type of ``totals``.
    """
    scale = torch.where(totals > 0, target_sum / totals, 0.0)
    return torch.log1p(counts.to(totals.dtype) * scale[..., None])
