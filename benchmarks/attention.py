"""Attention maps of all latents: expvae.attention beside one backward pass per latent and captum's LayerGradCam.

All three give the paper's map of each image. The networks are those of the book, with as many latents as the recipe
has. Their weights are as they are initialised, and they see digits enlarged to their input size; what a map costs
depends on neither.
"""

import dataclasses
import warnings
from collections.abc import Callable

import torch
from benchmarks import timing
from captum.attr import LayerGradCam
from torch import Tensor, nn
from torch.nn import functional as F

from expvae import Attention, attention
from expvae.models import MNISTVAE, UCSDVAE, MVTecVAE
from expvae_book import runs
from expvae_book.recipes import Recipe

PEERS = ("captum",)
OURS, LOOP, CAPTUM = "expvae.attention", "one latent at a time", "captum LayerGradCam"


@dataclasses.dataclass(frozen=True)
class Network:
    """A network, the images it is fed with, and the layers at which captum and every route are timed as well."""

    build: Callable[[int], nn.Module]
    shape: tuple[int, int, int, int]
    closely: tuple[str, ...]


NETWORKS = {
    "MNIST": Network(MNISTVAE, (8, 1, 28, 28), ("conv1", "conv2")),
    "UCSD": Network(UCSDVAE, (8, 1, 100, 100), ("conv1", "conv2", "conv3")),
    "MVTec": Network(MVTecVAE, (2, 3, 256, 256), ("conv1", "layer2.1.conv1", "layer4.1.conv2")),
}


def loop_maps(model: nn.Module, layer: str, x_BCYX: Tensor) -> Tensor:
    """The paper's map with one backward pass per latent, down to the layer."""
    kept = []

    def keep(_module: nn.Module, _inputs: tuple, output: Tensor) -> Tensor:
        kept.append(output.detach().requires_grad_())
        return kept[0].clone()

    handle = model.get_submodule(layer).register_forward_hook(keep)
    mu_I = model.encode(x_BCYX)[0].sum(0)
    handle.remove()
    maps = []
    for mu in mu_I:
        (gradient,) = torch.autograd.grad(mu, kept[0], retain_graph=True)
        maps.append((gradient.mean((2, 3), keepdim=True) * kept[0].detach()).sum(1).relu())
    map_B1HW = torch.stack(maps).mean(0).unsqueeze(1)
    return F.interpolate(map_B1HW, x_BCYX.shape[2:], mode="bilinear").squeeze(1)


def captum_maps(model: nn.Module, layer: str, x_BCYX: Tensor) -> Tensor:
    """The paper's map, one target of captum per latent."""
    gradcam = LayerGradCam(lambda x: model.encode(x)[0], model.get_submodule(layer))
    targets = range(model.mu.out_features)
    maps = [gradcam.attribute(x_BCYX, target=latent, relu_attributions=True).detach() for latent in targets]
    return F.interpolate(torch.stack(maps).mean(0), x_BCYX.shape[2:], mode="bilinear").squeeze(1)


def measure(x_NYX: Tensor, recipe: Recipe, device: torch.device, rounds: int) -> list[dict]:
    """Seconds per batch of each way at every convolution, the ratios to ours, and how far the maps are apart."""
    rows = []
    for name, network in NETWORKS.items():
        torch.manual_seed(0)
        model = network.build(recipe.latent_dim).eval().to(device)
        b, c, y, x = network.shape
        digit_B1YX = F.interpolate(x_NYX[:b, None].float().div(255), (y, x), mode="bilinear")
        rows.append(runs.row("images per batch", b, subset=name))
        x_BCYX = digit_B1YX.expand(b, c, y, x).contiguous().to(device)
        for layer, module in model.encoder.named_modules():
            if isinstance(module, nn.Conv2d):
                ways = _ways(model, f"encoder.{layer}", x_BCYX, layer in network.closely)
                rows += _compare(ways, f"{name} {layer}", rounds, device)
    return rows


def _ways(model: nn.Module, layer: str, x_BCYX: Tensor, closely: bool) -> dict[str, Callable[[], Tensor]]:
    def ours(route: str) -> Attention:
        return attention(model.encode, layer, x_BCYX, "liu2020_paper", route=route)

    ways = {OURS: lambda: ours("auto").map_BYX, LOOP: lambda: loop_maps(model, layer, x_BCYX)}
    if closely:
        ways[CAPTUM] = lambda: captum_maps(model, layer, x_BCYX)
        routes = ["loop", "batched"]
        # "pooled" exists only where the rule can take it, and it takes it there with so many latents.
        if ours("auto").route == "pooled":
            routes.append("pooled")
        for route in routes:
            ways[f"route {route}"] = lambda route=route: ours(route).map_BYX
    return ways


def _compare(ways: dict[str, Callable[[], Tensor]], subset: str, rounds: int, device: torch.device) -> list[dict]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Setting forward, backward hooks")  # captum's own
        expected = ways[LOOP]()
        error = max(float((way() - expected).abs().max() / expected.max()) for way in ways.values())
        seconds = timing.race(ways, rounds, device)
    rows = timing.rows("seconds", seconds, subset)
    ours = rows[0]["value"]
    ratios = [runs.row("ratio", row["value"] / ours, f"{row['method']} / {OURS}", subset) for row in rows[1:]]
    return [*rows, *ratios, runs.row("greatest difference / greatest value", error, "all ways", subset)]
