"""Networks that are not the book's: train each for a short while on one digit, and look at its maps at every layer.

Also on images that are not the book's: a folder in MVTec AD's layout.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from IPython.display import Image
from jaxtyping import Float, Int64, UInt8
from matplotlib.figure import Figure
from torch import Tensor, nn

from expvae import attention
from expvae.metrics import active_units
from expvae_book import baselines, devices, explanation, features, figures, measures, recipes, runs, training
from expvae_book.chapters import Job
from expvae_book.data import imagenet, mnist
from expvae_book.data.card import DataCard
from expvae_book.data.mvtec import Category
from expvae_book.jobs import mvtec
from expvae_book.names import ACTIVE, AUROC, ERROR, MASS, PICTURES

RECIPE = recipes.MNIST["liu2020"]
PART_EPOCHS = 60  # passes over the few images of a part
FEATURES = {"imagenet": "PaDiM, ImageNet's features", "random": "PaDiM, random features"}
Explained = tuple[Tensor, Tensor, Tensor]  # maps, the latents of highest response, and their maps


@dataclass(frozen=True)
class Network:
    """A VAE, and where its attention is taken.

    Attributes:
        make: Builds it.
        encode: From the VAE to the callable that encodes images.
        layer: The layer whose maps are shown.
        layers: All layers that are looked at.
    """

    make: Callable[[], nn.Module]
    encode: Callable[[nn.Module], Callable[[Tensor], Any]]
    layer: str
    layers: Sequence[str]


@dataclass(frozen=True)
class Images:
    """The digits that a job sees.

    Attributes:
        train_NCYX: Training images of one digit.
        held_out_NCYX: Held-out ones.
        x_NCYX: Test images of all digits, in [0, 1].
        label_N: What they show.
        known_N: Which show the digit of the training.
        shown_K: Numbers of two of those and of six others, drawn at random.
        card: What the data are.
    """

    train_NCYX: UInt8[Tensor, "t 1 y x"]
    held_out_NCYX: UInt8[Tensor, "v 1 y x"]
    x_NCYX: Float[Tensor, "n 1 y x"]
    label_N: Int64[Tensor, " n"]
    known_N: Tensor
    shown_K: Int64[Tensor, " k"]
    card: DataCard


def load(data: str, digit: int, seed: int) -> Images:
    """The images of a digit; data as for `expvae_book.data.mnist.load`."""
    images = mnist.load(data)
    train_NCYX, held_out_NCYX = images.training(digit)
    label_N = images.test_label_N
    order_N = torch.randperm(len(label_N), generator=torch.Generator().manual_seed(seed))
    known_N = label_N[order_N] == digit
    shown_K = torch.cat([order_N[known_N][:2], order_N[~known_N][:6]])
    x_NCYX = training.to_unit(images.test_NYX[:, None])
    return Images(train_NCYX, held_out_NCYX, x_NCYX, label_N, label_N == digit, shown_K, images.card)


def fit(job: Job, images: Images, networks: Mapping[str, Network]) -> dict[str, tuple[nn.Module, training.History]]:
    """Each network, trained by the book's loop; nothing, where the run is stored."""
    if job.run is not None:
        return {}
    fits, wanted = {}, job.parameters
    for name, network in networks.items():
        model = training.build(network.make, wanted["seed"]).to(devices.choose_device(wanted["device"]))
        options = {"epochs": wanted["epochs"], "seed": wanted["seed"]}
        fits[name] = model, training.train(model, images.train_NCYX, images.held_out_NCYX, RECIPE, **options)
    histories = {name: vars(history) for name, (_, history) in fits.items()}
    job.losses = {f"{n}, {name}": v for name, of in histories.items() for n, v in of.items() if isinstance(v, list)}
    return fits


def measure(
    job: Job,
    fits: Mapping[str, tuple[nn.Module, training.History]],
    images: Images,
    networks: Mapping[str, Network],
    explain: Callable[..., Explained],
    checks: Mapping[str, Callable[..., Tensor]],
) -> runs.Run:
    """The run of a job: read, or measured now and stored.

    Args:
        job: The job.
        fits: What `fit` gives.
        images: Its images.
        networks: The networks by name.
        explain: From the callable that encodes, a layer and images to their maps.
        checks: By name, what each layer of each network is asked: from the callable, the layer and images to a number.
    """
    if job.run is not None:
        return job.run
    import captum
    import monai

    where = devices.choose_device(job.parameters["device"])
    rows, seconds, pictures, sizes = [], {}, {}, {}
    for name, (model, history) in fits.items():
        network, encode = networks[name], networks[name].encode(model)
        seconds[f"training, {name}"], started = history.seconds, time.monotonic()
        parts = [explain(encode, network.layer, x_BCYX.to(where)) for x_BCYX in images.x_NCYX.split(250)]
        found = tuple(torch.cat([part.cpu() for part in kind]) for kind in zip(*parts, strict=True))
        seconds[f"maps, {name}"] = time.monotonic() - started
        mass_N = found[0].mean((1, 2))
        ratio = mass_N[images.known_N].median() / mass_N[~images.known_N].median()
        rows += [*learned(name, model, images), runs.row(MASS, float(ratio), name, n=len(mass_N))]
        x_BCYX = images.x_NCYX[images.shown_K].to(where)
        for layer in network.layers:
            values = {metric: float(check(encode, layer, x_BCYX)) for metric, check in checks.items()}
            rows += [runs.row(metric, value, name, layer, n=len(x_BCYX)) for metric, value in values.items()]
        shapes = {layer: attention(encode, layer, x_BCYX).values_BCHW.shape[1:] for layer in network.layers}
        sizes[name] = {layer: list(shape) for layer, shape in shapes.items()}
        pictures[PICTURES[name]] = panel(model, images, found)
    job.run = runs.save(
        "reuse",
        job.parameters,
        metrics=rows,
        losses=job.losses,
        arrays={},
        figures=pictures,
        card=images.card,
        recipe=RECIPE,
        budget={"unit": "epochs", "asked": RECIPE.epochs, "used": job.parameters["epochs"]},
        seconds=seconds,
        device=devices.describe_device(where),
        extra={
            "sizes": sizes,
            "images": len(images.train_NCYX),
            "packages": {"monai": monai.__version__, "captum": captum.__version__},
        },
    )
    return job.run


def captum_difference(
    encode: Callable[[Tensor], tuple[Tensor, Tensor]], layer: str, x_BCYX: Float[Tensor, "b c y x"]
) -> Tensor:
    """The greatest difference of Σ_c α_ic A_c from captum's `LayerGradCam`, relative to captum's greatest value."""
    from captum.attr import LayerGradCam

    ours_BIHW = attention(encode, layer, x_BCYX).linear_BIHW
    captum = LayerGradCam(lambda x_BCYX: encode(x_BCYX)[0], encode.__self__.get_submodule(layer))
    maps = [captum.attribute(x_BCYX, target=latent) for latent in range(ours_BIHW.shape[1])]
    theirs_BIHW = torch.cat(maps, dim=1).detach()
    return (ours_BIHW - theirs_BIHW).abs().max() / theirs_BIHW.abs().max()


def learned(name: str, model: nn.Module, images: Images) -> list[dict]:
    """What a model has learnt, on held-out images."""
    mu_NI, _ = explanation.encoded(model, images.held_out_NCYX)
    active = runs.row(ACTIVE, active_units(mu_NI), method=name, n=len(mu_NI))
    return [*explanation.learned_rows(model, images.held_out_NCYX, method=name), active]


def panel(model: nn.Module, images: Images, found: Explained) -> Figure:
    """Images, reconstructions and maps; aggregated and latents' maps each in a unit of their own."""
    map_NYX, highest_NK, map_NKYX = found
    unit, latent_unit = (float(np.quantile(maps[~images.known_N], 0.99)) for maps in (map_NYX, map_NKYX))
    at, where = images.shown_K, next(model.parameters()).device
    with torch.no_grad():
        restored_BCYX = model.decode(model.encode(images.x_NCYX[at].to(where))[0]).sigmoid().cpu()
    rows = {
        "image": images.x_NCYX[at, 0],
        "reconstruction": restored_BCYX[:, 0],
        "mean of all latents": map_NYX[at] / unit,
    }
    for k, rank in enumerate(("highest", "second", "third")):
        rows[f"{rank} response"] = map_NKYX[at, k] / latent_unit
    numbers = zip(images.label_N[at].tolist(), highest_NK[at].tolist(), strict=True)
    return figures.image_rows(
        rows,
        maps=list(rows)[2:],
        titles=[f"{number}\n{', '.join(map(str, latents))}" for number, latents in numbers],
        label="map / 99th percentile of its kind",
        credit=f"{images.card.credit} {images.card.mark}".strip(),
    )


# A folder of images ---------------------------------------------------------------------------------------------------


def train(make: Callable[[], nn.Module], part: Category, seed: int) -> nn.Module:
    """A VAE for colour images of the part's size, trained for a short while on its normal images."""
    model = training.build(make, seed)
    training.train(model, *mvtec.split(part), RECIPE, epochs=PART_EPOCHS, seed=seed)
    return model


def without_attention(model: nn.Module, part: Category, seed: int) -> dict[str, Float[Tensor, "n y x"]]:
    """Maps of the test images that need no attention: the model's reconstruction error, and PaDiM.

    PaDiM takes the features of a ResNet-18 with ImageNet's weights, or with random ones where those cannot be had; its
    name says which.
    """
    train_NCYX, _ = mvtec.split(part)
    restored_NCYX = explanation.reconstruct(model, part.test_NCYX)
    start = "imagenet" if imagenet.load() else "random"
    network = features.backbone(start, train_NCYX, seed)
    return {
        ERROR: baselines.reconstruction_error(training.to_unit(part.test_NCYX), restored_NCYX),
        FEATURES[start]: features.padim(train_NCYX, part.test_NCYX, network, seed=seed),
    }


def scores(part: Category, maps: Mapping[str, Float[Tensor, "n y x"]]) -> list[dict]:
    """Rows on how well maps find defects, by pixel and by image, and how the last map compares with the others.

    Args:
        part: Images, all with masks.
        maps: Maps of its test images by name.
    """
    measured, image_N = measures.Measured(), torch.arange(len(part.test_NCYX))
    truth = measures.Truth(torch.stack(part.test_mask), image_N)
    defective = measures.Truth(truth.truth_NYX.flatten(1).any(1), image_N)
    for name, map_NYX in maps.items():
        measured.pixels(name, map_NYX, truth, {"auroc": AUROC})
        measured.images(name, map_NYX, defective)
    *others, last = maps
    return measured.rows + measured.differences([last], others)


def defects(part: Category, maps: Mapping[str, Float[Tensor, "n y x"]]) -> Image:
    """Some defects of a part with their masks, and the maps of them."""
    chosen = mvtec.shown(part)
    return figures.examples(
        mvtec.pictures(part),
        {name: map_NYX[chosen] for name, map_NYX in maps.items()},
        titles=mvtec.titles_of(part, chosen),
        credit=part.card.note.splitlines()[0],
        grey="gray",
    )
