"""What the chapter on MNIST draws, tabulates and says of its runs."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from IPython.display import Image, Markdown, display

from expvae_book import figures, report, runs, tables
from expvae_book.chapters import Job
from expvae_book.names import (
    ACTIVE,
    AUROC,
    CENTRE,
    DIFFERENCE,
    ERROR,
    IMAGE_AUROC,
    KINDS,
    KL,
    LESS_INTUITIVE,
    OUTLIERS,
    PARAMETERS,
    PRESETS,
    RECONSTRUCTION,
    SIMPLE,
    STROKES,
    WITHIN_INK,
)
from expvae_book.runs import Run

PAPER, AUTHORS = KINDS
WITHIN = {
    "above": "prefers foreign ink to ink that the inlier shares",
    "below": "prefers what the inlier shares to what is foreign",
    "not told apart from": "does not tell foreign ink from shared ink",
}


def methods(run: Run) -> list[str]:
    """The maps of a run: of both kinds, and those that need no attention."""
    known = set(run.rows(AUROC)["method"])
    return [name for name in (*KINDS, *SIMPLE) if name in known]


def untrained(run: Run, preset: str) -> str:
    """The pixel AUROC of untrained networks' maps by a preset, on the digit of the run."""
    return tables.untrained_text(AUROC, "conv2", preset, dataset="mnist", digit=run.parameters["digit"])


def in_short(job: Job) -> None:
    """Show the findings in a few sentences, the verdicts, and the figure that says most."""
    if (run := job.run) is None:
        display(report.NOT_YET)
        return
    within = run.metric(WITHIN_INK, PAPER, OUTLIERS)
    text = (
        f"**In short.** By a pixel AUROC the paper's map finds what is foreign to {run.parameters['digit']}s with "
        f"**{run.text(AUROC, PAPER, OUTLIERS)}**. Networks that were never trained: {untrained(run, KINDS[PAPER])}. A "
        f"Gaussian at the centre of the image, which looks at nothing: {run.text(AUROC, CENTRE, OUTLIERS)}. "
        "Among pixels of ink alone, where to find ink is not enough, the map has "
        f"{run.text(WITHIN_INK, PAPER, OUTLIERS)}: it {WITHIN[runs.order(within, 0.5)]}. The paper shows pictures "
        f"of such maps and prints no number. {report.extent(run)}"
    )
    points = [run.metric(AUROC, kind, OUTLIERS) | {"group": "trained"} for kind in KINDS]
    for kind, preset in KINDS.items():
        control = tables.untrained_point(AUROC, "conv2", preset, dataset="mnist", digit=run.parameters["digit"])
        points.append({"method": kind, "group": "never trained: least to greatest"} | control)
    simple = ("input intensity", ERROR, CENTRE)
    points += [run.metric(AUROC, name, OUTLIERS) | {"group": "without attention"} for name in simple]
    figure = figures.intervals(
        pd.DataFrame(points).dropna(subset="value"), label="pixel AUROC against the foreign ink", chance=0.5
    )
    display(Markdown(text), report.badges("mnist"), figures.show(figure))


def learned(run: Run) -> None:
    """Show the KL of each latent, and what the training came to in numbers."""
    made, budget, latents = run.record["training"], run.record["budget"], run.record["recipe"]["latent_dim"]
    silent = run.text("map mass of inactive latents", subset=OUTLIERS, form=".1%")
    text = Markdown(
        f"The model of {run.parameters['digit']}s has {run.text(PARAMETERS, form=',.0f')} parameters. After "
        f"{budget['used']} epochs of the {budget['asked']} that its recipe asks for, on {made['images']:,} images "
        f"({made['images_per_second']:,.0f} images/s on {run.record['weights']['device']}), a held-out image costs "
        f"{run.text(RECONSTRUCTION, form='.1f')} nats to reconstruct and {run.text(KL, form='.1f')} nats to encode. "
        f"{run.text(ACTIVE, form='.0f')} of its {latents} latents are active (variance of μ over the held-out images "
        f"above 0.01). The others are averaged into the paper's map all the same: {silent} of its mass on the outliers "
        "is theirs."
    )
    label, index = "KL (nats per image)", "latents, by their KL"
    display(figures.show(figures.bars(run.arrays["kl_per_latent"], label=label, index=index)), text)


def inliers(run: Run) -> None:
    """Show maps of inliers on two scales, and how bright they are beside those of outliers."""
    lines = []
    for kind in KINDS:
        ratio = run.metric("inliers' map mass / outliers'", kind)["value"]
        score = run.text(IMAGE_AUROC, f"map mass, {kind.removeprefix('attention, ')}", OUTLIERS)
        lines.append(
            f"- *{kind}*: the median inlier has {ratio:.2f} times the map mass (mean of the map) of the median "
            f"outlier; the AUROC of telling them apart by it is {score}."
        )
    display(figures.kept(run, "inliers"), Markdown("\n".join(lines)))


def scores(run: Run, metric: str) -> Image:
    """A pixel AUROC of every map with its interval, over all outliers and by digit where the run has it."""
    shown = [OUTLIERS, *(f"digit {number}" for number in run.record["outliers"])]
    rows = run.rows(metric)
    rows = rows[rows["method"].isin(methods(run)) & rows["subset"].isin(shown)].rename(columns={"subset": "group"})
    label = (
        f"pixel AUROC against the foreign ink, {'among pixels of ink' if metric == WITHIN_INK else 'over all pixels'}"
    )
    return figures.show(figures.intervals(rows, label=label, chance=0.5))


def table(run: Run) -> None:
    """Show the AUROC of every map by both truths and within ink, beside untrained networks, and how much is foreign."""
    shown = (AUROC, WITHIN_INK, "pixel AUROC, strict truth")
    names = methods(run)
    lines = pd.DataFrame(
        {"method": names} | {metric: [run.text(metric, name, OUTLIERS) for name in names] for metric in shown}
    )
    for kind, preset in KINDS.items():
        named = f"{tables.UNTRAINED}, {kind.removeprefix('attention, ')}"
        empty = dict.fromkeys(shown, "")
        lines.loc[len(lines)] = {"method": named} | empty | {AUROC: untrained(run, preset)}
    report.show(lines, f"Pixel AUROC with 95 % intervals over images. {run.caption}")
    display(_truth(run))


def _truth(run: Run) -> Markdown:
    """How much of the images is foreign, by both truths."""
    n = run.metric("foreign pixels", "truth", OUTLIERS)["n"]
    ink = [
        run.text("foreign ink", kind, subset, ".1%")
        for kind in ("truth", "strict truth")
        for subset in (OUTLIERS, "inliers")
    ]
    return Markdown(
        f"Of the pixels of {n:,} outliers {run.text('foreign pixels', 'truth', OUTLIERS, '.1%')} are foreign. The "
        f"truth calls {ink[0]} of the outliers' ink foreign and {ink[1]} of the ink of test inliers; the strict truth "
        f"{ink[2]} and {ink[3]}."
    )


def orders(run: Run) -> Markdown:
    """What follows from the order of the numbers."""
    lines = []
    for kind in KINDS:
        others = [f"{_against(run, kind, other)} the {other}" for other in methods(run)[2:] if other != "random"]
        within = WITHIN[runs.order(run.metric(WITHIN_INK, kind, OUTLIERS), 0.5)]
        lines.append(f"- *{kind}*: over all pixels {', '.join(others)}; and within ink it {within}.")
    return Markdown("\n".join(lines))


def _against(run: Run, kind: str, other: str) -> str:
    """Above, below or not told apart, by the paired difference; by two intervals where an older run has none."""
    pair = (DIFFERENCE, f"conv2, {KINDS[kind]} − {other}", OUTLIERS)
    if run.text(*pair, lacking=""):
        return runs.order(run.metric(*pair), 0.0)
    return runs.order(run.metric(AUROC, kind, OUTLIERS), run.metric(AUROC, other, OUTLIERS))


def less_intuitive(run: Run) -> None:
    """Show the pixel AUROC within each outlier, and the share of maps that rank foreign pixels below others."""
    found = {name: run.arrays[f"auroc per image, {name}"].astype(float) for name in (*KINDS, CENTRE)}
    samples = {name: auroc_N[~np.isnan(auroc_N)] for name, auroc_N in found.items()}
    display(figures.show(figures.histograms(samples, label="pixel AUROC within one image", mark=0.5)))
    titles = {"Below one half": LESS_INTUITIVE, "Below one half within ink": f"{LESS_INTUITIVE} within ink"}
    names = methods(run)
    shares = {title: [run.text(metric, name, OUTLIERS, ".1%") for name in names] for title, metric in titles.items()}
    n = run.metric(LESS_INTUITIVE, PAPER, OUTLIERS)["n"]
    caption = f"Share of the {n:,} outlier images with foreign ink, with Wilson's 95 % interval."
    report.show(pd.DataFrame({"Method": names} | shares), caption)


def planted(run: Run) -> Markdown | None:
    """Show the pixel AUROC of every map for strokes that were planted."""
    kinds = [kind for kind in STROKES if kind in set(run.metrics["subset"])]
    if not kinds:
        return Markdown("*This run is older than the planted strokes.*")
    names = [f"conv2, {preset}" for preset in PRESETS] + list(SIMPLE)
    lines = [{"Method": name} | {kind.capitalize(): run.text(AUROC, name, kind) for kind in kinds} for name in names]
    report.show(pd.DataFrame(lines), f"Pixel AUROC with 95 % intervals over images. {run.caption}")
    return None


def whole_images(run: Run) -> Image:
    """The AUROC of outliers against inliers by scores of whole images."""
    rows = run.rows(IMAGE_AUROC)
    rows = rows[rows["subset"] == OUTLIERS].rename(columns={"subset": "group"})
    return figures.show(figures.intervals(rows, label="image AUROC, outlier against inlier digits", chance=0.5))


def every_run() -> None:
    """Show every stored run of the chapter."""
    columns = {
        "trained on": lambda run: run.parameters.get("trained_on", "inliers"),
        "paper's map": (AUROC, PAPER, OUTLIERS),
        "authors' code": (AUROC, AUTHORS, OUTLIERS),
        "input": (AUROC, "input intensity", OUTLIERS),
        ERROR: (AUROC, ERROR, OUTLIERS),
        "paper's map within ink": (WITHIN_INK, PAPER, OUTLIERS),
        "less intuitive (paper's)": (LESS_INTUITIVE, PAPER, OUTLIERS),
        "active": (ACTIVE, "", "", ".0f"),
    }
    report.show(
        report.stored_runs("mnist", ("digit", "recipe", "seed"), columns),
        "Pixel AUROC with 95 % intervals, and the share of less intuitive maps, for every stored run.",
    )


def other_digits(run: Run) -> None:
    """Show the pictures of the runs that differ from this one in the digit alone."""
    alike = {name: run.parameters[name] for name in ("recipe", "seed", "epochs", "data")}
    for other in runs.find("mnist", **alike):
        if other.parameters["digit"] != run.parameters["digit"] and "trained_on" not in other.parameters:
            label = Markdown(f"**A model of {other.parameters['digit']}s.** *{other.caption}*")
            display(label, figures.kept(other, "outliers"))


def examples(x_BYX: figures.Images, maps: Mapping[str, np.ndarray], credit: str) -> Image | Markdown:
    """A test image of each digit under the maps of the trained and of the untrained network, at their resolution."""
    if not maps:
        return figures.NOT_KEPT
    rows: dict[str, figures.Images] = {"image": x_BYX}
    for kind, preset in KINDS.items():
        named = {state: f"{state}/conv2, {preset}" for state in ("trained", "untrained")}
        for state, name in named.items():
            map_BHW = maps[name].astype(np.float32)
            title = f"{kind.removeprefix('attention, ')},\n{state}"
            rows[title] = map_BHW / max(float(np.quantile(map_BHW, 0.99)), 1e-12)
    label = "map / its row's 99th percentile"
    titles = [str(number) for number in range(10)]
    return figures.show(figures.image_rows(rows, maps=list(rows)[1:], titles=titles, label=label, credit=credit))
