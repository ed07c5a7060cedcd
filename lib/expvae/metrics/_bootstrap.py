"""The bootstrap behind every interval: whole units are drawn with replacement, and percentiles are read.

Suffixes: U units, R resamples.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32


@dataclass(frozen=True)
class Interval:
    """A number with its confidence interval; the fields are those of a row of a run record.

    Attributes:
        value: The estimate from all of the data.
        low: Lower end of the interval.
        high: Upper end of the interval.
        n: Number of independent units (images or clips) behind it.
    """

    value: float
    low: float
    high: float
    n: int


def resampled_weights(units: int, resamples: int, seed: int) -> Float32[np.ndarray, "r u"]:
    """How often each unit is in the sample itself, which comes first, and in each resample.

    Resample r draws the units ``rng.integers(U, size=U)``, r = 1, 2, ... in turn, from
    ``rng = numpy.random.default_rng(seed)``: scores of the same units under the same seed see the same resamples, so
    that differences are paired.
    """
    rng = np.random.default_rng(seed)
    weight_RU = np.ones((1 + resamples, units), dtype=np.float32)
    for weight_U in weight_RU[1:]:
        weight_U[:] = np.bincount(rng.integers(units, size=units), minlength=units)
    return weight_RU


def percentile_interval(
    value: float, drawn_R: Float[np.ndarray, " r"], level: float, n: int, shift: float = 0.0
) -> Interval:
    """The interval between two percentiles of what the resamples gave; one that has no value is NaN and left out.

    Args:
        value: The number itself.
        drawn_R: That of every resample.
        level: Confidence level.
        n: Number of units.
        shift: Added to both ends, such as what a histogram changes in the number itself.
    """
    low, high = np.nanquantile(drawn_R, [(1 - level) / 2, (1 + level) / 2]) + shift
    return Interval(float(value), float(low), float(high), n)
