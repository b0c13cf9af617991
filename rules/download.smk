"""Fetch the files of the slices that lie on other machines.

In: the http(s) urls of the catalogue's row; of an archive only the members that curate reads are kept.
Out: resources/download/{slice}/files.json (path, url, bytes, sha256 and role of each file), written last; it stands for
the folder, in which the files lie as a Space Ranger folder `outs` or as `{slice}.h5ad`, labels as `labels.tsv`.
"""

# Hosts that a redirect may lead to, besides those of the row's own urls.
REDIRECT_HOSTS = []
REMOTE_SLICES = [
    name for name, row in SLICES.items() if row["source"] in ("cellxgene", "geo", "10x", "zenodo", "url")
]


# Politeness: `--resources downloads=2` (or the profile) bounds the downloads that run at the same time; retries of a
# whole job are the profile's too.
rule download:
    output:
        "resources/download/{slice}/files.json",
    log:
        "<results>/logs/download/{slice}.log",
    benchmark:
        "<results>/benchmarks/download/{slice}.tsv"
    wildcard_constraints:
        slice="|".join(REMOTE_SLICES) or "(?!)",
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        mem_mb=500,
        downloads=1,
    params:
        # Not the whole row: a corrected tissue must not fetch anything again.
        row=lambda wildcards: {
            name: SLICES[wildcards.slice][name]
            for name in ("slice", "url", "sha256", "bytes", "format", "labels")
        },
        hosts=REDIRECT_HOSTS,
    script:
        "../workflow/download.py"
