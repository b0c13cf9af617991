"""Whole slices to one vector a spot."""

from __future__ import annotations

import gzip
import json
import shutil

import numpy as np
import pytest
import torch
from safetensors import safe_open

from tests.trainer import corpus
from tests.trainer.conftest import FIXED, SMALL
from trainer import embed, pretrain
from trainer.errors import DamagedShards, VocabularyMismatch
from trainer.expression import log_normalise
from trainer.model import MaskedAutoencoder, load


def read(file):
    with safe_open(file, "np") as opened:
        return opened.get_tensor("X"), opened.get_tensor("spot"), opened.metadata()


def run(model_folder, out, *files, flags=()):
    embed.main(
        ["--model", str(model_folder), "--shards", *map(str, files), "--out", str(out), "--device", "cpu", *flags]
    )
    return out


@pytest.fixture(scope="module")
def slices(tmp_path_factory, tissue, genes_tsv):
    """Whole slices: a usual one, one smaller than a window on both sides, one that measured half of the genes."""
    folder, made = tmp_path_factory.mktemp("slices"), {}
    for name, (H, W), genes in (
        ("usual", (20, 24), None),
        ("small", (4, 3), None),
        ("half", (13, 11), np.arange(0, 60, 2)),
    ):
        counts, totals, cell = tissue.slice(H, W, seed=20 + len(made))
        kept = np.arange(60) if genes is None else genes
        file = corpus.write_whole(folder / f"{name}.tar", counts[kept], totals, cell, genes_tsv, kept)
        made[name] = (file, counts[kept], totals, cell, kept)
    return made


@pytest.mark.parametrize("name", ["usual", "small", "half"])
def test_every_spot_is_embedded_once(model_folder, slices, tmp_path, name):
    file, _, _, cell, _ = slices[name]
    X, rows, metadata = read(run(model_folder, tmp_path / "x.safetensors", file))
    assert rows.tolist() == list(range(len(cell)))
    assert rows.dtype == np.int32
    assert X.shape == (len(rows), 32)
    assert X.dtype == np.float32
    assert np.isfinite(X).all()
    del metadata["sha256"]
    assert metadata == {
        "format_version": "1", "slice": name, "model": "model", "genes_used": "24", "stride": "2", "simulated": "true"
    }  # fmt: skip


def test_the_same_slice_gives_the_same_bytes(model_folder, slices, tmp_path):
    files = [run(model_folder, tmp_path / f"{i}.safetensors", slices["usual"][0]) for i in range(2)]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_an_embedding_is_the_mean_over_the_windows_that_cover_the_spot(model_folder, slices, tmp_path):
    """Against a plain transcription of the rule, one window at a time."""
    file, counts, totals, cell, genes = slices["half"]
    model, _, _ = load(model_folder)
    seen = totals > 0
    values = np.log1p(counts * np.divide(1e4, totals, out=np.zeros_like(totals), where=seen))
    chosen = sorted(sorted(range(30), key=lambda k: -values[k][seen].var())[:24])
    sums, number = np.zeros((13, 11, 32)), np.zeros((13, 11, 1))
    for y in (0, 2, 4, 6, 7):  # windows of 6 x 5, stride 2, the last flush with the border
        for x in (0, 2, 4, 6):
            window = torch.from_numpy(values[chosen, y : y + 6, x : x + 5]).float()
            with torch.no_grad():
                features = model.encode(
                    window.flatten(1).T[None],
                    torch.from_numpy(genes[chosen])[None],
                    torch.from_numpy(seen[y : y + 6, x : x + 5]).flatten()[None],
                )
            sums[y : y + 6, x : x + 5] += features.view(6, 5, 32).numpy()
            number[y : y + 6, x : x + 5] += 1
    X, _, _ = read(run(model_folder, tmp_path / "x.safetensors", file))
    np.testing.assert_allclose(X, (sums / number).reshape(-1, 32)[cell], atol=1e-5)


@pytest.fixture(scope="module", params=["spot", "multispot", "slice"])
def other_unit(request, tmp_path_factory, shards):
    """A model folder of another unit after a few steps."""
    out = tmp_path_factory.mktemp(request.param) / "model"
    flags = f"--unit {request.param} --neighbours 6 --domains 3 --inputs centred --steps 12 --lr 3e-3".split()
    pretrain.main(["--shards", str(shards / "train"), "--out", str(out), *SMALL, *flags])
    return request.param, out


@pytest.mark.parametrize("name", ["usual", "small", "half"])
def test_the_other_units_embed_the_whole_slice_at_once(other_unit, slices, tmp_path, name):
    """Against the model on one window as large as the slice, however many sites go by turns; the same bytes twice."""
    unit, folder = other_unit
    file, counts, totals, cell, genes = slices[name]
    model, _, _ = load(folder)
    values = np.log1p(counts * np.divide(1e4, totals, out=np.zeros_like(totals), where=totals > 0))
    chosen = sorted(sorted(range(len(genes)), key=lambda k: -values[k][totals > 0].var())[:24])
    y, x = np.indices(totals.shape)
    x = (2 * x + y % 2) / 2  # layout offset
    places = torch.from_numpy(np.stack([y * 0.75**0.5, x], axis=2)).view(1, -1, 2)
    window = torch.from_numpy(values[chosen]).float().flatten(1).T[None]
    with torch.no_grad():
        expected = model.encode(
            window, torch.from_numpy(genes[chosen])[None], torch.from_numpy(totals.ravel() > 0)[None], None, places
        )[0].numpy()[cell]
    X, rows, metadata = read(run(folder, tmp_path / "x.safetensors", file, flags=["--batch-size", "1"]))
    np.testing.assert_allclose(X, expected, atol=1e-5)
    assert rows.tolist() == list(range(len(cell)))
    assert (metadata["stride"], metadata["genes_used"]) == ("none", "24")
    again = run(folder, tmp_path / "y.safetensors", file, flags=["--batch-size", "1"])
    assert again.read_bytes() == (tmp_path / "x.safetensors").read_bytes()


@pytest.fixture(scope="module")
def fixed_model(tmp_path_factory, fixed_shards):
    """A model folder of fixed embeddings, inputs about the slice's mean and positions by distance, after a few steps."""
    out = tmp_path_factory.mktemp("fixed") / "model"
    flags = [*SMALL, *FIXED, *"--mask-ratio 0 --mask-genes 0.4 --steps 12 --lr 3e-3".split()]
    pretrain.main(["--shards", str(fixed_shards / "train"), "--out", str(out), *flags])
    return out


@pytest.mark.parametrize("name", ["usual", "small", "half"])
@pytest.mark.parametrize("n_genes", [24, 10**6])
def test_inputs_about_the_slices_mean_are_about_the_mean_of_the_slice_embedded(
    fixed_model, slices, tmp_path, name, n_genes
):
    """Against a plain transcription: the slice's own means and places, windows padded where the slice is smaller."""
    file, counts, totals, cell, genes = slices[name]
    model, _, _ = load(fixed_model)
    seen, (H, W) = totals > 0, totals.shape
    values = np.log1p(counts * np.divide(1e4, totals, out=np.zeros_like(totals), where=seen).astype(float))
    chosen = sorted(sorted(range(len(genes)), key=lambda k: -values[k][seen].var())[:n_genes])
    centred = values[chosen] - values[chosen][:, seen].mean(1)[:, None, None]
    y, x = np.indices(totals.shape)
    places = np.stack([y * 0.75**0.5, (2 * x + y % 2) / 2], axis=2)  # layout offset
    sums, number = np.zeros((H, W, 32)), np.zeros((H, W, 1))
    for top in {20: (0, 2, 4, 6, 8, 10, 12, 14), 4: (0,), 13: (0, 2, 4, 6, 7)}[H]:
        for left in {24: (*range(0, 19, 2), 19), 3: (0,), 11: (0, 2, 4, 6)}[W]:
            crop = np.s_[top : top + 6, left : left + 5]
            height, width = totals[crop].shape
            window, where, known = np.zeros((len(chosen), 6, 5)), np.full((6, 5, 2), 1e3), np.zeros((6, 5), bool)
            window[:, :height, :width] = centred[:, *crop]
            where[:height, :width], known[:height, :width] = places[crop], seen[crop]
            with torch.no_grad():
                features = model.encode(
                    torch.from_numpy(window).float().flatten(1).T[None],
                    torch.from_numpy(genes[chosen])[None],
                    torch.from_numpy(known).flatten()[None],
                    None,
                    torch.from_numpy(where).flatten(0, 1)[None],
                )
            sums[crop] += features.view(6, 5, 32)[:height, :width].numpy()
            number[crop] += 1
    X, _, metadata = read(run(fixed_model, tmp_path / "x.safetensors", file, flags=["--genes", str(n_genes)]))
    np.testing.assert_allclose(X, (sums / number).reshape(-1, 32)[cell], atol=1e-4)
    assert metadata["genes_used"] == str(len(chosen)) == str(min(n_genes, len(genes)))


def test_a_slice_of_any_depth_of_a_gene_has_the_same_embedding_about_its_mean(
    fixed_model, slices, tmp_path, monkeypatch
):
    """A batch effect that adds the same to a gene's expression everywhere does not reach the model."""
    file, *_ = slices["usual"]
    X, _, _ = read(run(fixed_model, tmp_path / "x.safetensors", file, flags=["--genes", "60"]))
    shift = torch.linspace(0, 3, 60)
    monkeypatch.setattr(embed, "log_normalise", lambda *a: log_normalise(*a) + shift.to(a[1].dtype))
    shifted, _, _ = read(run(fixed_model, tmp_path / "y.safetensors", file, flags=["--genes", "60"]))
    np.testing.assert_allclose(X, shifted, atol=1e-4)


def test_the_means_of_genes_are_over_the_cells_asked_for(slices):
    whole, chosen = embed.WholeSlice.read(slices["half"][0]), np.resize([3, 0, 17], 2100)  # three blocks
    counts, totals = slices["half"][1:3]
    cells = np.flatnonzero(totals > 0)[5:20]
    expected = np.log1p(counts.reshape(30, -1)[chosen][:, cells] * (1e4 / totals.ravel()[cells].astype(float))).mean(1)
    found = embed.gene_means(whole, chosen, cells, 1e4)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert embed.gene_means(whole, chosen, cells[:0], 1e4).tolist() == [0] * 2100


def test_few_values_at_a_time_give_the_same_embedding(model_folder, slices, tmp_path, monkeypatch):
    X, _, _ = read(run(model_folder, tmp_path / "x.safetensors", slices["usual"][0], flags=["--genes", "60"]))
    monkeypatch.setattr(embed, "AT_ONCE", 2 * 30 * 60)  # two windows of all genes
    seen, encode = [], MaskedAutoencoder.encode
    monkeypatch.setattr(MaskedAutoencoder, "encode", lambda self, *a: (seen.append(len(a[0])), encode(self, *a))[1])
    few, _, _ = read(run(model_folder, tmp_path / "y.safetensors", slices["usual"][0], flags=["--genes", "60"]))
    assert set(seen) == {2}
    np.testing.assert_allclose(X, few, atol=1e-5)


def test_spots_that_share_a_cell_share_its_vector(model_folder, slices, genes_tsv, tmp_path):
    """As layout `bin` puts them: three more spots in cells that have one already, at either end of the slice's order."""
    file, counts, totals, cell, _ = slices["usual"]
    merged = np.concatenate([cell[[7]], cell, cell[[7, 0]]])
    again = corpus.write_whole(tmp_path / "merged.tar", counts, totals, merged, genes_tsv)
    alone, _, _ = read(run(model_folder, tmp_path / "alone.safetensors", file))
    X, rows, _ = read(run(model_folder, tmp_path / "merged.safetensors", again))
    assert rows.tolist() == list(range(len(cell) + 3))
    assert np.array_equal(X, np.concatenate([alone[[7]], alone, alone[[7, 0]]]))


@pytest.mark.parametrize("wrong", [-1, 20 * 24])
def test_a_cell_outside_the_grid_is_refused(slices, genes_tsv, tmp_path, wrong):
    _, counts, totals, cell, _ = slices["usual"]
    file = corpus.write_whole(tmp_path / "out.tar", counts, totals, np.append(cell, np.int32(wrong)), genes_tsv)
    with pytest.raises(DamagedShards, match=f"out.tar: found cells .*{wrong}.*; expected cells of a grid of 20 x 24"):
        embed.WholeSlice.read(file)


@pytest.mark.parametrize(
    ("cell", "problem"),
    [(np.zeros(7, np.uint8), "7 bytes in [0-9]+; expected 4 bytes"), (np.zeros(0, np.int32), "0 bytes in")],
)
def test_cells_that_are_no_numbers_are_refused(slices, genes_tsv, tmp_path, cell, problem):
    _, counts, totals, _, _ = slices["usual"]
    file = corpus.write_whole(tmp_path / "odd.tar", counts, totals, cell, genes_tsv)
    with pytest.raises(DamagedShards, match=f"odd.tar, cell: found .*{problem}"):
        embed.WholeSlice.read(file)


def test_a_layout_or_pitch_that_the_model_was_not_trained_on_is_told_once(
    model_folder, slices, genes_tsv, tmp_path, capsys
):
    file, counts, totals, cell, _ = slices["small"]
    run(model_folder, tmp_path / "x.safetensors", file)
    assert capsys.readouterr().err == ""
    for facts, mine in (
        ({"layout": "bin"}, "bin at 100 um"),
        ({"pitch_um": 200.0}, "offset at 200 um"),
        ({"pitch_um": None}, "offset at an unknown pitch"),
    ):
        other = corpus.write_whole(tmp_path / "other.tar", counts, totals, cell, genes_tsv, **facts)
        run(model_folder, tmp_path / "x.safetensors", other)
        assert capsys.readouterr().err == (
            f"warning: {other}: layout {mine}, but the model was trained on layout offset at 100 um\n"
        )


def test_the_most_variable_genes_are_chosen(slices):
    whole = embed.WholeSlice.read(slices["usual"][0])
    seen = whole.totals > 0
    dense = log_normalise(
        torch.from_numpy(whole.counts[:, seen].astype(np.int64).T), torch.from_numpy(whole.totals[seen]).double(), 1e4
    ).numpy()
    expected = np.sort(np.argsort(-dense.var(0), kind="stable")[:10])
    assert np.array_equal(embed.most_variable(whole, 1e4, 10), expected)
    assert np.array_equal(embed.most_variable(whole, 1e4, 100), np.arange(60))


def test_windows_reach_the_border_and_leave_no_cell_out():
    assert embed.origins(20, 6, 3) == [0, 3, 6, 9, 12, 14]
    assert embed.origins(12, 6, 3) == [0, 3, 6]
    assert embed.origins(6, 6, 3) == embed.origins(3, 6, 3) == [0]
    for length in range(1, 40):
        for window in range(1, 12):
            for stride in range(1, window + 1):
                covered = {y + i for y in embed.origins(length, window, stride) for i in range(window)}
                assert covered >= set(range(length))


def test_a_spot_without_a_single_count_is_embedded_too(model_folder, tissue, genes_tsv, tmp_path):
    counts, totals, cell = tissue.slice(12, 12, seed=5, holes=0)
    counts[:, 3, 4], totals[3, 4] = 0, 0
    counts[:, 6:, 5:], totals[6:, 5:] = 0, 0  # whole windows of them
    file = corpus.write_whole(tmp_path / "s.tar", counts, totals, cell, genes_tsv)
    X, rows, _ = read(run(model_folder, tmp_path / "x.safetensors", file))
    assert rows.tolist() == list(range(144))
    assert np.isfinite(X).all()


def test_several_slices_go_into_a_folder(model_folder, slices, tmp_path):
    files = [slices[name][0] for name in ("usual", "small")]
    out = run(model_folder, tmp_path / "out", *files)
    assert sorted(file.name for file in out.iterdir()) == ["small.safetensors", "usual.safetensors"]
    with pytest.raises(SystemExit, match="expected a folder"):
        run(model_folder, tmp_path / "x.safetensors", *files)


def test_the_untrained_model_is_the_one_training_started_from(model_folder, slices, tmp_path):
    trained, again = (read(run(model_folder, tmp_path / "a.safetensors", slices["usual"][0])) for _ in range(2))
    control = read(run(model_folder, tmp_path / "u.safetensors", slices["usual"][0], flags=["--untrained"]))
    assert np.array_equal(trained[0], again[0])
    assert control[2]["model"] == "untrained"
    assert not np.allclose(trained[0], control[0], atol=0.1)
    (tmp_path / "bare").mkdir()
    for name in ("config.json", "genes.tsv"):  # it needs no weights
        (tmp_path / "bare" / name).write_bytes((model_folder / name).read_bytes())
    bare = read(run(tmp_path / "bare", tmp_path / "b.safetensors", slices["usual"][0], flags=["--untrained"]))
    assert np.array_equal(bare[0], control[0])


def test_the_untrained_control_of_a_start_from_components_starts_from_them(shards, slices, tmp_path):
    folder = shutil.copytree(shards / "train", tmp_path / "train")
    axes = np.linalg.qr(np.random.default_rng(0).normal(size=(60, 8)))[0].astype(np.float32)
    corpus.add_components(folder, axes)
    flags = ["--gene-embeddings", "components", "--steps", "2", *SMALL]
    pretrain.main(["--shards", str(folder), "--out", str(tmp_path / "model"), *flags])
    model, _, _ = load(tmp_path / "model", untrained=True)
    start = model.gene_embedding.weight[:, :8].detach().numpy()
    np.testing.assert_allclose(start, axes * (60 / 32) ** 0.5, rtol=1e-6)
    X, _, _ = read(run(tmp_path / "model", tmp_path / "u.safetensors", slices["small"][0], flags=["--untrained"]))
    (tmp_path / "model" / "components.safetensors").unlink()
    assert read(run(tmp_path / "model", tmp_path / "t.safetensors", slices["small"][0]))[0].shape == X.shape
    with pytest.raises(SystemExit, match="found no components.safetensors"):
        run(tmp_path / "model", tmp_path / "u.safetensors", slices["small"][0], flags=["--untrained"])


def test_stride_and_genes_can_be_set(model_folder, slices, tmp_path):
    flags = ["--stride", "5", "--genes", "40"]
    X, _, metadata = read(run(model_folder, tmp_path / "x.safetensors", slices["usual"][0], flags=flags))
    assert (metadata["stride"], metadata["genes_used"]) == ("5", "40")
    with pytest.raises(SystemExit, match="stride 6.*expected a stride of 1 to 5"):
        run(model_folder, tmp_path / "x.safetensors", slices["usual"][0], flags=["--stride", "6"])


def test_a_slice_of_another_vocabulary_or_normalisation_is_refused(
    model_folder, slices, genes_tsv, tmp_path, monkeypatch
):
    _, counts, totals, cell, _ = slices["usual"]
    file = corpus.write_whole(tmp_path / "other.tar", counts, totals, cell, genes_tsv + b"#")
    config = json.loads((model_folder / "config.json").read_text())
    with pytest.raises(VocabularyMismatch, match="other.tar: found genes_sha256 .*Next step"):
        embed.read_for(config, file)
    monkeypatch.setattr(corpus, "TARGET_SUM", 1e6)
    file = corpus.write_whole(tmp_path / "scaled.tar", counts, totals, cell, genes_tsv)
    with pytest.raises(VocabularyMismatch, match="scaled.tar: found target_sum 1000000.0; expected 10000.0"):
        embed.read_for(config, file)


@pytest.mark.parametrize(
    "wrong", [{"slice": "../../x"}, {"slice": 7}, {"m": 10**12}, {"m": "many"}, {"h": -1}, {"format_version": 2}]
)
def test_a_hostile_slice_is_refused(slices, genes_tsv, tmp_path, wrong):
    """Its name becomes that of a file; its sizes are to be those of what it holds, before memory is taken for them."""
    _, counts, totals, cell, _ = slices["small"]
    file = corpus.write_whole(tmp_path / "evil.tar", counts, totals, cell, genes_tsv, **wrong)
    with pytest.raises(DamagedShards, match="evil.tar.*: found .*; expected"):
        embed.WholeSlice.read(file)


def test_a_compressed_slice_is_refused_before_it_is_unpacked(slices, tmp_path):
    (tmp_path / "small.tar").write_bytes(gzip.compress(slices["small"][0].read_bytes()))
    with pytest.raises(DamagedShards, match="small.tar: found ReadError"):
        embed.WholeSlice.read(tmp_path / "small.tar")


def test_a_damaged_slice_is_named(slices, tmp_path):
    content = slices["usual"][0].read_bytes()
    file = tmp_path / "cut.tar"
    for damaged in (content[:2000], b"", b"nonsense" * 200):
        file.write_bytes(damaged)
        with pytest.raises(DamagedShards, match="cut.tar"):
            embed.WholeSlice.read(file)
    with pytest.raises(DamagedShards, match=r"absent.tar: found FileNotFoundError"):
        embed.WholeSlice.read(tmp_path / "absent.tar")
