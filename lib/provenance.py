"""Where a result came from: the code, the commit, the device and the versions that made it."""

import ast
import hashlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import jupytext
import torch

REPOSITORY = Path(__file__).resolve().parents[1]
PACKAGES = ("lib", "benchmarks")
PRECISIONS = ("float32", "bfloat16")
RUN_CELLS = (
    "chapters.run(",
    "chapters.run_each(",
    "chapters.run_all(",
)  # what the cell of a chapter says that makes its runs


def code_hashes(names: Iterable[str]) -> dict[str, str | None]:
    """Digest of the code of each module or chapter; None for one that does not exist or computes nothing.

    Args:
        names: Dotted names of modules, such as "lib.training", or paths of chapters, such as "book/mnist.md". Of a
            chapter, the code cells up to the one that calls chapters.run, run_each or run_all count: what follows only
            shows results, and a page that never calls either shows only results of others.
    """
    return {name: source_hash(source) if (source := _source(name)) is not None else None for name in sorted(names)}


@cache
def source_hash(source: str) -> str:
    """SHA-256 of the syntax tree of Python source, without comments, docstrings and layout.

    The digest is the same under every version of Python that this project supports; that of `ast.dump` is not.
    """
    return hashlib.sha256(_canonical(ast.parse(source)).encode()).hexdigest()


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
        changed = _git("status", "--porcelain", "--", *PACKAGES, "book")
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


def _canonical(node: object) -> str:
    if isinstance(node, list):
        return f"[{','.join(map(_canonical, node))}]"
    if not isinstance(node, ast.AST):
        return repr(node)
    fields = dict(ast.iter_fields(node))
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
        fields["body"] = node.body[1:]
    # Newer versions of Python add fields that are empty in code that older ones can read.
    parts = [f"{name}={_canonical(value)}" for name, value in fields.items() if value is not None and value != []]
    return f"{type(node).__name__}({','.join(parts)})"


def _source(name: str) -> str | None:
    path = REPOSITORY / (name if name.endswith(".md") else f"{name.replace('.', '/')}.py")
    if not path.exists():
        path = path.with_suffix("") / "__init__.py"
    if not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    return text if path.suffix == ".py" else _chapter_source(text)


@cache
def _chapter_source(text: str) -> str | None:
    sources = []
    for cell in jupytext.reads(text, fmt="md:myst").cells:
        if cell.cell_type == "code" and "parameters" not in cell.metadata.get("tags", []):
            sources.append(cell.source)
            if any(call in cell.source for call in RUN_CELLS):
                return "\n".join(sources)
    return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def library_modules() -> list[str]:
    """Names of the modules of this library and of its benchmarks that are loaded, but for the one run as a script."""
    return sorted(name for name in sys.modules if name.partition(".")[0] in PACKAGES)
