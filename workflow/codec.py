"""Bytes of a sample: one Blosc buffer of counts, one of gene indices and totals. Threads are off: bytes must repeat."""

from __future__ import annotations

import json

import numpy as np
from numcodecs import Blosc, blosc

blosc.use_threads = False  # several threads give other bytes each time

_TO_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False).encode
LEVELS = {"lz4": 9, "zstd": 3}  # lz4 at 9 is 3% smaller than at 5 and as quick to read


def codec(name: str) -> Blosc:
    """The Blosc codec that the config names: ``lz4`` (fast) or ``zstd`` (smaller), always with bits shuffled."""
    return Blosc(cname=name, clevel=LEVELS[name], shuffle=Blosc.BITSHUFFLE)


def encode_counts(counts: np.ndarray, blosc_codec: Blosc) -> bytes:
    """uint16 [m, h, w] as one buffer, little-endian, channels first."""
    return blosc_codec.encode(np.ascontiguousarray(counts, dtype="<u2"))


def encode_sites(genes: np.ndarray, totals: np.ndarray, blosc_codec: Blosc) -> bytes:
    """int32 [m] gene indices, then float32 [h, w] totals, as one buffer of 4-byte items."""
    genes, totals = np.ascontiguousarray(genes, "<i4"), np.ascontiguousarray(totals, "<f4")
    return blosc_codec.encode(np.concatenate([genes.view("<u4"), totals.reshape(-1).view("<u4")]))


def encode_facts(facts: dict) -> bytes:
    """A sample's JSON: compact, in the order given."""
    return _TO_JSON(facts).encode()


def decode(counts: bytes, sites: bytes, facts: bytes) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict]:
    """Arrays of a sample from the data of its three members.

    Returns
    -------
    counts, genes, totals, facts
        uint16 [m, h, w], int32 [m], float32 [h, w], dict.
    """
    facts = json.loads(facts)
    m, h, w = facts["m"], facts["h"], facts["w"]
    sites = blosc.decompress(sites)
    return (
        np.frombuffer(blosc.decompress(counts), "<u2").reshape(m, h, w),
        np.frombuffer(sites, "<i4", count=m),
        np.frombuffer(sites, "<f4", offset=4 * m).reshape(h, w),
        facts,
    )
