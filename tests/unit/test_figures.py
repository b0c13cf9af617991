"""What the report's figures say, on planted values; how they look is for the eye."""

from __future__ import annotations

import json

import matplotlib.image
import numpy as np
import pandas as pd
import pytest

from tests import finished
from workflow import curve, drawn, fill, maps, panels, plotting, qc, report, scoreboard
from workflow.grid import read_grid
from workflow.score import COLUMNS


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "results"
    finished.make(folder)
    return folder


def scores(protocol: str = "random20", **values: float) -> pd.DataFrame:
    """A score table of one dataset: method (`method__head`) -> accuracy and ARI in split 0; split 1 is .01 higher."""
    rows = []
    for key, value in values.items():
        method, head = key.split("__")
        for split in (0, 1):
            for metric in ("accuracy", "ari", "macro_f1", "nmi"):
                for section in ("pooled", "a"):
                    rows.append(("d", section, method.replace("_plus_", "+"), head, protocol, split, metric, value))
                    value = min(value + 0.01 * split, 1)
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


def test_the_strongest_control_is_chosen_over_all_variants_and_heads():
    by_split = scoreboard.pooled(
        scores(pca__knn=0.5, pca_plus_centred__logistic=0.7, untrained__knn=0.6, stpatch__knn=0.65, majority__none=0.2)
    )
    found = scoreboard.verdicts(by_split).set_index("metric").loc["accuracy"]
    assert (found["control"], found["model"]) == ("pca+centred, logistic", "stpatch, knn")
    assert found["verdict"] == "does not beat it"
    assert found["higher_in"] == "0 of 2 splits"
    assert found["difference"] == pytest.approx(-0.05)


def test_the_untrained_encoder_is_a_control():
    by_split = scoreboard.pooled(scores(untrained__knn=0.9, stpatch__knn=0.8))
    assert set(scoreboard.verdicts(by_split)["verdict"]) == {"does not beat it"}
    better = scoreboard.pooled(scores(untrained__knn=0.7, stpatch_plus_centred__knn=0.8))
    assert set(scoreboard.verdicts(better)["verdict"]) == {"beats it"}


@pytest.mark.parametrize(
    ("lead", "said"),
    [
        ([0.1, 0.001], "beats it"),
        ([0.1], "beats it"),
        ([0.1, -0.01], "undecided"),
        ([0.1, 0.0], "undecided"),
        ([0.01, -0.1], "does not beat it"),
        ([0.01, -0.01], "does not beat it"),
        ([0.0, 0.0], "does not beat it"),
        ([-0.1, -0.1], "does not beat it"),
    ],
)
def test_a_control_is_beaten_in_every_split_or_it_is_not_said(lead, said):
    assert scoreboard.worded(pd.Series(lead)) == said


def test_the_majority_class_stands_under_every_head():
    by_split = scoreboard.pooled(scores(majority__none=0.3, pca__knn=0.5, pca__logistic=0.6))
    for head in ("knn", "logistic"):
        assert by_split.loc[("random20", head, "majority", 0), "accuracy"] == pytest.approx(0.3)


NOTES = ["kind", "protocol", "split", "section", "method", "head", "detail"]


def test_the_page_of_scores_marks_contamination_in_red_and_simulated_data():
    rows = scores(pca__knn=0.5, stpatch__knn=0.6)
    notes = pd.DataFrame([["simulated", "", "", "a", "", "", "simulated slice"]], columns=NOTES)
    page = scoreboard.scores_page("d", rows, notes, allow_contamination=True)
    assert 'class="alarm"' in page
    assert "Simulated data: a." in page
    clean = scoreboard.scores_page("d", rows, notes.iloc[:0], allow_contamination=False)
    assert 'class="alarm"' not in clean
    assert "Simulated" not in clean


def test_the_page_stars_the_strongest_control_and_never_the_model():
    page = scoreboard.scores_page(
        "d", scores(pca__knn=0.5, raw__knn=0.4, stpatch__knn=0.6), pd.DataFrame(columns=NOTES), False
    )
    rows = {line.split("</td>")[0].split("<td>")[-1]: line for line in page.splitlines() if "<td>" in line}
    assert rows["pca"].count("★") == 2
    assert "★" not in rows["stpatch"]
    assert "★" not in rows["raw"]


def test_a_dataset_without_labels_gets_a_page_that_says_so():
    page = scoreboard.scores_page("d", pd.DataFrame(columns=COLUMNS), pd.DataFrame(columns=NOTES), False)
    assert "nothing to score" in page


def test_the_score_figure_shows_every_method_protocol_and_head():
    by_split = scoreboard.pooled(
        scores(pca__knn=0.5, raw__logistic=0.4, pca__logistic=0.4, raw__knn=0.3, stpatch__knn=0.6)
    )
    text = text_of(scoreboard.draw("d", by_split))
    for part in ("pca", "raw", "stpatch", "random20, knn", "random20, logistic", "accuracy", "ARI"):
        assert part in text


def test_every_split_is_drawn_and_no_axis_goes_beyond_what_a_metric_can_be():
    by_split = scoreboard.pooled(scores(pca__knn=0.2, stpatch__knn=0.99))
    by_split.loc[("random20", "knn", "pca", 0), "ari"] = -0.1
    figure = scoreboard.draw("d", by_split)
    accuracy, ari = figure.axes
    assert accuracy.get_xlim() == pytest.approx((-0.02, 1.02))
    assert ari.get_xlim() == pytest.approx((-0.12, 1.02))
    dots = np.concatenate([line.get_xdata() for line in accuracy.lines if line.get_marker() == "."])
    assert set(by_split["accuracy"]) <= set(dots)
    plotting.plt.close(figure)


def test_the_page_says_of_each_protocol_how_it_leaks():
    for protocol, said in (("leave_section", "share their layout"), ("leave_donor", "does not leak")):
        page = scoreboard.scores_page(
            "d", scores(protocol, pca__knn=0.5, stpatch__knn=0.6), pd.DataFrame(columns=NOTES), False
        )
        assert said in page
        assert "the choice favours the controls" in page


# Maps


def test_maps_draw_the_best_of_either_side():
    predictions = pd.DataFrame(
        {
            "section": "a", "spot": range(4), "label": list("xxyy"),
            "leave_section:pca:knn": list("xxyx"), "leave_section:raw:knn": list("yyyy"),
            "leave_section:stpatch:knn": list("xyyx"), "leave_section:stpatch+centred:logistic": list("xxyy"),
        }
    )  # fmt: skip
    # Of all spots pca meets more labels; the scoreboard's mean over splits ranks raw first, and it decides.
    table = scores("leave_section", pca__knn=0.7, raw__knn=0.8, stpatch__knn=0.5, stpatch_plus_centred__logistic=0.9)
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
    table = scores(majority__none=0.5, raw__knn=0.1)
    assert maps.best_columns(predictions, table) == {"strongest control": "random20:majority:none"}


def test_spots_that_were_not_predicted_do_not_count_as_errors():
    predictions = pd.DataFrame({"label": list("xxyy"), "random20:pca:knn": ["x", "", "", "x"]})
    assert maps.correct(predictions, "random20:pca:knn") == 0.5


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
