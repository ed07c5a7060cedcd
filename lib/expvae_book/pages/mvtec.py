"""What the two chapters on MVTec AD draw and say of their runs; `expvae_book.tables` has the tables."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import numpy as np
import pandas as pd
from IPython.display import Image, Markdown, display

from expvae_book import chapters, figures, publications, recipes, report, runs, tables
from expvae_book.chapters import Job
from expvae_book.data import card
from expvae_book.data.catalogue import MOTIFS
from expvae_book.names import (
    ATTENTION,
    AUROC,
    BEST_IOU,
    COMMON,
    DIFFERENCE,
    ERROR,
    IMAGE_AUROC,
    METHODS,
    MISSED,
    SSIM,
    TEN,
    plain,
)
from expvae_book.pages.mvtec_short import REPORTS, has_pixels
from expvae_book.pages.mvtec_short import in_short as in_short
from expvae_book.publications import SOURCES
from expvae_book.runs import Run

PROTOCOLS = {"mvtec10": TEN, "mvtec15": tuple(MOTIFS)}

Jobs = Mapping[str, Job]
Found = Mapping[str, Run | None]
NO_PIXELS = Markdown("*No category of this page has a mask of a defect: no pixel is measured.*")


def jobs(chapter: str, categories: str, parameters: Mapping[str, chapters.Value], again: bool) -> Jobs:
    """The job of each category that a chapter is asked for.

    Args:
        chapter: The chapter.
        categories: "all", or names with commas between them. Of generated ones all is one.
        parameters: The other parameters that tell runs apart, as they are declared.
        again: Whether they are computed although they are stored.

    Raises:
        ValueError: If a name is not one of the fifteen.
    """
    names = list(dict.fromkeys(filter(None, (name.strip() for name in categories.split(",")))))
    if names == ["all"]:
        # What is drawn takes as long as photographs do and says nothing of them: one category shows both chapters' way.
        alone = not runs.reading() and card.generated(str(parameters["data"]))
        names = list(TEN[:1] if alone else PROTOCOLS[chapter])
    if not names or not (runs.reading() or all(map(card.is_category, names))):
        raise ValueError(f"categories must be all, or some of {card.categories()}; got {categories!r}")
    resolved = dict(parameters)
    resolved["epochs"] = parameters["epochs"] or recipes.MVTEC[parameters["recipe"]].epochs
    keeps = parameters["augmentation"] in recipes.KEPT
    resolved["augmented"] = 0 if keeps else parameters["augmented"] or recipes.PAPER_COUNT
    wanted = [{"category": name, **resolved} for name in names]
    return dict(zip(names, chapters.jobs(chapter, wanted, told_by=["category"], again=again), strict=True))


def walked(jobs: Jobs) -> Job:
    """The job that is walked through: that of the first category that is stored, or whose images are at hand.

    Raises:
        FileNotFoundError: If there is none.
    """
    for name, job in jobs.items():
        if job.run is not None or (not runs.reading() and card.at_hand(name, job.parameters["data"])):
            return job
    fetch = f"python -m expvae_book.data fetch mvtec --categories {','.join(jobs)}"
    raise FileNotFoundError(f"no images of {', '.join(map(plain, jobs))} are at hand; fetch them with: {fetch}")


def at(jobs: Jobs, layer: str, preset: str) -> Found:
    """The runs of some jobs as pages show them: without masks no map was measured."""
    return {name: job.run and (job.run.at(layer, preset) if job.run.maps else job.run) for name, job in jobs.items()}


def by_pixel(show: Callable[..., Any]) -> Callable[..., Any]:
    """Let what is shown of some runs, its last argument, say in a word where none of them has a pixel measured."""

    @wraps(show)
    def shown(*arguments: Any) -> Any:
        found = arguments[-1]
        if any(found.values()) and not any(run is not None and has_pixels(run) for run in found.values()):
            return display(NO_PIXELS)
        return show(*arguments)

    return shown


def published(chapter: str) -> None:
    """Show the range of the published numbers."""
    table = tables.printed(REPORTS[chapter], PROTOCOLS[chapter])
    report.show(table, "MVTec AD: the published numbers over the categories of this chapter.")


def ratio() -> Markdown:
    """How the second report's IoUs compare with the paper's."""
    given = tables.published("R2", "IoU")
    ratios = given["R2"] / given["paper"]
    return Markdown(
        f"The second report's IoU is {ratios.min():.1f} to {ratios.max():.0f} times the paper's, {ratios.median():.1f} "
        f"times in the median, and above it in {(ratios > 1).sum()} of {len(ratios)} categories."
    )


def examples(
    pictures: Mapping[str, figures.Images], maps: Mapping[str, np.ndarray], layer: str, preset: str, credit: str
) -> Image | Markdown:
    """The defects shown, under the maps of the trained and of the untrained network.

    Args:
        pictures: By name what is drawn as it is.
        maps: Maps by name, as the step `explain` of the job gives them.
        layer: The layer shown.
        preset: The preset shown.
        credit: Whose images these are.
    """
    if f"trained/{layer}, {preset}" not in maps:
        return figures.NOT_KEPT
    shown = figures.before_and_after(maps, layer, preset)
    return figures.examples(pictures, shown, titles=[""] * len(next(iter(shown.values()))), credit=credit, grey="gray")


def walk(run: Run, layer: str, preset: str) -> None:
    """Show every map of one category by every measure of pixels and of images, beside untrained networks."""
    shown = [AUROC, "average precision", "AUPRO", BEST_IOU]
    run = run.at(layer, preset) if run.maps else run
    image = (IMAGE_AUROC, "maximum")
    names = [
        name for name in METHODS if run.text(AUROC, name, lacking="") or run.text(image[0], name, image[1], lacking="")
    ]
    if not names:
        display(Markdown(f"*Nothing is measured: {run.card.note}*"))
        return
    lines = [
        {"method": name}
        | {title: run.text(title, name, lacking="–") for title in shown}
        | {"image AUROC (maximum)": run.text(image[0], name, image[1], lacking="–")}
        for name in names
    ]
    subject = {"dataset": "mvtec", "category": run.parameters["category"]}
    untrained = {title: tables.untrained_text(title, layer, preset, **subject) for title in shown}
    if untrained[AUROC] != tables.NOT_MEASURED:
        lines.append({"method": "never trained"} | untrained)
    share = run.text("anomalous pixels", form=".2%", lacking="")
    name, told = plain(run.parameters["category"]).capitalize(), "no mask says which pixels are anomalous"
    told = f"{share} of the pixels are anomalous" if share else told
    report.show(pd.DataFrame(lines), f"{name}: {told}; 95 % intervals over images.")


def notices(found: Found) -> None:
    """Say what the data are, and which categories lack."""
    done = [run for run in found.values() if run is not None]
    kinds = {run.card.kind for run in done}
    if "sample" in kinds:
        said = "**Generated workpieces, not MVTec AD: no number on this page compares with a published one.**"
        chapters.notice(said, "warning")
    for run in done:
        if run.card.own:
            said = f"**{plain(run.parameters['category']).capitalize()}.** {' '.join(run.card.note.splitlines())}"
            chapters.notice(f"{said} No published number compares with it, and no claim counts it.")
    if kinds & {"partial", "re-encoded"}:
        notes = dict.fromkeys(line for run in done if not run.card.own for line in run.card.note.splitlines())
        said = "These data are not the official release, and the results are not its protocol. "
        chapters.notice(said + " ".join(notes))
    missing = [name for name, run in tables.released(found).items() if run is None]
    if missing:
        fetch = f"python -m expvae_book.data fetch mvtec --categories {','.join(missing)}"
        chapters.notice(
            f"No run of {', '.join(map(plain, missing))} with the parameters of this page is stored. `{fetch}` fetches "
            "images that are not at hand, and the commands at the end of this page fill their lines."
        )


def results(chapter: str, jobs: Jobs, layer: str, preset: str) -> None:
    """Show pixel AUROC and IoU of every category, beside the published ones."""
    report.show(
        tables.results(REPORTS[chapter], at(jobs, layer, preset)),
        f"Attention at {layer} by the preset {preset}: pixel AUROC and IoU beside the published ones; 95 % intervals "
        "over images. Ours is the IoU of the anomalous class, all pixels pooled, at the best threshold of the test "
        "set, an oracle.",
    )


def methods(found: Found) -> None:
    """Show the attention beside every baseline, by category."""
    _by_pixel_methods(found)
    whole = tables.having(found, AUROC) | tables.having(found, IMAGE_AUROC, ATTENTION, "maximum")
    lines = [
        {"Category": category}
        | {
            f"{name}, {how}": run.text(IMAGE_AUROC, name, how, form=".2f", lacking="no normal test images")
            for name in (ATTENTION, ERROR, SSIM)
            for how in ("mean", "maximum")
        }
        for category, run in whole.items()
    ]
    if lines:
        report.show(pd.DataFrame(lines), "AUROC of whole images, by the mean and by the maximum of the map.")


@by_pixel
def _by_pixel_methods(found: Found) -> None:
    report.show(
        tables.methods(found, AUROC), "Pixel AUROC of the attention and of every baseline; 95 % intervals over images."
    )
    report.show(
        tables.methods(found, "AUPRO"),
        "AUPRO, overlap per defect up to a false positive rate of 0.3, of the same maps.",
    )


@by_pixel
def orders(found: Found) -> None:
    """Show in how many categories the attention is above each baseline."""
    report.show(
        tables.orders(found),
        "In how many categories the pixel AUROC of attention is above, not told apart from or below a baseline, by "
        "paired 95 % intervals.",
    )


def panels(found: Found) -> None:
    """Show the defects of every category."""
    for category, run in found.items():
        if run is not None:
            display(Markdown(f"**{plain(category).capitalize()}**"), figures.kept(run, "defects"))


@by_pixel
def conventions(chapter: str, found: Found) -> None:
    """Show the IoU of the same maps by every convention, and which is nearest to the published ones."""
    found = tables.released(found)
    if not found:
        display(Markdown("*The images of this page are a user's own: no published number compares with theirs.*"))
        return
    table = tables.conventions(found, REPORTS[chapter])
    report.show(
        table,
        "The IoU of our attention maps by convention and threshold, over the categories that have a run, and its mean "
        "distance from the published numbers of the same categories. Thresholds marked as oracles were chosen on the "
        "test images.",
    )
    said = []
    for source in ("paper", REPORTS[chapter]) if len(table) else ():
        distance = pd.to_numeric(table[f"Distance from {SOURCES[source]}"], errors="coerce")
        nearest = table[distance.round(3) == distance.round(3).min()]
        if len(nearest):
            row = nearest.iloc[0]
            alike = f" and {len(nearest) - 1} more" if len(nearest) > 1 else ""
            said.append(
                f"nearest to {SOURCES[source]} comes the IoU of the {row['IoU of']}, {row['Averaged']}, with the "
                f"threshold: {row['Threshold from']}{alike} (mean {row['Ours, mean']}, distance {distance.min():.3f})"
            )
    if said:
        number = len(tables.having(found, AUROC))
        categories = "one category" if number == 1 else f"{number} categories"
        close = "Rows close to each other are not told apart by so few."
        display(Markdown(f"Over {categories}, {'; '.join(said)}. {close}"))


@by_pixel
def trivial(found: Found) -> None:
    """Show what maps get that have not looked, beside the second report's IoU."""
    table = tables.trivial(found, "R2")
    report.show(
        table,
        "The IoU of maps that flag everything or nothing, beside ours (best thresholds, oracles; 95 % intervals over "
        "images) and the second report's.",
    )
    theirs = tables.published("R2", "IoU")["R2"]
    said = (
        f"The second report's {len(theirs)} IoUs lie between {theirs.min():.2f} and {theirs.max():.2f}, around one "
        "half, whatever the category and its AUROC."
    )
    if set(table.get("Category", ())) & set(theirs.index):
        floor = table.set_index("Category")["Both classes, nothing flagged, defective images"].astype(float)
        near = (theirs.reindex(floor.index) - floor).dropna()
        spread = f" on average (from {near.min():+.3f} to {near.max():+.3f})" if len(near) > 1 else ""
        said += (
            f" Where we have a run they differ from what flagging nothing scores over the defective images alone by "
            f"{near.abs().mean():.3f}{spread}."
        )
    display(Markdown(said))


@by_pixel
def failures(found: Found) -> None:
    """Show how many maps miss the defect, and what they follow instead."""
    report.show(
        tables.failures(found),
        "The share of defective images whose own pixel AUROC is below one half, with 95 % intervals; the share of the "
        "variance of the attention maps that is the same in all test images; what the maps resemble most (mean rank "
        "correlation within images); and the kinds of defects with the lowest and highest mean AUROC within images.",
    )


@by_pixel
def follow(found: Found) -> Markdown:
    """In how many categories the maps say something of the image at hand."""
    there = tables.having(found, AUROC)
    common = (DIFFERENCE, f"{ATTENTION} − {COMMON}")
    both = [
        runs.order(run.metric(AUROC, ATTENTION), 0.5) == runs.order(run.metric(*common), 0.0) == "above"
        for run in there.values()
    ]
    return Markdown(
        f"In {sum(both)} of {len(there)} categories the attention map is above chance *and* above the mean attention "
        "map of normal images, which is the same for every test image: only there do the maps say something of the "
        "image at hand that helps to find its defect. What they follow instead is in the table, as the share that all "
        "maps have in common and as rank correlations."
    )


@by_pixel
def missed(found: Found) -> Markdown:
    """How many maps miss the defect, beside what the first report counted."""
    row = publications.select(publications.read(), source="R1", metric=MISSED).iloc[0]
    images, count = tables.missed(found)
    ours = (
        f"Over all {images} defective images of these categories, {count / images:.0%} of the maps miss the defect by "
        "that definition. "
        if images
        else ""
    )
    return Markdown(f"{ours}The report says: {row['published']} ({row['note']}).")


def learned(found: Found) -> None:
    """Show what the models have learned, with a warning where that is little."""
    dear = tables.dear(found)
    if dear:
        chapters.notice(
            f"Held-out images cost more by the model than by the mean training image in {', '.join(dear)}. These "
            "models have not learned much of their images yet: read their maps, reconstruction error and SSIM as those "
            "of a training that has not gone far.",
            "warning",
        )
    report.show(
        tables.learned(found),
        "What the models have learned: cost of a held-out image, and how much images and reconstructions vary (root "
        "mean square over pixels).",
    )


def layers(jobs: Jobs) -> None:
    """Show the pixel AUROC by layer and preset, where pixels were measured."""
    table = tables.layers({name: job.run for name, job in jobs.items()})
    if table.empty and any(job.run for job in jobs.values()):
        display(NO_PIXELS)
        return
    report.show(
        table,
        "Pixel AUROC by layer and rule: mean over the categories, least and greatest. The paper's rule at the first "
        "three layers is measured on some images only. To take the best of these after the fact would be to tune on "
        "the test set.",
    )


def every_run(layer: str, preset: str) -> None:
    """Show every stored run on MVTec AD."""
    report.show(
        tables.every_run(layer, preset),
        "Every stored run on MVTec AD, of both chapters: pixel AUROC; best IoU (oracle).",
    )


def mirroring() -> None:
    """Show which categories are mirrored."""
    report.show(tables.mirroring(PROTOCOLS["mvtec15"]), "Which categories are mirrored when images are multiplied.")


def literature() -> None:
    """Show what the field reaches."""
    report.show(
        tables.literature(),
        "Means over the fifteen categories, as the sources named print them, many of them at second hand; that of Liu "
        "et al. is computed from their table. Protocols differ in image size and in the use of other training data.",
    )


def recipe_table() -> None:
    """Show the recipes."""
    shown = ["Recipe", "epochs", "batch_size", "learning_rate", "latent_dim", "reduction", "source"]
    lines = [{"Recipe": name} | vars(recipe) for name, recipe in recipes.MVTEC.items()]
    report.show(
        pd.DataFrame(lines)[shown].astype(str),
        "The recipes for MVTec AD; a budget counts the original images of a category, each once an epoch, as the "
        "reports' code reads them.",
    )
