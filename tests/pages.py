"""The pages of the book, small pages with code cells, and what the reader of the book makes of them."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import yaml

from expvae_book import render

REPOSITORY = Path(__file__).resolve().parents[1]
BOOK = REPOSITORY / "book"
CONTENTS = yaml.safe_load((BOOK / "_toc.yml").read_text())
PAGES = [one["file"] for entry in CONTENTS["chapters"] for one in (entry, *entry.get("sections", ()))]
PAGES += [CONTENTS["root"]]

HEADER = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  name: python3
---

# A page

"""


def page_text(*cells: str, options: str = "") -> str:
    """The text of a page with these code cells, which all have the same options."""
    fences = [f"```{{code-cell}} ipython3\n{options}{textwrap.dedent(cell)}\n```\n" for cell in cells]
    return HEADER + "\n".join(fences)


def outputs(path: Path, *cells: str, **options: str) -> list[list]:
    """The outputs of each code cell of such a page at a path that need not exist."""
    notebook = render.parse(page_text(*cells, **options), path)
    render.execute(notebook, path)
    return [cell.outputs for cell in notebook.cells if cell.cell_type == "code"]


def printed(cells: list[list]) -> str:
    """What the cells printed."""
    return "".join(output.get("text", "") for outputs in cells for output in outputs)


def notices(cells: list[list]) -> str:
    """The Markdown that the cells show."""
    return "\n".join(
        output.data.get("text/markdown", "") for outputs in cells for output in outputs if "data" in output
    )


def build(book: Path, output: Path, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """Build a book as the README says, but elsewhere; by default with warnings as errors."""
    program = Path(sys.executable).with_name("jupyter-book")
    return subprocess.run(
        [program, "build", book, "--path-output", output, *(options or ("-W", "-n", "--keep-going"))],
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
    )
