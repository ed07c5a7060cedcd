"""Measures of maps, scores and latents: NumPy arrays or tensors in, plain numbers out."""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from expvae.metrics._bootstrap import (
        Interval as Interval,
        percentile_interval as percentile_interval,
        resampled_weights as resampled_weights,
    )
    from expvae.metrics._disentanglement import (
        PUBLISHED as PUBLISHED,
        REFERENCE as REFERENCE,
        Dci as Dci,
        FactorVaeScore as FactorVaeScore,
        Protocol as Protocol,
        dci as dci,
        draw_votes as draw_votes,
        factor_vae_metric as factor_vae_metric,
        mutual_information_gap as mutual_information_gap,
        name_latents as name_latents,
        perfect_code as perfect_code,
    )
    from expvae.metrics._inputs import Array as Array, as_array as as_array
    from expvae.metrics._iou import (
        CONVENTIONS as CONVENTIONS,
        Confusion as Confusion,
        confusion as confusion,
        iou_intervals as iou_intervals,
        ious as ious,
        thresholds as thresholds,
    )
    from expvae.metrics._latent import (
        active_by_kl as active_by_kl,
        active_by_variance as active_by_variance,
        active_units as active_units,
        total_correlation as total_correlation,
    )
    from expvae.metrics._pixel import (
        auroc as auroc,
        auroc_interval as auroc_interval,
        auroc_per_image as auroc_per_image,
        fraction_interval as fraction_interval,
    )
    from expvae.metrics._segmentation import PixelScores as PixelScores
    from expvae.metrics._streaming import PixelMetrics as PixelMetrics, auroc_difference as auroc_difference

__getattr__, __all__ = attach(
    __name__,
    {
        "_bootstrap": ["Interval", "percentile_interval", "resampled_weights"],
        "_disentanglement": [
            "PUBLISHED",
            "REFERENCE",
            "Dci",
            "FactorVaeScore",
            "Protocol",
            "dci",
            "draw_votes",
            "factor_vae_metric",
            "mutual_information_gap",
            "name_latents",
            "perfect_code",
        ],
        "_inputs": ["Array", "as_array"],
        "_iou": ["CONVENTIONS", "Confusion", "confusion", "iou_intervals", "ious", "thresholds"],
        "_latent": ["active_by_kl", "active_by_variance", "active_units", "total_correlation"],
        "_pixel": ["auroc", "auroc_interval", "auroc_per_image", "fraction_interval"],
        "_segmentation": ["PixelScores"],
        "_streaming": ["PixelMetrics", "auroc_difference"],
    },
)
