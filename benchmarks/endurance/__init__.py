"""Endurance: what is left of trainings and stored runs where processes are killed, inputs damaged and disks full.

    python -m benchmarks endurance --rounds 1     # a fifth: 20 kills, 40 malformed inputs, 12 s of writers

Nothing here is timed. What should never be is counted: a result that is lost or another one, a wrong result that nobody
is told of, a file half-written. Everything lies in temporary folders, networks and data are tiny, and chance is seeded.
"""

import tempfile
from collections import Counter
from pathlib import Path

import torch
from benchmarks.endurance import disk, kills, malformed, writers

from expvae_book import runs
from expvae_book.data import dsprites
from expvae_book.data.card import DataCard
from expvae_book.recipes import StepRecipe

PEERS = ()
RECIPE = kills.STEPS
DEVICE = torch.device("cpu")
# Of a whole measurement, of five rounds.
KILLS, MALFORMED, SECONDS = 100, 200, 60.0


def load(data: str) -> tuple[dsprites.Sprites, DataCard]:
    sprites = dsprites.sample()
    return sprites, sprites.card


def counted(subset: str, counts: Counter) -> list[dict]:
    """A row for each number of a part."""
    return [runs.row(name, number, "", subset) for name, number in counts.items()]


def measure(sprites: dsprites.Sprites, recipe: StepRecipe, device: torch.device, rounds: int) -> list[dict]:
    """The numbers of all four parts; what went wrong is said on the error stream as it is found."""
    share, rows = rounds / 5, []
    parts = {
        "kills": lambda folder: kills.measure(folder, round(KILLS * share)),
        "malformed inputs": lambda folder: malformed.measure(folder, round(MALFORMED * share)),
        "writers": lambda folder: writers.measure(folder, SECONDS * share),
        "full disk": disk.measure,
    }
    for name, part in parts.items():
        with tempfile.TemporaryDirectory(prefix="endurance-") as folder:
            rows += counted(name, part(Path(folder)))
    return rows
