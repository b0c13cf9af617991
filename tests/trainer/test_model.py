"""The model: what its features and predictions must and must not depend on (its loss: test_objective.py)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import save

from trainer import masks
from trainer.data import Vocabulary
from trainer.errors import ConfigError, VocabularyMismatch
from trainer.expression import expected_log_normalised, log_normalise
from trainer.model import ModelConfig, attended, build, position_encoding, rotate, rotation

CFG = ModelConfig(
    n_genes=11, m=5, h=2, w=3, width=8, depth=1, heads=2, feed_forward=12, decoder_width=8, decoder_depth=1,
    decoder_heads=2, neighbours=3, domains=2,
)  # fmt: skip


MEANS = np.linspace(0.1, 1.2, CFG.n_genes)
VARIANTS = {unit: {"unit": unit} for unit in ("patch", "spot", "multispot", "slice")} | {
    "centred": {"inputs": "centred"},
    "standardised": {"inputs": "standardised", "unit": "slice"},
    "relative": {"positions": "relative", "heads": 2, "width": 8},
    "none": {"positions": "none"},
}


def vocabulary(means=MEANS, sha256="") -> Vocabulary:
    return Vocabulary([f"g{k}" for k in range(len(means))], means, means**2, sha256)


@pytest.fixture(params=VARIANTS)
def model(request):
    cfg = dataclasses.replace(CFG, **VARIANTS[request.param])
    model = build(cfg, vocabulary(), seed=3)
    with torch.no_grad():  # away from the start, where the decoder's last layer is zero
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return model.double()


@pytest.fixture
def window():
    """values [2, 6, 5], genes [2, 5], observed [2, 6], masked [2, 6, 5], places [2, 6, 2]."""
    draw = torch.Generator().manual_seed(1)
    values = torch.rand(2, 6, 5, generator=draw, dtype=torch.float64) * 3
    genes = torch.stack([torch.randperm(CFG.n_genes, generator=draw)[:5].sort().values for _ in range(2)])
    observed = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1]]).bool()
    masked = torch.rand(2, 6, 5, generator=draw) < 0.4
    places = torch.cartesian_prod(torch.arange(2), torch.arange(3)).double().repeat(2, 1, 1)
    return values, genes, observed, masked, places


def test_the_encoder_does_not_see_masked_values(model, window):
    values, *rest = window
    masked = rest[2]
    before = model.encode(values, *rest)
    assert torch.equal(before, model.encode(values + 7 * masked, *rest))
    assert not torch.allclose(before, model.encode(values + 7 * ~masked, *rest))


def test_unobserved_sites_do_not_change_observed_sites(model, window):
    values, genes, observed, masked, places = window
    changed = values + 5 * ~observed[:, :, None]
    moved = places + 0.3 * ~observed[:, :, None]
    before, after = (
        model.decode(model.encode(v, genes, observed, masked, p), genes, observed)
        for v, p in ((values, places), (changed, moved))
    )
    assert torch.equal(before[observed], after[observed])


@pytest.mark.parametrize(("unit", "seen"), [("patch", {1, 2, 3, 4, 5}), ("spot", set()), ("multispot", {1, 3})])
def test_a_change_is_seen_by_the_sites_of_the_unit_alone(unit, seen, window):
    """Site 0 changes: at its nearest sites (k = 2, on a square lattice: beside and below), everywhere, nowhere else."""
    values, genes, _, _, places = window
    cfg = dataclasses.replace(CFG, unit=unit, neighbours=2)
    model, observed = build(cfg, vocabulary(), seed=3).double(), torch.ones(2, 6).bool()
    changed = values.clone()
    changed[0, 0] += 1
    before, after = (model.encode(v, genes, observed, None, places) for v in (values, changed))
    differs = {site for site in range(6) if not torch.allclose(before[0, site], after[0, site], atol=1e-9)}
    assert differs == {0} | seen
    assert torch.equal(before[1], after[1])


def test_relative_positions_depend_on_differences_alone():
    """Rotary turns: the product of query and key of two sites is the same wherever the pair lies in the window."""
    turn = rotation(5, 6, 8).double()
    query, key = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    query, key = (rotate(x.expand(1, 1, 30, 8), turn)[0, 0].view(5, 6, 8) for x in (query, key))
    product = (query[1, 2] * key[2, 4]).sum()
    assert product.item() == pytest.approx((query[3, 1] * key[4, 3]).sum().item(), rel=1e-6)
    assert product.item() != pytest.approx((query[1, 2] * key[2, 3]).sum().item(), rel=1e-3)


def test_the_order_of_genes_does_not_matter(model, window):
    values, genes, observed, _, places = window
    shuffle = torch.tensor([3, 0, 4, 1, 2])
    features = model.encode(values, genes, observed, None, places)
    other = model.encode(values[:, :, shuffle], genes[:, shuffle], observed, None, places)
    assert torch.allclose(features, other)


def test_masking_and_the_number_of_genes_keep_the_scale_of_the_input(model):
    """A site whose genes are all alike gets the same features however many of them it shows."""
    with torch.no_grad():
        model.gene_embedding.weight[:] = model.gene_embedding.weight[0]
        model.gene_mean[:], model.gene_deviation[:] = 0.2, 0.4
    rest = torch.ones(1, 6).bool(), None, torch.arange(12.0).view(1, 6, 2).double()
    few, many = torch.arange(3)[None], torch.arange(11)[None]
    values = torch.full((1, 6, 11), 0.7, dtype=torch.float64)
    features = model.encode(values[:, :, :3], few, *rest)
    assert torch.allclose(features, model.encode(values, many, *rest))
    masked = torch.zeros(1, 6, 11).bool()
    masked[:, :, 4:] = True
    assert torch.allclose(features, model.encode(values, many, rest[0], masked, rest[2]))


@pytest.mark.parametrize("targets", ["plain", "standardised"])
def test_a_fresh_model_predicts_each_genes_mean(window, targets):
    genes, observed, means = window[1], window[2], np.linspace(0.1, 1.2, CFG.n_genes)
    model = build(dataclasses.replace(CFG, targets=targets), vocabulary(means), seed=0)
    features = model.encode(window[0].float(), genes, observed, window[3])
    predictions = model.predict(model.decode(features, genes, observed), genes, torch.ones(2, 6))
    expected = torch.from_numpy(means).float()[genes][:, None, :].expand(-1, 6, -1)
    assert torch.equal(predictions, expected)


def test_a_window_without_observed_sites_stays_finite(model, window):
    values, genes, _, masked, places = window
    nothing = torch.zeros(2, 6).bool()
    features = model.encode(values, genes, nothing, masked, places)
    assert features.isfinite().all()
    assert model.decode(features, genes, nothing).isfinite().all()
    assert attended(nothing).all()


def test_every_site_of_a_window_has_its_own_position():
    table = position_encoding(16, 16, 64)
    distance = torch.cdist(table, table) + 10 * torch.eye(256)
    assert table.shape == (256, 64)
    assert distance.min() > 0.1


def test_the_first_weights_depend_on_the_seed_alone():
    means = vocabulary(np.zeros(CFG.n_genes))
    torch.manual_seed(5)
    first, state = build(CFG, means, seed=1), torch.random.get_rng_state()
    torch.manual_seed(6)
    again, other = build(CFG, means, seed=1), build(CFG, means, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.narrow.weight, other.narrow.weight)
    torch.manual_seed(5)
    assert torch.equal(state, torch.random.get_rng_state())  # building draws nothing from the caller's state


@pytest.mark.parametrize(
    "wrong",
    [
        {"heads": 3},
        {"width": 6, "heads": 2},
        {"depth": 0},
        {"inputs": "odd"},
        {"unit": "window"},
        {"neighbours": 0},
        {"domains": 0},
        {"positions": "relative", "width": 12, "heads": 2},
        {"likelihood": "nb", "targets": "standardised"},
        {"decoder_heads": 0},
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        ModelConfig(**{**dict(n_genes=11, m=5, h=2, w=3, width=8, heads=2, decoder_width=4, decoder_heads=2), **wrong})


def write_axes(file, axes, sha256="abc"):
    file.write_bytes(save({"components": axes.astype(np.float32)}, {"format_version": "1", "genes_sha256": sha256}))
    return file


@pytest.mark.parametrize("k", [3, 8, 10])
def test_gene_embeddings_start_from_components_at_the_scale_of_random_ones(tmp_path, k):
    axes = np.random.default_rng(0).normal(size=(11, k))
    file = write_axes(tmp_path / "components.safetensors", axes / np.linalg.norm(axes, axis=0))
    cfg = dataclasses.replace(CFG, gene_embeddings="components")
    start = build(cfg, vocabulary(sha256="abc"), 0, file).gene_embedding.weight.detach().numpy()
    random = build(CFG, vocabulary(), 0).gene_embedding.weight.detach().numpy()
    n = min(k, 8)
    for column in range(n):
        assert np.corrcoef(start[:, column], axes[:, column])[0, 1] == pytest.approx(1, abs=1e-5)
    assert np.square(start[:, :n]).mean() == pytest.approx(1 / 8, rel=1e-5)
    np.testing.assert_array_equal(start[:, n:], random[:, n:])


def test_missing_or_foreign_components_are_refused(tmp_path):
    cfg = dataclasses.replace(CFG, gene_embeddings="components")
    for file in (None, tmp_path / "absent.safetensors"):
        with pytest.raises(ConfigError, match="found no components.safetensors.*--gene-embeddings random"):
            build(cfg, vocabulary(), 0, file)
    file = write_axes(tmp_path / "components.safetensors", np.ones((11, 3)))
    with pytest.raises(VocabularyMismatch, match="components of genes.tsv abc; expected def"):
        build(cfg, vocabulary(sha256="def"), 0, file)
    file.write_bytes(b"nonsense")
    with pytest.raises(ConfigError, match="expected components of the corpus"):
        build(cfg, vocabulary(sha256="abc"), 0, file)


@pytest.mark.parametrize("dispersion", [None, 0.3, 5.0])
@pytest.mark.parametrize("mean", [0.0, 0.02, 1.5, 20.0, 300.0])
def test_the_expected_expression_is_that_of_many_draws(mean, dispersion):
    rng, scale = np.random.default_rng(0), 4.0
    counts = rng.poisson(mean if dispersion is None else rng.gamma(dispersion, mean / dispersion, 400_000), 400_000)
    arguments = [torch.tensor([x], dtype=torch.float64) for x in (mean, scale)]
    found = expected_log_normalised(*arguments, None if dispersion is None else torch.tensor([dispersion]).double())
    draws = np.log1p(scale * counts)
    assert found.item() == pytest.approx(draws.mean(), abs=4 * draws.std() / 400_000**0.5 + 0.02 * draws.mean())


def test_normalised_expression_is_zero_where_the_total_is_zero():
    counts = torch.tensor([[0, 3, 65535], [4, 0, 9]], dtype=torch.int32).to(torch.uint16)
    values = log_normalise(counts, torch.tensor([70000.0, 0.0]), 1e4)
    expected = [[0.0, math.log1p(3 * 1e4 / 7e4), math.log1p(65535 * 1e4 / 7e4)], [0.0, 0.0, 0.0]]
    assert torch.allclose(values, torch.tensor(expected), atol=1e-6)


class TestMasks:
    genes = torch.stack([torch.arange(0, 60, 2), torch.arange(1, 61, 2)] * 20)  # [40, 30]
    positions = torch.arange(40)

    def mask(self, positions=positions, genes=genes, seed=0, epoch=0, ratio=0.3):
        return masks.entry_mask(seed, epoch, positions, 36, genes, ratio)

    @pytest.mark.parametrize(
        ("seed", "epoch", "rows"),
        [
            (0, 0, (0xFA21, 0xCB29)),
            (7, 3, (0xA10A, 0xB70C)),
            (2**40 + 5, masks.VALIDATION, (0x5615, 0x40F1)),
            (2**63 - 1, 12, (0x09D9, 0x04C9)),
        ],
    )
    def test_they_are_those_of_earlier_versions(self, seed, epoch, rows):
        """Models could not be compared across versions otherwise."""
        genes = torch.tensor([[0, 1, 5, 70000], [2, 3, 4, 59]], dtype=torch.int32)
        mask = masks.entry_mask(seed, epoch, torch.tensor([0, 123456]), 4, genes, 0.3)
        found = [int("".join(str(int(entry)) for entry in sample.flatten()), 2) for sample in mask]
        assert tuple(found) == rows

    def test_they_are_the_same_however_the_epoch_is_cut_into_batches(self):
        whole = self.mask()
        for cut in (1, 7, 39):
            parts = [self.mask(self.positions[part], self.genes[part]) for part in (slice(0, cut), slice(cut, 40))]
            assert torch.equal(whole, torch.cat(parts))
        shuffled = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        assert torch.equal(whole[shuffled], self.mask(self.positions[shuffled], self.genes[shuffled]))

    def test_they_follow_the_gene_not_its_place_in_the_window(self):
        flipped = self.mask(genes=self.genes.flip(1))
        assert torch.equal(self.mask(), flipped.flip(2))

    def test_they_change_with_seed_epoch_and_position(self):
        base = self.mask()
        for other in (
            self.mask(seed=1),
            self.mask(epoch=1),
            self.mask(epoch=masks.VALIDATION),
            self.mask(self.positions + 40),
        ):
            assert 0.3 < (base != other).float().mean() < 0.54  # independent draws differ in 2 x .3 x .7 = .42

    @pytest.mark.parametrize("ratio", [0.1, 0.3, 0.75])
    def test_the_fraction_is_as_asked_everywhere(self, ratio):
        mask = self.mask(ratio=ratio).double()
        n = mask.numel()
        assert abs(mask.mean() - ratio) < 5 * math.sqrt(ratio * (1 - ratio) / n)
        for axis in ((1, 2), (0, 2), (0, 1)):
            per = mask.mean(axis)
            spread = math.sqrt(ratio * (1 - ratio) / (n / len(per)))
            assert (per - ratio).abs().max() < 5 * spread
            assert 0.6 < per.std() / spread < 1.5  # as independent draws spread: no stripes

    def test_sites_are_hidden_at_the_rate_asked_and_apart_from_their_entries(self):
        sites = masks.site_mask(0, 0, torch.arange(400), 36, 0.3)
        assert abs(sites.double().mean() - 0.3) < 5 * math.sqrt(0.21 / sites.numel())
        entries = masks.entry_mask(0, 0, torch.arange(400), 36, self.genes[:1].expand(400, -1), 0.3).double()
        hidden, shown = entries[sites].mean(), entries[~sites].mean()
        assert abs(hidden - shown) < 5 * math.sqrt(0.21 / entries[sites].numel() * 2)
        assert torch.equal(sites[7:9], masks.site_mask(0, torch.tensor(0), torch.arange(7, 9), 36, 0.3))

    def test_neighbouring_entries_are_independent(self):
        mask = self.mask().double() - 0.3
        shifts = [(mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[:, :, 1:], mask[:, :, :-1])]
        for one, other in shifts:
            assert abs((one * other).mean()) < 5 * 0.21 / math.sqrt(one.numel())
