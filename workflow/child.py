"""Work on a foreign file in a process of its own, with limits: what the file does to a library ends with that process.

An HDF5 library that crashes, a table that asks for all memory, a parser that never comes back: the parent lives, and says what became of
its child. The child is forked, so it costs no second import (some 10 ms), and dies with its parent.
"""

import ctypes
import multiprocessing
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

CPU_S = 3600  # a slice takes seconds; a hang must end some day
HEADROOM = 2  # address space beside memory in use: arenas, stacks, mapped libraries
OUT_OF_MEMORY, FAILED = 90, 1  # exit codes
PR_SET_PDEATHSIG = 1
OF_THE_FILE = (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT, signal.SIGFPE, signal.SIGILL, signal.SIGTRAP)


def confined(work: Callable[[], None], memory_mb: int, cpu_s: int = CPU_S) -> str:
    """Run ``work()`` in a child process; "" if it came to its end, else in words how the file that it read stopped it.

    Parameters
    ----------
    work
        What it makes lies in files; nothing is handed back.
    memory_mb
        Memory that the work may take, in MiB, beyond what this process has now (Linux alone; elsewhere there is no such limit).
    cpu_s
        Processor time that it may take, in seconds.

    Raises
    ------
    ChildProcessError
        It ended by an error of its own (whose traceback it has printed), or something killed it: no fault of the file, and the
        job may be tried again, with more memory.
    """
    limit = _limit_of_memory(memory_mb)
    child = multiprocessing.get_context("fork").Process(
        target=_work_within, args=(work, limit, cpu_s, os.getpid()), daemon=True
    )
    with warnings.catch_warnings():  # Python 3.12 warns of threads; those of BLAS look after themselves in a fork
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    child.join()
    code, died_of = child.exitcode, -child.exitcode
    child.close()
    if code == 0:
        return ""
    if code == OUT_OF_MEMORY:
        return f"more memory needed than the {memory_mb} MB of the job"
    if died_of == signal.SIGXCPU:
        return f"no end after {cpu_s} s of processor time"
    if died_of in OF_THE_FILE:
        return f"a crash of the library that reads it ({signal.Signals(died_of).name})"
    raise ChildProcessError(
        f"the process that reads the slice was killed ({signal.Signals(died_of).name}); short memory is the usual reason"
        if died_of > 0
        else "the process that reads the slice ended with an error, see the traceback above"
    )


def _work_within(work: Callable[[], None], limit: int, cpu_s: int, parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # an orphan would write into the next run's files
        if os.getppid() != parent:
            sys.exit(FAILED)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends both
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 60))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        work()
    except MemoryError:
        sys.exit(OUT_OF_MEMORY)


def _limit_of_memory(memory_mb: int) -> int:
    """Bytes of address space: what this process has, and the headroom."""
    if sys.platform != "linux":
        return resource.RLIM_INFINITY
    own = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    return own + HEADROOM * memory_mb * 2**20
