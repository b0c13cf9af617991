"""Curate on real slices: counts kept to the last, lattices found, the wrong organism told."""

from __future__ import annotations

import gzip
import shutil

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.spatial import cKDTree

from tests.conftest import ROOT
from workflow.curate import curate
from workflow.errors import MissingPositions, PositionsMismatch, UnknownFormat, WrongOrganism
from workflow.grid import make_grid
from workflow.keys import Keys
from workflow.lattice import infer_lattice, known_lattice, plane
from workflow.readers import read_deposit
from workflow.sources import files_at

pytestmark = pytest.mark.real

GENE_TABLES = ROOT / "catalogue" / "aux"
# name: (organism, spots in tissue, genes kept)
VISIUM = {
    "dlpfc_151673_crop_allgenes": ("human", 2929, 11381),
    "dlpfc_151674_crop_allgenes": ("human", 2877, 12381),
    "dlpfc_151673_whole_hvg5000": ("human", 3639, 5000),
    "human_lymph_node_10x": ("human", 3962, 18467),
    "breast_brca0_visium": ("human", 1864, 14325),
    "dlpfc_Br8325_ant_5000genes": ("human", 3529, 5000),
    "mouse_brain_sagittal_anterior_2000genes": ("mouse", 2487, 1922),
}
HER2ST = [f"{patient}{i}" for patient in "ABCD" for i in range(1, 7)]


def row(slice, url, organism="human", **more):
    return {"slice": slice, "source": "file", "url": str(url), "format": "auto", "organism": organism} | more


def her2st(real_data, section, **more):
    folder = real_data / "legacy_st" / "her2st"
    url = f"{folder}/ST-cnts/{section}.tsv.gz {folder}/ST-spotfiles/{section}_selection.tsv"
    return row(section, url, format="legacy_st", **more)


def neighbours(kind, row, col):
    pairs = cKDTree(plane(kind, row, col)).query_pairs(1.01, output_type="ndarray")
    return set(map(tuple, np.sort(pairs, axis=1).tolist()))


def keeps_neighbours_without_array_coordinates(adata):
    """Hide the array coordinates, infer them from pixels, and compare every spot's neighbours."""
    lattice = adata.uns[Keys.STPATCH]["lattice"]
    found = infer_lattice(adata.obsm[Keys.SPATIAL])
    assert found.kind == lattice["kind"]
    assert found.residual < 0.1
    sites = adata.obs[[Keys.ARRAY_ROW, Keys.ARRAY_COL]].to_numpy().T
    return neighbours(found.kind, found.row, found.col) == neighbours(found.kind, *sites)


@pytest.mark.parametrize(
    "place",
    [f"visium/{name}.h5ad" for name in VISIUM if name != "dlpfc_Br8325_ant_5000genes"]  # has no scale factors
    + ["spaceranger/cytassist_mouse_placenta", "layouts/visium_scanpy_fixture/1.0.0"],
)
def test_the_spot_diameter_tells_the_scale_of_the_lattice_to_a_tenth(place, real_data):
    deposit = read_deposit("x", files_at(real_data / place))
    covered = deposit.in_tissue
    lattice = known_lattice(*deposit.array[covered].T, deposit.pixels[covered])
    assert deposit.um_per_px == pytest.approx(100 / lattice.pitch_px, rel=0.1)
    assert lattice.residual < 0.02


def test_a_real_slice_stripped_of_its_lattice_is_binned_to_its_true_size(real_data, tmp_path):
    """Half a pitch of noise leaves no lattice; bins of 200 um then hold about 4.6 spots of a staggered lattice each."""
    adata = anndata.read_h5ad(real_data / "visium" / "human_lymph_node_10x.h5ad")
    adata.obsm["spatial"] = adata.obsm["spatial"] + np.random.default_rng(0).normal(0, 69, adata.obsm["spatial"].shape)
    del adata.obs["array_row"], adata.obs["array_col"]
    adata.write_h5ad(tmp_path / "a.h5ad")
    curated = curate(row("l", tmp_path / "a.h5ad"), GENE_TABLES)
    assert curated.uns[Keys.STPATCH]["lattice"]["kind"] == "none"
    grid = make_grid(curated, "auto", 200.0)
    assert (grid.layout, grid.pitch_um) == ("bin", 200.0)
    assert 3.9 < np.median(np.unique(grid.cell, return_counts=True)[1]) < 5.3  # 200^2 / (100^2 sqrt(3) / 2) = 4.6


@pytest.mark.parametrize("name", VISIUM)
def test_a_real_h5ad_keeps_every_count_and_its_lattice_is_found_without_array_coordinates(name, real_data):
    organism, n_spots, n_genes = VISIUM[name]
    path = real_data / "visium" / f"{name}.h5ad"
    adata = curate(row(name, path, organism), GENE_TABLES)
    assert adata.shape == (n_spots, n_genes)
    source = anndata.read_h5ad(path)
    source = source[source.obs["in_tissue"] == 1]
    assert list(adata.obs_names) == list(source.obs_names)
    np.testing.assert_array_equal(adata.obs[Keys.TOTAL_COUNTS], np.asarray(source.X.sum(1)).ravel())
    if source.var_names[0].startswith("ENS"):
        assert list(adata.var_names) == list(source.var_names)
        assert (adata.X != source.X).nnz == 0
    else:
        facts = adata.uns[Keys.STPATCH]["counts"]
        dropped = facts["genes_ambiguous"] + facts["genes_unknown"] + facts["genes_merged"]
        assert facts["genes_kept"] + dropped == source.n_vars
        assert facts["genes_kept"] > 0.95 * source.n_vars
    assert keeps_neighbours_without_array_coordinates(adata)


def test_the_placenta_reads_alike_from_h5_mex_and_flat_files(real_data, tmp_path):
    folder = real_data / "spaceranger" / "cytassist_mouse_placenta"
    mex, spatial = folder / "filtered_feature_bc_matrix", folder / "spatial"
    for path in mex.iterdir():
        shutil.copy(path, tmp_path / f"GSM1_placenta_{path.name}")
    flat = gzip.compress((spatial / "tissue_positions.csv").read_bytes(), compresslevel=1)
    (tmp_path / "GSM1_placenta_tissue_positions_list.csv.gz").write_bytes(flat)
    slices = [curate(row("p", url, "mouse"), GENE_TABLES) for url in (folder, f"{mex} {spatial}", tmp_path / "GSM1_")]
    assert slices[0].shape == (2898, 19465)
    for other in slices[1:]:
        assert (other.X != slices[0].X).nnz == 0
        assert list(other.obs_names) == list(slices[0].obs_names)
        np.testing.assert_array_equal(other.obsm[Keys.SPATIAL], slices[0].obsm[Keys.SPATIAL])
    assert keeps_neighbours_without_array_coordinates(slices[0])


@pytest.mark.parametrize("section", ["A1", "B1", "C1", "D1"])
def test_labelled_legacy_sections_get_every_label(section, real_data):
    labels = real_data / "legacy_st" / "her2st" / "ST-pat" / "lbl" / f"{section}_labeled_coordinates.tsv"
    adata = curate(her2st(real_data, section, labels=str(labels), label_column="label"), GENE_TABLES)
    assert adata.obs[Keys.LABEL].notna().all()
    table = pd.read_csv(labels, sep="\t").dropna(subset=["x", "y"])
    by_site = dict(zip(zip(table.x.round(), table.y.round(), strict=True), table.label, strict=True))
    sites = zip(adata.obs[Keys.ARRAY_COL], adata.obs[Keys.ARRAY_ROW], strict=True)
    assert list(adata.obs[Keys.LABEL]) == [by_site[site] for site in sites]
    lattice = adata.uns[Keys.STPATCH]["lattice"]
    assert (lattice["kind"], lattice["pitch_um"]) == ("square", 200.0)
    assert lattice["residual"] < 0.09


@pytest.mark.parametrize("section", HER2ST)
def test_the_square_lattice_of_a_legacy_section_is_found_from_its_pixels(section, real_data):
    path = real_data / "legacy_st" / "her2st" / "ST-spotfiles" / f"{section}_selection.tsv"
    spots = pd.read_csv(path, sep="\t")
    found = infer_lattice(spots[["pixel_x", "pixel_y"]].to_numpy(), section)
    assert found.kind == "square"
    assert neighbours("square", found.row, found.col) == neighbours("square", spots.y.to_numpy(), spots.x.to_numpy())


@pytest.mark.parametrize("where", ["visium/mouse_brain_sagittal_anterior_2000genes.h5ad", "spaceranger"])
def test_mouse_slices_are_the_wrong_organism_in_a_human_catalogue(where, real_data):
    with pytest.raises(WrongOrganism, match="gene names of mouse.*expected human"):
        curate(row("m", real_data / where), GENE_TABLES)


def test_space_ranger_1_is_read(real_data):
    fixture = real_data / "layouts" / "visium_scanpy_fixture" / "1.0.0"
    adata = curate(row("v1", fixture), GENE_TABLES)
    assert adata.shape == (100, 100)
    assert adata.uns[Keys.STPATCH]["lattice"]["um_per_px"] == pytest.approx(0.725, abs=0.001)


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("visium_hd_visiumio/10xVisium", UnknownFormat),  # two sections
        ("visium_hd_visiumio/binned_outputs", MissingPositions),  # parquet positions of Visium HD
        ("slideseq_spacexr", UnknownFormat),
    ],
)
def test_layouts_that_are_not_one_visium_slice_are_refused(where, error, real_data):
    with pytest.raises(error, match="Next step"):
        curate(row("x", real_data / "layouts" / where, "mouse"), GENE_TABLES)


def test_positions_of_another_real_sample_are_found_out(real_data, tmp_path):
    """151673's barcodes against the positions of the Space Ranger 1 fixture: one slide design, another tissue."""
    section = anndata.read_h5ad(real_data / "visium" / "dlpfc_151673_crop_allgenes.h5ad")
    fixture = real_data / "layouts" / "visium_scanpy_fixture" / "1.0.0" / "spatial" / "tissue_positions_list.csv"
    (tmp_path / "barcodes.tsv").write_text("\n".join(section.obs_names))
    (tmp_path / "features.tsv").write_text(
        "\n".join(f"{gene}\t{gene}\tGene Expression" for gene in section.var_names[:2])
    )
    (tmp_path / "matrix.mtx").write_text(
        f"%%MatrixMarket matrix coordinate integer general\n2 {section.n_obs} 1\n1 1 1\n"
    )
    shutil.copy(fixture, tmp_path / "tissue_positions_list.csv")
    with pytest.raises(PositionsMismatch, match="in tissue"):
        curate(row("x", tmp_path), GENE_TABLES)
