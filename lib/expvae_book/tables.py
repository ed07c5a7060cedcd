"""The tables of the MVTec chapters: published numbers beside ours, by category. Nothing here computes a result."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from expvae.metrics import CONVENTIONS
from expvae_book import judging, names, publications, report, runs
from expvae_book.data.catalogue import MOTIFS
from expvae_book.matching import budget_text
from expvae_book.names import ATTENTION, AUROC, BASELINES, ERROR, METHODS, plain
from expvae_book.places import REPOSITORY
from expvae_book.report import cells
from expvae_book.runs import Run

LITERATURE = REPOSITORY / "book" / "literature" / "mvtec.csv"
NO_RUN = "no run"
NOT_MEASURED = "no run of ours"
CHOICES = {"validation": "held-out normal images", "grid": "best of 99 (oracle)", "best": "best of all (oracle)"}
PRINTED = {AUROC: AUROC, "IoU": names.BEST_IOU}  # what the publications print, and our number beside it

UNTRAINED = "untrained network"
CONTROLS = {
    "untrained": "Networks that were never trained: pixel AUROC, its mean over networks and the least and greatest.",
    "baselines": "Maps that take no VAE, with 95 % intervals.",
}

Found = Mapping[str, Run | None]


def published(report: str, metric: str) -> pd.DataFrame:
    """The published numbers of MVTec AD, a line per category and a column per source, as one report has them.

    Args:
        report: "R1" or "R2", who quotes the paper.
        metric: "pixel AUROC" or "IoU".
    """
    rows = publications.select(publications.read(), dataset="MVTec AD", metric=metric, quoted_by=report)
    return rows.pivot(index="setting", columns="source", values="value")


def printed(report: str, categories: Sequence[str]) -> pd.DataFrame:
    """The range of the published numbers over some categories, by the paper and by a report."""
    return pd.DataFrame(
        {
            "Source": publications.SOURCES[source],
            "Measure": metric,
            "Categories": len(values),
            "Least": f"{values.min():.3g}",
            "Mean": f"{values.mean():.3f}",
            "Greatest": f"{values.max():.3g}",
        }
        for metric in PRINTED
        for source in ("paper", report)
        for values in [published(report, metric)[source].reindex(map(plain, categories)).dropna()]
    )


def results(report: str, found: Found) -> pd.DataFrame:
    """Per category: pixel AUROC and IoU of the paper, of a report and of our run, and what the run was made of.

    The last line has the means over the categories of MVTec AD that have a run of ours.

    Args:
        report: "R1" or "R2".
        found: The run of each category, or None.
    """
    table, mean = pd.DataFrame(index=list(map(plain, found))), {}
    for metric, ours in PRINTED.items():
        given, values = published(report, metric).reindex(table.index), numbers(released(found), ours)
        for source in ("paper", report):
            name = f"{metric}, {publications.SOURCES[source]}"
            table[name] = ["" if np.isnan(value) else f"{value:.3g}" for value in given[source]]
            mean[name] = _decimals(given.loc[values.index, source].mean())
        table[f"{metric}, ours"] = [
            NO_RUN if run is None else run.text(ours, ATTENTION, lacking="no masks") for run in found.values()
        ]
        mean[f"{metric}, ours"] = _decimals(values.mean())
    table["Trained on"] = ["" if run is None else budget_text(run, ",") for run in found.values()]
    table["Data"] = ["" if run is None else run.card.mark or "complete" for run in found.values()]
    number = len(numbers(released(found), AUROC))
    if number:
        table.loc[f"mean of {number}"] = pd.Series(mean)
    return table.fillna("").rename_axis("Category").reset_index()


def methods(found: Found, metric: str) -> pd.DataFrame:
    """A measure of the attention map and of every baseline, by category, and their means."""
    lines = [
        {"Category": category}
        | {name: run.text(metric, name, form=".2f", lacking="–") for name in METHODS}
        | {UNTRAINED: _untrained(metric, run)}
        for category, run in having(found, metric).items()
    ]
    if lines:
        lines.append({"Category": "mean"} | {name: _decimals(numbers(found, metric, name).mean()) for name in METHODS})
    return pd.DataFrame(lines)


def _untrained(metric: str, run: Run) -> str:
    given = run.parameters
    return untrained_text(metric, given["layer"], given["preset"], dataset="mvtec", category=given["category"])


def orders(found: Found) -> pd.DataFrame:
    """In how many categories attention lies above, below or beside each baseline, by paired differences."""
    lines = []
    for name in BASELINES:
        difference = (names.DIFFERENCE, f"{ATTENTION} − {name}")
        told = [runs.order(run.metric(*difference), 0.0) for run in having(found, *difference).values()]
        counts = {outcome: told.count(outcome) for outcome in ("above", "not told apart from", "below")}
        mean = f"{numbers(found, *difference).mean():+.3f}"
        lines.append({"Attention against": name} | counts | {"Mean difference": mean})
    return pd.DataFrame(lines)


def conventions(found: Found, report: str) -> pd.DataFrame:
    """The IoU of the same maps by every convention and threshold, and how far each lies from the published numbers.

    Distances are means over categories of |ours − published|, over the categories that have both.
    """
    given = published(report, "IoU")
    lines = []
    for average, classes in CONVENTIONS:
        for choice, threshold in CHOICES.items():
            ours = numbers(found, f"IoU, {average}, {classes}", ATTENTION, choice)
            if ours.empty:
                continue
            distances = given[["paper", report]].sub(ours, axis=0).abs().mean()
            lines.append(
                {
                    "IoU of": "anomalous class" if classes == "anomalous" else "mean of both classes",
                    "Averaged": average,
                    "Threshold from": threshold,
                    "Ours, mean": f"{ours.mean():.3f}",
                    "Ours, range": f"{ours.min():.3f}–{ours.max():.3f}",
                }
                | {f"Distance from {publications.SOURCES[source]}": _decimals(far) for source, far in distances.items()}
            )
    return pd.DataFrame(lines)


def trivial(found: Found, report: str) -> pd.DataFrame:
    """What maps get that have not looked: that flag nothing, or everything; beside a report's IoU and ours.

    With a share p of anomalous pixels, flagging everything has an IoU of p by the anomalous class; flagging nothing has
    (1 − p)/2 by the mean of both classes, less over the defective images alone than over all.
    """
    given = published(report, "IoU")[report].map("{:.3g}".format)
    lines = []
    for category, run in having(found, "anomalous pixels", "").items():
        share, of_defective = (run.metric("anomalous pixels", "", of)["value"] for of in ("", "defective images"))
        lines.append(
            {
                "Category": category,
                "Anomalous class, everything flagged": f"{share:.3f}",
                "ours, best": run.text("IoU, pooled, anomalous", ATTENTION, "best"),
                "Both classes, nothing flagged": f"{(1 - share) / 2:.3f}",
                "ours, best ": run.text("IoU, pooled, both", ATTENTION, "best"),
                "Both classes, nothing flagged, defective images": f"{(1 - of_defective) / 2:.3f}",
                "ours, best  ": run.text("IoU, per defective image, both", ATTENTION, "best"),
                f"IoU, {publications.SOURCES[report]}": given.get(category, ""),
            }
        )
    return pd.DataFrame(lines)


def failures(found: Found) -> pd.DataFrame:
    """Why maps miss: how alike they are from image to image, and what they resemble instead of the defect."""
    lines = []
    for category, run in having(found, names.MISSED).items():
        resembled = run.metrics[run.metrics["metric"] == names.RESEMBLES]  # none if the attention is constant
        resembled = resembled.sort_values("value", key=abs, ascending=False).head(3)
        of_kinds = run.metrics[run.metrics["metric"] == "AUROC within images, mean"]
        kinds = of_kinds.query("method == @ATTENTION").sort_values("value")  # none where few images were explained
        ends = kinds.iloc[[0, -1]] if len(kinds) else kinds
        worst, best = [f"{plain(kind.subset)} ({kind.value:.2f})" for kind in ends.itertuples()] or ("–", "–")
        lines.append(
            {
                "Category": category,
                "Maps that miss the defect": run.text(names.MISSED, ATTENTION, form=".0%"),
                "by reconstruction error": run.text(names.MISSED, ERROR, form=".0%"),
                "Variance of the maps that all images share": run.text(names.SHARED, ATTENTION, form=".0%", lacking=""),
                "Resembles most": ", ".join(f"{row.method} ({row.value:+.2f})" for row in resembled.itertuples()),
                "Worst kind of defect": worst,
                "Best kind of defect": best,
            }
        )
    return pd.DataFrame(lines)


def missed(found: Found) -> tuple[int, int]:
    """Over all categories: the number of defective images, and of attention maps that miss the defect."""
    rows = [run.metric(names.MISSED, ATTENTION) for run in having(found, names.MISSED).values()]
    return sum(row["n"] for row in rows), sum(round(row["value"] * row["n"]) for row in rows)


def learned(found: Found) -> pd.DataFrame:
    """What each model has learned: cost of held-out images against that of the mean image, KL, active latents."""
    spread = "standard deviation of a pixel over the images"
    columns = {
        "Encoder": lambda run: run.record["training"]["encoder"],
        "Precision": lambda run: run.record["training"]["precision"],
        "Originals": lambda run: run.record["training"]["originals"],
        "Images seen": lambda run: f"{run.record['budget']['used']:,}",
        "Reconstruction (nats)": (names.RECONSTRUCTION, "", "", ",.0f"),
        "by the mean image": (names.BY_MEAN_IMAGE, "", "", ",.0f"),
        "KL (nats)": (names.KL, "", "", ".1f"),
        "Active latents": (names.ACTIVE, "", "", ".0f"),
        "Spread of images": (spread, "images"),
        "of reconstructions": (spread, "reconstructions"),
    }
    there = having(found, names.KL, "")
    return pd.DataFrame({"Category": category} | cells(run, columns) for category, run in there.items())


def dear(found: Found) -> list[str]:
    """The categories in which a held-out image costs more nats by the model than by the mean training image."""
    return [category for category, run in having(found, names.KL, "").items() if _relative_cost(run) > 1]


def layers(found: Found) -> pd.DataFrame:
    """The pixel AUROC of every preset at every layer: means over the categories, with the least and the greatest."""
    lines = [
        (*name.split(", "), run.metric(AUROC, name)["value"])
        for run in found.values()
        if run is not None
        for name in run.maps
        if run.text(AUROC, name, lacking="")
    ]
    if not lines:
        return pd.DataFrame()
    values = pd.DataFrame(lines, columns=["layer", "preset", "value"]).groupby(["layer", "preset"])["value"]
    spread = values.apply(lambda value: f" ({value.min():.2f}–{value.max():.2f})" if len(value) > 1 else "")
    text = values.mean().map("{:.3f}".format) + spread
    table = text.unstack("preset").reindex(names.LAYERS).fillna("").rename(columns=names.RULES)
    return table.rename_axis(columns=None).rename_axis("Layer").reset_index()


def every_run(layer: str, preset: str) -> pd.DataFrame:
    """Every stored run on MVTec AD: a line for each kind of training, with two measures of one of its maps.

    Those are the pixel AUROC and the best IoU, means over seeds, in the column of the category.
    """
    lines = []
    for same in judging.alike(runs.find("mvtec"), "category", "seed"):
        line = {name: same[0].parameters[name] for name in ("recipe", "initial", "augmentation", "encoder")}
        line |= {"seeds": report.listed(same, lambda run: run.parameters["seed"])}
        line |= {"budget": report.listed(same, budget_text), "state": report.listed(same, report.word)}
        for of in judging.alike(same, "seed"):
            values = [report.spread(of, metric, f"{layer}, {preset}", form=".2f") for metric in (AUROC, names.BEST_IOU)]
            line[of[0].parameters["category"]] = "; ".join(value.partition(" ")[0] for value in values if value)
        lines.append(line | {"made by": report.made(same)})
    return pd.DataFrame(lines).fillna("")


def mirroring(categories: Sequence[str]) -> pd.DataFrame:
    """Which categories are mirrored, and why."""
    yes = {True: "yes", False: "no"}
    return pd.DataFrame(
        {
            "Category": plain(name),
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
    table = pd.read_csv(LITERATURE, dtype=str, keep_default_na=False).sort_values(["year", "method"])
    table.loc[table["key"] == "liu2020", "pixel_auroc"] = f"{published('R2', AUROC)['paper'].mean():.3f}"
    columns = {"method": "Method", "year": "Year", "kind": "Kind", "image_auroc": "Image AUROC"}
    columns |= {"pixel_auroc": "Pixel AUROC", "aupro": "AUPRO", "where": "Read in", "note": "Note"}
    return table[list(columns)].rename(columns=columns)


def released(found: Found) -> dict[str, Run | None]:
    """The categories of MVTec AD among these, without a user's own images."""
    return {name: run for name, run in found.items() if name in MOTIFS}


def having(found: Found, metric: str, method: str = ATTENTION, subset: str = "") -> dict[str, Run]:
    """The runs that have a number, by the name of their category as it is printed."""
    return {
        plain(category): run
        for category, run in found.items()
        if run is not None and run.text(metric, method, subset, lacking="")
    }


def numbers(found: Found, metric: str, method: str = ATTENTION, subset: str = "") -> pd.Series:
    """That number of those runs."""
    there = having(found, metric, method, subset)
    return pd.Series({name: run.metric(metric, method, subset)["value"] for name, run in there.items()}, dtype=float)


def _relative_cost(run: Run) -> float:
    return run.metric(names.RECONSTRUCTION)["value"] / run.metric(names.BY_MEAN_IMAGE)["value"]


def _decimals(value: float) -> str:
    return "" if np.isnan(value) else f"{value:.3f}"


def untrained(run: Run) -> pd.DataFrame:
    """The pixel AUROC of the maps of untrained networks: mean, least and greatest over the networks of a kind."""
    rows = run.rows(AUROC)
    start_seed = rows["subset"].str.extract(r"^(?P<start>\w+), seed \d+(?P<statistics>.*)$")
    rows = rows.assign(Network=start_seed["start"] + start_seed["statistics"])
    table = rows.groupby(["method", "Network"], sort=False)["value"].agg(["mean", "min", "max", "count"]).reset_index()
    digits = {name: "{:.3f}".format for name in ("mean", "min", "max")}
    table = table.assign(**{name: table[name].map(form) for name, form in digits.items()})
    return table.rename(
        columns={"method": "Map", "mean": "Mean", "min": "Least", "max": "Greatest", "count": "Networks"}
    )


def untrained_text(metric: str, layer: str, preset: str, **subject: str | int) -> str:
    """A measure of the maps of untrained networks as text: mean, least and greatest, and how many there are.

    Args:
        metric: The measure.
        layer: Layer of the maps.
        preset: Preset of the maps.
        subject: The parameters that name the data: dataset, and digit or category.
    """
    values = untrained_values(metric, layer, preset, **subject)
    if values.empty:
        return NOT_MEASURED
    return f"{values.mean():.3f} ({len(values)} networks, {values.min():.3f}–{values.max():.3f})"


def untrained_values(metric: str, layer: str, preset: str, **subject: str | int) -> pd.Series:
    """That measure of each untrained network with random weights; empty where none has been measured on real data."""
    for run in runs.find("sanity", control="untrained", **subject):
        rows = run.metrics[(run.metrics["metric"] == metric) & (run.metrics["method"] == f"{layer}, {preset}")]
        values = rows[rows["subset"].str.fullmatch(r"random, seed \d+")]["value"]
        if len(values) and run.card.kind != "sample":
            return values
    return pd.Series(dtype=float)


def untrained_point(metric: str, layer: str, preset: str, **subject: str | int) -> dict[str, float]:
    """Their mean, between the least and the greatest, as a point of a figure; not a number where there is none."""
    values = untrained_values(metric, layer, preset, **subject)
    return {"value": values.mean(), "low": values.min(), "high": values.max()}


def without_vae(run: Run) -> pd.DataFrame:
    """The maps that take no VAE, by pixel and by image."""
    columns = [AUROC, "average precision", "AUPRO", names.BEST_IOU]
    lines = []
    for name in run.rows(AUROC)["method"]:
        line = {"Map": name} | {title: run.text(title, name) for title in columns}
        lines.append(line | {"image AUROC": run.text(names.IMAGE_AUROC, name, "maximum", lacking="–")})
    return pd.DataFrame(lines)


def stages(run: Run, name: str) -> np.ndarray | None:
    """The pixel AUROC of a map after each stretch of a training; None where it was not followed.

    Not that of the untrained network, which is no checkpoint that anybody would choose.
    """
    course = run.arrays.get(f"course/{name}")
    return None if course is None else course[course[:, 0] > 0, 1]


def best_stage(run: Run, name: str, lacking: str = "") -> str:
    """The highest of `stages`, as a choice on the test masks would have it."""
    found = stages(run, name)
    return lacking if found is None or not len(found) else f"{found.max():.3f}"
