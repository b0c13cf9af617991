"""Fetch the files of the slices that lie on other machines.

In: the http(s) urls of the catalogue's row; of an archive only the members that curate reads are kept.
Out: resources/download/{slice}/files.json (what was fetched, or why nothing could be; see docs/format.md), written last; it
stands for the folder, in which the files lie as a Space Ranger folder `outs` or as `{slice}.h5ad`, labels as `labels.tsv`.
Beside it: resources/lock/{slice}.tsv, what each file was when it was first seen; resources/archives, archives that several
slices take members from.
"""

from workflow.sources import (
    AT_ONCE,
    AT_ONCE_NCBI,
    REMOTE_SOURCES,
    concerning,
    host_resource,
    hosts_of,
    taken_from,
)

# slice -> the resources that its hosts are
REMOTE_SLICES = {
    name: {host_resource(host) for host in hosts_of(row)}
    for name, row in SLICES.items()
    if row["source"] in REMOTE_SOURCES
}
HOST_RESOURCES = sorted(set().union(*REMOTE_SLICES.values()))

# Politeness: so many downloads at a time from one host, whatever --cores and --jobs allow; a profile or --resources may say less.
for name in HOST_RESOURCES:
    if name not in workflow.global_resources and not workflow.remote_exec:
        workflow.register_resource(name, AT_ONCE_NCBI if name == "from_ncbi" else AT_ONCE)


rule download:
    output:
        "resources/download/{slice}/files.json",
    log:
        "<results>/logs/download/{slice}.log",
    benchmark:
        "<results>/benchmarks/download/{slice}.tsv"
    conda:
        "../envs/data.yaml"
    threads: 1
    resources:
        **{name: taken_from(name, REMOTE_SLICES) for name in HOST_RESOURCES},
        mem_mb=500,
        downloads=1,
    params:
        # Not the whole row: a corrected tissue must not fetch anything again.
        row=lambda wildcards: {
            name: SLICES[wildcards.slice][name]
            for name in ("slice", "url", "sha256", "bytes", "format", "labels")
        },
        mirrors=lambda wildcards: concerning(SLICES[wildcards.slice], config["mirrors"]),
        redirect_hosts=lambda wildcards: sorted(
            sum(concerning(SLICES[wildcards.slice], config["redirect_hosts"]).values(), [])
        ),
        lock="resources/lock/{slice}.tsv",
        archives="resources/archives",
    script:
        "../workflow/download.py"
