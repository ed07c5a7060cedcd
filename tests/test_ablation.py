"""The ablations: maps against one call of the attention each, intervals against scikit-learn on resampled images."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import jaccard_score, roc_auc_score
from torch import nn

from expvae import PRESETS, attention, models
from expvae.models import MNISTVAE
from expvae_book import chapters, choices, explanation, judges, runs, training, weights
from expvae_book.chapters import Job
from expvae_book.choices import AUROC, IOU, REFERENCES
from expvae_book.jobs import ablations
from expvae_book.pages import ablations as page

BOOK = Path(__file__).resolve().parents[1] / "book"
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
    assert set(judges.ABLATION_DATA_SETS) == set(page.NAMES)


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


def test_models_are_those_that_the_chapter_trains_by_default():
    assert declared("mnist")["recipe"] == ablations.RECIPE


def test_the_chapters_margin_is_the_verdicts():
    assert declared("ablations")["margin"] == judges.ABLATION_MARGIN


def test_the_page_names_every_change():
    names = {name for reference in REFERENCES for name in choices.changes(reference)}
    assert set(page.LABELS) == names
    assert tuple(page.RULES) == REFERENCES


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of weights, and models of which only the layers that are explained are as they should be."""
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path / "runs"))
    return tmp_path


def made():
    """Untrained weights in place of trained ones."""
    torch.manual_seed(0)
    history = training.History(seconds=1.0, images=12)
    return weights.Trained(MNISTVAE(32).eval(), history, "key", "file", "cpu", "float32", True)


def job(**changes):
    given = {"dataset": "mnist", "model": "1", "images": 40, "resamples": 100, "trained": "briefly", "seed": 0}
    return Job("ablations", given | {"data": "sample", "device": "cpu"} | changes, None)


def test_weights_of_real_data_are_never_trained_here(cache, monkeypatch, capsys):
    (seen,) = ablations.load([job()])
    monkeypatch.setattr(training, "train", lambda *a, **k: pytest.fail("trained"))
    real = replace(seen, images=replace(seen.images, card=replace(seen.images.card, kind="complete")))
    assert ablations.fit([job()], [real]) == [None]
    assert "`papermill book/mnist.md out.ipynb` makes them" in capsys.readouterr().out
    assert ablations.measure([job()], [real], [None]) == [None]


def test_one_image_is_refused():
    with pytest.raises(ValueError, match=r"^digits must be 0, or 2 or more to resample$"):
        ablations.load([job(images=1)])


@pytest.mark.parametrize(("digit", "outliers"), [("1", {7, 4, 9, 2}), ("3", {5, 8})])
def test_digits_are_those_of_the_chapter(cache, monkeypatch, digit, outliers):
    asked = []
    monkeypatch.setattr(choices, "rows", lambda *given, **options: asked.append((*given, options)) or [])
    jobs = [job(model=digit, images=0), job(model=digit)]
    seen = ablations.load(jobs)
    tests = [run.record["test"] for run in ablations.measure(jobs, seen, [made(), made()])]
    labels = seen[0].images.test_label_N
    labels = labels[torch.isin(labels, torch.tensor([int(digit), *outliers]))]
    (_, layer, x_NCYX, truth_MYX, unit_M, whole), (*_, part_NCYX, part_MYX, some_M, part) = asked
    assert layer == "encoder.conv2"
    assert torch.equal(whole["measured_N"], labels != int(digit))
    assert len(x_NCYX) == len(labels)
    assert len(truth_MYX) == len(unit_M) == int(whole["measured_N"].sum())
    ink_MYX = training.to_unit(x_NCYX[whole["measured_N"]])[:, 0] >= 0.5
    assert truth_MYX.any()
    assert not (truth_MYX & ~ink_MYX).any()
    assert len(part_NCYX) == 40
    assert tests[1] == {
        "images": 40,
        "of": len(labels),
        "measured": len(some_M),
        "unit": "images",
        "layer": "conv2",
        "batch": whole["batch"],
    }
    # A part of them, with the truth that each has among all.
    where = {unit: i for i, unit in enumerate(unit_M.tolist())}
    chosen = [where[unit] for unit in some_M.tolist()]
    assert chosen == sorted(chosen)
    assert torch.equal(part_MYX, truth_MYX[chosen])
    assert torch.equal(part_NCYX[part["measured_N"]], x_NCYX[whole["measured_N"]][chosen])


# The run


def test_a_run_holds_every_change_with_its_interval(cache, monkeypatch):
    monkeypatch.setitem(choices.CHOICES, "channels", ("relu_of_sum", "abs_of_sum"))
    (seen,), trained = ablations.load([job()]), made()
    (run,) = ablations.measure([one := job()], [seen], [trained])
    assert run.record["budget"] == {"unit": "epochs", "asked": 100, "used": 100}
    some = torch.randperm(len(seen.label_N), generator=torch.Generator().manual_seed(0))[:40].sort().values
    measured_N = seen.outlier_N[some]
    truth_P = seen.truths["truth"][some][measured_N].flatten().numpy()
    for reference in REFERENCES:
        found = choices.changes(reference)
        methods = {"": PRESETS[reference]} | found
        maps = explanation.explain(
            trained.model,
            "encoder.conv2",
            seen.test_NYX[some][:, None],
            methods,
            batch=seen.batch,
            normal=explanation.normal_posterior(trained.model, seen.train_NCYX),
            seed=0,
        )
        auroc = {
            name: roc_auc_score(truth_P, map_NYX[measured_N].flatten().numpy().astype(np.float64))
            for name, map_NYX in maps.items()
        }
        assert run.metric(AUROC, reference)["value"] == pytest.approx(auroc[""], abs=1e-3)
        for name in set(found) - {"score=each_sample", "preset=brongers2021", "preset=brongers2021_disentanglement"}:
            row = run.metric(f"{AUROC}, change", name, reference)
            assert row["value"] == pytest.approx(auroc[name] - auroc[""], abs=1e-3)
            assert row["low"] <= row["value"] <= row["high"]
            assert row["n"] == int(measured_N.sum())
            assert run.metric(f"{IOU}, change", name, reference)["low"] is not None
    assert runs.load("ablations", one.parameters).record == run.record
    monkeypatch.setattr(weights, "trained", lambda *a, **k: pytest.fail("asked for"))
    assert ablations.fit([one], [seen]) == [None]
    assert ablations.measure([one], [seen], [None]) == [run]
    # From one reference to the other is the way back.
    there, back = (
        run.metric(f"{AUROC}, change", f"preset={other}", reference)["value"]
        for other, reference in (REFERENCES, REFERENCES[::-1])
    )
    assert there == -back != 0
    table = page.changes([run], AUROC, 0.01)
    assert set(table["method"]) == {name for reference in REFERENCES for name in choices.changes(reference)}
    assert list(dict.fromkeys(table["method"])) == [name for name in page.LABELS if name in set(table["method"])]


def test_the_run_with_the_largest_share_of_its_budget_stands_for_a_model(cache, monkeypatch):
    (seen,) = ablations.load([job()])
    (run,) = ablations.measure([one := job()], [seen], [made()])
    real = run.record["data"] | {"kind": "partial"}
    short, long = (
        runs.Run(
            "ucsd",
            {"recipe": "report1", "seed": 0, "epochs": used},
            run.record | {"data": real, "budget": {"unit": "epochs", "asked": 100, "used": used}},
            run.folder,
        )
        for used in (5, 50)
    )
    for stored in ([short, long], [long, short]):
        monkeypatch.setattr(runs, "find", lambda *_, stored=stored, **__: [run, *stored])
        one.run = run
        assert page.found([one]) == [run, long]
