"""The tables of the MVTec chapters: published numbers beside ours, by category. Nothing here computes a result."""

import csv
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pandas as pd

from expvae.metrics import CONVENTIONS
from expvae_book import names, publications, runs
from expvae_book.data.catalogue import MOTIFS
from expvae_book.names import ATTENTION, BASELINES, METHODS
from expvae_book.places import REPOSITORY
from expvae_book.runs import Run

LITERATURE = REPOSITORY / "book" / "literature" / "mvtec.csv"
NOT_AT_HAND = "data not at hand"
CHOICES = {"validation": "held-out normal images", "grid": "best of 99 (oracle)", "best": "best of all (oracle)"}

Found = Mapping[str, Run | None]


def title(category: str) -> str:
    """A category as it is printed: metal_nut is "metal nut"."""
    return category.replace("_", " ")


def published(report: str, metric: str) -> dict[tuple[str, str], float]:
    """The published numbers of MVTec AD by source and category, as one report has them and quotes the paper.

    Args:
        report: "R1" or "R2", who quotes the paper.
        metric: "pixel AUROC" or "IoU".
    """
    table = publications.read()
    rows = table[(table["dataset"] == "MVTec AD") & (table["metric"] == metric) & (table["quoted_by"] == report)]
    return {(row.source, row.setting): row.value for row in rows.itertuples()}


def results(report: str, found: Found, command: Callable[[str], str]) -> pd.DataFrame:
    """Per category: pixel AUROC and IoU of the paper, of a report and of our run, and what the run was made of.

    The last line has the means over the categories that have a run of ours.

    Args:
        report: "R1" or "R2".
        found: The run of each category, or None.
        command: From a category to the command that makes its run, for those that have none.
    """
    lines, ours_of = [], {"pixel AUROC": [], "IoU": []}
    given = {metric: published(report, metric) for metric in ours_of}
    for category, run in found.items():
        line = {"Category": title(category)}
        for metric, ours in (("pixel AUROC", "pixel AUROC"), ("IoU", "best IoU (oracle)")):
            for source in ("paper", report):
                value = given[metric].get((source, title(category)))
                line[f"{metric}, {publications.SOURCES[source]}"] = "" if value is None else f"{value:.3g}"
            line[f"{metric}, ours"] = _measured(run, ours)
            if run is not None and run.text(ours, ATTENTION, lacking=""):
                ours_of[metric].append((category, run.metric(ours, ATTENTION)["value"]))
        line["Trained on"] = command(category) if run is None else _budget(run)
        line["Data"] = "" if run is None else run.card.mark or "complete"
        lines.append(line)
    if ours_of["pixel AUROC"]:
        line = {"Category": f"mean of {len(ours_of['pixel AUROC'])}"}
        for metric, pairs in ours_of.items():
            for source in ("paper", report):
                values = [given[metric].get((source, title(category))) for category, _ in pairs]
                values = [value for value in values if value is not None]
                line[f"{metric}, {publications.SOURCES[source]}"] = f"{np.mean(values):.3f}" if values else ""
            line[f"{metric}, ours"] = f"{np.mean([value for _, value in pairs]):.3f}"
        lines.append(line)
    return pd.DataFrame(lines).fillna("")


def methods(found: Found, metric: str) -> pd.DataFrame:
    """A measure of the attention map and of every baseline, by category, and their means."""
    there = _there(found, metric)
    lines = [
        {"Category": title(category)} | {name: run.text(metric, name, form=".2f") for name in METHODS}
        for category, run in there.items()
    ]
    if there:
        means = {name: np.mean([run.metric(metric, name)["value"] for run in there.values()]) for name in METHODS}
        lines.append({"Category": "mean"} | {name: f"{value:.3f}" for name, value in means.items()})
    return pd.DataFrame(lines)


def orders(found: Found) -> pd.DataFrame:
    """In how many categories attention lies above, below or beside each baseline, by paired differences."""
    there = _there(found, names.DIFFERENCE, f"{ATTENTION} − {BASELINES[0]}")
    lines = []
    for name in BASELINES:
        rows = [run.metric(names.DIFFERENCE, f"{ATTENTION} − {name}") for run in there.values()]
        told = [runs.order(row, 0.0) for row in rows]
        counts = {outcome: told.count(outcome) for outcome in ("above", "not told apart from", "below")}
        mean = np.mean([row["value"] for row in rows]) if rows else np.nan
        lines.append({"Attention against": name} | counts | {"Mean difference": f"{mean:+.3f}"})
    return pd.DataFrame(lines)


def conventions(found: Found, report: str) -> pd.DataFrame:
    """The IoU of the same maps by every convention and threshold, and how far each lies from the published numbers.

    Distances are means over categories of |ours − published|, over the categories that have both.
    """
    given = published(report, "IoU")
    lines = []
    for average, classes in CONVENTIONS:
        for choice, threshold in CHOICES.items():
            there = _there(found, f"IoU, {average}, {classes}", ATTENTION, choice)
            if not there:
                continue
            ours = {
                category: run.metric(f"IoU, {average}, {classes}", ATTENTION, choice)["value"]
                for category, run in there.items()
            }
            line = {
                "IoU of": "anomalous class" if classes == "anomalous" else "mean of both classes",
                "Averaged": average,
                "Threshold from": threshold,
                "Ours, mean": f"{np.mean(list(ours.values())):.3f}",
                "Ours, range": f"{min(ours.values()):.3f}–{max(ours.values()):.3f}",
            }
            for source in ("paper", report):
                gaps = [
                    abs(value - given[source, title(category)])
                    for category, value in ours.items()
                    if (source, title(category)) in given
                ]
                line[f"Distance from {publications.SOURCES[source]}"] = f"{np.mean(gaps):.3f}" if gaps else ""
            lines.append(line)
    return pd.DataFrame(lines)


def trivial(found: Found, report: str) -> pd.DataFrame:
    """What maps get that have not looked: that flag nothing, or everything; beside a report's IoU and ours.

    With a share p of anomalous pixels, flagging everything has an IoU of p by the anomalous class; flagging nothing has
    (1 − p)/2 by the mean of both classes, less over the defective images alone than over all.
    """
    given = published(report, "IoU")
    lines = []
    for category, run in _there(found, "anomalous pixels", "").items():
        shares = [run.metric("anomalous pixels", subset=subset)["value"] for subset in ("", "defective images")]
        value = given.get((report, title(category)))
        lines.append(
            {
                "Category": title(category),
                "Anomalous class, everything flagged": f"{shares[0]:.3f}",
                "ours, best": run.text("IoU, pooled, anomalous", ATTENTION, "best"),
                "Both classes, nothing flagged": f"{(1 - shares[0]) / 2:.3f}",
                "ours, best ": run.text("IoU, pooled, both", ATTENTION, "best"),
                "Both classes, nothing flagged, defective images": f"{(1 - shares[1]) / 2:.3f}",
                "ours, best  ": run.text("IoU, per defective image, both", ATTENTION, "best"),
                f"IoU, {publications.SOURCES[report]}": "" if value is None else f"{value:.3g}",
            }
        )
    return pd.DataFrame(lines)


def failures(found: Found) -> pd.DataFrame:
    """Why maps miss: how alike they are from image to image, and what they resemble instead of the defect."""
    lines = []
    for category, run in _there(found, names.MISSED).items():
        resembled = run.metrics[run.metrics["metric"] == names.RESEMBLES]  # none if the attention is constant
        resembled = resembled.reindex(resembled["value"].abs().sort_values(ascending=False).index)
        kinds = run.rows("AUROC within images, mean")
        kinds = kinds[kinds["method"] == ATTENTION].sort_values("value")
        worst, best = kinds.iloc[0], kinds.iloc[-1]
        lines.append(
            {
                "Category": title(category),
                "Maps that miss the defect": run.text(names.MISSED, ATTENTION, form=".0%"),
                "by reconstruction error": run.text(names.MISSED, "reconstruction error", form=".0%"),
                "Variance of the maps that all images share": run.text(names.SHARED, form=".0%", lacking=""),
                "Resembles most": ", ".join(
                    f"{row.method} ({row.value:+.2f})" for row in resembled.head(3).itertuples()
                ),
                "Worst kind of defect": f"{title(worst['subset'])} ({worst['value']:.2f})",
                "Best kind of defect": f"{title(best['subset'])} ({best['value']:.2f})",
            }
        )
    return pd.DataFrame(lines)


def missed(found: Found) -> tuple[int, int]:
    """Over all categories: the number of defective images, and of attention maps that miss the defect."""
    rows = [run.metric(names.MISSED, ATTENTION) for run in _there(found, names.MISSED).values()]
    return sum(row["n"] for row in rows), sum(round(row["value"] * row["n"]) for row in rows)


def learned(found: Found) -> pd.DataFrame:
    """What each model has learned: cost of held-out images against that of the mean image, KL, active latents."""
    lines = []
    for category, run in _there(found, "KL per image", "").items():
        spread = "standard deviation of a pixel over the images"
        lines.append(
            {
                "Category": title(category),
                "Encoder": run.record["training"]["encoder"],
                "Precision": run.record["training"]["precision"],
                "Originals": run.record["training"]["originals"],
                "Images seen": f"{run.record['budget']['used']:,}",
                "Reconstruction (nats)": run.text("reconstruction per image", form=",.0f"),
                "by the mean image": run.text("reconstruction per image, mean image", form=",.0f"),
                "KL (nats)": run.text("KL per image", form=".1f"),
                "Active latents": run.text("active units", form=".0f", lacking=""),
                "Spread of images": run.text(spread, "images", form=".3f", lacking=""),
                "of reconstructions": run.text(spread, "reconstructions", form=".3f", lacking=""),
            }
        )
    return pd.DataFrame(lines)


def dear(found: Found) -> list[str]:
    """The categories in which a held-out image costs more nats by the model than by the mean training image."""
    there = _there(found, "KL per image", "")
    return [title(category) for category, run in there.items() if _relative_cost(run) > 1]


def layers(found: Found) -> pd.DataFrame:
    """The pixel AUROC of every preset at every layer: means over the categories, with the least and the greatest."""
    metric = "pixel AUROC, layers and presets"
    tables = [run.rows(metric).set_index(["method", "subset"])["value"] for run in _having(found, metric)]
    if not tables:
        return pd.DataFrame()
    values = pd.concat(tables, axis=1)
    text = values.apply(lambda row: f"{row.mean():.3f} ({row.min():.2f}–{row.max():.2f})", axis=1)
    table = text.unstack("subset").reindex(names.LAYERS).fillna("")
    return table.rename_axis(columns=None).rename_axis("Layer").reset_index()


def every_run(chapter: str) -> pd.DataFrame:
    """Every stored run of a chapter: what it was made with, its budget and its pixel AUROC."""
    lines = []
    for run in runs.find(chapter):
        varying = {
            name: run.parameters[name] for name in ("category", "recipe", "layer", "preset", "augmentation", "seed")
        }
        lines.append(
            varying
            | {
                "encoder": run.record["training"]["encoder"],
                "data": run.card.mark or "complete",
                "images": f"{run.record['budget']['used']:,} of {run.record['budget']['asked']:,}",
                "pixel AUROC": run.text("pixel AUROC", ATTENTION, lacking=""),
                "best IoU (oracle)": run.text("best IoU (oracle)", ATTENTION, lacking=""),
                "greatest mean KL of an epoch (nats)": f"{max(run.record['losses']['kl'], default=0):,.0f}",
                "held-out cost / that of the mean image": f"{_relative_cost(run):.2f}",
                "state": run.state,
            }
        )
    return pd.DataFrame(lines)


def _relative_cost(run: Run) -> float:
    ours, constant = (
        run.metric(name)["value"] for name in ("reconstruction per image", "reconstruction per image, mean image")
    )
    return ours / constant


def mirroring(categories: Sequence[str]) -> pd.DataFrame:
    """Which categories are mirrored, and why."""
    yes = {True: "yes", False: "no"}
    return pd.DataFrame(
        {
            "Category": title(name),
            "Left and right": yes[MOTIFS[name].horizontal],
            "Top and bottom": yes[MOTIFS[name].vertical],
            "Because": MOTIFS[name].reason,
        }
        for name in categories
    )


def literature() -> pd.DataFrame:
    """What other methods reach on MVTec AD: means over the fifteen categories, as the sources named print them.

    The line of Liu et al. is the mean of the AUROCs that their paper prints for the categories.
    """
    with LITERATURE.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    paper = [value for (source, _), value in published("R2", "pixel AUROC").items() if source == "paper"]
    shown = {"image_auroc": "Image AUROC", "pixel_auroc": "Pixel AUROC", "aupro": "AUPRO"}
    for line in lines:
        if line["key"] == "liu2020":
            line["pixel_auroc"] = f"{np.mean(paper):.3f}"
    table = pd.DataFrame(lines).sort_values(["year", "method"]).rename(columns=shown)
    table = table.rename(
        columns={"method": "Method", "year": "Year", "kind": "Kind", "where": "Read in", "note": "Note"}
    )
    return table[["Method", "Year", "Kind", *shown.values(), "Read in", "Note"]]


def _there(found: Found, metric: str, method: str = ATTENTION, subset: str = "") -> dict[str, Run]:
    """The runs that have a number."""
    return {
        category: run
        for category, run in found.items()
        if run is not None and run.text(metric, method, subset, lacking="") != ""
    }


def _having(found: Found, metric: str) -> list[Run]:
    return [run for run in found.values() if run is not None and (run.metrics["metric"] == metric).any()]


def _measured(run: Run | None, metric: str) -> str:
    if run is None:
        return NOT_AT_HAND
    return run.text(metric, ATTENTION, lacking="no masks")


def _budget(run: Run) -> str:
    budget = run.record["budget"]
    return f"{budget['used']:,} of {budget['asked']:,} {budget['unit']}"
