"""The one loop that trains every VAE of the book.

The training set sits in memory as uint8, on the device that trains; batches are gathered there, so that no worker
process, no decoding and no copy stands between two steps. All randomness (order of the images, noise of the
latents) comes from one generator on that device, whose state is part of every checkpoint; initial weights are drawn on
the CPU, so that a seed names one network everywhere.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from expvae import elbo_terms
from expvae_book import devices
from expvae_book.checkpoints import State, adam, run_epochs, weights_of
from expvae_book.recipes import Recipe

VALIDATION_BATCH = 512

# Changes images in [0, 1] at random, by a generator on their device.
Vary = Callable[[Float[Tensor, "b c y x"], torch.Generator], Float[Tensor, "b c y x"]]

# Networks that are trained channel by channel. All others are faster pixel by pixel (channels-last): images/s on one
# thread of a processor with AVX512_BF16 in float32 and bfloat16, MVTec 3.4 → 3.9 and 3.0 → 3.2, UCSD (batch 32)
# 27.4 → 31.1 and 19.6 → 19.5; on one with faster units for bfloat16, MNIST 811 → 1 285 in that and UCSD 48 → 43.
CHANNELS_FIRST = {("UCSDVAE", "bfloat16")}


@dataclass
class History:
    """What a training run measured, one entry per epoch; losses are means over images, in nats.

    Attributes:
        reconstruction: Training reconstruction loss, -log p(x|z) summed over pixels, or a model's own (see
            `expvae.elbo_terms`).
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


def to_unit(x_BCYX: UInt8[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
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
    generator = torch.Generator(x_NCYX.device).manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            terms = [elbo_terms(model, to_unit(x_BCYX), generator) for x_BCYX in x_NCYX.split(VALIDATION_BATCH)]
    finally:
        model.train(was_training)
    reconstruction, kl = (torch.cat(parts).cpu().double().mean().item() for parts in zip(*terms, strict=True))
    return reconstruction, kl


def train(
    model: nn.Module,
    train_NCYX: UInt8[Tensor, "n c y x"],
    validation_NCYX: UInt8[Tensor, "m c y x"],
    recipe: Recipe,
    *,
    epochs: int,
    seed: int,
    precision: str = "float32",
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    keep_last: bool = False,
    vary: Vary | None = None,
    progress: bool = True,
) -> History:
    """Minimise reconstruction loss + β KL, for β = 1 the negative ELBO, with Adam, in place, where the model is.

    Every epoch visits each training image once in a new random order; the last batch may be smaller. Where
    `checkpoint` names a file, training starts from what is stored there, and writes to it at least every
    `checkpoint_seconds`: a run that was killed and started again ends with the weights, bit for bit on the CPU, of
    one that was not, and more epochs go on from fewer. The file must have been written by a call with the same model,
    data, recipe and seed.

    Args:
        model: A module as `expvae.elbo_terms` takes it.
        train_NCYX: Training images.
        validation_NCYX: Held-out images, of the training split, that are only measured.
        recipe: Hyper-parameters; its own number of epochs is not read.
        epochs: Passes over the training images.
        seed: Fixes order and noise.
        precision: "float32", or "bfloat16" for automatic mixed precision (`expvae_book.devices.mixed`).
        checkpoint: A safetensors file, or None to keep nothing.
        checkpoint_seconds: Time between two checkpoints.
        keep_last: Whether the checkpoint is to hold the end as well, for more epochs to go on from.
        vary: Changes the training images of each batch at random, with the generator of the training, such as
            `expvae_book.augmentation.turned_at_load`.
        progress: Show a bar with loss and remaining time.

    Raises:
        TrainingDivergedError: If the loss or a weight stops being finite; the checkpoint is the last good one.
        ValueError: If the checkpoint is damaged or of a training with another number of steps.
        OSError: If a checkpoint cannot be written; the one before it stays.
    """
    device = next(model.parameters()).device
    first = (type(model).__name__, precision) in CHANNELS_FIRST
    model.to(memory_format=torch.contiguous_format if first else torch.channels_last).train()
    train_NCYX, validation_NCYX = train_NCYX.to(device), validation_NCYX.to(device)
    generator, history = torch.Generator(device).manual_seed(seed), History()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer, moments = adam(trained, lr=recipe.learning_rate, betas=recipe.betas, eps=recipe.epsilon)
    totals = torch.zeros(2, device=device)  # of reconstruction and KL in this epoch

    def step(chosen_B: Int64[Tensor, " b"], epoch: float) -> None:
        x_BCYX = to_unit(train_NCYX[chosen_B])
        if vary:
            x_BCYX = vary(x_BCYX, generator)
        with devices.mixed(precision, device):
            reconstruction_B, kl_B = elbo_terms(model, x_BCYX, generator)
        warmth = min(1.0, epoch / recipe.kl_warmup_epochs) if recipe.kl_warmup_epochs else 1.0
        loss_B = reconstruction_B + recipe.beta * warmth * kl_B
        optimizer.zero_grad(set_to_none=True)
        (loss_B.sum() if recipe.reduction == "sum" else loss_B.mean()).backward()
        optimizer.step()
        totals.add_(torch.stack([reconstruction_B.detach().sum(), kl_B.detach().sum()]))
        history.images += len(chosen_B)

    def report(seen: int) -> tuple[float, str]:
        loss = totals.sum().item() / seen
        return loss, f"loss {loss:.1f}"

    def end_epoch() -> None:
        with devices.mixed(precision, device):
            measured = validate(model, validation_NCYX)
        names = ("reconstruction", "kl", "validation_reconstruction", "validation_kl")
        for name, value in zip(names, (*(totals / len(train_NCYX)).tolist(), *measured), strict=True):
            getattr(history, name).append(value)
        totals.zero_()

    run_epochs(
        State(weights_of(model), moments | {"totals": totals}, [generator], [history]),
        len(train_NCYX),
        recipe.batch_size,
        epochs,
        step,
        report,
        end_epoch,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        keep_last=keep_last,
        progress=progress,
    )
    model.eval()
    return history
