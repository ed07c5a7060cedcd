"""What each choice in making an attention map is worth: one choice changed at a time, the trained model kept as it is.

From a reference method every choice of `expvae.Method` is changed alone, and the method is replaced as a whole
by each other preset. A change is judged by what it does to the pixel AUROC and to the best IoU of the same test images:

    Δ = measure(changed) − measure(reference)

with percentile bootstrap intervals. Whole units (images; of a video its clips) are drawn with replacement, the
reference and every change see the same resamples, and the difference is taken within each resample.

Suffixes as in expvae.attention, and N test images, M those of them that are measured, U units, R resamples, the
first of which is the sample itself, T thresholds.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, Shaped, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from expvae import PRESETS, Channels, Method, Normaliser, TensorChoice
from expvae.metrics import Array, Interval, as_array, confusion, ious, percentile_interval, thresholds
from expvae.metrics import resampled_weights as weights_of_units
from expvae.models import MNISTVAE, UCSDVAE
from expvae_book import devices, explanation, localisation, recipes, runs, training, truth, weights
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
AUROC, IOU = "pixel AUROC", "best IoU (oracle)"
MEASURES = (AUROC, IOU)

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
        batch: Images at a time.
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
    batch: int
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


def resampled_weights(unit_M: Shaped[Array, " m"], resamples: int, seed: int) -> Float[np.ndarray, "r m"]:
    """How often each image is in each resample of the units; the first line is the sample itself.

    The resamples are those of `expvae.metrics.PixelMetrics.intervals` under the same seed.

    Raises:
        ValueError: If there are fewer than two units.
    """
    unit_U, unit_M = np.unique(np.asarray(unit_M), return_inverse=True)
    if len(unit_U) < 2:
        raise ValueError(f"unit_M must name at least two units to resample, got {len(unit_U)}.")
    return weights_of_units(len(unit_U), resamples, seed).astype(np.float64)[:, unit_M]


def resampled(
    map_MYX: Float[Tensor, "m y x"], truth_MYX: Bool[Tensor, "m y x"], weight_RM: Float[np.ndarray, "r m"]
) -> dict[str, Float[np.ndarray, " r"]]:
    """Pixel AUROC and best IoU of every resample of the images, from the flagged pixels of each at many thresholds.

    With TPR_t and FPR_t the shares of flagged pixels at threshold t,

        AUROC = Σ_t (FPR_t − FPR_t+1) (TPR_t + TPR_t+1) / 2    best IoU = max_t TP_t / (P + FP_t)

    The thresholds are those of `expvae.metrics.thresholds`, each with the next higher score, so that scores that many
    pixels share, such as the zeros that a ReLU leaves, stand alone. NaN where a resample lacks a class.
    """
    threshold_T, score_G = thresholds(map_MYX)["best"], np.unique(as_array(map_MYX))
    next_T = np.searchsorted(score_G, threshold_T, side="right")
    threshold_T = np.append(threshold_T, score_G[next_T[next_T < len(score_G)]])
    table = confusion(map_MYX, truth_MYX, np.unique(threshold_T))
    # The lowest threshold flags all pixels, the highest none.
    tp_RT, fp_RT = weight_RM @ table.tp_NT, weight_RM @ table.fp_NT
    area_R = ((fp_RT[:, :-1] - fp_RT[:, 1:]) * (tp_RT[:, :-1] + tp_RT[:, 1:])).sum(1) / 2
    with np.errstate(invalid="ignore"):
        auroc_R = area_R / (tp_RT[:, 0] * fp_RT[:, 0])
    return {AUROC: auroc_R, IOU: ious(table, "pooled", "anomalous", weight_RM).max(1)}


def interval(value_R: Float[np.ndarray, " r"], n: int) -> Interval:
    """The 95 % percentile interval of what the resamples gave, around the value of the sample, which comes first."""
    return percentile_interval(value_R[0], value_R[1:], 0.95, n)


# Models and their test images -----------------------------------------------------------------------------------------


def at_hand(dataset: str, data: str) -> tuple[str, ...]:
    """The models of a data set that can be looked for; of drawn workpieces one category is enough."""
    if dataset != "mvtec":
        return MODELS[dataset]
    return SAMPLE_CATEGORIES if mvtec_is_sample(data) else tuple(mvtec.available())


def mvtec_is_sample(data: str) -> bool:
    """Whether MVTec AD stands for its generated sample."""
    return data == "sample" or (data == "auto" and not mvtec.available())


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
    return {"mnist": _mnist, "ucsd": _ucsd, "mvtec": _mvtec}[parameters["dataset"]](parameters, device)


def _mnist(parameters: Mapping[str, Any], device: torch.device) -> Subject:
    digit, limit, seed = int(parameters["model"]), parameters["images"], parameters["seed"]
    images = mnist.load(parameters["data"])
    chosen = _training(parameters, images.card)
    inlier_NCYX = images.train_NYX[images.train_label_N == digit][:, None]
    train_NCYX, held_out_NCYX = (inlier_NCYX[part] for part in training.hold_out(len(inlier_NCYX)))
    trained, recipe, budget = _trained(
        MNISTVAE, recipes.MNIST, train_NCYX, held_out_NCYX, chosen, images.card, seed, device
    )
    outliers = mnist.OUTLIERS[digit]
    test = torch.nonzero(torch.isin(images.test_label_N, torch.tensor([digit, *outliers])))[:, 0]
    some = _drawn(test, limit, seed).sort().values  # in the order of the files, which mixes the digits
    x_NCYX, measured_N = images.test_NYX[some][:, None], images.test_label_N[some] != digit
    return Subject(
        trained=trained,
        x_NCYX=x_NCYX,
        measured_N=measured_N,
        truth_MYX=truth.ink_truth(
            training.to_unit(x_NCYX[measured_N])[:, 0], training.to_unit(train_NCYX)[:, 0], tolerance=1
        ),
        unit_M=some[measured_N],
        there=len(test),
        batch=recipe.batch_size,
        normal=explanation.normal_posterior(trained.model, train_NCYX),
        card=images.card,
        recipe=recipe,
        budget=budget,
    )


def _ucsd(parameters: Mapping[str, Any], device: torch.device) -> Subject:
    limit, seed = parameters["images"], parameters["seed"]
    clips = ucsd.load(parameters["data"])
    chosen = _training(parameters, clips.card) | {"recipe": parameters["model"]}
    numbers = clips.train_clip_N.unique()
    train_NCYX, held_out_NCYX = (
        clips.train_NYX[torch.isin(clips.train_clip_N, numbers[part])][:, None]
        for part in training.hold_out(len(numbers))
    )
    trained, recipe, budget = _trained(
        UCSDVAE, recipes.UCSD, train_NCYX, held_out_NCYX, chosen, clips.card, seed, device
    )
    there = len(clips.test_NYX)
    some = torch.arange(0, there, -(-there // (limit or there)))  # neighbouring frames are nearly the same image
    mask_N = [clips.test_mask[i] for i in some]
    measured_N = torch.tensor([mask_YX is not None for mask_YX in mask_N])
    return Subject(
        trained=trained,
        x_NCYX=clips.test_NYX[some][:, None],
        measured_N=measured_N,
        truth_MYX=_stacked([mask_YX for mask_YX in mask_N if mask_YX is not None], "UCSD Ped1"),
        unit_M=clips.test_clip_N[some][measured_N],
        there=there,
        batch=recipe.batch_size,
        normal=explanation.normal_posterior(trained.model, train_NCYX),
        card=clips.card,
        recipe=recipe,
        budget=budget,
    )


def _mvtec(parameters: Mapping[str, Any], device: torch.device) -> Subject:
    data = "sample" if mvtec_is_sample(parameters["data"]) else "real"
    category = mvtec.load(parameters["model"], data)
    chosen = _training(parameters, category.card) | {"seed": parameters["seed"]}
    recipe = recipes.MVTEC[chosen["recipe"]]
    with nullcontext() if category.card.generated else weights.cached_only():
        trained, _ = localisation.fit(category, chosen, device)
    known = torch.tensor([i for i, mask_YX in enumerate(category.test_mask) if mask_YX is not None])
    some = _drawn(known, parameters["images"], parameters["seed"])  # at random also within the batches
    return Subject(
        trained=trained,
        x_NCYX=category.test_NCYX[some],
        measured_N=torch.ones(len(some), dtype=torch.bool),
        truth_MYX=_stacked([category.test_mask[i] for i in some], f"MVTec AD {category.name}"),
        unit_M=some,
        there=len(known),
        batch=recipe.batch_size,
        normal=explanation.normal_posterior(trained.model, localisation.split(category)[0]),
        card=category.card,
        recipe=recipe,
        budget={"unit": "images", "asked": recipe.epochs * PAPER_COUNT, "used": trained.history.images},
    )


def _training(parameters: Mapping[str, Any], card: DataCard) -> dict[str, Any]:
    changed = FULL_TRAINING if parameters["trained"] == "fully" else {}
    changed = SAMPLE_TRAINING if card.generated else changed
    return TRAINING[parameters["dataset"]] | changed.get(parameters["dataset"], {})


def _trained(
    network: type[nn.Module],
    table: Mapping[str, Recipe],
    train_NCYX: UInt8[Tensor, "t c y x"],
    held_out_NCYX: UInt8[Tensor, "v c y x"],
    chosen: Mapping[str, Any],
    card: DataCard,
    seed: int,
    device: torch.device,
) -> tuple[weights.Trained, Recipe, dict[str, Any]]:
    recipe = table[chosen["recipe"]]
    with nullcontext() if card.generated else weights.cached_only():
        trained = weights.trained(
            lambda: network(recipe.latent_dim),
            train_NCYX,
            held_out_NCYX,
            recipe,
            epochs=chosen["epochs"],
            seed=seed,
            device=device,
        )
    return trained, recipe, {"unit": "epochs", "asked": recipe.epochs, "used": chosen["epochs"]}


def _stacked(masks: list[Bool[Tensor, "y x"]], name: str) -> Bool[Tensor, "m y x"]:
    if not any(bool(mask_YX.any()) for mask_YX in masks):
        raise FileNotFoundError(f"none of the test images of {name} has a mask with an anomalous pixel")
    return torch.stack(masks)


def _drawn(images: Int64[Tensor, " n"], limit: int, seed: int) -> Int64[Tensor, " k"]:
    """At most so many of the images, all if the limit is 0, in random order."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    return images[order[: limit or None]]


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
        batch=studied.batch,
        seed=seed,
        normal=studied.normal,
    )
    mapped = time.monotonic()
    weight_RM = resampled_weights(studied.unit_M, parameters["resamples"], seed)
    n = len(studied.unit_M.unique())
    drawn = {
        method: resampled(map_NYX[studied.measured_N], studied.truth_MYX, weight_RM)
        for method, map_NYX in tqdm(maps.items(), desc="measures", unit="method")
    }
    rows = [
        runs.row(measure, method=name, **vars(interval(drawn[method][measure], n)))
        for name, method in PRESETS.items()
        if method in drawn
        for measure in MEASURES
    ]
    for reference, found in changed.items():
        for name, method in found.items():
            for measure in MEASURES:
                difference_R = drawn[method][measure] - drawn[PRESETS[reference]][measure]
                rows.append(
                    runs.row(f"{measure}, change", method=name, subset=reference, **vars(interval(difference_R, n)))
                )
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
                "batch": studied.batch,
            },
        },
    )
