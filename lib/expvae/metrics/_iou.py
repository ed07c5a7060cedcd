"""Intersection over union by every convention in use, from one table of counts per image and threshold.

A pixel is flagged where score ≥ threshold. With TP, FP, FN and TN the numbers of pixels, the IoU of each class is

    IoU⁺ = TP / (TP + FP + FN)    IoU⁻ = TN / (TN + FP + FN)

and two maps of the same quality get numbers that differ several-fold, by three choices that reports often leave unsaid:

Classes: "anomalous" is IoU⁺. "both" is ½ IoU⁺ + ½ IoU⁻, which stays near ½ for a map that flags next to nothing. A
class that an image neither holds nor has flagged is 0/0 and left out of that image's mean.

Average: "pooled" counts the pixels of all images together. "per image" is the mean over all images; of a normal image
it is 1 where nothing is flagged and just below ½ where anything is, as `sklearn.metrics.jaccard_score` has it with
average="macro". "per defective image" is the mean over the images with an anomalous pixel. There is no "per image" of
the anomalous class, for of a normal image that is 0 or 0/0 whatever the map shows.

Choice of threshold: "validation" was given, and is the only one that can be had before the test. "grid" is the best of
the reports' 99 shares of the test set's highest score, "best" the best of all thresholds; both are oracles.

Suffixes: N images, Y X their pixels, T thresholds in ascending order, R resamples.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, Int64, Num, Shaped

from expvae.metrics._bootstrap import Interval, percentile_interval, resampled_weights
from expvae.metrics._inputs import (
    Array,
    as_array,
    checked,
    checked_images,
    require_both_classes,
    require_resampling,
)
from expvae.metrics._segmentation import GRID, rounded

Average = Literal["pooled", "per image", "per defective image"]
Classes = Literal["anomalous", "both"]
Choice = Literal["validation", "grid", "best"]

CONVENTIONS: tuple[tuple[Average, Classes], ...] = (
    ("pooled", "anomalous"),
    ("per defective image", "anomalous"),
    ("pooled", "both"),
    ("per image", "both"),
    ("per defective image", "both"),
)
STEPS = 1000  # thresholds among which the best is sought, beside those of the other choices
LEAST_FLAGGED = 1e-5  # of all pixels, by the second highest threshold of a table


@dataclass(frozen=True)
class Confusion:
    """Counts of pixels per image at every threshold.

    Attributes:
        threshold_T: Thresholds, ascending.
        tp_NT: Anomalous pixels that are flagged.
        fp_NT: Normal pixels that are flagged.
        positive_N: Anomalous pixels.
        negative_N: Normal pixels.
    """

    threshold_T: Float[np.ndarray, " t"]
    tp_NT: Int64[np.ndarray, "n t"]
    fp_NT: Int64[np.ndarray, "n t"]
    positive_N: Int64[np.ndarray, " n"]
    negative_N: Int64[np.ndarray, " n"]


def confusion(
    score_NYX: Shaped[Array, "n ..."], truth_NYX: Shaped[Array, "n ..."], threshold_T: Num[np.ndarray, " t"]
) -> Confusion:
    """Flagged pixels of each class in each image at each threshold, exact; each image's scores are sorted once.

    Args:
        score_NYX: Finite scores, higher for more anomalous; the first axis counts images.
        truth_NYX: Booleans of the same shape, True where anomalous.
        threshold_T: Ascending thresholds; they are rounded to the precision of the scores.

    Raises:
        ValueError: If the shapes differ or hold no image, the truth is not boolean, a score is NaN or infinite, or the
            thresholds do not ascend.
    """
    score_NYX, truth_NYX = checked_images(score_NYX, truth_NYX)
    score_NYX = score_NYX.astype(np.result_type(score_NYX, np.float32), copy=False)
    if not (threshold_T[1:] >= threshold_T[:-1]).all() or np.isnan(threshold_T).any():
        raise ValueError("threshold_T must be numbers in ascending order.")
    threshold_T = rounded(threshold_T, score_NYX.dtype)

    def flagged(chosen_NYX: Bool[np.ndarray, "n ..."]) -> Int64[np.ndarray, "n t"]:
        scores = (np.sort(score_YX[chosen_YX]) for score_YX, chosen_YX in zip(score_NYX, chosen_NYX, strict=True))
        return np.array([len(score) - np.searchsorted(score, threshold_T) for score in scores])

    positive_N = truth_NYX.reshape(len(truth_NYX), -1).sum(axis=1)
    negative_N = truth_NYX[0].size - positive_N
    return Confusion(threshold_T.astype(np.float64), flagged(truth_NYX), flagged(~truth_NYX), positive_N, negative_N)


def thresholds(
    score_NYX: Shaped[Array, "n ..."], *, validation: float | None = None
) -> dict[Choice, Float[np.ndarray, " _"]]:
    """The thresholds among which each choice chooses, ascending.

    Those of "best" are scores that flag shares of all pixels in geometric steps from 10⁻⁵ to 1, with the highest score
    and all thresholds of the other choices: fine where few pixels are flagged, as few are anomalous. Neighbours of 1000
    differ by 1 % of the flagged pixels. Seen on smooth maps, the best IoU fell short of that over all scores by up to
    2·10⁻⁴ with 28 000 anomalous pixels, 7·10⁻⁴ with 7000, and 2·10⁻³ with 1000.

    Args:
        score_NYX: Finite scores of the test images.
        validation: Threshold chosen on validation images; without one there is no such choice.

    Raises:
        ValueError: If there is no score, one is NaN or infinite, or the threshold is NaN.
    """
    score = as_array(score_NYX).ravel()
    checked(score, np.zeros(score.shape, dtype=bool))
    if not score.size:
        raise ValueError("score must hold at least one pixel, got none.")
    if validation is not None and np.isnan(validation):
        raise ValueError("validation must be a number or None, got nan.")
    score = np.sort(score.astype(np.result_type(score, np.float32)))
    flagged = np.ceil(score.size * np.geomspace(LEAST_FLAGGED, 1, STEPS)).astype(np.int64)
    steps = score[score.size - np.append(1, np.minimum(flagged, score.size))]
    chosen: dict[Choice, np.ndarray] = {} if validation is None else {"validation": np.array([validation])}
    chosen["grid"] = np.sort(GRID * float(score[-1]))
    chosen = {choice: rounded(threshold_T, score.dtype).astype(np.float64) for choice, threshold_T in chosen.items()}
    nothing = np.nextafter(score[-1:], np.inf)  # flags no pixel, as the first threshold of a ROC curve does
    chosen["best"] = np.unique(np.concatenate([np.append(steps, nothing).astype(np.float64), *chosen.values()]))
    return chosen


def ious(table: Confusion, average: Average, classes: Classes) -> Float[np.ndarray, "1 t"]:
    """IoU at every threshold, by one of the conventions; NaN where there is nothing to average.

    Args:
        table: Counts per image.
        average: "pooled", "per image" or "per defective image".
        classes: "anomalous" or "both".

    Raises:
        ValueError: If the convention is not one of `CONVENTIONS`.
    """
    if (average, classes) not in CONVENTIONS:
        valid = ", ".join(f"{name!r} of {kind!r}" for name, kind in CONVENTIONS)
        raise ValueError(f"average and classes must be one of {valid}; got {average!r} of {classes!r}.")
    n = len(table.positive_N)
    return _resampled(table, np.ones((1, n)), np.arange(n))[average, classes]


def iou_intervals(
    score_NYX: Shaped[Array, "n ..."],
    truth_NYX: Shaped[Array, "n ..."],
    *,
    unit_N: Shaped[Array, "..."] | None = None,
    validation: float | None = None,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> dict[tuple[Average, Classes, Choice], Interval]:
    """IoU by every convention and choice of threshold, with percentile bootstrap intervals over images or clips.

    Whole units are drawn with replacement, as in `expvae.metrics.PixelMetrics`: the same units under the same seed see
    the same resamples. An oracle chooses its threshold anew in every resample, among the thresholds of the
    test set. A resample without both classes is left out.

    Args:
        score_NYX: Finite scores, higher for more anomalous; the first axis counts images.
        truth_NYX: Booleans of the same shape, True where anomalous.
        unit_N: What each image is resampled with, such as its clip; by default itself.
        validation: Threshold chosen on validation images; without one there is no such choice.
        seed: Seed of the resampling.
        resamples: Number of bootstrap resamples, at least 100.
        level: Confidence level, between 0 and 1.

    Returns:
        An interval for each (average, classes, choice), whose n is the number of units that count. The values of
        "validation" and "grid" are exact; "best" falls short by a little (see `thresholds`).

    Raises:
        ValueError: As for `confusion`, or if the threshold is NaN, a class is missing, there is not one unit for
            each image, or there are fewer than two units, too few resamples or a level outside (0, 1).
    """
    require_resampling(resamples, level)
    chosen = thresholds(score_NYX, validation=validation)
    table = confusion(score_NYX, truth_NYX, chosen["best"])
    n = len(table.positive_N)
    require_both_classes(int(table.negative_N.sum()), int(table.positive_N.sum()))
    unit_N = np.arange(n) if unit_N is None else as_array(unit_N)
    if unit_N.shape != (n,):
        raise ValueError(f"unit_N must hold one unit for each of {n} images, got shape {unit_N.shape}.")
    unit_U, unit_N = np.unique(unit_N, return_inverse=True)
    if len(unit_U) < 2:
        raise ValueError("score must hold at least two images to resample, got 1, or be of at least two units.")
    columns = {choice: np.searchsorted(table.threshold_T, threshold_T) for choice, threshold_T in chosen.items()}

    weight_RU = resampled_weights(len(unit_U), resamples, seed)
    both = [weight_RU @ np.bincount(unit_N, count_N) > 0 for count_N in (table.positive_N, table.negative_N)]
    found = {}
    for (average, classes), iou_RT in _resampled(table, weight_RU[both[0] & both[1]], unit_N).items():
        counting_N = table.positive_N > 0 if average == "per defective image" else slice(None)
        n = len(np.unique(unit_N[counting_N]))
        for choice, column_T in columns.items():
            iou_R = iou_RT[:, column_T].max(axis=1)
            found[average, classes, choice] = percentile_interval(iou_R[0], iou_R[1:], level, n)
    return found


def _resampled(
    table: Confusion, weight_RU: Num[np.ndarray, "r u"], unit_N: Int64[np.ndarray, " n"]
) -> dict[tuple[Average, Classes], Float[np.ndarray, "r t"]]:
    """By convention the IoU at every threshold, of resamples that hold each unit of images so many times."""
    order_N = np.argsort(unit_N, kind="stable")
    starts_U = np.searchsorted(unit_N[order_N], np.arange(weight_RU.shape[1]))

    def summed(values_NT: Shaped[np.ndarray, "n t"]) -> Float[np.ndarray, "r t"]:
        return weight_RU @ np.add.reduceat(values_NT[order_N], starts_U, axis=0)

    weight_RU = weight_RU.astype(np.float64)
    counts = (table.tp_NT, table.fp_NT, table.positive_N[:, None], table.negative_N[:, None])
    counts = [count.astype(np.float64) for count in counts]
    pooled = [summed(count) for count in counts]
    # Of images that do not count the IoU may be 0/0, which no weight of 0 would remove.
    each = {classes: np.nan_to_num(_iou(*counts, classes=classes)) for classes in get_args(Classes)}
    found: dict[tuple[Average, Classes], np.ndarray] = {}
    for average, classes in CONVENTIONS:
        if average == "pooled":
            found[average, classes] = _iou(*pooled, classes=classes)
            continue
        counting_N1 = np.ones_like(counts[2]) if average == "per image" else (counts[2] > 0).astype(np.float64)
        if counting_N1.all() and ("per image", classes) in found:
            found[average, classes] = found["per image", classes]
            continue
        total_R1, sum_RT = summed(counting_N1), summed(each[classes] * counting_N1)
        found[average, classes] = _ratio(sum_RT, np.broadcast_to(total_R1, sum_RT.shape))
    return found


def _iou(
    tp: Float[np.ndarray, "m t"],
    fp: Float[np.ndarray, "m t"],
    positive: Float[np.ndarray, "m 1"],
    negative: Float[np.ndarray, "m 1"],
    *,
    classes: Classes,
) -> Float[np.ndarray, "m t"]:
    """IoU of the anomalous class, or the mean over the classes that are not 0/0; NaN where all are."""
    anomalous = _ratio(tp, positive + fp)
    if classes == "anomalous":
        return anomalous
    normal = _ratio(negative - fp, negative + positive - tp)
    one = np.where(np.isnan(anomalous), normal, anomalous)
    return np.where(np.isnan(anomalous) | np.isnan(normal), one, (anomalous + normal) / 2)


def _ratio(part: Float[np.ndarray, "m t"], whole: Float[np.ndarray, "m t"]) -> Float[np.ndarray, "m t"]:
    return np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole > 0)
