from dataclasses import asdict, fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score, roc_curve

from expvae.metrics import PixelMetrics, PixelScores, auroc_difference, auroc_interval
from expvae.metrics import _histogram as histogram
from expvae.metrics import _streaming as streaming
from maps import anomaly_maps, exact


def counted(score, truth, *, batch=7, unit=None, where=None, regions=False):
    counts = PixelMetrics(regions=regions)
    for start in range(0, len(score), batch):
        part = slice(start, start + batch)
        unit_B, where_BYX = (None if values is None else values[part] for values in (unit, where))
        counts.update(score[part], truth[part], unit=unit_B, where=where_BYX)
    return counts


@pytest.fixture
def small(monkeypatch):
    """Bounds so small that a test reaches them all."""
    monkeypatch.setattr(streaming, "EXACT_PIXELS", 300)
    monkeypatch.setattr(streaming, "MAX_CELLS", 2**16)
    monkeypatch.setattr(histogram, "MAX_ROWS", 2000)
    monkeypatch.setattr(histogram, "UNITS_PER_CHUNK", 4)


# --- Measures --------------------------------------------------------------------------------------------------------


def test_a_million_pixels_equal_sklearn():
    score_NYX, truth_NYX = anomaly_maps(100, 100)
    score_NYX[:, :, :30] = np.round(score_NYX[:, :, :30], 1)  # ties
    counts = counted(score_NYX, truth_NYX, batch=13)
    found = counts.compute(threshold=0.9)
    score, truth = score_NYX.ravel(), truth_NYX.ravel()
    assert found.auroc == pytest.approx(roc_auc_score(truth, score), abs=1e-9)
    assert found.average_precision == pytest.approx(average_precision_score(truth, score), abs=1e-9)
    assert found.iou == pytest.approx(jaccard_score(truth, score >= np.float32(0.9)), abs=1e-9)
    normal = jaccard_score(~truth, score < np.float32(0.9))
    assert found.mean_iou == pytest.approx((found.iou + normal) / 2, abs=1e-9)
    assert found.best_iou == pytest.approx(jaccard_score(truth, score >= found.best_iou_threshold), abs=1e-9)
    fpr, tpr, _ = roc_curve(truth, score, drop_intermediate=False)
    union = truth.sum() + np.rint(fpr * (~truth).sum())
    assert found.best_iou == pytest.approx((np.rint(tpr * truth.sum()) / union).max(), abs=1e-9)
    assert found.fpr95 == pytest.approx(fpr[np.argmax(tpr >= 0.95)], abs=1e-9)
    assert found.grid_iou == pytest.approx(slow_grid_iou(score, truth), abs=1e-9)
    assert counts.images == 100


def slow_grid_iou(score, truth):
    highest = float(score.max())
    best = 0.0
    for i in range(1, 100):
        flagged = score >= np.float32(i / 100 * highest)
        best = max(best, (flagged & truth).sum() / (flagged | truth).sum())
    return best


def test_the_grid_of_the_reports_equals_a_slow_loop():
    score_NYX, truth_NYX = anomaly_maps(9, 12)
    assert counted(score_NYX, truth_NYX).compute().grid_iou == slow_grid_iou(score_NYX, truth_NYX)


scores = st.sampled_from([-2.0, -1e-30, -0.0, 0.0, 1e-42, 0.5, 0.5000001, 3.0])


@st.composite
def tied_maps(draw):
    shape = draw(hnp.array_shapes(min_dims=3, max_dims=3, max_side=5).filter(lambda shape: np.prod(shape) >= 2))
    truth = draw(hnp.arrays(bool, shape).filter(lambda truth: truth.any() and not truth.all()))
    return draw(hnp.arrays(np.float32, shape, elements=scores.map(np.float32))), truth


@settings(max_examples=50, deadline=None)
@given(tied_maps())
def test_counts_equal_the_exact_twin(case):
    found = asdict(counted(*case, batch=2, regions=True).compute(threshold=0.5))
    for name, expected in asdict(exact(*case, regions=True, threshold=0.5)).items():
        assert found[name] == pytest.approx(expected, abs=1e-9), name


@settings(max_examples=50, deadline=None)
@given(hnp.arrays(np.float32, 8, elements=st.floats(-3.0, 3.0, width=32)))
def test_ordered_integers_keep_the_order_and_the_scores(score_P):
    ordered_P = histogram.ordered(score_P)
    np.testing.assert_array_equal(np.sign(np.diff(score_P)), np.sign(np.diff(ordered_P.astype(np.int64))))
    np.testing.assert_array_equal(histogram.scores(ordered_P.astype(np.int64) | (5 << 32)), score_P)


def test_cells_are_close_to_the_exact_twin(small, monkeypatch):
    monkeypatch.setattr(histogram, "MAX_ROWS", 10_000)
    score_NYX, truth_NYX = anomaly_maps(40, 20)
    counts = counted(score_NYX, truth_NYX, regions=True)
    found, expected = counts.compute(threshold=1.0), exact(score_NYX, truth_NYX, regions=True, threshold=1.0)
    assert counts._count().dropped > 0 and len(counts._count().key_T) > 2000
    assert found != expected
    for name, value in asdict(expected).items():
        assert asdict(found)[name] == pytest.approx(value, abs=0.02 if "threshold" in name else 2e-3), name
    assert found.auroc == pytest.approx(expected.auroc, abs=1e-5)
    assert found.aupro == pytest.approx(expected.aupro, abs=1e-4)


def test_few_cells_lose_nothing_from_scores_that_share_none(small):
    score_NYX, truth_NYX = anomaly_maps(40, 20)
    score_NYX = np.round(score_NYX * 4) / 4  # eight scores between 1 and 2 and fewer below
    found = counted(score_NYX, truth_NYX, regions=True).compute()
    for name, value in asdict(exact(score_NYX, truth_NYX, regions=True)).items():
        assert asdict(found)[name] == (value if value is None else pytest.approx(value, abs=1e-9)), name


@pytest.mark.parametrize("bounds", ["small", "usual"])
@pytest.mark.parametrize("factor", [2, -1])
def test_doubled_scores_change_nothing_and_turned_ones_the_auroc(bounds, factor, request):
    if bounds == "small":
        request.getfixturevalue("small")
    score_NYX, truth_NYX = anomaly_maps(20, 10)
    found, mapped = (counted(score_NYX * f, truth_NYX, regions=True).compute() for f in (1, factor))
    if factor == 2:
        doubled = {name: 2 * value for name, value in asdict(found).items() if name.endswith("threshold")}
        assert asdict(mapped) == asdict(found) | doubled
    else:
        assert mapped.auroc == pytest.approx(1 - found.auroc, abs=1e-5 if bounds == "small" else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_tensors_of_every_precision(dtype):
    generator = torch.Generator().manual_seed(0)
    score = (torch.rand(3, 4, 5, generator=generator) * 100).to(dtype).requires_grad_(dtype != torch.uint8)
    truth = torch.rand(3, 4, 5, generator=generator) < 0.3
    counts = PixelMetrics()
    counts.update(score, truth)
    assert counts.compute() == exact(score.float(), truth)


def test_arrays_that_are_read_only_or_not_contiguous():
    score_NYX, truth_NYX = anomaly_maps(6, 8)
    score_NYX.setflags(write=False)
    counts = PixelMetrics(regions=True)
    counts.update(score_NYX[::2, :, ::-1], np.asfortranarray(truth_NYX[::2, :, ::-1]))
    expected = exact(score_NYX[::2], truth_NYX[::2], regions=True)
    assert counts.compute().auroc == expected.auroc
    assert counts.compute().aupro == pytest.approx(expected.aupro, abs=1e-9)


def test_the_caller_may_use_its_arrays_again():
    score_NYX, truth_NYX = anomaly_maps(6, 8)
    counts, expected = PixelMetrics(), exact(score_NYX, truth_NYX)
    counts.update(score_NYX, truth_NYX)
    score_NYX[:], truth_NYX[:] = 0, False
    assert counts.compute() == expected


# --- Merging ---------------------------------------------------------------------------------------------------------


def everything(counts):
    return counts.compute(threshold=0.5), counts.intervals(seed=0, resamples=100), counts.images


@pytest.mark.parametrize("bounds", ["small", "usual"])
@pytest.mark.parametrize("seed", range(4))
def test_order_and_grouping_change_nothing(bounds, seed, request):
    if bounds == "small":
        request.getfixturevalue("small")
    rng = np.random.default_rng(seed)
    score_NYX, truth_NYX = anomaly_maps(30, 10)
    score_NYX *= np.linspace(0.01, 3, 30, dtype=np.float32)[:, None, None]  # batches differ in their range
    masks = [None if image % 5 == 0 else mask_YX for image, mask_YX in enumerate(truth_NYX)]
    clip = [f"clip {image // 3}" for image in range(30)]
    expected = everything(counted(score_NYX, masks, batch=30, unit=clip, regions=True))

    order = rng.permutation(30)
    merged = PixelMetrics(regions=True)
    for group in np.split(order, np.sort(rng.integers(0, 30, size=4))):
        part = counted(
            score_NYX[group], [masks[i] for i in group], batch=4, unit=[clip[i] for i in group], regions=True
        )
        if rng.random() < 0.5 and part.images:
            part.compute()  # reading moves what is kept, which must not show
        before = part.images, part._pixels
        merged.merge(part)
        assert (part.images, part._pixels) == before
    assert everything(merged) == expected
    if bounds == "small":
        assert merged._count().dropped > 8


def test_counts_that_were_read_merge_into_new_ones(small):
    counts = counted(*anomaly_maps(8, 10), unit=range(8), regions=True)
    counts.compute()  # empties the buffer
    merged = PixelMetrics(regions=True)
    merged.merge(counts)
    assert everything(merged) == everything(counts)


def test_merged_counts_share_nothing(small):
    score_NYX, truth_NYX = anomaly_maps(8, 10)
    first, second = counted(score_NYX[:4], truth_NYX[:4]), PixelMetrics()
    second.merge(first)
    expected = first.compute()
    second.update(score_NYX[4:], truth_NYX[4:])
    second.compute()
    assert first.compute() == expected
    assert second.compute() == counted(score_NYX, truth_NYX).compute()


@pytest.mark.parametrize("bounds", ["small", "usual"])
def test_counts_merged_with_themselves_keep_their_shares(bounds, request):
    if bounds == "small":
        request.getfixturevalue("small")
    score_NYX, truth_NYX = anomaly_maps(8, 10)
    counts = counted(score_NYX, truth_NYX, unit=range(8))
    expected = counts.compute()
    counts.merge(counts)
    assert counts.compute() == expected
    assert counts._pixels == 2 * score_NYX.size


def test_categories_merge_to_the_pooled_number():
    score_NYX, truth_NYX = anomaly_maps(12, 10)
    categories = {name: counted(score_NYX[i::3], truth_NYX[i::3]) for i, name in enumerate(["a", "b", "c"])}
    pooled = PixelMetrics()
    for counts in categories.values():
        pooled.merge(counts)
    assert pooled.compute() == exact(score_NYX, truth_NYX)
    assert categories["b"].compute() == exact(score_NYX[1::3], truth_NYX[1::3])


@pytest.mark.parametrize(
    ("other", "sentence"),
    [
        (PixelMetrics(regions=True), "same regions and without_mask"),
        (PixelMetrics(without_mask="normal"), "same regions and without_mask"),
        (counted(*anomaly_maps(2, 9)), "unit must be given with every batch or with none"),
        (counted(*anomaly_maps(2, 9), unit=["a", "b"]), "numbers in every batch or names in every batch"),
    ],
)
def test_unlike_counts_do_not_merge(other, sentence):
    counts = counted(*anomaly_maps(4, 9), unit=[0, 1, 2, 3])
    expected = everything(counts)
    with pytest.raises(ValueError, match=sentence):
        counts.merge(other)
    assert everything(counts) == expected


# --- Where -----------------------------------------------------------------------------------------------------------


def maps_and_where(n=12, side=10, *, all_left_out=()):
    """Maps with pixels that do not count, among them the highest and the lowest scores."""
    score_NYX, truth_NYX = anomaly_maps(n, side)
    where_NYX = np.random.default_rng(7).random(truth_NYX.shape) < np.linspace(0.2, 0.9, n)[:, None, None]
    where_NYX[list(all_left_out)] = False
    score_NYX[~where_NYX] *= 1000
    return score_NYX, truth_NYX, where_NYX


def test_where_equals_masking_by_hand():
    score_NYX, truth_NYX, where_NYX = maps_and_where(all_left_out=[0, 1, 8])
    counts = counted(score_NYX, truth_NYX, batch=2, where=where_NYX)
    expected = exact(score_NYX[where_NYX], truth_NYX[where_NYX], threshold=0.5)
    assert counts.compute(threshold=0.5) == expected
    assert expected != exact(score_NYX, truth_NYX, threshold=0.5)
    assert counts.images == 12
    nowhere = counted(score_NYX, truth_NYX, where=np.zeros_like(truth_NYX))
    with pytest.raises(ValueError, match="both classes, got 0 positives and 0 negatives"):
        nowhere.compute()
    assert counted(score_NYX, truth_NYX, where=np.ones_like(truth_NYX)).compute() == exact(score_NYX, truth_NYX)


@pytest.mark.parametrize("bounds", ["small", "usual"])
def test_where_equals_one_image_per_pixel_that_counts(bounds, request):
    if bounds == "small":
        request.getfixturevalue("small")
    score_NYX, truth_NYX, where_NYX = maps_and_where(24, all_left_out=[0, 9])
    clip_N = np.arange(24) // 3
    clip_NYX = np.broadcast_to(clip_N[:, None, None], where_NYX.shape)
    found = counted(score_NYX, truth_NYX, batch=5, unit=clip_N, where=where_NYX)
    chosen = score_NYX[where_NYX], truth_NYX[where_NYX]
    assert everything(found)[:2] == everything(counted(*chosen, batch=300, unit=clip_NYX[where_NYX]))[:2]
    assert (found._count().dropped > 0) == (bounds == "small")


@pytest.mark.parametrize("as_kind", [np.asfortranarray, torch.from_numpy])
def test_where_and_images_without_a_mask(as_kind):
    score_NYX, truth_NYX, where_NYX = maps_and_where(6)
    truth_NYX[[1, 4]] = False
    masks = [None if image in (1, 4) else mask_YX for image, mask_YX in enumerate(truth_NYX)]
    left_out, normal = PixelMetrics(), PixelMetrics(without_mask="normal")
    for counts in (left_out, normal):
        counts.update(as_kind(score_NYX), masks, unit=list("abcdef"), where=as_kind(where_NYX))
    known_NYX = where_NYX.copy()
    known_NYX[[1, 4]] = False
    assert left_out.compute() == exact(score_NYX[known_NYX], truth_NYX[known_NYX])
    assert normal.compute() == exact(score_NYX[where_NYX], truth_NYX[where_NYX])
    assert left_out.images == 4
    assert left_out.intervals(seed=0, resamples=100)["auroc"].n == 4


def test_where_takes_one_score_per_image():
    score_N, truth_N, where_N = np.arange(6.0), np.arange(6) % 3 == 1, np.arange(6) != 4
    counts = PixelMetrics()
    counts.update(score_N, truth_N, unit=range(6), where=where_N)
    assert counts.compute() == exact(score_N[where_N].astype(np.float32), truth_N[where_N])
    assert counts.intervals(seed=0, resamples=100)["auroc"].n == 6


def test_units_without_pixels_are_resampled_as_in_the_pixel_module():
    score_NYX, truth_NYX, where_NYX = maps_and_where(all_left_out=[0, 5, 11])
    score_NYX[[4, 10]] *= 5  # the highest scores are those of units before ones without any
    counts = counted(score_NYX, truth_NYX, batch=1, unit=range(12), where=where_NYX)
    found = counts.intervals(seed=5, resamples=200)
    expected = auroc_interval(score_NYX, truth_NYX, where_NP=where_NYX, seed=5, resamples=200)
    assert asdict(found["auroc"]) == pytest.approx(asdict(expected), abs=1e-5)
    assert expected.n == 12
    slow = slow_resamples(score_NYX, truth_NYX, range(12), where_NYX=where_NYX, seed=5, resamples=200)
    for name, interval in found.items():
        low, high = np.quantile(slow[name], [0.025, 0.975])
        assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6)), name


@pytest.mark.parametrize("bounds", ["small", "usual"])
def test_where_and_merging_in_any_order(bounds, request):
    if bounds == "small":
        request.getfixturevalue("small")
    score_NYX, truth_NYX, where_NYX = maps_and_where(30, all_left_out=[0, 1, 2, 20, 29])
    clip = [f"clip {image // 2}" for image in range(30)]
    expected = everything(counted(score_NYX, truth_NYX, batch=30, unit=clip, where=where_NYX))
    order = np.random.default_rng(3).permutation(30)
    merged = PixelMetrics()
    for group in ([0, 1], *np.split(order[~np.isin(order, [0, 1])], [9, 15])):  # nothing counts in the first
        part = counted(
            score_NYX[group], truth_NYX[group], batch=4, unit=[clip[i] for i in group], where=where_NYX[group]
        )
        merged.merge(part)
    assert everything(merged) == expected


def test_a_batch_of_which_nothing_counts_still_has_units():
    score_NYX, truth_NYX = anomaly_maps(4, 9)
    nowhere = np.zeros_like(truth_NYX)
    with_units, without = (counted(score_NYX, truth_NYX, unit=unit, where=nowhere) for unit in (range(4), None))
    with pytest.raises(ValueError, match="unit must be given with every batch or with none"):
        with_units.update(score_NYX, truth_NYX)
    with pytest.raises(ValueError, match="unit must be given with every batch or with none"):
        without.update(score_NYX, truth_NYX, unit=range(4))
    with pytest.raises(ValueError, match="unit must be given with every batch or with none"):
        with_units.merge(without)
    with pytest.raises(ValueError, match="numbers in every batch or names in every batch"):
        with_units.update(score_NYX, truth_NYX, unit=list("abcd"))
    with_units.update(score_NYX, truth_NYX, unit=range(4))
    assert everything(with_units)[:2] == everything(counted(score_NYX, truth_NYX, unit=range(4)))[:2]


@pytest.mark.parametrize(
    ("where", "sentence"),
    [
        (
            np.ones((3, 9, 8), dtype=bool),
            r"^where must be boolean of shape \(3, 9, 9\), got bool of shape \(3, 9, 8\)\.$",
        ),
        (np.ones((3, 1, 1), dtype=bool), r"where must be boolean of shape \(3, 9, 9\), got bool of shape \(3, 1, 1\)"),
        (torch.ones(3, dtype=torch.bool), r"where must be boolean of shape \(3, 9, 9\), got bool of shape \(3,\)"),
        (np.ones((3, 9, 9), dtype=np.uint8), r"where must be boolean of shape \(3, 9, 9\), got uint8 of shape"),
    ],
)
def test_a_bad_where_is_refused_and_changes_nothing(where, sentence):
    counts = counted(*anomaly_maps(4, 9), unit=[4, 3, 2, 1])
    expected = everything(counts)
    with pytest.raises(ValueError, match=sentence):
        counts.update(*anomaly_maps(3, 9), unit=[1, 2, 5], where=where)
    assert everything(counts) == expected


def test_where_and_regions_do_not_go_together():
    score_NYX, truth_NYX = anomaly_maps(4, 9)
    counts = counted(score_NYX, truth_NYX, unit=range(4), regions=True)
    expected = everything(counts)
    with pytest.raises(
        ValueError, match=r"^where cannot be given with regions=True, because a region counts with all its"
    ):
        counts.update(score_NYX, truth_NYX, unit=range(4), where=np.ones_like(truth_NYX))
    assert everything(counts) == expected


# --- Masks and bad input ---------------------------------------------------------------------------------------------


def test_images_without_a_mask_are_left_out_or_normal():
    score_NYX, truth_NYX = anomaly_maps(6, 9, seed=1)
    truth_NYX[[1, 4]] = False
    masks = [None if image in (1, 4) else mask_YX for image, mask_YX in enumerate(truth_NYX)]
    left_out, normal = PixelMetrics(), PixelMetrics(without_mask="normal")
    for counts in (left_out, normal):
        counts.update(score_NYX[:4], masks[:4], unit=[1, 2, 3, 4])
        counts.update(torch.from_numpy(score_NYX[4:]), [None, torch.from_numpy(truth_NYX[5])], unit=[5, 6])
    assert left_out.compute() == exact(score_NYX[[0, 2, 3, 5]], truth_NYX[[0, 2, 3, 5]])
    assert normal.compute() == exact(score_NYX, truth_NYX)
    assert left_out.images == 4
    assert normal.images == 6
    assert left_out.intervals(seed=0, resamples=100)["auroc"].n == 4
    assert normal.intervals(seed=0, resamples=100)["auroc"].n == 6


def test_a_batch_without_any_mask_is_left_out():
    counts = counted(*anomaly_maps(4, 9))
    expected = counts.compute()
    counts.update(np.zeros((2, 9, 9)), [None, None])
    assert (counts.compute(), counts.images) == (expected, 4)


def bad_batches():
    score_NYX, truth_NYX = anomaly_maps(3, 9, seed=5)
    for value in (np.nan, np.inf, -np.inf):
        broken_NYX = score_NYX.copy()
        broken_NYX[1, 2, 3] = value
        yield broken_NYX, truth_NYX, [1, 2, 3], r"^score must be finite, got 1 NaN or infinite values\.$"
    yield score_NYX.astype(np.float64) * 1e300, truth_NYX, [1, 2, 3], "score must be finite"
    yield score_NYX, truth_NYX.astype(np.uint8), [1, 2, 3], r"truth must be boolean \(for a mask: mask > 0\), got uint8"
    yield score_NYX, truth_NYX[:, :8], [1, 2, 3], r"same shape, got \(3, 9, 9\) and \(3, 8, 9\)"
    yield score_NYX, [None, None], [1, 2, 3], "one mask or None per image, got 2 for 3 images"
    yield score_NYX, truth_NYX, None, "unit must be given with every batch or with none"
    yield score_NYX, truth_NYX, ["1", "2", "3"], "numbers in every batch or names in every batch"
    yield score_NYX, truth_NYX, [1, 2], r"unit must hold one whole number or name per image, got int64 of shape \(2,\)"
    yield score_NYX, truth_NYX, torch.rand(3), "unit must hold one whole number or name per image, got float32"
    yield score_NYX.reshape(3, -1), truth_NYX.reshape(3, -1), [1, 2, 3], "regions need masks of shape"


@pytest.mark.parametrize(("score", "truth", "unit", "sentence"), list(bad_batches()))
def test_a_bad_batch_is_refused_and_changes_nothing(score, truth, unit, sentence):
    counts = counted(*anomaly_maps(4, 9), unit=[4, 3, 2, 1], regions=True)
    expected = everything(counts)
    with pytest.raises(ValueError, match=sentence):
        counts.update(score, truth, unit=unit)
    assert everything(counts) == expected


def test_one_class_or_nothing_has_no_measures():
    counts = PixelMetrics()
    with pytest.raises(ValueError, match="both classes, got 0 positives and 0 negatives"):
        counts.compute()
    counts.update(np.arange(4.0), np.zeros(4, dtype=bool), unit=range(4))
    with pytest.raises(ValueError, match="both classes, got 0 positives and 4 negatives"):
        counts.compute()
    with pytest.raises(ValueError, match="both classes, got 0 positives and 4 negatives"):
        counts.intervals(seed=0)


# --- Intervals -------------------------------------------------------------------------------------------------------


def slow_resamples(score_NYX, truth_NYX, unit_N, *, seed, resamples, threshold=None, where_NYX=None):
    """The exact measures of the pixels of every resample, by name of the measure; regions unless there is a where."""
    rng = np.random.default_rng(seed)
    units = sorted(set(unit_N))
    rows = {unit: [i for i, other in enumerate(unit_N) if other == unit] for unit in units}
    found = []
    for _ in range(resamples):
        images = [i for drawn in rng.integers(len(units), size=len(units)) for i in rows[units[drawn]]]
        score, truth = score_NYX[images], truth_NYX[images]
        if where_NYX is not None:
            score, truth = score[where_NYX[images]], truth[where_NYX[images]]
        if truth.any():
            found.append(asdict(exact(score, truth, regions=where_NYX is None, threshold=threshold)))
    return {name: np.array([one[name] for one in found]) for name in found[0] if found[0][name] is not None}


def test_intervals_equal_a_slow_loop():
    score_NYX, truth_NYX = anomaly_maps(12, 10)
    clip = [f"clip {i // 2}" for i in range(12)]
    found = counted(score_NYX, truth_NYX, batch=5, unit=clip[::-1], regions=True)
    found = found.intervals(seed=3, threshold=1.0, resamples=100, level=0.9)
    expected = slow_resamples(score_NYX, truth_NYX, clip[::-1], seed=3, resamples=100, threshold=1.0)
    value = asdict(exact(score_NYX, truth_NYX, regions=True, threshold=1.0))
    assert set(found) == set(expected) == {field.name for field in fields(PixelScores)}
    for name, interval in found.items():
        low, high = np.quantile(expected[name], [0.05, 0.95])
        assert interval.value == pytest.approx(value[name], abs=1e-9), name
        assert (interval.low, interval.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6)), name
        assert interval.n == 6


def test_intervals_of_coarse_counts_are_close_to_a_slow_loop(small, monkeypatch):
    monkeypatch.setattr(histogram, "RESAMPLING_CELLS", 256)
    monkeypatch.setattr(histogram, "MAX_ROWS", 4000)
    score_NYX, truth_NYX = anomaly_maps(24, 16, seed=2)
    counts = counted(score_NYX, truth_NYX, unit=range(24), regions=True)
    found = counts.intervals(seed=3, threshold=1.0, resamples=200)
    assert counts._count().dropped > 8
    expected = slow_resamples(score_NYX, truth_NYX, range(24), seed=3, resamples=200, threshold=1.0)
    for name, interval in found.items():
        low, high = np.quantile(expected[name], [0.025, 0.975])
        tolerance = (0.3 if "threshold" in name else 0.1) * (high - low)
        assert interval.low == pytest.approx(low, abs=tolerance), name
        assert interval.high == pytest.approx(high, abs=tolerance), name


def test_auroc_interval_is_that_of_the_pixel_module():
    score_NYX, truth_NYX = anomaly_maps(40, 8)
    counts = counted(score_NYX, truth_NYX, unit=torch.arange(40))
    found = counts.intervals(seed=5, resamples=200)["auroc"]
    expected = auroc_interval(score_NYX, truth_NYX, seed=5, resamples=200)
    assert asdict(found) == pytest.approx(asdict(expected), abs=1e-5)
    assert asdict(counts.auroc_interval(seed=5, resamples=200)) == pytest.approx(asdict(found), abs=1e-12)


def test_the_auroc_alone_is_that_of_all_measures():
    first_NYX, truth_NYX = anomaly_maps(9, 10)
    truth_NYX[2:] = False  # some resamples lack an anomaly
    truth_NYX[:2, :3, :3] = True
    second_NYX = first_NYX + np.random.default_rng(9).normal(size=first_NYX.shape).astype(np.float32)
    counts = [counted(score_NYX, truth_NYX, unit=range(9), regions=True) for score_NYX in (first_NYX, second_NYX)]
    options = {"seed": 4, "resamples": 200, "level": 0.8}
    alone, among = counts[0].auroc_interval(**options), counts[0].intervals(**options)["auroc"]
    assert asdict(alone) == pytest.approx(asdict(among), abs=1e-12)


def test_resamples_without_an_anomaly_are_left_out():
    score_NYX, truth_NYX = anomaly_maps(4, 9)
    truth_NYX[1:] = False
    truth_NYX[0, :3, :3] = True
    found = counted(score_NYX, truth_NYX, unit=range(4), regions=True).intervals(seed=0, resamples=100)
    expected = slow_resamples(score_NYX, truth_NYX, range(4), seed=0, resamples=100)
    assert len(expected["auroc"]) < 90
    assert found["auroc"].high == pytest.approx(np.quantile(expected["auroc"], 0.975), abs=1e-6)


def test_replicates_of_the_same_units_are_paired():
    """One for each resample, in their order, also where one lacks a class, so that a difference is theirs."""
    score_NYX, truth_NYX = anomaly_maps(6, 9)
    truth_NYX[2:] = False
    truth_NYX[:2, :3, :3] = True
    counts = counted(score_NYX, truth_NYX, unit=range(6), regions=True)
    found = counts.replicates(seed=3, threshold=0.5, resamples=100)
    rng = np.random.default_rng(3)
    lacking = [not (rng.integers(6, size=6) < 2).any() for _ in range(100)]
    assert 0 < sum(lacking) < 50
    expected = slow_resamples(score_NYX, truth_NYX, range(6), seed=3, resamples=100, threshold=0.5)
    assert found.keys() == expected.keys()
    for name, drawn_R in found.items():
        assert np.array_equal(np.isnan(drawn_R), lacking)
        np.testing.assert_allclose(drawn_R[~np.isnan(drawn_R)], expected[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize(
    ("unit", "options", "sentence"),
    [
        (None, {}, "unit must name at least two units to resample, got 0"),
        ([0, 0, 0, 0], {}, "unit must name at least two units to resample, got 1"),
        ([0, 1, 2, 3], {"resamples": 99}, "resamples must be at least 100, got 99"),
        ([0, 1, 2, 3], {"level": 95.0}, "level must lie between 0 and 1, got 95.0"),
    ],
)
def test_intervals_refuse_bad_options(unit, options, sentence):
    counts = counted(*anomaly_maps(4, 9), unit=unit)
    for read in (
        counts.intervals,
        counts.auroc_interval,
        lambda **options: auroc_difference(counts, counts, **options),
    ):
        with pytest.raises(ValueError, match=sentence):
            read(seed=0, **options)


# --- Differences -----------------------------------------------------------------------------------------------------


def test_auroc_difference_equals_a_slow_loop():
    first_NYX, truth_NYX = anomaly_maps(12, 10)
    second_NYX = first_NYX + np.random.default_rng(9).normal(size=first_NYX.shape).astype(np.float32)
    counts = [counted(score_NYX, truth_NYX, unit=range(12), regions=True) for score_NYX in (first_NYX, second_NYX)]
    found = auroc_difference(*counts, seed=3, resamples=100)
    first, second = (
        slow_resamples(score_NYX, truth_NYX, range(12), seed=3, resamples=100)["auroc"]
        for score_NYX in (first_NYX, second_NYX)
    )
    value, other = (exact(score_NYX, truth_NYX).auroc for score_NYX in (first_NYX, second_NYX))
    low, high = np.quantile(first - second, [0.025, 0.975])
    assert found.value == pytest.approx(value - other, abs=1e-9)
    assert (found.low, found.high) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6))
    # What one image does to both scores cancels: pairs tell more than two intervals beside each other.
    alone = counts[0].intervals(seed=3, resamples=100)["auroc"]
    assert found.high - found.low < 0.8 * (alone.high - alone.low)


def test_differences_need_the_same_units_and_truth():
    score_NYX, truth_NYX = anomaly_maps(4, 9)
    counts = counted(score_NYX, truth_NYX, unit=[0, 1, 2, 3])
    other_units = counted(score_NYX, truth_NYX, unit=[0, 1, 2, 4])
    other_truth = counted(score_NYX, truth_NYX[::-1], unit=[0, 1, 2, 3])
    for other in (other_units, other_truth):
        with pytest.raises(ValueError, match="same units with the same truth"):
            auroc_difference(counts, other, seed=0)
    same = counted(score_NYX[::-1], truth_NYX[::-1], unit=[3, 2, 1, 0])
    found = auroc_difference(counts, same, seed=0, resamples=100)
    assert (found.value, found.low, found.high) == (0, 0, 0)


def test_differences_where_units_have_no_pixels():
    score_NYX, truth_NYX, where_NYX = maps_and_where(8, all_left_out=[0, 4])
    other_NYX = score_NYX + np.random.default_rng(9).normal(size=score_NYX.shape).astype(np.float32)
    counts = [counted(maps_NYX, truth_NYX, unit=range(8), where=where_NYX) for maps_NYX in (score_NYX, other_NYX)]
    found = auroc_difference(*counts, seed=3, resamples=100)
    first, second = (
        slow_resamples(maps_NYX, truth_NYX, range(8), where_NYX=where_NYX, seed=3, resamples=100)["auroc"]
        for maps_NYX in (score_NYX, other_NYX)
    )
    low, high = np.quantile(first - second, [0.025, 0.975])
    assert (found.low, found.high, found.n) == (pytest.approx(low, abs=1e-6), pytest.approx(high, abs=1e-6), 8)
    # Twins, of which one or the other is left out: as many pixels, of another unit.
    score_NYX, truth_NYX = (values_NYX[[1, 1, 2]] for values_NYX in (score_NYX, truth_NYX))
    twins = []
    for left_out in (0, 1):
        where_NYX = np.ones_like(truth_NYX)
        where_NYX[left_out] = False
        twins.append(counted(score_NYX, truth_NYX, unit=range(3), where=where_NYX))
    with pytest.raises(ValueError, match="same units with the same truth"):
        auroc_difference(*twins, seed=0)


# --- Memory ----------------------------------------------------------------------------------------------------------


def test_what_is_held_stays_within_its_bounds(small, monkeypatch):
    monkeypatch.setattr(histogram, "MAX_ROWS", 5000)
    rng = np.random.default_rng(0)
    counts = PixelMetrics(regions=True)
    for batch in range(30):
        score_BYX = 0.5 + rng.random((4, 20, 20))
        counts.update(score_BYX, rng.random((4, 20, 20)) < 0.1, unit=range(4 * batch, 4 * batch + 4))
        assert sum(map(len, counts._waiting)) <= streaming.EXACT_PIXELS
        assert len(counts._parts[0].key_T) <= histogram.MAX_ROWS
    found = counts._count()
    assert counts._pixels == found.count_T[found.key_T >> histogram.CLASS_BIT < 2].sum() == 30 * 1600
