"""One file by HTTP: resumed by range, retried with patience, checked, and put under its name only when whole.

It is `requests` and not `pooch`: pooch hashes a file once all of it is there, but can neither resume a range, nor honour
Retry-After, nor look at a redirect before following it. All three belong to the single request, which requests hands out
(`stream`, `allow_redirects=False`, the raw bytes).

A file grows as `{name}.part` beside `{name}.part.json` (its address, validator and size); a killed download goes on from there.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import TypeVar
from urllib.parse import quote, urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError as TransferError

from workflow.errors import DownloadFailed, MissingFile, RefusedUrl, SliceError, SourceChanged
from workflow.intact import why_not_intact

logger = logging.getLogger("download")
progress = logging.getLogger("download.progress")  # a handler of its own shows these lines on the terminal

CHUNK = 1 << 16  # bytes a read: also what is lost at most when a connection breaks
WINDOW = 1 << 16  # bytes asked for at a time where single headers of a remote tar are read
LONGEST_TEXT = 32 << 20  # bytes of a listing
BUSY = frozenset({408, 425, 429, 500, 502, 503, 504})  # answers worth another try
GAIN = 1 << 20  # bytes that an attempt must bring for the count of attempts to start again

T = TypeVar("T")


@dataclass(frozen=True)
class Pin:
    """A digest that a file must have, and who says so."""

    algorithm: str  # sha256 or md5
    digest: str
    where: str = "the catalogue"
    since: str = ""  # date of the first download, where that is who says so


@dataclass(frozen=True)
class Source:
    """One file to fetch: what lies at a url, or one member of an uncompressed tar there.

    Attributes
    ----------
    slice, url, path
        For messages; what is asked for; where it goes.
    role
        ``slice``, ``labels``, or for `workflow.download` ``listing`` and ``archive``.
    pins, nbytes
        Digests that must all hold; size, where it is known beforehand.
    member, span, whole
        Of a member of a tar: its name, (offset, size) in the tar, and the size of the tar.
    """

    slice: str
    url: str
    path: Path
    role: str = "slice"
    pins: tuple[Pin, ...] = ()
    nbytes: int | None = None
    member: str = ""
    span: tuple[int, int] | None = None
    whole: int | None = None

    @property
    def address(self) -> str:
        """The url, and behind `#` the member."""
        return f"{self.url}#member={quote(self.member)}" if self.member else self.url


@dataclass(frozen=True)
class Manners:
    """How to behave towards servers (seconds), and which of them may be asked.

    Attributes
    ----------
    hosts
        Those that a request or a redirect may go to.
    mirrors
        ``https://host`` -> what stands in for it in a request; everything recorded keeps the url itself.
    attempts, backoff
        A failed attempt is repeated so often, after `backoff`, which doubles (four minutes in all, so that an outage that short
        sets no slice apart); what brought data isn't counted.
    busy
        Answers after which a file is asked for again: 403 too, which GEO and storage behind CDNs give when they are asked too often.
    longest_wait
        Wishes of a server to be left alone beyond this end the download.
    timeout
        To connect, between two packets.
    slowest, patience
        Fewer bytes a second than `slowest` for as long as `patience` break a connection off.
    """

    hosts: frozenset[str]
    mirrors: Mapping[str, str] = field(default_factory=dict)
    attempts: int = 8
    backoff: float = 2.0
    busy: frozenset[int] = BUSY | {403}
    longest_wait: float = 300.0
    timeout: tuple[float, float] = (10.0, 60.0)
    slowest: float = 1000.0
    patience: float = 60.0
    report_every: float = 10.0

    def mirrored(self, url: str) -> str:
        """The url that is really asked for."""
        for origin, stand_in in self.mirrors.items():
            if url == origin or url.startswith(origin + "/"):
                return stand_in + url[len(origin) :]
        return url


class TryAgain(Exception):
    """This attempt failed in a way that another may not; the server asked to wait `after` seconds."""

    def __init__(self, found: str, after: float = 0.0) -> None:
        super().__init__(found)
        self.after = after


class Client:
    """Requests to the hosts allowed, one connection each kept open. A context manager."""

    def __init__(self, manners: Manners) -> None:
        self.manners, self.session = manners, requests.Session()
        # identity: byte ranges and checksums are those of the file, not of a compressed transfer.
        self.session.headers.update({"User-Agent": "stpatch", "Accept-Encoding": "identity"})

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *error) -> None:
        self.session.close()

    def get(self, source: Source, headers: dict[str, str]) -> requests.Response:
        """The answer to a GET, after at most five redirects, each vetted before it is followed.

        Raises
        ------
        RefusedUrl, DownloadFailed
        requests.RequestException
        """
        manners, url = self.manners, source.url
        for _ in range(6):
            response = self.session.get(
                manners.mirrored(url), headers=headers, stream=True, allow_redirects=False, timeout=manners.timeout
            )
            if not response.is_redirect:
                return response
            response.close()
            target = urljoin(url, response.headers["Location"])
            parts = urlsplit(target)
            downgrade = url.startswith("https:") and parts.scheme == "http"
            if parts.scheme not in ("http", "https") or parts.hostname not in manners.hosts or downgrade:
                raise problem(
                    RefusedUrl,
                    source,
                    found=f"a redirect to {target}",
                    expected=f"http(s), never down from https, on {', '.join(sorted(manners.hosts))}",
                    next_step="put the new address into the catalogue, or, if you trust its host, name it in the "
                    f"config: `redirect_hosts: {{{urlsplit(source.url).hostname}: [{parts.hostname}]}}`",
                )
            url = target
        raise _failed(source, "more than five redirects")

    def patiently(self, source: Source, attempt: Callable[[], T], size: Callable[[], int] = lambda: 0) -> T:
        """Repeat `attempt` until it returns, as `Manners` allow; `size` tells how much data is here.

        Raises
        ------
        DownloadFailed
        """
        manners, failures, most = self.manners, 0, size()
        while True:
            try:
                return attempt()
            except (requests.RequestException, TransferError) as broken:
                again, cause = TryAgain(f"{type(broken).__name__}: {broken}"), broken
            except TryAgain as told:
                again = cause = told
            if size() - most >= GAIN:
                failures, most = 0, size()
            failures += 1
            wait = max(min(manners.backoff * 2 ** (failures - 1), manners.longest_wait), again.after)
            if wait > manners.longest_wait:
                raise _failed(source, f"{again}, and the wish to be left alone for {wait:.0f} s") from cause
            if failures >= manners.attempts:
                raise _failed(source, f"{again} at attempt {failures} of {manners.attempts}") from cause
            logger.warning("%s: %s; attempt %d in %.1f s", source.url, again, failures + 1, wait)
            time.sleep(wait)

    def text(self, source: Source) -> str:
        """A short text, such as a listing.

        Raises
        ------
        MissingFile, DownloadFailed, RefusedUrl
        """

        def attempt() -> str:
            with self.get(source, {}) as response:
                if response.status_code != 200:
                    raise _refusal(source, response, self.manners)
                data = response.raw.read(LONGEST_TEXT + 1, decode_content=True)
            if len(data) > LONGEST_TEXT:
                raise _failed(source, f"a listing of more than {LONGEST_TEXT} bytes")
            return data.decode("utf-8", errors="replace")

        return self.patiently(source, attempt)


class RangeReader:
    """A remote file that can be read and sought in, by range requests of `WINDOW` bytes: for the headers of a tar."""

    def __init__(self, source: Source, client: Client) -> None:
        self.source, self.client, self.at = source, client, 0
        self.start, self.block = 0, b""
        self.size: int | None = None

    def seek(self, offset: int) -> int:
        self.at = offset
        return offset

    def tell(self) -> int:
        return self.at

    def read(self, size: int = -1) -> bytes:
        if self.size is not None and self.at >= self.size:
            return b""
        if not self.start <= self.at <= self.at + size <= self.start + len(self.block):
            self.block = self.client.patiently(self.source, lambda: self._ask(max(size, WINDOW)))
            self.start = self.at
        data = self.block[self.at - self.start : self.at - self.start + size]
        self.at += len(data)
        return data

    def _ask(self, size: int) -> bytes:
        last = self.at + size - 1
        with self.client.get(self.source, {"Range": f"bytes={self.at}-{last}"}) as response:
            start, total = _content_range(response)
            if response.status_code == 200 or (response.status_code == 206 and total is None):
                raise _failed(self.source, "a server that gives no byte ranges, so that no member can be read alone")
            if response.status_code != 206:
                raise _refusal(self.source, response, self.client.manners)
            if start != self.at or self.size not in (None, total):
                raise TryAgain("a range that is not the one asked for, or of another file")
            data = response.raw.read(size, decode_content=False)
        if len(data) != min(size, total - self.at):
            raise TryAgain(f"{len(data)} bytes of a range of {size}")
        self.size = total
        return data


def fetch(source: Source, client: Client) -> None:
    """Bring one file under its name: only what is missing is asked for, and it is renamed once size, digests and format hold.

    Raises
    ------
    MissingFile, DownloadFailed, RefusedUrl, SourceChanged, Unreadable, UnsafeArchive
    """
    if source.pins and source.path.is_file() and not _wrong_digest(source, source.path):
        logger.info("%s is here already", source.path)
        return
    source.path.parent.mkdir(parents=True, exist_ok=True)
    part = source.path.with_name(source.path.name + ".part")
    started = time.monotonic()

    def attempt() -> None:
        resumed = _transfer(source, part, client)
        _check(source, part, resumed)

    client.patiently(source, attempt, lambda: part.stat().st_size if part.exists() else 0)
    settle(part, source.path)
    _state(part).unlink(missing_ok=True)
    size, seconds = source.path.stat().st_size, time.monotonic() - started
    logger.info("%s: %.1f MB in %.1f s from %s", source.path, size / 1e6, seconds, source.address)


def _transfer(source: Source, part: Path, client: Client) -> bool:
    """One request, for the missing range where the part can be trusted. True if bytes of an earlier request were kept."""
    known = _trusted(source, part)
    have = part.stat().st_size if known else 0
    if have and have == known["total"]:
        return True
    offset, span = source.span or (0, None)
    if span == 0:
        write(part, b"")
        return False
    headers = {}
    if have or span:
        headers["Range"] = f"bytes={offset + have}-{offset + span - 1 if span else ''}"
    if have and known["validator"]:
        headers["If-Range"] = known["validator"]
    with client.get(source, headers) as response:
        status = response.status_code
        if headers and status in (206, 416):
            start, total = _content_range(response)
            if status == 416 and not span and total == have:
                return True
            whole = source.whole if span else known["total"]
            if status == 416 or start != offset + have or whole not in (None, total):
                _discard(part)
                raise TryAgain(f"a range that does not continue the {have} bytes here")
            total = span or total
            if not have:
                write(_state(part), json.dumps(_describe(source.address, response, total)).encode())
        elif status == 200 and not span:
            have, total = 0, _length(source, response)
            write(_state(part), json.dumps(_describe(source.address, response, total)).encode())
        elif status == 200 and have:  # the tar is another one than the part's
            _discard(part)
            raise TryAgain("a file that changed meanwhile")
        else:
            raise _refusal(source, response, client.manners)
        if source.nbytes is not None and total not in (None, source.nbytes):
            raise _changed(source, f"{total} bytes", f"{source.nbytes} bytes")
        with open(part, "ab" if have else "wb") as out:
            _copy(response, out, have, total, source, client.manners)
    if total not in (None, part.stat().st_size):
        raise TryAgain(f"{part.stat().st_size} of {total} bytes")
    return have > 0


def _copy(response: requests.Response, out, have: int, total: int | None, source: Source, manners: Manners) -> None:
    """Write what arrives as it arrives, report now and then, and break off a connection that only drips."""
    done, began = 0, time.monotonic()
    reported = counted = began
    before = 0  # bytes at the time `counted`
    while chunk := response.raw.read1(CHUNK, decode_content=False):
        out.write(chunk)
        done += len(chunk)
        now = time.monotonic()
        if now - counted >= manners.patience:
            if done - before < manners.slowest * (now - counted):
                raise TryAgain(f"{(done - before) / (now - counted):.0f} bytes a second")
            counted, before = now, done
        if now - reported >= manners.report_every:
            reported = now
            out.flush()
            rate = done / (now - began)
            left = "" if total is None else f", {(total - have - done) / rate:.0f} s left"
            size = "" if total is None else f" of {total / 1e6:.1f}"
            arrived = (have + done) / 1e6
            progress.info(
                "%s: %s %.1f%s MB, %.1f MB/s%s", source.slice, source.path.name, arrived, size, rate / 1e6, left
            )


def _refusal(source: Source, response: requests.Response, manners: Manners) -> Exception:
    status = response.status_code
    if status in manners.busy:
        return TryAgain(f"HTTP {status}", after=_retry_after(response.headers.get("Retry-After", "")))
    if status in (404, 410):
        return problem(
            MissingFile,
            source,
            found=f"HTTP {status}",
            expected="the file",
            next_step="look for its new address and correct `url` in the catalogue",
        )
    return _failed(source, f"HTTP {status}")


def _retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for, given as a number or a date (RFC 9110, section 10.2.3)."""
    if value.strip().isdigit():
        return float(value)
    try:
        when = parsedate_to_datetime(value)
    except ValueError:
        return 0.0
    return max((when.replace(tzinfo=when.tzinfo or UTC) - datetime.now(UTC)).total_seconds(), 0.0)


def _length(source: Source, response: requests.Response) -> int | None:
    """Bytes that a whole answer announces; None where its end is marked in another way."""
    encoding = response.headers.get("Content-Encoding", "identity")
    if encoding != "identity" and not source.path.name.endswith(".gz"):
        raise _failed(source, f"Content-Encoding {encoding} where identity was asked for")
    length = response.headers.get("Content-Length")
    if length is None and not source.pins and response.headers.get("Transfer-Encoding") != "chunked":
        raise _failed(source, "an answer without length, of which a part looks like the whole")
    return None if length is None else int(length)


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and total size of a Content-Range header (RFC 9110, section 14.4)."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    first, total = match.groups() if match else (None, None)
    return (None if first is None else int(first)), (int(total) if total and total != "*" else None)


def _describe(address: str, response: requests.Response, total: int | None) -> dict:
    etag = response.headers.get("ETag", "")
    strong = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    return {"url": address, "validator": strong, "total": total}


def _state(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _trusted(source: Source, part: Path) -> dict | None:
    """What is known of the part, if its continuation can be checked: by the server's validator or a pinned digest."""
    if not part.is_file() or not _state(part).is_file():
        return None
    known = json.loads(_state(part).read_text())
    return known if known["url"] == source.address and (known["validator"] or source.pins) else None


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)


def _check(source: Source, part: Path, resumed: bool) -> None:
    """Size, digests and format of a whole part; a wrong one is discarded."""
    size = part.stat().st_size
    if source.nbytes is not None and size != source.nbytes:
        wrong = _changed(source, f"{size} bytes", f"{source.nbytes} bytes")
    elif found := _wrong_digest(source, part):
        pin, digest = found
        wrong = _changed(source, f"{pin.algorithm} {digest} ({size} bytes)", pin.digest, pin.where, pin.since)
    elif why := why_not_intact(part, source.path.name):
        wrong = problem(
            why.kind,
            source,
            found=why.found,
            expected=why.expected,
            next_step="open the url in a browser: it may lead to a page instead of the file, or the file is broken there",
        )
    else:
        return
    _discard(part)
    if resumed:  # its earlier bytes may be those of another version
        raise TryAgain(f"not the file expected: {wrong.found}") from wrong
    raise wrong


def _wrong_digest(source: Source, path: Path) -> tuple[Pin, str] | None:
    """The first pin that a file breaks, and what it has instead."""
    found = {algorithm: digest_of(path, algorithm) for algorithm in {pin.algorithm for pin in source.pins}}
    broken = (pin for pin in source.pins if found[pin.algorithm] != pin.digest)
    return next(((pin, found[pin.algorithm]) for pin in broken), None)


def digest_of(path: Path, algorithm: str = "sha256") -> str:
    """Digest of a file, as hex."""
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, algorithm).hexdigest()


def settle(fresh: Path, path: Path) -> None:
    """Put a finished file under its name so that neither its data nor the name is lost with the power."""
    with open(fresh, "rb") as whole:
        os.fsync(whole.fileno())
    os.replace(fresh, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(data)
    settle(fresh, path)


def problem(kind: type[SliceError], source: Source, **fields: str) -> SliceError:
    """An error of the download stage about one source."""
    error = kind(slice=source.slice, file=source.address, **fields)
    error.stage = "download"
    return error


def _failed(source: Source, found: str) -> SliceError:
    return problem(
        DownloadFailed,
        source,
        found=found,
        expected="the whole file",
        next_step="try again later: what was fetched is kept and the rest is asked for",
    )


def _changed(source: Source, found: str, expected: str, where: str = "the catalogue", since: str = "") -> SliceError:
    return problem(
        SourceChanged,
        source,
        found=found,
        expected=f"{expected}, as {where} has it" + (f", first seen {since}" if since else ""),
        next_step=f"find out why the source changed; if the new file is right, correct its line in {where}",
    )
