"""The heads put on frozen features, and the metrics of what they predict; classes are ints, ordered by name."""

import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, adjusted_rand_score, f1_score, normalized_mutual_info_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

N_NEIGHBOURS = 10
INVERSE_PENALTY = 0.1  # C of the logistic probe
MAX_ITER = 500


class Prediction(NamedTuple):
    classes: np.ndarray  # int, of the tested spots
    converged: bool


def majority(train_y: np.ndarray, n_test: int) -> Prediction:
    """The most frequent class of the training spots (equal ones: the first) for every tested spot."""
    classes, count = np.unique(train_y, return_counts=True)
    return Prediction(np.repeat(classes[count.argmax()], n_test), True)


def knn(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> Prediction:
    """Vote of the 10 nearest training spots, Euclidean; equal votes go to the first class."""
    model = KNeighborsClassifier(n_neighbors=min(N_NEIGHBOURS, len(train_y)))
    return Prediction(model.fit(train_x, train_y).predict(test_x), True)


def logistic(train_x: np.ndarray, train_y: np.ndarray, test_x: np.ndarray) -> Prediction:
    """Multinomial logistic regression, C = .1, on features standardised on the training spots."""
    if len(np.unique(train_y)) == 1:
        return majority(train_y, len(test_x))
    scaler = StandardScaler().fit(train_x)
    model = LogisticRegression(C=INVERSE_PENALTY, max_iter=MAX_ITER)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # told apart by n_iter_, and recorded
        model.fit(scaler.transform(train_x), train_y)
    return Prediction(model.predict(scaler.transform(test_x)), bool(model.n_iter_.max() < MAX_ITER))


HEADS = {"knn": knn, "logistic": logistic}


def metrics(truth: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Accuracy, macro F1 (over the classes true or predicted), adjusted Rand index, normalised mutual information."""
    return {
        "accuracy": float(accuracy_score(truth, predicted)),
        "macro_f1": float(f1_score(truth, predicted, average="macro", zero_division=0)),
        "ari": float(adjusted_rand_score(truth, predicted)),
        "nmi": float(normalized_mutual_info_score(truth, predicted)),
    }
