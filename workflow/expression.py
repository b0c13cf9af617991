"""Normalised expression: one definition for numpy (its twin in torch lies in `trainer/`)."""

from __future__ import annotations

import numpy as np


def log_normalise(counts, totals, target_sum: float, dtype=np.float64) -> np.ndarray:
    """Normalised expression ``log1p(count * target_sum / total)`` of raw counts.

    Parameters
    ----------
    counts
        Raw counts, any shape.
    totals
        Total counts of the spot each count belongs to; broadcast against `counts` (``totals[:, None]`` for spots x
        genes, ``np.repeat(totals, np.diff(x.indptr))`` for the ``data`` of a CSR matrix). Where a total is 0 nothing
        was observed, and the value is 0.
    target_sum
        Counts to which every spot is scaled.
    dtype
        Type of the result; the computation itself is in float64.

    Returns
    -------
    numpy.ndarray
        Of the broadcast shape.
    """
    totals = np.asarray(totals, dtype=np.float64)
    per_count = np.divide(float(target_sum), totals, out=np.zeros_like(totals), where=totals > 0)
    return np.log1p(np.asarray(counts) * per_count).astype(dtype, copy=False)
