"""What the chapter on the method draws and says of its run."""

import pandas as pd
from IPython.display import Markdown, display

from expvae_book import figures, report
from expvae_book.chapters import Job
from expvae_book.names import AUROC, BY_BATCH, CANCELLED
from expvae_book.runs import Run


def in_short(job: Job) -> None:
    """Show what the method is and does in a few sentences, and how the maps of one image come about."""
    if (run := job.run) is None:
        display(report.NOT_YET)
        return
    said = (
        "**In short.** A map is made of what a layer puts out, each channel weighed by the gradient of a latent. The "
        "paper keeps the positive part of each latent's map and takes the mean over latents. The authors' code adds "
        f"latents up first: in the image below **{run.text(CANCELLED, form='.0%')}** of their maps cancels, where "
        f"independent maps would lose **{_independent(run)}**. And it divides the gradient by its size over the batch: "
        "between batches of different sizes the [pixel AUROC](method.md#how-maps-are-measured) of the same "
        f"model on the same images varies by **{_spread(run)[BY_BATCH]:.4f}**. {report.extent(run)}"
    )
    panels = (
        "Above, from left to right, on a scale each: the image; $\\sum_c \\alpha_c A_c$ for latent "
        f"{run.record['strongest'][0]}, whose KL divergence is the largest for this image; its positive part; the mean "
        f"of all {run.record['recipe']['latent_dim']} maps $M_i$, enlarged; and the map of the authors' code. Below, "
        "on one scale: $M_i$ of the five latents with the largest KL divergence."
    )
    display(Markdown(said), figures.kept(run, "steps"), Markdown(panels))


def _independent(run: Run) -> str:
    """What share independent maps of equal size would lose when they are added."""
    return f"{1 - run.record['recipe']['latent_dim'] ** -0.5:.0%}"


def _spread(run: Run) -> pd.Series:
    """By normaliser, the greatest pixel AUROC of all numbers of images in a batch, less the least."""
    return run.rows(AUROC).groupby("method", sort=False)["value"].agg(lambda value: value.max() - value.min())


def cancelled(run: Run) -> Markdown:
    """How much of the latents' maps cancels."""
    return Markdown(
        f"For this image {run.text(CANCELLED, form='.0%')} of the latents' signed maps "
        "$L_i=\\sum_c\\alpha_{ic}A_c$ cancels when they are added, as the authors' code does "
        "($1 - \\sum|\\sum_i L_i| / \\sum_i\\sum|L_i|$, sums without index over pixels); independent maps of equal "
        f"size would lose about {_independent(run)} ($1-1/\\sqrt{{D}}$)."
    )


def batches(run: Run) -> None:
    """Show the pixel AUROC by the number of images in a batch, and how much it varies."""
    rows = run.rows(AUROC).rename(columns={"method": "group", "subset": "method"})
    label = "pixel AUROC, inlier and outlier digits pooled"
    figure = figures.intervals(rows.assign(method="batch size " + rows["method"]), label=label)
    varies = ", ".join(f"{value:.4f} ({name})" for name, value in _spread(run).items())
    size = str(run.record["recipe"]["batch_size"])
    at_size = run.rows(AUROC).query("subset == @size").set_index("method")["value"]
    values = ", ".join(f"{value:.4f} ({name})" for name, value in at_size.items())
    said = (
        f"Over these batch sizes the AUROC of {rows['n'].iloc[0]:,.0f} images varies, greatest less least, by "
        f"{varies}. All points use the same images, so points may really differ although their intervals overlap. "
        f"{{doc}}`ablations` looks at the recipe's batch size alone, {size}, which has {values} here."
    )
    display(figures.show(figure), Markdown(said))
