"""Who trains and who is tested: the evaluation protocols as pure functions of labels, places and a seed.

Every method of a dataset gets the same splits. Indices count the dataset's labelled spots, section after section.
"""

import hashlib
from collections.abc import Iterator

import numpy as np

TRAIN_FRACTION = 0.2
BLOCK_ROWS, BLOCK_COLS = 16, 32  # array rows and columns; on a staggered lattice 16 x 16 spots

Split = tuple[int, np.ndarray, np.ndarray]  # number, training spots, test spots


def generator(seed: int, dataset: str, protocol: str, split: int) -> np.random.Generator:
    """Randomness as a function of these four alone."""
    digest = hashlib.sha256(f"{seed}/{dataset}/{protocol}/{split}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "little")))


def random20(n_spots: int, n_splits: int, seed: int, dataset: str) -> Iterator[Split]:
    """The paper's split: 20% of the spots of all sections train, drawn without regard to class or place."""
    n_train = round(TRAIN_FRACTION * n_spots)
    for split in range(n_splits):
        order = generator(seed, dataset, "random20", split).permutation(n_spots)
        yield split, np.sort(order[:n_train]), np.sort(order[n_train:])


def blocks(section: np.ndarray, array: np.ndarray, n_splits: int, seed: int, dataset: str) -> Iterator[Split]:
    """Whole blocks of 16 array rows by 32 array columns are drawn until 20% of the spots train.

    Parameters
    ----------
    section
        int [n_spots], index of each spot's section.
    array
        int [n_spots, 2], row and column on the capture lattice.
    """
    corner = np.column_stack([section, array[:, 0] // BLOCK_ROWS, array[:, 1] // BLOCK_COLS])
    _, block, size = np.unique(corner, axis=0, return_inverse=True, return_counts=True)
    block = block.ravel()
    for split in range(n_splits):
        order = generator(seed, dataset, "blocks", split).permutation(len(size))
        n_drawn = int(np.searchsorted(np.cumsum(size[order]), TRAIN_FRACTION * len(section))) + 1
        train = np.isin(block, order[:n_drawn])
        yield split, np.flatnonzero(train), np.flatnonzero(~train)


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
