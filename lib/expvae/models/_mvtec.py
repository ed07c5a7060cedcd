"""The VAEs for MVTec AD: those of the first report, of the second report's code, and of Brongers et al."""

from collections import OrderedDict
from collections.abc import Mapping
from itertools import pairwise
from typing import cast
from urllib.error import URLError

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.models.resnet import BasicBlock

from expvae.models._layers import ConvTranspose2d

DECODER_CHANNELS = (1024, 512, 256, 128, 64, 32)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def imagenet_weights() -> dict[str, Tensor] | None:
    """The ImageNet weights of ResNet-18 that torchvision publishes, by name, or None where they cannot be had.

    They are read from torch's cache, or downloaded to it once and checked against the checksum in the file's name.
    """
    try:
        # resnet18(weights=...) would unpickle whatever the file holds; this reads tensors only.
        return dict(ResNet18_Weights.IMAGENET1K_V1.get_state_dict(check_hash=True, weights_only=True, progress=False))
    except (URLError, TimeoutError, ConnectionError):
        return None


class MVTecVAE(nn.Module):
    """The VAE of the first report (its Figure 5d) for 256x256 colour images: 72 803 363 parameters with 32 latents.

    Encoder: torchvision's ResNet-18 without its last two children (average pooling and classifier), Linear 32768→1024,
    and two linear heads, the mean μ and the logarithm of the variance of q(z|x). Decoder: Linear D→1024→16384, then
    transposed convolutions 1024→512→256→128→64→32→3 (kernel 4, stride 2, padding 1) from 4x4 to 256x256, with BatchNorm
    and ReLU between them. As in the figure, no ReLU follows a linear layer.

    The ResNet's modules keep torchvision's names, so that attention can be asked for ``encoder.conv1`` (64x128x128),
    ``encoder.layer1.1.conv2`` (64x64x64), ``encoder.layer2.1.conv1`` (128x32x32), ``encoder.layer3.1.conv2``
    (256x16x16), ``encoder.layer4.1.conv2`` (512x8x8) and so on. Its ReLUs stay in place as torchvision has them: they
    overwrite what a BatchNorm or the sum of a residual block put out, never the output of a convolution.

    Args:
        latent_dim: Number of latents, D.
        weights: Where the ResNet starts: None at random, otherwise at these tensors by torchvision's names, such as
            `imagenet_weights` gives. Those of the classifier are not used and, like the counters of batches, may
            be absent. ImageNet's were trained on images normalised by ImageNet's mean and standard deviation, and with
            weights `encode` normalises its images likewise.
        frozen: Whether the ResNet stays as it starts, so that only the linear layers of the encoder and the decoder
            are trained. Its weights are then buffers instead of parameters, and its batch normalisation always uses the
            stored means and variances.

    Raises:
        RuntimeError: If the weights are another network's.
    """

    def __init__(self, latent_dim: int = 32, weights: Mapping[str, Tensor] | None = None, frozen: bool = False):
        super().__init__()
        self.normalises = weights is not None
        self.frozen = frozen
        resnet = resnet18()
        if weights is not None:
            resnet.fc = nn.Identity()
            resnet.load_state_dict({name: value for name, value in weights.items() if not name.startswith("fc.")})
        self.encoder = nn.Sequential(
            OrderedDict(
                [
                    *list(resnet.named_children())[:-2],
                    ("flatten", nn.Flatten()),
                    ("linear", nn.Linear(512 * 8 * 8, 1024)),
                ]
            )
        )
        self.mu = nn.Linear(1024, latent_dim)
        self.logvar = nn.Linear(1024, latent_dim)

        self.decoder = _decoder(
            linear1=nn.Linear(latent_dim, 1024),
            linear2=nn.Linear(1024, 1024 * 4 * 4),
            unflatten=nn.Unflatten(1, (1024, 4, 4)),
        )
        if frozen:
            for module in self._resnet().modules():
                for name, value in list(module.named_parameters(recurse=False)):
                    delattr(module, name)
                    module.register_buffer(name, value.detach())

    def train(self, mode: bool = True) -> "MVTecVAE":
        """Set training or evaluation mode; a frozen ResNet is always in the latter."""
        super().train(mode)
        if self.frozen:
            self._resnet().eval()
        return self

    def encode(self, x_BCYX: Float[Tensor, "b 3 256 256"]) -> tuple[Float[Tensor, "b i"], Float[Tensor, "b i"]]:
        """Mean and log-variance of the posterior q(z|x) of images in [0, 1]."""
        if self.normalises:
            x_BCYX = _normalised(x_BCYX, IMAGENET_MEAN, IMAGENET_STD)
        hidden = self.encoder(x_BCYX)
        # Under mixed precision the losses need more digits than bfloat16 has: σ² − 1 − log σ² would cancel.
        return self.mu(hidden).float(), self.logvar(hidden).float()

    def _resnet(self) -> nn.Sequential:
        return cast(nn.Sequential, self.encoder[: list(dict(self.encoder.named_children())).index("flatten")])

    def decode(self, z_BI: Float[Tensor, "b i"]) -> Float[Tensor, "b 3 256 256"]:
        """Logits of the pixels given the latents; their sigmoid is the image in (0, 1)."""
        return self.decoder(z_BI)


class BrongersMVTecVAE(nn.Module):
    """The VAE of Brongers et al. for 256x256 colour images, by its code: 39 207 459 parameters with 32 latents.

    Encoder: ResNet-18 from random weights, with a first convolution of kernel 3, without max-pooling, global average
    pooling and one linear layer 512→2D. Images are standardised first with the mean and the standard deviation that its
    code gives for MVTec AD. Decoder: that of the first report with ReLU after the linear layers too.

    Layers are named as in `MVTecVAE`; ``encoder.layer2.1.conv1``, the one that its code explains, is 128x64x64
    here.

    Source: github.com/FrankBrongers/Reproducing_expVAE, ``models/resnet18_3.py``.

    Args:
        latent_dim: Number of latents, D.
    """

    MEAN, STD = (0.4305, 0.3999, 0.3900), (0.1822, 0.1733, 0.1624)

    def __init__(self, latent_dim: int = 32):
        super().__init__()
        layers = OrderedDict(resnet18().named_children())
        layers["conv1"] = nn.Conv2d(3, 64, kernel_size=3, stride=2, padding=1, bias=False)
        del layers["maxpool"], layers["fc"]
        self.encoder = nn.Sequential(OrderedDict(layers, flatten=nn.Flatten(), linear=nn.Linear(512, 2 * latent_dim)))
        self.decoder = _decoder(
            linear1=nn.Linear(latent_dim, 1024),
            relu_a=nn.ReLU(),
            linear2=nn.Linear(1024, 1024 * 4 * 4),
            unflatten=nn.Unflatten(1, (1024, 4, 4)),
            relu_b=nn.ReLU(),
        )

    def encode(self, x_BCYX: Float[Tensor, "b 3 256 256"]) -> tuple[Float[Tensor, "b i"], Float[Tensor, "b i"]]:
        """Mean and log-variance of the posterior q(z|x) of images in [0, 1]."""
        mu_BI, logvar_BI = self.encoder(_normalised(x_BCYX, self.MEAN, self.STD)).float().chunk(2, dim=1)
        return mu_BI, logvar_BI

    def decode(self, z_BI: Float[Tensor, "b i"]) -> Float[Tensor, "b 3 256 256"]:
        """Logits of the pixels given the latents; their sigmoid is the image in (0, 1)."""
        return self.decoder(z_BI)


class Report2MVTecVAE(nn.Module):
    """The VAE of the second report's code for 256x256 images: 18 004 160 parameters with 32 latents.

    Encoder: ResNet-18 with global average pooling, from random weights, and two linear heads 512→D. Decoder: Linear
    D→8192, 512x4x4 doubled to 8x8, four stages of two residual blocks each (512→256→128→64→64) that double the size,
    doubled once more, and a convolution to the three channels; doubling repeats pixels. There is no sigmoid: pixels are
    unbounded, and the loss is a squared error. Images are brought from [0, 1] to [-1, 1] first.

    For the categories whose images are grey the code has one channel, and leaves them in [0, 1]; here they have three
    equal ones, and are treated as the others.

    Layers are named as in `MVTecVAE`; ``encoder.layer1.0.conv2``, the one that its code explains, is 64x64x64.

    Source: github.com/Carmoondedraak/FACT-2021, ``expVAE_pl/vae_model.py``, whose networks are ``resnet18_encoder`` and
    ``resnet18_decoder`` of github.com/Lightning-Universe/lightning-bolts with ``first_conv`` and ``maxpool1``.

    Args:
        latent_dim: Number of latents, D.
    """

    def __init__(self, latent_dim: int = 32):
        super().__init__()
        layers = OrderedDict(resnet18().named_children())
        del layers["fc"]
        self.encoder = nn.Sequential(OrderedDict(layers, flatten=nn.Flatten()))
        for module in self.encoder.modules():
            if isinstance(module, nn.Conv2d):
                module.reset_parameters()  # PyTorch's random weights, where torchvision draws others
        self.mu = nn.Linear(512, latent_dim)
        self.logvar = nn.Linear(512, latent_dim)
        widths = (512, 256, 128, 64, 64)
        stages = {
            f"layer{number}": nn.Sequential(_doubling(wide, narrow), BasicBlock(narrow, narrow))
            for number, (wide, narrow) in enumerate(pairwise(widths), start=1)
        }
        self.decoder = nn.Sequential(
            OrderedDict(
                linear=nn.Linear(latent_dim, 512 * 4 * 4),
                unflatten=nn.Unflatten(1, (512, 4, 4)),
                upscale1=nn.Upsample(scale_factor=2),
                **stages,
                upscale=nn.Upsample(scale_factor=2),
                conv1=nn.Conv2d(64, 3, kernel_size=3, padding=1, bias=False),
            )
        )

    def encode(self, x_BCYX: Float[Tensor, "b 3 256 256"]) -> tuple[Float[Tensor, "b i"], Float[Tensor, "b i"]]:
        """Mean and log-variance of the posterior q(z|x) of images in [0, 1]."""
        hidden = self.encoder(2 * x_BCYX - 1)
        return self.mu(hidden).float(), self.logvar(hidden).float()

    def decode(self, z_BI: Float[Tensor, "b i"]) -> Float[Tensor, "b 3 256 256"]:
        """Pixels given the latents, where the images are in [0, 1]; they are not kept within it."""
        return (self.decoder(z_BI).float() + 1) / 2

    @staticmethod
    def reconstruction_loss(y_BCYX: Float[Tensor, "b c y x"], x_BCYX: Float[Tensor, "b c y x"]) -> Float[Tensor, " b"]:
        """Squared error of pixels y of images x, averaged over the values of an image, on the scale of [-1, 1]."""
        return (2 * (y_BCYX - x_BCYX)).square().flatten(1).mean(1)


def _doubling(wide: int, narrow: int) -> BasicBlock:
    """A residual block that doubles the size before its second convolution, which changes the number of channels."""
    block = BasicBlock(wide, wide)
    block.conv2 = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(wide, narrow, 3, padding=1, bias=False))
    block.bn2 = nn.BatchNorm2d(narrow)
    shortcut = nn.Conv2d(wide, narrow, kernel_size=1, bias=False)
    block.downsample = nn.Sequential(nn.Upsample(scale_factor=2), shortcut, nn.BatchNorm2d(narrow))
    return block


def _decoder(**first: nn.Module) -> nn.Sequential:
    """The layers given, which end in 1024x4x4, and transposed convolutions from there to an image of 256x256."""
    layers = OrderedDict(first)
    for number, (wide, narrow) in enumerate(pairwise(DECODER_CHANNELS), start=1):
        layers[f"deconv{number}"] = ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1)
        layers[f"bn{number}"] = nn.BatchNorm2d(narrow)
        layers[f"relu{number}"] = nn.ReLU()
    layers[f"deconv{len(DECODER_CHANNELS)}"] = ConvTranspose2d(32, 3, kernel_size=4, stride=2, padding=1)
    return nn.Sequential(layers)


def _normalised(x_BCYX: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Float[Tensor, "b 3 256 256"]:
    mean_CYX, std_CYX = (torch.tensor(values, device=x_BCYX.device)[:, None, None] for values in (mean, std))
    return (x_BCYX - mean_CYX) / std_CYX
