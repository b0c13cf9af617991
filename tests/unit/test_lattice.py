"""The lattice that is inferred from pixels is the one that was planted."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from workflow.errors import NoLattice, PositionsMismatch
from workflow.lattice import infer_lattice, known_lattice, plane
from workflow.simulate import staggered_sites


def planted(kind, rows=40, cols=60, seed=0):
    """Row and column of the sites of a tissue with holes and a far island."""
    row, col = staggered_sites(rows, cols) if kind == "staggered" else map(np.ravel, np.indices((rows, cols)))
    where = plane(kind, row, col) / plane(kind, row, col).max()
    rng = np.random.default_rng(seed)
    island = (where[:, 0] > 0.85) & (where[:, 1] > 0.3)
    mainland = where[:, 0] < 0.7
    hole = ((where - [0.3, 0.3]) ** 2).sum(1) < 0.01
    keep = (island | mainland) & ~hole & (rng.random(len(row)) > 0.05)
    return row[keep], col[keep]


def seen(kind, row, col, degrees=0.0, mirrored=False, pitch=137.7, noise=0.0, seed=0):
    """Pixels of sites on a turned and mirrored image."""
    turn = np.deg2rad(degrees)
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    pixels = plane(kind, row, col) * pitch @ rotation * [-1 if mirrored else 1, 1] + [5000, 900]
    return pixels + np.random.default_rng(seed).normal(0, noise * pitch, pixels.shape)


def neighbours(kind, row, col):
    pairs = cKDTree(plane(kind, row, col)).query_pairs(1.01, output_type="ndarray")
    return set(map(tuple, np.sort(pairs, axis=1).tolist()))


@pytest.mark.parametrize("kind", ["staggered", "square"])
@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("degrees", [0, 1.5, 15, 29.9, 30, 45, 90, 123, 180, 271])
def test_every_spot_keeps_its_neighbours_however_the_slide_lies(kind, degrees, mirrored):
    row, col = planted(kind)
    found = infer_lattice(seen(kind, row, col, degrees, mirrored, noise=0.02))
    assert found.kind == kind
    assert neighbours(kind, found.row, found.col) == neighbours(kind, row, col)
    assert found.pitch_px == pytest.approx(137.7, rel=1e-3)
    assert found.residual == pytest.approx(0.02 * np.sqrt(2), rel=0.1)
    assert found.row.min() == 0
    assert found.col.min() in (0, 1)
    if kind == "staggered":
        assert ((found.row + found.col) % 2 == 0).all()


@pytest.mark.parametrize("kind", ["staggered", "square"])
def test_an_upright_slide_gets_its_own_coordinates_back(kind):
    row, col = planted(kind)
    found = infer_lattice(seen(kind, row, col, degrees=2, noise=0.01))
    np.testing.assert_array_equal(found.row, row - row.min())
    np.testing.assert_array_equal(found.col - found.col.min(), col - col.min())


def test_pixels_rounded_on_a_small_image_are_no_obstacle():
    row, col = planted("staggered", 78, 128)
    pixels = seen("staggered", row, col, degrees=1, pitch=12.3).round()
    assert neighbours("staggered", *(lambda f: (f.row, f.col))(infer_lattice(pixels))) == neighbours(
        "staggered", row, col
    )


def test_a_row_that_is_missing_leaves_a_gap():
    row, col = staggered_sites(20, 30)
    keep = row != 9
    found = infer_lattice(seen("staggered", row[keep], col[keep]))
    np.testing.assert_array_equal(found.row, row[keep])


@pytest.mark.parametrize(
    ("pixels", "found"),
    [
        (np.random.default_rng(0).uniform(0, 1000, (500, 2)), "residual|regular"),
        (np.column_stack([np.arange(50.0), np.zeros(50)]), "one line"),
        (np.zeros((50, 2)), "position of another"),
        (np.eye(2).repeat(3, 0), "6 spots"),
    ],
)
def test_what_is_no_lattice_is_refused_with_the_reason(pixels, found):
    with pytest.raises(NoLattice, match=rf"slice beads.*({found}).*Next step"):
        infer_lattice(pixels, "beads")


def test_noise_above_a_tenth_of_the_pitch_is_no_lattice():
    row, col = planted("staggered")
    with pytest.raises(NoLattice):
        infer_lattice(seen("staggered", row, col, noise=0.12))


@pytest.mark.parametrize("kind", ["staggered", "square"])
def test_given_coordinates_tell_their_kind_and_their_scale(kind):
    row, col = planted(kind)
    lattice = known_lattice(row, col, seen(kind, row, col, degrees=40, mirrored=True))
    assert lattice.kind == kind
    assert lattice.pitch_px == pytest.approx(137.7)
    assert lattice.residual < 1e-9


@pytest.mark.parametrize("kind", ["staggered", "square"])
def test_pixels_of_other_spots_are_found_out(kind):
    row, col = planted(kind)
    pixels = seen(kind, row, col, degrees=3, noise=0.05)
    shuffled = np.random.default_rng(0).permutation(pixels)
    with pytest.raises(PositionsMismatch, match=r"slice s \(f\): found pixels \d+\.\d+ pitches.*Next step"):
        known_lattice(row, col, shuffled, "s", "f")
    moved = np.roll(pixels, 1, axis=0)  # each spot has its neighbour's
    with pytest.raises(PositionsMismatch):
        known_lattice(row, col, moved)


def test_row_and_column_exchanged_are_found_out():
    row, col = planted("staggered")
    with pytest.raises(PositionsMismatch, match="one axis stretched 3.00 times"):
        known_lattice(col, row, seen("staggered", row, col))


@pytest.mark.parametrize("kind", ["staggered", "square"])
def test_column_and_row_may_stand_for_pixels(kind):
    row, col = planted(kind)
    assert known_lattice(row, col, np.column_stack([col, row]).astype(float)).residual < 1e-9


def test_a_few_spots_between_the_sites_of_a_staggered_lattice_are_found_out():
    row, col = planted("staggered")
    wrong = col.copy()
    wrong[:7] += 1
    with pytest.raises(PositionsMismatch, match=rf"7 of {len(row)} spots whose array row \+ column is odd"):
        known_lattice(row, wrong, None)


@pytest.mark.parametrize("pixels", [np.zeros, lambda shape: np.outer(np.arange(shape[0]), [1.0, 0.3])])
def test_pixels_at_one_place_or_in_one_line_tell_no_scale(pixels):
    row, col = planted("staggered")
    lattice = known_lattice(row, col, pixels((len(row), 2)))
    assert lattice.kind == "staggered"
    assert np.isnan([lattice.pitch_px, lattice.residual]).all()


def test_without_pixels_the_scale_is_unknown():
    lattice = known_lattice(*planted("square"), None)
    assert np.isnan(lattice.pitch_px)
    assert np.isnan(lattice.residual)
