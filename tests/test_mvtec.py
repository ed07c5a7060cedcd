"""Localisation on MVTec AD, with a small VAE for the ResNet's: against scikit-learn, SciPy and slow loops."""

import json
from collections import OrderedDict
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score
from torch import nn

from expvae import attention, models
from expvae.metrics import CONVENTIONS
from expvae_book import (
    baselines,
    defects,
    explanation,
    measures,
    names,
    probes,
    randomised,
    recipes,
    runs,
    training,
    weights,
)
from expvae_book.augmentation import turned_at_load
from expvae_book.chapters import Job
from expvae_book.data import card as cards
from expvae_book.data import mvtec
from expvae_book.data.card import DataCard
from expvae_book.data.imagenet import ImageNet
from expvae_book.jobs import mvtec as mvtec_job
from expvae_book.jobs import steps
from expvae_book.names import ATTENTION, BASELINES, COMMON, LAYERS, METHODS, SSIM
from expvae_book.pages import mvtec as page

SIDE = 64
DEFECTS = ["broken", "broken", "good", "good", "stained", "stained"]
PARAMETERS = {
    "category": "bottle",
    "data": "sample",
    "recipe": "report1",
    "initial": "random",
    "encoder": "fine-tuned",
    "augmentation": "paper",
    "augmented": 12,
    "epochs": 1,
    "precision": "float32",
    "device": "cpu",
    "seed": 0,
}
SHOWN = "layer2.1.conv1, liu2020_code"
PICTURED = mvtec_job.PICTURED
SIMPLE = [name for name in BASELINES if name != COMMON] + [names.PRIOR]
# Every layer by every preset; on few images where that takes long.
EVERYTHING, FEWER = ([case for case in defects.CASES if (case[2] == 1) == whole] for whole in (True, False))
ALL_IMAGES, FEW_IMAGES = (
    [f"{layer}, {preset}" for presets, layers, _ in cases for preset in presets for layer in layers]
    for cases in (EVERYTHING, FEWER)
)
MAPS = ALL_IMAGES + FEW_IMAGES
LATENT_METRICS = {
    "parameters",
    "parameters, trained",
    "KL per image",
    "reconstruction per image",
    "reconstruction per image, mean image",
}
SPREAD_METRICS = {"active units", "standard deviation of a pixel over the images"}
PIXEL_METRICS = {
    *measures.FIELDS.values(),
    names.DIFFERENCE,
    names.CHANGE,
    "best IoU (oracle), change",
    names.MISSED,
    names.KEPT_RANKS,
    "anomalous pixels",
    "AUROC within images, mean",
    "share of the attention's variance that all images share",
    "rank correlation with the attention",
    *(f"IoU, {average}, {classes}" for average, classes in CONVENTIONS),
}


class Small(nn.Module):
    """A VAE whose encoder has the layers of LAYERS, for images of SIDE; 16 latents, so that noise comes in blocks."""

    __module__ = f"{models.__name__}.small"  # as one of the library's

    def __init__(self):
        super().__init__()

        def halving(before, after, name, stride=2):
            convolution = nn.Conv2d(before, after, kernel_size=3, stride=stride, padding=1)
            return nn.Sequential(OrderedDict([(name, convolution), ("elu", nn.ELU())]))

        self.encoder = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(3, 4, kernel_size=4, stride=4),
                elu=nn.ELU(),
                layer1=nn.Sequential(halving(4, 4, "conv2", stride=1), halving(4, 4, "conv2", stride=1)),
                layer2=nn.Sequential(nn.Identity(), halving(4, 4, "conv1")),
                layer3=nn.Sequential(nn.Identity(), halving(4, 4, "conv2")),
                layer4=nn.Sequential(nn.Identity(), halving(4, 4, "conv2")),
                flatten=nn.Flatten(),
            )
        )
        self.mu, self.logvar = nn.Linear(16, 16), nn.Linear(16, 16)
        self.decoder = nn.Sequential(
            nn.Linear(16, 3 * 16 * 16), nn.Unflatten(1, (3, 16, 16)), nn.Upsample(scale_factor=4)
        )

    def encode(self, x_BCYX):
        hidden = self.encoder(x_BCYX)
        return self.mu(hidden), self.logvar(hidden)

    def decode(self, z_BI):
        return self.decoder(z_BI)


@pytest.fixture(autouse=True, scope="module")
def fewer_of_everything():
    """A hundred resamples, and four images for the paper's preset at early layers and for the choices of a rule."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measures, "RESAMPLES", 100)
        patch.setattr(defects, "FEW", 4)
        yield


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(5)
    model = Small().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)  # else as good as nothing of an image reaches the latents
    return model


def category(**changes):
    """Ten training and six test images of smooth noise, of which four show a brighter rectangle."""
    generator = torch.Generator().manual_seed(2)
    noise_NCYX = torch.rand(16, 3, 8, 8, generator=generator)
    x_NCYX = nn.functional.interpolate(noise_NCYX, SIDE, mode="bilinear").mul(180)
    masks = [torch.zeros(SIDE, SIDE, dtype=torch.bool) for _ in DEFECTS]
    for i, (mask_YX, defect) in enumerate(zip(masks, DEFECTS, strict=True)):
        if defect != "good":
            mask_YX[10 + 3 * i : 24 + 3 * i, 12:30] = True
            x_NCYX[10 + i] += 60 * mask_YX
    counts = {"train": 10, "test": 6}
    card = DataCard("mvtec/bottle", "sample", counts, counts, "digest", "licence", "Credit")
    x_NCYX = x_NCYX.round().byte()
    return replace(mvtec.Category("bottle", x_NCYX[:10], x_NCYX[10:], DEFECTS, masks, card), **changes)


def only(images, **changes):
    """The category with some of its test images only."""
    full = category()
    return replace(
        full,
        test_NCYX=full.test_NCYX[images],
        test_defect=[full.test_defect[i] for i in images],
        test_mask=[full.test_mask[i] for i in images],
        **changes,
    )


UNMASKED = [None if defect != "good" else torch.zeros(SIDE, SIDE, dtype=torch.bool) for defect in DEFECTS]
MODELS = {}  # by seed, those that `computed` has trained
CASES = {
    "all": category(),
    "no masks": category(test_mask=UNMASKED),
    "some masks": category(test_mask=[*UNMASKED[:3], *category().test_mask[3:]]),
    "no good": only([0, 1, 4, 5]),
    "only good": only([2, 3]),
    "no test": only([]),
}


@pytest.fixture(scope="module")
def computed(tmp_path_factory):
    """A run of each case, stored and read again."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPVAE_RUNS", str(tmp_path_factory.mktemp("runs")))
        patch.setenv("EXPVAE_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(mvtec_job, "network", lambda *_: (Small, "random, fine-tuned", ""))
        patch.setitem(probes.VAES, "Small", lambda latents: Small())
        found = {}
        for seed, (name, data) in enumerate(CASES.items()):
            patch.setattr(mvtec, "load", lambda *_, data=data: data)
            patch.setattr(measures, "RESAMPLES", 500 if name == "all" else 100)
            job = Job("mvtec15", PARAMETERS | {"seed": seed}, None)
            seen = mvtec_job.load(job)
            fit = mvtec_job.fit(job, seen)
            mvtec_job.measure(job, fit, seen)
            found[name], MODELS[seed] = runs.load("mvtec15", job.parameters), fit.trained.model
        return found


def metrics(run):
    return {row["metric"] for row in run.record["metrics"]}


def value(rows, metric, method="", subset=""):
    (row,) = [row for row in rows if (row["metric"], row["method"], row["subset"]) == (metric, method, subset)]
    return row["value"]


def probes_model(run):
    """The trained model of a run, by the weights in the cache that it was computed with."""
    return MODELS[run.parameters["seed"]]


def explain(model, x_NCYX, layer, preset, **options):
    methods = {preset: explanation.method_of(preset)}
    return explanation.explain(model, f"encoder.{layer}", x_NCYX, methods, shuffled=True, **options)[preset]


# --- the run ---------------------------------------------------------------------------------------------------------


def test_what_is_measured_depends_on_what_is_at_hand(computed):
    always = LATENT_METRICS | SPREAD_METRICS
    assert {name: metrics(run) for name, run in computed.items()} == {
        "all": always | PIXEL_METRICS | {"image AUROC"},
        "no masks": always | {"image AUROC"},
        "some masks": always | PIXEL_METRICS | {"image AUROC"},
        "no good": always | PIXEL_METRICS,
        "only good": always,
        "no test": LATENT_METRICS,
    }
    figures = {name: sorted(path.name for path in (run.folder / "figures").iterdir()) for name, run in computed.items()}
    assert figures == {name: ["defects.png"] if name == "all" else [] for name in computed}  # of seed 0 alone
    masked = ("all", "some masks", "no good")
    assert {name for name, run in computed.items() if run.maps} == {*masked, "no masks"}  # there whole images count
    assert sorted(computed["all"].maps) == sorted(MAPS)
    for name in masked:
        assert set(ALL_IMAGES) <= set(computed[name].maps)


def test_every_map_has_its_rows(computed):
    run = computed["all"]
    commons = [f"mean of {name}" for name in ALL_IMAGES]
    measured = {*MAPS, *SIMPLE}
    for title in measures.FIELDS.values():
        expected = measured | set(commons) if title in defects.PLAIN.values() else measured
        assert set(run.rows(title)["method"]) == expected
    assert set(run.rows(names.MISSED)["method"]) == measured
    pairs = {f"{name} − {other}" for name in ALL_IMAGES for other in SIMPLE}
    pairs |= {f"{name} − mean of {name}" for name in ALL_IMAGES}
    last = run.rows(names.DIFFERENCE)["subset"] == names.LAST
    assert set(run.rows(names.DIFFERENCE)[~last]["method"]) == pairs
    images = {(row.method, row.subset) for row in run.rows("image AUROC").itertuples()}
    assert images == {(name, how) for name in measured for how in ("mean", "maximum")}
    for average, classes in CONVENTIONS:
        rows = run.rows(f"IoU, {average}, {classes}")
        assert {(row.method, row.subset) for row in rows.itertuples()} == {
            (name, choice) for name in measured for choice in ("validation", "grid", "best")
        }
    kinds = {(row.method, row.subset, row.n) for row in run.rows("AUROC within images, mean").itertuples()}
    assert {kind for kind in kinds if kind[0] in ALL_IMAGES} == {
        (name, kind, 2) for name in ALL_IMAGES for kind in ("broken", "stained")
    }
    likened = run.rows("rank correlation with the attention")
    assert set(likened["subset"]) <= set(MAPS)
    others = [*SIMPLE, "brightness", "edges", f"mean of {SHOWN}"]
    assert likened[likened["subset"] == SHOWN]["method"].tolist() == others
    shown = run.at("layer2.1.conv1", "liu2020_code")
    for title in (*defects.PLAIN.values(), names.DIFFERENCE):
        methods = shown.rows(title).query("subset == ''")["method"].tolist()
        beside = [*SIMPLE, COMMON]
        expected = [ATTENTION, *beside] if title != names.DIFFERENCE else [f"attention − {name}" for name in beside]
        assert sorted(methods) == sorted(expected)


def test_few_images_are_explained_where_each_latent_needs_a_pass(computed):
    run = computed["all"]
    rows = run.rows("pixel AUROC").query("subset == ''").set_index("method")
    assert {rows.loc[name, "n"] for name in ALL_IMAGES} == {6}
    assert {rows.loc[name, "n"] for name in FEW_IMAGES} == {4}
    some_N = defects.some_of(6)
    trained = probes_model(run)
    map_NYX = explain(trained, category().test_NCYX[some_N], "conv1", "liu2020_paper", batch=8, seed=0)
    truth_NYX = torch.stack([category().test_mask[i] for i in some_N])
    expected = roc_auc_score(truth_NYX.flatten(), map_NYX.flatten())
    assert rows.loc["conv1, liu2020_paper", "value"] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("count", "share", "drawn"), [(10, 0.0, 4), (3, 0.0, 3), (5, 1.0, 5), (0, 0.5, 0), (30, 0.3, 9)]
)
def test_some_are_drawn_at_random_and_the_same_for_every_job(count, share, drawn):
    some_K = defects.some_of(count, share)
    assert some_K.tolist() == sorted(set(some_K.tolist()) & set(range(count)))
    assert len(some_K) == drawn
    assert torch.equal(some_K, defects.some_of(count, share))
    assert defects.some_of(10).tolist() != [0, 1, 2, 3]
    assert set(defects.some_of(10).tolist()) <= set(defects.some_of(10, 0.5).tolist())


def test_images_without_a_mask_do_not_count_among_pixels(computed):
    for name, count in (("all", 6), ("some masks", 4), ("no good", 4)):  # of "some", two normal, two with masks
        shown = computed[name].at("layer2.1.conv1", "liu2020_code")
        assert set(shown.rows("pixel AUROC").query("subset == ''")["n"]) == {count}


def test_the_record_says_how_it_was_trained(computed):
    record = computed["all"].record
    assert record["parameters"] == PARAMETERS
    steps, steps_used = (-(-images // recipes.MVTEC["report1"].batch_size) for images in (8, 12))
    assert record["budget"] == {
        "unit": "images",
        "asked": 300 * 8,
        "used": 12,
        "images": {"asked": 300 * 8, "used": 12},
        "steps": {"asked": 300 * steps, "used": steps_used},
    }
    assert record["recipe"] == json.loads(json.dumps(vars(recipes.MVTEC["report1"])))
    facts = record["training"]
    assert facts.pop("images_per_second") == pytest.approx(12 / record["seconds"]["training"])
    assert facts == {"encoder": "random, fine-tuned", "precision": "float32", "originals": 8, "images": 12}
    assert record["losses"].keys() == {"reconstruction", "kl", "validation_reconstruction", "validation_kl"}
    assert len(record["weights"]["key"]) == 64
    assert record["maps"] == computed["all"].maps
    assert record["resamples"] == {"seed": 0, "unit": "image", "measures": list(measures.PAIRED)}
    always = {"probe means", "probe maps", "kl_per_latent"}  # no image of the data set
    early = {f"{layer}, liu2020_paper" for layer in LAYERS[:3]}  # on too few images to be paired with others
    resamples = {f"resamples/{name}" for name in {*MAPS, *SIMPLE} - early}
    flagged = {"thresholds", *(f"flagged/{name}" for name in ("true", "false", "anomalous", "normal"))}
    pictured = {
        f"{state}/{layer}, {preset}"
        for state in ("trained", "untrained")
        for layer in mvtec_job.PICTURED
        for preset in measures.PRESETS
    }
    pictured |= {f"{name}, peak" for name in pictured}
    followed = {
        f"{layer}, {preset}"
        for presets, layers in defects.FOLLOWED + defects.FOLLOWED_LATE
        for preset, layer in product(presets, layers)
    }
    course = {f"{part}/{name}" for part in ("course", "judged") for name in (*followed, *names.PLACES)}
    compared = {
        f"compared/{layer}, {preset}{part}"
        for presets, layers in defects.RANDOMISED
        for preset, layer in product(presets, layers)
        for part in ("", ", peak")
    }
    assert computed["all"].arrays.keys() == always | resamples | flagged | pictured | course | compared
    assert {tuple(computed["all"].arrays[f"course/{name}"][:, 0]) for name in followed} == {(0, steps_used)}
    assert {name.partition("/")[0] for name in computed["no good"].arrays} == always | {
        "resamples",
        "course",
        "judged",
        "compared",
    }  # not of seed 0
    assert {name.partition("/")[0] for name in computed["no masks"].arrays} == always | {"resamples"}
    assert computed["no test"].arrays.keys() == {"kl_per_latent"}
    assert computed["all"].state.startswith("verified at ")
    assert "probe" not in computed["no test"].record


def test_the_run_is_that_of_the_model_in_the_cache(computed, monkeypatch, tmp_path):
    """Trained again in an empty cache, and its maps measured by scikit-learn."""
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path))
    monkeypatch.setattr(mvtec_job, "network", lambda *_: (Small, "random, fine-tuned", ""))
    data, run = category(), computed["all"]
    trained = mvtec_job.trainer(data, PARAMETERS)(PARAMETERS["epochs"])
    assert trained.key == run.record["weights"]["key"]
    map_NYX = explain(trained.model, data.test_NCYX, "layer2.1.conv1", "liu2020_code", batch=8, seed=0)
    truth = torch.stack(data.test_mask).flatten()
    job, run = run, run.at("layer2.1.conv1", "liu2020_code")
    assert run.metric("pixel AUROC", ATTENTION)["value"] == pytest.approx(
        roc_auc_score(truth, map_NYX.flatten()), abs=1e-5
    )
    defective = [defect != "good" for defect in DEFECTS]
    expected = roc_auc_score(defective, map_NYX.mean((1, 2)))
    assert run.metric("image AUROC", ATTENTION, "mean")["value"] == pytest.approx(expected)
    _, held_out_NCYX = mvtec_job.split(data)
    common = explain(trained.model, held_out_NCYX, "layer2.1.conv1", "liu2020_code", batch=8, seed=0)
    expected = roc_auc_score(truth, common.mean(0).expand_as(map_NYX).flatten())
    assert run.metric("pixel AUROC", COMMON)["value"] == pytest.approx(expected, abs=1e-5)
    flagged_N = job.arrays["flagged/true"][-1] + job.arrays["flagged/false"][-1]
    slow = [int((map_NYX >= float(t)).sum()) for t in job.arrays["thresholds"]]
    np.testing.assert_array_equal(flagged_N, slow)
    assert run.metric("parameters")["value"] == sum(value.numel() for value in Small().parameters())


def test_weights_that_start_otherwise_are_other_weights(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path))
    found = []
    for start, digest in (("random, fine-tuned", ""), ("imagenet, frozen", "a1"), ("imagenet, frozen", "b2")):
        monkeypatch.setattr(mvtec_job, "network", lambda *_, made=(Small, start, digest): made)
        trained, facts = mvtec_job.trainer(category(), PARAMETERS)(1), mvtec_job.facts(category(), PARAMETERS)
        assert facts["encoder"] == start
        assert facts.get("initial weights", "") == digest
        found.append(trained)
    assert len({trained.key for trained in found}) == 3
    assert not any(trained.reused for trained in found)
    assert mvtec_job.trainer(category(), PARAMETERS)(1).reused


@pytest.mark.parametrize(("augmentation", "vary"), [("report2_code", turned_at_load), ("none", None)])
def test_images_that_are_not_multiplied_are_the_originals(monkeypatch, augmentation, vary):
    monkeypatch.setattr(mvtec_job, "network", lambda *_: (Small, "random, fine-tuned", ""))
    monkeypatch.setattr(mvtec_job.augmentation, "augment", lambda *_: pytest.fail("images were multiplied"))
    parameters = PARAMETERS | {"recipe": "report2_code", "augmentation": augmentation}
    trained, data = mvtec_job.trainer(category(), parameters)(2), mvtec_job.split(category())
    assert mvtec_job.facts(category(), parameters) == {"encoder": "random, fine-tuned", "originals": 8, "images": 8}
    expected = training.build(Small, 0)
    options = {"epochs": 2, "seed": 0, "progress": False}
    training.train(expected, *data, recipes.MVTEC["report2_code"], vary=vary, **options)
    for ours, theirs in zip(trained.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


# --- the network of a recipe -----------------------------------------------------------------------------------------


OWN_NETWORKS = pytest.mark.parametrize(
    ("recipe", "network"), [("brongers2021", "BrongersMVTecVAE"), ("report2_code", "Report2MVTecVAE")]
)


@OWN_NETWORKS
@pytest.mark.parametrize(("initial", "encoder"), [("imagenet", "fine-tuned"), ("auto", "frozen"), ("random", "frozen")])
def test_networks_of_their_own_have_neither_choice(recipe, network, initial, encoder):
    with pytest.raises(ValueError, match=rf"^recipe='{recipe}' has a ResNet of its own, .* give initial='auto' or"):
        mvtec_job.network(recipe, initial, encoder)


def test_what_cannot_be_had_is_refused_before_images_are_read(monkeypatch):
    monkeypatch.setattr(mvtec_job.mvtec, "load", lambda *_: pytest.fail("images were read"))
    chosen = {"recipe": "brongers2021", "initial": "imagenet", "encoder": "fine-tuned"}
    with pytest.raises(ValueError, match=r"^recipe='brongers2021' has a ResNet of its own"):
        mvtec_job.load(Job("mvtec15", chosen | {"category": "bottle", "data": "sample"}, None))


def test_imagenet_that_cannot_be_had_is_refused(monkeypatch):
    monkeypatch.setattr(mvtec_job.imagenet, "load", lambda: None)
    both = r"weights/resnet18_imagenet\.safetensors in the data root, or torchvision's weights"
    with pytest.raises(ValueError, match=rf"^initial='imagenet' needs {both} .* initial='random' does"):
        mvtec_job.network("report1", "imagenet", "frozen")


@pytest.mark.parametrize(
    ("initial", "encoder", "there", "words"),
    [
        ("auto", "fine-tuned", True, "imagenet, fine-tuned"),
        ("auto", "frozen", True, "imagenet, frozen"),
        ("auto", "frozen", False, "random, frozen"),
        ("imagenet", "fine-tuned", True, "imagenet, fine-tuned"),
        ("random", "fine-tuned", True, "random, fine-tuned"),
        ("random", "frozen", False, "random, frozen"),
    ],
)
def test_what_the_encoder_starts_from(monkeypatch, initial, encoder, there, words):
    calls = []

    def stand_in(*arguments, **options):
        calls.append((arguments, options))
        return nn.Identity()

    chosen = ImageNet({"conv1.weight": torch.ones(1)}, "ab12")
    monkeypatch.setattr(mvtec_job.imagenet, "load", lambda: chosen if there else None)
    monkeypatch.setattr(mvtec_job, "MVTecVAE", stand_in)
    make, start, digest = mvtec_job.network("report2", initial, encoder)
    assert start == words
    assert digest == ("ab12" if words.startswith("imagenet") else "")
    assert calls == []
    make()
    expected = chosen.tensors if words.startswith("imagenet") else None
    assert calls == [((32, expected), {"frozen": encoder == "frozen"})]


@OWN_NETWORKS
def test_networks_of_their_own_are_built(recipe, network, monkeypatch):
    monkeypatch.setitem(mvtec_job.OWN_NETWORKS, recipe, lambda latents: nn.Linear(1, latents))
    monkeypatch.setattr(mvtec_job.imagenet, "load", lambda: pytest.fail("ImageNet's weights were looked for"))
    for initial in ("auto", "random"):
        make, start, digest = mvtec_job.network(recipe, initial, "fine-tuned")
        assert (start, digest) == ("random, fine-tuned", "")
        assert make().out_features == 32


# --- maps ------------------------------------------------------------------------------------------------------------


def test_a_fifth_of_the_training_images_is_held_out():
    data = category()
    train_NCYX, held_out_NCYX = mvtec_job.split(data)
    assert (len(train_NCYX), len(held_out_NCYX)) == (8, 2)
    parts = sorted(x_CYX.numpy().tobytes() for x_CYX in torch.cat([train_NCYX, held_out_NCYX]))
    assert parts == sorted(x_CYX.numpy().tobytes() for x_CYX in data.train_NCYX)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("preset", ["liu2020_paper", "normal_difference"])
def test_maps_do_not_depend_on_the_batch(small, layer, preset):
    x_NCYX = torch.cat([category().train_NCYX, category().test_NCYX])
    normal = explanation.normal_posterior(small, x_NCYX[:8])
    maps = [explain(small, x_NCYX, layer, preset, batch=batch, seed=3, normal=normal) for batch in (1, 5, 16)]
    for other in maps[1:]:
        torch.testing.assert_close(maps[0], other, rtol=1e-4, atol=1e-6 * float(maps[0].max()))
    assert maps[0].shape == (16, SIDE, SIDE)
    assert (maps[0] - maps[0][0]).abs().amax((1, 2))[1:].min() > 0


def test_maps_depend_on_the_batch_where_the_preset_says_so(small):
    x_NCYX = category().test_NCYX
    one, all_six = (explain(small, x_NCYX, LAYERS[2], "liu2020_code", batch=batch, seed=0) for batch in (1, 6))
    assert (one / all_six).nanmedian(dim=1).values.std() > 1e-3


def test_the_seed_fixes_the_noise(small):
    x_NCYX = category().test_NCYX
    normal = explanation.normal_posterior(small, x_NCYX)
    maps = [
        explain(small, x_NCYX, LAYERS[2], "normal_difference", batch=4, seed=seed, normal=normal) for seed in (0, 0, 1)
    ]
    assert torch.equal(maps[0], maps[1])
    assert not torch.equal(maps[0], maps[2])


def test_reconstructions_do_not_depend_on_the_batch(small):
    x_NCYX = torch.cat([category().train_NCYX, category().test_NCYX, category().test_NCYX])
    restored_NCYX = explanation.reconstruct(small, x_NCYX)
    assert restored_NCYX.shape == (22, 3, SIDE, SIDE)
    for x_CYX, restored_CYX in zip(x_NCYX, restored_NCYX, strict=True):
        with torch.no_grad():
            expected = torch.sigmoid(small.decode(small.encode(x_CYX[None] / 255)[0]))[0]
        torch.testing.assert_close(restored_CYX, expected, rtol=1e-4, atol=1e-5)


def test_a_normal_posterior_is_asked_once_until_the_model_or_the_images_change(monkeypatch):
    model, x_NCYX = Small().eval(), category().train_NCYX
    asked, encoded = [], explanation.encoded
    monkeypatch.setattr(explanation, "encoded", lambda *given: asked.append(given) or encoded(*given))
    first = explanation.normal_posterior(model, x_NCYX)
    assert explanation.normal_posterior(model, x_NCYX) is first and len(asked) == 1
    assert explanation.normal_posterior(model, x_NCYX[:4])[0].tolist() != first[0].tolist()
    with torch.no_grad():
        model.mu.bias += 1
    torch.testing.assert_close(explanation.normal_posterior(model, x_NCYX)[0], first[0] + 1)


def test_normal_posterior_is_that_of_all_images_pooled(small):
    x_NCYX = category().train_NCYX
    mean_D, logvar_D = explanation.normal_posterior(small, x_NCYX)
    with torch.no_grad():
        mu_ND, logvar_ND = small.encode(x_NCYX / 255)
    generator = torch.Generator().manual_seed(4)
    noise_SND = torch.randn(40_000, *mu_ND.shape, generator=generator)
    pooled = (mu_ND + (0.5 * logvar_ND).exp() * noise_SND).flatten(0, 1)
    torch.testing.assert_close(mean_D, pooled.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(logvar_D.exp(), pooled.var(0), atol=0, rtol=0.01)


def wang(x_YX, y_YX):
    """SSIM of Wang et al. (2004) by SciPy, with a Gaussian of 1.5 pixels and images mirrored at their borders."""

    def smooth(values):
        return gaussian_filter(values, 1.5, truncate=3.5, mode="mirror")

    mean_x, mean_y = smooth(x_YX), smooth(y_YX)
    var_x, var_y = smooth(x_YX**2) - mean_x**2, smooth(y_YX**2) - mean_y**2
    covariance = smooth(x_YX * y_YX) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    return luminance * (2 * covariance + c2) / (var_x + var_y + c2)


def test_dissimilarity_is_one_minus_the_ssim_of_wang():
    generator = torch.Generator().manual_seed(5)
    x_BCYX = nn.functional.interpolate(torch.rand(2, 3, 10, 12, generator=generator), (40, 48), mode="bilinear")
    other_BCYX = (x_BCYX + 0.1 * torch.randn(x_BCYX.shape, generator=generator)).clamp(0, 1)
    ours_BYX = baselines.dissimilarity(x_BCYX, other_BCYX)
    for ours_YX, x_CYX, other_CYX in zip(ours_BYX, x_BCYX.double(), other_BCYX.double(), strict=True):
        theirs = [wang(x_YX.numpy(), y_YX.numpy()) for x_YX, y_YX in zip(x_CYX, other_CYX, strict=True)]
        np.testing.assert_allclose(ours_YX, 1 - np.mean(theirs, axis=0), atol=1e-3)
    torch.testing.assert_close(baselines.dissimilarity(x_BCYX, x_BCYX), torch.zeros(2, 40, 48), atol=1e-4, rtol=0)


def test_edges_are_numpys_gradient():
    x_NYX = torch.rand(3, 9, 13, generator=torch.Generator().manual_seed(6))
    for ours_YX, x_YX in zip(baselines.edges(x_NYX), x_NYX.numpy(), strict=True):
        np.testing.assert_allclose(ours_YX, np.hypot(*np.gradient(x_YX)), rtol=1e-5, atol=1e-7)


def test_baseline_maps_are_those_of_the_library_in_every_batch(small):
    x_NCYX = torch.cat([category().train_NCYX, category().test_NCYX, category().test_NCYX])
    restored_NCYX = explanation.reconstruct(small, x_NCYX)
    mean_CYX = training.to_unit(category().train_NCYX).mean(0)
    maps = defects.baseline_maps(x_NCYX, restored_NCYX, mean_CYX)
    assert {COMMON, *maps} == set(BASELINES)
    for i in (0, 15, 16, 21):
        x_BCYX, restored_BCYX = x_NCYX[i : i + 1] / 255, restored_NCYX[i : i + 1]
        torch.testing.assert_close(maps["reconstruction error"][i], (x_BCYX - restored_BCYX).square().mean(1)[0])
        torch.testing.assert_close(maps["mean image difference"][i], (x_BCYX - mean_CYX).square().mean(1)[0])
        torch.testing.assert_close(maps["centre prior"][i], baselines.centre_prior(SIDE, SIDE)[0])
        torch.testing.assert_close(maps[SSIM][i], baselines.dissimilarity(x_BCYX, restored_BCYX)[0])


# --- measures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data():
    """The category, one defective image of which lacks its mask."""
    masks = category().test_mask
    return category(test_mask=[None, *masks[1:]])


@pytest.fixture(scope="module")
def maps():
    """Maps that know something of the anomalies."""
    generator, truth_NYX = torch.Generator().manual_seed(7), torch.stack(category().test_mask)
    return {
        name: torch.rand(6, SIDE, SIDE, generator=generator) + 0.1 * i * truth_NYX for i, name in enumerate(METHODS)
    }


def test_one_in_a_hundred_normal_pixels_exceeds_the_threshold():
    map_NYX = torch.randn(20, 50, 50, generator=torch.Generator().manual_seed(9)).exp()
    assert float((map_NYX > defects.threshold(map_NYX)).float().mean()) == pytest.approx(0.01, abs=1e-4)


def truth(data):
    return defects.Seen.of(data, torch.arange(len(data.test_defect))).truth


def test_only_images_with_a_mask_have_a_truth(data):
    seen = defects.Seen.of(data, torch.arange(6))
    truth = seen.truth
    assert seen.known_N.tolist() == [False, *[True] * 5]
    assert truth.unit_N.tolist() == [1, 2, 3, 4, 5]
    assert torch.equal(truth.truth_NYX, torch.stack(data.test_mask[1:]))
    rows = defects.anomalous_rows(truth.truth_NYX)
    masks = truth.truth_NYX.numpy()
    assert value(rows, "anomalous pixels") == pytest.approx(masks.mean())
    assert value(rows, "anomalous pixels", "", "defective images") == pytest.approx(masks[[0, 3, 4]].mean())


def test_measures_of_single_maps(data, maps):
    kinds = DEFECTS[1:]
    for name in METHODS:
        rows = defects.missed_rows(name, maps[name][1:], truth(data), kinds)
        auroc = {i: roc_auc_score(data.test_mask[i].flatten(), maps[name][i].flatten()) for i in (1, 4, 5)}
        assert value(rows, "AUROC within images, mean", name, "broken") == pytest.approx(auroc[1])
        assert value(rows, "AUROC within images, mean", name, "stained") == pytest.approx((auroc[4] + auroc[5]) / 2)
        assert value(rows, names.MISSED, name) == pytest.approx(np.mean([a < 0.5 for a in auroc.values()]))
        assert [row["metric"] for row in defects.missed_rows(name, maps[name][1:], truth(data))] == [names.MISSED]
    grey_NYX = data.test_NCYX.numpy().mean(1)
    likened = {
        SSIM: maps[SSIM].numpy(),
        "brightness": grey_NYX,
        "edges": np.stack([np.hypot(*np.gradient(x_YX)) for x_YX in grey_NYX]),
    }
    others = {name: torch.from_numpy(np.asarray(other_NYX, dtype=np.float32)) for name, other_NYX in likened.items()}
    rows = defects.resemblance_rows(SHOWN, maps[ATTENTION], others)
    for name, other_NYX in likened.items():
        step = SIDE // randomised.SIDE
        pairs = zip(maps[ATTENTION].numpy()[:, ::step, ::step], other_NYX[:, ::step, ::step], strict=True)
        expected = np.mean([spearmanr(ours.ravel(), other.ravel()).statistic for ours, other in pairs])
        assert value(rows, "rank correlation with the attention", name, SHOWN) == pytest.approx(expected, abs=1e-3)


@pytest.mark.parametrize(("common", "expected"), [(0.0, 1 / 6), (1.0, 1.0)])
def test_the_share_that_all_images_share(common, expected):
    """Of independent maps the mean of six has a sixth of the variance; of maps that are all alike all of it."""
    generator = torch.Generator().manual_seed(10)
    alike_YX, own_NYX = torch.randn(SIDE, SIDE, generator=generator), torch.randn(6, SIDE, SIDE, generator=generator)
    attention_NYX = common * alike_YX + (1 - common) * own_NYX
    rows = defects.resemblance_rows(SHOWN, attention_NYX, {})
    share = value(rows, "share of the attention's variance that all images share", SHOWN)
    assert share == pytest.approx(expected, abs=0.01)


def test_attention_that_is_zero_everywhere_shares_and_resembles_nothing(data, maps):
    """As where a layer is dead, or no channel raises a latent."""
    dead_NYX = torch.zeros(6, SIDE, SIDE)
    assert defects.resemblance_rows(SHOWN, dead_NYX, maps) == []
    rows = defects.missed_rows(SHOWN, dead_NYX[1:], truth(data), DEFECTS[1:])
    assert {row["metric"] for row in rows} == {names.MISSED, "AUROC within images, mean"}
    assert value(rows, "AUROC within images, mean", SHOWN, "broken") == 0.5


def test_an_image_that_is_anomalous_all_over_is_not_missed(data, maps):
    masks = [*data.test_mask[:4], torch.ones(SIDE, SIDE, dtype=torch.bool), data.test_mask[5]]
    rows = defects.missed_rows(SSIM, maps[SSIM][1:], truth(replace(data, test_mask=masks)), DEFECTS[1:])
    other = roc_auc_score(masks[5].flatten(), maps[SSIM][5].flatten())
    assert value(rows, "AUROC within images, mean", SSIM, "stained") == pytest.approx((0.5 + other) / 2)


def test_what_the_latents_carry(small):
    data = category()
    _, held_out_NCYX = mvtec_job.split(data)
    restored_NCYX = explanation.reconstruct(small, data.test_NCYX)
    mean_CYX = training.to_unit(data.train_NCYX).mean(0)
    rows, kl_I = mvtec_job.latent_rows(small, data, mean_CYX, restored_NCYX)
    with torch.no_grad():
        mu_NI = small.encode(data.test_NCYX / 255)[0].numpy()
        mu_VI, logvar_VI = (values.double() for values in small.encode(held_out_NCYX / 255))
    kl = (mu_VI**2 + logvar_VI.exp() - 1 - logvar_VI).sum() / 2 / len(mu_VI)
    assert value(rows, "KL per image") == pytest.approx(float(kl), rel=1e-4)
    np.testing.assert_allclose(kl_I, ((mu_VI**2 + logvar_VI.exp() - 1 - logvar_VI) / 2).mean(0), rtol=1e-3, atol=1e-5)
    assert value(rows, "active units") == (mu_NI.var(0, ddof=1) > 0.01).sum()
    x, p = held_out_NCYX.numpy() / 255, np.clip(mean_CYX.numpy().astype(float), 1e-4, 1 - 1e-4)
    constant = -(x * np.log(p) + (1 - x) * np.log(1 - p)).sum() / len(x)
    assert value(rows, "reconstruction per image, mean image") == pytest.approx(constant, rel=1e-5)
    for name, images in {"images": data.test_NCYX.numpy() / 255, "reconstructions": restored_NCYX.numpy()}.items():
        expected = np.sqrt(images.var(0, ddof=1).mean())
        metric = "standard deviation of a pixel over the images"
        assert value(rows, metric, name) == pytest.approx(expected, rel=1e-4)


def test_frozen_weights_count_as_parameters_that_are_not_trained():
    model = Small().eval()
    total = sum(parameter.numel() for parameter in model.parameters())
    weight = model.encoder.conv1.weight.detach()
    del model.encoder.conv1.weight
    model.encoder.conv1.register_buffer("weight", weight)
    model.register_buffer("running_mean", torch.zeros(5))
    rows, _ = mvtec_job.latent_rows(model, only([]), torch.full((3, SIDE, SIDE), 0.5), torch.empty(0, 3, SIDE, SIDE))
    assert value(rows, "parameters") == total
    assert value(rows, "parameters, trained") == total - 4 * 3 * 4 * 4


# --- the panel -------------------------------------------------------------------------------------------------------


def twelve_defects():
    """Twelve defects, each of its own kind, the first without a mask, the last with an empty one; two normal ones."""
    kinds = [*(f"kind_{i}" for i in range(12)), "good", "good"]
    generator = torch.Generator().manual_seed(11)
    mask_NYX = torch.zeros(14, SIDE, SIDE, dtype=torch.bool)
    mask_NYX[:11, 5:9] = True
    x_NCYX = torch.randint(0, 256, (14, 3, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    map_NYX = torch.rand(14, SIDE, SIDE, generator=generator)
    return category(test_NCYX=x_NCYX, test_defect=kinds, test_mask=[None, *mask_NYX[1:]]), map_NYX


def test_the_panel_shows_four_defects_the_same_for_every_job():
    data, map_NYX = twelve_defects()
    figure = mvtec_job.panel(data, map_NYX, training.to_unit(data.test_NCYX), 0.7)
    pictures = [np.asarray(axis.images[0].get_array()) for axis in figure.axes if axis.images]
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == [f"kind {i}" for i in mvtec_job.shown(data)]
    assert len(set(titles)) == 4
    assert titles != [f"kind {i}" for i in (1, 2, 3, 4)]
    assert not {"good", "kind 0", "kind 11"} & set(titles)
    scale = np.quantile(map_NYX, 0.99)
    for column, title in enumerate(titles):
        i = int(title.removeprefix("kind "))
        image, mask, restored, attention, flagged = pictures[column : column + 20 : 4]
        np.testing.assert_allclose(image, data.test_NCYX[i].permute(1, 2, 0) / 255, rtol=1e-5)
        np.testing.assert_allclose(restored, image)
        assert mask.sum() == 4 * SIDE
        np.testing.assert_allclose(attention, map_NYX[i] / scale, rtol=1e-5)
        np.testing.assert_array_equal(flagged, map_NYX[i] >= 0.7)


def test_flagged_pixels_are_those_of_a_slow_loop():
    data, map_NYX = twelve_defects()
    counts = mvtec_job.flagged_counts(data, map_NYX)
    assert len(counts["thresholds"]) == 100
    assert counts["thresholds"][-1] == pytest.approx(np.quantile(map_NYX, 0.999))
    known = [i for i, mask_YX in enumerate(data.test_mask) if mask_YX is not None]
    groups = [*([i] for i in mvtec_job.shown(data)), known]
    for place, group in enumerate(groups):
        score, truth = map_NYX[group], torch.stack([data.test_mask[i] for i in group])
        assert counts["flagged/anomalous"][place] == truth.sum()
        assert counts["flagged/normal"][place] == (~truth).sum()
        for at, threshold in enumerate(counts["thresholds"]):
            flagged = score.double() >= threshold
            assert counts["flagged/true"][place, at] == (flagged & truth).sum()
            assert counts["flagged/false"][place, at] == (flagged & ~truth).sum()
    assert len(counts["flagged/true"]) == len(groups) == 5


def test_maps_of_the_defects_shown_are_kept_of_the_trained_and_of_the_untrained_network(small, monkeypatch):
    monkeypatch.setattr(measures, "PRESETS", ("liu2020_code",))
    torch.manual_seed(12)
    data, start = category(), Small().eval()
    monkeypatch.setattr(mvtec_job, "network", lambda *_: (Small, "", ""))
    monkeypatch.setattr(training, "build", lambda make, seed: start)
    trained = weights.Trained(small, training.History(), "key", "file", "cpu", "float32", True)
    fit = steps.Fit(lambda: trained)
    arrays = mvtec_job.explain(Job("mvtec15", PARAMETERS, None), fit, data)
    kept = {f"{state}/{n}, liu2020_code" for state in ("trained", "untrained") for n in PICTURED}
    assert arrays.keys() == kept | {f"{name}, peak" for name in kept}
    x_BCYX = data.test_NCYX[mvtec_job.shown(data)] / 255
    for state, model in {"trained": small, "untrained": start}.items():
        for layer in PICTURED:
            expected = attention(model.encode, f"encoder.{layer}", x_BCYX, "liu2020_code").map_BIHW.mean(1)
            ours, peak = (arrays[f"{state}/{layer}, liu2020_code{part}"] for part in ("", ", peak"))
            np.testing.assert_allclose(ours.astype(float) * peak, expected, rtol=2**-10, atol=1e-6)


# Which categories


def chosen(chapter, categories, **parameters):
    given = {"recipe": "report1", "augmentation": "none", "augmented": 7, "epochs": 0, "data": "auto"} | parameters
    return page.jobs(chapter, categories, given, again=False)


def test_categories_are_chosen_by_name_or_all_of_the_protocol(monkeypatch, tmp_path):
    monkeypatch.delenv("EXPVAE_MODE", raising=False)
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path))
    assert list(chosen("mvtec10", "all", data="real")) == list(names.TEN)
    assert list(chosen("mvtec15", " all ", data="real")) == list(mvtec.CATEGORIES)
    jobs = chosen("mvtec15", " bottle, pill ,bottle,")
    assert list(jobs) == ["bottle", "pill"]
    epochs = recipes.MVTEC["report1"].epochs
    assert jobs["pill"].parameters.items() >= {"category": "pill", "augmented": 0, "epochs": epochs}.items()
    multiplied = chosen("mvtec15", "pill", augmentation="paper", epochs=3)["pill"].parameters
    assert multiplied.items() >= {"augmented": 7, "epochs": 3}.items()
    multiplied = chosen("mvtec15", "pill", augmentation="paper", augmented=0)["pill"].parameters
    assert multiplied["augmented"] == recipes.PAPER_COUNT


@pytest.mark.parametrize("categories", ["bottel", "bottle,metal nut", "", ","])
def test_unknown_categories_are_refused_in_one_sentence(categories):
    with pytest.raises(
        ValueError, match=r"^categories must be all, or some of bottle, cable, .*, zipper, or a folder .* none\); got '"
    ) as error:
        chosen("mvtec15", categories)
    assert "\n" not in str(error.value)


def test_samples_stand_in_only_where_no_category_is_at_hand(monkeypatch, tmp_path):
    monkeypatch.delenv("EXPVAE_MODE", raising=False)
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path))
    there, measured = ["pill"], []
    monkeypatch.setattr(cards, "available", lambda: there)
    for name in ("load", "fit"):
        monkeypatch.setattr(mvtec_job, name, lambda *_: None)
    monkeypatch.setattr(mvtec_job, "measure", lambda job, *_: measured.append(job.parameters["category"]))

    def computed(data):
        measured.clear()
        mvtec_job.measure_all(chosen("mvtec15", "bottle,pill", data=data))
        return list(measured)

    assert computed("auto") == computed("real") == ["pill"]
    assert computed("sample") == ["bottle", "pill"]
    assert len(chosen("mvtec10", "all")) == 10
    assert page.walked(chosen("mvtec15", "bottle,pill")).parameters["category"] == "pill"
    there.clear()
    assert computed("auto") == ["bottle", "pill"]
    assert list(chosen("mvtec10", "all")) == ["carpet"]
    assert computed("real") == []
    with pytest.raises(FileNotFoundError, match=r"^no images of bottle, metal nut are at hand; fetch them with: "):
        page.walked(chosen("mvtec15", "bottle,metal_nut", data="real"))
    # A page shows what is stored, whatever is at hand.
    monkeypatch.setenv("EXPVAE_MODE", "read")
    job = Job("mvtec10", {}, None)
    monkeypatch.setattr(page.chapters, "jobs", lambda _chapter, wanted, **_: [job] * len(wanted))
    assert list(chosen("mvtec10", "all")) == list(names.TEN)
