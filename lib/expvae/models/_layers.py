"""Transposed convolutions of the decoders, on a CPU faster than PyTorch's own, and equal to them to rounding."""

from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ConvTranspose2d(nn.ConvTranspose2d):
    """PyTorch's transposed convolution, with its bias added afterwards.

    The gradient of a bias inside of it costs a CPU up to as much as both others together where channels come last in
    memory (oneDNN: 14 beside 10 ms for 32 channels of 32x32 positions, 11 beside 35 ms in the VAE for MNIST); the sum
    that it is takes less than one.
    """

    # A decoder asks for no size of the output.
    def forward(self, x_BCYX: Float[Tensor, "b c y x"]) -> Float[Tensor, "b k v u"]:  # type: ignore[override]
        """The weighted inputs, spread out by the stride, and the bias."""
        spread_BCYX = F.conv_transpose2d(x_BCYX, self.weight, None, self.stride, cast(tuple[int, int], self.padding))
        return spread_BCYX.add_(cast(Tensor, self.bias)[:, None, None])


def to_pixels(
    x_BCHW: Float[Tensor, "b c h w"],
    weight: Float[Tensor, "c 1 4 4"],
    bias: Float[Tensor, " m"],
    groups: int = 1,
) -> Float[Tensor, "b m y x"]:
    """`conv_transpose2d` with stride 2 and padding 1 to one channel for each group, to rounding.

    On the CPU the forward pass is one product of matrices, which gives what each position adds to each of 16 pixels,
    and `fold`, which adds that up. Beside PyTorch's kernel, which pads the one channel to a whole vector, both passes
    took 11.6 ms instead of 19.7 (dSprites), 8 instead of 14 (MNIST) and 18 instead of 35 (UCSD, batch 32) in float32
    on one thread, and in bfloat16 13 instead of 26, 9 instead of 21 and 21 instead of 53. With MVTec AD's three
    channels it is slower. The backward pass is PyTorch's.
    """
    if x_BCHW.device.type != "cpu":
        return F.conv_transpose2d(x_BCHW, weight, bias, stride=2, padding=1, groups=groups)
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        x_BCHW, weight, bias = x_BCHW.to(dtype), weight.to(dtype), bias.to(dtype)
    return _ToPixels.apply(x_BCHW, weight, bias, groups)


class ToPixels(nn.ConvTranspose2d):
    """The last layer of a decoder of grey images: kernel 4, stride 2, padding 1, one channel; see `to_pixels`."""

    # As of every decoder.
    def forward(self, x_BCHW: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 1 y x"]:  # type: ignore[override]
        """Logits of the pixels."""
        return to_pixels(x_BCHW, self.weight, cast(Tensor, self.bias))


class _ToPixels(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x_BCHW: Tensor, weight: Tensor, bias: Tensor, groups: int) -> Tensor:
        h, w = x_BCHW.shape[2:]
        # Images of either memory format are viewed, not copied.
        x_BMCN = x_BCHW.flatten(2).unflatten(1, (groups, -1))
        taps_BMTN = weight.reshape(groups, -1, 16).mT @ x_BMCN
        y_BMYX = F.fold(taps_BMTN.flatten(1, 2).to(_at_least_float32(x_BCHW)), (2 * h, 2 * w), 4, padding=1, stride=2)
        return (y_BMYX + bias[:, None, None]).to(x_BCHW.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
        x_BCHW, weight, _, ctx.groups = inputs
        ctx.save_for_backward(x_BCHW, weight)

    @staticmethod
    def backward(ctx: Any, toward_BMYX: Tensor) -> tuple:
        x_BCHW, weight = ctx.saved_tensors
        geometry = ([2, 2], [1, 1], [1, 1], True, [0, 0], ctx.groups)  # stride, padding, dilation, transposed, padding
        needed = (*ctx.needs_input_grad[:2], False)
        toward_x, toward_weight, _ = torch.ops.aten.convolution_backward(
            toward_BMYX, x_BCHW, weight, None, *geometry, needed
        )
        return toward_x, toward_weight, toward_BMYX.sum((0, 2, 3)), None


def _at_least_float32(values: Tensor) -> torch.dtype:
    return torch.promote_types(values.dtype, torch.float32)
