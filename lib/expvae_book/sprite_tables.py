"""Tables of the chapter on disentanglement: what its runs say, beside each other and beside the published numbers."""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from expvae_book import judging, names, power, publications
from expvae_book.names import COLLAPSED, METRIC, OVERLAP, PAIRS, PUBLISHED, REFERENCE, SPATIAL
from expvae_book.report import cells
from expvae_book.runs import Run, order

Line = tuple[list[int] | list[float], list[float]]  # where along x, and the values there
Number = tuple[str, ...]  # metric, method and subset of a number, and how it is written

RULES = list(COLLAPSED)
CHOICES = ("attention", "layer", "alpha", "pairs")
SCORE = (METRIC, REFERENCE, RULES[0])
COST = ("reconstruction per image", "", "")
CORRELATION = ("total correlation", "", "")
RESULTS: dict[str, Number] = {
    f"{METRIC} ({REFERENCE})": SCORE,
    f"{METRIC} ({PUBLISHED})": (METRIC, PUBLISHED, RULES[1]),
    "MIG": ("MIG",),
    "DCI disentanglement": ("DCI disentanglement",),
    "completeness": ("DCI completeness",),
    "informativeness": ("DCI informativeness",),
    "Reconstruction, held out (nats)": (*COST, ".2f"),
    "KL (nats)": ("KL per image", "", "", ".2f"),
    "Total correlation (nats)": (*CORRELATION, ".2f"),
    "Active latents": ("active units", "", "", ".0f"),
}
CHANGES: dict[str, Number] = {
    METRIC: SCORE,
    "Reconstruction (nats)": COST,
    "Total correlation (nats)": CORRELATION,
    **{f"AD ratio at conv4, {pairs}": (OVERLAP, "conv4", pairs) for pairs in PAIRS},
}
LOGGED = {
    "reconstruction": "reconstruction (nats)",
    "kl": "KL (nats)",
    "total_correlation": "TC, discriminator's estimate (nats)",
    "attention": "L_AD",
}
SCHEDULED = {METRIC: f"{METRIC}, coarse lattice", "total correlation": "TC by samples, coarse lattice (nats)"}


def title(run: Run) -> str:
    """A model in words, with its seed."""
    return f"{names.title(run.parameters)}, seed {run.parameters['seed']}"


def _with_and_without(found: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Every model that has the attention loss, and beside it the one of the same γ and seed that has not."""
    plain = {(run.parameters["gamma"], run.parameters["seed"]): run for run in found if not run.parameters["lambda"]}
    pairs = [(run, plain.get((run.parameters["gamma"], run.parameters["seed"]))) for run in found]
    return [(run, other) for run, other in pairs if run.parameters["lambda"] and other is not None]


def results(found: Sequence[Run]) -> pd.DataFrame:
    """What each model reaches: the metrics of disentanglement and the losses."""
    return pd.DataFrame({"Model": title(run), **cells(run, RESULTS)} for run in found)


def differences(found: Sequence[Run]) -> pd.DataFrame:
    """What the attention loss changes: AD-FactorVAE minus FactorVAE of the same γ and seed, and over seeds.

    An interval over seeds is Student's, and needs two; a line of one seed has none.
    """
    lines = pd.DataFrame(
        {"γ": run.parameters["gamma"], "λ": run.parameters["lambda"]}
        | {name: _value(run, number) - _value(other, number) for name, number in CHANGES.items()}
        for run, other in _with_and_without(found)
    )
    if lines.empty:
        return lines
    groups = lines.groupby(["γ", "λ"], sort=False)
    table = groups.agg(_mean)
    table.insert(0, "Seeds", groups.size())
    return table.reset_index()


def _value(run: Run, number: Number) -> float:
    return run.metric(*number)["value"] if run.text(*number, lacking="") else np.nan


def _mean(values: pd.Series) -> str:
    """The mean over seeds of what is known, with its interval where that can be."""
    known = values.dropna().tolist()
    if len(known) < 2:
        return "".join(f"{value:+.3f}" for value in known)
    low, high = judging.seed_interval(known)
    return f"{np.mean(known):+.3f} [{low:+.3f}, {high:+.3f}]"


def seed_spread() -> float:
    """How far the seeds of one FactorVAE of Brongers et al. lie apart in their metric."""
    table = publications.select(publications.read(), source="brongers", metric="disentanglement metric")
    return float(np.ptp(table[table["setting"].str.startswith("FactorVAE")]["value"]))


def replicates() -> dict[str, pd.DataFrame]:
    """Published runs that differ within a group by nothing but chance, as far as their code is known.

    Columns: score and group. Those of Report 2's code are taken at the last step that all of them reached. λ never
    reached the gradient there, so that AD-FactorVAE of one γ is one algorithm whatever its λ.
    """
    table = publications.report2_runs().rename(columns={"metric_score": "score"})
    last = table.groupby(["gamma", "lambda", "seed"])["step"].max().min()
    table = table[table["step"] == last].assign(group=lambda runs: runs["gamma"].astype(str))
    trained = table[table["lambda"] > 0]
    theirs = publications.select(publications.read(), source="brongers", metric="disentanglement metric")
    return {
        "Report 2's code, AD-FactorVAE of equal γ": trained,
        "the same, of equal γ and λ": trained.assign(group=trained["group"] + ", " + trained["lambda"].astype(str)),
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


def seeds_to_find(spread: power.Spread) -> pd.DataFrame:
    """How many seeds an arm would need for the paper's differences, at a spread and at the ends of its interval."""

    def needed(delta: float, paired: bool) -> str:
        at, low, high = (power.seeds_needed(delta, sd, paired=paired) for sd in (spread.sd, spread.low, spread.high))
        return f"{at} ({low}–{high})"

    return pd.DataFrame(
        {
            "γ": gamma,
            "Paper's difference": f"{delta:.3f}",
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


def points(found: Sequence[Run]) -> pd.DataFrame:
    """The points of the trade-off figure: ours, the ones read off the paper's figure, and those of Brongers et al.

    Columns: source, kind, label, score, low, high and cost. Costs of Brongers et al. are means over their three seeds.
    """
    lines = [
        {
            "source": "ours",
            "kind": names.title(run.parameters).partition(",")[0],
            "label": str(run.parameters["gamma"] or run.parameters["beta"]),
            "score": score["value"],
            "low": score["low"],
            "high": score["high"],
            "cost": run.metric(*COST)["value"],
        }
        for run in found
        for score in [run.metric(*SCORE)]
    ]
    table = publications.select(publications.read(), table="dsprites")
    costs = publications.select(table, metric="reconstruction loss").set_index("setting")["value"]
    for row in publications.select(table, metric="disentanglement metric").itertuples():
        model = row.setting.partition(", seed")[0]
        kind, _, rest = model.partition(", ")
        lines.append(
            {
                "source": publications.SOURCES[row.source],
                "kind": kind,
                "label": rest.split(" ")[1] if row.source == "paper" else "",
                "score": row.value,
                "low": row.low,
                "high": row.high,
                "cost": costs.get(row.setting, costs.get(f"{model}, mean of the seeds")),
            }
        )
    return pd.DataFrame(lines)


def curves(found: Sequence[Run]) -> dict[str, dict[str, Line]]:
    """The curves of training: panel -> model -> steps and values."""
    panels: dict[str, dict[str, Line]] = {}
    for run in found:
        losses, scheduled = run.record["losses"], run.record["scheduled"]
        lines = {panel: (losses["step"], losses[name]) for name, panel in LOGGED.items() if losses.get(name)}
        if scheduled:
            steps = sorted(map(int, scheduled))
            lines |= {panel: (steps, [scheduled[str(at)][name] for at in steps]) for name, panel in SCHEDULED.items()}
        for panel, line in lines.items():
            panels.setdefault(panel, {})[title(run)] = line
    return panels


def overlaps(found: Sequence[Run], metric: str = OVERLAP) -> pd.DataFrame:
    """How much the maps of every model overlap at every layer, by which pairs; 95 % intervals over images.

    Args:
        found: The models.
        metric: OVERLAP, the AD ratio of the maps as they are, or EQUALISED, that of maps of equal sum.
    """
    return pd.DataFrame(
        {"Model": title(run), "Pairs": pairs}
        | {layer: run.text(metric, layer, pairs, lacking="none") for layer in SPATIAL}
        for pairs in PAIRS
        for run in found
    )


def compared(found: Sequence[Run], layers: Sequence[str], metric: str, pairs: str) -> tuple[int, int, int]:
    """Overlaps of maps with the attention loss against those without, at the same γ and seed.

    Args:
        found: The models.
        layers: Where the maps are taken.
        metric: OVERLAP or EQUALISED.
        pairs: One of PAIRS; models without such a pair are left out.

    Returns:
        In how many cases, a model at a layer, the interval over images lies below, above, and how many there are.
    """
    orders = [
        order(run.metric(metric, layer, pairs), other.metric(metric, layer, pairs))
        for run, other in _with_and_without(found)
        for layer in layers
        if all(model.text(metric, layer, pairs, lacking="") for model in (run, other))
    ]
    return orders.count("below"), orders.count("above"), len(orders)


def ceilings(run: Run) -> pd.DataFrame:
    """What a perfect code scores by each protocol, with spare latents beside it: mean and range of draws."""
    form = "{value:.3f} ({low:.3f}–{high:.3f})"
    return pd.DataFrame(
        {"Perfect code with": spare}
        | {name: form.format(**run.metric("perfect code", name, spare)) for name in (REFERENCE, PUBLISHED)}
        for spare in dict.fromkeys(run.rows("perfect code")["subset"])
    )


def protocols(found: Sequence[Run]) -> pd.DataFrame:
    """The same encodings by every protocol and rule for collapsed latents."""
    columns = {
        f"{prefix}{protocol}; {rule}": (metric, protocol, rule, form)
        for protocol, rule in zip((REFERENCE, PUBLISHED, PUBLISHED), RULES, strict=True)
        for prefix, metric, form in (("", METRIC, ".3f"), ("latents that count; ", "latents that count", ".0f"))
    }
    return pd.DataFrame({"Model": title(run), **cells(run, columns)} for run in found)


def gradients(run: Run) -> pd.DataFrame:
    """How strongly each variant of the loss pulls at a model's encoder at λ = 1, beside the rest of its loss."""
    of_variants = run.metrics[run.metrics["metric"].isin(["L_AD", names.GRADIENT, names.REACHED])]
    measured = of_variants.pivot(index="method", columns="metric", values="value")
    share = measured[names.GRADIENT] / measured.loc["rest of the loss", names.GRADIENT]
    table = pd.DataFrame(
        {
            "L_AD": measured["L_AD"].map("{:.4f}".format),
            "Norm of its gradient": measured[names.GRADIENT].map("{:.2e}".format),
            "as a share of the rest": share.map("{:.1e}".format),
            "Parameters it reaches": measured[names.REACHED].map("{:,.0f}".format),
        }
    )
    return table.loc[run.rows("L_AD")["method"]].rename_axis("Variant").reset_index()


def every_run(stored: Sequence[Run]) -> pd.DataFrame:
    """Every stored model: what it was trained with, and what it reached."""
    return pd.DataFrame(
        {
            "Model": title(run),
            **{name: run.parameters[name] for name in CHOICES},
            "Recipe": run.parameters["recipe"],
            "Steps": f"{run.record['budget']['used']:,} of {run.record['budget']['asked']:,}",
            "Data": run.card.mark or "complete",
            METRIC: run.text(*SCORE),
            "Reconstruction (nats)": run.text(*COST, ".2f"),
            "Total correlation (nats)": run.text(*CORRELATION, ".2f"),
            f"AD ratio at conv4, {PAIRS[0]}": run.text(OVERLAP, "conv4", PAIRS[0], lacking=""),
            "State": run.state,
        }
        for run in stored
    )
