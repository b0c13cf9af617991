"""Is a file whole and of its kind, by what the format itself says: a page instead of the file, or a cut one, shows here."""

from __future__ import annotations

import gzip
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import h5py

from workflow.child import confined
from workflow.errors import SliceError, Unreadable, UnsafeArchive

GZIP = b"\x1f\x8b"
LARGEST_RATIO = 200  # unpacked to packed; text of 10x and GEO stays below 20
ALWAYS_FINE = 1 << 20  # bytes unpacked, whatever the ratio
PROBE_MB, PROBE_S = 500, 60  # memory and processor time to open an HDF5 file, which takes some MB and milliseconds


@dataclass(frozen=True)
class Reason:
    """Why a file isn't intact: the error to raise, what was found, what was expected."""

    kind: type[SliceError]
    found: str
    expected: str


def why_not_intact(path: Path, name: str) -> Reason | None:
    """What is wrong with a file that is meant to lie under `name`; None if nothing is.

    HDF5 (``.h5``, ``.h5ad``) is opened, in a process of its own, which fails where the file is shorter than its superblock says; gzip is read to the
    end, where its checksum lies, but not beyond `LARGEST_RATIO`; a zip's directory is read; of tables and JSON it is only
    seen that they are no web page.
    """
    with open(path, "rb") as opened:
        head = opened.read(512)
    begins = f"a file that begins with {head[:16]!r}"
    if name.endswith((".h5", ".h5ad")):
        if broken := _why_not_hdf5(path):
            return Reason(Unreadable, f"{begins} ({broken})", "a whole HDF5 file")
    elif name.endswith((".gz", ".tgz")):
        return _why_not_gzip(path) if head.startswith(GZIP) else Reason(Unreadable, begins, "gzip")
    elif name.endswith(".zip"):
        if not zipfile.is_zipfile(path):
            return Reason(Unreadable, begins, "a whole zip archive")
    elif head.lstrip()[:1] in (b"", b"<"):
        return Reason(Unreadable, begins, "a table or JSON")
    return None


def _why_not_hdf5(path: Path) -> str:
    """What HDF5 says of a file, or what the file did to it; "" where it opens."""
    with tempfile.TemporaryFile() as said:

        def look() -> None:
            try:
                with h5py.File(path, "r") as file:
                    list(file)
            except (OSError, RuntimeError) as broken:
                said.write((str(broken) or type(broken).__name__).encode(errors="replace"))
                said.flush()

        ended = confined(look, PROBE_MB, PROBE_S)
        said.seek(0)
        return ended or said.read().decode()


def _why_not_gzip(path: Path) -> Reason | None:
    size = path.stat().st_size
    left = max(LARGEST_RATIO * size, ALWAYS_FINE)
    try:
        with gzip.open(path) as stream:
            while data := stream.read(1 << 20):
                left -= len(data)
                if left < 0:
                    return Reason(
                        UnsafeArchive, f"{size} bytes that unpack to more than {LARGEST_RATIO} times as many", "fewer"
                    )
    except (EOFError, zlib.error, gzip.BadGzipFile) as broken:
        return Reason(Unreadable, f"{type(broken).__name__}: {broken}", "a whole gzip file")
    return None
