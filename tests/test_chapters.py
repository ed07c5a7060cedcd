"""Chapters under papermill: its command line is run as a user types it, on a small chapter."""

import base64
import json
import os
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import nbformat
import numpy as np
import papermill
import pytest
import torch
from bs4 import BeautifulSoup
from click.testing import CliRunner
from papermill.cli import papermill as command
from papermill.iorw import load_notebook_node, papermill_io
from papermill.parameterize import parameterize_notebook

from expvae_book import chapters, parameters, render, runs
from expvae_book.data.card import DataCard
from expvae_book.jobs import ablations
from expvae_book.recipes import MNIST
from expvae_book.render import PageError
from pages import HEADER, notices, outputs, page_text, printed

PARAMETERS = """\
digit: int = 1  # 0 | 1 | 2 | 3; the inlier class
layer: str = "conv3"  # conv1 | conv2 | conv3
seed: int = 0  # 0 or more; a text with an = sign
rate: float = 1e-3  # above 0; step size
categories: str = "all"  # ; names
quick: bool = False
"""
NAMES = "digit, layer, seed, rate, categories, quick"


def chapter(parameters: str = PARAMETERS, code: str = "print([digit, layer, seed, rate, categories, quick])") -> str:
    """The text of a chapter with a parameters cell and one more cell."""
    return textwrap.dedent("""\
        ---
        jupytext:
          text_representation:
            extension: .md
            format_name: myst
        kernelspec:
          display_name: Python 3
          name: python3
        ---

        # A small chapter

        ```{{code-cell}} ipython3
        :tags: [parameters]
        {parameters}
        ```

        ```{{code-cell}} ipython3
        {code}
        ```
        """).format(parameters=parameters, code=code)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    (tmp_path / "book").mkdir()
    (tmp_path / "book" / "small.md").write_text(chapter())
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_papermill(*words: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [Path(sys.executable).with_name("papermill"), *words],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
    )


def injected(notebook) -> str:
    (cell,) = [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    return cell.source


def test_command_as_typed(folder):
    words = "-p digit 3 -p categories 10 -r seed 7 -p rate 1 -p quick True"
    done = run_papermill("book/small.md", "out.ipynb", *words.split())
    assert done.returncode == 0, done.stderr
    cells = nbformat.read(folder / "out.ipynb", as_version=4).cells
    assert printed([cell.get("outputs", []) for cell in cells]) == "[3, 'conv3', 7, 1.0, '10', True]\n"
    metadata = nbformat.read("out.ipynb", as_version=4).metadata
    assert metadata.papermill.input_path == "book/small.md"
    assert metadata.language_info.name == "python"
    assert "does not end in" not in done.stderr


BAD = [
    ("-p digt 3", f"has no parameter 'digt'; it has {NAMES}."),
    ("-p digit 9", "digit = 9 is not allowed; give a whole number: 0 | 1 | 2 | 3."),
    ("-p digit seven", "digit = 'seven' is not allowed; give a whole number: 0 | 1 | 2 | 3."),
    ("-p layer conv4", "layer = 'conv4' is not allowed; give text: conv1 | conv2 | conv3."),
    ("-p seed -1", "seed = -1 is not allowed; give a whole number: 0 or more."),
    ("-p rate 0", "rate = 0 is not allowed; give a number: above 0."),
    ("-p quick 1", "quick = 1 is not allowed; give True or False."),
    ("-r digit 3.0", "digit = '3.0' is not allowed; give a whole number: 0 | 1 | 2 | 3."),
    ("-y {digit:[3]}", "digit = [3] is not allowed; give a whole number: 0 | 1 | 2 | 3."),
    ("-f wrong.yml", "layer = 'conv4' is not allowed; give text: conv1 | conv2 | conv3."),
    ("-b " + base64.b64encode(b"epochs: 3").decode(), f"has no parameter 'epochs'; it has {NAMES}."),
]


@pytest.mark.parametrize(("words", "sentence"), BAD)
def test_bad_parameter_stops_the_command_before_anything_runs(folder, words, sentence):
    (folder / "wrong.yml").write_text("digit: 3\nlayer: conv4\n")
    (folder / "book" / "small.md").write_text(chapter(code="open('kernel-ran', 'w')"))
    done = CliRunner().invoke(command, ["book/small.md", "out.ipynb", *words.split()])
    assert done.exit_code == 1
    assert isinstance(done.exception, SystemExit)  # and no other, which would show a traceback
    assert sentence in done.output.splitlines()[-1]
    assert sorted(path.name for path in folder.iterdir()) == ["book", "wrong.yml"]


def test_bad_parameter_in_a_process_of_its_own(folder):
    done = run_papermill("book/small.md", "out.ipynb", "-p", "digt", "3")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"Error: book/small.md has no parameter 'digt'; it has {NAMES}."
    assert "Traceback" not in done.stderr
    assert not Path("out.ipynb").exists()


@pytest.mark.parametrize("path", ["./book/small.md", "../{name}/book/small.md", "{folder}/book/small.md"])
def test_other_spellings_of_the_path(folder, path):
    path = path.format(name=folder.name, folder=folder)
    notebook = papermill.execute_notebook(path, "out.ipynb", {"digit": 2}, prepare_only=True, progress_bar=False)
    assert notebook.metadata.papermill.input_path == path
    assert "digit = 2" in injected(nbformat.read("out.ipynb", as_version=4))
    with pytest.raises(ValueError, match="digit = 4 is not allowed"):
        papermill.execute_notebook(path, "no.ipynb", {"digit": 4}, prepare_only=True, progress_bar=False)
    assert not Path("no.ipynb").exists()


def test_parameters_from_yaml_text_and_file(folder):
    Path("right.yml").write_text("layer: conv1\nrate: 0.5\n")
    words = ["book/small.md", "out.ipynb", "--prepare-only", "-f", "./right.yml", "-y", "{digit: 3}"]
    assert CliRunner().invoke(command, words).exit_code == 0
    lines = injected(nbformat.read("out.ipynb", as_version=4)).splitlines()
    assert sorted(lines) == ["# Parameters", "digit = 3", 'layer = "conv1"', "rate = 0.5"]


def test_help_lists_types_defaults_and_choices(folder):
    done = run_papermill("--help-notebook", "book/small.md")
    assert done.returncode == 0
    listing = " ".join(done.stdout.split())
    assert "digit: int (default 1) 0 | 1 | 2 | 3; the inlier class" in listing
    assert "layer: str (default 'conv3') conv1 | conv2 | conv3" in listing
    assert "seed: int (default 0) 0 or more; a text with an = sign" in listing


def test_plain_notebooks_in_the_same_process_are_as_before(folder):
    plain = nbformat.v4.new_notebook(metadata={"kernelspec": {"name": "python3", "display_name": "Python 3"}})
    plain.metadata["language_info"] = {"name": "python"}
    plain.cells = [nbformat.v4.new_code_cell("digit = 1", metadata={"tags": ["parameters"]})]
    nbformat.write(plain, "plain.ipynb")
    options = {"prepare_only": True, "progress_bar": False}
    papermill.execute_notebook("book/small.md", "out.ipynb", {"digit": 3}, **options)
    for path in ("plain.ipynb", "./plain.ipynb", str(folder / "plain.ipynb")):
        notebook = papermill.execute_notebook(path, "out.ipynb", {"digit": 99, "other": [1]}, **options)
        assert injected(notebook).splitlines() == ["# Parameters", "digit = 99", "other = [1]"]


def test_two_chapters_in_one_process_keep_their_own_parameters(folder):
    Path("book/other.md").write_text(chapter("beta: float = 1.0  # above 0", "print(beta)"))
    options = {"prepare_only": True, "progress_bar": False}
    papermill.inspect_notebook("book/small.md")
    papermill.execute_notebook("book/other.md", "out.ipynb", {"beta": 2}, **options)
    with pytest.raises(parameters.ChapterError, match=r"book/other.md has no parameter 'digit'; it has beta\."):
        papermill.execute_notebook("book/other.md", "out.ipynb", {"digit": 1}, **options)
    papermill.execute_notebook("book/small.md", "out.ipynb", {"digit": 1}, **options)


@pytest.mark.filterwarnings("ignore:The specified file")  # of which threads cannot keep the others
def test_chapters_read_side_by_side_keep_their_own_parameters(folder):
    Path("book/other.md").write_text(chapter("beta: float = 1.0  # above 0", "print(beta)"))
    Path("book/again.md").write_text(chapter("digit: int = 9  # 9 | 10", "print(digit)"))
    given = {"small": {"digit": 2}, "other": {"beta": 2}, "again": {"digit": 10}}
    all_read = threading.Barrier(len(given), timeout=60)

    def injected_after_all_are_read(name):
        notebook = load_notebook_node(f"book/{name}.md")
        all_read.wait()
        return injected(parameterize_notebook(notebook, given[name])).splitlines()[1:]

    def prepared(name):
        options = {"prepare_only": True, "progress_bar": False}
        notebook = papermill.execute_notebook(f"book/{name}.md", None, given[name], **options)
        with pytest.raises(parameters.ChapterError, match=f"^book/{name}.md has no parameter 'rate'"):
            papermill.execute_notebook(f"book/{name}.md", None, {"rate": 1}, **options)
        return injected(notebook).splitlines()[1:]

    Path("book/small.md").write_text(chapter("digit: int = 1  # 1 | 2"))
    lines = [["digit = 2"], ["beta = 2.0"], ["digit = 10"]]
    try:
        with ThreadPoolExecutor(len(given)) as pool:
            assert list(pool.map(injected_after_all_are_read, given)) == lines
            assert list(pool.map(prepared, list(given) * 3)) == lines * 3
    finally:
        papermill_io.get_handler("local").cwd(None)  # which papermill's threads take from each other


# --- prepared notebooks, and paths and texts of other kinds ----------------------------------------------------------


@pytest.mark.parametrize(("words", "more", "digit"), [("", "-p digit 3", 3), ("-p digit 2", "", 2)])
def test_a_prepared_notebook_is_a_notebook_like_any_other(folder, words, more, digit):
    done = CliRunner().invoke(command, ["book/small.md", "prepared.ipynb", "--prepare-only", *words.split()])
    assert done.exit_code == 0
    prepared = nbformat.read("prepared.ipynb", as_version=4)
    nbformat.validate(prepared)
    assert prepared.metadata.language_info.name == "python"
    done = run_papermill("prepared.ipynb", "out.ipynb", *more.split())
    assert done.returncode == 0, done.stderr
    cells = nbformat.read("out.ipynb", as_version=4).cells
    assert printed([cell.get("outputs", []) for cell in cells]).startswith(f"[{digit}, 'conv3'")
    done = CliRunner().invoke(command, ["prepared.ipynb", "no.ipynb", "-p", "digit", "9"])
    assert done.output.splitlines()[-1].startswith("Error: book/small.md: digit = 9 is not allowed")
    assert not Path("no.ipynb").exists()


def test_a_chapter_prepared_in_python_or_into_a_pipe_names_its_language_too(folder):
    notebook = papermill.execute_notebook("book/small.md", None, {"digit": 2}, prepare_only=True, progress_bar=False)
    assert notebook.metadata.language_info.name == "python"
    assert "digit = 3" in injected(papermill.execute_notebook(notebook, None, {"digit": 3}, prepare_only=True))
    piped = run_papermill("book/small.md", "-", "--prepare-only")
    assert nbformat.reads(piped.stdout, as_version=4).metadata.language_info.name == "python"


@pytest.mark.parametrize(
    "words",
    [
        "jupytext --to ipynb --execute --output out.ipynb book/small.md",
        "nbconvert --to notebook --execute --output out.ipynb prepared.ipynb",
    ],
)
def test_jupytext_and_nbconvert_run_a_chapter_too(folder, words):
    papermill.execute_notebook("book/small.md", "prepared.ipynb", prepare_only=True, progress_bar=False)
    done = subprocess.run([sys.executable, "-m", *words.split()], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    cells = nbformat.read("out.ipynb", as_version=4).cells
    assert printed([cell.get("outputs", []) for cell in cells]).startswith("[1, 'conv3', 0")


@pytest.mark.parametrize(
    ("start", "path"), [("book", "small.md"), ("..", "{name}/book/small.md"), (".", "copy.md"), (".", "book/small.md")]
)
def test_a_chapter_is_found_by_any_path(folder, monkeypatch, start, path):
    Path("copy.md").write_text(chapter())
    monkeypatch.chdir(start)
    path, out = path.format(name=folder.name), str(folder / "out.ipynb")

    def last_line(*words):
        return CliRunner().invoke(command, words).output.splitlines()[-1]

    assert CliRunner().invoke(command, [path, out, "-p", "digit", "3", "--prepare-only"]).exit_code == 0
    assert "digit = 3" in injected(nbformat.read(out, as_version=4))
    refused = last_line(path, str(folder / "no.ipynb"), "-p", "digit", "9")
    assert refused.startswith(f"Error: {path}: digit = 9 is not allowed")
    refused = last_line(path, "written.md", "--prepare-only")
    assert refused.startswith("Error: The executed notebook cannot be written to written.md")
    assert last_line("absent.md", "no.ipynb") == "Error: There is no chapter absent.md."


@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_byte_order_mark_and_other_line_ends_change_nothing(folder, monkeypatch, mark, end):
    plain = papermill.execute_notebook("book/small.md", None, {"digit": 3}, prepare_only=True, progress_bar=False)
    parsed = render.parse(chapter(), Path("book/small.md"))
    saved = mark + chapter().replace("\n", end).encode()
    Path("book/small.md").write_bytes(saved)
    read = papermill.execute_notebook("book/small.md", None, {"digit": 3}, prepare_only=True, progress_bar=False)
    assert [cell.source for cell in read.cells] == [cell.source for cell in plain.cells]
    again = render.parse(saved.decode(), Path("book/small.md"))
    assert [cell.source for cell in again.cells] == [cell.source for cell in parsed.cells]
    assert again.metadata == parsed.metadata
    monkeypatch.setattr(chapters, "BOOK", folder / "book")
    assert chapters.command("small", {"digit": 3}) == "papermill book/small.md out.ipynb -p digit 3"


def test_a_chapter_in_another_encoding_gets_one_sentence(folder):
    Path("book/small.md").write_bytes(chapter().encode("utf-16"))
    with pytest.raises(parameters.ChapterError, match=r"^book/small.md is not a chapter .* not text in UTF-8\.$"):
        papermill.execute_notebook("book/small.md", None, prepare_only=True)


MAGICS = ["%matplotlib inline\nx = 1", "%%capture caught\nprint('caught')", "!echo from a shell", "files = !echo one"]


def test_a_chapter_with_magics_runs_and_stores_its_run(folder, monkeypatch):
    store = """\
from expvae_book import chapters, runs
from expvae_book.data.card import DataCard
from expvae_book.recipes import MNIST
%matplotlib inline
def compute():
    card = DataCard("mnist", "sample", {"train": 1}, {"train": 1}, "digest", "licence", "credit")
    spent = {"budget": {"unit": "epochs", "asked": 1, "used": 1}, "seconds": {}, "device": "cpu"}
    given = {"losses": {}, "arrays": {}, "figures": {}, "card": card, "recipe": MNIST["liu2020"]}
    return runs.save("reuse", {"digit": digit}, metrics=[runs.row("units", x)], **given, **spent)
chapters.run("reuse", {"digit": digit}, compute)
print(files, caught.stdout)"""
    text = page_text("digit: int = 1  # 1 | 2", options=":tags: [parameters]\n")
    text += page_text(*MAGICS, store).removeprefix(HEADER)
    Path("book/reuse.md").write_text(text)
    monkeypatch.setenv("EXPVAE_RUNS", str(folder / "runs"))
    monkeypatch.setattr(chapters, "BOOK", folder / "book")
    done = papermill.execute_notebook("book/reuse.md", "out.ipynb", {"digit": 2}, progress_bar=False)
    shown = printed([cell.get("outputs", []) for cell in done.cells]).split()
    assert shown == ["from", "a", "shell", "['one']", "caught"]
    assert runs.load("reuse", {"digit": 2}).record["metrics"][0]["value"] == 1
    assert chapters.command("reuse", {"digit": 2}) == "papermill book/reuse.md out.ipynb -p digit 2"
    read = render.parse(text.replace("digit: int = 1", "digit: int = 2"), Path("book/reuse.md"))
    render.execute(read, Path("book/reuse.md"))
    assert printed([cell.get("outputs", []) for cell in read.cells]).split() == shown


def test_a_run_with_other_parameters_appears_on_the_page_of_the_next_build(folder, monkeypatch):
    steps = """\
from expvae_book import chapters, report, runs
from expvae_book.data.card import DataCard
from expvae_book.recipes import MNIST
job = chapters.job("reuse", {"digit": digit})
card = DataCard("mnist", "sample", {"train": 1}, {"train": 1}, "digest", "licence", "credit")
spent = {"budget": {"unit": "epochs", "asked": 1, "used": 1}, "seconds": {}, "device": "cpu"}
given = {"losses": {}, "arrays": {}, "figures": {}, "card": card, "recipe": MNIST["liu2020"]}"""
    store = 'runs.save("reuse", job.parameters, metrics=[], **given, **spent)'
    table = 'report.show(report.stored_runs("reuse", ("digit",), {}), "Every run")'
    text = page_text("digit: int = 1  # 1 | 2", options=":tags: [parameters]\n")
    Path("book/reuse.md").write_text(text + page_text(steps, store, table).removeprefix(HEADER))
    monkeypatch.setenv("EXPVAE_RUNS", str(folder / "runs"))
    monkeypatch.setattr(chapters, "BOOK", folder / "book")
    papermill.execute_notebook("book/reuse.md", "out.ipynb", {"digit": 2}, progress_bar=False)
    exec("\n".join(("digit = 1", steps, store)), {})
    page = text + page_text(steps, table).removeprefix(HEADER)
    cells = render.parse(page, Path("book/reuse.md"))
    render.execute(cells, Path("book/reuse.md"))
    rows = BeautifulSoup(cells.cells[-1].outputs[-1].data["text/html"], "html.parser").select("tbody tr")
    assert [row.select_one("td").get_text() for row in rows] == ["1", "2"]


@pytest.mark.parametrize("line", ["%matplotlib inline", "!pip list", "digit?", "get_ipython().magic('time')"])
def test_a_magic_among_the_parameters_gets_one_sentence(folder, line):
    Path("book/small.md").write_text(chapter(f"digit: int = 1\n{line}"))
    with pytest.raises(parameters.ChapterError, match=r"^book/small.md: .* (parameters cell) .*") as raised:
        papermill.execute_notebook("book/small.md", None, prepare_only=True)
    assert line in str(raised.value)
    assert "\n" not in str(raised.value)


# --- values that would fail later ------------------------------------------------------------------------------------


CHAPTERS = sorted(path.stem for path in chapters.BOOK.glob("*.md") if "[parameters" in path.read_text())


@pytest.mark.parametrize("name", CHAPTERS)
def test_no_chapter_takes_a_whole_number_that_is_too_large_to_compute_with(name):
    path = f"book/{name}.md"
    known = parameters.declared(chapters._notebook((chapters.BOOK / f"{name}.md").read_text(), path), path)
    assert known
    for parameter in known.values():
        if parameter.kind is int:
            with pytest.raises(parameters.ChapterError, match=f"^{path}: {parameter.name} = .* is not allowed; give"):
                parameters.check({parameter.name: 2**32}, known, path)
    if "seed" in known:
        assert parameters.check({"seed": 2**32 - 1}, known, path) == {"seed": 2**32 - 1}


def absent_device() -> str:
    return "mps" if not torch.backends.mps.is_available() else "cuda"


def test_a_device_that_is_not_there_stops_a_chapter_before_it_looks_for_data(folder, monkeypatch):
    monkeypatch.setenv("EXPVAE_RUNS", str(folder / "runs"))  # and EXPVAE_DATA names an empty folder
    given = {"data": "real", "device": absent_device()}
    with pytest.raises(papermill.PapermillExecutionError, match=f"device='{absent_device()}' is not there"):
        papermill.execute_notebook(chapters.BOOK / "mnist.md", None, given, progress_bar=False)


def test_a_device_that_is_not_there_computes_nothing(monkeypatch):
    monkeypatch.delenv("EXPVAE_MODE", raising=False)
    wanted = {"digit": 2, "device": absent_device()}
    with pytest.raises(ValueError, match="is not there; this machine has: auto, "):
        chapters.run("small", wanted, must_not_compute)
    with pytest.raises(ValueError, match="is not there; this machine has: auto, "):
        chapters.jobs("small", [wanted])


def test_ablations_of_one_image_are_refused_before_anything_is_computed():
    job = chapters.Job("ablations", {"images": 1, "data": "sample", "model": "1"}, None)
    with pytest.raises(ValueError, match=r"^digits must be 0, or 2 or more to resample$"):
        ablations.load([job])


def test_paths_that_papermill_injects_are_no_unknown_parameters(folder):
    words = ["book/small.md", "out.ipynb", "--prepare-only", "--inject-paths"]
    assert CliRunner().invoke(command, words).exit_code == 0
    assert 'PAPERMILL_INPUT_PATH = "book/small.md"' in injected(nbformat.read("out.ipynb", as_version=4))


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("absent.md", None, "There is no chapter book/absent.md."),
        ("page.md", "# Only text\n", "book/page.md is not a chapter that can be run"),
        ("broken.md", "---\njupytext: {text\n---\n", "book/broken.md is not a chapter that can be run"),
        ("cell.md", chapter().replace("[parameters]", "[parameters"), "book/cell.md cannot be read as a MyST notebook"),
        ("tags.md", chapter().replace("[parameters]", "null"), "book/tags.md cannot be read as a MyST notebook"),
        ("kernel.md", chapter().replace("kernelspec:", "kernel:"), "names no kernelspec"),
        ("code.md", chapter("digit = 1"), "must read 'name: int|float|str|bool = value'"),
        ("syntax.md", chapter("digit: int = "), "the parameters cell is not valid Python"),
        (
            "default.md",
            chapter("digit: int = 7  # 0 | 1"),
            "default of digit must be a whole number: 0 | 1, written out:",
        ),
        ("kind.md", chapter('digit: int = "1"'), "default of digit must be a whole number, written out:"),
        ("computed.md", chapter("digit: int = 1 + 1"), "default of digit must be a whole number, written out:"),
        ("comment.md", chapter("digit: int = 1  # the digit"), "must begin with 'a | b | c'"),
        ("choices.md", chapter("digit: int = 1  # 1 | two"), "must begin with 'a | b | c'"),
        ("range.md", chapter("digit: int = 1  # 0 to nine"), "'N to M' for a number"),
        (
            "empty.md",
            chapter("digit: int = 1  # 9 to 0"),
            "default of digit must be a whole number: 9 to 0, written out:",
        ),
    ],
)
def test_a_file_that_is_no_chapter_gets_one_sentence(folder, name, text, sentence):
    if text is not None:
        Path("book", name).write_text(text)
    with pytest.raises(parameters.ChapterError) as raised:
        papermill.execute_notebook(f"book/{name}", "out.ipynb", progress_bar=False)
    assert sentence in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not Path("out.ipynb").exists()


def test_a_full_disk_leaves_the_executed_notebook_that_was_there(folder, full_disk):
    path = folder / "out.ipynb"
    chapters.ChapterHandler.write("before", str(path))
    said = rf"^{path} could not be written \(.*\); nothing was lost"
    with full_disk(), pytest.raises(OSError, match=said):
        chapters.ChapterHandler.write("x" * 999, str(path))
    assert path.read_text() == "before"
    assert [file.name for file in folder.glob("out*")] == ["out.ipynb"]
    chapters.ChapterHandler.write("after", os.devnull)
    assert not Path(os.devnull).is_file()


def test_a_chapter_is_never_overwritten(folder):
    done = CliRunner().invoke(command, ["book/small.md", "./book/small.md", "--prepare-only"])
    assert done.exit_code == 1
    assert "give a name that ends in .ipynb" in done.output
    assert Path("book/small.md").read_text() == chapter()


@pytest.mark.parametrize(
    ("kind", "constraint", "given", "expected"),
    [
        (int, "", "12", 12),
        (int, "", np.int64(3), 3),
        (int, "", True, None),
        (int, "", 2.0, None),
        (int, "", None, None),
        (int, "", "1_0", None),
        (int, "0 or more", 0, 0),
        (int, "above 0", 0, None),
        (int, "0 to 8", 8, 8),
        (int, "0 to 8", 9, None),
        (int, "8 to 9", 7, None),
        (float, "-1 to 0.5", 0.5, 0.5),
        (float, "-1 to 0.5", "0.50001", None),
        (float, "", 2, 2.0),
        (float, "", "1e-3", 1e-3),
        (float, "", True, None),
        (float, "", float("nan"), None),
        (float, "", "inf", None),
        (float, "", 10**400, None),
        (float, "0.1 | 0.2", 0.2, 0.2),
        (float, "0.1 | 0.2", 0.3, None),
        (float, "-1 or more", -1, -1.0),
        (str, "", "x", "x"),
        (str, "", 10, "10"),
        (str, "", 0.5, "0.5"),
        (str, "", float("nan"), None),
        (str, "", False, None),
        (str, "8 | 16", 16, "16"),
        (bool, "", "true", True),
        (bool, "", "False", False),
        (bool, "", 0, None),
        (bool, "", "yes", None),
    ],
)
def test_values(kind, constraint, given, expected):
    default = {int: 8, float: 0.1, str: "8", bool: True}[kind]
    source = f"name: {kind.__name__} = {default!r}  # {constraint}; text"
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    known = parameters.declared(nbformat.v4.new_notebook(cells=[cell]), "x.md")
    if expected is None:
        with pytest.raises(parameters.ChapterError, match=r"x\.md: name = "):
            parameters.check({"name": given}, known, "x.md")
    else:
        value = parameters.check({"name": given}, known, "x.md")["name"]
        assert value == expected
        assert type(value) is kind


@pytest.mark.parametrize(
    "source",
    [
        'unit: str = (\n    "spin"  # spin | binary; states\n)',
        'unit: str = (  # spin |\n    "spin"  # binary; states\n)',
        'unit: str = (\n    "spin"\n)  # spin | binary; states\nother: int = 1  # 1 | 2',
    ],
)
def test_a_declaration_over_several_lines_keeps_its_comment(source):
    cell = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    known = parameters.declared(nbformat.v4.new_notebook(cells=[cell]), "x.md")
    assert known["unit"].choices == ("spin", "binary")
    assert known["unit"].help == "states"
    with pytest.raises(parameters.ChapterError, match=r"unit = 'spun' is not allowed; give text: spin \| binary\."):
        parameters.check({"unit": "spun"}, known, "x.md")


def test_a_chapter_without_parameters_takes_none():
    assert parameters.declared(nbformat.v4.new_notebook(), "x.md") == {}
    with pytest.raises(parameters.ChapterError, match=r"x\.md has no parameter 'digit'; it has none"):
        parameters.check({"digit": 1}, {}, "x.md")


def test_stop_page_blanks_the_later_cells(tmp_path):
    cells = [
        """\
        from expvae_book import chapters
        chapters.stop_page("Nothing stored.")
        print("the rest of the cell")""",
        "print('a later cell')\nraise RuntimeError",
        "%matplotlib no_such_backend",
    ]
    shown = outputs(tmp_path / "page.md", *cells)
    assert printed(shown) == "the rest of the cell\n"
    assert "Nothing stored." in notices(shown)


def test_stop_page_outside_a_notebook_is_an_error():
    with pytest.raises(RuntimeError, match="cells of a notebook"):
        chapters.stop_page("Nothing stored.")


@pytest.fixture
def stored(folder, monkeypatch):
    """A store with one run of the small chapter, for digit 2, and a function that must not be called."""
    monkeypatch.setenv("EXPVAE_RUNS", str(folder / "runs"))
    monkeypatch.setattr(chapters, "BOOK", folder / "book")
    card = DataCard("mnist", "sample", {"train": 1}, {"train": 1}, "digest", "licence", "credit")
    record = {"chapter": "small", "parameters": {"digit": 2}, "protocols": {}, "metrics": [], "data": asdict(card)}
    record |= {"recipe": asdict(MNIST["liu2020"]), "losses": {"kl": [3.0]}, "seconds": {}, "device": "cpu"}
    record |= {"budget": {"unit": "epochs", "asked": 100, "used": 0}, "git": {"commit": None, "dirty": None}}
    path = folder / "runs" / "small" / "digit=2" / "record.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(record))
    return path


def must_not_compute():
    raise AssertionError("computed while reading")


def test_run_computes_unless_the_book_is_rendered(stored, monkeypatch):
    monkeypatch.delenv("EXPVAE_MODE", raising=False)
    assert chapters.run("small", {"digit": 2}, lambda: "computed") == "computed"


def test_a_job_has_its_run_where_that_is_stored_and_current(stored, monkeypatch, capsys):
    monkeypatch.delenv("EXPVAE_MODE", raising=False)
    job = chapters.job("small", {"digit": 2})
    assert (job.run.parameters, job.losses) == ({"digit": 2}, {"kl": [3.0]})
    assert capsys.readouterr().out == ""
    assert chapters.job("small", {"digit": 3}).run is None
    assert "This run is to be computed, by the cells below." in capsys.readouterr().out
    again = chapters.job("small", {"digit": 2}, again=True)
    assert (again.run, again.losses) == (None, None)
    record = json.loads(stored.read_text())
    stored.write_text(json.dumps(record | {"protocols": {"PIXEL": 0}}))
    assert chapters.job("small", {"digit": 2}).run is None
    stored.write_text(json.dumps(record | {"data": record["data"] | {"kind": "partial"}}))
    monkeypatch.setattr(runs, "_data_digest", lambda name: "other files")
    assert chapters.job("small", {"digit": 2}).run is None


@pytest.mark.parametrize(
    ("parameters", "budget", "whole"),
    [
        ({"epochs": 60}, {"unit": "epochs", "used": 60}, True),
        ({"epochs": 60}, {"unit": "epochs", "used": 59}, False),
        ({"steps": 60}, {"unit": "steps", "used": 59}, False),
        ({"epochs": 60}, {"unit": "images", "used": 60 * 48}, True),
        ({"epochs": 60}, {"unit": "images", "used": 59 * 48}, False),
        ({"resamples": 60}, {"unit": "images", "used": 1}, True),
    ],
)
def test_a_job_that_was_told_to_end_early_goes_on(parameters, budget, whole, stored, monkeypatch):
    monkeypatch.delenv("EXPVAE_MODE", raising=False)
    record = json.loads(stored.read_text()) | {"budget": budget | {"asked": 60}, "training": {"images": 48}}
    path = stored.parents[1] / ",".join(f"{name}={value}" for name, value in parameters.items()) / "record.json"
    path.parent.mkdir()
    path.write_text(json.dumps(record | {"parameters": parameters}))
    assert (chapters.job("small", parameters).run is not None) == whole


def test_a_job_says_how_long_one_like_it_took(stored, monkeypatch, capsys):
    monkeypatch.delenv("EXPVAE_MODE", raising=False)
    record = json.loads(stored.read_text())
    record["data"]["kind"], record["parameters"]["recipe"] = "complete", "liu2020"
    stored.write_text(json.dumps(record | {"seconds": {"training": 100, "evaluation": 80}, "device": "a processor"}))
    chapters.job("small", {"digit": 3, "recipe": "liu2020"})
    assert "One like it took 3 minutes on a processor, on real data." in capsys.readouterr().out
    chapters.job("small", {"digit": 3, "recipe": "report1"})
    assert "Its training says how long it takes." in capsys.readouterr().out


def test_a_job_is_only_looked_up_while_the_book_is_rendered(stored, monkeypatch):
    monkeypatch.setenv("EXPVAE_MODE", "read")
    assert chapters.job("small", {"digit": 2}, again=True).run.parameters == {"digit": 2}


def test_run_only_reads_while_the_book_is_rendered(stored, monkeypatch, capsys):
    monkeypatch.setenv("EXPVAE_MODE", "read")
    run = chapters.run("small", {"digit": 2}, must_not_compute)
    assert run.parameters == {"digit": 2}
    assert capsys.readouterr().out == ""


def test_an_outdated_run_is_shown_with_the_command(stored, monkeypatch, capsys):
    monkeypatch.setenv("EXPVAE_MODE", "read")
    stored.write_text(json.dumps(json.loads(stored.read_text()) | {"protocols": {"PIXEL": 0}}))
    assert chapters.run("small", {"digit": 2}, must_not_compute) is not None
    shown = capsys.readouterr().out
    assert "outdated: it was made by PIXEL 0, now" in shown
    assert "papermill book/small.md out.ipynb -p digit 2" in shown


@pytest.mark.parametrize(
    ("line", "stops"), [("run.arrays['curve']", True), ("run.figure('maps')", True), ("1 / 0", False)]
)
def test_only_what_an_outdated_run_lacks_stops_the_page(tmp_path, monkeypatch, line, stops):
    card = DataCard("mnist", "sample", {"train": 1}, {"train": 1}, "digest", "licence", "credit")
    record = {"chapter": "mnist", "parameters": {"digit": 2}, "metrics": [], "data": asdict(card)}
    record |= {"protocols": {"PIXEL": 0}, "recipe": asdict(MNIST["liu2020"])}
    record |= {"git": {"commit": None, "dirty": None}, "losses": {}, "seconds": {}, "device": "cpu"}
    record |= {"budget": {"unit": "epochs", "asked": 100, "used": 0}}
    path = tmp_path / "runs" / "mnist" / "digit=2"
    path.mkdir(parents=True)
    (path / "record.json").write_text(json.dumps(record))
    np.savez(path / "arrays.npz")
    cells = [
        "from expvae_book import chapters\nrun = chapters.run('mnist', {'digit': 2}, lambda: None)",
        f"{line}\nprint('the rest of the cell')",
        "print('a later cell')\nraise KeyError",
    ]
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path / "runs"))
    if stops:
        shown = outputs(tmp_path / "page.md", *cells)
        assert printed(shown) == ""
        assert "The stored run lacks what this page shows" in notices(shown)
    else:
        with pytest.raises(PageError, match="code cell 2 failed"):
            outputs(tmp_path / "page.md", *cells)


def test_command_names_what_differs_from_the_defaults(stored):
    given = {"digit": 1, "layer": "conv1", "categories": "two words", "rate": 0.001, "undeclared": 3}
    assert chapters.command("small", given) == (
        "papermill book/small.md out.ipynb -p layer conv1 -p categories 'two words'"
    )


# --- one run for each value ------------------------------------------------------------------------------------------


def make_outdated(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"protocols": {"PIXEL": 0}}))


@pytest.fixture
def several(stored):
    """The stored runs of the small chapter for the digits 2 and 3 with seed 5, and their records."""
    paths = {}
    for digit in (2, 3):
        parameters = {"digit": digit, "seed": 5}
        paths[digit] = stored.parents[1] / f"digit={digit},seed=5" / "record.json"
        paths[digit].parent.mkdir()
        paths[digit].write_text(json.dumps(json.loads(stored.read_text()) | {"parameters": parameters}))
    return paths


WANTED = [{"digit": digit, "seed": 5} for digit in (1, 2, 3)]


def test_jobs_have_their_runs_where_these_are_current(several, monkeypatch, capsys):
    monkeypatch.delenv("EXPVAE_MODE", raising=False)
    make_outdated(several[3])
    made = chapters.jobs("small", WANTED)
    assert [job.parameters for job in made] == WANTED
    assert [job.run and job.run.parameters for job in made] == [None, WANTED[1], None]
    assert "2 of 3 runs are not stored" in capsys.readouterr().out
    chapters.jobs("small", WANTED[1:2])
    assert capsys.readouterr().out == ""
    assert not any(job.run for job in chapters.jobs("small", WANTED, again=True))


def test_jobs_are_computed_again_from_other_data(several, monkeypatch):
    monkeypatch.delenv("EXPVAE_MODE", raising=False)
    for path in several.values():
        record = json.loads(path.read_text())
        path.write_text(json.dumps(record | {"data": record["data"] | {"kind": "partial"}}))
    monkeypatch.setattr(runs, "_data_digest", lambda name: "other files")
    assert not any(job.run for job in chapters.jobs("small", WANTED))
    monkeypatch.setenv("EXPVAE_MODE", "read")  # pages show what is stored
    assert [job.run is not None for job in chapters.jobs("small", WANTED)] == [False, True, True]


def test_jobs_name_all_outdated_runs_in_one_warning(several, monkeypatch, capsys):
    monkeypatch.setenv("EXPVAE_MODE", "read")
    make_outdated(several[2])
    make_outdated(several[3])
    found = chapters.jobs("small", WANTED)
    assert [job.parameters["digit"] for job in found if job.run is not None] == [2, 3]
    shown = capsys.readouterr().out
    assert shown.count("{warning}") == 1
    assert "2 (PIXEL 0, now 1); 3 (PIXEL 0, now 1)." in shown


@pytest.mark.parametrize(("digits", "stops"), [("[0, 1]", True), ("[0, 2]", False)])
def test_jobs_stop_the_page_only_if_all_runs_are_missing(several, tmp_path, digits, stops):
    shown = outputs(
        tmp_path / "page.md",
        f"from expvae_book import chapters\nwanted = [{{'digit': digit, 'seed': 5}} for digit in {digits}]\n"
        "found = chapters.jobs('small', wanted)",
        "print(*[job.parameters['digit'] for job in found if job.run])",
    )
    assert printed(shown) == ("" if stops else "2\n")
    assert ("No stored run of this chapter for any digit of 0; 1." in notices(shown)) is stops
