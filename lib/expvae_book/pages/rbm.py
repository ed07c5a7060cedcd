"""What the chapter on Boltzmann machines draws, tabulates and says of its runs."""

import numpy as np
import pandas as pd
from IPython.display import Markdown, display

from expvae_book import figures, names, recipes, report, runs
from expvae_book.chapters import Job
from expvae_book.names import AUROC, CENTRE, ERROR, IMAGE_AUROC, MACHINE_MAPS, OUTLIERS, STACKS, WITHIN_INK
from expvae_book.pages.mnist import WITHIN
from expvae_book.runs import Run

VAE, REPORT, INPUT, PLACED = MACHINE_MAPS


def in_short(job: Job) -> None:
    """Show the findings in a few sentences, the verdicts, and the figure that says most."""
    if (run := job.run) is None:
        display(report.NOT_YET)
        return
    scores = {name: run.text(AUROC, name, OUTLIERS) for name in (*MACHINE_MAPS, "input intensity")}
    text = (
        "**In short.** The second report's map of stacked Boltzmann machines gives a foreign pixel a higher value than "
        f"another with a chance of **{scores[REPORT]}** (its pixel AUROC; one half is chance). {_renumbered(run)} "
        "Where the hidden units have places, in a convolutional machine, the paper's map has "
        f"{scores[PLACED]}, and that of the VAE {scores[VAE]}. The gradient at the input times the input has "
        f"{scores[INPUT]}, the bare image {scores['input intensity']}. The report prints no number. "
        f"{report.extent(run)}"
    )
    points = [run.metric(AUROC, kind, OUTLIERS) | {"group": "maps"} for kind in MACHINE_MAPS]
    points += [run.metric(names.RENUMBERED, REPORT, OUTLIERS) | {"group": "units in other orders: least to greatest"}]
    points += [run.metric(AUROC, name, OUTLIERS) | {"group": "without a model"} for name in ("input intensity", CENTRE)]
    figure = figures.intervals(pd.DataFrame(points), label="pixel AUROC against the foreign ink", chance=0.5)
    display(Markdown(text), figures.show(figure), report.badges("rbm"))


def _renumbered(run: Run) -> str:
    orders, own = run.metric(names.RENUMBERED, REPORT, OUTLIERS), run.metric(AUROC, REPORT, OUTLIERS)["value"]
    return (
        f"With its hidden units numbered in {orders['n']} other orders the machine is the same, and the map has "
        f"{orders['low']:.3f} to {orders['high']:.3f}, {orders['value']:.3f} in the mean; "
        f"{_as_good(run)} of these orders did as well as its own, {own:.3f}, or better."
    )


def _as_good(run: Run) -> int:
    """How many other orders of its units have a map of the same score as the report's, or a higher one."""
    return int((run.arrays["orders"] >= run.metric(AUROC, REPORT, OUTLIERS)["value"]).sum())


def courses(job: Job) -> None:
    """Show how each machine did on held-out images over its training, and say how large it is."""
    name, layer = job.parameters.get("recipe", "ours"), job.parameters["layer"]
    sizes, panels = recipes.visible_units(name), {}
    for part, title, per_unit in (
        ("pseudo_likelihood", "pseudo-log-likelihood (nats per visible unit)", True),
        ("free_energy_gap", "free energy, held-out less training (nats)", False),
    ):
        lines = {
            name: np.array(job.losses[f"{part}, {name}"]) / (size if per_unit else 1) for name, size in sizes.items()
        }
        panels[title] = {name: (range(1, len(line) + 1), line.tolist()) for name, line in lines.items()}
    stacks = recipes.FULLY_CONNECTED[name], recipes.CONVOLUTIONAL
    units = (f"the {stack} has {', '.join(map('{:,}'.format, of))}" for stack, of in zip(STACKS, stacks, strict=True))
    said = (
        f"Units, from the image up: {'; '.join(units)}. The report's map is taken at layer {layer} of the first, the "
        f"{stacks[0][layer]:,} hidden units of its machine {layer}."
    )
    display(figures.show(figures.curves(panels, x="epoch")), Markdown(said))


def learned(run: Run) -> None:
    """Show weights and samples of both stacks, and say what they keep of held-out images."""
    weights = {"weights,\nfully connected": "weights", "filters,\nconvolutional": "filters"}
    rows = {title: run.arrays[name][:8] / np.abs(run.arrays[name][:8]).max() for title, name in weights.items()}
    rows |= {
        f"samples,\n{kind}": run.arrays[name]
        for kind, name in zip(STACKS, ("samples", "samples, convolutional"), strict=True)
    }
    options = {"label": "weight / the largest of its row", "credit": "Weights and samples of the trained machines."}
    figure = figures.image_rows(rows, maps=list(weights), titles=[""] * 8, signed=True, **options)
    errors = [f"{run.text(ERROR, name, form='.4f')} ({name})" for name in STACKS]
    varying = [
        f"{run.text('latents that vary', name, form='.0f')} of {run.text('latents', name, form='.0f')} ({name})"
        for name in STACKS
    ]
    said = (
        "As wholes, stacks restore held-out images, up through all machines and down again, with a mean squared error "
        f"of {', '.join(errors)}; the mean image has {run.text(ERROR, 'mean image', form='.4f')}. Latents "
        f"that vary over them by more than {names.VARYING:g} of the step from off to on: {', '.join(varying)}."
    )
    display(figures.show(figure), Markdown(said))


def scores(run: Run) -> None:
    """Show the pixel AUROC of every map, over all pixels and within ink, as a figure and as a table."""
    points = pd.concat([run.rows(metric).assign(group=metric) for metric in (AUROC, WITHIN_INK)])
    table = pd.DataFrame({"map": run.rows(WITHIN_INK)["method"]})
    for title, metric in {"over all pixels": AUROC, "within ink": WITHIN_INK}.items():
        table[title] = [run.text(metric, name, OUTLIERS) for name in table["map"]]
    display(figures.show(figures.intervals(points, label="AUROC against the foreign ink", chance=0.5)))
    report.show(table, "Pixel AUROC with 95 % intervals over images.")


def orders(run: Run) -> Markdown:
    """What follows from the order of the numbers."""
    lines = []
    for kind in MACHINE_MAPS:
        others = [name for name in ("random", "input intensity", CENTRE, VAE) if name != kind]
        ours = run.metric(AUROC, kind, OUTLIERS)
        found = report.grouped({name: runs.order(ours, run.metric(AUROC, name, OUTLIERS)) for name in others})
        within = WITHIN[runs.order(run.metric(WITHIN_INK, kind, OUTLIERS), 0.5)]
        others = f" Other orders of its units that do as well: {_as_good(run)} of {len(run.arrays['orders'])}."
        lines.append(f"- *{kind}*: over all pixels {found}. Within ink it {within}.{others * (kind == REPORT)}")
    return Markdown("\n".join(lines))


def places(run: Run) -> Markdown:
    """What the numbering of the units does to the report's map, and what its published code computes."""
    said = (
        "The map of the convolutional machine, whose units have their places in the image, has "
        f"{run.text(AUROC, PLACED, OUTLIERS)}."
    )
    if steepest := run.text(names.STEEPEST, names.ONE_HOT, OUTLIERS, ".0e", lacking=""):
        said += (
            "\n\nThe score of the report's published code says nothing of places, or of anything else: of the outliers "
            f"here its gradient at a pixel is {steepest} at most, rounding, where that of the sum of the latents "
            f"reaches {run.text(names.STEEPEST, names.SUM, OUTLIERS, '.2g')}. That code would give one constant map "
            "for all images, by fully connected machines and by any others."
        )
    return Markdown(said)


def whole_images(run: Run) -> None:
    """Show the AUROC of outliers against inliers by scores of whole images."""
    rows = run.rows(IMAGE_AUROC).rename(columns={"subset": "group"})
    figure = figures.intervals(rows, label="image AUROC, outlier against inlier digits", chance=0.5)
    numbers = [f"{name} {run.text(IMAGE_AUROC, name, OUTLIERS)}" for name in rows["method"]]
    display(figures.show(figure), Markdown(f"In numbers: {'; '.join(numbers)}."))


def every_run() -> None:
    """Show every stored run of the chapter."""
    columns = {"recipe": lambda run: run.parameters.get("recipe", "ours")}
    columns |= {kind: (AUROC, kind, OUTLIERS) for kind in MACHINE_MAPS}
    columns["free energy, image AUROC"] = (IMAGE_AUROC, names.ENERGIES[0], OUTLIERS)
    table = report.stored_runs("rbm", ("digit", "units", "layer", "temperature", "seed"), columns)
    report.show(table, "Pixel AUROC with 95 % intervals, for every stored run.")
