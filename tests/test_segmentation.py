from dataclasses import asdict
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score, roc_curve

from expvae.metrics._segmentation import from_counts, region_sizes
from maps import anomaly_maps, exact, tied_scores


def iou(truth, flagged):
    return (truth & flagged).sum() / (truth | flagged).sum()


def sklearn_metrics(score, truth):
    score, truth = score.ravel(), truth.ravel()
    fpr, tpr, thresholds = roc_curve(truth, score, drop_intermediate=False)
    anomalous = [iou(truth, score >= threshold) for threshold in thresholds[1:]]
    normal = [iou(~truth, score < threshold) for threshold in thresholds[1:]]
    mean = (np.array(anomalous) + normal) / 2
    grid = [iou(truth, score >= score.dtype.type(i / 100 * float(score.max()))) for i in range(1, 100)]
    return {
        "auroc": roc_auc_score(truth, score),
        "average_precision": average_precision_score(truth, score),
        "fpr95": fpr[np.argmax(tpr >= 0.95)],
        "best_iou": max(anomalous),
        "best_iou_threshold": thresholds[1 + int(np.argmax(anomalous))],
        "best_mean_iou": mean.max(),
        "grid_iou": max(grid),
    }


def slow_aupro(score_NYX, truth_NYX):
    """Regions by flood fill, every threshold in turn, the area by the trapezoids up to FPR 0.3."""
    regions = []
    left = {tuple(pixel) for pixel in np.argwhere(truth_NYX)}
    while left:
        region, front = set(), [left.pop()]
        while front:
            n, y, x = front.pop()
            region.add((n, y, x))
            near = {(n, y + dy, x + dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)} & left
            left -= near
            front.extend(near)
        regions.append(tuple(np.array(sorted(region)).T))
    points = [(0.0, 0.0)]
    for threshold in sorted(set(score_NYX.ravel().tolist()), reverse=True):
        flagged_NYX = score_NYX >= threshold
        points.append((flagged_NYX[~truth_NYX].mean(), np.mean([flagged_NYX[region].mean() for region in regions])))
    area = 0.0
    for (fpr, overlap), (next_fpr, next_overlap) in pairwise(points):
        if next_fpr > 0.3:
            next_overlap = overlap + (next_overlap - overlap) * (0.3 - fpr) / (next_fpr - fpr)
            return (area + (0.3 - fpr) * (overlap + next_overlap) / 2) / 0.3
        area += (next_fpr - fpr) * (overlap + next_overlap) / 2
    return area / 0.3


@settings(max_examples=50, deadline=None)
@given(tied_scores())
def test_measures_equal_sklearn_with_ties(case):
    found = asdict(exact(*case))
    for name, expected in sklearn_metrics(*case).items():
        assert found[name] == pytest.approx(expected, abs=1e-12), name


def test_measures_of_maps_equal_sklearn():
    score_NYX, truth_NYX = anomaly_maps(6, 12, levels=20)
    found = asdict(exact(torch.from_numpy(score_NYX), torch.from_numpy(truth_NYX)))
    for name, expected in sklearn_metrics(score_NYX, truth_NYX).items():
        assert found[name] == pytest.approx(expected, abs=1e-12), name
    flagged_NYX = score_NYX >= found["best_iou_threshold"]
    assert found["best_iou"] == pytest.approx(jaccard_score(truth_NYX.ravel(), flagged_NYX.ravel()), abs=1e-12)
    flagged_NYX = score_NYX >= found["best_mean_iou_threshold"]
    both = jaccard_score(truth_NYX.ravel(), flagged_NYX.ravel(), average=None, labels=[False, True])
    assert found["best_mean_iou"] == pytest.approx(both.mean(), abs=1e-12)


def test_measures_by_hand():
    # Highest first: anomalous 4; normal 3; anomalous 2 and normal 2; normal 1.
    found = exact(np.array([4.0, 3.0, 2.0, 2.0, 1.0]), np.array([True, False, True, False, False]), threshold=2.5)
    assert found.auroc == pytest.approx((3 + 1.5) / 6)
    assert found.average_precision == pytest.approx(1 / 2 * 1 + 1 / 2 * 2 / 4)
    assert found.fpr95 == pytest.approx(2 / 3)
    assert (found.best_iou, found.best_iou_threshold) == (0.5, 4.0)  # 2/4 at 2.0 as well
    assert (found.best_mean_iou, found.best_mean_iou_threshold) == (pytest.approx((1 / 2 + 3 / 4) / 2), 4.0)
    assert found.grid_iou == 0.5
    assert (found.iou, found.mean_iou) == (pytest.approx(1 / 3), pytest.approx((1 / 3 + 2 / 4) / 2))
    assert found.aupro is None


@pytest.mark.parametrize(("threshold", "iou", "mean_iou"), [(0.0, 2 / 4, 1 / 4), (9.0, 0.0, 1 / 4)])
def test_thresholds_beyond_the_scores_flag_all_or_nothing(threshold, iou, mean_iou):
    found = exact(np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, True, False, True]), threshold=threshold)
    assert (found.iou, found.mean_iou) == (iou, mean_iou)


def test_a_threshold_has_the_precision_of_the_scores():
    truth = np.array([False, True])
    assert float(np.float32(0.7)) < 0.7
    assert exact(np.array([0.1, 0.7], dtype=np.float32), truth, threshold=0.7).iou == 1
    assert exact(np.array([1, 2], dtype=np.uint8), truth, threshold=1.5).iou == 1
    assert exact(torch.tensor([0.1, 0.7], dtype=torch.bfloat16), torch.from_numpy(truth), threshold=0.7).iou == 0


@settings(max_examples=30)
@given(tied_scores(), st.randoms(use_true_random=False))
def test_measures_depend_on_the_order_of_the_scores_only(case, random):
    score, truth = case[0].ravel(), case[1].ravel()
    shuffle = list(range(score.size))
    random.shuffle(shuffle)
    assert exact(score[shuffle], truth[shuffle]) == exact(score, truth)
    found, mapped = asdict(exact(score, truth)), asdict(exact(np.arctan(score), truth))
    for name in ("auroc", "average_precision", "fpr95", "best_iou", "best_mean_iou"):
        assert mapped[name] == found[name]


# --- AUPRO -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seed", "levels"), [(0, None), (1, 3), (2, 1), (3, None)])
def test_aupro_equals_a_slow_loop(seed, levels):
    score_NYX, truth_NYX = anomaly_maps(4, 9, seed=seed, levels=levels)
    assert exact(score_NYX, truth_NYX, regions=True).aupro == pytest.approx(slow_aupro(score_NYX, truth_NYX), abs=1e-12)


def test_aupro_of_a_closed_form():
    # Two regions, of 4 pixels and of 1. Three quarters of the large one above all normal pixels, the rest of both
    # below: overlap (3/4 + 0)/2 at FPR 0 up to 1.
    truth_NYX = np.zeros((2, 4, 4), dtype=bool)
    truth_NYX[0, :2, :2] = truth_NYX[1, 3, 3] = True
    score_NYX = np.random.default_rng(0).random((2, 4, 4))
    score_NYX[0, :2, :2] = [[2, 3], [4, -1]]
    score_NYX[1, 3, 3] = -1
    assert exact(score_NYX, truth_NYX, regions=True).aupro == pytest.approx(3 / 8, abs=1e-12)
    # All scores equal: the overlap is the FPR, and the area up to 0.3 is 0.3²/2.
    assert exact(np.ones((2, 4, 4)), truth_NYX, regions=True).aupro == pytest.approx(0.15, abs=1e-12)
    assert exact(np.where(truth_NYX, 1.0, 0.0), truth_NYX, regions=True).aupro == pytest.approx(1, abs=1e-12)


def test_regions_touch_at_corners_but_not_across_images():
    truth_NYX = np.zeros((2, 3, 4), dtype=bool)
    truth_NYX[0, 0, 0] = truth_NYX[0, 1, 1] = truth_NYX[0, 2, 0] = truth_NYX[0, 0, 3] = True
    truth_NYX[1, 0, 0] = True
    assert region_sizes(truth_NYX).tolist() == [3, 1, 3, 3, 1]


def test_regions_need_maps():
    with pytest.raises(ValueError, match=r"regions need masks of shape \[images, rows, columns\], got \(4,\)"):
        exact(np.arange(4.0), np.arange(4) > 2, regions=True)


# --- Masks and bad input ---------------------------------------------------------------------------------------------


def test_images_without_a_mask_are_left_out_or_normal():
    score_NYX, truth_NYX = anomaly_maps(5, 8, seed=4)
    truth_NYX[1] = truth_NYX[3] = False
    masks = [None if image in (1, 3) else torch.from_numpy(mask_YX) for image, mask_YX in enumerate(truth_NYX)]
    assert exact(score_NYX, masks) == exact(score_NYX[[0, 2, 4]], truth_NYX[[0, 2, 4]])
    assert exact(score_NYX, masks, without_mask="normal") == exact(score_NYX, truth_NYX)
    assert exact(score_NYX, masks) != exact(score_NYX, truth_NYX)


@pytest.mark.parametrize(
    ("truth", "without_mask", "sentence"),
    [
        (np.zeros((3, 2, 2), dtype=bool), "leave out", "both classes, got 0 positives and 12 negatives"),
        (np.ones((3, 2, 2), dtype=bool), "leave out", "both classes, got 12 positives and 0 negatives"),
        ([None, None, None], "leave out", "both classes, got 0 positives and 0 negatives"),
        ([None, None], "leave out", "one mask or None per image, got 2 for 3 images"),
        ([None, np.ones((2, 2)), None], "leave out", "truth must be boolean .*, got float64"),
        ([None, np.ones((2, 3), dtype=bool), None], "leave out", r"same shape, got \(2, 2\) and \(2, 3\)"),
    ],
)
def test_bad_truths_are_refused(truth, without_mask, sentence):
    with pytest.raises(ValueError, match=sentence):
        exact(np.zeros((3, 2, 2)), truth, without_mask=without_mask)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_must_be_finite(bad):
    with pytest.raises(ValueError, match=r"^score must be finite, got 1 NaN or infinite values\.$"):
        exact(np.array([0.0, bad, 1.0]), np.array([True, False, False]))


def test_cells_without_pixels_change_nothing():
    score_K, negative_K, positive_K = np.arange(5.0), np.array([0, 3, 0, 1, 0]), np.array([0, 1, 0, 2, 0])
    assert from_counts(score_K, negative_K, positive_K) == from_counts(
        score_K[1::2], negative_K[1::2], positive_K[1::2]
    )
