"""Networks of one shape that are trained side by side, as one network whose parts do not touch each other."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from expvae.models import ToPixels, to_pixels

PLAIN = {"groups": 1, "dilation": (1, 1), "output_padding": (0, 0), "padding_mode": "zeros"}  # what can be grouped


class SideBySide(nn.Module):
    """M sequential networks of one shape as one network, whose parts do not touch each other.

    A convolution of M networks is one grouped convolution, a fully connected layer one batched product of matrices. So
    M networks take as many calls as one, which is what a GPU wants, and no more arithmetic, which is what a CPU wants.
    What each network computes, and the gradient of its parameters, is the same as alone, to rounding.

    Images and feature maps are [B, M·C, Y, X]; the values of fully connected layers are [M, B, F].

    Args:
        networks: Sequentials of Conv2d, ConvTranspose2d, Linear, ReLU and LeakyReLU, alike but for their weights.

    Raises:
        TypeError: If a layer is of another kind, has no bias, or is a convolution with groups,
            dilation, output padding or a padding other than zeros.
        ValueError: If the networks are not alike.
    """

    def __init__(self, networks: Sequence[nn.Sequential]):
        super().__init__()
        self.count = len(networks)
        self.layers = OrderedDict((name, layer) for name, layer in networks[0].named_children())
        if any(repr(network) != repr(networks[0]) for network in networks):
            raise ValueError("networks side by side must be alike but for their weights")
        self.weights = nn.ParameterDict()
        for name, layer in self.layers.items():
            if isinstance(layer, nn.ReLU | nn.LeakyReLU):
                continue
            if not isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
                raise TypeError(f"{name} is a {type(layer).__name__}, which cannot be put side by side")
            if layer.bias is None or any(getattr(layer, part, plain) != plain for part, plain in PLAIN.items()):
                raise TypeError(
                    f"{name} has groups, dilation, a padding or no bias and cannot be put side by side: {layer}"
                )
            for part in ("weight", "bias"):
                values = [network.get_parameter(f"{name}.{part}").detach() for network in networks]
                if isinstance(layer, nn.Linear):  # [M, in, out], as the product of matrices takes it
                    joined = torch.stack([value.mT if value.ndim == 2 else value for value in values]).contiguous()
                else:
                    joined = torch.cat(values)
                if joined.ndim == 4:
                    joined = joined.contiguous(memory_format=torch.channels_last)
                self.weights[f"{name}_{part}"] = nn.Parameter(joined)

    def forward(self, x: Tensor, names: Sequence[str] | None = None) -> Tensor:
        """What the networks make of their inputs, or what these of their layers make of theirs.

        Args:
            x: [B, M·C, Y, X] for convolutions, [M, B, F] for fully connected layers.
            names: Names of the layers, one after the other; None for all.
        """
        for name in self.layers if names is None else names:
            layer = self.layers[name]
            if isinstance(layer, nn.ReLU | nn.LeakyReLU):
                x = layer(x)
                continue
            weight, bias = self.weights[f"{name}_weight"], self.weights[f"{name}_bias"]
            if isinstance(layer, nn.Linear):
                x = torch.baddbmm(bias[:, None], x, weight)
            elif isinstance(layer, ToPixels):
                x = to_pixels(x, weight, bias, self.count)
            elif isinstance(layer, nn.ConvTranspose2d):
                # The bias apart for the reason that expvae.models._layers gives.
                x = F.conv_transpose2d(x, weight, None, layer.stride, layer.padding, groups=self.count)
                x = x.add_(bias[:, None, None])
            else:
                x = F.conv2d(_channels_last(x), weight, bias, layer.stride, layer.padding, groups=self.count)
        return x

    def through(
        self, x_BCYX: Float[Tensor, "b mc y x"], layer: str | None
    ) -> tuple[Float[Tensor, "b m c h w"], Float[Tensor, "b ..."]]:
        """The outputs of a convolution, by network, and what the networks make of their inputs by way of these.

        Args:
            x_BCYX: Inputs of the networks.
            layer: Name of the convolution; None for the inputs themselves.
        """
        names = list(self.layers)
        split = names.index(layer) + 1 if layer else 0
        A_BMCHW = self(x_BCYX, names[:split]).unflatten(1, (self.count, -1))
        return A_BMCHW, self(A_BMCHW.flatten(1, 2), names[split:])

    def alone(self, index: int) -> dict[str, Tensor]:
        """The weights of one of the networks, as `load_state_dict` of a network alone takes them."""
        state = {}
        for key, value in self.weights.items():
            name, _, part = key.rpartition("_")
            if isinstance(self.layers[name], nn.Linear):
                piece = value[index].mT if part == "weight" else value[index]
            else:
                piece = value.unflatten(0, (self.count, -1))[index]
            state[f"{name}.{part}"] = piece.detach().clone()
        return state


def _channels_last(x_BCYX: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
    """The same values, channel by channel in memory; the layout of a convolution's output follows its input's.

    Images of one channel have the same memory either way, and PyTorch goes by the strides.
    """
    x_BCYX = x_BCYX.contiguous(memory_format=torch.channels_last)
    _, c, y, x = x_BCYX.shape
    if c > 1 and y * x > 1:  # the strides are right, and the backward pass of as_strided fills and copies its input
        return x_BCYX
    return x_BCYX.as_strided(x_BCYX.shape, (c * y * x, 1, c * x, c))
