"""Real sections in every packaging that GEO has, and as CELLXGENE has them: the same curated counts, value for value."""

from __future__ import annotations

import json

import numpy as np
import pytest

from tests.conftest import ROOT
from tests.unit.geo_deposits import (
    PACKAGINGS,
    cellxgene,
    from_h5ad,
    from_outs,
    positions,
    same,
    tenx_h5,
)
from workflow.curate import curate, located
from workflow.download import download
from workflow.geo import sample_dir
from workflow.lock import Lock

pytestmark = pytest.mark.real

GENE_TABLES = ROOT / "catalogue" / "aux"
PREFIX = "GSM900001_A1LN"  # no such sample


def row(format: str, organism: str, **more: str) -> dict[str, str]:
    blank = dict.fromkeys(("url", "sha256", "bytes", "labels", "label_column"), "")
    return blank | {"slice": "real_t", "source": "geo", "format": format, "organism": organism} | more


@pytest.fixture(scope="module")
def placenta(real_data):
    folder = real_data / "spaceranger" / "cytassist_mouse_placenta"
    whole = curate(row("spaceranger", "mouse", source="file", url=str(folder)), GENE_TABLES)
    assert whole.shape == (2898, 19465)
    return from_outs(folder), whole


@pytest.fixture(scope="module")
def cortex(real_data):
    """A section that comes as h5ad; what is made of it is held against the h5ad itself."""
    path = real_data / "visium" / "dlpfc_151673_crop_allgenes.h5ad"
    whole = curate(row("h5ad", "human", source="file", url=str(path)), GENE_TABLES)
    assert whole.shape == (2929, 11381)
    return from_h5ad(path), whole[np.argsort(whole.obs_names.to_numpy().astype(str))]


def fetched(server, files: dict[str, bytes], tmp_path, organism: str):
    """A sample's folder with these files, downloaded and curated."""
    prefix = sample_dir("GSM900001")
    for name, data in files.items():
        server.put(prefix + name, data)
    wanted = row("geo", organism, url=prefix)
    download(wanted, tmp_path, Lock("real_t", tmp_path / "lock.tsv", []), mirrors=server.mirrors, backoff=0.01)
    return curate(wanted, GENE_TABLES, *located(wanted, tmp_path / "files.json"))


@pytest.mark.parametrize("packaging", PACKAGINGS)
def test_a_real_space_ranger_output_survives_every_packaging(packaging, placenta, server, tmp_path):
    outs, whole = placenta
    assert same(fetched(server, PACKAGINGS[packaging](outs, PREFIX), tmp_path, "mouse"), whole)


@pytest.mark.parametrize("packaging", ["flat h5", "scaled h5ad and MEX without barcodes"])
def test_a_real_h5ad_survives_as_flat_files_of_geo(packaging, cortex, server, tmp_path):
    outs, whole = cortex
    assert same(fetched(server, PACKAGINGS[packaging](outs, PREFIX), tmp_path, "human"), whole)


def test_a_real_h5ad_survives_as_a_space_ranger_folder(cortex, tmp_path):
    outs, whole = cortex
    (tmp_path / "spatial").mkdir()
    (tmp_path / "filtered_feature_bc_matrix.h5").write_bytes(tenx_h5(outs))
    (tmp_path / "spatial" / "tissue_positions.csv").write_text(positions(outs, header=True))
    (tmp_path / "spatial" / "scalefactors_json.json").write_text(json.dumps(outs.scale))
    assert same(curate(row("spaceranger", "human", url=str(tmp_path)), GENE_TABLES), whole)


def test_a_real_section_survives_as_a_cellxgene_file(placenta, tmp_path):
    outs, whole = placenta
    (tmp_path / "s.h5ad").write_bytes(cellxgene(outs, "NCBITaxon:10090"))
    curated = curate(row("cellxgene", "mouse", source="cellxgene", url=str(tmp_path / "s.h5ad")), GENE_TABLES)
    assert same(curated, whole)
