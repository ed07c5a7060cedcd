"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside another, to write to, that takes its place at the end; its folder is made where it is missing.

    After a failure, such as on a full disk, what was there before stays as it was and nothing half-written is left.

    Raises:
        OSError: If it cannot be written; the message says so in one sentence.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; some writers make private files
        try:
            yield temporary
            temporary.chmod(mode)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: Exception) -> OSError:
    """What to raise where something that appears whole or not at all could not be written."""
    return OSError(
        f"{path} could not be written ({error}); nothing was lost, what was stored before stays as it was: make room "
        "or name another folder, and run again"
    )
