"""What the first page says, draws and tabulates: every claim, and what the stored runs say of it."""

from statistics import mean

import pandas as pd
from IPython.display import Image, Markdown, display
from matplotlib.figure import Figure

from expvae_book import claims, figures, judging, power, report, runs
from expvae_book.pages import forensics, seeds

HUES = dict(zip(judging.DIRECTIONS, (0, 4, 3, 7), strict=True))  # places in the palette, which the colour-blind tell
SHAPES = {"full": "o", "reduced": "^", "none": "x"}
LOOKS = {
    "published": {"fmt": "|", "color": "0.25", "markersize": 8},
    "control": {"fmt": "o", "color": "0.55", "markersize": 5, "markerfacecolor": "none"},
}
HEIGHTS = {"published": -0.25, "ours": 0.0, "control": 0.25}
MAPS = {"MNIST": "MNIST maps", "UCSD Ped1": "UCSD AUROC", "MVTec AD": "MVTec AUROC and IoU"}


def verdicts() -> pd.DataFrame:
    """The verdict on every claim, with the strength in one word."""
    table = claims.verdicts(runs.find())
    return table.assign(word=table["strength"].str.partition(":")[0])


def in_short() -> None:
    """Show four sentences to repeat."""
    table = verdicts()
    claimed, counts = table.set_index("id"), table["direction"].value_counts()
    told = ", ".join(f"{counts.get(direction, 0)} {direction}" for direction in judging.DIRECTIONS)
    full = (table["word"] == "full").sum()
    lines = [f"Of {len(table)} published claims, by our runs: {told}. At full strength: {full or 'none'}."]
    seen = []
    for name, claim in MAPS.items():
        points, lacks = claimed["points"][claim], claimed["strength"][claim].partition(": ")[2]
        ours, control = ([point.value for point in points if point.who == who] for who in ("ours", "control"))
        if control:  # an IoU, which has none, stands behind
            scores = f"{name} {mean(ours[: len(control)]):.2f} and {mean(control):.2f}"
            seen.append(scores + f" ({lacks})" * bool(lacks))
    if seen:
        lines.append(
            "The paper's maps of trained networks, and of the same ones before their first step, have a mean pixel "
            "AUROC (the chance that an anomalous pixel is brighter than a normal one) of "
            f"{'; '.join(seen)} ([more](sanity.md))."
        )
    least, spread = min(seeds.paper_differences().values()), next(iter(seeds.spreads().values()))
    lines.append(
        f"The paper's gain in disentanglement, some {least:.2f} at the least, is about what chance does to single "
        f"runs: to see it takes about {power.seeds_needed(least, spread.sd)} seeds of each model "
        "([more](disentanglement.md))."
    )
    found = forensics.slips()
    lines.append(
        "Published code departs from the texts beside it, or from the paper, by "
        f"{(found['commit'] != '').sum()} slips or choices, each with its file and commit ([more](forensics.md))."
    )
    display(Markdown("**In short.**\n\n" + "\n".join(f"{place}. {line}" for place, line in enumerate(lines, 1))))


def drawn() -> Image:
    """Every claim: what was published, what our runs have with intervals, and the control."""
    return figures.show(_figure(verdicts()))


@figures.styled
def _figure(table: pd.DataFrame) -> Figure:
    figure = Figure(figsize=(7.0, 0.36 * len(table) + 1.2), layout="constrained")
    axis = figure.subplots()
    for row, claim in enumerate(table.itertuples()):
        colour = figures.COLOURS[HUES[claim.direction]]
        for point in claim.points:
            look = LOOKS.get(point.who, {"fmt": SHAPES[claim.word], "color": colour, "markersize": 5})
            ends = [[point.value - point.low], [point.high - point.value]]
            axis.errorbar(point.value, row + HEIGHTS[point.who], xerr=ends, elinewidth=1, **look)
        if not claim.points:
            axis.text(0.5, row, "no measure between 0 and 1", ha="center", va="center", fontsize=8, color="0.4")
    axis.set(xlim=(0, 1), yticks=range(len(table)), yticklabels=table["id"], xlabel="AUROC, IoU, share or metric")
    axis.invert_yaxis()
    looks = {name: {"fmt": "s", "color": figures.COLOURS[place]} for name, place in HUES.items()}
    looks |= {f"ours, {word} strength": {"fmt": shape, "color": "0.25"} for word, shape in SHAPES.items()} | LOOKS
    handles = [axis.errorbar([], [], label=name, **look) for name, look in looks.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def table() -> None:
    """Show the claims in short under their names in the figure, with badges and the pages that have the evidence."""
    lines = verdicts()
    shown = pd.DataFrame(
        {
            "Claim": lines["id"] + ":\n" + lines["claim"],
            "Verdict": lines["direction"] + " (" + lines["word"] + ")",
            "Page": lines["chapter"],
        }
    )
    report.show(
        shown,
        "Judged by code from the stored runs. A verdict leads to its evidence, its criterion and the command that "
        "would decide it.",
        pages="Page",
    )
