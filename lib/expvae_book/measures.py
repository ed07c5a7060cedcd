"""What a job keeps of every map: its measures, what the resamples of the test units gave, and the maps of some images.

A job trains one model, and stores all that a page will ask of it before the weights are gone. So every layer that a
chapter offers is explained by every preset, and each map is measured in the same way. The maps are named "conv2,
liu2020_paper", and rows of a record have that name as their method; `expvae_book.runs.Run.at` shows one of them.

Resamples are drawn with one seed for all runs: any two maps of the same units, of one run or of two, are paired, and
the difference of their measures has the interval that the differences of their resamples give.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float16, Int64, UInt8
from torch import Tensor, nn

from expvae import Method, attentions
from expvae.metrics import Interval, PixelMetrics, iou_intervals, percentile_interval
from expvae_book import checkpoints, explanation, names, runs, training, weights
from expvae_book.names import AUROC, BEST_IOU, DIFFERENCE, IMAGE_AUROC
from expvae_book.recipes import Recipe
from expvae_book.weights import Trained

PRESETS = names.PRESETS
SEED, RESAMPLES, LEVEL = 0, 500, 0.95
# Shares of the epochs at which maps are measured, dense where a training changes most; a run is judged by the mean over
# the last ones.
STAGES = (0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9, 1)
LAST = names.LAST_STAGES
FOLLOWED = {"auroc": AUROC, "average_precision": "average precision", "best_iou": BEST_IOU}
AT_ONCE = 64  # images whose pixels are counted
FIELDS = names.FIELDS | {
    "grid_iou": "IoU, best of 99 thresholds (oracle)",
    "best_mean_iou": "mean IoU of both classes (oracle)",
    "iou": "IoU, threshold from validation",
    "fpr95": "FPR at 95 % TPR",
}
# Of these measures a record keeps every resample.
PAIRED = (AUROC, "average precision", "AUPRO", BEST_IOU, f"{IMAGE_AUROC}, mean", f"{IMAGE_AUROC}, maximum")


@dataclass(frozen=True)
class Truth:
    """What maps of test images are measured by.

    Attributes:
        truth_NYX: Their anomalous pixels, or which images are anomalous.
        unit_N: What each image is resampled with: itself, or its clip.
        subset: What the rows are of, such as "test clips".
    """

    truth_NYX: Bool[Tensor, "n ..."]
    unit_N: Int64[Tensor, " n"]
    subset: str = ""

    def count(self, map_NYX: Float[Tensor, "n ..."], regions: bool = False) -> PixelMetrics:
        """The counts of the pixels of a map of each image, or of a score of each."""
        counts = PixelMetrics(regions=regions)
        for part in torch.arange(len(map_NYX)).split(AT_ONCE):
            counts.update(map_NYX[part], self.truth_NYX[part], unit=self.unit_N[part])
        return counts


@dataclass
class Measured:
    """Rows of a record, and what the resamples gave, of one map after the other.

    Attributes:
        rows: The rows.
        measured: By map, then by measure, its interval and what every resample gave.
    """

    rows: list[dict] = field(default_factory=list)
    measured: dict[str, dict[str, tuple[Interval, Float[np.ndarray, " r"]]]] = field(default_factory=dict)

    def add(self, name: str, map_NYX: Float[Tensor, "n y x"], truth: Truth, threshold: float) -> None:
        """Measure the pixels of a map by every measure, and the IoU by every convention.

        Args:
            name: Name of the map.
            map_NYX: A map of each test image.
            truth: What it is measured by.
            threshold: A threshold that was chosen without the test images.
        """
        self.pixels(name, map_NYX, truth, FIELDS, threshold)
        conventions = iou_intervals(
            map_NYX, truth.truth_NYX, unit_N=truth.unit_N, validation=threshold, seed=SEED, resamples=RESAMPLES
        )
        for (average, classes, choice), measured in conventions.items():
            self.rows.append(runs.row(f"IoU, {average}, {classes}", method=name, subset=choice, **vars(measured)))

    def images(self, name: str, map_NYX: Float[Tensor, "n y x"], truth: Truth) -> None:
        """Measure whole images by the mean and by the maximum of the map, where some are anomalous and some are not."""
        if not truth.truth_NYX.any() or truth.truth_NYX.all():
            return
        for how, score_N in {"mean": map_NYX.mean((1, 2)), "maximum": map_NYX.amax((1, 2))}.items():
            self._keep(name, truth.count(score_N), truth, {"auroc": (IMAGE_AUROC, how)})

    def pixels(
        self,
        name: str,
        map_NYX: Float[Tensor, "n y x"],
        truth: Truth,
        fields: Mapping[str, str],
        threshold: float | None = None,
    ) -> None:
        """Measure the pixels of a map by some fields of `expvae.metrics.PixelScores`, which rows give these titles."""
        titles = {field: (title, truth.subset) for field, title in fields.items()}
        self._keep(name, truth.count(map_NYX, regions="aupro" in fields), truth, titles, threshold)

    def _keep(
        self,
        name: str,
        counts: PixelMetrics,
        truth: Truth,
        titles: Mapping[str, tuple[str, str]],
        threshold: float | None = None,
    ) -> None:
        value = vars(counts.compute(threshold))
        drawn = counts.replicates(seed=SEED, threshold=threshold, resamples=RESAMPLES)
        for field_, (metric, subset) in titles.items():
            interval = percentile_interval(value[field_], drawn[field_], LEVEL, len(truth.unit_N.unique()))
            self.rows.append(runs.row(metric, method=name, subset=subset, **vars(interval)))
            key = f"{metric}, {subset}" if metric == IMAGE_AUROC else metric
            if key in PAIRED:
                self.measured.setdefault(name, {})[key] = (interval, drawn[field_])

    def differences(self, maps: Sequence[str], others: Sequence[str], subset: str = "") -> list[dict]:
        """Rows of the paired differences of the pixel AUROC of maps from that of others."""
        rows = []
        for one, other in product(maps, others):
            (ours, ours_R), (theirs, theirs_R) = (self.measured[name][AUROC] for name in (one, other))
            interval = percentile_interval(ours.value - theirs.value, ours_R - theirs_R, LEVEL, ours.n)
            rows.append(runs.row(DIFFERENCE, method=f"{one} − {other}", subset=subset, **vars(interval)))
        return rows

    def replicates(self, maps: Iterable[str]) -> dict[str, Float16[np.ndarray, "m r"]]:
        """What every resample gave for each of PAIRED, by map; NaN where a map has no such measure."""
        lacking = (None, np.full(RESAMPLES, np.nan))
        return {
            f"resamples/{name}": np.array(
                [self.measured[name].get(measure, lacking)[1] for measure in PAIRED], dtype=np.float16
            )
            for name in maps
        }


def layers_and_presets(
    model: nn.Module, pairs: Iterable[tuple[str, str]], x_NCYX: UInt8[Tensor, "n c y x"], **options: object
) -> Iterator[tuple[str, Float[Tensor, "n y x"]]]:
    """Name and maps of images by pairs of a layer and a preset, all from the same passes.

    Args:
        model: The trained VAE.
        pairs: Layers of its encoder, and presets, or scores, as for `expvae_book.explanation.method_of`.
        x_NCYX: Images.
        options: Of `expvae_book.explanation.explain_layers`.
    """
    yield from explanation.explain_layers(model, _wanted(pairs), x_NCYX, **options).items()


def _wanted(pairs: Iterable[tuple[str, str]]) -> dict[str, tuple[str, Method]]:
    return {map_name(*pair): (f"encoder.{pair[0]}", explanation.method_of(pair[1])) for pair in pairs}


def map_name(layer: str, preset: str) -> str:
    """How rows of a record name a map."""
    return f"{layer}, {preset}"


def examples(
    model: nn.Module,
    layers: Sequence[str],
    presets: Sequence[str],
    x_BCYX: UInt8[Tensor, "b c y x"],
    normal: tuple[Tensor, Tensor],
    seed: int,
) -> dict[str, np.ndarray]:
    """The maps of a few images at the resolution of each layer, by the name of the map; see `halved`."""
    x_BCYX = training.to_unit(x_BCYX).to(next(model.parameters()).device)
    wanted, chance, maps = _wanted(product(layers, presets)), torch.Generator().manual_seed(seed), {}
    for name, result in attentions(model.encode, wanted, x_BCYX, normal=normal, generator=chance).items():
        maps |= halved(name, result.map_BIHW.mean(1))
    return maps


def halved(name: str, map_: Float[Tensor, "..."]) -> dict[str, np.ndarray]:
    """Maps in float16 as shares of their highest value, and that value: some are too small for float16 themselves."""
    peak = map_.max().item()
    return {name: (map_ / (peak or 1)).cpu().numpy().astype(np.float16), f"{name}, peak": np.float32(peak)}


def budget(unit: str, recipe: Recipe, *, asked: tuple[int, int], used: tuple[int, int]) -> dict[str, Any]:
    """The budget of a training, asked by its recipe and used, in optimiser steps and in images, as a record has it.

    Args:
        unit: "epochs" or "images", in which the pages count.
        recipe: Its recipe, for the size of the batches.
        asked: Epochs, and images of each, that the recipe asks for.
        used: Those that there were.
    """
    counts = {
        "epochs": (asked[0], used[0]),
        "images": (asked[0] * asked[1], used[0] * used[1]),
        "steps": tuple(epochs * -(-images // recipe.batch_size) for epochs, images in (asked, used)),
    }
    shown = {"unit": unit, "asked": counts[unit][0], "used": counts[unit][1]}
    return shown | {name: {"asked": counts[name][0], "used": counts[name][1]} for name in ("steps", "images")}


def stages(fit: Callable[[int], Trained], epochs: int) -> Iterator[tuple[int, Trained]]:
    """Train to the end by way of some shares of the epochs, so that a job sees what the maps were worth on the way.

    The training to each share goes on from the one before. Where the weights of the end are in the cache already, only
    those on the way that are there too come before them. Told to end early (see `expvae_book.checkpoints`), a training
    has its last stage there.

    Args:
        fit: Trains, or reads from the cache, a model of so many epochs.
        epochs: Of the end.

    Yields:
        Epochs and model of each stage, the untrained network first.
    """
    try:
        with weights.cached_only():
            fit(epochs)
        known = weights.cached_only
    except weights.NotCachedError:
        known = nullcontext
    with checkpoints.one_clock():
        for asked in sorted({math.ceil(share * epochs) for share in STAGES}):
            try:
                with known() if asked else nullcontext():  # the untrained network needs no cache
                    trained = fit(asked)
            except weights.NotCachedError:
                continue
            done = len(trained.history.kl)
            yield done, trained
            if done < asked:
                return


@dataclass
class Course:
    """Some measures of maps over a training, at its stages, on some test images.

    Attributes:
        truth: What they are measured by, where a job has several truths.
        values: By map and stage the optimiser steps before it, and the measures of FOLLOWED.
        drawn: By map and stage the pixel AUROC of every resample.
        units: How many units are resampled.
    """

    truth: str = ""
    values: dict[str, list[list[float]]] = field(default_factory=dict)
    drawn: dict[str, list[Float[np.ndarray, " r"]]] = field(default_factory=dict)
    units: int = 0

    def add(self, steps: int, maps: Iterable[tuple[str, Float[Tensor, "n y x"]]], truth: Truth) -> None:
        """Measure the maps of a stage, if there is an anomaly to be found."""
        if not truth.truth_NYX.any():
            return
        self.units = len(truth.unit_N.unique())
        for name, map_NYX in maps:
            counts = truth.count(map_NYX)
            scores = vars(counts.compute())
            self.values.setdefault(name, []).append([steps, *(scores[field] for field in FOLLOWED)])
            self.drawn.setdefault(name, []).append(counts.resampled_aurocs(SEED, RESAMPLES))

    def arrays(self) -> dict[str, np.ndarray]:
        """By map its steps and measures, "course/...", and what verdicts pair, "judged/..." (see `judged`)."""
        mark, kept = f"{self.truth}/" if self.truth else "", {}
        for name, values in self.values.items():
            kept[f"{mark}course/{name}"] = np.array(values, dtype=np.float32)
            kept[f"{mark}judged/{name}"] = self.judged(name).astype(np.float16)
        return kept

    def judged(self, name: str) -> Float[np.ndarray, "2 r"]:
        """The pixel AUROC of every resample: of the untrained network, and the mean over the last stages.

        By the latter a run is judged: measures swing while a network trains. What was not seen is NaN.
        """
        trained, drawn_SR = self._trained(name), np.array(self.drawn[name])
        lost_R = np.full(drawn_SR.shape[1], np.nan)
        untrained_R = drawn_SR[0] if self._saw_untrained(name) else lost_R
        return np.array([untrained_R, drawn_SR[trained].mean(0) if trained else lost_R])

    def rows(self) -> list[dict]:
        """By map: the mean over the last stages, and its paired difference from others.

        These are the untrained network, and maps that look at no test image.
        """
        found, mark = [], f", {self.truth}" if self.truth else ""
        for name, values in self.values.items():
            trained, values_SF = self._trained(name), np.array(values)[:, 1:]
            if not trained:
                continue
            means = values_SF[trained].mean(0)
            untrained_R, last_R = self.judged(name)
            for metric, mean in zip(FOLLOWED.values(), means, strict=True):
                ends = self._ends(float(mean), last_R) if metric == AUROC else {"value": float(mean)}
                found.append(runs.row(metric, method=name, subset=names.LAST + mark, **ends))
            others = {names.UNTRAINED: (values_SF[0, 0], untrained_R)} if self._saw_untrained(name) else {}
            for place in set(names.PLACES) & set(self.values) - {name}:
                others[place] = (self.values[place][-1][1], self.judged(place)[1])
            for other, (value, other_R) in sorted(others.items()):
                ends = self._ends(float(means[0] - value), last_R - other_R)
                found.append(runs.row(DIFFERENCE, method=f"{name} − {other}", subset=names.LAST + mark, **ends))
        return found

    def _trained(self, name: str) -> list[int]:
        """The last of the stages after the first step, by their places."""
        return [place for place, (steps, *_) in enumerate(self.values[name]) if steps > 0][-LAST:]

    def _saw_untrained(self, name: str) -> bool:
        return self.values[name][0][0] == 0

    def _ends(self, value: float, drawn_R: Float[np.ndarray, " r"]) -> dict[str, Any]:
        return vars(percentile_interval(value, drawn_R, LEVEL, self.units))
