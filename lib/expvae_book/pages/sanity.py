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
    SHOWN,
    UNTRAINED,
    WITHIN_INK,
)
from expvae_book.runs import Run

RULES = {"paper's rule": "liu2020_paper", "rule of the authors' code": "liu2020_code"}
WORDS = {
    "above": "more than",
    "below": "less than",
    "not told apart from": "not told apart from what",
}


def followed() -> list[Run]:
    """The runs whose maps were measured from the first step on: on real data, by today's protocols."""
    return [
        run
        for store in SHOWN
        for run in runs.find(store)
        if run.card.kind != "sample" and not run.outdated and any(name.startswith("course/") for name in run.arrays)
    ]


def named(run: Run) -> str:
    """A run in a few words: data set, inlier or category, recipe and seed."""
    subject = run.parameters.get("digit", run.parameters.get("category", ""))
    wrong = ", trained on the wrong digits" if "trained_on" in run.parameters else ""
    told = f"{source(run.card.name).title} {subject}".strip()
    return f"{told}, {run.parameters['recipe']}, seed {run.parameters['seed']}{wrong}"


def in_short() -> None:
    """Show for each training what its maps are worth beside those of the network that it started from; a figure."""
    lines = []
    for run in followed():
        layer, _ = SHOWN[run.chapter]
        for rule, preset in RULES.items():
            pair = (DIFFERENCE, f"{layer}, {preset} − {UNTRAINED}", LAST)
            if run.text(*pair, lacking=""):
                order = WORDS[runs.order(run.metric(*pair), 0.0)]
                lines.append(
                    f"- *{named(run)}*: by the {rule} the trained network's maps have a pixel AUROC of "
                    f"{run.text(AUROC, f'{layer}, {preset}', LAST)}, {order} the same network's had before its first "
                    f"step (difference {run.text(*pair, form='+.3f')})."
                )
    text = "**In short.** What did training add?\n\n" + ("\n".join(lines) or "*No run of ours says it yet.*")
    display(Markdown(text), courses("mnist"))


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
    return figures.show(figures.curves(panels, x="optimiser steps"))


def differences() -> None:
    """Show the differences of trained maps from those of the untrained network and of a map that sees nothing."""
    lines = []
    for run in followed():
        layer, nothing = SHOWN[run.chapter]
        for rule, preset in RULES.items():
            name = f"{layer}, {preset}"
            line = {
                "Training": named(run),
                "Map": f"{layer}, {rule}",
                "Trained": run.text(AUROC, name, LAST, lacking="–"),
            }
            for other in (UNTRAINED, nothing):
                line[f"Minus {other}"] = run.text(DIFFERENCE, f"{name} − {other}", LAST, "+.3f", lacking="")
            line["Best checkpoint on the test masks (oracle)"] = run.text(AUROC, name, BEST_STAGE, lacking="")
            lines.append(line)
    if lines:
        table = pd.DataFrame(lines).fillna("")
        report.show(table, f"Pixel AUROC, {LAST} of the training, and paired differences with 95 % intervals.")


def wrong_class() -> None:
    """Show what maps find of networks trained on the wrong digits, beside those trained on the right ones."""
    lines = []
    for run in followed():
        if run.chapter == "mnist":
            for rule, preset in RULES.items():
                name = f"conv2, {preset}"
                kind = "attention, paper" if preset == "liu2020_paper" else "attention, authors' code"
                line = {"Training": named(run), "Map": rule, "Foreign ink": run.text(AUROC, name, OUTLIERS, lacking="")}
                lines.append(line | {"Within ink": run.text(WITHIN_INK, kind, OUTLIERS, lacking="")})
    if lines:
        report.show(pd.DataFrame(lines), "Pixel AUROC with 95 % intervals over images.")


def explained() -> None:
    """Show what explains the maps of untrained networks, by data set and rule: means over the networks."""
    lines = []
    for run in runs.find("sanity", control="untrained"):
        rows = run.metrics[run.metrics["metric"] == EXPLAINED]  # none in records of the first version
        rows = rows[rows["subset"].str.startswith("random") & (run.card.kind != "sample")]
        if rows.empty:
            continue
        by = rows["subset"].str.rsplit("; ", n=1).str[-1]
        for name, of in rows.groupby(["method", by], sort=False)["value"].mean().unstack(sort=False).iterrows():
            told = f"{source(run.card.name).title} {run.parameters.get('digit', run.parameters.get('category', ''))}"
            lines.append({"Images": told.strip(), "Map": name} | of.map("{:.2f}".format).to_dict())
    if not lines:
        display(Markdown("*No run of ours says it yet.*"))
        return
    report.show(
        pd.DataFrame(lines),
        "R² of the maps of untrained networks by least squares, on the half of the images that the fit has not seen; "
        "mean over the networks. Below 0 the fit is worse than a constant.",
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
            report.show(tables.cascade(same), caption)
