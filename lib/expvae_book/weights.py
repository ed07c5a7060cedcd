"""The cache of trained weights: nothing is trained twice, and nothing outdated is reused.

A file is named by a digest of what determines its content: the model's class and shapes, the recipe, the number of
epochs or steps, the seed, the images, and the version of the protocol of training. It lies outside the repository, in
the folder that the environment variable EXPVAE_CACHE names (default: ~/.cache/expvae), as safetensors. What is there
can be read where nothing may be written; where the cache cannot be made or written, models are trained without it.
"""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from filelock import FileLock
from jaxtyping import UInt8
from torch import Tensor, nn

from expvae import models
from expvae_book import contrastive, devices, places, protocols, training
from expvae_book.checkpoints import read_tensors, steps_done, tensor_digest, undamaged, write_tensors
from expvae_book.recipes import RBMRecipe, Recipe, StepRecipe

CHECKPOINT_SECONDS = 180.0  # what a kill may cost; a checkpoint of the largest network is a gigabyte to write
_may_train = ContextVar("may_train", default=True)


class NotCachedError(LookupError):
    """The weights asked for are not in the cache, and nothing is to be trained."""


@dataclass(frozen=True)
class Trained:
    """A trained model and how it came about.

    Attributes:
        model: The model, in evaluation mode, on the device asked for.
        history: What the training measured; of a stack, a list of what that of each machine did, from the bottom up.
        key: Digest of everything that determines the weights.
        file: Name of their file in the cache.
        device: The device that trained them.
        precision: What they were trained in.
        reused: Whether they were found in the cache.
        steps: Steps of the optimiser that made them, of all machines of a stack.
        steps_asked: Those asked for; there are fewer where the training was told to end early.
        images: Images that these steps saw.
        images_asked: Those asked for.
    """

    model: nn.Module
    history: training.History | list[contrastive.History]
    key: str
    file: str
    device: str
    precision: str
    reused: bool
    steps: int = 0
    steps_asked: int = 0
    images: int = 0
    images_asked: int = 0


@dataclass(frozen=True)
class Entry:
    """What a file of the cache holds.

    Attributes:
        tensors: Weights by name.
        history: What the training measured, as JSON has it.
        device: The device that trained them.
        key: Digest of everything that determines the weights.
    """

    tensors: dict[str, Tensor]
    history: Any
    device: str
    key: str

    @classmethod
    def read(cls, path: Path) -> "Entry":
        """What this file holds; a ValueError if it is damaged."""
        tensors, metadata = read_tensors(path)
        with undamaged(path):
            return cls(tensors, json.loads(metadata["history"]), metadata["device"], metadata["key"])


def folder() -> Path:
    """Where weights are kept: EXPVAE_CACHE, or ~/.cache/expvae."""
    return places.setting("EXPVAE_CACHE", "~/.cache/expvae")


def there(path: Path) -> bool:
    """Whether the cache holds this and it can be read."""
    return os.access(path, os.R_OK)


@contextmanager
def held(lock: Path, files: Iterable[Path]) -> Iterator[OSError | None]:
    """Hold a part of the cache against other processes, as far as it can be written.

    Args:
        lock: The file that stands for the part, in the folder of the cache.
        files: The files of the part. What a process which was killed may have left half-written of them is removed.

    Yields:
        None, or why nothing can be written there. Then nothing is held, and what is there can still be read.
    """
    problem = None
    with ExitStack() as stack:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(lock))
            TemporaryFile(dir=lock.parent).close()  # a lock can be had where nothing else may be written
            for file in files:
                for half_written in file.parent.glob(f"{file.stem}.*.tmp"):
                    half_written.unlink()
        except OSError as error:
            problem = error
        yield problem


@cache
def _say_not_kept(folder: Path, reason: str) -> None:
    """Say, once in a process, that trainings are not kept there because of what `held` gave, and what that costs."""
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


def place(kind: str, key: str) -> Path:
    """Where the cache keeps a model of a kind."""
    return folder() / f"{kind}-{key[:20]}.safetensors"


def checkpoint_of(path: Path, device: torch.device) -> Path:
    """The checkpoint of weights that lie there; each kind of device, with random streams of its own, has its own."""
    return path.with_suffix(".checkpoint" if device.type == "cpu" else f".{device.type}.checkpoint")


def cached(
    kind: str,
    keys: Sequence[str],
    device: torch.device,
    train: Callable[[Path | None], Sequence[tuple[str, dict[str, Tensor], Any]]],
    kept: Path | None = None,
) -> tuple[list[Entry], bool]:
    """Read models that one training gives from the cache, or train, where not all of them are there.

    Also what was trained just now goes through its file, so that both ways give the same models to the last bit.

    Args:
        kind: What they are, for the names of files.
        keys: For each model, a digest of everything that determines it.
        device: Where they are trained, for the record.
        train: Trains, with the checkpoint at this path or without, and returns key, weights and history of each model.
            It may append to the path's name; all such files are removed at the end. Where training was told to end
            early, the keys are others: those of what there is by then, and the checkpoint stays for the rest.
        kept: A checkpoint that other trainings go on from, which is not removed; None for one of this training alone.

    Returns:
        What the cache holds of each model, or would hold if it could be written; and whether it was all there.

    Raises:
        NotCachedError: Within `cached_only`, where training is needed.
        ValueError: If a file of the cache is damaged.
        OSError: If the disk is full; the last checkpoint stays.
    """
    paths = [place(kind, key) for key in keys]
    missing = [path for path in paths if not there(path)]
    if missing and not _may_train.get():
        raise NotCachedError(f"{missing[0]} is not there, and nothing is to be trained here")
    checkpoint = kept or checkpoint_of(place(kind, keys[0] if len(keys) == 1 else _digest(keys)), device)
    with held(checkpoint.with_suffix(".lock"), [checkpoint, *paths]) as problem:
        reused = all(there(path) for path in paths)
        if not reused:
            if problem:
                _say_not_kept(folder(), problem.strerror or str(problem))
            where = devices.describe_device(device)
            made = train(None if problem else checkpoint)
            entries = [Entry(tensors, history, where, key) for key, tensors, history in made]
            if problem:
                return entries, False
            paths = [place(kind, entry.key) for entry in entries]
            for path, entry in zip(paths, entries, strict=True):
                described = {"key": entry.key, "history": json.dumps(entry.history), "device": where}
                write_tensors(path, entry.tensors, described)
        if not problem and not kept and paths == [place(kind, key) for key in keys]:
            for file in folder().glob(f"{checkpoint.name}*"):
                file.unlink()
        return [Entry.read(path) for path in paths], reused


def trained(
    make: Callable[[], nn.Module],
    train_NCYX: UInt8[Tensor, "n c y x"],
    validation_NCYX: UInt8[Tensor, "m c y x"],
    recipe: Recipe | RBMRecipe,
    *,
    epochs: int,
    seed: int,
    device: torch.device,
    variant: str = "",
    precision: str = "auto",
    vary: training.Vary | None = None,
    progress: bool = True,
) -> Trained:
    """Train a VAE or a stack of Boltzmann machines, or read its weights where the same training has been done before.

    A training that was cut off goes on from its last checkpoint. One of a VAE that is told to end early (see
    `expvae_book.checkpoints`) ends after an epoch, gives and keeps the weights of a training for so many epochs, under
    their key, and goes on when it is asked for again. That of a VAE for more epochs goes on from the end of
    that for fewer, whose checkpoint stays in the cache with three times the size of the weights. Two processes that ask
    for the same weights at once train them once: the second waits for the first. Where the cache cannot be written, the
    model is trained without, and a line on stderr says so.

    Args:
        make: Builds the untrained model, such as the class of a model.
        train_NCYX: Training images.
        validation_NCYX: Held-out images of the training split.
        recipe: Hyper-parameters, for a stack those of every machine; its own number of epochs is not read.
        epochs: Passes over the training images, for a stack those of every machine.
        seed: Fixes initial weights, order and noise.
        device: Where to train, and where the model is afterwards.
        variant: What tells `make` from other ways to build a model of the same class and shapes, such as weights that
            it starts from; "" where nothing does.
        precision: Of a VAE, see `expvae_book.devices.choose_precision`; stacks are trained in float32.
        vary: Of a VAE, how the images of each batch are changed, see `expvae_book.training.train`; its name is part of
            the key.
        progress: Show a bar with loss and remaining time.

    Raises:
        expvae_book.checkpoints.TrainingDivergedError: If the loss or a weight stops being finite.
        NotCachedError: Within `cached_only`, if the weights are not in the cache.
        ValueError: If the model is none of this library's, the precision is unknown, or a file of the cache is damaged.
        OSError: If the disk is full; the last checkpoint stays.
    """
    is_stack = isinstance(recipe, RBMRecipe)
    if is_stack and precision not in ("auto", "float32"):
        raise ValueError(f"stacks of Boltzmann machines are trained in float32; got precision={precision!r}")
    precision = "float32" if is_stack else devices.choose_precision(precision, device)
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
    options |= {"stack": repr(model)} if is_stack else {}
    options |= {"vary": vary.__name__} if vary else {}
    mixed = {"precision": precision} if precision != "float32" else {}
    determinants = (
        options
        | mixed
        | {
            "model": kind.__name__,
            "shapes": {name: list(value.shape) for name, value in model.state_dict().items()},
            "seed": seed,
            "train": tensor_digest(train_NCYX),
            "validation": tensor_digest(validation_NCYX),
        }
    )
    protocol = protocols.RBM if is_stack else protocols.TRAINING
    per_epoch = -(-len(train_NCYX) // recipe.batch_size)
    key = key_of(recipe, protocol, epochs=epochs, **determinants)
    kept = None
    if not is_stack:
        shared = checkpoint_of(place(kind.__name__, key_of(recipe, protocol, **determinants)), device)
        further = there(shared) and steps_done(shared) > epochs * per_epoch
        kept = None if further else shared

    def train(checkpoint: Path | None) -> list[tuple[str, dict[str, Tensor], Any]]:
        history = (contrastive.train_stack if is_stack else training.train)(
            model,
            train_NCYX,
            validation_NCYX,
            recipe,
            epochs=epochs,
            seed=seed,
            checkpoint=checkpoint,
            checkpoint_seconds=CHECKPOINT_SECONDS,
            progress=progress,
            **({} if is_stack else {"precision": precision, "keep_last": True, "vary": vary}),
        )
        if is_stack:
            return [(key, model.state_dict(), [vars(part) for part in history])]
        ended = key_of(recipe, protocol, epochs=len(history.kl), **determinants)
        return [(ended, model.state_dict(), vars(history))]

    (entry,), reused = cached(kind.__name__, [key], device, train, kept)
    model = training.build(make, seed).to(device)
    with undamaged(place(kind.__name__, entry.key)):
        model.load_state_dict(entry.tensors)
    history = [contrastive.History(**part) for part in entry.history] if is_stack else training.History(**entry.history)
    networks, done = (len(history), epochs) if is_stack else (1, len(history.kl))
    return Trained(
        model.eval(),
        history,
        entry.key,
        place(kind.__name__, entry.key).name,
        entry.device,
        precision,
        reused,
        steps=networks * done * per_epoch,
        steps_asked=networks * epochs * per_epoch,
        images=networks * done * len(train_NCYX),
        images_asked=networks * epochs * len(train_NCYX),
    )


def key_of(recipe: Recipe | RBMRecipe | StepRecipe, protocol: str, **determinants: Any) -> str:
    """Digest of what determines the weights of a model: all but the recipe's source and its own epochs or steps.

    Args:
        recipe: Hyper-parameters.
        protocol: The one that the training follows, of expvae_book.protocols.
        determinants: Whatever else; JSON and tensors.
    """
    hyper_parameters = dataclasses.asdict(recipe)
    del hyper_parameters["source"], hyper_parameters["steps" if isinstance(recipe, StepRecipe) else "epochs"]
    if hyper_parameters.get("beta") == 1:  # keys are those from before there was a choice
        del hyper_parameters["beta"]
    values = {
        name: tensor_digest(value) if isinstance(value, Tensor) else value for name, value in determinants.items()
    }
    return _digest({"recipe": hyper_parameters, "protocols": protocols.versions(protocol), **values})


def _digest(determinants: object) -> str:
    return hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()
