"""SIGKILL at random moments of small jobs: training with many checkpoints, measuring, storing and verifying.

A job is a process of its own, forked from one that has imported everything, so that all of its time is that of the job.
It is killed at a moment that is drawn uniformly over the time of an undisturbed one, and started again, to be killed
again, until it ends. Then the store must hold what the undisturbed job stored, bit for bit but for dates and durations.
"""

import os
import shutil
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from threading import RLock
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from expvae.models import RBM, DSpritesVAE, Stack
from expvae_book import factorvae, probes, recipes, runs, weights
from expvae_book.data import dsprites

VAE = replace(recipes.MNIST["liu2020"], batch_size=4, latent_dim=3)
MACHINE = replace(recipes.RBM["ours"], batch_size=4)
STEPS = replace(recipes.DSPRITES["report2"], batch_size=4, latent_dim=3)
CARD = dsprites.sample().card
CPU = torch.device("cpu")
UNEQUAL = ("seconds", "created")  # entries of a record that no two jobs share
LEFT = (".lock", "*.tmp", ".writing-*")  # what may lie beside a run and what a killed writer may leave: nobody reads it


def start(target: Callable, *arguments: Any) -> BaseProcess:
    """Call a function in a process that is forked from one without threads which has imported this package."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.endurance"])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def store(parameters: dict, **parts: Any) -> runs.Run:
    """Store a run in which all that is not given is empty."""
    asked: dict = {part: {} for part in ("losses", "arrays", "figures", "seconds")}
    asked |= {"metrics": [], "recipe": VAE, "budget": {"unit": "epochs", "asked": 1, "used": 1}, "device": "cpu"}
    return runs.save("reuse", parameters, card=CARD, **(asked | parts))


def job(trainer: str, folder: Path) -> None:
    """Train, measure, store and verify, with the store and the cache in a folder; says where when it begins."""
    torch.set_num_threads(1)
    tqdm.set_lock(RLock())  # not one between processes, of which a kill would leave something behind
    os.environ |= {"EXPVAE_RUNS": str(folder / "runs"), "EXPVAE_CACHE": str(folder / "cache")}
    weights.CHECKPOINT_SECONDS = 0.05
    (folder / "begun").touch()
    sprites = dsprites.sample()
    x_NCYX = sprites.images(torch.arange(0, dsprites.COUNT, 9001)) * 255
    model, file, losses, recipe = TRAINERS[trainer](sprites, x_NCYX)
    layer = "maps.0" if trainer == "Boltzmann machine" else "encoder.conv2"
    probe = probes.take(model, file, x_NCYX, layer, seed=0)
    figure = Figure(figsize=(1, 1))
    figure.add_subplot().plot(next(iter(losses.values())))
    run = store(
        {"trainer": trainer.replace(" ", "_")},
        metrics=[runs.row(name, float(np.sum(array)), "sum") for name, array in probe.arrays.items()],
        losses=losses,
        arrays={name: value.detach().numpy() for name, value in model.named_parameters() if value.numel() < 10_000},
        figures={"panel": figure},
        recipe=recipe,
        seconds={"all": time.monotonic()},
        probe=probe,
    )
    probes.verify(run, x_NCYX.__getitem__)


def vae(sprites: dsprites.Sprites, x_NCYX: Tensor) -> tuple[nn.Module, str, dict, recipes.Recipe]:
    trained = of_images(lambda: DSpritesVAE(VAE.latent_dim), x_NCYX, VAE)
    return trained.model, trained.file, {"kl": trained.history.kl}, VAE


def machine(sprites: dsprites.Sprites, x_NCYX: Tensor) -> tuple[nn.Module, str, dict, recipes.RBMRecipe]:
    trained = of_images(lambda: Stack([RBM(4096, 16), RBM(16, 8)], shape=(1, 64, 64)), x_NCYX, MACHINE)
    return trained.model, trained.file, {"pseudo-likelihood": trained.history[1].pseudo_likelihood}, MACHINE


def of_images(make: Callable[[], nn.Module], x_NCYX: Tensor, recipe: Any) -> weights.Trained:
    options = {"epochs": 2, "seed": 0, "device": CPU, "progress": False, "precision": "float32"}
    return weights.trained(make, x_NCYX[8:], x_NCYX[:8], recipe, **options)


def factor(sprites: dsprites.Sprites, x_NCYX: Tensor) -> tuple[nn.Module, str, dict, recipes.StepRecipe]:
    options = {"steps": 12, "device": CPU, "data_digest": sprites.card.digest, "progress": False}
    candidate, index_N = factorvae.Candidate(gamma=10.0), torch.arange(0, dsprites.COUNT, 901)
    (trained,) = factorvae.train([candidate], sprites.images, index_N, STEPS, **options)
    return trained.vae, trained.file, {"kl": trained.curves.kl}, STEPS


TRAINERS = {"VAE": vae, "FactorVAE": factor, "Boltzmann machine": machine}


def stored(folder: Path) -> tuple[dict, dict[str, bytes], list[str]]:
    """The record of the only run there, its other files, and all files of store and cache that should not be there.

    Raises:
        ValueError: If there is not one run, or it is damaged.
    """
    with patch.dict(os.environ, EXPVAE_RUNS=str(folder / "runs")):
        (run,) = runs.find()
    record = {name: value for name, value in run.record.items() if name not in UNEQUAL}
    record["verified"] = {"difference": run.record["verified"]["difference"]}
    content = {name: array.tobytes() for name, array in run.arrays.items()}
    content |= {"figure": run.figure("panel").read_bytes()}
    known = [run.folder / name for name in ("record.json", "arrays.npz", "figures/panel.png")]
    odd = [str(path) for path in (folder / "cache").glob("*.tmp")]
    for path in (folder / "runs").rglob("*"):
        left = any(part.match(pattern) for part in (path, *path.parents) for pattern in LEFT)
        odd += [] if left or path in known or path.is_dir() else [str(path)]
    return record, content, odd


def duration(trainer: str, folder: Path) -> float:
    """Seconds of an undisturbed job."""
    folder.mkdir()
    process = start(job, trainer, folder)
    process.join()
    return time.time() - (folder / "begun").stat().st_mtime


def endured(trainer: str, folder: Path, seconds: float, draw: np.random.Generator, most: int) -> tuple[int, bool]:
    """Start a job again and again until it ends; how often it was killed, of so many times, and if it ended well."""
    folder.mkdir()
    for killed in range(most + 1):
        (folder / "begun").unlink(missing_ok=True)
        process = start(job, trainer, folder)
        while process.is_alive() and not (folder / "begun").exists():
            time.sleep(0.001)
        if killed < most:
            process.join(draw.uniform(0, seconds))
            process.kill()
        process.join()
        if process.exitcode != -9:
            break
    return killed, process.exitcode == 0


def measure(folder: Path, count: int, trainers: Sequence[str] = tuple(TRAINERS)) -> Counter:
    """Kill jobs of each trainer so often in all, and count what was lost or different."""
    draw, counts = np.random.default_rng(0), Counter({"kills": 0, "jobs": 0, "lost results": 0, "different results": 0})
    seconds = {trainer: duration(trainer, folder / trainer) for trainer in trainers}
    expected = {trainer: stored(folder / trainer) for trainer in trainers}
    with tqdm(total=count, desc="kills", file=sys.stderr) as bar:
        while counts["kills"] < count:
            trainer = trainers[counts["jobs"] % len(trainers)]
            place, most = folder / f"job {counts['jobs']}", count - counts["kills"]
            killed, ended = endured(trainer, place, seconds[trainer], draw, most)
            counts.update({"kills": killed, "jobs": 1})
            bar.update(killed)
            try:
                problem = "" if ended else "lost"
                problem = problem if stored(place) == expected[trainer] else "different"
            except (ValueError, OSError) as error:
                problem = f"lost: {error}"
            if problem:
                tqdm.write(f"The {trainer} in {place}, killed {killed} times: {problem}.", file=sys.stderr)
                counts[f"{problem.partition(':')[0]} results"] += 1
            shutil.rmtree(place)
    return counts
