"""The tables of slices and the config: read, check against their schemas, merge roles, count, find what stands there twice.

``python -m workflow.catalogue [TABLE ...]`` prints what tables hold and fails where two rows are one slice, or where a slice to
pretrain on is one of an evaluation set. Imports stay light: every dry run loads this module.
"""

from __future__ import annotations

import argparse
import csv
import difflib
import os
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator

from workflow.errors import CatalogueError
from workflow.locators import parse

REMOTE = ("http://", "https://")
SCHEMAS = Path(__file__).parent / "schemas"
ROOT = Path(__file__).parent.parent
TABLES = [ROOT / "catalogue" / f"{name}.tsv" for name in ("visium_human", "visium_mouse", "downstream")]
PRETRAINED = ("train", "val")
IDS = ROOT / "catalogue" / "aux" / "evaluation_ids.tsv"
UUID = r"\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b"


def check_config(config: dict, schema: Path = SCHEMAS / "config.schema.yaml") -> None:
    """Refuse a config that breaks the schema.

    Raises
    ------
    CatalogueError
        Names every wrong key and, for an unknown one, the nearest known key.
    """
    validator = Draft202012Validator(yaml.safe_load(Path(schema).read_text()))
    problems = [_explain(error) for error in sorted(validator.iter_errors(config), key=lambda e: list(e.path))]
    if problems:
        raise CatalogueError("config: " + "; ".join(problems) + f". Every key is described in {Path(schema).name}.")


def _explain(error) -> str:
    where = ".".join(str(part) for part in error.absolute_path)
    if error.validator == "additionalProperties":
        known = list(error.schema.get("properties", {}))
        unknown = [key for key in error.instance if key not in known]
        hints = []
        for key in unknown:
            near = difflib.get_close_matches(str(key), known, n=1)
            hints.append(
                f"unknown key '{where + '.' if where else ''}{key}'" + (f" (did you mean '{near[0]}'?)" if near else "")
            )
        return ", ".join(hints)
    return f"'{where or '(top level)'}': {error.message}"


def resolve(path: str, root: Path) -> str:
    """A relative path against the working directory, then the repository; unchanged if it is in neither."""
    if path.startswith(REMOTE) or Path(path).is_absolute() or Path(path).exists():
        return path
    in_repository = Path(root) / path
    return str(in_repository) if in_repository.exists() else path


def columns() -> list[str]:
    """Columns of a table of slices, in order."""
    return list(yaml.safe_load((SCHEMAS / "catalogue.schema.yaml").read_text())["properties"])


def load_catalogue(path: str | Path) -> list[dict[str, str]]:
    """Rows of one table of slices, checked (`_load`)."""
    try:
        return _load(Path(path))
    except (UnicodeDecodeError, csv.Error) as error:
        raise CatalogueError(
            f"catalogue {path}: found {error}; expected tab-separated text in UTF-8. Next step: save it as such."
        ) from error


def _load(path: Path) -> list[dict[str, str]]:
    """The rows.

    Raises
    ------
    CatalogueError
        Missing table, wrong header, a row that breaks the schema (named by line and column), an address that cannot be read
        (`workflow.locators.parse`), or a slice listed twice.
    """
    if not path.is_file():
        raise CatalogueError(
            f"catalogue {path}: no such file. Next step: check `catalogue` and `downstream` in the config."
        )
    schema = yaml.safe_load((SCHEMAS / "catalogue.schema.yaml").read_text())
    columns = list(schema["properties"])
    validator = Draft202012Validator(schema)
    rows, seen = [], {}
    with open(path, newline="", encoding="utf-8") as table:
        reader = csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE)
        header = reader.fieldnames or []
        unknown = [name for name in header if name not in columns]
        missing = [name for name in schema["required"] if name not in header]
        if unknown or missing:
            hints = [f"unknown column '{name}'{_near(name, columns)}" for name in unknown]
            hints += [f"missing column '{name}'" for name in missing]
            raise CatalogueError(f"catalogue {path}: {', '.join(hints)}; expected the columns {', '.join(columns)}.")
        for raw in reader:
            number = reader.line_num
            if None in raw or None in raw.values():
                raise CatalogueError(
                    f"catalogue {path}, line {number}: the number of fields is not that of the header ({len(header)})."
                )
            row = {name: (raw.get(name) or "").strip() for name in columns}
            for error in validator.iter_errors(row):
                raise CatalogueError(f"catalogue {path}, line {number}, slice {row['slice']!r}: {_explain(error)}.")
            for address in [*row["url"].split(), row["labels"]]:
                if address.startswith(REMOTE):
                    try:
                        parse(address)
                    except CatalogueError as error:
                        raise CatalogueError(
                            f"catalogue {path}, line {number}, slice {row['slice']!r}: {error}"
                        ) from None
            if row["slice"] in seen:
                raise CatalogueError(
                    f"catalogue {path}, line {number}: duplicate slice name {row['slice']!r} (first on line "
                    f"{seen[row['slice']]}); expected unique names. Next step: rename or remove one of the rows."
                )
            seen[row["slice"]] = number
            rows.append(row)
    return rows


def _near(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean '{near[0]}'?)" if near else ""


def load_roles(tables: list[str], root: Path) -> list[dict[str, str]]:
    """Rows of all tables: one a (slice, split).

    Raises
    ------
    CatalogueError
        A name in two tables that does not mean one slice (same url or sha256, format and organism), or a slice that
        would both train and validate.
    """
    roles, first = [], {}
    for table in tables:
        for row in load_catalogue(resolve(table, root)):
            if row["source"] != "simulated":  # made below the working directory, wherever that is
                row["url"] = " ".join(resolve(url, root) for url in row["url"].split())
                row["labels"] = row["labels"] and resolve(row["labels"], root)
            other = first.setdefault(row["slice"], row)
            same = row["url"] == other["url"] or (row["sha256"] and row["sha256"] == other["sha256"])
            if not same:
                raise CatalogueError(
                    f"catalogue {table}: slice {row['slice']!r} stands in two tables with different files "
                    f"({other['url']} and {row['url']}); expected one url or sha256. Next step: rename one of the two."
                )
            for name in ("format", "organism"):
                if row[name] != other[name]:
                    raise CatalogueError(
                        f"catalogue {table}: slice {row['slice']!r} has {name} {row[name]!r} here and {other[name]!r} in "
                        f"another table; expected the same. Next step: correct one of the two."
                    )
            if other is not row and {row["split"], other["split"]} <= set(PRETRAINED):
                raise CatalogueError(
                    f"catalogue {table}: slice {row['slice']!r} is {row['split']!r} here and {other['split']!r} in another "
                    "table; expected one of the two. Next step: remove one row, so that no slice trains and validates."
                )
            roles.append(row)
    return roles


def merge_roles(roles: list[dict[str, str]]) -> dict[str, dict[str, str]]:
    """One row a slice: blanks of its first role are filled from its others (labels stand in the evaluation table)."""
    slices: dict[str, dict[str, str]] = {}
    for row in roles:
        kept = slices.setdefault(row["slice"], dict(row))
        for name, value in row.items():
            if not kept[name]:
                kept[name] = value
    return slices


def label_maps(roles: list[dict[str, str]], root: Path) -> dict[str, str]:
    """The table that maps the raw labels of a slice's evaluation set, ``catalogue/aux/labels_{set}.tsv``, of slices that have one."""
    labelled = [row for row in roles if row["split"] not in PRETRAINED and row["label_column"]]
    tables = {name: resolve(f"catalogue/aux/labels_{name}.tsv", root) for name in {row["split"] for row in labelled}}
    there = {name for name, path in tables.items() if Path(path).exists()}
    return {row["slice"]: tables[row["split"]] for row in reversed(labelled) if row["split"] in there}


def identities(row: dict[str, str]) -> dict[str, set[str]]:
    """The public ids in a row, by the kinds of ``catalogue/aux/evaluation_ids.tsv``.

    10x names without case and punctuation, so that releases and spellings of one dataset are one; of CELLXGENE all ids that
    the row gives (dataset, version, collection) under either kind.
    """
    told = " ".join(row.get(name, "") for name in ("slice", "dataset", "accession", "url"))
    names = re.findall(r"/(?:samples/spatial-exp/[^/\s]+|10x_genomics)/([^/\s]+)/", row["url"])
    names += [row["accession"]] if row["source"] == "10x" else []
    uuids = set(re.findall(UUID, told))
    return {
        "gsm": set(re.findall(r"GSM\d+(?![\dn])", told)),
        "gse": set(re.findall(r"GSE\d+(?![\dn])", told)),
        "10x_name": {_bare(name) for name in names} - {""},
        "zenodo": set(re.findall(r"zenodo(?::|\.org/(?:api/)?records?/|\.)(\d+)", told)),
        "cellxgene_dataset": uuids,
        "cellxgene_collection": uuids,
        "dlpfc_sample": set(re.findall(r"(?<![0-9A-Za-z])151[56]\d\d(?!\d)", told)),
    }


def _bare(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def repeated(rows: list[dict[str, str]]) -> list[tuple[str, str, str]]:
    """Pairs of rows that are one slice: (slice, slice, what both have): GSM, 10x name, CELLXGENE dataset, file or its sha256.

    One GSM may hold several sections: rows that name them apart by ``prefix`` or ``member`` are different slices.
    """
    first: dict[tuple[str, ...], str] = {}
    found = []
    for row in rows:
        known, keys = identities(row), []
        locators = [parse(address) for address in row["url"].split()]
        part = " ".join(dict.fromkeys(" ".join((locator.prefix, *locator.members)) for locator in locators)).strip()
        keys += [("GSM", gsm, part) for gsm in known["gsm"]]
        keys += [("10x name", name) for name in known["10x_name"]]
        keys += [("dataset id", uuid) for uuid in re.findall(UUID, f"{row['accession']} {row['url']}")]
        keys += [("url", locator.url.removesuffix("?download=1"), part) for locator in locators]
        keys += [("sha256", digest) for digest in row["sha256"].split()[:1] if not part]
        for key in dict.fromkeys(keys):
            other = first.setdefault(key, row["slice"])
            if other != row["slice"]:
                found.append((other, row["slice"], " ".join(key).strip()))
    return found


def load_ids(path: Path = IDS) -> list[dict[str, str]]:
    """Rows of the table of known ids of evaluation slices (docs/catalogue.md)."""
    with open(path, newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table, delimiter="\t", quoting=csv.QUOTE_NONE))


def contaminated(rows: list[dict[str, str]], ids: list[dict[str, str]]) -> list[tuple[str, dict[str, str]]]:
    """Rows to pretrain on that carry an id of an evaluation set, of a sibling section or of a suspected one: (slice, id's row)."""
    found = []
    for row in rows:
        if row["split"] in PRETRAINED:
            known = identities(row)
            for entry in ids:
                wanted = _bare(entry["id"]) if entry["kind"] == "10x_name" else entry["id"]
                if wanted in known[entry["kind"]]:
                    found.append((row["slice"], entry))
    return found


def summary(rows: list[dict[str, str]]) -> list[str]:
    """Lines of text: slices, spots by the sources' own figures, and slices per split, source, organ and licence."""
    figures = [int(row["spots"]) for row in rows if row["spots"]]
    lines = [f"{len(rows)} slices, {sum(figures):,} spots by the sources' figures (given for {len(figures)} slices)"]
    for name in ("split", "source", "tissue", "licence"):
        counts: Counter[str] = Counter(re.sub(r" \(.*", "", row[name]) or "not given" for row in rows)
        spots: dict[str, int] = defaultdict(int)
        for row in rows:
            spots[re.sub(r" \(.*", "", row[name]) or "not given"] += int(row["spots"] or 0)
        for value, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])):
            lines.append(f"  {name:8} {value:32} {n:5} slices {spots[value]:10,} spots")
    return lines


def main(arguments: list[str] | None = None) -> int:
    """Print what the tables hold; 1 where a slice stands twice or an evaluation slice is to be pretrained on."""
    parser = argparse.ArgumentParser(prog="python -m workflow.catalogue", description=main.__doc__)
    parser.add_argument("tables", nargs="*", type=Path, default=TABLES, metavar="TABLE", help="default: those shipped")
    parser.add_argument("--ids", type=Path, default=IDS, help="known ids of evaluation slices")
    given = parser.parse_args(arguments)
    wrong = 0
    for table in given.tables:
        rows = load_catalogue(table)
        print(f"{table}: {summary(rows)[0]}", *summary(rows)[1:], sep="\n")
        twice, evaluated = repeated(rows), contaminated(rows, load_ids(given.ids))
        for a, b, what in twice:
            print(f"  twice: {a} and {b} are one slice ({what}); remove one row")
        for slice, entry in evaluated:
            print(
                f"  evaluation slice: {slice} is {entry['relation']} as {entry['set']} ({entry['kind']} {entry['id']}); remove the row"
            )
        if not twice and not evaluated:
            print("  no slice stands twice; none to pretrain on is an evaluation slice")
        wrong += len(twice) + len(evaluated)
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read had enough, such as `head`; Python flushes once more at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
