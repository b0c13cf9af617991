"""Which (site, gene) entries are hidden: a pure function of (seed, epoch, position, site, gene).

No random state: every entry is a hash of what names it, so a CPU and a GPU, one rank and eight, and any way of
cutting the epoch into batches hide the same entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

VALIDATION = -1  # the "epoch" of validation: its masks stay the same throughout a run
_WORD = 0xFFFFFFFF


def entry_mask(seed: int, epoch: int | Tensor, positions: Tensor, n_sites: int, genes: Tensor, ratio: float) -> Tensor:
    """Entries to hide, bool [B, S, m]: each with probability ``ratio``, independently of all others.

    ``epoch`` may be an int64 tensor [], which keeps a compiled graph valid. ``positions`` int64 [B] are those of the samples
    in the epoch's order (not in their batch); ``n_sites`` is S = h * w, row by row; ``genes`` [B, m], rows of the vocabulary.
    """
    entry = _mix(_site_words(seed, epoch, positions, n_sites)[:, :, None] ^ genes[:, None, :].long())  # [B, S, m]
    return entry < round(ratio * (_WORD + 1))


def gene_mask(seed: int, epoch: int | Tensor, positions: Tensor, genes: Tensor, ratio: float) -> Tensor:
    """Genes to hide at every site of their window, bool [B, m]: each with probability ``ratio``."""
    word = _mix(_site_words(seed, epoch, positions, 1) ^ _WORD)  # [B, 1], apart from those of entries
    return _mix(word ^ genes.long()) < round(ratio * (_WORD + 1))


def site_mask(seed: int, epoch: int | Tensor, positions: Tensor, n_sites: int, ratio: float) -> Tensor:
    """Sites to hide whole, bool [B, S]: each with probability ``ratio``, apart from others and from `entry_mask`."""
    word = _mix(_site_words(seed, epoch, positions, n_sites) ^ _WORD)  # no gene has this index
    return word < round(ratio * (_WORD + 1))


def _site_words(seed: int, epoch: int | Tensor, positions: Tensor, n_sites: int) -> Tensor:
    """A word for every (seed, epoch, position, site), int64 [B, S]."""
    device = positions.device
    sample = _mix(positions ^ _mix((epoch & _WORD) ^ _mix(seed & _WORD)))  # [B]
    return _mix(sample[:, None] ^ torch.arange(n_sites, device=device))


def _mix(word: int | Tensor) -> int | Tensor:
    """A bijection on 32-bit words that spreads every bit; tensors are int64, where its products cannot overflow."""
    for _ in range(2):
        word = ((word ^ (word >> 16)) * 0x45D9F3B) & _WORD
    return word ^ (word >> 16)
