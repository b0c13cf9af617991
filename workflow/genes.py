"""Gene names: Ensembl ids without version, and symbols mapped to them through the shipped tables.

Rules, in order, for each column of a source:
1. an Ensembl id of the slice's organism is kept, its version (`.7`) and `_PAR_Y` mark taken off;
2. else its symbol is looked up: first as it is spelled, then among the aliases, then in any case (`C1ORF159`, capitals of mouse);
3. a symbol that stands for several Ensembl ids is ambiguous, one that stands for none is unknown: both are dropped and counted;
4. columns that end at one Ensembl id are summed into the first of them, and counted as merged.
"""

from __future__ import annotations

import csv
import functools
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy import sparse

PREFIX = {"human": "ENSG", "mouse": "ENSMUSG"}
ENSEMBL = re.compile(r"^(ENS[A-Z]*G\d{11})(?:\.\d+)?(?:_PAR_Y)?$")
GENOME = re.compile(r"^(GRC[a-z]\d+|hg\d+|mm\d+)_+|^(ENS[A-Z]*G)\d{11}")  # before a gene's name, or in its id
LEAST_OF_GENOME = 0.01  # of the features; a gene or two of another genome are a marker, not an organism
AMBIGUOUS = ""  # stands in a lookup for a name of several genes


@dataclass(frozen=True)
class GeneTable:
    """Lookups of one organism: name -> Ensembl id, ``""`` where the name is ambiguous."""

    by_symbol: dict[str, str]
    by_alias: dict[str, str]
    by_any_case: dict[str, str]
    symbols: dict[str, str]  # Ensembl id -> symbol

    def find(self, name: str) -> str | None:
        """Ensembl id of a symbol; ``""`` if it is ambiguous, None if it is unknown."""
        for lookup, key in ((self.by_symbol, name), (self.by_alias, name), (self.by_any_case, name.upper())):
            if key in lookup:
                return lookup[key]
        return None


@functools.cache
def load_genes(path: str | Path) -> GeneTable:
    """Read ``genes_{organism}.tsv`` (columns gene_id, symbol, aliases parted by ``|``)."""
    by_symbol: dict[str, str] = {}
    by_alias: dict[str, str] = {}
    by_any_case: dict[str, str] = {}
    symbols: dict[str, str] = {}
    with open(path, encoding="utf-8", newline="") as table:
        lines = (line for line in table if not line.startswith("#"))
        for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
            gene_id, symbol = row["gene_id"], row["symbol"]
            symbols[gene_id] = symbol
            _note(by_symbol, symbol, gene_id)
            _note(by_any_case, symbol.upper(), gene_id)
            for alias in filter(None, (row["aliases"] or "").strip().split("|")):
                _note(by_alias, alias, gene_id)
    return GeneTable(by_symbol, by_alias, by_any_case, symbols)


def _note(lookup: dict[str, str], name: str, gene_id: str) -> None:
    lookup[name] = gene_id if lookup.get(name, gene_id) == gene_id else AMBIGUOUS


def strip_version(name: str) -> str | None:
    """``ENSG00000000003.16`` -> ``ENSG00000000003``; None if the name is no Ensembl gene id."""
    match = ENSEMBL.match(name)
    return match.group(1) if match else None


def organism_of(names: np.ndarray, tables: dict[str, GeneTable]) -> tuple[str | None, str]:
    """The organism that gene names belong to, and the evidence in words; None where they do not tell.

    Ensembl ids tell by their prefix. Symbols tell by those that only one organism has in any case (``CYP2D6``, ``GM12345``),
    so that mouse symbols in capitals are found out; where there are none, by their spelling (``Actb`` or ``ACTB``).
    """
    ids = [gene_id for gene_id in map(strip_version, names) if gene_id]
    if len(ids) > len(names) / 2:
        hits = {organism: sum(i.startswith(prefix) for i in ids) for organism, prefix in PREFIX.items()}
        return _most(hits, f"of {len(ids)} Ensembl ids", len(ids))
    upper = [name.upper() for name in names]
    hits = {}
    for organism, table in tables.items():
        others = [other.by_any_case for name, other in tables.items() if name != organism]
        hits[organism] = sum(n in table.by_any_case and not any(n in other for other in others) for n in upper)
    if any(hits.values()):
        return _most(hits, "symbols that only one organism has")
    spelled = {organism: sum(name in table.by_symbol for name in names) for organism, table in tables.items()}
    return _most(spelled, "symbols by their spelling")


def genomes_of(names: list[str]) -> dict[str, int]:
    """Genomes that a hundredth of the names or more say they are of (``GRCh38_TP53``, ``ENSMUSG...``), with their number of names."""
    told = Counter(match[1] or match[2] for match in map(GENOME.match, names) if match)
    return {genome: n for genome, n in sorted(told.items()) if n >= LEAST_OF_GENOME * len(names)}


def _most(hits: dict[str, int], what: str, total: int = 0) -> tuple[str | None, str]:
    evidence = ", ".join(f"{organism} {n}" for organism, n in hits.items()) + f" {what}"
    ranked = sorted(hits, key=hits.__getitem__, reverse=True)
    if total:  # ids of a third organism fall outside all prefixes
        return (ranked[0] if hits[ranked[0]] > total / 2 else "another organism"), evidence
    return (ranked[0] if hits[ranked[0]] > hits[ranked[1]] else None), evidence


@dataclass(frozen=True)
class Mapping:
    """Where each column of a source goes."""

    gene_ids: np.ndarray  # str [K], in order of first appearance
    symbols: np.ndarray  # str [K]
    target: np.ndarray  # int64 [features]: column of the result, -1 where dropped
    ambiguous: int
    unknown: int
    merged: int  # columns beyond the first of their Ensembl id

    def apply(self, counts: sparse.csr_matrix) -> sparse.csr_matrix:
        """Sum the columns of ``counts`` [n, features] into [n, K]."""
        kept = np.flatnonzero(self.target >= 0)
        shape = (len(self.target), len(self.gene_ids))
        sums = sparse.csr_matrix((np.ones(len(kept), counts.dtype), (kept, self.target[kept])), shape=shape)
        result = (counts @ sums).tocsr()
        result.sort_indices()
        return result


def map_genes(ids: np.ndarray, symbols: np.ndarray, organism: str, table: GeneTable) -> Mapping:
    """Map a source's columns to Ensembl ids by the rules at the top of this module.

    Parameters
    ----------
    ids
        str [features]: the source's ids, ``""`` or anything that is no Ensembl id where it has none.
    symbols
        str [features]: the source's symbols, ``""`` where it has none.
    organism
        ``human`` or ``mouse``.
    table
        The organism's names.
    """
    position: dict[str, int] = {}
    names: list[str] = []
    target = np.full(len(ids), -1, np.int64)
    ambiguous = unknown = merged = 0
    for column, (source_id, symbol) in enumerate(zip(ids, symbols, strict=True)):
        gene_id = strip_version(source_id)
        if gene_id is None:
            gene_id = table.find(symbol or source_id)
            if gene_id == AMBIGUOUS:
                ambiguous += 1
                continue
        if gene_id is None or not gene_id.startswith(PREFIX[organism]):
            unknown += 1
            continue
        if gene_id in position:
            merged += 1
        else:
            position[gene_id] = len(position)
            own = symbol if symbol and strip_version(symbol) is None else ""
            names.append(own or table.symbols.get(gene_id, ""))
        target[column] = position[gene_id]
    gene_ids = np.array(list(position), dtype=object)
    return Mapping(gene_ids, np.array(names, dtype=object), target, ambiguous, unknown, merged)
