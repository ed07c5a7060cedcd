"""The reader of Jupyter Book: runs code cells of the pages in the process that builds the book.

Of a page whose outputs are stored (`expvae_book.outputs`) it runs the cells that only read records, which takes no
torch; of every other page all cells, unless they need torch and it is not there.

MyST-NB asks the readers that ``nb_custom_formats`` names before it reads Markdown itself, so that a build needs no
kernel and imports pandas and matplotlib once instead of once a page. Pages are kept apart: each has a new IPython
shell, and what it does to the state of the process is undone when it ends (see `execute`). What a page writes past
Python, to the file descriptors themselves, goes to the log of the build and onto no page.
"""

import atexit
import io
import os
import random
import sys
import tempfile
import warnings
from base64 import b64encode
from collections.abc import Iterator
from contextlib import ExitStack, chdir, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from traceback import walk_tb
from typing import Any
from unittest.mock import patch

import matplotlib as mpl
import numpy as np
from IPython.core.displayhook import DisplayHook
from IPython.core.displaypub import DisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from matplotlib_inline import backend_inline
from matplotlib_inline.config import InlineBackend
from myst_nb.core.read import MystMetadataParsingError, is_myst_markdown_notebook, read_myst_markdown_notebook
from myst_parser.config.main import MdParserConfig
from nbformat import NotebookNode, ValidationError, validate
from nbformat.v4 import new_output
from sphinx.application import Sphinx
from sphinx.errors import SphinxError
from traitlets import Type
from traitlets.config import Config

from expvae_book import outputs

# What the notebooks of a kernel say of their language; without it MyST-NB warns for each cell.
LANGUAGE = {"name": "python", "pygments_lexer": "ipython3"}
NO_TORCH = "This page needs torch to be rendered, which is not installed here: `pip install --editable '.[book]'`."


class PageError(SphinxError):
    """A page that cannot be read or a cell of it that failed; ends the build with or without -W."""

    category = "A page cannot be rendered"


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx extension: tells the reader which page it is given.

    Every page is read again in every build, because Sphinx looks only at the text of a page and would go on to show
    the runs of the build before.
    """
    app.connect("source-read", _remember)
    app.connect("env-get-outdated", lambda app, env, added, changed, removed: env.found_docs)
    return {"parallel_read_safe": True, "parallel_write_safe": True}


def read(text: str) -> NotebookNode:
    """The page that Sphinx is reading as an executed notebook; what ``nb_custom_formats`` names.

    Raises:
        PageError: If the page is not valid or a cell fails; the message names page, cell and line.
    """
    path, config = _reading
    notebook = parse(text, path, config)
    execute(notebook, path)
    return notebook


def parse(text: str, path: Path, config: MdParserConfig | None = None) -> NotebookNode:
    """A page as a notebook that has not been run, with the line at which the source of each cell begins.

    A page whose top does not say that it is a notebook is one of text.

    Raises:
        PageError: If the top or the options of a cell are not valid, or a page of text holds code cells.
    """
    text = io.StringIO(text.removeprefix("\ufeff"), newline=None).read()  # whatever mark and line ends an editor leaves
    try:
        notebook = read_myst_markdown_notebook(text, config, add_source_map=True, path=path)
        validate(notebook)
    except (MystMetadataParsingError, ValidationError) as error:
        raise PageError(f"{path}: {' '.join(str(error).split())}") from error
    if not is_myst_markdown_notebook(text) and any(cell.cell_type == "code" for cell in notebook.cells):
        raise PageError(f"{path} has code cells, and its top does not say that it is a notebook (jupytext, myst).")
    notebook.metadata["language_info"] = NotebookNode(LANGUAGE)
    lines = text.splitlines()
    for place, cell in enumerate(notebook.cells):
        # MyST-NB leaves out a cell's options and the blank lines before a text, and adds two to these numbers, from 0.
        start, source = notebook.metadata["source_map"][place], cell.source.splitlines()
        found = (line for line in range(start, len(lines)) if lines[line : line + len(source)] == source)
        notebook.metadata["source_map"][place] = next(found, start) - 1
    return notebook


def execute(notebook: NotebookNode, path: Path) -> None:
    """Run the code cells of a page in its own folder and put their outputs into the notebook.

    Of a page whose outputs are stored, compute cells get theirs and are not run.

    The page has a shell and a namespace of its own. Undone after it are changes to the environment, the working
    directory, the import path, the filters of warnings, sys.stdout and sys.stderr, the rcParams and open figures of
    matplotlib, and the global random states of Python, NumPy and PyTorch. Modules that it imports stay imported.

    Args:
        notebook: As `parse` gives it; changed in place.
        path: The page's file.

    Raises:
        PageError: If a cell fails, where the message names page, cell and line and ends with the traceback; or if this
            process is that of a notebook already.
    """
    stored = outputs.PAGE in notebook.metadata
    if stored:
        try:
            outputs.fill(notebook, path.stem)
        except ValueError as error:
            raise PageError(f"{path}: {error}") from error
    with _isolated(path.parent) as shell:
        for place, cell in enumerate(notebook.cells):
            if cell.cell_type != "code" or (stored and outputs.is_compute(cell)):
                continue
            shell.outputs = cell.outputs
            result = shell.run_cell(cell.source, store_history=True)
            cell.execution_count = shell.execution_count - 1
            error = result.error_before_exec or result.error_in_exec
            if isinstance(error, ModuleNotFoundError) and error.name == "torch" and not stored:
                outputs.show([cell for cell in notebook.cells if cell.cell_type == "code"], NO_TORCH)
                return
            if error is not None:
                number = sum(other.cell_type == "code" for other in notebook.cells[: place + 1])
                line = notebook.metadata["source_map"][place] + 1 + _line(error, shell)
                said = "\n".join(line for output in cell.outputs for line in output.get("traceback", []))
                raise PageError(f"{path}:{line}: code cell {number} failed.\n{said}")


class _Stream(io.TextIOBase):
    """Takes what is written to sys.stdout or sys.stderr to the outputs of the cell that is running.

    One for the whole process: a logger that a page makes keeps the stream for the pages after it.
    """

    def __init__(self, name: str):
        self.name = name

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if not InteractiveShell.initialized():
            return getattr(sys, f"__{self.name}__").write(text)
        outputs = InteractiveShell.instance().outputs
        if outputs and outputs[-1].get("name") == self.name:
            outputs[-1].text += text
        elif text:
            outputs.append(new_output("stream", name=self.name, text=text))
        return len(text)


_STREAMS = _Stream("stdout"), _Stream("stderr")


class _Publisher(DisplayPublisher):
    def publish(self, data: dict, metadata: dict | None = None, **_options: object) -> None:
        self.shell.outputs.append(new_output("display_data", data=_as_text(data), metadata=metadata or {}))

    def clear_output(self, wait: bool = False) -> None:
        self.shell.outputs.clear()


class _Hook(DisplayHook):
    def write_output_prompt(self) -> None:
        """A page has no prompts."""

    def write_format_data(self, format_dict: dict, md_dict: dict | None = None) -> None:
        said = {"data": _as_text(format_dict), "metadata": md_dict or {}}
        self.shell.outputs.append(new_output("execute_result", execution_count=self.shell.execution_count, **said))


class _Shell(InteractiveShell):
    """IPython without a terminal, a history or the settings of the user's home; outputs go to a list in their order."""

    display_pub_class = Type(_Publisher)
    displayhook_class = Type(_Hook)

    outputs: list[NotebookNode]  # of the cell that is running

    def enable_gui(self, gui: str | None = None) -> None:
        """A page has no windows."""

    def _showtraceback(self, etype: type, evalue: BaseException, stb: list[str]) -> None:
        self.outputs.append(new_output("error", ename=etype.__name__, evalue=str(evalue), traceback=stb))


_reading: tuple[Path, MdParserConfig]


def _remember(app: Sphinx, docname: str, _source: list[str]) -> None:
    global _reading
    _reading = Path(app.env.doc2path(docname)), app.env.myst_config


@contextmanager
def _isolated(folder: Path) -> Iterator[_Shell]:
    if InteractiveShell.initialized():  # its place would be taken
        raise PageError("Pages cannot be executed from within IPython: build the book by a process of its own.")
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, EXPVAE_MODE="read"))
        stack.enter_context(patch.object(sys, "path", sys.path[:]))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        if "torch" in sys.modules:
            stack.enter_context(sys.modules["torch"].random.fork_rng(devices=[]))
        else:  # one that the page imports is seeded anew
            stack.callback(lambda: "torch" in sys.modules and sys.modules["torch"].seed())
        home = stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(chdir(folder))
        stack.enter_context(mpl.rc_context())
        stack.enter_context(warnings.catch_warnings())
        warnings.showwarning = _show_warning
        warnings.resetwarnings()
        for category in (ResourceWarning, ImportWarning, PendingDeprecationWarning, DeprecationWarning):
            warnings.simplefilter("ignore", category)  # as Python starts
        warnings.filterwarnings("default", category=DeprecationWarning, module="__main__")
        quiet = Config(HistoryManager={"enabled": False}, InteractiveShell={"colors": "NoColor"})
        shell = _Shell.instance(ipython_dir=home, config=quiet)
        try:
            shell.enable_matplotlib("inline")
            with redirect_stdout(_STREAMS[0]), redirect_stderr(_STREAMS[1]):
                yield shell
        finally:
            pyplot = sys.modules["matplotlib.pyplot"]
            pyplot.close("all")
            pyplot.uninstall_repl_displayhook()
            backend_inline.configure_inline_support(shell, "none")
            InlineBackend.clear_instance()
            shell.restore_sys_module_state()
            atexit.unregister(shell.atexit_operations)  # it keeps a history that is not kept here
            _Shell.clear_instance()


def _show_warning(
    message: Warning, category: type, filename: str, line: int, _file: object = None, text: str | None = None
) -> None:
    """Print a warning where the page can catch it."""
    sys.stderr.write(warnings.formatwarning(message, category, filename, line, text))


def _line(error: BaseException, shell: _Shell) -> int:
    """The line of the cell, from 1, at which an error left it."""
    steps = [line for frame, line in walk_tb(error.__traceback__) if frame.f_globals is shell.user_ns]
    return steps[0] if steps else getattr(error, "lineno", None) or 1  # of a cell that is not valid Python


def _as_text(data: dict[str, Any]) -> dict[str, Any]:
    """Outputs as notebooks hold them: bytes in base64."""
    return {kind: b64encode(shown).decode() if isinstance(shown, bytes) else shown for kind, shown in data.items()}
