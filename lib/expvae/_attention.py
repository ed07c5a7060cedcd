"""Gradient attention for any encoder: which pixels make a latent what it is.

The maps of Liu et al. (2020, Section 3), of the code that its authors published, and of Brongers et al.'s reproduction,
which all differ. Nothing here knows of VAEs: an encoder is a callable from images to latents, and a layer is a module
inside it.

Notation, as suffixes of tensor names:
    B  batch                    C  channels of the layer
    H W  resolution of the layer    Y X  resolution of the image
    D  latents                  I  index of the score (a latent, or one for their sum)

With A the output of the layer and s_i a score (a function of the latents, see Method):

    α_ic   = 1/(HW) Σ_hw ∂s_i/∂A_chw          weight of channel c, global average pooling of the gradient
    L_ihw  = Σ_c α_ic A_chw                    the linear map
    M_i    = up(ReLU(L_i))                     the map, brought to the image's resolution bilinearly
    M      = 1/I Σ_i M_i                       the aggregated map

How α is computed, and how fast, is the business of expvae._gradients.
"""

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from expvae._gradients import ACTIVATIONS, CHUNK_BYTES, Flow, Normaliser, Route, widened

Score = Literal["each_mean", "sum_of_means", "each_sample", "normal_difference"]
TensorChoice = Literal["before", "after", "mixed"]
Channels = Literal["relu_of_sum", "abs_of_sum", "mean_of_abs", "sum_of_relu"]
Aggregate = Literal["mean", "sum"]
Graph = Literal["none", "constant_alpha", "second_order"]


@dataclass(frozen=True)
class Method:
    """The choices that separate the published variants of the map; the defaults are the paper's.

    Attributes:
        score: What is differentiated.

            - "each_mean": the mean of each latent, s_i = μ_i.
            - "sum_of_means": s = Σ_i μ_i, one map.
            - "each_sample": a sample of each latent, s_i = μ_i + σ_i ε_i with ε ~ N(0, 1).
            - "normal_difference": s = Σ_i u_i, one map, with u a sample of the normal difference distribution (Liu et
              al. 2020, Section 3.2). For independent z̄ ~ N(μ̄, σ̄²), the posterior of a normal image, and
              z ~ N(μ, σ²), that of the image at hand, z̄ − z is normal with mean μ̄ − μ and variance σ̄² + σ², so
              that u_i = μ̄_i − μ_i + √(σ̄_i² + σ_i²) ε_i and

                  ∂u_i/∂A = −∂μ_i/∂A + ε_i σ_i / √(σ̄_i² + σ_i²) ∂σ_i/∂A.

              μ̄ has no part in the gradient. At ε = 0 the map is that of −Σ_i μ_i: the same as "sum_of_means" where
              only its absolute value counts.
        tensor: Which tensor is weighted, and which one the gradient is taken with respect to: the layer's output
            "before" the activation that follows it, the one "after" the activation, or "mixed", the gradient before
            and the values after it (what a hook gets that stores a tensor which the activation then overwrites).
        normaliser: What the gradient is divided by: "none"; its root mean square over the "image"; or over the whole
            "batch" (both plus 1e-5), which makes the maps of an image depend on the images beside it.
        channels: "relu_of_sum" keeps what raises the score, up(ReLU(Σ_c α_c A_c)); "abs_of_sum" keeps both signs,
            |up(Σ_c α_c A_c)|; "mean_of_abs" is up(1/C Σ_c |α_c A_c|), in which channels cannot cancel; "sum_of_relu" is
            up(Σ_c ReLU(α_c A_c)).
        aggregate: The "mean" or the "sum" of the maps over the scores.
        highest: If given, only so many maps of each image are aggregated: those with the highest response, that is
            with the largest mean at the layer's resolution.
        align_corners: Whether bilinear enlargement maps corner pixels' centres onto each other.

    Raises:
        ValueError: If a choice is unknown.
    """

    score: Score = "each_mean"
    tensor: TensorChoice = "before"
    normaliser: Normaliser = "none"
    channels: Channels = "relu_of_sum"
    aggregate: Aggregate = "mean"
    highest: int | None = None
    align_corners: bool = False

    def __post_init__(self):
        for name, allowed in _CHOICES.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; choose one of: {', '.join(allowed)}")
        if self.highest is not None and self.highest < 1:
            raise ValueError(f"highest={self.highest} must be 1 or more, or None for all maps")


_CHOICES = {
    "score": get_args(Score),
    "tensor": get_args(TensorChoice),
    "normaliser": get_args(Normaliser),
    "channels": get_args(Channels),
    "aggregate": get_args(Aggregate),
}

PRESETS = {
    "liu2020_paper": Method(),
    "liu2020_code": Method(score="sum_of_means", normaliser="batch", channels="abs_of_sum"),
    "brongers2021": Method(score="sum_of_means", normaliser="batch", channels="mean_of_abs", align_corners=True),
    "brongers2021_disentanglement": Method(
        score="each_sample", tensor="mixed", channels="sum_of_relu", align_corners=True
    ),
}


@dataclass(frozen=True)
class Attention:
    """Attention of a batch at one layer; half-precision values have become float32.

    Attributes:
        alpha_BIC: Weight of each channel for each score.
        values_BCHW: The tensor that is weighted: the layer's output, or that of the activation after it.
        latents_BD: The values that the scores are made of: means, samples or differences of all latents.
        encoded: All that the encoder put out, as a VAE's (mu, logvar).
        method: How the maps are made.
        size: Height and width of the images.
        route: The way that α was computed.
    """

    alpha_BIC: Float[Tensor, "b i c"]
    values_BCHW: Float[Tensor, "b c h w"]
    latents_BD: Float[Tensor, "b d"]
    encoded: tuple[Tensor, ...]
    method: Method
    size: tuple[int, int]
    route: Route

    @cached_property
    def linear_BIHW(self) -> Float[Tensor, "b i h w"]:
        """Σ_c α_c A_c, signed, at the layer's resolution."""
        return _weighted(self.alpha_BIC, self.values_BCHW)

    @cached_property
    def map_BIHW(self) -> Float[Tensor, "b i h w"]:
        """One non-negative map per score, at the layer's resolution."""
        match self.method.channels:
            case "relu_of_sum":
                return self.linear_BIHW.relu()
            case "abs_of_sum":
                return self.linear_BIHW.abs()
            case "mean_of_abs":
                # |α_c A_c| = |α_c| |A_c|: the [B, I, C, H, W] of the products is not needed.
                return _weighted(self.alpha_BIC.abs(), self.values_BCHW.abs()) / self.alpha_BIC.shape[2]
            case "sum_of_relu":
                # A product is positive where both factors are, or neither is.
                raising = _weighted(self.alpha_BIC.relu(), self.values_BCHW.relu())
                return raising + _weighted((-self.alpha_BIC).relu(), (-self.values_BCHW).relu())

    @cached_property
    def response_BI(self) -> Float[Tensor, "b i"]:
        """Response of each score: the mean of its map at the layer's resolution."""
        return self.map_BIHW.mean((2, 3))

    def highest_BK(self, k: int) -> Int64[Tensor, "b k"]:
        """Indices of the k scores with the highest response of each image, the highest first.

        Raises:
            ValueError: If there are fewer than k scores.
        """
        scores = self.alpha_BIC.shape[1]
        if not 1 <= k <= scores:
            raise ValueError(f"k={k} must lie between 1 and {scores}, the number of scores")
        return self.response_BI.topk(k, dim=1).indices

    @property
    def map_BIYX(self) -> Float[Tensor, "b i y x"]:
        """One non-negative map per score, at the images' resolution."""
        return self._enlarged(slice(None))

    @property
    def map_BYX(self) -> Float[Tensor, "b y x"]:
        """The maps aggregated over the scores, at the images' resolution."""
        method, (b, i, _) = self.method, self.alpha_BIC.shape
        weight_BI = torch.ones_like(self.response_BI)
        if method.highest is not None:
            weight_BI = torch.zeros_like(weight_BI).scatter(1, self.highest_BK(method.highest), 1.0)
        if method.aggregate == "mean":
            weight_BI = weight_BI / weight_BI.sum(1, keepdim=True)
        if method.channels != "abs_of_sum":
            # Bilinear enlargement is linear: one aggregated map is brought up instead of I of them.
            map_B1HW = _weighted(weight_BI.unsqueeze(1), self.map_BIHW)
            return upsample(map_B1HW, self.size, method.align_corners).squeeze(1)
        at_once = max(1, CHUNK_BYTES // (4 * b * self.size[0] * self.size[1]))
        parts = [slice(start, start + at_once) for start in range(0, i, at_once)]
        return sum(_weighted(weight_BI[:, None, part], self._enlarged(part)) for part in parts).squeeze(1)

    def _enlarged(self, part: slice) -> Tensor:
        if self.method.channels == "abs_of_sum":
            return upsample(self.linear_BIHW[:, part], self.size, self.method.align_corners).abs()
        return upsample(self.map_BIHW[:, part], self.size, self.method.align_corners)


def attention(
    encode: Callable[[Tensor], Tensor | tuple[Tensor, ...]],
    layer: str | nn.Module,
    x_BCYX: Float[Tensor, "b c y x"],
    method: str | Method = "liu2020_paper",
    *,
    latents: Sequence[int] | Tensor | None = None,
    normal: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    graph: Graph | str = "none",
    route: Route | str = "auto",
) -> Attention:
    """Attention maps of a batch of images (Liu et al. 2020, equations 1 to 4; see the module's docstring).

    The model is left as it was found: hooks, training flags and the gradients of its parameters are not touched.

    Args:
        encode: Maps images to latents [B, D], or to a tuple that starts with them, as a VAE's (mu, logvar). Scores that
            are sampled need the tuple. Activations in place, residual connections and half precision are fine.
        layer: The module whose output is explained, or its dotted path inside `encode`; for a path, `encode` has to
            be a module or a method of one.
        x_BCYX: Images.
        method: A name in PRESETS, or a Method.
        latents: Indices of the latents that make up the scores, in this order; all if None.
        normal: For the score "normal_difference": mean and logarithm of the variance of the posterior of a normal
            image, each [D] or [B, D].
        generator: Source of ε for the scores "each_sample" and "normal_difference"; ε is drawn as [B, D].
        graph: What can be differentiated in turn, for a loss on the maps: "none"; with "constant_alpha" the maps depend
            on the model through A only; with "second_order" through α as well. `encoded` and `latents_BD` then are
            part of the same graph, so that one pass through the encoder serves all losses.
        route: How α is computed, see expvae._gradients; "auto" takes the fastest one by rule.

    Raises:
        ValueError: If a choice, the layer or a latent is unknown; if the layer is not reached, is reached twice or
            does not put out [B, C, H, W]; if the latents do not depend on it; if a module of batch normalisation is in
            training mode, so that the images of a batch depend on each other; if a score lacks its logvar, `normal` or
            `generator`; if a route is asked for that this model or method does not allow; if there are fewer scores
            than the method's `highest`; if there is no image; or if α or A has values that are not finite.
        TypeError: If a path is given and `encode` is no module, or if `encode` puts out no latents [B, D].
    """
    if isinstance(method, str):
        if method not in PRESETS:
            raise ValueError(f"method={method!r} is unknown; choose one of: {', '.join(PRESETS)}")
        method = PRESETS[method]
    for name, value, kind in (("graph", graph, Graph), ("route", route, Route)):
        if value not in get_args(kind):
            raise ValueError(f"{name}={value!r} is unknown; choose one of: {', '.join(get_args(kind))}")
    if len(x_BCYX) == 0:
        raise ValueError("x_BCYX must hold at least one image, got none")
    module = _find(encode, layer)
    named = f"layer={layer!r}" if isinstance(layer, str) else f"layer={type(layer).__name__}(...)"
    with torch.inference_mode(False), torch.enable_grad():
        x_BCYX = x_BCYX.clone() if x_BCYX.is_inference() else x_BCYX
        with _outputs(module, graph != "none") as outputs:
            encoded = _as_written(encode, _recorded(x_BCYX, module))
        if len(outputs) != 1:
            times = f"is reached {len(outputs)} times" if outputs else "is not reached"
            here = "" if outputs else " by the calling thread (of nn.DataParallel or a script, give the model in it)"
            raise ValueError(f"{named} {times} on the way from the images to the latents; it must be once{here}")
        (output,) = outputs
        if not isinstance(output, _Output):
            raise ValueError(f"{named} puts out {output}, not the [B, C, H, W] of a convolution")
        A_BCHW = output.values_BCHW
        encoded = (encoded,) if isinstance(encoded, Tensor) else encoded
        _require_latents(encoded)
        latents_BD = _latents(encoded, method.score, normal, generator)
        score_BI = _scores(latents_BD, method.score, latents)
        flow = Flow.between(output.edge, A_BCHW.shape, score_BI.sum(0)) if output.edge is not None else None
        if flow is None:
            raise ValueError(
                f"{named}: the latents do not depend on its output, or encode does not record gradients, as under "
                "torch.no_grad, torch.inference_mode or checkpoint(..., use_reentrant=True): take these away"
            )
        output.require_one_value(named, flow)
        values_BCHW = A_BCHW
        if method.tensor != "before":
            activation = flow.activation()
            if activation is None:
                names = ", ".join(dict.fromkeys(name.partition("Backward")[0] for name in ACTIVATIONS))
                raise ValueError(
                    f"{named}: no activation ({names}) follows it directly, which tensor={method.tensor!r} "
                    "needs; to explain what an activation puts out, give the activation as the layer"
                )
            values_BCHW = ACTIVATIONS[activation.name()](A_BCHW, activation)
            flow = flow.after(activation) if method.tensor == "after" else flow
        # Where the encoder runs under autocast, the sums here keep their digits.
        with torch.autocast(x_BCYX.device.type, enabled=False):
            alpha_BIC, route = flow.mean_gradient(method.normaliser, route, second_order=graph == "second_order")
        values_BCHW = widened(values_BCHW)
        alpha_BIC = alpha_BIC.to(values_BCHW.dtype)
    if graph == "none":
        alpha_BIC, values_BCHW, latents_BD = alpha_BIC.detach(), values_BCHW.detach(), latents_BD.detach()
        encoded = tuple(tensor.detach() if isinstance(tensor, Tensor) else tensor for tensor in encoded)
    elif graph == "constant_alpha":
        alpha_BIC = alpha_BIC.detach()
    if not (_finite(alpha_BIC) and _finite(values_BCHW)):
        raise ValueError(f"{named}: its output or the gradient there has values that are not finite")
    if method.highest is not None and method.highest > alpha_BIC.shape[1]:
        raise ValueError(f"highest={method.highest} is more than the {alpha_BIC.shape[1]} scores there are")
    return Attention(alpha_BIC, values_BCHW, latents_BD, tuple(encoded), method, tuple(x_BCYX.shape[-2:]), route)


def upsample(
    map_BIHW: Float[Tensor, "b i h w"], size: tuple[int, int], align_corners: bool = False
) -> Float[Tensor, "b i y x"]:
    """Bilinear interpolation to the size of the image."""
    return F.interpolate(map_BIHW, size=size, mode="bilinear", align_corners=align_corners)


# --- the encoder's pass ------------------------------------------------------------------------------------------


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


@dataclass(frozen=True)
class _Output:
    """What the layer put out, found where autograd recorded it: whoever reads it, and whichever way, comes after.

    The encoder goes on with the very tensor, except where a change of it in place would lead past its place in the
    graph (autograd has a view change its base, and takes no change of a leaf) or spoil values that are part of the
    graph. Then it goes on with a copy.

    Attributes:
        tensor: The tensor itself.
        edge: Its place in the graph; None where gradients were not recorded.
        values_BCHW: Its values, safe from changes in place.
        copy: What the encoder went on with instead, if it did.
        version: Autograd's count of the tensor's changes in place, as it was put out.
    """

    tensor: Tensor
    edge: GradientEdge | None
    values_BCHW: Tensor
    copy: Tensor | None
    version: int

    @classmethod
    def of(cls, tensor: Tensor, attached: bool) -> "_Output":
        """The output; if attached, its values are part of the graph and come before all that follows."""
        if not torch.is_grad_enabled():
            return cls(tensor, None, tensor, None, 0)
        leaf = tensor.is_leaf
        edge = get_gradient_edge(tensor.requires_grad_())
        copy = tensor.clone() if attached or leaf or tensor._is_view() else None
        return cls(tensor, edge, tensor if attached else tensor.detach().clone(), copy, tensor._version)

    def require_one_value(self, named: str, flow: Flow) -> None:
        """Refuse a copy where the encoder changed one of the two in place and read the other."""
        if self.copy is None:
            return
        base = self.tensor._base
        others = [] if base is None or not base.requires_grad else flow.users.get(get_gradient_edge(base).node, [])
        read_too = len(flow.users[self.edge.node]) > 1 or others
        if self.tensor._version != self.version or (self.copy._version and read_too):
            raise ValueError(
                f"{named}: its output shares memory with a tensor that is read or changed in place beside it; "
                "take away the change in place, as of ReLU(inplace=True), or have the layer put out a .clone()"
            )


def _recorded(x_BCYX: Tensor, module: nn.Module) -> Tensor:
    """The images, so that autograd records what the layer does even where none of its own parameters asks for it."""
    learns = any(parameter.requires_grad for parameter in module.parameters())
    if learns or x_BCYX.requires_grad or not x_BCYX.is_floating_point():
        return x_BCYX
    return x_BCYX.detach().requires_grad_().clone()  # no leaf, which the encoder could not change in place


@contextmanager
def _outputs(module: nn.Module, attached: bool) -> Iterator[list]:
    """Collect what the module puts out."""
    outputs, here = [], threading.get_ident()

    def keep(_module: nn.Module, _inputs: tuple, output: object) -> object:
        if threading.get_ident() != here:  # another thread uses the same model
            return output
        if not isinstance(output, Tensor) or output.ndim != 4:
            outputs.append(list(output.shape) if isinstance(output, Tensor) else type(output).__name__)
            return output
        output = output.clone() if output.is_inference() and torch.is_grad_enabled() else output
        if torch.is_grad_enabled() and not output.requires_grad and not attached:
            hooks.callback(output.requires_grad_, False)
        outputs.append(_Output.of(output, attached))
        return output if outputs[-1].copy is None else outputs[-1].copy

    def refuse(normalisation: nn.Module, _inputs: tuple) -> None:
        uses_batch = isinstance(normalisation, _BatchNorm) and (
            normalisation.training or normalisation.running_mean is None
        )
        if uses_batch and threading.get_ident() == here:
            raise ValueError(
                "batch normalisation in training mode makes the images of a batch depend on each other; "
                "put the model in evaluation mode first: model.eval()"
            )

    with ExitStack() as hooks:
        hooks.callback(module.register_forward_hook(keep).remove)
        hooks.callback(register_module_forward_pre_hook(refuse).remove)
        yield outputs


_eager_lock, _eager = threading.Lock(), []  # of all threads, each one's own over those of who came before


def _as_written(encode: Callable, x_BCYX: Tensor) -> object:
    """What encode puts out, not as torch.compile made it: compiled code calls no hook, or keeps it for good."""
    if "torch._dynamo" not in sys.modules:  # who has compiled has imported it
        return encode(x_BCYX)
    return torch.compiler.disable(_forced_eager)(encode, x_BCYX)


def _forced_eager(encode: Callable, x_BCYX: Tensor) -> object:
    with _eager_lock:
        _eager.append(torch.compiler.set_stance("force_eager"))
    try:
        return encode(x_BCYX)
    finally:
        with _eager_lock:  # who leaves last restores what there was before the first
            _eager.pop().__exit__(None, None, None)


def _require_latents(encoded: object) -> None:
    """Refuse what is no tuple of tensors that starts with latents [B, D]."""
    first = encoded[0] if isinstance(encoded, tuple | list) and len(encoded) else encoded
    if not isinstance(first, Tensor) or first.ndim != 2:
        got = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise TypeError(
            f"encode must put out latents [B, D], or a tuple that starts with them, as (mu, logvar); got {got}: "
            "wrap it in a function that picks them, and give the layer as a module"
        )


def _latents(
    encoded: tuple, score: Score, normal: tuple[Tensor, Tensor] | None, generator: torch.Generator | None
) -> Float[Tensor, "b d"]:
    """The means, a sample, or a sample of the normal difference distribution."""
    mu_BD = encoded[0]
    if score in ("each_mean", "sum_of_means"):
        return mu_BD
    if len(encoded) < 2:
        raise ValueError(f"score={score!r} needs an encoder that gives (mu, logvar); this one gives one tensor")
    if generator is None:
        raise ValueError(f"score={score!r} draws samples; give generator=torch.Generator().manual_seed(...)")
    epsilon_BD = torch.randn(mu_BD.shape, generator=generator, device=generator.device).to(mu_BD)
    logvar_BD = encoded[1]
    if score == "each_sample":
        return mu_BD + (0.5 * logvar_BD).exp() * epsilon_BD
    if normal is None:
        raise ValueError(f"score={score!r} needs normal=(mu, logvar), the posterior of a normal image")
    normal_mu, normal_logvar = (value.detach().to(mu_BD) for value in normal)
    # √(σ̄² + σ²) by its logarithm: a variance too small for the type would have no gradient.
    return normal_mu - mu_BD + (0.5 * torch.logaddexp(normal_logvar, logvar_BD)).exp() * epsilon_BD


def _scores(latents_BD: Tensor, score: Score, latents: Sequence[int] | Tensor | None) -> Float[Tensor, "b i"]:
    if latents is not None:
        chosen_I, d = torch.as_tensor(latents).cpu(), latents_BD.shape[1]
        # A mask of booleans would be read as indices 0 and 1.
        whole = not (chosen_I.dtype == torch.bool or chosen_I.is_floating_point() or chosen_I.is_complex())
        chosen = chosen_I.tolist()
        if not (whole and chosen_I.ndim == 1 and chosen and set(chosen) <= set(range(d))):
            raise ValueError(f"latents={chosen} must be one or more indices between 0 and {d - 1}")
        if len(set(chosen)) < len(chosen):
            raise ValueError(f"latents={chosen} must name each latent once")
        latents_BD = latents_BD[:, chosen]
    return latents_BD if score.startswith("each") else latents_BD.sum(1, keepdim=True)


def _finite(values: Tensor) -> bool:
    # NaN and ±inf stay in a sum, which needs no tensor of flags; a sum may overflow where no value is infinite.
    return bool(values.detach().sum().isfinite()) or bool(values.isfinite().all())


def _weighted(alpha_BIC: Tensor, values_BCHW: Tensor) -> Float[Tensor, "b i h w"]:
    with torch.autocast(alpha_BIC.device.type, enabled=False):
        return torch.einsum("bic,bchw->bihw", alpha_BIC, values_BCHW)
