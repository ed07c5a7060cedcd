"""The ablations: maps against one call of the attention each, intervals against scikit-learn on resampled images."""

import ast
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score, roc_auc_score
from torch import nn

from expvae import PRESETS, attention, models
from expvae.models import MNISTVAE, UCSDVAE
from expvae_book import ablation, chapters, choices, explanation, judges, recipes, runs, training, weights
from expvae_book.choices import AUROC, IOU, REFERENCES
from expvae_book.data import mnist, mvtec, ucsd
from expvae_book.data.card import DataCard

BOOK = Path(__file__).resolve().parents[1] / "book"
CPU = torch.device("cpu")
NOISE = 3


class Small(nn.Module):
    """A VAE for images of 12x12, with an activation in place behind its convolution."""

    __module__ = f"{models.__name__}.small"  # as one of the library's

    def __init__(self, latent_dim=3, channels=1):
        super().__init__()
        self.encoder = nn.Sequential()
        self.encoder.add_module("conv2", nn.Conv2d(channels, 4, kernel_size=4, stride=2, padding=1))
        self.encoder.add_module("relu", nn.ReLU(inplace=True))
        self.encoder.add_module("flatten", nn.Flatten())
        self.mu, self.logvar = nn.LazyLinear(latent_dim), nn.LazyLinear(latent_dim)

    def encode(self, x_BCYX):
        hidden = self.encoder(x_BCYX)
        return self.mu(hidden).tanh(), self.logvar(hidden)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    small = Small().eval()
    small.encode(torch.zeros(1, 1, 12, 12))  # which gives the lazy layers their shapes
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.mul_(2)
    return small


@pytest.fixture(scope="module")
def x_NCYX():
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (7, 1, 12, 12), generator=generator, dtype=torch.uint8)


NORMAL = torch.tensor([0.1, -0.2, 0.3]), torch.tensor([-1.0, 0.0, 0.5])


@pytest.fixture(scope="module")
def maps(model, x_NCYX):
    methods = {method: method for method in all_methods()}
    return explanation.explain(model, "encoder.conv2", x_NCYX, methods, batch=3, normal=NORMAL, seed=NOISE)


def all_methods():
    return {method: name for start in REFERENCES for name, method in choices.changes(start).items()} | {
        PRESETS[name]: name for name in REFERENCES
    }


# Changes


@pytest.mark.parametrize("reference", REFERENCES)
def test_changes_are_one_choice_away_or_presets(reference):
    start, found = vars(PRESETS[reference]), choices.changes(reference)
    singles = {name: vars(method) for name, method in found.items() if not name.startswith("preset=")}
    for name, method in singles.items():
        choice, _, value = name.partition("=")
        assert [key for key in start if start[key] != method[key]] == [choice]
        assert str(method[choice]) == value
    assert {name.partition("=")[0] for name in singles} == set(choices.CHOICES)
    assert len(singles) == 3 + 2 + 3 + 2 + 1  # all other values of each choice
    assert {f"preset={name}" for name in PRESETS} - {f"preset={reference}"} == found.keys() - singles.keys()
    assert all(PRESETS[name.partition("=")[2]] == found[name] for name in found.keys() - singles.keys())


def test_without_an_activation_nothing_weighs_what_comes_after_it():
    found = choices.changes("liu2020_paper", activation=False)
    left_out = {"tensor=after", "tensor=mixed", "preset=brongers2021_disentanglement"}
    assert choices.changes("liu2020_paper").keys() - found.keys() == left_out


def test_what_the_verdict_reads_is_measured():
    assert set(judges.ABLATION_STEPS.values()) <= choices.changes(judges.CODE, activation=False).keys()
    assert set(judges.ABLATION_DATA_SETS) == set(ablation.MODELS)


# Maps


@pytest.mark.parametrize("method", all_methods(), ids=lambda method: all_methods()[method])
def test_maps_are_those_of_one_call_each(model, x_NCYX, maps, method):
    noise, parts = torch.Generator().manual_seed(NOISE), []
    for x_BCYX in x_NCYX.split(3):
        x_BCYX = training.to_unit(x_BCYX)
        result = attention(model.encode, "encoder.conv2", x_BCYX, method, normal=NORMAL, generator=noise)
        parts.append(result.map_BYX)
    expected_NYX = torch.cat(parts)
    assert expected_NYX.std() > 0
    torch.testing.assert_close(maps[method], expected_NYX)


def test_methods_differ_in_their_maps(maps):
    names = all_methods()
    flat = {names[method]: map_NYX / map_NYX.norm() for method, map_NYX in maps.items()}
    alike = {(a, b) for a in flat for b in flat if a < b and torch.allclose(flat[a], flat[b], atol=1e-6)}
    assert alike == set()


def test_the_model_is_left_alone(model, x_NCYX):
    before = [parameter.clone() for parameter in model.parameters()]
    explanation.explain(model, "encoder.conv2", x_NCYX, PRESETS, batch=3, seed=NOISE)
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(*pair) for pair in zip(model.parameters(), before, strict=True))


# Measures


def scores(seed, images=6, levels=None):
    """Scores that know something of a truth of rectangles; with levels, they take that many values, 0 most often."""
    generator = torch.Generator().manual_seed(seed)
    score_MYX = torch.rand(images, 24, 24, generator=generator)
    truth_MYX = torch.zeros(images, 24, 24, dtype=torch.bool)
    for image in range(images - 1):  # the last one is normal
        truth_MYX[image, 3 + image : 12, 5 : 9 + 2 * image] = True
    score_MYX += 0.4 * truth_MYX * torch.rand(images, 1, 1, generator=generator)
    return ((score_MYX - 0.5).relu() * levels).round() / levels if levels else score_MYX, truth_MYX


UNITS = {"images": np.arange(6), "clips": np.array([7, 7, 2, 2, 2, 5])}


@pytest.mark.parametrize(("levels", "error"), [(40, 1e-9), (None, 1e-3)])
@pytest.mark.parametrize("kind", UNITS)
def test_differences_are_those_of_a_slow_loop(kind, levels, error):
    unit_M = UNITS[kind]
    (first_MYX, truth_MYX), (second_MYX, _) = scores(0, levels=levels), scores(1, levels=levels)
    found = [
        choices.resampled(score_MYX, truth_MYX, torch.from_numpy(unit_M), 100, seed=5)
        for score_MYX in (first_MYX, second_MYX)
    ]

    rng, units = np.random.default_rng(5), np.unique(unit_M)
    samples = [np.arange(len(unit_M))]
    for _ in range(100):
        drawn = units[rng.integers(len(units), size=len(units))]
        samples.append(np.concatenate([np.flatnonzero(unit_M == unit) for unit in drawn]))
    assert len(found[0][AUROC]) == len(samples)
    expected = []
    for sample in samples:
        truth_P = truth_MYX[sample].flatten().numpy()
        pair = [score_MYX[sample].flatten().numpy() for score_MYX in (first_MYX, second_MYX)]
        expected.append([roc_auc_score(truth_P, score_P) if truth_P.any() else np.nan for score_P in pair])
        if levels and truth_P.any() and len(expected) <= 5:
            r = len(expected) - 1
            for measured, score_P in zip(found, pair, strict=True):
                best = max(jaccard_score(truth_P, score_P >= threshold) for threshold in np.unique(score_P))
                assert measured[IOU][r] == pytest.approx(best, abs=error)
    auroc_R2 = np.array(expected)
    np.testing.assert_allclose(np.stack([measured[AUROC] for measured in found], 1), auroc_R2, atol=error)


def test_one_unit_cannot_be_resampled():
    score_MYX, truth_MYX = scores(0)
    with pytest.raises(ValueError, match=r"^unit must name at least two units to resample, got 1\.$"):
        choices.resampled(score_MYX, truth_MYX, torch.full((6,), 4), 100, seed=0)


# Models and their test images


def declared(chapter):
    path = f"book/{chapter}.md"
    notebook = chapters._notebook((BOOK / f"{chapter}.md").read_text(encoding="utf-8"), path)
    return {name: parameter.default for name, parameter in chapters.declared(notebook, path).items()}


def test_trainings_are_those_that_the_chapters_do_by_default():
    for dataset, chapter in (("mnist", "mnist"), ("ucsd", "ucsd")):
        defaults = declared(chapter)
        for name, value in ablation.TRAINING[dataset].items():
            # 0 epochs of the MNIST chapter stand for those of its recipe.
            default = defaults[name] or recipes.MNIST[defaults["recipe"]].epochs
            assert value == default, (chapter, name)
    assert ablation.LAYERS["ucsd"] == f"encoder.{declared('ucsd')['layer']}"
    assert ablation.LAYERS["mvtec"] == f"encoder.{declared('mvtec15')['layer']}"


def test_the_chapters_margin_is_the_verdicts():
    assert declared("ablations")["margin"] == judges.ABLATION_MARGIN


def test_the_chapter_names_every_change():
    notebook = chapters._notebook((BOOK / "ablations.md").read_text(encoding="utf-8"), "book/ablations.md")
    trees = [ast.parse(cell.source) for cell in notebook.cells if cell.cell_type == "code"]
    statements = [statement for tree in trees for statement in tree.body if isinstance(statement, ast.Assign)]
    (labels,) = (each.value for each in statements if ast.unparse(each.targets[0]) == "LABELS")
    names = {name for reference in REFERENCES for name in choices.changes(reference)}
    assert set(ast.literal_eval(labels)) == names


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of weights, and models of which only the layers that are explained are as they should be."""
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path / "runs"))
    return tmp_path


def made(seed=0, network=MNISTVAE):
    """Untrained weights in place of trained ones."""
    torch.manual_seed(seed)
    history = training.History(seconds=1.0, images=12)
    return weights.Trained(network(32).eval(), history, f"key {seed}", "file", "cpu", "float32", True)


def parameters(**changes):
    return {
        "dataset": "mnist",
        "model": "1",
        "images": 40,
        "resamples": 100,
        "seed": 0,
        "data": "sample",
        "trained": "briefly",
    } | changes


def test_models_can_be_those_trained_as_long_as_their_recipes_say():
    real = replace(mnist.load("sample").card, kind="partial")
    for dataset, table in (("mnist", recipes.MNIST), ("ucsd", recipes.UCSD), ("mvtec", recipes.MVTEC)):
        asked = parameters(dataset=dataset, trained="fully")
        chosen = ablation._training(asked, real)
        assert chosen["epochs"] == table[chosen["recipe"]].epochs
        # What a chapter takes for `-p epochs 0 -p augmented 0`.
        assert chosen.get("augmented") == (10_000 if dataset == "mvtec" else None)
        drawn = replace(real, kind="sample")
        assert ablation._training(asked, drawn) == ablation._training(parameters(dataset=dataset), drawn)


def test_weights_of_real_data_are_never_trained_here(cache, monkeypatch):
    digits = mnist.load("sample")
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("trained"))
    real = replace(digits, card=replace(digits.card, kind="complete"))
    monkeypatch.setattr(ablation.mnist, "load", lambda data: real)
    with pytest.raises(weights.NotCachedError):
        ablation.subject(parameters(data="real"), CPU)


@pytest.mark.parametrize(("digit", "outliers"), [("1", {7, 4, 9, 2}), ("3", {5, 8})])
def test_digits_are_those_of_the_chapter(cache, monkeypatch, digit, outliers):
    asked = {}
    monkeypatch.setattr(weights, "trained", lambda make, *images, **options: asked.update(options) or made())
    digits = mnist.load("sample")
    found = ablation.subject(parameters(model=digit, images=0), CPU)
    assert (asked["epochs"], asked["seed"]) == (100, 0)
    labels = digits.test_label_N[torch.isin(digits.test_label_N, torch.tensor([int(digit), *outliers]))]
    assert len(found.x_NCYX) == found.there == len(labels)
    assert torch.equal(found.measured_N, labels != int(digit))
    assert len(found.truth_MYX) == len(found.unit_M) == int(found.measured_N.sum())
    ink_MYX = training.to_unit(found.x_NCYX[found.measured_N])[:, 0] >= 0.5
    assert not (found.truth_MYX & ~ink_MYX).any()
    part = ablation.subject(parameters(model=digit), CPU)
    assert (len(part.x_NCYX), part.there) == (40, len(labels))
    # A part of them, with the truth that each has among all.
    where = {unit: i for i, unit in enumerate(found.unit_M.tolist())}
    chosen = [where[unit] for unit in part.unit_M.tolist()]
    assert chosen == sorted(chosen)
    assert torch.equal(part.truth_MYX, found.truth_MYX[chosen])
    assert torch.equal(part.x_NCYX[part.measured_N], found.x_NCYX[found.measured_N][chosen])


def test_frames_are_spread_over_all_clips_and_resampled_by_clip(cache, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        weights, "trained", lambda make, *images, **options: asked.update(options) or made(network=UCSDVAE)
    )
    clips = ucsd.load("sample")
    found = ablation.subject(parameters(dataset="ucsd", model="report1", images=30), CPU)
    assert asked["epochs"] == 6  # of the sample
    assert len(clips.test_NYX) == found.there == 144
    assert torch.equal(found.x_NCYX[:, 0], clips.test_NYX[::5])
    assert found.measured_N.tolist() == [mask is not None for mask in clips.test_mask[::5]]
    assert torch.equal(found.unit_M, clips.test_clip_N[::5][found.measured_N])
    assert found.unit_M.unique().tolist() == [1, 2, 3, 4]
    kept = [mask for mask in clips.test_mask[::5] if mask is not None]
    assert torch.equal(found.truth_MYX, torch.stack(kept))


def category(masked=True):
    x_NCYX = torch.randint(0, 256, (14, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mask_YX = torch.zeros(16, 16, dtype=torch.bool)
    mask_YX[2:7, 3:9] = masked
    masks = [mask_YX, None, mask_YX, torch.zeros_like(mask_YX)]
    card = DataCard("mvtec/bottle", "sample", {"test": 4}, {"test": 4}, "digest", "licence", "Credit")
    return mvtec.Category("bottle", x_NCYX[:10], x_NCYX[10:], ["bad", "bad", "bad", "good"], masks, card)


@pytest.fixture
def workpieces(cache, monkeypatch):
    torch.manual_seed(1)
    small = Small(channels=3).eval()
    small.encode(torch.zeros(1, 3, 16, 16))
    trained = weights.Trained(small, training.History(seconds=1.0, images=32), "key", "file", "cpu", "float32", True)
    monkeypatch.setattr(ablation.workpieces, "trainer", lambda category, chosen: lambda epochs: trained)
    monkeypatch.setattr(ablation.mvtec, "load", lambda name, data: category())
    monkeypatch.setitem(ablation.LAYERS, "mvtec", "encoder.conv2")


def test_workpieces_without_a_mask_play_no_part(workpieces):
    found = ablation.subject(parameters(dataset="mvtec", model="bottle", images=0), CPU)
    assert sorted(found.unit_M.tolist()) == [0, 2, 3]
    assert found.there == 3
    everything = category()
    for x_CYX, truth_YX, unit in zip(found.x_NCYX, found.truth_MYX, found.unit_M, strict=True):
        assert torch.equal(x_CYX, everything.test_NCYX[unit])
        assert torch.equal(truth_YX, everything.test_mask[unit])


def test_without_any_anomalous_pixel_a_model_is_named(workpieces, monkeypatch):
    monkeypatch.setattr(ablation.mvtec, "load", lambda name, data: category(masked=False))
    with pytest.raises(FileNotFoundError, match=r"^none of the test images of MVTec AD bottle has a mask with"):
        ablation.subject(parameters(dataset="mvtec", model="bottle"), CPU)


@pytest.mark.parametrize(
    ("data", "there", "expected"),
    [
        ("auto", [], ("bottle",)),
        ("sample", ["pill"], ("bottle",)),
        ("auto", ["pill", "screw"], ("pill", "screw")),
        ("real", [], ()),
    ],
)
def test_real_and_drawn_workpieces_are_never_mixed(monkeypatch, data, there, expected):
    monkeypatch.setattr(ablation.mvtec, "available", lambda: there)
    assert ablation.at_hand("mvtec", data) == expected
    assert ablation.at_hand("mnist", data) == ("1", "3")


# The run


def test_a_run_holds_every_change_with_its_interval(workpieces):
    run = ablation.compute("ablations", parameters(dataset="mvtec", model="bottle", images=0), CPU)
    assert run.record["test"] == {
        "images": 3,
        "of": 3,
        "measured": 3,
        "unit": "images",
        "layer": "conv2",
        "batch": recipes.MVTEC["report1"].batch_size,
    }
    assert run.record["budget"] == {"unit": "images", "asked": 3_000_000, "used": 32}
    studied = ablation.subject(run.parameters, CPU)
    truth_P = studied.truth_MYX.flatten().numpy()
    for reference in REFERENCES:
        found = choices.changes(reference, activation=False)
        methods = {"": PRESETS[reference]} | found
        maps = explanation.explain(
            studied.trained.model,
            "encoder.conv2",
            studied.x_NCYX,
            {method: method for method in methods.values()},
            batch=8,
            normal=studied.normal,
            seed=0,
        )
        auroc = {
            name: roc_auc_score(truth_P, maps[method].flatten().numpy().astype(np.float64))
            for name, method in methods.items()
        }
        assert run.metric(AUROC, reference)["value"] == pytest.approx(auroc[""], abs=1e-3)
        for name in found:
            row = run.metric(f"{AUROC}, change", name, reference)
            assert row["value"] == pytest.approx(auroc[name] - auroc[""], abs=1e-3)
            assert row["low"] <= row["value"] <= row["high"]
            assert row["n"] == 3
            assert run.metric(f"{IOU}, change", name, reference)["low"] is not None
    assert runs.load("ablations", run.parameters).record == run.record
    # From one reference to the other is the way back.
    there, back = (
        run.metric(f"{AUROC}, change", f"preset={other}", reference)["value"]
        for other, reference in (REFERENCES, REFERENCES[::-1])
    )
    assert there == -back != 0
