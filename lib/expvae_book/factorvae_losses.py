"""The losses that AD-FactorVAE adds to a VAE's: L_AD (Liu et al. 2020, eq. 7) in its variants, and the discriminator's.

Suffixes of tensor names as in expvae.attention, and M models side by side, K maps that are paired.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from expvae import PRESETS as MAPS
from expvae import Method, discriminator_loss, overlap, total_correlation, upsample
from expvae.models import DSPRITES_LAYERS
from expvae_book.side_by_side import SideBySide

Pairs = Literal["consecutive", "all", "random"]
Alpha = Literal["second_order", "constant"]

SIDE = 64  # of the images


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
        relu_last = penalty.method.channels == "relu_of_sum"
        maps.append(weighted_BMCHW.sum(2).relu() if relu_last else weighted_BMCHW.relu().sum(2))
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


@dataclass(frozen=True)
class Discrimination:
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


def discriminate(
    network: SideBySide, joint_MBI: Float[Tensor, "m b i"], permuted_MBI: Float[Tensor, "m b i"]
) -> Discrimination:
    """Both losses that the discriminator gives, and their gradients, from one pass through it in each direction.

    Of each draw both losses know the difference d of the two logits alone: TC is the mean of d over draws from q(z),
    the other loss half the mean of softplus(-d) over these and half that of softplus(d) over the permuted ones. So the
    gradients of both, at any layer, are that of d times one factor for each draw, and d goes back only once.
    """
    draws = joint_MBI.shape[1]
    linear = [name for name, layer in network.layers.items() if isinstance(layer, nn.Linear)]
    inputs, outputs = [torch.cat([joint_MBI, permuted_MBI], 1).detach().requires_grad_()], []
    for name in network.layers:
        before, after = (inputs, outputs) if name in linear else (outputs, inputs)
        after.append(network(before[-1], [name]))
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
    return Discrimination(
        total_correlation(logits_MB2[:, :draws]),
        toward_inputs_MBI[:, :draws] / draws,
        discriminator_loss(logits_MB2[:, :draws], logits_MB2[:, draws:]),
        [gradients[name] for name, _ in network.weights.named_parameters()],
        toward_inputs_MBI[:, :draws] * slope_MB1[:, :draws],
    )
