"""How a claim is decided: by comparisons whose uncertainty is known, in parts, with a direction and a strength.

A claim has parts, such as the digits or the layers that it speaks of, and a part has comparisons. What is compared is
paired wherever the same images or seeds allow it. Of each comparison there are two p: that the data would favour the
claim as much as they do, and that they would speak against it as much, if the truth lay on the border. Twice the
smaller is the comparison's p, and Holm's procedure keeps the chance of any wrong outcome among all comparisons of a
claim at LEVEL. A part is

    supported     where all its comparisons favour it
    contradicted  where one of them speaks against it
    undecided     otherwise: an interval that does not separate is never a "no"

and a claim is supported or contradicted where all its parts are, mixed where some are supported and others are
contradicted, and undecided otherwise.

The strength says what the runs lack: full where nothing is missing, none where no run speaks of the claim. The worst of
several runs decides nothing, nor does what is best on the test images: `chosen` says which runs count.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from jaxtyping import Float
from scipy.special import logit
from scipy.stats import norm as normal
from scipy.stats import t as student

from expvae_book.matching import short
from expvae_book.runs import Run

Direction = Literal["supported", "mixed", "contradicted", "undecided"]
Outcome = Literal["supported", "contradicted", "undecided"]
DIRECTIONS = get_args(Direction)
LEVEL = 0.05
SEEDS = 3  # from which on seeds are resampled too; with fewer no verdict is full
MARGIN = 0.02  # of an AUROC or IoU: what "reaches" and "the same" allow


@dataclass(frozen=True)
class Comparison:
    """A difference that favours a claim where it is positive, in a unit in which its error is near to normal.

    Attributes:
        shown: It in words and numbers.
        difference: Its estimate.
        error: Standard error.
        freedom: Degrees of freedom of the error.
        alike: If given, it favours the claim to lie within ± this instead.
        apart: Whether it favours the claim to lie beyond that.
    """

    shown: str
    difference: float
    error: float
    freedom: float = np.inf
    alike: float | None = None
    apart: bool = False

    @property
    def chances(self) -> tuple[float, float]:
        """The p of what favours the claim, and of what speaks against it, each one-sided.

        Of `alike` by two one-sided tests (Schuirmann 1987): that both ends are kept, or that one is passed.
        """
        if self.alike is None:
            return self._beyond(0.0), self._below(0.0)
        within = max(self._beyond(-self.alike), self._below(self.alike))
        outside = min(1.0, 2 * min(self._beyond(self.alike), self._below(-self.alike)))
        return (outside, within) if self.apart else (within, outside)

    def _beyond(self, border: float) -> float:
        if not self.error:
            return float(self.difference <= border)
        return float(student.sf((self.difference - border) / self.error, self.freedom))

    def _below(self, border: float) -> float:
        if not self.error:
            return float(self.difference >= border)
        return float(student.cdf((self.difference - border) / self.error, self.freedom))


@dataclass(frozen=True)
class Point:
    """A number that a part of a claim rests on, as the first page draws it; between 0 and 1.

    Attributes:
        who: Whose it is; the control is the untrained network, or else what the claim compares with.
        value: The number, or the middle of a range that was printed.
        low: Lower end of its interval, or of the range; NaN without one.
        high: Upper end.
    """

    who: Literal["published", "ours", "control"]
    value: float
    low: float = np.nan
    high: float = np.nan


@dataclass(frozen=True)
class Part:
    """A part of a claim.

    Attributes:
        name: Which, such as "digit 1".
        comparisons: What has to favour it.
        lacking: What keeps it undecided, if anything, such as "no untrained network beside it".
        points: The numbers behind it.
    """

    name: str
    comparisons: tuple[Comparison, ...]
    lacking: str = ""
    points: tuple[Point, ...] = ()


@dataclass(frozen=True)
class Verdict:
    """What the stored runs say about a claim.

    Attributes:
        direction: One of DIRECTIONS.
        lacking: What the runs lack for full strength, the weightiest first.
        evidence: The numbers that decided it, from the records of the runs.
        runs: Labels of the runs that count.
        points: The numbers behind its parts.
    """

    direction: Direction
    lacking: tuple[str, ...]
    evidence: str
    runs: tuple[str, ...] = ()
    points: tuple[Point, ...] = ()

    @property
    def strength(self) -> str:
        """Of "full", "none" and "reduced" with what is missing."""
        if not self.runs:
            return "none"
        return f"reduced: {', '.join(self.lacking)}" if self.lacking else "full"


Judge = Callable[[Sequence[Run], pd.DataFrame], Verdict]


def holm(p_K: Sequence[float]) -> list[float]:
    """Adjust p by Holm (1979): p_(k) becomes the largest of (K − j + 1) p_(j) over j ≤ k, at most 1."""
    order, adjusted, least = np.argsort(p_K, kind="stable"), [1.0] * len(p_K), 0.0
    for rank, place in enumerate(order):
        least = max(least, min(1.0, (len(p_K) - rank) * p_K[place]))
        adjusted[place] = least
    return adjusted


def outcomes(parts: Sequence[Part]) -> list[tuple[Outcome, str]]:
    """The outcome of each part, by Holm over the comparisons of all of them, and its evidence."""
    chances = [comparison.chances for part in parts for comparison in part.comparisons]
    adjusted = iter(holm([min(1.0, 2 * min(pair)) for pair in chances]))
    found = []
    for part in parts:
        told, texts = [], []
        for comparison in part.comparisons:
            p, (favours, against) = next(adjusted), comparison.chances
            told.append("undecided" if p > LEVEL else "for" if favours < against else "against")
            texts.append(f"{comparison.shown}{_side(comparison, told[-1])} (p {_text(p)})")
        texts += [part.lacking] if part.lacking else []
        if "against" in told:
            outcome = "contradicted"
        else:
            outcome = "supported" if told and set(told) == {"for"} and not part.lacking else "undecided"
        found.append((outcome, f"{part.name}: {', '.join(texts) or 'no number'} — {outcome}"))
    return found


def _side(comparison: Comparison, told: str) -> str:
    """On which side of its margin a difference lies, where it has one: its p is then not that of no difference."""
    if comparison.alike is None:
        return ""
    inside = "within" if (told == "for") != comparison.apart else "beyond"
    return f", {'not told to lie within or beyond' if told == 'undecided' else inside} ±{comparison.alike:g}"


def decide(parts: Sequence[Part], runs: Iterable[Run], lacking: Iterable[str]) -> Verdict:
    """The verdict on a claim from its parts.

    Args:
        parts: All that the claim states, those without a number too.
        runs: The runs that count.
        lacking: What they lack; see `lacks`.
    """
    found = outcomes(parts)
    kinds = {outcome for outcome, _ in found}
    separate = kinds.pop() if len(kinds) == 1 else "undecided"
    direction = "mixed" if {"supported", "contradicted"} <= kinds else separate
    evidence = "; ".join(text for _, text in found)
    points = tuple(point for part in parts for point in part.points)
    labels = tuple(run.label for run in runs)
    return Verdict(direction, tuple(dict.fromkeys(lacking)), f"{evidence}.", labels, points)


# Which runs count, and what they lack ---------------------------------------------------------------------------------


def alike(runs: Iterable[Run], *free: str) -> list[list[Run]]:
    """The runs whose parameters are equal but for the free ones, together."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(str(sorted(item for item in run.parameters.items() if item[0] not in free)), []).append(run)
    return list(groups.values())


def chosen(runs: Iterable[Run], recipes: Sequence[str], *free: str) -> list[Run]:
    """Of several configurations the one that counts, all its seeds: never by its results.

    Those of a published recipe come first, in the order given; then current before outdated ones, the largest share of
    the budget, the most runs. Beside current runs outdated ones do not count.

    Args:
        runs: Candidates.
        recipes: Published recipes, the one that the claim rests on first.
        free: Parameters in which the runs of a configuration may differ, beside the seed.
    """

    def rank(group: list[Run]) -> tuple:
        recipe = group[0].parameters.get("recipe", "")
        place = recipes.index(recipe) if recipe in recipes else len(recipes)
        return place, any(run.outdated for run in group), -min(map(share, group)), -len(group), group[0].label

    groups = alike(runs, "seed", *free)
    return min(([run for run in group if not run.outdated] or group for group in groups), key=rank, default=[])


def share(run: Run) -> float:
    """The share of the budget that its recipe asks for."""
    budget = run.record["budget"]
    return budget["used"] / budget["asked"] if budget["asked"] else 1.0


def lacks(runs: Sequence[Run], recipes: Sequence[str] = (), seeds: int = SEEDS) -> list[str]:
    """What runs lack for full strength: a complete release, a whole budget, seeds, a published recipe, currency.

    Sprites that are rendered from their factors are those of the release.

    Args:
        runs: Those that count, of one part of a claim.
        recipes: Published recipes; none where it does not matter.
        seeds: How many there should be.
    """
    found = [f"{run.card.mark} data" for run in runs if run.card.mark not in ("", "rendered")]
    found += [short(run, ",") for run in runs if short(run)]
    there = len({run.parameters["seed"] for run in runs if "seed" in run.parameters})
    found += [f"{there} of {seeds} seeds"] if there < seeds else []
    found += ["no published recipe" for run in runs if recipes and run.parameters["recipe"] not in recipes]
    found += ["outdated" for run in runs if run.outdated]
    return list(dict.fromkeys(found))


# Comparisons ----------------------------------------------------------------------------------------------------------


def over_seeds(
    name: str,
    values_S: Sequence[float] | Float[np.ndarray, " s"],
    drawn_SR: Float[np.ndarray, "s r"] | None = None,
    units: int = 0,
    *,
    shown: str = "{:+.3f}",
    told: float | None = None,
    alike: float | None = None,
) -> Comparison | None:
    """A difference that several seeds give, each with what the resamples of its test units gave; None without any.

        d = mean_s d_s    SE² = Var_r(mean_s d_sr) + Var_s(d_s)/S

    the second only from SEEDS seeds on. Resamples are the same for all seeds, so that the first is the error from the
    choice of test units alone. Degrees of freedom after Satterthwaite, of units − 1 and S − 1.

    Args:
        name: What it is.
        values_S: The difference by seed.
        drawn_SR: The same by resample; None where there is no error but that between seeds.
        units: How many units are resampled.
        shown: How the number is written.
        told: The number that is shown instead of the mean of the differences, as that is on another scale.
        alike: As in `Comparison`.
    """
    if not len(values_S):
        return None
    mean, parts = float(np.mean(values_S)), []
    if drawn_SR is not None:
        parts.append((float(np.nanvar(np.mean(drawn_SR, 0), ddof=1)), units - 1))
    if len(values_S) >= (SEEDS if drawn_SR is not None else 2):
        parts.append((float(np.var(values_S, ddof=1)) / len(values_S), len(values_S) - 1))
    if not parts:
        return None
    variance = sum(part for part, _ in parts)
    below = sum(part**2 / max(freedom, 1) for part, freedom in parts)
    freedom = variance**2 / below if below else np.inf
    text = shown.format(mean if told is None else told)
    return Comparison(f"{name} {text}", mean, variance**0.5, freedom, alike)


def compare(name: str, ours: "Scores", theirs: "Scores | float") -> Comparison | None:
    """Whether a measure is above another, or above a number, on the logit scale, where it has no bounds.

    Args:
        name: What it is compared with.
        ours: By seed.
        theirs: By the same seeds and resamples; or a number.
    """
    other = Scores.constant(theirs, ours) if isinstance(theirs, float) else theirs
    value_S, drawn_SR = _logit(ours.value_S) - _logit(other.value_S), _logit(ours.drawn_SR) - _logit(other.drawn_SR)
    return over_seeds(name, value_S, drawn_SR, ours.units, told=float(np.mean(ours.value_S - other.value_S)))


def apart(name: str, ours: "Scores", theirs: "Scores", margin: float) -> Comparison | None:
    """Whether two measures of the same seeds and resamples differ by more than a margin."""
    drawn_SR = ours.drawn_SR - theirs.drawn_SR
    found = over_seeds(name, ours.value_S - theirs.value_S, drawn_SR, ours.units, alike=margin)
    return found and replace(found, apart=True)


def from_rows(
    name: str, rows: Sequence[Mapping[str, Any]], border: float = 0.0, *, sign: int = 1, alike: float | None = None
) -> Comparison | None:
    """A number that a row of each seed gives with its interval, against a border, as `over_seeds`; None without any.

    Args:
        name: What it is.
        rows: Rows of a record.
        border: What it is compared with.
        sign: 1 where it favours the claim to be above, -1 where below.
        alike: As in `Comparison`.
    """
    if not rows:
        return None
    values_S = np.array([row["value"] for row in rows])
    error_S = np.array([(row["high"] - row["low"]) / (2 * normal.ppf(0.975)) for row in rows])
    variance = float(np.mean(error_S**2))
    if len(values_S) >= SEEDS:
        variance += float(np.var(values_S, ddof=1)) / len(values_S)
    text = f"{name} {values_S.mean():{'.3f' if border else '+.3f'}}"
    return Comparison(text, sign * (float(values_S.mean()) - border), variance**0.5, alike=alike)


@dataclass(frozen=True)
class Scores:
    """A measure between 0 and 1 by seed, and by seed and resample of the test units.

    Attributes:
        value_S: The measure.
        drawn_SR: What the resamples gave.
        units: How many units are resampled.
    """

    value_S: Float[np.ndarray, " s"]
    drawn_SR: Float[np.ndarray, "s r"]
    units: int

    def point(self, who: Literal["ours", "control"]) -> Point:
        """The mean over the seeds, and its 95 % interval from the choice of the test units."""
        return Point(who, float(self.value_S.mean()), *np.nanpercentile(self.drawn_SR.mean(0), (2.5, 97.5)).tolist())

    @classmethod
    def constant(cls, value: float, like: "Scores") -> "Scores":
        """A number that is the same for all seeds and resamples."""
        return cls(np.full_like(like.value_S, value), np.full_like(like.drawn_SR, value), like.units)

    @classmethod
    def mean(cls, scores: Sequence["Scores"]) -> "Scores":
        """The mean over sets of test units that are resampled each for itself, such as categories, of as many seeds."""
        seeds = min(len(one.value_S) for one in scores)
        return cls(
            np.mean([one.value_S[:seeds] for one in scores], 0),
            # The draws of a seed are alike for sets of one size: shifted, each set is drawn for itself.
            np.mean([np.roll(one.drawn_SR[:seeds], place, 1) for place, one in enumerate(scores)], 0),
            sum(one.units for one in scores),
        )


def row_point(who: Literal["ours", "control"], rows: Sequence[Mapping[str, Any]]) -> tuple[Point, ...]:
    """The mean over the rows of some seeds, and that of the ends of their intervals; nothing without a row."""
    if not rows:
        return ()
    return (Point(who, *(float(np.mean([row[end] for row in rows])) for end in ("value", "low", "high"))),)


def seed_interval(values: Sequence[float] | pd.Series, level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of what several seeds gave.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs two or more, got {len(values)}")
    half = student.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _logit(values: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    return logit(np.clip(values, 1e-3, 1 - 1e-3))


def _text(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".lstrip("0") if p < 1 else "1"
