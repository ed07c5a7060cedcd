"""Data sets: where they lie, what is there of them, and their loaders.

One module per data set; `walkway` draws the frames that stand in for UCSD Ped1 where it is absent, `workpieces` the
images that stand in for MVTec AD.
"""

import os
from pathlib import Path

from expvae_book.places import repository


def root() -> Path:
    """The folder that holds the data sets in their official layouts.

    The environment variable EXPVAE_DATA names it; without it, it is `data/` in the repository. A relative name is
    taken from the repository and never from the working directory, because papermill and Jupyter Book run the same
    chapter in different folders.
    """
    named = Path(os.environ.get("EXPVAE_DATA") or "data").expanduser()
    return named if named.is_absolute() else repository() / named
