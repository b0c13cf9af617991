"""Discover against a server on loopback that answers as CELLXGENE and GEO are documented to; all data in it is made up."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

import pytest

from workflow import geo
from workflow.catalogue import columns, load_catalogue
from workflow.discover import API, EUTILS, FILES, main, terms

DATASET = "00000000-0000-4000-8000-00000000000{}"
VERSION = "00000000-0000-4000-9000-00000000000{}"
COLLECTION = "00000000-0000-4000-a000-000000000001"
V1, MM11 = ("EFO:0022857", "Visium Spatial Gene Expression V1"), ("EFO:0022860", "Visium CytAssist 11mm")
MEX = ("matrix.mtx.gz", "barcodes.tsv.gz", "features.tsv.gz", "tissue_positions_list.csv.gz")


def term(identifier: str, label: str, **more) -> dict:
    return {"ontology_term_id": identifier, "label": label} | more


def record(number: int, **changes) -> dict:
    """A dataset as `GET /datasets` lists it."""
    version = VERSION.format(number)
    return {
        "dataset_id": DATASET.format(number),
        "dataset_version_id": version,
        "collection_id": COLLECTION,
        "collection_name": "Made up",
        "collection_doi": "10.0000/made-up",
        "title": f"Section {number}",
        "schema_version": "7.0.0",
        "cell_count": 4992,
        "feature_count": 35477,
        "assay": [term(*V1)],
        "tissue": [term("UBERON:0000310", "breast", tissue_type="tissue")],
        "organism": [term("NCBITaxon:9606", "Homo sapiens")],
        "disease": [term("PATO:0000461", "normal")],
        "suspension_type": ["na"],
        "is_primary_data": [True],
        "donor_id": ["P1"],
        "embeddings": ["spatial"],
        "spatial": {"is_single": True, "has_fullres": False},
        "assets": [
            {"filetype": "RDS", "filesize": 1, "url": f"{FILES}/{version}.rds"},
            {"filetype": "H5AD", "filesize": 1000 + number, "url": f"{FILES}/{version}.h5ad"},
        ],
    } | changes


def table(path, *rows: dict) -> str:
    """A table of slices with these rows."""
    blank = dict.fromkeys(columns(), "") | {"split": "train", "organism": "human", "dataset": "made up"}
    lines = ["\t".join(columns()), *("\t".join((blank | row).values()) for row in rows)]
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def run(
    server, tmp_path, capsys, *arguments: str, rows: tuple = (), known: str = "known.tsv"
) -> tuple[int, list[str], str]:
    """Exit code, lines and messages of the command."""
    mirrors = [f"{origin}={stand_in}" for origin, stand_in in server.mirrors.items()]
    path = table(tmp_path / known, *rows)
    code = main([*arguments, "--table", path, "--mirror", *mirrors], pause=0.0, backoff=0.01)
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


def known_row(number: int, **changes) -> dict:
    ids = f"{DATASET.format(number)} {VERSION.format(number)}"
    url = f"{FILES}/{VERSION.format(number)}.h5ad"
    row = {"slice": f"s{number}", "source": "cellxgene", "accession": ids, "url": url, "format": "cellxgene"}
    return row | {"bytes": str(1000 + number)} | changes


def test_single_sections_of_every_visium_are_new_and_the_rest_is_left_out_with_its_reason(server, tmp_path, capsys):
    records = [
        record(1),
        record(2, assay=[term(*MM11)]),
        record(3, spatial={"is_single": False, "has_fullres": False}),
        record(4, spatial=None),
        record(5, organism=[term("NCBITaxon:10090", "Mus musculus")]),
        record(6, assay=[term("EFO:0030062", "Slide-seqV2")]),
        record(7, is_primary_data=[False]),
        record(8, assets=record(1)["assets"]),  # an address that is another version's
        record(9, assay=[term(*V1), term("EFO:0009922", "10x 3' v3")]),
    ]
    server.put(f"{API}/datasets", records)
    code, lines, _ = run(server, tmp_path, capsys, "--source", "cellxgene", "--write", str(tmp_path / "new.tsv"))
    assert code == 0
    assert [line[:1] for line in lines] == ["+", "+", "!", "!", "!", "!", "!", "!", "2"]
    left_out = {line.split()[2][-2]: line for line in lines if line.startswith("!")}
    reasons = {"3": "several sections", "4": "isn't said", "5": "Mus musculus", "7": "primary elsewhere"}
    reasons |= {"8": "does not name the version", "9": "other assays too: EFO:0009922"}
    assert left_out.keys() == reasons.keys()  # Slide-seq is none of them: it is no Visium
    for number, reason in reasons.items():
        assert reason in left_out[number]
    rows = load_catalogue(tmp_path / "new.tsv")
    assert [row["slice"] for row in rows] == [f"cellxgene_{DATASET.format(n)}" for n in (1, 2)]
    assert rows[0] == dict.fromkeys(columns(), "") | {
        "slice": f"cellxgene_{DATASET.format(1)}",
        "dataset": COLLECTION,
        "split": "train",
        "source": "cellxgene",
        "accession": f"{DATASET.format(1)} {VERSION.format(1)}",
        "url": f"{FILES}/{VERSION.format(1)}.h5ad",
        "bytes": "1001",
        "format": "cellxgene",
        "organism": "human",
        "tissue": "breast (UBERON:0000310)",
        "disease": "normal",
        "technology": "Visium",
        "donor": "P1",
        "genes": "35477",
        "licence": "CC BY 4.0",
        "evidence": "CELLXGENE curation API; Section 1; doi 10.0000/made-up",
    }
    assert rows[1]["technology"] == "Visium CytAssist 11 mm"


def test_mouse_is_found_where_it_is_asked_for(server, tmp_path, capsys):
    server.put(f"{API}/datasets", [record(1), record(2, organism=[term("NCBITaxon:10090", "Mus musculus")])])
    arguments = ("--source", "cellxgene", "--organism", "mouse", "--write", str(tmp_path / "new.tsv"))
    assert run(server, tmp_path, capsys, *arguments)[0] == 0
    assert [row["organism"] for row in load_catalogue(tmp_path / "new.tsv")] == ["mouse"]


def test_joined_terms_and_lists_are_taken_apart():
    joined = term("MONDO:0005015 || MONDO:0005148", "diabetes mellitus || type 2 diabetes mellitus")
    assert terms([joined]) == "diabetes mellitus (MONDO:0005015); type 2 diabetes mellitus (MONDO:0005148)"
    lists = [term("UBERON:0001155", "colon"), term("UBERON:0001052", "rectum"), term("UBERON:0001155", "colon")]
    assert terms(lists) == "colon (UBERON:0001155); rectum (UBERON:0001052)"
    assert terms([term("MONDO:1", "a || b")]) == "a || b (MONDO:1)"


def test_what_changed_at_the_source_is_shown_and_nothing_of_it_written(server, tmp_path, capsys):
    server.put(f"{API}/datasets", [record(n) for n in (1, 2, 3)] + [record(4, spatial={"is_single": False})])
    server.put(f"{API}/dataset_versions/{VERSION.format(8)}", {"dataset_id": DATASET.format(3)})
    old = VERSION.format(7)
    rows = (
        known_row(1),
        known_row(2, accession=DATASET.format(2), url=f"{FILES}/{old}.h5ad", bytes="7"),
        known_row(3, accession=VERSION.format(8), url=f"{FILES}/{VERSION.format(8)}.h5ad"),
        known_row(4),
    )
    before = table(tmp_path / "same.tsv", *rows)
    code, lines, _ = run(
        server, tmp_path, capsys, "--source", "cellxgene", "--write", str(tmp_path / "n.tsv"), rows=rows
    )
    assert code == 0
    assert [line for line in lines if line.startswith("~")] == [
        "~ s2: bytes 7 -> 1002",
        f"~ s2: dataset_version_id {old} -> {VERSION.format(2)}",
        f"~ s3: dataset_version_id {VERSION.format(8)} -> {VERSION.format(3)}",
        "~ s4: no slice for this table any more: several sections in one file",
    ]
    assert lines[-1].startswith(
        "1 new, 1 as in the table, 4 changed, 0 gone"
    )  # dataset 3 is the row's only by its version
    assert (tmp_path / "known.tsv").read_text() == Path(before).read_text()


def test_what_is_gone_from_the_source_is_said(server, tmp_path, capsys):
    server.put(f"{API}/datasets", [record(1)])
    server.put(f"{API}/dataset_versions/{VERSION.format(3)}", {"dataset_id": DATASET.format(3)})
    code, lines, _ = run(server, tmp_path, capsys, "--source", "cellxgene", rows=(known_row(2), known_row(3)))
    assert code == 0
    assert [line for line in lines if line.startswith("-")] == [
        f"- s2: CELLXGENE has no dataset version {VERSION.format(2)}",
        f"- s3: dataset {DATASET.format(3)} is no longer in the list",
    ]


def test_a_query_keeps_to_what_has_its_words(server, tmp_path, capsys):
    kidney = record(2, tissue=[term("UBERON:0002113", "kidney")])
    server.put(f"{API}/datasets", [record(1), kidney])
    _, lines, _ = run(server, tmp_path, capsys, "--source", "cellxgene", "--query", "Section KIDNEY")
    assert [line for line in lines if line.startswith("+")] == [
        f"+ cellxgene_{DATASET.format(2)}: {COLLECTION}, kidney (UBERON:0002113), normal, Visium, "
        f"{FILES}/{VERSION.format(2)}.h5ad"
    ]


def test_a_busy_server_is_asked_again_when_it_says(server, tmp_path, capsys):
    path = server.put(f"{API}/datasets", [record(1)])
    server.script[path] = [{"status": 429, "headers": {"Retry-After": "1"}}, {"status": 500}]
    began = time.monotonic()
    code, lines, _ = run(server, tmp_path, capsys, "--source", "cellxgene")
    assert code == 0
    assert lines[-1].startswith("1 new")
    assert [request.status for request in server.requests] == [429, 500, 200]
    assert time.monotonic() - began > 1


WHOLE = json.dumps([record(1)]).encode()


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (WHOLE[: len(WHOLE) // 2], r"no JSON"),
        (b"<html>busy</html>", r"no JSON"),
        (b"", r"0 characters that are no JSON"),
        (b'{"detail": "not\\u001b[2J now"}', r"the message 'not \[2J now'"),
        (b'[{"dataset_id": "x"}]', r"another form: KeyError 'dataset_version_id'"),
        (b"[1]", r"another form: TypeError"),
        (b"null", r"another form: TypeError"),
    ],
)
def test_an_answer_of_another_form_is_a_typed_error(answer, found, server, tmp_path, capsys):
    server.put(f"{API}/datasets", answer)
    code, lines, message = run(server, tmp_path, capsys, "--source", "cellxgene")
    assert (code, lines) == (1, [])
    assert message.startswith(f"[unreadable] slice cellxgene ({API}/datasets): found ")
    assert re.search(found, message)


def gse(number: int, samples: dict[str, str], taxon: str = "Homo sapiens") -> dict:
    """A series as esummary tells it."""
    listed = [{"accession": gsm, "title": title} for gsm, title in samples.items()]
    return {"uid": f"20{number}", "accession": f"GSE{number}", "title": "Made up", "taxon": taxon, "samples": listed}


def eutils(server, *series: dict) -> list[dict]:
    """Let a search find these series; the queries asked are kept in the list returned."""
    asked = []

    def search(query):
        asked.append(query)
        return json.dumps(
            {"esearchresult": {"count": str(len(series)), "querykey": "1", "webenv": "MCID_1", "idlist": []}}
        ).encode()

    def summary(query):
        start, most = int(query["retstart"][0]), int(query["retmax"][0])
        assert query["WebEnv"] == ["MCID_1"]
        page = series[start : start + most]
        return json.dumps({"result": {"uids": [s["uid"] for s in page]} | {s["uid"]: s for s in page}}).encode()

    server.put(f"{EUTILS}/esearch.fcgi", search)
    server.put(f"{EUTILS}/esummary.fcgi", summary)
    server.path(geo.FTP)
    return asked


def filelist(server, number: int, names: list[str]) -> None:
    lines = ["#Archive/File\tName\tTime\tSize\tType", f"Archive\tGSE{number}_RAW.tar\t01/15/2019 12:55:11\t610\tTAR"]
    lines += [f"File\t{name}\t01/14/2019 14:53:56\t14\tX" for name in names]
    server.put(geo.series_dir(f"GSE{number}") + "filelist.txt", "\n".join(lines).encode())


def test_a_series_gives_a_row_for_each_section_that_can_be_resolved(server, tmp_path, capsys):
    samples = {"GSM900001": "A\ttitle", "GSM900002": "two sections", "GSM900003": "no positions", "GSM900004": "cells"}
    asked = eutils(server, gse(900001, samples), gse(900002, {"GSM900009": "both"}, "Homo sapiens; Mus musculus"))
    names = [f"GSM900001_s1_{name}" for name in MEX]
    names += [f"GSM900002_{section} x_{name}" for section in "AB" for name in MEX]
    names += [f"GSM900003_s3_{name}" for name in MEX[:3]] + ["GSM900004_photo.png.gz", "GSE900001_all.h5ad"]
    filelist(server, 900001, names)
    code, lines, _ = run(server, tmp_path, capsys, "--source", "geo", "--write", str(tmp_path / "new.tsv"))
    assert code == 0
    assert asked[0]["term"] == ['((Visium) AND "Homo sapiens"[ORGN]) AND gse[ETYP]']
    rows = load_catalogue(tmp_path / "new.tsv")
    folder = geo.sample_dir("GSM900002")
    assert {row["slice"]: row["url"] for row in rows} == {
        "GSM900001": geo.sample_dir("GSM900001"),
        "GSM900002_A_x": f"{folder}#prefix=GSM900002_A%20x",
        "GSM900002_B_x": f"{folder}#prefix=GSM900002_B%20x",
    }
    assert {row["evidence"] for row in rows} == {"GEO GSE900001, sample A title", "GEO GSE900001, sample two sections"}
    assert {(row["dataset"], row["source"], row["format"]) for row in rows} == {("GSE900001", "geo", "geo")}
    assert [line.split(":")[0] for line in lines if line.startswith("!")] == [
        "! GSE900001 GSE900001_all",
        "! GSE900001 GSM900003_s3",
        "! GSE900002",
    ]
    assert "no positions" in lines[4]
    assert "Mus musculus" in lines[5]


def test_the_rows_of_a_series_are_resolved_by_what_they_say(server, tmp_path, capsys):
    eutils(server, gse(900001, {"GSM900002": "two sections"}))
    names = [f"GSM900002_{section}_{name}" for section in ("A1", "A10") for name in MEX]
    filelist(server, 900001, names)
    run(server, tmp_path, capsys, "--source", "geo", "--series", "GSE900001", "--write", str(tmp_path / "new.tsv"))
    for row in load_catalogue(tmp_path / "new.tsv"):
        prefix = row["url"].split("#prefix=")[1]
        assert len(geo.choose(names, prefix)) == 4
        assert all(name.startswith(f"{prefix}_") for name in geo.choose(names, prefix))


def test_without_a_file_list_the_samples_folders_are_read(server, tmp_path, capsys):
    asked = eutils(server, gse(900001, {"GSM900001": "one", "GSM900002": "empty", "GSM900003": "gone"}))
    for name in MEX:
        server.put(geo.sample_dir("GSM900001") + f"GSM900001_s1_{name}", b"x" * 2000)
    server.always[server.path(geo.sample_dir("GSM900002"))] = {"status": 403}
    code, lines, _ = run(server, tmp_path, capsys, "--source", "geo", "--series", "GSE900001", "GSE900005")
    assert code == 0
    assert asked[0]["term"] == ["(GSE900001[ACCN] OR GSE900005[ACCN]) AND gse[ETYP]"]
    assert lines == [
        f"+ GSM900001: GSE900001, Visium, {geo.sample_dir('GSM900001')}",
        "! GSE900005: GEO finds no such series",
        "1 new, 0 as in the table, 0 changed, 0 gone, 1 left out",
    ]


def test_a_server_that_fails_is_not_an_empty_folder(server, tmp_path, capsys):
    eutils(server, gse(900001, {"GSM900001": "one"}))
    server.always[server.path(geo.sample_dir("GSM900001"))] = {"status": 503}
    code, lines, _ = run(server, tmp_path, capsys, "--source", "geo")
    assert code == 0
    assert lines[0].startswith("! GSE900001: HTTP 503 at attempt 8 of 8")


def test_samples_of_the_table_are_compared_with_their_files(server, tmp_path, capsys):
    samples = {f"GSM90000{n}": f"sample {n}" for n in range(1, 7)}
    eutils(server, gse(900001, samples))
    names = [f"GSM90000{n}_s1_{name}" for n in (1, 2, 4, 5) for name in MEX]
    names += [f"GSM900002_s2_{name}" for name in MEX] + [f"GSM900006_s1_{name}" for name in MEX[:3]]
    filelist(server, 900001, names)

    def mine(n, **changes):
        url = geo.sample_dir(f"GSM90000{n}")
        row = {"slice": f"s{n}", "source": "geo", "accession": f"GSE900001 GSM90000{n}", "url": url, "format": "geo"}
        return row | changes

    files = " ".join(geo.sample_dir("GSM900004") + f"GSM900004_s1_{name}" for name in MEX)
    rows = (
        mine(1),
        mine(2),
        mine(3),
        mine(4, url=files),
        mine(5, url=files.replace("900004", "900005") + "x"),
        mine(6),
    )
    _, lines, _ = run(server, tmp_path, capsys, "--source", "geo", rows=rows)
    told = {line.split(":")[0]: line for line in lines[:-1]}
    assert told.keys() == {"~ s2", "- s3", "- s5", "- s6", "! GSE900001 GSM900006_s1"}
    assert "2 sections: GSM900002_s1, GSM900002_s2" in told["~ s2"]
    assert "GSM900005 has no GSM900005_s1_tissue_positions_list.csv.gzx" in told["- s5"]
    assert "has no files of GSM900003 that make a slice" in told["- s3"]
    assert lines[-1] == "0 new, 2 as in the table, 1 changed, 3 gone, 1 left out"


def test_many_series_are_asked_for_in_pages(server, tmp_path, capsys):
    eutils(server, *(gse(900000 + n, {}, "Mus musculus") for n in range(450)))
    code, lines, _ = run(server, tmp_path, capsys, "--source", "geo")
    assert code == 0
    assert lines[-1].endswith("450 left out")
    assert sum("esummary" in path for path, _ in server.seen) == 3


def test_requests_to_ncbi_are_spaced(server, tmp_path, capsys):
    eutils(server, gse(900001, {}))
    known = table(tmp_path / "known.tsv")
    mirrors = [f"{origin}={stand_in}" for origin, stand_in in server.mirrors.items()]
    assert main(["--source", "geo", "--table", known, "--mirror", *mirrors], pause=0.2) == 0
    began = [request.began for request in server.requests]
    assert len(began) == 3
    assert min(b - a for a, b in zip(began, began[1:], strict=False)) > 0.19


@pytest.mark.parametrize("name", ["../../etc/GSM900001_matrix.mtx.gz", "GSM900001_\x1b[31m.h5ad", "a/GSM900001.h5ad"])
def test_hostile_names_leave_their_series_out(name, server, tmp_path, capsys):
    eutils(server, gse(900001, {"GSM900001": "one"}))
    filelist(server, 900001, [f"GSM900001_s1_{end}" for end in MEX] + [name])
    code, lines, _ = run(server, tmp_path, capsys, "--source", "geo", "--write", str(tmp_path / "new.tsv"))
    assert code == 0
    assert lines[0].startswith("! GSE900001: ")
    assert "\x1b" not in "".join(lines)
    assert load_catalogue(tmp_path / "new.tsv") == []


@pytest.mark.parametrize(
    ("search", "found"),
    [
        (b'{"esearchresult": {"ERROR": "Search Backend failed"}}', "Search Backend failed"),
        (b'{"error": "API rate limit exceeded"}', "API rate limit exceeded"),
        (b'{"esearchresult": {"count": "many", "querykey": "1", "webenv": "x"}}', "ValueError"),
        (b'{"esearch', "no JSON"),
    ],
)
def test_a_search_that_fails_is_a_typed_error(search, found, server, tmp_path, capsys):
    eutils(server)
    server.put(f"{EUTILS}/esearch.fcgi", search)
    code, _, message = run(server, tmp_path, capsys, "--source", "geo")
    assert code == 1
    assert message.startswith("[unreadable] slice geo (")
    assert found in message


def test_rows_are_never_written_over_a_file(server, tmp_path, capsys):
    server.put(f"{API}/datasets", [record(1)])
    kept = tmp_path / "new.tsv"
    kept.write_text("mine\n")
    code, lines, message = run(server, tmp_path, capsys, "--source", "cellxgene", "--write", str(kept))
    assert (code, lines) == (1, [])
    assert "there already" in message
    assert kept.read_text() == "mine\n"


def test_a_table_that_is_none_is_refused_before_anything_is_asked(server, tmp_path, capsys):
    assert main(["--source", "cellxgene", "--table", str(tmp_path / "none.tsv")]) == 1
    assert "no such file" in capsys.readouterr().err
    assert server.requests == []
