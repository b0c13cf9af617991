"""What verify sees, on a finished folder of tiny simulated slices: nothing where all is whole, and each damage by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.conftest import ROOT
from trainer.files import as_safetensors
from workflow import verify as module
from workflow.components import write_components
from workflow.grid import make_grid, read_grid, write_grid
from workflow.moments import moments, write_moments
from workflow.reading import read_safetensors, seal
from workflow.regions import Regions, encode
from workflow.sample import Field
from workflow.shards import write_shards
from workflow.simulate import tiny_slice
from workflow.sketch import sketch_slice, write_sketch
from workflow.stats import merge_moments, read_moments, read_vocabulary, write_vocabulary
from workflow.verify import checks, findings, main, verify
from workflow.whole import whole_slice
from workflow.windows import write_pack

SETTINGS = {
    "layout": "auto", "pitch_um": 100, "window": [8, 8], "genes": 20, "windows_per_slice": 12, "selection": "weighted",
    "epsilon": 1e-6, "min_observed": 0.5, "target_sum": 10000, "codec": "lz4", "shard_mb": 1, "seed": 0,
    "allow_contamination": False,
}  # fmt: skip
DRAW = {key: SETTINGS[key] for key in ("selection", "epsilon", "min_observed", "seed")}


def build(results):
    """Every kind of file that has a check, by the stages' own functions, without Snakemake."""
    for folder in ("slices", "sketches", "grids", "stats/moments", "windows", "shards/slices", "embeddings/stpatch"):
        (results / folder).mkdir(parents=True)
    (results / "annotated").mkdir()
    (results / "pretrain/model").mkdir(parents=True)
    (results / "curate").mkdir()
    for seed, name in enumerate(("a", "b")):
        slice_ = tiny_slice(seed=seed, name=name)
        slice_.uns["stpatch"]["inputs"] = '[{"path": "x.h5", "bytes": 1, "sha256": "0"}]'
        slice_.write_h5ad(results / f"slices/{name}.h5ad", compression="gzip", convert_strings_to_categoricals=False)
        seal(results / f"slices/{name}.h5ad")
        write_sketch(sketch_slice(results / f"slices/{name}.h5ad"), results / f"sketches/{name}.npz")
        grid = make_grid(slice_, "auto", 100)
        write_grid(grid, results / f"grids/{name}.zarr")
        found = moments(grid, SETTINGS["target_sum"])
        write_moments(results / f"stats/moments/{name}.npz", grid.gene_ids, slice_.var["symbol"], found)
        X = np.random.default_rng(seed).normal(size=(slice_.n_obs, 4)).astype(np.float32)
        about = {"format_version": "1", "slice": name, "model": "model", "simulated": "true"}
        embedding = {"X": X, "spot": np.arange(slice_.n_obs, dtype=np.int32)}
        save_file(embedding, results / f"embeddings/stpatch/{name}.safetensors", metadata=about)
        slice_.obsm["X_stpatch"] = X
        slice_.write_h5ad(results / f"annotated/{name}.h5ad", convert_strings_to_categoricals=False)
        seal(results / f"annotated/{name}.h5ad")
    genes = results / "stats/genes.tsv"
    write_vocabulary(merge_moments(read_moments(sorted((results / "stats/moments").glob("*.npz")))), genes)
    sha256, vocabulary = hashlib.sha256(genes.read_bytes()).hexdigest(), read_vocabulary(genes).gene_id
    axes = np.eye(len(vocabulary), 3, dtype=np.float32)
    noise = np.ones(len(vocabulary), np.float32)
    write_components(results / "stats/components.safetensors", axes, np.ones(3, np.float32), noise, sha256)
    packs = []
    for name in ("a", "b"):
        grid, pack = read_grid(results / f"grids/{name}.zarr"), results / "windows" / name
        facts, field = {"pitch_um": 100.0, "layout": grid.layout}, Field(grid, vocabulary, SETTINGS["window"], 10000)
        write_pack(field, facts, f"{pack}.bin", f"{pack}.npy", n=12, m=20, codec_name="lz4", **DRAW)
        packs.append((f"{pack}.bin", f"{pack}.npy"))
        whole = whole_slice(grid, vocabulary, genes_sha256=sha256, target_sum=10000, codec_name="lz4", simulated=True)
        (results / f"shards/slices/{name}.tar").write_bytes(whole)
    rows = [{"slice": name, "source": "simulated", "organism": "human", "donor": name} for name in ("a", "b")]
    parts = {"rows": rows, "settings": SETTINGS, "components": results / "stats/components.safetensors"}
    moments_of = [results / f"stats/moments/{name}.npz" for name in ("a", "b")]
    index = write_shards(results / "shards/train", packs, genes, split="train", **parts, moments=moments_of)
    write_shards(results / "shards/val", packs[:0], genes, split="val", **parts | {"rows": []})
    shutil.rmtree(results / "windows")
    model = results / "pretrain/model"
    shutil.copyfile(genes, model / "genes.tsv")
    data = {key: index[key] for key in ("genes", "m", "target_sum", "selection", "simulated")}
    config = {"format_version": 1, "model": {"width": 4}, "train": {"steps": 2}, "data": data}
    (model / "config.json").write_text(json.dumps(config))
    (model / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n')
    for name in ("README.md", "curve.svg"):
        (model / name).touch()
    weights = {"gene_embedding.weight": np.ones((len(vocabulary), 4), np.float32)}
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    for name, header in module.TABLES.items():
        header = header or (*module.columns(), "n_spots", "n_genes")
        (results / f"curate/{name}.tsv").write_text(f"# stpatch {name} 1\n" + "\t".join(header) + "\n")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    results = tmp_path_factory.mktemp("whole") / "results"
    build(results)
    return results


@pytest.fixture
def results(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "results")
    return tmp_path / "results"


def found_in(results, *names):
    """Problems of the files named, or of all."""
    chosen = {results / name for name in names}
    return [
        problem for path, check in checks(results).items() if not names or path in chosen for problem in findings(check)
    ]


OTHERS = (
    "shards/train/index.json",
    "shards/slices/a.tar",
    "pretrain/model/model.safetensors",
)  # that know of the index


def flip(path, at: int | None = None) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if at is None else at] ^= 1
    path.write_bytes(content)


def chunk_of_counts(h5ad) -> int:
    """A place among the compressed counts of a curated slice."""
    with h5py.File(h5ad) as file:
        return file["X/data"].id.get_chunk_info(0).byte_offset + 100


def test_a_whole_folder_has_no_problem_and_every_kind_of_file_is_looked_at(whole):
    assert verify(whole, 2) == []
    looked_at = {str(path.relative_to(whole).parent) for path in checks(whole)}
    assert looked_at == {
        *("slices", "sketches", "grids", "stats", "stats/moments", "shards/train", "shards/val", "shards/slices"),
        *("embeddings/stpatch", "annotated", "pretrain/model", "curate"),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("damaged", "blamed", "removed"),
    [
        ("slices/a.h5ad", "slices/a.h5ad", "slices/a.h5ad"),
        ("sketches/a.npz", "sketches/a.npz", "sketches/a.npz"),
        ("grids/a.zarr/counts/c/0/0/0", "grids/a.zarr", "grids/a.zarr"),
        ("grids/a.zarr/cell/c/0", "grids/a.zarr", "grids/a.zarr"),
        ("stats/moments/a.npz", "stats/moments/a.npz", "stats/moments/a.npz"),
        ("stats/genes.tsv", "stats/genes.tsv", "stats/genes.tsv"),
        ("stats/components.safetensors", "stats/components.safetensors", "stats/components.safetensors"),
        ("shards/train/train-000000.tar", "shards/train/train-000000.tar", "shards/train/index.json"),
        ("shards/train/samples.npy", "shards/train/samples.npy", "shards/train/index.json"),
        ("shards/train/genes.tsv", "shards/train/genes.tsv", "shards/train/index.json"),
        ("shards/train/components.safetensors", "shards/train/components.safetensors", "shards/train/index.json"),
        ("shards/train/means.safetensors", "shards/train/means.safetensors", "shards/train/index.json"),
        ("shards/slices/a.tar", "shards/slices/a.tar", "shards/slices/a.tar"),
        ("embeddings/stpatch/a.safetensors", "embeddings/stpatch/a.safetensors", "embeddings/stpatch/a.safetensors"),
        ("annotated/a.h5ad", "annotated/a.h5ad", "annotated/a.h5ad"),
        ("pretrain/model/genes.tsv", "pretrain/model/genes.tsv", "pretrain/model/model.safetensors"),
    ],
)
def test_a_flipped_bit_is_found_in_its_file_and_the_command_deletes_what_makes_it_again(
    results, damaged, blamed, removed
):
    flip(results / damaged, chunk_of_counts(results / damaged) if damaged.startswith("slices/") else None)
    problems = {problem.file: problem for problem in found_in(results)}
    assert results / blamed in problems
    assert results / removed in problems[results / blamed].remove
    assert f"rm -r {results / removed}" in str(problems[results / blamed])


@pytest.mark.parametrize("member", [".counts.blosc", ".sites.blosc", ".cell.blosc", ".json"])
def test_a_flipped_bit_in_any_member_of_a_whole_slice_is_found(results, member):
    path = results / "shards/slices/a.tar"
    start = path.read_bytes().index(f"a{member}".encode()) + 512
    for offset in (20, 33, 50):  # beyond Blosc's header, whose flags are in part without effect
        shutil.copyfile(path, results / "kept")
        flip(path, start + offset)
        assert {problem.file for problem in found_in(results, "shards/slices/a.tar")} == {path}, (member, offset)
        shutil.copyfile(results / "kept", path)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": 1}, "samples in another order"),
        ({"n_samples": 23}, "samples by four counts"),
        ({"m": 21}, "facts"),
        ({"simulated": False}, "simulated"),
        ({"format_version": 2}, "format_version"),
        ({"target_sum": 20000}, "target_sum"),
        ({"selection": "hvg"}, "hvg"),
    ],
)
def test_an_index_that_says_something_else_than_its_samples_or_its_model_is_found(results, change, says):
    path = results / "shards/train/index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change, indent=1) + "\n")
    problems = [problem for problem in found_in(results, *OTHERS) if path in problem.remove]
    assert any(says in str(problem) for problem in problems)


@pytest.mark.parametrize(
    "lost", ["shards/train/train-000000.tar", "shards/train/samples.npy", "pretrain/model/genes.tsv"]
)
def test_a_lost_file_that_no_rule_declares_or_that_others_record_is_named(results, lost):
    (results / lost).unlink()
    assert any(problem.file == results / lost for problem in found_in(results))


def test_a_lost_chunk_that_zarr_reads_as_zeros_is_found(results):
    (results / "grids/a.zarr/counts/c/0/0/0").unlink()
    (problem,) = [problem for problem in found_in(results, "grids/a.zarr")]
    assert "'counts' with sha256" in problem.found


def test_a_tar_of_an_earlier_run_beside_the_shards_is_found(results):
    (results / "shards/val/val-000000.tar").write_bytes(bytes(1024))
    (problem,) = found_in(results)
    assert problem.remove == (results / "shards/val/index.json",)


def test_a_name_changed_in_a_slice_is_found_by_its_annotated_copy_and_both_are_made_again(results):
    with h5py.File(results / "slices/a.h5ad", "r+") as file:
        file["obs/_index"][0] = "another spot"
    (problem,) = found_in(results)
    assert problem.remove == (results / "annotated/a.h5ad", results / "slices/a.h5ad")


def test_a_slice_that_was_changed_after_its_grid_was_made_is_blamed_and_not_the_grid(results):
    slice_ = tiny_slice(seed=7, name="a")
    slice_.write_h5ad(results / "slices/a.h5ad", convert_strings_to_categoricals=False)
    blamed = {problem.file for problem in found_in(results)}
    assert results / "slices/a.h5ad" in blamed
    assert results / "grids/a.zarr" not in blamed


def test_a_recorded_hash_of_an_embedding_is_held_against_its_values(results):
    path = results / "embeddings/stpatch/b.safetensors"
    (results / "annotated/b.h5ad").unlink()
    about = {"format_version": "1", "slice": "b", "sha256": "0" * 64}
    save_file(load_file(path), path, metadata=about)
    (problem,) = found_in(results)
    assert problem.file == path
    assert "other bytes than were written" in problem.found


@pytest.mark.parametrize("name", ["slices/a.h5ad", "annotated/a.h5ad"])
def test_no_bit_of_a_sealed_file_can_be_flipped_unseen_wherever_it_lies(results, name):
    path, rng = results / name, np.random.default_rng(0)
    size = path.stat().st_size
    for at in (*rng.integers(0, size, 12), size - 1, size - 40, size - 75):
        flip(path, at)
        (problem,) = {problem.file for problem in found_in(results, name)}
        assert problem == path
        flip(path, at)
    assert found_in(results, name) == []


@pytest.mark.parametrize("name", ["pretrain/model/model.safetensors", "embeddings/stpatch/b.safetensors"])
def test_a_flipped_bit_in_what_the_trainer_sealed_is_found_though_nothing_else_has_its_values(results, name):
    path = results / name
    (results / "annotated/b.h5ad").unlink()
    about = read_safetensors(path)
    path.write_bytes(as_safetensors(*about))
    assert found_in(results, name) == []
    for at in (-1, -20, 30):
        flip(path, path.stat().st_size + at if at < 0 else at)
        assert path in {problem.file for problem in found_in(results, name)}
        path.write_bytes(as_safetensors(*about))


def test_a_model_of_fixed_embeddings_is_held_against_the_vocabulary_by_its_loadings(results):
    path = results / "pretrain/model/model.safetensors"
    n = json.loads((results / "pretrain/model/config.json").read_text())["data"]["genes"]["n"]
    shutil.copyfile(results / "stats/components.safetensors", path.parent / "components.safetensors")
    save_file({"gene_loading": np.ones((n, 3), np.float32)}, path, metadata={"format": "pt"})
    assert found_in(results, "pretrain/model/model.safetensors") == []
    save_file({"gene_loading": np.ones((n - 1, 3), np.float32)}, path, metadata={"format": "pt"})
    (problem,) = found_in(results, "pretrain/model/model.safetensors")
    assert "genes with an embedding" in problem.found
    save_file({"other": np.ones((n, 3), np.float32)}, path, metadata={"format": "pt"})
    assert {problem.file for problem in found_in(results, "pretrain/model/model.safetensors")} == {path}


def test_the_file_of_a_foreign_method_that_was_skipped_holds_nothing_and_is_no_problem(results):
    path = results / "embeddings/novae/a.safetensors"
    path.parent.mkdir()
    about = {"format_version": "1", "slice": "a", "model": "novae", "skipped": "no weights"}
    empty = {"X": np.zeros((0, 0), np.float32), "spot": np.zeros(0, np.int32)}
    save_file(empty, path, metadata=about)
    assert found_in(results, "embeddings/novae/a.safetensors") == []
    save_file(empty | {"spot": np.zeros(3, np.int32)}, path, metadata=about)
    assert len(found_in(results, "embeddings/novae/a.safetensors")) == 1


def test_regions_are_held_against_their_seal_their_grid_and_their_vocabulary(results):
    path, grid = results / "regions/a.safetensors", read_grid(results / "grids/a.zarr")
    empty, genes = np.empty(0, np.int32), hashlib.sha256((results / "stats/genes.tsv").read_bytes()).hexdigest()
    regions = Regions(empty, empty, empty.reshape(0, 5), [], [], {})
    path.parent.mkdir()
    path.write_bytes(encode(regions, grid, genes_sha256=genes, seed=0, simulated=True))
    assert found_in(results, "regions/a.safetensors") == []
    flip(path)
    (problem,) = found_in(results, "regions/a.safetensors")
    assert problem.remove == (path,)
    path.write_bytes(encode(regions, grid, genes_sha256="0" * 64, seed=0, simulated=True))
    (problem,) = found_in(results, "regions/a.safetensors")
    assert "genes_sha256" in problem.found
    path.write_bytes(encode(regions, read_grid(results / "grids/b.zarr"), genes_sha256=genes, seed=0, simulated=True))
    (problem,) = found_in(results, "regions/a.safetensors")
    assert "format_version, slice, h and w" in problem.found


def test_half_an_index_is_one_problem_and_the_other_files_are_still_checked(results):
    path = results / "shards/train/index.json"
    path.write_text(path.read_text()[:200])
    flip(results / "sketches/b.npz")
    assert {problem.file for problem in found_in(results)} == {path, results / "sketches/b.npz"}


def test_a_file_that_takes_its_reader_down_is_named_and_the_others_are_still_checked(results, monkeypatch):
    victim, other = results / "slices/a.h5ad", results / "sketches/b.npz"
    monkeypatch.setattr(module, "checks", lambda folder: {victim: DEADLY, other: checks(folder)[other]})
    flip(other)
    assert {problem.file for problem in verify(results, 2)} == {victim, other}


DEADLY = module.partial(os._exit, 9)


def test_the_command_prints_a_line_a_problem_and_ends_with_1_or_0_and_imports_no_torch(results, capsys):
    command = "import sys; from workflow.verify import main; main(sys.argv[1:])"
    check = f"try:\n    {command.replace('; ', chr(10) + '    ')}\nfinally:\n    assert 'torch' not in sys.modules\n"
    done = subprocess.run(
        [sys.executable, "-c", "import sys\n" + check, str(results)], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "0 problems\n"), done.stderr
    flip(results / "sketches/b.npz")
    with pytest.raises(SystemExit) as ended:
        main([str(results)])
    assert ended.value.code == 1
    line, count = capsys.readouterr().out.splitlines()
    assert count == "1 problems"
    assert line.startswith(f"{results}/sketches/b.npz: found ")
    assert line.endswith(f"Next step: rm -r {results}/sketches/b.npz; then run again")


def test_a_folder_without_results_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main([str(tmp_path)])
    assert ended.value.code == 2
    assert "nothing to check" in capsys.readouterr().err
