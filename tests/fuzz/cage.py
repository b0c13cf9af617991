"""A process in which a foreign file may be read: what it does there that it must not do is seen, and ends it."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MEMORY = 1 << 30  # bytes of address space beyond what this process has
CPU_S = 10
WALL_S = 120  # for what waits without computing; this machine may be busy

NEVER = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.startfile", "pty.spawn")
NEVER += ("pickle.find_class", "socket.connect", "socket.bind", "os.fork", "os.forkpty", "webbrowser.open")
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGING = ("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.chmod", "os.truncate")
FORBIDDEN, BROKEN = 97, 98


@dataclass(frozen=True)
class Outcome:
    """``kind`` is right, typed, memory, crash, hang, forbidden, wrong (a false result) or untyped (another error)."""

    kind: str
    detail: str
    seconds: float


def caged(work: Callable[[], str], folder: Path, typed: tuple[type[Exception], ...]) -> Outcome:
    """Run ``work()``, which returns "" or the code of a typed error that it met, and may write below ``folder`` alone.

    Parameters
    ----------
    typed
        Errors that count as an answer.
    """
    here, there = multiprocessing.Pipe(duplex=False)
    child = multiprocessing.get_context("fork").Process(target=_within, args=(work, folder, typed, there), daemon=True)
    begin = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child.start()
    there.close()
    kind, detail = "hang", f"no end after {WALL_S} s"
    if here.poll(WALL_S):
        try:
            kind, detail = here.recv_bytes().decode(errors="replace").split("\n", 1)
        except EOFError:
            child.join()
            kind, detail = "crash", str(child.exitcode)
            if -child.exitcode == signal.SIGXCPU:
                kind, detail = "hang", f"{CPU_S} s of processor time"
    child.kill()
    child.join()
    return Outcome(kind, detail, time.perf_counter() - begin)


def _within(work, folder: Path, typed, pipe) -> None:
    def tell(kind: str, detail: str) -> None:
        pipe.send_bytes(f"{kind}\n{detail}".encode(errors="replace"))
        os._exit(0)

    def inside(path) -> bool:
        if not isinstance(path, str | bytes | os.PathLike):
            return True  # a descriptor that is open already
        path = os.path.realpath(os.fsdecode(path))
        return path == os.devnull or os.path.commonpath([path, root]) == root

    def watch(event: str, args: tuple) -> None:
        if event in NEVER:
            tell("forbidden", f"{event} {args!r}")
        if event == "open" and (args[2] or 0) & WRITING and not inside(args[0]):
            tell("forbidden", f"writing {args[0]!r}")
        if event in CHANGING:
            at = next(
                (fd for fd in args[1:] if isinstance(fd, int) and fd > 2), None
            )  # shutil works below a descriptor
            beside = os.readlink(f"/proc/self/fd/{at}") if at and event in ("os.remove", "os.rmdir") else ""
            if not inside(os.path.join(beside, os.fsdecode(args[0]))):
                tell("forbidden", f"{event} {args!r}")

    faulthandler.disable()  # it would write a page past the redirected stderr
    root = os.path.realpath(folder)
    tempfile.tempdir = root
    sys.dont_write_bytecode = True
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    warnings.simplefilter("ignore")
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_S, CPU_S + 5))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.addaudithook(watch)
    try:
        code = work()
        tell("typed" if code else "right", code)
    except MemoryError:
        tell("memory", "")
    except typed as error:
        tell("typed", getattr(error, "code", type(error).__name__))
    except AssertionError:
        tell("wrong", traceback.format_exc())
    except BaseException:
        tell("untyped", traceback.format_exc())
