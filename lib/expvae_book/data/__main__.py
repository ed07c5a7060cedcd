"""Fetch data sets and say what is there: `python -m expvae_book.data fetch mnist`, `python -m expvae_book.data status`.

`python -m expvae_book.data fetch mvtec --categories bottle,pill` unpacks some of the categories of MVTec AD.
"""

import argparse
import gzip
import lzma
import re
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

import pooch
import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

import expvae_book.data
from expvae_book import places
from expvae_book.data.card import DataCard, added, available, is_category, sha256, survey
from expvae_book.data.catalogue import IMAGENET_FILE, MVTEC_OFFICIAL, SOURCES, Download, Source, source

REASONS = (
    (requests.exceptions.ChunkedEncodingError, "the connection was cut"),
    (requests.Timeout, "the server did not answer in time"),
    (requests.ConnectionError, "no connection"),
)


class FetchError(Exception):
    """A data set could not be fetched; the message is one sentence for the user."""


def fetch(name: str, categories: list[str] | None, root: Path) -> None:
    """Download what is missing of a data set, check it, unpack it and move it into place.

    Everything happens in a temporary folder on the disk where the data are to lie, and is renamed at the end; after a
    failure the data are as they were before.

    The release of MVTec AD is one archive with one published checksum, so all of it is downloaded for a single
    category; only the chosen ones that are missing are unpacked. A category is in place when its counts are official
    and all its files PNG, as in the release.

    Args:
        name: One of the catalogue's `SOURCES`.
        categories: Of MVTec AD only: names of categories; all where it is None.
        root: Data root; made where it is missing.

    Raises:
        FetchError: If a category is unknown, no mirror has the right file, an archive cannot be unpacked safely, or the
            place is taken.
    """
    sources = _sources(name, categories)
    missing = []
    for one in sources:
        lacking = [(one, download) for download in one.downloads if not _in_place(download, one, root)]
        missing += lacking
        if not lacking:
            print(f"{one.title} is complete in {root / one.folder}: nothing to do.")
    if not missing:
        return
    ends = [_end(download, one, root) for one, download in missing]
    with _workshop(root, SOURCES[name], ends) as work:
        inners = {download.inner for _, download in missing}
        files = {download.urls: download for _, download in missing}
        unpacked = {urls: _unpack(_download(file, SOURCES[name], work), inners, work) for urls, file in files.items()}
        for (_, download), end in zip(missing, ends, strict=True):
            _place(unpacked[download.urls] / download.inner, end)
    for one in sources:
        (kind, counts, _), _ = _look(one, root)
        print(f"{one.title} ({kind}: {counts}) is in {root / one.folder}.")


def status(root: Path) -> int:
    """Print what is there of every data set; returns 1 where something is damaged, otherwise 0."""
    rows, remarks = [("data set", "state", "images", "digest", "licence", "folder")], []
    taken = [source(f"mvtec/{name}") for name in added(root) if is_category(name, root)]
    for one in [*SOURCES.values(), *taken]:
        looks, notes = _look(one, root)
        rows.append((one.name, *looks, one.licence, str(root / one.folder)))
        remarks += [f"{one.name}: {note}" for note in notes]
    names = available(root)
    remarks.append(f"mvtec: {len(names)} of {len(MVTEC_OFFICIAL)} categories at hand: {', '.join(names) or 'none'}.")
    for name in added(root):
        if not is_category(name, root):
            remarks.append(f"mvtec: rename the folder {name!r} to use it: letters, digits and . _ + - alone.")
    weights = root / IMAGENET_FILE
    digest = f"SHA-256 {sha256(weights)}" if weights.is_file() else "absent, torchvision's are downloaded at first use"
    remarks.append(f"ImageNet's weights: {weights} ({digest}).")
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print("", *remarks, sep="\n")
    return int(any(row[1] == "damaged" for row in rows))


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m expvae_book.data", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    fetching = commands.add_parser("fetch", help="download a data set, check it and unpack it")
    fetching.add_argument("name", choices=SOURCES, help="data set")
    fetching.add_argument(
        "--categories", nargs="+", help="of mvtec only: names, with commas or spaces between them (default: all)"
    )
    for command in (fetching, commands.add_parser("status", help="print what is there")):
        command.add_argument("--root", help="data root (default: EXPVAE_DATA, or data/ in the repository)")
    options = parser.parse_args(arguments)
    root = Path(options.root or "of EXPVAE_DATA")
    try:
        root = expvae_book.data.root()
        if options.root is not None:
            root = places.folder(places.expanded(options.root, "--root").absolute(), "--root")
        if options.command == "status":
            return status(root)
        fetch(options.name, options.categories, root)
        return 0
    except (places.SettingError, FetchError) as error:
        problem = f"{error}."
    except OSError as error:
        problem = f"The data root {root} cannot be used: {error}."
    except KeyboardInterrupt:
        problem = "Stopped; nothing half-written is left behind."
    tqdm.write(problem, file=sys.stderr)  # below a bar that was cut off
    return 1


def _sources(name: str, categories: list[str] | None) -> list[Source]:
    """The data set, or of MVTec AD the chosen categories, each for itself."""
    if name != "mvtec":
        if categories is not None:
            raise FetchError(f"--categories goes with the data set mvtec; {name} has none")
        return [SOURCES[name]]
    words = ",".join(MVTEC_OFFICIAL if categories is None else categories).split(",")
    names = [word.strip() for word in words if word.strip()]
    unknown = [name for name in names if name not in MVTEC_OFFICIAL]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) or "nothing"
        raise FetchError(f"--categories must be some of {', '.join(MVTEC_OFFICIAL)}; got {got}")
    return [source(f"mvtec/{name}") for name in dict.fromkeys(names)]


def _in_place(download: Download, source: Source, root: Path) -> bool:
    """Whether the file, or for an archive the whole data set, is there and right."""
    if not download.target:
        card = survey(source, root)
        return card is not None and card.kind == "complete"
    target = root / source.folder / download.target
    return target.is_file() and sha256(target) == source.checksums[download.target]


def _end(download: Download, source: Source, root: Path) -> Path:
    """Where a download is to lie, behind all links; only a file of its name, or an empty folder, is replaced."""
    target = root / source.folder / download.target
    if download.target and target.is_file():
        print(f"{target} is not the file of the release: replacing it.")
    elif target.exists() and (download.target or not target.is_dir() or any(target.iterdir())):
        raise FetchError(
            f"{target} already holds something else than the complete {source.title}; "
            "move it away, or name another folder with --root"
        )
    # A folder cannot be renamed over a link to a folder; a file takes the place of a link.
    return target.parent.resolve() / target.name if download.target else target.resolve()


@contextmanager
def _workshop(root: Path, source: Source, ends: list[Path]) -> Iterator[Path]:
    """A temporary folder on the disk of the first end, for one fetch at a time; what a killed one left is removed."""
    root.mkdir(parents=True, exist_ok=True)
    place = next(part for part in (ends[0], *ends[0].parents) if part.is_dir())
    folder = place / f".fetch-{source.name}"
    folder.mkdir(exist_ok=True)
    try:
        with FileLock(folder / "lock", timeout=0):
            shutil.rmtree(folder / "work", ignore_errors=True)
            (folder / "work").mkdir()
            try:
                yield folder / "work"
            finally:
                shutil.rmtree(folder, ignore_errors=True)
    except Timeout:
        raise FetchError(f"another fetch of {source.title} into {place} is running") from None


def _place(made: Path, end: Path) -> None:
    """Rename a file or a folder to its end; where there is an empty folder already, which may be a disk, into that."""
    end.parent.mkdir(parents=True, exist_ok=True)
    if made.is_dir() and end.is_dir():
        for path in made.iterdir():
            path.replace(end / path.name)
    else:
        made.replace(end)


def _download(download: Download, source: Source, folder: Path) -> Path:
    """Download a file from the first mirror that has it and check it."""
    name = download.urls[0].rsplit("/", 1)[-1]
    # identity: some servers offer a .gz as an encoding of the file inside, and requests would decode it.
    headers = {"Accept-Encoding": "identity"}
    downloader = pooch.HTTPDownloader(progressbar=True, chunk_size=1 << 16, headers=headers)
    problems = []
    for url in download.urls:
        try:
            return Path(pooch.retrieve(url, f"sha256:{download.sha256}", name, folder, downloader=downloader))
        except (requests.RequestException, ValueError) as error:
            # After the reason requests repeats the address, and pooch says that it deleted a file of another checksum.
            own = re.split(r"\. | for url", str(error))[0]
            problems.append(f"{url}: {next((reason for kind, reason in REASONS if isinstance(error, kind)), own)}")
    raise FetchError(
        f"{source.title} could not be fetched, nothing was kept; {'; '.join(problems)} (see {source.home})"
    )


def _unpack(archive: Path, inners: set[str], folder: Path) -> Path:
    """The file that a download holds, or a folder with these folders of a tar archive, inside the temporary folder."""
    unpacked = folder / f"unpacked-{archive.name}"

    def chosen(member: tarfile.TarInfo, path: Path) -> tarfile.TarInfo | None:
        safe = tarfile.data_filter(member, path)
        wanted = not inners.isdisjoint(PurePosixPath(safe.name).parts[:1])
        # Rights as the umask has them and not the archive.
        return safe.replace(mode=None, deep=False) if wanted else None

    try:
        if archive.name.endswith((".tar.gz", ".tar.xz")):
            with tarfile.open(archive) as tar, tqdm(tar, desc="unpacking", unit=" files") as bar:
                tar.extractall(unpacked, members=bar, filter=chosen)  # noqa: S202 (every member passes tarfile.data_filter)
        else:
            # pooch makes private files, so that one that is not packed is copied as well.
            opener = gzip.open if archive.suffix == ".gz" else Path.open
            with opener(archive, "rb") as packed, unpacked.open("wb") as file:
                shutil.copyfileobj(packed, file)
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise FetchError(f"{archive.name} is damaged or unsafe and cannot be unpacked: {reason}") from error
    lacking = [inner for inner in sorted(inners) if not (unpacked / inner).exists()]
    if lacking:
        raise FetchError(f"{archive.name} holds no folder {lacking[0]}")
    return unpacked


def _look(source: Source, root: Path) -> tuple[tuple[str, str, str], list[str]]:
    """State, counts and digest of what is there of a data set, and what there is to say about it."""
    try:
        card = survey(source, root)
    except ValueError as error:
        return ("damaged", "", ""), [f"{error}."]
    if card is None:
        fetch = f"`python -m expvae_book.data fetch {source.name}` fetches it."
        return ("absent", "", ""), [
            fetch if source.downloads else "it holds no images in train/good, test or ground_truth."
        ]
    return (card.kind, _counts(card), card.digest[:12]), card.note.splitlines()


def _counts(card: DataCard) -> str:
    return ", ".join(
        f"{number} {split}"
        + ("" if number == card.official.get(split, number) else f" (release: {card.official[split]})")
        for split, number in card.counts.items()
    )


if __name__ == "__main__":
    sys.exit(main())
