"""Rule `curate`: one slice, as its source has it, made into the curated form of docs/format.md, or set apart with the reason.

Kept: spots in tissue, in the source's order, whatever their depth; 'Gene Expression' features that have an Ensembl id; raw counts.
"""

import json
import logging
import platform
from importlib.metadata import version
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from workflow.child import confined
from workflow.errors import (
    CountOverflow,
    EmptySlice,
    MissingFile,
    MissingPositions,
    MultipleOrganisms,
    MultipleSections,
    NoLattice,
    NoTissue,
    PositionsMismatch,
    SliceError,
    SwappedAxes,
    UnknownGenes,
    Unreadable,
    WrongOrganism,
)
from workflow.genes import PREFIX, Mapping, genomes_of, load_genes, map_genes, organism_of, strip_version
from workflow.keys import Keys
from workflow.labels import spot_labels
from workflow.lattice import VISIUM_PITCH_UM, Lattice, infer_lattice, known_lattice
from workflow.readers import Deposit, read_deposit
from workflow.readers.deposit import FARTHEST_PIXEL, refuse_far, why_not_counts
from workflow.reading import seal
from workflow.sources import files_at, sha256_of

logger = logging.getLogger("curate")

FORMAT_VERSION = 1
LISTING_VERSION = 1  # of files.json
FEWEST_MAPPED = 0.1  # of the features; below it the names are not those of genes
MAX_COUNT = np.iinfo(np.uint16).max  # the grid's cells hold 16 bits
PACKAGES = ("anndata", "h5py", "numpy", "pandas", "scipy")


def curate(
    row: dict[str, str],
    gene_tables: str | Path,
    files: list[Path] | None = None,
    labels: Path | None = None,
    label_map: Path | None = None,
) -> anndata.AnnData:
    """Curate one slice.

    Parameters
    ----------
    row
        Its catalogue row; ``slice``, ``url``, ``format`` and ``organism`` are needed.
    gene_tables
        Folder with ``genes_human.tsv`` and ``genes_mouse.tsv``.
    files
        The slice's files, where the row's url is not their place (downloads, paths with spaces).
    labels
        The table of labels, where the row's ``labels`` is not its place.
    label_map
        Table that maps the raw labels of the slice's evaluation set (`workflow.labels.spot_labels`).

    Returns
    -------
    AnnData as docs/format.md has it (curated slice).

    Raises
    ------
    SliceError
        What makes the slice unusable, by its subclass.
    """
    name, organism = row["slice"], row["organism"]
    if files is None:
        files = [file for place in row["url"].split() for file in files_at(place)]
    if labels is None and row.get("labels"):
        labels = Path(row["labels"])
    if not files:
        raise MissingFile(
            slice=name,
            file=row["url"],
            found="nothing there",
            expected="a file, a folder, or the common prefix of flat files",
            next_step="check the url; relative paths count from the working directory, then from the repository",
        )
    deposit = read_deposit(name, files, row["format"])
    counts = raw_counts(name, deposit)
    mapping = kept_genes(name, deposit, organism, Path(gene_tables))
    covered = np.flatnonzero(deposit.in_tissue)
    lattice, source, pixels = place_spots(name, deposit, covered)
    pitch_um, um_per_px = scale_of(deposit, lattice)

    obs = pd.DataFrame(index=pd.Index(deposit.spots[covered].astype(str), dtype=object))
    if lattice:
        obs[Keys.ARRAY_ROW], obs[Keys.ARRAY_COL] = lattice.row.astype(np.int32), lattice.col.astype(np.int32)
    obs[Keys.TOTAL_COUNTS] = np.asarray(counts.sum(1, dtype=np.int64)).ravel()
    if row.get("label_column"):
        label = spot_labels(name, deposit, row["label_column"], labels, label_map)[covered]
        obs[Keys.LABEL] = label.remove_unused_categories()
    read = deposit.files + [path for path in (labels, label_map) if path and row.get("label_column")]
    provenance = {
        "format_version": FORMAT_VERSION,
        "slice": name,
        "row": json.dumps(row),
        "inputs": json.dumps([{"path": str(p), "bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in read]),
        "versions": json.dumps({"python": platform.python_version()} | {p: version(p) for p in PACKAGES}),
        "lattice": {
            "kind": lattice.kind if lattice else "none",
            "source": source,
            "pitch_um": pitch_um,
            "um_per_px": um_per_px,
            "residual": lattice.residual if lattice else float("nan"),
        },
        "counts": {
            "spots_in_source": len(deposit.spots),
            "spots_in_tissue": len(covered),
            "features_in_source": len(deposit.ids),
            "genes_kept": len(mapping.gene_ids),
            "genes_ambiguous": mapping.ambiguous,
            "genes_unknown": mapping.unknown,
            "genes_merged": mapping.merged,
        },
    }
    return anndata.AnnData(
        X=not_too_large(name, deposit, mapping.apply(counts)),
        obs=obs,
        var=pd.DataFrame({Keys.SYMBOL: mapping.symbols}, index=pd.Index(mapping.gene_ids)),
        obsm={Keys.SPATIAL: pixels},
        uns={Keys.STPATCH: provenance},
    )


def raw_counts(name: str, deposit: Deposit) -> sparse.csr_matrix:
    """Counts of the spots in tissue, int32 CSR [n, features], checked to be raw.

    Raises
    ------
    NoTissue, EmptySlice, NotCounts, CountOverflow
    """
    where = {"slice": name, "file": str(deposit.file)}
    if len(deposit.spots) and not deposit.in_tissue.any():
        raise NoTissue(
            **where,
            found=f"0 spots in tissue of {len(deposit.spots)}",
            expected="spots in tissue",
            next_step="check the positions (in_tissue is 1 where there is tissue), or take the row out of the catalogue",
        )
    counts = deposit.counts[np.flatnonzero(deposit.in_tissue)]
    if problem := why_not_counts(counts):
        kind, found = problem
        raise kind(
            **where,
            found=found,
            expected="raw integer counts",
            next_step="get the raw counts from the source; normalised values cannot be used",
        )
    if not counts.data.any():
        raise EmptySlice(
            **where,
            found=f"{counts.shape[0]} spots in tissue of {len(deposit.spots)}, {counts.shape[1]} genes, no count",
            expected="counts on spots in tissue",
            next_step="check that matrix and in_tissue are those of the slice, or take the row out of the catalogue",
        )
    not_too_large(name, deposit, counts)
    if not counts.has_canonical_format:  # an entry listed twice, whose sum its own type may not hold
        counts = counts.astype(np.int64)
        counts.sum_duplicates()
    counts = not_too_large(name, deposit, counts).astype(np.int32)
    counts.eliminate_zeros()
    return counts


def not_too_large(name: str, deposit: Deposit, counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """The counts as they are, if the grid can hold them; asked again once columns of one Ensembl id are summed.

    Raises
    ------
    CountOverflow
    """
    if counts.data.max(initial=0) > MAX_COUNT:  # scipy's own maximum would sum what is listed twice, in its type
        raise CountOverflow(
            slice=name,
            file=str(deposit.file),
            found=f"a count of {int(counts.data.max())}",
            expected=f"at most {MAX_COUNT}, what 16 bits hold",
            next_step="check that these are counts of molecules (UMI), not of reads",
        )
    return counts


def kept_genes(name: str, deposit: Deposit, organism: str, gene_tables: Path) -> Mapping:
    """Where each feature goes, once the organism is known to be the catalogue's.

    Raises
    ------
    MultipleOrganisms, WrongOrganism, UnknownGenes
    """
    where = {"slice": name, "file": str(deposit.file)}
    genomes = genomes_of([id_ or symbol for id_, symbol in zip(deposit.ids, deposit.symbols, strict=True)])
    if len(genomes) > 1:
        raise MultipleOrganisms(
            **where,
            found="genes of " + " and ".join(f"{genome} ({n} features)" for genome, n in genomes.items()),
            expected=f"genes of one genome, {organism}",
            next_step="none needed: the slice is set apart; to use it, deposit one organism's counts as a slice of its own",
        )
    tables = {other: load_genes(gene_tables / f"genes_{other}.tsv") for other in PREFIX}
    ensembl = sum(strip_version(gene_id) is not None for gene_id in deposit.ids) > len(deposit.ids) / 2
    found, evidence = organism_of(deposit.ids if ensembl else deposit.symbols, tables)
    stated = deposit.organism
    if found not in (organism, None) or stated not in (organism, ""):
        raise WrongOrganism(
            **where,
            found=f"{stated} as the file says"
            if stated not in (organism, "")
            else f"gene names of {found} ({evidence})",
            expected=f"{organism}, as the catalogue says",
            next_step="correct the column organism in the catalogue, or take the row out",
        )
    mapping = map_genes(deposit.ids, deposit.symbols, organism, tables[organism])
    if (mapping.target >= 0).sum() < max(FEWEST_MAPPED * len(deposit.ids), 1):
        names = ", ".join(
            str(symbol or gene_id) for symbol, gene_id in zip(deposit.symbols[:5], deposit.ids, strict=False)
        )
        raise UnknownGenes(
            **where,
            found=f"{len(mapping.gene_ids)} of {len(deposit.ids)} names known ({names}, ...)",
            expected=f"Ensembl ids or {organism} gene symbols",
            next_step="check which column of the source holds gene names",
        )
    return mapping


def place_spots(name: str, deposit: Deposit, covered: np.ndarray) -> tuple[Lattice | None, str, np.ndarray]:
    """Lattice of the covered spots (None where there is none), where it comes from, and their pixels [n, 2].

    Without pixels (legacy ST without spot file) the lattice itself stands in: one "pixel" is a nominal micrometre, or, where the
    pitch of a square lattice isn't known, a pitch.

    Raises
    ------
    MissingPositions
        Pixels that are NaN.
    MultipleSections
        Two spots at one site of the array.
    PositionsMismatch, SwappedAxes
        Array coordinates and pixels that contradict each other (`workflow.lattice.known_lattice`).
    ImpossiblePositions
    """
    where = {"slice": name, "file": str(deposit.file)}
    pixels = None if deposit.pixels is None else deposit.pixels[covered]
    if pixels is not None and not np.isfinite(pixels).all():
        raise MissingPositions(
            **where,
            found=f"{int((~np.isfinite(pixels)).any(1).sum())} of {len(pixels)} spots in tissue without position",
            expected="a position for each",
            next_step="complete the positions, or mark these spots as not in tissue",
        )
    if pixels is not None:
        refuse_far(name, deposit.file, pixels, "pixels", FARTHEST_PIXEL)
    if deposit.array is None:
        try:
            return infer_lattice(pixels, name), "pixels", pixels
        except NoLattice as error:
            logger.warning("%s", error)
            return None, "pixels", pixels
    row, col = deposit.array[covered].T
    repeated = len(row) - len(np.unique(deposit.array[covered], axis=0))
    if repeated:
        raise MultipleSections(
            **where,
            found=f"{repeated} spots at an array position that another spot has",
            expected="one section, each array position once",
            next_step="split the source, one catalogue row a section",
        )
    try:
        lattice = known_lattice(row, col, pixels, **where)
    except PositionsMismatch as error:
        refuse_swapped(row, col, pixels, error)
        raise
    if pixels is None:
        pitch_um, _ = scale_of(deposit, lattice)
        pixels = lattice.plane() * (pitch_um if np.isfinite(pitch_um) else 1.0)
        lattice = known_lattice(row, col, pixels, **where)
    elif np.isnan(lattice.pitch_px):
        logger.warning("%s: spots or pixels all at one place or in one line: they don't tell the scale", name)
    return lattice, "array", pixels


def refuse_swapped(row: np.ndarray, col: np.ndarray, pixels: np.ndarray | None, error: PositionsMismatch) -> None:
    """Say so, where it is only that row and column are exchanged.

    Raises
    ------
    SwappedAxes
    """
    try:
        known_lattice(col, row, pixels)
    except PositionsMismatch:
        return
    raise SwappedAxes(
        slice=error.slice,
        file=error.file,
        found=f"{error.found}; with row and column exchanged they fit",
        expected="array_row counts rows, array_col columns",
        next_step="exchange array_row and array_col in the positions",
    ) from error


def scale_of(deposit: Deposit, lattice: Lattice | None) -> tuple[float, float]:
    """``pitch_um`` and ``um_per_px`` of a slice, NaN where unknown.

    A staggered lattice is Visium's (100 um), a square one of legacy ST has the pitch that its format tells (200 um): the scale
    follows from the pitch in pixels. A square lattice from elsewhere says nothing by itself (bins of Visium HD, DBiT, legacy ST made
    into h5ad): its pitch follows from the source's scale factors, if it has any. Without lattice there are only these. They are
    approximate (`workflow.readers.deposit.scale`).
    """
    if lattice is None:
        return float("nan"), deposit.um_per_px
    pitch_um = VISIUM_PITCH_UM if lattice.kind == "staggered" else deposit.pitch_um
    if np.isfinite(pitch_um):
        return pitch_um, pitch_um / lattice.pitch_px
    return deposit.um_per_px * lattice.pitch_px, deposit.um_per_px


def rejected(row: dict[str, str], error: SliceError) -> anndata.AnnData:
    """The file of a slice that can't be used: shape (0, 0), and why."""
    provenance = {
        "format_version": FORMAT_VERSION,
        "slice": row["slice"],
        "row": json.dumps(row),
        Keys.QUARANTINE: error.as_row(),
    }
    return anndata.AnnData(X=sparse.csr_matrix((0, 0), dtype=np.int32), uns={Keys.STPATCH: provenance})


def write_slice(adata: anndata.AnnData, path: str | Path) -> None:
    """Write a curated slice, sealed; strings stay strings, the same slice gives the same bytes."""
    adata.write_h5ad(path, compression="gzip", compression_opts=1, convert_strings_to_categoricals=False)
    seal(path)


def located(row: dict[str, str], listing: Path | None) -> tuple[list[Path] | None, Path | None]:
    """Files and labels of a slice that a rule of ours fetched or made, from its ``deposit.json`` or ``files.json``.

    (None, None) without a listing: the row itself says where the files are.

    Raises
    ------
    SliceError
        The download failed for good, as it said itself.
    Unreadable
        A ``files.json`` of another version.
    """
    if listing is None:
        return None, None
    listed = json.loads(listing.read_text())
    if row["source"] == "simulated":
        folder = listing.parent
        labels = folder / listed["labels"] if listed["labels"] else None
        return files_at(folder / listed["url"]), labels
    if not isinstance(listed, dict) or listed.get("version") != LISTING_VERSION:
        raise Unreadable(
            slice=row["slice"],
            file=str(listing),
            found="a list of files of another version of stpatch",
            expected=f"version {LISTING_VERSION}",
            next_step=f"run again with --forcerun {listing}: what was fetched is kept",
        )
    if listed["quarantine"]:
        raise SliceError.from_row(listed["quarantine"])
    entries = listed["files"]
    by_role = {role: [Path(e["path"]) for e in entries if e["role"] == role] for role in ("slice", "labels")}
    return by_role["slice"], next(iter(by_role["labels"]), None)


def curate_or_reject(
    out: Path, row: dict[str, str], gene_tables: Path, listing: Path | None = None, label_map: Path | None = None
) -> None:
    """Write a slice curated, or set apart with its reason."""
    try:
        files, labels = located(row, listing)
        adata = curate(row, gene_tables, files, labels, label_map)
    except SliceError as error:
        logger.error("set apart: %s", error, exc_info=error.__cause__)
        adata = rejected(row, error)
    write_slice(adata, out)


def curate_apart(
    out: Path,
    row: dict[str, str],
    gene_tables: Path,
    listing: Path | None = None,
    label_map: Path | None = None,
    *,
    memory_mb: int,
) -> None:
    """As `curate_or_reject`, in a process of its own, so that a file that brings it down is set apart too (`unreadable`)."""
    why = confined(lambda: curate_or_reject(out, row, gene_tables, listing, label_map), memory_mb)
    if why:
        error = Unreadable(
            slice=row["slice"],
            file=str(listing or row["url"]),
            found=why,
            expected=f"files that can be read within {memory_mb} MB",
            next_step=f"compare the files with the source's; if they are whole, give more memory: "
            f"--set-resources curate:mem_mb={4 * memory_mb} --forcerun {out}",
        )
        logger.error("set apart: %s", error)
        write_slice(rejected(row, error), out)


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    listing, label_map = (snakemake.input.get(name) for name in ("listing", "label_map"))
    curate_apart(
        Path(snakemake.output[0]),
        dict(snakemake.params.row),
        Path(snakemake.params.gene_tables),
        Path(listing) if listing else None,
        Path(label_map) if label_map else None,
        memory_mb=snakemake.resources.mem_mb,
    )
