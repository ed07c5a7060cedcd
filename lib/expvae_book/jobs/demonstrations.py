"""Slips of published code, each in seconds on a CPU: what it does to sprites, or to maps whose truth is known.

Networks here are untrained: a slip that changes a gradient, a pairing or a measure does so whatever the weights are.
The rows of a table are the cases, one switch apart; none is anybody's code.
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from expvae import attention, elbo_terms, overlap
from expvae.metrics import (
    PUBLISHED,
    REFERENCE,
    Protocol,
    auroc,
    auroc_per_image,
    confusion,
    factor_vae_metric,
    ious,
    perfect_code,
    thresholds,
)
from expvae.models import RBM, DSpritesVAE, MVTecVAE, Stack
from expvae_book import publications
from expvae_book.data import catalogue, dsprites
from expvae_book.jobs.rbm import ONE_HOT_TEMPERATURE, one_hot_sample
from expvae_book.jobs.slips import gradcam
from expvae_book.names import CONVOLUTIONS, TEN
from expvae_book.recipes import PAPER_COUNT

SEED, BATCH = 0, 64
LAYER = "encoder.conv1"
# Report 2's code: five factors, and the votes that were learnt from.
REPORT2 = Protocol(factors=REFERENCE.factors, votes=800, held_out=0, batch=100, balanced=True)
LATTICE = (1, 3, 6, 10, 8, 8)  # of the sprites' factors, a part of their values
SPARE = (0, 5, 27)  # latents beside those of a perfect code
FRAMES, MASKED = 36, 10  # test clips of UCSD Ped1, and those with masks in its release
FRAME, NETWORK_SIDE = (158, 238), 96  # height and width of its frames; the side of the network of Brongers et al.


def sprites(count: int = BATCH) -> Float[Tensor, "b 1 64 64"]:
    """Sprites drawn at random from all of them."""
    chosen = torch.randint(dsprites.COUNT, (count,), generator=torch.Generator().manual_seed(SEED))
    return dsprites.sample().images(chosen).float()


def network() -> DSpritesVAE:
    """The VAE of the sprites, untrained, in double precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return DSpritesVAE().double()


def consecutive(maps_BIHW: Float[Tensor, "b i h w"]) -> Float[Tensor, ""]:
    """L_AD over the pairs of latents (1st, 2nd), (2nd, 3rd) … of each image, mean over both."""
    return overlap(maps_BIHW[:, :-1], maps_BIHW[:, 1:]).mean()


def attention_losses(model: nn.Module, x_BCYX: Float[Tensor, "b 1 y x"], latents: int = 2) -> pd.DataFrame:
    """What L_AD adds to the gradient of a VAE's loss at λ = 1, by the formula and with each of three slips.

    The gradient of -ELBO + L_AD is compared with that of -ELBO alone.

    Args:
        model: A VAE in double precision.
        x_BCYX: Images in [0, 1].
        latents: The first so many are compared.
    """
    cases = {
        "by the formula": ("second_order", 1, True),
        "α taken as constant": ("constant_alpha", 1, True),
        "divided by the number of images": ("second_order", len(x_BCYX), True),
        "computed where nothing is differentiated": ("second_order", 1, False),
    }

    def gradients(l_ad: Tensor | float) -> tuple[Tensor, ...]:
        reconstruction_B, kl_B = elbo_terms(model, x_BCYX.double(), torch.Generator().manual_seed(SEED))
        return torch.autograd.grad((reconstruction_B + kl_B).mean() + l_ad, list(model.parameters()))

    without, lines = gradients(0.0), {}
    for case, (graph, divisor, differentiated) in cases.items():
        maps = attention(model.encode, LAYER, x_BCYX.double(), latents=range(latents), graph=graph)
        with torch.set_grad_enabled(differentiated):
            l_ad = consecutive(maps.map_BIHW) / divisor
        pairs = zip(gradients(l_ad), without, strict=True)
        added = torch.cat([(one - other).flatten() for one, other in pairs])
        lines[case] = {"L_AD": l_ad.item(), "norm of the gradient that it adds": added.norm().item()}
        lines[case]["parameters that feel it"] = int((added != 0).sum())
    return pd.DataFrame(lines.values(), index=lines)


def pairings(model: nn.Module, x_BCYX: Float[Tensor, "b 1 y x"]) -> pd.DataFrame:
    """L_AD over consecutive latents of each image, and over consecutive images of the batch, for three batches."""
    order_B = torch.randperm(len(x_BCYX), generator=torch.Generator().manual_seed(SEED))
    batches = {
        "as drawn": x_BCYX,
        "in another order": x_BCYX[order_B],
        "one sprite, many times": x_BCYX[:1].expand_as(x_BCYX),
    }
    lines = {}
    for batch, images_BCYX in batches.items():
        by = {"latents": "liu2020_paper", "images": "liu2020_code"}
        maps = attention(model.encode, LAYER, images_BCYX.double(), by)
        image_BYX = maps["images"].map_BYX
        lines[batch] = {
            "pairs of latents": consecutive(maps["latents"].map_BIHW).item(),
            "pairs of images": overlap(image_BYX[:-1], image_BYX[1:]).mean().item(),
        }
    return pd.DataFrame(lines).T


def machine_scores(x_BCYX: Float[Tensor, "b 1 y x"], units: int = 36) -> pd.DataFrame:
    """The score of a Boltzmann machine, its slope, and its map: by the units, and by a relaxed one-hot sample of them.

    A sample of a relaxed categorical is softmax((h + G) / temperature), whose sum is 1 whatever h is.
    """
    machine = RBM(x_BCYX[0].numel(), units)
    nn.init.normal_(machine.weight, std=0.1, generator=torch.Generator().manual_seed(SEED))
    stack = Stack([machine], tuple(x_BCYX.shape[1:]))

    def one_hot(x: Tensor) -> Tensor:
        return one_hot_sample(stack.encode(x), ONE_HOT_TEMPERATURE, torch.Generator().manual_seed(SEED))

    lines = {}
    for score, encode in {"sum of the units": stack.encode, "sum of a relaxed one-hot sample": one_hot}.items():
        given_BCYX = x_BCYX.clone().requires_grad_()
        score_B = encode(given_BCYX).sum(1)
        (slope_BCYX,) = torch.autograd.grad(score_B.sum(), given_BCYX)
        map_BHW = attention(encode, stack.maps[0], x_BCYX, "liu2020_code").linear_BIHW.sigmoid()
        lines[score] = {
            "least score": score_B.min().item(),
            "greatest score": score_B.max().item(),
            "largest gradient at a pixel": slope_BCYX.abs().max().item(),
            "least value of a map": map_BHW.min().item(),
            "greatest value of a map": map_BHW.max().item(),
        }
    return pd.DataFrame(lines).T


def layers_asked(model: nn.Module, x_BCYX: Float[Tensor, "b 1 y x"], trained_with: str = "conv2") -> pd.DataFrame:
    """Pixel AUROC, against the sprite itself, of an evaluation that is asked for each of three layers.

    Args:
        model: A network with these layers in its encoder.
        x_BCYX: Images in [0, 1].
        trained_with: The layer among the settings that were saved with the weights.
    """
    x_BCYX, truth_BYX, saved = x_BCYX.double(), x_BCYX[:, 0] > 0.5, {"layer": trained_with}

    def evaluate(settings: dict[str, str], first_stored: bool = False) -> float:
        return auroc(gradcam(model, settings["layer"], x_BCYX, first_stored), truth_BYX)

    return pd.DataFrame(
        {
            f"asked for {layer}": {
                "that layer": evaluate({"layer": layer}),
                "the layer saved with the weights": evaluate({"layer": layer} | saved),
                "the first tensor stored": evaluate({"layer": layer}, first_stored=True),
            }
            for layer in CONVOLUTIONS
        }
    )


def company(x_BCYX: Float[Tensor, "b 1 y x"], sizes: Sequence[int] = (1, 2, 8, BATCH)) -> pd.DataFrame:
    """The authors' map in batches of several sizes: its gradient is divided by its root mean square over the batch.

    Sprites stand four times as bright as what is behind them, in images whose brightness c differs by up to a factor of
    three. With A the image and the score Σ A² / 2 the gradient is A, and the map mean(A) A / r: of an image alone r is
    its own root mean square, so that the map goes with c; in a batch it goes with c².

    Args:
        x_BCYX: Sprites.
        sizes: Images in a batch, from 1.
    """
    layer, truth_BYX = nn.Conv2d(1, 1, 1, bias=False).double(), x_BCYX[:, 0] > 0.5
    nn.init.ones_(layer.weight)
    brightness_B = 1 + 2 * torch.rand(len(x_BCYX), generator=torch.Generator().manual_seed(SEED))
    x_BCYX, lines = brightness_B[:, None, None, None] * (1 + 3 * x_BCYX.double()) / 12, {}
    for size in sizes:
        parts = [
            attention(lambda x: layer(x).square().sum((2, 3)) / 2, layer, x, "liu2020_code") for x in x_BCYX.split(size)
        ]
        map_BYX = torch.cat([part.map_BYX for part in parts])
        lines[f"batches of {size}"] = {
            "mean of the first map": map_BYX[0].mean().item(),
            "pixel AUROC, mean over images": auroc_per_image(map_BYX, truth_BYX).mean().item(),
            "pixel AUROC, pooled": auroc(map_BYX, truth_BYX),
        }
    return pd.DataFrame(lines).T


def anomalies(count: int = BATCH, side: int = 32, largest: int = 8) -> Bool[Tensor, "n y x"]:
    """Truths of images of which every second one has a square anomaly at a random place, later ones a larger one."""
    chance, truth_NYX = torch.Generator().manual_seed(SEED), torch.zeros(count, side, side, dtype=torch.bool)
    for i in range(0, count, 2):
        patch = 2 + (largest - 1) * i // count
        y, x = torch.randint(side - patch, (2,), generator=chance).tolist()
        truth_NYX[i, y : y + patch, x : x + patch] = True
    return truth_NYX


def iou_conventions(truth_NYX: Bool[Tensor, "n y x"], batch: int = 16) -> pd.DataFrame:
    """The best IoU over all thresholds, by three conventions, of a map that finds anomalies and of two that do not.

    Args:
        truth_NYX: Anomalous pixels.
        batch: Images in a batch, for the IoU of every batch.
    """
    noise_NYX = torch.rand(truth_NYX.shape, generator=torch.Generator().manual_seed(SEED))
    maps = {"finds anomalies": noise_NYX + 0.5 * truth_NYX, "random": noise_NYX, "the same everywhere": 0 * noise_NYX}
    lines = {}
    for name, map_NYX in maps.items():
        cut = thresholds(map_NYX)["best"]
        whole = confusion(map_NYX, truth_NYX, cut)
        by_batch = confusion(map_NYX.unflatten(0, (-1, batch)), truth_NYX.unflatten(0, (-1, batch)), cut)
        lines[name] = {
            "anomalous pixels, pooled": ious(whole, "pooled", "anomalous").max(),
            "mean of both classes, pooled": ious(whole, "pooled", "both").max(),
            "mean of both classes, mean over batches": ious(by_batch, "per image", "both").max(),
        }
    return pd.DataFrame(lines).T


def unmasked(shares: Sequence[float] = (0.01, 0.05, 0.2)) -> pd.DataFrame:
    """Pixel AUROC of a map without fault, where clips that have anomalies but no masks are counted as normal.

    Args:
        shares: Of each clip's pixels, those that are anomalous.
    """
    lines = {}
    for share in shares:
        truth_NP = (torch.arange(1000) < round(1000 * share)).repeat(FRAMES, 1)
        known_NP = truth_NP & (torch.arange(FRAMES) < MASKED)[:, None]
        lines[f"{share:.0%} anomalous"] = {
            "clips with masks": auroc(truth_NP[:MASKED].float(), known_NP[:MASKED]),
            "and the others, as normal": auroc(truth_NP.float(), known_NP),
        }
    return pd.DataFrame(lines).T


def shrunk_masks(radii: Sequence[int] = (3, 5, 10, 20)) -> pd.DataFrame:
    """How much of a disc's area is left where its mask is shrunk to the network's size, by two rules."""
    y, x = np.ogrid[: FRAME[0], : FRAME[1]]
    scale, lines = NETWORK_SIDE**2 / np.prod(FRAME), {}
    for radius in radii:
        disc_YX = (y - FRAME[0] // 2) ** 2 + (x - FRAME[1] // 2) ** 2 <= radius**2
        small = {
            "nearest pixel": Image.Resampling.NEAREST,
            "bilinear, cut to a whole number": Image.Resampling.BILINEAR,
        }
        picture = Image.fromarray(255 * disc_YX.astype(np.uint8))
        lines[f"radius of {radius} pixels"] = {
            rule: np.sum(np.asarray(picture.resize((NETWORK_SIDE, NETWORK_SIDE), how)) == 255) / (disc_YX.sum() * scale)
            for rule, how in small.items()
        }
    return pd.DataFrame(lines).T


def ceilings() -> pd.DataFrame:
    """What the FactorVAE metric gives a perfect code, by three protocols, with spare latents of noise beside it."""
    protocols = {"five factors, held-out votes": REFERENCE, "five factors, training votes": REPORT2}
    protocols |= {"six factors, training votes": PUBLISHED}
    lines = {}
    for spare in SPARE:
        code_NI = perfect_code(LATTICE, spare, torch.Generator().manual_seed(SEED))
        lines[f"{spare} spare latents"] = {
            name: factor_vae_metric(code_NI, LATTICE, rule, generator=torch.Generator().manual_seed(SEED)).score
            for name, rule in protocols.items()
        }
    return pd.DataFrame(lines).T


def operations(model: nn.Module, shape: tuple[int, ...]) -> int:
    """Floating point operations of a training step on one image, forwards and backwards; nothing is computed."""
    x_BCYX = torch.empty(2, *shape, device="meta")
    with FlopCounterMode(display=False) as counter:
        mu_BI, _ = model.to("meta").encode(x_BCYX)
        F.mse_loss(model.decode(mu_BI), x_BCYX).backward()
    return counter.get_total_flops() // 2


def printed_hours() -> dict[str, float]:
    """By report the hours that it printed: the first for MVTec AD, the second for all data sets with anomalies."""
    times, printed = publications.select(publications.read(), metric="GPU time"), {}
    for source, what in (("R1", "MVTec AD"), ("R2", "anomaly localisation")):
        values = publications.select(times, source=source, dataset=what)["value"]
        printed[publications.SOURCES[source]] = values.max() / 3600
    return printed


def speeds(hours: dict[str, float], epochs: int = 300) -> pd.DataFrame:
    """The speed that a report's hours on MVTec AD would need: with the originals, and with the paper's 10 000 images.

    Args:
        hours: By report what it printed.
        epochs: Passes over the training images.
    """
    per_image, counts = operations(MVTecVAE(), (3, 256, 256)), catalogue.MVTEC_OFFICIAL
    lines = {}
    for report, printed in hours.items():
        categories = TEN if report == "Report 1" else tuple(counts)
        originals = sum(counts[category]["train"] for category in categories)
        for what, images in {"originals": originals, "10 000 a category": PAPER_COUNT * len(categories)}.items():
            done = epochs * images
            lines[f"{report}, {what}"] = {
                "categories": len(categories),
                "images in all epochs (millions)": done / 1e6,
                "TFLOP/s needed": done * per_image / (3600 * printed) / 1e12,
            }
    return pd.DataFrame(lines.values(), index=lines)
