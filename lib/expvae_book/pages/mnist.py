"""What the chapter on MNIST draws, tabulates and says of its runs."""

from collections.abc import Mapping

import numpy as np
import pandas as pd
from IPython.display import Image, Markdown, display

from expvae_book import figures, publications, report, runs, tables
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
    RECONSTRUCTION,
    RULES,
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
    ours, within = run.metric(AUROC, PAPER, OUTLIERS)["value"], run.metric(WITHIN_INK, PAPER, OUTLIERS)
    control_N = tables.untrained_values(AUROC, "conv2", KINDS[PAPER], dataset="mnist", digit=run.parameters["digit"])
    control = "Networks that were never trained have not been measured."
    if len(control_N):
        place = "below" if ours < control_N.min() else "above" if ours > control_N.max() else "within"
        control = (
            f"That is {place} the range of {len(control_N)} networks that were never trained "
            f"({control_N.min():.3f} to {control_N.max():.3f})."
        )
    text = (
        "**In short.** The paper's map gives a foreign pixel a higher value than another pixel with a chance of "
        f"**{run.text(AUROC, PAPER, OUTLIERS)}** (its pixel AUROC; one half is chance). {control} It is "
        f"{_against(run, PAPER, CENTRE)} a blob at the centre of the image, which looks at nothing "
        f"({run.text(AUROC, CENTRE, OUTLIERS)}), and {_against(run, PAPER, 'input intensity')} the bare image "
        f"({run.text(AUROC, 'input intensity', OUTLIERS)}). Among pixels of ink alone it "
        f"{WITHIN[runs.order(within, 0.5)]} ({run.text(WITHIN_INK, PAPER, OUTLIERS)}). The paper shows pictures of "
        f"such maps and prints no number. {report.extent(run)}"
    )
    points = [run.metric(AUROC, kind, OUTLIERS) | {"group": "trained"} for kind in KINDS]
    for kind, preset in KINDS.items():
        point = tables.untrained_point(AUROC, "conv2", preset, dataset="mnist", digit=run.parameters["digit"])
        points.append({"method": kind, "group": "never trained: least to greatest"} | point)
    simple = ("input intensity", ERROR, CENTRE)
    points += [run.metric(AUROC, name, OUTLIERS) | {"group": "without attention"} for name in simple]
    label = "pixel AUROC against the foreign ink"
    figure = figures.intervals(pd.DataFrame(points).dropna(subset="value"), label=label, chance=0.5)
    display(Markdown(text), figures.show(figure), report.badges("mnist"))


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
        so = "dimmer than" if ratio < 1 else "at least as bright as"
        display_ = "the display makes them look brighter" if ratio < 1 else "the display does not explain it"
        lines.append(
            f"- *{kind}*: on one scale inliers are {so} outliers, so that {display_}. The median inlier has "
            f"{ratio:.2f} times the map mass (mean of the map) of the median outlier; the AUROC of telling them apart "
            f"by it is {score}."
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
        control = untrained(run, preset)
        if control != tables.NOT_MEASURED:
            lines.loc[len(lines), ["method", AUROC]] = [f"never trained, {kind.removeprefix('attention, ')}", control]
    report.show(lines.fillna(""), "Pixel AUROC with 95 % intervals over images.")
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
        orders = {other: _against(run, kind, other) for other in methods(run)[2:] if other != "random"}
        within = WITHIN[runs.order(run.metric(WITHIN_INK, kind, OUTLIERS), 0.5)]
        lines.append(f"- *{kind}*: over all pixels {report.grouped(orders)}. Within ink it {within}.")
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
    report.show(pd.DataFrame({"method": names} | shares), caption)
    given = publications.select(publications.read(), source="R1", dataset="MNIST", metric=LESS_INTUITIVE)
    printed = ", ".join(given["published"])
    display(Markdown(f"The first report printed {printed} for the maps of the authors' code, counted by eye."))


def planted(run: Run) -> Markdown | None:
    """Show the pixel AUROC of every map for strokes that were planted, and how the paper's map compares."""
    kinds = [kind for kind in STROKES if kind in set(run.metrics["subset"])]
    if not kinds:
        return Markdown("*This run is older than the planted strokes.*")
    titles = {preset: kind for kind, preset in KINDS.items()}
    names = {f"conv2, {preset}": titles.get(preset, f"attention, {RULES[preset]}") for preset in RULES}
    names |= {name: name for name in SIMPLE}
    lines = [{"method": title} | {kind: run.text(AUROC, name, kind) for kind in kinds} for name, title in names.items()]
    report.show(pd.DataFrame(lines), "Pixel AUROC with 95 % intervals over images.")
    said = []
    for kind in kinds:
        ours, centre = (run.metric(AUROC, name, kind) for name in (f"conv2, {KINDS[PAPER]}", CENTRE))
        said.append(f"for {kind} the paper's map is {runs.order(ours, centre)} the blob at the centre")
    return Markdown(f"Judged by intervals, {' and '.join(said)}, which looks at no image.")


def whole_images(run: Run) -> None:
    """Show the AUROC of outliers against inliers by scores of whole images."""
    rows = run.rows(IMAGE_AUROC)
    rows = rows[rows["subset"] == OUTLIERS].rename(columns={"subset": "group"})
    figure = figures.intervals(rows, label="image AUROC, outlier against inlier digits", chance=0.5)
    mass, ink = (run.text(IMAGE_AUROC, name, OUTLIERS) for name in ("map mass, paper", "ink (mean intensity)"))
    text = f"The mass of the paper's map tells outliers from inliers with {mass}; the mere amount of ink with {ink}."
    display(figures.show(figure), Markdown(text))


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
        "less intuitive (authors' code)": (LESS_INTUITIVE, AUTHORS, OUTLIERS),
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
    shown: dict[str, figures.Images] = {}
    for kind, preset in KINDS.items():
        shown |= figures.before_and_after(maps, "conv2", preset, kind)
    return figures.examples({"image": x_BYX}, shown, titles=[str(number) for number in range(10)], credit=credit)
