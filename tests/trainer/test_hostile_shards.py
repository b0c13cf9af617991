"""Shards from somebody who means ill, or that a disk has spoiled: refused with their name and where in them."""

from __future__ import annotations

import gzip
import hashlib
import json
import pickle
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer import corpus
from tests.trainer.conftest import SMALL
from trainer import pretrain
from trainer.data import Order, Shards
from trainer.errors import ConfigError, DamagedShards
from trainer.stream import Stream


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


def copy_of(shards: Path, folder: Path) -> Path:
    """The training shards, to damage."""
    return shutil.copytree(shards / "train", folder / "train")


def overwrite(reader: Shards, row: int, part: str, at: int, content: bytes) -> None:
    """Bytes of a sample's member, counted from the begin of its data (headers lie at -512)."""
    sample = reader.samples[row]
    with open(reader.folder / reader.names[sample["shard"]], "r+b") as tar:
        tar.seek(int(sample[f"{part}_offset"]) + at)
        tar.write(content)


def members_of(tar: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(tar) as opened:
        return [(member.name, opened.extractfile(member).read()) for member in opened]


def replace(folder: Path, name: str, content: bytes) -> None:
    """Put another tar in place and make the index vouch for it, as whoever made both would."""
    (folder / name).write_bytes(content)
    index = json.loads((folder / "index.json").read_text())
    for shard in index["shards"]:
        if shard["name"] == name:
            shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (folder / "index.json").write_text(json.dumps(index))


def rewritten(tar: Path, members: list[tuple[str, bytes]]) -> bytes:
    corpus.write_tar(tar, members)
    return tar.read_bytes()


def shift(folder: Path, shard: int, after: int, by: int) -> None:
    """Move the offsets that ``samples.npy`` has behind a byte of a shard."""
    samples = np.load(folder / "samples.npy")
    for part in ("counts", "sites", "json"):
        offsets = samples[f"{part}_offset"]
        offsets[(samples["shard"] == shard) & (offsets > after)] += by
    np.save(folder / "samples.npy", samples)
    index = json.loads((folder / "index.json").read_text())
    index["samples"]["sha256"] = hashlib.sha256((folder / "samples.npy").read_bytes()).hexdigest()
    (folder / "index.json").write_text(json.dumps(index))


@pytest.fixture
def folder(shards, tmp_path):
    return copy_of(shards, tmp_path)


def stream_all(folder):
    return list(islice(Stream(folder).batches(Order(40, 0)), 4))


NAME = "train-000001.tar"


@pytest.mark.parametrize("name", ["evil.pkl", "../../evil.json", "/etc/evil.json", "train0_000000.pkl"])
def test_a_member_that_no_sample_has_is_refused_by_name_and_offset(folder, tmp_path, name):
    """Both where the index does not know it and where offsets leave room for it; nothing is unpickled or written."""
    sign = tmp_path / "unpickled"
    members = members_of(folder / NAME)
    at = 6  # behind two samples
    hostile = [*members[:at], (name, pickle.dumps(Bomb(sign))), *members[at:]]
    replace(folder, NAME, rewritten(folder / NAME, hostile))
    with tarfile.open(folder / NAME) as tar:
        header = tar.getmember(name).offset
    with pytest.raises(DamagedShards, match=f"{NAME}: found (no )?member .* at byte {header}"):
        Shards(folder)
    shift(folder, shard=1, after=header, by=1024)
    with pytest.raises(
        DamagedShards, match=f"{NAME}: found member '{name}' of size '[0-7]*' at byte {header}; expected"
    ):
        Shards(folder)
    with pytest.raises(DamagedShards, match=f"{NAME}, byte [0-9]+: found member '{name}'"):
        stream_all(folder)
    assert not sign.exists()
    assert not list(tmp_path.rglob("*evil*"))


def test_a_member_behind_the_last_sample_is_refused(folder):
    members = members_of(folder / NAME)
    replace(folder, NAME, rewritten(folder / NAME, [*members, ("evil.pkl", b"x")]))
    with pytest.raises(DamagedShards, match=f"{NAME}: found member 'evil.pkl' of size '0*1' at byte"):
        Shards(folder)


@pytest.mark.parametrize("part", ["counts", "sites"])
@pytest.mark.parametrize("size", [b"00000000001", b"77777777777", b"not a size!"])
def test_a_header_that_lies_about_its_size_is_refused_with_its_offset(folder, part, size):
    reader = Shards(folder)
    row = int(np.flatnonzero(reader.samples["shard"] == 1)[3])
    overwrite(reader, row, part, 124 - 512, size)
    offset = int(reader.samples[row][f"{part}_offset"]) - 512
    with pytest.raises(
        DamagedShards, match=f"{NAME}: found member .*{part}.blosc' of size .* at byte {offset}; expected"
    ):
        Shards(folder).read(np.array([row]), np.array([0]), 0)
    content = (folder / NAME).read_bytes()
    replace(folder, NAME, content)
    with pytest.raises(DamagedShards, match=f"{NAME}"):
        stream_all(folder)


def test_a_header_with_another_name_is_refused(folder):
    reader = Shards(folder)
    row = int(np.flatnonzero(reader.samples["shard"] == 1)[3])
    overwrite(reader, row, "sites", -512, b"../../../etc/passwd\0")
    with pytest.raises(DamagedShards, match=r"found member '\.\./\.\./\.\./etc/passwd'.* at byte"):
        Shards(folder).read(np.array([row]), np.array([0]), 0)


def test_the_error_of_a_hostile_shard_ends_the_run_with_one_line(folder, tmp_path):
    reader = Shards(folder)
    overwrite(reader, 5, "counts", -512, b"evil.pkl\0")
    flags = [*SMALL, "--steps", "5", "--check-tars", "off"]  # whoever means ill mends the hash, too
    with pytest.raises(SystemExit, match="^error: .*found member 'evil.pkl'"):
        pretrain.main(["--shards", str(folder), "--out", str(tmp_path / "out"), *flags])


@pytest.mark.parametrize("cut", [1, 512, 10240, 40000])
def test_a_truncated_shard_is_refused(folder, cut):
    content = (folder / NAME).read_bytes()[:-cut]
    (folder / NAME).write_bytes(content)
    with pytest.raises(DamagedShards, match=f"{NAME}: found {len(content)} bytes; expected"):
        Shards(folder)
    with pytest.raises(DamagedShards, match=f"{NAME}, byte [0-9]+: found"):
        stream_all(folder)
    if cut > 10240:  # beyond the padding, and the index agrees
        replace(folder, NAME, content)
        with pytest.raises(DamagedShards, match=f"{NAME}: found .* at byte [0-9]+"):
            Shards(folder)


def test_a_sample_beyond_the_end_of_its_shard_is_refused(folder):
    shift(folder, shard=1, after=1000, by=2**40)
    with pytest.raises(DamagedShards, match=f"{NAME}: found .* at byte"):
        Shards(folder)


@pytest.mark.parametrize(
    ("part", "name"),
    [("genes", "../genes.tsv"), ("samples", "/etc/passwd"), ("shards", "../../x.tar"), ("slices", "a/b")],
)
def test_an_index_that_names_files_elsewhere_is_refused(folder, part, name):
    index = json.loads((folder / "index.json").read_text())
    if part in ("genes", "samples"):
        index[part]["file"] = name
    else:
        index[part][0][{"shards": "name", "slices": "slice"}[part]] = name
    (folder / "index.json").write_text(json.dumps(index))
    for reader in (Shards, Stream):
        with pytest.raises(DamagedShards, match=f"index.json: found the name '{name}'"):
            reader(folder)


def test_a_compressed_shard_is_refused_before_it_is_unpacked(folder):
    replace(folder, NAME, gzip.compress((folder / NAME).read_bytes()))
    with pytest.raises(DamagedShards, match=f"{NAME}, byte 0: found no plain tar"):
        stream_all(folder)


def test_a_shard_of_another_content_is_known_by_its_hash(folder):
    reader = Shards(folder)
    row = int(np.flatnonzero(reader.samples["shard"] == 1)[3])
    overwrite(reader, row, "json", 0, b"{ ")
    with pytest.raises(DamagedShards, match=f"{NAME}, byte [0-9]+: found sha256"):
        stream_all(folder)


@pytest.mark.parametrize(
    "address",
    ["pipe:cat /etc/passwd", "ftp://example.org/train", "ais://bucket/train", "htgs://x/y", "data:text/plain,x"],
)
def test_no_other_scheme_than_http_and_files_is_opened(tmp_path, address):
    with pytest.raises(ConfigError, match="found the scheme .*; expected http, https or a path"):
        Stream(address)


def test_webdatasets_own_openers_and_environment_are_out_of_reach(folder, tmp_path, monkeypatch):
    """``GOPEN_REWRITE`` would send it elsewhere."""

    def refuse(*_, **__):
        raise AssertionError("webdataset opened something")

    monkeypatch.setenv("GOPEN_REWRITE", f"{folder}=pipe:touch {tmp_path / 'owned'}")
    monkeypatch.setenv("WDS_REWRITE", f"{folder}=pipe:touch {tmp_path / 'owned'}")
    monkeypatch.setattr(sys.modules["webdataset.gopen"], "gopen", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    assert sum(len(batch) for batch in stream_all(folder)) == 160
    assert not (tmp_path / "owned").exists()


def test_a_stream_gives_every_sample_once_an_epoch_as_the_index_has_them(shards, folder):
    reader, order = Shards(folder), Order(48, 3)
    batches = list(islice(Stream(folder).batches(order), 8))
    stored = reader.read(np.arange(160), np.arange(160), 0)
    names = {counts.numpy().tobytes(): row for row, counts in enumerate(stored.counts)}
    for epoch in (0, 1):
        rows = [names[c.numpy().tobytes()] for batch in batches if batch.epoch == epoch for c in batch.counts]
        assert sorted(rows) == [*range(160)]
        assert rows != [*range(160)]
    for batch in batches:
        rows = [names[counts.numpy().tobytes()] for counts in batch.counts]
        assert torch.equal(batch.genes, stored.genes[rows])
        assert torch.equal(batch.totals, stored.totals[rows])


@pytest.mark.parametrize("workers", [0, 2])
def test_a_stream_goes_on_from_the_samples_consumed_and_is_shared_by_ranks(folder, workers):
    whole = list(islice(Stream(folder).batches(Order(48, 3)), 8))
    consumed = sum(len(batch) for batch in whole[:6])
    shares = [list(islice(Stream(folder).batches(Order(48, 3, rank=r, ranks=2), consumed, workers), 2)) for r in (0, 1)]
    for i, batch in enumerate(whole[6:]):
        for rank in (0, 1):
            assert torch.equal(shares[rank][i].counts, batch.counts[rank::2])
            assert torch.equal(shares[rank][i].positions, batch.positions[rank::2])
            assert shares[rank][i].epoch == batch.epoch == 1


def test_shards_on_a_web_server_train_the_model_that_the_same_folder_does(shards, tmp_path, server):
    for split in ("train", "val"):
        for file in (shards / split).iterdir():
            server.files[f"/{split}/{file.name}"] = file.read_bytes()
    flags = [*SMALL, *"--reader webdataset --steps 6 --batch-size 48 --lr 1e-3 --val-every 3".split()]
    for name, base in (("web", server.base), ("folder", shards)):
        addresses = ["--shards", f"{base}/train", "--val-shards", f"{base}/val"]
        pretrain.main([*addresses, "--out", str(tmp_path / name), *flags])
    web, local = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("web", "folder"))
    assert web == local
    assert json.loads((tmp_path / "web/config.json").read_text())["train"]["reader"] == "webdataset"


def test_a_server_that_speaks_nonsense_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer():
            with listener.accept()[0] as caller:
                caller.recv(1000)
                caller.sendall(b"good morning\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(DamagedShards, match="index.json: found good morning; expected the file"):
            Stream(f"http://127.0.0.1:{listener.getsockname()[1]}/train")
        thread.join()


def test_a_server_that_sends_elsewhere_or_less_is_refused(shards, server):
    for file in (shards / "train").iterdir():
        server.files[f"/train/{file.name}"] = file.read_bytes()
    server.always["/train/genes.tsv"] = {"status": 302, "headers": {"Location": "file:///etc/passwd"}}
    with pytest.raises(DamagedShards, match="genes.tsv: found .*; expected the file"):
        Stream(f"{server.base}/train")
    del server.always["/train/genes.tsv"]
    server.files["/train/train-000003.tar"] = server.files["/train/train-000003.tar"][:-20480]
    with pytest.raises(DamagedShards, match="train-000003.tar, byte [0-9]+: found"):
        stream_all(f"{server.base}/train")
    del server.files["/train/index.json"]
    with pytest.raises(DamagedShards, match="index.json: found .*404"):
        Stream(f"{server.base}/train")
