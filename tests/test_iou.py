import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from sklearn.metrics import jaccard_score

from expvae.metrics import CONVENTIONS, confusion, iou_intervals, ious, thresholds
from maps import anomaly_maps, exact, tied_scores


def sklearn_iou(truth_NYX, flagged_NYX, average, classes):
    """One convention in scikit-learn's words; its labels are by default those that occur in truth or prediction."""
    kind = "binary" if classes == "anomalous" else "macro"

    def score(truth, flagged):
        return jaccard_score(truth.ravel(), flagged.ravel(), average=kind, zero_division=0)

    if average == "pooled":
        return score(truth_NYX, flagged_NYX)
    return np.mean(
        [
            score(truth_YX, flagged_YX)
            for truth_YX, flagged_YX in zip(truth_NYX, flagged_NYX, strict=True)
            if average == "per image" or truth_YX.any()
        ]
    )


def smooth_maps(n, side, *, contrast, seed=0):
    """Maps as attention makes them: smooth, many exact zeros, few anomalous pixels, one image in three normal."""
    rng = np.random.default_rng(seed)
    truth_NYX = np.zeros((n, side, side), dtype=bool)
    for truth_YX in truth_NYX[n // 3 :]:
        y, x, size = rng.integers([0, 0, 3], [side - 3, side - 3, side // 5])
        truth_YX[y : y + size, x : x + size] = True
    noise_NYX = ndimage.gaussian_filter(rng.normal(size=truth_NYX.shape), (0, 4, 4)) * 12
    score_NYX = noise_NYX + contrast * ndimage.gaussian_filter(truth_NYX.astype(float), (0, 2, 2))
    return np.maximum(score_NYX, 0).astype(np.float32), truth_NYX


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_every_convention_equals_sklearn(convention):
    score_NYX, truth_NYX = anomaly_maps(6, 12, seed=3, levels=20)
    assert 0 < truth_NYX.any(axis=(1, 2)).sum() < 6
    threshold_T = np.array([-9.0, -0.5, 0.5, 1.0, 2.0, 3.0, 9.0])
    found_T = ious(confusion(score_NYX, truth_NYX, threshold_T), *convention)[0]
    for threshold, found in zip(threshold_T, found_T, strict=True):
        expected = sklearn_iou(truth_NYX, score_NYX >= threshold, *convention)
        assert found == pytest.approx(expected, abs=1e-12), threshold


@settings(max_examples=50, deadline=None)
@given(tied_scores())
def test_conventions_equal_sklearn_with_ties_and_images_of_one_class(case):
    score, truth = (values.reshape(len(values), -1) for values in case)
    threshold_T = np.unique(score)
    table = confusion(score, truth, threshold_T)
    for convention in CONVENTIONS:
        expected = [sklearn_iou(truth, score >= threshold, *convention) for threshold in threshold_T]
        np.testing.assert_allclose(ious(table, *convention)[0], expected, atol=1e-12)


@pytest.mark.parametrize("contrast", [0.0, 1.0, 4.0])
def test_pooled_numbers_equal_the_exact_ones(contrast):
    score_NYX, truth_NYX = smooth_maps(45, 128, contrast=contrast)
    found = iou_intervals(
        torch.from_numpy(score_NYX), torch.from_numpy(truth_NYX), validation=0.7, seed=0, resamples=100
    )
    expected = exact(score_NYX, truth_NYX, threshold=0.7)
    assert found["pooled", "anomalous", "validation"].value == pytest.approx(expected.iou, abs=1e-12)
    assert found["pooled", "both", "validation"].value == pytest.approx(expected.mean_iou, abs=1e-12)
    assert found["pooled", "anomalous", "grid"].value == pytest.approx(expected.grid_iou, abs=1e-12)
    assert expected.best_iou - 1e-3 < found["pooled", "anomalous", "best"].value <= expected.best_iou + 1e-12
    assert expected.best_mean_iou - 1e-3 < found["pooled", "both", "best"].value <= expected.best_mean_iou + 1e-12


def slow_iou(truth, flagged):
    return (truth & flagged).sum() / (truth | flagged).sum()


def test_numbers_and_intervals_equal_a_slow_loop():
    score_NYX, truth_NYX = anomaly_maps(5, 9, seed=3, levels=4)
    defective = truth_NYX.any(axis=(1, 2))
    assert 0 < defective.sum() < 5
    found = iou_intervals(score_NYX, truth_NYX, validation=0.8, seed=7, resamples=100, level=0.9)
    grid = [np.float32(i / 100 * float(score_NYX.max())) for i in range(1, 100)]
    rng = np.random.default_rng(7)
    samples = [np.arange(5), *(rng.integers(5, size=5) for _ in range(100))]
    samples = [sample for sample in samples if defective[sample].any()]
    for choice, candidates in {"validation": [0.8], "grid": grid, "best": [*np.unique(score_NYX), *grid]}.items():
        pooled, per_defective_image = [], []
        for sample in samples:
            images = sample[defective[sample]]
            pooled.append(max(slow_iou(truth_NYX[sample], score_NYX[sample] >= t) for t in candidates))
            iou_NT = [[slow_iou(truth_NYX[image], score_NYX[image] >= t) for t in candidates] for image in images]
            per_defective_image.append(np.mean(iou_NT, axis=0).max())
        for average, values, n in [
            ("pooled", pooled, 5),
            ("per defective image", per_defective_image, defective.sum()),
        ]:
            interval = found[average, "anomalous", choice]
            ends = np.quantile(values[1:], [0.05, 0.95])
            assert [interval.value, interval.low, interval.high] == pytest.approx([values[0], *ends], abs=1e-12)
            assert interval.n == n


def test_clips_are_resampled_whole():
    score_NYX, truth_NYX = anomaly_maps(6, 9, seed=3, levels=4)
    clip_N = np.array([7, 2, 7, 7, 2, 9])
    found = iou_intervals(score_NYX, truth_NYX, unit_N=clip_N, validation=0.8, seed=7, resamples=100)
    rng, values = np.random.default_rng(7), []
    for clips in ([0, 1, 2], *(rng.integers(3, size=3) for _ in range(100))):
        sample = [image for clip in clips for image in np.flatnonzero(clip_N == (2, 7, 9)[clip])]
        if truth_NYX[sample].any():
            values.append(slow_iou(truth_NYX[sample], score_NYX[sample] >= 0.8))
    interval = found["pooled", "anomalous", "validation"]
    expected = [values[0], *np.quantile(values[1:], [0.025, 0.975]), 3]
    assert [interval.value, interval.low, interval.high, interval.n] == pytest.approx(expected, abs=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 2**16), st.integers(2, 5))
def test_a_map_that_flags_nothing_has_nearly_half_of_both_classes(seed, n):
    rng = np.random.default_rng(seed)
    truth_NYX = np.zeros((n, 20, 20), dtype=bool)
    truth_NYX[0, 3:6, 3 : 4 + rng.integers(8)] = True
    table = confusion(rng.random(truth_NYX.shape), truth_NYX, np.array([2.0]))
    normal = 1 - truth_NYX.mean()
    assert normal / 2 > 0.46
    assert ious(table, "pooled", "both").item() == pytest.approx(normal / 2)
    assert ious(table, "pooled", "anomalous").item() == 0
    defective = (1 - truth_NYX[0].mean()) / 2
    assert ious(table, "per defective image", "both").item() == pytest.approx(defective)
    assert ious(table, "per image", "both").item() == pytest.approx((n - 1 + defective) / n)


@settings(max_examples=30, deadline=None)
@given(tied_scores(), st.floats(-4, 4))
def test_best_is_no_worse_than_any_other_choice(case, validation):
    score, truth = (np.concatenate([values.reshape(1, -1)] * 2) for values in case)
    found = iou_intervals(score, truth, validation=validation, seed=0, resamples=100)
    for average, classes in CONVENTIONS:
        best = found[average, classes, "best"]
        for choice in ("validation", "grid"):
            other = found[average, classes, choice]
            assert (best.value, best.low, best.high) >= (other.value, other.low, other.high)
        assert best.low == pytest.approx(best.value) == pytest.approx(best.high)  # both images are the same


def test_thresholds_have_the_precision_of_the_scores_and_ascend():
    score = torch.linspace(0, 1, 1000, dtype=torch.float32)
    found = thresholds(score, validation=0.1)
    assert found["validation"].tolist() == [float(np.float32(0.1))]
    assert found["grid"].tolist() == [float(np.float32(i / 100)) for i in range(1, 100)]
    assert (np.diff(found["best"]) > 0).all()
    assert set(found["best"]) >= {0.0, 1.0, *found["validation"], *found["grid"]}
    assert len(found["best"]) <= 1000 + 1 + 99 + 1
    assert "validation" not in thresholds(score)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert thresholds(score, validation=1e300)["best"][-1] == np.inf


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda s, t: confusion(s, t[:, :1], np.zeros(1)), r"the same shape, got \(3, 2, 2\) and \(3, 1, 2\)"),
        (lambda s, t: confusion(s, t, np.array([1.0, 0.0])), "^threshold_T must be numbers in ascending order"),
        (lambda s, t: confusion(s, t, np.array([np.nan])), "^threshold_T must be numbers in ascending order"),
        (lambda s, t: confusion(s[:0], t[:0], np.zeros(1)), "at least one image along its first axis"),
        (lambda s, t: confusion(s * np.nan, t, np.zeros(1)), "must be finite, got 12 NaN"),
        (lambda s, t: thresholds(s / 0, validation=1.0), "must be finite"),
        (lambda s, t: thresholds(s[:0]), "^score must hold at least one pixel"),
        (lambda s, t: thresholds(s, validation=float("nan")), "^validation must be a number or None, got nan"),
        (lambda s, t: ious(confusion(s, t, np.zeros(1)), "per image", "anomalous"), "got 'per image' of 'anomalous'"),
        (lambda s, t: iou_intervals(s, t & False, seed=0), "both classes, got 0 positives and 12 negatives"),
        (lambda s, t: iou_intervals(s[2:], t[2:], seed=0), "at least two images to resample, got 1"),
        (lambda s, t: iou_intervals(s, t, unit_N=np.zeros(2), seed=0), "one unit for each of 3 images, got shape"),
        (lambda s, t: iou_intervals(s, t, unit_N=np.zeros(3), seed=0), "or be of at least two units"),
        (lambda s, t: iou_intervals(s, t, seed=0, resamples=10), "^resamples must be at least 100, got 10"),
    ],
)
def test_bad_input_is_refused(call, sentence):
    score_NYX, truth_NYX = np.ones((3, 2, 2)), np.zeros((3, 2, 2), dtype=bool)
    truth_NYX[2, 0] = True
    with np.errstate(divide="ignore", invalid="ignore"), pytest.raises(ValueError, match=sentence):
        call(score_NYX, truth_NYX)
