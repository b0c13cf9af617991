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
