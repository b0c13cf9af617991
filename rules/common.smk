"""What the other files share: the checked config, the catalogue, and who was admitted.

In: config, the tables that `catalogue` and `downstream` name.
Out: no files; the names below.
"""

import shlex
import sys

from workflow.catalogue import check_config, load_ids, load_roles, merge_roles, resolve
from workflow.guard import barred

ROOT = Path(workflow.basedir)
RUN = "model"  # folder of the pretrained model below results/pretrain

check_config(config, ROOT / "workflow/schemas/config.schema.yaml")

# ROLES: one row a (slice, split); a slice may be pretrained on and evaluated.
ROLES = load_roles([config["catalogue"], config["downstream"]], root=ROOT)
SLICES = merge_roles(ROLES)  # slice name -> catalogue row as a dict of str
DATASETS = sorted({row["split"] for row in ROLES} - {"train", "val"})

# BARRED: slices that must not be pretrained on, and why. What has no other role isn't even fetched; admit lists it.
BARRED = barred(ROLES, load_ids(ROOT / "catalogue/aux/evaluation_ids.tsv"))
CURATED = dict.fromkeys(
    row["slice"]
    for row in ROLES
    if config["allow_contamination"] or row["split"] in DATASETS or row["slice"] not in BARRED
)


wildcard_constraints:
    slice="[A-Za-z0-9_-]+",
    split="[A-Za-z0-9_-]+",
    dataset="[A-Za-z0-9_-]+",


def quoted(text):
    """For the shell, and with braces doubled twice: Snakemake formats the prefix together with the command."""
    return shlex.quote(str(text)).replace("{", "{{{{").replace("}", "}}}}")


# Jobs find `workflow` and `trainer` from any working directory, and run the interpreter that runs Snakemake, also where its
# environment isn't activated (with conda: that of the rule's). A prefix replaces bash's strict mode: restate it.
METHODS = {method.name for method in workflow.deployment_settings.deployment_method}
shell.prefix(
    "set -euo pipefail; "
    f"export PYTHONPATH={quoted(ROOT)}${{{{PYTHONPATH:+:$PYTHONPATH}}}} "
    f"PYTHON={'python' if METHODS else quoted(sys.executable)}; "
)

# On one machine so many at a time, on CPU as well; --resources or a profile may say otherwise. Inside a cluster's job such a
# limit would cut what the job asked for.
for name, number in {"gpu": 1, "downloads": 8}.items():
    if name not in workflow.global_resources and not workflow.remote_exec:
        workflow.register_resource(name, number)


def start_jobs_as_fast_as_may_be():
    """Take Snakemake's default limit of 100 jobs a second away; another that was asked for stays.

    For its sake every look at the waiting jobs orders another look a second later, and so does every job that ends: after some
    hundred jobs Snakemake does nothing else (9.27). To be called when a run starts.
    """
    limit = workflow.scheduling_settings.max_jobs_per_timespan
    if limit and (limit.max_jobs, limit.timespan) == (100, 1):
        workflow.scheduler.job_rate_limiter = None


def admitted(*splits):
    """Names of the admitted slices of these splits (all if none is named), in order, each once."""
    rows = checkpoints.admit.get().output.admitted
    with open(rows) as table:
        version = table.readline().rstrip("\n")
        if version != "# stpatch admitted 1":
            raise WorkflowError(
                f"{rows}: found {version!r}; expected '# stpatch admitted 1'. Delete it, run again."
            )
        header = table.readline().rstrip("\n").split("\t")
        found = [dict(zip(header, line.rstrip("\n").split("\t"))) for line in table]
    return sorted({row["slice"] for row in found if not splits or row["split"] in splits})
