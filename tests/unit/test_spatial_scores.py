"""CHAOS and PAS on cases worked out by hand, and against their definitions written as loops."""

from __future__ import annotations

import numpy as np
import pytest

from workflow.spatial_scores import chaos, pas, ten_nearest

SQUARE = np.array([[0.0, 0.0], [2.0, 0.0], [0.0, 2.0], [2.0, 2.0]])  # standard deviation 1 on either axis


def lattice(n: int = 12) -> np.ndarray:
    """Positions of a staggered lattice of n rows and n spots a row, 100 apart."""
    row, place = np.divmod(np.arange(n * n), n)
    return np.column_stack([(2 * place + row % 2) * 50.0, row * 50 * np.sqrt(3)])


def chaos_by_loop(domains: np.ndarray, position: np.ndarray) -> float:
    scaled = (position - position.mean(axis=0)) / position.std(axis=0)
    total = 0.0
    for domain in set(domains.tolist()):
        members = [spot for spot in range(len(domains)) if domains[spot] == domain]
        if len(members) <= 2:
            continue
        for spot in members:
            total += min(np.linalg.norm(scaled[spot] - scaled[other]) for other in members if other != spot)
    return total / len(domains)


def pas_by_loop(domains: np.ndarray, position: np.ndarray) -> float:
    abnormal = 0
    for spot in range(len(domains)):
        others = [other for other in range(len(domains)) if other != spot]
        others.sort(key=lambda other: (round(float(np.linalg.norm(position[spot] - position[other])), 6), other))
        abnormal += sum(domains[other] != domains[spot] for other in others[:10]) >= 6
    return abnormal / len(domains)


def test_chaos_of_one_domain_is_the_mean_distance_to_the_nearest_spot():
    assert chaos(np.zeros(4, int), SQUARE) == pytest.approx(2.0)


def test_chaos_of_three_spots_is_their_own_distances_over_all_spots():
    # Of the three, the corner is 2 from both others and they are 2 from it; the fourth spot is alone and adds nothing.
    assert chaos(np.array([0, 0, 0, 1]), SQUARE) == pytest.approx(3 * 2 / 4)


def test_domains_of_one_or_two_spots_add_nothing_to_chaos():
    assert chaos(np.array([0, 0, 1, 1]), SQUARE) == 0


def test_chaos_does_not_depend_on_unit_or_place():
    domains = np.arange(144) % 5
    assert chaos(domains, lattice() * 7.3 + 1e4) == pytest.approx(chaos(domains, lattice()))


@pytest.mark.parametrize(("n_first", "expected"), [(4, 4 / 11), (5, 5 / 11), (1, 1 / 11), (0, 0)])
def test_a_spot_is_abnormal_from_six_other_neighbours_of_ten_on(n_first, expected):
    # 11 spots: each has all others as neighbours. With 5 and 6, the 5 see six of the others, the 6 see five.
    position = np.column_stack([np.arange(11.0), np.zeros(11)])
    domains = (np.arange(11) >= n_first).astype(int)
    assert pas(domains, ten_nearest(position)) == pytest.approx(expected)


@pytest.mark.parametrize("n_domains", [1, 2, 7, 100])
def test_both_equal_their_definitions_written_as_loops(n_domains):
    domains = np.random.default_rng(n_domains).integers(n_domains, size=144)
    assert chaos(domains, lattice()) == pytest.approx(chaos_by_loop(domains, lattice()))
    assert pas(domains, ten_nearest(lattice())) == pas_by_loop(domains, lattice())


def test_scattering_a_layered_map_raises_both():
    layers = np.arange(144) // 36
    scattered = np.random.default_rng(0).permutation(layers)
    near = ten_nearest(lattice())
    assert chaos(scattered, lattice()) > 1.3 * chaos(layers, lattice())
    assert pas(layers, near) < 0.1 < 0.8 < pas(scattered, near)


def test_the_ten_nearest_leave_out_the_spot_itself_even_where_two_share_a_place():
    position = lattice()
    position[7] = position[3]
    near = ten_nearest(position)
    assert near.shape == (144, 10)
    assert not (near == np.arange(144)[:, None]).any()
    assert 3 in near[7]
    assert 7 in near[3]


def test_few_spots_have_as_many_neighbours_as_there_are():
    near = ten_nearest(SQUARE)
    assert near.shape == (4, 3)
    assert pas(np.array([0, 0, 0, 1]), near) == 0.25  # the last one sees three others
    assert pas(np.zeros(1, int), ten_nearest(SQUARE[:1])) == 0
