"""How far latents keep the factors of variation apart: the FactorVAE metric, MIG and DCI.

They know the truth from the order of their points: latents of every point of a grid of factors, in C order (the last
factor fastest), and the grid's sizes: (1, 3, 6, 40, 32, 32) for dSprites, (1, 3, 6, 20, 16, 16) for a coarser lattice
of it. A factor with one value, such as dSprites' colour, cannot be encoded.

Suffixes: N points, I latents, V votes, L points of a vote, K factors scored, F factors of the grid.
"""

from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Num
from scipy.stats import entropy
from torch import Tensor

from expvae.metrics._bootstrap import Interval
from expvae.metrics._inputs import Array
from expvae.metrics._latent import NUMBERS_PER_CHUNK, finite, require_least, varying
from expvae.metrics._pixel import fraction_interval


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


@dataclass(frozen=True)
class Dci:
    """Disentanglement, completeness and informativeness, each in [0, 1]; of the factors with more than one value.

    Attributes:
        disentanglement: Whether a latent tells of one factor only.
        completeness: Whether a factor is told by one latent only.
        informativeness: Held-out accuracy of predicting a factor from all latents, mean over factors.
        importance_IK: How much latent i matters for factor k; each column sums to 1, or to 0 where nothing helped.
    """

    disentanglement: float
    completeness: float
    informativeness: float
    importance_IK: Float[np.ndarray, "i k"]


def perfect_code(sizes: tuple[int, ...], spare: int, generator: torch.Generator) -> Float[Tensor, "n i"]:
    """Latents of a model without fault: one per factor with more than one value, holding it, then spare noise N(0, 1).

    What a metric says of it is the metric's ceiling.

    Raises:
        ValueError: If no factor has more than one value or spare is negative.
    """
    require_least(("spare", spare, 0))
    value_KN = _values(torch.arange(prod(sizes)), sizes)
    noise_NI = torch.randn(value_KN.shape[1], spare, generator=generator, device=generator.device)
    return torch.cat([torch.from_numpy(value_KN.T).float(), noise_NI.cpu()], dim=1)


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
    varies_I = varying(mu_NI)
    active_I = varies_I if active_I is None else finite("active_I", active_I).to(mu_NI.device)
    if active_I.shape != varies_I.shape:
        raise ValueError(f"active_I must hold one flag for each of {len(varies_I)} latents, got {len(active_I)}.")
    active_I = active_I & varies_I
    latents, k = mu_NI.shape[1], len(protocol.factors)
    draws = [draw_votes(sizes, protocol, votes, generator) for votes in (protocol.votes, protocol.held_out)]
    index_VL, factor_V = (np.concatenate(parts) for parts in zip(*draws, strict=True))
    cell_V = name_latents(mu_NI, index_VL, active_I) * k + factor_V
    if not active_I.any():
        cell_V = cell_V[:0]  # no latent is named
    votes_IK, held_out_IK = (
        np.bincount(cells, minlength=latents * k).reshape(latents, k) for cells in np.split(cell_V, [len(draws[0][1])])
    )
    scored_IK = held_out_IK if protocol.held_out else votes_IK
    hits = scored_IK[np.arange(latents), votes_IK.argmax(axis=1)].sum()
    accuracy = fraction_interval(np.arange(protocol.held_out or protocol.votes) < hits)
    return FactorVaeScore(accuracy, votes_IK, int(active_I.sum()))


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
    _factors(sizes)
    if max(protocol.factors) >= len(sizes):
        raise ValueError(f"factors must lie in 0 to {len(sizes) - 1} for sizes {sizes}, got {protocol.factors}.")
    k, device = len(protocol.factors), generator.device
    if protocol.balanced:
        factor_V = torch.arange(votes // k * k, device=device) % k
    else:
        factor_V = torch.randint(k, (votes,), generator=generator, device=device)
    index_VL = torch.randint(prod(sizes), (len(factor_V), protocol.batch), generator=generator, device=device)
    factor_V, vote_V = factor_V.cpu().numpy(), np.arange(len(factor_V))
    value_FVL = np.array(np.unravel_index(index_VL.cpu().numpy(), sizes))
    held_V = np.array(protocol.factors)[factor_V]
    value_FVL[held_V, vote_V] = value_FVL[held_V, vote_V, :1]
    return np.ravel_multi_index(tuple(value_FVL), sizes), factor_V


def name_latents(
    mu_NI: Float[Tensor, "n i"], index_VL: Int64[np.ndarray, "v l"], active_I: Bool[Tensor, " i"]
) -> Int64[np.ndarray, " v"]:
    """The latent that varies least in every vote, argmin_i Var_L(μ_i) / Var_N(μ_i) over the active ones.

    Both variances divide by the number of points less one, and are taken in double precision. The means must be
    finite, and no active latent may be constant over the grid.
    """
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
) -> Float[np.ndarray, " k"]:
    """The gaps whose mean is MIG: how much more the best latent knows of a factor than the second best.

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

    Returns:
        Gap of every factor that has more than one value, in [0, 1].

    Raises:
        ValueError: If there are fewer than two latents, points or bins, the sizes do not fit, or a mean is NaN or
            infinite.
    """
    from sklearn.metrics import mutual_info_score  # which no other measure of this package needs

    mu_NI = _grid(mu_NI, sizes)
    require_least(("latents", mu_NI.shape[1], 2), ("points", 2 if points is None else points, 2), ("bins", bins, 2))
    if points is None:
        point_N = torch.arange(len(mu_NI))
    else:
        point_N = torch.randint(len(mu_NI), (points,), generator=generator, device=generator.device)
    value_KN = _values(point_N, sizes)
    mu_NI = mu_NI[point_N.to(mu_NI.device)]
    bin_IN = [
        np.digitize(mu_N, np.histogram_bin_edges(mu_N, bins)[:-1])
        for mu_N in (mu_NI * varying(mu_NI, bins)).double().cpu().numpy().T
    ]
    information_IK = np.array([[mutual_info_score(value_N, bin_N) for value_N in value_KN] for bin_N in bin_IN])
    second_K, first_K = np.sort(information_IK, axis=0)[-2:]
    entropy_K = np.array([entropy(np.bincount(value_N)) for value_N in value_KN])
    # A draw of few points may hold one value of a factor, which then has no entropy and no gap.
    return np.divide(first_K - second_K, entropy_K, out=np.zeros(len(entropy_K)), where=entropy_K > 0)


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
    require_least(("latents", mu_NI.shape[1], 2), ("factors of more than one value", len(_factors(sizes)), 2))
    require_least(("train", train, 1), ("held_out", held_out, 1), ("trees", trees, 1))
    require_least(("points, for train + held_out,", len(mu_NI), train + held_out))
    point_N = torch.randperm(len(mu_NI), generator=generator, device=generator.device)[: train + held_out]
    mu_NI = mu_NI[point_N.to(mu_NI.device)]
    x_NI = (mu_NI * varying(mu_NI)).float().cpu().numpy()
    value_KN = _values(point_N, sizes)
    importance_IK = np.empty((x_NI.shape[1], len(value_KN)))
    accuracy_K = np.empty(len(value_KN))
    for k, y_N in enumerate(value_KN):
        seed = int(torch.randint(2**31, (), generator=generator, device=generator.device))
        forest = RandomForestClassifier(trees, max_features=None, random_state=seed, n_jobs=1)
        forest.fit(x_NI[:train], y_N[:train])
        importance_IK[:, k] = forest.feature_importances_
        accuracy_K[k] = forest.score(x_NI[train:], y_N[train:])
    weight_I = importance_IK.sum(axis=1)
    disentanglement = weight_I @ _concentration(importance_IK) / weight_I.sum() if weight_I.any() else 0.0
    completeness = _concentration(importance_IK.T).mean()
    return Dci(float(disentanglement), float(completeness), float(accuracy_K.mean()), importance_IK)


def _factors(sizes: tuple[int, ...]) -> list[int]:
    """Factors with more than one value; a ValueError if there are none, or one has no value."""
    factors = [factor for factor, size in enumerate(sizes) if size > 1]
    if not factors or min(sizes) < 1:
        raise ValueError(f"sizes must be positive, with a factor of more than one value, got {sizes}.")
    return factors


def _values(point_N: Int64[Tensor, " n"], sizes: tuple[int, ...]) -> Int64[np.ndarray, "k n"]:
    """Values, counted from 0, of every factor with more than one of them, at points of the grid."""
    factors = _factors(sizes)
    return np.array(np.unravel_index(point_N.cpu().numpy(), sizes))[factors]


def _grid(mu_NI: Float[Array, "n i"], sizes: tuple[int, ...]) -> Float[Tensor, "n i"]:
    """The means as a tensor; a ValueError unless they are finite and as many as the grid has points."""
    _factors(sizes)
    if len(mu_NI) != prod(sizes):
        raise ValueError(f"mu_NI must hold the {prod(sizes)} points of a grid of sizes {sizes}, got {len(mu_NI)}.")
    return finite("mu_NI", mu_NI)


def _concentration(importance: Num[np.ndarray, "r c"]) -> Float[np.ndarray, " r"]:
    """1 − entropy of each row's shares, to the base of the row's length; 0 for a row of zeros."""
    total = importance.sum(axis=1, keepdims=True)
    columns = importance.shape[1]
    share = np.divide(importance, total, out=np.full(importance.shape, 1 / columns), where=total > 0)
    return 1 - entropy(share, base=columns, axis=1)
