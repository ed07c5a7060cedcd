"""What a VAE's latents carry."""

import torch
from jaxtyping import Float
from torch import Tensor


def active_units(mu_NI: Float[Tensor, "n i"], threshold: float = 0.01) -> int:
    """Number of latents whose posterior mean varies over the data: #{i : Var_n(μ_ni) > threshold}.

    A latent that does not vary is ignored by the decoder, and attention to it explains nothing
    (Burda, Grosse & Salakhutdinov, Importance Weighted Autoencoders, 2016, with the same threshold).

    Raises:
        ValueError: If there are fewer than two images.
    """
    if len(mu_NI) < 2:
        raise ValueError(f"mu_NI holds {len(mu_NI)} image; the variance over the data needs two or more")
    return int((torch.var(mu_NI, dim=0) > threshold).sum())
