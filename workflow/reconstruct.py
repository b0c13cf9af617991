"""Masked region reconstruction: expression at hidden spots, as models and interpolation tell it from the spots around them.

Every method but `gene_mean` sees the visible spots of the window alone, and the same ones. Distances are on the capture
lattice, in pitches, never on the compacted grid; without a lattice they are those of the bins.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.linalg import eigh
from scipy.spatial.distance import cdist
from sklearn.gaussian_process.kernels import Matern
from threadpoolctl import threadpool_limits

from workflow.assemble import COLUMNS, Notes, by_model
from workflow.errors import DamagedFile
from workflow.expression import log_normalise
from workflow.grid import Grid, read_grid
from workflow.lattice import plane
from workflow.reading import read_safetensors, reading
from workflow.regions import Regions, read_regions

PROTOCOL = "reconstruction"
N_NEAREST = 16
N_COMPONENTS = 20  # of `kriging_pca`
LENGTHS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # of the kernel, in pitches
NUGGETS = np.geomspace(0.01, 10000, 19)  # variance of a spot's own noise over that of the field
N_FOR_LENGTH = 160  # spots that the length is chosen on
LEAST_SPREAD = 1e-6  # standard deviation below which values count as constant: float32 rounds at about this size
FEWEST_SPOTS = 3  # that a correlation is taken over

Sums = np.ndarray  # float64 [5]: squared errors, absolute errors, entries, correlations, genes correlated


def nearest(hidden: np.ndarray, visible: np.ndarray, n: int = N_NEAREST) -> tuple[np.ndarray, np.ndarray]:
    """The `n` visible spots nearest to each hidden one (all, where there are fewer), and how far they are.

    Parameters
    ----------
    hidden, visible
        float [h, 2] and [v, 2], positions in pitches.

    Returns
    -------
    index, distance
        int and float64 [h, n]; of spots equally far, those that come first.
    """
    squared = cdist(hidden, visible, "sqeuclidean").round(6)
    index = np.argsort(squared, axis=1, kind="stable")[:, :n]
    return index, np.sqrt(np.take_along_axis(squared, index, axis=1))


def inverse_distance(values: np.ndarray, index: np.ndarray, distance: np.ndarray, power: float = 2.0) -> np.ndarray:
    """Mean of the nearest visible spots, weighted by distance to the minus `power`; float64 [h, m].

    Parameters
    ----------
    values
        float [v, m], of the visible spots.
    index, distance
        As `nearest` gives them; no two spots lie in one place.
    """
    weight = distance**-power
    return np.einsum("hn,hnm->hm", weight / weight.sum(axis=1, keepdims=True), values[index])


class Field:
    """A Gaussian process over the visible spots, whose kernel matrix is factorised once for all genes.

    Matern kernel with nu = 3/2: a gene's value is mean + field + noise, variance of the field times (kernel + nugget).
    With K = Q diag(l) Q', the likelihood of any nugget is a sum, so each gene gets its own (Kitanidis 1983; as in FaST-LMM,
    Lippert et al. 2011). The mean is that of generalised least squares: ordinary kriging.

    Parameters
    ----------
    places
        float [v, 2], positions in pitches.
    length
        Of the kernel, in pitches.
    """

    def __init__(self, places: np.ndarray, length: float) -> None:
        self.places, self.kernel = places, Matern(length_scale=length, nu=1.5)
        eigenvalues, self.vectors = eigh(self.kernel(places))
        self.spread = eigenvalues.clip(min=0) + NUGGETS[:, None]  # [nuggets, v]
        self.ones = self.vectors.sum(axis=0)  # Q' 1

    def fit(self, values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Greatest log-likelihood of each column up to a constant, the place in `NUGGETS` where it is, and the mean there.

        The variance of the field is profiled out. A constant column has likelihood 0, the largest nugget and its value as mean.

        Parameters
        ----------
        values
            float [v, m].
        """
        shift = values.mean(axis=0)  # squares of centred values lose no digits
        turned = self.vectors.T @ (values - shift)  # [v, m]
        weight = 1 / self.spread  # [nuggets, v]
        in_mean = (weight * self.ones**2).sum(axis=1)[:, None]
        means = ((weight * self.ones) @ turned) / in_mean  # [nuggets, m]
        squares = weight @ turned**2 - in_mean * means**2  # of the residuals, weighted
        likelihood = -(len(values) * np.log(squares.clip(min=1e-300)) + np.log(self.spread).sum(axis=1)[:, None]) / 2
        likelihood[:, np.ptp(values, axis=0) <= LEAST_SPREAD] = 0.0
        best = len(NUGGETS) - 1 - likelihood[::-1].argmax(axis=0)  # ties go to the larger
        return likelihood.max(axis=0), best, shift + np.take_along_axis(means, best[None], axis=0)[0]

    def predict(self, values: np.ndarray, hidden: np.ndarray) -> np.ndarray:
        """Expected value at the hidden places, float64 [h, m], each column with its most likely nugget."""
        _, best, mean = self.fit(values)
        residual = self.vectors.T @ values - self.ones[:, None] * mean
        return mean + (self.kernel(hidden, self.places) @ self.vectors) @ (residual / self.spread[best].T)


def likeliest_length(places: np.ndarray, values: np.ndarray) -> float:
    """The one of `LENGTHS` with the greatest likelihood over all genes together, each with its own best nugget.

    Judged on `N_FOR_LENGTH` of the spots, evenly spread over their order; ties go to the shorter.
    """
    some = np.unique(np.linspace(0, len(places) - 1, N_FOR_LENGTH).round().astype(int))
    likelihood = [Field(places[some], length).fit(values[some])[0].sum() for length in LENGTHS]
    return LENGTHS[int(np.argmax(likelihood))]


def components(values: np.ndarray, n: int = N_COMPONENTS) -> tuple[np.ndarray, np.ndarray]:
    """Scores [v, k] and axes [k, m] of the first principal components of centred values; k is at most v - 1."""
    k = min(n, len(values) - 1, values.shape[1])
    if not k:
        return np.empty((len(values), 0)), np.empty((0, values.shape[1]))
    covariance = values.T @ values
    axes = eigh(covariance, subset_by_index=[len(covariance) - k, len(covariance) - 1])[1].T
    return values @ axes.T, axes


def baselines(hidden: np.ndarray, visible: np.ndarray, values: np.ndarray) -> dict[str, np.ndarray]:
    """What interpolation makes of the visible spots of one window: method -> float64 [h, m].

    `window_mean`; `mean_16`: of the 16 nearest; `inverse_distance`: of the same, power 2; `kriging`: each gene by itself
    (`Field`); `kriging_pca`: the same of the first 20 components of the window's visible spots.

    Parameters
    ----------
    hidden, visible
        float [h, 2] and [v, 2], positions in pitches.
    values
        float [v, m], normalised expression of the visible spots.
    """
    mean = values.mean(axis=0)
    index, distance = nearest(hidden, visible)
    field = Field(visible, likeliest_length(visible, values))
    scores, axes = components(values - mean)
    return {
        "window_mean": np.broadcast_to(mean, (len(hidden), len(mean))),
        "mean_16": values[index].mean(axis=1),
        "inverse_distance": inverse_distance(values, index, distance),
        "kriging": field.predict(values, hidden),
        "kriging_pca": mean + field.predict(scores, hidden) @ axes,
    }


def errors(truth: np.ndarray, predicted: np.ndarray) -> Sums:
    """Sums over the hidden (spot, gene) entries of one region, from which `metrics` are made.

    Correlations are Pearson's, of each gene whose truth varies over the hidden spots; a prediction that does not vary has 0.
    """
    error = predicted - truth
    found = np.array([(error**2).sum(), np.abs(error).sum(), error.size, 0.0, 0.0])
    if len(truth) >= FEWEST_SPOTS:
        centred = [x - x.mean(axis=0) for x in (truth, predicted)]
        spread = [np.sqrt((x**2).mean(axis=0)) for x in centred]
        varies = spread[0] > LEAST_SPREAD
        both = varies & (spread[1] > LEAST_SPREAD)
        products = (centred[0] * centred[1]).mean(axis=0)[both]
        found[3:] = (products / (spread[0] * spread[1])[both]).sum(), varies.sum()
    return found


def metrics(sums: Sums, of_gene_mean: Sums) -> dict[str, float]:
    """`mse`, `mae`, `pearson` (mean over genes) and `r2` (1 - squared error / that of `gene_mean`).

    Without `pearson` where no gene's truth varies, without `r2` where the gene mean makes no error.
    """
    found = {"mse": sums[0] / sums[2], "mae": sums[1] / sums[2]}
    if sums[4]:
        found["pearson"] = sums[3] / sums[4]
    if of_gene_mean[0]:
        found["r2"] = 1 - sums[0] / of_gene_mean[0]
    return found


def measure(
    grid: Grid, regions: Regions, predictions: dict[str, np.ndarray], target_sum: float
) -> Iterator[tuple[tuple[int, int, int], dict[str, Sums]]]:
    """(window, side, repeat) of each region of a section, and every method's `errors` there.

    Parameters
    ----------
    predictions
        Model -> float [n, m], of the hidden cells region after region.
    """
    counts = grid.counts.reshape(-1, grid.counts.shape[2])[:, regions.columns]
    values = log_normalise(counts, grid.total_counts.reshape(-1, 1), target_sum)  # [H' * W', m]
    places = plane(grid.lattice["kind"], grid.array_row.ravel(), grid.array_col.ravel())
    observed = (grid.mask & (grid.total_counts > 0)).ravel()
    total, n = values[observed].sum(axis=0), int(observed.sum())
    start = 0
    for (window, side, repeat, *_), hidden, visible in zip(
        regions.region.tolist(), regions.hidden, regions.visible, strict=True
    ):
        truth, end = values[hidden], start + len(hidden)
        outside = (total - truth.sum(axis=0)) / (n - len(hidden))
        predicted = {
            "gene_mean": np.broadcast_to(outside, truth.shape),
            **baselines(places[hidden], places[visible], values[visible]),
            **{model: y[start:end].astype(np.float64) for model, y in predictions.items()},
        }
        yield (window, side, repeat), {method: errors(truth, y) for method, y in predicted.items()}
        start = end


def load_prediction(path: str | Path, slice_: str, regions: Regions) -> tuple[np.ndarray, dict[str, str]]:
    """``Y`` float32 [n, m] of an inpainted file (docs/format.md) and its metadata.

    Raises
    ------
    DamagedFile
        If the file can't be read, is of another version, or of other regions.
    """
    with reading(path):
        tensors, about = read_safetensors(path)
        y, cell = tensors["Y"], tensors["cell"]
    wrong, n = "", sum(map(len, regions.hidden))
    if about.get("format_version") != "1" or about.get("slice") != slice_:
        wrong = f"format_version {about.get('format_version')} of slice {about.get('slice')}"
    elif y.shape != (n, len(regions.genes)) or not np.array_equal(cell, np.concatenate([cell[:0], *regions.hidden])):
        wrong = f"{y.shape[0]} cells of {y.shape[1]} genes"
    elif not np.isfinite(y).all():
        wrong = f"{int((~np.isfinite(y)).sum())} values that are not finite"
    if wrong:
        raise DamagedFile(
            slice=slice_,
            file=str(path),
            found=wrong,
            expected=f"version 1, finite, of the {n} hidden cells and {len(regions.genes)} genes of its regions",
            next_step=f"delete {path} and run again",
        )
    return y, about


def note_missing(grid: Grid, regions: Regions, repeats: int, n_genes: int, notes: Notes) -> None:
    """Say where a section has no region of a size, or fewer regions or genes than were asked for."""
    if len(regions.genes) < n_genes:
        detail = f"{len(regions.genes)} genes for {n_genes}, all it measured"
        notes.add("genes", protocol=PROTOCOL, section=grid.slice, detail=detail)
    for (window, side), n in regions.placements.items():
        where = {"protocol": PROTOCOL, "section": grid.slice, "head": head(window, side)}
        if side >= window:
            notes.add("no_region", detail=f"a side of {side} is not below the window's {window}", **where)
        elif not n:
            shape = " x ".join(map(str, grid.mask.shape))
            notes.add(
                "no_region", detail=f"no window of {window} x {window} cells with enough tissue in {shape}", **where
            )
        elif n < repeats:
            notes.add("few_regions", detail=f"{n} different windows for {repeats} repeats", **where)


def head(window: int, side: int) -> str:
    """What stands in the column `head` of the score table."""
    return f"window{window}_side{side}"


def table(dataset: str, by_section: dict[str, dict[tuple[int, int, int], dict[str, Sums]]]) -> pd.DataFrame:
    """The score table: `pooled` (sums over all sections with a region of that size and repeat) and each section.

    Parameters
    ----------
    by_section
        Section -> (window, side, repeat) -> method -> `errors`.
    """
    pooled = defaultdict(dict)
    for found in by_section.values():
        for key, methods in found.items():
            for method, sums in methods.items():
                pooled[key][method] = pooled[key].get(method, 0) + sums
    rows = []
    for section, found in {"pooled": pooled, **by_section}.items():
        for (window, side, repeat), methods in sorted(found.items()):
            for method, sums in methods.items():
                for metric, value in metrics(sums, methods["gene_mean"]).items():
                    rows.append((dataset, section, method, head(window, side), PROTOCOL, repeat, metric, value))
    return pd.DataFrame(rows, columns=COLUMNS)


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, params, output = snakemake.input, snakemake.params, snakemake.output
    notes, by_section, units = Notes(), {}, {}
    inpainted = by_model(params.models, given.inpainted)
    with threadpool_limits(limits=1):  # sums in the same order on any machine
        for i, (grid_path, regions_path) in enumerate(zip(given.grids, given.regions, strict=True)):
            grid = read_grid(grid_path)
            regions = read_regions(regions_path, grid)
            loaded = {m: load_prediction(paths[i], grid.slice, regions) for m, paths in inpainted.items()}
            units |= {model: about for model, (_, about) in loaded.items()}
            if grid.slice in params.simulated:
                notes.add("simulated", protocol=PROTOCOL, section=grid.slice, detail="simulated slice")
            note_missing(grid, regions, params.repeats, params.genes, notes)
            predictions = {model: y for model, (y, _) in loaded.items()}
            by_section[grid.slice] = dict(measure(grid, regions, predictions, params.target_sum))
            logging.info("%s: %d regions of %d genes", grid.slice, len(regions.region), len(regions.genes))
    for model, about in units.items():
        if about["unit"] == "spot":
            detail = "unit spot: a hidden spot sees nothing of its surroundings, so every spot is told the same"
            notes.add("blind", protocol=PROTOCOL, method=model, detail=detail)
        if about["pretrained_on_simulated"] == "true":
            notes.add("simulated", protocol=PROTOCOL, method=model, detail="pretrained on simulated slices")
    tsv = {"sep": "\t", "index": False, "lineterminator": "\n"}
    table(snakemake.wildcards.dataset, by_section).to_csv(output.scores, float_format="%.6f", **tsv)
    notes.frame().to_csv(output.notes, **tsv)
