"""Splits against their definitions."""

from __future__ import annotations

import numpy as np
import pytest

from tests.unit.sections import full_section, tiny_section
from workflow import protocols


def test_random20_trains_on_a_fifth_and_tests_all_others():
    for _, train, test in protocols.random20(1003, 3, 0, "d"):
        assert len(train) == 201
        assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1003))


def test_splits_depend_on_seed_dataset_and_number_alone():
    first = [train for _, train, _ in protocols.random20(500, 3, 7, "d")]
    assert np.array_equal(first[2], [train for _, train, _ in protocols.random20(500, 5, 7, "d")][2])
    assert not np.array_equal(first[0], first[1])
    for seed, dataset in ((8, "d"), (7, "e")):
        assert not np.array_equal(first[0], next(protocols.random20(500, 1, seed, dataset))[1])


def blocks_of(section) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Section, cell and block of each spot of one section."""
    of_section = np.zeros(section.n_spots, dtype=int)
    cell = protocols.cells(section.lattice, section.array, section.position)
    return of_section, cell, protocols.blocks_of(of_section, cell)


def test_blocks_are_never_cut():
    section = full_section(rows=60, cols=120)
    of_array = section.array // np.array([16, 32])
    for _, train, test in protocols.blocks(blocks_of(section)[2], 4, 0, "d"):
        assert not {tuple(b) for b in of_array[train]} & {tuple(b) for b in of_array[test]}
        assert 0.2 <= len(train) / section.n_spots < 0.4
        assert len(train) + len(test) == section.n_spots


def test_sections_have_blocks_of_their_own_numbered_one_section_after_the_other():
    section = full_section()
    cell = np.tile(protocols.cells(section.lattice, section.array, section.position), (2, 1))
    of_section = np.repeat([0, 1], section.n_spots)
    block = protocols.blocks_of(of_section, cell)
    first, second = (set(block[of_section == index]) for index in (0, 1))
    assert max(first) < min(second)
    assert first | second == set(range(len(first) + len(second)))


def test_a_cell_is_two_columns_of_a_staggered_lattice_and_one_of_a_square_one():
    array, position = np.array([[0, 0], [1, 1], [2, 2], [5, 7]]), np.zeros((4, 2))
    assert protocols.cells("staggered", array, position).tolist() == [[0, 0], [1, 0], [2, 1], [5, 3]]
    assert protocols.cells("square", array, position).tolist() == array.tolist()


def test_without_a_lattice_cells_are_bins_of_the_spots_own_distance():
    rng = np.random.default_rng(0)
    row, col = (axis.ravel() for axis in np.mgrid[:20, :30])
    position = 7.3 * (np.column_stack([col, row]) + 0.5) + rng.uniform(-0.01, 0.01, (600, 2))
    assert protocols.pitch(position) == pytest.approx(7.3, abs=0.02)
    assert np.array_equal(protocols.cells("none", None, position), np.column_stack([row, col]))


def cell_distance(one: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.abs(others - one).max(axis=1)


def test_buffered_blocks_test_exactly_the_spots_that_are_window_less_one_cells_from_training_spots(tmp_path):
    section = tiny_section(tmp_path, shape=(60, 60))  # has holes
    of_section, cell, block = blocks_of(section)
    half = np.arange(section.n_spots) < section.n_spots // 2  # as if of two sections
    of_section[half] = 1
    whole = list(protocols.blocks(protocols.blocks_of(of_section, cell), 3, 0, "d"))
    found = list(protocols.buffered(whole, of_section, cell, (6, 6)))
    n_kept = 0
    for (split, train, test), (number, same, kept) in zip(whole, found, strict=True):
        assert number == split
        assert np.array_equal(same, train)
        expected = [
            spot
            for spot in test
            if not (cell_distance(cell[spot], cell[train[of_section[train] == of_section[spot]]]) < 5).any()
        ]
        assert kept.tolist() == expected
        n_kept += len(kept)
    assert 0 < n_kept < sum(len(test) for _, _, test in whole)


def test_the_buffer_of_an_oblong_window_is_oblong():
    row, col = (axis.ravel() for axis in np.mgrid[:21, :21])
    cell = np.column_stack([row, col])
    train = np.flatnonzero((row == 10) & (col == 10))
    test = np.setdiff1d(np.arange(441), train)
    ((_, _, kept),) = protocols.buffered([(0, train, test)], np.zeros(441, dtype=int), cell, (4, 8))
    left_out = np.setdiff1d(test, kept)
    assert np.abs(row[left_out] - 10).max() == 2  # nearer than 4 - 1 rows
    assert np.abs(col[left_out] - 10).max() == 6  # and nearer than 8 - 1 columns
    assert len(left_out) == 5 * 13 - 1


def test_every_section_is_left_out_once():
    of_section = np.repeat([0, 1, 2], [5, 6, 7])
    splits = list(protocols.leave_section(of_section))
    assert [number for number, _, _ in splits] == [0, 1, 2]
    for number, train, test in splits:
        assert set(of_section[test]) == {number}
        assert len(train) + len(test) == 18


def test_every_donor_is_left_out_once_with_all_its_sections_and_unknown_ones_take_no_part():
    of_section = np.repeat([0, 1, 2, 3], [5, 6, 7, 8])
    donor = np.array([1, 0, 1, -1])[of_section]
    found = [
        (number, set(of_section[train]), set(of_section[test])) for number, train, test in protocols.leave_donor(donor)
    ]
    assert found == [(0, {0, 2}, {1}), (1, {1}, {0, 2})]
