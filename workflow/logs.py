"""One log file a job: what a step prints on stderr, logs, warns of, and the traceback it dies with."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import TextIO


def log_to(path: str | Path) -> TextIO:
    """Send this process's stderr, warnings and log records to `path`, for the rest of its life.

    File descriptor 2 itself is redirected, so that child processes and C libraries are covered. An uncaught error
    leaves its traceback in the log and its last line on the terminal, where the user looks first.

    Parameters
    ----------
    path
        The log file; its folder is made, an earlier log is replaced.

    Returns
    -------
    The terminal, for the little that a user should see while the job runs.
    """
    path = Path(path)
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")

    def report(kind, error, trace) -> None:
        print(f"{kind.__name__}: {error}{next_step(error, path)}\n(log: {path})", file=terminal, flush=True)
        with contextlib.suppress(OSError):  # the log lies on the disk that may be full
            traceback.print_exception(kind, error, trace, file=sys.stderr)
            sys.stderr.flush()

    sys.excepthook = report
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as log:
        os.dup2(log.fileno(), 2)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.captureWarnings(True)
    return terminal


FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)


def next_step(error: BaseException, log: Path) -> str:
    """What to do about a disk that is full or can't be written; nothing for other errors, which say it themselves.

    HDF5 tells the number in its text alone.
    """
    number = getattr(error, "errno", None)
    said = str(error)
    if number in FULL or any(f"errno = {full}," in said for full in FULL):
        return f". Next step: make room on the disk of {log.parent.resolve()}, then run again: nothing half-written is kept"
    if number in CLOSED or any(f"errno = {closed}," in said for closed in CLOSED):
        return f". Next step: make {log.parent.resolve()} and the folders beside it writable, then run again"
    return ""
