"""What a user sees before anything is built: the plan, typos, and defaults that stay in force."""

from __future__ import annotations

import pytest

from tests.conftest import ROOT
from tests.pipeline.conftest import DEMO, snakemake

pytestmark = pytest.mark.pipeline

HEAVY = ("torch", "anndata", "scanpy", "zarr", "numcodecs", "numba", "h5py", "scipy", "sklearn", "matplotlib")


@pytest.fixture
def without_heavy_packages(tmp_path):
    """PYTHONPATH under which importing torch and its like fails, as on a machine that lacks them."""
    folder = tmp_path / "absent"
    folder.mkdir()
    for name in HEAVY:
        (folder / f"{name}.py").write_text(f"raise ImportError('{name} is not needed for a dry run')\n")
    return {"PYTHONPATH": str(folder)}


def test_a_dry_run_of_the_demo_needs_no_heavy_package(tmp_path, without_heavy_packages):
    printed = snakemake("--dry-run", *DEMO, "all", directory=tmp_path, env=without_heavy_packages).stdout
    assert "simulate" in printed
    assert "curate" in printed
    assert "admit" in printed


def test_a_dry_run_of_the_default_corpus_works_from_another_directory(tmp_path, without_heavy_packages):
    printed = snakemake("--dry-run", directory=tmp_path, env=without_heavy_packages).stdout
    assert "download" in printed


def test_the_repositorys_defaults_stay_in_force_under_a_config_file(tmp_path):
    (tmp_path / "mine.yaml").write_text("genes: 77\n")
    printed = snakemake("--dry-run", "--printshellcmds", "data", "--configfile", "mine.yaml", directory=tmp_path).stdout
    assert "download" in printed  # catalogue and all other keys come from the repository's config.yaml


def test_an_unknown_config_key_fails_the_dry_run_and_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("windwo: [8, 8]\n")
    done = snakemake("--dry-run", "--configfile", "mine.yaml", directory=tmp_path, check=False)
    assert done.returncode != 0
    assert "unknown key 'windwo' (did you mean 'window'?)" in done.stdout


def test_an_unknown_trainer_setting_fails_the_dry_run_and_is_named(tmp_path):
    (tmp_path / "mine.yaml").write_text("pretrain: {batchsize: 8}\n")
    done = snakemake("--dry-run", "--configfile", "mine.yaml", directory=tmp_path, check=False)
    assert done.returncode != 0
    assert "unknown key 'pretrain.batchsize' (did you mean 'batch_size'?)" in done.stdout


def test_a_duplicate_slice_name_fails_the_dry_run_and_is_named(tmp_path):
    lines = (ROOT / "demo/catalogue.tsv").read_text().splitlines()
    (tmp_path / "twice.tsv").write_text("\n".join([*lines, lines[1]]) + "\n")
    (tmp_path / "mine.yaml").write_text("catalogue: twice.tsv\n")
    done = snakemake("--dry-run", "--configfile", "mine.yaml", directory=tmp_path, check=False)
    assert done.returncode != 0
    assert "duplicate slice name" in done.stdout
