import dataclasses

import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn

from lib.attention import PRESETS, RMS_EPSILON, attention
from lib.models.mnist import MNISTVAE


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return MNISTVAE(latent_dim=6).eval()


@pytest.fixture(scope="module")
def x_BCYX():
    return torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))


class Tiny(nn.Module):
    """Two channels of one pixel each feed two latents linearly, so that maps can be done by hand."""

    def __init__(self, inplace=False):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, kernel_size=1, bias=False)
        self.relu = nn.ReLU(inplace=inplace)
        self.head = nn.Linear(8, 2, bias=False)
        with torch.no_grad():
            self.conv.weight.copy_(torch.tensor([1.0, -2.0]).reshape(2, 1, 1, 1))
            self.head.weight.copy_(torch.tensor([[1.0, 1, 1, 1, 5, 5, 5, 5], [-1.0, -1, -1, -1, 0, 0, 0, 4]]))

    def forward(self, x_BCYX):
        return self.head(self.relu(self.conv(x_BCYX)).flatten(1))


X = torch.tensor([[[[1.0, 2.0], [3.0, -1.0]]]])
# Layer output: channel 0 is x, channel 1 is -2x. The ReLU passes channel 0 where x > 0 and channel 1 where x < 0.
# Latent 0: gradient 1 at three pixels of channel 0 and 5 at one of channel 1, so α = (3/4, 5/4);
# latent 1: gradient -1 at three pixels and 4 at one, so α = (-3/4, 1).
ALPHA = torch.tensor([[[0.75, 1.25], [-0.75, 1.0]]])


def test_paper_map_by_hand():
    result = attention(Tiny(), "conv", X, "liu2020_paper")
    torch.testing.assert_close(result.alpha_BIC, ALPHA)
    linear = torch.stack([(0.75 - 2.5) * X[0, 0], (-0.75 - 2.0) * X[0, 0]])[None]
    torch.testing.assert_close(result.linear_BIHW, linear)
    torch.testing.assert_close(result.map_BIYX, linear.clamp(min=0))
    torch.testing.assert_close(result.map_BYX, linear.clamp(min=0).mean(1))


def test_code_map_by_hand():
    result = attention(Tiny(), "conv", X, "liu2020_code")
    # Σμ: gradient 0 at three pixels of channel 0, and 9 at one of channel 1.
    rms = (9**2 / 8) ** 0.5
    alpha = torch.tensor([[[0.0, 9 / 4]]]) / (rms + RMS_EPSILON)
    torch.testing.assert_close(result.alpha_BIC, alpha)
    torch.testing.assert_close(result.map_BYX, (alpha[0, 0, 1] * -2 * X[:, 0]).abs())


def test_activation_in_place_changes_nothing():
    for preset in PRESETS:
        expected = attention(Tiny(inplace=False), "conv", X, preset).map_BYX
        torch.testing.assert_close(attention(Tiny(inplace=True), "conv", X, preset).map_BYX, expected)


@pytest.mark.parametrize("layer", ["encoder.conv1", "encoder.conv2"])
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks and attributes:UserWarning")
def test_latents_equal_captum(vae, x_BCYX, layer):
    result = attention(vae.encode, layer, x_BCYX, "liu2020_paper")
    gradcam = LayerGradCam(lambda x: vae.encode(x)[0], vae.get_submodule(layer))
    for latent in range(6):
        expected = gradcam.attribute(x_BCYX, target=latent)
        torch.testing.assert_close(result.linear_BIHW[:, [latent]], expected.detach(), atol=1e-8, rtol=1e-4)
        upsampled = nn.functional.interpolate(expected.relu(), (28, 28), mode="bilinear")
        torch.testing.assert_close(result.map_BIYX[:, [latent]], upsampled.detach(), atol=1e-8, rtol=1e-4)
    torch.testing.assert_close(result.map_BYX, result.map_BIYX.mean(1))


def test_code_preset_equals_direct_reading(vae, x_BCYX):
    """One backward pass of Σμ from the second convolution, step by step as the table of published code has it."""
    activation = vae.encoder[:3](x_BCYX).detach().requires_grad_()
    vae.mu(vae.encoder[3:](activation)).sum().backward()
    gradient = activation.grad / (activation.grad.pow(2).mean().sqrt() + 1e-5)
    cam = (gradient.mean((2, 3), keepdim=True) * activation).sum(1, keepdim=True)
    expected = nn.functional.interpolate(cam, (28, 28), mode="bilinear", align_corners=False).abs()[:, 0]
    result = attention(vae.encode, "encoder.conv2", x_BCYX, "liu2020_code")
    torch.testing.assert_close(result.map_BYX, expected.detach())


def test_code_map_depends_on_the_batch_and_paper_map_does_not(vae, x_BCYX):
    def alone_and_together(preset):
        alone = attention(vae.encode, "encoder.conv2", x_BCYX[:1], preset).map_BYX[0]
        return alone, attention(
            vae.encode, "encoder.conv2", x_BCYX * torch.tensor([1, 3, 9]).reshape(3, 1, 1, 1), preset
        ).map_BYX[0]

    torch.testing.assert_close(*alone_and_together("liu2020_paper"), atol=1e-8, rtol=1e-4)
    alone, together = alone_and_together("liu2020_code")
    assert (alone - together).abs().max() > 0.01 * alone.max()


def test_latents_cancel_in_the_sum_and_not_in_the_mean_of_relu(vae, x_BCYX):
    each = dataclasses.replace(PRESETS["liu2020_code"], normaliser="none", score="each_mean")
    summed = dataclasses.replace(PRESETS["liu2020_code"], normaliser="none")
    linear = attention(vae.encode, "encoder.conv2", x_BCYX, each).linear_BIHW
    total = attention(vae.encode, "encoder.conv2", x_BCYX, summed).linear_BIHW[:, 0]
    torch.testing.assert_close(linear.sum(1), total, atol=1e-7, rtol=1e-4)


def test_model_is_left_as_found(x_BCYX):
    vae = MNISTVAE(latent_dim=2)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    attention(vae.encode, "encoder.conv1", x_BCYX)
    with pytest.raises(ValueError, match="not finite"):
        attention(vae.encode, "encoder.conv1", x_BCYX * float("nan"))
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert all(module.training and not module._forward_hooks for module in vae.modules())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


def test_works_under_no_grad():
    with torch.no_grad():
        torch.testing.assert_close(attention(Tiny(), "conv", X).alpha_BIC, ALPHA)


def test_layer_as_module_and_encoder_as_function():
    tiny = Tiny()
    torch.testing.assert_close(attention(lambda x: tiny(x), tiny.conv, X).alpha_BIC, ALPHA)


def test_errors(vae, x_BCYX):
    with pytest.raises(
        ValueError, match=r"'conv9' is unknown; convolutions of this model: encoder.conv1, encoder.conv2"
    ):
        attention(vae.encode, "conv9", x_BCYX)
    with pytest.raises(ValueError, match="'gradcam' is unknown; choose one of: liu2020_paper, liu2020_code"):
        attention(vae.encode, "encoder.conv1", x_BCYX, "gradcam")
    with pytest.raises(ValueError, match="is not reached"):
        attention(vae.encode, "decoder.deconv1", x_BCYX)
    with pytest.raises(TypeError, match="encode is no module"):
        attention(lambda x: x, "conv", x_BCYX)
    with pytest.raises(ValueError, match=r"'mu' puts out \[3, 6\]"):
        attention(vae.encode, "mu", x_BCYX)
    tiny = Tiny()
    with pytest.raises(ValueError, match="is reached 2 times"):
        attention(lambda x: tiny(x) + tiny(x), tiny.conv, X)
    with pytest.raises(ValueError, match="do not depend"):
        attention(lambda x: (tiny(x) * 0).detach() + tiny.head.weight.sum(), tiny.conv, X)
    with pytest.raises(ValueError, match="not finite"):
        attention(tiny, "conv", X * float("inf"))
