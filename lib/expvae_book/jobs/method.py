"""How the map of an image comes about, and what the batch does to that of the authors' code."""

import time
from collections.abc import Mapping
from functools import partial

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn

from expvae import Attention, Method, attention, kl_divergence
from expvae_book import devices, explanation, figures, probes, recipes, runs, training, truth, weights
from expvae_book.chapters import Job
from expvae_book.jobs.digits import Digits
from expvae_book.jobs.mnist import network
from expvae_book.jobs.steps import Fit
from expvae_book.names import AUROC, BY_BATCH, CANCELLED

RECIPE, LAYER = "liu2020", "encoder.conv2"
RULES = {"paper": "liu2020_paper", "code": "liu2020_code"}
BATCH_SIZES = (1, 2, 8, 32, 128)
NORMALISERS = {BY_BATCH: "batch", "÷ RMS of the image": "image", "not divided": "none"}


def draw(digits: Digits, outlier: int, seed: int) -> tuple[UInt8[Tensor, "1 1 y x"], Int64[Tensor, " n"]]:
    """An image of a digit that is the outlier, and the numbers of inliers and outliers mixed, as in a batch."""
    images, chance = digits.images, torch.Generator().manual_seed(seed)
    outlier_NYX = images.test_NYX[images.test_label_N == outlier]
    x_BYX = outlier_NYX[torch.randint(len(outlier_NYX), (1,), generator=chance)]
    mixed = images.testing([digits.digit, outlier])
    return x_BYX[:, None], mixed[torch.randperm(len(mixed), generator=chance)[:512]]


def fit(job: Job, digits: Digits) -> Fit:
    """The training of a job, once somebody asks for its network."""
    options = {"epochs": job.parameters["epochs"], "seed": job.parameters["seed"]}
    options["device"] = devices.choose_device(job.parameters["device"])
    images = digits.train_NCYX, digits.held_out_NCYX
    return Fit(partial(weights.trained, network(RECIPE), *images, recipes.MNIST[RECIPE], **options))


def explain(job: Job, fit: Fit, x_BCYX: UInt8[Tensor, "b 1 y x"]) -> dict[str, Attention]:
    """Both kinds of map of an image; nothing where the run is stored."""
    if job.run is not None:
        return {}
    model = fit.trained.model
    x_BCYX = training.to_unit(x_BCYX).to(next(model.parameters()).device)
    return attention(model.encode, LAYER, x_BCYX, RULES)


def auroc_rows(model: nn.Module, digits: Digits, mixed_N: Int64[Tensor, " n"], outlier: int, seed: int) -> list[dict]:
    """Pooled pixel AUROC of the authors' map by batch size, with each normaliser."""
    x_NYX, is_outlier_N = digits.images.test_NYX[mixed_N], digits.images.test_label_N[mixed_N] == outlier
    foreign_NYX = truth.ink_truth(training.to_unit(x_NYX), training.to_unit(digits.inlier_NCYX[:, 0]))
    foreign_NYX &= is_outlier_N[:, None, None]
    methods = {
        name: Method(score="sum_of_means", normaliser=normaliser, channels="abs_of_sum")
        for name, normaliser in NORMALISERS.items()
    }
    rows = []
    for size in BATCH_SIZES:
        maps = explanation.explain(model, LAYER, x_NYX[:, None], methods, batch=size, seed=seed)
        rows += explanation.auroc_rows(AUROC, maps, foreign_NYX, subset=str(size), seed=seed)
    return rows


def measure(
    job: Job,
    fit: Fit,
    digits: Digits,
    x_BCYX: UInt8[Tensor, "1 1 y x"],
    maps: Mapping[str, Attention],
    mixed_N: Int64[Tensor, " n"],
) -> runs.Run:
    """The run of a job: read, or measured now and stored."""
    if job.run is not None:
        return job.run
    started, recipe, trained, linear_BIHW = (
        time.monotonic(),
        recipes.MNIST[RECIPE],
        fit.trained,
        maps["paper"].linear_BIHW,
    )
    model, seed, where, x_BCYX = trained.model, job.parameters["seed"], linear_BIHW.device, training.to_unit(x_BCYX)
    cancelled = 1 - linear_BIHW.sum(1).abs().sum() / linear_BIHW.abs().sum()
    with torch.no_grad():
        kl_I = kl_divergence(*model.encode(x_BCYX.to(where)))[0]
    strongest = kl_I.argsort(descending=True)[:5].tolist()
    rows = auroc_rows(model, digits, mixed_N, job.parameters["outlier"], seed)
    probe = probes.take(model, trained.file, digits.images.test_NYX[:, None], LAYER, seed)
    run = runs.save(
        "method",
        job.parameters,
        metrics=[runs.row(CANCELLED, float(cancelled)), *rows],
        losses={},
        arrays={},
        figures={"steps": figures.attention_steps(x_BCYX[0, 0].numpy(), *maps.values(), strongest, digits.credit)},
        card=digits.images.card,
        recipe=recipe,
        budget={"unit": "epochs", "asked": recipe.epochs, "used": job.parameters["epochs"]},
        seconds={"all": trained.history.seconds + time.monotonic() - started},
        device=devices.describe_device(where),
        resolved={"precision": trained.precision},
        probe=probe,
        extra={"strongest": strongest, "weights": {"key": trained.key, "device": trained.device}},
    )
    job.run = probes.verify(run, probe.draw)
    return job.run
