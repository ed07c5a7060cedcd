"""What tests/golden.py holds of the library: losses, maps and measures from fixed seeds and drawn images."""

from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from expvae import PRESETS, Method, attention, gradient_times_input, kl_divergence
from expvae import metrics as measure
from expvae.metrics import PixelMetrics
from expvae.metrics import _streaming as streaming
from expvae.models import (
    MNISTVAE,
    RBM,
    UCSDVAE,
    BrongersMVTecVAE,
    BrongersUCSDVAE,
    ConvRBM,
    MVTecVAE,
    Stack,
)
from expvae_book import augmentation, baselines, contrastive, factorvae, recipes, training, truth
from maps import exact as measured_exactly

AT = [0, 4, 9, 14, 19]  # of twenty steps, those whose losses are kept
# Of Adam: rounding, which is all there is to a gradient before a batch normalisation, then makes no steps of its own.
EPSILON = 1e3

Numbers = dict[str, float | list[float]]


# --- fixtures ---------------------------------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Numbers in [0, 1) that look random: whole numbers only, so that no version of a generator can change them."""
    value_N = np.arange(1, 1 + int(np.prod(shape)), dtype=np.uint64) + np.uint64(seed << 20)
    for factor in (0x45D9F3B, 0x119DE1F3):
        value_N = ((value_N ^ (value_N >> np.uint64(16))) * np.uint64(factor)) % np.uint64(2**32)
    return torch.from_numpy((value_N >> np.uint64(8)).astype(np.float32) / np.float32(2**24)).reshape(shape)


def discs(count: int, channels: int, size: int) -> Tensor:
    """Grey discs with soft rims, each channel with a centre of its own; whole numbers only, as bytes."""
    y_Y1, x_1X = torch.arange(size)[:, None], torch.arange(size)[None]
    images = []
    for n in range(count * channels):
        centre_y, centre_x, radius = 3 + n * 5 % (size - 5), 2 + n * 7 % (size - 4), 2 + n % 5 + size // 8
        squared = (y_Y1 - centre_y) ** 2 + (x_1X - centre_x) ** 2
        images.append((255 - 40 * (squared - radius**2)).clamp(0, 255))
    return torch.stack(images).reshape(count, channels, size, size).to(torch.uint8)


def anomalies(count: int = 12, size: int = 20) -> tuple[Tensor, Tensor, Tensor]:
    """Two maps of images with some anomalous rectangles, one better than the other, and the truth; some scores tie."""
    truth_NYX = torch.zeros(count, size, size, dtype=torch.bool)
    for n in range(0, count, 3):
        truth_NYX[n, 2 : 6 + n // 2, 3 : 8 + n // 3] = True
        truth_NYX[n + 1, 10:14, 5 + n // 2 : 12 + n // 2] = True
        truth_NYX[n + 1, 16:18, 1:4] = True
    image_N11 = noise(count, 1, 1, seed=2) / 2
    better_NYX = noise(count, size, size, seed=3) + 0.5 * truth_NYX + image_N11
    worse_NYX = noise(count, size, size, seed=4) + 0.2 * truth_NYX + image_N11
    return (50 * better_NYX).round() / 50, worse_NYX, truth_NYX


class Small(nn.Module):
    """An encoder with a layer of every kind: convolutions, a ReLU, one inside a ResNet's block, the last one."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu1 = nn.Conv2d(2, 6, kernel_size=4, stride=2, padding=1), nn.ReLU()
        self.block = nn.Sequential(
            nn.Conv2d(6, 6, kernel_size=3, padding=1), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)
        )
        self.conv2, self.relu2 = nn.Conv2d(6, 8, kernel_size=4, stride=2, padding=1), nn.ReLU()
        self.posterior = nn.Linear(8 * 4 * 3, 2 * 5)
        self.block[1].running_mean.copy_(noise(6, seed=5) - 0.5)
        self.block[1].running_var.copy_(noise(6, seed=6) + 0.5)

    def encode(self, x_BCYX: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance."""
        values = self.relu1(self.conv1(x_BCYX))
        values = (values + self.block(values)).relu()
        mu_BI, logvar_BI = self.posterior(self.relu2(self.conv2(values)).flatten(1)).chunk(2, dim=1)
        return mu_BI, logvar_BI


LAYERS = {"a convolution": "conv1", "a ReLU": "relu1", "in a ResNet's block": "block.0", "the last": "conv2"}


# --- losses -----------------------------------------------------------------------------------------------------------


def trained(make: Callable[[], nn.Module], shape: tuple[int, int], count: int, epochs: int, **options: Any) -> Numbers:
    """Reconstruction and KL of each step, summed over its batch of `count`/5 images or one, and of a held-out image."""
    recorded: list[list[float]] = []
    terms, images = training.elbo_terms, discs(count + 1, *shape)
    # A smaller learning rate than a recipe's keeps rounding errors small: 20 steps of 1e-3 make 1e-7 into 1e-3.
    recipe = replace(recipes.MNIST["liu2020"], batch_size=max(1, count // 5), **({"learning_rate": 1e-4} | options))

    def record(model: nn.Module, x_BCYX: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        found = terms(model, x_BCYX, generator)
        if model.training:
            recorded.append([term_B.sum().item() for term_B in found])
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "elbo_terms", record)
        model = training.build(make, 0)
        history = training.train(model, images[:-1], images[-1:], recipe, epochs=epochs, seed=0, progress=False)
    reconstruction, kl = (list(part) for part in zip(*recorded, strict=True))
    held_out = [history.validation_reconstruction[-1], history.validation_kl[-1]]
    return {"reconstruction": reconstruction, "kl": kl, "held out": held_out}


def losses() -> Numbers:
    """Steps of every VAE, also with the mean for the sum and a warm-up of the KL term; and multiplied images."""
    warm, calm = {"reduction": "mean", "kl_warmup_epochs": 3}, {"learning_rate": 1e-5, "epsilon": EPSILON}
    found = {
        "MNISTVAE": trained(MNISTVAE, (1, 28), 20, 4),
        "MNISTVAE, mean and warm-up": trained(MNISTVAE, (1, 28), 20, 4, **warm),
        "UCSDVAE": trained(UCSDVAE, (1, 100), 4, 1),
        "BrongersUCSDVAE": trained(BrongersUCSDVAE, (1, 96), 4, 1, **calm),
        "MVTecVAE": trained(MVTecVAE, (3, 256), 3, 1, **calm),
        "BrongersMVTecVAE": trained(BrongersMVTecVAE, (3, 256), 3, 1, **calm),
    }
    for name in augmentation.AUGMENTATIONS:
        x_NCYX = augmentation.augment(discs(3, 3, 32), "carpet", name, 7, 0).float()
        found[f"augmentation {name}"] = {"levels": [x_NCYX.mean().item(), x_NCYX.std().item()]}
    return {f"{name}, {part}": values for name, parts in found.items() for part, values in parts.items()}


def factor_losses() -> Numbers:
    """Twenty steps of β-VAE, FactorVAE and AD-FactorVAE with every variant of L_AD."""
    images = (discs(24, 1, 64) > 100).to(torch.uint8)
    recipe = replace(recipes.DSPRITES["report2"], batch_size=4, latent_dim=6)
    models = {"β-VAE": factorvae.Candidate(beta=4.0), "FactorVAE": factorvae.Candidate(gamma=40.0)}
    for name, penalty in factorvae.VARIANTS.items():
        weights = {"gamma": 40.0, "attention_weight": 5.0, "detached": name != "brongers2021"}
        models[f"AD-FactorVAE, {name}"] = factorvae.Candidate(**weights, penalty=penalty)
    made = factorvae.train(
        list(models.values()),
        images.__getitem__,
        torch.arange(len(images)),
        recipe,
        steps=20,
        device=torch.device("cpu"),
        data_digest="",
        progress=False,
    )
    parts = ("reconstruction", "kl", "total_correlation", "discriminator", "attention")
    return {
        f"{name}, {part}": [getattr(one.curves, part)[step] for step in AT]
        for (name, one), part in product(zip(models, made, strict=True), parts)
        if getattr(one.curves, part)
    }


def machines() -> Numbers:
    """Twenty steps of CD and persistent CD of both kinds of machine with both kinds of units, and a stack of two."""
    found: Numbers = {}
    images = discs(22, 1, 8)
    kinds = {"RBM": partial(RBM, 64, 12), "ConvRBM": partial(ConvRBM, (1, 8, 8), 5, 3, 2)}
    for (kind, make), units, persistent in product(kinds.items(), ("binary", "spin"), (False, True)):
        recipe = recipes.RBMRecipe("golden", 10, 8, 0.1, 1 + persistent, persistent, 0.5, 1e-3, True)
        machine = training.build(lambda make=make, units=units: make(units=units), 0)
        contrastive.start_biases(machine, images[:16])
        history = contrastive.train(machine, images[:16], images[16:], recipe, epochs=10, seed=0, progress=False)
        name = f"{kind}, {units}, {'persistent CD' if persistent else 'CD'}"
        v = (training.to_unit(images[16:]) * machine.step - (machine.step - 1)).reshape(6, *machine.visible_shape)
        with torch.no_grad():
            energies = [machine.free_energy(v).mean(), machine.energy(v, machine.activate(machine(v))).mean()]
            found[f"{name}, energies"] = [value.item() for value in energies]
            found[f"{name}, all bits"] = machine.pseudo_log_likelihood(v).mean().item()
            found[f"{name}, weights"] = [
                value.item() for part in machine.parameters() for value in (part.mean(), part.square().mean().sqrt())
            ]
        found[f"{name}, pseudo-likelihood"] = [history.pseudo_likelihood[step] for step in (0, 4, 9)]
        found[f"{name}, gap of free energy"] = [history.free_energy_gap[step] for step in (0, 4, 9)]
    stack = training.build(lambda: Stack([ConvRBM((1, 8, 8), 5, 3, 2, "spin"), RBM(45, 6, "spin")], (1, 8, 8)), 0)
    recipe = recipes.RBMRecipe("golden", 10, 8, 0.1)
    contrastive.train_stack(stack, images[:16], images[16:], recipe, epochs=10, seed=0, progress=False)
    x_BCYX, chance = training.to_unit(images[16:]), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, values in {
            "encoded": stack.encode(x_BCYX),
            "relaxed": stack.encode(x_BCYX, 0.5, chance),
            "restored": stack.reconstruct(x_BCYX),
            "samples": stack.sample(4, 5, chance),
        }.items():
            found[f"stack, {name}"] = [values.mean().item(), values.std().item()]
    return found


# --- maps -------------------------------------------------------------------------------------------------------------


def maps() -> Numbers:
    """A map of each preset, and of the paper's rule for anomalies, at each kind of layer; and some other choices."""
    model = training.build(Small, 0).eval()
    x_BCYX = noise(3, 2, 16, 12, seed=7)
    normal = noise(5, seed=8) - 0.5, noise(5, seed=9) - 1
    named = PRESETS | {"normal_difference": Method(score="normal_difference")}
    cases = [
        (f"{name}, {kind}", how, layer)
        for (name, how), (kind, layer) in product(named.items(), LAYERS.items())
        # An activation follows directly, or there is no such map.
        if how.tensor == "before" or layer in ("conv1", "conv2")
    ]
    cases += [
        ("divided per image", replace(PRESETS["liu2020_code"], normaliser="image"), "conv1"),
        ("after the activation", Method(tensor="after"), "conv1"),
        ("two highest, added", Method(channels="mean_of_abs", aggregate="sum", highest=2), "conv1"),
    ]
    found: Numbers = {}
    for name, how, layer in cases:
        chance = torch.Generator().manual_seed(0)
        made = attention(model.encode, model.get_submodule(layer), x_BCYX, how, normal=normal, generator=chance)
        found[name] = [*summary(made.map_BYX), made.alpha_BIC.sum().item(), made.alpha_BIC.abs().sum().item()]
    found["gradient times input"] = summary(gradient_times_input(lambda x_BCYX: model.encode(x_BCYX)[0], x_BCYX))
    for graph in ("constant_alpha", "second_order"):
        loss = attention(model.encode, model.conv2, x_BCYX, graph=graph).map_BYX.square().sum()
        gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
        found[f"gradient of a loss, {graph}"] = [g.norm().item() for g in gradients if g is not None]
    return found


def summary(map_BYX: Tensor) -> list[float]:
    """Mean, standard deviation, maximum, a corner, and a pixel within."""
    return [v.item() for v in (map_BYX.mean(), map_BYX.std(), map_BYX.max(), map_BYX[0, 0, 0], map_BYX[-1, 6, 5])]


# --- measures ---------------------------------------------------------------------------------------------------------


def measures() -> Numbers:
    """Every measure of maps and images on one fixture, intervals by images and by clips, truth and baselines."""
    better_NYX, worse_NYX, truth_NYX = anomalies()
    n, flags = len(truth_NYX), truth_NYX.flatten(1).any(1)
    where_NYX = noise(*truth_NYX.shape, seed=5) < 0.7
    masks = [None if i % 4 == 3 else mask_YX for i, mask_YX in enumerate(truth_NYX)]
    clips, scores = torch.arange(n) // 2, {"better": better_NYX, "worse": worse_NYX}
    found: Numbers = {}
    counts = {name: PixelMetrics(regions=True) for name in scores}
    for name, score_NYX in scores.items():
        exact = asdict(measured_exactly(score_NYX, truth_NYX, regions=True, threshold=0.9))
        found |= {f"{name}, {field}": value for field, value in exact.items()}
        counts[name].update(score_NYX, truth_NYX, unit=clips)
    for rule in ("leave out", "normal"):
        found[f"without a mask: {rule}"] = measured_exactly(worse_NYX, masks, without_mask=rule).average_precision
    with pytest.MonkeyPatch.context() as patch:  # as where there are more pixels than are kept
        for name, limit in (("EXACT_PIXELS", 1000), ("MAX_CELLS", 500)):
            patch.setattr(streaming, name, limit)
        coarse = PixelMetrics()
        coarse.update(worse_NYX, truth_NYX)
        found["in cells"] = [coarse.compute().auroc, coarse.compute().best_iou]
    among = PixelMetrics()
    among.update(worse_NYX, truth_NYX, clips, where=where_NYX)
    intervals: dict[Any, measure.Interval] = {
        "pixel AUROC by images": measure.auroc_interval(worse_NYX, truth_NYX, seed=0),
        "pixel AUROC somewhere": measure.auroc_interval(worse_NYX, truth_NYX, where_NP=where_NYX, seed=0),
        "pixel AUROC somewhere by clips": among.auroc_interval(seed=0),
        "image AUROC": measure.auroc_interval(worse_NYX.mean((1, 2)), flags, seed=0),
        "share": measure.fraction_interval(flags),
        "AUROC, difference": measure.auroc_difference(*counts.values(), seed=0),
    }
    intervals |= {f"{name} by clips": one for name, one in counts["worse"].intervals(seed=0, resamples=300).items()}
    better, worse = (one.replicates(seed=0, resamples=300) for one in counts.values())
    values = [one.compute() for one in counts.values()]
    for name in ("auroc", "aupro", "best_iou"):
        change = getattr(values[0], name) - getattr(values[1], name)
        intervals[f"{name}, difference"] = measure.percentile_interval(change, better[name] - worse[name], 0.95, 6)
    for case, one in measure.iou_intervals(worse_NYX, truth_NYX, validation=1.1, seed=0).items():
        intervals[f"IoU, {', '.join(case)}"] = one
    for name, one in intervals.items():
        found |= {name: one.value, f"{name}: ends": [one.low, one.high], f"{name}: units": one.n}
    found["AUROC"] = measure.auroc(better_NYX, truth_NYX)
    found["AUROC of each image"] = measure.auroc_per_image(worse_NYX[flags], truth_NYX[flags]).tolist()
    found["active units"] = measure.active_units(noise(50, 8) * torch.arange(8) / 15)

    inlier_MYX, x_NYX = training.to_unit(discs(9, 1, 16))[:, 0], training.to_unit(discs(30, 1, 16)[9:])[:, 0]
    found["nearest inliers"] = truth.nearest_inlier(x_NYX, inlier_MYX).tolist()
    for tolerance in (0, 1):
        found[f"ink, {tolerance}"] = int(truth.ink_truth(x_NYX, inlier_MYX, tolerance).sum())
    x_BCYX, chance = noise(2, 3, 12, 9), torch.Generator().manual_seed(0)
    for name, map_BYX in baselines.maps(x_BCYX, noise(2, 3, 12, 9, seed=2), x_BCYX.mean(0), chance).items():
        found[f"baseline, {name}"] = summary(map_BYX)
    return found


def disentangled() -> Numbers:
    """The metrics of disentanglement of a code that mixes two factors and has a silent latent."""
    sizes, chance = (1, 3, 2, 4, 4, 4), torch.Generator().manual_seed(0)
    mu_NI = measure.perfect_code(sizes, 2, chance) * torch.tensor([1, 1, 0.6, 0.6, 0.6, 0.1, 0.01])
    mu_NI[:, 0] += 0.4 * mu_NI[:, 2]
    mu_NI += 0.9 * noise(*mu_NI.shape)
    logvar_NI = noise(*mu_NI.shape, seed=2) - 3
    kl_NI = kl_divergence(mu_NI, logvar_NI)
    found: Numbers = {}
    rules = {"variance": measure.active_by_variance(mu_NI, 0.2), "KL": measure.active_by_kl(kl_NI, 1.0)}
    for (name, protocol), (rule, active_I) in product(
        {"reference": measure.REFERENCE, "published": measure.PUBLISHED}.items(), rules.items()
    ):
        score = measure.factor_vae_metric(mu_NI, sizes, protocol, active_I=active_I, generator=chance)
        found[f"FactorVAE metric, {name}, {rule}"] = [score.interval.value, score.interval.low, score.interval.high]
        found[f"latents, {name}, {rule}"] = score.active
    for points in (2000, None):
        gap_K = measure.mutual_information_gap(mu_NI, sizes, points=points, generator=chance)
        found[f"MIG, {points or 'all'} points"] = [gap_K.mean().item(), *gap_K.tolist()]
    forest = measure.dci(mu_NI, sizes, train=250, held_out=134, generator=chance)
    found["DCI"] = [forest.disentanglement, forest.completeness, forest.informativeness]
    tc = measure.total_correlation(mu_NI, logvar_NI, samples=200, generator=chance)
    found["total correlation"] = [tc.value, tc.low, tc.high]
    return found
