"""The spatial mean of the gradient of many scores at one layer, which is what the channels of an attention map weigh.

For scores s_i that depend on a tensor A [B, C, H, W] of a network, the images of a batch being independent:

    α_bic = 1/(HW) Σ_hw ∂s_bi/∂A_bchw

One backward pass of Σ_b s_bi serves the whole batch; I scores take I of them. Three routes give the same α to rounding:

    loop     reverse mode from each score down to A, one after the other
    batched  the same with many scores in one call: by the rules of expvae._backward as far as these lead, and vmap
             over the backward pass, which goes through convolutions in a loop
    pooled   reverse mode only down to the first linear operation above A, a convolution or a fully connected layer
             that A reaches through elementwise operations with derivative g (a ReLU, an addition, batch normalisation
             in evaluation mode). With G_i the gradient at its output and w its weights,

                 Σ_hw ∂s_i/∂A_chw = Σ_k G_ik V_ck,    V_ck = Σ_hw w(k ← chw) g_chw

             where k counts its outputs. V does not depend on the score: the most expensive step of the backward pass,
             into the layer's own resolution, is taken once instead of I times. At the last convolution of a usual
             encoder that operation is the first fully connected layer, and what remains is the closed form
             α = W₂ · diag(ReLU') · pool(W₁), with no backward pass through a convolution at all. Max pooling on the
             way has each of its values come from one place of A, where g is read; and where several read the same
             tensor, as before a residual block, their parts add up: Σ_k G_ik V_ck of each linear operation, and
             Σ_hw G_ichw g_chw of an addition.

Which route is taken stands at `Flow.choose`. The network is seen as the graph that autograd recorded, so that it does
not matter how it is written. Suffixes as in expvae.attention, and K outputs of the linear operation, T taps of
its kernel, P places of its output.
"""

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.nn import functional as F

from expvae._backward import (
    ACTIVATIONS,
    COPIES,
    MAX_POOL,
    NORMALISATIONS,
    Passage,
    Users,
    derivative,
    elementwise,
    shape_of,
)

Normaliser = Literal["none", "image", "batch"]
Route = Literal["auto", "loop", "batched", "pooled"]

RMS_EPSILON = 1e-5  # the authors' code adds it to the root mean square of the gradient
CHUNK_BYTES = 2**28  # bound on what is held at once of the gradients of many scores, and as much again of V

# What vmap takes for many scores in one call without a loop of its own.
BATCHABLE = {*ACTIVATIONS, *COPIES, "AddBackward0", "SubBackward0", "MulBackward0", "ExpBackward0", "SqrtBackward0"}
BATCHABLE |= {"AddmmBackward0", "MmBackward0", "SumBackward1", "IndexBackward0", "SplitBackward0", "SliceBackward0"}
BATCHABLE |= {"ConvolutionBackward0", *NORMALISATIONS}


@dataclass(frozen=True)
class _Entry:
    """What all of the target goes into, value by value, and who reads it.

    Attributes:
        edge: Its place in the graph.
        shape: Its shape as [B, C, H, W].
        pools: Operations of max pooling between the target and it; all others are elementwise.
        gated: Whether there is more than copies between the target, or the last of the pools, and it.
        linears: The convolutions and fully connected layers that read it, with their weights: [K, C, KH, KW], or
            [C·H·W, K] of a fully connected layer.
        sums: The additions that read it.
    """

    edge: GradientEdge
    shape: torch.Size
    pools: tuple[Node, ...]
    gated: bool
    linears: tuple[tuple[Node, Tensor], ...]
    sums: tuple[Node, ...]

    def gate(self, target: GradientEdge) -> Float[Tensor, "b c h w"] | None:
        """g: the derivative of each value by the one of A that it comes from; None where that is one."""
        slope_BCHW = 1.0
        for pool in self.pools:
            place_BCHW = pool._saved_result1
            before_BCHW = slope_BCHW * derivative(GradientEdge(*pool.next_functions[0]), target)
            slope_BCHW = before_BCHW.flatten(2).gather(2, place_BCHW.flatten(2)).reshape(place_BCHW.shape)
            target = GradientEdge(pool, 0)
        if self.gated:
            slope_BCHW = slope_BCHW * derivative(self.edge, target).reshape(self.shape)
        return slope_BCHW if self.gated or self.pools else None


def without_scores(node: Node, weight: Tensor, gate_BCHW: Tensor) -> Float[Tensor, "b c k"]:
    """V: what a gradient of one at each output of a linear operation adds to Σ_hw ∂s/∂A_chw."""
    b, c, h, w = gate_BCHW.shape
    weight = weight.detach().to(gate_BCHW.dtype)
    if weight.ndim == 2:
        return torch.bmm(gate_BCHW.flatten(2).transpose(0, 1), weight.reshape(c, h * w, -1)).transpose(0, 1)
    kernel = tuple(weight.shape[2:])
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
    users: Users

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
        users = self.users[self.target.node]
        while len(users) == 1 and users[0][0].name() in COPIES:
            users = self.users.get(users[0][0], [])
        node = users[0][0] if len(users) == 1 else None
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
        entry = self._entry() if set(normalisers) == {"none"} else None
        if entry is not None:
            taps = [weight[0, 0] if weight.ndim == 4 else entry.shape[2:] for _, weight in entry.linears]
            t = sum(one.numel() for one in taps)
            if t * i >= 2 * (t + i * len(entry.linears)):
                return "pooled"
        many = i > 1 and not _checks_nan()
        return (
            "batched"
            if many and (self._batchable(self.target) or Passage.exists([self.target.node], self.users))
            else "loop"
        )

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
            entry = self._entry()
            if entry is None or set(normalisers) != {"none"}:
                raise ValueError(
                    "route='pooled' needs no normaliser, and a convolution or fully connected layer that all of the "
                    "layer's output goes into through elementwise operations, max pooling and residual connections "
                    "only; choose 'auto', 'loop' or 'batched'"
                )
            with torch.no_grad():
                return {"none": self._pooled(entry)}, route
        if route == "batched" and _checks_nan():
            raise ValueError("route='batched' cannot run under torch.autograd.detect_anomaly; choose 'auto' or 'loop'")
        parts = {normaliser: [] for normaliser in normalisers}
        for (gradient_IB,) in self._gradients([self.target], route, second_order):
            gradient_IBCHW = gradient_IB.reshape(-1, *self.shape)  # an activation may come after a flattening
            alpha_IBC = gradient_IBCHW.mean((3, 4))
            for normaliser, alphas in parts.items():
                alphas.append(alpha_IBC / _size(gradient_IBCHW, normaliser))
        return {normaliser: torch.cat(alphas).transpose(0, 1) for normaliser, alphas in parts.items()}, route

    def _entry(self) -> _Entry | None:
        """The first tensor after the target that a linear operation reads; None if something else reads it too."""
        edge, shape, pools, gated = self.target, self.shape, [], False
        while len(users := self.users.get(edge.node, [])) == 1:
            ((node, place),) = users
            if elementwise(node, place):
                gated = gated or node.name() not in COPIES
            elif node.name() == MAX_POOL and shape_of(edge) == shape:
                shape, gated = shape_of(GradientEdge(node, 0)), False
                pools.append(node)
            else:
                break
            edge = GradientEdge(node, 0)
        linears, sums = [], []
        for node, place in users:
            weight = _weight(node, place, shape_of(edge), shape)
            if weight is not None:
                linears.append((node, weight))
            elif node.name() == "AddBackward0" and (place == 0 or node._saved_alpha == 1):
                sums.append(node)
            else:
                return None
        return _Entry(edge, shape, tuple(pools), gated, tuple(linears), tuple(sums)) if linears else None

    def _batchable(self, start: GradientEdge) -> bool:
        """Whether vmap takes all operations from there to the scores."""
        waiting, seen = [start.node], set()
        while waiting:
            for node, _ in self.users.get(waiting.pop(), ()):
                if node.name() not in BATCHABLE:
                    return False
                if node not in seen:
                    seen.add(node)
                    waiting.append(node)
        return True

    def _gradients(self, ends: list[GradientEdge], route: Route, second_order: bool = False) -> Iterator[list[Tensor]]:
        """∂Σ_b s_bi/∂end [I, B, ...] of each end, some scores at a time."""
        many = route != "loop" and len(self.score_I) > 1 and not _checks_nan()
        passage = Passage.to([end.node for end in ends], self.users) if many else None
        tops = ends if passage is None else [GradientEdge(passage.top, 0)]
        # Who asks for it by name has vmap go through what it is not known to go through.
        batched = many and (all(map(self._batchable, tops)) or (route == "batched" and passage is None))
        gradients_of = partial(torch.autograd.grad, self.score_I, tops, retain_graph=True, create_graph=second_order)
        values = max(sum(shape_of(edge).numel() for edge in edges) for edges in (ends, tops))
        unit_II = torch.eye(len(self.score_I), dtype=self.score_I.dtype, device=self.score_I.device)
        for unit in unit_II.split(1 if route == "loop" else _at_once(values)):
            if batched:
                gradients = gradients_of(grad_outputs=unit, is_grads_batched=True)
            else:
                alone = [gradients_of(grad_outputs=one) for one in unit]
                gradients = [torch.stack(parts) for parts in zip(*alone, strict=True)]
            yield [widened(gradient) for gradient in (passage.down(gradients[0]) if passage else gradients)]

    def _pooled(self, entry: _Entry) -> Float[Tensor, "b i c"]:
        (b, c, h, w), linears = self.shape, entry.linears
        gate_BCHW, like = entry.gate(self.target), widened(self.score_I)
        gate_BCHW = like.new_ones((1, *entry.shape[1:])) if gate_BCHW is None else gate_BCHW.to(like.dtype)
        ends = [GradientEdge(node, 0) for node in (*(node for node, _ in linears), *entry.sums)]
        k = max(shape_of(end)[1:].numel() for end in ends[: len(linears)])
        images = _at_once(c * k * len(linears)) if len(gate_BCHW) > 1 else b
        V = [without_scores(*linear, gate_BCHW) for linear in linears] if images >= b else None
        alphas = []
        for gradients in self._gradients(ends, "pooled"):
            parts = []
            for start in range(0, b, images):
                part = slice(start, start + images)
                V_part = [without_scores(*linear, gate_BCHW[part]) for linear in linears] if V is None else V
                alpha_BIC = 0
                for G_IB, V_BCK in zip(gradients, V_part, strict=False):
                    G_BIK = G_IB[:, part].flatten(2).transpose(0, 1).to(gate_BCHW.dtype)
                    alpha_BIC = alpha_BIC + torch.bmm(G_BIK, V_BCK.expand(len(G_BIK), -1, -1).mT)
                for G_IB in gradients[len(linears) :]:
                    G_IBCHW = G_IB[:, part].reshape(len(G_IB), -1, *entry.shape[1:])
                    alpha_BIC = alpha_BIC + (G_IBCHW * gate_BCHW[part]).sum((3, 4)).transpose(0, 1)
                parts.append(alpha_BIC)
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


def _weight(node: Node, place: int, entry: torch.Size, shape: torch.Size) -> Tensor | None:
    """The weight of a plain convolution, or a fully connected layer, of an input with A's values; None of all else."""
    if (node.name(), place) == ("ConvolutionBackward0", 0):
        plain = not node._saved_transposed and node._saved_groups == 1 and entry == shape
        return node._saved_weight if plain else None
    if (node.name(), place) in (("AddmmBackward0", 1), ("MmBackward0", 0)):
        plain = entry == (shape[0], shape[1:].numel()) and getattr(node, "_saved_alpha", 1) == 1
        return node._saved_mat2 if plain else None
    return None


def _at_once(values: int) -> int:
    """How many tensors of so many values of four bytes fit in a chunk; at least one."""
    return max(1, CHUNK_BYTES // (4 * values))
