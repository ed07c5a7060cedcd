"""What the chapter on disentanglement draws, tabulates and says of its runs."""

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np
import pandas as pd
from IPython.display import HTML, Image, Markdown, display
from matplotlib.figure import Figure

from expvae_book import chapters, explorers, figures, judging, names, publications, report
from expvae_book.chapters import Job
from expvae_book.data.catalogue import source
from expvae_book.names import COLLAPSED, EQUALISED, METRIC, OVERLAP, PAIRS, PUBLISHED, REFERENCE, SPATIAL
from expvae_book.pages import seeds
from expvae_book.report import cells
from expvae_book.runs import Run, order

Line = tuple[list[int] | list[float], list[float]]  # where along x, and the values there
Number = tuple[str, ...]  # metric, method and subset of a number, and how it is written

RULES = list(COLLAPSED)
SCORE = (METRIC, REFERENCE, RULES[0])
COST = ("reconstruction per image", "", "")
CORRELATION = ("total correlation", "", "")
RESULTS: dict[str, Number] = {
    f"{METRIC} ({REFERENCE})": SCORE,
    "MIG": ("MIG",),
    "DCI disentanglement": ("DCI disentanglement",),
    "completeness": ("DCI completeness",),
    "informativeness": ("DCI informativeness",),
    "Reconstruction, held out (nats)": (*COST, ".2f"),
    "KL (nats)": ("KL per image", "", "", ".2f"),
    "Total correlation (nats)": (*CORRELATION, ".2f"),
    "Latents active (by variance)": ("active units", "", "", ".0f"),
    "Latents in the metric (by SD)": ("latents that count", REFERENCE, RULES[0], ".0f"),
}
SHOWN: dict[str, Number] = {
    METRIC: SCORE,
    "Reconstruction (nats)": (*COST, ".2f"),
    "Total correlation (nats)": (*CORRELATION, ".2f"),
    f"AD ratio at conv4, {PAIRS[0]}": (OVERLAP, "conv4", PAIRS[0]),
}
CHANGES = SHOWN | {f"AD ratio at conv4, {PAIRS[1]}": (OVERLAP, "conv4", PAIRS[1])}
LOGGED = {
    "reconstruction": "reconstruction (nats)",
    "kl": "KL (nats)",
    "total_correlation": "TC, discriminator's estimate (nats)",
    "attention": "L_AD",
}
SCHEDULED = {METRIC: f"{METRIC}, coarse lattice", "total correlation": "TC by samples, coarse lattice (nats)"}


def title(run: Run) -> str:
    """A model in words, with its seed."""
    return f"{names.title(run.parameters)}, seed {run.parameters['seed']}"


def stored(jobs: Sequence[Job]) -> list[Run]:
    """The runs of the jobs that have one."""
    return [job.run for job in jobs if job.run is not None]


def in_short(jobs: Sequence[Job]) -> None:
    """Show the findings in a few sentences, the verdicts, and the figure that says most."""
    found = stored(jobs)
    if not found:
        display(report.NOT_YET)
        return
    changes, paper = differences(found).to_dict("records"), seeds.paper_differences().values()
    effects = [f"**{line[METRIC]}** at γ {line['γ']} and λ {line['λ']}" for line in changes]
    costs = [line["Reconstruction (nats)"] for line in changes]
    (spread, *_, of_plain, _), (most, fewest) = seeds.spreads().values(), seeds.needed()
    count = len({run.parameters["seed"] for run in found})
    below, above, cases = compared(found, SPATIAL, OVERLAP, PAIRS[0])
    less, more, equal = compared(found, SPATIAL, EQUALISED, PAIRS[0])
    card, budget = found[0].card, found[0].record["budget"]
    text = (
        "**In short.** What the attention loss changes in the FactorVAE metric, beside FactorVAE of the same γ and "
        f"seed: {', '.join(effects) or 'no two of these models tell'}; in the reconstruction, in nats per image: "
        f"{', '.join(costs) or 'likewise'}. By the paper's figure, read to ±{seeds.reading_error():.3f}, it raises the "
        f"metric by {min(paper):.3f} to {max(paper):.3f}. Published runs that differ by chance alone spread by "
        f"{spread.sd:.3f} (SD, AD-FactorVAE) and {of_plain.sd:.3f} (FactorVAE): at the former, "
        f"{most} to {fewest} seeds would find the paper's differences, and these models have {count}. Maps of active "
        f"latents overlap less with the loss in {below} of {cases} cases, each a model at a layer, and more in {above};"
        f" maps that were brought to the same sum, less in {less} of {equal} and more in {more}. Only the latter says "
        f"whether they lie apart. Data: {source(card.name).title}, {card.mark or 'complete'}; budget: "
        f"{budget['used']:,} of {budget['asked']:,} steps."
    )
    labels = {"x": "reconstruction loss (nats per image; ours on held-out images)", "y": "FactorVAE metric"}
    figure = figures.show(tradeoff(points(found), **labels))
    display(Markdown(text), report.badges("disentanglement"), figure)  # its caption follows


def notices(jobs: Sequence[Job]) -> Markdown:
    """What the models are not: all that were asked for, trained on the release, or trained to the end."""
    found = stored(jobs)
    if len(found) < len(jobs):
        said = f"{len(jobs) - len(found)} of the {len(jobs)} models asked for have no stored run."
        chapters.notice(said, "warning")
    if any(run.card.generated for run in found):
        chapters.notice(found[0].card.note)
    budgets = [run.record["budget"] for run in found if run.record["budget"]["used"] < run.record["budget"]["asked"]]
    if budgets:
        short = sorted({f"{budget['used']:,} of {budget['asked']:,}" for budget in budgets})
        chapters.notice(
            f"Cut short: {', '.join(short)} steps. What follows says what such models do; it says nothing against what "
            "a full training may reach."
        )
    return Markdown(
        f"Commit, device, precision: {report.made(found)}. An interval over images or votes says nothing about "
        "another seed: three seeds of one FactorVAE of Brongers et al. differ by "
        f"{seeds.seed_spread():.2f} in their metric."
    )


def _with_and_without(found: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Every model that has the attention loss, and beside it the one of the same γ and seed that has not."""
    plain = {(run.parameters["gamma"], run.parameters["seed"]): run for run in found if not run.parameters["lambda"]}
    pairs = [(run, plain.get((run.parameters["gamma"], run.parameters["seed"]))) for run in found]
    return [(run, other) for run, other in pairs if run.parameters["lambda"] and other is not None]


def results(found: Sequence[Run]) -> pd.DataFrame:
    """What each model reaches: the metrics of disentanglement and the losses."""
    return pd.DataFrame({"Model": title(run), **cells(run, RESULTS)} for run in found)


def differences(found: Sequence[Run]) -> pd.DataFrame:
    """What the attention loss changes: AD-FactorVAE minus FactorVAE of the same γ and seed, and over seeds.

    An interval over seeds is Student's, and needs two; a line of one seed has none.
    """
    lines = pd.DataFrame(
        {"γ": run.parameters["gamma"], "λ": run.parameters["lambda"]}
        | {name: _value(run, number) - _value(other, number) for name, number in CHANGES.items()}
        for run, other in _with_and_without(found)
    )
    if lines.empty:
        return lines
    groups = lines.groupby(["γ", "λ"], sort=False)
    table = groups.agg(_mean)
    table.insert(0, "Seeds", groups.size())
    return table.reset_index()


def _value(run: Run, number: Number) -> float:
    return run.metric(*number[:3])["value"] if run.text(*number, lacking="") else np.nan


def _mean(values: pd.Series) -> str:
    """The mean over seeds of what is known, with its interval where that can be."""
    known = values.dropna().tolist()
    if len(known) < 2:
        return "".join(f"{value:+.3f}" for value in known)
    low, high = judging.seed_interval(known)
    return f"{np.mean(known):+.3f} [{low:+.3f}, {high:+.3f}]"


def points(found: Sequence[Run]) -> pd.DataFrame:
    """The points of the trade-off figure: ours, the ones read off the paper's figure, and those of Brongers et al.

    Columns: source, kind, label, score, low, high and cost. Costs of Brongers et al. are means over their three seeds.
    """
    lines = [
        {
            "source": "ours",
            "kind": names.title(run.parameters).partition(",")[0],
            "label": str(run.parameters["gamma"] or run.parameters["beta"]),
            "score": score["value"],
            "low": score["low"],
            "high": score["high"],
            "cost": run.metric(*COST)["value"],
        }
        for run in found
        for score in [run.metric(*SCORE)]
    ]
    table = publications.select(publications.read(), table="dsprites")
    costs = publications.select(table, metric="reconstruction loss").set_index("setting")["value"]
    for row in publications.select(table, metric="disentanglement metric").itertuples():
        model = row.setting.partition(", seed")[0]
        kind, _, rest = model.partition(", ")
        lines.append(
            {
                "source": publications.SOURCES[row.source],
                "kind": kind,
                "label": rest.split(" ")[1] if row.source == "paper" else "",
                "score": row.value,
                "low": row.low,
                "high": row.high,
                "cost": costs.get(row.setting, costs.get(f"{model}, mean of the seeds")),
            }
        )
    return pd.DataFrame(lines)


@figures.styled
def tradeoff(table: pd.DataFrame, *, x: str, y: str) -> Figure:
    """Points of models in the plane of two measures: one colour for each kind of model, one marker for each source.

    Args:
        table: Columns source, kind, label, cost (along x), score (along y), low and high (the interval of the score).
        x: What the cost is.
        y: What the score is.
    """
    kinds, sources = (list(dict.fromkeys(table[name])) for name in ("kind", "source"))
    figure = Figure(figsize=(7.0, 4.4), layout="constrained")
    axis = figure.subplots()
    for (whose, kind), part in table.groupby(["source", "kind"], sort=False):
        colour = figures.COLOURS[kinds.index(kind) % len(figures.COLOURS)]
        ours = whose == sources[0]
        axis.errorbar(
            part["cost"],
            part["score"],
            yerr=[part["score"] - part["low"], part["high"] - part["score"]],
            fmt="os^Dv"[sources.index(whose) % 5],
            markersize=7 if ours else 5,
            markerfacecolor=colour if ours else "none",
            capsize=2,
            color=colour,
            alpha=1 if ours else 0.75,
            label=f"{kind} ({whose})",
        )
        for place, row in enumerate(part.itertuples()):
            side, ha = (-5, "right") if place < len(part) / 2 else (5, "left")  # neighbours' labels would overlap
            options = {"textcoords": "offset points", "ha": ha, "va": "center", "fontsize": 7}
            axis.annotate(row.label, (row.cost, row.score), (side, 0), **options)
    axis.set(xlabel=x, ylabel=y)
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return figure


def curves(found: Sequence[Run]) -> dict[str, dict[str, Line]]:
    """The curves of training: panel -> model -> steps and values."""
    panels: dict[str, dict[str, Line]] = {}
    for run in found:
        losses, scheduled = run.record["losses"], run.record["scheduled"]
        lines = {panel: (losses["step"], losses[name]) for name, panel in LOGGED.items() if losses.get(name)}
        if scheduled:
            steps = sorted(map(int, scheduled))
            lines |= {panel: (steps, [scheduled[str(at)][name] for at in steps]) for name, panel in SCHEDULED.items()}
        for panel, line in lines.items():
            panels.setdefault(panel, {})[title(run)] = line
    return panels


def overlaps(found: Sequence[Run]) -> pd.DataFrame:
    """How much the maps of every model overlap at every layer, as they are and of equal sum, by which pairs."""
    columns = {layer: (OVERLAP, layer) for layer in SPATIAL}
    columns |= {f"{layer}, equal sum": (EQUALISED, layer) for layer in SPATIAL}
    return pd.DataFrame(
        {"Model": title(run), "Pairs": pairs}
        | {name: run.text(*number, pairs, lacking="none") for name, number in columns.items()}
        for pairs in PAIRS
        for run in found
    )


def overlap(found: Sequence[Run]) -> Image | Markdown:
    """How much the maps of all active latents overlap at every layer, as they are and of equal sum."""
    rows = [
        run.metric(metric, layer, PAIRS[0]) | {"method": f"{layer}{kind}", "group": title(run)}
        for metric, kind in {OVERLAP: "", EQUALISED: ", equal sum"}.items()
        for layer in SPATIAL
        for run in found
        if run.text(metric, layer, PAIRS[0], lacking="")
    ]
    if not rows:
        return Markdown("*None of these models has two active latents.*")
    return figures.show(figures.intervals(pd.DataFrame(rows), label="AD ratio, over all pairs of active latents"))


def compared(found: Sequence[Run], layers: Sequence[str], metric: str, pairs: str) -> tuple[int, int, int]:
    """Overlaps of maps with the attention loss against those without, at the same γ and seed.

    Args:
        found: The models.
        layers: Where the maps are taken.
        metric: OVERLAP or EQUALISED.
        pairs: One of PAIRS; models without such a pair are left out.

    Returns:
        In how many cases, a model at a layer, the interval over images lies below, above, and how many there are.
    """
    orders = [
        order(run.metric(metric, layer, pairs), other.metric(metric, layer, pairs))
        for run, other in _with_and_without(found)
        for layer in layers
        if all(model.text(metric, layer, pairs, lacking="") for model in (run, other))
    ]
    return orders.count("below"), orders.count("above"), len(orders)


def apart(found: Sequence[Run], attention: str, layer: str) -> pd.DataFrame:
    """In how many cases the maps overlap less with the loss, where it was taken and elsewhere.

    Args:
        found: The models.
        attention: The variant of the loss.
        layer: Its layer, or "variant" for the one of the variant.
    """
    at = {"variant": "conv1" if attention == "brongers2021" else "conv4"}.get(layer, layer)
    others = [name for name in SPATIAL if name != at]
    places = ({at: [at]} if at in SPATIAL else {}) | {"the others": others}
    lines = []
    for (where, layers), pairs in product(places.items(), PAIRS):
        line = {"Maps at": where, "Pairs": pairs}
        for metric, kind in {OVERLAP: "", EQUALISED: ", equal sum"}.items():
            below, above, cases = compared(found, layers, metric, pairs)
            line |= {f"less{kind}": f"{below} of {cases}", f"more{kind}": f"{above} of {cases}"}
        lines.append(line)
    return pd.DataFrame(lines)


def examples(x_NCYX: figures.Images, maps: Mapping[str, np.ndarray], credit: str) -> Image:
    """Sprites under the maps of their two highest latents, of each model; at the resolution of the layer."""
    rows = {"sprite": [x_CYX[0] for x_CYX in x_NCYX]}
    for model, map_NKHW in maps.items():
        shares = np.moveaxis(map_NKHW, 1, 0) / max(float(map_NKHW.max()), 1e-12)
        rows |= {f"{model}: {rank}": map_NHW for rank, map_NHW in zip(("1st", "2nd"), shares, strict=True)}
    titles = [f"image {number}" for number in range(1, len(x_NCYX) + 1)]
    label = "map, 1 is the greatest of its model"
    drawn = figures.image_rows(rows, maps=list(rows)[1:], titles=titles, label=label, credit=credit, grey="gray")
    return figures.show(drawn)


def ceilings(run: Run) -> pd.DataFrame:
    """What a perfect code scores by each protocol, with spare latents beside it: mean and range of draws."""
    form = "{value:.3f} ({low:.3f}–{high:.3f})"
    return pd.DataFrame(
        {"Perfect code with": spare}
        | {name: form.format(**run.metric("perfect code", name, spare)) for name in (REFERENCE, PUBLISHED)}
        for spare in dict.fromkeys(run.rows("perfect code")["subset"])
    )


def protocols(found: Sequence[Run]) -> pd.DataFrame:
    """The same encodings by every protocol and rule for collapsed latents."""
    columns = {
        f"{prefix}{protocol}; left out: {rule}": (metric, protocol, rule, form)
        for protocol, rule in zip((REFERENCE, PUBLISHED, PUBLISHED), RULES, strict=True)
        for prefix, metric, form in (("", METRIC, ".3f"), ("latents left; ", "latents that count", ".0f"))
    }
    return pd.DataFrame({"Model": title(run), **cells(run, columns)} for run in found)


def _without(found: Sequence[Run]) -> Run:
    """The model of the largest γ among those without the attention loss."""
    return max(found, key=lambda run: (not run.parameters["lambda"], run.parameters["gamma"]))


def gradients(found: Sequence[Run]) -> pd.DataFrame:
    """How strongly each variant of the loss pulls at a model's encoder at λ = 1, beside the rest of its loss."""
    run = _without(found)
    of_variants = run.metrics[run.metrics["metric"].isin(["L_AD", names.GRADIENT, names.REACHED])]
    measured = of_variants.pivot(index="method", columns="metric", values="value")
    share = measured[names.GRADIENT] / measured.loc["rest of the loss", names.GRADIENT]
    table = pd.DataFrame(
        {
            "L_AD": measured["L_AD"].map("{:.4f}".format),
            "Norm of its gradient": measured[names.GRADIENT].map("{:.2e}".format),
            "as a share of the rest": share.map("{:.1e}".format),
            "Parameters it reaches": measured[names.REACHED].map("{:,.0f}".format),
        }
    )
    return table.loc[run.rows("L_AD")["method"]].rename_axis("Variant").reset_index()


def pulls(found: Sequence[Run]) -> Markdown:
    """What follows from how strongly each variant pulls."""
    of = gradients(found).set_index("Variant")
    percent = (100 * of["as a share of the rest"].astype(float)).map("{:.2g} %".format)
    return Markdown(
        f"At {title(_without(found))}, with λ = 1, the gradient of the paper's formula is {percent['liu2020']} as long "
        f"as that of the rest of the loss, that of Brongers et al. {percent['brongers2021']}, and with its second "
        f"division undone {percent['brongers2021, divided once']}. With α constant it reaches "
        f"{of.loc['liu2020 at conv1, α constant', 'Parameters it reaches']} parameters at `conv1`, those of that layer "
        f"alone. At `conv5`, with its single position, the loss is {of.loc['liu2020 at conv5', 'L_AD']}: two maps of "
        "one pixel can only differ in size."
    )


def traversals(found: Sequence[Run]) -> HTML:
    """What the six latents of the highest KL draw, for the largest γ with its least and its greatest λ."""
    most = max(run.parameters["gamma"] for run in found)
    of_most = [run for run in found if (run.parameters["gamma"], run.parameters["seed"]) == (most, 0)]
    chosen = {title(run): run for run in (of_most[0], of_most[-1])}
    pictures, values = {}, [f"{value:+}" for value in names.TRAVERSAL]
    for name, run in chosen.items():
        kl_I = run.arrays["kl"]
        rows = {f"latent {i} ({kl_I[i]:.1f} nats)": run.arrays["traversals"][i] / 255 for i in np.argsort(-kl_I)[:6]}
        drawn = figures.image_rows(
            rows, maps=[], titles=values, label="", credit=f"Reconstructions by {name}", grey="gray"
        )
        pictures[f"Latent traversals: one sprite while one latent at a time takes seven values, by {name}."] = drawn
    return explorers.traversals(chosen, {alt: figures.show(drawn) for alt, drawn in pictures.items()})


def every_run() -> None:
    """Show every stored model: what it was trained with, and what it reached."""
    told_by = ("gamma", "lambda", "beta", "seed", "attention", "layer", "alpha", "pairs", "recipe")
    report.show(report.stored_runs("disentanglement", told_by, SHOWN), "Every stored model; 95 % intervals.")
