"""dSprites: one white square, ellipse or heart per image, for every combination of its factors; the file or drawn.

Known of the release, and true of the drawn sprites as well: the factors, their values and their order; every pixel is
0 or 1; the orientations are ``linspace(0, 2π, 40)`` with both ends, so that the first and the last are the same
picture (39 different ones, a step of 2π/39; not 40 in [0, 2π)); steps were chosen to change the picture. How sprites
are drawn, see `expvae_book.data.generated.sprites`.

Not known: how far all this is from the release, pixel by pixel.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor

import expvae_book.data
from expvae_book.data import catalogue
from expvae_book.data.card import DataCard, npz_images, survey, takes_sample
from expvae_book.data.generated import sprites

FACTORS = ("colour", "shape", "scale", "orientation", "x", "y")
SIZES = (1, 3, 6, 40, 32, 32)
COUNT = 737_280
STRIDES = (COUNT, 245_760, 40_960, 1024, 32, 1)  # images from one value of each factor to its next
SIDE = 64
VALUES = {
    "colour": (1.0,),
    "shape": (1.0, 2.0, 3.0),
    "scale": tuple(np.linspace(0.5, 1, 6).tolist()),
    "orientation": tuple(np.linspace(0, 2 * np.pi, 40).tolist()),
    "x": tuple(np.linspace(0, 1, 32).tolist()),
    "y": tuple(np.linspace(0, 1, 32).tolist()),
}
SAMPLE_NOTE = (
    "Not the release: every sprite is drawn from its factors, which have the release's values and order. The sizes of "
    "the shapes are chosen to give the release's mean and standard deviation of pixels; aspect, first position and "
    "the step between positions, one pixel, are guesses."
)

STEPS = 31  # pixels between the first and the last position
CHUNK = 8192  # images unpacked at a time: 32 MiB


@dataclass(frozen=True)
class Sprites:
    """All images, in little memory and on one device.

    Attributes:
        pixels: Of the release every image as 4096 bits, eight to a byte and the first one the highest; of drawn sprites
            each shape, scale and orientation once, in the middle of a canvas in which the image is a window.
        card: What they are.
    """

    pixels: UInt8[Tensor, "n 512"] | UInt8[Tensor, "720 95 95"]
    card: DataCard

    def __len__(self) -> int:
        return COUNT if self.pixels.ndim == 3 else len(self.pixels)

    def images(self, index_B: Int64[Tensor, " b"]) -> UInt8[Tensor, "b 1 64 64"]:
        """The images of these numbers, 0 or 1, on the device of the sprites.

        Args:
            index_B: From 0 on; numbers below 0 count from the end. Not checked here, which would make a GPU wait:
                a number beyond the end is PyTorch's IndexError on a CPU and its device-side assertion on a GPU.
        """
        index_B = index_B.to(self.pixels.device)
        if self.pixels.ndim == 2:
            bit = torch.arange(7, -1, -1, dtype=torch.uint8, device=index_B.device)
            return (self.pixels[index_B, :, None] >> bit & 1).view(-1, 1, SIDE, SIDE)
        windows = self.pixels.unfold(1, SIDE, 1).unfold(2, SIDE, 1)
        # The window moves up and left for the sprite to move down and right.
        top_B, left_B = STEPS - index_B % 32, STEPS - index_B // 32 % 32
        return windows[index_B // 1024, top_B, left_B][:, None]

    def to(self, device: torch.device | str) -> "Sprites":
        """The same on another device."""
        return replace(self, pixels=self.pixels.to(device))


def index_of(factors_B6: Int64[Tensor, "b 6"]) -> Int64[Tensor, " b"]:
    """The numbers of the images with these factors, each counted from 0, in the order of `FACTORS`.

    index = ((((colour · 3 + shape) · 6 + scale) · 40 + orientation) · 32 + x) · 32 + y
    """
    return (factors_B6 * factors_B6.new_tensor(STRIDES)).sum(1)


def load(data: str = "auto", root: Path | None = None) -> Sprites:
    """Load the release from `ROOT/dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz`, or draw the sprites.

    The card of drawn sprites has the kind "rendered" with all 737 280 images, because they are generated; its note says
    what they have in common with the release and what not.

    Args:
        data: "real" (the file), "sample" (drawn) or "auto" (the file where it is, otherwise drawn).
        root: Data root; by default `expvae_book.data.root()`.

    Raises:
        FileNotFoundError: If the file is missing.
        ValueError: If `data` is none of these, or the file is damaged or holds other images; the message names it.
    """
    root = Path(root or expvae_book.data.root())
    file = root / catalogue.DSPRITES.patterns["all"]
    if takes_sample(
        data,
        catalogue.DSPRITES,
        root,
        root,
        present=file.is_file(),
        missing="" if file.is_file() else f"lacks {file.name}",
        stand_in="drawing a SAMPLE, every sprite from its factors,",
    ):
        return sample()
    return Sprites(torch.from_numpy(_pack(file)), survey(catalogue.DSPRITES, root))


def sample() -> Sprites:
    """Draw every shape, scale and orientation once; positions are windows. Their digest is that of the drawings."""
    canvas_SYX = sprites.canvases(VALUES["scale"], VALUES["orientation"], SIDE + STEPS)
    card = DataCard(
        name=catalogue.DSPRITES.name,
        kind="rendered",
        counts={"all": COUNT},
        official=dict(catalogue.DSPRITES.official),
        digest=hashlib.sha256(canvas_SYX.tobytes()).hexdigest(),
        licence="MIT",
        credit="Sprites drawn from the factors of dSprites, not its images (this book, MIT)",
        note=SAMPLE_NOTE,
    )
    return Sprites(torch.from_numpy(canvas_SYX), card)


def _pack(file: Path) -> UInt8[np.ndarray, "n 512"]:
    """The images of an npz file, eight pixels to a byte, read in pieces because they would take three gigabytes.

    Raises:
        ValueError: If the file is damaged or `imgs` is no array of all binary images; the message names the file.
    """
    with npz_images(file) as (member, shape, fortran, dtype):
        # With fewer images it would not be told which factors are missing.
        if shape != (COUNT, SIDE, SIDE) or dtype != np.uint8 or fortran:
            order = " in Fortran order" if fortran else ""
            raise ValueError(f"imgs is {dtype} of shape {shape}{order}, not uint8 of ({COUNT}, {SIDE}, {SIDE})")
        packed_NP = np.empty((COUNT, SIDE * SIDE // 8), np.uint8)
        for start in range(0, COUNT, CHUNK):
            rows_NP = packed_NP[start : start + CHUNK]
            content = member.read(8 * rows_NP.size)
            x_NP = np.frombuffer(content, np.uint8).reshape(len(rows_NP), SIDE * SIDE)
            if x_NP.max() > 1:
                raise ValueError(f"a pixel is {x_NP.max()}, not 0 or 1")
            rows_NP[:] = np.packbits(x_NP, axis=1)
        # Reading on to the end is what makes zipfile compare the checksum.
        if member.read(1):
            raise ValueError("imgs is longer than its header says")
    return packed_NP
