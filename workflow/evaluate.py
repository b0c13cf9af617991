"""Gather the score tables of all datasets; without datasets a table of the header alone."""

from pathlib import Path

from workflow.score import COLUMNS


def gather(tables: list[str | Path]) -> str:
    """The rows of all tables under one header.

    Raises
    ------
    ValueError
        If a table has another header.
    """
    header, rows = "\t".join(COLUMNS) + "\n", []
    for table in tables:
        lines = Path(table).read_text().splitlines(keepends=True)
        if lines[:1] != [header]:
            raise ValueError(
                f"{table}: found the header {lines[:1]}; expected {header!r}. Next step: rebuild the table."
            )
        rows += lines[1:]
    return header + "".join(rows)


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    Path(snakemake.output[0]).write_text(gather(snakemake.input))
