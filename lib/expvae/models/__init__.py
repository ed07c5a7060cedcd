"""The networks of the book: plain modules with encode(x) -> (mu, logvar) and decode(z) -> logits."""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from expvae.models._dsprites import DSPRITES_LAYERS as DSPRITES_LAYERS
    from expvae.models._dsprites import DSpritesVAE as DSpritesVAE
    from expvae.models._dsprites import SideBySide as SideBySide
    from expvae.models._dsprites import discriminator as discriminator
    from expvae.models._mnist import MNISTVAE as MNISTVAE
    from expvae.models._mvtec import BrongersMVTecVAE as BrongersMVTecVAE
    from expvae.models._mvtec import MVTecVAE as MVTecVAE
    from expvae.models._mvtec import imagenet_weights as imagenet_weights
    from expvae.models._rbm import RBM as RBM
    from expvae.models._rbm import ConvRBM as ConvRBM
    from expvae.models._rbm import Machine as Machine
    from expvae.models._rbm import Stack as Stack
    from expvae.models._rbm import hard as hard
    from expvae.models._rbm import in_units as in_units
    from expvae.models._rbm import one_bit_pseudo_log_likelihood as one_bit_pseudo_log_likelihood
    from expvae.models._rbm import require_means as require_means
    from expvae.models._rbm import visible_values as visible_values
    from expvae.models._ucsd import UCSDVAE as UCSDVAE
    from expvae.models._ucsd import BrongersUCSDVAE as BrongersUCSDVAE

__getattr__, __all__ = attach(
    __name__,
    {
        "_dsprites": ["DSPRITES_LAYERS", "DSpritesVAE", "SideBySide", "discriminator"],
        "_mnist": ["MNISTVAE"],
        "_mvtec": ["BrongersMVTecVAE", "MVTecVAE", "imagenet_weights"],
        "_rbm": [
            "RBM",
            "ConvRBM",
            "Machine",
            "Stack",
            "hard",
            "in_units",
            "one_bit_pseudo_log_likelihood",
            "require_means",
            "visible_values",
        ],
        "_ucsd": ["BrongersUCSDVAE", "UCSDVAE"],
    },
)
