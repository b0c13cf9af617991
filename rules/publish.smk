"""Copy a finished corpus into a bucket or to another file system, by one of Snakemake's storage plugins (docs/cluster.md).

In: the folder of shards that `--config shards=` names. Out: the same files below `--config to=` (`s3://bucket/corpus`, or an
absolute path with the plugin `fs`), each split's index.json last: where it lies, all that it lists lies too.

A workflow of its own, since the number of shards is known only when they are there:
    snakemake --snakefile rules/publish.smk --cores 4 --config shards=results/shards to=s3://bucket/corpus
"""

import json
from pathlib import Path

for key in ("shards", "to"):
    if key not in config:
        raise WorkflowError(f"say --config {key}=... (the first lines of rules/publish.smk tell what)")
SHARDS, TO = Path(config["shards"]), config["to"].rstrip("/")

# INDEX: split -> its index. LISTED: split/file -> sha256 of what an index lists.
INDEX = {file.parent.name: json.loads(file.read_text()) for file in sorted(SHARDS.glob("*/index.json"))}
if not INDEX:
    raise WorkflowError(
        f"{SHARDS}: found no */index.json; expected a corpus. Run `snakemake data`, or say --config shards="
    )
LISTED = {}
for split, index in INDEX.items():
    entries = [(entry["name"], entry["sha256"]) for entry in index["shards"]]
    entries += [
        (index[part]["file"], index[part]["sha256"])
        for part in ("genes", "samples", "components", "means")
        if index.get(part)
    ]
    LISTED |= {f"{split}/{name}": sha256 for name, sha256 in entries}


wildcard_constraints:
    split="|".join(INDEX),


rule publish:
    default_target: True
    input:
        [storage(f"{TO}/{split}/index.json") for split in INDEX],
        [storage(f"{TO}/{card.name}") for card in SHARDS.glob("README.md")],


rule copy:
    input:
        local(f"{SHARDS}/{{split}}/{{file}}"),
    output:
        storage(f"{TO}/{{split}}/{{file}}"),
    wildcard_constraints:
        file="(?!index.json).+",
    params:
        sha256=lambda wildcards: LISTED[f"{wildcards.split}/{wildcards.file}"],
    shell:
        # What isn't what the index says goes nowhere.
        "echo {params.sha256}'  '{input:q} | sha256sum --check --quiet && cp {input:q} {output:q}"


rule copy_index:
    input:
        index=local(f"{SHARDS}/{{split}}/index.json"),
        files=lambda wildcards: [
            storage(f"{TO}/{file}") for file in LISTED if file.startswith(f"{wildcards.split}/")
        ],
    output:
        storage(f"{TO}/{{split}}/index.json"),
    shell:
        "cp {input.index:q} {output:q}"


rule copy_card:
    input:
        local(f"{SHARDS}/README.md"),
    output:
        storage(f"{TO}/README.md"),
    shell:
        "cp {input:q} {output:q}"
