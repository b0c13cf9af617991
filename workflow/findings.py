"""What the numbers of one dataset show and what they do not, in sentences that follow from the tables and from nothing else."""

from collections import Counter

import pandas as pd

from workflow import verdicts
from workflow.intervals import is_control, seedless, split_suffix

LEAKS = 0.05  # accuracy by which position alone must pass the largest class before a protocol is said to reward it
FEW_SPLITS, FEW_SECTIONS, FEW_DONORS = 5, 5, 5  # fewer are named among what limits the claims
STRICT = {  # what keeps the tested tissue away from the training spots, the strictest first
    "leave_donor": "on donors that no training spot comes from",
    "blocks_buffered": "on tissue that no window shares with a training spot",
    "blocks": "on blocks of tissue without training spots, borders aside",
    "leave_section": "on sections without training spots",
}
OWN = "stpatch"
BASELINES = {"kriging": "kriging", "mean_16": "the mean of the 16 nearest spots", "gene_mean": "the gene's mean"}


def findings(
    dataset: str,
    scores: pd.DataFrame,
    comparisons: pd.DataFrame,
    notes: pd.DataFrame,
    sections: pd.DataFrame,
    kept: list[str],
) -> list[str]:
    """Sentences for the top of the score page: leaks, the model against controls and its own start, then the limits.

    Parameters
    ----------
    scores, comparisons
        The dataset's tables, all stages one below the other (docs/format.md).
    notes
        `kind`, `protocol`, `section`, `method` of the stages' notes.
    sections
        Catalogue rows (`slice`, `donor`) of the dataset's admitted sections.
    kept
        Pretraining slices that match the dataset and are trained on all the same.
    """
    pooled = comparisons[(comparisons["section"] == "pooled") & (comparisons["metric"] == "accuracy")]
    of = {name: scores[scores["protocol"] == name] for name in ("clustering", "reconstruction")}
    scored = sections[sections["slice"].isin(set(scores["section"]))]
    return [
        *position(pooled[pooled["compared"] == "method"]),
        *against_controls(pooled),
        *training(pooled),
        *clusterings(of["clustering"]),
        *reconstructions(of["reconstruction"]),
        *limits(dataset, scores, comparisons, notes, scored, kept),
    ]


def position(rows: pd.DataFrame) -> list[str]:
    """How far coordinates come without a gene under each protocol, and so which of them reward knowing places."""
    places = rows[
        rows["method"].map(lambda method: split_suffix(method)[0]).isin(("coordinates", "coordinates_section"))
    ]
    found = places.groupby("protocol", sort=False)["value"].max()
    largest = rows[rows["method"] == "majority"].groupby("protocol", sort=False)["value"].max()
    found = found[found.index.isin(largest.index)]
    said = []
    random = "random20"
    if random in found.index:
        figures = (
            f"position alone, without a gene, is right on {found[random]:.3f} of the tested spots, the largest class on"
        )
        if found[random] - largest[random] >= LEAKS:
            said.append(
                f"random20 leaks: {figures} {largest[random]:.3f}. A high score under it says little of a model."
            )
        else:
            said.append(
                f"random20 shows no leak by position here: {figures} {largest[random]:.3f}. Its tested spots still "
                "have training spots for neighbours."
            )
    others = [name for name in STRICT if name in found.index]
    if others:
        line = "Position alone elsewhere: " + ", ".join(
            f"{found[name]:.3f} under {name} ({found[name] - found[random]:+.3f} from random20)"
            if random in found.index
            else f"{found[name]:.3f} under {name}"
            for name in others
        )
        rewarded = [name for name in others if found[name] - largest[name] >= LEAKS]
        end = (
            f"position still helps under {', '.join(rewarded)}, so the coordinates are a control to beat there"
            if rewarded
            else "none of these rewards knowing places"
        )
        said.append(f"{line}; {end}.")
    return said


def against_controls(pooled: pd.DataFrame) -> list[str]:
    """The verdict on accuracy wherever tested tissue is kept from training, and whether a lead under random20 holds there."""
    found = verdicts.of_probes(pooled)
    if not len(found):
        return ["No pretrained model was scored by probes: nothing is said of one."]
    strict = [name for name in STRICT if name in set(found["protocol"])]
    # Both strictest speak; the laxer ones only where there is nothing better.
    shown = [name for name in strict if name in ("leave_donor", "blocks_buffered")] or strict[:1]
    said = []
    for name in shown:
        said += [
            _verdict(row, STRICT[name], "is right more often than", "is right less often than")
            for row in found[found["protocol"] == name].itertuples()
        ]
    if not shown:
        return [
            "Only random20 was measured, where neighbours of training spots are tested: no claim about what a model "
            "learnt can rest on it."
        ]
    for row in found[found["protocol"] == "random20"].itertuples():
        others = found[found["protocol"].isin(shown) & (found["method"].map(_model) == _model(row.method))]
        lost = [other.protocol for other in others.itertuples() if verdicts.judged(other) != "beats"]
        if verdicts.judged(row) == "beats" and lost:
            said.append(
                f"The lead of {_model(row.method)} under random20 ({row.difference:+.3f}) does not hold under "
                f"{' and '.join(lost)}: it is not shown to be more than the leak."
            )
    return said


def training(pooled: pd.DataFrame) -> list[str]:
    """Whether the trained encoder passes the same encoder before its first step, under the strictest protocol measured.

    The paired difference decides, either side at its best.
    """
    rows = pooled[(pooled["compared"] == "against") & (pooled["method"].map(_model) == OWN)]
    rows = rows[rows["control"].map(_model) == "untrained"].set_index("protocol")
    for protocol in (*STRICT, "random20"):
        if protocol not in rows.index:
            continue
        row = rows.loc[protocol]
        figures = f"{row['value']:.3f} trained, {row['control_value']:.3f} untrained, each at its best under {protocol}"
        if pd.isna(row["low"]):
            return [
                f"Whether pretraining taught the encoder anything is undecided: {figures}; no interval can be told."
            ]
        paired = f"{figures}; the paired difference is {row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        if row["low"] > 0:
            return [f"Pretraining taught the encoder something: {paired}."]
        if row["high"] < 0:
            return [f"Pretraining made the encoder worse: {paired}."]
        return [f"Whether pretraining taught the encoder anything is undecided: {paired}."]
    return []


def clusterings(scores: pd.DataFrame) -> list[str]:
    """Agreement of domains found without labels with the true ones, against the strongest control's."""
    found = verdicts.of_clusterings(scores)
    better, worse = (f"finds domains that agree {word} with the labels than those of" for word in ("better", "worse"))
    return [
        _verdict(row, "in clustering without labels (ARI)", better, worse)
        for row in found[found["metric"] == "ari"].itertuples()
    ]


def reconstructions(scores: pd.DataFrame) -> list[str]:
    """Squared errors at hidden spots against three plain fillings, over all sizes of window and hidden square."""
    rows = scores[(scores["section"] == "pooled") & (scores["metric"] == "mse")]
    rows = rows.assign(method=rows["method"].map(seedless))
    values = rows.groupby(["method", "head", "split"], sort=False)["value"].mean().unstack("split")
    said = []
    for model in [name for name in values.index.unique("method") if not is_control(name)]:
        parts = []
        for baseline, name in BASELINES.items():
            if baseline in values.index.unique("method"):
                parts.append(_errs(values.loc[model], values.loc[baseline], name))
        if parts:
            said.append(f"Filling in hidden squares, {model} {'; '.join(parts)} (mean squared error over repeats).")
    return said


def _errs(mine: pd.DataFrame, its: pd.DataFrame, name: str) -> str:
    heads = [head for head in mine.index if head in its.index]
    words = Counter()
    for head in heads:
        lead = verdicts.interval((mine.loc[head] - its.loc[head]).dropna())
        words["less" if lead.high < 0 else "more" if lead.low > 0 else "undecided"] += 1
    figures = f"{mine.loc[heads].mean(axis=None):.3f} against {its.loc[heads].mean(axis=None):.3f}"
    sizes = "at every size" if len(heads) > 1 else "at the one size"
    for word in ("less", "more"):
        if words[word] == len(heads):
            return f"errs {word} than {name} {sizes}, {figures}"
    if words["undecided"] == len(heads):
        return f"can't be told from {name} {sizes}, {figures}"
    tally = ", ".join(f"{word} at {words[word]}" for word in ("less", "more", "undecided") if words[word])
    return f"against {name}: errs {tally} of {len(heads)} sizes, {figures}"


def limits(
    dataset: str,
    scores: pd.DataFrame,
    comparisons: pd.DataFrame,
    notes: pd.DataFrame,
    scored: pd.DataFrame,
    kept: list[str],
) -> list[str]:
    """What can't be concluded: simulated or contaminated data, few sections, donors or splits, protocols that could not run."""
    said = []
    simulated = notes[notes["kind"] == "simulated"]
    if (simulated["section"] != "").any():
        said.append("The sections are simulated: nothing here says anything of tissue.")
    elif len(simulated):
        said.append("A model was pretrained on simulated slices: its scores say nothing of one pretrained on tissue.")
    if kept:
        said.append(
            f"The model was pretrained on {counted(len(kept), 'slice')} that match {dataset}: its scores are not those of "
            "unseen tissue."
        )
    n_sections, donors = len(scored), set(scored["donor"]) - {""}
    unknown = int((scored["donor"] == "").sum())
    if n_sections == 1:
        said.append("All of it is about one section: nothing is said of another.")
    elif 1 < n_sections < FEW_SECTIONS:
        said.append(f"All of it is about {n_sections} sections, too few to speak of others.")
    if n_sections > 1 and len(donors) == 1 and not unknown:
        said.append(f"All {n_sections} sections are of one donor: nothing is said of other people.")
    elif 1 < len(donors) < FEW_DONORS:
        said.append(f"The sections are of {len(donors)} donors: how much people differ can't be judged by so few.")
    if unknown:
        said.append(f"The donor of {unknown} of {counted(n_sections, 'section')} is not known: sections may share one.")
    skipped = set(notes.loc[notes["kind"] == "protocol_skipped", "protocol"])
    if "leave_donor" in skipped:
        said.append("Leaving a donor out was not possible, so generalisation to other donors was not measured.")
    splits = scores[scores["protocol"].isin(("random20", "blocks"))].groupby("protocol", sort=False)["split"].nunique()
    few = {name: int(n) for name, n in splits.items() if n < FEW_SPLITS}
    if few:
        said.append(
            f"Few random splits ({', '.join(f'{name}: {n}' for name, n in few.items())}): their spread is poorly known."
        )
    pooled = comparisons[(comparisons["section"] == "pooled") & comparisons["over"].eq("blocks")]
    if len(pooled) and n_sections:
        said.append(
            "Intervals over blocks of tissue hold for these sections: that a lead is clear here does not make it so elsewhere."
        )
    return said


def _verdict(row, where: str, better: str, worse: str) -> str:
    """A row of verdicts in plain words, with figures, interval and what it is about."""
    mine, its = verdicts.sides_of(row)
    about = f"{counted(row.n_units, row.over.removesuffix('s'))}"
    about += "" if row.over == "sections" else f" of {counted(row.n_sections, 'section')}"
    figures = f"{mine} against {its}, {row.difference:+.3f}"
    figures += f" [{row.low:+.3f}, {row.high:+.3f}]" if pd.notna(row.low) else ", no interval can be told"
    model, start = _model(row.method), where[0].upper() + where[1:]
    if verdicts.judged(row) == "beats":
        return f"{start}, {model} {better} the strongest control: {figures}; over {about}."
    if row.high < 0:
        return f"{start}, {model} {worse} the strongest control: {figures}; over {about}."
    return f"{start}, it is undecided whether {model} {better} the strongest control: {figures}; over {about}."


def _model(method: str) -> str:
    return split_suffix(method)[0]


def counted(n: int, what: str) -> str:
    """`1 slice`, `2 slices`."""
    return f"{n} {what}{'' if n == 1 else 's'}"
