"""The README's rule graph: what Snakemake prints of a finished demo, without the edges that others imply.

python -m tests.rulegraph DIR    # DIR: working directory of a finished demo; writes the graph into README.md
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.conftest import ROOT

BEGIN, END = "<!-- rulegraph: made by `python -m tests.rulegraph`; a test keeps it current -->", "<!-- /rulegraph -->"


def rulegraph(demo: Path) -> str:
    """Mermaid text of the rules. The demo must have run: before the checkpoint `admit`, later rules aren't known."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--directory", demo, "--nolock"]
    command += ["--rulegraph", "mermaid-js", "--configfile", ROOT / "demo/config.yaml", "--", "all"]
    printed = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout
    name = dict(re.findall(r"(id\d+)\[(\w+)\]", printed))
    edges = {(name[a], name[b]) for a, b in re.findall(r"(id\d+) --> (id\d+)", printed)}
    after: dict[str, set[str]] = {rule: {b for a, b in edges if a == rule} for rule in name.values()}

    def reaches(start: str, goal: str) -> bool:
        return goal in after[start] or any(reaches(rule, goal) for rule in after[start])

    plain = [(a, b) for a, b in edges if not any(reaches(other, b) for other in after[a] - {b})]
    return "\n".join(["flowchart LR", *(f"    {a} --> {b}" for a, b in sorted(plain))])


def embedded(readme: str) -> str:
    """The graph that stands in the README."""
    return re.search(f"{re.escape(BEGIN)}\n```mermaid\n(.*?)\n```\n{re.escape(END)}", readme, re.DOTALL).group(1)


if __name__ == "__main__":
    readme = (ROOT / "README.md").read_text()
    before, after_ = readme[: readme.index(BEGIN)], readme[readme.index(END) :]
    graph = rulegraph(Path(sys.argv[1]))
    (ROOT / "README.md").write_text(f"{before}{BEGIN}\n```mermaid\n{graph}\n```\n{after_}")
