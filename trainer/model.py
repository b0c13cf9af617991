"""The masked autoencoder over the sites of a window (Eq. 8).

A token is a site. B windows, S = h * w sites, m genes of a window, d width. What the paper leaves open, chosen here:

- *Scale of the input.* The sum over a site's visible genes is multiplied by (genes a window has in training) /
  (visible genes of that site), as in inverted dropout: masking, or another number of genes when embedding, keeps it.
- *Position.* Fixed sines and cosines of the site's row and column in the window.
- *Centring.* ``values: centred`` takes each value about its gene's training mean, so that the sum no longer says above
  all which genes the window drew; it predicts held-out slices better. ``plain`` is Eq. 8 to the letter.
- *Gene embeddings* start with about unit length.
- *Gene bias.* Starts at each gene's training mean, and the decoder's last layer at zero: before its first step the
  model is exactly the gene-mean predictor that it has to beat.
- *Unobserved sites* are no keys in the attention and never in the loss.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.config import FORMAT_VERSION, knob
from trainer.data import Vocabulary
from trainer.errors import ConfigError, VocabularyMismatch


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    n_genes: int  # rows of the vocabulary
    m: int  # genes of a training window
    h: int
    w: int
    width: int = knob(256, "d: numbers that describe a site, and a gene")
    depth: int = knob(6, "encoder layers")
    heads: int = knob(8, "attention heads of the encoder")
    feed_forward: int = knob(1024, "hidden units of the encoder's feed-forward layers")
    decoder_width: int = knob(128, "width of the decoder; its feed-forward layers are four times as wide")
    decoder_depth: int = knob(2, "decoder layers")
    decoder_heads: int = knob(4, "attention heads of the decoder")
    values: str = knob("plain", "plain (Eq. 8), or centred: about their gene's training mean")

    def __post_init__(self) -> None:
        for width, heads in (("width", "heads"), ("decoder_width", "decoder_heads")):
            if min(getattr(self, width), getattr(self, heads)) < 1 or getattr(self, width) % getattr(self, heads):
                found = f"{width} {getattr(self, width)}, {heads} {getattr(self, heads)}"
                raise ConfigError("model", found=found, expected=f"{heads} divides {width}", next_step="change one")
        if self.width % 4:
            found, expected = f"width {self.width}", "a multiple of 4 (sine and cosine of row and column)"
            raise ConfigError("model", found=found, expected=expected, next_step="change --width")
        if self.values not in ("plain", "centred"):
            found = f"values {self.values}"
            raise ConfigError("model", found=found, expected="plain or centred", next_step="change --values")
        if self.depth < 1 or self.decoder_depth < 0 or self.feed_forward < 1:
            found = f"depth {self.depth}, decoder_depth {self.decoder_depth}, feed_forward {self.feed_forward}"
            raise ConfigError("model", found=found, expected="at least 1, 0 and 1", next_step="change it")


class Block(nn.Module):
    """A pre-norm transformer layer in which only observed sites are attended to."""

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor, attend: Tensor) -> Tensor:
        x = x + self.attention(self.norm_attention(x), attend)
        return x + self.feed_forward(self.norm_feed_forward(x))

    def attention(self, x: Tensor, attend: Tensor) -> Tensor:
        B, S, d = x.shape
        qkv = self.query_key_value(x).view(B, S, 3, self.heads, d // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, S, d / heads]
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=attend)
        return self.project(x.transpose(1, 2).reshape(B, S, d))


class MaskedAutoencoder(nn.Module):
    def __init__(self, cfg: ModelConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.gene_embedding = nn.Embedding(cfg.n_genes, cfg.width)  # e_k, of the input and of the prediction
        self.gene_bias = nn.Embedding(cfg.n_genes, 1)
        self.register_buffer("gene_mean", torch.zeros(cfg.n_genes), persistent=False)  # of genes.tsv
        self.register_buffer("position", position_encoding(cfg.h, cfg.w, cfg.width), persistent=False)  # [S, d]
        self.encoder = nn.ModuleList(Block(cfg.width, cfg.heads, cfg.feed_forward) for _ in range(cfg.depth))
        self.encoder_norm = nn.LayerNorm(cfg.width)
        self.narrow = nn.Linear(cfg.width, cfg.decoder_width)
        self.decoder = nn.ModuleList(
            Block(cfg.decoder_width, cfg.decoder_heads, 4 * cfg.decoder_width) for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(cfg.decoder_width)
        self.widen = nn.Linear(cfg.decoder_width, cfg.width)

    def forward(self, values: Tensor, genes: Tensor, observed: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Sum of the squared errors over the masked entries, and their number: the loss is their quotient."""
        features = self.encode(values, genes, observed, masked)
        predictions = self.decode(features, genes, observed)
        return self.loss(predictions, values, observed, masked)

    def encode(self, values: Tensor, genes: Tensor, observed: Tensor, masked: Tensor | None = None) -> Tensor:
        """Features of every site, [B, S, d].

        Parameters
        ----------
        values
            float [B, S, m]: normalised expression.
        genes
            int [B, m]: rows of the vocabulary; m may differ from that of training.
        observed
            bool [B, S].
        masked
            bool [B, S, m]: entries that the model must not see; none when embedding.
        """
        if self.cfg.values == "centred":
            values = values - self.gene_mean[genes][:, None, :]
        n_visible = torch.full_like(values[..., :1], values.shape[2])  # [B, S, 1]
        if masked is not None:
            values = values.masked_fill(masked, 0.0)
            n_visible = (~masked).sum(2, keepdim=True)
        x = torch.bmm(values, self.gene_embedding(genes))  # [B, S, m] x [B, m, d] -> [B, S, d]
        x = x * (self.cfg.m / n_visible.clamp(min=1)) + self.position
        attend = attended(observed)
        for block in self.encoder:
            x = block(x, attend)
        return self.encoder_norm(x)

    def decode(self, features: Tensor, genes: Tensor, observed: Tensor) -> Tensor:
        """Predicted normalised expression, [B, S, m]: site feature . e_k + bias of gene k."""
        x = self.narrow(features)  # [B, S, decoder width]
        attend = attended(observed)
        for block in self.decoder:
            x = block(x, attend)
        x = self.widen(self.decoder_norm(x))  # [B, S, d]
        scores = torch.bmm(x, self.gene_embedding(genes).transpose(1, 2))  # [B, S, d] x [B, d, m] -> [B, S, m]
        return scores + self.gene_bias(genes).transpose(1, 2)  # [B, 1, m]

    def loss(self, predictions: Tensor, values: Tensor, observed: Tensor, masked: Tensor) -> tuple[Tensor, Tensor]:
        """Squared error summed over the masked entries of observed sites, and the number of these entries.

        Kept apart, so that a loss over several batches or ranks divides once, by the number of all.
        """
        scored = masked & observed[:, :, None]  # [B, S, m]
        squared_error = (predictions - values).square().masked_fill(~scored, 0.0)
        return squared_error.sum(), scored.sum()


def attended(observed: Tensor) -> Tensor:
    """Attention mask [B, 1, 1, S]: the observed sites; all, where none is (a softmax over nothing is NaN)."""
    return (observed | ~observed.any(1, keepdim=True))[:, None, None, :]


def position_encoding(h: int, w: int, width: int) -> Tensor:
    """Sines and cosines of row and column, [h * w, width]; the wavelengths of 'Attention is all you need'."""
    frequency = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    angles = [torch.arange(n)[:, None] * frequency for n in (h, w)]
    rows, columns = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)  # [h, d / 2], [w, d / 2]
    grid = [rows[:, None].expand(h, w, -1), columns[None, :].expand(h, w, -1)]
    return torch.cat(grid, dim=2).flatten(0, 1)


def build(cfg: ModelConfig, gene_means: np.ndarray, seed: int) -> MaskedAutoencoder:
    """A fresh model on the CPU: the same weights for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskedAutoencoder(cfg)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(model.gene_embedding.weight, std=cfg.width**-0.5)
        nn.init.zeros_(model.widen.weight)
    means = torch.from_numpy(gene_means)
    with torch.no_grad():
        model.gene_bias.weight[:, 0] = means
        model.gene_mean.copy_(means)
    return model


def load(folder: str | Path, untrained: bool = False) -> tuple[MaskedAutoencoder, dict, Vocabulary]:
    """Read a model folder: the model (in eval mode, on the CPU), its ``config.json``, its vocabulary.

    Parameters
    ----------
    untrained
        Leave the weights as they were before the first step (the control of every comparison).

    Raises
    ------
    ConfigError, VocabularyMismatch
        Not a finished model folder, of another version, or with a vocabulary that is not the one trained with.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        next_step = "name the folder that trainer.pretrain wrote"
        raise ConfigError(folder, found=str(error), expected="a model folder", next_step=next_step) from error
    if config.get("format_version") != FORMAT_VERSION:
        found = f"format_version {config.get('format_version')}"
        raise ConfigError(folder, found=found, expected=str(FORMAT_VERSION), next_step="update stpatch")
    vocabulary = Vocabulary.read(folder / "genes.tsv")
    if vocabulary.sha256 != config["data"]["genes"]["sha256"]:
        found, expected = f"sha256 {vocabulary.sha256}", f"{config['data']['genes']['sha256']} (config.json)"
        next_step = "restore the genes.tsv that the model was trained with"
        raise VocabularyMismatch(folder / "genes.tsv", found=found, expected=expected, next_step=next_step)
    model = build(ModelConfig(**config["model"]), vocabulary.mean, config["train"]["seed"])
    if not untrained:
        weights = folder / "model.safetensors"
        try:
            model.load_state_dict(safetensors.torch.load_file(weights))
        except (OSError, RuntimeError, safetensors.SafetensorError) as error:
            problem = " ".join(str(error).split())
            next_step = "let the training finish, or train again"
            raise ConfigError(weights, found=problem, expected="the model's weights", next_step=next_step) from error
    return model.eval(), config, vocabulary
