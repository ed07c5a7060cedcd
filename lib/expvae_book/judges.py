"""What the stored runs say about each claim, by the criterion that stands beside it in expvae_book.claims."""

from collections.abc import Callable, Iterable, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd

from expvae.metrics import fraction_interval
from expvae_book import names
from expvae_book.judging import (
    Graded,
    Judge,
    above_baselines,
    alike,
    graded,
    incomplete,
    judging,
    measured,
    pixel_scores,
    unless,
    with_interval,
)
from expvae_book.matching import measure, short, shown
from expvae_book.names import ATTENTION, AUROC
from expvae_book.publications import select, with_unit
from expvae_book.runs import Run

Effect = Literal["hardly any effect", "effect", "undecided"]

PRESETS = ("liu2020_paper", "liu2020_code")
OTHER_NETWORKS = ("brongers2021", "report2_code")  # recipes of networks that are not the reports'
REPORTED = ("report1", "report2")  # the recipes that the reports followed; the first is the paper's too
MNIST_RECIPES = ("liu2020", *REPORTED)
MNIST_DIGITS = (1, 3)
OUTLIERS = "all outliers"
RBM_MAPS = ("attention", "gradient × input")  # what no baseline's name begins with
STACKED = "attention, stacked RBM"
UCSD_LAYERS = ("conv1", "conv2", "conv3")
CLIPS = "test clips"
ABLATION_STEPS = {  # what each step is switched by, in the paper's rule and in that of the authors' code
    "ReLU": (("channels=abs_of_sum", "liu2020_paper"), ("channels=relu_of_sum", "liu2020_code")),
    "normalised gradients": (("normaliser=batch", "liu2020_paper"), ("normaliser=none", "liu2020_code")),
}
ABLATION_DATA_SETS = ("mnist", "ucsd", "mvtec")
ABLATION_MARGIN = 0.01  # up to which a change in pixel AUROC counts as hardly any


def judge_parameters(dataset: str) -> Judge:
    """Judge whether our model has as many parameters as the first report prints."""

    def of_reports(runs: Sequence[Run]) -> Iterable[Sequence[Run]]:
        return measured(names.PARAMETERS)(run for run in runs if run.parameters["recipe"] not in OTHER_NETWORKS)

    def decide(runs: list[Run], reported: pd.DataFrame) -> Graded:
        row = select(reported, source="R1", dataset=dataset, metric=names.PARAMETERS).iloc[0]
        counts = {round(run.metric(names.PARAMETERS)["value"]) for run in runs}
        ours = ", ".join(f"{count:,}" for count in sorted(counts))
        return graded(counts == {int(row["value"])}, False), f"Our model has {ours}; published: {row['published']}."

    lacking = "No stored run records the number of parameters."
    return judging(decide, lambda run: [], units=of_reports, lacking=lambda runs: unless(runs, lacking))


# --- MNIST -----------------------------------------------------------------------------------------------------------


def judge_attention(method: str) -> Judge:
    """Judge whether a kind of attention map finds the anomalous ink better than chance and than the baselines."""

    def decide(runs: list[Run], reported: pd.DataFrame) -> Graded:
        grades = []
        for run in runs:
            scores = pixel_scores(run, OUTLIERS)
            low, _ = scores[method]
            above_all = low > 0.5 and above_baselines(scores, method)
            grades.append(graded(above_all, low > max(0.5, scores["random"][1])))
        n, others = len(runs), [name for name in pixel_scores(runs[0], OUTLIERS) if not name.startswith(ATTENTION)]
        evidence = (
            f"Pixel AUROC — {'; '.join(_per_digit(runs, AUROC, name) for name in (method, *others))}. "
            f"Above chance in {n - grades.count(0)} of {n} runs, above every baseline in {grades.count(2)} of {n}."
        )
        if all(measure(run, names.WITHIN_INK, method, OUTLIERS) for run in runs):
            evidence += f" Among pixels of ink alone — {_per_digit(runs, names.WITHIN_INK, method)}."
        return min(grades), evidence

    reasons = _mnist_reasons(lambda run: {method, "random"} <= pixel_scores(run, OUTLIERS).keys())
    return judging(decide, reasons, lacking=_missing_digits)


def judge_less_intuitive(method: str, beside: str) -> Judge:
    """Judge whether the measured share of less intuitive maps agrees with the one counted by eye."""

    def decide(runs: list[Run], reported: pd.DataFrame) -> Graded:
        row = select(reported, source="R1", dataset="MNIST", metric=names.LESS_INTUITIVE).iloc[0]
        ours = [run.metric(names.LESS_INTUITIVE, method, OUTLIERS) for run in runs]
        meet = [100 * share["low"] <= row["high"] and 100 * share["high"] >= row["low"] for share in ours]
        shares = "; ".join(_per_digit(runs, names.LESS_INTUITIVE, name, "%") for name in (method, beside))
        return graded(all(meet), any(meet)), (
            f"Share of maps with a pixel AUROC below one half — {shares}. Published: {row['published']}. "
            f"The intervals meet in {sum(meet)} of {len(runs)} runs."
        )

    reasons = _mnist_reasons(lambda run: measure(run, names.LESS_INTUITIVE, method, OUTLIERS))
    return judging(decide, reasons, lacking=_missing_digits)


def _mnist_reasons(measures: Callable[[Run], Any]) -> Callable[[Run], list[str]]:
    def reasons(run: Run) -> list[str]:
        digit, recipe = run.parameters["digit"], run.parameters["recipe"]
        return [
            incomplete(run),
            unless(digit in MNIST_DIGITS, f"digit {digit}"),
            unless(recipe in MNIST_RECIPES, f"recipe {recipe}, which is not a published one"),
            short(run),
            unless(measures(run), "without this measure"),
        ]

    return reasons


def _missing_digits(runs: Sequence[Run]) -> str:
    there = {run.parameters["digit"] for run in runs}
    missing = [str(digit) for digit in MNIST_DIGITS if digit not in there]
    return f"No run that counts for digit {' and '.join(missing)}." if missing else ""


def _per_digit(runs: Sequence[Run], metric: str, method: str, unit: str = "") -> str:
    """Range of our values over the runs of each digit, and what their intervals cover together, as text."""
    scale = 100 if unit == "%" else 1
    parts = []
    for digit in MNIST_DIGITS:
        same = [run for (run,) in measured(metric, method, OUTLIERS)(runs) if run.parameters["digit"] == digit]
        if same:
            rows = pd.DataFrame([run.metric(metric, method, OUTLIERS) for run in same])
            ends = (rows["value"].min(), rows["value"].max(), rows["low"].min(), rows["high"].max())
            least, greatest, low, high = (shown(scale * end, unit, False) for end in ends)
            values = with_unit("–".join(dict.fromkeys((least, greatest))), unit)
            parts.append(f"{values} (digit {digit}; intervals {low} to {high})")
    return f"{method}: {', '.join(parts)}"


# --- the stacked RBM -------------------------------------------------------------------------------------------------


def _decide_stacked_rbm(runs: list[Run], reported: pd.DataFrame) -> Graded:
    """Whether the report's map of a stack finds no more of the anomalous ink than one without meaning."""
    grades, numbers = [], []
    for run in runs:
        scores = pixel_scores(run, OUTLIERS)
        low, high = scores[STACKED]
        moved = run.metric(names.RENUMBERED, STACKED, OUTLIERS)
        lows = [least for name, (least, _) in scores.items() if name != "random" and not name.startswith(RBM_MAPS)]
        grades.append(graded(low <= max(scores["random"][1], moved["high"]), high < min(lows)))
        told = ", ".join(f"{name} {run.parameters[name]}" for name in ("digit", "layer", "temperature", "seed"))
        numbers.append(
            f"{told}: {low:.3f} to {high:.3f}, with the units renumbered {moved['low']:.3f} to {moved['high']:.3f}"
        )
    return min(grades), (
        f"Pixel AUROC of the report's map — {'; '.join(numbers)}. No better than without meaning in {grades.count(2)} "
        f"of {len(runs)} runs, not below every baseline in {grades.count(0)}."
    )


def _rbm_reasons(run: Run) -> list[str]:
    digit, units = run.parameters["digit"], run.parameters["units"]
    outside = unless(digit in MNIST_DIGITS, f"digit {digit}")
    return [outside, unless(units == "spin", f"{units} units"), short(run), incomplete(run)]


judge_stacked_rbm = judging(_decide_stacked_rbm, _rbm_reasons, lacking=_missing_digits)


# --- UCSD Ped1 and MVTec AD ------------------------------------------------------------------------------------------

Grade = Callable[[Sequence[Run], pd.DataFrame], int]  # of the runs of one configuration


def judge_ucsd(grade: Grade) -> Judge:
    """Judge a claim on the three layers of one UCSD model; the worst model counts."""
    return _worst(
        grade,
        "layer",
        _ucsd_reasons,
        _ucsd_scores,
        lambda runs: alike(runs, "layer"),
        "No model on complete data to its last epoch.",
    )


def judge_mvtec(grade: Grade) -> Judge:
    """Judge a claim on the categories of MVTec AD; the worst configuration counts."""
    return _worst(
        grade,
        "category",
        _mvtec_reasons,
        _mvtec_scores,
        measured(AUROC, ATTENTION),
        "No run on a complete category to its last image.",
    )


def _worst(
    grade: Grade,
    free: str,
    reasons: Callable[..., list[str]],
    described: Callable[..., str],
    units: Callable[[Sequence[Run]], Iterable[Sequence[Run]]],
    lacking: str,
) -> Judge:
    """A judge by the worst grade of runs that differ in one parameter."""

    def decide(runs: list[Run], reported: pd.DataFrame) -> Graded:
        evidence = "; ".join(described(*unit) for unit in units(runs))
        return min(grade(group, reported) for group in alike(runs, free)), f"Pixel AUROC — {evidence}."

    return judging(decide, reasons, described, units, lambda runs: unless(runs, lacking))


def _ucsd_reasons(*layers: Run) -> list[str]:
    parameters = layers[0].parameters
    models = {(run.card.digest, str(run.record.get("weights"))) for run in layers}
    return [
        next((f"{run.card.kind} data" for run in layers if incomplete(run)), ""),
        next(filter(None, map(short, layers)), ""),
        unless(len(models) == 1, "layers of different models or data"),
        unless(parameters["recipe"] in REPORTED, "no published recipe"),
        unless(parameters["preset"] in PRESETS, "no preset of the paper or its code"),
        unless({run.parameters["layer"] for run in layers} == set(UCSD_LAYERS), "not all layers"),
    ]


def _ucsd_scores(*layers: Run) -> str:
    """The pixel AUROC of attention at each layer, and that of the reconstruction error, as text."""
    parameters, error = layers[0].parameters, with_interval(layers[0], names.ERROR, names.ERROR, CLIPS)
    scores = sorted(with_interval(run, run.parameters["layer"], ATTENTION, CLIPS) for run in layers)
    return f"{parameters['recipe']}, {parameters['preset']}, seed {parameters['seed']}: {', '.join([*scores, error])}"


def grade_ucsd_auroc(layers: Sequence[Run], reported: pd.DataFrame) -> int:
    """Whether each layer reaches the paper's AUROC, or at least lies above one half and above every baseline."""
    grades = []
    for run in layers:
        paper = _of_paper(reported, "UCSD Ped1", AUROC, run.parameters["layer"])
        scores = pixel_scores(run, CLIPS)
        low, high = scores[ATTENTION]
        grades.append(graded(low > 0.5 and high >= paper, low > 0.5 and above_baselines(scores)))
    return min(grades)


def grade_ucsd_baseline(layers: Sequence[Run], reported: pd.DataFrame) -> int:
    """Whether the best layer lies above the reconstruction error of the same model, or is not told apart from it."""
    row = max(layers, key=_ucsd_value).metric(names.DIFFERENCE, f"{ATTENTION} − {names.ERROR}", CLIPS)
    return graded(row["low"] > 0, row["high"] >= 0)


def grade_ucsd_layers(layers: Sequence[Run], reported: pd.DataFrame) -> int:
    """Whether the three layers are apart and conv2 is highest, or at least two are apart."""
    preset = layers[0].parameters["preset"]
    # Each of the runs has the differences between all layers.
    rows = [
        layers[0].metric(names.DIFFERENCE, f"{preset}, {one} − {other}", CLIPS)
        for one, other in combinations(UCSD_LAYERS, 2)
    ]
    apart = [row["low"] > 0 or row["high"] < 0 for row in rows]
    highest = max(layers, key=_ucsd_value).parameters["layer"]
    return graded(all(apart) and highest == "conv2", any(apart))


def _ucsd_value(run: Run) -> float:
    return run.metric(AUROC, ATTENTION, CLIPS)["value"]


def _mvtec_reasons(run: Run) -> list[str]:
    return [
        incomplete(run),
        short(run, ","),
        unless(run.parameters["recipe"] in REPORTED, "no published recipe"),
        unless(run.parameters["augmentation"] == "paper", "another augmentation"),
        unless(run.parameters["preset"] in PRESETS, "no preset of the paper or its code"),
    ]


def _mvtec_scores(run: Run) -> str:
    """The pixel AUROC of attention and of the reconstruction error in one category, as text."""
    scores = [with_interval(run, name, name) for name in (ATTENTION, names.ERROR)]
    return f"{names.plain(run.parameters['category'])}: {', '.join(scores)}"


def grade_mvtec_published(runs: Sequence[Run], reported: pd.DataFrame) -> int:
    """Whether AUROC and IoU reach the paper's in two categories of three, or one of them, or all AUROC beat chance."""
    enough = []
    for metric, ours in ((AUROC, AUROC), ("IoU", names.BEST_IOU)):
        reached = sum(
            run.metric(ours, ATTENTION)["high"]
            >= _of_paper(reported, "MVTec AD", metric, names.plain(run.parameters["category"]))
            for run in runs
        )
        enough.append(3 * reached >= 2 * len(runs))
    beats_chance = all(run.metric(AUROC, ATTENTION)["low"] > 0.5 for run in runs)
    return graded(all(enough), any(enough) or beats_chance)


def _of_paper(reported: pd.DataFrame, dataset: str, metric: str, setting: str) -> float:
    rows = select(reported, source="paper", dataset=dataset, metric=metric, setting=setting)
    return float(rows["value"].iloc[0])  # both reports may quote it


def grade_mvtec_baselines(runs: Sequence[Run], reported: pd.DataFrame) -> int:
    """Whether attention lies above every baseline in all categories, or in more than half of them."""
    above = sum(above_baselines(pixel_scores(run)) for run in runs)
    return graded(above == len(runs), 2 * above > len(runs))


def grade_mvtec_share(runs: Sequence[Run], reported: pd.DataFrame) -> int:
    """Whether the share of maps that miss the anomaly contains the published one, or at least lies above one half."""
    number, missed = missed_maps(runs)
    share = fraction_interval(np.arange(number) < missed)
    given = select(reported, source="R1", dataset="MVTec AD", metric=names.MISSED)["value"].item() / 100
    return graded(share.low <= given <= share.high, share.low > 0.5)


def missed_maps(runs: Sequence[Run]) -> tuple[int, int]:
    """Over all categories: the number of defective images, and of attention maps that miss the defect."""
    rows = [run.metric(names.MISSED, ATTENTION) for run in runs]
    return sum(row["n"] for row in rows), sum(round(row["value"] * row["n"]) for row in rows)


# --- the ablations ---------------------------------------------------------------------------------------------------


def effect(row: dict[str, Any], margin: float) -> Effect:
    """What the interval of a difference says about it.

    "hardly any effect" where the interval lies within ± margin, zero or not; "effect" where it lies beyond, on one
    side; "undecided" where it has a part in both: too few images to tell if the difference is larger than the margin.

    Args:
        row: A row with low and high, as `expvae_book.runs.Run.metric` gives it.
        margin: Up to which a difference counts as hardly any.
    """
    if -margin <= row["low"] and row["high"] <= margin:
        return "hardly any effect"
    return "effect" if row["low"] > margin or row["high"] < -margin else "undecided"


def _decide_discrepancies(runs: list[Run], reported: pd.DataFrame) -> Graded:
    """Whether switching either step of ABLATION_STEPS hardly changes the pixel AUROC, on every data set."""
    all_there = {run.parameters["dataset"] for run in runs} >= set(ABLATION_DATA_SETS)
    held, refuted = 0, 0
    for switches in ABLATION_STEPS.values():
        effects = {effect(run.metric(names.CHANGE, *switch), ABLATION_MARGIN) for run in runs for switch in switches}
        refuted += "effect" in effects
        held += all_there and effects == {"hardly any effect"}
    changes = "; ".join(map(_changes_shown, runs)) or "no model of complete data, trained to its last epoch"
    return {(2, 0): 2, (1, 1): 1, (0, 2): 0}.get((held, refuted)), f"Change in pixel AUROC — {changes}."


def _ablation_reasons(run: Run) -> list[str]:
    return [incomplete(run), short(run)]


def _largest(runs: Sequence[Run]) -> Iterable[tuple[Run]]:
    """Of the runs on each model that count, and of those that do not, the one with the most measured images."""
    largest = {
        (run.parameters["dataset"], run.parameters["model"], any(_ablation_reasons(run))): run
        for run in sorted(runs, key=lambda run: run.record["test"]["measured"])
    }
    return zip(run for run in runs if run in largest.values())


def _changes_shown(run: Run) -> str:
    """What switching each step changes in a run, in the paper's rule and in the code's, as text."""
    steps = []
    for step, switches in ABLATION_STEPS.items():
        rows = [run.metric(names.CHANGE, *switch) for switch in switches]
        paper, code = (
            f"{row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}; {effect(row, ABLATION_MARGIN)})"
            for row in rows
        )
        steps.append(f"{step} {paper} in the paper's rule, {code} in the code's")
    return f"{run.parameters['dataset']} {run.parameters['model']}: {', '.join(steps)}"


judge_discrepancies = judging(_decide_discrepancies, _ablation_reasons, _changes_shown, _largest)
