"""Published slips, one at a time: what each does to the pixel AUROC of maps of UCSD Ped1.

How could three layers give one number? Hooks that store the output of *every* layer, and a look-up that returns the
first tensor stored instead of the one asked for, would do it.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn
from torch.nn import functional as F

from expvae.metrics import PixelMetrics, auroc_difference
from expvae_book import explanation, measures, runs, training
from expvae_book.data import ucsd
from expvae_book.names import AGAINST, BILINEAR, CORRECTED_CASE, OTHERS_NORMAL, RELEASED
from expvae_book.names import CONVOLUTIONS as LAYERS
from expvae_book.names import SWITCHED_LAYER as LAYER

EVERY = 10  # frames, of all test clips, so that a batch of 32 reaches over more than one clip
SWITCHED = explanation.method_of("liu2020_code")
CORRECTED = replace(SWITCHED, normaliser="image")


def gradcam(
    model: nn.Module, asked: str, x_BCYX: Float[Tensor, "b c y x"], first_stored: bool
) -> Float[Tensor, "b y x"]:
    """|Σ_c α_c A_c| of the sum of the means, with hooks on all layers that might be asked for.

    Args:
        model: The trained VAE.
        asked: The layer.
        x_BCYX: Images in [0, 1].
        first_stored: Whether the first tensor stored is taken instead of that of the layer.
    """
    stored = {}
    handles = [
        getattr(model.encoder, name).register_forward_hook(
            lambda _module, _input, output, name=name: stored.update({name: output})
        )
        for name in LAYERS
    ]
    mu_BI = model.encode(x_BCYX)[0]
    for handle in handles:
        handle.remove()
    A_BCHW = next(iter(stored.values())) if first_stored else stored[asked]
    gradient_BCHW = torch.autograd.grad(mu_BI.sum(), A_BCHW)[0]
    gradient_BCHW = gradient_BCHW / (gradient_BCHW.square().mean().sqrt() + 1e-5)
    map_B1HW = (gradient_BCHW.mean((2, 3), keepdim=True) * A_BCHW).sum(1, keepdim=True)
    return F.interpolate(map_B1HW.detach(), x_BCYX.shape[-2:], mode="bilinear").abs()[:, 0]


def counted(
    map_NYX: Float[Tensor, "n y x"],
    mask_N: Sequence[Bool[Tensor, "y x"] | None],
    clip_N: Int64[Tensor, " n"],
    where_N: Bool[Tensor, " n"] | None = None,
    **options: str,
) -> PixelMetrics:
    """Pixel counts of the frames chosen, by clip."""
    counts = PixelMetrics(**options)
    chosen = range(len(mask_N)) if where_N is None else torch.nonzero(where_N)[:, 0].tolist()
    for start in range(0, len(chosen), 100):
        some = chosen[start : start + 100]
        counts.update(map_NYX[some], [mask_N[i] for i in some], unit=clip_N[some])
    return counts


def _maps(model: nn.Module, clips: ucsd.UCSD, batch: int) -> dict[tuple[str, str], Float[Tensor, "n y x"]]:
    """The maps of every tenth frame with each switch of the map alone, and by hooks with the slip and without it."""
    x_NCYX, where = clips.test_NYX[::EVERY, None], next(model.parameters()).device

    def explain(case: tuple[str, str], method: object, images: int) -> dict:
        return explanation.explain(model, f"encoder.{LAYER}", x_NCYX, {case: method}, batch=images, seed=measures.SEED)

    alone = explain(CORRECTED_CASE, CORRECTED, batch)
    alone["gradient", "per image"] = alone[CORRECTED_CASE]
    for images in (8, 32, 128):
        alone |= explain(("gradient", f"per batch of {images}"), replace(SWITCHED, normaliser="batch"), images)
    for name in LAYERS:
        for slip, first in (("hook, as asked", False), ("hook, first stored", True)):
            parts = training.to_unit(x_NCYX).split(batch)
            alone[slip, name] = torch.cat([gradcam(model, name, x_BCYX.to(where), first).cpu() for x_BCYX in parts])
    return alone


def rows(model: nn.Module, clips: ucsd.UCSD, truncated: ucsd.UCSD, batch: int) -> list[dict]:
    """Rows of the AUROC with each switch alone, and its difference from the case without it.

    Beside the slip of the hooks: the gradient divided by its size over the whole batch instead of over the image;
    masks shrunk by bilinear interpolation and truncated; frames without masks counted as normal.

    Args:
        model: The trained VAE.
        clips: All test clips.
        truncated: The same with masks that were shrunk so.
        batch: Images at a time.
    """
    clip_N, mask_N = clips.test_clip_N[::EVERY], clips.test_mask[::EVERY]
    released_N = [
        mask if clip in ucsd.RELEASED_MASKS else None for mask, clip in zip(mask_N, clip_N.tolist(), strict=True)
    ]
    alone = _maps(model, clips, batch)
    counts = {case: counted(map_NYX, mask_N, clip_N) for case, map_NYX in alone.items()}
    for case, truth_N, rule in (
        (BILINEAR, truncated.test_mask[::EVERY], "leave out"),
        (RELEASED, released_N, "leave out"),
        (OTHERS_NORMAL, released_N, "normal"),
    ):
        counts["masks", case] = counted(alone[CORRECTED_CASE], truth_N, clip_N, without_mask=rule)
    found = []
    for (switch, setting), of_case in counts.items():
        measured = of_case.auroc_interval(seed=measures.SEED)
        found.append(runs.row("switch", method=switch, subset=setting, **vars(measured)))
        reference = AGAINST.get((switch, setting), CORRECTED_CASE)
        if reference is None:
            continue
        if switch == "masks":  # another truth, which the bootstrap cannot pair
            change = {"value": measured.value - counts[reference].compute().auroc}
        else:
            change = vars(auroc_difference(of_case, counts[reference], seed=measures.SEED))
        found.append(runs.row("switch, change", method=switch, subset=setting, **change))
    return found
