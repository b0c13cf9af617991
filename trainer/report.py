"""What a run leaves for people: the model card, and the learning curve as an SVG, drawn without a plotting library."""

from __future__ import annotations

import json

CARD = """\
---
library_name: stpatch
tags: [spatial-transcriptomics, masked-autoencoder{tag}]
---
# stpatch: a masked autoencoder of Visium windows
{warning}
A window of {h} x {w} spots by {m} genes is read as an image with one token a spot; {hidden} are hidden and predicted from the
rest. The features of its encoder describe a spot{surroundings}.

## Held-out windows

{figures}

![learning curve](curve.svg)

## Model and training

Unit `{unit}`; inputs `{inputs}`, targets `{targets}`, likelihood `{likelihood}`, gene embeddings `{gene_embeddings}`.
{weights:,} weights: width {width}, encoder of depth {depth} ({heads} heads, {feed_forward} hidden units), decoder of depth
{decoder_depth} and width {decoder_width}, {n_genes:,} genes. {steps:,} steps of {batch_size} windows, {optimizer}, learning rate {lr:g} (cosine),
weight decay {weight_decay:g}, seed {seed}. All settings: `config.json`; the course of the loss: `metrics.jsonl`.

## Data

{n_samples:,} windows, genes selected by `{selection}`, from {n_slices} slices{kind}; values are log1p(count * {target_sum:g} / total){about}.

| slice | source | organism | donor | layout | pitch | windows | |
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
features = model.encode(values, genes, observed{places})  # [B, S, m], [B, m], [B, S]{of_places} -> [B, S, width]
```

## Limits

It knows the genes of its vocabulary only, and spots of the pitch and layout it was trained on. Whether its features help is for
the comparison with the controls (neighbour means, an untrained encoder) to say, not for the loss.
"""

SIMULATED = "\n**Trained on simulated data: for trying out the software, not for biology.**\n"
CONTAMINATED = (
    "\n**Evaluation slices may be among the training slices (`allow_contamination`): scores on them prove nothing.**\n"
)
ROW = "| {slice} | {source} | {organism} | {donor} | {layout} | {pitch} | {n_windows} | {use} |"

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 56, 16, 40, 40
SERIES = (  # kind of line, key, colour, dash, name
    ("train", "loss", "#9A9A9A", "", "training loss"),
    ("val", "masked_mse", "#D55E00", "", "held-out windows"),
    ("val", "gene_mean_mse", "#000000", "5 4", "held-out, each gene's mean"),
)


def model_card(facts: dict, scores: dict[str, float], n_weights: int) -> str:
    """Markdown for ``README.md``, from ``config.json`` and the last validation (nothing without held-out windows)."""
    data, model, objective = facts["data"], facts["model"], facts["objective"]
    rows = [(row, "training") for row in data["slices"]] + [(row, "held out") for row in data["held_out"]]
    rows = [ROW.format(**row, use=use, pitch=in_um(row["pitch_um"])) for row, use in rows]
    hidden = {"mask_ratio": "(spot, gene) entries", "mask_genes": "genes at every spot", "mask_sites": "spots whole"}
    hidden = [f"{objective[name]:.0%} of its {what}" for name, what in hidden.items() if objective[name]]
    placed = model["unit"] == "multispot" or model["positions"] == "distance"
    in_slice = model["inputs"] == "slice"
    return CARD.format(
        **{name: value for name, value in data.items() if name not in ("genes", "slices")},
        **facts["train"],
        **{name: value for name, value in model.items() if name not in data},
        hidden=" and ".join(hidden),
        about=", less the gene's mean in its slice" * in_slice,
        places=", None, places" * placed,
        of_places=", ..., [B, S, 2] in pitches" * placed,
        surroundings=" in its surroundings" * (model["unit"] != "spot"),
        tag=", simulated" * data["simulated"],
        warning=SIMULATED * data["simulated"] + CONTAMINATED * data["allow_contamination"],
        figures=_figures(scores, data, "each gene's mean in its slice" if in_slice else "each gene's training mean"),
        weights=n_weights,
        n_slices=len(data["slices"]),
        kind=" (simulated)" * data["simulated"],
        genes_sha256=data["genes"]["sha256"],
        table="\n".join(rows),
    )


def in_um(pitch: float | None) -> str:
    """The distance of neighbouring spots, which a slice without a scale does not tell."""
    return "an unknown pitch" if pitch is None else f"{pitch:g} um"


def _figures(scores: dict[str, float], data: dict, baseline: str) -> str:
    if not scores:
        return "There were none: nothing is known of how well the model predicts tissue it has not seen."
    model, mean, n = scores["masked_mse"], scores["gene_mean_mse"], sum(row["n_windows"] for row in data["held_out"])
    verdict = f"{1 - model / mean:.1%} below" if model < mean else f"NOT below (ratio {model / mean:.3f})"
    return (
        f"The last validation, over {scores['n_windows']:,} of {n:,} held-out windows:\n\n"
        f"| prediction of the hidden entries | mean squared error{' (simulated data)' * data['simulated']} |\n|---|---|\n"
        f"| model | {model:.5f} |\n| {baseline} | {mean:.5f} |\n\nThe model is {verdict} the gene means."
    )


def curve(metrics: bytes, simulated: bool) -> bytes:
    """``curve.svg`` from the content of ``metrics.jsonl``; at most 400 points a line."""
    lines = [json.loads(line) for line in metrics.splitlines()]
    points = {}
    for kind, key, *_ in SERIES:
        found = [(line["step"], line[key]) for line in lines if line["kind"] == kind]
        points[key] = found[:: -(-len(found) // 400) or 1] + found[-1:]
    values = [value for series in points.values() for _, value in series]
    low, high = min(values, default=0.0), max(values, default=1.0)
    low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
    last = max((line["step"] for line in lines), default=0) or 1

    def place(step: int, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * step / last
        return f"{x:.1f},{TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{LEFT},{TOP}V{HEIGHT - BOTTOM}H{WIDTH - RIGHT}" fill="none" stroke="#666"/>',
        f'<text x="{LEFT}" y="{HEIGHT - 12}">0</text>',
        f'<text x="{WIDTH - RIGHT}" y="{HEIGHT - 12}" text-anchor="end">step {last:,}</text>',
    ]
    for value in (low, (low + high) / 2, high):
        y = place(0, value).split(",")[1]
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for i, (_, key, colour, dash, name) in enumerate(SERIES):
        line = " ".join(place(*point) for point in points[key])
        stroke = f'fill="none" stroke="{colour}" stroke-width="1.5" stroke-dasharray="{dash}"'
        parts.append(f'<polyline points="{line}" {stroke}/>')
        parts.append(f'<path d="M{LEFT + 190 * i},18h20" {stroke}/>')
        parts.append(f'<text x="{LEFT + 190 * i + 24}" y="22">{name}</text>')
    if simulated:
        parts.append(f'<text x="{WIDTH - RIGHT}" y="{TOP + 14}" text-anchor="end" fill="#CC3311">simulated data</text>')
    return "\n".join([*parts, "</svg>"]).encode() + b"\n"
