"""The slips of published code in small: against closed forms and slow second implementations, and in seconds."""

import time
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.metrics import jaccard_score, roc_auc_score
from torch import nn
from torch.nn import functional as F

from expvae import attention
from expvae.models import MVTecVAE
from expvae_book.data import catalogue
from expvae_book.jobs import demonstrations, slips
from expvae_book.names import CONVOLUTIONS, TEN

DEMONSTRATIONS = {
    "attention_losses": lambda model, x_BCYX: demonstrations.attention_losses(model, x_BCYX),
    "pairings": lambda model, x_BCYX: demonstrations.pairings(model, x_BCYX),
    "machine_scores": lambda _model, x_BCYX: demonstrations.machine_scores(x_BCYX),
    "layers_asked": lambda model, x_BCYX: demonstrations.layers_asked(model, x_BCYX),
    "company": lambda _model, x_BCYX: demonstrations.company(x_BCYX),
    "iou_conventions": lambda *_: demonstrations.iou_conventions(demonstrations.anomalies()),
    "unmasked": lambda *_: demonstrations.unmasked(),
    "shrunk_masks": lambda *_: demonstrations.shrunk_masks(),
    "ceilings": lambda *_: demonstrations.ceilings(),
    "speeds": lambda *_: demonstrations.speeds(demonstrations.printed_hours()),
}


@pytest.fixture(scope="module")
def model():
    return demonstrations.network()


@pytest.fixture(scope="module")
def x_BCYX():
    return demonstrations.sprites()


@pytest.fixture(scope="module")
def shown(model, x_BCYX):
    """Each demonstration as the page shows it, run once, and the CPU seconds that it took."""
    kept = {}

    def run(name):
        if name not in kept:
            started = time.process_time()
            kept[name] = DEMONSTRATIONS[name](model, x_BCYX), time.process_time() - started
        return kept[name]

    return run


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_a_demonstration_takes_seconds(shown, name):
    table, seconds = shown(name)
    assert seconds < 10
    assert np.isfinite(table.to_numpy()).all()


def slow_l_ad(model, x_BCYX, constant):
    """L_AD of the first two latents, image by image."""
    A_BCHW = model.encoder.conv1(x_BCYX)
    mu_BI = model.encoder[1:](A_BCHW).flatten(1)[:, :10]
    maps = []
    for latent in range(2):
        (gradient_BCHW,) = torch.autograd.grad(mu_BI[:, latent].sum(), A_BCHW, create_graph=True)
        alpha_BC11 = gradient_BCHW.mean((2, 3), keepdim=True)
        maps.append(((alpha_BC11.detach() if constant else alpha_BC11) * A_BCHW).sum(1).relu())
    ratios = [2 * torch.minimum(one, two).sum() / (one + two).sum() for one, two in zip(*maps, strict=True)]
    return sum(ratios) / len(ratios)


def test_what_the_attention_loss_adds_to_the_gradient_is_its_own(model, x_BCYX):
    x_BCYX = x_BCYX[:4]
    table = demonstrations.attention_losses(model, x_BCYX)
    norms = table["norm of the gradient that it adds"]
    for case, constant in (("by the formula", False), ("α taken as constant", True)):
        l_ad = slow_l_ad(model, x_BCYX.double(), constant)
        own = torch.autograd.grad(l_ad, list(model.parameters()), allow_unused=True)
        flat = torch.cat([part.flatten() for part in own if part is not None])
        assert table["L_AD"][case] == pytest.approx(l_ad.item(), rel=1e-9)
        assert norms[case] == pytest.approx(flat.norm().item(), rel=1e-6)
    divided = "divided by the number of images"
    assert norms[divided] * 4 == pytest.approx(norms["by the formula"], rel=1e-6)
    assert table["L_AD"][divided] * 4 == pytest.approx(table["L_AD"]["by the formula"], rel=1e-9)


def test_a_loss_that_is_not_differentiated_adds_nothing(shown):
    table, _ = shown("attention_losses")
    unheard = table.loc["computed where nothing is differentiated"]
    assert unheard["norm of the gradient that it adds"] == 0
    assert unheard["parameters that feel it"] == 0
    assert unheard["L_AD"] == table["L_AD"]["by the formula"] > 0
    assert table["parameters that feel it"]["α taken as constant"] == 32 * 16 + 32  # of the first convolution


def test_pairs_of_images_depend_on_the_batch_and_not_on_latents(shown, model, x_BCYX):
    table, _ = shown("pairings")
    latents, images = table["pairs of latents"], table["pairs of images"]
    assert latents["in another order"] == pytest.approx(latents["as drawn"], rel=1e-9)
    assert abs(images["in another order"] - images["as drawn"]) > 1e-3
    assert images["one sprite, many times"] == pytest.approx(1)
    map_BYX = slips.gradcam(model, "conv1", x_BCYX.double(), first_stored=False)
    slow = [2 * torch.minimum(one, two).sum().item() / (one + two).sum().item() for one, two in pairwise(map_BYX)]
    assert images["as drawn"] == pytest.approx(np.mean(slow), rel=1e-9)


def test_a_relaxed_one_hot_sample_has_a_constant_sum(shown, x_BCYX):
    table, _ = shown("machine_scores")
    one_hot, units = table.loc["sum of a relaxed one-hot sample"], table.loc["sum of the units"]
    assert one_hot["least score"] == pytest.approx(1, abs=1e-6)
    assert one_hot["greatest score"] == pytest.approx(1, abs=1e-6)
    assert one_hot["largest gradient at a pixel"] < 1e-6
    assert 0.49 < one_hot["least value of a map"] <= one_hot["greatest value of a map"] < 0.51
    chance = torch.Generator().manual_seed(demonstrations.SEED)
    weight_HV = nn.init.normal_(torch.empty(36, 4096), std=0.1, generator=chance).double().numpy()
    p_BH = expit(x_BCYX.flatten(1).numpy() @ weight_HV.T)
    slope_BV = (p_BH * (1 - p_BH)) @ weight_HV
    assert units["greatest score"] == pytest.approx(p_BH.sum(1).max(), rel=1e-5)
    assert units["largest gradient at a pixel"] == pytest.approx(np.abs(slope_BV).max(), rel=1e-4)
    assert units["greatest value of a map"] - units["least value of a map"] > 0.5


def test_an_evaluation_of_the_saved_layer_gives_one_number(shown, model, x_BCYX):
    table, _ = shown("layers_asked")
    truth = (x_BCYX[:, 0] > 0.5).flatten()
    for layer in CONVOLUTIONS:
        map_BYX = attention(model.encode, f"encoder.{layer}", x_BCYX.double(), "liu2020_code").map_BYX
        asked = table[f"asked for {layer}"]
        assert asked["that layer"] == pytest.approx(roc_auc_score(truth, map_BYX.flatten()), abs=1e-6)
        assert asked["the layer saved with the weights"] == table["asked for conv2"]["that layer"]
        assert asked["the first tensor stored"] == table["asked for conv1"]["that layer"]
    assert table.loc["that layer"].nunique() == 3


def test_the_size_of_a_batch_moves_a_pooled_auroc(shown, x_BCYX):
    table, _ = shown("company")
    brightness_B = 1 + 2 * torch.rand(len(x_BCYX), generator=torch.Generator().manual_seed(demonstrations.SEED))
    A_BYX = brightness_B[:, None, None] * (1 + 3 * x_BCYX[:, 0].double()) / 12
    for size in (1, 2, 8, 64):
        maps = [
            part.mean((1, 2), keepdim=True) * part / (part.square().mean().sqrt() + 1e-5) for part in A_BYX.split(size)
        ]
        pooled = roc_auc_score((x_BCYX > 0.5).flatten(), torch.cat(maps).flatten())
        row = table.loc[f"batches of {size}"]
        assert row["pixel AUROC, pooled"] == pytest.approx(pooled, abs=1e-4)
        assert row["mean of the first map"] == pytest.approx(maps[0][0].mean().item(), rel=1e-5)
        assert row["pixel AUROC, mean over images"] == 1
    assert table["pixel AUROC, pooled"].is_monotonic_decreasing


def test_ious_by_three_conventions():
    truth_NYX = demonstrations.anomalies(8, side=6, largest=3)
    table = demonstrations.iou_conventions(truth_NYX, batch=4)
    truth_NP, p = truth_NYX.flatten(1).numpy(), truth_NYX.double().mean().item()
    noise_NP = torch.rand(truth_NYX.shape, generator=torch.Generator().manual_seed(0)).flatten(1).numpy()
    for name, score_NP in {"finds anomalies": noise_NP + 0.5 * truth_NP, "random": noise_NP}.items():
        best = np.zeros(3)
        for threshold in np.unique(score_NP):
            flagged_NP, whole = score_NP >= threshold, {"zero_division": 0.0}
            halves = [slice(4), slice(4, 8)]
            both = [
                jaccard_score(truth_NP[part].ravel(), flagged_NP[part].ravel(), average="macro", **whole)
                for part in (slice(None), *halves)
            ]
            anomalous = jaccard_score(truth_NP.ravel(), flagged_NP.ravel(), **whole)
            best = np.maximum(best, [anomalous, both[0], np.mean(both[1:])])
        assert table.loc[name].to_numpy() == pytest.approx(best, abs=5e-3)
    # What is the same everywhere flags all or nothing.
    assert table.loc["the same everywhere"].to_numpy() == pytest.approx([p, (1 - p) / 2, (1 - p) / 2])


def test_anomalies_counted_as_normal_have_a_closed_form(shown):
    table, _ = shown("unmasked")
    for share in (0.01, 0.05, 0.2):
        row, wrong = table.loc[f"{share:.0%} anomalous"], 26 * share
        assert row["clips with masks"] == 1
        assert row["and the others, as normal"] == pytest.approx(1 - 0.5 * wrong / (10 * (1 - share) + 26))


def test_masks_that_are_cut_lose_their_borders(shown):
    table, _ = shown("shrunk_masks")
    y, x = torch.meshgrid(torch.arange(158), torch.arange(238), indexing="ij")
    for radius in (3, 5, 10, 20):
        disc_YX = ((y - 79) ** 2 + (x - 119) ** 2 <= radius**2).float()
        smooth_YX = F.interpolate(disc_YX[None, None], (96, 96), mode="bilinear", antialias=True)
        nearest_YX = F.interpolate(disc_YX[None, None], (96, 96), mode="nearest-exact")
        area = disc_YX.sum() * 96 * 96 / (158 * 238)
        row = table.loc[f"radius of {radius} pixels"]
        assert row["bilinear, cut to a whole number"] == pytest.approx(((smooth_YX > 0.998).sum() / area).item(), 0.02)
        assert row["nearest pixel"] == pytest.approx((nearest_YX.sum() / area).item(), 0.02)
    assert table["bilinear, cut to a whole number"].is_monotonic_increasing


def test_a_perfect_code_is_not_perfect_by_six_factors(shown):
    table, _ = shown("ceilings")
    five = table[["five factors, held-out votes", "five factors, training votes"]]
    assert (five == 1).all(axis=None)
    six = table["six factors, training votes"]
    assert six["0 spare latents"] == 5 * (800 // 6) / 800
    assert six.is_monotonic_increasing
    assert six["27 spare latents"] <= 6 * (800 // 6) / 800 < 1


def test_the_speed_that_hours_would_need(shown):
    table, _ = shown("speeds")
    model, products = MVTecVAE().to("meta"), []

    def count(module, _inputs, output):
        positions = output[0].numel() if isinstance(module, nn.Linear | nn.Conv2d) else _inputs[0][0].numel()
        products.append(positions * module.weight[0].numel())

    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(count)
    mu_BI, _ = model.encode(torch.empty(1, 3, 256, 256, device="meta"))
    model.decode(mu_BI)
    per_image = 6 * sum(products)  # a multiplication and an addition: forwards, and to inputs and weights
    assert demonstrations.printed_hours() == {"Report 1": 29146 / 3600, "Report 2": 6.3}  # 8:05:46 and 6 h 18 min
    originals = sum(catalogue.MVTEC_OFFICIAL[category]["train"] for category in TEN)
    for what, images in {"originals": originals, "10 000 a category": 100_000}.items():
        row = table.loc[f"Report 1, {what}"]
        assert row["images in all epochs (millions)"] == pytest.approx(300 * images / 1e6)
        assert row["TFLOP/s needed"] == pytest.approx(300 * images * per_image / 29146 / 1e12, rel=0.03)
    assert table["categories"].tolist() == [10, 10, 15, 15]
