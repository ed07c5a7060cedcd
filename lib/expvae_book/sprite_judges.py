"""The judges of the claims on disentanglement; see judges.py."""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd

from expvae_book import names
from expvae_book.judging import (
    Graded,
    Judge,
    alike,
    graded,
    incomplete,
    judging,
    measured,
    seed_interval,
    unless,
)
from expvae_book.matching import short
from expvae_book.runs import Run

DSPRITES_GAMMAS = (10, 20, 30, 40)  # of the paper's figure
DSPRITES_LAMBDAS = (0.5, 1, 1.5)  # of the second report
DSPRITES_LOSSES = ("liu2020", "report2")  # the paper's formula; Brongers et al.'s code computes something else
DSPRITES_WEIGHTS = {"beta": "β", "gamma": "γ", "lambda": "λ"}
SPRITE_METRIC = (names.METRIC, names.REFERENCE, next(iter(names.COLLAPSED)))
SPRITE_OVERLAP = (names.OVERLAP, "conv4", names.PAIRS[0])

Models = dict[tuple[int | float, int | float, int | float], dict[int, Run]]  # β, γ and λ -> seed -> run


def judge_dsprites(grade: Callable[[Models], int | None], *number: str) -> Judge:
    """Judge a claim on the models of each configuration of dSprites; the worst that can be judged counts.

    Args:
        grade: From the models to 2 held, 1 partly held, 0 did not, or None where models or seeds are missing.
        number: The metric that the evidence shows, its method and its subset.
    """

    def score(run: Run) -> str:
        weights = ", ".join(f"{symbol} {run.parameters[name]}" for name, symbol in DSPRITES_WEIGHTS.items())
        return f"{weights}, seed {run.parameters['seed']}: {number[0]} {run.metric(*number)['value']:.3f}"

    def decide(runs: list[Run], reported: pd.DataFrame) -> Graded:
        grades = [grade(models) for models in _configurations(runs)]
        grades = [of_one for of_one in grades if of_one is not None]
        if not grades:
            return None, "Too few whole runs on the complete release to tell."
        return min(grades), f"{'; '.join(map(score, runs))}."

    return judging(decide, _dsprites_reasons, score, measured(*number))


def _dsprites_reasons(run: Run) -> list[str]:
    as_published = all(run.parameters[name] in ("variant", "none") for name in ("layer", "alpha", "pairs"))
    return [
        incomplete(run),
        short(run),
        unless(run.parameters["attention"] in ("none", *DSPRITES_LOSSES), "the loss of other code"),
        unless(as_published, "a changed loss"),
    ]


def _configurations(runs: Sequence[Run]) -> list[Models]:
    """The models that share all but their weights and seeds; those without the loss belong to those of each loss."""
    configurations = []
    for group in alike(runs, *DSPRITES_WEIGHTS, "seed", "attention", "layer", "alpha", "pairs"):
        for loss in DSPRITES_LOSSES:
            models: Models = {}
            for run in group:
                if run.parameters["attention"] in ("none", loss):
                    weights = tuple(run.parameters[name] for name in DSPRITES_WEIGHTS)
                    models.setdefault(weights, {})[run.parameters["seed"]] = run
            configurations.append(models)
    return configurations


def _by_gamma(
    number: tuple[str, str, str], lambdas: Sequence[int | float], passes: Callable[..., bool | None]
) -> Callable[[Models], int | None]:
    """Grade at how many γ of the paper the numbers by seed, with β = 1 and each λ, pass a test."""

    def grade(models: Models) -> int | None:
        passed = []
        for gamma in DSPRITES_GAMMAS:
            runs = [models.get((1, gamma, weight), {}) for weight in lambdas]
            scores = [pd.Series({seed: run.metric(*number)["value"] for seed, run in one.items()}) for one in runs]
            passed.append(passes(*scores) if min(map(len, scores)) > 1 else None)
        return None if None in passed else graded(all(passed), any(passed))

    return grade


def _raises_metric(without: pd.Series, with_loss: pd.Series) -> bool | None:
    """Whether the paired interval over seeds of the difference in the metric lies above zero."""
    differences = (with_loss - without).dropna()
    return seed_interval(differences)[0] > 0 if len(differences) > 1 else None


def _separates_maps(without: pd.Series, with_loss: pd.Series) -> bool:
    """Whether the interval over seeds of the overlap with the loss lies below the one without."""
    return seed_interval(with_loss)[1] < seed_interval(without)[0]


def _largest_is_best(*scores: pd.Series) -> bool:
    """Whether the interval over seeds of the metric at the largest λ lies above those at the smaller ones."""
    *smaller, largest = map(seed_interval, scores)
    return all(largest[0] > high for _, high in smaller)


grade_dsprites_metric = _by_gamma(SPRITE_METRIC, (0, 1), _raises_metric)
grade_dsprites_maps = _by_gamma(SPRITE_OVERLAP, (0, 1), _separates_maps)
grade_dsprites_weight = _by_gamma(SPRITE_METRIC, DSPRITES_LAMBDAS, _largest_is_best)


def grade_dsprites_tradeoff(models: Models) -> int | None:
    """Whether models with the loss dominate all, or some, of those without, in metric and reconstruction."""

    def mean(runs: dict[int, Run], *number: str) -> float:
        return float(np.mean([run.metric(*number)["value"] for run in runs.values()]))

    def dominated(point: tuple[float, float], by: list[tuple[float, float]]) -> bool:
        return any(score > point[0] and cost <= point[1] for score, cost in by)

    wanted = {(1, gamma, weight) for gamma in DSPRITES_GAMMAS for weight in (0, 1)}
    if not wanted <= models.keys() or all(gamma for _, gamma, _ in models):  # a β-VAE belongs to the claim
        return None
    if min(len(models[key]) for key in wanted) < 2:
        return None
    points = {key: (mean(runs, *SPRITE_METRIC), mean(runs, names.RECONSTRUCTION)) for key, runs in models.items()}
    ours = [point for (_, _, weight), point in points.items() if weight]
    others = [point for (_, _, weight), point in points.items() if not weight]
    beaten = [dominated(point, ours) for point in others]
    return graded(all(beaten), any(beaten) and not any(dominated(point, others) for point in ours))
