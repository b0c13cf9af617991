"""The README's rule graph, as Snakemake prints it.

    python -m tests.rulegraph    # writes it into README.md
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile

from tests.conftest import ROOT

BEGIN, END = "<!-- rulegraph: made by `python -m tests.rulegraph`; a test keeps it current -->", "<!-- /rulegraph -->"


def rulegraph() -> str:
    """Mermaid text of the demo's rules, from a dry run in an empty folder."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", directory]
        command += ["--configfile", ROOT / "demo/config.yaml", "--rulegraph", "mermaid-js", "--", "all"]
        printed = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    lines = printed[printed.index("---") :].rstrip().splitlines() if "---" in printed else printed.rstrip().splitlines()
    return "\n".join(lines)


def embedded(readme: str) -> str:
    """The graph that stands in the README."""
    return re.search(f"{re.escape(BEGIN)}\n```mermaid\n(.*?)\n```\n{re.escape(END)}", readme, re.DOTALL).group(1)


if __name__ == "__main__":
    readme = (ROOT / "README.md").read_text()
    before, after = readme[: readme.index(BEGIN)], readme[readme.index(END) :]
    (ROOT / "README.md").write_text(f"{before}{BEGIN}\n```mermaid\n{rulegraph()}\n```\n{after}")
