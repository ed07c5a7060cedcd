"""What of MNIST a job sees: the digits that it trains on and tests, and the truths that pixels are measured by."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import torch
from jaxtyping import Bool, Float, Int64, UInt8
from torch import Tensor, nn

from expvae_book import baselines, explanation, measures, recipes, training, truth
from expvae_book.data import mnist
from expvae_book.names import OUTLIERS, STROKES

EVERY = 10  # outliers while a model is trained, and where its layers are randomised


@dataclass(frozen=True)
class Digits:
    """What of MNIST a job sees.

    Attributes:
        images: All of it.
        digit: The inlier.
        train_NCYX: Training images: of the inlier, or of the outliers where the wrong class is trained on.
        held_out_NCYX: A tenth more of the same, to watch the training.
        inlier_NCYX: Training images of the inlier.
        test_NYX: Test images of the inlier and of its outliers, mixed as in the files: the authors' code divides by
            the batch.
        label_N: Their digits.
        batch: Images at a time.
    """

    images: mnist.MNIST
    digit: int
    train_NCYX: UInt8[Tensor, "t 1 y x"]
    held_out_NCYX: UInt8[Tensor, "v 1 y x"]
    inlier_NCYX: UInt8[Tensor, "i 1 y x"]
    test_NYX: UInt8[Tensor, "n y x"]
    label_N: Int64[Tensor, " n"]
    batch: int

    @cached_property
    def outlier_N(self) -> Bool[Tensor, " n"]:
        """Which test images are outliers."""
        return self.label_N != self.digit

    @cached_property
    def truths(self) -> dict[str, Bool[Tensor, "n y x"]]:
        """The foreign ink of every test image, with a margin of one pixel and strictly."""
        x_NYX, inlier_MYX = (training.to_unit(images) for images in (self.test_NYX, self.inlier_NCYX[:, 0]))
        margins = {"truth": 1, "strict truth": 0}
        return {name: truth.ink_truth(x_NYX, inlier_MYX, margin) for name, margin in margins.items()}

    @cached_property
    def planted(self) -> dict[str, tuple[UInt8[Tensor, "m y x"], measures.Truth]]:
        """Test images of the inlier with strokes added or erased, and the pixels that this changed."""
        of_inlier = self.test_NYX[~self.outlier_N]
        made = {kind: truth.planted(of_inlier, kind, measures.SEED) for kind in STROKES}
        return {
            kind: (changed_MYX, measures.Truth(mask_MYX, torch.arange(len(mask_MYX)), kind))
            for kind, (changed_MYX, mask_MYX) in made.items()
        }

    def some(self, every: int = EVERY) -> tuple[Int64[Tensor, " k"], measures.Truth]:
        """The numbers of every so many outliers, and their foreign ink."""
        some = torch.nonzero(self.outlier_N)[::every, 0]
        return some, measures.Truth(self.truths["truth"][some], some, OUTLIERS)

    def followed(self) -> dict[str, tuple[UInt8[Tensor, "k y x"], measures.Truth]]:
        """What maps are measured on while a model is trained: by truth some images, and their anomalous pixels."""
        some, foreign = self.some()
        return {"": (self.test_NYX[some], foreign)} | {
            kind: (x_NYX[::EVERY], measures.Truth(of.truth_NYX[::EVERY], of.unit_N[::EVERY]))
            for kind, (x_NYX, of) in self.planted.items()
        }

    @property
    def one_of_each(self) -> UInt8[Tensor, "10 y x"]:
        """The first test image of every digit."""
        first = [torch.nonzero(self.images.test_label_N == number)[0, 0] for number in range(10)]
        return self.images.test_NYX[torch.stack(first)]

    @property
    def credit(self) -> str:
        """Whose images these are."""
        return f"{self.images.card.credit} {self.images.card.mark}".strip()

    def places(self, count: int) -> dict[str, Float[Tensor, "count y x"]]:
        """The maps that look at no test image, for so many of them."""
        return baselines.places(self.inlier_NCYX, count)

    def explain(
        self, model: nn.Module, x_NYX: UInt8[Tensor, "n y x"], layers: Sequence[str], presets: Sequence[str]
    ) -> Iterator[tuple[str, Float[Tensor, "n y x"]]]:
        """Name and maps of images, of each layer by each preset."""
        normal = explanation.normal_for(presets, model, self.train_NCYX)
        options = {"batch": self.batch, "seed": measures.SEED, "normal": normal}
        return measures.layers_and_presets(model, product(layers, presets), x_NYX[:, None], **options)


def load(data: str, digit: int, recipe: str, trained_on: str = "inliers") -> Digits:
    """The digits of a job.

    Args:
        data: As for `expvae_book.data.mnist.load`.
        digit: The inlier.
        recipe: A name in `expvae_book.recipes.MNIST`.
        trained_on: "inliers", or "outliers" for the wrong class: as many images, of the outlier digits.
    """
    images = mnist.load(data)
    inlier_NCYX, held_out_NCYX = images.training(digit)
    train_NCYX = inlier_NCYX
    if trained_on == "outliers":
        parts = zip(*(images.training(number) for number in mnist.outliers(digit)), strict=True)
        chance = torch.Generator().manual_seed(measures.SEED)
        train_NCYX, held_out_NCYX = (
            torch.cat(part)[torch.randperm(sum(map(len, part)), generator=chance)[: len(like)]]
            for part, like in zip(parts, (inlier_NCYX, held_out_NCYX), strict=True)
        )
    chosen = images.testing([digit, *mnist.outliers(digit)])
    tested = images.test_NYX[chosen], images.test_label_N[chosen]
    return Digits(images, digit, train_NCYX, held_out_NCYX, inlier_NCYX, *tested, recipes.MNIST[recipe].batch_size)
