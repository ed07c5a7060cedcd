"""Pixel metrics of 10^7 and 10^8 pixels: counts that stream, beside scikit-learn and torchmetrics, which sort.

One pixel in fifty is anomalous; scores are gamma distributed, those of anomalous pixels twice as high in the mean. Ours
adds a million pixels at a time and reads AUROC, average precision and IoU; the peers have one measure each.
"""

import tracemalloc
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from benchmarks import timing
from sklearn.metrics import average_precision_score, roc_auc_score
from torchmetrics.functional.classification import binary_auroc

from expvae.metrics import PixelMetrics, PixelScores
from expvae_book import runs
from expvae_book.recipes import Recipe

PEERS = ("numpy", "scikit-learn", "torchmetrics")
DEVICE = torch.device("cpu")  # whichever device the networks of the other benchmarks run on
OURS = "PixelMetrics: AUROC, average precision, IoU"
SKLEARN = "scikit-learn roc_auc_score"
MILLION = 1_000_000


def scores(pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores [pixels] and truth, the same every time."""
    rng = np.random.default_rng(0)
    truth = rng.random(pixels, dtype=np.float32) < 0.02
    score = rng.standard_gamma(2, pixels, dtype=np.float32)
    score[truth] *= 2
    return score, truth


def ours(score: np.ndarray, truth: np.ndarray) -> PixelScores:
    counts = PixelMetrics()
    for start in range(0, len(score), MILLION):
        chunk = slice(start, start + MILLION)
        counts.update(score[chunk].reshape(-1, 100, 100), truth[chunk].reshape(-1, 100, 100))
    return counts.compute()


def measure(_x_NYX: torch.Tensor, _recipe: Recipe, _device: torch.device, rounds: int) -> list[dict]:
    """Seconds, the ratios to ours, how far the AUROCs are apart, and the memory that ours takes; all on the CPU."""
    rows = []
    for pixels in (10 * MILLION, 100 * MILLION):
        score, truth = scores(pixels)
        ways = {OURS: partial(ours, score, truth), SKLEARN: partial(roc_auc_score, truth, score)}
        if pixels == 10 * MILLION:
            ways["scikit-learn average_precision_score"] = partial(average_precision_score, truth, score)
            ways["torchmetrics binary_auroc"] = partial(binary_auroc, torch.from_numpy(score), torch.from_numpy(truth))
        subset = f"{pixels:.0e} pixels".replace("+0", "")
        rows += _compare(ways, subset, rounds)
        difference = abs(ours(score, truth).auroc - roc_auc_score(truth, score))
        rows.append(runs.row("AUROC difference", difference, f"{OURS} − {SKLEARN}", subset))
    tracemalloc.start()
    ours(score, truth)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    rows.append(runs.row("peak memory in GB", peak / 1e9, OURS, subset))
    return rows


def _compare(ways: dict[str, Callable[[], object]], subset: str, rounds: int) -> list[dict]:
    rows = timing.rows("seconds", timing.race(ways, rounds, DEVICE), subset)
    ours_s = rows[0]["value"]
    return rows + [runs.row("ratio", row["value"] / ours_s, f"{row['method']} / {OURS}", subset) for row in rows[1:]]
