"""The heads put on frozen features, for all splits of a dataset at once; classes are ints, ordered by name."""

from typing import NamedTuple

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from workflow.intervals import metrics_of
from workflow.nearest import vote

N_NEIGHBOURS = 10
INVERSE_PENALTY = 0.1  # C of the logistic probe
MAX_ITER = 500

Spots = tuple[np.ndarray, np.ndarray]  # who trains, who is tested: int, ascending


class Prediction(NamedTuple):
    classes: np.ndarray  # int, of the tested spots
    converged: bool = True


def majority(y: np.ndarray, splits: list[Spots]) -> list[Prediction]:
    """The most frequent class of the training spots (equal ones: the first) for every tested spot."""
    return [Prediction(np.repeat(np.bincount(y[train]).argmax(), len(test))) for train, test in splits]


def knn(x: np.ndarray, y: np.ndarray, splits: list[Spots]) -> list[Prediction]:
    """Vote of the 10 nearest training spots, Euclidean; equal votes go to the first class."""
    return [Prediction(classes) for classes in vote(x, y, splits, N_NEIGHBOURS)]


def logistic(x: np.ndarray, y: np.ndarray, splits: list[Spots]) -> list[Prediction]:
    """Multinomial logistic regression, C = .1, on features standardised on the training spots.

    In float32: half the time, and no farther from the optimum than the solver's tolerance leaves float64.
    A `ConvergenceWarning` is the caller's to silence; `converged` says the same.
    """
    x = (x - x.mean(axis=0)).astype(np.float32)  # large offsets would cost digits
    predictions = []
    for train, test in splits:
        if len(np.unique(y[train])) == 1:
            predictions += majority(y, [(train, test)])
            continue
        scaler = StandardScaler().fit(x[train])
        model = LogisticRegression(C=INVERSE_PENALTY, max_iter=MAX_ITER).fit(scaler.transform(x[train]), y[train])
        converged = bool(model.n_iter_.max() < MAX_ITER)
        predictions.append(Prediction(model.predict(scaler.transform(x[test])), converged))
    return predictions


HEADS = {"knn": knn, "logistic": logistic}


def confusion(truth: np.ndarray, predicted: np.ndarray, n_classes: int) -> np.ndarray:
    """Counts of true class by predicted class, int64 [n_classes, n_classes]."""
    counts = np.bincount(truth * n_classes + predicted, minlength=n_classes * n_classes)
    return counts.reshape(n_classes, n_classes)


def metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 (over the classes true or predicted), adjusted Rand index, normalised mutual information."""
    n_classes = 1 + max(truth.max(), predicted.max())
    return {name: float(value) for name, value in metrics_of(confusion(truth, predicted, n_classes)).items()}
