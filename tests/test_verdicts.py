"""Verdicts by made-up runs, each of which flips one; p, Holm and errors against SciPy, a slow loop and simulation."""

from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from expvae_book import judges, judging, names, sprite_judges
from expvae_book.claims import CLAIMS, decide, facts, verdicts
from expvae_book.data.card import DataCard
from expvae_book.judging import Comparison, Part, Scores
from expvae_book.publications import read
from expvae_book.runs import Run, row

COUNTS = {"train": 1, "test": 1}
PAPER, CODE = judges.PAPER, judges.CODE
FOR, AGAINST, UNSURE = Comparison("for", 3.0, 0.5), Comparison("against", -3.0, 0.5), Comparison("unsure", 1.0, 1.0)


def make_run(chapter, parameters, metrics=(), arrays=None, *, kind="complete", used=100, outdated=False, **record):
    given = {
        "metrics": list(metrics),
        "budget": {"unit": "epochs", "asked": 100, "used": used},
        "data": asdict(DataCard(chapter, kind, COUNTS, COUNTS, "digest", "licence", "credit")),
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "protocols": {"PIXEL": 0} if outdated else {},
        **record,
    }
    run = Run(chapter, {**parameters, "data": "real"}, given, Path("nowhere"))
    run.__dict__["arrays"] = arrays or {}
    return run


def claim(name):
    return next(claim for claim in CLAIMS if claim.id == name)


def verdict(name, runs):
    found = decide(claim(name), runs, read())
    return found.direction, found.strength


# Comparisons ----------------------------------------------------------------------------------------------------------


def test_p_is_students():
    values = np.array([0.3, 0.1, 0.4, -0.05, 0.2])
    found = judging.over_seeds("x", values)
    favours, against = found.chances
    assert favours == pytest.approx(scipy.stats.ttest_1samp(values, 0, alternative="greater").pvalue)
    assert against == pytest.approx(scipy.stats.ttest_1samp(values, 0, alternative="less").pvalue)
    assert found.freedom == pytest.approx(4)
    assert judging.over_seeds("x", [0.1]) is None and judging.over_seeds("x", []) is None


def test_lying_within_a_margin_takes_both_sides():
    values, margin = np.array([0.01, -0.02, 0.015, 0.0, 0.004]), 0.02
    found = judging.over_seeds("x", values, alike=margin)
    low = scipy.stats.ttest_1samp(values, -margin, alternative="greater").pvalue
    high = scipy.stats.ttest_1samp(values, margin, alternative="less").pvalue
    assert found.chances[0] == pytest.approx(max(low, high))
    beyond = Comparison("x", 0.5, 0.1, alike=0.02)
    assert beyond.chances[1] == pytest.approx(2 * scipy.stats.norm.sf(0.48 / 0.1))
    assert replace(beyond, apart=True).chances == beyond.chances[::-1]


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize(
    ("difference", "said"), [(0.0, "within ±0.02"), (0.5, "beyond ±0.02"), (0.025, "not told to lie within or beyond")]
)
def test_evidence_says_on_which_side_of_a_margin_a_difference_lies(difference, said, apart):
    part = Part("x", (Comparison("change", difference, 0.005, alike=0.02, apart=apart),))
    ((_, evidence),) = judging.outcomes([part])
    assert f"change, {said}" in evidence


def test_errors_of_images_and_of_seeds_add_up():
    chance = np.random.default_rng(0)
    value_S, drawn_SR = np.array([0.1, 0.3, 0.2]), chance.normal(0, 0.05, (3, 500))
    found = judging.over_seeds("x", value_S, drawn_SR, 40)
    images, seeds = drawn_SR.mean(0).var(ddof=1), value_S.var(ddof=1) / 3
    assert found.error == pytest.approx((images + seeds) ** 0.5)
    assert found.freedom == pytest.approx((images + seeds) ** 2 / (images**2 / 39 + seeds**2 / 2))
    two = judging.over_seeds("x", value_S[:2], drawn_SR[:2], 40)  # too few to say what seeds do
    assert two.error == pytest.approx(drawn_SR[:2].mean(0).std(ddof=1)) and two.freedom == 39


def test_a_border_is_crossed_as_often_as_the_level_says():
    """Where nothing is to be found, 3 seeds and 25 units show something in some 5 % of cases, not in many more."""
    chance, found = np.random.default_rng(1), 0
    for _ in range(400):
        units_SU = chance.normal(0, 1, 25) + chance.normal(0, 0.3, (3, 1))
        drawn_SR = units_SU[:, chance.integers(0, 25, (200, 25))].mean(2)
        p = 2 * min(judging.over_seeds("x", units_SU.mean(1), drawn_SR, 25).chances)
        found += p <= 0.05
    assert 3 <= found <= 32


def test_holm_equals_a_slow_step_down():
    p_K = [0.01, 0.04, 0.03, 0.005, 0.9]
    expected, left = [None] * 5, sorted(range(5), key=lambda k: p_K[k])
    highest = 0.0
    for step, k in enumerate(left):
        highest = max(highest, min(1.0, p_K[k] * (5 - step)))
        expected[k] = highest
    assert judging.holm(p_K) == pytest.approx(expected)
    assert judging.holm([0.01, 0.04, 0.03, 0.005, 0.9]) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.9])
    assert judging.holm([]) == []


def test_aurocs_are_compared_on_the_logit_scale():
    chance = np.random.default_rng(2)
    ours, theirs = (Scores(np.array([mean]), chance.normal(mean, 0.01, (1, 500)), 30) for mean in (0.9, 0.8))
    found = judging.compare("above", ours, theirs)
    assert found.difference == pytest.approx(np.log(0.9 / 0.1) - np.log(0.8 / 0.2))
    assert found.shown == "above +0.100"
    spread = (scipy.special.logit(ours.drawn_SR) - scipy.special.logit(theirs.drawn_SR)).std(ddof=1)
    assert found.error == pytest.approx(spread)
    assert judging.compare("above", ours, 0.8).difference == pytest.approx(found.difference)


# Parts, directions and strength ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "direction"),
    [
        ([[FOR], [FOR, FOR]], "supported"),
        ([[AGAINST], [FOR, AGAINST]], "contradicted"),
        ([[FOR], [AGAINST]], "mixed"),
        ([[FOR], [AGAINST], [UNSURE]], "mixed"),
        ([[FOR], [UNSURE]], "undecided"),
        ([[AGAINST], [FOR, UNSURE]], "undecided"),
        ([[FOR], []], "undecided"),
    ],
)
def test_directions(parts, direction):
    found = judging.decide([Part(str(i), tuple(one)) for i, one in enumerate(parts)], [], [])
    assert found.direction == direction
    assert found.strength == "none"


def test_what_is_lacking_keeps_a_part_undecided_but_not_uncontradicted():
    assert judging.decide([Part("a", (FOR,), "no control")], [], []).direction == "undecided"
    assert judging.decide([Part("a", (AGAINST,), "no control")], [], []).direction == "contradicted"


def test_many_comparisons_take_more():
    just = Comparison("just", 2.1, 1.0)  # p .036 alone
    assert judging.decide([Part("a", (just,))], [], []).direction == "supported"
    assert judging.decide([Part("a", (just,)), Part("b", (just,))], [], []).direction == "undecided"


@pytest.mark.parametrize(
    ("change", "lacking"),
    [
        ({}, []),
        ({"kind": "re-encoded"}, ["re-encoded data"]),
        ({"kind": "rendered"}, []),
        ({"used": 30}, ["30 of 100 epochs"]),
        ({"outdated": True}, ["outdated"]),
        ({"recipe": "ours"}, ["no published recipe"]),
        ({"seeds": 2}, ["2 of 3 seeds"]),
        ({"seeds": 1, "used": 30, "kind": "partial"}, ["partial data", "30 of 100 epochs", "1 of 3 seeds"]),
    ],
)
def test_strength_names_what_is_missing(change, lacking):
    given = {"seeds": 3, "recipe": "report1"} | change
    seeds, recipe = given.pop("seeds"), given.pop("recipe")
    runs = [make_run("ucsd", {"recipe": recipe, "seed": seed}, **given) for seed in range(seeds)]
    assert judging.lacks(runs, ["report1"]) == lacking
    strength = judging.decide([], runs, judging.lacks(runs, ["report1"])).strength
    assert strength == (f"reduced: {', '.join(lacking)}" if lacking else "full")


def test_which_runs_count_is_no_matter_of_their_results():
    def run(recipe, seed=0, **change):
        return make_run("ucsd", {"recipe": recipe, "seed": seed, "epochs": change.get("used", 100)}, **change)

    old, short, whole = run("report1", outdated=True), run("report1", used=50), run("report1", 1, used=80)
    other = [run("report2", seed) for seed in range(3)]
    assert judging.chosen([old, short, whole, *other], ["report1", "report2"]) == [whole]
    assert judging.chosen([old, *other], ["report2"]) == other
    assert judging.chosen([old, short], ["report1"]) == [short]
    assert judging.chosen([], ["report1"]) == []
    fresh, stale = run("report1"), run("report1", 1, outdated=True)
    assert judging.chosen([fresh, stale], ["report1"]) == [fresh]


# Claims on maps -------------------------------------------------------------------------------------------------------

CHANCE = np.random.default_rng(0)


def course(name, trained, untrained, truth="", spread=0.005, units=36):
    """What a job keeps of a map: its course, what verdicts pair, and its row."""
    mark = f"{truth}/" if truth else ""
    values = np.array([[0, untrained, 0, 0], *([steps, trained, 0, 0] for steps in (8, 9, 10))], dtype=np.float32)
    drawn = np.clip(np.array([[untrained], [trained]]) + CHANCE.normal(0, spread, (2, 500)), 0, 1)
    subset = names.LAST + (f", {truth}" if truth else "")
    arrays = {f"{mark}course/{name}": values, f"{mark}judged/{name}": drawn.astype(np.float16)}
    return arrays, row(names.AUROC, trained, name, subset, low=trained, high=trained, n=units)


def mnist_runs(ours, untrained, prior=0.6, *, preset=PAPER, seeds=3, digits=(1, 3), **change):
    runs = []
    for digit in digits:
        for seed in range(seeds):
            arrays, rows = {}, []
            for truth in judges.MNIST_TRUTHS:
                for name, ends in ((f"conv2, {preset}", (ours, untrained)), (names.CENTRE, (prior, prior))):
                    kept, line = course(name, *ends, truth)
                    arrays, rows = arrays | kept, [*rows, line]
            parameters = {"digit": digit, "recipe": "liu2020", "seed": seed}
            runs.append(make_run("mnist", parameters, rows, arrays, **change))
    return runs


@pytest.mark.parametrize(("name", "preset"), [("MNIST maps", PAPER), ("MNIST maps of the code", CODE)])
@pytest.mark.parametrize(
    ("ours", "untrained", "prior", "direction"),
    [
        (0.9, 0.8, 0.6, "supported"),
        (0.8, 0.9, 0.6, "contradicted"),  # training made it worse
        (0.9, 0.8, 0.95, "contradicted"),  # a map that looks at no image is better
        (0.8, 0.8, 0.6, "undecided"),
    ],
)
def test_a_map_of_digits_is_set_beside_the_untrained_network(name, preset, ours, untrained, prior, direction):
    assert verdict(name, mnist_runs(ours, untrained, prior, preset=preset)) == (direction, "full")


def test_the_numbers_behind_a_verdict_are_those_of_the_runs():
    points = decide(claim("MNIST maps"), mnist_runs(0.9, 0.8), read()).points
    assert [point.who for point in points] == ["ours", "control"] * 4
    for point in points:
        assert point.value == pytest.approx(0.9 if point.who == "ours" else 0.8, abs=1e-6)
        # Each of three seeds is drawn with a spread of 0.005.
        assert point.high - point.low == pytest.approx(2 * 1.96 * 0.005 / 3**0.5, rel=0.2)


def test_digits_may_differ():
    runs = mnist_runs(0.9, 0.8, digits=(1,)) + mnist_runs(0.7, 0.8, digits=(3,))
    assert verdict("MNIST maps", runs) == ("mixed", "full")
    assert verdict("MNIST maps", runs[:3]) == ("undecided", "full")  # nothing of threes
    wrong = [replace(run, parameters=run.parameters | {"trained_on": "outliers"}) for run in runs]
    assert verdict("MNIST maps", wrong) == ("undecided", "none")


def test_without_an_untrained_network_nothing_is_decided():
    runs = [make_run("mnist", {"digit": digit, "recipe": "liu2020", "seed": 0}) for digit in (1, 3)]
    found = decide(claim("MNIST maps"), runs, read())
    assert found.direction == "undecided"
    assert "digit 1, foreign ink: its network was not measured before the first step" in found.evidence


@pytest.mark.parametrize(
    ("shares", "direction"),
    [((0.12, 0.13, 0.125), "supported"), ((0.3, 0.31, 0.3), "contradicted"), ((0.05, 0.2, 0.1), "undecided")],
)
def test_share_of_maps_counted_by_eye(shares, direction):
    method = "attention, authors' code"
    runs = [
        make_run(
            "mnist",
            {"digit": digit, "recipe": "liu2020", "seed": seed},
            [row(names.LESS_INTUITIVE, share, method, judges.OUTLIERS, low=share - 0.005, high=share + 0.005)],
        )
        for digit in (1, 3)
        for seed, share in enumerate(shares)
    ]
    assert verdict("MNIST share", runs) == (direction, "full")


@pytest.mark.parametrize(
    ("score", "width", "direction"),
    [(0.505, 0.01, "supported"), (0.6, 0.02, "contradicted"), (0.51, 0.1, "undecided")],
)
def test_a_stack_without_meaning_is_as_good_as_renumbered(score, width, direction):
    runs = [
        make_run(
            "rbm",
            {"digit": digit, "units": "spin", "seed": seed},
            [
                row(names.AUROC, score, judges.STACKED, judges.OUTLIERS, low=score - width, high=score + width),
                row(names.RENUMBERED, 0.5, judges.STACKED, judges.OUTLIERS, low=0.4, high=0.6),
            ],
        )
        for digit in (1, 3)
        for seed in range(3)
    ]
    assert verdict("stacked RBM", runs) == (direction, "full")
    binary = [replace(run, parameters=run.parameters | {"units": "binary"}) for run in runs]
    assert verdict("stacked RBM", binary) == ("undecided", "none")


def ucsd_runs(aurocs, untrained=0.6, prior=0.6, difference=(0.1, 0.05, 0.15), seeds=3, **change):
    runs = []
    for seed in range(seeds):
        arrays, rows = {}, []
        for layer, value in zip(judges.UCSD_LAYERS, aurocs, strict=True):
            kept, line = course(f"{layer}, {PAPER}", value, untrained, spread=0.002)
            arrays, rows = arrays | kept, [*rows, line]
        kept, line = course(names.PRIOR, prior, prior)
        value, low, high = difference
        title = f"conv2, {PAPER} − {names.ERROR}"
        rows += [line, row(names.DIFFERENCE, value, title, judges.CLIPS, low=low, high=high)]
        runs.append(make_run("ucsd", {"recipe": "report1", "seed": seed}, rows, arrays | kept, **change))
    return runs


@pytest.mark.parametrize(  # the paper's are .89, .92 and .91
    ("aurocs", "untrained", "direction"),
    [
        ((0.92, 0.95, 0.94), 0.6, "supported"),
        ((0.92, 0.95, 0.94), 0.97, "contradicted"),
        ((0.8, 0.8, 0.8), 0.6, "contradicted"),  # below what was published
        ((0.8, 0.95, 0.94), 0.6, "mixed"),
        ((0.87, 0.9, 0.89), 0.6, "undecided"),  # just at the margin
    ],
)
def test_ucsd_reaches_the_published_number_or_not(aurocs, untrained, direction):
    assert verdict("UCSD AUROC", ucsd_runs(aurocs, untrained)) == (direction, "full")


def test_a_wide_interval_does_not_reach_what_was_published():
    few = ucsd_runs((0.9, 0.9, 0.9), seeds=1)
    for run in few:
        for name in [name for name in run.arrays if name.startswith("judged/conv")]:
            run.arrays[name] = np.clip(0.9 + CHANCE.normal(0, 0.2, (2, 500)), 0.01, 0.99).astype(np.float16)
    assert verdict("UCSD AUROC", few) == ("undecided", "reduced: 1 of 3 seeds")


@pytest.mark.parametrize(
    ("difference", "direction"),
    [((0.1, 0.05, 0.15), "supported"), ((-0.1, -0.15, -0.05), "contradicted"), ((0.01, -0.1, 0.12), "undecided")],
)
def test_ucsd_against_the_reconstruction_error(difference, direction):
    assert verdict("UCSD baseline", ucsd_runs((0.9, 0.9, 0.9), difference=difference))[0] == direction


@pytest.mark.parametrize(
    ("aurocs", "direction"),
    [((0.7, 0.9, 0.8), "supported"), ((0.8, 0.8, 0.8), "contradicted"), ((0.8, 0.8, 0.9), "mixed")],
)
def test_layers_differ_or_are_the_same(aurocs, direction):
    assert verdict("UCSD layers", ucsd_runs(aurocs))[0] == direction


def mvtec_runs(ours, iou, untrained=0.5, others=0.5, missed=0.7, categories=("bottle", "metal_nut", "pill"), seeds=3):
    runs = []
    for category in categories:
        for seed in range(seeds):
            arrays, line = course(judges.MVTEC_MAP, ours, untrained)
            more, prior = course(names.PRIOR, 0.5, 0.5)
            measures = [names.AUROC, names.BEST_IOU]
            rows = [line, prior, row(names.AUROC, ours, judges.MVTEC_MAP, n=36)]
            rows.append(row(names.BEST_IOU, iou, judges.MVTEC_MAP, n=36))
            rows.append(row(names.MISSED, missed, judges.MVTEC_MAP, n=60))
            rows += [row(names.AUROC, others, name, n=36) for name in (names.ERROR, names.SSIM)]
            # The rows of the last checkpoint come first in a record.
            rows = rows[2:] + rows[:2]
            resamples = {judges.MVTEC_MAP: (ours, iou)} | dict.fromkeys((names.ERROR, names.SSIM), (others, 0.1))
            for name, (auroc, overlap) in resamples.items():
                drawn = np.array([[auroc], [overlap]]) + CHANCE.normal(0, 0.01, (2, 500))
                more[f"resamples/{name}"] = drawn.astype(np.float16)
            parameters = {"category": category, "recipe": "report1", "seed": seed}
            runs.append(make_run("mvtec", parameters, rows, arrays | more, resamples={"measures": measures}))
    return runs


@pytest.mark.parametrize(
    ("ours", "iou", "untrained", "direction"),
    [
        (0.97, 0.5, 0.5, "supported"),
        (0.6, 0.01, 0.5, "contradicted"),
        (0.97, 0.01, 0.5, "mixed"),
        (0.97, 0.5, 0.99, "mixed"),  # the untrained networks are better
    ],
)
def test_mvtec_reaches_published_means_or_not(ours, iou, untrained, direction):
    assert verdict("MVTec AUROC and IoU", mvtec_runs(ours, iou, untrained)) == (direction, "full")


def test_outdated_categories_count_only_where_there_are_no_others():
    runs, old = mvtec_runs(0.97, 0.5), mvtec_runs(0.6, 0.01, categories=("grid",))
    old = [replace(run, record=run.record | {"protocols": {"PIXEL": 0}}) for run in old]
    assert verdict("MVTec AUROC and IoU", [*runs, *old]) == ("supported", "full")


@pytest.mark.parametrize(("others", "direction"), [(0.5, "supported"), (0.99, "contradicted"), (0.97, "undecided")])
def test_mvtec_against_other_methods(others, direction):
    assert verdict("MVTec other methods", mvtec_runs(0.97, 0.5, others=others))[0] == direction


@pytest.mark.parametrize(("missed", "direction"), [(0.8, "supported"), (0.2, "contradicted"), (0.5, "undecided")])
def test_most_maps_miss_or_do_not(missed, direction):
    assert verdict("MVTec share", mvtec_runs(0.6, 0.1, missed=missed))[0] == direction
    outside = mvtec_runs(0.6, 0.1, missed=0.99, categories=("bottle",))  # none of the report's ten
    assert verdict("MVTec share", outside) == ("undecided", "none")


def ablation_runs(relu, normalised, width=0.002):
    runs = []
    for dataset in judges.ABLATION_DATA_SETS:
        changes = zip(judges.ABLATION_STEPS.values(), (relu, normalised), strict=True)
        rows = [
            row(names.CHANGE, value, switch, CODE, low=value - width, high=value + width) for switch, value in changes
        ]
        runs.append(make_run("ablations", {"dataset": dataset, "model": "one", "seed": 0}, rows, test={"measured": 50}))
    return runs


def test_rows_of_jobs_count_as_ablations_do():
    mnist, ucsd, mvtec = ablation_runs(0.001, 0.001)
    jobs = [
        make_run(chapter, {"recipe": "report1", "seed": 0} | given, run.record["metrics"])
        for run, chapter, given in ((ucsd, "ucsd", {}), (mvtec, "mvtec", {"category": "pill"}))
    ]
    assert verdict("discrepancies", [mnist, *jobs])[0] == "supported"
    other = make_run("ucsd", {"recipe": "report2_code", "seed": 0}, ablation_runs(0.1, 0.1)[1].record["metrics"])
    assert verdict("discrepancies", [mnist, *jobs, other])[0] == "supported"
    assert verdict("discrepancies", [mnist, other])[0] == "undecided"
    old = make_run("ablations", {"dataset": "ucsd", "model": "report1"}, ablation_runs(0.1, 0.1)[1].record["metrics"])
    old = replace(old, record=old.record | {"protocols": {"ablations": 0}, "test": {"measured": 99}})
    assert judges.ablated([old, jobs[0]]) == judges.ablated([jobs[0], old]) == {("ucsd", "report1"): jobs[0]}


@pytest.mark.parametrize(
    ("relu", "normalised", "width", "direction"),
    [
        (0.001, -0.002, 0.002, "supported"),
        (0.1, -0.1, 0.002, "contradicted"),
        (0.1, 0.001, 0.002, "mixed"),
        (0.005, 0.001, 0.05, "undecided"),
    ],
)
def test_whether_discrepancies_hardly_matter(relu, normalised, width, direction):
    assert verdict("discrepancies", ablation_runs(relu, normalised, width)) == (direction, "reduced: 1 of 3 seeds")


def test_of_several_ablations_of_a_model_the_longest_trained_and_then_the_largest_counts():
    runs, other = ablation_runs(0.001, 0.001), ablation_runs(0.1, 0.1)
    for measured, direction in ((49, "supported"), (51, "contradicted")):
        again = [replace(run, record=run.record | {"test": {"measured": measured}}) for run in other]
        assert verdict("discrepancies", [*runs, *again])[0] == verdict("discrepancies", [*again, *runs])[0] == direction


# Claims on disentanglement --------------------------------------------------------------------------------------------


def sprites(scores, *, costs=(40.0, 40.0), overlaps=(0.5, 0.5), seeds=3, gammas=sprite_judges.GAMMAS, noise=0.01):
    runs = []
    for gamma in gammas:
        for place, (weight, score) in enumerate(scores.items()):
            variant = "variant" if weight else "none"
            for seed in range(seeds):
                parameters = {"beta": 1, "gamma": gamma, "lambda": weight, "seed": seed, "recipe": "report2"}
                parameters |= {"attention": "liu2020" if weight else "none"}
                parameters |= dict.fromkeys(("layer", "alpha", "pairs"), variant)
                wobble = noise * CHANCE.normal()
                metrics = [
                    row(names.METRIC, score + wobble, *sprite_judges.METRIC[1:]),
                    row(names.OVERLAP, overlaps[min(place, 1)] + wobble, *sprite_judges.OVERLAP[1:]),
                    row(names.RECONSTRUCTION, costs[min(place, 1)] + wobble),
                ]
                runs.append(make_run("disentanglement", parameters, metrics, kind="rendered"))
    return runs


@pytest.mark.parametrize(
    ("scores", "direction"),
    [({0: 0.6, 1: 0.8}, "supported"), ({0: 0.8, 1: 0.6}, "contradicted"), ({0: 0.7, 1: 0.7}, "undecided")],
)
def test_whether_the_loss_raises_the_metric(scores, direction):
    assert verdict("dSprites metric", sprites(scores)) == (direction, "full")


def test_seeds_and_weights_that_are_missing_leave_a_claim_undecided():
    assert verdict("dSprites metric", sprites({0: 0.6, 1: 0.8}, seeds=1)) == ("undecided", "reduced: 1 of 3 seeds")
    assert verdict("dSprites metric", sprites({0: 0.6, 1: 0.8}, gammas=(10, 40)))[0] == "undecided"
    other = [replace(run, parameters=run.parameters | {"attention": "brongers2021"}) for run in sprites({1: 0.8})]
    assert verdict("dSprites metric", other) == ("undecided", "none")


@pytest.mark.parametrize(
    ("scores", "costs", "direction"),
    [
        ({0: 0.6, 1: 0.8}, (40, 40), "supported"),
        ({0: 0.6, 1: 0.8}, (40, 60), "contradicted"),  # at a price
        ({0: 0.6, 1: 0.8}, (40, 40.5), "supported"),  # at a small one
        ({0: 0.8, 1: 0.6}, (40, 20), "contradicted"),
    ],
)
def test_whether_the_tradeoff_is_better(scores, costs, direction):
    assert verdict("dSprites trade-off", sprites(scores, costs=costs))[0] == direction


@pytest.mark.parametrize(("overlaps", "direction"), [((0.5, 0.3), "supported"), ((0.3, 0.5), "contradicted")])
def test_whether_maps_come_apart(overlaps, direction):
    assert verdict("dSprites maps", sprites({0: 0.7, 1: 0.7}, overlaps=overlaps))[0] == direction


@pytest.mark.parametrize(
    ("scores", "direction"),
    [((0.5, 0.6, 0.8), "supported"), ((0.8, 0.6, 0.5), "contradicted"), ((0.5, 0.8, 0.6), "contradicted")],
)
def test_whether_the_largest_weight_is_best(scores, direction):
    weights = dict(zip(sprite_judges.LAMBDAS, scores, strict=True))
    assert verdict("dSprites λ", sprites(weights))[0] == direction


def test_interval_over_seeds_is_students():
    values = [0.1, 0.4, 0.2, 0.6]
    low, high = judging.seed_interval(values)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (low, high) == pytest.approx((expected.low, expected.high))
    with pytest.raises(ValueError, match="two or more, got 1"):
        judging.seed_interval([0.5])


# The table ------------------------------------------------------------------------------------------------------------


def test_every_claim_has_a_direction_a_strength_and_what_would_decide_it():
    assert len({claim.id for claim in CLAIMS}) == len(CLAIMS)
    sample = mnist_runs(0.9, 0.8, kind="sample")
    for runs in ([], sample):
        table = verdicts(runs)
        assert table["id"].tolist() == [claim.id for claim in CLAIMS]
        assert set(table["direction"]) == {"undecided"} and set(table["strength"]) == {"none"}
        assert table["would_decide"].str.contains("papermill book/|none here").all()
    table = verdicts(mnist_runs(0.9, 0.8)).set_index("id")
    assert table.loc["MNIST maps", ["verdict", "would_decide"]].tolist() == ["supported (full)", ""]
    weak = verdicts(mnist_runs(0.9, 0.8, used=10)).set_index("id").loc["MNIST maps"]
    assert weak["verdict"] == "supported (reduced: 10 of 100 epochs)" and weak["would_decide"]


def test_sizes_are_facts():
    def of(count, recipe="liu2020"):
        return make_run("mnist", {"digit": 1, "recipe": recipe, "seed": 0}, [row(names.PARAMETERS, count)])

    assert facts([]) == "Facts checked: none yet."
    assert "MNIST 13,216,193 (as published)." in facts([of(13_216_193), of(5, "brongers2021")])
    assert "MNIST 13,216,194 (published 13,216,193)." in facts([of(13_216_194)])
