"""What needs no VAE to be trained: untrained networks, and what a practitioner would use, by the same measures.

A record holds a data set's, or a category's, untrained networks. That of seed s is what the training of seed s started
from, so that the two are paired; further seeds show what chance alone gives. Another record holds its baselines.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from expvae_book import (
    baselines,
    defects,
    devices,
    explanation,
    features,
    measures,
    randomised,
    recipes,
    runs,
    training,
)
from expvae_book.chapters import Job
from expvae_book.data import imagenet
from expvae_book.data.card import DataCard
from expvae_book.data.mvtec import load as load_category
from expvae_book.jobs import digits, mnist, mvtec, ucsd
from expvae_book.names import FIELDS, SHOWN

RECIPES = {"mnist": recipes.MNIST, "ucsd": recipes.UCSD, "mvtec": recipes.MVTEC}
USUAL = {"mnist": "liu2020", "ucsd": "report1", "mvtec": "report1"}  # those of the data sets' chapters
NETWORKS = {"mnist": 5, "ucsd": 5, "mvtec": 3}  # untrained ones of each kind
KEPT = ("pixel AUROC", "average precision", "best IoU (oracle)")  # of these every resample
PLAIN_STATISTICS = "mean 0 and variance 1"
Cases = Sequence[tuple[Sequence[str], Sequence[str], float]]  # presets, layers, and the share of the images


@dataclass(frozen=True)
class Subject:
    """A data set, or a category, as its untrained networks see it.

    Attributes:
        train_NCYX: Training images.
        test_NCYX: Test images.
        measured_N: Which of them have a truth by pixel.
        truth: That of those.
        anomalous_N: Which test images are anomalous.
        networks: By what they start from, how to build them.
        cases: From the place of a network among those of its kind to what is explained.
        batch: Images at a time.
        card: What the data are.
        explained: Names of the maps that simpler pictures may explain.
        options: Further ones of `measures.layers_and_presets`.
    """

    train_NCYX: UInt8[Tensor, "t c y x"]
    test_NCYX: UInt8[Tensor, "n c y x"]
    measured_N: Bool[Tensor, " n"]
    truth: measures.Truth
    anomalous_N: Bool[Tensor, " n"]
    networks: Mapping[str, Callable[[], nn.Module]]
    cases: Callable[[int], Cases]
    batch: int
    card: DataCard
    explained: Sequence[str]
    options: Mapping[str, Any] = field(default_factory=dict)

    def pictures(self) -> dict[str, Float[Tensor, "n y x"]]:
        """What might explain a map of the test images: edges, brightness, difference from the mean training image."""
        x_NCYX, mean_CYX = training.to_unit(self.test_NCYX), training.to_unit(self.train_NCYX).mean(0)
        grey_NYX = x_NCYX.mean(1)
        difference_NYX = baselines.mean_image_difference(x_NCYX, mean_CYX)
        return {"edges": baselines.edges(grey_NYX), "brightness": grey_NYX, "mean image difference": difference_NYX}

    def some(self, some_N: Int64[Tensor, " k"]) -> "Subject":
        """The same with some of the test images."""
        place_N = torch.cumsum(self.measured_N, 0) - 1
        among_M = place_N[some_N[self.measured_N[some_N]]]
        truth = replace(self.truth, truth_NYX=self.truth.truth_NYX[among_M], unit_N=self.truth.unit_N[among_M])
        return replace(
            self,
            test_NCYX=self.test_NCYX[some_N],
            measured_N=self.measured_N[some_N],
            truth=truth,
            anomalous_N=self.anomalous_N[some_N],
        )


def subject(parameters: Mapping[str, Any]) -> Subject:
    """The data that the parameters name: dataset, digit or category, recipe and data.

    Raises:
        ValueError: If a category has no masks, or as the loaders do.
    """
    return {"mnist": _digits, "ucsd": _footage, "mvtec": _category}[parameters["dataset"]](parameters)


def explained(dataset: str) -> list[str]:
    """The maps of a data set that its chapter shows, by the two rules for all latents."""
    return [measures.map_name(SHOWN[dataset][0], preset) for preset in ("liu2020_paper", "liu2020_code")]


def name_of(parameters: Mapping[str, Any]) -> str:
    """The recipe whose network is looked at: that of the data set's chapter where none is named.

    Raises:
        ValueError: If the data set has no such recipe.
    """
    dataset = parameters["dataset"]
    name = parameters.get("recipe", USUAL[dataset])
    if name not in RECIPES[dataset]:
        raise ValueError(f"recipe={name!r} is none of {dataset}; choose one of: {', '.join(RECIPES[dataset])}")
    return name


def _digits(parameters: Mapping[str, Any]) -> Subject:
    recipe = name_of(parameters)
    seen = digits.load(parameters["data"], parameters["digit"], recipe)
    at = seen.outlier_N
    return Subject(
        seen.inlier_NCYX,
        seen.test_NYX[:, None],
        at,
        measures.Truth(seen.truths["truth"][at], torch.nonzero(at)[:, 0]),
        at,
        {"random": mnist.network(recipe)},
        lambda place: [(measures.PRESETS, mnist.LAYERS, 1.0)],
        seen.batch,
        seen.images.card,
        explained("mnist"),
    )


def _footage(parameters: Mapping[str, Any]) -> Subject:
    recipe = name_of(parameters)
    seen = ucsd.load(parameters["data"], recipe)
    some_N, truth = seen.truth()
    return Subject(
        seen.train_NCYX,
        seen.clips.test_NYX[some_N][:, None],
        torch.ones(len(some_N), dtype=torch.bool),
        replace(truth, subset=""),
        truth.truth_NYX.flatten(1).any(1),
        {"random": ucsd.network(recipe)},
        lambda place: [(measures.PRESETS, ucsd.LAYERS, 1.0)],
        seen.batch,
        seen.clips.card,
        explained("ucsd"),
    )


def _category(parameters: Mapping[str, Any]) -> Subject:
    recipe, category = name_of(parameters), load_category(parameters["category"], parameters["data"])
    seen = defects.Seen.of(category, torch.arange(len(category.test_NCYX)))
    if not seen.masked:
        raise ValueError(f"category={category.name!r} has no masks of defects, and this chapter measures pixels")
    own = recipe in mvtec.OWN_NETWORKS
    starts = ["random"] if own or imagenet.load() is None else ["random", "imagenet"]
    few = [(presets, layers, defects.THIRD) for presets, layers in defects.FOLLOWED + defects.FOLLOWED_LATE]
    return Subject(
        mvtec.split(category)[0],
        category.test_NCYX,
        seen.known_N,
        seen.truth,
        torch.tensor([kind != "good" for kind in seen.defects]),
        {start: mvtec.network(recipe, start, "fine-tuned")[0] for start in starts},
        lambda place: few if place else [case for case in defects.CASES if case[2] > 0],
        RECIPES["mvtec"][recipe].batch_size,
        category.card,
        explained("mvtec"),
        {"shuffled": True},
    )


def measured_maps(model: nn.Module, seen: Subject, cases: Cases, subset: str) -> measures.Measured:
    """The measures of a network's maps, in rows of this subset."""
    measured, normal = measures.Measured(), explanation.normal_posterior(model, seen.train_NCYX)
    fields = {name: title for name, title in FIELDS.items() if title in KEPT}
    options = {"batch": seen.batch, "seed": measures.SEED, "normal": normal, **seen.options}
    for share, pairs in defects.by_share(cases).items():
        whole = share == 1
        some_N = torch.arange(len(seen.test_NCYX)) if whole else defects.some_of(len(seen.test_NCYX), share)
        few = seen.some(some_N)
        if not few.truth.truth_NYX.any():
            continue
        pictures = few.pictures()
        for name, map_NYX in measures.layers_and_presets(model, pairs, few.test_NCYX, **options):
            measured.pixels(name, map_NYX[few.measured_N], replace(few.truth, subset=subset), fields)
            if name in seen.explained:
                measured.rows += randomised.explained_rows(map_NYX, pictures, name, subset)
    return measured


def measure(job: Job) -> runs.Run:
    """The untrained networks of a data set or of a category, or its maps without a VAE: read, or measured and stored.

    Args:
        job: Its parameters are control, "untrained" or "baselines", and those that `subject` reads.
    """
    if job.run is not None:
        return job.run
    wanted, started = job.parameters, time.monotonic()
    seen, device = subject(wanted), devices.choose_device(wanted["device"])
    if wanted["control"] == "untrained":
        rows, arrays = untrained(seen, NETWORKS[wanted["dataset"]], device)
    else:
        rows, arrays = without_vae(seen, device)
    job.run = runs.save(
        "sanity",
        wanted,
        metrics=rows,
        losses={},
        arrays=arrays,
        figures={},
        card=seen.card,
        recipe=RECIPES[wanted["dataset"]][name_of(wanted)],
        budget={"unit": "epochs", "asked": 0, "used": 0},
        seconds={"evaluation": time.monotonic() - started},
        device=devices.describe_device(device),
        extra={
            "resamples": {
                "seed": measures.SEED,
                "measures": KEPT if wanted["control"] == "untrained" else measures.PAIRED,
            }
        },
    )
    return job.run


def untrained(seen: Subject, networks: int, device: torch.device) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Rows and resamples of so many untrained networks of each kind, whose names are the subsets of the rows."""
    rows, arrays = [], {}
    for start, make in seen.networks.items():
        for seed in range(networks):
            model = training.build(make, seed).eval().to(device)
            states = {f"{start}, seed {seed}": randomised.settle(model, seen.train_NCYX)}
            if seed == 0 and start == "random" and randomised.normalised(model):
                states[f"{start}, seed {seed}, {PLAIN_STATISTICS}"] = training.build(make, seed).eval().to(device)
            for subset, one in states.items():
                measured = measured_maps(one, seen, seen.cases(seed), subset)
                rows += measured.rows
                arrays |= {
                    f"{subset}/{name}": drawn[: len(KEPT)]
                    for name, drawn in measured.replicates(measured.measured).items()
                }
    return rows, arrays


def without_vae(seen: Subject, device: torch.device) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Rows and resamples of the maps that take no VAE."""
    measured = measures.Measured()
    everything = measures.Truth(seen.anomalous_N, torch.arange(len(seen.test_NCYX)))
    for name, map_NYX in _maps(seen, device):
        measured.pixels(name, map_NYX[seen.measured_N], seen.truth, FIELDS)
        measured.images(name, map_NYX, everything)
    return measured.rows, measured.replicates(measured.measured)


def _maps(seen: Subject, device: torch.device) -> Iterator[tuple[str, Float[Tensor, "n y x"]]]:
    """Name and maps of each baseline."""
    x_NCYX, count = training.to_unit(seen.test_NCYX), len(seen.test_NCYX)
    yield from baselines.places(seen.train_NCYX, count).items()
    yield "input intensity", baselines.input_intensity(x_NCYX)
    mean_CYX = training.to_unit(seen.train_NCYX).mean(0)
    yield "mean image difference", baselines.mean_image_difference(x_NCYX, mean_CYX)
    for initial in ["random"] if imagenet.load() is None else features.INITIALS:
        network = features.backbone(initial, seen.train_NCYX, measures.SEED, device=device)
        for name, method in {"PaDiM": features.padim, "nearest neighbour": features.nearest_neighbour}.items():
            map_NYX = method(seen.train_NCYX, seen.test_NCYX, network, seed=measures.SEED)
            yield f"{name}, {initial} features", map_NYX.cpu()
