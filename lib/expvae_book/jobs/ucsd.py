"""UCSD Ped1: train on the walkway with pedestrians, and measure how the maps of every layer find the cart.

A job trains one model and stores what any page will ask of it. Results come from four fifths of the test clips, whole
clips; the other fifth chooses a threshold. Clips without masks count only where a claim speaks of them.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, product
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from matplotlib.figure import Figure
from torch import Tensor, nn

from expvae import kl_divergence
from expvae.metrics import PixelMetrics, active_units
from expvae.models import UCSDVAE, BrongersUCSDVAE
from expvae_book import (
    baselines,
    choices,
    explanation,
    figures,
    measures,
    randomised,
    recipes,
    runs,
    training,
)
from expvae_book.chapters import Job
from expvae_book.data import ucsd
from expvae_book.jobs import slips, steps
from expvae_book.names import ACTIVE, SIMPLE
from expvae_book.names import CONVOLUTIONS as LAYERS
from expvae_book.names import MASKED_CLIPS as ALL
from expvae_book.names import TEST_CLIPS as TEST

MAPS = [measures.map_name(*pair) for pair in product(LAYERS, measures.PRESETS)]
EVERY = 2  # frames of the test clips; neighbours are nearly the same image, and whole clips are resampled
FOLLOWED_EVERY = 5  # of those while a model is trained, and where layers are random
SHOWN = ("conv2", "liu2020_code")  # the map in the pictures
RANDOMISED = ("liu2020_paper", "liu2020_code")  # presets at conv2 whose layers are replaced by random ones
MOVING = 0.1  # of the range of grey levels, from the mean training frame


@dataclass(frozen=True)
class Footage:
    """What of UCSD Ped1 a job sees.

    Attributes:
        everything: All frames.
        clips: The same with every second test frame, of the clips with masks.
        train_NCYX: Training frames.
        held_out_NCYX: Those of a tenth of the training clips, to watch the training.
        validation_N: Which test frames choose a threshold.
        test_N: Which test frames results come from.
        batch: Frames at a time, in the order of their clips: some presets divide by the whole batch.
    """

    everything: ucsd.UCSD
    clips: ucsd.UCSD
    train_NCYX: UInt8[Tensor, "t 1 y x"]
    held_out_NCYX: UInt8[Tensor, "v 1 y x"]
    validation_N: Bool[Tensor, " n"]
    test_N: Bool[Tensor, " n"]
    batch: int

    def truth(self, every: int = 1) -> tuple[Tensor, measures.Truth]:
        """The numbers of the test frames that results come from, or of some of them, and their anomalous pixels."""
        some = torch.nonzero(self.test_N)[::every, 0]
        truth_MYX = torch.stack([self.clips.test_mask[i] for i in some])
        return some, measures.Truth(truth_MYX, self.clips.test_clip_N[some], TEST)

    @property
    def credit(self) -> str:
        """Whose frames these are."""
        return f"{self.clips.card.credit} {self.clips.card.mark}".strip()

    def places(self, count: int) -> dict[str, Float[Tensor, "count y x"]]:
        """The maps that look at no test image, for so many of them."""
        return baselines.places(self.train_NCYX, count)

    def explain(self, model: nn.Module, frame_N: Tensor, layers: Sequence[str], presets: Sequence[str]) -> Iterator:
        """Name and maps of some frames, of each layer by each preset."""
        normal = explanation.normal_for(presets, model, self.train_NCYX)
        x_NCYX = self.clips.test_NYX[frame_N][:, None]
        options = {"batch": self.batch, "seed": measures.SEED, "normal": normal}
        return measures.layers_and_presets(model, product(layers, presets), x_NCYX, **options)


def size_of(recipe: str) -> int:
    """Pixels along either side of the frames that the network of a recipe takes."""
    return 96 if recipe == "brongers2021" else 100


def load(data: str, recipe: str) -> Footage:
    """The frames for the network of a recipe; data as for `expvae_book.data.ucsd.load`."""
    everything = ucsd.load(data, size=size_of(recipe))
    clips = thinned(everything)
    numbers = clips.train_clip_N.unique()
    train_NCYX, held_out_NCYX = (
        clips.train_NYX[torch.isin(clips.train_clip_N, numbers[part])][:, None]
        for part in training.hold_out(len(numbers))
    )
    split = (torch.isin(clips.test_clip_N, part) for part in ucsd.split(clips.test_clip_N, clips.test_mask))
    return Footage(everything, clips, train_NCYX, held_out_NCYX, *split, recipes.UCSD[recipe].batch_size)


def thinned(clips: ucsd.UCSD) -> ucsd.UCSD:
    """Every second test frame of the clips that have masks, and all training frames."""
    masked = [i for i, mask_YX in enumerate(clips.test_mask) if mask_YX is not None]
    kept = [i for i in masked if int((clips.test_clip_N[:i] == clips.test_clip_N[i]).sum()) % EVERY == 0]
    return replace(
        clips,
        test_NYX=clips.test_NYX[kept],
        test_clip_N=clips.test_clip_N[kept],
        test_mask=[clips.test_mask[i] for i in kept],
    )


# Training -------------------------------------------------------------------------------------------------------------


def network(recipe: str) -> Callable[[], nn.Module]:
    """How to build the network of a recipe."""
    make = BrongersUCSDVAE if recipe == "brongers2021" else UCSDVAE
    return lambda: make(recipes.UCSD[recipe].latent_dim)


def fit(job: Job, footage: Footage) -> steps.Fit:
    """The training of a job, whose maps are followed on every fifth of the test frames that are measured."""
    recipe, cases = job.parameters["recipe"], lambda: {"": footage.truth(FOLLOWED_EVERY)}
    return steps.fit(job, footage, network(recipe), recipes.UCSD[recipe], LAYERS, cases)


# Measures -------------------------------------------------------------------------------------------------------------


def simple_maps(model: nn.Module, footage: Footage) -> tuple[dict[str, Float[Tensor, "n y x"]], Float[Tensor, "n y x"]]:
    """Maps of all frames that need no attention, and the reconstructions."""
    chance, mean_CYX = torch.Generator().manual_seed(measures.SEED), training.to_unit(footage.train_NCYX).mean(0)
    frame_NYX = footage.clips.test_NYX
    restored_NCYX = explanation.reconstruct(model, frame_NYX[:, None])
    parts = [
        baselines.maps(training.to_unit(frame_BYX[:, None]), restored_BCYX, mean_CYX, chance)
        for frame_BYX, restored_BCYX in zip(frame_NYX.split(64), restored_NCYX.split(64), strict=True)
    ]
    maps = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return maps | footage.places(len(frame_NYX)), restored_NCYX[:, 0]


def map_rows(
    maps: Iterable[tuple[str, Float[Tensor, "n y x"]]], footage: Footage
) -> tuple[measures.Measured, list[dict]]:
    """Measure one map after the other: what was measured, and rows on what moves."""
    clips, (some, truth) = footage.clips, footage.truth()
    frames = measures.Truth(truth.truth_NYX.flatten(1).any(1), truth.unit_N)
    measured, moving, moving_MYX = measures.Measured(), [], moving_pixels(footage)[some]
    for name, map_NYX in maps:
        counts = slips.counted(map_NYX, clips.test_mask, clips.test_clip_N, footage.validation_N)
        measured.add(name, map_NYX[some], truth, counts.compute().best_iou_threshold)
        measured.images(name, map_NYX[some], frames)
        moving += moving_rows(name, map_NYX[some], moving_MYX, truth)
    return measured, moving


def moving_pixels(footage: Footage) -> Bool[Tensor, "n y x"]:
    """The pixels of the test frames that differ from the mean training frame by a tenth of the grey levels or more."""
    mean_CYX = training.to_unit(footage.train_NCYX).mean(0)
    return (training.to_unit(footage.clips.test_NYX[:, None]) - mean_CYX).abs()[:, 0] >= MOVING


def moving_rows(
    name: str, map_MYX: Float[Tensor, "m y x"], moving_MYX: Bool[Tensor, "m y x"], truth: measures.Truth
) -> list[dict]:
    """Anomalous among moving pixels; and moving among the pixels of normal frames."""
    normal_M = ~truth.truth_NYX.flatten(1).any(1)
    among, pedestrians = PixelMetrics(), PixelMetrics()
    among.update(map_MYX, truth.truth_NYX, truth.unit_N, where=moving_MYX)
    pedestrians.update(map_MYX[normal_M], moving_MYX[normal_M], truth.unit_N[normal_M])
    found = []
    for metric, counts in {
        "pixel AUROC among moving pixels": among,
        "AUROC of moving pixels on normal frames": pedestrians,
    }.items():
        measured = counts.auroc_interval(seed=measures.SEED, resamples=measures.RESAMPLES)
        found.append(runs.row(metric, method=name, subset=TEST, **vars(measured)))
    return found


def share_rows(footage: Footage) -> list[dict]:
    """The shares of moving and of anomalous pixels, and of each among the other."""
    some, truth = footage.truth()
    moving_MYX = moving_pixels(footage)[some]
    shares = {
        "moving pixels": moving_MYX,
        "anomalous pixels": truth.truth_NYX,
        "anomalous among moving pixels": truth.truth_NYX[moving_MYX],
        "moving among anomalous pixels": moving_MYX[truth.truth_NYX],
    }
    return [runs.row(metric, float(flags.float().mean())) for metric, flags in shares.items()]


def difference_rows(measured: measures.Measured) -> list[dict]:
    """Paired differences in AUROC of each map from those without attention, and between the layers by each preset."""
    found = measured.differences(MAPS, SIMPLE, TEST)
    for at, (one, other) in product(measures.PRESETS, combinations(LAYERS, 2)):
        row = measured.differences([f"{one}, {at}"], [f"{other}, {at}"], TEST)[0]
        found.append(row | {"method": f"{at}, {one} − {other}"})
    return found


def latent_rows(
    model: nn.Module, footage: Footage, restored_NYX: Float[Tensor, "n y x"]
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """What the latents carry: on held-out training frames, and on all test frames."""
    test_NYX, mean_CYX = footage.clips.test_NYX, training.to_unit(footage.train_NCYX).mean(0)
    mu_NI, logvar_NI = explanation.encoded(model, footage.held_out_NCYX)
    test_mu_NI, _ = explanation.encoded(model, test_NYX[:, None])
    found = explanation.learned_rows(model, footage.held_out_NCYX, {"mean frame": mean_CYX})
    found += [
        runs.row(ACTIVE, active_units(mu_NI), n=len(mu_NI)),
        runs.row(ACTIVE, active_units(test_mu_NI), subset=ALL, n=len(test_NYX)),
    ]
    frames = {"frames": training.to_unit(test_NYX[:, None]), "reconstructions": restored_NYX}
    found += explanation.spread_rows("frames", frames, subset=ALL)
    kl_I = kl_divergence(mu_NI, logvar_NI).mean(0)
    return found, {"kl_per_latent": kl_I.numpy(), "variance_of_mu_per_latent": test_mu_NI.var(0).numpy()}


def change_rows(model: nn.Module, footage: Footage) -> list[dict]:
    """What one choice of a rule changes in the map at conv2: see the chapter on ablations."""
    some, truth = footage.truth(2 * FOLLOWED_EVERY)
    if not truth.truth_NYX.any():  # there are few frames, and none of these shows an anomaly
        return []
    return choices.change_rows(
        model,
        f"encoder.{SHOWN[0]}",
        footage.clips.test_NYX[some][:, None],
        truth.truth_NYX,
        truth.unit_N,
        measured_N=torch.ones(len(some), dtype=torch.bool),
        normal=explanation.normal_posterior(model, footage.train_NCYX),
        batch=footage.batch,
        activation=True,
        resamples=measures.RESAMPLES,
        seed=measures.SEED,
    )


def cascade(
    model: nn.Module, footage: Footage, parameters: Mapping[str, Any]
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """What is left of the maps at conv2 where the layers of the encoder are random; see `expvae_book.randomised`."""
    some, truth = footage.truth(FOLLOWED_EVERY)
    return randomised.cascade(
        model,
        randomised.others(network(parameters["recipe"]), parameters["seed"]),
        footage.train_NCYX,
        lambda network: dict(footage.explain(network, some, SHOWN[:1], RANDOMISED)),
        truth,
    )


# Pictures and the run -------------------------------------------------------------------------------------------------


def drawn(footage: Footage, anomalous: bool) -> Tensor:
    """Four test frames drawn at random, with or without an anomaly, from as many clips as there are."""
    fits = [flag is anomalous for flag in footage.clips.test_anomalous]
    fitting = torch.nonzero(footage.test_N & torch.tensor(fits))[:, 0]
    fitting = fitting[torch.randperm(len(fitting), generator=torch.Generator().manual_seed(measures.SEED))]
    clip_N = footage.clips.test_clip_N[fitting].tolist()
    repeats = [clip_N[:i].count(clip) for i, clip in enumerate(clip_N[:100])]
    return fitting[np.argsort(repeats, kind="stable")[:4]]


def panels(footage: Footage, maps: Mapping[str, Float[Tensor, "n y x"]]) -> dict[str, Any]:
    """Eight frames with their maps, and a clip in motion; each map in units of its 99th percentile."""
    clips = footage.clips
    x_NYX, clip_N = training.to_unit(clips.test_NYX), clips.test_clip_N
    place_N = [1 + EVERY * int((clip_N[:i] == clip).sum()) for i, clip in enumerate(clip_N)]
    mask_NYX = torch.stack(clips.test_mask).float()
    shown = {f"attention, {SHOWN[0]}": measures.map_name(*SHOWN)}
    shown |= {name: name for name in ("mean image difference", "reconstruction error")}
    scaled = {
        title: maps[name] / float(np.quantile(maps[name][footage.test_N][::FOLLOWED_EVERY], 0.99))
        for title, name in shown.items()
    }
    anomalous, normal = (drawn(footage, flag) for flag in (True, False))
    at = torch.cat([anomalous, normal])
    frames = figures.image_rows(
        {"frame": x_NYX[at], "mask": mask_NYX[at], "reconstruction": maps["reconstruction"][at]}
        | {title: map_NYX[at] for title, map_NYX in scaled.items()},
        maps=list(scaled),
        titles=[f"clip {clip_N[i]},\nframe {place_N[i]}" for i in at],
        label="map / its 99th percentile over the test clips",
        credit=footage.credit,
        grey="gray",
    )
    clip = clip_N[max(anomalous, key=lambda i: mask_NYX[i].sum())]  # of those drawn the one with the largest anomaly
    at = torch.nonzero(clip_N == clip)[:, 0]
    at = at[:: -(-len(at) // 5)]  # few enough that a stored run stays small
    animation = figures.clip_animation(
        x_NYX[at],
        list(mask_NYX[at]),
        next(iter(scaled.values()))[at],
        titles=[f"clip {clip}, frame {place_N[i]}" for i in at],
        label="attention / its 99th percentile",
        credit=footage.credit,
    )
    return {"frames": frames, "clip": animation}


def strip(footage: Footage) -> Figure:
    """Frames of four training clips, and of four test clips the frame with the largest anomaly, with its mask."""
    clips, of_test_N = footage.clips, footage.clips.test_clip_N * footage.test_N
    size_N = torch.stack(clips.test_mask).flatten(1).sum(1)
    largest = [torch.where(of_test_N == clip, size_N, -1).argmax() for clip in of_test_N.unique() if clip]
    anomalous = torch.stack(sorted(largest, key=lambda i: -int(size_N[i]))[:4])
    first = [torch.nonzero(clips.train_clip_N == clip)[0, 0] for clip in clips.train_clip_N.unique()[: len(anomalous)]]
    rows = {
        "training": training.to_unit(clips.train_NYX[torch.stack(first)]),
        "test": training.to_unit(clips.test_NYX[anomalous]),
        "mask": torch.stack([clips.test_mask[i] for i in anomalous]).float(),
    }
    return figures.image_rows(rows, maps=[], titles=[""] * len(anomalous), label="", credit=footage.credit, grey="gray")


def explain(job: Job, fit: steps.Fit, footage: Footage) -> dict[str, np.ndarray]:
    """The maps of four of the frames drawn, of the trained network and of the one that it started from.

    Of each layer and preset the mean over the latents at the layer's resolution; as `measures.halved` gives them, by
    names such as "untrained/conv2, liu2020_code".
    """
    if job.run is not None:
        return {name: map_ for name, map_ in job.run.arrays.items() if name.startswith(("trained/", "untrained/"))}
    x_BCYX, model, arrays = footage.clips.test_NYX[examples(footage)][:, None], fit.trained.model, {}
    start = training.build(network(job.parameters["recipe"]), job.parameters["seed"]).eval()
    for state, one in {"trained": model, "untrained": start.to(next(model.parameters()).device)}.items():
        normal = explanation.normal_posterior(one, footage.train_NCYX)
        maps = measures.examples(one, LAYERS, measures.PRESETS, x_BCYX, normal, measures.SEED)
        arrays |= {f"{state}/{name}": map_BHW for name, map_BHW in maps.items()}
    return arrays


def examples(footage: Footage) -> Tensor:
    """The numbers of two anomalous and two normal test frames."""
    return torch.cat([drawn(footage, flag)[:2] for flag in (True, False)])


def frames(footage: Footage) -> dict[str, Float[Tensor, "n y x"]]:
    """Those frames, their masks, and their squared difference from the mean training frame."""
    at, clips = examples(footage), footage.clips
    x_NCYX, mean_CYX = training.to_unit(clips.test_NYX[at][:, None]), training.to_unit(footage.train_NCYX).mean(0)
    mask_NYX = torch.stack([clips.test_mask[i] for i in at]).float()
    difference_NYX = baselines.mean_image_difference(x_NCYX, mean_CYX)
    return {"frame": x_NCYX[:, 0], "mask": mask_NYX, "mean image\ndifference": difference_NYX}


def evaluate(
    model: nn.Module, footage: Footage, parameters: Mapping[str, Any]
) -> tuple[list[dict], dict[str, np.ndarray], dict[str, Figure]]:
    """All that a job stores of a trained model beside its course: rows, arrays and, of seed 0, pictures."""
    simple, restored_NYX = simple_maps(model, footage)
    found, arrays = latent_rows(model, footage, restored_NYX)
    kept, name_shown = simple | {"reconstruction": restored_NYX}, measures.map_name(*SHOWN)

    def maps() -> Iterator[tuple[str, Tensor]]:
        yield from simple.items()
        everything = torch.arange(len(footage.clips.test_NYX))
        for name, map_NYX in footage.explain(model, everything, LAYERS, measures.PRESETS):
            kept.update({name: map_NYX} if name == name_shown else {})
            yield name, map_NYX

    measured, moving = map_rows(maps(), footage)
    truncated = ucsd.load(parameters["data"], mask_resize="truncated", size=size_of(parameters["recipe"]))
    found += measured.rows + moving + share_rows(footage) + difference_rows(measured)
    found += slips.rows(model, footage.everything, truncated, footage.batch)
    found += change_rows(model, footage)
    of_cascade, compared = cascade(model, footage, parameters)
    arrays |= measured.replicates([*MAPS, *SIMPLE]) | compared
    return found + of_cascade, arrays, panels(footage, kept) if parameters["seed"] == 0 else {}


def measure(job: Job, fit: steps.Fit, footage: Footage) -> runs.Run:
    """The run of a job: read, or measured now and stored."""
    if job.run is not None:
        return job.run
    started, recipe, trained = time.monotonic(), recipes.UCSD[job.parameters["recipe"]], fit.trained
    found, arrays, pictures = evaluate(trained.model, footage, job.parameters)
    arrays |= explain(job, fit, footage) if pictures else {}
    for course in fit.courses:
        found, arrays = found + course.rows(), arrays | course.arrays()
    validation, test = (footage.clips.test_clip_N[of_N].unique() for of_N in (footage.validation_N, footage.test_N))
    count = len(footage.train_NCYX)
    asked, used = (recipe.epochs, count), (len(trained.history.kl), count)
    job.run = steps.save(
        "ucsd",
        job.parameters,
        trained,
        recipe,
        metrics=found,
        arrays=arrays,
        pictures=pictures,
        card=footage.clips.card,
        budget=measures.budget("epochs", recipe, asked=asked, used=used),
        probed=(footage.clips.test_NYX[:, None], f"encoder.{SHOWN[0]}"),
        maps=MAPS,
        unit="clip",
        started=started,
        extra={
            "training": steps.training_facts(trained, count),
            "clips": {"validation": validation.tolist(), "test": test.tolist()},
        },
    )
    return job.run
