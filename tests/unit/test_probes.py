"""The heads against scikit-learn's, and metrics on hand-worked cases."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, adjusted_rand_score, f1_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from workflow import nearest, probes, protocols
from workflow.nearest import vote


def test_metrics_tell_agreement_of_names_from_agreement_of_groups():
    truth = np.repeat([0, 1, 2], 10)
    assert probes.metrics(truth, truth) == dict.fromkeys(["accuracy", "macro_f1", "ari", "nmi"], 1.0)
    renamed = probes.metrics(truth, (truth + 1) % 3)
    assert renamed == {"accuracy": 0.0, "macro_f1": 0.0, "ari": 1.0, "nmi": pytest.approx(1.0)}
    constant = probes.metrics(truth, np.zeros(30, int))
    assert constant["accuracy"] == pytest.approx(1 / 3)
    assert constant["macro_f1"] == pytest.approx(1 / 6)  # precision 1/3, recall 1 in one of three classes
    assert (constant["ari"], constant["nmi"]) == (0.0, pytest.approx(0.0, abs=1e-12))


def test_metrics_are_those_of_scikit_learn():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 5, 400), rng.integers(0, 6, 400)
    predicted[:250] = truth[:250]
    assert probes.metrics(truth, predicted) == pytest.approx(
        {
            "accuracy": accuracy_score(truth, predicted),
            "macro_f1": f1_score(truth, predicted, average="macro", zero_division=0),
            "ari": adjusted_rand_score(truth, predicted),
            "nmi": normalized_mutual_info_score(truth, predicted),
        }
    )


def test_the_majority_probe_predicts_the_most_frequent_class_and_ties_go_to_the_first():
    y = np.array([2, 2, 1, 0, 0])
    splits = [(np.array([0, 1, 2]), np.array([3, 4])), (np.array([0, 2]), np.array([3]))]
    assert [made.classes.tolist() for made in probes.majority(y, splits)] == [[2, 2], [1]]


def test_a_single_training_class_and_few_training_spots_are_no_obstacle():
    x, y = np.random.default_rng(0).normal(size=(6, 2)), np.array([3, 3, 3, 3, 0, 1])
    for probe in probes.HEADS.values():
        (made,) = probe(x, y, [(np.arange(4), np.array([4, 5]))])
        assert made.classes.tolist() == [3, 3]


def blobs(n: int, d: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Five overlapping classes in d dimensions, far from the origin."""
    rng = np.random.default_rng(seed)
    y = rng.integers(0, 5, n)
    return 50 + rng.normal(size=(5, d))[y] * 0.7 + rng.normal(size=(n, d)), y


def splits_of(n: int) -> list:
    random = [(train, test) for _, train, test in protocols.random20(n, 2, 0, "d")]
    return [*random, (np.arange(n // 2), np.arange(n // 2, n)), (np.arange(7), np.arange(7, n))]


@pytest.mark.parametrize("d", [2, 8, 9, 200])
def test_the_nearest_neighbours_vote_as_in_scikit_learn(d):
    x, y = blobs(1200, d)
    splits = splits_of(len(x))
    for (train, test), made in zip(splits, probes.knn(x, y, splits), strict=True):
        exact = KNeighborsClassifier(n_neighbors=min(10, len(train)), algorithm="brute").fit(x[train], y[train])
        assert np.array_equal(made.classes, exact.predict(x[test]))


def test_the_vote_is_exact_where_single_precision_is_not():
    """Two groups so far from each other that float32 can't tell the distances within either."""
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(600, 12)), rng.integers(0, 5, 600)
    x[::2] += 1e6
    splits = splits_of(len(x))
    for (train, test), made in zip(splits, probes.knn(x, y, splits), strict=True):
        exact = ((x[test][:, None] - x[train]) ** 2).sum(axis=2).argsort(axis=1, kind="stable")[:, :10]
        expected = [np.bincount(y[train[nearest]]).argmax() for nearest in exact]
        assert made.classes.tolist() == expected


@pytest.mark.parametrize("d", [2, 30])
def test_of_equally_near_spots_the_first_ones_vote(d):
    x = np.zeros((40, d))
    x[20:] = 1
    y = np.repeat([0, 1, 2, 3], 10)  # ten of class 0 before ten of class 1 in one place
    train, test = np.arange(39), np.array([39])
    assert vote(x, y, [(train, test), (train[1:], test), (np.arange(20), test)], 10)[0].tolist() == [2]
    assert vote(x, y, [(np.arange(5, 20), test)], 10)[0].tolist() == [0]  # five votes each


@pytest.mark.parametrize("d", [2, 30])
def test_a_spot_at_the_very_centre_is_no_exception(d, monkeypatch):
    half = np.random.default_rng(0).integers(1, 9, (60, d)).astype(float)
    x, y = np.concatenate([half, -half, np.zeros((1, d))]), np.arange(121) % 5
    monkeypatch.setattr(nearest, "N_LISTED", 4)  # so that it goes through all training spots too
    train, test = np.arange(120), np.array([120])
    order = (x[train] ** 2).sum(axis=1).argsort(kind="stable")[:10]
    assert vote(x, y, [(train, test)], 10)[0].tolist() == [np.bincount(y[order]).argmax()]


def test_many_blocks_of_spots_give_the_votes_of_one(monkeypatch):
    x, y = blobs(500, 20)
    splits = splits_of(len(x))
    whole = vote(x, y, splits, 10)
    monkeypatch.setattr(nearest, "AT_ONCE", 64 * 500)
    for one, other in zip(whole, vote(x, y, splits, 10), strict=True):
        assert np.array_equal(one, other)


def test_the_logistic_probe_is_that_of_scikit_learn_in_double_precision():
    x, y = blobs(1500, 20)
    train, test = np.arange(500), np.arange(500, 1500)
    scaler = StandardScaler().fit(x[train])
    exact = LogisticRegression(C=0.1, tol=1e-8, max_iter=5000).fit(scaler.transform(x[train]), y[train])
    (made,) = probes.logistic(x, y, [(train, test)])
    assert made.converged
    assert (made.classes != exact.predict(scaler.transform(x[test]))).mean() <= 0.002
