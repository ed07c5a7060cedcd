"""The judges of the claims on disentanglement; see judges.py."""

from collections.abc import Callable, Sequence

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

Models = Sequence[Run]  # that share all but their weights and seeds


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
        grades = {grade(models) for models in _configurations(runs) if models} - {None}
        if not grades:
            return None, "Too few whole runs on the complete release to tell."
        return min(grades), f"{'; '.join(map(score, runs))}."

    return judging(decide, _dsprites_reasons, score, measured(*number))


def _dsprites_reasons(run: Run) -> list[str]:
    choices = {run.parameters[name] for name in ("layer", "alpha", "pairs")}
    return [
        incomplete(run),
        short(run),
        unless(run.parameters["attention"] in ("none", *DSPRITES_LOSSES), "the loss of other code"),
        unless(choices <= {"variant", "none"}, "a changed loss"),
    ]


def _configurations(runs: Sequence[Run]) -> list[Models]:
    """The models that share all but their weights and seeds; those without the loss belong to those of each loss."""
    groups = alike(runs, *DSPRITES_WEIGHTS, "seed", "attention", "layer", "alpha", "pairs")
    of_losses = [("none", loss) for loss in DSPRITES_LOSSES]
    return [[run for run in group if run.parameters["attention"] in losses] for group in groups for losses in of_losses]


def _by_seed(models: Models, *number: str) -> pd.DataFrame:
    """A number of the models: a line for each β, γ and λ, a column for each seed, NaN where there is no such model."""
    values = [run.metric(*number)["value"] for run in models]
    places = [tuple(run.parameters[name] for name in (*DSPRITES_WEIGHTS, "seed")) for run in models]
    return pd.Series(values, pd.MultiIndex.from_tuples(places)).unstack()


def _by_gamma(
    number: tuple[str, str, str], lambdas: Sequence[int | float], passes: Callable[..., bool | None]
) -> Callable[[Models], int | None]:
    """Grade at how many γ of the paper the numbers by seed, with β = 1 and each λ, pass a test."""

    def grade(models: Models) -> int | None:
        table = _by_seed(models, *number)
        passed = []
        for gamma in DSPRITES_GAMMAS:
            scores = [table.reindex([(1, gamma, weight)]).iloc[0].dropna() for weight in lambdas]
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
    scores, costs = _by_seed(models, *SPRITE_METRIC), _by_seed(models, names.RECONSTRUCTION)
    seeds = scores.reindex([(1, gamma, weight) for gamma in DSPRITES_GAMMAS for weight in (0, 1)]).count(axis=1)
    _, gammas, lambdas = (scores.index.get_level_values(level) for level in range(3))
    if min(seeds) < 2 or all(gammas):  # a β-VAE belongs to the claim
        return None
    points = pd.DataFrame({"score": scores.mean(axis=1), "cost": costs.mean(axis=1)})
    ours, others = points[lambdas > 0], points[lambdas == 0]
    beaten = _dominated(others, ours)
    return graded(all(beaten), any(beaten) and not any(_dominated(ours, others)))


def _dominated(points: pd.DataFrame, by: pd.DataFrame) -> list[bool]:
    """Of each point, whether another has a higher score at no higher cost."""
    return [bool(((by["score"] > one.score) & (by["cost"] <= one.cost)).any()) for one in points.itertuples()]
