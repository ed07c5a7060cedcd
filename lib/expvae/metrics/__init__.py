"""Measures of maps, scores and latents: NumPy arrays or tensors in, plain numbers out."""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from expvae.metrics._bootstrap import Interval as Interval
    from expvae.metrics._bootstrap import percentile_interval as percentile_interval
    from expvae.metrics._bootstrap import resampled_weights as resampled_weights
    from expvae.metrics._disentanglement import PUBLISHED as PUBLISHED
    from expvae.metrics._disentanglement import REFERENCE as REFERENCE
    from expvae.metrics._disentanglement import Protocol as Protocol
    from expvae.metrics._disentanglement import active_by_kl as active_by_kl
    from expvae.metrics._disentanglement import active_by_variance as active_by_variance
    from expvae.metrics._disentanglement import dci as dci
    from expvae.metrics._disentanglement import draw_votes as draw_votes
    from expvae.metrics._disentanglement import factor_vae_metric as factor_vae_metric
    from expvae.metrics._disentanglement import mutual_information_gap as mutual_information_gap
    from expvae.metrics._disentanglement import name_latents as name_latents
    from expvae.metrics._disentanglement import perfect_code as perfect_code
    from expvae.metrics._disentanglement import total_correlation as total_correlation
    from expvae.metrics._inputs import Array as Array
    from expvae.metrics._inputs import as_array as as_array
    from expvae.metrics._iou import CONVENTIONS as CONVENTIONS
    from expvae.metrics._iou import confusion as confusion
    from expvae.metrics._iou import iou_intervals as iou_intervals
    from expvae.metrics._iou import ious as ious
    from expvae.metrics._iou import thresholds as thresholds
    from expvae.metrics._latent import active_units as active_units
    from expvae.metrics._pixel import auroc as auroc
    from expvae.metrics._pixel import auroc_interval as auroc_interval
    from expvae.metrics._pixel import auroc_per_image as auroc_per_image
    from expvae.metrics._pixel import fraction_interval as fraction_interval
    from expvae.metrics._segmentation import PixelScores as PixelScores
    from expvae.metrics._streaming import PixelMetrics as PixelMetrics
    from expvae.metrics._streaming import auroc_difference as auroc_difference
    from expvae.metrics._streaming import difference_intervals as difference_intervals

__getattr__, __all__ = attach(
    __name__,
    {
        "_bootstrap": ["Interval", "percentile_interval", "resampled_weights"],
        "_disentanglement": [
            "PUBLISHED",
            "REFERENCE",
            "Protocol",
            "active_by_kl",
            "active_by_variance",
            "dci",
            "draw_votes",
            "factor_vae_metric",
            "mutual_information_gap",
            "name_latents",
            "perfect_code",
            "total_correlation",
        ],
        "_inputs": ["Array", "as_array"],
        "_iou": ["CONVENTIONS", "confusion", "iou_intervals", "ious", "thresholds"],
        "_latent": ["active_units"],
        "_pixel": ["auroc", "auroc_interval", "auroc_per_image", "fraction_interval"],
        "_segmentation": ["PixelScores"],
        "_streaming": ["PixelMetrics", "auroc_difference", "difference_intervals"],
    },
)
