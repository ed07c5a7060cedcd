"""How well scores find anomalous pixels or images: area under the ROC curve, proportions and their intervals.

A score per image is a map of one pixel. Suffixes: N images (or clips), P pixels of an image, G groups of equal
scores in ascending order, R resamples.
"""

from math import sqrt
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Shaped

from expvae.metrics._bootstrap import Interval, percentile_interval
from expvae.metrics._inputs import (
    Array,
    as_array,
    checked,
    checked_images,
    checked_where,
    require_both_classes,
    require_level,
    require_resampling,
)
from expvae.metrics._segmentation import auroc_of_counts
from expvae.metrics._streaming import PixelMetrics


def auroc(score: Shaped[Array, "..."], truth: Shaped[Array, "..."]) -> float:
    """Area under the ROC curve of all values pooled, exact with ties.

        AUROC = P(s⁺ > s⁻) + ½ P(s⁺ = s⁻)

    with s⁺ the score of a random positive and s⁻ that of a random negative value (Hanley & McNeil, Radiology 1982).

    Args:
        score: Finite scores of any shape, higher for more anomalous.
        truth: Booleans of the same shape, True where anomalous.

    Returns:
        A number in [0, 1]; 0.5 for scores that know nothing.

    Raises:
        ValueError: If the shapes differ, truth is not boolean or lacks a class, or a score is NaN or infinite.
    """
    score, truth = checked(score, truth)
    require_both_classes(int((~truth).sum()), int(truth.sum()))
    return _auroc(score, truth)


def auroc_per_image(
    score_NP: Shaped[Array, "n ..."],
    truth_NP: Shaped[Array, "n ..."],
    *,
    where_NP: Shaped[Array, "n ..."] | None = None,
) -> Float[np.ndarray, " n"]:
    """AUROC within each image, exact with ties.

        AUROC = (Σ_{positives} rank − n⁺(n⁺ + 1)/2) / (n⁺ n⁻)

    with the ranks of the scores within the image, equal scores sharing their mean rank (Mann-Whitney U).

    Args:
        score_NP: Finite scores; the first axis counts images, all others are pooled.
        truth_NP: Booleans of the same shape, True where anomalous.
        where_NP: Booleans of the same shape; pixels where it is False, such as the paper around a digit, do not count.

    Returns:
        One number per image; NaN where an image holds one class only, as an image without anomaly does.

    Raises:
        ValueError: If the shapes differ or have no image axis, truth or where is not boolean, or a score is NaN or
            infinite.
    """
    score_NP, truth_NP, where_NP = _per_image(score_NP, truth_NP, where_NP)
    images = zip(score_NP, truth_NP, where_NP, strict=True)
    return np.array([_auroc(score_P[where_P], truth_P[where_P]) for score_P, truth_P, where_P in images])


def auroc_interval(
    score_NP: Shaped[Array, "n ..."],
    truth_NP: Shaped[Array, "n ..."],
    *,
    where_NP: Shaped[Array, "n ..."] | None = None,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval:
    """Pooled AUROC with a percentile bootstrap interval over images.

    Whole images are drawn with replacement, because the pixels of one image are not independent. For an AUROC of
    images, as of inlier against outlier digits by reconstruction error, give one score and one truth per image (shape
    [N]). Scores of the same images under the same seed see the same resamples. A resample without both classes has no
    AUROC and is left out.

    The value is exact. The resamples are those of `expvae.metrics.PixelMetrics`, of the scores rounded to float32:
    weighted sums of one histogram per image and class, whose cells follow the quantiles of both classes. A resample is
    off by at most half the chance that a random positive and a random negative pixel share a cell but not a score. Over
    the sample itself that is below 1/8192. The interval is exact for up to 4096 scores.

    Args:
        score_NP: Finite scores; the first axis counts images or clips, all others are pooled.
        truth_NP: Booleans of the same shape, True where anomalous.
        where_NP: Booleans of the same shape; pixels where it is False, such as the paper around a digit, do not count.
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples, at least 100.
        level: Confidence level, between 0 and 1.

    Returns:
        Exact AUROC, the two percentiles, and the number of images.

    Raises:
        ValueError: As for `auroc`, or if there are fewer than two images, too few resamples or a level outside (0, 1).
    """
    require_resampling(resamples, level)
    score_NP, truth_NP, where_NP = _per_image(score_NP, truth_NP, where_NP)
    if len(score_NP) < 2:
        raise ValueError("score must hold at least two images to resample, got 1.")
    value = auroc(score_NP[where_NP], truth_NP[where_NP])
    counts = PixelMetrics()
    counts.update(score_NP, truth_NP, unit=range(len(score_NP)), where=where_NP)
    auroc_R = counts.resampled_aurocs(seed, resamples)
    return percentile_interval(value, auroc_R[1:], level, len(score_NP), value - auroc_R[0])


def fraction_interval(flag_N: Shaped[Array, " n"], *, level: float = 0.95) -> Interval:
    """Proportion of True with Wilson's score interval.

        (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n)

    with p the proportion, n the number of flags and z the normal quantile of (1 + level)/2 (Wilson, JASA 1927). Unlike
    the textbook p ± z √(p(1 − p)/n) it stays within [0, 1] and keeps a width at p = 0 and p = 1.

    A comparison with NaN is False: leave images without a value out before comparing them with a threshold.

    Args:
        flag_N: One boolean per image.
        level: Confidence level, between 0 and 1.

    Raises:
        ValueError: If there are no flags, they are not boolean or the level is outside (0, 1).
    """
    require_level(level)
    flag_N = as_array(flag_N)
    n = flag_N.size
    if n == 0:
        raise ValueError("flag_N must hold at least one flag, got none.")
    if flag_N.dtype != bool:
        raise ValueError(f"flag_N must be boolean, got {flag_N.dtype}.")
    p = int(flag_N.sum()) / n
    z = NormalDist().inv_cdf((1 + level) / 2)
    centre = (p + z**2 / (2 * n)) / (1 + z**2 / n)
    half_width = z * sqrt(p * (1 - p) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    # The ends are exactly 0 at p = 0 and 1 at p = 1; rounding would leave 1e-17 beside them.
    return Interval(p, max(0.0, centre - half_width) if p > 0 else 0.0, centre + half_width if p < 1 else 1.0, n)


def _auroc(score: Shaped[np.ndarray, "*s"], truth: Bool[np.ndarray, "*s"]) -> float:
    """Exact AUROC; NaN where there is one class only."""
    distinct, group = np.unique(score, return_inverse=True)
    count_2G = np.bincount((group + distinct.size * truth).ravel(), minlength=2 * distinct.size)
    return float(auroc_of_counts(*count_2G.reshape(2, -1)))


def _per_image(
    score: Shaped[Array, "..."], truth: Shaped[Array, "..."], where: Shaped[Array, "..."] | None
) -> tuple[Shaped[np.ndarray, "n p"], Bool[np.ndarray, "n p"], Bool[np.ndarray, "n p"]]:
    """The checked arguments with one row per image; all pixels count where nothing is said."""
    score, truth = checked_images(score, truth)
    where = np.ones_like(truth) if where is None else checked_where(where, truth.shape)
    return score.reshape(len(score), -1), truth.reshape(len(truth), -1), where.reshape(len(where), -1)
