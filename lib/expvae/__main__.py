"""The command line: ``python -m expvae explain`` writes attention maps of a folder of images."""

import argparse
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8
from torch import nn

from expvae._attention import PRESETS, attention

try:
    from matplotlib import colormaps
    from PIL import Image, ImageOps
    from safetensors.torch import load_model
    from tqdm import tqdm
except ModuleNotFoundError as error:
    raise SystemExit(f"{error}; what this command needs comes with the extra cli: pip install '.[cli]'") from None

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
JSON = re.compile(r'true|false|null|-?\d.*|[\["{].*')  # how what is no plain text begins
EXAMPLE = """\
For each image NAME the folder OUT then holds NAME.npy, the map at the image's size (float32), and NAME.png, the image
with its map beside it, in colours (cividis) from 0 to the highest value of all maps. With the repository comes a VAE
that was trained on dSprites:

  python -m expvae explain examples/dsprites/images --model expvae.models:DSpritesVAE \\
      --weights examples/dsprites/vae.safetensors --layer encoder.conv2 --out maps
"""


def main() -> None:
    """Run the command.

    Raises:
        SystemExit: With status 2, after one sentence on the error stream, if what is asked for cannot be done.
    """
    parser = argparse.ArgumentParser(prog="python -m expvae")
    command = parser.add_subparsers(required=True, metavar="command").add_parser(
        "explain",
        help="write attention maps of a folder of images",
        description="Write the attention map of a trained VAE for every image of a folder.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    option = command.add_argument
    option("images", type=Path, help="folder of images, whose values go into the model as numbers between 0 and 1")
    option("--model", required=True, help="class of the VAE, as package.module:Class")
    option("--argument", action="append", default=[], metavar="NAME=VALUE", help="of its constructor; or a JSON object")
    option("--weights", type=Path, required=True, help="its weights, a safetensors file")
    option("--encode", default="encode", help="its method that maps images to latents; default %(default)s")
    option("--layer", required=True, help="path inside the model of the layer that is explained, as encoder.conv2")
    option("--preset", choices=PRESETS, default="liu2020_paper", help="how maps are made; default %(default)s")
    option("--latent", type=int, help="index of the latent whose map is wanted; default the aggregate of all")
    option("--size", type=int, help="pixels along either side that images are resized to; default as they are")
    option("--channels", type=int, choices=(1, 3), help="of the images; default those of the model's first convolution")
    option("--batch", type=int, default=16, help="images at once, on which maps of some presets depend; default 16")
    option("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default %(default)s here")
    option("--out", type=Path, required=True, help="folder for the maps, which must not exist yet")
    asked = parser.parse_args()
    try:
        print(explain(asked))
    except (ValueError, OSError) as error:
        command.error(str(error))


def explain(asked: argparse.Namespace) -> str:
    """Write the maps that the options ask for, all or none, and say what has been written.

    Raises:
        ValueError: If an option leads nowhere, or the model cannot take the images.
        OSError: If the folder cannot be written.
    """
    for name, value in (("--batch", asked.batch), ("--size", asked.size)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be 1 or more")
    if asked.out.exists():
        raise ValueError(f"--out {asked.out} is there already")
    model = _model(asked)
    with _said(f"--encode {asked.encode} of {asked.model}"):
        encode = getattr(model, asked.encode)
    convolved = (module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    mode = "L" if (asked.channels or next(convolved, 3)) == 1 else "RGB"
    files, highest, generator = _images(asked.images, asked.size), 0.0, torch.Generator().manual_seed(0)
    latents = None if asked.latent is None else [asked.latent]
    with _new_folder(asked.out) as folder:
        for start in tqdm(range(0, len(files), asked.batch), "maps, by batch"):
            batch = files[start : start + asked.batch]
            x_BYXC = np.stack([_pixels(file, mode, asked.size) for file in batch])
            with _said(f"{mode} images of {x_BYXC.shape[2]}x{x_BYXC.shape[1]} pixels"):
                x_BCYX = torch.from_numpy(x_BYXC).to(asked.device).permute(0, 3, 1, 2).float() / 255
                found = attention(encode, asked.layer, x_BCYX, asked.preset, latents=latents, generator=generator)
                map_BYX = found.map_BYX.float().cpu().numpy()
            highest = max(highest, float(map_BYX.max()))
            for file, map_YX in zip(batch, map_BYX, strict=True):
                np.save(folder / f"{file.stem}.npy", map_YX)
        for file in tqdm(files, "pictures"):
            colours_YXC = colormaps["cividis"](np.load(folder / f"{file.stem}.npy") / (highest or 1.0), bytes=True)
            pair_YXC = np.concatenate([_pixels(file, "RGB", asked.size), colours_YXC[..., :3]], axis=1)
            Image.fromarray(pair_YXC).save(folder / f"{file.stem}.png")
    return f"{len(files)} maps are in {asked.out}; their colours reach from 0 to {highest:.3g}."


def _model(asked: argparse.Namespace) -> nn.Module:
    """The model with its weights, on its device, in evaluation mode."""
    arguments, (module, _, name) = dict[str, Any](), asked.model.replace(":", ".").rpartition(".")
    with _said(f"--argument {' '.join(asked.argument)}"):
        for text in asked.argument:
            key, _, value = text.partition("=")
            read = json.loads(value) if JSON.fullmatch(value) else value
            arguments |= json.loads(text) if text.startswith("{") else {key: read}
    with _said(f"--model {asked.model} cannot be made from {arguments}"):
        model = getattr(import_module(module), name)(**arguments)
    with _said(f"--weights {asked.weights} do not fit {asked.model}, or are not safetensors"):
        load_model(model, asked.weights)
    with _said(f"--device {asked.device}"):
        return model.to(asked.device).eval()


def _images(folder: Path, size: int | None) -> list[Path]:
    """The images of a folder, by name, each of which can be read and has the size of the first."""
    files = sorted(file for file in folder.glob("*") if file.suffix.lower() in SUFFIXES)
    if not files:
        raise ValueError(f"{folder} is no folder with images ({', '.join(sorted(SUFFIXES))})")
    if len({file.stem for file in files}) < len(files):
        raise ValueError(f"{folder} holds two images whose names differ in the suffix only; rename one")
    shapes = {_pixels(file, "RGB", size).shape[:2]: file.name for file in files}
    if len(shapes) > 1:
        raise ValueError(f"{' and '.join([*shapes.values()][:2])} have different sizes; give --size")
    return files


def _pixels(file: Path, mode: str, size: int | None) -> UInt8[np.ndarray, "y x c"]:
    with _said(f"{file} cannot be read as an image"), Image.open(file) as image:
        image.verify()  # the checksums of a PNG, which its decoder leaves aside
    with _said(f"{file} cannot be read as an image"), Image.open(file) as image:
        if image.mode.startswith(("I", "F")):
            raise ValueError("it has more than 8 bits")
        image = ImageOps.exif_transpose(image).convert(mode)
        pixels = np.array(image.resize((size, size), Image.Resampling.BILINEAR) if size else image)
        return pixels.reshape(*pixels.shape[:2], -1)


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears whole or not at all."""
    temporary = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    try:
        temporary.mkdir()
        yield temporary
        temporary.rename(folder)
    except OSError as error:
        raise OSError(f"--out {folder} could not be written ({error}); nothing is left of it") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _said(what: str) -> Iterator[None]:
    """Whatever goes wrong, in one sentence that begins with what it concerns."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split()).removeprefix("Error(s) in loading state_dict for ")
        raise ValueError(f"{what}: {(said or type(error).__name__)[:300]}") from error


if __name__ == "__main__":
    main()
