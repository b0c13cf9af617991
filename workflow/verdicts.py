"""Does the pretrained model beat the strongest control: one row a protocol, metric and model, and the sentence it makes.

What the probes predict was compared already (`workflow.intervals`). Clusterings and reconstructions are compared here, by
Student's paired t: over sections those, over repeats (regions drawn anew) these; either side's best by its mean.
"""

from collections.abc import Iterator

import pandas as pd

from workflow.intervals import Interval, Sample, is_control, seedless, split_suffix, t_interval

VERDICTS = ["protocol", "metric", "method", "head", "value", "control", "control_head", "control_value"]
VERDICTS += ["difference", "low", "high", "p", "over", "n_units", "n_sections"]
TITLES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "ari": "ARI",
    "nmi": "NMI",
    "homogeneity": "homogeneity",
    "chaos": "CHAOS",
    "pas": "PAS",
    "mse": "MSE",
    "mae": "MAE",
    "pearson": "Pearson r",
    "r2": "R²",
}
LOWER_IS_BETTER = {"mse", "mae"}
REFERENCE = "labels"  # in the clustering table: the true domains themselves, nobody's clustering


def of_probes(comparisons: pd.DataFrame) -> pd.DataFrame:
    """The rows of a comparisons table in which either side's best meet."""
    return comparisons.loc[comparisons["compared"] == "best", VERDICTS]


def of_clusterings(scores: pd.DataFrame) -> pd.DataFrame:
    """Clusterings that know the labels best on average, paired by section; repeats and seeds are averaged first."""
    scores = scores[(scores["section"] != "pooled") & (scores["method"] != REFERENCE)]
    found = []
    for metric in ("ari", "nmi", "homogeneity"):
        values = _table(scores[scores["metric"] == metric], ["method", "head"], "section")
        found += _leads("clustering", metric, values, "sections", values.shape[1])
    return pd.DataFrame(found, columns=VERDICTS)


def of_reconstructions(scores: pd.DataFrame) -> pd.DataFrame:
    """Errors at hidden spots, paired by repeat, a row a size of window and region (the `head`)."""
    pooled, found = scores[scores["section"] == "pooled"], []
    for head, rows in pooled.groupby("head", sort=False):
        n_sections = scores.loc[(scores["head"] == head) & (scores["section"] != "pooled"), "section"].nunique()
        for metric in ("mse", "mae", "pearson", "r2"):
            values = _table(rows[rows["metric"] == metric], ["method", "head"], "split")
            found += _leads("reconstruction", metric, values, "repeats", n_sections)
    return pd.DataFrame(found, columns=VERDICTS)


def _table(scores: pd.DataFrame, row: list[str], column: str) -> pd.DataFrame:
    """Mean values, a row a (method, head), a column a unit that every method has."""
    scores = scores.assign(method=scores["method"].map(seedless))
    values = scores.groupby([*row, column], sort=False)["value"].mean().unstack(column)
    return values.dropna(axis="columns")


def _leads(protocol: str, metric: str, values: pd.DataFrame, over: str, n_sections: int) -> Iterator[tuple]:
    sign = -1 if metric in LOWER_IS_BETTER else 1
    mean = (sign * values).mean(axis=1)
    method = mean.index.get_level_values("method")
    control = method.map(is_control).to_numpy(dtype=bool)
    if not control.any() or not values.shape[1]:
        return
    its = mean[control].idxmax()
    family = pd.Series([split_suffix(name)[0] for name in method], index=mean.index)
    for model in family[~control].unique():
        best = mean[family == model].idxmax()
        lead = interval(values.loc[best] - values.loc[its])
        both = (*best, values.loc[best].mean(), *its, values.loc[its].mean())
        yield (protocol, metric, *both, *lead, over, values.shape[1], n_sections)


def interval(values: pd.Series) -> Interval:
    """Student's interval of a mean over sections or repeats."""
    return t_interval(Sample(float(values.mean()), values.to_numpy()), ratio=0)


def judged(row) -> str:
    """`beats`, `does not beat` or `undecided`: on which side of 0 the whole interval lies.

    Parameters
    ----------
    row
        `metric`, `low` and `high` as attributes.
    """
    low, high = (-row.high, -row.low) if row.metric in LOWER_IS_BETTER else (row.low, row.high)
    if low > 0:
        return "beats"
    return "does not beat" if high <= 0 else "undecided"


def size(head: str) -> str:
    """`window24_side8` -> `8 of 24`."""
    window, _, side = head.partition("_side")
    return f"{side} of {window.removeprefix('window')}"


def sides_of(row) -> tuple[str, str]:
    """Of a row of verdicts the model and the control, each with its head, where that is one, and its value."""
    both = (row.method, row.head, row.value), (row.control, row.control_head, row.control_value)
    no_head = {"none", row.head if row.protocol == "reconstruction" else "none"}
    return tuple(f"{name}{'' if head in no_head else f', {head}'}: {value:.3f}" for name, head, value in both)


def sentence(row) -> str:
    """What one row says in words.

    Parameters
    ----------
    row
        Of a table with the columns VERDICTS, as a named tuple.
    """
    what = TITLES[row.metric] + (f", {size(row.head)}" if row.protocol == "reconstruction" else "")
    figures = "{} against {}".format(*sides_of(row))
    if pd.isna(row.low):
        return f"{what}: undecided, {row.n_units} {row.over} tell no interval; {figures}, {row.difference:+.3f}."
    said = {
        "beats": "beats the strongest control",
        "does not beat": "does not beat the strongest control",
        "undecided": "undecided, the interval holds 0",
    }[judged(row)]
    lead = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}], p = {row.p:.2g}"
    return f"{what}: {said}; {figures}, {lead}."


def scope(row) -> str:
    """Of what the intervals of a row speak, and of what they don't."""
    sections = f"{row.n_sections} section{'s' if row.n_sections != 1 else ''}"
    return {
        "blocks": f"Intervals over {row.n_units} blocks of tissue drawn again within {sections}: what is said holds for "
        f"{'these sections' if row.n_sections != 1 else 'this section'} and claims nothing of other tissue.",
        "splits": f"Intervals over {row.n_units} random splits of the same spots (corrected resampled t, as the splits "
        "overlap): they cover which spots happened to train, not other tissue.",
        "donors": f"Intervals over {row.n_units} donors, each left out once.",
        "sections": f"Intervals over {sections} (paired t): few sections say little of others.",
        "repeats": f"Intervals over {row.n_units} repeats, regions drawn anew in {sections}: nothing is claimed of others.",
    }[row.over]
