"""What a trained VAE makes of many images, and the rows of a record that several chapters write in one way.

Images are grey levels 0…255; what comes back lies on the CPU, in their order. Suffixes as in expvae.attention, and N
images.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from jaxtyping import Float, Shaped, UInt8
from torch import Tensor, nn
from tqdm import tqdm

from expvae import PRESETS, Method, attentions, reconstruction_loss
from expvae.metrics import Array, auroc_interval
from expvae_book import runs, training

Name = TypeVar("Name", bound=Hashable)
Posterior = tuple[Float[Tensor, " d"], Float[Tensor, " d"]]
AT_ONCE = 64  # images that are encoded


def method_of(preset: str) -> Method:
    """The method of a preset, or the paper's by another score: "normal_difference", its rule for anomalies, say."""
    return PRESETS[preset] if preset in PRESETS else Method(score=preset)


def explain(
    model: nn.Module,
    layer: str,
    x_NCYX: UInt8[Tensor, "n c y x"],
    methods: Mapping[Name, str | Method],
    **options: object,
) -> dict[Name, Float[Tensor, "n y x"]]:
    """The attention maps of many images at one layer by several methods; see `explain_layers` for the options."""
    return explain_layers(model, {name: (layer, method) for name, method in methods.items()}, x_NCYX, **options)


def explain_layers(
    model: nn.Module,
    wanted: Mapping[Name, tuple[str, str | Method]],
    x_NCYX: UInt8[Tensor, "n c y x"],
    *,
    batch: int,
    seed: int,
    normal: tuple[Tensor, Tensor] | None = None,
    shuffled: bool = False,
) -> dict[Name, Float[Tensor, "n y x"]]:
    """The attention maps of many images, which share passes as in `expvae.attentions`.

    Args:
        model: The trained VAE.
        wanted: By names of one's own, the path of the layer and the preset or method of each map.
        x_NCYX: Images.
        batch: Images at a time; the maps of methods that divide by the gradient's size over the batch depend on it.
        seed: Fixes the noise of sampled scores, of which every image has its own, and the order.
        normal: Mean and log-variance of the posterior of normal images, for the score "normal_difference".
        shuffled: Whether batches are put together at random: methods that divide over the batch would otherwise tell
            defects apart by the folders that they lie in.
    """
    where, n = next(model.parameters()).device, len(x_NCYX)
    chance = torch.Generator().manual_seed(seed)
    order_N = torch.randperm(n, generator=chance) if shuffled else torch.arange(n)
    maps = {name: torch.empty(n, *x_NCYX.shape[2:]) for name in wanted}
    for chosen_B in tqdm(order_N.split(batch), desc="attention", unit="batch"):
        x_BCYX = training.to_unit(x_NCYX[chosen_B].to(where))
        results = attentions(model.encode, wanted, x_BCYX, normal=normal, generator=chance)
        for name, result in results.items():
            maps[name][chosen_B] = result.map_BYX.cpu()
    return maps


def encoded(model: nn.Module, x_NCYX: UInt8[Tensor, "n c y x"]) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]:
    """Means and log-variances of the posteriors of many images."""
    where = next(model.parameters()).device
    with torch.no_grad():
        parts = [model.encode(training.to_unit(x_BCYX.to(where))) for x_BCYX in x_NCYX.split(AT_ONCE)]
    mu_ND, logvar_ND = (torch.cat(part).cpu() for part in zip(*parts, strict=True))
    return mu_ND, logvar_ND


# The last that was asked of each model: an evaluation asks three times, and thousands of images are encoded for it.
_posteriors: WeakKeyDictionary[nn.Module, tuple[ref[Tensor], list[int], Posterior]] = WeakKeyDictionary()


def normal_posterior(model: nn.Module, train_NCYX: UInt8[Tensor, "n c y x"]) -> Posterior:
    """Mean and log-variance over the posteriors of all training images together.

    The variance of their mixture is the mean of the variances and the variance of the means, E[σ²] + Var[μ].
    """
    # A version counts what was written to a tensor, so that a model which has learnt since is asked again.
    versions = [tensor._version for tensor in (train_NCYX, *model.state_dict(keep_vars=True).values())]
    images, then, _ = _posteriors.get(model, (lambda: None, [], None))
    if images() is not train_NCYX or then != versions:
        mu_ND, logvar_ND = encoded(model, train_NCYX)
        variance_D = logvar_ND.exp().mean(0) + mu_ND.var(0, correction=0)
        _posteriors[model] = ref(train_NCYX), versions, (mu_ND.mean(0), variance_D.log())
    return _posteriors[model][2]


def normal_for(presets: Iterable[str], model: nn.Module, train_NCYX: UInt8[Tensor, "n c y x"]) -> Posterior | None:
    """The normal posterior, which takes a pass over all training images, where one of the presets needs it."""
    needed = {"normal_difference", "most_deviant"} & {method_of(preset).score for preset in presets}
    return normal_posterior(model, train_NCYX) if needed else None


def reconstruct(model: nn.Module, x_NCYX: UInt8[Tensor, "n c y x"]) -> Float[Tensor, "n c y x"]:
    """The images as the decoder makes them of the means of their latents."""
    where = next(model.parameters()).device
    with torch.no_grad():
        parts = [model.decode(model.encode(training.to_unit(x_BCYX.to(where)))[0]) for x_BCYX in x_NCYX.split(16)]
    decoded_NCYX = torch.cat(parts).cpu()
    return decoded_NCYX.clamp(0, 1) if hasattr(model, "reconstruction_loss") else decoded_NCYX.sigmoid()


def auroc_rows(
    metric: str,
    scores: Mapping[str, Float[Array, "n ..."]],
    truth_N: Shaped[Array, "n ..."],
    *,
    seed: int,
    subset: str = "",
    where_N: Shaped[Array, "n ..."] | None = None,
) -> list[dict]:
    """A row with the AUROC of the maps, or of the scores of whole images, of each method; intervals over images.

    Args:
        metric: Its name in the record.
        scores: Maps or scores, by method.
        truth_N: Anomalous pixels or images.
        seed: Fixes the resamples.
        subset: What the rows are of.
        where_N: The pixels that count; all if None.
    """
    rows = []
    for name, score_N in scores.items():
        measured = auroc_interval(score_N, truth_N, where_NP=where_N, seed=seed)
        rows.append(runs.row(metric, method=name, subset=subset, **vars(measured)))
    return rows


def learned_rows(
    model: nn.Module,
    held_out_NCYX: UInt8[Tensor, "n c y x"],
    means: Mapping[str, Float[Tensor, "c y x"]] | None = None,
    method: str = "",
) -> list[dict]:
    """Rows of a model's size, and of what a held-out image costs to encode and to reconstruct.

    Costs are in nats; that of a reconstruction is the model's own loss where it has one (see `expvae.elbo_terms`).

    Args:
        model: The trained VAE; frozen weights, which are buffers, count among its parameters.
        held_out_NCYX: Held-out images.
        means: By name, images that a decoder without latents would answer every image with, for what that would cost.
        method: Whose rows they are.
    """
    reconstruction, kl = training.validate(model, held_out_NCYX.to(next(model.parameters()).device))
    frozen = [value for name, value in model.named_buffers() if name.endswith(("weight", "bias"))]
    parameters = sum(value.numel() for value in (*model.parameters(), *frozen))
    costs = {"KL per image": kl, "reconstruction per image": reconstruction}
    x_NCYX = training.to_unit(held_out_NCYX)
    own = getattr(model, "reconstruction_loss", None)
    for name, mean_CYX in (means or {}).items():
        constant_NCYX = (mean_CYX if own else torch.logit(mean_CYX, eps=1e-4)).expand_as(x_NCYX)
        costs[f"reconstruction per image, {name}"] = float((own or reconstruction_loss)(constant_NCYX, x_NCYX).mean())
    rows = [runs.row(metric, value, method, n=len(x_NCYX)) for metric, value in costs.items()]
    return [runs.row("parameters", parameters, method), *rows]


def spread_rows(noun: str, images: Mapping[str, Float[Tensor, "n ..."]], subset: str = "") -> list[dict]:
    """How much a pixel varies over images: √(1/P Σ_p Var_n x_np), by what the images are.

    Args:
        noun: What they are called, such as "frames".
        images: Images by name, such as those of the data and their reconstructions.
        subset: What the rows are of.
    """
    metric = f"standard deviation of a pixel over the {noun}"
    return [runs.row(metric, float(x_NCYX.var(0).mean().sqrt()), name, subset) for name, x_NCYX in images.items()]
