"""Which data sets have files below the data root: `python -m expvae_book.data.at_hand`, for the Makefile.

It imports nothing that has to be installed, and opens no file.
"""

import sys
from pathlib import Path

from expvae_book import data, places
from expvae_book.data.catalogue import SOURCES


def at_hand(root: Path) -> list[str]:
    """Names of the data sets of which there is a file below the root."""
    return [
        name
        for name, source in SOURCES.items()
        if any(path.is_file() for pattern in source.patterns.values() for path in (root / source.folder).glob(pattern))
    ]


if __name__ == "__main__":
    try:
        print(*at_hand(data.root()))
    except places.SettingError as error:
        sys.exit(f"{error}.")
