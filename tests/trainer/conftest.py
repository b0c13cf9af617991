"""One tiny simulated corpus and one short training run, shared by the trainer's tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer import corpus
from trainer import pretrain

SMALL = "--width 32 --depth 1 --heads 4 --feed-forward 64 --decoder-width 32 --decoder-depth 1 --device cpu".split()
FIXED = (
    "--gene-embeddings fixed --axes 6 --inputs slice --positions distance".split()
)  # of shards with components and means


torch.set_num_threads(1)  # of so small a model more threads only wait for each other, above all on a busy machine


@pytest.fixture(scope="session")
def tissue() -> corpus.Tissue:
    return corpus.Tissue()


@pytest.fixture(scope="session")
def train_slices(tissue) -> list[tuple]:
    return [tissue.slice(20, 24, seed) for seed in (1, 2, 3, 4)]


@pytest.fixture(scope="session")
def genes_tsv(train_slices) -> bytes:
    return corpus.vocabulary(train_slices)


@pytest.fixture(scope="session")
def shards(tmp_path_factory, tissue, train_slices, genes_tsv) -> Path:
    """``train`` (4 slices, 160 windows) and ``val`` (another slice, 40 windows) of 6 x 5 cells and 24 genes."""
    folder = tmp_path_factory.mktemp("shards")
    corpus.write_split(folder / "train", "train", train_slices, genes_tsv, n_windows=40, m=24, h=6, w=5)
    corpus.write_split(folder / "val", "val", [tissue.slice(20, 24, 9)], genes_tsv, n_windows=40, m=24, h=6, w=5)
    return folder


@pytest.fixture(scope="session")
def fixed_shards(tmp_path_factory, shards, tissue, train_slices) -> Path:
    """The same shards with what fixed gene embeddings need: six components, three of them planted, and the slices' means."""
    folder = shutil.copytree(shards, tmp_path_factory.mktemp("fixed") / "shards")
    axes = np.column_stack([tissue.loadings, np.random.default_rng(0).normal(size=(60, 3))])
    noise = np.mean([values.var(1) for values in corpus.expression(train_slices)], axis=0)
    corpus.add_components(folder / "train", np.linalg.qr(axes)[0], noise)
    corpus.add_means(folder / "train", train_slices)
    corpus.add_means(folder / "val", [tissue.slice(20, 24, 9)])
    return folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory, shards) -> Path:
    """A model folder after a short training run."""
    out = tmp_path_factory.mktemp("run") / "model"
    flags = "--steps 250 --batch-size 16 --lr 3e-3 --optimizer adamw --log-every 50 --val-every 125".split()
    pretrain.main(["--shards", str(shards / "train"), "--out", str(out), *SMALL, *flags])
    return out
