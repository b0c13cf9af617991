"""Rule `dataset_card`: the shards' README, in the form that dataset hubs read: what went in, what was left out and why, whom to cite.

Everything is from the tables of admission, the rows of the catalogue that they repeat, and the shards' indices. A fact that no row states is
called unknown; citations are built from identifiers alone, so no author or title is ever made up.
"""

import json
import re
from collections import Counter
from pathlib import Path

import yaml

from workflow.catalogue import PRETRAINED

SIZES = [(10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")]
UNKNOWN = "unknown"
# Codes of workflow/errors.py and admission, in words.
REASONS = {
    "contamination": "is, or may be, tissue of an evaluation set",
    "duplicate": "the same tissue under another name",
    "multiple_organisms": "genes of more than one organism",
    "other_organism": "another organism",
    "targeted_panel": "a targeted panel, not the whole transcriptome",
}
CARD = """\
---
{header}---
# {title}
{warnings}
{n_windows} windows of {h} x {w} spots by {m} genes, raw counts, cut from {n_slices} slices ({n_spots} spots in tissue). `format.md` of stpatch
describes the files; stock `webdataset` reads them.

## What went in

{totals}

### By tissue

{tissues}

### Slices

{slices}

## What was left out

{reasons}

{left_out}

### Duplicates

{duplicates}

### Remarks of admission

{notes}

## Licences

{licences}

The shards repeat counts of these sources: each slice's own licence holds for its part. "{unknown}" means that no document seen states one; ask the source
before you pass such slices on.

## Sources and citations

{citations}

## How to rebuild

```bash
{commands}
```

with a config of these keys, laid over the `config.yaml` of stpatch:

```yaml
{config}```

| split | windows | tars | sha256 of the settings | sha256 of the slices' rows |
|---|---|---|---|---|
{hashes}

The same slices, settings and seed give the same bytes, on any number of cores.
"""
SIMULATED = "\n**Slices of this corpus are simulated: for trying out the software, not for biology.**\n"
CONTAMINATED = """
**`allow_contamination` is on: {n} of the slices match an evaluation slice and were kept. Scores of a model that was pretrained on
them are not those of unseen tissue.** They are listed under "Remarks of admission".
"""


def card(tables: dict[str, list[dict]], indices: dict[str, dict], settings: dict) -> str:
    """The card's Markdown.

    Parameters
    ----------
    tables
        Rows of `admitted`, `quarantine`, `duplicates`, `notes`.
    indices
        ``index.json`` of the splits.
    settings
        The config's keys that shape the corpus.
    """
    rows = [row for row in tables["admitted"] if row["split"] in PRETRAINED]
    rows.sort(key=lambda row: (PRETRAINED.index(row["split"]), row["slice"]))
    windows = {entry["slice"]: entry["n_windows"] for index in indices.values() for entry in index["slices"]}
    simulated = any(row["source"] == "simulated" for row in rows)
    kept = sorted({note["slice"] for note in tables["notes"] if note["kind"] == "contamination"})
    n_windows = sum(index["n_samples"] for index in indices.values())
    organisms = sorted({row["organism"] for row in rows}) or [settings["organism"]]
    title = f"stpatch corpus: {' and '.join(organisms)} spatial transcriptomics{' (simulated)' if simulated else ''}"
    first = next(iter(indices.values()))
    shaping = {key: value for key, value in settings.items() if key != "results"}
    warned = settings["allow_contamination"] and kept
    return CARD.format(
        header=yaml.safe_dump(_header(title, rows, n_windows, simulated, bool(warned), indices), sort_keys=False),
        title=title,
        warnings=SIMULATED * simulated + (CONTAMINATED.format(n=len(kept)) if warned else ""),
        n_windows=f"{n_windows:,}",
        **{key: first[key] for key in ("h", "w", "m")},
        n_slices=f"{len(rows):,}",
        n_spots=f"{_spots(rows):,}",
        totals=_totals(rows, windows),
        tissues=_sums(rows, "tissue"),
        slices=_slices(rows, windows),
        reasons=_reasons(tables["quarantine"]),
        left_out=_table(tables["quarantine"], ("slice", "stage", "code", "found", "expected"), ""),
        duplicates=_table(tables["duplicates"], ("slice", "duplicate_of", "evidence"), "None were found."),
        notes=_table(tables["notes"], ("slice", "kind", "detail"), "None."),
        licences=_sums(rows, "licence"),
        unknown=UNKNOWN,
        citations=_citations(rows),
        commands="snakemake --cores 8 data --configfile mine.yaml",
        config=yaml.safe_dump(shaping, sort_keys=False, default_flow_style=None),
        hashes="\n".join(
            f"| {split} | {index['n_samples']:,} | {len(index['shards'])} | `{index['config_sha256']}` | "
            f"`{index['catalogue_sha256']}` |"
            for split, index in indices.items()
        ),
    )


def _header(title: str, rows: list[dict], n_windows: int, simulated: bool, contaminated: bool, indices: dict) -> dict:
    licences = {row["licence"] or UNKNOWN for row in rows}
    tags = ["biology", "spatial-transcriptomics", "visium", "webdataset"]
    tags += ["simulated"] * simulated + ["contaminated"] * contaminated
    names = {"train": "train", "val": "validation"}
    return {
        "pretty_name": title,
        "license": "cc-by-4.0" if licences == {"CC BY 4.0"} else "other",
        "tags": tags,
        "size_categories": [next((name for most, name in SIZES if n_windows < most), "n>10M")],
        "configs": [
            {
                "config_name": "default",
                "data_files": [
                    {"split": names[split], "path": f"{split}/{split}-*.tar"}
                    for split, index in indices.items()
                    if index["n_samples"]
                ],
            }
        ],
    }


def _spots(rows: list[dict]) -> int:
    return sum(int(row["n_spots"]) for row in rows)


def _totals(rows: list[dict], windows: dict[str, int]) -> str:
    lines = ["| split | slices | donors stated | spots in tissue | windows |", "|---|---|---|---|---|"]
    for split in PRETRAINED:
        own = [row for row in rows if row["split"] == split]
        donors = len({row["donor"] for row in own} - {""})
        drawn = sum(windows[row["slice"]] for row in own)
        lines.append(f"| {split} | {len(own):,} | {donors:,} | {_spots(own):,} | {drawn:,} |")
    return "\n".join(lines)


def _sums(rows: list[dict], column: str) -> str:
    """Slices and spots by what a column says, the largest first."""
    if not rows:
        return "There are no slices."
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["organism"], row[column] or UNKNOWN), []).append(row)
    lines = [f"| organism | {column} | slices | spots in tissue |", "|---|---|---|---|"]
    for (organism, value), own in sorted(groups.items(), key=lambda item: (-len(item[1]), item[0])):
        lines.append(f"| {organism} | {_cell(value)} | {len(own):,} | {_spots(own):,} |")
    return "\n".join(lines)


def _slices(rows: list[dict], windows: dict[str, int]) -> str:
    shown = [
        {
            **{name: row[name] or UNKNOWN for name in ("accession", "tissue", "donor", "licence")},
            **{name: row[name] for name in ("slice", "split", "source")},
            "spots": row["n_spots"],
            "genes": row["n_genes"],
            "windows": windows[row["slice"]],
        }
        for row in rows
    ]
    columns = ("slice", "split", "source", "accession", "tissue", "donor", "spots", "genes", "windows", "licence")
    return _table(shown, columns, "There are no slices.")


def _reasons(quarantine: list[dict]) -> str:
    if not quarantine:
        return "Every slice of the tables went in."
    lines = ["| reason | slices | |", "|---|---|---|"]
    for code, n in sorted(Counter(row["code"] for row in quarantine).items(), key=lambda item: (-item[1], item[0])):
        lines.append(f"| `{code}` | {n:,} | {REASONS.get(code, 'could not be used as it is')} |")
    return "\n".join(lines)


def _table(rows: list[dict], columns: tuple[str, ...], empty: str) -> str:
    if not rows:
        return empty
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    lines += [f"| {' | '.join(_cell(row[name]) for name in columns)} |" for row in rows]
    return "\n".join(lines)


def _cell(value: object) -> str:
    """A cell that breaks no table and starts no markup."""
    return re.sub(r"([|\\`*_<>\[\]])", r"\\\1", " ".join(str(value).split()))


def references(row: dict) -> dict[str, dict[str, str]]:
    """BibTeX entries of a slice, key -> fields, from the identifiers in its row: series before sample, papers by DOI or PubMed number."""
    told = " ".join(row[name] for name in ("accession", "url", "evidence"))
    found: dict[str, dict[str, str]] = {}
    series = sorted(set(re.findall(r"\bGSE\d+\b(?!nnn)", told)))
    for accession in series or sorted(set(re.findall(r"\bGSM\d+\b(?!nnn)", told))):
        url = f"https://www.ncbi.nlm.nih.gov/geo/query/acc.cgi?acc={accession}"
        found[accession] = {"type": "misc", "title": f"Gene Expression Omnibus {accession}", "url": url}
    for doi in re.findall(r"\bdoi[ :]*(?:https?://doi\.org/)?(10\.\d{4,9}/[^\s;,]+)", told, re.IGNORECASE):
        doi = doi.rstrip(".)")
        found["doi_" + re.sub(r"[^0-9A-Za-z]+", "_", doi)] = {"type": "article", "doi": doi}
    for numbers in re.findall(r"\bpmid[ :]*(\d+(?:,\d+)*)", told, re.IGNORECASE):
        for number in numbers.split(","):
            found[f"pmid_{number}"] = {
                "type": "article",
                "pmid": number,
                "url": f"https://pubmed.ncbi.nlm.nih.gov/{number}/",
            }
    for record in re.findall(r"zenodo(?:\.org/(?:api/)?records?/|:)(\d+)", told):
        found[f"zenodo_{record}"] = {
            "type": "misc",
            "title": f"Zenodo record {record}",
            "url": f"https://zenodo.org/records/{record}",
        }
    if row["source"] == "10x":
        name, url = row["accession"] or row["slice"], row["url"].split("#")[0].split()[0]
        key = "tenx_" + re.sub(r"[^0-9A-Za-z]+", "_", name)
        found[key] = {"type": "misc", "title": f"10x Genomics dataset {name.replace('_', ' ')}", "url": url}
    if row["source"] == "cellxgene":
        for version in re.findall(r"datasets\.cellxgene\.cziscience\.com/([0-9a-f-]{36})", told):
            url = f"https://datasets.cellxgene.cziscience.com/{version}.h5ad"
            found[f"cellxgene_{version}"] = {
                "type": "misc",
                "title": f"CELLXGENE Discover dataset version {version}",
                "url": url,
            }
    return found


def _citations(rows: list[dict]) -> str:
    entries: dict[str, dict[str, str]] = {}
    without = []
    for row in rows:
        own = references(row)
        entries |= own
        if not own:
            without.append(row["slice"])
    lines = [
        "Made from the identifiers that the catalogue gives; complete them from the linked pages before you print them.",
        "",
    ]
    lines += ["```bibtex"]
    for key in sorted(entries):
        fields = {name: value for name, value in entries[key].items() if name != "type"}
        lines.append(f"@{entries[key]['type']}{{{key},")
        lines += [f"  {name} = {{{value}}}," for name, value in fields.items()]
        lines.append("}")
    lines += ["```"]
    if not entries:
        lines = ["No row names an identifier that could be cited."]
    elif without:
        lines += ["", f"Without an identifier to cite: {', '.join(map(_cell, without))}."]
    return "\n".join(lines)


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Rows of a table of admission (no quoting, a version line first)."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    header = lines[1].split("\t")
    return [dict(zip(header, line.split("\t"), strict=True)) for line in lines[2:]]


if __name__ == "__main__":
    from workflow.logs import log_to

    log_to(snakemake.log[0])
    given = snakemake.input
    tables = {name: read_rows(given[name]) for name in ("admitted", "quarantine", "duplicates", "notes")}
    indices = {index["split"]: index for index in (json.loads(Path(path).read_text()) for path in given.indices)}
    text = card(tables, indices, dict(snakemake.params.settings))
    Path(snakemake.output[0]).write_text(text, encoding="utf-8")
