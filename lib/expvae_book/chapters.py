"""How chapters run and are rendered: papermill executes them with checked parameters, Jupyter Book shows stored runs.

A chapter is a MyST notebook (``book/<chapter>.md``) that declares its parameters (`expvae_book.parameters`).

Papermill imports this module whenever it starts, and every chapter imports it too, so what is slow to import
(papermill, jupytext, torch) is imported by the function that needs it. `expvae_book.engine` is what papermill is
taught then.
"""

import re
import shlex
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expvae_book.parameters import ChapterError, Value, declared, parameters_cell
from expvae_book.places import REPOSITORY

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from expvae_book.runs import Run

BOOK = REPOSITORY / "book"
# A chapter that papermill has read, and its parameters cell, have the chapter's path under this key of their metadata.
CHAPTER = "expvae_chapter"


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
        for part in filter(None, [notebook, parameters_cell(notebook)]):
            part.metadata[CHAPTER] = path
        return writes(notebook)

    @staticmethod
    def write(text: str, path: str) -> None:
        """Write an executed notebook, whole or not at all.

        Raises:
            ChapterError: If the path is that of a chapter.
            OSError: If it cannot be written; what was there before stays.
        """
        from expvae_book.files import replacing

        if path.endswith(".md"):
            raise ChapterError(f"The executed notebook cannot be written to {path}: give a name that ends in .ipynb.")
        place = Path(path).resolve()
        if not place.parent.is_dir() or (place.exists() and not place.is_file()):  # papermill says so; or a device
            _local_files("write", text, path)
            return
        with replacing(place) as temporary:
            _local_files("write", text, str(temporary))

    @staticmethod
    def pretty_path(path: str) -> str:
        """The path as papermill's log shows it."""
        if path.endswith(".md"):
            # Papermill calls this before it warns that a chapter's name does not end in .ipynb.
            warnings.filterwarnings("ignore", re.escape(f"The specified file ({path}) does not end in one of"))
        return path


@dataclass
class Job:
    """What one command computes, and what is stored of it: the run that a page shows.

    Attributes:
        chapter: The chapter's name, such as "mnist".
        parameters: The parameters that tell its runs apart.
        run: The run; None until the last of its steps has stored it.
        losses: The curves of its training; None until that has been done.
    """

    chapter: str
    parameters: Mapping[str, Value]
    run: "Run | None"
    losses: Mapping[str, Sequence[float]] | None = None

    def __post_init__(self) -> None:
        if self.run is not None:
            self.losses = self.run.record["losses"]


def job(chapter: str, parameters: Mapping[str, Value], *, again: bool = False) -> Job:
    """The job of a page: under papermill or Jupyter its steps compute what is not stored.

    While Jupyter Book renders, the run is looked up as by `run`: the call has to be the last statement of its cell.

    Args:
        chapter: The chapter's name, such as "mnist".
        parameters: The parameters that tell its runs apart.
        again: Whether it is computed although it is stored.
    """
    from expvae_book import runs

    if runs.reading():
        return Job(chapter, parameters, _shown(chapter, parameters))
    _require_devices(parameters)
    stored = None if again else runs.load(chapter, parameters)
    made = Job(chapter, parameters, stored if _current(stored) else None)
    if made.run is None:
        notice(f"This run is to be computed, by the cells below. {_like(chapter, parameters)}")
    return made


def _like(chapter: str, parameters: Mapping[str, Value]) -> str:
    """How long a run of a chapter takes: what one of the same recipe and budget took."""
    from expvae_book import runs

    alike = {name: parameters[name] for name in ("recipe", "epochs", "steps") if name in parameters}
    minutes = [
        f"{sum(one.record['seconds'].values()) / 60:.0f} minutes on {one.record['device']}"
        for one in runs.find(chapter, **alike)
        if one.card.published
    ]
    return f"One like it took {minutes[-1]}, on real data." if minutes else "Its training says how long it takes."


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
    return _shown(chapter, parameters)


def _shown(chapter: str, parameters: Mapping[str, Value]) -> "Run | None":
    from expvae_book import runs

    run = runs.load(chapter, parameters)
    again = f"Make it {'again ' if run else ''}with\n\n```bash\n{command(chapter, parameters)}\n```"
    if run is None:
        wanted = ", ".join(f"{name} = {value}" for name, value in parameters.items())
        stop_page(f"No stored run of this chapter with {wanted}. {again}")
    elif run.outdated:
        _notice_outdated(f"This run is outdated: it was made by {'; '.join(run.outdated)}.", again)
    return run


def jobs(
    chapter: str, wanted: Sequence[Mapping[str, Value]], *, told_by: Sequence[str] = (), again: bool = False
) -> list[Job]:
    """The jobs of a page that shows several, such as one for each category; see `job`.

    While Jupyter Book renders, runs that are missing stop the page only if all are, and outdated ones are named in a
    warning.

    Args:
        chapter: The chapter's name.
        wanted: The parameters of each.
        told_by: The parameters by which notices name a run; by default those in which the runs differ.
        again: Whether they are computed although they are stored.
    """
    from expvae_book import runs

    stored = [runs.load(chapter, one) for one in wanted]
    if not runs.reading():
        _require_devices(*wanted)
        kept = [run if _current(run) and not again else None for run in stored]
        missing = [one for one, run in zip(wanted, kept, strict=True) if run is None]
        if missing:
            said = f"{len(missing)} of {len(wanted)} runs are not stored; the cells below compute those they can."
            notice(f"{said} {_like(chapter, missing[0])}")
        return [Job(chapter, one, run) for one, run in zip(wanted, kept, strict=True)]
    differing = [name for name, value in wanted[0].items() if any(one[name] != value for one in wanted)]
    told_by = told_by or differing or list(wanted[0])
    names = [", ".join(str(one[name]) for name in told_by) for one in wanted]
    if not any(stored):
        stop_page(f"No stored run of this chapter for any {', '.join(told_by)} of {'; '.join(dict.fromkeys(names))}.")
    pairs = zip(names, stored, strict=True)
    old = dict.fromkeys(f"{name} ({', '.join(run.outdated)})" for name, run in pairs if run and run.outdated)
    if old:
        said = f"These runs are outdated, because they were made by earlier protocols: {'; '.join(old)}."
        _notice_outdated(said, "Run the chapter again.")
    return [Job(chapter, one, run) for one, run in zip(wanted, stored, strict=True)]


def whole(run: "Run") -> bool:
    """Whether a run had the budget that its parameters ask for, and was not told to end early."""
    budget, asked = run.record["budget"], run.parameters.get("steps", run.parameters.get("epochs", 0))
    if asked and budget["unit"] == "images":
        asked *= run.record["training"]["images"]
    return budget["used"] >= asked


def _current(run: "Run | None") -> bool:
    return run is not None and not run.outdated and whole(run) and run.of_data_at_hand


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

    def forget(result: Any) -> None:
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


def _notebook(text: str, path: str) -> "NotebookNode":
    import jupytext
    from jupytext.myst import MystMetadataParsingError
    from myst_nb.core.read import is_myst_markdown_notebook
    from nbformat import ValidationError, validate
    from yaml import YAMLError

    text = text.removeprefix("\ufeff")  # which some editors write before UTF-8
    try:
        if not is_myst_markdown_notebook(text):
            raise ChapterError(f"{path} is not a chapter that can be run: its top does not say that it is a notebook.")
        notebook = jupytext.reads(text, fmt="md:myst")
        validate(notebook)
    except (MystMetadataParsingError, YAMLError, ValidationError) as error:
        raise ChapterError(f"{path} cannot be read as a MyST notebook: {' '.join(str(error).split())}.") from None
    if "kernelspec" not in notebook.metadata:
        raise ChapterError(f"{path} is not a chapter that can be run: its top names no kernelspec.")
    return notebook
