"""The attention in the form in which captum gives Grad-CAM of a layer."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expvae._attention import attention


class LatentGradCAM:
    """Grad-CAM of the latents of an encoder, called as captum's `LayerGradCam` is.

        maps_B1HW = LatentGradCAM(vae.encode, vae.encoder.conv2).attribute(x_BCYX, target=3)

    What it gives is what captum gives for a forward function that returns the latents [B, D] of a plain network. Other
    than there, the encoder may also put out a posterior, activations may work in place, and batch normalisation in
    training mode is refused.

    Args:
        encode: The encoder, as for `expvae.attention`.
        layer: The module whose output is explained, or its dotted path inside `encode`.
    """

    def __init__(self, encode: Callable[[Tensor], Any], layer: str | nn.Module):
        self.encode, self.layer = encode, layer

    def attribute(
        self,
        inputs: Float[Tensor, "b c y x"],
        target: int | Sequence[int] | Tensor | None = None,
        *,
        relu_attributions: bool = False,
    ) -> Float[Tensor, "b 1 h w"]:
        """The map of one latent of each image, Σ_c α_c A_c, at the layer's resolution; `upsample` enlarges it.

        Args:
            inputs: Images.
            target: Index of the latent, for all images or one for each of them. Without one, the mean of the maps of
                all latents; with `relu_attributions` that is the aggregated map of Liu et al. (2020, equation 4).
            relu_attributions: Whether to keep only what raises the latent.

        Raises:
            ValueError: If there are neither one target nor as many as images, or as for `expvae.attention`.
            TypeError: As for `expvae.attention`.
        """
        latents, place_B = None, None
        if target is not None:
            target_B = torch.as_tensor(target).cpu().flatten()
            if len(target_B) not in (1, len(inputs)):
                raise ValueError(f"target must be one latent, or one for each of {len(inputs)} images; got {target}")
            latents, place_B = target_B.unique(return_inverse=True)
        found = attention(self.encode, self.layer, inputs, latents=latents)
        map_BIHW = found.map_BIHW if relu_attributions else found.linear_BIHW
        if place_B is None:
            return map_BIHW.mean(1, keepdim=True)
        return map_BIHW[torch.arange(len(inputs)), place_B.expand(len(inputs))].unsqueeze(1)
