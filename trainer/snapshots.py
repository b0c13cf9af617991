"""Snapshots of a run: one safetensors file each, from which it goes on as if it had never stopped (docs/format.md).

It holds the weights, the optimizer's state, the lines of ``metrics.jsonl`` so far and, as JSON in its metadata, the state: step,
samples consumed, what the run is, what befell it; and a hash of the file. The schedule is a function of the step and nothing
else draws random numbers, so there is no more to keep.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from torch import nn

from trainer.errors import DamagedSnapshot, SettingsChanged
from trainer.files import as_safetensors, sealed, write_whole

FORMAT_VERSION = 2
CONTENT = tuple[dict, dict[str, np.ndarray]]  # the state, the tensors by name


class Snapshots:
    """The snapshots of one run: the last ``keep``, and the one of the lowest held-out error."""

    def __init__(self, folder: Path, keep: int) -> None:
        self.folder, self.keep = folder, keep

    def steps(self) -> list[int]:
        """Steps of the snapshots that lie there, ascending."""
        found = (re.fullmatch(r"(\d{8,})\.safetensors", file.name) for file in self.folder.glob("*.safetensors"))
        return sorted(int(match[1]) for match in found if match)

    def file(self, step: int) -> Path:
        return self.folder / f"{step:08d}.safetensors"

    def save(self, state: dict, tensors: dict[str, np.ndarray]) -> None:
        """Write the snapshot of ``state["step"]``, then remove those that are no longer kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.file(state["step"]), pack(state, tensors))
        kept = {*self.steps()[-self.keep :], state["step"], state["best"] and state["best"]["step"]}
        for step in set(self.steps()) - kept:
            self.file(step).unlink()

    def read(self, step: int) -> CONTENT | None:
        """The snapshot of this step; None, with a warning, where it is damaged or gone."""
        try:
            return unpack(self.file(step).read_bytes(), self.file(step))
        except (OSError, DamagedSnapshot) as error:
            print(f"warning: {error}", file=sys.stderr, flush=True)
            return None

    def latest(self) -> tuple[bytes, list[str]]:
        """The newest whole snapshot (nothing, where there is none) and the names of newer ones that are damaged.

        Raises DamagedSnapshot where there are some, and none is whole.
        """
        damaged = []
        for step in reversed(self.steps()):
            if self.read(step):
                return self.file(step).read_bytes(), damaged
            damaged.append(self.file(step).name)
        if damaged:
            next_step = "remove the folder (or say --resume never) to start anew"
            raise DamagedSnapshot(self.folder, f"{damaged} damaged", "a whole one", next_step)
        return b"", []

    def remove(self) -> None:
        """Remove all snapshots, halves that a kill left, and the folder if nothing else lies in it."""
        for file in [*map(self.file, self.steps()), *self.folder.glob("*.safetensors.part")]:
            file.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def pack(state: dict, tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors file with the state in its metadata."""
    text = json.dumps(state, allow_nan=False, sort_keys=True)
    return as_safetensors(tensors, {"format_version": str(FORMAT_VERSION), "state": text})


def unpack(content: bytes, file: Path) -> CONTENT:
    """State and tensors of a snapshot; raises DamagedSnapshot where they do not hash to what was written."""
    try:
        metadata = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]
        tensors, version = safetensors.numpy.load(content), metadata["format_version"]
        whole = version == "1" or sealed(content)  # version 1 hashed something else
        problem = "content that does not hash to what was written"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, safetensors.SafetensorError) as error:
        whole, problem = False, f"{len(content)} bytes ({type(error).__name__}: {error})"
    if not whole:
        next_step = "nothing, where an older snapshot is whole: the run goes on from that one"
        raise DamagedSnapshot(file, problem, "a whole snapshot", next_step)
    if version != str(FORMAT_VERSION):
        next_step = "go on with the version that wrote it, or say --resume never"
        raise SettingsChanged(file, f"format_version {version}", FORMAT_VERSION, next_step)
    return json.loads(metadata["state"]), tensors


def check_same_run(file: Path, theirs: dict[str, dict], mine: dict[str, dict]) -> None:
    """Raise SettingsChanged, naming every difference, unless a snapshot is of this run: section -> name -> value."""
    names = sorted({(section, name) for run in (theirs, mine) for section in run for name in run[section]})
    before, now = ([run.get(section, {}).get(name) for section, name in names] for run in (theirs, mine))
    changed = [i for i in range(len(names)) if before[i] != now[i]]
    if changed:
        found, expected = (", ".join(f"{'.'.join(names[i])} {run[i]!r}" for i in changed) for run in (before, now))
        next_step = f"set them back to go on; to start anew remove {file.parent} (or say --resume never)"
        raise SettingsChanged(file, found, expected, next_step)


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Weights as ``model.{name}``, the optimizer's state as ``optimizer.{number of the parameter}.{name}``."""
    tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    for i, part in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{i}.{name}": value for name, value in part.items()}
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, np.ndarray]) -> None:
    """The reverse of `tensors_of`, into a model and an optimizer of the same settings."""
    parts = {"model": {}, "optimizer": {}}
    for name, array in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = torch.tensor(array)
    state: dict[int, dict] = {}
    for name, tensor in parts["optimizer"].items():
        number, _, key = name.partition(".")
        state.setdefault(int(number), {})[key] = tensor
    model.load_state_dict(parts["model"])
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
