"""What the stored runs say about each claim on maps, by the criterion that stands beside it in expvae_book.claims."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import combinations
from typing import Any, Literal

import numpy as np
import pandas as pd

from expvae_book import names
from expvae_book.judging import (
    MARGIN,
    Comparison,
    Judge,
    Part,
    Point,
    Scores,
    Verdict,
    apart,
    chosen,
    compare,
    decide,
    from_rows,
    lacks,
    row_point,
    share,
)
from expvae_book.matching import measure
from expvae_book.names import AUROC, BEST_IOU, CENTRE, ERROR, PRIOR, SSIM
from expvae_book.publications import select
from expvae_book.runs import Run

Effect = Literal["hardly any effect", "effect", "undecided"]

PAPER, CODE = "liu2020_paper", "liu2020_code"
REPORTED = ("report1", "report2", "report2_code")  # the recipes that the reports followed; the first is the paper's too
MNIST_RECIPES = ("liu2020", *REPORTED)
MNIST_DIGITS = (1, 3)
MNIST_TRUTHS = {"": "foreign ink", "strokes added": "strokes added"}
OUTLIERS, CLIPS = "all outliers", "test clips"
STACKED = names.MACHINE_MAPS[1]
UCSD_LAYERS = ("conv1", "conv2", "conv3")
MVTEC_MAP = f"layer2.1.conv1, {PAPER}"  # at the layer that Brongers et al.'s code names; neither report names one
LAYER_MARGIN = 0.01  # of an AUROC, by which layers have to differ
ABLATION_STEPS = {
    "ReLU": "channels=relu_of_sum",
    "normalised gradients": "normaliser=none",
}  # switched in the code's rule
ABLATION_DATA_SETS = ("mnist", "ucsd", "mvtec")
ABLATION_MARGIN = 0.01  # up to which a change in pixel AUROC counts as hardly any


# What runs hold -------------------------------------------------------------------------------------------------------


def judged(runs: Sequence[Run], name: str, truth: str = "") -> tuple[Scores, Scores | None] | None:
    """The pixel AUROC of a map, the mean over the last stages, and that of the untrained networks; None without any.

    Args:
        runs: Of several seeds.
        name: The map.
        truth: Which of a job's truths, "" for the first.
    """
    mark, found = f"{truth}/" if truth else "", []
    for run in runs:
        course_SF, drawn_2R = (run.arrays.get(f"{mark}{kind}/{name}") for kind in ("course", "judged"))
        if course_SF is None or drawn_2R is None or np.isnan(drawn_2R[1]).all():
            return None
        trained_SF = course_SF[course_SF[:, 0] > 0][-names.LAST_STAGES :]
        found.append((float(trained_SF[:, 1].mean()), float(course_SF[0, 1]), *drawn_2R.astype(float)))
    if not found:
        return None
    last_S, first_S, untrained_SR, last_SR = (np.array(values) for values in zip(*found, strict=True))
    units = runs[0].metric(AUROC, name, names.LAST + (f", {truth}" if truth else ""))["n"]
    untrained = None if np.isnan(untrained_SR).any() else Scores(first_S, untrained_SR, units)
    return Scores(last_S, last_SR, units), untrained


def final(runs: Sequence[Run], name: str, metric: str) -> Scores | None:
    """A measure of a map of the trained networks, the last checkpoint; None where it has no resamples."""
    kept = [run.record.get("resamples", {}).get("measures", []) for run in runs]
    if not runs or not all(
        metric in measures and f"resamples/{name}" in run.arrays for run, measures in zip(runs, kept, strict=True)
    ):
        return None
    rows = [
        next(row for row in run.record["metrics"] if (row["metric"], row["method"]) == (metric, name)) for run in runs
    ]
    drawn = [run.resamples(name)[measures.index(metric)] for run, measures in zip(runs, kept, strict=True)]
    return Scores(np.array([row["value"] for row in rows]), np.array(drawn), rows[0]["n"])


def localised(
    name: str, runs: Sequence[Run], one: str, place: str, *, truth: str = "", published: float | None = None
) -> Part:
    """That a map finds anomalies: above the untrained network and above a map that looks at no test image.

    Args:
        name: Of the part.
        runs: Of several seeds.
        one: The map.
        place: The map that looks at no test image.
        truth: As for `judged`.
        published: An AUROC that it has to reach as well, give or take MARGIN.
    """
    ours, beside = judged(runs, one, truth), judged(runs, place, truth)
    if ours is None or ours[1] is None or beside is None:
        subsets = [truth] if truth else [OUTLIERS, CLIPS, ""]
        numbers = [measure(run, AUROC, one, subset) for run in runs for subset in subsets]
        values = [f"{number[0]:.3f}" for number in numbers if number]
        seen = f"pixel AUROC {', '.join(values)}, " if values else ""
        return Part(name, (), f"{seen}its network was not measured before the first step")
    trained, untrained = ours
    found = [compare("above untrained", trained, untrained), compare(f"above the {place}", trained, beside[0])]
    points = trained.point("ours"), untrained.point("control")
    if published is not None:
        found.append(compare(f"above {published:.2f} − {MARGIN}", trained, published - MARGIN))
        points += (Point("published", published),)
    last = np.mean([run.arrays[f"{truth}/course/{one}" if truth else f"course/{one}"][-1, 1] for run in runs])
    text = f"{name} ({trained.value_S.mean():.3f}, at the end {last:.3f})"
    return Part(text, tuple(filter(None, found)), points=points)


def _published(reported: pd.DataFrame, dataset: str, metric: str, setting: str) -> float:
    rows = select(reported, source="paper", dataset=dataset, metric=metric, setting=setting)
    return float(rows["value"].iloc[0])  # both reports may quote it


def _parts(*comparisons: Comparison | None, lacking: str = "no number") -> tuple[tuple[Comparison, ...], str]:
    """Comparisons of a part, and what it lacks where one is missing."""
    return tuple(filter(None, comparisons)), "" if all(comparisons) else lacking


# MNIST and the stacked RBM --------------------------------------------------------------------------------------------


def _of_digits(runs: Sequence[Run], recipes: Sequence[str], **wanted: object) -> dict[int, list[Run]]:
    """The runs that count for each digit, trained on the right class."""
    fits = [run for run in runs if "trained_on" not in run.parameters]
    fits = [run for run in fits if all(run.parameters.get(name) == value for name, value in wanted.items())]
    return {digit: chosen([run for run in fits if run.parameters["digit"] == digit], recipes) for digit in MNIST_DIGITS}


def _decided(parts: Sequence[Part], counted: Sequence[Sequence[Run]], recipes: Sequence[str] = ()) -> Verdict:
    """The verdict where each part rests on runs of its own."""
    lacking = [reason for runs in counted if runs for reason in lacks(runs, recipes)]
    return decide(parts, [run for runs in counted for run in runs], lacking)


def judge_digits(preset: str) -> Judge:
    """Judge whether the maps of a rule find what is foreign in other digits, and strokes that were added."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted = _of_digits(runs, MNIST_RECIPES)
        parts = [
            localised(f"digit {digit}, {title}", counted[digit], f"conv2, {preset}", CENTRE, truth=truth)
            for digit in MNIST_DIGITS
            for truth, title in MNIST_TRUTHS.items()
        ]
        return _decided(parts, list(counted.values()), MNIST_RECIPES)

    return judge


def judge_less_intuitive(method: str) -> Judge:
    """Judge whether the measured share of less intuitive maps lies in the range that was counted by eye."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        given = select(reported, source="R1", dataset="MNIST", metric=names.LESS_INTUITIVE).iloc[0]
        counted, parts = _of_digits(runs, MNIST_RECIPES), []
        for digit, same in counted.items():
            rows = _rows(same, names.LESS_INTUITIVE, method, OUTLIERS)
            low, high = given["low"] / 100, given["high"] / 100
            found = from_rows(f"above {low:.0%}:", rows, low), from_rows(f"below {high:.0%}:", rows, high, sign=-1)
            points = (*row_point("ours", rows), Point("published", (low + high) / 2, low, high))
            parts.append(Part(f"digit {digit}", *_parts(*found), points))
        return _decided(parts, list(counted.values()), MNIST_RECIPES)

    return judge


def _rows(runs: Sequence[Run], *number: str) -> list[dict]:
    """The rows of a number with an interval, of the runs that have it."""
    found = [measure(run, *number) for run in runs]
    return [dict(zip(("value", "low", "high"), row, strict=True)) for row in found if row and row[1] is not None]


def judge_stacked_rbm(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
    """Whether the report's map of a stack is as good as chance, or as the same map with its units renumbered."""
    counted, parts = _of_digits(runs, ("report2_code", "ours"), units="spin"), []
    for digit, same in counted.items():
        ours, other = (_rows(same, AUROC, STACKED, OUTLIERS), _rows(same, names.RENUMBERED, STACKED, OUTLIERS))
        pairs = [
            one | {end: one[end] - renumbered["value"] for end in ("value", "low", "high")}
            for one, renumbered in zip(ours, other, strict=True)
        ]
        found = from_rows("AUROC less that of renumbered units", pairs, alike=MARGIN)
        renumbered = [dict.fromkeys(("value", "low", "high"), row["value"]) for row in other]
        points = row_point("ours", ours) + row_point("control", renumbered)
        parts.append(Part(f"digit {digit}", *_parts(found), points))
    return _decided(parts, list(counted.values()))


# UCSD Ped1 ------------------------------------------------------------------------------------------------------------


def judge_ucsd(parts_of: Callable[[list[Run], pd.DataFrame], list[Part]]) -> Judge:
    """Judge a claim on the layers of one configuration of UCSD Ped1, all its seeds."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted = chosen(runs, REPORTED)
        return _decided(parts_of(counted, reported), [counted], REPORTED)

    return judge


def ucsd_auroc(runs: list[Run], reported: pd.DataFrame) -> list[Part]:
    """That each layer finds the anomalies with the paper's AUROC, by the paper's rule."""
    return [
        localised(name, runs, f"{name}, {PAPER}", PRIOR, published=_published(reported, "UCSD Ped1", AUROC, name))
        for name in UCSD_LAYERS
    ]


def ucsd_baseline(runs: list[Run], reported: pd.DataFrame) -> list[Part]:
    """That the layer which the paper has best is above the reconstruction error of the same model."""
    rows = _rows(runs, names.DIFFERENCE, f"conv2, {PAPER} − {ERROR}", CLIPS)
    points = row_point("ours", _rows(runs, AUROC, f"conv2, {PAPER}", CLIPS))
    points += row_point("control", _rows(runs, AUROC, ERROR, CLIPS))
    return [Part("conv2", *_parts(from_rows(f"AUROC less that of the {ERROR}", rows)), points)]


def ucsd_layers(runs: list[Run], reported: pd.DataFrame) -> list[Part]:
    """That any two layers give different AUROC."""
    scores = {name: judged(runs, f"{name}, {PAPER}") for name in UCSD_LAYERS}
    parts = []
    for one, other in combinations(UCSD_LAYERS, 2):
        both = scores[one] and scores[other]
        found = apart("differ by", scores[one][0], scores[other][0], LAYER_MARGIN) if both else None
        points = (scores[one][0].point("ours"), scores[other][0].point("ours")) if both else ()
        points += tuple(Point("published", _published(reported, "UCSD Ped1", AUROC, name)) for name in (one, other))
        parts.append(Part(f"{one} and {other}", *_parts(found), points))
    return parts


# MVTec AD -------------------------------------------------------------------------------------------------------------


def _of_categories(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs that count for each category; outdated ones only where no category has others."""
    categories = sorted({run.parameters["category"] for run in runs})
    of = {name: chosen([run for run in runs if run.parameters["category"] == name], REPORTED) for name in categories}
    current = {name: same for name, same in of.items() if not any(run.outdated for run in same)}
    return current or of


def judge_mvtec(parts_of: Callable[[dict[str, list[Run]], pd.DataFrame], list[Part]]) -> Judge:
    """Judge a claim on the mean over the categories at hand; missing ones count in no mean, ours or theirs."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted = _of_categories(runs)
        return _decided(parts_of(counted, reported), list(counted.values()), REPORTED)

    return judge


def mvtec_published(runs: dict[str, list[Run]], reported: pd.DataFrame) -> list[Part]:
    """That mean AUROC and mean IoU reach the paper's over the same categories, the maps being above both controls."""
    plain = [names.plain(category) for category in runs]
    means = {
        metric: float(np.mean([_published(reported, "MVTec AD", metric, name) for name in plain]))
        for metric in (AUROC, "IoU")
    }
    trained = _mean_judged(runs, MVTEC_MAP)
    prior, iou = _mean_judged(runs, PRIOR), [final(same, MVTEC_MAP, BEST_IOU) for same in runs.values()]
    found: list[Comparison | None] = [None]
    points = Point("published", means[AUROC]), Point("published", means["IoU"])
    if trained:
        points += trained[0].point("ours"), trained[1].point("control")
    if trained and prior:
        found = [
            compare("above untrained", *trained),
            compare(f"above the {PRIOR}", trained[0], prior[0]),
            compare(f"above {means[AUROC]:.2f} − {MARGIN}", trained[0], means[AUROC] - MARGIN),
        ]
    overlap = (
        compare(f"above {means['IoU']:.2f} − {MARGIN}", Scores.mean(iou), means["IoU"] - MARGIN) if all(iou) else None
    )
    title = f"of {len(runs)} categories"
    lacking = "no untrained network beside it"
    points += (Scores.mean(iou).point("ours"),) if all(iou) else ()
    return [Part(f"AUROC {title}", *_parts(*found, lacking=lacking), points), Part(f"IoU {title}", *_parts(overlap))]


def _mean_judged(runs: dict[str, list[Run]], name: str) -> tuple[Scores, Scores] | None:
    found = [judged(same, name) for same in runs.values()]
    if not found or any(one is None or one[1] is None for one in found):
        return None
    return Scores.mean([one[0] for one in found]), Scores.mean([one[1] for one in found])


def mvtec_others(runs: dict[str, list[Run]], reported: pd.DataFrame) -> list[Part]:
    """That the mean AUROC is above that of the maps of the same models' reconstructions."""
    parts = []
    for other in (ERROR, SSIM):
        pairs = [(final(same, MVTEC_MAP, AUROC), final(same, other, AUROC)) for same in runs.values()]
        known = [pair for pair in pairs if all(pair)]
        found, points = None, ()
        if known and len(known) == len(pairs):
            ours, theirs = (Scores.mean(scores) for scores in zip(*known, strict=True))
            found, points = compare(f"above the {other}", ours, theirs), (ours.point("ours"), theirs.point("control"))
        parts.append(Part(f"mean of {len(runs)} categories", *_parts(found), points))
    return parts


def mvtec_share(runs: dict[str, list[Run]], reported: pd.DataFrame) -> list[Part]:
    """That most maps, of all defective images, have an AUROC of their own below one half."""
    ten = [same for category, same in runs.items() if category in names.TEN]
    rows = [row for same in ten for row in (_missed(run) for run in same[:1]) if row]
    n = sum(row["n"] for row in rows)
    if not n:
        return [Part("defective images", (), "no number")]
    value = sum(row["value"] * row["n"] for row in rows) / n
    error = (max(value * (1 - value), 1 / n) / n) ** 0.5
    comparison = Comparison(f"share that misses, of {n}: {value:.2f}", value - 0.5, error)
    ours = Point("ours", value, value - 1.96 * error, value + 1.96 * error)
    return [Part("defective images", (comparison,), points=(ours,))]


def _missed(run: Run) -> dict | None:
    """The share of defective images that the maps miss, by the paper's rule or by its code's in older runs."""
    for name in (MVTEC_MAP, f"layer2.1.conv1, {CODE}"):
        if measure(run, names.MISSED, name):
            return run.metric(names.MISSED, name)
    return None


# The ablations --------------------------------------------------------------------------------------------------------


def effect(row: Mapping[str, Any], margin: float) -> Effect:
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


def judge_discrepancies(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
    """Whether switching a step in the rule of the authors' code hardly changes the AUROC, by step and data set.

    The mean over the models of a data set, each by one run: see `ablated`.
    """
    largest = ablated(runs)
    counted = {name: [run for (of, _), run in largest.items() if of == name] for name in ABLATION_DATA_SETS}
    parts = []
    for step, switch in ABLATION_STEPS.items():
        for dataset, models in counted.items():
            rows = _rows(models, names.CHANGE, switch, CODE)
            comparison = None
            if rows:
                error = sum(((row["high"] - row["low"]) / 3.92) ** 2 for row in rows) ** 0.5 / len(rows)
                change = float(np.mean([row["value"] for row in rows]))
                each = ", ".join(f"{row['value']:+.3f}" for row in rows)
                shown = f"change {change:+.3f}" + (f" (the mean of {each})" if len(rows) > 1 else "")
                comparison = Comparison(shown, change, error, alike=ABLATION_MARGIN)
            parts.append(Part(f"{step}, {dataset}", *_parts(comparison)))
    lacking = [reason for models in counted.values() if models for reason in lacks(models)]
    return decide(parts, [run for models in counted.values() for run in models], lacking)


def ablated(runs: Iterable[Run]) -> dict[tuple[str, str], Run]:
    """By data set and model the run that tells what a change of its map's rule does.

    Of those of today's protocols, where there are any: the one with the largest share of its budget, then with the most
    measured images. On MNIST the ablations are runs of their own; the jobs of the other data sets store such rows, and
    those of the first report's recipe count.
    """
    best: dict[tuple[str, str], Run] = {}
    for run in sorted(runs, key=lambda run: (not run.outdated, share(run), _measured(run))):
        given = run.parameters
        dataset = given.get("dataset", run.chapter)
        of_job = dataset in ABLATION_DATA_SETS[1:] and given.get("recipe", "report1") == "report1"
        if (run.chapter == "ablations" or of_job) and (run.metrics["metric"] == names.CHANGE).any():
            best[dataset, given.get("model") or given.get("category") or given["recipe"]] = run
    return best


def _measured(run: Run) -> int:
    return run.record.get("test", {"measured": 0})["measured"]
