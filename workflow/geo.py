"""What GEO's folders hold, and which of their files are one slice: pure functions from names to names.

Depositors package a Visium section in the ways below. A file belongs to the section whose full name stands before a known
ending (``GSM1_A1`` in ``GSM1_A1_matrix.mtx.gz``), never to a GSM alone: one sample may hold several sections. Names vary in case,
and the separator before the ending is ``_``, ``.``, ``-`` or a space.

=============  ==========================================================================================
flat MEX       ``matrix.mtx``, ``barcodes.tsv``, ``features.tsv`` (``genes.tsv``), each maybe after ``raw_feature_bc_matrix_``
flat h5        ``filtered_feature_bc_matrix.h5`` or ``raw_...``
positions      ``tissue_positions.csv`` or ``tissue_positions_list.csv``, maybe after ``spatial_``; or ``spatial.tar.gz``
Space Ranger   one ``{section}.tar.gz`` of the whole output
h5ad           only where no matrix of counts is: deposited h5ad are often scaled
=============  ==========================================================================================

Of several, filtered matrices go before unnamed ones, these before raw ones, h5 before MEX: the reader's order
(`workflow.readers.tenx`). Barcodes may be missing, which the reader judges. Chosen files get Space Ranger's own names and folders.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from urllib.parse import unquote

from workflow.errors import (
    MissingFile,
    MissingPositions,
    MultipleSections,
    SliceError,
    UnknownFormat,
    Unreadable,
    UnsafeName,
)

FTP = "https://ftp.ncbi.nlm.nih.gov/geo"
SPATIAL = "spatial"  # places of archives, before their ending: what lies in `spatial/`,
WHOLE = "spaceranger"  # and what lies in `outs/`
H5AD = "slice.h5ad"

_END = r"(?P<packed>\.gz)?$"
_ARCHIVE = r"\.(?P<packed>tar\.gz|tgz|tar|zip)$"
_WHICH = r"(?:(?P<which>filtered|raw)[_.-])?"
_MATRIX = _WHICH + r"(?:(?:feature|gene)_bc_matri(?:x|ces)[_./-])?"
_BEFORE = r"(?P<prefix>.*?)(?:^|[_. /-])"  # of a member of an archive, folders too
# In this order: the last one takes any archive that the others leave.
KINDS = {
    kind: re.compile(pattern, re.IGNORECASE | re.DOTALL)
    for kind, pattern in {
        "matrix": _BEFORE + _MATRIX + r"matrix\.mtx" + _END,
        "barcodes": _BEFORE + _MATRIX + r"barcodes\.tsv" + _END,
        "features": _BEFORE + _MATRIX + r"(?:features|genes)\.tsv" + _END,
        "h5": _BEFORE + _WHICH + r"(?:feature|gene)_bc_matri(?:x|ces)(?:_h5)?\.h5$",
        "positions": _BEFORE + r"(?:spatial[_./-])?(?P<stem>tissue_positions(?:_list)?)\.(?P<type>csv|txt|tsv)" + _END,
        "parquet": _BEFORE + r"(?:spatial[_./-])?tissue_positions\.parquet" + _END,
        "scale": _BEFORE + r"(?:spatial[_./-])?scalefactors_json\.json" + _END,
        SPATIAL: _BEFORE + r"spatial" + _ARCHIVE,
        "h5ad": r"(?P<prefix>.*)\.h5ad$",
        WHOLE: r"(?P<prefix>.*?)(?:[_. -](?:outs|spaceranger|space_ranger))?" + _ARCHIVE,
    }.items()
}
# Archives that hold no slice, and GEO's own bundle of a whole series.
OTHER_ARCHIVE = re.compile(
    r"(^|[_. -])(raw|images?|fastqs?|analysis|cloupe|bam|bc_matri(x|ces)|binned_outputs|segmented_outputs)\.(tar|tgz|zip)",
    re.IGNORECASE,
)
RANK = {"filtered": 0, "": 1, "raw": 2}
COUNTS = ("h5", "matrix")


@dataclass
class Section:
    """The files of one prefix, by kind."""

    prefix: str  # as the first of them spells it
    files: dict[tuple[str, str], str] = field(default_factory=dict)  # (kind, "filtered", "raw" or "") -> name
    twice: list[tuple[str, str]] = field(default_factory=list)  # two names for one of these places

    def first(self, kind: str) -> str | None:
        return next((name for (found, _), name in self.files.items() if found == kind), None)

    def has(self, *kinds: str) -> bool:
        return any(kind in kinds for kind, _ in self.files)


def choose(names: Iterable[str], prefix: str = "") -> dict[str, str]:
    """The files of one slice among the names of a sample's folder, a series' file list or a RAW.tar.

    Parameters
    ----------
    names
        Bare file names.
    prefix
        What the wanted names begin with, in whatever case. Where it is a section's whole name, longer names are not meant
        (``GSM1_A1`` leaves ``GSM1_A10`` aside); where it covers one matrix and one table of positions, these belong together.

    Returns
    -------
    Name -> place below the slice's folder, ``outs/...`` as Space Ranger has it; ``slice.h5ad``; for archives
    ``spatial.tar.gz`` or ``spaceranger.tar.gz`` (``.tar``, ``.zip``).

    Raises
    ------
    SliceError
        `UnsafeName`; `MissingFile` (no matrix); `MissingPositions`; `MultipleSections` (names the prefixes there are);
        `UnknownFormat` (h5ad beside counts of another prefix). Slice and file are blank: the caller knows them.
    """
    names = checked(names)
    wanted = grouped(name for name in names if name.lower().startswith(prefix.lower()))
    if _key(prefix) in wanted:
        wanted = {_key(prefix): wanted[_key(prefix)]}
    for kinds in (COUNTS, (WHOLE,)):  # an archive that lies beside counts holds images or the like
        found = [section for section in wanted.values() if section.has(*kinds)]
        if len(found) > 1:
            raise _several(section.prefix for section in found)
        if found:
            return _placed(found[0], wanted.values() if prefix else ())
    return _h5ad(wanted, grouped(names), prefix, len(names))


def choose_members(names: Iterable[str]) -> dict[str, str]:
    """As `choose`, of the members of one slice's archive: names with folders, all of them meant.

    What is hidden, AppleDouble files (``._*``) among it, is left out, and the section may be named in the folders or in the files.

    Raises
    ------
    SliceError
        As `choose`.
    """
    names = [name for name in names if not name.endswith("/")]
    for name in names:
        if reason := _unsafe(name, folders=True):
            raise _refused(name, reason)
    names = [name for name in names if not any(part.startswith(("._", "__MACOSX")) for part in name.split("/"))]
    sections = grouped(names)
    best: dict[tuple[int, bool], list[Section]] = {}
    for section in sections.values():
        for kind, which in section.files:
            if kind in COUNTS:
                best.setdefault((RANK[which], kind == "matrix"), []).append(section)
    if not best:
        return _h5ad(sections, sections, "", len(names))
    rivals = best[min(best)]
    if len(rivals) > 1:
        raise _several(section.prefix for section in rivals)
    return _placed(rivals[0], sections.values())


def resolvable(names: Iterable[str]) -> dict[str, dict[str, str] | SliceError]:
    """Every section among the names of a series: its prefix -> what `choose` says of it, or the error that it raises.

    Sections without any matrix (images, positions alone) are left out, and h5ad whose counts lie beside them.
    """
    names = checked(names)
    sections = grouped(names)
    counted = [key for key, section in sections.items() if section.has(*COUNTS)]
    found: dict[str, dict[str, str] | SliceError] = {}
    for key, section in sorted(sections.items()):
        lone = section.has(WHOLE) and not any(key.startswith(other) for other in counted)
        h5ad = section.has("h5ad") and not _counts_beside(section, sections.values())
        if not (key in counted or lone or h5ad):
            continue
        try:
            found[section.prefix] = choose(names, section.prefix)
        except SliceError as error:
            found[section.prefix] = error
    return found


def checked(names: Iterable[str]) -> list[str]:
    """Names of a listing without hidden ones; one that could lead out of the folder refuses the whole listing.

    Raises
    ------
    UnsafeName
    """
    kept = []
    for name in names:
        if reason := _unsafe(name):
            raise _refused(name, reason)
        if not name.startswith("."):
            kept.append(name)
    return kept


def _unsafe(name: str, folders: bool = False) -> str:
    """Why a name may not be used, "" if it may."""
    parts = name.split("/")
    if any(not character.isprintable() for character in name):
        return "control characters"
    if "\\" in name or (len(parts) > 1 and not folders):
        return "a path where a name belongs"
    if any(part in ("", "..") for part in parts):
        return "a path that leaves its folder"
    return ""


def _refused(name: str, reason: str) -> UnsafeName:
    return UnsafeName(
        slice="",
        found=f"{name!r}: {reason}",
        expected="names of files",
        next_step="do not fetch it; look at where the listing came from",
    )


def grouped(names: Iterable[str]) -> dict[str, Section]:
    """Sections by their prefix in lower case; names of no known kind are left out."""
    sections: dict[str, Section] = {}
    for name in sorted(names):
        for kind, pattern in KINDS.items():
            match = pattern.match(name)
            if not match or (kind == WHOLE and OTHER_ARCHIVE.search(name)):
                continue
            prefix = match["prefix"].rstrip("_. /-")
            section = sections.setdefault(_key(prefix), Section(prefix))
            which = (match.groupdict().get("which") or "").lower()
            kept = section.files.setdefault((kind, which), name)  # tissue_positions before tissue_positions_list
            if kind in (*COUNTS, SPATIAL, WHOLE, "h5ad") and name not in (kept, f"{kept}.gz"):
                section.twice.append((kept, name))
            break
    return sections


def _key(prefix: str) -> str:
    return prefix.rstrip("_. /-").lower()


def _placed(section: Section, others: Iterable[Section]) -> dict[str, str]:
    """The best matrix of a section and its positions, each with its place.

    Where it has none, those of the one of ``others`` that has any.
    """
    if not section.has("positions", SPATIAL):
        lenders = [other for other in others if other.has("positions", SPATIAL)]
        if len(lenders) == 1:
            lent = {key: name for key, name in lenders[0].files.items() if key[0] in ("positions", "scale", SPATIAL)}
            section.files.update(lent)
    matrix, positions, whole = _matrix(section), _positions(section), section.first(WHOLE)
    if whole and not (matrix and positions):
        placed = {whole: WHOLE + _ending(WHOLE, whole)}
    elif not matrix:
        raise MissingFile(
            slice="",
            found=f"{section.first('matrix')} without features.tsv (genes.tsv) of the same prefix",
            expected="matrix.mtx, barcodes.tsv and features.tsv (genes.tsv), or a 10x h5",
            next_step="look for the list of genes at the source, or take the row out of the catalogue",
        )
    elif not positions:
        raise _no_positions(section)
    else:
        placed = matrix | positions
    if clash := next((pair for pair in section.twice if pair[0] in placed), None):
        raise MultipleSections(
            slice="",
            found=f"{clash[0]} and {clash[1]}",
            expected="one matrix and one archive a section",
            next_step="give more of the wanted file's name as #prefix=... after the url",
        )
    return placed


def _matrix(section: Section) -> dict[str, str]:
    """Name -> place of the best matrix; empty where a MEX lacks its features."""
    for which in sorted(RANK, key=RANK.get):
        folder = f"{which}_feature_bc_matrix".lstrip("_")
        if name := section.files.get(("h5", which)):
            return {name: f"outs/{folder}.h5"}
        trio = {kind: section.files.get((kind, which)) for kind in ("matrix", "features", "barcodes")}
        if trio["matrix"] and trio["features"]:
            ends = {"matrix": "matrix.mtx", "features": "features.tsv", "barcodes": "barcodes.tsv"}
            return {n: f"outs/{folder}/{ends[kind]}{_ending(kind, n)}" for kind, n in trio.items() if n}
    return {}


def _positions(section: Section) -> dict[str, str]:
    """Name -> place of positions and scale factors, or of the archive that holds them; empty without."""
    if name := section.first("positions"):
        match = KINDS["positions"].match(name)
        place = f"outs/spatial/{match['stem']}.{match['type']}".lower()
        scale = section.first("scale")
        factors = {scale: f"outs/spatial/scalefactors_json.json{_ending('scale', scale)}"} if scale else {}
        return {name: place + _ending("positions", name)} | factors
    archive = section.first(SPATIAL)
    return {archive: SPATIAL + _ending(SPATIAL, archive)} if archive else {}


def _ending(kind: str, name: str) -> str:
    """How a name says that it is packed: "", ".gz", ".tar.gz", ..."""
    packed = (KINDS[kind].match(name)["packed"] or "").lower().lstrip(".")
    return f".{'tar.gz' if packed == 'tgz' else packed}" if packed else ""


def _no_positions(section: Section) -> MissingPositions:
    if section.has("parquet"):
        found = f"positions of {section.prefix} only as parquet, as Visium HD has them"
        step = "take the row out of the catalogue: bins of Visium HD are no spots"
    else:
        found = f"a matrix of {section.prefix} and no positions"
        step = (
            "take the row out of the catalogue; or, if positions of another name belong to it, give what both begin with "
            "as #prefix=... after the url"
        )
    return MissingPositions(
        slice="",
        found=found,
        expected="tissue_positions.csv, tissue_positions_list.csv or spatial.tar.gz of the same prefix",
        next_step=step,
    )


def _h5ad(wanted: dict[str, Section], sections: dict[str, Section], prefix: str, n_names: int) -> dict[str, str]:
    """The one h5ad among the wanted sections, if no counts lie beside it."""
    found = {section.prefix: section for section in wanted.values() if section.has("h5ad")}
    if len(found) > 1:
        raise _several(found)
    if not found:
        known = sorted(section.prefix for section in sections.values() if section.has(*COUNTS, WHOLE, "h5ad"))
        raise MissingFile(
            slice="",
            found=f"no matrix among {n_names} names" + (f" beginning with {prefix}" if prefix else ""),
            expected="a 10x h5, matrix.mtx with its lists, a Space Ranger tar.gz or an h5ad",
            next_step=f"correct #prefix=... to one of {_some(known)}"
            if known
            else "look for the counts among the series' files, or take the row out of the catalogue",
        )
    (section,) = found.values()
    if beside := _counts_beside(section, sections.values()):
        raise UnknownFormat(
            slice="",
            found=f"the h5ad of {section.prefix} beside the counts of {beside.prefix}",
            expected="the files that hold the raw counts",
            next_step=f"give #prefix={beside.prefix} after the url",
        )
    return {section.first("h5ad"): H5AD}


def _counts_beside(section: Section, sections: Iterable[Section]) -> Section | None:
    """The section whose counts an h5ad is made of: named alike but for separators (``A1_LN`` and ``A1LN``)."""
    bare = re.sub(r"[_. -]", "", section.prefix.lower())
    return next(
        (s for s in sections if s.has(*COUNTS, WHOLE) and re.sub(r"[_. -]", "", s.prefix.lower()) == bare), None
    )


def _several(prefixes: Iterable[str]) -> MultipleSections:
    prefixes = sorted(prefixes)
    return MultipleSections(
        slice="",
        found=f"{len(prefixes)} sections: {_some(prefixes, 40)}",
        expected="the files of one section",
        next_step="one catalogue row a section, each with #prefix=... (one of these) after the url",
    )


def _some(names: Iterable[str], most: int = 6) -> str:
    names = list(names)
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


def sample_dir(gsm: str) -> str:
    """Address of a sample's folder: the last three digits of its number make way for ``nnn``.

    Raises
    ------
    ValueError
        Not a GSM accession.
    """
    return _folder("samples", "GSM", gsm)


def series_dir(gse: str) -> str:
    """Address of a series' folder of supplementary files (`sample_dir`)."""
    return _folder("series", "GSE", gse)


def _folder(kind: str, letters: str, accession: str) -> str:
    match = re.fullmatch(rf"({letters}\d*?)\d{{1,3}}", accession)
    if not match:
        raise ValueError(f"{accession!r}; expected {letters} and a number")
    return f"{FTP}/{kind}/{match[1]}nnn/{accession}/suppl/"


def parse_listing(html: str) -> list[tuple[str, int | None]]:
    """Names and sizes in bytes that a web server's listing of a folder links to (Apache's, as ftp.ncbi.nlm.nih.gov has it).

    The size is None where the listing rounds it (``3.1K``). Links elsewhere (parent folder, sorting, footer) and subfolders
    are no files.

    Raises
    ------
    UnsafeName
        A name that, once decoded, leads into another folder.
    """
    parser = _Links()
    parser.feed(html)
    parser.close()
    found: dict[str, int | None] = {}
    for href, text in parser.links:
        if re.match(r"[/?#]|\.\./|[a-z][a-z0-9+.-]*:", href, re.IGNORECASE) or href.endswith("/"):
            continue
        name = unquote(re.split(r"[?#]", href)[0])
        if reason := _unsafe(name):
            raise _refused(href, reason)
        size = re.match(r"\s+\d{4}-\d\d-\d\d \d\d:\d\d\s+(\d+)\s*$", text)
        found.setdefault(name, int(size[1]) if size else None)
    return list(found.items())


class _Links(HTMLParser):
    """Each link's address, and the text between its end and the next tag."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[list[str]] = []
        self.after = False

    def handle_starttag(self, tag, attrs):
        self.after = False
        if tag == "a" and (href := dict(attrs).get("href")):
            self.links.append([href, ""])

    def handle_endtag(self, tag):
        self.after = tag == "a" and bool(self.links)

    def handle_data(self, data):
        if self.after:
            self.links[-1][1] += data


def parse_filelist(text: str) -> list[tuple[str, int]]:
    """Names and sizes in bytes of the members that a series' ``filelist.txt`` names (the archive itself is left out).

    Raises
    ------
    Unreadable, UnsafeName
    """
    rows = [line.split("\t") for line in text.splitlines() if line.strip()]
    try:
        name, size = rows[0].index("Name"), rows[0].index("Size")
        members = [(row[name], int(row[size])) for row in rows[1:] if row[0].lower() != "archive"]
    except (ValueError, IndexError) as error:
        raise Unreadable(
            slice="",
            file="filelist.txt",
            found=f"{rows[0] if rows else 'nothing'} ({error})",
            expected="tab-separated columns with the header Archive/File, Name, Time, Size, Type",
            next_step="fetch it again; if it stays so, use the samples' folders",
        ) from error
    for member, _ in members:
        if reason := _unsafe(member):
            raise _refused(member, reason)
    return members
