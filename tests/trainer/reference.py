"""The model and its loss in plain Python and float64: loops over samples, sites, genes, weights; no tensors.

Written from docs/method.md, not from the trainer's code; it covers every unit and every variant.
"""

from __future__ import annotations

import math

import numpy as np

TARGET_SUM = 1e4


def reference(weights: dict[str, np.ndarray], cfg, statistics, batch: dict, masked: np.ndarray) -> tuple[float, int]:
    """Sum of the losses of the masked entries of observed sites, and their number.

    Parameters
    ----------
    weights
        The model's state by name.
    statistics
        Mean and variance of each gene of the vocabulary.
    batch
        ``counts`` [B, m, h, w], ``genes`` [B, m], ``totals`` [B, h, w], ``rows`` [B, h], ``halves`` [B, w], ``centres`` [B, m],
        ``whole`` bool [B, S]: sites that are hidden whole.
    masked
        [B, S, m].
    """
    total, number = 0.0, 0
    mean = [float(v) for v in statistics[0]]
    deviation = [max(0.1, math.sqrt(v)) for v in statistics[1]]

    def linear(name, x):
        matrix, bias = weights[f"{name}.weight"].tolist(), weights[f"{name}.bias"].tolist()
        return [sum(a * b for a, b in zip(row, x, strict=True)) + c for row, c in zip(matrix, bias, strict=True)]

    def norm(name, x):
        centre = sum(x) / len(x)
        spread = math.sqrt(sum((v - centre) ** 2 for v in x) / len(x) + 1e-5)
        gain, bias = weights[f"{name}.weight"].tolist(), weights[f"{name}.bias"].tolist()
        return [(v - centre) / spread * g + b for v, g, b in zip(x, gain, bias, strict=True)]

    def turned(vector, y, x):
        """Rotary: pairs (i, i + half) turned by the row's angles, then by the column's."""
        half = len(vector) // 2
        angles = [place / 100 ** (i / (half // 2)) for place in (y, x) for i in range(half // 2)]
        first = [vector[i] * math.cos(a) - vector[half + i] * math.sin(a) for i, a in enumerate(angles)]
        return first + [vector[i] * math.sin(a) + vector[half + i] * math.cos(a) for i, a in enumerate(angles)]

    def block(name, sites, heads, seen, where):
        d = len(sites[0])
        size = d // heads
        qkv = [linear(f"{name}.query_key_value", norm(f"{name}.norm_attention", x)) for x in sites]
        out = []
        for s, x in enumerate(sites):
            joined = []
            for head in range(heads):
                part = slice(head * size, (head + 1) * size)
                scores = {}
                for t in range(len(sites)):
                    if seen[t] if cfg.unit == "patch" else t == s:
                        query, key = qkv[s][:d][part], qkv[t][d : 2 * d][part]
                        if cfg.positions == "relative":
                            query, key = turned(query, *divmod(s, cfg.w)), turned(key, *divmod(t, cfg.w))
                        score = sum(a * b for a, b in zip(query, key, strict=True)) / math.sqrt(size)
                        if cfg.unit == "patch" and cfg.positions == "distance":
                            score -= math.exp(weights[f"{name}.log_slope"][head]) * math.dist(where[s], where[t])
                        scores[t] = math.exp(score)
                for i in range(size):
                    value = sum(p * qkv[t][2 * d :][part][i] for t, p in scores.items())
                    joined.append(value / sum(scores.values()))
            x = [a + b for a, b in zip(x, linear(f"{name}.project", joined), strict=True)]
            hidden = linear(f"{name}.feed_forward.0", norm(f"{name}.norm_feed_forward", x))
            hidden = [0.5 * v * (1 + math.erf(v / math.sqrt(2))) for v in hidden]
            out.append([a + b for a, b in zip(x, linear(f"{name}.feed_forward.2", hidden), strict=True)])
        return out

    for b in range(len(batch["counts"])):
        genes = [int(k) for k in batch["genes"][b]]
        m, S = len(genes), cfg.h * cfg.w
        fixed = cfg.gene_embeddings == "fixed"
        embedding = weights["gene_loading" if fixed else "gene_embedding.weight"].tolist()
        e = [embedding[k] for k in genes]
        counts = batch["counts"][b].reshape(m, S).astype(float).tolist()
        depth = [float(t) for t in batch["totals"][b].ravel()]
        seen = [t > 0 for t in depth]
        values = [
            [math.log1p(counts[k][s] * TARGET_SUM / depth[s]) if seen[s] else 0.0 for k in range(m)] for s in range(S)
        ]
        if cfg.inputs == "slice":
            centres = batch["centres"][b].tolist()
            values = [[v - c for v, c in zip(site, centres, strict=True)] for site in values]
        where = _places(batch["rows"][b], batch["halves"][b])
        keys = [seen[s] and not (cfg.positions == "distance" and batch["whole"][b, s]) for s in range(S)]
        shown = []
        for s in range(S):
            visible = [k for k in range(m) if not masked[b, s, k]]
            read = list(values[s])
            if cfg.inputs in ("centred", "standardised"):
                read = [v - mean[k] for v, k in zip(read, genes, strict=True)]
            if cfg.inputs == "standardised":
                read = [v / deviation[k] for v, k in zip(read, genes, strict=True)]
            if fixed:
                squares = [sum(v * v for v in embedding[k]) for k in range(cfg.n_genes)]
                scale = sum(squares) / max(1e-6, sum(squares[genes[k]] for k in visible))
                scores = [scale * sum(read[k] * e[k][i] for k in visible) for i in range(cfg.axes)]
                shown.append(linear("show", scores))
                continue
            scale = cfg.m / max(1, len(visible))
            shown.append([scale * sum(read[k] * e[k][i] for k in visible) for i in range(cfg.width)])
        sites = shown
        if cfg.unit == "patch" and cfg.positions == "sincos":
            quarter = cfg.width // 4
            sites = []
            for s, x in enumerate(shown):
                angles = [[place / 10000 ** (i / quarter) for i in range(quarter)] for place in divmod(s, cfg.w)]
                position = [f(a) for line in angles for f in (math.sin, math.cos) for a in line]
                sites.append([v + p for v, p in zip(x, position, strict=True)])
        for layer in range(cfg.depth):
            sites = block(f"encoder.{layer}", sites, cfg.heads, keys, where)
        sites = [norm("encoder_norm", x) for x in sites]
        if cfg.unit == "multispot":
            sites = _neighbours(sites, seen, where, cfg.neighbours)
        if cfg.unit == "slice":
            sites = _domains(sites, shown, seen, cfg.domains)
        sites = [linear("narrow", x) for x in sites]
        for layer in range(cfg.decoder_depth):
            sites = block(f"decoder.{layer}", sites, cfg.decoder_heads, keys, where)
        sites = [linear("widen", norm("decoder_norm", x)) for x in sites]
        for s in range(S):
            for k in range(m):
                if not (masked[b, s, k] and seen[s]):
                    continue
                score = sum(a * c for a, c in zip(sites[s], e[k], strict=True))
                score += 0.0 if fixed else float(weights["gene_bias.weight"][genes[k], 0])
                number += 1
                if cfg.likelihood == "mse":
                    target = values[s][k]
                    if cfg.targets == "standardised":
                        target = (target - mean[genes[k]]) / deviation[genes[k]]
                    total += (score - target) ** 2
                    continue
                y, rate = counts[k][s], math.exp(score) * depth[s] / TARGET_SUM
                if cfg.likelihood == "poisson":
                    total -= y * math.log(rate) - rate - math.lgamma(y + 1)
                    continue
                free = float(weights["gene_log_dispersion.weight"][genes[k], 0])
                r = math.exp(6 - math.log1p(math.exp(6 - free)))
                total -= math.lgamma(y + r) - math.lgamma(r) - math.lgamma(y + 1)
                total -= r * math.log(r / (r + rate)) + y * math.log(rate / (r + rate))
    return total, number


def _places(rows, halves):
    """Of each site of a staggered lattice (y, x) in pitches."""
    return [(int(row) * math.sqrt(0.75), (2 * int(half) + int(row) % 2) / 2) for row in rows for half in halves]


def _neighbours(sites, seen, where, n):
    """Eq. 3: weight 1 / (1 + distance in pitches), of ties the first in the grid."""
    out = []
    for here in where:
        distance = [math.dist(here, there) for there in where]
        near = sorted((s for s in range(len(sites)) if seen[s]), key=lambda s: (round(distance[s], 9), s))[: n + 1]
        weight = {s: 1 / (1 + distance[s]) for s in near}
        out.append([sum(weight[s] * sites[s][i] for s in near) / sum(weight.values()) for i in range(len(sites[0]))])
    return out


def _domains(sites, shown, seen, n):
    """Eq. 4: half of a site's own feature, half of the mean of its k-means cluster of what the sites show."""
    observed = [s for s in range(len(sites)) if seen[s]]
    centres = [list(shown[observed[int((j + 0.5) / n * len(observed))]]) for j in range(n)]

    def nearest(x):
        apart = [sum((a - c) ** 2 for a, c in zip(x, centre, strict=True)) for centre in centres]
        return apart.index(min(apart))

    for _ in range(10):
        domain = [nearest(x) for x in shown]
        for j in range(n):
            members = [shown[s] for s in observed if domain[s] == j]
            if members:
                centres[j] = [sum(column) / len(members) for column in zip(*members, strict=True)]
    domain = [nearest(x) for x in shown]
    out = []
    for s, x in enumerate(sites):
        members = [sites[t] for t in observed if domain[t] == domain[s]]
        mean = [sum(column) / len(members) for column in zip(*members, strict=True)] if members else [0.0] * len(x)
        out.append([(a + b) / 2 for a, b in zip(x, mean, strict=True)])
    return out
