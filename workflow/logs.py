"""One log file a job: what a step prints on stderr, logs, warns of, and the traceback it dies with."""

from __future__ import annotations

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
    path.parent.mkdir(parents=True, exist_ok=True)
    sys.stderr.flush()
    terminal = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    with open(path, "wb") as log:
        os.dup2(log.fileno(), 2)
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, encoding="utf-8", errors="replace")
    logging.basicConfig(
        stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", force=True
    )
    logging.captureWarnings(True)

    def report(kind, error, trace) -> None:
        traceback.print_exception(kind, error, trace, file=sys.stderr)
        sys.stderr.flush()
        print(f"{kind.__name__}: {error}\n(log: {path})", file=terminal, flush=True)

    sys.excepthook = report
    return terminal
