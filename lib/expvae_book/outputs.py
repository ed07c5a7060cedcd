"""The outputs that the page of a chapter shows: papermill's run stores them, the reader of the book puts them in.

A chapter whose page is made so says it at its top, which is the metadata of its notebook, with the data set whose files
its outputs need::

    expvae:
      data_set: mnist

Its *compute cells*, all but those with the tag ``parameters`` or ``report``, are run by papermill and never while the
book is built. The page shows one invocation: that of the parameters' defaults on real data. A run of it leaves their
outputs in runs/outputs/<chapter>.json, without what was printed to the error stream and without progress bars.

An output belongs to the source of its cell, apart from comments and formatting, so that a changed cell alone loses its
own. Sources are stored as they were written and compared as the Python that reads them writes them out.
"""

import ast
import json
import os
import re
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from IPython.core.displayhook import DisplayHook
from nbformat import NotebookNode, from_dict, validate
from nbformat.v4 import new_output

from expvae_book import files, places, provenance, runs
from expvae_book.data import catalogue
from expvae_book.data import root as data_root
from expvae_book.parameters import ChapterError, Value, declared

if TYPE_CHECKING:
    from expvae_book.parameters import Parameter

PAGE = "expvae"  # what a chapter says at its top
RENDERED = {"parameters", "injected-parameters", "report"}  # tags of cells that are no compute cells
UNSEEN = {"hide-cell", "hide-output", "remove-cell", "remove-output"}  # tags of cells whose outputs no reader meets
LIMIT = 1_500_000  # bytes a page
# Parameters that may differ from what the page shows: where it is computed, whether again, and data, which are real.
FREE = {*runs.WHERE_GIVEN, "again", "data"}
# The end of a bar of tqdm: the time it took and may take.
BAR = re.compile(r"^.*\[(?:\d+:)+\d\d[<,][^\]\n]*\] *\n?", re.MULTILINE)


class NotStoredError(ValueError):
    """Outputs that a page cannot show; the message is one sentence that says why."""


def data_set(notebook: NotebookNode, path: str) -> str | None:
    """The data set whose files the outputs of a chapter need; None where its page is executed while the book is built.

    Args:
        notebook: The chapter.
        path: The name that error messages give it.

    Raises:
        ChapterError: If its top names none of the catalogue.
    """
    said = notebook.metadata.get(PAGE)
    if said is None:
        return None
    name = said.get("data_set") if isinstance(said, Mapping) else None
    if not isinstance(name, str) or name not in catalogue.SOURCES:
        known = ", ".join(catalogue.SOURCES)
        raise ChapterError(f"{path}: data_set of {PAGE} at its top must be one of {known}; got {name!r}.")
    return name


def is_compute(cell: NotebookNode) -> bool:
    """Whether a cell of such a chapter is one whose outputs are stored."""
    return cell.cell_type == "code" and RENDERED.isdisjoint(cell.metadata.get("tags", []))


def normalised(source: str) -> str:
    """The source of a cell without comments and formatting; as it is where it is not plain Python.

    A semicolon at its end stays, because it keeps the cell from showing what it ends with.
    """
    try:
        quiet = DisplayHook.semicolon_at_end_of_expression(source)
        return ast.unparse(ast.parse(source)) + ";" * quiet
    except SyntaxError:
        return source.strip()


def departure(given: Mapping[str, Value], known: "Mapping[str, Parameter]", name: str) -> str:
    """How an invocation differs from the one that the page shows, as the rest of a sentence; empty where it does not.

    Args:
        given: The parameters given.
        known: Those that the chapter declares.
        name: The data set whose files its outputs need.
    """
    other = {key: value for key, value in given.items() if key not in FREE and value != known[key].default}
    if other:
        return f"it has {', '.join(f'{key} = {value!r}' for key, value in other.items())}"
    data = given.get("data", known["data"].default) if "data" in known else "real"
    real = data == "real" or name == "dsprites" or (data == "auto" and name in catalogue.at_hand(data_root()))
    return "" if real else f"it ran without the files of {catalogue.source(name).title}"


def store(notebook: NotebookNode, chapter: str, parameters: Mapping[str, Value]) -> Path:
    """Store the outputs of an executed chapter's compute cells for its page, in place of those of an earlier run.

    Args:
        notebook: The chapter, executed.
        chapter: Its name, such as "mnist".
        parameters: All its parameters, as they were.

    Returns:
        Where they are.

    Raises:
        NotStoredError: If a cell failed, an output names a folder of this machine, or they are too large for a page.
        OSError: If they cannot be written.
    """
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    if any(output.output_type == "error" for cell in cells for output in cell.outputs):
        raise NotStoredError("a cell failed")
    cells = [cell for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]
    kept = {
        f"code cell {number}": {"source": cell.source, "outputs": _kept(cell.outputs, f"code cell {number}")}
        for number, cell in enumerate(cells, 1)
        if is_compute(cell)
    }
    made = {"git": provenance.commit(), "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
    stored = {"chapter": chapter, "parameters": dict(parameters), **made, "cells": list(kept.values())}
    text = json.dumps(stored, indent=1, ensure_ascii=False) + "\n"
    if len(text.encode()) > LIMIT:
        sizes = {where: len(json.dumps(cell, ensure_ascii=False).encode()) for where, cell in kept.items()}
        largest = max(sizes, key=sizes.__getitem__)
        raise NotStoredError(
            f"they take {len(text.encode()):,} bytes, and those of a page may take {LIMIT:,}; {largest} has the most, "
            f"{sizes[largest]:,}"
        )
    path = _path(chapter)
    with files.replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def fill(notebook: NotebookNode, chapter: str) -> None:
    """Put stored outputs under the compute cells of a page.

    A cell that has changed since says so. Where none are stored, or those of another invocation, because a default has
    changed since, the first cell says how they are made.

    Args:
        notebook: The page; changed in place.
        chapter: The chapter's name.

    Raises:
        ValueError: If what is stored is damaged; the message names the file.
    """
    compute = [cell for cell in notebook.cells if is_compute(cell)]
    stored, command = _load(chapter), f"`papermill book/{chapter}.md out.ipynb`"
    known = {name: parameter.default for name, parameter in declared(notebook, chapter).items() if name not in FREE}
    if stored is None or any(value != known.get(name, value) for name, value in stored[0].items()):
        show(compute, f"No outputs of this page are stored: {command} runs it on the real data and stores them.")
        return
    left = defaultdict(list)
    for source, shown in stored[1]:
        left[source].append(shown)
    for cell in compute:
        same = left[normalised(cell.source)]
        changed = f"This cell has changed since its output was stored; {command} stores it again."
        cell.outputs = same.pop(0) if same else [notice(changed, "note")]


def show(cells: Sequence[NotebookNode], markdown: str) -> None:
    """Show a notice in place of the outputs of some code cells of a page, once, where a reader meets it."""
    for cell in cells:
        cell.outputs = []
    seen = [cell for cell in cells if UNSEEN.isdisjoint(cell.metadata.get("tags", []))]
    for cell in (seen or list(cells))[:1]:
        cell.outputs = [notice(markdown, "warning")]


def notice(markdown: str, kind: str) -> NotebookNode:
    """An admonition as an output of a cell of a page."""
    return new_output("display_data", {"text/markdown": f"````{{{kind}}}\n{markdown}\n````", "text/plain": markdown})


def _path(chapter: str) -> Path:
    return runs.root() / "outputs" / f"{chapter}.json"


def _load(chapter: str) -> tuple[dict[str, Any], list[tuple[str, list[NotebookNode]]]] | None:
    """The parameters of what is stored, and of each cell the normalised source and the outputs."""
    try:
        stored = json.loads(_path(chapter).read_text(encoding="utf-8"))
        cells = [(normalised(cell["source"]), from_dict(cell["outputs"])) for cell in stored["cells"]]
        for output in (output for _, shown in cells for output in shown):
            validate(output, ref="output", version=4)
        return dict(stored["parameters"]), cells
    except FileNotFoundError:
        return None
    except Exception as error:  # of json, nbformat or Python, by the place that is damaged
        raise ValueError(
            f"{_path(chapter)} is damaged ({files.reason(error)}); delete it and run the chapter again"
        ) from error


def _kept(outputs: Sequence[NotebookNode], where: str) -> list[NotebookNode]:
    """What a page shows of a cell's outputs."""
    kept = []
    for output in outputs:
        output = from_dict(output)
        if output.get("name") == "stderr":
            continue
        if output.output_type == "stream":
            output.text = BAR.sub("", output.text)
        if output.output_type == "execute_result":
            output.execution_count = None  # counted with the cell that papermill writes parameters into
        if output.get("text", "shown").strip():
            _require_no_folder(output, where)
            kept.append(output)
    return kept


def _require_no_folder(output: NotebookNode, where: str) -> None:
    texts = [output.get("text", "")]
    for kind, shown in output.get("data", {}).items():
        if not kind.startswith(("image/", "video/", "audio/", "application/pdf")) or kind == "image/svg+xml":
            texts.append(shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False))
    for folder in _folders():
        found = re.compile(rf"(?<![\w.]){re.escape(folder)}(?![\w-])")  # and not the end of an address
        if any(map(found.search, texts)):
            raise NotStoredError(f"what {where} shows names a folder of this machine, {folder}; let it show no path")


def _folders() -> set[str]:
    """Folders of this machine that no page should name."""
    cache = places.setting("EXPVAE_CACHE", "~/.cache/expvae")
    home = os.path.expanduser("~")  # noqa: PTH111 - pathlib's raises without a home
    named = [
        places.REPOSITORY,
        Path(home),
        Path(tempfile.gettempdir()),
        Path(sys.prefix),
        data_root(),
        runs.root(),
        cache,
    ]
    both = {path for folder in named for path in (folder, folder.resolve())}
    return {str(folder) for folder in both if len(folder.parts) > 1}
