"""The VAE of the first report for MVTec-AD (its Figure 5d): 72 803 363 parameters with 32 latents."""

from collections import OrderedDict
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights, resnet18

DECODER_CHANNELS = (1024, 512, 256, 128, 64, 32)


class MVTecVAE(nn.Module):
    """VAE with a ResNet-18 as encoder, for 256x256 colour images.

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
        weights: Where the ResNet starts: None at random, ``ResNet18_Weights.IMAGENET1K_V1`` at torchvision's ImageNet
            weights, downloaded at first use to torch's own cache. They were trained on images normalised by ImageNet's
            mean and standard deviation, which :meth:`encode` leaves to its caller.

    Raises:
        TypeError: If the weights are another network's.
    """

    def __init__(self, latent_dim: int = 32, weights: ResNet18_Weights | None = None):
        super().__init__()
        resnet = resnet18()
        if weights is not None:
            # resnet18(weights=...) would unpickle whatever the file holds; this reads tensors only.
            chosen = ResNet18_Weights.verify(weights)
            resnet.load_state_dict(chosen.get_state_dict(check_hash=True, weights_only=True))
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

        layers = OrderedDict(
            linear1=nn.Linear(latent_dim, 1024),
            linear2=nn.Linear(1024, 1024 * 4 * 4),
            unflatten=nn.Unflatten(1, (1024, 4, 4)),
        )
        for number, (wide, narrow) in enumerate(pairwise(DECODER_CHANNELS), start=1):
            layers[f"deconv{number}"] = nn.ConvTranspose2d(wide, narrow, kernel_size=4, stride=2, padding=1)
            layers[f"bn{number}"] = nn.BatchNorm2d(narrow)
            layers[f"relu{number}"] = nn.ReLU()
        layers[f"deconv{len(DECODER_CHANNELS)}"] = nn.ConvTranspose2d(32, 3, kernel_size=4, stride=2, padding=1)
        self.decoder = nn.Sequential(layers)

    def encode(self, x_BCYX: Float[Tensor, "b 3 256 256"]) -> tuple[Float[Tensor, "b i"], Float[Tensor, "b i"]]:
        """Mean and log-variance of the posterior q(z|x) of images in [0, 1]."""
        hidden = self.encoder(x_BCYX)
        return self.mu(hidden), self.logvar(hidden)

    def decode(self, z_BI: Float[Tensor, "b i"]) -> Float[Tensor, "b 3 256 256"]:
        """Logits of the pixels given the latents; their sigmoid is the image in (0, 1)."""
        return self.decoder(z_BI)
