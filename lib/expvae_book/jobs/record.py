"""How every job that trains a VAE stores its run."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import Tensor

from expvae_book import devices, measures, probes, runs
from expvae_book.data.card import DataCard
from expvae_book.recipes import Recipe
from expvae_book.weights import Trained


def save(
    store: str,
    parameters: Mapping[str, Any],
    trained: Trained,
    recipe: Recipe,
    device: torch.device,
    *,
    metrics: Sequence[dict],
    arrays: Mapping[str, np.ndarray],
    pictures: Mapping[str, Any],
    card: DataCard,
    budget: Mapping[str, Any],
    probed: tuple[UInt8[Tensor, "n c y x"], str],
    maps: Sequence[str],
    unit: str,
    started: float,
    resolved: Mapping[str, str] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> runs.Run:
    """Store what a job found of a trained model, with a probe by which it can be verified later.

    Args:
        store: The chapter, or the store that chapters share.
        parameters: What determines the run.
        trained: The model, and how it came about.
        recipe: Its recipe.
        device: Where it was computed.
        metrics: Rows.
        arrays: Curves, maps and what resamples gave.
        pictures: Figures and animations.
        card: What the data are.
        budget: As `measures.budget` gives it.
        probed: Images that the probe is drawn from, and the layer; no images, no probe.
        maps: Names of the maps of layers by presets.
        unit: What is resampled.
        started: When the evaluation began, by `time.monotonic`.
        resolved: What "auto" came to.
        extra: What else the record holds.
    """
    history, (x_NCYX, layer) = trained.history, probed
    probe = probes.take(trained.model, trained.file, x_NCYX, layer, parameters["seed"]) if len(x_NCYX) else None
    run = runs.save(
        store,
        parameters,
        metrics=metrics,
        losses={name: value for name, value in vars(history).items() if isinstance(value, list)},
        arrays=arrays,
        figures=pictures,
        card=card,
        recipe=recipe,
        budget=budget,
        seconds={"training": history.seconds, "evaluation": time.monotonic() - started},
        device=devices.describe_device(device),
        resolved={"precision": trained.precision, **(resolved or {})},
        probe=probe,
        extra={
            "weights": {"key": trained.key, "device": trained.device},
            "maps": list(maps),
            "resamples": {"seed": measures.SEED, "unit": unit, "measures": measures.PAIRED},
            **(extra or {}),
        },
    )
    return probes.verify(run, probe.draw) if probe else run


def training_facts(trained: Trained, images: int) -> dict[str, int | float]:
    """How many images a model was trained on, and how many of them a second."""
    return {"images": images, "images_per_second": trained.history.images / max(trained.history.seconds, 1e-9)}
