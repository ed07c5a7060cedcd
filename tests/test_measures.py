"""What a job keeps of every map: against scikit-learn, slow resampling and slow loops."""

from collections import OrderedDict
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, jaccard_score, roc_auc_score
from torch import nn

from expvae import PRESETS, Method, attention
from expvae.metrics import CONVENTIONS
from expvae_book import explanation, measures, names, recipes, weights
from maps import anomaly_maps, exact

SIDE, RESAMPLES, THRESHOLD = 16, 100, 0.75
UNIT_N = torch.arange(12) // 3  # four clips of three frames


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    monkeypatch.setattr(measures, "RESAMPLES", RESAMPLES)


def scene(seed=0, subset="", unit_N=UNIT_N):
    """A map of twelve images and their truth; the images of every third place are normal."""
    score_NYX, truth_NYX = anomaly_maps(12, SIDE, seed=seed)
    truth_NYX[1::3, 2:6, 2:7] = True
    truth_NYX[::3] = False
    return torch.from_numpy(score_NYX), measures.Truth(torch.from_numpy(truth_NYX), unit_N, subset)


def whole(truth):
    return measures.Truth(truth.truth_NYX.flatten(1).any(1), truth.unit_N)


def another(score_NYX, seed=9):
    noise = torch.randn(score_NYX.shape, generator=torch.Generator().manual_seed(seed))
    return score_NYX + 0.7 * noise


def value(rows, metric, method, subset=""):
    (row,) = [row for row in rows if (row["metric"], row["method"], row["subset"]) == (metric, method, subset)]
    return row


def slow_resamples(score_N, truth_N, unit_N):
    """scikit-learn's AUROC of each resample of whole units; of pixels, or of images."""
    rng, units = np.random.default_rng(measures.SEED), np.unique(unit_N)
    found = []
    for _ in range(RESAMPLES):
        drawn = units[rng.integers(len(units), size=len(units))]
        at = np.concatenate([np.flatnonzero(unit_N == unit) for unit in drawn])
        truth = truth_N[at].ravel()
        found.append(np.nan if truth.all() or not truth.any() else roc_auc_score(truth, score_N[at].ravel()))
    return np.array(found)


def test_rows_of_a_map_are_scikit_learns():
    score_NYX, truth = scene(subset="test clips")
    measured = measures.Measured()
    measured.add("conv1, ours", score_NYX, truth, THRESHOLD)
    measured.images("conv1, ours", score_NYX, whole(truth))
    flat = truth.truth_NYX.flatten().numpy(), score_NYX.flatten().numpy()
    expected = vars(exact(score_NYX.numpy(), truth.truth_NYX.numpy(), regions=True, threshold=THRESHOLD))
    assert measures.FIELDS.keys() <= expected.keys()
    for field, title in measures.FIELDS.items():
        row = value(measured.rows, title, "conv1, ours", "test clips")
        assert row["value"] == pytest.approx(expected[field], abs=1e-6), title
        assert row["low"] <= row["value"] <= row["high"]
        assert row["n"] == 4
    assert expected["auroc"] == pytest.approx(roc_auc_score(*flat), abs=1e-9)
    assert expected["average_precision"] == pytest.approx(average_precision_score(*flat), abs=1e-9)
    flagged = flat[1] >= np.float32(THRESHOLD)
    assert expected["iou"] == pytest.approx(jaccard_score(flat[0], flagged), abs=1e-9)

    for average, classes in CONVENTIONS:
        found = {
            choice: value(measured.rows, f"IoU, {average}, {classes}", "conv1, ours", choice)
            for choice in ("validation", "grid", "best")
        }
        assert found["grid"]["value"] <= found["best"]["value"] + 0.01
        assert found["best"]["low"] <= found["best"]["value"] <= found["best"]["high"]
    assert value(measured.rows, "IoU, pooled, anomalous", "conv1, ours", "validation")["value"] == pytest.approx(
        jaccard_score(flat[0], flagged)
    )
    both = jaccard_score(flat[0], flagged, average="macro")
    assert value(measured.rows, "IoU, pooled, both", "conv1, ours", "validation")["value"] == pytest.approx(both)
    per_image = [
        jaccard_score(truth_YX.flatten(), score_YX.flatten() >= THRESHOLD)
        for truth_YX, score_YX in zip(truth.truth_NYX, score_NYX, strict=True)
        if truth_YX.any()
    ]
    assert value(measured.rows, "IoU, per defective image, anomalous", "conv1, ours", "validation")[
        "value"
    ] == pytest.approx(np.mean(per_image))

    flag_N = truth.truth_NYX.flatten(1).any(1)
    for how, score_N in {"mean": score_NYX.mean((1, 2)), "maximum": score_NYX.amax((1, 2))}.items():
        row = value(measured.rows, "image AUROC", "conv1, ours", how)
        assert row["value"] == pytest.approx(roc_auc_score(flag_N, score_N), abs=1e-6)
    assert len(measured.rows) == len(measures.FIELDS) + 3 * len(CONVENTIONS) + 2


def test_whole_images_are_not_measured_where_none_is_normal():
    score_NYX, truth = scene()
    kept = truth.truth_NYX.flatten(1).any(1)
    measured = measures.Measured()
    defective = measures.Truth(truth.truth_NYX[kept], truth.unit_N[kept])
    measured.add("map", score_NYX[kept], defective, THRESHOLD)
    measured.images("map", score_NYX[kept], whole(defective))
    measured.images("map", score_NYX[~kept], measures.Truth(kept[~kept], truth.unit_N[~kept]))
    assert not [row for row in measured.rows if row["metric"] == "image AUROC"]
    drawn = measured.replicates(["map"])["resamples/map"]
    lacking = [measure.startswith("image AUROC") for measure in measures.PAIRED]
    assert np.isnan(drawn).all(axis=1).tolist() == lacking


def test_counts_do_not_depend_on_how_many_images_are_counted_at_once(monkeypatch):
    score_NYX, truth = scene()
    found = []
    for at_once in (1, 5, 64):
        monkeypatch.setattr(measures, "AT_ONCE", at_once)
        found.append(truth.count(score_NYX, regions=True).compute(THRESHOLD))
    assert found[0] == found[1] == found[2]


def test_what_a_resample_gave_is_what_slow_resampling_gives():
    score_NYX, truth = scene()
    measured = measures.Measured()
    measured.add("map", score_NYX, truth, THRESHOLD)
    measured.images("map", score_NYX, whole(truth))
    drawn = measured.replicates(["map"])
    assert drawn.keys() == {"resamples/map"}
    assert drawn["resamples/map"].dtype == np.float16
    assert drawn["resamples/map"].shape == (len(measures.PAIRED), RESAMPLES)
    flag_N = truth.truth_NYX.flatten(1).any(1).numpy()
    expected = {
        "pixel AUROC": slow_resamples(score_NYX.numpy(), truth.truth_NYX.numpy(), UNIT_N.numpy()),
        "image AUROC, mean": slow_resamples(score_NYX.mean((1, 2)).numpy(), flag_N, UNIT_N.numpy()),
        "image AUROC, maximum": slow_resamples(score_NYX.amax((1, 2)).numpy(), flag_N, UNIT_N.numpy()),
    }
    for name, slow_R in expected.items():
        ours_R = drawn["resamples/map"][measures.PAIRED.index(name)].astype(float)
        np.testing.assert_allclose(ours_R, slow_R, atol=2**-11 + 1e-4)  # half precision
        exact_R = measured.measured["map"][name][1]
        np.testing.assert_allclose(exact_R, slow_R, atol=1e-4)
    row = value(measured.rows, "pixel AUROC", "map")
    ends = np.nanquantile(expected["pixel AUROC"], [0.025, 0.975])
    assert [row["low"], row["high"]] == pytest.approx(ends, abs=1e-4)


def test_differences_are_those_of_a_paired_bootstrap():
    score_NYX, truth = scene()
    maps = {"one": score_NYX, "two": another(score_NYX), "three": another(score_NYX, 4)}
    measured = measures.Measured()
    for name, map_NYX in maps.items():
        measured.add(name, map_NYX, truth, THRESHOLD)
    rows = measured.differences(["one", "two"], ["three"], "test clips")
    assert [(row["method"], row["subset"], row["n"]) for row in rows] == [
        ("one − three", "test clips", 4),
        ("two − three", "test clips", 4),
    ]
    truth_NYX, unit_N = truth.truth_NYX.numpy(), UNIT_N.numpy()
    slow = {name: slow_resamples(map_NYX.numpy(), truth_NYX, unit_N) for name, map_NYX in maps.items()}
    whole = {name: roc_auc_score(truth_NYX.ravel(), map_NYX.numpy().ravel()) for name, map_NYX in maps.items()}
    for row, name in zip(rows, ("one", "two"), strict=True):
        assert row["metric"] == "pixel AUROC, difference"
        assert row["value"] == pytest.approx(whole[name] - whole["three"], abs=1e-6)
        low, high = np.nanquantile(slow[name] - slow["three"], [0.025, 0.975])
        assert (row["low"], row["high"]) == (pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4))
        unpaired = np.nanquantile(slow[name] - np.roll(slow["three"], 1), [0.025, 0.975])
        assert row["high"] - row["low"] < unpaired[1] - unpaired[0]


def test_resamples_of_two_jobs_on_the_same_units_are_paired():
    """What each has stored is enough for the interval of their difference."""
    score_NYX, truth = scene()
    together, apart = measures.Measured(), [measures.Measured(), measures.Measured()]
    maps = {"one": score_NYX, "two": another(score_NYX)}
    for alone, (name, map_NYX) in zip(apart, maps.items(), strict=True):
        together.add(name, map_NYX, truth, THRESHOLD)
        alone.add(name, map_NYX, replace(truth, subset="another name"), THRESHOLD)
    (row,) = together.differences(["one"], ["two"])
    stored = [alone.replicates([name])[f"resamples/{name}"] for alone, name in zip(apart, maps, strict=True)]
    difference_R = np.subtract(*(drawn.astype(float)[0] for drawn in stored))
    assert np.nanquantile(difference_R, [0.025, 0.975]) == pytest.approx([row["low"], row["high"]], abs=2**-10)


# --- maps of a model -------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A VAE of two convolutions and four latents."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 3, 4, stride=2, padding=1),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(3, 4, 4, stride=2, padding=1),
                relu2=nn.ReLU(),
                flatten=nn.Flatten(),
            )
        )
        self.mu, self.logvar = nn.Linear(64, 4), nn.Linear(64, 4)

    def encode(self, x_BCYX):
        hidden = self.encoder(x_BCYX)
        return self.mu(hidden), self.logvar(hidden)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    return Small().eval()


@pytest.fixture(scope="module")
def x_NCYX():
    return torch.randint(0, 256, (7, 1, SIDE, SIDE), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)


NORMAL = (torch.tensor([0.2, -0.1, 0.0, 0.3]), torch.tensor([-1.0, 0.0, -2.0, -0.5]))


@pytest.mark.parametrize("preset", [*PRESETS, "normal_difference", "most_deviant"])
def test_every_preset_and_score_has_its_own_method(preset):
    expected = PRESETS.get(preset, Method(score=preset if preset not in PRESETS else "each_mean"))
    assert explanation.method_of(preset) == expected
    assert len({explanation.method_of(name) for name in measures.PRESETS}) == len(measures.PRESETS)


def test_every_layer_is_explained_by_every_preset(model, x_NCYX):
    options = {"batch": 3, "seed": 5, "normal": NORMAL}
    found = list(measures.layers_and_presets(model, product(("conv1", "conv2"), measures.PRESETS), x_NCYX, **options))
    assert [name for name, _ in found] == [
        f"{layer}, {preset}" for layer in ("conv1", "conv2") for preset in measures.PRESETS
    ]
    maps = dict(found)
    for layer in ("conv1", "conv2"):
        for preset in ("liu2020_paper", "liu2020_code", "brongers2021", "most_deviant"):
            method = PRESETS.get(preset, Method(score="most_deviant"))
            parts = [
                attention(model.encode, f"encoder.{layer}", x_BCYX / 255, method, normal=NORMAL).map_BYX
                for x_BCYX in x_NCYX.split(3)
            ]
            torch.testing.assert_close(maps[f"{layer}, {preset}"], torch.cat(parts), rtol=1e-4, atol=1e-6)
    for layer in ("conv1", "conv2"):  # no two presets give one map
        for i, one in enumerate(measures.PRESETS):
            for other in measures.PRESETS[i + 1 :]:
                assert not torch.allclose(maps[f"{layer}, {one}"], maps[f"{layer}, {other}"])


def test_examples_are_the_maps_at_the_resolution_of_the_layer(model, x_NCYX):
    presets = ("liu2020_paper", "liu2020_code", "most_deviant")
    found = measures.examples(model, ("conv1", "conv2"), presets, x_NCYX[:3], NORMAL, 0)
    maps = {f"{layer}, {preset}" for layer in ("conv1", "conv2") for preset in presets}
    assert found.keys() == maps | {f"{name}, peak" for name in maps}
    for layer, side in (("conv1", 8), ("conv2", 4)):
        for preset in presets:
            method = PRESETS.get(preset, Method(score="most_deviant"))
            result = attention(model.encode, f"encoder.{layer}", x_NCYX[:3] / 255, method, normal=NORMAL)
            ours = found[f"{layer}, {preset}"]
            assert (ours.shape, ours.dtype) == ((3, side, side), np.float16)
            assert ours.max() == 1
            restored = ours.astype(float) * found[f"{layer}, {preset}, peak"]
            np.testing.assert_allclose(restored, result.map_BIHW.mean(1), rtol=2**-10, atol=1e-6)
    again = measures.examples(model, ("conv1",), ("normal_difference",), x_NCYX[:3], NORMAL, 0)
    same, other = (
        measures.examples(model, ("conv1",), ("normal_difference",), x_NCYX[:3], NORMAL, seed) for seed in (0, 1)
    )
    np.testing.assert_array_equal(again["conv1, normal_difference"], same["conv1, normal_difference"])
    assert not np.array_equal(same["conv1, normal_difference"], other["conv1, normal_difference"])


def test_a_course_holds_the_measures_at_each_stage_and_what_verdicts_pair(monkeypatch):
    monkeypatch.setattr(measures, "RESAMPLES", 100)
    score_NYX, truth = scene()
    prior_NYX = another(score_NYX, 99)
    stages = [
        {"one": another(score_NYX, seed), "two": another(score_NYX, seed + 50), names.PRIOR: prior_NYX}
        for seed in range(4)
    ]
    course = measures.Course()
    for steps, maps in zip((0, 5, 9, 20), stages, strict=True):
        course.add(steps, maps.items(), truth)
    arrays, flat = course.arrays(), truth.truth_NYX.flatten().numpy()
    kept = {f"{part}/{name}" for part in ("course", "judged") for name in ("one", "two", names.PRIOR)}
    assert arrays.keys() == kept
    rows, aurocs = course.rows(), {}
    for name in ("one", "two", names.PRIOR):
        aurocs[name] = [roc_auc_score(flat, maps[name].flatten()) for maps in stages]
        precisions = [average_precision_score(flat, maps[name].flatten()) for maps in stages]
        assert arrays[f"course/{name}"][:, 0].tolist() == [0, 5, 9, 20]
        np.testing.assert_allclose(arrays[f"course/{name}"][:, 1], aurocs[name], atol=1e-6)
        np.testing.assert_allclose(arrays[f"course/{name}"][:, 2], precisions, atol=1e-6)
        for metric, values in {"pixel AUROC": aurocs[name], "average precision": precisions}.items():
            row = value(rows, metric, name, "mean of the last stages")
            assert row["value"] == pytest.approx(np.mean(values[-3:]), abs=1e-6)
        # The resamples of each stage are those of the same seed, so that stages are paired.
        drawn_SR = np.array([truth.count(maps[name]).resampled_aurocs(measures.SEED, 100) for maps in stages])
        judged = np.array([drawn_SR[0], drawn_SR[1:].mean(0)])
        np.testing.assert_allclose(arrays[f"judged/{name}"], judged, atol=2**-11)
        row = value(rows, "pixel AUROC, difference", f"{name} − untrained", "mean of the last stages")
        assert row["value"] == pytest.approx(np.mean(aurocs[name][-3:]) - aurocs[name][0], abs=1e-6)
        low, high = np.percentile(judged[1] - judged[0], [2.5, 97.5])
        assert (row["low"], row["high"]) == pytest.approx((low, high), abs=1e-6)
    row = value(rows, "pixel AUROC, difference", f"one − {names.PRIOR}", "mean of the last stages")
    assert row["value"] == pytest.approx(np.mean(aurocs["one"][-3:]) - aurocs[names.PRIOR][-1], abs=1e-6)


def test_a_course_that_did_not_see_the_untrained_network_compares_nothing_with_it():
    score_NYX, truth = scene()
    course = measures.Course("strokes")
    for steps in (5, 9):
        course.add(steps, [("one", another(score_NYX, steps))], truth)
    only = measures.Course()
    only.add(0, [("one", score_NYX)], truth)  # told to end before the stages by which it is judged
    assert only.rows() == [] and np.isnan(only.arrays()["judged/one"][1]).all()
    assert np.isnan(course.arrays()["strokes/judged/one"][0]).all()
    assert all(row["metric"] != "pixel AUROC, difference" for row in course.rows())
    assert {row["subset"].partition(", ")[2] for row in course.rows()} == {"strokes"}


def test_a_budget_counts_epochs_images_and_the_steps_of_a_slow_loop():
    recipe = replace(recipes.UCSD["report1"], batch_size=32)
    asked, used = (3, 100), (2, 65)
    steps = [sum(1 for _ in range(epochs) for _ in range(0, images, 32)) for epochs, images in (asked, used)]
    counts = {"images": {"asked": 300, "used": 130}, "steps": {"asked": steps[0], "used": steps[1]}}
    assert steps == [12, 6]
    of = measures.budget("epochs", recipe, asked=asked, used=used)
    assert of == {"unit": "epochs", "asked": 3, "used": 2} | counts
    of = measures.budget("images", recipe, asked=asked, used=used)
    assert of == {"unit": "images", "asked": 300, "used": 130} | counts


# --- over a training --------------------------------------------------------------------------------------------------


class Fit:
    """Stands for a training: what it was asked for, with a cache of epochs, and an end that it does not go beyond."""

    def __init__(self, cached=(), end=None):
        self.asked, self.cached, self.end = [], cached, end

    def __call__(self, epochs):
        if not weights._may_train.get():
            if epochs not in self.cached:
                raise weights.NotCachedError("not there")
        elif epochs not in self.cached:
            self.asked.append(epochs)
        done = epochs if self.end is None else min(epochs, self.end)
        return SimpleNamespace(history=SimpleNamespace(kl=[0.0] * done))


def test_a_training_goes_to_its_end_by_way_of_stages():
    fit = Fit()
    assert [done for done, _ in measures.stages(fit, 100)] == [0, 2, 5, 10, 20, 40, 60, 80, 90, 100] == fit.asked
    assert [done for done, _ in measures.stages(Fit(), 2)] == [0, 1, 2]
    assert [done for done, _ in measures.stages(Fit(), 0)] == [0]


def test_a_training_that_ends_early_has_its_last_stage_there():
    fit = Fit(end=13)
    assert [done for done, _ in measures.stages(fit, 100)] == [0, 2, 5, 10, 13]
    assert fit.asked == [0, 2, 5, 10, 20]


def test_nothing_is_trained_where_the_end_is_in_the_cache():
    fit = Fit(cached=(10, 100))
    assert [done for done, _ in measures.stages(fit, 100)] == [0, 10, 100]
    assert fit.asked == [0]  # the untrained network, which is no training


def test_a_course_without_an_anomaly_is_empty():
    score_NYX, truth = scene()
    course = measures.Course()
    course.add(0, [("map", score_NYX)], measures.Truth(truth.truth_NYX & False, truth.unit_N))
    assert course.arrays() == {}
    assert course.rows() == []
