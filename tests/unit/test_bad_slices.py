"""Slices as they are found in the wild, each through the stage's own entry: set apart by its own code, or taken, and why."""

from __future__ import annotations

import dataclasses
import gzip
import io
import os
import re
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from tests.conftest import ROOT
from tests.unit.simulated import GENE_TABLES, row, small_slice
from workflow.catalogue import load_catalogue
from workflow.child import confined
from workflow.curate import curate, curate_apart, curate_or_reject
from workflow.deposits import Slice, positions, write_deposit, write_geo, write_tenx_h5
from workflow.errors import BadLabels, CatalogueError, SliceError, UnsafeHdf5
from workflow.keys import Keys
from workflow.readers.hdf5 import vet


@pytest.fixture(scope="module")
def area() -> Slice:
    return forty_genes()


def forty_genes() -> Slice:
    """A whole capture area (simulated)."""
    whole = small_slice()
    return dataclasses.replace(
        whole, counts=whole.counts[:, :40], gene_ids=whole.gene_ids[:40], symbols=whole.symbols[:40]
    )


def h5ad(change: Callable[[anndata.AnnData], anndata.AnnData | None]):
    """The spots in tissue as a plain h5ad with symbols, changed."""

    def make(area: Slice, folder: Path) -> str:
        kept = area.in_tissue
        obs = pd.DataFrame(
            {"array_row": area.array_row[kept], "array_col": area.array_col[kept]}, index=area.barcodes[kept]
        )
        adata = anndata.AnnData(
            X=area.counts[kept].astype(np.float32),
            obs=obs,
            var=pd.DataFrame(index=area.symbols),
            obsm={"spatial": area.pixels[kept]},
        )
        adata = change(adata) or adata
        adata.write_h5ad(folder / "it.h5ad")
        return "it.h5ad"

    return make


def values(change: Callable[[np.ndarray], np.ndarray]):
    """The same, with other values."""

    def put(adata: anndata.AnnData) -> None:
        adata.X = sparse.csr_matrix(change(adata.X.toarray()).astype(np.float32))

    return h5ad(put)


def spaceranger(area: Slice, folder: Path, text: str | None = None, **other) -> str:
    """An h5 and a table of positions: the slice's own, another's (fields in ``other``), or a text."""
    write_tenx_h5(area, folder / "filtered_feature_bc_matrix.h5")
    text = positions(dataclasses.replace(area, **other), header=False) if text is None else text
    (folder / "tissue_positions_list.csv").write_text(text)
    return ""


def geo_with(name: str, change: Callable[[bytes], bytes]):
    """Flat files, the text of one of them changed."""

    def make(area: Slice, folder: Path) -> str:
        prefix = write_geo(area, folder)
        path = folder / f"{prefix}_{name}.gz"
        path.write_bytes(gzip.compress(change(gzip.decompress(path.read_bytes())), 1))
        return prefix

    return make


def cut(layout: str, name: str, keep: float):
    """A deposit of which one file ends early."""

    def make(area: Slice, folder: Path) -> str:
        place = write_deposit(area, layout, folder)["url"]
        (path,) = folder.rglob(f"*{name}")
        path.write_bytes(path.read_bytes()[: int(path.stat().st_size * keep)])
        return place

    return make


def mangled(area: Slice, folder: Path) -> str:
    """Read as if the first spot were a header, and written again: equal names were made different."""
    table = pd.read_csv(io.StringIO(positions(area, header=False)))
    return spaceranger(area, folder, table.to_csv(index=False))


def without_first(area: Slice, folder: Path) -> str:
    """All 4,992 spots in the matrix, all but the first in the positions."""
    lines = positions(area, header=False).splitlines(keepends=True)
    first = lines[0].split(",")[0]
    everywhere = dataclasses.replace(area, in_tissue=area.in_tissue | (area.barcodes == first))
    return spaceranger(everywhere, folder, "".join(lines[1:]))


def without_spatial(area: Slice, folder: Path) -> str:
    write_deposit(area, "spaceranger-2", folder)
    for path in (folder / "outs/spatial").iterdir():
        path.unlink()
    (folder / "outs/spatial").rmdir()
    return "outs"


def transposed_mex(area: Slice, folder: Path) -> str:
    def turn(text: bytes) -> bytes:
        head, *lines = text.decode().splitlines()
        lines = [line.split() for line in lines if not line.startswith("%")]
        return "\n".join([head, *(" ".join([b, a, c]) for a, b, c in lines)]).encode()

    return geo_with("matrix.mtx", turn)(area, folder)


def two_species(adata: anndata.AnnData) -> None:
    adata.var_names = [f"{'GRCh38_' if i % 2 else 'mm10___'}{name}" for i, name in enumerate(adata.var_names)]


def zero_bytes(area: Slice, folder: Path) -> str:
    (folder / "it.h5ad").write_bytes(b"")
    return "it.h5ad"


def elsewhere(area: Slice, folder: Path) -> str:
    """Its matrix is a link into another file."""
    h5ad(lambda adata: None)(area, folder)
    (folder / "secret").mkdir()
    with h5py.File(folder / "it.h5ad", "r+") as file, h5py.File(folder / "secret/x.h5", "w") as other:
        file.copy("X", other)
        del file["X"]
        file["X"] = h5py.ExternalLink("secret/x.h5", "/X")
    return "it.h5ad"


def far_away(area: Slice, folder: Path) -> str:
    return spaceranger(area, folder, array_row=np.where(area.array_row == 40, 10**12, area.array_row))


@dataclass(frozen=True)
class Bad:
    """How it is made, the code it ends in, and pieces of what is said."""

    make: Callable[[Slice, Path], str]
    code: str
    found: str
    next_step: str


BAD = {
    "first spot taken for a header and written again": Bad(
        mangled, "wrong_header", r"a first line that .*,0\.1,0\.2,", "own table"
    ),
    "first spot dropped": Bad(without_first, "wrong_header", "4991 spots listed, one less", "own table"),
    "a header among the barcodes": Bad(
        geo_with("barcodes.tsv", lambda text: b"x\n" + text),
        "wrong_header",
        r"40 x (\d+) with 40 features",
        "first lines",
    ),
    "row and column exchanged": Bad(
        h5ad(lambda a: setattr(a, "obs", a.obs.set_axis(["array_col", "array_row"], axis=1))),
        "swapped_axes",
        "with row and column exchanged they fit",
        "exchange array_row and array_col",
    ),
    "positions of another sample": Bad(
        lambda area, folder: spaceranger(area, folder, in_tissue=np.roll(area.in_tissue, 1234)),
        "positions_mismatch",
        r"in tissue",
        "belong to this matrix",
    ),
    "no spatial folder": Bad(without_spatial, "missing_positions", "no positions", "positions' path"),
    "normalised": Bad(values(np.log1p), "normalised", r"\d+ fractions among", "raw counts"),
    "z-scored": Bad(
        values(lambda x: (x - x.mean(0)) / (x.std(0) + 1)), "scaled", "negative values, the least -", "raw counts"
    ),
    "NaN": Bad(values(lambda x: np.where(x == 1, np.nan, x)), "not_finite", "NaN or infinite", "raw counts"),
    "negative": Bad(values(lambda x: x - 1), "negative", "negative values, the least -1", "raw counts"),
    "transposed h5ad": Bad(h5ad(lambda a: a.T.copy()), "transposed", "genes in rows", "transpose"),
    "transposed MEX": Bad(transposed_mex, "transposed", "barcodes x features", "transpose"),
    "X empty": Bad(values(lambda x: 0 * x), "empty", "no count", "check that"),
    "no spot in tissue": Bad(
        lambda area, folder: spaceranger(area, folder, in_tissue=np.zeros_like(area.in_tissue)),
        "no_tissue",
        "0 spots in tissue of",
        "in_tissue is 1",
    ),
    "no spot in tissue of an h5ad": Bad(
        h5ad(lambda a: a.obs.insert(0, "in_tissue", 0)), "no_tissue", "0 spots in tissue of", "in_tissue is 1"
    ),
    "two species": Bad(h5ad(two_species), "multiple_organisms", r"GRCh38 \(20 features\) and mm10", "of its own"),
    "is_single false": Bad(
        h5ad(lambda a: a.uns.update(spatial={"is_single": False})), "multiple_sections", "is_single", "split the file"
    ),
    "gzip cut": Bad(cut("geo", "matrix.mtx.gz", 0.7), "truncated", "EOFError", "compare its size"),
    "h5 cut": Bad(cut("spaceranger-2", "matrix.h5", 0.7), "truncated", "truncated file", "compare its size"),
    "h5ad cut": Bad(cut("cellxgene", ".h5ad", 0.7), "truncated", "truncated file", "compare its size"),
    "h5ad of no bytes": Bad(zero_bytes, "zero_bytes", "OSError", "fetch or copy"),
    "gzip of no bytes": Bad(cut("geo", "features.tsv.gz", 0), "zero_bytes", "no bytes", "fetch or copy"),
    "matrix in another file": Bad(elsewhere, "unsafe_hdf5", "link to the file secret/x.h5", "write it anew"),
    "positions of no array": Bad(
        far_away, "impossible_positions", r"array positions up to 1e\+12", "columns exchanged"
    ),
}


def curated(make, area: Slice, folder: Path, **changes: str) -> anndata.AnnData:
    """What the stage writes."""
    place = folder / "deposit"
    place.mkdir()
    out = folder / "sim_t.h5ad"
    curate_or_reject(out, row(url=str(place / make(area, place)), **changes), GENE_TABLES)
    return anndata.read_h5ad(out)


@pytest.mark.parametrize("what", BAD)
def test_a_bad_slice_is_set_apart_with_a_code_of_its_own_and_what_to_do(what, area, tmp_path):
    bad = BAD[what]
    adata = curated(bad.make, area, tmp_path)
    reason = adata.uns[Keys.STPATCH][Keys.QUARANTINE]
    assert adata.shape == (0, 0)
    assert (reason["slice"], reason["stage"], reason["code"]) == ("sim_t", "curate", bad.code), reason
    assert re.search(bad.found, reason["found"]), reason
    assert bad.next_step in reason["next_step"], reason
    assert reason["expected"]
    assert reason["file"].startswith(str(tmp_path))


def test_what_are_different_faults_have_different_codes():
    same = {"first spot dropped": "a header among the barcodes", "transposed h5ad": "transposed MEX"}
    groups = [
        bad.code for what, bad in BAD.items() if not re.search("cut|bytes|tissue|first spot|header|transposed", what)
    ]
    assert len(groups) == len(set(groups))
    assert all(BAD[a].code == BAD[b].code for a, b in same.items())


def taken(adata: anndata.AnnData) -> dict:
    assert Keys.QUARANTINE not in adata.uns[Keys.STPATCH], adata.uns[Keys.STPATCH].get(Keys.QUARANTINE)
    return adata.uns[Keys.STPATCH]["counts"]


def test_barcodes_without_their_suffix_on_one_side_are_cured(area, tmp_path):
    text = positions(area, header=False).replace("-1,", ",")
    adata = curated(lambda area, folder: spaceranger(area, folder, text), area, tmp_path)
    assert taken(adata)["spots_in_tissue"] == area.in_tissue.sum()
    assert (adata.X != area.counts[area.in_tissue]).nnz == 0


def test_suffixes_that_tell_spots_apart_are_not_taken_off(area, tmp_path):
    """Two libraries in one matrix: AAAC-1 and AAAC-2 are two spots."""
    barcodes = area.barcodes.copy()
    barcodes[1::2] = [barcode[:-1] + "2" for barcode in barcodes[::2]]
    text = positions(dataclasses.replace(area, barcodes=barcodes), header=False)
    text = text.replace("-1,", "-3,").replace("-2,", "-4,")
    other = dataclasses.replace(area, barcodes=barcodes)
    adata = curated(lambda _, folder: spaceranger(other, folder, text), other, tmp_path)
    assert adata.uns[Keys.STPATCH][Keys.QUARANTINE]["code"] == "positions_mismatch"


def test_symbols_that_stand_twice_are_summed_and_counted(area, tmp_path):
    def double(adata):
        adata.var["symbol"] = [*adata.var_names[:-1], adata.var_names[0]]
        adata.var_names = [f"row{i}" for i in range(adata.n_vars)]

    adata = curated(h5ad(double), area, tmp_path)
    assert taken(adata)["genes_merged"] == 1
    dense = area.counts[area.in_tissue].toarray()
    first = adata[:, area.gene_ids[0]].X.toarray().ravel()
    np.testing.assert_array_equal(first, dense[:, 0] + dense[:, -1])


def test_dates_for_symbols_are_dropped_and_counted_and_do_no_harm_beside_ids(area, tmp_path):
    dates = ["1-Mar", "2-Sep", "2023-03-01"]

    def spoil(adata):
        adata.var_names = [*dates, *adata.var_names[3:]]

    assert taken(curated(h5ad(spoil), area, tmp_path))["genes_unknown"] == 3

    def spoil_beside_ids(adata):
        adata.var["symbol"] = [*dates, *adata.var_names[3:]]
        adata.var_names = area.gene_ids

    (tmp_path / "b").mkdir()
    adata = curated(h5ad(spoil_beside_ids), area, tmp_path / "b")
    assert taken(adata)["genes_unknown"] == 0
    assert list(adata.var_names) == list(area.gene_ids)


def test_pixels_exchanged_turn_the_picture_over_and_change_no_neighbour(area, tmp_path):
    adata = curated(h5ad(lambda a: a.obsm.update(spatial=a.obsm["spatial"][:, ::-1].copy())), area, tmp_path)
    taken(adata)
    np.testing.assert_array_equal(adata.obs[Keys.ARRAY_ROW], area.array_row[area.in_tissue])
    assert adata.uns[Keys.STPATCH]["lattice"]["residual"] < 0.01


def test_a_slide_of_11_mm_is_taken_whole(area, tmp_path):
    """128 rows of 112 spots: 14,336."""
    array_row, half = np.divmod(np.arange(14336), 112)
    array_col = 2 * half + array_row % 2
    letters = np.array(list("ACGT"))
    codes = (np.arange(14336)[:, None] // 4 ** np.arange(16)) % 4
    slide = dataclasses.replace(
        area,
        barcodes=np.array([f"{''.join(line)}-1" for line in letters[codes]], dtype=object),
        array_row=array_row,
        array_col=array_col,
        pixels=np.column_stack([array_col / 2, array_row * np.sqrt(3) / 2]) * 137.7 + 100,
        in_tissue=np.ones(14336, bool),
        domain=np.zeros(14336, np.int64),
        counts=sparse.csr_matrix(np.random.default_rng(0).poisson(1, (14336, 40)).astype(np.int32)),
    )
    adata = curated(lambda _, folder: spaceranger(slide, folder), slide, tmp_path)
    assert taken(adata)["spots_in_tissue"] == 14336
    assert adata.uns[Keys.STPATCH]["lattice"]["kind"] == "staggered"
    assert adata.obs[[Keys.ARRAY_ROW, Keys.ARRAY_COL]].max().tolist() == [127, 223]


# HDF5 that means ill.


def circle(file):
    file["obs/again"] = file["/"]


def soft_circle(file):
    file["uns/again"] = h5py.SoftLink("/")


def virtual(file):
    layout = h5py.VirtualLayout(shape=(3,), dtype="i4")
    layout[:] = h5py.VirtualSource("other.h5", "data", shape=(3,))
    file.create_virtual_dataset("uns/numbers", layout)


def external(file):
    file.create_dataset("uns/numbers", (100,), "u1", external=[("/etc/hostname", 0, 100)])


def endless(file):
    file.create_dataset("uns/numbers", (2**40,), "i4", chunks=(1024,))


HOSTILE = {
    "uns/numbers, whose data lie in other files": (virtual, external),
    "the group .* in two places": (circle, soft_circle),
    "bytes more than what is stored": (endless,),
}


@pytest.mark.parametrize(("found", "change"), [(found, change) for found in HOSTILE for change in HOSTILE[found]])
def test_an_h5_that_leads_out_of_itself_or_into_itself_is_refused_before_it_is_read(found, change, area, tmp_path):
    h5ad(lambda adata: None)(area, tmp_path)
    with h5py.File(tmp_path / "it.h5ad", "r+") as file:
        change(file)
    with pytest.raises(UnsafeHdf5, match=rf"slice s .*it.h5ad.*found {found}|found .*{found}"):
        vet("s", tmp_path / "it.h5ad")


def test_links_within_a_file_to_its_data_are_no_harm(area, tmp_path):
    h5ad(lambda adata: None)(area, tmp_path)
    with h5py.File(tmp_path / "it.h5ad", "r+") as file:
        file["uns/same"] = file["X/data"]
        file["uns/named"] = h5py.SoftLink("/X/data")
        file["uns/nothing"] = h5py.SoftLink("/nowhere")
    assert vet("s", tmp_path / "it.h5ad") is None


# What fuzzing found, made small.


def announce(text: bytes) -> bytes:
    head, comment, size, rest = text.split(b"\n", 3)
    rows, columns, _ = size.split()
    return b"\n".join([head, comment, b" ".join([rows, columns, b"5000000000000"]), rest])


SPOILED = {
    "a blank barcode among the positions": (
        lambda area, folder: spaceranger(area, folder, "," + positions(area, header=False).split(",", 1)[1]),
        "blank barcodes",
    ),
    "more entries announced than the text can hold": (
        geo_with("matrix.mtx", announce),
        "5000000000000 entries announced",
    ),
    "NUL in a gene's name": (
        geo_with("features.tsv", lambda text: text.replace(b"\tGene", b"\0\tGene", 1)),
        "NUL characters in names",
    ),
    "scale factors nested without end": (
        geo_with("scalefactors_json.json", lambda text: b"[" * 10**5),
        "RecursionError",
    ),
}


@pytest.mark.parametrize("what", SPOILED)
def test_spoiled_text_is_unreadable(what, area, tmp_path):
    make, found = SPOILED[what]
    reason = curated(make, area, tmp_path).uns[Keys.STPATCH][Keys.QUARANTINE]
    assert reason["code"] == "unreadable"
    assert found in reason["found"]


def test_an_entry_that_stands_twice_is_summed_beyond_its_own_type(area, tmp_path):
    """200 + 200 in bytes are 400, not 144."""

    def double(adata):
        counts = sparse.csr_matrix(
            ([200] * adata.n_obs * 2, [0] * adata.n_obs * 2, range(0, 2 * adata.n_obs + 1, 2)), adata.shape
        )
        counts.data = counts.data.astype(np.uint8)
        adata.X = counts

    adata = curated(h5ad(double), area, tmp_path)
    taken(adata)
    assert (adata.X[:, 0].toarray() == 400).all()


def test_a_long_key_of_labels_is_looked_at_once(area, tmp_path):
    """A run of 200,000 letters that no suffix ends: time linear in it, not its square."""
    labels = tmp_path / "labels.csv"
    labels.write_text(f"barcode,domain\n{'A' * 200_000}x,one\n")
    begin = time.process_time()
    reason = curated(h5ad(lambda a: None), area, tmp_path, labels=str(labels), label_column="domain").uns[Keys.STPATCH]
    assert reason[Keys.QUARANTINE]["code"] == "bad_labels"
    assert time.process_time() - begin < 10


@pytest.mark.parametrize(
    ("content", "found"), [(b"raw\tname\nx\ty\n", "without the columns"), (b"raw\xff\n", "is no table")]
)
def test_a_map_of_labels_that_is_none_is_said_to_be_none(content, found, area, tmp_path):
    (tmp_path / "map.tsv").write_bytes(content)
    (tmp_path / "labels.csv").write_text(f"barcode,domain\n{area.barcodes[area.in_tissue][0]},x\n")
    place = tmp_path / h5ad(lambda a: None)(area, tmp_path)
    wanted = row(url=str(place), labels=str(tmp_path / "labels.csv"), label_column="domain")
    with pytest.raises(BadLabels, match=found):
        curate(wanted, GENE_TABLES, label_map=tmp_path / "map.tsv")


def test_a_catalogue_that_is_no_text_is_said_to_be_none(tmp_path):
    (tmp_path / "table.tsv").write_bytes(b"slice\xff\tdataset\n")
    with pytest.raises(CatalogueError, match="expected tab-separated text in UTF-8"):
        load_catalogue(tmp_path / "table.tsv")


# The child process.


def crash(number: int) -> None:
    signal.signal(number, signal.SIG_DFL)  # pytest's own handler prints a page
    os.kill(os.getpid(), number)


def test_work_that_comes_to_its_end_leaves_its_files(tmp_path):
    assert confined(lambda: (tmp_path / "made").write_text("x") and None, 100) == ""
    assert (tmp_path / "made").read_text() == "x"


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS])
def test_a_crash_of_the_library_ends_in_words(number):
    assert confined(lambda: crash(number), 100) == f"a crash of the library that reads it ({number.name})"


def test_memory_beyond_the_jobs_own_is_not_given():
    assert confined(lambda: bytearray(4 << 30) and None, 100) == "more memory needed than the 100 MB of the job"
    assert confined(lambda: bytearray(50 << 20) and None, 100) == ""


def test_what_does_not_end_is_ended():
    def spin():
        while True:
            pass

    assert confined(spin, 100, cpu_s=1) == "no end after 1 s of processor time"


def test_what_is_no_fault_of_the_file_fails_the_job(capfd):
    with pytest.raises(ChildProcessError, match="SIGKILL"):
        confined(lambda: os.kill(os.getpid(), signal.SIGKILL), 100)
    with pytest.raises(ChildProcessError, match="traceback above"):
        confined(lambda: {}["no such key"], 100)
    assert "KeyError: 'no such key'" in capfd.readouterr().err


def test_the_child_dies_with_its_parent(tmp_path):
    """An orphan would write into the files of the run after a kill."""

    def parent():
        confined(lambda: (tmp_path / "pid").write_text(str(os.getpid())) and signal.pause(), 100)

    pid = os.fork()
    if pid == 0:
        try:
            parent()
        finally:
            os._exit(0)
    wait_for(lambda: (tmp_path / "pid").is_file() and (tmp_path / "pid").read_text())
    orphan = int((tmp_path / "pid").read_text())
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    wait_for(lambda: not Path(f"/proc/{orphan}").exists() or " Z " in Path(f"/proc/{orphan}/stat").read_text())


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_slice_that_takes_its_reader_down_is_set_apart(area, tmp_path, monkeypatch):
    place = write_deposit(area, "spaceranger-2", tmp_path)["url"]
    out, wanted = tmp_path / "sim_t.h5ad", row(url=str(tmp_path / place))
    curate_apart(out, wanted, GENE_TABLES, memory_mb=1000)
    assert anndata.read_h5ad(out).n_obs == area.in_tissue.sum()
    whole = out.read_bytes()
    curate_or_reject(out, wanted, GENE_TABLES)
    assert out.read_bytes() == whole  # the child changes nothing
    monkeypatch.setattr("workflow.curate.read_deposit", lambda *given: crash(signal.SIGABRT))
    curate_apart(out, wanted, GENE_TABLES, memory_mb=1000)
    reason = anndata.read_h5ad(out).uns[Keys.STPATCH][Keys.QUARANTINE]
    assert (reason["code"], reason["stage"]) == ("unreadable", "curate")
    assert "a crash of the library that reads it (SIGABRT)" in reason["found"]
    assert "--set-resources curate:mem_mb=4000" in reason["next_step"]


# What users read.


def test_the_table_of_codes_in_the_docs_is_that_of_the_code():
    text = (ROOT / "docs/reliability.md").read_text()
    table = text[text.index("<!-- codes -->") : text.index("<!-- /codes -->")]
    listed = re.findall(r"^\| `(\w+)` \| (\w+) \|", table, re.MULTILINE)
    assert sorted(listed) == sorted((kind.code, kind.stage) for kind in SliceError.kinds())


def test_a_reason_fits_in_a_line_of_a_table_whatever_the_file_says():
    error = SliceError(slice="s", found="a\tb\nc\0d\ud800" + "x" * 9999, expected="e", next_step="n")
    found = error.as_row()["found"]
    assert found.startswith("a\\tb\\nc\\x00d\\ud800x")
    assert found.isprintable()
    assert len(found) < 2100
