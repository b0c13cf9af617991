"""Rule `sketch`: a slice in some kilobytes, so that a thousand slices can be compared with each other.

Two samples of a slice's entries (gene, array row, array column, count), counts of at least 2, each drawn by hash and therefore the same
for every copy of an entry, whatever the order of spots, the barcodes, or what else the copy holds:

sites
    entries whose hash of all four is small. Two copies of a section share nearly all of them, two sections under a tenth (two genes
    agree by chance in a low count). Needs array coordinates that the source gave: inferred ones have an origin and a direction of their own.
rare
    entries whose hash of (gene, count) is small and whose (gene, count) at most 4 spots of the slice have. They don't depend on where the
    lattice begins or how it lies, so they tell how two lattices go together, and which spots are the same where there is no lattice.

Hash: splitmix64's finaliser, first of the gene number, then of that combined with the rest; of the 64-bit values those up to `threshold`
are in the sample, so that the samples of two slices are comparable at the smaller of their thresholds. A slice with few entries takes a
larger part of them.
"""

from dataclasses import dataclass
from pathlib import Path

import h5py
import numpy as np
from anndata.io import read_elem

from workflow.genes import PREFIX
from workflow.keys import Keys
from workflow.reading import check_seal, reading

FORMAT_VERSION = 1
LEAST_COUNT = 2
RAREST = 4  # spots of a slice that share a rare (gene, count)
SITES_RATE, RARE_RATE = 2.0**-9, 2.0**-3  # parts of all entries and of all (gene, count) that a deep slice keeps
WANTED = 2048  # entries that each sample should have at least
ENTRIES_PER_BLOCK = 2**22  # of the matrix in memory at once
ENTRY = np.dtype([("gene", "<u8"), ("row", "<i4"), ("col", "<i4"), ("count", "<u2")])
EVERYTHING = np.uint64(2**64 - 1)


@dataclass(frozen=True)
class Sketch:
    """The samples of one slice.

    Attributes
    ----------
    kind, source
        Of the lattice, as in the curated slice; without lattice, `row` of a rare entry is the number of its spot and `col` is -1.
    spots
        int32 [n, 2]: array row and column of every spot (empty without lattice).
    genes
        uint64 [K], ascending: numbers of the genes measured.
    sites, rare
        ENTRY arrays; `sites` is empty unless the source gave array coordinates.
    sites_threshold, rare_threshold
        Largest hash in the sample.
    """

    slice: str
    kind: str
    source: str
    spots: np.ndarray
    genes: np.ndarray
    sites: np.ndarray
    sites_threshold: np.uint64
    rare: np.ndarray
    rare_threshold: np.uint64


def mix(values: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser on uint64 values: a bijection that leaves no pattern."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def gene_numbers(ids) -> np.ndarray:
    """uint64 number of each Ensembl id: its eleven digits, above them the place of its organism in `PREFIX`.

    Raises
    ------
    ValueError
        An id that is not one of these organisms'.
    """
    place = {prefix: 10**11 * i for i, prefix in enumerate(PREFIX.values())}
    try:
        return np.array([place[name[:-11]] + int(name[-11:]) for name in ids], dtype=np.uint64)
    except KeyError as error:
        raise ValueError(
            f"gene ids that begin with {error}: found in a curated slice, expected {list(place)}"
        ) from None


def pair_hash(gene: np.ndarray, count: np.ndarray) -> np.ndarray:
    """uint64 hash of (gene number, count)."""
    return mix(mix(gene) ^ count.astype(np.uint64))


def site_hash(gene: np.ndarray, row: np.ndarray, col: np.ndarray, count: np.ndarray) -> np.ndarray:
    """uint64 hash of (gene number, array row, array column, count); coordinates of 24 bits, counts of 16."""
    row, col = (part.astype(np.uint64) & np.uint64(0xFFFFFF) for part in (row, col))
    return mix(mix(gene) ^ (row << np.uint64(40) | col << np.uint64(16) | count.astype(np.uint64)))


def below(rate: float) -> np.uint64:
    """The threshold that takes this part of all hashes."""
    return EVERYTHING if rate >= 1 else np.uint64(int(rate * 2**64) - 1)


def sketch_slice(path: str | Path) -> Sketch:
    """The sketch of a curated slice; of a rejected one, an empty sketch. The matrix is read block by block."""
    with h5py.File(path) as file:
        facts = read_elem(file["uns"])[Keys.STPATCH]
        lattice = facts.get("lattice", {"kind": "none", "source": "pixels"})
        matrix, obs = file["X"], file["obs"]
        genes = gene_numbers(read_elem(file["var"]).index)
        n_spots = matrix.attrs["shape"][0]
        if Keys.ARRAY_ROW in obs:
            spots = np.column_stack([obs[name][:] for name in (Keys.ARRAY_ROW, Keys.ARRAY_COL)]).astype(np.int32)
        else:
            spots = np.column_stack([np.arange(n_spots), np.full(n_spots, -1)]).astype(np.int32)

        def sample(hashed, threshold):
            """Entries whose hash is within the threshold."""
            kept = [entries[hashed(entries) <= threshold] for entries in _blocks(matrix, spots, genes)]
            return np.concatenate(kept) if kept else np.zeros(0, ENTRY)

        sites, sites_threshold = np.zeros(0, ENTRY), below(SITES_RATE)
        if lattice["source"] == "array":
            n_entries = sum(len(entries) for entries in _blocks(matrix, spots, genes))
            while n_entries * (int(sites_threshold) / 2**64) < WANTED and sites_threshold < EVERYTHING:
                sites_threshold = below((int(sites_threshold) + 1) / 2**63)
            sites = sample(lambda e: site_hash(e["gene"], e["row"], e["col"], e["count"]), sites_threshold)
        for rate in (RARE_RATE, 1.0):
            rare, rare_threshold = sample(lambda e: pair_hash(e["gene"], e["count"]), below(rate)), below(rate)
            _, place, n = np.unique(pair_hash(rare["gene"], rare["count"]), return_inverse=True, return_counts=True)
            rare = rare[n[place] <= RAREST]
            if len(rare) >= WANTED:
                break
    return Sketch(
        slice=str(facts["slice"]),
        kind=str(lattice["kind"]),
        source=str(lattice["source"]),
        spots=spots if lattice["kind"] != "none" else spots[:0],
        genes=np.sort(genes),
        sites=np.sort(sites),
        sites_threshold=sites_threshold,
        rare=np.sort(rare),
        rare_threshold=rare_threshold,
    )


def _blocks(matrix: h5py.Group, spots: np.ndarray, genes: np.ndarray):
    """The entries of at least `LEAST_COUNT`, some whole spots at a time."""
    starts = matrix["indptr"][:].astype(np.int64)
    first = 0
    while first < len(spots):
        last = max(first + 1, int(np.searchsorted(starts, starts[first] + ENTRIES_PER_BLOCK, side="right")) - 1)
        part = slice(starts[first], starts[last])
        counts = matrix["data"][part]
        high = np.flatnonzero(counts >= LEAST_COUNT)
        spot = np.repeat(np.arange(first, last), np.diff(starts[first : last + 1]))[high]
        entries = np.empty(len(high), ENTRY)
        entries["gene"] = genes[matrix["indices"][part][high]]
        entries["row"], entries["col"] = spots[spot].T
        entries["count"] = counts[high]
        yield entries
        first = last


def write_sketch(sketch: Sketch, path: str | Path) -> None:
    """Write a sketch as npz (plain arrays, the same bytes each time)."""
    arrays = {
        "format_version": np.int64(FORMAT_VERSION),
        **{name: np.array(getattr(sketch, name)) for name in ("slice", "kind", "source")},
        **{name: getattr(sketch, name) for name in ("sites_threshold", "rare_threshold")},
        "spots": sketch.spots,
        "genes": np.diff(sketch.genes, prepend=np.uint64(0)),  # steps: they compress
    }
    for sample in ("sites", "rare"):
        entries = getattr(sketch, sample)
        arrays[f"{sample}_gene"] = np.searchsorted(sketch.genes, entries["gene"]).astype("<u4")
        arrays |= {f"{sample}_{field}": entries[field] for field in ("row", "col", "count")}
    with open(path, "wb") as file:
        np.savez_compressed(file, **arrays)


def read_sketch(path: str | Path) -> Sketch:
    """Read a sketch.

    Raises
    ------
    ValueError
        Of another version.
    """
    with reading(path), np.load(path, allow_pickle=False) as file:
        stored = dict(file)
    if stored["format_version"] != FORMAT_VERSION:
        raise ValueError(
            f"{path}: found format_version {stored['format_version']}, expected {FORMAT_VERSION}. "
            "Next step: delete the file and run again."
        )
    genes = stored["genes"].cumsum(dtype=np.uint64)
    samples = {}
    for sample in ("sites", "rare"):
        entries = np.empty(len(stored[f"{sample}_gene"]), ENTRY)
        entries["gene"] = genes[stored[f"{sample}_gene"]]
        for field in ("row", "col", "count"):
            entries[field] = stored[f"{sample}_{field}"]
        samples[sample] = entries
    return Sketch(
        **{name: str(stored[name]) for name in ("slice", "kind", "source")},
        spots=stored["spots"],
        genes=genes,
        sites_threshold=stored["sites_threshold"][()],
        rare_threshold=stored["rare_threshold"][()],
        **samples,
    )


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    check_seal(snakemake.input[0])
    with reading(snakemake.input[0]):
        found = sketch_slice(snakemake.input[0])
    write_sketch(found, snakemake.output[0])
