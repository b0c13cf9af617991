"""The real rules from a table of slices to curated files, against a server on loopback that stands in for four public ones."""

from __future__ import annotations

import csv
import json
from dataclasses import replace

import anndata
import pytest
import yaml

from tests.conftest import ROOT
from tests.pipeline.conftest import snakemake
from tests.server import serving
from tests.unit.fetching import h5, zipped
from tests.unit.geo_deposits import PACKAGINGS, cellxgene, from_outs, spatial, tarred, tenx_h5, tree
from tests.unit.simulated import GENE_TABLES, SETTINGS
from workflow.catalogue import columns
from workflow.deposits import write_deposit
from workflow.simulate import simulate_slice

pytestmark = pytest.mark.pipeline

GEO = "https://ftp.ncbi.nlm.nih.gov/geo/samples/GSM900nnn"
TENX = "https://cf.10xgenomics.com/samples/spatial-exp/1.1.0/V1"
CELLXGENE = "https://datasets.cellxgene.cziscience.com/3a3b.h5ad"
ZENODO = "https://zenodo.org/records/1/files/S4.zip?download=1"


def write_table(path, rows: list[dict[str, str]]) -> None:
    blank = dict.fromkeys(columns(), "") | {"dataset": "d", "split": "train", "source": "geo", "organism": "human"}
    with open(path, "w", newline="") as table:
        writer = csv.DictWriter(table, columns(), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(blank | row for row in rows)


def write_config(directory, server, rows, **settings) -> None:
    write_table(directory / "mine.tsv", rows)
    write_table(directory / "none.tsv", [])
    tables = {"catalogue": "mine.tsv", "downstream": "none.tsv", "mirrors": server.mirrors}
    (directory / "mine.yaml").write_text(yaml.safe_dump(tables | {"min_free_gb": -1000} | settings))


def run(directory, *arguments, **options):
    return snakemake(*arguments, "--configfile", "mine.yaml", directory=directory, **options)


@pytest.fixture(scope="module")
def deposits(tmp_path_factory):
    """Four simulated sections as Space Ranger leaves them."""
    made = []
    for number in range(4):
        name = f"sim_{number}"
        section = simulate_slice(name, name, GENE_TABLES / "genes_human.tsv", replace(SETTINGS, n_genes=100))
        folder = tmp_path_factory.mktemp(name)
        write_deposit(section, "spaceranger-2", folder)
        (outs,) = folder.rglob("outs")
        made.append(from_outs(outs))
    return made


ROWS = [
    {"slice": "flat", "format": "geo", "url": f"{GEO}/GSM900001/suppl/"},
    {
        "slice": "tenx",
        "source": "10x",
        "format": "spaceranger",
        "url": f"{TENX}/V1_filtered_feature_bc_matrix.h5 {TENX}/V1_spatial.tar.gz",
    },
    {"slice": "portal", "source": "cellxgene", "format": "cellxgene", "url": CELLXGENE},
    {
        "slice": "packed",
        "source": "zenodo",
        "format": "spaceranger",
        "url": f"{ZENODO}#member=*/filtered_feature_bc_matrix.h5&member=*/spatial/*",
    },
    {"slice": "gone", "format": "geo", "url": f"{GEO}/GSM900002/suppl/"},
]


@pytest.fixture(scope="module")
def acquired(deposits, tmp_path_factory):
    """(directory, server, what the run printed) after five slices of four hosts were asked for, one of which is not there."""
    directory = tmp_path_factory.mktemp("acquire")
    flat, tenx, portal, packed = deposits
    with serving() as server:
        for name, data in PACKAGINGS["flat MEX"](flat, "GSM900001_A1").items():
            server.put(f"{GEO}/GSM900001/suppl/{name}", data)
        server.put(f"{GEO}/GSM900003/suppl/x", b"another sample")
        at = server.put(f"{TENX}/V1_filtered_feature_bc_matrix.h5", tenx_h5(tenx))
        server.script[at] = [{"status": 500}, {"status": 429, "headers": {"Retry-After": "1"}}, {"cut": 5000}]
        server.put(f"{TENX}/V1_spatial.tar.gz", tarred(spatial(tenx)))
        server.put(CELLXGENE, cellxgene(portal))
        server.files[server.path(ZENODO).split("?")[0]] = zipped(
            *{f"S4/{k}": v for k, v in tree(packed).items()}.items()
        )
        write_config(directory, server, ROWS, max_quarantined=0.5, genes=50, min_genes=0)
        done = run(directory, "--cores", 4, "results/curate/quarantine.tsv")
        yield directory, server, done.stdout


def curated(directory, name: str) -> anndata.AnnData:
    return anndata.read_h5ad(directory / f"results/slices/{name}.h5ad")


def quarantine(directory) -> list[dict[str, str]]:
    with open(directory / "results/curate/quarantine.tsv") as table:
        assert next(table).startswith("# stpatch quarantine")
        return list(csv.DictReader(table, delimiter="\t"))


def test_slices_of_every_host_are_curated_and_the_one_that_is_gone_does_not_stop_them(acquired, deposits):
    directory, _, _ = acquired
    for name, outs in zip(("flat", "tenx", "portal", "packed"), deposits, strict=True):
        found = curated(directory, name)
        assert found.n_obs == outs.counts.shape[0]
        assert found.X.sum() == outs.counts.sum()
    (gone,) = quarantine(directory)
    assert (gone["slice"], gone["stage"], gone["code"]) == ("gone", "download", "missing_file")
    assert gone["next_step"].endswith("; then run again with --forcerun resources/download/gone/files.json")


def test_the_terminal_shows_the_estimate_first_and_names_what_was_set_apart(acquired):
    _, _, printed = acquired
    assert "Estimate of what is still to do: 5 slices; 5 to download" in printed
    assert printed.index("Estimate") < printed.index("rule download")
    assert "set apart: [missing_file] slice gone" in printed


def test_the_interrupted_matrix_was_asked_for_by_range_and_what_was_seen_is_recorded(acquired):
    directory, server, _ = acquired
    asked = [found for path, found in server.seen if path.endswith("V1_filtered_feature_bc_matrix.h5")]
    assert asked == [None, None, None, "bytes=5000-"]
    lock = (directory / "resources/lock/tenx.tsv").read_text().splitlines()
    assert [line.split("\t")[1] for line in lock[1:]] == sorted(ROWS[1]["url"].split())


def test_once_it_is_there_the_next_step_fetches_the_slice_that_was_gone_and_no_other(acquired, deposits):
    directory, server, _ = acquired
    for name, data in PACKAGINGS["flat MEX"](deposits[1], "GSM900002_B").items():
        server.put(f"{GEO}/GSM900002/suppl/{name}", data)
    server.requests.clear()
    run(directory, "--cores", 2, "results/slices/gone.h5ad", *quarantine(directory)[0]["next_step"].split()[-2:])
    assert curated(directory, "gone").n_obs == deposits[1].counts.shape[0]
    assert {path.split("/")[5] for path, _ in server.seen} == {"GSM900002"}


def test_a_host_is_asked_by_few_jobs_at_a_time_and_hosts_side_by_side(tmp_path):
    rows = [{"slice": f"n{k}", "source": "geo", "format": "h5ad", "url": f"{GEO}/{k}.h5ad"} for k in range(4)]
    rows.append({"slice": "other", "source": "10x", "format": "h5ad", "url": f"{TENX}/x.h5ad"})
    body = h5(n=10_000)
    with serving() as server:
        for row in rows:
            at = server.put(row["url"], body)
            server.always[at] = {"drip": (len(body) // 5, 0.9)}
        write_config(tmp_path, server, rows)
        run(tmp_path, "--cores", 5, *(f"resources/download/{row['slice']}/files.json" for row in rows))
        assert server.most_at_once("/ftp.ncbi.nlm.nih.gov") <= 3  # of four, on five cores
        assert server.most_at_once() > 1
    listed = json.loads((tmp_path / "resources/download/n0/files.json").read_text())
    assert listed["files"][0]["bytes"] == len(body)


def test_a_disk_that_is_too_small_is_refused_before_the_first_job_and_a_dry_run_only_warns(tmp_path, server):
    server.path(CELLXGENE)
    write_config(tmp_path, server, [ROWS[2]], min_free_gb=10**6)
    warned = run(tmp_path, "--dry-run")
    assert "Estimate of what is still to do: 1 slices; 1 to download" in warned.stdout
    assert "Warning: a run of all of it would be refused. The disk is too small" in warned.stdout
    refused = run(tmp_path, "--cores", 1, check=False)
    assert refused.returncode != 0
    assert "The disk is too small: found" in refused.stdout
    assert "set min_free_gb in the config" in refused.stdout
    assert server.requests == []


def test_a_quiet_run_prints_no_estimate_and_an_unknown_fragment_ends_it_before_the_first_job(tmp_path, server):
    write_config(tmp_path, server, [ROWS[2] | {"url": CELLXGENE + "#mumber=x"}])
    failed = run(tmp_path, "--dry-run", check=False)
    assert failed.returncode != 0
    assert "mumber=x" in failed.stdout
    write_config(tmp_path, server, [ROWS[2]])
    assert "Estimate" not in run(tmp_path, "--dry-run", "--quiet").stdout


def test_the_defaults_of_config_and_repository_name_no_mirror():
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    assert config["mirrors"] == {}
    assert config["redirect_hosts"] == {}
