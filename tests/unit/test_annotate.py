"""One's own h5ad, read in a process of its own: what it does to a library doesn't end the command, or is said in words."""

from __future__ import annotations

import os
import signal

import anndata
import numpy as np
import pytest

from tests.unit.simulated import row
from workflow import annotate, intact
from workflow.annotate import curated_apart, write_annotated
from workflow.errors import EmptySlice, Unreadable
from workflow.simulate import choose_genes, tiny_slice


def crash(*_, **__) -> None:
    signal.signal(signal.SIGABRT, signal.SIG_DFL)  # pytest's own handler prints a page
    os.abort()


@pytest.fixture
def mine(tmp_path):
    """A file as a user has it: simulated counts under real gene ids."""
    made = tiny_slice(name="mine")
    made.var_names = choose_genes(annotate.ROOT / "catalogue/aux/genes_human.tsv", 60)[0]
    del made.uns["stpatch"]
    made.write_h5ad(tmp_path / "mine.h5ad")
    return tmp_path / "mine.h5ad"


def test_a_file_of_ones_own_is_curated_in_a_child_with_the_same_result(mine, tmp_path):
    slice = curated_apart(row(url=str(mine)), mine, tmp_path)
    theirs = anndata.read_h5ad(mine)
    assert slice.shape == theirs.shape
    assert slice.X.sum() == theirs.X.sum()


def test_the_typed_error_of_the_child_is_raised_here(mine, tmp_path):
    empty = anndata.read_h5ad(mine)
    empty.X = empty.X * 0
    empty.write_h5ad(mine)
    with pytest.raises(EmptySlice, match="no count"):
        curated_apart(row(url=str(mine)), mine, tmp_path)


def test_a_file_that_crashes_the_library_is_unreadable_and_leaves_nothing(mine, tmp_path, monkeypatch):
    monkeypatch.setattr(annotate, "curate", crash)
    with pytest.raises(Unreadable, match=r"found a crash of the library that reads it \(SIGABRT\)"):
        curated_apart(row(url=str(mine)), mine, tmp_path)
    monkeypatch.setattr(annotate.ad, "read_h5ad", crash)
    with pytest.raises(Unreadable, match="SIGABRT"):
        write_annotated(mine, tmp_path / "out.h5ad", np.ones((1, 2), np.float32), ["a"])
    assert not (tmp_path / "out.h5ad").exists()


def test_spots_without_embedding_get_nan_and_the_copy_appears_whole(mine, tmp_path):
    names = list(anndata.read_h5ad(mine).obs_names)
    X = np.arange(6, dtype=np.float32).reshape(3, 2)
    out = tmp_path / "out.h5ad"
    assert write_annotated(mine, out, X, [names[5], names[0], names[9]]) == len(names)
    found = anndata.read_h5ad(out).obsm["X_stpatch"]
    assert np.array_equal(found[[5, 0, 9]], X)
    assert np.isnan(np.delete(found, [5, 0, 9], axis=0)).all()
    assert not list(tmp_path.glob("*.part"))


def test_the_downloads_probe_outlives_an_hdf5_file_that_crashes_the_library(mine, monkeypatch):
    assert intact.why_not_intact(mine, "mine.h5ad") is None
    mine.write_bytes(mine.read_bytes()[:5000])
    assert "truncated file" in intact.why_not_intact(mine, "mine.h5ad").found
    monkeypatch.setattr(intact.h5py, "File", crash)
    assert "a crash of the library that reads it (SIGABRT)" in intact.why_not_intact(mine, "mine.h5ad").found
