"""How chapters run and are rendered: papermill executes them with checked parameters, Jupyter Book shows stored runs.

A chapter is a MyST notebook (``book/<chapter>.md``). Its cell with the tag ``parameters`` declares one a line::

    digit: int = 1  # 0 | 1 | 2 | 3; the inlier class
    layer: str = "conv3"  # conv1 | conv2 | conv3
    epochs: int = 100  # 1 or more; passes over the training images
    learning_rate: float = 1e-3  # above 0; step size of Adam
    seed: int = 0  # 0 to 4294967295; fixes all that is drawn
    note: str = ""  # ; free text goes behind the first semicolon

The types are int, float, str and bool. Papermill imports this module whenever it starts, and every chapter imports it
too, so what is slow to import (papermill, jupytext, torch) is imported by the function that needs it.
`expvae_book.engine` is what papermill is taught when it starts.
"""

import ast
import io
import math
import re
import shlex
import tokenize
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

import click

from expvae_book.places import REPOSITORY

if TYPE_CHECKING:
    from IPython.core.interactiveshell import ExecutionResult
    from nbformat import NotebookNode

    from expvae_book.runs import Run

BOOK = REPOSITORY / "book"
KINDS = {int: "a whole number", float: "a number", str: "text", bool: "True or False"}
# A chapter that papermill has read, and its parameters cell, have the chapter's path under this key of their metadata.
CHAPTER = "expvae_chapter"
INJECTED_PATHS = {"PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}  # papermill --inject-paths

Value = int | float | str | bool


class ChapterError(click.ClickException, ValueError):
    """A mistake in a chapter or in its parameters: one sentence on the command line, a ValueError in Python."""


@dataclass(frozen=True)
class Parameter:
    """One parameter that a chapter declares."""

    name: str
    kind: type
    default: Value | None  # None while the declaration is being read
    constraint: str = ""  # as written: "0 | 1 | 2", "0 or more", "above 0", "0 to 9" or nothing
    choices: tuple[Value, ...] = ()
    lowest: float = -math.inf
    highest: float = math.inf
    help: str = ""

    def __str__(self) -> str:
        """What a value must be, such as "a whole number: 0 or more"."""
        return KINDS[self.kind] + (f": {self.constraint}" if self.constraint else "")

    def value(self, given: object) -> Value:
        """The given value in the parameter's type.

        Text is parsed (``papermill -r`` passes nothing else). A whole number is turned back into text where text is
        wanted, because ``papermill -p`` guesses types and makes a number of every text that looks like one.

        Raises:
            ValueError: If the value has another type, is not among the choices or is out of range.
        """
        value = _convert(given, self.kind)
        allowed = self.lowest <= value <= self.highest if isinstance(value, float | int) else True
        if not allowed or (self.choices and value not in self.choices):
            raise ValueError(f"{value!r} is not {self.constraint!r}")
        return value


def declared(notebook: "NotebookNode", path: str) -> dict[str, Parameter]:
    """The parameters that a chapter declares, by name; none where no cell has the tag ``parameters``.

    Args:
        notebook: The chapter.
        path: The name that error messages give it.

    Raises:
        ChapterError: If a line of the cell is no declaration, or a default does not keep its own declaration.
    """
    cell = _parameters_cell(notebook)
    if cell is None:
        return {}
    source = cell.source
    try:
        statements = ast.parse(source).body
    except SyntaxError as error:
        line = (error.text or "").strip()
        raise ChapterError(f"{path}: the parameters cell is not valid Python: {error.msg}, in {line!r}.") from None
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0]: token.string.lstrip("# ") for token in tokens if token.type == tokenize.COMMENT}
    parameters = [
        _declaration(statement, " ".join(comments[line] for line in lines if line in comments), path)
        for statement in statements
        for lines in [range(statement.lineno, statement.end_lineno + 1)]  # a formatter may break a long line
    ]
    return {parameter.name: parameter for parameter in parameters}


def check(parameters: Mapping[str, object], known: Mapping[str, Parameter], path: str) -> dict[str, Value]:
    """The given parameters in the declared types.

    Raises:
        ChapterError: If the chapter declares no parameter of a given name, or a value breaks its declaration.
    """
    unknown = [name for name in parameters if name not in known]
    if unknown:
        valid = f"it has {', '.join(known)}" if known else "it has none"
        raise ChapterError(f"{path} has no parameter {', '.join(map(repr, unknown))}; {valid}.")
    checked = {}
    for name, given in parameters.items():
        try:
            checked[name] = known[name].value(given)
        except (ValueError, OverflowError):
            raise ChapterError(f"{path}: {name} = {given!r} is not allowed; give {known[name]}.") from None
    return checked


class ChapterHandler:
    """How papermill reads chapters and writes notebooks, any path of which it leaves to its handler of local files.

    `expvae_book.engine` puts these functions into that handler. Files that are not Markdown are read as they were.
    """

    @staticmethod
    def read(path: str) -> str:
        """The file as the JSON of a notebook.

        The notebook of a chapter says which chapter it is, so that its parameters are checked when papermill writes
        them into it, which is before a kernel starts and before a file is written; see `expvae_book.engine`.

        Raises:
            ChapterError: If there is no such chapter, or its parameters cell is wrong.
        """
        if not path.endswith(".md"):
            return _local_files("read", path)
        from nbformat import writes

        try:
            notebook = _notebook(_local_files("read", path), path)
        except FileNotFoundError:
            raise ChapterError(f"There is no chapter {path}.") from None
        except UnicodeDecodeError:
            raise ChapterError(f"{path} is not a chapter that can be run: it is not text in UTF-8.") from None
        declared(notebook, path)
        notebook.metadata["language_info"] = {"name": "python"}
        for part in filter(None, [notebook, _parameters_cell(notebook)]):
            part.metadata[CHAPTER] = path
        return writes(notebook)

    @staticmethod
    def write(text: str, path: str) -> None:
        """Write an executed notebook.

        Raises:
            ChapterError: If the path is that of a chapter.
        """
        if path.endswith(".md"):
            raise ChapterError(f"The executed notebook cannot be written to {path}: give a name that ends in .ipynb.")
        _local_files("write", text, path)

    @staticmethod
    def pretty_path(path: str) -> str:
        """The path as papermill's log shows it."""
        if path.endswith(".md"):
            # Papermill calls this before it warns that a chapter's name does not end in .ipynb.
            warnings.filterwarnings("ignore", re.escape(f"The specified file ({path}) does not end in one of"))
        return path


def run(chapter: str, parameters: Mapping[str, Value], compute: Callable[[], "Run"]) -> "Run | None":
    """The run of a chapter: computed under papermill or Jupyter, only looked up while Jupyter Book renders.

    While Jupyter Book renders, a missing run stops the page (see `stop_page`): the call has to be the last statement
    of its cell. An outdated run is shown under a warning, and the first later cell that asks it for something that it
    lacks stops the page. Every other error, and that of a run that is not outdated, fails the build.

    Args:
        chapter: The chapter's name, such as "mnist".
        parameters: The parameters that tell its runs apart.
        compute: Makes the run, stores it and returns it.

    Returns:
        The run, or None where the page has been stopped.
    """
    from expvae_book import runs

    if not runs.reading():
        _require_devices(parameters)
        return compute()
    run = runs.load(chapter, parameters)
    again = f"Make it {'again ' if run else ''}with\n\n```bash\n{command(chapter, parameters)}\n```"
    if run is None:
        wanted = ", ".join(f"{name} = {value}" for name, value in parameters.items())
        stop_page(f"No stored run of this chapter with {wanted}. {again}")
    elif run.outdated:
        _notice_outdated(f"This run is outdated: it was made by {'; '.join(run.outdated)}.", again)
    return run


def run_each(
    chapter: str,
    parameters: Mapping[str, Value],
    name: str,
    values: Sequence[Value],
    compute: Callable[[dict[str, Value]], "Run | None"],
) -> "dict[Value, Run | None]":
    """One run for each value of a parameter, such as for each category of a data set; see `run_all`.

    Args:
        chapter: The chapter's name, such as "mvtec15".
        parameters: The parameters that all runs share.
        name: The parameter in which they differ, such as "category".
        values: Its values.
        compute: Makes and stores the run with the parameters given and returns it, or None where that cannot be done.
    """
    wanted = [{name: value, **parameters} for value in values]
    found = run_all(chapter, wanted, lambda missing: map(compute, missing), told_by=[name])
    return dict(zip(values, found, strict=True))


def run_all(
    chapter: str,
    wanted: Sequence[Mapping[str, Value]],
    compute: "Callable[[list[dict[str, Value]]], Iterable[Run | None]]",
    told_by: Sequence[str] = (),
) -> "list[Run | None]":
    """The runs with each of several sets of parameters.

    Under papermill or Jupyter a run that is stored already is taken as it is, unless it is outdated or was made from
    other data than those at hand, so that a chapter that was killed goes on where it was; the others are computed.
    While Jupyter Book renders they are only looked up. A run that is missing is None and stops the page only if all
    are; outdated ones are named in a warning.

    Args:
        chapter: The chapter's name.
        wanted: The parameters of each run.
        compute: From the parameters of the missing runs to these runs, in this order, each stored when it is given out;
            None for one that cannot be made.
        told_by: The parameters by which notices name a run; by default those in which the runs differ.
    """
    from expvae_book import runs

    found = [runs.load(chapter, one) for one in wanted]
    told_by = told_by or [name for name, value in wanted[0].items() if any(one[name] != value for one in wanted)]
    names = [", ".join(str(one[name]) for name in told_by) for one in wanted]
    if not runs.reading():
        _require_devices(*wanted)
        missing = [i for i, run in enumerate(found) if run is None or run.outdated or not run.of_data_at_hand]
        made = compute([dict(wanted[place]) for place in missing]) if missing else []
        for place, run in zip(missing, made, strict=True):
            found[place] = run or found[place]  # an outdated run rather than none
    elif not any(found):
        stop_page(f"No stored run of this chapter for any {', '.join(told_by)} of {'; '.join(dict.fromkeys(names))}.")
    pairs = zip(names, found, strict=True)
    old = dict.fromkeys(f"{name} ({', '.join(run.outdated)})" for name, run in pairs if run and run.outdated)
    if old:
        said = f"These runs are outdated, because they were made by earlier protocols: {'; '.join(old)}."
        _notice_outdated(said, "Run the chapter again.")
    return found


def command(chapter: str, parameters: Mapping[str, Value]) -> str:
    """The command that makes a run, with the parameters that differ from the chapter's defaults."""
    path = f"book/{chapter}.md"
    known = declared(_notebook((BOOK / f"{chapter}.md").read_text(encoding="utf-8"), path), path)
    other = {name for name, parameter in known.items() if parameters.get(name, parameter.default) != parameter.default}
    options = [word for name in known if name in other for word in ("-p", name, str(parameters[name]))]
    return shlex.join(["papermill", path, "out.ipynb", *options])


def notice(markdown: str, kind: str = "note") -> None:
    """Show a note on the page: an admonition in the book, quoted text in Jupyter and in papermill's output.

    Args:
        markdown: The text; code fences in it have three backticks.
        kind: The admonition, such as "note" or "warning".
    """
    from IPython.display import display

    from expvae_book import runs

    if runs.reading():
        rendered = f"````{{{kind}}}\n{markdown}\n````"
    else:
        rendered = "\n".join(f"> {line}" for line in markdown.splitlines())
    display({"text/markdown": rendered, "text/plain": markdown}, raw=True)


def stop_page(markdown: str) -> None:
    """Show a notice and let all later code cells of this page do nothing, without an error.

    The rest of the cell that calls it still runs.
    """
    from IPython import get_ipython

    shell = get_ipython()
    if shell is None:
        raise RuntimeError("stop_page stops the cells of a notebook and has to be called in one")
    notice(markdown, "warning")
    shell.input_transformers_cleanup.append(lambda lines: [])


def _require_devices(*wanted: Mapping[str, Value]) -> None:
    # Before anything is computed; papermill cannot ask, whose process need not be where the kernel is.
    from expvae_book import devices

    for parameters in wanted:
        devices.choose_device(parameters.get("device", "auto"))


def _notice_outdated(said: str, again: str) -> None:
    """Show that runs are outdated, and let the first later cell that asks one for what it lacks stop the page.

    Outside a notebook there is no page to stop.
    """
    from IPython import get_ipython

    notice(f"{said} {again}", "warning")
    shell = get_ipython()
    if shell is None:
        return
    lacking = (KeyError, FileNotFoundError)  # what `expvae_book.runs` raises

    def stop(*_error: object, **_options: object) -> list[str]:
        stop_page(f"The stored run lacks what this page shows from here on. {again}")
        return []

    def forget(result: "ExecutionResult | None") -> None:
        if result is not None and isinstance(result.error_in_exec, lacking):
            result.error_in_exec = None  # the kernel would report it, although the notice has answered it

    shell.set_custom_exc(lacking, stop)
    shell.events.register("post_run_cell", forget)


def _local_files(action: str, *arguments: str) -> Any:
    # Papermill's own handler and not a new one: papermill tells it in which folder relative paths begin. Asked by its
    # class, because `expvae_book.engine` lets the handler itself come here.
    from papermill.iorw import papermill_io

    handler = papermill_io.get_handler("local")
    return getattr(type(handler), action)(handler, *arguments)


def _parameters_cell(notebook: "NotebookNode") -> "NotebookNode | None":
    return next((cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])), None)


def _notebook(text: str, path: str) -> "NotebookNode":
    import jupytext
    from jupytext.myst import MystMetadataParsingError
    from myst_nb.core.read import is_myst_markdown_notebook
    from yaml import YAMLError

    text = text.removeprefix("\ufeff")  # which some editors write before UTF-8
    try:
        if not is_myst_markdown_notebook(text):
            raise ChapterError(f"{path} is not a chapter that can be run: its top does not say that it is a notebook.")
        notebook = jupytext.reads(text, fmt="md:myst")
    except (MystMetadataParsingError, YAMLError) as error:
        raise ChapterError(f"{path} cannot be read as a MyST notebook: {' '.join(str(error).split())}.") from None
    if "kernelspec" not in notebook.metadata:
        raise ChapterError(f"{path} is not a chapter that can be run: its top names no kernelspec.")
    return notebook


def _declaration(statement: ast.stmt, comment: str, path: str) -> Parameter:
    line = ast.unparse(statement)
    kinds = {kind.__name__: kind for kind in KINDS}
    match statement:
        case ast.AnnAssign(ast.Name(name), ast.Name(kind_name), ast.expr() as value) if kind_name in kinds:
            kind = kinds[kind_name]
        case _:
            raise ChapterError(f"{path}: {line!r} in the parameters cell must read 'name: int|float|str|bool = value'.")
    constraint, _, text = (part.strip() for part in comment.partition(";"))
    try:
        parameter = Parameter(name, kind, None, constraint, *_limits(constraint, kind), text)
    except ValueError:
        raise ChapterError(
            f"{path}: the comment {comment!r} on {name} must begin with 'a | b | c' in the parameter's type, "
            "with 'N or more', 'above N' or 'N to M' for a number, or with a semicolon."
        ) from None
    try:
        default = ast.literal_eval(value)
        if type(default) not in (kind, int if kind is float else kind) or parameter.value(default) != default:
            raise ValueError(default)
    except (ValueError, OverflowError):
        raise ChapterError(f"{path}: the default of {name} must be {parameter}, written out: {line!r}.") from None
    return replace(parameter, default=default)


def _limits(constraint: str, kind: type) -> tuple[tuple[Value, ...], float, float]:
    """The choices, the lowest and the highest number that a constraint allows."""
    if "|" in constraint:
        return tuple(_convert(choice.strip(), kind) for choice in constraint.split("|")), -math.inf, math.inf
    bound = re.fullmatch(r"above (\S+)|(\S+) or more|(\S+) to (\S+)", constraint) if kind in (int, float) else None
    if bound is None and constraint:
        raise ValueError(f"{constraint!r} constrains no {kind.__name__}")
    above, least, first, last = bound.groups() if bound else (None, "-inf", None, None)
    lowest = math.nextafter(float(above), math.inf) if above else float(least or first)
    return (), lowest, float(last or math.inf)


def _convert(given: object, kind: type) -> Value:
    text = given.strip() if isinstance(given, str) else None
    whole = isinstance(given, Integral) and not isinstance(given, bool)
    if kind is bool and (isinstance(given, bool) or text in ("True", "true", "False", "false")):
        return given if isinstance(given, bool) else text in ("True", "true")
    # Papermill makes numbers of `-p gammas 10` and `-p lambdas 0.5`, whatever the parameter is.
    if kind is str and (whole or isinstance(given, str) or (isinstance(given, float) and math.isfinite(given))):
        return str(given)
    if kind is int and (whole or (text is not None and re.fullmatch(r"[+-]?[0-9]+", text))):
        return int(given)
    if kind is float and (text is not None or (isinstance(given, Real) and not isinstance(given, bool))):
        number = float(given)
        if math.isfinite(number):
            return number
    raise ValueError(f"{given!r} is no {kind.__name__}")
