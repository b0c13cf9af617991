"""Our reading of Space Ranger matrices beside scanpy's, which most people use.

Ours checks a file's structure before anything touches it and keeps the types of features apart; the numbers must be the same.
"""

from __future__ import annotations

import warnings

import numpy as np
import pytest

from tests.unit.simulated import small_slice
from workflow.deposits import write_deposit
from workflow.readers.tenx import read_h5, read_mex

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # deprecations inside scanpy's own imports
    import scanpy


def same(ours, theirs):
    counts, spots, features = ours
    assert list(theirs.obs_names) == list(spots)
    assert list(theirs.var["gene_ids"]) == list(features["id"])
    np.testing.assert_array_equal(theirs.X.toarray(), counts.toarray())


def mex_files(folder):
    return tuple(folder / f"{name}.gz" for name in ("matrix.mtx", "features.tsv", "barcodes.tsv"))


@pytest.mark.filterwarnings("ignore")
def test_simulated_matrices_are_read_as_scanpy_reads_them(tmp_path):
    write_deposit(small_slice(), "spaceranger-2", tmp_path / "two")
    write_deposit(small_slice(), "spaceranger-1", tmp_path / "one")
    h5 = tmp_path / "two/outs/filtered_feature_bc_matrix.h5"
    same(read_h5("s", (h5,)), scanpy.read_10x_h5(h5, gex_only=False))
    folder = tmp_path / "one/outs/filtered_feature_bc_matrix"
    same(read_mex("s", mex_files(folder)), scanpy.read_10x_mtx(folder, gex_only=False))


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_real_matrices_are_read_as_scanpy_reads_them(real_data):
    outs = real_data / "spaceranger/cytassist_mouse_placenta"
    h5, folder = outs / "filtered_feature_bc_matrix.h5", outs / "filtered_feature_bc_matrix"
    same(read_h5("s", (h5,)), scanpy.read_10x_h5(h5, gex_only=False))
    same(read_mex("s", mex_files(folder)), scanpy.read_10x_mtx(folder, gex_only=False))
