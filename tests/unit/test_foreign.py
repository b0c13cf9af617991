"""Methods of others: skipped with a reason where they can't run, and the adapters against their real packages where these are here."""

from __future__ import annotations

import json
import sys
import types

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.conftest import ROOT
from workflow import foreign, foreign_methods, foreign_slice
from workflow.assemble import load
from workflow.controls import load_section
from workflow.curate import write_slice
from workflow.errors import DamagedFile
from workflow.foreign_methods import METHODS, Absent, Given, table_of
from workflow.sealed import as_safetensors
from workflow.simulate import tiny_slice


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """Two small simulated sections with planted domains, on disk."""
    folder, paths = tmp_path_factory.mktemp("slices"), []
    for name, seed in (("a", 1), ("b", 2)):
        adata = tiny_slice(seed=seed, n_genes=120, name=name, median_depth=1500)
        write_slice(adata, folder / f"{name}.h5ad")
        paths.append(folder / f"{name}.h5ad")
    return paths


def given(slices, **changes) -> Given:
    sections = [load_section(path) for path in slices]
    return Given(sections, [foreign.symbols_of(path) for path in slices], **changes)


def written(slices, method, vectors, skipped, folder):
    """Paths of the embeddings of both slices, through both rules' modules."""
    foreign.write(folder / "set.safetensors", method, "set", ["a", "b"], vectors, skipped)
    paths = []
    for name in ("a", "b"):
        tensors, facts = foreign_slice.part(folder / "set.safetensors", name)
        (folder / f"{name}.safetensors").write_bytes(as_safetensors(tensors, facts))
        paths.append(folder / f"{name}.safetensors")
    return paths


def test_the_methods_are_those_of_config_rule_and_environments():
    import yaml

    schema = yaml.safe_load((ROOT / "workflow/schemas/config.schema.yaml").read_text())
    known = schema["properties"]["evaluate"]["properties"]["foreign"]["items"]["enum"]
    assert sorted(known) == sorted(METHODS)
    assert (ROOT / "rules/foreign.smk").read_text().count("|".join(METHODS)) == 2
    for method in METHODS:
        environment = yaml.safe_load((ROOT / f"envs/foreign_{method}.yaml").read_text())
        assert {"channels", "dependencies"} <= set(environment)


@pytest.mark.parametrize("method", ["scgpt", "scgpt_spatial", "stofm", "novae"])
def test_a_method_without_weights_is_skipped_and_the_reason_names_the_key_of_the_config(slices, method):
    vectors, skipped = foreign.embed(method, given(slices), "run again")
    assert vectors == []
    assert f"evaluate.foreign_weights.{method}" in skipped
    assert skipped.endswith("Next step: run again")


@pytest.mark.parametrize("method", ["scgpt", "scgpt_spatial", "stofm", "novae"])
def test_a_folder_that_lacks_files_is_told_by_their_names(slices, method, tmp_path):
    _, skipped = foreign.embed(method, given(slices, weights=str(tmp_path)), "run again")
    assert str(tmp_path) in skipped
    assert "lacks" in skipped


@pytest.mark.parametrize(
    "error", [ImportError("no such thing"), OSError("undefined symbol"), AttributeError("np.float_")]
)
@pytest.mark.parametrize("method", ["banksy", "spagcn"])
def test_a_package_that_cannot_be_imported_is_a_reason_with_what_to_install(slices, method, error, monkeypatch):
    def fail(name):
        raise error

    monkeypatch.setattr(foreign_methods.importlib, "import_module", fail)
    vectors, skipped = foreign.embed(method, given(slices), "run again")
    assert vectors == []
    assert str(error) in skipped
    assert "pip install" in skipped


def test_a_method_of_human_genes_refuses_those_of_mouse(slices):
    mouse = given(slices, weights="x")
    mouse.sections[0].genes = np.array([f"ENSMUSG{i:011d}" for i in range(len(mouse.sections[0].genes))], dtype=object)
    for method in ("scgpt", "scgpt_spatial", "stofm"):
        assert "human genes alone" in foreign.embed(method, mouse, "x")[1]


def test_a_skipped_method_leaves_files_that_the_stages_note_and_go_on_without(slices, tmp_path):
    paths = written(slices, "novae", [], "no weights: set it", tmp_path)
    tensors = load_file(paths[0])
    assert (tensors["X"].shape, tensors["X"].dtype) == ((0, 0), np.float32)
    assert (tensors["spot"].shape, tensors["spot"].dtype) == ((0,), np.int32)
    sections, embeddings, notes = load(slices, {"novae": paths})
    assert len(sections) == 2
    assert embeddings == {}
    (note,) = [row for row in notes.rows if row["kind"] == "method_skipped"]
    assert (note["method"], note["detail"]) == ("novae", "no weights: set it")


def test_vectors_arrive_at_the_stages_slice_by_slice_in_the_order_of_spots(slices, tmp_path):
    sections = given(slices).sections
    vectors = [np.arange(3 * s.n_spots, dtype=np.float32).reshape(-1, 3) + 100 * i for i, s in enumerate(sections)]
    _, embeddings, notes = load(slices, {"scgpt": written(slices, "scgpt", vectors, "", tmp_path)})
    assert all((x == y).all() for x, y in zip(embeddings["scgpt"], vectors, strict=True))
    assert not [row for row in notes.rows if row["kind"] in ("method_skipped", "simulated")]


def test_the_same_vectors_give_the_same_bytes(slices, tmp_path):
    vectors, twice = [np.ones((s.n_spots, 3), np.float32) for s in given(slices).sections], []
    for again in ("once", "twice"):
        (tmp_path / again).mkdir()
        paths = written(slices, "scgpt", vectors, "", tmp_path / again)
        twice.append([path.read_bytes() for path in (tmp_path / again / "set.safetensors", *paths)])
    assert twice[0] == twice[1]


def test_a_dataset_file_without_the_slice_is_damage(slices, tmp_path):
    foreign.write(tmp_path / "set.safetensors", "scgpt", "set", ["a"], [np.ones((2, 2), np.float32)], "")
    with pytest.raises(DamagedFile, match="slices a"):
        foreign_slice.part(tmp_path / "set.safetensors", "b")


def test_vectors_that_are_not_one_finite_row_a_spot_stop_the_job(slices, monkeypatch):
    for wrong in (np.ones((3, 2)), np.full((given(slices).sections[0].n_spots, 2), np.nan)):
        monkeypatch.setitem(METHODS, "banksy", lambda _, wrong=wrong: [wrong, wrong])
        with pytest.raises(ValueError, match="banksy on slice a: found vectors of shape"):
            foreign.embed("banksy", given(slices), "x")


def test_a_table_for_others_has_raw_counts_under_each_symbol_once(slices):
    mine = given(slices)
    section, symbols = mine.sections[0], mine.symbols[0].copy()
    symbols[:3] = ["", "TWICE", "TWICE"]
    table = table_of(section, symbols)
    assert list(table.var_names[:1]) == ["TWICE"]
    assert table.shape == (section.n_spots, len(symbols) - 2)
    assert (table.X != section.counts[:, np.r_[1, 3 : len(symbols)]]).nnz == 0
    assert table.var["ensembl_id"].iloc[0] == section.genes[1]
    assert (table.obsm["spatial"] == section.position).all()


def weights_of_scgpt(folder, genes) -> str:
    (folder / "vocab.json").write_text(json.dumps({gene: i for i, gene in enumerate(["<pad>", "<cls>", *genes])}))
    for name in ("args.json", "best_model.pt", "all_dict_mean_std.csv"):
        (folder / name).write_text("{}")
    return str(folder)


@pytest.mark.parametrize("method", ["scgpt", "scgpt_spatial"])
def test_scgpt_gets_dense_counts_of_the_genes_it_knows_and_one_worker(slices, method, tmp_path, monkeypatch):
    """A stand-in for the package, with the signature of its `embed_data`; the real one is tried below."""
    seen = []

    def embed_data(
        adata_or_file, model_dir, gene_col="feature_name", max_length=1200, batch_size=64, obs_to_save=None,
        device="cuda", use_fast_transformer=True, return_new_adata=False,
    ):  # fmt: skip
        seen.append((adata_or_file, gene_col, use_fast_transformer, len(foreign_methods.os.sched_getaffinity(0))))
        adata_or_file.obsm["X_scGPT"] = adata_or_file.X[:, :4] / (1 + adata_or_file.X[:, :4].sum(1, keepdims=True))
        return adata_or_file

    tasks = types.ModuleType(f"{method}.tasks")
    tasks.embed_data = embed_data
    monkeypatch.setitem(sys.modules, method, types.ModuleType(method))
    monkeypatch.setitem(sys.modules, f"{method}.tasks", tasks)
    mine = given(slices)
    known = list(mine.symbols[0][::2])
    mine.weights = weights_of_scgpt(tmp_path, known)
    vectors, skipped = foreign.embed(method, mine, "x")
    assert skipped == ""
    table, gene_col, fast, cores = seen[0]
    assert (gene_col, fast, cores) == ("index", False, 1)
    assert list(table.var_names) == known
    assert isinstance(table.X, np.ndarray)
    assert (table.X == mine.sections[0].counts[:, ::2].toarray()).all()
    assert vectors[1].shape == (mine.sections[1].n_spots, 4)


def purity(vectors, sections) -> float:
    """Share of spots of the second section whose nearest spot of the first has their label."""
    from scipy.spatial import cKDTree

    nearest = cKDTree(vectors[0]).query(vectors[1])[1]
    return float(np.mean(sections[0].labels[nearest] == sections[1].labels))


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("method", "module"), [("banksy", "banksy"), ("spagcn", "SpaGCN")])
def test_baselines_by_their_real_packages_carry_the_planted_domains_across_sections(slices, method, module):
    pytest.importorskip(module)
    mine = given(slices)
    vectors, skipped = foreign.embed(method, mine, "x")
    again, _ = foreign.embed(method, mine, "x")
    assert skipped == ""
    assert all(np.array_equal(x, y) for x, y in zip(vectors, again, strict=True))
    chance = max(np.mean(mine.sections[1].labels == label) for label in set(mine.sections[1].labels))
    assert purity(vectors, mine.sections) > chance + 0.1
    generator = np.random.default_rng(0)
    shuffled = [vectors[0], generator.permutation(vectors[1])]
    assert purity(shuffled, mine.sections) < chance + 0.05


@pytest.mark.filterwarnings("default")
def test_novae_by_its_real_package_embeds_every_spot_from_weights_on_disk(slices, tmp_path):
    """Weights of a model that was never trained: the path is tried, not the model."""
    package = pytest.importorskip("novae")
    mine = given(slices)
    table = table_of(mine.sections[0], mine.symbols[0])
    package.spatial_neighbors(table, technology="visium")
    model = package.Novae([table], embedding_size=8, output_size=8, num_prototypes=8)
    model.mode.trained = True
    model.save_pretrained(str(tmp_path))
    mine.weights = str(tmp_path)
    vectors, skipped = foreign.embed("novae", mine, "x")
    assert skipped == ""
    assert [x.shape for x in vectors] == [(section.n_spots, 8) for section in mine.sections]
    assert all(x.std(axis=0).max() > 0 for x in vectors)


def test_absent_is_what_a_reason_is_made_of():
    with pytest.raises(Absent, match="sure_not_there can't be imported .*; install it"):
        foreign_methods.package("sure_not_there", "install it")
