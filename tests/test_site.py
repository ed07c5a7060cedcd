"""The report as one file."""

import zipfile

import pytest

from expvae_book import runs, site
from expvae_book.data.catalogue import SOURCES


@pytest.fixture
def rendered(tmp_path):
    html = tmp_path / "html"
    (html / "_static").mkdir(parents=True)
    (html / "index.html").write_text("<p>ø")
    (html / "_static" / "style.css").touch()
    (html / ".buildinfo").touch()
    return html


def test_an_archive_holds_the_pages_and_a_notice_of_every_data_set(rendered, tmp_path):
    site.pack(rendered, tmp_path / "new" / "site.zip")
    with zipfile.ZipFile(tmp_path / "new" / "site.zip") as archive:
        assert {name.removeprefix(f"{site.NAME}/") for name in archive.namelist()} == {
            "NOTICE.txt",
            "index.html",
            "_static/style.css",
        }
        assert archive.read(f"{site.NAME}/index.html").decode() == "<p>ø"
        notice = archive.read(f"{site.NAME}/NOTICE.txt").decode()
    for source in SOURCES.values():
        (line,) = [line for line in notice.splitlines() if source.credit in line]
        assert source.licence in line
        assert source.home in line
    for run in runs.find():
        assert run.record["data"]["credit"] in notice
    assert notice.count("MIT License") == 2  # of the published results, and of the book


def test_without_a_rendered_book_there_is_no_archive(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"^there is no rendered book in .*: make it with jupyter-book build"):
        site.pack(tmp_path, tmp_path / "site.zip")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_the_archive_that_was_there(rendered, tmp_path, full_disk):
    site.pack(rendered, tmp_path / "site.zip")
    before = (tmp_path / "site.zip").read_bytes()
    with full_disk(), pytest.raises(OSError, match="could not be written"):
        site.pack(rendered, tmp_path / "site.zip")
    assert (tmp_path / "site.zip").read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["html", "site.zip"]
