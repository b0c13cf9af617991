"""Loss and gradient of every unit and variant against a reference written with loops; what must not move them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.trainer.reference import TARGET_SUM, reference
from trainer.data import LAYOUTS, Batch, Vocabulary
from trainer.errors import ConfigError
from trainer.model import ModelConfig, build
from trainer.objective import Objective, ObjectiveConfig

CFG = ModelConfig(
    n_genes=11, m=4, h=3, w=3, width=8, depth=1, heads=2, feed_forward=12, decoder_width=8, decoder_depth=1,
    decoder_heads=2, neighbours=3, domains=2,
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
}


def make(mask_sites: float = 0.0, double: bool = True, moved: float = 0.1, **knobs) -> Objective:
    """An objective whose weights have left the start, where the decoder's last layer is zero."""
    model = build(dataclasses.replace(CFG, **knobs), VOCABULARY, seed=3)
    with torch.no_grad():
        for weight in model.parameters():
            weight += moved * torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel()))
    cfg = ObjectiveConfig(seed=5, mask_ratio=0.4, mask_sites=mask_sites)
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
    )  # fmt: skip


def masked(objective: Objective, batch: Batch) -> torch.Tensor:
    """Which entries the objective hides, bool [B, S, m]."""
    everywhere = dataclasses.replace(batch, totals=torch.ones_like(batch.totals))
    return objective.scores(everywhere)[3]


def by_reference(objective: Objective, batch: Batch, weights: dict[str, np.ndarray]) -> tuple[float, int]:
    arrays = {"counts": batch.counts, "genes": batch.genes, "totals": batch.totals, "rows": batch.rows}
    arrays = {name: array.numpy() for name, array in arrays.items()} | {"halves": batch.cols.numpy()}
    hidden = masked(objective, batch).numpy()
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
    def part(rows):
        tensors = {f.name: getattr(batch, f.name)[rows] for f in dataclasses.fields(Batch) if f.name != "epoch"}
        return Batch(**tensors, epoch=batch.epoch)

    together, alone = objective.scores(batch)[0], [objective.scores(part([row]))[0] for row in (0, 1)]
    assert torch.allclose(together, torch.cat(alone), rtol=1e-12, atol=1e-12)
    assert torch.allclose(objective(batch), sum(objective(part([row])) for row in (0, 1)))
    assert torch.allclose(objective.scores(part([1, 0, 1]))[0], together[[1, 0, 1]], rtol=1e-12, atol=1e-12)


def test_every_weight_has_a_gradient(objective, batch):
    """Ranks add up their gradients: none may be absent on one of them."""
    objective(batch)[0].backward()
    assert all(weight.grad is not None for weight in objective.parameters())


@pytest.mark.parametrize("variant", ["patch", "multispot", "slice", "nb", "relative positions"])
def test_the_objective_compiles_to_one_graph_for_all_epochs(variant, batch):
    objective, counter = make(**VARIANTS[variant], double=False), CompileCounter()
    batch = dataclasses.replace(batch, totals=batch.totals.float())
    compiled = torch.compile(objective, backend=counter, fullgraph=True, dynamic=False)
    for epoch in range(3):
        some = dataclasses.replace(batch, epoch=torch.tensor(epoch))
        assert torch.equal(compiled(some), objective(some))
    assert counter.frame_count == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("variant", ["patch", "relative positions"])
def test_attention_with_unobserved_sites_runs_in_a_fused_kernel(variant, batch):
    objective = make(**VARIANTS[variant], double=False)
    batch = dataclasses.replace(batch, totals=batch.totals.float())
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION]):  # raises where it would have to fall back
        fused = objective(batch)
    with sdpa_kernel([SDPBackend.MATH]):
        assert torch.allclose(fused, objective(batch), rtol=1e-5)


@pytest.mark.parametrize("unit", UNITS)
def test_autocast_gives_nearly_the_same_loss(unit, batch):
    objective = make(unit=unit, double=False)
    batch = dataclasses.replace(batch, totals=batch.totals.float())
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


@pytest.mark.parametrize("wrong", [{"mask_ratio": 0.0}, {"mask_ratio": 1.0}, {"mask_sites": -0.1}, {"mask_sites": 1.0}])
def test_a_mask_that_hides_nothing_or_all_is_refused(wrong):
    with pytest.raises(
        ConfigError, match="found mask_(ratio|sites) .*expected (at least 0, and below 1|one of them above 0)"
    ):
        ObjectiveConfig(seed=0, **wrong)
