"""Sizes of the samples of section 151673 with the default codec."""

import tarfile

import numpy as np
import pytest
import yaml

from tests.conftest import ROOT
from tests.real.test_real_grid import curated
from workflow import tar
from workflow.catalogue import check_config
from workflow.codec import decode
from workflow.grid import make_grid
from workflow.sample import Field
from workflow.windows import write_pack

pytestmark = pytest.mark.real


@pytest.mark.parametrize("name", ["dlpfc_151673", "whole_151673"])
def test_a_sample_of_151673_is_small_with_the_default_codec(real_data, name, tmp_path):
    config = yaml.safe_load((ROOT / "config.yaml").read_text())
    check_config(config)
    grid = make_grid(curated(name), "auto", 100)
    field = Field(grid, sorted(grid.gene_ids), config["window"], config["target_sum"])
    write_pack(
        field,
        {"pitch_um": grid.pitch_um, "layout": grid.layout},
        tmp_path / "pack.bin",
        tmp_path / "pack.npy",
        n=128,
        m=512,
        selection=config["selection"],
        epsilon=config["epsilon"],
        min_observed=config["min_observed"],
        seed=config["seed"],
        codec_name=config["codec"],
    )
    index = np.load(tmp_path / "pack.npy")
    print(f"{name}: counts {index['counts_nbytes'].mean():.0f} bytes, sample {index['nbytes'].mean():.0f} bytes")
    assert index["counts_nbytes"].mean() <= 32_000
    assert index["nbytes"].mean() <= 36_000
    with open(tmp_path / "pack.bin", "ab") as pack:
        pack.write(tar.END)
    assert (tmp_path / "pack.bin").stat().st_size == index["nbytes"].sum() + len(tar.END)
    with tarfile.open(tmp_path / "pack.bin") as archive:
        members = {member.name: archive.extractfile(member).read() for member in archive}
    for number in (0, 127):
        parts = (members[f"{grid.slice}_{number:06d}.{m}"] for m in ("counts.blosc", "sites.blosc", "json"))
        counts, genes, totals, facts = decode(*parts)
        y, x = facts["y"], facts["x"]
        columns = np.argsort(grid.gene_ids)[genes]
        np.testing.assert_array_equal(counts, grid.counts[y : y + 16, x : x + 16][:, :, columns].transpose(2, 0, 1))
        np.testing.assert_array_equal(totals, grid.total_counts[y : y + 16, x : x + 16])
