"""What the other files share: the checked config, the catalogue, and who was admitted.

In: config, the tables that `catalogue` and `downstream` name.
Out: no files; the names below.
"""

import shlex

from workflow.catalogue import check_config, load_roles, merge_roles, resolve

ROOT = Path(workflow.basedir)
RUN = "model"  # folder of the pretrained model below results/pretrain

check_config(config, ROOT / "workflow/schemas/config.schema.yaml")

# ROLES: one row a (slice, split); a slice may be pretrained on and evaluated.
ROLES = load_roles([config["catalogue"], config["downstream"]], root=ROOT)
SLICES = merge_roles(ROLES)  # slice name -> catalogue row as a dict of str
DATASETS = sorted({row["split"] for row in ROLES} - {"train", "val"})


wildcard_constraints:
    slice="[A-Za-z0-9_-]+",
    split="[A-Za-z0-9_-]+",
    dataset="[A-Za-z0-9_-]+",


# Jobs find `workflow` and `trainer` from any working directory. A prefix replaces bash's strict mode: restate it.
# Braces are doubled twice: Snakemake formats the prefix together with the command.
ROOT_QUOTED = shlex.quote(str(ROOT)).replace("{", "{{{{").replace("}", "}}}}")
shell.prefix(f"set -euo pipefail; export PYTHONPATH={ROOT_QUOTED}${{{{PYTHONPATH:+:$PYTHONPATH}}}}; ")


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
