"""Losses: the evidence lower bound, FactorVAE's total correlation, and the ratio of the attention disentanglement loss.

Suffixes as in expvae.attention; M models side by side.
"""

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional as F


def reconstruction_loss(logits_BCYX: Float[Tensor, "b c y x"], x_BCYX: Float[Tensor, "b c y x"]) -> Float[Tensor, " b"]:
    """Binary cross-entropy -Σ [x log p + (1-x) log(1-p)], p = sigmoid(logits), summed over channels and pixels.

    x has to lie in [0, 1], which is not checked here: a check in every step of a training would wait for the device.
    """
    return F.binary_cross_entropy_with_logits(_wide(logits_BCYX), x_BCYX, reduction="none").flatten(1).sum(1)


def kl_divergence(mu_BI: Float[Tensor, "b i"], logvar_BI: Float[Tensor, "b i"]) -> Float[Tensor, "b i"]:
    """KL(N(μ, σ²) || N(0, 1)) = ½ (μ² + σ² - 1 - log σ²) of each latent, in nats."""
    mu_BI, logvar_BI = _wide(mu_BI), _wide(logvar_BI)
    return 0.5 * (mu_BI.square() + logvar_BI.exp() - 1 - logvar_BI)


def sample_latents(
    mu_BI: Float[Tensor, "b i"], logvar_BI: Float[Tensor, "b i"], generator: torch.Generator
) -> Float[Tensor, "b i"]:
    """Draw z = μ + σ ε with ε ~ N(0, I) from a generator on any device (the reparametrisation of Kingma & Welling).

    A generator on the CPU gives the same noise whatever the device of the latents is; one on theirs spares the copy.
    """
    noise_BI = torch.randn(mu_BI.shape, generator=generator, device=generator.device).to(mu_BI.device)
    return mu_BI + (0.5 * logvar_BI).exp() * noise_BI


def elbo_terms(
    model: Any, x_BCYX: Float[Tensor, "b c y x"], generator: torch.Generator
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """The two terms of the negative ELBO of each image, with one sample of z.

    -ELBO(x) = -log p(x|z) + KL(q(z|x) || N(0, I)),  z ~ q(z|x).

    Args:
        model: A module with encode(x) -> (mu, logvar) and decode(z) -> logits; or, where the module has a function
            reconstruction_loss(y, x) of its own, decode(z) -> y, the pixels themselves.
        x_BCYX: Images in [0, 1].
        generator: Source of the noise.

    Returns:
        Reconstruction loss of each image, in nats unless it is the model's own, and its KL divergence in nats.
    """
    mu_BI, logvar_BI = model.encode(x_BCYX)
    decoded_BCYX = model.decode(sample_latents(mu_BI, logvar_BI, generator))
    loss = getattr(model, "reconstruction_loss", reconstruction_loss)
    return loss(decoded_BCYX, x_BCYX), kl_divergence(mu_BI, logvar_BI).sum(1)


def total_correlation(logits_MB2: Float[Tensor, "m b 2"]) -> Float[Tensor, " m"]:
    """E_q(z)[log D(z) - log(1 - D(z))], the discriminator's estimate of TC = KL(q(z) || Π_j q(z_j)).

    That is the difference of its two logits (Kim & Mnih 2018, eq. 3).
    """
    return (logits_MB2[..., 0] - logits_MB2[..., 1]).mean(1)


def discriminator_loss(joint_MB2: Float[Tensor, "m b 2"], permuted_MB2: Float[Tensor, "m b 2"]) -> Float[Tensor, " m"]:
    """½ (cross-entropy of "joint" for z from q(z) + cross-entropy of "permuted" for z from Π_j q(z_j))."""
    joint_M = F.softplus(joint_MB2[..., 1] - joint_MB2[..., 0]).mean(1)
    return 0.5 * (joint_M + F.softplus(permuted_MB2[..., 0] - permuted_MB2[..., 1]).mean(1))


def permute_latents(z_MBI: Float[Tensor, "m b i"], order_MBI: Int64[Tensor, "m b i"]) -> Float[Tensor, "m b i"]:
    """Reorder each latent over the batch by itself: from draws of q(z) to draws of Π_j q(z_j) (Kim & Mnih, Alg. 1)."""
    return z_MBI.gather(1, order_MBI)


def overlap(first: Float[Tensor, "... h w"], second: Float[Tensor, "... h w"]) -> Float[Tensor, "..."]:
    """The AD ratio of two non-negative maps, L_AD = 2 Σ min(A¹, A²) / Σ (A¹ + A²), between 0 and 1.

    1 where the maps are equal, 0 where they are apart or where both are zero (Liu et al. 2020, eq. 6).
    """
    total = (first + second).sum((-2, -1))
    return 2 * torch.minimum(first, second).sum((-2, -1)) / torch.where(total > 0, total, 1.0)


def _wide(values: Tensor) -> Tensor:
    """At least float32: half precision would leave a sum over many pixels or latents two digits."""
    return values.to(torch.promote_types(values.dtype, torch.float32))
