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
    mask_genes: float = knob(0.0, "fraction of a window's genes that is hidden at all its sites", below=1)
    mask_sites: float = knob(0.0, "fraction of the sites that is hidden whole, beside the single entries", below=1)

    def __post_init__(self) -> None:
        check(self)
        if not (self.mask_ratio or self.mask_genes or self.mask_sites):
            raise refusal(self, "one of them above 0", "mask_ratio", "mask_genes", "mask_sites")


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
        return self.model.needs_places

    @property
    def needs_centres(self) -> bool:
        """Whether batches must carry ``centres``."""
        return self.model.cfg.inputs == "slice"

    def forward(self, batch: Batch) -> Tensor:
        """Float32 [2]: the loss summed over the batch's masked entries of observed sites, and the number of these."""
        if self.by_components:
            error, _, n = self.component_errors(batch)
            return torch.stack([error, n])
        scores, counts, values, scored = self.scores(batch)
        loss = self.entry_losses(scores, counts, values, batch).masked_fill(~scored, 0.0)
        return torch.stack([loss.sum(), scored.sum()]).float()

    @torch.no_grad()
    def evaluate(self, batch: Batch, epoch: int = masks.VALIDATION) -> Tensor:
        """Float32 [3]: squared error of the prediction, of the gene's training mean (with inputs `slice` of its mean in that slice,
        which the model is told), and the number of entries.

        In units of normalised expression, whatever the loss is, so that likelihoods and targets can be compared.
        """
        batch = dataclasses.replace(batch, epoch=epoch)
        if self.by_components:
            return torch.stack(self.component_errors(batch))
        scores, _, values, scored = self.scores(batch)
        predicted = self.model.predict(scores, batch.genes, self.depth(batch))
        mean = 0.0 if self.needs_centres else self.model.gene_mean[batch.genes][:, None, :]
        errors = [(p - values).square().masked_fill(~scored, 0.0).sum() for p in (predicted, mean)]
        return torch.stack([*errors, scored.sum()]).float()

    @property
    def by_components(self) -> bool:
        """Whether `component_errors` gives the loss: where embeddings are fixed and all sites show the same genes."""
        return self.model.cfg.gene_embeddings == "fixed" and not self.cfg.mask_ratio

    def component_errors(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Squared error of the prediction, of the slice's mean, and the number of entries: the sums of `scores`, without them.

        With loadings L of the hidden genes, x what a site shows of them and y what is predicted, the error of a site is
        |x - L y|^2 = x'x - 2 (L'x)'y + y'(L'L)y: nothing of the size of all entries is kept for the backward pass.
        """
        model, totals, genes = self.model, batch.totals.flatten(1), batch.genes  # [B, S], [B, m]
        B, S = totals.shape
        observed, draw = totals > 0, (self.cfg.seed, batch.epoch, batch.positions)
        gone = masks.gene_mask(*draw, genes, self.cfg.mask_genes)[:, :, None]  # [B, m, 1]
        blank = masks.site_mask(*draw, S, self.cfg.mask_sites)[:, :, None]  # [B, S, 1]
        parts = B if totals.is_cuda else 1  # windows at a time: what stays in a CPU's cache takes a third of the time
        seen, whole, gram_seen, gram, squares = (
            torch.cat(found)
            for found in zip(*(self.project(batch, gone, slice(i, i + parts)) for i in range(0, B, parts)), strict=True)
        )
        keys = observed & ~blank[:, :, 0] if model.cfg.positions == "distance" else observed
        places = None
        if self.needs_coordinates:
            places = units.lattice_places(batch.rows, batch.cols, batch.layouts, observed)
        weight = gram_seen.diagonal(dim1=1, dim2=2).sum(1)[:, None, None].clamp(min=1e-6)
        shown = (seen * (model.gene_loading.square().sum() / weight)).masked_fill(blank, 0.0)
        features = model.look_around(model.show(shown), keys, places)
        y = model.summarise(features, keys, places).to(gram.dtype)  # autocast: the loss is taken in float32
        wanted = torch.where(blank, whole, whole - seen)
        with torch.autocast(totals.device.type, enabled=False):
            curved = torch.where(blank, y @ gram, y @ (gram - gram_seen))
        reference = torch.where(blank[:, :, 0], squares[..., 1], squares[..., 0])  # [B, S]
        errors = reference + (y * (curved - 2 * wanted)).sum(2)
        n = torch.where(blank[:, :, 0], genes.shape[1], gone.sum(1)) * observed
        return tuple(part.masked_fill(n == 0, 0.0).sum().float() for part in (errors, reference, n))

    @torch.no_grad()
    def project(self, batch: Batch, gone: Tensor, part: slice) -> tuple[Tensor, ...]:
        """Of some windows the scores by visible genes and by all, [b, S, axes], the loadings' squares L'L of both, [b, axes, axes],
        and the values' squares summed over hidden genes and over all, [b, S, 2]."""
        with torch.autocast(batch.totals.device.type, enabled=False):
            counts, totals = batch.counts[part].flatten(2).transpose(1, 2), batch.totals[part].flatten(1)
            values = log_normalise(counts, totals, self.target_sum).sub_(batch.centres[part, None, :])  # [b, S, m]
            loading = self.model.gene_loading[batch.genes[part]]  # [b, m, axes]
            visible = loading.masked_fill(gone[part], 0.0)
            seen, whole = (torch.bmm(values, axes) for axes in (visible, loading))
            squares_of = torch.cat([gone[part], torch.ones_like(gone[part])], dim=2).to(values.dtype)
            gram_seen, gram = (axes.transpose(1, 2) @ axes for axes in (visible, loading))
            return seen, whole, gram_seen, gram, torch.bmm(values.square_(), squares_of)

    def scores(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Scores of a batch, its counts, its normalised expression, and where the loss counts: all [B, S, m]."""
        counts = batch.counts.flatten(2).transpose(1, 2).contiguous()  # [B, m, h, w] -> [B, S, m]
        totals, genes = batch.totals.flatten(1), batch.genes  # [B, S], [B, m]
        values, observed = log_normalise(counts, totals, self.target_sum), totals > 0
        if self.needs_centres:
            values = values - batch.centres[:, None, :]
        shown, draw = observed, (self.cfg.seed, batch.epoch, batch.positions)
        masked = torch.zeros((), dtype=torch.bool, device=values.device).expand(values.shape)
        if self.cfg.mask_ratio:
            masked = masks.entry_mask(*draw, totals.shape[1], genes, self.cfg.mask_ratio)
        if self.cfg.mask_genes:
            masked = masked | masks.gene_mask(*draw, genes, self.cfg.mask_genes)[:, None, :]
        if self.cfg.mask_sites:
            hidden = masks.site_mask(*draw, totals.shape[1], self.cfg.mask_sites)
            masked = masked | hidden[:, :, None]
            if self.model.cfg.positions == "distance":
                shown = observed & ~hidden
        places = None
        if self.needs_coordinates:
            places = units.lattice_places(batch.rows, batch.cols, batch.layouts, observed)
        features = self.model.encode(values, genes, shown, masked, places)
        scores = self.model.decode(features, genes, shown, places)
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
