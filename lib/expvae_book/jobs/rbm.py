"""Boltzmann machines on MNIST: stacks that know one digit, and how their maps find what is foreign in others.

A job trains two stacks, of fully connected machines and with a convolutional one below, beside the VAE of the chapter
on MNIST. Test images and their truth are those of that chapter.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from jaxtyping import Bool, Float
from matplotlib.figure import Figure
from torch import Tensor, nn

from expvae import PRESETS, attention, elbo_terms, gradient_times_input, upsample
from expvae.metrics import auroc
from expvae.models import RBM, ConvRBM, Stack
from expvae_book import baselines, devices, explanation, figures, names, probes, recipes, runs, training, truth, weights
from expvae_book.chapters import Job
from expvae_book.data import mnist
from expvae_book.jobs import steps
from expvae_book.jobs.digits import Digits
from expvae_book.jobs.mnist import draw, network
from expvae_book.names import AUROC, ERROR, OUTLIERS, STACKS

RECIPE = "liu2020"  # of the VAE
ATTENTION, REPORT, INPUT, PLACED = names.MACHINE_MAPS
VAE, STACKED, CONVOLUTIONAL = MODELS = ("VAE", *STACKS)
IMAGE_SCORES = (*names.ENERGIES, "negative ELBO, VAE", "ink (mean intensity)")
AS_REPORTED = replace(PRESETS["liu2020_code"], tensor="after")
ORDERS = 20  # in which the units of the report's map are numbered
ONE_HOT_TEMPERATURE = 0.1  # in the report's published code

Maps = dict[str, Float[Tensor, "n ..."]]


def networks(recipe: str, units: str) -> dict[str, Callable[[], nn.Module]]:
    """How to build the VAE and both stacks: one of fully connected machines, one with a convolutional machine below."""
    sizes, above = recipes.FULLY_CONNECTED[recipe], recipes.CONVOLUTIONAL[1:]
    return {
        VAE: network(RECIPE),
        STACKED: lambda: Stack([RBM(*pair, units) for pair in pairwise(sizes)]),
        CONVOLUTIONAL: lambda: Stack([ConvRBM((1, 28, 28), 32, kernel=7, stride=3, units=units), RBM(*above, units)]),
    }


def fit(job: Job, digits: Digits) -> dict[str, steps.Fit]:
    """The trainings of the VAE and of both stacks: done, where the run of a job is stored, or done now.

    Raises:
        ValueError: If the stack of the recipe has no such layer.
    """
    wanted, name, of_vae = job.parameters, job.parameters.get("recipe", "ours"), recipes.MNIST[RECIPE]
    machines = len(recipes.FULLY_CONNECTED[name]) - 1
    if wanted["layer"] > machines:
        raise ValueError(f"layer={wanted['layer']} must be 1 to {machines}, the machines of recipe={name!r}")
    train = partial(weights.trained, seed=wanted["seed"], device=devices.choose_device(wanted["device"]))
    hows = dict.fromkeys(STACKS, (recipes.RBM[name], wanted["epochs"])) | {VAE: (of_vae, of_vae.epochs)}
    fits = {
        kind: steps.Fit(partial(train, make, digits.train_NCYX, digits.held_out_NCYX, recipe, epochs=epochs))
        for kind, make in networks(name, wanted["units"]).items()
        for recipe, epochs in [hows[kind]]
    }
    if job.run is None:
        trained = {kind: one.trained for kind, one in fits.items()}
        job.losses = {
            f"{part}, {stack}, machine {number}": getattr(history, part)
            for stack in STACKS
            for number, history in enumerate(trained[stack].history, 1)
            for part in ("pseudo_likelihood", "free_energy_gap")
        }
    return fits


def explained(
    stack: Stack,
    placed: Stack,
    x_BCYX: Float[Tensor, "b 1 y x"],
    layer: int,
    temperature: float,
    noise: Mapping[str, torch.Generator],
) -> Maps:
    """The report's map of the stack, the gradient times the input, and the paper's map at the convolutional machine.

    Latents are those of one relaxed sample of each unit, by the noise of the map, or means where it has none. "grid" is
    the report's map at the layer, a value for each unit.
    """

    def encoder(of: Stack, kind: str) -> Callable[[Tensor], Tensor]:
        return (lambda x: of.encode(x, temperature, noise[kind])) if kind in noise else of.encode

    reported = attention(encoder(stack, REPORT), stack.maps[layer - 1], x_BCYX, AS_REPORTED)
    return {
        REPORT: reported.map_BYX,
        INPUT: gradient_times_input(encoder(stack, INPUT), x_BCYX),
        PLACED: attention(encoder(placed, PLACED), placed.maps[0], x_BCYX).map_BYX,
        "grid": reported.linear_BIHW[:, 0],
    }


def explain(job: Job, fits: Mapping[str, steps.Fit], digits: Digits) -> Maps:
    """Maps by every method, and scores of whole images, of all test images; nothing where the run is stored."""
    if job.run is not None:
        return {}
    vae, *stacks = (fits[name].trained.model for name in MODELS)
    layer, temperature, seed = (job.parameters[name] for name in ("layer", "temperature", "seed"))
    where, mean_CYX = next(vae.parameters()).device, training.to_unit(digits.train_NCYX).mean(0)
    chance, elbo_noise = (torch.Generator().manual_seed(seed) for _ in range(2))
    noise = {kind: torch.Generator().manual_seed(seed) for kind in (REPORT, INPUT, PLACED)} if temperature else {}
    parts = []
    for levels_BYX in digits.test_NYX.split(digits.batch):
        x_BCYX = training.to_unit(levels_BYX[:, None]).to(where)
        with torch.no_grad():
            restored = {VAE: vae.decode(vae.encode(x_BCYX)[0]).sigmoid()}
            restored |= {name: of.reconstruct(x_BCYX) for name, of in zip(STACKS, stacks, strict=True)}
            scores = [of.layers[0].free_energy(of.visible(x_BCYX)) for of in stacks]
            scores += [sum(elbo_terms(vae, x_BCYX, elbo_noise)), x_BCYX.mean((1, 2, 3))]
        batch = {ATTENTION: attention(vae.encode, "encoder.conv2", x_BCYX).map_BYX, "restored": restored[STACKED][:, 0]}
        batch |= explained(*stacks, x_BCYX, layer, temperature, noise)
        if noise:
            by_means = explained(*stacks, x_BCYX, layer, temperature, {})
            batch |= {f"{kind}, by means": by_means[kind] for kind in noise}
        batch |= baselines.maps(x_BCYX, restored[VAE], mean_CYX.to(where), chance)
        del batch[ERROR]  # one for each model
        batch |= {f"{ERROR}, {name}": baselines.reconstruction_error(x_BCYX, of) for name, of in restored.items()}
        batch |= dict(zip(IMAGE_SCORES, scores, strict=True))
        parts.append({name: value.detach().cpu() for name, value in batch.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def pixel_rows(maps: Maps, digits: Digits, seed: int) -> list[dict]:
    """Foreign ink against all pixels of the outliers, and against other ink, by every map; and how much there is."""
    at = digits.outlier_N
    truth_NYX, ink_NYX = digits.truths["truth"][at], training.to_unit(digits.test_NYX[at]) >= truth.INK
    scores = {name: maps[name][at] for name in maps if name not in ("grid", "restored", *IMAGE_SCORES)}
    rows = [runs.row("foreign pixels", float(truth_NYX.float().mean()), "truth", OUTLIERS, n=len(truth_NYX))]
    for metric, where_NYX in {AUROC: None, names.WITHIN_INK: ink_NYX}.items():
        rows += explanation.auroc_rows(metric, scores, truth_NYX, where_N=where_NYX, subset=OUTLIERS, seed=seed)
    return rows


def renumbered(grid_NHW: Float[Tensor, "n h w"], truth_NYX: Bool[Tensor, "n y x"], seed: int) -> list[float]:
    """Pixel AUROC of the report's map, its units in other orders."""
    chance, scores = torch.Generator().manual_seed(seed), []
    for _ in range(ORDERS):
        order = torch.randperm(grid_NHW[0].numel(), generator=chance)
        moved_NHW = grid_NHW.flatten(1)[:, order].view_as(grid_NHW)
        scores.append(auroc(upsample(moved_NHW[:, None], truth_NYX.shape[1:])[:, 0].abs(), truth_NYX))
    return scores


@torch.no_grad()
def learning_rows(stacks: Mapping[str, Stack], digits: Digits) -> list[dict]:
    """What stacks keep of held-out images, beside what their mean keeps, and how many latents tell these apart."""
    x_NCYX = training.to_unit(digits.held_out_NCYX.to(next(stacks[STACKED].parameters()).device))
    restored = {"mean image": training.to_unit(digits.train_NCYX).mean(0).to(x_NCYX.device)}
    restored |= {name: stack.reconstruct(x_NCYX) for name, stack in stacks.items()}
    rows = [runs.row(ERROR, (of - x_NCYX).square().mean().item(), name, n=len(x_NCYX)) for name, of in restored.items()]
    for name, stack in stacks.items():
        varying_D = stack.encode(x_NCYX).std(0) / stack.layers[0].step > names.VARYING
        counts = {"latents": len(varying_D), "latents that vary": int(varying_D.sum())}
        rows += [runs.row(metric, count, name, n=len(x_NCYX)) for metric, count in counts.items()]
    return rows


def layer_rows(stack: Stack, digits: Digits, seed: int) -> list[dict]:
    """Of each layer the report's map, by units before and after their activation, and what its machine is worth.

    All by means. The layers up to one are a stack themselves, whose reconstruction is that from this layer.
    """
    at, where, energies, rows = digits.outlier_N, next(stack.parameters()).device, {}, []
    x_NCYX, held_out_NCYX = (training.to_unit(x.to(where)) for x in (digits.test_NYX[:, None], digits.held_out_NCYX))
    wanted = {
        f"attention, layer {number}, {tensor} activation": (f"maps.{number - 1}", replace(AS_REPORTED, tensor=tensor))
        for number in range(1, len(stack.layers) + 1)
        for tensor in ("before", "after")
    }
    maps = explanation.explain_layers(stack, wanted, digits.test_NYX[:, None], batch=digits.batch, seed=seed)
    with torch.no_grad():
        v = stack.visible(x_NCYX)
        for number, machine in enumerate(stack.layers, 1):
            energies[f"free energy, machine {number}"] = machine.free_energy(v).cpu()
            v = machine.activate(machine(v))
            error = (Stack(list(stack.layers[:number])).reconstruct(held_out_NCYX) - held_out_NCYX).square().mean()
            rows.append(runs.row(ERROR, error.item(), f"{STACKED}, layers up to {number}", n=len(held_out_NCYX)))
    scores, options = {name: map_NYX[at] for name, map_NYX in maps.items()}, {"subset": OUTLIERS, "seed": seed}
    rows += explanation.auroc_rows(AUROC, scores, digits.truths["truth"][at], **options)
    return rows + explanation.auroc_rows(names.IMAGE_AUROC, energies, at, **options)


def one_hot_sample(h_BD: Float[Tensor, "b d"], temperature: float, generator: torch.Generator) -> Float[Tensor, "b d"]:
    """softmax((h + G) / temperature), G Gumbel noise: what the report's published code adds up to a score."""
    gumbel_BD = -torch.empty(h_BD.shape).exponential_(generator=generator).log()
    return ((h_BD + gumbel_BD.to(h_BD)) / temperature).softmax(1)


def gradient_rows(stack: Stack, x_NCYX: Float[Tensor, "n 1 y x"], seed: int) -> list[dict]:
    """The largest gradient at a pixel of the sum of the latents, and of the score of the published code."""
    x_NCYX = x_NCYX.to(next(stack.parameters()).device, copy=True).requires_grad_()
    h_ND, chance, rows = stack.encode(x_NCYX), torch.Generator().manual_seed(seed), []
    for name, of_ND in {names.SUM: h_ND, names.ONE_HOT: one_hot_sample(h_ND, ONE_HOT_TEMPERATURE, chance)}.items():
        (slope_NCYX,) = torch.autograd.grad(of_ND.sum(), x_NCYX, retain_graph=True)
        rows.append(runs.row(names.STEEPEST, slope_NCYX.abs().max().item(), name, OUTLIERS, n=len(x_NCYX)))
    return rows


def panel(digits: Digits, maps: Maps, seed: int) -> Figure:
    """Eight outliers, or one of each digit, drawn at random, with their maps.

    Each kind is in units of its 99th percentile over the outliers: one colour scale then serves all images.
    """
    at, inlier_MYX = (
        draw(digits.label_N, mnist.outliers(digits.digit), seed),
        training.to_unit(digits.inlier_NCYX[:, 0]),
    )
    x_NYX = training.to_unit(digits.test_NYX[at])
    rows = {
        "image": x_NYX,
        "nearest inlier": inlier_MYX[truth.nearest_inlier(x_NYX, inlier_MYX)],
        "foreign ink (truth)": digits.truths["truth"][at].float(),
        f"reconstruction,\n{STACKED}": maps["restored"][at],
    }
    for kind in names.MACHINE_MAPS:
        unit = max(float(np.quantile(maps[kind][digits.outlier_N], 0.99)), 1e-12)
        rows[kind.replace(", ", ",\n")] = maps[kind][at] / unit
    titles, label = [str(label) for label in digits.label_N[at].tolist()], "map / its 99th percentile over the outliers"
    return figures.image_rows(rows, maps=list(rows)[4:], titles=titles, label=label, credit=digits.credit)


def measure(job: Job, fits: Mapping[str, steps.Fit], digits: Digits, maps: Maps) -> runs.Run:
    """The run of a job: read, or measured now and stored."""
    if job.run is not None:
        return job.run
    started, at, wanted, seed = time.monotonic(), digits.outlier_N, job.parameters, job.parameters["seed"]
    name, trained = wanted.get("recipe", "ours"), {kind: fit.trained for kind, fit in fits.items()}
    recipe, stacks = recipes.RBM[name], {stack: trained[stack].model for stack in STACKS}
    (stack, placed), where = stacks.values(), next(stacks[STACKED].parameters()).device

    orders = renumbered(maps["grid"][at], digits.truths["truth"][at], seed)
    ends = {"low": min(orders), "high": max(orders), "n": len(orders)}
    rows = [runs.row(names.RENUMBERED, float(np.mean(orders)), REPORT, OUTLIERS, **ends)]
    scores = {score: maps[score] for score in IMAGE_SCORES}
    rows += explanation.auroc_rows(names.IMAGE_AUROC, scores, at, subset=OUTLIERS, seed=seed)
    rows += pixel_rows(maps, digits, seed) + learning_rows(stacks, digits) + layer_rows(stack, digits, seed)
    rows += gradient_rows(stack, training.to_unit(digits.test_NYX[at][:, None]), seed)

    noise, of_test = torch.Generator(where).manual_seed(seed), digits.images.test_NYX[:, None]
    arrays = {
        "filters": placed.layers[0].weight[:, 0],
        "weights": stack.layers[0].weight[:32].reshape(-1, 28, 28),
        "samples": stack.sample(8, 1000, noise)[:, 0],
        "samples, convolutional": placed.sample(8, 1000, noise)[:, 0],
    }
    arrays = {"orders": np.array(orders)} | {key: value.detach().cpu().numpy() for key, value in arrays.items()}
    seconds = {f"training, {stack}": sum(part.seconds for part in trained[stack].history) for stack in STACKS}
    probe = probes.take(stack, trained[STACKED].file, of_test, f"maps.{wanted['layer'] - 1}", seed)
    run = runs.save(
        "rbm",
        wanted,
        metrics=rows,
        losses=job.losses,
        arrays=arrays,
        figures={"outliers": panel(digits, maps, seed)},
        card=digits.images.card,
        recipe=recipe,
        budget={"unit": "epochs", "asked": recipe.epochs, "used": wanted["epochs"]},
        seconds=seconds | {"evaluation": time.monotonic() - started},
        device=devices.describe_device(where),
        resolved={"precision": trained[VAE].precision},
        probe=probe,
        extra={
            "outliers": mnist.outliers(digits.digit),
            "visible units": recipes.visible_units(name),
            "weights": {kind: one.key for kind, one in trained.items()},
        },
    )
    job.run = probes.verify(run, probe.draw)
    return job.run
