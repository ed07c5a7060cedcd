"""What maps depend on: networks whose weights are random, all of them or those of some layers.

After Adebayo et al. (2018), "Sanity checks for saliency maps": where a map shows what a network has learned, it changes
when what was learned is taken away. A network that was never trained is the whole of it; layer after layer, from the
latents down or from the image up, shows where it comes from.

The statistics of batch normalisation are no weights: in an untrained network they are those of the training images, for
its layers would otherwise see values of a scale that the network was not made for.
"""

import copy
import re
from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from jaxtyping import Float, UInt8
from scipy.stats import rankdata
from sklearn.linear_model import LinearRegression
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from expvae_book import measures, runs, training
from expvae_book.names import AUROC, EXCHANGED, EXPLAINED, FLOOR, KEPT_RANKS, POSITION, TOGETHER

COMPARED = 8  # images whose maps are kept, to be compared between seeds
SIDE = 32  # pixels along either side of a kept map, or a little more
OTHER = 1_000_000  # what is added to a seed for weights that have nothing to do with those it started from
BATCHES, BATCH = 2, 16  # of training images, for the statistics of batch normalisation

Maps = dict[str, Float[Tensor, "n y x"]]


def others(make: Callable[[], nn.Module], seed: int) -> tuple[nn.Module, nn.Module]:
    """Two networks with random weights that are not those which the seed starts a training from."""
    one, two = (training.build(make, seed + far).eval() for far in (OTHER, 2 * OTHER))
    return one, two


def normalised(model: nn.Module) -> list[nn.Module]:
    """The layers of batch normalisation of a network."""
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def settle(model: nn.Module, train_NCYX: UInt8[Tensor, "n c y x"]) -> nn.Module:
    """Give the layers of batch normalisation the mean and variance of training images, in place; returns the model.

    The mean over batches drawn at random, with the network as it is.
    """
    order_N = torch.randperm(len(train_NCYX), generator=torch.Generator().manual_seed(measures.SEED))
    batches = (train_NCYX[chosen_B] for chosen_B in order_N[: BATCHES * BATCH].split(BATCH))
    update_bn(batches, _Encoding(model).eval(), next(model.parameters()).device)
    return model


class _Encoding(nn.Module):
    """A network as `update_bn` takes it: no module of it but the batch normalisations of its encoder is changed."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.norms, self.encode = nn.ModuleList(normalised(model.encoder)), model.encode

    def forward(self, x_BCYX: UInt8[Tensor, "b c y x"]) -> tuple[Tensor, Tensor]:
        return self.encode(training.to_unit(x_BCYX))


def groups(model: nn.Module) -> dict[str, list[str]]:
    """The parameters and statistics that lead to the latents, by layer, from the image to the latents.

    A stage of a ResNet is one layer, a normalisation belongs to the convolution before it, and the two linear layers
    that give mean and log-variance are one.
    """
    found: dict[str, list[str]] = {}
    for name in model.state_dict():
        if not name.startswith("decoder"):
            layer = name.removeprefix("encoder.").split(".")[0]
            layer = "latents" if layer in ("mu", "logvar") else re.sub(r"^(bn|norm)(?=\d)", "conv", layer)
            found.setdefault(layer, []).append(name)
    return found


def randomise(model: nn.Module, start: nn.Module, names: list[str]) -> nn.Module:
    """A copy of the model with the tensors of these names from another network."""
    mixed = copy.deepcopy(model)
    theirs = start.state_dict()
    mixed.load_state_dict({name: theirs[name] for name in names}, strict=False)
    return mixed.eval()


def steps(model: nn.Module) -> Iterator[tuple[str, list[str]]]:
    """What is randomised, in words, and the names of its tensors: from the latents down, and from the image up."""
    by_layer = groups(model)
    for order, layers in (("from the latents", list(by_layer)[::-1]), ("from the image", list(by_layer))):
        for count in range(1, len(layers) + (order == "from the latents")):  # all of them once
            yield f"{order} to {layers[count - 1]}", [name for layer in layers[:count] for name in by_layer[layer]]


def rank_correlation(map_NYX: Float[Tensor, "n y x"], other_NYX: Float[Tensor, "n y x"]) -> Float[np.ndarray, " n"]:
    """Spearman's ρ of the pixels of each image in two maps; NaN where one of them is the same everywhere."""
    ranks_NP = [rankdata(maps_NYX.flatten(1).numpy(), axis=1) for maps_NYX in (map_NYX, other_NYX)]
    one_NP, two_NP = (rank_NP - rank_NP.mean(1, keepdims=True) for rank_NP in ranks_NP)
    scale_N = np.sqrt((one_NP**2).sum(1) * (two_NP**2).sum(1))
    return np.divide((one_NP * two_NP).sum(1), scale_N, out=np.full(len(one_NP), np.nan), where=scale_N > 0)


def thinned(map_NYX: Float[Tensor, "n y x"]) -> Float[Tensor, "n h w"]:
    """Every so many pixels of maps, so that SIDE of them or a few more are left along either side."""
    step = max(1, map_NYX.shape[-1] // SIDE)
    return map_NYX[:, ::step, ::step]


def explained_rows(
    map_NYX: Float[Tensor, "n y x"], pictures: Mapping[str, Float[Tensor, "n y x"]], name: str, subset: str
) -> list[dict]:
    """How much of a map simpler pictures of the same images explain, on images that the fit has not seen.

    R² = 1 − Σ (m − m̂)² / Σ (m − m̄)² over the pixels of one half of the images, drawn at random, where m̂ is the
    least-squares fit on those of the other half: by each picture, by the *position* alone (the mean map of the other
    half), by all together, and by all together of maps that are exchanged among the images, of which nothing but the
    position can be told.

    Args:
        map_NYX: The maps; of fewer than four, or of a constant one, there are no rows.
        pictures: By name.
        name: The maps' name.
        subset: What else tells the rows apart; what explains stands behind it.
    """
    if len(map_NYX) < 4 or not map_NYX.std():
        return []
    generator = torch.Generator().manual_seed(measures.SEED)
    order_N, exchanged_N = (torch.randperm(len(map_NYX), generator=generator).numpy() for _ in range(2))
    halves = np.array_split(order_N, 2)
    thin = {of: thinned(picture_NYX).double().numpy() for of, picture_NYX in {**pictures, "": map_NYX}.items()}
    value_NYX = thin.pop("")
    cases = [((of,), of, value_NYX) for of in (*thin, POSITION)]
    cases += [((*thin, POSITION), TOGETHER, value_NYX), ((*thin, POSITION), EXCHANGED, value_NYX[exchanged_N])]
    rows = []
    for used, title, target_NYX in cases:
        known = thin | {POSITION: np.broadcast_to(target_NYX[halves[0]].mean(0), target_NYX.shape)}
        parts = [
            (np.stack([known[of][half] for of in used], -1).reshape(-1, len(used)), target_NYX[half].ravel())
            for half in halves
        ]
        score = LinearRegression().fit(*parts[0]).score(*parts[1])
        rows.append(runs.row(EXPLAINED, float(score), name, f"{subset}; {title}", n=len(halves[1])))
    return rows


def cascade(
    model: nn.Module,
    random: tuple[nn.Module, nn.Module],
    train_NCYX: UInt8[Tensor, "t c y x"],
    explain: Callable[[nn.Module], Maps],
    truth: measures.Truth,
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Randomise the layers of a trained network one after the other, and see what is left of its maps.

    Args:
        model: The trained VAE.
        random: Two of the same kind with random weights, see `others`: the first gives the weights, and how far the
            maps of both are alike is the least that is to be expected.
        train_NCYX: Training images, for the statistics of batch normalisation.
        explain: The maps of test images by name, of any such network.
        truth: What the maps are measured by.

    Returns:
        Rows of the pixel AUROC and of the rank correlation with the trained map, and the trained maps of some images,
        by which runs that differ in the seed are compared (`expvae_book.pages.sanity.cascade`).
    """
    where, trained = next(model.parameters()).device, explain(model)
    one, two = (settle(network.to(where), train_NCYX) for network in random)
    found = [
        _auroc(map_NYX, name, "random nothing", truth) for name, map_NYX in trained.items() if truth.truth_NYX.any()
    ]
    for step, names in steps(model):
        for name, map_NYX in explain(settle(randomise(model, one, names), train_NCYX)).items():
            if truth.truth_NYX.any():
                found.append(_auroc(map_NYX, name, f"random {step}", truth))
            found += _alike(map_NYX, trained[name], name, f"random {step}")
    floor = explain(two)
    for name, map_NYX in explain(one).items():
        found += _alike(map_NYX, floor[name], name, FLOOR)
    return found, compared(trained)


def _auroc(map_NYX: Float[Tensor, "n y x"], name: str, subset: str, truth: measures.Truth) -> dict:
    return runs.row(AUROC, truth.count(map_NYX).compute().auroc, name, subset)


def _alike(map_NYX: Float[Tensor, "n y x"], other_NYX: Float[Tensor, "n y x"], name: str, subset: str) -> list[dict]:
    rank_N = rank_correlation(thinned(map_NYX), thinned(other_NYX))
    rank_N = rank_N[~np.isnan(rank_N)]
    return [runs.row(KEPT_RANKS, float(rank_N.mean()), name, subset, n=len(rank_N))] if len(rank_N) else []


def compared(maps: Maps) -> dict[str, np.ndarray]:
    """The maps of some images in float16, by "compared/" and their names."""
    kept = {}
    for name, map_NYX in maps.items():
        kept |= measures.halved(f"compared/{name}", thinned(map_NYX)[:: max(1, len(map_NYX) // COMPARED)][:COMPARED])
    return kept
