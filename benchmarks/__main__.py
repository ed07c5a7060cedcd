"""Speed of this library beside named peers, each pair in one run.

    python -m benchmarks [training] [attention] [pixel] [--rounds 5] [--data auto] [--device auto]

The contestants of a benchmark take turns, so that whatever else the machine does falls on all of them; what is printed
and stored under runs/performance/ is the median of the rounds, with the fastest and the slowest.
"""

import argparse
import time
from importlib.metadata import version

from benchmarks import attention, pixel, training
from lib import provenance, runs
from lib.data import mnist
from lib.recipes import MNIST

PEERS = ("numpy", "scikit-learn", "captum", "torchmetrics")
BENCHMARKS = {"training": training.measure, "attention": attention.measure, "pixel": pixel.measure}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="name", help=f"{', '.join(BENCHMARKS)}; all if none is named")
    parser.add_argument("--rounds", type=int, default=5, help="turns that each contestant takes after one to warm up")
    parser.add_argument("--data", choices=mnist.DATA, default="auto", help="which MNIST the networks are fed with")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or mps")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"{unknown[0]!r} is no benchmark; choose from: {', '.join(BENCHMARKS)}")
    if arguments.rounds < 1:
        parser.error("--rounds must be 1 or more")

    images = mnist.load(arguments.data)
    device = provenance.choose_device(arguments.device)
    for name in arguments.names or BENCHMARKS:
        started = time.monotonic()
        rows = BENCHMARKS[name](images.train_NYX, device, arguments.rounds)
        run = runs.save(
            "performance",
            {"benchmark": name, "data": arguments.data},
            metrics=rows,
            losses={},
            arrays={},
            figures={},
            card=images.card,
            recipe=MNIST["liu2020"],
            budget={"unit": "rounds", "asked": 5, "used": arguments.rounds},
            seconds={"all": time.monotonic() - started},
            device=provenance.describe_device(device),
            extra={"peers": {name: version(name) for name in PEERS}},
        )
        for row in rows:
            spread = f"[{row['low']:,.4g}, {row['high']:,.4g}]" if row["low"] is not None else ""
            print(f"{row['subset']:<34}{row['metric']:<12}{row['value']:>10,.4g}  {spread:<24}{row['method']}")
        print(run.caption)


if __name__ == "__main__":
    main()
