"""Runs of the real Snakemake that several tests look at."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT


def snakemake(*arguments, directory: Path, check: bool = True, env: dict | None = None) -> subprocess.CompletedProcess:
    """Run the repository's Snakefile in `directory`, as a user would; output is captured, stderr joined to stdout."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--directory", str(directory)]
    bare = {"PATH": "/usr/local/bin:/usr/bin:/bin", "OMP_NUM_THREADS": "1"}  # the environment isn't activated
    here = {**os.environ, **bare}
    done = subprocess.run(
        [*command, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**here, **(env or {})},
        cwd=directory,
    )
    if check and done.returncode:
        pytest.fail(f"snakemake {' '.join(map(str, arguments))} ended with {done.returncode}:\n{done.stdout[-6000:]}")
    return done


DEMO = ("--configfile", ROOT / "demo/config.yaml", "--")  # without the dashes a target would count as a file


@pytest.fixture(scope="session")
def built_demo(tmp_path_factory) -> Path:
    """Working directory of a finished demo run (all targets)."""
    directory = tmp_path_factory.mktemp("demo")
    snakemake("--cores", 2, *DEMO, "all", directory=directory)
    return directory
