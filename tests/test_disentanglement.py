"""The grid of the disentanglement chapter, what is measured of a model, and the tables of what was measured."""

import json
import re
import sys
from dataclasses import replace

import matplotlib
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import expvae.__main__
import expvae_book.__main__
from expvae import attention
from expvae.models import DSPRITES_LAYERS, DSpritesVAE, discriminator
from expvae_book import chapters, disentanglement, example, factorvae, figures, recipes, runs
from expvae_book.chapters import Job
from expvae_book.data import dsprites
from expvae_book.factorvae import VARIANTS, Candidate, Curves, Trained
from expvae_book.jobs import disentanglement as steps
from expvae_book.names import (
    COLLAPSED,
    EQUALISED,
    GRADIENT,
    METRIC,
    OVERLAP,
    PAIRS,
    PUBLISHED,
    REACHED,
    REFERENCE,
    SPATIAL,
    title,
)
from expvae_book.pages import disentanglement as page
from expvae_book.pages import seeds
from expvae_book.sprite_grid import grid as grid_of
from expvae_book.training import build

SHARED = {"steps": 2, "recipe": "report2", "stride": 8, "precision": "float32", "data": "sample"}
CHOICES = {"attention": "liu2020", "layer": "variant", "alpha": "variant", "pairs": "variant"}


def grid(gammas="10", lambdas="0,1", betas="", seeds=1, **choices):
    return grid_of(gammas, lambdas, betas, seeds, SHARED, CHOICES | choices)


@pytest.fixture(scope="module")
def sprites():
    return dsprites.sample()


# The grid


def test_the_grid_has_every_combination_and_each_seed():
    models = grid("10,40", "0, 0.5", "4", 2)
    told = [tuple(one[name] for name in ("beta", "gamma", "lambda", "seed")) for one in models]
    pairs = [(1, 10, 0), (1, 10, 0.5), (1, 40, 0), (1, 40, 0.5), (4, 0, 0)]
    assert told == [(*pair, seed) for pair in pairs for seed in (0, 1)]
    assert all(SHARED.items() <= one.items() for one in models)


def test_models_without_the_loss_do_not_depend_on_its_variant():
    plain, other = grid("10", "0"), grid("10", "0", attention="brongers2021", layer="conv1")
    assert plain == other
    assert steps.candidate(plain[0]) == Candidate(gamma=10.0)


@pytest.mark.parametrize("text", ["ten", "-1", "1,,nan", "inf"])
def test_weights_must_be_numbers(text):
    with pytest.raises(ValueError, match="gammas must be numbers of 0 or more with commas between them"):
        grid(text)


def test_an_empty_grid_is_refused():
    with pytest.raises(ValueError, match="both are empty"):
        grid("", "0,1")


def test_parameters_choose_the_variant_and_what_differs_from_it():
    (one,) = grid("10", "2", layer="conv2", alpha="constant")
    expected = replace(VARIANTS["liu2020"], layer="conv2", alpha="constant")
    assert steps.candidate(one) == Candidate(gamma=10.0, attention_weight=2.0, penalty=expected)
    (one,) = grid("10", "2", pairs="all")
    expected = replace(VARIANTS["liu2020"], pairs="all", maps=10)
    assert steps.candidate(one).penalty == expected
    (one,) = grid("10", "2", attention="brongers2021")
    assert steps.candidate(one).penalty == VARIANTS["brongers2021"]
    assert not steps.candidate(one).detached
    with pytest.raises(ValueError, match="attention must be one of liu2020, report2, brongers2021; got 'mine'"):
        steps.candidate({**one, "attention": "mine"})


def test_spatial_layers_are_those_of_the_model_but_the_last():
    assert DSPRITES_LAYERS[:-1] == SPATIAL


def test_titles_name_the_kind_of_model():
    titles = [title(one) for one in grid("10", "0,0.5", "4")]
    assert titles == ["FactorVAE, γ 10", "AD-FactorVAE, γ 10, λ 0.5", "β-VAE, β 4"]


def test_held_out_images_are_a_random_sample_of_all_shapes():
    train_N, held_out_N = disentanglement.split()
    assert len(train_N) + len(held_out_N) == dsprites.COUNT
    assert not np.intersect1d(train_N.numpy(), held_out_N.numpy()).size
    shapes = np.bincount(np.unravel_index(held_out_N[:512].numpy(), dsprites.SIZES)[1])
    assert shapes.min() > 512 / 3 - 60


# One model, end to end


@pytest.fixture(scope="module")
def models(sprites, tmp_path_factory):
    """A FactorVAE and an AD-FactorVAE of two steps, from the parameters to their stored runs."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("models")
        patch.setenv("EXPVAE_CACHE", str(folder / "cache"))
        patch.setenv("EXPVAE_RUNS", str(folder / "runs"))
        patch.setitem(recipes.DSPRITES, "report2", replace(recipes.DSPRITES["report2"], batch_size=4))
        patch.setattr(disentanglement, "EXPLAINED", 8)
        patch.setattr(disentanglement, "PERFECT_DRAWS", 2)
        patch.setattr(disentanglement, "SPARE", (0, 2))
        patch.setattr(disentanglement, "SAMPLES", 20)
        patch.setattr(disentanglement, "SPARING", 1)
        patch.setattr(disentanglement, "SCHEDULED_STRIDE", 16)
        patch.setattr(disentanglement, "SCHEDULED_IMAGES", 8)
        held_out_N = disentanglement.split()[1]
        patch.setattr(disentanglement, "split", lambda: (torch.arange(1000), held_out_N[:64]))
        jobs = chapters.jobs("disentanglement", grid())
        yield steps.measure(jobs, steps.fit(jobs, sprites), sprites)


def test_what_is_stored_is_neither_trained_nor_measured_again(models, sprites, monkeypatch):
    for owner, name in ((factorvae, "train"), (disentanglement, "evaluate"), (disentanglement, "highest")):
        monkeypatch.delattr(owner, name)
    jobs = chapters.jobs("disentanglement", grid())
    fitted = steps.fit(jobs, sprites)
    assert fitted == [None, None]
    assert [run.folder for run in steps.measure(jobs, fitted, sprites)] == [run.folder for run in models]
    for layer, shown in {"conv2": "conv2", "conv5": "conv4", "variant": "conv4"}.items():
        maps = steps.explain(jobs, fitted, sprites, layer)
        assert list(maps) == [title(run.parameters) for run in models]
        for run, map_NKHW in zip(models, maps.values(), strict=True):
            np.testing.assert_array_equal(map_NKHW, run.arrays[f"maps {shown}"])


def test_only_the_model_that_is_missing_is_trained(models, sprites, monkeypatch):
    jobs, asked = chapters.jobs("disentanglement", grid("10", "0,1,2")), []
    vae, critic = build(lambda: DSpritesVAE(10), 0).eval(), build(lambda: discriminator(10), 0)

    def train(candidates, *_arguments, **_options):
        asked.extend(candidates)
        return [Trained(one, vae, critic, Curves(), "key", "file", "cpu") for one in candidates]

    monkeypatch.setattr(factorvae, "train", train)
    fitted = steps.fit(jobs, sprites)
    assert [one and one.candidate.attention_weight for one in fitted] == [None, None, 2]
    assert [one.attention_weight for one in asked] == [2]
    maps = steps.explain(jobs, fitted, sprites, "conv3")
    x_BCYX = sprites.images(torch.from_numpy(models[0].arrays["shown"])).float()
    found = attention(vae.encode, "encoder.conv3", x_BCYX)
    for image, (first, second) in enumerate(found.highest_BK(2)):
        np.testing.assert_array_equal(maps["AD-FactorVAE, γ 10, λ 2"][image], found.map_BIHW[image, [first, second]])


def test_a_row_of_the_strip_changes_one_factor(sprites):
    rows = steps.strip(sprites).axes
    images = np.array([axis.images[0].get_array().filled(np.nan) for axis in rows]).reshape(6, 6, 64, 64)
    assert [int((~np.isnan(row).any((1, 2))).sum()) for row in images] == [1, 3, 6, 6, 6, 6]
    area, column = images[2:].sum((2, 3)), (images[2:] * np.arange(64)).sum((2, 3)) / images[2:].sum((2, 3))
    assert (np.diff(area[0]) > 0).all()  # scale
    assert (np.diff(column[2]) > 1).all()  # x
    assert np.ptp(column[3]) < 1e-9 and np.ptp(area[3]) == 0  # y


def test_a_training_that_was_told_to_end_early_keeps_the_steps_that_it_had(models, sprites, monkeypatch):
    ended = Trained(Candidate(), DSpritesVAE(10), discriminator(10), Curves(), "key", "file", "cpu", 1, 2)
    kept = {}
    monkeypatch.setattr(disentanglement, "evaluate", lambda *arguments: ([], {}))
    monkeypatch.setattr(steps.probes, "take", lambda *arguments: None)
    monkeypatch.setattr(steps.probes, "verify", lambda run, draw: run)
    monkeypatch.setattr(runs, "save", lambda *arguments, **options: kept.update(options) or models[0])
    steps.measure([Job("disentanglement", grid("", "", "4", 2)[1], None)], [ended], sprites)
    assert kept["budget"] == {"unit": "steps", "asked": 150_000, "used": 1}


def test_a_run_holds_its_budget_curves_and_card(models):
    plain, with_loss = models
    for run in models:
        assert run.record["budget"] == {"unit": "steps", "asked": 150_000, "used": 2}
        assert run.record["losses"]["step"] == [1, 2]
        assert run.card.kind == "rendered"
        assert run.parameters["data"] == "sample"
        assert sorted(run.record["scheduled"]) == ["1", "2"]
        assert run.state.startswith("verified at ")
    assert "attention" not in plain.record["losses"]
    assert len(with_loss.record["losses"]["attention"]) == 2


def test_measures_of_a_run_are_those_of_its_model(models, sprites):
    run = models[0]
    # By hand, from weights that are trained again alone: an initial model, two steps.
    index_N, _ = disentanglement.lattice(8)
    assert run.metric("FactorVAE metric", REFERENCE, next(iter(COLLAPSED)))["n"] == 5000
    assert run.metric("parameters")["value"] == sum(p.numel() for p in DSpritesVAE(10).parameters())
    assert len(index_N) == 3 * 6 * 5 * 4 * 4
    for layer in SPATIAL:
        row = run.metric(OVERLAP, layer, PAIRS[1])
        assert 0 <= row["low"] <= row["value"] <= row["high"] <= 1
        assert run.arrays[f"maps {layer}"].shape[:2] == (6, 2)
    assert run.arrays["traversals"].shape == (10, 7, 64, 64)
    assert run.metric("perfect code", REFERENCE, "0 spare latents")["value"] == 1
    assert run.metric("perfect code", PUBLISHED, "0 spare latents")["value"] == pytest.approx(0.831, abs=0.01)


def test_the_constant_loss_at_conv1_reaches_that_layer_alone(models):
    run = models[0]
    reached = {row["method"]: row["value"] for row in run.record["metrics"] if row["metric"] == REACHED}
    conv1 = 32 * 4 * 4 + 32
    assert reached["brongers2021"] == reached["liu2020 at conv1, α constant"] == conv1
    assert reached["liu2020"] > conv1
    norm = {row["method"]: row["value"] for row in run.record["metrics"] if row["metric"] == GRADIENT}
    assert norm["brongers2021, divided once"] == pytest.approx(8 * norm["brongers2021"], rel=1e-4)  # 8 images


def test_overlaps_are_means_of_the_ratio_over_pairs(sprites):
    vae = build(lambda: DSpritesVAE(10), 1).eval()
    x_BCYX = sprites.images(torch.arange(0, 737_280, 100_000)).float()
    active_I = torch.tensor([True, False, True, True] + [False] * 6)
    rows = {
        (row["method"], row["subset"], row["metric"]): row
        for row in disentanglement.overlap_rows(vae, x_BCYX, active_I)
    }
    maps = attention(vae.encode, "encoder.conv3", x_BCYX).map_BIHW.numpy()
    ratios = [
        np.mean([2 * np.minimum(m[i], m[j]).sum() / (m[i] + m[j]).sum() for i, j in ((0, 2), (0, 3), (2, 3))])
        for m in maps
    ]
    row = rows["conv3", PAIRS[0], OVERLAP]
    assert row["value"] == pytest.approx(np.mean(ratios), rel=1e-5)
    assert row["high"] - row["value"] == pytest.approx(1.96 * np.std(ratios, ddof=1) / len(ratios) ** 0.5, rel=1e-4)
    sums = maps.sum((2, 3), keepdims=True)
    shares = maps / np.where(sums > 0, sums, 1)
    equal = [
        [np.minimum(m[i], m[j]).sum() for i, j in ((0, 2), (0, 3), (2, 3)) if m[i].any() and m[j].any()] for m in shares
    ]
    row = rows["conv3", PAIRS[0], EQUALISED]
    assert row["value"] == pytest.approx(np.mean([np.mean(values) for values in equal if values]), rel=1e-5)
    without = disentanglement.overlap_rows(vae, x_BCYX, torch.zeros(10, dtype=torch.bool))
    assert {row["subset"] for row in without} == {PAIRS[1]}


def test_reconstruction_is_the_cross_entropy_of_each_image(sprites):
    vae = build(lambda: DSpritesVAE(10), 1).eval()
    with torch.no_grad():
        vae.encoder.posterior.bias[10:] = -40  # no noise
    index_N = torch.tensor([5, 300_000, 700_000])
    x = sprites.images(index_N).double()
    probability = vae.decode(vae.encode(x.float())[0]).sigmoid().double()
    expected = -(x * probability.log() + (1 - x) * (1 - probability).log()).sum((1, 2, 3))
    assert torch.allclose(disentanglement.reconstruction(vae, sprites, index_N).double(), expected, rtol=1e-5)


def test_traversals_move_one_latent_and_leave_the_others(sprites):
    vae = build(lambda: DSpritesVAE(10), 1).eval()
    x_BCYX = sprites.images(torch.tensor([400_000])).float()
    drawn = disentanglement.traversals(vae, x_BCYX)
    z = vae.encode(x_BCYX)[0].detach().clone()
    z[0, 4] = -2
    image = (255 * vae.decode(z).sigmoid()).round().byte()[0, 0].numpy()
    assert np.abs(drawn[4, 1].astype(int) - image).max() <= 1


def test_the_first_seed_keeps_its_weights_and_the_maps_along_its_traversals(models, sprites):
    assert {"traversal maps", "weights/encoder.conv1.weight"} <= models[0].arrays.keys()
    vae = build(lambda: DSpritesVAE(10), 1).eval()
    images_ITYX = disentanglement.traversals(vae, sprites.images(torch.tensor([400_000])).float())
    kept = disentanglement.pictured(vae, images_ITYX)
    peak, worst = kept["traversal maps, peak"], 0
    for latent, images_TYX in enumerate(images_ITYX):
        map_BHW = attention(vae.encode, "encoder.conv2", torch.from_numpy(images_TYX)[:, None] / 255).map_BIHW[
            :, latent
        ]
        worst = max(worst, float(map_BHW.max()))
        np.testing.assert_allclose(kept["traversal maps"][latent], map_BHW / peak, atol=1e-3)  # float16
    assert worst == pytest.approx(float(peak), rel=1e-4)
    for name, value in vae.state_dict().items():
        np.testing.assert_array_equal(kept[f"weights/{name}"], value.half().numpy())


def test_a_run_becomes_the_example_that_the_command_explains(models, sprites, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(expvae_book.__main__.places, "repository", lambda: tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["expvae_book", "example", str(tmp_path)])
    with pytest.raises(SystemExit, match="2"):
        expvae_book.__main__.main()
    assert str(models[0].folder) in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", ["expvae_book", "example", str(models[0].folder)])
    expvae_book.__main__.main()
    file = tmp_path / "examples" / "dsprites" / "vae.safetensors"
    assert capsys.readouterr().out == f"{file}\n"
    weights = load_file(file)
    assert {name: value.dtype for name, value in weights.items()} == dict.fromkeys(weights, torch.float16)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    assert metadata["run"] == models[0].label
    assert json.loads(metadata["recipe"])["source"] == "second report, Table 1"
    assert metadata["licence"] == "MIT"

    (lines,) = re.findall(r"python -m expvae (explain .*\n.*)", expvae.__main__.EXAMPLE)
    monkeypatch.setattr(sys, "argv", ["expvae", *lines.replace("\\\n", "").split()])
    expvae.__main__.main()
    vae = DSpritesVAE().eval()
    vae.load_state_dict(weights)
    x_BCYX = sprites.images(torch.from_numpy(models[0].arrays["shown"])).float()
    expected = attention(vae.encode, "encoder.conv2", x_BCYX).map_BYX.numpy()
    found = np.stack([np.load(tmp_path / "maps" / f"sprite{number}.npy") for number in range(1, len(x_BCYX) + 1)])
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5 * expected.max())


def test_a_run_without_weights_is_no_example(models, tmp_path):
    one = replace(models[0])
    vars(one)["arrays"] = {"shown": models[0].arrays["shown"]}
    with pytest.raises(ValueError, match="keeps no weights"):
        example.save(one, tmp_path)


# Tables and figures


def test_the_tables_say_what_the_runs_say(models):
    results = page.results(models)
    assert results["Model"].tolist() == ["FactorVAE, γ 10, seed 0", "AD-FactorVAE, γ 10, λ 1, seed 0"]
    assert results[f"{METRIC} ({REFERENCE})"][0] == models[0].text(METRIC, REFERENCE, next(iter(COLLAPSED)))
    (change,) = page.differences(models).to_dict("records")
    wanted = ("reconstruction per image", "", "")
    expected = models[1].metric(*wanted)["value"] - models[0].metric(*wanted)["value"]
    assert change["Reconstruction (nats)"] == f"{expected:+.3f}"
    assert (change["γ"], change["λ"], change["Seeds"]) == (10, 1, 1)
    assert len(page.overlaps(models)) == 4
    assert len(page.ceilings(models[0])) == 2
    assert len(page.protocols(models)) == 2
    pulls = page.gradients(models).set_index("Variant")
    assert list(pulls.index) == list(disentanglement.COMPARED)


def test_overlaps_with_and_without_the_loss_are_compared_by_their_intervals(models):
    def with_overlap(run, low, high):
        # Two steps of training leave no two active latents: the rows of all their pairs are made up.
        of_highest = next(row for row in run.record["metrics"] if row["metric"] == OVERLAP)
        changed = [
            of_highest | {"method": layer, "subset": pairs, "low": low, "high": high}
            for layer in ("conv1", "conv4")
            for pairs in PAIRS
        ]
        return runs.Run(run.chapter, run.parameters, run.record | {"metrics": changed}, run.folder)

    plain = with_overlap(models[0], 0.4, 0.5)
    for interval, expected in (((0.1, 0.3), (2, 0, 2)), ((0.6, 0.7), (0, 2, 2)), ((0.3, 0.6), (0, 0, 2))):
        found = [plain, with_overlap(models[1], *interval)]
        for pairs in PAIRS:
            assert page.compared(found, ["conv1", "conv4"], OVERLAP, pairs) == expected
    assert page.compared([plain], ["conv4"], OVERLAP, PAIRS[1]) == (0, 0, 0)


def test_models_without_a_pair_of_active_latents_are_not_compared(models):
    alone = [row for row in models[0].record["metrics"] if row["subset"] != PAIRS[0]]
    plain = runs.Run(models[0].chapter, models[0].parameters, models[0].record | {"metrics": alone}, models[0].folder)
    found = [plain, models[1]]
    assert page.compared(found, ["conv4"], OVERLAP, PAIRS[0])[2] == 0
    assert page.compared(found, ["conv4"], OVERLAP, PAIRS[1])[2] == 1


def test_differences_over_two_seeds_have_an_interval(models):
    def with_seed(run, seed, shift):
        metrics = [
            row | {"value": row["value"] + shift} if row["metric"] == METRIC else row for row in run.record["metrics"]
        ]
        return runs.Run(run.chapter, run.parameters | {"seed": seed}, run.record | {"metrics": metrics}, run.folder)

    twice = [*models, with_seed(models[0], 1, 0.0), with_seed(models[1], 1, 0.2)]
    (change,) = page.differences(twice).to_dict("records")
    assert change["Seeds"] == 2
    assert change[METRIC].count("[") == 1


def test_the_points_of_the_trade_off_have_published_ones_beside_ours(models):
    table = page.points(models)
    counts = table.groupby(["source", "kind"]).size()
    assert counts["ours", "FactorVAE"] == counts["ours", "AD-FactorVAE"] == 1
    assert counts["Liu et al. 2020", "β-VAE"] == 6
    assert counts["Brongers et al.", "FactorVAE"] == 3
    assert not table[["score", "cost"]].isna().any(axis=None)
    assert seeds.seed_spread() == pytest.approx(0.1025)
    figure = page.tradeoff(table, x="cost", y="score")
    (axis,) = figure.axes
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("cost", "score")
    labels = {text.get_text() for text in figure.legends[0].get_texts()}
    assert {"FactorVAE (ours)", "β-VAE (Liu et al. 2020)"} <= labels


def test_curves_have_a_panel_for_each_quantity_and_a_line_for_each_model(models):
    panels = page.curves(models)
    assert list(panels["L_AD"]) == ["AD-FactorVAE, γ 10, λ 1, seed 0"]
    figure = figures.curves(panels, x="steps")
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert [axis.get_title() for axis in shown] == list(panels)
    assert [len(axis.lines) for axis in shown] == [len(lines) for lines in panels.values()]
    assert len({matplotlib.colors.to_hex(line.get_color()) for line in shown[0].lines}) == len(models)


def test_beta_vaes_have_no_gradient_of_a_discriminator(sprites):
    vae, critic = build(lambda: DSpritesVAE(10), 0).eval(), build(lambda: discriminator(10), 0)
    x_BCYX = sprites.images(torch.arange(8)).float()
    norms = {}
    for gamma in (0.0, 1e-9):
        trained = Trained(Candidate(gamma=gamma), vae, critic, Curves(), "key", "file", "cpu")
        rows = disentanglement.gradient_rows(trained, x_BCYX)
        norms[gamma] = next(row["value"] for row in rows if row["method"] == "rest of the loss")
    assert norms[0.0] == pytest.approx(norms[1e-9])
    assert factorvae.VARIANTS["liu2020"].layer == "conv4"
