"""Curate: one form from every source, and a typed error, never a half-right slice."""

from __future__ import annotations

import copy
import dataclasses
import gzip
import json

import anndata
import numpy as np
import pandas as pd
import pytest
from scipy.spatial import cKDTree

from tests.unit.simulated import GENE_TABLES, row, small_slice
from workflow.curate import curate, located, rejected, write_slice
from workflow.deposits import PITCH_PX, WRITERS, domain_names, mex, positions, write_deposit
from workflow.errors import (
    BadLabels,
    CountOverflow,
    DownloadFailed,
    EmptySlice,
    MissingFile,
    MissingPositions,
    MultipleSections,
    NoLattice,
    NotCounts,
    PositionsMismatch,
    SliceError,
    UnknownGenes,
    Unreadable,
    WrongOrganism,
)
from workflow.grid import make_grid
from workflow.keys import Keys
from workflow.lattice import plane
from workflow.simulate import write_slice as simulate_to
from workflow.sources import curate_inputs, files_at


@pytest.fixture(scope="module")
def area():
    return small_slice()


def as_raw_mex(area, folder):
    """Flat files of all 4,992 spots."""
    for name, data in mex(dataclasses.replace(area, in_tissue=np.ones_like(area.in_tissue))).items():
        (folder / f"s_raw_feature_bc_matrix_{name}").write_bytes(data)
    (folder / "s_tissue_positions.csv").write_text(positions(area, header=True))
    return folder / "s"


def as_plain_h5ad(area, folder):
    """Symbols alone, in-tissue spots alone, pixels alone: no array coordinates."""
    kept = area.in_tissue
    adata = anndata.AnnData(
        X=area.counts[kept],
        obs=pd.DataFrame({"domain": domain_names(area.domain)[kept]}, index=area.barcodes[kept]),
        var=pd.DataFrame(index=area.symbols),
        obsm={"spatial": area.pixels[kept]},
    )
    adata.write_h5ad(folder / "plain.h5ad")
    return folder / "plain.h5ad"


def as_legacy_table(area, folder):
    """Spots x genes with ids made of array coordinates."""
    kept = area.in_tissue
    ids = [f"{x}x{y}" for x, y in zip(area.array_col[kept], area.array_row[kept], strict=True)]
    table = pd.DataFrame(area.counts[kept].toarray(), index=ids, columns=area.symbols)
    table.to_csv(folder / "s.tsv.gz", sep="\t", compression={"method": "gzip", "compresslevel": 1})
    return folder / "s.tsv.gz"


FORMATS = {
    **{
        layout: lambda area, folder, layout=layout: folder / write_deposit(area, layout, folder)["url"]
        for layout in WRITERS
    },
    "raw mex": as_raw_mex,
    "plain h5ad": as_plain_h5ad,
    "legacy table": as_legacy_table,
}


@pytest.mark.parametrize("format", FORMATS)
def test_all_formats_of_one_slice_end_as_the_same_counts_value_for_value(format, area, tmp_path):
    adata = curate(row(url=str(FORMATS[format](area, tmp_path))), GENE_TABLES)
    kept = area.in_tissue
    assert adata.shape == (kept.sum(), 150)
    assert adata.X.dtype == np.int32
    assert adata.X.format == "csr"
    assert (adata.X != area.counts[kept]).nnz == 0
    assert list(adata.var_names) == list(area.gene_ids)
    assert list(adata.var[Keys.SYMBOL]) == list(area.symbols)
    np.testing.assert_array_equal(adata.obs[Keys.TOTAL_COUNTS], np.asarray(area.counts[kept].sum(1)).ravel())
    if format != "legacy table":
        assert list(adata.obs_names) == list(area.barcodes[kept])
        np.testing.assert_allclose(adata.obsm[Keys.SPATIAL], area.pixels[kept], atol=0.51)
    facts = adata.uns[Keys.STPATCH]
    lattice = facts["lattice"]
    assert (lattice["kind"], lattice["pitch_um"]) == ("staggered", 100.0)
    assert lattice["source"] == ("pixels" if format == "plain h5ad" else "array")
    assert lattice["residual"] < 0.01
    if format != "legacy table":
        assert lattice["um_per_px"] == pytest.approx(100 / PITCH_PX, rel=0.001)
    assert facts["counts"]["spots_in_tissue"] == kept.sum()
    sites = adata.obs[[Keys.ARRAY_ROW, Keys.ARRAY_COL]].to_numpy()
    assert sites.dtype == np.int32
    if format != "plain h5ad":
        np.testing.assert_array_equal(sites, np.column_stack([area.array_row, area.array_col])[kept])

    def neighbours(row, col):
        return set(map(tuple, np.sort(cKDTree(plane("staggered", row, col)).query_pairs(1.01, output_type="ndarray"))))

    assert neighbours(*sites.T) == neighbours(area.array_row[kept], area.array_col[kept])


def test_a_curated_slice_says_where_it_comes_from(area, tmp_path):
    place = write_deposit(area, "geo", tmp_path)["url"]
    catalogue_row = row(url=str(tmp_path / place))
    adata = curate(catalogue_row, GENE_TABLES)
    adata.var.loc[adata.var_names[:2], Keys.SYMBOL] = ""
    write_slice(adata, tmp_path / "curated.h5ad")
    again = anndata.read_h5ad(tmp_path / "curated.h5ad")
    assert again.var[Keys.SYMBOL].dtype == adata.var[Keys.SYMBOL].dtype  # not made categorical
    facts = again.uns[Keys.STPATCH]
    assert facts["format_version"] == 1
    assert facts["slice"] == "sim_t"
    assert json.loads(facts["row"]) == catalogue_row
    inputs = json.loads(facts["inputs"])
    assert len(inputs) == 5  # matrix, barcodes, features, positions, scale factors
    assert all(len(entry["sha256"]) == 64 and entry["bytes"] > 0 for entry in inputs)
    assert {"python", "anndata", "numpy"} <= set(json.loads(facts["versions"]))


def test_features_are_accounted_for_to_the_last(area, tmp_path):
    path = as_plain_h5ad(area, tmp_path)
    adata = anndata.read_h5ad(path)
    names = list(area.symbols)
    names[:4] = ["Y_RNA", "NOT-A-GENE", names[10], names[11].lower()]
    adata.var_names = names
    adata.var_names_make_unique(join=".")
    adata.var["symbol"] = names
    adata.write_h5ad(path)
    curated = curate(row(url=str(path)), GENE_TABLES)
    counts = curated.uns[Keys.STPATCH]["counts"]
    assert counts["features_in_source"] == 150
    assert (counts["genes_ambiguous"], counts["genes_unknown"], counts["genes_merged"]) == (1, 1, 2)
    assert counts["genes_kept"] == curated.n_vars == 146
    # Summed columns, and totals over all features, those that were dropped too.
    dense = area.counts[area.in_tissue].toarray()
    np.testing.assert_array_equal(curated[:, area.gene_ids[10]].X.toarray().ravel(), dense[:, 2] + dense[:, 10])
    np.testing.assert_array_equal(curated.obs[Keys.TOTAL_COUNTS], dense.sum(1))


@pytest.mark.parametrize("layout", WRITERS)
def test_planted_labels_come_along(layout, area, tmp_path):
    places = write_deposit(area, layout, tmp_path)
    labels = str(tmp_path / places["labels"]) if places["labels"] else ""
    adata = curate(row(url=str(tmp_path / places["url"]), labels=labels, label_column="domain"), GENE_TABLES)
    assert isinstance(adata.obs[Keys.LABEL].dtype, pd.CategoricalDtype)
    assert list(adata.obs[Keys.LABEL]) == list(domain_names(area.domain)[area.in_tissue])
    assert list(adata.obs[Keys.LABEL].cat.categories) == [f"domain_{i}" for i in range(1, 6)]


LABEL_TABLES = {
    "comma separated": lambda b, d: "barcode,domain\n" + "".join(f"{x},{y}\n" for x, y in zip(b, d, strict=True)),
    "R export, header one short": lambda b, d: (
        "a\tdomain\n" + "".join(f"{x}\t1\t{y}\n" for x, y in zip(b, d, strict=True))
    ),
    "without suffixes, other order": lambda b, d: (
        "domain\tspot\n" + "".join(f"{y}\t{x[:16]}\n" for x, y in list(zip(b, d, strict=True))[::-1])
    ),
    "quoted": lambda b, d: '"barcode","domain"\n' + "".join(f'"{x}","{y}"\n' for x, y in zip(b, d, strict=True)),
}


@pytest.mark.parametrize("form", LABEL_TABLES)
def test_labels_are_joined_by_barcode_in_every_form(form, area, tmp_path):
    place = write_deposit(area, "spaceranger-2", tmp_path)["url"]
    domains = domain_names(area.domain)[area.in_tissue]
    domains[5] = "NA"
    labels = tmp_path / "labels.txt"
    labels.write_text(LABEL_TABLES[form](area.barcodes[area.in_tissue], domains))
    adata = curate(row(url=str(tmp_path / place), labels=str(labels), label_column="domain"), GENE_TABLES)
    known = adata.obs[Keys.LABEL].notna().to_numpy()
    assert list(np.flatnonzero(~known)) == [5]
    assert list(adata.obs[Keys.LABEL][known]) == list(domains[known])


def test_labels_keyed_by_rounded_x_and_y_are_joined_by_array_position(area, tmp_path):
    table = as_legacy_table(area, tmp_path)
    kept = area.in_tissue
    labels = pd.DataFrame({"Row.names": "?", "x": area.array_col[kept] + 0.02, "y": area.array_row[kept] - 0.03})
    labels["label"] = domain_names(area.domain)[kept]
    labels[::-1].to_csv(tmp_path / "labels.tsv", sep="\t", index=False)
    adata = curate(
        row(url=str(table), format="legacy_st", labels=str(tmp_path / "labels.tsv"), label_column="label"), GENE_TABLES
    )
    assert list(adata.obs[Keys.LABEL]) == list(labels["label"])


@pytest.mark.parametrize(
    ("text", "column", "error", "found"),
    [
        ("barcode\tdomain\nAA-1\tx\n", "layer", BadLabels, "the columns barcode, domain"),
        ("barcode\tdomain\nAA-1\tx\n", "domain", BadLabels, "none of the slice's"),
        ("barcode\tdomain\n{0}\tx\n{0}\ty\n", "domain", BadLabels, "1 spots with two labels"),
        ("barcode\tdomain\n{0}\tNA\n{1}\t\n", "domain", BadLabels, "no label in column"),
        (None, "domain", MissingFile, "no such file"),
    ],
)
def test_labels_that_do_not_fit_are_refused(text, column, error, found, area, tmp_path):
    place = write_deposit(area, "spaceranger-2", tmp_path)["url"]
    labels = tmp_path / "mine.tsv"
    if text is not None:
        labels.write_text(text.format(*area.barcodes[area.in_tissue][:2]))
    with pytest.raises(error, match=rf"slice sim_t .*mine.tsv.*{found}.*expected .*Next step"):
        curate(row(url=str(tmp_path / place), labels=str(labels), label_column=column), GENE_TABLES)


def changed_h5ad(area, folder, change):
    path = as_plain_h5ad(area, folder)
    adata = anndata.read_h5ad(path)
    adata = change(adata) or adata
    adata.write_h5ad(path)
    return path


def rename(adata, names):
    adata.var_names = names


def put(adata, **columns):
    for name, values in columns.items():
        adata.obs[name] = values


def set_first(adata, value):
    counts = adata.X.astype(type(value)).tolil()
    counts[0, 0] = value
    adata.X = counts.tocsr()


def sum_first_two(adata, value):
    """Two columns of one gene, with ``value`` each on the first spot."""
    names = list(adata.var_names)
    rename(adata, [names[0], names[0].lower(), *names[2:]])
    counts = adata.X.tolil()
    counts[0, :2] = value
    adata.X = counts.tocsr()


BAD = {
    "nothing in tissue": (EmptySlice, "0 spots in tissue", lambda a: put(a, in_tissue=0)),
    "no counts": (EmptySlice, "no count", lambda a: setattr(a, "X", a.X * 0)),
    "no genes": (EmptySlice, "0 genes", lambda a: a[:, :0].copy()),
    "a fraction": (NotCounts, "1 fractions", lambda a: set_first(a, 0.25)),
    "a NaN": (NotCounts, "NaN", lambda a: set_first(a, float("nan"))),
    "negative": (NotCounts, "1 negative values", lambda a: set_first(a, -3.0)),
    "too large": (CountOverflow, "a count of 70000", lambda a: set_first(a, 70000)),
    "mouse ids": (
        WrongOrganism,
        "gene names of mouse",
        lambda a: rename(a, [f"ENSMUSG{i:011d}" for i in range(a.n_vars)]),
    ),
    "fish ids": (WrongOrganism, "another organism", lambda a: rename(a, [f"ENSDARG{i:011d}" for i in range(a.n_vars)])),
    "mouse by its own word": (
        WrongOrganism,
        "mouse as the file says",
        lambda a: a.uns.update(organism_ontology_term_id="NCBITaxon:10090"),
    ),
    "no gene names": (UnknownGenes, "0 of 150 names known", lambda a: rename(a, [f"gene{i}" for i in range(a.n_vars)])),
    "too large a sum": (CountOverflow, "a count of 80000", lambda a: sum_first_two(a, 40000)),
    "a spot without pixels": (
        MissingPositions,
        "1 of .* spots in tissue without position",
        lambda a: a.obsm.update(spatial=np.vstack([[np.nan, 0], a.obsm["spatial"][1:]])),
    ),
    "one site twice": (
        MultipleSections,
        "spots at an array position that another spot has",
        lambda a: put(a, array_row=0, array_col=0),
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_slice_ends_in_its_own_error_which_says_what_to_do(what, area, tmp_path):
    error, found, change = BAD[what]
    path = changed_h5ad(area, tmp_path, change)
    with pytest.raises(error, match=rf"slice sim_t .*plain.h5ad.*found .*{found}.*; expected .*Next step: \w+"):
        curate(row(url=str(path)), GENE_TABLES)


def test_mouse_symbols_in_capitals_are_found_out(area, tmp_path):
    lines = (GENE_TABLES / "genes_mouse.tsv").read_text().splitlines()[2 : 2 + 150 * 200 : 200]
    names = [line.split("\t")[1].upper() for line in lines]
    path = changed_h5ad(area, tmp_path, lambda a: rename(a, names))
    with pytest.raises(WrongOrganism, match="symbols that only one organism has"):
        curate(row(url=str(path)), GENE_TABLES)
    assert curate(row(url=str(path), organism="mouse"), GENE_TABLES).n_vars > 140


def test_without_a_lattice_a_slice_keeps_its_pixels_alone(area, tmp_path):
    rng = np.random.default_rng(0)
    path = changed_h5ad(area, tmp_path, lambda a: a.obsm.update(spatial=rng.uniform(0, 9000, (a.n_obs, 2))))
    adata = curate(row(url=str(path)), GENE_TABLES)
    assert Keys.ARRAY_ROW not in adata.obs
    lattice = adata.uns[Keys.STPATCH]["lattice"]
    assert (lattice["kind"], lattice["source"]) == ("none", "pixels")
    assert np.isnan(lattice["um_per_px"])


def test_a_slice_without_lattice_is_binned_by_its_scale_factors(area, tmp_path):
    """Spots anywhere, 0.5 um a pixel: bins of 100 um are 200 pixels wide."""
    pixels = np.random.default_rng(0).uniform(0, 9000, (area.in_tissue.sum(), 2))

    def change(adata, **factors):
        adata.obsm["spatial"] = pixels
        adata.uns["spatial"] = {"library": {"scalefactors": factors}}

    path = changed_h5ad(area, tmp_path, lambda a: change(a, spot_diameter_fullres=130.0))
    adata = curate(row(url=str(path)), GENE_TABLES)
    lattice = adata.uns[Keys.STPATCH]["lattice"]
    assert (lattice["kind"], lattice["um_per_px"]) == ("none", 0.5)
    assert np.isnan(lattice["pitch_um"])
    grid = make_grid(adata, "bin", 100.0)
    x, y = ((pixels - pixels.min(0)) // 200).astype(int).T
    np.testing.assert_array_equal(grid.cell, y * grid.mask.shape[1] + x)
    assert grid.total_counts.sum() == area.counts[area.in_tissue].sum()
    path = changed_h5ad(area, tmp_path, lambda a: change(a, tissue_hires_scalef=0.1))
    with pytest.raises(NoLattice, match="Next step: give scale factors"):
        make_grid(curate(row(url=str(path)), GENE_TABLES), "bin", 100.0)


def on_array(adata, area, **columns):
    """The plain h5ad with the array coordinates, or what ``columns`` put for them."""
    kept = area.in_tissue
    put(adata, **{"array_row": area.array_row[kept], "array_col": area.array_col[kept]} | columns)


@pytest.mark.parametrize("where", ["one place", "one line"])
def test_pixels_without_extent_beside_an_array_tell_no_scale(where, area, tmp_path, caplog):
    def change(adata):
        on_array(adata, area)
        adata.obsm["spatial"] = adata.obsm["spatial"] * ([0, 0] if where == "one place" else [1, 0])

    lattice = curate(row(url=str(changed_h5ad(area, tmp_path, change))), GENE_TABLES).uns[Keys.STPATCH]["lattice"]
    assert (lattice["kind"], lattice["source"], lattice["pitch_um"]) == ("staggered", "array", 100.0)
    assert np.isnan(lattice["um_per_px"])
    assert "in one line" in caplog.text


def test_array_positions_that_the_pixels_contradict_are_refused(area, tmp_path):
    def shuffle(adata):
        on_array(adata, area)
        adata.obsm["spatial"] = np.random.default_rng(0).permutation(adata.obsm["spatial"])

    for change, found in (
        (shuffle, r"pixels \d+\.\d+ pitches"),
        (
            lambda a: on_array(a, area, array_col=area.array_col[area.in_tissue] + (np.arange(a.n_obs) == 5)),
            r"1 of \d+ spots whose array row \+ column is odd",
        ),
    ):
        path = changed_h5ad(area, tmp_path, change)
        with pytest.raises(PositionsMismatch, match=rf"slice sim_t .*plain.h5ad.*found {found}"):
            curate(row(url=str(path)), GENE_TABLES)


@pytest.mark.parametrize(
    ("factors", "pixels", "pitch_um", "um_per_px"),
    [
        ({"microns_per_pixel": 0.25}, 32.0, 8.0, 0.25),  # bins of Visium HD
        ({"spot_diameter_fullres": 130.0}, 100.0, 50.0, 0.5),
        ({}, 100.0, np.nan, np.nan),
        ({"spot_diameter_fullres": 130.0}, None, np.nan, np.nan),  # a scale of pixels that are not there
    ],
)
def test_a_square_lattice_that_is_not_legacy_st_has_the_pitch_that_its_scale_factors_tell(
    factors, pixels, pitch_um, um_per_px, area, tmp_path
):
    site = np.divmod(np.arange(area.in_tissue.sum()), 50)

    def change(adata):
        on_array(adata, area, array_row=site[0], array_col=site[1])
        adata.uns["spatial"] = {"library": {"scalefactors": factors}}
        adata.obsm["spatial"] = np.column_stack(site[::-1]) * (pixels or 1.0)
        if pixels is None:
            del adata.obsm["spatial"]

    adata = curate(row(url=str(changed_h5ad(area, tmp_path, change))), GENE_TABLES)
    lattice = adata.uns[Keys.STPATCH]["lattice"]
    assert lattice["kind"] == "square"
    assert [lattice["pitch_um"], lattice["um_per_px"]] == pytest.approx([pitch_um, um_per_px], nan_ok=True)
    np.testing.assert_allclose(adata.obsm[Keys.SPATIAL], np.column_stack(site[::-1]) * (pixels or 1.0))


def test_array_positions_with_gaps_give_way_to_the_pixels(area, tmp_path):
    kept = area.in_tissue
    row_ = area.array_row[kept].astype(float)
    row_[3] = np.nan
    path = changed_h5ad(area, tmp_path, lambda a: put(a, array_row=row_, array_col=area.array_col[kept]))
    assert curate(row(url=str(path)), GENE_TABLES).uns[Keys.STPATCH]["lattice"]["source"] == "pixels"


def test_legacy_spots_without_pixels_lie_on_a_nominal_micrometre_plane(tmp_path):
    rng = np.random.default_rng(0)
    ids = [f"{x}x{y}" for x in range(6) for y in range(5)]
    table = pd.DataFrame(rng.poisson(2, (30, 3)) + 1, index=ids, columns=["TP53", "ACTB", "GAPDH"])
    (tmp_path / "a.tsv").write_bytes(gzip.compress(table.to_csv(sep="\t").encode()))  # gzipped, whatever its name says
    adata = curate(row(url=str(tmp_path / "a.tsv"), format="legacy_st"), GENE_TABLES)
    lattice = adata.uns[Keys.STPATCH]["lattice"]
    assert (lattice["kind"], lattice["pitch_um"]) == ("square", 200.0)
    assert lattice["um_per_px"] == pytest.approx(1.0)
    np.testing.assert_allclose(adata.obsm[Keys.SPATIAL][7], [200 * 1, 200 * 2])  # 1x2


def test_a_rejected_slice_carries_its_reason_through_the_file(tmp_path):
    error = EmptySlice(slice="s", file="f", found="nothing", expected="something", next_step="look")
    rejected(row(slice="s"), error).write_h5ad(tmp_path / "s.h5ad")
    adata = anndata.read_h5ad(tmp_path / "s.h5ad")
    assert adata.shape == (0, 0)
    reason = adata.uns[Keys.STPATCH][Keys.QUARANTINE]
    assert reason == error.as_row()
    assert reason["code"] == "empty"


def test_the_same_slice_gives_the_same_bytes(area, tmp_path):
    place = str(tmp_path / write_deposit(area, "geo", tmp_path)["url"])
    for name in ("one", "two"):
        write_slice(curate(row(url=place), GENE_TABLES), tmp_path / f"{name}.h5ad")
    assert (tmp_path / "one.h5ad").read_bytes() == (tmp_path / "two.h5ad").read_bytes()


def test_a_listing_says_where_simulated_and_fetched_files_lie(tmp_path):
    manifest = tmp_path / "resources" / "simulated" / "sim_x" / "deposit.json"
    simulate_to("sim_x", {"donor": "d", "accession": "geo", "format": "geo"}, GENE_TABLES / "genes_human.tsv", manifest)
    files, labels = located(row(slice="sim_x", source="simulated"), manifest)
    assert len(files) == 5
    assert labels == manifest.parent / "labels.tsv"
    listing = tmp_path / "files.json"
    entries = [
        {"path": "a.h5", "role": "slice"},
        {"path": "b.csv", "role": "slice"},
        {"path": "l.tsv", "role": "labels"},
    ]
    listing.write_text(json.dumps({"version": 1, "files": entries, "quarantine": None}))
    files, labels = located(row(source="geo"), listing)
    assert [path.name for path in files] == ["a.h5", "b.csv"]
    assert labels.name == "l.tsv"
    assert located(row(), None) == (None, None)


def test_a_slice_that_could_not_be_downloaded_is_rejected_with_the_downloads_own_reason(tmp_path):
    reason = DownloadFailed(
        slice="sim_t", file="https://h/a", found="HTTP 503", expected="it", next_step="wait"
    ).as_row()
    listing = tmp_path / "files.json"
    listing.write_text(json.dumps({"version": 1, "files": [], "quarantine": reason}))
    with pytest.raises(SliceError, match=r"\[download_failed\] slice sim_t .*HTTP 503") as failure:
        located(row(source="geo"), listing)
    assert rejected(row(), failure.value).uns["stpatch"]["quarantine"] == reason


def test_a_listing_of_another_version_is_refused(tmp_path):
    listing = tmp_path / "files.json"
    listing.write_text("[]")
    with pytest.raises(Unreadable, match="run again with --forcerun .*files.json"):
        located(row(source="geo"), listing)


def test_nothing_at_the_url_is_a_missing_file(tmp_path):
    with pytest.raises(MissingFile, match=rf"slice sim_t \({tmp_path}/nowhere\): found nothing there"):
        curate(row(url=f"{tmp_path}/nowhere"), GENE_TABLES)


def test_a_job_waits_for_a_listing_or_for_the_files_that_are_there(tmp_path):
    (tmp_path / "a.h5ad").write_text("")
    (tmp_path / ".a.h5ad").write_text("")
    (tmp_path / "image.tif").write_text("")
    url = f"{tmp_path} {tmp_path}/nowhere"
    assert curate_inputs(row(url=url)) == {"files": [tmp_path / "a.h5ad"]}
    assert curate_inputs(row(source="geo")) == {"listing": "resources/download/sim_t/files.json"}
    labels = tmp_path / "labels.tsv"
    labels.write_text("")
    assert curate_inputs(row(source="geo", labels=str(labels))) == {
        "listing": "resources/download/sim_t/files.json",
        "files": [labels],
    }
    fetched = row(source="geo", labels="https://example.org/labels.tsv")
    assert curate_inputs(fetched) == {"listing": "resources/download/sim_t/files.json"}
    own = row(url=f"{tmp_path}/a.h5ad", labels=str(labels))
    assert curate_inputs(own) == {"files": [tmp_path / "a.h5ad", labels]}
    assert curate_inputs(row(source="simulated")) == {"listing": "resources/simulated/sim_t/deposit.json"}


def test_a_prefix_is_taken_to_the_letter(tmp_path):
    names = ["s[1]_*?.h5", "s[1]_ab.h5", "s1_.h5"]
    for name in names:
        (tmp_path / name).write_text("")
    assert files_at(tmp_path / "s[1]_") == [tmp_path / name for name in names[:2]]
    assert files_at(tmp_path / "s[1]_*") == [tmp_path / names[0]]
    assert files_at(tmp_path / "nowhere" / "s") == []


def test_what_lies_in_hidden_folders_is_left_out(tmp_path):
    folder = tmp_path / ".work" / "outs"
    for place in (folder, folder / ".ipynb_checkpoints", folder / "spatial"):
        place.mkdir(parents=True)
        (place / "a.csv").write_text("")
    assert files_at(folder) == [folder / "a.csv", folder / "spatial" / "a.csv"]


@pytest.mark.parametrize("kind", SliceError.kinds(), ids=lambda kind: kind.__name__)
def test_an_error_goes_from_process_to_process_whole(kind):
    error = kind(slice="a", found="x", expected="y", next_step="z", file="f")
    error.stage = "elsewhere"  # as of a row of the quarantine table
    again = copy.copy(error)  # by what pickle takes it apart with
    assert (type(again), again.as_row(), str(again)) == (kind, error.as_row(), str(error))


def test_every_error_has_a_code_of_its_own():
    codes = [kind.code for kind in SliceError.kinds()]
    assert len(codes) == len(set(codes))
