"""Take single members out of a zip, tar or tar.gz from elsewhere, and trust nothing about it.

An archive is never unpacked as a whole: its members are listed first, every one of them is looked at, and those that are wanted
are copied, each to a place that the caller names. What the archive calls a member is never used as a path.
"""

from __future__ import annotations

import gzip
import shutil
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from workflow.errors import MissingFile, Unreadable, UnsafeArchive
from workflow.intact import ALWAYS_FINE, GZIP, LARGEST_RATIO, why_not_intact
from workflow.transfer import Client, RangeReader, Source, problem, settle

ENDINGS = (".tar.gz", ".tgz", ".tar", ".zip")
EXTENSIONS = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
LONGEST_HEADER = 1 << 20  # bytes of such an extension, which tarfile reads into memory whole
BROKEN = (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, zipfile.BadZipFile, NotImplementedError)


@dataclass(frozen=True)
class Limits:
    """What an archive may hold.

    Attributes
    ----------
    total
        Bytes unpacked, of all members.
    ratio
        Of unpacked to packed bytes; `ALWAYS_FINE` bytes pass in any case.
    member
        Bytes of a member that is taken.
    count
        Members.
    """

    total: int = 64 << 30
    ratio: int = LARGEST_RATIO
    member: int = 16 << 30
    count: int = 100_000

    def of(self, packed: int) -> int:
        """Most bytes that an archive of this size may unpack to."""
        return min(self.total, max(self.ratio * packed, ALWAYS_FINE))


def is_archive(path: Path) -> bool:
    return path.name.lower().endswith(ENDINGS)


def names_in(archive: Source, limits: Limits = Limits()) -> list[str]:  # noqa: B008  (frozen)
    """Names of the plain files in an archive that was fetched; the whole of it is read and checked.

    Raises
    ------
    UnsafeArchive
        A member with an absolute path, `..`, a link, a device, a sparse or encrypted file, a name that stands twice, or more data
        than `limits` allow.
    Unreadable
        Truncated or corrupt.
    """
    with _broken_is_unreadable(archive):
        names = [name for name, _ in _members(archive, limits)]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise _refused(archive, f"{len(twice)} names that stand twice, such as {twice[0]!r}", "each member once")
    return names


def extract(archive: Source, places: Mapping[str, Path], limits: Limits = Limits()) -> None:  # noqa: B008  (frozen)
    """Copy members to their places, each whole or not at all; checksums of zip and gzip are verified.

    Parameters
    ----------
    archive
        Fetched, and listed by `names_in`, which is what makes it safe to read here.
    places
        Member -> file to write.

    Raises
    ------
    UnsafeArchive
        A wanted member above `limits.member`, or one whose gzip unpacks to too much.
    Unreadable
        Corrupt, or not of the kind that its place names.
    """
    left = dict(places)
    with _broken_is_unreadable(archive):
        for name, (size, stream) in _members(archive, limits):
            if name not in left:
                continue
            if size > limits.member:
                raise _refused(archive, f"member {name!r} of {size} bytes", f"up to {limits.member} bytes")
            path = left.pop(name)
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_name(path.name + ".new")
            with open(fresh, "wb") as out:
                shutil.copyfileobj(stream(), out, 1 << 20)
            if fresh.stat().st_size != size:
                raise EOFError(f"member {name!r} has {fresh.stat().st_size} of {size} bytes")
            if why := why_not_intact(fresh, path.name):
                step = "look at the archive: this member is not what its name says"
                raise problem(
                    why.kind, archive, found=f"member {name!r}: {why.found}", expected=why.expected, next_step=step
                )
            settle(fresh, path)
            if not left:
                break
    if left:
        raise problem(
            MissingFile,
            archive,
            found=f"no member {', '.join(sorted(left))}",
            expected="the members listed before",
            next_step="the archive changed while it was read; run again",
        )


def spans_in(archive: Source, stream: RangeReader | BinaryIO) -> dict[str, tuple[int, int]]:
    """Where the members of an uncompressed tar lie, read from its headers alone: name -> (offset, size).

    Parameters
    ----------
    archive
        For messages.
    stream
        The tar, on this machine or on another (`RangeReader`): what is between the headers is not read.

    Raises
    ------
    UnsafeArchive, Unreadable, and what the stream raises
    """
    spans: dict[str, tuple[int, int]] = {}
    with _broken_is_unreadable(archive), tarfile.open(fileobj=stream, mode="r:", tarinfo=_Header) as tar:
        for member in tar:
            _vet(archive, member.name, plain=member.isfile() and not member.issparse(), folder=member.isdir())
            if member.isdir():
                continue
            if member.name in spans:
                raise _refused(archive, f"two members {member.name!r}", "each member once")
            spans[member.name] = (member.offset_data, member.size)
    return spans


def remote_spans(archive: Source, client: Client) -> tuple[dict[str, tuple[int, int]], int]:
    """`spans_in` of a tar at a url, and the tar's size in bytes."""
    reader = RangeReader(archive, client)
    spans = spans_in(archive, reader)
    return spans, reader.size


def _members(archive: Source, limits: Limits) -> Iterator[tuple[str, tuple[int, object]]]:
    """Name, size and a way to read each plain member, in order; the last step reads what is left of the file."""
    with open(archive.path, "rb") as opened:
        head = opened.read(4)
    if head.startswith(b"PK"):
        yield from _zip_members(archive, limits)
    else:
        yield from _tar_members(archive, limits, packed=head.startswith(GZIP))


def _zip_members(archive: Source, limits: Limits):
    packed = archive.path.stat().st_size
    with zipfile.ZipFile(archive.path) as file:
        members = file.infolist()
        unpacked = sum(member.file_size for member in members)
        most = limits.of(packed)
        if unpacked > most or sum(member.compress_size for member in members) > packed:
            raise _refused(
                archive, f"{unpacked} bytes unpacked from {packed}", f"up to {most}, in members side by side"
            )
        if len(members) > limits.count:
            raise _refused(archive, f"{len(members)} members", f"up to {limits.count}")
        for member in members:
            kind = stat.S_IFMT(member.external_attr >> 16) if member.create_system == 3 else 0
            _vet(archive, member.filename, plain=kind in (0, stat.S_IFREG), folder=member.is_dir())
            if member.flag_bits & 1:
                raise _refused(archive, f"member {member.filename!r}, encrypted", "members that can be read")
            if not member.is_dir():
                yield member.filename, (member.file_size, lambda member=member: file.open(member))


def _tar_members(archive: Source, limits: Limits, packed: bool):
    size = archive.path.stat().st_size
    most = limits.of(size)
    with open(archive.path, "rb") as raw:
        metered = _Metered(gzip.GzipFile(fileobj=raw) if packed else raw, most)
        try:
            with tarfile.open(fileobj=metered, mode="r|", tarinfo=_Header) as tar:
                for number, member in enumerate(tar):
                    if number >= limits.count:
                        raise _refused(archive, f"more than {limits.count} members", "fewer")
                    _vet(archive, member.name, plain=member.isfile() and not member.issparse(), folder=member.isdir())
                    if not member.isdir():
                        yield member.name, (member.size, lambda member=member, tar=tar: tar.extractfile(member))
            while metered.read(1 << 20):  # to the end, where gzip keeps its checksum
                pass
        except _TooLarge as large:
            raise _refused(archive, f"more than {most} bytes unpacked from {size}", "a smaller one") from large


def _vet(archive: Source, name: str, *, plain: bool, folder: bool) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or not name.isprintable():
        raise _refused(archive, f"member {name!r}", "relative names without .. and backslashes")
    if not (plain or folder):
        raise _refused(archive, f"member {name!r}, a link, device or sparse file", "plain files and folders")


def _refused(archive: Source, found: str, expected: str) -> UnsafeArchive:
    return problem(
        UnsafeArchive,
        archive,
        found=found,
        expected=expected,
        next_step="do not unpack it; look at the archive and at where it came from",
    )


@contextmanager
def _broken_is_unreadable(archive: Source) -> Iterator[None]:
    try:
        yield
    except _LongHeader as long:
        raise _refused(archive, f"a header of {long} bytes", f"up to {LONGEST_HEADER}") from long
    except BROKEN as broken:
        raise problem(
            Unreadable,
            archive,
            found=f"{type(broken).__name__}: {broken}",
            expected="a whole zip, tar or tar.gz",
            next_step="check the archive at its source; if it is whole there, delete the slice's download folder",
        ) from broken


class _TooLarge(Exception):
    pass


class _LongHeader(Exception):
    pass


class _Header(tarfile.TarInfo):
    """A tar's header whose extension isn't longer than any name needs."""

    @classmethod
    def frombuf(cls, buf, encoding, errors):
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENSIONS and header.size > LONGEST_HEADER:
            raise _LongHeader(header.size)
        return header


class _Metered:
    """A stream that refuses to yield more than `limit` bytes: the bound holds for skipped members and headers too."""

    def __init__(self, stream, limit: int) -> None:
        self.stream, self.left = stream, limit

    def read(self, size: int = -1) -> bytes:
        data = self.stream.read(size)
        self.left -= len(data)
        if self.left < 0:
            raise _TooLarge
        return data
