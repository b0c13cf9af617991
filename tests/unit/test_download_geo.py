"""GEO's folders and RAW.tar over HTTP, and what binds a download once it was seen."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from tests.unit.fetching import BODY, PLACES, POSITIONS, WHOLE, archive, files_below, get, h5, lock, row, sha256
from workflow.archives import spans_in
from workflow.download import fetch_slice
from workflow.errors import DownloadFailed, SliceError, SourceChanged, Unreadable, UnsafeArchive
from workflow.lock import Lock, merge, read_lock
from workflow.transfer import Source


@pytest.fixture
def server(server):
    server.files["/a.h5ad"] = BODY
    return server


GEO = "https://ftp.ncbi.nlm.nih.gov/geo"
PACKED, FACTORS = gzip.compress(POSITIONS), gzip.compress(b"{}")
SAMPLE = {
    "GSM1_A1_filtered_feature_bc_matrix.h5": BODY,
    "GSM1_A1_tissue_positions_list.csv.gz": PACKED,
    "GSM1_A1_scalefactors_json.json.gz": FACTORS,
    "GSM1_A1_tissue_hires_image.png.gz": gzip.compress(b"\x89PNG"),
    "GSM1_A10_filtered_feature_bc_matrix.h5": h5(4, 1000),
    "GSM1_A10_tissue_positions_list.csv.gz": PACKED,
}
A1 = {
    "outs/filtered_feature_bc_matrix.h5": BODY,
    "outs/spatial/tissue_positions_list.csv.gz": PACKED,
    "outs/spatial/scalefactors_json.json.gz": FACTORS,
}


def geo_row(server, url: str) -> dict[str, str]:
    return row(server, format="geo", url=url)


def test_a_sample_folder_of_geo_is_resolved_to_the_files_of_one_section(server, tmp_path):
    for name, data in SAMPLE.items():
        server.put(f"{GEO}/samples/GSMnnn/GSM1/suppl/{name}", data)
    wanted = geo_row(server, f"{GEO}/samples/GSMnnn/GSM1/suppl/#prefix=GSM1_A1")
    entries = get(wanted, tmp_path, mirrors=server.mirrors)
    assert files_below(tmp_path) == A1
    assert all(entry["url"].startswith(f"{GEO}/samples") for entry in entries)  # not the mirror
    assert len(server.requests) == 4  # the listing and three files


def raw_tar(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def test_a_raw_tar_is_read_by_member_and_the_rest_is_never_asked_for(server, tmp_path):
    other = {f"GSM2_B_{k}.png.gz": os.urandom(2_000_000) for k in range(4)}
    url = f"{GEO}/series/GSEnnn/GSE1/suppl/GSE1_RAW.tar"
    at = server.put(url, raw_tar(other | SAMPLE))
    entries = get(geo_row(server, f"{url}#prefix=GSM1_A1_"), tmp_path, mirrors=server.mirrors)
    assert files_below(tmp_path) == A1
    assert sum(server.sent) < len(BODY) + 20 * 65536 < len(server.files[at]) / 2
    assert {entry["member"] for entry in entries} == {name for name in SAMPLE if "A1_" in name and "png" not in name}


def test_members_of_a_raw_tar_on_this_machine_lie_where_the_same_headers_say(tmp_path):
    (tmp_path / "GSE1_RAW.tar").write_bytes(raw_tar(SAMPLE))
    with open(tmp_path / "GSE1_RAW.tar", "rb") as tar:
        spans = spans_in(Source("s1", "GSE1_RAW.tar", tmp_path), tar)
    packed = raw_tar(SAMPLE)
    assert {name: packed[start : start + size] for name, (start, size) in spans.items()} == SAMPLE


def test_a_member_of_a_raw_tar_resumes_where_it_was_cut(server, tmp_path):
    at = server.put(f"{GEO}/GSE1_RAW.tar", raw_tar(SAMPLE))
    wanted = geo_row(server, f"{GEO}/GSE1_RAW.tar#prefix=GSM1_A1_")
    get(wanted, tmp_path / "whole", mirrors=server.mirrors)
    spans = [tuple(map(int, asked.removeprefix("bytes=").split("-"))) for _, asked in server.seen]
    (matrix,) = [number for number, (first, last) in enumerate(spans) if last - first + 1 == len(BODY)]
    server.requests.clear()
    server.script[at] = [{}] * matrix + [{"cut": 1000}]
    get(wanted, tmp_path / "cut", mirrors=server.mirrors)
    assert files_below(tmp_path / "cut") == A1
    first, last = spans[matrix]
    assert server.seen[matrix + 1] == (at, f"bytes={first + 1000}-{last}")
    assert sum(server.sent[matrix : matrix + 2]) == len(BODY)


def test_a_raw_tar_behind_a_server_without_ranges_is_refused_not_read_whole(server, tmp_path):
    at = server.put(f"{GEO}/GSE1_RAW.tar", raw_tar(SAMPLE))
    server.always[at] = {"ignore_range": True}
    with pytest.raises(DownloadFailed, match="no byte ranges"):
        get(geo_row(server, f"{GEO}/GSE1_RAW.tar#prefix=GSM1_A1_"), tmp_path, mirrors=server.mirrors)


def test_a_truncated_or_hostile_raw_tar_ends_typed(server, tmp_path):
    server.put(f"{GEO}/GSE1_RAW.tar", raw_tar(SAMPLE)[:700_000])
    with pytest.raises(Unreadable):
        get(geo_row(server, f"{GEO}/GSE1_RAW.tar#prefix=GSM1_A1_"), tmp_path, mirrors=server.mirrors)
    server.put(f"{GEO}/GSE1_RAW.tar", raw_tar({"../GSM1_A1_x": b"x"} | SAMPLE))
    with pytest.raises(UnsafeArchive):
        get(geo_row(server, f"{GEO}/GSE1_RAW.tar#prefix=GSM1_A1_"), tmp_path, mirrors=server.mirrors)


def test_a_sample_folder_with_a_space_ranger_archive_is_unpacked(server, tmp_path):
    server.put(f"{GEO}/GSM1/suppl/GSM1_S1.tar.gz", archive(*WHOLE))
    get(geo_row(server, f"{GEO}/GSM1/suppl/"), tmp_path, mirrors=server.mirrors)
    assert {k: v for k, v in files_below(tmp_path).items() if not k.endswith(".tar.gz")} == PLACES


def test_the_choosers_errors_name_slice_and_address(server, tmp_path):
    server.put(f"{GEO}/GSM1/suppl/GSM1_S1_matrix.mtx.gz", gzip.compress(b"x"))
    with pytest.raises(SliceError, match=r"slice s1 \(https://ftp\.ncbi\.nlm\.nih\.gov/geo/GSM1/suppl/\)") as failure:
        get(geo_row(server, f"{GEO}/GSM1/suppl/"), tmp_path, mirrors=server.mirrors)
    assert failure.value.stage == "download"


# What was first seen binds


def test_an_unpinned_file_is_held_to_what_it_was_when_first_seen(server, tmp_path):
    get(row(server), tmp_path)
    (line,) = read_lock(lock(tmp_path).record)
    assert (line.slice, line.url, line.bytes, line.sha256) == ("s1", server.base + "/a.h5ad", len(BODY), sha256(BODY))
    get(row(server), tmp_path)
    assert len(server.requests) == 1  # here already: the record vouches for it
    (tmp_path / "s1.h5ad").unlink()
    server.files["/a.h5ad"] = h5(seed=1)
    with pytest.raises(SourceChanged, match=f"{sha256(h5(seed=1))}.*{sha256(BODY)}.*first seen 2.*line in .*lock.tsv$"):
        get(row(server), tmp_path)


def test_a_geo_folder_whose_files_were_renamed_is_a_changed_source(server, tmp_path):
    url = f"{GEO}/GSM1/suppl/"
    paths = {name: server.put(url + name, data) for name, data in SAMPLE.items() if "A1_" in name}
    get(geo_row(server, url), tmp_path, mirrors=server.mirrors)
    at = paths["GSM1_A1_filtered_feature_bc_matrix.h5"]
    server.files[at.replace("A1_filtered", "A1_v2_filtered")] = server.files.pop(at)
    server.files[at.replace("A1_filtered_feature_bc_matrix.h5", "A1_v2_tissue_positions_list.csv.gz")] = PACKED
    with pytest.raises(SourceChanged, match=r"A1_v2.*A1_filtered"):
        get(geo_row(server, url + "#prefix=GSM1_A1_v2"), tmp_path, mirrors=server.mirrors)


def test_records_are_gathered_into_the_tables_lock_and_a_contradiction_is_shown(server, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    table = tmp_path / "mine.tsv"
    columns = ["slice", "dataset", "split", "source", "url", "format", "organism"]
    table.write_text("\t".join(columns) + f"\ns1\td\ttrain\turl\t{server.base}/a.h5ad\th5ad\thuman\n")
    record = tmp_path / "resources/lock/s1.tsv"
    fetch_slice(row(server), tmp_path / "s1", Lock("s1", record, []))
    path, added, differences = merge(table)
    assert (path, added, differences) == (Path("catalogue/aux/mine.lock.tsv"), 1, [])
    before = path.read_bytes()
    record.write_text(record.read_text().replace(sha256(BODY), "0" * 64))
    _, added, (difference,) = merge(table)
    assert added == 0
    assert sha256(BODY) in difference
    assert path.read_bytes() == before
    record.unlink()
    server.files["/a.h5ad"] = h5(seed=1)
    with pytest.raises(SourceChanged, match="mine.lock.tsv"):
        fetch_slice(row(server), tmp_path / "again", Lock("s1", record, [path]))
