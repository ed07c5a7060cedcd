"""What all judges do: sift the runs, read their intervals, grade them and say so. The judges are in judges.py."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import pandas as pd
from scipy.stats import t as student

from expvae_book.matching import measure
from expvae_book.names import ATTENTION, AUROC
from expvae_book.runs import Run

Outcome = Literal["held", "partly held", "did not hold", "not yet tested"]
OUTCOMES = get_args(Outcome)
GRADES: dict[int | None, Outcome] = {2: "held", 1: "partly held", 0: "did not hold", None: "not yet tested"}
Graded = tuple[int | None, str]  # a key of GRADES, and the evidence for it
Interval = tuple[float, float]


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


Judge = Callable[[Sequence[Run], pd.DataFrame], Verdict]


def judging(
    decide: Callable[[list[Run], pd.DataFrame], Graded],
    reasons: Callable[..., list[str]],
    described: Callable[..., str] | None = None,
    units: Callable[[Sequence[Run]], Iterable[Sequence[Run]]] = zip,
    lacking: Callable[[list[Run]], str] = lambda runs: "",
) -> Judge:
    """A judge, who sifts the runs, lets the grade of those that count decide, and names those that do not count.

    The evidence also notes how many of those that count are outdated.

    Args:
        decide: From the runs that count and the published numbers to a grade and its evidence.
        reasons: What is against each of several requirements in the runs of a unit, the weightiest first; blank where
            it is met.
        described: The numbers of a unit as text, by which the evidence names those left out with all that is against
            them; None where they are only tallied, by what is weightiest.
        units: From the runs to those that count together or not at all; by default each for itself.
        lacking: What those that count lack for a verdict, as a sentence; blank where it is nothing.
    """

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted, others = [], []
        for unit in units(runs):
            against = list(filter(None, reasons(*unit)))
            if not against:
                counted += unit
            else:
                others.append(f"{described(*unit)} ({', '.join(against)})" if described else against[0])
        if described is None:
            others = [f"{number} ({reason})" for reason, number in Counter(others).items()]
        sentence = lacking(counted)
        grade, evidence = (None, sentence) if sentence else decide(counted, reported)
        outdated = sum(bool(run.outdated) for run in counted)
        evidence += f" Outdated: {outdated} of {len(counted)} runs." if outdated else ""
        evidence += f" Not counted: {'; '.join(others)}." if others else ""
        return Verdict(GRADES[grade], evidence, tuple(run.label for run in counted))

    return judge


def unless(met: object, reason: str) -> str:
    """The reason, unless a requirement is met."""
    return "" if met else reason


def incomplete(run: Run) -> str:
    """What is against a run's data: "partial data"."""
    return unless(run.card.kind == "complete", f"{run.card.mark} data")


def measured(*number: str) -> Callable[[Iterable[Run]], Iterator[tuple[Run]]]:
    """From runs to those that have a number, each for itself."""
    return lambda runs: zip(run for run in runs if measure(run, *number) is not None)


def alike(runs: Iterable[Run], *free: str) -> list[list[Run]]:
    """The runs whose parameters are equal but for the free ones, together."""
    groups = defaultdict(list)
    for run in runs:
        groups[str(sorted(item for item in run.parameters.items() if item[0] not in free))].append(run)
    return list(groups.values())


def graded(fully: bool, partly: bool) -> int:
    """The grade of a claim that holds fully, partly or not."""
    return 2 if fully else int(partly)


def pixel_scores(run: Run, subset: str = "") -> dict[str, Interval]:
    """Interval of the pixel AUROC of every method of a run, but for the maps of its other layers and presets."""
    rows = [row for row in run.record["metrics"] if (row["metric"], row["subset"]) == (AUROC, subset)]
    rows = [row for row in rows if row["method"] not in run.maps and row["value"] is not None]
    return {row["method"]: (row["low"], row["high"]) for row in rows}


def above_baselines(scores: dict[str, Interval], method: str = ATTENTION) -> bool:
    """Whether the interval of a method lies above that of everything that is no attention."""
    others = [high for name, (_, high) in scores.items() if not name.startswith(ATTENTION)]
    return scores[method][0] > max(others)


def with_interval(run: Run, name: str, method: str, subset: str = "") -> str:
    """The pixel AUROC of a method as text, such as "conv1 0.605 (0.539–0.659)"."""
    value, low, high = measure(run, AUROC, method, subset)
    return f"{name} {value:.3f} ({low:.3f}–{high:.3f})"


def seed_interval(values: Sequence[float] | pd.Series, level: float = 0.95) -> Interval:
    """Student's interval of the mean of what several seeds gave.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs two or more, got {len(values)}")
    half = student.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - half), float(np.mean(values) + half)
