"""The download rule against a server on loopback that misbehaves in the ways public servers do."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.fetching import (
    BODY,
    POSITIONS,
    SPATIAL,
    WHOLE,
    archive,
    files_below,
    get,
    h5,
    lock,
    row,
    sha256,
    zipped,
)
from workflow.catalogue import load_catalogue
from workflow.download import download, plan
from workflow.errors import (
    CatalogueError,
    DownloadFailed,
    MissingFile,
    RefusedUrl,
    SourceChanged,
    UnknownFormat,
    Unreadable,
)

ROOT = Path(__file__).resolve().parents[2]
FIFTH = len(BODY) // 5


@pytest.fixture
def server(server):
    server.files["/a.h5ad"] = BODY
    return server


def part_of(folder: Path) -> Path:
    return folder / "s1.h5ad.part"


def interrupt(server, folder, at=FIFTH, **columns):
    """Leave a part of `at` bytes behind, as a job that ran out of attempts does."""
    server.script["/a.h5ad"] = [{"cut": at}]
    with pytest.raises(DownloadFailed):
        get(row(server, **columns), folder, attempts=1)
    assert part_of(folder).stat().st_size == at
    assert not (folder / "s1.h5ad").exists()


# What a download leaves behind


def test_a_single_h5ad_is_fetched_and_listed(server, tmp_path):
    listed = download(row(server, sha256=sha256(BODY), bytes=str(len(BODY))), tmp_path, lock(tmp_path))
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY
    assert listed == json.loads((tmp_path / "files.json").read_text())
    path = (tmp_path / "s1.h5ad").as_posix()
    url = server.base + "/a.h5ad"
    entry = {"path": path, "url": url, "bytes": len(BODY), "sha256": sha256(BODY), "role": "slice"}
    assert listed == {"version": 1, "files": [entry], "quarantine": None}
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
    entries = download(wanted, tmp_path, lock(tmp_path))["files"]
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
    download(row(server, sha256=sha256(BODY)), tmp_path, lock(tmp_path))
    assert len(server.seen) == 1
    assert not (tmp_path / "outs/filtered_feature_bc_matrix.h5").exists()


# Interruptions


def test_a_cut_connection_resumes_with_the_missing_range(server, tmp_path):
    server.script["/a.h5ad"] = [{"cut": FIFTH}]
    get(row(server), tmp_path)
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY
    assert server.seen == [("/a.h5ad", None), ("/a.h5ad", f"bytes={FIFTH}-")]
    assert server.sent == [FIFTH, len(BODY) - FIFTH]


def test_connections_cut_at_random_bytes_end_with_the_right_bytes(server, tmp_path):
    cuts = [random.Random(seed).randrange(1, 300_000) for seed in range(5)]
    server.script["/a.h5ad"] = [{"cut": cut} for cut in cuts]
    get(row(server), tmp_path)
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY
    assert sum(server.sent) == len(BODY)  # no byte was sent twice
    assert len(server.requests) == 6


def test_data_that_arrives_wrong_is_asked_for_anew_where_a_digest_tells(server, tmp_path):
    server.script["/a.h5ad"] = [{"cut": FIFTH, "lie": (1000, b"noise on the line")}]
    get(row(server, sha256=sha256(BODY)), tmp_path)
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY
    assert [asked for _, asked in server.seen] == [None, f"bytes={FIFTH}-", None]


def test_a_connection_that_drips_but_is_quick_enough_is_left_alone(server, tmp_path):
    server.always["/a.h5ad"] = {"drip": (100_000, 0.02)}
    get(row(server), tmp_path, patience=0.05, slowest=10_000)
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY
    assert len(server.requests) == 1


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
    server.files["/a.h5ad"] = changed = h5(seed=1)
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
    server.files["/b.h5ad"] = other = h5(seed=2, n=5000)
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


def start(row, folder) -> subprocess.Popen:
    """A download in a process of its own."""
    code = (
        "import json, sys\n"
        "from workflow.download import download\n"
        "from workflow.lock import Lock\n"
        "row, folder, lock = json.loads(sys.argv[1]), *sys.argv[2:]\n"
        "download(row, folder, Lock('s1', lock, []), backoff=0.01)\n"
    )
    record = str(lock(folder).record)
    return subprocess.Popen(
        [sys.executable, "-c", code, json.dumps(row), str(folder), record], env=os.environ | {"PYTHONPATH": str(ROOT)}
    )


def test_a_killed_download_fetches_only_the_missing_range(server, tmp_path):
    server.script["/a.h5ad"] = [{"cut": 3 * FIFTH, "hold": True}]
    job = start(row(server), tmp_path)
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


def test_a_job_that_outlived_its_snakemake_is_waited_for_and_what_it_fetched_is_used(server, tmp_path):
    folder = tmp_path / "s1"
    interrupt(server, folder)
    server.script["/a.h5ad"] = [{"drip": (FIFTH // 2, 0.2)}]
    orphan = start(row(server), folder)
    deadline = time.monotonic() + 15
    while len(server.requests) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    download(row(server), folder, lock(folder))
    assert orphan.wait() == 0
    assert server.seen[1:] == [("/a.h5ad", f"bytes={FIFTH}-")]  # of the orphan; nobody else wrote into its part
    assert (folder / "s1.h5ad").read_bytes() == BODY


def test_a_download_that_is_run_again_asks_for_nothing_that_is_there(server, tmp_path):
    server.files |= {"/x_spatial.tar.gz": SPATIAL, "/x_filtered_feature_bc_matrix.h5": BODY}
    wanted = row(server, "/x_filtered_feature_bc_matrix.h5", "/x_spatial.tar.gz", format="spaceranger")
    folder = tmp_path / "s1"
    listed = download(wanted, folder, lock(folder))
    (folder / "files.json").unlink()  # as Snakemake does before it runs a job again
    assert download(wanted, folder, lock(folder)) == listed == json.loads((folder / "files.json").read_text())
    assert len(server.requests) == 2
    positions = folder / "outs/spatial/tissue_positions_list.csv"
    positions.write_bytes(b"damaged")
    assert download(wanted, folder, lock(folder)) == listed
    assert [path for path, _ in server.seen[2:]] == ["/x_spatial.tar.gz"]
    assert positions.read_bytes() == POSITIONS
    quarantined = download(wanted | {"sha256": "0" * 64}, folder, lock(folder))["quarantine"]
    assert quarantined["code"] == "source_changed"


KILLED_AGAIN_AND_AGAIN = """
import json, os, random, signal, sys, time
from pathlib import Path
from workflow.download import download
from workflow.lock import Lock

row, folder, record = json.loads(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
chance = random.Random(0)
states = []
for kill in range(int(sys.argv[4])):
    job = os.fork()
    if not job:
        download(row, folder, Lock("s1", record, []), backoff=0.01)
        os._exit(0)
    time.sleep(chance.uniform(0, 0.1))
    os.kill(job, signal.SIGKILL)
    os.waitpid(job, 0)
    final = [p for p in folder.rglob("*") if p.is_file() and not p.name.endswith((".part", ".part.json", ".new"))]
    states.append({p.relative_to(folder).as_posix(): p.stat().st_size for p in final})
print(json.dumps(states))
"""


def test_fifty_random_kills_leave_no_partial_file_under_a_final_name(server, tmp_path):
    matrix, spatial, labels = "/n_filtered_feature_bc_matrix.h5", "/n_spatial.tar.gz", "/m.tsv"
    server.files |= {matrix: BODY, spatial: SPATIAL, labels: b"ID\tlayer\nA-1\tL1\n"}
    server.always = {matrix: {"drip": (20_000, 0.03)}, spatial: {"drip": (100, 0.03)}}
    wanted = row(server, matrix, spatial, format="spaceranger", labels=server.base + labels)
    folder = tmp_path / "s1"
    done = subprocess.run(
        [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, json.dumps(wanted), folder, lock(folder).record, "50"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        check=True,
        timeout=60,
    )
    states = json.loads(done.stdout)
    assert len(states) == 50
    server.always = {}
    download(wanted, folder, lock(folder))
    whole = {name: len(data) for name, data in files_below(folder).items()}
    archives = {name for state in states for name in state if name.startswith("archives/")}
    assert {state.get(name, size) for state in states for name, size in whole.items()} == set(whole.values())
    assert {name for state in states for name in state} <= whole.keys() | archives
    assert {state[name] for state in states for name in archives & state.keys()} <= {len(SPATIAL)}
    assert files_below(folder)["outs/filtered_feature_bc_matrix.h5"] == BODY
    assert sum(any("matrix" in name for name in state) for state in states) < 50  # most kills met it unfinished
    ranges = [asked for path, asked in server.seen if path == matrix]
    assert len(set(ranges)) > 10  # and later jobs went on from what was there
    assert ranges.count(None) < len(ranges) / 2


# Busy and failing servers


def test_two_internal_errors_and_then_the_file(server, tmp_path):
    server.script["/a.h5ad"] = [{"status": 500}, {"status": 500}]
    get(row(server), tmp_path)
    assert len(server.seen) == 3
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY


def test_a_server_that_forbids_for_a_while_gives_the_file_in_the_end(server, tmp_path):
    server.script["/a.h5ad"] = [{"status": 403}, {"status": 403}]
    get(row(server), tmp_path)
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
    with pytest.raises(Unreadable, match="expected a whole HDF5 file"):
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
        ({"format": "geo", "url": "https://h/readme.txt"}, MissingFile),
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


# A slice that can't be fetched


@pytest.mark.parametrize(
    ("act", "content", "code"),
    [
        ({"status": 404}, BODY, "missing_file"),
        ({"status": 503}, BODY, "download_failed"),
        ({"status": 429, "headers": {"Retry-After": "9999"}}, BODY, "download_failed"),
        ({"status": 302, "headers": {"Location": "https://evil.example/a.h5ad"}}, BODY, "refused_url"),
        ({"cut": 100}, BODY, "download_failed"),
        ({"drip": (10, 0.05)}, BODY, "download_failed"),
        ({}, BODY[: len(BODY) // 2], "unreadable"),
        ({}, b"<html>login</html>", "unreadable"),
    ],
    ids=["404", "500s", "429", "redirect", "cuts", "drip", "truncated-h5", "page"],
)
def test_a_slice_that_cannot_be_had_is_a_row_that_says_how_to_try_again(server, tmp_path, act, content, code):
    server.always["/a.h5ad"], server.files["/a.h5ad"] = act, content
    manners = {"backoff": 0.001, "attempts": 3, "patience": 0.1, "slowest": 10_000}
    listed = download(row(server), tmp_path, lock(tmp_path), **manners)
    assert listed == json.loads((tmp_path / "files.json").read_text())
    assert listed["files"] == []
    quarantine = listed["quarantine"]
    assert (quarantine["slice"], quarantine["stage"], quarantine["code"]) == ("s1", "download", code)
    assert quarantine["next_step"].endswith(f"; then run again with --forcerun {tmp_path.as_posix()}/files.json")
    assert all(quarantine.values())
    assert not (tmp_path / "s1.h5ad").exists()
    server.always.clear()
    server.files["/a.h5ad"] = BODY
    (tmp_path / "files.json").unlink()
    assert download(row(server), tmp_path, lock(tmp_path))["quarantine"] is None
    assert (tmp_path / "s1.h5ad").read_bytes() == BODY


HOSTILE = archive(*WHOLE, ("../x", b"climbs"))
POSITIONS_GZ = gzip.compress(POSITIONS * 1000)


@pytest.mark.parametrize(
    ("columns", "content", "code"),
    [
        ({"sha256": "0" * 64}, BODY, "source_changed"),
        ({"bytes": "17"}, BODY, "source_changed"),
        ({"url": "/a.tar.gz", "format": "spaceranger"}, HOSTILE, "unsafe_archive"),
        ({"url": "/a.zip", "format": "spaceranger"}, zipped(("bomb.csv", bytes(30_000_000))), "unsafe_archive"),
        ({"url": "/a.tar.gz", "format": "spaceranger"}, archive(*WHOLE)[:-500], "unreadable"),
        ({"url": "/a.zip", "format": "spaceranger"}, zipped(*WHOLE)[:-500], "unreadable"),
        ({"url": "/a.tar.gz", "format": "spaceranger"}, archive(*WHOLE[:3]), "missing_positions"),
        (
            {"url": "/m_filtered_feature_bc_matrix.h5 /m_tissue_positions_list.csv.gz", "format": "geo"},
            POSITIONS_GZ[:-9],
            "unreadable",
        ),
    ],
    ids=["digest", "size", "hostile-tar", "zip-bomb", "cut-tar", "cut-zip", "no-positions", "cut-gzip"],
)
def test_a_slice_whose_files_are_not_what_they_should_be_is_a_row_and_no_file_of_it_is_used(
    server, tmp_path, columns, content, code
):
    paths = columns.get("url", "/a.h5ad").split()
    server.files |= {paths[0]: BODY, paths[-1]: content}
    wanted = row(server, *paths, **{name: value for name, value in columns.items() if name != "url"})
    listed = download(wanted, tmp_path, lock(tmp_path))
    assert listed["quarantine"]["code"] == code
    assert listed["quarantine"]["file"].startswith(server.base)
    assert listed["files"] == []
    assert not list(tmp_path.rglob("*positions*"))


def test_a_mistake_in_the_table_ends_the_job_instead(server, tmp_path):
    with pytest.raises(CatalogueError, match="membr"):
        download(row(server, "/a.zip#membr=x"), tmp_path, lock(tmp_path))
    assert not (tmp_path / "files.json").exists()


# The shipped tables


@pytest.mark.parametrize("table", ["visium_human", "visium_mouse", "downstream"])
def test_every_row_of_the_shipped_tables_has_a_download_plan(table, tmp_path):
    rows = load_catalogue(ROOT / f"catalogue/{table}.tsv")
    assert rows
    for one in rows:
        planned = plan(one, tmp_path)
        roles = [source.role for _, source in planned]
        assert set(roles) <= {"slice", "archive", "listing", "labels"}
        assert roles.count("labels") == one["labels"].startswith("http")


# What the user sees


def test_a_long_download_says_how_far_it_is(server, tmp_path, caplog):
    server.always["/a.h5ad"] = {"drip": (FIFTH, 0.05)}
    with caplog.at_level("INFO", logger="download.progress"):
        get(row(server), tmp_path, report_every=0.08)
    lines = [record.getMessage() for record in caplog.records if record.name == "download.progress"]
    assert lines
    assert all(line.startswith("s1: s1.h5ad 0.") and f"of {len(BODY) / 1e6:.1f} MB, " in line for line in lines)
    assert lines[-1].endswith("s left")
