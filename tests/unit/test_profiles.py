"""The shipped profiles and the rules agree."""

from __future__ import annotations

import re

import pytest
import yaml
import yte

from tests.conftest import ROOT

SLURM = ROOT / "profiles/slurm/profile.v9+.yaml"
RULES = {
    name: body
    for file in sorted((ROOT / "rules").glob("*.smk"))
    for name, body in re.findall(r"(?ms)^(?:rule|checkpoint) (\w+):\n(.*?)(?=^\S|\Z)", file.read_text())
    if file.name != "publish.smk"
}
LOCAL = set(re.search(r"localrules:\n((?:    \w+,\n)+)", (ROOT / "Snakefile").read_text())[1].replace(",", "").split())


def rendered(**settings: object) -> dict:
    """The profile as Snakemake sees it, with some of the user's lines set."""
    content = yaml.safe_load(SLURM.read_text())
    assert set(settings) <= set(content["__variables__"])
    content["__variables__"] |= settings
    return yte.process_yaml(yaml.safe_dump(content, sort_keys=False), require_use_yte=True)


def test_every_rule_that_the_slurm_profile_names_exists():
    profile = rendered(gpu_partition="gpu")
    named = {*profile["groups"], *profile["set-resources"], *profile["set-threads"]}
    assert named <= set(RULES)
    assert set(profile["group-components"]) == set(profile["groups"].values())


def test_every_job_of_a_slice_shares_a_slurm_job_with_other_slices():
    of_a_slice = {name for name, body in RULES.items() if re.search(r"output:[^:]*?\{slice\}", body, re.S)}
    assert {"curate", "grid", "windows", "embed"} <= of_a_slice
    assert of_a_slice - LOCAL == set(rendered()["groups"])


def test_what_a_job_asks_for_grows_with_each_attempt():
    profile = rendered()
    for name in set(RULES) - LOCAL - {"report"}:
        by_profile = profile["set-resources"].get(name, {}).get("mem_mb", "")
        by_rule = re.search(r"mem_mb=lambda [^:]*attempt[^:]*:", RULES[name])
        assert "attempt" in by_profile or by_rule or "mem_mb" not in RULES[name], name
    assert "attempt" in profile["default-resources"]["mem_mb"]
    assert "attempt" in profile["default-resources"]["runtime"]


def test_local_rules_exist_and_fetching_is_one_of_them():
    assert LOCAL <= set(RULES)
    assert "download" in LOCAL


def test_settings_left_empty_leave_account_and_partition_to_the_cluster():
    assert not {"slurm_account", "slurm_partition"} & set(rendered()["default-resources"])
    profile = rendered(account="lab", partition="short", gpu_partition="gpu")
    assert profile["default-resources"]["slurm_account"] == "lab"
    assert profile["default-resources"]["slurm_partition"] == "short"
    assert profile["set-resources"]["pretrain"]["slurm_partition"] == "gpu"
    assert profile["set-resources"]["embed"]["slurm_partition"] == "gpu"


@pytest.mark.parametrize(("nodes", "gpus", "ranks"), [(1, 0, 1), (1, 4, 4), (2, 0, 1), (2, 4, 4)])
def test_training_asks_for_its_gpus_on_each_node(nodes, gpus, ranks):
    asked = rendered(nodes=nodes, gpus=gpus)["set-resources"]["pretrain"]
    assert (asked["nodes"], asked["ranks"]) == (nodes, ranks)
    if nodes == 1:
        assert asked["gpu"] == gpus
        assert "mpi" not in asked
    else:  # `gpu` would be the number on all nodes together
        assert asked["gpu"] == 0
        assert asked.get("gres") == (f"gpu:{gpus}" if gpus else None)
        assert asked["tasks"] == nodes


def test_the_default_profile_sets_no_limits_that_would_win_over_those_of_a_cluster():
    # Snakemake loads it beside any --profile, and its keys replace that one's.
    default = yaml.safe_load((ROOT / "profiles/default/profile.v9+.yaml").read_text())
    shared = set(default) & set(rendered())
    assert {key: default[key] for key in shared} == {key: rendered()[key] for key in shared}
