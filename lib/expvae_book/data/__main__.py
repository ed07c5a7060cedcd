"""Fetch data sets and say what is there: `python -m expvae_book.data fetch mnist`, `python -m expvae_book.data status`.

`python -m expvae_book.data fetch mvtec --categories bottle,pill` unpacks some of the categories of MVTec AD.
"""

import argparse
import gzip
import logging
import lzma
import shutil
import sys
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pooch
import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

import expvae_book.data
from expvae_book import places
from expvae_book.data.card import DataCard, sha256, survey
from expvae_book.data.catalogue import MVTEC_OFFICIAL, SOURCES, Download, Source, mvtec_category


class FetchError(Exception):
    """A data set could not be fetched; the message is one sentence for the user."""


def fetch(source: Source, root: Path) -> DataCard | None:
    """Download what is missing of a data set, check it, unpack it and move it into place.

    Everything happens in a temporary folder on the disk where the data are to lie, and is renamed at the end; after a
    failure the data are as they were before.

    Args:
        source: Entry of the catalogue.
        root: Data root; made where it is missing.

    Returns:
        The card of what is there afterwards.

    Raises:
        FetchError: If no mirror has the right file, an archive cannot be unpacked safely, or the place is taken.
    """
    folder = root / source.folder
    missing = [download for download in source.downloads if not _in_place(download, source, root)]
    if not missing:
        print(f"{source.title} is complete in {folder}: nothing to do.")
        return survey(source, root)
    for download in missing:
        target = folder / download.target
        if target.is_dir() and (download.target or any(target.iterdir())):
            raise _taken(target, source.title)
        if target.exists() and not target.is_dir():
            print(f"{target} is not the file of the release: replacing it.")
    ends = [_end(folder / download.target, bool(download.target)) for download in missing]
    with _workshop(root, source, ends) as workshop:
        ready = [_unpack(_download(item, source, workshop), item, workshop) for item in missing]
        for unpacked, end in zip(ready, ends, strict=True):
            _place(unpacked, end)
    card = survey(source, root)
    if card is not None:
        print(f"{source.title} ({card.kind}: {_counts(card)}) is in {folder}.")
    return card


def fetch_categories(categories: list[str], root: Path) -> None:
    """Download MVTec AD, check it, and unpack and move into place those of the chosen categories that are missing.

    The release is one archive with one published checksum, so all of it is downloaded for a single category. A
    category is in place when its counts are official and all its files PNG, as in the release.

    Args:
        categories: Names of categories.
        root: Data root; made where it is missing.

    Raises:
        FetchError: As for `fetch`, or if a category is unknown.
    """
    if not categories or set(categories) - set(MVTEC_OFFICIAL):
        got = ", ".join(repr(category) for category in categories if category not in MVTEC_OFFICIAL) or "nothing"
        raise FetchError(f"--categories must be some of {', '.join(MVTEC_OFFICIAL)}; got {got}")
    source = SOURCES["mvtec"]
    folder = root / source.folder
    missing = [category for category in categories if not _category_in_place(category, root)]
    if not missing:
        print(f"{source.title} ({', '.join(categories)}) is complete in {folder}: nothing to do.")
        return
    for category in missing:
        target = folder / category
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
            raise _taken(target, f"{source.title} {category}")
    (download,) = source.downloads
    ends = [_end(folder / category, False) for category in missing]
    with _workshop(root, source, ends) as workshop:
        unpacked = _unpack(_download(download, source, workshop), download, workshop, missing)
        for category in missing:
            if not (unpacked / category).is_dir():
                raise FetchError(f"{download.urls[0].rsplit('/', 1)[-1]} holds no folder {category}")
        for category, end in zip(missing, ends, strict=True):
            _place(unpacked / category, end)
    print(f"{source.title} ({', '.join(missing)}) is in {folder}.")


def status(root: Path) -> int:
    """Print what is there of every data set; returns 1 where something is damaged, otherwise 0."""
    rows = [("data set", "state", "images", "digest", "licence", "folder")]
    remarks = []
    for source in SOURCES.values():
        state, counts, digest = "absent", "", ""
        try:
            card = survey(source, root)
        except ValueError as error:
            state = "damaged"
            remarks.append(f"{source.name}: {error}.")
        else:
            if card is None:
                remarks.append(f"{source.name}: `python -m expvae_book.data fetch {source.name}` fetches it.")
            else:
                state, counts, digest = card.kind, _counts(card), card.digest[:12]
                remarks.extend(f"{source.name}: {line}" for line in card.note.splitlines())
                if source.name == "mvtec":
                    remarks.append(f"{source.name}: {_categories(root)}")
        rows.append((source.name, state, counts, digest, source.licence, str(root / source.folder)))
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
    showing = commands.add_parser("status", help="print what is there")
    for command in (fetching, showing):
        command.add_argument(
            "--root",
            help="data root (default: EXPVAE_DATA, or data/ in the repository)",
        )
    options = parser.parse_args(arguments)
    try:
        root = _root(options.root)
    except places.SettingError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    try:
        if options.command == "status":
            return status(root)
        if options.name == "mvtec":
            words = MVTEC_OFFICIAL if options.categories is None else options.categories
            names = (name.strip() for word in words for name in word.split(","))
            fetch_categories(list(dict.fromkeys(filter(None, names))), root)
        elif options.categories is not None:
            raise FetchError(f"--categories goes with the data set mvtec; {options.name} has none")
        else:
            fetch(SOURCES[options.name], root)
    except FetchError as error:
        print(f"{error}.", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{root} cannot be used: {error}.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Stopped; nothing half-written is left behind.", file=sys.stderr)
        return 130
    return 0


def _in_place(download: Download, source: Source, root: Path) -> bool:
    """Whether the file, or for an archive the whole data set, is there and right."""
    if not download.target:
        card = survey(source, root)
        return card is not None and card.kind == "complete"
    target = root / source.folder / download.target
    return target.is_file() and sha256(target) == source.checksums[download.target]


def _category_in_place(category: str, root: Path) -> bool:
    source = mvtec_category(category)
    card = survey(replace(source, patterns={split: f"{glob}.png" for split, glob in source.patterns.items()}), root)
    return card is not None and card.kind == "complete"


def _taken(target: Path, title: str) -> FetchError:
    return FetchError(
        f"{target} already holds something else than the complete {title}; "
        "move it away, or name another folder with --root"
    )


def _root(typed: str | None) -> Path:
    if typed is None:
        return expvae_book.data.root()
    return places.folder(places.expanded(typed, "--root").absolute(), "--root")


def _end(target: Path, is_file: bool) -> Path:
    """Where a target really lies, which is elsewhere where a link is on the way to it.

    A folder cannot be renamed over a link to a folder; a file takes the place of a link.
    """
    return target.parent.resolve() / target.name if is_file else target.resolve()


def _nearest(path: Path) -> Path:
    """The folder that is there already, of those that a path is in or is."""
    return next(part for part in (path, *path.parents) if part.is_dir())


@contextmanager
def _workshop(root: Path, source: Source, ends: list[Path]) -> Iterator[Path]:
    """A temporary folder from which what is made in it can be renamed to its ends, for one fetch at a time.

    It lies below the root, or where the ends are on another disk, there; that it serves is tried before anything is
    downloaded.
    """
    nearest = list(dict.fromkeys(map(_nearest, ends)))
    problem = None
    with ExitStack() as stack:
        for place in (root, *nearest):
            try:
                work = stack.enter_context(_hidden(place, source))
                for folder in nearest:
                    trial = work / "trial"
                    trial.mkdir()
                    trial.replace(folder / f".trial-{source.name}").rmdir()
                break
            except OSError as error:
                problem = error
                stack.close()
        else:
            raise FetchError(
                f"nothing was downloaded, because there is no folder from which {source.title} could be moved to "
                f"{' and '.join(map(str, nearest))} ({problem})"
            )
        yield work


@contextmanager
def _hidden(place: Path, source: Source) -> Iterator[Path]:
    """A temporary folder for one fetch at a time; what a killed fetch left in it is removed."""
    folder = place / f".fetch-{source.name}"
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / "work"
    try:
        with FileLock(folder / "lock", timeout=0):
            try:
                shutil.rmtree(work, ignore_errors=True)
                work.mkdir()
                yield work
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
    pooch.get_logger().setLevel(logging.WARNING)
    name = download.urls[0].rsplit("/", 1)[-1]
    problems = []
    for url in download.urls:
        # pooch asks whether the bar is true, which tqdm answers by its total; the server's length replaces it.
        with tqdm(total=download.size or 1, desc=name, unit="B", unit_scale=True) as bar:
            # identity: some servers offer a .gz as an encoding of the file inside, and requests would decode it.
            downloader = pooch.HTTPDownloader(
                progressbar=bar, chunk_size=1 << 16, headers={"Accept-Encoding": "identity"}
            )
            try:
                return Path(pooch.retrieve(url, f"sha256:{download.sha256}", name, folder, downloader=downloader))
            except (requests.RequestException, ValueError) as error:
                problems.append(f"{url}: {_reason(error)}")
    raise FetchError(
        f"{source.title} could not be fetched, nothing was kept; {'; '.join(problems)} (see {source.home})"
    )


def _reason(error: Exception) -> str:
    if isinstance(error, requests.HTTPError):
        status = error.response.status_code
        return "not found (404)" if status == 404 else f"the server answered {status}"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection was cut"
    if isinstance(error, requests.Timeout):
        return "the server did not answer in time"
    if isinstance(error, requests.ConnectionError):
        return "no connection"
    # pooch's own message about a checksum goes on to say that it deleted the file.
    return str(error).partition(". ")[0]


def _unpack(archive: Path, download: Download, folder: Path, chosen: list[str] | None = None) -> Path:
    """The file or folder that a download holds, unpacked inside the temporary folder.

    Of an archive only the chosen folders are unpacked, where any are given.
    """
    unpacked = folder / f"unpacked-{archive.name}"
    try:
        if archive.name.endswith((".tar.gz", ".tar.xz")):
            unpacked.mkdir()
            with tarfile.open(archive) as tar, tqdm(tar, desc="unpacking", unit=" files") as bar:
                members = (
                    # Rights as the umask has them and not the archive; the filter knows a device by its own.
                    member.replace(mode=None, deep=False) if member.isfile() else member
                    for member in bar
                    if chosen is None or PurePosixPath(member.name).parts[:1] in {(name,) for name in chosen}
                )
                tar.extractall(unpacked, members=members, filter="data")
            if not (unpacked / download.inner).is_dir():
                raise FetchError(f"{archive.name} holds no folder {download.inner}")
            return unpacked / download.inner
        if archive.suffix == ".gz":
            with gzip.open(archive) as packed, unpacked.open("wb") as file:
                shutil.copyfileobj(packed, file)
            return unpacked
        return Path(shutil.copyfile(archive, unpacked))  # pooch makes private files
    except tarfile.FilterError as error:
        raise FetchError(f"{archive.name} is refused, because a member of it is unsafe: {error}") from error
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise FetchError(f"{archive.name} cannot be unpacked: {reason}") from error


def _categories(root: Path) -> str:
    """One sentence on the categories of MVTec AD that have training images."""
    # Only here, because it imports PyTorch, which takes seconds.
    from expvae_book.data.mvtec import available

    names = available(root)
    return f"{len(names)} of {len(MVTEC_OFFICIAL)} categories at hand: {', '.join(names) or 'none'}."


def _counts(card: DataCard) -> str:
    return ", ".join(
        f"{number} {split}" + ("" if number == card.official[split] else f" (release: {card.official[split]})")
        for split, number in card.counts.items()
    )


if __name__ == "__main__":
    sys.exit(main())
