"""Where the repository lies that this package belongs to, and the folders that settings name."""

import os
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


class SettingError(ValueError):
    """A setting names a folder that cannot be one; the message is one sentence for the user."""


def repository() -> Path:
    """The checkout around this package, with its chapters, published numbers and stored runs.

    Raises:
        FileNotFoundError: If there is none, as where the package was installed from a wheel.
    """
    if not (REPOSITORY / "book" / "reported").is_dir():
        raise FileNotFoundError(
            f"expvae_book needs the repository that it belongs to, with book/ and runs/, and {REPOSITORY} holds none: "
            "clone it and type `pip install --editable '.[book]'` in it, which installs the package from there"
        )
    return REPOSITORY


def setting(variable: str, default: str) -> Path:
    """The path that an environment variable names; where it is unset or empty, the default.

    A `~` is a home. A relative name is taken from the repository and never from the working directory, because
    papermill and Jupyter Book run the same chapter in different folders.

    Args:
        variable: Name of the environment variable.
        default: What it is without the variable. Where that lies in a home and the process has none, it is a path where
            nothing can be.

    Raises:
        SettingError: If the variable names a home that is not known here.
    """
    value = os.environ.get(variable)
    at_home = os.path.expanduser(default).replace("~", os.devnull)  # noqa: PTH111 - pathlib's raises without a home
    path = expanded(value, variable) if value else Path(at_home)
    return path if path.is_absolute() else repository() / path


def expanded(value: str, source: str) -> Path:
    """A path with its `~` replaced by the home that it stands for.

    Args:
        value: The path as it was typed.
        source: Where it was typed, such as the name of a variable, for the message.

    Raises:
        SettingError: If there is no such home.
    """
    try:
        return Path(value).expanduser()
    except RuntimeError:
        home = Path(value).parts[0]
        raise SettingError(f"{source} is {value!r}, and the home {home} is not known here: name the folder") from None


def folder(path: Path, source: str) -> Path:
    """The path, which is a folder or can become one.

    Args:
        path: Where a folder is looked for.
        source: What names it, such as a variable, for the message.

    Raises:
        SettingError: If a file lies there, or in place of a folder above it.
    """
    lowest = next(part for part in (path, *path.parents) if part.exists())
    if not lowest.is_dir():
        raise SettingError(f"{source} must name a folder, and {lowest} is a file")
    return path
