"""The models of a grid of β-VAE, FactorVAE and AD-FactorVAE, by their parameters; without torch, for planning."""

from collections.abc import Mapping
from itertools import product
from typing import Any

import pandas as pd


def grid(
    gammas: str, lambdas: str, betas: str, seeds: int, shared: Mapping[str, Any], choices: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The parameters of every model of a grid: FactorVAE for λ = 0, AD-FactorVAE for the others, and β-VAE.

    Args:
        gammas: Weights γ of the total correlation, with commas between them.
        lambdas: Weights λ of the attention loss, likewise; every one is combined with every γ.
        betas: Weights β of the KL term of models without both losses, likewise; empty for none.
        seeds: Number of seeds, from 0 on.
        shared: Parameters that all models share.
        choices: attention, layer, alpha and pairs: the variant of the loss and what differs from it. Models without the
            loss have "none" for each, so that they are the same whatever variant is asked for.

    Raises:
        ValueError: If a weight is no number of 0 or more, or nothing is asked for.
    """
    without = dict.fromkeys(choices, "none")
    lines = [
        {"beta": 1, "gamma": gamma, "lambda": weight, **(dict(choices) if weight else without)}
        for gamma, weight in product(_weights("gammas", gammas), _weights("lambdas", lambdas))
    ]
    lines += [{"beta": beta, "gamma": 0, "lambda": 0, **without} for beta in _weights("betas", betas)]
    if not lines:
        raise ValueError("gammas and lambdas must name at least one model, or betas one; both are empty")
    return [line | {"seed": seed} | dict(shared) for line in lines for seed in range(seeds)]


def _weights(name: str, text: str) -> list[int | float]:
    parts = pd.Series([part.strip() for part in text.split(",") if part.strip()], dtype=str)
    weights = pd.to_numeric(parts, errors="coerce")
    if not weights.between(0, float("inf"), inclusive="left").all():
        raise ValueError(f"{name} must be numbers of 0 or more with commas between them, as 10,40; got {text!r}")
    return [int(value) if value == int(value) else value for value in weights.unique().tolist()]
