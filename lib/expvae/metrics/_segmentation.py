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
from jaxtyping import Bool, Float, Int64, Num, Shaped
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
    aupro: float | None
    iou: float | None
    mean_iou: float | None


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
    score_K = score_K[occurs_K][::-1]  # from here on descending, as thresholds sweep from none to all flagged
    negative_K, positive_K = negative_K[occurs_K][::-1], positive_K[occurs_K][::-1]
    fp_K, tp_K = np.cumsum(negative_K, dtype=np.float64), np.cumsum(positive_K, dtype=np.float64)
    require_both_classes(*(int(count_K[-1]) if count_K.size else 0 for count_K in (fp_K, tp_K)))
    n, p = fp_K[-1], tp_K[-1]
    union_K = p + fp_K
    iou_K = tp_K / union_K
    mean_iou_K = (iou_K + (n - fp_K) / (n + p - tp_K)) / 2
    best, best_mean = int(iou_K.argmax()), int(mean_iou_K.argmax())

    if threshold is not None and np.isnan(threshold):
        raise ValueError("threshold must be a number, got nan.")
    given = GRID * float(score_K[0] if highest is None else highest)
    threshold_T = rounded(np.append(given, [] if threshold is None else threshold), score_K.dtype)
    # How many cells, from the top, each threshold flags, and the measures there; none has an IoU of 0.
    flagged_T = len(score_K) - np.searchsorted(score_K[::-1], threshold_T)
    iou_T, mean_iou_T = np.append(0, iou_K)[flagged_T], np.append(n / (n + p) / 2, mean_iou_K)[flagged_T]
    return PixelScores(
        auroc=float(auroc_of_counts(negative_K[::-1], positive_K[::-1])),
        average_precision=float((positive_K * tp_K / (tp_K + fp_K)).sum() / p),
        fpr95=float(fp_K[np.argmax(20 * tp_K >= 19 * p)] / n),  # 0.95 p would round
        best_iou=float(iou_K[best]),
        best_iou_threshold=float(score_K[best]),
        best_mean_iou=float(mean_iou_K[best_mean]),
        best_mean_iou_threshold=float(score_K[best_mean]),
        grid_iou=float(iou_T[: len(GRID)].max()),
        aupro=None if region_K is None else _aupro(fp_K / n, region_K[occurs_K][::-1]),
        iou=None if threshold is None else float(iou_T[-1]),
        mean_iou=None if threshold is None else float(mean_iou_T[-1]),
    )


def rounded(threshold_T: Num[np.ndarray, " t"], dtype: np.dtype) -> Float[np.ndarray, " t"]:
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
