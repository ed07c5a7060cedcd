"""The cache of trained weights: nothing is trained twice, and nothing outdated is reused.

A file is named by a digest of what determines its content: the model's class and shapes, the recipe, the number of
epochs, the seed, the images, and the version of the protocol of training. It lies outside the repository, in
the folder that the environment variable EXPVAE_CACHE names (default: ~/.cache/expvae), as safetensors.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock
from jaxtyping import UInt8
from safetensors import SafetensorError
from torch import Tensor, nn

from expvae import models
from expvae_book import devices, protocols, training
from expvae_book.recipes import Recipe

CHECKPOINT_SECONDS = 180.0  # what a kill may cost; a checkpoint of the largest network is a gigabyte to write
_may_train = ContextVar("may_train", default=True)


class NotCachedError(LookupError):
    """The weights asked for are not in the cache, and nothing is to be trained."""


@dataclass(frozen=True)
class Trained:
    """A trained model and how it came about.

    Attributes:
        model: The model, in evaluation mode, on the device asked for.
        history: Losses per epoch, seconds and images.
        key: Digest of everything that determines the weights.
        file: Name of their file in the cache.
        device: The device that trained them.
        reused: Whether they were found in the cache.
    """

    model: nn.Module
    history: training.History
    key: str
    file: str
    device: str
    reused: bool


def folder() -> Path:
    """Where weights are kept: EXPVAE_CACHE, or ~/.cache/expvae."""
    return Path(os.environ.get("EXPVAE_CACHE") or Path.home() / ".cache" / "expvae")


@contextmanager
def cached_only() -> Iterator[None]:
    """Within it, `trained` reads weights from the cache or raises a `NotCachedError`; it trains nothing.

    A context and not an argument, so that what calls `trained` in turn need not pass it on.
    """
    before = _may_train.set(False)
    try:
        yield
    finally:
        _may_train.reset(before)


def trained(
    make: Callable[[], nn.Module],
    train_NCYX: UInt8[Tensor, "n c y x"],
    validation_NCYX: UInt8[Tensor, "m c y x"],
    recipe: Recipe,
    *,
    epochs: int,
    seed: int,
    device: torch.device,
    variant: str = "",
    precision: str = "float32",
    progress: bool = True,
) -> Trained:
    """Train a model, or read its weights where the same training has been done before.

    A training that was cut off goes on from its last checkpoint. Two processes that ask for the same weights at
    once train them once: the second waits for the first.

    Args:
        make: Builds the untrained model, such as the class of a model.
        train_NCYX: Training images.
        validation_NCYX: Held-out images of the training split.
        recipe: Hyper-parameters; its own number of epochs is not read.
        epochs: Passes over the training images.
        seed: Fixes initial weights, order and noise.
        device: Where to train, and where the model is afterwards.
        variant: What tells `make` from other ways to build a model of the same class and shapes, such as weights that
            it starts from; "" where nothing does.
        precision: "float32", or "bfloat16" for automatic mixed precision: weights stay float32, and convolutions and
            matrix products are computed in bfloat16. See `expvae_book.devices.choose_precision`.
        progress: Show a bar with loss and remaining time.

    Raises:
        expvae_book.training.TrainingDivergedError: If the loss stops being finite.
        NotCachedError: Within `cached_only`, if the weights are not in the cache.
        ValueError: If the model is none of this library's, the precision is unknown, or a file of the cache is damaged.
    """
    if precision not in devices.PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(devices.PRECISIONS)}; got {precision!r}")
    model = training.build(make, seed).to(device)
    kind = type(model)
    if not kind.__module__.startswith(f"{models.__name__}."):
        raise ValueError(
            f"make builds a {kind.__module__}.{kind.__qualname__}, which is none of {models.__name__}: the cache knows "
            "models by their names and the version of the protocol, and could not tell when yours changes; call "
            f"{training.__name__}.train"
        )
    # Only where they are used, so that other trainings keep the keys that they had before there was a choice.
    options = {"variant": variant} if variant else {}
    options |= {"precision": precision} if precision != "float32" else {}
    key = _key(model, train_NCYX, validation_NCYX, recipe, epochs, seed, options)
    path = folder() / f"{kind.__name__}-{key[:20]}.safetensors"
    checkpoint = path.with_suffix(".checkpoint")
    if not (_may_train.get() or path.exists()):
        raise NotCachedError(f"{path} is not there, and nothing is to be trained here")
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_suffix(".lock")):
        for half_written in path.parent.glob(f"{path.stem}.*.tmp"):  # by a process that was killed
            half_written.unlink()
        reused = path.exists()
        if not reused:
            # Without the cache of cast weights, which would keep those of the first step for all the others.
            mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
            with _naming(checkpoint), mixed:
                history = training.train(
                    model,
                    train_NCYX,
                    validation_NCYX,
                    recipe,
                    epochs=epochs,
                    seed=seed,
                    checkpoint=checkpoint,
                    checkpoint_seconds=CHECKPOINT_SECONDS,
                    progress=progress,
                )
            metadata = {
                "key": key,
                "history": json.dumps(vars(history)),
                "device": devices.describe_device(device),
            }
            training.write_tensors(path, model.state_dict(), metadata)
        checkpoint.unlink(missing_ok=True)
        with _naming(path):
            tensors, metadata = training.read_tensors(path)
    # Also a model trained just now goes through the file, so that both ways give the same model to the last bit.
    model = training.build(make, seed).to(device)
    model.load_state_dict(tensors)
    model.eval()
    return Trained(
        model, training.History(**json.loads(metadata["history"])), key, path.name, metadata["device"], reused
    )


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256 of the shape, type and content of a tensor."""
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(content.shape)} {content.dtype}".encode())
    digest.update(content.view(torch.uint8).numpy().data)
    return digest.hexdigest()


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Name the file that turns out to be damaged."""
    try:
        yield
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error


def _key(
    model: nn.Module,
    train_NCYX: UInt8[Tensor, "n c y x"],
    validation_NCYX: UInt8[Tensor, "m c y x"],
    recipe: Recipe,
    epochs: int,
    seed: int,
    options: dict[str, str],
) -> str:
    hyper_parameters = dataclasses.asdict(recipe)
    del hyper_parameters["source"], hyper_parameters["epochs"]
    determinants = {
        "model": type(model).__name__,
        "shapes": {name: list(value.shape) for name, value in model.state_dict().items()},
        "recipe": hyper_parameters,
        "epochs": epochs,
        "seed": seed,
        "train": tensor_digest(train_NCYX),
        "validation": tensor_digest(validation_NCYX),
        "protocols": protocols.versions(protocols.TRAINING),
        **options,
    }
    return hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()
