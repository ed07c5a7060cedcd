"""Stacks of restricted Boltzmann machines, which encode and decode as VAEs do."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from jaxtyping import Float
from torch import Tensor, nn

from expvae.models._rbm import Machine, gibbs, hard, in_units, visible_values


class Stack(nn.Module):
    """Machines one upon the other: the hidden units of each are the visible units of the next.

    For expvae.attention, ``encode`` maps images to latents, the hidden units of the top machine, and ``maps.0``,
    ``maps.1`` … are the layers: the fields of each machine's hidden units as [B, C, H, W], before their activation.
    Those of a ConvRBM lie where they are in the image. Those of an RBM have no place; they are laid out row by row in a
    grid with one channel, as nearly square as their number allows.

    Args:
        layers: Machines, from the bottom up; an RBM takes the flattened units of what is below.
        shape: Channels, height and width of the images.

    Raises:
        ValueError: If there is no machine, their units differ, or one does not fit on what is below it.
    """

    def __init__(self, layers: Sequence[Machine], shape: tuple[int, int, int] = (1, 28, 28)):
        super().__init__()
        if not layers:
            raise ValueError("layers must hold at least one machine, got none")
        if len({layer.units for layer in layers}) > 1:
            raise ValueError(f"layers must have the same units, got: {', '.join(layer.units for layer in layers)}")
        given = [shape, *(layer.hidden_shape for layer in layers)]
        for index, (layer, below) in enumerate(zip(layers, given, strict=False)):
            if layer.visible_shape not in (below, (math.prod(below),)):
                raise ValueError(
                    f"layers[{index}] has visible units of shape {list(layer.visible_shape)}, but what is below it has "
                    f"{list(below)}"
                )
        self.layers = cast(Sequence[Machine], nn.ModuleList(layers))
        self.maps = nn.ModuleList(
            nn.Identity() if len(layer.hidden_shape) == 3 else nn.Unflatten(1, (1, *_grid(layer.hidden_shape[0])))
            for layer in layers
        )
        self.shape, self.units = shape, layers[0].units

    def visible(self, x_BCYX: Float[Tensor, "b c y x"]) -> Float[Tensor, "b ..."]:
        """Visible units of the lowest machine: the means that images in [0, 1] stand for, in the shape it takes."""
        return visible_values(x_BCYX, self.units).reshape(-1, *self.layers[0].visible_shape)

    def encode(
        self,
        x_BCYX: Float[Tensor, "b c y x"],
        temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b d"]:
        """Hidden units of the top machine given images in [0, 1]: the latents, in [0, 1], or [-1, 1] for spins.

        Without a temperature, the means of each layer are the visible units of the next, as they are in training.
        With one, each layer puts out a relaxed sample instead. Both can be differentiated with respect to the images.

        Raises:
            ValueError: If the temperature is not positive, one of temperature and generator lacks the other, or the
                images are outside [0, 1] or NaN.
        """
        values = self.visible(x_BCYX)
        for layer, arrange in zip(self.layers, self.maps, strict=True):
            fields = layer(values.reshape(-1, *layer.visible_shape), temperature, generator)
            values = layer.activate(arrange(fields))
        return values.flatten(1)

    def decode(self, h_BD: Float[Tensor, "b d"], generator: torch.Generator | None = None) -> Float[Tensor, "b c y x"]:
        """Images in [0, 1] given the hidden units of the top machine: the means of the pixels.

        Args:
            h_BD: Hidden units, or their means.
            generator: Draws the units between; without it, each layer's means are passed down.
        """
        values = h_BD
        for layer in reversed(self.layers):
            logits = layer.visible_logits(values.reshape(-1, *layer.hidden_shape))
            p = logits.sigmoid() if generator is None or layer is self.layers[0] else hard(logits, generator)
            values = in_units(p, self.units)
        return p.reshape(-1, *self.shape)

    def reconstruct(self, x_BCYX: Float[Tensor, "b c y x"]) -> Float[Tensor, "b c y x"]:
        """Images in [0, 1], up through all layers and down again, by means."""
        return self.decode(self.encode(x_BCYX))

    @torch.no_grad()
    def sample(self, count: int, steps: int, generator: torch.Generator) -> Float[Tensor, "b c y x"]:
        """Images of the model: Gibbs sampling of the top machine, then down, drawing all units but the pixels.

        Args:
            count: How many images.
            steps: Of Gibbs sampling, from visible units of the top machine that are on or off with even odds.
            generator: Source of all samples.
        """
        top = self.layers[-1]
        even = torch.zeros(count, *top.visible_shape, dtype=top.weight.dtype, device=top.weight.device)
        v = gibbs(top, in_units(hard(even, generator), self.units), steps, generator)
        return self.decode(in_units(hard(top.hidden_logits(v), generator), self.units).flatten(1), generator)


def _grid(count: int) -> tuple[int, int]:
    """Rows and columns, as nearly the same as their product allows."""
    rows = max(number for number in range(1, math.isqrt(count) + 1) if count % number == 0)
    return rows, count // rows
