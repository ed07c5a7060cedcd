"""Where a result came from: the commit and the versions that made it."""

import platform
import subprocess

from expvae_book.places import REPOSITORY

CODE = ("lib", "benchmarks", "book")


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
    import torch  # not by those who only read what is stored

    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    return done.stdout.strip()
