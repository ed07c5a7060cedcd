"""How maps find the defects of MVTec AD: every layer by every preset, and the baselines, on the test images.

Suffixes as in expvae.attention, and N images, M those that are normal or have a mask, K the defective ones of those.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from expvae.metrics import auroc_per_image, fraction_interval
from expvae_book import baselines, choices, measures, randomised, runs, training
from expvae_book.data import mvtec
from expvae_book.names import BASELINES, COMMON, FIELDS, LAYERS, MISSED, RESEMBLES, SHARED

QUANTILE = 0.99  # of the pixels of held-out normal images lie below the threshold that needs no test image
FEW = 16  # images at least, of the test and of the held-out ones
# Presets, layers and the share of the test images: a pass back for each latent takes minutes for all of them.
PER_LATENT, SUMMED = measures.PRESETS[:1], measures.PRESETS[1:]
THIRD = 1 / 3
CASES = (
    (SUMMED, LAYERS[3:], 1.0),
    (("liu2020_code",), LAYERS[1:2], 1.0),  # the second report's, by its rule
    ([preset for preset in SUMMED if preset != "liu2020_code"], LAYERS[1:2], THIRD),
    (SUMMED, (LAYERS[0], LAYERS[2]), THIRD),
    (PER_LATENT, LAYERS[5:], 1.0),
    (PER_LATENT, LAYERS[3:5], THIRD),
    (PER_LATENT, LAYERS[:3], 0.0),
)
# While a model is trained, on a third of the images: R2's layer, the layer that pages show, and the last one.
FOLLOWED = ((SUMMED[:1], LAYERS[1:2]), (SUMMED, (LAYERS[3], LAYERS[5])), (PER_LATENT, LAYERS[5:]))
# By the paper's rule only where a run is judged: before the first step and at the end.
FOLLOWED_LATE, LATE = ((PER_LATENT, LAYERS[3:4]),), 0.8
SHOWN_MAP = ("layer2.1.conv1", "liu2020_code")  # in the panel, and behind the explorer of thresholds
RANDOMISED = ((SHOWN_MAP[1:], SHOWN_MAP[:1]), (PER_LATENT, LAYERS[5:]))  # as FOLLOWED

PLAIN = {field: title for field, title in FIELDS.items() if field != "aupro"}  # without what takes longest

Maps = dict[str, Float[Tensor, "_ y x"]]  # those of the test images and of held-out ones meet in one call


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
        rank_N = randomised.rank_correlation(randomised.thinned(map_NYX), randomised.thinned(other_NYX))
        rank_N = rank_N[~np.isnan(rank_N)]
        if len(rank_N):
            rows.append(runs.row(RESEMBLES, float(rank_N.mean()), other, name, n=len(rank_N)))
    return rows


@dataclass(frozen=True)
class Seen:
    """Some test images, and what their maps are measured by.

    Attributes:
        image_N: Their numbers in the category.
        defects: What each is: "good", or the name of its defect.
        known_N: Which are normal or have a mask.
        truth: The anomalous pixels of those.
    """

    image_N: Int64[Tensor, " n"]
    defects: list[str]
    known_N: Bool[Tensor, " n"]
    truth: measures.Truth

    @classmethod
    def of(cls, category: mvtec.Category, some_N: Int64[Tensor, " n"]) -> "Seen":
        """These test images of a category."""
        masks = [category.test_mask[i] for i in some_N]
        known_N = torch.tensor([mask_YX is not None for mask_YX in masks], dtype=torch.bool)
        there = [mask_YX for mask_YX in masks if mask_YX is not None]
        truth_MYX = torch.stack(there) if there else torch.zeros(0, *category.test_NCYX.shape[2:], dtype=torch.bool)
        defects = [category.test_defect[i] for i in some_N]
        return cls(some_N, defects, known_N, measures.Truth(truth_MYX, some_N[known_N]))

    @property
    def masked(self) -> bool:
        """Whether pixels can be measured, with an interval: two images or more, and an anomaly in one of them."""
        return len(self.truth.truth_NYX) > 1 and bool(self.truth.truth_NYX.any())

    def measure(
        self,
        measured: measures.Measured,
        name: str,
        map_NYX: Float[Tensor, "n y x"],
        threshold: float,
        *,
        by_kind: bool = False,
    ) -> list[dict]:
        """Measure a map of these images, and give the rows of single defective ones, by kind of defect if asked for."""
        rows = []
        if self.masked:
            measured.add(name, map_NYX[self.known_N], self.truth, threshold)
            kinds = [kind for kind, known in zip(self.defects, self.known_N, strict=True) if known]
            rows = missed_rows(name, map_NYX[self.known_N], self.truth, kinds if by_kind else ())
        anomalous_N = torch.tensor([kind != "good" for kind in self.defects])
        measured.images(name, map_NYX, measures.Truth(anomalous_N, self.image_N))
        return rows


def evaluate(
    model: nn.Module,
    category: mvtec.Category,
    held_out_NCYX: UInt8[Tensor, "h c y x"],
    simple: Maps,
    normal: tuple[Tensor, Tensor],
    batch: int,
) -> tuple[measures.Measured, list[dict], dict[str, tuple[Tensor, float]]]:
    """Every map of the test images: its measures, further rows, and the map that pages show, with its threshold.

    Pixels are measured where there is a mask with an anomaly, and whole images where some are normal and some are not.

    Args:
        model: The trained VAE.
        category: The images.
        held_out_NCYX: Held-out normal images.
        simple: The maps of `baseline_maps`, of the test images and of the held-out ones after them.
        normal: Mean and log-variance of the posterior of normal images.
        batch: Images at a time.
    """
    tested = len(category.test_NCYX)
    of_test = {name: map_NYX[:tested] for name, map_NYX in simple.items()}
    grey_NYX = training.to_unit(category.test_NCYX).mean(1)
    others = of_test | {"brightness": grey_NYX, "edges": baselines.edges(grey_NYX)}
    measured, kept = measures.Measured(), {}
    everything = Seen.of(category, torch.arange(tested))
    further = anomalous_rows(everything.truth.truth_NYX) if everything.masked else []
    for name, map_NYX in of_test.items():
        further += everything.measure(measured, name, map_NYX, threshold(simple[name][tested:]))
    held_out_V = some_of(len(held_out_NCYX), least=FEW // 2)
    for share, pairs in by_share(CASES).items():
        some_N = some_of(tested, share)
        seen = Seen.of(category, some_N)
        # Methods that divide by the whole batch would tell defects apart by the folders that they lie in, or normal
        # images by those beside them: batches are put together at random, of test images or of held-out ones alone.
        options = {"batch": batch, "seed": measures.SEED, "normal": normal, "shuffled": True}
        maps, normal_maps = (
            measures.layers_and_presets(model, pairs, x_NCYX, **options)
            for x_NCYX in (category.test_NCYX[some_N], held_out_NCYX[held_out_V])
        )
        for (name, map_NYX), (_, normal_NYX) in zip(maps, normal_maps, strict=True):
            common, common_NYX = f"mean of {name}", normal_NYX.mean(0).expand_as(map_NYX)
            further += seen.measure(measured, name, map_NYX, threshold(normal_NYX), by_kind=share == 1)
            if seen.masked and share == 1:
                beside = {other: other_NYX[some_N] for other, other_NYX in others.items()} | {common: common_NYX}
                further += resemblance_rows(name, map_NYX, beside)
                measured.pixels(common, common_NYX[seen.known_N], seen.truth, PLAIN)
                further += measured.differences([name], [*simple, common])
            if name == measures.map_name(*SHOWN_MAP):
                kept[name] = (map_NYX, threshold(normal_NYX))
    return measured, further, kept


def change_rows(model: nn.Module, category: mvtec.Category, normal: tuple[Tensor, Tensor], batch: int) -> list[dict]:
    """What one choice of a rule changes in the map that pages show, on some images; see expvae_book.choices."""
    known = torch.tensor([i for i, mask_YX in enumerate(category.test_mask) if mask_YX is not None])
    some_N = known[some_of(len(known))]
    seen = Seen.of(category, some_N)
    if not seen.masked:
        return []
    return choices.change_rows(
        model,
        f"encoder.{SHOWN_MAP[0]}",
        category.test_NCYX[some_N],
        seen.truth.truth_NYX,
        seen.truth.unit_N,
        measured_N=seen.known_N,
        normal=normal,
        batch=batch,
        activation=False,  # a batch normalisation follows the convolution
        resamples=measures.RESAMPLES,
        seed=measures.SEED,
    )


def by_share(cases: Sequence[tuple[Sequence[str], Sequence[str], float]]) -> dict[float, list[tuple[str, str]]]:
    """The pairs of a layer and a preset of some cases, by the share of the images, which share passes."""
    pairs: dict[float, list[tuple[str, str]]] = {}
    for presets, layers, share in cases:
        pairs.setdefault(share, []).extend(product(layers, presets))
    return pairs


def some_of(count: int, share: float = 0.0, least: int | None = None) -> Int64[Tensor, " k"]:
    """The numbers of a share of so many images, FEW or `least` of them at least, drawn at random, the same for all."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(measures.SEED))
    return order[: max(FEW if least is None else least, math.ceil(share * count))].sort().values
