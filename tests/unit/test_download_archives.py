"""Members of archives from elsewhere: the strict reader, and one archive that holds a whole slice."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.unit.fetching import BODY, PLACES, POSITIONS, SPATIAL, WHOLE, archive, files_below, get, lock, row, zipped
from workflow.archives import Limits, extract, names_in, spans_in
from workflow.download import download, unpack
from workflow.errors import MissingFile, MissingPositions, UnknownFormat, Unreadable, UnsafeArchive
from workflow.transfer import Source


def kept(tmp_path, data: bytes, name: str = "spatial.tar.gz") -> Source:
    path = tmp_path / name
    path.write_bytes(data)
    return Source("s1", f"https://h/x_{name}", path, "archive")


def take(archive: Source, folder: Path, *patterns: str, format: str = "spaceranger") -> list[dict]:
    return unpack(archive, patterns, {"slice": "s1", "format": format}, folder)


def special(name: str, kind: bytes, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


@pytest.mark.parametrize(
    "member",
    [
        ("/etc/cron.d/x", b"absolute"),
        ("spatial/../../x", b"climbs"),
        ("spatial\\..\\x", b"climbs on Windows"),
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
        take(kept(tmp_path, hostile), tmp_path)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["spatial.tar.gz"]


def link_in_a_zip() -> zipfile.ZipInfo:
    info = zipfile.ZipInfo("spatial/tissue_positions.csv")
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


def encrypted() -> bytes:
    """The flag that says so, set in both of its places."""
    data = bytearray(zipped(("a.csv", b"x")))
    data[6] |= 1
    data[data.index(b"PK\x01\x02") + 8] |= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (zipped(("../x", b"climbs")), r"\.\."),
        (zipped(("/etc/cron.d/x", b"absolute")), "cron"),
        (zipped((link_in_a_zip(), b"/etc/passwd")), "link"),
        (zipped(("bomb.csv", bytes(30_000_000))), "unpacked"),
        (encrypted(), "encrypted"),
    ],
)
def test_a_hostile_zip_is_refused_whole(tmp_path, data, reason):
    with pytest.raises(UnsafeArchive, match=reason):
        names_in(kept(tmp_path, data, "a.zip"))


def test_members_of_a_zip_that_lie_over_each_other_are_refused(tmp_path):
    data = bytearray(zipped(("a.csv", os.urandom(5000)), ("b.csv", os.urandom(5000)), ("c.csv", b"c")))
    first = data.index(b"PK\x01\x02")
    second = data.index(b"PK\x01\x02", first + 4)
    data[first + 20 : first + 24] = data[second + 20 : second + 24] = (5600).to_bytes(4, "little")
    with pytest.raises(UnsafeArchive, match="side by side"):
        names_in(kept(tmp_path, bytes(data), "a.zip"))


def test_a_zip_member_with_a_wrong_checksum_is_unreadable_and_not_kept(tmp_path):
    data = bytearray(zipped(("spatial/tissue_positions.csv", POSITIONS)))
    data[data.index(b"PK\x01\x02") + 16] ^= 1
    with pytest.raises(Unreadable, match="CRC"):
        take(kept(tmp_path, bytes(data), "spatial.zip"), tmp_path)
    assert not list(tmp_path.rglob("*.csv"))


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path):
    bomb = archive(("spatial/padding.png", bytes(30_000_000)), ("spatial/tissue_positions_list.csv", POSITIONS))
    with pytest.raises(UnsafeArchive, match="unpacked"):
        take(kept(tmp_path, bomb), tmp_path)
    big = kept(tmp_path, archive(("spatial/tissue_positions_list.csv", POSITIONS * 100)))
    with pytest.raises(UnsafeArchive, match="3800 bytes"):
        extract(big, {"spatial/tissue_positions_list.csv": tmp_path / "x.csv"}, Limits(member=3000))
    with pytest.raises(UnsafeArchive, match="more than 1 members"):
        names_in(kept(tmp_path, SPATIAL), Limits(count=1))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_too_long_to_be_held_in_memory_is_refused_before_it_is_read(tmp_path, kind):
    info = special("x", kind)
    info.size = 50 << 30
    claimed = info.tobuf(format=tarfile.GNU_FORMAT) + bytes(10_000)
    with pytest.raises(UnsafeArchive, match=f"a header of {50 << 30} bytes"):
        names_in(kept(tmp_path, gzip.compress(claimed)))
    with pytest.raises(UnsafeArchive, match=f"a header of {50 << 30} bytes"):
        spans_in(Source("s1", "https://h/x.tar", Path()), io.BytesIO(claimed))


@pytest.mark.parametrize("at", [0.3, 0.99])
def test_a_truncated_archive_is_unreadable(tmp_path, at):
    with pytest.raises(Unreadable):
        take(kept(tmp_path, SPATIAL[: int(len(SPATIAL) * at)]), tmp_path)
    whole = zipped(("spatial/tissue_positions.csv", POSITIONS))
    with pytest.raises(Unreadable):
        take(kept(tmp_path, whole[: int(len(whole) * at)], "spatial.zip"), tmp_path)


def test_a_corrupt_archive_is_unreadable_even_after_the_members_needed(tmp_path):
    spoilt = bytearray(SPATIAL)
    spoilt[-8] ^= 1  # gzip's checksum
    with pytest.raises(Unreadable):
        take(kept(tmp_path, bytes(spoilt)), tmp_path)
    with pytest.raises(Unreadable):
        take(kept(tmp_path, gzip.compress(b"no tar at all" * 100)), tmp_path)


def test_an_archive_without_positions_says_so(tmp_path):
    with pytest.raises(MissingPositions, match="scalefactors"):
        take(kept(tmp_path, archive(("spatial/scalefactors_json.json", b"{}"))), tmp_path)


def test_a_packed_member_that_is_a_bomb_of_its_own_is_refused(tmp_path):
    mex = archive(
        ("S/filtered_feature_bc_matrix/matrix.mtx.gz", gzip.compress(bytes(30_000_000))),
        ("S/filtered_feature_bc_matrix/barcodes.tsv.gz", gzip.compress(b"A-1\n")),
        ("S/filtered_feature_bc_matrix/features.tsv.gz", gzip.compress(b"ENSG1\tX\tGene Expression\n")),
        ("S/spatial/tissue_positions_list.csv", POSITIONS),
    )
    with pytest.raises(UnsafeArchive, match="matrix.mtx.gz"):
        take(kept(tmp_path, mex, "archive.tar.gz"), tmp_path)


@pytest.mark.parametrize("name", ["/S1.tar.gz", "/records/1/files/S1.zip/content"])
@pytest.mark.parametrize("patterns", ["", "member=*/filtered_feature_bc_matrix.h5&member=*/spatial/*"])
def test_one_archive_that_holds_a_whole_slice_gives_what_the_reader_needs(server, tmp_path, name, patterns):
    server.files[name] = data = archive(*WHOLE) if name.endswith(".gz") else zipped(*WHOLE)
    pin = "md5=" + hashlib.md5(data).hexdigest()
    address = f"{server.base}{name}#{pin}{'&' + patterns if patterns else ''}"
    listed = download(row(server, format="spaceranger", url=address), tmp_path / "s1", lock(tmp_path))
    assert listed["quarantine"] is None
    assert files_below(tmp_path / "s1").keys() == {"files.json", *PLACES}
    assert {k: v for k, v in files_below(tmp_path / "s1").items() if k != "files.json"} == PLACES
    assert {entry["member"] for entry in listed["files"]} == {f"S1/{place}" for place in PLACES}


@pytest.mark.parametrize("pinned", [True, False])
def test_an_h5ad_and_its_labels_come_out_of_one_archive_that_is_fetched_once(server, tmp_path, pinned):
    labels = b"Barcode,manual-anno\nA-1,follicle\n"
    server.files["/d.zip"] = data = zipped(
        ("D/A1/adata_RNA.h5ad", BODY), ("D/A1/annotation.csv", labels), ("D/x", b"x")
    )
    pin = f"md5={hashlib.md5(data).hexdigest()}&" if pinned else ""
    address = f"{server.base}/d.zip#{pin}member="
    wanted = row(server, url=address + "*/A1/adata_RNA.h5ad", labels=address + "D/A1/annotation.csv")
    for name in ("one", "two"):  # two slices of one archive
        entries = get(wanted, tmp_path / name, shared=tmp_path / "archives")
        assert files_below(tmp_path / name) == {"s1.h5ad": BODY, "labels.csv": labels}
        assert [(entry["role"], entry["member"]) for entry in entries] == [
            ("slice", "D/A1/adata_RNA.h5ad"),
            ("labels", "D/A1/annotation.csv"),
        ]
    assert len(server.requests) == 1


def test_matrix_and_positions_may_be_taken_from_two_archives(server, tmp_path):
    server.files |= {"/m.zip": zipped(*WHOLE), "/p.tar.gz": archive(*WHOLE)}
    wanted = row(
        server,
        "/m.zip#member=*/outs/filtered_feature_bc_matrix.h5",
        "/p.tar.gz#member=*/spatial/*",
        format="spaceranger",
    )
    assert download(wanted, tmp_path / "s1", lock(tmp_path))["quarantine"] is None
    assert {k: v for k, v in files_below(tmp_path / "s1").items() if k != "files.json"} == PLACES


def test_a_pattern_without_a_match_and_an_ambiguous_one_are_refused(server, tmp_path):
    server.files["/d.zip"] = zipped(("a.h5ad", BODY), ("b.h5ad", BODY))
    with pytest.raises(MissingFile, match=r"no member 'c\.h5ad' among 2: a\.h5ad, b\.h5ad"):
        get(row(server, "/d.zip#member=c.h5ad"), tmp_path)
    with pytest.raises(UnknownFormat, match="2 members"):
        get(row(server, "/d.zip#member=*.h5ad"), tmp_path)
