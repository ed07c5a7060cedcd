"""β-VAE, FactorVAE and AD-FactorVAE: their losses, and one loop that trains many of them side by side.

    L = reconstruction + β KL + γ TC + λ L_AD                              (means over the images of a batch, in nats)

With γ = λ = 0 that is β-VAE, with γ > 0 FactorVAE (Kim & Mnih 2018), with λ > 0 AD-FactorVAE (Liu et al. 2020, eq. 7).

Suffixes of tensor names as in expvae.attention, and M models side by side, K maps that are paired.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor
from tqdm import tqdm

from expvae import PRESETS as MAPS
from expvae import (
    Method,
    discriminator_loss,
    kl_divergence,
    overlap,
    permute_latents,
    reconstruction_loss,
    total_correlation,
    upsample,
)
from expvae.models import DSPRITES_LAYERS, DSpritesVAE, SideBySide, discriminator
from expvae_book import devices, protocols, weights
from expvae_book.recipes import StepRecipe
from expvae_book.training import TrainingDivergedError, build, read_tensors, write_tensors

Pairs = Literal["consecutive", "all", "random"]
Alpha = Literal["second_order", "constant"]
Draw = Callable[[Int64[Tensor, " b"]], UInt8[Tensor, "b 1 64 64"]]
Stored = tuple[dict[str, Tensor], dict[str, str]]  # what the file of a model holds: tensors and metadata

SIDE = 64  # of the images
POINTS = 100  # of each curve of losses
CHECKPOINT_SECONDS = 60.0


@dataclass(frozen=True)
class AttentionPenalty:
    """The choices that separate the published variants of the attention disentanglement loss L_AD.

    Attributes:
        layer: The layer whose maps are compared, one of DSPRITES_LAYERS.
        method: How a map is made; its score must be "each_mean" or "each_sample", and it has no normaliser.
        pairs: Which maps of an image are compared: "consecutive" pairs (1st, 2nd), (2nd, 3rd) … of those with the
            highest response, as the second report describes; "all" pairs of these; or two latents at "random", with
            replacement, the same for all images of a step (Brongers et al.).
        maps: How many of the highest there are; 2 are one pair.
        alpha: Whether the gradient of the loss takes the channels' weights α, which are gradients themselves, as
            functions of the parameters ("second_order") or as "constant".
        enlarged: Whether maps are compared at the images' resolution instead of the layer's.
        per_batch: Whether the mean over the images is divided by their number once more.

    Raises:
        ValueError: If a choice is unknown or does not fit the others.
    """

    layer: str = "conv4"
    method: Method = MAPS["liu2020_paper"]
    pairs: Pairs = "consecutive"
    maps: int = 2
    alpha: Alpha = "second_order"
    enlarged: bool = False
    per_batch: bool = False

    def __post_init__(self):
        choices = {"layer": DSPRITES_LAYERS, "pairs": get_args(Pairs), "alpha": get_args(Alpha)}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of: {', '.join(allowed)}")
        if self.maps < 2:
            raise ValueError(f"maps={self.maps} must be 2 or more, to make a pair")
        method = self.method
        fits = method.score in ("each_mean", "each_sample") and method.tensor != "after" and method.normaliser == "none"
        if not (fits and method.channels in ("relu_of_sum", "sum_of_relu")):
            raise ValueError(
                "method must have score each_mean or each_sample, tensor before or mixed, normaliser none and channels "
                f"relu_of_sum or sum_of_relu; got {method}"
            )


# What was published of it. The paper prints the formula and neither layer nor pairs; conv4 is the last layer whose maps
# have more than one position. The second report says "the last convolutional layer", pairs maps consecutively with four
# in its example, and does not say whether α is constant.
VARIANTS = {
    "liu2020": AttentionPenalty(),
    "report2": AttentionPenalty(maps=4),
    "brongers2021": AttentionPenalty(
        layer="conv1",
        method=MAPS["brongers2021_disentanglement"],
        pairs="random",
        alpha="constant",
        enlarged=True,
        per_batch=True,
    ),
}


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
    """A trained VAE in evaluation mode, its discriminator, and how they came about; `file` is theirs in the cache."""

    candidate: Candidate
    vae: DSpritesVAE
    critic: torch.nn.Sequential
    curves: Curves
    key: str
    file: str
    device: str


# --- losses -------------------------------------------------------------------------------------------------------


def attention_maps(
    A_BMCHW: Float[Tensor, "b m c h w"], latents_MBI: Float[Tensor, "m b i"], penalty: AttentionPenalty, graph: bool
) -> Float[Tensor, "m b i h w"]:
    """The maps that L_AD compares of every latent given, at the layer's resolution (see expvae.attention).

    Args:
        A_BMCHW: The layer's output, before its ReLU.
        latents_MBI: Latents that depend on it, each of one image.
        penalty: How the maps are made.
        graph: Whether they can be differentiated in turn, with α as the penalty has it.
    """
    values_BMCHW = A_BMCHW.relu() if penalty.method.tensor == "mixed" else A_BMCHW
    second_order = graph and penalty.alpha == "second_order"
    maps = []
    for latent_MB in latents_MBI.unbind(2):
        (gradient,) = torch.autograd.grad(latent_MB.sum(), A_BMCHW, retain_graph=True, create_graph=second_order)
        alpha_BMC11 = gradient.float().mean((3, 4), keepdim=True)
        weighted_BMCHW = (alpha_BMC11 if second_order else alpha_BMC11.detach()) * values_BMCHW.float()
        if penalty.method.channels == "relu_of_sum":
            maps.append(weighted_BMCHW.sum(2).relu())
        else:
            maps.append(weighted_BMCHW.relu().sum(2))
    return torch.stack(maps, 2).transpose(0, 1)


def attention_loss(
    A_BMCHW: Float[Tensor, "b m c h w"],
    mu_MBI: Float[Tensor, "m b i"],
    z_MBI: Float[Tensor, "m b i"],
    penalty: AttentionPenalty,
    random_M2: Int64[Tensor, "m 2"],
) -> Float[Tensor, " m"]:
    """L_AD of each model: the AD ratio of pairs of maps, mean over pairs and images.

    Args:
        A_BMCHW: Output of the penalty's layer, before its ReLU.
        mu_MBI: Means of the latents, which depend on it.
        z_MBI: Samples of the latents, likewise.
        penalty: Which maps, and which pairs.
        random_M2: The two latents that are compared where pairs are "random".

    Raises:
        ValueError: If there are fewer latents than the penalty compares.
    """
    latents_MBI = mu_MBI if penalty.method.score == "each_mean" else z_MBI
    count, images, latent_dim = latents_MBI.shape
    if penalty.maps > latent_dim:
        raise ValueError(f"maps={penalty.maps} is more than the {latent_dim} latents there are")
    if penalty.pairs == "random":
        chosen_MBK = random_M2[:, None].expand(-1, images, -1)
    elif penalty.maps == latent_dim and penalty.pairs == "all":
        chosen_MBK = torch.arange(latent_dim, device=mu_MBI.device).expand(count, images, -1)
    else:
        response_MBI = attention_maps(A_BMCHW, latents_MBI, penalty, graph=False).detach().mean((3, 4))
        chosen_MBK = response_MBI.topk(penalty.maps, dim=2).indices
    # The k-th latent of each image is a latent of its own kind, so that one backward pass serves all images.
    maps_MBKHW = attention_maps(A_BMCHW, latents_MBI.gather(2, chosen_MBK), penalty, graph=True)
    if penalty.enlarged:
        enlarged_BKYX = upsample(maps_MBKHW.flatten(0, 1), (SIDE, SIDE), penalty.method.align_corners)
        maps_MBKHW = enlarged_BKYX.unflatten(0, (count, images))
    k = maps_MBKHW.shape[2]
    pairs = list(combinations(range(k), 2)) if penalty.pairs == "all" else [(i, i + 1) for i in range(k - 1)]
    first, second = (list(indices) for indices in zip(*pairs, strict=True))
    loss_M = overlap(maps_MBKHW[:, :, first], maps_MBKHW[:, :, second]).mean((1, 2))
    return loss_M / images if penalty.per_batch else loss_M


# --- training -----------------------------------------------------------------------------------------------------


@dataclass
class Group:
    """Models that stand side by side: all have the same penalty or none, and all have a discriminator or none.

    Attributes:
        candidates: What each of them is.
        encoder: Their encoders as one network.
        decoder: Their decoders.
        critic: Their discriminators.
        optimizers: Of encoder and decoder, and of the discriminators.
        generators: The source of each model's randomness, on the CPU.
        weights: β, γ and λ of each, by their names in Candidate.
    """

    candidates: Sequence[Candidate]
    encoder: SideBySide
    decoder: SideBySide
    critic: SideBySide
    optimizers: tuple[torch.optim.Adam, torch.optim.Adam]
    generators: list[torch.Generator]
    weights: dict[str, Float[Tensor, " m"]]

    @classmethod
    def made(cls, candidates: Sequence[Candidate], recipe: StepRecipe, device: torch.device) -> "Group":
        """A group with the initial weights of its candidates' seeds."""
        vaes = [build(lambda: DSpritesVAE(recipe.latent_dim), one.seed) for one in candidates]
        critics = [build(lambda: discriminator(recipe.latent_dim), one.seed) for one in candidates]
        encoder = SideBySide([vae.encoder for vae in vaes]).to(device)
        decoder = SideBySide([vae.decoder for vae in vaes]).to(device)
        critic = SideBySide(critics).to(device)
        vae_parameters = [*encoder.parameters(), *decoder.parameters()]
        optimizers = (
            torch.optim.Adam(vae_parameters, lr=recipe.learning_rate, betas=recipe.betas, fused=True),
            torch.optim.Adam(
                critic.parameters(), lr=recipe.critic_learning_rate, betas=recipe.critic_betas, fused=True
            ),
        )
        names = ("beta", "gamma", "attention_weight")
        return cls(
            candidates,
            encoder,
            decoder,
            critic,
            optimizers,
            [torch.Generator().manual_seed(one.seed) for one in candidates],
            {name: torch.tensor([getattr(one, name) for one in candidates], device=device) for name in names},
        )

    def networks(self) -> dict[str, SideBySide]:
        """All of it that has weights, by name."""
        return {"encoder": self.encoder, "decoder": self.decoder, "critic": self.critic}

    def vae(self, index: int, latent_dim: int) -> DSpritesVAE:
        """One of the VAEs alone, in evaluation mode."""
        vae = DSpritesVAE(latent_dim).to(next(self.encoder.parameters()).device)
        vae.encoder.load_state_dict(self.encoder.alone(index))
        vae.decoder.load_state_dict(self.decoder.alone(index))
        return vae.eval()


def _encoded(
    group: Group, x_BMYX: Tensor, noise_MBI: Tensor, layer: str | None
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """The output of the layer, or None, and the means, log-variances and samples of the latents."""
    count = len(group.candidates)
    if layer is None:
        A_BMCHW, hidden = None, group.encoder(x_BMYX)
    else:
        A_BMCHW = group.encoder(x_BMYX, until=layer).unflatten(1, (count, -1))
        hidden = group.encoder(A_BMCHW.flatten(1, 2), after=layer)
    mu_MBI, logvar_MBI = hidden.float().reshape(len(x_BMYX), count, -1).transpose(0, 1).chunk(2, dim=2)
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


@dataclass(frozen=True)
class Criticism:
    """The discriminator's part in a step.

    Attributes:
        total_correlation_M: Its estimate of TC.
        toward_latents_MBI: Gradient of that for the draws from q(z).
        loss_M: Its own loss.
        gradients: Gradient of that for each of its parameters.
        leaked_MBI: Gradient of that for the draws from q(z).
    """

    total_correlation_M: Float[Tensor, " m"]
    toward_latents_MBI: Float[Tensor, "m b i"]
    loss_M: Float[Tensor, " m"]
    gradients: list[Tensor]
    leaked_MBI: Float[Tensor, "m b i"]


def criticise(critic: SideBySide, joint_MBI: Float[Tensor, "m b i"], permuted_MBI: Float[Tensor, "m b i"]) -> Criticism:
    """Both losses that the discriminator gives, and their gradients, from one pass through it in each direction.

    Of each draw both losses know the difference d of the two logits alone: TC is the mean of d over draws from q(z),
    the other loss half the mean of softplus(-d) over these and half that of softplus(d) over the permuted ones. So the
    gradients of both, at any layer, are that of d times one factor for each draw, and d goes back only once.
    """
    draws = joint_MBI.shape[1]
    linear = [name for name, layer in critic.layers.items() if isinstance(layer, torch.nn.Linear)]
    inputs, outputs, previous = [torch.cat([joint_MBI, permuted_MBI], 1).detach().requires_grad_()], [], None
    for name in critic.layers:
        value = critic(inputs[-1] if name in linear else outputs[-1], after=previous, until=name)
        (outputs if name in linear else inputs).append(value)
        previous = name
    logits_MB2 = outputs[-1].float()
    d_MB = logits_MB2[..., 0] - logits_MB2[..., 1]
    toward_inputs_MBI, *toward_outputs = torch.autograd.grad(d_MB.sum(), [inputs[0], *outputs])

    logits_MB2, d_MB = logits_MB2.detach(), d_MB.detach()
    slope_MB = torch.cat([-torch.sigmoid(-d_MB[:, :draws]), torch.sigmoid(d_MB[:, draws:])], 1)
    slope_MB1 = slope_MB[..., None] / (2 * draws)
    gradients = {}
    for name, value, toward in zip(linear, inputs, toward_outputs, strict=True):
        scaled = toward * slope_MB1
        gradients[f"{name}_weight"] = (value.detach().mT @ scaled.to(value.dtype)).float()
        gradients[f"{name}_bias"] = scaled.sum(1)
    return Criticism(
        total_correlation(logits_MB2[:, :draws]),
        toward_inputs_MBI[:, :draws] / draws,
        discriminator_loss(logits_MB2[:, :draws], logits_MB2[:, draws:]),
        [gradients[name] for name, _ in critic.weights.named_parameters()],
        toward_inputs_MBI[:, :draws] * slope_MB1[:, :draws],
    )


def step(group: Group, draw: Draw, train_N: Int64[Tensor, " n"], batch_size: int, precision: str) -> dict[str, Tensor]:
    """One step of every model of a group: all losses by the same weights, then Adam on VAEs and discriminators.

    Returns:
        The parts of the loss, [M] each.
    """
    vae_parameters = [*group.encoder.parameters(), *group.decoder.parameters()]
    critic_parameters = list(group.critic.parameters())
    device = vae_parameters[0].device
    latent_dim = group.decoder.weights["conv_weight"].shape[1]
    indices, noises, orders, randoms = [], [], [], []
    for generator in group.generators:
        indices.append(torch.randint(len(train_N), (2 * batch_size,), generator=generator))
        noises.append(torch.randn(2, batch_size, latent_dim, generator=generator))
        orders.append(torch.rand(batch_size, latent_dim, generator=generator).argsort(0))
        randoms.append(torch.randint(latent_dim, (2,), generator=generator))
    # [2·B, M] so that one image of each model lies in one row: the channels of a grouped convolution.
    chosen = train_N[torch.stack(indices, 1).flatten()]
    x = draw(chosen).to(device).float().view(2, batch_size, len(group.candidates), SIDE, SIDE)
    noise_2MBI, order_MBI = torch.stack(noises, 1).to(device), torch.stack(orders).to(device)
    random_M2 = torch.stack(randoms).to(device)
    # The cache of cast weights lives as long as the context, that is one step.
    with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
        parts, z_MBI = losses(group, x[0], noise_2MBI[0], random_M2)
        if group.candidates[0].gamma > 0:
            with torch.no_grad():
                permuted_MBI = permute_latents(_encoded(group, x[1], noise_2MBI[1], None)[3], order_MBI)
            criticism = criticise(group.critic, z_MBI, permuted_MBI)
    total_M = parts["reconstruction"] + group.weights["beta"] * parts["kl"]
    if "attention" in parts:
        total_M = total_M + group.weights["attention_weight"] * parts["attention"]
    if group.candidates[0].gamma > 0:
        parts["total_correlation"], parts["discriminator"] = criticism.total_correlation_M, criticism.loss_M
        toward_latents_MBI = group.weights["gamma"][:, None, None] * criticism.toward_latents_MBI
        if not group.candidates[0].detached:
            toward_latents_MBI = toward_latents_MBI + criticism.leaked_MBI
        gradients = torch.autograd.grad([total_M.sum(), z_MBI], vae_parameters, [None, toward_latents_MBI])
        _apply(group.optimizers[1], critic_parameters, criticism.gradients)
    else:
        gradients = torch.autograd.grad(total_M.sum(), vae_parameters)
    _apply(group.optimizers[0], vae_parameters, gradients)
    return {name: part.detach() for name, part in parts.items()}


def _apply(optimizer: torch.optim.Adam, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
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
    goes on from its checkpoint, and ends, on the CPU, with the same weights to the last bit. Where the cache cannot be
    written, models are trained without, and a line on stderr says so.

    Args:
        candidates: What to train.
        draw: Gives the images of indices, with values 0 and 1.
        train_N: Indices of the training images.
        recipe: Hyper-parameters that all candidates share; its own number of steps is not read.
        steps: Steps for each candidate.
        device: Where to train.
        precision: "float32", or "bfloat16" for the products of both passes.
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
    if precision not in devices.PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(devices.PRECISIONS)}; got {precision!r}")
    shared = {
        "recipe": {
            name: value for name, value in dataclasses.asdict(recipe).items() if name not in ("source", "steps")
        },
        "steps": steps,
        "precision": precision,
        "data": data_digest,
        "train": weights.tensor_digest(train_N),
        "protocols": protocols.versions(protocols.FACTORVAE),
        "measurements": measurements,
    }
    keys = {one: _digest(shared | {"candidate": dataclasses.asdict(one)}) for one in candidates}
    missing = [one for one in candidates if not weights.there(_path(keys[one]))]
    groups = grouped(missing)
    not_kept: dict[Candidate, Stored] = {}
    with tqdm(
        total=steps * len(candidates), unit="step", disable=not progress, mininterval=2, dynamic_ncols=True
    ) as bar:
        bar.update(steps * (len(candidates) - len(missing)))
        for members in groups:
            not_kept |= _train_group(
                members, keys, draw, train_N, recipe, steps, device, precision, measure, measurements, bar
            )
    # Also models trained just now go through the file, so that both ways give the same models to the last bit.
    stored = (not_kept.get(one) or read_tensors(_path(keys[one])) for one in candidates)
    return [_rebuilt(one, keys[one], *its, recipe, device) for one, its in zip(candidates, stored, strict=True)]


def _train_group(
    members: Sequence[Candidate],
    keys: Mapping[Candidate, str],
    draw: Draw,
    train_N: Tensor,
    recipe: StepRecipe,
    steps: int,
    device: torch.device,
    precision: str,
    measure: Callable[[DSpritesVAE], Mapping[str, float]] | None,
    measurements: int,
    bar: tqdm,
) -> dict[Candidate, Stored]:
    """Train a group and write it into the cache; returns what could not be kept there."""
    file = weights.folder() / f"FactorVAE-{_digest([keys[one] for one in members])[:20]}.checkpoint"
    with weights.held(file.with_suffix(".lock"), file.parent, f"{file.name}.*.tmp") as problem:
        if all(weights.there(_path(keys[one])) for one in members):  # another process made them while this one waited
            bar.update(steps * len(members))
            return {}
        if problem:
            weights.say_not_kept(problem)
        checkpoint = None if problem else file
        group = Group.made(members, recipe, device)
        done, curves, totals = _resume(checkpoint, group, device)
        bar.update(done * len(members))
        per_point = max(1, steps // POINTS)
        due = {round(steps * (i + 1) / measurements) for i in range(measurements)} if measure else set()
        written = started = time.monotonic()

        def lap() -> None:
            nonlocal started
            now = time.monotonic()
            for curve in curves:
                curve.seconds += now - started
            started = now

        while done < steps:
            parts = step(group, draw, train_N, recipe.batch_size, precision)
            for name, part in parts.items():
                totals[name] = totals.get(name, 0) + part
            done += 1
            bar.update(len(members))
            if done % per_point == 0 or done == steps:
                _record(curves, totals, done, per_point if done % per_point == 0 else done % per_point, checkpoint)
                worst = max(curve.reconstruction[-1] + curve.kl[-1] for curve in curves)
                bar.set_postfix_str(f"{len(members)} side by side, loss {worst:.1f} nats/image", refresh=False)
                totals = {}
            if done in due:
                lap()
                for index, curve in enumerate(curves):
                    curve.measured[str(done)] = dict(measure(group.vae(index, recipe.latent_dim)))
                started = time.monotonic()
            if checkpoint and time.monotonic() - written >= CHECKPOINT_SECONDS and done < steps:
                lap()
                _save(checkpoint, group, done, curves, totals)
                written = time.monotonic()
        lap()
        not_kept: dict[Candidate, Stored] = {}
        for index, (one, curve) in enumerate(zip(members, curves, strict=True)):
            curve.beside = len(members)
            tensors = {
                f"{name}.{key}": value
                for name, network in group.networks().items()
                for key, value in network.alone(index).items()
            }
            described = {"curves": json.dumps(dataclasses.asdict(curve)), "device": devices.describe_device(device)}
            if checkpoint:
                write_tensors(_path(keys[one]), tensors, described)
            else:
                not_kept[one] = tensors, described
        if checkpoint:
            checkpoint.unlink(missing_ok=True)
        return not_kept


def _record(
    curves: Sequence[Curves], totals: Mapping[str, Tensor], done: int, over: int, checkpoint: Path | None
) -> None:
    """Append the mean of each part over the last steps to the curves."""
    means = {name: (total / over).tolist() for name, total in totals.items()}
    for index, curve in enumerate(curves):
        curve.step.append(done)
        for name, values in means.items():
            if values[index] - values[index] != 0:  # NaN and both infinities
                kept = f"; the last good checkpoint is {checkpoint}" if checkpoint and checkpoint.exists() else ""
                raise TrainingDivergedError(
                    f"{name} is no longer finite by step {done}: try a smaller learning_rate or weight{kept}"
                )
            getattr(curve, name).append(values[index])


def _save(path: Path, group: Group, done: int, curves: Sequence[Curves], totals: Mapping[str, Tensor]) -> None:
    for network in group.networks().values():
        if not all(parameter.isfinite().all() for parameter in network.parameters()):
            return  # the loss of the next step stops the training, and the last good checkpoint stays
    tensors = {f"totals/{name}": total for name, total in totals.items()}
    tensors |= {f"generator/{index}": generator.get_state() for index, generator in enumerate(group.generators)}
    for name, network in group.networks().items():
        for key, parameter in network.named_parameters():
            tensors[f"{name}/{key}"] = parameter
            for optimizer in group.optimizers:
                moments = optimizer.state.get(parameter, {})
                tensors |= {f"adam/{part}/{name}/{key}": value for part, value in moments.items()}
    described = {"done": str(done), "curves": json.dumps([dataclasses.asdict(curve) for curve in curves])}
    write_tensors(path, tensors, described)


def _resume(path: Path | None, group: Group, device: torch.device) -> tuple[int, list[Curves], dict[str, Tensor]]:
    """Put a group where its checkpoint left it; where there is none, it stays at the start."""
    if path is None or not path.exists():
        return 0, [Curves() for _ in group.candidates], {}
    tensors, metadata = read_tensors(path)
    with torch.no_grad():
        for name, network in group.networks().items():
            for key, parameter in network.named_parameters():
                parameter.copy_(tensors[f"{name}/{key}"])
                if f"adam/step/{name}/{key}" not in tensors:  # of a discriminator that nothing trains
                    continue
                optimizer = group.optimizers[1 if name == "critic" else 0]
                # Adam keeps each moment in the memory layout of its weight; the file has them all contiguous.
                optimizer.state[parameter] = {
                    "step": tensors[f"adam/step/{name}/{key}"].to(device),
                    "exp_avg": torch.empty_like(parameter).copy_(tensors[f"adam/exp_avg/{name}/{key}"]),
                    "exp_avg_sq": torch.empty_like(parameter).copy_(tensors[f"adam/exp_avg_sq/{name}/{key}"]),
                }
    for index, generator in enumerate(group.generators):
        generator.set_state(tensors[f"generator/{index}"])
    totals = {key.removeprefix("totals/"): value.to(device) for key, value in tensors.items() if "totals/" in key}
    return int(metadata["done"]), [Curves(**curve) for curve in json.loads(metadata["curves"])], totals


def _rebuilt(
    one: Candidate,
    key: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    recipe: StepRecipe,
    device: torch.device,
) -> Trained:
    """A model and how it came about, from what its file holds."""
    vae, critic = DSpritesVAE(recipe.latent_dim), discriminator(recipe.latent_dim)
    parts: dict[str, dict[str, Tensor]] = {"encoder": {}, "decoder": {}, "critic": {}}
    for name, value in tensors.items():
        network, _, rest = name.partition(".")
        parts[network][rest] = value
    vae.encoder.load_state_dict(parts["encoder"])
    vae.decoder.load_state_dict(parts["decoder"])
    critic.load_state_dict(parts["critic"])
    curves = Curves(**json.loads(metadata["curves"]))
    return Trained(
        one, vae.to(device).eval(), critic.to(device).eval(), curves, key, _path(key).name, metadata["device"]
    )


def _path(key: str) -> Path:
    return weights.folder() / f"FactorVAE-{key[:20]}.safetensors"


def _digest(determinants: object) -> str:
    return hashlib.sha256(json.dumps(determinants, sort_keys=True).encode()).hexdigest()
