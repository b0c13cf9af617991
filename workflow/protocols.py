"""Who trains and who is tested: the evaluation protocols as pure functions of labels, places and a seed.

Every method of a dataset gets the same splits. Indices count the dataset's labelled spots, section after section.
"""

import hashlib
from collections.abc import Iterable, Iterator

import numpy as np
from scipy.ndimage import maximum_filter
from scipy.spatial import cKDTree

TRAIN_FRACTION = 0.2
BLOCK = 16  # cells to a side

Split = tuple[int, np.ndarray, np.ndarray]  # number, training spots, test spots


def generator(seed: int, dataset: str, protocol: str, split: int) -> np.random.Generator:
    """Randomness as a function of these four alone."""
    digest = hashlib.sha256(f"{seed}/{dataset}/{protocol}/{split}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def pitch(position: np.ndarray) -> float:
    """Median distance of a spot to the nearest other, in the unit of `position`; 1 where there is no other place."""
    distance = cKDTree(position).query(position, k=2)[0][:, 1] if len(position) > 1 else np.ones(1)
    apart = distance[np.isfinite(distance) & (distance > 0)]
    return float(np.median(apart)) if len(apart) else 1.0


def cells(lattice: str, array: np.ndarray | None, position: np.ndarray) -> np.ndarray:
    """Row and column of each spot of a section, so that one step either way is about one spot; int64 [n_spots, 2].

    On a staggered lattice two array columns make a cell, as in layout `offset`, but rows and columns without a spot
    count too: the places are those of the tissue. Without a lattice positions are binned by their own `pitch`.
    """
    if array is None:
        return np.floor(position[:, ::-1] / pitch(position)).astype(np.int64)
    return array // np.array([1, 2 if lattice == "staggered" else 1])


def blocks_of(section: np.ndarray, cell: np.ndarray) -> np.ndarray:
    """Number of each spot's block of 16 x 16 cells, counted over all sections; int64 [n_spots].

    Parameters
    ----------
    section
        int [n_spots], index of each spot's section.
    cell
        int [n_spots, 2], as by `cells`.
    """
    return np.unique(np.column_stack([section, cell // BLOCK]), axis=0, return_inverse=True)[1].ravel()


def random20(n_spots: int, n_splits: int, seed: int, dataset: str) -> Iterator[Split]:
    """The paper's split: 20% of the spots of all sections train, drawn without regard to class or place."""
    n_train = round(TRAIN_FRACTION * n_spots)
    for split in range(n_splits):
        order = generator(seed, dataset, "random20", split).permutation(n_spots)
        yield split, np.sort(order[:n_train]), np.sort(order[n_train:])


def blocks(block: np.ndarray, n_splits: int, seed: int, dataset: str) -> Iterator[Split]:
    """Whole blocks are drawn until 20% of the spots train.

    Parameters
    ----------
    block
        int [n_spots], as by `blocks_of`.
    """
    size = np.bincount(block)
    for split in range(n_splits):
        order = generator(seed, dataset, "blocks", split).permutation(len(size))
        n_drawn = int(np.searchsorted(np.cumsum(size[order]), TRAIN_FRACTION * len(block))) + 1
        train = np.isin(block, order[:n_drawn])
        yield split, np.flatnonzero(train), np.flatnonzero(~train)


def buffered(
    splits: Iterable[Split], section: np.ndarray, cell: np.ndarray, window: tuple[int, int]
) -> Iterator[Split]:
    """The same splits without the test spots that lie nearer than window - 1 cells to a training spot of their section.

    Nearer is meant as by a window, in rows and in columns (Chebyshev): fewer than height - 1 rows and fewer than
    width - 1 columns away.

    Parameters
    ----------
    section, cell
        int [n_spots] and [n_spots, 2], as for `blocks_of`.
    window
        Height and width of the model's windows in cells.
    """
    for split, train, test in splits:
        kept = np.ones(len(test), dtype=bool)
        for index in np.unique(section[test]):
            trains, tested = train[section[train] == index], section[test] == index
            if len(trains):
                kept[tested] = ~_near(cell[trains], cell[test[tested]], window)
        yield split, train, test[kept]


def _near(trains: np.ndarray, tested: np.ndarray, window: tuple[int, int]) -> np.ndarray:
    origin = np.minimum(trains.min(axis=0), tested.min(axis=0))
    map_ = np.zeros(np.maximum(trains.max(axis=0), tested.max(axis=0)) - origin + 1, dtype=bool)
    map_[tuple((trains - origin).T)] = True
    # A box of 2 r + 1 cells reaches r = window - 2 cells either way.
    reached = maximum_filter(map_, size=[2 * side - 3 for side in window], mode="constant")
    return reached[tuple((tested - origin).T)]


def leave_section(section: np.ndarray) -> Iterator[Split]:
    """Each section in turn is tested by what the others taught; the split's number is the section's rank.

    Serial sections of one donor share their layout, so it leaks where the left-out section's donor also trains.
    """
    for split, left_out in enumerate(np.unique(section)):
        yield split, np.flatnonzero(section != left_out), np.flatnonzero(section == left_out)


def leave_donor(donor: np.ndarray) -> Iterator[Split]:
    """All sections of each donor in turn are tested by what other donors taught; the number is the donor's rank.

    Parameters
    ----------
    donor
        int [n_spots], index of each spot's donor; -1 where it is unknown: such a spot neither trains nor is tested.
    """
    known = donor >= 0
    for split, left_out in enumerate(np.unique(donor[known])):
        yield split, np.flatnonzero(known & (donor != left_out)), np.flatnonzero(donor == left_out)
