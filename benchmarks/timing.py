"""Contestants that take turns, and what is reported of them."""

import statistics
import time
from collections.abc import Callable

import torch

from expvae_book import runs


def race(contestants: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds that each contestant takes, `rounds` times in turn after one turn that is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds + 1):
        for name, run in contestants.items():
            _synchronise(device)
            started = time.perf_counter()
            run()
            _synchronise(device)
            if turn:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def rows(metric: str, samples: dict[str, list[float]], subset: str = "") -> list[dict]:
    """Median, least and greatest of each contestant."""
    return [
        runs.row(metric, statistics.median(values), name, subset, low=min(values), high=max(values), n=len(values))
        for name, values in samples.items()
    ]


def _synchronise(device: torch.device) -> None:
    """Wait for the accelerator, which works on while Python goes ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
