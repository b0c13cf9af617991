"""GEO's packagings: what belongs to a section is found by names alone, and every packaging ends as the same counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.geo_deposits import (
    PACKAGINGS,
    cellxgene,
    flat_h5,
    flat_mex,
    from_outs,
    h5_and_archive,
    same,
    scaled_h5ad_and_mex,
    tarred,
    tree,
    without_positions,
    zip_of,
)
from tests.unit.simulated import GENE_TABLES, row, small_slice
from workflow.curate import curate, located
from workflow.deposits import write_spaceranger_2
from workflow.download import download
from workflow.errors import (
    MissingFile,
    MissingPositions,
    MultipleSections,
    SliceError,
    UnknownFormat,
    Unreadable,
    UnsafeName,
)
from workflow.geo import (
    choose,
    choose_members,
    parse_filelist,
    parse_listing,
    resolvable,
    sample_dir,
    series_dir,
)
from workflow.lock import Lock

PREFIX = "GSM900001_A1LN"  # no such sample: simulated
MEX = ["barcodes.tsv.gz", "features.tsv.gz", "matrix.mtx.gz"]
LISTING = """<!DOCTYPE HTML PUBLIC "-//W3C//DTD HTML 3.2 Final//EN">
<html><head><title>Index of /geo/samples/GSM900nnn/GSM900001/suppl</title></head><body>
<h1>Index of /geo/samples/GSM900nnn/GSM900001/suppl</h1>
<pre><a href="?C=N;O=D">Name</a> Last modified      Size  <hr><a href="/geo/samples/GSM900nnn/GSM900001/">Parent Directory</a> -
<a href="GSM900001%5FA1%5Fbarcodes.tsv.gz">GSM900001_A1_barcodes.tsv.gz</a>   2024-02-01 10:00   16K
<a href="GSM900001_A1_scalefactors_json.json.gz">GSM900001_A1_scalefactors_j..&gt;</a> 2024-02-01 10:00  190
<A HREF='GSM900001_a%2Bb&amp;c.csv.gz'>GSM900001_a+b&amp;c.csv.gz</A>   2024-02-01 10:00  3.1M
<a href="older/">older/</a>  2024-02-01 10:00   -
<hr></pre><a href="https://www.hhs.gov/index.html">HHS</a> <a href="mailto:webadmin@ncbi.nlm.nih.gov">mail</a>
</body></html>"""
FILELIST = """#Archive/File\tName\tTime\tSize\tType
Archive\tGSE900001_RAW.tar\t01/15/2019 12:55:11\t61061120\tTAR
File\tGSM900001_A1_barcodes.tsv.gz\t01/14/2019 14:53:56\t14793\tTSV
File\tGSM900001_A1_matrix.mtx.gz\t01/14/2019 14:54:03\t27825957\tMTX
"""


@pytest.fixture(scope="module")
def outs(tmp_path_factory):
    """The simulated slice's Space Ranger output."""
    folder = tmp_path_factory.mktemp("outs")
    write_spaceranger_2(small_slice(), folder)
    return from_outs(folder / "outs")


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """That output as it is, curated."""
    folder = tmp_path_factory.mktemp("original")
    write_spaceranger_2(small_slice(), folder)
    return curate(row(url=str(folder / "outs"), format="spaceranger"), GENE_TABLES)


def directory(server, files: dict[str, bytes], prefix: str) -> str:
    """A sample's folder, in which a second section lies too; the address of the first."""
    url = sample_dir("GSM900001")
    for name, data in files.items():
        server.put(url + name, data)
    server.put(url + "GSM900001_B2.tar.gz", b"not read")
    server.put(url + "GSM900001_B2_filtered_feature_bc_matrix.h5", b"not read")
    return f"{url}#prefix={prefix}"


def raw_tar(server, files: dict[str, bytes], prefix: str) -> str:
    """A RAW.tar of a series, read by member."""
    url = series_dir("GSE900001") + "GSE900001_RAW.tar"
    others = {"GSM900000_C.tar.gz": b"not read" * 50_000, "GSM900009_D_matrix.mtx.gz": b"not read" * 50_000}
    server.put(url, tarred(others | files, "w"))
    return f"{url}#prefix={prefix}"


def packed(server, name: str, data: bytes) -> str:
    url = f"https://zenodo.org/records/1/files/{name}"
    server.put(url, data)
    return url


CHANNELS = {
    "GEO folder": directory,
    "RAW.tar": raw_tar,
    "tar.gz": lambda server, files, prefix: packed(server, f"{prefix}.tar.gz", tarred(files)),
    "zip": lambda server, files, prefix: packed(server, f"{prefix}.zip", zip_of(files)),
}


@pytest.mark.parametrize("channel", CHANNELS)
@pytest.mark.parametrize("packaging", PACKAGINGS)
def test_every_packaging_ends_as_the_same_counts_wherever_it_is_fetched_from(
    packaging, channel, outs, original, server, tmp_path
):
    files = PACKAGINGS[packaging](outs, PREFIX)
    if packaging == "Space Ranger tar.gz" and channel in ("tar.gz", "zip"):
        files = tree(outs)  # packed once
    # A scaled h5ad is named a little differently: what both begin with.
    prefix = "GSM900001_A1" if "h5ad and" in packaging else PREFIX
    listing = download_to(tmp_path, server, CHANNELS[channel](server, files, prefix), "geo")
    wanted = row(source="geo", url="", format="geo")
    assert same(curate(wanted, GENE_TABLES, *located(wanted, listing)), original)
    assert b"not read" not in {path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_cellxgene_file_ends_as_the_same_counts_once_it_is_fetched(outs, original, server, tmp_path):
    url = "https://datasets.cellxgene.cziscience.com/00000000-0000-4000-9000-000000000001.h5ad"
    server.put(url, cellxgene(outs))
    listing = download_to(tmp_path, server, url, "cellxgene")
    wanted = row(source="cellxgene", format="cellxgene")
    assert same(curate(wanted, GENE_TABLES, *located(wanted, listing)), original)


def test_positions_missing_at_geo_set_the_slice_apart_with_the_reason(outs, server, tmp_path):
    url = directory(server, without_positions(outs, PREFIX), PREFIX)
    listing = download_to(tmp_path, server, url, "geo")
    with pytest.raises(SliceError, match=r"slice sim_t .*GSM900001.*no positions.*Next step.*files.json") as caught:
        located(row(source="geo", format="geo"), listing)
    assert caught.value.code == "missing_positions"


def download_to(folder: Path, server, url: str, format: str) -> Path:
    """Fetch a row as the rule does; its files.json."""
    wanted = row(url=url, format=format, sha256="", bytes="")
    lock = Lock("sim_t", folder / "lock.tsv", [])
    download(wanted, folder / "slice", lock, mirrors=server.mirrors, backoff=0.01)
    return folder / "slice" / "files.json"


def test_positions_that_are_missing_are_said_to_be(outs):
    with pytest.raises(MissingPositions, match="a matrix of GSM900001_A1LN and no positions.*Next step"):
        choose(without_positions(outs, PREFIX))


@pytest.mark.parametrize("packaging", PACKAGINGS)
def test_a_section_is_found_among_those_whose_names_are_longer(packaging, outs):
    files = PACKAGINGS[packaging](outs, PREFIX)
    lone = choose(files)
    others = [name.replace("A1LN", "A1LN0").replace("A1_LN", "A1_LN0").replace("A1ln", "A1ln0") for name in files]
    crowd = [*files, *(name for name in others if name not in files)]
    assert choose(crowd, PREFIX) == choose(crowd, PREFIX.lower()) == lone
    with pytest.raises(MultipleSections, match=r"2 sections: GSM900001_A1LN, GSM900001_A1LN0.*#prefix="):
        choose(crowd)
    assert set(resolvable(crowd)) == {PREFIX, PREFIX + "0"}
    assert resolvable(crowd)[PREFIX] == lone


def test_sections_of_one_sample_are_told_apart(outs):
    names = [f"GSM900001_{section}_{name}" for section in ("A1", "B1") for name in (*MEX, "tissue_positions.csv.gz")]
    for section in ("A1", "B1"):
        chosen = choose(names, f"GSM900001_{section}_")
        assert len(chosen) == 4
        assert all(f"_{section}_" in name for name in chosen)
    with pytest.raises(MultipleSections, match="GSM900001_A1, GSM900001_B1"):
        choose(names, "GSM900001")


def test_positions_of_another_section_of_the_sample_are_not_taken():
    names = [f"GSM900001_A1_{name}" for name in MEX] + ["GSM900001_B1_tissue_positions_list.csv.gz"]
    with pytest.raises(MissingPositions):
        choose(names)
    with pytest.raises(MissingPositions):
        choose(names, "GSM900001_A1")
    assert "GSM900001_B1_tissue_positions_list.csv.gz" in choose(names, "GSM900001_")  # the row says that they are one


def test_places_are_those_of_space_ranger(outs):
    assert choose(flat_mex(outs, PREFIX)) == {
        f"{PREFIX}_matrix.mtx.gz": "outs/feature_bc_matrix/matrix.mtx.gz",
        f"{PREFIX}_features.tsv.gz": "outs/feature_bc_matrix/features.tsv.gz",
        f"{PREFIX}_barcodes.tsv.gz": "outs/feature_bc_matrix/barcodes.tsv.gz",
        f"{PREFIX}_tissue_positions_list.csv.gz": "outs/spatial/tissue_positions_list.csv.gz",
        f"{PREFIX}_scalefactors_json.json.gz": "outs/spatial/scalefactors_json.json.gz",
    }
    assert set(choose(flat_h5(outs, PREFIX)).values()) == {
        "outs/filtered_feature_bc_matrix.h5",
        "outs/spatial/tissue_positions_list.csv.gz",
        "outs/spatial/scalefactors_json.json.gz",
    }
    assert set(choose(h5_and_archive(outs, PREFIX)).values()) == {
        "outs/filtered_feature_bc_matrix.h5",
        "spatial.tar.gz",
    }


def test_a_scaled_h5ad_is_never_taken_where_counts_lie(outs):
    names = list(scaled_h5ad_and_mex(outs, PREFIX))
    assert "GSM900001_A1_LN.h5ad" in names
    assert not any(name.endswith(".h5ad") for name in choose(names))
    assert not any(name.endswith(".h5ad") for name in choose(names, "GSM900001_"))
    with pytest.raises(UnknownFormat, match=f"h5ad of GSM900001_A1_LN beside the counts of {PREFIX}.*prefix={PREFIX}"):
        choose(names, "GSM900001_A1_LN")
    assert list(resolvable(names)) == [PREFIX]


@pytest.mark.parametrize("lost", MEX[:2])
def test_what_a_mex_may_lack_is_its_barcodes(lost, outs):
    names = [name for name in flat_mex(outs, PREFIX) if not name.endswith(lost)]
    if lost == "barcodes.tsv.gz":
        assert len(choose(names)) == 4
    else:
        with pytest.raises(MissingFile, match="matrix.mtx.gz without features.tsv"):
            choose(names)


@pytest.mark.parametrize(
    ("names", "error", "found"),
    [
        ([], MissingFile, "no matrix among 0 names"),
        (["GSE900001_RAW.tar", "filelist.txt"], MissingFile, "look for the counts"),
        (["GSM1_A1_fastqs.tar.gz", "GSM1_A1_image.tif.gz"], MissingFile, "no matrix"),
        (["GSM1_A1.h5ad", "GSM1_B1.h5ad"], MultipleSections, "GSM1_A1, GSM1_B1"),
        (["GSM1_A1.tar.gz", "GSM1_B1.tar.gz"], MultipleSections, "GSM1_A1, GSM1_B1"),
        (["GSM1_A1.tar.gz", "GSM1_A1_outs.tar.gz"], MultipleSections, "GSM1_A1.tar.gz and GSM1_A1_outs.tar.gz"),
        (
            ["GSM1_A1_filtered_feature_bc_matrix.h5", "GSM1_A1_tissue_positions.parquet"],
            MissingPositions,
            "only as parquet, as Visium HD",
        ),
    ],
)
def test_what_cannot_be_resolved_is_said_with_the_names(names, error, found):
    with pytest.raises(error, match=found):
        choose(names)


def test_a_prefix_that_nothing_begins_with_is_met_with_those_there_are():
    names = ["GSM1_A1.tar.gz", "GSM1_B1.tar.gz"]
    with pytest.raises(MissingFile, match="beginning with GSM1_C1.*one of GSM1_A1, GSM1_B1"):
        choose(names, "GSM1_C1")


def test_an_archive_of_images_beside_counts_is_no_section(outs):
    names = [*flat_mex(outs, PREFIX), f"{PREFIX}_annotated_slides.tar.gz"]
    assert len(choose(names)) == 5
    assert list(resolvable(names)) == [PREFIX]


def test_a_whole_output_stands_in_for_positions_that_do_not_lie_flat(outs):
    names = [*without_positions(outs, PREFIX), f"{PREFIX}_spaceranger.TGZ"]
    assert choose(names) == {f"{PREFIX}_spaceranger.TGZ": "spaceranger.tar.gz"}


def test_members_of_an_archive_are_chosen_wherever_the_section_is_named():
    wanted = {"outs/filtered_feature_bc_matrix.h5", "outs/spatial/tissue_positions_list.csv"}
    for names in (
        ["filtered_feature_bc_matrix.h5", "spatial/tissue_positions_list.csv"],
        ["./GSM1/outs/filtered_feature_bc_matrix.h5", "./GSM1/outs/spatial/tissue_positions_list.csv"],
        ["GSM1/GSM1_A1_filtered_feature_bc_matrix.h5", "GSM1/spatial/", "GSM1/spatial/tissue_positions_list.csv"],
        ["x/spatial/A_tissue_positions_list.csv", "x/filtered_feature_bc_matrix.h5", "x/raw_feature_bc_matrix.h5"],
    ):
        assert set(choose_members(names).values()) == wanted
        assert set(choose_members([*names, "__MACOSX/filtered_feature_bc_matrix.h5"]).values()) == wanted
    two = [f"{section}/outs/{name}" for section in "ab" for name in ("filtered_feature_bc_matrix.h5", "spatial/x.png")]
    with pytest.raises(MultipleSections, match="a/outs, b/outs"):
        choose_members(two)


HOSTILE = ["../GSM1_matrix.mtx.gz", "/etc/GSM1_matrix.mtx.gz", "a/GSM1_matrix.mtx.gz", "..", "GSM1\n_matrix.mtx.gz"]
HOSTILE += ["GSM1\0.h5ad", "GSM1\\..\\matrix.mtx.gz", "\x1b[2JGSM1.h5ad", ""]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_that_lead_out_of_the_folder_refuse_the_whole_listing(name):
    names = [f"GSM1_A1_{end}" for end in (*MEX, "tissue_positions.csv.gz")]
    assert len(choose(names)) == 4
    for refusing in (choose, resolvable):
        with pytest.raises(UnsafeName, match="Next step: do not fetch it"):
            refusing([*names, name])
    if "\n" not in name and "\0" not in name:
        with pytest.raises(UnsafeName):
            parse_filelist(FILELIST + f"File\t{name}\t01/14/2019 14:54:03\t1\tMTX\n")


@pytest.mark.parametrize(
    "href", ["%2e%2e%2fescape", "..%2fescape", "a/../../escape", "%2Fetc%2Fpasswd", "x%0Ay", "a%5Cb"]
)
def test_a_listing_whose_links_decode_to_another_folder_is_refused(href):
    with pytest.raises(UnsafeName, match="listing"):
        parse_listing(f'<pre><a href="{href}">x</a></pre>')


def test_a_members_path_may_have_folders_but_not_leave_them():
    for name in ("../x/matrix.mtx.gz", "/outs/matrix.mtx.gz", "outs/../../matrix.mtx.gz"):
        with pytest.raises(UnsafeName):
            choose_members(["outs/filtered_feature_bc_matrix.h5", "outs/spatial/tissue_positions.csv", name])


def test_a_listing_gives_names_decoded_and_sizes_where_they_are_exact():
    assert parse_listing(LISTING) == [
        ("GSM900001_A1_barcodes.tsv.gz", None),
        ("GSM900001_A1_scalefactors_json.json.gz", 190),
        ("GSM900001_a+b&c.csv.gz", None),
    ]


def test_a_page_that_is_no_listing_has_no_files():
    page = '<html><head><link href="mailto:x@y"></head><body><h1>Access forbidden!</h1><a href="/">x</a></body></html>'
    assert parse_listing(page) == []
    assert parse_listing("") == []


def test_a_file_list_gives_the_members_and_not_the_archive():
    assert parse_filelist(FILELIST) == [
        ("GSM900001_A1_barcodes.tsv.gz", 14793),
        ("GSM900001_A1_matrix.mtx.gz", 27825957),
    ]


@pytest.mark.parametrize("text", ["", "<html>busy</html>", FILELIST.replace("Name", "File"), FILELIST + "File\tx\n"])
def test_a_file_list_that_is_none_is_unreadable(text):
    with pytest.raises(Unreadable, match="filelist.txt"):
        parse_filelist(text)


def test_folders_of_accessions_lose_three_digits():
    assert sample_dir("GSM8047882") == "https://ftp.ncbi.nlm.nih.gov/geo/samples/GSM8047nnn/GSM8047882/suppl/"
    assert series_dir("GSE567") == "https://ftp.ncbi.nlm.nih.gov/geo/series/GSEnnn/GSE567/suppl/"
    for wrong in ("GSE1", "GSM", "GSM12/..", "gsm1"):
        with pytest.raises(ValueError, match="expected GSM"):
            sample_dir(wrong)


def test_every_refusal_is_a_slice_error_that_the_caller_completes():
    with pytest.raises(SliceError) as caught:
        choose(["GSM1_A1_filtered_feature_bc_matrix.h5"])
    assert (caught.value.slice, caught.value.file) == ("", "")
