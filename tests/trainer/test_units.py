"""Neighbours on the capture lattice and macro-domains, on planted lattices and clusters."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from trainer import units
from trainer.data import LAYOUTS, lattice_lines


def places(rows, cols, layout, observed=None):
    """Of one window, [S, 2]."""
    S = len(rows) * len(cols)
    observed = torch.ones(1, S).bool() if observed is None else torch.as_tensor(observed).reshape(1, S)
    lines = (torch.tensor([line], dtype=torch.int32) for line in (rows, cols))
    return units.lattice_places(*lines, torch.tensor([LAYOUTS.index(layout)]), observed)[0]


def nearest(where, site, observed, k):
    """The k nearest observed sites (and the site itself, if observed) by plain sorting."""
    apart = [math.dist(where[site], other) for other in where.tolist()]
    return sorted((s for s in range(len(where)) if observed[s]), key=lambda s: (round(apart[s], 9), s))[: k + 1]


def test_six_neighbours_of_a_visium_spot_are_one_pitch_away():
    where = places(range(10, 16), range(20, 26), "offset")
    for row, col in ((2, 2), (3, 3)):  # in lines of either parity
        site = 6 * row + col
        apart = np.sort(np.linalg.norm(where - where[site], axis=1))
        np.testing.assert_allclose(apart[:8], [0, 1, 1, 1, 1, 1, 1, 3**0.5], atol=1e-12)


def test_a_missing_row_moves_nobody_closer():
    """The grid closes the gap where row 11 is missing; the lattice does not."""
    where = places([10, 12], [5, 6], "offset")
    assert math.dist(where[0], where[2]) == pytest.approx(3**0.5)  # two rows apart, the same column
    assert math.dist(where[0], where[1]) == pytest.approx(1)


def test_a_lattice_of_odd_parity_has_the_same_neighbours():
    """Spots where row + column is odd: (0, 1), (0, 3), (1, 0), (1, 2); each touches the one below and beside it."""
    facts = {"array_rows": [0, 1, -1], "array_cols": [0, 1], "array_row": 0, "array_col": 1, "layout": "offset"}
    rows, cols, layout = lattice_lines(facts)
    assert rows.tolist() == [1, 2, -1]
    where = places(rows.tolist(), cols.tolist(), LAYOUTS[layout])
    assert math.dist(where[0], where[3]) == pytest.approx(1)  # (0, 1) and (1, 2)
    assert math.dist(where[0], where[2]) == pytest.approx(1)  # (0, 1) and (1, 0)
    assert math.dist(where[1], where[2]) == pytest.approx(3**0.5)  # (0, 3) and (1, 0)


@pytest.mark.parametrize("parity", [0, 1])
def test_ranks_of_a_staggered_lattice_are_told_from_those_of_a_square_one(parity):
    rows, cols = range(4), range(6)
    checkerboard = np.add.outer(rows, cols) % 2 == parity
    staggered = places(rows, cols, "rank", checkerboard)
    assert math.dist(staggered[1], staggered[8 - 1]) == pytest.approx(3**0.5 / 2)  # one row below
    full = places(rows, cols, "rank")
    assert math.dist(full[1], full[7]) == 1
    assert torch.equal(places(rows, cols, "bin", checkerboard), full)


def test_neighbours_are_the_nearest_observed_sites_and_weigh_less_the_farther_they_are():
    rng = np.random.default_rng(0)
    rows, cols = [3, 4, 6, 7, 8, 11, -1], [0, 2, 3, 4, 7, -1]
    observed = rng.random((7, 6)) < 0.7
    observed[6], observed[:, 5] = False, False  # padding
    observed = observed.ravel()
    where = places(rows, cols, "offset", observed)
    weights = units.neighbour_weights(where[None], torch.from_numpy(observed)[None], 5)[0]
    for site in np.flatnonzero(observed):
        near = nearest(where, site, observed, 5)
        assert weights[site].nonzero().flatten().tolist() == sorted(near)
        raw = {s: 1 / (1 + math.dist(where[site], where[s])) for s in near}
        for s in near:
            assert weights[site, s].item() == pytest.approx(raw[s] / sum(raw.values()))


def test_fewer_observed_sites_than_neighbours_are_all_taken_and_none_gives_zero():
    where = places(range(2), range(2), "bin")[None]
    some = units.neighbour_weights(where, torch.tensor([[True, False, False, True]]), 16)[0]
    assert (some > 0).tolist() == [[True, False, False, True]] * 4
    assert torch.allclose(some.sum(1), torch.ones(4, dtype=torch.float64))
    assert not units.neighbour_weights(where, torch.zeros(1, 4).bool(), 16).any()


def test_a_mean_taken_in_parts_is_the_same(monkeypatch):
    draw = torch.Generator().manual_seed(0)
    where, observed = (
        places(range(5), range(6), "offset")[None].repeat(2, 1, 1),
        torch.rand(2, 30, generator=draw) < 0.8,
    )
    features = torch.randn(2, 30, 3, generator=draw, dtype=torch.float64)
    whole = units.mean_of_neighbours(features, where, observed, 4)
    monkeypatch.setattr(units, "AT_ONCE", 7 * 60)
    assert torch.allclose(whole, units.mean_of_neighbours(features, where, observed, 4), atol=1e-15)


def test_what_lies_at_unobserved_sites_and_where_they_lie_moves_no_mean():
    draw = torch.Generator().manual_seed(0)
    where, observed = places(range(5), range(6), "offset")[None], torch.rand(1, 30, generator=draw) < 0.6
    features = torch.randn(1, 30, 3, generator=draw, dtype=torch.float64)
    before = units.mean_of_neighbours(features, where, observed, 4)
    features[~observed] += 5
    where[~observed] += 0.7
    after = units.mean_of_neighbours(features, where, observed, 4)
    assert torch.equal(before[observed], after[observed])


def planted(seed=0):
    """Three clusters of 40 sites in 5 dimensions, far apart, in random order; a third of the sites unobserved."""
    rng = np.random.default_rng(seed)
    label = rng.permutation(np.repeat([0, 1, 2], 40))
    x = 8 * rng.normal(size=(3, 5))[label] + rng.normal(size=(120, 5))
    return torch.from_numpy(x)[None], torch.from_numpy(rng.random(120) < 0.67)[None], label


def test_planted_domains_are_found():
    x, observed, label = planted()
    domain = units.macro_domains(x, observed, 3)[0].numpy()
    assert len({(a, b) for a, b in zip(domain, label, strict=True)}) == 3


def test_domains_depend_on_the_observed_sites_alone():
    x, observed, _ = planted()
    before = units.macro_domains(x, observed, 4)
    assert torch.equal(before, units.macro_domains(x.clone(), observed, 4))
    other = torch.where(observed[:, :, None], x, 50 - 3 * x)
    assert torch.equal(before[observed], units.macro_domains(other, observed, 4)[observed])


def test_more_domains_than_sites_and_no_observed_site_are_no_trouble():
    x, observed, _ = planted()
    few = torch.zeros_like(observed)
    few[0, [3, 50]] = True
    domain = units.macro_domains(x, few, 5)[few]
    assert domain[0] != domain[1]
    nothing = torch.zeros_like(observed)
    assert units.macro_domains(x, nothing, 5).shape == (1, 120)
    assert units.mean_with_domain(x, units.macro_domains(x, nothing, 5), nothing, 5).isfinite().all()


def test_a_site_is_fused_with_the_mean_of_its_domain():
    features = torch.tensor([[[0.0], [2.0], [10.0], [4.0]]])
    domain, observed = torch.tensor([[0, 0, 1, 0]]), torch.tensor([[True, True, True, False]])
    fused = units.mean_with_domain(features, domain, observed, 2)
    assert fused[0, :, 0].tolist() == [0.5, 1.5, 10.0, 2.5]  # the unobserved one has no part in its domain's mean
