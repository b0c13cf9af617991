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
from trainer.data import Order, Shards, Vocabulary, lattice_lines
from trainer.errors import DamagedShards, VocabularyMismatch
from trainer.stream import Stream


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
        facts = json.loads(reader.tar(int(sample["shard"]))[begin : begin + nbytes])
        counts, totals, _ = train_slices[sample["slice"]]
        crop = np.s_[facts["y"] : facts["y"] + 6, facts["x"] : facts["x"] + 5]
        genes = batch.genes[0].numpy()
        assert np.array_equal(batch.counts[0].numpy(), counts[genes][(slice(None), *crop)])
        assert np.array_equal(batch.totals[0].numpy(), totals[crop])
        assert batch.counts.dtype == torch.uint16


def rows_of(order, n, epoch):
    """The order of an epoch where all samples lie in one shard."""
    return order.rows(np.zeros(n, int), 1, epoch)


def test_an_epoch_holds_every_sample_once_and_the_next_one_in_another_order():
    n, order = 160, Order(7, seed=4)
    steps = list(islice(order.steps(n, 0), 2 * -(-n // 7)))
    for epoch in (0, 1):
        positions = np.concatenate([some for of, some in steps if of == epoch])
        assert np.array_equal(positions, np.arange(n))
        assert sorted(rows_of(order, n, epoch)) == [*range(n)]
    assert not np.array_equal(rows_of(order, n, 0), rows_of(order, n, 1))
    assert Counter(len(positions) for _, positions in steps) == {
        7: 2 * (n // 7),
        n % 7: 2,
    }  # an epoch's last is smaller


def test_the_order_depends_on_seed_and_epoch_alone():
    assert np.array_equal(rows_of(Order(8, 1), 1000, 2), rows_of(Order(5, 1, rank=1, ranks=3), 1000, 2))
    assert not np.array_equal(rows_of(Order(8, 1), 1000, 2), rows_of(Order(8, 2), 1000, 1))
    firsts = [rows_of(Order(8, seed), 8, epoch)[0] for seed in range(20) for epoch in range(20)]
    counts = np.bincount(firsts, minlength=8)
    assert ((counts - 50) ** 2 / 50).sum() < 24.3  # chi-square, 7 degrees of freedom, p = .001


def test_blocks_shuffle_a_few_shards_at_a_time_and_another_few_each_epoch():
    shard = np.repeat(np.arange(10), 40)
    order = Order(8, 1, shuffle="block", block_shards=3)
    blocks = []
    for epoch in (0, 1):
        rows = order.rows(shard, 10, epoch)
        assert sorted(rows) == [*range(400)]
        of = [sorted({*shard[rows[begin : begin + 120]].tolist()}) for begin in range(0, 400, 120)]
        assert [len(shards) for shards in of] == [3, 3, 3, 1]
        blocks.append(of)
        first = shard[rows[:120]]
        assert np.count_nonzero(np.diff(first)) > 60  # the three are mixed, not one behind the other
    assert blocks[0] != blocks[1]


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_state_is_the_number_of_samples_consumed(shards, workers):
    reader, order = Shards(shards / "train"), Order(9, 1)
    whole = list(islice(reader.batches(order, workers=workers), 40))  # into the third epoch
    consumed = 0
    for i in range(40):
        if i in (1, 17, 18, 30):
            resumed = next(iter(reader.batches(order, consumed, workers)))
            assert resumed.epoch == whole[i].epoch
            for name in ("counts", "genes", "totals", "positions"):
                assert torch.equal(getattr(resumed, name), getattr(whole[i], name))
        consumed += len(whole[i])
        assert consumed == order.after(160, consumed - len(whole[i]))
    assert whole[-1].epoch == 2


def test_coordinates_come_with_the_batch_where_they_are_asked_for(shards):
    reader = Shards(shards / "train")
    assert reader.read(np.array([3]), np.arange(1), 0).rows is None
    reader.coordinates = True
    batch = reader.read(np.array([3, 90]), np.arange(2), 0)
    for i, row in enumerate((3, 90)):
        facts = json.loads(bytes(reader.member(row, "json")))
        assert batch.rows[i].tolist() == [y + (facts["y"] + facts["x"]) % 2 for y in facts["array_rows"]]
        assert batch.cols[i].tolist() == facts["array_cols"]
    assert batch.layouts.tolist() == [0, 0]
    assert batch.rows.dtype == batch.cols.dtype == torch.int32


def test_rows_count_one_more_on_an_odd_lattice_and_padding_stays():
    facts = {"array_rows": [4, 5, -1], "array_cols": [2, -1], "array_row": 4, "layout": "offset"}
    for col, expected in ((4, [4, 5, -1]), (5, [5, 6, -1])):
        rows, cols, layout = lattice_lines(facts | {"array_col": col})
        assert (rows.tolist(), cols.tolist(), layout) == (expected, [2, -1], 0)
    rows, _, layout = lattice_lines(facts | {"array_col": 5, "layout": "rank"})
    assert (rows.tolist(), layout) == ([4, 5, -1], 1)


def test_components_are_offered_where_the_index_has_them_and_must_be_whole(copy):
    assert Shards(copy).components is None
    rewrite_index(copy, components=None)
    assert Shards(copy).components is None
    (copy / "components.safetensors").write_bytes(b"axes")
    rewrite_index(copy, components={"file": "components.safetensors", "sha256": hashlib.sha256(b"axes").hexdigest()})
    assert Shards(copy).components == copy / "components.safetensors"
    assert "components" in Shards(copy).identity()
    (copy / "components.safetensors").write_bytes(b"axis")
    with pytest.raises(DamagedShards, match="components.safetensors: found [0-9a-f]{64}; expected sha256"):
        Shards(copy)


def test_centres_are_the_means_of_the_samples_slice_where_they_are_asked_for(fixed_shards, train_slices):
    """Told by the counts, which slice a sample is of; by a map of the index and by a stream alike."""
    means = np.array([values.mean(1) for values in corpus.expression(train_slices)], np.float32)
    reader, stream = Shards(fixed_shards / "train"), Stream(fixed_shards / "train")
    np.testing.assert_allclose(reader.means, means, rtol=1e-6)
    assert reader.read(np.arange(2), np.arange(2), 0).centres is None
    reader.centred = stream.centred = True
    stored = reader.read(np.arange(160), np.arange(160), 0)
    assert (stored.centres.dtype, stored.centres.shape) == (torch.float32, (160, 24))
    for centres, genes, slice in zip(stored.centres, stored.genes, reader.samples["slice"], strict=True):
        np.testing.assert_allclose(centres.numpy(), means[slice, genes.numpy()], rtol=1e-6)
    row_of = {counts.numpy().tobytes(): row for row, counts in enumerate(stored.counts)}
    seen = 0
    for batch in islice(stream.batches(Order(48, 3)), 4):
        rows = [row_of[counts.numpy().tobytes()] for counts in batch.counts]
        assert torch.equal(batch.centres, stored.centres[rows])
        seen += len(rows)
    assert seen == 160


def test_a_stream_has_no_means_for_a_slice_that_the_index_lacks(fixed_shards):
    stream = Stream(fixed_shards / "train")
    assert stream.slice_of({"__key__": "train2_000007", "__url__": "a.tar"}) == 2
    with pytest.raises(
        DamagedShards, match="a.tar, sample other_000007: found slice 'other'; expected one of index.json"
    ):
        stream.slice_of({"__key__": "other_000007", "__url__": "a.tar"})


@pytest.mark.parametrize("reader", [Shards, Stream])
def test_means_that_are_not_there_are_missed_only_where_they_are_asked_for(copy, reader):
    split = reader(copy)
    assert len(next(iter(split.batches(Order(8, 0))))) == 8
    split.centred = True
    with pytest.raises(DamagedShards, match="found no means.safetensors.*build the shards again"):
        next(iter(split.batches(Order(8, 0))))


def test_means_are_those_that_the_index_vouches_for(copy, train_slices):
    before = Shards(copy).identity()
    file = corpus.add_means(copy, train_slices)
    after = Shards(copy).identity()
    assert after == before | {"means": after["means"]}  # a run does not go on with the means of other slices
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(DamagedShards, match="means.safetensors: found [0-9a-f]{64}; expected sha256"):
        Shards(copy).means.sum()
    file.unlink()
    with pytest.raises(DamagedShards, match="means.safetensors"):
        Shards(copy).means.sum()


@pytest.mark.parametrize(
    ("tensors", "found"),
    [
        ({"means": np.zeros((3, 60), np.float32)}, r"float32 \[3, 60\]; expected float32 \[4, 60\]"),
        ({"means": np.zeros((4, 60))}, r"float64 \[4, 60\]; expected float32"),
        ({"other": np.zeros((4, 60), np.float32)}, "means.*; expected a tensor `means`"),
    ],
)
def test_means_of_another_shape_are_refused_though_the_index_vouches_for_them(copy, tensors, found):
    corpus.add_part(copy, "means", tensors)
    with pytest.raises(DamagedShards, match=f"means.safetensors: found .*{found}"):
        Shards(copy).means.sum()


def test_means_that_are_no_safetensors_are_refused(copy):
    file = corpus.add_part(copy, "means", {"means": np.zeros((4, 60), np.float32)})
    file.write_bytes(b"nonsense" * 9)
    rehash(copy, "means")
    with pytest.raises(DamagedShards, match="means.safetensors: found .*; expected a tensor `means`"):
        Shards(copy).means.sum()


def test_an_empty_split_has_no_samples(tmp_path):
    folder = corpus.write_split(
        tmp_path / "val", "val", [], b"# stpatch genes 1\nindex\tgene_id\tmean\tvariance\n", 0, 3, 4, 4
    )
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
    with pytest.raises(DamagedShards, match="train-000002.tar: found no member of size .* at byte 0"):
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
        list(islice(Shards(copy).batches(Order(160, 0)), 1))  # the error reaches the loop through the threads


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


@pytest.mark.parametrize(
    "changes",
    [{"m": "many"}, {"h": 0}, {"n_samples": None}, {"target_sum": -1}, {"shards": 3}, {"slices": ["a"]}, {"genes": {}},
     {"shards": [{"name": "a.tar", "samples": 0, "bytes": 0, "sha256": ""}]}],
)  # fmt: skip
def test_an_index_of_another_shape_is_refused(copy, changes):
    rewrite_index(copy, **changes)
    with pytest.raises(DamagedShards, match="index.json: found .*; expected"):
        Shards(copy)
    (copy / "index.json").write_text("[]")
    with pytest.raises(DamagedShards, match="index.json: found .*; expected"):
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


def test_a_header_of_an_array_that_ends_in_the_middle_is_refused(copy):
    spoiled = bytearray((copy / "samples.npy").read_bytes())
    spoiled[spoiled.index(b"}")] = ord("{")
    (copy / "samples.npy").write_bytes(spoiled)
    rehash(copy, "samples")
    with pytest.raises(DamagedShards, match="samples.npy"):
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


@pytest.mark.parametrize(
    ("text", "found"),
    [("7\nindex\tgene_id\tmean\n", "genes 7"), ("1\nindex\tgene_id\n0\ta\n", "mean"), ("1\nindex\tmean\n0\tx\n", "'x'"),
     ("1\nindex\tgene_id\tmean\n0\n", "float")],
)  # fmt: skip
def test_a_vocabulary_of_another_version_or_cut_is_refused(tmp_path, text, found):
    (tmp_path / "genes.tsv").write_text(f"# stpatch genes {text}")
    with pytest.raises(DamagedShards, match=f"genes.tsv: found .*{found}.*; expected a vocabulary"):
        Vocabulary.read(tmp_path / "genes.tsv")


def test_a_vocabulary_with_an_endless_field_is_refused(tmp_path):
    (tmp_path / "genes.tsv").write_text("# stpatch genes 1\nindex\tgene_id\n0\t" + "A" * 200_000 + "\n")
    with pytest.raises(DamagedShards, match="genes.tsv"):
        Vocabulary.read(tmp_path / "genes.tsv")


def test_an_index_nested_beyond_all_depth_is_refused(copy):
    (copy / "index.json").write_text("[" * 100_000)
    with pytest.raises(DamagedShards, match="RecursionError"):
        Shards(copy)


def test_a_sample_of_a_shard_or_slice_that_is_not_there_is_refused(copy):
    """Before a table is made that would have a place for each."""
    for name in ("shard", "slice"):
        samples = np.load(copy / "samples.npy")
        samples[name][3] = 2**32 - 1
        np.save(copy / "samples.npy", samples)
        rehash(copy, "samples")
        with pytest.raises(DamagedShards, match=f"samples.npy: found {name} 4294967295; expected less than"):
            Shards(copy)
        samples[name][3] = 0
        np.save(copy / "samples.npy", samples)
