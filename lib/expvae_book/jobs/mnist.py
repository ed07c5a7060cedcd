"""MNIST: train on one digit, and measure how the maps of every layer find what is foreign in others.

A job trains one model and stores what any page will ask of it. Pixels are measured by three truths: the ink of other
digits that the nearest training inlier lacks, and strokes that were added to test inliers, or erased from them.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, product
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from matplotlib.figure import Figure
from torch import Tensor, nn

from expvae import attention, elbo_terms, kl_divergence
from expvae.metrics import active_units, auroc_per_image, fraction_interval
from expvae.models import MNISTVAE
from expvae_book import (
    baselines,
    choices,
    explanation,
    figures,
    measures,
    randomised,
    recipes,
    runs,
    training,
    truth,
)
from expvae_book.chapters import Job
from expvae_book.data import mnist
from expvae_book.jobs import steps
from expvae_book.jobs.digits import Digits
from expvae_book.jobs.digits import load as load
from expvae_book.names import ACTIVE, AUROC, FIELDS, IMAGE_AUROC, KINDS, LESS_INTUITIVE, OUTLIERS, PRIOR, WITHIN_INK
from expvae_book.names import SIMPLE as BASELINES

METHODS = [*KINDS, *BASELINES]
LAYERS = ("conv1", "conv2")
LAYER = LAYERS[1]
MAPS = [measures.map_name(*pair) for pair in product(LAYERS, measures.PRESETS)]

Maps = dict[str, Float[Tensor, "n _ _"]]


# Training -------------------------------------------------------------------------------------------------------------


def network(recipe: str) -> Callable[[], nn.Module]:
    """How to build the network of a recipe."""
    return lambda: MNISTVAE(recipes.MNIST[recipe].latent_dim)


def fit(job: Job, digits: Digits) -> steps.Fit:
    """The training of a job, whose maps are followed on every tenth outlier, and on strokes planted in inliers."""
    recipe = job.parameters["recipe"]
    return steps.fit(job, digits, network(recipe), recipes.MNIST[recipe], LAYERS, digits.followed)


# Measures -------------------------------------------------------------------------------------------------------------


def maps_of(model: nn.Module, digits: Digits) -> Maps:
    """Maps by both kinds and by the baselines, and the terms of the negative ELBO, for all test images."""
    where = next(model.parameters()).device
    noise, chance = (torch.Generator().manual_seed(measures.SEED) for _ in range(2))
    mean_CYX = training.to_unit(digits.inlier_NCYX).mean(0)
    parts = []
    for levels_BYX in digits.test_NYX.split(digits.batch):
        x_BCYX = training.to_unit(levels_BYX[:, None]).to(where)
        with torch.no_grad():
            restored_BCYX = model.decode(model.encode(x_BCYX)[0]).sigmoid()
            reconstruction_B, kl_B = elbo_terms(model, x_BCYX, noise)
        explained = attention(model.encode, f"encoder.{LAYER}", x_BCYX, KINDS)
        batch = {
            **{kind: result.map_BYX for kind, result in explained.items()},
            **baselines.maps(x_BCYX, restored_BCYX, mean_CYX.to(where), chance),
            PRIOR: digits.places(len(x_BCYX))[PRIOR],
            "reconstruction": restored_BCYX[:, 0],
            "negative ELBO": reconstruction_B + kl_B,
            "mass per latent": explained["attention, paper"].linear_BIHW.relu().mean((2, 3)),
        }
        parts.append({name: value.cpu() for name, value in batch.items()})
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def pixel_rows(digits: Digits, maps: Maps) -> list[dict]:
    """Foreign ink against all pixels, of all outliers and by digit, and against other ink."""
    ink_NYX, at, label_N = training.to_unit(digits.test_NYX) >= truth.INK, digits.outlier_N, digits.label_N
    cases = [
        (AUROC, OUTLIERS, at, "truth", None),
        (WITHIN_INK, OUTLIERS, at, "truth", ink_NYX),
        ("pixel AUROC, strict truth", OUTLIERS, at, "strict truth", None),
    ]
    cases += [(AUROC, f"digit {number}", label_N == number, "truth", None) for number in mnist.outliers(digits.digit)]
    found = []
    for metric, subset, of_N, kind, where_NYX in cases:
        found += explanation.auroc_rows(
            metric,
            {method: maps[method][of_N] for method in METHODS},
            digits.truths[kind][of_N],
            where_N=None if where_NYX is None else where_NYX[of_N],
            subset=subset,
            seed=measures.SEED,
        )
    return found


def less_intuitive_rows(digits: Digits, maps: Maps) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Share of outliers whose own AUROC is below one half, over all pixels and within ink; and the former's AUROC."""
    at, arrays, found = digits.outlier_N, {}, []
    ink_NYX = training.to_unit(digits.test_NYX[at]) >= truth.INK
    for method in METHODS:
        scores = maps[method][at], digits.truths["truth"][at]
        everywhere_N, ink_N = auroc_per_image(*scores), auroc_per_image(*scores, where_NP=ink_NYX)
        arrays[f"auroc per image, {method}"] = everywhere_N.astype(np.float16)
        for metric, auroc_N in {LESS_INTUITIVE: everywhere_N, f"{LESS_INTUITIVE} within ink": ink_N}.items():
            share = fraction_interval(auroc_N[~np.isnan(auroc_N)] < 0.5)
            found.append(runs.row(metric, method=method, subset=OUTLIERS, **vars(share)))
    return found, {name: arrays[name] for name in (f"auroc per image, {one}" for one in (*KINDS, "centre prior"))}


def truth_rows(digits: Digits) -> list[dict]:
    """How much is foreign, of all pixels and of the ink, in outliers and in inliers."""
    found = []
    for subset, at in {OUTLIERS: digits.outlier_N, "inliers": ~digits.outlier_N}.items():
        ink_NYX = training.to_unit(digits.test_NYX[at]) >= truth.INK
        for name, truth_NYX in digits.truths.items():
            shares = {"foreign pixels": truth_NYX[at].float(), "foreign ink": truth_NYX[at][ink_NYX].float()}
            found += [runs.row(metric, float(of.mean()), name, subset, n=len(ink_NYX)) for metric, of in shares.items()]
    return found


def image_rows(digits: Digits, maps: Maps) -> list[dict]:
    """Scores of whole images, and how bright the maps of inliers are beside outliers'."""
    mass_N = {name: maps[name].mean((1, 2)) for name in (*KINDS, "input intensity", "reconstruction error")}
    scores = {f"map mass, {kind.removeprefix('attention, ')}": mass_N[kind] for kind in KINDS}
    scores["ink (mean intensity)"] = mass_N["input intensity"]
    scores["reconstruction error"] = mass_N["reconstruction error"]
    scores["negative ELBO"] = maps["negative ELBO"]
    found = explanation.auroc_rows(IMAGE_AUROC, scores, digits.outlier_N, subset=OUTLIERS, seed=measures.SEED)
    for kind in KINDS:
        inliers, outliers = (mass_N[kind][of].median() for of in (~digits.outlier_N, digits.outlier_N))
        found.append(runs.row("inliers' map mass / outliers'", float(inliers / outliers), method=kind))
    return found


def latent_rows(model: nn.Module, digits: Digits, mass_NI: Float[Tensor, "n i"]) -> tuple[list[dict], np.ndarray]:
    """What the latents carry, on held-out images, and the silent ones' part in the map of the outliers."""
    mu_NI, logvar_NI = explanation.encoded(model, digits.held_out_NCYX)
    kl_I = kl_divergence(mu_NI, logvar_NI).mean(0)
    silent_I = torch.tensor([active_units(mu_N1) == 0 for mu_N1 in mu_NI.split(1, 1)])
    silent = mass_NI[:, silent_I].sum() / mass_NI.sum().clamp(min=1e-12)
    found = explanation.learned_rows(model, digits.held_out_NCYX)
    found += [
        runs.row(ACTIVE, int((~silent_I).sum()), n=len(mu_NI)),
        runs.row("map mass of inactive latents", float(silent), subset=OUTLIERS),
    ]
    return found, kl_I.numpy()


def measured_maps(model: nn.Module, digits: Digits, simple: Maps) -> measures.Measured:
    """Every layer by every preset, and the baselines, by every measure, with what the resamples gave.

    The threshold that no outlier chose is exceeded by one in a hundred pixels of the test inliers.
    """
    number_N, at = torch.arange(len(digits.label_N)), digits.outlier_N
    foreign = measures.Truth(digits.truths["truth"][at], number_N[at], OUTLIERS)
    measured = measures.Measured()
    maps = digits.explain(model, digits.test_NYX, LAYERS, measures.PRESETS)
    for name, map_NYX in chain(maps, simple.items()):
        measured.add(name, map_NYX[at], foreign, float(np.quantile(map_NYX[~at], 0.99)))
        measured.images(name, map_NYX, measures.Truth(at, number_N))
    return measured


def planted(model: nn.Module, digits: Digits) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Every layer by every preset, and the baselines, against the strokes that were planted in test inliers."""
    found, arrays, mean_CYX = [], {}, training.to_unit(digits.inlier_NCYX).mean(0)
    for kind, (x_NYX, of) in digits.planted.items():
        # Of another seed than the places of the strokes: a random map from the same one has its peak at each stroke.
        x_NCYX, chance = training.to_unit(x_NYX[:, None]), torch.Generator().manual_seed(measures.SEED + 1)
        simple = baselines.maps(x_NCYX, explanation.reconstruct(model, x_NYX[:, None]), mean_CYX, chance)
        simple |= digits.places(len(x_NYX))
        measured = measures.Measured()
        for name, map_NYX in chain(digits.explain(model, x_NYX, LAYERS, measures.PRESETS), simple.items()):
            measured.pixels(name, map_NYX, of, FIELDS)
        found += measured.rows
        arrays |= {f"{kind}/{name}": drawn for name, drawn in measured.replicates(measured.measured).items()}
    return found, arrays


def change_rows(model: nn.Module, digits: Digits) -> list[dict]:
    """What one choice of a rule changes in the map at conv2, on a thousand images: see the chapter on ablations."""
    order = torch.randperm(len(digits.label_N), generator=torch.Generator().manual_seed(measures.SEED))
    some = order[:1000].sort().values
    foreign = some[digits.outlier_N[some]]
    return choices.change_rows(
        model,
        f"encoder.{LAYER}",
        digits.test_NYX[some][:, None],
        digits.truths["truth"][foreign],
        foreign,
        measured_N=digits.outlier_N[some],
        normal=explanation.normal_posterior(model, digits.train_NCYX),
        batch=digits.batch,
        activation=True,
        resamples=measures.RESAMPLES,
        seed=measures.SEED,
    )


# Pictures and the run -------------------------------------------------------------------------------------------------


def strip(digits: Digits, planted: bool = True) -> Figure:
    """Training images, a test image of each digit with its foreign ink, and inliers with planted strokes, if any."""
    x_NYX, inlier_MYX = training.to_unit(digits.one_of_each), training.to_unit(digits.inlier_NCYX[:, 0])
    inliers = f"test {digits.digit}s,\n"
    rows = {
        "training images": training.to_unit(digits.train_NCYX[: len(x_NYX), 0]),
        "test images,\none of each digit": x_NYX,
        "their foreign ink": truth.ink_truth(x_NYX, inlier_MYX, 1).float(),
        **{
            inliers + kind: training.to_unit(changed_NYX[: len(x_NYX)])
            for kind, (changed_NYX, _) in (digits.planted.items() if planted else ())
        },
    }
    return figures.image_rows(rows, maps=[], titles=[""] * len(x_NYX), label="", credit=digits.credit)


def draw(label_N: Int64[Tensor, " n"], digits: Sequence[int], seed: int = measures.SEED) -> Int64[Tensor, " k"]:
    """The numbers of eight images, or of one of each digit, drawn at random."""
    chance, each = torch.Generator().manual_seed(seed), -(-8 // len(digits))
    drawn = []
    for number in digits:
        some = torch.nonzero(label_N == number)[:, 0]
        drawn.append(some[torch.randperm(len(some), generator=chance)[:each]])
    return torch.cat(drawn)[: max(8, len(digits))]


def stretched(map_NYX: Float[Tensor, "n y x"]) -> Float[Tensor, "n y x"]:
    """Each image from its own minimum to its own maximum."""
    low_N11, high_N11 = (f(map_NYX, (1, 2), keepdim=True) for f in (torch.amin, torch.amax))
    return (map_NYX - low_N11) / (high_N11 - low_N11).clamp(min=1e-12)


def panels(digits: Digits, maps: Maps) -> dict[str, Figure]:
    """Outliers and inliers with their maps; each kind in units of its 99th percentile over the outliers."""
    x_NYX, label_N = training.to_unit(digits.test_NYX), digits.label_N
    scaled = {kind: maps[kind] / float(np.quantile(maps[kind][digits.outlier_N], 0.99)) for kind in KINDS}
    name = {kind: kind.removeprefix("attention, ") for kind in KINDS}
    at = draw(label_N, mnist.outliers(digits.digit))
    inlier_MYX = training.to_unit(digits.inlier_NCYX[:, 0])
    rows = {
        "image": x_NYX[at],
        "nearest inlier": inlier_MYX[truth.nearest_inlier(x_NYX[at], inlier_MYX)],
        "foreign ink (truth)": digits.truths["truth"][at].float(),
        "reconstruction": maps["reconstruction"][at],
        **{f"map, {name[kind]}": scaled[kind][at] for kind in KINDS},
    }
    titles, label = [str(number) for number in label_N[at].tolist()], "map / its 99th percentile over the outliers"
    strangers = figures.image_rows(rows, maps=list(rows)[4:], titles=titles, label=label, credit=digits.credit)
    at = draw(label_N, [digits.digit])
    rows = {"image": x_NYX[at]}
    for kind in KINDS:
        rows[f"{name[kind]},\nper-image min-max"] = stretched(maps[kind][at])
        rows[f"{name[kind]},\nshared scale"] = scaled[kind][at]
    titles, label = [str(digits.digit)] * len(at), "value on the row's scale"
    inliers = figures.image_rows(rows, maps=list(rows)[1:], titles=titles, label=label, credit=digits.credit)
    return {"outliers": strangers, "inliers": inliers}


def explain(job: Job, fit: steps.Fit, digits: Digits) -> dict[str, np.ndarray]:
    """Maps of one test image of each digit, of the trained network and of the one that it started from.

    Of each layer and preset the mean over the latents, and by the paper's rule the map of each latent, at the layer's
    resolution; as `measures.halved` gives them, by names such as "untrained/conv2, liu2020_code".
    """
    if job.run is not None:
        return {name: map_ for name, map_ in job.run.arrays.items() if name.startswith(("trained/", "untrained/"))}
    x_BCYX, model, arrays = digits.one_of_each[:, None], fit.trained.model, {}
    where = next(model.parameters()).device
    start = training.build(network(job.parameters["recipe"]), job.parameters["seed"]).eval().to(where)
    for state, one in {"trained": model, "untrained": start}.items():
        normal = explanation.normal_posterior(one, digits.train_NCYX)
        maps = measures.examples(one, LAYERS, measures.PRESETS, x_BCYX, normal, measures.SEED)
        each = attention(one.encode, f"encoder.{LAYER}", training.to_unit(x_BCYX).to(where)).map_BIHW
        maps |= measures.halved("each latent", each)
        arrays |= {f"{state}/{name}": map_BHW for name, map_BHW in maps.items()}
    return arrays


def evaluate(
    model: nn.Module, digits: Digits, parameters: Mapping[str, Any]
) -> tuple[list[dict], dict[str, np.ndarray], dict[str, Figure]]:
    """What a job stores of a trained model beside its course and examples: rows, arrays and, of seed 0, pictures."""
    maps = maps_of(model, digits)
    found, kl_I = latent_rows(model, digits, maps["mass per latent"][digits.outlier_N])
    rows, arrays = less_intuitive_rows(digits, maps)
    found += pixel_rows(digits, maps) + rows + image_rows(digits, maps) + truth_rows(digits)
    measured = measured_maps(model, digits, {name: maps[name] for name in BASELINES})
    # The baselines' AUROC stands among the rows of the pixels.
    found += [row for row in measured.rows if (row["metric"], row["method"] in BASELINES) != (AUROC, True)]
    found += measured.differences(MAPS, BASELINES, OUTLIERS)
    of_strokes, drawn = planted(model, digits)
    some, foreign = digits.some()
    of_cascade, compared = randomised.cascade(
        model,
        randomised.others(network(parameters["recipe"]), parameters["seed"]),
        digits.train_NCYX,
        lambda one: dict(digits.explain(one, digits.test_NYX[some], (LAYER,), tuple(KINDS.values()))),
        foreign,
    )
    found += of_strokes + change_rows(model, digits) + of_cascade
    arrays |= measured.replicates([*MAPS, *BASELINES]) | drawn | compared | {"kl_per_latent": kl_I}
    return found, arrays, panels(digits, maps) if parameters["seed"] == 0 else {}


def measure(job: Job, fit: steps.Fit, digits: Digits) -> runs.Run:
    """The run of a job: read, or measured now and stored."""
    if job.run is not None:
        return job.run
    started, recipe, trained = time.monotonic(), recipes.MNIST[job.parameters["recipe"]], fit.trained
    found, arrays, pictures = evaluate(trained.model, digits, job.parameters)
    arrays |= explain(job, fit, digits) if pictures else {}
    for course in fit.courses:
        found, arrays = found + course.rows(), arrays | course.arrays()
    count = len(digits.train_NCYX)
    asked, used = (recipe.epochs, count), (len(trained.history.kl), count)
    job.run = steps.save(
        "mnist",
        job.parameters,
        trained,
        recipe,
        metrics=found,
        arrays=arrays,
        pictures=pictures,
        card=digits.images.card,
        budget=measures.budget("epochs", recipe, asked=asked, used=used),
        probed=(digits.images.test_NYX[:, None], f"encoder.{LAYER}"),
        maps=MAPS,
        unit="image",
        started=started,
        extra={
            "outliers": mnist.outliers(digits.digit),
            "training": steps.training_facts(trained, count),
        },
    )
    return job.run
