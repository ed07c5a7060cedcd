"""How many seeds would tell: the power of comparisons on dSprites, from the spread of published replicates."""

import numpy as np
import pandas as pd
from IPython.display import Markdown, display

from expvae_book import figures, power, publications, report


def seed_spread() -> float:
    """How far the seeds of one FactorVAE of Brongers et al. lie apart in their metric."""
    table = publications.select(publications.read(), source="brongers", metric="disentanglement metric")
    return float(np.ptp(table[table["setting"].str.startswith("FactorVAE")]["value"]))


def replicates() -> dict[str, pd.DataFrame]:
    """Published runs that differ within a group by nothing but chance, as far as their code is known.

    Columns: score and group. Those of Report 2's code are taken at the last step that all of them reached. λ never
    reached the gradient there, so that AD-FactorVAE of one γ is one algorithm whatever its λ, and FactorVAE the same.
    """
    table = publications.report2_runs().rename(columns={"metric_score": "score"})
    last = table.groupby(["gamma", "lambda", "seed"])["step"].max().min()
    table = table[table["step"] == last].assign(group=lambda runs: runs["gamma"].astype(str))
    trained = table[table["lambda"] > 0]
    theirs = publications.select(publications.read(), source="brongers", metric="disentanglement metric")
    return {
        "Report 2's code, AD-FactorVAE of equal γ": trained,
        "the same, of equal γ and λ": trained.assign(group=trained["group"] + ", " + trained["lambda"].astype(str)),
        "the same and FactorVAE, of equal γ": table,
        "Report 2's code, FactorVAE of equal γ": table[table["lambda"] == 0],
        "Brongers et al., models of equal γ, λ and layer": pd.DataFrame(
            {"score": theirs["value"], "group": theirs["setting"].str.partition(", seed")[0]}
        ),
    }


def spreads() -> dict[str, power.Spread]:
    """The standard deviation of the metric among each of the published replicates."""
    return {
        name: power.pooled_spread(runs["score"].to_numpy(), runs["group"].to_numpy())
        for name, runs in replicates().items()
    }


def spread_lines() -> pd.DataFrame:
    """The spread of each of the published replicates, as a table."""
    interval = f"SD [{100 * power.LEVEL:.0f} % interval]"
    return pd.DataFrame(
        {"Replicates": name, "Runs": len(runs), interval: str(spread), "Degrees of freedom": spread.freedom}
        for (name, runs), spread in zip(replicates().items(), spreads().values(), strict=True)
    )


def paper_differences() -> dict[int, float]:
    """γ -> how much higher the paper's AD-FactorVAE scores than its FactorVAE."""
    rows = publications.select(publications.read(), source="paper", metric="disentanglement metric")
    score = rows.set_index("setting")["value"]
    settings = [setting for setting in score.index if setting.startswith("AD-")]
    return {int(name.rpartition(" ")[2]): float(score[name] - score[name.removeprefix("AD-")]) for name in settings}


def reading_error() -> float:
    """How far a difference of two scores that were read off the paper's figure may be off."""
    rows = publications.select(publications.read(), source="paper", metric="disentanglement metric")
    return 2**0.5 * float((rows["high"] - rows["low"]).max()) / 2


def needed() -> list[int]:
    """Seeds per arm for the paper's least and greatest difference, at the spread of Report 2's AD-FactorVAE."""
    differences, spread = paper_differences().values(), next(iter(spreads().values()))
    return [power.seeds_needed(delta, spread.sd) for delta in (min(differences), max(differences))]


def seeds_to_find(spread: power.Spread) -> pd.DataFrame:
    """How many seeds an arm would need for the paper's differences, at a spread and at the ends of its interval."""

    def needed(delta: float, paired: bool) -> str:
        at, low, high = (power.seeds_needed(delta, sd, paired=paired) for sd in (spread.sd, spread.low, spread.high))
        return f"{at} ({low}–{high})"

    return pd.DataFrame(
        {
            "γ": gamma,
            f"Paper's difference (read off its figure, ±{reading_error():.3f})": f"{delta:.3f}",
            "Seeds, two-sample interval": needed(delta, False),
            "Seeds, paired interval": needed(delta, True),
        }
        for gamma, delta in paper_differences().items()
    )


def designs() -> list[tuple[str, int, bool]]:
    """The published designs: what is compared, in how many runs an arm, and whether these are pairs."""
    printed = publications.select(publications.read(), dataset="dSprites", metric="seeds").set_index("source")["value"]
    second, third = int(printed["R2"]), int(printed["brongers"])
    runs = publications.report2_runs()
    shared = set(runs["gamma"][runs["lambda"] == 0]) & set(runs["gamma"][runs["lambda"] == 1])
    return [
        ("Paper, one γ (it prints no number of seeds, and one point)", 1, False),
        ("Paper, its γ as pairs", len(paper_differences()), True),
        ("Report 2, one γ", second, False),
        ("Report 2, its first experiment, γ and seeds as pairs", second * len(shared), True),
        ("Brongers et al., one λ and layer", third, False),
    ]


def findable(named: dict[str, power.Spread]) -> pd.DataFrame:
    """The least difference that each published design would find, at each of these spreads."""

    def least(spread: power.Spread, seeds: int, paired: bool) -> str:
        at, low, high = (
            power.smallest_difference(sd, seeds, paired=paired) for sd in (spread.sd, spread.low, spread.high)
        )
        return f"{at:.3f} ({low:.3f}–{high:.3f})" if np.isfinite(at) else "none: one run has no interval"

    return pd.DataFrame(
        {"Design": name, "Runs per arm": seeds}
        | {f"at the spread of {whose}": least(spread, seeds, paired) for whose, spread in named.items()}
        for name, seeds, paired in designs()
    )


def single() -> dict[str, int]:
    """Seeds per arm of the published designs that compare two arms of several."""
    return {name.partition(",")[0]: seeds for name, seeds, paired in designs() if seeds > 1 and not paired}


def drawn() -> None:
    """Show the power of a comparison over the seeds per arm, and where the published designs stand."""
    lines = power_curves()
    display(figures.show(figures.power_curves(lines, target=power.TARGET, marks=single())))
    # By more than the error of the simulation.
    above = [seeds for line in lines.values() for seeds in line["seeds"][line["simulated"] > line["high"] + 0.01]]
    if above:
        said = (
            f"With up to {max(above)} seeds points lie above a band: so few scores are not normal, as lines take them."
        )
        display(Markdown(said))


def tables() -> None:
    """Show the spread of the published replicates, and what it means for each published design."""
    spread, *_, theirs = spreads().values()
    each = f"with a power of {power.TARGET:.0%}; in brackets at the ends of the spread's {power.LEVEL:.0%} interval."
    report.show(
        spread_lines(),
        "Pooled standard deviations of the metric, as if runs were independent and normal. Report 2's has five "
        "factors, that of Brongers et al. six. The second line holds should equal seeds give alike runs, the third "
        "as FactorVAE is the same algorithm by this code. "
        "Data: Jesus, Veenker, Waller, Ren (2021), MIT License.",
    )
    report.show(seeds_to_find(spread), f"Seeds per arm that find the paper's difference {each}")
    least = findable({"Report 2's AD-FactorVAE": spread, "Brongers et al.": theirs})
    report.show(least, f"The least difference that each published design finds {each}")


def told() -> Markdown:
    """What the spread means for the paper's differences, and for the designs of the others."""
    spread, *others, brongers = spreads().values()
    differences, (most, fewest), (second, third) = list(paper_differences().values()), needed(), single().values()
    least = [power.smallest_difference(*one) for one in ((spread.sd, second), (spread.sd, third), (brongers.sd, third))]
    groups = zip(("of equal λ too", "with FactorVAE", "FactorVAE alone"), others, strict=True)
    counted = ", ".join(f"{of.sd:.3f} ({name})" for name, of in groups)
    takes = ", ".join(str(power.seeds_needed(min(differences), of.sd)) for of in others)
    return Markdown(
        f"At the spread of the second report's runs of AD-FactorVAE, {spread.sd:.3f}, finding the paper's differences "
        f"of {min(differences):.3f} to {max(differences):.3f} (read off its figure, each to ±{reading_error():.3f}) "
        f"with a power of {power.TARGET:.0%} would take {most} to {fewest} seeds per arm (each of the two models "
        f"compared). Counted otherwise, these runs spread by {counted}, and the least difference takes {takes} seeds. "
        f"The {second} seeds of the second report would find {least[0]:.2f} or more at one γ, and the {third} of "
        f"Brongers et al. {least[1]:.2f} at that spread and {least[2]:.2f} at their own.\n\nThe paper's differences at "
        f"its {len(differences)} γ vary by {np.std(differences, ddof=1):.3f} (SD); those of single runs would vary by "
        f"{2**0.5 * spread.sd:.3f}, or {2**0.5 * brongers.sd:.3f} at the spread of Brongers et al. It may be chance, "
        "runs that spread less, means of several runs (it does not say), or the reading of its figure."
    )


def power_curves(most: int = 20) -> dict[str, pd.DataFrame]:
    """Power over seeds for the paper's greatest and least difference, at the spread of Report 2's AD-FactorVAE.

    Returns:
        Name of the difference -> columns seeds, power, low and high (at the ends of the spread's interval), and
        simulated, from the errors of these runs as they are.
    """
    runs = next(iter(replicates().values()))
    spread = next(iter(spreads().values()))
    error_N = power.errors(runs["score"].to_numpy(), runs["group"].to_numpy())
    differences = paper_differences()
    ends = [max(differences, key=differences.__getitem__), min(differences, key=differences.__getitem__)]
    return {
        f"{differences[gamma]:.3f}, the paper's at γ {gamma}": pd.DataFrame(
            {
                "seeds": seeds,
                "power": power.power(differences[gamma], spread.sd, seeds),
                "low": power.power(differences[gamma], spread.high, seeds),
                "high": power.power(differences[gamma], spread.low, seeds),
                "simulated": power.simulated_power(differences[gamma], error_N, seeds),
            }
            for seeds in range(2, most + 1)
        )
        for gamma in ends
    }
