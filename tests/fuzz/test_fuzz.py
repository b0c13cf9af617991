"""Whatever stands in a foreign file, the answer is a right result or a typed error: no hang, no crash, no code, no file elsewhere."""

from __future__ import annotations

import os
import subprocess

import pytest

from tests.fuzz.cage import caged
from tests.fuzz.campaign import campaign
from tests.fuzz.targets import TARGETS
from workflow.errors import SliceError

EXAMPLES = int(os.environ.get("STPATCH_FUZZ", "0"))  # inputs a target, drawn anew each time; 0: the same few


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_a_good_deposit_is_read(target, tmp_path):
    outcome = target.run(tmp_path, 0, [], True)
    assert (outcome.kind, outcome.detail) == ("right", "")


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_spoiled_files_end_in_a_right_result_or_a_typed_error(target, tmp_path):
    (tmp_path / "secret.h5").write_bytes(b"")
    campaign(target, tmp_path, EXAMPLES or 20, fixed=not EXAMPLES)


def allocate():
    return str(len(bytearray(3 << 30)))


def spin():
    while True:
        pass


def write_outside():
    open("/tmp/stpatch-evil", "w").close()
    return ""


CAUGHT = {
    "memory": allocate,
    "crash": lambda: os.abort(),
    "forbidden": write_outside,
    "typed": lambda: (_ for _ in ()).throw(SliceError(slice="s", found="f", expected="e", next_step="n")),
    "wrong": lambda: (_ for _ in ()).throw(AssertionError()),
    "untyped": lambda: {}["x"],
    "right": lambda: "",
}


@pytest.mark.parametrize("kind", CAUGHT)
def test_the_cage_sees_what_it_is_there_for(kind, tmp_path):
    assert caged(CAUGHT[kind], tmp_path, (SliceError,)).kind == kind


def test_the_cage_ends_what_does_not_end_and_sees_commands(tmp_path, monkeypatch):
    monkeypatch.setattr("tests.fuzz.cage.CPU_S", 1)
    assert caged(spin, tmp_path, ()).kind == "hang"
    started = caged(lambda: str(subprocess.run(["true"], check=True)), tmp_path, ())
    assert (started.kind, started.detail.split()[0]) == ("forbidden", "subprocess.Popen")
