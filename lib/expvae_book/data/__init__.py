"""Data sets: where they lie, what is there of them, and their loaders.

One module per data set; the package `generated` draws what stands in for them where they are absent.
"""

from pathlib import Path

from expvae_book import places


def root() -> Path:
    """The folder that holds the data sets in their official layouts: EXPVAE_DATA, or `data/` in the repository.

    See `expvae_book.places.setting` for what the variable may hold.

    Raises:
        expvae_book.places.SettingError: If it names a file.
    """
    return places.folder(places.setting("EXPVAE_DATA", "data"), "EXPVAE_DATA")
