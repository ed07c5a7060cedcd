"""Drawn sprites: white squares, ellipses and hearts, which stand in for those of dSprites.

The author of the release drew a rectangle, an ellipse and a mesh with LÖVE (issue 2 of the release's repository);
public code that says to copy the heart from there has x = 16 sin³t, y = 13 cos t - 5 cos 2t - 2 cos 3t - cos 4t. The
package disent measured the mean of all pixels, 0.042494, and the mean over images of their standard deviation,
0.195166; the drawn sprites are within a thousandth of either.

Chosen, because nothing at hand tells it: the sizes at scale 1 below. The two means leave a family of them; the member
taken has an ellipse twice as long as wide and shapes that fill much the same circle. Neighbouring positions are one
pixel apart, from pixel 16 to pixel 47. At orientation 0 the ellipse lies and the heart stands on its tip; orientation
turns them clockwise about the middle of their extent.
"""

from collections.abc import Sequence
from itertools import product

import numpy as np
from jaxtyping import Bool, Float64, UInt8

SHAPES = ("square", "ellipse", "heart")

# At scale 1, in pixels.
SQUARE = 18.1  # side
ELLIPSE = 23.4  # long axis, twice the short one
HEART = 24.8  # width
CENTRE = (0.4, 0.2)  # in its pixel, right and down of the middle: so no two orientations are the same picture

REACH = 16  # pixels from a sprite's centre to where it certainly ends, and from the border to the first centre
HEART_MIDDLE = -2.54  # of the heart's height, in units of its curve


def canvases(scales: Sequence[float], angles: Sequence[float], side: int) -> UInt8[np.ndarray, "s {side} {side}"]:
    """Every shape in every scale and at every angle, the last changing fastest, each in the middle of a canvas."""
    margin = (side - 2 * REACH - 1) // 2
    chosen = list(product(SHAPES, scales, angles))
    canvas_SYX = np.zeros((len(chosen), side, side), np.uint8)
    for canvas_YX, (shape, scale, angle) in zip(canvas_SYX, chosen, strict=True):
        canvas_YX[margin:-margin, margin:-margin] = draw(shape, scale, angle, CENTRE)
    return canvas_SYX


def draw(shape: str, scale: float, angle: float, centre: tuple[float, float] = (0.0, 0.0)) -> Bool[np.ndarray, "33 33"]:
    """One sprite near the middle of 33x33 pixels: the pixels whose centre it covers.

    The heart is the region between the two halves of its curve. With s = sin t = (|x| / 16)^(1/3) and c = cos t these
    are y(c) = 4 + 19 c - 2 c² - 8 c³ - 8 c⁴ above and y(-c) below.

    Args:
        shape: One of `SHAPES`.
        scale: Of all lengths.
        angle: In radians, clockwise.
        centre: Of the sprite, in pixels right and down of the centre of the middle pixel.

    Raises:
        ValueError: If there is no such shape.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {', '.join(SHAPES)}; got {shape!r}")
    y_YX, x_YX = np.indices((2 * REACH + 1, 2 * REACH + 1)) - float(REACH)
    x_YX, y_YX = x_YX - centre[0], y_YX - centre[1]
    along_YX = (np.cos(angle) * x_YX + np.sin(angle) * y_YX) / scale
    down_YX = (np.cos(angle) * y_YX - np.sin(angle) * x_YX) / scale
    if shape == "square":
        return np.maximum(abs(along_YX), abs(down_YX)) <= SQUARE / 2
    if shape == "ellipse":
        return along_YX * along_YX + 4 * down_YX * down_YX <= ELLIPSE * ELLIPSE / 4
    sine_YX = np.cbrt(abs(along_YX) * 2 / HEART)
    cosine_YX = np.sqrt(np.maximum(1 - sine_YX * sine_YX, 0))
    height_YX = HEART_MIDDLE - down_YX * 32 / HEART
    return (sine_YX <= 1) & (height_YX <= _curve(cosine_YX)) & (height_YX >= _curve(-cosine_YX))


def _curve(c_YX: Float64[np.ndarray, "33 33"]) -> Float64[np.ndarray, "33 33"]:
    return 4 + c_YX * (19 - c_YX * (2 + c_YX * (8 + c_YX * 8)))
