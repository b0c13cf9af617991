"""The model and its loss, against a reference written with loops, and what they must not depend on."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch

from trainer import masks
from trainer.errors import ConfigError
from trainer.expression import log_normalise
from trainer.model import ModelConfig, attended, build, position_encoding

CFG = ModelConfig(
    n_genes=11, m=5, h=2, w=3, width=8, depth=1, heads=2, feed_forward=12, decoder_width=4, decoder_depth=1, decoder_heads=2
)  # fmt: skip


@pytest.fixture(params=["plain", "centred"])
def model(request):
    cfg = dataclasses.replace(CFG, values=request.param)
    model = build(cfg, np.linspace(0.1, 1.2, CFG.n_genes), seed=3)
    with torch.no_grad():  # away from the start, where the decoder's last layer is zero
        for weight in model.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    return model.double()


@pytest.fixture
def window():
    """values [2, 6, 5], genes [2, 5], observed [2, 6], masked [2, 6, 5]."""
    draw = torch.Generator().manual_seed(1)
    values = torch.rand(2, 6, 5, generator=draw, dtype=torch.float64) * 3
    genes = torch.stack([torch.randperm(CFG.n_genes, generator=draw)[:5].sort().values for _ in range(2)])
    observed = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 1, 0, 1]]).bool()
    masked = torch.rand(2, 6, 5, generator=draw) < 0.4
    return values, genes, observed, masked


def reference_loss(model, values, genes, observed, masked) -> float:
    """Eq. 8 in plain Python and float64: no batches, no tensor operation but reading the weights."""
    weights = {name: weight.detach().numpy() for name, weight in model.state_dict().items()}

    def linear(name, x):
        matrix, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return [sum(matrix[o][i] * x[i] for i in range(len(x))) + bias[o] for o in range(len(bias))]

    def norm(name, x):
        mean = sum(x) / len(x)
        spread = math.sqrt(sum((v - mean) ** 2 for v in x) / len(x) + 1e-5)
        return [
            (v - mean) / spread * g + b
            for v, g, b in zip(x, weights[f"{name}.weight"], weights[f"{name}.bias"], strict=True)
        ]

    def block(name, sites, heads, seen):
        d = len(sites[0])
        size = d // heads
        qkv = [linear(f"{name}.query_key_value", norm(f"{name}.norm_attention", x)) for x in sites]
        out = []
        for s, x in enumerate(sites):
            joined = []
            for head in range(heads):
                query = qkv[s][head * size : (head + 1) * size]
                scores = {}
                for t in range(len(sites)):
                    if seen[t]:
                        key = qkv[t][d + head * size : d + (head + 1) * size]
                        scores[t] = math.exp(sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(size))
                for i in range(size):
                    value = sum(p * qkv[t][2 * d + head * size + i] for t, p in scores.items())
                    joined.append(value / sum(scores.values()))
            x = [a + b for a, b in zip(x, linear(f"{name}.project", joined), strict=True)]
            hidden = linear(f"{name}.feed_forward.0", norm(f"{name}.norm_feed_forward", x))
            hidden = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden]
            out.append([a + b for a, b in zip(x, linear(f"{name}.feed_forward.2", hidden), strict=True)])
        return out

    total, number = 0.0, 0
    for b in range(len(values)):
        e = [weights["gene_embedding.weight"][k] for k in genes[b]]
        seen = observed[b].tolist()
        sites = []
        for s in range(CFG.h * CFG.w):
            visible = [k for k in range(CFG.m) if not masked[b, s, k]]
            y, x = divmod(s, CFG.w)
            position = []
            for coordinate in (y, x):
                angles = [coordinate / 10000 ** (i / (CFG.width // 4)) for i in range(CFG.width // 4)]
                position += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            mean = model.gene_mean[genes[b]] if model.cfg.values == "centred" else [0] * CFG.m
            scale = CFG.m / max(1, len(visible))
            sites.append(
                [
                    scale * sum((values[b, s, k].item() - float(mean[k])) * e[k][i] for k in visible) + position[i]
                    for i in range(CFG.width)
                ]
            )
        sites = block("encoder.0", sites, CFG.heads, seen)
        sites = [linear("narrow", norm("encoder_norm", x)) for x in sites]
        sites = block("decoder.0", sites, CFG.decoder_heads, seen)
        sites = [linear("widen", norm("decoder_norm", x)) for x in sites]
        for s, x in enumerate(sites):
            for k in range(CFG.m):
                if masked[b, s, k] and seen[s]:
                    predicted = (
                        sum(a * c for a, c in zip(x, e[k], strict=True)) + weights["gene_bias.weight"][genes[b, k]][0]
                    )
                    total, number = total + (predicted - values[b, s, k].item()) ** 2, number + 1
    return total / number


def test_the_loss_is_that_of_a_reference_written_with_loops(model, window):
    squared_error, n_masked = model(*window)
    assert (squared_error / n_masked).item() == pytest.approx(reference_loss(model, *window), rel=1e-6)


def test_the_encoder_does_not_see_masked_values(model, window):
    values, genes, observed, masked = window
    before = model.encode(values, genes, observed, masked)
    after = model.encode(values + 7 * masked, genes, observed, masked)
    assert torch.equal(before, after)
    assert not torch.allclose(before, model.encode(values + 7 * ~masked, genes, observed, masked))


def test_unobserved_sites_change_neither_the_loss_nor_observed_sites(model, window):
    values, genes, observed, masked = window
    changed = values + 5 * ~observed[:, :, None]
    before, after = (model.encode(v, genes, observed, masked) for v in (values, changed))
    assert torch.equal(before[observed], after[observed])
    assert model(values, genes, observed, masked)[0] == model(changed, genes, observed, masked)[0]
    assert model(values, genes, observed, masked)[1] == (masked & observed[:, :, None]).sum()


def test_neighbouring_sites_are_attended_to(model, window):
    values, genes, observed, _ = window
    changed = values.clone()
    changed[0, 0] += 1  # observed
    assert not torch.allclose(model.encode(values, genes, observed)[0, 5], model.encode(changed, genes, observed)[0, 5])


def test_the_order_of_genes_does_not_matter(model, window):
    values, genes, observed, _ = window
    shuffle = torch.tensor([3, 0, 4, 1, 2])
    features = model.encode(values, genes, observed)
    assert torch.allclose(features, model.encode(values[:, :, shuffle], genes[:, shuffle], observed))


def test_masking_and_the_number_of_genes_keep_the_scale_of_the_input(model):
    """A site whose genes are all alike gets the same features however many of them it shows."""
    with torch.no_grad():
        model.gene_embedding.weight[:] = model.gene_embedding.weight[0]
        model.gene_mean[:] = 0.2
    observed = torch.ones(1, 6).bool()
    few, many = torch.arange(3)[None], torch.arange(11)[None]
    features = model.encode(torch.full((1, 6, 3), 0.7, dtype=torch.float64), few, observed)
    assert torch.allclose(features, model.encode(torch.full((1, 6, 11), 0.7, dtype=torch.float64), many, observed))
    masked = torch.zeros(1, 6, 11).bool()
    masked[:, :, 4:] = True
    values = torch.full((1, 6, 11), 0.7, dtype=torch.float64)
    assert torch.allclose(features, model.encode(values, many, observed, masked))


def test_a_fresh_model_predicts_each_genes_mean(window):
    means = np.linspace(0.1, 1.2, CFG.n_genes)
    model = build(CFG, means, seed=0)
    values, genes, observed, masked = window
    features = model.encode(values.float(), genes, observed, masked)
    predictions = model.decode(features, genes, observed)
    expected = torch.from_numpy(means).float()[genes][:, None, :].expand(-1, 6, -1)
    assert torch.equal(predictions, expected)


def test_a_window_without_observed_sites_stays_finite(model, window):
    values, genes, _, masked = window
    nothing = torch.zeros(2, 6).bool()
    squared_error, n_masked = model(values, genes, nothing, masked)
    assert squared_error.item() == 0
    assert n_masked.item() == 0
    assert model.encode(values, genes, nothing).isfinite().all()
    assert attended(nothing).all()


def test_every_site_of_a_window_has_its_own_position():
    table = position_encoding(16, 16, 64)
    distance = torch.cdist(table, table) + 10 * torch.eye(256)
    assert table.shape == (256, 64)
    assert distance.min() > 0.1


def test_the_first_weights_depend_on_the_seed_alone():
    means = np.zeros(CFG.n_genes)
    torch.manual_seed(5)
    first, state = build(CFG, means, seed=1), torch.random.get_rng_state()
    torch.manual_seed(6)
    again, other = build(CFG, means, seed=1), build(CFG, means, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(first.narrow.weight, other.narrow.weight)
    torch.manual_seed(5)
    assert torch.equal(state, torch.random.get_rng_state())  # building draws nothing from the caller's state


@pytest.mark.parametrize(
    "wrong", [{"heads": 3}, {"width": 6, "heads": 2}, {"depth": 0}, {"values": "odd"}, {"decoder_heads": 0}]
)
def test_a_shape_that_cannot_be_built_is_refused(wrong):
    with pytest.raises(ConfigError, match="expected"):
        ModelConfig(**{**dict(n_genes=11, m=5, h=2, w=3, width=8, heads=2, decoder_width=4, decoder_heads=2), **wrong})


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

    def test_neighbouring_entries_are_independent(self):
        mask = self.mask().double() - 0.3
        shifts = [(mask[1:], mask[:-1]), (mask[:, 1:], mask[:, :-1]), (mask[:, :, 1:], mask[:, :, :-1])]
        for one, other in shifts:
            assert abs((one * other).mean()) < 5 * 0.21 / math.sqrt(one.numel())
