"""What bfloat16 changes in the result: the MNIST VAE in both precisions, from the same seeds.

Both trainings of a seed start from the same weights and draw the same order and noise; they differ in rounding alone.
The mean difference over the seeds is set beside the standard deviation between seeds in float32, which is what chance
alone changes. Rounds are seeds here. Models come from the cache of weights where they are there.
"""

import dataclasses
import statistics
from collections.abc import Mapping

import torch

from expvae.metrics import auroc
from expvae.models import MNISTVAE
from expvae_book import explanation, runs, training, truth, weights
from expvae_book.data import mnist
from expvae_book.data.card import DataCard
from expvae_book.devices import PRECISIONS
from expvae_book.recipes import Recipe

PEERS = ()
DIGIT = 1
PRESETS = ("liu2020_paper", "liu2020_code")
SPREAD, CHANGE = "standard deviation between seeds, float32", "bfloat16 − float32, mean"


@dataclasses.dataclass(frozen=True)
class Task:
    """Digits of one kind to train on, and others with the pixels that are foreign to it.

    Attributes:
        train_NCYX: Training images.
        held_out_NCYX: Held-out images.
        outlier_NCYX: Test images of other digits.
        truth_NYX: Their foreign ink, with a margin of one pixel.
        known: Seed and precision -> the results that a stored run has.
        extra: For the record: what made these.
    """

    train_NCYX: torch.Tensor
    held_out_NCYX: torch.Tensor
    outlier_NCYX: torch.Tensor
    truth_NYX: torch.Tensor
    known: Mapping[tuple[str, str], dict[str, float]]
    extra: Mapping[str, list]


def load(data: str) -> tuple[Task, DataCard]:
    """The digit of the benchmark."""
    images = mnist.load(data)
    train_NCYX, held_out_NCYX = images.training(DIGIT)
    outlier_NCYX = images.test_NYX[images.testing(mnist.outliers(DIGIT))][:, None]
    foreign_NYX = truth.ink_truth(training.to_unit(outlier_NCYX)[:, 0], training.to_unit(train_NCYX)[:, 0], 1)
    known, made = stored(data)
    return Task(train_NCYX, held_out_NCYX, outlier_NCYX, foreign_NYX, known, {"carried": made}), images.card


def stored(data: str) -> tuple[dict[tuple[str, str], dict[str, float]], list[dict]]:
    """The results of a stored run by seed and precision, and by which commit and device each seed was measured."""
    run = runs.load("performance", {"benchmark": "precision", "data": data})
    if run is None or run.outdated or not run.of_data_at_hand:
        return {}, []
    known: dict[tuple[str, str], dict[str, float]] = {}
    for row in run.record["metrics"]:
        if row["subset"]:
            known.setdefault((row["subset"], row["method"]), {})[row["metric"]] = row["value"]
    made = run.record.get("carried", [])
    earlier = {seed for part in made for seed in part["seeds"]}
    seeds = sorted({seed for seed, _ in known} - earlier)
    return known, [*made, {"seeds": seeds, "git": run.record["git"], "device": run.record["device"]}]


def results(task: Task, recipe: Recipe, device: torch.device, seed: int, precision: str) -> dict[str, float]:
    """The negative ELBO of held-out images in nats, and the pixel AUROC of attention by each preset."""
    trained = weights.trained(
        lambda: MNISTVAE(recipe.latent_dim),
        task.train_NCYX,
        task.held_out_NCYX,
        recipe,
        epochs=recipe.epochs,
        seed=seed,
        device=device,
        precision=precision,
    )
    maps = explanation.explain(
        trained.model,
        "encoder.conv2",
        task.outlier_NCYX,
        dict(zip(PRESETS, PRESETS, strict=True)),
        batch=recipe.batch_size,
        seed=seed,
    )
    cost = sum(training.validate(trained.model, task.held_out_NCYX.to(device)))
    return {"negative ELBO": cost} | {
        f"pixel AUROC, {preset}": auroc(map_NYX, task.truth_NYX) for preset, map_NYX in maps.items()
    }


def measure(task: Task, recipe: Recipe, device: torch.device, rounds: int) -> list[dict]:
    """Each seed's results in both precisions, their spread between seeds, and the mean change."""
    found = {
        precision: [
            task.known.get((f"seed {seed}", precision)) or results(task, recipe, device, seed, precision)
            for seed in range(rounds)
        ]
        for precision in PRECISIONS
    }
    rows = []
    for name in found["float32"][0]:
        plain, other = ([result[name] for result in found[precision]] for precision in PRECISIONS)
        for seed, pair in enumerate(zip(plain, other, strict=True)):
            rows += [runs.row(name, value, how, f"seed {seed}") for how, value in zip(PRECISIONS, pair, strict=True)]
        changes = [ours - theirs for theirs, ours in zip(plain, other, strict=True)]
        rows.append(runs.row(name, statistics.mean(changes), CHANGE, low=min(changes), high=max(changes), n=rounds))
        if rounds > 1:
            rows.append(runs.row(name, statistics.stdev(plain), SPREAD, n=rounds))
    return rows
