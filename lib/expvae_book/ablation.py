"""The ablation chapter's models, their test images, and its runs; what is measured of them is in expvae_book.choices.

Suffixes as in expvae.attention, and N test images, M those of them that are measured.
"""

import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Int64, UInt8
from torch import Tensor, nn

from expvae.models import MNISTVAE, UCSDVAE
from expvae_book import choices, devices, explanation, recipes, runs, training, truth, weights
from expvae_book.data import mnist, mvtec, ucsd
from expvae_book.data.card import DataCard
from expvae_book.jobs import mvtec as workpieces
from expvae_book.recipes import Recipe

MODELS = {"mnist": ("1", "3"), "ucsd": ("report1",), "mvtec": mvtec.CATEGORIES}  # digits, a recipe, categories
# As the chapters train by default, so that their weights are found, and for the samples as `make reproduce` does.
TRAINING = {
    "mnist": {"recipe": "liu2020", "epochs": 100},
    "ucsd": {"recipe": "report1", "epochs": 60},
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
    "mvtec": {"augmented": recipes.PAPER_COUNT, "epochs": recipes.MVTEC["report1"].epochs},
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
    train = workpieces.trainer(category, chosen | {"device": str(device)})
    trained = train(chosen["epochs"])
    known = torch.tensor([i for i, mask_YX in enumerate(category.test_mask) if mask_YX is not None])
    some = _drawn(known, parameters)  # at random also within the batches
    return Subject(
        trained=trained,
        x_NCYX=category.test_NCYX[some],
        measured_N=torch.ones(len(some), dtype=torch.bool),
        truth_MYX=_stacked([category.test_mask[i] for i in some], f"MVTec AD {category.name}"),
        unit_M=some,
        there=len(known),
        normal=explanation.normal_posterior(trained.model, workpieces.split(category)[0]),
        card=category.card,
        recipe=recipe,
        budget={"unit": "images", "asked": recipe.epochs * recipes.PAPER_COUNT, "used": trained.history.images},
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
    rows = choices.rows(
        studied.trained.model,
        LAYERS[dataset],
        studied.x_NCYX,
        studied.truth_MYX,
        studied.unit_M,
        measured_N=studied.measured_N,
        normal=studied.normal,
        batch=studied.recipe.batch_size,
        activation=dataset in BEFORE_ACTIVATION,
        resamples=parameters["resamples"],
        seed=seed,
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
        seconds={"maps and measures": time.monotonic() - started},
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
