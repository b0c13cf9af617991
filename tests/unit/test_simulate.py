"""The simulator: what is planted is there, and the same names give the same bytes."""

from __future__ import annotations

import json
import shutil
import subprocess

import anndata
import h5py
import numpy as np
import pytest
from scipy.spatial import cKDTree
from sklearn.decomposition import PCA
from sklearn.neighbors import KNeighborsClassifier

from tests.unit.simulated import GENE_TABLES, SETTINGS, small_slice
from workflow.deposits import PITCH_PX, WRITERS, write_cellxgene, write_deposit
from workflow.errors import CatalogueError
from workflow.genes import load_genes
from workflow.keys import Keys
from workflow.simulate import simulate_slice, tiny_slice, write_slice
from workflow.sources import sha256_of


@pytest.fixture(scope="module")
def area():
    return small_slice()


def test_the_capture_area_is_that_of_visium(area):
    assert len(area.barcodes) == 4992
    assert ((area.array_row + area.array_col) % 2 == 0).all()
    assert (area.array_row.max(), area.array_col.max()) == (77, 127)
    distance = cKDTree(area.pixels).query(area.pixels, 2)[0][:, 1]
    np.testing.assert_allclose(distance, PITCH_PX, rtol=1e-9)


def test_the_tissue_has_a_rim_and_holes(area):
    assert 1800 <= area.in_tissue.sum() <= 2500
    rim = (area.array_row == 0) | (area.array_col <= 1)
    assert not area.in_tissue[rim].any()
    # A hole is uncovered spots which can't reach the rim through uncovered neighbours.
    bare = np.flatnonzero(~area.in_tissue)
    near = cKDTree(area.pixels[bare]).query_ball_point(area.pixels[bare], 1.1 * PITCH_PX)
    reached, front = set(), list(np.flatnonzero(rim[bare]))
    while front:
        here = front.pop()
        if here not in reached:
            reached.add(here)
            front += near[here]
    assert len(bare) - len(reached) > 10


def test_barcodes_are_sixteen_letters_distinct_and_the_same_on_every_slide(area):
    assert all(len(b) == 18 and b.endswith("-1") and set(b[:16]) <= set("ACGT") for b in area.barcodes)
    assert len(set(area.barcodes)) == 4992
    other = simulate_slice("other", "other", GENE_TABLES / "genes_human.tsv", SETTINGS)
    np.testing.assert_array_equal(other.barcodes, area.barcodes)
    np.testing.assert_array_equal(other.array_row, area.array_row)


def test_genes_are_real_ones_with_their_own_symbols(area):
    table = load_genes(GENE_TABLES / "genes_human.tsv")
    assert all(table.by_symbol[s] == i for i, s in zip(area.gene_ids, area.symbols, strict=True))


def test_depth_is_planted_and_counts_are_overdispersed(area):
    depth = np.asarray(area.counts.sum(1)).ravel()
    assert np.median(depth[area.in_tissue]) == pytest.approx(SETTINGS.median_depth, rel=0.1)
    assert np.median(depth[~area.in_tissue]) < 10
    counts = area.counts[area.in_tissue].toarray()
    mean, variance = counts.mean(0), counts.var(0)
    assert (variance > mean).mean() > 0.95


def test_five_domains_are_planted_and_only_in_tissue(area):
    assert set(area.domain[area.in_tissue]) == set(range(5))
    assert (area.domain[~area.in_tissue] == -1).all()


def test_a_neighbourhood_tells_the_domain_better_than_one_spot():
    genes = GENE_TABLES / "genes_human.tsv"
    features, labels, means = [], [], []
    for name in ("one", "two"):  # two sections of a donor
        area = simulate_slice(name, "d", genes)
        counts = area.counts[area.in_tissue].toarray().astype(float)
        features.append(np.log1p(1e4 * counts / counts.sum(1, keepdims=True)))
        labels.append(area.domain[area.in_tissue])
        places = area.pixels[area.in_tissue]
        means.append(cKDTree(places).query(places, 7)[1])
    pca = PCA(30, svd_solver="randomized", random_state=0).fit(features[0])
    single = [pca.transform(x) for x in features]
    nearby = [x[near].mean(1) for x, near in zip(single, means, strict=True)]
    score = {
        name: KNeighborsClassifier(10).fit(x[0], labels[0]).score(x[1], labels[1])
        for name, x in (("single", single), ("nearby", nearby))
    }
    assert 0.5 < score["single"] < 0.85
    assert score["nearby"] > score["single"] + 0.15


def test_sections_of_a_donor_share_their_shape_and_donors_differ():
    genes = GENE_TABLES / "genes_human.tsv"
    one, two, other = (simulate_slice(n, d, genes, SETTINGS) for n, d in (("1", "d"), ("2", "d"), ("3", "e")))

    def agreement(a, b):
        both = a.in_tissue & b.in_tissue
        return (a.domain[both] == b.domain[both]).mean()

    assert agreement(one, two) > 0.85 > agreement(one, other)
    assert (one.counts != two.counts).nnz > 0
    share = [area.counts[area.in_tissue].sum(0) / area.counts[area.in_tissue].sum() for area in (one, two, other)]
    fold = [np.std(np.log(np.asarray(share[0] / share[i]))) for i in (1, 2)]
    assert fold[1] > 2 * fold[0]  # the batch effect


@pytest.mark.parametrize("layout", WRITERS)
def test_the_same_names_give_the_same_bytes(layout, tmp_path):
    genes = GENE_TABLES / "genes_human.tsv"
    for turn in ("one", "two"):
        write_deposit(simulate_slice("sim_t", "sim_donor_t", genes, SETTINGS), layout, tmp_path / turn)
    files = [path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()]
    assert files
    for file in files:
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes(), file


def test_the_manifest_lists_every_file_of_the_deposit(tmp_path):
    manifest = tmp_path / "sim_x" / "deposit.json"
    row = {"donor": "d", "accession": "", "format": "geo"}
    write_slice("sim_x", row, GENE_TABLES / "genes_human.tsv", manifest)
    record = json.loads(manifest.read_text())
    assert record["simulated"] is True
    listed = {entry["path"]: entry["sha256"] for entry in record["files"]}
    assert listed == {p.name: sha256_of(p) for p in manifest.parent.iterdir() if p != manifest}
    assert len(listed) == 6  # barcodes, features, matrix, positions, scale factors, labels
    with pytest.raises(CatalogueError, match="layout 'visium'.*expected one of spaceranger-2"):
        write_slice("sim_x", row | {"accession": "visium"}, GENE_TABLES / "genes_human.tsv", manifest)


def test_the_cellxgene_file_keeps_all_spots_and_raw_counts(area, tmp_path):
    adata = anndata.read_h5ad(tmp_path / write_cellxgene(area, tmp_path))
    assert adata.shape == (4992, 150)
    assert bool(adata.uns["spatial"]["is_single"]) is True
    assert "simulated" in adata.uns["title"]
    assert (adata.raw.X != area.counts).nnz == 0
    assert adata.X.data.max() < 10  # normalised
    assert adata.raw.X.sum(1)[~area.in_tissue].max() > 0
    image = adata.uns["spatial"]["sim_t"]["images"]["hires"]
    assert image.dtype == np.uint8
    assert max(image.shape) == 2000


@pytest.mark.skipif(not shutil.which("cellxgene-schema"), reason="cellxgene-schema is not on the PATH")
def test_the_public_validator_accepts_the_cellxgene_file(area, tmp_path):
    path = tmp_path / write_cellxgene(area, tmp_path)
    done = subprocess.run(["cellxgene-schema", "validate", path], capture_output=True, text=True, check=False)
    assert "is_valid=True" in done.stderr + done.stdout


def test_the_space_ranger_h5_has_the_attributes_and_groups_of_a_real_one(area, tmp_path):
    write_deposit(area, "spaceranger-2", tmp_path)
    with h5py.File(tmp_path / "outs" / "filtered_feature_bc_matrix.h5") as file:
        attributes = {
            "chemistry_description",
            "filetype",
            "library_ids",
            "original_gem_groups",
            "software_version",
            "version",
        }
        assert set(file.attrs) == attributes
        assert set(file["matrix"]) == {"barcodes", "data", "indices", "indptr", "shape", "features"}
        assert set(file["matrix/features"]) == {"_all_tag_keys", "feature_type", "genome", "id", "name"}
        assert tuple(file["matrix/shape"]) == (150, area.in_tissue.sum())


@pytest.mark.parametrize("kind", ["staggered", "square", "none"])
def test_a_tiny_slice_is_a_curated_slice(kind):
    adata = tiny_slice(seed=1, kind=kind)
    assert adata.X.dtype == np.int32
    assert adata.X.format == "csr"
    assert adata.uns[Keys.STPATCH]["lattice"]["kind"] == kind
    assert (Keys.ARRAY_ROW in adata.obs) == (kind != "none")
    assert adata.obs[Keys.LABEL].nunique() == 3
    np.testing.assert_array_equal(adata.obs[Keys.TOTAL_COUNTS], np.asarray(adata.X.sum(1)).ravel())
    assert (tiny_slice(seed=1, kind=kind).X != adata.X).nnz == 0
