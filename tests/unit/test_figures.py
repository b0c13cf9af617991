"""What the report's figures say, on planted values; how they look is for the eye."""

from __future__ import annotations

import json
import types

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import scipy.stats

from tests import finished
from workflow import (
    clustering_figure,
    confusion,
    curve,
    drawn,
    fill,
    intervals,
    maps,
    panels,
    paper_tables,
    plotting,
    qc,
    reconstruction_figure,
    report,
    score_tables,
    scoreboard,
    verdicts,
)
from workflow.assemble import COLUMNS, NOTES
from workflow.grid import read_grid
from workflow.intervals import is_control


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "results"
    finished.make(folder)
    return folder


def comparisons(protocol: str = "random20", half: float = 0.01, **values: float) -> pd.DataFrame:
    """A table of comparisons: `method__head` -> value of every metric; half of all intervals is given."""
    keys = {tuple(key.replace("_plus_", "+").split("__")): value for key, value in values.items()}
    strongest = max((key for key in keys if is_control(key[0])), key=keys.get)
    models = [key for key in keys if not is_control(key[0])]
    rows = []
    for section in ("pooled", "a"):
        for metric in intervals.METRICS:
            compared = [(key, "method") for key in keys]
            compared += [(max(models, key=keys.get), "best")] if models and section == "pooled" else []
            start = [key for key in keys if key[0] == "untrained"]
            compared += [(key, "against") for key, kind in compared if kind == "best" and start]
            for key, kind in compared:
                its = start[0] if kind == "against" else strongest
                lead = 0.0 if key == its else keys[key] - keys[its]
                around = half if key != its else 0.0
                value = keys[key], keys[key] - half, keys[key] + half
                row = ("d", protocol, section, metric, *key, kind, *value, *its, keys[its])
                rows.append((*row, lead, lead - around, lead + around, 0.01, "blocks", 40, 2, 1))
    return pd.DataFrame(rows, columns=intervals.COMPARISONS)


def clusterings() -> pd.DataFrame:
    """A clustering table of three sections: stpatch leads pca by .1, .2 and .3; two repeats .1 apart."""
    rows = []
    for index, section in enumerate("abc"):
        for method, ari in (("labels", np.nan), ("one_domain", 0.0), ("pca", 0.3), ("stpatch", 0.4 + 0.1 * index)):
            head = "none" if method in ("labels", "one_domain") else "kmeans"
            metrics = ("chaos", "pas") if method == "labels" else ("ari", "nmi", "homogeneity", "chaos", "pas")
            for metric in metrics:
                for repeat in (0, 1) if head != "none" else (0,):
                    value = 0.05 if metric in ("chaos", "pas") else ari + 0.1 * repeat - (0.05 if head != "none" else 0)
                    rows.append(("d", section, method, head, "clustering", repeat, metric, value))
    return pd.DataFrame(rows, columns=COLUMNS)


def text_of(figure) -> str:
    figure.canvas.draw()
    found = [text.get_text() for text in figure.findobj(plotting.mpl.text.Text)]
    plotting.plt.close(figure)
    return "\n".join(found)


# Windows read back


def test_windows_read_back_from_shards_match_the_grid(results):
    window = drawn.first_window(results / "shards/val/index.json", "val0")
    grid = read_grid(results / "grids/val0.zarr")
    place = np.s_[window.y : window.y + 8, window.x : window.x + 8]
    gene = int(window.gene_ids[3].removeprefix("ENSG"))
    assert np.array_equal(window.counts[3], grid.counts[place][..., gene])
    assert np.array_equal(window.totals, grid.total_counts[place])


def test_every_window_of_the_index_has_its_origin_and_enough_observed_cells(results):
    found = dict(drawn.origins(results / "shards/train/index.json"))
    assert {name: places.shape for name, places in found.items()} == {"train0": (30, 2), "train1": (30, 2)}
    mask = read_grid(results / "grids/train0.zarr").mask
    for y, x in found["train0"]:
        assert mask[y : y + 8, x : x + 8].mean() >= 0.5


def test_an_index_of_another_version_is_refused(results, tmp_path):
    index = json.loads((results / "shards/val/index.json").read_text()) | {"format_version": 7}
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="format_version 7; expected 1"):
        drawn.read_index(tmp_path / "index.json")


# Panels


def test_the_central_window_avoids_holes_and_stays_near_the_middle():
    mask = np.ones((20, 20), dtype=bool)
    assert panels.central_origin(mask, (6, 6)) == (7, 7)
    mask[9:11, 9:11] = False
    y, x = panels.central_origin(mask, (6, 6))
    assert mask[y : y + 6, x : x + 6].all()
    assert np.hypot(y - 7, x - 7) <= 4.3


def test_a_slice_smaller_than_the_window_is_shown_whole(results):
    grid = read_grid(results / "grids/test_a.zarr")
    symbols = np.array([f"SIM{i}" for i in range(len(grid.gene_ids))], dtype=object)
    window = panels.central_window(grid, symbols, (40, 40), 1e4)
    assert (window.y, window.x) == (0, 0)
    assert window.totals.shape == (40, 40)
    assert (window.totals > 0).sum() == grid.mask.sum()


def test_the_panels_name_slice_size_and_gene(results):
    import anndata as ad

    slice_, grid = ad.read_h5ad(results / "slices/train0.h5ad"), read_grid(results / "grids/train0.zarr")
    window = drawn.first_window(results / "shards/train/index.json", "train0")
    text = text_of(panels.draw(slice_, grid, window, True, 1e4))
    at = f"window at row {window.y}, column {window.x}"
    for part in ("train0", f"{slice_.n_obs} spots", "30 x 30", at, "the 20 drawn genes", "10000"):
        assert part in text


def test_the_windows_frame_follows_a_lattice_that_lies_turned_in_the_image():
    spot = np.arange(600).reshape(20, 30)
    window = drawn.Window(4, 6, np.zeros((1, 5, 8)), np.ones((5, 8)), np.array(["g"]), np.array(["g"]))
    y, x = np.divmod(np.arange(600), 30)
    xy = np.column_stack([100 - 2 * y, 3 * x]).astype(float)  # turned by a quarter
    corners = panels.outline(window, spot, xy)
    expected = [(100 - 2 * row, 3 * col) for row, col in ((3.5, 5.5), (3.5, 13.5), (8.5, 13.5), (8.5, 5.5))]
    np.testing.assert_allclose(corners, expected)


def test_one_bright_spot_does_not_set_the_range_of_colours():
    values = np.r_[np.arange(300) % 10, 500]
    assert panels.brightest(values) == 9
    assert panels.brightest(np.r_[np.zeros(300), 4]) == 4


# Overviews


def test_counts_and_genes_of_a_spot_are_read_without_the_matrix(results):
    import anndata as ad

    slice_ = ad.read_h5ad(results / "slices/val0.h5ad")
    counts, genes = qc.depth(results / "slices/val0.h5ad")
    assert np.array_equal(counts, slice_.obs["total_counts"])
    assert np.array_equal(genes, np.asarray((slice_.X > 0).sum(axis=1)).ravel())


def test_the_page_of_rejected_slices_says_what_to_do_and_escapes_what_it_shows():
    rows = pd.DataFrame([finished.QUARANTINE | {"found": "<script>"}])
    none = pd.DataFrame(columns=["slice", "duplicate_of", "evidence"])
    notes = pd.DataFrame([{"slice": "<kept>", "kind": "contamination", "detail": "pretrained on although: it matches"}])
    page = qc.rejected(rows, none, notes.iloc[:0], simulated=True)
    assert 'class="alarm"' not in page
    alarmed = qc.rejected(rows, none, notes, simulated=True)
    assert '<p class="alarm">Pretrained on although they match an evaluation slice: &lt;kept&gt;.' in alarmed
    assert "give the raw counts" in page
    assert "&lt;script&gt;" in page
    assert "<script>" not in page
    assert "Simulated data" in page
    assert "No two slices" in page


def test_the_overview_says_when_it_lists_only_the_first_slices():
    depths = [(np.array([10, 20]), np.array([5, 6]))] * 2
    roles = {"a": "pretraining", "b": "pretraining and evaluation"}
    assert "pretraining and evaluation" in text_of(qc.draw(["a", "b"], depths, roles, 2))
    assert "the first 2 of 70" in text_of(qc.draw(["a", "b"], depths, roles, 70))
    assert "the first" not in text_of(qc.draw(["a", "b"], depths, roles, 2))


def test_the_fill_figure_takes_a_corpus_without_windows():
    about = {"h": 8, "w": 8, "m": 20, "selection": "weighted", "min_observed": 0.5}
    assert "8 x 8 cells x 20 genes" in text_of(fill.draw([], 0, about))


# Loss


def test_a_step_that_was_logged_twice_counts_once(tmp_path):
    lines = [{"kind": "train", "step": 5, "loss": 1.0}, {"kind": "train", "step": 5, "loss": 0.5}]
    lines += [{"kind": "val", "step": 5, "masked_mse": 0.4, "gene_mean_mse": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    train, val = curve.read_metrics(tmp_path / "metrics.jsonl")
    assert train["loss"].tolist() == [0.5]
    assert val["masked_mse"].tolist() == [0.4]


def test_the_loss_curve_says_over_how_many_windows_if_the_run_recorded_it():
    val = pd.DataFrame({"step": [1], "masked_mse": [0.4], "gene_mean_mse": [0.5], "n_windows": [1024]})
    assert curve.verdict(val).startswith("1,024 held-out windows: masked MSE 0.4000")
    assert curve.verdict(val.drop(columns="n_windows")).startswith("held-out windows: masked MSE 0.4000")


@pytest.mark.parametrize(("model", "said"), [(0.4, "below the gene means' 0.5000 (-20.0%)"), (0.6, "not below")])
def test_the_loss_curve_says_whether_the_gene_means_are_beaten(model, said):
    val = pd.DataFrame({"step": [1, 2], "masked_mse": [0.9, model], "gene_mean_mse": [0.5, 0.5]})
    assert said in curve.verdict(val)


def test_a_run_without_validation_says_so():
    assert "nothing to compare" in curve.verdict(pd.DataFrame(columns=["step", "masked_mse", "gene_mean_mse"]))


# Scores


@pytest.mark.parametrize(
    ("metric", "low", "high", "said"),
    [
        ("accuracy", 0.01, 0.1, "beats"),
        ("accuracy", -0.01, 0.1, "undecided"),
        ("accuracy", -0.1, -0.01, "does not beat"),
        ("accuracy", 0.0, 0.0, "does not beat"),
        ("accuracy", np.nan, np.nan, "undecided"),
        ("mse", -0.1, -0.01, "beats"),
        ("mse", 0.01, 0.1, "does not beat"),
    ],
)
def test_a_control_is_beaten_where_the_whole_interval_lies_on_the_better_side(metric, low, high, said):
    assert verdicts.judged(types.SimpleNamespace(metric=metric, low=low, high=high)) == said


def test_a_verdict_names_both_sides_their_figures_and_of_what_it_speaks():
    table = comparisons(
        "blocks", pca__knn=0.5, untrained__knn=0.6, stpatch_plus_centred__logistic=0.7, stpatch__knn=0.65
    )
    (row,) = verdicts.of_probes(table[table["metric"] == "accuracy"]).itertuples()
    said = verdicts.sentence(row)
    assert said.startswith(
        "accuracy: beats the strongest control; stpatch+centred, logistic: 0.700 against untrained, knn: 0.600"
    )
    assert "+0.100 [+0.090, +0.110], p = 0.01" in said
    assert "40 blocks of tissue drawn again within 2 sections" in verdicts.scope(row)
    assert "claims nothing of other tissue" in verdicts.scope(row)


def test_a_control_without_head_is_named_without_one_and_without_interval_nothing_is_decided():
    table = comparisons(half=np.nan, majority__none=0.5, stpatch__knn=0.7)
    (row,) = verdicts.of_probes(table[table["metric"] == "ari"]).itertuples()
    assert "undecided, 40 blocks tell no interval; stpatch, knn: 0.700 against majority: 0.500" in verdicts.sentence(
        row
    )


def test_clusterings_are_paired_by_section_and_the_true_domains_are_no_control():
    (row,) = (row for row in verdicts.of_clusterings(clusterings()).itertuples() if row.metric == "ari")
    assert (row.method, row.control, row.over, row.n_units) == ("stpatch", "pca", "sections", 3)
    assert row.difference == pytest.approx(0.2)
    half = 0.1 / np.sqrt(3) * scipy.stats.t.ppf(0.975, 2)
    assert (row.low, row.high) == pytest.approx((0.2 - half, 0.2 + half))
    assert verdicts.judged(row) == "undecided"


def test_reconstructions_are_paired_by_repeat_and_the_lower_error_wins():
    table = finished.reconstructions()
    found = verdicts.of_reconstructions(table).set_index(["head", "metric"])
    for side in (2, 4):
        row = found.loc[f"window8_side{side}", "mse"]
        values = table[(table["section"] == "pooled") & (table["head"] == row.name[0]) & (table["metric"] == "mse")]
        values = values.pivot(index="split", columns="method", values="value")
        expected = scipy.stats.ttest_rel(values["stpatch"], values["kriging"])
        assert (row["method"], row["control"], row["n_units"], row["n_sections"]) == ("stpatch", "kriging", 4, 2)
        assert row["p"] == pytest.approx(expected.pvalue)
        assert (row["low"], row["high"]) == pytest.approx(tuple(expected.confidence_interval()))
    assert found.loc[("window8_side4", "pearson"), "control"] == "kriging"


NO_SCORES = pd.DataFrame(columns=COLUMNS)
NO_NOTES = pd.DataFrame(columns=["stage", *NOTES])


def page_of(table: pd.DataFrame, scores: pd.DataFrame = NO_SCORES, dataset: str = "d") -> str:
    return scoreboard.scores_page(dataset, table, scores, NO_NOTES, allow_contamination=False)


def cells_of(page: str, method: str) -> list[str]:
    """The cells of the first row of a method, the name left out."""
    line = next(line for line in page.splitlines() if f"<td>{method}</td>" in line)
    return line.split(f"<td>{method}</td>")[1].replace("</tr>", "").split("</td>")[:-1]


def test_the_page_of_scores_marks_contamination_in_red_and_simulated_data():
    rows = comparisons(pca__knn=0.5, stpatch__knn=0.6)
    notes = pd.DataFrame([["score", "simulated", "", "", "a", "", "", "simulated slice"]], columns=NO_NOTES.columns)
    page = scoreboard.scores_page("d", rows, NO_SCORES, notes, allow_contamination=True)
    assert 'class="alarm"' in page
    assert "Simulated data: a." in page
    clean = page_of(rows)
    assert 'class="alarm"' not in clean
    assert "Simulated" not in clean


def test_the_table_stars_the_strongest_control_over_all_heads_and_marks_clear_leads():
    page = page_of(
        comparisons(pca__knn=0.5, pca__logistic=0.55, raw__knn=0.4, stpatch__knn=0.6, stpatch__logistic=0.555)
    )
    assert [("★" in cell) for cell in cells_of(page, "pca")] == [False] * 4 + [True] * 4
    assert [("▲" in cell) for cell in cells_of(page, "stpatch")] == [True] * 4 + [False] * 4
    assert not any("★" in cell or "▲" in cell for cell in cells_of(page, "raw")[:4])
    assert "0.400<i>0.39, 0.41</i>" in cells_of(page, "raw")[0]


def test_the_majority_class_stands_under_every_head():
    page = page_of(comparisons(majority__none=0.3, pca__knn=0.5, pca__logistic=0.6))
    assert len([cell for cell in cells_of(page, "majority") if "0.300" in cell]) == 8
    assert "Only controls were scored" in page


def test_the_mlp_has_a_table_of_its_own():
    page = page_of(comparisons(majority__none=0.3, pca__knn=0.5, pca__mlp=0.6, raw__knn=0.4))
    tables = page.split("<table")[1:]
    assert sum("MLP" in table for table in tables) == 2  # pooled and of the one section
    assert all("raw" not in table.split("</table>")[0] for table in tables if "MLP" in table)


def test_a_dataset_without_labels_gets_a_page_that_says_so():
    page = page_of(pd.DataFrame(columns=intervals.COMPARISONS))
    assert "nothing to score" in page
    assert "Not measured here: random20, blocks, blocks_buffered, leave_section" in page


def test_the_page_says_of_each_protocol_how_it_leaks_and_which_were_left_out():
    for protocol, said in (
        ("leave_section", "share their layout"),
        ("leave_donor", "does not leak"),
        ("random20", "leaks"),
    ):
        page = page_of(comparisons(protocol, pca__knn=0.5, stpatch__knn=0.6))
        assert said in page
        missing = page.split("Not measured here: ")[1].split(".")[0].split(", ")
        assert missing == [name for name in scoreboard.PROTOCOLS if name != protocol]


def test_clustering_and_reconstruction_have_their_tables():
    page = page_of(comparisons(pca__knn=0.5, stpatch__knn=0.6), pd.concat([clusterings(), finished.reconstructions()]))
    for part in ("<h2>clustering</h2>", "<h2>reconstruction</h2>", "2 of 8", "homogeneity", "CHAOS", "R²", "kriging"):
        assert part in page
    assert "MSE, 4 of 8: beats the strongest control; stpatch: 0.6" in page
    of_clustering = page.split("<h2>clustering</h2>")[1].split("<h2>")[0]
    assert "0.300 ★" in cells_of(of_clustering, "pca")[0]
    assert ["0.050" in cell for cell in cells_of(of_clustering, "labels")] == [True, True]


def test_the_papers_figures_stand_beside_ours_labelled_and_footnoted_under_its_protocol_alone():
    page = page_of(comparisons(pca__knn=0.5, stpatch__knn=0.6), dataset="DLPFC")
    paper = [line for line in page.splitlines() if 'class="paper"' in line]
    assert sum("<td>patch_24</td>" in line and "0.775<sup>1,2</sup>" in line for line in paper) == 1
    assert "not measured here" in page
    assert "47,329 labelled spots" in page
    assert 'class="paper"' not in page_of(comparisons("blocks", pca__knn=0.5, stpatch__knn=0.6), dataset="DLPFC")
    assert 'class="paper"' not in page_of(comparisons(pca__knn=0.5, stpatch__knn=0.6), dataset="Mine")


def test_table_7_of_the_paper_stands_below_reconstructions_of_its_sizes():
    table = finished.reconstructions()
    ours = table.assign(
        head=table["head"].replace({"window8_side2": "window24_side8", "window8_side4": "window24_side10"})
    )
    of_paper = page_of(comparisons(pca__knn=0.5), ours, "DLPFC").split("(Table 7)")[0].rsplit("<table", 1)[1]
    assert [cell.split(">")[-1] for cell in cells_of(of_paper, "patch_24")] == ["0.253", "0.253", "0.190", "0.189"]
    assert [cell.split(">")[-1] for cell in cells_of(of_paper, "scgpt_spatial")] == ["0.329", "0.340", "0.334", "0.339"]
    assert "patch_30" not in of_paper
    assert "(Table 7)" not in page_of(comparisons(pca__knn=0.5), table, "DLPFC")


def test_an_interval_ends_where_its_metric_does():
    told = intervals.Interval(0.9, -2.0, 1.4, 0.5)
    assert score_tables.within("ari", told)[1:3] == (-0.5, 1)
    assert score_tables.within("nmi", told)[1:3] == (0, 1)


def test_methods_stand_in_the_order_controls_others_untrained_ours():
    shuffled = [
        "stpatch_spot",
        "novae",
        "stpatch+centred",
        "untrained",
        "stpatch",
        "pca",
        "majority",
        "neighbour_mean_6",
    ]
    expected = [
        "majority",
        "pca",
        "neighbour_mean_6",
        "novae",
        "untrained",
        "stpatch",
        "stpatch+centred",
        "stpatch_spot",
    ]
    assert score_tables.ordered(shuffled) == expected


def test_the_score_figure_shows_every_method_and_protocol_and_stays_within_what_a_metric_can_be():
    table = pd.concat(
        [
            comparisons("random20", pca__knn=0.5, raw__logistic=0.4, pca__logistic=0.3, stpatch__knn=0.99),
            comparisons("blocks", pca__knn=0.2, raw__logistic=-0.1, stpatch__knn=0.6),
        ]
    )
    figure = scoreboard.draw("d", table)
    accuracy = figure.axes[0]
    assert accuracy.get_xlim() == pytest.approx((-0.12, 1.02))
    dots = np.concatenate([line.get_xdata() for line in accuracy.lines if line.get_marker() == "."])
    assert set(dots) == {0.5, 0.4, 0.3, 0.99}
    text = text_of(figure)
    for part in ("pca", "raw", "stpatch", "random20", "blocks", "accuracy", "ARI", "best, by logistic"):
        assert part in text


def test_the_clustering_figure_draws_each_section_and_the_true_domains():
    figure = clustering_figure.draw("d", clusterings())
    ari = figure.axes[0]
    small = np.concatenate([line.get_xdata() for line in ari.lines if line.get_marker() == "." and line.get_alpha()])
    assert sorted(small) == pytest.approx([0, 0, 0, 0.3, 0.3, 0.3, 0.4, 0.5, 0.6])
    large = [line.get_xdata()[0] for line in ari.lines if line.get_marker() == "o" and len(line.get_xdata())]
    assert sorted(large) == pytest.approx([0.3, 0.5])
    assert [len([line for line in axis.lines if line.get_linestyle() == "--"]) for axis in figure.axes] == [0, 1, 1]
    assert [label.get_text() for label in ari.get_yticklabels()] == ["one_domain", "pca", "stpatch"]
    plotting.plt.close(figure)


def test_the_reconstruction_figure_draws_means_over_repeats_at_their_sides():
    table = finished.reconstructions()
    figure = reconstruction_figure.draw("d", table)
    lines = dict(zip(*reversed(figure.axes[0].get_legend_handles_labels()), strict=True))
    mean = table[(table["method"] == "kriging") & (table["section"] == "pooled") & (table["metric"] == "mse")]
    drawn = lines["kriging"].lines[0]
    assert drawn.get_ydata() == pytest.approx(mean.groupby("head")["value"].mean().to_numpy())
    assert np.round(drawn.get_xdata().astype(float)).tolist() == [2, 4]
    assert set(lines) == set(table["method"])
    assert "window of 8 cells" in text_of(figure)


# The paper's tables


def test_the_papers_means_are_the_means_of_its_six_sets_but_for_those_footnoted():
    for (_, method, _, _), rows in paper_tables.paper_scores().groupby(["table", "method", "head", "metric"]):
        values = rows.set_index("dataset")["value"]
        if len(values) == 7 and method != "stofm":
            assert values.drop("mean").mean() == pytest.approx(values["mean"], abs=6e-4), method
    stofm = paper_tables.paper_scores(method="stofm", dataset="mean")
    assert "average .561" in paper_tables.footnotes(stofm)["stofm_mean"]


def test_every_footnote_that_a_figure_names_has_a_text_and_the_other_way_round():
    rows = paper_tables.paper_scores()
    named = {note for notes in rows["note"] for note in notes.split(",")} - {""}
    assert set(paper_tables.footnotes(rows)) == named
    assert named == set(pd.read_csv(paper_tables.TABLES / "paper_notes.tsv", sep="\t")["note"])
    assert rows.groupby("table").size().to_dict() == {1: 98, 2: 7, 3: 98, 4: 14, 5: 6, 6: 6, 7: 72}


# Maps


def test_maps_draw_the_best_of_either_side():
    predictions = pd.DataFrame(
        {
            "section": "a", "spot": range(4), "label": list("xxyy"),
            "leave_section:pca:knn": list("xxyx"), "leave_section:raw:knn": list("yyyy"),
            "leave_section:stpatch:knn": list("xyyx"), "leave_section:stpatch+centred:logistic": list("xxyy"),
        }
    )  # fmt: skip
    # Of all spots pca meets more labels; the mean over splits ranks raw first, and it decides.
    values = {"pca__knn": 0.7, "raw__knn": 0.8, "stpatch__knn": 0.5, "stpatch_plus_centred__logistic": 0.9}
    table = comparisons("leave_section", **values)
    assert maps.best_columns(predictions, table) == {
        "stpatch": "leave_section:stpatch+centred:logistic",
        "strongest control": "leave_section:raw:knn",
    }
    text = text_of(maps.draw("d", predictions, table, {"a": np.random.default_rng(0).normal(size=(4, 2))}))
    for part in ("a: true", "accuracy 1.000", "accuracy 0.500", "raw, knn", "leave_section"):
        assert part in text


def test_the_majority_class_can_be_the_control_that_is_mapped():
    predictions = pd.DataFrame(
        {"section": "a", "spot": [0, 1], "label": list("xy"), "random20:majority:none": list("xx"),
         "random20:raw:knn": list("yx")}
    )  # fmt: skip
    table = comparisons(majority__none=0.5, raw__knn=0.1)
    assert maps.best_columns(predictions, table) == {"strongest control": "random20:majority:none"}


def test_spots_that_were_not_predicted_do_not_count_as_errors():
    predictions = pd.DataFrame({"label": list("xxyy"), "random20:pca:knn": ["x", "", "", "x"]})
    assert maps.correct(predictions, "random20:pca:knn") == 0.5


def test_errors_are_told_apart_by_who_made_them():
    predictions = pd.DataFrame({"label": list("xxyyx"), "a": ["x", "y", "y", "x", ""], "b": ["x", "x", "x", "x", "x"]})
    np.testing.assert_equal(maps.errors(predictions, ["a", "b"]), [0, 1, 2, 3, np.nan])
    assert list(maps.ERRORS) == ["none", "stpatch", "control", "both"]


def test_confusion_is_the_share_of_each_true_domains_tested_spots():
    predictions = pd.DataFrame(
        {"section": "a", "label": list("xxxxyyz"), "random20:pca:knn": ["x", "x", "x", "y", "y", "", ""]}
    )
    table = confusion.shares(predictions, "random20:pca:knn", list("xyz"))
    np.testing.assert_equal(table, [[0.75, 0.25, 0], [0, 1, 0], [np.nan] * 3])
    text = text_of(
        confusion.draw("d", predictions, comparisons(pca__knn=0.5, stpatch__knn=0.4).query("compared == 'method'"))
    )
    for part in ("strongest control: accuracy 0.800", "pca, knn", "0.75", "random20"):
        assert part in text


# Saving


def test_simulated_data_are_stamped_and_a_figure_is_written_with_the_same_bytes(tmp_path):
    for name, simulated in (("plain", False), ("stamped", True), ("again", True)):
        figure, axes = plotting.new_figure(figsize=(4, 3))
        axes.set_axis_off()
        plotting.save(figure, tmp_path / f"{name}.png", simulated)
    assert (tmp_path / "stamped.png").read_bytes() == (tmp_path / "again.png").read_bytes()
    corner = np.s_[:25, -80:]
    assert matplotlib.image.imread(tmp_path / "plain.png")[corner][..., :3].min() == 1
    assert matplotlib.image.imread(tmp_path / "stamped.png")[corner][..., 2].min() < 0.5


def test_the_nested_call_takes_no_lock_and_no_profile_and_names_the_figures_last():
    command = report.command("Snakefile", "config.json", ["a.png", "b.html"], "report.html")
    assert "--nolock" in command
    assert command[-3:] == ["--", "a.png", "b.html"]
    assert command[command.index("--profile") + 1] == command[command.index("--workflow-profile") + 1] == "none"
