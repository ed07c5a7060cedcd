"""The rows of a record: one number each, with its interval; and a record as text.

A job has hundreds of rows. In the text each is a list on a line of its own, for names would be most of it.
"""

import json
import math
from collections.abc import Mapping
from typing import Any, BinaryIO

# What every record has, for its readers to count on.
ENTRIES: dict[str, Any] = dict.fromkeys(("parameters", "protocols", "losses", "recipe", "seconds"), dict)
ENTRIES |= {"chapter": str, "device": str, "metrics": list}
ENTRIES |= {"git": {"commit": str | None, "dirty": bool | None}, "budget": {"unit": str, "asked": float | int}}
ENTRIES["budget"]["used"] = float | int
ENTRIES["data"] = dict.fromkeys(("name", "kind", "digest", "licence", "credit", "note"), str)
ENTRIES["data"] |= {"counts": dict, "official": dict}
TEXTS = ("metric", "method", "subset")
METRIC_COLUMNS = ["metric", "method", "subset", "value", "low", "high", "n"]


def row(
    metric: str, value: float | int | None, method: str = "", subset: str = "", **interval: float | int | None
) -> dict:
    """One row of a run's metrics; `interval` may give low, high and n."""
    return {
        "metric": metric,
        "method": method,
        "subset": subset,
        "value": value,
        "low": None,
        "high": None,
        "n": None,
    } | (interval)


def order(row: Mapping[str, Any], other: Mapping[str, Any] | float) -> str:
    """How the interval of a row lies to that of another row, or to a number such as 0.5.

    Args:
        row: A row with low and high, as `Run.metric` gives it.
        other: Another such row, or a number.

    Returns:
        "above" or "below" where the intervals are apart, otherwise "not told apart from".

    Raises:
        ValueError: If a row has no interval.
    """
    if row["low"] is None or (isinstance(other, Mapping) and other["low"] is None):
        raise ValueError(f"order compares intervals, and one of these rows has none: {row}, {other}")
    low, high = (other["low"], other["high"]) if isinstance(other, Mapping) else (other, other)
    if row["low"] > high:
        return "above"
    return "below" if row["high"] < low else "not told apart from"


def listed(row: Mapping[str, Any]) -> list[Any]:
    """The values of a row as a record has them: numbers with seven digits, and the ends of intervals with five."""
    digits = {"value": 7, "low": 5, "high": 5}
    return [
        float(f"{value:.{digits[name]}g}") if name in digits and isinstance(value, float) else value
        for name, value in row.items()
    ]


def as_text(record: Mapping[str, Any]) -> str:
    """A record as JSON, a line for each row of its metrics: in hundreds of rows, names would be most of the text."""
    rows = [json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":")) for row in record["metrics"]]
    text = json.dumps(record | {"metrics": []}, indent=1, ensure_ascii=False, allow_nan=False)
    return text.replace('"metrics": []', '"metrics": [\n' + ",\n".join(rows) + "\n ]", 1) if rows else text


def read_text(file: BinaryIO) -> dict[str, Any]:
    """A record from its text, rows as `row` makes them; a ValueError where it is no such text."""
    record = json.load(file, parse_constant=_finite, parse_float=_finite)
    if wrong := _wrong(record, ENTRIES, "record"):
        raise ValueError(f"{wrong} is not there or something else than it should be")
    record["metrics"] = [dict(zip(METRIC_COLUMNS, row, strict=True)) for row in record["metrics"]]
    for one in record["metrics"]:
        if not all(isinstance(value, str if name in TEXTS else float | int | None) for name, value in one.items()):
            raise ValueError(f"{list(one.values())} is no row of its metrics")
    return record


def _wrong(value: Any, kind: Any, name: str) -> str:
    """The first entry that is lacking or of another type; empty where none is."""
    if not isinstance(kind, dict):
        return "" if isinstance(value, kind) else name
    if not isinstance(value, dict):
        return name
    return next(filter(None, (_wrong(value.get(part), of, f"{name}.{part}") for part, of in kind.items())), "")


def _finite(number: str) -> float:
    """A number of a record; NaN and infinity, which JSON has not and `save` refuses, are a ValueError."""
    if not math.isfinite(float(number)):
        raise ValueError(f"{number} is no finite number")
    return float(number)
