"""The spatial mean of the gradient of many scores at one layer, which is what the channels of an attention map weigh.

For scores s_i that depend on a tensor A [B, C, H, W] of a network, the images of a batch being independent:

    α_bic = 1/(HW) Σ_hw ∂s_bi/∂A_bchw

One backward pass of Σ_b s_bi serves the whole batch; I scores take I of them. Three routes give the same α to rounding:

    loop     reverse mode from each score down to A, one after the other
    batched  the same with many scores in one call (vmap over the backward pass)
    pooled   reverse mode only down to the first linear operation above A, a convolution or a fully connected layer
             that A reaches through elementwise operations with derivative g (a ReLU, an addition, batch normalisation
             in evaluation mode). With G_i the gradient at its output and w its weights,

                 Σ_hw ∂s_i/∂A_chw = Σ_k G_ik V_ck,    V_ck = Σ_hw w(k ← chw) g_chw

             where k counts its outputs. V does not depend on the score: the most expensive step of the backward pass,
             into the layer's own resolution, is taken once instead of I times. At the last convolution of a usual
             encoder that operation is the first fully connected layer, and what remains is the closed form
             α = W₂ · diag(ReLU') · pool(W₁), with no backward pass through a convolution at all.

Which route is taken stands at `Flow.choose`. The network is seen as the graph that autograd recorded, so that it does
not matter how it is written. Suffixes as in expvae.attention, and K outputs of the linear operation, T taps of
its kernel, P places of its output.
"""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional as F

Normaliser = Literal["none", "image", "batch"]
Route = Literal["auto", "loop", "batched", "pooled"]

RMS_EPSILON = 1e-5  # the authors' code adds it to the root mean square of the gradient
CHUNK_BYTES = 2**28  # bound on what is held at once of the gradients of many scores, and as much again of V

# Activations, by the name of their node in the graph: the values after them from those before them.
ACTIVATIONS: dict[str, Callable[[Tensor, Node], Tensor]] = {
    "ReluBackward0": lambda before, _node: before.relu(),
    "LeakyReluBackward0": lambda before, node: F.leaky_relu(before, node._saved_negative_slope),
    "LeakyReluBackward1": lambda before, node: F.leaky_relu(before, node._saved_negative_slope),  # in place
    "SiluBackward0": lambda before, _node: F.silu(before),
    "GeluBackward0": lambda before, node: F.gelu(before, approximate=node._saved_approximate),
    "SigmoidBackward0": lambda before, _node: before.sigmoid(),
    "TanhBackward0": lambda before, _node: before.tanh(),
}
COPIES = {"CloneBackward0", "ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0"}
# Each value out comes from the one value of A at its place, and from others that do not depend on A.
ELEMENTWISE = {*ACTIVATIONS, *COPIES, "AddBackward0", "NativeBatchNormBackward0", "CudnnBatchNormBackward0"}
# What vmap takes for many scores in one call without a loop of its own.
BATCHABLE = {*ACTIVATIONS, *COPIES, "AddBackward0", "SubBackward0", "MulBackward0", "ExpBackward0", "SqrtBackward0"}
BATCHABLE |= {"AddmmBackward0", "MmBackward0", "SumBackward1", "IndexBackward0", "SplitBackward0", "SliceBackward0"}
BATCHABLE |= {"ConvolutionBackward0", "NativeBatchNormBackward0", "CudnnBatchNormBackward0"}


@dataclass(frozen=True)
class _Linear:
    """The convolution or fully connected layer that all of the target goes into, through elementwise operations only.

    Attributes:
        node: Its node in the graph.
        entry: Its input.
        weight: [K, C, KH, KW], or [C·H·W, K] of a fully connected layer.
        gated: Whether there is more than copies between the target and it.
    """

    node: Node
    entry: GradientEdge
    weight: Tensor
    gated: bool

    def without_scores(self, gate_BCHW: Tensor) -> Float[Tensor, "b c k"]:
        """V: what a gradient of one at each output adds to Σ_hw ∂s/∂A_chw."""
        b, c, h, w = gate_BCHW.shape
        weight = self.weight.detach().to(gate_BCHW.dtype)
        if weight.ndim == 2:
            return torch.bmm(gate_BCHW.flatten(2).transpose(0, 1), weight.reshape(c, h * w, -1)).transpose(0, 1)
        node, kernel = self.node, tuple(weight.shape[2:])
        window_BCTP = F.unfold(
            gate_BCHW.reshape(b * c, 1, h, w), kernel, node._saved_dilation, node._saved_padding, node._saved_stride
        ).reshape(b, c, kernel[0] * kernel[1], -1)
        return torch.matmul(weight.transpose(0, 1).flatten(2), window_BCTP).flatten(2)


@dataclass(frozen=True)
class Flow:
    """The graph that autograd recorded between a tensor and the scores.

    Attributes:
        score_I: Σ_b s_bi, in the graph.
        target: Where the gradient is taken: the tensor, or an elementwise function of it.
        shape: [B, C, H, W] of the tensor.
        users: For each node the nodes that use what it gives, with the place among their inputs.
    """

    score_I: Tensor
    target: GradientEdge
    shape: torch.Size
    users: dict[Node, list[tuple[Node, int]]]

    @classmethod
    def between(cls, target: GradientEdge, shape: torch.Size, score_I: Float[Tensor, " i"]) -> "Flow | None":
        """The flow to the scores from A of this shape, where the target is; None if no score depends on A."""
        if not score_I.requires_grad:
            return None
        users, seen, waiting = defaultdict(list), {target.node}, [get_gradient_edge(score_I).node]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            for place, (below, output_nr) in enumerate(node.next_functions):
                # A may be one of several outputs of its node: those who use another do not use A.
                if below is not None and (below != target.node or output_nr == target.output_nr):
                    users[below].append((node, place))
                    waiting.append(below)
        return cls(score_I, target, shape, dict(users)) if target.node in users else None

    def activated(self, A_BCHW: Float[Tensor, "b c h w"], named: str) -> tuple[Float[Tensor, "b c h w"], "Flow"]:
        """The values of A after the activation that alone uses it, directly, and the flow from there to the scores.

        Raises:
            ValueError: If there is no such activation behind the layer, which is named so.
        """
        node = self._only_user(self.target.node)[0]
        while node is not None and node.name() in COPIES:
            node = self._only_user(node)[0]
        if node is None or node.name() not in ACTIVATIONS:
            names = ", ".join(dict.fromkeys(name.partition("Backward")[0] for name in ACTIVATIONS))
            raise ValueError(
                f"{named}: no activation ({names}) follows it directly, which a method needs whose tensor is not "
                "'before'; to explain what an activation puts out, give the activation as the layer"
            )
        return ACTIVATIONS[node.name()](A_BCHW, node), replace(self, target=GradientEdge(node, 0))

    def choose(self, normalisers: Collection[Normaliser], second_order: bool) -> Route:
        """The route that is fastest by rule.

        Per image and channel, `pooled` takes T + I multiplications for each output of the linear operation where the
        loop takes T · I, with T the weights that connect the output to the channel (the taps of a kernel, or all
        H · W): it is taken where that saves half of them or more. Otherwise `batched`, where all operations up to the
        scores are known to vmap, and `loop` where they are not, or where there is one score.

        Measured by benchmarks/attention.py; the performance chapter shows what each route takes.
        """
        i = len(self.score_I)
        if second_order:
            return "loop"
        linear = self._linear() if set(normalisers) == {"none"} else None
        if linear is not None:
            t = (linear.weight if linear.weight.ndim == 4 else torch.empty(self.shape, device="meta"))[0, 0].numel()
            if t * i >= 2 * (t + i):
                return "pooled"
        return "batched" if i > 1 and self._batchable(self.target.node) else "loop"

    def mean_gradients(
        self, normalisers: Collection[Normaliser], route: Route, second_order: bool
    ) -> tuple[dict[Normaliser, Float[Tensor, "b i c"]], Route]:
        """α [B, I, C] by each normaliser, all from the same passes, and the route that was taken.

        With a normaliser, the gradient of each score is divided by its root mean square over the "image" or the whole
        "batch", plus 1e-5. With `second_order` α can be differentiated; else it is detached.

        Raises:
            ValueError: If the route cannot be taken.
        """
        if route == "auto":
            route = self.choose(normalisers, second_order)
        if second_order and route != "loop":
            raise ValueError(f"route={route!r} keeps no second-order graph; choose 'auto' or 'loop'")
        if route == "pooled":
            linear = self._linear()
            if linear is None or set(normalisers) != {"none"}:
                raise ValueError(
                    "route='pooled' needs no normaliser, and a convolution or fully connected layer that all of the "
                    "layer's output goes into through elementwise operations only; choose 'auto', 'loop' or 'batched'"
                )
            with torch.no_grad():
                return {"none": self._pooled(linear)}, route
        if route == "batched" and _checks_nan():
            raise ValueError("route='batched' cannot run under torch.autograd.detect_anomaly; choose 'auto' or 'loop'")
        parts = {normaliser: [] for normaliser in normalisers}
        for gradient_IB in self._gradients(self.target, route == "batched", second_order):
            gradient_IBCHW = gradient_IB.reshape(-1, *self.shape)  # an activation may come after a flattening
            alpha_IBC = gradient_IBCHW.mean((3, 4))
            for normaliser, alphas in parts.items():
                alphas.append(alpha_IBC / _size(gradient_IBCHW, normaliser))
        return {normaliser: torch.cat(alphas).transpose(0, 1) for normaliser, alphas in parts.items()}, route

    def _linear(self) -> _Linear | None:
        entry, gated = self.target, False
        node, place = self._only_user(entry.node)
        while node is not None and node.name() in ELEMENTWISE and not getattr(node, "_saved_training", False):
            entry, gated = GradientEdge(node, 0), gated or node.name() not in COPIES
            node, place = self._only_user(node)
        weight = None if node is None else _weight(node, place, _like(entry).shape, self.shape)
        return None if weight is None else _Linear(node, entry, weight, gated)

    def _only_user(self, node: Node) -> tuple[Node | None, int]:
        users = self.users.get(node, [])
        return users[0] if len(users) == 1 else (None, 0)

    def _batchable(self, start: Node) -> bool:
        """Whether vmap takes all operations from there to the scores."""
        if _checks_nan():
            return False
        waiting, seen = [start], set()
        while waiting:
            for node, _ in self.users.get(waiting.pop(), ()):
                if node.name() not in BATCHABLE:
                    return False
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
        return True

    def _gradients(self, target: GradientEdge, batched: bool, second_order: bool = False) -> Iterator[Tensor]:
        """∂Σ_b s_bi/∂target [I, B, ...], some scores at a time."""

        def gradient_of(unit: Tensor, batched: bool) -> Tensor:
            (gradient,) = torch.autograd.grad(
                self.score_I, target, unit, retain_graph=True, create_graph=second_order, is_grads_batched=batched
            )
            return widened(gradient)

        unit_II = torch.eye(len(self.score_I), dtype=self.score_I.dtype, device=self.score_I.device)
        if batched:
            for unit in unit_II.split(_at_once(_like(target).numel())):
                yield gradient_of(unit, True)
        else:
            for unit in unit_II:
                yield gradient_of(unit, False).unsqueeze(0)

    def _pooled(self, linear: _Linear) -> Float[Tensor, "b i c"]:
        b, c, h, w = self.shape
        batched = len(self.score_I) > 1 and self._batchable(linear.node)
        # The derivative of elementwise operations is what reverse mode makes of ones; without any it is one everywhere.
        gate_BCHW = torch.ones((1, c, h, w), dtype=widened(self.score_I).dtype, device=self.score_I.device)
        if linear.gated:
            ones = torch.ones_like(_like(linear.entry), device=self.score_I.device)
            (gate_BCHW,) = torch.autograd.grad(linear.entry, self.target, ones, retain_graph=True)
            gate_BCHW = gate_BCHW.to(widened(self.score_I).dtype).reshape(self.shape)
        k = _like(GradientEdge(linear.node, 0))[0].numel()
        images = _at_once(c * k) if linear.gated else b
        V_BCK = linear.without_scores(gate_BCHW) if images >= b else None
        alphas = []
        for G_IB in _joined(self._gradients(GradientEdge(linear.node, 0), batched), _at_once(b * k)):
            parts = []
            for start in range(0, b, images):
                G_BIK = G_IB[:, start : start + images].flatten(2).transpose(0, 1).to(gate_BCHW.dtype)
                V = linear.without_scores(gate_BCHW[start : start + images]) if V_BCK is None else V_BCK
                parts.append(torch.bmm(G_BIK, V.expand(len(G_BIK), -1, -1).mT))
            alphas.append(torch.cat(parts))
        return torch.cat(alphas, 1) / (h * w)


def _size(gradient_IBCHW: Tensor, normaliser: Normaliser) -> Float[Tensor, "i _ 1"] | float:
    """What the normaliser divides by: the root mean square, plus 1e-5."""
    if normaliser == "none":
        return 1.0
    over = (2, 3, 4) if normaliser == "image" else (1, 2, 3, 4)
    # vector_norm has a gradient where all is zero, which the root of a mean of squares has not.
    norm_IB1 = torch.linalg.vector_norm(gradient_IBCHW, dim=over, keepdim=True)[..., 0, 0]
    return norm_IB1 / (gradient_IBCHW.numel() / norm_IB1.numel()) ** 0.5 + RMS_EPSILON


def _checks_nan() -> bool:
    """Whether anomaly detection reads every gradient for NaN, which vmap does not let it do."""
    return torch.is_anomaly_enabled() and torch.is_anomaly_check_nan_enabled()


def widened(tensor: Tensor) -> Tensor:
    """Half precision to float32: a mean over many pixels in half precision would lose digits."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _like(edge: GradientEdge) -> Tensor:
    """A tensor without values, with shape and type of the one that the edge stands for."""
    metadata = edge.node._input_metadata[edge.output_nr]
    return torch.empty(tuple(metadata.shape), dtype=metadata.dtype, device="meta")


def _weight(node: Node, place: int, entry: torch.Size, shape: torch.Size) -> Tensor | None:
    """The weight of a plain convolution, or a fully connected layer, of an input with A's values; None of all else."""
    if (node.name(), place) == ("ConvolutionBackward0", 0):
        plain = not node._saved_transposed and node._saved_groups == 1 and entry == shape
        return node._saved_weight if plain else None
    if (node.name(), place) in (("AddmmBackward0", 1), ("MmBackward0", 0)):
        plain = entry == (shape[0], shape[1:].numel()) and getattr(node, "_saved_alpha", 1) == 1
        return node._saved_mat2 if plain else None
    return None


def _joined(parts: Iterator[Tensor], length: int) -> Iterator[Tensor]:
    """The same tensors in longer ones, of up to `length` along the first axis."""
    waiting = []
    for part in parts:
        if waiting and sum(map(len, waiting)) + len(part) > length:
            yield torch.cat(waiting)
            waiting = []
        waiting.append(part)
    yield torch.cat(waiting)


def _at_once(values: int) -> int:
    """How many tensors of so many values of four bytes fit in a chunk; at least one."""
    return max(1, CHUNK_BYTES // (4 * values))
