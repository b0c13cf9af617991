"""Foreign files spoiled and read: ``python -m tests.fuzz.campaign [--examples 300] [--targets MEX ...] [--write docs/reliability.md]``.

Of each target (tests/fuzz/targets.py) hypothesis draws so many inputs. The second table is what becomes of the bad slices of
tests/unit/test_bad_slices.py. Exit code 1 where an answer was wrong.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import anndata
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.fuzz.cage import Outcome
from tests.fuzz.mutate import PAYLOADS
from tests.fuzz.targets import TARGETS, Target
from tests.unit.simulated import GENE_TABLES, row
from tests.unit.test_bad_slices import BAD, forty_genes
from workflow.curate import curate_or_reject
from workflow.keys import Keys

PLACE = st.floats(0, 1, exclude_max=True)
STEPS = st.lists(
    st.tuples(st.integers(0, 99), PLACE, st.sampled_from(PAYLOADS) | st.text(max_size=8)), min_size=1, max_size=3
)


def campaign(
    target: Target, folder: Path, examples: int, fixed: bool, note: Callable[[Outcome], None] | None = None
) -> None:
    """Read ``examples`` spoiled deposits; AssertionError with the smallest one that found no right answer.

    Parameters
    ----------
    fixed
        The same inputs every time.
    note
        Told each outcome, instead of the error.
    """

    @settings(
        max_examples=examples,
        derandomize=fixed,
        database=None,
        deadline=None,  # the cage has one of its own
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(victim=PLACE, steps=STEPS, mend=st.booleans())
    def answered(victim, steps, mend):
        outcome = target.run(folder, victim, steps, mend)
        if note:
            if outcome.kind not in answers(target):  # what to give to `target.run` to see it again
                outcome = dataclasses.replace(outcome, detail=f"{outcome.detail} ({victim!r}, {steps!r}, {mend!r})")
            note(outcome)
        else:
            assert outcome.kind in answers(target), f"{outcome.kind}: {outcome.detail}"

    answered()


def answers(target: Target) -> set[str]:
    """Kinds of outcome that are as they should be."""
    return {"right", "typed"} | ({"memory", "crash"} if target.contained else set())


def tally(target: Target, examples: int) -> tuple[list[object], list[str]]:
    """A row of the table, and what was answered wrongly."""
    outcomes: list[Outcome] = []
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        campaign(target, Path(folder), examples, False, outcomes.append)
    kinds = Counter(outcome.kind for outcome in outcomes)
    codes = Counter(outcome.detail for outcome in outcomes if outcome.kind == "typed")
    wrong = {f"{target.name}: {o.kind}: {o.detail}" for o in outcomes if o.kind not in answers(target)}
    bad = sum(outcome.kind not in answers(target) for outcome in outcomes)
    errors = ", ".join(f"{code} {n}" for code, n in codes.most_common())
    slowest, took = max(outcome.seconds for outcome in outcomes), time.perf_counter() - begin
    contained = [kinds[kind] if target.contained else "" for kind in ("memory", "crash")]
    row = [target.name, len(outcomes), kinds["right"], kinds["typed"], *contained, bad]
    return [*row, f"{slowest:.1f}", f"{took:.0f}", errors], sorted(wrong)


def bad_slices() -> Iterable[list[object]]:
    """Each bad slice, its code and what was found."""
    for what, bad in BAD.items():
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "out.h5ad"
            url = str(Path(folder) / bad.make(forty_genes(), Path(folder)))
            curate_or_reject(out, row(url=url), GENE_TABLES)
            reason = anndata.read_h5ad(out).uns[Keys.STPATCH][Keys.QUARANTINE]
        found = reason["found"].replace("|", "\\|")
        yield [what, f"`{reason['code']}`", found if len(found) < 130 else found[:127] + "..."]


def as_table(header: list[str], rows: Iterable[list[object]]) -> str:
    """Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main() -> int:
    """Command line: see the module's first lines."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.campaign", description=main.__doc__)
    parser.add_argument("--examples", type=int, default=300, metavar="N", help="inputs of each target (default 300)")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="only these; nothing is written then")
    parser.add_argument("--write", type=Path, help="page that holds the tables, between their marks")
    given = parser.parse_args()
    logging.getLogger("curate").setLevel(logging.CRITICAL)
    rows, wrong = [], []
    for target in TARGETS:
        if not given.targets or target.name in given.targets:
            tallied, answered_wrongly = tally(target, given.examples)
            rows.append(tallied)
            wrong += answered_wrongly
            print(*tallied, sep=" | ", flush=True)
    header = [
        "read as",
        "inputs",
        "right",
        "typed error",
        "memory cap",
        "crash",
        "wrong",
        "slowest, s",
        "all, s",
        "errors",
    ]
    tables = {"fuzz": as_table(header, rows)}
    if not given.targets:
        tables["bad slices"] = as_table(["slice", "code", "found"], bad_slices())
    if given.write and not given.targets:
        page = given.write.read_text(encoding="utf-8")
        for mark, table in tables.items():
            head, rest = page.split(f"<!-- {mark} -->\n", 1)
            page = f"{head}<!-- {mark} -->\n{table}\n<!-- /{mark} -->{rest.split(f'<!-- /{mark} -->', 1)[1]}"
        given.write.write_text(page, encoding="utf-8")
    print(*wrong, sep="\n\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
