"""What the pixel metrics take: finite scores and boolean truths, as arrays or tensors, with or without masks."""

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Bool, Int64, Shaped

if TYPE_CHECKING:
    from torch import Tensor

    Array = np.ndarray | Tensor
else:
    Array = Any  # anything with a shape and a type: these measures compute with NumPy, and do not wait for torch
WithoutMask = Literal["leave out", "normal"]
Masks = Shaped[Array, "n ..."] | Sequence[Shaped[Array, "..."] | None]


def as_array(values: Shaped[Array, "..."]) -> Shaped[np.ndarray, "..."]:
    """The values as an array; NumPy has no bfloat16, so small floats of torch become float32, which is exact.

    Raises:
        ValueError: If some of the values are masked.
    """
    torch = sys.modules.get("torch")  # who has a tensor has imported it
    if torch is not None and isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        return (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()
    if np.ma.is_masked(values):
        raise ValueError(
            "masked values would count as if they were not; give plain arrays, with `where` (True at what counts) "
            "if the measure takes it, else without the masked values."
        )
    return np.asarray(values)


def checked(score: Shaped[Array, "..."], truth: Shaped[Array, "..."]) -> tuple[np.ndarray, np.ndarray]:
    """Score and truth as arrays.

    Raises:
        ValueError: If the shapes differ, truth is not boolean, a score is no number, NaN or infinite, or values are
            masked.
    """
    score, truth = as_array(score), as_array(truth)
    if score.shape != truth.shape:
        raise ValueError(f"score and truth must have the same shape, got {score.shape} and {truth.shape}.")
    if truth.dtype != bool:
        raise ValueError(f"truth must be boolean (for a mask: mask > 0), got {truth.dtype}.")
    if score.dtype.kind not in "biuf":  # missing values of pandas, say, make objects
        raise ValueError(f"score must hold real numbers, got {score.dtype}.")
    # The extremes are NaN or infinite if any score is, and need no array of flags.
    if score.size and not (np.isfinite(score.min()) and np.isfinite(score.max())):
        raise ValueError(f"score must be finite, got {int((~np.isfinite(score)).sum())} NaN or infinite values.")
    return score, truth


def checked_images(score: Shaped[Array, "..."], truth: Shaped[Array, "..."]) -> tuple[np.ndarray, np.ndarray]:
    """Score and truth as arrays whose first axis counts images; as `checked`, and a ValueError if there is none."""
    score, truth = checked(score, truth)
    if score.ndim == 0 or len(score) == 0:
        raise ValueError(f"score must hold at least one image along its first axis, got shape {score.shape}.")
    return score, truth


def checked_where(where: Shaped[Array, "..."], shape: tuple[int, ...]) -> Bool[np.ndarray, "..."]:
    """Which pixels count, as an array; a ValueError unless it is boolean and of this shape."""
    where = as_array(where)
    if where.shape != shape or where.dtype != bool:
        raise ValueError(f"where must be boolean of shape {shape}, got {where.dtype} of shape {where.shape}.")
    return where


def with_masks(
    score_NYX: Shaped[Array, "n ..."], truth: Masks, without_mask: WithoutMask
) -> tuple[Shaped[np.ndarray, "m ..."], Bool[np.ndarray, "m ..."], Int64[np.ndarray, " m"]]:
    """Scores and masks of the images that count, and which images those are.

    Args:
        score_NYX: Scores; the first axis counts images.
        truth: Booleans of the same shape, or one mask per image, None where an image has none.
        without_mask: What becomes of images without a mask: "leave out", or "normal" for a mask without anomaly.

    Raises:
        ValueError: As for `checked`, or if there is no axis of images, or their number and that of the masks differ.
    """
    score_NYX = as_array(score_NYX)
    if score_NYX.ndim == 0:
        raise ValueError("score must have its first axis count images, got a single number.")
    if not isinstance(truth, Sequence):
        return *checked(score_NYX, truth), np.arange(len(score_NYX))
    if len(truth) != len(score_NYX):
        raise ValueError(f"truth must hold one mask or None per image, got {len(truth)} for {len(score_NYX)} images.")
    kept_M = np.flatnonzero([mask is not None or without_mask == "normal" for mask in truth])
    truth_MYX = np.zeros((len(kept_M), *score_NYX.shape[1:]), dtype=bool)
    for mask_YX, image in zip(truth_MYX, kept_M.tolist(), strict=True):
        if (mask := truth[image]) is not None:
            mask_YX[...] = checked(score_NYX[image], mask)[1]
    return *checked(score_NYX[kept_M], truth_MYX), kept_M


def require_both_classes(negatives: int, positives: int) -> None:
    """Raise a ValueError unless there is at least one value of each class."""
    if negatives == 0 or positives == 0:
        raise ValueError(f"truth must hold both classes, got {positives} positives and {negatives} negatives.")


def require_resampling(resamples: int, level: float) -> None:
    """Raise a ValueError unless an interval of this confidence level can be read from so many resamples."""
    if resamples < 100:
        raise ValueError(f"resamples must be at least 100, got {resamples}.")
    require_level(level)


def require_level(level: float) -> None:
    """Raise a ValueError unless the confidence level lies between 0 and 1."""
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}.")
