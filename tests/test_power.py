"""The power of a comparison over seeds against closed forms, other implementations and slow loops."""

import numpy as np
import pytest
from scipy import stats
from sklearn.linear_model import LinearRegression

from expvae_book import figures, judging, power
from expvae_book.pages import seeds

DESIGNS = [(2, False), (3, True), (5, False), (10, True), (12, False)]


def groups():
    rng = np.random.default_rng(3)
    group_N = np.array([5, 5, 10, 10, 10, 15, 20, 20, 20, 20])
    return rng.normal(group_N / 10, 0.3), group_N


def test_the_spread_is_what_a_mean_per_group_leaves():
    value_N, group_N = groups()
    spread = power.pooled_spread(value_N, group_N)
    indicators = (group_N[:, None] == np.unique(group_N)).astype(float)
    left_N = value_N - LinearRegression(fit_intercept=False).fit(indicators, value_N).predict(indicators)
    assert spread.freedom == 6
    assert spread.sd == pytest.approx(np.sqrt((left_N**2).sum() / 6))
    slow = sum(
        (value - np.mean([other for other, at in zip(value_N, group_N, strict=True) if at == group])) ** 2
        for value, group in zip(value_N, group_N, strict=True)
    )
    assert spread.sd == pytest.approx((slow / 6) ** 0.5)
    error_N = power.errors(value_N, group_N)
    assert (error_N**2).mean() == pytest.approx(spread.sd**2)
    assert error_N[group_N == 10].sum() == pytest.approx(0)
    named = power.pooled_spread(value_N, np.array([f"γ {group}" for group in group_N]))
    assert named == spread
    with pytest.raises(ValueError, match="group_N must hold some group twice"):
        power.pooled_spread(value_N[:3], np.arange(3))


def test_the_interval_of_the_spread_covers_the_truth_as_often_as_it_says():
    _, group_N = groups()
    rng = np.random.default_rng(0)
    spreads = [power.pooled_spread(rng.normal(group_N, 0.2), group_N, level=0.8) for _ in range(1000)]
    below, above = (sum(end) for end in zip(*((one.high < 0.2, one.low > 0.2) for one in spreads), strict=True))
    # Each end misses in a tenth of the draws, whose number has a standard deviation of 9.5.
    assert (below, above) == (pytest.approx(100, abs=30), pytest.approx(100, abs=30))


def test_the_power_is_the_textbooks():
    # Half a standard deviation between groups of 64, and by 34 pairs (Cohen 1988; G*Power gives these digits).
    assert power.power(0.5, 1.0, 64) == pytest.approx(0.8014596, abs=1e-6)
    assert power.power(0.5, 0.5**0.5, 34, paired=True) == pytest.approx(0.8077775, abs=1e-6)
    assert power.power(-0.5, 1.0, 64) == pytest.approx(power.power(0.5, 1.0, 64))
    assert power.power(0.0, 1.0, 4) == pytest.approx(0.05)
    assert power.power(0.0, 1.0, 4, paired=True, level=0.9) == pytest.approx(0.1)


@pytest.mark.parametrize(("seeds", "paired"), DESIGNS)
@pytest.mark.parametrize("delta", [0.0, 0.8, 1.5])
def test_simulation_and_closed_form_agree(delta, seeds, paired):
    error_N = stats.norm.ppf((np.arange(200_000) + 0.5) / 200_000)
    expected = power.power(delta, 1.0, seeds, paired=paired)
    found = power.simulated_power(delta, error_N, seeds, paired=paired, seed=1)
    assert found == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 20000) ** 0.5)


@pytest.mark.parametrize("paired", [False, True])
def test_simulation_counts_intervals_that_leave_out_zero(paired):
    error_N = np.random.default_rng(6).normal(0, 0.07, 500)
    drawn = np.random.default_rng(5).choice(error_N, (2, 300, 4)) + np.array([0.1, 0])[:, None, None]
    found = 0
    for first, second in zip(*drawn, strict=True):
        if paired:
            low, high = judging.seed_interval((first - second).tolist())
        else:
            low, high = stats.ttest_ind(first, second).confidence_interval(0.95)
        found += not low <= 0 <= high
    assert 0 < found < 300
    assert power.simulated_power(0.1, error_N, 4, paired=paired, draws=300, seed=5) == found / 300


@pytest.mark.parametrize(("seeds", "paired"), [*DESIGNS, (2, True)])
def test_the_smallest_difference_is_found_with_the_power_asked_for(seeds, paired):
    delta = power.smallest_difference(0.07, seeds, paired=paired)
    assert power.power(delta, 0.07, seeds, paired=paired) == pytest.approx(0.8)
    assert power.seeds_needed(delta * 1.0001, 0.07, paired=paired) == seeds
    assert power.seeds_needed(delta * 0.9999, 0.07, paired=paired) == seeds + 1


def test_one_seed_finds_nothing():
    assert power.smallest_difference(0.07, 1) == np.inf
    for find in (power.power, lambda *given: power.simulated_power(0.1, np.zeros(3), 1)):
        with pytest.raises(ValueError, match="seeds must be 2 or more for an interval, got 1"):
            find(0.1, 0.07, 1)
    with pytest.raises(ValueError, match="delta must not be zero"):
        power.seeds_needed(0.0, 0.07)


def test_the_tables_are_computed_from_the_published_numbers():
    differences = seeds.paper_differences()
    assert differences == pytest.approx({10: 0.15, 20: 0.12, 30: 0.115, 40: 0.085})
    replicates, spreads = seeds.replicates(), seeds.spreads()
    assert [len(runs) for runs in replicates.values()] == [40, 40, 50, 10, 18]
    assert [spread.freedom for spread in spreads.values()] == [30, 20, 40, 5, 12]
    assert seeds.spread_lines()["Runs"].tolist() == [40, 40, 50, 10, 18]
    spread = next(iter(spreads.values()))
    first = seeds.seeds_to_find(spread).iloc[0]
    assert first["Seeds, two-sample interval"].split(" ")[0] == str(power.seeds_needed(differences[10], spread.sd))
    assert [row[1:] for row in seeds.designs()] == [(1, False), (4, True), (2, False), (10, True), (3, False)]
    column = seeds.findable({"it": spread})["at the spread of it"]
    assert column[0].startswith("none")
    assert float(column[4].split(" ")[0]) == round(power.smallest_difference(spread.sd, 3), 3)


def test_power_curves_are_drawn_where_they_are():
    lines = seeds.power_curves(most=4)
    assert [float(name.split(",")[0]) for name in lines] == [0.15, 0.085]
    for line in lines.values():
        assert line["seeds"].tolist() == [2, 3, 4]
        assert (line["low"] < line["power"]).all()
        assert (line["power"] < line["high"]).all()
    axis = figures.power_curves(lines, target=0.8, marks={"a design": 2}).axes[0]
    drawn = {line.get_label(): line.get_ydata() for line in axis.lines}
    for name, line in lines.items():
        assert np.array_equal(drawn[name], line["power"])
        assert np.array_equal(drawn[f"{name}, simulated"], line["simulated"])
    assert [text.get_text() for text in axis.texts] == ["a design"]
