"""What the two chapters on MVTec AD say first: the findings in a few sentences, and the figure that says most."""

from collections.abc import Mapping

import pandas as pd
from IPython.display import Markdown, display

from expvae_book import figures, report, runs, tables
from expvae_book.names import ATTENTION, AUROC, ERROR, IMAGE_AUROC, RULES, plain
from expvae_book.publications import SOURCES
from expvae_book.runs import Run

REPORTS = {"mvtec10": "R1", "mvtec15": "R2"}  # whose protocol a chapter follows

Found = Mapping[str, Run | None]


def in_short(chapter: str, found: Found, layer: str, preset: str) -> None:
    """Show the findings in a few sentences, the verdicts, and the figure that says most.

    A user's own images, and images without masks, have sentences of their own: with the former nothing compares.
    """
    by_pixel = {name: run for name, run in tables.released(found).items() if run and has_pixels(run)}
    alone = {name: run for name, run in found.items() if run and name not in by_pixel}
    for name, run in alone.items():
        display(Markdown(_of_one(name, run, layer, preset)))
        if has_pixels(run):
            display(figures.show(_by_category(chapter, {name: run}, layer, preset)))
    if by_pixel:
        left = {name: None for name, run in tables.released(found).items() if run is None}
        _compared(chapter, by_pixel | left, layer, preset)
    elif not alone:
        display(report.NOT_YET)


def has_pixels(run: Run) -> bool:
    """Whether pixels were measured: where a mask marks an anomaly."""
    return bool(run.text(AUROC, ATTENTION, lacking=""))


def _of_one(name: str, run: Run, layer: str, preset: str) -> str:
    """What was found of one category by pixel and by image, as far as its images allow, and what they lack."""
    told = []
    for measure, subset, unit in (
        (AUROC, "", "pixels"),
        (IMAGE_AUROC, "maximum", "whole images (by the map's maximum)"),
    ):
        if run.text(measure, ATTENTION, subset, lacking=""):
            ours, order = run.metric(measure, ATTENTION, subset), ""
            if ours["low"] is not None:  # few images may leave no interval
                order = f", {runs.order(ours, 0.5)} chance (one half)"
            told.append(
                f"the AUROC of {unit} is **{run.text(measure, ATTENTION, subset)}**{order}; that of the reconstruction "
                f"error {run.text(measure, ERROR, subset)}"
            )
    shown = "; ".join(told) or "nothing could be measured"
    beside = " No published number compares with them, and no claim counts them." if run.card.own else ""
    return (
        f"**In short.** {plain(name).capitalize()}, by the rule *{RULES[preset]}* at {layer}: {shown}. "
        f"{' '.join(run.card.note.splitlines())}{beside} {extent({name: run})}"
    )


def _compared(chapter: str, found: Found, layer: str, preset: str) -> None:
    ours = tables.numbers(found, AUROC)
    given = tables.published(REPORTS[chapter], AUROC).reindex(ours.index)
    printed = "; ".join(f"{SOURCES[source]}: {given[source].mean():.3f}" for source in ("paper", REPORTS[chapter]))
    control = pd.Series(
        {
            plain(name): tables.untrained_values(AUROC, layer, preset, dataset="mvtec", category=name).mean()
            for name, run in found.items()
            if run is not None
        }
    ).dropna()
    both = ours.index.intersection(control.index)
    before = (
        f" Networks that were never trained have {control[both].mean():.3f}"
        + (f" over {len(both)} of these, and the trained ones {ours[both].mean():.3f}" * (len(both) < len(ours)))
        + "."
        if len(both)
        else ""
    )
    orders = [runs.order(run.metric(AUROC, ATTENTION), 0.5) for run in tables.having(found, AUROC).values()]
    sample = any(run.card.kind == "sample" for run in found.values() if run)
    scope = "These are generated workpieces, and no number here compares with a published one. " if sample else ""
    one = len(ours) == 1
    whose = ours.index[0] if one else f"{len(ours)} categories"
    told = (
        f", which is {orders[0]} chance (one half)"
        if one
        else f" on average (from {ours.min():.3f} to {ours.max():.3f}; one half is chance); in {orders.count('above')} "
        f"of them the map is above chance, in {orders.count('below')} below"
    )
    text = (
        f"**In short.** By the rule *{RULES[preset]}* at {layer} the maps of {whose} have a pixel AUROC of "
        f"**{ours.mean():.3f}**{told}. Published for the same, in the mean: {printed}. {scope}{before} The "
        f"reconstruction error has {tables.numbers(found, AUROC, ERROR).mean():.3f}. {extent(found)} Verdicts judge "
        "the rule that a claim speaks of, which need not be the one shown."
    )
    display(Markdown(text), figures.show(_by_category(chapter, found, layer, preset)), report.badges(chapter))


def _by_category(chapter: str, found: Found, layer: str, preset: str) -> figures.Figure:
    """Published pixel AUROCs by category, ours, and those of untrained networks."""
    given, points = tables.published(REPORTS[chapter], AUROC), []
    for category, run in tables.having(found, AUROC).items():
        for source in ("paper", REPORTS[chapter]):
            if category in given.index:
                points.append({"method": category, "group": SOURCES[source], "value": given.loc[category, source]})
        points.append({"method": category, "group": "ours, trained"} | report.ends(run.metric(AUROC, ATTENTION)))
        control = tables.untrained_point(AUROC, layer, preset, dataset="mvtec", category=run.parameters["category"])
        points.append({"method": category, "group": "ours, never trained"} | control)
        points.append(
            {"method": category, "group": "ours, reconstruction error"} | report.ends(run.metric(AUROC, ERROR))
        )
    table = pd.DataFrame(points, columns=["method", "group", "value", "low", "high"]).dropna(subset="value")
    return figures.intervals(table, label="pixel AUROC", chance=0.5)


def extent(found: Found) -> str:
    """What data the runs saw, and how much of their budgets they used."""
    done = [run for run in found.values() if run is not None]
    marks = dict.fromkeys(run.card.mark or "complete" for run in done)
    shares = [run.record["budget"]["used"] / run.record["budget"]["asked"] for run in done]
    share = " to ".join(dict.fromkeys(f"{end:.2%}" for end in (min(shares), max(shares))))
    own = [plain(name) for name, run in found.items() if run is not None and run.card.own]
    whose = ", ".join(own) or f"{len(done)} of {len(found)} categories of MVTec AD"
    return (
        f"Data: {whose}, {' and '.join(marks)}; budget: {share} of the "
        f"images that the recipe asks for, one training each (seed {done[0].parameters['seed']})."
    )
