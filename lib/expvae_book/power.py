"""What differences between two methods a number of seeds can find: the spread between seeds, and the power of a t test.

A design has two arms of n seeds each, and finds a difference where Student's interval of it leaves out zero. *Paired*
designs take the interval of n differences, two-sample ones that of the difference of two means with a pooled variance.
The scores of both arms are independent and have the same standard deviation σ: a seed that two methods share gives them
nothing in common once their trainings have come apart, so that the standard deviation of a paired difference is √2 σ.
"""

import math
from dataclasses import dataclass
from itertools import count

import numpy as np
import pandas as pd
from jaxtyping import Float, Shaped
from scipy.optimize import brentq
from scipy.stats import chi2, nct
from scipy.stats import t as student

LEVEL = 0.95  # of the intervals
TARGET = 0.8  # the power that a design is asked for


@dataclass(frozen=True)
class Spread:
    """A standard deviation that groups have in common, with its interval.

    Attributes:
        sd: The pooled standard deviation.
        low: Lower end of its interval.
        high: Upper end of its interval.
        freedom: Degrees of freedom, ν.
    """

    sd: float
    low: float
    high: float
    freedom: int

    def __str__(self) -> str:
        return f"{self.sd:.3f} [{self.low:.3f}, {self.high:.3f}]"


def errors(value_N: Float[np.ndarray, " N"], group_N: Shaped[np.ndarray, " N"]) -> Float[np.ndarray, " N"]:
    r"""Deviations from the mean of the group, scaled so that their mean square is the pooled variance.

    $e_i = \sqrt{N / (N - G)} \, (x_i - \bar x_{g(i)})$ for N values in G groups.

    Raises:
        ValueError: If no group has two values.
    """
    values = pd.Series(value_N)
    freedom = len(values) - len(np.unique(group_N))
    if freedom == 0:
        raise ValueError("group_N must hold some group twice: one value has no spread")
    deviation_N = values - values.groupby(np.asarray(group_N)).transform("mean")
    return (deviation_N * math.sqrt(len(values) / freedom)).to_numpy()


def pooled_spread(value_N: Float[np.ndarray, " N"], group_N: Shaped[np.ndarray, " N"], level: float = LEVEL) -> Spread:
    r"""The standard deviation within groups, with its chi-squared interval for independent, normal values.

    $s^2 = \sum_i (x_i - \bar x_{g(i)})^2 / \nu$ with $\nu = N - G$; its interval at level $1 - a$ is
    $[s \sqrt{\nu / \chi^2_{\nu, 1 - a/2}}, s \sqrt{\nu / \chi^2_{\nu, a/2}}]$.

    Raises:
        ValueError: If no group has two values.
    """
    sd = float(np.sqrt(np.mean(errors(value_N, group_N) ** 2)))
    freedom = len(value_N) - len(np.unique(group_N))
    high, low = sd * np.sqrt(freedom / chi2.ppf([(1 - level) / 2, (1 + level) / 2], freedom))
    return Spread(sd, float(low), float(high), freedom)


def _freedom(seeds: int, paired: bool) -> int:
    if seeds < 2:
        raise ValueError(f"seeds must be 2 or more for an interval, got {seeds}")
    return seeds - 1 if paired else 2 * (seeds - 1)


def power(delta: float, sd: float, seeds: int, *, paired: bool = False, level: float = LEVEL) -> float:
    r"""The probability that the interval leaves out zero, for normal scores: the closed form.

    $P(|T| > t_{\nu, (1 + level)/2})$ with T of the noncentral t distribution, noncentrality
    $\delta / (\sigma \sqrt{2/n})$, and ν = n − 1 for paired seeds, else 2(n − 1).

    Args:
        delta: The difference δ between the methods.
        sd: The standard deviation σ of one score over seeds.
        seeds: How many seeds n an arm has, from 2.
        paired: Whether the interval is that of paired differences.
        level: The level of the interval.

    Raises:
        ValueError: If there are fewer than two seeds.
    """
    freedom = _freedom(seeds, paired)
    limit, shift = student.ppf((1 + level) / 2, freedom), delta / (sd * math.sqrt(2 / seeds))
    return float(nct.sf(limit, freedom, shift) + nct.sf(limit, freedom, -shift))


def simulated_power(
    delta: float,
    error_N: Float[np.ndarray, " N"],
    seeds: int,
    *,
    paired: bool = False,
    level: float = LEVEL,
    draws: int = 20000,
    seed: int = 0,
) -> float:
    """The share of simulated experiments whose interval leaves out zero, for scores of any distribution.

    Args:
        delta: The difference between the methods.
        error_N: Errors of a score, drawn with replacement, such as `errors` gives.
        seeds: How many seeds an arm has, from 2.
        paired: Whether the interval is that of paired differences.
        level: The level of the interval.
        draws: How many experiments are simulated; the share has a standard error of at most 1 / (2 √draws).
        seed: Seed of the draws.

    Raises:
        ValueError: If there are fewer than two seeds.
    """
    limit = student.ppf((1 + level) / 2, _freedom(seeds, paired))
    arm_2DS = np.random.default_rng(seed).choice(error_N, (2, draws, seeds))
    difference_DS = delta + arm_2DS[0] - arm_2DS[1]
    variance_D = difference_DS.var(1, ddof=1) if paired else arm_2DS.var(2, ddof=1).sum(0)
    return float(np.mean(np.abs(difference_DS.mean(1)) > limit * np.sqrt(variance_D / seeds)))


def smallest_difference(sd: float, seeds: int, *, paired: bool = False) -> float:
    """The difference that a design finds with a power of TARGET; infinite for one seed, which has no interval."""
    if seeds < 2:
        return math.inf
    unit = sd * math.sqrt(2 / seeds)  # the noncentrality that is sought lies well below 30 units
    return brentq(lambda delta: power(delta, sd, seeds, paired=paired) - TARGET, 0, 30 * unit)


def seeds_needed(delta: float, sd: float, *, paired: bool = False) -> int:
    """The least number of seeds per arm that finds this difference with a power of TARGET.

    Raises:
        ValueError: If the difference is zero, which no number of seeds finds.
    """
    if delta == 0:
        raise ValueError("delta must not be zero: no number of seeds finds that")
    return next(seeds for seeds in count(2) if power(delta, sd, seeds, paired=paired) >= TARGET)
