"""What a VAE's latents carry."""

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor

ROUNDING = 8  # steps of the type in which values may differ that rounding alone has set apart


def active_units(mu_NI: Float[Tensor, "n i"], threshold: float = 0.01) -> int:
    """Number of latents whose posterior mean varies over the data: #{i : Var_n(μ_ni) > threshold}.

    A latent that does not vary is ignored by the decoder, and attention to it explains nothing (Burda, Grosse &
    Salakhutdinov, Importance Weighted Autoencoders, 2016, with the same threshold). What rounding alone has set apart
    does not vary.

    Raises:
        ValueError: If there are fewer than two images.
    """
    if len(mu_NI) < 2:
        raise ValueError(f"mu_NI holds {len(mu_NI)} image; the variance over the data needs two or more")
    return int(((torch.var(mu_NI, dim=0) > threshold) & varying(mu_NI)).sum())


def varying(mu_NI: Num[Tensor, "n i"], bins: int = 1) -> Bool[Tensor, " i"]:
    """Latents that differ between points by more than rounding, and have room for so many bins in double precision."""
    low_I, high_I = mu_NI.amin(dim=0).double(), mu_NI.amax(dim=0).double()
    step = torch.finfo(mu_NI.dtype).eps if mu_NI.is_floating_point() else 0.0
    relative = max(ROUNDING * step, 4 * bins * torch.finfo(torch.float64).eps)
    return high_I - low_I > relative * torch.maximum(low_I.abs(), high_I.abs())
