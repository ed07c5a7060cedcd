"""What each choice in making an attention map is worth: one choice changed at a time, the trained model kept as it is.

From a reference method every choice of `expvae.Method` is changed alone, and the method is replaced as a whole
by each other preset. A change is judged by what it does to the pixel AUROC and to the best IoU of the same test images:

    Δ = measure(changed) − measure(reference)

with percentile bootstrap intervals. Whole units (images; of a video its clips) are drawn with replacement, the
reference and every change see the same resamples, and the difference is taken within each resample.

Suffixes as in expvae.attention, and N test images, M those of them that are measured, R resamples, the first of which
is the sample itself.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from expvae import PRESETS, Channels, Method, Normaliser, TensorChoice
from expvae.metrics import PixelMetrics, percentile_interval
from expvae.models import MNISTVAE, UCSDVAE
from expvae_book import devices, explanation, localisation, names, recipes, runs, training, truth, weights
from expvae_book.augmentation import PAPER_COUNT
from expvae_book.data import mnist, mvtec, ucsd
from expvae_book.data.card import DataCard
from expvae_book.recipes import Recipe

REFERENCES = ("liu2020_paper", "liu2020_code")  # what the second report compares
# Not `aggregate`: a sum is a multiple of the mean, which no measure here can tell from it.
CHOICES = {
    "channels": get_args(Channels),
    "normaliser": get_args(Normaliser),
    "score": ("each_mean", "sum_of_means", "each_sample", "normal_difference"),  # the published ones
    "tensor": get_args(TensorChoice),
    "align_corners": (False, True),
}
AUROC, IOU = names.AUROC, names.BEST_IOU
MEASURES = {AUROC: "auroc", IOU: "best_iou"}  # the fields of expvae.metrics.PixelScores

MODELS = {"mnist": ("1", "3"), "ucsd": ("report1",), "mvtec": mvtec.CATEGORIES}  # digits, a recipe, categories
# As the chapters train by default, so that their weights are found, and for the samples as `make reproduce` does.
TRAINING = {
    "mnist": {"recipe": "liu2020", "epochs": 100},
    "ucsd": {"recipe": "report1", "epochs": 30},
    "mvtec": {
        "recipe": "report1",
        "initial": "auto",
        "encoder": "fine-tuned",
        "augmentation": "paper",
        "augmented": 1000,
        "epochs": 3,
        "precision": "auto",
    },
}
# Where the models asked for are those that were trained as long as their recipes say.
FULL_TRAINING = {
    "mnist": {"epochs": recipes.MNIST["liu2020"].epochs},
    "ucsd": {"epochs": recipes.UCSD["report1"].epochs},
    "mvtec": {"augmented": PAPER_COUNT, "epochs": recipes.MVTEC["report1"].epochs},
}
SAMPLE_TRAINING = {"mnist": {}, "ucsd": {"epochs": 6}, "mvtec": {"augmented": 32, "epochs": 1}}
SAMPLE_CATEGORIES = ("bottle",)
LAYERS = {"mnist": "encoder.conv2", "ucsd": "encoder.conv2", "mvtec": "encoder.layer2.1.conv1"}
# Of torchvision's ResNet a batch normalisation, and no activation, follows the convolution directly.
BEFORE_ACTIVATION = ("mnist", "ucsd")


@dataclass(frozen=True)
class Subject:
    """A trained model with the images that its maps are compared on.

    Attributes:
        trained: The model.
        x_NCYX: Test images, in the order of their batches.
        measured_N: Which of them have a truth; the others are there because some methods divide by the whole batch.
        truth_MYX: The anomalous pixels of those.
        unit_M: What each of those is resampled with: itself, or its clip.
        there: Number of test images that there are; x_NCYX may be a part of them.
        normal: Mean and log-variance of the posterior of normal images.
        card: What the images are.
        recipe: How the model was trained.
        budget: How long, as in a record.
    """

    trained: weights.Trained
    x_NCYX: UInt8[Tensor, "n c y x"]
    measured_N: Bool[Tensor, " n"]
    truth_MYX: Bool[Tensor, "m y x"]
    unit_M: Int64[Tensor, " m"]
    there: int
    normal: tuple[Tensor, Tensor]
    card: DataCard
    recipe: Recipe
    budget: dict[str, Any]


def changes(reference: str, activation: bool = True) -> dict[str, Method]:
    """The methods one choice away from a preset, by names such as "normaliser=batch", and the other presets.

    Args:
        reference: A name in `expvae.PRESETS`.
        activation: Whether an activation follows the layer, which methods need that weigh what comes after it.
    """
    start = PRESETS[reference]
    found = {
        f"{choice}={value}": replace(start, **{choice: value})
        for choice, values in CHOICES.items()
        for value in values
        if value != getattr(start, choice)
    }
    found |= {f"preset={name}": method for name, method in PRESETS.items() if name != reference}
    return {name: method for name, method in found.items() if activation or method.tensor == "before"}


# Measures -------------------------------------------------------------------------------------------------------------


def resampled(
    map_MYX: Float[Tensor, "m y x"],
    truth_MYX: Bool[Tensor, "m y x"],
    unit_M: Int64[Tensor, " m"],
    resamples: int,
    seed: int,
) -> dict[str, Float[np.ndarray, " r"]]:
    """Pixel AUROC and best IoU of the images, which come first, and of every resample of their units.

    With TPR_t and FPR_t the shares of flagged pixels at threshold t, over all scores,

        AUROC = Σ_t (FPR_t − FPR_t+1) (TPR_t + TPR_t+1) / 2    best IoU = max_t TP_t / (P + FP_t)

    Maps of the same units under the same seed see the same resamples. NaN where a resample lacks a class.

    Raises:
        ValueError: If there are fewer than two units, or resamples.
    """
    counts = PixelMetrics()
    counts.update(map_MYX, truth_MYX, unit=unit_M)
    whole, drawn = counts.compute(), counts.replicates(seed=seed, resamples=resamples)
    return {name: np.append(getattr(whole, field), drawn[field]) for name, field in MEASURES.items()}


# Models and their test images -----------------------------------------------------------------------------------------


def at_hand(dataset: str, data: str) -> tuple[str, ...]:
    """The models of a data set that can be looked for; of drawn workpieces one category is enough."""
    if dataset != "mvtec":
        return MODELS[dataset]
    there = tuple(mvtec.available())
    return SAMPLE_CATEGORIES if data == "sample" or (data == "auto" and not there) else there


def subject(parameters: Mapping[str, Any], device: torch.device) -> Subject:
    """Load a model and the test images that it is compared on.

    Weights of models of real data come from the cache and are never made here; on a sample, training takes seconds.

    Args:
        parameters: dataset, model, trained ("briefly" as the chapters do by default, "fully" as long as the recipe
            says; a sample is always trained for a minute or two), images (at most so many test images, 0 for all), seed
            and data.
        device: Where the model is.

    Raises:
        expvae_book.weights.NotCachedError: If no chapter has trained the model yet.
        FileNotFoundError: If data="real" and there are none, or no test image has an anomalous pixel.
    """
    load, study = {
        "mnist": (mnist.load, _mnist),
        "ucsd": (ucsd.load, _ucsd),
        "mvtec": (partial(mvtec.load, parameters["model"]), _mvtec),
    }[parameters["dataset"]]
    images = load(parameters["data"])
    with nullcontext() if images.card.generated else weights.cached_only():
        return study(images, _training(parameters, images.card), parameters, device)


def _mnist(images: mnist.MNIST, chosen: dict[str, Any], parameters: Mapping[str, Any], device: torch.device) -> Subject:
    digit = int(parameters["model"])
    train_NCYX, held_out_NCYX = images.training(digit)
    test = images.testing([digit, *mnist.outliers(digit)])
    some = _drawn(test, parameters).sort().values  # in the order of the files, which mixes the digits
    x_NCYX, measured_N = images.test_NYX[some][:, None], images.test_label_N[some] != digit
    return Subject(
        x_NCYX=x_NCYX,
        measured_N=measured_N,
        truth_MYX=truth.ink_truth(
            training.to_unit(x_NCYX[measured_N])[:, 0], training.to_unit(train_NCYX)[:, 0], tolerance=1
        ),
        unit_M=some[measured_N],
        there=len(test),
        card=images.card,
        **_trained(MNISTVAE, recipes.MNIST, train_NCYX, held_out_NCYX, chosen, device),
    )


def _ucsd(clips: ucsd.UCSD, chosen: dict[str, Any], parameters: Mapping[str, Any], device: torch.device) -> Subject:
    numbers = clips.train_clip_N.unique()
    train_NCYX, held_out_NCYX = (
        clips.train_NYX[torch.isin(clips.train_clip_N, numbers[part])][:, None]
        for part in training.hold_out(len(numbers))
    )
    there = len(clips.test_NYX)
    # Neighbouring frames are nearly the same image.
    some = torch.arange(0, there, -(-there // (parameters["images"] or there)))
    mask_N = [clips.test_mask[i] for i in some]
    measured_N = torch.tensor([mask_YX is not None for mask_YX in mask_N])
    return Subject(
        x_NCYX=clips.test_NYX[some][:, None],
        measured_N=measured_N,
        truth_MYX=_stacked([mask_YX for mask_YX in mask_N if mask_YX is not None], "UCSD Ped1"),
        unit_M=clips.test_clip_N[some][measured_N],
        there=there,
        card=clips.card,
        **_trained(UCSDVAE, recipes.UCSD, train_NCYX, held_out_NCYX, chosen | {"recipe": parameters["model"]}, device),
    )


def _mvtec(
    category: mvtec.Category, chosen: dict[str, Any], parameters: Mapping[str, Any], device: torch.device
) -> Subject:
    recipe = recipes.MVTEC[chosen["recipe"]]
    trained, _ = localisation.fit(category, chosen, device)
    known = torch.tensor([i for i, mask_YX in enumerate(category.test_mask) if mask_YX is not None])
    some = _drawn(known, parameters)  # at random also within the batches
    return Subject(
        trained=trained,
        x_NCYX=category.test_NCYX[some],
        measured_N=torch.ones(len(some), dtype=torch.bool),
        truth_MYX=_stacked([category.test_mask[i] for i in some], f"MVTec AD {category.name}"),
        unit_M=some,
        there=len(known),
        normal=explanation.normal_posterior(trained.model, localisation.split(category)[0]),
        card=category.card,
        recipe=recipe,
        budget={"unit": "images", "asked": recipe.epochs * PAPER_COUNT, "used": trained.history.images},
    )


def _training(parameters: Mapping[str, Any], card: DataCard) -> dict[str, Any]:
    dataset = parameters["dataset"]
    changed = FULL_TRAINING if parameters["trained"] == "fully" else {}
    changed = SAMPLE_TRAINING if card.generated else changed
    return TRAINING[dataset] | changed.get(dataset, {}) | {"seed": parameters["seed"]}


def _trained(
    network: type[nn.Module],
    table: Mapping[str, Recipe],
    train_NCYX: UInt8[Tensor, "t c y x"],
    held_out_NCYX: UInt8[Tensor, "v c y x"],
    chosen: Mapping[str, Any],
    device: torch.device,
) -> dict[str, Any]:
    """What a `Subject` holds of the model and its training."""
    recipe, epochs = table[chosen["recipe"]], chosen["epochs"]
    trained = weights.trained(
        lambda: network(recipe.latent_dim),
        train_NCYX,
        held_out_NCYX,
        recipe,
        epochs=epochs,
        seed=chosen["seed"],
        device=device,
    )
    return {
        "trained": trained,
        "normal": explanation.normal_posterior(trained.model, train_NCYX),
        "recipe": recipe,
        "budget": {"unit": "epochs", "asked": recipe.epochs, "used": epochs},
    }


def _stacked(masks: list[Bool[Tensor, "y x"]], name: str) -> Bool[Tensor, "m y x"]:
    if not any(bool(mask_YX.any()) for mask_YX in masks):
        raise FileNotFoundError(f"none of the test images of {name} has a mask with an anomalous pixel")
    return torch.stack(masks)


def _drawn(images: Int64[Tensor, " n"], parameters: Mapping[str, Any]) -> Int64[Tensor, " k"]:
    """At most so many of the images, all if the limit is 0, in random order."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(parameters["seed"]))
    return images[order[: parameters["images"] or None]]


# The run --------------------------------------------------------------------------------------------------------------


def compute(chapter: str, parameters: Mapping[str, Any], device: torch.device) -> runs.Run:
    """Measure every change on one model, and store the run.

    Args:
        chapter: Whose run it is.
        parameters: What `subject` takes, and the number of resamples.
        device: Where to compute.

    Raises:
        expvae_book.weights.NotCachedError: As `subject`.
        FileNotFoundError: As `subject`.
    """
    dataset, seed = parameters["dataset"], parameters["seed"]
    studied = subject(parameters, device)
    started = time.monotonic()
    changed = {name: changes(name, activation=dataset in BEFORE_ACTIVATION) for name in REFERENCES}
    methods = [PRESETS[name] for name in REFERENCES] + [method for each in changed.values() for method in each.values()]
    maps = explanation.explain(
        studied.trained.model,
        LAYERS[dataset],
        studied.x_NCYX,
        {method: method for method in methods},
        batch=studied.recipe.batch_size,
        seed=seed,
        normal=studied.normal,
    )
    mapped = time.monotonic()
    drawn = {
        method: resampled(map_NYX[studied.measured_N], studied.truth_MYX, studied.unit_M, parameters["resamples"], seed)
        for method, map_NYX in tqdm(maps.items(), desc="measures", unit="method")
    }
    n = len(studied.unit_M.unique())

    def row(measure: str, value_R: Float[np.ndarray, " r"], method: str, subset: str = "") -> dict[str, Any]:
        interval = percentile_interval(value_R[0], value_R[1:], 0.95, n)
        return runs.row(measure, method=method, subset=subset, **vars(interval))

    rows = [
        row(measure, drawn[method][measure], name)
        for name, method in PRESETS.items()
        if method in drawn
        for measure in MEASURES
    ]
    rows += [
        row(f"{measure}, change", drawn[method][measure] - drawn[PRESETS[reference]][measure], name, reference)
        for reference, found in changed.items()
        for name, method in found.items()
        for measure in MEASURES
    ]
    rows.append(runs.row("anomalous pixels", float(studied.truth_MYX.float().mean()), n=len(studied.truth_MYX)))
    return runs.save(
        chapter,
        parameters,
        metrics=rows,
        losses={},
        arrays={},
        figures={},
        card=studied.card,
        recipe=studied.recipe,
        budget=studied.budget,
        seconds={"maps": mapped - started, "measures": time.monotonic() - mapped},
        device=devices.describe_device(device),
        resolved={"precision": studied.trained.precision},
        extra={
            "weights": {"key": studied.trained.key, "device": studied.trained.device},
            "test": {
                "images": len(studied.x_NCYX),
                "of": studied.there,
                "measured": len(studied.truth_MYX),
                "unit": "clips" if dataset == "ucsd" else "images",
                "layer": LAYERS[dataset].removeprefix("encoder."),
                "batch": studied.recipe.batch_size,
            },
        },
    )
