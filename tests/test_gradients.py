import itertools

import pytest
import torch
from torch import nn

from expvae import Method, attention, attentions
from expvae import _backward as backward
from expvae import _gradients as gradients
from expvae.models import MNISTVAE, UCSDVAE, MVTecVAE


def slow_alpha(encode, layer, x_BCYX, latents):
    """One image and one latent at a time, in the graph of the whole network."""
    alphas = []
    for x_CYX, latent in itertools.product(x_BCYX, latents):
        kept = []

        def keep(_module, _inputs, output, kept=kept):
            kept.append(output)
            return output.clone()

        handle = layer.register_forward_hook(keep)
        score = encode(x_CYX.unsqueeze(0))[0, latent]
        handle.remove()
        (gradient_BCHW,) = torch.autograd.grad(score, kept[0])
        alphas.append(gradient_BCHW[0].mean((1, 2)))
    return torch.stack(alphas).reshape(len(x_BCYX), len(latents), -1)


@pytest.mark.parametrize(
    ("kind", "shape", "layers"),
    [
        (MNISTVAE, (2, 1, 28, 28), ["conv1", "relu1", "conv2", "relu2"]),
        (UCSDVAE, (2, 1, 100, 100), ["conv1", "conv2", "conv3", "relu3"]),
        (MVTecVAE, (1, 3, 256, 256), ["layer2.1.conv1", "layer4.0.downsample.0", "layer4.1.bn2"]),
    ],
)
def test_every_route_equals_the_slow_loop(kind, shape, layers):
    torch.manual_seed(0)
    vae, x_BCYX, latents = kind(latent_dim=3).eval(), torch.rand(shape), [2, 0]
    for layer in layers:
        expected = slow_alpha(lambda x: vae.encode(x)[0], vae.encoder.get_submodule(layer), x_BCYX, latents)
        routes = ["loop", "batched", *([] if layer == "layer4.0.downsample.0" else ["pooled"])]
        for route in routes:
            result = attention(vae.encode, f"encoder.{layer}", x_BCYX, latents=latents, route=route)
            torch.testing.assert_close(
                result.alpha_BIC, expected, rtol=1e-4, atol=2e-6 * float(expected.abs().max()), msg=f"{layer} {route}"
            )


def chain(*modules, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *modules)


class Add(nn.Module):
    def forward(self, x):
        return x + 2 * torch.ones_like(x)


class Twice(nn.Module):
    """Two ways from one input."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(4, 2, 3), nn.Conv2d(4, 2, 3)

    def forward(self, x):
        return self.a(x) * self.b(x)


class Gated(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x):
        return self.a(x) * x


class Turn(nn.Module):
    def forward(self, x):
        return x.transpose(2, 3)


NETS = {
    # name: (modules after the layer, whether `pooled` exists)
    "strided, padded, dilated": ((nn.ReLU(), nn.Conv2d(4, 3, 3, stride=2, padding=2, dilation=2), nn.Tanh()), True),
    "not square": ((nn.ReLU(), nn.Conv2d(4, 3, (2, 3), stride=(1, 2), padding=(0, 1)), nn.ReLU()), True),
    "no activation": ((nn.Conv2d(4, 3, 2), nn.ReLU()), True),
    "nothing but the head": ((), True),
    "smooth": ((nn.Sigmoid(), nn.Conv2d(4, 3, 2), nn.SiLU()), True),
    "batch normalisation": ((nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 3, 2, bias=False)), True),
    "addition": ((Add(), nn.LeakyReLU(0.2, inplace=True), nn.Conv2d(4, 3, 2), nn.GELU()), True),
    "no bias": ((nn.ReLU(), nn.Flatten(), nn.Linear(4 * 64, 5, bias=False), nn.ReLU()), True),
    # what follows the linear operation is not known to vmap, and goes one score at a time
    "pooled after": ((nn.ReLU(), nn.Conv2d(4, 3, 2), nn.MaxPool2d(2), nn.ELU()), True),
    "normalised after": ((nn.ReLU(), nn.Conv2d(4, 4, 2), nn.GroupNorm(2, 4), nn.Softplus()), True),
    "grouped": ((nn.ReLU(), nn.Conv2d(4, 4, 2, groups=2), nn.ReLU()), False),
    "transposed": ((nn.ReLU(), nn.ConvTranspose2d(4, 3, 2), nn.ReLU()), False),
    "pooled before": ((nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 3, 2)), True),
    "pooled in overlapping windows": ((nn.MaxPool2d(3, 2, 1), nn.Tanh(), nn.MaxPool2d(2, 1), nn.Conv2d(4, 3, 2)), True),
    "averaged before": ((nn.ReLU(), nn.AvgPool2d(2), nn.Conv2d(4, 3, 2)), False),
    "other padding": ((nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect")), False),
    "instance normalisation": ((nn.InstanceNorm2d(4), nn.PReLU(), nn.Conv2d(4, 3, 2)), False),
    "two users": ((nn.ReLU(), Twice()), True),
    "a user that is not linear": ((nn.ReLU(), Gated()), False),
    "other order": ((nn.ReLU(), Turn()), False),
}


@pytest.mark.parametrize("name", NETS)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_routes_on_any_net(name, memory_format):
    modules, pooled = NETS[name]
    net = chain(*modules, nn.Flatten(), nn.LazyLinear(6))
    x_BCYX = torch.rand(3, 1, 8, 8)
    net(x_BCYX)  # gives the lazy layer its shape, and batch normalisation statistics of its own
    net = net.eval().to(memory_format=memory_format)
    x_BCYX = x_BCYX.to(memory_format=memory_format)
    expected = slow_alpha(net, net[0], x_BCYX, range(6))
    # vmap does not go through every operation in every memory format; the rule knows which it goes through.
    for route in ("auto", "loop") if "after" in name else ("auto", "loop", "batched"):
        result = attention(net, "0", x_BCYX, route=route)
        torch.testing.assert_close(result.alpha_BIC, expected, rtol=1e-4, atol=1e-7)
    if pooled:
        result = attention(net, "0", x_BCYX, route="pooled")
        torch.testing.assert_close(result.alpha_BIC, expected, rtol=1e-4, atol=1e-7)
    else:
        with pytest.raises(ValueError, match="route='pooled' needs"):
            attention(net, "0", x_BCYX, route="pooled")
    require_together(net, x_BCYX, [module for module in net.modules() if isinstance(module, nn.Conv2d)])


def require_together(net, x_BCYX, layers):
    """Several layers at once have the α of each alone."""
    expected = {layer: slow_alpha(net, layer, x_BCYX, range(net(x_BCYX).shape[1])) for layer in layers}
    for route in ("auto", "loop"):
        found = attentions(net, {layer: (layer, "liu2020_paper") for layer in layers}, x_BCYX, route=route)
        for layer, alpha_BIC in expected.items():
            torch.testing.assert_close(found[layer].alpha_BIC, alpha_BIC, rtol=1e-4, atol=1e-7)


class Block(nn.Module):
    """A residual block with a projection, as in ResNets."""

    def __init__(self, stride):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(4, 6, 3, stride, 1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 4, 3, 1, 1, groups=stride), nn.BatchNorm2d(4)
        self.projection, self.relu = nn.Conv2d(4, 4, 1, stride), nn.ReLU(inplace=True)

    def forward(self, x):
        hidden = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(
            torch.add(hidden, self.projection(x), alpha=0.5) if self.conv1.stride == (2, 2) else hidden + x
        )


@pytest.mark.parametrize("middle", [nn.Identity(), nn.GroupNorm(2, 4)])
@pytest.mark.parametrize("stack", [1, 2**25])
def test_rules_equal_the_slow_loop_at_every_layer_of_a_residual_network(middle, stack, monkeypatch):
    """With all operations known, and with one in the middle that autograd has to go through."""
    monkeypatch.setattr(backward, "STACK_BYTES", stack)
    pool = nn.MaxPool2d(3, 2, 1)
    net = chain(nn.BatchNorm2d(4), nn.ReLU(True), pool, Block(1), Block(2), Block(1), middle, Block(1), nn.Flatten())
    net.append(nn.LazyLinear(5))
    x_BCYX = torch.rand(3, 1, 18, 18)
    net(x_BCYX)  # gives batch normalisation statistics of its own
    net.eval()
    reached = {name: one for name, one in net.named_modules() if "projection" not in name or name[0] == "5"}
    for name, layer in reached.items():
        if isinstance(layer, nn.Conv2d | nn.BatchNorm2d):
            expected, last = slow_alpha(net, layer, x_BCYX, range(5)), name in ("8.conv2", "8.bn2")
            for route in ("auto", "batched") if last or isinstance(middle, nn.Identity) else ("auto",):
                result = attention(net, layer, x_BCYX, route=route)
                torch.testing.assert_close(result.alpha_BIC, expected, rtol=1e-4, atol=1e-7, msg=f"{name} {route}")
                assert result.route != "loop" or isinstance(middle, nn.GroupNorm)
            method, many = Method(normaliser="image"), attention(net, layer, x_BCYX, Method(normaliser="image"))
            loop = attention(net, layer, x_BCYX, method, route="loop")
            torch.testing.assert_close(many.alpha_BIC, loop.alpha_BIC, rtol=1e-4, atol=1e-6)
    kinds = nn.Conv2d | nn.BatchNorm2d | nn.MaxPool2d | Block
    require_together(net, x_BCYX, [layer for layer in reached.values() if isinstance(layer, kinds)])


@pytest.mark.parametrize("route", ["auto", "loop", "batched", "pooled"])
def test_one_score_and_latents_that_are_views(route):
    net = chain(nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.LazyLinear(6))
    x_BCYX = torch.rand(2, 1, 8, 8)

    def encode(x):
        return net(x).view(len(x), 2, 3).unbind(1)

    encode(x_BCYX)
    expected = slow_alpha(net, net[0], x_BCYX, range(3))
    result = attention(encode, net[0], x_BCYX, route=route)
    torch.testing.assert_close(result.alpha_BIC, expected, rtol=1e-4, atol=1e-7)
    total = attention(encode, net[0], x_BCYX, Method(score="sum_of_means"), route=route)
    torch.testing.assert_close(total.alpha_BIC, expected.sum(1, keepdim=True), rtol=1e-4, atol=1e-7)


def test_double_precision_after_a_single_precision_layer():
    conv, head = nn.Conv2d(1, 4, 3), nn.Linear(4 * 36, 6).double()
    x_BCYX = torch.rand(2, 1, 8, 8)
    for after in (lambda A: A, torch.relu):

        def encode(x, after=after):
            return head(after(conv(x)).double().flatten(1))

        expected = slow_alpha(encode, conv, x_BCYX, range(6))
        for route in ("loop", "pooled"):
            result = attention(encode, conv, x_BCYX, route=route)
            assert result.map_BYX.dtype == torch.float32
            torch.testing.assert_close(result.alpha_BIC, expected, rtol=1e-4, atol=1e-7)


def test_functions_and_unseen_users_are_part_of_the_graph():
    """A second user that no hook on a module would see keeps `pooled` from being taken."""
    net = chain(nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.LazyLinear(6))

    def encode(x_BCYX):
        layer = net[0](x_BCYX)
        return net[1:](layer) + layer.mean((1, 2, 3)).unsqueeze(1)

    x_BCYX = torch.rand(2, 1, 8, 8)
    encode(x_BCYX)
    result = attention(encode, net[0], x_BCYX)
    assert result.route != "pooled"
    torch.testing.assert_close(result.alpha_BIC, slow_alpha(encode, net[0], x_BCYX, range(6)), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("route", ["batched", "pooled"])
def test_chunks_change_nothing(route, monkeypatch):
    net, x_BCYX = chain(nn.ReLU(), nn.Conv2d(4, 3, 3), nn.Flatten(), nn.LazyLinear(6)), torch.rand(5, 1, 8, 8)
    net(x_BCYX)
    abs_of_sum = Method(channels="abs_of_sum")
    whole = attention(net, "0", x_BCYX, abs_of_sum, route=route)
    map_BYX = whole.map_BYX
    for chunk in (1, 4000):  # one at a time, and a few
        monkeypatch.setattr(gradients, "CHUNK_BYTES", chunk)
        monkeypatch.setattr("expvae._gradients.CHUNK_BYTES", chunk)
        parts = attention(net, "0", x_BCYX, abs_of_sum, route=route)
        torch.testing.assert_close(parts.alpha_BIC, whole.alpha_BIC)
        torch.testing.assert_close(parts.map_BYX, map_BYX)


def test_the_rule():
    net = chain(nn.ReLU(), nn.Conv2d(4, 3, 2), nn.ReLU(), nn.Flatten(), nn.LazyLinear(9))
    x_BCYX = torch.rand(1, 1, 8, 8)
    net(x_BCYX)

    def chosen(layer, latents, **options):
        return attention(net, layer, x_BCYX, latents=range(latents), **options).route

    # Four taps: T I / (T + I) reaches 2 at four scores; 49 places of the last convolution's output: at three.
    assert [chosen("0", i) for i in (1, 3, 4, 9)] == ["loop", "batched", "pooled", "pooled"]
    assert [chosen("2", i) for i in (1, 2, 3)] == ["loop", "batched", "pooled"]
    assert chosen("0", 9, method=Method(normaliser="image")) == "batched"
    assert chosen("0", 9, graph="second_order") == "loop"
    assert chosen("0", 9, graph="constant_alpha") == "pooled"
    unknown = chain(nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(9))
    unknown(x_BCYX)
    assert attention(unknown, "0", x_BCYX).route == "loop"
