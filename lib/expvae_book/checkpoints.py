"""One loop for every training of the book, and checkpoints from which a killed one goes on.

A training (VAE, FactorVAE, Boltzmann machine) says what it changes and what one step is; the loop owns the rest: the
bar, the time, the check that numbers are finite, and the checkpoints. All tensors that a training changes are changed
in place, and exist before its first step. So a checkpoint is no more than their values by name, and going on is copying
these back, into the memory layout and onto the device that they had.

Some trainings can end early: so many minutes after they began or went on, of the environment variable EXPVAE_MINUTES,
or where the process is sent SIGTERM; both wait for a step after which what there is can stand by itself, such as the
last one of an epoch.
"""

import dataclasses
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from expvae_book.files import reason, replacing

STEPS_PER_REPORT = 20  # reading the loss waits for the device, so the bar and the check for NaN do it rarely
DIGEST = "sha256"  # among the metadata of a file
TIMED_STEPS = 5  # whose rate says how long a training takes; the one before them warms up


class TrainingDivergedError(RuntimeError):
    """The loss or a weight is NaN or infinite; the last good checkpoint is kept."""


@dataclass
class State:
    """Where a training stands: all that a checkpoint holds.

    Attributes:
        weights: What is trained, by name; none of it is stored unless all of it is finite.
        others: All other tensors that change: moments of the optimizer, order of the images, sums of losses.
        generators: Its sources of randomness.
        histories: Dataclasses of what it measures, with an attribute `seconds` that the loop adds to.
        total: Steps from its beginning to its end.
        done: Steps taken.
        scheduled: Whether a step depends on the total, so that a training of another total cannot go on from here.
    """

    weights: dict[str, Tensor]
    others: dict[str, Tensor]
    generators: list[torch.Generator]
    histories: list[Any]
    total: int = 0
    done: int = 0
    scheduled: bool = False

    def save(self, path: Path) -> None:
        """Write a checkpoint."""
        states = {f"generator/{index}": generator.get_state() for index, generator in enumerate(self.generators)}
        histories = json.dumps([dataclasses.asdict(history) for history in self.histories])
        described = {"step": str(self.done), "total": str(self.total), "histories": histories}
        write_tensors(path, self.weights | self.others | states, described)

    @torch.no_grad()
    def load(self, path: Path) -> None:
        """Go where a checkpoint left off; a ValueError if it is damaged or its total does not do."""
        stored, metadata = read_tensors(path)
        with undamaged(path):
            step, total, histories = int(metadata["step"]), int(metadata["total"]), json.loads(metadata["histories"])
        if step > self.total or (self.scheduled and total != self.total):
            raise ValueError(f"{path} is of a training of {total} steps, not of {self.total}")
        with undamaged(path):
            for name, value in (self.weights | self.others).items():
                value.copy_(stored[name].view_as(value))  # no smaller one, which would be repeated
            for index, generator in enumerate(self.generators):
                generator.set_state(stored[f"generator/{index}"])
            for history, values in zip(self.histories, histories, strict=True):
                vars(history).update(values)
        self.done = step


def run(
    state: State,
    step: Callable[[], None],
    report: Callable[[], tuple[float, str] | None],
    measure: Callable[[], None],
    *,
    checkpoint: Path | None,
    checkpoint_seconds: float,
    progress: bool,
    keep_last: bool = False,
    complete: Callable[[], bool] | None = None,
) -> None:
    """Take all steps of a training that are still to be taken, unless it is told to end early.

    Once the first steps have been timed, a sentence on stderr says how long the others take.

    Args:
        state: Where it stands; counts the steps.
        step: Takes one.
        report: Called after each step; a number that is finite as long as all is well, and what the bar says; None to
            wait.
        measure: Called after each step as well, for what is not counted as time of the training.
        checkpoint: A safetensors file to start from where it exists, and to write to; None to keep nothing.
        checkpoint_seconds: Time between two checkpoints.
        progress: Show a bar with remaining time, and the sentence.
        keep_last: Whether there is to be a checkpoint of the end as well.
        complete: Whether the training can end here; None for one that cannot end early. Where it did, `state.done` is
            less than the total, and there is a checkpoint of that end.

    Raises:
        TrainingDivergedError: If a loss or weight stops being finite; the checkpoint is the last good one.
        ValueError: If the checkpoint is damaged, or of another number of steps than the training can go on from, or if
            EXPVAE_MINUTES is no number of minutes.
        OSError: If a checkpoint cannot be written; the one before it stays.
    """
    if checkpoint is not None and checkpoint.exists():
        state.load(checkpoint)
    written, ended = time.monotonic(), False
    with (
        told_to_end(complete is not None) as due_to_end,
        tqdm(
            total=state.total, initial=state.done, unit="step", disable=not progress, mininterval=2, dynamic_ncols=True
        ) as bar,
    ):
        tell = _estimate(state, progress)
        while state.done < state.total and not ended:
            started = time.monotonic()
            step()
            state.done += 1
            if told := report():
                _require_finite(told[0], state, checkpoint)
                bar.set_postfix_str(told[1], refresh=False)
            for history in state.histories:
                history.seconds += time.monotonic() - started
            measure()
            bar.update()
            tell()
            ended = state.done < state.total and complete is not None and due_to_end() and complete()
            due = (keep_last and state.done == state.total) or time.monotonic() - written >= checkpoint_seconds or ended
            if checkpoint is not None and due:
                _require_finite(total_of(state.weights), state, checkpoint)
                state.save(checkpoint)
                written = time.monotonic()
    _require_finite(total_of(state.weights), state, checkpoint)


_began: ContextVar[float | None] = ContextVar("began", default=None)


@contextmanager
def one_clock() -> Iterator[None]:
    """Within it, the minutes of EXPVAE_MINUTES count from here for all trainings together."""
    token = _began.set(time.monotonic())
    try:
        yield
    finally:
        _began.reset(token)


@contextmanager
def told_to_end(can: bool) -> Iterator[Callable[[], bool]]:
    """Within it, SIGTERM asks for an early end, and a second one stops the process as ever.

    Args:
        can: Whether the training can end early; if not, nothing changes.

    Yields:
        Whether the training is due to end: since it was asked for, or since EXPVAE_MINUTES are over.

    Raises:
        ValueError: If that is no number above zero.
    """
    text, asked = os.environ.get("EXPVAE_MINUTES") or "inf", threading.Event()
    began = _began.get() or time.monotonic()
    try:
        minutes = float(text)
    except ValueError:
        minutes = math.nan
    if not minutes > 0:
        raise ValueError(f"EXPVAE_MINUTES={text!r} must be a number of minutes above 0, or be unset")

    def ask(number: int, frame: object) -> None:
        asked.set()
        signal.signal(number, before)
        print("This training ends at the next point where it can; the same signal again stops it.", file=sys.stderr)

    # Only the main thread may set a handler, and only a handler that was set from Python can be put back.
    before = signal.getsignal(signal.SIGTERM)
    handles = can and threading.current_thread() is threading.main_thread() and before is not None
    if handles:
        signal.signal(signal.SIGTERM, ask)
    try:
        yield lambda: asked.is_set() or time.monotonic() - began >= 60 * minutes
    finally:
        if handles:
            signal.signal(signal.SIGTERM, before)


def _estimate(state: State, progress: bool) -> Callable[[], None]:
    """Called after each step, says once, on stderr, how long the training takes by the rate of the first steps."""
    first, began = state.done + 1, 0.0

    def tell() -> None:
        nonlocal began
        if not progress or state.done not in (first, first + TIMED_STEPS):
            return
        next(iter(state.weights.values())).flatten()[:1].tolist()  # waits for the device
        if state.done == first:
            began = time.monotonic()
            return
        rate, left = TIMED_STEPS / (time.monotonic() - began), state.total - state.done
        tqdm.write(f"{left:,} steps are left at {rate:.3g} steps/s, {duration(left / rate)}.", file=sys.stderr)

    return tell


def duration(seconds: float) -> str:
    """About how long that is, in words."""
    for size, name in ((3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"about {seconds / size:.2g} {name}"
    return f"about {math.ceil(seconds)} seconds"


def run_epochs(
    state: State,
    count: int,
    batch_size: int,
    epochs: int,
    step: Callable[[Int64[Tensor, " b"], float], None],
    report: Callable[[int], tuple[float, str]],
    end_epoch: Callable[[], None],
    **options: Any,
) -> None:
    """Take the steps of a training whose every epoch visits each image once in a new random order.

    The last batch of an epoch may be smaller.

    Args:
        state: Where it stands; its generator draws the orders, on its device.
        count: Number of images.
        batch_size: Images of a step.
        epochs: Passes over the images.
        step: Takes a step with these images, so many epochs after the beginning.
        report: Given how many images the epoch has seen, a number that is finite as long as all is well, and one in
            nats per image with its name.
        end_epoch: Adds to the history what an epoch gave.
        options: Of `run`. Where none of its steps depends on the number of epochs, the training can end early, after
            an epoch.
    """
    (generator,) = state.generators
    order_N = torch.randperm(count, generator=generator, device=generator.device)
    per_epoch = -(-count // batch_size)
    state.others["order"], state.total = order_N, epochs * per_epoch

    def take() -> None:
        first = state.done % per_epoch * batch_size
        step(order_N[first : first + batch_size], state.done / per_epoch)

    def tell() -> tuple[float, str] | None:
        epoch, since = divmod(state.done, per_epoch)
        if since and state.done % STEPS_PER_REPORT:
            return None
        value, text = report(since * batch_size or count)
        return value, f"epoch {epoch + (since > 0)}/{epochs}, {text} nats/image"

    def measure() -> None:
        if state.done % per_epoch == 0:
            end_epoch()
            order_N.copy_(torch.randperm(count, generator=generator, device=generator.device))

    can_end = None if state.scheduled else lambda: state.done % per_epoch == 0
    run(state, take, tell, measure, complete=can_end, **options)


def _require_finite(value: float, state: State, checkpoint: Path | None) -> None:
    if value - value == 0:  # false for NaN and for both infinities
        return
    kept = f"; the last good checkpoint is {checkpoint}" if checkpoint is not None and checkpoint.exists() else ""
    raise TrainingDivergedError(
        f"the loss or a weight is no longer finite by step {state.done}: try a smaller learning_rate{kept}"
    )


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


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Weights and buffers of a model by name, themselves and no copies."""
    return {f"model/{name}": value for name, value in model.state_dict().items()}


def total_of(weights: Mapping[str, Tensor]) -> float:
    """The sum of all values, which is finite where all of them are; waits for the device."""
    return sum(value.detach().sum() for value in weights.values()).item()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of the shape, type and content of a tensor."""
    content = tensor.detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tuple(content.shape)} {content.dtype}".encode())
    digest.update(content.flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digests = {name: tensor_digest(value) for name, value in tensors.items()}
    return hashlib.sha256(json.dumps([digests, metadata], sort_keys=True).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors to a safetensors file that appears whole or not at all; see `expvae_book.files.replacing`.

    Its metadata hold a digest of all that is in it, by which `read_tensors` finds what has been damaged since.
    """
    with replacing(path) as temporary:
        stored = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        save_file(stored, temporary, metadata | {DIGEST: _digest(stored, metadata)})


def steps_done(path: Path) -> int:
    """How many steps a training had taken when it wrote this checkpoint; a ValueError if that is damaged."""
    metadata = read_tensors(path, only_metadata=True)[1]
    with undamaged(path):
        return int(metadata["step"])


@contextmanager
def undamaged(path: Path) -> Iterator[None]:
    """Within it, whatever the content of a file lets its reader raise is a ValueError that names it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of safetensors, json or PyTorch, by the place that is damaged
        raise ValueError(f"{path} is damaged ({reason(error)}); delete it and run again") from error


def read_tensors(path: Path, *, only_metadata: bool = False) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, if they are wanted, and the metadata of a safetensors file.

    Raises:
        ValueError: If it is damaged; the message names it. Files from before there was a digest are not held against
            one, and neither are metadata that are read alone.
    """
    with undamaged(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        tensors, digest = {} if only_metadata else load_file(path), metadata.pop(DIGEST, None)
        if digest and not only_metadata and digest != _digest(tensors, metadata):
            raise ValueError("it does not hold what its digest was taken of")
    return tensors, metadata
