"""Snapshots of a run: one safetensors file each, from which it goes on as if it had never stopped.

``snapshots/{step:08d}.safetensors`` holds the weights, the optimizer's state, the lines of ``metrics.jsonl`` so far (as bytes)
and, as JSON in its metadata, the state: step, samples consumed, what the run is (settings and shards), what befell it. The
schedule is a function of the step and nothing else draws random numbers, so there is no more to keep. A hash of all this
stands in the metadata too. The file appears whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch
from torch import Tensor, nn

from trainer.errors import DamagedSnapshot, SettingsChanged
from trainer.files import as_safetensors, write_whole

FORMAT_VERSION = 1


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

    def latest(self) -> tuple[bytes, list[str]]:
        """The newest whole snapshot (nothing, where there is none) and the names of newer ones that are damaged.

        Raises
        ------
        DamagedSnapshot
            There are snapshots, and none is whole.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                content = self.file(step).read_bytes()
                unpack(content, self.file(step))
            except DamagedSnapshot as error:
                print(f"warning: {error}", file=sys.stderr, flush=True)
                damaged.append(self.file(step).name)
                continue
            return content, damaged
        if damaged:
            next_step = "remove the folder (or say --resume never) to start anew"
            raise DamagedSnapshot(self.folder, found=f"{damaged} damaged", expected="a whole one", next_step=next_step)
        return b"", []

    def remove(self) -> None:
        """Remove all snapshots, and the folder if nothing else lies in it."""
        for step in self.steps():
            self.file(step).unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()


def pack(state: dict, tensors: dict[str, np.ndarray]) -> bytes:
    """A safetensors file with the state, and a hash of both, in its metadata."""
    text = json.dumps(state, allow_nan=False, sort_keys=True)
    return as_safetensors(
        tensors, {"format_version": str(FORMAT_VERSION), "state": text, "sha256": _hash(text, tensors)}
    )


def unpack(content: bytes, file: Path) -> tuple[dict, dict[str, np.ndarray]]:
    """State and tensors of a snapshot; raises DamagedSnapshot where they do not hash to what was written."""
    try:
        end = 8 + int.from_bytes(content[:8], "little")
        metadata = json.loads(content[8:end])["__metadata__"]
        tensors = safetensors.numpy.load(content)
        whole = metadata["sha256"] == _hash(metadata["state"], tensors)
        problem = "content that does not hash to what was written"
    except (ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
        whole, problem = False, f"{len(content)} bytes ({type(error).__name__}: {error})"
    if not whole:
        next_step = "nothing, where an older snapshot is whole: the run goes on from that one"
        raise DamagedSnapshot(file, found=problem, expected="a whole snapshot", next_step=next_step)
    if metadata["format_version"] != str(FORMAT_VERSION):
        found = f"format_version {metadata['format_version']}"
        next_step = "go on with the version that wrote it, or say --resume never"
        raise SettingsChanged(file, found=found, expected=str(FORMAT_VERSION), next_step=next_step)
    return json.loads(metadata["state"]), tensors


def check_same_run(file: Path, theirs: dict[str, dict], mine: dict[str, dict]) -> None:
    """Raise SettingsChanged, naming every difference, unless a snapshot is of this run: section -> name -> value."""
    names = sorted({(section, name) for run in (theirs, mine) for section in run for name in run[section]})
    changed = [
        (f"{section}.{name}", *(run.get(section, {}).get(name) for run in (theirs, mine)))
        for section, name in names
        if theirs.get(section, {}).get(name) != mine.get(section, {}).get(name)
    ]
    if changed:
        found = ", ".join(f"{name} {before!r}" for name, before, _ in changed)
        expected = ", ".join(f"{name} {now!r}" for name, _, now in changed)
        next_step = f"set them back to go on; to start anew remove {file.parent} (or say --resume never)"
        raise SettingsChanged(file, found=found, expected=expected, next_step=next_step)


def tensors_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, np.ndarray]:
    """Weights as ``model.{name}``, the optimizer's state as ``optimizer.{number of the parameter}.{name}``."""
    state = optimizer.state_dict()["state"]
    tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    tensors |= {f"optimizer.{i}.{name}": value for i, part in state.items() for name, value in part.items()}
    return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}


def restore(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, np.ndarray]) -> None:
    """The reverse of `tensors_of`, into a model and an optimizer of the same settings."""
    weights: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    for name, array in tensors.items():
        part, _, rest = name.partition(".")
        if part == "model":
            weights[rest] = torch.from_numpy(array)
        elif part == "optimizer":
            number, _, key = rest.partition(".")
            state.setdefault(int(number), {})[key] = torch.from_numpy(array)
    model.load_state_dict(weights)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def _hash(text: str, tensors: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {tensors[name].shape}".encode())
        digest.update(np.ascontiguousarray(tensors[name]))
    return digest.hexdigest()
