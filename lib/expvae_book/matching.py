"""Our numbers beside the published ones."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import pandas as pd

from expvae_book.publications import RECORD_PREFIX, duration, with_unit
from expvae_book.runs import STORES, Run

NO_RUN = "no run of ours"
# Layers and presets of which something is in print; of MVTec AD's layers, the one that Brongers et al.'s code names.
LAYERS = {"ucsd": ("conv1", "conv2", "conv3"), "mvtec": ("layer2.1.conv1",)}
PRESETS = ("liu2020_paper", "liu2020_code", "brongers2021")
Number = tuple[float, float | None, float | None]  # value, low and high


def comparable(runs: Iterable[Run]) -> list[Run]:
    """The runs that published numbers compare with, a job with many maps once for each that something is printed of.

    None on generated samples or a user's own images, and no networks that were trained on the wrong class, which are a
    control.
    """
    shown = []
    for run in runs:
        if not run.card.published or "trained_on" in run.parameters:
            continue
        pairs = [name.split(", ") for name in run.maps]
        pairs = [(layer, preset) for layer, preset in pairs if layer in LAYERS.get(run.chapter, ())]
        shown += [run.at(layer, preset) for layer, preset in pairs if preset in PRESETS] or [run]
    return shown


def beside(reported: pd.DataFrame, runs: Iterable[Run]) -> pd.DataFrame:
    """Set our number beside each published one.

    A run matches where its chapter is the row's and its parameters hold those of `our_parameters`. Runs that differ in
    nothing but the seed share a line. Runs on generated samples are left out: nothing published compares with them.

    Args:
        reported: Published numbers, from `read`.
        runs: Stored runs.

    Returns:
        The rows of `reported`, one line per row and configuration of ours, outdated ones last, with `ours` (text: one
        run with its interval; several with their mean, number and range; then the marks). A row without a run of ours
        says so there.
    """
    real, lines = comparable(runs), []
    for row in reported.to_dict("records"):
        wanted = _wanted(row)
        groups = _groups(row, wanted, real)
        shared = set.intersection(*(set(parameters) for parameters, _, _ in groups)) if groups else set()
        for (parameters, _, _), same in sorted(groups.items(), key=lambda group: _old(group[1])):
            name = ", ".join(pair for pair in parameters if pair not in shared)
            lines.append(row | {"ours": f"{name}: {_summary(row, same)}" if name else _summary(row, same)})
        if not groups:
            lines.append(row | {"ours": _absent(row["chapter"], wanted)})
    return pd.DataFrame(lines, columns=[*reported.columns, "ours"])


def ours(row: dict[str, Any], runs: Iterable[Run]) -> list[tuple[Run, Number]]:
    """Our runs and numbers for a published row, by seed: of several configurations that which `judging.chosen` takes.

    That is current before outdated ones, then the largest share of the budget, the most runs, and the paper's rule;
    never by results.

    Args:
        row: A line of `read`.
        runs: Those that `comparable` gives.
    """

    def rank(same: list[tuple[Run, Number]]) -> tuple:
        used = [run.record["budget"]["used"] / (run.record["budget"]["asked"] or 1) for run, _ in same]
        place = PRESETS.index(same[0][0].parameters.get("preset", PRESETS[0]))
        return not any(run.outdated for run, _ in same), min(used), len(same), -place

    groups = _groups(row, _wanted(row), runs).values()
    groups = [[one for one in same if not one[0].outdated] or same for same in groups]
    return max(groups, key=rank, default=[])


def _old(same: list[tuple[Run, Number]]) -> bool:
    return all(run.outdated for run, _ in same)


def _wanted(row: dict[str, Any]) -> dict[str, str]:
    return dict(pair.split("=", 1) for pair in row["our_parameters"].split(";") if pair)


def _absent(chapter: str, wanted: dict[str, str]) -> str:
    """What stands in the place of a number of ours; for a category of a data set also how to get it."""
    if "category" not in wanted:
        return NO_RUN
    category = wanted["category"]
    fetch = f"python -m expvae_book.data fetch mvtec --categories {category}"
    return f"{NO_RUN}; {fetch}; papermill book/{chapter}.md out.ipynb -p categories {category}"


Configuration = tuple[tuple[str, ...], str, str]  # parameters without the seed, kind of data, budget


def _groups(
    row: dict[str, Any], wanted: dict[str, str], runs: Iterable[Run]
) -> dict[Configuration, list[tuple[Run, Number]]]:
    """Our runs for a published row, grouped by everything that they may differ in except the seed."""
    groups = defaultdict(list)
    for run in runs:
        given = {name: str(value) for name, value in run.parameters.items()}
        if run.chapter != STORES.get(row["chapter"], row["chapter"]) or not wanted.items() <= given.items():
            continue
        number = measure(run, row["our_metric"], row["our_method"], row["our_subset"])
        if number is not None:
            parameters = tuple(f"{name}={value}" for name, value in given.items() if name != "seed")
            groups[parameters, run.card.kind, budget_text(run)].append((run, number))
    return groups


def _summary(row: dict[str, Any], same: list[tuple[Run, Number]]) -> str:
    """Our number for a published row, by runs that differ in the seed alone, with its spread and its marks."""
    unit, exact = row["unit"], row["our_metric"].startswith(RECORD_PREFIX)
    scale = 100 if unit == "%" else 1  # ours are fractions

    def text(number: float) -> str:
        return shown(scale * number, unit, exact)

    runs, numbers = zip(*same, strict=True)
    values = [value for value, _, _ in numbers]
    several = len(same) > 1
    _, low, high = (None, min(values), max(values)) if several else numbers[0]
    spread = [f"{len(same)} runs"] if several else []
    if low is not None and not (several and low == high):
        spread.append(f"{text(low)}–{text(high)}")
    outdated = sum(bool(run.outdated) for run in runs)
    share = "" if outdated == len(runs) else f"{outdated} of {len(runs)} "
    # A time says nothing without the machine; that of the training may be another than that of the run.
    trained_on = dict.fromkeys(run.record.get("weights", {}).get("device", run.record["device"]) for run in runs)
    mark = runs[0].card.mark
    marks = [f"{mark} data" if mark else "", short(runs[0]), f"{share}outdated" if outdated else ""]
    marks += ["; ".join(trained_on)] if unit == "s" else []
    mean = with_unit(text(sum(values) / len(values)), unit) + (f" ({', '.join(spread)})" if spread else "")
    return " · ".join([mean, *filter(None, marks)])


def measure(run: Run, metric: str, method: str = "", subset: str = "") -> Number | None:
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


def shown(number: float, unit: str, exact: bool) -> str:
    """Three significant digits, or all of them for what was set and not measured; durations with their units."""
    if unit == "s":
        return duration(number)
    if exact:
        return f"{number:,.10g}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:#.3g}".rstrip(".")


def budget_text(run: Run, form: str = "") -> str:
    """The budget of a run in words, such as "20 of 100 epochs", each number written in a form."""
    budget = run.record["budget"]
    asked = "" if budget["used"] == budget["asked"] else f" of {budget['asked']:{form}}"
    return f"{budget['used']:{form}}{asked} {budget['unit']}"


def short(run: Run, form: str = "") -> str:
    """The budget in words of a run that used less of it than its recipe asks for; otherwise blank."""
    budget = run.record["budget"]
    return budget_text(run, form) if budget["used"] < budget["asked"] else ""
