"""What a step costs: memory and arithmetic of one window, found by running one; what the machine has."""

from __future__ import annotations

import dataclasses
import os
import resource
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from trainer.data import Batch
from trainer.errors import TooLittleMemory

# Dense bfloat16 FLOP/s of GPUs by a part of their name, as their makers state them; of others no MFU is told.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L40": 181e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "L4": 121e12, "A10": 125e12,
}  # fmt: skip
CGROUPS = (  # controller ("" of version 2), where it is mounted, its limit, what counts against that
    ("", "/sys/fs/cgroup", "memory.max", "anon"),
    ("memory", "/sys/fs/cgroup/memory", "memory.limit_in_bytes", "total_rss"),
)
COPIES = 4  # of every weight: itself, its gradient, two running means
SLACK = 1.4  # times what the backward pass keeps: what comes and goes meanwhile (measured: 1.2 to 1.5)


@dataclasses.dataclass(frozen=True)
class Cost:
    kept: int  # bytes that a window's forward pass keeps for the backward pass
    fixed: int  # bytes of weights, gradients and optimizer
    flops: int  # of matrix products, forward and backward, for one window

    def bytes(self, batch_size: int) -> int:
        """Memory of a step with so many windows at a time."""
        return self.fixed + int(SLACK * self.kept * batch_size)

    def fitting(self, available: int) -> int:
        """The windows at a time that so many bytes allow."""
        return max(0, int((available - self.fixed) / (SLACK * self.kept)))


def cost(objective: torch.nn.Module, batch: Batch) -> Cost:
    """Measure one step of a batch of one window, outside a compiled graph; leaves the gradients at zero."""
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in objective.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = objective(batch)[0]
        loss.backward()
    per_window = sum(nbytes for pointer, nbytes in kept.items() if pointer not in weights)
    return Cost(per_window, COPIES * sum(weights.values()), counter.get_total_flops())


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOP/s that this GPU could do at best in this dtype, where it is known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def available_bytes(device: torch.device) -> int | None:
    """Memory that a run may still take; None where the machine does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    memory = Path("/proc/meminfo")
    if memory.is_file():
        lines = dict(line.split(":") for line in memory.read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    groups = Path("/proc/self/cgroup")  # a job's limit, and those of the groups around it
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        for version, root, limit, taken in CGROUPS:
            if version in controllers.split(","):
                place = Path(root, path.lstrip("/"))
                found += [_left(folder / limit, folder / "memory.stat", taken) for folder in (place, *place.parents)]
    found = [nbytes for nbytes in found if nbytes is not None]
    return min(found, default=None)


def _left(limit: Path, stat: Path, taken: str) -> int | None:
    """What a control group may still take; what files take of it is given back when it is needed."""
    if not (limit.is_file() and stat.is_file()) or (text := limit.read_text().strip()) == "max":
        return None
    return int(text) - int(dict(line.split() for line in stat.read_text().splitlines())[taken])


def too_little(cost: Cost, batch_size: int, available: int, device: torch.device) -> TooLittleMemory:
    """The error that says which batch would fit, ``batch_size`` being the windows that this process takes at a time."""
    fits = cost.fitting(available)
    parts = -(-batch_size // fits) if fits else 0
    next_step = (
        f"--accumulate {parts} gives the same model in {parts} parts a step, or take a --batch-size {parts} times smaller"
        if fits
        else "a smaller model (--width, --depth), a smaller window or fewer genes, or another machine"
    )
    found = f"{batch_size} windows at a time, which take about {cost.bytes(batch_size) / 1e9:.3g} GB"
    expected = f"at most {fits}, for the {max(0, available) / 1e9:.3g} GB there are"
    return TooLittleMemory(device, found=found, expected=expected, next_step=next_step)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process has had: of the GPU where it computes on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if os.uname().sysname == "Darwin" else 2**10)
