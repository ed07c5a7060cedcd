"""Anomaly localisation on MVTec AD: train on a category's normal images, explain its test images, measure the maps.

Both MVTec chapters run this, each with its own report's recipe. One category at a time: its images, its model, its
maps and its numbers; the trained weights are kept, so that nothing is trained twice.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor, nn

from expvae import kl_divergence
from expvae.metrics import active_units, confusion
from expvae.models import BrongersMVTecVAE, MVTecVAE, Report2MVTecVAE
from expvae_book import (
    augmentation,
    baselines,
    defects,
    explanation,
    figures,
    measures,
    randomised,
    recipes,
    runs,
    training,
    weights,
)
from expvae_book.data import imagenet, mvtec
from expvae_book.jobs import steps
from expvae_book.names import LAYERS, PRIOR

OWN_NETWORKS = {"brongers2021": BrongersMVTecVAE, "report2_code": Report2MVTecVAE}  # always from random weights
HELD_OUT = 0.2  # of the training images, as in the first report
SHOWN = 4  # defects in a panel
PICTURED = LAYERS[1:2] + LAYERS[3:]  # whose maps of the defects shown are kept; larger ones would fill the record


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
        ValueError: If ImageNet's weights are asked for and cannot be had, or the network of Brongers et al. or of the
            second report's code is asked for with either choice, which they do not have.
    """
    settings = recipes.MVTEC[recipe]
    own = OWN_NETWORKS.get(recipe)
    if own:
        if initial == "imagenet" or encoder == "frozen":
            raise ValueError(
                f"recipe={recipe!r} has a ResNet of its own, from random weights: give initial='auto' or 'random' "
                "and encoder='fine-tuned'"
            )
        return lambda: own(settings.latent_dim), "random, fine-tuned", ""
    load = imagenet.required if initial == "imagenet" else imagenet.load
    start = None if initial == "random" else load()
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
        parameters: recipe, initial, encoder, augmentation, augmented, precision and seed, as the chapters declare them;
            an augmentation at load leaves the originals as many as they are, and does not read augmented.
        device: Where to train.

    Returns:
        The training, and what of it the record keeps: what the encoder starts from, and how many images, before and
        after augmentation, it is trained on.
    """
    make, start, digest = network(parameters["recipe"], parameters["initial"], parameters["encoder"])
    train_NCYX, held_out_NCYX = split(category)
    vary, augmented_NCYX = augmentation.AT_LOAD.get(parameters["augmentation"]), train_NCYX
    if not vary:
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
            vary=vary,
        )

    facts = {"encoder": start, "originals": len(train_NCYX), "images": len(augmented_NCYX)}
    return train, facts | ({"initial weights": digest} if digest else {})


def follow(
    category: mvtec.Category, parameters: Mapping[str, Any], device: torch.device
) -> tuple[weights.Trained, measures.Course, dict[str, Any]]:
    """Train, and measure maps on some test images at its stages; see `trainer` for the arguments and the last value."""
    train, facts = trainer(category, parameters, device)
    some_N = defects.some_of(len(category.test_NCYX), defects.THIRD)
    seen = defects.Seen.of(category, some_N)
    course, batch = measures.Course(), recipes.MVTEC[parameters["recipe"]].batch_size
    places = baselines.places(split(category)[0], int(seen.known_N.sum()))
    for done, trained in measures.stages(train, parameters["epochs"]):
        if not seen.masked:
            continue
        # Batch normalisation has seen no image before the first step.
        model = trained.model if done else randomised.settle(trained.model, split(category)[0])
        late = not done or done >= defects.LATE * parameters["epochs"]
        maps = explained(model, category, seen, defects.FOLLOWED + (defects.FOLLOWED_LATE if late else ()), batch)
        course.add(done * -(-facts["images"] // batch), chain(places.items(), maps), seen.truth)
    speed = trained.history.images / max(trained.history.seconds, 1e-9)
    return trained, course, facts | {"precision": trained.precision, "images_per_second": speed}


def explained(
    model: nn.Module, category: mvtec.Category, seen: defects.Seen, cases: Sequence[tuple], batch: int
) -> Iterator[tuple[str, Float[Tensor, "m y x"]]]:
    """Name and maps of the test images seen that are normal or have a mask, by presets and layers."""
    chosen = {preset for presets, _ in cases for preset in presets}
    normal = explanation.normal_for(chosen, model, split(category)[0])
    options = {"batch": batch, "seed": measures.SEED, "normal": normal, "shuffled": True}
    pairs = [(layer, preset) for presets, layers in cases for layer, preset in product(layers, presets)]
    for name, map_NYX in measures.layers_and_presets(model, pairs, category.test_NCYX[seen.image_N], **options):
        yield name, map_NYX[seen.known_N]


def cascade(
    model: nn.Module, category: mvtec.Category, parameters: Mapping[str, Any]
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """What is left of maps where the layers of the encoder are random; see `expvae_book.randomised`."""
    seen = defects.Seen.of(category, defects.some_of(len(category.test_NCYX)))
    if not seen.masked:
        return [], {}
    make = network(parameters["recipe"], "random", parameters["encoder"])[0]
    batch = recipes.MVTEC[parameters["recipe"]].batch_size
    return randomised.cascade(
        model,
        randomised.others(make, parameters["seed"]),
        split(category)[0],
        lambda one: dict(explained(one, category, seen, defects.RANDOMISED, batch)),
        seen.truth,
    )


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
    return [masked[i] for i in defects.some_of(len(masked), least=SHOWN)]


def pictured(
    model: nn.Module, normal: tuple[Tensor, Tensor], start: nn.Module, category: mvtec.Category
) -> dict[str, np.ndarray]:
    """The maps of the defects shown, of the trained network, with its normal posterior, and of its initial state."""
    normals, arrays = {"trained": normal, "untrained": explanation.normal_posterior(start, split(category)[0])}, {}
    for state, one in {"trained": model, "untrained": start}.items():
        maps = measures.examples(
            one, PICTURED, measures.PRESETS, category.test_NCYX[shown(category)], normals[state], measures.SEED
        )
        arrays |= {f"{state}/{name}": map_BHW for name, map_BHW in maps.items()}
    return arrays


def flagged_counts(category: mvtec.Category, map_NYX: Float[Tensor, "n y x"]) -> dict[str, np.ndarray]:
    """Flagged pixels of each class at a hundred thresholds, in each of the defects shown and in all test images."""
    image_M = torch.tensor([i for i, mask_YX in enumerate(category.test_mask) if mask_YX is not None])
    truth_MYX = torch.stack([category.test_mask[i] for i in image_M])
    threshold_T = np.linspace(0, float(np.quantile(map_NYX.numpy(), 0.999)), 101)[1:]
    table = confusion(map_NYX[image_M], truth_MYX, threshold_T)
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
    make = network(parameters["recipe"], parameters["initial"], parameters["encoder"])[0]  # refuses before it reads
    category = mvtec.load(parameters["category"], parameters["data"])
    recipe, seed = recipes.MVTEC[parameters["recipe"]], parameters["seed"]
    trained, course, facts = follow(category, parameters, device)
    started, model = time.monotonic(), trained.model
    train_NCYX, held_out_NCYX = split(category)
    mean_CYX, everything_NCYX = training.to_unit(train_NCYX).mean(0), torch.cat([category.test_NCYX, held_out_NCYX])
    restored_NCYX = explanation.reconstruct(model, everything_NCYX)
    rows, kl_I = latent_rows(model, category, mean_CYX, restored_NCYX[: len(category.test_NCYX)])
    arrays, drawn, maps = {"kl_per_latent": kl_I}, {}, []
    simple = defects.baseline_maps(everything_NCYX, restored_NCYX, mean_CYX)
    simple[PRIOR] = baselines.position_prior(train_NCYX).expand(len(everything_NCYX), -1, -1)
    if len(category.test_NCYX) > 1:  # no interval comes from one image
        normal = explanation.normal_posterior(model, train_NCYX)
        measured, further, kept = defects.evaluate(model, category, held_out_NCYX, simple, normal, recipe.batch_size)
        maps = [name for name in measured.measured if ", " in name and not name.startswith("mean of ")]
        rows += measured.rows + further + course.rows()
        rows += defects.change_rows(model, category, normal, recipe.batch_size)
        of_cascade, compared = cascade(model, category, parameters)
        rows += of_cascade
        few = [measures.map_name(*pair) for case in defects.CASES if not case[2] for pair in product(case[1], case[0])]
        named = [*maps, *(name for name in simple if name in measured.measured)]
        arrays |= measured.replicates(name for name in named if name not in few)  # no interval is paired with those
        arrays |= course.arrays() | compared
        if seed == 0 and shown(category):
            (map_NYX, flagged) = kept[measures.map_name(*defects.SHOWN_MAP)]
            drawn["defects"] = panel(category, map_NYX, restored_NCYX, flagged)
            start = training.build(make, seed).eval().to(device)
            arrays |= pictured(model, normal, start, category) | flagged_counts(category, map_NYX)
    # As many images as the reports' code took, which turns each as it is read; how long a variant the paper's ten
    # thousand images belong to nobody knows.
    asked, used = (recipe.epochs, facts["originals"]), (len(trained.history.kl), facts["images"])
    return steps.save(
        "mvtec",
        parameters,
        trained,
        recipe,
        metrics=rows,
        arrays=arrays,
        pictures=drawn,
        card=category.card,
        budget=measures.budget("images", recipe, asked=asked, used=used),
        probed=(category.test_NCYX, f"encoder.{defects.SHOWN_MAP[0]}"),
        maps=maps,
        unit="image",
        started=started,
        resolved={"initial": facts["encoder"].partition(",")[0]},
        extra={"training": facts},
    )
