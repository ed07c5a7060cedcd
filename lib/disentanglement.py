"""One grid of models on dSprites: train them side by side, measure each, draw its figures, store its run."""

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from lib.data import dsprites
from lib.metrics import disentanglement as metrics
from lib.metrics.latent import active_units
from lib.models.dsprites import DSpritesVAE
from lib.training import elbo_terms, hold_out, kl_divergence

BATCH = 512
HELD_OUT = 0.01  # of all images, which no model is trained on
SCHEDULED_STRIDE = 4  # of the lattice on which the metric is taken during training
SCHEDULED_IMAGES = 2048  # held-out images whose reconstruction is measured during training
MEASUREMENTS = 10
SAMPLES = 1000  # of the latents, for the total correlation


def lattice(stride: int) -> tuple[Int64[Tensor, " n"], tuple[int, ...]]:
    """Indices of every combination of all shapes and scales with each `stride`-th orientation and position.

    Returns:
        The indices in ascending order, and how many values each factor has; with stride 1 that is all images.

    Raises:
        ValueError: If the stride is not positive.
    """
    if stride < 1:
        raise ValueError(f"stride={stride} must be 1 or more")
    values = [
        torch.arange(0, size, stride if name in ("orientation", "x", "y") else 1)
        for name, size in zip(dsprites.FACTORS, dsprites.SIZES, strict=True)
    ]
    return dsprites.index_of(torch.cartesian_prod(*values)), tuple(len(part) for part in values)


def split() -> tuple[Int64[Tensor, " train"], Int64[Tensor, " held_out"]]:
    """Indices of the training images and of those held out, the same for every model."""
    return hold_out(dsprites.COUNT, HELD_OUT)


@torch.no_grad()
def encode(
    vae: DSpritesVAE, sprites: dsprites.Sprites, index_N: Int64[Tensor, " n"]
) -> tuple[Float[Tensor, "n i"], Float[Tensor, "n i"]]:
    """Means and log-variances of the posteriors of images, on the CPU."""
    parts = [vae.encode(sprites.images(index_B).float()) for index_B in index_N.to(sprites.pixels.device).split(BATCH)]
    mu_NI, logvar_NI = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    return mu_NI, logvar_NI


@torch.no_grad()
def reconstruction(
    vae: DSpritesVAE, sprites: dsprites.Sprites, index_N: Int64[Tensor, " n"], seed: int = 0
) -> Float[Tensor, " n"]:
    """-log p(x|z) of each image in nats, z ~ q(z|x), with the same noise at every call."""
    generator = torch.Generator().manual_seed(seed)
    parts = [
        elbo_terms(vae, sprites.images(index_B).float(), generator)[0].cpu()
        for index_B in index_N.to(sprites.pixels.device).split(BATCH)
    ]
    return torch.cat(parts)


def scheduled(vae: DSpritesVAE, sprites: dsprites.Sprites) -> dict[str, float]:
    """What is measured while a model is trained: the quick setting of each metric, from one encoding.

    The FactorVAE metric and the total correlation are taken on a coarse lattice of the factors (see `lattice`), the
    reconstruction on a fixed sample of the held-out images.
    """
    index_N, sizes = lattice(SCHEDULED_STRIDE)
    mu_NI, logvar_NI = encode(vae, sprites, index_N)
    generator = torch.Generator().manual_seed(0)
    score = metrics.factor_vae_metric(mu_NI, sizes, metrics.REFERENCE, generator=generator)
    tc = metrics.total_correlation(mu_NI, logvar_NI, samples=SAMPLES, generator=generator)
    return {
        "FactorVAE metric": score.score,
        "total correlation": tc.value,
        "reconstruction": reconstruction(vae, sprites, split()[1][:SCHEDULED_IMAGES]).double().mean().item(),
        "KL": kl_divergence(mu_NI, logvar_NI).sum(1).double().mean().item(),
        "active units": float(active_units(mu_NI)),
    }
