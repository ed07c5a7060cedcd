"""What the chapter on VAEs of one's own draws, tabulates and says of its run."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from IPython.display import Markdown, display

from expvae_book import figures, report
from expvae_book.chapters import Job
from expvae_book.data.card import DataCard
from expvae_book.names import (
    ACTIVE,
    AUROC,
    DIFFERENCE,
    IMAGE_AUROC,
    KEPT_SHARE,
    KL,
    MASS,
    OFF_CAPTUM,
    OWN,
    PACKAGED,
    PARAMETERS,
    RECONSTRUCTION,
)
from expvae_book.rows import order
from expvae_book.runs import Run

BOTH = (OWN, PACKAGED)
SHOWN = {OWN: "features.2", PACKAGED: "encode.encode_2"}

ABOUT = {
    "alpha_BIC": "weight of each channel for each latent",
    "values_BCHW": "what the layer puts out",
    "linear_BIHW": "Σ α A, signed, at the layer's resolution",
    "map_BIHW": "its positive part",
    "response_BI": "the mean of that over the places",
    "map_BIYX": "enlarged to the image",
    "map_BYX": "and averaged over the latents",
}


def in_short(job: Job) -> None:
    """Show the findings in a few sentences, and the maps of the VAE that the chapter writes."""
    if job.run is None:
        display(report.NOT_YET)
        return
    run = job.run
    text = (
        f"**In short.** It does: at every layer of both networks the maps are captum's to within "
        f"{run.rows(OFF_CAPTUM)['value'].max():.0e} of the greatest value. But at a convolution that instance "
        f"normalisation follows, no more than {_inner(run):.0e} of the gradient is left in the map's weights, which is "
        f"rounding; the block behind the normalisation keeps {run.text(KEPT_SHARE, PACKAGED, SHOWN[PACKAGED], '.2g')}. "
        f"{report.extent(run)} Below, the VAE that this chapter writes, at the layer `{SHOWN[OWN]}`."
    )
    display(Markdown(text), figures.kept(run, "own"))


def learned(run: Run) -> None:
    """Show what both models have learned, below which run they are of."""
    display(report.caption(run))
    columns = {
        "parameters": (PARAMETERS, ",.0f"),
        "reconstruction (nats per image)": (RECONSTRUCTION, ".1f"),
        "KL (nats per image)": (KL, ".1f"),
        f"active latents of {run.record['recipe']['latent_dim']}": (ACTIVE, ".0f"),
    }
    numbers = {title: [run.text(metric, name, form=form) for name in BOTH] for title, (metric, form) in columns.items()}
    seconds = [f"{run.record['seconds'][f'training, {name}']:.0f}" for name in BOTH]
    versions, n = run.record["packages"], run.metric(ACTIVE, OWN)["n"]
    report.show(
        pd.DataFrame({"model": BOTH} | numbers | {"training (s)": seconds}),
        f"Both VAEs after {run.record['budget']['used']} epochs on {run.record['images']:,} images of the digit "
        f"{run.parameters['digit']}; losses and latents on {n:,} held-out ones. MONAI {versions['monai']}, captum "
        f"{versions['captum']}.",
    )


def masses(run: Run) -> Markdown:
    """How bright the maps are on the digit that is known, beside the others."""
    lines = []
    for name in BOTH:
        change = run.metric(MASS, name)["value"] - 1
        lines.append(f"{abs(change):.0%} {'less' if change < 0 else 'more'} ({name})")
    return Markdown(
        "The median brightness of maps (the mean of a map) on test images of the known digit, beside that on other "
        f"digits: {' and '.join(lines)}."
    )


def layers(run: Run) -> None:
    """Show both checks at every layer."""
    lines = [
        {
            "model": name,
            "layer": layer,
            "C×H×W": "×".join(map(str, size)),
            "share kept, ρ": run.text(KEPT_SHARE, name, layer, ".2g"),
            "1/√(HW)": f"{_by_chance(run, name, layer):.2g}",
            "difference from captum": run.text(OFF_CAPTUM, name, layer, ".0e"),
        }
        for name in BOTH
        for layer, size in run.record["sizes"][name].items()
    ]
    n = run.metric(KEPT_SHARE, OWN, "features.0")["n"]
    report.show(
        pd.DataFrame(lines),
        "The share of the gradient that α keeps, beside that of independent values, and the greatest difference of ΣαA "
        f"from captum's, relative to captum's greatest value; {n} images, all {run.record['recipe']['latent_dim']} "
        "latents.",
    )


def rounding(run: Run) -> Markdown:
    """What is left at MONAI's convolutions."""
    return Markdown(
        f"At MONAI's convolutions no more than {_inner(run):.0e} of the gradient is left in α: float32 rounding."
    )


def shown(run: Run) -> Markdown:
    """What the layers keep whose maps are shown."""
    lines = []
    for name, layer in SHOWN.items():
        ratio = run.metric(KEPT_SHARE, name, layer)["value"] / _by_chance(run, name, layer)
        lines.append(f"- *{name}*, `{layer}`: {ratio:.1f} times what independent values would keep.")
    return Markdown("At the layers whose maps are shown above, the mean over space keeps\n\n" + "\n".join(lines))


def folders(root: str) -> None:
    """Show what lies below a folder: every folder with files, how many they are, and the first."""
    files = sorted(path.relative_to(root) for path in Path(root).rglob("*") if path.is_file())
    count = Counter(path.parent for path in files)
    first = {path.parent: path.name for path in reversed(files)}
    lines = [{"folder": folder.as_posix(), "files": count[folder], "the first": first[folder]} for folder in count]
    report.show(pd.DataFrame(lines), "A generated part in the layout of a category.")


def beside(card: DataCard, rows: Sequence[Mapping[str, Any]]) -> None:
    """Show how well maps of a part find its defects, and how the last compares with the others.

    Args:
        card: What the part is.
        rows: As `expvae_book.jobs.reuse.scores` gives them.
    """
    found = {(row["metric"], row["subset"], row["method"]): row for row in rows}
    *others, last = (name for metric, _, name in found if metric == AUROC)
    columns = {AUROC: (AUROC, ""), f"{IMAGE_AUROC}, by the map's maximum": (IMAGE_AUROC, "maximum")}
    lines = [
        {"map": name} | {title: _text(found[*of, name]) for title, of in columns.items()} for name in (*others, last)
    ]
    counts = card.counts
    report.show(
        pd.DataFrame(lines),
        f"A generated part: {counts['train']} images to train on, of which a fifth is held out, and to test "
        f"{counts['test good']} normal and {counts['test defective']} defective ones; 95 % intervals over images.",
    )
    orders = {other: order(found[DIFFERENCE, "", f"{last} − {other}"], 0.0) for other in others}
    display(Markdown(f"By the pixel AUROC of these images, *{last}* is {report.grouped(orders)}."))


def holds(found: Any) -> None:
    """Show what an Attention holds."""
    shapes = [" × ".join(map(str, getattr(found, name).shape)) for name in ABOUT]
    table = pd.DataFrame({"attribute": list(ABOUT), "shape": shapes, "what it is": list(ABOUT.values())})
    report.show(table, "What an Attention holds.")


def answers(mistakes: Mapping[str, Callable[[], Any]]) -> None:
    """Make mistakes, and show what the library says of each."""
    said = []
    for mistake in mistakes.values():
        try:
            mistake()
        except (TypeError, ValueError) as error:
            said.append(f"{type(error).__name__}: {error}")
    report.show(pd.DataFrame({"mistake": list(mistakes), "answer": said}), "What the library says.")


def _text(row: Mapping[str, Any]) -> str:
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def _by_chance(run: Run, name: str, layer: str) -> float:
    _, h, w = run.record["sizes"][name][layer]
    return (h * w) ** -0.5


def _inner(run: Run) -> float:
    return max(
        run.metric(KEPT_SHARE, PACKAGED, layer)["value"]
        for layer in run.record["sizes"][PACKAGED]
        if layer.endswith(".conv")
    )
