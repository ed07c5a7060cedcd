"""Where the repository lies that this package belongs to."""

from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


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
