"""What each choice in making an attention map is worth: one choice changed at a time, the trained model kept as it is.

From a reference method every choice of `expvae.Method` is changed alone, and the method is replaced as a whole
by each other preset. A change is judged by what it does to the pixel AUROC and to the best IoU of the same test images:

    Δ = measure(changed) − measure(reference)

with percentile bootstrap intervals. Whole units (images; of a video its clips) are drawn with replacement, the
reference and every change see the same resamples, and the difference is taken within each resample.

Suffixes as in expvae.attention, and N test images, M those of them that are measured, R resamples, the first of which
is the sample itself.
"""

from dataclasses import replace
from typing import Any, get_args

import numpy as np
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from expvae import PRESETS, Channels, Method, Normaliser, TensorChoice
from expvae.metrics import PixelMetrics, percentile_interval
from expvae_book import explanation, names, runs

REFERENCES = ("liu2020_paper", "liu2020_code")  # what the second report compares
# Not `aggregate`: a sum is a multiple of the mean, which no measure here can tell from it.
CHOICES = {
    "channels": get_args(Channels),
    "normaliser": get_args(Normaliser),
    "score": ("each_mean", "sum_of_means", "each_sample", "normal_difference"),  # the published ones
    "tensor": get_args(TensorChoice),
    "align_corners": (False, True),
}
AUROC, IOU = names.AUROC, names.BEST_IOU
MEASURES = {AUROC: "auroc", IOU: "best_iou"}  # the fields of expvae.metrics.PixelScores


def changes(reference: str, activation: bool = True) -> dict[str, Method]:
    """The methods one choice away from a preset, by names such as "normaliser=batch", and the other presets.

    Args:
        reference: A name in `expvae.PRESETS`.
        activation: Whether an activation follows the layer, which methods need that weigh what comes after it.
    """
    start = PRESETS[reference]
    found = {
        f"{choice}={value}": replace(start, **{choice: value})
        for choice, values in CHOICES.items()
        for value in values
        if value != getattr(start, choice)
    }
    found |= {f"preset={name}": method for name, method in PRESETS.items() if name != reference}
    return {name: method for name, method in found.items() if activation or method.tensor == "before"}


def resampled(
    map_MYX: Float[Tensor, "m y x"],
    truth_MYX: Bool[Tensor, "m y x"],
    unit_M: Int64[Tensor, " m"],
    resamples: int,
    seed: int,
) -> dict[str, Float[np.ndarray, " r"]]:
    """Pixel AUROC and best IoU of the images, which come first, and of every resample of their units.

    With TPR_t and FPR_t the shares of flagged pixels at threshold t, over all scores,

        AUROC = Σ_t (FPR_t − FPR_t+1) (TPR_t + TPR_t+1) / 2    best IoU = max_t TP_t / (P + FP_t)

    Maps of the same units under the same seed see the same resamples. NaN where a resample lacks a class.

    Raises:
        ValueError: If there are fewer than two units, or resamples.
    """
    counts = PixelMetrics()
    counts.update(map_MYX, truth_MYX, unit=unit_M)
    whole, drawn = counts.compute(), counts.replicates(seed=seed, resamples=resamples)
    return {name: np.append(getattr(whole, field), drawn[field]) for name, field in MEASURES.items()}


def rows(
    model: nn.Module,
    layer: str,
    x_NCYX: UInt8[Tensor, "n c y x"],
    truth_MYX: Bool[Tensor, "m y x"],
    unit_M: Int64[Tensor, " m"],
    *,
    measured_N: Bool[Tensor, " n"],
    normal: tuple[Tensor, Tensor],
    batch: int,
    activation: bool,
    resamples: int,
    seed: int,
) -> list[dict]:
    """Rows of each preset's measures, and of what every change makes of them ("pixel AUROC, change").

    Args:
        model: The trained VAE.
        layer: Path of the layer.
        x_NCYX: Test images, in the order of their batches.
        truth_MYX: The anomalous pixels of those that are measured.
        unit_M: What each of these is resampled with.
        measured_N: Which images are measured; the others are there because some methods divide by the whole batch.
        normal: Mean and log-variance of the posterior of normal images.
        batch: Images at a time.
        activation: Whether an activation follows the layer.
        resamples: Number of resamples.
        seed: Fixes noise and resamples.

    Raises:
        ValueError: As `resampled`.
    """
    changed = {name: changes(name, activation) for name in REFERENCES}
    methods = [PRESETS[name] for name in REFERENCES] + [method for each in changed.values() for method in each.values()]
    maps = explanation.explain(
        model, layer, x_NCYX, {method: method for method in methods}, batch=batch, seed=seed, normal=normal
    )
    drawn = {
        method: resampled(map_NYX[measured_N], truth_MYX, unit_M, resamples, seed)
        for method, map_NYX in tqdm(maps.items(), desc="measures", unit="method")
    }
    n = len(unit_M.unique())

    def row(measure: str, value_R: Float[np.ndarray, " r"], method: str, subset: str = "") -> dict:
        interval = percentile_interval(value_R[0], value_R[1:], 0.95, n)
        return runs.row(measure, method=method, subset=subset, **vars(interval))

    of_presets = [
        row(measure, drawn[method][measure], name)
        for name, method in PRESETS.items()
        if method in drawn
        for measure in MEASURES
    ]
    return of_presets + [
        row(f"{measure}, change", drawn[method][measure] - drawn[PRESETS[reference]][measure], name, reference)
        for reference, found in changed.items()
        for name, method in found.items()
        for measure in MEASURES
    ]


def change_rows(*arguments: Any, **options: Any) -> list[dict]:
    """The rows of the changes alone, by which a job answers the ablations; arguments as for `rows`."""
    return [row for row in rows(*arguments, **options) if row["metric"].endswith(", change")]
