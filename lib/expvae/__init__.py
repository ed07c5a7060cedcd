"""Gradient attention for any VAE encoder, with the losses, models and metrics of the book that it comes from.

    from expvae import attention
    result = attention(vae.encode, "encoder.conv2", x_BCYX, "liu2020_paper")

`expvae.metrics` measures how well maps find anomalies and how far latents are disentangled; `expvae.models` has the
networks of the book.
"""

from typing import TYPE_CHECKING

from ._lazy import attach

if __name__ != "expvae":
    raise ImportError(f"import this package as expvae, not as {__name__}: a second copy would have classes of its own")

if TYPE_CHECKING:
    from expvae._attention import (
        PRESETS as PRESETS,
        Attention as Attention,
        Channels as Channels,
        Method as Method,
        TensorChoice as TensorChoice,
        attention as attention,
        attentions as attentions,
        upsample as upsample,
    )
    from expvae._encoder import Score as Score
    from expvae._gradcam import LatentGradCAM as LatentGradCAM
    from expvae._gradients import RMS_EPSILON as RMS_EPSILON, Normaliser as Normaliser
    from expvae._input_attention import gradient_times_input as gradient_times_input
    from expvae._losses import (
        discriminator_loss as discriminator_loss,
        elbo_terms as elbo_terms,
        kl_divergence as kl_divergence,
        overlap as overlap,
        permute_latents as permute_latents,
        reconstruction_loss as reconstruction_loss,
        sample_latents as sample_latents,
        total_correlation as total_correlation,
    )

__getattr__, __all__ = attach(
    __name__,
    {
        "_attention": [
            "PRESETS",
            "Attention",
            "Channels",
            "Method",
            "TensorChoice",
            "attention",
            "attentions",
            "upsample",
        ],
        "_encoder": ["Score"],
        "_gradcam": ["LatentGradCAM"],
        "_gradients": ["RMS_EPSILON", "Normaliser"],
        "_input_attention": ["gradient_times_input"],
        "_losses": [
            "discriminator_loss",
            "elbo_terms",
            "kl_divergence",
            "overlap",
            "permute_latents",
            "reconstruction_loss",
            "sample_latents",
            "total_correlation",
        ],
    },
    subpackages=("metrics", "models"),
)
