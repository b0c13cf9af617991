"""The learning curve as a small SVG: the trainer draws without a plotting library."""

from __future__ import annotations

import json

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 56, 16, 40, 40
SERIES = (  # kind of line, key, colour, dash, name
    ("train", "loss", "#9A9A9A", "", "training loss"),
    ("val", "masked_mse", "#D55E00", "", "held-out windows"),
    ("val", "gene_mean_mse", "#000000", "5 4", "held-out, each gene's training mean"),
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
