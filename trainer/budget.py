"""What a step costs: memory and arithmetic of one window, found by running one; what the machine has."""

from __future__ import annotations

import dataclasses
import os
import re
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
COPIES = 4  # of every weight: itself, its gradient, two running means
SLACK = 1.4  # times what the backward pass keeps: what comes and goes meanwhile (measured: 1.2 to 1.5)


def _attention(query: tuple, key: tuple, *_: object, **__: object) -> int:
    """FLOPs of softmax(Q K') V, from shapes [B, heads, S, size]."""
    return 4 * query[0] * query[1] * query[2] * key[2] * query[3]


def _attention_backward(_: tuple, query: tuple, key: tuple, *__: object, **___: object) -> int:
    return 2 * _attention(query, key)


# Every fused kernel alike, and none's recomputing: torch's own counter leaves out the CPU's, and counts that on GPUs.
KERNELS = {
    getattr(torch.ops.aten, f"_scaled_dot_product_{kernel}{way}"): count
    for kernel in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
    for way, count in (("", _attention), ("_backward", _attention_backward))
}


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
    """Measure one step of a batch of one window, outside a compiled graph; leaves no gradients."""
    weights = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in objective.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with FlopCounterMode(display=False, custom_mapping=KERNELS) as counter:
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            loss = objective(batch)[0]
        loss.backward()
    objective.zero_grad()
    per_window = sum(nbytes for pointer, nbytes in kept.items() if pointer not in weights)
    return Cost(per_window, COPIES * sum(weights.values()), counter.get_total_flops())


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """FLOP/s that this GPU could do at best in this dtype, where it is known."""
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)


def available_bytes(device: torch.device) -> int | None:
    """Memory that a run may still take: of the GPU, or the least that machine and control groups allow; None: not known.

    What files take of a group is given back when it is needed.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found, memory, groups = [], Path("/proc/meminfo"), Path("/proc/self/cgroup")
    if memory.is_file():
        found.append(int(memory.read_text().partition("MemAvailable:")[2].split()[0]) * 1024)
    for line in groups.read_text().splitlines() if groups.is_file() else []:
        _, controllers, path = line.split(":", 2)
        second = controllers == ""  # version of the groups
        if second or "memory" in controllers.split(","):
            place = Path("/sys/fs/cgroup" if second else "/sys/fs/cgroup/memory", path.lstrip("/"))
            for folder in (place, *place.parents):  # a job's, and those around it
                limit, stat = folder / ("memory.max" if second else "memory.limit_in_bytes"), folder / "memory.stat"
                if limit.is_file() and stat.is_file() and (text := limit.read_text().strip()) != "max":
                    taken = dict(line.split() for line in stat.read_text().splitlines())
                    found.append(int(text) - int(taken["anon" if second else "total_rss"]))
    return min(found, default=None)


def too_little(cost: Cost, batch_size: int, accumulate: int, available: int, device: torch.device) -> TooLittleMemory:
    """The error that says which batch would fit, of ``batch_size`` windows at a time in ``accumulate`` parts of a step."""
    fits = min(cost.fitting(available), batch_size - 1)  # the estimate may say that all do, when they don't
    next_step = "a smaller model (--width, --depth), a smaller window or fewer genes, or another machine"
    if fits:
        parts = -(-batch_size // fits)
        next_step = f"--accumulate {accumulate * parts} gives the same model in smaller parts"
        next_step += f", or take a --batch-size {parts} times smaller"
    found = f"{batch_size} windows at a time, which take about {cost.bytes(batch_size) / 1e9:.3g} GB"
    expected = f"at most {fits}, for the {max(0, available) / 1e9:.3g} GB there are"
    return TooLittleMemory(device, found, expected, next_step)


def peak_memory_mb(device: torch.device) -> float:
    """The most memory this process has had: of the GPU where it computes on one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")  # ru_maxrss would count what the process was before it became this program
    if status.is_file() and (peak := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(peak[1]) / 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if os.uname().sysname == "Darwin" else 2**10)
