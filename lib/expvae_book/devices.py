"""Which device computes, in which precision, and how a record names it."""

import torch

PRECISIONS = ("float32", "bfloat16")


def choose_device(name: str) -> torch.device:
    """The device to compute on: "auto" is the first of cuda, mps and cpu that is there.

    Raises:
        ValueError: If the device asked for is not there.
    """
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    if not present.get(name):
        there = [kind for kind in present if present[kind]]
        raise ValueError(f"device={name!r} is not there; this machine has: auto, {', '.join(there)}")
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """One line that names the device, such as "cuda: NVIDIA H100" or "cpu: 2 threads, AVX512"."""
    if device.type == "cuda":
        return f"cuda: {torch.cuda.get_device_name(device)}"
    if device.type == "cpu":
        return f"cpu: {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    return device.type


def choose_precision(name: str, device: torch.device) -> str:
    """The precision to train in: "auto" is bfloat16 on devices that have units for it, and float32 on others.

    Units for products of bfloat16 matrices are the tensor cores of Nvidia's GPUs since Ampere, and AMX in some CPUs.

    Raises:
        ValueError: If the name is unknown.
    """
    if name == "auto":
        if device.type == "cuda":
            has_units = torch.cuda.is_bf16_supported(including_emulation=False)
        else:
            has_units = device.type == "cpu" and bool(torch.cpu.get_capabilities().get("amx_bf16"))
        return "bfloat16" if has_units else "float32"
    if name not in PRECISIONS:
        raise ValueError(f"precision must be one of auto, {', '.join(PRECISIONS)}; got {name!r}")
    return name


def mixed(precision: str, device: torch.device) -> torch.autocast:
    """The context for the forward pass of one step of a training in this precision.

    In "bfloat16", weights stay float32, and convolutions and matrix products are computed in bfloat16 by casts of them,
    which are kept as long as the context lasts. Gradients come out in the type of what they are of.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16")
