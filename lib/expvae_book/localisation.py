"""Anomaly localisation on MVTec AD: train on a category's normal images, explain its test images, measure the maps.

Both MVTec chapters run this, each with its own report's recipe. One category at a time: its images, its model, its
maps and its numbers; the trained weights are kept, so that nothing is trained twice.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn
from tqdm import tqdm

from expvae.metrics import (
    PixelMetrics,
    active_units,
    auroc_difference,
    auroc_per_image,
    fraction_interval,
    iou_intervals,
)
from expvae.models import BrongersMVTecVAE, MVTecVAE
from expvae_book import augmentation, baselines, devices, explanation, figures, probes, recipes, runs, training, weights
from expvae_book.data import catalogue, imagenet, mvtec
from expvae_book.names import (
    ATTENTION,
    BASELINES,
    COMMON,
    DIFFERENCE,
    FIELDS,
    LAYERS,
    METHODS,
    MISSED,
    RESEMBLES,
    SHARED,
)

HELD_OUT = 0.2  # of the training images, as in the first report
QUANTILE = 0.99  # of the pixels of held-out normal images lie below the threshold that needs no test image
SOME = 32  # test images, drawn at random, on which layers and presets are compared
# The paper's preset takes a backward pass for each latent, which before the third stage costs minutes.
CASES = dict.fromkeys(LAYERS, ("liu2020_code", "brongers2021", "normal_difference"))
CASES |= dict.fromkeys(LAYERS[3:], (*CASES[LAYERS[0]], "liu2020_paper"))
SHOWN = 4  # defects in a panel

Maps = dict[str, Float[Tensor, "_ y x"]]  # those of the test images and of held-out ones meet in one call


def chosen(categories: str, protocol: Sequence[str]) -> list[str]:
    """The categories that a chapter is asked for.

    Args:
        categories: "all", or names with commas between them.
        protocol: What "all" stands for.

    Raises:
        ValueError: If a name is not one of the fifteen.
    """
    if categories.strip() == "all":
        return list(protocol)
    names = list(dict.fromkeys(filter(None, (name.strip() for name in categories.split(",")))))
    unknown = [name for name in names if name not in mvtec.CATEGORIES]
    if unknown or not names:
        raise ValueError(f"categories must be all, or some of {', '.join(mvtec.CATEGORIES)}; got {categories!r}")
    return names


def at_hand(categories: Sequence[str], data: str) -> list[str]:
    """Those of the categories that can be computed.

    With data="auto" that is the real ones at hand, and, where nothing of MVTec AD is, all of them as generated samples:
    the two are never mixed.
    """
    there = mvtec.available()
    if data == "sample" or (data == "auto" and not there):
        return list(categories)
    return [category for category in categories if category in there]


# Training -------------------------------------------------------------------------------------------------------------


def split(category: mvtec.Category) -> tuple[UInt8[Tensor, "t c y x"], UInt8[Tensor, "v c y x"]]:
    """The images to train on, and a fifth of the training images that is held out; both are normal."""
    train_N, held_out_N = training.hold_out(len(category.train_NCYX), HELD_OUT)
    return category.train_NCYX[train_N], category.train_NCYX[held_out_N]


def network(recipe: str, initial: str, encoder: str) -> tuple[Callable[[], nn.Module], str, str]:
    """How to build the network of a recipe, and in words what its encoder starts from and whether it learns.

    The third is the SHA-256 of the weights that it starts from, empty for random ones.

    Args:
        recipe: A name in `expvae_book.recipes.MVTEC`.
        initial: "imagenet", "random", or "auto" for ImageNet where its weights can be had.
        encoder: "fine-tuned" or "frozen".

    Raises:
        ValueError: If ImageNet's weights are asked for and cannot be had, or the network of Brongers et al. is asked
            for with either choice, which it does not have.
    """
    settings = recipes.MVTEC[recipe]
    if recipe == "brongers2021":
        if initial == "imagenet" or encoder == "frozen":
            raise ValueError(
                "recipe='brongers2021' has a ResNet of its own, from random weights: give initial='auto' or 'random' "
                "and encoder='fine-tuned'"
            )
        return lambda: BrongersMVTecVAE(settings.latent_dim), "random, fine-tuned", ""
    start = None if initial == "random" else imagenet.load()
    if initial == "imagenet" and start is None:
        raise ValueError(
            f"initial='imagenet' needs {catalogue.IMAGENET_FILE} in the data root, or torchvision's weights of "
            "ResNet-18, which could not be downloaded and are not in torch's cache; initial='random' does without them"
        )
    tensors, word, digest = (None, "random", "") if start is None else (start.tensors, "imagenet", start.sha256)
    return (
        lambda: MVTecVAE(settings.latent_dim, tensors, frozen=encoder == "frozen"),
        f"{word}, {encoder}",
        digest,
    )


def fit(category: mvtec.Category, parameters: Mapping[str, Any], device: torch.device) -> tuple[weights.Trained, dict]:
    """Train the VAE of a category, or read its weights where that was done before.

    Args:
        category: Its images.
        parameters: recipe, initial, encoder, augmentation, augmented, epochs, precision and seed, as the chapters
            declare them.
        device: Where to train.

    Returns:
        The trained model, and what of it the record keeps: what the encoder started from, the precision, and how many
        images, before and after augmentation, it was trained on.
    """
    make, start, digest = network(parameters["recipe"], parameters["initial"], parameters["encoder"])
    train_NCYX, held_out_NCYX = split(category)
    augmented_NCYX = augmentation.augment(
        train_NCYX, category.name, parameters["augmentation"], parameters["augmented"], parameters["seed"]
    )
    trained = weights.trained(
        make,
        augmented_NCYX,
        held_out_NCYX,
        recipes.MVTEC[parameters["recipe"]],
        epochs=parameters["epochs"],
        seed=parameters["seed"],
        device=device,
        variant=", ".join(filter(None, (start, digest))),
        precision=parameters["precision"],
    )
    facts = {
        "encoder": start,
        "precision": trained.precision,
        "originals": len(train_NCYX),
        "images": len(augmented_NCYX),
        "images_per_second": trained.history.images / trained.history.seconds,
    }
    if digest:
        facts["initial weights"] = digest
    return trained, facts


# Maps -----------------------------------------------------------------------------------------------------------------


def baseline_maps(
    x_NCYX: UInt8[Tensor, "n c y x"],
    reconstruction_NCYX: Float[Tensor, "n c y x"],
    mean_CYX: Float[Tensor, "c y x"],
) -> Maps:
    """The maps that need no attention, by their names in BASELINES."""
    names = [name for name in BASELINES if name != COMMON]
    parts = [
        baselines.maps(training.to_unit(x_BCYX), restored_BCYX, mean_CYX, names=names)
        for x_BCYX, restored_BCYX in zip(x_NCYX.split(16), reconstruction_NCYX.split(16), strict=True)
    ]
    return {name: torch.cat([part[name] for part in parts]) for name in names}


# Measures -------------------------------------------------------------------------------------------------------------


def pixel_rows(maps: Maps, held_out: Maps, category: mvtec.Category, seed: int) -> list[dict]:
    """How well each map finds the anomalous pixels of all test images that have a mask or are normal.

    Intervals come from resampling images; differences between attention and the baselines are paired. The threshold
    "from validation" is exceeded by one in a hundred pixels of held-out normal images.
    """
    known_N = torch.tensor([mask_YX is not None for mask_YX in category.test_mask])
    truth_MYX = torch.stack([mask_YX for mask_YX in category.test_mask if mask_YX is not None])
    image_M = torch.nonzero(known_N)[:, 0]
    rows, counts = [], {}
    for name in tqdm(METHODS, desc="pixel measures", unit="map"):
        counts[name] = PixelMetrics(regions=True)
        for part in torch.arange(len(image_M)).split(32):
            counts[name].update(maps[name][image_M[part]], truth_MYX[part], unit=image_M[part])
        measured = counts[name].intervals(seed=seed)
        rows += [runs.row(title, method=name, **vars(measured[field])) for field, title in FIELDS.items()]
    for name in BASELINES:
        change = auroc_difference(counts[ATTENTION], counts[name], seed=seed)
        rows.append(runs.row(DIFFERENCE, method=f"{ATTENTION} − {name}", **vars(change)))
    defective_M = truth_MYX.flatten(1).any(1)
    rows.append(runs.row("anomalous pixels", float(truth_MYX.float().mean()), n=len(truth_MYX)))
    share = float(truth_MYX[defective_M].float().mean())
    rows.append(runs.row("anomalous pixels", share, subset="defective images", n=int(defective_M.sum())))
    for name in (ATTENTION, "reconstruction error"):
        found = iou_intervals(maps[name][known_N], truth_MYX, validation=threshold(held_out[name]), seed=seed)
        for (average, classes, choice), measured in found.items():
            rows.append(runs.row(f"IoU, {average}, {classes}", method=name, subset=choice, **vars(measured)))
    return rows


def threshold(map_NYX: Float[Tensor, "n y x"]) -> float:
    """The value below which 99 of 100 pixels of normal images lie."""
    return float(np.quantile(map_NYX.numpy(), QUANTILE))


def image_rows(maps: Maps, category: mvtec.Category, seed: int) -> list[dict]:
    """Whole images: defective or not, by the mean and by the maximum of the map."""
    truth_N = np.array([defect != "good" for defect in category.test_defect])
    own = {name: maps[name] for name in METHODS if name not in (COMMON, "centre prior")}  # not the same for all images
    means = {name: map_NYX.mean((1, 2)) for name, map_NYX in own.items()}
    maxima = {name: map_NYX.amax((1, 2)) for name, map_NYX in own.items()}
    return [
        row
        for how, scores in {"mean": means, "maximum": maxima}.items()
        for row in explanation.auroc_rows("image AUROC", scores, truth_N, subset=how, seed=seed)
    ]


def map_rows(maps: Maps, category: mvtec.Category) -> list[dict]:
    """Single defective images: which maps miss the anomaly, by kind of defect, and what the attention resembles."""
    chosen = [i for i, mask_YX in enumerate(category.test_mask) if mask_YX is not None and mask_YX.any()]
    truth_MYX = torch.stack([category.test_mask[i] for i in chosen])
    defects = np.array([category.test_defect[i] for i in chosen])
    rows = []
    for name in METHODS:
        auroc_M = auroc_per_image(maps[name][chosen], truth_MYX)
        auroc_M = np.where(np.isnan(auroc_M), 0.5, auroc_M)  # an image that is anomalous all over ranks nothing
        rows.append(runs.row(MISSED, method=name, **vars(fraction_interval(auroc_M < 0.5))))
        rows += [
            runs.row("AUROC within images, mean", float(auroc_M[defects == kind].mean()), name, kind, n=int(count))
            for kind, count in zip(*np.unique(defects, return_counts=True), strict=True)
        ]
    attention_NYX = maps[ATTENTION]
    about_mean = float(((attention_NYX - attention_NYX.mean(0)) ** 2).mean())
    about_constant = float(((attention_NYX - attention_NYX.mean()) ** 2).mean())
    if about_constant > 0:  # a map that is the same everywhere shares nothing
        rows.append(runs.row(SHARED, 1 - about_mean / about_constant))
    x_NYX = training.to_unit(category.test_NCYX).mean(1)
    resembled = {name: maps[name] for name in BASELINES} | {
        "brightness": x_NYX,
        "edges": baselines.edges(x_NYX),
    }
    for name, map_NYX in resembled.items():
        correlation_N = [
            float(spearmanr(ours_YX.flatten(), other_YX.flatten()).statistic)
            for ours_YX, other_YX in zip(attention_NYX[:, ::8, ::8], map_NYX[:, ::8, ::8], strict=True)
            if ours_YX.std() > 0 and other_YX.std() > 0
        ]
        if correlation_N:
            rows.append(runs.row(RESEMBLES, float(np.mean(correlation_N)), name, n=len(correlation_N)))
    return rows


def layer_rows(
    model: nn.Module, category: mvtec.Category, normal: tuple[Tensor, Tensor], *, batch: int, seed: int
) -> list[dict]:
    """The pixel AUROC by layer and preset, on some test images drawn at random."""
    known = torch.tensor([i for i, mask_YX in enumerate(category.test_mask) if mask_YX is not None])
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    chosen = known[order[:SOME]].sort().values
    truth_MYX = torch.stack([category.test_mask[i] for i in chosen])
    if not truth_MYX.any():
        return []
    rows = []
    for layer, presets in CASES.items():
        maps = explanation.explain(
            model,
            f"encoder.{layer}",
            category.test_NCYX[chosen],
            {preset: explanation.method_of(preset) for preset in presets},
            batch=batch,
            seed=seed,
            normal=normal,
            shuffled=True,
        )
        for preset, map_MYX in maps.items():
            counts = PixelMetrics()
            counts.update(map_MYX, truth_MYX, unit=chosen)
            measured = counts.auroc_interval(seed=seed)
            rows.append(runs.row("pixel AUROC, layers and presets", method=layer, subset=preset, **vars(measured)))
    return rows


def latent_rows(
    model: nn.Module,
    category: mvtec.Category,
    mean_CYX: Float[Tensor, "c y x"],
    restored_NCYX: Float[Tensor, "n c y x"],
) -> list[dict]:
    """What the latents carry: on held-out normal images and on the test images."""
    _, held_out_NCYX = split(category)
    rows = explanation.learned_rows(model, held_out_NCYX, {"mean image": mean_CYX})
    rows.append(runs.row("parameters, trained", sum(value.numel() for value in model.parameters())))
    if len(category.test_NCYX) > 1:
        mu_NI, _ = explanation.encoded(model, category.test_NCYX)
        rows.append(runs.row("active units", active_units(mu_NI), n=len(mu_NI)))
        images = {"images": training.to_unit(category.test_NCYX), "reconstructions": restored_NCYX}
        rows += explanation.spread_rows("images", images)
    return rows


# Figures and the run --------------------------------------------------------------------------------------------------


def panel(
    category: mvtec.Category, maps: Maps, held_out: Maps, reconstruction_NCYX: Float[Tensor, "_ c y x"], seed: int
) -> Figure:
    """Four defects drawn at random: image, mask, reconstruction, map, and the map above the threshold."""
    masked = [i for i, mask_YX in enumerate(category.test_mask) if mask_YX is not None and mask_YX.any()]
    order = torch.randperm(len(masked), generator=torch.Generator().manual_seed(seed))
    shown = [masked[i] for i in order[:SHOWN]]
    scale = float(np.quantile(maps[ATTENTION].numpy(), 0.99)) or 1.0
    flagged_NYX = maps[ATTENTION] >= threshold(held_out[ATTENTION])
    return figures.image_rows(
        {
            "image": list(training.to_unit(category.test_NCYX[shown]).permute(0, 2, 3, 1)),
            "mask": [category.test_mask[i].float() for i in shown],
            "reconstruction": [reconstruction_NCYX[i].permute(1, 2, 0) for i in shown],
            "attention": [maps[ATTENTION][i] / scale for i in shown],
            "thresholded": [flagged_NYX[i].float() for i in shown],
        },
        maps=["attention"],
        titles=[category.test_defect[i].replace("_", " ") for i in shown],
        label="attention / its 99th percentile",
        credit=f"{category.card.credit} {category.card.mark}".strip(),
        grey="gray",
    )


def compute(chapter: str, parameters: Mapping[str, Any], device: torch.device) -> runs.Run:
    """Train and measure one category, and store the run.

    Args:
        chapter: Whose run it is.
        parameters: What determines it: category, data, layer and preset beside what `fit` needs.
        device: Where to compute.
    """
    network(parameters["recipe"], parameters["initial"], parameters["encoder"])  # refused before images are read
    category = mvtec.load(parameters["category"], parameters["data"])
    settings, seed = recipes.MVTEC[parameters["recipe"]], parameters["seed"]
    trained, facts = fit(category, parameters, device)
    started = time.monotonic()
    train_NCYX, held_out_NCYX = split(category)
    mean_CYX = training.to_unit(train_NCYX).mean(0)
    normal = explanation.normal_posterior(trained.model, train_NCYX)
    restored_NCYX = explanation.reconstruct(trained.model, torch.cat([category.test_NCYX, held_out_NCYX]))
    tested = len(category.test_NCYX)

    def all_maps(x_NCYX: UInt8[Tensor, "n c y x"], reconstruction_NCYX: Float[Tensor, "n c y x"]) -> Maps:
        attended = explanation.explain(
            trained.model,
            f"encoder.{parameters['layer']}",
            x_NCYX,
            {ATTENTION: explanation.method_of(parameters["preset"])},
            batch=settings.batch_size,
            seed=seed,
            normal=normal,
            shuffled=True,
        )
        return attended | baseline_maps(x_NCYX, reconstruction_NCYX, mean_CYX)

    held_out = all_maps(held_out_NCYX, restored_NCYX[tested:])
    common_YX = held_out[ATTENTION].mean(0)
    held_out[COMMON] = common_YX.expand_as(held_out[ATTENTION])
    rows, drawn = latent_rows(trained.model, category, mean_CYX, restored_NCYX[:tested]), {}
    kinds = {defect != "good" for defect in category.test_defect}
    masked = any(mask_YX is not None and bool(mask_YX.any()) for mask_YX in category.test_mask)
    if tested > 1:  # no interval comes from one image
        maps = all_maps(category.test_NCYX, restored_NCYX[:tested])
        maps[COMMON] = common_YX.expand_as(maps[ATTENTION])
        if kinds == {True, False}:
            rows += image_rows(maps, category, seed)
        if masked:
            rows += pixel_rows(maps, held_out, category, seed)
            rows += map_rows(maps, category)
            rows += layer_rows(trained.model, category, normal, batch=settings.batch_size, seed=seed)
            drawn["defects"] = panel(category, maps, held_out, restored_NCYX, seed)
    losses = {name: value for name, value in vars(trained.history).items() if isinstance(value, list)}
    asked = settings.epochs * augmentation.PAPER_COUNT
    probe = None
    if tested:
        layer = f"encoder.{parameters['layer']}"
        probe = probes.take(trained.model, trained.file, category.test_NCYX, layer, seed)
    run = runs.save(
        chapter,
        parameters,
        metrics=rows,
        losses=losses,
        arrays={},
        figures=drawn,
        card=category.card,
        recipe=settings,
        budget={"unit": "images", "asked": asked, "used": trained.history.images},
        seconds={"training": trained.history.seconds, "evaluation": time.monotonic() - started},
        device=devices.describe_device(device),
        resolved={"precision": facts["precision"], "initial": facts["encoder"].partition(",")[0]},
        probe=probe,
        extra={"training": facts, "weights": {"key": trained.key, "device": trained.device}},
    )
    return probes.verify(run, probe.draw) if probe else run
