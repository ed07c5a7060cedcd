"""Probes: what a trained model says of a few images, kept with its run, so that later code can be held against it.

A probe holds the means and a coarse attention map of some test images that are drawn by a stored seed, and names the
file of the weights in the cache. `verify` asks the weights again, and writes into the record when, by which code and
how well both agree.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F

from expvae import attention
from expvae.models import (
    MNISTVAE,
    RBM,
    UCSDVAE,
    BrongersMVTecVAE,
    BrongersUCSDVAE,
    ConvRBM,
    DSpritesVAE,
    MVTecVAE,
    Report2MVTecVAE,
    Stack,
)
from expvae_book import protocols, provenance, runs, weights
from expvae_book.checkpoints import read_tensors
from expvae_book.data import dsprites, mnist, mvtec, ucsd
from expvae_book.training import to_unit

COUNT = 64  # images
GRID = 8  # rows and columns of a coarse map
BATCH = 16
METHOD = "liu2020_code"  # one backward pass for all latents
OF_MVTEC = (MVTecVAE, BrongersMVTecVAE, Report2MVTecVAE)
VAES = {kind.__name__: kind for kind in (MNISTVAE, UCSDVAE, BrongersUCSDVAE, *OF_MVTEC, DSpritesVAE)}
Draw = Callable[[Int64[Tensor, " b"]], UInt8[Tensor, "b c y x"]]


class CannotVerifyError(LookupError):
    """What a run's probe needs is not here: the probe itself, the weights or the data."""


@dataclass(frozen=True)
class Probe:
    """What is stored with a run, and the images that it was taken from.

    Attributes:
        facts: How to take it again: the weights' file, the model, the layer, the seed and the data.
        arrays: The means [64, D] and the coarse maps [64, 8, 8].
        draw: The images of some numbers, to verify the run before it ends.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]
    draw: Draw


def take(
    model: nn.Module,
    file: str,
    images: UInt8[Tensor, "n c y x"] | Draw,
    layer: str,
    seed: int,
    count: int | None = None,
) -> Probe:
    """Ask a trained model for the means and maps of a few images.

    Args:
        model: A VAE or a stack of machines of this library, in evaluation mode.
        file: Name of its weights in the cache.
        images: Test images, or what gives those of some numbers.
        layer: The layer of the maps.
        seed: Draws the images.
        count: How many images there are, where they are not given as a tensor.
    """
    draw = images if callable(images) else images.__getitem__
    facts = {"weights": file, **_described(model), "layer": layer, "seed": seed, "images": count or len(images)}
    # On the CPU whatever trained it: there TF32 may move a number as far as another model would.
    arrays = _evaluate(copy.deepcopy(model).cpu(), draw, facts)
    facts |= {"size": draw(torch.zeros(1, dtype=torch.int64)).shape[-1], "latents": arrays["probe means"].shape[1]}
    return Probe(facts, arrays, draw)


def verify(run: runs.Run, draw: Draw | None = None) -> runs.Run:
    """Ask a run's weights again for what its probe holds, and write into the record how well both agree.

    The difference is the greatest between two numbers, beside the greatest number: max|a - b| / max|b|.

    Args:
        run: A stored run.
        draw: Its images where they are in memory, as in the chapter that has just stored it; by default they are
            loaded.

    Returns:
        The run with what came of it. Where images are given and the cache could not keep the weights, it is as it was.

    Raises:
        CannotVerifyError: If the run has no probe, or its weights or its data are not here.
    """
    facts = run.record.get("probe")
    if facts is None:
        raise CannotVerifyError("it has no probe")
    if not weights.there(weights.folder() / facts["weights"]):
        if draw is not None:
            return run
        raise CannotVerifyError(f"its weights are not in the cache, {weights.folder()}")
    draw = draw or _images(run, facts)
    differences = [
        np.abs(now - then).max() / max(np.abs(then).max(), np.finfo(np.float32).tiny)
        for name, now in _evaluate(_loaded(facts), draw, facts).items()
        for then in [run.arrays[name]]
    ]
    made = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "git": provenance.commit(),
        "protocols": {name: protocols.VERSIONS.get(name) for name in run.record["protocols"]},
        "versions": provenance.versions(),
        "difference": float(max(differences)),
    }
    return runs.amend(run, {"verified": made})


def grey(sprites: dsprites.Sprites) -> Draw:
    """What gives sprites, whose pixels are 0 and 1, as grey levels 0…255."""
    return lambda index_B: sprites.images(index_B) * 255


def _evaluate(model: nn.Module, draw: Draw, facts: dict[str, Any]) -> dict[str, np.ndarray]:
    order_N = torch.randperm(facts["images"], generator=torch.Generator().manual_seed(facts["seed"]))
    means, maps = [], []
    for index_B in order_N[:COUNT].split(BATCH):
        result = attention(model.encode, facts["layer"], to_unit(draw(index_B).cpu()), METHOD)
        means.append(result.encoded[0].detach())
        maps.append(F.adaptive_avg_pool2d(result.map_BYX.detach()[:, None], GRID)[:, 0])
    return {"probe means": torch.cat(means).float().numpy(), "probe maps": torch.cat(maps).float().numpy()}


def _described(model: nn.Module) -> dict[str, Any]:
    if not isinstance(model, Stack):
        # No tensor tells whether the network normalises its images, see expvae.models.MVTecVAE.
        options = {"normalises": True} if getattr(model, "normalises", False) else {}
        return {"model": type(model).__name__, **options}
    layers = [
        {
            "shape": list(layer.visible_shape),
            "filters": layer.hidden_shape[0],
            "kernel": layer.weight.shape[-1],
            "stride": layer.stride,
        }
        if isinstance(layer, ConvRBM)
        else {"visible": layer.visible_shape[0], "hidden": layer.hidden_shape[0]}
        for layer in model.layers
    ]
    return {"model": "Stack", "layers": layers, "units": model.units, "shape": list(model.shape)}


def _loaded(facts: dict[str, Any]) -> nn.Module:
    """The model of a probe, from the cache."""
    tensors, _ = read_tensors(weights.folder() / facts["weights"])
    model = _stack(facts) if facts["model"] == "Stack" else VAES[facts["model"]](facts["latents"])
    # The file of a FactorVAE holds its discriminator too.
    model.load_state_dict({name: tensors[name] for name in model.state_dict()})
    if facts.get("normalises"):
        model.normalises = True
    return model.eval()


def _stack(facts: dict[str, Any]) -> Stack:
    layers = []
    for described in facts["layers"]:
        described = {name: tuple(value) if isinstance(value, list) else value for name, value in described.items()}
        layers.append((ConvRBM if "kernel" in described else RBM)(**described, units=facts["units"]))
    return Stack(layers, tuple(facts["shape"]))


def _images(run: runs.Run, facts: dict[str, Any]) -> Draw:
    """The test images of a run, from the data at hand."""
    dataset, _, category = run.card.name.partition("/")
    data = "sample" if run.card.generated else "real"
    if not run.of_data_at_hand:
        raise CannotVerifyError(f"the data at hand are not those of its card, {run.card.name}")
    draws = {
        "mnist": lambda: mnist.load(data).test_NYX[:, None].__getitem__,
        "ucsd": lambda: ucsd.load(data, size=facts["size"]).test_NYX[:, None].__getitem__,
        "mvtec": lambda: mvtec.load(category, data).test_NCYX.__getitem__,
        "dsprites": lambda: grey(dsprites.load(data)),
    }
    try:
        return draws[dataset]()
    except FileNotFoundError as error:
        raise CannotVerifyError(f"its data are not at hand: {error}") from None
