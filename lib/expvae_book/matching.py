"""Our numbers beside the published ones."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd

from expvae_book.publications import RECORD_PREFIX, duration, with_unit
from expvae_book.runs import Run

NO_RUN = "no run of ours"


def beside(reported: pd.DataFrame, runs: Iterable[Run]) -> pd.DataFrame:
    """Set our number beside each published one.

    A run matches where its chapter is the row's and its parameters hold those of `our_parameters`. Runs that differ in
    nothing but the seed share a line. Runs on generated samples are left out: nothing published compares with them.

    Args:
        reported: Published numbers, from `read`.
        runs: Stored runs.

    Returns:
        The rows of `reported`, one line per row and configuration of ours, with `ours` (text: one run with its
        interval; several with their mean, number and range; then the marks), `our_value` (mean over runs), `our_low`
        and `our_high` (the interval of one run, the range of several), `count`, `configuration`, `budget`, `data`,
        `outdated` and `runs` (labels). A row without a run of ours says so in `ours`.
    """
    real = [run for run in runs if data_kind(run) != "sample"]
    lines = []
    for row in reported.to_dict("records"):
        groups = _groups(row, real)
        for configuration, found in groups.items():
            name = _difference(configuration, list(groups))
            ours = _summary(found, row["unit"], exact=row["our_metric"].startswith(RECORD_PREFIX))
            ours["ours"] = f"{name}: {ours['ours']}" if name else ours["ours"]
            lines.append(row | ours | {"configuration": ", ".join(configuration[0])})
        if not groups:
            blank = dict.fromkeys(("configuration", "budget", "data", "outdated", "runs"), "")
            lines.append(row | blank | {"ours": _absent(row), "count": 0})
    ours = ["ours", "our_value", "our_low", "our_high", "count"]
    columns = [*reported.columns, *ours, "configuration", "budget", "data", "outdated", "runs"]
    return pd.DataFrame(lines, columns=columns)


def _absent(row: dict[str, Any]) -> str:
    """What stands in the place of a number of ours; for a category of a data set also how to get it."""
    parameters = dict(pair.split("=", 1) for pair in row["our_parameters"].split(";") if pair)
    if "category" not in parameters:
        return NO_RUN
    category, chapter = parameters["category"], row["chapter"]
    fetch = f"python -m expvae_book.data fetch mvtec --categories {category}"
    return f"data not at hand; {fetch}; papermill book/{chapter}.md out.ipynb -p categories {category}"


Measured = tuple[Run, float, float | None, float | None]
Configuration = tuple[tuple[str, ...], str, str]  # parameters without the seed, kind of data, budget


def _groups(row: dict[str, Any], runs: Sequence[Run]) -> dict[Configuration, list[Measured]]:
    """Our values for a published row, grouped by everything that the runs may differ in except the seed."""
    wanted = dict(pair.split("=", 1) for pair in row["our_parameters"].split(";") if pair)
    groups: dict[Configuration, list[Measured]] = {}
    for run in runs:
        if not row["our_metric"] or run.chapter != row["chapter"]:
            continue
        if any(str(run.parameters.get(name)) != value for name, value in wanted.items()):
            continue
        measured = measure(run, row["our_metric"], row["our_method"], row["our_subset"])
        if measured is None:
            continue
        parameters = tuple(f"{name}={value}" for name, value in run.parameters.items() if name != "seed")
        groups.setdefault((parameters, data_kind(run), budget_text(run)), []).append((run, *measured))
    return groups


def measure(
    run: Run, metric: str, method: str = "", subset: str = ""
) -> tuple[float, float | None, float | None] | None:
    """Value, low and high of a metric of a run, or None where the run has no such number."""
    if metric.startswith(RECORD_PREFIX):
        entry: Any = run.record
        for key in metric.removeprefix(RECORD_PREFIX).split("."):
            entry = entry.get(key) if isinstance(entry, dict) else None
        return None if entry is None else (float(entry), None, None)
    try:
        row = run.metric(metric, method, subset)
    except KeyError:
        return None
    return None if row["value"] is None else (float(row["value"]), row["low"], row["high"])


def _difference(configuration: Configuration, among: list[Configuration]) -> str:
    """The parameters of a configuration that not all of several configurations share."""
    shared = set.intersection(*(set(parameters) for parameters, _, _ in among))
    return ", ".join(pair for pair in configuration[0] if pair not in shared)


def _summary(found: Sequence[Measured], unit: str, exact: bool) -> dict[str, Any]:
    scale = 100 if unit == "%" else 1  # ours are fractions
    values = [scale * value for _, value, _, _ in found]
    mean = sum(values) / len(values)
    _, _, low, high = found[0]
    if len(found) > 1:
        low, high = min(values), max(values)
        span = "" if low == high else f", {shown(low, unit, exact)}–{shown(high, unit, exact)}"
        spread = f" ({len(found)} runs{span})"
    elif low is None or high is None:
        spread = ""
    else:
        low, high = scale * low, scale * high
        spread = f" ({shown(low, unit, exact)}–{shown(high, unit, exact)})"
    runs = [run for run, _, _, _ in found]
    outdated = sum(bool(run.outdated) for run in runs)
    share = "" if outdated == len(runs) else f"{outdated} of {len(runs)} "
    summary = {
        "our_value": mean,
        "our_low": low,
        "our_high": high,
        "count": len(found),
        "budget": budget_text(runs[0]),
        "data": data_kind(runs[0]),
        "outdated": f"{share}outdated" if outdated else "",
        "runs": ", ".join(run.label for run in runs),
    }
    short = summary["budget"] if cut_short(runs[0]) else ""
    # A time says nothing without the machine; that of the training may be another than that of the run.
    trained_on = [run.record.get("weights", {}).get("device", run.record["device"]) for run in runs]
    device = "; ".join(dict.fromkeys(trained_on)) if unit == "s" else ""
    mark = runs[0].card.mark
    marks = [f"{mark} data" if mark else "", short, summary["outdated"], device]
    text = with_unit(shown(mean, unit, exact), unit) + spread
    return summary | {"ours": " · ".join([text, *filter(None, marks)])}


def shown(number: float, unit: str, exact: bool) -> str:
    """Three significant digits, or all of them for what was set and not measured; durations with their units."""
    if unit == "s":
        return duration(number)
    if exact:
        return f"{number:,.10g}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:#.3g}".rstrip(".")


def data_kind(run: Run) -> str:
    """The kind of data that a run used, as its card says."""
    return run.record["data"]["kind"]


def cut_short(run: Run) -> bool:
    """Whether a run used less of its budget than its recipe asks for."""
    return run.record["budget"]["used"] < run.record["budget"]["asked"]


def budget_text(run: Run, form: str = "") -> str:
    """The budget of a run in words, such as "20 of 100 epochs", each number written in a form."""
    budget = run.record["budget"]
    asked = "" if budget["used"] == budget["asked"] else f" of {budget['asked']:{form}}"
    return f"{budget['used']:{form}}{asked} {budget['unit']}"
