"""The model: what its features and predictions must and must not depend on (its loss: test_objective.py)."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save

from trainer import masks
from trainer.data import Vocabulary
from trainer.errors import ConfigError, VocabularyMismatch
from trainer.expression import expected_log_normalised, log_normalise
from trainer.model import ModelConfig, attended, build, fixed_loadings, position_encoding, rotate, rotation

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
    "distance": {"positions": "distance"},
    "fixed": {"gene_embeddings": "fixed", "axes": 4, "inputs": "slice", "positions": "distance"},
    "fixed spot": {"gene_embeddings": "fixed", "axes": 4, "inputs": "slice", "unit": "spot"},
}


def vocabulary(means=MEANS, sha256="") -> Vocabulary:
    return Vocabulary([f"g{k}" for k in range(len(means))], means, means**2, sha256)


@pytest.fixture(scope="module")
def components(tmp_path_factory):
    """A file of five components, of the vocabulary "abc"."""
    draw = np.random.default_rng(7)
    axes, noise = np.linalg.qr(draw.normal(size=(CFG.n_genes, 5)))[0], draw.uniform(0.1, 2, CFG.n_genes)
    return write_axes(tmp_path_factory.mktemp("components") / "components.safetensors", axes, noise=noise)


@pytest.fixture(params=VARIANTS)
def model(request, components):
    cfg = dataclasses.replace(CFG, **VARIANTS[request.param])
    model = build(cfg, vocabulary(sha256="abc"), 3, components)
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
        model.decode(model.encode(v, genes, observed, masked, p), genes, observed, p)
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
    weights = model.gene_loading if model.cfg.gene_embeddings == "fixed" else model.gene_embedding.weight
    with torch.no_grad():
        weights[:] = weights[0].clone()
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
    assert model.decode(features, genes, nothing, places).isfinite().all()
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
        {"axes": 0},
        {"positions": "distance", "unit": "spot"},
        {"positions": "distance", "unit": "multispot"},
        {"gene_embeddings": "fixed"},
        {"gene_embeddings": "fixed", "inputs": "centred"},
        {"inputs": "slice", "likelihood": "poisson"},
        {"inputs": "slice", "targets": "standardised"},
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        ModelConfig(**{**dict(n_genes=11, m=5, h=2, w=3, width=8, heads=2, decoder_width=4, decoder_heads=2), **wrong})


def write_axes(file, axes, sha256="abc", noise=None):
    tensors = {"components": axes, "noise": np.ones(len(axes)) if noise is None else noise}
    tensors = {name: array.astype(np.float32) for name, array in tensors.items()}
    file.write_bytes(save(tensors, {"format_version": "1", "genes_sha256": sha256}))
    return file


def test_scores_on_fixed_components_have_unit_noise_and_keep_the_components_where_they_are(components):
    """L' diag(noise) L = 1, and L spans what A does; of all such L the one that turns A least."""
    stored = load_file(components)
    axes, noise = (stored[name].astype(float) for name in ("components", "noise"))
    for k in (1, 3, 5):
        L = fixed_loadings(components, vocabulary(sha256="abc"), k).double().numpy()
        assert L.shape == (11, k)
        np.testing.assert_allclose(L.T @ (noise[:, None] * L), np.eye(k), atol=1e-5)
        root = np.linalg.lstsq(axes[:, :k], L, rcond=None)[0]
        np.testing.assert_allclose(axes[:, :k] @ root, L, atol=1e-6)
        np.testing.assert_allclose(root, root.T, atol=1e-5)  # the symmetric root
        assert np.linalg.eigvalsh(root).min() > 0
    equal = write_axes(components.with_name("equal.safetensors"), axes, noise=np.full(11, 4.0))
    np.testing.assert_allclose(fixed_loadings(equal, vocabulary(sha256="abc"), 5).numpy(), axes / 2, atol=1e-6)


def test_a_component_of_genes_without_noise_does_not_drown_the_others(tmp_path):
    axes = np.eye(11)[:, :3]
    file = write_axes(tmp_path / "c.safetensors", axes, noise=np.array([1.0, 0.0, 1.0, *[1.0] * 8]))
    L = fixed_loadings(file, vocabulary(sha256="abc"), 3)
    assert L.isfinite().all()
    assert L.abs().max() <= 1e3 * (1 + 1e-6)


def test_fixed_loadings_are_part_of_the_model_but_not_trained(components):
    cfg = dataclasses.replace(CFG, **VARIANTS["fixed"])
    model = build(cfg, vocabulary(sha256="abc"), 0, components)
    assert torch.equal(model.gene_loading, fixed_loadings(components, vocabulary(sha256="abc"), 4))
    assert "gene_loading" in model.state_dict()
    names = {name for name, _ in model.named_parameters()}
    assert not {name for name in names if name.startswith("gene_")}
    assert sum(name.endswith("log_slope") for name in names) == 2


def test_a_fresh_model_of_fixed_embeddings_predicts_the_slices_mean(components, window):
    """Zero, since values are about it."""
    values, genes, observed, masked, places = window
    model = build(dataclasses.replace(CFG, **VARIANTS["fixed"]), vocabulary(sha256="abc"), 0, components)
    features = model.encode(values.float(), genes, observed, masked, places)
    assert torch.equal(model.decode(features, genes, observed, places), torch.zeros(2, 6, 5))


def test_too_few_components_for_the_axes_are_refused_with_the_number_there_are(components):
    cfg = dataclasses.replace(CFG, **VARIANTS["fixed"] | {"axes": 6})
    with pytest.raises(ConfigError, match="components.safetensors: found 5 components; expected .*6.*--axes 5"):
        build(cfg, vocabulary(sha256="abc"), 0, components)
    with pytest.raises(ConfigError, match="found no components.safetensors"):
        build(cfg, vocabulary(sha256="abc"), 0, None)


def line_of(n, components, steepness, **knobs):
    """A model of n sites in a row, one pitch apart, whose heads all have this slope; values, genes, observed, places."""
    cfg = dataclasses.replace(CFG, **{**VARIANTS["fixed"], "h": 1, "w": n, **knobs})
    model = build(cfg, vocabulary(sha256="abc"), 3, components).double()
    with torch.no_grad():
        for block in [*model.encoder, *model.decoder]:
            block.log_slope.fill_(math.log(steepness))
    draw = torch.Generator().manual_seed(0)
    values = torch.randn(1, n, 5, generator=draw, dtype=torch.float64)
    places = torch.stack([torch.zeros(n), torch.arange(n)], dim=1).double()[None]
    return model, values, torch.arange(5)[None], torch.ones(1, n, dtype=torch.bool), places


@pytest.mark.parametrize("embeddings", [{}, {"gene_embeddings": "random", "inputs": "plain"}])
def test_a_change_counts_for_less_the_farther_away_it_is(components, embeddings):
    moved = {}
    for steepness in (0.1, 3.0):
        model, values, genes, observed, places = line_of(8, components, steepness, **embeddings)
        changed = values.clone()
        changed[0, 0] += 1
        before, after = (model.encode(v, genes, observed, None, places) for v in (values, changed))
        moved[steepness] = (after - before).norm(dim=2)[0]
    steep = moved[3.0]
    assert (steep[2:] < steep[:-2] / 5).all()  # two pitches farther
    assert steep[7] < 1e-6 * steep[0] < moved[0.1][7]  # a gentle slope lets the far end hear of it


def test_attention_by_distance_is_the_softmax_of_slopes_written_out(components):
    """Where queries and keys say nothing, a head is the mean over the keys, each weighing exp(-slope * pitches)."""
    model, _, _, observed, places = line_of(5, components, 0.7)
    observed[0, 3] = False
    block, x = model.encoder[0], torch.randn(1, 5, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        block.log_slope.copy_(torch.tensor([0.7, 2.0]).log())
        block.query_key_value.weight[:8] = 0
        block.query_key_value.bias[16:] = torch.arange(8)
    found = block.attention(x, attended(observed), None, model.distance(places))
    value = x @ block.query_key_value.weight[16:].T + block.query_key_value.bias[16:]
    rows = []
    for site in range(5):
        heads = []
        for head, slope in enumerate((0.7, 2.0)):
            weight = torch.tensor([math.exp(-slope * abs(site - t)) if t != 3 else 0.0 for t in range(5)]).double()
            heads.append((weight / weight.sum()) @ value[0, :, 4 * head : 4 * head + 4])
        rows.append(torch.cat(heads))
    expected = torch.stack(rows) @ block.project.weight.T + block.project.bias
    assert torch.allclose(found[0], expected, atol=1e-6)


def test_where_sites_lie_matters_by_distance_alone(components):
    model, values, genes, observed, places = line_of(6, components, 0.5)
    turned = places @ torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double() + torch.tensor([40.0, -3.0])
    before, after, wider = (model.encode(values, genes, observed, None, p) for p in (places, turned, 2 * places))
    assert torch.allclose(before, after, atol=1e-4)  # distances are float32
    assert not torch.allclose(before, wider, atol=1e-3)


def test_the_visible_genes_are_weighed_by_their_loadings(components):
    """A site that shows a component in full gets the same scores whichever genes of it are visible: as many times the loading."""
    model = build(dataclasses.replace(CFG, **VARIANTS["fixed"]), vocabulary(sha256="abc"), 0, components).double()
    L, genes = model.gene_loading.clone(), torch.arange(11)[None]
    values = torch.randn(1, 1, 11, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    masked = torch.zeros(1, 1, 11, dtype=torch.bool)
    masked[..., ::2] = True
    for hidden, seen in ((None, torch.ones(11)), (masked, (~masked[0, 0]).double())):
        expected = (values[0, 0] * seen) @ L * (L.square().sum() / (L.square().sum(1) * seen).sum())
        assert torch.allclose(model.components_of(values, genes, hidden)[0, 0], expected)
    assert (model.components_of(values, genes, torch.ones_like(masked)) == 0).all()


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

    def test_genes_are_hidden_for_a_whole_window_at_the_rate_asked(self):
        genes, positions = torch.arange(3, 303).expand(400, -1), torch.arange(400)
        for ratio in (0.1, 0.3, 0.75):
            hidden = masks.gene_mask(0, 0, positions, genes, ratio)
            assert hidden.shape == (400, 300)
            assert hidden.dtype == torch.bool
            hidden = hidden.double()
            for axis in (0, 1):
                per = hidden.mean(axis)
                spread = math.sqrt(ratio * (1 - ratio) / (hidden.numel() / len(per)))
                assert (per - ratio).abs().max() < 5 * spread
                assert 0.8 < per.std() / spread < 1.2  # as independent draws spread

    def test_hidden_genes_follow_gene_position_epoch_and_seed_alone(self):
        base = masks.gene_mask(0, 0, self.positions, self.genes, 0.3)
        cut = [
            masks.gene_mask(0, torch.tensor(0), self.positions[i : i + 13], self.genes[i : i + 13].int(), 0.3)
            for i in (0, 13, 26, 39)
        ]
        assert torch.equal(base, torch.cat(cut))
        assert torch.equal(base, masks.gene_mask(0, 0, self.positions, self.genes.flip(1), 0.3).flip(1))
        for seed, epoch, moved in ((1, 0, 0), (0, 1, 0), (0, masks.VALIDATION, 0), (0, 0, 40)):
            other = masks.gene_mask(seed, epoch, self.positions + moved, self.genes, 0.3)
            assert 0.3 < (base != other).float().mean() < 0.54  # independent draws differ in 2 x .3 x .7 = .42

    def test_hidden_genes_entries_and_sites_are_drawn_apart(self):
        genes, positions = torch.arange(60).expand(400, -1), torch.arange(400)
        gone = masks.gene_mask(0, 0, positions, genes, 0.3)[:, None].expand(-1, 36, -1).double() - 0.3
        entries = masks.entry_mask(0, 0, positions, 36, genes, 0.3).double() - 0.3
        sites = masks.site_mask(0, 0, positions, 36, 0.3)[:, :, None].expand_as(gone).double() - 0.3
        first = entries[:, :1].expand_as(gone)  # of the site whose word that of the window's genes begins with
        for other in (entries, sites, first):
            assert abs((gone * other).mean()) < 5 * 0.21 / math.sqrt(400 * 60 if other is first else 400 * 36)
