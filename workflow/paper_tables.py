"""The paper's own figures, Tables 1-7, as data, with what is inconsistent among them.

`catalogue/aux/paper_scores.tsv`: `table, dataset, method, head, metric, value, note`; `note` names rows of
`catalogue/aux/paper_notes.tsv`, parted by commas. Wherever a figure is shown it is labelled as the paper's and its
notes stand below: nothing here was measured by stpatch.

Methods are `raw`, `scgpt`, `scgpt_spatial`, `stofm`, and for the paper's encoder `patch_{window}` (Tables 1, 3, 4, 7),
`channels_{genes}` (5), `selection_{kind}` (6). Table 7's head is `window{W}_side{S}`, of scgpt_spatial `side{S}`.
"""

from functools import cache
from pathlib import Path

import pandas as pd

TABLES = Path(__file__).parent.parent / "catalogue/aux"
RECOMMENDED = "patch_16"  # the setting that the paper recommends


@cache
def _read(name: str) -> pd.DataFrame:
    return pd.read_csv(TABLES / name, sep="\t", keep_default_na=False)


def paper_scores(**where) -> pd.DataFrame:
    """Rows of the paper's tables, those whose columns have the given values, such as `table=4` or `dataset="DLPFC"`.

    Returns
    -------
    DataFrame
        `table` (int), `dataset`, `method`, `head`, `metric`, `value` (float), `note`; in the order of the paper.
    """
    rows = _read("paper_scores.tsv")
    for column, value in where.items():
        rows = rows[rows[column] == value]
    return rows.copy()


def footnotes(rows: pd.DataFrame) -> dict[str, str]:
    """What is inconsistent about these rows of `paper_scores`: note -> sentence, in the order of the table of notes."""
    named = {note for notes in rows["note"] for note in notes.split(",")}
    texts = _read("paper_notes.tsv").set_index("note")["text"]
    return {note: text for note, text in texts.items() if note in named}
