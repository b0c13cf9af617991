"""A SLURM cluster for the tests of this folder, and Snakemake runs on it. Without SLURM's packages they are skipped."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.slurm.cluster import CannotRun, Cluster

PROFILE = ROOT / "profiles/slurm/profile.v9+.yaml"
# The profile as it is, but for what only saves time here: jobs are looked at often, and the file system is the local one.
QUICK = ("--slurm-init-seconds-before-status-checks", "2", "--latency-wait", "5")


@pytest.fixture(scope="session")
def cluster():
    folder = Path(tempfile.mkdtemp(prefix="stpatch-slurm-"))  # a short path, for the sockets in it
    try:
        with Cluster(folder) as running:
            yield running
    except CannotRun as reason:
        pytest.skip(f"no SLURM here: {reason}")
    finally:
        shutil.rmtree(folder)


def profile(folder: Path, **settings: object) -> Path:
    """A copy of the shipped profile with some of its first lines set, as a user would make it."""
    text = PROFILE.read_text()
    for name, value in settings.items():
        text, found = re.subn(rf"(?m)^  {name}: \S+", f"  {name}: {value}", text)
        assert found == 1, name
    folder.mkdir(parents=True)
    (folder / PROFILE.name).write_text(text)
    return folder


class Run:
    """Snakemake in ``directory``, started; ``wait`` for its end."""

    def __init__(self, directory: Path, *arguments: object, snakefile: Path = ROOT / "Snakefile") -> None:
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--directory", str(directory)]
        directory.mkdir(exist_ok=True)
        self.log, self.began = directory / "snakemake.log", time.monotonic()
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [*command, *map(str, arguments)], stdout=log, stderr=subprocess.STDOUT, cwd=directory
            )

    def wait(self, timeout: float) -> float:
        """Seconds that the run took; fails with its log unless it succeeded in time."""
        try:
            code = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.stop()
            code = f"no end within {timeout} s"
        if code:
            pytest.fail(f"snakemake: {code}\n{self.log.read_text()[-6000:]}")
        return time.monotonic() - self.began

    def until(self, what: Callable[[], object], timeout: float) -> object:
        """What ``what`` returns as soon as that is true; fails where the run ends or the time is over before."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and self.process.poll() is None:
            if found := what():
                return found
            time.sleep(0.3)
        self.stop()
        pytest.fail(f"waited in vain; snakemake's log:\n{self.log.read_text()[-6000:]}")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


def table(jobs: list[dict[str, str]]) -> str:
    """The cluster's jobs, for people."""
    columns = ["JobId", "Comment", "JobState", "RunTime", "NumNodes", "NumCPUs", "MinMemoryNode", "TimeLimit"]
    rows = [columns, *([job.get(name, "") for name in columns] for job in jobs)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
