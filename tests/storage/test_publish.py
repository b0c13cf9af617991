"""A corpus copied to another file system through Snakemake's storage plugin `fs`: the one storage that needs no server."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.trainer import corpus

pytestmark = pytest.mark.pipeline


@pytest.fixture(scope="module", autouse=True)
def rsync():
    if not shutil.which("rsync"):
        pytest.skip("the storage plugin `fs` copies with rsync, which is not installed")


@pytest.fixture
def shards(tmp_path) -> Path:
    """Two splits and the card of a simulated corpus."""
    slices = [corpus.Tissue().slice(14, 16, seed=seed) for seed in (1, 2)]
    genes = corpus.vocabulary(slices)
    for split in ("train", "val"):
        corpus.write_split(tmp_path / "shards" / split, split, slices, genes, n_windows=20, m=20, h=6, w=6)
    (tmp_path / "shards/README.md").write_text("simulated\n")
    return tmp_path / "shards"


def publish(shards: Path, check: bool = True) -> subprocess.CompletedProcess:
    directory = shards.parent / "run"
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "rules/publish.smk"), "--cores", "1"]
    command += ["--workflow-profile", "none", "--config", f"shards={shards}", f"to={shards.parent / 'bucket'}"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=check, timeout=120)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_published_corpus_is_the_whole_corpus_and_is_not_copied_twice(shards):
    publish(shards)
    assert len(list(shards.rglob("*.tar"))) == 4
    assert contents(shards.parent / "bucket") == contents(shards)
    assert "Nothing to be done" in publish(shards).stderr


def test_a_damaged_shard_is_not_published_and_neither_is_its_index(shards):
    tar = shards / "train/train-000001.tar"
    content = bytearray(tar.read_bytes())
    content[1000] ^= 1
    tar.write_bytes(content)
    done = publish(shards, check=False)
    assert done.returncode != 0
    assert str(tar) in done.stderr
    there = contents(shards.parent / "bucket")
    assert "train/index.json" not in there
    assert "train/train-000001.tar" not in there
