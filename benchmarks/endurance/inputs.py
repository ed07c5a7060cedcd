"""The readers of this book, small valid files for each, and what is done to the files."""

import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import nbformat
import numpy as np
import torch
from benchmarks.endurance import kills
from benchmarks.endurance.damages import (
    Damage,
    archive,
    bytewise,
    content,
    entry,
    placed,
    put,
    structure,
    tensors,
    texts,
)
from PIL import Image
from safetensors.torch import save_file
from torchvision.models import resnet18

from expvae import __main__ as command
from expvae.models import RBM, DSpritesVAE, Stack
from expvae_book import chapters, contrastive, outputs, parameters, places, render, rows, runs, training, weights
from expvae_book.data import catalogue, dsprites, imagenet, mnist, mvtec, ucsd

X_NYX = torch.arange(16 * 36, dtype=torch.uint8).view(16, 1, 6, 6)


class Reader(NamedTuple):
    """What fills a folder with valid files, what reads them as a user would, and what is done to them."""

    make: Callable[[Path], object]
    read: Callable[[Path], object]
    damages: tuple[Damage, ...]


def picture(path: Path, size: int = 40, value: int | None = None, mode: str = "L", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    cells_YX = np.random.default_rng(seed).integers(0, 256, (size // 8, size // 8), np.uint8)
    pixels_YX = cells_YX.repeat(8, 0).repeat(8, 1) if value is None else np.full((size, size), value, np.uint8)
    Image.fromarray(pixels_YX).convert(mode).save(path)
    return path


def broken_pictures(name: str) -> tuple[Damage, ...]:
    """An image of a kind that is refused, in place of another."""

    def saved(image: Image.Image, format: str, **options: object) -> Damage:
        image.save(made := io.BytesIO(), format, **options)
        return content(name, lambda old, draw: made.getvalue())

    frames = [Image.new("L", (40, 40), grey) for grey in (0, 200)]
    return (
        saved(Image.new("CMYK", (40, 40)), "TIFF"),
        saved(Image.new("F", (40, 40)), "TIFF"),
        saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
        saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        saved(Image.fromarray(np.full((40, 40), 900, np.int32)), "TIFF"),
        *structure(name),
        *bytewise(name),
    )


def small_training(checkpoint: Path) -> bytes:
    """A Boltzmann machine that goes on from a checkpoint, which holds the end of its training."""
    model, options = RBM(36, 4), {"epochs": 2, "seed": 0, "progress": False}
    torch.nn.init.constant_(model.weight, 0.01)
    contrastive.train(model, X_NYX[4:], X_NYX[:4], kills.MACHINE, checkpoint=checkpoint, **options)
    return model.weight.detach().numpy().tobytes()


def small_weights(folder: Path) -> bytes:
    """The weights of a stack, trained or from the cache."""
    with patch.dict(os.environ, EXPVAE_CACHE=str(folder)):
        make, options = lambda: Stack([RBM(36, 4)], (1, 6, 6)), {"epochs": 1, "seed": 0, "progress": False}
        trained = weights.trained(make, X_NYX[4:], X_NYX[:4], kills.MACHINE, device=kills.CPU, **options)
    return trained.model.layers[0].weight.detach().numpy().tobytes()


def make_run(folder: Path) -> None:
    arrays = {"curve": np.linspace(0, 1, 40, dtype=np.float32), "count": np.arange(9)}
    metrics = [runs.row("AUROC", 0.5, "ours", "all", low=0.25, high=0.75, n=9)]
    with patch.dict(os.environ, EXPVAE_RUNS=str(folder)):
        kills.store({"seed": 0}, metrics=metrics, losses={"kl": [1.0]}, arrays=arrays)


def read_run(folder: Path) -> object:
    with patch.dict(os.environ, EXPVAE_RUNS=str(folder)):
        (run,) = runs.find()
        shown = run.caption, run.text("AUROC", "ours", "all"), run.metrics.to_csv(), run.record["losses"]
        return shown, {name: (array.dtype, array.tobytes()) for name, array in run.arrays.items()}


PAGE = """\
---
jupytext:
  text_representation: {extension: .md, format_name: myst}
kernelspec: {display_name: Python 3, name: python3}
expvae: {data_set: mnist}
---

# A page

```{code-cell} ipython3
:tags: [parameters]
digit: int = 1  # 0 | 1 | 2; the digit
```

```{code-cell} ipython3
print(digit)
```
"""


def make_page(folder: Path) -> None:
    (folder / "page.md").write_text(PAGE)
    (folder / "outputs").mkdir()
    shown = [{"output_type": "stream", "name": "stdout", "text": "1\n"}]
    stored = {"parameters": {"digit": 1}, "cells": [{"source": "print(digit)", "outputs": shown}]}
    (folder / "outputs" / "page.json").write_text(json.dumps(stored))


def read_page(folder: Path) -> str:
    """What papermill is given of a chapter, and what its page shows."""
    file = folder / "page.md"
    notebook = nbformat.reads(chapters.ChapterHandler.read(str(file)), as_version=4)
    outputs.data_set(notebook, str(file))
    page = render.parse(file.read_text(encoding="utf-8"), file)
    with patch.dict(os.environ, EXPVAE_RUNS=str(folder)):
        outputs.fill(page, "page")
    return json.dumps([notebook.cells, [cell.get("outputs") for cell in page.cells]])


def make_mnist(folder: Path) -> None:
    draw = np.random.default_rng(0)
    for name, count in zip(catalogue.MNIST.checksums, (8, 8, 4, 4), strict=True):
        shape = (count, 28, 28) if "images" in name else (count,)
        header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
        file = folder / "MNIST" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(header + draw.integers(0, 10, shape, np.uint8).tobytes())


def read_mnist(folder: Path) -> list[bytes]:
    parts = vars(mnist.load("real", folder)).values()
    return [part.numpy().tobytes() for part in parts if isinstance(part, torch.Tensor)]


def make_sprites(folder: Path) -> None:
    imgs = np.random.default_rng(0).integers(0, 2, (64, 64, 64), np.uint8)
    np.savez_compressed(folder / catalogue.DSPRITES.patterns["all"], imgs=imgs, latents_values=np.zeros(3))


def read_sprites(folder: Path) -> bytes:
    """dSprites, of which the valid file here has 64 images instead of 737 280."""
    with patch.multiple(dsprites, COUNT=64, CHUNK=64):
        return dsprites.load("real", folder).pixels.numpy().tobytes()


def make_clips(folder: Path) -> None:
    for seed, part in enumerate(("Train/Train001", "Test/Test001", "Test/Test002")):
        for frame in ("001", "002"):
            picture(folder / UCSD / part / f"{frame}.png", seed=seed)
            if part == "Test/Test001":
                picture(folder / UCSD / f"{part}_gt" / f"{frame}.png", seed=9)


def read_clips(folder: Path) -> object:
    clips = ucsd.load("real", folder, size=32)
    masks = [None if mask_YX is None else mask_YX.numpy().tobytes() for mask_YX in clips.test_mask]
    return clips.train_NYX.numpy().tobytes(), clips.test_NYX.numpy().tobytes(), masks


def make_parts(folder: Path) -> None:
    for seed, name in enumerate(("train/good/0", "train/good/1", "test/good/0", "test/bent/0")):
        picture(folder / MVTEC / f"{name}.png", seed=seed, mode="RGB")
    picture(folder / MVTEC / "ground_truth/bent/0_mask.png", seed=9)


def read_parts(folder: Path) -> object:
    category = mvtec.load("part", "real", folder, size=32)
    masks = [None if mask_YX is None else mask_YX.numpy().tobytes() for mask_YX in category.test_mask]
    return category.train_NCYX.numpy().tobytes(), category.test_NCYX.numpy().tobytes(), masks


def make_imagenet(folder: Path) -> None:
    (folder / "weights").mkdir()
    save_file(training.build(resnet18, 0).state_dict(), folder / catalogue.IMAGENET_FILE)


def make_example(folder: Path) -> None:
    save_file(training.build(lambda: DSpritesVAE(3), 0).state_dict(), folder / "vae.safetensors")
    for seed, name in enumerate(("a.png", "b.png")):
        picture(folder / "images" / name, 64, seed=seed)


def explain(folder: Path, out: Path | None = None) -> object:
    """The maps of `python -m expvae explain`, for which damages may leave other options in a file."""
    given = {"model": "expvae.models:DSpritesVAE", "argument": "latent_dim=3", "weights": folder / "vae.safetensors"}
    given |= {"layer": "encoder.conv2", "out": out or folder / "maps", "device": "cpu"}
    given |= json.loads((folder / "asked.json").read_text()) if (folder / "asked.json").exists() else {}
    argv = [f"--{name}={value}" for name, value in given.items()]
    said = io.StringIO()
    with patch.object(sys, "argv", ["expvae", "explain", str(folder / "images"), *argv]), redirect_stderr(said):
        try:
            command.main()
        except SystemExit:
            raise ValueError(said.getvalue().strip().rpartition("error: ")[2]) from None
    maps = {path.name: path.read_bytes() for path in (folder / "maps").glob("*.npy")}
    shutil.rmtree(folder / "maps", ignore_errors=True)
    return maps


def asked(**given: object) -> Damage:
    """Another option of the command, or another parameter of a chapter."""
    return placed(lambda folder: (folder / "asked.json").write_text(json.dumps(given)), list(given)[-1])


def check(folder: Path) -> object:
    """What papermill writes into a notebook for the parameters of a chapter that were given."""
    given = json.loads((folder / "asked.json").read_text())
    path = str(places.repository() / "book" / f"{given.pop('chapter')}.md")
    notebook = nbformat.reads(chapters.ChapterHandler.read(path), as_version=4)
    return parameters.check(given, parameters.declared(notebook, path), path)


IMAGES, LABELS = (f"MNIST/{name}" for name in list(catalogue.MNIST.checksums)[2:])
UCSD, MVTEC = "UCSD_Anomaly_Dataset.v1p2/UCSDped1", "mvtec/part"
RECORD, ARRAYS, SPRITES = "reuse/*/record.json", "reuse/*/arrays.npz", catalogue.DSPRITES.patterns["all"]
CARDS = ("counts", "official", "digest", "kind")
READERS = {
    "checkpoint": Reader(
        lambda folder: small_training(folder / "a.checkpoint"),
        lambda folder: small_training(folder / "a.checkpoint"),
        (
            *structure("a.checkpoint"),
            *bytewise("a.checkpoint"),
            *tensors("a.checkpoint", "model/weight"),
            *texts("a.checkpoint", ('"step"', '"stop"'), ('"total":"6"', '"total":"9"'), ('"F32"', '"I32"')),
        ),
    ),
    "weights": Reader(
        small_weights,
        small_weights,
        (
            *structure("*.safetensors"),
            *bytewise("*.safetensors"),
            *tensors("*.safetensors", "layers.0.weight"),
            *texts("*.safetensors", ('"history"', '"historY"'), ('"F32"', '"I32"'), ("gap", "cap")),
        ),
    ),
    "record": Reader(
        make_run,
        read_run,
        (
            *structure(RECORD),
            *(entry(RECORD, name) for name in rows.ENTRIES),
            *(entry(RECORD, name, value=7) for name in rows.ENTRIES),
            *(entry(RECORD, "data", name, value=[1]) for name in CARDS),
            *(entry(RECORD, "data", name) for name in CARDS),
            entry(RECORD, "data", "unknown", value=1),
            entry(RECORD, "metrics", 0, 6),
            entry(RECORD, "metrics", 0, 3, value="0.5"),
            entry(RECORD, "metrics", 0, 0, value=[]),
            entry(RECORD, "metrics", 0, value="AUROC"),
            *texts(RECORD, *(("0.5", number) for number in ("NaN", "Infinity", "1e999", "0,5", "\udcff"))),
        ),
    ),
    "arrays": Reader(
        make_run,
        read_run,
        (
            *structure(ARRAYS),
            *bytewise(ARRAYS),
            archive(ARRAYS, curve=np.array([{}])),
            archive(ARRAYS, curve=np.linspace(0, 1, 40)),
            archive(ARRAYS, curve=None),
            archive(ARRAYS, other=np.zeros(3)),
            archive(ARRAYS, curve=np.full(40, np.nan, np.float32)),
        ),
    ),
    "notebook": Reader(
        make_page,
        read_page,
        (
            *structure("page.md")[1:],  # what is left of a text that was cut is a text
            *texts("page.md", ("[parameters]", "null"), ("jupytext:", "jupytext: ["), ("kernelspec:", "kernel:")),
            *texts("page.md", ("{data_set: mnist}", "mnist"), ("mnist", "[mnist]"), ("# A page", "# A p\udcffge")),
            *texts("page.md", ("| 1 |", "| one |"), ("= 1", "= 'one'"), ("= 1", "= 7"), ("int", "list")),
            *texts("page.md", ("digit: int", "digit: int ="), ("[parameters]", "[parameters")),
        ),
    ),
    "outputs of a page": Reader(
        make_page,
        read_page,
        (
            *structure("outputs/page.json"),
            *(entry("outputs/page.json", name) for name in ("parameters", "cells")),
            *(entry("outputs/page.json", name, value=7) for name in ("parameters", "cells")),
            *(entry("outputs/page.json", "cells", 0, name) for name in ("source", "outputs")),
            *(entry("outputs/page.json", "cells", 0, name, value=[7]) for name in ("source", "outputs")),
            *(entry("outputs/page.json", "cells", 0, "outputs", 0, name) for name in ("output_type", "name")),
            entry("outputs/page.json", "cells", 0, "outputs", 0, "output_type", value="film"),
        ),
    ),
    "parameters": Reader(
        lambda folder: (folder / "asked.json").write_text('{"chapter": "ucsd", "seed": 0}'),
        check,
        (
            *(asked(chapter="ucsd", seed=value) for value in (-1, 2**33, 0.5, "one", True, None, [0], "")),
            *(asked(chapter="ucsd", epochs=value) for value in (-1, 1e9, float("nan"), "1e3", {"a": 1})),
            *(asked(chapter="rbm", **bad) for bad in ({"units": "spins"}, {"temperature": "inf"}, {"again": 2})),
            *(asked(chapter=chapter, sead=1) for chapter in ("mnist", "rbm", "index", "data")),
        ),
    ),
    "idx (MNIST)": Reader(
        make_mnist,
        read_mnist,
        (
            *structure(IMAGES),
            *structure(LABELS),
            *(put(IMAGES, at, value) for at, value in ((0, 1), (2, 9), (3, 2), (7, 9), (11, 14))),
            *(put(LABELS, at, value) for at, value in ((0, 1), (2, 9), (3, 3), (7, 3), (-1, 11))),
            *(content(name, lambda old, draw: old + b"\0") for name in (IMAGES, LABELS)),
            content(LABELS, lambda old, draw: old[:7] + b"\x03" + old[8:-1]),
            content(IMAGES, lambda old, draw: old[:11] + b"\x0e" + old[12:15] + b"\x38" + old[16:]),
            placed(lambda folder: (folder / LABELS).unlink(), LABELS.rpartition("/")[2]),
            placed(lambda folder: (folder / "MNIST/NOTE.txt").write_bytes(b"caf\xe9"), "NOTE.txt"),
        ),
    ),
    "npz (dSprites)": Reader(
        make_sprites,
        read_sprites,
        (
            *structure(SPRITES),
            *bytewise(SPRITES),
            archive(SPRITES, imgs=None),
            archive(SPRITES, imgs=np.array([{}])),
            archive(SPRITES, imgs=np.zeros((64, 64, 64))),
            archive(SPRITES, imgs=np.full((64, 64, 64), 2, np.uint8)),
            archive(SPRITES, imgs=np.zeros((63, 64, 64), np.uint8)),
            archive(SPRITES, imgs=np.asfortranarray(np.ones((64, 64, 64), np.uint8))),
            archive(SPRITES, imgs=np.zeros((64, 64, 64), "S1")),
        ),
    ),
    "images and masks (UCSD)": Reader(
        make_clips,
        read_clips,
        (
            *broken_pictures(f"{UCSD}/Test/Test002/001.png"),
            *broken_pictures(f"{UCSD}/Test/Test001_gt/002.png"),
            placed(lambda folder: picture(folder / UCSD / "Test/Test001_gt/002.png", 48), "002.png"),
            placed(lambda folder: picture(folder / UCSD / "Test/Test001_gt/003.png"), "Test001_gt"),
            placed(lambda folder: (folder / UCSD / "Test/Test001_gt/002.png").unlink(), "Test001_gt"),
            placed(lambda folder: picture(folder / UCSD / "Test/Test009_gt/001.png"), "Test009_gt"),
            placed(lambda folder: picture(folder / UCSD / "Test/Test002/001.bmp"), "001.bmp"),
            placed(lambda folder: shutil.rmtree(folder / UCSD / "Train/Train001"), "Train"),
            placed(lambda folder: (folder / UCSD / "Test/Test003").mkdir(), "Test003"),
        ),
    ),
    "images and masks (MVTec)": Reader(
        make_parts,
        read_parts,
        (
            *broken_pictures(f"{MVTEC}/train/good/1.png"),
            *broken_pictures(f"{MVTEC}/ground_truth/bent/0_mask.png"),
            placed(lambda folder: picture(folder / MVTEC / "ground_truth/bent/0_mask.png", 48), "0_mask.png"),
            placed(lambda folder: picture(folder / MVTEC / "ground_truth/bent/0_mask.png", value=0), "0_mask.png"),
            placed(lambda folder: picture(folder / MVTEC / "ground_truth/good/0_mask.png", value=9), "0_mask.png"),
            placed(lambda folder: picture(folder / MVTEC / "ground_truth/bent/7_mask.png"), "7_mask.png"),
            placed(lambda folder: shutil.rmtree(folder / MVTEC / "train"), "part/train/good"),
            placed(lambda folder: (folder / MVTEC / "NOTE.txt").write_bytes(b"caf\xe9"), "NOTE.txt"),
        ),
    ),
    "ImageNet's weights": Reader(
        make_imagenet,
        lambda folder: imagenet.load(folder).tensors["conv1.weight"].numpy().tobytes(),
        (*structure(catalogue.IMAGENET_FILE), *tensors(catalogue.IMAGENET_FILE, "conv1.weight")),
    ),
    "explain": Reader(
        make_example,
        explain,
        (
            *broken_pictures("images/b.png")[5:],
            *structure("vae.safetensors"),
            *tensors("vae.safetensors", "encoder.conv1.weight")[:3],  # a NaN is named by the layer
            *(asked(**{name: "nowhere"}) for name in ("model", "argument", "weights", "layer", "preset", "device")),
            *(asked(**bad) for bad in ({"latent": 3}, {"size": -1}, {"batch": 0}, {"channels": 2})),
        ),
    ),
}
