"""The numbers that the paper and the reports print, read and checked."""

import csv
import math
from collections.abc import Sequence
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
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise ValueError(f"there is no CSV file of published numbers in {folder}")
    rows = []
    first_line: dict[tuple[str, ...], str] = {}
    for file in files:
        with file.open(newline="", encoding="utf-8") as lines:
            reader = csv.reader(lines)
            if tuple(next(reader, ())) != COLUMNS:
                raise ValueError(f"{file.name} line 1: the columns must be {','.join(COLUMNS)}")
            for cells in reader:
                place = f"{file.name} line {reader.line_num}"
                problem = _problem(cells)
                if problem is None and tuple(cells) in first_line:
                    problem = f"it repeats {first_line[tuple(cells)]}"
                if problem is not None:
                    raise ValueError(f"{place}: {problem}")
                first_line[tuple(cells)] = place
                row: dict[str, Any] = dict(zip(COLUMNS, cells, strict=True))
                row |= {"published": _as_published(row), "table": file.stem}
                rows.append(row | {column: _number(row[column]) for column in ("value", "low", "high")})
    return pd.DataFrame(rows, columns=[*COLUMNS, "published", "table"])


def _problem(cells: Sequence[str]) -> str | None:
    """What is wrong with a row of a CSV file, or None."""
    if len(cells) != len(COLUMNS):
        return f"it has {len(cells)} cells and needs {len(COLUMNS)}"
    row = dict(zip(COLUMNS, cells, strict=True))
    for column, valid in (("source", SOURCES), ("quoted_by", QUOTED_BY)):
        if row[column] not in valid:
            return f"{column}={row[column]!r} must be one of: {', '.join(valid)}"
    for column in ("where", "dataset", "metric"):
        if not row[column]:
            return f"{column} is blank"
    for column in ("value", "low", "high"):
        try:
            number = _number(row[column])
        except ValueError:
            return f"{column}={row[column]!r} is not a number"
        if row[column] and not math.isfinite(number):
            return f"{column}={row[column]!r} is not a finite number"
    if bool(row["low"]) != bool(row["high"]):
        return "low and high must be given together"
    if not row["value"] and not row["low"]:
        return "it needs a value, or low and high"
    value, low, high = (_number(row[column]) for column in ("value", "low", "high"))
    if low > high or value < low or value > high:
        return f"low, value and high must rise: {row['low']}, {row['value']}, {row['high']}"
    if row["our_metric"] and not row["chapter"]:
        return "our_metric needs a chapter"
    if not row["our_metric"] and (row["our_method"] or row["our_subset"] or row["our_parameters"]):
        return "our_method, our_subset and our_parameters need our_metric"
    if any("=" not in pair for pair in row["our_parameters"].split(";") if row["our_parameters"]):
        return f"our_parameters={row['our_parameters']!r} must be name=value pairs, separated by ';'"
    return None


def _number(text: str) -> float:
    return float(text) if text else math.nan


def _as_published(row: dict[str, Any]) -> str:
    """A published number with the digits in which it was printed; durations as hours, minutes and seconds."""
    value, low, high = (_digits(row[column], row["unit"]) for column in ("value", "low", "high"))
    span = "" if not low else f"{low} to {high}" if low.startswith("-") or row["unit"] == "s" else f"{low}–{high}"
    text = f"{value} ({span})" if value and span else value or span
    return with_unit(text, row["unit"])


def _digits(text: str, unit: str) -> str:
    if not text:
        return ""
    if unit == "s":
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
