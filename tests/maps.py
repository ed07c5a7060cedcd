"""Scores with their truth, and their measures from a count per score, for the tests of the pixel metrics."""

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from expvae.metrics._inputs import with_masks
from expvae.metrics._segmentation import from_counts, region_sizes


@st.composite
def tied_scores(draw):
    """Scores of any shape that share few values, some of them next to 0, and a truth of both classes."""
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=3, max_side=6).filter(lambda shape: np.prod(shape) >= 2))
    values = st.sampled_from([-2.0, -0.0, 0.0, 1e-300, 1e-30, 0.5, 3.0])
    scores = draw(hnp.arrays(np.float64, shape, elements=values))
    truth = draw(hnp.arrays(bool, shape).filter(lambda truth: truth.any() and not truth.all()))
    return scores, truth


def anomaly_maps(n, side, *, seed=0, levels=None):
    """Maps of n images that differ in level, with square anomalies that score higher."""
    rng = np.random.default_rng(seed)
    truth_NYX = np.zeros((n, side, side), dtype=bool)
    for truth_YX in truth_NYX:
        for y, x, size in rng.integers([0, 0, 1], [side, side, side // 3], size=(rng.integers(4), 3)):
            truth_YX[y : y + size, x : x + size] = True
    score_NYX = rng.normal(size=truth_NYX.shape) + truth_NYX + 0.3 * rng.normal(size=(n, 1, 1))
    if levels:
        score_NYX = np.round(score_NYX * levels) / levels
    return score_NYX.astype(np.float32), truth_NYX


def exact(score_NYX, truth_NYX, *, regions=False, threshold=None, without_mask="leave out"):
    """The exact twin of `PixelMetrics`: all measures of the pixels of all images pooled, scores unrounded."""
    score_NYX, truth_NYX, _ = with_masks(score_NYX, truth_NYX, without_mask)
    # Thresholds take the type of the scores, which integers and half precision would spoil.
    score_K, cell = np.unique(score_NYX.astype(np.result_type(score_NYX, np.float32)), return_inverse=True)
    cell, truth = cell.ravel(), truth_NYX.ravel()
    region_K = None
    if regions:
        region_K = np.bincount(cell[truth], weights=1 / region_sizes(truth_NYX), minlength=len(score_K))
    return from_counts(
        score_K,
        np.bincount(cell[~truth], minlength=len(score_K)),
        np.bincount(cell[truth], minlength=len(score_K)),
        region_K,
        threshold=threshold,
    )
