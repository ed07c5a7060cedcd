"""The data card: what is on disk of a data set, in one record that travels with every result."""

import hashlib
import math
import shlex
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

import expvae_book.data
from expvae_book.data import catalogue
from expvae_book.data.catalogue import MVTEC_OFFICIAL, OWN, OWN_NOTE, SOURCES, Source

DATA = ("auto", "real", "sample")
IMAGES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff"}
NAMED = 6  # files or folders that a message names at most
USERS = "user's own"  # the kind of images of which there is no release


@dataclass(frozen=True)
class DataCard:
    """What a result was computed from.

    Attributes:
        name: Data set, as in the catalogue.
        kind: "complete" (the official release), "re-encoded" (every image of it, encoded again), "partial" (less than
            it, or altered), "rendered" (every image of it, drawn anew from its factors), "sample" (embedded,
            generated) or "user's own" (images of which there is no release).
        counts: How much there is, by part: images of a split, masks, clips.
        official: The same counts of the official release; none of a user's own images.
        digest: SHA-256 of the data (hexadecimal).
        licence: Licence.
        credit: One line for figure captions.
        note: Text of the NOTE.txt beside the data, or what there is to say about it.
    """

    name: str
    kind: str
    counts: dict[str, int]
    official: dict[str, int]
    digest: str
    licence: str
    credit: str
    note: str = ""

    @property
    def mark(self) -> str:
        """What tables set beside a number: nothing for complete data, otherwise the kind.

        Partial data are marked "partial, re-encoded" where the note beside them says that they are re-encoded.
        """
        if self.kind == "complete":
            return ""
        return f"{self.kind}, re-encoded" if self.kind == "partial" and "re-encoded" in self.note else self.kind

    @property
    def generated(self) -> bool:
        """Whether the data were made by this book instead of read from files of the data set."""
        return self.kind in ("rendered", "sample")

    @property
    def own(self) -> bool:
        """Whether they are a user's own images."""
        return self.kind == USERS

    @property
    def published(self) -> bool:
        """Whether they are of a data set of which something is in print, against which results may be held."""
        return not self.own and self.kind != "sample"


def survey(source: Source, root: Path) -> DataCard | None:
    """Look at what is there of a data set.

    It is complete where every split has its official count and every file with a published checksum has that checksum;
    see `kind_of`.
    The digest is the one that `sha256sum FILES | sha256sum` prints for the files of all splits, in the order of their
    names, inside the source's folder.

    Args:
        source: Entry of the catalogue.
        root: Data root.

    Returns:
        The card, or None where nothing is there.

    Raises:
        ValueError: If a file is damaged; the message names it.
    """
    folder = root / source.folder
    counted = {split: _count(source, root, split) for split in source.patterns}
    counts = {split: sum(images.values()) for split, images in counted.items()}
    files = {path for images in counted.values() for path in images}
    files |= {folder / name for name in source.checksums if (folder / name).is_file()}
    if not files:
        return None
    hashes = {path.relative_to(folder).as_posix(): sha256(path) for path in files}
    listing = "".join(f"{digest}  {name}\n" for name, digest in sorted(hashes.items()))
    altered = [name for name, digest in source.checksums.items() if hashes.get(name) != digest]
    notes = notes_in(folder)
    if altered and counts == source.official:
        notes.append(f"The counts are official, but these files differ from the release: {', '.join(altered)}.")
    notes += _encoded_again(source, counted) if source.official else [OWN_NOTE]
    note = "\n".join(notes)
    return DataCard(
        name=source.name,
        kind=kind_of(counts, source.official, note, bool(altered)) if source.official else USERS,
        counts=counts,
        official=dict(source.official),
        digest=hashlib.sha256(listing.encode()).hexdigest(),
        licence=source.licence,
        credit=source.credit,
        note=note,
    )


def kind_of(counts: dict[str, int], official: dict[str, int], note: str, altered: bool) -> str:
    """The kind of data that were read from files: "complete", "re-encoded" or "partial".

    Data that are re-encoded, as their note then says, are never complete; they have all images of the release, and at
    least as many masks, or are partial.

    Args:
        counts: How much there is, by part.
        official: The same counts of the official release.
        note: The note of the card.
        altered: Whether files are known to differ from the release.
    """
    if "re-encoded" not in note:
        return "complete" if counts == official and not altered else "partial"
    more = [counts[part] - number for part, number in official.items() if "mask" in part]
    images = all(counts[part] == number for part, number in official.items() if "mask" not in part)
    return "re-encoded" if images and min(more, default=0) >= 0 else "partial"


def notes_in(folder: Path) -> list[str]:
    """The text of a NOTE.txt in a folder, if there is one."""
    file = folder / "NOTE.txt"
    try:
        return [file.read_text(encoding="utf-8").strip()] if file.is_file() else []
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is no text in UTF-8 ({error})") from error


def takes_sample(
    data: str, source: Source, root: Path, folder: Path, present: bool, missing: str, stand_in: str, remedy: str = ""
) -> bool:
    """Whether a sample is taken instead of a data set; that it stands in for one is said on the error stream.

    Args:
        data: "real" (the files), "sample" (the sample) or "auto" (the files where there are any).
        source: Entry of the catalogue.
        root: Data root.
        folder: Where the files are looked for.
        present: Whether there are any, which "auto" then reads.
        missing: What the folder lacks, as the rest of a sentence about it; empty where it lacks nothing.
        stand_in: What is taken instead, for the same purpose.
        remedy: What else helps than to fetch the data set, or what helps where there is nothing to fetch.

    Raises:
        ValueError: If `data` is none of these.
        FileNotFoundError: If files are to be read and some are missing.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}; got {data!r}")
    name = source.name.replace("/", " --categories ")
    command = f"`python -m expvae_book.data fetch {name} --root {shlex.quote(str(root))}` fetches {source.title}"
    command = command if source.downloads else ""
    if data == "auto" and not present:
        # To the error stream: notebooks show it on a coloured ground, between code and results.
        print(
            f"{source.title} is not in {folder}{there(folder, root)}: {stand_in} instead, and marking every result. "
            f"{command}.",
            file=sys.stderr,
        )
    elif data != "sample" and missing:
        raise FileNotFoundError(f"{folder} {missing}{there(folder, root)}; {remedy}{command}")
    return data == "sample" or (data == "auto" and not present)


def idx_shape(path: Path) -> tuple[int, ...]:
    """Shape of the array of bytes in an idx file (the format of MNIST), checked against the length of the file.

    Raises:
        ValueError: If the file is truncated or is no such file.
    """
    with path.open("rb") as file:
        header = file.read(16)
    # The third byte is the type (8 is unsigned bytes), the fourth the number of dimensions.
    dims = header[3] if len(header) > 3 and header.startswith(b"\0\0\x08") else 0
    shape = tuple(int.from_bytes(header[4 * i : 4 * i + 4], "big") for i in range(1, dims + 1))
    size = path.stat().st_size
    if dims == 0 or size != 4 + 4 * dims + math.prod(shape):
        raise ValueError(
            f"{path} is truncated or damaged (its {size} bytes do not fit its header); "
            "`python -m expvae_book.data fetch mnist` replaces it"
        )
    return shape


@contextmanager
def npz_images(path: Path) -> Iterator[tuple[BinaryIO, tuple[int, ...], bool, np.dtype]]:
    """The array `imgs` of an npz file, open behind its header; its shape, whether in Fortran order, and its type.

    All of dSprites would take three gigabytes, and `metadata` beside it is a pickle, so that neither is loaded.

    Raises:
        ValueError: If the file is damaged, or whoever reads it says so; the message names it.
    """
    try:
        with zipfile.ZipFile(path) as archive, archive.open("imgs.npy") as member:
            np.lib.format.read_magic(member)
            yield member, *np.lib.format.read_array_header_1_0(member)
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, NotImplementedError, ValueError) as error:
        raise ValueError(
            f"{path} is truncated or damaged ({error}); `python -m expvae_book.data fetch dsprites` replaces it"
        ) from error


def sha256(path: Path) -> str:
    """SHA-256 of a file (hexadecimal)."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def there(folder: Path, root: Path) -> str:
    """What stands where something else was looked for, to be set into a sentence; empty where nothing does.

    Args:
        folder: Where it was looked for; where there is no such folder, the next one above it is told.
        root: The last folder above it to be told.
    """
    while not folder.is_dir() and folder != root:
        folder = folder.parent
    names = sorted(f"{path.name}/" if path.is_dir() else path.name for path in folder.glob("[!.]*"))
    return f" ({folder} holds {listed(names)})" if names else ""


def listed(names: list[str]) -> str:
    """The first of these names, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def is_image(path: Path) -> bool:
    """Whether a file is an image by its name; copies made on other systems hold AppleDouble files (._000.png)."""
    return path.suffix.lower() in IMAGES and not path.name.startswith(".") and path.is_file()


def available(root: Path | None = None) -> list[str]:
    """The categories of MVTec AD of which there are training images, in alphabetical order.

    Args:
        root: Data root; by default `expvae_book.data.root()`.
    """
    folder = _categories(root)
    return [name for name in MVTEC_OFFICIAL if any(map(is_image, (folder / name / "train/good").glob("*")))]


def added(root: Path | None = None) -> list[str]:
    """The other folders beside those of the categories of MVTec AD, in alphabetical order: a user's own images."""
    folders = (path.name for path in _categories(root).glob("[!.]*") if path.is_dir())
    return sorted(name for name in folders if name not in MVTEC_OFFICIAL)


def is_category(name: str, root: Path | None = None) -> bool:
    """Whether a name is that of a category of MVTec AD, or of a folder of a user's own that can be one."""
    return name in MVTEC_OFFICIAL or (OWN.fullmatch(name) is not None and name in added(root))


def categories(root: Path | None = None) -> str:
    """The names that `is_category` takes, as a part of a sentence."""
    names = ", ".join(added(root)) or "none"
    return (
        f"{', '.join(MVTEC_OFFICIAL)}, or a folder of your own in {_categories(root)}, named by letters, digits and "
        f". _ + - alone (there: {names})"
    )


def generated(data: str) -> bool:
    """Whether drawn workpieces stand in for those of MVTec AD: with "auto" where nothing of it is."""
    return data == "sample" or (data == "auto" and not available())


def at_hand(category: str, data: str) -> bool:
    """Whether a category can be computed; a user's own always, and to load it says what it lacks."""
    return category not in MVTEC_OFFICIAL or generated(data) or category in available()


def _categories(root: Path | None) -> Path:
    return Path(root or expvae_book.data.root()) / SOURCES["mvtec"].folder


def _encoded_again(source: Source, counted: dict[str, dict[Path, int]]) -> list[str]:
    """A remark on images and one on masks that have another format than those of the release."""
    remarks = []
    for what, splits in (("images", ("train", "test")), ("masks", ("masks",))) if source.suffix else ():
        others = {path.suffix.lower() for split in splits for path in counted[split]} - {source.suffix}
        if others:
            remarks.append(
                f"The {what} are re-encoded: the release holds {source.suffix[1:].upper()} files, "
                f"these are {', '.join(sorted(others))}."
            )
    return remarks


def _count(source: Source, root: Path, split: str) -> dict[Path, int]:
    """The files of a split, each with the number of images in it; files without images are left out."""
    numbers = {path: _images_in(path) for path in catalogue.files(source, root, split)}
    return {path: number for path, number in numbers.items() if number}


def _images_in(path: Path) -> int:
    if path.name.endswith("-ubyte"):
        return idx_shape(path)[0]
    if path.suffix == ".npz":
        with npz_images(path) as (_, shape, *_):
            return shape[0]
    return int(is_image(path))
