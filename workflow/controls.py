"""What a pretrained encoder has to beat: features of labelled slices that need no pretraining.

All features of a dataset are made on all of its admitted sections, without labels. Neighbours come from the capture
lattice (or from positions where there is none), never from the compacted grid and never across sections.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from scipy import sparse
from scipy.linalg import eigh
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA

from workflow.errors import TooFewCommonGenes
from workflow.expression import log_normalise
from workflow.keys import Keys
from workflow.reading import read_slice

N_RAW = 512  # genes of `raw`: as many as the paper draws for a patch
N_VARIABLE = 2000  # genes of `pca`
N_COMPONENTS = 50
N_DIRECTIONS, DIRECTIONS_OVER = 12, 18  # neighbours whose mean a spatial direction should keep
NEGLIGIBLE = 1e-9  # of the mean variance of a component: what is left of it has at least as much
RINGS = {6: 1, 18: 2, 36: 3}  # neighbours of a spot -> rings of the hexagonal lattice
SECTION_APART = 1e4  # `coordinates_section`: section index times this, in micrometres: more than a capture area is wide


@dataclass
class Section:
    """One slice as evaluation sees it; n spots, k genes.

    Attributes
    ----------
    counts
        CSR int [n, k], raw counts.
    totals
        int64 [n], counts over all genes that the source measured.
    genes
        str [k], Ensembl ids.
    labels
        object [n], the source's domain label; None where it has none.
    array
        int [n, 2], row and column on the capture lattice; None where there is no lattice.
    position
        float64 [n, 2], x and y; micrometres unless `position_unit` says pixels or pitches.
    donor
        As the catalogue has it; "" where it is unknown.
    """

    name: str
    counts: sparse.csr_matrix
    totals: np.ndarray
    genes: np.ndarray
    labels: np.ndarray
    lattice: str
    array: np.ndarray | None
    position: np.ndarray
    position_unit: str = "micrometres"
    simulated: bool = False
    donor: str = ""

    @property
    def n_spots(self) -> int:
        return self.counts.shape[0]


def load_section(path: str | Path) -> Section:
    """A curated slice (docs/format.md) as a `Section`.

    The position is that on the capture lattice, in micrometres; without a lattice the pixels, scaled where the scale
    is known.
    """
    slice_ = read_slice(path)
    about = slice_.uns[Keys.STPATCH]
    row = json.loads(about["row"])
    lattice, array = str(about["lattice"]["kind"]), None
    if lattice == "none":
        scale = float(about["lattice"]["um_per_px"])
        position = np.asarray(slice_.obsm[Keys.SPATIAL], dtype=np.float64) * (scale if np.isfinite(scale) else 1.0)
        unit = "micrometres" if np.isfinite(scale) else "pixels"
    else:
        array = slice_.obs[[Keys.ARRAY_ROW, Keys.ARRAY_COL]].to_numpy(dtype=np.int64)
        known_pitch = np.isfinite(float(about["lattice"]["pitch_um"]))  # square lattices may lack it
        pitch = float(about["lattice"]["pitch_um"]) if known_pitch else 1.0
        step = (pitch / 2, pitch * np.sqrt(3) / 2) if lattice == "staggered" else (pitch, pitch)
        position, unit = array[:, ::-1] * np.array(step), "micrometres" if known_pitch else "pitches"
    labels = np.full(slice_.n_obs, None, dtype=object)
    if Keys.LABEL in slice_.obs:
        known = slice_.obs[Keys.LABEL].notna().to_numpy()
        labels[known] = slice_.obs[Keys.LABEL].astype(str).to_numpy()[known]
    return Section(
        name=str(about["slice"]),
        counts=sparse.csr_matrix(slice_.X),
        totals=slice_.obs[Keys.TOTAL_COUNTS].to_numpy(dtype=np.int64),
        genes=slice_.var_names.to_numpy(dtype=object),
        labels=labels,
        lattice=lattice,
        array=array,
        position=position,
        position_unit=unit,
        simulated=row.get("source") == "simulated",
        donor=row.get("donor", ""),
    )


def hexagonal_offsets(rings: int) -> np.ndarray:
    """Steps (row, column) to all spots at most `rings` rings away on the staggered lattice, int [3 r (r+1) + 1, 2].

    A neighbour in the same row is two columns away, one in the next row one column; the zero step is included.
    """
    steps = [
        (row, col)
        for row in range(-rings, rings + 1)
        for col in range(-2 * rings, 2 * rings + 1)
        if (row + col) % 2 == 0 and max(abs(row), (abs(row) + abs(col)) // 2) <= rings
    ]
    return np.array(steps)


def neighbours(section: Section, n: int) -> sparse.csr_matrix:
    """Who belongs to the neighbourhood of whom, the spot itself included.

    On a staggered lattice the n spots are rings of hexagons (6, 18 or 36 spots: 1, 2 or 3 rings), of which those in
    tissue count, so a border spot has fewer. Elsewhere they are the n nearest by array distance (square lattice) or by
    position (no lattice), equal distances in the order of the spots.

    Returns
    -------
    CSR float64 [n_spots, n_spots] of zeros and ones, indices sorted.
    """
    if section.lattice == "staggered":
        rows, cols = _rings(section.array, RINGS[n])
    else:
        rows, cols = nearest(section.position if section.array is None else section.array, n)
    size = (section.n_spots, section.n_spots)
    near = sparse.csr_matrix((np.ones(len(rows)), (rows, cols)), shape=size)
    near.sort_indices()
    return near


def _rings(array: np.ndarray, rings: int) -> tuple[np.ndarray, np.ndarray]:
    margin = 2 * rings
    origin = array.min(axis=0) - margin
    at = array - origin
    spot = np.full(at.max(axis=0) + margin + 1, -1, dtype=np.int64)
    spot[at[:, 0], at[:, 1]] = np.arange(len(at))
    steps = hexagonal_offsets(rings)
    found = spot[at[:, :1] + steps[:, 0], at[:, 1:] + steps[:, 1]]  # [n, steps]
    rows, step = np.nonzero(found >= 0)
    return rows, found[rows, step]


def nearest(position: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
    wanted = min(n + 1, len(position))
    # More than wanted are asked for, so that the order among equal distances is ours and not the tree's.
    asked = min(2 * n + 16, len(position))
    distance, index = cKDTree(position).query(position, k=np.arange(1, asked + 1))
    order = np.lexsort((index, np.round(distance, 6)))
    index = np.take_along_axis(index, order, axis=1)[:, :wanted]
    return np.repeat(np.arange(len(position)), wanted), index.ravel()


def neighbour_mean(features: np.ndarray, near: sparse.csr_matrix) -> np.ndarray:
    """Mean of each spot's neighbourhood, the spot itself included; float64 [n_spots, d]."""
    return (near @ features) / np.asarray(near.sum(axis=1)).reshape(-1, 1)


def common_genes(sections: list[Section]) -> np.ndarray:
    """Genes that every section measured, sorted."""
    common = set(sections[0].genes).intersection(*(section.genes for section in sections[1:]))
    return np.array(sorted(common), dtype=object)


def normalised(section: Section, genes: np.ndarray, target_sum: float) -> sparse.csr_matrix:
    """Normalised expression of the named genes, CSR float64 [n_spots, len(genes)]."""
    columns = pd.Index(section.genes).get_indexer(genes)
    values = section.counts[:, columns].tocsr().astype(np.float64)
    values.data = log_normalise(values.data, np.repeat(section.totals, np.diff(values.indptr)), target_sum)
    return values


def most_variable(expression: list[sparse.csr_matrix], n: int) -> np.ndarray:
    """Columns of the n greatest variances over the spots of all sections, ascending; equal variances by column.

    Plain variance of the normalised expression: on DLPFC a stronger control than variance relative to the mean (k-NN
    accuracy of `pca` .69 against .59 under random20, .65 against .53 under leave_section, two sections).
    """
    n_spots = sum(matrix.shape[0] for matrix in expression)
    mean = sum(np.asarray(matrix.sum(axis=0)).ravel() for matrix in expression) / n_spots
    square = sum(np.asarray(matrix.multiply(matrix).sum(axis=0)).ravel() for matrix in expression) / n_spots
    return np.sort(np.argsort(-(square - mean**2), kind="stable")[:n])


def principal_components(expression: list[sparse.csr_matrix], n: int = N_COMPONENTS) -> list[np.ndarray]:
    """Scores on the first n principal components of all sections together, float64 [n_spots, n] each.

    By scikit-learn, from the eigenvectors of the covariance: no random state, and signs by its rule, so the same
    counts give the same numbers.
    """
    scores = PCA(n, svd_solver="covariance_eigh").fit_transform(sparse.vstack(expression).toarray())
    return np.split(scores, np.cumsum([matrix.shape[0] for matrix in expression])[:-1])


def centre(features: np.ndarray) -> np.ndarray:
    """One section's features with mean 0 each over its spots; rows of NaN (spots without features) stay out."""
    return features - np.nanmean(features, axis=0)


def standardise(features: np.ndarray) -> np.ndarray:
    """One section's features with mean 0 and standard deviation 1 each over its spots; constant ones become 0."""
    spread = np.nanstd(features, axis=0)
    return centre(features) / np.where(spread > 0, spread, 1.0)


def spatial_directions(sections: list[Section], pca: list[np.ndarray]) -> dict[str, list[np.ndarray]]:
    """The directions among principal components that vary smoothly in space, averaged: no model, no label.

    With M a spot's mean over itself and 18 neighbours and R = x - M, of components x centred by section: the first 12
    solutions of cov(M) v = w cov(R) v, scaled so that v' cov(R) v = 1 (the greatest entry of each positive), then
    averaged over 18 or 36 neighbours.

    Parameters
    ----------
    pca
        float64 [n_spots, d] a section, the components.

    Returns
    -------
    dict
        `spatial_directions_18`, `_36` -> float64 [n_spots, 12] a section (d, where there are fewer).
    """
    near = {n: [neighbours(section, n) for section in sections] for n in (18, 36)}
    centred = [centre(x) for x in pca]
    means = [neighbour_mean(x, of) for x, of in zip(centred, near[DIRECTIONS_OVER], strict=True)]
    left = np.concatenate(centred) - np.concatenate(means)
    smooth, rest = (np.atleast_2d(np.cov(x, rowvar=False)) for x in (np.concatenate(means), left))
    least = (
        NEGLIGIBLE * np.concatenate(centred).var(axis=0).mean()
    )  # lonely spots are their own means, with nothing left
    rest += max(least, 1e-12) * np.eye(len(rest))
    _, directions = eigh(smooth, rest)
    kept = directions[:, ::-1][:, :N_DIRECTIONS]  # the largest first
    kept = kept * np.sign(kept[np.abs(kept).argmax(axis=0), np.arange(kept.shape[1])])
    return {
        f"spatial_directions_{n}": [neighbour_mean(x @ kept, of) for x, of in zip(centred, of_all, strict=True)]
        for n, of_all in near.items()
    }


def control_features(sections: list[Section], target_sum: float) -> dict[str, list[np.ndarray]]:
    """Features of every control but the majority class, one float64 [n_spots, d] a section.

    `coordinates`: position. `coordinates_section`: besides, the section's index times 1e4 (only where there are
    several). `raw`: normalised expression of the 512 genes that vary most. `pca`: 50 components of the 2,000 that vary
    most. `neighbour_mean_6`, `_18`, `_36`: mean of `pca` over the spot and its neighbours. `spatial_directions_18`,
    `_36`: of its smoothest directions.

    Raises
    ------
    TooFewCommonGenes
        If fewer than 50 genes, the components of `pca`, were measured by every section.
    """
    features = {"coordinates": [section.position for section in sections]}
    if len(sections) > 1:
        features["coordinates_section"] = [
            np.column_stack([section.position, np.full(section.n_spots, index * SECTION_APART)])
            for index, section in enumerate(sections)
        ]
    genes = common_genes(sections)
    if len(genes) < N_COMPONENTS:
        raise TooFewCommonGenes(
            slice=", ".join(section.name for section in sections),
            found=f"{len(genes)} genes that all {len(sections)} sections measured",
            expected=f"at least {N_COMPONENTS}, the components of `pca`",
            next_step="check that the sections are of one organism and panel, or give them splits of their own "
            "in the catalogue",
        )
    expression = [normalised(section, genes, target_sum) for section in sections]
    raw = most_variable(expression, N_RAW)
    features["raw"] = [matrix[:, raw].toarray() for matrix in expression]
    variable = most_variable(expression, N_VARIABLE)
    features["pca"] = principal_components([matrix[:, variable] for matrix in expression])
    for n in RINGS:
        features[f"neighbour_mean_{n}"] = [
            neighbour_mean(pca, neighbours(section, n)) for pca, section in zip(features["pca"], sections, strict=True)
        ]
    return features | spatial_directions(sections, features["pca"])
