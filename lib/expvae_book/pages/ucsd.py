"""What the chapter on UCSD Ped1 draws, tabulates and says of its runs."""

from collections.abc import Mapping
from itertools import combinations

import numpy as np
import pandas as pd
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from expvae_book import chapters, figures, publications, report, runs, tables
from expvae_book.chapters import Job
from expvae_book.names import (
    ACTIVE,
    ATTENTION,
    AUROC,
    BEST_IOU,
    BEST_STAGE,
    DIFFERENCE,
    ERROR,
    IMAGE_AUROC,
    KL,
    LAST,
    PARAMETERS,
    RECONSTRUCTION,
    RULES,
    SIMPLE,
)
from expvae_book.names import CONVOLUTIONS as LAYERS
from expvae_book.names import MASKED_CLIPS as ALL
from expvae_book.names import TEST_CLIPS as TEST
from expvae_book.runs import Run

MOVING = "pixel AUROC among moving pixels"
PEDESTRIANS = "AUROC of moving pixels on normal frames"
LIT = {
    "above": "pedestrians light up, as the first report saw.",
    "below": "what moves lights up less than the rest of the frame.",
    "not told apart from": "what moves, pedestrians above all, stands out neither way.",
}


COLLAPSED = "No latent is active, so that the maps cannot show what the VAE has learned."


def methods(run: Run) -> list[str]:
    """The maps that a page shows: attention, and those that need none."""
    known = set(run.rows(AUROC)["method"])
    return [name for name in (ATTENTION, *SIMPLE) if name in known]


def reported(layer: str) -> str:
    """The published pixel AUROCs of a layer, by source."""
    given = _published().query("setting == @layer").drop_duplicates(["source", "value"])
    return "; ".join(f"{publications.SOURCES[row.source]}: {row.published}" for row in given.itertuples())


def _published() -> pd.DataFrame:
    return publications.select(publications.read(), dataset="UCSD Ped1", metric=AUROC)


def published(run: Run | None) -> None:
    """Show the published pixel AUROC by layer and source, and ours by the paper's rule."""
    table = _published().pivot_table(
        "published", "setting", "source", aggfunc=lambda texts: ", ".join(dict.fromkeys(texts))
    )
    table = table.rename(columns=publications.SOURCES).rename_axis(columns=None).rename_axis("Layer").reset_index()
    caption = "UCSD Ped1: the published pixel AUROC by layer."
    if run is not None:
        maps = {layer: f"{layer}, liu2020_paper" for layer in LAYERS}
        for name, subset in {"Ours": TEST, f"Ours, {LAST}": LAST}.items():
            table[name] = [run.text(AUROC, maps.get(layer, ""), subset, lacking="") for layer in table["Layer"]]
        caption += f" Ours by the paper's rule; verdicts judge the {LAST} of the training. {run.caption}"
    report.show(table, caption)


def in_short(job: Job, layer: str, preset: str) -> None:
    """Show the findings in a few sentences, the verdicts, and the figure that says most."""
    if job.run is None:
        display(report.NOT_YET)
        return
    run, paper = job.run.at(layer, preset), f"{layer}, liu2020_paper"
    order = runs.order(job.run.metric(AUROC, paper, TEST), 0.5)
    if run.card.kind == "sample":
        scope = "These are generated scenes, and no number here compares with a published one."
    else:
        scope = "Our frames are re-encoded and part of the masks are others', so that these compare only roughly."
    control = tables.untrained_text(AUROC, layer, "liu2020_paper", dataset="ucsd")
    before = "" if control == tables.NOT_MEASURED else f" Networks that were never trained have {control}."
    text = (
        f"**In short.** By the paper's rule the attention map at {layer} is {order} chance at ranking anomalous "
        f"pixels: its pixel AUROC is **{job.run.text(AUROC, paper, TEST)}** (one half is chance); by the preset shown "
        f"below, {preset}, {run.text(AUROC, ATTENTION, TEST)}. Published for {layer}: {reported(layer)}. "
        f"{scope}{before} The squared difference from the mean training frame, which takes no network, has "
        f"{run.text(AUROC, 'mean image difference', TEST)}, and the reconstruction error "
        f"{run.text(AUROC, ERROR, TEST)}. "
        + ("" if run.metric(ACTIVE, subset=ALL)["value"] else f"{COLLAPSED} ")
        + report.extent(run)
    )
    display(Markdown(text), figures.show(_published_and_ours(job.run)), report.badges("ucsd"))


def _published_and_ours(run: Run) -> Figure:
    """Published pixel AUROCs by layer, ours by the paper's rule, of untrained networks, and without attention."""
    given = _published().drop_duplicates(["source", "setting", "value"])
    points = [
        {"method": row.setting, "group": publications.SOURCES[row.source], "value": row.value}
        for row in given.itertuples()
        if row.setting in LAYERS
    ]
    for layer in LAYERS:
        control = tables.untrained_point(AUROC, layer, "liu2020_paper", dataset="ucsd")
        ours = report.ends(run.metric(AUROC, f"{layer}, liu2020_paper", TEST))
        points.append({"method": layer, "group": "ours, trained"} | ours)
        points.append({"method": layer, "group": "ours, never trained"} | control)
    simple = (ERROR, "mean image difference")
    points += [run.metric(AUROC, name, TEST) | {"group": "without attention"} for name in simple]
    table = pd.DataFrame(points).dropna(subset="value")
    return figures.intervals(table, label="pixel AUROC, ours by the paper's rule", chance=0.5)


def at_hand(run: Run) -> Markdown:
    """What of the official release is at hand."""
    card = run.card
    if card.kind == "sample":
        lines = ["**Generated scenes, not UCSD Ped1: no number on this page compares with a published one.**"]
    else:
        counts = [
            f"{there:,} of {number:,} {name}"
            if there <= number
            else f"{there:,} {name}, where the release has {number:,}"
            for name, number in card.official.items()
            for there in [card.counts.get(name, 0)]
        ]
        lines = [f"At hand, of the official release: {'; '.join(counts)}."]
    return Markdown("\n\n".join(lines + ([f"About these data: {card.note}"] if card.note else [])))


def learned(run: Run) -> None:
    """Show the KL of each latent, and what the training came to; a notice where the maps can explain little."""
    made, budget = run.record["training"], run.record["budget"]
    active, recipe = run.metric(ACTIVE, subset=ALL)["value"], run.record["recipe"]
    spread = [
        run.text("standard deviation of a pixel over the frames", name, ALL, ".4f")
        for name in ("frames", "reconstructions")
    ]
    if budget["used"] <= recipe["kl_warmup_epochs"]:
        chapters.notice(
            f"The weight of the KL term rises for {recipe['kl_warmup_epochs']} epochs, and this run ended before: its "
            "losses are not those of the ELBO.",
            "warning",
        )
    if active == 0:
        chapters.notice(
            "No latent is active: the posterior has collapsed. What the latents cost to encode, they spend without "
            "telling the frames apart, and attention explains latents that say next to nothing. The maps below show "
            "what the network's layers hold, not what the VAE has understood. The usual remedy is to let the weight of "
            "the KL term rise slowly (recipe `report1_warmup`); whether it was one here, the column *active* in the "
            "table of all runs says.",
            "warning",
        )
    mean_frame, ours = run.metric("reconstruction per image, mean frame")["value"], run.metric(RECONSTRUCTION)["value"]
    how = "better" if ours < mean_frame else "worse"
    text = Markdown(
        f"The model has {run.text(PARAMETERS, form=',.0f')} parameters. After {budget['used']} epochs of the "
        f"{budget['asked']} that its recipe asks for, on {made['images']:,} frames ({made['images_per_second']:,.0f} "
        f"frames/s on {run.record['weights']['device']}), a held-out frame costs "
        f"{run.text(RECONSTRUCTION, form=',.1f')} nats to reconstruct, {how} than the mean training frame alone, "
        f"which would cost {mean_frame:,.1f}, and "
        f"{run.text(KL, form='.2f')} nats to encode. {active:.0f} of its {recipe['latent_dim']} latents are active "
        f"(variance of μ over the test frames above 0.01; {run.text(ACTIVE, form='.0f')} over the held-out frames). "
        f"From frame to frame a pixel of the test clips varies by {spread[0]} of the range of grey levels (root mean "
        f"square), and one of their reconstructions by {spread[1]}."
    )
    label, index = "KL (nats per frame)", "latents, by their KL"
    display(figures.show(figures.bars(run.arrays["kl_per_latent"], label=label, index=index)), text)


def table(run: Run, layer: str, preset: str) -> None:
    """Show every map by every measure of pixels, beside untrained networks."""
    shown = [AUROC, "average precision", "AUPRO", BEST_IOU, "IoU, threshold from validation"]
    names = methods(run)
    lines = pd.DataFrame(
        {"method": names} | {title: [run.text(title, name, TEST) for name in names] for title in shown}
    )
    untrained = {title: tables.untrained_text(title, layer, preset, dataset="ucsd") for title in shown}
    if untrained[AUROC] != tables.NOT_MEASURED:
        lines.loc[len(lines)] = {"method": "never trained"} | untrained
    n, share = run.metric(AUROC, ATTENTION, TEST)["n"], run.text("anomalous pixels", form=".2%")
    report.show(lines, f"Pixels of {n} test clips, {share} of them anomalous; 95 % intervals over clips.")


def moving(run: Run) -> None:
    """Show every map by what moves, and by whole frames."""
    columns = {
        "anomalous above other moving pixels": (MOVING, TEST),
        "moving above still pixels, normal frames": (PEDESTRIANS, TEST),
        "anomalous above normal frames, by the map's mean": (IMAGE_AUROC, "mean"),
        "the same by its maximum": (IMAGE_AUROC, "maximum"),
    }
    names = methods(run)
    numbers = {title: [run.text(metric, name, subset) for name in names] for title, (metric, subset) in columns.items()}
    report.show(
        pd.DataFrame({"method": names} | numbers),
        f"AUROC. {run.text('moving pixels', form='.1%')} of the pixels of the test clips move, and "
        f"{run.text('moving among anomalous pixels', form='.0%')} of the anomalous ones; of the moving ones "
        f"{run.text('anomalous among moving pixels', form='.1%')} are anomalous.",
    )


def orders(run: Run) -> Markdown:
    """What follows from the order of the numbers."""
    ours = run.metric(AUROC, ATTENTION, TEST)
    others = [name for name in methods(run)[1:] if name != "random"]
    against = {name: runs.order(run.metric(DIFFERENCE, f"{ATTENTION} − {name}", TEST), 0.0) for name in others}
    among, pedestrians = (runs.order(run.metric(metric, ATTENTION, TEST), 0.5) for metric in (MOVING, PEDESTRIANS))
    return Markdown(
        f"Over all pixels the attention map is {runs.order(ours, 0.5)} chance, {report.grouped(against)}. Among moving "
        f"pixels it is {among} chance at telling the anomalous from the others; "
        f"{run.text('moving among anomalous pixels', form='.0%')} of the anomalous pixels move. On normal frames its "
        f"ranking of moving pixels over the rest is {pedestrians} chance: {LIT[pedestrians]}"
    )


def layers(run: Run, preset: str) -> Markdown:
    """How the layers compare by a preset, in the one model of a run with all its maps."""
    each = [f"{name} {run.text(AUROC, f'{name}, {preset}', TEST, lacking='–')}" for name in LAYERS]
    pairs = []
    for one, other in combinations(LAYERS, 2):
        pair = (DIFFERENCE, f"{preset}, {one} − {other}", TEST)
        if run.text(*pair, lacking=""):
            pairs.append(f"{one} {runs.order(run.metric(*pair), 0.0)} {other} ({run.text(*pair, form='+.3f')})")
    return Markdown(
        f"This run's model by the preset {preset} at each layer: {'; '.join(each)}. Compared on the same frames: "
        f"{'; '.join(pairs)}."
    )


def layers_and_presets(run: Run) -> Image:
    """The pixel AUROC of every layer by every preset, and of the maps that need no attention."""
    maps = {name: name.split(", ") for name in run.maps}
    rows = [run.metric(AUROC, name, TEST) | {"method": at, "group": RULES[by]} for name, (at, by) in maps.items()]
    rows += [run.metric(AUROC, name, TEST) | {"group": "baseline"} for name in SIMPLE]
    return figures.show(figures.intervals(pd.DataFrame(rows), label="pixel AUROC over the test clips", chance=0.5))


def every_map(run: Run) -> None:
    """Show every layer by every preset, and the baselines, by every measure."""
    names = {name: name.split(", ") for name in sorted(run.maps, key=lambda name: name.split(", ")[::-1])}
    names |= {name: [name, "baseline"] for name in SIMPLE}
    lines = []
    for name, (layer, preset) in names.items():
        line = {"layer": layer, "rule": RULES.get(preset, preset)}
        line |= {title: run.text(title, name, TEST) for title in (AUROC, "average precision", "AUPRO", BEST_IOU)}
        line["frame AUROC (maximum)"] = run.text(IMAGE_AUROC, name, "maximum")
        line[f"{AUROC}, {LAST}"] = run.text(AUROC, name, LAST, lacking="–")
        line[f"{AUROC}, {BEST_STAGE}"] = tables.best_stage(run, name, "–")
        lines.append(line)
    report.show(
        pd.DataFrame(lines),
        "Layers × presets of the model of this run, and the baselines; 95 % intervals over clips. The last two columns "
        "are of every tenth frame: what the run is judged by, and what a choice of the checkpoint on the test masks "
        "would have given, as the second report's code chooses it.",
    )


def every_run(layer: str, preset: str) -> None:
    """Show every stored run of the chapter."""
    columns = {"active": (ACTIVE, "", ALL, ".0f"), "KL (nats)": (KL, "", "", ".2f")}
    columns |= {AUROC: (AUROC, f"{layer}, {preset}", TEST)}
    columns |= {name: (AUROC, name, TEST) for name in ("mean image difference", ERROR)}
    report.show(
        report.stored_runs("ucsd", ("recipe", "seed"), columns),
        "Every stored run of this chapter: its budget, its active latents, and the pixel AUROC of the attention map at "
        f"{layer} by {preset} and of two baselines.",
    )


def examples(
    frames: Mapping[str, figures.Images], maps: Mapping[str, np.ndarray], layer: str, preset: str, credit: str
) -> Image | Markdown:
    """Some frames under the maps of the trained and of the untrained network, at their resolution.

    Args:
        frames: By name what is drawn in grey, the frames first; the last is a map of its own, drawn as one.
        maps: Maps by name, as the step `explain` of the job gives them.
        layer: The layer shown.
        preset: The preset shown.
        credit: Whose frames these are.
    """
    if not maps:
        return figures.NOT_KEPT
    *pictures, difference = frames
    shown = {difference: frames[difference]} | figures.before_and_after(maps, layer, preset)
    titles = ["anomalous", "anomalous", "normal", "normal"]
    return figures.examples({name: frames[name] for name in pictures}, shown, titles=titles, credit=credit, grey="gray")
