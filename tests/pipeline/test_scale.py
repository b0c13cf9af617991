"""A corpus of a thousand slices: its plan is whole, and comes while one waits."""

from __future__ import annotations

import time

import pytest

from benchmarks.scale import planned_jobs, pretend_admitted, write_corpus
from tests.pipeline.conftest import snakemake

pytestmark = pytest.mark.pipeline

CONFIG = ("--configfile", "scale.yaml", "--")


def test_a_thousand_slices_are_planned_and_after_admission_all_that_follows(tmp_path):
    names = write_corpus(tmp_path, 1000)
    jobs = planned_jobs(snakemake("--dry-run", *CONFIG, "data", directory=tmp_path).stdout)
    assert (jobs["simulate"], jobs["curate"], jobs["admit"], jobs["shards"]) == (1000, 1000, 1, 2)
    assert "grid" not in jobs  # who goes on is known only once all are curated

    pretend_admitted(tmp_path, names)
    # no slice was curated here, so there is no record of code and params to compare with: times of files decide
    start = time.monotonic()
    jobs = planned_jobs(snakemake("--dry-run", "--rerun-triggers", "mtime", *CONFIG, "data", directory=tmp_path).stdout)
    assert time.monotonic() - start < 300  # some 6 s on a free core
    assert not {"simulate", "curate", "admit"} & set(jobs)
    assert (jobs["grid"], jobs["windows"], jobs["moments"]) == (
        1000,
        1000,
        1000,
    )  # the validating ones need their means
    assert (jobs["stats"], jobs["shards"]) == (1, 2)


COUNT = """
import atexit, os, sys, threading
if sys.argv[0].endswith("-m"):  # python -m snakemake: not its jobs
    made, init = [], threading.Timer.__init__
    def count(self, *arguments, **named):
        made.append(1)
        init(self, *arguments, **named)
    threading.Timer.__init__ = count
    atexit.register(lambda: open(os.environ["TIMERS"], "w").write(str(len(made))))
"""


@pytest.mark.parametrize(("limit", "timed"), [("100/1s", False), ("50/1s", True)])
def test_snakemake_looks_at_waiting_jobs_when_a_job_ends_and_not_ever_again(tmp_path, limit, timed):
    """Its limit of starts a second makes every look order another; only who asks for a limit has that."""
    names = write_corpus(tmp_path, 3, tiny=True)
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(COUNT)
    env = {"PYTHONPATH": str(tmp_path / "hook"), "TIMERS": str(tmp_path / "timers")}
    files = [f"results/slices/{name}.h5ad" for name in names]
    options = ("--cores", 1, "--max-jobs-per-timespan", limit, *CONFIG)
    snakemake(*options, *files, directory=tmp_path, env=env)
    assert (int((tmp_path / "timers").read_text()) > 0) == timed
