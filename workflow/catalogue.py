"""The tables of slices and the config: read, check against their schemas, merge roles.

Imports stay light: every dry run loads this module.
"""

from __future__ import annotations

import csv
import difflib
from pathlib import Path

import yaml
from jsonschema import Draft202012Validator

from workflow.errors import CatalogueError

REMOTE = ("http://", "https://")
SCHEMAS = Path(__file__).parent / "schemas"


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
    """Rows of one table of slices, checked.

    Raises
    ------
    CatalogueError
        Missing table, wrong header, a row that breaks the schema (named by line and column), or a slice listed twice.
    """
    path = Path(path)
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
            if other is not row and {row["split"], other["split"]} <= {"train", "val"}:
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
