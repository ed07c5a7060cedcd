"""The steps that jobs share: to train a network and follow its maps on the way, and to store what was found.

A step of a chapter gives what the record of its job holds, and computes only what that lacks.
"""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from expvae_book import devices, measures, probes, runs, weights
from expvae_book.chapters import Job
from expvae_book.data.card import DataCard
from expvae_book.recipes import Recipe
from expvae_book.weights import Trained


@runtime_checkable
class Seen(Protocol):
    """What of a data set a job sees."""

    train_NCYX: UInt8[Tensor, "t c y x"]
    held_out_NCYX: UInt8[Tensor, "v c y x"]
    batch: int

    def places(self, count: int) -> dict[str, Float[Tensor, "count y x"]]:
        """The maps that look at no test image, for so many of them."""

    def explain(
        self, model: nn.Module, which: Tensor, layers: Sequence[str], presets: Sequence[str]
    ) -> Iterable[tuple[str, Float[Tensor, "n y x"]]]:
        """Name and maps of some images, of each layer by each preset."""


@dataclass
class Fit:
    """The training of a job: its network, once somebody asks for that.

    Attributes:
        train: Gives the trained network: that which was trained just now, or trains it, or reads it from the cache.
        courses: What its maps were worth on the way, where it was trained just now.
    """

    train: Callable[[], Trained]
    courses: Sequence[measures.Course] = ()

    @cached_property
    def trained(self) -> Trained:
        """The trained network, and how it came about."""
        return self.train()


def fit(
    job: Job,
    seen: Seen,
    make: Callable[[], nn.Module],
    recipe: Recipe,
    layers: Sequence[str],
    cases: Callable[[], Mapping[str, tuple[Tensor, measures.Truth]]],
) -> Fit:
    """The training of a job: done, where its run is stored, or done now and followed at stages.

    Args:
        job: The job; of its parameters those of the training are read.
        seen: What it sees.
        make: Builds the network.
        recipe: How it is trained.
        layers: Layers whose maps are followed.
        cases: Gives by name the images that they are followed on, as `Seen.explain` takes them, and their truth.
    """
    wanted, device = job.parameters, devices.choose_device(job.parameters["device"])

    def train(epochs: int) -> Trained:
        images = seen.train_NCYX, seen.held_out_NCYX
        options = {"seed": wanted["seed"], "device": device, "precision": wanted["precision"]}
        return weights.trained(make, *images, recipe, epochs=epochs, **options)

    if job.run is not None:
        return Fit(lambda: train(wanted["epochs"]))
    followed = cases()
    courses = {name: measures.Course(name) for name in followed}
    for done, trained in measures.stages(train, wanted["epochs"]):
        steps = done * -(-len(seen.train_NCYX) // recipe.batch_size)
        for name, (which, truth) in followed.items():
            maps = seen.explain(trained.model, which, layers, measures.PRESETS)
            courses[name].add(steps, chain(seen.places(len(which)).items(), maps), truth)
    job.losses = losses(trained)
    return Fit(lambda: trained, list(courses.values()))


def losses(trained: Trained) -> dict[str, list[float]]:
    """The curves of a training."""
    return {name: value for name, value in vars(trained.history).items() if isinstance(value, list)}


def save(
    store: str,
    parameters: Mapping[str, Any],
    trained: Trained,
    recipe: Recipe,
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
        losses=losses(trained),
        arrays=arrays,
        figures=pictures,
        card=card,
        recipe=recipe,
        budget=budget,
        seconds={"training": history.seconds, "evaluation": time.monotonic() - started},
        device=devices.describe_device(next(trained.model.parameters()).device),
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
