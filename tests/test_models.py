from copy import deepcopy
from itertools import pairwise
from urllib.error import HTTPError, URLError

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.transforms.functional import normalize

from expvae import attention
from expvae.models import (
    MNISTVAE,
    UCSDVAE,
    BrongersMVTecVAE,
    BrongersUCSDVAE,
    MVTecVAE,
    Report2MVTecVAE,
    imagenet_weights,
)
from expvae.models._layers import ConvTranspose2d
from expvae_book import explanation, training
from expvae_book.recipes import MVTEC

IMAGE = {MNISTVAE: (1, 28, 28), UCSDVAE: (1, 100, 100), BrongersUCSDVAE: (1, 96, 96)}
IMAGE |= dict.fromkeys([MVTecVAE, BrongersMVTecVAE, Report2MVTecVAE], (3, 256, 256))


def rows(*blocks):
    """Kind and output of each layer, from the kinds of successive layers whose output has the same shape."""
    return [(kind, tuple(shape)) for kinds, *shape in blocks for kind in kinds.split()]


# The first report's Figure 5: layers and their outputs. Left out are the ReLU after Unflatten, which repeats the one
# before, and the final sigmoid, as decoders give logits.
FIGURE_5A_ENCODER = rows(
    ("Conv2d ReLU", 64, 14, 14),
    ("Conv2d ReLU", 128, 7, 7),
    ("Flatten", 6272),
    ("Linear ReLU", 1024),
)
FIGURE_5A_DECODER = rows(
    ("Linear ReLU", 1024),
    ("Linear ReLU", 6272),
    ("Unflatten", 128, 7, 7),
    ("ConvTranspose2d ReLU", 64, 14, 14),
    ("ToPixels", 1, 28, 28),
)
FIGURE_5B_ENCODER = rows(
    ("Conv2d ReLU", 64, 50, 50),
    ("Conv2d ReLU", 128, 25, 25),
    ("Conv2d ReLU", 256, 12, 12),
    ("Flatten", 36864),
    ("Linear ReLU", 1024),
)
FIGURE_5B_DECODER = rows(
    ("Linear ReLU", 1024),
    ("Linear ReLU", 36864),
    ("Unflatten", 256, 12, 12),
    ("ConvTranspose2d ReLU", 128, 25, 25),
    ("ConvTranspose2d ReLU", 64, 50, 50),
    ("ToPixels", 1, 100, 100),
)
# The figure's first row is the whole ResNet, with 512x8x8 as its output.
FIGURE_5D_ENCODER = rows(("Flatten", 512 * 8 * 8), ("Linear", 1024))
FIGURE_5D_DECODER = rows(
    ("Linear", 1024),
    ("Linear", 16384),
    ("Unflatten", 1024, 4, 4),
    ("ConvTranspose2d BatchNorm2d ReLU", 512, 8, 8),
    ("ConvTranspose2d BatchNorm2d ReLU", 256, 16, 16),
    ("ConvTranspose2d BatchNorm2d ReLU", 128, 32, 32),
    ("ConvTranspose2d BatchNorm2d ReLU", 64, 64, 64),
    ("ConvTranspose2d BatchNorm2d ReLU", 32, 128, 128),
    ("ConvTranspose2d", 3, 256, 256),
)
# Code of Brongers et al., with the same left out.
BRONGERS_ENCODER = rows(
    ("Conv2d BatchNorm2d ReLU", 192, 48, 48),
    ("Conv2d BatchNorm2d ReLU", 144, 24, 24),
    ("Conv2d BatchNorm2d ReLU", 96, 12, 12),
    ("Flatten", 13824),
    ("Linear ReLU", 1024),
)
BRONGERS_DECODER = rows(
    ("Linear ReLU", 1024),
    ("Linear ReLU", 13824),
    ("Unflatten BatchNorm2d", 96, 12, 12),
    ("ConvTranspose2d ReLU BatchNorm2d", 144, 24, 24),
    ("ConvTranspose2d ReLU BatchNorm2d", 192, 48, 48),
    ("ToPixels", 1, 96, 96),
)
# Code of Brongers et al. for MVTec AD: a ResNet-18 without max-pooling, so that all is twice as wide, and its two
# linear layers 512→2D and back; left out are the layers inside the residual blocks.
BRONGERS_RESNET = rows(("Conv2d BatchNorm2d ReLU", 64, 128, 128))
BRONGERS_RESNET_BLOCKS = [(64, 128, 128)] * 2 + [(128, 64, 64)] * 2 + [(256, 32, 32)] * 2 + [(512, 16, 16)] * 2
BRONGERS_RESNET_END = rows(("AdaptiveAvgPool2d", 512, 1, 1), ("Flatten", 512), ("Linear", 20))
BRONGERS_RESNET_DECODER = [
    ("Linear", (1024,)),
    ("ReLU", (1024,)),
    *FIGURE_5D_DECODER[1:3],
    ("ReLU", (1024, 4, 4)),
    *FIGURE_5D_DECODER[3:],
]


def without_numbers(build, *arguments, **options):
    """A network of shapes alone: no memory and no time for its weights."""
    with torch.device("meta"):
        return build(*arguments, **options)


def parameters(module):
    return sum(parameter.numel() for parameter in module.parameters())


def outputs(module, run):
    """Name, kind and shape for one image of what each leaf of a module puts out, in the order of the calls."""
    found, handles = [], []
    for name, leaf in module.named_modules():
        if not list(leaf.children()):
            handles.append(
                leaf.register_forward_hook(
                    lambda leaf, x, output, name=name: found.append(
                        (name, type(leaf).__name__, tuple(output.shape[1:]))
                    )
                )
            )
    run()
    for handle in handles:
        handle.remove()
    return found


# First report, Table 1; of the others the layers alone are published, which the next tests add up.
@pytest.mark.parametrize(
    ("build", "total"),
    [
        (MNISTVAE, 13_216_193),
        (UCSDVAE, 77_243_073),
        (BrongersUCSDVAE, 29_761_537),
        (MVTecVAE, 72_803_363),
        (BrongersMVTecVAE, 39_207_459),
        (Report2MVTecVAE, 18_004_160),
    ],
)
def test_vaes_have_the_published_number_of_parameters(build, total):
    assert parameters(without_numbers(build)) == total
    assert parameters(without_numbers(build, 32)) == total


@pytest.mark.parametrize("latents", [1, 32])
def test_parameters_of_the_vae_with_batch_norm_in_closed_form(latents):
    channels, flat = (1, 192, 144, 96), 96 * 12 * 12
    kernels = 16 * sum(a * b for a, b in pairwise(channels))
    convolutions = 2 * kernels + sum(channels[1:]) + sum(channels[:-1])
    norms = 2 * 2 * sum(channels[1:])
    encoder_linear = (flat + 1) * 1024 + 2 * (1024 + 1) * latents
    decoder_linear = (latents + 1) * 1024 + (1024 + 1) * flat
    total = convolutions + norms + encoder_linear + decoder_linear
    assert parameters(without_numbers(BrongersUCSDVAE, latents)) == total
    assert latents != 32 or total == 29_761_537


@pytest.mark.parametrize("latents", [1, 32])
def test_parameters_of_the_resnet_vae_of_brongers_in_closed_form(latents):
    resnet, channels = without_numbers(resnet18), (1024, 512, 256, 128, 64, 32, 3)
    encoder = parameters(resnet) - parameters(resnet.fc) - 64 * 3 * (7 * 7 - 3 * 3) + (512 + 1) * 2 * latents
    linear = (latents + 1) * 1024 + (1024 + 1) * 1024 * 4 * 4
    deconvolutions = sum(16 * a * b + b for a, b in pairwise(channels)) + 2 * sum(channels[1:-1])
    model = without_numbers(BrongersMVTecVAE, latents)
    assert parameters(model.encoder) == encoder
    assert parameters(model) == encoder + linear + deconvolutions
    assert latents != 32 or encoder + linear + deconvolutions == 39_207_459


@pytest.mark.parametrize("latents", [1, 32])
def test_parameters_of_the_second_reports_network_in_closed_form(latents):
    model, resnet = without_numbers(Report2MVTecVAE, latents), without_numbers(resnet18)
    heads = parameters(model.mu) + parameters(model.logvar)
    assert parameters(model.encoder) == parameters(resnet) - parameters(resnet.fc)
    assert heads == 2 * (512 + 1) * latents
    stages = list(pairwise((512, 256, 128, 64, 64)))
    doubling = sum(9 * a * a + 2 * a + (9 + 1) * a * b + 2 * 2 * b for a, b in stages)
    plain = sum(2 * 9 * b * b + 2 * 2 * b for _, b in stages)
    decoder = (latents + 1) * 512 * 4 * 4 + doubling + plain + 9 * 64 * 3
    assert parameters(model) == parameters(model.encoder) + heads + decoder


@pytest.mark.parametrize(
    ("build", "encoder", "decoder"),
    [
        (MNISTVAE, FIGURE_5A_ENCODER, FIGURE_5A_DECODER),
        (UCSDVAE, FIGURE_5B_ENCODER, FIGURE_5B_DECODER),
        (BrongersUCSDVAE, BRONGERS_ENCODER, BRONGERS_DECODER),
        (MVTecVAE, FIGURE_5D_ENCODER, FIGURE_5D_DECODER),
        (BrongersMVTecVAE, BRONGERS_RESNET_END, BRONGERS_RESNET_DECODER),
    ],
)
def test_layers_are_those_of_the_published_table(build, encoder, decoder):
    model = without_numbers(build, 10)
    x_BCYX, z_BI = torch.empty(2, *IMAGE[build], device="meta"), torch.empty(2, 10, device="meta")
    found = outputs(model.encoder, lambda: model.encode(x_BCYX))
    assert [row[1:] for row in found[-len(encoder) :]] == encoder
    assert build in (MVTecVAE, BrongersMVTecVAE) or len(found) == len(encoder)
    assert [row[1:] for row in outputs(model.decoder, lambda: model.decode(z_BI))] == decoder
    mu_BI, logvar_BI = model.encode(x_BCYX)
    assert mu_BI.shape == logvar_BI.shape == (2, 10)


@pytest.mark.parametrize(
    ("build", "layers"),
    [
        (MNISTVAE, {"conv1": (64, 14, 14), "conv2": (128, 7, 7)}),
        (UCSDVAE, {"conv1": (64, 50, 50), "conv2": (128, 25, 25), "conv3": (256, 12, 12)}),
        (BrongersUCSDVAE, {"conv1": (192, 48, 48), "conv2": (144, 24, 24), "conv3": (96, 12, 12)}),
        (
            MVTecVAE,
            {
                "conv1": (64, 128, 128),
                "layer1.1.conv2": (64, 64, 64),
                "layer2.1.conv1": (128, 32, 32),
                "layer3.1.conv2": (256, 16, 16),
                "layer4.1.conv2": (512, 8, 8),
            },
        ),
    ],
)
def test_layers_that_attention_asks_for_have_the_documented_shapes(build, layers):
    model = without_numbers(build)
    found = outputs(model, lambda: model.encode(torch.empty(2, *IMAGE[build], device="meta")))
    expected = {f"encoder.{name}": shape for name, shape in layers.items()}
    assert {name: output for name, _, output in found if name in expected} == expected
    for name, (channels, height, width) in expected.items():
        assert f"``{name}`` ({channels}x{height}x{width})" in " ".join(build.__doc__.split())


def test_resnet_of_brongers_has_the_published_shapes():
    model = without_numbers(BrongersMVTecVAE)
    found = outputs(model.encoder, lambda: model.encode(torch.empty(2, 3, 256, 256, device="meta")))
    assert [row[1:] for row in found[:3]] == BRONGERS_RESNET
    # torchvision's names, and so the attention's, of both convolutions of each of the eight blocks
    blocks = [f"layer{layer}.{block}" for layer in (1, 2, 3, 4) for block in (0, 1)]
    shapes = {name: shape for name, _, shape in found}
    for convolution in ("conv1", "conv2"):
        assert [shapes[f"{block}.{convolution}"] for block in blocks] == BRONGERS_RESNET_BLOCKS
    assert shapes["layer2.1.conv1"] == (128, 64, 64)
    assert "``encoder.layer2.1.conv1``, the one that its code explains, is 128x64x64" in " ".join(
        BrongersMVTecVAE.__doc__.split()
    )


def test_second_reports_network_has_the_documented_shapes():
    model = without_numbers(Report2MVTecVAE)
    found = outputs(model.encoder, lambda: model.encode(torch.empty(2, 3, 256, 256, device="meta")))
    blocks = [(64, 64, 64)] * 4 + [(128, 32, 32)] * 4 + [(256, 16, 16)] * 4 + [(512, 8, 8)] * 4
    assert [shape for name, _, shape in found if name[-5:] in ("conv1", "conv2")] == [(64, 128, 128), *blocks]
    assert "``encoder.layer1.0.conv2``, the one that its code explains, is 64x64x64" in Report2MVTecVAE.__doc__
    # The code explains the second of the modules, from nought, whose names have "conv" in them.
    convolutions = [name for name, _ in model.encoder.named_modules() if "conv" in name]
    assert convolutions[2] == "layer1.0.conv2"
    found = outputs(model.decoder, lambda: model.decode(torch.empty(2, 32, device="meta")))
    doubled = [shape for name, kind, shape in found if kind == "Upsample" and "downsample" not in name]
    assert doubled == [(512, 8, 8), (512, 16, 16), (256, 32, 32), (128, 64, 64), (64, 128, 128), (64, 256, 256)]


def convolve(weights, x, name, function, padding=1):
    return function(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=padding)


def multiply(weights, x, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def normalise(weights, x, name):
    mean, variance, scale, shift = (
        weights[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * scale + shift


def heads(weights, hidden):
    return multiply(weights, hidden, "mu"), multiply(weights, hidden, "logvar")


def flatten(weights, hidden):
    """From the last convolution's ReLU to the mean and the log-variance."""
    return heads(weights, multiply(weights, hidden.reshape(len(hidden), -1), "encoder.linear").clamp(min=0))


def unflatten(weights, z_BI, *shape):
    """From latents to what the first transposed convolution, or its BatchNorm, takes."""
    hidden = multiply(weights, z_BI, "decoder.linear1").clamp(min=0)
    return multiply(weights, hidden, "decoder.linear2").clamp(min=0).reshape(len(z_BI), *shape)


def mnist_rewritten(weights, x_BCYX, z_BI):
    """Encoder and decoder of the first report's Figure 5a as plain function calls."""
    hidden = convolve(weights, x_BCYX, "encoder.conv1", F.conv2d).clamp(min=0)
    hidden = convolve(weights, hidden, "encoder.conv2", F.conv2d).clamp(min=0)
    logits = convolve(weights, unflatten(weights, z_BI, 128, 7, 7), "decoder.deconv1", F.conv_transpose2d).clamp(min=0)
    return *flatten(weights, hidden), convolve(weights, logits, "decoder.deconv2", F.conv_transpose2d)


def ucsd_rewritten(weights, x_BCYX, z_BI):
    """Encoder and decoder of the first report's Figure 5b as plain function calls."""
    hidden = x_BCYX
    for number in (1, 2, 3):
        hidden = convolve(weights, hidden, f"encoder.conv{number}", F.conv2d).clamp(min=0)
    logits = unflatten(weights, z_BI, 256, 12, 12)
    assert weights["decoder.deconv1.weight"].shape[2:] == (5, 5)
    for number in (1, 2):
        logits = convolve(weights, logits, f"decoder.deconv{number}", F.conv_transpose2d).clamp(min=0)
    return *flatten(weights, hidden), convolve(weights, logits, "decoder.deconv3", F.conv_transpose2d)


def brongers_rewritten(weights, x_BCYX, z_BI):
    """Encoder and decoder of Brongers et al. as plain function calls."""
    hidden = (x_BCYX - 0.3750352255196134) / 0.20129592430286292
    for number in (1, 2, 3):
        hidden = convolve(weights, hidden, f"encoder.conv{number}", F.conv2d)
        hidden = normalise(weights, hidden, f"encoder.norm{number}").clamp(min=0)
    logits = unflatten(weights, z_BI, 96, 12, 12)
    for number in (1, 2, 3):
        logits = normalise(weights, logits.clamp(min=0), f"decoder.norm{number}")
        logits = convolve(weights, logits, f"decoder.deconv{number}", F.conv_transpose2d)
    return *flatten(weights, hidden), logits


def mvtec_rewritten(weights, x_BCYX, z_BI):
    """Figure 5d: torchvision's own ResNet-18 with its last two children switched off, the rest as function calls."""
    resnet = resnet18().eval()
    resnet.avgpool, resnet.fc = nn.Identity(), nn.Identity()
    resnet.load_state_dict({name: weights[f"encoder.{name}"] for name in resnet.state_dict()})
    hidden = multiply(weights, resnet(x_BCYX), "encoder.linear")
    logits = multiply(weights, multiply(weights, z_BI, "decoder.linear1"), "decoder.linear2")
    logits = logits.reshape(len(z_BI), 1024, 4, 4)
    for number in range(1, 6):
        logits = convolve(weights, logits, f"decoder.deconv{number}", F.conv_transpose2d)
        logits = normalise(weights, logits, f"decoder.bn{number}").clamp(min=0)
    return *heads(weights, hidden), convolve(weights, logits, "decoder.deconv6", F.conv_transpose2d)


def brongers_mvtec_rewritten(weights, x_BCYX, z_BI):
    """The VAE of Brongers et al. for MVTec AD: torchvision's own ResNet-18 altered, the rest as function calls."""
    resnet = resnet18(num_classes=2 * z_BI.shape[1]).eval()
    resnet.conv1, resnet.maxpool = nn.Conv2d(3, 64, 3, 2, 1, bias=False), nn.Identity()
    names = {name: name.replace("fc.", "linear.") for name in resnet.state_dict()}
    resnet.load_state_dict({name: weights[f"encoder.{ours}"] for name, ours in names.items()})
    standardised = normalize(x_BCYX, [0.4305, 0.3999, 0.3900], [0.1822, 0.1733, 0.1624])
    hidden = resnet(standardised)
    logits = unflatten(weights, z_BI, 1024, 4, 4)
    for number in range(1, 6):
        logits = convolve(weights, logits, f"decoder.deconv{number}", F.conv_transpose2d)
        logits = normalise(weights, logits, f"decoder.bn{number}").clamp(min=0)
    latents = z_BI.shape[1]
    return hidden[:, :latents], hidden[:, latents:], convolve(weights, logits, "decoder.deconv6", F.conv_transpose2d)


def report2_mvtec_rewritten(weights, x_BCYX, z_BI):
    """The VAE of the second report's code: torchvision's own ResNet-18, the rest as function calls."""
    resnet = resnet18().eval()
    resnet.fc = nn.Identity()
    resnet.load_state_dict({name: weights[f"encoder.{name}"] for name in resnet.state_dict()})

    def doubled(values):
        return values.repeat_interleave(2, 2).repeat_interleave(2, 3)

    def block(values, name, doubles):
        between = normalise(weights, F.conv2d(values, weights[f"{name}.conv1.weight"], padding=1), f"{name}.bn1")
        between, second = between.clamp(min=0), f"{name}.conv2.weight"
        if doubles:
            between, second = doubled(between), f"{name}.conv2.1.weight"
            values = F.conv2d(doubled(values), weights[f"{name}.downsample.1.weight"])
            values = normalise(weights, values, f"{name}.downsample.2")
        between = normalise(weights, F.conv2d(between, weights[second], padding=1), f"{name}.bn2")
        return (between + values).clamp(min=0)

    values = doubled(multiply(weights, z_BI, "decoder.linear").reshape(len(z_BI), 512, 4, 4))
    for number in (1, 2, 3, 4):
        values = block(values, f"decoder.layer{number}.0", True)
        values = block(values, f"decoder.layer{number}.1", False)
    t_BCYX = F.conv2d(doubled(values), weights["decoder.conv1.weight"], padding=1)
    return *heads(weights, resnet(normalize(x_BCYX, [0.5] * 3, [0.5] * 3))), 0.5 + t_BCYX / 2


@pytest.mark.parametrize(
    ("build", "latent_dim", "rewritten"),
    [
        (MNISTVAE, 1, mnist_rewritten),
        (MNISTVAE, 32, mnist_rewritten),
        (UCSDVAE, 10, ucsd_rewritten),
        (BrongersUCSDVAE, 10, brongers_rewritten),
        (MVTecVAE, 10, mvtec_rewritten),
        (BrongersMVTecVAE, 10, brongers_mvtec_rewritten),
        (Report2MVTecVAE, 10, report2_mvtec_rewritten),
    ],
)
def test_vaes_equal_their_definition(build, latent_dim, rewritten):
    torch.manual_seed(latent_dim)
    model = build(latent_dim).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):  # as after training; before it, it does almost nothing
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.1, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias, std=0.2)
    x_BCYX, z_BI = torch.rand(2, *IMAGE[build]), torch.randn(2, latent_dim)
    with torch.no_grad():
        mu_BI, logvar_BI = model.encode(x_BCYX)
        logits_BCYX = model.decode(z_BI)
        expected = rewritten(model.state_dict(), x_BCYX, z_BI)
    assert mu_BI.shape == logvar_BI.shape == (2, latent_dim)
    assert logits_BCYX.shape == (2, *IMAGE[build])
    assert logits_BCYX.min() < 0  # logits, not probabilities
    for ours, theirs in zip((mu_BI, logvar_BI, logits_BCYX), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def of_report2():
    return training.build(lambda: Report2MVTecVAE(4), 0).eval()


def test_attention_at_the_layer_of_the_second_reports_code(of_report2):
    """The map of the sum of the means, by autograd on the parts of the network."""
    x_BCYX = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(9))
    map_BYX = attention(of_report2.encode, "encoder.layer1.0.conv2", x_BCYX, "liu2020_code").map_BYX
    encoder = of_report2.encoder
    with torch.no_grad():
        below_BCHW = encoder.maxpool(encoder.relu(encoder.bn1(encoder.conv1(2 * x_BCYX - 1))))
        block = encoder.layer1[0]
        A_BCHW = block.conv2(block.relu(block.bn1(block.conv1(below_BCHW))))
    A_BCHW.requires_grad_()
    above_BCHW = encoder.layer1[1](block.relu(block.bn2(A_BCHW) + below_BCHW))
    top_BCHW = encoder.layer4(encoder.layer3(encoder.layer2(above_BCHW)))
    score = of_report2.mu(top_BCHW.mean((2, 3))).sum()
    (gradient_BCHW,) = torch.autograd.grad(score, A_BCHW)
    alpha_BC11 = (gradient_BCHW / (gradient_BCHW.square().mean().sqrt() + 1e-5)).mean((2, 3), keepdim=True)
    expected = F.interpolate((alpha_BC11 * A_BCHW).sum(1, keepdim=True), size=(256, 256), mode="bilinear")
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(map_BYX, expected[:, 0].abs().detach(), rtol=1e-3, atol=1e-4)


def test_pixels_of_the_second_reports_network_are_reconstructed_and_measured_as_they_are(of_report2):
    x_NCYX, mean_CYX = PIXELS[:2], PIXELS[2:].float().mean(0) / 255
    with torch.no_grad():
        pixels_NCYX = of_report2.decode(of_report2.encode(x_NCYX / 255)[0])
        mu_NI, logvar_NI = of_report2.encode(x_NCYX / 255)
        noise_NI = torch.randn(mu_NI.shape, generator=torch.Generator().manual_seed(0))
        sampled_NCYX = of_report2.decode(mu_NI + (logvar_NI / 2).exp() * noise_NI)
    torch.testing.assert_close(explanation.reconstruct(of_report2, x_NCYX), pixels_NCYX.clamp(0, 1))
    rows = explanation.learned_rows(of_report2, x_NCYX, {"mean": mean_CYX})
    found = {row["metric"]: row["value"] for row in rows}
    images_NCYX = 2 * (x_NCYX / 255) - 1
    expected = F.mse_loss(2 * sampled_NCYX - 1, images_NCYX).item()
    assert found["reconstruction per image"] == pytest.approx(expected, rel=1e-4)
    of_mean = F.mse_loss((2 * mean_CYX - 1).expand_as(images_NCYX), images_NCYX).item()
    assert found["reconstruction per image, mean"] == pytest.approx(of_mean, rel=1e-4)


def test_second_reports_network_starts_from_pytorchs_weights():
    """Those of its convolutions are uniform within 1/√(weights of an output)."""
    for module in training.build(Report2MVTecVAE, 0).modules():
        if isinstance(module, nn.Conv2d):
            bound = module.weight[0].numel() ** -0.5
            assert 0.95 * bound < module.weight.abs().max() <= bound


def test_resnet_of_the_mvtec_vae_is_torchvisions_without_its_classifier():
    model, resnet = without_numbers(MVTecVAE), without_numbers(resnet18)
    expected = {name: tensor.shape for name, tensor in resnet.state_dict().items() if not name.startswith("fc.")}
    ours = {name: tensor.shape for name, tensor in model.encoder.state_dict().items() if not name.startswith("linear.")}
    assert ours == expected
    assert parameters(model.encoder) - parameters(model.encoder.linear) == parameters(resnet) - parameters(resnet.fc)


def test_mvtec_vae_starts_from_imagenet_only_when_asked(monkeypatch):
    torch.manual_seed(5)
    stand_in = {name: torch.rand_like(tensor.float()).to(tensor) for name, tensor in resnet18().state_dict().items()}
    calls = []

    def get_state_dict(weights, **options):
        calls.append((weights, options))
        return stand_in

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", get_state_dict)
    without_numbers(MVTecVAE)
    assert calls == []
    model = MVTecVAE(2, weights=imagenet_weights())
    # The file is checked against its hash and read without unpickling.
    options = {"check_hash": True, "weights_only": True, "progress": False}
    assert calls == [(ResNet18_Weights.IMAGENET1K_V1, options)]
    ours = model.encoder.state_dict()
    for name, tensor in stand_in.items():
        assert name.startswith("fc.") or torch.equal(ours[name], tensor), name


# --- ImageNet's weights ----------------------------------------------------------------------------------------------


@pytest.fixture
def imagenet(monkeypatch):
    """Weights in the place of ImageNet's, which are not downloaded."""
    torch.manual_seed(6)
    stand_in = resnet18().state_dict()
    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", lambda weights, **options: deepcopy(stand_in))
    return stand_in


@pytest.mark.parametrize("frozen", [False, True])
def test_images_are_normalised_as_the_imagenet_weights_want_it(imagenet, frozen):
    model = MVTecVAE(2, imagenet_weights(), frozen).eval()
    plain = MVTecVAE(2).eval()
    plain.load_state_dict(model.state_dict())
    expected = ResNet18_Weights.IMAGENET1K_V1.transforms()
    x_BCYX = torch.rand(2, 3, 256, 256, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        ours, theirs = model.encode(x_BCYX), plain.encode(normalize(x_BCYX, expected.mean, expected.std))
        other = plain.encode(x_BCYX)
    for one, two, without in zip(ours, theirs, other, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        assert (one - without).abs().max() > 1e-2


def test_where_there_is_no_network_there_are_no_imagenet_weights(imagenet, monkeypatch):
    assert imagenet_weights().keys() == imagenet.keys()
    errors = [
        URLError("Name or service not known"),
        HTTPError("https://example.org", 403, "Forbidden", None, None),
        TimeoutError("timed out"),
        ConnectionResetError("Connection reset by peer"),
    ]
    for error in errors:

        def get_state_dict(weights, error=error, **options):
            raise error

        monkeypatch.setattr(ResNet18_Weights, "get_state_dict", get_state_dict)
        assert imagenet_weights() is None


def test_a_damaged_download_is_no_missing_network(monkeypatch):
    def get_state_dict(weights, **options):
        assert options["check_hash"]
        raise RuntimeError("invalid hash value")

    monkeypatch.setattr(ResNet18_Weights, "get_state_dict", get_state_dict)
    with pytest.raises(RuntimeError, match="invalid hash value"):
        imagenet_weights()


# --- a frozen encoder ------------------------------------------------------------------------------------------------

PIXELS = torch.randint(0, 256, (4, 3, 256, 256), generator=torch.Generator().manual_seed(8), dtype=torch.uint8)


def in_resnet(name):
    return name.startswith("encoder.") and not name.startswith("encoder.linear.")


def test_a_frozen_vae_has_as_many_weights_of_which_fewer_are_trained():
    model, resnet = without_numbers(MVTecVAE, frozen=True), without_numbers(resnet18)
    kept = {name: value.numel() for name, value in model.named_buffers() if name.endswith(("weight", "bias"))}
    assert all(map(in_resnet, kept))
    assert sum(kept.values()) == parameters(resnet) - parameters(resnet.fc)
    assert parameters(model) + sum(kept.values()) == 72_803_363
    assert not any(in_resnet(name) for name, _ in model.named_parameters())
    shapes = {name: value.shape for name, value in without_numbers(MVTecVAE).state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


@pytest.mark.parametrize("frozen", [False, True])
def test_training_leaves_a_frozen_resnet_as_it_was(frozen):
    model = training.build(lambda: MVTecVAE(2, frozen=frozen), 0)
    before = deepcopy(model.state_dict())
    training.train(model, PIXELS[:2], PIXELS[2:], MVTEC["report1"], epochs=1, seed=0, progress=False)
    # A bias before a batch normalisation has no effect, and next to no gradient.
    idle = {f"decoder.deconv{number}.bias" for number in range(1, 6)}
    unchanged = {name for name, value in model.state_dict().items() if torch.equal(value, before[name])}
    assert unchanged - idle == ({name for name in before if in_resnet(name)} if frozen else set())


def test_the_mode_of_a_frozen_resnet_does_not_change():
    model = without_numbers(MVTecVAE, frozen=True)
    for mode in (True, False):
        assert model.train(mode) is model
        for name, module in model.named_modules():
            if isinstance(module, nn.BatchNorm2d):
                assert module.training is (mode and name.startswith("decoder.")), name
    assert without_numbers(MVTecVAE).train().encoder.bn1.training


def narrow():
    """The frozen ResNet between layers so narrow that a checkpoint is soon written."""
    model = MVTecVAE(2, frozen=True)
    model.encoder.linear = nn.Linear(512 * 8 * 8, 4)
    model.mu, model.logvar = nn.Linear(4, 2), nn.Linear(4, 2)
    model.decoder = nn.Sequential(nn.Linear(2, 3 * 256 * 256), nn.Unflatten(1, (3, 256, 256)))
    return model


def test_a_frozen_vae_that_was_cut_off_goes_on(tmp_path):
    def trained(epochs, **options):
        model, taken = training.build(narrow, 0), []
        model.encoder.register_forward_pre_hook(lambda module, _: taken.append(1) if module.training else None)
        history = training.train(
            model, PIXELS[:2], PIXELS[2:], MVTEC["report1"], epochs=epochs, seed=0, progress=False, **options
        )
        return model.state_dict(), history, len(taken)

    checkpoint = {"checkpoint": tmp_path / "checkpoint", "checkpoint_seconds": 0.0}
    trained(1, **checkpoint)
    resumed, history, steps = trained(2, **checkpoint)
    uninterrupted, expected, all_steps = trained(2)
    assert (steps, all_steps) == (1, 2)
    assert history.images == expected.images == 4
    assert history.kl == expected.kl
    for name, value in resumed.items():
        assert torch.equal(value, uninterrupted[name]), name


@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("kernel_size", [4, 5])
def test_a_transposed_convolution_is_pytorchs_with_all_its_gradients(kernel_size, precision, tolerance):
    theirs = nn.ConvTranspose2d(5, 3, kernel_size, stride=2, padding=1).to(memory_format=torch.channels_last)
    ours = ConvTranspose2d(5, 3, kernel_size, stride=2, padding=1).to(memory_format=torch.channels_last)
    ours.load_state_dict(theirs.state_dict())
    x_BCYX = torch.randn(4, 5, 7, 7, generator=torch.Generator().manual_seed(0))
    found = []
    for layer in (theirs, ours):
        inputs = x_BCYX.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            output = layer(inputs)
        assert output.dtype == precision
        output.square().sum().backward()
        found.append([output, inputs.grad, layer.weight.grad, layer.bias.grad])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * theirs.abs().max().item())
