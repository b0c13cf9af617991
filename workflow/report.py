"""Bind the figures into one self-contained HTML file: `snakemake --report`, called on the figures that are built.

The nested call shares the outer run's working directory and merged config and only reads, so it takes no lock. It
judges by modification times alone: what it shows is what lies there.
"""

import json
import subprocess
import sys
from pathlib import Path

STYLESHEET = Path(__file__).parent.parent / "rules/captions/report.css"


def command(snakefile: str | Path, config: str | Path, figures: list[str], report: str | Path) -> list[str]:
    """The nested call; no profile of the outer run reaches it."""
    return [
        *(sys.executable, "-m", "snakemake", "--snakefile", str(snakefile), "--configfile", str(config)),
        *("--report", str(report), "--report-stylesheet", str(STYLESHEET)),
        *("--nolock", "--rerun-triggers", "mtime", "--profile", "none", "--workflow-profile", "none"),
        *("--", *figures),
    ]


def build(snakefile: str | Path, config: dict, figures: list[str], report: str | Path, scratch: str | Path) -> None:
    """Write the report; what Snakemake says goes to stderr.

    Raises
    ------
    subprocess.CalledProcessError
        If the nested call fails.
    """
    merged = Path(scratch) / "config.json"
    merged.write_text(json.dumps(config))
    subprocess.run(command(snakefile, merged, figures, report), check=True, stdout=sys.stderr)


if __name__ == "__main__":
    import tempfile

    from workflow.logs import log_to

    log_to(snakemake.log[0])
    with tempfile.TemporaryDirectory() as scratch:
        params, figures = snakemake.params, list(snakemake.input)
        build(params.snakefile, params.config, figures, snakemake.output[0], scratch)
