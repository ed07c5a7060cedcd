"""Where a result came from: the commit and the versions that made it."""

import os
import platform
import subprocess

from expvae_book.places import REPOSITORY

CODE = ("lib", "benchmarks", "book")


def commit() -> dict[str, str | bool | None]:
    """The git commit of the repository and whether files of the library, chapters or benchmarks differ from it.

    Both are None where the repository is not a git checkout itself, as is a copy unpacked inside another one.
    """
    try:
        if _git("rev-parse", "--show-prefix"):  # where it lies in the checkout
            return {"commit": None, "dirty": None}
        head = _git("rev-parse", "HEAD")
        changed = _git("status", "--porcelain", "--", *CODE)
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}
    return {"commit": head, "dirty": bool(changed)}


def versions() -> dict[str, str]:
    """Versions of Python and PyTorch and the kind of machine."""
    import torch  # not by those who only read what is stored

    return {"python": platform.python_version(), "torch": torch.__version__, "machine": platform.machine()}


def _git(*arguments: str) -> str:
    # GIT_DIR and its kind, as a hook or an alias of git sets them, are of another repository.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()
