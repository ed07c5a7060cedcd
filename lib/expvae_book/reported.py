"""The published numbers, ours beside them, and a verdict on every claim by a criterion stated beforehand."""

import csv
import html
import math
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from scipy.stats import t as student

from expvae.metrics import fraction_interval
from expvae_book.places import repository
from expvae_book.runs import Run

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
NO_RUN = "no run of ours"
CELL = "text-align: left; vertical-align: top; white-space: normal"
RECORD_PREFIX = "record:"  # our_metric "record:recipe.batch_size" is an entry of the record, not a row of its metrics


# Published numbers ----------------------------------------------------------------------------------------------------


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
    return _with_unit(text, row["unit"])


def _digits(text: str, unit: str) -> str:
    if not text:
        return ""
    if unit == "s":
        return _duration(float(text))
    return f"{int(text):,}" if text.isdecimal() else text


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    parts = [f"{number} {unit}" for number, unit in ((hours, "h"), (minutes, "min"), (rest, "s")) if number]
    return " ".join(parts) or "0 s"


def _with_unit(text: str, unit: str) -> str:
    return text if unit in ("", "s") else f"{text} {unit}"


# Ours beside them -----------------------------------------------------------------------------------------------------


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
    real = [run for run in runs if _kind(run) != "sample"]
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
        measured = _measure(run, row["our_metric"], row["our_method"], row["our_subset"])
        if measured is None:
            continue
        parameters = tuple(f"{name}={value}" for name, value in run.parameters.items() if name != "seed")
        groups.setdefault((parameters, _kind(run), _budget(run)), []).append((run, *measured))
    return groups


def _measure(run: Run, metric: str, method: str, subset: str) -> tuple[float, float | None, float | None] | None:
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
        span = "" if low == high else f", {_shown(low, unit, exact)}–{_shown(high, unit, exact)}"
        spread = f" ({len(found)} runs{span})"
    elif low is None or high is None:
        spread = ""
    else:
        low, high = scale * low, scale * high
        spread = f" ({_shown(low, unit, exact)}–{_shown(high, unit, exact)})"
    runs = [run for run, _, _, _ in found]
    outdated = sum(bool(run.outdated) for run in runs)
    share = "" if outdated == len(runs) else f"{outdated} of {len(runs)} "
    summary = {
        "our_value": mean,
        "our_low": low,
        "our_high": high,
        "count": len(found),
        "budget": _budget(runs[0]),
        "data": _kind(runs[0]),
        "outdated": f"{share}outdated" if outdated else "",
        "runs": ", ".join(run.label for run in runs),
    }
    short = summary["budget"] if _cut_short(runs[0]) else ""
    # A time says nothing without the machine; that of the training may be another than that of the run.
    trained_on = [run.record.get("weights", {}).get("device", run.record["device"]) for run in runs]
    device = "; ".join(dict.fromkeys(trained_on)) if unit == "s" else ""
    mark = runs[0].card.mark
    marks = [f"{mark} data" if mark else "", short, summary["outdated"], device]
    text = _with_unit(_shown(mean, unit, exact), unit) + spread
    return summary | {"ours": " · ".join([text, *filter(None, marks)])}


def _shown(number: float, unit: str, exact: bool) -> str:
    """Three significant digits, or all of them for what was set and not measured; durations with their units."""
    if unit == "s":
        return _duration(number)
    if exact:
        return f"{number:,.10g}"
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:#.3g}".rstrip(".")


def _kind(run: Run) -> str:
    return run.record["data"]["kind"]


def _cut_short(run: Run) -> bool:
    return run.record["budget"]["used"] < run.record["budget"]["asked"]


def _budget(run: Run) -> str:
    budget = run.record["budget"]
    if budget["used"] == budget["asked"]:
        return f"{budget['used']} {budget['unit']}"
    return f"{budget['used']} of {budget['asked']} {budget['unit']}"


# Tables ---------------------------------------------------------------------------------------------------------------


def wide(table: pd.DataFrame) -> pd.DataFrame:
    """One line per setting and metric, one column per source and one for ours; for reading, not for computing.

    Args:
        table: Lines of `beside`.
    """
    lines = []
    for (setting, metric), group in table.groupby(["setting", "metric"], sort=False):
        line = {"Setting": setting, "Quantity": metric}
        for source, name in SOURCES.items():
            if (table["source"] == source).any():
                # The reports quote the same number of the paper with other digits: 0.1 is 0.10.
                given = group[group["source"] == source].drop_duplicates(["value", "low", "high"])
                line[name] = ", ".join(given["published"])
        group = group[group["ours"] != NO_RUN]
        ours = group["ours"]
        if group["chapter"].nunique() > 1:  # the same quantity by the protocols of two chapters
            ours = group["chapter"] + ": " + ours
        ours = ours.unique()
        lines.append(line | {"Ours": "\n".join(ours) or NO_RUN})
    result = pd.DataFrame(lines)
    return result if result["Setting"].any() else result.drop(columns="Setting")


def listing(table: pd.DataFrame) -> pd.DataFrame:
    """Every line of `beside` with the place where the number was printed; for reading, not for computing."""
    return pd.DataFrame(
        {
            "Data set": table["dataset"],
            "Setting": table["setting"],
            "Quantity": table["metric"],
            "Source": table["source"].map(SOURCES),
            "Published": table["published"],
            "Ours": table["ours"],
            "Read in": table["quoted_by"].map(QUOTED_BY) + ", " + table["where"],
            "Note": table["note"],
        }
    )


def to_html(table: pd.DataFrame, caption: str, *, pages: str | None = None, below: Sequence[str] = ()) -> str:
    """A table as HTML that scrolls sideways on a narrow screen; a newline in a cell becomes a line break.

    Args:
        table: What is shown.
        caption: What it shows.
        pages: The column that names pages of the book, if there is one; its cells become links.
        below: Columns of long texts; each stands under its row, across the whole table, after its name.
    """
    caption = html.escape(caption)
    texts, table = table[list(below)], table.drop(columns=list(below))
    if pages is not None:
        table = table.assign(**{pages: "page:" + table[pages]})
    with pd.option_context("display.max_colwidth", None):  # otherwise pandas cuts long texts
        body = table.to_html(index=False, na_rep="", border=0, justify="left", classes="published")
    if pages is not None:
        body = re.sub(r"<td>page:(\w+)</td>", r'<td><a href="\1.html">\1</a></td>', body)
    if below:
        head, *rows = body.split("    </tr>\n")
        wide = f'    <tr>\n      <td colspan="{len(table.columns)}">{{}}</td>\n    </tr>\n'
        lines = [
            wide.format("<br>".join(f"<em>{html.escape(name)}.</em> {html.escape(row[name])}" for name in below))
            for row in texts.to_dict("records")
        ]
        body = head + "".join(f"    </tr>\n{line}{rest}" for line, rest in zip(["", *lines], rows, strict=True))
    body = body.replace("\\n", "<br>").replace("<th>", '<th scope="col">').replace("<td", f'<td style="{CELL}"')
    width = (5 if below else 7) * len(table.columns)  # long texts are read across a narrow screen, not scrolled
    body = body.replace("<table", f'<table style="min-width: {width}rem"', 1)
    body = body.replace("<thead>", f'<caption style="text-align: left">{caption}</caption>\n  <thead>', 1)
    return f'<div style="overflow-x: auto" role="region" tabindex="0" aria-label="{caption}">\n{body}\n</div>'


# Claims and verdicts --------------------------------------------------------------------------------------------------


Outcome = Literal["held", "partly held", "did not hold", "not yet tested"]
OUTCOMES = get_args(Outcome)


@dataclass(frozen=True)
class Verdict:
    """What the stored runs say about a claim.

    Attributes:
        verdict: The outcome.
        evidence: The numbers that decided it, from the records of the runs.
        runs: Labels of the runs that count.
    """

    verdict: Outcome
    evidence: str
    runs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Claim:
    """A claim of the paper or of a report, and how this book decides on it.

    Attributes:
        id: Short name.
        text: What is claimed.
        claimed_by: Who claims it.
        chapter: Chapter whose runs test it.
        criterion: What must be found for each verdict, fixed before the runs unless it says otherwise.
        judge: From the stored runs of the chapter on real data (one at least) and the published numbers to a verdict;
            None where nothing judges the claim yet.
    """

    id: str
    text: str
    claimed_by: str
    chapter: str
    criterion: str
    judge: Callable[[Sequence[Run], pd.DataFrame], Verdict] | None = None


def decide(claim: Claim, runs: Iterable[Run], reported: pd.DataFrame) -> Verdict:
    """The verdict on a claim; "not yet tested" where no run on real data or no judge exists."""
    real = [run for run in runs if run.chapter == claim.chapter and _kind(run) != "sample"]
    if not real:
        return Verdict("not yet tested", f"No run of the chapter {claim.chapter} on real data is stored.")
    if claim.judge is None:
        return Verdict("not yet tested", f"The stored runs of the chapter {claim.chapter} do not measure this.")
    return claim.judge(real, reported)


def verdicts(runs: Iterable[Run], reported: pd.DataFrame | None = None) -> pd.DataFrame:
    """The verdict on every claim: columns id, claim, claimed_by, chapter, criterion, verdict, evidence and runs."""
    runs = list(runs)
    reported = read() if reported is None else reported
    lines = []
    for claim in CLAIMS:
        verdict = decide(claim, runs, reported)
        lines.append(
            {
                "id": claim.id,
                "claim": claim.text,
                "claimed_by": claim.claimed_by,
                "chapter": claim.chapter,
                "criterion": claim.criterion,
                "verdict": verdict.verdict,
                "evidence": verdict.evidence,
                "runs": ", ".join(verdict.runs),
            }
        )
    return pd.DataFrame(lines)


Effect = Literal["hardly any effect", "effect", "undecided"]


def effect(row: dict[str, Any], margin: float) -> Effect:
    """What the interval of a difference says about it.

    "hardly any effect" where the interval lies within ± margin, zero or not; "effect" where it lies beyond, on one
    side; "undecided" where it has a part in both: too few images to tell if the difference is larger than the margin.

    Args:
        row: A row with low and high, as `expvae_book.runs.Run.metric` gives it.
        margin: Up to which a difference counts as hardly any.
    """
    if -margin <= row["low"] and row["high"] <= margin:
        return "hardly any effect"
    return "effect" if row["low"] > margin or row["high"] < -margin else "undecided"


UCSD_LAYERS = ("conv1", "conv2", "conv3")
UCSD_RECIPES = ("report1", "report2")  # the recipes that the reports followed; the first is the paper's too
PRESETS = ("liu2020_paper", "liu2020_code")
MVTEC_RECIPES = ("report1", "report2")
OTHER_NETWORKS = ("brongers2021",)  # recipes of networks that are not the reports'
DSPRITES_GAMMAS = (10, 20, 30, 40)  # of the paper's figure
DSPRITES_LAMBDAS = (0.5, 1, 1.5)  # of the second report
DSPRITES_LOSSES = ("none", "liu2020", "report2")  # the paper's formula; Brongers et al.'s code computes something else
DSPRITES_WEIGHTS = {"beta": "β", "gamma": "γ", "lambda": "λ"}
ABLATION_STEPS = {  # what each step is switched by, in the paper's rule and in that of the authors' code
    "ReLU": (("channels=abs_of_sum", "liu2020_paper"), ("channels=relu_of_sum", "liu2020_code")),
    "normalised gradients": (("normaliser=batch", "liu2020_paper"), ("normaliser=none", "liu2020_code")),
}
ABLATION_DATA_SETS = ("mnist", "ucsd", "mvtec")
ABLATION_MARGIN = 0.01  # up to which a change in pixel AUROC counts as hardly any
SPRITE_METRIC = ("FactorVAE metric", "five factors, held-out votes", "standard deviation of the mean below 0.05")
SPRITE_OVERLAP = ("overlap of maps", "conv4", "all pairs of active latents")
RBM_MAPS = ("attention", "gradient × input")  # what no baseline's name begins with
MNIST_DIGITS = (1, 3)
MNIST_RECIPES = ("liu2020", "report1", "report2")  # the recipes that the paper's code and the reports followed
OUTLIERS = "all outliers"


def _judge_attention(method: str) -> Callable[[Sequence[Run], pd.DataFrame], Verdict]:
    """Judge whether a kind of attention map finds the anomalous ink better than chance and than the baselines."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted, note = _full_mnist_runs(runs, lambda run: {method, "random"} <= _pixel_scores(run).keys())
        if not _both_digits(counted):
            return Verdict("not yet tested", f"{_missing_digits(counted)}{note}", _labels(counted))
        beats_chance, beats_all = 0, 0
        for run in counted:
            scores = _pixel_scores(run)
            low = scores[method][0]
            beaten = [low > high for other, (_, high) in scores.items() if not other.startswith("attention")]
            beats_chance += low > 0.5 and low > scores["random"][1]
            beats_all += low > 0.5 and all(beaten)
        n = len(counted)
        outcome = "held" if beats_all == n else "partly held" if beats_chance == n else "did not hold"
        shown = [method, *(name for name in _pixel_scores(counted[0]) if not name.startswith("attention"))]
        ranges = [_per_digit(counted, "pixel AUROC", name) for name in shown]
        tally = f"Above chance in {beats_chance} of {n} runs, above every baseline in {beats_all} of {n}."
        if all(_measure(run, "pixel AUROC within ink", method, OUTLIERS) for run in counted):
            tally += f" Among pixels of ink alone — {_per_digit(counted, 'pixel AUROC within ink', method)}."
        return Verdict(outcome, f"Pixel AUROC — {'; '.join(ranges)}. {tally}{note}", _labels(counted))

    return judge


def _judge_less_intuitive(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
    """Judge whether the measured share of less intuitive maps agrees with the one counted by eye."""
    method = "attention, authors' code"
    counted, note = _full_mnist_runs(
        runs, lambda run: _interval(run, "less intuitive maps", method, OUTLIERS) is not None
    )
    if not _both_digits(counted):
        return Verdict("not yet tested", f"{_missing_digits(counted)}{note}", _labels(counted))
    row = _published(reported, "R1", "MNIST", "less intuitive maps")
    overlaps = 0
    for run in counted:
        low, high = _interval(run, "less intuitive maps", method, OUTLIERS)
        overlaps += 100 * low <= row["high"] and 100 * high >= row["low"]
    n = len(counted)
    outcome = "held" if overlaps == n else "partly held" if overlaps else "did not hold"
    shares = "; ".join(_per_digit(counted, "less intuitive maps", name, "%") for name in (method, "attention, paper"))
    evidence = f"Share of maps with a pixel AUROC below one half — {shares}. Published: {row['published']}."
    tally = f" The intervals meet in {overlaps} of {n} runs."
    return Verdict(outcome, evidence + tally + note, _labels(counted))


def _judge_parameters(dataset: str) -> Callable[[Sequence[Run], pd.DataFrame], Verdict]:
    """Judge whether our model has as many parameters as the first report prints."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        runs = [run for run in runs if run.parameters["recipe"] not in OTHER_NETWORKS]
        measured = [(run, _measure(run, "parameters", "", "")) for run in runs]
        counts = {run.label: round(found[0]) for run, found in measured if found is not None}
        if not counts:
            return Verdict("not yet tested", "No stored run records the number of parameters.")
        row = _published(reported, "R1", dataset, "parameters")
        ours = ", ".join(f"{count:,}" for count in sorted(set(counts.values())))
        outcome = "held" if set(counts.values()) == {int(row["value"])} else "did not hold"
        return Verdict(outcome, f"Our model has {ours}; published: {row['published']}.", tuple(counts))

    return judge


def _full_mnist_runs(runs: Sequence[Run], measures: Callable[[Run], bool]) -> tuple[list[Run], str]:
    """The runs that a verdict on MNIST may rest on, and a note on those that are outdated or left out."""
    counted: list[Run] = []
    reasons: list[str] = []
    for run in runs:
        digit, recipe = run.parameters["digit"], run.parameters["recipe"]
        if _kind(run) != "complete":
            reasons.append("partial data")
        elif digit not in MNIST_DIGITS:
            reasons.append(f"digit {digit}")
        elif recipe not in MNIST_RECIPES:
            reasons.append(f"recipe {recipe}, which is not a published one")
        elif _cut_short(run):
            reasons.append(_budget(run))
        elif not measures(run):
            reasons.append("without this measure")
        else:
            counted.append(run)
    outdated = sum(bool(run.outdated) for run in counted)
    note = f" Outdated: {outdated} of {len(counted)} runs." if outdated else ""
    if reasons:
        note += f" Not counted: {'; '.join(f'{n} ({reason})' for reason, n in Counter(reasons).items())}."
    return counted, note


def _judge_ucsd(
    grade: Callable[[dict[str, Run], pd.DataFrame], int],
) -> Callable[[Sequence[Run], pd.DataFrame], Verdict]:
    """Judge a claim on the three layers of one UCSD model: the worst grade counts, 2 held, 1 partly held, 0 did not."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted, note = _full_ucsd_models(runs)
        if not counted:
            return Verdict("not yet tested", f"No model on complete data to its last epoch.{note}")
        outcome = ("did not hold", "partly held", "held")[min(grade(layers, reported) for layers in counted)]
        evidence = "; ".join(map(_ucsd_scores, counted))
        return Verdict(
            outcome, f"Pixel AUROC — {evidence}.{note}", _labels([run for layers in counted for run in layers.values()])
        )

    return judge


def _full_ucsd_models(runs: Sequence[Run]) -> tuple[list[dict[str, Run]], str]:
    """The models and presets that a verdict on UCSD Ped1 may rest on, by layer, and a note on the others' numbers."""
    models: dict[str, dict[str, Run]] = {}
    for run in runs:
        alike = {name: value for name, value in run.parameters.items() if name != "layer"}
        models.setdefault(str(sorted(alike.items())), {})[run.parameters["layer"]] = run
    counted, others = [], []
    for layers in models.values():
        run = next(iter(layers.values()))
        one_model = {(other.card.digest, str(other.record.get("weights"))) for other in layers.values()}
        short = next(filter(_cut_short, layers.values()), None)
        reasons = [
            "partial data" if any(_kind(other) != "complete" for other in layers.values()) else "",
            "" if short is None else _budget(short),
            "layers of different models or data" if len(one_model) > 1 else "",
            "no published recipe" if run.parameters["recipe"] not in UCSD_RECIPES else "",
            "no preset of the paper or its code" if run.parameters["preset"] not in PRESETS else "",
            "not all layers" if layers.keys() != set(UCSD_LAYERS) else "",
        ]
        if any(reasons):
            others.append(f"{_ucsd_scores(layers)} ({', '.join(filter(None, reasons))})")
        else:
            counted.append(layers)
    outdated = sum(bool(run.outdated) for layers in counted for run in layers.values())
    note = f" Outdated: {outdated} of {sum(map(len, counted))} runs." if outdated else ""
    return counted, note + (f" Not counted: {'; '.join(others)}." if others else "")


def _ucsd_score(run: Run, method: str = "attention") -> tuple[float, float]:
    """Interval of the pixel AUROC of a run."""
    row = run.metric("pixel AUROC", method, "test clips")
    return row["low"], row["high"]


def _ucsd_scores(layers: dict[str, Run]) -> str:
    """The pixel AUROC of attention at each layer, and that of the reconstruction error, as text."""
    run = next(iter(layers.values()))
    measured = {layer: (layers[layer], "attention") for layer in UCSD_LAYERS if layer in layers}
    measured["reconstruction error"] = (run, "reconstruction error")
    shown = []
    for name, (found, method) in measured.items():
        value, low, high = _measure(found, "pixel AUROC", method, "test clips")
        shown.append(f"{name} {value:.3f} ({low:.3f}–{high:.3f})")
    return f"{run.parameters['recipe']}, {run.parameters['preset']}, seed {run.parameters['seed']}: {', '.join(shown)}"


def _grade_ucsd_auroc(layers: dict[str, Run], reported: pd.DataFrame) -> int:
    """Whether each layer reaches the paper's AUROC, or at least lies above one half and above every baseline."""
    grades = []
    for layer, run in layers.items():
        paper = _published(reported[reported["setting"] == layer], "paper", "UCSD Ped1", "pixel AUROC")["value"]
        low, high = _ucsd_score(run)
        others = {row["method"] for row in run.record["metrics"] if row["metric"] == "pixel AUROC"} - {"attention"}
        above = low > 0.5 and all(low > _ucsd_score(run, other)[1] for other in others)
        grades.append(2 if low > 0.5 and high >= paper else 1 if above else 0)
    return min(grades)


def _grade_ucsd_baseline(layers: dict[str, Run], reported: pd.DataFrame) -> int:
    """Whether the best layer lies above the reconstruction error of the same model, or is not told apart from it."""
    best = max(layers.values(), key=lambda run: run.metric("pixel AUROC", "attention", "test clips")["value"])
    low, high = _ucsd_difference(best, "attention", "reconstruction error", "test clips")
    return 2 if low > 0 else 1 if high >= 0 else 0


def _grade_ucsd_layers(layers: dict[str, Run], reported: pd.DataFrame) -> int:
    """Whether the three layers are apart and conv2 is highest, or at least two are apart."""
    values = {layer: run.metric("pixel AUROC", "attention", "test clips")["value"] for layer, run in layers.items()}
    run = next(iter(layers.values()))  # each of them has the differences between all layers
    tenth = "test clips, every tenth frame"
    differences = [_ucsd_difference(run, one, other, tenth) for one, other in combinations(UCSD_LAYERS, 2)]
    apart = [low > 0 or high < 0 for low, high in differences]
    return 2 if all(apart) and max(values, key=values.get) == "conv2" else 1 if any(apart) else 0


def _ucsd_difference(run: Run, one: str, other: str, subset: str) -> tuple[float, float]:
    """Paired interval of the difference between two pixel AUROC of a run."""
    row = run.metric("pixel AUROC, difference", f"{one} − {other}", subset)
    return row["low"], row["high"]


def _judge_mvtec(grade: Callable[[list[Run], pd.DataFrame], int]) -> Callable[[Sequence[Run], pd.DataFrame], Verdict]:
    """Judge a claim on the categories of MVTec AD; the worst configuration counts."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted, note = _full_mvtec_runs(runs)
        if not counted:
            return Verdict("not yet tested", f"No run on a complete category to its last image.{note}")
        configurations: dict[str, list[Run]] = {}
        for run in counted:
            alike = {name: value for name, value in run.parameters.items() if name != "category"}
            configurations.setdefault(str(sorted(alike.items())), []).append(run)
        worst = min(grade(alike, reported) for alike in configurations.values())
        evidence = f"Pixel AUROC — {'; '.join(map(_mvtec_scores, counted))}.{note}"
        return Verdict(("did not hold", "partly held", "held")[worst], evidence, _labels(counted))

    return judge


def _full_mvtec_runs(runs: Sequence[Run]) -> tuple[list[Run], str]:
    """The runs that a verdict on MVTec AD may rest on, and a note on the numbers of the others."""
    counted, others = [], []
    for run in runs:
        if _measure(run, "pixel AUROC", "attention", "") is None:
            continue
        reasons = [
            "" if _kind(run) == "complete" else f"{run.card.mark} data",
            f"{run.record['budget']['used']:,} of {run.record['budget']['asked']:,} images" if _cut_short(run) else "",
            "no published recipe" if run.parameters["recipe"] not in MVTEC_RECIPES else "",
            "another augmentation" if run.parameters["augmentation"] != "paper" else "",
            "no preset of the paper or its code" if run.parameters["preset"] not in PRESETS else "",
        ]
        if any(reasons):
            others.append(f"{_mvtec_scores(run)} ({', '.join(filter(None, reasons))})")
        else:
            counted.append(run)
    outdated = sum(bool(run.outdated) for run in counted)
    note = f" Outdated: {outdated} of {len(counted)} runs." if outdated else ""
    return counted, note + (f" Not counted: {'; '.join(others)}." if others else "")


def _mvtec_scores(run: Run) -> str:
    """The pixel AUROC of attention and of the reconstruction error in one category, as text."""
    shown = []
    for name in ("attention", "reconstruction error"):
        value, low, high = _measure(run, "pixel AUROC", name, "")
        shown.append(f"{name} {value:.3f} ({low:.3f}–{high:.3f})")
    return f"{_setting(run)}: {', '.join(shown)}"


def _setting(run: Run) -> str:
    return run.parameters["category"].replace("_", " ")


def _grade_mvtec_published(runs: list[Run], reported: pd.DataFrame) -> int:
    """Whether AUROC and IoU reach the paper's in two categories of three, or one of them, or all AUROC beat chance."""
    reached = {"pixel AUROC": 0, "IoU": 0}
    for run in runs:
        paper = reported[reported["setting"] == _setting(run)]
        for metric, ours in (("pixel AUROC", "pixel AUROC"), ("IoU", "best IoU (oracle)")):
            _, high = _interval(run, ours, "attention", "")
            reached[metric] += high >= _published(paper, "paper", "MVTec AD", metric)["value"]
    enough = [3 * number >= 2 * len(runs) for number in reached.values()]
    beats_chance = all(_interval(run, "pixel AUROC", "attention", "")[0] > 0.5 for run in runs)
    return 2 if all(enough) else 1 if any(enough) or beats_chance else 0


def _grade_mvtec_baselines(runs: list[Run], reported: pd.DataFrame) -> int:
    """Whether attention lies above every baseline in all categories, or in more than half of them."""
    above = 0
    for run in runs:
        low, _ = _interval(run, "pixel AUROC", "attention", "")
        others = {row["method"] for row in run.record["metrics"] if row["metric"] == "pixel AUROC"} - {"attention"}
        above += all(low > _interval(run, "pixel AUROC", name, "")[1] for name in others)
    return 2 if above == len(runs) else 1 if 2 * above > len(runs) else 0


def _grade_mvtec_share(runs: list[Run], reported: pd.DataFrame) -> int:
    """Whether the share of maps that miss the anomaly contains the published one, or at least lies above one half."""
    rows = [run.metric("maps that miss the anomaly", "attention") for run in runs]
    number = sum(row["n"] for row in rows)
    missed = sum(round(row["value"] * row["n"]) for row in rows)
    share = fraction_interval(np.arange(number) < missed)
    published = _published(reported, "R1", "MVTec AD", "maps that miss the anomaly")["value"] / 100
    return 2 if share.low <= published <= share.high else 1 if share.low > 0.5 else 0


Models = dict[tuple[int | float, int | float, int | float], dict[int, Run]]  # β, γ and λ -> seed -> run


def _judge_dsprites(
    grade: Callable[[Models], int | None], metric: str, method: str = "", subset: str = ""
) -> Callable[[Sequence[Run], pd.DataFrame], Verdict]:
    """Judge a claim on the models of each configuration of dSprites; the worst that can be judged counts.

    Args:
        grade: From the models to 2 held, 1 partly held, 0 did not, or None where models or seeds are missing.
        metric: The number that the evidence shows.
        method: Its method.
        subset: Its subset.
    """

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted, others = [], []
        for run in runs:
            if _measure(run, metric, method, subset) is None:
                continue
            reasons = [
                "" if _kind(run) == "complete" else f"{run.card.mark} data",
                _budget(run) if _cut_short(run) else "",
                "" if run.parameters["attention"] in DSPRITES_LOSSES else "the loss of other code",
                "" if _as_published_loss(run) else "a changed loss",
            ]
            if any(reasons):
                others.append((run, ", ".join(filter(None, reasons))))
            else:
                counted.append(run)
        note = ""
        if others:
            shown = (f"{_sprite_score(run, metric, method, subset)} ({reason})" for run, reason in others)
            note = f" Not counted: {'; '.join(shown)}."
        configurations: dict[str, Models] = {}
        for run in counted:
            weights = ("beta", "gamma", "lambda")
            free = {*weights, "seed", "attention", "layer", "alpha", "pairs"}
            alike = {name: value for name, value in run.parameters.items() if name not in free}
            # A model without the loss belongs to the configuration of each loss.
            losses = DSPRITES_LOSSES if run.parameters["attention"] == "none" else [run.parameters["attention"]]
            for loss in losses:
                models = configurations.setdefault(f"{sorted(alike.items())} {loss}", {})
                models.setdefault(tuple(run.parameters[name] for name in weights), {})[run.parameters["seed"]] = run
        grades = [found for models in configurations.values() if (found := grade(models)) is not None]
        if not grades:
            return Verdict("not yet tested", f"Too few whole runs on the complete release to tell.{note}")
        outdated = sum(bool(run.outdated) for run in counted)
        evidence = "; ".join(_sprite_score(run, metric, method, subset) for run in counted)
        note = (f" Outdated: {outdated} of {len(counted)} runs." if outdated else "") + note
        outcome = ("did not hold", "partly held", "held")[min(grades)]
        return Verdict(outcome, f"{evidence}.{note}", _labels(counted))

    return judge


def _as_published_loss(run: Run) -> bool:
    return all(run.parameters[name] in ("variant", "none") for name in ("layer", "alpha", "pairs"))


def _sprite_score(run: Run, metric: str, method: str, subset: str) -> str:
    parameters = run.parameters
    weights = ", ".join(f"{symbol} {parameters[name]}" for name, symbol in DSPRITES_WEIGHTS.items())
    value, _, _ = _measure(run, metric, method, subset)
    return f"{weights}, seed {parameters['seed']}: {metric} {value:.3f}"


def seed_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of what several seeds gave.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs two or more, got {len(values)}")
    half = student.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _at(
    models: Models, gamma: float | int, weight: float | int, metric: str, method: str = "", subset: str = ""
) -> dict[int, float]:
    """By seed, a number of the model with β = 1 and these weights."""
    return {
        seed: run.metric(metric, method, subset)["value"] for seed, run in models.get((1, gamma, weight), {}).items()
    }


def _grade_dsprites_metric(models: Models) -> int | None:
    """At how many γ of the paper the paired interval over seeds of the difference in the metric lies above zero."""
    above = []
    for gamma in DSPRITES_GAMMAS:
        without, with_loss = (_at(models, gamma, weight, *SPRITE_METRIC) for weight in (0, 1))
        differences = [with_loss[seed] - without[seed] for seed in with_loss.keys() & without.keys()]
        if len(differences) < 2:
            return None
        above.append(seed_interval(differences)[0] > 0)
    return 2 if all(above) else 1 if any(above) else 0


def _grade_dsprites_tradeoff(models: Models) -> int | None:
    """Whether models with the loss dominate all, or some, of those without, in metric and reconstruction."""

    def mean(runs: dict[int, Run], *name: str) -> float:
        return float(np.mean([run.metric(*name)["value"] for run in runs.values()]))

    points = {key: (mean(runs, *SPRITE_METRIC), mean(runs, "reconstruction per image")) for key, runs in models.items()}
    ours = [point for (_, _, weight), point in points.items() if weight]
    others = [point for (_, _, weight), point in points.items() if not weight]
    wanted = {(1, gamma, weight) for gamma in DSPRITES_GAMMAS for weight in (0, 1)}
    if not wanted <= points.keys() or all(gamma for _, gamma, _ in points):  # a β-VAE belongs to the claim
        return None
    if min(len(models[key]) for key in wanted) < 2:
        return None

    def dominated(point: tuple[float, float], by: list[tuple[float, float]]) -> bool:
        return any(score > point[0] and cost <= point[1] for score, cost in by)

    beaten = [dominated(point, ours) for point in others]
    if all(beaten):
        return 2
    return 1 if any(beaten) and not any(dominated(point, others) for point in ours) else 0


def _grade_dsprites_maps(models: Models) -> int | None:
    """At how many γ of the paper the interval over seeds of the overlap with the loss lies below the one without."""
    below = []
    for gamma in DSPRITES_GAMMAS:
        pair = [list(_at(models, gamma, weight, *SPRITE_OVERLAP).values()) for weight in (0, 1)]
        if min(map(len, pair)) < 2:
            return None
        without, with_loss = map(seed_interval, pair)
        below.append(with_loss[1] < without[0])
    return 2 if all(below) else 1 if any(below) else 0


def _grade_dsprites_weight(models: Models) -> int | None:
    """At how many γ the interval over seeds of the metric at the largest λ lies above those at the smaller ones."""
    above = []
    for gamma in DSPRITES_GAMMAS:
        scores = [list(_at(models, gamma, weight, *SPRITE_METRIC).values()) for weight in DSPRITES_LAMBDAS]
        if min(map(len, scores)) < 2:
            return None
        *smaller, largest = map(seed_interval, scores)
        above.append(all(largest[0] > high for _, high in smaller))
    return 2 if all(above) else 1 if any(above) else 0


def _judge_stacked_rbm(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
    """Judge whether the report's map of a stacked RBM finds no more of the anomalous ink than one without meaning."""
    method = "attention, stacked RBM"
    counted, reasons = [], []
    for run in runs:
        reason = _budget(run) if _cut_short(run) else "" if _kind(run) == "complete" else f"{run.card.mark} data"
        if run.parameters["digit"] not in MNIST_DIGITS:
            reason = f"digit {run.parameters['digit']}"
        elif run.parameters["units"] != "spin":
            reason = f"{run.parameters['units']} units"
        if reason:
            reasons.append(reason)
        else:
            counted.append(run)
    outdated = sum(bool(run.outdated) for run in counted)
    note = f" Outdated: {outdated} of {len(counted)} runs." if outdated else ""
    if reasons:
        note += f" Not counted: {'; '.join(f'{n} ({reason})' for reason, n in Counter(reasons).items())}."
    if not _both_digits(counted):
        return Verdict("not yet tested", f"{_missing_digits(counted)}{note}", _labels(counted))
    grades, shown = [], []
    for run in counted:
        scores = _pixel_scores(run)
        low, high = scores[method]
        others = [interval for name, interval in scores.items() if name != "random" and not name.startswith(RBM_MAPS)]
        below_all = all(high < lowest for lowest, _ in others)
        moved = run.metric("pixel AUROC, units renumbered", method, OUTLIERS)
        meaningless = max(scores["random"][1], moved["high"])
        grades.append(2 if low <= meaningless else 1 if below_all else 0)
        told = ", ".join(f"{name} {run.parameters[name]}" for name in ("digit", "layer", "temperature", "seed"))
        shown.append(
            f"{told}: {low:.3f} to {high:.3f}, with the units renumbered {moved['low']:.3f} to {moved['high']:.3f}"
        )
    n = len(counted)
    tally = (
        f"No better than without meaning in {grades.count(2)} of {n} runs, not below every baseline in "
        f"{grades.count(0)}."
    )
    outcome = ("did not hold", "partly held", "held")[min(grades)]
    return Verdict(outcome, f"Pixel AUROC of the report's map — {'; '.join(shown)}. {tally}{note}", _labels(counted))


def _judge_discrepancies(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
    """Judge whether switching either step of ABLATION_STEPS hardly changes the pixel AUROC, on every data set."""
    counted, others = [], []
    for run in runs:
        reasons = ["" if _kind(run) == "complete" else f"{run.card.mark} data", _budget(run) if _cut_short(run) else ""]
        if any(reasons):
            others.append((run, ", ".join(filter(None, reasons))))
        else:
            counted.append(run)
    counted, named = _largest(counted), _largest([run for run, _ in others])
    others = [(run, reason) for run, reason in others if run in named]
    there = {run.parameters["dataset"] for run in counted}
    held, refuted = 0, 0
    for switches in ABLATION_STEPS.values():
        found = [effect(_change(run, *switch), ABLATION_MARGIN) for run in counted for switch in switches]
        refuted += "effect" in found
        held += there >= set(ABLATION_DATA_SETS) and set(found) == {"hardly any effect"}
    outdated = sum(bool(run.outdated) for run in counted)
    note = f" Outdated: {outdated} of {len(counted)} runs." if outdated else ""
    if others:
        note += f" Not counted: {'; '.join(f'{_changes_shown(run)} ({reason})' for run, reason in others)}."
    outcomes = {(2, 0): "held", (1, 1): "partly held", (0, 2): "did not hold"}
    shown = "; ".join(map(_changes_shown, counted)) or "no model of complete data, trained to its last epoch"
    evidence = f"Change in pixel AUROC — {shown}.{note}"
    return Verdict(outcomes.get((held, refuted), "not yet tested"), evidence, _labels(counted))


def _largest(runs: Sequence[Run]) -> list[Run]:
    """Of the runs on each model that with the most measured images."""
    by_model = defaultdict(list)
    for run in runs:
        by_model[run.parameters["dataset"], run.parameters["model"]].append(run)
    return [max(same, key=lambda run: run.record["test"]["measured"]) for same in by_model.values()]


def _change(run: Run, name: str, reference: str) -> dict[str, Any]:
    return run.metric("pixel AUROC, change", name, reference)


def _changes_shown(run: Run) -> str:
    """What switching each step changes in a run, in the paper's rule and in the code's, as text."""
    steps = []
    for step, switches in ABLATION_STEPS.items():
        rows = [_change(run, *switch) for switch in switches]
        paper, code = (
            f"{row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}; {effect(row, ABLATION_MARGIN)})"
            for row in rows
        )
        steps.append(f"{step} {paper} in the paper's rule, {code} in the code's")
    return f"{run.parameters['dataset']} {run.parameters['model']}: {', '.join(steps)}"


def _pixel_scores(run: Run) -> dict[str, tuple[float, float]]:
    """Interval of the pixel AUROC of every method of a run."""
    methods = [row["method"] for row in run.record["metrics"] if row["metric"] == "pixel AUROC"]
    found = {method: _interval(run, "pixel AUROC", method, OUTLIERS) for method in methods}
    return {method: interval for method, interval in found.items() if interval is not None}


def _interval(run: Run, metric: str, method: str, subset: str) -> tuple[float, float] | None:
    measured = _measure(run, metric, method, subset)
    if measured is None:
        return None
    value, low, high = measured
    return (value if low is None else low, value if high is None else high)


def _both_digits(runs: Sequence[Run]) -> bool:
    return {run.parameters["digit"] for run in runs} >= set(MNIST_DIGITS)


def _missing_digits(runs: Sequence[Run]) -> str:
    missing = [str(digit) for digit in MNIST_DIGITS if digit not in {run.parameters["digit"] for run in runs}]
    return f"No run that counts for digit {' and '.join(missing)}."


def _per_digit(runs: Sequence[Run], metric: str, method: str, unit: str = "") -> str:
    """Range of our values over the runs of each digit, and what their intervals cover together, as text."""
    scale = 100 if unit == "%" else 1
    parts = []
    for digit in MNIST_DIGITS:
        same = [run for run in runs if run.parameters["digit"] == digit]
        found = [measured for run in same if (measured := _measure(run, metric, method, OUTLIERS)) is not None]
        if not found:
            continue
        value, low, high = (
            [_shown(scale * number, unit, False) for number in numbers if number is not None]
            for numbers in zip(*found, strict=True)
        )
        ends = dict.fromkeys((min(value, key=float), max(value, key=float)))
        covered = f"; intervals {min(low, key=float)} to {max(high, key=float)}" if low and high else ""
        parts.append(f"{_with_unit('–'.join(ends), unit)} (digit {digit}{covered})")
    return f"{method}: {', '.join(parts)}"


def _published(reported: pd.DataFrame, source: str, dataset: str, metric: str) -> dict[str, Any]:
    mask = (reported["source"] == source) & (reported["dataset"] == dataset) & (reported["metric"] == metric)
    return reported[mask].iloc[0].to_dict()


def _labels(runs: Sequence[Run]) -> tuple[str, ...]:
    return tuple(run.label for run in runs)


_MNIST_RUNS = (
    "Counted are all stored runs on complete MNIST, for ones and for threes, that follow the recipe of the authors' "
    "code or of a report to its last epoch. "
)
_ATTENTION_CRITERION = (
    _MNIST_RUNS + "Held: in every run the {} pixel AUROC over all outliers has an interval above one half and above "
    "the intervals of the random map and of every baseline (input intensity, reconstruction error, mean image "
    "difference, centre prior). Partly held: in every run it lies above one half and above the random map, which a map "
    "that ignores the image can do as well. Did not hold: otherwise."
)

_MVTEC_RUNS = (
    " Counted are runs on complete categories that follow the recipe of a report, with the paper's augmentation, to "
    "its last image, by the paper's preset or its code's; of several configurations the worst counts."
)
_EQUAL_SIZE = (
    f"Held: the numbers are equal in every stored run, save those of another network (recipe "
    f"{', '.join(OTHER_NETWORKS)}). Did not hold: otherwise."
)

_DSPRITES_RUNS = (
    " Counted are models trained on the complete release to the last step of a recipe, with the paper's formula for "
    "the loss at λ = 1 where no other is named, at every γ of the paper's figure and with two seeds or more; of "
    "several configurations the worst counts."
)

_UCSD_RUNS = (
    "Counted are all stored models on complete UCSD Ped1 that follow the recipe of a report to its last epoch, with "
    "runs for all three layers by the rule of the paper or of the authors' code. In every one of them, "
)

CLAIMS = (
    Claim(
        id="MNIST maps",
        text="(i) On MNIST the attention maps highlight what is anomalous and explain the model intuitively.",
        claimed_by="Liu et al. 2020; quoted by Reports 1 and 2",
        chapter="mnist",
        criterion=_ATTENTION_CRITERION.format("paper's map's"),
        judge=_judge_attention("attention, paper"),
    ),
    Claim(
        id="MNIST maps of the code",
        text="Claim (i) is confirmed with the maps of the authors' code.",
        claimed_by="Reports 1 and 2",
        chapter="mnist",
        criterion=_ATTENTION_CRITERION.format("map of the authors' code's"),
        judge=_judge_attention("attention, authors' code"),
    ),
    Claim(
        id="MNIST share",
        text="A small share of the MNIST maps is less intuitive than the paper's figure suggests (counted by eye).",
        claimed_by="Report 1",
        chapter="mnist",
        criterion=_MNIST_RUNS
        + "A map counts as less intuitive where its own pixel AUROC is below one half (our definition). With the maps "
        "of the authors' code, held: in every run the interval of the measured share meets the published range. "
        "Partly held: in some runs. Did not hold: in none.",
        judge=_judge_less_intuitive,
    ),
    Claim(
        id="MNIST weights",
        text="The authors' trained weights and newly trained ones give identical MNIST maps.",
        claimed_by="Report 1",
        chapter="mnist",
        criterion="Held: over the test outliers, maps from the authors' weights and from ours differ no more than maps "
        "from two of our seeds. Partly held: they differ more, but both pass or both fail claim (i). Did not hold: "
        "otherwise. It needs the authors' weights.",
    ),
    Claim(
        id="MNIST size",
        text="The MNIST model has the number of parameters in Table 1 of Report 1.",
        claimed_by="Report 1",
        chapter="mnist",
        criterion=_EQUAL_SIZE,
        judge=_judge_parameters("MNIST"),
    ),
    Claim(
        id="UCSD AUROC",
        text="(ii) On UCSD Ped1 the maps highlight anomalies with the paper's AUROC.",
        claimed_by="Liu et al. 2020; not reproduced by Reports 1 and 2",
        chapter="ucsd",
        criterion=_UCSD_RUNS + "and for each of the three layers, held: the interval of the pixel AUROC lies above one "
        "half and reaches the paper's value. Partly held: it lies above one half and above every baseline, but below "
        "the paper's value. Did not hold: otherwise.",
        judge=_judge_ucsd(_grade_ucsd_auroc),
    ),
    Claim(
        id="UCSD baseline",
        text="(ii) On UCSD Ped1 the maps do better than the baseline.",
        claimed_by="Liu et al. 2020, as quoted by Report 2",
        chapter="ucsd",
        criterion=_UCSD_RUNS + "held: the paired interval of the pixel AUROC of the best layer minus that of "
        "the reconstruction error of the same model lies above zero. Partly held: it reaches over zero. Did not hold: "
        "it lies below.",
        judge=_judge_ucsd(_grade_ucsd_baseline),
    ),
    Claim(
        id="UCSD layers",
        text="The layer matters: conv1, conv2 and conv3 give different AUROC (both reports print one value for all).",
        claimed_by="Liu et al. 2020, Table quoted by Report 1",
        chapter="ucsd",
        criterion=_UCSD_RUNS + "held: the paired intervals of the differences in pixel AUROC between the layers all "
        "leave out zero, and conv2 is highest. Partly held: at least one of them does. Did not hold: none does.",
        judge=_judge_ucsd(_grade_ucsd_layers),
    ),
    Claim(
        id="UCSD size",
        text="The UCSD model has the number of parameters in Table 1 of Report 1.",
        claimed_by="Report 1",
        chapter="ucsd",
        criterion=_EQUAL_SIZE,
        judge=_judge_parameters("UCSD Ped1"),
    ),
    Claim(
        id="MVTec AUROC and IoU",
        text="(iii) On MVTec AD the maps localise defects with the paper's AUROC and IoU.",
        claimed_by="Liu et al. 2020; AUROC confirmed by Report 2, both lower in Report 1",
        chapter="mvtec15",
        criterion="Over the complete categories at hand, held: the interval of the pixel AUROC and that of the IoU "
        "reach the paper's values in at least two categories of three. Partly held: one of the two metrics does, or "
        "the AUROC lies above one half in every category. Did not hold: otherwise." + _MVTEC_RUNS,
        judge=_judge_mvtec(_grade_mvtec_published),
    ),
    Claim(
        id="MVTec other methods",
        text="(iii) On MVTec AD the maps do better than other methods.",
        claimed_by="Liu et al. 2020, as quoted by Reports 1 and 2",
        chapter="mvtec15",
        criterion="Held: in every complete category the interval of the pixel AUROC lies above those of every "
        "baseline that this book runs. Partly held: in more than half of them. Did not hold: otherwise." + _MVTEC_RUNS,
        judge=_judge_mvtec(_grade_mvtec_baselines),
    ),
    Claim(
        id="MVTec share",
        text="Most MVTec maps, drawn at random, do not show the anomaly (share counted by eye).",
        claimed_by="Report 1",
        chapter="mvtec10",
        criterion="A map misses the anomaly where its own pixel AUROC is below one half (our definition). Held: the "
        "interval of the share over all defective images contains the published share. Partly held: it lies above one "
        "half of the maps. Did not hold: otherwise." + _MVTEC_RUNS,
        judge=_judge_mvtec(_grade_mvtec_share),
    ),
    Claim(
        id="MVTec size",
        text="The MVTec model has the number of parameters in Table 1 of Report 1.",
        claimed_by="Report 1",
        chapter="mvtec10",
        criterion=_EQUAL_SIZE,
        judge=_judge_parameters("MVTec AD"),
    ),
    Claim(
        id="dSprites metric",
        text="AD-FactorVAE reaches a higher disentanglement metric than FactorVAE.",
        claimed_by="Liu et al. 2020; Report 1 quotes it and could not test it",
        chapter="disentanglement",
        criterion="Held: at every γ of the paper the interval over seeds of the difference in the FactorVAE metric "
        "(five factors, held-out votes) lies above zero. Partly held: at some γ. Did not hold: at none."
        + _DSPRITES_RUNS,
        judge=_judge_dsprites(_grade_dsprites_metric, *SPRITE_METRIC),
    ),
    Claim(
        id="dSprites trade-off",
        text="(iv) The attention loss improves the trade-off between reconstruction and disentanglement.",
        claimed_by="Liu et al. 2020; not reproduced by Report 2",
        chapter="disentanglement",
        criterion="Held: every FactorVAE and β-VAE point is dominated by an AD-FactorVAE point (higher metric, no "
        "higher reconstruction loss). Partly held: some are, and no AD-FactorVAE point is dominated. Did not hold: "
        "otherwise." + _DSPRITES_RUNS,
        judge=_judge_dsprites(_grade_dsprites_tradeoff, *SPRITE_METRIC),
    ),
    Claim(
        id="dSprites maps",
        text="(v) The attention loss separates the regions to which the latents respond.",
        claimed_by="Liu et al. 2020; not validated by Report 2",
        chapter="disentanglement",
        criterion="Held: over seeds the interval of the mean overlap (the attention loss itself, on test images, over "
        "all pairs of active latents) of AD-FactorVAE lies below that of FactorVAE at every γ. Partly held: at some "
        "γ. Did not hold: at none. The maps are those of the paper at conv4." + _DSPRITES_RUNS,
        judge=_judge_dsprites(_grade_dsprites_maps, *SPRITE_OVERLAP),
    ),
    Claim(
        id="dSprites λ",
        text="The largest weight λ that was tried gives the highest disentanglement metric.",
        claimed_by="Report 2, experiment 3",
        chapter="disentanglement",
        criterion="Held: over seeds the interval of the FactorVAE metric at the largest λ of Report 2 lies above those "
        "at the smaller ones, at every γ from 10 to 40. Partly held: at some γ. Did not hold: at none."
        + _DSPRITES_RUNS,
        judge=_judge_dsprites(_grade_dsprites_weight, *SPRITE_METRIC),
    ),
    Claim(
        id="discrepancies",
        text="Where code and paper differ (ReLU, normalised gradients), maps and AUROC are hardly affected.",
        claimed_by="Report 2",
        chapter="ablations",
        criterion="A step hardly matters where the paired interval of the change in pixel AUROC lies within "
        f"± {ABLATION_MARGIN}, with the step switched in the paper's rule and in that of the authors' code, on every "
        "model, and there are models of MNIST, UCSD Ped1 and MVTec AD. It matters where one of these intervals lies "
        "wholly beyond that. Held: both steps hardly matter. Partly held: one hardly matters, the other does. Did not "
        "hold: both matter. Not yet tested: it is undecided whether a step matters. Counted are models of complete "
        "data, trained to the last epoch of their recipe; of several runs on one model that with the most test images. "
        "Reworded after trial runs had been seen: before, a step mattered where an interval reached beyond the margin "
        "and left out zero.",
        judge=_judge_discrepancies,
    ),
    Claim(
        id="stacked RBM",
        text="Attention maps of a stacked RBM show no meaningful information on anomalous regions.",
        claimed_by="Report 2",
        chapter="rbm",
        criterion="Held: on MNIST the interval of the maps' pixel AUROC meets or lies below that of the random map, or "
        "the range of the same map with its units renumbered at random. Partly held: it lies above both and below "
        "every baseline. Did not hold: otherwise. The worst run counts, of those with the report's units, -1 and 1, on "
        "the complete MNIST with digits 1 and 3, trained to the last epoch of the recipe. Reworded after trial runs "
        "had been seen: before, renumbered units played no part, and runs with other units counted.",
        judge=_judge_stacked_rbm,
    ),
)
