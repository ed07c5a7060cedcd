"""Image and mask files as a viewer shows them: every file that a data set holds is read here.

A file is upright (its EXIF or TIFF orientation is applied), grey or RGB, and has 8 bits per channel; palettes become
their colours and single bits 0 and 255. What a viewer shows in its own way, or only a part of, is refused: transparent
pixels, for which it chooses the background; more than 8 bits, of which it drops some; CMYK and other spaces of colour,
which it converts by a profile; and several frames. Colour profiles of RGB files are left aside.
"""

import re
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageOps

GREY = ("1", "L", "LA")
COLOUR = ("P", "PA", "RGB", "RGBA", "RGBX")
LOSSLESS = ("PNG", "BMP", "DIB", "TIFF")
LOSSY_TIFF = ("jpeg", "tiff_jpeg", "webp")


def read(file: Path, mode: str) -> Image.Image:
    """An image as a viewer shows it.

    Args:
        file: An image file.
        mode: "L" (grey by ITU-R 601 luma) or "RGB".

    Raises:
        ValueError: If the file is damaged or is refused; the message names it and says why.
    """
    return _open(file)[0].convert(mode)


def read_mask(file: Path) -> Bool[np.ndarray, "y x"]:
    """The anomalous pixels of a mask, of which the greatest channel counts.

    In a lossless file every pixel above 0 is anomalous, whatever kind of defect its value or colour stands for. In a
    lossy one (JPEG, TIFF with JPEG inside) it is every pixel above half of the file's greatest value, which leaves out
    the ringing of its encoder.

    Raises:
        ValueError: As for `read`.
    """
    image, lossy = _open(file)
    value_YX = np.array(image)
    if value_YX.ndim == 3:
        value_YX = value_YX.max(axis=2)
    return value_YX > (value_YX.max() / 2 if lossy else 0)


def _open(file: Path) -> tuple[Image.Image, bool]:
    """A file in mode L or RGB, and whether its encoding is lossy."""
    refused = ""
    try:
        # Of a file by its name Pillow maps an uncompressed TIFF with width and height already exchanged: garbage.
        with file.open("rb") as content, Image.open(content) as image:
            lossy = image.format not in LOSSLESS or image.info.get("compression") in LOSSY_TIFF
            stored, frames = _stored(image), getattr(image, "n_frames", 1)
            if stored not in GREY + COLOUR:
                refused = f"must be grey or RGB with 8 bits per channel; its mode is {stored}"
            # The first of an MPO, as telephones write JPEG, is the photograph; the others are previews or depths.
            elif frames > 1 and image.format != "MPO":
                refused = f"must hold one image; it holds {frames}"
            else:
                upright = ImageOps.exif_transpose(image)
                if "A" in stored or "transparency" in image.info:
                    upright = upright.convert("RGBA")
                    if upright.getextrema()[3][0] < 255:
                        refused = "must be opaque; some of its pixels are transparent"
                plain = upright.convert("L" if stored in GREY else "RGB")
    # Pillow's decoders answer damage with OSError, SyntaxError, ValueError, struct.error, KeyError and others.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is damaged or no image ({reason})") from error
    if refused:
        raise ValueError(f"{file} {refused}")
    return plain, lossy


def _stored(image: Image.Image) -> str:
    """The mode of a file before it is decoded; Pillow's own mode hides that it cuts 16-bit colours off."""
    for *_, arguments in image.tile:
        raw = arguments if isinstance(arguments, str) or not arguments else arguments[0]
        # BMP's BGR;16 are 16 bits for all three channels together.
        if re.search(";16[BLN]", str(raw)):
            return raw
    return image.mode
