"""What the page draws and tabulates that sets published numbers beside ours."""

from collections.abc import Sequence
from statistics import mean

import pandas as pd
from IPython.display import Image, display

from expvae_book import figures, matching, publications, runs
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


def drawn(name: str) -> Image | None:
    """Published numbers and ours of one table, a figure for each measure; the last is given, the others are shown.

    Ours are those of the configuration that used the largest share of its budget, current before outdated ones: the
    mean over its seeds, with their range, or the interval of one.
    """
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
