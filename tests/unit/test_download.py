"""The download rule against a server on loopback that misbehaves in the ways public servers do."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import pytest

from workflow.catalogue import load_catalogue
from workflow.download import HDF5, Manners, Source, download, extract_spatial, plan
from workflow.errors import (
    CatalogueError,
    DownloadFailed,
    MissingFile,
    MissingPositions,
    RefusedUrl,
    SliceError,
    SourceChanged,
    UnknownFormat,
    Unreadable,
    UnsafeArchive,
)

ROOT = Path(__file__).resolve().parents[2]
BODY = HDF5 + bytes(range(256)) * 4000  # about 1 MB that passes for an h5ad
FIFTH = len(BODY) // 5


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files[path]`; `server.script[path]` is a list of answers used up first, one a request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        served = self.server
        path = self.path.split("?")[0]
        wanted = self.headers.get("Range")
        served.seen.append((path, wanted))
        act = served.script.get(path, []).pop(0) if served.script.get(path) else {}
        body = served.files.get(path)
        if "status" in act:
            self.answer(act["status"], act.get("headers", {}), b"")
            return
        if body is None:
            self.answer(404, {}, b"")
            return
        headers = {} if act.get("anonymous") else {"ETag": f'"{sha256(body)[:16]}"'}
        status, start = 200, 0
        fresh = self.headers.get("If-Range") in (None, headers.get("ETag"))
        if wanted and fresh and not act.get("ignore_range"):
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            if start >= len(body):
                self.answer(416, {"Content-Range": f"bytes */{len(body)}"}, b"")
                return
            status = 206
            headers["Content-Range"] = act.get("content_range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.answer(status, headers, body[start:], act)

    def answer(self, status, headers, body, act=()):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if "no_length" not in act:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = body[: act["cut"]] if "cut" in act else body
        self.wfile.write(sent)
        self.server.sent.append(len(sent))
        if "hold" in act:
            self.wfile.flush()
            self.server.released.wait(20)
        if "cut" in act or "no_length" in act:
            self.close_connection = True


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that was killed, or refused what it saw, is no news."""


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    httpd = Server(("127.0.0.1", 0), Handler)
    httpd.files, httpd.script, httpd.seen, httpd.sent = {"/a.h5ad": BODY}, {}, [], []
    httpd.released = threading.Event()
    thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield SimpleNamespace(
        base=f"http://127.0.0.1:{httpd.server_port}",
        files=httpd.files,
        script=httpd.script,
        seen=httpd.seen,
        sent=httpd.sent,
    )
    httpd.released.set()
    httpd.shutdown()
    thread.join()
    httpd.server_close()


def row(server, *paths: str, **columns: str) -> dict[str, str]:
    blank = {"slice": "s1", "sha256": "", "bytes": "", "format": "h5ad", "labels": ""}
    return blank | {"url": " ".join(server.base + path for path in paths or ("/a.h5ad",))} | columns


def get(row, folder, **manners):
    return download(row, folder, backoff=0.01, **manners)


def part_of(folder: Path) -> Path:
    return folder / "s1.h5ad.part"


def interrupt(server, folder, at=FIFTH, **columns):
    """Leave a part of `at` bytes behind, as a job that ran out of attempts does."""
    server.script["/a.h5ad"] = [{"cut": at}]
    with pytest.raises(DownloadFailed):
        get(row(server, **columns), folder, attempts=1)
    assert part_of(folder).stat().st_size == at
    assert not (folder / "s1.h5ad").exists()


def archive(*members: tuple[str, bytes | tarfile.TarInfo]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in members:
            if isinstance(content, tarfile.TarInfo):
                tar.addfile(content)
            else:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return packed.getvalue()


POSITIONS = b"AAACAAGTATCTCCCA-1,1,50,102,7237,8479\n"
SPATIAL = archive(
    ("spatial/tissue_hires_image.png", b"\x89PNG" * 1000),
    ("spatial/._tissue_positions_list.csv", b"AppleDouble"),
    ("spatial/tissue_positions_list.csv", POSITIONS),
    ("spatial/scalefactors_json.json", b'{"spot_diameter_fullres": 96.4}'),
)


# What a download leaves behind


def test_a_single_h5ad_is_fetched_and_listed(server, tmp_path):
    entries = get(row(server, sha256=sha256(BODY), bytes=str(len(BODY))), tmp_path)
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY
    assert entries == json.loads((tmp_path / "files.json").read_text())
    path = (tmp_path / "s1.h5ad").as_posix()
    url = server.base + "/a.h5ad"
    assert entries == [{"path": path, "url": url, "bytes": len(BODY), "sha256": sha256(BODY), "role": "slice"}]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["files.json", "s1.h5ad"]


def test_a_10x_row_becomes_a_space_ranger_folder_with_its_labels(server, tmp_path):
    labels = b"ID\tlayer\nAAACAAGTATCTCCCA-1\tL1\n"
    server.files |= {"/n_filtered_feature_bc_matrix.h5": BODY, "/n_spatial.tar.gz": SPATIAL, "/m.tsv": labels}
    pin = f"#md5={hashlib.md5(labels).hexdigest()}"
    wanted = row(
        server,
        "/n_filtered_feature_bc_matrix.h5",
        "/n_spatial.tar.gz",
        format="spaceranger",
        sha256=f"{sha256(BODY)} {sha256(SPATIAL)}",
        labels=server.base + "/m.tsv" + pin,
    )
    entries = get(wanted, tmp_path)
    assert (tmp_path / "outs/filtered_feature_bc_matrix.h5").read_bytes() == BODY
    assert (tmp_path / "outs/spatial/tissue_positions_list.csv").read_bytes() == POSITIONS
    assert (tmp_path / "labels.tsv").read_bytes() == labels
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file())
    assert files == [
        "files.json",
        "labels.tsv",
        "outs/filtered_feature_bc_matrix.h5",
        "outs/spatial/scalefactors_json.json",
        "outs/spatial/tissue_positions_list.csv",
    ]
    assert [entry["role"] for entry in entries] == ["slice", "slice", "slice", "labels"]
    assert entries[1]["member"] == "spatial/tissue_positions_list.csv"
    assert all(sha256(Path(entry["path"]).read_bytes()) == entry["sha256"] for entry in entries)


def test_positions_that_lie_singly_get_the_name_that_readers_know(server, tmp_path):
    server.files |= {"/151507_filtered_feature_bc_matrix.h5": BODY, "/x/tissue_positions_list.txt": POSITIONS}
    get(row(server, "/151507_filtered_feature_bc_matrix.h5", "/x/tissue_positions_list.txt", format="auto"), tmp_path)
    assert (tmp_path / "outs/spatial/tissue_positions_list.csv").read_bytes() == POSITIONS


def test_pinned_files_are_not_fetched_twice_and_leftovers_of_an_older_row_go(server, tmp_path):
    get(row(server, sha256=sha256(BODY)), tmp_path)
    (tmp_path / "outs").mkdir()
    (tmp_path / "outs/filtered_feature_bc_matrix.h5").write_bytes(b"of an older row")
    get(row(server, sha256=sha256(BODY)), tmp_path)
    assert len(server.seen) == 1
    assert not (tmp_path / "outs/filtered_feature_bc_matrix.h5").exists()


# Interruptions


def test_a_cut_connection_resumes_with_the_missing_range(server, tmp_path):
    server.script["/a.h5ad"] = [{"cut": FIFTH}]
    get(row(server), tmp_path)
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY
    assert server.seen == [("/a.h5ad", None), ("/a.h5ad", f"bytes={FIFTH}-")]
    assert server.sent == [FIFTH, len(BODY) - FIFTH]


def test_a_later_run_resumes_what_an_earlier_one_left(server, tmp_path):
    interrupt(server, tmp_path)
    get(row(server), tmp_path)
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY
    assert server.sent == [FIFTH, len(BODY) - FIFTH]


def test_a_server_that_ignores_the_range_is_read_from_the_start(server, tmp_path):
    interrupt(server, tmp_path)
    server.script["/a.h5ad"] = [{"ignore_range": True}]
    get(row(server), tmp_path)
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY


def test_a_file_that_changed_meanwhile_is_read_from_the_start(server, tmp_path):
    interrupt(server, tmp_path)
    server.files["/a.h5ad"] = changed = HDF5 + b"a newer version" * 70_000
    get(row(server), tmp_path)
    assert (tmp_path / "s1.h5ad").read_bytes() == changed


def test_a_part_that_nothing_vouches_for_is_not_continued(server, tmp_path):
    server.script["/a.h5ad"] = [{"cut": FIFTH, "anonymous": True}, {"anonymous": True}]
    get(row(server), tmp_path)
    assert server.seen == [("/a.h5ad", None)] * 2
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY


def test_a_pinned_digest_vouches_for_a_part_and_a_spoilt_one_is_fetched_anew(server, tmp_path):
    server.script["/a.h5ad"] = [{"cut": FIFTH, "anonymous": True}, {"anonymous": True}, {"anonymous": True}]
    with pytest.raises(DownloadFailed):
        get(row(server, sha256=sha256(BODY)), tmp_path, attempts=1)
    part_of(tmp_path).write_bytes(b"x" * FIFTH)
    get(row(server, sha256=sha256(BODY)), tmp_path)
    assert [wanted for _, wanted in server.seen] == [None, f"bytes={FIFTH}-", None]
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY


def test_a_part_of_another_url_is_not_continued(server, tmp_path):
    interrupt(server, tmp_path)
    server.files["/b.h5ad"] = other = HDF5 + b"other" * 1000
    get(row(server, "/b.h5ad"), tmp_path)
    assert (tmp_path / "s1.h5ad").read_bytes() == other


def test_a_wrong_content_range_is_not_appended(server, tmp_path):
    interrupt(server, tmp_path)
    server.script["/a.h5ad"] = [{"content_range": f"bytes 0-{len(BODY) - 1}/{len(BODY)}"}]
    get(row(server), tmp_path)
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY


@pytest.mark.parametrize("known_total", [True, False])
def test_a_part_that_is_whole_already_is_only_renamed(server, tmp_path, known_total):
    interrupt(server, tmp_path)
    part_of(tmp_path).write_bytes(BODY)
    if not known_total:
        state = tmp_path / "s1.h5ad.part.json"
        state.write_text(json.dumps(json.loads(state.read_text()) | {"total": None}))
    get(row(server, sha256=sha256(BODY)), tmp_path)
    assert server.sent[1:] == ([] if known_total else [0])
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY


def test_a_killed_download_fetches_only_the_missing_range(server, tmp_path):
    server.script["/a.h5ad"] = [{"cut": 3 * FIFTH, "hold": True}]
    code = "import json, sys; from workflow.download import download; download(json.loads(sys.argv[1]), sys.argv[2])"
    job = subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(row(server)), str(tmp_path)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    deadline = time.monotonic() + 15
    while not (part_of(tmp_path).exists() and part_of(tmp_path).stat().st_size > FIFTH):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job.send_signal(signal.SIGKILL)
    job.wait()
    assert not (tmp_path / "s1.h5ad").exists()
    assert not (tmp_path / "files.json").exists()
    have = part_of(tmp_path).stat().st_size
    get(row(server), tmp_path)
    assert server.seen[-1] == ("/a.h5ad", f"bytes={have}-")
    assert server.sent[-1] == len(BODY) - have
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY


# Busy and failing servers


def test_two_internal_errors_and_then_the_file(server, tmp_path):
    server.script["/a.h5ad"] = [{"status": 500}, {"status": 500}]
    get(row(server), tmp_path)
    assert len(server.seen) == 3
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY


def test_retry_after_is_honoured(server, tmp_path):
    server.script["/a.h5ad"] = [{"status": 429, "headers": {"Retry-After": "1"}}]
    started = time.monotonic()
    get(row(server), tmp_path)
    assert time.monotonic() - started >= 1


def test_a_retry_after_date_is_understood_and_one_beyond_reason_is_refused(server, tmp_path):
    server.script["/a.h5ad"] = [{"status": 503, "headers": {"Retry-After": "Fri, 01 Jan 2100 00:00:00 GMT"}}]
    with pytest.raises(DownloadFailed, match="503, and the wish"):
        get(row(server), tmp_path)
    assert len(server.seen) == 1


def test_attempts_are_bounded(server, tmp_path):
    server.script["/a.h5ad"] = [{"status": 503}] * 9
    with pytest.raises(DownloadFailed, match=r"slice s1 .*HTTP 503 at attempt 3 of 3"):
        get(row(server), tmp_path, attempts=3)
    assert len(server.seen) == 3


def test_a_missing_file_is_not_asked_for_twice(server, tmp_path):
    with pytest.raises(MissingFile, match="404") as failure:
        get(row(server, "/gone.h5ad"), tmp_path)
    assert len(server.seen) == 1
    assert failure.value.as_row()["stage"] == "download"


def test_an_unpinned_answer_whose_end_cannot_be_known_is_refused(server, tmp_path):
    server.script["/a.h5ad"] = [{"no_length": True}]
    with pytest.raises(DownloadFailed, match="without length"):
        get(row(server), tmp_path)


# Wrong files


def test_a_wrong_checksum_is_refused_and_nothing_is_left(server, tmp_path):
    with pytest.raises(SourceChanged, match=sha256(BODY)):
        get(row(server, sha256="0" * 64), tmp_path)
    assert not any(p.is_file() for p in tmp_path.rglob("*"))
    assert len(server.seen) == 1


def test_a_changed_size_is_refused_before_the_file_is_read(server, tmp_path):
    with pytest.raises(SourceChanged, match=f"found {len(BODY)} bytes; expected 17 bytes"):
        get(row(server, bytes="17"), tmp_path)
    assert not (tmp_path / "s1.h5ad").exists()


def test_a_web_page_is_not_taken_for_the_file(server, tmp_path):
    server.files["/a.h5ad"] = b"<!DOCTYPE html><title>Please log in</title>"
    with pytest.raises(Unreadable, match="expected HDF5"):
        get(row(server), tmp_path)
    assert not part_of(tmp_path).exists()


def test_a_redirect_to_a_foreign_host_is_refused(server, tmp_path):
    port = server.base.rsplit(":", 1)[1]
    foreign = {"status": 302, "headers": {"Location": f"http://localhost:{port}/a.h5ad"}}
    server.script["/a.h5ad"] = [foreign, dict(foreign)]
    with pytest.raises(RefusedUrl, match="localhost"):
        get(row(server), tmp_path)
    assert len(server.seen) == 1
    get(row(server), tmp_path, allow_hosts=["localhost"])
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://127.0.0.1/a.h5ad", "//evil.example/a.h5ad"])
def test_redirects_to_other_schemes_and_schemeless_hosts_are_refused(server, tmp_path, target):
    server.script["/a.h5ad"] = [{"status": 301, "headers": {"Location": target}}]
    with pytest.raises(RefusedUrl):
        get(row(server), tmp_path)


def test_a_redirect_within_the_host_is_followed_and_a_loop_ends(server, tmp_path):
    server.script["/old.h5ad"] = [{"status": 301, "headers": {"Location": "/a.h5ad"}}]
    get(row(server, "/old.h5ad"), tmp_path)
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY
    server.script["/loop.h5ad"] = [{"status": 302, "headers": {"Location": "/loop.h5ad"}}] * 9
    with pytest.raises(DownloadFailed, match="redirects"):
        get(row(server, "/loop.h5ad"), tmp_path)


# Rows that no rule knows


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        ({"format": "geo"}, UnknownFormat),
        ({"format": "spaceranger", "url": "https://h/readme.txt"}, UnknownFormat),
        ({"format": "spaceranger", "url": "https://h/x_filtered_feature_bc_matrix.h5"}, UnknownFormat),
        ({"format": "h5ad", "url": "https://h/a.h5ad https://h/b.h5ad"}, UnknownFormat),
        ({"url": "ftp://h/a.h5ad"}, RefusedUrl),
        ({"url": "slices/a.h5ad"}, RefusedUrl),
        ({"sha256": "0" * 64 + " " + "1" * 64}, CatalogueError),
        ({"url": "https://h/a.h5ad#sha256=123"}, CatalogueError),
    ],
)
def test_rows_without_a_rule_are_refused_before_anything_is_fetched(server, tmp_path, columns, kind):
    with pytest.raises(kind):
        get(row(server, **columns), tmp_path)
    assert server.seen == []


# Archives


def spatial(tmp_path, data: bytes) -> Source:
    path = tmp_path / "spatial.tar.gz"
    path.write_bytes(data)
    return Source("s1", "https://h/x_spatial.tar.gz", path, "archive")


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "member",
    [
        ("/etc/cron.d/x", b"absolute"),
        ("spatial/../../x", b"climbs"),
        ("", special("spatial/tissue_positions.csv", tarfile.SYMTYPE, "/etc/passwd")),
        ("", special("spatial/hard", tarfile.LNKTYPE, "/etc/passwd")),
        ("", special("spatial/fifo", tarfile.FIFOTYPE)),
        ("", special("spatial/null", tarfile.CHRTYPE)),
        ("spatial/tissue_positions_list.csv", b"a second one"),
    ],
)
def test_an_archive_with_one_hostile_member_is_refused_whole(tmp_path, member):
    hostile = archive(("spatial/tissue_positions_list.csv", POSITIONS), member)
    with pytest.raises(UnsafeArchive, match="slice s1"):
        extract_spatial(spatial(tmp_path, hostile), tmp_path / "outs/spatial")
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["spatial.tar.gz"]


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path):
    bomb = archive(("spatial/padding.png", bytes(30_000_000)), ("spatial/tissue_positions_list.csv", POSITIONS))
    with pytest.raises(UnsafeArchive, match="unpacked"):
        extract_spatial(spatial(tmp_path, bomb), tmp_path / "out")
    big = archive(("spatial/tissue_positions_list.csv", POSITIONS * 100))
    with pytest.raises(UnsafeArchive, match="3800 bytes"):
        extract_spatial(spatial(tmp_path, big), tmp_path / "out", max_member=3000)


@pytest.mark.parametrize("at", [0.3, 0.99])
def test_a_truncated_archive_is_unreadable(tmp_path, at):
    with pytest.raises(Unreadable):
        extract_spatial(spatial(tmp_path, SPATIAL[: int(len(SPATIAL) * at)]), tmp_path / "out")


def test_a_corrupt_archive_is_unreadable_even_after_the_members_needed(tmp_path):
    spoilt = bytearray(SPATIAL)
    spoilt[-8] ^= 1  # gzip's checksum
    with pytest.raises(Unreadable):
        extract_spatial(spatial(tmp_path, bytes(spoilt)), tmp_path / "out")
    with pytest.raises(Unreadable):
        extract_spatial(spatial(tmp_path, gzip.compress(b"no tar at all" * 100)), tmp_path / "out")


def test_an_archive_without_positions_says_so(tmp_path):
    with pytest.raises(MissingPositions, match="scalefactors"):
        extract_spatial(spatial(tmp_path, archive(("spatial/scalefactors_json.json", b"{}"))), tmp_path / "out")


# The shipped tables


@pytest.mark.parametrize(("table", "n"), [("visium_human", 15), ("downstream", 13)])
def test_every_row_of_the_shipped_tables_has_a_download_plan_with_a_pinned_matrix(table, n, tmp_path):
    rows = load_catalogue(ROOT / f"catalogue/{table}.tsv")
    assert len(rows) == n
    for one in rows:
        sources = plan(one, tmp_path)
        assert sources[0].pin is not None
        assert sources[0].path.name == "filtered_feature_bc_matrix.h5"
        if one["label_column"]:
            assert sources[-1].role == "labels"
            assert sources[-1].pin is not None


def test_no_pretraining_row_is_an_evaluation_slice():
    train = load_catalogue(ROOT / "catalogue/visium_human.tsv")
    evaluation = load_catalogue(ROOT / "catalogue/downstream.tsv")
    for column in ("slice", "accession", "url", "sha256"):
        assert not {one[column] for one in train} & {one[column] for one in evaluation}
    assert not [one for one in train if "Breast_Cancer_Block_A" in one["url"] or "Targeted" in one["url"]]
    tissues = {split: {one["tissue"] for one in train if one["split"] == split} for split in ("train", "val")}
    assert tissues["val"]
    assert not tissues["train"] & tissues["val"]


def test_every_failure_is_a_slice_error_that_names_its_next_step(server, tmp_path):
    with pytest.raises(SliceError, match=r"slice s1 .*expected .*Next step: ") as failure:
        get(row(server, "/gone.h5ad"), tmp_path)
    assert all(failure.value.as_row().values())
    assert Manners(hosts=frozenset()).attempts > 1
