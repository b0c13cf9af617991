"""Files between stages that were cut or damaged: each reader names the file and the remedy."""

from __future__ import annotations

import random

import numpy as np
import pytest
from safetensors.numpy import save_file

from workflow.admit import read_curated
from workflow.curate import write_slice
from workflow.errors import DamagedFile, EmptySlice
from workflow.moments import write_moments
from workflow.reading import check_seal, read_slice, read_tensors, reading, seal, seal_holds
from workflow.simulate import tiny_slice
from workflow.sketch import read_sketch, sketch_slice, write_sketch
from workflow.stats import read_moments


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One file of each kind, and what reads it."""
    folder = tmp_path_factory.mktemp("made")
    slice_ = tiny_slice(name="a")
    slice_.uns["stpatch"]["inputs"] = '[{"path": "x.h5", "bytes": 1, "sha256": "0"}]'
    slice_.write_h5ad(folder / "a.h5ad", compression="gzip", convert_strings_to_categoricals=False)
    write_sketch(sketch_slice(folder / "a.h5ad"), folder / "a_sketch.npz")
    sums = {"n_spots": np.int64(3), "sum": np.arange(60.0), "m2": np.arange(60.0)}
    write_moments(folder / "a_moments.npz", slice_.var_names, slice_.var["symbol"], sums)
    save_file({"X": np.ones((3, 2), np.float32), "spot": np.arange(3, dtype=np.int32)}, folder / "a.safetensors")
    return folder


# numpy leaves a file that is no whole zip to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

READERS = {
    "a.h5ad": lambda path: (read_slice(path), read_curated(path)),
    "a_sketch.npz": read_sketch,
    "a_moments.npz": lambda path: list(read_moments([path])),
    "a.safetensors": read_tensors,
}


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_cut_file_is_damage_and_names_itself_and_the_remedy(made, tmp_path, name, part):
    content = (made / name).read_bytes()
    (tmp_path / name).write_bytes(content[: int(part * len(content))])
    with pytest.raises(DamagedFile, match=f"delete {tmp_path / name} and run again"):
        READERS[name](tmp_path / name)
    READERS[name](made / name)


@pytest.mark.parametrize("name", READERS)
def test_a_flipped_bit_raises_nothing_but_damage(made, tmp_path, name):
    content, rng, damaged = (made / name).read_bytes(), random.Random(0), 0
    for _ in range(60):
        flipped = bytearray(content)
        flipped[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        (tmp_path / name).write_bytes(flipped)
        try:
            READERS[name](tmp_path / name)
        except DamagedFile:
            damaged += 1
    assert damaged


def test_typed_errors_pass_as_they_are(tmp_path):
    with pytest.raises(EmptySlice), reading(tmp_path / "x"):
        raise EmptySlice(slice="x", found="nothing", expected="a spot", next_step="none")


def test_a_sealed_slice_is_read_as_before_and_one_without_seal_too(made, tmp_path):
    sealed = tmp_path / "a.h5ad"
    write_slice(read_slice(made / "a.h5ad"), sealed)
    assert seal_holds(sealed.read_bytes()) is True
    assert seal_holds((made / "a.h5ad").read_bytes()) is None
    before, after = read_slice(made / "a.h5ad"), read_slice(sealed)
    assert (before.X != after.X).nnz == 0
    assert read_curated(sealed).n_spots == before.n_obs
    assert np.array_equal(sketch_slice(sealed).rare, sketch_slice(made / "a.h5ad").rare)


def test_of_a_seal_and_what_it_seals_no_bit_can_be_flipped_unseen(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(bytes(range(64)))
    seal(path)
    content = path.read_bytes()
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        assert seal_holds(bytes(flipped)) is False
    path.write_bytes(b"x" + content[1:])
    with pytest.raises(DamagedFile, match=f"other bytes than were written.*delete {path} and run again"):
        check_seal(path)
