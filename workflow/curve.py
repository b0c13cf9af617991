"""The loss of a pretraining run, beside that of predicting each gene's mean."""

import json
from pathlib import Path

import pandas as pd

from workflow.plotting import CONTROL, MODEL, headline, new_figure, save


def read_metrics(path: str | Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The `train` and the `val` lines of `metrics.jsonl`, by step; of a step logged twice (resumed) the last counts."""
    lines = [json.loads(line) for line in Path(path).read_text().splitlines() if line.strip()]
    return tuple(
        pd.DataFrame([line for line in lines if line["kind"] == kind], columns=["kind", "step", *columns])
        .drop_duplicates("step", keep="last")
        .sort_values("step")
        for kind, columns in (
            ("train", ["loss", "patches_per_s"]),
            ("val", ["masked_mse", "gene_mean_mse", "n_windows"]),
        )
    )


def verdict(val: pd.DataFrame) -> str:
    """What the last validation says."""
    if not len(val):
        return "no held-out windows: nothing to compare with"
    last = val.iloc[-1]
    model, baseline = last["masked_mse"], last["gene_mean_mse"]
    side = "below" if model < baseline else "not below"
    change = f" ({model / baseline - 1:+.1%})" if baseline > 0 else ""
    number = f"{last['n_windows']:,.0f} " if pd.notna(last.get("n_windows")) else ""
    return f"{number}held-out windows: masked MSE {model:.4f}, {side} the gene means' {baseline:.4f}{change}"


def draw(train: pd.DataFrame, val: pd.DataFrame):
    """Loss against step; of many logged steps a running mean is drawn over the points."""
    figure, axes = new_figure(figsize=(10, 5))
    dense = len(train) > 50
    axes.plot(train["step"], train["loss"], color=CONTROL, alpha=0.3 if dense else 1, linewidth=1, label="train")
    if dense:
        smooth = train["loss"].rolling(max(len(train) // 50, 2), min_periods=1).mean()
        axes.plot(train["step"], smooth, color=CONTROL, linewidth=2, label="train, running mean")
    axes.plot(val["step"], val["masked_mse"], "o-", color=MODEL, markersize=4, label="held-out windows")
    axes.plot(val["step"], val["gene_mean_mse"], "--", color="black", label="held-out, each gene's mean")
    axes.set(xlabel="step", ylabel="masked MSE of normalised expression")
    headline(figure, verdict(val))
    # Most of the masked variance is counting noise: an axis from zero would hide what was learned. The caption says so.
    axes.margins(y=0.15)
    axes.legend()
    return figure


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    simulated = json.loads(Path(snakemake.input.config).read_text())["data"]["simulated"]
    save(draw(*read_metrics(snakemake.input.metrics)), snakemake.output[0], simulated)
