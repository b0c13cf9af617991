"""All methods' features of a dataset's spots, and the files of embeddings that they come from."""

from __future__ import annotations

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.unit.sections import full_section, noise, tiny_section
from workflow.assemble import Notes, assemble, by_model, features, load, load_embedding
from workflow.assemble import tested as scopes
from workflow.controls import neighbours
from workflow.errors import DamagedFile
from workflow.simulate import tiny_slice


def test_the_methods_are_all_controls_and_models_with_their_variants():
    sections = [full_section("a", seed=1), full_section("b", seed=2)]
    embeddings = noise(sections) | {"stpatch_spot": noise(sections)["stpatch"], "novae": noise(sections)["stpatch"]}
    by_section = ("", "+centred", "+standardised")
    expected = ["coordinates", "coordinates_section"]
    expected += ["raw" + averaged + treated for averaged in ("", "+averaged") for treated in by_section]
    averaging = ["pca", *(f"neighbour_mean_{n}" for n in (6, 18, 36)), *(f"spatial_directions_{n}" for n in (18, 36))]
    for method in averaging:
        expected += [method + treated for treated in by_section]
    for model in ("untrained", "stpatch", "stpatch_spot"):
        expected += [model + averaged + treated for averaged in ("", "+averaged") for treated in by_section]
    expected += ["novae" + treated for treated in by_section]  # averages by itself
    assert list(features(sections, embeddings, 1e4)) == expected


def test_with_one_section_nothing_is_centred_and_there_is_no_section_coordinate():
    section = full_section()
    names = set(features([section], noise([section]), 1e4))
    assert {"stpatch", "stpatch+averaged", "raw+averaged", "coordinates"} <= names
    assert not [name for name in names if "centred" in name or "standardised" in name or name.endswith("_section")]


def test_sections_are_centred_and_standardised_alone_and_spots_without_features_stay_out():
    sections = [full_section("a", seed=1), full_section("b", seed=2)]
    rng = np.random.default_rng(0)
    x = [rng.normal(5, 2, (sections[0].n_spots, 3)), rng.normal(-5, 9, (sections[1].n_spots, 3))]
    x[1][4] = np.nan
    found = features(sections, {"stpatch": x}, 1e4)
    for values in found["stpatch+standardised"]:
        np.testing.assert_allclose(np.nanmean(values, axis=0), 0, atol=1e-12)
        np.testing.assert_allclose(np.nanstd(values, axis=0), 1)
    assert np.isnan(found["stpatch+centred"][1][4]).all()
    np.testing.assert_allclose(np.nanmean(found["stpatch+averaged+centred"][1], axis=0), 0, atol=1e-12)


def test_averaged_is_the_mean_of_the_spot_and_those_of_its_neighbours_that_have_features():
    section = full_section(rows=10, cols=20)
    x = np.random.default_rng(0).normal(size=(section.n_spots, 3))
    x[7] = np.nan
    near = neighbours(section, 6).toarray() > 0
    expected = np.array([np.nanmean(x[row], axis=0) for row in near])
    expected[7] = np.nan
    np.testing.assert_allclose(features([section], {"stpatch": [x]}, 1e4)["stpatch+averaged"][0], expected)


def test_neighbour_mean_6_is_the_average_of_the_components():
    section = full_section(rows=10, cols=20)
    found = features([section], {}, 1e4)
    near = neighbours(section, 6).toarray()
    np.testing.assert_allclose(found["neighbour_mean_6"][0], near @ found["pca"][0] / near.sum(axis=1, keepdims=True))


def test_only_labelled_and_embedded_spots_are_assembled_and_each_knows_its_place():
    sections = [full_section("a", seed=1), full_section("b", seed=2)]
    sections[0].labels[:40] = None
    embeddings = noise(sections)
    embeddings["stpatch"][1][[3, 9]] = np.nan
    notes = Notes()
    data = assemble(sections, embeddings, 1e4, notes)
    kept = [np.arange(40, sections[0].n_spots), np.setdiff1d(np.arange(sections[1].n_spots), [3, 9])]
    assert np.array_equal(data.spot, np.concatenate(kept))
    assert np.array_equal(data.of_section, np.repeat([0, 1], [len(spots) for spots in kept]))
    labels = np.concatenate([section.labels[spots] for section, spots in zip(sections, kept, strict=True)])
    assert np.array_equal(data.classes[data.y], labels.astype(str))
    stacked = np.concatenate([x[spots] for x, spots in zip(embeddings["stpatch"], kept, strict=True)])
    assert np.array_equal(data.x["stpatch"], stacked)
    array = np.concatenate([section.array[spots] for section, spots in zip(sections, kept, strict=True)])
    assert np.array_equal(data.array, array)
    left_out = notes.frame().set_index("kind")["detail"]
    assert left_out["unlabelled"].startswith("40 of")
    assert left_out["without_embedding"].startswith("2 of")
    assert list(scopes(sections, data.of_section[:3]))[1][0] == "a"


def test_a_section_without_lattice_leaves_no_array(tmp_path):
    sections = [full_section("a"), tiny_section(tmp_path, "b", kind="none")]
    sections[1].genes = sections[0].genes[:50]
    sections[1].counts = sections[1].counts[:, :50]
    assert assemble(sections, {}, 1e4, Notes()).array is None


# From files


def deposit(tmp_path, name: str):
    path = tmp_path / f"{name}.h5ad"
    slice_ = tiny_slice(name=name)
    slice_.write_h5ad(path)
    return path, slice_.n_obs


def test_a_model_that_skipped_a_slice_is_left_out_with_its_reason(tmp_path):
    path, n = deposit(tmp_path, "full")
    kept = write_embedding(tmp_path / "kept", n, about={"simulated": "true"})
    empty = {"X": np.empty((0, 0), np.float32), "spot": np.empty(0, np.int32)}
    about = {"format_version": "1", "slice": "full", "skipped": "package novae is not there"}
    save_file(empty, tmp_path / "skipped", metadata=about)
    sections, embeddings, notes = load(
        [path], {"untrained": [kept], "stpatch": [kept], "novae": [tmp_path / "skipped"]}
    )
    assert [section.name for section in sections] == ["full"]
    assert list(embeddings) == ["untrained", "stpatch"]
    assert notes.frame()[["kind", "method", "detail"]].to_numpy().tolist() == [
        ["simulated", "stpatch", "pretrained on simulated slices"],
        ["method_skipped", "novae", "package novae is not there"],
    ]


def test_a_rules_list_of_files_is_parted_by_model():
    paths = ["m/a", "m/b", "n/a", "n/b"]
    assert by_model(["m", "n"], paths) == {"m": ["m/a", "m/b"], "n": ["n/a", "n/b"]}
    assert by_model(["m"], []) == {"m": []}


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
