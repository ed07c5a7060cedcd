"""The numbers that the paper and the reports print, read and checked."""

import csv
import functools
import math
from pathlib import Path
from typing import Any

import pandas as pd

from expvae_book.places import repository

SOURCES = {
    "paper": "Liu et al. 2020",
    "R1": "Report 1",
    "R2": "Report 2",
    "brongers": "Brongers et al.",
    "authors-code": "Authors' code",
}
QUOTED_BY = {"R1": "Report 1", "R2": "Report 2", "facts sheet": "notes on the published code"}
# The first eleven columns say what was published and where; the last five find our own number in a stored run.
COLUMNS = (
    *("source", "quoted_by", "where", "dataset", "setting", "metric", "value", "low", "high", "unit", "note"),
    *("chapter", "our_metric", "our_method", "our_subset", "our_parameters"),
)
NUMBER = r"(-?[0-9]+(\.[0-9]+)?(e-?[0-9]+)?)?"  # finite, or blank
PAIRS = r"([^;]*=[^;]*(;[^;]*=[^;]*)*)?"
RUN_COLUMNS = (
    "gamma",
    "lambda",
    "seed",
    "step",
    "metric_score",
)  # of the runs that were published with Report 2's code
RECORD_PREFIX = "record:"  # our_metric "record:recipe.batch_size" is an entry of the record, not a row of its metrics


def read(folder: str | Path | None = None) -> pd.DataFrame:
    """Read and check every published number.

    Args:
        folder: Folder with the CSV files; by default `book/reported`.

    Returns:
        One row per number: the columns of the files, with `value`, `low` and `high` as floats (NaN where blank);
        `published`, the number as text with its unit; and `table`, the name of the file without its ending.

    Raises:
        ValueError: If a row is not valid; the sentence names the file and the line.
    """
    folder = repository() / "book" / "reported" if folder is None else Path(folder)
    return _read(folder, tuple((file, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.csv")))).copy()


@functools.lru_cache  # half of the pages ask for it, some many times
def _read(folder: Path, files: tuple[tuple[Path, int], ...]) -> pd.DataFrame:
    """The files of a folder, each with the time of its last change."""
    rows = []
    for file, _ in files:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.reader(lines)
            if tuple(next(reader, ())) != COLUMNS:
                raise ValueError(f"{file.name} line 1: the columns must be {','.join(COLUMNS)}")
            for cells in reader:
                place = f"{file.name} line {reader.line_num}"
                if len(cells) != len(COLUMNS):
                    raise ValueError(f"{place}: it has {len(cells)} cells and needs {len(COLUMNS)}")
                rows.append([*cells, file.stem, place])
    if not rows:
        raise ValueError(f"there is no CSV file of published numbers in {folder}")
    table = pd.DataFrame(rows, columns=[*COLUMNS, "table", "place"])
    numbers = _numbers(table)
    table["published"] = [_as_published(row) for row in table.to_dict("records")]
    return table.assign(**numbers)[[*COLUMNS, "published", "table"]]


def report2_runs(file: str | Path | None = None) -> pd.DataFrame:
    """Read the runs on dSprites that were published with the second report's code (Jesus et al. 2021, MIT License).

    Args:
        file: The CSV file; by default `book/reported/report2/dsprites_metric.csv`, which lies beside its licence.

    Returns:
        One row per run and step at which their metric was taken: gamma, lambda (0 is FactorVAE), seed, step, and
        metric_score in [0, 1].

    Raises:
        ValueError: If the file does not hold such rows; the sentence names it.
    """
    file = repository() / "book" / "reported" / "report2" / "dsprites_metric.csv" if file is None else Path(file)
    table = pd.read_csv(file)
    if tuple(table.columns) != RUN_COLUMNS:
        raise ValueError(f"{file.name}: the columns must be {','.join(RUN_COLUMNS)}")
    table = table.fillna({"lambda": 0.0})
    if not table["metric_score"].between(0, 1).all() or table.duplicated(list(RUN_COLUMNS[:-1])).any():
        raise ValueError(f"{file.name}: every run needs one metric_score in [0, 1] at each of its steps")
    return table


def select(table: pd.DataFrame, /, **entries: str) -> pd.DataFrame:
    """The rows of a table of published numbers that have all of these entries, such as source="R1"."""
    return table[(table[list(entries)] == pd.Series(entries)).all(axis=1)]


def _numbers(table: pd.DataFrame) -> pd.DataFrame:
    """The numbers of the rows that were read, NaN where blank.

    Raises:
        ValueError: If a row is not valid.
    """
    text, blank = table[["value", "low", "high"]], table == ""
    finite = text.apply(lambda column: column.str.fullmatch(NUMBER))
    numbers = text.where(finite & (text != ""), math.nan).astype(float)
    value, low, high = (numbers[name] for name in numbers)
    pairs = table["our_parameters"].str.fullmatch(PAIRS)
    ours = blank[["our_method", "our_subset", "our_parameters"]].all(axis=1)
    wrong = {
        "source={source!r} must be one of: " + ", ".join(SOURCES): ~table["source"].isin(SOURCES),
        "quoted_by={quoted_by!r} must be one of: " + ", ".join(QUOTED_BY): ~table["quoted_by"].isin(QUOTED_BY),
        **{f"{name} is blank": blank[name] for name in ("where", "dataset", "metric")},
        **{f"{name}={{{name}!r}} is not a finite number": ~finite[name] for name in finite},
        "low and high must be given together": blank["low"] != blank["high"],
        "it needs a value, or low and high": blank["value"] & blank["low"],
        "low, value and high must rise: {low}, {value}, {high}": (low > high) | (value < low) | (value > high),
        "our_metric needs a chapter": ~blank["our_metric"] & blank["chapter"],
        "our_method, our_subset and our_parameters need our_metric": blank["our_metric"] & ~ours,
        "our_parameters={our_parameters!r} must be name=value pairs, separated by ';'": ~pairs,
        "it repeats {first}": table.duplicated(list(COLUMNS)),
    }
    table = table.assign(first=table.groupby(list(COLUMNS))["place"].transform("first"))
    for sentence, rows in wrong.items():
        for row in table[rows].to_dict("records"):
            raise ValueError(f"{row['place']}: {sentence.format_map(row)}")
    return numbers


def _as_published(row: dict[str, Any]) -> str:
    """A published number with the digits in which it was printed; durations as hours, minutes and seconds."""
    value, low, high = (_digits(row[column], row["unit"]) for column in ("value", "low", "high"))
    span = "" if not low else f"{low} to {high}" if low.startswith("-") or row["unit"] == "s" else f"{low}–{high}"
    text = f"{value} ({span})" if value and span else value or span
    return with_unit(text, row["unit"])


def _digits(text: str, unit: str) -> str:
    if text and unit == "s":
        return duration(float(text))
    return f"{int(text):,}" if text.isdecimal() else text


def duration(seconds: float) -> str:
    """Seconds as hours, minutes and seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{number} {unit}" for number, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if number]
    return " ".join(parts) or "0 s"


def with_unit(text: str, unit: str) -> str:
    """A number as text with its unit, where it has one that is shown."""
    return text if unit in ("", "s") else f"{text} {unit}"
