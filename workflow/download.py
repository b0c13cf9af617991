"""Fetch the files of one remote slice: resumed by range, checked, and put under their names only when whole.

It is `requests` and not `pooch`: pooch hashes a file once all of it is there, but can neither resume a range, nor honour
Retry-After, nor look at a redirect before following it. All three belong to the single request, which requests hands out
(`stream`, `allow_redirects=False`, the raw bytes).

A file grows as `{name}.part` beside `{name}.part.json` (its url, validator and size); a killed download goes on from
there. What is pinned in the catalogue and already lies under its name is kept; what is not pinned is fetched again.
For now a download that fails ends its job with the typed error in the log; it does not quarantine the slice.
"""

import gzip
import hashlib
import json
import logging
import os
import re
import tarfile
import time
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urldefrag, urljoin, urlsplit

import requests
from urllib3.exceptions import HTTPError as TransferError

from workflow.catalogue import REMOTE
from workflow.errors import (
    CatalogueError,
    DownloadFailed,
    MissingFile,
    MissingPositions,
    RefusedUrl,
    SliceError,
    SourceChanged,
    UnknownFormat,
    Unreadable,
    UnsafeArchive,
)

logger = logging.getLogger("download")

CHUNK = 1 << 16  # bytes a read: also what is lost at most when a connection breaks
BUSY = {408, 425, 429, 500, 502, 503, 504}  # answers worth another try
HDF5 = b"\x89HDF\r\n\x1a\n"
POSITIONS = ("tissue_positions.csv", "tissue_positions_list.csv")
SCALEFACTORS = "scalefactors_json.json"
ARCHIVE = "spatial.tar.gz"


@dataclass(frozen=True)
class Source:
    """One file to fetch."""

    slice: str
    url: str
    path: Path
    role: str  # "slice", "labels", or "archive" (its members are what counts)
    pin: tuple[str, str] | None = None  # ("sha256" or "md5", hexadecimal digest)
    nbytes: int | None = None


@dataclass(frozen=True)
class Manners:
    """How to behave towards a server (seconds)."""

    hosts: frozenset[str]
    attempts: int = 6
    backoff: float = 1.0  # before the second attempt; doubled for each further one
    longest_wait: float = 300.0
    timeout: tuple[float, float] = (10.0, 60.0)  # to connect, between two packets


class _TryAgain(Exception):
    """This attempt failed in a way that another may not; the server asked to wait `after` seconds."""

    def __init__(self, found: str, after: float = 0.0) -> None:
        super().__init__(found)
        self.after = after


def download(row: dict[str, str], folder: Path, *, allow_hosts: Iterable[str] = (), **manners) -> list[dict]:
    """Fetch every file of a catalogue row and record them in `folder/files.json`.

    Parameters
    ----------
    row
        The columns slice, url, sha256, bytes, format and labels of the catalogue.
    folder
        Belongs to this slice alone: what `files.json` doesn't list is removed at the end.
    allow_hosts
        Hosts a redirect may lead to, besides those of the row itself.
    manners
        Fields of `Manners`.

    Returns
    -------
    The content of `files.json`: a dict a file with `path`, `url`, `bytes`, `sha256`, `role` ("slice" or "labels") and,
    for what came out of an archive, `member`.

    Raises
    ------
    SliceError
        `UnknownFormat` (no rule for these urls), `RefusedUrl`, `MissingFile` (404), `DownloadFailed`, `SourceChanged`
        (not the pinned size or checksum), `Unreadable`, `UnsafeArchive`, `MissingPositions`; stage "download".
    CatalogueError
        More checksums or sizes than urls.
    """
    folder = Path(folder)
    sources = plan(row, folder)
    hosts = {urlsplit(source.url).hostname or "" for source in sources} | set(allow_hosts)
    manners = Manners(hosts=frozenset(hosts), **manners)
    entries = []
    with requests.Session() as session:
        # identity: byte ranges and checksums are those of the file, not of a compressed transfer.
        session.headers.update({"User-Agent": "stpatch", "Accept-Encoding": "identity"})
        for source in sources:
            fetch(source, session, manners)
            if source.role == "archive":
                for member, path in extract_spatial(source, folder / "outs" / "spatial").items():
                    entries.append(_entry(path, source.url, "slice") | {"member": member})
            else:
                entries.append(_entry(source.path, source.url, source.role))
    listing = folder / "files.json"
    _write(listing, json.dumps(entries, indent=1).encode() + b"\n")
    _tidy(folder, keep={listing, *(Path(entry["path"]) for entry in entries)})
    return entries


def plan(row: dict[str, str], folder: Path) -> list[Source]:
    """Which file of a catalogue row goes where, so that the folder looks like what the reader knows.

    `*filtered_feature_bc_matrix.h5`, `*spatial.tar.gz` (or the positions and scale factors singly) become a Space
    Ranger folder `outs`; one h5ad becomes `{slice}.h5ad`; labels that are a url become `labels.tsv` (`.csv`). Checksums
    and sizes belong to the urls in order and may stop early; a url may also carry its own as `#sha256=...` or `#md5=...`.
    """
    slice_name, urls = row["slice"], row["url"].split()
    pins, sizes = row.get("sha256", "").split(), row.get("bytes", "").split()
    if max(len(pins), len(sizes)) > len(urls):
        raise CatalogueError(
            f"slice {slice_name!r}: {len(pins)} checksums and {len(sizes)} sizes for {len(urls)} urls; expected one "
            "a url at most, in their order. Next step: correct sha256 and bytes in the catalogue."
        )
    sources = []
    for number, address in enumerate(urls):
        url, pin = _pinned(address, slice_name)
        pin = ("sha256", pins[number]) if number < len(pins) else pin
        nbytes = int(sizes[number]) if number < len(sizes) else None
        name = unquote(PurePosixPath(urlsplit(url).path).name)
        path = folder / _place(name, row, url)
        role = "archive" if path.name == ARCHIVE else "slice"
        sources.append(Source(slice_name, url, path, role, pin, nbytes))
    places = [source.path for source in sources]
    names = {place.name for place in places}
    whole = names == {f"{slice_name}.h5ad"} or (
        any(name.endswith("_feature_bc_matrix.h5") for name in names) and names & {ARCHIVE, *POSITIONS}
    )
    if len(set(places)) < len(places) or not whole:
        raise _unknown(row, row["url"])
    if row.get("labels", "").startswith(REMOTE):
        url, pin = _pinned(row["labels"], slice_name)
        suffix = ".csv" if urlsplit(url).path.endswith(".csv") else ".tsv"
        sources.append(Source(slice_name, url, folder / f"labels{suffix}", "labels", pin))
    return sources


def _pinned(address: str, slice_name: str) -> tuple[str, tuple[str, str] | None]:
    if not address.startswith(REMOTE):
        raise _error(
            RefusedUrl,
            slice=slice_name,
            file=address,
            found="an address that is not http(s)",
            expected="http:// or https://",
            next_step="give its web address, or set `source` to `file` if it lies on this machine",
        )
    url, fragment = urldefrag(address)
    pin = re.fullmatch(r"(sha256)=([0-9a-f]{64})|(md5)=([0-9a-f]{32})", fragment)
    if fragment and not pin:
        raise CatalogueError(
            f"slice {slice_name!r}: {address}: expected #sha256=<64 hex digits> or #md5=<32> after the url."
        )
    return url, tuple(part for part in pin.groups() if part) if pin else None


def _place(name: str, row: dict[str, str], url: str) -> Path:
    """Where below the slice's folder a file of this name goes."""
    if row["format"] in ("h5ad", "cellxgene") or (row["format"] == "auto" and name.endswith(".h5ad")):
        return Path(f"{row['slice']}.h5ad")
    if row["format"] in ("spaceranger", "auto"):
        if name.endswith(ARCHIVE):
            return Path(ARCHIVE)
        if matrix := re.search(r"(filtered|raw)_feature_bc_matrix\.h5$", name):
            return Path("outs", matrix[0])
        if positions := re.search(r"tissue_positions(_list)?(?=\.(csv|txt)$)", name):
            return Path("outs", "spatial", positions[0] + ".csv")
        if name.endswith(SCALEFACTORS):
            return Path("outs", "spatial", SCALEFACTORS)
    raise _unknown(row, url)


def _unknown(row: dict[str, str], where: str) -> SliceError:
    return _error(
        UnknownFormat,
        slice=row["slice"],
        file=where,
        found=f"format {row['format']} with urls that no download rule knows",
        expected="a 10x matrix h5 with spatial.tar.gz or tissue positions, or one h5ad",
        next_step="fetch the files yourself and give their path with `source` set to `file`",
    )


def fetch(source: Source, session: requests.Session, manners: Manners) -> None:
    """Bring one file under its name: only what is missing is asked for, and it is renamed once size and digest hold."""
    if source.pin and source.path.is_file() and _digest(source.path, source.pin[0]) == source.pin[1]:
        logger.info("%s is here already", source.path)
        return
    source.path.parent.mkdir(parents=True, exist_ok=True)
    part = source.path.with_name(source.path.name + ".part")
    started = time.monotonic()
    for attempt in range(1, manners.attempts + 1):
        try:
            resumed = _transfer(source, part, session, manners)
            _check(source, part, resumed)
            break
        except _TryAgain as again:
            wait = max(min(manners.backoff * 2 ** (attempt - 1), manners.longest_wait), again.after)
            if wait > manners.longest_wait:
                raise _failed(source, f"{again}, and the wish to be left alone for {wait:.0f} s") from again
            if attempt == manners.attempts:
                raise _failed(source, f"{again} at attempt {attempt} of {manners.attempts}") from again
            logger.warning("%s: %s; attempt %d of %d in %.1f s", source.url, again, attempt + 1, manners.attempts, wait)
            time.sleep(wait)
    with open(part, "rb") as whole:
        os.fsync(whole.fileno())
    os.replace(part, source.path)
    _state(part).unlink(missing_ok=True)
    size, seconds = source.path.stat().st_size, time.monotonic() - started
    logger.info("%s: %.1f MB in %.1f s from %s", source.path, size / 1e6, seconds, source.url)


def _transfer(source: Source, part: Path, session: requests.Session, manners: Manners) -> bool:
    """One request, for the missing range where the part can be trusted. True if bytes of an earlier request were kept."""
    known = _trusted(source, part)
    have = part.stat().st_size if known else 0
    if have and have == known["total"]:
        return True
    headers = {"Range": f"bytes={have}-"} if have else {}
    if have and known["validator"]:
        headers["If-Range"] = known["validator"]
    try:
        with _get(source, session, headers, manners) as response:
            status = response.status_code
            if have and status in (206, 416):
                start, total = _content_range(response)
                if status == 416 and total == have:
                    return True
                if status == 416 or start != have or known["total"] not in (None, total):
                    _discard(part)
                    raise _TryAgain(f"a range that does not continue the {have} bytes here")
            elif status == 200:
                have, total = 0, _length(source, response)
                _write(_state(part), json.dumps(_describe(source.url, response, total)).encode())
            else:
                raise _refusal(source, response)
            if source.nbytes is not None and total not in (None, source.nbytes):
                raise _changed(source, f"{total} bytes", f"{source.nbytes} bytes")
            with open(part, "ab" if have else "wb") as out:
                for chunk in response.raw.stream(CHUNK, decode_content=False):
                    out.write(chunk)
    except (requests.RequestException, TransferError) as broken:
        raise _TryAgain(f"{type(broken).__name__}: {broken}") from broken
    if total not in (None, part.stat().st_size):
        raise _TryAgain(f"{part.stat().st_size} of {total} bytes")
    return have > 0


def _get(source: Source, session: requests.Session, headers: dict, manners: Manners) -> requests.Response:
    """The answer to a GET, after at most five redirects, each vetted before it is followed."""
    url = source.url
    for _ in range(6):
        response = session.get(url, headers=headers, stream=True, allow_redirects=False, timeout=manners.timeout)
        if not response.is_redirect:
            return response
        response.close()
        target = urljoin(url, response.headers["Location"])
        parts = urlsplit(target)
        downgrade = url.startswith("https:") and parts.scheme == "http"
        if parts.scheme not in ("http", "https") or parts.hostname not in manners.hosts or downgrade:
            raise _error(
                RefusedUrl,
                slice=source.slice,
                file=source.url,
                found=f"a redirect to {target}",
                expected=f"http(s), never down from https, on {', '.join(sorted(manners.hosts))}",
                next_step="put the new address into the catalogue, or add its host to REDIRECT_HOSTS in rules/download.smk",
            )
        url = target
    raise _failed(source, "more than five redirects")


def _refusal(source: Source, response: requests.Response) -> Exception:
    status = response.status_code
    if status in BUSY:
        return _TryAgain(f"HTTP {status}", after=_retry_after(response.headers.get("Retry-After", "")))
    if status in (404, 410):
        return _error(
            MissingFile,
            slice=source.slice,
            file=source.url,
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
    if length is None and source.pin is None and response.headers.get("Transfer-Encoding") != "chunked":
        raise _failed(source, "an answer without length, of which a part looks like the whole")
    return None if length is None else int(length)


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """First byte and total size of a Content-Range header (RFC 9110, section 14.4)."""
    match = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    first, total = match.groups() if match else (None, None)
    return (None if first is None else int(first)), (int(total) if total and total != "*" else None)


def _describe(url: str, response: requests.Response, total: int | None) -> dict:
    etag = response.headers.get("ETag", "")
    strong = etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
    return {"url": url, "validator": strong, "total": total}


def _state(part: Path) -> Path:
    return part.with_name(part.name + ".json")


def _trusted(source: Source, part: Path) -> dict | None:
    """What is known of the part, if its continuation can be checked: by the server's validator or the pinned digest."""
    if not part.is_file() or not _state(part).is_file():
        return None
    known = json.loads(_state(part).read_text())
    return known if known["url"] == source.url and (known["validator"] or source.pin) else None


def _discard(part: Path) -> None:
    part.unlink(missing_ok=True)
    _state(part).unlink(missing_ok=True)


def _check(source: Source, part: Path, resumed: bool) -> None:
    """Size, digest and first bytes of a whole part; a wrong one is discarded."""
    wrong = None
    if source.nbytes is not None and part.stat().st_size != source.nbytes:
        wrong = _changed(source, f"{part.stat().st_size} bytes", f"{source.nbytes} bytes")
    elif source.pin and (found := _digest(part, source.pin[0])) != source.pin[1]:
        wrong = _changed(source, f"{source.pin[0]} {found}", source.pin[1])
    else:
        with open(part, "rb") as opened:
            head = opened.read(512)
        binary = {".h5": HDF5, ".h5ad": HDF5, ".gz": b"\x1f\x8b"}.get(source.path.suffix)
        if not head.startswith(binary) if binary else head.lstrip()[:1] in (b"", b"<"):
            wrong = _error(
                Unreadable,
                slice=source.slice,
                file=source.url,
                found=f"a file that begins with {head[:16]!r}",
                expected={HDF5: "HDF5", b"\x1f\x8b": "gzip"}.get(binary, "a table or JSON"),
                next_step="open the url in a browser: it may lead to a page instead of the file",
            )
    if wrong is None:
        return
    _discard(part)
    if resumed:  # its earlier bytes may be those of another version
        raise _TryAgain(f"not the file expected: {wrong.found}") from wrong
    raise wrong


def extract_spatial(
    archive: Source, folder: Path, *, max_bytes: int = 4 << 30, max_ratio: int = 200, max_member: int = 64 << 20
) -> dict[str, Path]:
    """Take the spot positions and scale factors out of a Space Ranger `spatial.tar.gz`, and nothing else.

    The archive is read once, forwards, and never extracted: an absolute path, `..`, a link, a device or a sparse file
    anywhere in it refuses the whole archive, and so does unpacking to more than `max_bytes`, to more than `max_ratio`
    times its own size (but 1 MiB is always fine), or a needed member above `max_member` bytes.

    Returns
    -------
    Name in the archive -> file written.
    """

    def refuse(found: str, expected: str) -> SliceError:
        return _error(
            UnsafeArchive,
            slice=archive.slice,
            file=archive.url,
            found=found,
            expected=expected,
            next_step="do not unpack it; look at the archive and at where it came from",
        )

    limit = min(max_bytes, max(max_ratio * archive.path.stat().st_size, 1 << 20))
    taken: dict[str, tuple[str, bytes]] = {}
    try:
        with gzip.open(archive.path) as stream:
            metered = _Metered(stream, limit)
            with tarfile.open(fileobj=metered, mode="r|") as tar:
                for member in tar:
                    name = PurePosixPath(member.name)
                    if name.is_absolute() or ".." in name.parts:
                        raise refuse(f"member {member.name!r}", "relative names without ..")
                    if not (member.isdir() or (member.isfile() and not member.issparse())):
                        raise refuse(
                            f"member {member.name!r}, a link, device or sparse file", "plain files and folders"
                        )
                    if name.name not in (*POSITIONS, SCALEFACTORS) or name.parent.name not in ("", "spatial"):
                        continue
                    if member.size > max_member or name.name in taken:
                        raise refuse(
                            f"member {member.name!r} of {member.size} bytes", f"one, of up to {max_member} bytes"
                        )
                    taken[name.name] = (member.name, tar.extractfile(member).read())
            while metered.read(1 << 20):  # to the end, where gzip keeps its checksum
                pass
    except _TooLarge as large:
        raise refuse(f"more than {limit} bytes unpacked from {archive.path.stat().st_size}", "a smaller one") from large
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError) as broken:
        raise _error(
            Unreadable,
            slice=archive.slice,
            file=archive.url,
            found=f"{type(broken).__name__}: {broken}",
            expected="a whole tar.gz",
            next_step="check the file at its source; if it is whole there, delete the slice's download folder and rerun",
        ) from broken
    if not set(taken) & set(POSITIONS):
        raise _error(
            MissingPositions,
            slice=archive.slice,
            file=archive.url,
            found=f"{', '.join(sorted(taken)) or 'nothing that is needed'} in the archive",
            expected=" or ".join(POSITIONS),
            next_step="take the row out of the catalogue, or add the url of the positions",
        )
    written = {}
    folder.mkdir(parents=True, exist_ok=True)
    for name, (member_name, data) in taken.items():
        _write(folder / name, data)
        written[member_name] = folder / name
    return written


class _TooLarge(Exception):
    pass


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


def _entry(path: Path, url: str, role: str) -> dict:
    return {
        "path": path.as_posix(),
        "url": url,
        "bytes": path.stat().st_size,
        "sha256": _digest(path, "sha256"),
        "role": role,
    }


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as opened:
        return hashlib.file_digest(opened, algorithm).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Write a small file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_name(path.name + ".new")
    with open(fresh, "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(fresh, path)


def _tidy(folder: Path, keep: set[Path]) -> None:
    """Remove the unpacked archive, and what an earlier row of the catalogue left behind and a reader might pick up."""
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path not in keep:
            path.unlink()


def _error(kind: type[SliceError], **fields: str) -> SliceError:
    error = kind(**fields)
    error.stage = "download"
    return error


def _failed(source: Source, found: str) -> SliceError:
    return _error(
        DownloadFailed,
        slice=source.slice,
        file=source.url,
        found=found,
        expected="the whole file",
        next_step="run again later: what was fetched is kept and the rest is asked for",
    )


def _changed(source: Source, found: str, expected: str) -> SliceError:
    return _error(
        SourceChanged,
        slice=source.slice,
        file=source.url,
        found=found,
        expected=f"{expected}, as the catalogue pins it",
        next_step="find out why the source changed; if the new file is right, correct sha256 and bytes in the catalogue",
    )


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    folder = Path(snakemake.output[0]).parent
    download(snakemake.params.row, folder, allow_hosts=snakemake.params.hosts)
