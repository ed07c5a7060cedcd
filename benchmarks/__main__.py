"""Speed of this library beside named peers, each pair in one run.

    python -m benchmarks [training] [attention] [pixel] [factorvae] [rbm] [--rounds 5] [--data auto] [--device auto]
    python -m benchmarks precision --rounds 3     # no speed, but what bfloat16 changes in the result; an hour or more
    python -m benchmarks gpu                      # a GPU beside the CPU: speed, and that they agree
    python -m benchmarks endurance                # no speed, but kills, malformed inputs, two writers and a full disk

The contestants of a benchmark take turns, so that whatever else the machine does falls on all of them; what is printed
and stored under runs/performance/ is the median of the rounds, with the fastest and the slowest.

A benchmark is a module with `measure` and PEERS. It is fed with MNIST and a recipe of MNIST, on the device asked for,
unless it has a `load`, a RECIPE or a DEVICE of its own.
"""

import argparse
import importlib
import subprocess
import sys
import time
from importlib.metadata import version

import torch

from expvae_book import devices, runs
from expvae_book.data import mnist
from expvae_book.data.card import DataCard
from expvae_book.recipes import MNIST

TIMED = ("training", "attention", "pixel", "factorvae", "rbm")
NAMES = (*TIMED, "precision", "gpu", "endurance")
DATA = ("auto", "real", "sample")
RECIPE = MNIST["liu2020"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(NAMES)}; the first five if none is named")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contestant takes after one to warm up")
    parser.add_argument("--data", choices=DATA, default="auto", help="which data the networks are fed with")
    parser.add_argument("--device", default="auto", help="where the networks run: auto, cpu, cuda or mps")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in NAMES]
    if unknown:
        parser.error(f"{unknown[0]!r} is no benchmark; choose from: {', '.join(NAMES)}")
    if arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")
    try:
        device = devices.choose_device(arguments.device)
    except ValueError as error:
        parser.error(str(error))

    names = arguments.names or TIMED
    if len(names) == 1:
        measure(names[0], arguments.data, device, arguments.rounds)
        return
    options = ["--rounds", str(arguments.rounds), "--data", arguments.data, "--device", arguments.device]
    for name in names:
        # Each in a process of its own, so that what one leaves in memory slows no other.
        done = subprocess.run([sys.executable, "-m", "benchmarks", name, *options])
        if done.returncode != 0:
            sys.exit(done.returncode)


def load_mnist(data: str) -> tuple[torch.Tensor, DataCard]:
    images = mnist.load(data)
    return images.train_NYX, images.card


def measure(name: str, data: str, device: torch.device, rounds: int) -> None:
    """Measure, store and print one benchmark, in this process."""
    benchmark = importlib.import_module(f"benchmarks.{name}")
    images, card = getattr(benchmark, "load", load_mnist)(data)
    recipe = getattr(benchmark, "RECIPE", RECIPE)
    device = getattr(benchmark, "DEVICE", device)
    started = time.monotonic()
    rows = benchmark.measure(images, recipe, device, rounds)
    run = runs.save(
        "performance",
        {"benchmark": name, "data": data},
        metrics=rows,
        losses={},
        arrays={},
        figures={},
        card=card,
        recipe=recipe,
        budget={"unit": "rounds", "asked": 5, "used": rounds},
        seconds={"all": time.monotonic() - started},
        device=devices.describe_device(device),
        extra={"peers": {peer: version(peer) for peer in benchmark.PEERS}, **getattr(images, "extra", {})},
    )
    for row in rows:
        spread = f"[{row['low']:,.4g}, {row['high']:,.4g}]" if row["low"] is not None else ""
        print(f"{row['subset']:<34}{row['metric']:<12}{row['value']:>10,.4g}  {spread:<24}{row['method']}")
    print(run.caption)


if __name__ == "__main__":
    main()
