"""The masked autoencoder over the sites of a window (Eq. 8), and its rivals with another unit (Eq. 2 to 4).

A token is a site. B windows, S = h * w sites, m genes of a window, d width. What the paper leaves open, and was chosen here,
is in docs/method.md; of the choices that one meets in the code:

- The sum over a site's visible genes is scaled by (genes a window has in training) / (visible genes of that site), as in
  inverted dropout: masking, or another number of genes when embedding, keeps it.
- Gene biases start at the training means and the decoder's last layer at zero: before its first step the model is exactly
  the gene-mean predictor that it has to beat (with a likelihood of counts: nearly).
- Fixed gene embeddings are the corpus' components (docs/format.md): nothing about a single gene is learned then, so that a few
  slices can't be learned by heart. What a site's visible genes weigh in all is measured by their squared loadings.
- Positions by distance take so much from the attention's logits a pitch, each head its own amount, as in ALiBi: before the first
  step a head already is a mean over a site's surroundings, near or wide. Sites hidden whole are then no keys: an attention
  that can't tell them from observed ones would average what is not there.
- Unobserved sites are no keys in the attention and never in the loss. The mask is one bool a key, [B, 1, 1, S]: fused kernels
  take it as it is, and whether a window needs it is never asked, which would make the host wait for the device. Relative
  positions are rotary for the same reason: a learned bias by offset would not keep the fused kernels. By distance it is a float a
  pair, [B, heads, S, S].
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trainer import units
from trainer.config import FORMAT_VERSION, check, knob, refusal
from trainer.data import Vocabulary
from trainer.errors import ConfigError, VocabularyMismatch
from trainer.expression import expected_log_normalised
from trainer.files import read_sealed

LEAST_DEVIATION = 0.1  # of a gene that is hardly ever seen: its few values must not become huge
MOST_SITES = 512 * 512  # of a window: what its tables of positions may take
SHOWN = 0.25  # of a layer's usual scale: what a head gathers of others then weighs as much as what the site shows
SLOPES = (0.2, 4.0)  # of the least and the steepest head, before the first step, a pitch
MAX_LOG_DISPERSION = 6.0  # of the negative binomial: beyond e^6 it is Poisson, and float32 loses its logarithms


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    n_genes: int  # rows of the vocabulary
    m: int  # genes of a training window
    h: int
    w: int
    unit: str = knob("patch|spot|multispot|slice", "what a site sees (Eq. 8, 2, 3, 4)")
    neighbours: int = knob(16, "nearest sites of the unit multispot", least=1)
    domains: int = knob(8, "macro-domains of the unit slice", least=1)
    width: int = knob(256, "d: numbers that describe a site, and a gene", least=4)
    depth: int = knob(6, "encoder layers", least=1)
    heads: int = knob(8, "attention heads of the encoder", least=1)
    feed_forward: int = knob(1024, "hidden units of the encoder's feed-forward layers", least=1)
    decoder_width: int = knob(128, "width of the decoder; its feed-forward layers are four times as wide", least=1)
    decoder_depth: int = knob(2, "decoder layers")
    decoder_heads: int = knob(4, "attention heads of the decoder", least=1)
    positions: str = knob("sincos|none|relative|distance", "of the unit patch; relative is rotary, distance a bias")
    gene_embeddings: str = knob(
        "random|components|fixed", "random or the corpus' components at the start, or these always"
    )
    axes: int = knob(96, "components that fixed gene embeddings consist of", least=1)
    inputs: str = knob(
        "plain|centred|standardised|slice", "Eq. 8; about the gene's training mean; about its slice's mean"
    )
    targets: str = knob("plain|standardised", "expression that the squared error is of")
    likelihood: str = knob("mse|poisson|nb", "mse is of expression, the others (nb: negative binomial) of counts")

    def __post_init__(self) -> None:
        check(self)
        for name in ("n_genes", "m", "h", "w"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise refusal(self, "a whole number above 0", name)
        if self.h * self.w > MOST_SITES:
            raise refusal(self, f"at most {MOST_SITES} sites", "h", "w")
        for name, heads in (("width", self.heads), ("decoder_width", self.decoder_heads)):
            step = math.lcm(heads, 4 if name == "width" else 1)  # 4: sine and cosine of row and column
            step = 4 * heads if self.positions == "relative" else step  # the same of each head
            if getattr(self, name) % step:
                raise refusal(self, f"a multiple of {step}, for {heads} heads", name)
        if self.positions == "distance" and self.unit != "patch":
            raise refusal(self, "another, as only the unit patch has positions", "positions")
        if self.gene_embeddings == "fixed" and self.inputs != "slice":
            raise refusal(self, "slice, as fixed gene embeddings tell no gene's mean", "inputs")
        if self.inputs == "slice" and (self.likelihood != "mse" or self.targets != "plain"):
            raise refusal(self, "mse and plain, as predictions are about the slice's mean too", "likelihood", "targets")
        if self.likelihood != "mse" and self.targets != "plain":
            raise refusal(self, f"plain, as likelihood {self.likelihood} is of counts", "targets")


class Block(nn.Module):
    """A pre-norm transformer layer in which only observed sites are attended to; or every site to itself alone."""

    def __init__(self, width: int, heads: int, hidden: int, by_distance: bool = False) -> None:
        super().__init__()
        self.heads = heads
        if by_distance:
            self.log_slope = nn.Parameter(torch.linspace(*(math.log(slope) for slope in SLOPES), heads))
        self.norm_attention = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.project = nn.Linear(width, width)
        self.norm_feed_forward = nn.LayerNorm(width)
        self.feed_forward = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(
        self, x: Tensor, attend: Tensor | None, turn: Tensor | None = None, distance: Tensor | None = None
    ) -> Tensor:
        x = x + self.attention(self.norm_attention(x), attend, turn, distance)
        return x + self.feed_forward(self.norm_feed_forward(x))

    def attention(self, x: Tensor, attend: Tensor | None, turn: Tensor | None, distance: Tensor | None) -> Tensor:
        B, S, d = x.shape
        if attend is None:  # a softmax over one key is 1, so what a site sees is its own value
            weight, bias = self.query_key_value.weight[2 * d :], self.query_key_value.bias[2 * d :]
            return self.project(F.linear(x, weight, bias))
        qkv = self.query_key_value(x).view(B, S, 3, self.heads, d // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [B, heads, S, d / heads]
        if turn is not None:
            query, key = rotate(query, turn), rotate(key, turn)
        if distance is not None:  # [B, 1, S, S] -> [B, heads, S, S]
            bias = -self.log_slope.exp()[:, None, None] * distance
            attend = bias.masked_fill(~attend, -torch.inf).to(query.dtype)
        x = F.scaled_dot_product_attention(query, key, value, attn_mask=attend)
        return self.project(x.transpose(1, 2).reshape(B, S, d))


class MaskedAutoencoder(nn.Module):
    def __init__(self, cfg: ModelConfig, vocabulary: Vocabulary) -> None:
        super().__init__()
        self.cfg = cfg
        fixed = cfg.gene_embeddings == "fixed"
        if fixed:
            self.register_buffer("gene_loading", torch.zeros(cfg.n_genes, cfg.axes))
            self.show = nn.Linear(cfg.axes, cfg.width)
        else:
            self.gene_embedding = nn.Embedding(cfg.n_genes, cfg.width)  # e_k, of the input and of the prediction
            self.gene_bias = nn.Embedding(cfg.n_genes, 1)
        if cfg.likelihood == "nb":
            self.gene_log_dispersion = nn.Embedding(cfg.n_genes, 1)
        deviation = np.maximum(np.sqrt(vocabulary.variance), LEAST_DEVIATION)
        for name, statistic in (("gene_mean", vocabulary.mean), ("gene_deviation", deviation)):
            self.register_buffer(name, torch.from_numpy(statistic).float(), persistent=False)
        positions, tables = cfg.positions if cfg.unit == "patch" else "none", {}
        if positions == "sincos":
            tables = {"position": position_encoding(cfg.h, cfg.w, cfg.width)}  # [S, d]
        if positions == "relative":
            sizes = {"encoder_turn": cfg.width // cfg.heads, "decoder_turn": cfg.decoder_width // cfg.decoder_heads}
            tables = {name: rotation(cfg.h, cfg.w, size) for name, size in sizes.items()}
        for name in ("position", "encoder_turn", "decoder_turn"):
            self.register_buffer(name, tables.get(name), persistent=False)
        far = positions == "distance"
        self.encoder = nn.ModuleList(Block(cfg.width, cfg.heads, cfg.feed_forward, far) for _ in range(cfg.depth))
        self.encoder_norm = nn.LayerNorm(cfg.width)
        self.narrow = nn.Linear(cfg.width, cfg.decoder_width)
        self.decoder = nn.ModuleList(
            Block(cfg.decoder_width, cfg.decoder_heads, 4 * cfg.decoder_width, far) for _ in range(cfg.decoder_depth)
        )
        self.decoder_norm = nn.LayerNorm(cfg.decoder_width)
        self.widen = nn.Linear(cfg.decoder_width, cfg.axes if fixed else cfg.width)

    @property
    def needs_places(self) -> bool:
        """Whether `encode` and `decode` must be told where the sites lie."""
        return self.cfg.unit == "multispot" or self.cfg.unit == "patch" and self.cfg.positions == "distance"

    def encode(
        self,
        values: Tensor,
        genes: Tensor,
        observed: Tensor,
        masked: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """Features of every site, [B, S, d].

        Parameters
        ----------
        values
            float [B, S, m]: normalised expression; with inputs `slice` about the slice's mean.
        genes
            int [B, m]: rows of the vocabulary; m may differ from that of training.
        observed
            bool [B, S].
        masked
            bool [B, S, m]: entries that the model must not see; none when embedding.
        places
            float64 [B, S, 2] (`units.lattice_places`): where the sites lie, for a model that `needs_places`.
        """
        return self.look_around(self.sum_genes(values, genes, masked), observed, places)

    def look_around(self, x: Tensor, observed: Tensor, places: Tensor | None = None) -> Tensor:
        """Features of every site, [B, S, d], from what the sites show, ``x`` [B, S, d] (`sum_genes`)."""
        if self.cfg.unit == "patch":
            x = x if self.position is None else x + self.position
            return self.transform(x, attended(observed), self.distance(places))
        return self.surround(x, self.transform(x), observed, places)

    def sum_genes(self, values: Tensor, genes: Tensor, masked: Tensor | None = None) -> Tensor:
        """What each site shows: the sum over its visible genes of value times embedding, scaled; [B, S, d]."""
        if self.cfg.inputs in ("centred", "standardised"):
            values = values - self.gene_mean[genes][:, None, :]
        if self.cfg.inputs == "standardised":
            values = values / self.gene_deviation[genes][:, None, :]
        if self.cfg.gene_embeddings == "fixed":
            return self.show(self.components_of(values, genes, masked))
        n_visible = torch.full_like(values[..., :1], values.shape[2])  # [B, S, 1]
        if masked is not None:
            values = values.masked_fill(masked, 0.0)
            n_visible = (~masked).sum(2, keepdim=True)
        x = torch.bmm(values, self.gene_embedding(genes))  # [B, S, m] x [B, m, d] -> [B, S, d]
        return x * (self.cfg.m / n_visible.clamp(min=1))

    def components_of(self, values: Tensor, genes: Tensor, masked: Tensor | None = None) -> Tensor:
        """Scores on the fixed components, [B, S, axes]; scaled by what the whole vocabulary's loadings weigh against the visible ones."""
        loading = self.gene_loading[genes]  # [B, m, axes]
        weight = loading.square().sum(2, keepdim=True)  # [B, m, 1]
        if masked is None:
            visible = weight.sum(1, keepdim=True)
        else:
            values = values.masked_fill(masked, 0.0)
            visible = torch.bmm((~masked).expand(values.shape).to(weight.dtype), weight)  # [B, S, 1]
        return torch.bmm(values, loading) * (self.gene_loading.square().sum() / visible.clamp(min=1e-6))

    def transform(self, x: Tensor, attend: Tensor | None = None, distance: Tensor | None = None) -> Tensor:
        """The encoder's layers; without ``attend`` each site by itself."""
        for block in self.encoder:
            x = block(x, attend, self.encoder_turn, distance)
        return self.encoder_norm(x)

    def distance(self, places: Tensor | None) -> Tensor | None:
        """How far sites lie apart, in pitches, [B, 1, S, S]; None for positions of another kind."""
        if self.cfg.positions != "distance":
            return None
        places = (places - places[:, :1]).float()  # no more digits than a window needs
        return torch.cdist(places, places, compute_mode="donot_use_mm_for_euclid_dist")[:, None]

    def surround(self, x: Tensor, features: Tensor, observed: Tensor, places: Tensor | None) -> Tensor:
        """Eq. 2, 3, 4: features of sites by themselves, ``x`` what they show -> features of sites among others."""
        if self.cfg.unit == "multispot":
            return units.mean_of_neighbours(features, places, observed, self.cfg.neighbours)
        if self.cfg.unit == "slice":
            domain = units.macro_domains(x.detach(), observed, self.cfg.domains)
            return units.mean_with_domain(features, domain, observed, self.cfg.domains)
        return features

    def decode(self, features: Tensor, genes: Tensor, observed: Tensor, places: Tensor | None = None) -> Tensor:
        """Scores [B, S, m]: site feature . e_k + bias of gene k (fixed embeddings have none); `predict` says what they mean."""
        x = self.summarise(features, observed, places)
        if self.cfg.gene_embeddings == "fixed":
            return torch.bmm(x, self.gene_loading[genes].transpose(1, 2))
        scores = torch.bmm(x, self.gene_embedding(genes).transpose(1, 2))  # [B, S, d] x [B, d, m] -> [B, S, m]
        return scores + self.gene_bias(genes).transpose(1, 2)  # [B, 1, m]

    def summarise(self, features: Tensor, observed: Tensor, places: Tensor | None = None) -> Tensor:
        """The decoder's layers: what is multiplied with gene embeddings, [B, S, d], or with loadings, [B, S, axes]."""
        x = self.narrow(features)  # [B, S, decoder width]
        attend = attended(observed) if self.cfg.unit == "patch" else None
        for block in self.decoder:
            x = block(x, attend, self.decoder_turn, self.distance(places))
        return self.widen(self.decoder_norm(x))

    def predict(self, scores: Tensor, genes: Tensor, depth: Tensor) -> Tensor:
        """Normalised expression [B, S, m] that the scores stand for.

        ``depth`` [B, S] is total / target_sum of each site, above 0; of use to likelihoods of counts alone.
        """
        if self.cfg.likelihood != "mse":
            dispersion = self.dispersion(genes) if self.cfg.likelihood == "nb" else None
            return expected_log_normalised(self.expected_counts(scores, depth), 1 / depth[:, :, None], dispersion)
        if self.cfg.targets == "standardised":
            return scores * self.gene_deviation[genes][:, None, :] + self.gene_mean[genes][:, None, :]
        return scores

    def expected_counts(self, scores: Tensor, depth: Tensor) -> Tensor:
        """exp(score) counts among ``target_sum``, of those that the site has: [B, S, m]."""
        return scores.exp() * depth[:, :, None]

    def dispersion(self, genes: Tensor) -> Tensor:
        """r of each gene's negative binomial, [B, 1, m]; smoothly below e^6."""
        free = self.gene_log_dispersion(genes).transpose(1, 2).float()
        return (MAX_LOG_DISPERSION - F.softplus(MAX_LOG_DISPERSION - free)).exp()


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


def rotation(h: int, w: int, size: int) -> Tensor:
    """Cosines and sines of rotary positions, [2, h * w, size / 2]: half of the angles by row, half by column."""
    frequency = 100.0 ** -(torch.arange(size // 4) / (size // 4))  # a window has tens of rows, so none turns slower
    rows, columns = (torch.arange(n)[:, None] * frequency for n in (h, w))
    angle = torch.cat([rows[:, None].expand(h, w, -1), columns[None, :].expand(h, w, -1)], dim=2).flatten(0, 1)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Turn pairs of numbers (i, i + size / 2) of [B, heads, S, size] by each site's angles."""
    (cos, sin), (a, b) = turn.to(x.dtype), x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def build(cfg: ModelConfig, vocabulary: Vocabulary, seed: int, components: Path | None = None) -> MaskedAutoencoder:
    """A fresh model on the CPU: the same weights for the same seed, whatever was drawn before.

    Raises ConfigError or VocabularyMismatch where gene embeddings are to be ``components`` (the corpus' file of them), at the
    start or always, and there are none, or too few, or of another vocabulary.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MaskedAutoencoder(cfg, vocabulary)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if cfg.gene_embeddings != "fixed":
            nn.init.normal_(model.gene_embedding.weight, std=cfg.width**-0.5)
        nn.init.zeros_(model.widen.weight)
        if cfg.gene_embeddings == "fixed":
            model.show.weight.data.mul_(SHOWN)
            for block in model.encoder:
                nn.init.zeros_(block.feed_forward[2].weight)
    mean = torch.from_numpy(vocabulary.mean)
    with torch.no_grad():
        if cfg.likelihood == "nb":
            model.gene_log_dispersion.weight.fill_(1.0)
        if cfg.likelihood != "mse":
            mean = mean.expm1().clamp(min=1e-4).log()
        if cfg.gene_embeddings == "fixed":
            model.gene_loading.copy_(fixed_loadings(components, vocabulary, cfg.axes))
            return model
        model.gene_bias.weight[:, 0] = mean if cfg.targets == "plain" and cfg.inputs != "slice" else 0.0
        if cfg.gene_embeddings == "components":
            axes = read_components(components, vocabulary)["components"][
                :, : cfg.width
            ]  # rows of about unit length, scaled
            model.gene_embedding.weight[:, : axes.shape[1]] = axes * (len(axes) / cfg.width) ** 0.5
    return model


def fixed_loadings(file: Path | None, vocabulary: Vocabulary, k: int) -> Tensor:
    """A N^(-1/2), float32 [n_genes, k], of the first ``k`` components A; ConfigError where there are fewer.

    N = A' diag(noise) A, the covariance of a spot's scores about what its slice has on the whole, were genes independent (nearly all
    of it is counting noise): so each score has a variance of 1 and none goes with another. The symmetric root leaves every
    component where it was, as nearly as can be.
    """
    axes, noise = (part.double() for part in read_components(file, vocabulary, noise=True).values())
    if axes.shape[1] < k:
        next_step = f"choose --axes {axes.shape[1]}, or build the shards with more `components`"
        raise ConfigError(file, f"{axes.shape[1]} components", f"--axes of them, {k}", next_step)
    axes = axes[:, :k]
    size, turn = torch.linalg.eigh(axes.T @ (noise[:, None] * axes))
    return (axes @ (turn * size.clamp(min=1e-6 * size.max()).rsqrt() @ turn.T)).float()


def read_components(file: Path | None, vocabulary: Vocabulary, noise: bool = False) -> dict[str, Tensor]:
    """The corpus' ``components`` float32 [n_genes, k] and, where asked for, each gene's ``noise`` [n_genes] (docs/format.md)."""
    next_step = "build the shards again with `components` above 0, or choose --gene-embeddings random"
    if file is None or not file.is_file():
        expected = "those that gene embeddings are to be"
        raise ConfigError(file or "shards", "no components.safetensors", expected, next_step)
    try:
        with safetensors.safe_open(file, "pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in ("components", *("noise",) * noise)}
            made_for = opened.metadata()["genes_sha256"]
    except (OSError, KeyError, TypeError, safetensors.SafetensorError) as error:
        raise ConfigError(file, " ".join(str(error).split()), "components of the corpus", next_step) from error
    if made_for != vocabulary.sha256:
        raise VocabularyMismatch(file, f"components of genes.tsv {made_for}", vocabulary.sha256, next_step)
    return tensors


def load(folder: str | Path, untrained: bool = False) -> tuple[MaskedAutoencoder, dict, Vocabulary]:
    """Read a model folder: the model (in eval mode, on the CPU), its ``config.json``, its vocabulary.

    ``untrained`` leaves the weights as they were before the first step (the control of every comparison). Raises ConfigError
    or VocabularyMismatch for what is no finished model folder, of another version, or has not the vocabulary trained with;
    DamagedFile for weights that do not hash to what they record.
    """
    folder = Path(folder)
    try:
        config = json.loads((folder / "config.json").read_text())
        if (version := config.get("format_version")) != FORMAT_VERSION:
            raise ConfigError(folder, f"format_version {version}", FORMAT_VERSION, "update stpatch")
        cfg, trained_with = ModelConfig(**config["model"]), config["data"]["genes"]["sha256"]
        seed = int(config["train"]["seed"])
    except ConfigError:
        raise
    except (OSError, AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        next_step = "name the folder that trainer.pretrain wrote; where it is of another version, update stpatch"
        raise ConfigError(folder, error, "a model folder", next_step) from error
    vocabulary = Vocabulary.read(folder / "genes.tsv")
    if vocabulary.sha256 != trained_with:
        next_step = "restore the genes.tsv that the model was trained with"
        found, expected = f"sha256 {vocabulary.sha256}", f"{trained_with} (config.json)"
        raise VocabularyMismatch(folder / "genes.tsv", found, expected, next_step)
    weights = folder / "model.safetensors"
    try:
        if weights.exists() or not untrained:  # the start needs no weights; where they are, they vouch for the sizes
            remedy = "restore it from a copy, or delete it and train again"
            tensors = safetensors.torch.load(read_sealed(weights, remedy))
            check_sizes(cfg, vocabulary, tensors)
        if untrained:
            model = build(cfg, vocabulary, seed, folder / "components.safetensors")
        else:
            model = MaskedAutoencoder(cfg, vocabulary)
            model.load_state_dict(tensors)
    except (OSError, RuntimeError, TypeError, safetensors.SafetensorError) as error:
        next_step = "let the training finish, or train again"
        raise ConfigError(weights, " ".join(str(error).split()), "the model's weights", next_step) from error
    return model.eval(), config, vocabulary


def check_sizes(cfg: ModelConfig, vocabulary: Vocabulary, tensors: dict[str, Tensor]) -> None:
    """Raise RuntimeError unless these are the tensors of such a model; no memory is taken for it, whatever it says of its size."""
    n_layers, n_genes = cfg.depth + cfg.decoder_depth, len(vocabulary.gene_ids)
    if n_layers > len(tensors) or cfg.n_genes != n_genes:
        raise RuntimeError(f"{n_genes} genes, {len(tensors)} tensors for {cfg.n_genes} genes and {n_layers} layers")
    with torch.device("meta"):
        expected = {name: tensor.shape for name, tensor in MaskedAutoencoder(cfg, vocabulary).state_dict().items()}
    if expected != {name: tensor.shape for name, tensor in tensors.items()}:
        raise RuntimeError("tensors of other names or shapes than config.json asks for")
