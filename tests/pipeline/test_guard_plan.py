"""The guard before anything is fetched: what is barred by its ids is not in the plan."""

from __future__ import annotations

import pytest

from tests.pipeline.conftest import snakemake

pytestmark = pytest.mark.pipeline

HEADER = "slice\tdataset\tsplit\tsource\taccession\turl\tformat\torganism"
GEO = "https://ftp.ncbi.nlm.nih.gov/geo/samples"


@pytest.mark.parametrize(("allow", "planned"), [("false", False), ("true", True)])
def test_a_slice_with_an_evaluation_sets_id_is_not_even_fetched(allow, planned, tmp_path):
    rows = [
        f"plain\tmine\ttrain\tgeo\tGSM1\t{GEO}/GSMnnn/GSM1/suppl/\tgeo\thuman",
        f"lymph\tmine\ttrain\tgeo\tGSM8195494\t{GEO}/GSM8195nnn/GSM8195494/suppl/\tgeo\thuman",
    ]
    (tmp_path / "mine.tsv").write_text("\n".join([HEADER, *rows]) + "\n")
    (tmp_path / "none.tsv").write_text(HEADER + "\n")
    (tmp_path / "mine.yaml").write_text(
        f"{{catalogue: mine.tsv, downstream: none.tsv, allow_contamination: {allow}}}\n"
    )
    printed = snakemake("--dry-run", "data", "--configfile", "mine.yaml", directory=tmp_path).stdout
    assert "resources/download/plain/files.json" in printed
    assert ("resources/download/lymph/files.json" in printed) == planned
