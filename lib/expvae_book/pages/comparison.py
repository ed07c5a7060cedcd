"""What the page draws and tabulates that sets published numbers beside ours."""

import shlex
from collections.abc import Sequence
from statistics import mean

import pandas as pd
from IPython.display import Image, display

from expvae_book import figures, matching, publications, report, runs
from expvae_book.names import AUROC
from expvae_book.publications import SOURCES
from expvae_book.runs import Run

# By table what is drawn of it, and what is reached without knowing anything.
DRAWN = {
    "mnist": [("less intuitive maps", None)],
    "ucsd": [(AUROC, 0.5)],
    "mvtec": [(AUROC, 0.5), ("IoU", None)],
    "dsprites": [("disentanglement metric", None)],
}
CHAPTERS = {"mnist": ("mnist",), "ucsd": ("ucsd",), "mvtec": ("mvtec15", "mvtec10"), "dsprites": ("disentanglement",)}


def drawn(name: str) -> Image | None:
    """Published numbers and ours of one table, a figure for each measure; the last is given, the others are shown.

    Above them stand the verdicts on the claims that such numbers are about.

    Ours are those of the configuration that used the largest share of its budget, current before outdated ones: the
    mean over its seeds, with their range, or the interval of one.
    """
    display(report.badges(*CHAPTERS[name]))
    images, stored = [], matching.comparable(runs.find())
    for metric, chance in DRAWN[name]:
        rows = publications.read().query("table == @name and metric == @metric")
        table = pd.DataFrame([point for row in rows.to_dict("records") for point in _points(row, stored)])
        table = table.drop_duplicates(["method", "group"])
        images.append(figures.show(figures.intervals(table, label=metric, chance=chance)))
    for image in images[:-1]:
        display(image)
    return images[-1]


def _points(row: dict, stored: Sequence[Run]) -> list[dict]:
    scale = 100 if row["unit"] == "%" else 1
    given = {end: row[end] / scale for end in ("low", "high")}
    given["value"] = row["value"] / scale if row["value"] == row["value"] else (given["low"] + given["high"]) / 2
    found = [{"method": row["setting"], "group": SOURCES[row["source"]]} | given]
    if same := matching.ours(row, stored):
        seen, numbers = zip(*same, strict=True)
        values = [value for value, _, _ in numbers]
        low, high = (min(values), max(values)) if len(values) > 1 else numbers[0][1:]
        whose = f"ours, digit {seen[0].parameters['digit']}" if "digit" in seen[0].parameters else "ours"
        found.append({"method": row["setting"], "group": whose, "value": mean(values), "low": low, "high": high})
    return found


def show(name: str, numbers: pd.DataFrame, caption: str) -> None:
    """Show the numbers of one table beside the published ones, and the runs that they come from with their commands.

    Args:
        name: The table.
        numbers: What `matching.beside` gives.
        caption: What the table shows.
    """
    report.show(report.wide(numbers[numbers["table"] == name]), caption)
    stores, found = {runs.STORES.get(chapter, chapter) for chapter in CHAPTERS[name]}, runs.find()
    folders = {run.folder for run in matching.comparable(found) if run.chapter in stores}
    lines = [
        {"Run": run.label, "Data": run.card.mark or "complete", "Budget": matching.budget_text(run, ",")}
        | {"State": run.state, "Command": command(run)}
        for run in found
        if run.folder in folders
    ]
    columns = ["Run", "Data", "Budget", "State", "Command"]
    report.show(
        pd.DataFrame(lines, columns=columns),
        "The runs behind these numbers, and their commands. What is stored and current is shown and not computed; "
        "-p again True computes it anew.",
        below=["Command"],
    )


def command(run: Run) -> str:
    """The command that computes a run of a chapter whose numbers are compared."""
    given = dict(run.parameters)
    if run.chapter == "mvtec":
        given = {"categories": given.pop("category")} | given
    elif run.chapter == "disentanglement":
        weights = {f"{name}s": given.pop(name) for name in ("gamma", "lambda", "beta")}
        if weights["gammas"] or weights["lambdas"]:
            del weights["betas"]
        else:
            weights["gammas"] = ""
        # Seeds run from 0 on; without the attention loss there is no variant of it.
        given = weights | {"seeds": given.pop("seed") + 1} | given
        given = {name: value for name, value in given.items() if value != "none"}
    chapter = {"mvtec": "mvtec15"}.get(run.chapter, run.chapter)
    options = [word for name, value in given.items() for word in ("-p", name, str(value))]
    return shlex.join(["papermill", f"book/{chapter}.md", "out.ipynb", *options])
