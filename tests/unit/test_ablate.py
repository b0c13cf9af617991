"""Ablations without Snakemake: what is planned, drawn, shared, estimated and shown."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.conftest import ROOT
from workflow import ablate, ablation_table
from workflow.errors import CatalogueError
from workflow.paper_tables import paper_scores

BASE = yaml.safe_load((ROOT / "config.yaml").read_text())
SHIPPED = sorted((ROOT / "ablations").glob("*.yaml"))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(**variants) -> ablate.Table:
    made = [ablate.Variant(name, **given) for name, given in variants.items()]
    return ablate.Table("tried", "Tried", 4, "cells", made)


def pretend(run: ablate.Run, accuracy: float, dataset: str = "DLPFC", head: str = "mlp") -> None:
    """Scores of a run, with a control that is .1 better; two splits about the mean."""
    rows = [
        (dataset, section, method, head, "random20", split, metric, value + more)
        for section in ("a", "pooled")
        for method, more in (("stpatch", 0), ("untrained", -0.2), ("pca", 0.1))
        for metric, value in (("accuracy", accuracy), ("ari", accuracy / 2))
        for split in (0, 1)
    ]
    found = pd.DataFrame(rows, columns="dataset section method head protocol split metric value".split())
    found.loc[found["section"] == "a", "value"] = 0.9  # not what the tables show
    found["value"] += found["split"].map({0: -0.01, 1: 0.01})
    run.scores.parent.mkdir(parents=True, exist_ok=True)
    found.to_csv(run.scores, sep="\t", index=False)
    (run.scores.parent / "notes.tsv").write_text("dataset\tstage\tkind\n")
    (run.folder / ablate.CONFIG).write_text(yaml.safe_dump(run.config))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_table_has_variants_that_the_config_and_the_paper_know(path):
    shipped = ablate.read_table(path)
    runs = ablate.plan(shipped, BASE, [0, 3])
    assert len(runs) == 2 * len(shipped.variants) >= 4
    assert len({str(run.folder) for run in runs}) == len(runs)
    configs = [run.config | {"share": run.variant.share} for run in runs if run.seed == 3]
    assert all(one != other for i, one in enumerate(configs) for other in configs[:i])
    assert {run.config["seed"] for run in runs} == {run.config["pretrain"]["seed"] for run in runs} == {0, 3}
    if shipped.mirrors:
        named = {variant.paper for variant in shipped.variants}
        assert named == set(paper_scores(table=shipped.mirrors)["method"])


def test_the_tables_that_the_paper_has_and_those_that_it_lacks_are_shipped():
    assert {path.stem for path in SHIPPED} == {
        *("window", "channels", "selection", "unit", "layout", "genes_at_inference", "corpus_size")
    }


def test_an_unknown_key_names_the_file_and_the_key(here):
    Path("bad.yaml").write_text("title: x\nvariant: {}\n")
    with pytest.raises(CatalogueError, match=r"bad\.yaml: found the keys \['title', 'variant'\]"):
        ablate.read_table("bad.yaml")
    Path("bad.yaml").write_text("title: x\nvariants: {one: {cfg: {}}}\n")
    with pytest.raises(CatalogueError, match=r"variant 'one' with \['cfg'\]"):
        ablate.read_table("bad.yaml")


def test_a_typo_in_a_variant_fails_before_anything_runs():
    with pytest.raises(CatalogueError, match="did you mean 'window'"):
        ablate.plan(table(wide={"overlay": {"windw": [8, 8]}}), BASE, [0])


@pytest.mark.parametrize("results", ["/scratch/results", "../results"])
def test_results_that_no_folder_of_a_run_can_hold_are_refused(results):
    with pytest.raises(CatalogueError, match="'results': found .*below the working directory"):
        ablate.plan(table(one={"overlay": {}}), BASE | {"results": results}, [0])


def test_an_overlay_changes_its_keys_and_no_other():
    base = {"a": {"b": 1, "c": [1, 2]}, "d": 2}
    assert ablate.merged(base, {"a": {"c": [3]}}) == {"a": {"b": 1, "c": [3]}, "d": 2}
    assert base == {"a": {"b": 1, "c": [1, 2]}, "d": 2}
    assert ablate.differing(base, {"a": {"b": 1, "c": [3]}, "e": 0}) == 3  # a.c, d, e


def rows(n_donors: int = 20, each: int = 3) -> list[dict[str, str]]:
    train = [
        {"slice": f"s{d}_{i}", "dataset": "x", "donor": f"d{d}", "split": "train"}
        for d in range(n_donors)
        for i in range(each)
    ]
    return [*train, {"slice": "v", "dataset": "x", "donor": "d0", "split": "val"}]


@pytest.mark.parametrize("share", [0.01, 0.1, 0.5, 1.0])
def test_a_share_of_the_corpus_is_whole_donors_and_enough_of_them(share):
    kept = ablate.draw_slices(rows(), share, seed=0)
    train = [row for row in kept if row["split"] == "train"]
    assert share * 60 <= len(train) < share * 60 + 3
    assert all(sum(row["donor"] == other["donor"] for other in train) == 3 for row in train)
    assert kept[-1]["slice"] == "v"


def test_a_smaller_share_is_part_of_a_larger_one_and_another_seed_draws_others():
    names = {(seed, share): {row["slice"] for row in ablate.draw_slices(rows(), share, seed)} for seed in (0, 1) for share in (0.1, 0.4)}  # fmt: skip
    assert names[0, 0.1] < names[0, 0.4]
    assert names[0, 0.1] != names[1, 0.1]


def test_slices_of_unknown_donors_are_drawn_one_by_one():
    blank = [row | {"donor": ""} for row in rows()]
    assert sum(row["split"] == "train" for row in ablate.draw_slices(blank, 0.1, 0)) == 6


def test_a_smaller_corpus_is_a_table_of_slices_in_the_runs_own_folder(here):
    base = BASE | {"catalogue": "demo/catalogue.tsv"}
    (run,) = ablate.plan(table(little={"overlay": {}, "share": 0.1}), base, [0])
    ablate.prepare(run, base)
    assert run.config["catalogue"] == ablate.REDUCED
    with open(run.folder / ablate.REDUCED, newline="") as file:
        kept = list(csv.DictReader(file, delimiter="\t"))
    assert [row["split"] for row in kept].count("train") == 1  # of three
    assert [row["slice"] for row in kept if row["split"] == "val"] == ["sim_d"]


def build_something(folder: Path) -> None:
    """What a run of Snakemake leaves, in small."""
    for name in ("results/slices/a.h5ad", "results/grids/a.zarr/zarr.json", "resources/download/a/x.h5"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    for name in (
        *("results/logs/grid/a.log", "results/benchmarks/grid/a.tsv", "results/pretrain/model/snapshots/1"),
        *("resources/download/a/y.h5.part", "results/report.html", "results/annotated/a.h5ad"),
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("grows in place")
    for name in ("metadata/x", "incomplete/x"):
        (folder / ".snakemake" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / ".snakemake" / name).write_text("record")


def test_a_clone_shares_files_has_records_of_its_own_and_sees_the_users_files(here):
    build_something(here)
    Path("mine").mkdir()
    Path("mine/a.h5ad").write_text("mine")
    Path("table.tsv").write_text("mine")
    (run,) = ablate.plan(table(one={"overlay": {"genes": 8}}), BASE, [0])
    ablate.prepare(run, BASE)
    for name in ("results/slices/a.h5ad", "results/grids/a.zarr/zarr.json", "resources/download/a/x.h5"):
        assert (run.folder / name).samefile(name)
    for name in ("logs", "benchmarks", "ablations", "pretrain/model/snapshots", "report.html", "annotated"):
        assert not (run.folder / "results" / name).exists()
    assert not (run.folder / "resources/download/a/y.h5.part").exists()
    for name in ("metadata/x", "incomplete/x"):
        copied, own = run.folder / ".snakemake" / name, Path(".snakemake") / name
        assert copied.read_text() == own.read_text()
        assert not copied.samefile(own)
    assert (run.folder / "mine/a.h5ad").read_text() == (run.folder / "table.tsv").read_text() == "mine"
    assert (run.folder / "table.tsv").lstat().st_mtime_ns == Path("table.tsv").stat().st_mtime_ns
    assert yaml.safe_load((run.folder / ablate.CONFIG).read_text()) == run.config
    ablate.prepare(run, BASE)  # there already


def test_a_clone_of_what_snakemake_is_at_work_on_is_refused(here):
    build_something(here)
    Path(".snakemake/locks").mkdir()
    Path(".snakemake/locks/0.input.lock").write_text("")
    (run,) = ablate.plan(table(one={"overlay": {}}), BASE, [0])
    with pytest.raises(CatalogueError, match="locked by a run of Snakemake"):
        ablate.prepare(run, BASE)
    assert not run.folder.exists()


def test_the_nearest_finished_run_is_the_one_that_is_cloned(here):
    runs = ablate.plan(
        table(base={"overlay": {}}, unit={"overlay": {"pretrain": {"unit": "spot"}}}), BASE, seeds=[0, 5]
    )
    assert ablate.nearest(runs[0], BASE) is None  # nothing was built yet
    build_something(here)
    assert ablate.nearest(runs[0], BASE) == Path()
    pretend(runs[2], 0.5)  # base, seed 5
    assert ablate.nearest(runs[0], BASE) == Path()
    assert ablate.nearest(runs[3], BASE) == runs[2].folder  # differs in its unit alone, the user's own in its seeds too
    assert ablate.nearest(runs[1], BASE) == Path()
    assert runs[2].finished
    assert not runs[3].finished


def test_time_is_estimated_from_what_a_run_took_and_from_the_size_of_the_windows(here):
    tried = table(same={"overlay": {}}, wide={"overlay": {"window": [32, 32]}})  # four times the cells
    base = BASE | {"max_coverage": 0, "windows_per_slice": 512}  # as many of a wide one
    runs = ablate.plan(tried, base, [0])
    assert "nothing was timed yet" in ablate.estimate(runs, base, 2)
    assert "2 of 2 runs to do: 1,024 windows" in ablate.estimate(runs, base, 2)
    for rule, seconds in {"pretrain/model": [500], "windows/a": [100], "windows/b": [100], "score/x": [80]}.items():
        path = Path(f"results/benchmarks/{rule}.tsv")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("s\th:m:s\n" + "".join(f"{value}\tx\n" for value in seconds))
    # rounded up: (500 + 200 / 2) * (1 + 4) + 2 * 80 / 2 = 3,080 s
    assert "at most about 52 min on 2 cores" in ablate.estimate(runs, base, 2)
    pretend(runs[1], 0.5)
    assert "1 of 2 runs to do: at most about 11 min" in ablate.estimate(runs, base, 2)


def test_a_dry_run_says_what_would_be_done_and_makes_nothing(here, capsys):
    assert ablate.main([str(ROOT / "ablations/channels.yaml"), "--seeds", "0", "1", "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("to do results/ablations/channels/") == 6
    assert "results/ablations/channels/channels_128/seed1" in printed
    assert list(here.iterdir()) == []


def test_ours_are_means_over_splits_and_seeds_beside_the_papers_and_the_strongest_control(here):
    tried = table(
        w8={"overlay": {"window": [8, 8]}, "x": 8, "paper": "patch_8"},
        w16={"overlay": {}, "x": 16, "paper": "patch_16"},
        w99={"overlay": {"window": [9, 9]}, "x": 9},
    )
    runs = ablate.plan(tried, BASE, [0, 1])
    for run, accuracy in zip(runs, (0.5, 0.6, 0, 0.54, 0.62, 0), strict=True):
        if accuracy:
            pretend(run, accuracy)
    done = [run for run in runs if run.scores.exists()]
    paths = ablation_table.write(tried, done, Path("results/ablations"))
    assert [path.name for path in paths] == ["tried.tsv", "tried.md", "tried.html", "tried.png"]
    found = pd.read_csv(paths[0], sep="\t")
    assert list(found) == ablation_table.COLUMNS
    text = paths[1].read_text()
    assert "| w8 | stpatch | .520 ± .020 / .260 ± .010 | .520 ± .020 / .260 ± .010 |" in text
    assert "| w16 | untrained | .410 ± .010 /" in text
    assert "| w8 | paper | .652 / .370 [dlpfc_size] | .622 / .344 |" in text  # Tables 1 and 4
    assert "| w16 | paper | .753 / .580 [dlpfc_size] | .662 / .428 [mean_ari, mean_accuracy] |" in text
    assert "47,329 labelled spots" in text  # the footnote
    assert "|  | strongest control | .620 ± .020 / .360 ± .010 (pca) |" in text
    assert "Not built yet: w99" in text
    assert "SIMULATED" not in text
    page = paths[2].read_text()
    assert "data:image/png;base64," in page
    assert "<td>w8</td><td>paper</td>" in page


def test_where_the_papers_head_did_not_run_its_table_stands_alone(here):
    tried = table(w8={"overlay": {"window": [8, 8]}, "paper": "patch_8"})
    (run,) = ablate.plan(tried, BASE, [0])
    pretend(run, 0.5, dataset="mine", head="logistic")
    made = ablation_table.write(tried, [run], Path("results/ablations"))
    text = made[1].read_text()
    assert "SIMULATED DATA" not in text
    (run.scores.parent / "notes.tsv").write_text("dataset\tstage\tkind\nmine\tscore\tsimulated\n")
    for path in ablation_table.write(tried, [run], Path("results/ablations"))[1:]:
        assert "SIMULATED DATA" in path.read_text()
    assert len(made) == 3  # one point is no curve
    assert "47,329" not in text  # a note on a dataset that is not shown
    ours, papers = text.split("the paper's Table 4".replace("the", "The"))
    assert "paper |" not in ours
    assert "| w8 | paper | .622 / .344 |" in papers
    assert "head mlp did not run here" in papers


def test_a_dataset_that_one_seed_lacks_leaves_that_seed_out_of_the_mean():
    columns = ["dataset", "seed", "metric", "value"]
    found = pd.DataFrame(
        [("a", 0, "accuracy", 0.2), ("b", 0, "accuracy", 0.4), ("a", 1, "accuracy", 0.9)], columns=columns
    )
    *each, mean = ablation_table.by_dataset(found, ["a", "b"])
    assert each[0]["accuracy"] == [0.2, 0.9]
    assert mean["accuracy"] == [pytest.approx(0.3)]
    assert ablation_table.cell(mean) == ".300 / -"
    assert ablation_table.cell({"accuracy": [], "ari": []}) == ""
    assert ablation_table.cell({"accuracy": [1.0], "ari": [-0.05]}) == "1.000 / -.050"


def test_a_run_of_some_variants_gathers_all_that_were_scored_and_a_failed_one_is_named(here, monkeypatch, capsys):
    Path("tried.yaml").write_text(
        yaml.safe_dump({"title": "Tried", "variants": {"a": {}, "b": {"config": {"genes": 8}}}})
    )
    runs = ablate.plan(ablate.read_table("tried.yaml"), BASE, [0])
    pretend(runs[0], 0.5)
    asked = []

    def build(run, cores, more):
        asked.append((run.variant.name, cores, more))
        return bool(more)

    monkeypatch.setattr(ablate, "build", build)
    command = ["tried.yaml", "--variants", "b", "--cores", "3"]
    assert ablate.main(command) == 1
    assert "failed: results/ablations/tried/b/seed0" in capsys.readouterr().out
    assert set(pd.read_csv("results/ablations/tried.tsv", sep="\t")["variant"]) == {"a"}
    pretend(runs[1], 0.6)
    assert ablate.main([*command, "--", "--profile", "mine"]) == 0
    assert asked == [("b", 3, []), ("b", 3, ["--profile", "mine"])]
    assert set(pd.read_csv("results/ablations/tried.tsv", sep="\t")["variant"]) == {"a", "b"}
