"""What the stored models of dSprites say about each claim on disentanglement; see judges.py."""

from collections.abc import Callable, Sequence

import pandas as pd

from expvae_book import names
from expvae_book.judging import (
    Comparison,
    Judge,
    Part,
    Point,
    Verdict,
    chosen,
    decide,
    lacks,
    over_seeds,
    seed_interval,
)
from expvae_book.matching import measure
from expvae_book.publications import select
from expvae_book.runs import Run

GAMMAS = (10, 20, 30, 40)  # of the paper's figure
LAMBDAS = (0.5, 1, 1.5)  # of the second report
LOSS = "liu2020"  # the paper's formula; Brongers et al.'s code computes something else
RECIPES = ("report2", "report1")
WEIGHTS = ("beta", "gamma", "lambda", "attention", "layer", "alpha", "pairs")
METRIC = (names.METRIC, names.REFERENCE, next(iter(names.COLLAPSED)))
OVERLAP = (names.OVERLAP, "conv4", names.PAIRS[0])
COST_MARGIN = 0.02  # of the reconstruction loss, that a better metric may cost

Numbers = dict[int, float]  # by seed


def numbers(runs: Sequence[Run], gamma: int, weight: int | float, number: Sequence[str]) -> Numbers:
    """A number of the models with these weights, by seed."""
    wanted = {"beta": 1, "gamma": gamma, "lambda": weight}
    same = [run for run in runs if {name: run.parameters[name] for name in wanted} == wanted]
    found = {run.parameters["seed"]: measure(run, *number) for run in same}
    return {seed: value[0] for seed, value in found.items() if value}


def difference(name: str, ours: Numbers, theirs: Numbers, sign: int = 1, margin: float = 0.0) -> Comparison | None:
    """How much one of two models of the same seed is above the other, over seeds; None with fewer than two.

    Args:
        name: What it is.
        ours: By seed.
        theirs: By seed.
        sign: 1 where it favours the claim to be above, -1 where below.
        margin: Share of theirs that ours may be on the wrong side.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    changes = [ours[seed] - theirs[seed] for seed in seeds]
    told = sum(changes) / len(changes) if changes else None
    values_S = [sign * change + margin * theirs[seed] for seed, change in zip(seeds, changes, strict=True)]
    return over_seeds(name, values_S, told=told)


def judge(parts_of: Callable[[Sequence[Run], int], tuple[Comparison | None, ...]]) -> Judge:
    """Judge a claim at every γ of the paper, on the models of one recipe and length.

    Args:
        parts_of: From these models and a γ to what has to favour the claim there.
    """

    def decided(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        plain = [run for run in runs if run.parameters["attention"] in ("none", LOSS)]
        plain = [
            run
            for run in plain
            if {run.parameters[name] for name in ("layer", "alpha", "pairs")} <= {"variant", "none"}
        ]
        counted, parts = chosen(plain, RECIPES, *WEIGHTS), []
        steps = f" at {counted[0].record['budget']['used']:,} steps" if counted else ""  # as many in all that count
        for gamma in GAMMAS:
            found = parts_of(counted, gamma)
            lacking = "" if all(found) else f"fewer than two seeds of both{steps}"
            beside = points(counted, gamma, parts_of, reported)
            parts.append(Part(f"γ {gamma}", tuple(filter(None, found)), lacking, beside))
        return decide(parts, counted, lacks(counted, RECIPES) if counted else [])

    return decided


def points(runs: Sequence[Run], gamma: int, of: Callable, reported: pd.DataFrame) -> tuple[Point, ...]:
    """The number that a claim speaks of, of the models with the loss and without, mean and interval over the seeds."""
    found, setting = [], {"dataset": "dSprites", "setting": f"AD-FactorVAE, γ {gamma}"}
    if of is not separates_maps:
        given = select(reported, source="paper", metric="disentanglement metric", **setting)
        found += [Point("published", *row) for row in given[["value", "low", "high"]].to_numpy().tolist()]
    for who, weight in {"ours": 1, "control": 0}.items():
        values = list(numbers(runs, gamma, weight, OVERLAP if of is separates_maps else METRIC).values())
        ends = seed_interval(values) if len(values) > 1 else ()
        found += [Point(who, sum(values) / len(values), *ends)] if values else []
    return tuple(found)


def raises_metric(runs: Sequence[Run], gamma: int) -> tuple[Comparison | None, ...]:
    """That the metric is higher with the loss."""
    return (difference("metric", *(numbers(runs, gamma, weight, METRIC) for weight in (1, 0))),)


def improves_tradeoff(runs: Sequence[Run], gamma: int) -> tuple[Comparison | None, ...]:
    """That the metric is higher with the loss, and the reconstruction costs hardly more."""
    costs = (numbers(runs, gamma, weight, (names.RECONSTRUCTION,)) for weight in (1, 0))
    return *raises_metric(runs, gamma), difference("reconstruction", *costs, sign=-1, margin=COST_MARGIN)


def separates_maps(runs: Sequence[Run], gamma: int) -> tuple[Comparison | None, ...]:
    """That the maps overlap less with the loss."""
    return (difference("overlap", *(numbers(runs, gamma, weight, OVERLAP) for weight in (1, 0)), sign=-1),)


def largest_is_best(runs: Sequence[Run], gamma: int) -> tuple[Comparison | None, ...]:
    """That the largest weight has a higher metric than each smaller one."""
    *smaller, largest = (numbers(runs, gamma, weight, METRIC) for weight in LAMBDAS)
    return tuple(difference(f"metric beside λ {LAMBDAS[place]}", largest, one) for place, one in enumerate(smaller))
