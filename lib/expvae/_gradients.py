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
from collections.abc import Callable, Iterator, Sequence
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
    entry_of,
    saved,
    shape_of,
)

Normaliser = Literal["none", "image", "batch"]
Route = Literal["auto", "loop", "batched", "pooled"]

RMS_EPSILON = 1e-5  # the authors' code adds it to the root mean square of the gradient
CHUNK_BYTES = 2**29  # bound on what is held at once of the gradients of many scores, and as much again of V

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
        slope_BCHW = torch.ones(())
        for pool in self.pools:
            place_BCHW = saved(pool, "result1")
            before_BCHW = slope_BCHW * derivative(entry_of(pool, 0), target)
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
    window = (tuple(weight.shape[2:]), *(saved(node, name) for name in ("dilation", "padding", "stride")))
    window_BCTP = F.unfold(gate_BCHW.reshape(b * c, 1, h, w), *window).reshape(b, c, weight[0, 0].numel(), -1)
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

    def choose(self, normaliser: Normaliser, second_order: bool) -> Route:
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
        entry = self._entry() if normaliser == "none" else None
        if entry is not None:
            taps = [weight[0, 0] if weight.ndim == 4 else entry.shape[2:] for _, weight in entry.linears]
            t = sum(one.numel() for one in taps)
            if t * i >= 2 * (t + i * len(entry.linears)):
                return "pooled"
        many = i > 1 and not _checks_nan()
        known = many and (_batchable(self.target, self.users) or Passage.exists([self.target.node], self.users))
        return "batched" if known else "loop"

    def reading(self, normaliser: Normaliser, route: Route, second_order: bool) -> "_Reading":
        """How α is read from gradients; a ValueError if the route cannot be taken."""
        if route == "auto":
            route = self.choose(normaliser, second_order)
        if second_order and route != "loop":
            raise ValueError(f"route={route!r} keeps no second-order graph; choose 'auto' or 'loop'")
        if route == "batched" and _checks_nan():
            raise ValueError("route='batched' cannot run under torch.autograd.detect_anomaly; choose 'auto' or 'loop'")
        if route != "pooled":
            return _Reading(self, route, [self.target], partial(self._averaged, normaliser))
        entry = self._entry()
        if entry is None or normaliser != "none":
            raise ValueError(
                "route='pooled' needs no normaliser, and a convolution or fully connected layer that all of the "
                "layer's output goes into through elementwise operations, max pooling and residual connections "
                "only; choose 'auto', 'loop' or 'batched'"
            )
        ends = [GradientEdge(node, 0) for node in (*(node for node, _ in entry.linears), *entry.sums)]
        return _Reading(self, route, ends, partial(self._pooled, entry))

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
            elif node.name() == "AddBackward0" and (place == 0 or saved(node, "alpha") == 1):
                sums.append(node)
            else:
                return None
        return _Entry(edge, shape, tuple(pools), gated, tuple(linears), tuple(sums)) if linears else None

    def _averaged(self, normaliser: Normaliser, gradient_IB: Float[Tensor, "i b ..."]) -> Float[Tensor, "b i c"]:
        gradient_IBCHW = gradient_IB.reshape(-1, *self.shape)  # an activation may come after a flattening
        return (gradient_IBCHW.mean((3, 4)) / _size(gradient_IBCHW, normaliser)).transpose(0, 1)

    @torch.no_grad()
    def _pooled(self, entry: _Entry, *gradients: Float[Tensor, "i b ..."]) -> Float[Tensor, "b i c"]:
        (b, c, h, w), linears = self.shape, entry.linears
        gate_BCHW, like = entry.gate(self.target), widened(self.score_I)
        gate_BCHW = like.new_ones((1, *entry.shape[1:])) if gate_BCHW is None else gate_BCHW.to(like.dtype)
        k = max(gradient_IB[0, 0].numel() for gradient_IB in gradients[: len(linears)])
        images = _at_once(c * k * len(linears)) if len(gate_BCHW) > 1 else b
        alphas = []
        for start in range(0, b, images):
            part, alpha_BIC = slice(start, start + images), like.new_zeros(())
            for linear, G_IB in zip(linears, gradients, strict=False):
                G_BIK = G_IB[:, part].flatten(2).transpose(0, 1).to(gate_BCHW.dtype)
                V_BCK = without_scores(*linear, gate_BCHW[part])
                alpha_BIC = alpha_BIC + torch.bmm(G_BIK, V_BCK.expand(len(G_BIK), -1, -1).mT)
            for G_IB in gradients[len(linears) :]:
                G_IBCHW = G_IB[:, part].reshape(len(G_IB), -1, *entry.shape[1:])
                alpha_BIC = alpha_BIC + (G_IBCHW * gate_BCHW[part]).sum((3, 4)).transpose(0, 1)
            alphas.append(alpha_BIC)
        return torch.cat(alphas) / (h * w)


@dataclass(frozen=True)
class _Reading:
    """How α at the target of a flow is read: `alpha` gives it from the gradients at the ends."""

    flow: Flow
    route: Route
    ends: list[GradientEdge]
    alpha: Callable[..., Float[Tensor, "b i c"]]


def mean_gradients(
    flows: Sequence[tuple[Flow, Normaliser]], route: Route, second_order: bool
) -> list[tuple[Float[Tensor, "b i c"], Route]]:
    """α [B, I, C] of each of some flows to the same scores, all from the same passes, and the route that was taken.

    With a normaliser, the gradient of each score is divided by its root mean square over the "image" or the whole
    "batch", plus 1e-5. With `second_order` α can be differentiated; else it is detached.

    Raises:
        ValueError: If the route cannot be taken.
    """
    readings = [flow.reading(normaliser, route, second_order) for flow, normaliser in flows]
    parts = [
        [reading.alpha(*(gradients[end[:2]] for end in reading.ends)) for reading in readings]
        for gradients in _gradients(readings, second_order)
    ]
    return [(torch.cat(alphas, 1), one.route) for alphas, one in zip(zip(*parts, strict=True), readings, strict=True)]


def _gradients(readings: Sequence[_Reading], second_order: bool) -> Iterator[dict[tuple[Node, int], Tensor]]:
    """∂Σ_b s_bi/∂end [I, B, ...] of each end, some scores at a time."""
    score_I, users = readings[0].flow.score_I, _joined([reading.flow for reading in readings])
    ends = {end[:2]: end for reading in readings for end in reading.ends}
    looped = all(reading.route == "loop" for reading in readings)
    many = not looped and len(score_I) > 1 and not _checks_nan()
    passage = Passage.to([node for node, _ in ends], users) if many else None
    tops = list(ends.values()) if passage is None else [GradientEdge(passage.top, 0)]
    # Who asks for it by name has vmap go through what it is not known to go through.
    named = passage is None and [reading.route for reading in readings] == ["batched"]
    batched = many and (named or all(_batchable(top, users) for top in tops))
    gradients_of = partial(torch.autograd.grad, score_I, tops, retain_graph=True, create_graph=second_order)
    values = max(sum(shape_of(edge).numel() for edge in edges) for edges in (ends.values(), tops))
    unit_II = torch.eye(len(score_I), dtype=score_I.dtype, device=score_I.device)
    for unit in unit_II.split(1 if looped else _at_once(values)):
        if batched:
            gradients = gradients_of(grad_outputs=unit, is_grads_batched=True)
        else:
            alone = [gradients_of(grad_outputs=one) for one in unit]
            gradients = [torch.stack(parts) for parts in zip(*alone, strict=True)]
        gradients = passage.down(gradients[0]) if passage else gradients
        yield dict(zip(ends, map(widened, gradients), strict=True))


def _joined(flows: Sequence[Flow]) -> Users:
    """Who uses what at or above any of the targets: each flow knows it of its own target and of all above that."""
    users: Users = {}
    for flow in flows:
        users |= {node: those for node, those in flow.users.items() if len(those) > len(users.get(node, ()))}
    return users | {flow.target.node: flow.users[flow.target.node] for flow in flows}


def _batchable(start: GradientEdge, users: Users) -> bool:
    """Whether vmap takes all operations from there to the scores."""
    waiting, seen = [start.node], set()
    while waiting:
        for node, _ in users.get(waiting.pop(), ()):
            if node.name() not in BATCHABLE:
                return False
            if node not in seen:
                seen.add(node)
                waiting.append(node)
    return True


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
        plain = not saved(node, "transposed") and saved(node, "groups") == 1 and entry == shape
        return saved(node, "weight") if plain else None
    if (node.name(), place) in (("AddmmBackward0", 1), ("MmBackward0", 0)):
        plain = entry == (shape[0], shape[1:].numel()) and saved(node, "alpha", 1) == 1
        return saved(node, "mat2") if plain else None
    return None


def _at_once(values: int) -> int:
    """How many tensors of so many values of four bytes fit in a chunk; at least one."""
    return max(1, CHUNK_BYTES // (4 * values))
