"""The curves of the shipped ablations: ours where they were measured, the paper's points beside them, called the paper's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from tests.conftest import ROOT
from workflow import ablate, ablation_table, plotting
from workflow.paper_tables import paper_scores


def drawn(name: str, monkeypatch) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Label -> x and y of the accuracy lines, when variant number i scored .5 + .05 i with two seeds .02 apart."""
    table = ablate.read_table(ROOT / f"ablations/{name}.yaml")
    rows = [
        (name, variant.name, seed, "d", "random20", "knn", "stpatch", metric, 0.5 + 0.05 * index + 0.02 * seed)
        for index, variant in enumerate(table.variants)
        for seed in (0, 1)
        for metric in ablation_table.METRICS
    ]
    kept = []
    monkeypatch.setattr(ablation_table, "save", lambda figure, *_: kept.append(figure))
    scores = pd.DataFrame(rows, columns=ablation_table.COLUMNS)
    assert ablation_table.curve(table, scores, Path("not-written.png"), simulated=False)
    axes = kept[0].axes[0]
    handles, labels = axes.get_legend_handles_labels()
    lines = [handle if hasattr(handle, "get_xdata") else handle.lines[0] for handle in handles]
    found = {label: (line.get_xdata(), line.get_ydata()) for label, line in zip(labels, lines, strict=True)}
    plotting.plt.close(kept[0])
    return found


@pytest.mark.parametrize(
    ("name", "table", "xs"), [("window", 4, [8, 14, 16, 20, 24, 26, 30]), ("channels", 5, [128, 256, 512])]
)
def test_window_and_channels_are_curves_with_the_papers_points_beside_ours(name, table, xs, monkeypatch):
    found = drawn(name, monkeypatch)
    ours, paper = sorted(found, key=lambda label: label.startswith("paper"))
    assert ours == "random20, knn"
    assert paper.startswith("paper")
    (x, y), (paper_x, paper_y) = found[ours], found[paper]
    assert list(x) == xs == list(paper_x)
    assert list(y) == pytest.approx(0.51 + 0.05 * np.arange(len(xs)))
    prefix = {"window": "patch", "channels": "channels"}[name]
    told = paper_scores(table=table, metric="accuracy").set_index("method")["value"]
    assert list(paper_y) == [told[f"{prefix}_{value}"] for value in xs]


@pytest.mark.parametrize(
    ("name", "xs"), [("corpus_size", [0.01, 0.1, 1.0]), ("genes_at_inference", [256, 512, 1024, 2048])]
)
def test_what_the_paper_never_varied_is_a_curve_of_ours_alone(name, xs, monkeypatch):
    ((label, (x, _)),) = drawn(name, monkeypatch).items()
    assert not label.startswith("paper")
    assert list(x) == xs
