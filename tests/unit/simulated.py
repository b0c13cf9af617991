"""One small simulated slice, shared by the tests of simulator, readers and curate."""

from __future__ import annotations

import functools

from tests.conftest import ROOT
from workflow.deposits import Slice
from workflow.simulate import Settings, simulate_slice

GENE_TABLES = ROOT / "catalogue" / "aux"
SETTINGS = Settings(n_genes=150, median_depth=300.0, programme_genes=40, ambient_depth=5.0)


@functools.cache
def small_slice() -> Slice:
    """A whole capture area of 150 genes (simulated)."""
    return simulate_slice("sim_t", "sim_donor_t", GENE_TABLES / "genes_human.tsv", SETTINGS)


def row(**changes: str) -> dict[str, str]:
    """A catalogue row for it."""
    return {
        "slice": "sim_t",
        "source": "file",
        "url": "",
        "format": "auto",
        "organism": "human",
        "labels": "",
        "label_column": "",
    } | changes
