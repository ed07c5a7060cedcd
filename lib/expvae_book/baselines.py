"""Maps that need no attention, in the form of attention maps: what any map must beat to have explained something."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from expvae_book.names import CENTRE, PRIOR, SIMPLE, SSIM

NAMES = SIMPLE[:-1]  # of every image; the position prior is one of the data set
CENTRE_SIGMA = 0.25  # of the image's height and width


def input_intensity(x_BCYX: Float[Tensor, "b c y x"]) -> Float[Tensor, "b y x"]:
    """The image itself, averaged over channels: M = 1/C Σ_c x_c. It marks all ink, whichever digit it belongs to."""
    return x_BCYX.mean(dim=1)


def reconstruction_error(
    x_BCYX: Float[Tensor, "b c y x"], reconstruction_BCYX: Float[Tensor, "b c y x"]
) -> Float[Tensor, "b y x"]:
    """What the model could not reproduce: M = 1/C Σ_c (x_c − x̂_c)².

    Args:
        x_BCYX: Images.
        reconstruction_BCYX: Their reconstructions in the same units: intensities, not the logits that a decoder gives.
    """
    return (x_BCYX - reconstruction_BCYX).square().mean(dim=1)


def dissimilarity(
    x_BCYX: Float[Tensor, "b c y x"], reconstruction_BCYX: Float[Tensor, "b c y x"]
) -> Float[Tensor, "b y x"]:
    """1 − SSIM of each pixel's neighbourhood, averaged over the colours (Bergmann et al., VISAPP 2019).

    The neighbourhood is a Gaussian of 1.5 pixels, as Wang et al. (2004) have it.
    """
    # Only here: it takes seconds to import, and a page that only shows stored runs does not need it.
    from torchmetrics.functional.image import structural_similarity_index_measure

    _, similarity_BCYX = structural_similarity_index_measure(
        reconstruction_BCYX, x_BCYX, data_range=1.0, return_full_image=True
    )
    return 1 - similarity_BCYX.mean(1)


def edges(x_NYX: Float[Tensor, "n y x"]) -> Float[Tensor, "n y x"]:
    """The length of the brightness gradient, √((∂x/∂i)² + (∂x/∂j)²) by central differences."""
    down_NYX, right_NYX = torch.gradient(x_NYX, dim=(1, 2))
    return (down_NYX.square() + right_NYX.square()).sqrt()


def mean_image_difference(x_BCYX: Float[Tensor, "b c y x"], mean_CYX: Float[Tensor, "c y x"]) -> Float[Tensor, "b y x"]:
    """What sets an image apart from the average of the training: M = 1/C Σ_c (x_c − x̄_c)², x̄ = 1/N Σ_n x_n.

    It is the reconstruction error of a model that answers every image with the same one.

    Args:
        x_BCYX: Images.
        mean_CYX: The mean training image in the same units, ``training.to_unit(train_NCYX).mean(0)``.
    """
    return reconstruction_error(x_BCYX, mean_CYX.expand_as(x_BCYX))


def position_prior(train_NCYX: UInt8[Tensor, "n c y x"]) -> Float[Tensor, "1 y x"]:
    """That anomalies lie where images vary: M = 1/C Σ_c Var_n x_nc, the same for every test image.

    It has seen no test image, so that a map which does no better has told nothing about one.

    Args:
        train_NCYX: Training images, 0…255; their variance is that of intensities in [0, 1].
    """
    count, total_CYX, square_CYX = len(train_NCYX), 0.0, 0.0
    for x_BCYX in train_NCYX.split(256):  # in double precision, which all images at once would be too large for
        x_BCYX = x_BCYX.double() / 255
        total_CYX, square_CYX = total_CYX + x_BCYX.sum(0), square_CYX + x_BCYX.square().sum(0)
    return (square_CYX / count - (total_CYX / count) ** 2).clamp(min=0).mean(0, keepdim=True).float()


def centre_prior(y: int, x: int) -> Float[Tensor, "1 y x"]:
    """That anomalies lie in the middle: a Gaussian at the image's centre, the same for every image.

        M(i, j) = exp(−½ [((i − (Y−1)/2) / σY)² + ((j − (X−1)/2) / σX)²]),  σ = 1/4

    so that σ counts image heights and widths. Measures of rank such as the AUROC do not depend on σ.

    Args:
        y: Height Y in pixels.
        x: Width X in pixels.

    Returns:
        One map; ``expand(len(x_BCYX), -1, -1)`` gives a batch without a copy.
    """
    vertical_Y, horizontal_X = (
        torch.exp(-0.5 * ((torch.arange(size) - (size - 1) / 2) / (CENTRE_SIGMA * size)) ** 2) for size in (y, x)
    )
    return torch.outer(vertical_Y, horizontal_X)[None]


def places(train_NCYX: UInt8[Tensor, "n c y x"], count: int) -> dict[str, Float[Tensor, "count y x"]]:
    """The maps that look at no test image, by name, each for so many of them."""
    maps_1YX = {PRIOR: position_prior(train_NCYX), CENTRE: centre_prior(*train_NCYX.shape[2:])}
    return {name: map_1YX.expand(count, -1, -1) for name, map_1YX in maps_1YX.items()}


def random_map(shape: tuple[int, int, int], generator: torch.Generator) -> Float[Tensor, "b y x"]:
    """Knows nothing: independent values, uniform in [0, 1), so that the expected AUROC is ½.

    Args:
        shape: Batch, height and width.
        generator: Source of the numbers; the map is made on its device.
    """
    return torch.rand(shape, generator=generator, device=generator.device)


def maps(
    x_BCYX: Float[Tensor, "b c y x"],
    reconstruction_BCYX: Float[Tensor, "b c y x"],
    mean_CYX: Float[Tensor, "c y x"],
    generator: torch.Generator | None = None,
    names: Sequence[str] = NAMES,
) -> dict[str, Float[Tensor, "b y x"]]:
    """Baselines of a batch by name: one map per image, on the images' device, as attention gives.

    Args:
        x_BCYX: Images.
        reconstruction_BCYX: Their reconstructions in the same units.
        mean_CYX: The mean training image in the same units.
        generator: Source of the numbers of the map "random"; one on the CPU gives the same on every device.
        names: Which of NAMES, and "SSIM".
    """
    b, _, y, x = x_BCYX.shape
    makers = {
        "input intensity": lambda: input_intensity(x_BCYX),
        "reconstruction error": lambda: reconstruction_error(x_BCYX, reconstruction_BCYX),
        SSIM: lambda: dissimilarity(x_BCYX, reconstruction_BCYX),
        "mean image difference": lambda: mean_image_difference(x_BCYX, mean_CYX),
        CENTRE: lambda: centre_prior(y, x).expand(b, -1, -1),
        "random": lambda: random_map((b, y, x), generator),
    }
    return {name: makers[name]().to(x_BCYX.device) for name in names}
