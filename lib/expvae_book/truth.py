"""Pixel truths for MNIST, which has none: ink that the nearest training inlier lacks, and strokes that were planted.

The definitions are ours, not the paper's or a report's. They depend on no model, and so favour no kind of map.
"""

import numpy as np
import torch
from jaxtyping import Bool, Int64, Shaped, UInt8
from torch import Tensor
from torch.nn import functional as F

from expvae_book.names import STROKES

Array = np.ndarray | Tensor

INK = 0.5  # intensity from which a pixel counts as ink
IMAGES_PER_CHUNK = 512  # distances to 60 000 inliers then take 120 MB
LENGTH, RADIUS = 8.0, 1.3  # of a planted stroke, in pixels


def nearest_inlier(x_NYX: Shaped[Array, "n y x"], inlier_MYX: Shaped[Array, "m _ _"]) -> Int64[Tensor, " n"]:
    """Index of the training inlier nearest to each image, in Euclidean distance between pixels.

        argmin_m ‖x − y_m‖² = argmin_m (½‖y_m‖² − x·y_m)

    by one matrix product in float32 on the device of x. Two inliers whose distances agree to about 1e-6 of their
    size may be taken for each other.

    Args:
        x_NYX: Images with intensities in [0, 1].
        inlier_MYX: Training images of the inlier class, of the same size and range.

    Raises:
        ValueError: If there is no inlier, the sizes differ or an intensity is outside [0, 1].
    """
    x_NYX = _intensities("x_NYX", x_NYX)
    inlier_MYX = _intensities("inlier_MYX", inlier_MYX).to(x_NYX.device)
    if len(inlier_MYX) == 0:
        raise ValueError("inlier_MYX must hold at least one image, got none.")
    if x_NYX.shape[1:] != inlier_MYX.shape[1:]:
        raise ValueError(
            f"x_NYX and inlier_MYX must be of one size, got {tuple(x_NYX.shape[1:])} and {tuple(inlier_MYX.shape[1:])}."
        )
    inlier_MP = inlier_MYX.flatten(1)
    half_square_M = inlier_MP.square().sum(dim=1) / 2
    return torch.cat(
        [(half_square_M - x_NP @ inlier_MP.T).argmin(dim=1) for x_NP in x_NYX.flatten(1).split(IMAGES_PER_CHUNK)]
    )


def ink_truth(
    x_NYX: Shaped[Array, "n y x"], inlier_MYX: Shaped[Array, "m _ _"], tolerance: int = 0
) -> Bool[Tensor, "n y x"]:
    """Pixels of ink (intensity of at least 0.5) where the nearest training inlier has none.

        truth(p) = [x(p) ≥ ½] · [y(q) < ½ for all q with |q − p|∞ ≤ tolerance]

    with y the training inlier nearest to x (`nearest_inlier`). Ink that is missing from x is not marked, and an
    image whose ink the inlier covers has no anomalous pixel. The truth is a part of the ink, so that any map that
    finds ink scores well over all pixels; whether a map tells anomalous ink from other ink shows where only ink counts
    (``where_NP=x_NYX >= INK`` in `expvae.metrics._pixel`).

    Args:
        x_NYX: Images with intensities in [0, 1].
        inlier_MYX: Training images of the inlier class, of the same size and range.
        tolerance: How far, in pixels along either axis, the inlier's ink may lie and still count as present.

    Raises:
        ValueError: As for `nearest_inlier`, or if tolerance is negative.
    """
    if tolerance < 0:
        raise ValueError(f"tolerance must be 0 or more pixels, got {tolerance}.")
    x_NYX, inlier_MYX = (torch.as_tensor(image_NYX).detach().float() for image_NYX in (x_NYX, inlier_MYX))
    nearest_NYX = inlier_MYX.to(x_NYX.device)[nearest_inlier(x_NYX, inlier_MYX)]
    reach_NYX = F.max_pool2d(nearest_NYX[:, None], kernel_size=2 * tolerance + 1, stride=1, padding=tolerance)[:, 0]
    return (x_NYX >= INK) & (reach_NYX < INK)


def planted(
    x_NYX: UInt8[Tensor, "n y x"], kind: str, seed: int
) -> tuple[UInt8[Tensor, "n y x"], Bool[Tensor, "n y x"]]:
    """Images with one straight stroke each, and exactly the pixels that it changed.

    A stroke is all pixels within a radius of a segment of random direction. "strokes added": what is less than half
    ink becomes ink (255), around such a pixel in the middle half of the image. "strokes erased": all ink goes (0),
    around a pixel of ink. An image that the stroke leaves as it was has no anomalous pixel.

    Args:
        x_NYX: Images, 0…255.
        kind: Which of STROKES.
        seed: Fixes places and directions.

    Raises:
        ValueError: If the kind is unknown.
    """
    if kind not in STROKES:
        raise ValueError(f"kind={kind!r} is unknown; choose one of: {', '.join(STROKES)}")
    chance = torch.Generator().manual_seed(seed)
    n, y, x = x_NYX.shape
    ink_NYX = x_NYX >= 255 * INK
    place_Y, place_X = torch.arange(y), torch.arange(x)
    if kind == "strokes added":
        within_YX = torch.outer((place_Y - (y - 1) / 2).abs() < y / 4, (place_X - (x - 1) / 2).abs() < x / 4)
        start_NYX = within_YX & ~ink_NYX
    else:
        start_NYX = ink_NYX
    # The highest of independent numbers falls on each of the pixels allowed with the same chance.
    middle_N = torch.where(start_NYX, torch.rand(n, y, x, generator=chance), -1.0).flatten(1).argmax(1)
    angle_N11 = torch.pi * torch.rand(n, 1, 1, generator=chance)
    down_NYX = (place_Y[:, None] - (middle_N // x)[:, None, None]).expand(n, y, x)
    right_NYX = (place_X - (middle_N % x)[:, None, None]).expand(n, y, x)
    along_NYX = down_NYX * angle_N11.sin() + right_NYX * angle_N11.cos()
    excess_NYX = along_NYX - along_NYX.clamp(-LENGTH / 2, LENGTH / 2)
    across_NYX = down_NYX * angle_N11.cos() - right_NYX * angle_N11.sin()
    stroke_NYX = torch.hypot(across_NYX, excess_NYX) <= RADIUS
    if kind == "strokes added":
        changed_NYX = torch.where(stroke_NYX & ~ink_NYX, 255, x_NYX)
    else:
        changed_NYX = torch.where(stroke_NYX & ink_NYX.any((1, 2), keepdim=True), 0, x_NYX)
    return changed_NYX.to(torch.uint8), changed_NYX != x_NYX


def _intensities(name: str, image_NYX: Shaped[Array, "n y x"]) -> Shaped[Tensor, "n y x"]:
    image_NYX = torch.as_tensor(image_NYX).detach().float()
    if image_NYX.numel() and not (image_NYX.min() >= 0 and image_NYX.max() <= 1):  # NaN compares false
        raise ValueError(f"{name} must hold intensities in [0, 1]; divide 8-bit images by 255.")
    return image_NYX
