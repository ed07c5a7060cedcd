"""What the stored runs say about each claim, by the criterion that stands beside it in expvae_book.claims."""

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
from scipy.stats import t as student

from expvae.metrics import fraction_interval
from expvae_book.matching import budget_text, cut_short, data_kind, measure, shown
from expvae_book.publications import with_unit
from expvae_book.runs import Run

Outcome = Literal["held", "partly held", "did not hold", "not yet tested"]
OUTCOMES = get_args(Outcome)


@dataclass(frozen=True)
class Verdict:
    """What the stored runs say about a claim.

    Attributes:
        verdict: The outcome.
        evidence: The numbers that decided it, from the records of the runs.
        runs: Labels of the runs that count.
    """

    verdict: Outcome
    evidence: str
    runs: tuple[str, ...] = ()


Effect = Literal["hardly any effect", "effect", "undecided"]


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


UCSD_LAYERS = ("conv1", "conv2", "conv3")
UCSD_RECIPES = ("report1", "report2")  # the recipes that the reports followed; the first is the paper's too
PRESETS = ("liu2020_paper", "liu2020_code")
MVTEC_RECIPES = ("report1", "report2")
OTHER_NETWORKS = ("brongers2021",)  # recipes of networks that are not the reports'
DSPRITES_GAMMAS = (10, 20, 30, 40)  # of the paper's figure
DSPRITES_LAMBDAS = (0.5, 1, 1.5)  # of the second report
DSPRITES_LOSSES = ("none", "liu2020", "report2")  # the paper's formula; Brongers et al.'s code computes something else
DSPRITES_WEIGHTS = {"beta": "β", "gamma": "γ", "lambda": "λ"}
ABLATION_STEPS = {  # what each step is switched by, in the paper's rule and in that of the authors' code
    "ReLU": (("channels=abs_of_sum", "liu2020_paper"), ("channels=relu_of_sum", "liu2020_code")),
    "normalised gradients": (("normaliser=batch", "liu2020_paper"), ("normaliser=none", "liu2020_code")),
}
ABLATION_DATA_SETS = ("mnist", "ucsd", "mvtec")
ABLATION_MARGIN = 0.01  # up to which a change in pixel AUROC counts as hardly any
SPRITE_METRIC = ("FactorVAE metric", "five factors, held-out votes", "standard deviation of the mean below 0.05")
SPRITE_OVERLAP = ("overlap of maps", "conv4", "all pairs of active latents")
RBM_MAPS = ("attention", "gradient × input")  # what no baseline's name begins with
MNIST_DIGITS = (1, 3)
MNIST_RECIPES = ("liu2020", "report1", "report2")  # the recipes that the paper's code and the reports followed
OUTLIERS = "all outliers"


def judge_attention(method: str) -> Callable[[Sequence[Run], pd.DataFrame], Verdict]:
    """Judge whether a kind of attention map finds the anomalous ink better than chance and than the baselines."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted, note = _full_mnist_runs(runs, lambda run: {method, "random"} <= _pixel_scores(run).keys())
        if not _both_digits(counted):
            return Verdict("not yet tested", f"{_missing_digits(counted)}{note}", _labels(counted))
        beats_chance, beats_all = 0, 0
        for run in counted:
            scores = _pixel_scores(run)
            low = scores[method][0]
            beaten = [low > high for other, (_, high) in scores.items() if not other.startswith("attention")]
            beats_chance += low > 0.5 and low > scores["random"][1]
            beats_all += low > 0.5 and all(beaten)
        n = len(counted)
        outcome = "held" if beats_all == n else "partly held" if beats_chance == n else "did not hold"
        shown = [method, *(name for name in _pixel_scores(counted[0]) if not name.startswith("attention"))]
        ranges = [_per_digit(counted, "pixel AUROC", name) for name in shown]
        tally = f"Above chance in {beats_chance} of {n} runs, above every baseline in {beats_all} of {n}."
        if all(measure(run, "pixel AUROC within ink", method, OUTLIERS) for run in counted):
            tally += f" Among pixels of ink alone — {_per_digit(counted, 'pixel AUROC within ink', method)}."
        return Verdict(outcome, f"Pixel AUROC — {'; '.join(ranges)}. {tally}{note}", _labels(counted))

    return judge


def judge_less_intuitive(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
    """Judge whether the measured share of less intuitive maps agrees with the one counted by eye."""
    method = "attention, authors' code"
    counted, note = _full_mnist_runs(
        runs, lambda run: _interval(run, "less intuitive maps", method, OUTLIERS) is not None
    )
    if not _both_digits(counted):
        return Verdict("not yet tested", f"{_missing_digits(counted)}{note}", _labels(counted))
    row = _published(reported, "R1", "MNIST", "less intuitive maps")
    overlaps = 0
    for run in counted:
        low, high = _interval(run, "less intuitive maps", method, OUTLIERS)
        overlaps += 100 * low <= row["high"] and 100 * high >= row["low"]
    n = len(counted)
    outcome = "held" if overlaps == n else "partly held" if overlaps else "did not hold"
    shares = "; ".join(_per_digit(counted, "less intuitive maps", name, "%") for name in (method, "attention, paper"))
    evidence = f"Share of maps with a pixel AUROC below one half — {shares}. Published: {row['published']}."
    tally = f" The intervals meet in {overlaps} of {n} runs."
    return Verdict(outcome, evidence + tally + note, _labels(counted))


def judge_parameters(dataset: str) -> Callable[[Sequence[Run], pd.DataFrame], Verdict]:
    """Judge whether our model has as many parameters as the first report prints."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        runs = [run for run in runs if run.parameters["recipe"] not in OTHER_NETWORKS]
        measured = [(run, measure(run, "parameters", "", "")) for run in runs]
        counts = {run.label: round(found[0]) for run, found in measured if found is not None}
        if not counts:
            return Verdict("not yet tested", "No stored run records the number of parameters.")
        row = _published(reported, "R1", dataset, "parameters")
        ours = ", ".join(f"{count:,}" for count in sorted(set(counts.values())))
        outcome = "held" if set(counts.values()) == {int(row["value"])} else "did not hold"
        return Verdict(outcome, f"Our model has {ours}; published: {row['published']}.", tuple(counts))

    return judge


def _full_mnist_runs(runs: Sequence[Run], measures: Callable[[Run], bool]) -> tuple[list[Run], str]:
    """The runs that a verdict on MNIST may rest on, and a note on those that are outdated or left out."""
    counted: list[Run] = []
    reasons: list[str] = []
    for run in runs:
        digit, recipe = run.parameters["digit"], run.parameters["recipe"]
        if data_kind(run) != "complete":
            reasons.append("partial data")
        elif digit not in MNIST_DIGITS:
            reasons.append(f"digit {digit}")
        elif recipe not in MNIST_RECIPES:
            reasons.append(f"recipe {recipe}, which is not a published one")
        elif cut_short(run):
            reasons.append(budget_text(run))
        elif not measures(run):
            reasons.append("without this measure")
        else:
            counted.append(run)
    outdated = sum(bool(run.outdated) for run in counted)
    note = f" Outdated: {outdated} of {len(counted)} runs." if outdated else ""
    if reasons:
        note += f" Not counted: {'; '.join(f'{n} ({reason})' for reason, n in Counter(reasons).items())}."
    return counted, note


def judge_ucsd(
    grade: Callable[[dict[str, Run], pd.DataFrame], int],
) -> Callable[[Sequence[Run], pd.DataFrame], Verdict]:
    """Judge a claim on the three layers of one UCSD model: the worst grade counts, 2 held, 1 partly held, 0 did not."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted, note = _full_ucsd_models(runs)
        if not counted:
            return Verdict("not yet tested", f"No model on complete data to its last epoch.{note}")
        outcome = ("did not hold", "partly held", "held")[min(grade(layers, reported) for layers in counted)]
        evidence = "; ".join(map(_ucsd_scores, counted))
        return Verdict(
            outcome, f"Pixel AUROC — {evidence}.{note}", _labels([run for layers in counted for run in layers.values()])
        )

    return judge


def _full_ucsd_models(runs: Sequence[Run]) -> tuple[list[dict[str, Run]], str]:
    """The models and presets that a verdict on UCSD Ped1 may rest on, by layer, and a note on the others' numbers."""
    models: dict[str, dict[str, Run]] = {}
    for run in runs:
        alike = {name: value for name, value in run.parameters.items() if name != "layer"}
        models.setdefault(str(sorted(alike.items())), {})[run.parameters["layer"]] = run
    counted, others = [], []
    for layers in models.values():
        run = next(iter(layers.values()))
        one_model = {(other.card.digest, str(other.record.get("weights"))) for other in layers.values()}
        short = next(filter(cut_short, layers.values()), None)
        reasons = [
            "partial data" if any(data_kind(other) != "complete" for other in layers.values()) else "",
            "" if short is None else budget_text(short),
            "layers of different models or data" if len(one_model) > 1 else "",
            "no published recipe" if run.parameters["recipe"] not in UCSD_RECIPES else "",
            "no preset of the paper or its code" if run.parameters["preset"] not in PRESETS else "",
            "not all layers" if layers.keys() != set(UCSD_LAYERS) else "",
        ]
        if any(reasons):
            others.append(f"{_ucsd_scores(layers)} ({', '.join(filter(None, reasons))})")
        else:
            counted.append(layers)
    outdated = sum(bool(run.outdated) for layers in counted for run in layers.values())
    note = f" Outdated: {outdated} of {sum(map(len, counted))} runs." if outdated else ""
    return counted, note + (f" Not counted: {'; '.join(others)}." if others else "")


def _ucsd_score(run: Run, method: str = "attention") -> tuple[float, float]:
    """Interval of the pixel AUROC of a run."""
    row = run.metric("pixel AUROC", method, "test clips")
    return row["low"], row["high"]


def _ucsd_scores(layers: dict[str, Run]) -> str:
    """The pixel AUROC of attention at each layer, and that of the reconstruction error, as text."""
    run = next(iter(layers.values()))
    measured = {layer: (layers[layer], "attention") for layer in UCSD_LAYERS if layer in layers}
    measured["reconstruction error"] = (run, "reconstruction error")
    shown = []
    for name, (found, method) in measured.items():
        value, low, high = measure(found, "pixel AUROC", method, "test clips")
        shown.append(f"{name} {value:.3f} ({low:.3f}–{high:.3f})")
    return f"{run.parameters['recipe']}, {run.parameters['preset']}, seed {run.parameters['seed']}: {', '.join(shown)}"


def grade_ucsd_auroc(layers: dict[str, Run], reported: pd.DataFrame) -> int:
    """Whether each layer reaches the paper's AUROC, or at least lies above one half and above every baseline."""
    grades = []
    for layer, run in layers.items():
        paper = _published(reported[reported["setting"] == layer], "paper", "UCSD Ped1", "pixel AUROC")["value"]
        low, high = _ucsd_score(run)
        others = {row["method"] for row in run.record["metrics"] if row["metric"] == "pixel AUROC"} - {"attention"}
        above = low > 0.5 and all(low > _ucsd_score(run, other)[1] for other in others)
        grades.append(2 if low > 0.5 and high >= paper else 1 if above else 0)
    return min(grades)


def grade_ucsd_baseline(layers: dict[str, Run], reported: pd.DataFrame) -> int:
    """Whether the best layer lies above the reconstruction error of the same model, or is not told apart from it."""
    best = max(layers.values(), key=lambda run: run.metric("pixel AUROC", "attention", "test clips")["value"])
    low, high = _ucsd_difference(best, "attention", "reconstruction error", "test clips")
    return 2 if low > 0 else 1 if high >= 0 else 0


def grade_ucsd_layers(layers: dict[str, Run], reported: pd.DataFrame) -> int:
    """Whether the three layers are apart and conv2 is highest, or at least two are apart."""
    values = {layer: run.metric("pixel AUROC", "attention", "test clips")["value"] for layer, run in layers.items()}
    run = next(iter(layers.values()))  # each of them has the differences between all layers
    tenth = "test clips, every tenth frame"
    differences = [_ucsd_difference(run, one, other, tenth) for one, other in combinations(UCSD_LAYERS, 2)]
    apart = [low > 0 or high < 0 for low, high in differences]
    return 2 if all(apart) and max(values, key=values.get) == "conv2" else 1 if any(apart) else 0


def _ucsd_difference(run: Run, one: str, other: str, subset: str) -> tuple[float, float]:
    """Paired interval of the difference between two pixel AUROC of a run."""
    row = run.metric("pixel AUROC, difference", f"{one} − {other}", subset)
    return row["low"], row["high"]


def judge_mvtec(grade: Callable[[list[Run], pd.DataFrame], int]) -> Callable[[Sequence[Run], pd.DataFrame], Verdict]:
    """Judge a claim on the categories of MVTec AD; the worst configuration counts."""

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted, note = _full_mvtec_runs(runs)
        if not counted:
            return Verdict("not yet tested", f"No run on a complete category to its last image.{note}")
        configurations: dict[str, list[Run]] = {}
        for run in counted:
            alike = {name: value for name, value in run.parameters.items() if name != "category"}
            configurations.setdefault(str(sorted(alike.items())), []).append(run)
        worst = min(grade(alike, reported) for alike in configurations.values())
        evidence = f"Pixel AUROC — {'; '.join(map(_mvtec_scores, counted))}.{note}"
        return Verdict(("did not hold", "partly held", "held")[worst], evidence, _labels(counted))

    return judge


def _full_mvtec_runs(runs: Sequence[Run]) -> tuple[list[Run], str]:
    """The runs that a verdict on MVTec AD may rest on, and a note on the numbers of the others."""
    counted, others = [], []
    for run in runs:
        if measure(run, "pixel AUROC", "attention", "") is None:
            continue
        reasons = [
            "" if data_kind(run) == "complete" else f"{run.card.mark} data",
            f"{run.record['budget']['used']:,} of {run.record['budget']['asked']:,} images" if cut_short(run) else "",
            "no published recipe" if run.parameters["recipe"] not in MVTEC_RECIPES else "",
            "another augmentation" if run.parameters["augmentation"] != "paper" else "",
            "no preset of the paper or its code" if run.parameters["preset"] not in PRESETS else "",
        ]
        if any(reasons):
            others.append(f"{_mvtec_scores(run)} ({', '.join(filter(None, reasons))})")
        else:
            counted.append(run)
    outdated = sum(bool(run.outdated) for run in counted)
    note = f" Outdated: {outdated} of {len(counted)} runs." if outdated else ""
    return counted, note + (f" Not counted: {'; '.join(others)}." if others else "")


def _mvtec_scores(run: Run) -> str:
    """The pixel AUROC of attention and of the reconstruction error in one category, as text."""
    shown = []
    for name in ("attention", "reconstruction error"):
        value, low, high = measure(run, "pixel AUROC", name, "")
        shown.append(f"{name} {value:.3f} ({low:.3f}–{high:.3f})")
    return f"{_setting(run)}: {', '.join(shown)}"


def _setting(run: Run) -> str:
    return run.parameters["category"].replace("_", " ")


def grade_mvtec_published(runs: list[Run], reported: pd.DataFrame) -> int:
    """Whether AUROC and IoU reach the paper's in two categories of three, or one of them, or all AUROC beat chance."""
    reached = {"pixel AUROC": 0, "IoU": 0}
    for run in runs:
        paper = reported[reported["setting"] == _setting(run)]
        for metric, ours in (("pixel AUROC", "pixel AUROC"), ("IoU", "best IoU (oracle)")):
            _, high = _interval(run, ours, "attention", "")
            reached[metric] += high >= _published(paper, "paper", "MVTec AD", metric)["value"]
    enough = [3 * number >= 2 * len(runs) for number in reached.values()]
    beats_chance = all(_interval(run, "pixel AUROC", "attention", "")[0] > 0.5 for run in runs)
    return 2 if all(enough) else 1 if any(enough) or beats_chance else 0


def grade_mvtec_baselines(runs: list[Run], reported: pd.DataFrame) -> int:
    """Whether attention lies above every baseline in all categories, or in more than half of them."""
    above = 0
    for run in runs:
        low, _ = _interval(run, "pixel AUROC", "attention", "")
        others = {row["method"] for row in run.record["metrics"] if row["metric"] == "pixel AUROC"} - {"attention"}
        above += all(low > _interval(run, "pixel AUROC", name, "")[1] for name in others)
    return 2 if above == len(runs) else 1 if 2 * above > len(runs) else 0


def grade_mvtec_share(runs: list[Run], reported: pd.DataFrame) -> int:
    """Whether the share of maps that miss the anomaly contains the published one, or at least lies above one half."""
    rows = [run.metric("maps that miss the anomaly", "attention") for run in runs]
    number = sum(row["n"] for row in rows)
    missed = sum(round(row["value"] * row["n"]) for row in rows)
    share = fraction_interval(np.arange(number) < missed)
    published = _published(reported, "R1", "MVTec AD", "maps that miss the anomaly")["value"] / 100
    return 2 if share.low <= published <= share.high else 1 if share.low > 0.5 else 0


Models = dict[tuple[int | float, int | float, int | float], dict[int, Run]]  # β, γ and λ -> seed -> run


def judge_dsprites(
    grade: Callable[[Models], int | None], metric: str, method: str = "", subset: str = ""
) -> Callable[[Sequence[Run], pd.DataFrame], Verdict]:
    """Judge a claim on the models of each configuration of dSprites; the worst that can be judged counts.

    Args:
        grade: From the models to 2 held, 1 partly held, 0 did not, or None where models or seeds are missing.
        metric: The number that the evidence shows.
        method: Its method.
        subset: Its subset.
    """

    def judge(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
        counted, others = [], []
        for run in runs:
            if measure(run, metric, method, subset) is None:
                continue
            reasons = [
                "" if data_kind(run) == "complete" else f"{run.card.mark} data",
                budget_text(run) if cut_short(run) else "",
                "" if run.parameters["attention"] in DSPRITES_LOSSES else "the loss of other code",
                "" if _as_published_loss(run) else "a changed loss",
            ]
            if any(reasons):
                others.append((run, ", ".join(filter(None, reasons))))
            else:
                counted.append(run)
        note = ""
        if others:
            shown = (f"{_sprite_score(run, metric, method, subset)} ({reason})" for run, reason in others)
            note = f" Not counted: {'; '.join(shown)}."
        configurations: dict[str, Models] = {}
        for run in counted:
            weights = ("beta", "gamma", "lambda")
            free = {*weights, "seed", "attention", "layer", "alpha", "pairs"}
            alike = {name: value for name, value in run.parameters.items() if name not in free}
            # A model without the loss belongs to the configuration of each loss.
            losses = DSPRITES_LOSSES if run.parameters["attention"] == "none" else [run.parameters["attention"]]
            for loss in losses:
                models = configurations.setdefault(f"{sorted(alike.items())} {loss}", {})
                models.setdefault(tuple(run.parameters[name] for name in weights), {})[run.parameters["seed"]] = run
        grades = [found for models in configurations.values() if (found := grade(models)) is not None]
        if not grades:
            return Verdict("not yet tested", f"Too few whole runs on the complete release to tell.{note}")
        outdated = sum(bool(run.outdated) for run in counted)
        evidence = "; ".join(_sprite_score(run, metric, method, subset) for run in counted)
        note = (f" Outdated: {outdated} of {len(counted)} runs." if outdated else "") + note
        outcome = ("did not hold", "partly held", "held")[min(grades)]
        return Verdict(outcome, f"{evidence}.{note}", _labels(counted))

    return judge


def _as_published_loss(run: Run) -> bool:
    return all(run.parameters[name] in ("variant", "none") for name in ("layer", "alpha", "pairs"))


def _sprite_score(run: Run, metric: str, method: str, subset: str) -> str:
    parameters = run.parameters
    weights = ", ".join(f"{symbol} {parameters[name]}" for name, symbol in DSPRITES_WEIGHTS.items())
    value, _, _ = measure(run, metric, method, subset)
    return f"{weights}, seed {parameters['seed']}: {metric} {value:.3f}"


def seed_interval(values: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """Student's interval of the mean of what several seeds gave.

    Raises:
        ValueError: If there are fewer than two.
    """
    if len(values) < 2:
        raise ValueError(f"an interval over seeds needs two or more, got {len(values)}")
    half = student.ppf((1 + level) / 2, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    return float(np.mean(values) - half), float(np.mean(values) + half)


def _at(
    models: Models, gamma: float | int, weight: float | int, metric: str, method: str = "", subset: str = ""
) -> dict[int, float]:
    """By seed, a number of the model with β = 1 and these weights."""
    return {
        seed: run.metric(metric, method, subset)["value"] for seed, run in models.get((1, gamma, weight), {}).items()
    }


def grade_dsprites_metric(models: Models) -> int | None:
    """At how many γ of the paper the paired interval over seeds of the difference in the metric lies above zero."""
    above = []
    for gamma in DSPRITES_GAMMAS:
        without, with_loss = (_at(models, gamma, weight, *SPRITE_METRIC) for weight in (0, 1))
        differences = [with_loss[seed] - without[seed] for seed in with_loss.keys() & without.keys()]
        if len(differences) < 2:
            return None
        above.append(seed_interval(differences)[0] > 0)
    return 2 if all(above) else 1 if any(above) else 0


def grade_dsprites_tradeoff(models: Models) -> int | None:
    """Whether models with the loss dominate all, or some, of those without, in metric and reconstruction."""

    def mean(runs: dict[int, Run], *name: str) -> float:
        return float(np.mean([run.metric(*name)["value"] for run in runs.values()]))

    points = {key: (mean(runs, *SPRITE_METRIC), mean(runs, "reconstruction per image")) for key, runs in models.items()}
    ours = [point for (_, _, weight), point in points.items() if weight]
    others = [point for (_, _, weight), point in points.items() if not weight]
    wanted = {(1, gamma, weight) for gamma in DSPRITES_GAMMAS for weight in (0, 1)}
    if not wanted <= points.keys() or all(gamma for _, gamma, _ in points):  # a β-VAE belongs to the claim
        return None
    if min(len(models[key]) for key in wanted) < 2:
        return None

    def dominated(point: tuple[float, float], by: list[tuple[float, float]]) -> bool:
        return any(score > point[0] and cost <= point[1] for score, cost in by)

    beaten = [dominated(point, ours) for point in others]
    if all(beaten):
        return 2
    return 1 if any(beaten) and not any(dominated(point, others) for point in ours) else 0


def grade_dsprites_maps(models: Models) -> int | None:
    """At how many γ of the paper the interval over seeds of the overlap with the loss lies below the one without."""
    below = []
    for gamma in DSPRITES_GAMMAS:
        pair = [list(_at(models, gamma, weight, *SPRITE_OVERLAP).values()) for weight in (0, 1)]
        if min(map(len, pair)) < 2:
            return None
        without, with_loss = map(seed_interval, pair)
        below.append(with_loss[1] < without[0])
    return 2 if all(below) else 1 if any(below) else 0


def grade_dsprites_weight(models: Models) -> int | None:
    """At how many γ the interval over seeds of the metric at the largest λ lies above those at the smaller ones."""
    above = []
    for gamma in DSPRITES_GAMMAS:
        scores = [list(_at(models, gamma, weight, *SPRITE_METRIC).values()) for weight in DSPRITES_LAMBDAS]
        if min(map(len, scores)) < 2:
            return None
        *smaller, largest = map(seed_interval, scores)
        above.append(all(largest[0] > high for _, high in smaller))
    return 2 if all(above) else 1 if any(above) else 0


def judge_stacked_rbm(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
    """Judge whether the report's map of a stacked RBM finds no more of the anomalous ink than one without meaning."""
    method = "attention, stacked RBM"
    counted, reasons = [], []
    for run in runs:
        reason = budget_text(run) if cut_short(run) else "" if data_kind(run) == "complete" else f"{run.card.mark} data"
        if run.parameters["digit"] not in MNIST_DIGITS:
            reason = f"digit {run.parameters['digit']}"
        elif run.parameters["units"] != "spin":
            reason = f"{run.parameters['units']} units"
        if reason:
            reasons.append(reason)
        else:
            counted.append(run)
    outdated = sum(bool(run.outdated) for run in counted)
    note = f" Outdated: {outdated} of {len(counted)} runs." if outdated else ""
    if reasons:
        note += f" Not counted: {'; '.join(f'{n} ({reason})' for reason, n in Counter(reasons).items())}."
    if not _both_digits(counted):
        return Verdict("not yet tested", f"{_missing_digits(counted)}{note}", _labels(counted))
    grades, shown = [], []
    for run in counted:
        scores = _pixel_scores(run)
        low, high = scores[method]
        others = [interval for name, interval in scores.items() if name != "random" and not name.startswith(RBM_MAPS)]
        below_all = all(high < lowest for lowest, _ in others)
        moved = run.metric("pixel AUROC, units renumbered", method, OUTLIERS)
        meaningless = max(scores["random"][1], moved["high"])
        grades.append(2 if low <= meaningless else 1 if below_all else 0)
        told = ", ".join(f"{name} {run.parameters[name]}" for name in ("digit", "layer", "temperature", "seed"))
        shown.append(
            f"{told}: {low:.3f} to {high:.3f}, with the units renumbered {moved['low']:.3f} to {moved['high']:.3f}"
        )
    n = len(counted)
    tally = (
        f"No better than without meaning in {grades.count(2)} of {n} runs, not below every baseline in "
        f"{grades.count(0)}."
    )
    outcome = ("did not hold", "partly held", "held")[min(grades)]
    return Verdict(outcome, f"Pixel AUROC of the report's map — {'; '.join(shown)}. {tally}{note}", _labels(counted))


def judge_discrepancies(runs: Sequence[Run], reported: pd.DataFrame) -> Verdict:
    """Judge whether switching either step of ABLATION_STEPS hardly changes the pixel AUROC, on every data set."""
    counted, others = [], []
    for run in runs:
        data = "" if data_kind(run) == "complete" else f"{run.card.mark} data"
        reasons = [data, budget_text(run) if cut_short(run) else ""]
        if any(reasons):
            others.append((run, ", ".join(filter(None, reasons))))
        else:
            counted.append(run)
    counted, named = _largest(counted), _largest([run for run, _ in others])
    others = [(run, reason) for run, reason in others if run in named]
    there = {run.parameters["dataset"] for run in counted}
    held, refuted = 0, 0
    for switches in ABLATION_STEPS.values():
        found = [effect(_change(run, *switch), ABLATION_MARGIN) for run in counted for switch in switches]
        refuted += "effect" in found
        held += there >= set(ABLATION_DATA_SETS) and set(found) == {"hardly any effect"}
    outdated = sum(bool(run.outdated) for run in counted)
    note = f" Outdated: {outdated} of {len(counted)} runs." if outdated else ""
    if others:
        note += f" Not counted: {'; '.join(f'{_changes_shown(run)} ({reason})' for run, reason in others)}."
    outcomes = {(2, 0): "held", (1, 1): "partly held", (0, 2): "did not hold"}
    shown = "; ".join(map(_changes_shown, counted)) or "no model of complete data, trained to its last epoch"
    evidence = f"Change in pixel AUROC — {shown}.{note}"
    return Verdict(outcomes.get((held, refuted), "not yet tested"), evidence, _labels(counted))


def _largest(runs: Sequence[Run]) -> list[Run]:
    """Of the runs on each model that with the most measured images."""
    by_model = defaultdict(list)
    for run in runs:
        by_model[run.parameters["dataset"], run.parameters["model"]].append(run)
    return [max(same, key=lambda run: run.record["test"]["measured"]) for same in by_model.values()]


def _change(run: Run, name: str, reference: str) -> dict[str, Any]:
    return run.metric("pixel AUROC, change", name, reference)


def _changes_shown(run: Run) -> str:
    """What switching each step changes in a run, in the paper's rule and in the code's, as text."""
    steps = []
    for step, switches in ABLATION_STEPS.items():
        rows = [_change(run, *switch) for switch in switches]
        paper, code = (
            f"{row['value']:+.3f} ({row['low']:+.3f} to {row['high']:+.3f}; {effect(row, ABLATION_MARGIN)})"
            for row in rows
        )
        steps.append(f"{step} {paper} in the paper's rule, {code} in the code's")
    return f"{run.parameters['dataset']} {run.parameters['model']}: {', '.join(steps)}"


def _pixel_scores(run: Run) -> dict[str, tuple[float, float]]:
    """Interval of the pixel AUROC of every method of a run."""
    methods = [row["method"] for row in run.record["metrics"] if row["metric"] == "pixel AUROC"]
    found = {method: _interval(run, "pixel AUROC", method, OUTLIERS) for method in methods}
    return {method: interval for method, interval in found.items() if interval is not None}


def _interval(run: Run, metric: str, method: str, subset: str) -> tuple[float, float] | None:
    measured = measure(run, metric, method, subset)
    if measured is None:
        return None
    value, low, high = measured
    return (value if low is None else low, value if high is None else high)


def _both_digits(runs: Sequence[Run]) -> bool:
    return {run.parameters["digit"] for run in runs} >= set(MNIST_DIGITS)


def _missing_digits(runs: Sequence[Run]) -> str:
    missing = [str(digit) for digit in MNIST_DIGITS if digit not in {run.parameters["digit"] for run in runs}]
    return f"No run that counts for digit {' and '.join(missing)}."


def _per_digit(runs: Sequence[Run], metric: str, method: str, unit: str = "") -> str:
    """Range of our values over the runs of each digit, and what their intervals cover together, as text."""
    scale = 100 if unit == "%" else 1
    parts = []
    for digit in MNIST_DIGITS:
        same = [run for run in runs if run.parameters["digit"] == digit]
        found = [measured for run in same if (measured := measure(run, metric, method, OUTLIERS)) is not None]
        if not found:
            continue
        value, low, high = (
            [shown(scale * number, unit, False) for number in numbers if number is not None]
            for numbers in zip(*found, strict=True)
        )
        ends = dict.fromkeys((min(value, key=float), max(value, key=float)))
        covered = f"; intervals {min(low, key=float)} to {max(high, key=float)}" if low and high else ""
        parts.append(f"{with_unit('–'.join(ends), unit)} (digit {digit}{covered})")
    return f"{method}: {', '.join(parts)}"


def _published(reported: pd.DataFrame, source: str, dataset: str, metric: str) -> dict[str, Any]:
    mask = (reported["source"] == source) & (reported["dataset"] == dataset) & (reported["metric"] == metric)
    return reported[mask].iloc[0].to_dict()


def _labels(runs: Sequence[Run]) -> tuple[str, ...]:
    return tuple(run.label for run in runs)
