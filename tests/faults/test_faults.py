"""A bounded fault campaign on a tiny simulated corpus; `make test-faults` runs the long one."""

from __future__ import annotations

import random
import shutil

import pytest

from tests.faults.campaign import (
    SAME,
    STOPPED,
    Build,
    Tally,
    flips_met,
    flips_verified,
    kills,
    may_mount,
    small_disks,
    two_at_once,
)
from tests.faults.corpus import final_files

pytestmark = [pytest.mark.faults, pytest.mark.pipeline]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Build:
    """The undisturbed build."""
    build = Build(tmp_path_factory.mktemp("faults") / "finished")
    build.must()
    return build


@pytest.fixture(scope="module")
def reference(finished) -> dict[str, str]:
    return final_files(finished.results)


@pytest.fixture
def build(finished, tmp_path):
    """A folder to break; no process of it is left behind."""
    made = Build(tmp_path / "broken").copy_of(finished)
    yield made
    made.orphans_ended()


def test_a_finished_folder_has_nothing_that_verify_complains_of(build):
    assert build.verified() == (0, ["0 problems"])


def test_runs_that_were_killed_at_random_moments_end_in_the_same_bytes(build, reference):
    build.clear()
    tally = Tally()
    kills(build, reference, 3, random.Random(3), tally)
    assert sum(found.total() for found in tally.counts.values()) == 3
    assert all(set(found) == {SAME} for found in tally.counts.values()), tally.table()


def test_a_second_run_in_the_folder_is_refused_with_the_remedy_and_the_first_one_is_none_the_worse(
    build, finished, reference
):
    tally = Tally()
    two_at_once(build, finished, reference, tally)
    assert [set(found) for found in tally.counts.values()] == [{STOPPED}, {SAME}]


@pytest.mark.parametrize("kind", ["chunk of a grid", "index.json", "shard", "model"])
def test_a_run_that_meets_a_flipped_bit_stops_and_names_the_file_or_is_none_the_worse(build, finished, kind):
    tally = Tally()
    flips_met(build, finished, [kind], random.Random(1), tally)
    (found,) = tally.counts.values()
    assert set(found) <= {STOPPED, SAME}, tally.remarks


def test_what_verify_says_to_delete_after_flipped_bits_is_made_again_with_the_same_bytes(build, finished, reference):
    tally = Tally()
    flips_verified(build, finished, reference, ["shard", "whole slice"], random.Random(2), tally)
    assert all(set(found) == {SAME} for found in tally.counts.values()), tally.table()


def test_a_tar_that_vanished_is_named_and_made_again(build, reference):
    (build.results / "shards/val/val-000000.tar").unlink()
    code, lines = build.verified()
    assert code == 1
    assert any("val-000000.tar" in line for line in lines)
    assert build.same(reference, *build.follow(lines)) == SAME


@pytest.mark.skipif(not may_mount(), reason="this user may not mount a small file system to fill")
def test_a_full_disk_stops_the_stage_with_the_remedy_and_the_rerun_gives_the_same_bytes(build, finished, reference):
    build.clear()
    with small_disks(build.folder) as disk:
        for name in ("results", "resources", ".snakemake"):
            shutil.copytree(finished.folder / name, build.folder / name, dirs_exist_ok=True)
        target = "results/shards/slices/tiny_a.tar"
        (build.folder / target).unlink()
        disk(pages=2)
        code, said = build.run(target)
        assert code
        assert "No space left on device. Next step: make room on the disk of" in said
        disk()
        assert build.same(reference, target) == SAME
        shutil.rmtree(build.folder / ".snakemake")
