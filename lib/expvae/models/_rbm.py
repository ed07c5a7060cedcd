"""Restricted Boltzmann machines, fully connected and convolutional.

A machine gives visible units v and hidden units h the probability exp(-E(v, h)) / Z, with

    E(v, h) = -bᵀv - cᵀh - hᵀWv                                                  energy
    F(v)    = -log Σ_h exp(-E(v, h))                                             free energy, p(v) ∝ exp(-F(v))

Units are "binary", in {0, 1}, or "spin", in {-1, 1}. With s the distance between the two states, 1 or 2, the hidden
units are independent given the visible ones, and each is "on" (in its state 1) with log-odds s·(c + Wv); the same
holds the other way round, with log-odds s·(b + Wᵀh). c + Wv is called the field of the hidden units.

Noise makes a unit of log-odds. With L logistic noise, the difference of two Gumbel variables,

    hard      1[log-odds + L > 0]               is on with probability σ(log-odds): the Gumbel-max trick
    relaxed   σ((log-odds + L) / temperature)   tends to it as the temperature falls, and has a gradient

(Maddison, Mnih & Teh 2017, the binary concrete distribution).

Grey levels of images, in [0, 1], stand for the probability that a pixel is on: as visible units they are its mean, x or
2x - 1, as in scikit-learn's BernoulliRBM.

Suffixes of tensor names as in expvae.attention; V visible and H hidden units of a fully connected machine, K filters
of a convolutional one.
"""

import math
from collections.abc import Callable
from typing import Literal, cast, get_args

import torch
from jaxtyping import Float, Int64, UInt8
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.grad import conv2d_weight

Units = Literal["binary", "spin"]

INITIAL_DEVIATION = 0.01  # of the weights (Hinton 2010, Section 8)


# --- units ------------------------------------------------------------------------------------------------------------


def in_units(p: Float[Tensor, "..."], units: Units) -> Float[Tensor, "..."]:
    """Means of units that are on with probability p, or their values where p is 0 or 1: p, or 2p - 1 for spins."""
    return p if units == "binary" else 2 * p - 1


def require_means(name: str, values: Float[Tensor, "..."], units: Units) -> None:
    """Raise a ValueError unless the values can be means of units. Waits for the device: where data come in, only."""
    if not values.numel():
        return
    least = 0 if units == "binary" else -1
    lowest, highest = values.detach().aminmax()  # NaN if any value is
    if not ((lowest >= least) & (highest <= 1)):
        raise ValueError(
            f"{name} must lie in [{least}, 1] and hold no NaN, got values from {lowest:.9g} to {highest:.9g}"
        )


def visible_values(x: UInt8[Tensor, "..."] | Float[Tensor, "..."], units: Units) -> Float[Tensor, "..."]:
    """Visible units of images: their means.

    Args:
        x: Grey levels 0…255 as bytes, or [0, 1] as floats.
        units: Means are x in [0, 1] for "binary" and 2x - 1 in [-1, 1] for "spin".

    Raises:
        ValueError: If floats are outside [0, 1] or NaN.
    """
    if x.dtype == torch.uint8:
        return in_units(x.to(torch.float32).div_(255), units)
    require_means("x", x, "binary")
    return in_units(x, units)


def logistic_noise(like: Float[Tensor, "..."], generator: torch.Generator) -> Float[Tensor, "..."]:
    """L = log u - log(1 - u) with u uniform, of the same shape; kept from the infinity that rounding makes of it."""
    u = torch.rand(like.shape, generator=generator, device=generator.device, dtype=like.dtype)
    return u.logit_(torch.finfo(like.dtype).eps / 2).to(like.device)


def hard(logits: Float[Tensor, "..."], generator: torch.Generator) -> Float[Tensor, "..."]:
    """Sample of units with these log-odds, 1 where they are on and 0 where not (Gumbel-max)."""
    return (logits + logistic_noise(logits, generator) > 0).to(logits.dtype)


# --- machines ---------------------------------------------------------------------------------------------------------


class Machine(nn.Module):
    """What both kinds of machine share.

    Each kind gives `hidden_fields`, the field c + Wv, `visible_fields`, the field b + Wᵀh, and `add_slopes`.

    Attributes:
        units: "binary" or "spin", of visible and hidden units.
        step: Distance s between the two states of a unit, 1 or 2.
        visible_shape: Shape of the visible units of one image.
        hidden_shape: Shape of its hidden units.
        rates: For each parameter, what a learning rate is multiplied by, so that it means the same in every machine. A
            weight of spins does s² times as much to the log-odds as one of binary units and its gradient is as much
            larger, a bias s times: divided by s⁴ and s², steps are the same. A parameter that positions share has
            their gradients added up: divided by their number, it gets the mean.
    """

    weight: nn.Parameter
    visible_bias: nn.Parameter
    hidden_bias: nn.Parameter
    hidden_fields: Callable[[Tensor], Tensor]
    visible_fields: Callable[[Tensor], Tensor]

    def __init__(
        self,
        units: str,
        weight_shape: tuple[int, ...],
        visible_shape: tuple[int, ...],
        hidden_shape: tuple[int, ...],
    ):
        super().__init__()
        if units not in get_args(Units):
            raise ValueError(f"units={units!r} is unknown; choose one of: {', '.join(get_args(Units))}")
        self.units = cast(Units, units)
        self.step = 1.0 if units == "binary" else 2.0
        self.visible_shape, self.hidden_shape = visible_shape, hidden_shape
        self.weight = nn.Parameter(torch.empty(weight_shape).normal_(std=INITIAL_DEVIATION))
        self.visible_bias = nn.Parameter(torch.zeros(visible_shape[0]))
        self.hidden_bias = nn.Parameter(torch.zeros(hidden_shape[0]))
        pixels, positions = math.prod(visible_shape[1:]), math.prod(hidden_shape[1:])
        self.rates = {
            "weight": self.step**-4 / positions,
            "visible_bias": self.step**-2 / pixels,
            "hidden_bias": self.step**-2 / positions,
        }

    def hidden_logits(self, v: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Log-odds of the hidden units being on, s·(c + Wv)."""
        return self.step * self.hidden_fields(v)

    def visible_logits(self, h: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """Log-odds of the visible units being on, s·(b + Wᵀh)."""
        return self.step * self.visible_fields(h)

    def energy(self, v: Float[Tensor, "b ..."], h: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
        """E(v, h) = -bᵀv - cᵀh - hᵀWv, in nats."""
        require_means("v", v, self.units)
        return -self._biased(v) - (h * self.hidden_fields(v)).flatten(1).sum(1)

    def free_energy(self, v: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
        """F(v) = -bᵀv - Σ_j log(1 + exp(a_j)), and -bᵀv - Σ_j log 2cosh(a_j) for spins, with a = c + Wv, in nats."""
        require_means("v", v, self.units)
        logits = self.hidden_logits(v)
        # The logarithm of the sum over both states of each hidden unit.
        log_sums = F.softplus(logits) if self.units == "binary" else F.softplus(logits) - logits / 2
        return -self._biased(v) - log_sums.flatten(1).sum(1)

    @torch.no_grad()
    def pseudo_log_likelihood(self, v: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
        """Σ_i log p(v_i | all other visible units), in nats: log σ(F(v with unit i flipped) - F(v)), over all units i.

        Flipping takes v to 1 - v, or to -v for spins. Where v is a grey level, and not one of the two states, this is
        the measure that scikit-learn takes of such images, and no probability. It takes a free energy for each unit.
        """
        before_B = self.free_energy(v)
        total_B = torch.zeros_like(before_B)
        for unit in range(v[0].numel()):
            flipped_BV = v.flatten(1).clone()
            flipped_BV[:, unit] = self.flipped(flipped_BV[:, unit])
            total_B += F.logsigmoid(self.free_energy(flipped_BV.view_as(v)) - before_B)
        return total_B

    def forward(
        self,
        v: Float[Tensor, "b ..."],
        temperature: float | None = None,
        generator: torch.Generator | None = None,
    ) -> Float[Tensor, "b ..."]:
        """What `activate` makes the hidden units of: the field c + Wv or, with a temperature, that of relaxed units.

        With L logistic noise, the field of relaxed units is (c + Wv + L/s) / temperature.

        Args:
            v: Visible units.
            temperature: Of the relaxation; None for means, without noise.
            generator: Source of the noise.

        Raises:
            ValueError: If the temperature is not positive, one of temperature and generator lacks the other, or v is
                outside the range of means of the units, or NaN.
        """
        require_means("v", v, self.units)
        if temperature is None or generator is None:
            if temperature is not None or generator is not None:
                raise ValueError(
                    "temperature and generator belong together; give both for relaxed units, none for means"
                )
            return self.hidden_fields(v)
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be positive")
        # A product, not a quotient, is what expvae._gradients knows how to take for many scores at once.
        fields = self.hidden_fields(v)
        return (fields + logistic_noise(fields, generator) / self.step) * (1 / temperature)

    def activate(self, fields: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Means of units from their fields, as `in_units` of σ(s·field): the sigmoid, or tanh for spins."""
        return fields.sigmoid() if self.units == "binary" else fields.tanh()

    def extra_repr(self) -> str:
        """What tells it from others, beside its class and the values of its parameters."""
        return f"{list(self.visible_shape)} → {list(self.hidden_shape)}, weight={list(self.weight.shape)}, {self.units}"

    def flipped(self, v: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Units in their other state."""
        return 1 - v if self.units == "binary" else -v

    def _biased(self, v: Tensor) -> Tensor:
        """bᵀv."""
        return v.reshape(len(v), len(self.visible_bias), -1).sum(2) @ self.visible_bias


def _require_some(**counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be 1 or more")


class RBM(Machine):
    """Fully connected restricted Boltzmann machine: every visible unit touches every hidden one.

    Args:
        visible: Number of visible units, V.
        hidden: Number of hidden units, H.
        units: "binary" for {0, 1}, "spin" for {-1, 1}.

    Raises:
        ValueError: If the units are unknown, or there are none.
    """

    def __init__(self, visible: int, hidden: int, units: str = "binary"):
        _require_some(visible=visible, hidden=hidden)
        super().__init__(units, (hidden, visible), (visible,), (hidden,))

    def hidden_fields(self, v_BV: Float[Tensor, "b v"]) -> Float[Tensor, "b h"]:
        """The field c + Wv."""
        return F.linear(v_BV, self.weight, self.hidden_bias)

    def visible_fields(self, h_BH: Float[Tensor, "b h"]) -> Float[Tensor, "b v"]:
        """The field b + Wᵀh."""
        return F.linear(h_BH, self.weight.T, self.visible_bias)

    def add_slopes(
        self, total: dict[str, Tensor], v_BV: Float[Tensor, "b v"], h_BH: Float[Tensor, "b h"], times: float
    ) -> None:
        """Add to `total`, in place, so many times the mean over images of -∂E(v, h)/∂θ for each parameter θ.

        That is hᵀv for the weight, v and h for the biases.
        """
        # In one call each: the sum over images, its factor and the addition, without a copy as large as the weight.
        total["weight"].addmm_(h_BH.T, v_BV, alpha=times / len(v_BV))
        total["visible_bias"].add_(v_BV.mean(0), alpha=times)
        total["hidden_bias"].add_(h_BH.mean(0), alpha=times)


class ConvRBM(Machine):
    """Convolutional restricted Boltzmann machine: each hidden unit sees a window of the image, by a shared filter.

    The hidden units [K, H, W] keep a position in the image. All units of a filter share their weights and bias; all
    pixels of a channel share their bias. The field of the hidden units is a convolution without padding, that of the
    visible ones the transposed convolution.

    Args:
        shape: Channels, height and width of the images.
        filters: Number of filters, K.
        kernel: Height and width of a filter.
        stride: Distance between neighbouring windows.
        units: "binary" for {0, 1}, "spin" for {-1, 1}.

    Raises:
        ValueError: If the units are unknown, a number is not positive, or the kernel is larger than the image.
    """

    def __init__(self, shape: tuple[int, int, int], filters: int, kernel: int, stride: int = 1, units: str = "binary"):
        channels, height, width = shape
        _require_some(filters=filters, kernel=kernel, stride=stride)
        if kernel > min(height, width):
            raise ValueError(f"kernel={kernel} is larger than the image, {height}x{width}")
        positions = tuple((side - kernel) // stride + 1 for side in (height, width))
        super().__init__(units, (filters, channels, kernel, kernel), shape, (filters, *positions))
        self.stride = stride
        # Rows and columns at the far edges that no window reaches.
        self.beyond = tuple((side - kernel) % stride for side in (height, width))

    def hidden_fields(self, v_BCYX: Float[Tensor, "b c y x"]) -> Float[Tensor, "b k h w"]:
        """The field c + Wv, a convolution."""
        return F.conv2d(v_BCYX, self.weight, self.hidden_bias, self.stride)

    def visible_fields(self, h_BKHW: Float[Tensor, "b k h w"]) -> Float[Tensor, "b c y x"]:
        """The field b + Wᵀh, a transposed convolution."""
        return F.conv_transpose2d(h_BKHW, self.weight, self.visible_bias, self.stride, output_padding=self.beyond)

    def add_slopes(
        self, total: dict[str, Tensor], v_BCYX: Float[Tensor, "b c y x"], h_BKHW: Float[Tensor, "b k h w"], times: float
    ) -> None:
        """Add to `total`, in place, so many times the mean over images of -∂E(v, h)/∂θ for each parameter θ.

        That is as for `RBM`, added up over the positions that share a parameter.
        """
        share = times / len(v_BCYX)
        total["weight"].add_(conv2d_weight(v_BCYX, self.weight.shape, h_BKHW, self.stride), alpha=share)
        total["visible_bias"].add_(v_BCYX.sum((0, 2, 3)), alpha=share)
        total["hidden_bias"].add_(h_BKHW.sum((0, 2, 3)), alpha=share)


def one_bit_pseudo_log_likelihood(
    model: Machine, v: Float[Tensor, "b ..."], unit_B: Int64[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """Estimate of the pseudo-log-likelihood from one visible unit i of each image: V log σ(F(v, i flipped) - F(v)).

    The mean over i drawn at random is the exact one. It is what `score_samples` of scikit-learn's BernoulliRBM gives.

    Args:
        model: The machine.
        v: Visible units.
        unit_B: Index of the unit that is flipped, in the flattened image.
    """
    flat_BV = v.flatten(1)
    row_B = torch.arange(len(v), device=v.device)
    flipped_BV = flat_BV.clone()
    flipped_BV[row_B, unit_B] = model.flipped(flat_BV[row_B, unit_B])
    difference_B = model.free_energy(flipped_BV.view_as(v)) - model.free_energy(v)
    return flat_BV.shape[1] * F.logsigmoid(difference_B)


@torch.no_grad()
def gibbs(model: Machine, v: Float[Tensor, "b ..."], steps: int, generator: torch.Generator) -> Float[Tensor, "b ..."]:
    """Visible units after so many steps of Gibbs sampling, each h ~ p(h|v), then v ~ p(v|h)."""
    require_means("v", v, model.units)
    for _ in range(steps):
        h = in_units(hard(model.hidden_logits(v), generator), model.units)
        v = in_units(hard(model.visible_logits(h), generator), model.units)
    return v
