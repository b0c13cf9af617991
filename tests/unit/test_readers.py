"""Readers: each layout is recognised, and every damaged or misleading deposit ends in its own error."""

from __future__ import annotations

import dataclasses
import gzip
import json

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tests.unit.simulated import small_slice
from workflow.deposits import SPOT_PX, WRITERS, mex, positions, write_cellxgene, write_deposit, write_geo, write_tenx_h5
from workflow.errors import (
    MissingFile,
    MissingPositions,
    MultipleSections,
    NotCounts,
    PositionsMismatch,
    SliceError,
    Transposed,
    UnknownFormat,
    Unreadable,
)
from workflow.readers import detect, read_deposit
from workflow.readers.deposit import reading, scale, why_not_counts
from workflow.sources import files_at


@pytest.fixture(scope="module")
def area():
    return small_slice()


@pytest.fixture(scope="module")
def covered(area):
    """Counts of the spots in tissue [n, 150]."""
    return area.counts[area.in_tissue]


def read(place, format="auto"):
    return read_deposit("sim_t", files_at(place), format)


def same(deposit, area):
    """The spots in tissue, and all they have, are those of the simulated slice."""
    kept = deposit.in_tissue
    np.testing.assert_array_equal(deposit.spots[kept], area.barcodes[area.in_tissue])
    assert (deposit.counts[kept] != area.counts[area.in_tissue]).nnz == 0
    sites = np.column_stack([area.array_row, area.array_col])[area.in_tissue]
    np.testing.assert_array_equal(deposit.array[kept], sites)
    np.testing.assert_allclose(deposit.pixels[kept], area.pixels[area.in_tissue], atol=0.51)  # v1 has whole pixels
    return True


def tiny_h5ad(path, **changes):
    """Three spots, two genes, all that an h5ad needs; ``changes`` replace parts of it."""
    parts = {
        "X": sparse.csr_matrix(np.array([[1.0, 2], [0, 3], [4, 0]], np.float32)),
        "obs": pd.DataFrame({"array_row": [0, 0, 1], "array_col": [0, 2, 1]}, index=["a", "b", "c"]),
        "var": pd.DataFrame(index=["ENSG00000000003", "ENSG00000000005"]),
        "obsm": {"spatial": np.array([[0.0, 0], [2, 0], [1, 2]])},
    } | changes
    anndata.AnnData(**parts).write_h5ad(path)
    return path


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_is_recognised_and_read_alike(layout, area, tmp_path):
    place = write_deposit(area, layout, tmp_path)["url"]
    assert same(read(tmp_path / place), area)


def test_raw_matrices_are_cut_to_the_tissue(area, tmp_path):
    everywhere = dataclasses.replace(area, in_tissue=np.ones_like(area.in_tissue))
    for name, data in mex(everywhere).items():
        (tmp_path / f"GSM1_s1_raw_feature_bc_matrix_{name}").write_bytes(data)
    table = gzip.compress(positions(area, header=False).encode())
    (tmp_path / "GSM1_s1_spatial_tissue_positions_list.csv.gz").write_bytes(table)
    deposit = read(tmp_path / "GSM1_s1")
    assert len(deposit.spots) == 4992
    assert same(deposit, area)


def test_dots_capitals_and_plain_text_are_read_like_any_flat_files(area, tmp_path):
    for name, data in mex(area).items():
        (tmp_path / f"GSM1_s1.{name.removesuffix('.gz').replace('features', 'Genes')}").write_bytes(
            gzip.decompress(data)
        )
    (tmp_path / "GSM1_s1.tissue_positions.csv").write_text(positions(area, header=True))
    assert same(read(tmp_path / "GSM1_s1"), area)


def test_a_flat_h5_with_its_positions_is_read(area, tmp_path):
    write_tenx_h5(area, tmp_path / "GSM1_s1_filtered_feature_bc_matrix.h5")
    (tmp_path / "GSM1_s1_tissue_positions_list.txt").write_text(positions(area, header=False))
    assert same(read(tmp_path / "GSM1_s1"), area)


@pytest.mark.parametrize("header", [True, False])
@pytest.mark.parametrize("name", ["tissue_positions.csv", "tissue_positions_list.csv"])
def test_the_header_is_told_by_content_not_by_name(name, header, area, tmp_path):
    write_tenx_h5(area, tmp_path / "filtered_feature_bc_matrix.h5")
    (tmp_path / name).write_text(positions(area, header=header))
    assert same(read(tmp_path), area)


def test_the_filtered_matrix_goes_before_the_raw_one_and_h5_before_mex(area, tmp_path):
    outs = tmp_path / write_deposit(area, "spaceranger-2", tmp_path)["url"]
    for folder in ("raw_feature_bc_matrix", "filtered_feature_bc_matrix"):
        (outs / folder).mkdir()
        for name, data in mex(dataclasses.replace(area, in_tissue=np.ones_like(area.in_tissue))).items():
            (outs / folder / name).write_bytes(data)
    (outs / "molecule_info.h5").write_bytes(b"not read")
    (outs / "._filtered_feature_bc_matrix.h5").write_bytes(b"left by macOS")
    deposit = read(outs)
    assert deposit.file.name == "filtered_feature_bc_matrix.h5"
    assert same(deposit, area)


def test_antibodies_are_dropped(area, tmp_path):
    write_geo(area, tmp_path)
    names = tmp_path / "GSM900001_sim_t_features.tsv.gz"
    lines = gzip.decompress(names.read_bytes()).decode().splitlines()
    lines[3] = "CD4.1\tCD4.1\tAntibody Capture"
    names.write_bytes(gzip.compress("\n".join(lines).encode()))
    deposit = read(tmp_path / "GSM900001_sim_t")
    assert len(deposit.ids) == 149
    assert (deposit.counts != area.counts[area.in_tissue][:, np.arange(150) != 3]).nnz == 0


def test_columns_without_barcodes_are_the_sorted_spots_in_tissue(area, tmp_path, caplog):
    write_geo(area, tmp_path)
    (tmp_path / "GSM900001_sim_t_barcodes.tsv.gz").unlink()
    table = pd.read_csv(tmp_path / "GSM900001_sim_t_tissue_positions_list.csv.gz", header=None)
    assert list(table[0]) != sorted(table[0])  # in the order of the array, so that taking it as it is would be wrong
    assert same(read(tmp_path / "GSM900001_sim_t"), area)
    assert "no barcodes.tsv" in caplog.text


def test_columns_without_barcodes_that_are_not_the_spots_in_tissue_are_refused(area, tmp_path):
    one_less = area.in_tissue & (np.cumsum(area.in_tissue) > 1)
    for name, data in mex(dataclasses.replace(area, in_tissue=one_less)).items():
        if "barcodes" not in name:
            (tmp_path / f"GSM1_s1_{name}").write_bytes(data)
    (tmp_path / "GSM1_s1_tissue_positions.csv").write_text(positions(area, header=True))
    n = int(area.in_tissue.sum())
    with pytest.raises(
        MissingFile, match=rf"matrix.mtx.*no barcodes.tsv, and {n - 1} columns for {n} spots.*Next step"
    ):
        read(tmp_path / "GSM1_s1")


def test_an_h5ad_beside_counts_with_positions_is_not_what_is_read(area, tmp_path):
    write_geo(area, tmp_path)
    tiny_h5ad(tmp_path / "GSM900001_sim_t.h5ad", X=np.array([[-1.0, 2], [0, 3], [4, 0]]))  # z-scores
    for format in ("geo", "auto"):
        assert same(read(tmp_path / "GSM900001_sim_t", format), area)
    (tmp_path / "GSM900001_sim_t_tissue_positions_list.csv.gz").unlink()
    with pytest.raises(NotCounts, match="negative values"):
        read(tmp_path / "GSM900001_sim_t", "auto")
    with pytest.raises(MissingPositions):
        read(tmp_path / "GSM900001_sim_t", "geo")


def test_a_lone_h5ad_of_geo_is_read(tmp_path):
    assert read(tiny_h5ad(tmp_path / "GSM1_s1.h5ad"), "geo").counts.sum() == 10


@pytest.mark.parametrize("format", ["auto", "geo"])
@pytest.mark.parametrize(("beside", "error"), [(False, SliceError), (True, MissingPositions)])
def test_an_archive_is_to_be_unpacked(beside, error, format, area, tmp_path):
    (tmp_path / "GSM1_s1_spatial.tar.gz").write_bytes(b"not looked into")
    if beside:
        write_tenx_h5(area, tmp_path / "GSM1_s1_filtered_feature_bc_matrix.h5")
    with pytest.raises(error, match="Next step: unpack GSM1_s1_spatial.tar.gz and name its folder"):
        read(tmp_path / "GSM1_s1", format)


@pytest.mark.parametrize("sample", ["GSM1_unfiltered", "GSM1_draw", "GSM1_raw_s1"])
def test_a_sample_whose_name_sounds_like_a_kind_of_matrix_is_none(sample, area, tmp_path):
    """A filtered matrix beside is preferred to the unnamed one, and the unnamed one isn't taken as raw."""
    for name, data in mex(dataclasses.replace(area, in_tissue=np.ones_like(area.in_tissue))).items():
        (tmp_path / f"{sample}_{name}").write_bytes(data)
    write_tenx_h5(area, tmp_path / f"{sample}_filtered_feature_bc_matrix.h5")
    (tmp_path / f"{sample}_tissue_positions.csv").write_text(positions(area, header=True))
    deposit = read(tmp_path / sample)
    assert deposit.file.name.endswith("filtered_feature_bc_matrix.h5")
    assert same(deposit, area)


def test_a_matrix_of_a_sample_named_draw_is_still_held_against_the_tissue(area, tmp_path):
    for name, data in mex(area).items():
        (tmp_path / f"GSM1_draw_{name}").write_bytes(data)
    other = dataclasses.replace(area, in_tissue=np.roll(area.in_tissue, 1234))
    (tmp_path / "GSM1_draw_tissue_positions.csv").write_text(positions(other, header=True))
    with pytest.raises(PositionsMismatch, match="in tissue"):
        read(tmp_path / "GSM1_draw")


def test_two_samples_behind_one_prefix_are_refused(area, tmp_path):
    write_geo(area, tmp_path)
    write_geo(dataclasses.replace(area, name="sim_t2"), tmp_path)
    assert same(read(tmp_path / "GSM900001_sim_t_"), area)
    with pytest.raises(UnknownFormat, match="2 matrices.*full prefix"):
        read(tmp_path / "GSM900001_sim_t")


def test_the_suffix_of_barcodes_may_be_missing_on_one_side(area, tmp_path):
    write_tenx_h5(area, tmp_path / "filtered_feature_bc_matrix.h5")
    (tmp_path / "tissue_positions.csv").write_text(positions(area, header=True).replace("-1,", ","))
    assert same(read(tmp_path), area)


def test_positions_are_missing(area, tmp_path):
    write_tenx_h5(area, tmp_path / "filtered_feature_bc_matrix.h5")
    with pytest.raises(MissingPositions, match=r"slice sim_t.*filtered.*found no positions.*Next step"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["other barcodes", "same slide, other tissue", "listed twice"])
def test_positions_of_another_sample_are_found_out(kind, area, tmp_path):
    write_tenx_h5(area, tmp_path / "filtered_feature_bc_matrix.h5")
    other = dataclasses.replace(area, in_tissue=np.roll(area.in_tissue, 1234))
    if kind == "other barcodes":
        swapped = np.array([b[::-1][2:] + "-1" for b in area.barcodes])
        other = dataclasses.replace(area, barcodes=swapped)
    text = positions(other, header=True)
    (tmp_path / "tissue_positions.csv").write_text(text + text.splitlines()[-1] if kind == "listed twice" else text)
    with pytest.raises(PositionsMismatch, match=r"slice sim_t .*tissue_positions.csv.*found .*expected .*Next step"):
        read(tmp_path)


def test_a_transposed_mex_is_found_out(area, tmp_path):
    write_geo(area, tmp_path)
    matrix = tmp_path / "GSM900001_sim_t_matrix.mtx.gz"
    head, *rest = gzip.decompress(matrix.read_bytes()).decode().splitlines()
    rest = [line for line in rest if not line.startswith("%")]
    turned = ["{1} {0} {2}".format(*line.split()) for line in rest]
    matrix.write_bytes(gzip.compress("\n".join([head, *turned]).encode()))
    with pytest.raises(Transposed, match="barcodes x features"):
        read(tmp_path / "GSM900001_sim_t")


def test_exchanged_lists_are_found_out(area, tmp_path):
    write_geo(area, tmp_path)
    barcodes, features = (tmp_path / f"GSM900001_sim_t_{name}.tsv.gz" for name in ("barcodes", "features"))
    kept = barcodes.read_bytes()
    barcodes.write_bytes(features.read_bytes())
    features.write_bytes(kept)
    with pytest.raises(Transposed, match="barcodes where features belong"):
        read(tmp_path / "GSM900001_sim_t")


def test_lists_that_do_not_fit_the_matrix_are_unreadable(area, tmp_path):
    write_geo(area, tmp_path)
    names = tmp_path / "GSM900001_sim_t_features.tsv.gz"
    names.write_bytes(gzip.compress(b"\n".join(gzip.decompress(names.read_bytes()).splitlines()[:-1])))
    with pytest.raises(Unreadable, match="149 features"):
        read(tmp_path / "GSM900001_sim_t")


@pytest.mark.parametrize("name", ["matrix.mtx", "barcodes.tsv", "features.tsv", "tissue_positions_list.csv"])
@pytest.mark.parametrize("fraction", [0.5, 0.999])
def test_a_truncated_gzip_is_unreadable(name, fraction, area, tmp_path):
    write_geo(area, tmp_path)
    path = tmp_path / f"GSM900001_sim_t_{name}.gz"
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(Unreadable, match=rf"slice sim_t .*{name}.*expected a whole, readable file.*Next step"):
        read(tmp_path / "GSM900001_sim_t")


def test_a_text_matrix_with_a_hole_in_it_is_unreadable(area, tmp_path):
    write_geo(area, tmp_path)
    path = tmp_path / "GSM900001_sim_t_matrix.mtx.gz"
    text = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(text[:-4000] + b"\0" * 2000 + text[-2000:]))
    with pytest.raises(Unreadable, match="matrix.mtx.gz.*NUL bytes"):
        read(tmp_path / "GSM900001_sim_t")


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("layout", ["spaceranger-2", "cellxgene"])
def test_a_truncated_h5_is_unreadable(layout, fraction, area, tmp_path):
    write_deposit(area, layout, tmp_path)
    (path,) = [*tmp_path.rglob("*.h5"), *tmp_path.rglob("*.h5ad")]
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * fraction)])
    with pytest.raises(Unreadable, match=rf"{path.name}"):
        read(tmp_path)


def write_recast(area, folder, kind):
    """A sample as 10x h5 whose header gives the counts another type."""
    path = folder / "filtered_feature_bc_matrix.h5"
    write_tenx_h5(area, path)
    with h5py.File(path, "r+") as file:
        data = file["matrix/data"][:]
        del file["matrix/data"]
        file["matrix"].create_dataset("data", data=data.astype(kind))
    (folder / "tissue_positions.csv").write_text(positions(area, header=True))


@pytest.mark.parametrize("kind", [">i4", ">i8", "<u2", ">f8"])
def test_counts_of_any_byte_order_are_read_right(kind, area, tmp_path):
    write_recast(area, tmp_path, kind)
    assert same(read(tmp_path), area)


@pytest.mark.parametrize("kind", ["<f2", "?", "S4", "<c8"])
def test_counts_of_a_type_that_no_count_has_are_unreadable(kind, area, tmp_path):
    write_recast(area, tmp_path, kind)
    with pytest.raises(Unreadable, match="filtered_feature_bc_matrix.h5.*counts of type") as caught:
        read(tmp_path)
    assert caught.value.code == "unreadable"


def test_an_h5_whose_chunks_are_overwritten_is_unreadable(area, tmp_path):
    write_deposit(area, "spaceranger-2", tmp_path)
    (path,) = tmp_path.rglob("*.h5")
    with h5py.File(path) as file:
        at = file["matrix/data"].id.get_chunk_info(0).byte_offset
    broken = bytearray(path.read_bytes())
    broken[at : at + 200] = b"\0" * 200
    path.write_bytes(broken)
    with pytest.raises(Unreadable):
        read(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "error"),
    [
        ("matrix.mtx", "%%MatrixMarket matrix\n", MissingFile),
        ("notes.pdf", "hello", UnknownFormat),
        ("table.tsv", "name\tvalue\nx\t1\n", UnknownFormat),
    ],
)
def test_what_is_no_slice_is_said_to_be_none(name, text, error, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(error, match="slice sim_t"):
        read(tmp_path)


@pytest.mark.parametrize("where", ["raw", "layers", "X"])
def test_raw_counts_are_found_by_content_in_an_h5ad(where, tmp_path):
    counts = sparse.csr_matrix(np.array([[1.0, 2], [0, 3], [4, 0]], np.float32))
    adata = anndata.read_h5ad(tiny_h5ad(tmp_path / "a.h5ad"))
    if where == "raw":
        adata.raw = adata.copy()
    elif where == "layers":
        adata.layers["counts"] = counts
    if where != "X":
        adata.X = counts.toarray() - 1.5  # scaled
    adata.write_h5ad(tmp_path / "b.h5ad")
    assert (read(tmp_path / "b.h5ad").counts != counts).nnz == 0


@pytest.mark.parametrize(
    ("broken", "found"),
    [
        ([[0.5, 2], [0, 3], [4, 0]], "1 fractions among 4 values, such as 0.5"),
        ([[-1, 2], [0, 3], [4, 0]], "1 negative values, the least -1"),
        ([[np.nan, 2], [0, 3], [4, 0]], "1 values that are NaN or infinite"),
        ([[np.inf, 2], [0, 3], [4, 0]], "1 values that are NaN or infinite"),
    ],
)
def test_what_are_no_counts_is_said_with_the_numbers(broken, found, tmp_path):
    path = tiny_h5ad(tmp_path / "a.h5ad", X=sparse.csr_matrix(np.array(broken, np.float32)))
    with pytest.raises(NotCounts, match=rf"slice sim_t .*a.h5ad.*X: {found}.*expected raw integer counts.*Next step"):
        read(path)


def test_counts_of_any_type_are_counts_unless_they_are_not_numbers():
    assert why_not_counts(np.array([[0, 1]], np.uint8)) is None
    assert why_not_counts(np.array([[0.0, 1.0]])) is None
    kind, words = why_not_counts(np.array([[True]]))
    assert kind is NotCounts
    assert "type" in words


def broken_indices(group):
    group["indices"][0] = 10**6


def negative_index(group):
    group["indices"][0] = -1


def pointer_beyond_the_end(group):
    group["indptr"][1] = 10**6


def pointers_that_go_back(group):
    group["indptr"][1:3] = group["indptr"][1:3][::-1] + [1, 0]


@pytest.mark.parametrize("where", ["X", "raw/X", "layers/counts"])
@pytest.mark.parametrize("damage", [broken_indices, negative_index, pointer_beyond_the_end, pointers_that_go_back])
def test_a_sparse_matrix_that_points_out_of_itself_is_unreadable(damage, where, tmp_path):
    adata = anndata.read_h5ad(tiny_h5ad(tmp_path / "a.h5ad"))
    adata.raw = adata.copy()
    adata.layers["counts"] = adata.X.copy()
    adata.write_h5ad(tmp_path / "b.h5ad")
    with h5py.File(tmp_path / "b.h5ad", "r+") as file:
        damage(file[where])
    with pytest.raises(Unreadable, match=r"slice sim_t .*b.h5ad.*ind(ex|ices|ptr|ex pointer)"):
        read(tmp_path / "b.h5ad")


def no_anndata(path):
    with h5py.File(path, "w") as file:
        file["something"] = np.arange(3)


def newer_encoding(path):
    tiny_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["X"].attrs["encoding-version"] = "99.0.0"


def raw_of_other_spots(path):
    tiny_h5ad(path)
    adata = anndata.read_h5ad(path)
    adata.raw = adata.copy()
    adata.write_h5ad(path)
    with h5py.File(path, "r+") as file:
        file["raw/X"].attrs["shape"] = [4, 2]
        del file["raw/X/indptr"]
        file["raw/X/indptr"] = np.array([0, 2, 3, 4, 4])


@pytest.mark.parametrize("make", [no_anndata, newer_encoding, raw_of_other_spots])
def test_an_h5ad_that_is_none_is_unreadable(make, tmp_path):
    make(tmp_path / "a.h5ad")
    with pytest.raises(Unreadable, match=r"slice sim_t .*a.h5ad.*Next step"):
        read(tmp_path / "a.h5ad")


def test_pixels_of_one_column_are_no_positions(tmp_path):
    path = tiny_h5ad(tmp_path / "a.h5ad", obsm={"spatial": np.zeros((3, 1))})
    with pytest.raises(MissingPositions, match=r'obsm\["spatial"\] of shape \(3, 1\)'):
        read(path)


def test_only_spots_in_tissue_need_array_coordinates(tmp_path):
    obs = pd.DataFrame({"array_row": [0, 0, np.nan], "array_col": [0, 2, 1]}, index=["a", "b", "c"])
    assert read(tiny_h5ad(tmp_path / "a.h5ad", obs=obs)).array is None
    deposit = read(tiny_h5ad(tmp_path / "b.h5ad", obs=obs.assign(in_tissue=[1, 1, 0])))
    np.testing.assert_array_equal(deposit.array[:2], [[0, 0], [0, 2]])


def test_every_error_while_reading_is_one_of_the_slice_but_short_memory(tmp_path):
    for error in (TypeError, IndexError, AttributeError, np.linalg.LinAlgError):
        with pytest.raises(Unreadable, match=error.__name__), reading("sim_t", tmp_path):
            raise error("planted")
    with pytest.raises(MemoryError), reading("sim_t", tmp_path):
        raise MemoryError


@pytest.mark.parametrize(
    ("factors", "um_per_px"),
    [
        ({"spot_diameter_fullres": 89.5}, 65 / 89.5),
        ({"spot_diameter_fullres": 7.3, "microns_per_pixel": 0.274}, 0.274),  # Visium HD
        ({"spot_diameter_fullres": np.float32(130)}, 0.5),
        ({"spot_diameter_fullres": 0}, np.nan),
        ({"spot_diameter_fullres": None}, np.nan),
        ({"tissue_hires_scalef": 0.1}, np.nan),
    ],
)
def test_scale_factors_tell_the_size_of_a_pixel_or_nothing(factors, um_per_px):
    assert scale(factors) == pytest.approx(um_per_px, nan_ok=True)


@pytest.mark.parametrize("layout", WRITERS)
def test_scale_factors_are_found_in_every_layout(layout, area, tmp_path):
    deposit = read(tmp_path / write_deposit(area, layout, tmp_path)["url"])
    assert deposit.um_per_px == pytest.approx(65 / SPOT_PX)
    assert layout == "cellxgene" or any("scalefactors_json.json" in path.name for path in deposit.files)


def test_scale_factors_of_another_sample_or_of_several_libraries_are_not_taken(area, tmp_path):
    write_geo(area, tmp_path)
    mine = tmp_path / "GSM900001_sim_t_scalefactors_json.json.gz"
    mine.rename(tmp_path / "GSM900001_sim_t_2_scalefactors_json.json.gz")
    assert np.isnan(read(tmp_path / "GSM900001_sim_t").um_per_px)
    library = {"scalefactors": {"spot_diameter_fullres": 65.0}}
    for libraries, um_per_px in ((1, 1.0), (2, np.nan), (0, np.nan)):
        uns = {"spatial": {"is_single": True} | {f"library {i}": library for i in range(libraries)}}
        found = read(tiny_h5ad(tmp_path / "a.h5ad", uns=uns)).um_per_px
        assert found == pytest.approx(um_per_px, nan_ok=True)


def test_damaged_scale_factors_are_unreadable(area, tmp_path):
    outs = tmp_path / write_deposit(area, "spaceranger-2", tmp_path)["url"]
    for text in ("{", "[]", json.dumps({"spot_diameter_fullres": "wide"})):
        (outs / "spatial" / "scalefactors_json.json").write_text(text)
        with pytest.raises(Unreadable, match="scalefactors_json.json"):
            read(outs)


@pytest.mark.parametrize(("value", "found"), [("", "blank"), ("inf", "infinite"), ("3.5", "fractions"), ("x", "parse")])
def test_positions_that_are_no_numbers_are_unreadable(value, found, area, tmp_path):
    outs = tmp_path / write_deposit(area, "spaceranger-2", tmp_path)["url"]
    path = outs / "spatial" / "tissue_positions.csv"
    head, first, *rest = path.read_text().splitlines()
    fields = first.split(",")
    fields[2] = value
    path.write_text("\n".join([head, ",".join(fields), *rest]))
    with pytest.raises(Unreadable, match=rf"tissue_positions.csv.*{found}"):
        read(outs)


def test_several_sections_in_one_h5ad_are_refused(tmp_path):
    several = tiny_h5ad(tmp_path / "a.h5ad", uns={"spatial": {"is_single": False}})
    with pytest.raises(MultipleSections, match="is_single"):
        read(several)


def test_an_h5ad_without_positions_is_refused(tmp_path):
    path = tiny_h5ad(tmp_path / "a.h5ad", obsm={}, obs=pd.DataFrame({"batch": [1, 2, 3]}, index=["a", "b", "c"]))
    with pytest.raises(MissingPositions, match="obs columns batch and obsm keys none"):
        read(path)


def test_a_transposed_h5ad_is_found_out(area, tmp_path):
    adata = anndata.read_h5ad(tmp_path / write_cellxgene(area, tmp_path)).raw.to_adata()
    adata.T.write_h5ad(tmp_path / "turned.h5ad")
    with pytest.raises(Transposed, match=r"spots in columns \(AA.*transpose"):
        read(tmp_path / "turned.h5ad")


def test_spots_are_in_tissue_however_an_h5ad_says_so(tmp_path):
    for values in ([1, 0, 1], [True, False, True], ["1", "0", "1"], [1.0, 0.0, 1.0], pd.Categorical(["1", "0", "1"])):
        obs = pd.DataFrame({"array_row": [0, 0, 1], "array_col": [0, 2, 1], "in_tissue": values}, index=["a", "b", "c"])
        assert list(read(tiny_h5ad(tmp_path / "a.h5ad", obs=obs)).in_tissue) == [True, False, True]


def test_gene_ids_are_found_in_any_column_and_symbols_by_name(tmp_path):
    var = pd.DataFrame({"feature_name": ["A", "B"]}, index=["ENSG00000000003.4", "ENSG00000000005.1"])
    deposit = read(tiny_h5ad(tmp_path / "a.h5ad", var=var))
    assert list(deposit.symbols) == ["A", "B"]
    turned = var.reset_index(names="anything").set_index("feature_name")
    deposit = read(tiny_h5ad(tmp_path / "b.h5ad", var=turned))
    assert (list(deposit.ids), list(deposit.symbols)) == (list(var.index), ["A", "B"])


def test_spike_ins_and_antibodies_in_an_h5ad_are_dropped(tmp_path):
    for column, gene, other in (
        ("feature_biotype", "gene", "spike-in"),
        ("feature_types", "gene", "Antibody Capture"),
        ("feature_types", "Gene Expression", "Something new"),
    ):
        var = pd.DataFrame({column: [gene, other]}, index=["ENSG00000000003", "ERCC-00002"])
        assert list(read(tiny_h5ad(tmp_path / "a.h5ad", var=var)).ids) == ["ENSG00000000003"]


LEGACY = "\tTP53\tACTB\tGAPDH\n10x13\t1\t0\t2\n10.98x12.04\t0\t3\t0\n12x13\t4\t0\t0\n"
SPOTS = "x\ty\tnew_x\tnew_y\tpixel_x\tpixel_y\tselected\n10\t13\t0\t0\t100.5\t200\t1\n11\t12\t0\t0\t110\t190\t1\n12\t13\t0\t0\t120\t200\t0\n"


def legacy_files(folder, counts=LEGACY, spots=SPOTS):
    (folder / "A1.tsv.gz").write_bytes(gzip.compress(counts.encode()))
    (folder / "A1_selection.tsv").write_text(spots)
    return [folder / "A1.tsv.gz", folder / "A1_selection.tsv"]


def test_legacy_ids_are_column_and_row(tmp_path):
    deposit = read_deposit("sim_t", legacy_files(tmp_path)[:1], "legacy_st")
    np.testing.assert_array_equal(deposit.array, [[13, 10], [12, 11], [13, 12]])
    np.testing.assert_array_equal(deposit.counts.toarray(), [[1, 0, 2], [0, 3, 0], [4, 0, 0]])
    assert list(deposit.symbols) == ["TP53", "ACTB", "GAPDH"]
    assert deposit.pixels is None
    assert deposit.in_tissue.all()


def test_a_spot_file_gives_pixels_and_says_what_is_in_tissue(tmp_path):
    deposit = read_deposit("sim_t", legacy_files(tmp_path), "legacy_st")
    assert list(deposit.in_tissue) == [True, True, False]
    np.testing.assert_array_equal(deposit.pixels[:2], [[100.5, 200], [110, 190]])
    assert [path.name for path in deposit.files] == ["A1.tsv.gz", "A1_selection.tsv"]


def test_a_legacy_table_is_recognised_whatever_the_order_of_files(tmp_path):
    wide = "\n".join(line + "\t0" * 30 for line in LEGACY.splitlines()).replace("GAPDH\t0", "GAPDH\tX", 1)
    files = legacy_files(tmp_path, counts=wide)
    assert detect("sim_t", files[::-1]) == "legacy_st"
    assert read_deposit("sim_t", files[::-1]).file.name == "A1.tsv.gz"


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"counts": "\t10x13\t11x12\nTP53\t1\t0\n"}, Transposed),
        ({"counts": LEGACY.replace("4", "four")}, Unreadable),
        ({"spots": SPOTS.replace("pixel_x", "px")}, Unreadable),
        ({"spots": SPOTS.splitlines()[0] + "\n1\t1\t0\t0\t1\t1\t1\n"}, MissingPositions),
        ({"counts": "spot\n10x13\n11x12\n"}, Unreadable),
        ({"counts": "\tTP53\tACTB\n"}, MissingFile),
        ({"counts": ""}, MissingFile),
        ({"spots": ""}, Unreadable),
        ({"spots": SPOTS.splitlines()[0]}, SliceError),
        ({"spots": SPOTS.splitlines()[0] + "\n"}, SliceError),
        ({"spots": SPOTS.replace("\n11\t", "\n\t")}, Unreadable),
        ({"spots": SPOTS.replace("\n11\t", "\neleven\t")}, Unreadable),
        ({"spots": SPOTS.replace("110", "here")}, Unreadable),
    ],
)
@pytest.mark.parametrize("format", ["legacy_st", "auto"])
def test_damaged_legacy_tables_end_in_their_errors(changes, error, format, tmp_path):
    error = UnknownFormat if format == "auto" and error is MissingFile else error
    with pytest.raises(error, match="slice sim_t"):
        read_deposit("sim_t", legacy_files(tmp_path, **changes), format)


def test_every_error_of_a_reader_is_a_slice_error():
    for kind in (MissingFile, MissingPositions, NotCounts, PositionsMismatch, Transposed, UnknownFormat, Unreadable):
        assert issubclass(kind, SliceError)


def test_fractions_behind_an_integer_header_are_not_cut_off_in_silence(area, tmp_path):
    write_deposit(area, "spaceranger-1", tmp_path)
    (path,) = (tmp_path / "outs").rglob("matrix.mtx.gz")
    lines = gzip.decompress(path.read_bytes()).split(b"\n")
    last = max(i for i, line in enumerate(lines) if line)
    assert b"integer" in lines[0]
    path.write_bytes(gzip.compress(b"\n".join([*lines[:last], lines[last] + b".5", b""])))
    with pytest.raises(Unreadable, match="fractions in a matrix whose header says integer"):
        read(tmp_path / "outs")
