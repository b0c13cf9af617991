"""What is fuzzed: for each kind of foreign file a good deposit, what reads it, and what a right answer looks like."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import anndata
import numpy as np
import safetensors.torch
import yaml

from tests.conftest import ROOT
from tests.fuzz.cage import Outcome, caged
from tests.fuzz.mutate import Step, at, spoil
from tests.trainer import corpus
from tests.unit.simulated import GENE_TABLES, row, small_slice
from trainer import model as models
from trainer import snapshots
from trainer.config import settings
from trainer.data import Order, Shards, Vocabulary
from trainer.embed import WholeSlice, read_for
from trainer.errors import TrainerError
from trainer.pretrain import SETTINGS
from trainer.stream import Stream
from workflow import archives, geo, locators
from workflow.catalogue import check_config, load_roles
from workflow.curate import curate_or_reject
from workflow.deposits import Slice, domain_names, write_deposit
from workflow.errors import CatalogueError, SliceError
from workflow.genes import load_genes
from workflow.grid import make_grid
from workflow.keys import Keys
from workflow.transfer import Source


@dataclass(frozen=True)
class Target:
    """One kind of files.

    Attributes
    ----------
    make
        Writes a good deposit below a folder.
    read
        Reads it; "" for a right result, or the code of a slice set apart. A false result is an AssertionError.
    typed
        Errors that are answers.
    contained
        In the pipeline a crash or short memory here is that of a child process (`workflow.child`), which sets the slice apart.
    mended
        Brings recorded hashes and sizes in step with spoiled files, as whoever means ill would.
    """

    name: str
    make: Callable[[Path], None]
    read: Callable[[Path], str]
    typed: tuple[type[Exception], ...]
    contained: bool = False
    mended: Callable[[Path], None] = lambda folder: None

    @functools.cache  # noqa: B019  (a handful, for the life of the tests)
    def files(self, folder: Path) -> tuple[tuple[str, bytes], ...]:
        """The good deposit, made once: (path below the folder, content)."""
        good = folder / "good"
        shutil.rmtree(good, ignore_errors=True)
        good.mkdir(parents=True)
        self.make(good)
        paths = sorted(path for path in good.rglob("*") if path.is_file())
        return tuple((str(path.relative_to(good)), path.read_bytes()) for path in paths)

    def run(self, folder: Path, victim: float, steps: list[Step], mend: bool) -> Outcome:
        """Spoil one file of a fresh copy of the deposit (none without steps), and read it in a cage."""
        files, fresh = self.files(folder), folder / "case"
        shutil.rmtree(fresh, ignore_errors=True)
        for name, content in files:
            path = fresh / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

        def work() -> str:
            if steps:
                spoil(fresh / files[at(len(files), victim)][0], steps)
            if mend:
                self.mended(fresh)
            return self.read(fresh)

        return caged(work, fresh, self.typed)


# Slices.


@functools.cache
def patch() -> Slice:
    """A piece of a simulated slice: about a hundred spots, forty genes."""
    whole = small_slice()
    rows = (whole.array_row >= 34) & (whole.array_row < 44) & (whole.array_col >= 54) & (whole.array_col < 74)
    spots = np.flatnonzero(rows)
    parts = {name: getattr(whole, name)[spots] for name in "barcodes array_row array_col pixels domain".split()}
    parts |= {"counts": whole.counts[spots][:, :40], "gene_ids": whole.gene_ids[:40], "symbols": whole.symbols[:40]}
    parts["domain"] = np.where(parts["domain"] < 0, 0, parts["domain"])
    load_genes(GENE_TABLES / "genes_human.tsv"), load_genes(GENE_TABLES / "genes_mouse.tsv")  # once, before any fork
    return dataclasses.replace(whole, in_tissue=np.arange(len(spots)) % 12 > 0, **parts)


def make_cellxgene(folder: Path) -> None:
    write_deposit(patch(), "cellxgene", folder)
    (path,) = folder.iterdir()
    adata = anndata.read_h5ad(path)
    adata.uns["spatial"]["sim_t"].pop("images")  # most of the bytes, and never read
    adata.write_h5ad(path)


def make_legacy(folder: Path) -> None:
    area, kept = patch(), np.flatnonzero(patch().in_tissue)
    lines = ["\t".join(["", *area.symbols])]
    for i in kept:
        lines.append("\t".join([f"{area.array_col[i]}x{area.array_row[i]}", *map(str, area.counts[i].toarray()[0])]))
    (folder / "counts.tsv").write_text("\n".join(lines) + "\n")
    spots = ["x\ty\tpixel_x\tpixel_y\tselected"]
    for i in kept:
        x, y = area.array_col[i] / 2, area.array_row[i] * 0.75**0.5
        spots.append(f"{area.array_col[i]}\t{area.array_row[i]}\t{100 * x:.1f}\t{100 * y:.1f}\t1")
    (folder / "spots.tsv").write_text("\n".join(spots) + "\n")


def read_slice(folder: Path, label_map: Path | None = None, **given) -> str:
    """Curate what lies there through the stage's own function, and look at what it wrote."""
    out = folder / "out.h5ad"
    curate_or_reject(out, row(**{"url": str(folder / "it"), **given}), GENE_TABLES, label_map=label_map)
    adata = anndata.read_h5ad(out)
    facts = adata.uns[Keys.STPATCH]
    if Keys.QUARANTINE in facts:
        reason = facts[Keys.QUARANTINE]
        assert adata.shape == (0, 0)
        assert reason["code"] in {kind.code for kind in SliceError.kinds()}
        assert all(reason[name] for name in ("slice", "stage", "found", "expected", "next_step")), reason
        assert all(text.isprintable() for text in reason.values()), reason
        return reason["code"]
    X = adata.X
    assert (X.format, X.dtype) == ("csr", np.int32)
    X.check_format(full_check=True)
    assert X.has_canonical_format
    assert adata.n_obs > 0 and adata.n_vars > 0 and X.nnz > 0  # noqa: PT018
    assert X.data.min() > 0 and X.data.max() <= 65535  # noqa: PT018
    assert adata.var_names.is_unique and adata.var_names.str.fullmatch(r"ENSG\d{11}").all()  # noqa: PT018
    totals = adata.obs[Keys.TOTAL_COUNTS].to_numpy()
    assert (totals >= np.asarray(X.sum(1, dtype=np.int64)).ravel()).all()
    assert np.isfinite(adata.obsm[Keys.SPATIAL]).all()
    if facts["lattice"]["kind"] != "none":
        sites = adata.obs[[Keys.ARRAY_ROW, Keys.ARRAY_COL]].to_numpy()
        assert len(np.unique(sites, axis=0)) == len(sites)
        assert np.abs(sites).max() <= 100_000
        grid = make_grid(adata, "auto", 100.0)
        assert int(grid.counts.sum(dtype=np.int64)) == int(X.sum(dtype=np.int64))
    return ""


def slices(name: str, make: Callable[[Path], None], **given) -> Target:
    def deposit(folder: Path) -> None:
        (folder / "it").mkdir()
        make(folder / "it")

    return Target(name, deposit, lambda folder: read_slice(folder, **given), (SliceError,), contained=True)


def make_labels(folder: Path) -> None:
    """The labels of a slice that itself lies beside, where nothing is spoiled."""
    area = patch()
    write_deposit(area, "spaceranger-1", folder.parent / "slice")
    names = domain_names(area.domain)
    for name, barcodes in (("a.csv", area.barcodes), ("b.tsv", [f"s1_{barcode}" for barcode in area.barcodes])):
        with open(folder / name, "w") as file:
            table = csv.writer(file, delimiter="\t" if name.endswith("tsv") else ",")
            table.writerows([("barcode", "domain"), *zip(barcodes, names, strict=True)])
    (folder / "map.tsv").write_text("raw\tlabel\n" + "".join(f"{name}\t{name}\n" for name in sorted(set(names))))


def read_labels(folder: Path) -> str:
    """Each of the two tables in turn; either may be the spoiled one."""
    codes = []
    for name in ("a.csv", "b.tsv"):
        given = {"url": str(folder.parent / "slice/outs"), "labels": str(folder / name), "label_column": "domain"}
        codes.append(read_slice(folder, folder / "map.tsv", **given))
    return next(filter(None, codes), "")


# Tables and settings.

ROWS = [
    ["s1", "d", "train", "file", "/data/s1", "auto", "human"],
    ["s2", "d", "val", "url", "https://example.org/a.zip#md5=" + "0" * 32 + "&member=*/outs/*", "spaceranger", "human"],
    ["s3", "d", "dlpfc", "geo", "https://example.org/suppl/#prefix=GSM1_A1_", "geo", "mouse"],
]


def make_catalogue(folder: Path) -> None:
    header = ["slice", "dataset", "split", "source", "url", "format", "organism"]
    (folder / "table.tsv").write_text("".join("\t".join(line) + "\n" for line in [header, *ROWS]))


def read_catalogue(folder: Path) -> str:
    for found in load_roles([str(folder / "table.tsv")], folder):
        assert found["slice"].replace("-", "").replace("_", "").isalnum()
        assert found["split"].replace("-", "").replace("_", "").isalnum()
        for address in found["url"].split():
            if address.startswith("http"):
                locators.parse(address)
    return ""


def make_config(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps(yaml.safe_load((ROOT / "config.yaml").read_text())))


def read_config(folder: Path) -> str:
    text = (folder / "config.json").read_text(errors="replace")
    try:
        config = json.loads(text)
    except (RecursionError, ValueError):  # Snakemake reads the file itself, and says so itself
        return "json"
    check_config(config)
    return ""


def make_trainer_config(folder: Path) -> None:
    shutil.copy(ROOT / "trainer/configs/small.yaml", folder / "it.yaml")


def read_trainer_config(folder: Path) -> str:
    for values in settings(folder / "it.yaml", {}, *SETTINGS):
        assert all(isinstance(value, int | float | str) for value in values.values())
    return ""


# Listings and archives.

LISTING = "".join(
    f'<a href="GSM1_A{k}_{name}">GSM1_A{k}_{name}</a>   2024-01-01 10:00  1234\n'
    for k in (1, 10)
    for name in (
        "matrix.mtx.gz",
        "barcodes.tsv.gz",
        "features.tsv.gz",
        "tissue_positions_list.csv.gz",
        "spatial.tar.gz",
    )
)


def make_listing(folder: Path) -> None:
    (folder / "index.html").write_text(f"<html><pre>{LISTING}</pre></html>")
    names = [name for name, _ in geo.parse_listing(LISTING)]
    rows = ["#Archive/File\tName\tTime\tSize\tType", *(f"File\t{name}\t1\t12\tX" for name in names)]
    (folder / "filelist.txt").write_text("\n".join(rows) + "\n")


def read_listing(folder: Path) -> str:
    html, text = ((folder / name).read_text(errors="replace") for name in ("index.html", "filelist.txt"))
    codes = []
    for listed in (geo.parse_listing(html), geo.parse_filelist(text)):
        for choose in (lambda names: geo.choose(names, "GSM1_A1_"), geo.choose, geo.choose_members):
            try:
                for place in choose([name for name, _ in listed]).values():
                    assert (folder / place).resolve().is_relative_to(folder.resolve())
                codes.append("")
            except SliceError as error:
                codes.append(error.code)
    return codes[0]  # of the section asked for; the others hold two


def make_archives(folder: Path) -> None:
    members = {
        "outs/a.csv": b"a,b\n1,2\n" * 50,
        "outs/spatial/scale.json": b"{}",
        "._x": b"x",
        "m.mtx": b"1 1 1\n" * 99,
    }
    for name in ("a.tar", "b.tar.gz"):
        with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as tar:
            for member, content in members.items():
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    with zipfile.ZipFile(folder / "c.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for member, content in members.items():
            file.writestr(member, content)


def read_archives(folder: Path) -> str:
    """All three, into places of ours, within limits that a bomb breaks."""
    code, limits = "", archives.Limits(total=20 << 20, member=10 << 20, count=1000)
    for name in ("a.tar", "b.tar.gz", "c.zip"):
        archive, out = Source("s", "https://example.org/" + name, folder / name), folder / "out" / name
        try:
            names = archives.names_in(archive, limits)
            archives.extract(archive, {member: out / str(i) for i, member in enumerate(names)}, limits)
            assert sorted(path.name for path in out.iterdir()) == sorted(map(str, range(len(names))))
        except SliceError as error:
            code = error.code
        if name == "a.tar":
            try:
                with open(folder / name, "rb") as file:
                    archives.spans_in(archive, file)
            except SliceError as error:
                code = error.code
    assert not list(folder.rglob("*evil*"))
    return code


# What the trainer reads.


@functools.cache
def tissue() -> tuple[list, bytes]:
    made = corpus.Tissue(n_genes=30)
    whole = [made.slice(10, 12, seed) for seed in (1, 2)]
    return whole, corpus.vocabulary(whole)


def make_shards(folder: Path) -> None:
    whole, genes = tissue()
    corpus.write_split(folder / "train", "train", whole, genes, n_windows=6, m=8, h=4, w=4, per_shard=5)
    (folder / "train" / "genes.tsv").chmod(0o644)


def vouch(folder: Path) -> None:
    """Let the index record what there is."""
    index_file = folder / "train" / "index.json"
    try:
        index = json.loads(index_file.read_text())
        for part in ("genes", "samples"):
            index[part]["sha256"] = hashlib.sha256((index_file.parent / index[part]["file"]).read_bytes()).hexdigest()
        for shard in index["shards"]:
            content = (index_file.parent / shard["name"]).read_bytes()
            shard |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        index_file.write_text(json.dumps(index))
    except (ValueError, KeyError, TypeError, OSError, RecursionError, AttributeError):
        return  # the index itself is spoiled


def read_shards(folder: Path) -> str:
    """Mapped and streamed: every batch of the first epoch has the promised shape."""
    for reader in (Shards, Stream):
        opened = reader(folder / "train")
        opened.coordinates = True
        n = len(opened)
        if n == 0:
            continue
        batches = opened.batches(Order(4, 0), workers=0)
        for batch in islice(batches, min(-(-n // 4), 5)):
            assert batch.counts.shape[1:] == (opened.m, opened.h, opened.w)
            assert int(batch.genes.min()) >= 0 and int(batch.genes.max()) < len(opened.vocabulary.gene_ids)  # noqa: PT018
    return ""


def make_whole(folder: Path) -> None:
    whole, genes = tissue()
    corpus.write_whole(folder / "s1.tar", *whole[0], genes)
    (folder / "genes.tsv").write_bytes(genes)


def read_whole(folder: Path) -> str:
    genes = tissue()[1]
    data = {"genes": {"n": 30, "sha256": hashlib.sha256(genes).hexdigest()}, "target_sum": corpus.TARGET_SUM}
    whole = read_for({"data": data}, folder / "s1.tar")
    assert whole.counts.shape == (len(whole.genes), *whole.totals.shape)
    assert whole.cell.max() < whole.totals.size
    assert isinstance(whole, WholeSlice)
    Vocabulary.read(folder / "genes.tsv")
    return ""


@functools.cache
def tensors() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {f"model.{i}": rng.normal(size=(3, 4)).astype(np.float32) for i in range(3)}


def make_snapshot(folder: Path) -> None:
    (folder / "00000001.safetensors").write_bytes(snapshots.pack({"step": 1, "best": None}, tensors()))


def read_snapshot(folder: Path) -> str:
    state, found = snapshots.unpack((folder / "00000001.safetensors").read_bytes(), folder / "00000001.safetensors")
    assert state == {"step": 1, "best": None}
    assert all(np.array_equal(found[name], tensor) for name, tensor in tensors().items())
    return ""


def make_model(folder: Path) -> None:
    genes = tissue()[1]
    (folder / "genes.tsv").write_bytes(genes)
    given = {
        "n_genes": 30,
        "m": 8,
        "h": 4,
        "w": 4,
        "width": 16,
        "depth": 1,
        "heads": 2,
        "feed_forward": 16,
        "decoder_width": 16,
    }
    cfg = models.ModelConfig(**given, decoder_depth=1)
    built = models.build(cfg, Vocabulary.read(folder / "genes.tsv"), 0)
    safetensors.torch.save_file(built.state_dict(), folder / "model.safetensors")
    facts = {"genes": {"n": 30, "sha256": hashlib.sha256(genes).hexdigest()}}
    config = {"format_version": 1, "model": dataclasses.asdict(cfg), "data": facts, "train": {"seed": 0}}
    (folder / "config.json").write_text(json.dumps(config))


def read_model(folder: Path) -> str:
    loaded, _, _ = models.load(folder)
    assert not loaded.training
    return ""


TARGETS = [
    slices("10x h5", lambda folder: write_deposit(patch(), "spaceranger-2", folder) and clear(folder)),
    slices("h5ad", make_cellxgene),
    slices("MEX", lambda folder: write_deposit(patch(), "geo", folder) and clear(folder)),
    slices("legacy ST", make_legacy, format="legacy_st"),
    Target("labels", make_labels, read_labels, (SliceError,), contained=True),
    Target("catalogue", make_catalogue, read_catalogue, (CatalogueError,)),
    Target("config", make_config, read_config, (CatalogueError,)),
    Target("trainer's config", make_trainer_config, read_trainer_config, (TrainerError,)),
    Target("GEO listings", make_listing, read_listing, (SliceError,)),
    Target("archives", make_archives, read_archives, (SliceError,)),
    Target("shards", make_shards, read_shards, (TrainerError,), mended=vouch),
    Target("whole slice", make_whole, read_whole, (TrainerError,)),
    Target("snapshot", make_snapshot, read_snapshot, (TrainerError,)),
    Target("model folder", make_model, read_model, (TrainerError,)),
]


def clear(folder: Path) -> None:
    """Without the simulator's own labels."""
    (folder / "labels.tsv").unlink()
