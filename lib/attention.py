"""Gradient attention for any encoder: which pixels make a latent what it is.

The maps of Liu et al. (2020, Section 3.1) and of the code that its authors published, which differ. Nothing here
knows of VAEs: an encoder is a callable from images to latents, and a layer is a module inside it.

Notation, as suffixes of tensor names:
    B  batch                    C  channels of the layer
    H W  resolution of the layer    Y X  resolution of the image
    I  index of the score (a latent, or one for their sum)

With A the output of the layer and s_i a score:

    α_ic   = 1/(HW) Σ_hw ∂s_i/∂A_chw          weight of channel c, global average pooling of the gradient
    L_ihw  = Σ_c α_ic A_chw                    the linear map
    M_i    = up(ReLU(L_i))  or  |up(L_i)|      the map, brought to the image's resolution bilinearly
    M      = 1/I Σ_i M_i                       the aggregated map
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

RMS_EPSILON = 1e-5  # the authors' code adds it to the root mean square of the gradient


@dataclass(frozen=True)
class Method:
    """The choices that separate the published variants of the map.

    Attributes:
        score: What is differentiated: "each_mean" gives one map per latent mean μ_i; "sum_of_means" one map of Σ_i μ_i.
        normaliser: What the gradient is divided by: "none", or for "batch" its root mean square over the whole
            batch (plus 1e-5), which makes the maps of an image depend on the images beside it.
        channels: "sum_relu" keeps what raises the score, up(ReLU(Σ_c α_c A_c)); "sum_abs" keeps both signs,
            |up(Σ_c α_c A_c)|.
    """

    score: Literal["each_mean", "sum_of_means"]
    normaliser: Literal["none", "batch"]
    channels: Literal["sum_relu", "sum_abs"]


PRESETS = {
    "liu2020_paper": Method(score="each_mean", normaliser="none", channels="sum_relu"),
    "liu2020_code": Method(score="sum_of_means", normaliser="batch", channels="sum_abs"),
}


@dataclass(frozen=True)
class Attention:
    """Attention of a batch at one layer.

    Attributes:
        alpha_BIC: Weight of each channel for each score.
        linear_BIHW: Σ_c α_c A_c, signed, at the layer's resolution.
        method: How the maps are made of it.
        size: Height and width of the images.
    """

    alpha_BIC: Float[Tensor, "b i c"]
    linear_BIHW: Float[Tensor, "b i h w"]
    method: Method
    size: tuple[int, int]

    @property
    def map_BIYX(self) -> Float[Tensor, "b i y x"]:
        """One non-negative map per score, at the images' resolution."""
        if self.method.channels == "sum_relu":
            return upsample(self.linear_BIHW.relu(), self.size)
        return upsample(self.linear_BIHW, self.size).abs()

    @property
    def map_BYX(self) -> Float[Tensor, "b y x"]:
        """The mean of the maps over the scores, at the images' resolution."""
        if self.method.channels == "sum_relu":
            # Bilinear upsampling is linear: one mean map is brought up instead of I of them.
            return upsample(self.linear_BIHW.relu().mean(1, keepdim=True), self.size).squeeze(1)
        return self.map_BIYX.mean(1)


def attention(
    encode: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    layer: str | nn.Module,
    x_BCYX: Float[Tensor, "b c y x"],
    method: str | Method = "liu2020_paper",
) -> Attention:
    """Attention maps of a batch of images (Liu et al. 2020, equations 1 to 4; see the module's docstring).

    The model is left as it was found: hooks and the gradients of its parameters are not touched.

    Args:
        encode: Maps images to latents [B, D], or to a tuple that starts with them, as a VAE's (mu, logvar).
        layer: The module whose output is explained, or its dotted path inside `encode`; for a path, `encode` has to
            be a module or a method of one.
        x_BCYX: Images.
        method: A name in PRESETS, or a Method.

    Raises:
        ValueError: If the method or the layer is unknown, if the layer is not reached or is reached twice or is no
            convolution, if the latents do not depend on it, or if a map has values that are not finite.
        TypeError: If a path is given and `encode` is no module.
    """
    if isinstance(method, str):
        if method not in PRESETS:
            raise ValueError(f"method={method!r} is unknown; choose one of: {', '.join(PRESETS)}")
        method = PRESETS[method]
    module = _find(encode, layer)
    with torch.enable_grad(), _outputs(module) as outputs:
        latents = encode(x_BCYX)
    if len(outputs) != 1:
        times = "is not reached" if not outputs else f"is reached {len(outputs)} times"
        raise ValueError(f"layer={layer!r} {times} on the way from the images to the latents; it must be once")
    A_BCHW = outputs[0]
    if A_BCHW.ndim != 4:
        raise ValueError(f"layer={layer!r} puts out {list(A_BCHW.shape)}, not the [B, C, H, W] of a convolution")
    # The images of a batch do not influence each other, so one backward pass serves them all.
    with torch.enable_grad():
        latents_BI = latents if isinstance(latents, Tensor) else latents[0]
        score_I = latents_BI.sum(0) if method.score == "each_mean" else latents_BI.sum().unsqueeze(0)
        scores = score_I.unbind() if score_I.requires_grad else ()

    alphas = []
    for score in scores:
        (gradient_BCHW,) = torch.autograd.grad(score, A_BCHW, retain_graph=True, allow_unused=True)
        if gradient_BCHW is None:
            break
        alpha_BC = gradient_BCHW.mean((2, 3))
        if method.normaliser == "batch":
            alpha_BC = alpha_BC / (gradient_BCHW.square().mean().sqrt() + RMS_EPSILON)
        alphas.append(alpha_BC)
    if len(alphas) < len(score_I):
        raise ValueError(f"layer={layer!r}: the latents do not depend on its output")
    alpha_BIC = torch.stack(alphas, 1)
    linear_BIHW = torch.einsum("bic,bchw->bihw", alpha_BIC, A_BCHW.detach())
    if not linear_BIHW.isfinite().all():
        raise ValueError(f"layer={layer!r}: the attention map has values that are not finite")
    return Attention(alpha_BIC, linear_BIHW, method, tuple(x_BCYX.shape[-2:]))


def upsample(map_BIHW: Float[Tensor, "b i h w"], size: tuple[int, int]) -> Float[Tensor, "b i y x"]:
    """Bilinear interpolation to the size of the image (corners not aligned)."""
    return F.interpolate(map_BIHW, size=size, mode="bilinear", align_corners=False)


def _find(encode: Callable, layer: str | nn.Module) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    root = encode if isinstance(encode, nn.Module) else getattr(encode, "__self__", None)
    if not isinstance(root, nn.Module):
        raise TypeError(f"layer={layer!r} is a path, but encode is no module; give the layer itself as a module")
    modules = dict(root.named_modules())
    if not layer or layer not in modules:
        candidates = [name for name, module in modules.items() if isinstance(module, nn.Conv2d)]
        raise ValueError(f"layer={layer!r} is unknown; convolutions of this model: {', '.join(candidates) or 'none'}")
    return modules[layer]


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collect what the module puts out, as leaves of the graph from there to the latents."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        outputs.append(output.detach().requires_grad_())
        # A copy goes on: an activation in place (ReLU(inplace=True)) would change what is kept.
        return outputs[-1].clone()

    handle = module.register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()
