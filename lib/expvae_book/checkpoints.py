"""One loop for every training of the book, and checkpoints from which a killed one goes on.

A training (VAE, FactorVAE, Boltzmann machine) says what it changes and what one step is; the loop owns the rest: the
bar, the time, the check that numbers are finite, and the checkpoints. All tensors that a training changes are changed
in place, and exist before its first step. So a checkpoint is no more than their values by name, and going on is copying
these back, into the memory layout and onto the device that they had.
"""

import dataclasses
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from expvae_book.files import replacing

STEPS_PER_REPORT = 20  # reading the loss waits for the device, so the bar and the check for NaN do it rarely


class TrainingDivergedError(RuntimeError):
    """The loss or a weight is NaN or infinite; the last good checkpoint is kept."""


class Training:
    """A training as the loop sees it.

    Attributes:
        weights: What is trained, by name; none of it is stored unless all of it is finite.
        others: All other tensors that change: moments of the optimizer, order of the images, sums of losses.
        generators: Its sources of randomness.
        histories: Dataclasses of what it measures, with an attribute `seconds` that the loop adds to.
        total: Steps from its beginning to its end.
        done: Steps taken.
    """

    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    generators: list[torch.Generator]
    histories: list[Any]
    total: int
    done = 0

    def step(self) -> None:
        """Take one step, with `done` still at the number of those before it."""
        raise NotImplementedError

    def report(self) -> tuple[float, str] | None:
        """After a step: a number that is finite as long as all is well, and what the bar says; None to wait."""
        raise NotImplementedError

    def measure(self) -> None:
        """What comes after a step and is not counted as time of the training."""

    def run(self, checkpoint: Path | None, seconds: float, progress: bool, keep_last: bool = False) -> None:
        """Take all steps that are still to be taken.

        Args:
            checkpoint: A safetensors file to start from where it exists, and to write to; None to keep nothing.
            seconds: Time between two checkpoints.
            progress: Show a bar with remaining time.
            keep_last: Whether there is to be a checkpoint of the end as well.

        Raises:
            TrainingDivergedError: If a loss or weight stops being finite; the checkpoint is the last good one.
            ValueError: If the checkpoint is damaged or of a training with another number of steps.
            OSError: If a checkpoint cannot be written; the one before it stays.
        """
        if checkpoint is not None and checkpoint.exists():
            self._load(checkpoint)
        written = time.monotonic()
        with tqdm(
            total=self.total, initial=self.done, unit="step", disable=not progress, mininterval=2, dynamic_ncols=True
        ) as bar:
            while self.done < self.total:
                started = time.monotonic()
                self.step()
                self.done += 1
                if report := self.report():
                    self._require_finite(report[0], checkpoint)
                    bar.set_postfix_str(report[1], refresh=False)
                for history in self.histories:
                    history.seconds += time.monotonic() - started
                self.measure()
                bar.update()
                due = keep_last if self.done == self.total else time.monotonic() - written >= seconds
                if checkpoint is not None and due:
                    self._require_finite(total_of(self.weights), checkpoint)
                    self._save(checkpoint)
                    written = time.monotonic()
        self._require_finite(total_of(self.weights), checkpoint)

    def _require_finite(self, value: float, checkpoint: Path | None) -> None:
        if value - value == 0:  # false for NaN and for both infinities
            return
        kept = f"; the last good checkpoint is {checkpoint}" if checkpoint is not None and checkpoint.exists() else ""
        raise TrainingDivergedError(
            f"the loss or a weight is no longer finite by step {self.done}: try a smaller learning_rate{kept}"
        )

    def _save(self, path: Path) -> None:
        states = {f"generator/{index}": generator.get_state() for index, generator in enumerate(self.generators)}
        histories = json.dumps([dataclasses.asdict(history) for history in self.histories])
        described = {"step": str(self.done), "total": str(self.total), "histories": histories}
        write_tensors(path, self.weights | self.others | states, described)

    @torch.no_grad()
    def _load(self, path: Path) -> None:
        stored, metadata = read_tensors(path)
        if metadata["total"] != str(self.total):
            raise ValueError(f"{path} is of a training of {metadata['total']} steps, not of {self.total}")
        for name, value in (self.weights | self.others).items():
            value.copy_(stored[name])
        for index, generator in enumerate(self.generators):
            generator.set_state(stored[f"generator/{index}"])
        for history, values in zip(self.histories, json.loads(metadata["histories"]), strict=True):
            vars(history).update(values)
        self.done = int(metadata["step"])


class Epochs(Training):
    """A training whose every epoch visits each image once in a new random order; the last batch may be smaller.

    Args:
        count: Number of images.
        batch_size: Images of a step.
        epochs: Passes over the images.
        generator: Draws the orders, on its device.
    """

    def __init__(self, count: int, batch_size: int, epochs: int, generator: torch.Generator):
        self.batch_size, self.epochs, self.generator = batch_size, epochs, generator
        self.steps_per_epoch = -(-count // batch_size)
        self.total = epochs * self.steps_per_epoch
        self.order_N = torch.randperm(count, generator=generator, device=generator.device)
        self.others, self.generators = {"order": self.order_N}, [generator]

    def chosen(self) -> Int64[Tensor, " b"]:
        """Numbers of the images of the step."""
        first = self.done % self.steps_per_epoch * self.batch_size
        return self.order_N[first : first + self.batch_size]

    def report(self) -> tuple[float, str] | None:
        """At the end of an epoch and every few steps, what `value` gives."""
        if self._epoch_ends or self.done % STEPS_PER_REPORT == 0:
            value, text = self.value()
            return value, f"epoch {-(-self.done // self.steps_per_epoch)}/{self.epochs}, {text} nats/image"
        return None

    def measure(self) -> None:
        """At the end of an epoch, measure it and draw the order of the next."""
        if self._epoch_ends:
            self.end_epoch()
            self.order_N.copy_(torch.randperm(len(self.order_N), generator=self.generator, device=self.order_N.device))

    def value(self) -> tuple[float, str]:
        """A number that is finite as long as all is well, and one in nats per image with its name."""
        raise NotImplementedError

    def end_epoch(self) -> None:
        """Add to the history what an epoch gave."""
        raise NotImplementedError

    @property
    def _epoch_ends(self) -> bool:
        return self.done % self.steps_per_epoch == 0


def adam(parameters: Mapping[str, Tensor], **options: Any) -> tuple[torch.optim.Adam, dict[str, Tensor]]:
    """The fused Adam of these parameters, and its moments by name, which are there before the first step."""
    optimizer, moments = torch.optim.Adam(parameters.values(), fused=True, **options), {}
    for name, parameter in parameters.items():
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        moments |= {f"adam/{part}/{name}": value for part, value in optimizer.state[parameter].items()}
    return optimizer, moments


def total_of(weights: Mapping[str, Tensor]) -> float:
    """The sum of all values, which is finite where all of them are; waits for the device."""
    return sum(value.detach().sum() for value in weights.values()).item()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to a safetensors file that appears whole or not at all; see `expvae_book.files.replacing`."""
    with replacing(path) as temporary:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, temporary, metadata)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file.

    Raises:
        ValueError: If it is damaged; the message names it.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        return load_file(path), metadata
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
