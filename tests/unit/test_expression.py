import numpy as np
import scipy.sparse as sp

from workflow.expression import log_normalise


def test_a_count_is_scaled_to_the_target_and_logged():
    assert log_normalise(3, 600, 10_000) == np.log1p(50.0)


def test_a_spot_without_counts_gives_zero_and_no_warning():
    assert log_normalise([[0, 0]], [[0.0]], 1e4).tolist() == [[0.0, 0.0]]


def test_dense_and_sparse_counts_give_the_same_values():
    counts = np.random.default_rng(0).poisson(0.7, (20, 30))
    totals = counts.sum(axis=1) + 5
    sparse = sp.csr_matrix(counts)
    dense = log_normalise(counts, totals[:, None], 1e4)
    sparse.data = log_normalise(sparse.data, np.repeat(totals, np.diff(sparse.indptr)), 1e4)
    np.testing.assert_array_equal(sparse.toarray(), dense)
    assert log_normalise(counts, totals[:, None], 1e4, np.float32).dtype == np.float32
