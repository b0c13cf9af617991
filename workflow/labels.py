"""Labels of a slice's spots, from a table beside it or a column of its own file, spelled as the evaluation set's map has them."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd

from workflow.errors import BadLabels, MissingFile
from workflow.readers.deposit import Deposit, open_text, reading

UNLABELLED = {"", "na", "nan", "none", "null"}
OTHERS = "*"  # the map's row for all strings that it doesn't list: they stay as they are


def spot_labels(
    slice: str, deposit: Deposit, column: str, path: Path | None, label_map: Path | None = None
) -> pd.Categorical:
    """Label of each spot [spots], NaN where there is none.

    The keys of a table are its column whose values meet most of the slice's spots (for R exports, one short in the header,
    the row names): as they are; where none meets, without the ``-1`` suffixes; then as bare barcodes, where one prefix
    (``s1_``) stands before all; else its columns ``x`` and ``y``, rounded, are array column and row (her2st).

    Parameters
    ----------
    slice
        Name of the slice, for messages.
    deposit
        The slice as read.
    column
        The column that holds the labels, or several parted by ``|``: the first that there is.
    path
        The table (TSV or CSV, gzipped or not); None: the slice's own file.
    label_map
        Table (TSV) with the columns ``raw`` and ``label``, a blank label for spots that count as unlabelled; None: raw strings
        are the labels.

    Raises
    ------
    MissingFile, Unreadable
    BadLabels
        No such column, no key in common, two labels for one spot, or a raw string that the map lacks.
    """

    def bad(found: str, expected: str) -> BadLabels:
        return BadLabels(
            slice=slice,
            file=str(path or deposit.file),
            found=found,
            expected=expected,
            next_step="correct labels and label_column in the catalogue, or leave both blank to use the slice unlabelled",
        )

    if path is None:
        table = deposit.obs
    else:
        if not path.is_file():
            raise MissingFile(
                slice=slice,
                file=str(path),
                found="no such file",
                expected="the table of labels",
                next_step="check the column labels in the catalogue",
            )
        with reading(slice, path):
            with open_text(path) as file:
                separator = "\t" if "\t" in file.readline() else ","
            with open_text(path) as file:
                table = pd.read_csv(file, sep=separator, dtype=str, keep_default_na=False)
    named = [name for name in column.split("|") if name in table]
    if not named:
        listed = ", ".join(map(str, table.columns[:12])) or "none"
        raise bad(f"the columns {listed}", f"a column {' or '.join(map(repr, column.split('|')))}")
    column = named[0]
    if path is None:
        values = table[column].reset_index(drop=True)
    else:
        keys, wanted = _keys(table, deposit)
        if not keys.isin(wanted).any():
            raise bad(
                f"none of the slice's {len(wanted)} spots among its {len(keys)} rows", "rows of barcodes, or of x and y"
            )
        values = pd.Series(table[column].to_numpy(dtype=object), index=keys)
        values = values[keys.isin(wanted)]
        values = values[~pd.DataFrame({"key": values.index, "value": values.to_numpy()}).duplicated().to_numpy()]
        if not values.index.is_unique:
            twice = values.index[values.index.duplicated()]
            raise bad(f"{len(twice)} spots with two labels, such as {twice[0]}", "one label a spot")
        values = values.reindex(wanted)
    texts = values.astype(object).where(values.notna(), "").astype(str).str.strip()
    if label_map is not None:
        texts = _mapped(texts, label_map, bad)
    if texts.str.contains("\0", regex=False).any():
        raise bad(f"NUL characters in column {column!r}", "text")
    known = ~texts.str.lower().isin(UNLABELLED)
    if not (known.to_numpy() & deposit.in_tissue).any():
        raise bad(f"no label in column {column!r} on any spot in tissue", "labels")
    return pd.Categorical(np.where(known, texts, None), categories=sorted(texts[known].unique()))


def _mapped(texts: pd.Series, label_map: Path, bad) -> pd.Series:
    """Each text's label by the map; what the map lacks is an error, never a class of its own."""
    try:
        with open(label_map, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except (UnicodeDecodeError, csv.Error) as error:
        raise bad(f"{label_map}, which is no table ({error})", "the columns raw and label") from error
    if any(None in (row.get("raw"), row.get("label")) for row in rows):
        raise bad(f"rows of {label_map} without the columns raw and label", "both in each row")
    labels = {row["raw"]: row["label"] for row in rows}
    unlabelled = texts.str.lower().isin(UNLABELLED)
    unknown = sorted(set(texts[~unlabelled]) - set(labels))
    if unknown and OTHERS not in labels:
        some = ", ".join(map(repr, unknown[:5]))
        raise bad(f"the raw labels {some} ({len(unknown)} in all)", f"those that {label_map} lists; add a row for each")
    return texts.map({text: labels.get(text, text) for text in set(texts)}).where(~unlabelled, "")


def _keys(table: pd.DataFrame, deposit: Deposit) -> tuple[pd.Index, pd.Index]:
    """The table's key of each row, and the key of each spot in the same form."""
    spots = pd.Index(deposit.spots)
    columns = [pd.Index(table.index.astype(str))] + [pd.Index(table[name].astype(str)) for name in table]
    for form in (lambda keys: keys, _bare, _barcodes):
        wanted, found = form(spots), [form(keys) for keys in columns]
        best = max(found, key=lambda keys: keys.isin(wanted).sum())
        if best.isin(wanted).any() and wanted.is_unique:
            return best, wanted
    if {"x", "y"} <= set(table.columns) and deposit.array is not None:
        x, y = (pd.to_numeric(table[name], errors="coerce").round() for name in ("x", "y"))
        row, col = deposit.array.T
        return _site(x, y), _site(pd.Series(col), pd.Series(row))
    return columns[0], spots


def _bare(keys: pd.Index) -> pd.Index:
    return pd.Index(pd.Series(keys, dtype=object).str.replace(r"-\d+$", "", regex=True))


def _barcodes(keys: pd.Index) -> pd.Index:
    """What follows the one prefix that all keys have; the keys as they are where prefixes differ, as of two sections in one table."""
    parts = pd.Series(keys, dtype=object).str.extract(r"^(.*?)([ACGT]{14,64})(?:-\d+)?$")
    return pd.Index(parts[1]) if parts[0].nunique(dropna=False) == 1 and parts[1].notna().all() else keys


def _site(x: pd.Series, y: pd.Series) -> pd.Index:
    return pd.Index([f"{a:.0f}x{b:.0f}" for a, b in zip(x, y, strict=True)], dtype=object)
