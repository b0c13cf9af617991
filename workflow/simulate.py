"""Rule `simulate`: slices with planted spatial domains, written as their sources deposit them. All of it is simulated.

A slice is a Visium capture area (78 rows, 128 columns, row + column even: 4,992 spots) with a tissue that has holes. Its domains are
layers and a nest, shared in shape by the sections of a donor. Each domain has a gene programme that all donors share; each donor
shifts every gene a little (batch effect), each spot has its own depth, counts are negative binomial, and the uncovered spots
see ambient RNA. A spot is a random mixture of cells, mostly of its own domain: alone it tells little, its neighbourhood tells much.
Other ways of planting, for tests that need a known answer, are named in `PLANTED`.

Everything is a function of the slice's name, its donor's name and `Settings`: the same on any machine and any number of cores.
"""

import hashlib
import json
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from urllib.parse import parse_qsl

import anndata
import numpy as np
import pandas as pd
from scipy import sparse

from workflow.deposits import PITCH_PX, WRITERS, Slice, domain_names, write_deposit
from workflow.errors import CatalogueError
from workflow.genes import load_genes
from workflow.keys import Keys
from workflow.sources import sha256_of

ROWS, COLS = 78, 128
SPOTS_PER_BLOCK = 256  # whose counts are drawn at a time
PLANTED = {  # what tells a simulated slice's domains apart
    "mixture": "cells of the own domain and some of the others; domains are layers and a nest",
    "marker": "the own domain's programme alone: a spot suffices, its neighbours are drawn like it",
    "arrangement": "how spots of two states lie among each other; both are as frequent in each domain",
    "permuted": "nothing: as marker, and then the spots' counts were shuffled over the tissue",
}
TILE_ROWS, TILE_COLS = 16, 32  # of the lattice: a tile has one domain, drawn apart from its neighbours'
PATCH = 8  # spots along the side of a patch of one state
PLAIN_SYMBOL = re.compile(
    r"^(?!MIR|LINC|SNOR|SCARNA|RNU|RNA|RN7|RPL\d+P|RPS\d+P|OR\d|TRA|TRB|IGH|IGK|IGL)[A-Z]{2,5}[0-9]{0,2}$"
)


@dataclass(frozen=True)
class Settings:
    """What a simulated slice is like."""

    n_genes: int = 3000
    n_domains: int = 5
    median_depth: float = 2000.0  # counts of a spot in tissue
    depth_sigma: float = 0.45  # of its logarithm
    programme_genes: int = 300  # genes that a domain changes
    programme_sigma: float = 1.5  # of their log fold change
    donor_sigma: float = 0.2  # of a gene's log fold change between donors
    own_cells: float = 2.4  # Dirichlet weight of a spot's own domain in its mixture of cells
    other_cells: float = 0.4  # and of each other domain
    dispersion: float = 4.0  # shape of the gamma: variance = mean + mean^2 / dispersion
    ambient_depth: float = 25.0  # counts of a spot without tissue
    spread: float = 1.0  # of the tissue, as a factor of its radius: 1.3 covers three quarters of the area
    planted: str = "mixture"  # a key of `PLANTED`

    def __post_init__(self) -> None:
        if self.planted not in PLANTED or self.planted == "arrangement" and self.n_domains != 2:
            raise ValueError(
                f"planted {self.planted!r} with {self.n_domains} domains; expected one of {', '.join(PLANTED)}, and two domains for "
                "arrangement"
            )

    def facts(self) -> dict[str, float | str]:
        """All fields; without `planted` where it is the default, so that slices that knew no other way keep their bytes."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("planted", "mixture")}

    def seeds(self) -> list[tuple[str, float | str]]:
        """What the random numbers depend on: all but the spread, so that the same section may cover more."""
        return [(name, value) for name, value in self.facts().items() if name != "spread"]


def generator(*parts: object) -> np.random.Generator:
    """A random generator that depends on these parts alone."""
    digest = hashlib.sha256("\x1f".join(map(str, parts)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


def staggered_sites(rows: int, cols: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of a Visium lattice (row + column even), row by row."""
    row, col = np.nonzero((np.arange(rows)[:, None] + np.arange(cols)) % 2 == 0)
    return row, col


def staggered_to_plane(row: np.ndarray, col: np.ndarray) -> np.ndarray:
    """Positions [n, 2] (x, y) of lattice sites in pitches: neighbours are 1 apart, rows sqrt(3)/2."""
    return np.column_stack([col / 2, row * np.sqrt(3) / 2])


def barcodes(n: int) -> np.ndarray:
    """``n`` distinct barcodes of 16 letters and ``-1``, the same ones for every slide, as on real slides."""
    letters = np.array(list("ACGT"))
    codes = generator("barcodes").permutation(4**8)[:n]  # the first half makes each distinct
    half = (codes[:, None] >> (2 * np.arange(8))) & 3
    rest = generator("barcodes", "rest").integers(0, 4, (n, 8))
    return np.array(["".join(letters[code]) + "-1" for code in np.hstack([half, rest])])


def waves(rng: np.random.Generator, plane: np.ndarray, n: int = 6, longest: float = 60.0) -> np.ndarray:
    """A smooth random field [n_spots] of about unit variance: a sum of ``n`` plane waves, lengths in pitches."""
    angle, phase = rng.uniform(0, 2 * np.pi, (2, n))
    frequency = 2 * np.pi / (longest * rng.uniform(0.5, 1.0, n))
    direction = np.stack([np.cos(angle), np.sin(angle)]) * frequency
    return np.sqrt(2 / n) * np.cos(plane @ direction + phase).sum(1)


def tissue(
    donor: np.random.Generator, section: np.random.Generator, plane: np.ndarray, spread: float = 1.0
) -> np.ndarray:
    """Which spots are covered [n_spots]: a wavy outline with three holes; its shape is the donor's, jittered by the section."""
    middle, reach = (plane.max(0) + plane.min(0)) / 2, (plane.max(0) - plane.min(0)) / 2
    away = (plane - middle) / reach
    angle, radius = np.arctan2(away[:, 1], away[:, 0]), np.hypot(away[:, 0], away[:, 1])
    outline = donor.uniform(0.74, 0.8) + section.uniform(-0.01, 0.01)
    for harmonic in (2, 3, 5):
        outline = outline + donor.uniform(0.02, 0.05) * np.cos(harmonic * angle + donor.uniform(0, 2 * np.pi))
    covered = radius < spread * outline
    for _ in range(3):
        turn, out, size = donor.uniform(0, 2 * np.pi), donor.uniform(0.15, 0.55), donor.uniform(0.03, 0.08)
        centre = out * np.array([np.cos(turn), np.sin(turn)]) + section.normal(0, 0.015, 2)
        covered &= ((away - centre) ** 2).sum(1) > size**2
    return covered


def plant_domains(
    donor: np.random.Generator, section: np.random.Generator, plane: np.ndarray, n_domains: int
) -> np.ndarray:
    """Domain of each spot [n_spots], 0..n-1: wavy layers, and a nest of two blobs as the last one."""
    middle, reach = (plane.max(0) + plane.min(0)) / 2, (plane.max(0) - plane.min(0)).max() / 2
    away = (plane - middle) / reach
    turn = donor.uniform(0, 2 * np.pi)
    depth = away @ np.array([np.cos(turn), np.sin(turn)]) + 0.12 * waves(donor, plane) + section.normal(0, 0.02)
    layers = max(n_domains - 1, 1)
    domain = np.digitize(depth, np.linspace(-0.65, 0.65, layers + 1)[1:-1])
    if n_domains > 1:
        for _ in range(2):
            centre = donor.uniform(-0.45, 0.45, 2) + section.normal(0, 0.02, 2)
            domain[((away - centre) ** 2).sum(1) < donor.uniform(0.14, 0.2) ** 2] = n_domains - 1
    return domain


def profiles(donor: str, settings: Settings) -> np.ndarray:
    """Share of each gene in each domain [n_domains, n_genes], rows summing to 1; donors shift the genes they share."""
    rng = generator("programmes", *settings.seeds())
    level = np.tile(rng.normal(0, 1.3, settings.n_genes), (settings.n_domains, 1))
    for domain in range(settings.n_domains):
        changed = rng.choice(settings.n_genes, min(settings.programme_genes, settings.n_genes), replace=False)
        level[domain, changed] += rng.normal(0, settings.programme_sigma, len(changed))
    level += generator("donor genes", donor).normal(0, settings.donor_sigma, settings.n_genes)
    share = np.exp(level)
    return share / share.sum(1, keepdims=True)


def mix_cells(rng: np.random.Generator, domain: np.ndarray, settings: Settings) -> np.ndarray:
    """Share of each domain's cells in each spot [n, n_domains], Dirichlet: mostly its own, never its own alone."""
    weight = np.where(domain[:, None] == np.arange(settings.n_domains), settings.own_cells, settings.other_cells)
    cells = rng.gamma(weight)
    return cells / cells.sum(1, keepdims=True)


def plant_tiles(rng: np.random.Generator, row: np.ndarray, col: np.ndarray, n_domains: int) -> np.ndarray:
    """Domain of each spot [n]: tiles of the lattice, as many of each domain as can be, in random order.

    The tiles are the blocks of the protocol `blocks`, so that a spot's place says nothing of the domain in another block.
    """
    _, tile = np.unique(np.column_stack([row // TILE_ROWS, col // TILE_COLS]), axis=0, return_inverse=True)
    tile = tile.ravel()
    return rng.permutation(np.arange(tile.max() + 1) % n_domains)[tile]


def arrange_states(rng: np.random.Generator, row: np.ndarray, col: np.ndarray, domain: np.ndarray) -> np.ndarray:
    """State 0 or 1 of each spot [n]: in domain 0 the lattice's lines take turns, in domain 1 patches of `PATCH` x `PATCH` spots.

    Both states are as frequent in every whole tile of either domain, so that a spot alone says nothing of its domain.
    """
    state = np.empty(len(row), dtype=np.int64)
    tile = (row // TILE_ROWS) * (col.max() + 1) + col // TILE_COLS
    for number in np.unique(tile):
        here = np.flatnonzero(tile == number)
        across, down = (col[here] % TILE_COLS) // (2 * PATCH), (row[here] % TILE_ROWS) // PATCH
        patch = down * (TILE_COLS // (2 * PATCH)) + across
        n_patches = (TILE_ROWS // PATCH) * (TILE_COLS // (2 * PATCH))
        of_patch = rng.permutation(np.arange(n_patches) % 2)[patch]
        of_line = (row[here] + rng.integers(2)) % 2
        state[here] = np.where(domain[here] == 0, of_line, of_patch)
    return state


def plant(
    shape: np.random.Generator, section: np.random.Generator, row: np.ndarray, col: np.ndarray, plane: np.ndarray,
    settings: Settings,
) -> np.ndarray:  # fmt: skip
    """Domain of each spot [n], by `settings.planted`."""
    if settings.planted == "mixture":
        return plant_domains(shape, section, plane, settings.n_domains)
    return plant_tiles(section, row, col, settings.n_domains)


def compose(
    rng: np.random.Generator, row: np.ndarray, col: np.ndarray, domain: np.ndarray, settings: Settings
) -> np.ndarray:
    """Share of each programme in each spot [n, n_domains], by `settings.planted`."""
    if settings.planted == "mixture":
        return mix_cells(rng, domain, settings)
    state = arrange_states(rng, row, col, domain) if settings.planted == "arrangement" else domain
    return (state[:, None] == np.arange(settings.n_domains)).astype(float)


def draw_counts(rng: np.random.Generator, mean: np.ndarray, dispersion: float) -> sparse.csr_matrix:
    """Negative-binomial counts, int32 CSR, of ``mean`` [n, G]: Poisson of gamma, variance = mean + mean^2 / dispersion.

    ``mean`` is overwritten, and counts are drawn some spots at a time: 37,000 genes of a capture area are 1.5 GB of it.
    """
    blocks = [slice(start, start + SPOTS_PER_BLOCK) for start in range(0, len(mean), SPOTS_PER_BLOCK)]
    for block in blocks:  # all gammas come before the first Poisson, whatever the size of a block
        mean[block] *= rng.gamma(dispersion, 1 / dispersion, mean[block].shape)
    return sparse.vstack([sparse.csr_matrix(rng.poisson(mean[block]).astype(np.int32)) for block in blocks], "csr")


def choose_genes(genes_tsv: Path, n_genes: int) -> tuple[np.ndarray, np.ndarray]:
    """Real Ensembl ids and symbols [n_genes], the same for every slice, sorted by id: plainly named genes first, then others."""
    table = load_genes(genes_tsv)
    plain = sorted(gene_id for symbol, gene_id in table.by_symbol.items() if gene_id and PLAIN_SYMBOL.match(symbol))
    rng = generator("genes")
    chosen = rng.choice(plain, min(n_genes, len(plain)), replace=False)
    if n_genes > len(plain):
        others = sorted({gene_id for gene_id in table.by_symbol.values() if gene_id}.difference(plain))
        chosen = np.concatenate([plain, rng.choice(others, n_genes - len(plain), replace=False)])
    ids = np.array(sorted(chosen), dtype=object)
    return ids, np.array([table.symbols[gene_id] for gene_id in ids], dtype=object)


def simulate_slice(name: str, donor: str, genes_tsv: Path, settings: Settings | None = None) -> Slice:
    """Simulate a whole capture area, tissue or not.

    Parameters
    ----------
    name
        Name of the slice: it seeds what is the section's own.
    donor
        Name of the donor: it seeds the shape of the tissue and the batch effect.
    genes_tsv
        The shipped table that the real ids and symbols are taken from.
    settings
        What the slice is like; the defaults of `Settings` if not given.
    """
    settings = settings or Settings()
    ids, symbols = choose_genes(genes_tsv, settings.n_genes)
    row, col = staggered_sites(ROWS, COLS)
    plane = staggered_to_plane(row, col)
    shape, section = generator("shape", donor), generator("section", name, donor, *settings.seeds())
    covered = tissue(shape, section, plane, settings.spread)
    domain = np.where(covered, plant(shape, section, row, col, plane, settings), -1)

    share = profiles(donor, settings)
    depth = np.where(
        covered,
        settings.median_depth * np.exp(settings.depth_sigma * section.normal(size=len(row))),
        settings.ambient_depth,
    )
    mixture = np.where(covered[:, None], compose(section, row, col, domain, settings), 1 / settings.n_domains)
    mean = mixture @ share
    mean *= depth[:, None]
    counts = draw_counts(section, mean, settings.dispersion)
    del mean
    if settings.planted == "permuted":
        inside, rows = np.flatnonzero(covered), np.arange(len(row))
        rows[inside] = section.permutation(inside)
        counts = counts[rows]

    turn = np.deg2rad(section.uniform(-3, 3))
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    pixels = plane * PITCH_PX @ rotation + section.uniform(900, 1500, 2)

    codes = barcodes(len(row))[generator("slide").permutation(len(row))]
    order = np.argsort(codes)
    return Slice(
        name, donor, codes[order], row[order], col[order], pixels[order], covered[order], domain[order],
        counts[order], ids, symbols,
    )  # fmt: skip


def tiny_slice(
    seed: int = 0,
    n_genes: int = 60,
    shape: tuple[int, int] = (24, 48),
    n_domains: int = 3,
    median_depth: float = 400.0,
    kind: str = "staggered",
    holes: bool = True,
    name: str = "tiny",
    gene_offset: int = 0,
    planted: str = "mixture",
) -> anndata.AnnData:
    """A small curated slice (docs/format.md) with planted domains, for tests: simulated.

    Parameters
    ----------
    seed
        Of all but the gene programmes, which follow from the other arguments: one slice can be learnt from another.
    n_genes
        Number of genes, ids ``ENSG90000000000``.. counted from ``gene_offset``.
    shape
        Rows and columns of the array; on a staggered lattice every second site of it exists.
    kind
        ``staggered``, ``square`` or ``none`` (positions without a lattice).
    holes
        Whether some spots at the rim and in the middle are missing.
    planted
        A key of `PLANTED`; all but ``mixture`` need a lattice.

    Returns
    -------
    AnnData with all fields of a curated slice; ``obs["label"]`` holds the planted domain.
    """
    settings = Settings(
        n_genes=n_genes,
        n_domains=n_domains,
        median_depth=median_depth,
        programme_genes=n_genes // 2,
        programme_sigma=1.0,
        planted=planted,
    )
    rng = generator("tiny", seed)
    if kind == "square":
        row, col = map(np.ravel, np.indices(shape))
        plane, pitch_um = np.column_stack([col, row]).astype(float), 200.0
    else:
        row, col = staggered_sites(*shape)
        plane, pitch_um = staggered_to_plane(row, col), 100.0
    if kind == "none":
        plane = rng.uniform(0, 1, plane.shape) * plane.max(0)
    if holes:
        middle, reach = plane.max(0) / 2, plane.max(0) / 2
        away = (plane - middle) / reach
        keep = (np.hypot(*away.T) < 1.25) & (((away - 0.2) ** 2).sum(1) > 0.02)
        row, col, plane = row[keep], col[keep], plane[keep]
    domain = plant(generator("tiny shape", seed), rng, row, col, plane, settings)
    depth = median_depth * np.exp(settings.depth_sigma * rng.normal(size=len(row)))
    share = compose(rng, row, col, domain, settings) @ profiles(f"tiny{seed}", settings)
    counts = draw_counts(rng, depth[:, None] * share, settings.dispersion)
    if planted == "permuted":
        counts = counts[rng.permutation(len(row))]

    obs = pd.DataFrame(index=pd.Index(barcodes(len(row)).astype(object)))
    if kind != "none":
        obs[Keys.ARRAY_ROW] = row.astype(np.int32)
        obs[Keys.ARRAY_COL] = col.astype(np.int32)
    obs[Keys.TOTAL_COUNTS] = np.asarray(counts.sum(1, dtype=np.int64)).ravel()
    obs[Keys.LABEL] = pd.Categorical(domain_names(domain))
    numbers = range(gene_offset, gene_offset + n_genes)
    var = pd.DataFrame({Keys.SYMBOL: [f"SIM{i}" for i in numbers]}, index=[f"ENSG9{i:010d}" for i in numbers])
    um_per_px = pitch_um / PITCH_PX
    provenance = {
        "format_version": 1,
        "slice": name,
        "row": json.dumps({"slice": name, "source": "simulated", "organism": "human", "donor": f"tiny{seed}"}),
        "inputs": "[]",
        "versions": "{}",
        "lattice": {
            "kind": kind,
            "source": "array" if kind != "none" else "pixels",
            "pitch_um": pitch_um,
            "um_per_px": um_per_px if kind != "none" else float("nan"),
            "residual": 0.0 if kind != "none" else float("nan"),
        },
        "counts": {
            "spots_in_source": len(row), "spots_in_tissue": len(row), "features_in_source": n_genes, "genes_kept": n_genes,
            "genes_ambiguous": 0, "genes_unknown": 0, "genes_merged": 0,
        },
    }  # fmt: skip
    return anndata.AnnData(
        X=counts, obs=obs, var=var, obsm={Keys.SPATIAL: plane * PITCH_PX + 500.0}, uns={Keys.STPATCH: provenance}
    )


DEFAULT_LAYOUT = {"spaceranger": "spaceranger-2", "cellxgene": "cellxgene", "geo": "geo"}


def layout_and_settings(name: str, row: dict[str, str]) -> tuple[str, Settings]:
    """What a simulated slice's row asks for: ``accession`` is a layout (blank: the usual one of its ``format``), and after a
    ``?`` fields of `Settings` that are not the default, as ``spaceranger-2?n_genes=36601&spread=1.3``.

    Raises
    ------
    CatalogueError
        A layout that can't be written, or a field or value that `Settings` does not take.
    """
    layout, _, query = row["accession"].partition("?")
    layout = layout or DEFAULT_LAYOUT.get(row["format"], "")
    if layout not in WRITERS:
        raise CatalogueError(
            f"slice {name}: simulated layout {layout!r} (accession or format of its row) is not known; expected one of "
            f"{', '.join(WRITERS)}. Next step: put one of these into the column accession."
        )
    kinds = {field.name: field.type for field in fields(Settings)}
    given = {}
    for field, value in parse_qsl(query, keep_blank_values=True):
        try:
            given[field] = kinds[field](value)
        except (KeyError, ValueError) as error:
            raise CatalogueError(
                f"slice {name}: simulated with {field}={value!r} (accession of its row); expected fields of "
                f"{', '.join(f'{known} ({kind.__name__})' for known, kind in kinds.items())}. Next step: correct it."
            ) from error
    try:
        return layout, Settings(**given)
    except ValueError as error:
        raise CatalogueError(
            f"slice {name}: simulated with {error} (accession of its row). Next step: correct it."
        ) from error


def write_slice(name: str, row: dict[str, str], genes_tsv: Path, manifest: Path) -> None:
    """Simulate a slice and write its deposit beside ``manifest`` (``deposit.json``), which is written last.

    The row's ``donor`` seeds what sections share; its ``accession`` names layout and settings (`layout_and_settings`).
    """
    layout, settings = layout_and_settings(name, row)
    folder = manifest.parent
    places = write_deposit(simulate_slice(name, row["donor"] or name, genes_tsv, settings), layout, folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path != manifest)
    record = {
        "format_version": 1,
        "simulated": True,
        "slice": name,
        "donor": row["donor"] or name,
        "layout": layout,
        "settings": settings.facts(),
        **places,
        "files": [
            {"path": str(path.relative_to(folder)), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            for path in files
        ],
    }
    manifest.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    write_slice(
        snakemake.wildcards.slice,
        dict(snakemake.params.row),
        Path(snakemake.input.genes),
        Path(snakemake.output.manifest),
    )
