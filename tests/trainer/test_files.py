"""Seals, full disks, and tars that are hashed: nothing of ours that was damaged or is half there is taken for whole."""

from __future__ import annotations

import errno
import json
import os
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from tests.trainer.conftest import SMALL
from trainer import data, embed, files, pretrain
from trainer.data import Order, Shards
from trainer.errors import ConfigError, DamagedFile, DamagedShards, DiskFull
from trainer.files import as_safetensors, read_sealed, sealed, sha256, write_whole
from trainer.model import load as load_model
from workflow.errors import DamagedFile as DamagedResult
from workflow.reading import read_safetensors, tensors_hold

STEPS = [*SMALL, *"--steps 6 --batch-size 16 --snapshot-every 2 --log-every 2 --val-every 3".split()]


def flip(file: Path, at: int) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_of_every_bit_that_is_flipped_in_a_sealed_file_both_rooms_know():
    tensors = {"X": np.arange(6, dtype=np.float32).reshape(3, 2), "spot": np.arange(3, dtype=np.int32)}
    content = as_safetensors(tensors, {"slice": "a", "genes_sha256": "0" * 64, "format_version": "1"})
    assert sealed(content) is tensors_hold(content) is True
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        flipped = bytes(flipped)
        assert sealed(flipped) is tensors_hold(flipped)
        if sealed(flipped) is None:  # the header is no header any more
            with pytest.raises(SafetensorError):
                load(flipped)
        else:
            assert sealed(flipped) is False


def test_files_from_before_there_were_seals_are_read(tmp_path):
    save_file({"X": np.ones((2, 2), np.float32)}, tmp_path / "x", metadata={"format_version": "1"})
    assert sealed((tmp_path / "x").read_bytes()) is None
    assert load(read_sealed(tmp_path / "x"))["X"].sum() == 4
    assert read_safetensors(tmp_path / "x")[0]["X"].sum() == 4


def test_one_flipped_byte_of_the_weights_stops_the_model_from_being_read(model_folder, tmp_path):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    load_model(folder)
    flip(folder / "model.safetensors", -1)
    with pytest.raises(DamagedFile, match=r"model.safetensors: found other bytes .*sha256.* Next step: restore it"):
        load_model(folder)


@pytest.mark.parametrize(
    ("knob", "value"),
    [("width", "32"), ("depth", None), ("depth", 10**9), ("feed_forward", 2**62), ("feed_forward", 10**15), ("n_genes", 59),
     ("h", {}), ("h", 10**9), ("w", -1), ("m", 1.5), ("unit", 3), ("heads", True)],
)  # fmt: skip
@pytest.mark.parametrize("untrained", [False, True])
def test_a_model_folder_whose_settings_were_changed_is_refused_before_memory_is_taken(
    model_folder, tmp_path, knob, value, untrained
):
    folder = shutil.copytree(model_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config["model"][knob] = value
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match="Next step"):
        load_model(folder, untrained)


def test_one_flipped_byte_of_an_embedding_is_damage_that_names_the_file(tmp_path):
    file = tmp_path / "a.safetensors"
    write_whole(file, as_safetensors({"X": np.ones((2, 2), np.float32), "spot": np.arange(2, dtype=np.int32)}, {}))
    read_safetensors(file)
    flip(file, -1)
    with pytest.raises(DamagedResult, match=f"delete {file} and run again"):
        read_safetensors(file)


def test_one_flipped_byte_of_a_tar_stops_the_run_before_its_first_step(shards, tmp_path, capsys):
    shutil.copytree(shards, tmp_path / "shards")
    tar = tmp_path / "shards/train/train-000003.tar"
    counts = Shards(tmp_path / "shards/train").samples["counts_offset"]
    flip(tar, int(counts[-1]) + 40)
    with pytest.raises(SystemExit) as ended:
        pretrain.main(["--shards", str(tmp_path / "shards/train"), "--out", str(tmp_path / "out"), *STEPS])
    assert str(ended.value).startswith(f"error: {tar}: found sha256 ")
    assert "(index.json). Next step: rebuild the shards" in str(ended.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("key", "value"), [("n_samples", 2**70), ("n_samples", 160.0), ("n_samples", "160"), ("m", 2**40), ("h", True)]
)
def test_an_index_with_impossible_numbers_is_refused(shards, tmp_path, key, value):
    folder = shutil.copytree(shards / "train", tmp_path / "train")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {key: value}))
    with pytest.raises(DamagedShards, match=r"index\.json: found"):
        Shards(folder)


def test_a_list_of_samples_without_a_byte_is_refused_though_its_hash_is_right(shards, tmp_path):
    folder = shutil.copytree(shards / "train", tmp_path / "train")
    (folder / "samples.npy").write_bytes(b"")
    index = json.loads((folder / "index.json").read_text())
    index["samples"]["sha256"] = sha256(folder / "samples.npy")
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedShards, match="samples.npy: found No data left"):
        Shards(folder)


def test_ranks_of_a_machine_share_the_tars_and_leave_none_out(shards, tmp_path):
    folder = shutil.copytree(shards / "train", tmp_path / "train")
    reader = Shards(folder)
    for name in reader.names:
        flip(folder / name, 3 * 512 + 600)
        found = []
        for rank in range(3):
            try:
                reader.check_tars(rank, 3)
            except DamagedShards as error:
                found.append(Path(error.file).name)
        assert found == [name]
        flip(folder / name, 3 * 512 + 600)
    for rank in range(3):
        reader.check_tars(rank, 3)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list open files")
def test_more_tars_than_may_be_mapped_at_once_give_the_same_batches(shards, monkeypatch):
    def batches(reader):
        return [batch.counts for batch in islice(reader.batches(Order(16, 0), workers=2), 12)]

    def open_tars():
        links = (os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
        return sum(os.readlink(link).startswith(str(shards)) for link in links if os.path.lexists(link))

    whole = batches(Shards(shards / "train"))
    monkeypatch.setattr(data, "MAPPED", 2)
    before, reader = open_tars(), Shards(shards / "train")
    assert len(reader.names) == 7
    few = batches(reader)
    assert open_tars() - before <= 2
    assert all(map(torch.equal, whole, few))


@pytest.fixture
def full(monkeypatch):
    """From the call of ``after(n)`` on, the n-th file and those behind it meet a full disk."""
    fsync, left = os.fsync, [10**9]

    def after(n: int) -> None:
        left[0] = n

    def refuse(descriptor: int) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", refuse)
    return after


def test_a_full_disk_is_said_with_its_free_space_and_leaves_nothing_half_written(tmp_path, full):
    (tmp_path / "x").write_bytes(b"before")
    full(0)
    with pytest.raises(DiskFull, match=r"x: found No space left on device, [\d,.]+ MB free; .* Next step: make room"):
        write_whole(tmp_path / "x", b"after")
    assert [file.name for file in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"before"


def test_other_troubles_of_a_disk_are_not_called_a_full_one(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_whole(tmp_path / "no folder/x", b"")


@pytest.mark.parametrize("n", [1, 2])
def test_a_run_that_meets_a_full_disk_goes_on_from_its_snapshot_once_there_is_room(shards, tmp_path, full, n):
    command = ["--shards", str(shards / "train"), *STEPS, "--out"]
    pretrain.main([*command, str(tmp_path / "whole")])
    full(n)
    with pytest.raises(SystemExit) as ended:
        pretrain.main([*command, str(tmp_path / "out")])
    assert "No space left on device" in str(ended.value)
    assert "then the same command again" in str(ended.value)
    assert not (tmp_path / "out/model.safetensors").exists()
    full(10**9)
    pretrain.main([*command, str(tmp_path / "out")])
    resumed = json.loads((tmp_path / "out/config.json").read_text())["run"]["resumed"]
    assert len(resumed) == 1
    assert sha256(tmp_path / "out/model.safetensors") == sha256(tmp_path / "whole/model.safetensors")


def test_metrics_that_meet_a_full_disk_are_told_the_same_way(shards, tmp_path, monkeypatch):
    def write(*_args, **_line):
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr("trainer.progress.Progress._write", write)
    with pytest.raises(SystemExit, match=f"error: {tmp_path}/out: found .*quota.* Next step: make room"):
        pretrain.main(["--shards", str(shards / "train"), *STEPS, "--out", str(tmp_path / "out")])


def test_embedding_onto_a_full_disk_says_so(model_folder, shards, tmp_path, tissue, genes_tsv, full):
    from tests.trainer import corpus

    file = corpus.write_whole(tmp_path / "s.tar", *tissue.slice(8, 8, 3), genes_tsv)
    full(0)
    with pytest.raises(SystemExit, match=r"x.safetensors: found No space left on device"):
        embed.main(["--model", str(model_folder), "--shards", str(file), "--out", str(tmp_path / "x.safetensors")])
    assert not list(tmp_path.glob("x.safetensors*"))
