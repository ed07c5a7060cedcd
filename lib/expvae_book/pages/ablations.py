"""What the chapter on ablations draws, tabulates and says: of its runs, and of the jobs that store such rows."""

from collections.abc import Sequence

import pandas as pd
from IPython.display import Markdown, display
from matplotlib.axes import Axes
from matplotlib.figure import Figure

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
    "normaliser=image": "gradient ÷ size in the image",
    "normaliser=batch": "gradient ÷ size in the batch",
    "score=each_mean": "a map of each mean",
    "score=sum_of_means": "one map of the sum of means",
    "score=each_sample": "a map of each sampled latent",
    "score=normal_difference": "normal difference distribution",
    "tensor=after": "all after the activation",
    "tensor=mixed": "gradient before, values after it",
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
    others = judges.ablated(run for run in runs.find() if run.card.kind != "sample")
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
    layer = "layer2.1.conv1" if run.chapter == "mvtec" else "conv2"
    rows = run.rows(measure)
    return rows[rows["method"].isin([rule, f"{layer}, {rule}"])].iloc[0].to_dict()


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
    hardly = {
        step: f"{(rows['effect'] == 'hardly any effect').sum()} of {len(rows)}"
        for step, (_, change) in TRIED.items()
        for rows in [table[(table["subset"] == "liu2020_code") & (table["method"] == change)]]
    }
    text = (
        f"**In short.** In the rule of the code, of which the report speaks, the ReLU hardly changes the pixel AUROC "
        f"(by no more than {margin:g}) in {hardly['ReLU']} models, and the division of the gradient in "
        f"{hardly[list(TRIED)[1]]}. The report prints no numbers. {' '.join(lines)} {notes(models)}"
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
        (dataset, model), test, budget = _subject(run), run.record.get("test", {}), run.record["budget"]
        line = {"Data set": dataset, "Model": model, "Data": run.card.mark or "complete"}
        line |= {"Trained": f"{budget['used']:,} of {budget['asked']:,} {budget['unit']}"}
        line |= {"Layer": test.get("layer", ""), "Test images": f"{test['images']:,} of {test['of']:,}" if test else ""}
        line |= {"of which measured": f"{test['measured']:,}" if test else ""}
        line |= {"Resampled": run.rows(f"{AUROC}, change")["n"].iloc[0]}
        line |= {"Anomalous pixels": run.text("anomalous pixels", form=".2%", lacking="")}
        for measure, rule in ((measure, rule) for measure in (AUROC, BEST_IOU) for rule in RULES):
            row = _whole(run, measure, rule)
            line[f"{measure}, {RULES[rule]}"] = run.text(measure, row["method"], row["subset"])
        lines.append(line | {"State": run.state})
    report.show(
        pd.DataFrame(lines), "Every model; 95 % intervals. The IoU is at the best threshold of the test images."
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
    counts = rows["effect"].value_counts()
    told = ", ".join(f"{effect} in {count} of {len(rows)}" for effect, count in counts.items())
    return f"{told} ({rows['value'].min():+.3f} to {rows['value'].max():+.3f})"


def tried(models: Sequence[Run], margin: float) -> Markdown:
    """The two steps that the report tried, in each rule and every model."""
    everything, lines = changes(models, AUROC, margin), []
    for step, names in TRIED.items():
        for rule, name, switched in zip(RULES, names, SWITCHED, strict=True):
            rows = everything[(everything["subset"] == rule) & (everything["method"] == name)]
            each = [f"{row['dataset']} {row['model']} {_text(row)}, {row['effect']}" for _, row in rows.iterrows()]
            hardly = (rows["effect"] == "hardly any effect").sum()
            lines.append(f"- *{step}*, {switched}: hardly any effect in {hardly} of {len(rows)}. {'; '.join(each)}.")
    return Markdown("\n".join(lines))


@figures.styled
def forest(table: pd.DataFrame, margin: float) -> Figure:
    """Changes with their intervals: a column of panels for each data set, a row for each starting point."""
    sets = list(dict.fromkeys(table["dataset"]))
    crowd = max(1.0, table.groupby("dataset")["model"].nunique().max() / 5)
    heights = [crowd * table[table["subset"] == rule]["method"].nunique() for rule in RULES]
    figure = Figure(figsize=(2.6 + 2.9 * len(sets), 0.3 * sum(heights) + 1.8), layout="constrained")
    options = {"squeeze": False, "sharex": "col", "sharey": "row", "height_ratios": heights}
    axes = figure.subplots(len(RULES), len(sets), **options)
    for (rule, name), line in zip(RULES.items(), axes, strict=True):
        of_rule = table[table["subset"] == rule]
        methods = list(dict.fromkeys(of_rule["method"]))
        for axis, dataset in zip(line, sets, strict=True):
            _panel(axis, of_rule[of_rule["dataset"] == dataset], methods, margin)
            axis.set_title(f"{dataset}\nfrom {name}")
    for axis in axes[-1]:
        axis.set_xlabel("change in pixel AUROC")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.12), ncols=3, fontsize=8)
    return figure


def _panel(axis: Axes, part: pd.DataFrame, methods: Sequence[str], margin: float) -> None:
    """The changes of one rule in the models of one data set."""
    axis.axvspan(-margin, margin, color="0.85", zorder=0)
    axis.axvline(0, color="0.3", linewidth=1)
    for method in set(methods) - set(part["method"]):
        axis.text(0, methods.index(method), "does not apply", ha="center", va="center", fontsize=7)
    models = list(dict.fromkeys(part["model"]))
    for index, model in enumerate(models):
        rows = part[part["model"] == model]
        offset = (index - (len(models) - 1) / 2) * 0.7 / max(len(models), 2)
        axis.errorbar(
            rows["value"],
            [methods.index(method) + offset for method in rows["method"]],
            xerr=[rows["value"] - rows["low"], rows["high"] - rows["value"]],
            fmt=figures.MARKERS[index % len(figures.MARKERS)],
            markersize=3.5,
            linewidth=1.1,
            color=figures.COLOURS[index % len(figures.COLOURS)],
            label=model,
        )
    axis.set_yticks(range(len(methods)), [LABELS[method] for method in methods])
    axis.set_ylim(len(methods) - 0.4, -0.6)
    axis.grid(axis="y", visible=False)


def numbers(models: Sequence[Run], margin: float) -> None:
    """Show every change of the AUROC in numbers, by starting point, with a column for each model."""
    everything = changes(models, AUROC, margin)
    for rule, name in RULES.items():
        lines: dict[str, dict[str, str]] = {}
        for _, row in everything[everything["subset"] == rule].iterrows():
            line = lines.setdefault(row["method"], {"Change": LABELS[row["method"]]})
            line[f"{row['dataset']}, {row['model']}"] = _text(row)
        report.show(pd.DataFrame(lines.values()), f"Changes of the AUROC to {name}, with paired 95 % intervals.")
