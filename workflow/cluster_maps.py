"""Maps of domains found without labels beside the true ones: of stpatch, the strongest control, and position alone."""

from pathlib import Path

import anndata as ad
import numpy as np
import pandas as pd
from scipy.optimize import linear_sum_assignment

from workflow.keys import Keys
from workflow.plotting import domain_colours, draw_spots, empty_figure, headline, new_figure, save

MAX_SECTIONS = 4
REFERENCES = {"labels", "one_domain"}  # no clusterings
PLACE = "coordinates"


def read_domains(path: str | Path) -> pd.DataFrame:
    """The table `clusters.tsv.gz`; a domain whose name looks like a missing value, such as NA, keeps it."""
    domains = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    numbers = {name: pd.to_numeric(domains[name]) for name in domains.columns.drop(["section", "label"])}
    return domains.assign(**numbers)


def shown(scores: pd.DataFrame) -> dict[str, str]:
    """Title -> column `clustering:method:clusterer` of the domains table: on each side the one of highest mean ARI."""
    ari = scores[(scores["metric"] == "ari") & (scores["section"] == "pooled") & ~scores["method"].isin(REFERENCES)]
    mean = ari.groupby(["protocol", "method", "head"], sort=False)["value"].mean()
    method = mean.index.get_level_values("method")
    model = method.str.startswith("stpatch")
    sides = {"stpatch": model, "strongest control": ~model, "position alone": method == PLACE}
    best = {title: ":".join(mean[of].idxmax()) for title, of in sides.items() if of.any()}
    if best.get("strongest control") == best.get("position alone"):
        best.pop("position alone", None)
    return best


def matched(truth: np.ndarray, domains: np.ndarray, n_classes: int) -> np.ndarray:
    """Domains renamed after the true classes that they overlap most, each class given once; the rest follow them.

    A name serves the colours alone: the scores know no names.

    Parameters
    ----------
    truth
        int [n], below `n_classes`.
    domains
        int [n], from 0.
    """
    overlap = np.zeros((domains.max() + 1, n_classes), dtype=np.int64)
    np.add.at(overlap, (domains, truth), 1)
    name = np.full(len(overlap), -1)
    of_domain, of_class = linear_sum_assignment(-overlap)
    name[of_domain] = of_class
    unnamed = np.flatnonzero(name < 0)
    name[unnamed] = n_classes + np.arange(len(unnamed))
    return name[domains]


def draw(dataset: str, domains: pd.DataFrame, scores: pd.DataFrame, places: dict[str, np.ndarray]):
    """One row a section: the true domains, then those found in the first repeat.

    Parameters
    ----------
    domains
        The table `clusters.tsv.gz`.
    scores
        The table `cluster.tsv`, by which the shown clusterings are chosen.
    places
        Section name -> float [n_spots, 2], pixels of the curated slice's spots.
    """
    sections = sorted(domains["section"].unique())
    drawn, classes = sections[:MAX_SECTIONS], sorted(domains["label"].unique())
    columns = shown(scores)
    first = scores[(scores["metric"] == "ari") & (scores["split"] == 0)]
    ari = first.set_index(["section", "method", "head"])["value"]
    n_colours = max([len(classes), *(len(classes) + domains[name].max() for name in columns.values())])
    colours = domain_colours(int(n_colours))
    size = (3.9 * (1 + len(columns)), 1.2 + 3.6 * len(drawn))
    figure, axes = new_figure(len(drawn), 1 + len(columns), figsize=size, squeeze=False)
    for row, section in enumerate(drawn):
        of_section = domains[domains["section"] == section]
        xy = places[section][of_section["spot"]]
        truth = pd.Categorical(of_section["label"], categories=classes).codes.astype(int)
        limits = {"cmap": colours, "clim": (-0.5, n_colours - 0.5)}
        draw_spots(axes[row, 0], xy, truth, **limits)
        axes[row, 0].set_title(f"{section}: true")
        for axis, (title, column) in zip(axes[row, 1:], columns.items(), strict=True):
            _, method, head = column.split(":")
            if of_section[column].isna().any():
                axis.set_axis_off()
                axis.set_title(f"{title}: not clustered\n{method}, {head}")
                continue
            draw_spots(axis, xy, matched(truth, of_section[column].to_numpy(dtype=int), len(classes)), **limits)
            axis.set_title(f"{title}: ARI {ari[section, method, head]:.3f}\n{method}, {head}")
    for index, name in enumerate(classes):
        axes[0, 0].plot([], [], "o", color=colours(index), label=name)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=min(len(classes), 8))
    rest = "" if len(drawn) == len(sections) else f" (the first {len(drawn)} of {len(sections)} sections)"
    headline(figure, f"{dataset}, domains found without labels{rest}")
    return figure


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, dataset = snakemake.input, snakemake.wildcards.dataset
    domains = read_domains(given.domains)
    notes = pd.read_csv(given.notes, sep="\t", dtype=str, keep_default_na=False)
    if len(domains):
        places = {}
        for path in given.slices:
            slice_ = ad.read_h5ad(path, backed="r")
            places[str(slice_.uns[Keys.STPATCH]["slice"])] = slice_.obsm[Keys.SPATIAL]
            slice_.file.close()
        figure = draw(dataset, domains, pd.read_csv(given.scores, sep="\t"), places)
    else:
        figure = empty_figure(f"{dataset}: no section has two labelled domains, nothing to map")
    save(figure, snakemake.output[0], simulated=bool((notes["kind"] == "simulated").any()))
