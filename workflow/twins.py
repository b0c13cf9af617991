"""Which sketches show the same tissue (workflow/sketch.py says what a sketch is).

By sites: part of the sampled entries of either slice that the other has too, on the genes that both measured (containment: of the
smaller, so that a crop counts). All against all is one sparse product of slices and hashes.

By spots, where a slice has no array coordinates of its own, or another's origin or direction: two slices whose spots hold the same
pairs of rare entries are candidates (an inverted index again), and the lattice decides: each (gene, count) that is rare in both votes for the
translations that bring its spots together, under each of the lattice's symmetries (hexagonal 12, square 8). The votes of the best one, as a part
of the rare entries that could have voted, are the containment. Without a lattice the shared pairs themselves are.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import sparse

from workflow.sketch import Sketch, mix, pair_hash, site_hash

DUPLICATE = 0.5  # containment from which two slices show the same tissue
FEWEST = 32  # entries on which a containment is believed
# Pairs of rare entries in a spot that two sections may share by chance (9 of 3,600 at most among real ones): more is worth a look.
CANDIDATE, CANDIDATE_PART = 6, 0.005
LOWEST_OF_SPOT = 8  # rare entries of a spot that are paired
SETS_AT_ONCE = 128


@dataclass(frozen=True)
class Match:
    """Two slices that show the same tissue: `containment` of `compared` sampled entries, found `how`."""

    first: str
    second: str
    containment: float
    compared: int
    how: str

    @property
    def evidence(self) -> str:
        """For the tables."""
        return f"containment {self.containment:.2f} of {self.compared} sampled entries ({self.how})"


def find_twins(sketches: list[Sketch]) -> tuple[list[Match], dict[str, int]]:
    """Compare every slice with every other.

    Returns
    -------
    matches
        Pairs of at least half containment, in the order of the slices' names; each once.
    unchecked
        Slice -> number of others that it could not be compared with: too few sampled entries on genes that both measured.
    """
    sketches = sorted(sketches, key=lambda sketch: sketch.slice)
    n = len(sketches)
    containment, compared = np.zeros((n, n)), np.zeros((n, n), dtype=np.int64)
    for at, shared, fewer in by_sites(sketches):
        block, enough = np.ix_(at, at), fewer >= FEWEST
        containment[block] = np.divide(shared, fewer, out=containment[block], where=enough)
        compared[block] = np.where(enough, fewer, compared[block])
    checked = (compared > 0) | np.eye(n, dtype=bool)
    matches: dict[tuple[int, int], Match] = {}
    for i, j in np.argwhere(np.triu(containment >= DUPLICATE, 1)).tolist():
        evidence = float(containment[i, j]), int(compared[i, j]), "same array positions"
        matches[i, j] = Match(sketches[i].slice, sketches[j].slice, *evidence)
    for at, shared, fewer in by_spots(sketches):
        checked[np.ix_(at, at)] |= fewer >= FEWEST
        for i, j in at[np.argwhere(np.triu(shared > np.maximum(CANDIDATE, CANDIDATE_PART * fewer), 1))].tolist():
            if (i, j) not in matches and (match := align(sketches[i], sketches[j])):
                matches[i, j] = match
    unchecked = {sketch.slice: int(row.sum()) for sketch, row in zip(sketches, ~checked, strict=True) if row.any()}
    return [matches[pair] for pair in sorted(matches)], unchecked


def by_sites(sketches: list[Sketch]):
    """Entries that pairs of the slices `at` share, and the fewer of the two slices' entries on common genes; coarse samples first.

    A pair of shallow slices comes again with its finer sample, which then counts.
    """
    placed = np.array([sketch.source == "array" for sketch in sketches], dtype=bool)
    thresholds = np.array([sketch.sites_threshold for sketch in sketches], dtype=np.uint64)
    for threshold in np.unique(thresholds[placed]):
        at = np.flatnonzero(placed & (thresholds >= threshold))
        entries = [sites_within(sketches[i], threshold) for i in at]
        on_common = _on_common_genes([sketches[i].genes for i in at], [part["gene"] for part, _ in entries])
        yield at, _shared([keys for _, keys in entries]), np.minimum(on_common, on_common.T)


def by_spots(sketches: list[Sketch]):
    """The same of pairs of rare entries in a spot; compared: the fewer of pairs, and of rare entries on common genes."""
    thresholds = np.array([sketch.rare_threshold for sketch in sketches], dtype=np.uint64)
    for threshold in np.unique(thresholds):
        at = np.flatnonzero(thresholds >= threshold)
        entries = [rare_within(sketches[i], threshold) for i in at]
        keys = [spot_pairs(*part) for part in entries]
        on_common = _on_common_genes([sketches[i].genes for i in at], [part["gene"] for part, _ in entries])
        size = np.array([len(part) for part in keys])
        yield at, _shared(keys), np.minimum(np.minimum.outer(size, size), np.minimum(on_common, on_common.T))


def sites_within(sketch: Sketch, threshold: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """Entries of the sample `sites` with a hash up to the threshold, and these hashes."""
    keys = site_hash(*(sketch.sites[field] for field in ("gene", "row", "col", "count")))
    return sketch.sites[keys <= threshold], keys[keys <= threshold]


def rare_within(sketch: Sketch, threshold: np.uint64) -> tuple[np.ndarray, np.ndarray]:
    """Entries of the sample `rare` with a hash of (gene, count) up to the threshold, and these hashes."""
    keys = pair_hash(sketch.rare["gene"], sketch.rare["count"])
    return sketch.rare[keys <= threshold], keys[keys <= threshold]


def _shared(keys: list[np.ndarray]) -> np.ndarray:
    """int64 [n, n]: number of keys that two slices share; each slice's keys are distinct."""
    owner = np.repeat(np.arange(len(keys)), [len(part) for part in keys])
    _, place, n = np.unique(np.concatenate(keys), return_inverse=True, return_counts=True)
    common = n[place] > 1
    cells = (np.ones(common.sum(), np.int64), (owner[common], place[common]))
    incidence = sparse.csr_matrix(cells, shape=(len(keys), len(n)))
    return (incidence @ incidence.T).toarray()


def _on_common_genes(measured: list[np.ndarray], sampled: list[np.ndarray]) -> np.ndarray:
    """int64 [n, n]: of the row's sampled entries (their genes), those whose gene the column's slice measured."""
    sets: dict[bytes, int] = {}
    set_of = [sets.setdefault(genes.tobytes(), len(sets)) for genes in measured]
    distinct = [np.frombuffer(genes, np.uint64) for genes in sets]
    every, place = np.unique(np.concatenate(sampled), return_inverse=True)
    owner = np.repeat(np.arange(len(sampled)), [len(part) for part in sampled])
    n_of_gene = sparse.csr_matrix((np.ones(len(owner)), (owner, place)), shape=(len(sampled), len(every)))
    n_in_set = []
    for start in range(0, len(distinct), SETS_AT_ONCE):
        table = np.column_stack([np.isin(every, genes) for genes in distinct[start : start + SETS_AT_ONCE]])
        n_in_set.append(n_of_gene @ table.astype(float))
    return np.hstack(n_in_set).astype(np.int64)[:, set_of]


def spot_pairs(entries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """uint64 keys of pairs of rare entries that lie in one spot: the same wherever the spot lies; ascending, each once."""
    order = np.lexsort((keys, entries["col"], entries["row"]))
    row, col, keys = entries["row"][order], entries["col"][order], keys[order]
    new = np.ones(len(keys), dtype=bool)
    new[1:] = (row[1:] != row[:-1]) | (col[1:] != col[:-1])
    spot = new.cumsum() - 1
    kept = np.arange(len(keys)) - np.flatnonzero(new)[spot] < LOWEST_OF_SPOT
    keys, spot = keys[kept], spot[kept]
    pairs = []
    for step in range(1, LOWEST_OF_SPOT):
        together = spot[step:] == spot[:-step]
        pairs.append(mix(keys[:-step][together]) ^ keys[step:][together])  # the lower hash first
    return np.unique(np.concatenate(pairs))


def align(one: Sketch, other: Sketch) -> Match | None:
    """Whether two slices hold the same rare entries in the same spots, wherever their lattices begin and however they lie."""
    threshold = min(one.rare_threshold, other.rare_threshold)
    (a, key_a), (b, key_b) = rare_within(one, threshold), rare_within(other, threshold)
    in_b, in_a = np.isin(key_a, key_b), np.isin(key_b, key_a)
    a, key_a, b, key_b = a[in_b], key_a[in_b], b[in_a], key_b[in_a]  # rare in both
    if one.kind == other.kind != "none":
        shared, compared = most_votes(a, key_a, b, key_b, one.kind), min(len(a), len(b))
        how = "rare entries, the lattice turned, mirrored or shifted"
    else:
        pairs = [spot_pairs(a, key_a), spot_pairs(b, key_b)]
        shared, compared = len(np.intersect1d(*pairs)), min(map(len, pairs))
        how = "pairs of rare entries in a spot, no common lattice"
    if compared < FEWEST or shared < DUPLICATE * compared:
        return None
    return Match(one.slice, other.slice, shared / compared, compared, how)


def symmetries(kind: str) -> list[np.ndarray]:
    """Turns and mirrorings [2, 2] of a lattice on its steps: 12 of the hexagonal one, 8 of the square one."""
    turn = np.array([[0, -1], [1, 1]] if kind == "staggered" else [[0, -1], [1, 0]])
    turns = [np.linalg.matrix_power(turn, k) for k in range(6 if kind == "staggered" else 4)]
    return [*turns, *(matrix @ np.array([[0, 1], [1, 0]]) for matrix in turns)]


def most_votes(a: np.ndarray, key_a: np.ndarray, b: np.ndarray, key_b: np.ndarray, kind: str) -> int:
    """Entries of `a` that lie on an entry of `b` with the same (gene, count), under the best symmetry and translation."""
    order = np.argsort(key_b, kind="stable")
    low, high = (np.searchsorted(key_b[order], key_a, side=side) for side in ("left", "right"))
    n = high - low
    if not n.sum():
        return 0
    mate = order[np.repeat(low - np.concatenate([[0], n.cumsum()[:-1]]), n) + np.arange(n.sum())]
    ours, theirs = np.repeat(_steps(a, kind), n, axis=0), _steps(b, kind)[mate]
    most = 0
    for symmetry in symmetries(kind):
        shift = theirs - ours @ symmetry.T
        _, votes = np.unique(shift[:, 0] << 32 | (shift[:, 1] & 0xFFFFFFFF), return_counts=True)
        most = max(most, int(votes.max()))
    return most


def _steps(entries: np.ndarray, kind: str) -> np.ndarray:
    """int64 [n, 2]: sites in whole lattice steps (a staggered lattice has every second column of the array)."""
    row, col = entries["row"].astype(np.int64), entries["col"].astype(np.int64)
    return np.column_stack([(col - row) // 2 if kind == "staggered" else col, row])
