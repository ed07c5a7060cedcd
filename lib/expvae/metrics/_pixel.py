"""How well scores find anomalous pixels or images: area under the ROC curve, proportions and their intervals.

A score per image is a map of one pixel. Suffixes: N images (or clips), P pixels of an image, G groups of equal
scores in ascending order, K cells of a histogram, R resamples.
"""

from math import sqrt
from statistics import NormalDist

import numpy as np
from jaxtyping import Bool, Float, Int64, Num, Shaped
from scipy.stats import rankdata

from expvae.metrics._bootstrap import Interval, percentile_interval, resampled_weights
from expvae.metrics._inputs import Array, as_array, checked, require_both_classes, require_level, require_resampling

CELLS = 1024  # quantile cells of the bootstrap: 1.4 s for 1000 resamples of 4000 images of 784 pixels on two cores
IMAGES_PER_CHUNK = 1024  # bounds the table of counts to 35 MB however many images there are


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
    _, negative_G, positive_G = _count_ties(score, truth)
    require_both_classes(int(negative_G.sum()), int(positive_G.sum()))
    return float(_auroc_from_counts(negative_G, positive_G))


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
    rank_NP = rankdata(np.where(where_NP, score_NP, np.inf), axis=1)  # above all that count, so that no rank moves
    positive_NP = truth_NP & where_NP
    positive_N = positive_NP.sum(axis=1)
    wins_N = (rank_NP * positive_NP).sum(axis=1) - positive_N * (positive_N + 1) / 2
    pairs_N = positive_N * (where_NP.sum(axis=1) - positive_N)
    return np.divide(wins_N, pairs_N, out=np.full(len(truth_NP), np.nan), where=pairs_N > 0)


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

    The value is exact. The resamples are weighted sums of one histogram per image and class, whose cells follow the
    quantiles of the pooled scores and split no tie. A resample is off by at most half the chance that a random positive
    and a random negative pixel share a cell but not a score. Over the sample itself that is below 1/1024; seen in
    resamples: 2e-5, a hundredth of the interval's width or less. The interval is exact for up to 1024 scores.

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
    group, negative_G, positive_G = _count_ties(score_NP[where_NP], truth_NP[where_NP])
    require_both_classes(int(negative_G.sum()), int(positive_G.sum()))
    if len(score_NP) < 2:
        raise ValueError("score must hold at least two images to resample, got 1.")

    cell_NP = np.zeros(score_NP.shape, dtype=np.int64)
    cell_NP[where_NP] = _cells(negative_G, positive_G)[group]
    auroc_R = _resampled_aurocs(cell_NP, truth_NP, where_NP, seed, resamples)
    return percentile_interval(float(_auroc_from_counts(negative_G, positive_G)), auroc_R, level, len(score_NP))


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


def _auroc_from_counts(negative: Num[np.ndarray, "*r k"], positive: Num[np.ndarray, "*r k"]) -> Float[np.ndarray, "*r"]:
    """AUROC from the counts of both classes in ascending cells of the score, ½ for pairs in one cell; NaN for 0/0."""
    below = np.cumsum(negative, axis=-1, dtype=np.float64) - negative / 2
    pairs = negative.sum(axis=-1, dtype=np.float64) * positive.sum(axis=-1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray((positive * below).sum(axis=-1) / pairs)


def _count_ties(
    score: Shaped[np.ndarray, "*s"], truth: Bool[np.ndarray, "*s"]
) -> tuple[Int64[np.ndarray, "*s"], Int64[np.ndarray, " g"], Int64[np.ndarray, " g"]]:
    """Group of equal scores that each value is in, in ascending order, and the groups' counts of both classes."""
    distinct, group = np.unique(score, return_inverse=True)
    count_G2 = np.bincount((2 * group + truth).ravel(), minlength=2 * distinct.size).reshape(-1, 2)
    return group, count_G2[:, 0], count_G2[:, 1]


def _cells(negative_G: Int64[np.ndarray, " g"], positive_G: Int64[np.ndarray, " g"]) -> Int64[np.ndarray, " g"]:
    """Cell of every distinct score, for a histogram of CELLS quantiles that keeps as much order as it can.

    Neighbouring scores of one class are first joined to a run, which is exact because no pair of it counts; a score
    that both classes share is a run by itself, exact because its pairs are ties. A run that reaches over a quantile of
    the pooled scores gets a cell of its own, and the runs between two quantiles share one. Only those shared
    cells lose order, and each holds less than 1/CELLS of all values.
    """
    kind_G = np.where(positive_G == 0, 0, np.where(negative_G == 0, 1, 2))
    starts_G = np.concatenate([[True], (kind_G[1:] != kind_G[:-1]) | (kind_G[1:] == 2)])
    end_R = np.add.reduceat(negative_G + positive_G, np.flatnonzero(starts_G)).cumsum()
    quantile = np.concatenate([[0], end_R]) * CELLS // end_R[-1]
    # Before + after grows from run to run, save between two that start and end within the same quantile.
    _, cell_R = np.unique(quantile[:-1] + quantile[1:], return_inverse=True)
    return cell_R[np.cumsum(starts_G) - 1]


def _resampled_aurocs(
    cell_NP: Int64[np.ndarray, "n p"],
    truth_NP: Bool[np.ndarray, "n p"],
    where_NP: Bool[np.ndarray, "n p"],
    seed: int,
    resamples: int,
) -> Float[np.ndarray, " r"]:
    """AUROC of every bootstrap resample of the images; NaN where it lacks a class."""
    n = len(cell_NP)
    weight_RN = resampled_weights(n, resamples, seed)[1:]
    width = 2 * int(cell_NP.max() + 1)  # negatives and positives of a cell stand side by side
    count_RK = np.zeros((resamples, width), dtype=np.float32)  # whole numbers, exact up to 2^24 in one cell
    for start in range(0, n, IMAGES_PER_CHUNK):
        chunk = slice(start, start + IMAGES_PER_CHUNK)
        column_NP = 2 * cell_NP[chunk] + truth_NP[chunk]
        rows = len(column_NP)
        flat_NP = column_NP + width * np.arange(rows)[:, None]
        count_NK = np.bincount(flat_NP[where_NP[chunk]], minlength=rows * width).reshape(rows, width)
        count_RK += weight_RN[:, chunk] @ count_NK.astype(np.float32)
    return _auroc_from_counts(count_RK[:, 0::2], count_RK[:, 1::2])


def _per_image(
    score: Shaped[Array, "..."], truth: Shaped[Array, "..."], where: Shaped[Array, "..."] | None
) -> tuple[Shaped[np.ndarray, "n p"], Bool[np.ndarray, "n p"], Bool[np.ndarray, "n p"]]:
    """The checked arguments with one row per image; all pixels count where nothing is said."""
    score, truth = checked(score, truth)
    where = np.ones_like(truth) if where is None else as_array(where)
    if where.shape != truth.shape or where.dtype != bool:
        raise ValueError(f"where must be boolean of shape {truth.shape}, got {where.dtype} of {where.shape}.")
    if score.ndim == 0 or len(score) == 0:
        raise ValueError(f"score must hold at least one image along its first axis, got shape {score.shape}.")
    return score.reshape(len(score), -1), truth.reshape(len(truth), -1), where.reshape(len(where), -1)
