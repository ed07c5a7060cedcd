"""More training images from few, for MVTec AD: every image turned by an angle of its own, and mirrored where it may be.

AUGMENTATIONS multiply the images before the training, AT_LOAD has what changes them whenever they are loaded.

The paper turns the training images of a category by angles within ±30° and mirrors them where the object permits it,
until there are 10 000 of each category. Which objects permit it, it does not say; MOTIFS (expvae_book.data.catalogue)
has our reading. A user's own images are mirrored where an augmentation mirrors all of them, and never by that table.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from expvae_book.data.catalogue import motif

BATCH = 64


@dataclass(frozen=True)
class Augmentation:
    """How training images are multiplied.

    Attributes:
        degrees: Angles are drawn uniformly between minus and plus this many degrees.
        mirroring: "table" mirrors by MOTIFS, "always" in both directions whatever the category, "never" not at all;
            each direction that is allowed is taken with a probability of one half.
        source: Where it was read.
    """

    degrees: float
    mirroring: str
    source: str


AUGMENTATIONS = {
    "paper": Augmentation(30.0, "table", "Liu et al. 2020, Section 4.1, as quoted by both reports"),
    # The code hands π/6 to a function that wants degrees.
    "brongers2021": Augmentation(math.pi / 6, "always", "code of Brongers et al., MVTec_loader.py"),
    "none": Augmentation(0.0, "never", "the images as they are"),
}


def augment(
    x_NCYX: UInt8[Tensor, "n c y x"], category: str, augmentation: str, count: int, seed: int
) -> UInt8[Tensor, "{count} c y x"]:
    """Make `count` images of a category out of those given, on their device.

    Every image given is used equally often, give or take once, in random order. Each image that is made has its own
    angle and its own mirroring; see `transform`.

    Args:
        x_NCYX: Training images.
        category: A category of MVTec AD, or a user's own.
        augmentation: A name in AUGMENTATIONS; with "none" the images are only repeated.
        count: How many to make, 1 or more.
        seed: Fixes order, angles and mirroring.

    Raises:
        ValueError: If the category or the augmentation is unknown, or the count below 1.
    """
    drawn = draw(category, augmentation, count, seed)
    padding = "reflection" if motif(category).fills else "border"
    order = torch.Generator().manual_seed(seed)
    rounds = -(-count // len(x_NCYX))
    source_N = torch.cat([torch.randperm(len(x_NCYX), generator=order) for _ in range(rounds)])[:count]
    made = torch.empty(count, *x_NCYX.shape[1:], dtype=torch.uint8, device=x_NCYX.device)
    for start in range(0, count, BATCH):
        part = slice(start, start + BATCH)
        x_BCYX = x_NCYX[source_N[part].to(x_NCYX.device)]
        if augmentation != "none":
            x_BCYX = transform(x_BCYX.float(), *(value_N[part] for value_N in drawn), padding=padding).round().byte()
        made[part] = x_BCYX
    return made


def draw(
    category: str, augmentation: str, count: int, seed: int
) -> tuple[Float[Tensor, " {count}"], Bool[Tensor, " {count}"], Bool[Tensor, " {count}"]]:
    """Draw for `count` images the angle in degrees, and whether left and right, and top and bottom, are exchanged.

    Raises:
        ValueError: As for `augment`.
    """
    permits = motif(category)
    if augmentation not in AUGMENTATIONS:
        raise ValueError(f"augmentation must be one of {', '.join(AUGMENTATIONS)}; got {augmentation!r}")
    if count < 1:
        raise ValueError(f"count must be 1 or more; got {count}")
    how = AUGMENTATIONS[augmentation]
    allowed = {
        "table": (permits.horizontal, permits.vertical),
        "always": (True, True),
        "never": (False, False),
    }[how.mirroring]
    generator = torch.Generator().manual_seed(seed)
    angle_N = (2 * torch.rand(count, generator=generator) - 1) * how.degrees
    horizontal_N, vertical_N = ((torch.rand(count, generator=generator) < 0.5) & permitted for permitted in allowed)
    return angle_N, horizontal_N, vertical_N


def turned_at_load(x_BCYX: Float[Tensor, "b c y x"], generator: torch.Generator) -> Float[Tensor, "b c y x"]:
    """Turn each image by an angle within ±90° of its own, left and right exchanged in half of them, corners black.

    The second report's code draws this anew whenever it loads an image, and trains on the originals alone, where the
    paper multiplies them first. Between pixels it takes the nearest one, we interpolate. Source: MVTEC_Dataset.py.

    Args:
        x_BCYX: Images.
        generator: Source of angles and mirroring, on their device.
    """
    angle_B, side_B = torch.rand(2, len(x_BCYX), generator=generator, device=generator.device)
    horizontal_B = side_B < 0.5
    never_B = torch.zeros_like(horizontal_B)
    return transform(x_BCYX, (2 * angle_B - 1) * 90, horizontal_B, never_B, padding="zeros")


AT_LOAD = {"report2_code": turned_at_load}


def transform(
    x_BCYX: Float[Tensor, "b c y x"],
    angle_B: Float[Tensor, " b"],
    horizontal_B: Bool[Tensor, " b"],
    vertical_B: Bool[Tensor, " b"],
    *,
    padding: str = "border",
) -> Float[Tensor, "b c y x"]:
    """Turn each image by its angle about its centre, anticlockwise, and then mirror it.

    Args:
        x_BCYX: Images.
        angle_B: Angles in degrees.
        horizontal_B: Whether left and right are exchanged.
        vertical_B: Whether top and bottom are exchanged.
        padding: What turns in from outside: "border" for the nearest pixels of the image, "reflection" for its mirror
            image, "zeros" for black. Black corners are edges that no image of the data set has.
    """
    b, _, y, x = x_BCYX.shape
    angle_B = torch.deg2rad(angle_B.to(x_BCYX.device))
    cos_B, sin_B = angle_B.cos(), angle_B.sin()
    left_B, up_B = (1 - 2 * flag_B.to(x_BCYX) for flag_B in (horizontal_B, vertical_B))
    # From a place in the result back to one in the image, in units of half the width and half the height.
    theta_B23 = torch.zeros(b, 2, 3, device=x_BCYX.device)
    theta_B23[:, 0, 0], theta_B23[:, 0, 1] = left_B * cos_B, -up_B * sin_B * y / x
    theta_B23[:, 1, 0], theta_B23[:, 1, 1] = left_B * sin_B * x / y, up_B * cos_B
    grid_BYX2 = F.affine_grid(theta_B23, [b, 1, y, x], align_corners=False)
    return F.grid_sample(x_BCYX, grid_BYX2, mode="bilinear", padding_mode=padding, align_corners=False)
