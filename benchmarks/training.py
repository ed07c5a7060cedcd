"""Training speed of the MNIST VAE, ours beside a plain PyTorch loop.

The plain loop is what one would write first: a DataLoader over PIL images, probabilities and binary_cross_entropy,
and Adam as it comes. Both train the same network on the same images with the same batch size.
"""

import dataclasses

import torch
from benchmarks import timing
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor

from expvae.models import MNISTVAE
from expvae_book import runs, training
from expvae_book.recipes import Recipe

PEERS = ("torchvision", "pillow")
IMAGES = 2560  # per epoch; one epoch is one turn


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


def measure(x_NYX: torch.Tensor, recipe: Recipe, device: torch.device, rounds: int) -> list[dict]:
    """Images per second of both loops, and their ratio."""
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
    return [*rows, runs.row("ratio", ours / plain, method="expvae_book.training / plain loop")]
