"""ImageNet's weights of ResNet-18: a file below the data root, or what torchvision downloads."""

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import ResNet18_Weights, resnet18

import expvae_book.data
from expvae.models import imagenet_weights
from expvae_book.data.card import listed, sha256
from expvae_book.data.catalogue import IMAGENET_FILE


@dataclass(frozen=True)
class ImageNet:
    """Weights of a ResNet-18.

    Attributes:
        tensors: By torchvision's names; those of the classifier and the counters of batches may be absent.
        sha256: SHA-256 of the file that they were read from (hexadecimal).
    """

    tensors: dict[str, Tensor]
    sha256: str


def load(root: Path | None = None) -> ImageNet | None:
    """The weights in `ROOT/weights/resnet18_imagenet.safetensors`, else torchvision's, or None where there are neither.

    Args:
        root: Data root; by default `expvae_book.data.root()`.

    Raises:
        ValueError: If the file is damaged, or its names or shapes are not those of torchvision's ResNet-18; the message
            names it.
    """
    file = Path(root or expvae_book.data.root()) / IMAGENET_FILE
    if file.is_file():
        return ImageNet(_read(file), sha256(file))
    tensors = imagenet_weights()
    if tensors is None:
        return None
    download = Path(torch.hub.get_dir(), "checkpoints", Path(ResNet18_Weights.IMAGENET1K_V1.url).name)
    return ImageNet(tensors, sha256(download))


def required() -> ImageNet:
    """The weights of `load`, where initial="imagenet" asks for them.

    Raises:
        ValueError: If there are none, or as `load` does.
    """
    found = load()
    if found is None:
        raise ValueError(
            f"initial='imagenet' needs {IMAGENET_FILE} in the data root, or torchvision's weights of ResNet-18, which "
            "could not be downloaded and are not in torch's cache; initial='random' does without them"
        )
    return found


def _read(file: Path) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error})") from error
    with torch.device("meta"):  # names and shapes only, and no random numbers
        expected = _shapes(resnet18().state_dict())
    shapes = _shapes(tensors)
    wrong = sorted(name for name in expected.keys() | shapes.keys() if expected.get(name) != shapes.get(name))
    if wrong:
        raise ValueError(
            f"{file} does not hold the weights of torchvision's ResNet-18; missing, unknown or of another shape: "
            f"{listed(wrong)}"
        )
    if unsound := [name for name, value in tensors.items() if not value.isfinite().all()]:
        raise ValueError(f"{file} holds numbers that are not finite: {listed(unsound)}")
    return tensors


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    """The shapes by name, without the classifier and the counters of batches, which no VAE takes."""
    return {
        name: value.shape
        for name, value in tensors.items()
        if not name.startswith("fc.") and not name.endswith("num_batches_tracked")
    }
