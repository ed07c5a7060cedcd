"""Anomaly localisation on MVTec AD: train on a category's normal images, explain its test images, measure the maps.

Both MVTec chapters run this, each with its own report's recipe. One category at a time: its images, its model, its
maps and its numbers; the trained weights are kept, so that nothing is trained twice.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from matplotlib.figure import Figure
from scipy.stats import spearmanr
from torch import Tensor, nn

from expvae import kl_divergence
from expvae.metrics import active_units, auroc_per_image, confusion, fraction_interval
from expvae.models import BrongersMVTecVAE, MVTecVAE
from expvae_book import (
    augmentation,
    baselines,
    choices,
    devices,
    explanation,
    figures,
    measures,
    probes,
    recipes,
    runs,
    training,
    weights,
)
from expvae_book.data import catalogue, imagenet, mvtec
from expvae_book.names import BASELINES, COMMON, FIELDS, LAYERS, MISSED, RESEMBLES, SHARED

HELD_OUT = 0.2  # of the training images, as in the first report
QUANTILE = 0.99  # of the pixels of held-out normal images lie below the threshold that needs no test image
# Presets, layers and images: before the second stage a pass back for each latent would take minutes for all images.
FEW = 32
PER_LATENT, SUMMED = measures.PRESETS[:1], measures.PRESETS[1:]
CASES = ((SUMMED, LAYERS, None), (PER_LATENT, LAYERS[3:], None), (PER_LATENT, LAYERS[:3], FEW))
# While a model is trained, on so few images: the layer that pages show, and the last one.
FOLLOWED = ((SUMMED, (LAYERS[3], LAYERS[5])), (PER_LATENT, LAYERS[5:]))
SHOWN = 4  # defects in a panel
SHOWN_MAP = ("layer2.1.conv1", "liu2020_code")  # in the panel, and behind the explorer of thresholds
PICTURED = LAYERS[1:2] + LAYERS[3:]  # whose maps of the defects shown are kept; larger ones would fill the record

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


def trainer(
    category: mvtec.Category, parameters: Mapping[str, Any], device: torch.device
) -> tuple[Callable[[int], weights.Trained], dict[str, Any]]:
    """How to train the VAE of a category for so many epochs, or to read its weights where that was done before.

    Args:
        category: Its images.
        parameters: recipe, initial, encoder, augmentation, augmented, precision and seed, as the chapters declare them.
        device: Where to train.

    Returns:
        The training, and what of it the record keeps: what the encoder starts from, and how many images, before and
        after augmentation, it is trained on.
    """
    make, start, digest = network(parameters["recipe"], parameters["initial"], parameters["encoder"])
    train_NCYX, held_out_NCYX = split(category)
    augmented_NCYX = augmentation.augment(
        train_NCYX, category.name, parameters["augmentation"], parameters["augmented"], parameters["seed"]
    )

    def train(epochs: int) -> weights.Trained:
        return weights.trained(
            make,
            augmented_NCYX,
            held_out_NCYX,
            recipes.MVTEC[parameters["recipe"]],
            epochs=epochs,
            seed=parameters["seed"],
            device=device,
            variant=", ".join(filter(None, (start, digest))),
            precision=parameters["precision"],
        )

    facts = {"encoder": start, "originals": len(train_NCYX), "images": len(augmented_NCYX)}
    return train, facts | ({"initial weights": digest} if digest else {})


def follow(
    category: mvtec.Category, parameters: Mapping[str, Any], device: torch.device
) -> tuple[weights.Trained, measures.Course, dict[str, Any]]:
    """Train, and measure maps on some test images at its stages; see `trainer` for the arguments and the last value."""
    train, facts = trainer(category, parameters, device)
    image_M, truth = truth_of(category)
    some = some_of(len(image_M), FEW)
    seen = measures.Truth(truth.truth_NYX[some], truth.unit_N[some])
    course, batch = measures.Course(), recipes.MVTEC[parameters["recipe"]].batch_size
    for done, trained in measures.stages(train, parameters["epochs"]):
        if len(some) < 2 or not seen.truth_NYX.any():
            continue
        normal = explanation.normal_posterior(trained.model, split(category)[0])
        x_NCYX, options = category.test_NCYX[seen.unit_N], {"batch": batch, "seed": measures.SEED, "normal": normal}
        maps = (
            measures.layers_and_presets(trained.model, layers, presets, x_NCYX, **options)
            for presets, layers in FOLLOWED
        )
        course.add(done * -(-facts["images"] // batch), chain(*maps), seen)
    speed = trained.history.images / max(trained.history.seconds, 1e-9)
    return trained, course, facts | {"precision": trained.precision, "images_per_second": speed}


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


def truth_of(category: mvtec.Category) -> tuple[Int64[Tensor, " m"], measures.Truth]:
    """The test images that are normal or have a mask, and their anomalous pixels."""
    kept = [i for i, mask_YX in enumerate(category.test_mask) if mask_YX is not None]
    image_M = torch.tensor(kept, dtype=torch.int64)
    masks = [mask_YX for mask_YX in category.test_mask if mask_YX is not None]
    truth_MYX = torch.stack(masks) if masks else torch.zeros(0, *category.test_NCYX.shape[2:], dtype=torch.bool)
    return image_M, measures.Truth(truth_MYX, image_M)


def anomalous_rows(truth_MYX: Bool[Tensor, "m y x"]) -> list[dict]:
    """The share of anomalous pixels, of all images that are measured and of those with a defect."""
    defective_MYX = truth_MYX[truth_MYX.flatten(1).any(1)]
    subsets = {"": truth_MYX, "defective images": defective_MYX}
    return [
        runs.row("anomalous pixels", float(flag_KYX.float().mean()), subset=subset, n=len(flag_KYX))
        for subset, flag_KYX in subsets.items()
    ]


def threshold(map_NYX: Float[Tensor, "n y x"]) -> float:
    """The value below which 99 of 100 pixels of normal images lie."""
    return float(np.quantile(map_NYX.numpy(), QUANTILE))


def missed_rows(
    name: str, map_MYX: Float[Tensor, "m y x"], truth: measures.Truth, defects: Sequence[str] = ()
) -> list[dict]:
    """Single defective images: how many a map misses, and how well it does by kind of defect where these are given."""
    chosen_M = truth.truth_NYX.flatten(1).any(1)
    auroc_K = auroc_per_image(map_MYX[chosen_M], truth.truth_NYX[chosen_M])
    auroc_K = np.where(np.isnan(auroc_K), 0.5, auroc_K)  # an image that is anomalous all over ranks nothing
    rows = [runs.row(MISSED, method=name, **vars(fraction_interval(auroc_K < 0.5)))]
    kind_K = np.array([defects[i] for i in torch.nonzero(chosen_M)[:, 0]] if len(defects) else [])
    for kind, count in zip(*np.unique(kind_K, return_counts=True), strict=True):
        mean = float(auroc_K[kind_K == kind].mean())
        rows.append(runs.row("AUROC within images, mean", mean, name, str(kind), n=int(count)))
    return rows


def resemblance_rows(name: str, map_NYX: Float[Tensor, "n y x"], others: Maps) -> list[dict]:
    """How much of a map all images share, and its rank correlation with other maps of the same images."""
    rows = []
    about_mean = float(((map_NYX - map_NYX.mean(0)) ** 2).mean())
    about_constant = float(((map_NYX - map_NYX.mean()) ** 2).mean())
    if about_constant > 0:  # a map that is the same everywhere shares nothing
        rows.append(runs.row(SHARED, 1 - about_mean / about_constant, name))
    for other, other_NYX in others.items():
        correlation_N = [
            float(spearmanr(ours_YX.flatten(), other_YX.flatten()).statistic)
            for ours_YX, other_YX in zip(map_NYX[:, ::8, ::8], other_NYX[:, ::8, ::8], strict=True)
            if ours_YX.std() > 0 and other_YX.std() > 0
        ]
        if correlation_N:
            rows.append(runs.row(RESEMBLES, float(np.mean(correlation_N)), other, name, n=len(correlation_N)))
    return rows


def latent_rows(
    model: nn.Module,
    category: mvtec.Category,
    mean_CYX: Float[Tensor, "c y x"],
    restored_NCYX: Float[Tensor, "n c y x"],
) -> tuple[list[dict], Float[np.ndarray, " d"]]:
    """What the latents carry, on held-out normal images and on the test images; and what each costs on the former."""
    _, held_out_NCYX = split(category)
    rows = explanation.learned_rows(model, held_out_NCYX, {"mean image": mean_CYX})
    rows.append(runs.row("parameters, trained", sum(value.numel() for value in model.parameters())))
    if len(category.test_NCYX) > 1:
        mu_NI, _ = explanation.encoded(model, category.test_NCYX)
        rows.append(runs.row("active units", active_units(mu_NI), n=len(mu_NI)))
        images = {"images": training.to_unit(category.test_NCYX), "reconstructions": restored_NCYX}
        rows += explanation.spread_rows("images", images)
    return rows, kl_divergence(*explanation.encoded(model, held_out_NCYX)).mean(0).numpy()


# Figures and the run --------------------------------------------------------------------------------------------------


def panel(
    category: mvtec.Category, map_NYX: Float[Tensor, "n y x"], restored_NCYX: Float[Tensor, "_ c y x"], flagged: float
) -> Figure:
    """Some defects: image, mask, reconstruction, map, and the map above a threshold."""
    chosen = shown(category)
    scale = float(np.quantile(map_NYX.numpy(), 0.99)) or 1.0
    return figures.image_rows(
        {
            "image": list(training.to_unit(category.test_NCYX[chosen]).permute(0, 2, 3, 1)),
            "mask": [category.test_mask[i].float() for i in chosen],
            "reconstruction": [restored_NCYX[i].permute(1, 2, 0) for i in chosen],
            "attention": [map_NYX[i] / scale for i in chosen],
            "thresholded": [(map_NYX[i] >= flagged).float() for i in chosen],
        },
        maps=["attention"],
        titles=[category.test_defect[i].replace("_", " ") for i in chosen],
        label="attention / its 99th percentile",
        credit=f"{category.card.credit} {category.card.mark}".strip(),
        grey="gray",
    )


def shown(category: mvtec.Category) -> list[int]:
    """Four defects drawn at random, the same for every job."""
    masked = [i for i, mask_YX in enumerate(category.test_mask) if mask_YX is not None and mask_YX.any()]
    return [masked[i] for i in some_of(len(masked), SHOWN)]


def pictured(model: nn.Module, start: nn.Module, category: mvtec.Category) -> dict[str, np.ndarray]:
    """The maps of the defects shown, of the trained network and of the one that it started from."""
    train_NCYX, _ = split(category)
    arrays = {}
    for state, one in {"trained": model, "untrained": start}.items():
        normal = explanation.normal_posterior(one, train_NCYX)
        maps = measures.examples(
            one, PICTURED, measures.PRESETS, category.test_NCYX[shown(category)], normal, measures.SEED
        )
        arrays |= {f"{state}/{name}": map_BHW for name, map_BHW in maps.items()}
    return arrays


def flagged_counts(category: mvtec.Category, map_NYX: Float[Tensor, "n y x"]) -> dict[str, np.ndarray]:
    """Flagged pixels of each class at a hundred thresholds, in each of the defects shown and in all test images."""
    image_M, truth = truth_of(category)
    threshold_T = np.linspace(0, float(np.quantile(map_NYX.numpy(), 0.999)), 101)[1:]
    table = confusion(map_NYX[image_M], truth.truth_NYX, threshold_T)
    at = [image_M.tolist().index(i) for i in shown(category)]
    counts = {"true": table.tp_NT, "false": table.fp_NT, "anomalous": table.positive_N, "normal": table.negative_N}
    return {"thresholds": threshold_T} | {
        f"flagged/{name}": np.concatenate([of_N[at], of_N.sum(0, keepdims=True)]) for name, of_N in counts.items()
    }


def compute(parameters: Mapping[str, Any], device: torch.device) -> runs.Run:
    """Train and measure one category, and store the run; the job of both MVTec chapters.

    Args:
        parameters: What determines it: category, epochs and data beside what `trainer` needs.
        device: Where to compute.
    """
    network(parameters["recipe"], parameters["initial"], parameters["encoder"])  # refused before images are read
    category = mvtec.load(parameters["category"], parameters["data"])
    settings, seed = recipes.MVTEC[parameters["recipe"]], parameters["seed"]
    trained, course, facts = follow(category, parameters, device)
    started = time.monotonic()
    train_NCYX, held_out_NCYX = split(category)
    mean_CYX = training.to_unit(train_NCYX).mean(0)
    normal = explanation.normal_posterior(trained.model, train_NCYX)
    restored_NCYX = explanation.reconstruct(trained.model, torch.cat([category.test_NCYX, held_out_NCYX]))
    rows, kl_I = latent_rows(trained.model, category, mean_CYX, restored_NCYX[: len(category.test_NCYX)])
    arrays, drawn, maps, probe = {"kl_per_latent": kl_I}, {}, [], None
    masked = any(mask_YX is not None and bool(mask_YX.any()) for mask_YX in category.test_mask)
    if len(category.test_NCYX) > 1 and masked:  # no interval comes from one image
        measured, further, kept = evaluate(trained.model, category, restored_NCYX, mean_CYX, normal, settings)
        maps = [name for name in measured.measured if ", " in name and not name.startswith("mean of ")]
        rows += measured.rows + further + course.rows()
        rows += change_rows(trained.model, category, normal, settings.batch_size)
        arrays |= measured.replicates([*maps, *(name for name in BASELINES if name != COMMON)]) | course.arrays()
        if seed == 0:
            drawn["defects"] = panel(category, *kept)
            start = training.build(network(parameters["recipe"], parameters["initial"], parameters["encoder"])[0], seed)
            arrays |= pictured(trained.model, start.eval().to(device), category)
            arrays |= flagged_counts(category, kept[0])
    losses = {name: value for name, value in vars(trained.history).items() if isinstance(value, list)}
    if len(category.test_NCYX):
        probe = probes.take(trained.model, trained.file, category.test_NCYX, f"encoder.{SHOWN_MAP[0]}", seed)
    used = (len(trained.history.kl), facts["images"])
    run = runs.save(
        "mvtec",
        parameters,
        metrics=rows,
        losses=losses,
        arrays=arrays,
        figures=drawn,
        card=category.card,
        recipe=settings,
        budget=measures.budget("images", settings, asked=(settings.epochs, augmentation.PAPER_COUNT), used=used),
        seconds={"training": trained.history.seconds, "evaluation": time.monotonic() - started},
        device=devices.describe_device(device),
        resolved={"precision": facts["precision"], "initial": facts["encoder"].partition(",")[0]},
        probe=probe,
        extra={
            "training": facts,
            "weights": {"key": trained.key, "device": trained.device},
            "maps": maps,
            "resamples": {"seed": measures.SEED, "unit": "image", "measures": measures.PAIRED},
        },
    )
    return probes.verify(run, probe.draw) if probe else run


def evaluate(
    model: nn.Module,
    category: mvtec.Category,
    restored_NCYX: Float[Tensor, "_ c y x"],
    mean_CYX: Float[Tensor, "c y x"],
    normal: tuple[Tensor, Tensor],
    settings: recipes.Recipe,
) -> tuple[measures.Measured, list[dict], tuple[Tensor, Tensor, float]]:
    """Every map of the test images: its measures, further rows, and what `panel` shows of the map that pages show.

    Args:
        model: The trained VAE.
        category: The images.
        restored_NCYX: Reconstructions of the test images and of the held-out ones after them.
        mean_CYX: The mean training image.
        normal: Mean and log-variance of the posterior of normal images.
        settings: The recipe, for the size of its batches.
    """
    held_out_NCYX, tested = split(category)[1], len(category.test_NCYX)
    image_M, truth = truth_of(category)
    defects = [category.test_defect[i] for i in image_M]
    simple = baseline_maps(torch.cat([category.test_NCYX, held_out_NCYX]), restored_NCYX, mean_CYX)
    grey_NYX = training.to_unit(category.test_NCYX).mean(1)
    others = {name: map_NYX[:tested] for name, map_NYX in simple.items()}
    others |= {"brightness": grey_NYX, "edges": baselines.edges(grey_NYX)}
    measured, further, kept = measures.Measured(), anomalous_rows(truth.truth_NYX), None
    for name, map_NYX in simple.items():
        measured.add(name, map_NYX[image_M], truth, threshold(map_NYX[tested:]))
        further += missed_rows(name, map_NYX[image_M], truth)
    for presets, layers, few in CASES:
        some_N, held_out_V = (some_of(count, few) for count in (tested, len(held_out_NCYX)))
        # Methods that divide by the whole batch would tell defects apart by the folders that they lie in, or normal
        # images by those beside them: batches are put together at random, of test images or of held-out ones alone.
        options = {"batch": settings.batch_size, "seed": measures.SEED, "normal": normal, "shuffled": True}
        of_test, of_held_out = (
            measures.layers_and_presets(model, layers, presets, x_NCYX, **options)
            for x_NCYX in (category.test_NCYX[some_N], held_out_NCYX[held_out_V])
        )
        known_K = torch.isin(some_N, image_M)
        place_K = torch.searchsorted(image_M, some_N[known_K])
        seen = measures.Truth(truth.truth_NYX[place_K], truth.unit_N[place_K])
        if len(seen.unit_N) < 2 or not seen.truth_NYX.any():
            continue
        for (name, map_NYX), (_, normal_NYX) in zip(of_test, of_held_out, strict=True):
            common, common_NYX = f"mean of {name}", normal_NYX.mean(0).expand_as(map_NYX)
            measured.add(name, map_NYX[known_K], seen, threshold(normal_NYX))
            measured.pixels(common, common_NYX[known_K], seen, FIELDS)
            further += missed_rows(name, map_NYX[known_K], seen, [defects[i] for i in place_K])
            further += resemblance_rows(name, map_NYX, {n: o[some_N] for n, o in others.items()} | {common: common_NYX})
            further += measured.differences([name], [common] if few else [*simple, common])
            if name == measures.map_name(*SHOWN_MAP):
                kept = (map_NYX, restored_NCYX, threshold(normal_NYX))
    return measured, further, kept


def change_rows(model: nn.Module, category: mvtec.Category, normal: tuple[Tensor, Tensor], batch: int) -> list[dict]:
    """What one choice of a rule changes in the map that pages show, on some images; see expvae_book.choices."""
    image_M, truth = truth_of(category)
    some = some_of(len(image_M), FEW)
    if not truth.truth_NYX[some].any():
        return []
    return choices.change_rows(
        model,
        f"encoder.{SHOWN_MAP[0]}",
        category.test_NCYX[image_M[some]],
        truth.truth_NYX[some],
        truth.unit_N[some],
        measured_N=torch.ones(len(some), dtype=torch.bool),
        normal=normal,
        batch=batch,
        activation=False,  # a batch normalisation follows the convolution
        resamples=measures.RESAMPLES,
        seed=measures.SEED,
    )


def some_of(count: int, few: int | None) -> Int64[Tensor, " k"]:
    """So few of a number of images, drawn at random, the same for every job; all of them if that is None."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(measures.SEED))
    return order[:few].sort().values
