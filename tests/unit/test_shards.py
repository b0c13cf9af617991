"""Samples, tars and their index, on tiny simulated slices."""

import hashlib
import json
import re
import tarfile

import numpy as np
import pytest
from numcodecs import blosc
from safetensors.numpy import load_file

from tests.conftest import ROOT
from workflow import tar
from workflow.codec import codec, decode, encode_counts
from workflow.errors import TooFewGenes
from workflow.estimate import windows_of
from workflow.grid import make_grid
from workflow.moments import moments, write_moments
from workflow.sample import Field, draw_windows
from workflow.shards import SAMPLE_DTYPE, canonical_sha256, slice_means, write_shards
from workflow.simulate import tiny_slice
from workflow.stats import merge_moments, write_vocabulary
from workflow.whole import whole_slice
from workflow.windows import write_pack

NAMES = ["a", "b", "c"]
SETTINGS = {
    "layout": "auto", "pitch_um": 100, "window": [6, 5], "genes": 16, "windows_per_slice": 12, "selection": "weighted",
    "epsilon": 1e-6, "min_observed": 0.5, "target_sum": 10000, "codec": "lz4", "shard_mb": 0.05, "seed": 0,
    "allow_contamination": False,
}  # fmt: skip
DRAW = {"n": 12, "m": 16, "selection": "weighted", "epsilon": 1e-6, "min_observed": 0.5, "seed": 0}


@pytest.fixture(scope="module")
def grids():
    return {name: make_grid(tiny_slice(seed=i, name=name), "auto", 100) for i, name in enumerate(NAMES)}


def row(name):
    return {"slice": name, "source": "simulated", "organism": "human", "donor": f"donor-{name}"}


def build(grids, folder, names=NAMES, split="train", **changes):
    """The split's folder, from grids to index."""
    folder.mkdir(exist_ok=True)
    settings = {**SETTINGS, **changes}
    flat = {"n_spots": 1, "sum": np.zeros(60), "m2": np.zeros(60)}
    parts = [{"gene_ids": grid.gene_ids, "symbols": grid.gene_ids, **flat} for grid in grids.values()]
    write_vocabulary(merge_moments(parts), folder / "genes.tsv")
    packs = []
    for name in names:
        field = Field(grids[name], sorted(grids[name].gene_ids), settings["window"], 1e4)
        packs.append((folder / f"{name}.bin", folder / f"{name}.npy"))
        write_pack(field, {"pitch_um": 100.0, "layout": "offset"}, *packs[-1], **DRAW, codec_name=settings["codec"])
    out = folder / "shards" / split
    index = write_shards(
        out, packs, folder / "genes.tsv", split=split, rows=[row(name) for name in names], settings=settings
    )
    return out, index


@pytest.fixture(scope="module")
def built(grids, tmp_path_factory):
    return build(grids, tmp_path_factory.mktemp("built"))


def by_index(folder, index):
    """Every sample read by its recorded offsets: (slice, window) -> arrays."""
    samples = np.load(folder / index["samples"]["file"], allow_pickle=False)
    assert samples.dtype == SAMPLE_DTYPE
    found = {}
    for entry in samples:
        content = (folder / index["shards"][entry["shard"]]["name"]).read_bytes()
        members = (
            content[entry[f"{m}_offset"] : entry[f"{m}_offset"] + entry[f"{m}_nbytes"]]
            for m in ("counts", "sites", "json")
        )
        found[index["slices"][entry["slice"]]["slice"], int(entry["window"])] = decode(*members)
    return found


def test_every_window_of_every_slice_stands_in_the_shards_once(built, grids):
    folder, index = built
    found = by_index(folder, index)
    assert sorted(found) == [(name, window) for name in NAMES for window in range(12)]
    assert index["n_samples"] == 36
    for name in NAMES:
        field = Field(grids[name], sorted(grids[name].gene_ids), (6, 5), 1e4)
        for window in draw_windows(field, **DRAW):
            counts, genes, totals, facts = found[name, window.number]
            np.testing.assert_array_equal(counts, window.counts)
            np.testing.assert_array_equal(genes, window.genes)
            np.testing.assert_array_equal(totals, window.totals)
            assert facts == {
                "slice": name, "window": window.number, "y": window.y, "x": window.x, "h": 6, "w": 5, "m": 16,
                "array_row": window.array_row, "array_col": window.array_col,
                "array_rows": window.array_rows.tolist(), "array_cols": window.array_cols.tolist(),
                "pitch_um": 100.0, "layout": "offset",
            }  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_stock_webdataset_reads_the_same_arrays_as_the_index(built):
    folder, index = built
    tars = [str(folder / shard["name"]) for shard in index["shards"]]
    expected, seen = by_index(folder, index), []
    snippet = re.search(r"```python\n(.*?)```", (ROOT / "docs/format.md").read_text(), re.DOTALL).group(1)
    documented = {}
    exec(snippet, documented)  # the decoder that docs/format.md shows, to the letter
    for counts, genes, totals, facts in documented["samples"](tars):
        seen.append((facts["slice"], facts["window"]))
        for ours, theirs in zip(expected[seen[-1]][:3], (counts, genes, totals), strict=True):
            np.testing.assert_array_equal(ours, theirs)
            assert ours.dtype == theirs.dtype
    assert seen == list(expected)  # in the order of samples.npy too


def test_the_corpus_components_go_along_where_there_are_any(grids, tmp_path):
    (tmp_path / "made.safetensors").write_bytes(b"axes")
    settings = {"split": "val", "rows": [], "settings": SETTINGS, "components": tmp_path / "made.safetensors"}
    _, index = build(grids, tmp_path, names=[])
    assert "components" not in index
    folder, genes = tmp_path / "shards" / "val", tmp_path / "genes.tsv"
    index = write_shards(folder, [], genes, **settings)
    assert (folder / index["components"]["file"]).read_bytes() == b"axes"
    assert index["components"]["sha256"] == hashlib.sha256(b"axes").hexdigest()
    write_shards(folder, [], genes, **{**settings, "components": None})
    assert not (folder / "components.safetensors").exists()


def test_the_means_of_each_slices_genes_go_along_and_are_zero_where_it_measured_none(grids, tmp_path):
    """Against the mean over the slice's spots, written out; the second slice lacks the vocabulary's first ten genes."""
    some = [grids["a"], make_grid(tiny_slice(seed=1, name="b", gene_offset=10), "auto", 100)]
    files, parts = [tmp_path / f"{grid.slice}.npz" for grid in some], []
    for grid, file in zip(some, files, strict=True):
        parts.append({"gene_ids": grid.gene_ids, "symbols": grid.gene_ids, **moments(grid, 1e4)})
        write_moments(file, grid.gene_ids, grid.gene_ids, moments(grid, 1e4))
    vocabulary = merge_moments(parts)
    write_vocabulary(vocabulary, tmp_path / "genes.tsv")
    expected = np.zeros((2, 70))
    for i, grid in enumerate(some):
        seen = grid.mask & (grid.total_counts > 0)
        values = np.log1p(grid.counts[seen] * (1e4 / grid.total_counts[seen][:, None].astype(float)))
        expected[i, [vocabulary.gene_id.index(gene) for gene in grid.gene_ids]] = values.mean(axis=0)
    assert (expected[1, :10] == 0).all()
    out, args = tmp_path / "train", {"split": "train", "rows": [], "settings": SETTINGS}
    index = write_shards(out, [], tmp_path / "genes.tsv", **args, moments=files)
    path = out / index["means"]["file"]
    assert index["means"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    means = load_file(path)["means"]
    assert means.dtype == np.float32
    np.testing.assert_allclose(means, expected, rtol=1e-6)
    first = path.read_bytes()
    write_shards(out, [], tmp_path / "genes.tsv", **args, moments=files)
    assert path.read_bytes() == first
    assert "means" not in write_shards(out, [], tmp_path / "genes.tsv", **args)
    assert not path.exists()


def test_a_gene_that_left_the_vocabulary_is_left_out_of_the_means():
    found = {"gene_ids": np.array(["c", "x", "a"]), "n_spots": 4, "sum": np.array([2.0, 9.0, 6.0])}
    np.testing.assert_array_equal(slice_means([found], ["a", "b", "c"]), [[1.5, 0.0, 0.5]])
    assert slice_means([], ["a", "b", "c"]).shape == (0, 3)


@pytest.mark.parametrize(
    ("most", "max_coverage", "expected"),
    [
        (512, 0, lambda n: 512),
        (512, 2.5, lambda n: round(2.5 * n / 30)),
        (7, 2.5, lambda n: 7),
        (512, 1e-9, lambda n: 1),
    ],
)
def test_a_small_slice_gets_as_many_windows_as_cover_a_spot_so_often(grids, most, max_coverage, expected):
    grid = grids["a"]
    assert 0 < grid.mask.sum() < grid.mask.size
    assert windows_of(most, max_coverage, int(grid.mask.sum()), (6, 5)) == expected(grid.mask.sum())


def test_windows_of_all_slices_are_mixed_over_several_tars(built):
    folder, index = built
    assert len(index["shards"]) > 1
    assert sum(shard["samples"] for shard in index["shards"]) == 36
    assert all(shard["bytes"] <= 50_000 for shard in index["shards"])
    samples = np.load(folder / "samples.npy")
    assert len(set(samples["slice"][:12].tolist())) > 1
    assert (np.diff(samples["shard"].astype(int)) >= 0).all()


def test_rebuilt_shards_are_the_same_bytes(built, grids, tmp_path):
    folder, _ = built
    again, _ = build(grids, tmp_path)
    assert sorted(path.name for path in again.iterdir()) == sorted(path.name for path in folder.iterdir())
    for path in folder.iterdir():
        assert path.read_bytes() == (again / path.name).read_bytes(), path.name


def test_the_index_names_hashes_of_what_lies_beside_it(built):
    folder, index = built
    assert json.loads((folder / "index.json").read_text()) == index
    for entry in [
        *index["shards"],
        {**index["genes"], "name": "genes.tsv"},
        {**index["samples"], "name": "samples.npy"},
    ]:
        content = (folder / entry["name"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert entry.get("bytes", len(content)) == len(content)
    assert index["genes"]["n"] == 60
    assert index["simulated"] is True
    assert index["config_sha256"] == canonical_sha256(dict(reversed(SETTINGS.items())))
    assert index["slices"][0] == {**row("a"), "layout": "offset", "pitch_um": 100.0, "n_windows": 12}
    assert (index["layout"], index["pitch_um"], index["allow_contamination"]) == ("auto", 100, False)


def test_tars_of_an_earlier_run_are_removed(grids, tmp_path):
    folder, index = build(grids, tmp_path)
    (folder / "train-000099.tar").write_bytes(b"stale")
    folder, index = build(grids, tmp_path, names=["a"], shard_mb=1)
    assert sorted(path.name for path in folder.glob("*.tar")) == ["train-000000.tar"]
    assert index["n_samples"] == 12


def test_a_split_without_slices_has_an_index_and_no_shards(grids, tmp_path):
    folder, index = build(grids, tmp_path, names=[], split="val")
    assert (index["n_samples"], index["shards"], index["slices"], index["simulated"]) == (0, [], [], False)
    assert len(np.load(folder / "samples.npy")) == 0
    assert (folder / "genes.tsv").is_file()


def test_tar_members_carry_no_time_and_no_owner(built):
    folder, index = built
    with tarfile.open(folder / index["shards"][0]["name"]) as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert (member.mode, member.isreg()) == (0o644, True)


@pytest.mark.parametrize("length", [1, 99, 100, 150])
def test_names_of_any_length_are_read_by_tarfile_and_offsets_point_at_the_data(tmp_path, length):
    data = b"x" * 700
    content, [(offset, size), (second, _)] = tar.sample([("n" * length, data), ("m", b"yz")])
    assert content[offset : offset + size] == data
    assert content[second : second + 2] == b"yz"
    assert len(content) % 512 == 0
    (tmp_path / "t.tar").write_bytes(content + tar.END)
    with tarfile.open(tmp_path / "t.tar") as archive:
        assert archive.getnames() == ["n" * length, "m"]
        assert archive.extractfile("n" * length).read() == data


@pytest.mark.parametrize("name", ["lz4", "zstd"])
def test_encoding_a_large_buffer_fifty_times_gives_one_result(name):
    counts = np.random.default_rng(0).poisson(0.6, (2048, 32, 32)).astype(np.uint16)
    assert not blosc.use_threads
    results = {hashlib.sha256(encode_counts(counts, codec(name))).hexdigest() for _ in range(50)}
    assert len(results) == 1


def test_a_whole_slice_is_one_sample_of_every_measured_gene_of_the_vocabulary(grids, tmp_path):
    grid = grids["a"]
    vocabulary = ["ENSG0", *sorted(grid.gene_ids)[:40]]
    content = whole_slice(grid, vocabulary, genes_sha256="f" * 64, target_sum=10000, codec_name="zstd", simulated=True)
    (tmp_path / "a.tar").write_bytes(content)
    with tarfile.open(tmp_path / "a.tar") as archive:
        members = {name: archive.extractfile(name).read() for name in archive.getnames()}
    assert list(members) == ["a.counts.blosc", "a.sites.blosc", "a.json", "a.cell.blosc"]
    counts, genes, totals, facts = decode(*list(members.values())[:3])
    columns = [list(grid.gene_ids).index(vocabulary[gene]) for gene in genes]
    assert genes.tolist() == list(range(1, 41))
    np.testing.assert_array_equal(counts, grid.counts[:, :, columns].transpose(2, 0, 1))
    np.testing.assert_array_equal(totals, grid.total_counts)
    cell = np.frombuffer(blosc.decompress(members["a.cell.blosc"]), "<i4")
    np.testing.assert_array_equal(grid.spot.ravel()[cell], np.arange(grid.n_spots))
    assert facts["array_rows"] == grid.array_row.max(axis=1).tolist()
    extra = {"genes_sha256": "f" * 64, "target_sum": 10000, "format_version": 1, "simulated": True}
    assert facts.items() >= {**extra, "y": 0, "x": 0, "m": 40, "h": totals.shape[0]}.items()


def test_a_slice_without_any_gene_of_the_vocabulary_is_refused(grids):
    with pytest.raises(TooFewGenes, match="slice a.*check the organism"):
        whole_slice(grids["a"], ["ENSG0"], genes_sha256="", target_sum=1e4, codec_name="lz4", simulated=True)
