"""What the chapter on ablations draws, tabulates and says: of its runs, and of the jobs that store such rows."""

from collections.abc import Sequence

import pandas as pd
from IPython.display import Markdown, display
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from expvae_book import figures, judges, report, runs
from expvae_book.chapters import Job
from expvae_book.judging import share
from expvae_book.names import AUROC, BEST_IOU, plain
from expvae_book.runs import Run

NAMES = {"mnist": "MNIST", "ucsd": "UCSD Ped1", "mvtec": "MVTec AD"}
RULES = {"liu2020_paper": "the paper's rule", "liu2020_code": "the code's rule"}
LABELS = {
    "channels=relu_of_sum": "ReLU of the map",
    "channels=abs_of_sum": "no ReLU: absolute value",
    "channels=mean_of_abs": "|α A|, mean over channels",
    "channels=sum_of_relu": "ReLU(α A), sum over channels",
    "normaliser=none": "gradient not divided",
    "normaliser=image": "gradient ÷ its RMS over the image",
    "normaliser=batch": "gradient ÷ its RMS over the batch",
    "score=each_mean": "a map of each mean",
    "score=sum_of_means": "one map of the sum of means",
    "score=each_sample": "a map of each sampled latent",
    "score=normal_difference": "normal difference distribution",
    "tensor=after": "gradient and values after the activation",
    "tensor=mixed": "gradient before the activation, values after",
    "align_corners=True": "enlarged with aligned corners",
    "preset=liu2020_paper": "the paper's rule as a whole",
    "preset=liu2020_code": "the code's rule as a whole",
    "preset=brongers2021": "Brongers et al.",
    "preset=brongers2021_disentanglement": "Brongers et al., disentanglement",
}
# The steps that the report tried: what each is called as a change to the paper's rule, and to the code's.
TRIED = {
    "ReLU": ("channels=abs_of_sum", "channels=relu_of_sum"),
    "The gradient's size": ("normaliser=batch", "normaliser=none"),
}
SWITCHED = ("changed to the code's in the paper's rule", "changed to the paper's in the code's rule")


def _subject(run: Run) -> tuple[str, str]:
    """The data set and the model of a run, of this chapter or of a job that has its rows."""
    given = run.parameters
    name = given.get("model") or given.get("category") or given["recipe"]
    dataset = given.get("dataset", run.chapter)
    return NAMES[dataset], {"mnist": f"{name}s", "ucsd": "walkway"}.get(dataset, plain(name))


def found(jobs: Sequence[Job]) -> list[Run]:
    """The runs of the jobs, and the one that counts of every model of the other data sets."""
    others = judges.ablated(run for run in runs.find() if run.card.published)
    ours = [job.run for job in jobs if job.run is not None]
    return ours + [one for name in judges.ABLATION_DATA_SETS[1:] for (of, _), one in others.items() if of == name]


def changes(found: Sequence[Run], measure: str, margin: float) -> pd.DataFrame:
    """What every change does to a measure of every model, in the order of the labels.

    Columns: those of a row, whose method is the change and whose subset the starting point; dataset, model and effect.
    """
    lines = []
    for run in found:
        dataset, model = _subject(run)
        for row in run.rows(f"{measure}, change").to_dict("records"):
            effect, whole = judges.effect(row, margin), _whole(run, measure, row["subset"])
            if effect == "hardly any effect" and whole["value"] <= margin:
                effect = "too small to judge"  # it could not fall by more
            lines.append(row | {"dataset": dataset, "model": model, "effect": effect})
    table = pd.DataFrame(lines)
    return table.sort_values("method", key=lambda names: names.map(list(LABELS).index), kind="stable")


def _whole(run: Run, measure: str, rule: str) -> dict:
    """The row of a measure of the map by a rule, at the layer that is changed."""
    rows = run.rows(measure)
    return rows[rows["method"].isin([rule, f"{_layer(run)}, {rule}"])].iloc[0].to_dict()


def _layer(run: Run) -> str:
    return run.record.get("test", {}).get("layer") or ("layer2.1.conv1" if run.chapter == "mvtec" else "conv2")


def in_short(jobs: Sequence[Job], margin: float) -> None:
    """Show the findings in a few sentences, the verdict, and the figure that says most."""
    models = found(jobs)
    if not models:
        display(report.NOT_YET)
        return
    table, lines = changes(models, AUROC, margin), []
    for rule, name in RULES.items():
        of_rule = table[table["subset"] == rule]
        counts = ", ".join(f"{effect} {count} times" for effect, count in of_rule["effect"].value_counts().items())
        largest = of_rule.loc[of_rule["value"].abs().idxmax()]
        lines.append(
            f"From {name}, over all models and changes: {counts}; the largest is “{LABELS[largest['method']]}” on "
            f"{largest['dataset']}, {largest['model']}: **{_text(largest)}**."
        )
    steps = [
        f"*{step}*: **{_counts(rows['effect'])}**."
        for step, (_, change) in TRIED.items()
        for rows in [table[(table["subset"] == "liu2020_code") & (table["method"] == change)]]
    ]
    text = (
        "**In short.** What the steps that the report tried do to the pixel AUROC in the rule of the code, of which it "
        f"speaks, by model. {' '.join(steps)} (*Hardly any* is by no more than {margin:g}.) The report prints no "
        f"numbers. {' '.join(lines)} {notes(models)}"
    )
    display(Markdown(text), figures.show(forest(table, margin)), report.badges("ablations"))


def _text(row: pd.Series) -> str:
    value, low, high = (f"{row[name]:+.3f}" for name in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def notes(models: Sequence[Run]) -> str:
    """What the models are not: trained on real and complete data, or as long as their recipes ask."""
    short = sum(share(run) < 1 for run in models)
    kinds = sorted({run.card.mark or "complete" for run in models})
    return (
        f"Data: {' and '.join(kinds)}; {short} of {len(models)} models were not trained as long as their recipe asks."
    )


def table(models: Sequence[Run]) -> None:
    """Show the models, what they are measured on, and where the two rules stand."""
    lines = []
    for run in models:
        (dataset, model), budget = _subject(run), run.record["budget"]
        line = {"Data set": dataset, "Model": model, "Data": run.card.mark or "complete"}
        line |= {"Trained": f"{budget['used']:,} of {budget['asked']:,} {budget['unit']}", "Layer": _layer(run)}
        # A job of another data set stores only how many clips or images it resamples.
        test = run.record.get("test", {"unit": "clips" if run.chapter == "ucsd" else "images"})
        line |= {"Test images": f"{test['images']:,} of {test['of']:,}" if "of" in test else ""}
        line |= {"Measured and resampled": f"{run.rows(f'{AUROC}, change')['n'].iloc[0]:,.0f} {test['unit']}"}
        line |= {"Anomalous pixels": run.text("anomalous pixels", form=".2%", lacking="")}
        for measure, rule in ((measure, rule) for measure in (AUROC, BEST_IOU) for rule in RULES):
            row = _whole(run, measure, rule)
            line[f"{measure}, {RULES[rule]}"] = run.text(measure, row["method"], row["subset"])
        lines.append(line | {"State": run.state})
    report.show(
        pd.DataFrame(lines),
        "Every model; 95 % intervals. The IoU is at the best threshold of the test images. Commit, "
        f"device, precision: {report.made(models)}.",
    )


def verdicts(models: Sequence[Run], measure: str, margin: float) -> None:
    """Show by starting point what each change does to a measure: the outcome in every data set."""
    everything = changes(models, measure, margin)
    for rule, name in RULES.items():
        of_rule = everything[everything["subset"] == rule]
        lines = {method: {"Change": LABELS[method]} for method in dict.fromkeys(of_rule["method"])}
        for dataset in dict.fromkeys(everything["dataset"]):
            for method, line in lines.items():
                rows = of_rule[(of_rule["method"] == method) & (of_rule["dataset"] == dataset)]
                line[dataset] = _verdict(rows) if len(rows) else "does not apply"
        report.show(
            pd.DataFrame(lines.values()),
            f"What each change to {name} does to the {measure}, by paired 95 % intervals and a margin of ±{margin:g}; "
            "of several models the number with each outcome, and the least and greatest change.",
        )


def _verdict(rows: pd.DataFrame) -> str:
    """How many models of a data set have which outcome; the change itself where there is one model."""
    if len(rows) == 1:
        return f"{rows['effect'].iloc[0]} ({rows['value'].iloc[0]:+.3f})"
    return f"{_counts(rows['effect'])} ({rows['value'].min():+.3f} to {rows['value'].max():+.3f})"


def _counts(effects: pd.Series) -> str:
    """How many models have which outcome, the most frequent first."""
    return ", ".join(f"{effect} in {count} of {len(effects)}" for effect, count in effects.value_counts().items())


def tried(models: Sequence[Run], margin: float) -> Markdown:
    """In how many models the two steps that the report tried have an effect, in each rule."""
    everything, lines = changes(models, AUROC, margin), []
    for step, names in TRIED.items():
        for rule, name, switched in zip(RULES, names, SWITCHED, strict=True):
            rows = everything[(everything["subset"] == rule) & (everything["method"] == name)]
            lines.append(f"- *{step}*, {switched}: {_counts(rows['effect'])}.")
    return Markdown("\n".join(lines))


@figures.styled
def forest(table: pd.DataFrame, margin: float) -> Figure:
    """Changes with their intervals: a column of panels for each data set, a row for each starting point."""
    sets = list(dict.fromkeys(table["dataset"]))
    models = list(table.groupby(["dataset", "model"], sort=False).groups)
    heights = [table[table["subset"] == rule]["method"].nunique() for rule in RULES]
    crowd = 0.08 * table.groupby("dataset")["model"].nunique().max()
    figure = Figure(figsize=(2.2 + 2.0 * len(sets), max(0.3, crowd) * sum(heights) + 1.8), layout="constrained")
    options = {"squeeze": False, "sharex": True, "sharey": "row", "height_ratios": heights}
    axes, handles = figure.subplots(len(RULES), len(sets), **options), {}
    for (rule, name), line in zip(RULES.items(), axes, strict=True):
        of_rule = table[table["subset"] == rule]
        methods = list(dict.fromkeys(of_rule["method"]))
        for axis, dataset in zip(line, sets, strict=True):
            handles |= _panel(axis, of_rule[of_rule["dataset"] == dataset], methods, margin, models)
            axis.set_title(f"{dataset}\nfrom {name}")
    for axis in axes[-1]:
        axis.set_xlabel("change in pixel AUROC")
        axis.xaxis.set_major_locator(MaxNLocator(4))
    labels = [f"{dataset}, {model}" for dataset, model in handles]
    figure.legend(handles.values(), labels, loc="outside lower center", ncols=3)
    return figure


def _panel(
    axis: Axes, part: pd.DataFrame, methods: Sequence[str], margin: float, models: Sequence[tuple[str, str]]
) -> dict[tuple[str, str], Artist]:
    """The changes of one rule in the models of one data set; gives what a legend names each of `models` by."""
    axis.axvspan(-margin, margin, color="0.85", zorder=0)
    axis.axvline(0, color="0.3", linewidth=0.6)
    for method in set(methods) - set(part["method"]):
        axis.text(0, methods.index(method), "does not apply", ha="center", va="center", fontsize=8)
    groups, handles = part.groupby(["dataset", "model"], sort=False), {}
    for place, (model, rows) in enumerate(groups):
        index, offset = models.index(model), (place - (len(groups) - 1) / 2) * 0.8 / max(len(groups), 2)
        handles[model] = axis.errorbar(
            rows["value"],
            [methods.index(method) + offset for method in rows["method"]],
            xerr=[rows["value"] - rows["low"], rows["high"] - rows["value"]],
            fmt=figures.MARKERS[index % len(figures.MARKERS)],
            markersize=4,
            linewidth=1.1,
            color=figures.COLOURS[index % len(figures.COLOURS)],
        )
    axis.set_yticks(range(len(methods)), [LABELS[method].replace(", ", ",\n") for method in methods])
    axis.set_ylim(len(methods) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)
    return handles


def numbers(models: Sequence[Run], margin: float) -> None:
    """Show every change of the AUROC in numbers, by starting point, with a column for each model."""
    everything = changes(models, AUROC, margin)
    for rule, name in RULES.items():
        lines: dict[str, dict[str, str]] = {}
        for _, row in everything[everything["subset"] == rule].iterrows():
            line = lines.setdefault(row["method"], {"Change": LABELS[row["method"]]})
            line[f"{row['dataset']}, {row['model']}"] = _text(row)
        report.show(pd.DataFrame(lines.values()), f"Changes of the AUROC to {name}, with paired 95 % intervals.")
