"""The ablations on MNIST: one choice in making a map changed at a time, on models that the chapter on MNIST trained.

The jobs of UCSD Ped1 and of MVTec AD store such rows themselves; what is measured, see `expvae_book.choices`.
"""

import time
from collections.abc import Sequence
from contextlib import nullcontext

import torch

from expvae.models import MNISTVAE
from expvae_book import chapters, choices, devices, explanation, recipes, runs, weights
from expvae_book.chapters import Job
from expvae_book.jobs import digits
from expvae_book.jobs.digits import Digits
from expvae_book.weights import Trained

RECIPE = "liu2020"
LAYER = "conv2"


def load(jobs: Sequence[Job]) -> list[Digits]:
    """The digits that each job's model was trained on and is measured on.

    Raises:
        ValueError: If a job asks for the one image that cannot be resampled.
    """
    if any(job.parameters["images"] == 1 for job in jobs):
        raise ValueError("digits must be 0, or 2 or more to resample")
    return [digits.load(job.parameters["data"], int(job.parameters["model"]), RECIPE) for job in jobs]


def fit(jobs: Sequence[Job], seen: Sequence[Digits]) -> list[Trained | None]:
    """The model of each job whose run is not stored: read from the cache, or of the sample trained.

    One of real data that is not there is None, and a notice says which command trains it.
    """
    return [None if job.run is not None else _trained(job, one) for job, one in zip(jobs, seen, strict=True)]


def _trained(job: Job, seen: Digits) -> Trained | None:
    recipe, seed, images = recipes.MNIST[RECIPE], job.parameters["seed"], (seen.train_NCYX, seen.held_out_NCYX)
    options = {"epochs": recipe.epochs, "seed": seed, "device": devices.choose_device(job.parameters["device"])}
    try:
        with nullcontext() if seen.images.card.generated else weights.cached_only():
            return weights.trained(lambda: MNISTVAE(recipe.latent_dim), *images, recipe, **options)
    except weights.NotCachedError:
        command = chapters.command("mnist", {"digit": seen.digit, "seed": seed})
        chapters.notice(f"MNIST, digit {seen.digit}: no trained weights; `{command}` makes them.")
        return None


def measure(jobs: Sequence[Job], seen: Sequence[Digits], models: Sequence[Trained | None]) -> list[runs.Run | None]:
    """The runs of the jobs: read, or measured now and each stored at once; None where there is no model."""
    for job, one, trained in zip(jobs, seen, models, strict=True):
        if trained is not None:
            job.run = save(job, one, trained)
    return [job.run for job in jobs]


def save(job: Job, seen: Digits, trained: Trained) -> runs.Run:
    """Measure every change on one model, and store the run."""
    given, recipe, started = job.parameters, recipes.MNIST[RECIPE], time.monotonic()
    order = torch.randperm(len(seen.label_N), generator=torch.Generator().manual_seed(given["seed"]))
    some = order[: given["images"] or None].sort().values  # in the order of the files, which mixes the digits
    measured_N = seen.outlier_N[some]
    truth_MYX = seen.truths["truth"][some[measured_N]]
    rows = choices.rows(
        trained.model,
        f"encoder.{LAYER}",
        seen.test_NYX[some][:, None],
        truth_MYX,
        some[measured_N],
        measured_N=measured_N,
        normal=explanation.normal_posterior(trained.model, seen.train_NCYX),
        batch=recipe.batch_size,
        activation=True,
        resamples=given["resamples"],
        seed=given["seed"],
    )
    rows.append(runs.row("anomalous pixels", float(truth_MYX.float().mean()), n=len(truth_MYX)))
    test = {"images": len(some), "of": len(order), "measured": len(truth_MYX), "unit": "images"}
    return runs.save(
        job.chapter,
        given,
        metrics=rows,
        losses={},
        arrays={},
        figures={},
        card=seen.images.card,
        recipe=recipe,
        budget={"unit": "epochs", "asked": recipe.epochs, "used": recipe.epochs},
        seconds={"maps and measures": time.monotonic() - started},
        device=devices.describe_device(next(trained.model.parameters()).device),
        resolved={"precision": trained.precision},
        extra={
            "weights": {"key": trained.key, "device": trained.device},
            "test": test | {"layer": LAYER, "batch": recipe.batch_size},
        },
    )
