import pytest
import torch
from torch.nn import functional as F

from lib.models.mnist import MNISTVAE


def rewritten(weights, x_BCYX, z_BI):
    """Encoder and decoder of the first report's Figure 5a as plain function calls."""

    def convolve(x, name, function):
        return function(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=1)

    def multiply(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    hidden = convolve(x_BCYX, "encoder.conv1", F.conv2d).clamp(min=0)
    hidden = convolve(hidden, "encoder.conv2", F.conv2d).clamp(min=0)
    hidden = multiply(hidden.reshape(len(x_BCYX), 6272), "encoder.linear").clamp(min=0)
    mu_BI, logvar_BI = multiply(hidden, "mu"), multiply(hidden, "logvar")
    hidden = multiply(z_BI, "decoder.linear1").clamp(min=0)
    hidden = multiply(hidden, "decoder.linear2").clamp(min=0).reshape(len(z_BI), 128, 7, 7)
    hidden = convolve(hidden, "decoder.deconv1", F.conv_transpose2d).clamp(min=0)
    return mu_BI, logvar_BI, convolve(hidden, "decoder.deconv2", F.conv_transpose2d)


def test_mnist_vae_has_the_published_number_of_parameters():
    # First report, Table 1.
    assert sum(parameter.numel() for parameter in MNISTVAE().parameters()) == 13_216_193


@pytest.mark.parametrize("latent_dim", [1, 10, 32])
def test_mnist_vae_equals_its_definition(latent_dim):
    torch.manual_seed(latent_dim)
    model = MNISTVAE(latent_dim)
    x_BCYX, z_BI = torch.rand(3, 1, 28, 28), torch.randn(3, latent_dim)
    with torch.no_grad():
        mu_BI, logvar_BI = model.encode(x_BCYX)
        logits_BCYX = model.decode(z_BI)
        expected = rewritten(model.state_dict(), x_BCYX, z_BI)
    assert mu_BI.shape == logvar_BI.shape == (3, latent_dim)
    assert logits_BCYX.shape == (3, 1, 28, 28)
    for ours, theirs in zip((mu_BI, logvar_BI, logits_BCYX), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_layers_that_attention_asks_for_have_the_documented_shapes():
    model = MNISTVAE()
    shapes = {}
    for name in ("conv1", "conv2"):
        layer = model.get_submodule(f"encoder.{name}")
        layer.register_forward_hook(lambda layer, x, output, name=name: shapes.update({name: tuple(output.shape)}))
    with torch.no_grad():
        model.encode(torch.zeros(2, 1, 28, 28))
    assert shapes == {"conv1": (2, 64, 14, 14), "conv2": (2, 128, 7, 7)}
