from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from expvae.models import DSPRITES_LAYERS, DSpritesVAE, ToPixels, discriminator, to_pixels
from expvae_book.side_by_side import SideBySide
from expvae_book.training import build

# Channels in, channels out and kernel of each convolution: the first report's Figure 5c, with D latents.
D = 10
ENCODER = [(1, 32, 4), (32, 32, 4), (32, 64, 4), (64, 64, 4), (64, 128, 4), (128, 2 * D, 1)]
DECODER = [(D, 128, 1), (128, 64, 4), (64, 64, 4), (64, 32, 4), (32, 32, 4), (32, 1, 4)]
ENCODER_OUTPUTS = [(32, 32, 32), (32, 16, 16), (64, 8, 8), (64, 4, 4), (128, 1, 1), (2 * D, 1, 1)]
DECODER_OUTPUTS = [(128, 1, 1), (64, 4, 4), (64, 8, 8), (32, 16, 16), (32, 32, 32), (1, 64, 64)]
M, B = 3, 2


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def outputs(network, x):
    """Kind and shape for one image of what each layer of a sequential network puts out."""
    found = []
    for layer in network:
        x = layer(x)
        found.append((type(layer).__name__, tuple(x.shape[1:])))
    return found


# --- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("latent_dim", [10, 32])
def test_parameters_add_up_over_the_layers(latent_dim):
    wider = {2 * D: 2 * latent_dim, D: latent_dim}
    table = [(wider.get(inputs, inputs), wider.get(outputs, outputs), k) for inputs, outputs, k in ENCODER + DECODER]
    vae = DSpritesVAE(latent_dim)
    assert parameters(vae) == sum(k * k * inputs * outputs + outputs for inputs, outputs, k in table)
    assert parameters(vae.encoder.conv1) == 4 * 4 * 32 + 32 == 544


def test_layers_and_outputs_are_those_of_the_report():
    vae = DSpritesVAE(D)
    for network, x, kind, shapes in [
        (vae.encoder, torch.rand(B, 1, 64, 64), "Conv2d", ENCODER_OUTPUTS),
        (vae.decoder, torch.rand(B, D, 1, 1), "ConvTranspose2d", DECODER_OUTPUTS),
    ]:
        found = outputs(network, x)
        # A 1x1 convolution is its own transpose.
        kinds = ["Conv2d", *[kind] * 5]
        kinds[-1] = "ToPixels" if kind == "ConvTranspose2d" else kind
        assert found[::2] == list(zip(kinds, shapes, strict=True))
        assert found[1::2] == [("ReLU", shape) for shape in shapes[:-1]]


def test_the_layers_of_attention_are_the_convolutions_before_the_posterior():
    names = [name for name, layer in DSpritesVAE(D).encoder.named_children() if isinstance(layer, nn.Conv2d)]
    assert (*DSPRITES_LAYERS, "posterior") == tuple(names)


def test_posterior_and_logits_have_their_shapes():
    vae, x_BCYX = DSpritesVAE(5), torch.rand(B, 1, 64, 64)
    mu_BI, logvar_BI = vae.encode(x_BCYX)
    assert mu_BI.shape == logvar_BI.shape == (B, 5)
    torch.testing.assert_close(torch.cat([mu_BI, logvar_BI], 1), vae.encoder(x_BCYX)[:, :, 0, 0], rtol=0, atol=0)
    assert vae.decode(mu_BI).shape == x_BCYX.shape


def test_the_discriminator_has_six_linear_layers_of_1000_units():
    linear = [(10, 1000), *[(1000, 1000)] * 4, (1000, 2)]
    layers = list(discriminator(10))
    assert [(layer.in_features, layer.out_features) for layer in layers[::2]] == linear
    assert [layer.negative_slope for layer in layers[1::2]] == [0.2] * 5
    assert [type(layer) for layer in layers[1::2]] == [nn.LeakyReLU] * 5
    assert parameters(discriminator(10)) == 11_000 + 4 * 1_001_000 + 2_002
    assert discriminator(4)(torch.rand(7, 4)).shape == (7, 2)


# --- side by side ----------------------------------------------------------------------------------------------------


def encoders(count=M):
    return [build(lambda: DSpritesVAE(4), seed).encoder.double() for seed in range(count)]


def decoders(count=M):
    return [build(lambda: DSpritesVAE(4), seed).decoder.double() for seed in range(count)]


def critics(count=M):
    return [build(lambda: discriminator(4), seed).double() for seed in range(count)]


def inputs_of(networks):
    """One input for each network, and the same as the networks side by side take them."""
    generator = torch.Generator().manual_seed(0)
    shape = {nn.Linear: (4,), nn.Conv2d: (1, 64, 64)}[type(networks[0][0])]
    shape = (4, 1, 1) if "deconv1" in dict(networks[0].named_children()) else shape
    alone = [torch.rand(B, *shape, generator=generator, dtype=torch.float64) for _ in networks]
    return alone, torch.stack(alone) if len(shape) == 1 else torch.cat(alone, 1)


def pieces(joined, count=M):
    """What each of the networks side by side put out."""
    return joined.unbind(0) if joined.ndim == 3 else joined.chunk(count, 1)


@pytest.mark.parametrize("make", [encoders, decoders, critics])
@pytest.mark.parametrize("count", [1, M])
def test_networks_side_by_side_compute_what_each_does_alone(make, count):
    networks = make(count)
    alone, x = inputs_of(networks)
    found = pieces(SideBySide(networks)(x), count)
    for network, x_alone, output in zip(networks, alone, found, strict=True):
        torch.testing.assert_close(output, network(x_alone), rtol=1e-12, atol=1e-14)
    assert not any(torch.equal(found[0], other) for other in found[1:])


@pytest.mark.parametrize("make", [encoders, decoders, critics])
def test_gradients_side_by_side_are_those_of_each_alone(make):
    networks = make()
    alone, x = inputs_of(networks)
    beside = SideBySide(networks)
    # Networks of unlike weight in the loss, so that a gradient that went to a neighbour would show.
    sum((m + 1) * output.square().sum() for m, output in enumerate(pieces(beside(x)))).backward()
    for parameter in beside.weights.values():
        parameter.data = parameter.grad
    for m, network in enumerate(networks):
        gradients = beside.alone(m)
        ((m + 1) * network(alone[m]).square().sum()).backward()
        for name, parameter in network.named_parameters():
            assert parameter.grad.abs().max() > 0, name
            scale = parameter.grad.abs().max().item()
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-12, atol=1e-12 * scale)


@pytest.mark.parametrize("make", [encoders, decoders, critics])
def test_a_pass_may_stop_at_any_layer_and_go_on_from_there(make):
    networks = make()
    alone, x = inputs_of(networks)
    beside = SideBySide(networks)
    whole = beside(x)
    names = [name for name, _ in networks[0].named_children()]
    for place, name in enumerate(names, 1):
        middle = beside(x, names[:place])
        assert torch.equal(beside(middle, names[place:]), whole), name
        if middle.ndim == 4:
            values, end = beside.through(x, name)
            assert torch.equal(values.flatten(1, 2), middle), name
            assert torch.equal(end, whole), name
        for network, x_alone, output in zip(networks, alone, pieces(middle), strict=True):
            torch.testing.assert_close(output, network[:place](x_alone), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("make", [encoders, decoders, critics])
def test_each_network_comes_out_alone_as_it_went_in(make):
    networks = make()
    beside = SideBySide(networks)
    for network, empty in zip(networks, make(2 * M)[M:], strict=True):
        index = networks.index(network)
        empty.load_state_dict(beside.alone(index))
        for name, value in network.state_dict().items():
            assert torch.equal(empty.state_dict()[name], value), name
    first = beside.alone(0)
    next(iter(first.values())).zero_()  # a copy: the networks side by side keep theirs
    assert next(iter(beside.alone(0).values())).abs().max() > 0


def test_networks_side_by_side_do_not_share_memory_with_those_they_were_made_of():
    networks = critics(2)
    before = {name: value.clone() for name, value in networks[0].state_dict().items()}
    beside = SideBySide(networks)
    with torch.no_grad():
        for parameter in beside.parameters():
            parameter.zero_()
    for name, value in networks[0].state_dict().items():
        assert torch.equal(value, before[name]), name
    assert parameters(beside) == sum(parameters(network) for network in networks)


def test_a_layer_of_another_kind_is_refused_by_name():
    network = nn.Sequential(OrderedDict(conv=nn.Conv2d(1, 2, 3), norm=nn.BatchNorm2d(2)))
    with pytest.raises(TypeError, match="norm is a BatchNorm2d, which cannot be put side by side"):
        SideBySide([network])


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.Conv2d(2, 2, 3, groups=2), "layer has groups, dilation, a padding or no bias"),
        (nn.Conv2d(1, 2, 3, dilation=2), "layer has groups, dilation, a padding or no bias"),
        (nn.Conv2d(1, 2, 3, padding=1, padding_mode="reflect"), "layer has groups, dilation, a padding or no bias"),
        (nn.ConvTranspose2d(1, 2, 3, stride=2, output_padding=1), "layer has groups, dilation, a padding or no bias"),
        (nn.Conv2d(1, 2, 3, bias=False), "layer has groups, dilation, a padding or no bias"),
        (nn.Linear(4, 2, bias=False), "layer has groups, dilation, a padding or no bias"),
    ],
)
def test_a_layer_that_would_be_computed_wrongly_is_refused_by_name(layer, message):
    with pytest.raises(TypeError, match=message):
        SideBySide([nn.Sequential(OrderedDict(layer=layer))])


@pytest.mark.parametrize(
    "other",
    [
        nn.Sequential(OrderedDict(linear=nn.Linear(4, 3), relu=nn.LeakyReLU(0.2))),
        nn.Sequential(OrderedDict(linear=nn.Linear(4, 2), relu=nn.LeakyReLU(0.1))),
        nn.Sequential(OrderedDict(line=nn.Linear(4, 2), relu=nn.LeakyReLU(0.2))),
        nn.Sequential(OrderedDict(linear=nn.Linear(4, 2))),
    ],
)
def test_unlike_networks_are_refused(other):
    first = nn.Sequential(OrderedDict(linear=nn.Linear(4, 2), relu=nn.LeakyReLU(0.2)))
    with pytest.raises(ValueError, match="must be alike but for their weights"):
        SideBySide([first, other])


# --- the last layer of decoders of grey images -----------------------------------------------------------------------


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("groups", [1, M])
def test_pixels_are_those_of_the_transposed_convolution(groups, memory_format):
    generator = torch.Generator().manual_seed(3)
    x_BCHW, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.float64, requires_grad=True)
        for shape in ((B, groups * 5, 3, 4), (groups * 5, 1, 4, 4), (groups,))
    )
    x_BCHW, weight = (value.contiguous(memory_format=memory_format) for value in (x_BCHW, weight))
    expected = F.conv_transpose2d(x_BCHW, weight, bias, stride=2, padding=1, groups=groups)
    torch.testing.assert_close(to_pixels(x_BCHW, weight, bias, groups), expected, rtol=1e-12, atol=1e-12)
    torch.autograd.gradcheck(to_pixels, (x_BCHW, weight, bias, groups))
    torch.autograd.gradgradcheck(to_pixels, (x_BCHW, weight, bias, groups))


def test_pixels_in_bfloat16_are_those_of_the_transposed_convolution():
    layer, x_BCHW = ToPixels(32, 1, kernel_size=4, stride=2, padding=1), torch.rand(B, 32, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        y_BCYX = layer(x_BCHW)
        expected = F.conv_transpose2d(x_BCHW, layer.weight, layer.bias, stride=2, padding=1)
    assert y_BCYX.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y_BCYX, expected, rtol=0.02, atol=0.02)
    gradients = [torch.autograd.grad(value.float().sum(), layer.weight)[0] for value in (y_BCYX, expected)]
    torch.testing.assert_close(*gradients, rtol=0.01, atol=0)
