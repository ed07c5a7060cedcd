from dataclasses import replace
from math import log

import numpy as np
import pytest
import torch

from expvae.metrics import (
    PUBLISHED,
    REFERENCE,
    Protocol,
    active_by_kl,
    active_by_variance,
    active_units,
    dci,
    draw_votes,
    factor_vae_metric,
    mutual_information_gap,
    name_latents,
    perfect_code,
    total_correlation,
)
from expvae.metrics import _disentanglement as disentanglement
from expvae.metrics import _latent as latent

DSPRITES = (1, 3, 6, 40, 32, 32)
LATTICE = (1, 3, 6, 20, 8, 8)
SMALL = (1, 3, 4, 5, 4, 4)
QUICK = replace(REFERENCE, votes=600, held_out=300)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def mixed_code(sizes, seed=0):
    """Latents that each know something of several factors, with noise, so that votes disagree."""
    code_NI = perfect_code(sizes, 2, seeded(seed))
    code_NI = (code_NI - code_NI.mean(dim=0)) / code_NI.std(dim=0)
    return code_NI @ (torch.eye(code_NI.shape[1]) + 0.4 * torch.randn(code_NI.shape[1], code_NI.shape[1]))


@pytest.fixture(autouse=True)
def global_seed():
    torch.manual_seed(0)


# FactorVAE metric


@pytest.mark.parametrize("protocol", [REFERENCE, PUBLISHED], ids=["reference", "published"])
def test_votes_hold_one_factor_and_leave_the_others_at_random(protocol):
    index_VL, factor_V = draw_votes(LATTICE, protocol, 600, seeded())
    assert index_VL.shape == (600, protocol.batch)
    value_FVL = np.stack(np.unravel_index(index_VL, LATTICE))
    held_V = np.array(protocol.factors)[factor_V]
    for factor, size in enumerate(LATTICE):
        spread_V = np.ptp(value_FVL[factor], axis=1)
        assert (spread_V[held_V == factor] == 0).all()
        if size > 1:
            assert (spread_V[held_V != factor] > 0).all()
            # Uniform where free, and over the votes where held: each value within 6 standard errors of its share.
            for values in (value_FVL[factor][held_V != factor].ravel(), value_FVL[factor][held_V == factor][:, 0]):
                count = np.bincount(values, minlength=size)
                assert np.abs(count - count.sum() / size).max() < 6 * np.sqrt(count.sum() / size)


def test_factors_are_drawn_at_random_or_in_equal_numbers():
    _, random_V = draw_votes(LATTICE, REFERENCE, 1000, seeded())
    _, balanced_V = draw_votes(LATTICE, PUBLISHED, 800, seeded())
    assert len(random_V) == 1000 and 0 < np.ptp(np.bincount(random_V, minlength=5)) < 100
    assert np.bincount(balanced_V).tolist() == [133] * 6


def slow_factor_vae(mu_NI, sizes, protocol, active_I, generator):
    """The metric as in Kim & Mnih's text, one vote after the other."""

    def vote(votes):
        named = []
        for points, k in zip(*draw_votes(sizes, protocol, votes, generator), strict=True):
            ratio = {
                i: np.var(mu_NI[points, i], ddof=1) / np.var(mu_NI[:, i], ddof=1) for i in np.flatnonzero(active_I)
            }
            named.append((min(ratio, key=ratio.get), k))
        return named

    training, held_out = vote(protocol.votes), vote(protocol.held_out)
    classifier = {}
    for d in {d for d, _ in training}:
        counts = [sum(1 for vote in training if vote == (d, k)) for k in range(len(protocol.factors))]
        classifier[d] = counts.index(max(counts))
    scored = held_out or training
    return sum(classifier.get(d, 0) == k for d, k in scored) / (protocol.held_out or protocol.votes)


@pytest.mark.parametrize("protocol", [QUICK, PUBLISHED], ids=["held out", "published"])
@pytest.mark.parametrize("active", [[True] * 7, [True, True, False, True, True, False, True]], ids=["all", "some"])
def test_metric_equals_a_slow_loop_over_votes(protocol, active):
    mu_NI = mixed_code(SMALL)
    active_I = torch.tensor(active)
    result = factor_vae_metric(mu_NI, SMALL, protocol, active_I=active_I, generator=seeded(3))
    slow = slow_factor_vae(mu_NI.double().numpy(), SMALL, protocol, active, seeded(3))
    assert result.score == pytest.approx(slow, abs=1e-12)
    assert 0.3 < result.score < 0.99  # a code on which a wrong argmin would show
    assert result.active == sum(active) and (result.votes_IK[~active_I.numpy()] == 0).all()


def test_chunks_do_not_change_the_votes(monkeypatch):
    mu_NI = mixed_code(SMALL)
    index_VL, _ = draw_votes(SMALL, REFERENCE, 300, seeded())
    whole_V = name_latents(mu_NI, index_VL, torch.ones(7, dtype=torch.bool))
    monkeypatch.setattr(disentanglement, "NUMBERS_PER_CHUNK", 1000)
    np.testing.assert_array_equal(name_latents(mu_NI, index_VL, torch.ones(7, dtype=torch.bool)), whole_V)


def test_perfect_code_scores_one_by_the_reference_protocol():
    result = factor_vae_metric(perfect_code(DSPRITES, 0, seeded()), DSPRITES, REFERENCE, generator=seeded())
    assert result.score == 1.0 and result.interval.n == 5000 and result.interval.low > 0.999
    assert result.votes_IK.sum() == 10_000 and np.count_nonzero(result.votes_IK) == 5


def test_perfect_code_falls_short_by_the_published_protocol():
    mu_NI = perfect_code(DSPRITES, 0, seeded())
    # 133 of 800 votes for each of five factors hit; colour is never the most frequent factor of a latent.
    scores = [factor_vae_metric(mu_NI, DSPRITES, PUBLISHED, generator=seeded(seed)).score for seed in range(3)]
    assert scores == [pytest.approx(5 * 133 / 800)] * 3
    assert scores[0] == pytest.approx(0.831, abs=0.01)


@pytest.mark.parametrize(("spare", "ceiling"), [(5, 0.954), (27, 0.993)])
def test_spare_latents_raise_the_published_ceiling(spare, ceiling):
    mu_NI = perfect_code(LATTICE, spare, seeded())
    scores = [factor_vae_metric(mu_NI, LATTICE, PUBLISHED, generator=seeded(seed)).score for seed in range(10)]
    assert np.mean(scores) == pytest.approx(ceiling, abs=0.01)
    assert factor_vae_metric(mu_NI, LATTICE, QUICK, generator=seeded()).score == 1.0


def test_noise_scores_chance_on_held_out_votes_only():
    mu_NI = torch.randn(np.prod(LATTICE), 10)
    held_out = factor_vae_metric(mu_NI, LATTICE, REFERENCE, generator=seeded())
    training = factor_vae_metric(mu_NI, LATTICE, replace(REFERENCE, votes=100, held_out=0), generator=seeded())
    assert held_out.score == pytest.approx(1 / 5, abs=0.03)
    assert training.score > 0.3


def test_score_is_the_same_again_and_for_rescaled_and_permuted_latents():
    mu_NI = mixed_code(SMALL)
    first = factor_vae_metric(mu_NI, SMALL, QUICK, generator=seeded(1))
    again = factor_vae_metric(mu_NI.double().numpy(), SMALL, QUICK, generator=seeded(1))
    other = factor_vae_metric(mu_NI, SMALL, QUICK, generator=seeded(2))
    np.testing.assert_array_equal(first.votes_IK, again.votes_IK)
    assert first.interval == again.interval
    assert (first.votes_IK != other.votes_IK).any()

    scale_I = torch.tensor([1e-3, 0.1, 0.7, -1.0, 3.0, 50.0, 1e4])
    scaled = factor_vae_metric(mu_NI * scale_I, SMALL, QUICK, generator=seeded(1))
    np.testing.assert_array_equal(scaled.votes_IK, first.votes_IK)
    order = [3, 0, 6, 1, 5, 2, 4]
    permuted = factor_vae_metric(mu_NI[:, order], SMALL, QUICK, generator=seeded(1))
    np.testing.assert_array_equal(permuted.votes_IK, first.votes_IK[order])
    assert scaled.score == permuted.score == first.score


@pytest.mark.parametrize("active_I", [None, np.ones(8, dtype=bool)], ids=["unsaid", "asked for"])
def test_constant_latents_are_left_out(active_I):
    mu_NI = mixed_code(SMALL)
    constant_NI = torch.cat([torch.full((len(mu_NI), 1), 0.1), mu_NI], dim=1)
    expected = factor_vae_metric(mu_NI, SMALL, QUICK, generator=seeded())
    result = factor_vae_metric(constant_NI, SMALL, QUICK, active_I=active_I, generator=seeded())
    assert result.score == expected.score and result.active == 7
    assert (result.votes_IK[0] == 0).all()


def with_rounding(mu_NI, value, dtype):
    """Beside the latents, one that is constant but for its last bit, which depends on the point."""
    constant_N = torch.full((len(mu_NI),), value, dtype=dtype)
    above_N = torch.nextafter(constant_N, torch.full_like(constant_N, torch.inf))
    last_N = torch.where(mu_NI[:, 0] > mu_NI[:, 0].mean(), above_N, constant_N)
    assert len(last_N.unique()) == 2
    return torch.cat([mu_NI.to(dtype), last_N[:, None]], dim=1)


@pytest.mark.parametrize("value", [0.3, -7e5, 1e9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_varies_by_rounding_alone_is_constant(value, dtype):
    sizes = (4, 3, 2)
    plain_NI = mixed_code(sizes).to(dtype)
    mu_NI = with_rounding(plain_NI, value, dtype)
    constant_NI = torch.cat([plain_NI, torch.full_like(plain_NI[:, :1], value)], dim=1)
    protocol = Protocol(factors=(0, 1, 2), votes=300, held_out=0, batch=8, balanced=False)

    def scored(mu_NI):
        votes = factor_vae_metric(mu_NI, sizes, protocol, generator=seeded())
        gap_K = mutual_information_gap(mu_NI, sizes, points=None, generator=seeded())
        importance = dci(mu_NI, sizes, train=16, held_out=8, generator=seeded())
        return votes.active, votes.votes_IK, gap_K, importance.importance_IK

    for ours, expected in zip(scored(mu_NI), scored(constant_NI), strict=True):
        np.testing.assert_array_equal(ours, expected)
    assert scored(mu_NI)[0] == plain_NI.shape[1]
    for threshold in (0.05, 1e-12):
        assert not active_by_variance(mu_NI, threshold)[-1]
    assert active_units(mu_NI[:, -1:]) == 0


@pytest.mark.parametrize("bins", [2, 20, 1000])
def test_bins_that_are_narrower_than_rounding_are_not_cut(bins):
    mu_NI = perfect_code((4, 3), 0, seeded()).double()
    for steps, gap in ((1, 0.0), (bins, 0.0), (8 * bins, 1.0 if bins > 2 else 0.579)):
        mu_NI[:, 1] = 1 + (torch.arange(12) % 3).double() * (steps * torch.finfo(torch.float64).eps / 2)
        gap_K = mutual_information_gap(mu_NI, (4, 3), points=None, bins=bins, generator=seeded())
        assert gap_K == pytest.approx([1.0 if bins > 2 else 0.5, gap], abs=1e-3)


def test_small_spreads_beyond_rounding_count():
    mu_NI = perfect_code((4, 3), 1, seeded()).double()
    small_NI = 1 + 1e-12 * mu_NI
    expected, ours = (
        mutual_information_gap(values_NI, (4, 3), points=None, generator=seeded()).mean()
        for values_NI in (mu_NI, small_NI)
    )
    assert ours == pytest.approx(expected, abs=0.05)


def test_without_active_latents_the_score_is_zero():
    result = factor_vae_metric(
        mixed_code(SMALL), SMALL, PUBLISHED, active_I=np.zeros(7, dtype=bool), generator=seeded()
    )
    assert result.score == 0 and result.active == 0 and result.votes_IK.shape == (7, 6) and not result.votes_IK.any()


def test_read_only_arrays_are_taken_as_they_are():
    mu_NI = mixed_code(SMALL).numpy()
    expected = factor_vae_metric(mu_NI, SMALL, QUICK, generator=seeded()).score
    mu_NI.setflags(write=False)
    assert factor_vae_metric(mu_NI, SMALL, QUICK, generator=seeded()).score == expected


def test_collapsed_latents_are_told_by_divergence_or_by_spread():
    kl_NI = np.array([[0.0, 0.0, 3.0], [0.01, 0.03, 1.0]])
    assert active_by_kl(kl_NI).tolist() == [False, True, True]
    assert active_by_kl(torch.tensor([0.009, 0.011])).tolist() == [False, True]
    assert active_by_kl(kl_NI, threshold=1e-5).tolist() == [True, True, True]
    # On the standard deviation: a variance of 0.04 would fall below a threshold of 0.05 on the variance.
    unit_N = (torch.arange(1000.0) - 499.5) / torch.arange(1000.0).std()
    assert active_by_variance(torch.stack([0.2 * unit_N, 0.049 * unit_N, 0.051 * unit_N], dim=1)).tolist() == [
        True,
        False,
        True,
    ]


def with_nan(mu_NI):
    mu_NI = mu_NI.clone()
    mu_NI[5, 1] = torch.nan
    return mu_NI


MEASURES = {
    "factor_vae": lambda mu_NI, sizes: factor_vae_metric(mu_NI, sizes, QUICK, generator=seeded()),
    "mig": lambda mu_NI, sizes: mutual_information_gap(mu_NI, sizes, generator=seeded()),
    "dci": lambda mu_NI, sizes: dci(mu_NI, sizes, train=50, held_out=50, generator=seeded()),
}


@pytest.mark.parametrize("measure", MEASURES.values(), ids=MEASURES)
def test_points_that_do_not_fit_the_grid_are_refused(measure):
    mu_NI = mixed_code(SMALL)
    with pytest.raises(ValueError, match="must hold the 1920 points"):
        measure(mu_NI, (2, 3, 4, 5, 4, 4))
    with pytest.raises(ValueError, match="a factor of more than one value"):
        measure(mu_NI[:1], (1, 1))
    with pytest.raises(ValueError, match="a factor of more than one value"):
        measure(mu_NI[:1], ())
    with pytest.raises(ValueError, match="sizes must be positive"):
        measure(mu_NI[:0], (0, 2))
    with pytest.raises(ValueError, match="mu_NI must be finite, got 1 NaN"):
        measure(with_nan(mu_NI), SMALL)


def test_what_does_not_fit_the_metric_is_refused():
    mu_NI = mixed_code(SMALL)
    with pytest.raises(ValueError, match="factors must lie in 0 to 2"):
        factor_vae_metric(mu_NI, (3, 20, 16), REFERENCE, generator=seeded())
    with pytest.raises(ValueError, match="one flag for each of 7 latents, got 6"):
        factor_vae_metric(mu_NI, SMALL, QUICK, active_I=torch.ones(6, dtype=torch.bool), generator=seeded())
    with pytest.raises(ValueError, match="kl must be finite"):
        active_by_kl(torch.tensor([0.1, torch.nan]))
    with pytest.raises(ValueError, match="two points or more"):
        active_by_variance(mu_NI[:1])
    with pytest.raises(ValueError, match="spare must be at least 0"):
        perfect_code(SMALL, -1, seeded())


def test_perfect_code_holds_the_factors_in_grid_order():
    code_NI = perfect_code((1, 3, 2, 4), 1, seeded()).numpy()
    np.testing.assert_array_equal(code_NI[:, :3].T, np.stack(np.unravel_index(np.arange(24), (1, 3, 2, 4)))[1:])
    noise_N = perfect_code(LATTICE, 1, seeded())[:, -1]
    assert noise_N.mean() == pytest.approx(0, abs=0.03) and noise_N.std() == pytest.approx(1, abs=0.03)


# MIG


def test_mig_of_a_perfect_code_is_one_up_to_as_many_values_as_bins():
    gap_K = mutual_information_gap(perfect_code(LATTICE, 0, seeded()), LATTICE, points=None, generator=seeded())
    np.testing.assert_allclose(gap_K, np.ones(5), atol=1e-12)


def test_mig_of_a_perfect_code_is_what_its_bins_can_hold():
    sizes = (1, 40, 32)
    gap_K = mutual_information_gap(perfect_code(sizes, 0, seeded()), sizes, points=None, generator=seeded())
    # 40 values fall on 20 bins in pairs, 32 on 8 single and 12 pairs.
    expected = [log(20) / log(40), 1 - 24 / 32 * log(2) / log(32)]
    np.testing.assert_allclose(gap_K, expected, atol=1e-12)


def test_mig_is_low_where_two_latents_tell_the_same_or_none_tells():
    code_NI = perfect_code(LATTICE, 0, seeded())
    twice = mutual_information_gap(torch.cat([code_NI, -2 * code_NI], dim=1), LATTICE, points=None, generator=seeded())
    assert twice == pytest.approx(0, abs=1e-12)
    noise = mutual_information_gap(torch.randn(len(code_NI), 6), LATTICE, generator=seeded())
    assert (noise >= 0).all() and noise.mean() < 0.01


def test_mig_equals_sums_over_a_table_of_counts():
    sizes, points = (3, 1, 4, 5), 500
    mu_NI = perfect_code(sizes, 1, seeded()) @ torch.randn(4, 3)
    gap_K = mutual_information_gap(mu_NI, sizes, points=points, bins=7, generator=seeded(4))
    drawn = torch.randint(len(mu_NI), (points,), generator=seeded(4)).numpy()
    value_FN = np.stack(np.unravel_index(drawn, sizes))
    for gap, factor in zip(gap_K, (0, 2, 3), strict=True):
        information = []
        for mu_N in mu_NI.double().numpy()[drawn].T:
            edges = np.linspace(mu_N.min(), mu_N.max(), 8)
            table, _, _ = np.histogram2d(mu_N, value_FN[factor], bins=(edges, np.arange(sizes[factor] + 1)))
            p = table / points
            terms = p * np.log(np.where(p > 0, p, 1) / p.sum(axis=1, keepdims=True) / p.sum(axis=0))
            information.append(terms[p > 0].sum())
        p_value = np.bincount(value_FN[factor]) / points
        best, second = sorted(information)[:-3:-1]
        assert gap == pytest.approx((best - second) / -(p_value * np.log(p_value)).sum(), abs=1e-9)


def test_mig_is_the_same_again_and_refuses_what_it_cannot_do():
    mu_NI = mixed_code(SMALL)
    first, again, other = (
        mutual_information_gap(mu_NI, SMALL, points=300, generator=seeded(seed)).mean() for seed in (1, 1, 2)
    )
    assert first == again != other
    with pytest.raises(ValueError, match="latents must be at least 2, got 1"):
        mutual_information_gap(mu_NI[:, :1], SMALL, generator=seeded())
    with pytest.raises(ValueError, match="points must be at least 2"):
        mutual_information_gap(mu_NI, SMALL, points=1, generator=seeded())
    with pytest.raises(ValueError, match="bins must be at least 2"):
        mutual_information_gap(mu_NI, SMALL, bins=1, generator=seeded())


# DCI


def test_dci_of_a_perfect_code_is_one():
    result = dci(perfect_code(LATTICE, 3, seeded()), LATTICE, train=3000, held_out=500, generator=seeded())
    assert result.disentanglement > 0.99 and result.completeness > 0.99 and result.informativeness > 0.99
    assert result.importance_IK.argmax(axis=0).tolist() == [0, 1, 2, 3, 4]


def test_dci_of_noise_is_low_and_its_accuracy_that_of_points_held_out():
    # The grid is small: a point in both sets would be known by its noise, and the accuracy be near one.
    result = dci(torch.randn(np.prod(SMALL), 6), SMALL, train=480, held_out=480, generator=seeded())
    assert result.disentanglement < 0.1 and result.completeness < 0.1
    assert result.informativeness == pytest.approx(np.mean([1 / size for size in SMALL[1:]]), abs=0.05)


def test_dci_tells_a_split_factor_from_a_mixed_latent():
    sizes = (4, 4, 4)
    a_N, b_N, c_N = perfect_code(sizes, 0, seeded()).T
    settings = {"train": 40, "held_out": 24, "trees": 30}
    # One latent holds two factors: it tells of both, while each factor still has one latent.
    mixed = dci(torch.stack([4 * a_N + b_N, c_N], dim=1), sizes, **settings, generator=seeded())
    # Two latents share a factor: each tells of one factor, which has two latents.
    high_N, low_N = (a_N >= 2).float(), a_N % 2
    split = dci(torch.stack([high_N, low_N, b_N, c_N], dim=1), sizes, **settings, generator=seeded())
    assert mixed.disentanglement < 0.8 < mixed.completeness
    assert split.completeness < 0.9 < split.disentanglement


def test_dci_equals_loops_over_its_importances():
    result = dci(mixed_code(SMALL), SMALL, train=400, held_out=100, trees=3, generator=seeded())
    R = result.importance_IK
    latents, factors = R.shape
    disentanglement = completeness = 0.0
    for i in range(latents):
        share = R[i] / R[i].sum()
        disentanglement += R[i].sum() / R.sum() * (1 + sum(p * log(p, factors) for p in share if p > 0))
    for k in range(factors):
        completeness += (1 + sum(p * log(p, latents) for p in R[:, k] if p > 0)) / factors
    assert result.disentanglement == pytest.approx(disentanglement)
    assert result.completeness == pytest.approx(completeness)
    assert 0.01 < result.disentanglement < 0.9


def test_dci_of_constant_latents_is_zero():
    result = dci(torch.ones(np.prod(SMALL), 3), SMALL, train=400, held_out=100, trees=2, generator=seeded())
    assert result.disentanglement == 0 and result.completeness == pytest.approx(0)


def test_dci_is_the_same_again_and_refuses_what_it_cannot_do():
    mu_NI = mixed_code(SMALL)
    first, again, other = (
        dci(mu_NI, SMALL, train=200, held_out=100, trees=2, generator=seeded(seed)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first.importance_IK, again.importance_IK)
    assert first.informativeness == again.informativeness
    assert (first.importance_IK != other.importance_IK).any()
    with pytest.raises(ValueError, match="latents must be at least 2, got 1"):
        dci(mu_NI[:, :1], SMALL, generator=seeded())
    with pytest.raises(ValueError, match="factors of more than one value must be at least 2, got 1"):
        dci(mu_NI, (1, 960), train=50, held_out=50, generator=seeded())
    with pytest.raises(ValueError, match=r"points, for train \+ held_out, must be at least 1000, got 960"):
        dci(mu_NI, SMALL, train=900, held_out=100, generator=seeded())
    with pytest.raises(ValueError, match="held_out must be at least 1"):
        dci(mu_NI, SMALL, train=900, held_out=0, generator=seeded())


# Total correlation


def test_total_correlation_of_gaussians_is_the_closed_form():
    root_II = torch.tensor([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [-0.5, 0.3, 0.7]])
    mu_NI = torch.randn(3000, 3) @ root_II.T
    result = total_correlation(mu_NI, torch.full_like(mu_NI, log(0.25)), samples=2000, generator=seeded())
    covariance = (root_II @ root_II.T).numpy() + 0.25 * np.eye(3)
    expected = 0.5 * (np.log(np.diag(covariance)).sum() - np.linalg.slogdet(covariance)[1])
    assert result.value == pytest.approx(expected, abs=0.07) and expected > 0.3


def test_total_correlation_of_a_few_points_is_the_integral():
    mu_NI = np.array([[0.0, 0.0], [1.0, 2.0], [3.0, 1.0]])
    logvar_NI = np.log(np.array([[1.0, 0.2], [0.1, 0.5], [0.4, 0.3]]))
    grid, step = np.linspace(-7, 9, 1601, retstep=True)
    density_NIG = np.exp(-((grid - mu_NI[..., None]) ** 2) / 2 / np.exp(logvar_NI)[..., None])
    density_NIG /= np.sqrt(2 * np.pi * np.exp(logvar_NI))[..., None]
    joint_GG = np.einsum("na,nb->ab", density_NIG[:, 0], density_NIG[:, 1]) / 3
    product_GG = np.outer(*density_NIG.mean(axis=0))
    some_GG = joint_GG > 1e-200  # its logarithm times it is nothing below
    expected = (joint_GG[some_GG] * np.log(joint_GG[some_GG] / product_GG[some_GG])).sum() * step**2
    result = total_correlation(mu_NI, logvar_NI, samples=40_000, generator=seeded())
    assert result.value == pytest.approx(expected, abs=0.02) and expected > 0.3
    assert result.low < expected < result.high and result.high - result.low < 0.03


def test_total_correlation_of_a_factorised_posterior_is_zero():
    mu_NI = 3 * perfect_code((4, 5, 6), 0, seeded())
    logvar_NI = torch.tensor([-2.0, 0.0, 1.0]).expand(len(mu_NI), -1)
    result = total_correlation(mu_NI, logvar_NI, samples=200, generator=seeded())
    assert result.value == pytest.approx(0, abs=1e-9) and result.n == 200


def test_total_correlation_is_too_high_for_few_points():
    mu_NI = torch.randn(3000, 8)
    logvar_NI = torch.full_like(mu_NI, log(0.05))
    few = total_correlation(mu_NI[:100], logvar_NI[:100], samples=500, generator=seeded())
    many = total_correlation(mu_NI, logvar_NI, samples=500, generator=seeded())
    assert few.value > many.high and few.low > 0  # the truth is 0


def test_total_correlation_interval_is_that_of_the_draws(monkeypatch):
    mu_NI = torch.randn(200, 1) @ torch.ones(1, 3)
    logvar_NI = torch.zeros_like(mu_NI)
    results = [total_correlation(mu_NI, logvar_NI, samples=200, generator=seeded(seed)) for seed in range(60)]
    spread = np.std([result.value for result in results], ddof=1)
    widths = [(result.high - result.low) / 2 / 1.96 for result in results]
    assert np.mean(widths) == pytest.approx(spread, rel=0.3)  # 60 spreads are known to a tenth
    narrow = total_correlation(mu_NI, logvar_NI, samples=200, generator=seeded(), level=0.5)
    assert narrow.value == results[0].value and narrow.high < results[0].high
    monkeypatch.setattr(latent, "NUMBERS_PER_CHUNK", 1)
    one_by_one = total_correlation(mu_NI, logvar_NI, samples=200, generator=seeded())
    assert one_by_one.value == pytest.approx(results[0].value, abs=1e-12)


def test_total_correlation_refuses_what_it_cannot_do():
    mu_NI = torch.randn(5, 2)
    with pytest.raises(ValueError, match=r"shape \(5, 2\), got \(4, 2\)"):
        total_correlation(mu_NI, mu_NI[:4], samples=10, generator=seeded())
    with pytest.raises(ValueError, match="samples must be at least 2"):
        total_correlation(mu_NI, mu_NI, samples=1, generator=seeded())
    with pytest.raises(ValueError, match="points must be at least 1"):
        total_correlation(mu_NI[:0], mu_NI[:0], samples=10, generator=seeded())
    with pytest.raises(ValueError, match="logvar_NI must be finite"):
        total_correlation(mu_NI, with_nan(torch.randn(6, 2))[1:], samples=10, generator=seeded())
    with pytest.raises(ValueError, match="level must lie between"):
        total_correlation(mu_NI, mu_NI, samples=10, generator=seeded(), level=1.0)
