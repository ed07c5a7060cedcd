"""Files and folders that appear whole or not at all."""

import hashlib
import os
import re
import shutil
import uuid
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from safetensors import SafetensorError

ASIDE = ".old-"  # before the name of a folder that has made way for another
ATTEMPTS = 9  # to open a file of a folder that others replace meanwhile, each between two of their steps


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside another, to write to, that takes its place at the end; its folder is made where it is missing.

    After a failure, such as on a full disk, what was there before stays as it was and nothing half-written is left.

    Raises:
        OSError: If it cannot be written; the message says so in one sentence.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with _writing(path):
        temporary.touch()
        mode = temporary.stat().st_mode  # by the umask; some writers make private files
        try:
            yield temporary
            temporary.chmod(mode)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder, which cannot be renamed over one that holds files.

    The earlier one is set aside until the new one is in its place, where `located` finds it.

    Raises:
        OSError: If it cannot be written; the message says so in one sentence.
    """
    temporary = folder.with_name(f".writing-{uuid.uuid4().hex}")
    with _writing(folder):
        try:
            temporary.mkdir()
            yield temporary
            with lock(folder):
                if folder.exists():
                    shutil.rmtree(_aside(folder), ignore_errors=True)  # left by a process that was killed
                    folder.rename(_aside(folder))
                temporary.rename(folder)
                shutil.rmtree(_aside(folder), ignore_errors=True)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def lock(folder: Path) -> FileLock:
    """What keeps other writers from a folder and its neighbours."""
    return FileLock(folder.parent / ".lock")


def located(folder: Path) -> Path:
    """Where a folder lies: aside while another takes its place, and after a writer was killed at that moment."""
    return folder if folder.exists() or not _aside(folder).exists() else _aside(folder)


def opened(folder: Path, name: str) -> BinaryIO:
    """A file of a folder, open to be read; nothing is written for that, not even a lock.

    Raises:
        FileNotFoundError: If there is none.
    """
    for _ in range(ATTEMPTS):
        with suppress(FileNotFoundError):
            return (located(folder) / name).open("rb")
    raise FileNotFoundError(f"there is no {folder / name}")


@contextmanager
def stored(folder: Path, name: str) -> Iterator[BinaryIO]:
    """A file of a run; whatever its content lets its reader raise is a ValueError that names it."""
    with opened(folder, name) as file:
        try:
            yield file
        except Exception as error:  # of json, zipfile, zlib or NumPy, by the place that is damaged
            message = f"{folder / name} is damaged ({reason(error)}); delete its folder and run the chapter again"
            raise ValueError(message) from error


def reason(error: Exception) -> str:
    """The kind of an error and the first sentence of what it says, to stand within another sentence."""
    return f"{type(error).__name__}: " + re.split(r"\. |:?\n", str(error))[0]


def _aside(folder: Path) -> Path:
    return folder.with_name(ASIDE + folder.name)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Make the folder of a path, and say in one sentence what kept the path from being written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} could not be written ({error}); nothing was lost, what was stored before stays as it was: make "
            "room or name another folder, and run again"
        ) from error


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write arrays as numpy.savez_compressed does, but by LZMA, which takes a tenth less; numpy.load reads both."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_LZMA) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, np.asarray(array), allow_pickle=False)


def read_arrays(file: BinaryIO) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of such a file, and its SHA-256; a ValueError, or another error of its readers, where it is none."""
    with np.load(file, allow_pickle=False) as archive:
        arrays = dict(archive)
    if not all(isinstance(array, np.ndarray) for array in arrays.values()):
        raise ValueError("not all that it holds are arrays")
    file.seek(0)
    return arrays, hashlib.file_digest(file, "sha256").hexdigest()
