"""The contract between the two rooms, which share files and no code: the one module that imports both."""

from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
import torch
import webdataset

from trainer import embed, expression, inpaint
from trainer.data import SAMPLE, Shards, Vocabulary
from trainer.errors import DamagedShards
from trainer.model import ModelConfig, build, read_components
from trainer.objective import Objective, ObjectiveConfig
from trainer.units import lattice_places
from workflow.codec import decode
from workflow.components import components, write_components
from workflow.expression import log_normalise
from workflow.grid import make_grid, write_grid
from workflow.moments import moments, write_moments
from workflow.regions import draw, encode
from workflow.sample import Field, draw_windows
from workflow.shards import SAMPLE_DTYPE, write_shards
from workflow.simulate import tiny_slice
from workflow.stats import merge_moments, read_vocabulary, write_vocabulary
from workflow.whole import whole_slice
from workflow.windows import write_pack

NAMES = ["one", "two"]
DRAW = {"n": 10, "m": 16, "selection": "weighted", "epsilon": 1e-6, "min_observed": 0.5, "seed": 0}
SETTINGS = {
    "layout": "auto", "pitch_um": 100, "window": [6, 5], "genes": 16, "windows_per_slice": 10, "selection": "weighted",
    "epsilon": 1e-6, "min_observed": 0.5, "target_sum": 10000, "codec": "zstd", "shard_mb": 0.02, "seed": 0,
    "allow_contamination": False,
}  # fmt: skip

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning:webdataset")


@pytest.fixture(scope="module")
def grids():
    """The second slice measured ten genes that the first did not, and not the first one's first ten."""
    slices = (tiny_slice(seed=i, n_genes=60, gene_offset=10 * i, name=name) for i, name in enumerate(NAMES))
    return {name: make_grid(slice, "auto", 100) for name, slice in zip(NAMES, slices, strict=True)}


@pytest.fixture(scope="module")
def built(grids, tmp_path_factory):
    """Folder of shards, and the genes.tsv they were made with, by the pipeline's own code."""
    folder = tmp_path_factory.mktemp("contract")
    found = [{"gene_ids": grid.gene_ids, "symbols": grid.gene_ids, **moments(grid, 1e4)} for grid in grids.values()]
    write_vocabulary(merge_moments(found), folder / "genes.tsv")
    gene_ids = list(read_vocabulary(folder / "genes.tsv").gene_id)
    packs = []
    for name, grid in grids.items():
        packs.append((folder / f"{name}.bin", folder / f"{name}.npy"))
        field, facts = Field(grid, gene_ids, (6, 5), 1e4), {"pitch_um": 100.0, "layout": "offset"}
        write_pack(field, facts, *packs[-1], **DRAW, codec_name="zstd")
    rows = [{"slice": name, "source": "simulated", "organism": "human", "donor": name} for name in NAMES]
    zarrs, moments_of = [folder / f"{name}.zarr" for name in NAMES], [folder / f"{name}.npz" for name in NAMES]
    for grid, zarr, file in zip(grids.values(), zarrs, moments_of, strict=True):
        write_grid(grid, zarr)
        write_moments(file, grid.gene_ids, grid.gene_ids, moments(grid, 1e4))
    how = {"method": "spatial", "k": 5, "spots": 40, "target_sum": 1e4, "seed": 0}
    found = components(zarrs, read_vocabulary(folder / "genes.tsv"), **how)
    sha256 = hashlib.sha256((folder / "genes.tsv").read_bytes()).hexdigest()
    write_components(folder / "components.safetensors", *found, sha256)
    write_shards(
        folder / "train", packs, folder / "genes.tsv", split="train", rows=rows, settings=SETTINGS,
        components=folder / "components.safetensors", moments=moments_of,
    )  # fmt: skip
    return folder


@pytest.mark.parametrize("target_sum", [1e4, 1e6])
def test_numpy_and_torch_normalise_alike(target_sum):
    rng = np.random.default_rng(0)
    counts = np.minimum(rng.geometric(0.01, (200, 50)) * (rng.random((200, 50)) < 0.5), 65535).astype(np.uint16)
    counts[0, 0] = 65535
    totals = (counts.sum(1) * rng.uniform(1, 3, 200)).round().astype(np.float32)
    totals[5], counts[5] = 0, 0
    expected = log_normalise(counts, totals[:, None], target_sum)
    single = expression.log_normalise(torch.from_numpy(counts), torch.from_numpy(totals), target_sum)
    double = expression.log_normalise(torch.from_numpy(counts), torch.from_numpy(totals).double(), target_sum)
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), expected, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(double.numpy(), expected, rtol=1e-12)


def test_the_sample_table_is_declared_alike():
    assert SAMPLE == SAMPLE_DTYPE


def test_both_sides_read_one_vocabulary(built):
    ours, theirs = Vocabulary.read(built / "genes.tsv"), read_vocabulary(built / "genes.tsv")
    assert ours.gene_ids == list(theirs.gene_id)
    assert len(ours.gene_ids) == 70
    np.testing.assert_array_equal(ours.mean, theirs.mean)


def test_the_trainer_reads_the_windows_that_were_drawn(built, grids):
    reader, gene_ids = Shards(built / "train"), read_vocabulary(built / "genes.tsv").gene_id
    drawn = {
        (s, window.number): window
        for s, grid in enumerate(grids.values())
        for window in draw_windows(Field(grid, gene_ids, (6, 5), 1e4), **DRAW)
    }
    assert len(reader) == len(drawn) == 20
    assert len(reader.names) > 1
    batch = reader.read(np.arange(20), np.arange(20), epoch=0)
    for i, sample in enumerate(reader.samples):
        window = drawn.pop((int(sample["slice"]), int(sample["window"])))
        np.testing.assert_array_equal(batch.counts[i].numpy(), window.counts)
        np.testing.assert_array_equal(batch.genes[i].numpy(), window.genes)
        np.testing.assert_array_equal(batch.totals[i].numpy(), window.totals)
    assert not drawn


def test_the_trainer_reads_the_components_that_the_pipeline_wrote(built, grids):
    reader = Shards(built / "train")
    axes, noise = read_components(reader.components, reader.vocabulary, noise=True).values()
    assert axes.shape == (70, 5)
    assert torch.allclose(axes.T @ axes, torch.eye(5), atol=1e-5)
    assert (noise > 0).all()
    knobs = {"gene_embeddings": "fixed", "axes": 5, "inputs": "slice", "positions": "distance"}
    knobs |= {"width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_heads": 2}
    cfg = ModelConfig(n_genes=70, m=16, h=6, w=5, **knobs)
    loading = build(cfg, reader.vocabulary, 0, reader.components).gene_loading
    assert torch.allclose(loading.T @ (noise[:, None] * loading), torch.eye(5), atol=1e-4)
    (built / "train" / "components.safetensors").rename(built / "aside")
    with pytest.raises(DamagedShards, match="components.safetensors: found no such file"):
        Shards(built / "train")
    (built / "aside").rename(built / "train" / "components.safetensors")


def test_the_means_that_the_pipeline_wrote_are_those_that_the_trainer_takes_of_whole_slices(built, grids, tmp_path):
    """In training a window is centred by the first, when embedding by the second."""
    reader = Shards(built / "train")
    about = {"genes_sha256": reader.vocabulary.sha256, "target_sum": 1e4, "codec_name": "lz4", "simulated": True}
    for i, (name, grid) in enumerate(grids.items()):
        (tmp_path / f"{name}.tar").write_bytes(whole_slice(grid, reader.vocabulary.gene_ids, **about))
        whole = embed.WholeSlice.read(tmp_path / f"{name}.tar")
        at = np.arange(len(whole.genes))
        expected = np.zeros(70)
        expected[whole.genes] = embed.gene_means(whole, at, np.flatnonzero(whole.totals > 0), 1e4)
        assert (expected == 0).sum() >= 10  # not measured
        np.testing.assert_allclose(reader.means[i], expected, rtol=1e-5)


@pytest.mark.parametrize(("kind", "layout"), [("staggered", "offset"), ("staggered", "rank"), ("square", "rank")])
def test_distances_between_sites_are_those_of_the_spots_on_the_slide(kind, layout, tmp_path):
    """What neighbours are told by, from pixels to the batch; a row of spots is missing, so that ranks would mislead."""
    slice = tiny_slice(seed=3, n_genes=60, kind=kind)
    slice = slice[slice.obs["array_row"] != 6].copy()
    grid = make_grid(slice, layout, 100)
    part = {"gene_ids": grid.gene_ids, "symbols": grid.gene_ids, **moments(grid, 1e4)}
    write_vocabulary(merge_moments([part]), tmp_path / "genes.tsv")
    field, facts = Field(grid, list(grid.gene_ids), (6, 5), 1e4), {"pitch_um": 100.0, "layout": grid.layout}
    pack = (tmp_path / "s.bin", tmp_path / "s.npy")
    write_pack(field, facts, *pack, **{**DRAW, "min_observed": 0.3}, codec_name="lz4")
    rows = [{"slice": "tiny", "source": "simulated", "organism": "human", "donor": "d"}]
    write_shards(tmp_path / "train", [pack], tmp_path / "genes.tsv", split="train", rows=rows, settings=SETTINGS)
    reader = Shards(tmp_path / "train")
    reader.coordinates = True
    batch = reader.read(np.arange(10), np.arange(10), 0)
    observed = batch.totals.flatten(1) > 0
    places = lattice_places(batch.rows, batch.cols, batch.layouts, observed).numpy()
    windows = {window.number: window for window in draw_windows(field, **{**DRAW, "min_observed": 0.3})}
    across = 0
    for i, sample in enumerate(reader.samples):
        window = windows[int(sample["window"])]
        spots = grid.spot[window.y : window.y + 6, window.x : window.x + 5].ravel()
        pixels = slice.obsm["spatial"][spots]
        seen = np.flatnonzero(observed[i])
        apart, on_slide = (
            np.linalg.norm(p[seen, None] - p[None, seen], axis=2)[np.triu_indices(len(seen), 1)]
            for p in (places[i], pixels)
        )
        ratio = on_slide / apart
        assert ratio.max() / ratio.min() < 1.05  # pixels are rounded and jittered
        across += (window.array_rows.min() < 6) and (window.array_rows.max() > 6)
    assert across


def test_a_window_larger_than_its_slice_holds_it_whole_for_the_unit_slice(built, grids, tmp_path):
    gene_ids = read_vocabulary(built / "genes.tsv").gene_id
    height, width = (max(grid.mask.shape[axis] for grid in grids.values()) + 3 for axis in (0, 1))
    packs = []
    for name, grid in grids.items():
        packs.append((tmp_path / f"{name}.bin", tmp_path / f"{name}.npy"))
        field, facts = Field(grid, gene_ids, (height, width), 1e4), {"pitch_um": 100.0, "layout": "offset"}
        write_pack(field, facts, *packs[-1], **{**DRAW, "n": 2, "min_observed": 0.01}, codec_name="lz4")
    rows = [{"slice": name, "source": "simulated", "organism": "human", "donor": name} for name in NAMES]
    settings = {**SETTINGS, "window": [height, width], "windows_per_slice": 2}
    write_shards(tmp_path / "train", packs, built / "genes.tsv", split="train", rows=rows, settings=settings)
    reader = Shards(tmp_path / "train")
    batch = reader.read(np.arange(4), np.arange(4), 0)
    n_spots = [(grids[NAMES[row["slice"]]].total_counts > 0).sum() for row in reader.samples]
    assert (batch.totals > 0).sum((1, 2)).tolist() == n_spots
    knobs = {"unit": "slice", "width": 8, "depth": 1, "heads": 2, "decoder_width": 8, "decoder_heads": 2}
    model = build(ModelConfig(n_genes=70, m=16, h=height, w=width, **knobs), reader.vocabulary, 0)
    loss, number = Objective(model, reader.index["target_sum"], ObjectiveConfig(seed=0))(batch).tolist()
    assert number == pytest.approx(0.3 * 16 * sum(n_spots), rel=0.1)
    assert 0 < loss / number < 10


def test_stock_webdataset_and_the_trainer_read_the_same(built):
    reader = Shards(built / "train")
    tars = [str(built / "train" / name) for name in reader.names]
    n = 0
    for row, member in enumerate(webdataset.WebDataset(tars, shardshuffle=False)):
        counts, genes, totals, facts = decode(member["counts.blosc"], member["sites.blosc"], member["json"])
        batch = reader.read(np.array([row]), np.array([row]), epoch=0)
        sample = reader.samples[row]
        assert facts["slice"] == NAMES[sample["slice"]]
        assert facts["window"] == sample["window"]
        np.testing.assert_array_equal(batch.counts[0].numpy(), counts)
        np.testing.assert_array_equal(batch.genes[0].numpy(), genes)
        np.testing.assert_array_equal(batch.totals[0].numpy(), totals)
        n += 1
    assert n == len(reader)


@pytest.mark.parametrize(("layout", "pitch_um"), [("auto", 100), ("bin", 180)])
def test_the_trainer_reads_a_whole_slice(built, tmp_path, capsys, layout, pitch_um):
    vocabulary = Vocabulary.read(built / "genes.tsv")
    grid = make_grid(tiny_slice(seed=1, n_genes=60, gene_offset=10, name="two"), layout, pitch_um)
    assert (grid.n_merged > 0) == (layout == "bin")
    content = whole_slice(
        grid, vocabulary.gene_ids, genes_sha256=vocabulary.sha256, target_sum=10000, codec_name="lz4", simulated=True
    )
    (tmp_path / "two.tar").write_bytes(content)
    data = {"genes": {"n": 70, "sha256": vocabulary.sha256}, "target_sum": 10000.0}
    whole = embed.read_for({"data": data}, tmp_path / "two.tar")
    assert [vocabulary.gene_ids[k] for k in whole.genes] == sorted(grid.gene_ids)
    in_order = np.argsort(grid.gene_ids)
    np.testing.assert_array_equal(whole.counts, grid.counts[:, :, in_order].transpose(2, 0, 1))
    np.testing.assert_array_equal(whole.totals, grid.total_counts)
    np.testing.assert_array_equal(whole.cell, grid.cell)
    assert len(whole.cell) == grid.n_spots
    embed.warn_if_unfamiliar({"data": Shards(built / "train").facts()}, whole, tmp_path / "two.tar")
    assert ("layout bin at 180 um" in capsys.readouterr().err) == (layout == "bin")  # both files tell it alike
    assert whole.facts["simulated"] is True
    assert json.dumps(whole.facts)


def test_the_mean_of_the_vocabulary_is_that_of_the_trainers_values(built, grids):
    """The gene-mean baseline is on the scale of what the model predicts."""
    vocabulary, grid = Vocabulary.read(built / "genes.tsv"), grids["one"]
    only_here = [k for k, gene in enumerate(grid.gene_ids) if gene not in set(grids["two"].gene_ids)]
    assert len(only_here) == 10
    counts, totals = grid.counts[grid.mask][:, only_here], grid.total_counts[grid.mask]
    values = expression.log_normalise(torch.from_numpy(counts), torch.from_numpy(totals), 1e4)
    rows = [vocabulary.gene_ids.index(grid.gene_ids[k]) for k in only_here]
    np.testing.assert_allclose(values.mean(0).numpy(), vocabulary.mean[rows], rtol=1e-5)


def test_the_trainer_reads_the_regions_that_the_pipeline_drew(tmp_path):
    grid = make_grid(tiny_slice(), "auto", 100)
    names = list(map(str, grid.gene_ids))
    options = {
        "windows": [12],
        "sides": [4],
        "repeats": 3,
        "n_genes": 9,
        "min_observed": 0.5,
        "target_sum": 1e4,
        "seed": 0,
    }
    drawn = draw(grid, names, **options)
    (tmp_path / "r").write_bytes(encode(drawn, grid, genes_sha256="ab", seed=0, simulated=True))
    about = {"genes_sha256": "ab", "target_sum": 1e4, "codec_name": "lz4", "simulated": True}
    (tmp_path / "s.tar").write_bytes(whole_slice(grid, names, **about))
    read = inpaint.Regions.read(tmp_path / "r", embed.WholeSlice.read(tmp_path / "s.tar"))
    for name in ("genes", "region"):
        assert np.array_equal(getattr(read, name), getattr(drawn, name))
    for name in ("hidden", "visible"):
        assert np.array_equal(getattr(read, name), np.concatenate(getattr(drawn, name)))
        assert getattr(read, f"n_{name}").tolist() == list(map(len, getattr(drawn, name)))
