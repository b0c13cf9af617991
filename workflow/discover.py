"""Look for public Visium slices that a table of slices does not have yet, and for those that changed at their source.

    python -m workflow.discover --source cellxgene
    python -m workflow.discover --source geo --query "Visium AND melanoma"
    python -m workflow.discover --source geo --series GSE225857 GSE263617 --write new.tsv

It prints a line a finding: `+` new, `~` another version or size than the table's, `-` in the table and gone from the source,
`!` left out, with the reason. Rows are written for what is new, into a file of their own; the table is never touched: what
changed at a source is looked at by somebody, not taken.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote, urlencode, urlsplit

from workflow import geo
from workflow.catalogue import columns, load_catalogue, resolve
from workflow.errors import CatalogueError, DownloadFailed, MissingFile, SliceError, Unreadable
from workflow.locators import parse
from workflow.transfer import BUSY, Client, Manners, Source

ROOT = Path(__file__).resolve().parents[1]
API = "https://api.cellxgene.cziscience.com/curation/v1"
FILES = "https://datasets.cellxgene.cziscience.com"
EUTILS = "https://eutils.ncbi.nlm.nih.gov/entrez/eutils"
HOSTS = frozenset(urlsplit(url).hostname for url in (API, EUTILS, geo.FTP))
PAUSE = 0.34  # seconds between two requests to NCBI, which allows three a second without a key
PAGE = 200  # summaries a request

VISIUM = {  # the term, since schema 5.3 only a parent, and its children; neither Visium HD nor Slide-seq
    "EFO:0010961": "Visium",
    "EFO:0022857": "Visium",
    "EFO:0022858": "Visium CytAssist",
    "EFO:0022859": "Visium CytAssist 6.5 mm",
    "EFO:0022860": "Visium CytAssist 11 mm",
}
ORGANISMS = {"human": ("NCBITaxon:9606", "Homo sapiens"), "mouse": ("NCBITaxon:10090", "Mus musculus")}
UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
LICENCE = "CC BY 4.0"  # of everything on CELLXGENE Discover


@dataclass
class Found:
    """What a source has, and how it stands to the table.

    Attributes
    ----------
    rows
        A catalogue row for each slice that the source has and the table does not.
    changed, vanished, left_out
        (what, the difference or the reason).
    n_known
        Slices that are in the table, as they are at the source.
    """

    rows: list[dict[str, str]] = field(default_factory=list)
    changed: list[tuple[str, str]] = field(default_factory=list)
    vanished: list[tuple[str, str]] = field(default_factory=list)
    left_out: list[tuple[str, str]] = field(default_factory=list)
    n_known: int = 0

    def lines(self) -> Iterator[str]:
        """A line a finding, then the sum."""
        for row in sorted(self.rows, key=lambda row: row["slice"]):
            told = [row[name] for name in ("dataset", "tissue", "disease", "technology", "url") if row[name]]
            yield f"+ {row['slice']}: {', '.join(told)}"
        for sign, findings in (("~", self.changed), ("-", self.vanished), ("!", self.left_out)):
            for what, why in sorted(findings):
                yield f"{sign} {plain(what)}: {plain(why)}"
        yield (
            f"{len(self.rows)} new, {self.n_known} as in the table, {len(self.changed)} changed, {len(self.vanished)} gone, "
            f"{len(self.left_out)} left out"
        )


class Asking:
    """Requests for JSON and text to one source, spaced by `pause` seconds."""

    def __init__(self, client: Client, source: str, pause: float = 0.0) -> None:
        self.client, self.source, self.pause, self.last = client, source, pause, -pause

    def text(self, url: str) -> str:
        time.sleep(max(0.0, self.last + self.pause - time.monotonic()))
        self.last = time.monotonic()
        return self.client.text(Source(self.source, url, Path()))

    def json(self, url: str):
        """What a server answers, parsed.

        Raises
        ------
        Unreadable
            It is no JSON, a part of it for example; or an error message.
        """
        text = self.text(url)
        try:
            answer = json.loads(text)
        except json.JSONDecodeError as error:
            raise self.unreadable(url, f"{len(text)} characters that are no JSON ({error})") from error
        if isinstance(answer, dict) and (message := answer.get("error") or answer.get("detail")):
            raise self.unreadable(url, f"the message {plain(str(message))!r}")
        return answer

    def unreadable(self, url: str, found: str) -> Unreadable:
        return Unreadable(
            slice=self.source,
            file=url,
            found=found,
            expected="an answer of the documented form",
            next_step="try again later; if it stays so, compare the source's documentation with workflow/discover.py",
        )


def plain(text: str) -> str:
    """A text from elsewhere in one line, without tabs and control characters."""
    return " ".join("".join(c if c.isprintable() else " " for c in str(text)).split())


def blank_row(**values: str) -> dict[str, str]:
    return dict.fromkeys(columns(), "") | {name: plain(value) for name, value in values.items()}


def discover_cellxgene(
    ask: Asking, table: list[dict[str, str]], organism: str, query: str = "", split: str = "train"
) -> Found:
    """Single sections of Visium on CELLXGENE Discover, from its curation API (``GET /datasets``).

    Parameters
    ----------
    ask
        How to ask it.
    table
        Rows that are known.
    organism
        ``human`` or ``mouse``.
    query
        Words that must all occur in title, collection, tissue or disease, in whatever case.
    split
        Of the new rows.

    Raises
    ------
    Unreadable
        Another answer than the documented one.
    """
    url = f"{API}/datasets"
    records = ask.json(url)
    found = Found()
    unseen = [row for row in table if row["source"] == "cellxgene"]
    try:
        for record in records:
            ids = {record["dataset_id"], record["dataset_version_id"]}
            rows = [row for row in unseen if ids & _uuids(row)]
            unseen = [row for row in unseen if row not in rows]
            if not rows and not (_is_visium(record) and _has_words(record, query.lower().split())):
                continue
            why = _why_not_a_slice(record, organism)
            if why:
                found.changed += [(row["slice"], f"no slice for this table any more: {why}") for row in rows]
                found.left_out += [] if rows else [(f"dataset {record['dataset_id']}", f"{why} ({record['title']})")]
                continue
            fresh = _cellxgene_row(record, organism, split)
            found.rows += [] if rows else [fresh]
            for row in rows:
                _compare(found, row, fresh)
        for row in unseen:
            _search_version(found, row, ask, records)
    except (KeyError, TypeError, AttributeError) as error:
        raise ask.unreadable(url, f"a record of another form: {type(error).__name__} {error}") from error
    return found


def _uuids(row: dict[str, str]) -> set[str]:
    """Ids of datasets and versions that a row names, but not those of collections (its dataset)."""
    text = " ".join(row[name] for name in ("slice", "accession", "url", "evidence"))
    return {match[0] for match in UUID.finditer(text)} - {row["dataset"]}


def _is_visium(record: dict) -> bool:
    return any(term["ontology_term_id"] in VISIUM for term in record["assay"])


def _has_words(record: dict, words: Iterable[str]) -> bool:
    labels = [term["label"] for name in ("tissue", "disease") for term in record[name]]
    text = " ".join([record["title"], record.get("collection_name") or "", *labels]).lower()
    return all(word in text for word in words)


def _why_not_a_slice(record: dict, organism: str) -> str:
    """Why a Visium dataset gives no row, "" if it does."""
    h5ad = [asset for asset in record["assets"] if asset["filetype"] == "H5AD"]
    organisms = [term["ontology_term_id"] for term in record["organism"]]
    spatial = record.get("spatial")
    assays = {term["ontology_term_id"] for term in record["assay"]}
    if not UUID.fullmatch(record["dataset_id"]) or not UUID.fullmatch(record["dataset_version_id"]):
        return "ids that are none"
    if not assays <= set(VISIUM):
        return f"other assays too: {', '.join(sorted(assays))}"
    if organisms != [ORGANISMS[organism][0]]:
        return f"organism {', '.join(term['label'] for term in record['organism'])}"
    if not spatial or "is_single" not in spatial:
        return "it isn't said whether it is a single section"
    if not spatial["is_single"]:
        return "several sections in one file"
    if not any(record["is_primary_data"]):
        return "a copy of data that is primary elsewhere"
    if len(h5ad) != 1:
        return f"{len(h5ad)} h5ad files"
    if h5ad[0]["url"] != f"{FILES}/{record['dataset_version_id']}.h5ad":
        return f"its file's address does not name the version: {h5ad[0]['url']}"
    return ""


def _cellxgene_row(record: dict, organism: str, split: str) -> dict[str, str]:
    (asset,) = (asset for asset in record["assets"] if asset["filetype"] == "H5AD")
    source = ["CELLXGENE curation API", record["title"]]
    source += [f"doi {record['collection_doi']}"] if record.get("collection_doi") else []
    return blank_row(
        slice=f"cellxgene_{record['dataset_id']}",
        dataset=record["collection_id"],
        split=split,
        source="cellxgene",
        accession=f"{record['dataset_id']} {record['dataset_version_id']}",
        url=asset["url"],
        bytes=str(int(asset["filesize"])),
        format="cellxgene",
        organism=organism,
        tissue=terms(record["tissue"]),
        disease=terms(record["disease"]),
        technology="; ".join(sorted({VISIUM[term["ontology_term_id"]] for term in record["assay"]})),
        donor="; ".join(record["donor_id"]),
        genes=str(record["feature_count"] or ""),  # its cell_count has the spots off the tissue too
        licence=LICENCE,
        evidence="; ".join(source),
    )


def terms(listed: list[dict]) -> str:
    """Terms as ``label (id)``, "normal" alone; one of schema 6 and later may hold several, parted by `` || ``."""
    found: dict[str, None] = {}
    for term in listed:
        labels, ids = term["label"].split(" || "), term["ontology_term_id"].split(" || ")
        pairs = (
            zip(labels, ids, strict=True) if len(labels) == len(ids) else [(term["label"], term["ontology_term_id"])]
        )
        found |= dict.fromkeys(label if label == "normal" else f"{label} ({identifier})" for label, identifier in pairs)
    return "; ".join(found)


def _compare(found: Found, row: dict[str, str], fresh: dict[str, str]) -> None:
    """Note how a row of the table differs from the source's, in what decides which bytes are fetched."""
    differences = []
    if fresh["url"] != parse(row["url"]).url:
        old = UUID.search(row["url"])
        differences.append(f"dataset_version_id {old[0] if old else row['url']} -> {fresh['accession'].split()[1]}")
    if row["bytes"] and row["bytes"] != fresh["bytes"]:
        differences.append(f"bytes {row['bytes']} -> {fresh['bytes']}")
    found.n_known += not differences
    found.changed += [(row["slice"], difference) for difference in differences]


def _search_version(found: Found, row: dict[str, str], ask: Asking, records: list[dict]) -> None:
    """A row whose ids the list does not have: the version that its url names may be an earlier one of a dataset there."""
    version = UUID.search(row["url"])
    if not version:
        found.vanished.append((row["slice"], f"no dataset version in {row['url']}"))
        return
    url = f"{API}/dataset_versions/{version[0]}"
    try:
        dataset = ask.json(url)["dataset_id"]
    except MissingFile:
        found.vanished.append((row["slice"], f"CELLXGENE has no dataset version {version[0]}"))
        return
    newer = next((record["dataset_version_id"] for record in records if record["dataset_id"] == dataset), None)
    if newer:
        found.changed.append((row["slice"], f"dataset_version_id {version[0]} -> {newer}"))
    else:
        found.vanished.append((row["slice"], f"dataset {dataset} is no longer in the list"))


def discover_geo(
    ask: Asking,
    table: list[dict[str, str]],
    organism: str,
    query: str = "Visium",
    series: Iterable[str] = (),
    split: str = "train",
) -> Found:
    """Sections in the series that GEO finds, from eutils and the names of the series' files.

    Parameters
    ----------
    ask, table, organism, split
        As in `discover_cellxgene`.
    query
        Term of a search of series (Entrez syntax).
    series
        GSE accessions to look at instead.

    Raises
    ------
    Unreadable
        Another answer than the documented one.
    """
    found = Found()
    term = " OR ".join(f"{gse}[ACCN]" for gse in series) or f'({query}) AND "{ORGANISMS[organism][1]}"[ORGN]'
    url = f"{EUTILS}/esummary.fcgi"
    missing = set(series)
    for summary in _summaries(ask, f"({term}) AND gse[ETYP]"):
        try:
            gse, taxa = summary["accession"], summary["taxon"].split("; ")
            titles = {sample["accession"]: sample["title"] for sample in summary["samples"]}
        except (KeyError, TypeError, AttributeError) as error:
            raise ask.unreadable(url, f"a summary of another form: {type(error).__name__} {error}") from error
        if not re.fullmatch(r"GSE\d+", gse) or not all(re.fullmatch(r"GSM\d+", gsm) for gsm in titles):
            raise ask.unreadable(url, f"accessions that are none: {plain(gse)}")
        missing.discard(gse)
        if taxa != [ORGANISMS[organism][1]]:
            found.left_out.append((gse, f"organism {', '.join(taxa)}"))
            continue
        _sections(found, ask, table, gse, titles, organism, split)
    found.left_out += [(gse, "GEO finds no such series") for gse in missing]
    return found


def _summaries(ask: Asking, term: str) -> Iterator[dict]:
    """Summaries of everything that a search of GEO finds."""
    search = f"{EUTILS}/esearch.fcgi"
    about = {"db": "gds", "retmode": "json", "tool": "stpatch"}
    try:
        answer = ask.json(f"{search}?{urlencode(about | {'term': term, 'usehistory': 'y', 'retmax': 0})}")[
            "esearchresult"
        ]
        if message := answer.get("ERROR"):
            raise ask.unreadable(search, f"the message {plain(str(message))!r}")
        count, history = int(answer["count"]), {"query_key": answer["querykey"], "WebEnv": answer["webenv"]}
        for start in range(0, count, PAGE):
            page = about | history | {"retstart": start, "retmax": PAGE}
            result = ask.json(f"{EUTILS}/esummary.fcgi?{urlencode(page)}")["result"]
            yield from [result[uid] for uid in result["uids"]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, SliceError):
            raise
        raise ask.unreadable(search, f"an answer of another form: {type(error).__name__} {error}") from error


def _sections(
    found: Found, ask: Asking, table: list[dict[str, str]], gse: str, titles: dict[str, str], organism: str, split: str
) -> None:
    """Add the sections of one series."""
    try:
        names = _names(ask, gse, titles)
        sections = geo.resolvable(names)
    except SliceError as error:
        found.left_out.append((gse, f"{error.found}; expected {error.expected}"))
        return
    if not sections:
        found.left_out.append((gse, f"no matrix, archive or h5ad among {len(names)} names"))
    known = {gsm: [row for row in table if gsm in _accessions(row)] for gsm in titles}
    in_sample: dict[str, list[str]] = {}  # sample -> prefixes that can be resolved
    for prefix, chosen in sections.items():
        if isinstance(chosen, SliceError):
            found.left_out.append((f"{gse} {prefix}", f"{chosen.found}; expected {chosen.expected}"))
        elif _sample_of(prefix) not in titles:
            found.left_out.append((f"{gse} {prefix}", "files of the series and not of one of its samples"))
        else:
            in_sample.setdefault(_sample_of(prefix), []).append(prefix)
    for gsm, prefixes in in_sample.items():
        if known[gsm]:
            _compare_sample(found, known[gsm], gsm, prefixes, names)
            continue
        for prefix in prefixes:
            alone = sum(_sample_of(other) == gsm for other in sections) == 1
            found.rows.append(
                blank_row(
                    slice=gsm if alone else re.sub(r"[^A-Za-z0-9_-]+", "_", prefix),
                    dataset=gse,
                    split=split,
                    source="geo",
                    accession=f"{gse} {gsm}",
                    url=geo.sample_dir(gsm) + ("" if alone else f"#prefix={quote(prefix)}"),
                    format="geo",
                    organism=organism,
                    technology="Visium",
                    evidence=f"GEO {gse}, sample {titles[gsm]}",
                )
            )
    for gsm in set(titles) - set(in_sample):
        for row in known[gsm]:
            if row["source"] == "geo":
                found.vanished.append((row["slice"], f"{gse} has no files of {gsm} that make a slice"))


def _names(ask: Asking, gse: str, titles: Iterable[str]) -> list[str]:
    """Names of the files of a series' samples: from its file list, or, where it has none, from each sample's folder."""
    try:
        return [name for name, _ in geo.parse_filelist(ask.text(geo.series_dir(gse) + "filelist.txt"))]
    except SliceError as error:
        _unless_empty(error)
    names = []
    for gsm in sorted(titles):
        try:
            names += [name for name, _ in geo.parse_listing(ask.text(geo.sample_dir(gsm)))]
        except SliceError as error:
            _unless_empty(error)
    return names


def _unless_empty(error: SliceError) -> None:
    """Let the answer to a folder that has no files pass: HTTP 404, and 403, with which GEO answers for one without index."""
    if not (isinstance(error, MissingFile) or (isinstance(error, DownloadFailed) and error.found == "HTTP 403")):
        raise error


def _sample_of(name: str) -> str:
    """The GSM that a name begins with, "" if it doesn't."""
    match = re.match(r"GSM\d+", name, re.IGNORECASE)
    return match[0].upper() if match else ""


def _accessions(row: dict[str, str]) -> set[str]:
    text = " ".join(row[name] for name in ("slice", "accession", "url"))
    return set(re.findall(r"GSM\d+", text))


def _compare_sample(found: Found, rows: list[dict[str, str]], gsm: str, prefixes: list[str], names: list[str]) -> None:
    """Note how the sections of a sample that the table has differ from those at GEO."""
    mine = [name for name in names if _sample_of(name) == gsm]
    before = len(found.changed)
    for row in (row for row in rows if row["source"] == "geo"):
        locators = [parse(address) for address in row["url"].split()]
        listed = locators[0].url.endswith("/") or bool(locators[0].prefix)
        try:
            wanted = geo.choose(mine, locators[0].prefix) if listed else {_file_name(one.url) for one in locators}
        except SliceError as error:
            found.changed.append((row["slice"], f"{error.found}; expected {error.expected}"))
            continue
        if gone := sorted(set(wanted) - set(mine)):
            found.vanished.append((row["slice"], f"{gsm} has no {', '.join(gone)}"))
        else:
            found.n_known += 1
    if len(prefixes) > len(rows) and before == len(found.changed):
        found.changed.append((gsm, f"{len(rows)} -> {len(prefixes)} sections: {', '.join(prefixes)}"))


def _file_name(url: str) -> str:
    return unquote(url.rsplit("/", 1)[1])


def write_rows(rows: list[dict[str, str]], path: Path) -> None:
    """Write rows as a table of slices of its own, sorted by name, checked as any table is.

    Raises
    ------
    CatalogueError
        The file is there already, or a row breaks the schema.
    """
    if path.exists():
        raise CatalogueError(
            f"{path}: there already, and rows are written into a file of their own. Next step: name another file, look at it, "
            "and add its rows to your table."
        )
    fresh = path.with_name(path.name + ".new")
    lines = ["\t".join(columns())] + ["\t".join(row.values()) for row in sorted(rows, key=lambda row: row["slice"])]
    fresh.write_text("\n".join(lines) + "\n", encoding="utf-8")
    load_catalogue(fresh)
    os.replace(fresh, path)


def main(argv: list[str] | None = None, pause: float = PAUSE, **manners) -> int:
    """The command: 0 when the source could be asked, 1 with a message when not.

    Parameters
    ----------
    argv
        Arguments of the command line.
    pause
        Seconds between two requests to NCBI.
    manners
        Fields of `workflow.transfer.Manners`.
    """
    parser = argparse.ArgumentParser(prog="python -m workflow.discover", description=__doc__.split("\n")[0])
    parser.add_argument("--source", choices=["cellxgene", "geo"], required=True)
    parser.add_argument(
        "--table", nargs="+", default=["catalogue/visium_human.tsv"], help="tables of slices that are known"
    )
    parser.add_argument("--query", help="cellxgene: words to be found; geo: an Entrez term (default: Visium)")
    parser.add_argument("--series", nargs="+", default=[], help="geo: GSE accessions to look at instead of a search")
    parser.add_argument("--organism", choices=list(ORGANISMS), default="human")
    parser.add_argument("--split", default="train", help="split of the new rows")
    parser.add_argument("--write", type=Path, help="file for the new rows (a new one)")
    parser.add_argument("--mirror", nargs="+", default=[], metavar="https://HOST=URL", help="ask URL in a host's stead")
    given = parser.parse_args(argv)
    if wrong := [gse for gse in given.series if not re.fullmatch(r"GSE\d+", gse)]:
        parser.error(f"--series {wrong[0]}: expected GSE and a number")
    try:
        mirrors = dict(pair.split("=", 1) for pair in given.mirror)
    except ValueError:
        parser.error("--mirror: expected https://host=http://...")
    try:
        table = [row for path in given.table for row in load_catalogue(resolve(path, ROOT))]
        with Client(Manners(hosts=HOSTS, mirrors=mirrors, busy=BUSY, **manners)) as client:
            if given.source == "cellxgene":
                ask = Asking(client, "cellxgene")
                found = discover_cellxgene(ask, table, given.organism, given.query or "", given.split)
            else:
                ask = Asking(client, "geo", pause)
                found = discover_geo(ask, table, given.organism, given.query or "Visium", given.series, given.split)
        if given.write:
            write_rows(found.rows, given.write)
    except (SliceError, CatalogueError) as error:
        print(error, file=sys.stderr)
        return 1
    print(*found.lines(), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
