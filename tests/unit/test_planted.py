"""Simulated slices with another way of planting: what tells their domains apart is what is said to, and nothing else."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.unit.simulated import GENE_TABLES
from workflow.errors import CatalogueError
from workflow.keys import Keys
from workflow.simulate import (
    PATCH,
    TILE_COLS,
    TILE_ROWS,
    Settings,
    arrange_states,
    layout_and_settings,
    plant_tiles,
    simulate_slice,
    staggered_sites,
    tiny_slice,
    write_slice,
)

ROW, COL = staggered_sites(3 * TILE_ROWS, 4 * TILE_COLS)
TILE = (ROW // TILE_ROWS) * 4 + COL // TILE_COLS


def profiles_by_domain(slice) -> np.ndarray:
    """Share of each gene among the counts of each domain [n_domains, n_genes]."""
    label = slice.obs[Keys.LABEL].to_numpy()
    sums = np.array([np.asarray(slice.X[label == name].sum(0)).ravel() for name in np.unique(label)], dtype=float)
    return sums / sums.sum(1, keepdims=True)


def furthest(profiles: np.ndarray) -> float:
    """Greatest difference of log shares between two domains, over genes."""
    return float(np.abs(np.log(profiles[0] / profiles[1])).max())


def planted(kind: str, seed: int = 0):
    return tiny_slice(seed=seed, shape=(48, 96), n_domains=2, holes=False, planted=kind)


def test_every_tile_has_one_domain_and_domains_have_as_many_tiles():
    domain = plant_tiles(np.random.default_rng(0), ROW, COL, 2)
    of_tile = [np.unique(domain[TILE == tile]) for tile in range(12)]
    assert all(len(found) == 1 for found in of_tile)
    assert np.concatenate(of_tile).sum() == 6
    assert (plant_tiles(np.random.default_rng(1), ROW, COL, 2) != domain).any()


def test_both_states_are_as_frequent_in_every_tile_of_either_domain():
    for seed in range(3):
        rng = np.random.default_rng(seed)
        domain = plant_tiles(rng, ROW, COL, 2)
        state = arrange_states(rng, ROW, COL, domain)
        for tile in range(12):
            assert state[TILE == tile].mean() == 0.5


def test_lines_take_turns_in_one_domain_and_patches_are_of_one_state_in_the_other():
    rng = np.random.default_rng(0)
    domain = plant_tiles(rng, ROW, COL, 2)
    state = arrange_states(rng, ROW, COL, domain)
    at = dict(zip(zip(ROW.tolist(), COL.tolist(), strict=True), range(len(ROW)), strict=True))
    n = {0: 0, 1: 0}
    for (row, col), i in at.items():
        along, below = at.get((row, col + 2)), at.get((row + 1, col + 1))
        for j, is_along in ((along, True), (below, False)):
            if j is None or TILE[i] != TILE[j]:
                continue
            if domain[i] == 0:
                assert (state[i] == state[j]) == is_along
                n[0] += 1
            elif ROW[i] // PATCH == ROW[j] // PATCH and COL[i] // (2 * PATCH) == COL[j] // (2 * PATCH):
                assert state[i] == state[j]
                n[1] += 1
    assert min(n.values()) > 1000


def test_the_counts_of_both_domains_are_of_one_profile_unless_a_marker_is_planted():
    """A gene that a programme changes differs by e^1 and more; what is left besides is noise, of the rarest genes most."""
    assert furthest(profiles_by_domain(planted("marker"))) > 1
    assert furthest(profiles_by_domain(planted("arrangement"))) < 0.5
    assert furthest(profiles_by_domain(planted("permuted"))) < 0.5


def test_shuffled_spots_keep_their_counts_and_lose_their_place():
    shuffled = planted("permuted")
    depth = shuffled.obs[Keys.TOTAL_COUNTS].to_numpy()
    np.testing.assert_array_equal(depth, np.asarray(shuffled.X.sum(1)).ravel())
    values = np.log1p(shuffled.X.toarray() / depth[:, None] * 1e4)
    _, _, axes = np.linalg.svd(values - values.mean(0), full_matrices=False)
    score = (values - values.mean(0)) @ axes[0]
    assert abs(np.corrcoef(np.sign(score), shuffled.obs[Keys.LABEL].cat.codes)[0, 1]) < 0.1
    assert (np.abs(score) > 0.5 * score.std()).mean() > 0.7  # the two kinds of spot are still there, apart


def test_settings_that_knew_no_other_way_of_planting_seed_what_they_did():
    names = [name for name, _ in Settings().seeds()]
    assert "planted" not in names
    assert "planted" not in Settings().facts()
    assert ("planted", "marker") in Settings(planted="marker", n_domains=2).seeds()


def test_a_row_of_the_catalogue_may_say_how_domains_are_planted(tmp_path):
    row = {"donor": "d", "format": "geo", "accession": "geo?planted=arrangement&n_domains=2&n_genes=60"}
    layout, settings = layout_and_settings("sim_x", row)
    assert (layout, settings.planted) == ("geo", "arrangement")
    manifest = tmp_path / "sim_x/deposit.json"
    manifest.parent.mkdir()
    write_slice("sim_x", row, GENE_TABLES / "genes_human.tsv", manifest)
    record = json.loads(manifest.read_text())
    assert record["simulated"] is True
    assert record["settings"]["planted"] == "arrangement"


@pytest.mark.parametrize("query", ["planted=nothing&n_domains=2", "planted=arrangement&n_domains=5"])
def test_a_way_of_planting_that_is_not_there_names_the_slice_and_those_that_are(query):
    with pytest.raises(CatalogueError, match="slice sim_x: simulated with planted.*expected one of mixture, marker"):
        layout_and_settings("sim_x", {"donor": "", "format": "geo", "accession": f"geo?{query}"})


@pytest.mark.parametrize("kind", ["marker", "arrangement", "permuted"])
def test_a_whole_capture_area_may_be_planted_so(kind):
    area = simulate_slice(
        "s", "d", GENE_TABLES / "genes_human.tsv", Settings(n_genes=60, n_domains=2, planted=kind, programme_genes=30)
    )
    assert set(area.domain[area.in_tissue]) == {0, 1}
    assert (area.domain[~area.in_tissue] == -1).all()
    depth = np.asarray(area.counts.sum(1)).ravel()
    assert np.median(depth[area.in_tissue]) > 20 * np.median(depth[~area.in_tissue])  # shuffled within the tissue
