"""The part of FactorVAE's discriminators in a training step: both losses and all gradients from one pass each way.

Suffixes of tensor names as in expvae_book.factorvae.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expvae import discriminator_loss, total_correlation
from expvae.models import SideBySide


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
    inputs, outputs, previous = [torch.cat([joint_MBI, permuted_MBI], 1).detach().requires_grad_()], [], None
    for name in network.layers:
        value = network(inputs[-1] if name in linear else outputs[-1], after=previous, until=name)
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
    return Discrimination(
        total_correlation(logits_MB2[:, :draws]),
        toward_inputs_MBI[:, :draws] / draws,
        discriminator_loss(logits_MB2[:, :draws], logits_MB2[:, draws:]),
        [gradients[name] for name, _ in network.weights.named_parameters()],
        toward_inputs_MBI[:, :draws] * slope_MB1[:, :draws],
    )
