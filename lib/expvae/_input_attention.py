"""Attention in the space of the input, for encoders without a layer that has positions.

The maps of expvae.attention weigh the channels of a layer [B, C, H, W] by their mean gradient. Where every layer is
fully connected only the image itself has positions, and the gradient need not be averaged over them.

Suffixes of tensor names as in expvae.attention.
"""

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

CHUNK = 2**26  # values of the gradients that are held at once


def gradient_times_input(
    encode: Callable[[Float[Tensor, "b c y x"]], Float[Tensor, "b d"]], x_BCYX: Float[Tensor, "b c y x"]
) -> Float[Tensor, "b y x"]:
    """Aggregated map of the gradient of each latent times the input (Shrikumar et al. 2016).

        M_yx = 1/D Σ_i ReLU( Σ_c x_cyx ∂h_i/∂x_cyx )

    This is the map of Liu et al. (2020, eq. 3 and 4) with the image in place of a layer, and without the average of the
    gradient over positions. It is zero wherever the image is.

    Args:
        encode: Maps images to latents [B, D], each image by itself, and can be differentiated.
        x_BCYX: Images.

    Raises:
        ValueError: If there is no image, or the latents are not [B, D].
    """
    if len(x_BCYX) == 0:
        raise ValueError("x_BCYX must hold at least one image, got none")
    with torch.enable_grad():
        x_BCYX = x_BCYX.detach().clone().requires_grad_()
        latents_BD = encode(x_BCYX)
        if latents_BD.ndim != 2 or len(latents_BD) != len(x_BCYX):
            raise ValueError(
                f"encode must put out latents [B, D] for {len(x_BCYX)} images, got {list(latents_BD.shape)}"
            )
        b, d = latents_BD.shape
        # Images are independent of each other: the gradient of a latent's sum over the batch holds that of each image.
        pick_DBD = torch.eye(d, dtype=latents_BD.dtype, device=latents_BD.device)[:, None].expand(d, b, d)
        map_BYX = torch.zeros_like(x_BCYX[:, 0]).detach()
        for pick_IBD in pick_DBD.split(max(1, CHUNK // x_BCYX.numel())):
            (gradient_IBCYX,) = torch.autograd.grad(
                latents_BD, x_BCYX, pick_IBD, retain_graph=True, is_grads_batched=True
            )
            map_BYX += (gradient_IBCYX * x_BCYX.detach()).sum(2).relu().sum(0)
    return map_BYX / d
