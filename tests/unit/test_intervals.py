"""Intervals and tests on planted truth (simulated predictions)."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.metrics import (
    accuracy_score,
    adjusted_rand_score,
    confusion_matrix,
    f1_score,
    normalized_mutual_info_score,
)

from workflow import intervals
from workflow.intervals import Sample, bootstrap_interval, compare, metrics_of, t_interval

N_CLASSES, BLOCK_SPOTS = 3, 25


def by_sklearn(truth, predicted) -> dict[str, float]:
    return {
        "accuracy": accuracy_score(truth, predicted),
        "macro_f1": f1_score(truth, predicted, average="macro", zero_division=0),
        "ari": adjusted_rand_score(truth, predicted),
        "nmi": normalized_mutual_info_score(truth, predicted),
    }


def confusion(truth, predicted, n_classes: int = N_CLASSES) -> np.ndarray:
    return confusion_matrix(truth, predicted, labels=range(n_classes))


class Tissue:
    """Sections of equal blocks of 25 spots with classes at random (simulated)."""

    def __init__(self, n_sections: int, n_blocks: int, rng: np.random.Generator):
        self.rng, n = rng, n_sections * n_blocks * BLOCK_SPOTS
        self.sections = [f"s{index:02d}" for index in range(n_sections)]
        self.block = np.repeat(np.arange(n_sections * n_blocks), BLOCK_SPOTS)
        self.of_section = self.block // n_blocks
        self.y = rng.integers(0, N_CLASSES, n)
        self.left_out = [np.flatnonzero(self.of_section == index) for index in range(n_sections)]

    def predict(self, chance: np.ndarray) -> np.ndarray:
        """Predictions that are right with the given chance, one of its block or one of all."""
        chance = np.broadcast_to(chance, (self.block.max() + 1,))[self.block]
        right = self.rng.random(len(self.y)) < chance
        return np.where(right, self.y, (self.y + self.rng.integers(1, N_CLASSES, len(self.y))) % N_CLASSES)

    def run(self, predicted: np.ndarray, tests: list[np.ndarray] | None = None):
        return [(split, test, predicted[test]) for split, test in enumerate(tests or self.left_out)]

    def compare(self, runs, protocol: str = "leave_section", **settings) -> pd.DataFrame:
        found = compare(
            "d", protocol, runs, self.y, self.of_section, self.block, sections=self.sections,
            **({"n_resamples": 400} | settings),
        )  # fmt: skip
        assert list(found.columns) == intervals.COMPARISONS
        return found


def one(found: pd.DataFrame, method: str, metric: str = "accuracy", compared: str = "method", section: str = "pooled"):
    rows = found[(found["method"] == method) & (found["metric"] == metric)]
    (row,) = rows[(rows["compared"] == compared) & (rows["section"] == section)].to_dict("records")
    return row


# Metrics


def test_metrics_of_a_confusion_worked_by_hand():
    found = metrics_of(np.array([[2, 1], [0, 3]]))
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["macro_f1"] == pytest.approx((4 / 5 + 6 / 7) / 2)
    # Of 15 pairs 4 lie together in both, 6 in truth, 7 in prediction: expected 6 * 7 / 15.
    assert found["ari"] == pytest.approx((4 - 2.8) / ((6 + 7) / 2 - 2.8))
    half = np.log(2)
    predicted = -(2 / 6) * np.log(2 / 6) - (4 / 6) * np.log(4 / 6)
    joint = -(2 / 6) * np.log(2 / 6) - (1 / 6) * np.log(1 / 6) - (3 / 6) * np.log(3 / 6)
    assert found["nmi"] == pytest.approx((half + predicted - joint) / ((half + predicted) / 2))


@pytest.mark.parametrize("n_classes", [1, 2, 7])
def test_metrics_equal_those_of_scikit_learn(n_classes):
    rng = np.random.default_rng(n_classes)
    truths, predictions = rng.integers(0, n_classes, (2, 40, 30))
    predictions[:10] = truths[:10]
    predictions[10:15] = 0
    truths[13:18] = n_classes - 1
    stacked = np.array([confusion(t, p, 8) for t, p in zip(truths, predictions, strict=True)])
    found = metrics_of(stacked.reshape(4, 10, 8, 8))
    for number, (truth, predicted) in enumerate(zip(truths, predictions, strict=True)):
        for metric, expected in by_sklearn(truth, predicted).items():
            assert found[metric].ravel()[number] == pytest.approx(expected, abs=1e-12), metric


def test_a_block_that_counts_twice_is_the_same_as_its_spots_twice():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 3, (2, 50))
    twice = np.r_[np.arange(50), np.arange(20)]
    weighted = confusion(truth, predicted) + 1.0 * confusion(truth[:20], predicted[:20])
    for metric, expected in by_sklearn(truth[twice], predicted[twice]).items():
        assert metrics_of(weighted)[metric] == pytest.approx(expected), metric


def test_no_counts_have_no_metric():
    assert all(np.isnan(value) for value in metrics_of(np.zeros((3, 3))).values())


def test_values_are_means_over_splits_of_what_scikit_learn_says_pooled_and_by_section():
    rng = np.random.default_rng(1)
    tissue = Tissue(2, 8, rng)
    tests = [np.sort(rng.permutation(400)[:300]) for _ in range(3)]
    predicted = tissue.predict(0.6)
    found = tissue.compare({("pca", "knn"): tissue.run(predicted, tests)}, "blocks")
    for section, of in (("pooled", [0, 1]), ("s01", [1])):
        kept = [test[np.isin(tissue.of_section[test], of)] for test in tests]
        expected = pd.DataFrame([by_sklearn(tissue.y[test], predicted[test]) for test in kept]).mean()
        for metric in intervals.METRICS:
            assert one(found, "pca", metric, section=section)["value"] == pytest.approx(expected[metric])


# Intervals


def test_students_interval_of_units_that_do_not_overlap_is_scipys():
    values = np.array([0.1, 0.3, -0.05, 0.2, 0.12])
    reference = stats.ttest_1samp(values, 0)
    low, high = reference.confidence_interval()
    assert t_interval(Sample(values.mean(), values), 0) == pytest.approx((values.mean(), low, high, reference.pvalue))


def test_overlapping_splits_widen_the_interval_as_nadeau_and_bengio_say():
    values = np.random.default_rng(0).normal(size=10)
    plain, corrected = (t_interval(Sample(values.mean(), values), ratio) for ratio in (0, 4))
    assert (corrected.high - corrected.low) / (plain.high - plain.low) == pytest.approx(np.sqrt((0.1 + 4) / 0.1))


def test_the_corrected_test_of_equal_features_rejects_no_more_than_it_should_and_the_plain_one_does():
    """Two features, alike by construction, teach a nearest-mean head on ten random fifths of the same 100 spots."""
    rng = np.random.default_rng(7)
    rejected = {0: 0, 4: 0}
    for _ in range(200):
        y = rng.integers(0, 2, 100)
        x = y[:, None] + rng.normal(scale=1.5, size=(100, 2))
        differences = []
        for _ in range(10):
            train = np.zeros(100, dtype=bool)
            train[rng.permutation(100)[:20]] = True
            middle = (x[train & (y == 0)].mean(axis=0) + x[train & (y == 1)].mean(axis=0)) / 2
            correct = (x[~train] > middle) == y[~train, None]
            differences.append(correct[:, 0].mean() - correct[:, 1].mean())
        sample = Sample(float(np.mean(differences)), np.array(differences))
        for ratio in rejected:
            rejected[ratio] += t_interval(sample, ratio).p < 0.05
    assert rejected[4] <= 0.05 * 200
    assert rejected[0] >= 0.3 * 200


def test_the_interval_over_blocks_holds_the_truth_as_often_as_it_says():
    """Blocks differ in difficulty, so spots are no independent draws; the truth is the mean over all possible blocks."""
    rng = np.random.default_rng(3)
    held, held_if_spots_were_drawn = 0, 0
    for _ in range(200):
        tissue = Tissue(4, 10, rng)
        chance = rng.beta(3.5, 1.5, 40)
        predicted = tissue.predict(chance)
        row = one(tissue.compare({("pca", "knn"): tissue.run(predicted)}), "pca")
        held += row["value_low"] <= 0.7 <= row["value_high"]
        half = 1.96 * np.sqrt(row["value"] * (1 - row["value"]) / len(predicted))
        held_if_spots_were_drawn += abs(row["value"] - 0.7) <= half
    assert 0.90 <= held / 200 <= 0.99
    assert held_if_spots_were_drawn / 200 < 0.7


def test_without_a_difference_the_best_of_either_side_differ_by_an_interval_around_0_however_many_there_are_to_choose():
    rng = np.random.default_rng(4)
    held, best, chosen_on_the_tests = 0, [], []
    for _ in range(100):
        tissue = Tissue(2, 15, rng)
        chance = rng.beta(4, 2, 30)
        runs = {(f"control{number}", "knn"): tissue.run(tissue.predict(chance)) for number in range(8)}
        found = tissue.compare({**runs, ("stpatch", "knn"): tissue.run(tissue.predict(chance))}, n_resamples=200)
        row = one(found, "stpatch", compared="best")
        held += row["low"] <= 0 <= row["high"]
        best.append(row["difference"])
        chosen_on_the_tests.append(one(found, "stpatch")["difference"])
    assert held / 100 >= 0.90
    error = np.std(best) / np.sqrt(100)
    assert abs(np.mean(best)) < 3 * error
    assert np.mean(chosen_on_the_tests) < -4 * error


def test_equal_predictions_differ_by_exactly_0():
    tissue = Tissue(3, 6, np.random.default_rng(5))
    predicted = tissue.predict(0.7)
    draws = [np.sort(np.random.default_rng(split).permutation(len(predicted))[90:]) for split in range(4)]
    for protocol, tests in (("leave_section", None), ("random20", draws), ("blocks", draws)):
        found = tissue.compare(
            {(m, "knn"): tissue.run(predicted, tests) for m in ("pca", "stpatch", "stpatch+centred")}, protocol
        )
        assert (found[["difference", "low", "high"]] == 0).all(axis=None), protocol
        assert (found["p"] == 1).all()
        assert (found["value_low"] < found["value_high"]).all()


@pytest.mark.parametrize("protocol", ["leave_section", "blocks", "random20"])
def test_a_planted_lead_is_found(protocol):
    rng = np.random.default_rng(6)
    tissue = Tissue(2, 20, rng)
    tests = [np.sort(rng.permutation(1000)[200:]) for _ in range(10)] if protocol != "leave_section" else None
    runs = {
        ("pca", "knn"): tissue.run(tissue.predict(0.6), tests),
        ("raw", "logistic"): tissue.run(tissue.predict(0.4), tests),
        ("stpatch", "logistic"): tissue.run(tissue.predict(0.8), tests),
    }
    found = tissue.compare(runs, protocol)
    for metric in intervals.METRICS:
        for compared in ("method", "best"):
            row = one(found, "stpatch", metric, compared)
            assert (row["control"], row["control_head"]) == ("pca", "knn")
            assert 0 < row["low"] < row["difference"] < row["high"]
            assert row["p"] < 0.05
            assert row["value"] - row["control_value"] == pytest.approx(row["difference"])
    assert one(found, "raw")["high"] < 0
    assert one(found, "raw")["over"] == ("splits" if protocol == "random20" else "blocks")


def test_few_blocks_or_one_split_tell_no_interval():
    tissue = Tissue(2, 2, np.random.default_rng(8))
    found = tissue.compare({("pca", "knn"): tissue.run(tissue.predict(0.6))})
    assert found[["low", "high", "p", "value_low"]].isna().all(axis=None)
    assert set(found.loc[found["section"] == "pooled", "n_units"]) == {4}
    single = tissue.compare({("pca", "knn"): tissue.run(tissue.predict(0.6), [np.arange(80)])}, "random20")
    assert one(single, "pca")["n_units"] == 1
    assert np.isnan(one(single, "pca")["value_low"])
    assert one(single, "pca")["value"] > 0.3


@pytest.mark.parametrize("df", [5, 1000])
def test_resamples_that_are_normal_give_students_interval_and_its_p(df):
    values = 2 + stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    found = bootstrap_interval(Sample(2.0, values), df)
    half = stats.t.ppf(0.975, df)
    assert (found.low, found.high) == pytest.approx((2 - half, 2 + half), abs=0.02)
    assert found.p == pytest.approx(2 * stats.t.sf(2, df), rel=0.02)


def test_a_sections_blocks_are_drawn_within_it_and_weigh_as_much_as_it_has():
    section = np.repeat([0, 1, 2], [1, 4, 20])
    weights = intervals.block_weights(section, 3000, np.random.default_rng(0))
    for index, n in enumerate((1, 4, 20)):
        np.testing.assert_allclose(weights[:, section == index].sum(axis=1), n)
    assert (weights[:, 0] == 1).all()
    # The variance of a mean over drawn blocks is that of the sample over n, even of four.
    value = np.array([0.0, 1.0, 3.0, 7.0])
    assert (weights[:, 1:5] @ value / 4).var() == pytest.approx(value.var(ddof=1) / 4, rel=0.1)


# Seeds, units, order


def test_seeds_of_a_model_are_one_method_and_their_spread_widens_its_interval():
    rng = np.random.default_rng(9)
    tissue = Tissue(2, 20, rng)
    tests = [np.sort(rng.permutation(1000)[200:]) for _ in range(5)]
    predicted = {name: tissue.predict(chance) for name, chance in
                 (("stpatch", 0.6), ("stpatch_seed1", 0.7), ("stpatch_seed2", 0.8), ("pca", 0.5))}  # fmt: skip
    for protocol in ("blocks", "random20"):
        alone, seeds = (
            tissue.compare({(name, "knn"): tissue.run(predicted[name], tests) for name in names}, protocol)
            for names in (["stpatch", "pca"], list(predicted))
        )
        assert set(seeds["method"]) == {"stpatch", "pca"}
        row = one(seeds, "stpatch")
        assert row["n_seeds"] == 3
        expected = np.mean([[np.mean(predicted[name][test] == tissue.y[test]) for test in tests]
                            for name in ("stpatch", "stpatch_seed1", "stpatch_seed2")])  # fmt: skip
        assert row["value"] == pytest.approx(expected)
        width = [one(found, "stpatch")["high"] - one(found, "stpatch")["low"] for found in (alone, seeds)]
        assert width[1] > width[0]


def test_names_lose_their_seed_and_keep_their_suffix():
    assert intervals.seedless("stpatch_spot_seed12+averaged+centred") == "stpatch_spot+averaged+centred"
    assert intervals.seedless("stpatch_seedling") == "stpatch_seedling"


def test_many_donors_are_the_units_and_unknown_ones_leave_sections():
    tissue = Tissue(12, 6, np.random.default_rng(10))
    runs = {("pca", "knn"): tissue.run(tissue.predict(0.6)), ("raw", "knn"): tissue.run(tissue.predict(0.5))}
    donor = tissue.of_section // 2
    row = one(tissue.compare(runs, donor=tissue.of_section), "raw")
    assert (row["over"], row["n_units"], row["n_sections"]) == ("donors", 12, 12)
    assert one(tissue.compare(runs, donor=np.where(donor == 0, -1, donor)), "raw")["over"] == "sections"
    few = one(tissue.compare(runs, donor=donor), "raw")
    assert (few["over"], few["n_units"]) == ("blocks", 72)
    accuracy = [[np.mean(predicted == tissue.y[test]) for _, test, predicted in run] for run in runs.values()]
    low, high = stats.ttest_rel(accuracy[1], accuracy[0]).confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((low, high))


def test_every_pretrained_model_gets_a_row_against_the_controls_best():
    tissue = Tissue(2, 10, np.random.default_rng(11))
    names = ["pca", "majority", "untrained", "stpatch", "stpatch+averaged", "stpatch_spot"]
    found = tissue.compare({(name, "knn"): tissue.run(tissue.predict(0.6)) for name in names})
    best = found[found["compared"] == "best"]
    assert sorted(zip(best["metric"], best["method"].map(lambda name: name.partition("+")[0]), strict=True)) == sorted(
        (metric, model) for metric in intervals.METRICS for model in ("stpatch", "stpatch_spot")
    )
    assert set(best["control"]) <= {"pca", "majority", "untrained"}


def test_the_same_runs_give_the_same_table_in_whatever_order_they_come():
    tissue = Tissue(2, 10, np.random.default_rng(12))
    names = ["pca", "stpatch", "stpatch_seed1", "stpatch_spot"]
    runs = {(name, "knn"): tissue.run(tissue.predict(0.6)) for name in names}
    backwards = dict(reversed(runs.items()))
    pd.testing.assert_frame_equal(tissue.compare(runs), tissue.compare(backwards))
    other = tissue.compare(runs, seed=1)
    assert one(other, "stpatch")["value"] == one(tissue.compare(runs), "stpatch")["value"]
    assert one(other, "stpatch")["low"] != one(tissue.compare(runs), "stpatch")["low"]


def test_nothing_to_compare_is_an_empty_table():
    empty = compare("d", "blocks", {}, np.array([]), np.array([]), np.array([]), sections=[])
    assert list(empty.columns) == intervals.COMPARISONS
    assert len(empty) == 0


# One control in place of all, and draws that make several splits


def test_a_model_below_one_control_and_above_another_is_told_so_of_each():
    tissue = Tissue(2, 20, np.random.default_rng(3))
    chances = {"stpatch": 0.6, "stpatch+averaged": 0.5, "raw": 0.4, "raw+centred": 0.45, "pca": 0.8}
    runs = {(method, "knn"): tissue.run(tissue.predict(chance)) for method, chance in chances.items()}
    found = tissue.compare(runs, against=["raw", "pca"])
    told = found.query("compared == 'against' and metric == 'accuracy'").set_index("control")
    assert set(told.index) == {"raw+centred", "pca"}
    assert set(told["method"]) == {"stpatch"}
    assert told.loc["raw+centred", "low"] > 0
    assert told.loc["pca", "high"] < 0
    pd.testing.assert_frame_equal(
        found[found["compared"] != "against"].reset_index(drop=True), tissue.compare(runs)
    )  # the other rows are what they were


def test_a_control_that_does_not_run_is_named():
    tissue = Tissue(2, 6, np.random.default_rng(3))
    runs = {(method, "knn"): tissue.run(tissue.y) for method in ("stpatch", "pca")}
    with pytest.raises(ValueError, match="spagcn: no control"):
        tissue.compare(runs, against=["pca", "spagcn"])


def test_draws_are_drawn_again_whole_whatever_splits_they_make():
    """Of every draw one section is told and the other is not: a whole draw is right by half, as any other is."""
    tissue = Tissue(2, 20, np.random.default_rng(5))
    good, bad = tissue.y, (tissue.y + 1) % N_CLASSES
    tests, draw = tissue.left_out * 4, np.repeat(np.arange(4), 2)
    run = [(split, test, (good if split % 2 == split // 2 % 2 else bad)[test]) for split, test in enumerate(tests)]
    runs = {("stpatch", "knn"): run, ("pca", "knn"): run}
    whole = one(tissue.compare(runs, "few", draw=draw), "stpatch")
    assert whole["value_low"] == whole["value_high"] == 0.5
    apart = one(tissue.compare(runs, "blocks"), "stpatch")
    assert apart["value_low"] < 0.3
    assert apart["value_high"] > 0.7
