"""What is learned: hidden entries are predicted from the visible ones, and the loss is summed over them (Eq. 8)."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from trainer import masks, units
from trainer.config import check, knob, refusal
from trainer.data import Batch
from trainer.expression import log_normalise
from trainer.model import MaskedAutoencoder


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    seed: int  # of the run
    mask_ratio: float = knob(0.3, "fraction of the (site, gene) entries that is hidden", below=1)
    mask_sites: float = knob(0.0, "fraction of the sites that is hidden whole, beside the single entries", below=1)

    def __post_init__(self) -> None:
        check(self)
        if not self.mask_ratio and not self.mask_sites:
            raise refusal(self, "one of them above 0", "mask_ratio", "mask_sites")


class Objective(nn.Module):
    """The model with its loss.

    Nothing joins two samples, and nothing makes the host wait for the device; shapes follow from the batch's alone.
    """

    def __init__(self, model: MaskedAutoencoder, target_sum: float, cfg: ObjectiveConfig) -> None:
        super().__init__()
        self.model, self.cfg, self.target_sum = model, cfg, float(target_sum)

    @property
    def needs_coordinates(self) -> bool:
        """Whether batches must carry ``rows``, ``cols`` and ``layouts``."""
        return self.model.cfg.unit == "multispot"

    def forward(self, batch: Batch) -> Tensor:
        """Float32 [2]: the loss summed over the batch's masked entries of observed sites, and the number of these."""
        scores, counts, values, scored = self.scores(batch)
        loss = self.entry_losses(scores, counts, values, batch).masked_fill(~scored, 0.0)
        return torch.stack([loss.sum(), scored.sum()]).float()

    @torch.no_grad()
    def evaluate(self, batch: Batch, epoch: int = masks.VALIDATION) -> Tensor:
        """Float32 [3]: squared error of the prediction, of the gene's training mean, and the number of entries.

        In units of normalised expression, whatever the loss is, so that likelihoods and targets can be compared.
        """
        batch = dataclasses.replace(batch, epoch=epoch)
        scores, _, values, scored = self.scores(batch)
        predicted = self.model.predict(scores, batch.genes, self.depth(batch))
        mean = self.model.gene_mean[batch.genes][:, None, :]
        errors = [(p - values).square().masked_fill(~scored, 0.0).sum() for p in (predicted, mean)]
        return torch.stack([*errors, scored.sum()]).float()

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores of a batch, its counts, its normalised expression, and where the loss counts: all [B, S, m]."""
        counts = batch.counts.flatten(2).transpose(1, 2).contiguous()  # [B, m, h, w] -> [B, S, m]
        totals, genes = batch.totals.flatten(1), batch.genes  # [B, S], [B, m]
        values, observed = log_normalise(counts, totals, self.target_sum), totals > 0
        hidden = (self.cfg.seed, batch.epoch, batch.positions, totals.shape[1])
        masked = masks.entry_mask(*hidden, genes, self.cfg.mask_ratio)
        if self.cfg.mask_sites:
            masked = masked | masks.site_mask(*hidden, self.cfg.mask_sites)[:, :, None]
        places = None
        if self.needs_coordinates:
            places = units.lattice_places(batch.rows, batch.cols, batch.layouts, observed)
        features = self.model.encode(values, genes, observed, masked, places)
        scores = self.model.decode(features, genes, observed)
        if scores.dtype in (torch.bfloat16, torch.float16):  # autocast: the loss is taken in float32
            scores = scores.float()
        return scores, counts, values, masked & observed[:, :, None]

    def depth(self, batch: Batch) -> Tensor:
        """Total / target_sum of each site, [B, S]; 1 where nothing was observed, which no loss counts."""
        totals = batch.totals.flatten(1)
        return torch.where(totals > 0, totals, self.target_sum) / self.target_sum

    def entry_losses(self, scores: Tensor, counts: Tensor, values: Tensor, batch: Batch) -> Tensor:
        """Of each entry, [B, S, m]: squared error, or negative log-likelihood of the count in nats."""
        model, genes = self.model, batch.genes
        if model.cfg.likelihood == "mse":
            if model.cfg.targets == "standardised":
                values = (values - model.gene_mean[genes][:, None, :]) / model.gene_deviation[genes][:, None, :]
            return (scores - values).square()
        depth, y = self.depth(batch), counts.to(scores.dtype)
        expected = model.expected_counts(scores, depth)
        log_expected = scores + depth.log()[:, :, None]
        if model.cfg.likelihood == "poisson":
            return expected - y * log_expected + torch.lgamma(y + 1)
        r = model.dispersion(genes).to(scores.dtype)
        log_both = torch.log(r + expected)
        choose = torch.lgamma(y + r) - torch.lgamma(r) - torch.lgamma(y + 1)
        return -(choose + r * (r.log() - log_both) + y * (log_expected - log_both))
