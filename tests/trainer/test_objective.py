"""Loss and gradient of every unit and variant against a reference written with loops; what must not move them."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.trainer.reference import TARGET_SUM, reference
from trainer import masks
from trainer.data import LAYOUTS, Batch, Vocabulary
from trainer.errors import ConfigError
from trainer.model import ModelConfig, build
from trainer.objective import Objective, ObjectiveConfig

CFG = ModelConfig(
    n_genes=11, m=4, h=3, w=3, width=8, depth=1, heads=2, feed_forward=12, decoder_width=8, decoder_depth=1,
    decoder_heads=2, neighbours=3, domains=2, axes=3,
)  # fmt: skip
VOCABULARY = Vocabulary([f"g{k}" for k in range(11)], np.linspace(2.0, 5.0, 11), np.linspace(0.0, 1.5, 11), "")
UNITS = ("patch", "spot", "multispot", "slice")
VARIANTS = {unit: {"unit": unit} for unit in UNITS} | {
    "centred inputs": {"inputs": "centred"},
    "standardised": {"inputs": "standardised", "targets": "standardised"},
    "no positions": {"positions": "none"},
    "relative positions": {"positions": "relative"},
    "poisson": {"likelihood": "poisson"},
    "nb": {"likelihood": "nb", "unit": "multispot"},
    "whole sites": {"unit": "slice", "mask_sites": 0.3},
    "distance": {"positions": "distance", "mask_sites": 0.3},
    "fixed": {"gene_embeddings": "fixed", "inputs": "slice", "mask_genes": 0.3},
    "fixed spot": {"gene_embeddings": "fixed", "inputs": "slice", "unit": "spot"},
    "by components": {
        "gene_embeddings": "fixed", "inputs": "slice", "positions": "distance", "mask_ratio": 0.0, "mask_genes": 0.4,
        "mask_sites": 0.3,
    },
}  # fmt: skip
BY_COMPONENTS = VARIANTS["by components"]


def make(
    mask_sites: float = 0.0,
    mask_ratio: float = 0.4,
    mask_genes: float = 0.0,
    double: bool = True,
    moved: float = 0.1,
    **knobs,
) -> Objective:
    """An objective whose weights have left the start, where the decoder's last layer is zero."""
    rng = np.random.default_rng(0)
    axes, noise = np.linalg.qr(rng.normal(size=(11, 4)))[0], rng.uniform(0.3, 2.0, 11)
    tensors = {"components": axes.astype(np.float32), "noise": noise.astype(np.float32)}
    with tempfile.TemporaryDirectory() as folder:
        components = Path(folder) / "components.safetensors"
        components.write_bytes(save(tensors, {"genes_sha256": ""}))
        model = build(dataclasses.replace(CFG, **knobs), VOCABULARY, 3, components)
    with torch.no_grad():
        for weight in model.parameters():
            weight += moved * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    cfg = ObjectiveConfig(seed=5, mask_ratio=mask_ratio, mask_genes=mask_genes, mask_sites=mask_sites)
    objective = Objective(model, TARGET_SUM, cfg)
    return objective.double() if double else objective


@pytest.fixture(params=VARIANTS)
def objective(request):
    return make(**VARIANTS[request.param])


@pytest.fixture
def batch():
    """Two samples; the lattice lacks row 4, so that ranks would take the wrong neighbours."""
    rng = np.random.default_rng(1)
    counts = rng.poisson(6, (2, 4, 3, 3)).astype(np.uint16)
    totals = rng.integers(300, 900, (2, 3, 3)).astype(np.float64)
    totals[0, 0, 2] = totals[1, 1, 1] = totals[1, 2, 0] = 0
    genes = np.stack([np.sort(rng.choice(11, 4, replace=False)) for _ in range(2)])
    lines = [[[3, 5, 6], [4, 5, 6]], [[7, 8, 9], [0, 2, 3]]]
    return Batch(
        *map(torch.from_numpy, (counts, genes.astype(np.int32), totals)), torch.tensor([40, 7]), 2,
        *(torch.tensor(line, dtype=torch.int32) for line in lines), torch.full((2,), LAYOUTS.index("offset")),
        torch.from_numpy(rng.uniform(2.0, 5.0, (2, 4))),
    )  # fmt: skip


def single(batch: Batch) -> Batch:
    """The batch in float32, as readers give it."""
    return dataclasses.replace(batch, totals=batch.totals.float(), centres=batch.centres.float())


def part(batch: Batch, rows: list[int]) -> Batch:
    """These samples of the batch."""
    tensors = {f.name: getattr(batch, f.name)[rows] for f in dataclasses.fields(Batch) if f.name != "epoch"}
    return Batch(**tensors, epoch=batch.epoch)


def masked(objective: Objective, batch: Batch) -> torch.Tensor:
    """Which entries the objective hides, bool [B, S, m]."""
    everywhere = dataclasses.replace(batch, totals=torch.ones_like(batch.totals))
    return objective.scores(everywhere)[3]


def by_reference(objective: Objective, batch: Batch, weights: dict[str, np.ndarray]) -> tuple[float, int]:
    arrays = {name: getattr(batch, name).numpy() for name in ("counts", "genes", "totals", "rows", "centres")}
    arrays["halves"], hidden = batch.cols.numpy(), masked(objective, batch).numpy()
    whole = masks.site_mask(objective.cfg.seed, batch.epoch, batch.positions, 9, objective.cfg.mask_sites)
    arrays["whole"] = whole.numpy()
    return reference(weights, objective.model.cfg, (VOCABULARY.mean, VOCABULARY.variance), arrays, hidden)


def test_the_loss_is_that_of_a_reference_written_with_loops(objective, batch):
    weights = {name: weight.detach().numpy() for name, weight in objective.model.state_dict().items()}
    expected, number = by_reference(objective, batch, weights)
    assert 10 < number < 50
    loss, n_masked = objective(batch).tolist()
    assert n_masked == number
    assert loss == pytest.approx(expected, rel=1e-6)


def test_the_gradient_is_the_slope_of_that_reference(objective, batch):
    """Of every weight tensor, along a random direction: a central difference of the loops."""
    objective(batch)[0].backward()
    weights = {name: weight.detach().numpy() for name, weight in objective.model.state_dict().items()}
    rng, step, slopes = np.random.default_rng(0), 1e-5, {}
    for name, weight in objective.model.named_parameters():
        direction = rng.normal(size=weight.shape)
        up, down = (
            by_reference(objective, batch, weights | {name: weights[name] + sign * step * direction})[0]
            for sign in (1, -1)
        )
        slopes[name] = (up - down) / (2 * step), float((weight.grad.numpy() * direction).sum())
    for name, (expected, found) in slopes.items():
        assert found == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    assert sum(abs(expected) > 1e-3 for expected, _ in slopes.values()) >= 20  # of some thirty: not all zero


def changed_counts(batch: Batch, where: torch.Tensor) -> Batch:
    """The batch with other counts at these entries [B, S, m]."""
    counts = batch.counts.int() + 9 * where.transpose(1, 2).reshape(batch.counts.shape).int()
    return dataclasses.replace(batch, counts=counts.to(torch.uint16))


def test_hidden_entries_change_no_score(objective, batch):
    hidden = masked(objective, batch)
    other = changed_counts(batch, hidden)
    assert torch.equal(objective.scores(batch)[0], objective.scores(other)[0])
    assert objective(batch)[0] != objective(other)[0]  # they are what is predicted
    assert not torch.equal(objective.scores(batch)[0], objective.scores(changed_counts(batch, ~hidden))[0])


def test_unobserved_sites_change_neither_loss_nor_gradient(objective, batch):
    unobserved = (batch.totals.flatten(1) == 0)[:, :, None].expand(-1, -1, 4)
    results = []
    for some in (batch, changed_counts(batch, unobserved)):
        objective.zero_grad()
        loss = objective(some)
        loss[0].backward()
        results.append((loss, *(weight.grad.clone() for weight in objective.parameters())))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_sample_scores_the_same_whatever_else_is_in_the_batch(objective, batch):
    together, alone = objective.scores(batch)[0], [objective.scores(part(batch, [row]))[0] for row in (0, 1)]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    assert torch.allclose(objective(batch), sum(objective(part(batch, [row])) for row in (0, 1)))
    assert torch.allclose(objective.scores(part(batch, [1, 0, 1]))[0], together[[1, 0, 1]], rtol=1e-12, atol=1e-12)


def test_every_weight_has_a_gradient(objective, batch):
    """Ranks add up their gradients: none may be absent on one of them."""
    objective(batch)[0].backward()
    assert all(weight.grad is not None for weight in objective.parameters())


@pytest.mark.parametrize(
    "variant", ["patch", "multispot", "slice", "nb", "relative positions", "distance", "by components"]
)
def test_the_objective_compiles_to_one_graph_for_all_epochs(variant, batch):
    objective, counter = make(**VARIANTS[variant], double=False), CompileCounter()
    batch = single(batch)
    compiled = torch.compile(objective, backend=counter, fullgraph=True, dynamic=False)
    for epoch in range(3):
        some = dataclasses.replace(batch, epoch=torch.tensor(epoch))
        assert torch.equal(compiled(some), objective(some))
    assert counter.frame_count == 1
    torch._dynamo.reset()


def test_a_step_needs_no_number_from_the_device_and_nothing_on_another(objective, batch, monkeypatch):
    """On tensors without content: what would be made on the CPU or read back fails."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows real devices alone
    tensors = {f.name: getattr(batch, f.name).to("meta") for f in dataclasses.fields(Batch) if f.name != "epoch"}
    objective = objective.to("meta")
    loss = objective(Batch(**tensors, epoch=batch.epoch))
    loss[0].backward()
    assert (loss.device.type, loss.shape, loss.dtype) == ("meta", (2,), torch.float32)
    assert all(weight.grad.device.type == "meta" for weight in objective.parameters())


@pytest.mark.parametrize("variant", ["patch", "relative positions"])
def test_attention_with_unobserved_sites_runs_in_a_fused_kernel(variant, batch):
    objective = make(**VARIANTS[variant], double=False)
    batch = single(batch)
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # raises where it would have to fall back
        fused = objective(batch)
    with sdpa_kernel([SDPBackend.MATH]):
        assert torch.allclose(fused, objective(batch), rtol=1e-5)


@pytest.mark.parametrize("variant", [*UNITS, "distance", "fixed", "by components"])
def test_autocast_gives_nearly_the_same_loss(variant, batch):
    objective = make(**VARIANTS[variant], double=False)
    batch = single(batch)
    with torch.autocast("cpu", torch.bfloat16):
        half = objective(batch)
    assert half.dtype == torch.float32
    assert half[1] == objective(batch)[1]
    assert half[0].item() == pytest.approx(objective(batch)[0].item(), rel=0.03)


@pytest.mark.parametrize("targets", ["plain", "standardised"])
def test_before_its_first_step_the_model_predicts_as_well_as_the_gene_means(targets, batch):
    squared_error, by_mean, number = make(targets=targets, moved=0.0).evaluate(batch)
    assert squared_error.item() == pytest.approx(by_mean.item(), rel=1e-6)
    values = torch.log1p(batch.counts.double() * TARGET_SUM / batch.totals[:, None].clamp(min=1)).flatten(2)
    objective = make(targets=targets, moved=0.0)
    hidden = objective.scores(dataclasses.replace(batch, epoch=-1))[3].transpose(1, 2)
    expected = (values - torch.from_numpy(VOCABULARY.mean)[batch.genes][:, :, None])[hidden].square()
    assert (len(expected), expected.sum().item()) == (number, pytest.approx(by_mean.item(), rel=1e-6))


@pytest.mark.parametrize("variant", ["fixed", "by components"])
def test_before_its_first_step_a_model_about_the_slices_mean_predicts_as_well_as_that(variant, batch):
    objective = make(**VARIANTS[variant], moved=0.0)
    squared_error, by_mean, number = objective.evaluate(batch).tolist()
    values = torch.log1p(batch.counts.double() * TARGET_SUM / batch.totals[:, None].clamp(min=1)).flatten(2)
    hidden = objective.scores(dataclasses.replace(batch, epoch=-1))[3].transpose(1, 2)
    expected = (values - batch.centres[:, :, None])[hidden].square()
    assert (len(expected), expected.sum().item()) == (number, pytest.approx(by_mean, rel=1e-6))
    assert squared_error == pytest.approx(by_mean, rel=1e-6)


MASKS = {"genes": (0.4, 0.0), "genes and sites": (0.4, 0.3), "sites": (0.0, 0.3), "nearly all": (0.9, 0.9)}


@pytest.mark.parametrize("positions", ["distance", "sincos"])
@pytest.mark.parametrize("which", MASKS)
def test_errors_by_components_are_the_sums_over_entries_with_the_same_gradient(which, positions, batch, monkeypatch):
    """Also with a line of padding, as at the border of a slice, and in a window with a single spot."""
    genes, sites = MASKS[which]
    objective = make(**BY_COMPONENTS | {"mask_genes": genes, "mask_sites": sites, "positions": positions})
    assert objective.by_components
    batch = part(batch, [0, 1, 0])
    batch.rows[0, 2], batch.totals[0, 2], batch.positions[2] = -1, 0, 99
    batch.totals[2].view(-1)[[0, 1, 2, 3, 5, 6, 7, 8]] = 0
    found = []
    for by_components in (True, False):
        monkeypatch.setattr(Objective, "by_components", by_components)
        objective.zero_grad()
        loss = objective(batch)
        loss[0].backward()
        gradients = [weight.grad.clone() for weight in objective.parameters()]
        found.append((loss.detach(), objective.evaluate(batch), gradients))
    (loss, judged, gradients), (expected, judgement, slopes) = found
    assert loss[1] == expected[1] > 0
    assert judged[2] == judgement[2]
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(judged, judgement, rtol=1e-6, atol=1e-6)
    for mine, theirs in zip(gradients, slopes, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
    assert sum(slope.abs().max() > 1e-3 for slope in slopes) >= 20


def test_errors_by_components_add_up_over_samples(batch):
    objective = make(**BY_COMPONENTS)
    together = torch.stack(objective.component_errors(batch))
    alone = [torch.stack(objective.component_errors(part(batch, [row]))) for row in (0, 1)]
    torch.testing.assert_close(together, sum(alone), rtol=1e-6, atol=1e-6)
    assert (together > 0).all()


def test_only_masks_that_hide_the_same_genes_at_all_sites_go_by_components():
    assert make(**BY_COMPONENTS).by_components
    for other in ({"mask_ratio": 0.2}, {"gene_embeddings": "random"}):
        assert not make(**BY_COMPONENTS | other).by_components


def test_genes_are_hidden_at_every_site_beside_entries_and_sites(batch):
    """Beside others, as each hides what it hides alone."""
    alone = {name: {"mask_ratio": 0.0} | {name: 0.4} for name in ("mask_ratio", "mask_genes", "mask_sites")}
    hidden = {name: masked(make(**knobs), batch) for name, knobs in alone.items()}
    genes = hidden["mask_genes"]
    assert torch.equal(genes, genes[:, :1].expand_as(genes))
    assert 0 < genes.double().mean() < 1
    together = masked(make(mask_ratio=0.4, mask_genes=0.4, mask_sites=0.4), batch)
    assert torch.equal(together, hidden["mask_ratio"] | hidden["mask_genes"] | hidden["mask_sites"])


@pytest.mark.parametrize("variant", ["distance", "by components"])
def test_sites_hidden_whole_are_no_keys_where_attention_goes_by_distance(variant, batch):
    """Without them the other sites have the same scores; they have scores of their own."""
    objective = make(**VARIANTS[variant] | {"mask_sites": 0.3})
    hidden = masks.site_mask(5, batch.epoch, batch.positions, 9, 0.3)
    assert 0 < hidden.sum() < hidden.numel()
    scores, *_ = objective.scores(batch)
    without = dataclasses.replace(batch, totals=batch.totals.masked_fill(hidden.view(-1, 3, 3), 0.0))
    others = ~hidden & (batch.totals.flatten(1) > 0)
    assert torch.allclose(scores[others], objective.scores(without)[0][others], rtol=1e-12, atol=1e-12)
    assert (scores[hidden].abs() > 1e-3).all()


@pytest.mark.parametrize("likelihood", ["poisson", "nb"])
def test_a_likelihood_of_counts_is_judged_by_the_expression_it_expects(likelihood, batch):
    objective = make(likelihood=likelihood)
    scores, _, values, scored = objective.scores(dataclasses.replace(batch, epoch=-1))
    rng, totals = np.random.default_rng(0), batch.totals.flatten(1).clamp(min=1)
    mean = (scores.exp() * totals[:, :, None] / TARGET_SUM).detach()
    total = 0.0
    for b, s, k in scored.nonzero().tolist():
        rate = mean[b, s, k].item()
        if likelihood == "nb":
            r = objective.model.dispersion(batch.genes)[b, 0, k].item()
            counts = rng.negative_binomial(r, r / (r + rate), 20_000)
        else:
            counts = rng.poisson(rate, 20_000)
        predicted = np.log1p(counts * TARGET_SUM / totals[b, s].item()).mean()
        total += (predicted - values[b, s, k].item()) ** 2
    assert objective.evaluate(batch)[0].item() == pytest.approx(total, rel=0.02)


def test_whole_sites_are_hidden_beside_single_entries(batch):
    many = dataclasses.replace(batch, positions=torch.tensor([1, 2]))
    shares = []
    for seed in range(200):
        objective = make(mask_sites=0.3)
        objective.cfg = dataclasses.replace(objective.cfg, seed=seed)
        shares.append(masked(objective, many).double().mean(2).flatten())
    shares = torch.cat(shares)
    assert shares.eq(1).double().mean() == pytest.approx(0.3 + 0.7 * 0.4**4, abs=0.03)
    assert shares.mean() == pytest.approx(1 - 0.6 * 0.7, abs=0.02)


@pytest.mark.parametrize(
    "wrong",
    [
        {"mask_ratio": 0.0},
        {"mask_ratio": 1.0},
        {"mask_sites": -0.1},
        {"mask_sites": 1.0},
        {"mask_genes": 1.0},
        {"mask_genes": -0.1},
    ],
)
def test_a_mask_that_hides_nothing_or_all_is_refused(wrong):
    with pytest.raises(
        ConfigError, match="found mask_(ratio|genes|sites) .*expected (at least 0, and below 1|one of them above 0)"
    ):
        ObjectiveConfig(seed=0, **wrong)
