import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.models import ResNet18_Weights, resnet18

from lib.models.mnist import MNISTVAE
from lib.models.mvtec import MVTecVAE
from lib.models.ucsd import UCSDVAE

# The first report's Figure 5: layers and their outputs. Left out are the ReLU after Unflatten, which repeats the one
# before, and the final sigmoid, as decoders give logits.
FIGURE_5A_ENCODER = [
    ("Conv2d", (64, 14, 14)),
    ("ReLU", (64, 14, 14)),
    ("Conv2d", (128, 7, 7)),
    ("ReLU", (128, 7, 7)),
    ("Flatten", (6272,)),
    ("Linear", (1024,)),
    ("ReLU", (1024,)),
]
FIGURE_5A_DECODER = [
    ("Linear", (1024,)),
    ("ReLU", (1024,)),
    ("Linear", (6272,)),
    ("ReLU", (6272,)),
    ("Unflatten", (128, 7, 7)),
    ("ConvTranspose2d", (64, 14, 14)),
    ("ReLU", (64, 14, 14)),
    ("ConvTranspose2d", (1, 28, 28)),
]
FIGURE_5B_ENCODER = [
    ("Conv2d", (64, 50, 50)),
    ("ReLU", (64, 50, 50)),
    ("Conv2d", (128, 25, 25)),
    ("ReLU", (128, 25, 25)),
    ("Conv2d", (256, 12, 12)),
    ("ReLU", (256, 12, 12)),
    ("Flatten", (36864,)),
    ("Linear", (1024,)),
    ("ReLU", (1024,)),
]
FIGURE_5B_DECODER = [
    ("Linear", (1024,)),
    ("ReLU", (1024,)),
    ("Linear", (36864,)),
    ("ReLU", (36864,)),
    ("Unflatten", (256, 12, 12)),
    ("ConvTranspose2d", (128, 25, 25)),
    ("ReLU", (128, 25, 25)),
    ("ConvTranspose2d", (64, 50, 50)),
    ("ReLU", (64, 50, 50)),
    ("ConvTranspose2d", (1, 100, 100)),
]
# The figure's first row is the whole ResNet, with 512x8x8 as its output.
FIGURE_5D_ENCODER = [("Flatten", (512 * 8 * 8,)), ("Linear", (1024,))]
FIGURE_5D_DECODER = [
    ("Linear", (1024,)),
    ("Linear", (16384,)),
    ("Unflatten", (1024, 4, 4)),
    ("ConvTranspose2d", (512, 8, 8)),
    ("BatchNorm2d", (512, 8, 8)),
    ("ReLU", (512, 8, 8)),
    ("ConvTranspose2d", (256, 16, 16)),
    ("BatchNorm2d", (256, 16, 16)),
    ("ReLU", (256, 16, 16)),
    ("ConvTranspose2d", (128, 32, 32)),
    ("BatchNorm2d", (128, 32, 32)),
    ("ReLU", (128, 32, 32)),
    ("ConvTranspose2d", (64, 64, 64)),
    ("BatchNorm2d", (64, 64, 64)),
    ("ReLU", (64, 64, 64)),
    ("ConvTranspose2d", (32, 128, 128)),
    ("BatchNorm2d", (32, 128, 128)),
    ("ReLU", (32, 128, 128)),
    ("ConvTranspose2d", (3, 256, 256)),
]


def without_numbers(build, *arguments):
    """A network of shapes alone: no memory and no time for its weights."""
    with torch.device("meta"):
        return build(*arguments)


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


# First report, Table 1.
@pytest.mark.parametrize(("build", "total"), [(MNISTVAE, 13_216_193), (UCSDVAE, 77_243_073), (MVTecVAE, 72_803_363)])
def test_vaes_have_the_published_number_of_parameters(build, total):
    assert parameters(without_numbers(build)) == total
    assert parameters(without_numbers(build, 32)) == total


@pytest.mark.parametrize(
    ("build", "shape", "encoder", "decoder"),
    [
        (MNISTVAE, (1, 28, 28), FIGURE_5A_ENCODER, FIGURE_5A_DECODER),
        (UCSDVAE, (1, 100, 100), FIGURE_5B_ENCODER, FIGURE_5B_DECODER),
        (MVTecVAE, (3, 256, 256), FIGURE_5D_ENCODER, FIGURE_5D_DECODER),
    ],
)
def test_layers_are_those_of_the_published_table(build, shape, encoder, decoder):
    model = without_numbers(build, 10)
    x_BCYX, z_BI = torch.empty(2, *shape, device="meta"), torch.empty(2, 10, device="meta")
    found = outputs(model.encoder, lambda: model.encode(x_BCYX))
    assert [row[1:] for row in found[-len(encoder) :]] == encoder
    assert build is MVTecVAE or len(found) == len(encoder)
    assert [row[1:] for row in outputs(model.decoder, lambda: model.decode(z_BI))] == decoder
    mu_BI, logvar_BI = model.encode(x_BCYX)
    assert mu_BI.shape == logvar_BI.shape == (2, 10)


@pytest.mark.parametrize(
    ("build", "shape", "layers"),
    [
        (MNISTVAE, (1, 28, 28), {"encoder.conv1": (64, 14, 14), "encoder.conv2": (128, 7, 7)}),
        (
            UCSDVAE,
            (1, 100, 100),
            {"encoder.conv1": (64, 50, 50), "encoder.conv2": (128, 25, 25), "encoder.conv3": (256, 12, 12)},
        ),
        (
            MVTecVAE,
            (3, 256, 256),
            {
                "encoder.conv1": (64, 128, 128),
                "encoder.layer1.1.conv2": (64, 64, 64),
                "encoder.layer2.1.conv1": (128, 32, 32),
                "encoder.layer3.1.conv2": (256, 16, 16),
                "encoder.layer4.1.conv2": (512, 8, 8),
            },
        ),
    ],
)
def test_layers_that_attention_asks_for_have_the_documented_shapes(build, shape, layers):
    model = without_numbers(build)
    found = outputs(model, lambda: model.encode(torch.empty(2, *shape, device="meta")))
    assert {name: output for name, _, output in found if name in layers} == layers


def convolve(weights, x, name, function, padding=1):
    return function(x, weights[f"{name}.weight"], weights[f"{name}.bias"], stride=2, padding=padding)


def multiply(weights, x, name):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def mnist_rewritten(weights, x_BCYX, z_BI):
    """Encoder and decoder of the first report's Figure 5a as plain function calls."""
    hidden = convolve(weights, x_BCYX, "encoder.conv1", F.conv2d).clamp(min=0)
    hidden = convolve(weights, hidden, "encoder.conv2", F.conv2d).clamp(min=0)
    hidden = multiply(weights, hidden.reshape(len(x_BCYX), 6272), "encoder.linear").clamp(min=0)
    mu_BI, logvar_BI = multiply(weights, hidden, "mu"), multiply(weights, hidden, "logvar")
    hidden = multiply(weights, z_BI, "decoder.linear1").clamp(min=0)
    hidden = multiply(weights, hidden, "decoder.linear2").clamp(min=0).reshape(len(z_BI), 128, 7, 7)
    hidden = convolve(weights, hidden, "decoder.deconv1", F.conv_transpose2d).clamp(min=0)
    return mu_BI, logvar_BI, convolve(weights, hidden, "decoder.deconv2", F.conv_transpose2d)


def ucsd_rewritten(weights, x_BCYX, z_BI):
    """Encoder and decoder of the first report's Figure 5b as plain function calls."""
    hidden = x_BCYX
    for number in (1, 2, 3):
        hidden = convolve(weights, hidden, f"encoder.conv{number}", F.conv2d).clamp(min=0)
    hidden = multiply(weights, hidden.reshape(len(x_BCYX), 36864), "encoder.linear").clamp(min=0)
    mu_BI, logvar_BI = multiply(weights, hidden, "mu"), multiply(weights, hidden, "logvar")
    hidden = multiply(weights, z_BI, "decoder.linear1").clamp(min=0)
    hidden = multiply(weights, hidden, "decoder.linear2").clamp(min=0).reshape(len(z_BI), 256, 12, 12)
    assert weights["decoder.deconv1.weight"].shape[2:] == (5, 5)
    hidden = convolve(weights, hidden, "decoder.deconv1", F.conv_transpose2d).clamp(min=0)
    hidden = convolve(weights, hidden, "decoder.deconv2", F.conv_transpose2d).clamp(min=0)
    return mu_BI, logvar_BI, convolve(weights, hidden, "decoder.deconv3", F.conv_transpose2d)


def mvtec_rewritten(weights, x_BCYX, z_BI):
    """Figure 5d: torchvision's own ResNet-18 with its last two children switched off, the rest as function calls."""
    resnet = resnet18().eval()
    resnet.avgpool, resnet.fc = nn.Identity(), nn.Identity()
    resnet.load_state_dict({name: weights[f"encoder.{name}"] for name in resnet.state_dict()})
    hidden = multiply(weights, resnet(x_BCYX), "encoder.linear")
    mu_BI, logvar_BI = multiply(weights, hidden, "mu"), multiply(weights, hidden, "logvar")
    hidden = multiply(weights, multiply(weights, z_BI, "decoder.linear1"), "decoder.linear2")
    hidden = hidden.reshape(len(z_BI), 1024, 4, 4)
    for number in range(1, 6):
        hidden = convolve(weights, hidden, f"decoder.deconv{number}", F.conv_transpose2d)
        mean, variance, scale, shift = (
            weights[f"decoder.bn{number}.{name}"][:, None, None]
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        hidden = ((hidden - mean) / (variance + 1e-5).sqrt() * scale + shift).clamp(min=0)
    return mu_BI, logvar_BI, convolve(weights, hidden, "decoder.deconv6", F.conv_transpose2d)


@pytest.mark.parametrize(
    ("build", "shape", "latent_dim", "rewritten"),
    [
        (MNISTVAE, (1, 28, 28), 1, mnist_rewritten),
        (MNISTVAE, (1, 28, 28), 32, mnist_rewritten),
        (UCSDVAE, (1, 100, 100), 10, ucsd_rewritten),
        (MVTecVAE, (3, 256, 256), 10, mvtec_rewritten),
    ],
)
def test_vaes_equal_their_definition(build, shape, latent_dim, rewritten):
    torch.manual_seed(latent_dim)
    model = build(latent_dim).eval()
    x_BCYX, z_BI = torch.rand(2, *shape), torch.randn(2, latent_dim)
    with torch.no_grad():
        mu_BI, logvar_BI = model.encode(x_BCYX)
        logits_BCYX = model.decode(z_BI)
        expected = rewritten(model.state_dict(), x_BCYX, z_BI)
    assert mu_BI.shape == logvar_BI.shape == (2, latent_dim)
    assert logits_BCYX.shape == (2, *shape)
    assert logits_BCYX.min() < 0  # logits, not probabilities
    for ours, theirs in zip((mu_BI, logvar_BI, logits_BCYX), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


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
    model = MVTecVAE(2, weights=ResNet18_Weights.IMAGENET1K_V1)
    # The file is checked against its hash and read without unpickling.
    assert calls == [(ResNet18_Weights.IMAGENET1K_V1, {"check_hash": True, "weights_only": True})]
    ours = model.encoder.state_dict()
    for name, tensor in stand_in.items():
        assert name.startswith("fc.") or torch.equal(ours[name], tensor), name
