"""The config and the tables of slices are refused with the key, line and remedy named."""

from __future__ import annotations

import copy
import os
import subprocess
import sys

import pytest
import yaml

from tests.conftest import ROOT
from workflow.catalogue import check_config, load_catalogue, load_roles, merge_roles, resolve
from workflow.errors import CatalogueError

HEADER = "slice dataset split source url sha256 format organism labels label_column".split()


def write_table(path, *rows, header=HEADER):
    lines = ["\t".join(header)] + ["\t".join(row.get(name, "") for name in header) for row in rows]
    path.write_text("\n".join(lines) + "\n")
    return path


def row(slice="a", **fields):
    base = {"dataset": "d", "split": "train", "source": "file", "format": "h5ad", "organism": "human"}
    return {"slice": slice, "url": f"{slice}.h5ad", **base, **fields}


@pytest.fixture
def config():
    return yaml.safe_load((ROOT / "config.yaml").read_text())


def test_the_shipped_configs_pass(config):
    check_config(config)
    for overlay in [ROOT / "demo/config.yaml"]:
        merged = copy.deepcopy(config)
        for key, value in yaml.safe_load(overlay.read_text()).items():
            merged[key] = {**merged[key], **value} if isinstance(value, dict) else value
        check_config(merged)


def test_every_key_of_the_schema_stands_in_the_shipped_config(config):
    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
    assert set(schema["properties"]) == set(config) == set(schema["required"])


def test_an_unknown_key_is_named_with_the_nearest_known_one(config):
    config["windwo"] = [8, 8]
    with pytest.raises(CatalogueError, match=r"unknown key 'windwo' \(did you mean 'window'\?\)"):
        check_config(config)


def test_an_unknown_nested_key_is_named_with_its_section(config):
    config["evaluate"]["split"] = 3
    with pytest.raises(CatalogueError, match=r"unknown key 'evaluate.split' \(did you mean 'splits'\?\)"):
        check_config(config)


def test_a_value_of_the_wrong_kind_is_named_by_its_key(config):
    config["window"] = 16
    with pytest.raises(CatalogueError, match="'window': 16 is not of type 'array'"):
        check_config(config)


def test_a_missing_key_is_named(config):
    del config["genes"]
    with pytest.raises(CatalogueError, match="'genes' is a required property"):
        check_config(config)


def test_rows_keep_their_order_and_blank_columns_are_empty_strings(tmp_path):
    rows = load_catalogue(write_table(tmp_path / "t.tsv", row("b"), row("a")))
    assert [r["slice"] for r in rows] == ["b", "a"]
    assert rows[0]["donor"] == ""


def test_a_duplicate_slice_name_is_refused_with_both_lines(tmp_path):
    table = write_table(tmp_path / "t.tsv", row("a"), row("b"), row("a"))
    with pytest.raises(CatalogueError, match=r"line 4: duplicate slice name 'a' \(first on line 2\)"):
        load_catalogue(table)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"slice": "a.b"}, "'slice': 'a.b' does not match"),
        ({"source": "ftp"}, "'source': 'ftp' is not one of"),
        ({"url": ""}, "'url'"),
        ({"sha256": "abc"}, "'sha256': 'abc' does not match"),
        ({"organism": "rat"}, "'organism': 'rat' is not one of"),
    ],
)
def test_a_bad_field_is_named_with_line_and_slice(tmp_path, fields, message):
    table = write_table(tmp_path / "t.tsv", row("ok"), {**row("a"), **fields})
    with pytest.raises(CatalogueError, match=message) as caught:
        load_catalogue(table)
    assert "line 3" in str(caught.value)


@pytest.mark.parametrize("column", ["url", "labels"])
def test_an_address_with_an_unknown_key_is_named_with_line_and_slice(tmp_path, column):
    bad = row("a", source="url", **{"url": "https://h/a.h5ad", column: "https://h/a.h5ad#md4=0"})
    with pytest.raises(CatalogueError, match=r"line 3, slice 'a': address https://h/a.h5ad#md4=0: found 'md4=0'"):
        load_catalogue(write_table(tmp_path / "t.tsv", row("ok"), bad))


def test_an_unknown_column_is_named_with_the_nearest_known_one(tmp_path):
    table = write_table(tmp_path / "t.tsv", row("a"), header=[*HEADER, "tisue"])
    with pytest.raises(CatalogueError, match=r"unknown column 'tisue' \(did you mean 'tissue'\?\)"):
        load_catalogue(table)


def test_a_row_with_too_few_fields_is_refused(tmp_path):
    table = write_table(tmp_path / "t.tsv", row("a"))
    table.write_text(table.read_text() + "b\td\n")
    with pytest.raises(CatalogueError, match="line 3: the number of fields"):
        load_catalogue(table)


def test_a_missing_table_is_named(tmp_path):
    with pytest.raises(CatalogueError, match="no such file"):
        load_catalogue(tmp_path / "nowhere.tsv")


def test_one_slice_may_have_two_roles_when_its_file_is_the_same(tmp_path):
    train = write_table(tmp_path / "train.tsv", row("a"), row("b"))
    test = write_table(tmp_path / "test.tsv", row("a", split="Set", labels="l.tsv", label_column="layer"))
    roles = load_roles([str(train), str(test)], root=tmp_path)
    assert [(r["slice"], r["split"]) for r in roles] == [("a", "train"), ("b", "train"), ("a", "Set")]
    merged = merge_roles(roles)
    assert list(merged) == ["a", "b"]
    assert merged["a"]["label_column"] == "layer"  # filled from the role that has it


def test_one_name_for_two_files_is_refused(tmp_path):
    train = write_table(tmp_path / "train.tsv", row("a"))
    test = write_table(tmp_path / "test.tsv", row("a", split="Set", url="other.h5ad"))
    with pytest.raises(CatalogueError, match="two tables with different files"):
        load_roles([str(train), str(test)], root=tmp_path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"split": "val"}, "trains and validates"), ({"split": "Set", "format": "geo"}, "has format 'geo'")],
)
def test_two_rows_of_a_slice_that_contradict_each_other_are_refused(tmp_path, fields, message):
    train = write_table(tmp_path / "train.tsv", row("a"))
    other = write_table(tmp_path / "other.tsv", row("a", **fields))
    with pytest.raises(CatalogueError, match=message):
        load_roles([str(train), str(other)], root=tmp_path)


def test_relative_paths_resolve_against_the_working_directory_then_the_repository(tmp_path, monkeypatch):
    here, repository = tmp_path / "here", tmp_path / "repository"
    here.mkdir(), repository.mkdir()
    monkeypatch.chdir(here)
    (repository / "x.tsv").touch()
    assert resolve("x.tsv", repository) == str(repository / "x.tsv")
    (here / "x.tsv").touch()
    assert resolve("x.tsv", repository) == "x.tsv"
    assert resolve("https://a.b/x.tsv", repository) == "https://a.b/x.tsv"
    assert resolve("made-later", repository) == "made-later"


def test_places_of_simulated_slices_do_not_depend_on_what_lies_in_the_repository(tmp_path):
    (tmp_path / "resources/a").mkdir(parents=True)
    table = write_table(tmp_path / "t.tsv", row("a", source="simulated", url="resources/a"))
    assert load_roles([str(table)], root=tmp_path)[0]["url"] == "resources/a"


def test_a_reader_of_the_summary_who_has_had_enough_gets_no_traceback():
    """As `python -m workflow.catalogue | head` has."""
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([sys.executable, "-m", "workflow.catalogue"], cwd=ROOT, stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert done.returncode == 1
    assert done.stderr == b""
