"""dSprites: train a grid of models side by side, and store what is measured of each.

A job is one model, and a page shows several; `expvae_book.disentanglement` says what is measured.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32
from matplotlib.figure import Figure
from torch import Tensor
from tqdm import tqdm

from expvae_book import devices, disentanglement, factorvae, figures, names, probes, recipes, runs
from expvae_book.chapters import Job
from expvae_book.data import dsprites
from expvae_book.factorvae import VARIANTS, Candidate, Trained

COLUMNS = 6  # values of each factor that are shown
STILL = (0, 2, 5, 0, 16, 16)  # where the others are then: a large heart in the middle


def load(data: str, device: str) -> dsprites.Sprites:
    """All sprites where the models are trained; data as for `expvae_book.data.dsprites.load`."""
    return dsprites.load(data).to(devices.choose_device(device))


def strip(sprites: dsprites.Sprites) -> Figure:
    """A sprite while one factor at a time runs through its values, or some of them."""
    rows = {}
    for place, (name, size) in enumerate(zip(dsprites.FACTORS, dsprites.SIZES, strict=True)):
        value_B = torch.arange(size)[:: -(-size // COLUMNS)]
        factors_B6 = torch.tensor(STILL).repeat(len(value_B), 1)
        factors_B6[:, place] = value_B
        x_BYX = sprites.images(dsprites.index_of(factors_B6))[:, 0].float().cpu()
        nothing_BYX = torch.full((COLUMNS - len(value_B), dsprites.SIDE, dsprites.SIDE), torch.nan)
        rows[name] = torch.cat([x_BYX, nothing_BYX])
    return figures.image_rows(rows, maps=[], titles=[""] * COLUMNS, label="", credit=sprites.card.credit, grey="gray")


def candidate(parameters: Mapping[str, Any]) -> Candidate:
    """The model that the parameters describe: its loss is a published variant with what is to differ from it.

    Raises:
        ValueError: If a choice is unknown.
    """
    model = Candidate(beta=float(parameters["beta"]), gamma=float(parameters["gamma"]), seed=parameters["seed"])
    variant = parameters["attention"]
    if not parameters["lambda"]:
        return model
    if variant not in VARIANTS:
        raise ValueError(f"attention must be one of {', '.join(VARIANTS)}; got {variant!r}")
    differing = {name: parameters[name] for name in ("layer", "alpha", "pairs") if parameters[name] != "variant"}
    if differing.get("pairs") == "all":  # of all latents; of a variant's two highest there is but one pair
        differing["maps"] = recipes.DSPRITES[parameters["recipe"]].latent_dim
    return replace(
        model,
        attention_weight=float(parameters["lambda"]),
        penalty=replace(VARIANTS[variant], **differing),
        detached=variant != "brongers2021",
    )


def fit(jobs: Sequence[Job], sprites: dsprites.Sprites) -> list[Trained | None]:
    """The models of the jobs, trained side by side or read from the cache; None for those whose run is stored."""
    missing = [job.parameters for job in jobs if job.run is None]
    if not missing:
        return [None] * len(jobs)
    one, device = missing[0], sprites.pixels.device
    models = factorvae.train(
        [candidate(parameters) for parameters in missing],
        sprites.images,
        disentanglement.split()[0].to(device),
        recipes.DSPRITES[one["recipe"]],
        steps=one["steps"],
        device=device,
        precision=one["precision"],
        data_digest=sprites.card.digest,
        measure=lambda vae: disentanglement.scheduled(vae, sprites),
        measurements=min(disentanglement.MEASUREMENTS, one["steps"] // disentanglement.SPARING),
    )
    trained = iter(models)
    return [next(trained) if job.run is None else None for job in jobs]


def shown(sprites: dsprites.Sprites) -> Float[Tensor, "n 1 64 64"]:
    """The held-out images whose maps are shown."""
    return sprites.images(disentanglement.split()[1][: disentanglement.SHOWN]).float()


def explain(
    jobs: Sequence[Job], models: Sequence[Trained | None], sprites: dsprites.Sprites, layer: str
) -> dict[str, Float32[np.ndarray, "n 2 h w"]]:
    """Of every model of seed 0 the maps of the images shown, those of the two latents with the highest response.

    Args:
        jobs: The jobs.
        models: Their models, as `fit` gives them.
        sprites: The sprites.
        layer: Where the maps are taken; that of the paper's variant where this one's maps have a single position.
    """
    layer = layer if layer in names.SPATIAL else names.SPATIAL[-1]
    return {
        names.title(job.parameters): job.run.arrays[f"maps {layer}"]
        if trained is None
        else disentanglement.highest(trained.vae, layer, shown(sprites))
        for job, trained in zip(jobs, models, strict=True)
        if job.parameters["seed"] == 0
    }


def measure(jobs: Sequence[Job], models: Sequence[Trained | None], sprites: dsprites.Sprites) -> list[runs.Run]:
    """The runs of the jobs: read, or measured now and each stored at once."""
    pairs = list(zip(jobs, models, strict=True))
    missing = [(job, trained) for job, trained in pairs if trained is not None]
    for job, trained in tqdm(missing, "measuring", unit="model", disable=not missing):
        job.run = save(job.parameters, trained, sprites)
    return [job.run for job in jobs]


def save(parameters: Mapping[str, Any], trained: Trained, sprites: dsprites.Sprites) -> runs.Run:
    """Measure a model and store its run, with a probe by which it can be verified later."""
    started, recipe, device = time.monotonic(), recipes.DSPRITES[parameters["recipe"]], sprites.pixels.device
    rows, arrays = disentanglement.evaluate(trained, sprites, parameters["stride"])
    if parameters["seed"] == 0:
        arrays |= disentanglement.pictured(trained.vae, arrays["traversals"])
    draw, precision = probes.grey(sprites), devices.choose_precision(parameters["precision"], device)
    run = runs.save(
        "disentanglement",
        parameters,
        metrics=rows,
        # A model without a loss has no curve of it.
        losses={name: curve for name, curve in vars(trained.curves).items() if isinstance(curve, list) and curve},
        arrays=arrays,
        figures={},
        card=sprites.card,
        recipe=recipe,
        budget={"unit": "steps", "asked": recipe.steps, "used": trained.steps},
        seconds={"training, all side by side": trained.curves.seconds, "measuring": time.monotonic() - started},
        device=devices.describe_device(device),
        resolved={"precision": precision},
        probe=probes.take(trained.vae, trained.file, draw, "encoder.conv4", parameters["seed"], len(sprites)),
        extra={
            "training": {"precision": precision, "side by side": trained.curves.beside, "device": trained.device},
            "scheduled": trained.curves.measured,
            "weights": {"key": trained.key},
        },
    )
    return probes.verify(run, draw)
