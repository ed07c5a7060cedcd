"""The networks of the book: plain modules with encode(x) -> (mu, logvar) and decode(z) -> logits.

Report2MVTecVAE, whose loss is a squared error, decodes to pixels.
"""

from typing import TYPE_CHECKING

from .._lazy import attach

if TYPE_CHECKING:
    from expvae.models._dsprites import (
        DSPRITES_LAYERS as DSPRITES_LAYERS,
        DSpritesVAE as DSpritesVAE,
        discriminator as discriminator,
    )
    from expvae.models._layers import ToPixels as ToPixels, to_pixels as to_pixels
    from expvae.models._mnist import MNISTVAE as MNISTVAE
    from expvae.models._mvtec import (
        BrongersMVTecVAE as BrongersMVTecVAE,
        MVTecVAE as MVTecVAE,
        Report2MVTecVAE as Report2MVTecVAE,
        imagenet_weights as imagenet_weights,
    )
    from expvae.models._rbm import (
        RBM as RBM,
        ConvRBM as ConvRBM,
        Machine as Machine,
        hard as hard,
        in_units as in_units,
        one_bit_pseudo_log_likelihood as one_bit_pseudo_log_likelihood,
        require_means as require_means,
        visible_values as visible_values,
    )
    from expvae.models._stack import Stack as Stack
    from expvae.models._ucsd import UCSDVAE as UCSDVAE, BrongersUCSDVAE as BrongersUCSDVAE

__getattr__, __all__ = attach(
    __name__,
    {
        "_dsprites": ["DSPRITES_LAYERS", "DSpritesVAE", "discriminator"],
        "_layers": ["ToPixels", "to_pixels"],
        "_mnist": ["MNISTVAE"],
        "_mvtec": ["BrongersMVTecVAE", "MVTecVAE", "Report2MVTecVAE", "imagenet_weights"],
        "_rbm": [
            "RBM",
            "ConvRBM",
            "Machine",
            "hard",
            "in_units",
            "one_bit_pseudo_log_likelihood",
            "require_means",
            "visible_values",
        ],
        "_stack": ["Stack"],
        "_ucsd": ["BrongersUCSDVAE", "UCSDVAE"],
    },
)
