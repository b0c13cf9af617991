"""Say before anything runs what is still to fetch, to store and to wait for, and refuse a disk that is too small.

In: the table of slices, and which files are there. Out: no files; a line on stderr.
"""

import shutil

from snakemake.settings.enums import Quietness

from workflow.estimate import cores_of, estimate


def outstanding(names):
    """Estimate for the slices of these names."""
    return estimate(
        [SLICES[name] for name in sorted(names)],
        results=config["results"],
        windowed={row["slice"] for row in ROLES if row["split"] in ("train", "val")},
        windows_per_slice=config["windows_per_slice"],
        max_coverage=config["max_coverage"],
        window=config["window"],
        genes=config["genes"],
    )


# Whether this will be a dry run isn't known yet, nor which targets: the whole table is estimated, and only a run is refused.
# Jobs, which read this file too, keep silent.
free_bytes = shutil.disk_usage(".").free
if workflow.is_main_process and not set(workflow.output_settings.quiet or ()) & {
    Quietness.ALL,
    Quietness.PROGRESS,
}:
    estimated = outstanding(CURATED)
    cores = cores_of(workflow.resource_settings.cores, workflow.resource_settings.nodes)
    print(estimated.line(cores, free_bytes), file=sys.stderr)
    if refusal := estimated.refusal(free_bytes, config["min_free_gb"]):
        print(f"Warning: a run of all of it would be refused. {refusal}", file=sys.stderr)


def refuse_a_disk_too_small():
    """Only what these targets need; windows lie behind the checkpoint and belong to any of them."""
    wanted = {job.wildcards.get("slice") for job in workflow.dag.needrun_jobs()} & set(CURATED)
    if refusal := outstanding(wanted).refusal(free_bytes, config["min_free_gb"]):
        raise WorkflowError(refusal)
