"""Which device computes, in which precision, and how a record names it.

Pages that only read records import this module, so that torch is imported by the functions.
"""

import ctypes
import sys
import time
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

PRECISIONS = ("float32", "bfloat16")
LEAST_GAIN = 1.2  # of products of matrices; a training has other work as well, and casts


def choose_device(name: str) -> "torch.device":
    """The device to compute on: "auto" is the first of cuda, mps and cpu that is there.

    On a CPU with glibc, the process keeps the memory that it frees from then on.

    Raises:
        ValueError: If the device asked for is not there.
    """
    import torch

    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present.get(name):
        there = [kind for kind in present if present[kind]]
        raise ValueError(f"device={name!r} is not there; this machine has: auto, {', '.join(there)}")
    if name == "cpu" and sys.platform == "linux":
        _keep_memory()
    return torch.device(name)


def describe_device(device: "torch.device") -> str:
    """One line that names the device, such as "cuda: NVIDIA H100" or "cpu: 2 threads, AVX512"."""
    import torch

    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def choose_precision(name: str, device: "torch.device") -> str:
    """The precision to train in: "auto" is bfloat16 on devices that are faster with it, and float32 on others.

    Those are Nvidia's GPUs with units for it, which all have had since Ampere, and CPUs with instructions for it (AMX,
    AVX512_BF16) that prove faster: with AVX512_BF16 some take half, and some twice, the time of float32.

    Raises:
        ValueError: If the name is unknown.
    """
    import torch

    if name == "auto":
        if device.type == "cuda":
            faster = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            capabilities = torch.cpu.get_capabilities() if device.type == "cpu" else {}
            faster = any(map(capabilities.get, ("amx_bf16", "avx512_bf16"))) and _gain() >= LEAST_GAIN
        return "bfloat16" if faster else "float32"
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of auto, {', '.join(PRECISIONS)}; got {name!r}")
    return name


def mixed(precision: str, device: "torch.device") -> "torch.autocast":
    """The context for the forward pass of one step of a training in this precision.

    In "bfloat16", weights stay float32, and convolutions and matrix products are computed in bfloat16 by casts of them,
    which are kept as long as the context lasts. Gradients come out in the type of what they are of.
    """
    import torch

    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")


@cache
def _gain() -> float:
    """How many times as fast this CPU multiplies matrices in bfloat16 as in float32: best of several rounds."""
    import torch

    seconds = dict.fromkeys(PRECISIONS, float("inf"))
    factors = {name: torch.ones(1024, 1024, dtype=getattr(torch, name)) for name in PRECISIONS}
    for _ in range(6):  # by turns, so that other work on the machine meets both; the first warms up
        for name, factor in factors.items():
            started = time.perf_counter()
            factor @ factor
            seconds[name] = min(seconds[name], time.perf_counter() - started)
    return seconds["float32"] / seconds["bfloat16"]


@cache
def _keep_memory() -> None:
    """Let glibc not return large blocks: a training frees and allocates the same ones at every step.

    Of the UCSD VAE, 51 to 53 images a second were trained with it and 42 to 45 without.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another libc has none
    trim_threshold, top_pad, mmap_max = -1, -2, -4  # of malloc.h
    for option, value in ((trim_threshold, 2**31 - 1), (top_pad, 2**28), (mmap_max, 0)):
        if mallopt is not None:
            mallopt(option, value)
