"""The VAE that comes with the repository: a stored run's weights as a file, and sprites to explain with it."""

import json
from pathlib import Path

import torch
from PIL import Image
from safetensors.numpy import save_file

from expvae_book import files, runs
from expvae_book.data import dsprites

WEIGHTS = "weights/"  # before the names of arrays that are weights


def candidates() -> list[runs.Run]:
    """The stored runs that keep the weights of their VAE."""
    return [run for run in runs.find("disentanglement") if any(name.startswith(WEIGHTS) for name in run.arrays)]


def save(run: runs.Run, folder: Path) -> Path:
    """Write the weights of a run on dSprites, in float16, and the sprites that it shows, drawn from their factors.

    The file's metadata name the model, the run with its commit, recipe, budget and data, and the licence.

    Returns:
        Path of the weights; the sprites lie beside it in the folder images.

    Raises:
        ValueError: If the run keeps no weights.
        OSError: If a file cannot be written.
    """
    weights = {name.removeprefix(WEIGHTS): array for name, array in run.arrays.items() if name.startswith(WEIGHTS)}
    if not weights:
        raise ValueError(f"the run {run.label} keeps no weights")
    metadata = {"format": "pt", "model": "expvae.models.DSpritesVAE", "run": run.label, "caption": run.caption}
    metadata |= {"recipe": json.dumps(run.record["recipe"]), "data": run.card.credit, "licence": "MIT"}
    with files.replacing(folder / "vae.safetensors") as path:
        save_file(weights, path, metadata)
    sprites = dsprites.sample().images(torch.from_numpy(run.arrays["shown"]))
    for number, image_1YX in enumerate(sprites.mul(255).numpy(), 1):
        with files.replacing(folder / "images" / f"sprite{number}.png") as path:
            Image.fromarray(image_1YX[0]).save(path, "PNG")
    return folder / "vae.safetensors"
