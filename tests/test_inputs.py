"""What measures take: values that an array holds all of, and nothing that is lost on the way."""

import numpy as np
import pandas as pd
import pytest
import torch

from expvae.metrics import (
    PixelMetrics,
    active_by_kl,
    active_by_variance,
    auroc,
    auroc_interval,
    auroc_per_image,
    confusion,
    dci,
    fraction_interval,
    mutual_information_gap,
    thresholds,
)

SCORE = np.array([[0.1, 0.9, 0.2, 0.8], [0.3, 0.7, 0.4, 0.6]])
TRUTH = np.array([[False, True, False, True], [False, True, True, False]])
MASK = np.array([[True, False, False, False], [False, False, False, True]])
MASKED, MASKED_TRUTH = np.ma.array(SCORE, mask=MASK), np.ma.array(TRUTH, mask=MASK)
GENERATOR = torch.Generator()


@pytest.mark.parametrize(
    "measure",
    [
        lambda: auroc(MASKED, TRUTH),
        lambda: auroc(SCORE, MASKED_TRUTH),
        lambda: auroc_interval(MASKED, TRUTH, seed=0),
        lambda: auroc_per_image(MASKED, TRUTH),
        lambda: auroc_per_image(SCORE, TRUTH, where_NP=MASKED_TRUTH),
        lambda: thresholds(MASKED),
        lambda: confusion(MASKED, TRUTH, np.array([0.5])),
        lambda: fraction_interval(MASKED_TRUTH[0]),
        lambda: PixelMetrics().update(MASKED, TRUTH),
        lambda: PixelMetrics().update(SCORE, [TRUTH[0], MASKED_TRUTH[1]]),
        lambda: PixelMetrics().update(SCORE, TRUTH, where=MASKED_TRUTH),
        lambda: PixelMetrics().update(SCORE, TRUTH, unit=np.ma.array([1, 2], mask=[True, False])),
        lambda: active_by_kl(MASKED),
        lambda: active_by_variance(MASKED),
        lambda: mutual_information_gap(MASKED, (2,), generator=GENERATOR),
        lambda: dci(np.ma.array(np.eye(4), mask=np.eye(4)), (2, 2), train=2, held_out=2, generator=GENERATOR),
    ],
)
def test_masked_values_are_refused(measure):
    with pytest.raises(ValueError, match="masked values would count as if they were not; give plain arrays"):
        measure()


def test_where_says_what_a_mask_said():
    expected = [auroc(SCORE[image][~MASK[image]], TRUTH[image][~MASK[image]]) for image in range(2)]
    np.testing.assert_allclose(auroc_per_image(SCORE, TRUTH, where_NP=~MASK), expected)


def test_masked_arrays_that_mask_nothing_lose_nothing():
    assert auroc(np.ma.array(SCORE), np.ma.array(TRUTH)) == auroc(SCORE, TRUTH)


def test_missing_values_of_pandas_are_refused():
    score = pd.array([0.1, None, 0.2, 0.8], dtype="Float64").to_numpy(dtype=object)
    for measure in (auroc, auroc_per_image):
        with pytest.raises(ValueError, match="score must hold real numbers, got object"):
            measure(score, TRUTH[0])
