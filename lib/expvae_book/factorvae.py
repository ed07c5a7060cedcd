"""β-VAE, FactorVAE and AD-FactorVAE: their losses, and one loop that trains many of them side by side.

    L = reconstruction + β KL + γ TC + λ L_AD                              (means over the images of a batch, in nats)

With γ = λ = 0 that is β-VAE, with γ > 0 FactorVAE (Kim & Mnih 2018), with λ > 0 AD-FactorVAE (Liu et al. 2020, eq. 7).
Suffixes of tensor names as in expvae.attention, and M models side by side, K maps that are paired.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn

from expvae import kl_divergence, permute_latents, reconstruction_loss
from expvae.models import DSpritesVAE, discriminator
from expvae_book import devices, protocols, weights
from expvae_book.checkpoints import State, adam, run, weights_of
from expvae_book.factorvae_losses import SIDE, VARIANTS, AttentionPenalty, attention_loss, discriminate
from expvae_book.recipes import StepRecipe
from expvae_book.side_by_side import SideBySide
from expvae_book.training import build

Draw = Callable[[Int64[Tensor, " b"]], UInt8[Tensor, "b 1 64 64"]]

KIND = "FactorVAE"  # in the names of the files of the cache
POINTS = 100  # of each curve of losses


@dataclass(frozen=True)
class Candidate:
    """One model of a grid: the weights of its loss, and its seed.

    Attributes:
        beta: Weight β of the KL term.
        gamma: Weight γ of the total correlation.
        attention_weight: Weight λ of L_AD.
        seed: Fixes initial weights, images, noise, permutations and random pairs.
        penalty: Which L_AD.
        detached: Whether the discriminator's loss is kept from the VAE. Published code lets its gradient through, which
            adds to the VAE's own and works against γ.
    """

    beta: float = 1.0
    gamma: float = 0.0
    attention_weight: float = 0.0
    seed: int = 0
    penalty: AttentionPenalty = VARIANTS["liu2020"]
    detached: bool = True

    def __post_init__(self):
        for name in ("beta", "gamma", "attention_weight"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")


@dataclass
class Curves:
    """What training measured of one model: means over the steps up to each entry of `step`, in nats.

    Attributes:
        step: Steps done at each entry.
        reconstruction: -log p(x|z) per image.
        kl: KL(q(z|x) || p(z)) per image.
        total_correlation: The discriminator's estimate of TC.
        discriminator: The discriminator's own loss.
        attention: L_AD; empty where λ is 0.
        measured: What `measure` of `train` returned, by step.
        seconds: Time of the training of all models that stood side by side, without what a killed run lost.
        beside: How many models stood side by side.
    """

    step: list[int] = field(default_factory=list)
    reconstruction: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    total_correlation: list[float] = field(default_factory=list)
    discriminator: list[float] = field(default_factory=list)
    attention: list[float] = field(default_factory=list)
    measured: dict[str, dict[str, float]] = field(default_factory=dict)
    seconds: float = 0.0
    beside: int = 1


@dataclass(frozen=True)
class Trained:
    """A trained model and how it came about.

    Attributes:
        candidate: What it is.
        vae: The VAE, in evaluation mode.
        discriminator: The discriminator.
        curves: What the training measured.
        key: Digest of everything that determines the weights.
        file: Name of their file in the cache.
        device: The device that trained them.
        steps: Steps that made them.
        steps_asked: Those asked for; there are fewer where the training was told to end early.
    """

    candidate: Candidate
    vae: DSpritesVAE
    discriminator: nn.Sequential
    curves: Curves
    key: str
    file: str
    device: str
    steps: int = 0
    steps_asked: int = 0


class Group(nn.Module):
    """Models that stand side by side: all have the same penalty or none, and all have a discriminator or none.

    Attributes:
        candidates: What each of them is.
        encoder: Their encoders as one network.
        decoder: Their decoders.
        discriminator: Their discriminators.
        optimizer: Of encoder and decoder.
        discriminator_optimizer: Of the discriminators.
        moments: Of both optimizers, by name.
        generators: The source of each model's randomness, on their device; initial weights are drawn on the CPU.
        beta_M: β of each.
        gamma_M: γ of each.
        attention_weight_M: λ of each.

    Args:
        candidates: What they are; their seeds give the initial weights.
        recipe: Number of latents, and settings of the optimizers.
        device: Where they are.
    """

    def __init__(self, candidates: Sequence[Candidate], recipe: StepRecipe, device: torch.device):
        super().__init__()
        self.candidates, self.latent_dim, self.device = candidates, recipe.latent_dim, device
        vaes = [build(lambda: DSpritesVAE(recipe.latent_dim), one.seed) for one in candidates]
        self.encoder = SideBySide([vae.encoder for vae in vaes]).to(device)
        self.decoder = SideBySide([vae.decoder for vae in vaes]).to(device)
        self.optimizer, moments = adam(dict(self.named_parameters()), lr=recipe.learning_rate, betas=recipe.betas)
        discriminators = [build(lambda: discriminator(recipe.latent_dim), one.seed) for one in candidates]
        self.discriminator = SideBySide(discriminators).to(device)
        self.discriminator_optimizer, others = adam(
            dict(self.discriminator.named_parameters()), lr=recipe.critic_learning_rate, betas=recipe.critic_betas
        )
        self.moments = moments | others
        self.generators = [torch.Generator(device).manual_seed(one.seed) for one in candidates]
        self.beta_M, self.gamma_M, self.attention_weight_M = (
            torch.tensor([getattr(one, name) for one in candidates], device=device)
            for name in ("beta", "gamma", "attention_weight")
        )

    def parts(self) -> list[str]:
        """Names of the parts of its losses, as `step` gives them."""
        one = self.candidates[0]
        attention = ["attention"] if one.attention_weight > 0 else []
        return ["reconstruction", "kl", *attention, *(["total_correlation", "discriminator"] if one.gamma > 0 else [])]

    def alone(self, index: int) -> dict[str, Tensor]:
        """The weights of one of the models, VAE and discriminator."""
        return {
            f"{name}.{key}": value
            for name, network in self.named_children()
            for key, value in network.alone(index).items()
        }

    def vae(self, index: int) -> DSpritesVAE:
        """One of the VAEs alone, in evaluation mode."""
        return _loaded(DSpritesVAE(self.latent_dim), self.alone(index)).to(self.device)


def _loaded(network: nn.Module, tensors: Mapping[str, Tensor], prefix: str = "") -> Any:
    """The network in evaluation mode, with its weights out of those of a model."""
    network.load_state_dict({name: tensors[f"{prefix}{name}"] for name in network.state_dict()})
    return network.eval()


def _encoded(
    group: Group, x_BMYX: Tensor, noise_MBI: Tensor, layer: str | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The output of the layer, or the images for None, and the means, log-variances and samples of the latents."""
    A_BMCHW, hidden = group.encoder.through(x_BMYX, layer)
    mu_MBI, logvar_MBI = hidden.float().reshape(*A_BMCHW.shape[:2], -1).transpose(0, 1).chunk(2, dim=2)
    return A_BMCHW, mu_MBI, logvar_MBI, mu_MBI + (0.5 * logvar_MBI).exp() * noise_MBI


def losses(
    group: Group,
    x_BMYX: Float[Tensor, "b m 64 64"],
    noise_MBI: Float[Tensor, "m b i"],
    random_M2: Int64[Tensor, "m 2"],
) -> tuple[dict[str, Float[Tensor, " m"]], Float[Tensor, "m b i"]]:
    """The parts of the loss of each model of a group that come from its VAE, for one batch of images.

    Returns:
        The parts, [M] each, and the samples of the latents, for the discriminator.
    """
    one = group.candidates[0]
    penalised = one.attention_weight > 0
    A_BMCHW, mu_MBI, logvar_MBI, z_MBI = _encoded(group, x_BMYX, noise_MBI, one.penalty.layer if penalised else None)
    logits_BMYX = group.decoder(z_MBI.transpose(0, 1).reshape(len(x_BMYX), -1, 1, 1)).float()
    m, b = len(mu_MBI), len(x_BMYX)
    pixels = (logits_BMYX.transpose(0, 1).reshape(m * b, 1, SIDE, SIDE), x_BMYX.transpose(0, 1))
    parts = {
        "reconstruction": reconstruction_loss(pixels[0], pixels[1].reshape(m * b, 1, SIDE, SIDE)).view(m, b).mean(1),
        "kl": kl_divergence(mu_MBI.flatten(0, 1), logvar_MBI.flatten(0, 1)).sum(1).view(m, b).mean(1),
    }
    if penalised:
        parts["attention"] = attention_loss(A_BMCHW, mu_MBI, z_MBI, one.penalty, random_M2)
    return parts, z_MBI


def step(group: Group, draw: Draw, train_N: Int64[Tensor, " n"], batch_size: int, precision: str) -> dict[str, Tensor]:
    """One step of every model of a group: all losses by the same weights, then Adam on VAEs and discriminators.

    Returns:
        The parts of the loss, [M] each.
    """
    device, latent_dim = group.device, group.latent_dim
    indices, noises, orders, randoms = [], [], [], []
    for generator in group.generators:
        drawn = {"generator": generator, "device": device}
        indices.append(torch.randint(len(train_N), (2 * batch_size,), **drawn))
        noises.append(torch.randn(2, batch_size, latent_dim, **drawn))
        orders.append(torch.rand(batch_size, latent_dim, **drawn).argsort(0))
        randoms.append(torch.randint(latent_dim, (2,), **drawn))
    # [2·B, M] so that one image of each model lies in one row: the channels of a grouped convolution.
    chosen = train_N[torch.stack(indices, 1).flatten()]
    x = draw(chosen).to(device).float().view(2, batch_size, len(group.candidates), SIDE, SIDE)
    noise_2MBI, order_MBI, random_M2 = torch.stack(noises, 1), torch.stack(orders), torch.stack(randoms)
    with devices.mixed(precision, device):
        parts, z_MBI = losses(group, x[0], noise_2MBI[0], random_M2)
        if group.candidates[0].gamma > 0:
            with torch.no_grad():
                permuted_MBI = permute_latents(_encoded(group, x[1], noise_2MBI[1], None)[3], order_MBI)
            judged = discriminate(group.discriminator, z_MBI, permuted_MBI)
    total_M = parts["reconstruction"] + group.beta_M * parts["kl"]
    if "attention" in parts:
        total_M = total_M + group.attention_weight_M * parts["attention"]
    outputs, toward = [total_M.sum()], [None]
    if group.candidates[0].gamma > 0:
        parts["total_correlation"], parts["discriminator"] = judged.total_correlation_M, judged.loss_M
        toward_latents_MBI = group.gamma_M[:, None, None] * judged.toward_latents_MBI
        if not group.candidates[0].detached:
            toward_latents_MBI = toward_latents_MBI + judged.leaked_MBI
        outputs.append(z_MBI)
        toward.append(toward_latents_MBI)
        _apply(group.discriminator_optimizer, judged.gradients)
    _apply(group.optimizer, torch.autograd.grad(outputs, group.optimizer.param_groups[0]["params"], toward))
    return {name: part.detach() for name, part in parts.items()}


def _apply(optimizer: torch.optim.Adam, gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(optimizer.param_groups[0]["params"], gradients, strict=True):
        # The fused Adam walks through both in the order of memory, whatever their strides say.
        same = parameter.stride() == gradient.stride()
        parameter.grad = gradient if same else torch.empty_like(parameter).copy_(gradient)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def grouped(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """Candidates that can stand side by side: with the same penalty or none, and with a discriminator or without."""
    groups: dict[tuple, list[Candidate]] = {}
    for one in candidates:
        penalty = one.penalty if one.attention_weight > 0 else None
        groups.setdefault((penalty, one.gamma > 0, one.detached), []).append(one)
    return list(groups.values())


def train(
    candidates: Sequence[Candidate],
    draw: Draw,
    train_N: Int64[Tensor, " n"],
    recipe: StepRecipe,
    *,
    steps: int,
    device: torch.device,
    precision: str = "float32",
    data_digest: str,
    measure: Callable[[DSpritesVAE], Mapping[str, float]] | None = None,
    measurements: int = 0,
    progress: bool = True,
) -> list[Trained]:
    """Train every candidate; those that can stand side by side do, in one process and under one bar.

    Each candidate draws its images (with replacement), noise, permutations and random pairs from a generator of its
    own, so that it ends with the weights that it would have alone, to rounding. Trained weights lie in the cache
    (expvae_book.weights), one file for each candidate; what stands there is not trained again. A group that is killed
    goes on from its checkpoint, and ends, on the CPU, with the same weights to the last bit. One that is told to end
    early (see `expvae_book.checkpoints`) gives and keeps what there is by then, under keys of its own, and goes on when
    it is asked for again. Where the cache cannot be written, models are trained without, and a line on stderr says so.

    Args:
        candidates: What to train.
        draw: Gives the images of indices, with values 0 and 1.
        train_N: Indices of the training images.
        recipe: Hyper-parameters that all candidates share; its own number of steps is not read.
        steps: Steps for each candidate.
        device: Where to train.
        precision: "float32", or "bfloat16" for the products of both passes, or "auto"; see
            `expvae_book.devices.choose_precision`.
        data_digest: Digest of the images, as in their data card.
        measure: Called with each VAE, in evaluation mode, on a schedule; what it returns is kept in the curves.
        measurements: How often it is called, at equal distances, the last time after the last step.
        progress: Show a bar with loss and remaining time.

    Raises:
        TrainingDivergedError: If a loss stops being finite.
        ValueError: If two candidates are equal, the precision is unknown, or a file of the cache is damaged.
        OSError: If the disk is full; the last checkpoint stays.
    """
    if len(set(candidates)) < len(candidates):
        raise ValueError("candidates must differ from each other; two are equal")
    precision = devices.choose_precision(precision, device)
    shared = {
        "steps": steps,
        "precision": precision,
        "data": data_digest,
        "train": weights.tensor_digest(train_N),
        "measurements": measurements,
        "file": 2,  # how weights are named in it
    }

    def key_of(one: Candidate, **ended: int) -> str:
        return weights.key_of(recipe, protocols.FACTORVAE, candidate=dataclasses.asdict(one), **shared, **ended)

    keys = {one: key_of(one) for one in candidates}
    present = [one for one in candidates if weights.there(weights.place(KIND, keys[one]))]
    entries = {one: weights.Entry.read(weights.place(KIND, keys[one])) for one in present}
    for members in grouped([one for one in candidates if one not in entries]):

        def fit(checkpoint: Path | None, members: Sequence[Candidate] = members) -> list[tuple[str, dict, Any]]:
            group = Group(members, recipe, device)
            take = partial(step, group, draw, train_N.to(device), recipe.batch_size, precision)
            histories = _train_group(group, take, steps, measure, measurements, checkpoint, progress)
            done = histories[0].step[-1]
            ended = {} if done == steps else {"ended": done}
            return [
                (key_of(one, **ended), group.alone(index), vars(curves))
                for index, (one, curves) in enumerate(zip(members, histories, strict=True))
            ]

        made, _ = weights.cached(KIND, [keys[one] for one in members], device, fit)
        entries |= dict(zip(members, made, strict=True))
    return [_trained(one, steps, entries[one], recipe.latent_dim, device) for one in candidates]


def _train_group(
    group: Group,
    take: Callable[[], dict[str, Tensor]],
    steps: int,
    measure: Callable[[DSpritesVAE], Mapping[str, float]] | None,
    measurements: int,
    checkpoint: Path | None,
    progress: bool,
) -> list[Curves]:
    """Train a group by so many calls of `take`; returns what was measured of each model."""
    count = len(group.candidates)
    curves = [Curves(beside=count) for _ in group.candidates]
    totals = {name: torch.zeros(count, device=group.device) for name in group.parts()}
    state = State(
        weights_of(group),
        group.moments | {f"totals/{name}": total for name, total in totals.items()},
        group.generators,
        curves,
        steps,
        scheduled=True,
    )
    per_point = max(1, steps // POINTS)
    due = {round(steps * (i + 1) / measurements) for i in range(measurements)} if measure else set()

    def add() -> None:
        for name, part in take().items():
            totals[name] += part

    def report() -> tuple[float, str] | None:
        since = state.done % per_point
        if since and state.done < steps:
            return None
        for name, total in totals.items():
            for curve, mean in zip(curves, (total / (since or per_point)).tolist(), strict=True):
                getattr(curve, name).append(mean)
            total.zero_()
        for curve in curves:
            curve.step.append(state.done)
        worst = max(curve.reconstruction[-1] + curve.kl[-1] for curve in curves)
        of_all = sum(getattr(curve, name)[-1] for curve in curves for name in totals)
        return of_all, f"{count} side by side, loss {worst:.1f} nats/image"

    def score() -> None:
        for index, curve in enumerate(curves if state.done in due else []):
            curve.measured[str(state.done)] = dict(measure(group.vae(index)))

    run(
        state,
        add,
        report,
        score,
        checkpoint=checkpoint,
        checkpoint_seconds=weights.CHECKPOINT_SECONDS,
        progress=progress,
        complete=lambda: state.done % per_point == 0,
    )
    if due and state.done < steps:  # what an early end leaves, is measured; the checkpoint is of before that
        due.add(state.done)
        score()
    return curves


def _trained(one: Candidate, asked: int, entry: weights.Entry, latent_dim: int, device: torch.device) -> Trained:
    """A model and how it came about, from what the cache holds."""
    vae = _loaded(DSpritesVAE(latent_dim), entry.tensors).to(device)
    network = _loaded(discriminator(latent_dim), entry.tensors, "discriminator.").to(device)
    curves, file = Curves(**entry.history), weights.place(KIND, entry.key).name
    return Trained(one, vae, network, curves, entry.key, file, entry.device, curves.step[-1], asked)
