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
from pathlib import Path, PurePosixPath

import pooch
import requests
from filelock import FileLock, Timeout
from tqdm import tqdm

import expvae_book.data
from expvae_book import places
from expvae_book.data.card import DataCard, sha256, survey
from expvae_book.data.catalogue import IMAGENET_FILE, MVTEC_OFFICIAL, SOURCES, Download, Source, mvtec_category

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
    missing = []
    for source in _sources(name, categories):
        lacking = [(source, download) for download in source.downloads if not _in_place(download, source, root)]
        missing += lacking
        if not lacking:
            print(f"{source.title} is complete in {root / source.folder}: nothing to do.")
    if not missing:
        return
    for source, download in missing:
        _refuse_taken(root / source.folder / download.target, source, download)
    ends = [_end(root / source.folder / download.target, bool(download.target)) for source, download in missing]
    with _workshop(root, SOURCES[name], ends) as work:
        unpacked, ready = {}, []
        for _, download in missing:
            if download.urls not in unpacked:
                archive = _download(download, SOURCES[name], work)
                unpacked[download.urls] = _unpack(archive, {download.inner for _, download in missing}, work)
            ready.append(unpacked[download.urls] / download.inner)
            if download.inner and not ready[-1].is_dir():
                raise FetchError(f"{archive.name} holds no folder {download.inner}")
        for made, end in zip(ready, ends, strict=True):
            _place(made, end)
    for source in _sources(name, categories):
        card = survey(source, root)
        if card is not None:
            print(f"{source.title} ({card.kind}: {_counts(card)}) is in {root / source.folder}.")


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
                    # Only here, because it imports PyTorch, which takes seconds.
                    from expvae_book.data.mvtec import available

                    names = available(root)
                    at_hand = f"{len(names)} of {len(MVTEC_OFFICIAL)} categories at hand"
                    remarks.append(f"{source.name}: {at_hand}: {', '.join(names) or 'none'}.")
        rows.append((source.name, state, counts, digest, source.licence, str(root / source.folder)))
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
    showing = commands.add_parser("status", help="print what is there")
    for command in (fetching, showing):
        command.add_argument(
            "--root",
            help="data root (default: EXPVAE_DATA, or data/ in the repository)",
        )
    options = parser.parse_args(arguments)
    problem, code = "", 1
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
        problem = f"The data root cannot be used: {error}."
    except KeyboardInterrupt:
        problem, code = "Stopped; nothing half-written is left behind.", 130
    print(problem, file=sys.stderr)
    return code


def _sources(name: str, categories: list[str] | None) -> list[Source]:
    """The data set, or of MVTec AD the chosen categories, each for itself."""
    if name != "mvtec":
        if categories is not None:
            raise FetchError(f"--categories goes with the data set mvtec; {name} has none")
        return [SOURCES[name]]
    words = ",".join(MVTEC_OFFICIAL if categories is None else categories).split(",")
    names = [word.strip() for word in dict.fromkeys(words) if word.strip()]
    unknown = [name for name in names if name not in MVTEC_OFFICIAL]
    if unknown or not names:
        got = ", ".join(map(repr, unknown)) or "nothing"
        raise FetchError(f"--categories must be some of {', '.join(MVTEC_OFFICIAL)}; got {got}")
    return [mvtec_category(name) for name in dict.fromkeys(names)]


def _in_place(download: Download, source: Source, root: Path) -> bool:
    """Whether the file, or for an archive the whole data set, is there and right."""
    if not download.target:
        card = survey(source, root)
        return card is not None and card.kind == "complete"
    target = root / source.folder / download.target
    return target.is_file() and sha256(target) == source.checksums[download.target]


def _refuse_taken(target: Path, source: Source, download: Download) -> None:
    """Refuse to replace anything but a file by a file, and an empty folder by a folder."""
    if download.target and target.is_file():
        print(f"{target} is not the file of the release: replacing it.")
    elif target.exists() and (download.target or not target.is_dir() or any(target.iterdir())):
        raise FetchError(
            f"{target} already holds something else than the complete {source.title}; "
            "move it away, or name another folder with --root"
        )


def _end(target: Path, is_file: bool) -> Path:
    """Where a target really lies, which is elsewhere where a link is on the way to it.

    A folder cannot be renamed over a link to a folder; a file takes the place of a link.
    """
    return target.parent.resolve() / target.name if is_file else target.resolve()


@contextmanager
def _workshop(root: Path, source: Source, ends: list[Path]) -> Iterator[Path]:
    """A temporary folder from which what is made in it can be renamed to its ends, for one fetch at a time.

    It lies below the root, or where the ends are on another disk, there; that it serves is tried before anything is
    downloaded. What a killed fetch left in it is removed.
    """
    nearest = list(dict.fromkeys(next(part for part in (end, *end.parents) if part.is_dir()) for end in ends))
    problem = None
    with ExitStack() as stack:
        for place in (root, *nearest):
            folder = place / f".fetch-{source.name}"
            work = folder / "work"
            try:
                folder.mkdir(parents=True, exist_ok=True)
                stack.enter_context(FileLock(folder / "lock", timeout=0))
                stack.callback(shutil.rmtree, folder, ignore_errors=True)
                shutil.rmtree(work, ignore_errors=True)
                for near in nearest:
                    work.mkdir()
                    work.replace(near / f".trial-{source.name}").rmdir()
                work.mkdir()
                break
            except Timeout:
                raise FetchError(f"another fetch of {source.title} into {place} is running") from None
            except OSError as error:
                problem = error
                stack.close()
        else:
            raise FetchError(
                f"nothing was downloaded, because there is no folder from which {source.title} could be moved to "
                f"{' and '.join(map(str, nearest))} ({problem})"
            )
        yield work


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
            except requests.HTTPError as error:
                problems.append(f"{url}: {error.response.reason.lower()} ({error.response.status_code})")
            except (requests.RequestException, ValueError) as error:
                # pooch's own message about a checksum goes on to say that it deleted the file.
                own = str(error).partition(". ")[0]
                reason = next((reason for kind, reason in REASONS if isinstance(error, kind)), own)
                problems.append(f"{url}: {reason}")
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
    except tarfile.FilterError as error:
        raise FetchError(f"{archive.name} is refused, because a member of it is unsafe: {error}") from error
    except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error, lzma.LZMAError) as error:
        reason = str(error).partition("\n")[0].rstrip(":")
        raise FetchError(f"{archive.name} cannot be unpacked: {reason}") from error
    return unpacked


def _counts(card: DataCard) -> str:
    return ", ".join(
        f"{number} {split}" + ("" if number == card.official[split] else f" (release: {card.official[split]})")
        for split, number in card.counts.items()
    )


if __name__ == "__main__":
    sys.exit(main())
