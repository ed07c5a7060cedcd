"""Versions of what makes a number: whole numbers that records, keys of weights and golden files carry.

Raise a version when numbers move that were right by the old one; nothing else outdates a run. What keeps that honest
are the golden numbers of tests/golden: when one of them moves, either the code is mended or a version here is raised.
"""

from collections.abc import Mapping
from typing import Any

# What several experiments share.
TRAINING = "TRAINING"  # the VAEs, ELBO, the loop, augmentation, mixed precision
ATTENTION = "ATTENTION"  # maps of latents and of inputs, with every preset
PIXEL = "PIXEL"  # measures of maps and images, their intervals, the truth of digits, baselines
FACTORVAE = "FACTORVAE"  # models, discriminator, L_AD, training and the metrics of disentanglement
RBM = "RBM"  # machines, stacks and contrastive divergence

VERSIONS = {
    **dict.fromkeys((TRAINING, ATTENTION, PIXEL, FACTORVAE, RBM), 1),
    # Experiments: what a chapter draws, explains, measures and compares, beyond the above.
    "method": 1,
    "mnist": 4,
    "ucsd": 3,
    "mvtec": 3,
    "sanity": 2,  # 2: what explains the maps of untrained networks
    "disentanglement": 1,
    "rbm": 2,
    "ablations": 1,
    "reuse": 1,
    # Benchmarks: what is timed, and beside what.
    "benchmark attention": 1,
    "benchmark endurance": 1,
    "benchmark factorvae": 1,
    "benchmark gpu": 1,
    "benchmark pixel": 1,
    "benchmark precision": 1,
    "benchmark rbm": 1,
    "benchmark training": 1,
}

SHARED = {
    "method": (TRAINING, ATTENTION),
    "mnist": (TRAINING, ATTENTION, PIXEL),
    "ucsd": (TRAINING, ATTENTION, PIXEL),
    "mvtec": (TRAINING, ATTENTION, PIXEL),
    "sanity": (TRAINING, ATTENTION, PIXEL),
    "disentanglement": (FACTORVAE, ATTENTION),
    "rbm": (RBM, TRAINING, ATTENTION, PIXEL),
    "ablations": (TRAINING, ATTENTION, PIXEL),
    "reuse": (TRAINING, ATTENTION),
}


def used(chapter: str, parameters: Mapping[str, Any]) -> dict[str, int]:
    """The versions that a run of a chapter rests on, by name.

    Raises:
        ValueError: If there is no such experiment.
    """
    experiment = {"mvtec10": "mvtec", "mvtec15": "mvtec"}.get(chapter, chapter)
    if chapter == "performance":
        experiment = f"benchmark {parameters['benchmark']}"
    return versions(*SHARED.get(experiment, ()), experiment)


def versions(*names: str) -> dict[str, int]:
    """The versions of these protocols.

    Raises:
        ValueError: If there is none of a name.
    """
    unknown = [name for name in names if name not in VERSIONS]
    if unknown:
        raise ValueError(f"there is no protocol {unknown[0]!r}; there are {', '.join(VERSIONS)}")
    return {name: VERSIONS[name] for name in names}
