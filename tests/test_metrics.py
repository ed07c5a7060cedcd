import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from expvae.metrics import Interval, PixelMetrics, auroc, auroc_interval, auroc_per_image, fraction_interval
from expvae.metrics import _histogram as histogram
from expvae.metrics._segmentation import auroc_of_counts
from expvae_book.truth import ink_truth, nearest_inlier
from maps import tied_scores


def anomaly_maps(n, p, *, levels=None, seed=0):
    """Scores of n images of p pixels: images differ in level and in how many pixels are anomalous."""
    rng = np.random.default_rng(seed)
    truth_NP = rng.random((n, p)) < 0.4 * rng.random((n, 1))
    score_NP = rng.normal(size=(n, p)) + truth_NP + 0.5 * rng.normal(size=(n, 1))
    if levels:
        score_NP = np.round(score_NP * levels) / levels
    return score_NP.astype(np.float32), truth_NP


# --- AUROC -----------------------------------------------------------------------------------------------------------


@settings(max_examples=50)
@given(tied_scores())
def test_auroc_equals_sklearn_with_ties(case):
    score, truth = case
    assert auroc(score, truth) == pytest.approx(roc_auc_score(truth.ravel(), score.ravel()), abs=1e-12)


@settings(max_examples=50)
@given(tied_scores(), st.randoms(use_true_random=False))
def test_auroc_depends_on_order_only_and_flips_with_the_sign(case, random):
    score, truth = case
    shuffle = list(range(score.size))
    random.shuffle(shuffle)
    assert auroc(score.ravel()[shuffle], truth.ravel()[shuffle]) == auroc(score, truth)
    assert auroc(-score, truth) == pytest.approx(1 - auroc(score, truth), abs=1e-12)


def test_auroc_of_many_pixels_equals_sklearn():
    score_NP, truth_NP = anomaly_maps(200, 784, levels=50)
    assert auroc(score_NP, truth_NP) == pytest.approx(roc_auc_score(truth_NP.ravel(), score_NP.ravel()), abs=1e-12)


def test_auroc_by_hand():
    # Pairs (positive, negative): 3 > 1, 3 > 2, 2 > 1 and the tie 2 = 2.
    assert auroc(np.array([1.0, 2.0, 2.0, 3.0]), np.array([False, False, True, True])) == 3.5 / 4
    assert isinstance(auroc(np.array([0, 1]), np.array([False, True])), float)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_auroc_takes_tensors_of_every_precision(dtype):
    score = (torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0)) * 100).to(dtype)
    truth = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(1)) < 0.3
    expected = roc_auc_score(truth.flatten().numpy(), score.double().flatten().numpy())
    assert auroc(score, truth) == pytest.approx(expected, abs=1e-12)


def test_auroc_takes_maps_that_carry_gradients():
    assert auroc(torch.tensor([0.0, 1.0], requires_grad=True) * 2, torch.tensor([False, True])) == 1


@pytest.mark.parametrize("function", [auroc, auroc_per_image, lambda s, t: auroc_interval(s, t, seed=0)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_scores_must_be_finite(function, bad):
    score_NP, truth_NP = anomaly_maps(4, 9)
    score_NP[2, 3] = bad
    with pytest.raises(ValueError, match=r"^score must be finite, got 1 NaN or infinite values\.$"):
        function(score_NP, truth_NP)


@pytest.mark.parametrize("function", [auroc, auroc_per_image, lambda s, t: auroc_interval(s, t, seed=0)])
def test_truth_must_be_boolean_and_of_the_same_shape(function):
    score_NP, truth_NP = anomaly_maps(4, 9)
    with pytest.raises(ValueError, match=r"truth must be boolean \(for a mask: mask > 0\), got uint8"):
        function(score_NP, truth_NP.astype(np.uint8) * 255)
    with pytest.raises(ValueError, match=r"same shape, got \(4, 9\) and \(4, 8\)"):
        function(score_NP, truth_NP[:, :8])


@pytest.mark.parametrize("function", [auroc, lambda s, t: auroc_interval(s, t, seed=0)])
def test_pooled_auroc_needs_both_classes(function):
    score = np.arange(4.0)
    with pytest.raises(ValueError, match="both classes, got 0 positives and 4 negatives"):
        function(score, np.zeros(4, dtype=bool))
    with pytest.raises(ValueError, match="both classes, got 4 positives and 0 negatives"):
        function(score, np.ones(4, dtype=bool))


# --- AUROC per image -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 2])
def test_auroc_per_image_equals_a_loop(levels):
    score_NP, truth_NP = anomaly_maps(40, 49, levels=levels)
    truth_NP[3], truth_NP[5] = False, True
    found_N = auroc_per_image(score_NP.reshape(40, 7, 7), torch.from_numpy(truth_NP).reshape(40, 7, 7))
    expected_N = [
        roc_auc_score(truth, score) if 0 < truth.sum() < 49 else np.nan
        for score, truth in zip(score_NP, truth_NP, strict=True)
    ]
    np.testing.assert_allclose(found_N, expected_N, rtol=0, atol=1e-12)
    assert np.isnan(found_N[[3, 5]]).all()
    assert found_N.shape == (40,)


def test_auroc_per_image_counts_only_pixels_asked_for():
    score_NP, truth_NP = anomaly_maps(40, 49, levels=2)
    where_NP = np.random.default_rng(1).random((40, 49)) < 0.3
    where_NP[3] = False
    expected_N = [
        roc_auc_score(truth[where], score[where]) if len(set(truth[where])) == 2 else np.nan
        for score, truth, where in zip(score_NP, truth_NP, where_NP, strict=True)
    ]
    found_N = auroc_per_image(score_NP, truth_NP, where_NP=where_NP)
    np.testing.assert_allclose(found_N, expected_N, rtol=0, atol=1e-12)
    assert 1 < np.isnan(found_N).sum() < 20


def test_auroc_per_image_needs_images():
    with pytest.raises(ValueError, match="at least one image along its first axis"):
        auroc_per_image(np.zeros((0, 3)), np.zeros((0, 3), dtype=bool))


# --- Bootstrap -------------------------------------------------------------------------------------------------------


def slow_bootstrap(score_NP, truth_NP, where_NP, *, seed, resamples, level):
    """The same resamples, each scored by scikit-learn."""
    rng = np.random.default_rng(seed)
    n = len(score_NP)
    aurocs = []
    for _ in range(resamples):
        drawn = rng.integers(n, size=n)
        where = where_NP[drawn]
        truth = truth_NP[drawn][where]
        if truth.any() and not truth.all():
            aurocs.append(roc_auc_score(truth, score_NP[drawn][where]))
    return np.percentile(aurocs, [50 * (1 - level), 50 * (1 + level)])


@pytest.mark.parametrize("share", [1.0, 0.5])
@pytest.mark.parametrize(
    ("n", "p", "levels", "error"),
    [
        (30, 20, None, 1e-12),  # few scores: exact
        (30, 100, 5, 1e-12),  # few distinct scores, all of them ties: exact
        (40, 150, None, 2e-5),  # more scores than cells
    ],
)
def test_interval_equals_a_slow_bootstrap_of_the_same_resamples(n, p, levels, error, share):
    score_NP, truth_NP = anomaly_maps(n, p, levels=levels)
    where_NP = np.random.default_rng(1).random((n, p)) < share
    options = {"seed": 3, "resamples": 100, "level": 0.9}
    found = auroc_interval(score_NP, truth_NP, where_NP=None if share == 1 else where_NP, **options)
    low, high = slow_bootstrap(score_NP, truth_NP, where_NP, **options)
    assert found.value == pytest.approx(roc_auc_score(truth_NP[where_NP], score_NP[where_NP]), abs=1e-12)
    assert found.low == pytest.approx(low, abs=error)
    assert found.high == pytest.approx(high, abs=error)
    assert found.n == n
    assert found.high - found.low > 100 * error


def test_interval_leaves_out_resamples_of_one_class():
    score_N, truth_N = np.array([0.3, 0.1, 0.4, 0.2]), np.array([True, False, False, False])
    found = auroc_interval(score_N, truth_N, seed=0, resamples=200)
    everywhere_N = np.ones(4, dtype=bool)
    assert (found.low, found.high) == tuple(
        slow_bootstrap(score_N, truth_N, everywhere_N, seed=0, resamples=200, level=0.95)
    )


def of_both_classes(score, truth):
    """Distinct scores, the group of equal scores that each is in, and the groups' counts of both classes."""
    score_G, group = np.unique(score.astype(np.float32), return_inverse=True)
    return score_G, group, np.stack([np.bincount(group[truth == c], minlength=len(score_G)) for c in (False, True)])


@pytest.mark.parametrize("join_runs", [True, False])
def test_no_resample_loses_more_order_than_the_shared_cells_hold(monkeypatch, join_runs):
    monkeypatch.setattr(histogram, "RESAMPLING_CELLS", 8)  # coarse, so that the error can be seen
    monkeypatch.setattr(histogram, "GRID", np.zeros(0))
    score_NP, truth_NP = anomaly_maps(20, 100, levels=40)
    score_G, group_NP, count_2G = of_both_classes(score_NP, truth_NP)
    cell_G = histogram.resampling_cells(score_G, count_2G, join_runs=join_runs)
    assert (np.diff(cell_G) >= 0).all() and cell_G.max() <= 4 * 8
    counts = PixelMetrics()
    counts.update(score_NP, truth_NP, unit=range(20))
    _, count_CRK, _ = counts._count().resampled(20, 5, 100, join_runs=join_runs)
    found_R = auroc_of_counts(*count_CRK[:2])[1:]

    rng = np.random.default_rng(5)
    worst = 0
    for found in found_R:
        drawn = rng.integers(20, size=20)
        score, truth, cell = (values[drawn].ravel() for values in (score_NP, truth_NP, cell_G[group_NP]))
        one_cell = cell[truth][:, None] == cell[~truth]
        tie = score[truth][:, None] == score[~truth]
        error = abs(found - roc_auc_score(truth, score))
        assert error <= (one_cell & ~tie).mean() / 2 + 1e-9
        worst = max(worst, error)
    assert worst > 1e-6  # else this test would see nothing


@pytest.mark.parametrize("join_runs", [True, False])
def test_cells_bound_the_error_for_the_worst_order(join_runs):
    # Every quantile falls on a tie of both classes, and between two of them all positives lie above all negatives.
    n = 64 * 2 * histogram.RESAMPLING_CELLS
    score_N = np.arange(n)
    score_N[64::64] -= 1
    truth_N = np.arange(n) % 64 >= 32
    score_G, _, count_2G = of_both_classes(score_N, truth_N)
    cell_G = histogram.resampling_cells(score_G, count_2G, join_runs=join_runs)
    count_2K = [np.bincount(cell_G, weights=count_G) for count_G in count_2G]
    error = abs(auroc_of_counts(*count_2K) - auroc(score_N, truth_N))
    assert 0 < error < 1 / (4 * histogram.RESAMPLING_CELLS)


def test_classes_that_do_not_mix_have_a_sharp_interval():
    n = 5000  # more scores than cells
    score_N = np.random.default_rng(0).normal(size=n)
    assert auroc_interval(score_N, score_N > 1, seed=0, resamples=100) == Interval(1.0, 1.0, 1.0, n)


def test_interval_is_wider_than_if_pixels_were_independent():
    score_NP, truth_NP = anomaly_maps(100, 50)
    score_NP += 2 * np.random.default_rng(7).normal(size=(100, 1))
    by_image = auroc_interval(score_NP, truth_NP, seed=0, resamples=300)
    by_pixel = auroc_interval(score_NP.ravel(), truth_NP.ravel(), seed=0, resamples=300)
    assert by_image.value == by_pixel.value
    assert by_image.high - by_image.low > 1.5 * (by_pixel.high - by_pixel.low)


def test_interval_covers_the_true_auroc():
    # Scores of two unit normals one apart: AUROC = Φ(1/√2). One score per image, as for whole digits.
    truth_N = np.arange(150) % 3 == 0
    true_auroc = 0.760250
    rng = np.random.default_rng(11)
    covered = 0
    for trial in range(100):
        found = auroc_interval(rng.normal(size=150) + truth_N, truth_N, seed=trial, resamples=200)
        covered += found.low <= true_auroc <= found.high
    # Binomial(100, 0.95) has a standard deviation of 2.2; a percentile interval covers a little less.
    assert 88 <= covered <= 99


def test_interval_repeats_with_its_seed_and_counts_images_in_chunks(monkeypatch):
    score_NP, truth_NP = anomaly_maps(50, 30)
    found = auroc_interval(score_NP, truth_NP, seed=1, resamples=100)
    assert auroc_interval(score_NP, truth_NP, seed=2, resamples=100) != found
    monkeypatch.setattr(histogram, "UNITS_PER_CHUNK", 7)
    assert auroc_interval(score_NP, truth_NP, seed=1, resamples=100) == found


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"resamples": 99}, "resamples must be at least 100, got 99"),
        ({"level": 95.0}, "level must lie between 0 and 1, got 95.0"),
    ],
)
def test_interval_refuses_bad_options(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        auroc_interval(*anomaly_maps(4, 9), seed=0, **options)


@pytest.mark.parametrize("where_NP", [np.ones((4, 8), dtype=bool), np.ones((4, 9))])
def test_where_must_be_boolean_and_of_the_same_shape(where_NP):
    with pytest.raises(ValueError, match=r"where must be boolean of shape \(4, 9\), got "):
        auroc_interval(*anomaly_maps(4, 9), where_NP=where_NP, seed=0)


def test_pixels_asked_for_must_hold_both_classes():
    score_NP, truth_NP = anomaly_maps(4, 9)
    with pytest.raises(ValueError, match=f"both classes, got {truth_NP.sum()} positives and 0 negatives"):
        auroc_interval(score_NP, truth_NP, where_NP=truth_NP, seed=0)


def test_interval_needs_two_images():
    with pytest.raises(ValueError, match="at least two images to resample, got 1"):
        auroc_interval(*anomaly_maps(1, 90), seed=0)


# --- Proportions -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "n"), [(0, 10), (10, 10), (3, 20), (120, 1000)])
def test_fraction_interval_solves_wilsons_equation(k, n):
    found = fraction_interval(np.arange(n) < k)
    # The ends are the proportions π that are z standard errors √(π(1 − π)/n) away from p:
    # (1 + z²/n)π² − (2p + z²/n)π + p² = 0.
    z2, p = 1.959963984540054**2, k / n
    low, high = np.sort(np.roots([1 + z2 / n, -(2 * p + z2 / n), p**2]))
    assert (found.value, found.n) == (p, n)
    assert found.low == pytest.approx(low, abs=1e-12)
    assert found.high == pytest.approx(high, abs=1e-12)


def test_fraction_interval_at_the_ends_of_the_scale():
    z2 = 1.959963984540054**2
    none, every = (fraction_interval(torch.full((10,), flag)) for flag in (False, True))
    assert (none.value, none.low, none.high) == (0, 0, pytest.approx(z2 / (10 + z2), abs=1e-12))
    assert (every.value, every.low, every.high) == (1, pytest.approx(10 / (10 + z2), abs=1e-12), 1)


def test_fraction_interval_covers_the_true_proportion():
    rng = np.random.default_rng(0)
    found = [fraction_interval(rng.random(40) < 0.12) for _ in range(1000)]
    assert np.mean([interval.low <= 0.12 <= interval.high for interval in found]) == pytest.approx(0.95, abs=0.025)
    narrow = fraction_interval(rng.random(40) < 0.12, level=0.5)
    assert narrow.high - narrow.low < 0.5 * (found[0].high - found[0].low)


def test_fraction_interval_refuses_what_is_no_flag():
    with pytest.raises(ValueError, match="at least one flag, got none"):
        fraction_interval(np.zeros(0, dtype=bool))
    with pytest.raises(ValueError, match="must be boolean, got float64"):
        fraction_interval(np.array([0.2, np.nan]))


# --- Truth of MNIST --------------------------------------------------------------------------------------------------


def blobs(n, seed):
    """Smooth random images, about a third of them ink."""
    noise = torch.rand(n, 1, 9, 11, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1, count_include_pad=False)[:, 0]


def slow_truth(x_YX, inlier_MYX, tolerance):
    distances = [((x_YX - inlier_YX) ** 2).sum() for inlier_YX in inlier_MYX]
    nearest_YX = inlier_MYX[int(np.argmin(distances))]
    truth_YX = np.zeros(x_YX.shape, dtype=bool)
    for y in range(x_YX.shape[0]):
        for x in range(x_YX.shape[1]):
            near = nearest_YX[max(0, y - tolerance) : y + tolerance + 1, max(0, x - tolerance) : x + tolerance + 1]
            truth_YX[y, x] = x_YX[y, x] >= 0.5 and near.max() < 0.5
    return truth_YX


@pytest.mark.parametrize("tolerance", [0, 1, 2])
def test_ink_truth_equals_a_slow_loop(tolerance, monkeypatch):
    monkeypatch.setattr("expvae_book.truth.IMAGES_PER_CHUNK", 8)  # 20 images in three chunks
    x_NYX, inlier_MYX = blobs(20, seed=1), blobs(30, seed=2)
    found_NYX = ink_truth(x_NYX, inlier_MYX, tolerance=tolerance)
    expected_NYX = np.stack(
        [slow_truth(x_YX, inlier_MYX.double().numpy(), tolerance) for x_YX in x_NYX.double().numpy()]
    )
    assert found_NYX.dtype == torch.bool
    assert expected_NYX.any() and not expected_NYX.all()
    np.testing.assert_array_equal(found_NYX.numpy(), expected_NYX)


def test_nearest_inlier_is_found_in_arrays_too():
    inlier_MYX = blobs(30, seed=2)
    order_N = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert torch.equal(nearest_inlier(inlier_MYX[order_N].numpy(), inlier_MYX.numpy()), order_N)
    assert not ink_truth(inlier_MYX, inlier_MYX).any()


def test_a_bar_that_the_inlier_lacks_is_the_truth():
    one_YX = torch.zeros(9, 9)
    one_YX[1:8, 4] = 1
    seven_YX = one_YX.clone()
    seven_YX[1, 1:5] = 0.5  # as dark as ink must be
    far_YX = torch.ones(9, 9)
    truth_YX = ink_truth(seven_YX[None], torch.stack([far_YX, one_YX]))[0]
    assert truth_YX.nonzero().tolist() == [[1, 1], [1, 2], [1, 3]]
    # The bar itself as the inlier, just as dark: all of it is present.
    assert not ink_truth(seven_YX[None], seven_YX[None]).any()
    assert ink_truth(seven_YX[None], one_YX[None], tolerance=1)[0].nonzero().tolist() == [[1, 1], [1, 2]]


@pytest.mark.parametrize(
    ("x_NYX", "inlier_MYX", "tolerance", "sentence"),
    [
        (blobs(2, 0) * 255, blobs(2, 0), 0, r"x_NYX must hold intensities in \[0, 1\]; divide 8-bit images by 255"),
        (blobs(2, 0), blobs(2, 0) - 1, 0, r"inlier_MYX must hold intensities in \[0, 1\]"),
        (blobs(2, 0), blobs(2, 0) * torch.nan, 0, r"inlier_MYX must hold intensities in \[0, 1\]"),
        (blobs(2, 0), blobs(2, 0)[:0], 0, "inlier_MYX must hold at least one image"),
        (blobs(2, 0), blobs(2, 0)[:, :, :-1], 0, r"must be of one size, got \(9, 11\) and \(9, 10\)"),
        (blobs(2, 0), blobs(2, 0), -1, "tolerance must be 0 or more pixels, got -1"),
    ],
)
def test_ink_truth_refuses_bad_images(x_NYX, inlier_MYX, tolerance, sentence):
    with pytest.raises(ValueError, match=sentence):
        ink_truth(x_NYX, inlier_MYX, tolerance)
