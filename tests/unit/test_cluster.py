"""Clustering by method and section on planted domains (simulated)."""

from __future__ import annotations

import gzip

import numpy as np
import pandas as pd
import pytest
from scipy import sparse
from sklearn.metrics import adjusted_rand_score

from workflow import cluster_maps
from workflow.assemble import COLUMNS, NOTES, Notes
from workflow.cluster import (
    CLUSTERERS,
    MOST_TRIALS,
    Clustered,
    Task,
    Truth,
    cluster,
    clusterings,
    methods_of,
    with_means,
    with_so_many,
    write,
)
from workflow.controls import Section
from workflow.plotting import plt
from workflow.spatial_scores import chaos, pas, ten_nearest

SIDE, GENES, DOMAINS = 12, 60, 3


def section(name: str, seed: int, **changes) -> Section:
    """12 x 12 spots of a staggered lattice in three layers, each with twenty genes of its own (simulated)."""
    row, place = np.divmod(np.arange(SIDE**2), SIDE)
    layer = row * DOMAINS // SIDE
    marks = np.arange(GENES) // (GENES // DOMAINS)
    rate = np.where(layer[:, None] == marks, 12.0, 4.0)
    counts = np.random.default_rng(seed).poisson(rate)
    array = np.column_stack([row, 2 * place + row % 2])
    given = {
        "name": name,
        "counts": sparse.csr_matrix(counts),
        "totals": counts.sum(axis=1),
        "genes": np.array([f"ENSG{gene:011d}" for gene in range(GENES)], dtype=object),
        "labels": np.array([f"layer{index}" for index in layer], dtype=object),
        "lattice": "staggered",
        "array": array,
        "position": array[:, ::-1] * np.array([50.0, 50 * np.sqrt(3)]),
        "simulated": True,
    }
    return Section(**(given | changes))


def embedding(of: Section, seed: int = 0, spread: float = 0.3) -> np.ndarray:
    """Vectors in which the layers lie apart."""
    layer = of.array[:, 0] * DOMAINS // SIDE
    return np.eye(DOMAINS, 8)[layer] * 5 + spread * np.random.default_rng(seed).normal(size=(of.n_spots, 8))


def clustered(sections: list[Section], clusterers: tuple[str, ...] = ("kmeans",), **given) -> Clustered:
    settings = {"clusterers": list(clusterers), "seed": 0, "target_sum": 1e4, "repeats": 2} | given
    embeddings = settings.pop("embeddings", {"stpatch": [embedding(one) for one in sections]})
    return cluster("d", sections, embeddings, **settings)


def value(found: Clustered, **where) -> float:
    rows = found.scores
    for name, wanted in where.items():
        rows = rows[rows[name] == wanted]
    assert len(rows) == 1
    return float(rows["value"].iloc[0])


# The clusterers


@pytest.fixture
def blobs() -> tuple[np.ndarray, np.ndarray]:
    truth = np.repeat(np.arange(4), 60)
    return 9 * np.eye(4, 6)[truth] + np.random.default_rng(0).normal(size=(240, 6)), truth


@pytest.mark.parametrize("name", CLUSTERERS)
def test_each_clusterer_finds_domains_that_lie_apart(name, blobs):
    x, truth = blobs
    for partition in CLUSTERERS[name](x, 4, [1, 2, 3]):
        assert adjusted_rand_score(truth, partition.domains) == 1
        assert partition.converged


@pytest.mark.parametrize("name", CLUSTERERS)
def test_the_same_seed_gives_the_same_domains(name):
    x = np.random.default_rng(0).normal(size=(300, 5))  # nothing to be found: only the seed decides
    once, again, other = CLUSTERERS[name](x, 6, [1, 1, 2])
    assert np.array_equal(once.domains, again.domains)
    assert not np.array_equal(once.domains, other.domains)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_the_mixture_follows_a_shape_that_all_domains_share_whatever_their_unit(scale):
    # Two long thin domains side by side: k-means cuts them across, one covariance for both doesn't.
    truth = np.repeat([0, 1], 150)
    noise = np.random.default_rng(0).normal(size=(300, 2))
    x = scale * np.column_stack([20 * noise[:, 0], noise[:, 1] + 8 * truth])
    (mixture,) = CLUSTERERS["gmm"](x, 2, [1])
    (means,) = CLUSTERERS["kmeans"](x, 2, [1])
    assert adjusted_rand_score(truth, mixture.domains) == 1
    assert adjusted_rand_score(truth, means.domains) < 0.1


def test_the_mixture_takes_no_rounding_error_for_a_component(blobs):
    x, truth = blobs
    doubled = np.hstack([x, x @ np.full((6, 30), 0.1)])  # 36 features, 6 directions
    (mixture,) = CLUSTERERS["gmm"](doubled, 4, [1])
    assert adjusted_rand_score(truth, mixture.domains) == 1


@pytest.mark.parametrize("asked", [2, 5, 9])
def test_leiden_is_given_the_resolution_that_meets_the_number_of_domains(asked):
    x = np.random.default_rng(0).normal(size=(400, 3))
    for partition in CLUSTERERS["leiden"](x, asked, [1, 2]):
        assert partition.n_domains == asked
        assert set(partition.domains) == set(range(asked))


def stairs(trials: list[float], steps: list[int]):
    """As many communities as the step that the resolution lies on: one at first, the next from 1 on, and so forth."""

    def communities(resolution: float) -> np.ndarray:
        trials.append(resolution)
        return np.arange(1000) % steps[min(int(resolution), len(steps) - 1)]

    return communities


@pytest.mark.parametrize("begin", [0.001, 1.0, 40.0])
def test_a_resolution_is_found_from_wherever_the_search_begins(begin):
    trials: list[float] = []
    domains, resolution = with_so_many(stairs(trials, [1, 3, 4, 7, 9]), 7, begin)
    assert len(np.unique(domains)) == 7
    assert 3 <= resolution < 4
    assert len(trials) < MOST_TRIALS


def test_where_no_resolution_meets_the_number_the_nearest_one_is_taken():
    trials: list[float] = []
    domains, resolution = with_so_many(stairs(trials, [1, 3, 6, 9]), 7, 0.5)
    assert len(np.unique(domains)) == 6
    assert 2 <= resolution < 3
    assert len(trials) == MOST_TRIALS


# One method of one section


def task(x: np.ndarray, y: np.ndarray, scored: np.ndarray | None = None, heads: tuple[str, ...] = ("kmeans",)) -> Task:
    scored = np.ones(len(x), dtype=bool) if scored is None else scored
    position = np.column_stack([np.arange(len(y)), np.zeros(len(y))])
    return Task("s", "m", x, Truth(scored, y, position, ten_nearest(position)), dict.fromkeys(heads, [1, 2]))


def test_features_that_are_equal_everywhere_are_not_clustered_and_a_note_says_so():
    found = clusterings(task(np.ones((30, 4)), np.arange(30) % 3))
    assert found.scores == []
    assert [note["kind"] for note in found.notes] == ["clustering_skipped"]


@pytest.mark.parametrize("head", CLUSTERERS)
def test_a_number_of_domains_that_was_not_met_is_noted(head):
    x = np.repeat([[0.0, 0.0], [9.0, 1.0]], 30, axis=0)  # two places, no more
    found = clusterings(task(x, np.arange(60) % 3, heads=(head,)))
    assert [(note["kind"], note["head"]) for note in found.notes] == [("number_not_met", head)]
    assert "3 domains asked, found 2 in 2 of 2 repeats" in found.notes[0]["detail"]


def test_unlabelled_spots_are_clustered_with_the_rest_but_not_scored():
    # Three groups, the labelled ones alone are two of them, cut in half: with the third group present and three domains
    # asked, k-means gives each group one domain.
    group = np.repeat([0, 1, 2], 20)
    scored = group < 2
    y = np.array([0] * 20 + [1] * 10 + [2] * 10)
    found = clusterings(task(10.0 * np.eye(3)[group] + np.linspace(0, 0.1, 60)[:, None], y, scored))
    assert len(found.domains["kmeans"]) == 40
    assert len(np.unique(found.domains["kmeans"])) == 2
    ari = {value for _, _, metric, value in found.scores if metric == "ari"}
    assert ari == {adjusted_rand_score(y, group[scored])}


# A dataset


def test_planted_layers_are_found_and_scored_one():
    found = clustered([section("a", 1), section("b", 2)], tuple(CLUSTERERS))
    assert list(found.scores.columns) == COLUMNS
    assert list(found.notes.columns) == NOTES
    for head in CLUSTERERS:
        for name in ("a", "b", "pooled"):
            for metric in ("ari", "nmi", "homogeneity"):
                where = {"section": name, "method": "stpatch", "head": head, "split": 1, "metric": metric}
                assert value(found, **where) == pytest.approx(1)
    assert (found.scores["protocol"] == "clustering").all()


def test_the_true_domains_and_one_single_domain_stand_beside_the_methods():
    one = section("a", 1)
    found = clustered([one])
    y, near = np.unique(one.labels.astype(str), return_inverse=True)[1], ten_nearest(one.position)
    for metric, expected in (("chaos", chaos(y, one.position)), ("pas", pas(y, near))):
        where = {"section": "a", "method": "labels", "head": "none", "split": 0, "metric": metric}
        assert value(found, **where) == expected
    of_labels = found.scores.query("method == 'labels'")
    assert set(of_labels["metric"]) == {"chaos", "pas"}  # agreement with itself says nothing
    nothing = found.scores.query("method == 'one_domain' and section == 'a'").set_index("metric")["value"]
    assert nothing[["ari", "nmi", "homogeneity", "pas"]].tolist() == [0, 0, 0, 0]
    assert nothing["chaos"] > 0


def test_position_alone_is_among_the_controls():
    found = clustered([section("a", 1)], ("kmeans", "gmm", "leiden"))
    heads = found.scores.query("method == 'coordinates' and metric == 'ari'")["head"]
    assert set(heads) == {"kmeans", "gmm", "leiden"}


def test_of_the_suffixes_those_that_change_a_section_are_clustered():
    found = clustered([section("a", 1), section("b", 2)], repeats=1)
    methods = set(found.scores["method"])
    assert {"stpatch", "stpatch+averaged", "stpatch+standardised", "stpatch+averaged+standardised"} <= methods
    assert {"coordinates", "raw", "raw+averaged", "pca", "neighbour_mean_36+standardised"} <= methods
    assert "coordinates_section" not in methods
    assert not [method for method in methods if method.endswith("+centred")]
    assert methods_of(["pca", "pca+centred", "pca+standardised"]) == ["pca", "pca+standardised"]


def test_pooled_scores_are_means_over_sections():
    rows = [("d", section, "m", "h", "clustering", 0, "ari", ari) for section, ari in (("a", 0.2), ("b", 0.6))]
    rows += [("d", "a", "half", "h", "clustering", 0, "ari", 0.9)]
    scores = with_means(pd.DataFrame(rows, columns=COLUMNS))
    pooled = scores[scores["section"] == "pooled"]
    assert pooled["method"].tolist() == ["m"]  # what wasn't scored in every section has no mean over them
    assert pooled["value"].tolist() == [pytest.approx(0.4)]
    assert len(scores) == 4


def test_the_table_of_domains_has_the_labelled_spots_alone():
    blank = section("a", 1)
    blank.labels[[3, 4, 100]] = None
    found = clustered([blank, section("b", 2)])
    of_a = found.domains[found.domains["section"] == "a"]
    assert of_a["spot"].tolist() == [spot for spot in range(SIDE**2) if spot not in (3, 4, 100)]
    assert (of_a["label"] == [f"layer{spot // SIDE * DOMAINS // SIDE}" for spot in of_a["spot"]]).all()
    note = found.notes[found.notes["kind"] == "unlabelled"]
    assert note["detail"].tolist() == ["3 of 144 spots clustered, but not scored"]
    assert adjusted_rand_score(of_a["label"], of_a["clustering:stpatch:kmeans"].astype(int)) == 1


def test_spots_without_embedding_are_left_out_and_counted():
    one = section("a", 1)
    x = embedding(one)
    x[:5] = np.nan
    found = clustered([one], embeddings={"stpatch": [x]})
    assert len(found.domains) == SIDE**2 - 5
    assert "5 of 144 spots left out" in found.notes["detail"].tolist()


def test_a_section_without_two_labelled_domains_is_skipped_and_named():
    bare = section("b", 2, labels=np.full(SIDE**2, None, dtype=object))
    single = section("c", 3, labels=np.full(SIDE**2, "tumour", dtype=object))
    found = clustered([section("a", 1), bare, single], repeats=1)
    skipped = found.notes[found.notes["kind"] == "section_skipped"]
    assert skipped["section"].tolist() == ["b", "c"]
    assert set(found.scores["section"]) == {"a", "pooled"}


def test_without_labels_the_tables_are_empty_and_a_note_says_why(tmp_path):
    bare = section("a", 2, labels=np.full(SIDE**2, None, dtype=object))
    found = clustered([bare])
    assert found.scores.empty
    assert "no_labels" in set(found.notes["kind"])
    write(found, tmp_path / "s.tsv", tmp_path / "d.tsv.gz", tmp_path / "n.tsv")
    assert (tmp_path / "s.tsv").read_text() == "\t".join(COLUMNS) + "\n"
    assert cluster_maps.read_domains(tmp_path / "d.tsv.gz").empty


def test_simulated_sections_are_noted_beside_what_loading_noted():
    notes = Notes()
    notes.add("method_skipped", method="novae", detail="not installed")
    found = clustered([section("a", 1)], notes=notes)
    assert set(found.notes["kind"]) >= {"method_skipped", "simulated"}


def test_a_methods_scores_do_not_depend_on_which_others_are_measured():
    sections = [section("a", 1)]
    x = [embedding(sections[0], spread=4.0)]  # hard enough that seeds matter
    alone = clustered(sections, ("kmeans", "leiden"), embeddings={"stpatch": x})
    beside = clustered(
        sections, ("leiden", "kmeans"), embeddings={"untrained": [embedding(sections[0], 5)], "stpatch": x}
    )
    key = ["section", "method", "head", "split", "metric"]
    of_alone = alone.scores[alone.scores["method"].str.startswith("stpatch")].set_index(key)["value"]
    of_beside = beside.scores.set_index(key)["value"]
    assert len(of_alone) > 20
    assert (of_beside[of_alone.index] == of_alone).all()


def test_any_number_of_processes_writes_the_same_bytes(tmp_path):
    sections = [section("a", 1)]
    embeddings = {"stpatch": [embedding(sections[0], spread=3.0)]}
    written = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        given = {"embeddings": embeddings, "repeats": 1, "processes": processes}
        found = clustered(sections, ("kmeans", "leiden"), **given)
        write(found, folder / "s.tsv", folder / "d.tsv.gz", folder / "n.tsv")
        written[processes] = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    assert written[1] == written[2]
    assert len(gzip.decompress(written[1]["d.tsv.gz"]).splitlines()) == 1 + SIDE**2


# The maps


def test_found_domains_take_the_colour_of_the_true_one_they_overlap_most_each_once():
    truth = np.array([0, 0, 0, 0, 1, 1, 2, 2, 2])
    found = np.array([5, 5, 5, 1, 1, 1, 0, 0, 1])
    assert cluster_maps.matched(truth, found, 3).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 1]


def test_a_domain_too_many_gets_a_colour_of_its_own():
    truth = np.array([0, 0, 0, 1, 1])
    assert cluster_maps.matched(truth, np.array([2, 2, 1, 0, 0]), 2).tolist() == [0, 0, 2, 1, 1]


def test_the_maps_show_the_best_of_each_side_by_the_mean_over_sections():
    values = {
        ("labels", "none"): 1.0,
        ("one_domain", "none"): 0.99,
        ("stpatch", "kmeans"): 0.3,
        ("stpatch+averaged", "leiden"): 0.4,
        ("pca", "gmm"): 0.5,
        ("coordinates", "kmeans"): 0.2,
        ("coordinates", "leiden"): 0.1,
    }
    rows = [("d", "pooled", *key, "clustering", 0, "ari", ari) for key, ari in values.items()]
    rows += [("d", "a", "stpatch", "kmeans", "clustering", 0, "ari", 0.95)]
    assert cluster_maps.shown(pd.DataFrame(rows, columns=COLUMNS)) == {
        "stpatch": "clustering:stpatch+averaged:leiden",
        "strongest control": "clustering:pca:gmm",
        "position alone": "clustering:coordinates:kmeans",
    }


def test_a_map_is_drawn_of_what_was_written_also_where_a_domain_is_called_na(tmp_path):
    named = section("a", 1)
    named.labels[named.labels == "layer1"] = "NA"
    sections = [named, section("b", 2)]
    found = clustered(sections)
    write(found, tmp_path / "s.tsv", tmp_path / "d.tsv.gz", tmp_path / "n.tsv")
    domains = cluster_maps.read_domains(tmp_path / "d.tsv.gz")
    assert set(domains["label"]) == {"layer0", "layer1", "layer2", "NA"}
    places = {one.name: one.position for one in sections}
    figure = cluster_maps.draw("d", domains, pd.read_csv(tmp_path / "s.tsv", sep="\t"), places)
    titles = [axis.get_title() for axis in figure.axes]
    plt.close(figure)
    assert "a: true" in titles
    assert "stpatch: ARI 1.000\nstpatch, kmeans" in titles
    assert len(titles) == 2 * 4 or "position alone" not in "".join(titles)
