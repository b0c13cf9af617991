"""The k-NN head for all splits of a dataset at once: the votes of an exact search, in a fraction of its time."""

import numpy as np
from numba import njit
from scipy.spatial.distance import cdist

N_LISTED = 256  # nearest spots of any kind that are listed for each spot; splits seek their training spots among them
FEW = 8  # features up to which double precision is as quick
AT_ONCE = 2**23  # distances in memory


def vote(x: np.ndarray, y: np.ndarray, splits: list[tuple[np.ndarray, np.ndarray]], k: int) -> list[np.ndarray]:
    """Majority class of each tested spot's k nearest training spots, for every split.

    Distances are Euclidean in float64, equal ones ordered by index; equal votes go to the first class. Pairs that
    splits have in common are compared once: a product of float32 matrices lists the nearest of all spots, and each
    split walks down that list, taking exact distances of its training spots, until the product's rounding can hide
    none that is nearer. Where the list ends before, it goes through all training spots likewise.

    Parameters
    ----------
    x
        float64 [n, d].
    y
        int [n], classes from 0.
    splits
        Training and tested spots of each, ascending.

    Returns
    -------
    int64 [n_tested] for each split.
    """
    n, d = x.shape
    # A common centre changes no distance and keeps the rounding small.
    x = np.ascontiguousarray(x - x.mean(axis=0))
    square = (x**2).sum(axis=1)
    single, unit = (x, 2.0**-53) if d <= FEW else (x.astype(np.float32), 2.0**-24)
    trains = np.zeros((len(splits), n), dtype=bool)
    for split, (train, _) in enumerate(splits):
        trains[split, train] = True
    predicted = [np.empty(len(test), dtype=np.int64) for _, test in splits]
    rows = max(AT_ONCE // n, 1)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        if d <= FEW:
            near = cdist(x[start:stop], x, "sqeuclidean")
            near -= square[start:stop, None]
        else:
            near = single[start:stop] @ single.T
            near *= -2
            near += square.astype(np.float32)
        # Squared distance less the row's own square, which changes no order.
        listed, apart = _list(near, min(N_LISTED, n))
        for split, ((train, test), classes) in enumerate(zip(splits, predicted, strict=True)):
            first, last = np.searchsorted(test, [start, stop])
            if first < last:
                some, of = classes[first:last], (test[first:last], min(k, len(train)), int(y.max()) + 1, unit)
                _vote(x, y, square, near, listed, apart, start, trains[split], train, *of, some)
    return predicted


@njit(cache=True, nogil=True)
def _list(near, n_listed):
    """Columns of the least values of each row, ascending, and those values (a heap, the largest at its top)."""
    n_rows, n = near.shape
    listed = np.empty((n_rows, n_listed), dtype=np.int32)
    apart = np.empty((n_rows, n_listed), dtype=near.dtype)
    for row in range(n_rows):
        values, columns = apart[row], listed[row]
        values[:] = np.inf
        for column in range(n):
            value = near[row, column]
            if value < values[0]:
                at = 0
                while True:
                    below = 2 * at + 1
                    if below >= n_listed:
                        break
                    if below + 1 < n_listed and values[below + 1] > values[below]:
                        below += 1
                    if values[below] <= value:
                        break
                    values[at], columns[at] = values[below], columns[below]
                    at = below
                values[at], columns[at] = value, column
        order = np.argsort(values)
        values[:], columns[:] = values[order], columns[order]
    return listed, apart


@njit(cache=True, nogil=True, fastmath={"reassoc", "nsz", "contract"})  # sums in lanes
def _square_distance(a, b):
    total = 0.0
    for i in range(len(a)):
        total += (a[i] - b[i]) ** 2
    return total


@njit(cache=True, nogil=True)
def _insert(value, index, values, indices):
    """Into the list in order of value, then index; the last falls out."""
    at = len(values)
    while at > 0 and (value < values[at - 1] or (value == values[at - 1] and index < indices[at - 1])):
        if at < len(values):
            values[at], indices[at] = values[at - 1], indices[at - 1]
        at -= 1
    if at < len(values):
        values[at], indices[at] = value, index


@njit(cache=True, nogil=True)
def _vote(x, y, square, near, listed, apart, start, trains, train, test, k, n_classes, unit, classes):
    n, d = x.shape
    indices, values = np.empty(k, dtype=np.int64), np.empty(k)
    votes = np.empty(n_classes, dtype=np.int64)
    for place in range(len(test)):
        row = test[place]
        columns, distances = listed[row - start], apart[row - start]
        # Beyond this distance, as in `near`, there is no spot as near as the k-th found so far.
        end, certain = np.inf, len(columns) == n
        values[:], indices[:] = np.inf, n
        for at in range(len(columns)):
            if distances[at] > end:
                certain = True
                break
            if trains[columns[at]]:
                _insert(_square_distance(x[row], x[columns[at]]), columns[at], values, indices)
                end = _end(values[-1], square[row], d, unit)
        if not certain:
            distances = near[row - start]
            for step in (64, 1):  # a few from everywhere tell `end` well enough, whatever the order of the spots
                values[:], indices[:] = np.inf, n
                for index in train[::step]:
                    if distances[index] <= end:
                        _insert(_square_distance(x[row], x[index]), index, values, indices)
                        end = min(end, _end(values[-1], square[row], d, unit))
        votes[:] = 0
        for index in indices:
            votes[y[index]] += 1
        classes[place] = votes.argmax()


@njit(cache=True, nogil=True)
def _end(exact, square, d, unit):
    """What the rounding can make of the squared distance `exact`, less the row's own square, at most.

    A spot that near has a norm of at most `reach`, and by it the rounding of a product over d features is bounded.
    """
    if exact == np.inf:  # fewer than k were found; times a norm of 0 it would be no number
        return exact
    norm = np.sqrt(square)
    reach = norm + np.sqrt(exact)
    return exact - square + unit * ((2 * d + 8) * norm * reach + 8 * reach**2)
