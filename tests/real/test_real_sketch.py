"""What sketches recognise among real slices: one section under any disguise, and no other."""

from __future__ import annotations

import itertools

import anndata as ad
import numpy as np
import pytest

from tests.conftest import ROOT
from workflow.curate import curate, write_slice
from workflow.fingerprints import read_fingerprints, recognise
from workflow.keys import Keys
from workflow.lattice import infer_lattice
from workflow.sketch import sketch_slice, write_sketch
from workflow.twins import by_sites, find_twins

pytestmark = [pytest.mark.real, pytest.mark.filterwarnings("ignore::UserWarning:anndata")]

FILES = {
    "crop_151673": "visium/dlpfc_151673_crop_allgenes.h5ad",
    "crop_151674": "visium/dlpfc_151674_crop_allgenes.h5ad",
    "whole_151673": "visium/dlpfc_151673_whole_hvg5000.h5ad",
    "Br8325": "visium/dlpfc_Br8325_ant_5000genes.h5ad",
    "breast": "visium/breast_brca0_visium.h5ad",
}
LEGACY = "A1 A2".split()  # serial sections of one tumour


@pytest.fixture(scope="module")
def real(real_data, tmp_path_factory):
    """Folder of curated real slices, and their sketches by name."""
    folder = tmp_path_factory.mktemp("real")
    rows = {name: {"url": str(real_data / file), "format": "h5ad"} for name, file in FILES.items()}
    for name in LEGACY:
        counts, spots = (f"{real_data}/legacy_st/her2st/{part}" for part in ("ST-cnts", "ST-spotfiles"))
        rows[name] = {"url": f"{counts}/{name}.tsv.gz {spots}/{name}_selection.tsv", "format": "legacy_st"}
    for name, row in rows.items():
        write_slice(
            curate({"slice": name, "organism": "human", **row}, ROOT / "catalogue/aux"), folder / f"{name}.h5ad"
        )
    return folder, {name: sketch_slice(folder / f"{name}.h5ad") for name in rows}


def disguised(folder, of, name, spots=None, genes=None, turn=None):
    """The sketch of a copy: spots and genes chosen or shuffled, barcodes renamed, array coordinates hidden and inferred from pixels."""
    adata = ad.read_h5ad(folder / f"{of}.h5ad")
    adata = adata[adata.obs_names if spots is None else spots].copy()
    if genes is not None:
        adata = adata[:, genes].copy()
    adata.obs_names = [f"{name}-{i}" for i in range(adata.n_obs)]
    adata.uns[Keys.STPATCH]["slice"] = name
    if turn is not None:
        lattice = infer_lattice(adata.obsm[Keys.SPATIAL] @ np.array(turn, float))
        adata.obs[Keys.ARRAY_ROW], adata.obs[Keys.ARRAY_COL] = lattice.row, lattice.col
        adata.uns[Keys.STPATCH]["lattice"]["source"] = "pixels"
    adata.write_h5ad(folder / f"{name}.h5ad")
    return sketch_slice(folder / f"{name}.h5ad")


def containment(*sketches):
    return {(match.first, match.second): match.containment for match in find_twins(list(sketches))[0]}


def test_only_the_whole_of_a_section_is_its_crops_twin(real):
    matches, unchecked = find_twins(list(real[1].values()))
    assert [(match.first, match.second) for match in matches] == [("crop_151673", "whole_151673")]
    assert matches[0].containment == 1.0
    assert matches[0].compared > 1000
    assert unchecked == {}


def test_other_sections_share_less_than_a_seventh_even_if_adjacent(real):
    for at, shared, compared in by_sites(sorted(real[1].values(), key=lambda sketch: sketch.slice)):
        names = [sorted(real[1])[i] for i in at]
        for i, j in itertools.combinations(range(len(names)), 2):
            if {names[i], names[j]} != {"crop_151673", "whole_151673"}:
                assert shared[i, j] < compared[i, j] / 7, (names[i], names[j])


def test_shuffled_spots_renamed_barcodes_and_half_of_the_genes_hide_nothing(real):
    folder, sketches = real
    rng = np.random.default_rng(0)
    copy = disguised(folder, "crop_151673", "copy", rng.permutation(2929), rng.permutation(11381)[:5690])
    found = containment(copy, *sketches.values())
    assert set(found) == {("copy", "crop_151673"), ("copy", "whole_151673"), ("crop_151673", "whole_151673")}
    assert min(found.values()) == 1.0


@pytest.mark.parametrize(
    "turn", [[[0, 1], [-1, 0]], [[1, 0], [0, -1]], [[0, 1], [1, 0]], [[0.4536, 0.8912], [-0.8912, 0.4536]]]
)
def test_hidden_array_coordinates_are_recognised_turned_or_mirrored(real, turn):
    folder, sketches = real
    copy = disguised(folder, "crop_151673", "pixels", turn=turn)
    found = containment(copy, *sketches.values())
    assert set(found) == {("crop_151673", "pixels"), ("crop_151673", "whole_151673"), ("pixels", "whole_151673")}
    assert min(found.values()) > 0.99


def test_two_copies_without_array_coordinates_are_recognised_and_the_neighbour_is_not(real):
    folder, _ = real
    one = disguised(folder, "crop_151673", "one", turn=[[0, 1], [-1, 0]])
    part = disguised(folder, "crop_151673", "part", spots=np.arange(1200), turn=[[-1, 0], [0, 1]])
    neighbour = disguised(folder, "crop_151674", "neighbour", turn=[[0, 1], [-1, 0]])
    assert set(containment(one, part, neighbour)) == {("one", "part")}


def test_a_square_lattice_is_recognised_turned(real):
    folder, sketches = real
    copy = disguised(folder, "A1", "turned", turn=[[0, 1], [-1, 0]])
    assert set(containment(copy, *(sketches[name] for name in LEGACY))) == {("A1", "turned")}


def test_the_shipped_fingerprints_know_both_sections_from_any_copy(real):
    folder, sketches = real
    known = read_fingerprints(ROOT / "catalogue/aux/fingerprints.tsv")
    turned = disguised(folder, "whole_151673", "turned", turn=[[0, 1], [-1, 0]])
    expected = {
        "DLPFC_151673": {"crop_151673", "whole_151673", "turned"},
        "DLPFC_151674": {"crop_151674"},
    }
    found = {name: set() for name in expected}
    for sketch in [*sketches.values(), turned]:
        matches, unchecked = recognise(sketch, known)
        assert unchecked == 0
        for match in matches:
            found[match.second].add(sketch.slice)
    assert {name: found[name] for name in expected} == expected


def test_a_sketch_of_a_real_slice_takes_less_than_100_kb(real):
    folder, sketches = real
    for name, sketch in sketches.items():
        write_sketch(sketch, folder / "sketch.npz")
        assert (folder / "sketch.npz").stat().st_size < 100_000, name
