"""Outputs that papermill's run of a chapter stores for its page, and what the page makes of them."""

import json
import logging
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import jupytext
import nbformat
import papermill
import pytest
from nbformat.v4 import new_output
from papermill.exceptions import PapermillExecutionError

from expvae_book import outputs, parameters, places, render
from pages import HEADER, notices, printed

PARAMETERS = """\
digit: int = 1  # 0 | 1 | 2
data: str = "auto"  # auto | real | sample
precision: str = "auto"  # auto | float32
again: bool = False"""
HERE = str(places.REPOSITORY)


def chapter(*cells, data_set="dsprites", parameters=PARAMETERS):
    """The text of a chapter whose outputs are stored; a cell is its code, or a tag and its code."""
    parts = [HEADER.replace("kernelspec:", f"expvae:\n  data_set: {data_set}\nkernelspec:")]
    for cell in [("parameters", parameters), *cells]:
        tag, code = cell if isinstance(cell, tuple) else ("", cell)
        parts.append(f"```{{code-cell}} ipython3\n:tags: [{tag}]\n{code}\n```\n")
    return "\n".join(parts)


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Where the outputs of the chapter "small" are stored."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path / "runs"))
    return tmp_path / "runs" / "outputs" / "small.json"


def run(text, **given):
    """Run the chapter "small" by papermill; returns the executed notebook, as it was written."""
    Path("small.md").write_text(text)
    papermill.execute_notebook("small.md", "out.ipynb", given, progress_bar=False)
    return nbformat.read("out.ipynb", as_version=4)


def keep(text, *shown):
    """Store these outputs of the compute cells of the chapter "small", as if they had been computed."""
    notebook = jupytext.reads(text, fmt="md:myst")
    cells = [cell for cell in notebook.cells if outputs.is_compute(cell)]
    for cell, one in zip(cells, shown, strict=True):
        cell.outputs = [new_output("stream", name="stdout", text=one)] if isinstance(one, str) else one
    known = parameters.declared(notebook, "small.md")
    return outputs.store(notebook, "small", {name: parameter.default for name, parameter in known.items()})


def page(text):
    """The outputs of the code cells of the page "small", without that with the parameters."""
    notebook = render.parse(text, Path("small.md").resolve())
    render.execute(notebook, Path("small.md").resolve())
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"][1:]


# --- what a run stores -----------------------------------------------------------------------------------------------

BARS = """\
import sys
from pathlib import Path
from tqdm import tqdm
for file in (sys.stderr, sys.stdout):
    for step in tqdm(range(50), file=file, mininterval=0):
        if step == 25:
            print("half")
with Path("ran").open("a") as file:
    file.write("x")
digit"""


def test_a_run_stores_the_outputs_of_compute_cells_and_the_page_shows_them(store):
    text = chapter(BARS, ("report", "print('report', digit)"))
    given = {"again": True, "precision": "float32", "digit": 1}
    executed = run(text, **given)
    bars = [output for output in executed.cells[-2].outputs if "100%" in output.get("text", "")]
    assert [bar.name for bar in bars] == ["stderr", "stdout"]
    assert [bar.text.count("%|") for bar in bars] == [1, 2]  # the second with what was printed into its line

    kept = json.loads(store.read_text())
    assert kept["chapter"] == "small"
    assert kept["parameters"] == {"digit": 1, "data": "auto", "precision": "auto", "again": False} | given
    assert {"commit", "dirty"} == set(kept["git"])
    (cell,) = kept["cells"]
    assert [output.get("name", output["output_type"]) for output in cell["outputs"]][-1] == "execute_result"
    assert printed([[nbformat.from_dict(output) for output in cell["outputs"]]]) == "half\nhalf\n"
    assert [path.name for path in store.parent.iterdir()] == ["small.json"]

    shown = page(text)
    assert shown[0] == cell["outputs"]
    assert printed(shown[1:]) == "report 1\n"
    assert Path("ran").read_text() == "x"


@pytest.mark.parametrize(
    ("given", "data_set", "said"),
    [
        ({}, "dsprites", ""),
        ({"digit": 2}, "dsprites", "it has digit = 2"),
        ({"data": "sample"}, "dsprites", ""),
        ({"data": "sample"}, "mnist", "it ran without the files of MNIST"),
        ({}, "mnist", "it ran without the files of MNIST"),
        ({"data": "real", "precision": "float32", "again": True}, "mnist", ""),
    ],
)
def test_only_the_invocation_that_the_page_shows_is_stored(given, data_set, said):
    known = parameters.declared(jupytext.reads(chapter(), fmt="md:myst"), "small.md")
    values = {name: parameter.default for name, parameter in known.items()} | given
    assert outputs.departure(values, known, data_set) == said


def test_data_at_hand_are_what_auto_means(tmp_path, monkeypatch):
    known = parameters.declared(jupytext.reads(chapter(), fmt="md:myst"), "small.md")
    values = {name: parameter.default for name, parameter in known.items()}
    monkeypatch.setenv("EXPVAE_DATA", str(tmp_path))
    (tmp_path / "MNIST" / "raw").mkdir(parents=True)
    (tmp_path / "MNIST" / "raw" / "train-images-idx3-ubyte").touch()
    assert outputs.departure(values, known, "mnist") == ""
    assert outputs.departure(values, known, "ucsd") != ""
    assert (
        outputs.departure({"digit": 1}, {"digit": known["digit"]}, "ucsd") == ""
    )  # a chapter without a choice of data


def test_another_run_stores_nothing_and_says_so(store, caplog):
    keep(chapter("print(digit)"), "kept\n")
    before = store.read_text()
    with caplog.at_level(logging.INFO, "papermill"):
        executed = run(chapter("print(digit)"), digit=2)
    assert printed([cell.get("outputs", []) for cell in executed.cells]) == "2\n"
    assert "This run is not the one that the page of small.md shows: it has digit = 2." in caplog.messages
    assert store.read_text() == before


def test_a_run_that_fails_stores_nothing(store):
    keep(chapter("print(digit)"), "kept\n")
    before = store.read_text()
    with pytest.raises(PapermillExecutionError):
        run(chapter("print(digit)", ("report", "1 / 0")))
    assert store.read_text() == before


def test_outputs_that_cannot_be_stored_fail_no_run(store, caplog):
    executed = run(chapter("import os\nprint(os.path.expanduser('~/file'))"))
    assert printed([cell.get("outputs", []) for cell in executed.cells]).endswith("/file\n")
    assert not store.exists()
    (said,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert said.startswith("The outputs of small.md are not stored for its page: what code cell 2 shows names a folder")


def test_other_notebooks_are_run_as_they_were(store):
    cell = nbformat.v4.new_code_cell("import sys\nfor i in range(3):\n    print(i, end='\\r', flush=True)")
    plain = nbformat.v4.new_notebook(cells=[cell], metadata={"expvae": {"data_set": "dsprites"}})
    plain.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(plain, "plain.ipynb")
    executed = papermill.execute_notebook("plain.ipynb", "out.ipynb", progress_bar=False)
    assert printed([executed.cells[-1].outputs]) == "0\r1\r2\r"
    assert not store.parent.exists()


@pytest.mark.parametrize("data_set", ["cifar", "[mnist]", "3"])
def test_an_unknown_data_set_is_named_before_anything_runs(store, data_set):
    with pytest.raises(
        parameters.ChapterError, match=r"^small.md: data_set of expvae at its top must be one of mnist,"
    ):
        run(chapter("open('ran', 'w')", data_set=data_set))
    assert not Path("ran").exists()


@pytest.mark.parametrize("text", [f"see {HERE}/lib", f"file://{HERE}", f"'{Path.home()}'", "/tmp/x"])
@pytest.mark.parametrize("kind", ["stream", "text/plain", "text/html", "application/json", "image/svg+xml"])
def test_an_output_that_names_a_folder_of_this_machine_is_refused(store, monkeypatch, text, kind):
    monkeypatch.setattr(outputs.tempfile, "gettempdir", lambda: "/tmp")
    value = [text] if kind == "application/json" else text
    shown = text if kind == "stream" else [new_output("display_data", {kind: value})]
    with pytest.raises(outputs.NotStoredError, match=r"what code cell 3 shows names a folder of this machine, /"):
        keep(chapter("1", "2"), "nothing", shown)
    assert not store.exists()


@pytest.mark.parametrize("text", ["https://example.org/tmp/x", "/tmpx", "../tmp/x", "/usr/share"])
def test_what_is_no_folder_of_this_machine_is_stored(store, monkeypatch, text):
    monkeypatch.setattr(outputs.tempfile, "gettempdir", lambda: "/tmp")
    monkeypatch.setattr(outputs, "_folders", lambda: {"/tmp"})
    image = new_output("display_data", {"image/png": "/tmp/"})  # base64 may look so
    assert keep(chapter("1", "2"), text, [image]) == store


def test_a_page_has_a_limit(store):
    size = outputs.LIMIT // 2
    keep(chapter("1", "2"), "x" * size, "")
    before = store.read_text()
    with pytest.raises(outputs.NotStoredError, match=r"those of a page may take 1,500,000; code cell 3 has the most, "):
        keep(chapter("1", "2"), "x" * size, "x" * (size + 1))
    assert store.read_text() == before


def test_a_cell_that_may_fail_is_not_stored(store):
    error = new_output("error", ename="ValueError", evalue="expected", traceback=[])
    with pytest.raises(outputs.NotStoredError, match="a cell failed"):
        keep(chapter("1"), [error])


# --- what the page shows ---------------------------------------------------------------------------------------------

CHANGED = "This cell has changed since its output was stored; `papermill book/small.md out.ipynb` stores it again."


def test_a_changed_cell_alone_says_so(store):
    keep(chapter("a = 1", "a", "b = 2"), "one", "two", "three")
    shown = page(chapter("a = 1", "a + 1", ("report", "print('report')"), "b = 2"))
    assert [printed([cell]) for cell in shown] == ["one", "", "report\n", "three"]
    assert notices(shown) == f"````{{note}}\n{CHANGED}\n````"


@pytest.mark.parametrize(
    ("source", "same"),
    [
        ("x = f(1, 'a')", True),
        ("# why\nx = f(\n    1,\n    'a',\n)  # what\n", True),
        ('x = f(1, "a")', True),
        ("x = f(1, 'b')", False),
        ("x = f(1, 'a');", False),  # keeps a last expression from being shown
        ("x = f(1, 'a');  # quiet", False),
    ],
)
def test_an_output_belongs_to_what_its_cell_does(store, source, same):
    keep(chapter("x = f(1, 'a')"), "kept")
    assert (printed(page(chapter(source))) == "kept") is same


def test_a_cell_that_is_not_plain_python_is_compared_as_it_is(store):
    keep(chapter("%time 1", "await f( 1)"), "one", "two")
    assert printed(page(chapter("%time 1", "await f(1)"))) == "onetwo"
    assert CHANGED in notices(page(chapter("%time  1")))


def test_equal_cells_are_told_apart_by_their_order(store):
    keep(chapter("f()", "g()", "f()"), "one", "two", "three")
    assert [printed([cell]) for cell in page(chapter("g()", "f()", "f()", "f()"))] == ["two", "one", "three", ""]


def test_a_page_without_outputs_says_once_how_to_make_them(store):
    hidden = ("hide-cell", "import this_is_not_run")
    shown = page(chapter(("report", "print('report')"), hidden, "f()", "g()"))
    assert [len(cell) for cell in shown] == [1, 0, 1, 0]
    said = notices(shown)
    assert said.startswith("````{warning}\nNo outputs of this page are stored")
    assert "`papermill book/small.md out.ipynb`" in said
    assert [len(cell) for cell in page(chapter(hidden))] == [1]  # rather where it is hidden than nowhere


def test_a_changed_default_is_another_invocation(store):
    keep(chapter("print(digit)"), "1\n")
    other = PARAMETERS.replace("digit: int = 1", "digit: int = 2")
    assert "No outputs of this page are stored" in notices(page(chapter("print(digit)", parameters=other)))
    free = PARAMETERS.replace("again: bool = False", "again: bool = True\nadded: int = 3")
    assert printed(page(chapter("print(digit)", parameters=free))) == "1\n"


STORED = '{"parameters": {}, "cells": %s}'


@pytest.mark.parametrize(
    "content",
    [
        *("{", "[]", '{"parameters": {}}', '{"parameters": 7, "cells": []}', STORED % "7", STORED % "[{}]"),
        STORED % '[{"source": "f()", "outputs": [7]}]',
        STORED % '[{"source": "f()", "outputs": [{"output_type": "stream"}]}]',
        STORED % '[{"source": 7, "outputs": []}]',
    ],
)
def test_damaged_outputs_name_their_file(store, content):
    store.parent.mkdir(parents=True)
    store.write_text(content)
    with pytest.raises(
        render.PageError, match=r"outputs/small.json is damaged .*; delete it and run the chapter again"
    ):
        page(chapter("f()"))


# --- without torch ---------------------------------------------------------------------------------------------------

WITHOUT_TORCH = """\
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name="torch")
sys.meta_path.insert(0, Block())
from pathlib import Path
from expvae_book import render
path = Path("small.md").resolve()
notebook = render.parse(path.read_text(), path)
render.execute(notebook, path)
for cell in notebook.cells:
    for output in cell.get("outputs", []):
        print(output.get("text", output.get("data", {}).get("text/plain")).strip())
assert "torch" not in sys.modules
"""
READ_ONLY = """\
from expvae_book import chapters, claims, devices, figures, matching, names, parameters, publications, recipes, report
from expvae_book import runs, tables
from expvae_book.data import card, catalogue
print(runs.reading())"""


def without_torch(text):
    Path("small.md").write_text(text)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", WITHOUT_TORCH]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_a_page_with_stored_outputs_is_rendered_without_torch(store):
    text = chapter("import torch\ntorch.ones(1)", ("report", READ_ONLY))
    keep(text, "kept")
    done = without_torch(text)
    assert (done.returncode, done.stdout) == (0, "kept\nTrue\n"), done.stderr
    done = without_torch(chapter("1", ("report", "import torch")))
    assert re.search(r"small\.md:\d+: code cell 3 failed", done.stderr)


def test_another_page_says_that_it_needs_torch(store):
    cells = "print('before')", "from expvae_book import training", "print('after')"
    text = chapter(*cells).replace("expvae:\n  data_set: dsprites\n", "")
    done = without_torch(text)
    assert (done.returncode, done.stdout) == (0, f"{render.NO_TORCH}\n"), done.stderr
    done = without_torch(text.replace("expvae_book import training", "nowhere import training"))
    assert "No module named 'nowhere'" in done.stderr


def test_what_rendering_needs_has_the_bounds_of_the_project():
    lines = (places.REPOSITORY / "book" / "requirements.txt").read_text().splitlines()
    needed = [line for line in lines if not line.startswith("#")]
    project = tomllib.loads((places.REPOSITORY / "pyproject.toml").read_text())["project"]
    assert set(needed) <= {*project["dependencies"], *project["optional-dependencies"]["book"]}
    assert not any(line.startswith(("torch", "scikit-learn", "papermill")) for line in needed)
    assert any(line.startswith("jupyter-book") for line in needed)
