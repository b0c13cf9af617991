"""Controls, protocols, probes and the score table, on planted answers."""

from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from safetensors.numpy import save_file
from scipy import sparse

from workflow import controls, probes, protocols
from workflow.controls import (
    Section,
    control_features,
    hexagonal_offsets,
    load_section,
    neighbour_mean,
    neighbours,
)
from workflow.errors import DamagedFile, TooFewCommonGenes
from workflow.evaluate import gather
from workflow.score import COLUMNS, load_embedding, score, with_suffixes, write
from workflow.simulate import tiny_slice

SETTINGS = {"heads": ["knn", "logistic"], "n_splits": 2, "seed": 0, "target_sum": 1e4}


def tiny_section(tmp_path, name: str = "one", seed: int = 0, **kwargs) -> Section:
    path = tmp_path / f"{name}.h5ad"
    tiny_slice(seed=seed, name=name, **kwargs).write_h5ad(path)
    return load_section(path)


def full_section(name: str = "full", rows: int = 30, cols: int = 60, seed: int = 0, labels=None) -> Section:
    """A rectangle of the staggered lattice without gaps; labels: quadrants unless given."""
    row, col = (axis.ravel() for axis in np.mgrid[:rows, :cols])
    array = np.column_stack([row, col])[(row + col) % 2 == 0]
    counts = sparse.csr_matrix(np.random.default_rng(seed).poisson(1.0, (len(array), 70)))
    if labels is None:
        labels = np.array([f"q{2 * (r >= rows / 2) + (c >= cols / 2)}" for r, c in array], dtype=object)
    return Section(
        name=name,
        counts=counts,
        totals=np.asarray(counts.sum(axis=1)).ravel(),
        genes=np.array([f"ENSG{i:011d}" for i in range(70)], dtype=object),
        labels=labels,
        lattice="staggered",
        array=array,
        position=array[:, ::-1] * np.array([50.0, 50 * np.sqrt(3)]),
    )


def noise(sections, seed: int = 0) -> dict[str, list[np.ndarray]]:
    rng = np.random.default_rng(seed)
    return {method: [rng.normal(size=(s.n_spots, 4)) for s in sections] for method in ("untrained", "stpatch")}


def mean_accuracy(scored, protocol: str) -> pd.Series:
    rows = scored.scores.query("section == 'pooled' and metric == 'accuracy' and protocol == @protocol")
    return rows.groupby(["method", "head"])["value"].mean()


def rings_by_brute_force(array: np.ndarray, rings: int) -> np.ndarray:
    """Hexagonal distance from the positions in the plane: a disc of r rings holds what lies within r pitches."""
    plane = array[:, ::-1] * np.array([0.5, np.sqrt(3) / 2])
    row = array[:, 0][:, None] - array[:, 0]
    # On the hexagon of r rings: |rows| <= r, and along the slanted axes x +- y / sqrt(3) <= r.
    across = np.abs(plane[:, 0][:, None] - plane[:, 0])
    return (np.abs(row) <= rings) & (across + np.abs(row) / 2 <= rings + 1e-9)


# Neighbours


@pytest.mark.parametrize(("n", "rings"), [(6, 1), (18, 2), (36, 3)])
def test_rings_of_hexagons_hold_6_18_and_36_neighbours_and_the_spot(n, rings):
    steps = hexagonal_offsets(rings)
    assert len(np.unique(steps, axis=0)) == len(steps) == n + 1
    assert (steps.sum(axis=1) % 2 == 0).all()
    inner = full_section()
    counted = np.asarray(neighbours(inner, n).sum(axis=1)).ravel()
    assert counted.max() == n + 1
    assert counted.min() < n + 1  # at the border


@pytest.mark.parametrize("n", [6, 18, 36])
def test_neighbours_equal_brute_force_on_a_slice_with_holes(tmp_path, n):
    section = tiny_section(tmp_path, shape=(20, 40))
    expected = rings_by_brute_force(section.array, controls.RINGS[n])
    assert np.array_equal(neighbours(section, n).toarray() > 0, expected)


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_neighbours_equal_brute_force_on_a_real_slice(real_data):
    import anndata as ad

    obs = ad.read_h5ad(real_data / "visium/dlpfc_151673_crop_allgenes.h5ad", backed="r").obs
    section = full_section()
    section.array = obs[["array_row", "array_col"]].to_numpy(dtype=np.int64)
    section.counts = sparse.csr_matrix((len(obs), 1))
    for n, rings in controls.RINGS.items():
        assert np.array_equal(neighbours(section, n).toarray() > 0, rings_by_brute_force(section.array, rings))


@pytest.mark.parametrize("kind", ["square", "none"])
def test_without_a_staggered_lattice_the_n_nearest_and_the_spot_itself_are_taken(tmp_path, kind):
    section = tiny_section(tmp_path, shape=(12, 14), kind=kind)
    place = section.position if section.array is None else section.array
    distance = np.linalg.norm(place[:, None] - place, axis=2)
    near = neighbours(section, 6).toarray() > 0
    assert near.diagonal().all()
    assert (near.sum(axis=1) == 7).all()
    farthest_in = np.where(near, distance, -np.inf).max(axis=1)
    nearest_out = np.where(near, np.inf, distance).min(axis=1)
    assert (farthest_in <= nearest_out + 1e-9).all()


def test_a_missing_row_does_not_shift_neighbours():
    section = full_section()
    kept = section.array[:, 0] != 10
    with_row = neighbours(section, 6).toarray()[np.ix_(kept, kept)]
    section.array, section.counts = section.array[kept], section.counts[kept]
    assert np.array_equal(neighbours(section, 6).toarray(), with_row)


def test_the_neighbour_mean_includes_the_spot_itself():
    section = full_section(rows=6, cols=12)
    x = np.random.default_rng(0).normal(size=(section.n_spots, 3))
    near = rings_by_brute_force(section.array, 1)
    expected = np.array([x[row].mean(axis=0) for row in near])
    np.testing.assert_allclose(neighbour_mean(x, neighbours(section, 6)), expected)


# Features


def test_components_equal_those_of_a_singular_value_decomposition():
    sections = [full_section(seed=1), full_section(seed=2)]
    genes = controls.common_genes(sections)
    expression = [controls.normalised(section, genes, 1e4) for section in sections]
    found = np.concatenate(controls.principal_components(expression, 5))
    dense = np.concatenate([matrix.toarray() for matrix in expression])
    u, s, _ = np.linalg.svd(dense - dense.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found), np.abs(u[:, :5] * s[:5]), atol=1e-8)


def test_normalised_expression_uses_totals_over_all_genes_of_the_source():
    section = full_section()
    section.totals = section.totals * 2
    dense = np.log1p(section.counts.toarray() / section.totals[:, None] * 1e4)
    np.testing.assert_allclose(controls.normalised(section, section.genes, 1e4).toarray(), dense)


def test_only_genes_measured_by_every_section_are_used():
    first, second = full_section(), full_section(seed=1)
    second.genes = second.genes.copy()
    second.genes[:3] = ["ENSG99999999991", "ENSG99999999992", "ENSG99999999993"]
    assert list(controls.common_genes([first, second])) == list(first.genes[3:])


@pytest.mark.parametrize("n_shared", [0, 49])
def test_sections_that_share_too_few_genes_are_named_and_counted(n_shared):
    first, second = full_section("one"), full_section("two")
    second.genes = np.array([*first.genes[:n_shared], *(f"ENSMUSG{i}" for i in range(70 - n_shared))], dtype=object)
    with pytest.raises(TooFewCommonGenes, match=f"slice one, two: found {n_shared} genes .* expected at least 50"):
        control_features([first, second], 1e4)


def test_labels_do_not_touch_the_features():
    labelled, unlabelled = full_section(), full_section()
    unlabelled.labels = np.full(unlabelled.n_spots, None, dtype=object)
    for method, values in control_features([labelled], 1e4).items():
        assert np.array_equal(values[0], control_features([unlabelled], 1e4)[method][0]), method


def test_suffixes_treat_each_section_alone_and_leave_spots_without_features_out():
    rng = np.random.default_rng(0)
    first, second = rng.normal(5, 2, (20, 3)), rng.normal(-5, 9, (30, 3))
    second[4] = np.nan
    treated = with_suffixes({"stpatch": [first, second], "coordinates": [first, second]})
    assert sorted(treated) == ["coordinates", "stpatch", "stpatch+centred", "stpatch+standardised"]
    for values in treated["stpatch+standardised"]:
        np.testing.assert_allclose(np.nanmean(values, axis=0), 0, atol=1e-12)
        np.testing.assert_allclose(np.nanstd(values, axis=0), 1)


# Protocols


def test_random20_trains_on_a_fifth_and_tests_all_others():
    for _, train, test in protocols.random20(1003, 3, 0, "d"):
        assert len(train) == 201
        assert np.array_equal(np.sort(np.concatenate([train, test])), np.arange(1003))


def test_splits_depend_on_seed_dataset_and_number_alone():
    first = [train for _, train, _ in protocols.random20(500, 3, 7, "d")]
    assert np.array_equal(first[2], [train for _, train, _ in protocols.random20(500, 5, 7, "d")][2])
    assert not np.array_equal(first[0], first[1])
    for seed, dataset in ((8, "d"), (7, "e")):
        assert not np.array_equal(first[0], next(protocols.random20(500, 1, seed, dataset))[1])


def test_blocks_are_never_cut():
    section = full_section(rows=60, cols=120)
    of_section = np.zeros(section.n_spots, dtype=int)
    block = section.array // np.array([16, 32])
    for _, train, test in protocols.blocks(of_section, section.array, 4, 0, "d"):
        assert not {tuple(b) for b in block[train]} & {tuple(b) for b in block[test]}
        assert 0.2 <= len(train) / section.n_spots < 0.4
        assert len(train) + len(test) == section.n_spots


def test_every_section_is_left_out_once():
    of_section = np.repeat([0, 1, 2], [5, 6, 7])
    splits = list(protocols.leave_section(of_section))
    assert [number for number, _, _ in splits] == [0, 1, 2]
    for number, train, test in splits:
        assert set(of_section[test]) == {number}
        assert len(train) + len(test) == 18


def test_every_donor_is_left_out_once_with_all_its_sections_and_unknown_ones_take_no_part():
    of_section = np.repeat([0, 1, 2, 3], [5, 6, 7, 8])
    donor = np.array([1, 0, 1, -1])[of_section]
    found = [
        (number, set(of_section[train]), set(of_section[test])) for number, train, test in protocols.leave_donor(donor)
    ]
    assert found == [(0, {0, 2}, {1}), (1, {1}, {0, 2})]


# Probes


def test_metrics_tell_agreement_of_names_from_agreement_of_groups():
    truth = np.repeat([0, 1, 2], 10)
    assert probes.metrics(truth, truth) == dict.fromkeys(["accuracy", "macro_f1", "ari", "nmi"], 1.0)
    renamed = probes.metrics(truth, (truth + 1) % 3)
    assert renamed == {"accuracy": 0.0, "macro_f1": 0.0, "ari": 1.0, "nmi": pytest.approx(1.0)}
    constant = probes.metrics(truth, np.zeros(30, int))
    assert constant["accuracy"] == pytest.approx(1 / 3)
    assert constant["macro_f1"] == pytest.approx(1 / 6)  # precision 1/3, recall 1 in one of three classes
    assert (constant["ari"], constant["nmi"]) == (0.0, pytest.approx(0.0, abs=1e-12))


def test_the_majority_probe_predicts_the_most_frequent_class_and_ties_go_to_the_first():
    assert probes.majority(np.array([2, 2, 1]), 3).classes.tolist() == [2, 2, 2]
    assert probes.majority(np.array([2, 1]), 1).classes.tolist() == [1]


def test_a_single_training_class_and_few_training_spots_are_no_obstacle():
    x, y = np.random.default_rng(0).normal(size=(4, 2)), np.array([3, 3, 3, 3])
    for probe in probes.HEADS.values():
        assert probe(x, y, x[:2]).classes.tolist() == [3, 3]


# The table


def test_labels_that_follow_the_place_are_found_from_coordinates_and_missed_from_noise():
    section = full_section(rows=40, cols=80)
    scored = score("d", [section], noise([section]), protocol_names=["random20"], **SETTINGS)
    accuracy = mean_accuracy(scored, "random20")
    assert accuracy["coordinates", "knn"] > 0.95  # the rest lies on the borders of the quadrants
    assert accuracy["stpatch", "knn"] < 0.35
    assert accuracy["majority", "none"] < 0.3


def test_shuffled_labels_leave_every_method_at_chance():
    rng = np.random.default_rng(0)
    sections = [full_section("a", seed=1), full_section("b", seed=2)]
    for section in sections:
        section.labels = rng.permutation(section.labels)
    scored = score("d", sections, noise(sections), protocol_names=["random20", "leave_section"], **SETTINGS)
    pooled = scored.scores.query("section == 'pooled'").groupby(["method", "head", "metric"])["value"].mean().unstack()
    assert (pooled["accuracy"] - 0.25).abs().max() < 0.06
    assert pooled["ari"].abs().max() < 0.03


def test_the_planted_domains_are_found_across_sections_by_an_embedding_that_holds_them(tmp_path):
    sections = [tiny_section(tmp_path, name, seed) for seed, name in enumerate("ab")]
    codes = [np.unique(section.labels.astype(str), return_inverse=True)[1] for section in sections]
    embeddings = noise(sections) | {"stpatch": [np.eye(3)[code] for code in codes]}
    scored = score("d", sections, embeddings, protocol_names=["leave_section"], **SETTINGS)
    accuracy = mean_accuracy(scored, "leave_section")
    assert accuracy["stpatch", "knn"] == accuracy["stpatch", "logistic"] == 1
    assert accuracy["untrained", "knn"] < 0.7


def test_the_table_has_the_columns_methods_and_sections_that_others_build_on():
    sections = [full_section("a", seed=1), full_section("b", seed=2)]
    protocol_names = ["random20", "blocks", "leave_section"]
    scored = score("d", sections, noise(sections), protocol_names=protocol_names, **SETTINGS)
    assert list(scored.scores.columns) == COLUMNS
    plain = {"majority", "coordinates", "coordinates_section"}
    treated = {"raw", "pca", "neighbour_mean_6", "neighbour_mean_18", "neighbour_mean_36", "untrained", "stpatch"}
    suffixed = {method + suffix for method in treated for suffix in ("", "+centred", "+standardised")}
    assert set(scored.scores["method"]) == plain | suffixed
    assert set(scored.scores["protocol"]) == set(protocol_names)
    assert set(scored.scores["metric"]) == {"accuracy", "macro_f1", "ari", "nmi"}
    assert set(scored.scores["section"]) == {"a", "b", "pooled"}
    left_out = scored.scores.query("protocol == 'leave_section' and section != 'pooled'")
    assert set(zip(left_out["split"], left_out["section"], strict=True)) == {(0, "a"), (1, "b")}
    assert not scored.scores.duplicated([name for name in COLUMNS if name != "value"]).any()
    assert scored.predictions.filter(like=":").columns.str.startswith("leave_section:").all()


def test_the_same_input_gives_the_same_bytes(tmp_path):
    section = full_section()
    tables = []
    for run in ("first", "second"):
        (tmp_path / run).mkdir()
        paths = [tmp_path / run / part for part in ("scores.tsv", "predictions.tsv.gz", "notes.tsv")]
        write(score("d", [section], noise([section]), protocol_names=["random20"], **SETTINGS), *paths)
        tables.append([path.read_bytes() for path in paths])
    assert tables[0] == tables[1]


def test_unlabelled_spots_are_left_out_of_probes_and_counted():
    section = full_section()
    section.labels[:40] = None
    scored = score("d", [section], noise([section]), protocol_names=["random20"], **SETTINGS)
    assert len(scored.predictions) == section.n_spots - 40
    assert scored.predictions["spot"].min() == 40
    assert scored.notes.query("kind == 'unlabelled'")["detail"].item().startswith("40 of")


def test_spots_without_an_embedding_are_left_out_for_every_method():
    section = full_section()
    embeddings = noise([section])
    embeddings["stpatch"][0][:7] = np.nan
    scored = score("d", [section], embeddings, protocol_names=["random20"], **SETTINGS)
    assert len(scored.predictions) == section.n_spots - 7
    assert scored.notes.query("kind == 'without_embedding'")["detail"].item().startswith("7 of")


def test_a_class_absent_from_training_is_listed():
    sections = [full_section("a", seed=1), full_section("b", seed=2)]
    sections[1].labels[:5] = "rare"
    scored = score("d", sections, noise(sections), protocol_names=["leave_section"], **SETTINGS)
    absent = scored.notes.query("kind == 'class_absent_from_training'")
    assert absent[["protocol", "split", "detail"]].to_numpy().tolist() == [["leave_section", 1, "rare"]]


def test_a_probe_that_stops_early_is_listed(monkeypatch):
    monkeypatch.setattr(probes, "MAX_ITER", 1)
    section = full_section()
    scored = score("d", [section], noise([section]), protocol_names=["random20"], **SETTINGS)
    stopped = scored.notes.query("kind == 'not_converged'")
    assert set(stopped["head"]) == {"logistic"}
    assert "stpatch" in set(stopped["method"])


def test_one_section_cannot_be_left_out_and_the_notes_say_so():
    section = full_section()
    scored = score("d", [section], noise([section]), protocol_names=["leave_section", "random20"], **SETTINGS)
    assert set(scored.scores["protocol"]) == {"random20"}
    assert scored.notes.query("kind == 'protocol_skipped'")["protocol"].item() == "leave_section"
    assert "coordinates_section" not in set(scored.scores["method"])


def donated(*donors: str) -> list[Section]:
    """Small sections a, b, ... of these donors."""
    sections = [full_section(name, rows=8, cols=16, seed=ord(name)) for name in "abcdef"[: len(donors)]]
    for section, donor in zip(sections, donors, strict=True):
        section.donor = donor
    return sections


def test_a_left_out_section_whose_donor_also_trains_is_noted():
    sections = donated("x", "x", "y", "", "")
    scored = score("d", sections, noise(sections), protocol_names=["leave_section"], **SETTINGS)
    shared = scored.notes.query("kind == 'shared_donor'")
    assert shared[["protocol", "split", "section", "detail"]].to_numpy().tolist() == [
        ["leave_section", 0, "a", "b of donor x trains"],
        ["leave_section", 1, "b", "a of donor x trains"],
    ]


def test_donors_are_left_out_and_a_section_of_an_unknown_donor_is_noted():
    sections = donated("y", "x", "y", "")
    scored = score("d", sections, noise(sections), protocol_names=["leave_donor"], **SETTINGS)
    tested = scored.scores.query("section != 'pooled'")
    assert set(zip(tested["split"], tested["section"], strict=True)) == {(0, "b"), (1, "a"), (1, "c")}
    assert scored.notes.query("kind == 'unknown_donor'")["section"].tolist() == ["d"]


@pytest.mark.parametrize("donors", [("x", "x"), ("x", ""), ("", "")])
def test_one_known_donor_cannot_be_left_out_and_the_notes_say_so(donors):
    sections = donated(*donors)
    scored = score("d", sections, noise(sections), protocol_names=["leave_donor"], **SETTINGS)
    assert not len(scored.scores)
    assert scored.notes.query("kind == 'protocol_skipped'")["protocol"].item() == "leave_donor"


def test_the_donor_is_that_of_the_catalogue(tmp_path):
    path = tmp_path / "one.h5ad"
    slice_ = tiny_slice(name="one")
    row = json.loads(slice_.uns["stpatch"]["row"]) | {"donor": "Br8100"}
    slice_.uns["stpatch"]["row"] = json.dumps(row)
    slice_.write_h5ad(path)
    assert load_section(path).donor == "Br8100"


def test_blocks_need_a_lattice_and_the_notes_say_so(tmp_path):
    section = tiny_section(tmp_path, kind="none")
    scored = score("d", [section], noise([section]), protocol_names=["blocks", "random20"], **SETTINGS)
    assert scored.notes.query("kind == 'protocol_skipped'")["protocol"].item() == "blocks"
    assert scored.notes.query("kind == 'position'")["detail"].item().startswith("positions in pixels")


@pytest.mark.parametrize("n_sections", [0, 1])
def test_without_labels_the_table_is_a_header_alone(tmp_path, n_sections):
    sections = [full_section()][:n_sections]
    for section in sections:
        section.labels[:] = None
    scored = score("d", sections, noise(sections), protocol_names=["random20"], **SETTINGS)
    paths = [tmp_path / part for part in ("scores.tsv", "predictions.tsv.gz", "notes.tsv")]
    write(scored, *paths)
    assert paths[0].read_text() == "\t".join(COLUMNS) + "\n"
    assert pd.read_csv(paths[1], sep="\t").columns.tolist() == ["section", "spot", "label"]
    assert "no_labels" in paths[2].read_text()


def test_simulated_slices_and_a_model_of_simulated_slices_are_noted(tmp_path):
    section = tiny_section(tmp_path)
    scored = score(
        "d", [section], noise([section]), protocol_names=["random20"], pretrained_on_simulated=True, **SETTINGS
    )
    assert scored.notes.query("kind == 'simulated'")[["section", "method"]].to_numpy().tolist() == [
        ["one", ""],
        ["", "stpatch"],
    ]


def test_tables_are_gathered_under_one_header(tmp_path):
    header = "\t".join(COLUMNS) + "\n"
    for name in "ab":
        (tmp_path / name).write_text(header + f"{name}\n")
    assert gather([tmp_path / "a", tmp_path / "b"]) == header + "a\nb\n"
    assert gather([]) == header
    (tmp_path / "c").write_text("other\n")
    with pytest.raises(ValueError, match="header"):
        gather([tmp_path / "c"])


# Embedding files


def write_embedding(path, n: int, spot=None, about=None, x=None):
    x = np.ones((n, 3), np.float32) if x is None else x
    spot = np.arange(n, dtype=np.int32) if spot is None else np.asarray(spot, np.int32)
    save_file({"X": x, "spot": spot}, path, metadata={"format_version": "1", "slice": "full"} | (about or {}))
    return path


def test_embeddings_come_in_the_order_of_the_slice_with_gaps_as_nan(tmp_path):
    section = full_section(rows=4, cols=4)
    x = np.arange(9, dtype=np.float32).reshape(3, 3)
    found, _ = load_embedding(write_embedding(tmp_path / "e", 3, spot=[5, 0, 2], x=x), section)
    assert np.array_equal(found[[5, 0, 2]], x)
    assert np.isnan(found[[1, 3, 4, 6, 7]]).all()


@pytest.mark.parametrize(
    ("fault", "found"),
    [
        ({"about": {"slice": "other"}}, "embeddings of slice other"),
        ({"about": {"format_version": "9"}}, "format_version 9"),
        ({"spot": [0, 0, 1, 2]}, "distinct spots"),
        ({"spot": [0, 1, 2, 99]}, "spots 0 to 99"),
        ({"x": np.full((4, 3), np.nan, np.float32)}, "not finite"),
    ],
)
def test_a_damaged_embedding_is_refused_with_slice_file_and_reason(tmp_path, fault, found):
    path = write_embedding(tmp_path / "e.safetensors", 4, **fault)
    with pytest.raises(DamagedFile, match=found) as error:
        load_embedding(path, full_section(rows=4, cols=4))
    assert "full" in str(error.value)
    assert "e.safetensors" in str(error.value)


# Real sections


@pytest.mark.real
@pytest.mark.filterwarnings("ignore")
def test_controls_on_two_real_sections_reach_what_was_measured_before(real_data):
    """Accuracies of k-NN under random20: position alone .86, mean of 36 neighbours .89, both above components alone."""
    import anndata as ad

    sections = []
    for name in ("151673", "151674"):
        slice_ = ad.read_h5ad(real_data / f"visium/dlpfc_{name}_crop_allgenes.h5ad")
        section = full_section(name)
        section.counts = sparse.csr_matrix(slice_.X)
        section.totals = np.asarray(section.counts.sum(axis=1)).ravel()
        section.genes = slice_.var_names.to_numpy(dtype=object)
        section.labels = slice_.obs["layer"].astype(object).where(slice_.obs["layer"].notna(), None).to_numpy()
        section.array = slice_.obs[["array_row", "array_col"]].to_numpy(dtype=np.int64)
        section.position = section.array[:, ::-1] * np.array([50.0, 50 * np.sqrt(3)])
        sections.append(section)
    settings = SETTINGS | {"heads": ["knn"], "n_splits": 1}
    scored = score("DLPFC", sections, noise(sections), protocol_names=["random20", "leave_section"], **settings)
    random20, left_out = mean_accuracy(scored, "random20"), mean_accuracy(scored, "leave_section")
    assert random20["coordinates", "knn"] == pytest.approx(0.86, abs=0.03)
    assert random20["neighbour_mean_36", "knn"] == pytest.approx(0.88, abs=0.03)
    assert random20["pca", "knn"] < 0.75
    assert left_out["coordinates", "knn"] == pytest.approx(0.75, abs=0.03)
    assert left_out["neighbour_mean_18+centred", "knn"] > left_out["pca", "knn"] + 0.1
