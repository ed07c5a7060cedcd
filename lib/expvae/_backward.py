"""Reverse mode for many scores at once, by rules of our own for the operations of usual encoders.

Autograd takes one score at a time; under vmap it takes many, but through each convolution one after the other. As long
as every operation treats the images of a batch apart, I scores of B images are a batch of I · B: the rules here stack
them along its axis, in the memory format in which convolutions are fastest. What does not depend on the score, such as
the derivative of an activation, or weights with the scale of batch normalisation in them, is computed once for all.
Operations that no rule is for are left to autograd, with all that lies between them and the scores.

In comments and annotations, N counts the I · B of a stack, and below means nearer to the images.
"""

from collections import defaultdict
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node
from torch.nn import functional as F

Users = dict[Node, list[tuple[Node, int]]]
Rule = Callable[[Tensor], Tensor]

# Activations, by the name of their node in the graph: the values after them from those before them.
ACTIVATIONS: dict[str, Callable[[Tensor, Node], Tensor]] = {
    "ReluBackward0": lambda before, _node: before.relu(),
    "LeakyReluBackward0": lambda before, node: F.leaky_relu(before, saved(node, "negative_slope")),
    "LeakyReluBackward1": lambda before, node: F.leaky_relu(before, saved(node, "negative_slope")),  # in place
    "SiluBackward0": lambda before, _node: F.silu(before),
    "GeluBackward0": lambda before, node: F.gelu(before, approximate=saved(node, "approximate")),
    "SigmoidBackward0": lambda before, _node: before.sigmoid(),
    "TanhBackward0": lambda before, _node: before.tanh(),
}
COPIES = {"CloneBackward0", "ViewBackward0", "UnsafeViewBackward0", "ToCopyBackward0"}
MAX_POOL = "MaxPool2DWithIndicesBackward0"
NORMALISATIONS = {"NativeBatchNormBackward0", "CudnnBatchNormBackward0"}
STACK_BYTES = 2**25  # bound on a stack of gradients on its way down, so that it stays near the processor


@dataclass(frozen=True)
class Passage:
    """The part of a graph that the rules lead through, from one tensor down to others.

    Attributes:
        top: The tensor's node: whatever lies below it acts on the scores through it alone.
        ends: The nodes at whose outputs the gradient is wanted.
        steps: For each node, from the top down, the nodes below it with the rules that lead there.
        at_once: How many scores make up a stack.
    """

    top: Node
    ends: Collection[Node]
    steps: dict[Node, list[tuple[Node, Rule]]]
    at_once: int

    @classmethod
    def to(cls, ends: Collection[Node], users: Users) -> "Passage | None":
        """The longest passage down to these ends; None if it would lead through no convolution."""
        order, below = _ruled(ends, users)
        if not _pays(order, below):
            return None
        folded = {node for node in order if _folds(node, ends, users)}
        steps = {node: [(child, _rule(node, place, users, folded)) for place, child in below[node]] for node in order}
        largest = max(shape_of(GradientEdge(node, 0)).numel() for node in order)
        return cls(next(iter(steps)), ends, steps, max(1, STACK_BYTES // (4 * largest)))

    @staticmethod
    def exists(ends: Collection[Node], users: Users) -> bool:
        """Whether there is a passage down to these ends."""
        return _pays(*_ruled(ends, users))

    @torch.no_grad()
    def down(self, gradient_IB: Float[Tensor, "i b ..."]) -> list[Float[Tensor, "i b ..."]]:
        """The gradients at the ends from those at the top."""
        parts = [self._stack(part_IB) for part_IB in gradient_IB.split(self.at_once)]
        return [torch.cat([part[end] for part in parts]) for end in self.ends]

    def _stack(self, gradient_IB: Tensor) -> dict[Node, Tensor]:
        gradients, found = {self.top: _laid(gradient_IB.flatten(0, 1))}, {}
        for node, ways in self.steps.items():
            gradient_N = gradients.pop(node)
            if node in self.ends:
                found[node] = gradient_N.unflatten(0, (len(gradient_IB), -1))
            for child, rule in ways:
                added_N = rule(gradient_N)
                gradients[child] = gradients[child] + added_N if child in gradients else added_N
        return found


def shape_of(edge: GradientEdge) -> torch.Size:
    """The shape of the tensor that the edge stands for."""
    return torch.Size(edge.node._input_metadata[edge.output_nr].shape)


def entry_of(node: Node, place: int) -> GradientEdge:
    """The edge of the tensor that comes in at a place where gradients are recorded."""
    return GradientEdge(*cast(tuple[Node, int], node.next_functions[place]))


def saved(node: Node, name: str, *default: Any) -> Any:
    """What autograd keeps at an operation for its backward pass, of which PyTorch's types do not tell."""
    return getattr(node, f"_saved_{name}", *default)


def elementwise(node: Node, place: int) -> bool:
    """Whether each value out comes from the one at its place in that input, and others that no image changes."""
    name = node.name()
    if name in NORMALISATIONS:
        return place == 0 and not saved(node, "training")
    return name in ACTIVATIONS or name in COPIES or name == "AddBackward0"


def derivative(above: GradientEdge, below: GradientEdge) -> Tensor:
    """Of elementwise operations: what reverse mode makes of ones."""
    metadata = above.node._input_metadata[above.output_nr]
    ones = torch.ones(shape_of(above), dtype=metadata.dtype, device=metadata.device)
    return torch.autograd.grad(above, below, ones, retain_graph=True)[0]


def _ruled(ends: Collection[Node], users: Users) -> tuple[list[Node], dict[Node, list[tuple[int, Node]]]]:
    """The nodes of the passage from the top down, and for each node the places where those below it come in."""
    below, waiting = defaultdict(list), [*ends]
    seen = set(ends)
    while waiting:
        node = waiting.pop()
        for user, place in users.get(node, ()):
            below[user].append((place, node))
            if user not in seen:
                seen.add(user)
                waiting.append(user)
    left = {node: len(ways) for node, ways in below.items()}
    waiting = [node for node in ends if node not in left]
    order, opened, length = [], set(waiting), 0
    while waiting:
        node = waiting.pop()
        if not all(_has_rule(node, place) for place, _ in below[node]):
            break
        opened.discard(node)
        order.append(node)
        if not opened and set(ends) <= set(order):  # all ways up go through this node
            length = len(order)
        for user, _ in users.get(node, ()):
            opened.add(user)
            left[user] -= 1
            if not left[user]:
                waiting.append(user)
    return order[:length][::-1], below


def _pays(order: list[Node], below: dict[Node, list[tuple[int, Node]]]) -> bool:
    return any(node.name() == "ConvolutionBackward0" for node in order if below[node])


def _folds(node: Node, ends: Collection[Node], users: Users) -> bool:
    """Whether it is a batch normalisation that alone reads a convolution, which is no end."""
    below = node.next_functions[0][0] if node.name() in NORMALISATIONS else None
    if below is None or below.name() != "ConvolutionBackward0" or below in ends:
        return False
    return len(users.get(below, ())) == 1


def _has_rule(node: Node, place: int) -> bool:
    output, entry = shape_of(GradientEdge(node, 0)), shape_of(entry_of(node, place))
    if entry[:1] != output[:1] or not entry:
        return False
    match node.name():
        case "ConvolutionBackward0":
            return place == 0 and len(entry) == 4 and not saved(node, "transposed")
        case "AddBackward0":
            return entry == output
        case "AddmmBackward0":
            return place == 1
        case "MmBackward0" | "MaxPool2DWithIndicesBackward0":
            return place == 0 and len(entry) in (2, 4)
        case _:
            return elementwise(node, place)


def _rule(node: Node, place: int, users: Users, folded: Collection[Node]) -> Rule:
    """From the gradients of the node's output [N, ...] to those of the tensor that comes in at that place.

    Args:
        node: The operation.
        place: Which of its inputs.
        users: As for the graph.
        folded: Batch normalisations whose scale is in the weights of the convolution below them.
    """
    below = entry_of(node, place)
    entry, dtype = shape_of(below)[1:], below.node._input_metadata[below.output_nr].dtype
    match node.name():
        case "ConvolutionBackward0":
            above = GradientEdge(users[node][0][0], 0)
            return _convolution(node, entry, derivative(above, GradientEdge(node, 0)) if above.node in folded else None)
        case "AddBackward0":
            alpha = saved(node, "alpha") if place else 1
            return lambda gradient_N: (gradient_N if alpha == 1 else alpha * gradient_N).to(dtype)
        case "AddmmBackward0" | "MmBackward0":
            weight, alpha = saved(node, "mat2").mT, saved(node, "alpha", 1)
            return lambda gradient_N: gradient_N @ weight if alpha == 1 else alpha * (gradient_N @ weight)
        case "MaxPool2DWithIndicesBackward0":
            return _max_pool(node, entry)
        case name if name in COPIES:
            return lambda gradient_N: _laid(gradient_N.reshape(-1, *entry).to(dtype))
    if node in folded:
        return lambda gradient_N: gradient_N
    slope_B = _laid(derivative(GradientEdge(node, 0), below))
    return lambda gradient_N: (gradient_N.unflatten(0, (-1, len(slope_B))) * slope_B).flatten(0, 1)


def _convolution(node: Node, entry: torch.Size, scale_BKHW: Tensor | None) -> Rule:
    weight, stride, dilation = saved(node, "weight").detach(), saved(node, "stride"), saved(node, "dilation")
    groups, around = saved(node, "groups"), saved(node, "padding")
    if scale_BKHW is not None:
        weight = weight * scale_BKHW[0, :, :1, :1].unsqueeze(1).to(weight.dtype)
    padding = [d * (k - 1) - p for k, p, d in zip(weight.shape[2:], around, dilation, strict=True)]
    if set(stride) == {1} and groups == 1 and min(padding) >= 0:
        # A convolution itself, which is faster where it is taken as one.
        turned = _laid(weight.flip(2, 3).transpose(0, 1))
        return lambda gradient_N: F.conv2d(gradient_N, turned, padding=padding, dilation=dilation)
    weight = _laid(weight)

    def rule(gradient_N: Tensor) -> Tensor:
        shape = gradient_N.new_empty(1).expand(len(gradient_N), *entry)
        return torch.ops.aten.convolution_backward(
            gradient_N, shape, weight, None, stride, around, dilation, False, (0, 0), groups, (True, False, False)
        )[0]

    return rule


def _max_pool(node: Node, entry: torch.Size) -> Rule:
    indices_B = saved(node, "result1")
    window = (saved(node, "kernel_size"), saved(node, "stride"), saved(node, "padding"), saved(node, "dilation"))

    def rule(gradient_N: Tensor) -> Tensor:
        shape = _laid(gradient_N.new_empty((len(gradient_N), *entry)))
        indices_N = _laid(indices_B.repeat(len(gradient_N) // len(indices_B), 1, 1, 1))
        return torch.ops.aten.max_pool2d_with_indices_backward(
            gradient_N, shape, *window, saved(node, "ceil_mode"), indices_N
        )

    return rule


def _laid(tensor: Tensor) -> Tensor:
    """In the memory format in which convolutions are fastest on this device."""
    if tensor.ndim != 4 or tensor.device.type != "cpu":
        return tensor
    return tensor.contiguous(memory_format=torch.channels_last)
