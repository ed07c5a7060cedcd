"""From images to scores: one pass through any encoder, and what of its latents is differentiated.

The layer's output is found where autograd recorded it, so that it does not matter how the encoder is written: with
activations in place, residual connections, views, hooks of its own, or compiled. Suffixes as in expvae.attention.
"""

import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from itertools import takewhile
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.distributions import Independent, Normal
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_forward_pre_hook

from expvae._gradients import Flow

Score = Literal["each_mean", "sum_of_means", "each_sample", "normal_difference", "most_deviant"]
SAMPLED = ("each_sample", "normal_difference")
PARTS = (("mu", "mean", "loc"), ("logvar", "log_var"))  # names of what an encoder puts out by name


@dataclass(frozen=True)
class Output:
    """What the layer put out, found where autograd recorded it: whoever reads it, and whichever way, comes after.

    The encoder goes on with the very tensor, except where a change of it in place would lead past its place in the
    graph (autograd has a view change its base, and takes no change of a leaf) or spoil values that are part of the
    graph. Then it goes on with a copy.

    Attributes:
        named: The layer, as errors name it.
        tensor: The tensor itself.
        edge: Its place in the graph; None where gradients were not recorded.
        values_BCHW: Its values, safe from changes in place.
        copy: What the encoder went on with instead, if it did.
        version: Autograd's count of the tensor's changes in place, as it was put out.
    """

    named: str
    tensor: Tensor
    edge: GradientEdge | None
    values_BCHW: Tensor
    copy: Tensor | None
    version: int

    @classmethod
    def of(cls, named: str, tensor: Tensor, attached: bool) -> "Output":
        """The output; if attached, its values are part of the graph and come before all that follows."""
        if not torch.is_grad_enabled():
            return cls(named, tensor, None, tensor, None, 0)
        leaf = tensor.is_leaf
        edge = get_gradient_edge(tensor.requires_grad_())
        copy = tensor.clone() if attached or leaf or tensor._is_view() else None
        return cls(named, tensor, edge, tensor if attached else tensor.detach().clone(), copy, tensor._version)

    def flow(self, score_I: Float[Tensor, " i"]) -> Flow:
        """What lies between the output and the scores, each summed over the images.

        Raises:
            ValueError: If no score depends on it, or if the encoder changed it or its copy in place and read the other.
        """
        flow = Flow.between(self.edge, self.values_BCHW.shape, score_I) if self.edge is not None else None
        if flow is None:
            raise ValueError(
                f"{self.named}: the latents do not depend on its output, or encode does not record gradients, as under "
                "torch.no_grad, torch.inference_mode or checkpoint(..., use_reentrant=True): take these away"
            )
        if self.copy is None:
            return flow
        base = self.tensor._base
        others = [] if base is None or not base.requires_grad else flow.users.get(get_gradient_edge(base).node, [])
        read_too = len(flow.users[flow.target.node]) > 1 or others
        if self.tensor._version != self.version or (self.copy._version and read_too):
            raise ValueError(
                f"{self.named}: its output shares memory with a tensor that is read or changed in place beside it; "
                "take away the change in place, as of ReLU(inplace=True), or have the layer put out a .clone()"
            )
        return flow


def through(
    encode: Callable, layers: Iterable[str | nn.Module], x_BCYX: Float[Tensor, "b c y x"], attached: bool
) -> tuple[dict[str | nn.Module, Output], tuple]:
    """What each layer puts out on the way of the images to the latents, and all that the encoder does.

    Args:
        encode: The encoder, as for `expvae.attention`.
        layers: The layers, or their paths inside the encoder.
        x_BCYX: Images.
        attached: Whether the values of the outputs are to be part of the graph.

    Raises:
        ValueError: If a layer is unknown, is not reached, is reached twice or does not put out [B, C, H, W], or if
            batch normalisation is in training mode.
        TypeError: If a path is given and `encode` is no module, or if it puts out no latents [B, D].
    """
    modules = {layer: _find(encode, layer) for layer in layers}
    names = {
        layer: f"layer={layer!r}" if isinstance(layer, str) else f"layer={type(layer).__name__}(...)"
        for layer in modules
    }
    with _outputs(modules, names, attached) as outputs:
        encoded = _as_written(encode, _recorded(x_BCYX, modules.values()))
    for layer, found in outputs.items():
        if len(found) != 1:
            times = f"is reached {len(found)} times" if found else "is not reached"
            here = "" if found else " by the calling thread (of nn.DataParallel or a script, give the model in it)"
            raise ValueError(f"{names[layer]} {times} on the way from the images to the latents; it must be once{here}")
        if not isinstance(found[0], Output):
            raise ValueError(f"{names[layer]} puts out {found[0]}, not the [B, C, H, W] of a convolution")
    parts = _parts(encoded)
    first = parts[0] if parts else encoded
    if not isinstance(first, Tensor) or first.ndim != 2:
        got = list(first.shape) if isinstance(first, Tensor) else type(first).__name__
        raise TypeError(
            "encode must put out latents [B, D], a tuple that starts with them, as (mu, logvar), a dict or dataclass "
            f"with mu and logvar, or a Normal; got {got}: wrap it in a function that picks them, and give the layer as "
            "a module"
        )
    return {layer: output for layer, (output,) in outputs.items()}, parts


def _parts(encoded: object) -> tuple:
    """What an encoder put out, beginning with the means and, where it has them, the logarithms of the variances."""
    if isinstance(encoded, Tensor | tuple | list):
        return (encoded,) if isinstance(encoded, Tensor) else tuple(encoded)
    if isinstance(encoded, Independent):
        encoded = encoded.base_dist
    if isinstance(encoded, Normal):
        return encoded.loc, 2 * encoded.scale.log()
    if is_dataclass(encoded) and not isinstance(encoded, Mapping):
        encoded = {field.name: getattr(encoded, field.name) for field in fields(encoded)}
    named = encoded if isinstance(encoded, Mapping) else {}
    found = (next((named[name] for name in names if name in named), None) for names in PARTS)
    return tuple(takewhile(lambda part: part is not None, found))


def noise(encoded: tuple, scores: Iterable[Score], generator: torch.Generator | None) -> Float[Tensor, "b d"] | None:
    """ε of the scores that are sampled, the same for all of them; None if none is."""
    sampled = [score for score in scores if score in SAMPLED]
    if not sampled:
        return None
    if len(encoded) < 2:
        raise ValueError(f"score={sampled[0]!r} needs an encoder that gives (mu, logvar); this one gives one tensor")
    if generator is None:
        raise ValueError(f"score={sampled[0]!r} draws samples; give generator=torch.Generator().manual_seed(...)")
    return torch.randn(encoded[0].shape, generator=generator, device=generator.device).to(encoded[0])


def latents_of(
    encoded: tuple, score: Score, normal: tuple[Tensor, Tensor] | None, epsilon_BD: Float[Tensor, "b d"] | None
) -> Float[Tensor, "b d"]:
    """The means, a sample, or a sample of the normal difference distribution."""
    mu_BD = encoded[0]
    if score not in SAMPLED or epsilon_BD is None:
        return mu_BD
    logvar_BD = encoded[1]
    if score == "each_sample":
        return mu_BD + (0.5 * logvar_BD).exp() * epsilon_BD
    normal_mu, normal_logvar = _posterior(normal, score, mu_BD)
    # √(σ̄² + σ²) by its logarithm: a variance too small for the type would have no gradient.
    return normal_mu - mu_BD + (0.5 * torch.logaddexp(normal_logvar, logvar_BD)).exp() * epsilon_BD


def scores_of(
    latents_BD: Float[Tensor, "b d"],
    score: Score,
    latents: Sequence[int] | Tensor | None,
    normal: tuple[Tensor, Tensor] | None,
) -> Float[Tensor, "b i"]:
    """The latents that were chosen, their sum, or the one of them that is furthest from normal in each image."""
    deviation_BD = None
    if score == "most_deviant":
        normal_mu, normal_logvar = _posterior(normal, score, latents_BD)
        deviation_BD = (latents_BD - normal_mu).abs() * (-0.5 * normal_logvar).exp()
    if latents is not None:
        chosen_I, d = torch.as_tensor(latents).cpu(), latents_BD.shape[1]
        # A mask of booleans would be read as indices 0 and 1.
        whole = not (chosen_I.dtype == torch.bool or chosen_I.is_floating_point() or chosen_I.is_complex())
        chosen = chosen_I.tolist()
        if not (whole and chosen_I.ndim == 1 and 0 < len(chosen) == len(set(chosen) & set(range(d)))):
            raise ValueError(f"latents={chosen} must be one or more indices between 0 and {d - 1}, each named once")
        latents_BD = latents_BD[:, chosen]
        deviation_BD = None if deviation_BD is None else deviation_BD[:, chosen]
    if deviation_BD is not None:
        return latents_BD.gather(1, deviation_BD.argmax(1, keepdim=True))
    return latents_BD if score.startswith("each") else latents_BD.sum(1, keepdim=True)


def _posterior(normal: tuple[Tensor, Tensor] | None, score: Score, like: Tensor) -> list[Tensor]:
    if normal is None:
        raise ValueError(f"score={score!r} needs normal=(mu, logvar), the posterior of a normal image")
    return [value.detach().to(like) for value in normal]


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


def _recorded(x_BCYX: Tensor, modules: Iterable[nn.Module]) -> Tensor:
    """The images, so that autograd records what each layer does even where none of its parameters asks for it."""
    learn = all(any(parameter.requires_grad for parameter in module.parameters()) for module in modules)
    if learn or x_BCYX.requires_grad or not x_BCYX.is_floating_point():
        return x_BCYX
    return x_BCYX.detach().requires_grad_().clone()  # no leaf, which the encoder could not change in place


@contextmanager
def _outputs(
    modules: Mapping[str | nn.Module, nn.Module], names: Mapping[str | nn.Module, str], attached: bool
) -> Iterator[dict[str | nn.Module, list]]:
    """Collect what each module puts out."""
    outputs, here = {layer: list[Any]() for layer in modules}, threading.get_ident()

    def keep(layer: str | nn.Module, _module: nn.Module, _inputs: tuple, output: object) -> object:
        if threading.get_ident() != here:  # another thread uses the same model
            return output
        if not isinstance(output, Tensor) or output.ndim != 4:
            outputs[layer].append(list(output.shape) if isinstance(output, Tensor) else type(output).__name__)
            return output
        output = output.clone() if output.is_inference() and torch.is_grad_enabled() else output
        if torch.is_grad_enabled() and not output.requires_grad and not attached:
            hooks.callback(output.requires_grad_, False)
        kept = Output.of(names[layer], output, attached)
        outputs[layer].append(kept)
        return output if kept.copy is None else kept.copy

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
        for layer, module in modules.items():
            hooks.callback(module.register_forward_hook(partial(keep, layer)).remove)
        hooks.callback(register_module_forward_pre_hook(refuse).remove)
        yield outputs


def _as_written(encode: Callable, x_BCYX: Tensor) -> object:
    """What encode puts out, not as torch.compile made it: compiled code calls no hook, or keeps it for good."""
    if "torch._dynamo" not in sys.modules:  # who has compiled has imported it
        return encode(x_BCYX)
    with _eagerly:
        return encode(x_BCYX)


class _Eagerly:
    """Switches off what torch.compile made.

    The switch is the process's, and whoever turns it restores what was before: of threads that take turns at random,
    the last could leave it off for good. So the first thread in turns it, and the last one out restores it.
    """

    def __init__(self):
        self._lock, self._inside, self._stance = threading.Lock(), 0, ExitStack()

    def __enter__(self):
        with self._lock:
            if not self._inside:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside += 1

    def __exit__(self, *_raised):
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._stance.close()


_eagerly = _Eagerly()
