"""Image and mask files as a viewer shows them: what a data set of files holds is listed, read and resized here.

A file is upright (its EXIF or TIFF orientation is applied), grey or RGB; palettes become their colours and single bits
0 and 255. Of 16 bits per channel the upper 8 are taken, and transparent pixels lie on black. What a viewer shows in its
own way, or only a part of, is refused: more than 16 bits; CMYK and other spaces of colour, which it converts by a
profile; and several frames. Colour profiles of RGB files are left aside.
"""

import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image, ImageOps
from torch import Tensor

from expvae_book.data.card import is_image, listed

CHANNELS = {"L": 1, "RGB": 3}
GREY = ("1", "L", "LA")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX")
DEEP = ("I;16", "I;16L", "I;16B", "I;16N")  # grey, of 16 bits
DARK = 16  # of the 256 levels of the upper 8 bits: 12 bits or fewer reach none above
LOSSLESS = ("PNG", "BMP", "DIB", "TIFF")
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")
MASK_RESIZES = {"nearest": Image.Resampling.NEAREST, "truncated": Image.Resampling.BILINEAR}
LEAST_SIZE = 32  # pixels along a side


@dataclass(frozen=True)
class Batch:
    """Images in one square shape.

    Attributes:
        x_NCYX: The images, grey or RGB.
        mask: For each image its anomalous pixels in the same shape, or None where it has no mask, which is not the same
            as a mask without anomaly.
        marked: For each image whether its mask marked any pixel before it was resized, or None where it has no mask.
    """

    x_NCYX: UInt8[Tensor, "n c size size"]
    mask: list[Bool[Tensor, "size size"] | None]
    marked: list[bool | None]


def files(folder: Path) -> list[Path]:
    """The image files of a folder in the order of their names; none where there is no folder.

    Raises:
        ValueError: If two files differ in their suffix only: a copy in another format would count twice, and its mask
            belong to two.
    """
    images = sorted(filter(is_image, folder.glob("*")))
    stems = {}
    for file in images:
        if stems.setdefault(file.stem, file) != file:
            raise ValueError(f"{folder} holds the image {file.stem} twice: {stems[file.stem].name} and {file.name}")
    return images


def load(images: list[Path], masks: dict[Path, Path], mode: str, size: int, mask_resize: str = "nearest") -> Batch:
    """Read images and their masks and make them size x size.

    A mask may lose every anomalous pixel when it shrinks; its image then counts as normal, which is said on the error
    stream.

    Args:
        images: Image files.
        masks: The mask files of those images that have one.
        mode: As for `read`.
        size: As for `batch`.
        mask_resize: As for `batch`.

    Raises:
        ValueError: If a file is damaged or refused, or a mask has another size than its image; the message names it.
    """

    def pairs() -> Iterable[tuple[Image.Image, Bool[np.ndarray, "y x"] | None]]:
        for file in images:
            image, mask_YX = read(file, mode), None
            if file in masks:
                mask_YX = read_mask(masks[file])
                if mask_YX.shape != (image.height, image.width):
                    raise ValueError(
                        f"{masks[file]} has {mask_YX.shape[1]}x{mask_YX.shape[0]} pixels for the "
                        f"{image.width}x{image.height} of {file}"
                    )
            yield image, mask_YX

    loaded = batch(pairs(), mode, size, mask_resize)
    outcomes = zip(images, loaded.marked, loaded.mask, strict=True)
    lost = [masks[file] for file, marked, mask_YX in outcomes if marked and not mask_YX.any()]
    if lost:
        print(
            f"At {size}x{size} pixels ({mask_resize}) nothing is left of the anomalies in {len(lost)} of {len(masks)} "
            f"masks, whose images count as normal: {listed([f'{mask.parent.name}/{mask.name}' for mask in lost])}.",
            file=sys.stderr,
        )
    return loaded


def batch(
    pairs: Iterable[tuple[Image.Image, Bool[np.ndarray, "y x"] | None]],
    mode: str,
    size: int,
    mask_resize: str = "nearest",
) -> Batch:
    """Make images and their masks, of whatever sizes, size x size.

    Images are resized by Pillow's bilinear interpolation, which widens its triangle to the scale when it shrinks an
    image (what torchvision's Resize does by default); an image of that size stays as it is.

    Args:
        pairs: Images in this mode, each with its anomalous pixels or None.
        mode: "L" or "RGB".
        size: Pixels along either side, 32 or more.
        mask_resize: "nearest" takes the pixel nearest to each centre. "truncated" is what published code comes to:
            bilinear as for images, in [0, 1], then cut to a whole number, so that a pixel stays anomalous only where
            all that it was computed from is, and every region loses its border.

    Raises:
        ValueError: If size is no whole number, or too small, or mask_resize unknown.
    """
    if not isinstance(size, int) or size < LEAST_SIZE:
        raise ValueError(f"size must be a whole number of pixels, {LEAST_SIZE} or more; got {size!r}")
    if mask_resize not in MASK_RESIZES:
        raise ValueError(f"mask_resize must be one of {', '.join(MASK_RESIZES)}; got {mask_resize!r}")
    images, masks, marked = [], [], []
    for image, mask_YX in pairs:
        images.append(np.array(image.resize((size, size), Image.Resampling.BILINEAR)))
        marked.append(None if mask_YX is None else bool(mask_YX.any()))
        masks.append(None)
        if mask_YX is not None:
            mask = Image.fromarray(mask_YX.astype(np.uint8) * 255).resize((size, size), MASK_RESIZES[mask_resize])
            masks[-1] = torch.from_numpy(np.array(mask) == 255)
    x_NYXC = np.array(images, np.uint8).reshape(len(images), size, size, CHANNELS[mode])
    return Batch(torch.from_numpy(x_NYXC).permute(0, 3, 1, 2).contiguous(), masks, marked)


def read(file: Path, mode: str) -> Image.Image:
    """An image as a viewer shows it.

    Args:
        file: An image file.
        mode: "L" (grey by ITU-R 601 luma) or "RGB".

    Raises:
        ValueError: If the file is damaged or is refused; the message names it and says why. Images of 16 bits are
            refused that use 12 of them or fewer, as those of many cameras do: nothing says by how much to scale them.
    """
    image, _, deep = _open(file)
    if image.mode in DEEP:
        image = Image.fromarray((np.array(image) >> 8).astype(np.uint8))
    if deep and np.array(image).max() < DARK:
        raise ValueError(
            f"{file} has 16 bits per channel and no value above {256 * DARK - 1}: of 16 bits the upper 8 are taken, so "
            "multiply the values of all images by one number until they fill 16"
        )
    return image.convert(mode)


def read_mask(file: Path) -> Bool[np.ndarray, "y x"]:
    """The anomalous pixels of a mask, of which the greatest channel counts.

    In a lossless file every pixel above 0 is anomalous, whatever kind of defect its value or colour stands for. In a
    lossy one (JPEG, TIFF with JPEG inside) it is every pixel above half of the file's greatest value, which leaves out
    the ringing of its encoder.

    Raises:
        ValueError: As for `read`; of 16 bits a mask must be grey.
    """
    image, lossy, deep = _open(file)
    if deep and image.mode not in DEEP:
        raise ValueError(f"{file} is a mask in colours of 16 bits, of which low ones would be lost; it must have 8")
    value_YX = np.array(image)
    if value_YX.ndim == 3:
        value_YX = value_YX.max(axis=2)
    return value_YX > (value_YX.max() / 2 if lossy else 0)


def _open(file: Path) -> tuple[Image.Image, bool, bool]:
    """A file in mode L, RGB or one of DEEP, whether its encoding is lossy, and whether it has 16 bits per channel."""
    try:
        # Of a file by its name Pillow maps an uncompressed TIFF with width and height already exchanged: garbage.
        with file.open("rb") as content:
            Image.open(content).verify()  # the checksums of a PNG, which its decoder leaves aside
        with file.open("rb") as content, Image.open(content) as image:
            lossy = image.format not in LOSSLESS or image.info.get("compression") in LOSSY_TIFF
            # Of 16-bit colours Pillow reads the upper 8, which its own mode hides; BMP's BGR;16 are 16 bits for all
            # three channels.
            deep = re.search(r"\w+;16[BLN]", str(image.tile))
            if image.mode not in GREY + COLOUR + DEEP:
                stored = deep[0] if deep else image.mode
                raise ValueError(f"it must be grey or RGB with 8 or 16 bits per channel; its mode is {stored}")
            # The first of an MPO, as telephones write JPEG, is the photograph; the others are previews or depths.
            frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
            if frames > 1:
                raise ValueError(f"it must hold one image; it holds {frames}")
            upright = ImageOps.exif_transpose(image)
            if image.mode in DEEP:
                return upright, lossy, True
            if image.has_transparency_data:
                upright = upright.convert("RGBA")
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "black"), upright)
            return upright.convert("L" if image.mode in GREY else "RGB"), lossy, deep is not None
    # Pillow's decoders answer damage with OSError, SyntaxError, ValueError, struct.error, KeyError and others.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is damaged or no image that can be taken ({reason})") from error
