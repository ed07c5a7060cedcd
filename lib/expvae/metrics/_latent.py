"""What a VAE's latents carry, measured without knowing the truth: which are active, and how far they depend.

Suffixes: N points, I latents, S samples.
"""

from math import log, sqrt
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Bool, Float, Num, Shaped
from torch import Tensor

from expvae.metrics._bootstrap import Interval
from expvae.metrics._inputs import Array, as_array, require_level

NUMBERS_PER_CHUNK = 2**22  # bounds a temporary array to 32 MB
ROUNDING = 8  # steps of the type in which values may differ that rounding alone has set apart


def active_units(mu_NI: Float[Tensor, "n i"], threshold: float = 0.01) -> int:
    """Number of latents whose posterior mean varies over the data: #{i : Var_n(μ_ni) > threshold}.

    A latent that does not vary is ignored by the decoder, and attention to it explains nothing (Burda, Grosse &
    Salakhutdinov, Importance Weighted Autoencoders, 2016, with the same threshold). What rounding alone has set apart
    does not vary.

    Raises:
        ValueError: If there are fewer than two images.
    """
    return int((varying(mu_NI) & (torch.var(mu_NI, dim=0) > threshold)).sum())


def active_by_kl(kl: Float[Array, "*n i"], threshold: float = 0.01) -> Bool[np.ndarray, " i"]:
    """Latents that have not collapsed to the prior: E_n KL(q(z_i | x_n) ‖ N(0, 1)) > threshold.

    Args:
        kl: Divergences per point and latent, in nats, or their means per latent.
        threshold: 0.01 in the second report, 1e-5 in the code of Brongers et al.

    Raises:
        ValueError: If a divergence is NaN or infinite.
    """
    kl = finite("kl", kl).double()
    return (kl.reshape(-1, kl.shape[-1]).mean(dim=0) > threshold).cpu().numpy()


def active_by_variance(mu_NI: Float[Array, "n i"], threshold: float = 0.05) -> Bool[np.ndarray, " i"]:
    """Latents whose posterior means vary: √Var_n(μ_ni) ≥ threshold.

    The threshold is on the standard deviation, as in disentanglement_lib, whose published scores use 0.05.

    Raises:
        ValueError: If there are fewer than two points or a mean is NaN or infinite.
    """
    mu_NI = finite("mu_NI", mu_NI)
    return (varying(mu_NI) & (mu_NI.double().std(dim=0) >= threshold)).cpu().numpy()


def total_correlation(
    mu_NI: Float[Array, "n i"],
    logvar_NI: Float[Array, "m j"],
    *,
    samples: int,
    generator: torch.Generator,
    level: float = 0.95,
) -> Interval:
    """Total correlation of the aggregate posterior, in nats, by Monte Carlo.

        TC = KL(q(z) ‖ Π_i q(z_i)) = E_{z ~ q} [log q(z) − Σ_i log q(z_i)],
        q(z) = 1/N Σ_n N(z; μ_n, diag σ²_n)

    (Watanabe, 1960; the penalty of Kim & Mnih, 2018, who estimate it with a discriminator.) Points n and then z from
    q(z | n) are drawn `samples` times, and both densities are the full mixtures over the N points given, the drawn one
    included: no discriminator and no minibatch weights. The estimate is unbiased for these N points, and may
    fall below 0 by chance; the interval is the normal one, mean ± z s/√S, for the samples, not for the points.

    For N of many points it is too high. As TC = Σ_i I(n; z_i) − I(n; z) with I(n; z) ≤ log N, too few points cut the
    second term short once the latents could tell more than N points apart. Give all points where the time allows
    (samples · N · I exponentials), or raise N until the value stays.

    Args:
        mu_NI: Posterior means.
        logvar_NI: Logarithms of the posterior variances.
        samples: Number of draws S, at least 2.
        generator: Source of the draws.
        level: Confidence level, between 0 and 1.

    Returns:
        Estimate, its interval, and the number of samples.

    Raises:
        ValueError: If the shapes differ, there is no point, samples is below 2, the level is outside (0, 1), or a mean
            or logarithm is NaN or infinite.
    """
    require_level(level)
    mu_NI, logvar_NI = finite("mu_NI", mu_NI), finite("logvar_NI", logvar_NI)
    require_least(("samples", samples, 2), ("points", len(mu_NI), 1))
    if logvar_NI.shape != mu_NI.shape:
        raise ValueError(f"logvar_NI must have the shape {tuple(mu_NI.shape)}, got {tuple(logvar_NI.shape)}.")
    n, device = len(mu_NI), mu_NI.device
    drawn_S = torch.randint(n, (samples,), generator=generator, device=generator.device).to(device)
    noise_SI = torch.randn(samples, mu_NI.shape[1], generator=generator, device=generator.device, dtype=torch.float64)
    z_SI = mu_NI[drawn_S].double() + (logvar_NI[drawn_S].double() / 2).exp() * noise_SI.to(device)

    mu_IN, logvar_IN = mu_NI.double().T.contiguous(), logvar_NI.double().T.contiguous()
    weight_IN = (-logvar_IN).exp() / -2
    ratio_S = []
    for z_CI in z_SI.split(max(1, NUMBERS_PER_CHUNK // mu_IN.numel())):
        # log N(z_i; μ_n, σ²_n) without its log 2π / 2, which the joint and the product of the marginals share.
        log_CIN = (z_CI[:, :, None] - mu_IN).square_().mul_(weight_IN).sub_(logvar_IN / 2)
        joint_C = log_CIN.sum(dim=1).logsumexp(dim=1)
        ratio_S.append(joint_C - log_CIN.logsumexp(dim=2).sum(dim=1))
    ratio_S = torch.cat(ratio_S) + (mu_NI.shape[1] - 1) * log(n)
    mean = float(ratio_S.mean())
    half_width = NormalDist().inv_cdf((1 + level) / 2) * float(ratio_S.std()) / sqrt(samples)
    return Interval(mean, mean - half_width, mean + half_width, samples)


def varying(mu_NI: Num[Tensor, "n i"], bins: int = 1) -> Bool[Tensor, " i"]:
    """Latents that differ between points by more than rounding, and have room for so many bins in double precision.

    Raises:
        ValueError: If there are fewer than two points.
    """
    if len(mu_NI) < 2:
        raise ValueError(f"mu_NI must hold two points or more to have a variance, got {len(mu_NI)}.")
    low_I, high_I = mu_NI.amin(dim=0).double(), mu_NI.amax(dim=0).double()
    step = torch.finfo(mu_NI.dtype).eps if mu_NI.is_floating_point() else 0.0
    relative = max(ROUNDING * step, 4 * bins * torch.finfo(torch.float64).eps)
    return high_I - low_I > relative * torch.maximum(low_I.abs(), high_I.abs())


def finite(name: str, values: Shaped[Array, "*n"]) -> Shaped[Tensor, "*n"]:
    """The values as a tensor on their device; arrays are copied: torch shares none that is read-only or runs backwards.

    Raises:
        ValueError: If a value is NaN or infinite, or some are masked.
    """
    values = values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(as_array(values), order="C"))
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values.")
    return values


def require_least(*bounds: tuple[str, int, int]) -> None:
    """Raise a ValueError unless every (name, number, least) holds."""
    for name, number, least in bounds:
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}.")
