"""The rendered book: the real one, and small ones that show what happens to missing runs and to errors."""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib import import_module
from itertools import product
from pathlib import Path
from urllib.parse import unquote, urlsplit

import jupytext
import pytest
from bs4 import BeautifulSoup

import expvae
from expvae_book import render, runs
from expvae_book.data.card import DataCard
from expvae_book.protocols import VERSIONS
from pages import BOOK, PAGES, REPOSITORY, build, notices, outputs, page_text, printed

RUN_CELLS = ("chapters.run(", "chapters.job(", "chapters.jobs(", "page.jobs(")
# How the notice begins that an outdated run lacks something which its page shows, see expvae_book.chapters.run.
LACKING = "The stored run lacks what this page shows from here on."
MISSING = "No stored run of this chapter"
UNSTORED = "No outputs of this page are stored"
LIBRARY = ("library", "library-measures", "library-models")
PACKAGES = ("expvae", "expvae.metrics", "expvae.models")


def notebooks() -> dict[str, object]:
    """The pages of the book that hold code."""
    pages = {page: jupytext.read(BOOK / f"{page}.md", fmt="md:myst") for page in PAGES}
    return {page: notebook for page, notebook in pages.items() if "kernelspec" in notebook.metadata}


def warnings_on(page: BeautifulSoup) -> str:
    """The text of all warnings of a page."""
    return " ".join(notice.get_text() for notice in page.select("article .admonition.warning"))


@pytest.fixture(scope="session")
def soups(html) -> dict[str, BeautifulSoup]:
    return {page: BeautifulSoup((html / f"{page}.html").read_text(encoding="utf-8"), "html.parser") for page in PAGES}


def test_every_page_has_a_title(soups):
    for page, soup in soups.items():
        assert soup.select_one("article h1") is not None, page


def test_images_are_there_and_have_alternative_text(soups, html):
    count = 0
    for page, soup in soups.items():
        for image in soup.select("article img"):
            count += 1
            assert image.get("alt", "").strip(), f"{page}: {image}"
            # Sphinx falls back to the name of the file, which says nothing.
            assert not re.search(r"\.(png|svg|jpe?g)$", image["alt"]), f"{page}: {image}"
            if not image["src"].startswith("data:"):
                assert (html / unquote(image["src"])).stat().st_size > 0, f"{page}: {image}"
    assert count > 0


def test_every_figure_of_a_page_is_there(soups):
    # IPython shows only the last top-level expression of a cell: a figure in an if is made and not shown.
    count = 0
    for page, notebook in notebooks().items():
        if MISSING in warnings_on(soups[page]):
            continue
        shown = {" ".join(image["alt"].split()) for image in soups[page].select("article img")}
        for cell in notebook.cells:
            text = cell.metadata.get("mystnb", {}).get("image", {}).get("alt")
            if UNSTORED in warnings_on(soups[page]) and "report" not in cell.metadata.get("tags", []):
                continue
            if text is not None:
                assert " ".join(text.split()) in shown, f"{page}: {text}"
                count += 1
    assert count > 0


def test_no_stored_run_lacks_what_its_page_shows(soups):
    for page, soup in soups.items():
        assert LACKING not in warnings_on(soup), page


def test_no_stored_run_differs_from_its_weights():
    stored = [run for store in ("mvtec", *PAGES) for run in runs.find(store)]
    assert stored
    assert [run.label for run in stored if run.differs] == []


def test_no_page_shows_an_error(soups):
    for page, soup in soups.items():
        shown = soup.select_one("article").get_text()
        assert "Traceback (most recent call last)" not in shown, page
        assert not soup.select(".output.traceback, .output.stderr, .problematic, .system-message"), page


def test_no_number_is_shown_as_python_writes_it(soups):
    for page, soup in soups.items():
        outputs = " ".join(output.get_text() for output in soup.select("article .cell_output"))
        found = re.findall(r"np\.(?:float|int|bool|str)\w*\(|tensor\(|array\(|<[\w.]+ object at 0x|\bnan\b", outputs)
        assert not found, f"{page}: {found}"


def test_internal_links_lead_somewhere(soups, html):
    targets = {f"{page}.html": {tag["id"] for tag in soup.select("[id]")} for page, soup in soups.items()}
    count = 0
    for page, soup in soups.items():
        for link in soup.select("a[href]"):
            address = urlsplit(link["href"])
            if address.scheme or address.netloc:
                continue
            name = unquote(address.path) or f"{page}.html"
            assert (html / name).is_file(), f"{page}: {link['href']}"
            if address.fragment and name in targets:
                assert unquote(address.fragment) in targets[name], f"{page}: {link['href']}"
            count += 1
    assert count > len(PAGES)


def test_the_pages_on_the_library_describe_all_that_it_exports(soups):
    shown = [tag["id"] for page in LIBRARY for tag in soups[page].select("article dt[id]")]
    names = [f"{package}.{name}" for package in PACKAGES for name in import_module(package).__all__]
    assert len(shown) == len(set(shown))
    # What is nested belongs to a class: its public methods and properties.
    assert set(names) == {name for name in shown if name.rpartition(".")[0] in PACKAGES}
    assert "expvae.Attention.map_BIYX" in shown
    assert not any("._" in name for name in shown)


def test_a_docstring_is_shown_with_its_shapes_equations_and_sections(soups):
    described = soups["library"].find(id="expvae.attention").parent
    signature = described.dd.pre.get_text()
    assert (
        '    x_BCYX: Float[Tensor, "b c y x"],\n    method: str | Method | Mapping[Name, str | Method] = ' in signature
    )
    assert signature.endswith(") -> Attention | dict[Name, Attention]\n")
    titles = [tag.get_text() for tag in described.select("dd > p > strong")]
    assert titles == ["Arguments", "Returns", "Raises"]
    terms = [tag.get_text() for tag in described.select("dd > dl > dt")]
    assert terms == [*inspect.signature(expvae.attention).parameters, "ValueError", "TypeError"]
    text = "\n".join(soups[page].article.get_text() for page in LIBRARY)
    assert "α_ic   = 1/(HW) Σ_hw ∂s_i/∂A_chw" in text
    assert not re.search(r":(func|class|meth|mod):|\b(Args|Raises|Returns|Attributes):", text)


def test_run_is_the_last_statement_of_its_cell():
    # Where a run is missing the rest of the cell would still be executed, see expvae_book.chapters.stop_page.
    count = 0
    for page, notebook in notebooks().items():
        for cell in notebook.cells:
            calls = [call for call in RUN_CELLS if call in cell.source]
            if cell.cell_type == "code" and calls:
                last = ast.parse(cell.source).body[-1]
                assert calls[0] in ast.unparse(last), page
                count += 1
    assert count > 0


def test_make_reproduce_runs_every_chapter():
    # Not as a part of the make that may have started the tests.
    environment = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL")}
    command = ["make", "-n", "reproduce"]
    steps = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    executed = re.findall(r"papermill book/(\w+)\.md", steps.stdout)
    assert set(executed) == set(notebooks())
    for chapter in ("mnist", "rbm"):
        assert re.findall(rf"{chapter}\.md .* -p digit (\d)", steps.stdout) == ["1", "3"]
    assert steps.stdout.rstrip().splitlines()[-1].endswith('_build/html/index.html"')


NAMES = ["plain", "my data", "it's", 'a "b"', "a;b", "(a)", "~"]


@pytest.mark.parametrize(
    ("given", "name"),
    # Make itself reads a dollar and a hash in its arguments.
    [*product(["environment", "argument"], NAMES), ("environment", "a$b"), ("environment", "#1")],
)
def test_make_reproduce_finds_real_data_wherever_they_lie(name, given, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MAKELEVEL")}
    environment["HOME"] = str(tmp_path)
    del environment["EXPVAE_DATA"]
    folder = tmp_path if name == "~" else tmp_path / name
    value = name if name == "~" else str(folder)
    command = ["make", "-n", "reproduce", f"PYTHON={sys.executable}"]
    if given == "environment":
        environment["EXPVAE_DATA"] = value
    else:
        command.append(f"EXPVAE_DATA={value}")

    def planned():
        made = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
        assert made.stderr == ""
        return set(re.findall(r"-j(\d)", made.stdout))

    assert planned() == {"2"}
    (folder / "MNIST" / "raw").mkdir(parents=True)
    (folder / "MNIST" / "raw" / "train-images-idx3-ubyte").touch()
    assert planned() == {"1"}


def test_data_at_hand_are_told_before_anything_is_installed(tmp_path):
    (tmp_path / "file").touch()
    environment = {"PYTHONPATH": str(REPOSITORY / "lib"), "EXPVAE_DATA": str(tmp_path / "file")}
    command = [sys.executable, "-S", "-B", "-m", "expvae_book.data.catalogue"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"EXPVAE_DATA must name a folder, and {tmp_path}/file is a file.\n"
    done = subprocess.run(
        command, env=environment | {"EXPVAE_DATA": str(tmp_path)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")


def store_run(store: Path, version: int) -> None:
    """Store a run of mnist for digit 4 that holds no result, made by this version of its protocol."""
    card = DataCard("mnist", "sample", {"train": 1}, {"train": 1}, "digest", "licence", "credit")
    record = {"chapter": "mnist", "parameters": {"digit": 4}, "protocols": {"mnist": version}, "metrics": []}
    record |= {"data": asdict(card), "git": {"commit": None, "dirty": None}, "losses": {}, "recipe": {}, "seconds": {}}
    record |= {"budget": {"unit": "epochs", "asked": 1, "used": 1}, "device": "cpu"}
    path = store / "mnist" / "digit=4" / "record.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record))


@pytest.fixture
def book(tmp_path):
    """A book without pages that has the real book's settings."""
    shutil.copy(REPOSITORY / "_config.yml", tmp_path)
    (tmp_path / "book").mkdir()
    shutil.copy(BOOK / "references.bib", tmp_path / "book")
    (tmp_path / "book" / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    return tmp_path / "book"


def test_every_build_looks_at_the_store_again(book, tmp_path):
    cells = [
        """\
        from expvae_book import chapters
        def compute():
            raise AssertionError("computed while the book is built")
        run = chapters.run("mnist", {"digit": 4}, compute)""",
        """print("folder:", run.folder.name)""",
    ]
    (book / "index.md").write_text(page_text(*cells) + "\nText behind the run.\n")
    store = tmp_path / "runs"
    done = build(book, tmp_path, EXPVAE_RUNS=str(store))
    assert done.returncode == 0, done.stdout[-5000:]
    article = BeautifulSoup((tmp_path / "_build/html/index.html").read_text(), "html.parser").article
    notice = article.select_one(".admonition.warning").get_text()
    assert f"{MISSING} with digit = 4" in notice
    assert "papermill book/mnist.md out.ipynb -p digit 4" in notice
    assert "folder:" not in "".join(output.get_text() for output in article.select(".cell_output"))
    assert "Text behind the run." in article.get_text()

    # The page's text is as it was.
    store_run(store, version=VERSIONS["mnist"])
    done = build(book, tmp_path, EXPVAE_RUNS=str(store))
    assert done.returncode == 0, done.stdout[-5000:]
    article = BeautifulSoup((tmp_path / "_build/html/index.html").read_text(), "html.parser").article
    assert not article.select(".admonition")
    assert "folder: digit=4" in article.get_text()


def test_stored_outputs_are_built_without_warnings_and_without_running(book, tmp_path):
    cells = (
        "import time\nfrom tqdm import tqdm\nfor i in tqdm(range(3)):\n    time.sleep(0.2)\nprint('computed')",
        "6 * 7",
    )
    text = page_text(*cells).replace("kernelspec:", "expvae:\n  data_set: dsprites\nkernelspec:")
    (book / "index.md").write_text(text)
    program, environment = Path(sys.executable).with_name("papermill"), {"EXPVAE_RUNS": str(tmp_path / "runs")}
    command = [program, book / "index.md", tmp_path / "out.ipynb", "--no-progress-bar"]
    subprocess.run(command, env=os.environ | environment, check=True, capture_output=True)
    assert "it/s" in (tmp_path / "out.ipynb").read_text()
    (book / "index.md").write_text(text.replace("computed')", "computed' )"))
    done = build(book, tmp_path, **environment)
    assert done.returncode == 0, done.stdout[-5000:]
    article = BeautifulSoup((tmp_path / "_build/html/index.html").read_text(), "html.parser").article
    assert [output.get_text().strip() for output in article.select(".cell_output")] == ["computed", "42"]
    assert "data_set" not in article.get_text()


def test_what_a_run_lacks_stops_its_page_if_it_is_outdated_and_is_an_error_else(tmp_path, monkeypatch):
    cells = [
        "from expvae_book import chapters\nrun = chapters.run('mnist', {'digit': 4}, lambda: None)",
        "print('before')\nrun.rows('pixel AUROC')\nprint('the rest of the cell')",
        "print('a later cell')",
    ]
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path))
    store_run(tmp_path, version=0)
    shown = outputs(tmp_path / "page.md", *cells)
    said = notices(shown)
    assert "This run is outdated: it was made by mnist 0, now" in said
    assert LACKING in said
    assert said.count("papermill book/mnist.md out.ipynb -p digit 4") == 2
    assert printed(shown) == "before\n"
    assert not any(output.output_type == "error" for cell in shown for output in cell)

    store_run(tmp_path, version=VERSIONS["mnist"])
    with pytest.raises(render.PageError, match="has no metric 'pixel AUROC'"):
        outputs(tmp_path / "page.md", *cells)


def test_a_failing_cell_fails_the_build_and_names_its_place(book, tmp_path):
    (book / "index.md").write_text(page_text("x = 1", "raise ValueError('broken cell')"))
    done = build(book, tmp_path, "-q")
    assert done.returncode != 0
    assert f"{book}/index.md:18: code cell 2 failed." in done.stdout
    assert "ValueError: broken cell" in done.stdout


def test_warnings_name_the_line(book, tmp_path):
    (book / "_toc.yml").write_text("format: jb-book\nroot: index\nchapters:\n  - file: text\n")
    (book / "index.md").write_text(page_text("import warnings\nwarnings.warn('take care')") + "\n{role}`x`\n")
    (book / "text.md").write_text("---\nkey: value\n---\n\n# Only text\n\n{role}`x`\n")
    done = build(book, tmp_path)
    assert done.returncode != 0
    assert "index.md:14: WARNING: stderr was found in the cell outputs" in done.stdout
    assert 'index.md:18: WARNING: Unknown interpreted text role "role"' in done.stdout
    assert 'text.md:7: WARNING: Unknown interpreted text role "role"' in done.stdout


# How the chapters that were rewritten read -------------------------------------------------------------------------

CHAPTERS = ("mnist", "ucsd", "mvtec10", "mvtec15", "rbm", "method", "disentanglement", "ablations")
CHAPTERS += ("forensics", "sanity", "reuse")
LINES, CELL_LINES, VISIBLE, WORDS = 350, 25, 0.7, 2500
HIDDEN = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
FOLDED = "details, .toggle-hidden, .tag_hide-output .cell_output, .tag_hide-input .cell_input, .tag_hide-cell"


def code_cells(chapter: str) -> list:
    notebook = jupytext.read(BOOK / f"{chapter}.md", fmt="md:myst")
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def lines_of(cell) -> int:
    return len([line for line in cell.source.splitlines() if line.strip()])


def hidden(cell) -> bool:
    return not HIDDEN.isdisjoint(cell.metadata.get("tags", []))


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_chapter_is_short_and_its_code_is_in_view(chapter):
    assert len((BOOK / f"{chapter}.md").read_text().splitlines()) <= LINES
    cells = code_cells(chapter)
    assert max(map(lines_of, cells)) <= CELL_LINES
    total = sum(map(lines_of, cells))
    assert sum(lines_of(cell) for cell in cells if not hidden(cell)) >= VISIBLE * total


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_a_page_shows_something_at_once_and_is_no_longer_than_it_need_be(soups, chapter):
    article = soups[chapter].select_one("article")
    if MISSING in warnings_on(soups[chapter]):
        pytest.skip("no run of this page is stored")
    cells = [cell for cell in article.select(".cell") if HIDDEN.isdisjoint(hyphenated(cell))][:2]
    assert any(cell.select("img, table") for cell in cells), "no figure or table in the first two visible cells"
    everything = len(article.get_text(" ").split())
    for folded in article.select(FOLDED):
        folded.extract()
    open_ = len(article.get_text(" ").split())
    assert open_ <= WORDS
    assert everything - open_ <= WORDS


def test_the_first_page_is_short(soups):
    article = soups["index"].select_one("article")
    assert len(article.select("img")) == 1
    assert len(article.get_text(" ").split()) <= 900


def hyphenated(cell: BeautifulSoup) -> set[str]:
    return {name.removeprefix("tag_") for name in cell.get("class", [])}
