"""The rendered report as one file to hand on, which opens without a network."""

import zipfile
from pathlib import Path

from expvae_book import runs
from expvae_book.data.catalogue import SOURCES
from expvae_book.files import replacing
from expvae_book.places import repository

NAME = "visually-explaining-vaes"  # the folder inside the archive


def notice() -> str:
    """Whose data the pages show and count, and under which licences, by the catalogue and the cards of stored runs."""
    homes = {source.credit: f"; {source.home}" for source in SOURCES.values()}
    cards = (run.record["data"] for run in runs.find())
    licences = {source.credit: source.licence for source in SOURCES.values()}
    licences |= {card["credit"]: card["licence"] for card in cards}
    listed = "\n".join(
        f"- {credit}" + f"; licence: {licence}" * (licence not in credit) + homes.get(credit, "")
        for credit, licence in licences.items()
    )
    results = repository() / "book" / "reported" / "report2" / "NOTICE.txt"
    return (
        "Figures of this report show images of these data sets, smaller and under maps, and its numbers were measured\n"
        "on them. They stay under their own licences:\n\n"
        f"{listed}\n\nResults that others published are drawn and counted beside those of this book:\n\n"
        f"{results.read_text()}\nThe book itself:\n\n{(repository() / 'LICENSE').read_text()}"
    )


def pack(html: Path, archive: Path) -> None:
    """Write a rendered book and its NOTICE.txt into one zip file, which appears whole or not at all.

    Args:
        html: What `jupyter-book build` has made.
        archive: The file to write.

    Raises:
        FileNotFoundError: If there is no rendered book.
        OSError: If the file cannot be written; the message says so in one sentence.
    """
    if not (html / "index.html").is_file():
        raise FileNotFoundError(f"there is no rendered book in {html}: make it with jupyter-book build book/")
    with replacing(archive) as temporary, zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(f"{NAME}/NOTICE.txt", notice())
        for file in html.rglob("*"):
            if file.is_file() and not file.name.startswith("."):
                packed.write(file, f"{NAME}/{file.relative_to(html)}")
