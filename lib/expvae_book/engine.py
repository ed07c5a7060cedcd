"""What papermill learns when it starts: to read chapters by any local path, check their parameters and store outputs.

Papermill loads this module as its engine "nbclient" (entry-point group ``papermill.engine``), whatever it is going to
run. A notebook that `expvae_book.chapters.ChapterHandler` has not read is treated as it always was. One that it has
read says so in its metadata and brings its own declarations, also after ``papermill --prepare-only``, so that nothing
that is known of one chapter can be taken for what is known of another.
"""

from pathlib import PurePath
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from expvae_book.chapters import CHAPTER, ChapterHandler
from expvae_book.parameters import check, declared
from expvae_book.streams import Streams

if TYPE_CHECKING:
    from nbformat import NotebookNode

INJECTED_PATHS = {"PAPERMILL_INPUT_PATH", "PAPERMILL_OUTPUT_PATH"}  # papermill --inject-paths


class Engine:
    """Papermill's own engine, except that it lets a chapter's parameters be checked and stores what its page shows.

    It does not inherit, because papermill may ask for it while papermill is being imported from here; the other
    functions are lent to it when that is done.
    """

    @staticmethod
    def nb_language(nb: "NotebookNode", language: str | None = None) -> str:
        """The name under which papermill finds what writes a notebook's parameters, when it is about to write them."""
        from papermill.engines import NBClientEngine
        from papermill.translators import PythonTranslator, papermill_translators

        path = nb.metadata.get(CHAPTER)
        if path is None:
            return NBClientEngine.nb_language(nb, language)
        known = declared(nb, path)

        def codify(parameters: dict[str, Any], comment: str = "Parameters") -> str:
            paths = {name: value for name, value in parameters.items() if name in INJECTED_PATHS}
            given = {name: value for name, value in parameters.items() if name not in paths}
            return PythonTranslator.codify(paths | check(given, known, path), comment)

        name = f"{path} {known}"
        papermill_translators.register(name, SimpleNamespace(codify=codify))
        return name

    @staticmethod
    def execute_notebook(nb: "NotebookNode", kernel_name: str, **options: Any) -> "NotebookNode":
        """The notebook, executed; outputs of a chapter that its page shows are stored (`expvae_book.outputs`)."""
        from papermill.engines import NBClientEngine

        path = nb.metadata.get(CHAPTER)
        if path is None:
            return NBClientEngine.execute_notebook(nb, kernel_name, **options)
        from expvae_book import outputs

        name = outputs.data_set(nb, path)  # a mistake at the top is said before anything runs
        nb = NBClientEngine.execute_notebook(nb, kernel_name, **options)
        if name is not None:
            _store(nb, path, name)
        return nb


def _store(nb: "NotebookNode", path: str, data_set: str) -> None:
    """Store the outputs for the page of a chapter, or say why they are not stored, which fails no run."""
    from papermill.log import logger

    from expvae_book import outputs

    known = declared(nb, path)
    given = {k: v for k, v in nb.metadata.papermill.get("parameters", {}).items() if k not in INJECTED_PATHS}
    parameters = {name: parameter.default for name, parameter in known.items()} | check(given, known, path)
    if departure := outputs.departure(parameters, known, data_set):
        logger.info(f"This run is not the one that the page of {path} shows: {departure}.")
        return
    try:
        logger.info(f"Outputs for the page: {outputs.store(nb, PurePath(path).stem, parameters)}")
    except (outputs.NotStoredError, OSError) as error:
        logger.warning(f"The outputs of {path} are not stored for its page: {error}.")


def _teach() -> None:
    from nbformat.v4 import new_notebook
    from papermill import engines
    from papermill.clientwrap import PapermillNotebookClient
    from papermill.engines import NBClientEngine, papermill_engines
    from papermill.iorw import papermill_io
    from papermill.models import Parameter as PapermillParameter
    from papermill.translators import PythonTranslator, papermill_translators

    class Translator(PythonTranslator):
        """Papermill's own, except for the parameters that papermill --help-notebook lists of a chapter."""

        @classmethod
        def inspect(cls, parameters_cell: "NotebookNode") -> list[PapermillParameter]:
            path = parameters_cell.metadata.get(CHAPTER)
            if path is None:
                return super().inspect(parameters_cell)
            return [
                PapermillParameter(
                    p.name, p.kind.__name__, repr(p.default), "; ".join(filter(None, (p.constraint, p.help)))
                )
                for p in declared(new_notebook(cells=[parameters_cell]), path).values()
            ]

    class Client(PapermillNotebookClient):
        """Papermill's own, except that each progress bar of a chapter is one output, also while it runs."""

        def reset_execution_trackers(self) -> None:
            super().reset_execution_trackers()
            self.streams = Streams()

        def output(self, outs: "list[NotebookNode]", msg: dict, display_id: str | None, cell_index: int) -> Any:
            out = super().output(outs, msg, display_id, cell_index)
            if out is not None and out.output_type == "stream" and CHAPTER in self.nb.metadata:
                self.streams.join(outs)
            return out

    engines.PapermillNotebookClient = Client
    Engine.nb_kernel_name = NBClientEngine.nb_kernel_name
    papermill_translators.register("python", Translator)
    papermill_engines.register(None, Engine)  # the one that is taken where none is named
    papermill_engines.register("nbclient", Engine)
    # Papermill knows handlers by how a path begins, and takes this one for "ucsd.md" and "elsewhere/ucsd.md".
    local = papermill_io.get_handler("local")
    local.read, local.write, local.pretty_path = ChapterHandler.read, ChapterHandler.write, ChapterHandler.pretty_path


_teach()
