"""What this machine is: device, dtype, threads, peak FLOP/s.

Owns the choice of device, made once and said in one line.   device = detect(use_cpu=False, bf16=None)
Leaves out how many processes run: that is Accelerate's.
"""

import dataclasses
import os
import platform
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .config import UserError

if TYPE_CHECKING:
    import torch

# dense bf16 peak in FLOP/s, from the vendors' data sheets (without sparsity); the first matching name counts
PEAK_BF16 = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A10G": 70e12,
    "A40": 150e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "RTX 4090": 165e12,
    "RTX 3090": 71e12,
    "T4": 65e12,
}


THREAD_FLOPS = 2e9  # of a batch, forward and backward: 20 to 40 ms of one core


@dataclass(frozen=True)
class Device:
    """One accelerator or the CPU; `peak_flops` is for the dtype in use: bf16 on a GPU, float32 on a CPU."""

    type: str  # cuda, mps or cpu
    name: str
    bf16: bool
    num_threads: int
    peak_flops: float | None  # None: not known for this device in this dtype, MFU is then left out

    def __str__(self) -> str:
        peak = f", {self.peak_flops / 1e12:.3g} TFLOP/s peak" if self.peak_flops else ""
        threads = f", {self.num_threads} thread{'s' * (self.num_threads > 1)}" if self.type == "cpu" else ""
        return f"{self.type} ({self.name}){threads}, {'bfloat16' if self.bf16 else 'float32'}{peak}"


def _cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def measured_cpu_flops(size: int = 768) -> float:
    """float32 FLOP/s of a square matrix product, the best of a few: what this CPU can do at most right now."""
    import torch

    a = b = torch.ones(size, size)  # no random numbers: the run's own begin where its seed says
    best = float("inf")
    for _ in range(16):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_bf16(name: str) -> float | None:
    """FLOP/s of a GPU by its name, as whole words: an RTX A4000 is no A40. None for a card that is not listed."""
    return next((flops for key, flops in PEAK_BF16.items() if re.search(rf"\b{re.escape(key)}\b", name)), None)


def use_threads(device: Device, flops_per_pass: float) -> Device:
    """As many threads as a pass over one batch keeps busy, on a CPU; a count in OMP_NUM_THREADS is left alone.

    One per THREAD_FLOPS: threads that wait for each other spin. On two free cores the second one makes a step of 4e9
    FLOPs 1.6 times as fast, on two busy ones 2 to 20 times as slow (recipes/LOG.md).
    """
    import torch

    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return device
    count = max(1, min(torch.get_num_threads(), round(flops_per_pass / THREAD_FLOPS)))
    if count == device.num_threads:
        return device
    torch.set_num_threads(count)
    return dataclasses.replace(device, num_threads=count, peak_flops=device.peak_flops and measured_cpu_flops())


def keep_freed_memory() -> None:
    """Lets glibc keep what is freed, for the next step: it raises its thresholds once a large block was freed.

    Else every step gives its activations back to the system and faults them in again, about 1,000 pages a step at
    128 wide, 2 to 4 ms of 50. Other C libraries are not affected.
    """
    import torch

    torch.empty(31 << 20, dtype=torch.uint8)  # just below the 32 MB up to which glibc learns


def detect(use_cpu: bool = False, bf16: bool | None = None) -> Device:
    """The device to train on. Raises UserError when bf16 is asked for and the device has none in hardware."""
    import torch

    if not use_cpu and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        has_bf16 = torch.cuda.get_device_capability()[0] >= 8
        uses_bf16 = has_bf16 if bf16 is None else bf16
        device = Device("cuda", name, uses_bf16, torch.get_num_threads(), peak_bf16(name) if uses_bf16 else None)
    elif not use_cpu and torch.backends.mps.is_available():
        has_bf16, device = True, Device("mps", platform.processor(), bool(bf16), torch.get_num_threads(), None)
    else:  # autocast to bf16 helps only where the CPU multiplies in it
        has_bf16 = bool(torch.backends.cpu.get_cpu_capability() and cpu_has_bf16())
        keep_freed_memory()
        peak = None if bf16 else measured_cpu_flops()
        device = Device("cpu", _cpu_name(), bool(bf16), torch.get_num_threads(), peak)
    if bf16 and not has_bf16:
        raise UserError(f"bf16=true: {device.type} ({device.name}) has no bfloat16 arithmetic; set bf16: false or null")
    return device


def cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            flags = next((line for line in file if line.startswith(("flags", "Features"))), "")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16"))


def peak_memory_bytes(device: "torch.device") -> int:
    """Most memory in use so far: allocated on the GPU, or resident in this process on the CPU."""
    import torch

    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource
    import sys

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def cpu_seconds() -> float:
    """CPU time of this process and its ended children, in seconds."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
