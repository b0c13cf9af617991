"""Rule `download`: fetch the files of one remote slice, or say why they can't be had.

`workflow.locators` reads an address, `workflow.geo` chooses among the names of a folder or an archive, `workflow.transfer` brings
one file, `workflow.archives` takes members out of archives, `workflow.lock` remembers what a file was when it was first seen.

A slice that can't be fetched is set apart, as curate sets apart one that can't be used: `files.json` then carries its row of the
quarantine table, and what was fetched stays beside it. Anything but a `SliceError` ends the job.
"""

import contextlib
import fcntl
import fnmatch
import hashlib
import json
import logging
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit

from workflow import geo
from workflow.archives import ENDINGS, extract, is_archive, names_in, remote_spans
from workflow.catalogue import REMOTE
from workflow.errors import (
    CatalogueError,
    MissingFile,
    MissingPositions,
    RefusedUrl,
    SliceError,
    SourceChanged,
    UnknownFormat,
)
from workflow.locators import Locator, parse
from workflow.lock import Lock
from workflow.transfer import Client, Manners, Pin, Source, digest_of, fetch, problem, write

logger = logging.getLogger("download")

FORMAT_VERSION = 1  # of files.json
POSITIONS = ("tissue_positions.csv", "tissue_positions_list.csv")
SCALEFACTORS = "scalefactors_json.json"
SPATIAL = re.compile(r"spatial\.(tar\.gz|tgz|tar|zip)$", re.IGNORECASE)
H5AD_FORMATS = ("h5ad", "cellxgene")
MACOS = ("._", "__MACOSX")  # what macOS leaves beside each file of an archive: a pattern would match both


def download(row: dict[str, str], folder: Path, lock: Lock, **options) -> dict:
    """Fetch a slice and write `folder/files.json`, also where that fails for good; returns what it says.

    Parameters
    ----------
    row, folder, lock, options
        As of `fetch_slice`.

    Returns
    -------
    ``version``, ``files`` (see `fetch_slice`; empty where the download failed) and ``quarantine``: None, or the row of the
    quarantine table, whose next step says how to have it tried again.

    Raises
    ------
    CatalogueError
        A row that no download could be made of; a table is corrected, not set apart.
    """
    listing, listed = Path(folder) / "files.json", {"version": FORMAT_VERSION, "files": [], "quarantine": None}
    with _alone(lock.record):  # a job outlives a Snakemake that was killed, and goes on writing
        try:
            if files := lock.kept(row):
                logger.info("all %d files are here already", len(files))
            else:
                files = fetch_slice(row, folder, lock, **options)
                _tidy(Path(folder), keep={Path(entry["path"]) for entry in files})
                lock.keep(row, files)
            listed["files"] = files
        except SliceError as error:
            logger.error("set apart: %s", error)
            logger.info("because of", exc_info=error.__cause__ or error)
            again = f"; then run again with --forcerun {listing.as_posix()}"
            listed["quarantine"] = error.as_row() | {"next_step": error.next_step + again}
        write(listing, json.dumps(listed, indent=1).encode() + b"\n")
    return listed


def fetch_slice(
    row: dict[str, str],
    folder: Path,
    lock: Lock,
    *,
    allow_hosts: Iterable[str] = (),
    shared: Path | None = None,
    **manners,
) -> list[dict]:
    """Fetch every file of a catalogue row.

    Parameters
    ----------
    row
        The columns slice, url, sha256, bytes, format and labels of the catalogue.
    folder
        Belongs to this slice alone.
    lock
        What its files were when they were first seen; grows with each that is fetched.
    allow_hosts
        Hosts a redirect may lead to, besides those of the row itself.
    shared
        Folder for archives that other slices take members from too; None: each slice fetches its own.
    manners
        Fields of `Manners`.

    Returns
    -------
    A dict a file with `path`, `url`, `bytes`, `sha256`, `role` ("slice" or "labels") and, for what came out of an archive,
    `member`.

    Raises
    ------
    SliceError
        `UnknownFormat` (no rule for these urls), `RefusedUrl`, `MissingFile` (404, or a member that isn't there),
        `DownloadFailed`, `SourceChanged` (not the size or digest pinned or first seen), `Unreadable`, `UnsafeArchive`,
        `MissingPositions`, and what `workflow.geo` raises; stage "download".
    CatalogueError
    """
    folder = Path(folder)
    planned = plan(row, folder, shared)
    hosts = {locator.host for locator, _ in planned} | set(allow_hosts)
    entries, addresses = [], set()
    with Client(Manners(hosts=frozenset(hosts), **manners)) as client:
        for locator, source in planned:
            for one in resolve(locator, source, client) if source.role == "listing" else [source]:
                addresses.add(one.address)
                entries += _bring(locator, one, row, folder, lock, client)
            if source.role == "listing":
                _same_as_ever(source, lock, addresses)
    _complete(row, entries)
    return entries


def plan(row: dict[str, str], folder: Path, shared: Path | None = None) -> list[tuple[Locator, Source]]:
    """What a catalogue row asks for, seen without asking anyone.

    A Space Ranger folder `outs` is made of `*_feature_bc_matrix.h5` with `*spatial.tar.gz` or positions and scale factors that
    lie singly, of flat GEO files, or of an archive that holds them; one h5ad becomes `{slice}.h5ad`; labels that are a url
    become `labels.tsv` (`.csv`). A GEO folder, or a tar of which only names with a prefix are wanted, is a source with the role
    ``listing``: `resolve` turns it into files. Checksums and sizes belong to the urls in order and may stop early.

    Raises
    ------
    UnknownFormat, RefusedUrl, CatalogueError
    """
    slice_name, addresses = row["slice"], row["url"].split()
    pins, sizes = row.get("sha256", "").split(), row.get("bytes", "").split()
    if max(len(pins), len(sizes)) > len(addresses):
        raise CatalogueError(
            f"slice {slice_name!r}: {len(pins)} checksums and {len(sizes)} sizes for {len(addresses)} urls; expected one "
            "a url at most, in their order. Next step: correct sha256 and bytes in the catalogue."
        )
    located = [_located(address, slice_name) for address in addresses]
    names = {locator: _name(locator.url) for locator in located if not _is_listing(locator)}
    flat = {}
    if row["format"] == "geo" and (flat_names := [name for at, name in names.items() if not at.members]):
        flat = _said_of(Source(slice_name, row["url"], folder), geo.choose, flat_names)
    planned = []
    for number, locator in enumerate(located):
        source = Source(
            slice_name,
            locator.url,
            folder,
            pins=_pins(locator, pins[number] if number < len(pins) else ""),
            nbytes=int(sizes[number]) if number < len(sizes) else None,
        )
        if locator not in names:
            planned.append((locator, replace(source, role="listing")))
        elif locator.members or is_archive(Path(names[locator])):
            planned.append((locator, replace(source, role="archive", path=_archive_place(locator, folder, shared))))
        elif place := flat.get(names[locator]) or _place(names[locator], row):
            planned.append((locator, replace(source, path=folder / _named(place, row))))
        else:
            raise _unknown(row, locator.url)
    _makes_a_slice(row, planned)
    if row.get("labels", "").startswith(REMOTE):
        locator = _located(row["labels"], slice_name)
        source = Source(slice_name, locator.url, folder / _labels_name(locator.url), "labels", _pins(locator))
        if locator.members:
            source = replace(source, path=_archive_place(locator, folder, shared))
        planned.append((locator, source))
    return planned


def resolve(locator: Locator, listing: Source, client: Client) -> list[Source]:
    """The files of one slice in a GEO folder, or in a tar that is read by member, as `workflow.geo` chooses them.

    Raises
    ------
    SliceError
        What `geo.choose` raises, with slice and address.
    """
    if locator.url.endswith("/"):
        names = [name for name, _ in _said_of(listing, geo.parse_listing, client.text(listing))]
        places = _said_of(listing, geo.choose, names, locator.prefix)
        files = [replace(listing, url=locator.url + quote(name), nbytes=None, pins=()) for name in places]
    else:
        spans, whole = remote_spans(listing, client)
        places = _said_of(listing, geo.choose, list(spans), locator.prefix)
        files = [
            replace(listing, member=name, span=spans[name], whole=whole, nbytes=spans[name][1], pins=())
            for name in places
        ]
    named = {"slice": listing.slice}
    return [
        replace(file, path=listing.path / _named(place, named), role="archive" if is_archive(Path(place)) else "slice")
        for file, place in zip(files, places.values(), strict=True)
    ]


def _bring(
    locator: Locator, source: Source, row: dict[str, str], folder: Path, lock: Lock, client: Client
) -> list[dict]:
    """Fetch one file, record it, and take out what is wanted if it is an archive: the entries of files.json."""
    shared = folder not in source.path.parents
    with _alone(source.path) if shared else contextlib.nullcontext():
        locks = [lock] + ([Lock(source.slice, source.path.parent / "seen.tsv", [])] if shared else [])
        source = replace(source, pins=source.pins + sum((known.pins(source.address) for known in locks), ()))
        fetch(source, client)
        digest = digest_of(source.path)
        for known in locks:
            known.add(source.address, source.path.stat().st_size, digest)
        if source.role == "slice" or (source.role == "labels" and not locator.members):
            return [_entry(source.path, source)]
        return unpack(source, locator.members, row, folder)


def unpack(archive: Source, patterns: tuple[str, ...], row: dict[str, str], folder: Path) -> list[dict]:
    """Take out of an archive that was fetched what the reader needs of one slice, or the one table of labels.

    Parameters
    ----------
    archive
        With the role ``labels`` where the wanted member is one.
    patterns
        Names or fnmatch patterns of the wanted members, each of which must match; () for all.
    row
        Its slice and format.
    folder
        Where the slice's files go.

    Returns
    -------
    Entries of files.json, with `member`.
    """
    names = [name for name in names_in(archive) if not any(part.startswith(MACOS) for part in name.split("/"))]
    for pattern in patterns:
        if not _matching(names, pattern):
            raise problem(
                MissingFile,
                archive,
                found=f"no member {pattern!r} among {len(names)}: {', '.join(names[:8])}",
                expected="at least one that matches",
                next_step="correct `member=` of the url in the catalogue",
            )
    wanted = sorted({name for pattern in patterns for name in _matching(names, pattern)}) if patterns else names
    if archive.role == "labels":
        if len(wanted) > 1:
            raise _too_many(archive, wanted, "one table of labels")
        places = {wanted[0]: _labels_name(wanted[0])}
    elif not patterns and SPATIAL.search(archive.path.name):
        places = _spatial(archive, wanted)
    else:
        h5ad = [name for name in wanted if name.endswith(".h5ad")]
        if row["format"] in H5AD_FORMATS and h5ad:
            if len(h5ad) > 1:
                raise _too_many(archive, h5ad, "one h5ad")
            places = {h5ad[0]: geo.H5AD}
        else:
            places = _members(archive, wanted, patterns)
    paths = {name: folder / _named(place, row) for name, place in places.items()}
    extract(archive, paths)
    entries = []
    for name, path in paths.items():
        if is_archive(path):  # a spatial.tar.gz in a zip: its ending says that it holds no further one
            inner = replace(archive, path=path, role="archive")
            entries += [one | {"member": f"{name}/{one['member']}"} for one in unpack(inner, (), row, folder)]
        else:
            entries.append(_entry(path, archive) | {"member": name})
    return entries


def _matching(names: list[str], pattern: str) -> list[str]:
    return [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]


def _spatial(archive: Source, names: list[str]) -> dict[str, str]:
    """Places of the positions and scale factors of a `spatial.tar.gz`; the matrix lies elsewhere."""
    parents = ("", "spatial")
    places = {
        name: f"outs/spatial/{PurePosixPath(name).name}"
        for name in names
        if PurePosixPath(name).name in (*POSITIONS, SCALEFACTORS) and PurePosixPath(name).parent.name in parents
    }
    if len(set(places.values())) < len(places):
        raise _too_many(archive, sorted(places), "the positions of one slice")
    if not {f"outs/spatial/{name}" for name in POSITIONS} & set(places.values()):
        raise _no_positions(archive, ", ".join(sorted(places)) or "nothing that is needed")
    return places


def _members(archive: Source, names: list[str], patterns: tuple[str, ...]) -> dict[str, str]:
    """Places of the files of one slice in an archive; of its matrix or its positions alone, where no more was asked for."""
    single = {name: _place(PurePosixPath(name).name, {"format": "spaceranger"}) for name in names}
    if patterns and len(names) == 1 and any(single.values()):
        return single
    if patterns and {PurePosixPath(place).parent.name for place in single.values() if place} == {"spatial"}:
        if not any(name.endswith((".mtx", ".mtx.gz", ".h5")) for name in names):
            return _spatial(archive, names)
    return _said_of(archive, geo.choose_members, names)


def _located(address: str, slice_name: str) -> Locator:
    locator = parse(address)
    if not address.startswith(REMOTE) or not locator.host:
        raise problem(
            RefusedUrl,
            Source(slice_name, address, Path()),
            found="an address that is not http(s)",
            expected="http:// or https://",
            next_step="give its web address, or set `source` to `file` if it lies on this machine",
        )
    return locator


def _is_listing(locator: Locator) -> bool:
    return locator.url.endswith("/") or bool(locator.prefix)


def _pins(locator: Locator, sha256: str = "") -> tuple[Pin, ...]:
    """What the row and the address pin; one url may have both, and they may not contradict each other."""
    given = {"sha256": sha256 or locator.sha256, "md5": locator.md5}
    if sha256 and locator.sha256 not in ("", sha256):
        raise CatalogueError(f"{locator.url}: two sha256, {sha256} and {locator.sha256}. Next step: leave one of them.")
    return tuple(Pin(algorithm, digest) for algorithm, digest in given.items() if digest)


def _name(url: str) -> str:
    """File name of a url; Zenodo's ends with `/content` after it."""
    parts = [unquote(part) for part in urlsplit(url).path.split("/") if part]
    return next((part for part in reversed(parts) if part != "content"), "").rsplit("/", 1)[-1]


def _archive_place(locator: Locator, folder: Path, shared: Path | None) -> Path:
    """Where an archive goes: addresses that take members of one archive share it, of several slices too where that is asked for."""
    name = _name(locator.url)
    ending = next((end for end in ENDINGS if name.lower().endswith(end)), ".zip")
    key = hashlib.sha256(locator.url.encode()).hexdigest()[:16]
    stem = "spatial" if SPATIAL.search(name) else "archive"
    home = shared if shared and locator.members else folder / "archives"
    return home / key / f"{stem}{ending}"


def _labels_name(name: str) -> str:
    return "labels.csv" if urlsplit(name).path.endswith(".csv") else "labels.tsv"


def _named(place: str, row: dict[str, str]) -> str:
    """A place of `workflow.geo`, the h5ad called by its slice."""
    return f"{row['slice']}.h5ad" if place == geo.H5AD else place


def _place(name: str, row: dict[str, str]) -> str:
    """Where below the slice's folder a file of this name goes; "" where no reader knows it."""
    if row["format"] in H5AD_FORMATS or (row["format"] == "auto" and name.endswith(".h5ad")):
        return geo.H5AD
    if row["format"] in ("spaceranger", "auto"):
        if matrix := re.search(r"(filtered|raw)_feature_bc_matrix\.h5$", name):
            return f"outs/{matrix[0]}"
        if positions := re.search(r"tissue_positions(_list)?(?=\.(csv|txt)$)", name):
            return f"outs/spatial/{positions[0]}.csv"
        if name.endswith(SCALEFACTORS):
            return f"outs/spatial/{SCALEFACTORS}"
    return ""


def _makes_a_slice(row: dict[str, str], planned: list[tuple[Locator, Source]]) -> None:
    """Refuse, before anything is fetched, what can't become a slice: nothing, two files at one place, a matrix alone."""
    places = [source.path for _, source in planned if source.role == "slice"]
    names = {place.name for place in places}
    packed = [source for _, source in planned if source.role in ("archive", "listing")]
    spatial = any(name in POSITIONS for name in names) or any(SPATIAL.search(source.path.name) for source in packed)
    whole = (
        names == {f"{row['slice']}.h5ad"}
        or (any(name.endswith("_feature_bc_matrix.h5") for name in names) and spatial)
        or any(source.role == "listing" or not SPATIAL.search(source.path.name) for source in packed)
        or row["format"] == "geo"
    )
    known = row["format"] in (*H5AD_FORMATS, "spaceranger", "geo", "auto")
    if len(set(places)) < len(places) or not (whole and known):
        raise _unknown(row, row["url"])


def _complete(row: dict[str, str], entries: list[dict]) -> None:
    """What was fetched holds a matrix and positions, or an h5ad."""
    names = [PurePosixPath(entry["path"]).name for entry in entries if entry["role"] == "slice"]
    about = Source(row["slice"], row["url"], Path())
    if any(name.endswith(".h5ad") for name in names):
        return
    if not any(name.endswith((".h5", ".mtx", ".mtx.gz")) for name in names):
        raise problem(
            MissingFile,
            about,
            found=", ".join(names) or "nothing",
            expected="a matrix: a 10x h5, or matrix.mtx with its lists",
            next_step="complete the urls, or `member=`, of the row in the catalogue",
        )
    if not any("tissue_positions" in name.lower() for name in names):
        raise _no_positions(about, ", ".join(names))


def _same_as_ever(listing: Source, lock: Lock, addresses: set[str]) -> None:
    """A file of this slice that was taken from the listing before must be what is taken now."""
    gone = [url for url in lock.urls(listing.url) if url not in addresses and url != listing.url]
    if gone:
        raise problem(
            SourceChanged,
            listing,
            found=f"{', '.join(sorted(addresses))}",
            expected=f"{', '.join(gone)}, as it was when first seen",
            next_step=f"find out why the source changed; if it is right now, delete the slice's lines in {lock.record} "
            "and in catalogue/aux/*.lock.tsv",
        )


def _said_of(source: Source, chooser, *arguments):
    """What a chooser of `workflow.geo` returns; its errors get the slice and the address that it doesn't know."""
    try:
        return chooser(*arguments)
    except SliceError as error:
        told = {"found": error.found, "expected": error.expected, "next_step": error.next_step}
        raise problem(type(error), source, **told) from error


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Only one job at a time works on a file that several want; the others wait, and then find it there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_name(path.name + ".lock"), "w") as guard:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            logger.warning("%s: another job works on it; this one waits for its end", path)
            fcntl.flock(guard, fcntl.LOCK_EX)
        yield


def _entry(path: Path, source: Source) -> dict:
    entry = {
        "path": path.as_posix(),
        "url": source.url,
        "bytes": path.stat().st_size,
        "sha256": digest_of(path),
        "role": "labels" if source.role == "labels" else "slice",
    }
    return entry | ({"member": source.member} if source.member else {})


def _tidy(folder: Path, keep: set[Path]) -> None:
    """Remove unpacked archives, and what an earlier row of the catalogue left behind and a reader might pick up."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_file() and path not in keep:
            path.unlink()
        elif path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _unknown(row: dict[str, str], where: str) -> SliceError:
    return problem(
        UnknownFormat,
        Source(row["slice"], where, Path()),
        found=f"format {row['format']} with urls that no download rule knows",
        expected="a 10x matrix h5 with spatial.tar.gz or tissue positions, a GEO folder, an archive that holds these, or one h5ad",
        next_step="fetch the files yourself and give their path with `source` set to `file`",
    )


def _too_many(archive: Source, names: list[str], expected: str) -> SliceError:
    return problem(
        UnknownFormat,
        archive,
        found=f"{len(names)} members: {', '.join(names[:6])}",
        expected=expected,
        next_step="narrow it with `member=` after the url in the catalogue",
    )


def _no_positions(source: Source, found: str) -> SliceError:
    return problem(
        MissingPositions,
        source,
        found=found,
        expected=" or ".join(POSITIONS),
        next_step="take the row out of the catalogue, or add the url of the positions",
    )


if __name__ == "__main__":
    from workflow.lock import shipped
    from workflow.logs import log_to

    terminal = log_to(snakemake.log[0])
    for shown, level in (("download", logging.WARNING), ("download.progress", logging.INFO)):
        handler = logging.StreamHandler(terminal)
        handler.setLevel(level)
        logging.getLogger(shown).addHandler(handler)
    params = snakemake.params
    download(
        dict(params.row),
        Path(snakemake.output[0]).parent,
        Lock(params.row["slice"], params.lock, shipped()),
        allow_hosts=params.redirect_hosts,
        mirrors=dict(params.mirrors),
        shared=Path(params.archives),
    )
