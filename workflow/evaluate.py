"""Gather the tables of all datasets; without datasets tables of the header alone."""

from pathlib import Path

from workflow.assemble import COLUMNS, NOTES
from workflow.intervals import COMPARISONS


def gather(tables: list[str | Path], columns: list[str]) -> str:
    """The rows of all tables under one header.

    Raises
    ------
    ValueError
        If a table has another header.
    """
    header = "\t".join(columns) + "\n"
    return header + "".join(row for table in tables for row in _rows(table, header))


def gather_notes(tables: list[str | Path]) -> str:
    """The notes of all stages under one header, each after its dataset and stage, which the path names."""
    header, rows = "\t".join(NOTES) + "\n", []
    for path in map(Path, tables):
        stage = path.name.removesuffix(".notes.tsv")
        rows += [f"{path.parent.name}\t{stage}\t{row}" for row in _rows(path, header)]
    return f"dataset\tstage\t{header}" + "".join(rows)


def _rows(table: str | Path, header: str) -> list[str]:
    lines = Path(table).read_text().splitlines(keepends=True)
    if lines[:1] != [header]:
        raise ValueError(f"{table}: found the header {lines[:1]}; expected {header!r}. Next step: rebuild the table.")
    return lines[1:]


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, output = snakemake.input, snakemake.output
    Path(output.scores).write_text(gather(given.scores, COLUMNS))
    Path(output.notes).write_text(gather_notes(given.notes))
    Path(output.comparisons).write_text(gather(given.comparisons, COMPARISONS))
