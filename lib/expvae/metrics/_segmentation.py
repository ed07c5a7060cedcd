"""How well maps segment anomalies: measures over all thresholds, from counts of the pixels of each score.

A pixel counts as anomalous where score ≥ threshold, and the thresholds are the scores that occur. With TP, FP, FN and
TN the numbers of pixels and P = TP + FN, N = FP + TN, at each threshold:

    TPR = TP / P    FPR = FP / N    precision = TP / (TP + FP)    IoU = TP / (TP + FP + FN)

A threshold chosen on the data that it is judged on, as "best" does, is an oracle: nobody has it before the test.
Where the counts come from, and for intervals, see `expvae.metrics._streaming`.

Suffixes: N images, P anomalous pixels, R resamples, K distinct scores or cells of neighbouring scores, in
ascending order.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Float64, Int64, Num, Shaped
from scipy import ndimage

from expvae.metrics._inputs import require_both_classes

FPR_LIMIT = 0.3  # of AUPRO
GRID = np.arange(1, 100) / 100  # thresholds of the reports, as shares of the highest score


@dataclass(frozen=True)
class PixelScores:
    """Measures of one set of pixels.

    Attributes:
        auroc: Area under TPR over FPR, Σ ΔFPR · (TPR + TPR′)/2; chance is 0.5.
        average_precision: Σ ΔTPR · precision, as in scikit-learn; chance is P / (P + N).
        fpr95: FPR at the highest threshold with TPR ≥ 0.95.
        best_iou: Highest IoU of the anomalous pixels over all thresholds.
        best_iou_threshold: The (highest) threshold that reaches it.
        best_mean_iou: Highest mean of the IoU of the anomalous pixels and that of the normal ones,
            ½ TP/(TP + FP + FN) + ½ TN/(TN + FP + FN). A map that flags next to nothing reaches nearly ½.
        best_mean_iou_threshold: The (highest) threshold that reaches it.
        grid_iou: Highest IoU over the reports' 99 thresholds i/100 · highest score, i = 1 … 99.
        aupro: Area under the per-region overlap (the share of an 8-connected anomalous region that is flagged, averaged
            over the regions of all images) over FPR, up to FPR = 0.3 and divided by 0.3 (Bergmann et al., IJCV 2021);
            None where regions were not asked for.
        iou: IoU at a threshold that was given; None without one.
        mean_iou: Mean of both IoUs at a threshold that was given; None without one.
    """

    auroc: float
    average_precision: float
    fpr95: float
    best_iou: float
    best_iou_threshold: float
    best_mean_iou: float
    best_mean_iou_threshold: float
    grid_iou: float
    aupro: float | None = None
    iou: float | None = None
    mean_iou: float | None = None


def auroc_of_counts(
    negative_K: Num[np.ndarray, "*r k"], positive_K: Num[np.ndarray, "*r k"]
) -> Float[np.ndarray, "*r"]:
    """AUROC from the counts of both classes in ascending cells of the score, ½ for pairs in one cell; NaN for 0/0."""
    below = np.cumsum(negative_K, axis=-1, dtype=np.float64) - negative_K / 2
    pairs = negative_K.sum(axis=-1, dtype=np.float64) * positive_K.sum(axis=-1, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray((positive_K * below).sum(axis=-1) / pairs)


def from_counts(
    score_K: Shaped[np.ndarray, " k"],
    negative_K: Num[np.ndarray, " k"],
    positive_K: Num[np.ndarray, " k"],
    region_K: Num[np.ndarray, " k"] | None = None,
    *,
    highest: float | None = None,
    threshold: float | None = None,
) -> PixelScores:
    """All measures from the counts of both classes.

    Exact where each cell holds one score. Where it holds several they count as equal, and as its lowest.

    Args:
        score_K: The lowest score of each cell, ascending.
        negative_K: Number of normal pixels in each cell.
        positive_K: Number of anomalous pixels in each cell.
        region_K: Σ 1/size of the region over the anomalous pixels in each cell, in any unit; None for no AUPRO.
        highest: The highest score, of which the reports' thresholds are shares; by default the last score.
        threshold: Threshold at which to compute the IoU as well.

    Raises:
        ValueError: If a class is missing or the threshold is NaN.
    """
    occurs_K = (negative_K > 0) | (positive_K > 0)
    require_both_classes(int(negative_K.sum()), int(positive_K.sum()))
    if threshold is not None and np.isnan(threshold):
        raise ValueError("threshold must be a number, got nan.")
    highest_1 = np.array([score_K[occurs_K][-1] if highest is None else highest], dtype=np.float64)
    region_1K = None if region_K is None else region_K[None]
    found = of_resamples(score_K, negative_K[None], positive_K[None], region_1K, highest_1, threshold)
    return PixelScores(**{name: float(of_1[0]) for name, of_1 in found.items()})


def of_resamples(
    score_K: Shaped[np.ndarray, " k"],
    negative_RK: Num[np.ndarray, "r k"],
    positive_RK: Num[np.ndarray, "r k"],
    region_RK: Num[np.ndarray, "r k"] | None,
    highest_R: Float[np.ndarray, " r"],
    threshold: float | None,
) -> dict[str, Float64[np.ndarray, " r"]]:
    """By the names of `PixelScores`, what `from_counts` computes, of many counts of the same cells at once.

    Each row needs both classes; a cell may be empty.
    """
    score_K = score_K[::-1]  # from here on descending, as thresholds sweep from none to all flagged
    negative_RK, positive_RK = negative_RK[:, ::-1], positive_RK[:, ::-1]
    fp_RK, tp_RK = np.cumsum(negative_RK, 1, dtype=np.float64), np.cumsum(positive_RK, 1, dtype=np.float64)
    n_R1, p_R1 = fp_RK[:, -1:], tp_RK[:, -1:]
    iou_RK = tp_RK / (p_R1 + fp_RK)
    mean_iou_RK = (iou_RK + (n_R1 - fp_RK) / (n_R1 + p_R1 - tp_RK)) / 2
    flagged_RK = tp_RK + fp_RK
    # Above the highest score that occurs is no threshold, although a mean of IoUs can be the best there.
    best_R1 = iou_RK.argmax(1)[:, None]
    best_mean_R1 = np.where(flagged_RK > 0, mean_iou_RK, -1).argmax(1)[:, None]

    given_RT = highest_R[:, None] * GRID
    if threshold is not None:
        given_RT = np.insert(given_RT, len(GRID), threshold, axis=1)
    # How many cells, from the top, each threshold flags, and the measures there; none has an IoU of 0.
    cells_RT = len(score_K) - np.searchsorted(score_K[::-1], rounded(given_RT, score_K.dtype))
    last_RT = np.maximum(cells_RT - 1, 0)
    iou_RT = np.where(cells_RT > 0, np.take_along_axis(iou_RK, last_RT, 1), 0)
    precision_RK = np.divide(tp_RK, flagged_RK, out=np.zeros_like(tp_RK), where=flagged_RK > 0)
    reached_R1 = np.argmax(20 * tp_RK >= 19 * p_R1, axis=1)[:, None]  # 0.95 p would round
    found = {
        "auroc": auroc_of_counts(negative_RK[:, ::-1], positive_RK[:, ::-1]),
        "average_precision": (positive_RK * precision_RK).sum(1) / p_R1[:, 0],
        "fpr95": np.take_along_axis(fp_RK, reached_R1, 1)[:, 0] / n_R1[:, 0],
        "best_iou": np.take_along_axis(iou_RK, best_R1, 1)[:, 0],
        "best_iou_threshold": score_K[best_R1[:, 0]],
        "best_mean_iou": np.take_along_axis(mean_iou_RK, best_mean_R1, 1)[:, 0],
        "best_mean_iou_threshold": score_K[best_mean_R1[:, 0]],
        "grid_iou": iou_RT[:, : len(GRID)].max(1),
    }
    if region_RK is not None:
        rows = zip(fp_RK / n_R1, region_RK[:, ::-1], strict=True)
        found["aupro"] = np.array([_aupro(fpr_K, region_K) for fpr_K, region_K in rows])
    if threshold is not None:
        none_R = n_R1[:, 0] / (n_R1 + p_R1)[:, 0] / 2
        mean_R = np.take_along_axis(mean_iou_RK, last_RT[:, -1:], 1)[:, 0]
        found |= {"iou": iou_RT[:, -1], "mean_iou": np.where(cells_RT[:, -1] > 0, mean_R, none_R)}
    return {name: values_R.astype(np.float64) for name, values_R in found.items()}


def rounded(threshold_T: Num[np.ndarray, "*t"], dtype: np.dtype) -> Float[np.ndarray, "*t"]:
    """Thresholds in the precision of the scores."""
    with np.errstate(over="ignore"):  # beyond the type's range is beyond all scores
        return threshold_T.astype(dtype)


def region_sizes(truth_NYX: Bool[np.ndarray, "n ..."]) -> Int64[np.ndarray, " p"]:
    """Size of the 8-connected region of its image that each anomalous pixel is in, in row-major order.

    Raises:
        ValueError: If the masks are not maps.
    """
    if truth_NYX.ndim != 3:
        raise ValueError(f"regions need masks of shape [images, rows, columns], got {truth_NYX.shape}.")
    within_image = np.zeros((3, 3, 3), dtype=bool)
    within_image[1] = True
    label_NYX, _ = ndimage.label(truth_NYX, structure=within_image)
    label_P = label_NYX[truth_NYX]
    return np.bincount(label_P)[label_P]


def _aupro(fpr_K: Float[np.ndarray, " k"], region_K: Num[np.ndarray, " k"]) -> float:
    overlap_K = np.cumsum(region_K, dtype=np.float64)
    fpr_K, overlap_K = np.append(0, fpr_K), np.append(0, overlap_K / overlap_K[-1])
    below_K = fpr_K <= FPR_LIMIT
    fpr = np.append(fpr_K[below_K], FPR_LIMIT)
    overlap = np.append(overlap_K[below_K], np.interp(FPR_LIMIT, fpr_K, overlap_K))
    return float(np.trapezoid(overlap, fpr) / FPR_LIMIT)
