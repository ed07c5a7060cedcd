"""The cache of trained weights: nothing is trained twice, and nothing outdated is reused.

A file is named by a digest of what determines its content: the model's class and shapes, the recipe, the number of
epochs, the seed, the images, and the version of the protocol of training. It lies outside the repository, in
the folder that the environment variable EXPVAE_CACHE names (default: ~/.cache/expvae), as safetensors. What is there
can be read where nothing may be written; where the cache cannot be made or written, models are trained without it.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile

import torch
from filelock import FileLock
from jaxtyping import UInt8
from torch import Tensor, nn

from expvae import models
from expvae_book import devices, places, protocols, training
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
    return places.setting("EXPVAE_CACHE", "~/.cache/expvae")


def there(path: Path) -> bool:
    """Whether the cache holds this and it can be read."""
    return os.access(path, os.R_OK)


@contextmanager
def held(lock: Path, folder: Path, half_written: str) -> Iterator[OSError | None]:
    """Hold a part of the cache against other processes, as far as it can be written.

    Args:
        lock: The file that stands for the part.
        folder: Where its files are; made where it is missing.
        half_written: Pattern of the files in it that a process which was killed may have left; they are removed.

    Yields:
        None, or why nothing can be written there. Then nothing is held, and what is there can still be read.
    """
    problem = None
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock))
            TemporaryFile(dir=folder).close()  # a lock can be had where nothing else may be written
            for file in folder.glob(half_written):
                file.unlink()
        except OSError as error:
            problem = error
        yield problem


def say_not_kept(problem: OSError) -> None:
    """Say, once in a process, that a training is not kept because of what `held` gave, and what that costs."""
    _say_not_kept(folder(), problem.strerror or str(problem))


@cache
def _say_not_kept(folder: Path, reason: str) -> None:
    print(
        f"Trained weights cannot be kept in {folder} ({reason}): training goes on without. It starts from the "
        "beginning when it is cut off or asked for again, and its run stays unverified. EXPVAE_CACHE names another "
        "folder.",
        file=sys.stderr,
    )


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
    once train them once: the second waits for the first. Where the cache cannot be written, the model is trained
    without, and a line on stderr says so.

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
        OSError: If the disk is full; the last checkpoint stays.
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
    if not (_may_train.get() or there(path)):
        raise NotCachedError(f"{path} is not there, and nothing is to be trained here")
    with held(path.with_suffix(".lock"), path.parent, f"{path.stem}.*.tmp") as problem:
        reused = there(path)
        if not reused:
            if problem:
                say_not_kept(problem)
            # Without the cache of cast weights, which would keep those of the first step for all the others.
            mixed = torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16", cache_enabled=False)
            with mixed:
                history = training.train(
                    model,
                    train_NCYX,
                    validation_NCYX,
                    recipe,
                    epochs=epochs,
                    seed=seed,
                    checkpoint=None if problem else checkpoint,
                    checkpoint_seconds=CHECKPOINT_SECONDS,
                    progress=progress,
                )
            metadata = {
                "key": key,
                "history": json.dumps(vars(history)),
                "device": devices.describe_device(device),
            }
            tensors = model.state_dict()
            if not problem:
                training.write_tensors(path, tensors, metadata)
        if not problem:
            checkpoint.unlink(missing_ok=True)
        if reused or not problem:
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
