"""What a job says when the disk under it is full or can't be written."""

from __future__ import annotations

import errno
import subprocess
import sys

import pytest

from tests.conftest import ROOT
from workflow.logs import next_step


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "make room on the disk of"),
        (OSError("Can't write data (file write failed: errno = 28, error message = 'No space left')"), "make room"),
        (OSError(errno.EROFS, "Read-only file system"), "writable"),
        (PermissionError(errno.EACCES, "Permission denied"), "writable"),
        (FileNotFoundError(errno.ENOENT, "No such file"), ""),
        (ValueError("28"), ""),
    ],
)
def test_a_full_or_closed_disk_has_a_remedy_and_other_errors_are_left_as_they_are(tmp_path, error, says):
    said = next_step(error, tmp_path / "logs/rule/x.log")
    assert says in said
    assert bool(said) == bool(says)
    assert not said or str(tmp_path) in said


def test_a_job_whose_log_can_not_be_opened_says_so_with_the_remedy(tmp_path):
    (tmp_path / "logs").write_text("a file where a folder should be")
    code = f"from workflow.logs import log_to; log_to({str(tmp_path / 'logs/rule/x.log')!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode
    assert f"(log: {tmp_path / 'logs/rule/x.log'})" in done.stderr


def test_a_job_whose_log_lies_on_the_full_disk_still_tells_the_terminal_what_to_do():
    code = "from workflow.logs import log_to; log_to('/dev/full'); open('/dev/full', 'wb', 0).write(b'x')"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode
    assert "OSError: [Errno 28] No space left on device. Next step: make room on the disk of /dev" in done.stderr
