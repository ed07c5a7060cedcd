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

What A and the scores are, and where they stand in the graph, is the business of expvae._encoder; how α is computed, and
how fast, that of expvae._gradients.
"""

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, TypeVar, cast, get_args, overload

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from expvae._encoder import Score, latents_of, noise, scores_of, through
from expvae._gradients import CHUNK_BYTES, Normaliser, Route, mean_gradients, widened

Name = TypeVar("Name", bound=Hashable)
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
            - "most_deviant": the mean of the one latent of each image that is furthest from its normal value, s = μ_j
              with j = argmax_i |μ_i − μ̄_i| / σ̄_i. One map; ours, as no publication chooses a latent by a rule.
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
        encoded: What the encoder put out, as a VAE's (mu, logvar).
        method: How the maps are made.
        size: Height and width of the images.
        route: The way that α was computed.
    """

    alpha_BIC: Float[Tensor, "b i c"]
    values_BCHW: Float[Tensor, "b c h w"]
    latents_BD: Float[Tensor, "b d"]
    encoded: tuple[Any, ...]
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
        summed = (_weighted(weight_BI[:, None, part], self._enlarged(part)) for part in parts)
        return sum(summed, weight_BI.new_zeros(())).squeeze(1)

    def _enlarged(self, part: slice) -> Tensor:
        if self.method.channels == "abs_of_sum":
            return upsample(self.linear_BIHW[:, part], self.size, self.method.align_corners).abs()
        return upsample(self.map_BIHW[:, part], self.size, self.method.align_corners)


@overload
def attention(
    encode: Callable[[Tensor], Any],
    layer: str | nn.Module,
    x_BCYX: Float[Tensor, "b c y x"],
    method: str | Method = ...,
    *,
    latents: Sequence[int] | Tensor | None = None,
    normal: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    graph: Graph | str = "none",
    route: Route | str = "auto",
) -> Attention: ...


@overload
def attention(
    encode: Callable[[Tensor], Any],
    layer: str | nn.Module,
    x_BCYX: Float[Tensor, "b c y x"],
    method: Mapping[Name, str | Method],
    *,
    latents: Sequence[int] | Tensor | None = None,
    normal: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    graph: Graph | str = "none",
    route: Route | str = "auto",
) -> dict[Name, Attention]: ...


def attention(
    encode: Callable[[Tensor], Any],
    layer: str | nn.Module,
    x_BCYX: Float[Tensor, "b c y x"],
    method: str | Method | Mapping[Name, str | Method] = "liu2020_paper",
    *,
    latents: Sequence[int] | Tensor | None = None,
    normal: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    graph: Graph | str = "none",
    route: Route | str = "auto",
) -> Attention | dict[Name, Attention]:
    """Attention maps of a batch of images (Liu et al. 2020, equations 1 to 4; see the module's docstring).

    The model is left as it was found: hooks, training flags and the gradients of its parameters are not touched.

    Several methods at once share the pass through the encoder, and those with the same score and place of the gradient
    its backward passes too, whatever they divide the gradient by and make of it. The maps of each are those of a call
    with this method alone and the generator in the same state.

    Args:
        encode: Maps images to latents [B, D]; to a tuple that starts with them, as a VAE's (mu, logvar); to a dict or
            dataclass with mu (or mean, loc) and logvar (or log_var); or to a Normal of torch.distributions. Scores
            that are sampled need both. Activations in place, residual connections and half precision are fine.
        layer: The module whose output is explained, or its dotted path inside `encode`; for a path, `encode` has to
            be a module or a method of one.
        x_BCYX: Images.
        method: A name in PRESETS, or a Method; or several of them, by names of one's own.
        latents: Indices of the latents that make up the scores, in this order; all if None.
        normal: For the scores "normal_difference" and "most_deviant": mean and logarithm of the variance of the
            posterior of a normal image, or of normal images together, each [D] or [B, D].
        generator: Source of ε for the scores "each_sample" and "normal_difference"; ε is drawn as [B, D], once
            for all methods.
        graph: What can be differentiated in turn, for a loss on the maps: "none"; with "constant_alpha" the maps depend
            on the model through A only; with "second_order" through α as well. `encoded` and `latents_BD` then are
            part of the same graph, so that one pass through the encoder serves all losses.
        route: How α is computed, see expvae._gradients; "auto" takes the fastest one by rule.

    Returns:
        The attention of the batch; of several methods a dict with the same names.

    Raises:
        ValueError: If a choice, the layer or a latent is unknown; if the layer is not reached, is reached twice or
            does not put out [B, C, H, W]; if the latents do not depend on it; if a module of batch normalisation is in
            training mode, so that the images of a batch depend on each other; if a score lacks its logvar, `normal` or
            `generator`; if a route is asked for that this model or method does not allow; if there are fewer scores
            than the method's `highest`; if there is no image; or if α or A has values that are not finite.
        TypeError: If a path is given and `encode` is no module, or if `encode` puts out no latents [B, D].
    """
    wanted = {name: (layer, one) for name, one in (method if isinstance(method, Mapping) else {None: method}).items()}
    found: dict[Any, Attention] = attentions(
        encode, wanted, x_BCYX, latents=latents, normal=normal, generator=generator, graph=graph, route=route
    )
    return found if isinstance(method, Mapping) else found[None]


def attentions(
    encode: Callable[[Tensor], Any],
    wanted: Mapping[Name, tuple[str | nn.Module, str | Method]],
    x_BCYX: Float[Tensor, "b c y x"],
    *,
    latents: Sequence[int] | Tensor | None = None,
    normal: tuple[Tensor, Tensor] | None = None,
    generator: torch.Generator | None = None,
    graph: Graph | str = "none",
    route: Route | str = "auto",
) -> dict[Name, Attention]:
    """Attention at several layers by several methods: by names of one's own, the layer and the method of each.

        wanted = {layer: (f"encoder.{layer}", "liu2020_code") for layer in ("conv1", "conv2", "conv3")}
        maps = attentions(vae.encode, wanted, x_BCYX)

    All share the pass through the encoder, and those with the same score its backward passes too, which go on from the
    last layer to the first. Each is what `attention` gives for it alone, which describes the arguments and errors.
    """
    methods = {name: (layer, _known(method)) for name, (layer, method) in wanted.items()}
    for name, value, kind in (("graph", graph, Graph), ("route", route, Route)):
        if value not in get_args(kind):
            raise ValueError(f"{name}={value!r} is unknown; choose one of: {', '.join(get_args(kind))}")
    if len(x_BCYX) == 0:
        raise ValueError("x_BCYX must hold at least one image, got none")
    alike: defaultdict[Score, dict[Any, tuple[str | nn.Module, Method]]] = defaultdict(dict)
    for name, (layer, one) in methods.items():
        alike[one.score][name] = layer, one
    results, size = {}, (x_BCYX.shape[2], x_BCYX.shape[3])
    with torch.inference_mode(False), torch.enable_grad():
        x_BCYX = x_BCYX.clone() if x_BCYX.is_inference() else x_BCYX
        outputs, encoded = through(encode, [layer for layer, _ in methods.values()], x_BCYX, attached=graph != "none")
        kept = encoded if graph != "none" else tuple(map(_detached, encoded))
        epsilon_BD = noise(encoded, alike, generator)
        for score, sharing in alike.items():
            latents_BD = latents_of(encoded, score, normal, epsilon_BD)
            shown_BD = latents_BD if graph != "none" else latents_BD.detach()
            score_I, flows, values = scores_of(latents_BD, score, latents, normal).sum(0), [], []
            for layer, one in sharing.values():
                flow, values_BCHW = outputs[layer].flow(score_I), outputs[layer].values_BCHW
                if one.tensor != "before":
                    values_BCHW, after = flow.activated(values_BCHW, outputs[layer].named)
                    flow = after if one.tensor == "after" else flow
                flows.append((flow, one.normaliser))
                values.append(widened(values_BCHW))
            # Where the encoder runs under autocast, the sums here keep their digits.
            with torch.autocast(x_BCYX.device.type, enabled=False):
                alphas = mean_gradients(flows, cast(Route, route), second_order=graph == "second_order")
            for (name, (layer, one)), values_BCHW, (alpha_BIC, taken) in zip(
                sharing.items(), values, alphas, strict=True
            ):
                alpha_BIC = alpha_BIC.to(values_BCHW.dtype)
                _require_readable(outputs[layer].named, one, alpha_BIC, values_BCHW)
                results[name] = Attention(alpha_BIC, values_BCHW, shown_BD, kept, one, size, taken)
    return {name: results[name] for name in methods}


def upsample(
    map_BIHW: Float[Tensor, "b i h w"], size: tuple[int, int], align_corners: bool = False
) -> Float[Tensor, "b i y x"]:
    """Bilinear interpolation to the size of the image."""
    return F.interpolate(map_BIHW, size=size, mode="bilinear", align_corners=align_corners)


def _known(method: str | Method) -> Method:
    if isinstance(method, str) and method not in PRESETS:
        raise ValueError(f"method={method!r} is unknown; choose one of: {', '.join(PRESETS)}")
    return PRESETS[method] if isinstance(method, str) else method


def _detached(value: object) -> object:
    return value.detach() if isinstance(value, Tensor) else value


def _require_readable(named: str, method: Method, alpha_BIC: Tensor, values_BCHW: Tensor) -> None:
    if not (_finite(alpha_BIC) and _finite(values_BCHW)):
        raise ValueError(f"{named}: its output or the gradient there has values that are not finite")
    if method.highest is not None and method.highest > alpha_BIC.shape[1]:
        raise ValueError(f"highest={method.highest} is more than the {alpha_BIC.shape[1]} scores there are")


def _finite(values: Tensor) -> bool:
    # NaN and ±inf stay in a sum, which needs no tensor of flags; a sum may overflow where no value is infinite.
    return bool(values.detach().sum().isfinite()) or bool(values.isfinite().all())


def _weighted(alpha_BIC: Tensor, values_BCHW: Tensor) -> Float[Tensor, "b i h w"]:
    with torch.autocast(alpha_BIC.device.type, enabled=False):
        return torch.einsum("bic,bchw->bihw", alpha_BIC, values_BCHW)
