"""Simulated slices as large as real ones, the blocks that keep memory low, and what the scale benchmark adds up."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import yaml

from benchmarks.scale import KINDS, planned_jobs, write_corpus
from tests.conftest import ROOT
from tests.unit.simulated import GENE_TABLES, SETTINGS
from workflow import grid as grids
from workflow import simulate, stats
from workflow.catalogue import check_config, load_catalogue
from workflow.curate import curate
from workflow.errors import CatalogueError
from workflow.simulate import Settings, choose_genes, draw_counts, generator, layout_and_settings, simulate_slice

GENES = GENE_TABLES / "genes_human.tsv"


def test_a_rows_accession_may_say_how_large_its_simulated_slice_is():
    row = {"accession": "geo?n_genes=18085&median_depth=4000&spread=1.3", "format": "geo"}
    assert layout_and_settings("x", row) == ("geo", Settings(n_genes=18085, median_depth=4000.0, spread=1.3))
    assert layout_and_settings("x", {"accession": "", "format": "spaceranger"}) == ("spaceranger-2", Settings())


@pytest.mark.parametrize("query", ["genes=5", "n_genes=many", "n_genes=", "seeds=1"])
def test_a_setting_that_the_simulator_does_not_have_is_refused_and_named(query):
    with pytest.raises(CatalogueError, match=f"slice x.*{query.split('=')[0]}.*n_genes \\(int\\)"):
        layout_and_settings("x", {"accession": f"geo?{query}", "format": "geo"})


def test_a_wider_tissue_covers_more_spots_and_holds_the_narrow_one():
    narrow = simulate_slice("s", "d", GENES, SETTINGS)
    wide = simulate_slice("s", "d", GENES, Settings(**{**vars(SETTINGS), "spread": 1.3}))
    assert 3000 < wide.in_tissue.sum() < 4500
    assert (wide.in_tissue | ~narrow.in_tissue).all()
    np.testing.assert_array_equal(wide.domain[narrow.in_tissue], narrow.domain[narrow.in_tissue])


def test_counts_do_not_depend_on_how_many_spots_are_drawn_at_a_time(monkeypatch):
    mean = np.abs(generator("mean").normal(1, 2, (50, 30)))
    rng = generator("draw")
    whole = copy.deepcopy(rng)
    expected = whole.poisson(mean * whole.gamma(4.0, 0.25, mean.shape))
    monkeypatch.setattr(simulate, "SPOTS_PER_BLOCK", 7)
    np.testing.assert_array_equal(draw_counts(rng, mean.copy(), 4.0).toarray(), expected)


def test_as_many_genes_as_a_whole_transcriptome_has_are_real_and_distinct():
    ids, symbols = choose_genes(GENES, 36_601)
    assert len(set(ids)) == len(set(symbols)) == 36_601
    assert set(choose_genes(GENES, 3000)[0]) < set(ids)


@pytest.mark.parametrize("layout", ["offset", "rank", "bin"])
def test_a_grid_does_not_depend_on_how_many_cells_are_filled_at_a_time(monkeypatch, layout):
    adata = simulate.tiny_slice()
    whole = grids.make_grid(adata, layout, 250)
    monkeypatch.setattr(grids, "CELLS_PER_BLOCK", 5)
    again = grids.make_grid(adata, layout, 250)
    assert whole.counts.sum() == adata.X.sum()
    np.testing.assert_array_equal(again.counts, whole.counts)


def test_a_vocabulary_does_not_depend_on_how_many_genes_are_pooled_at_a_time(monkeypatch):
    rng = np.random.default_rng(0)
    names = np.array([f"g{i:02d}" for i in range(40)])
    parts = []
    for n in (7, 11, 13):
        some = rng.permutation(40)[:25]
        parts.append(
            {"gene_ids": names[some], "symbols": names[some], "n_spots": n, "sum": rng.random(25), "m2": rng.random(25)}
        )
    whole = stats.merge_moments(parts)
    monkeypatch.setattr(stats, "GENES_PER_BLOCK", 6)
    again = stats.merge_moments(iter(parts))
    for name in ("n_slices", "n_spots", "mean", "variance"):
        np.testing.assert_array_equal(getattr(again, name), getattr(whole, name))
    assert (again.gene_id, again.symbol) == (whole.gene_id, whole.symbol)
    assert whole.n_spots.max() <= 31


def test_the_corpus_of_the_benchmark_is_a_valid_catalogue_and_says_simulated(tmp_path):
    names = write_corpus(tmp_path, 2 * len(KINDS) + 20)
    rows = load_catalogue(tmp_path / "slices.tsv")
    assert [row["slice"] for row in rows] == names
    assert {row["split"] for row in rows} == {"train", "val"}
    assert all("simulated" in row["evidence"] and row["source"] == "simulated" for row in rows)
    for row in rows:
        layout_and_settings(row["slice"], row)


def test_the_tiny_slices_of_the_benchmark_are_files_of_64_simulated_spots_that_differ_and_can_be_curated(tmp_path):
    write_corpus(tmp_path, 3, tiny=True)
    rows = load_catalogue(tmp_path / "slices.tsv")
    made = [curate(row, GENE_TABLES, files=[tmp_path / row["url"]]) for row in rows]
    assert [slice_.shape for slice_ in made] == [(64, 60)] * 3
    assert len({slice_.X.sum() for slice_ in made}) == 3
    assert all("simulated" in row["evidence"] for row in rows)
    check_config(
        yaml.safe_load((ROOT / "config.yaml").read_text()) | yaml.safe_load((tmp_path / "scale.yaml").read_text())
    )


def test_planned_jobs_are_read_from_what_a_dry_run_prints():
    printed = "Building DAG of jobs...\nJob stats:\njob       count\n------  -------\ncurate     12\ndata        1\ntotal      13\n\n[x]\nrule 7"
    assert planned_jobs(printed) == {"curate": 12, "data": 1, "total": 13}
