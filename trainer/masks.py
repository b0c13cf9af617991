"""Which (site, gene) entries are hidden: a pure function of (seed, epoch, position, site, gene).

No random state: every entry is a hash of what names it, so a CPU and a GPU, one rank and eight, and any way of
cutting the epoch into batches hide the same entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

VALIDATION = -1  # the "epoch" of validation: its masks stay the same throughout a run
_WORD = 0xFFFFFFFF


def entry_mask(seed: int, epoch: int, positions: Tensor, n_sites: int, genes: Tensor, ratio: float) -> Tensor:
    """Entries to hide, each with probability ``ratio`` and independently of all others.

    Parameters
    ----------
    seed, epoch
        Of the run; ``VALIDATION`` for held-out windows.
    positions
        [B] int64: each sample's position in the epoch's order (not in its batch).
    n_sites
        Sites of a window, S = h * w, row by row.
    genes
        [B, m] integer: rows of the vocabulary.
    ratio
        Expected fraction of entries to hide, 0 to 1.

    Returns
    -------
    bool [B, S, m]: True where the entry is hidden.
    """
    device = positions.device
    stream = _mix(_mix(seed & _WORD) ^ (epoch & _WORD))  # plain Python: nothing to copy to the device
    sample = _mix(positions ^ stream)  # [B]
    site = _mix(sample[:, None] ^ torch.arange(n_sites, device=device))  # [B, S]
    entry = _mix(site[:, :, None] ^ genes[:, None, :].long())  # [B, S, m]
    return entry < round(ratio * (_WORD + 1))


def _mix(word: int | Tensor) -> int | Tensor:
    """A bijection on 32-bit words that spreads every bit; tensors are int64, where its products cannot overflow."""
    for _ in range(2):
        word = ((word ^ (word >> 16)) * 0x45D9F3B) & _WORD
    return word ^ (word >> 16)
