"""A GPU beside the CPU: speed of every training, and how far all that is computed on both is apart.

Both start from the same weights and get the same images and the same noise, drawn on the CPU, in float32 without
TensorFloat-32, so that they differ by the order of sums alone. Images are sprites, in the size that a network takes.
Speed is that of the trainings which the chapters run, 20 steps a turn, with the batch of the recipe.
"""

import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial

import torch
from benchmarks import timing
from torch import Tensor, nn
from torch.nn import functional as F

from expvae import attention, elbo_terms, kl_divergence, metrics, permute_latents
from expvae.models import (
    MNISTVAE,
    RBM,
    UCSDVAE,
    BrongersMVTecVAE,
    BrongersUCSDVAE,
    ConvRBM,
    MVTecVAE,
    Report2MVTecVAE,
    Stack,
)
from expvae_book import contrastive, devices, disentanglement, factorvae, recipes, runs, training
from expvae_book.checkpoints import adam
from expvae_book.data import dsprites
from expvae_book.data.card import DataCard
from expvae_book.explanation import method_of
from expvae_book.factorvae import VARIANTS, Candidate
from expvae_book.factorvae_losses import discriminate
from expvae_book.measures import PRESETS
from expvae_book.recipes import DSPRITES, Recipe, StepRecipe

PEERS = ()  # PyTorch on both
RECIPE = DSPRITES["report2"]
STEPS = 20
COMPARED = 4  # images whose losses, maps and measures are compared
CPU = torch.device("cpu")
DIFFERENCE = "greatest difference / greatest value"
METHODS = {name: method_of(name) for name in PRESETS}


@dataclasses.dataclass(frozen=True)
class Network:
    """A VAE, the images it takes, its recipe, and the layers that are explained."""

    build: Callable[[int], nn.Module]
    shape: tuple[int, int, int]
    recipe: Recipe
    layers: tuple[str, ...]


NETWORKS = {
    "MNIST": Network(MNISTVAE, (1, 28, 28), recipes.MNIST["liu2020"], ("conv1", "conv2")),
    "UCSD": Network(UCSDVAE, (1, 100, 100), recipes.UCSD["report1"], ("conv1", "conv2", "conv3")),
    "UCSD, Brongers et al.": Network(
        BrongersUCSDVAE, (1, 96, 96), recipes.UCSD["brongers2021"], ("conv1", "conv2", "conv3")
    ),
    "MVTec": Network(MVTecVAE, (3, 256, 256), recipes.MVTEC["report1"], ("conv1", "layer2.1.conv1", "layer4.1.conv2")),
    "MVTec, Brongers et al.": Network(
        BrongersMVTecVAE, (3, 256, 256), recipes.MVTEC["brongers2021"], ("layer2.1.conv1",)
    ),
    "MVTec, second report": Network(Report2MVTecVAE, (3, 256, 256), recipes.MVTEC["report2_code"], ("layer1.0.conv2",)),
}
FACTORVAES = {
    "β-VAE": Candidate(beta=4.0),
    "FactorVAE": Candidate(gamma=40.0),
    **{
        f"AD-FactorVAE, {name}": Candidate(gamma=40.0, attention_weight=1.0, penalty=VARIANTS[name])
        for name in VARIANTS
    },
}
MACHINES = {
    "RBM": lambda: Stack([RBM(784, 500), RBM(500, 200)]),
    "convolutional RBM": lambda: Stack([ConvRBM((1, 28, 28), 16, 4, 2), RBM(16 * 13 * 13, 64)]),
}


def load(data: str) -> tuple[dsprites.Sprites, DataCard]:
    sprites = dsprites.load(data)
    return sprites, sprites.card


def images(sprites: dsprites.Sprites, count: int, shape: tuple[int, int, int]) -> Tensor:
    """So many sprites of the training, as bytes in the shape that a network takes."""
    x_NCYX = sprites.images(disentanglement.split()[0][torch.linspace(0, 700_000, count).long()]).float() * 255
    return F.interpolate(x_NCYX, shape[1:], mode="bilinear").byte().expand(-1, shape[0], -1, -1).contiguous()


# What is compared: results by name -----------------------------------------------------------------------------------


def losses(network: Network, x_NCYX: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The negative ELBO at each of some steps of Adam."""
    model = training.build(lambda: network.build(network.recipe.latent_dim), 0).to(device).train()
    optimizer, _ = adam(dict(model.named_parameters()), lr=network.recipe.learning_rate)
    generator, x_BCYX, told = torch.Generator().manual_seed(0), training.to_unit(x_NCYX.to(device)), []
    for _ in range(STEPS):
        loss = torch.stack(elbo_terms(model, x_BCYX, generator)).sum(0).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told.append(loss.detach())
    return {f"losses of {STEPS} steps": torch.stack(told)}


def maps(network: Network, layer: str, x_NCYX: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The maps of one layer by every preset, and the paper's by every route."""
    model = training.build(lambda: network.build(network.recipe.latent_dim), 0).to(device).eval()
    x_BCYX = training.to_unit(x_NCYX.to(device))
    with torch.no_grad():
        normal = tuple(part.mean(0) for part in model.encode(x_BCYX)[:2])
    generator = torch.Generator().manual_seed(0)
    found = attention(model.encode, f"encoder.{layer}", x_BCYX, METHODS, normal=normal, generator=generator)
    for route in sorted({"loop", "batched", found["liu2020_paper"].route}):
        found[f"route {route}"] = attention(model.encode, f"encoder.{layer}", x_BCYX, route=route)
    return {name: one.map_BYX for name, one in found.items()}


def first_step(candidate: Candidate, x_NCYX: Tensor, device: torch.device) -> dict[str, Tensor]:
    """All losses of a model of dSprites by its initial weights, and the gradient of their sum."""
    group, b = factorvae.Group([candidate], RECIPE, device), len(x_NCYX)
    generator = torch.Generator().manual_seed(0)
    noise_MBI, order_MBI = (torch.randn(1, b, RECIPE.latent_dim, generator=generator).to(device) for _ in range(2))
    x_BMYX, random_M2 = training.to_unit(x_NCYX.to(device)), torch.tensor([[0, 1]], device=device)
    parts, z_MBI = factorvae.losses(group, x_BMYX, noise_MBI, random_M2)
    weights = group.optimizer.param_groups[0]["params"]
    gradients = list(torch.autograd.grad(sum(parts.values()).sum(), weights, retain_graph=True))
    if candidate.gamma > 0:
        judged = discriminate(group.discriminator, z_MBI, permute_latents(z_MBI, order_MBI.argsort(1)))
        parts |= {"total correlation": judged.total_correlation_M, "discriminator": judged.loss_M}
        gradients += [judged.toward_latents_MBI, *judged.gradients]
    told = {name: part.detach() for name, part in parts.items()}
    return told | {"gradient": torch.cat([gradient.flatten() for gradient in gradients])}


def contrast(build: Callable[[], Stack], x_NCYX: Tensor, device: torch.device) -> dict[str, Tensor]:
    """The weights of the first machine of a stack after some steps, and what the stack then says of the images."""
    stack, generator = training.build(build, 0).to(device), torch.Generator().manual_seed(0)
    machine, x_BCYX = stack.layers[0], training.to_unit(x_NCYX.to(device))
    with torch.no_grad():
        v = stack.visible(x_BCYX)
        chain = machine.weight.new_zeros(len(v), *machine.hidden_shape)
        for _ in range(STEPS):
            slopes = {name: torch.zeros_like(value) for name, value in machine.named_parameters()}
            chain = contrastive.add_contrast(slopes, machine, v, chain, 1, generator)
            for name, parameter in machine.named_parameters():
                parameter.add_(slopes[name], alpha=0.1 * machine.rates[name])
        told = {"free energy": machine.free_energy(v), "pseudo-log-likelihood": machine.pseudo_log_likelihood(v)}
        told["reconstruction"] = stack.reconstruct(x_BCYX)
    return {f"weights after {STEPS} steps": machine.weight.detach(), **told}


def measures(map_NYX: Tensor, device: torch.device) -> dict[str, Tensor]:
    """Every measure of maps and of latents; the maps and the latents are the same on both."""
    generator = torch.Generator().manual_seed(0)
    truth_NYX = (map_NYX > map_NYX.quantile(0.9)).roll(3, -1).to(device)
    map_NYX = map_NYX.to(device)
    counts = metrics.PixelMetrics(regions=True)
    counts.update(map_NYX, truth_NYX)
    told = {name: value for name, value in vars(counts.compute()).items() if value is not None}
    flagged = metrics.confusion(map_NYX, truth_NYX, metrics.thresholds(map_NYX)["grid"])
    told |= {"IoU by image": metrics.ious(flagged, "per image", "both").max()}
    told |= {"AUROC": metrics.auroc(map_NYX, truth_NYX)}
    told |= {"AUROC by image": metrics.auroc_per_image(map_NYX.flatten(1), truth_NYX.flatten(1)).mean()}
    sizes = disentanglement.lattice(8)[1]
    mu_NI = metrics.perfect_code(sizes, 5, generator).to(device)
    logvar_NI = torch.full_like(mu_NI, -2.0)
    for row in disentanglement.metric_rows(mu_NI, logvar_NI, kl_divergence(mu_NI, logvar_NI), sizes):
        told[", ".join(filter(None, (row["metric"], row["method"], row["subset"])))] = row["value"]
    return {name: torch.tensor(float(value)) for name, value in told.items()}


def comparisons(sprites: dsprites.Sprites) -> Iterator[tuple[str, Callable[[torch.device], dict[str, Tensor]]]]:
    """Everything that is computed on both, by what it is of."""
    for name, network in NETWORKS.items():
        x_NCYX = images(sprites, COMPARED, network.shape)
        yield name, partial(losses, network, x_NCYX)
        for layer in network.layers:
            yield f"{name} {layer}", partial(maps, network, layer, x_NCYX)
    for name, candidate in FACTORVAES.items():
        yield name, partial(first_step, candidate, images(sprites, COMPARED, (1, 64, 64)))
    x_NCYX = images(sprites, COMPARED, (1, 28, 28))
    for name, build in MACHINES.items():
        yield name, partial(contrast, build, x_NCYX)
    shown = maps(NETWORKS["MNIST"], "conv2", x_NCYX, CPU)["liu2020_paper"]
    yield "measures", partial(measures, shown)


def differences(subset: str, compute: Callable[[torch.device], dict[str, Tensor]], device: torch.device) -> list[dict]:
    """How far each result is apart on the device and on the CPU, over its greatest value."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        expected, found = compute(CPU), compute(device)
    rows = []
    for name, there in expected.items():
        apart, greatest = (found[name].cpu() - there).abs().max().item(), there.abs().max().item()
        rows.append(runs.row(DIFFERENCE, apart / greatest if greatest else apart, name, subset))
    return rows


# What is timed -------------------------------------------------------------------------------------------------------


def trainings(sprites: dsprites.Sprites) -> Iterator[tuple[str, Callable[[torch.device, str], object]]]:
    """The trainings of this book, for some steps each on a device and in a precision."""

    def of_vae(network: Network, device: torch.device, precision: str) -> None:
        model = training.build(lambda: network.build(network.recipe.latent_dim), 0).to(device)
        x_NCYX, recipe = images(sprites, STEPS * network.recipe.batch_size, network.shape), network.recipe
        training.train(model, x_NCYX, x_NCYX[:2], recipe, epochs=1, seed=0, precision=precision, progress=False)

    def of_sprites(candidate: Candidate, device: torch.device, precision: str) -> None:
        group, there = factorvae.Group([candidate], RECIPE, device), sprites.to(device)
        train_N = disentanglement.split()[0].to(device)
        for _ in range(STEPS):
            factorvae.step(group, there.images, train_N, RECIPE.batch_size, precision)

    def of_machines(build: Callable[[], Stack], device: torch.device, precision: str) -> None:
        recipe = recipes.RBM["ours"]
        x_NCYX = images(sprites, STEPS * recipe.batch_size, (1, 28, 28))
        stack = training.build(build, 0).to(device)
        contrastive.train_stack(stack, x_NCYX, x_NCYX[:2], recipe, epochs=1, seed=0, progress=False)

    for train, cases in ((of_vae, NETWORKS), (of_sprites, FACTORVAES), (of_machines, MACHINES)):
        for name, case in cases.items():
            yield name, partial(train, case)


def speeds(name: str, train: Callable[[torch.device, str], object], device: torch.device, rounds: int) -> list[dict]:
    """Seconds per step on the device in both precisions, and on the CPU in float32, which takes one turn."""
    there = {f"{device.type}, {precision}": partial(train, device, precision) for precision in devices.PRECISIONS}
    seconds = timing.race(there, rounds, device)
    seconds |= timing.race({"cpu, float32, 1 turn": partial(train, CPU, "float32")}, 1, CPU)
    return timing.rows("seconds per step", {way: [s / STEPS for s in turns] for way, turns in seconds.items()}, name)


def measure(sprites: dsprites.Sprites, recipe: StepRecipe, device: torch.device, rounds: int) -> list[dict]:
    """Seconds per step of every training, then how far every result is apart."""
    if device.type == "cpu":
        print("There is no GPU here to hold against the CPU: nothing was run, and nothing is stored.")
        sys.exit()
    rows = [row for name, train in trainings(sprites) for row in speeds(name, train, device, rounds)]
    return rows + [row for subset, compute in comparisons(sprites) for row in differences(subset, compute, device)]
