"""The VAE of the reports for dSprites, and FactorVAE's discriminator."""

from collections import OrderedDict

from jaxtyping import Float
from torch import Tensor, nn

from expvae.models._layers import ToPixels

DSPRITES_LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5")  # 32x32, 16x16, 8x8, 4x4 and 1x1 positions


class DSpritesVAE(nn.Module):
    """Convolutional VAE for 64x64 sprites (first report, Figure 5c; the network of FactorVAE with other widths).

    Encoder: Conv 1→32→32→64→64 (kernel 4, stride 2, padding 1, ReLU), Conv 64→128 (kernel 4, ReLU) and a 1x1
    convolution to the mean μ and the logarithm of the variance of q(z|x). Decoder: the mirror image with transposed
    convolutions, to logits.

    The layers that attention can be asked for are ``encoder.conv1`` (32x32x32), ``encoder.conv2`` (32x16x16),
    ``encoder.conv3`` (64x8x8), ``encoder.conv4`` (64x4x4) and ``encoder.conv5`` (128x1x1, a single position).

    Args:
        latent_dim: Number of latents, D.
    """

    def __init__(self, latent_dim: int = 10):
        super().__init__()
        self.encoder = nn.Sequential(
            OrderedDict(
                conv1=nn.Conv2d(1, 32, kernel_size=4, stride=2, padding=1),
                relu1=nn.ReLU(),
                conv2=nn.Conv2d(32, 32, kernel_size=4, stride=2, padding=1),
                relu2=nn.ReLU(),
                conv3=nn.Conv2d(32, 64, kernel_size=4, stride=2, padding=1),
                relu3=nn.ReLU(),
                conv4=nn.Conv2d(64, 64, kernel_size=4, stride=2, padding=1),
                relu4=nn.ReLU(),
                conv5=nn.Conv2d(64, 128, kernel_size=4),
                relu5=nn.ReLU(),
                posterior=nn.Conv2d(128, 2 * latent_dim, kernel_size=1),
            )
        )
        self.decoder = nn.Sequential(
            OrderedDict(
                conv=nn.Conv2d(latent_dim, 128, kernel_size=1),
                relu1=nn.ReLU(),
                deconv1=nn.ConvTranspose2d(128, 64, kernel_size=4),
                relu2=nn.ReLU(),
                deconv2=nn.ConvTranspose2d(64, 64, kernel_size=4, stride=2, padding=1),
                relu3=nn.ReLU(),
                deconv3=nn.ConvTranspose2d(64, 32, kernel_size=4, stride=2, padding=1),
                relu4=nn.ReLU(),
                deconv4=nn.ConvTranspose2d(32, 32, kernel_size=4, stride=2, padding=1),
                relu5=nn.ReLU(),
                deconv5=ToPixels(32, 1, kernel_size=4, stride=2, padding=1),
            )
        )

    def encode(self, x_BCYX: Float[Tensor, "b 1 64 64"]) -> tuple[Float[Tensor, "b i"], Float[Tensor, "b i"]]:
        """Mean and log-variance of the posterior q(z|x) of images in [0, 1]."""
        mu_BI, logvar_BI = self.encoder(x_BCYX).flatten(1).chunk(2, dim=1)
        return mu_BI, logvar_BI

    def decode(self, z_BI: Float[Tensor, "b i"]) -> Float[Tensor, "b 1 64 64"]:
        """Logits of the pixels given the latents; their sigmoid is the image in (0, 1)."""
        return self.decoder(z_BI[:, :, None, None])


def discriminator(latent_dim: int = 10) -> nn.Sequential:
    """FactorVAE's discriminator: six fully connected layers, 1 000 units each, LeakyReLU(0.2), to two logits.

    The first logit stands for "drawn from q(z)", the second for "drawn from Π_j q(z_j)" (Kim & Mnih 2018, Appendix A).

    Args:
        latent_dim: Number of latents, D.
    """
    return nn.Sequential(
        OrderedDict(
            linear1=nn.Linear(latent_dim, 1000),
            relu1=nn.LeakyReLU(0.2),
            linear2=nn.Linear(1000, 1000),
            relu2=nn.LeakyReLU(0.2),
            linear3=nn.Linear(1000, 1000),
            relu3=nn.LeakyReLU(0.2),
            linear4=nn.Linear(1000, 1000),
            relu4=nn.LeakyReLU(0.2),
            linear5=nn.Linear(1000, 1000),
            relu5=nn.LeakyReLU(0.2),
            linear6=nn.Linear(1000, 2),
        )
    )
