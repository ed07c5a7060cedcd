"""Where a result came from: the code, the commit, the device and the versions that made it."""

import hashlib
import platform
import subprocess
from pathlib import Path

import torch

REPOSITORY = Path(__file__).resolve().parents[2]
CODE = ("lib", "benchmarks", "book")
PRECISIONS = ("float32", "bfloat16")


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the shape, type and content of a tensor."""
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(content.shape)} {content.dtype}".encode())
    digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def commit() -> dict[str, str | bool | None]:
    """The git commit of the repository and whether files of the library, chapters or benchmarks differ from it.

    Outside a git checkout both are None.
    """
    try:
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", *CODE)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(changed)}


def versions() -> dict[str, str]:
    """Versions of Python and PyTorch and the kind of machine."""
    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


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


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()
