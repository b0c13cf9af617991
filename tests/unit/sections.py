"""Sections for the tests of evaluation: planted labels on a lattice without gaps, and small slices with holes."""

from __future__ import annotations

import numpy as np
from scipy import sparse

from workflow.controls import Section, load_section
from workflow.simulate import tiny_slice


def tiny_section(tmp_path, name: str = "one", seed: int = 0, **kwargs) -> Section:
    path = tmp_path / f"{name}.h5ad"
    tiny_slice(seed=seed, name=name, **kwargs).write_h5ad(path)
    return load_section(path)


def full_section(name: str = "full", rows: int = 30, cols: int = 60, seed: int = 0, labels=None) -> Section:
    """A rectangle of the staggered lattice without gaps; labels: quadrants unless given."""
    row, col = (axis.ravel() for axis in np.mgrid[:rows, :cols])
    array = np.column_stack([row, col])[(row + col) % 2 == 0]
    counts = sparse.csr_matrix(np.random.default_rng(seed).poisson(1.0, (len(array), 70)))
    if labels is None:
        labels = np.array([f"q{2 * (r >= rows / 2) + (c >= cols / 2)}" for r, c in array], dtype=object)
    return Section(
        name=name,
        counts=counts,
        totals=np.asarray(counts.sum(axis=1)).ravel(),
        genes=np.array([f"ENSG{i:011d}" for i in range(70)], dtype=object),
        labels=labels,
        lattice="staggered",
        array=array,
        position=array[:, ::-1] * np.array([50.0, 50 * np.sqrt(3)]),
    )


def noise(sections, seed: int = 0) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {method: [rng.normal(size=(s.n_spots, 4)) for s in sections] for method in ("untrained", "stpatch")}
