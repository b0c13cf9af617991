"""The heads put on frozen features, and the metrics of what they predict; classes are ints, ordered by name."""

import warnings
from typing import NamedTuple

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
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
    """Accuracy, macro F1 (over the classes true or predicted), adjusted Rand index, normalised mutual information.

    All four from one table of counts, since thousands of predictions are scored; the definitions (and the degenerate
    cases) are those of scikit-learn, and a test holds them to it.
    """
    n_classes = int(max(truth.max(), predicted.max())) + 1
    table = np.bincount(truth * n_classes + predicted, minlength=n_classes**2).reshape(n_classes, n_classes)
    n, true, found, hit = len(truth), table.sum(axis=1), table.sum(axis=0), np.diag(table)
    present = (true + found) > 0
    return {
        "accuracy": float(hit.sum() / n),
        "macro_f1": float((2 * hit[present] / (true + found)[present]).mean()),
        "ari": _adjusted_rand(n, table, true, found),
        "nmi": _normalised_information(n, table, true, found),
    }


def _adjusted_rand(n: int, table: np.ndarray, true: np.ndarray, found: np.ndarray) -> float:
    """Hubert and Arabie (1985): pairs put together by both, corrected for chance."""
    together, by_truth, by_found = (int((counts * (counts - 1) // 2).sum()) for counts in (table, true, found))
    expected = by_truth * by_found / max(n * (n - 1) // 2, 1)
    highest = (by_truth + by_found) / 2
    return 1.0 if highest == expected else float((together - expected) / (highest - expected))


def _normalised_information(n: int, table: np.ndarray, true: np.ndarray, found: np.ndarray) -> float:
    """Mutual information over the mean of the two entropies."""
    if (true > 0).sum() == 1 and (found > 0).sum() == 1:
        return 1.0
    row, col = np.nonzero(table)
    share = table[row, col] / n
    information = (share * np.log(share * n * n / (true[row] * found[col]))).sum()
    entropy = sum(-(p[p > 0] * np.log(p[p > 0])).sum() for p in (true / n, found / n))
    return float(max(information, 0.0) / (entropy / 2))
