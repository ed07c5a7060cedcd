"""What the chapter on untrained networks draws, tabulates and says: does training matter?"""

from collections import Counter
from itertools import combinations

import numpy as np
import pandas as pd
from IPython.display import Image, Markdown, display
from scipy.stats import spearmanr

from expvae_book import figures, judging, report, runs, tables
from expvae_book.data.catalogue import source
from expvae_book.names import (
    AUROC,
    BEST_STAGE,
    DIFFERENCE,
    EXPLAINED,
    FLOOR,
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
WORDS = {"above": "higher", "below": "lower", "not told apart from": "not told apart"}


def followed() -> list[Run]:
    """The runs whose maps were measured from the first step on: on real data, by today's code."""
    return [
        run
        for store in SHOWN
        for run in runs.find(store)
        if run.card.published
        and not (run.outdated or run.differs)
        and any(row["subset"] == LAST for row in run.record["metrics"])
    ]


def kinds(store: str = "") -> dict[str, list[Run]]:
    """Those runs, of one chapter or of all, by what was trained: seeds, and categories of MVTec AD, together."""
    kinds: dict[str, list[Run]] = {}
    for run in followed():
        given = run.parameters
        if run.chapter == "mvtec":
            start = f"{given['initial']} weights at the start"
            words = ["MVTec AD", given["recipe"], start, f"augmentation: {given['augmentation']}"]
        else:
            words = [pictured(run), given["recipe"]]
        words += [f"{given['epochs']} epochs"] + ["trained on the wrong digits"] * ("trained_on" in given)
        if run.chapter.startswith(store):
            kinds.setdefault(", ".join(words), []).append(run)
    return kinds


def pictured(run: Run) -> str:
    """The data set of a run, with the category or the digit."""
    digit = f", digit {run.parameters['digit']}" if "digit" in run.parameters else ""
    return source(run.card.name).title + digit


def in_short() -> None:
    """Show for each data set what its trainings added to maps: a line, and the figure of MNIST."""
    lines, orders = [], []
    for store, (layer, _) in SHOWN.items():
        of = [run for run in followed() if run.chapter == store and "trained_on" not in run.parameters]
        parts = []
        for rule, preset in RULES.items():
            name = f"{layer}, {preset} − {UNTRAINED}"
            found = [runs.order(run.metric(DIFFERENCE, name, LAST), 0.0) for run in of if _paired(run, name)]
            if found:
                orders += found
                told = ", ".join(f"{WORDS.get(order, order)} in {count}" for order, count in Counter(found).items())
                parts.append(f"by the {rule} {report.spread(of, DIFFERENCE, name, LAST, '+.3f')}: {told}")
        if parts:
            title = source(of[0].card.name.partition("/")[0]).title
            lines.append(f"- *{title}*, `{layer}`, {'; '.join(parts)}. {_extents(of)}{_restores_little(of)}")
    counts = (orders.count(order) for order in ("above", "below", "not told apart from"))
    told = (
        " Of {} cases, each a training and a [rule](method.md#the-paper-and-its-code), it was higher after it than "
        "before in {}, lower in {}, and not told apart in {}. Below are the differences: of one training with its "
        "interval, of several mean, least and greatest.\n\n".format(len(orders), *counts)
    )
    text = "**In short.** What did training add to the [pixel AUROC](method.md#how-maps-are-measured) of maps?"
    display(Markdown(text + (told + "\n".join(lines) if lines else " *No run of ours says it yet.*")), courses("mnist"))


def _paired(run: Run, name: str) -> bool:
    return bool(run.text(DIFFERENCE, name, LAST, lacking=""))


def _extents(of: list[Run]) -> str:
    marks = ", ".join(sorted({run.card.mark or "complete" for run in of}))
    shares = sorted({f"{run.record['budget']['used'] / run.record['budget']['asked']:.0%}" for run in of}, key=len)
    return f"Data: {marks}; trainings: {len(of)}; of the budget used: {', '.join(shares)}."


def _restores_little(of: list[Run]) -> str:
    """How many networks restore images no better than their mean does, as a sentence."""
    count = 0
    for run in of:
        rows = run.metrics[run.metrics["metric"].str.startswith(f"{RECONSTRUCTION}, mean ")]
        count += bool(len(rows)) and run.metric(RECONSTRUCTION)["value"] >= rows["value"].iloc[0]
    return f" Unfinished: {count} of them restore images no better than the images' mean does." if count else ""


def courses(store: str) -> Image | Markdown:
    """The pixel AUROC of maps over the training, from the untrained network on, by rule; kinds differ in colour."""
    layer, panels = SHOWN[store][0], {}
    for rule, preset in RULES.items():
        lines = {}
        for kind, of in kinds(store).items():
            drawn = [run.arrays[name] for run in of if (name := f"course/{layer}, {preset}") in run.arrays]
            if drawn:
                lines[kind] = [(course[:, 0].tolist(), course[:, 1].tolist()) for course in drawn]
        if lines:
            panels[f"{AUROC}, {rule}"] = lines
    if not panels:
        return Markdown("*No run of ours says it yet.*")
    return figures.show(figures.curves(panels, x="optimiser steps", levels=True))


def differences() -> None:
    """Show the differences of trained maps from those of the untrained network and of a map that sees nothing."""
    lines = []
    for kind, of in kinds().items():
        layer, nothing = SHOWN[of[0].chapter]
        for rule, preset in RULES.items():
            name = f"{layer}, {preset}"
            trained = report.spread(of, AUROC, name, LAST)
            if trained:
                line = {"Training": kind, "Map": f"{layer}, {rule}", "Trained": trained}
                for other in (UNTRAINED, nothing):
                    line[f"Minus {other}"] = report.spread(of, DIFFERENCE, f"{name} − {other}", LAST, "+.3f")
                best = [float(found) for run in of if (found := tables.best_stage(run, name))]
                line[BEST_STAGE.capitalize()] = f"{np.mean(best):.3f}" if best else ""
                lines.append(line | {"Trainings": len(of)})
    if lines:
        caption = (
            f"Pixel AUROC, {LAST} of the training, and paired differences. Of one training with intervals (95 %) over "
            "test images, or clips: another seed may give what lies outside of them. Of several: mean, least, greatest."
        )
        report.show(pd.DataFrame(lines), caption)


def wrong_class() -> None:
    """Show what maps find of networks trained on the wrong digits, beside those trained on the right ones."""
    digits = kinds("mnist")
    if not any("trained_on" in run.parameters for of in digits.values() for run in of):
        display(Markdown("*No network that was trained on the wrong digits is stored yet.*"))
        return
    lines = []
    for training, of in digits.items():
        for rule, preset in RULES.items():
            name = f"conv2, {preset}"
            kind = "attention, paper" if preset == "liu2020_paper" else "attention, authors' code"
            line = {"Training": training, "Map": rule, "Foreign ink": report.spread(of, AUROC, name, OUTLIERS)}
            lines.append(line | {"Within ink": report.spread(of, WITHIN_INK, kind, OUTLIERS), "Trainings": len(of)})
    report.show(
        pd.DataFrame(lines), "Pixel AUROC with 95 % intervals over images; of several trainings mean, least, greatest."
    )


def explained() -> None:
    """Show what explains the maps of untrained networks, by data set and rule: means over networks and categories."""
    found = []
    for run in runs.find("sanity", control="untrained"):
        rows = run.metrics[run.metrics["metric"] == EXPLAINED]  # none in records of the first version
        rows = rows[rows["subset"].str.startswith("random") & run.card.published]
        images = "MVTec AD" if "category" in run.parameters else pictured(run)
        found.append(rows.assign(Images=images, by=rows["subset"].str.rsplit("; ", n=1).str[-1]))
    if not any(len(rows) for rows in found):
        display(Markdown("*No run of ours says it yet.*"))
        return
    means = pd.concat(found).groupby(["Images", "method", "by"], sort=False)["value"].mean().unstack(sort=False)
    report.show(
        means.map("{:.2f}".format).reset_index().rename(columns={"method": "Map"}).rename_axis(columns=None),
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


def cascades(store: str) -> Image | Markdown:
    """The rank correlation with the trained map over the layers that are random, by map and by where it begins."""
    panels: dict[str, dict[str, list[figures.Line]]] = {}
    for kind, of in _randomised(store).items():
        for run in of:
            rows = run.rows(KEPT_RANKS)
            for way in ("from the latents", "from the image"):
                steps = rows[rows["subset"].str.startswith(f"random {way}")]
                for name, values in steps.groupby("method")["value"]:
                    line = list(range(1, len(values) + 1)), values.tolist()
                    panels.setdefault(f"{name}, {way}", {}).setdefault(kind, []).append(line)
    if not panels:
        return Markdown("*No run of ours says it yet.*")
    return figures.show(figures.curves(panels, x="layers that are random"))


def cascaded() -> None:
    """Show what is left of maps where layers are random, by kind of training; means over seeds and categories."""
    lines = [cascade(of).assign(Training=kind) for store in SHOWN for kind, of in _randomised(store).items()]
    if lines:
        table = pd.concat(lines)
        report.show(table[["Training", *table.columns[:-1]]], "Means over the runs of a kind.")


def cascade(of: list[Run]) -> pd.DataFrame:
    """What is left of a map where layers are random: pixel AUROC, and rank correlation with the trained map.

    Beside it how far the maps of two trained seeds are alike on the images that both keep, and those of two random
    networks. Means over the runs.

    Args:
        of: Runs of one kind of training.
    """
    lines = []
    for name in dict.fromkeys(name for run in of for name in run.rows(KEPT_RANKS)["method"]):
        line = {"Map": name, "Runs": len(of)}
        of_name = pd.concat([run.metrics for run in of]).query("method == @name")
        means = of_name.groupby(["metric", "subset"], sort=False)["value"].mean()
        scores, ranks = means.get(AUROC, pd.Series()), means[KEPT_RANKS]
        steps = [subset for subset in ranks.index if subset.startswith("random from the latents")]
        line[f"{AUROC}, trained"] = scores.get("random nothing", np.nan)  # kept by later records only
        line[f"{AUROC}, all random"] = scores.get(steps[-1], np.nan)
        line |= {"Rank correlation, latents random": ranks[steps[0]], "all random": ranks[steps[-1]]}
        line |= {
            "two trainings": _trained_alike(of, f"compared/{name}"),
            FLOOR: ranks.get(FLOOR, np.nan),
        }
        lines.append(line)
    table = pd.DataFrame(lines)
    digits = {title: "{:.3f}" if title.startswith(AUROC) else "{:+.2f}" for title in table.columns[2:]}
    return table.assign(**{title: table[title].map(form.format) for title, form in digits.items()}).replace(
        {"nan": "", "+nan": ""}
    )


def _trained_alike(of: list[Run], name: str) -> float:
    """The mean rank correlation of a map, over images and pairs of trainings that differ in the seed alone."""
    ranks = [
        spearmanr(a_YX, b_YX, axis=None).statistic
        for same in judging.alike((run for run in of if name in run.arrays), "seed")
        for one, other in combinations(same, 2)
        for a_YX, b_YX in zip(one.arrays[name], other.arrays[name], strict=True)
        if a_YX.std() and b_YX.std()
    ]
    return float(np.mean(ranks)) if ranks else np.nan


def _randomised(store: str) -> dict[str, list[Run]]:
    found = {kind: [run for run in of if KEPT_RANKS in set(run.metrics["metric"])] for kind, of in kinds(store).items()}
    return {kind: of for kind, of in found.items() if of}
