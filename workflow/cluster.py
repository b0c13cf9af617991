"""Domains found without labels: every method's features of one section clustered, and compared with the true domains.

The number of domains is given: that of the section's labels. Sections are clustered one by one; spots without a label
are clustered with the rest, but not scored.
"""

import random
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import igraph
import numpy as np
import pandas as pd
from joblib import Parallel, delayed
from scipy import sparse
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.exceptions import ConvergenceWarning
from sklearn.metrics import adjusted_rand_score, homogeneity_score, normalized_mutual_info_score
from sklearn.mixture import GaussianMixture
from sklearn.neighbors import kneighbors_graph
from threadpoolctl import threadpool_limits

from workflow.assemble import COLUMNS, Notes, features
from workflow.controls import Section
from workflow.protocols import generator
from workflow.spatial_scores import chaos, pas, ten_nearest

PROTOCOL = "clustering"
REPEATS = 5  # seeds a clustering is made from: the `split` of its scores
N_STARTS = 5  # of k-means, of which the best is kept
N_COMPONENTS = 20  # of the mixture's features
MAX_ITER = 500  # of the mixture
ROUNDING = 1e-10  # part of the first component's variance below which another one is a rounding error
N_NEIGHBOURS = 15  # of the graph for Leiden
MOST_TRIALS = 20  # of a resolution
SAME_WITHIN_SECTION = {"coordinates_section"}  # as `coordinates`; `+centred` changes nothing either


class Partition(NamedTuple):
    domains: np.ndarray  # int [n], from 0
    converged: bool

    @property
    def n_domains(self) -> int:
        return len(np.unique(self.domains))


class Clustered(NamedTuple):
    scores: pd.DataFrame  # COLUMNS
    domains: pd.DataFrame  # section, spot, label, then a column `clustering:method:clusterer` each, of the first repeat
    notes: pd.DataFrame  # workflow.assemble.NOTES


def kmeans(x: np.ndarray, n_domains: int, seeds: list[int]) -> Iterator[Partition]:
    """K-means on the features as they are: the best of 5 starts by k-means++."""
    x = x.astype(np.float32)
    for seed in seeds:
        model = KMeans(n_domains, n_init=N_STARTS, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # fewer distinct spots than domains: seen by the count
            model.fit(x)
        yield Partition(model.labels_, bool(model.n_iter_ < model.max_iter))


def gmm(x: np.ndarray, n_domains: int, seeds: list[int]) -> Iterator[Partition]:
    """Gaussian mixture with one full covariance for all domains, mclust's EEE, on the first 20 principal components.

    The components are scaled to variance 1 each: such a mixture is the same in any basis, but not the k-means partition
    that it begins with. mclust begins on scaled components, too.
    """
    pca = PCA(min(N_COMPONENTS, *x.shape), svd_solver="covariance_eigh")
    components = pca.fit_transform(x)
    real = pca.explained_variance_ > ROUNDING * pca.explained_variance_[0]
    components = components[:, real] / np.sqrt(pca.explained_variance_[real])
    for seed in seeds:
        model = GaussianMixture(n_domains, covariance_type="tied", max_iter=MAX_ITER, random_state=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # told by converged_, and recorded
            domains = model.fit_predict(components)
        yield Partition(domains, bool(model.converged_))


def leiden(x: np.ndarray, n_domains: int, seeds: list[int]) -> Iterator[Partition]:
    """Leiden communities of the graph that joins a spot to its 15 nearest, at a resolution that gives the number asked.

    Modularity, edges without weights or direction, two iterations. Where no resolution gives the number, the nearest.
    """
    near = kneighbors_graph(x.astype(np.float32), min(N_NEIGHBOURS, len(x) - 1))
    edges = np.column_stack(sparse.triu(near.maximum(near.T)).nonzero())  # each pair once, whoever is near to whom
    graph = igraph.Graph(len(x), edges)
    resolution = 1.0
    for seed in seeds:

        def communities(resolution: float, seed: int = seed) -> np.ndarray:
            igraph.set_random_number_generator(random.Random(seed))
            found = graph.community_leiden(objective_function="modularity", resolution=resolution)
            return np.array(found.membership)

        # What met the number for one seed mostly does for the next.
        domains, resolution = with_so_many(communities, n_domains, resolution)
        yield Partition(domains, True)


def with_so_many(
    communities: Callable[[float], np.ndarray], n_domains: int, resolution: float
) -> tuple[np.ndarray, float]:
    """The partition into `n_domains`, and its resolution, by bisection; after 20 trials the nearest number met.

    Parameters
    ----------
    communities
        Resolution -> int [n]; more communities at a higher one, by and large.
    resolution
        Where to begin.
    """
    low, high, nearest, off = 0.0, np.inf, None, np.inf
    for _ in range(MOST_TRIALS):
        domains = communities(resolution)
        n_found = len(np.unique(domains))
        if abs(n_found - n_domains) < off:
            nearest, off = (domains, resolution), abs(n_found - n_domains)
        if not off:
            break
        low, high = (resolution, high) if n_found < n_domains else (low, resolution)
        resolution = (low + high) / 2 if np.isfinite(high) else 2 * resolution
    return nearest


CLUSTERERS = {"kmeans": kmeans, "gmm": gmm, "leiden": leiden}


class Truth(NamedTuple):
    """What a section's domains are compared with; n clustered spots, k of them labelled."""

    scored: np.ndarray  # bool [n]
    y: np.ndarray  # int [k]
    position: np.ndarray  # float64 [k, 2]
    near: np.ndarray  # int [k, 10]

    @property
    def n_domains(self) -> int:
        return len(np.unique(self.y))

    def smoothness(self, domains: np.ndarray) -> dict[str, float]:
        return {"chaos": chaos(domains, self.position), "pas": pas(domains, self.near)}

    def metrics(self, domains: np.ndarray) -> dict[str, float]:
        """Adjusted Rand index, normalised mutual information, homogeneity, CHAOS and PAS of the labelled spots."""
        agreement = {
            "ari": float(adjusted_rand_score(self.y, domains)),
            "nmi": float(normalized_mutual_info_score(self.y, domains)),
            "homogeneity": float(homogeneity_score(self.y, domains)),
        }
        return agreement | self.smoothness(domains)


class Task(NamedTuple):
    """One method's features of one section, to be clustered."""

    section: str
    method: str
    x: np.ndarray  # float64 [n, d]
    truth: Truth
    seeds: dict[str, list[int]]  # clusterer -> one a repeat


class Found(NamedTuple):
    scores: list[tuple]  # (clusterer, repeat, metric, value)
    domains: dict[str, np.ndarray]  # clusterer -> int [k], of the labelled spots in the first repeat
    notes: list[dict]


def clusterings(task: Task) -> Found:
    """All repeats of all clusterers; a function of the task alone, whatever else runs."""
    scores, first, notes = [], {}, []
    asked = task.truth.n_domains
    where = {"protocol": PROTOCOL, "section": task.section, "method": task.method}
    x = task.x - task.x.mean(axis=0)
    if not (np.ptp(x, axis=0) > 0).any():
        return Found([], {}, [dict(kind="clustering_skipped", detail="the features of all spots are equal", **where)])
    with threadpool_limits(limits=1):  # sums in the same order on any machine
        for name, seeds in task.seeds.items():
            partitions = list(CLUSTERERS[name](x, asked, seeds))
            for repeat, partition in enumerate(partitions):
                metrics = task.truth.metrics(partition.domains[task.truth.scored])
                scores += [(name, repeat, metric, value) for metric, value in metrics.items()]
            first[name] = partitions[0].domains[task.truth.scored]
            numbers = Counter(partition.n_domains for partition in partitions)
            if set(numbers) != {asked}:
                found = ", ".join(f"{number} in {times}" for number, times in sorted(numbers.items()))
                detail = f"{asked} domains asked, found {found} of {len(seeds)} repeats"
                notes.append(dict(kind="number_not_met", head=name, detail=detail, **where))
            halted = sum(not partition.converged for partition in partitions)
            if halted:
                detail = f"{halted} of {len(seeds)} repeats stopped before they had settled"
                notes.append(dict(kind="not_converged", head=name, detail=detail, **where))
    return Found(scores, first, notes)


def truths(
    sections: list[Section], embeddings: dict[str, list[np.ndarray]], notes: Notes
) -> dict[int, tuple[np.ndarray, Truth]]:
    """Index of each section that can be scored -> its clustered spots (those that every model embedded), and the truth."""
    found = {}
    for index, section in enumerate(sections):
        if section.simulated:
            notes.add("simulated", section=section.name, detail="simulated slice")
        embedded = np.ones(section.n_spots, dtype=bool)
        for by_section in embeddings.values():
            embedded &= np.isfinite(by_section[index]).all(axis=1)
        labelled = np.array([label is not None for label in section.labels], dtype=bool)
        spots = np.flatnonzero(embedded)
        scored = labelled[spots]
        classes, y = np.unique(section.labels[spots[scored]].astype(str), return_inverse=True)
        if len(classes) < 2:
            detail = f"{len(classes)} domains among {len(y)} labelled spots: nothing to tell apart"
            notes.add("section_skipped", protocol=PROTOCOL, section=section.name, detail=detail)
            continue
        for kind, n, verb in (
            ("without_embedding", (~embedded).sum(), "left out"),
            ("unlabelled", (~scored).sum(), "clustered, but not scored"),
        ):
            if n:
                notes.add(kind, section=section.name, detail=f"{n} of {section.n_spots} spots {verb}")
        position = section.position[spots[scored]]
        found[index] = spots, Truth(scored, y, position, ten_nearest(position))
    return found


def methods_of(names: list[str]) -> list[str]:
    """Methods whose features differ within one section: averaged and standardised ones, but not centred ones."""
    return [name for name in names if name not in SAME_WITHIN_SECTION and not name.endswith("+centred")]


def cluster(
    dataset: str,
    sections: list[Section],
    embeddings: dict[str, list[np.ndarray]],
    *,
    clusterers: list[str],
    seed: int,
    target_sum: float,
    notes: Notes | None = None,
    repeats: int = REPEATS,
    processes: int = 1,
) -> Clustered:
    """Scores of all methods' clusterings, section by section.

    Parameters
    ----------
    sections
        All admitted sections, in the order of their names.
    embeddings
        Model -> one float [n_spots, d] a section, rows of NaN for spots without embedding.
    clusterers
        Keys of `CLUSTERERS`; the `head` of their scores.
    notes
        Those made while loading.
    processes
        That share the work; the result is the same for any number.

    Returns
    -------
    Clustered
        `split` is the repeat. `pooled` rows are means over sections, since the domains of two clusterings have no common
        names. Method `labels` has the smoothness of the true domains, `one_domain` the scores of finding nothing; both
        have the head `none`.
    """
    notes = notes or Notes()
    known = truths(sections, embeddings, notes)
    if not known:
        notes.add("no_labels", detail=f"{len(sections)} sections, none with two labelled domains: nothing to score")
        return Clustered(
            pd.DataFrame(columns=COLUMNS), pd.DataFrame(columns=["section", "spot", "label"]), notes.frame()
        )
    by_method = features(sections, embeddings, target_sum)

    def tasks() -> Iterator[Task]:
        for method in methods_of(list(by_method)):
            by_section = by_method[method]
            for index, (spots, truth) in known.items():
                name = sections[index].name
                seeds = {head: _seeds(seed, dataset, f"{name}/{method}/{head}", repeats) for head in clusterers}
                yield Task(name, method, by_section[index][spots], truth, seeds)

    places = [(sections[index].name, method) for method in methods_of(list(by_method)) for index in known]
    # Arrays travel through pipes: none is worth a file in a folder that may be small.
    results = Parallel(n_jobs=processes, max_nbytes=None)(delayed(clusterings)(task) for task in tasks())

    rows, columns = [], {}
    for index, (_, truth) in known.items():
        one = np.zeros(len(truth.y), dtype=np.int64)
        for method, metrics in (("labels", truth.smoothness(truth.y)), ("one_domain", truth.metrics(one))):
            where = (dataset, sections[index].name, method, "none", PROTOCOL, 0)
            rows += [(*where, metric, value) for metric, value in metrics.items()]
    for (section, method), found in zip(places, results, strict=True):
        rows += [
            (dataset, section, method, head, PROTOCOL, repeat, metric, value)
            for head, repeat, metric, value in found.scores
        ]
        for head, domains in found.domains.items():
            columns.setdefault(f"{PROTOCOL}:{method}:{head}", {})[section] = domains
        for note in found.notes:
            notes.add(**note)
    return Clustered(with_means(pd.DataFrame(rows, columns=COLUMNS)), _table(sections, known, columns), notes.frame())


def _seeds(seed: int, dataset: str, what: str, repeats: int) -> list[int]:
    return [int(generator(seed, dataset, f"{PROTOCOL}/{what}", repeat).integers(2**31)) for repeat in range(repeats)]


def with_means(scores: pd.DataFrame) -> pd.DataFrame:
    """The scores below their means over sections, `pooled`, of what was scored in every section."""
    keys = [name for name in COLUMNS if name not in ("section", "value")]
    over = scores.groupby(keys, sort=False)["value"].agg(["mean", "size"]).reset_index()
    over = over[over["size"] == scores["section"].nunique()]
    means = over.rename(columns={"mean": "value"}).assign(section="pooled")
    return pd.concat([means[COLUMNS], scores], ignore_index=True)


def _table(sections: list[Section], known: dict, columns: dict[str, dict[str, np.ndarray]]) -> pd.DataFrame:
    """One row a labelled spot; where a section was not clustered by a method, the cells are blank."""
    parts = []
    for index, (spots, truth) in known.items():
        section, of_whom = sections[index], spots[truth.scored]
        part = {"section": section.name, "spot": of_whom, "label": section.labels[of_whom].astype(str)}
        part |= {name: by_section[section.name] for name, by_section in columns.items() if section.name in by_section}
        parts.append(pd.DataFrame(part).astype({name: "Int64" for name in columns if name in part}))
    return pd.concat(parts, ignore_index=True).reindex(columns=["section", "spot", "label", *columns])


def write(clustered: Clustered, scores: str | Path, domains: str | Path, notes: str | Path) -> None:
    """The three tables, tab-separated; the same bytes for the same values."""
    table = {"sep": "\t", "index": False, "lineterminator": "\n"}
    clustered.scores.to_csv(scores, float_format="%.6f", **table)
    clustered.domains.to_csv(domains, compression={"method": "gzip", "mtime": 0}, **table)
    clustered.notes.to_csv(notes, **table)


if __name__ == "__main__":
    from workflow.assemble import by_model, load
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given, params, output = snakemake.input, snakemake.params, snakemake.output
    with threadpool_limits(limits=1):
        sections, embeddings, notes = load(given.slices, by_model(params.models, given.embeddings))
        clustered = cluster(
            snakemake.wildcards.dataset,
            sections,
            embeddings,
            clusterers=params.clusterers,
            seed=params.seed,
            target_sum=params.target_sum,
            notes=notes,
            processes=snakemake.threads,
        )
    write(clustered, output.scores, output.domains, output.notes)
