"""Small digits of scikit-learn, enlarged to look like MNIST's, for which they stand in."""

import numpy as np
from jaxtyping import Int64, UInt8
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

TEST = 297  # of the 1797 digits


def split() -> list[UInt8[np.ndarray, "n 28 28"] | Int64[np.ndarray, " n"]]:
    """Training images, test images, and the digits of either, divided at random with each digit's share kept."""
    small = load_digits()
    label_N = small.target.astype(np.int64)
    x_NYX = enlarged(small.images.astype(np.int64))
    return train_test_split(x_NYX, label_N, test_size=TEST, stratify=small.target, random_state=0)


def enlarged(v_NYX: Int64[np.ndarray, "n 8 8"]) -> UInt8[np.ndarray, "n 28 28"]:
    """Enlarge 8x8 digits of grey levels 0 to 16 to look like MNIST's.

    Bilinear to 20x20 (pixel centres, as torch's align_corners=False), then x → (x - 3/8)/(3/8) cut to [0, 1], which
    makes the blurred strokes as sharp as MNIST's (mean 0.135 against 0.133, share of ink 0.19 in both), then moved so
    that the centre of mass is the centre of 28x28, as MNIST was made. In whole numbers, so that every machine gets
    the same bytes.
    """
    source = (4 * np.arange(20) - 3).clip(0, 70)  # tenths of a source pixel
    weight = np.maximum(10 - np.abs(source[:, None] - 10 * np.arange(8)), 0)  # tenths
    ink_NYX = weight @ v_NYX @ weight.T  # 16 levels, in hundredths: 0 to 1600
    ink_NYX = ((ink_NYX - 600) * 255 // 600).clip(0, 255)
    x_NYX = np.zeros((len(v_NYX), 28, 28), np.uint8)
    for image, ink_YX in zip(x_NYX, ink_NYX, strict=True):
        y, x = (_offset(ink_YX.sum(axis)) for axis in (1, 0))
        image[y : y + 20, x : x + 20] = ink_YX
    return x_NYX


def _offset(ink: Int64[np.ndarray, " 20"]) -> int:
    """Where a profile of 20 pixels must start for its centre of mass to lie in the middle of 28."""
    twice = 2 * np.arange(20) + 1
    centre = (ink @ twice + ink.sum()) // (2 * ink.sum())  # rounded
    return int(np.clip(14 - centre, 0, 8))
