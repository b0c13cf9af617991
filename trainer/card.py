"""The model card: what the model is, what it was trained on, how good it is, how to load it."""

from __future__ import annotations

CARD = """\
---
library_name: stpatch
tags: [spatial-transcriptomics, masked-autoencoder{tag}]
---
# stpatch: a masked autoencoder of Visium windows
{warning}
A window of {h} x {w} spots by {m} genes is read as an image with one token a spot; {mask_ratio:.0%} of its (spot, gene) entries
are hidden and predicted from the rest{whole_sites}. The features of its encoder describe a spot{surroundings}.

## Held-out windows

{figures}

![learning curve](curve.svg)

## Model and training

Unit `{unit}`; inputs `{inputs}`, targets `{targets}`, likelihood `{likelihood}`, gene embeddings at first `{gene_embeddings}`.
{weights:,} weights: width {width}, encoder of depth {depth} ({heads} heads, {feed_forward} hidden units), decoder of depth
{decoder_depth} and width {decoder_width}, {n_genes:,} genes. {steps:,} steps of {batch_size} windows, {optimizer}, learning rate {lr:g} (cosine),
weight decay {weight_decay:g}, seed {seed}. All settings: `config.json`; the course of the loss: `metrics.jsonl`.

## Data

{n_samples:,} windows, genes selected by `{selection}`, from {n_slices} slices{kind}; values are log1p(count * {target_sum:g} / total).

| slice | source | organism | donor | layout | pitch (um) | windows | |
|---|---|---|---|---|---|---|---|
{table}

Row k of the gene embedding is the gene in row k of `genes.tsv` (sha256 {genes_sha256}).

## Use

```bash
python -m trainer.embed --model DIR --shards results/shards/slices/SLICE.tar --out SLICE.safetensors
```

```python
from trainer.model import load

model, config, vocabulary = load("DIR")
features = model.encode(values, genes, observed)  # [B, S, m], [B, m], [B, S] -> [B, S, width]
```

## Limits

It knows the genes of its vocabulary only, and spots of the pitch and layout it was trained on. Whether its features help is for
the comparison with the controls (neighbour means, an untrained encoder) to say, not for the loss.
"""

SIMULATED = "\n**Trained on simulated data: for trying out the software, not for biology.**\n"
CONTAMINATED = (
    "\n**Evaluation slices may be among the training slices (`allow_contamination`): scores on them prove nothing.**\n"
)


def model_card(facts: dict, scores: dict[str, float], n_weights: int) -> str:
    """Markdown for ``README.md``.

    Parameters
    ----------
    facts
        The content of ``config.json``.
    scores
        ``masked_mse``, ``gene_mean_mse`` and ``n_windows`` of the last validation; empty without held-out windows.
    """
    data = facts["data"]
    simulated = data["simulated"]
    rows = [(row, "training") for row in data["slices"]] + [(row, "held out") for row in data["held_out"]]
    line = "| {slice} | {source} | {organism} | {donor} | {layout} | {pitch_um:g} | {n_windows} | {use} |"
    return CARD.format(
        **{name: value for name, value in data.items() if name not in ("genes", "slices")},
        **facts["train"],
        **{name: value for name, value in facts["objective"].items() if name != "seed"},
        **{name: value for name, value in facts["model"].items() if name not in data},
        whole_sites=f", and {facts['objective']['mask_sites']:.0%} of its spots whole"
        * bool(facts["objective"]["mask_sites"]),
        surroundings=" in its surroundings" * (facts["model"]["unit"] != "spot"),
        tag=", simulated" if simulated else "",
        warning=SIMULATED * simulated + CONTAMINATED * data["allow_contamination"],
        figures=_figures(scores, sum(row["n_windows"] for row in data["held_out"]), simulated),
        weights=n_weights,
        n_slices=len(data["slices"]),
        kind=" (simulated)" if simulated else "",
        genes_sha256=data["genes"]["sha256"],
        table="\n".join(line.format(**row, use=use) for row, use in rows),
    )


def _figures(scores: dict[str, float], n_held_out: int, simulated: bool) -> str:
    if not scores:
        return "There were none: nothing is known of how well the model predicts tissue it has not seen."
    model, mean = scores["masked_mse"], scores["gene_mean_mse"]
    verdict = f"{1 - model / mean:.1%} below" if model < mean else f"NOT below (ratio {model / mean:.3f})"
    return (
        f"The last validation, over {scores['n_windows']:,} of {n_held_out:,} held-out windows:\n\n"
        f"| prediction of the hidden entries | mean squared error{' (simulated data)' if simulated else ''} |\n|---|---|\n"
        f"| model | {model:.5f} |\n| each gene's training mean | {mean:.5f} |\n\nThe model is {verdict} the gene means."
    )
