"""MNIST: the official files, or an embedded sample of small digits where they are absent."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Int64, UInt8
from torch import Tensor
from torchvision.datasets.mnist import read_image_file, read_label_file

import expvae_book.data
from expvae_book.data import catalogue
from expvae_book.data.card import DataCard, idx_shape, survey, takes_sample
from expvae_book.data.generated import digits
from expvae_book.training import hold_out

PUBLISHED = {1: (7, 4, 9, 2), 3: (5, 8)}  # outliers of the paper's Figure 4 and of both reports, by the inlier digit
SAMPLE_NOTE = (
    "Not MNIST: the 1797 digits of scikit-learn (8x8 pixels, 17 grey levels), enlarged to 20x20 and centred by mass "
    "in 28x28, split at random into training and test digits."
)


@dataclass(frozen=True)
class MNIST:
    """Handwritten digits in memory.

    Attributes:
        train_NYX: Training images, white on black, 28x28.
        train_label_N: Their digits.
        test_NYX: Test images.
        test_label_N: Their digits.
        card: What they are.
    """

    train_NYX: UInt8[Tensor, "train 28 28"]
    train_label_N: Int64[Tensor, " train"]
    test_NYX: UInt8[Tensor, "test 28 28"]
    test_label_N: Int64[Tensor, " test"]
    card: DataCard

    def training(self, digit: int) -> tuple[UInt8[Tensor, "n 1 28 28"], UInt8[Tensor, "v 1 28 28"]]:
        """The training images of a digit: those to train on, and a tenth that is held out; see `training.hold_out`."""
        digit_NCYX = self.train_NYX[self.train_label_N == digit][:, None]
        train, held_out = hold_out(len(digit_NCYX))
        return digit_NCYX[train], digit_NCYX[held_out]

    def testing(self, digits: Sequence[int]) -> Int64[Tensor, " n"]:
        """The numbers of the test images of these digits, in the order of the files, which mixes them."""
        return torch.nonzero(torch.isin(self.test_label_N, torch.tensor(digits)))[:, 0]


def outliers(digit: int) -> tuple[int, ...]:
    """The digits that count as outliers where this one is trained on: those that were published, else all others."""
    return PUBLISHED.get(digit, tuple(number for number in range(10) if number != digit))


def load(data: str = "auto", root: Path | None = None) -> MNIST:
    """Load MNIST from `ROOT/MNIST/raw` (torchvision's layout), or the embedded sample.

    Files of MNIST under other names than those of the release, unpacked as `train-images.idx3-ubyte` or still packed,
    are no reason to take the sample: the error says what is there and how to rename it.

    Args:
        data: "real" (the files), "sample" (the embedded sample) or "auto" (the files where there are any).
        root: Data root; by default `expvae_book.data.root()`.

    Raises:
        FileNotFoundError: If files are missing.
        ValueError: If `data` is none of these, or a file is damaged; the message names it.
    """
    root = Path(root or expvae_book.data.root())
    folder = root / catalogue.MNIST.folder
    files = [folder / name for name in catalogue.MNIST.checksums]
    missing = [file.name for file in files if not file.is_file()]
    # Some unpackers write train-images.idx3-ubyte, and downloads by hand end in .gz.
    others = [path.name.lower().removesuffix(".gz").replace(".", "-") for path in (folder / "raw").glob("*")]
    renamed = not set(others).isdisjoint(missing)
    if takes_sample(
        data,
        catalogue.MNIST,
        root,
        folder / "raw",
        present=renamed or len(missing) < len(files),
        missing=f"lacks {', '.join(missing)}" if missing else "",
        stand_in="using the embedded SAMPLE of small digits",
        remedy="unpack what ends in .gz and rename what is there to the names it lacks, or " if renamed else "",
    ):
        return _sample()
    card = survey(catalogue.MNIST, root)
    return MNIST(*_read(*files[:2]), *_read(*files[2:]), card)


def _read(image_file: Path, label_file: Path) -> tuple[UInt8[Tensor, "n 28 28"], Int64[Tensor, " n"]]:
    """The images and the digits of a split."""
    image_shape, label_shape = idx_shape(image_file), idx_shape(label_file)
    if image_shape[1:] != (28, 28):
        raise ValueError(f"{image_file} holds an array of shape {image_shape}, not images of 28x28")
    if label_shape != image_shape[:1]:
        raise ValueError(f"{label_file} holds labels of shape {label_shape} for {image_shape[0]} images")
    label_N = read_label_file(str(label_file))
    if label_N.numel() and int(label_N.max()) > 9:
        raise ValueError(f"{label_file} holds the label {int(label_N.max())}, which is no digit")
    return read_image_file(str(image_file)), label_N


def _sample() -> MNIST:
    train_NYX, test_NYX, train_label_N, test_label_N = digits.split()
    arrays = (train_NYX, train_label_N, test_NYX, test_label_N)
    card = DataCard(
        name="mnist",
        kind="sample",
        counts={"train": len(train_NYX), "test": len(test_NYX)},
        official=dict(catalogue.MNIST.official),
        digest=hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest(),
        licence="CC BY 4.0",
        credit="Digits of scikit-learn, enlarged, not MNIST (Alpaydin and Kaynak 1998, CC BY 4.0)",
        note=SAMPLE_NOTE,
    )
    return MNIST(*map(torch.from_numpy, arrays), card)
