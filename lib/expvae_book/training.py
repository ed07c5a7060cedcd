"""The one loop that trains every VAE of the book.

The training set sits in memory as uint8, on the device that trains; batches are gathered there, so that no worker
process, no decoding and no copy stands between two steps. All randomness (order of the images, noise of the
latents) comes from one generator on the CPU, whose state is part of every checkpoint.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int64, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from expvae import elbo_terms
from expvae_book.files import replacing
from expvae_book.recipes import Recipe

VALIDATION_BATCH = 512
STEPS_PER_REPORT = 20  # reading the loss waits for the device, so the bar and the check for NaN do it rarely


class TrainingDivergedError(RuntimeError):
    """The loss or a weight is NaN or infinite; the last good checkpoint is kept."""


@dataclass
class History:
    """What a training run measured, one entry per epoch; losses are means over images, in nats.

    Attributes:
        reconstruction: Training reconstruction loss, -log p(x|z) summed over pixels.
        kl: Training KL(q(z|x) || p(z)) summed over latents.
        validation_reconstruction: The same on the held-out images, after the epoch.
        validation_kl: The same on the held-out images, after the epoch.
        seconds: Time spent training so far, without validation and without what a killed run lost.
        images: Images seen so far.
    """

    reconstruction: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    validation_reconstruction: list[float] = field(default_factory=list)
    validation_kl: list[float] = field(default_factory=list)
    seconds: float = 0.0
    images: int = 0


def to_unit(x_BCYX: UInt8[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
    """Grey levels 0…255 as float32 in [0, 1]."""
    return x_BCYX.to(torch.float32).div_(255)


def hold_out(
    count: int, fraction: float = 0.1, seed: int = 0
) -> tuple[Int64[Tensor, " train"], Int64[Tensor, " validation"]]:
    """Split the indices 0…count-1 into training and validation, both sorted.

    The split depends on its own seed, not on that of the training, so that models that differ only in their seed
    are trained and validated on the same images.

    Raises:
        ValueError: If either part would be empty.
    """
    held = round(count * fraction)
    if not 0 < held < count:
        raise ValueError(f"fraction={fraction} of {count} images leaves no training or no validation images")
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    return order[held:].sort().values, order[:held].sort().values


def build(make: Callable[[], nn.Module], seed: int) -> nn.Module:
    """Make a model with initial weights that depend on the seed alone; the global generator is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def validate(model: nn.Module, x_NCYX: UInt8[Tensor, "n c y x"], seed: int = 0) -> tuple[float, float]:
    """Mean reconstruction loss and KL per image of held-out images, with the same noise at every call."""
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            terms = [elbo_terms(model, to_unit(x_BCYX), generator) for x_BCYX in x_NCYX.split(VALIDATION_BATCH)]
    finally:
        model.train(was_training)
    reconstruction, kl = (torch.cat(parts).double().mean().item() for parts in zip(*_on_cpu(terms), strict=True))
    return reconstruction, kl


def train(
    model: nn.Module,
    train_NCYX: UInt8[Tensor, "n c y x"],
    validation_NCYX: UInt8[Tensor, "m c y x"],
    recipe: Recipe,
    *,
    epochs: int,
    seed: int,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
) -> History:
    """Minimise the negative ELBO with Adam, in place, on the device where the model is.

    Every epoch visits each training image once in a new random order; the last batch may be smaller. Where
    `checkpoint` names a file, training starts from what is stored there, and writes to it at least every
    `checkpoint_seconds`: a run that was killed and started again ends with the weights, bit for bit on the CPU, of
    one that was not. The file must have been written by a call with the same model, data, recipe and seed.

    Args:
        model: A module with encode(x) -> (mu, logvar) and decode(z) -> logits.
        train_NCYX: Training images.
        validation_NCYX: Held-out images, of the training split, that are only measured.
        recipe: Hyper-parameters; its own number of epochs is not read.
        epochs: Passes over the training images.
        seed: Fixes order and noise.
        checkpoint: A safetensors file, or None to keep nothing.
        checkpoint_seconds: Time between two checkpoints.
        progress: Show a bar with loss and remaining time.

    Raises:
        TrainingDivergedError: If the loss or a weight stops being finite; the checkpoint is the last good one.
        ValueError: If the checkpoint is damaged.
        OSError: If a checkpoint cannot be written; the one before it stays.
    """
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last).train()
    train_NCYX, validation_NCYX = train_NCYX.to(device), validation_NCYX.to(device)
    count = len(train_NCYX)
    steps_per_epoch = -(-count // recipe.batch_size)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.epsilon, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    state = _State(order_N=torch.randperm(count, generator=generator), totals=torch.zeros(2, device=device))
    if checkpoint is not None and checkpoint.exists():
        state = _load(checkpoint, model, optimizer, generator)
    history = state.history

    total = epochs * steps_per_epoch
    written = time.monotonic()
    with tqdm(
        total=total, initial=state.step, unit="step", disable=not progress, mininterval=2, dynamic_ncols=True
    ) as bar:
        while state.step < total:
            started = time.monotonic()
            epoch, step_in_epoch = divmod(state.step, steps_per_epoch)
            first = step_in_epoch * recipe.batch_size
            chosen_B = state.order_N[first : first + recipe.batch_size]
            x_BCYX = to_unit(train_NCYX[chosen_B.to(device)])

            reconstruction_B, kl_B = elbo_terms(model, x_BCYX, generator)
            warmup = recipe.kl_warmup_epochs * steps_per_epoch
            kl_weight = min(1.0, state.step / warmup) if warmup else 1.0
            loss_B = reconstruction_B + kl_weight * kl_B
            optimizer.zero_grad(set_to_none=True)
            (loss_B.sum() if recipe.reduction == "sum" else loss_B.mean()).backward()
            optimizer.step()

            state.totals += torch.stack([reconstruction_B.detach().sum(), kl_B.detach().sum()])
            state.step += 1
            history.images += len(chosen_B)
            epoch_ends = state.step % steps_per_epoch == 0
            if epoch_ends or state.step % STEPS_PER_REPORT == 0:
                reconstruction, kl = (state.totals / (first + len(chosen_B))).tolist()
                _require_finite(reconstruction + kl, epoch, checkpoint)
                bar.set_postfix_str(f"epoch {epoch + 1}/{epochs}, loss {reconstruction + kl:.1f} nats/image", False)
            history.seconds += time.monotonic() - started
            if epoch_ends:
                history.reconstruction.append(reconstruction)
                history.kl.append(kl)
                validation_reconstruction, validation_kl = validate(model, validation_NCYX)
                history.validation_reconstruction.append(validation_reconstruction)
                history.validation_kl.append(validation_kl)
                state.totals.zero_()
                state.order_N = torch.randperm(count, generator=generator)
            bar.update()
            if checkpoint is not None and time.monotonic() - written >= checkpoint_seconds:
                _require_finite(sum(p.detach().sum() for p in model.parameters()).item(), epoch, checkpoint)
                _save(checkpoint, model, optimizer, generator, state)
                written = time.monotonic()
    _require_finite(sum(p.detach().sum() for p in model.parameters()).item(), epochs - 1, checkpoint)
    model.eval()
    return history


@dataclass
class _State:
    """Where a training run stands, beside the weights, Adam's moments and the generator."""

    order_N: Int64[Tensor, " n"]
    totals: Float[Tensor, " 2"]
    step: int = 0
    history: History = field(default_factory=History)


def _on_cpu(terms: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    return [(reconstruction_B.cpu(), kl_B.cpu()) for reconstruction_B, kl_B in terms]


def _require_finite(value: float, epoch: int, checkpoint: Path | None) -> None:
    if value - value == 0:  # false for NaN and for both infinities
        return
    kept = f"; the last good checkpoint is {checkpoint}" if checkpoint is not None and checkpoint.exists() else ""
    raise TrainingDivergedError(
        f"the loss or a weight is no longer finite in epoch {epoch + 1}: try a smaller learning_rate{kept}"
    )


def _save(path: Path, model: nn.Module, optimizer: torch.optim.Adam, generator: torch.Generator, state: _State) -> None:
    tensors = {f"model/{name}": value for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        tensors |= {f"adam/{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    tensors |= {"generator": generator.get_state(), "order": state.order_N, "totals": state.totals}
    write_tensors(path, tensors, {"step": str(state.step), "history": json.dumps(vars(state.history))})


def _load(path: Path, model: nn.Module, optimizer: torch.optim.Adam, generator: torch.Generator) -> _State:
    tensors, metadata = read_tensors(path)
    model.load_state_dict(
        {name.removeprefix("model/"): value for name, value in tensors.items() if name.startswith("model/")}
    )
    for name, parameter in model.named_parameters():
        # Adam keeps each moment in the memory layout of its weight; the file has them all contiguous.
        optimizer.state[parameter] = {
            "step": tensors[f"adam/step/{name}"].to(parameter.device),
            "exp_avg": torch.empty_like(parameter).copy_(tensors[f"adam/exp_avg/{name}"]),
            "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"adam/exp_avg_sq/{name}"]),
        }
    generator.set_state(tensors["generator"])
    device = next(model.parameters()).device
    return _State(
        order_N=tensors["order"],
        totals=tensors["totals"].to(device),
        step=int(metadata["step"]),
        history=History(**json.loads(metadata["history"])),
    )


def write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
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
