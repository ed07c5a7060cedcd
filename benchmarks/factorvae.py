"""Training speed of FactorVAE: models side by side, and a plain PyTorch loop that trains one.

The plain loop is what one would write first, and what public code of FactorVAE does: a Dataset that makes two images
per item, a DataLoader, the networks and Adam as they come, and the loss of each step read to be printed. Its step
computes what one of expvae_book.factorvae does. Public code differs in one point, which would take it longer: it lets
the discriminator's loss through the encoder. In bfloat16 the plain loop has the same mixed precision, one autocast
around its losses.

Of ours in each precision, the rate at which convolutions and products of matrices are computed is given as a share of
the rate of one large product in that precision, measured in the same rounds. Counted is what a step needs.
"""

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from benchmarks import timing
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torch.utils.flop_counter import FlopCounterMode

from expvae import elbo_terms
from expvae.models import DSpritesVAE, discriminator
from expvae_book import devices, factorvae, runs
from expvae_book.data import dsprites
from expvae_book.data.card import DataCard
from expvae_book.devices import PRECISIONS
from expvae_book.factorvae import VARIANTS, Candidate
from expvae_book.recipes import DSPRITES, StepRecipe
from expvae_book.training import build

PEERS = ()  # the plain loop is PyTorch alone
RECIPE = DSPRITES["report2"]
GAMMA = 40.0
IMAGES = 2560  # in memory, as many for the plain loop as for ours
STEPS = {1: 6, 4: 4, 10: 3}  # of each model in one turn, by the number of models
GPU_STEPS = 20  # times as many there, where a step takes milliseconds
SIDE = 2048  # of the matrices whose product is the peer of a step's operations
PLAIN, ADDED = "plain loop, 1 model", "1 model, AD-FactorVAE"


def load(data: str) -> tuple[dsprites.Sprites, DataCard]:
    sprites = dsprites.load(data)
    return sprites, sprites.card


# --- the plain loop ---------------------------------------------------------------------------------------------------


class Pairs(Dataset):
    """Two images per item, made from bytes one by one: its own, and one at random for the discriminator."""

    def __init__(self, x_NYX: np.ndarray):
        self.x_NYX = x_NYX

    def __len__(self) -> int:
        """Number of items."""
        return len(self.x_NYX)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Two images [1, Y, X], 0 or 1."""
        return self._image(index), self._image(random.randrange(len(self)))

    def _image(self, index: int) -> Tensor:
        return torch.from_numpy(self.x_NYX[index]).unsqueeze(0).float()


def permute(z: Tensor) -> Tensor:
    return torch.cat([column[torch.randperm(len(z)).to(z.device)] for column in z.split(1, dim=1)], dim=1)


def plain_step(
    vae: DSpritesVAE,
    critic: nn.Module,
    optimizers: tuple[torch.optim.Optimizer, torch.optim.Optimizer],
    x: Tensor,
    other: Tensor,
    precision: str,
) -> tuple[float, float]:
    """One step of both networks on two batches of images.

    Returns:
        The loss of the VAE and that of the discriminator.
    """
    vae_optimizer, critic_optimizer = optimizers
    with devices.mixed(precision, x.device):
        mu, logvar = vae.encode(x)
        z = mu + (0.5 * logvar).exp() * torch.randn_like(mu)
        reconstruction = F.binary_cross_entropy_with_logits(vae.decode(z), x, reduction="sum") / len(x)
        kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1).mean()
        logits = critic(z)
        vae_loss = reconstruction + kl + GAMMA * (logits[:, 0] - logits[:, 1]).mean()

        mu, logvar = vae.encode(other)
        permuted = permute(mu + (0.5 * logvar).exp() * torch.randn_like(mu)).detach()
        zeros = torch.zeros(len(x), dtype=torch.long, device=x.device)
        joint_loss = F.cross_entropy(critic(z.detach()), zeros)
        critic_loss = 0.5 * (joint_loss + F.cross_entropy(critic(permuted), torch.ones_like(zeros)))

    vae_optimizer.zero_grad()
    vae_loss.backward()
    critic_optimizer.zero_grad()
    critic_loss.backward()
    vae_optimizer.step()
    critic_optimizer.step()
    return vae_loss.item(), critic_loss.item()  # to print them, as such loops do


def plain_loop(
    x_NYX: np.ndarray, recipe: StepRecipe, device: torch.device, precision: str, steps: int
) -> Callable[[], None]:
    """So many steps of the plain loop, which goes on at the next call."""
    vae = build(lambda: DSpritesVAE(recipe.latent_dim), seed=0).to(device)
    critic = build(lambda: discriminator(recipe.latent_dim), seed=0).to(device)
    optimizers = (
        torch.optim.Adam(vae.parameters(), lr=recipe.learning_rate, betas=recipe.betas),
        torch.optim.Adam(critic.parameters(), lr=recipe.critic_learning_rate, betas=recipe.critic_betas),
    )
    batches = _endless(DataLoader(Pairs(x_NYX), batch_size=recipe.batch_size, shuffle=True, drop_last=True))

    def turn() -> None:
        for _ in range(steps):
            x, other = next(batches)
            plain_step(vae, critic, optimizers, x.to(device), other.to(device), precision)

    return turn


def _endless(loader: DataLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


# --- ours -------------------------------------------------------------------------------------------------------------


def side_by_side(
    candidates: Sequence[Candidate],
    sprites: dsprites.Sprites,
    index_N: Tensor,
    recipe: StepRecipe,
    device: torch.device,
    precision: str,
    steps: int,
) -> Callable[[], None]:
    """So many steps of expvae_book.factorvae, without its bar and its files; they go on at the next call."""
    group = factorvae.Group(candidates, recipe, device)
    draw, index_N = sprites.to(device).images, index_N.to(device)

    def turn() -> None:
        for _ in range(steps):
            factorvae.step(group, draw, index_N, recipe.batch_size, precision)

    return turn


def operations(recipe: StepRecipe) -> int:
    """Multiplications and additions of convolutions and products in one step of one model.

    Both passes of the VAE for one batch, the encoder's first for the other, and both of the discriminator for both.
    """
    count, latent_dim = recipe.batch_size, recipe.latent_dim
    vae, critic = DSpritesVAE(latent_dim), discriminator(latent_dim)
    x_BCYX = torch.zeros(count, 1, factorvae.SIDE, factorvae.SIDE)
    with FlopCounterMode(display=False) as counter:
        reconstruction_B, kl_B = elbo_terms(vae, x_BCYX, torch.Generator())
        (reconstruction_B + kl_B).sum().backward()
        critic(torch.zeros(2 * count, latent_dim, requires_grad=True)).sum().backward()
        with torch.no_grad():
            vae.encode(x_BCYX)
    return counter.get_total_flops()


def measure(sprites: dsprites.Sprites, recipe: StepRecipe, device: torch.device, rounds: int) -> list[dict]:
    """Steps per second, those of all models added up, their ratios to the plain loop, and shares of a product's rate.

    AD-FactorVAE, for which there is no plain loop here, is compared to FactorVAE.
    """
    index_N = torch.randperm(len(sprites), generator=torch.Generator().manual_seed(0))[:IMAGES]
    x_NYX = sprites.images(index_N).squeeze(1).cpu().numpy()
    steps = {count: number * (1 if device.type == "cpu" else GPU_STEPS) for count, number in STEPS.items()}
    grids = {_name(count, precision): (_grid(count), precision) for precision in PRECISIONS for count in STEPS}
    grids[ADDED] = (_grid(1, attention_weight=1.0, penalty=VARIANTS["liu2020"]), "float32")

    contestants, done, products = {}, {}, {}
    for precision in PRECISIONS:
        name = _in(PLAIN, precision)
        contestants[name], done[name] = plain_loop(x_NYX, recipe, device, precision, steps[1]), steps[1]
        factor = torch.randn(SIDE, SIDE, device=device, dtype=getattr(torch, precision))
        products[precision] = lambda factor=factor: factor @ factor
    for name, (candidates, precision) in grids.items():
        number = steps[len(candidates)]
        contestants[name] = side_by_side(candidates, sprites, index_N, recipe, device, precision, number)
        done[name] = number * len(candidates)

    seconds = timing.race(contestants | products, rounds, device)
    rows = timing.rows("steps/s", {name: [number / s for s in seconds[name]] for name, number in done.items()})
    rates, per_step = {row["method"]: row["value"] for row in rows}, operations(recipe)
    for name, (_, precision) in grids.items():
        peer = _name(1, precision) if name == ADDED else _in(PLAIN, precision)
        rows.append(runs.row("ratio", rates[name] / rates[peer], f"{name} / {peer}"))
        if name != ADDED:  # its products for L_AD are not counted
            product = 2 * SIDE**3 / min(seconds[precision])
            rows.append(runs.row("share of the rate of a product", rates[name] * per_step / product, name))
    return rows


def _name(count: int, precision: str) -> str:
    return _in("1 model" if count == 1 else f"{count} models side by side", precision)


def _in(name: str, precision: str) -> str:
    return name if precision == "float32" else f"{name}, {precision}"


def _grid(count: int, **choices: object) -> list[Candidate]:
    return [Candidate(gamma=GAMMA, seed=seed, **choices) for seed in range(count)]
