"""What is measured of a model of dSprites: how well its latents tell the factors, and how far its maps overlap."""

from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor

from expvae import attention, elbo_terms, kl_divergence, metrics, overlap, sample_latents, total_correlation
from expvae.metrics import active_units
from expvae.models import DSpritesVAE
from expvae_book import factorvae, names, runs
from expvae_book.data import dsprites
from expvae_book.factorvae import VARIANTS, Trained
from expvae_book.measures import halved
from expvae_book.side_by_side import SideBySide
from expvae_book.training import hold_out

BATCH = 512
EXPLAINED = 512  # held-out images whose maps are compared
SHOWN = 6  # held-out images that are shown
PERFECT_DRAWS = 10  # of the votes for the ceiling of a perfect code
SPARE = (0, 5, 27)  # latents that carry nothing beside those of a perfect code

PROTOCOLS = {names.REFERENCE: metrics.REFERENCE, names.PUBLISHED: metrics.PUBLISHED}
HELD_OUT = 0.01  # of all images, which no model is trained on
SCHEDULED_STRIDE = 4  # of the lattice on which the metric is taken during training
SCHEDULED_IMAGES = 2048  # held-out images whose reconstruction is measured during training
MEASUREMENTS = 5  # during a training; fewer where that would be more often than every SPARING steps
SPARING = 1000
SAMPLES = 1000  # of the latents, for the total correlation
RANDOM_PAIRS = 20  # of latents, over which a variant that draws them is averaged

# The variants of the loss whose gradients are compared: the published ones, and each with one choice changed.
COMPARED = {
    "liu2020": VARIANTS["liu2020"],
    "liu2020, α constant": replace(VARIANTS["liu2020"], alpha="constant"),
    "liu2020 at conv1": replace(VARIANTS["liu2020"], layer="conv1"),
    "liu2020 at conv1, α constant": replace(VARIANTS["liu2020"], layer="conv1", alpha="constant"),
    "liu2020 at conv5": replace(VARIANTS["liu2020"], layer="conv5"),
    "report2": VARIANTS["report2"],
    "brongers2021": VARIANTS["brongers2021"],
    "brongers2021, divided once": replace(VARIANTS["brongers2021"], per_batch=False),
    "brongers2021, second order": replace(VARIANTS["brongers2021"], alpha="second_order"),
}


def lattice(stride: int) -> tuple[Int64[Tensor, " n"], tuple[int, ...]]:
    """Indices of every combination of all shapes and scales with each `stride`-th orientation and position.

    Returns:
        The indices in ascending order, and how many values each factor has; with stride 1 that is all images.

    Raises:
        ValueError: If the stride is not positive.
    """
    if stride < 1:
        raise ValueError(f"stride={stride} must be 1 or more")
    values = [
        torch.arange(0, size, stride if name in ("orientation", "x", "y") else 1)
        for name, size in zip(dsprites.FACTORS, dsprites.SIZES, strict=True)
    ]
    return dsprites.index_of(torch.cartesian_prod(*values)), tuple(len(part) for part in values)


def split() -> tuple[Int64[Tensor, " train"], Int64[Tensor, " held_out"]]:
    """Indices of the training images and of those held out, the same for every model; the latter in random order."""
    train_N, held_out_N = hold_out(dsprites.COUNT, HELD_OUT)
    # Sorted, the first of them would all be small squares.
    order_N = torch.randperm(len(held_out_N), generator=torch.Generator().manual_seed(0))
    return train_N, held_out_N[order_N]


@torch.no_grad()
def encode(
    vae: DSpritesVAE, sprites: dsprites.Sprites, index_N: Int64[Tensor, " n"]
) -> tuple[Float[Tensor, "n i"], Float[Tensor, "n i"]]:
    """Means and log-variances of the posteriors of images, on the CPU."""
    parts = [vae.encode(sprites.images(index_B).float()) for index_B in index_N.to(sprites.pixels.device).split(BATCH)]
    mu_NI, logvar_NI = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
    return mu_NI, logvar_NI


@torch.no_grad()
def reconstruction(vae: DSpritesVAE, sprites: dsprites.Sprites, index_N: Int64[Tensor, " n"]) -> Float[Tensor, " n"]:
    """-log p(x|z) of each image in nats, z ~ q(z|x), with the same noise at every call."""
    generator = torch.Generator().manual_seed(0)
    batches = (sprites.images(index_B).float() for index_B in index_N.to(sprites.pixels.device).split(BATCH))
    return torch.cat([elbo_terms(vae, x_BCYX, generator)[0].cpu() for x_BCYX in batches])


def scheduled(vae: DSpritesVAE, sprites: dsprites.Sprites) -> dict[str, float]:
    """What is measured while a model is trained: the quick setting of each metric, from one encoding.

    The FactorVAE metric and the total correlation are taken on a coarse lattice of the factors (see `lattice`), the
    reconstruction on a fixed sample of the held-out images.
    """
    index_N, sizes = lattice(SCHEDULED_STRIDE)
    mu_NI, logvar_NI = encode(vae, sprites, index_N)
    generator = torch.Generator().manual_seed(0)
    return {
        "FactorVAE metric": metrics.factor_vae_metric(mu_NI, sizes, metrics.REFERENCE, generator=generator).score,
        "total correlation": metrics.total_correlation(mu_NI, logvar_NI, samples=SAMPLES, generator=generator).value,
        "reconstruction": reconstruction(vae, sprites, split()[1][:SCHEDULED_IMAGES]).double().mean().item(),
        "KL": kl_divergence(mu_NI, logvar_NI).sum(1).double().mean().item(),
        "active units": float(active_units(mu_NI)),
    }


def evaluate(
    trained: Trained, sprites: dsprites.Sprites, stride: int
) -> tuple[list[dict[str, Any]], dict[str, np.ndarray]]:
    """Everything that is measured of a trained model: the rows of its run, and its arrays.

    The metrics of disentanglement come from one encoding of the lattice with this stride, the losses from held-out
    images, and the maps from some of these.
    """
    vae = trained.vae
    index_N, sizes = lattice(stride)
    mu_NI, logvar_NI = encode(vae, sprites, index_N)
    held_out_N = split()[1]
    cost_N = reconstruction(vae, sprites, held_out_N).double()
    kl_NI = kl_divergence(mu_NI, logvar_NI).double()
    x_BCYX = sprites.images(held_out_N[:EXPLAINED].to(sprites.pixels.device)).float()
    active_I = torch.from_numpy(metrics.active_by_variance(mu_NI, 0.1))  # that is a variance of 0.01
    rows = [
        runs.row("reconstruction per image", **_mean(cost_N)),
        runs.row("KL per image", kl_NI.sum(1).mean().item()),
        runs.row("reconstruction per image, training", trained.curves.reconstruction[-1]),
        runs.row("active units", active_units(mu_NI)),
        runs.row("parameters", sum(value.numel() for value in vae.parameters())),
        *metric_rows(mu_NI, logvar_NI, kl_NI, sizes),
        *overlap_rows(vae, x_BCYX, active_I),
        *gradient_rows(trained, x_BCYX[:64]),
    ]
    arrays = {
        "shown": held_out_N[:SHOWN].numpy(),
        "kl": kl_NI.mean(0).numpy().astype(np.float32),
        "traversals": traversals(vae, x_BCYX[:1]),
    }
    return rows, arrays | {f"maps {layer}": highest(vae, layer, x_BCYX[:SHOWN]) for layer in names.SPATIAL}


def highest(vae: DSpritesVAE, layer: str, x_BCYX: Float[Tensor, "b 1 64 64"]) -> Float32[np.ndarray, "b 2 h w"]:
    """By the paper's rule the maps of the two latents with the highest response, which is the mean of the map."""
    found = attention(vae.encode, f"encoder.{layer}", x_BCYX)
    return take(found.map_BIHW, found.highest_BK(2)).cpu().numpy().astype(np.float32)


def _mean(values_N: Float[Tensor, " n"]) -> dict[str, float | int]:
    """A mean over images with its 95 % interval by the normal approximation."""
    half = 1.96 * values_N.std().item() / len(values_N) ** 0.5
    value = values_N.mean().item()
    return {"value": value, "low": value - half, "high": value + half, "n": len(values_N)}


def metric_rows(
    mu_NI: Float[Tensor, "n i"], logvar_NI: Float[Tensor, "n i"], kl_NI: Float[Tensor, "n i"], sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    """The metrics of disentanglement from one encoding of a lattice, by every protocol, and a perfect code's."""
    generator = torch.Generator().manual_seed(0)
    by_deviation, *by_kl = names.COLLAPSED
    cases = [
        (names.REFERENCE, by_deviation, metrics.active_by_variance(mu_NI, names.COLLAPSED[by_deviation])),
        *((names.PUBLISHED, rule, metrics.active_by_kl(kl_NI.mean(0), names.COLLAPSED[rule])) for rule in by_kl),
    ]
    rows = []
    for protocol, rule, active_I in cases:
        found = metrics.factor_vae_metric(mu_NI, sizes, PROTOCOLS[protocol], active_I=active_I, generator=generator)
        rows += [
            runs.row(names.METRIC, method=protocol, subset=rule, **vars(found.interval)),
            runs.row("latents that count", found.active, protocol, rule),
        ]
    for spare, protocol in product(SPARE, PROTOCOLS):
        drawn = perfect(sizes, spare, protocol)
        spread = {"low": min(drawn), "high": max(drawn), "n": len(drawn)}
        rows.append(runs.row("perfect code", float(np.mean(drawn)), protocol, f"{spare} spare latents", **spread))
    gap_K = metrics.mutual_information_gap(mu_NI, sizes, generator=generator)
    # Its own default numbers of points, or two thirds and a third of a lattice that has fewer.
    n = len(mu_NI)
    forest = metrics.dci(mu_NI, sizes, train=min(10_000, 2 * n // 3), held_out=min(5_000, n // 3), generator=generator)
    return [
        *rows,
        runs.row("MIG", float(gap_K.mean())),
        runs.row("DCI disentanglement", forest.disentanglement),
        runs.row("DCI completeness", forest.completeness),
        runs.row("DCI informativeness", forest.informativeness),
        runs.row(
            "total correlation",
            **vars(metrics.total_correlation(mu_NI, logvar_NI, samples=SAMPLES, generator=generator)),
        ),
    ]


@cache
def perfect(sizes: tuple[int, ...], spare: int, protocol: str) -> tuple[float, ...]:
    """Scores of a perfect code, a latent for each factor and some that carry nothing, over several draws of votes."""
    generator = torch.Generator().manual_seed(0)
    code_NI = metrics.perfect_code(sizes, spare, generator)
    return tuple(
        metrics.factor_vae_metric(code_NI, sizes, PROTOCOLS[protocol], generator=generator).score
        for _ in range(PERFECT_DRAWS)
    )


def overlap_rows(
    vae: DSpritesVAE, x_BCYX: Float[Tensor, "b 1 64 64"], active_I: Bool[Tensor, " i"]
) -> list[dict[str, Any]]:
    """How much maps by the paper's rule overlap, at every layer and over pairs of latents: means over images.

    The AD ratio also falls where one map shrinks and stays where it is, because the larger one fills the sum below the
    line. Therefore it is taken a second time of maps that were brought to the same sum, which only tells where they
    are; there, pairs with a map that is zero do not count.

    Args:
        vae: The model.
        x_BCYX: Images.
        active_I: Which latents carry anything; without two of them there are no pairs of active ones.
    """
    pair_P2 = torch.combinations(active_I.nonzero().flatten())
    rows = []
    for layer in names.SPATIAL:
        found = attention(vae.encode, f"encoder.{layer}", x_BCYX)
        map_BIHW = found.map_BIHW.cpu()
        highest_BK = found.highest_BK(2).cpu()
        cases = {names.PAIRS[1]: (take(map_BIHW, highest_BK[:, :1]), take(map_BIHW, highest_BK[:, 1:]))}
        if len(pair_P2):
            cases[names.PAIRS[0]] = (map_BIHW[:, pair_P2[:, 0]], map_BIHW[:, pair_P2[:, 1]])
        for subset, pair in cases.items():
            rows.append(runs.row(names.OVERLAP, **_mean(overlap(*pair).double().mean(1)), method=layer, subset=subset))
            # A map that is zero has no sum of 1: NaN, which does not count.
            shares = [map_BPHW / map_BPHW.sum((2, 3), keepdim=True) for map_BPHW in pair]
            equal_B = overlap(*shares).double().nanmean(1)
            equal_B = equal_B[~equal_B.isnan()]
            if len(equal_B) > 1:
                rows.append(runs.row(names.EQUALISED, **_mean(equal_B), method=layer, subset=subset))
    return rows


def take(map_BIHW: Float[Tensor, "b i h w"], index_BK: Int64[Tensor, "b k"]) -> Float[Tensor, "b k h w"]:
    """The maps of each image's own latents."""
    return map_BIHW.gather(1, index_BK[..., None, None].expand(-1, -1, *map_BIHW.shape[2:]))


def gradient_rows(trained: Trained, x_BCYX: Float[Tensor, "b 1 64 64"]) -> list[dict[str, Any]]:
    """How strongly each variant of the loss pulls at the encoder of a trained model, beside the rest of its loss.

    The norm of the gradient at λ = 1 over the encoder's parameters, how many of them have one that is not zero, and
    the loss itself; all on one batch. For random pairs these are means over RANDOM_PAIRS draws.
    """
    generator = torch.Generator().manual_seed(0)
    vae, (b, *_) = trained.vae, x_BCYX.shape
    cost_B, kl_B = elbo_terms(vae, x_BCYX, generator)
    rest = cost_B.mean() + trained.candidate.beta * kl_B.mean()
    if trained.candidate.gamma:
        z_BI = sample_latents(*vae.encode(x_BCYX), generator)
        rest = rest + trained.candidate.gamma * total_correlation(trained.discriminator(z_BI)[None]).sum()
    parts = torch.autograd.grad(rest, list(vae.encoder.parameters()))
    rows = [runs.row(names.GRADIENT, torch.cat([part.flatten() for part in parts]).norm().item(), "rest of the loss")]
    encoder = SideBySide([vae.encoder]).to(x_BCYX.device)
    latent_dim = vae.decoder.conv.in_channels
    noise_BI = torch.randn(b, latent_dim, generator=generator).to(x_BCYX.device)
    random_N2 = torch.randint(latent_dim, (RANDOM_PAIRS, 2), generator=generator).to(x_BCYX.device)
    for name, choice in COMPARED.items():
        A_BMCHW, hidden = encoder.through(x_BCYX, choice.layer)
        mu_BI, logvar_BI = hidden.flatten(1).chunk(2, dim=1)
        z_BI = mu_BI + (0.5 * logvar_BI).exp() * noise_BI
        parameters = list(encoder.parameters())
        values, norms, reached = [], [], set()
        for pair_2 in random_N2 if choice.pairs == "random" else random_N2[:1]:
            loss = factorvae.attention_loss(A_BMCHW, mu_BI[None], z_BI[None], choice, pair_2[None]).sum()
            found = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True, retain_graph=True)
            values.append(loss.item())
            norms.append(torch.cat([part.flatten() for part in found]).norm().item())
            reached |= {index for index, part in enumerate(found) if part.any()}
        rows += [
            runs.row("L_AD", float(np.mean(values)), name),
            runs.row(names.GRADIENT, float(np.mean(norms)), name),
            runs.row(names.REACHED, sum(parameters[index].numel() for index in reached), name),
        ]
    return rows


def pictured(vae: DSpritesVAE, images_ITYX: np.ndarray) -> dict[str, np.ndarray]:
    """What one seed of a method keeps: the map of the latent that runs, along each traversal, and float16 weights."""
    x_BCYX = torch.from_numpy(images_ITYX).flatten(0, 1)[:, None].float().div(255).to(next(vae.parameters()).device)
    latent_B1 = torch.arange(len(images_ITYX)).repeat_interleave(images_ITYX.shape[1])[:, None].to(x_BCYX.device)
    map_BIHW = attention(vae.encode, f"encoder.{names.SPATIAL[1]}", x_BCYX).map_BIHW
    map_ITHW = take(map_BIHW, latent_B1).unflatten(0, images_ITYX.shape[:2])[:, :, 0]
    weights = {f"weights/{name}": value.cpu().half().numpy() for name, value in vae.state_dict().items()}
    return halved("traversal maps", map_ITHW) | weights


@torch.no_grad()
def traversals(vae: DSpritesVAE, x_BCYX: Float[Tensor, "1 1 64 64"]) -> np.ndarray:
    """What the decoder makes of an image's latents when one of them runs along a traversal: [D, 7, 64, 64], uint8."""
    mu_BI, _ = vae.encode(x_BCYX)
    z_ITI = mu_BI.expand(mu_BI.shape[1], len(names.TRAVERSAL), -1).clone()
    z_ITI.diagonal(dim1=0, dim2=2).copy_(torch.tensor(names.TRAVERSAL)[:, None])
    images = vae.decode(z_ITI.flatten(0, 1)).sigmoid()
    return (255 * images).round().byte().squeeze(1).unflatten(0, z_ITI.shape[:2]).cpu().numpy()
