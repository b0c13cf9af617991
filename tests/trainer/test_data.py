"""The reader: what it gives back, in which order, and what it refuses."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch

from tests.trainer import corpus
from trainer.data import Shards, Vocabulary, order
from trainer.errors import DamagedShards, VocabularyMismatch


@pytest.fixture
def copy(shards, tmp_path):
    """A copy of the training shards to damage."""
    return shutil.copytree(shards / "train", tmp_path / "train")


def rewrite_index(folder, **changes):
    file = folder / "index.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rehash(folder, part):
    index = json.loads((folder / "index.json").read_text())
    file = folder / index[part]["file"]
    rewrite_index(folder, **{part: index[part] | {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}})


def test_samples_hold_the_counts_of_their_slice(shards, train_slices):
    reader = Shards(shards / "train")
    assert len(reader) == 160
    for row in range(0, 160, 7):
        batch = reader.read(np.array([row]), np.array([row]), epoch=0)
        sample = reader.samples[row]
        begin, nbytes = int(sample["json_offset"]), int(sample["json_nbytes"])
        facts = json.loads(reader.tars[sample["shard"]][begin : begin + nbytes])
        counts, totals, _ = train_slices[sample["slice"]]
        crop = np.s_[facts["y"] : facts["y"] + 6, facts["x"] : facts["x"] + 5]
        genes = batch.genes[0].numpy()
        assert np.array_equal(batch.counts[0].numpy(), counts[genes][(slice(None), *crop)])
        assert np.array_equal(batch.totals[0].numpy(), totals[crop])
        assert batch.counts.dtype == torch.uint16


def test_an_epoch_holds_every_sample_once_and_the_next_one_in_another_order(shards):
    reader = Shards(shards / "train")
    n = len(reader)
    plan = list(islice(reader._plan(7, seed=4, consumed=0), 2 * -(-n // 7)))
    epochs = [[row for rows, _, epoch in plan for row in rows if epoch == wanted] for wanted in (0, 1)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(n))] * 2
    assert epochs[0] != epochs[1]
    assert epochs[0] == order(n, 4, 0).tolist()
    sizes = Counter(len(rows) for rows, _, _ in plan)
    assert sizes == {7: 2 * (n // 7), n % 7: 2}  # the last batch of an epoch is smaller
    assert all(np.array_equal(order(n, 4, epoch)[positions], rows) for rows, positions, epoch in plan)


def test_the_order_depends_on_seed_and_epoch_alone():
    assert np.array_equal(order(1000, 1, 2), order(1000, 1, 2))
    assert not np.array_equal(order(1000, 1, 2), order(1000, 2, 1))
    firsts = [order(8, seed, epoch)[0] for seed in range(20) for epoch in range(20)]
    counts = np.bincount(firsts, minlength=8)
    assert ((counts - 50) ** 2 / 50).sum() < 24.3  # chi-square, 7 degrees of freedom, p = .001


@pytest.mark.parametrize("workers", [1, 3])
def test_the_state_is_the_number_of_samples_consumed(shards, workers):
    reader = Shards(shards / "train")
    whole = list(islice(reader.batches(9, seed=1, workers=workers), 40))  # into the third epoch
    consumed = 0
    for i in range(40):
        if i in (1, 17, 18, 30):
            resumed = next(iter(reader.batches(9, seed=1, consumed=consumed, workers=workers)))
            assert resumed.epoch == whole[i].epoch
            for name in ("counts", "genes", "totals", "positions"):
                assert torch.equal(getattr(resumed, name), getattr(whole[i], name))
        consumed += len(whole[i])
    assert whole[-1].epoch == 2


def test_an_empty_split_has_no_samples(tmp_path):
    folder = corpus.write_split(tmp_path / "val", "val", [], b"# stpatch genes 1\nindex\tgene_id\tmean\n", 0, 3, 4, 4)
    assert len(Shards(folder)) == 0


@pytest.mark.parametrize("name", ["index.json", "samples.npy", "genes.tsv", "train-000001.tar"])
def test_a_missing_file_is_named(copy, name):
    (copy / name).unlink()
    with pytest.raises(DamagedShards, match=name):
        Shards(copy)


@pytest.mark.parametrize("name", ["samples.npy", "genes.tsv"])
def test_a_changed_file_is_named(copy, name):
    content = bytearray((copy / name).read_bytes())
    content[-2] ^= 1
    (copy / name).write_bytes(content)
    with pytest.raises(DamagedShards, match=f"{name}: found [0-9a-f]{{64}}; expected sha256 .*Next step"):
        Shards(copy)


def test_a_tar_that_was_cut_is_named_with_both_sizes(copy):
    tar = copy / "train-000002.tar"
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(DamagedShards, match=f"train-000002.tar: found {size - 512} bytes; expected {size} bytes"):
        Shards(copy)


def test_a_tar_of_the_right_size_with_other_samples_is_named(copy):
    tar = copy / "train-000002.tar"
    tar.write_bytes(b"\0" * tar.stat().st_size)
    with pytest.raises(DamagedShards, match="train-000002.tar: found .*not a sample's JSON"):
        Shards(copy)


def test_a_sample_that_does_not_decode_is_named(copy):
    reader = Shards(copy)
    sample = reader.samples[3]
    tar = copy / reader.names[sample["shard"]]
    content = bytearray(tar.read_bytes())
    content[int(sample["counts_offset"]) + 4] ^= 0xFF
    tar.write_bytes(content)
    with pytest.raises(DamagedShards, match=f"{tar.name}, sample 3: found a Blosc buffer"):
        Shards(copy).read(np.array([3]), np.array([3]), 0)
    with pytest.raises(DamagedShards, match=f"{tar.name}, sample 3"):
        list(islice(Shards(copy).batches(160, seed=0), 1))  # the error reaches the loop through the threads


def test_an_unknown_version_is_refused(copy):
    rewrite_index(copy, format_version=2)
    with pytest.raises(DamagedShards, match="index.json: found format_version 2; expected 1"):
        Shards(copy)


@pytest.mark.parametrize("key", ["allow_contamination", "pitch_um"])
def test_an_index_that_lacks_a_fact_is_refused(copy, key):
    index = json.loads((copy / "index.json").read_text())
    del index[key]
    (copy / "index.json").write_text(json.dumps(index))
    with pytest.raises(DamagedShards, match=f"index.json: found no .'{key}'.; expected a complete index"):
        Shards(copy)
    del index["slices"][2]["layout"]
    (copy / "index.json").write_text(json.dumps(index | {key: 0}))
    with pytest.raises(DamagedShards, match="found no .'slices: layout'."):
        Shards(copy)


def test_the_facts_tell_layout_and_pitch_of_every_slice(shards):
    facts = Shards(shards / "train").facts()
    assert (facts["layout"], facts["pitch_um"], facts["allow_contamination"]) == ("auto", 100, False)
    assert [(row["layout"], row["pitch_um"]) for row in facts["slices"]] == [("offset", 100.0)] * 4


def test_an_index_that_promises_more_samples_is_refused(copy):
    rewrite_index(copy, n_samples=161)
    with pytest.raises(DamagedShards, match="samples.npy: found 160 samples.*expected 161"):
        Shards(copy)


def test_an_array_that_needs_pickle_is_refused(copy):
    np.save(copy / "samples.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    rehash(copy, "samples")
    with pytest.raises(DamagedShards, match="samples.npy: found .*allow_pickle=False"):
        Shards(copy)


def test_gene_indices_beyond_the_vocabulary_are_refused(copy):
    lines = (copy / "genes.tsv").read_text().splitlines(keepends=True)
    (copy / "genes.tsv").write_text("".join(lines[:12]))  # ten genes
    rehash(copy, "genes")
    with pytest.raises(DamagedShards, match="ascending gene indices below 10"):
        Shards(copy).read(np.arange(5), np.arange(5), 0)


def test_splits_of_two_vocabularies_do_not_go_together(copy, shards):
    text = (copy / "genes.tsv").read_text().replace("ENSG00000000000", "ENSG99999999999")
    (copy / "genes.tsv").write_text(text)
    rehash(copy, "genes")
    with pytest.raises(VocabularyMismatch, match="genes ="):
        Shards(copy).check_matches(Shards(shards / "val"))
    Shards(shards / "train").check_matches(Shards(shards / "val"))


def test_a_vocabulary_of_another_version_is_refused(tmp_path):
    (tmp_path / "genes.tsv").write_text("# stpatch genes 7\nindex\tgene_id\tmean\n")
    with pytest.raises(DamagedShards, match="genes 7"):
        Vocabulary.read(tmp_path / "genes.tsv")
