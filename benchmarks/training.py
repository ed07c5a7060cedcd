"""Training speed of the VAEs: ours beside a plain PyTorch loop, and beside products of matrices in both precisions.

The plain loop is what one would write first: a DataLoader over PIL images, probabilities and binary_cross_entropy,
and Adam as it comes. Both train the MNIST VAE on the same images with the same batch size, in float32.

Of every network's loop, in float32 and in bfloat16, the rate at which its convolutions and products of matrices are
computed is given as a share of the rate of one large product in that precision, measured in the same rounds.
"""

import dataclasses
from collections.abc import Callable

import torch
from benchmarks import timing
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image, to_tensor

from expvae import elbo_terms
from expvae.models import MNISTVAE, UCSDVAE, MVTecVAE
from expvae_book import recipes, runs, training
from expvae_book.devices import PRECISIONS
from expvae_book.recipes import Recipe

PEERS = ("torchvision", "pillow")
IMAGES = 2560  # per epoch; one epoch is one turn
SIDE = 2048  # of the matrices whose product is the peer of a network's operations
STEPS = 4  # of the loop of a network beside that product


@dataclasses.dataclass(frozen=True)
class Network:
    """A network and what it is trained with."""

    build: Callable[[int], nn.Module]
    shape: tuple[int, int, int]
    recipe: Recipe


NETWORKS = {
    "MNIST": Network(MNISTVAE, (1, 28, 28), recipes.MNIST["liu2020"]),
    "UCSD": Network(UCSDVAE, (1, 100, 100), recipes.UCSD["report1"]),
    "MVTec": Network(MVTecVAE, (3, 256, 256), recipes.MVTEC["report2"]),
}


class PILImages(Dataset):
    """Images that are made from bytes one by one, as torchvision's data sets do."""

    def __init__(self, x_NYX: torch.Tensor):
        self.images = [to_pil_image(x_YX) for x_YX in x_NYX]

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One image [1, Y, X] in [0, 1]."""
        return to_tensor(self.images[index])


def plain_epoch(x_NYX: torch.Tensor, recipe: Recipe, device: torch.device) -> None:
    model = MNISTVAE(recipe.latent_dim).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    loader = DataLoader(PILImages(x_NYX), batch_size=recipe.batch_size, shuffle=True)
    for x in loader:
        x = x.to(device)
        mu, logvar = model.encode(x)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        reconstruction = F.binary_cross_entropy(model.decode(z).sigmoid(), x, reduction="sum")
        loss = reconstruction - 0.5 * torch.sum(1 + logvar - mu.pow(2) - logvar.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()  # to print it, as such loops do


def our_epoch(x_NYX: torch.Tensor, recipe: Recipe, device: torch.device) -> None:
    """expvae_book.training, with next to no validation."""
    model = training.build(lambda: MNISTVAE(recipe.latent_dim), seed=0).to(device)
    x_NCYX = x_NYX[:, None]
    training.train(model, x_NCYX, x_NCYX[:2], recipe, epochs=1, seed=0, progress=False)


def operations(network: Network) -> int:
    """Multiplications and additions of convolutions and products, in both passes of one image."""
    x_BCYX = torch.zeros(2, *network.shape)
    with FlopCounterMode(display=False) as counter:
        reconstruction_B, kl_B = elbo_terms(network.build(network.recipe.latent_dim), x_BCYX, torch.Generator())
        (reconstruction_B + kl_B).sum().backward()
    return counter.get_total_flops() // len(x_BCYX)


def shares(name: str, network: Network, device: torch.device, rounds: int) -> list[dict]:
    """Images per second of a network's loop in each precision, and its rate beside that of one large product."""
    # Turn after turn on noise a model would diverge at the recipe's own rate, which no speed depends on.
    recipe, ways = dataclasses.replace(network.recipe, learning_rate=1e-6), {}
    images = STEPS * recipe.batch_size
    x_NCYX = torch.randint(0, 256, (images, *network.shape), dtype=torch.uint8)
    for precision in PRECISIONS:
        model = training.build(lambda: network.build(recipe.latent_dim), seed=0).to(device)
        factor = torch.randn(SIDE, SIDE, device=device, dtype=getattr(torch, precision))
        ways[f"training, {precision}"] = lambda model=model, precision=precision: training.train(
            model, x_NCYX, x_NCYX[:2], recipe, epochs=1, seed=0, precision=precision, progress=False
        )
        ways[f"product, {precision}"] = lambda factor=factor: factor @ factor
    seconds = timing.race(ways, rounds, device)
    loops = {way: [images / s for s in values] for way, values in seconds.items() if way.startswith("training")}
    rows, per_image = timing.rows("images/s", loops, name), operations(network)
    for row, precision in zip(list(rows), PRECISIONS, strict=True):
        peer = 2 * SIDE**3 / min(seconds[f"product, {precision}"])
        rows.append(runs.row("GFLOP/s of a product", peer / 1e9, precision, name))
        rows.append(runs.row("share of the rate of a product", row["value"] * per_image / peer, precision, name))
    return rows


def measure(x_NYX: torch.Tensor, recipe: Recipe, device: torch.device, rounds: int) -> list[dict]:
    """Images per second of both loops and their ratio; then of every network in each precision, and its share."""
    x_NYX = x_NYX[:IMAGES]
    recipe = dataclasses.replace(recipe, epochs=1)
    seconds = timing.race(
        {
            "expvae_book.training": lambda: our_epoch(x_NYX, recipe, device),
            "plain loop (DataLoader over PIL images, Adam as it comes)": lambda: plain_epoch(x_NYX, recipe, device),
        },
        rounds,
        device,
    )
    rows = timing.rows("images/s", {name: [len(x_NYX) / s for s in values] for name, values in seconds.items()})
    ours, plain = (row["value"] for row in rows)
    rows.append(runs.row("ratio", ours / plain, method="expvae_book.training / plain loop"))
    return rows + [row for name, network in NETWORKS.items() for row in shares(name, network, device, rounds)]
