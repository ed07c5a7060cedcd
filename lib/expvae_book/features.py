"""What a practitioner would use instead of a VAE: anomaly maps from the features of a ResNet-18, PaDiM and neighbours.

The network is trained on ImageNet or not at all, and never on the images at hand; of the normal training images only
statistics of its features are kept. A test image is scored by the maximum of its map.

Suffixes as in expvae.attention, H W being the resolution of the features, and N images, P = H·W positions, K features
that are kept, R those that are compared at a time.
"""

from collections.abc import Iterable, Iterator

import torch
from jaxtyping import Float, UInt8
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import update_bn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.functional import normalize
from tqdm import tqdm

from expvae_book import training
from expvae_book.data import imagenet

INITIALS = ("imagenet", "random")
STAGES = ("layer1", "layer2", "layer3")
CHANNELS = 64 + 128 + 256  # of the three stages
SIGMA, SIDE = 4.0, 256  # pixels of smoothing, of an image whose shorter side has so many
AT_ONCE = 16  # images, whose features take 120 MB at 256x256
COMPARED = 1024  # features, whose distances to 20 000 others take 80 MB
STANDARD = ResNet18_Weights.IMAGENET1K_V1.transforms()  # ImageNet's mean and standard deviation


class Backbone(nn.Module):
    """The outputs of the first three stages of torchvision's ResNet-18, side by side: 448 channels.

    Those of the second and third stage are brought to the resolution of the first, a quarter of the image's, by
    repeating the nearest value, as implementations of PaDiM do, although that moves them two and six pixels of the
    image to the lower right: strided convolutions are centred on every 8th and 16th pixel. Grey images are repeated to
    three channels, all are normalised by ImageNet's mean and standard deviation, and those whose shorter side is below
    `least` are scaled up to it bilinearly: 28 pixels would leave 7x7, 4x4 and 2x2 features. Nothing is recorded for
    gradients.

    Args:
        start: ImageNet's weights, or None for random ones.
        least: What the shorter side of smaller images is scaled up to, in pixels; 112 is half of what ResNets are
            trained on, and leaves 28x28 features.

    Attributes:
        sha256: SHA-256 of the file of the weights, empty for random ones.
    """

    def __init__(self, start: imagenet.ImageNet | None = None, least: int = 112):
        super().__init__()
        self.sha256, self.least = start.sha256 if start else "", least
        resnet = resnet18()
        resnet.fc = nn.Identity()
        if start:
            resnet.load_state_dict({name: value for name, value in start.tensors.items() if name[:3] != "fc."})
        self.stages = create_feature_extractor(resnet, list(STAGES))

    @torch.no_grad()
    def forward(self, x_BCYX: UInt8[Tensor, "b c y x"]) -> Float[Tensor, "b 448 h w"]:
        """Features of images with grey levels 0…255."""
        x_B3YX = normalize(training.to_unit(x_BCYX).expand(-1, 3, -1, -1), STANDARD.mean, STANDARD.std)
        shorter = min(x_BCYX.shape[2:])
        if shorter < self.least:
            size = [round(side * self.least / shorter) for side in x_BCYX.shape[2:]]
            x_B3YX = F.interpolate(x_B3YX, size=size, mode="bilinear", align_corners=False)
        stages = self.stages(x_B3YX)
        return torch.cat([F.interpolate(stages[name], size=stages["layer1"].shape[2:]) for name in STAGES], dim=1)


def backbone(
    initial: str,
    train_NCYX: UInt8[Tensor, "n c y x"],
    seed: int,
    *,
    least: int = 112,
    device: torch.device | str = "cpu",
) -> Backbone:
    """The network that gives the features, in evaluation mode: with ImageNet's weights, or with random ones.

    ImageNet's come with the means and variances of their batch normalisations. Random weights have none, and with a
    mean of 0 and a variance of 1 the features would grow from block to block: theirs are taken from the training
    images, by `batch_statistics`.

    Args:
        initial: "imagenet" or "random".
        train_NCYX: Training images, 0…255. With ImageNet's weights they are not looked at.
        seed: Fixes random weights, drawn on the CPU, and the batches in which images are put together.
        least: What the shorter side of smaller images is scaled up to, in pixels.
        device: Where features are computed.

    Raises:
        ValueError: If initial is neither, or ImageNet's weights cannot be had.
    """
    if initial not in INITIALS:
        raise ValueError(f"initial must be one of {', '.join(INITIALS)}; got {initial!r}")
    start = imagenet.required() if initial == "imagenet" else None
    network = training.build(lambda: Backbone(start, least), seed).to(device).eval()
    if start is None:
        batch_statistics(network, train_NCYX, seed)
    return network


def batch_statistics(network: nn.Module, train_NCYX: UInt8[Tensor, "n c y x"], seed: int) -> None:
    """Give the batch normalisations of a network the statistics of some images.

    The network sees every image once in training mode, in batches of one size give or take an image, and each
    normalisation sees what those before it make of the batch. What is kept is the mean over the batches of their means
    and variances (momentum None).

    Args:
        network: A network that takes images 0…255; changed in place.
        train_NCYX: The images.
        seed: Puts batches together at random: those of consecutive frames of a video would hardly vary.
    """
    order_N = torch.randperm(len(train_NCYX), generator=torch.Generator().manual_seed(seed))
    batches = order_N.tensor_split(-(-len(order_N) // AT_ONCE))
    update_bn((train_NCYX[chosen_B] for chosen_B in batches), network, next(network.parameters()).device)


def gaussians(
    parts: Iterable[Float[Tensor, "_ c h w"]], epsilon: float
) -> tuple[Float[Tensor, "p 1 c"], Float[Tensor, "p c c"]]:
    """Fit a normal distribution to the features f at each position over all images.

        μ_p = 1/N Σ_n f_np    Σ_p = 1/(N−1) Σ_n (f_np − μ_p)(f_np − μ_p)ᵀ + ε I

    Batches are added one by one by Welford's update, Σ_n (f_n − μ_before)(f_n − μ_after)ᵀ, so that neither all features
    are held at once nor a small difference is taken of large sums.

    Args:
        parts: Features of the training images, batch by batch.
        epsilon: What makes Σ invertible also with fewer images than channels, in the features' units squared.

    Returns:
        The means μ, and lower triangular Cholesky factors L of the covariances, Σ = L Lᵀ.

    Raises:
        ValueError: If there are fewer than two images.
    """
    count, mean_P1C, scatter_PCC = 0, 0.0, 0.0
    for A_BCHW in parts:
        A_PBC = A_BCHW.flatten(2).permute(2, 0, 1)
        count += len(A_BCHW)
        before_PBC = A_PBC - mean_P1C
        mean_P1C = mean_P1C + before_PBC.sum(1, keepdim=True) / count
        scatter_PCC += before_PBC.mT @ (A_PBC - mean_P1C)
    if count < 2:
        raise ValueError(f"train_NCYX must hold two images or more, for a covariance; got {count}")
    covariance_PCC = scatter_PCC.div_(count - 1)
    covariance_PCC.diagonal(dim1=1, dim2=2).add_(epsilon)
    return mean_P1C, torch.linalg.cholesky(covariance_PCC)


def mahalanobis(
    mean_P1C: Float[Tensor, "p 1 c"], factor_PCC: Float[Tensor, "p c c"], A_BCHW: Float[Tensor, "b c h w"]
) -> Float[Tensor, "b h w"]:
    """How unlikely the features at each position are: M = √((f − μ)ᵀ Σ⁻¹ (f − μ)) = |L⁻¹ (f − μ)|.

    Args:
        mean_P1C: Means μ.
        factor_PCC: Cholesky factors L, as `gaussians` gives them.
        A_BCHW: Features f.
    """
    deviation_PCB = (A_BCHW.flatten(2).permute(2, 0, 1) - mean_P1C).mT
    white_PCB = torch.linalg.solve_triangular(factor_PCC, deviation_PCB, upper=False)
    return white_PCB.norm(dim=1).mT.unflatten(1, A_BCHW.shape[2:])


def bank(parts: Iterable[Float[Tensor, "_ c h w"]], patches: int, generator: torch.Generator) -> Float[Tensor, "k c"]:
    """So many of the features of all images and positions, drawn at random without replacement; all if there are fewer.

    Every feature draws a uniform number and those with the smallest are kept, so that batches can come one by one.

    Args:
        parts: Features of the training images, batch by batch.
        patches: How many are kept, K.
        generator: Source of the numbers, on the CPU.

    Raises:
        ValueError: If patches is below 1.
    """
    if patches < 1:
        raise ValueError(f"patches must be 1 or more; got {patches}")
    number_K, bank_KC = torch.empty(0), None
    for A_BCHW in parts:
        A_RC = _rows(A_BCHW)
        number_R = torch.cat([number_K, torch.rand(len(A_RC), generator=generator)])
        number_K, kept_K = number_R.topk(min(patches, len(number_R)), largest=False)
        bank_KC = (A_RC if bank_KC is None else torch.cat([bank_KC, A_RC]))[kept_K]
    return bank_KC


def nearest(bank_KC: Float[Tensor, "k c"], A_BCHW: Float[Tensor, "b c h w"]) -> Float[Tensor, "b h w"]:
    """How far the features at each position are from the nearest one of the bank.

        M = min_k |f − f_k| = √(|f|² + min_k (|f_k|² − 2 f·f_k))

    As the right side has it, which takes little more time than the products; rounding makes of a distance of 0 one of
    some 1e-3 |f|.
    """
    square_K = bank_KC.square().sum(1)
    parts = [
        A_RC.square().sum(1) + torch.addmm(square_K, A_RC, bank_KC.mT, alpha=-2).amin(1)
        for A_RC in _rows(A_BCHW).split(COMPARED)
    ]
    return torch.cat(parts).clamp(min=0).sqrt().view(len(A_BCHW), *A_BCHW.shape[2:])


def padim(
    train_NCYX: UInt8[Tensor, "n c y x"],
    test_NCYX: UInt8[Tensor, "m c y x"],
    network: Backbone,
    *,
    seed: int,
    channels: int = 100,
    epsilon: float = 0.01,
    sigma: float = SIGMA,
) -> Float[Tensor, "m y x"]:
    """PaDiM: the Mahalanobis distance of an image's features from those of the training images at the same position.

    Source: Defard et al., *PaDiM: a Patch Distribution Modeling Framework for Anomaly Detection and Localization*
    (ICPR 2021 workshops), with ResNet-18.

    Args:
        train_NCYX: Normal images, 0…255.
        test_NCYX: Images of the same size.
        network: As `backbone` gives it.
        seed: Fixes the channels.
        channels: How many of the 448 are drawn at random.
        epsilon: As for `gaussians`; the default is the paper's.
        sigma: Smoothing, as for `to_image`.

    Returns:
        Maps on the CPU.

    Raises:
        ValueError: If there are fewer than two training images, or the number of channels is none of 1 to 448.
    """
    if not 0 < channels <= CHANNELS:
        raise ValueError(f"channels must be from 1 to {CHANNELS}; got {channels}")
    chosen_C = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(seed))[:channels].sort().values
    normal = gaussians((A_BCHW[:, chosen_C] for A_BCHW in _features(network, train_NCYX)), epsilon)
    maps = [mahalanobis(*normal, A_BCHW[:, chosen_C]) for A_BCHW in _features(network, test_NCYX)]
    return to_image(torch.cat(maps), test_NCYX.shape[2:], sigma)


def nearest_neighbour(
    train_NCYX: UInt8[Tensor, "n c y x"],
    test_NCYX: UInt8[Tensor, "m c y x"],
    network: Backbone,
    *,
    seed: int,
    patches: int = 20_000,
    sigma: float = SIGMA,
) -> Float[Tensor, "m y x"]:
    """The distance of an image's features from the nearest ones of the training images, at whatever position.

    It takes 2 · 448 · K operations for each of the features of the test images.

    PatchCore (Roth et al., CVPR 2022) does the same with features averaged over 3x3 neighbours, and with a core set in
    place of features drawn at random; SPADE (Cohen & Hoshen, 2020) searches the most similar images alone.

    Args:
        train_NCYX: Normal images, 0…255.
        test_NCYX: Images of the same size.
        network: As `backbone` gives it.
        seed: Fixes which features are kept.
        patches: How many features of the training images are kept.
        sigma: Smoothing, as for `to_image`.

    Returns:
        Maps on the CPU.

    Raises:
        ValueError: If patches is below 1.
    """
    bank_KC = bank(_features(network, train_NCYX), patches, torch.Generator().manual_seed(seed))
    maps = [nearest(bank_KC, A_BCHW) for A_BCHW in _features(network, test_NCYX)]
    return to_image(torch.cat(maps), test_NCYX.shape[2:], sigma)


def to_image(map_NHW: Float[Tensor, "n h w"], size: tuple[int, int], sigma: float) -> Float[Tensor, "n y x"]:
    """Bring maps to the image's size bilinearly, and smooth them by a Gaussian.

    Args:
        map_NHW: Maps at the resolution of the features.
        size: Height and width of the image.
        sigma: Standard deviation of the Gaussian in pixels of an image whose shorter side has 256, and so as large a
            share of a smaller image.
    """
    map_N1YX = F.interpolate(map_NHW[:, None], size=size, mode="bilinear", align_corners=False)
    smooth_NYX = gaussian_filter(map_N1YX[:, 0].cpu().numpy(), sigma * min(size) / SIDE, axes=(1, 2))
    return torch.from_numpy(smooth_NYX)


def _features(network: Backbone, x_NCYX: UInt8[Tensor, "n c y x"]) -> Iterator[Float[Tensor, "b 448 h w"]]:
    where = next(network.parameters()).device
    return (network(x_BCYX.to(where)) for x_BCYX in tqdm(x_NCYX.split(AT_ONCE), desc="features", unit="batch"))


def _rows(A_BCHW: Float[Tensor, "b c h w"]) -> Float[Tensor, "r c"]:
    """The features one after the other, by image and then by position."""
    return A_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
