"""Figures of the book: one style, colour-blind-safe colours, one colour scale for all maps that are compared."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import seaborn as sns
from IPython.display import Image, Markdown
from matplotlib.animation import Animation, ArtistAnimation
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import CenteredNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from expvae_book.runs import Run

if TYPE_CHECKING:
    from torch import Tensor

    from expvae import Attention

    Images = np.ndarray | Tensor | Sequence[np.ndarray | Tensor]
else:
    Attention = Images = Any  # a page that only draws what is stored does not wait for torch

Line = tuple[Sequence[float | int], Sequence[float]]  # where along x, and its values
SIGNED = "PuOr"  # orange is negative, purple positive; told apart with every kind of colour vision
MAPS = "cividis"  # perceptually uniform, and read alike with every kind of colour vision
COLOURS = sns.color_palette("colorblind")
LINES, MARKERS = ("-", "--", ":", "-."), "osD^vP*X<>"
STYLE = {
    **sns.axes_style("whitegrid"),
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.prop_cycle": mpl.cycler(color=COLOURS),
    "savefig.dpi": 160,
    "savefig.bbox": "tight",
    "font.size": 10,
    "axes.titlesize": 10,
    "legend.frameon": False,
}
styled = mpl.rc_context(STYLE)  # a decorator: what a function draws or saves has the book's style
pictured = mpl.rc_context(STYLE | dict.fromkeys(["axes.spines.right", "axes.spines.top"], True) | {"axes.grid": False})


@styled
def show(figure: Figure | Path) -> Image:
    """A figure, drawn just now, or a figure or animation stored by a run, as an image for the page.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    if isinstance(figure, Path):
        return Image(data=figure.read_bytes(), format=figure.suffix.removeprefix("."))
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return Image(data=buffer.getvalue(), format="png")


NOT_KEPT = Markdown("*This run keeps no pictures: those with seed 0 do, where there is something to show.*")


def kept(run: Run, name: str) -> Image | Markdown:
    """A figure or animation of a run as an image for the page, or a sentence where the run keeps no pictures."""
    try:
        return show(run.figure(name))
    except FileNotFoundError:
        return NOT_KEPT


def _panels(width: float, height: float, rows: int = 1, columns: int = 1, **options: bool) -> tuple[Figure, Any]:
    """A figure of this size in inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


@pictured
def image_rows(
    rows: Mapping[str, Images],
    *,
    maps: Sequence[str],
    titles: Sequence[str],
    label: str,
    credit: str,
    grey: str = "gray_r",
    signed: bool = False,
) -> Figure:
    """A grid of small images: one row for each kind, one column for each image.

    Args:
        rows: Name of the row -> images [N, Y, X] in [0, 1], signed maps in [-1, 1]; NaN is drawn as nothing.
        maps: Names of the rows that are maps; they share one colour scale from 0 to 1. The others are drawn in grey.
        titles: One title per column.
        label: Label of the maps' colour bar.
        credit: Whose images these are; printed under the figure.
        grey: Colour map of the rows that are no maps: "gray_r" for ink on paper, "gray" for photographs.
        signed: Whether the maps have both signs: their scale is from -1 to 1 then.
    """
    figure, axes = _panels(1.0 * len(titles) + 2.4, 1.02 * len(rows) + 0.6, len(rows), len(titles), squeeze=False)
    scale, colours = (Normalize(-1, 1), SIGNED) if signed else (Normalize(0, 1), MAPS)
    for axes_row, (name, image_NYX) in zip(axes, rows.items(), strict=True):
        axes_row[0].set_ylabel(name, rotation=0, ha="right", va="center")
        cmap, norm = (colours, scale) if name in maps else (grey, Normalize(0, 1))
        for axis, image_YX in zip(axes_row, image_NYX, strict=True):
            axis.imshow(np.asarray(image_YX), cmap=cmap, norm=norm, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title)
    if maps:
        drawn = ScalarMappable(scale, colours)
        beyond = not signed and any(np.nanmax(np.asarray(image_YX)) > 1 for name in maps for image_YX in rows[name])
        extend = "max" if beyond else "neither"
        bar = figure.colorbar(drawn, ax=axes, label=label, extend=extend, fraction=0.03, pad=0.02)
        bar.outline.set_visible(False)
    figure.supxlabel(credit, fontsize=7, color="0.35")
    return figure


def before_and_after(
    maps: Mapping[str, np.ndarray], layer: str, preset: str, name: str = "attention"
) -> dict[str, np.ndarray]:
    """The maps of the examples that a job keeps, at a layer by a preset, of the trained and the untrained network."""
    return {f"{name},\n{state}": maps[f"{state}/{layer}, {preset}"] for state in ("trained", "untrained")}


def examples(
    pictures: Mapping[str, Images], maps: Mapping[str, Images], *, titles: Sequence[str], credit: str, **style: str
) -> Image:
    """Some images above maps of them, each row of maps in units of its own 99th percentile; see `image_rows`."""
    scaled = {name: np.asarray(map_BHW, dtype=np.float32) for name, map_BHW in maps.items()}
    scaled = {name: map_BHW / max(float(np.quantile(map_BHW, 0.99)), 1e-12) for name, map_BHW in scaled.items()}
    options = {"titles": titles, "label": "map / its row's 99th percentile", "credit": credit, **style}
    return show(image_rows({**pictures, **scaled}, maps=list(scaled), **options))


@pictured
def clip_animation(
    frame_NYX: Images,
    mask_NYX: Images,
    map_NYX: Images,
    *,
    titles: Sequence[str],
    label: str,
    credit: str,
) -> Animation:
    """The frames of a clip and their maps side by side, both with the outline of the mask.

    Args:
        frame_NYX: Frames in [0, 1].
        mask_NYX: A mask per frame, above 0 where anomalous.
        map_NYX: Maps, drawn on one colour scale from 0 to 1.
        titles: One title per frame.
        label: Label of the maps' colour bar.
        credit: Whose frames these are; printed under the figure.
    """
    figure, axes = _panels(5.6, 2.9, 1, 2)
    figure.set_dpi(75)
    FigureCanvasAgg(figure)  # without it the first frame is saved before it has a layout
    norm = Normalize(0, 1)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[["right", "top"]].set_visible(False)
    bar = figure.colorbar(ScalarMappable(norm, MAPS), ax=axes[1], label=label, extend="max", fraction=0.045, pad=0.03)
    bar.outline.set_visible(False)
    figure.supxlabel(credit, fontsize=7, color="0.35")
    moments = []
    for frame_YX, mask_YX, map_YX, title in zip(frame_NYX, mask_NYX, map_NYX, titles, strict=True):
        drawn = [
            axes[0].imshow(np.asarray(frame_YX), cmap="gray", norm=norm),
            axes[1].imshow(np.asarray(map_YX), cmap=MAPS, norm=norm),
        ]
        if mask_YX.any():
            drawn += [
                axis.contour(np.asarray(mask_YX), levels=[0.5], colors=[COLOURS[4]], linewidths=1.4) for axis in axes
            ]
        drawn.append(axes[0].text(0, 1.03, title, transform=axes[0].transAxes))
        moments.append(drawn)
    return ArtistAnimation(figure, moments)


@pictured
def attention_steps(
    image_YX: np.ndarray, paper: Attention, code: Attention, latents: Sequence[int], credit: str
) -> Figure:
    """How the attention maps of one image come about.

    Above: the image, the signed linear map of the first latent, its positive part, the paper's map and that of the
    authors' code. Below: the paper's maps of each latent, on one colour scale.

    Args:
        image_YX: The image in [0, 1].
        paper: Its attention by the preset liu2020_paper, for all latents.
        code: Its attention by the preset liu2020_code.
        latents: The five latents whose maps are shown.
        credit: Whose image it is; printed under the figure.
    """
    first_HW = paper.linear_BIHW[0, latents[0]].cpu().numpy()
    above = {
        "image": (image_YX, "intensity"),
        f"latent {latents[0]}, signed": (first_HW, "Σ α A"),
        f"latent {latents[0]}, its positive part": (first_HW.clip(min=0), "ReLU(Σ α A)"),
        "paper's map": (paper.map_BYX[0].cpu().numpy(), "$M$"),
        "authors' code": (code.map_BYX[0].cpu().numpy(), "|Σ α A|"),
    }
    below = {f"latent {latent}": (paper.map_BIYX[0, latent].cpu().numpy(), "") for latent in latents}
    highest = max(map_YX.max() for map_YX, _ in below.values())
    figure, axes = _panels(2.1 * len(latents), 4.6, 2, len(latents))
    for axis, (title, (image, label)) in zip(axes.flat, [*above.items(), *below.items()], strict=True):
        axis.set(title=title, xticks=[], yticks=[])
        if title == "image":
            drawn = axis.imshow(image, cmap="gray_r", vmin=0, vmax=1)
        elif image.min() < 0:
            drawn = axis.imshow(image, cmap=SIGNED, norm=CenteredNorm())
        else:
            drawn = axis.imshow(image, cmap=MAPS, vmin=0, vmax=highest if title in below else None)
        if title in above:
            ticks = MaxNLocator(3)
            figure.colorbar(drawn, ax=axis, ticks=ticks, label=label, orientation="horizontal", fraction=0.06, pad=0.03)
    figure.colorbar(drawn, ax=axes[1], label="map $M_i$, one scale", fraction=0.02, pad=0.01)
    figure.supxlabel(credit, fontsize=7, color="0.35")
    return figure


@styled
def intervals(table: pd.DataFrame, *, label: str, chance: float | None = None) -> Figure:
    """Point estimates with their intervals: one line per method, one colour per group.

    Args:
        table: Columns method, group, value, low and high.
        label: What the values are.
        chance: Value that is reached without knowing anything; drawn as a dashed line.
    """
    table = table.reset_index(drop=True)
    methods, groups = (list(dict.fromkeys(table[name])) for name in ("method", "group"))
    figure, axis = _panels(7.0, 0.18 * len(methods) * max(len(groups), 2) + 1.1)
    if chance is not None:
        axis.axvline(chance, color="0.4", linestyle="--", linewidth=1, label="chance")
    step = 0.6 / max(len(groups) - 1, 1)
    place = table.groupby("method", sort=False).cumcount()  # centred on the method, whichever groups it has
    middle = table.groupby("method", sort=False)["group"].transform("size") / 2 - 0.5
    at = table["method"].map(methods.index) + step * (place - middle)
    for group, marker, colour in zip(groups, cycle(MARKERS), cycle(COLOURS), strict=False):
        part = table[table["group"] == group]
        axis.errorbar(
            part["value"],
            at[part.index],
            xerr=[part["value"] - part["low"], part["high"] - part["value"]],
            fmt=marker,
            markersize=4,
            capsize=2,
            color=colour,
            label=group,
        )
    axis.set(yticks=range(len(methods)), yticklabels=methods, xlabel=label)
    axis.invert_yaxis()
    axis.grid(axis="y", visible=False)
    if len(groups) > 1 or chance is not None:
        across = 90 // (max(map(len, map(str, groups))) + 6)  # a longer line would widen the figure
        figure.legend(loc="outside upper right", ncols=max(1, min(4, len(groups) + 1, across)))
    return figure


@styled
def bars(values: Sequence[float] | np.ndarray, *, label: str, index: str) -> Figure:
    """Values in descending order, as bars.

    Args:
        values: One value each.
        label: What the values are.
        index: What is counted along the axis.
    """
    figure, axis = _panels(7.0, 2.2)
    axis.bar(range(1, len(values) + 1), sorted(values, reverse=True))
    axis.set(xlabel=index, ylabel=label)
    axis.grid(axis="x", visible=False)
    return figure


@styled
def histograms(samples: Mapping[str, np.ndarray], *, label: str, mark: float) -> Figure:
    """Histograms of several samples on one axis, as shares of each.

    Args:
        samples: Name -> values in [0, 1].
        label: What the values are.
        mark: Value at which a dashed line is drawn.
    """
    figure, axis = _panels(7.0, 2.8)
    for (name, value_N), linestyle in zip(samples.items(), LINES, strict=False):
        axis.hist(
            value_N,
            bins=np.linspace(0, 1, 41),
            weights=np.full(len(value_N), 1 / len(value_N)),
            histtype="step",
            linewidth=1.6,
            linestyle=linestyle,
            label=name,
        )
    axis.axvline(mark, color="0.4", linestyle="--", linewidth=1)
    axis.set(xlabel=label, ylabel="share of images")
    axis.legend(loc="upper left")
    return figure


@styled
def power_curves(lines: Mapping[str, pd.DataFrame], *, target: float, marks: Mapping[str, int]) -> Figure:
    """The power of a comparison over the number of seeds: a line for each difference, with its band.

    Args:
        lines: Name of the difference -> columns seeds, power, low, high and simulated, which is drawn as points.
        target: The power that is asked for; drawn as a dashed line.
        marks: Name of a design -> its number of seeds; drawn as dotted lines.
    """
    figure, axis = _panels(7.0, 3.6)
    axis.axhline(target, color="0.4", linestyle="--", linewidth=1, label=f"{target:.0%}")
    for name, seeds in marks.items():
        axis.axvline(seeds, color="0.4", linestyle=":", linewidth=1)
        axis.annotate(name, (seeds, 1.03), (0, 2), textcoords="offset points", rotation=45, va="bottom", fontsize=8)
    for (name, line), colour, linestyle, marker in zip(lines.items(), COLOURS, LINES, MARKERS, strict=False):
        axis.fill_between(line["seeds"], line["low"], line["high"], color=colour, alpha=0.2, linewidth=0)
        axis.plot(line["seeds"], line["power"], color=colour, linestyle=linestyle, label=name)
        axis.plot(line["seeds"], line["simulated"], marker, color=colour, markersize=3, label=f"{name}, simulated")
    arms = "seeds per arm (each of the two models compared)"
    axis.set(xlabel=arms, ylabel="chance to find the difference (power)", ylim=(0, 1.03))
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.legend(title="difference in the metric", loc="lower right", fontsize=8)
    return figure


@styled
def curves(panels: Mapping[str, Mapping[str, Line | list[Line]]], *, x: str, levels: bool = False) -> Figure:
    """Lines over a common axis, a panel for each quantity.

    Args:
        panels: Name of the quantity -> name of the line -> the line, or several that look alike.
        x: What runs along x.
        levels: Whether the panels have one scale, and each line's first value is drawn across as well.
    """
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    rows = -(-len(panels) // 2)
    figure, axes = _panels(7.4, 2.1 * rows + 0.6, rows, 2, squeeze=False, sharex=True, sharey=levels)
    axes, handles = list(axes.flat), {}
    for axis, (title, named) in zip(axes, panels.items(), strict=False):
        lines = [(name, *line) for name, of in named.items() for line in (of if isinstance(of, list) else [of])]
        for name, along, values in lines:
            index = names.index(name)
            (handles[name],) = axis.plot(
                along,
                values,
                color=COLOURS[index % len(COLOURS)],
                linestyle=LINES[index % len(LINES)],
                marker="o" if len(values) < 20 else None,
                markersize=3,
                linewidth=1.3,
                label=name,
            )
            if levels:
                axis.axhline(values[0], color=handles[name].get_color(), linestyle=":", linewidth=1)
        axis.set(title=title)
        if all(isinstance(value, int) for _, along, _ in lines for value in along):
            axis.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
        if not levels:
            # The first of a training are several times as high and would flatten the rest.
            settled = np.concatenate([values[len(values) // 10 :] for *_, values in lines])
            axis.set(ylim=(settled.min() - (margin := 0.06 * np.ptp(settled) or 1), settled.max() + margin))
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(panels) - 2) : len(panels)]:
        axis.set_xlabel(x)
        axis.tick_params(labelbottom=True)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=2, fontsize=8)
    return figure


def training_curves(losses: Mapping[str, Sequence[float]]) -> Figure:
    """Reconstruction loss and KL divergence over epochs, on training and held-out images.

    Args:
        losses: reconstruction, kl, validation_reconstruction and validation_kl, one value per epoch, in nats per image.
    """
    epochs = range(1, len(losses["kl"]) + 1)
    titles = {"reconstruction": "reconstruction loss (nats per image)", "kl": "KL divergence (nats per image)"}
    panels = {
        title: {"training": (epochs, losses[name]), "held out": (epochs, losses[f"validation_{name}"])}
        for name, title in titles.items()
    }
    return curves(panels, x="epoch")
