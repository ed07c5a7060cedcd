"""What the chapter on untrained networks draws, tabulates and says: does training matter?"""

import pandas as pd
from IPython.display import Image, Markdown, display

from expvae_book import figures, judging, report, runs, tables
from expvae_book.data.catalogue import source
from expvae_book.names import (
    AUROC,
    BEST_STAGE,
    DIFFERENCE,
    EXPLAINED,
    KEPT_RANKS,
    LAST,
    OUTLIERS,
    RECONSTRUCTION,
    SHOWN,
    UNTRAINED,
    WITHIN_INK,
)
from expvae_book.runs import Run

RULES = {"paper's rule": "liu2020_paper", "rule of the authors' code": "liu2020_code"}
WORDS = {"above": "more than", "below": "less than"}


def followed() -> list[Run]:
    """The runs whose maps were measured from the first step on: on real data, by today's code."""
    return [
        run
        for store in SHOWN
        for run in runs.find(store)
        if run.card.published
        and not (run.outdated or run.differs)
        and any(name.startswith("course/") for name in run.arrays)
    ]


def named(run: Run) -> str:
    """A run in a few words: data set, inlier or category, recipe and seed."""
    wrong = ", trained on the wrong digits" if "trained_on" in run.parameters else ""
    return f"{pictured(run)}, {run.parameters['recipe']}, seed {run.parameters['seed']}{wrong}"


def pictured(run: Run) -> str:
    """The data set of a run, with the category or the digit."""
    digit = f", digit {run.parameters['digit']}" if "digit" in run.parameters else ""
    return source(run.card.name).title + digit


def in_short() -> None:
    """Show for each training what its maps are worth beside those of the network that it started from; a figure."""
    lines, orders = [], []
    for run in followed():
        layer, _ = SHOWN[run.chapter]
        parts = []
        for rule, preset in RULES.items():
            pair = (DIFFERENCE, f"{layer}, {preset} − {UNTRAINED}", LAST)
            if run.text(*pair, lacking=""):
                score, order = run.text(AUROC, f"{layer}, {preset}", LAST), runs.order(run.metric(*pair), 0.0)
                orders.append(order)
                order = f"{WORDS.get(order, order)} before the first step ({run.text(*pair, form='+.3f')})"
                parts.append(f"by the {rule} {score}, {order}")
        if parts:
            lines.append(f"- *{named(run)}*: {'; '.join(parts)}. {report.extent(run)}{_restores_little(run)}")
    counts = (orders.count(order) for order in ("above", "below", "not told apart from"))
    told = (
        " Of {} cases, each a training and a [rule](method.md#the-paper-and-its-code), it was higher after it than "
        "before in {}, lower in {}, and not told apart in {}.\n\n".format(len(orders), *counts)
    )
    text = "**In short.** What did training add to the [pixel AUROC](method.md#how-maps-are-measured) of maps?"
    display(Markdown(text + (told + "\n".join(lines) if lines else " *No run of ours says it yet.*")), courses("mnist"))


def _restores_little(run: Run) -> str:
    """That a network restores images no better than their mean does, as a sentence."""
    rows = run.metrics[run.metrics["metric"].str.startswith(f"{RECONSTRUCTION}, mean ")]
    if len(rows) and run.metric(RECONSTRUCTION)["value"] >= rows["value"].iloc[0]:
        return " This network restores images no better than their mean does, and says nothing of a finished one."
    return ""


def courses(store: str) -> Image | Markdown:
    """The pixel AUROC of maps over the training, from the untrained network on, by rule; a line for each run."""
    layer, panels = SHOWN[store][0], {}
    for rule, preset in RULES.items():
        lines = {}
        for run in followed():
            course = run.arrays.get(f"course/{layer}, {preset}")
            if run.chapter == store and course is not None:
                lines[named(run)] = course[:, 0].tolist(), course[:, 1].tolist()
        if lines:
            panels[f"{AUROC}, {rule}"] = lines
    if not panels:
        return Markdown("*No run of ours says it yet.*")
    return figures.show(figures.curves(panels, x="optimiser steps", levels=True))


def differences() -> None:
    """Show the differences of trained maps from those of the untrained network and of a map that sees nothing."""
    lines = []
    for run in followed():
        layer, nothing = SHOWN[run.chapter]
        for rule, preset in RULES.items():
            name = f"{layer}, {preset}"
            if not run.text(AUROC, name, LAST, lacking=""):
                continue
            line = {
                "Training": named(run),
                "Map": f"{layer}, {rule}",
                "Trained": run.text(AUROC, name, LAST),
            }
            for other in (UNTRAINED, nothing):
                line[f"Minus {other}"] = run.text(DIFFERENCE, f"{name} − {other}", LAST, "+.3f", lacking="")
            line[BEST_STAGE.capitalize()] = tables.best_stage(run, name)
            lines.append(line)
    if lines:
        table = pd.DataFrame(lines).fillna("")
        caption = (
            f"Pixel AUROC, {LAST} of the training, and paired differences. Intervals (95 %) are over test images, "
        )
        report.show(table, caption + "or clips, of one training: another seed may give what lies outside of them.")


def wrong_class() -> None:
    """Show what maps find of networks trained on the wrong digits, beside those trained on the right ones."""
    lines, digits = [], [run for run in followed() if run.chapter == "mnist"]
    if not any("trained_on" in run.parameters for run in digits):
        display(Markdown("*No network that was trained on the wrong digits is stored yet.*"))
        return
    for run in digits:
        for rule, preset in RULES.items():
            name = f"conv2, {preset}"
            kind = "attention, paper" if preset == "liu2020_paper" else "attention, authors' code"
            line = {"Training": named(run), "Map": rule, "Foreign ink": run.text(AUROC, name, OUTLIERS, lacking="")}
            lines.append(line | {"Within ink": run.text(WITHIN_INK, kind, OUTLIERS, lacking="")})
    report.show(pd.DataFrame(lines), "Pixel AUROC with 95 % intervals over images.")


def explained() -> None:
    """Show what explains the maps of untrained networks, by data set and rule: means over the networks."""
    lines = []
    for run in runs.find("sanity", control="untrained"):
        rows = run.metrics[run.metrics["metric"] == EXPLAINED]  # none in records of the first version
        rows = rows[rows["subset"].str.startswith("random") & run.card.published]
        if rows.empty:
            continue
        by = rows["subset"].str.rsplit("; ", n=1).str[-1]
        for name, of in rows.groupby(["method", by], sort=False)["value"].mean().unstack(sort=False).iterrows():
            lines.append({"Images": pictured(run), "Map": name} | of.map("{:.2f}".format).to_dict())
    if not lines:
        display(Markdown("*No run of ours says it yet.*"))
        return
    report.show(
        pd.DataFrame(lines),
        "R² of the maps of untrained networks by least squares, on the half of the images that the fit has not seen; "
        "mean over the networks, which differ. Below 0 the fit is worse than a constant. “Position” is the mean map of "
        "the other half; maps that are exchanged among images keep nothing else.",
    )


def controls() -> None:
    """Show every stored record of untrained networks, and of maps that take no VAE."""
    for control in ("untrained", "baselines"):
        for stored in runs.find("sanity", control=control):
            table = tables.untrained(stored) if control == "untrained" else tables.without_vae(stored)
            report.show(table, f"{tables.CONTROLS[control]} {stored.caption}")


def cascades() -> None:
    """Show what is left of maps where layers are random, by run."""
    for store in SHOWN:
        judged = [run for run in runs.find(store) if KEPT_RANKS in set(run.metrics["metric"])]
        for same in judging.alike(judged, "seed"):
            caption = f"Maps of networks some of whose layers are random. {same[0].caption}"
            if len(same) == 1:
                caption += " No second seed is stored, so that two trainings are not compared yet."
            report.show(tables.cascade(same), caption)
