"""The VAEs for UCSD Pedestrian 1: that of the first report, and that of Brongers et al."""

from collections import OrderedDict

from jaxtyping import Float
from torch import Tensor, nn

from expvae.models._layers import ConvTranspose2d, ToPixels


class UCSDVAE(nn.Module):
    """The VAE of the first report (its Figure 5b) for 100x100 grey images: 77 243 073 parameters with 32 latents.

    Encoder: Conv 1→64→128→256 (kernel 4, stride 2, padding 1, ReLU), Linear 36864→1024 (ReLU), and two linear heads,
    the mean μ and the logarithm of the variance of q(z|x). Decoder: the mirror image with transposed convolutions.

    The layers that attention can be asked for are ``encoder.conv1`` (64x50x50), ``encoder.conv2`` (128x25x25) and
    ``encoder.conv3`` (256x12x12).

    Args:
        latent_dim: Number of latents, D.
    """

    def __init__(self, latent_dim: int = 32):
        super().__init__()
        self.encoder = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 64, kernel_size=4, stride=2, padding=1),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(64, 128, kernel_size=4, stride=2, padding=1),
                relu2=nn.ReLU(),
                conv3=nn.Conv2d(128, 256, kernel_size=4, stride=2, padding=1),
                relu3=nn.ReLU(),
                flatten=nn.Flatten(),
                linear=nn.Linear(256 * 12 * 12, 1024),
                relu4=nn.ReLU(),
            )
        )
        self.mu = nn.Linear(1024, latent_dim)
        self.logvar = nn.Linear(1024, latent_dim)
        self.decoder = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(latent_dim, 1024),
                relu1=nn.ReLU(),
                linear2=nn.Linear(1024, 256 * 12 * 12),
                relu2=nn.ReLU(),
                unflatten=nn.Unflatten(1, (256, 12, 12)),
                # conv3 rounds 25 down to 12; kernel 5 leads back from 12 to 25, where kernel 4 gives 24.
                deconv1=ConvTranspose2d(256, 128, kernel_size=5, stride=2, padding=1),
                relu3=nn.ReLU(),
                deconv2=ConvTranspose2d(128, 64, kernel_size=4, stride=2, padding=1),
                relu4=nn.ReLU(),
                deconv3=ToPixels(64, 1, kernel_size=4, stride=2, padding=1),
            )
        )

    def encode(self, x_BCYX: Float[Tensor, "b 1 100 100"]) -> tuple[Float[Tensor, "b i"], Float[Tensor, "b i"]]:
        """Mean and log-variance of the posterior q(z|x) of images in [0, 1]."""
        hidden = self.encoder(x_BCYX)
        return self.mu(hidden), self.logvar(hidden)

    def decode(self, z_BI: Float[Tensor, "b i"]) -> Float[Tensor, "b 1 100 100"]:
        """Logits of the pixels given the latents; their sigmoid is the image in (0, 1)."""
        return self.decoder(z_BI)


class BrongersUCSDVAE(nn.Module):
    """The VAE of Brongers et al. for UCSD Pedestrian 1, with BatchNorm: 29 761 537 parameters with 32 latents.

    It takes 96x96 grey images (of the sizes near its code's default of 100, the one that its decoder leads back to) and
    standardises them itself, with the mean and the standard deviation that its code gives for Ped1. Encoder: Conv
    1→192→144→96 (kernel 4, stride 2, padding 1), each with BatchNorm and ReLU, Linear 13824→1024 (ReLU), and two linear
    heads. Decoder: two linear layers, then BatchNorm and a transposed convolution three times.

    The layers that attention can be asked for are ``encoder.conv1`` (192x48x48), ``encoder.conv2`` (144x24x24) and
    ``encoder.conv3`` (96x12x12).

    Source: github.com/FrankBrongers/Reproducing_expVAE, ``vanilla_ped1.py`` with ``batch_norm=True``.

    Args:
        latent_dim: Number of latents, D.
    """

    MEAN, STD = 0.3750352255196134, 0.20129592430286292

    def __init__(self, latent_dim: int = 32):
        super().__init__()
        self.encoder = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 192, kernel_size=4, stride=2, padding=1),
                norm1=nn.BatchNorm2d(192),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(192, 144, kernel_size=4, stride=2, padding=1),
                norm2=nn.BatchNorm2d(144),
                relu2=nn.ReLU(),
                conv3=nn.Conv2d(144, 96, kernel_size=4, stride=2, padding=1),
                norm3=nn.BatchNorm2d(96),
                relu3=nn.ReLU(),
                flatten=nn.Flatten(),
                linear=nn.Linear(96 * 12 * 12, 1024),
                relu4=nn.ReLU(),
            )
        )
        self.mu = nn.Linear(1024, latent_dim)
        self.logvar = nn.Linear(1024, latent_dim)
        self.decoder = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(latent_dim, 1024),
                relu1=nn.ReLU(),
                linear2=nn.Linear(1024, 96 * 12 * 12),
                relu2=nn.ReLU(),
                unflatten=nn.Unflatten(1, (96, 12, 12)),
                norm1=nn.BatchNorm2d(96),
                deconv1=ConvTranspose2d(96, 144, kernel_size=4, stride=2, padding=1),
                relu3=nn.ReLU(),
                norm2=nn.BatchNorm2d(144),
                deconv2=ConvTranspose2d(144, 192, kernel_size=4, stride=2, padding=1),
                relu4=nn.ReLU(),
                norm3=nn.BatchNorm2d(192),
                deconv3=ToPixels(192, 1, kernel_size=4, stride=2, padding=1),
            )
        )

    def encode(self, x_BCYX: Float[Tensor, "b 1 96 96"]) -> tuple[Float[Tensor, "b i"], Float[Tensor, "b i"]]:
        """Mean and log-variance of the posterior q(z|x) of images in [0, 1]."""
        hidden = self.encoder((x_BCYX - self.MEAN) / self.STD)
        return self.mu(hidden), self.logvar(hidden)

    def decode(self, z_BI: Float[Tensor, "b i"]) -> Float[Tensor, "b 1 96 96"]:
        """Logits of the pixels given the latents; their sigmoid is the image in (0, 1)."""
        return self.decoder(z_BI)
