"""Hidden regions filled in by every unit, from what is visible alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.numpy import save_file

from tests.trainer import corpus
from tests.trainer.conftest import FIXED, SMALL
from trainer import inpaint, pretrain
from trainer.expression import expected_log_normalised
from trainer.model import load

H, W = 14, 15
GENES = np.arange(3, 57, 2, dtype=np.int32)  # 27 of 60
VARIANTS = {
    "patch": "--mask-sites 0.2",
    "patch, relative": "--positions relative",
    "patch, likelihood": "--likelihood nb",
    "patch, distance": "--positions distance --mask-sites 0.2",
    "patch, fixed": " ".join(FIXED) + " --mask-ratio 0 --mask-genes 0.4 --mask-sites 0.2",
    "spot": "--unit spot",
    "spot, likelihood": "--unit spot --likelihood nb",
    "multispot": "--unit multispot --neighbours 6",
    "slice": "--unit slice --domains 3 --inputs centred",
}


@pytest.fixture(scope="module")
def tissue_slice(tissue):
    return tissue.slice(H, W, seed=30)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tissue_slice, genes_tsv):
    return corpus.write_whole(tmp_path_factory.mktemp("whole") / "s.tar", *tissue_slice, genes_tsv)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, fixed_shards):
    """Model folders of every unit after a few steps, made when asked for."""
    made = {}

    def make(name: str):
        if name not in made:
            made[name] = tmp_path_factory.mktemp("model") / "model"
            flags = [*"--inputs centred --steps 12 --lr 3e-3".split(), *VARIANTS[name].split()]
            with torch.enable_grad():  # the test that asks may have switched it off
                pretrain.main(["--shards", str(fixed_shards / "train"), "--out", str(made[name]), *SMALL, *flags])
        return made[name]

    return make


def cut(totals, sizes=((9, 4, 2, 3), (5, 3, 0, 9), (8, 5, 5, 0))):
    """Regions (window, side, corner) in the middle of their windows: hidden and visible cells of each."""
    hidden, visible = [], []
    for window, side, y, x in sizes:
        inner, seen = (window - side) // 2, np.zeros((H, W), np.int8)
        seen[y : y + window, x : x + window] = 1
        seen[y + inner : y + inner + side, x + inner : x + inner + side] = 2
        seen[totals == 0] = 0
        hidden.append(np.flatnonzero(seen == 2))
        visible.append(np.flatnonzero(seen == 1))
    return [(window, side, i, y, x) for i, (window, side, y, x) in enumerate(sizes)], hidden, visible


def write_regions(file, totals, genes_tsv, facts=None, **changes):
    """A file of regions by docs/format.md."""
    region, hidden, visible = cut(totals)
    tensors = {"genes": GENES, "columns": GENES, "region": np.array(region, np.int32)}
    for name, cells in (("hidden", hidden), ("visible", visible)):
        tensors[name] = np.concatenate(cells).astype(np.int32)
        tensors[f"n_{name}"] = np.array(list(map(len, cells)), np.int32)
    known = {"format_version": 1, "slice": "s", "h": H, "w": W, "genes_sha256": corpus.sha256(genes_tsv), "seed": 0}
    save_file(tensors | changes, file, {key: str(value) for key, value in (known | (facts or {})).items()})
    return file


@pytest.fixture(scope="module")
def regions(tmp_path_factory, tissue_slice, genes_tsv):
    return write_regions(tmp_path_factory.mktemp("regions") / "r.safetensors", tissue_slice[1], genes_tsv)


def run(folder, whole, regions, out, *flags):
    """Y of the command, and the bytes it wrote."""
    files = ["--model", folder, "--shards", whole, "--regions", regions, "--out", out]
    inpaint.main([*map(str, files), "--device", "cpu", *flags])
    with safe_open(out, "np") as opened:
        return opened.get_tensor("Y"), out.read_bytes()


def shrunk(residual: np.ndarray) -> np.ndarray:
    """Mean over the rows [v, m], shrunk by chance's share of its squares."""
    mean, chance = residual.mean(0), (residual.var(0, ddof=1) / len(residual)).sum()
    return mean * max(0.0, 1 - chance / (mean**2).sum())


def values_of(tissue_slice) -> np.ndarray:
    """Normalised expression [H * W, 27]."""
    counts, totals, _ = tissue_slice
    scale = np.divide(1e4, totals, out=np.zeros_like(totals), where=totals > 0)
    return np.log1p(counts[GENES] * scale).reshape(len(GENES), -1).T


def alone(model, values, shown: bool):
    """Features [S, d] of sites by themselves, from all of their genes or none."""
    values = torch.from_numpy(values).float()[None]
    masked = torch.full(values.shape, not shown)
    genes = torch.from_numpy(GENES)[None]
    return model.transform(model.sum_genes(values, genes, masked))


def prediction(model, features, depth: float = 1.0) -> np.ndarray:
    """Normalised expression [S, 27] that features [1, S, d] of sites by themselves stand for."""
    genes = torch.from_numpy(GENES)[None]
    scores = model.decode(features, genes, torch.ones(features.shape[:2], dtype=torch.bool))
    return model.predict(scores, genes, torch.full(features.shape[:2], depth))[0].numpy()


@pytest.mark.parametrize("name", VARIANTS)
def test_only_visible_cells_of_the_window_tell_anything(
    folders, tissue_slice, whole, regions, genes_tsv, tmp_path, name
):
    """Other counts and totals wherever a region's window has no visible cell: the same bytes. Visible ones: others.

    Of inputs about the slice's mean all cells but the hidden ones tell something: other hidden ones, the same bytes.
    """
    counts, totals, cell = tissue_slice
    folder = folders(name)
    y, content = run(folder, whole, regions, tmp_path / "a.safetensors")
    _, hidden, visible = cut(totals)
    assert y.shape == (sum(map(len, hidden)), 27)
    assert y.dtype == np.float32
    assert np.isfinite(y).all()
    ends = np.cumsum([0, *map(len, hidden)])
    blind, about_mean = name.startswith("spot"), name == "patch, fixed"
    for i in range(3):
        of = slice(ends[i], ends[i + 1])
        dark = np.isin(np.arange(H * W), hidden[i]) if about_mean else ~np.isin(np.arange(H * W), visible[i])
        for touched, moves in (
            (dark, False),
            (np.isin(np.arange(H * W), visible[i]), True),
        ):
            other, other_totals = counts.reshape(60, -1).copy(), totals.ravel().copy()
            touched = touched & (other_totals > 0)
            other[:, touched] = np.random.default_rng(i).permutation(other[:, touched], axis=0) + 7
            other_totals[touched] += 900
            file = corpus.write_whole(
                tmp_path / "s.tar", other.reshape(60, H, W), other_totals.reshape(H, W), cell, genes_tsv
            )
            moved = run(folder, file, regions, tmp_path / "b.safetensors")[0]
            assert np.array_equal(moved[of], y[of]) == (not moves or name == "spot")
            if blind and moves and name != "spot":  # its depth alone
                assert not np.array_equal(moved[of], y[of])
    assert run(folder, whole, regions, tmp_path / "c.safetensors")[1] == content


@pytest.mark.parametrize("name", VARIANTS)
def test_the_batch_size_changes_rounding_at_most(folders, whole, regions, tmp_path, name):
    folder = folders(name)
    one, all_ = (run(folder, whole, regions, tmp_path / "x", "--batch-size", n)[0] for n in ("1", "64"))
    np.testing.assert_allclose(one, all_, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("patch")])
def test_a_patch_is_the_mean_over_tiles_weighed_by_what_they_see(folders, tissue_slice, whole, regions, tmp_path, name):
    """Against a plain transcription: tiles of 6 x 5, two apart (the last flush), padded where the window is smaller."""
    folder, (_, totals, _) = folders(name), tissue_slice
    model, config, _ = load(folder)
    values, genes = torch.from_numpy(values_of(tissue_slice)).float(), torch.from_numpy(GENES)[None]
    y = run(folder, whole, regions, tmp_path / "x", "--no-offset")[0]
    region, hidden, visible = cut(totals)
    rows, cols = np.divmod(np.arange(H * W), W)
    lattice = torch.from_numpy(np.column_stack([rows * np.sqrt(3) / 2, (2 * cols + rows % 2) / 2]))  # layout offset
    by_distance, expected, raised = "distance" in config["model"]["positions"], [], []
    for (window, _, _, top, left), cells, seen in zip(region, hidden, visible, strict=True):
        depth, centre = totals.ravel()[seen].mean() / 1e4, torch.zeros(27)
        if name == "patch, fixed":
            centre = values[(totals.ravel() > 0) & ~np.isin(np.arange(H * W), cells)].mean(0)
        sums, shares = np.zeros((H * W, 27)), np.zeros((H * W, 1))
        for i in {9: (0, 2, 3), 5: (0,), 8: (0, 2)}[window]:
            for j in {9: (0, 2, 4), 5: (0,), 8: (0, 2, 3)}[window]:
                shown = torch.zeros(1, 30, 27)
                state, at = np.zeros(30, int), np.full(30, -1)
                for s in range(30):
                    r, c = i + s // 5, j + s % 5
                    if r < window and c < window:
                        at[s] = (top + r) * W + left + c
                        state[s] = 2 * (at[s] in cells) + (at[s] in seen)
                    if state[s] == 1:
                        shown[0, s] = values[at[s]] - centre
                known, gone = torch.from_numpy(state == 1)[None], torch.from_numpy(state == 2)[None]
                attended = known | gone if config["objective"]["mask_sites"] and not by_distance else known
                where = lattice[at][None]
                features = model.encode(shown, genes, attended, gone[:, :, None].expand(1, 30, 27), where)
                scores = model.decode(features, genes, attended, where)
                predicted = (model.predict(scores, genes, torch.full((1, 30), depth))[0] + centre).numpy()
                share = 1 + (state == 1).sum()
                sums[at[state > 0]] += share * predicted[state > 0]
                shares[at[state > 0]] += share
        expected.append(sums[cells] / shares[cells])
        raised.append(shrunk(values.numpy()[seen] - sums[seen] / shares[seen]))
    np.testing.assert_allclose(y, np.concatenate(expected), atol=1e-5)
    y = run(folder, whole, regions, tmp_path / "y")[0]
    expected = [told + offset for told, offset in zip(expected, raised, strict=True)]
    np.testing.assert_allclose(y, np.concatenate(expected), atol=1e-5)
    assert sum(np.abs(offset).max() > 0.01 for offset in raised) > 1


@torch.no_grad()
def test_a_spot_by_itself_is_told_the_same_everywhere(folders, whole, regions, tmp_path):
    y = run(folders("spot"), whole, regions, tmp_path / "x")[0]
    model, _, _ = load(folders("spot"))
    nothing = prediction(model, alone(model, np.zeros((1, 27)), shown=False))
    np.testing.assert_allclose(y, np.broadcast_to(nothing, y.shape), atol=1e-6)


@torch.no_grad()
def test_a_likelihood_predicts_the_expected_log_at_the_mean_depth_of_the_visible(
    folders, tissue_slice, whole, regions, tmp_path
):
    y = run(folders("spot, likelihood"), whole, regions, tmp_path / "x")[0]
    model, _, _ = load(folders("spot, likelihood"))
    totals, (_, hidden, visible) = tissue_slice[1].ravel(), cut(tissue_slice[1])
    genes = torch.from_numpy(GENES)[None]
    scores = model.decode(alone(model, np.zeros((1, 27)), shown=False), genes, torch.ones(1, 1, dtype=torch.bool))
    expected = []
    for cells, seen in zip(hidden, visible, strict=True):
        depth = float(totals[seen].mean() / 1e4)
        value = expected_log_normalised(scores.exp() * depth, torch.tensor(1 / depth), model.dispersion(genes))
        expected.append(np.broadcast_to(value[0].numpy(), (len(cells), 27)))
    np.testing.assert_allclose(y, np.concatenate(expected), atol=1e-5)
    assert len({row.tobytes() for row in y}) == 3


@torch.no_grad()
def test_a_multispot_is_the_weighted_mean_of_its_nearest_visible_sites(folders, tissue_slice, whole, regions, tmp_path):
    y = run(folders("multispot"), whole, regions, tmp_path / "x", "--no-offset")[0]
    model, _, _ = load(folders("multispot"))
    features = alone(model, values_of(tissue_slice), shown=True)[0]
    rows, cols = np.divmod(np.arange(H * W), W)
    places = np.column_stack([rows * np.sqrt(3) / 2, (2 * cols + rows % 2) / 2])  # layout offset
    expected = []
    for cells, seen in zip(*cut(tissue_slice[1])[1:], strict=True):
        for cell in cells:
            distance = np.linalg.norm(places[seen] - places[cell], axis=1).round(6)
            order = np.argsort(distance, kind="stable")[:6]
            weight = torch.from_numpy(1 / (1 + distance[order])).float()
            expected.append((weight @ features[seen[order]]) / weight.sum())
    np.testing.assert_allclose(y, prediction(model, torch.stack(expected)[None]), atol=1e-5)


@torch.no_grad()
def test_a_site_of_the_slice_unit_takes_the_domain_of_its_nearest_visible_site(
    folders, tissue_slice, whole, regions, tmp_path
):
    y = run(folders("slice"), whole, regions, tmp_path / "x", "--no-offset")[0]
    model, _, _ = load(folders("slice"))
    values = values_of(tissue_slice)
    features, blank = alone(model, values, shown=True)[0], alone(model, np.zeros((1, 27)), shown=False)[0, 0]
    x = model.sum_genes(torch.from_numpy(values).float()[None], torch.from_numpy(GENES)[None])[0].numpy()
    rows, cols = np.divmod(np.arange(H * W), W)
    places = np.column_stack([rows * np.sqrt(3) / 2, (2 * cols + rows % 2) / 2])
    expected = []
    for cells, seen in zip(*cut(tissue_slice[1])[1:], strict=True):
        centres = x[seen[[int((k + 0.5) / 3 * len(seen)) for k in range(3)]]]  # Lloyd, as docs/method.md has it
        for _ in range(10):
            domain = np.linalg.norm(x[seen][:, None] - centres, axis=2).argmin(1)
            centres = np.array([x[seen[domain == k]].mean(0) if (domain == k).any() else centres[k] for k in range(3)])
        domain = np.linalg.norm(x[seen][:, None] - centres, axis=2).argmin(1)
        for cell in cells:
            nearest = np.linalg.norm(places[seen] - places[cell], axis=1).round(6).argmin()
            expected.append((blank + features[seen[domain == domain[nearest]]].mean(0)) / 2)
    np.testing.assert_allclose(y, prediction(model, torch.stack(expected)[None]), atol=1e-5)


def test_before_its_first_step_a_model_predicts_the_corpus_mean(folders, whole, regions, genes_tsv, tmp_path):
    y = run(folders("patch"), whole, regions, tmp_path / "x", "--untrained", "--no-offset")[0]
    mean = [float(line.split("\t")[5]) for line in genes_tsv.decode().splitlines()[2:]]
    np.testing.assert_allclose(y, np.broadcast_to(np.array(mean)[GENES], y.shape), atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("name", ["patch", "multispot", "slice"])
def test_what_the_visible_hold_beyond_the_corpus_mean_is_added_shrunk(
    folders, tissue_slice, whole, regions, genes_tsv, tmp_path, name
):
    y = run(folders(name), whole, regions, tmp_path / "x", "--untrained")[0]
    mean = np.array([float(line.split("\t")[5]) for line in genes_tsv.decode().splitlines()[2:]])[GENES]
    values, expected = values_of(tissue_slice), []
    for cells, seen in zip(*cut(tissue_slice[1])[1:], strict=True):
        expected.append(np.broadcast_to(mean + shrunk(values[seen] - mean), (len(cells), 27)))
    np.testing.assert_allclose(y, np.concatenate(expected), atol=1e-5)


@torch.no_grad()
def test_visible_cells_that_no_tile_with_a_hidden_one_covers_say_nothing_of_the_offset(
    folders, tissue_slice, whole, genes_tsv, tmp_path
):
    """A window of 13 and tiles of 6 x 5, two apart: those that see the 2 x 2 hidden cells are of lines 0 to 11, columns 2 to 10."""
    region, (hidden,), (visible,) = cut(tissue_slice[1], sizes=((13, 2, 0, 1),))
    changes = {"region": np.array(region, np.int32)}
    for key, cells in (("hidden", hidden), ("visible", visible)):
        changes |= {key: cells.astype(np.int32), f"n_{key}": np.array([len(cells)], np.int32)}
    file = write_regions(tmp_path / "r.safetensors", tissue_slice[1], genes_tsv, **changes)
    y = run(folders("patch"), whole, file, tmp_path / "x", "--untrained")[0]
    rows, cols = np.divmod(visible, W)
    seen = visible[(rows <= 11) & (cols - 1 >= 2) & (cols - 1 <= 10)]
    assert 0 < len(seen) < len(visible)
    mean = np.array([float(line.split("\t")[5]) for line in genes_tsv.decode().splitlines()[2:]])[GENES]
    expected = mean + shrunk(values_of(tissue_slice)[seen] - mean)
    np.testing.assert_allclose(y, np.broadcast_to(expected, y.shape), atol=1e-5)


def test_an_offset_that_chance_explains_is_none():
    rng = np.random.default_rng(0)
    noise = torch.from_numpy(rng.normal(size=(50, 4000)))
    truth = torch.from_numpy(rng.normal(size=4000))
    assert inpaint.offset(noise).square().mean() < 0.1 * noise.mean(0).square().mean()
    assert (inpaint.offset(noise + truth) - truth).square().mean() < (noise.mean(0)).square().mean()  # below the mean's
    for rows in (0, 1):
        assert not inpaint.offset(noise[:rows] + truth).any()
    assert not inpaint.offset(torch.zeros(5, 3)).any()


def test_before_its_first_step_a_model_about_the_slices_mean_predicts_that_of_the_cells_not_hidden(
    folders, tissue_slice, whole, regions, tmp_path
):
    y = run(folders("patch, fixed"), whole, regions, tmp_path / "x", "--untrained", "--no-offset")[0]
    values, expected = values_of(tissue_slice), []
    for cells in cut(tissue_slice[1])[1]:
        others = np.setdiff1d(np.flatnonzero(tissue_slice[1].ravel() > 0), cells)
        expected.append(np.broadcast_to(values[others].mean(0), (len(cells), 27)))
    np.testing.assert_allclose(y, np.concatenate(expected), rtol=2e-6)
    assert len({row.tobytes() for row in y}) == 3


@pytest.mark.parametrize("variant", ["patch", "patch, fixed"])
def test_a_model_that_learnt_from_hidden_sites_tells_more_than_the_mean(
    fixed_shards, tissue_slice, whole, regions, tmp_path_factory, variant
):
    """The planted factors are smooth, so that what lies around a small region says something of it."""
    folder = tmp_path_factory.mktemp("learnt") / "model"
    flags = [*"--inputs centred".split(), *VARIANTS[variant].split()]
    flags += "--mask-sites 0.4 --steps 100 --lr 5e-3 --optimizer adamw".split()
    pretrain.main(["--shards", str(fixed_shards / "train"), "--out", str(folder), *SMALL, *flags])
    y, mean = (run(folder, whole, regions, folder / "x", "--no-offset", *flags)[0] for flags in ([], ["--untrained"]))
    truth = values_of(tissue_slice)[np.concatenate(cut(tissue_slice[1])[1])]
    assert ((y - truth) ** 2).mean() < 0.9 * ((mean - truth) ** 2).mean()


@pytest.mark.parametrize(("name", "flags"), [("patch", ["--no-offset"]), ("spot", [])])
def test_the_file_says_that_the_model_speaks_alone(folders, whole, regions, tmp_path, name, flags):
    run(folders(name), whole, regions, tmp_path / "x", *flags)
    with safe_open(tmp_path / "x", "np") as opened:
        assert opened.metadata()["offset"] == "false"


def test_the_file_says_what_it_is(folders, whole, regions, tmp_path):
    run(folders("multispot"), whole, regions, tmp_path / "x")
    with safe_open(tmp_path / "x", "np") as opened, safe_open(regions, "np") as asked:
        said = opened.metadata()
        assert len(said.pop("sha256")) == 64
        assert said == {
            "format_version": "1", "slice": "s", "model": "model", "unit": "multispot", "simulated": "true",
            "pretrained_on_simulated": "true", "offset": "true",
        }  # fmt: skip
        assert np.array_equal(opened.get_tensor("cell"), asked.get_tensor("hidden"))
        assert np.array_equal(opened.get_tensor("n_hidden"), asked.get_tensor("n_hidden"))


@pytest.mark.parametrize(
    ("found", "facts", "changes"),
    [
        ("format_version", {"format_version": 2}, {}),
        ("'t'", {"slice": "t"}, {}),
        ("vocabulary", {"genes_sha256": "0"}, {}),
        ("not observed", {}, {"hidden": np.arange(H * W, H * W + 9, dtype=np.int32), "n_hidden": np.array([3] * 3)}),
        ("not observed", {}, {"n_visible": np.array([1, 2, 3], dtype=np.int32)}),
        ("some of the regions' genes", {}, {"genes": GENES + 20}),
    ],
)
def test_regions_that_do_not_fit_the_slice_are_refused(
    folders, tissue_slice, whole, genes_tsv, tmp_path, found, facts, changes
):
    file = write_regions(tmp_path / "r.safetensors", tissue_slice[1], genes_tsv, facts, **changes)
    with pytest.raises(SystemExit, match=found):
        run(folders("spot"), whole, file, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_a_cut_file_of_regions_is_refused(folders, whole, regions, tmp_path):
    (tmp_path / "r").write_bytes(regions.read_bytes()[:-10])
    with pytest.raises(SystemExit, match="a file of regions"):
        run(folders("spot"), whole, tmp_path / "r", tmp_path / "x")
