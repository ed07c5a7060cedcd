"""The reader of the book: what a cell puts onto its page, what its error says, and that pages do not meet."""

import os
import random
import re
import subprocess
import sys
import warnings
from itertools import chain
from pathlib import Path

import matplotlib as mpl
import nbformat
import numpy as np
import pytest
import torch
from IPython import get_ipython
from IPython.core.interactiveshell import InteractiveShell

from expvae_book import render
from pages import outputs, page_text


@pytest.fixture
def rendered(tmp_path):
    def rendered(*cells, **options):
        """The outputs of a page's code cells."""
        found = outputs(tmp_path / "page.md", *cells, **options)
        for output in chain(*found):
            nbformat.validate(output, ref="output", version=4)
        return found

    return rendered


def test_outputs_are_those_of_a_kernel_in_their_order(rendered):
    code = """\
        import sys
        from IPython.display import HTML, Image, display
        print("one", end=" ")
        print("two")
        display(HTML("<b>three</b>"))
        print("four", file=sys.stderr)
        HTML("<i>five</i>")"""
    (shown,) = rendered(code)
    assert [output.output_type for output in shown] == ["stream", "display_data", "stream", "execute_result"]
    assert (shown[0].name, shown[0].text) == ("stdout", "one two\n")
    assert shown[1].data["text/html"] == "<b>three</b>"
    assert (shown[2].name, shown[2].text) == ("stderr", "four\n")
    assert shown[3].data["text/html"] == "<i>five</i>"


@pytest.mark.parametrize(("code", "count"), [("1 + 1", 1), ("1 + 1;", 0), ("x = 1", 0), ("", 0), ("1\n2", 1)])
def test_a_cell_shows_its_last_expression_unless_it_ends_in_a_semicolon(rendered, code, count):
    (shown,) = rendered(code)
    assert len(shown) == count


def test_figures_are_shown_as_notebooks_show_them(rendered):
    code = "import matplotlib.pyplot as plt\n_ = plt.plot([1, 2])"
    bytes_of = "class Shown:\n    def _repr_png_(self):\n        return b'picture'\nShown()"
    for _ in range(2):  # the second page of a process as the first
        figure, other = rendered(code, bytes_of)
        assert [output.output_type for output in figure] == ["display_data"]
        assert figure[0].data["image/png"].startswith("iVBOR")
        assert other[0].data["image/png"] == "cGljdHVyZQ=="


def test_magics_and_await_work(rendered):
    shown = rendered("%config InlineBackend.figure_format = 'svg'", "import asyncio\nawait asyncio.sleep(0, 'slept')")
    assert shown[1][0].data["text/plain"] == "'slept'"


def test_clear_output(rendered):
    from_a_cell = "from IPython.display import clear_output\nprint('gone')\nclear_output()\nprint('there')"
    assert [output.text for output in rendered(from_a_cell)[0]] == ["there\n"]


@pytest.mark.parametrize(
    ("cells", "number", "line"),
    [
        (("1", "x = 0\n\n1 / x"), 2, 20),
        (("def divide():\n    return 1 / 0", "x = 1\ndivide()"), 2, 20),
        (("x = (",), 1, 14),
        (("x = 1\nif x:\n1",), 1, 16),
        (("import sys\nsys.exit(3)",), 1, 15),
        (("raise KeyboardInterrupt",), 1, 14),
        (("import asyncio\nawait asyncio.sleep(0)\n1 / 0",), 1, 16),
    ],
)
def test_a_failing_cell_names_page_cell_and_line(rendered, cells, number, line):
    with pytest.raises(render.PageError) as raised:
        rendered(*cells, "print('never')")
    first, *rest = str(raised.value).splitlines()
    assert re.search(rf"/page\.md:{line}: code cell {number} failed\.$", first)
    assert "Error" in rest[-1] or "Exit" in rest[-1] or "Interrupt" in rest[-1]
    assert "\x1b" not in str(raised.value)
    assert get_ipython() is None


def test_the_line_counts_from_the_page_and_not_from_the_options_of_the_cell(rendered):
    with pytest.raises(render.PageError, match=r"page\.md:19: code cell 1 failed"):
        rendered("x = 1\n1 / 0", options="---\ntags: [hide-input]\nmystnb: {}\n---\n")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (page_text("1", options=":tags: [open\n"), "Code cell 1 at line 13 could not be read"),
        (page_text("1", options=":tags: null\n"), "None is not of type 'array'"),
        ("# Text\n\n```{code-cell}\n1\n```\n", "does not say that it is a notebook"),
    ],
)
def test_a_page_that_is_not_valid_is_named(tmp_path, text, sentence):
    with pytest.raises(render.PageError, match=sentence) as raised:
        render.parse(text, tmp_path / "page.md")
    assert str(tmp_path / "page.md") in str(raised.value)


def test_a_page_of_text_keeps_its_top(tmp_path):
    notebook = render.parse("---\nkey: value\n---\n\n# Title\n\nText.\n", tmp_path / "page.md")
    assert [cell.source for cell in notebook.cells] == ["# Title\n\nText."]
    assert notebook.metadata["key"] == "value"


def test_every_cell_has_a_language(tmp_path):
    notebook = render.parse(page_text("1"), tmp_path / "page.md")
    assert notebook.metadata["language_info"]["pygments_lexer"] == "ipython3"


# What a page does to the process, and the expression that shows it.
TRACES = {
    "name": ("left = 1", "'left' in globals()"),
    "main": ("import sys; sys.modules['__main__'].left = 1", "hasattr(__import__('__main__'), 'left')"),
    "rcParams": ("import matplotlib; matplotlib.rcParams['figure.dpi'] = 7", "matplotlib.rcParams['figure.dpi'] == 7"),
    "figures": (
        "from matplotlib import pyplot; pyplot.ioff(); pyplot.figure()",
        "len(matplotlib.pyplot.get_fignums()) > 0",
    ),
    "python": ("import random; random.seed(0); left = random.random()", "random.random() == 0.7579544029403025"),
    "numpy": ("import numpy; numpy.random.seed(0); numpy.random.rand()", "numpy.random.rand() == 0.7151893663724195"),
    "torch": ("import torch; torch.manual_seed(0); torch.rand(1)", "abs(torch.rand(1).item() - 0.7682217955) < 1e-6"),
    "warnings": (
        "import warnings; warnings.simplefilter('error')",
        "warnings.filters[0][0] == 'error'",
    ),
    "environment": ("import os; os.environ['LEFT'] = '1'; del os.environ['HOME']", "'LEFT' in os.environ"),
    "folder": ("import os; os.chdir('/')", "os.getcwd() == '/'"),
    "path": ("import sys; sys.path.insert(0, 'left')", "'left' in sys.path"),
    "stdout": ("import io, sys; sys.stdout = io.StringIO()", "isinstance(sys.stdout, io.StringIO)"),
    "hook": ("get_ipython().set_custom_exc((KeyError,), print)", "KeyError in get_ipython().custom_exceptions"),
    "blank": ("get_ipython().input_transformers_cleanup.append(lambda lines: [])", "False"),
}
IMPORTS = "import io, os, random, sys, warnings\nimport matplotlib.pyplot, numpy, torch\n"


@pytest.mark.parametrize("kind", TRACES)
def test_a_page_leaves_nothing_to_the_next(rendered, kind):
    leave, ask = TRACES[kind]
    here = dict(os.environ), Path.cwd(), sys.path[:], sys.stdout, sys.stderr, warnings.filters[:], dict(mpl.rcParams)
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    main = sys.modules["__main__"]
    if kind != "blank":  # the expression finds the trace on the page itself
        assert rendered(leave, IMPORTS + ask)[1][0].data["text/plain"] == "True"
    else:
        rendered(leave)
    assert rendered(IMPORTS + ask)[0][0].data["text/plain"] == "False"
    now = dict(os.environ), Path.cwd(), sys.path[:], sys.stdout, sys.stderr, warnings.filters[:], dict(mpl.rcParams)
    assert now == here
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states
    assert sys.modules["__main__"] is main
    assert get_ipython() is None


def test_a_warning_is_shown_on_every_page_that_raises_it(rendered):
    for _ in range(2):
        (shown,) = rendered("import warnings\nfor _ in range(2):\n    warnings.warn('take care')")
        assert len(shown) == 1
        assert shown[0].name == "stderr"
        assert shown[0].text.count("UserWarning: take care") == 1


def test_a_logger_made_by_one_page_writes_onto_the_page_that_uses_it(rendered, capsys):
    make = "import logging\nlogger = logging.getLogger('page')\nlogger.addHandler(logging.StreamHandler())"
    use = "import logging\nlogging.getLogger('page').warning('said')"
    rendered(make)
    (shown,) = rendered(use)
    assert shown[0].text == "said\n"
    exec(use)
    assert capsys.readouterr().err == ""
    logger = sys.modules["logging"].getLogger("page")
    logger.removeHandler(logger.handlers[0])


def test_pages_only_read_runs_and_stand_in_their_own_folder(rendered, tmp_path):
    (shown,) = rendered("import os\nfrom expvae_book import runs\nprint(runs.reading(), os.getcwd())")
    assert shown[0].text == f"True {tmp_path}\n"


def test_an_import_of_torch_by_one_page_does_not_seed_the_next(tmp_path):
    code = """\
from pathlib import Path
from pages import outputs
def last(*cells):
    return float(outputs(Path("page.md"), *cells)[-1][0].data["text/plain"])
seeded = last("import torch; torch.manual_seed(0)", "float(torch.rand(()))")
assert abs(seeded - 0.4962566) < 1e-6
assert last("import torch; float(torch.rand(()))") != seeded
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)


def test_the_shell_of_a_notebook_is_left_alone(rendered):
    shell = InteractiveShell.instance()
    before = dict(os.environ)
    try:
        with pytest.raises(render.PageError, match="build the book by a process of its own"):
            rendered("1")
        assert InteractiveShell.instance() is shell
        assert dict(os.environ) == before
    finally:
        InteractiveShell.clear_instance()
