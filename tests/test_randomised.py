"""Networks with random weights, against slow loops, SciPy and a second way to the same statistics."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from expvae import attention
from expvae.models import MNISTVAE, UCSDVAE, BrongersUCSDVAE, MVTecVAE
from expvae_book import measures, names, randomised, tables, training, truth
from expvae_book.chapters import Job
from expvae_book.data import mnist
from expvae_book.jobs import controls, digits
from expvae_book.jobs import mnist as mnist_job
from expvae_book.names import STROKES


def images(count, channels, side, seed=0):
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, channels, side, side), generator=chance, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("make", "layers"),
    [
        (MNISTVAE, ["conv1", "conv2", "linear", "latents"]),
        (BrongersUCSDVAE, ["conv1", "conv2", "conv3", "linear", "latents"]),
        (MVTecVAE, ["conv1", "layer1", "layer2", "layer3", "layer4", "linear", "latents"]),
    ],
)
def test_layers_hold_all_that_leads_to_the_latents(make, layers):
    model = make(4)
    found = randomised.groups(model)
    assert list(found) == layers
    together = [name for names_ in found.values() for name in names_]
    assert sorted(together) == sorted(name for name in model.state_dict() if not name.startswith("decoder"))


def test_randomising_changes_the_tensors_it_names_and_no_others():
    trained, (other, _) = training.build(lambda: UCSDVAE(4), 0), randomised.others(lambda: UCSDVAE(4), 0)
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    said = []
    for step, chosen in randomised.steps(trained):
        mixed = randomised.randomise(trained, other, chosen).state_dict()
        for name, tensor in mixed.items():
            assert torch.equal(tensor, other.state_dict()[name] if name in chosen else before[name])
        said.append(step)
    assert said[0] == "from the latents to latents" and said[-1] == "from the image to linear"
    assert said[4] == "from the latents to conv1"  # all of them
    assert all(torch.equal(before[name], tensor) for name, tensor in trained.state_dict().items())
    assert not torch.equal(other.encoder.conv1.weight, trained.encoder.conv1.weight)


def test_statistics_come_from_the_training_images():
    model, x_NCYX = training.build(lambda: BrongersUCSDVAE(4), 0).eval(), images(32, 1, 96)
    first = model.encoder.norm1
    moments = {}
    handle = first.register_forward_pre_hook(lambda _module, given: moments.update(x=given[0]))
    with torch.no_grad():
        model.encode(training.to_unit(x_NCYX))
    handle.remove()
    settled = randomised.settle(model, x_NCYX)
    assert settled is model and not any(module.training for module in model.modules())
    torch.testing.assert_close(first.running_mean, moments["x"].mean((0, 2, 3)), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(first.running_var, moments["x"].var((0, 2, 3)), rtol=1e-2, atol=1e-4)
    assert first.momentum == training.build(lambda: BrongersUCSDVAE(4), 0).encoder.norm1.momentum
    plain = training.build(lambda: UCSDVAE(4), 0)
    assert randomised.settle(plain, images(4, 1, 100)) is plain


def test_rank_correlations_are_scipys():
    chance = torch.Generator().manual_seed(3)
    one, two = (torch.rand(5, 7, 9, generator=chance) for _ in range(2))
    one[1], two[2] = one[1].round(), two[2].round()  # with ties
    one[4] = 0.5  # the same everywhere
    found = randomised.rank_correlation(one, two)
    expected = [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(one[:4], two[:4], strict=True)]
    np.testing.assert_allclose(found[:4], expected, atol=1e-12)
    assert np.isnan(found[4])


def test_what_explains_a_map_is_told_on_images_that_the_fit_has_not_seen():
    chance = torch.Generator().manual_seed(4)
    edges, brightness, unrelated, noise = (torch.randn(400, 8, 8, generator=chance) for _ in range(4))
    place_YX = torch.randn(8, 8, generator=chance)
    map_NYX = 3 * edges + 2 * brightness + place_YX + noise
    rows = randomised.explained_rows(map_NYX, {"edges": edges, "brightness": brightness, "other": unrelated}, "m", "s")
    of = {row["subset"]: row["value"] for row in rows}
    assert {(row["metric"], row["method"], row["n"]) for row in rows} == {(names.EXPLAINED, "m", 200)}
    # Of independent parts R² is their share of the variance.
    place = float(place_YX.var(correction=0))
    whole = 9 + 4 + place + 1
    expected = {"edges": 9, "brightness": 4, "other": 0, names.POSITION: place, names.TOGETHER: whole - 1}
    assert of == pytest.approx(
        {f"s; {title}": part / whole for title, part in expected.items()} | {f"s; {names.EXCHANGED}": place / whole},
        abs=0.02,
    )
    assert randomised.explained_rows(torch.ones(8, 4, 4), {}, "m", "s") == []


def test_the_fit_is_that_of_least_squares():
    chance = torch.Generator().manual_seed(5)
    picture, map_NYX = (torch.rand(6, 4, 4, generator=chance) for _ in range(2))
    rows = randomised.explained_rows(map_NYX, {"edges": picture}, "m", "s")
    order = torch.randperm(6, generator=torch.Generator().manual_seed(measures.SEED))
    (x, y), (seen_x, seen_y) = (
        [of[part].double().flatten().numpy() for of in (picture, map_NYX)] for part in (order[:3], order[3:])
    )
    slope, constant = np.polyfit(x, y, 1)
    left = ((seen_y - slope * seen_x - constant) ** 2).sum() / ((seen_y - seen_y.mean()) ** 2).sum()
    assert rows[0]["value"] == pytest.approx(1 - left, abs=1e-9)


def test_a_cascade_ends_at_the_random_network_and_keeps_the_trained_maps():
    model, pair = training.build(lambda: MNISTVAE(4), 0).eval(), randomised.others(lambda: MNISTVAE(4), 0)
    other = pair[0]
    x_NCYX = images(20, 1, 28)

    def explain(one):
        return {"code": attention(one.encode, "encoder.conv2", training.to_unit(x_NCYX), "liu2020_code").map_BYX}

    seen = measures.Truth(x_NCYX[:, 0] > 200, torch.arange(20))
    rows, kept = randomised.cascade(model, pair, x_NCYX, explain, seen)
    of = {(row["metric"], row["subset"]): row["value"] for row in rows}
    assert len(rows) == 2 * len(list(randomised.steps(model))) + 2
    trained = roc_auc_score(seen.truth_NYX.flatten(), explain(model)["code"].flatten())
    assert of[names.AUROC, "random nothing"] == pytest.approx(trained, abs=1e-6)
    two = zip(explain(pair[0])["code"], explain(pair[1])["code"], strict=True)
    floor = np.mean([spearmanr(a.flatten(), b.flatten()).statistic for a, b in two])
    assert of[names.KEPT_RANKS, "two random networks"] == pytest.approx(floor, abs=1e-6)
    random_NYX, trained_NYX = explain(other)["code"], explain(model)["code"]
    score = roc_auc_score(seen.truth_NYX.flatten(), random_NYX.flatten())
    assert of[names.AUROC, "random from the latents to conv1"] == pytest.approx(score, abs=1e-6)
    expected = np.mean(
        [spearmanr(a.flatten(), b.flatten()).statistic for a, b in zip(random_NYX, trained_NYX, strict=True)]
    )
    assert of[names.KEPT_RANKS, "random from the latents to conv1"] == pytest.approx(expected, abs=1e-6)
    assert set(kept) == {"compared/code", "compared/code, peak"}
    restored = kept["compared/code"].astype(float) * kept["compared/code, peak"]
    np.testing.assert_allclose(restored, trained_NYX[::2][:8], rtol=2**-10, atol=1e-6 * trained_NYX.max())


# --- planted truths ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", STROKES)
def test_a_planted_stroke_is_exactly_what_changed(kind):
    x_NYX = mnist.load("sample").test_NYX[:50]
    changed_NYX, mask_NYX = truth.planted(x_NYX, kind, 0)
    for before, after, mask in zip(x_NYX.tolist(), changed_NYX.tolist(), mask_NYX.tolist(), strict=True):
        different = [(i, j) for i in range(28) for j in range(28) if before[i][j] != after[i][j]]
        assert different == [(i, j) for i in range(28) for j in range(28) if mask[i][j]]
        assert {after[i][j] for i, j in different} <= {255 if kind == "strokes added" else 0}
        # As long and as wide as a stroke may be.
        reach = [max(ends) - min(ends) for ends in zip(*different, strict=True)]
        assert not different or np.hypot(*reach) <= 8 + 2 * 1.3 + 1
    assert (mask_NYX.flatten(1).sum(1) > 3).float().mean() > 0.9
    same = truth.planted(x_NYX, kind, 0)
    assert torch.equal(same[0], changed_NYX)
    assert not torch.equal(truth.planted(x_NYX, kind, 1)[0], changed_NYX)


def test_what_has_no_ink_loses_none():
    x_NYX = torch.zeros(2, 28, 28, dtype=torch.uint8)
    assert not truth.planted(x_NYX, "strokes erased", 0)[1].any()
    assert truth.planted(x_NYX, "strokes added", 0)[1].any()


def test_an_unknown_stroke_is_refused():
    with pytest.raises(ValueError, match=r"kind='bent' is unknown; choose one of: strokes added, strokes erased"):
        truth.planted.__wrapped__(torch.zeros(1, 28, 28, dtype=torch.uint8), "bent", 0)


def test_the_wrong_class_has_as_many_images_of_other_digits():
    right, wrong = (digits.load("sample", 1, "liu2020", of) for of in ("inliers", "outliers"))
    assert wrong.train_NCYX.shape == right.train_NCYX.shape and wrong.held_out_NCYX.shape == right.held_out_NCYX.shape
    assert torch.equal(wrong.test_NYX, right.test_NYX) and torch.equal(wrong.inlier_NCYX, right.inlier_NCYX)
    images = mnist.load("sample")
    known = {bytes(x.numpy()): int(label) for x, label in zip(images.train_NYX, images.train_label_N, strict=True)}
    seen = {known[bytes(x.numpy())] for x in (*wrong.train_NCYX[:, 0], *wrong.held_out_NCYX[:, 0])}
    assert seen == set(mnist.outliers(1))


# --- untrained networks -----------------------------------------------------------------------------------------------


@pytest.fixture
def few(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path))
    monkeypatch.setattr(measures, "RESAMPLES", 100)
    monkeypatch.setattr(measures, "PRESETS", ("liu2020_code",))
    monkeypatch.setitem(controls.NETWORKS, "mnist", 2)
    whole = digits.load

    def fewer(*arguments):
        seen = whole(*arguments)
        return replace(seen, test_NYX=seen.test_NYX[:60], label_N=seen.label_N[:60])

    monkeypatch.setattr(digits, "load", fewer)


PARAMETERS = {
    "control": "untrained",
    "dataset": "mnist",
    "digit": 1,
    "data": "sample",
    "device": "cpu",
}


def test_untrained_networks_are_those_that_trainings_start_from(few):
    run = controls.measure(Job("sanity", PARAMETERS, None))
    seen = digits.load("sample", 1, "liu2020")
    at = seen.outlier_N
    for seed in (0, 1):
        model = training.build(lambda: MNISTVAE(32), seed).eval()
        maps = attention(model.encode, "encoder.conv2", training.to_unit(seen.test_NYX[:, None]), "liu2020_code")
        score = roc_auc_score(seen.truths["truth"][at].flatten(), maps.map_BYX[at].flatten())
        row = run.metric(names.AUROC, "conv2, liu2020_code", f"random, seed {seed}")
        assert row["value"] == pytest.approx(score, abs=1e-5)
        assert row["n"] == int(at.sum())
        drawn = run.arrays[f"random, seed {seed}/resamples/conv2, liu2020_code"]
        assert drawn.shape == (3, 100)
        assert np.percentile(drawn[0].astype(float), 2.5) == pytest.approx(row["low"], abs=2**-11)
    told = run.rows(names.EXPLAINED)["subset"].str.rsplit("; ", n=1).str[-1]
    pictures = ["edges", "brightness", "mean image difference"]
    assert told.tolist() == 2 * [*pictures, names.POSITION, names.TOGETHER, names.EXCHANGED]
    again = controls.measure(Job("sanity", PARAMETERS, None))
    assert again.record["metrics"] == run.record["metrics"]


def test_maps_without_a_vae_are_measured_by_pixel_and_by_image(few, monkeypatch):
    chance = torch.Generator().manual_seed(0)
    fixed = {name: torch.rand(60, 28, 28, generator=chance) for name in ("padim", "nearest_neighbour")}
    for name, map_NYX in fixed.items():
        monkeypatch.setattr(controls.features, name, lambda *_, map_NYX=map_NYX, **__: map_NYX)
    monkeypatch.setattr(controls.features, "backbone", lambda initial, *_, **__: initial)
    monkeypatch.setattr(controls.imagenet, "load", lambda: None)
    run = controls.measure(Job("sanity", {**PARAMETERS, "control": "baselines"}, None))
    seen = digits.load("sample", 1, "liu2020")
    at = seen.outlier_N
    for name, key in (("PaDiM, random features", "padim"), ("nearest neighbour, random features", "nearest_neighbour")):
        score = roc_auc_score(seen.truths["truth"][at].flatten(), fixed[key][at].flatten())
        assert run.metric(names.AUROC, name)["value"] == pytest.approx(score, abs=1e-6)
        score = roc_auc_score(at, fixed[key].amax((1, 2)))
        assert run.metric(names.IMAGE_AUROC, name, "maximum")["value"] == pytest.approx(score, abs=1e-6)
    simple = [names.PRIOR, names.CENTRE, "input intensity", "mean image difference"]
    assert run.rows(names.AUROC)["method"].tolist() == [
        *simple,
        *(f"{n}, random features" for n in ("PaDiM", "nearest neighbour")),
    ]
    assert tables.without_vae(run)["Map"].tolist() == run.rows(names.AUROC)["method"].tolist()


def test_a_recipe_that_the_data_set_has_not_is_refused():
    with pytest.raises(ValueError, match=r"^recipe='brongers2021' is none of mnist; choose one of: liu2020, report1, "):
        controls.measure(Job("sanity", {**PARAMETERS, "recipe": "brongers2021"}, None))


def test_some_images_of_a_subject_keep_their_truths():
    known_N = torch.tensor([True, False, True, True])
    truth_M = torch.arange(3)[:, None, None].expand(3, 2, 2) == torch.arange(4).reshape(2, 2)
    subject = controls.Subject(
        images(2, 1, 2), images(4, 1, 2), known_N, measures.Truth(truth_M, torch.tensor([0, 2, 3])), known_N, {},
        lambda place: [], 2, mnist.load("sample").card, [],
    )  # fmt: skip
    few = subject.some(torch.tensor([1, 3]))
    assert few.truth.unit_N.tolist() == [3] and torch.equal(few.truth.truth_NYX, truth_M[2:])
    assert torch.equal(few.test_NCYX, subject.test_NCYX[[1, 3]]) and few.measured_N.tolist() == [False, True]


def test_a_random_map_does_not_know_where_strokes_were_planted(few, monkeypatch):
    found = {}

    def keep(measured, name, map_NYX, truth, fields):
        measured.measured[name] = {}
        found.update({truth.subset: map_NYX} if name == "random" else {})

    monkeypatch.setattr(measures.Measured, "pixels", keep)
    mnist_job.planted(training.build(lambda: MNISTVAE(32), 0).eval(), digits.load("sample", 1, "liu2020"))
    assert found.keys() == set(STROKES)
    for map_NYX in found.values():
        places_NYX = torch.rand(map_NYX.shape, generator=torch.Generator().manual_seed(measures.SEED))
        assert not torch.equal(map_NYX, places_NYX)  # its highest values lie at the strokes
