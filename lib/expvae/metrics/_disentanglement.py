"""How far latents keep the factors of variation apart: the FactorVAE metric, MIG, DCI and the total correlation.

The first three know the truth from the order of their points: latents of every point of a grid of factors, in C order
(the last factor fastest), and the grid's sizes: (1, 3, 6, 40, 32, 32) for dSprites, (1, 3, 6, 20, 16, 16) for a coarser
lattice of it. A factor with one value, such as dSprites' colour, cannot be encoded.

Suffixes: N points, I latents, V votes, L points of a vote, K factors scored, S samples.
"""

from dataclasses import dataclass
from math import log, prod, sqrt
from statistics import NormalDist

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Num, Shaped
from scipy.stats import entropy
from torch import Tensor

from expvae.metrics._bootstrap import Interval
from expvae.metrics._inputs import Array, require_level, require_plain
from expvae.metrics._latent import varying
from expvae.metrics._pixel import fraction_interval

NUMBERS_PER_CHUNK = 2**22  # bounds a temporary array to 32 MB


@dataclass(frozen=True)
class Protocol:
    """How the FactorVAE metric is taken.

    Attributes:
        factors: The factors that votes are held about, as positions in the grid's sizes.
        votes: Number of votes that the majority-vote classifier is learnt from.
        held_out: Number of further votes that it is scored on; 0 scores it on the votes that it learnt from.
        batch: Points of a vote, L.
        balanced: Whether each of K factors gets ⌊votes / K⌋ votes, instead of a random factor for each vote. The score
            still divides by `votes`, as Brongers et al. do, so that 800 votes for six factors lose 2.
    """

    factors: tuple[int, ...]
    votes: int
    held_out: int
    batch: int
    balanced: bool

    def __post_init__(self):
        if not self.factors or min(self.factors) < 0 or len(set(self.factors)) < len(self.factors):
            raise ValueError(f"factors must name at least one factor, each once and from 0 on, got {self.factors}.")
        for name, least in (("votes", len(self.factors) if self.balanced else 1), ("held_out", 0), ("batch", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


# Kim & Mnih (2018) with the settings of Locatello et al. (2019) in disentanglement_lib, whose dSprites has no colour.
REFERENCE = Protocol(factors=(1, 2, 3, 4, 5), votes=10_000, held_out=5_000, batch=64, balanced=False)
# Brongers et al.: the constant colour is a sixth factor, and the classifier is scored on the votes that it learnt from.
PUBLISHED = Protocol(factors=(0, 1, 2, 3, 4, 5), votes=800, held_out=0, batch=100, balanced=True)


@dataclass(frozen=True)
class FactorVaeScore:
    """Result of the FactorVAE metric.

    Attributes:
        interval: The accuracy with Wilson's 95 % interval over its votes: the chance of the draws for these latents,
            not that of another training.
        votes_IK: Training votes by latent and factor (columns as in the protocol's factors); zero for dropped latents.
        active: Number of latents that took part.
    """

    interval: Interval
    votes_IK: Int64[np.ndarray, "i k"]
    active: int

    @property
    def score(self) -> float:
        """The accuracy, in [0, 1]."""
        return self.interval.value

    @property
    def chance(self) -> float:
        """Accuracy of guessing among the factors, 1/K."""
        return 1 / self.votes_IK.shape[1]


@dataclass(frozen=True)
class Mig:
    """Mutual information gaps.

    Attributes:
        score: Mean of the gaps.
        gap_K: Gap of every factor that has more than one value, in [0, 1].
        factors: Which factors these are, as positions in the grid's sizes.
    """

    score: float
    gap_K: Float[np.ndarray, " k"]
    factors: tuple[int, ...]


@dataclass(frozen=True)
class Dci:
    """Disentanglement, completeness and informativeness, each in [0, 1].

    Attributes:
        disentanglement: Whether a latent tells of one factor only.
        completeness: Whether a factor is told by one latent only.
        informativeness: Held-out accuracy of predicting a factor from all latents, mean over factors.
        importance_IK: How much latent i matters for factor k; each column sums to 1, or to 0 where nothing helped.
        factors: Which factors the columns are, as positions in the grid's sizes.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance_IK: Float[np.ndarray, "i k"]
    factors: tuple[int, ...]


def perfect_code(sizes: tuple[int, ...], spare: int, generator: torch.Generator) -> Float[Tensor, "n i"]:
    """Latents of a model without fault: one per factor with more than one value, holding it, then spare noise N(0, 1).

    What a metric says of it is the metric's ceiling.

    Raises:
        ValueError: If no factor has more than one value or spare is negative.
    """
    factors = _varying(sizes)
    if spare < 0:
        raise ValueError(f"spare must be at least 0, got {spare}.")
    point_N = torch.arange(prod(sizes))
    values = [_value(point_N, sizes, factor).float() for factor in factors]
    noise_NI = torch.randn(len(point_N), spare, generator=generator, device=generator.device)
    return torch.cat([torch.stack(values, dim=1), noise_NI.cpu()], dim=1)


def active_by_kl(kl: Float[Array, "*n i"], threshold: float = 0.01) -> Bool[np.ndarray, " i"]:
    """Latents that have not collapsed to the prior: E_n KL(q(z_i | x_n) ‖ N(0, 1)) > threshold.

    Args:
        kl: Divergences per point and latent, in nats, or their means per latent.
        threshold: 0.01 in the second report, 1e-5 in the code of Brongers et al.

    Raises:
        ValueError: If a divergence is NaN or infinite.
    """
    kl = _finite("kl", kl).double()
    return (kl.reshape(-1, kl.shape[-1]).mean(dim=0) > threshold).cpu().numpy()


def active_by_variance(mu_NI: Float[Array, "n i"], threshold: float = 0.05) -> Bool[np.ndarray, " i"]:
    """Latents whose posterior means vary: √Var_n(μ_ni) ≥ threshold.

    The threshold is on the standard deviation, as in disentanglement_lib, whose published scores use 0.05.

    Raises:
        ValueError: If there are fewer than two points or a mean is NaN or infinite.
    """
    if len(mu_NI) < 2:
        raise ValueError(f"mu_NI must hold two points or more to have a variance, got {len(mu_NI)}.")
    mu_NI = _finite("mu_NI", mu_NI)
    return ((mu_NI.double().std(dim=0) >= threshold) & varying(mu_NI)).cpu().numpy()


def factor_vae_metric(
    mu_NI: Float[Array, "n i"],
    sizes: tuple[int, ...],
    protocol: Protocol,
    *,
    active_I: Bool[Array, " j"] | None = None,
    generator: torch.Generator,
) -> FactorVaeScore:
    """The FactorVAE metric: how well the latent that varies least tells which factor was held still.

    A vote holds factor k at one value over L points drawn with replacement, all other factors being random, and names

        d = argmin_i Var_L(μ_i) / Var_N(μ_i)

    over the active latents, Var_N being the variance over the whole grid. The classifier maps d to the factor that it
    was named for most often; the score is its accuracy. (Kim & Mnih, Disentangling by Factorising, 2018.)

    A factor with one value cannot be told by any latent, so that counting it caps the score: a perfect code without
    spare latents has 1.000 by `REFERENCE` and 5 · 133/800 = 0.831 by `PUBLISHED`, where spare latents raise it again.
    Accuracy on the votes that were learnt from is too high by more, the fewer the votes and the more the latents.

    Args:
        mu_NI: Posterior means of every point of the grid, in C order.
        sizes: Number of values of every factor.
        protocol: `REFERENCE`, `PUBLISHED` or another.
        active_I: False for latents to leave out, see `active_by_kl` and `active_by_variance`; all count where nothing
            is said. A latent that is constant over the grid, up to rounding, is always left out, its ratio being 0/0.
            With no latent left the score is 0, as in disentanglement_lib.
        generator: Source of the draws; training votes come first. The same state gives the same score.

    Raises:
        ValueError: If the sizes do not fit the number of points, a factor is outside them, active_I does not fit, or a
            mean is NaN or infinite.
    """
    mu_NI = _grid(mu_NI, sizes)
    active_I = _active(mu_NI, active_I)
    latents, k, scored = mu_NI.shape[1], len(protocol.factors), protocol.held_out or protocol.votes
    index_VL, factor_V = draw_votes(sizes, protocol, protocol.votes, generator)
    held_out_VL, held_out_V = draw_votes(sizes, protocol, protocol.held_out, generator)
    if not active_I.any():
        return FactorVaeScore(_accuracy(0, scored), np.zeros((latents, k), dtype=np.int64), 0)

    latent_V = name_latents(mu_NI, np.concatenate([index_VL, held_out_VL]), active_I)
    cell_V = latent_V * k + np.concatenate([factor_V, held_out_V])
    train, test = cell_V[: len(factor_V)], cell_V[len(factor_V) :]
    votes_IK, test_IK = (np.bincount(cells, minlength=latents * k).reshape(latents, k) for cells in (train, test))
    scored_IK = test_IK if protocol.held_out else votes_IK
    hits = int(scored_IK[np.arange(latents), votes_IK.argmax(axis=1)].sum())
    return FactorVaeScore(_accuracy(hits, scored), votes_IK, int(active_I.sum()))


def draw_votes(
    sizes: tuple[int, ...], protocol: Protocol, votes: int, generator: torch.Generator
) -> tuple[Int64[np.ndarray, "v l"], Int64[np.ndarray, " v"]]:
    """Points of every vote and the factor that it holds still.

    L points are drawn from the whole grid with replacement, then all take the first one's value of the factor.

    Args:
        sizes: Number of values of every factor.
        protocol: Its factors, points per vote and way of choosing the factor; its number of votes is not used.
        votes: Number of votes; with a balanced protocol it is cut to a multiple of the number of factors.
        generator: Source of the draws.

    Returns:
        Positions in the grid [V, L], and positions in the protocol's factors [V].

    Raises:
        ValueError: If a factor is outside the sizes.
    """
    _varying(sizes)
    if max(protocol.factors) >= len(sizes):
        raise ValueError(f"factors must lie in 0 to {len(sizes) - 1} for sizes {sizes}, got {protocol.factors}.")
    k, device = len(protocol.factors), generator.device
    if protocol.balanced:
        factor_V = torch.arange(votes // k * k, device=device) % k
    else:
        factor_V = torch.randint(k, (votes,), generator=generator, device=device)
    index_VL = torch.randint(prod(sizes), (len(factor_V), protocol.batch), generator=generator, device=device)
    step_K = torch.tensor([prod(sizes[factor + 1 :]) for factor in protocol.factors], device=device)
    size_K = torch.tensor([sizes[factor] for factor in protocol.factors], device=device)
    step_V1 = step_K[factor_V][:, None]
    value_VL = index_VL // step_V1 % size_K[factor_V][:, None]
    index_VL += (value_VL[:, :1] - value_VL) * step_V1
    return index_VL.cpu().numpy(), factor_V.cpu().numpy()


def name_latents(
    mu_NI: Float[Array, "n i"], index_VL: Int64[np.ndarray, "v l"], active_I: Bool[Array, " i"]
) -> Int64[np.ndarray, " v"]:
    """The latent that varies least in every vote, argmin_i Var_L(μ_i) / Var_N(μ_i) over the active ones.

    Both variances divide by the number of points less one, and are taken in double precision. No active latent may be
    constant over the grid.
    """
    mu_NI = _tensor(mu_NI)
    active_I = _tensor(active_I).to(mu_NI.device)
    variance_I = mu_NI.double().var(dim=0)
    index_VL = torch.from_numpy(index_VL).to(mu_NI.device)
    latent_V = []
    for chunk_VL in index_VL.split(max(1, NUMBERS_PER_CHUNK // (index_VL.shape[1] * mu_NI.shape[1]))):
        ratio_VI = mu_NI[chunk_VL].double().var(dim=1) / variance_I
        latent_V.append(ratio_VI.masked_fill(~active_I, torch.inf).argmin(dim=1))
    return torch.cat(latent_V).cpu().numpy()


def mutual_information_gap(
    mu_NI: Float[Array, "n i"],
    sizes: tuple[int, ...],
    *,
    points: int | None = 10_000,
    bins: int = 20,
    generator: torch.Generator,
) -> Mig:
    """MIG: how much more the best latent knows of a factor than the second best.

        MIG = 1/K Σ_k (I(z_(1); v_k) − I(z_(2); v_k)) / H(v_k)

    over the factors v_k with more than one value, z_(1) and z_(2) being the two latents with most information on v_k
    (Chen et al., Isolating Sources of Disentanglement, 2018). As in disentanglement_lib the means are cut into
    bins of equal width from their least to their greatest value and the information is that of the counts.

    A latent of 20 bins knows at most log 20 of a factor: with more than 20 values even a perfect code stays
    below 1, at 0.90 for dSprites. Counts of few points add about (bins − 1)(values − 1) / 2·points nats to each
    information, which mostly cancels in the gap.

    Args:
        mu_NI: Posterior means of every point of the grid, in C order.
        sizes: Number of values of every factor.
        points: Number of points drawn with replacement; None takes each point of the grid once (8 s for dSprites
            with ten latents).
        bins: Number of bins.
        generator: Source of the draw.

    Raises:
        ValueError: If there are fewer than two latents, points or bins, the sizes do not fit, or a mean is NaN or
            infinite.
    """
    from sklearn.metrics import mutual_info_score  # which no other measure of this package needs

    mu_NI = _grid(mu_NI, sizes)
    factors = _varying(sizes)
    _require(("latents", mu_NI.shape[1], 2), ("points", 2 if points is None else points, 2), ("bins", bins, 2))
    if points is None:
        point_N = torch.arange(len(mu_NI))
    else:
        point_N = torch.randint(len(mu_NI), (points,), generator=generator, device=generator.device).cpu()
    value_KN = [_value(point_N, sizes, factor).numpy() for factor in factors]
    bin_IN = [
        np.digitize(mu_N, np.histogram_bin_edges(mu_N, bins)[:-1])
        for mu_N in _levelled(mu_NI[point_N.to(mu_NI.device)], bins).double().cpu().numpy().T
    ]
    information_IK = np.array([[mutual_info_score(value_N, bin_N) for value_N in value_KN] for bin_N in bin_IN])
    second_K, first_K = np.sort(information_IK, axis=0)[-2:]
    entropy_K = np.array([entropy(np.bincount(value_N)) for value_N in value_KN])
    # A draw of few points may hold one value of a factor, which then has no entropy and no gap.
    gap_K = np.divide(first_K - second_K, entropy_K, out=np.zeros(len(factors)), where=entropy_K > 0)
    return Mig(float(gap_K.mean()), gap_K, factors)


def dci(
    mu_NI: Float[Array, "n i"],
    sizes: tuple[int, ...],
    *,
    train: int = 10_000,
    held_out: int = 5_000,
    trees: int = 10,
    generator: torch.Generator,
) -> Dci:
    """DCI from random forests that predict each factor from all latents.

        D = Σ_i ρ_i (1 − H_K(R_ik / Σ_k R_ik)),    ρ_i = Σ_k R_ik / Σ_ik R_ik
        C = 1/K Σ_k (1 − H_I(R_ik / Σ_i R_ik))

    with R_ik the importance of latent i for factor k (the mean decrease of impurity), and H_K the entropy to the base
    K. I is the accuracy on held-out points, mean over factors. Only factors with more than one value count. (Eastwood
    & Williams, A Framework for the Quantitative Evaluation of Disentangled Representations, 2018; they use random
    forests with an error as I, disentanglement_lib boosted trees with the accuracy.)

    Every split looks at all latents. If it looked at √I of them, as classifiers do by default, it would often have none
    but noise to split on, and a perfect code with spare latents would fall short of 1.

    The defaults take 2 to 5 s for ten latents on two cores. Fast setting, in a fifth to a third of that: train=2_000,
    held_out=1_000. On three codes of dSprites (perfect, two factors mixed, all mixed) it moved D and C by less than
    0.01, but I by up to -0.07, as a factor of many values needs the points; 50 trees moved D and C by less than 0.01
    and I by up to +0.03.

    Args:
        mu_NI: Posterior means of every point of the grid, in C order.
        sizes: Number of values of every factor.
        train: Number of points to learn from.
        held_out: Number of other points to score on; all are drawn without replacement, so that none is among both.
        trees: Number of trees.
        generator: Source of the draws and of the forests' seeds.

    Raises:
        ValueError: If there are fewer than two latents or varying factors, no points or trees, fewer points in the grid
            than are asked for, the sizes do not fit, or a mean is NaN or infinite.
    """
    from sklearn.ensemble import RandomForestClassifier  # which no other measure of this package needs

    mu_NI = _grid(mu_NI, sizes)
    factors = _varying(sizes)
    _require(("latents", mu_NI.shape[1], 2), ("factors with more than one value", len(factors), 2))
    _require(("points in train", train, 1), ("points in held_out", held_out, 1), ("trees", trees, 1))
    _require(("points in the grid, train + held_out", len(mu_NI), train + held_out))
    point_N = torch.randperm(len(mu_NI), generator=generator, device=generator.device)[: train + held_out].cpu()
    x_NI = _levelled(mu_NI[point_N.to(mu_NI.device)]).float().cpu().numpy()
    importance_IK = np.empty((mu_NI.shape[1], len(factors)))
    accuracy_K = np.empty(len(factors))
    for k, factor in enumerate(factors):
        y_N = _value(point_N, sizes, factor).numpy()
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        forest = RandomForestClassifier(trees, max_features=None, random_state=seed, n_jobs=1)
        forest.fit(x_NI[:train], y_N[:train])
        importance_IK[:, k] = forest.feature_importances_
        accuracy_K[k] = forest.score(x_NI[train:], y_N[train:])
    weight_I = importance_IK.sum(axis=1)
    disentanglement = weight_I @ _concentration(importance_IK) / weight_I.sum() if weight_I.any() else 0.0
    completeness = _concentration(importance_IK.T).mean()
    return Dci(float(disentanglement), float(completeness), float(accuracy_K.mean()), importance_IK, factors)


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
    mu_NI, logvar_NI = _finite("mu_NI", mu_NI), _finite("logvar_NI", logvar_NI)
    _require(("samples", samples, 2), ("points", len(mu_NI), 1))
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


def _value(point: Int64[Tensor, "*p"], sizes: tuple[int, ...], factor: int) -> Int64[Tensor, "*p"]:
    """Value of a factor at points of the grid, counted from 0."""
    return point // prod(sizes[factor + 1 :]) % sizes[factor]


def _varying(sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Factors with more than one value; a ValueError if there are none, or one has no value."""
    factors = tuple(factor for factor, size in enumerate(sizes) if size > 1)
    if not factors or min(sizes) < 1:
        raise ValueError(f"sizes must be positive, with a factor of more than one value, got {sizes}.")
    return factors


def _grid(mu_NI: Float[Array, "n i"], sizes: tuple[int, ...]) -> Float[Tensor, "n i"]:
    """The means as a tensor; a ValueError unless they are finite and as many as the grid has points."""
    _varying(sizes)
    if len(mu_NI) != prod(sizes):
        raise ValueError(f"mu_NI must hold the {prod(sizes)} points of a grid of sizes {sizes}, got {len(mu_NI)}.")
    return _finite("mu_NI", mu_NI)


def _finite(name: str, values: Float[Array, "*n"]) -> Float[Tensor, "*n"]:
    """The values as a tensor on their device; a ValueError if one is NaN or infinite."""
    values = _tensor(values)
    bad = int((~torch.isfinite(values)).sum())
    if bad:
        raise ValueError(f"{name} must be finite, got {bad} NaN or infinite values.")
    return values


def _tensor(values: Shaped[Array, "*n"]) -> Shaped[Tensor, "*n"]:
    """The values as a tensor; arrays are copied, because torch shares none that is read-only or runs backwards."""
    require_plain(values)
    return values.detach() if isinstance(values, Tensor) else torch.from_numpy(np.array(values, order="C"))


def _levelled(mu_NI: Num[Tensor, "n i"], bins: int = 1) -> Num[Tensor, "n i"]:
    """The means, with those of latents that are constant up to rounding set to zero: they tell of nothing."""
    return mu_NI * varying(mu_NI, bins)


def _active(mu_NI: Float[Tensor, "n i"], active_I: Bool[Array, " j"] | None) -> Bool[Tensor, " i"]:
    """The latents that count: those asked for, less the constant ones."""
    varies_I = varying(mu_NI)
    if active_I is None:
        return varies_I
    active_I = _tensor(active_I).to(mu_NI.device)
    if active_I.shape != varies_I.shape:
        raise ValueError(f"active_I must hold one flag for each of {len(varies_I)} latents, got {len(active_I)}.")
    return active_I & varies_I


def _accuracy(hits: int, votes: int) -> Interval:
    """Share of votes that hit, with Wilson's interval."""
    return fraction_interval(np.arange(votes) < hits)


def _concentration(importance: Num[np.ndarray, "r c"]) -> Float[np.ndarray, " r"]:
    """1 − entropy of each row's shares, to the base of the row's length; 0 for a row of zeros."""
    total = importance.sum(axis=1, keepdims=True)
    columns = importance.shape[1]
    share = np.divide(importance, total, out=np.full(importance.shape, 1 / columns), where=total > 0)
    return 1 - entropy(share, base=columns, axis=1)


def _require(*bounds: tuple[str, int, int]) -> None:
    """Raise a ValueError unless every (name, number, least) holds."""
    for name, number, least in bounds:
        if number < least:
            raise ValueError(f"There must be at least {least} {name}, got {number}.")
