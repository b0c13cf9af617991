"""What the files of a source were when they were first seen, so that a change is noticed and never taken silently.

A download records size and sha256 of every file that it fetches in `resources/lock/{slice}.tsv`, and holds later downloads to
it. Whoever keeps a table of slices gathers these records and ships them:

    python -m workflow.lock catalogue/visium_human.tsv

writes `catalogue/aux/visium_human.lock.tsv` (below the working directory), sorted, old lines kept. Every `*.lock.tsv` of
`catalogue/aux`, in the working directory and in the repository, is enforced where a url has a line.
"""

import argparse
import csv
import io
import json
from dataclasses import astuple, dataclass, fields
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path

from workflow.catalogue import load_catalogue
from workflow.errors import CatalogueError
from workflow.transfer import Pin, digest_of, write

ROOT = Path(__file__).resolve().parents[1]
SEEN = Path("resources/lock")  # one table a slice: its jobs run side by side


@dataclass(frozen=True, order=True)
class Line:
    """One file as it was first seen; `url` carries `#member=` for a member of a remote tar."""

    slice: str
    url: str
    bytes: int
    sha256: str
    first_seen: str  # date


COLUMNS = [field.name for field in fields(Line)]


def read_lock(path: Path) -> list[Line]:
    """Lines of a lock table.

    Raises
    ------
    CatalogueError
        Another header, or a line that is not of its form.
    """
    with open(path, newline="", encoding="utf-8") as table:
        rows = list(csv.reader(table, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or rows[0] != COLUMNS or not all(len(row) == len(COLUMNS) and row[2].isdigit() for row in rows[1:]):
        raise CatalogueError(
            f"lock table {path}: found {rows[:1]} or a line of another form; expected the columns {', '.join(COLUMNS)}. "
            "Next step: restore it from the repository, or delete it to record what is seen next."
        )
    return [Line(name, url, int(size), sha256, seen) for name, url, size, sha256, seen in rows[1:]]


def write_lock(path: Path, lines: list[Line]) -> None:
    """Write a lock table, sorted."""
    text = io.StringIO()
    table = csv.writer(text, delimiter="\t", quoting=csv.QUOTE_NONE, lineterminator="\n", quotechar=None)
    table.writerow(COLUMNS)
    table.writerows(astuple(line) for line in sorted(lines))
    write(path, text.getvalue().encode())


class Lock:
    """What binds the downloads of one slice: the shipped tables and its own record, which grows with `add`.

    Parameters
    ----------
    slice
        Its name.
    record
        Its own table; made when the first file is added.
    tables
        Those that are enforced besides.
    """

    def __init__(self, slice: str, record: Path, tables: list[Path]) -> None:
        self.slice, self.record, self.tables = slice, Path(record), tables

    # Read when first asked for: by then the job before, which may just have written it, is through (`workflow.download`).
    @cached_property
    def own(self) -> list[Line]:
        return read_lock(self.record) if self.record.is_file() else []

    @cached_property
    def known(self) -> list[tuple[Line, Path]]:
        return [(line, path) for path in self.tables for line in read_lock(path)] + [
            (line, self.record) for line in self.own
        ]

    def pins(self, url: str) -> tuple[Pin, ...]:
        """The digests that a url must have."""
        found = {}
        for line, path in self.known:
            if line.url == url:
                found.setdefault(line.sha256, Pin("sha256", line.sha256, str(path), line.first_seen))
        return tuple(found.values())

    def urls(self, beginning: str) -> list[str]:
        """Urls of this slice that begin so."""
        return sorted(
            {line.url for line, _ in self.known if line.slice == self.slice and line.url.startswith(beginning)}
        )

    def add(self, url: str, size: int, sha256: str) -> None:
        """Record a file that was fetched and held; one that is known already is left as it is."""
        if any(line.url == url and line.sha256 == sha256 for line in self.own):
            return
        line = Line(self.slice, url, size, sha256, datetime.now(UTC).date().isoformat())
        self.known.append((line, self.record))
        self.own.append(line)
        write_lock(self.record, self.own)

    @property
    def _outcome(self) -> Path:
        return self.record.with_suffix(".json")

    def keep(self, row: dict[str, str], files: list[dict]) -> None:
        """Note what a whole download of a row gave: the entries of files.json."""
        write(self._outcome, json.dumps({"row": row, "files": files}).encode())

    def kept(self, row: dict[str, str]) -> list[dict]:
        """What the last download gave, if it was of this row, nothing pins other bytes, and all of it is still there."""
        noted = json.loads(self._outcome.read_text()) if self._outcome.is_file() else {}
        pinned = all(pin.digest == line.sha256 for line in self.own for pin in self.pins(line.url))
        if noted.get("row") != row or not pinned:
            return []
        paths = {Path(entry["path"]): entry["sha256"] for entry in noted["files"]}
        return noted["files"] if all(path.is_file() and digest_of(path) == paths[path] for path in paths) else []


def shipped() -> list[Path]:
    """Every lock table of the working directory and of the repository."""
    folders = {Path("catalogue/aux").resolve(), ROOT / "catalogue/aux"}
    return sorted(path for folder in folders for path in folder.glob("*.lock.tsv"))


def merge(table: Path, seen: Path = SEEN, out: Path | None = None) -> tuple[Path, int, list[str]]:
    """Gather the records of a table's slices into its lock table.

    Returns
    -------
    path, added, differences
        The lock table; how many lines are new; lines where a record contradicts it (kept as they were).
    """
    out = out or Path("catalogue/aux") / f"{table.stem}.lock.tsv"
    lines = {line.url: line for line in (read_lock(out) if out.is_file() else [])}
    before, differences = len(lines), []
    for row in load_catalogue(table):
        record = seen / f"{row['slice']}.tsv"
        for line in read_lock(record) if record.is_file() else []:
            kept = lines.setdefault(line.url, line)
            if kept.sha256 != line.sha256:
                differences.append(
                    f"{line.url}: {kept.bytes} bytes, sha256 {kept.sha256}, first seen {kept.first_seen}; "
                    f"now {line.bytes} bytes, sha256 {line.sha256}, seen {line.first_seen}"
                )
    write_lock(out, list(lines.values()))
    return out, len(lines) - before, differences


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m workflow.lock", description="Gather what downloads recorded.")
    parser.add_argument("table", type=Path, nargs="+", help="tables of slices, such as catalogue/visium_human.tsv")
    status = 0
    for table in parser.parse_args().table:
        path, added, differences = merge(table)
        print(f"{path}: {added} lines added")
        for difference in differences:
            print(f"  differs: {difference}")
            status = 1
    return status


if __name__ == "__main__":
    raise SystemExit(main())
