"""The VAE of the authors' code for MNIST (first report, Figure 5a): 13 216 193 parameters with 32 latents."""

from collections import OrderedDict

from jaxtyping import Float
from torch import Tensor, nn

from expvae.models._layers import ConvTranspose2d, ToPixels


class MNISTVAE(nn.Module):
    """Convolutional VAE for 28x28 grey images.

    Encoder: Conv 1→64→128 (kernel 4, stride 2, padding 1, ReLU), Linear 6272→1024 (ReLU), and two linear heads, the
    mean μ and the logarithm of the variance of q(z|x). Decoder: the mirror image with transposed convolutions.

    The layers that attention can be asked for are ``encoder.conv1`` (64x14x14) and ``encoder.conv2`` (128x7x7).

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
                flatten=nn.Flatten(),
                linear=nn.Linear(128 * 7 * 7, 1024),
                relu3=nn.ReLU(),
            )
        )
        self.mu = nn.Linear(1024, latent_dim)
        self.logvar = nn.Linear(1024, latent_dim)
        self.decoder = nn.Sequential(
            OrderedDict(
                linear1=nn.Linear(latent_dim, 1024),
                relu1=nn.ReLU(),
                linear2=nn.Linear(1024, 128 * 7 * 7),
                relu2=nn.ReLU(),
                unflatten=nn.Unflatten(1, (128, 7, 7)),
                deconv1=ConvTranspose2d(128, 64, kernel_size=4, stride=2, padding=1),
                relu3=nn.ReLU(),
                deconv2=ToPixels(64, 1, kernel_size=4, stride=2, padding=1),
            )
        )

    def encode(self, x_BCYX: Float[Tensor, "b 1 28 28"]) -> tuple[Float[Tensor, "b i"], Float[Tensor, "b i"]]:
        """Mean and log-variance of the posterior q(z|x) of images in [0, 1]."""
        hidden = self.encoder(x_BCYX)
        return self.mu(hidden), self.logvar(hidden)

    def decode(self, z_BI: Float[Tensor, "b i"]) -> Float[Tensor, "b 1 28 28"]:
        """Logits of the pixels given the latents; their sigmoid is the image in (0, 1)."""
        return self.decoder(z_BI)
