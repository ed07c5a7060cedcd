"""MVTec AD: train on a category's normal images, and measure how the maps of every layer find the defects.

A job trains one model of one category and stores what any page will ask of it; both chapters share the store. Of a
user's own images it leaves out what claims alone ask for: the course of the training, and what randomised layers and
other choices of a rule change.
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
    devices,
    explanation,
    figures,
    measures,
    randomised,
    recipes,
    runs,
    training,
    weights,
)
from expvae_book.chapters import Job
from expvae_book.data import card, imagenet, mvtec
from expvae_book.jobs import steps
from expvae_book.names import LAYERS, PRIOR

OWN_NETWORKS = {"brongers2021": BrongersMVTecVAE, "report2_code": Report2MVTecVAE}  # always from random weights
NETWORK = ("recipe", "initial", "encoder")  # parameters that say which
HELD_OUT, LEAST = 0.2, 3  # share of the training images, as in the first report; fewer images leave none to hold out
SHOWN = 4  # defects in a panel
PICTURED = LAYERS[1:2] + LAYERS[3:]  # whose maps of the defects shown are kept; larger ones would fill the record


def load(job: Job) -> mvtec.Category:
    """The images of a job's category.

    Raises:
        ValueError: As for `network`, before anything is read; or if there are too few images to train on.
    """
    network(*(job.parameters[name] for name in NETWORK))
    category = mvtec.load(job.parameters["category"], job.parameters["data"])
    if (count := len(category.train_NCYX)) < LEAST:
        raise ValueError(
            f"train/good of {category.name} holds {count} images; it takes {LEAST} or more, because a fifth is held out"
        )
    return category


def strip(category: mvtec.Category) -> Figure:
    """Training images, and the test images that are shown everywhere, with their masks."""
    chosen = shown(category)[: len(category.train_NCYX)]
    x_BCYX = category.train_NCYX[: len(chosen) or SHOWN]
    rows = {"training": coloured(x_BCYX), **(pictures(category, chosen, "test") if chosen else {})}
    titles = titles_of(category, chosen) or [""] * len(x_BCYX)
    return figures.image_rows(rows, maps=[], titles=titles, label="", credit=category.credit, grey="gray")


def titles_of(category: mvtec.Category, chosen: Sequence[int]) -> list[str]:
    """What these test images are, as figures head them."""
    return [category.test_defect[i].replace("_", " ") for i in chosen]


def coloured(x_BCYX: UInt8[Tensor, "b c y x"]) -> list[Float[Tensor, "y x c"]]:
    """Images as figures take them."""
    return list(training.to_unit(x_BCYX).permute(0, 2, 3, 1))


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


def trainer(category: mvtec.Category, parameters: Mapping[str, Any]) -> Callable[[int], weights.Trained]:
    """How to train the VAE of a category for so many epochs, or to read its weights where that was done before.

    Args:
        category: Its images.
        parameters: recipe, initial, encoder, augmentation, augmented, precision, seed and device, as the chapters
            declare them; augmented is read where images are multiplied before the training.
    """
    make, start, digest = network(*(parameters[name] for name in NETWORK))
    train_NCYX, held_out_NCYX = split(category)
    how, seed = parameters["augmentation"], parameters["seed"]
    if how not in recipes.KEPT:
        train_NCYX = augmentation.augment(train_NCYX, category.name, how, parameters["augmented"], seed)

    def train(epochs: int) -> weights.Trained:
        return weights.trained(
            make,
            train_NCYX,
            held_out_NCYX,
            recipes.MVTEC[parameters["recipe"]],
            epochs=epochs,
            seed=seed,
            device=devices.choose_device(parameters["device"]),
            variant=", ".join(filter(None, (start, digest))),
            precision=parameters["precision"],
            vary=augmentation.AT_LOAD.get(how),
        )

    return train


def facts(category: mvtec.Category, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What a record says of a training: where its encoder starts, and its images before and after augmentation."""
    _, start, digest = network(*(parameters[name] for name in NETWORK))
    originals = len(split(category)[0])
    images = originals if parameters["augmentation"] in recipes.KEPT else parameters["augmented"]
    known = {"encoder": start, "originals": originals, "images": images}
    return known | ({"initial weights": digest} if digest else {})


def fit(job: Job, category: mvtec.Category) -> steps.Fit:
    """The training of a job, whose maps are followed on a third of the test images: see `expvae_book.defects`."""
    train, wanted, course = trainer(category, job.parameters), job.parameters, measures.Course()
    if job.run is not None:
        return steps.Fit(lambda: train(wanted["epochs"]))
    images = facts(category, wanted)["images"]
    seen = defects.Seen.of(category, defects.some_of(len(category.test_NCYX), defects.THIRD))
    batch = recipes.MVTEC[wanted["recipe"]].batch_size
    places = baselines.places(split(category)[0], int(seen.known_N.sum()))
    for done, trained in measures.stages(train, wanted["epochs"]):
        if category.card.own or not seen.masked:
            continue
        # Batch normalisation has seen no image before the first step.
        model = trained.model if done else randomised.settle(trained.model, split(category)[0])
        late = not done or done >= defects.LATE * wanted["epochs"]
        maps = explained(model, category, seen, defects.FOLLOWED + (defects.FOLLOWED_LATE if late else ()), batch)
        course.add(done * -(-images // batch), chain(places.items(), maps), seen.truth)
    job.losses = steps.losses(trained)
    return steps.Fit(lambda: trained, [course])


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
            **pictures(category, chosen),
            "reconstruction": [restored_NCYX[i].permute(1, 2, 0) for i in chosen],
            "attention": [map_NYX[i] / scale for i in chosen],
            "thresholded": [(map_NYX[i] >= flagged).float() for i in chosen],
        },
        maps=["attention"],
        titles=titles_of(category, chosen),
        label="attention / its 99th percentile",
        credit=category.credit,
        grey="gray",
    )


def shown(category: mvtec.Category) -> list[int]:
    """Four defects drawn at random, the same for every job: with a mask, or without where none has one, or normal."""
    masked = [i for i, mask_YX in enumerate(category.test_mask) if mask_YX is not None and mask_YX.any()]
    defective = [i for i, defect in enumerate(category.test_defect) if defect != "good"]
    among = masked or defective or range(len(category.test_NCYX))
    return [among[i] for i in defects.some_of(len(among), least=SHOWN)]


def explain(job: Job, fit: steps.Fit, category: mvtec.Category) -> dict[str, np.ndarray]:
    """The maps of the defects shown, of the trained network and of the one that it started from.

    Of some layers by each preset the mean over the latents at the layer's resolution; as `measures.halved` gives them,
    by names such as "untrained/layer2.1.conv1, liu2020_code".
    """
    if job.run is not None:
        return {name: map_ for name, map_ in job.run.arrays.items() if name.startswith(("trained/", "untrained/"))}
    if not shown(category):
        return {}
    make = network(*(job.parameters[name] for name in NETWORK))[0]
    model, arrays = fit.trained.model, {}
    start = training.build(make, job.parameters["seed"]).eval().to(next(model.parameters()).device)
    for state, one in {"trained": model, "untrained": start}.items():
        normal = explanation.normal_posterior(one, split(category)[0])
        x_BCYX = category.test_NCYX[shown(category)]
        maps = measures.examples(one, PICTURED, measures.PRESETS, x_BCYX, normal, measures.SEED)
        arrays |= {f"{state}/{name}": map_BHW for name, map_BHW in maps.items()}
    return arrays


def pictures(
    category: mvtec.Category, chosen: Sequence[int] | None = None, name: str = "image"
) -> dict[str, figures.Images]:
    """Some test images, by default those that are shown, and their masks; no row of masks where one has none."""
    chosen = shown(category) if chosen is None else chosen
    masks = [category.test_mask[i] for i in chosen]
    known = not any(mask_YX is None for mask_YX in masks)
    images: dict[str, figures.Images] = {name: coloured(category.test_NCYX[chosen])}
    return images | ({"mask": [mask_YX.float() for mask_YX in masks]} if known else {})


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


def measure(job: Job, fit: steps.Fit, category: mvtec.Category) -> runs.Run:
    """The run of a job: read, or measured now and stored."""
    if job.run is not None:
        return job.run
    started, parameters, trained = time.monotonic(), job.parameters, fit.trained
    recipe, known = recipes.MVTEC[parameters["recipe"]], facts(category, parameters)
    rows, arrays, drawn, maps = evaluate(trained.model, category, parameters)
    if parameters["seed"] == 0:
        arrays |= explain(job, fit, category)
    for course in fit.courses:
        rows, arrays = rows + course.rows(), arrays | course.arrays()
    # As many images as the reports' code took, which turns each as it is read; how long a variant the paper's ten
    # thousand images belong to nobody knows.
    asked, used = (recipe.epochs, known["originals"]), (len(trained.history.kl), known["images"])
    job.run = steps.save(
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
        resolved={"initial": known["encoder"].partition(",")[0]},
        extra={"training": known | {"precision": trained.precision} | steps.training_facts(trained, known["images"])},
    )
    return job.run


def evaluate(
    model: nn.Module, category: mvtec.Category, parameters: Mapping[str, Any]
) -> tuple[list[dict], dict[str, np.ndarray], dict[str, Figure], list[str]]:
    """All that a job stores of a trained model beside its course: rows, arrays, of seed 0 pictures; names of maps."""
    train_NCYX, held_out_NCYX = split(category)
    mean_CYX, everything_NCYX = training.to_unit(train_NCYX).mean(0), torch.cat([category.test_NCYX, held_out_NCYX])
    restored_NCYX = explanation.reconstruct(model, everything_NCYX)
    rows, kl_I = latent_rows(model, category, mean_CYX, restored_NCYX[: len(category.test_NCYX)])
    arrays, drawn = {"kl_per_latent": kl_I}, {}
    if len(category.test_NCYX) < 2:  # no interval comes from one image
        return rows, arrays, drawn, []
    simple = defects.baseline_maps(everything_NCYX, restored_NCYX, mean_CYX)
    simple[PRIOR] = baselines.position_prior(train_NCYX).expand(len(everything_NCYX), -1, -1)
    normal, batch = explanation.normal_posterior(model, train_NCYX), recipes.MVTEC[parameters["recipe"]].batch_size
    measured, further, kept = defects.evaluate(model, category, held_out_NCYX, simple, normal, batch)
    rows += measured.rows + further
    if not category.card.own:
        of_cascade, compared = cascade(model, category, parameters)
        rows += defects.change_rows(model, category, normal, batch) + of_cascade
        arrays |= compared
    maps = [name for name in measured.measured if ", " in name and not name.startswith("mean of ")]
    few = [measures.map_name(*pair) for case in defects.CASES if not case[2] for pair in product(case[1], case[0])]
    named = [*maps, *(name for name in simple if name in measured.measured)]
    arrays |= measured.replicates(name for name in named if name not in few)  # no interval is paired with those
    if parameters["seed"] == 0 and shown(category):
        map_NYX, flagged = kept[measures.map_name(*defects.SHOWN_MAP)]
        drawn["defects"] = panel(category, map_NYX, restored_NCYX, flagged)
        arrays |= flagged_counts(category, map_NYX) if category.masked else {}
    return rows, arrays, drawn, maps


def measure_all(jobs: Mapping[str, Job]) -> None:
    """Every job of several categories, one after the other, as far as its images are there."""
    for name, job in jobs.items():
        if job.run is None and card.at_hand(name, job.parameters["data"]):
            category = load(job)
            measure(job, fit(job, category), category)
