"""How sure a score is: intervals of every method, and paired tests against the strongest control.

Everything follows from confusion counts, kept for each split and each block of tissue: a metric is a function of their
sum, so two thousand resamples of the blocks are one matrix product.

- Random splits of the same spots (`random20`) overlap, so their spread understates the error of their mean. The
  corrected resampled t (Nadeau and Bengio 2003, Machine Learning 52:239) puts 1/J + n_test/n_train in place of 1/J.
- Elsewhere blocks of tissue are drawn with replacement within each section, the same ones for all methods. Of h blocks
  h - 1 are drawn and weigh h / (h - 1): the variance is then not too small where a section has few (Rao and Wu 1988,
  JASA 83:231). Random splits (`blocks`, `blocks_buffered`) are drawn again as well. Such an interval speaks of these
  sections alone.
- Of at least ten left-out donors (or sections, where donors are unknown) a t over their means speaks of more of the kind.

Seeds of pretraining (methods `stpatch_seed1`, ...) are one method, `stpatch`; they are drawn again too.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from workflow.protocols import generator

METRICS = ["accuracy", "macro_f1", "ari", "nmi"]
COMPARISONS = ["dataset", "protocol", "section", "metric", "method", "head", "compared"]
COMPARISONS += ["value", "value_low", "value_high", "control", "control_head", "control_value"]
COMPARISONS += ["difference", "low", "high", "p", "over", "n_units", "n_sections", "n_seeds"]

LEVEL = 0.95
N_RESAMPLES = 2000
N_RESAMPLES_SECTION = 500  # for the intervals of single sections
LEAST_BLOCKS = 5  # of fewer no interval is told
MANY = 10  # left-out donors or sections from which on they are the units
N_FOLDS = 5  # of blocks, in the choice of either side's best
DRAWN_AGAIN = {"blocks", "blocks_buffered"}  # protocols whose splits are a sample of many possible ones

Key = tuple[str, str]  # method, head
Runs = dict[Key, list[tuple[int, np.ndarray, np.ndarray]]]


def is_control(method: str) -> bool:
    """Everything but a pretrained stpatch; the untrained encoder is a control."""
    return not method.startswith("stpatch")


def split_suffix(method: str) -> tuple[str, str]:
    """`pca+averaged+centred` -> (`pca`, `+averaged+centred`)."""
    base, plus, suffix = method.partition("+")
    return base, plus + suffix


def seedless(method: str) -> str:
    """The method without the number of its seed: `stpatch_spot_seed2+centred` -> `stpatch_spot+centred`."""
    base, suffix = split_suffix(method)
    return re.sub(r"_seed[0-9]+$", "", base) + suffix


def metrics_of(confusion: np.ndarray) -> dict[str, np.ndarray]:
    """Accuracy, macro F1, adjusted Rand index and normalised mutual information of confusion counts.

    Parameters
    ----------
    confusion
        [..., K, K], true class by predicted class; weighted counts need not be whole.

    Returns
    -------
    dict
        Metric -> float64 [...], as scikit-learn defines it (macro F1 over the classes true or predicted; mutual
        information over the mean of both entropies); NaN where there are no counts.
    """
    counts = np.asarray(confusion, dtype=np.float64)
    true, predicted = counts.sum(axis=-1), counts.sum(axis=-2)
    n = true.sum(axis=-1)
    hits = np.diagonal(counts, axis1=-2, axis2=-1)
    both = true + predicted
    with np.errstate(invalid="ignore", divide="ignore"):
        f1 = np.divide(2 * hits, both, out=np.zeros_like(both), where=both > 0)
        same = np.einsum("...ij,...ij->...", counts, counts)  # ordered pairs alike in both, a spot with itself included
        only_true = np.einsum("...i,...i->...", true, true) - same
        only_predicted = np.einsum("...i,...i->...", predicted, predicted) - same
        neither, alike = n * n - only_true - only_predicted - same, same - n
        numerator = 2 * (alike * neither - only_true * only_predicted)
        denominator = (alike + only_true) * (only_true + neither) + (alike + only_predicted) * (
            only_predicted + neither
        )
        equal = only_true + only_predicted <= 1e-9 * n * n
        ari = np.where(equal, 1.0, numerator / np.where(equal, 1.0, denominator))
        entropy = [np.log(n) - _plogp(part) / n for part in (true, predicted)]
        information = entropy[0] + entropy[1] - (np.log(n) - _plogp(counts.reshape(*counts.shape[:-2], -1)) / n)
        one_class = (np.count_nonzero(true, axis=-1) <= 1) & (np.count_nonzero(predicted, axis=-1) <= 1)
        shared = information > 1e-12
        mean_entropy = np.where(shared & ~one_class, (entropy[0] + entropy[1]) / 2, 1.0)
        nmi = np.where(one_class, 1.0, np.where(shared, information / mean_entropy, 0.0))
        found = {
            "accuracy": hits.sum(axis=-1) / n,
            "macro_f1": f1.sum(axis=-1) / np.count_nonzero(both, axis=-1),
            "ari": ari,
            "nmi": nmi,
        }
    return {name: np.where(n > 0, values, np.nan) for name, values in found.items()}


def _plogp(counts: np.ndarray) -> np.ndarray:
    return (counts * np.log(np.where(counts > 0, counts, 1.0))).sum(axis=-1)


class Interval(NamedTuple):
    mean: float
    low: float
    high: float
    p: float  # two-sided, of a mean of 0


class Sample(NamedTuple):
    """What an interval of one method and metric is made of; samples on the same resamples subtract."""

    mean: float
    values: np.ndarray  # [R] resamples, or [J] splits or donors
    seed_variance: float = 0.0  # of the mean; resamples hold it already
    seed_df: int = 0

    def minus(self, other: "Sample") -> "Sample":
        if other is self:
            return Sample(0.0, np.zeros_like(self.values))
        df = [sample.seed_df for sample in (self, other) if sample.seed_variance > 0]
        variance = self.seed_variance + other.seed_variance
        return Sample(self.mean - other.mean, self.values - other.values, variance, min(df, default=0))


def t_interval(sample: Sample, ratio: float) -> Interval:
    """Student's interval of a mean over J splits or donors; degrees of freedom after Welch and Satterthwaite.

    Parameters
    ----------
    ratio
        n_test / n_train of random splits, which overlap (Nadeau and Bengio); 0 for units that don't.
    """
    mean, n = sample.mean, len(sample.values)
    if n < 2:
        return Interval(mean, np.nan, np.nan, np.nan)
    of_units = (1 / n + ratio) * float(sample.values.var(ddof=1))
    error = np.sqrt(of_units + sample.seed_variance)
    if error < 1e-12:  # every split says the same
        return Interval(mean, mean, mean, 1.0 if abs(mean) < 1e-12 else 0.0)
    df = error**4 / (of_units**2 / (n - 1) + (sample.seed_variance**2 / sample.seed_df if sample.seed_df else 0.0))
    half = stats.t.ppf((1 + LEVEL) / 2, df) * error
    return Interval(mean, mean - half, mean + half, float(2 * stats.t.sf(abs(mean) / error, df)))


def bootstrap_interval(sample: Sample, df: int) -> Interval:
    """Percentiles of the resamples, taken further out by as much as Student's exceed the normal ones.

    Plain percentiles are too narrow for few units (Hesterberg 2015, American Statistician 69:371). p is the two-sided
    level at which the interval would just reach 0.

    Parameters
    ----------
    df
        Degrees of freedom: blocks less sections.
    """
    values = sample.values[np.isfinite(sample.values)]
    if not len(values) or df < 1:
        return Interval(sample.mean, np.nan, np.nan, np.nan)
    tail = stats.norm.cdf(stats.t.ppf((1 - LEVEL) / 2, df))
    low, high = np.quantile(values, [tail, 1 - tail])
    beyond = min((values <= 0).sum(), (values >= 0).sum(), len(values) // 2)
    p = 2 * stats.t.cdf(stats.norm.ppf((beyond + 1) / (len(values) + 2)), df)
    return Interval(sample.mean, float(low), float(high), float(min(p, 1.0)))


def block_weights(section: np.ndarray, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each block counts in each resample, float64 [n_resamples, n_blocks].

    Parameters
    ----------
    section
        int [n_blocks], section of each block: blocks are drawn within it. A section's only block counts once always.
    """
    weights = np.ones((n_resamples, len(section)))
    for name in np.unique(section):
        of = np.flatnonzero(section == name)
        if len(of) > 1:
            drawn = rng.multinomial(len(of) - 1, np.full(len(of), 1 / len(of)), size=n_resamples)
            weights[:, of] = drawn * (len(of) / (len(of) - 1))
    return weights


class _Splits:
    """Samples over splits, or over groups of splits (donors, sections)."""

    def __init__(self, over: str, blocks: np.ndarray, group: np.ndarray, ratio: float = 0.0):
        self.over, self.blocks, self.ratio = over, blocks, ratio
        self.groups = [np.flatnonzero(group == unit) for unit in np.unique(group)]
        self.n_units = len(self.groups)

    def samples(self, seeds: list[np.ndarray]) -> dict[str, Sample]:
        """One sample a metric, of one method's counts, int [splits, blocks, K, K] a seed."""
        found = [metrics_of(counts[:, self.blocks].sum(axis=1)) for counts in seeds]
        samples = {}
        for metric in METRICS:
            of_seed = np.array([[_mean(of[metric][splits]) for splits in self.groups] for of in found])
            means = np.array([_mean(of[metric]) for of in found])
            n = len(means)
            variance = float(means.var(ddof=1)) / n if n > 1 else 0.0
            samples[metric] = Sample(float(means.mean()), of_seed.mean(axis=0), variance, n - 1)
        return samples

    def interval(self, sample: Sample) -> Interval:
        return t_interval(sample, self.ratio)


class _Blocks:
    """Samples over blocks drawn again within their sections; splits and seeds too, where there is a draw of them."""

    over = "blocks"

    def __init__(
        self,
        blocks: np.ndarray,
        n_sections: int,
        weights: np.ndarray,
        splits: np.ndarray | None,
        seeds: dict[int, np.ndarray],
    ):
        self.blocks, self.n_units, self.n_sections = blocks, len(blocks), n_sections
        self.weights, self.splits, self.seeds = weights[:, blocks], splits, seeds

    def samples(self, seeds: list[np.ndarray]) -> dict[str, Sample]:
        """One sample a metric, of one method's counts, int [splits, blocks, K, K] a seed."""
        counts = [of_seed[:, self.blocks] for of_seed in seeds]
        plain = [metrics_of(of_seed.sum(axis=1)) for of_seed in counts]
        drawn = [self._resample(of_seed) for of_seed in counts]
        n = len(self.weights)
        splits = None if self.splits is None else self.splits[:n]
        samples = {}
        for metric in METRICS:
            values = np.stack([_mean(of[metric], splits) for of in drawn], axis=1)  # [R, seeds]
            values = _mean(values, self.seeds[len(seeds)][:n]) if len(seeds) > 1 else values[:, 0]
            samples[metric] = Sample(float(np.mean([_mean(of[metric]) for of in plain])), values)
        return samples

    def _resample(self, counts: np.ndarray) -> dict[str, np.ndarray]:
        """Metrics of each resample and split, [R, splits]."""
        found = {metric: np.full((len(self.weights), len(counts)), np.nan) for metric in METRICS}
        for split, of_block in enumerate(counts):
            tested = np.flatnonzero(of_block.any(axis=(1, 2)))
            drawn = self.weights[:, tested] @ of_block[tested].reshape(len(tested), of_block[0].size).astype(float)
            for metric, values in metrics_of(drawn.reshape(-1, *of_block.shape[1:])).items():
                found[metric][:, split] = values
        return found

    def interval(self, sample: Sample) -> Interval:
        if self.n_units < LEAST_BLOCKS:
            return Interval(sample.mean, np.nan, np.nan, np.nan)
        return bootstrap_interval(sample, self.n_units - self.n_sections)


def _mean(values: np.ndarray, weights: np.ndarray | None = None) -> np.ndarray:
    """Mean over the last axis of what is finite there."""
    finite = np.isfinite(values)
    weights = finite if weights is None else finite * weights
    total = weights.sum(axis=-1)
    with np.errstate(invalid="ignore"):
        return (np.where(finite, values, 0.0) * weights).sum(axis=-1) / total


def _count(run: list[tuple[int, np.ndarray, np.ndarray]], y: np.ndarray, unit: np.ndarray, shape: tuple) -> np.ndarray:
    """Confusion counts of one method's run, int32 [splits, blocks, K, K]."""
    found = np.empty((len(run), *shape), dtype=np.int32)
    for row, (_, test, predicted) in zip(found, run, strict=True):
        place = np.ravel_multi_index((unit[test], y[test], predicted), shape)
        row[:] = np.bincount(place, minlength=row.size).reshape(shape)
    return found


def _crossed(methods: dict[Key, list[np.ndarray]]) -> dict[str, list[np.ndarray]]:
    """Counts of the best of several methods, chosen for each fold of the blocks by how it does on all other blocks.

    What is chosen on the tests that it is judged by looks better than it is, the more so the more there is to choose
    from; here nothing is.

    Returns
    -------
    dict
        Metric -> counts as of one method, a list over seeds.
    """
    n_blocks, n_seeds = next(iter(methods.values()))[0].shape[1], max(map(len, methods.values()))
    fold = np.arange(n_blocks) % N_FOLDS  # neighbours in number are neighbours in tissue: every fold has all sections
    best = defaultdict(list)
    for number in range(min(N_FOLDS, n_blocks)):
        others = fold != number if n_blocks > 1 else fold == number
        value = {key: [metrics_of(of[:, others].sum(axis=1)) for of in seeds] for key, seeds in methods.items()}
        for metric in METRICS:
            mean = {key: np.mean([_mean(of[metric]) for of in seeds]) for key, seeds in value.items()}
            best[metric].append(max(mean, key=lambda key: np.nan_to_num(mean[key], nan=-np.inf)))
    composed = {}
    for metric, keys in best.items():
        chosen = [methods[keys[number]] for number in fold]
        composed[metric] = [
            np.stack([seeds[seed % len(seeds)][:, block] for block, seeds in enumerate(chosen)], axis=1)
            for seed in range(n_seeds)
        ]
    return composed


def compare(
    dataset: str,
    protocol: str,
    runs: Runs,
    y: np.ndarray,
    of_section: np.ndarray,
    block: np.ndarray,
    *,
    sections: list[str],
    donor: np.ndarray | None = None,
    draw: np.ndarray | None = None,
    against: Sequence[str] = (),
    seed: int = 0,
    n_resamples: int = N_RESAMPLES,
) -> pd.DataFrame:
    """Every method's interval and its test against the strongest control, for each metric, pooled and by section.

    The strongest control is the control and head with the highest mean over the protocol's splits. Rows with
    `compared` `best` set either side's best against the other's, a row for each pretrained model: head and
    post-processing are chosen by the same rule on both sides, on blocks other than those judged (`_crossed`); `method`,
    `head` and `control`, `control_head` are then what the whole would choose. Rows with `compared` `against` do the same
    with one control and its post-processings in place of all controls.

    Parameters
    ----------
    runs
        (method, head) -> (split, test int [k], predicted class int [k]) of each split; the same splits for all.
    y, of_section
        int [n], class and index into `sections` of each spot.
    block
        int [n], block of tissue of each spot, of one section each, numbered section after section.
    donor
        int [n], -1 where it is unknown.
    draw
        int [splits], the random draw, counted from 0, that each split is of, where one draw makes several splits: draws
        are then drawn again.
    against
        Controls, without post-processing and number of a seed, that get rows `against`.

    Returns
    -------
    DataFrame
        COMPARISONS. `over` says what the interval is over: `splits`, `blocks`, `donors` or `sections`, of which there
        are `n_units`; NaN stands for an interval that could not be told (one split, fewer than five blocks).
    """
    if not runs:
        return pd.DataFrame(columns=COMPARISONS)
    numbers, first, unit = np.unique(block, return_index=True, return_inverse=True)
    n_classes = 1 + max(int(y.max()), *(int(predicted.max()) for run in runs.values() for _, _, predicted in run))
    methods: dict[Key, list[np.ndarray]] = defaultdict(list)
    for method, head in sorted(runs):  # seeds of a method in one order
        counts = _count(runs[method, head], y, unit.ravel(), (len(numbers), n_classes, n_classes))
        methods[seedless(method), head].append(counts)
    tests = [test for _, test, _ in next(iter(runs.values()))]
    tested = np.unique(unit.ravel()[np.concatenate(tests)])
    section = of_section[first]  # of each block
    controls = [key for key in methods if is_control(key[0])]
    if unknown := set(against) - {split_suffix(method)[0] for method, _ in controls}:
        raise ValueError(f"{', '.join(sorted(unknown))}: no control of {dataset}, {protocol}")

    rng = generator(seed, dataset, f"intervals/{protocol}", 0)
    weights = np.ones((n_resamples, len(numbers)))
    weights[:, tested] = block_weights(section[tested], n_resamples, rng)
    of_draw = np.arange(len(tests)) if draw is None else draw
    n_draws = int(of_draw.max()) + 1
    drawn = {n: _drawn(n, n_resamples, rng) for n in sorted({n_draws, *map(len, methods.values())})}
    again = drawn[n_draws][:, of_draw] if draw is not None or protocol in DRAWN_AGAIN else None

    def sampler(blocks: np.ndarray, n: int) -> _Splits | _Blocks:
        if protocol == "random20":
            return _Splits("splits", blocks, np.arange(len(tests)), len(tests[0]) / (len(y) - len(tests[0])))
        return _Blocks(blocks, len(np.unique(section[blocks])), weights[:n], again, drawn)

    scopes = {"pooled": sampler(tested, n_resamples)}
    over, group = _left_out(tests, of_section, donor)
    if protocol.startswith("leave_") and len(np.unique(group)) >= MANY:
        scopes["pooled"] = _Splits(over, tested, group)
    for index in np.unique(section[tested]):
        scopes[sections[index]] = sampler(tested[section[tested] == index], N_RESAMPLES_SECTION)

    rows, strongest = [], {}
    for scope, over_units in scopes.items():
        n_sections = len(scopes) - 1 if scope == "pooled" else 1
        samples = {key: over_units.samples(seeds) for key, seeds in methods.items()}
        strongest = strongest or {metric: _highest(samples, metric, controls) for metric in METRICS}
        compared = [
            (key, "method", metric, samples[key][metric], strongest[metric], samples[strongest[metric]][metric])
            for metric in METRICS
            for key in methods
        ]
        if scope == "pooled":
            compared += _best(methods, samples, over_units, against)
        for key, kind, metric, mine, control, its in compared:
            own, lead = over_units.interval(mine), over_units.interval(mine.minus(its))
            ends = np.clip([own.low, own.high], -0.5 if metric == "ari" else 0, 1)  # Student's may go beyond
            row = (dataset, protocol, scope, metric, *key, kind, own.mean, *ends, *control, its.mean, *lead)
            rows.append((*row, over_units.over, over_units.n_units, n_sections, len(methods[key])))
    return pd.DataFrame(rows, columns=COMPARISONS)


def _best(
    methods: dict[Key, list[np.ndarray]], samples: dict[Key, dict[str, Sample]], over_units, against: Sequence[str]
) -> list[tuple]:
    """The best of every pretrained model beside the best of the controls, and of each control of `against`.

    Returns
    -------
    Key of the model, `best` or `against`, metric, its sample, key of the control, its sample.
    """
    models, rivals = defaultdict(dict), {"": {}, **{name: {} for name in against}}
    for key, seeds in methods.items():
        base = split_suffix(key[0])[0]
        sides = [rivals[name] for name in ("", base) if name in rivals] if is_control(base) else [models[base]]
        for side in sides:
            side[key] = seeds

    def best(variants: dict[Key, list[np.ndarray]]) -> dict[str, tuple[Key, Sample]]:
        return {
            metric: (_highest(samples, metric, variants), over_units.samples(seeds)[metric])
            for metric, seeds in _crossed(variants).items()
        }

    its = {name: best(variants) for name, variants in rivals.items()}
    return [
        (mine[metric][0], "against" if name else "best", metric, mine[metric][1], *rival[metric])
        for mine in map(best, models.values())
        for name, rival in its.items()
        for metric in METRICS
    ]


def _highest(samples: dict[Key, dict[str, Sample]], metric: str, among) -> Key:
    """The key of the highest mean, the first of equals."""
    return max(among, key=lambda key: np.nan_to_num(samples[key][metric].mean, nan=-np.inf))


def _drawn(n: int, n_resamples: int, rng: np.random.Generator) -> np.ndarray:
    """How often each of n splits or seeds counts in each resample, int [n_resamples, n]."""
    return rng.multinomial(n, np.full(n, 1 / n), size=n_resamples)


def _left_out(tests: list[np.ndarray], of_section: np.ndarray, donor: np.ndarray | None) -> tuple[str, np.ndarray]:
    """What each split leaves out: a donor where every tested spot's is known, else a section; int [splits]."""
    first = np.array([test[0] for test in tests])
    if donor is not None and (donor[np.concatenate(tests)] >= 0).all():
        return "donors", donor[first]
    return "sections", of_section[first]
