"""Training speed of the MNIST VAE, ours beside a plain PyTorch loop, in one run.

    python benchmarks/training.py [--rounds 5] [--images 2560] [--data auto]

The plain loop is what one would write first: a DataLoader over PIL images, probabilities and binary_cross_entropy,
and Adam as it comes. Both train the same network on the same images with the same batch size; they take turns, so that
whatever else the machine does falls on both. The result is printed and stored under runs/performance/.
"""

import argparse
import dataclasses
import statistics
import time

import torch
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.functional import to_pil_image, to_tensor

from lib import provenance, runs, training
from lib.data import mnist
from lib.models.mnist import MNISTVAE
from lib.recipes import MNIST, Recipe


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


def plain_epoch(x_NYX: torch.Tensor, recipe: Recipe, device: torch.device) -> float:
    """Seconds that the plain loop takes for one epoch."""
    model = MNISTVAE(recipe.latent_dim).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=recipe.learning_rate)
    loader = DataLoader(PILImages(x_NYX), batch_size=recipe.batch_size, shuffle=True)
    started = time.perf_counter()
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
    return time.perf_counter() - started


def our_epoch(x_NYX: torch.Tensor, recipe: Recipe, device: torch.device) -> float:
    """Seconds that lib.training takes for one epoch, without validation."""
    model = training.build(lambda: MNISTVAE(recipe.latent_dim), seed=0).to(device)
    x_NCYX = x_NYX[:, None]
    return training.train(model, x_NCYX, x_NCYX[:2], recipe, epochs=1, seed=0, progress=False).seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="turns that each loop takes after one to warm up")
    parser.add_argument("--images", type=int, default=2560, help="images per epoch")
    parser.add_argument("--data", choices=mnist.DATA, default="auto")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.images < 1:
        parser.error("--rounds and --images must be 1 or more")

    images = mnist.load(arguments.data)
    x_NYX = images.train_NYX[: arguments.images]
    recipe = dataclasses.replace(MNIST["liu2020"], epochs=1)
    device = provenance.choose_device(arguments.device)
    loops = {"lib.training": our_epoch, "plain loop (DataLoader over PIL images, Adam as it comes)": plain_epoch}
    started = time.monotonic()
    rates: dict[str, list[float]] = {name: [] for name in loops}
    for turn in range(arguments.rounds + 1):
        for name, epoch in loops.items():
            rate = len(x_NYX) / epoch(x_NYX, recipe, device)
            if turn:
                rates[name].append(rate)

    rows = [
        runs.row("images/s", statistics.median(values), method=name, low=min(values), high=max(values), n=len(values))
        for name, values in rates.items()
    ]
    ours, plain = (row["value"] for row in rows)
    rows.append(runs.row("ratio", ours / plain, method="lib.training / plain loop"))
    run = runs.save(
        "performance",
        {"benchmark": "training", "data": arguments.data},
        metrics=rows,
        losses={},
        arrays={},
        figures={},
        card=images.card,
        recipe=MNIST["liu2020"],
        budget={"unit": "rounds", "asked": 5, "used": arguments.rounds},
        seconds={"all": time.monotonic() - started},
        device=provenance.describe_device(device),
    )
    for row in rows:
        spread = f"  [{row['low']:,.0f}, {row['high']:,.0f}]" if row["low"] is not None else ""
        print(f"{row['metric']:>10}  {row['value']:>8,.2f}{spread}  {row['method']}")
    print(run.caption)


if __name__ == "__main__":
    main()
