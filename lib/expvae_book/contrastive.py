"""Contrastive divergence: training of one restricted Boltzmann machine, and of a stack from the bottom up.

The gradient of the log-likelihood is a difference between the data and the model,

    ∂ log p(v)/∂θ = -∂F(v)/∂θ + E_model[∂F(v)/∂θ],

and the mean over the model is estimated by samples of visible units after k steps of Gibbs sampling: CD-k starts them
at the data (Hinton 2002), persistent CD where the last step left them (Tieleman 2008). As ∂F/∂θ has the means of the
hidden units in it, these stand in both halves of the gradient; the chains themselves are samples, of hidden and of
visible units (Hinton 2010, Section 3, but for its advice to put the means of visible units into a chain, which then
has another stationary distribution).

Everything lies on the device of the model, chains and noise included. All randomness of a training comes from one
generator on that device, whose state is part of every checkpoint.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor

from expvae.models import (
    ConvRBM,
    Machine,
    Stack,
    hard,
    in_units,
    one_bit_pseudo_log_likelihood,
    require_means,
    visible_values,
)
from expvae_book.checkpoints import State, run_epochs, total_of, weights_of
from expvae_book.recipes import RBMRecipe

VALIDATION_BATCH = 512
MEAN_BOUND = 0.01  # means of units are kept so far from off and on where biases start from them
# Log-odds at which the hidden biases of a convolutional machine start. Most windows see nothing but black; units whose
# mean is zero there let what the machine above is given tell of ink alone. For binary units it is the start that Hinton
# (2010, Section 8) names for sparsity, which a machine with so many hidden units needs (Lee et al. 2009).
FILTER_LOG_ODDS = {"binary": -4.0, "spin": 0.0}
Images = UInt8[Tensor, "..."] | Float[Tensor, "..."]


@dataclass
class History:
    """What a training run measured, one entry per epoch, in nats per image.

    Attributes:
        pseudo_likelihood: Pseudo-log-likelihood of the held-out images, estimated from one unit of each image, the
            same at every epoch.
        free_energy_gap: Mean free energy of the held-out images less that of as many training images; it rises where
            the machine learns the training images by heart (Hinton 2010, Section 6).
        seconds: Time spent training so far, without validation and without what a killed run lost.
        images: Images seen so far.
    """

    pseudo_likelihood: list[float] = field(default_factory=list)
    free_energy_gap: list[float] = field(default_factory=list)
    seconds: float = 0.0
    images: int = 0


@torch.no_grad()
def add_contrast(
    total: dict[str, Tensor],
    model: Machine,
    v: Float[Tensor, "b ..."],
    chain: Float[Tensor, "n ..."] | None,
    steps: int,
    generator: torch.Generator,
) -> Float[Tensor, "n ..."] | None:
    """Add an estimate of the gradient of the mean log-likelihood: slopes at the data less those at samples.

    Args:
        total: What it is added to, in place, for each parameter by name.
        model: The machine.
        v: Visible units of the data.
        chain: Hidden units that the samples start from; None to draw them from the data (CD).
        steps: Steps of Gibbs sampling.
        generator: Source of the samples.

    Returns:
        The hidden units that the chains end with; None for CD.
    """
    fields = model.hidden_fields(v)
    model.add_slopes(total, v, model.activate(fields), 1.0)
    h = chain
    for step in range(steps):
        if chain is None or step > 0:
            h = _hidden_sample(model, fields, generator)
        sample = in_units(hard(model.visible_logits(h), generator), model.units)
        fields = model.hidden_fields(sample)
    model.add_slopes(total, sample, model.activate(fields), -1.0)
    return None if chain is None else _hidden_sample(model, fields, generator)


def _hidden_sample(model: Machine, fields: Tensor, generator: torch.Generator) -> Tensor:
    return in_units(hard(model.step * fields, generator), model.units)


@torch.no_grad()
def start_biases(model: Machine, images: Images) -> None:
    """Set the visible biases to the log-odds of the mean image, or of the mean pixel where pixels share a bias.

    A machine then begins with the right mean, and its hidden units with what is left to learn (Hinton 2010, Section 8).
    The biases of filters are set to FILTER_LOG_ODDS, those of other hidden units to zero.

    Args:
        model: The machine; its weights stay as they are.
        images: Training images, as for `train`.
    """
    _require_means("images", images, model)
    sums = sum(_visible(model, part).sum(0).cpu().double() for part in images.split(VALIDATION_BATCH))
    mean = (sums / len(images)).reshape(len(model.visible_bias), -1).mean(1)
    p = mean if model.units == "binary" else (mean + 1) / 2
    model.visible_bias.copy_(p.clamp(MEAN_BOUND, 1 - MEAN_BOUND).logit() / model.step)
    model.hidden_bias.fill_(FILTER_LOG_ODDS[model.units] / model.step if isinstance(model, ConvRBM) else 0.0)


@torch.no_grad()
def validate(model: Machine, train: Images, validation: Images, seed: int = 0) -> tuple[float, float]:
    """One-bit pseudo-log-likelihood of held-out images, and their free energy less that of as many training images.

    Args:
        model: The machine.
        train: Training images, the first of which are compared.
        validation: Held-out images.
        seed: Fixes the units that are flipped.
    """
    generator = torch.Generator().manual_seed(seed)
    unit_N = torch.randint(validation[0].numel(), (len(validation),), generator=generator).to(validation.device)
    parts = []
    for part, unit_B in zip(validation.split(VALIDATION_BATCH), unit_N.split(VALIDATION_BATCH), strict=True):
        v = _visible(model, part)
        parts.append((one_bit_pseudo_log_likelihood(model, v, unit_B), model.free_energy(v)))
    seen = [model.free_energy(_visible(model, part)) for part in train[: len(validation)].split(VALIDATION_BATCH)]
    likelihood, held_out, seen = (
        torch.cat(values).cpu().double().mean().item() for values in (*zip(*parts, strict=True), seen)
    )
    return likelihood, held_out - seen


def train(
    model: Machine,
    train: Images,
    validation: Images,
    recipe: RBMRecipe,
    *,
    epochs: int,
    seed: int,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
) -> History:
    """Train a machine by contrastive divergence, in place, on the device where it is.

    Every epoch visits each training image once in a new random order; the last batch may be smaller. Where
    `checkpoint` names a file, training starts from what is stored there, and writes to it at least every
    `checkpoint_seconds` and at the end: a run that was killed and started again ends with the weights, bit for bit on
    the CPU, of one that was not. The file must have been written by a call with the same model, data, recipe, epochs
    and seed.

    Args:
        model: The machine.
        train: Training images, as bytes (see expvae.models.visible_values) or as floats that are visible units.
        validation: Held-out images, of the training split, that are only measured.
        recipe: Hyper-parameters; its own number of epochs is not read.
        epochs: Passes over the training images.
        seed: Fixes order and samples.
        checkpoint: A safetensors file, or None to keep nothing.
        checkpoint_seconds: Time between two checkpoints.
        progress: Show a bar with the pseudo-likelihood of held-out images and remaining time.

    Raises:
        TrainingDivergedError: If a weight stops being finite; the checkpoint is the last good one.
        ValueError: If the checkpoint is damaged or of a training with another number of steps, or if images as floats
            are outside [0, 1], or [-1, 1] for spins, or NaN.
        OSError: If a checkpoint cannot be written; the one before it stays.
    """
    device = model.weight.device
    _require_means("train", train, model)
    _require_means("validation", validation, model)
    train, validation = train.to(device), validation.to(device)
    generator, history, weights = torch.Generator(device).manual_seed(seed), History(), weights_of(model)
    velocity = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    others = {f"velocity/{name}": value for name, value in velocity.items()}
    chain = None
    if recipe.persistent:
        # Without hidden units, the first samples are drawn from the visible biases alone.
        others["chain"] = chain = model.weight.new_zeros(recipe.batch_size, *model.hidden_shape)

    @torch.no_grad()
    def step(chosen_B: Int64[Tensor, " b"], epoch: float) -> None:
        v = _visible(model, train[chosen_B])
        for name, change in velocity.items():
            change.mul_(recipe.momentum)
            if name == "weight" and recipe.weight_decay:
                change.sub_(model.weight, alpha=recipe.weight_decay / model.rates["weight"])
        end = add_contrast(velocity, model, v, chain, recipe.steps, generator)
        if chain is not None:
            chain.copy_(end)
        rate = recipe.learning_rate * (1 - epoch / epochs if recipe.decay else 1.0)
        for name, parameter in model.named_parameters():
            parameter.add_(velocity[name], alpha=rate * model.rates[name])
        history.images += len(v)

    def report(seen: int) -> tuple[float, str]:
        return total_of(weights), f"pseudo-likelihood {(history.pseudo_likelihood or [math.nan])[-1]:.1f}"

    def end_epoch() -> None:
        likelihood, gap = validate(model, train, validation)
        history.pseudo_likelihood.append(likelihood)
        history.free_energy_gap.append(gap)

    run_epochs(
        State(weights, others, [generator], [history], scheduled=True),
        len(train),
        recipe.batch_size,
        epochs,
        step,
        report,
        end_epoch,
        checkpoint=checkpoint,
        checkpoint_seconds=checkpoint_seconds,
        progress=progress,
        keep_last=True,
    )
    return history


def train_stack(
    stack: Stack,
    train_NCYX: UInt8[Tensor, "n c y x"],
    validation_NCYX: UInt8[Tensor, "m c y x"],
    recipe: RBMRecipe,
    *,
    epochs: int,
    seed: int,
    checkpoint: Path | None = None,
    checkpoint_seconds: float = 60.0,
    progress: bool = True,
) -> list[History]:
    """Train the machines of a stack one after the other, from the bottom up, in place.

    The images of each machine are the means of the hidden units of the one below, computed once, when that one is
    trained (Hinton & Salakhutdinov 2006); they are what `Stack.encode` passes up as well. Its visible biases start at
    their mean, see `start_biases`.

    Args:
        stack: The stack, on the device that is to train.
        train_NCYX: Training images.
        validation_NCYX: Held-out images, of the training split, that are only measured.
        recipe: Hyper-parameters of every machine; its own number of epochs is not read.
        epochs: Passes over the training images for every machine.
        seed: Fixes order and samples.
        checkpoint: Path of the checkpoints, of which each machine has its own, with its number appended to the name;
            None to keep nothing. Machines whose training is complete there are only read. See `train` for what is
            asked of them.
        checkpoint_seconds: Time between two checkpoints.
        progress: Show a bar for each machine.

    Returns:
        What the training of each machine measured.

    Raises:
        TrainingDivergedError: If a weight stops being finite.
        ValueError: If a checkpoint is damaged or of a training with another number of steps.
    """
    device = next(stack.parameters()).device
    given: list[Tensor] = [train_NCYX.to(device), validation_NCYX.to(device)]
    histories = []
    for index, layer in enumerate(stack.layers):
        start_biases(layer, given[0])
        histories.append(
            train(
                layer,
                *given,
                recipe,
                epochs=epochs,
                seed=seed,
                checkpoint=checkpoint and checkpoint.with_name(f"{checkpoint.name}{index}"),
                checkpoint_seconds=checkpoint_seconds,
                progress=progress,
            )
        )
        if index + 1 < len(stack.layers):
            given = [_means(layer, images) for images in given]
    return histories


def _require_means(name: str, images: Images, model: Machine) -> None:
    if images.dtype != torch.uint8:
        require_means(name, images, model.units)


def _visible(model: Machine, images: Images) -> Tensor:
    values = visible_values(images, model.units) if images.dtype == torch.uint8 else images
    return values.reshape(-1, *model.visible_shape)


@torch.no_grad()
def _means(model: Machine, images: Images) -> Tensor:
    """Means of the hidden units given the images."""
    return torch.cat([model.activate(model(_visible(model, part))) for part in images.split(VALIDATION_BATCH)])
