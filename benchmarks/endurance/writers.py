"""Two processes that store and amend the same runs, while this one reads them: everything read is of one write."""

import os
import sys
import time
from collections import Counter
from pathlib import Path
from unittest.mock import patch

import numpy as np
from benchmarks.endurance import kills
from tqdm import tqdm

from expvae_book import provenance, runs

SEEDS = (0, 1, 2)  # of the runs that are written: neighbours in one folder


def save(seed: int, value: int) -> runs.Run:
    """Store a run whose every number is this one."""
    parts = {"losses": {"kl": [value]}, "arrays": {"curve": np.full(5000, value)}}
    return kills.store({"seed": seed}, metrics=[runs.row("AUROC", value)], **parts)


def write(folder: Path, number: int, seconds: float) -> None:
    """Store and amend runs for so long, with numbers that no other writer takes; leaves how often in a file."""
    os.environ["EXPVAE_RUNS"] = str(folder)
    provenance.commit = lambda: {"commit": None, "dirty": None}  # git would take most of the time
    draw, count, until = np.random.default_rng(number), 0, time.time() + seconds
    while time.time() < until:
        count += 1
        run = save(int(draw.choice(SEEDS)), number + 2 * count)
        runs.amend(run, {"note": count})
    (folder / f"writes of {number}").write_text(str(2 * count))


def problem(seed: int) -> str | None:
    """Read a run and what is wrong with it; None where it was stored anew before its arrays were read."""
    run = runs.load("reuse", {"seed": seed})
    if run is None or len(found := runs.find("reuse")) != len(SEEDS):
        return "it is not there" if run is None else f"{len(found)} of {len(SEEDS)} are found"
    try:
        values = {run.metric("AUROC")["value"], *run.record["losses"]["kl"], *np.unique(run.arrays["curve"]).tolist()}
    except ValueError as error:
        return None if "stored anew" in str(error) else str(error)
    return "" if len(values) == 1 else f"it holds the numbers {values}"


def measure(folder: Path, seconds: float) -> Counter:
    """Count writes, reads and corruptions of so many seconds."""
    counts = Counter({"writes": 0, "reads": 0, "reads told that it was stored anew": 0, "corruptions": 0})
    with patch.dict(os.environ, EXPVAE_RUNS=str(folder)):
        for seed in SEEDS:
            save(seed, 0)
        writers = [kills.start(write, folder, number, seconds) for number in (0, 1)]
        with tqdm(desc="reads between two writers", file=sys.stderr) as bar:
            while any(writer.is_alive() for writer in writers):
                wrong = problem(SEEDS[bar.n % len(SEEDS)])
                bar.update()
                counts["reads"] += 1
                counts["reads told that it was stored anew"] += wrong is None
                if wrong:
                    counts["corruptions"] += 1
                    tqdm.write(f"A run that two write: {wrong}.", file=sys.stderr)
        for writer in writers:
            writer.join()
            counts["corruptions"] += writer.exitcode != 0
    counts["writes"] = sum(int(file.read_text()) for file in folder.glob("writes of *"))
    return counts
