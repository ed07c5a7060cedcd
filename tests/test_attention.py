import dataclasses
import functools
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from captum.attr import LayerGradCam
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score
from torch import nn

from expvae import PRESETS, RMS_EPSILON, Method, attention, attentions, upsample
from expvae.models import MNISTVAE, UCSDVAE, MVTecVAE


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
    for preset in ("liu2020_paper", "liu2020_code", "brongers2021"):
        expected = attention(Tiny(inplace=False), "conv", X, preset).map_BYX
        torch.testing.assert_close(attention(Tiny(inplace=True), "conv", X, preset).map_BYX, expected)


SHAPES = {MNISTVAE: (1, 28, 28), UCSDVAE: (1, 100, 100), MVTecVAE: (3, 256, 256)}


@functools.cache
def network(kind):
    torch.manual_seed(0)
    return kind(latent_dim=2).eval()


def convolutions(kind):
    return [name for name, module in network(kind).encoder.named_modules() if isinstance(module, nn.Conv2d)]


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.filterwarnings("ignore:Setting forward, backward hooks and attributes:UserWarning")
def test_every_layer_of_every_encoder_equals_captum(kind):
    vae, x_BCYX = network(kind), torch.rand(2, *SHAPES[kind], generator=torch.Generator().manual_seed(1))
    layers = convolutions(kind)
    assert len(layers) == {MNISTVAE: 2, UCSDVAE: 3, MVTecVAE: 20}[kind]
    together = attentions(vae.encode, {layer: (f"encoder.{layer}", "liu2020_paper") for layer in layers}, x_BCYX)
    for layer in layers:
        result = attention(vae.encode, f"encoder.{layer}", x_BCYX, "liu2020_paper")
        alpha_BIC = together[layer].alpha_BIC
        torch.testing.assert_close(alpha_BIC, result.alpha_BIC, rtol=1e-4, atol=1e-5 * float(alpha_BIC.abs().max()))
        gradcam = LayerGradCam(lambda x: vae.encode(x)[0], vae.encoder.get_submodule(layer))
        for latent in (1,) if kind is MVTecVAE else (0, 1):  # captum takes half a second for each there
            expected = gradcam.attribute(x_BCYX, target=latent).detach()
            close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
            close(result.linear_BIHW[:, [latent]], expected)
            close(result.map_BIYX[:, [latent]], upsample(expected.relu(), x_BCYX.shape[2:]))
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


def test_pooled_auroc_depends_on_the_batch_size_through_the_batch_normaliser_alone():
    """With s = Σ_hw A²/2 the gradient is A itself, so that L = mean(A) A and the map without normaliser is x̄ x.

    Divided by its root mean square r alone, an image's map is x̄ x / r, which is free of the image's brightness but for
    one factor; divided by that of the batch it is not.
    """
    conv = nn.Conv2d(1, 1, 1, bias=False)
    nn.init.ones_(conv.weight)

    def encode(x_BCYX):
        return conv(x_BCYX).square().sum((2, 3)) / 2

    generator = torch.Generator().manual_seed(0)
    x_BCYX = 1 + 0.01 * torch.rand(16, 1, 6, 6, generator=generator)
    truth_BYX = torch.zeros(16, 6, 6, dtype=bool)
    truth_BYX[:, 2:4, 2:4] = True
    x_BCYX[truth_BYX.unsqueeze(1)] *= 4
    brightness_B = 1.08 ** torch.arange(16)  # bright images beside dark ones, each as clear as the other
    x_BCYX *= brightness_B.reshape(16, 1, 1, 1)

    def aurocs(normaliser, size):
        method = Method(score="sum_of_means", normaliser=normaliser, channels="abs_of_sum")
        parts = [attention(encode, conv, part, method).map_BYX for part in x_BCYX.split(size)]
        map_BYX = torch.cat(parts)
        alone = [roc_auc_score(t.flatten(), m.flatten()) for t, m in zip(truth_BYX, map_BYX, strict=True)]
        assert alone == [1.0] * 16
        return roc_auc_score(truth_BYX.flatten(), map_BYX.flatten())

    by_batch = [aurocs("batch", size) for size in (1, 2, 4, 8, 16)]
    assert by_batch[0] == 1
    assert all(later <= earlier for earlier, later in itertools.pairwise(by_batch))
    assert by_batch[-1] < 0.95
    for normaliser in ("none", "image"):
        assert len({aurocs(normaliser, size) for size in (1, 2, 4, 8, 16)}) == 1
    assert aurocs("image", 16) == pytest.approx(by_batch[0], abs=1e-6)


def test_latents_cancel_in_the_sum_and_not_in_the_mean_of_relu(vae, x_BCYX):
    each = dataclasses.replace(PRESETS["liu2020_code"], normaliser="none", score="each_mean")
    summed = dataclasses.replace(PRESETS["liu2020_code"], normaliser="none")
    linear = attention(vae.encode, "encoder.conv2", x_BCYX, each).linear_BIHW
    total = attention(vae.encode, "encoder.conv2", x_BCYX, summed).linear_BIHW[:, 0]
    torch.testing.assert_close(linear.sum(1), total, atol=1e-7, rtol=1e-4)


# --- the choices ------------------------------------------------------------------------------------------------


def test_presets_are_the_table_of_the_published_code():
    """Of Liu et al.'s paper and code, and of Brongers et al.'s two notebooks."""
    expected = {
        "liu2020_paper": Method("each_mean", "before", "none", "relu_of_sum", align_corners=False),
        "liu2020_code": Method("sum_of_means", "before", "batch", "abs_of_sum", align_corners=False),
        "brongers2021": Method("sum_of_means", "before", "batch", "mean_of_abs", align_corners=True),
        "brongers2021_disentanglement": Method("each_sample", "mixed", "none", "sum_of_relu", align_corners=True),
    }
    assert expected == PRESETS


def test_brongers_map_by_hand():
    result = attention(Tiny(), "conv", X, "brongers2021")
    # As for the authors' code, α is nonzero for the second channel alone, which holds -2x.
    expected = (result.alpha_BIC[0, 0, 1] * 2 * X[:, 0]).abs() / 2
    torch.testing.assert_close(result.map_BYX, expected)


def test_disentanglement_map_by_hand():
    def encode(x_BCYX):
        return tiny(x_BCYX), torch.full((1, 2), -1e9)  # no variance: the sample is the mean

    tiny = Tiny(inplace=True)
    result = attention(encode, tiny.conv, X, "brongers2021_disentanglement", generator=torch.Generator())
    torch.testing.assert_close(result.alpha_BIC, ALPHA)
    positive, negative = X[0, 0].relu(), (-2 * X[0, 0]).relu()
    # Latent 0: both weights are positive; latent 1: only the second.
    expected = torch.stack([0.75 * positive + 1.25 * negative, negative])[None]
    torch.testing.assert_close(result.map_BIYX, expected)


class SmallVAE(nn.Module):
    """An encoder of mean and logarithm of the variance, small enough for hundreds of methods."""

    def __init__(self):
        super().__init__()
        self.conv1, self.relu, self.conv2 = nn.Conv2d(2, 3, 3, stride=2), nn.ReLU(inplace=True), nn.Conv2d(3, 2, 2)
        self.mu, self.logvar = nn.Linear(8, 4), nn.Linear(8, 4)

    def encode(self, x_BCYX):
        hidden = self.conv2(self.relu(self.conv1(x_BCYX))).tanh().flatten(1)
        return self.mu(hidden), self.logvar(hidden)


def direct(vae, x_BCYX, method, epsilon_BD, normal):
    """The map at the first convolution, step by step with every gradient in full."""
    before = vae.conv1(x_BCYX).detach().requires_grad_()
    after = before.relu()
    hidden = vae.conv2(after).tanh().flatten(1)
    mu, std = vae.mu(hidden), (0.5 * vae.logvar(hidden)).exp()
    scores = {
        "each_mean": lambda: mu,
        "sum_of_means": lambda: mu.sum(1, keepdim=True),
        "each_sample": lambda: mu + std * epsilon_BD,
        "normal_difference": lambda: (normal[0] - mu + (normal[1].exp() + std**2).sqrt() * epsilon_BD).sum(
            1, keepdim=True
        ),
        "most_deviant": lambda: torch.stack(
            [m[((m - normal[0]).abs() / (0.5 * normal[1]).exp()).argmax()] for m in mu]
        )[:, None],
    }[method.score]()
    maps = []
    for score in scores.unbind(1):
        wrt = after if method.tensor == "after" else before
        (gradient,) = torch.autograd.grad(score.sum(), wrt, retain_graph=True)
        over = {"none": None, "image": (1, 2, 3), "batch": (0, 1, 2, 3)}[method.normaliser]
        if over is not None:
            gradient = gradient / (gradient.pow(2).mean(over, keepdim=True).sqrt() + 1e-5)
        values = before if method.tensor == "before" else after
        product = gradient.mean((2, 3), keepdim=True) * values.detach()
        small = {
            "relu_of_sum": lambda p: p.sum(1, keepdim=True).relu(),
            "abs_of_sum": lambda p: p.sum(1, keepdim=True),
            "mean_of_abs": lambda p: p.abs().mean(1, keepdim=True),
            "sum_of_relu": lambda p: p.relu().sum(1, keepdim=True),
        }[method.channels](product)
        maps.append(nn.functional.interpolate(small, (7, 7), mode="bilinear", align_corners=method.align_corners))
    map_BIYX = torch.cat(maps, 1).abs()
    return map_BIYX.mean(1) if method.aggregate == "mean" else map_BIYX.sum(1)


CHOICES = [
    Method(*choices, align_corners=choices[2] == "none")
    for choices in itertools.product(
        ("each_mean", "sum_of_means", "each_sample", "normal_difference", "most_deviant"),
        ("before", "after", "mixed"),
        ("none", "image", "batch"),
        ("relu_of_sum", "abs_of_sum", "mean_of_abs", "sum_of_relu"),
        ("mean", "sum"),
    )
]


def test_every_combination_of_choices_equals_direct_reading():
    """All of them from one pass through the encoder; a few of them alone are the same."""
    torch.manual_seed(0)
    vae, x_BCYX = SmallVAE(), torch.rand(3, 2, 7, 7)
    normal = (torch.randn(4), torch.randn(4))
    epsilon_BD = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))

    def explained(methods):
        generator = torch.Generator().manual_seed(2)
        return attention(vae.encode, "conv1", x_BCYX, methods, normal=normal, generator=generator)

    assert len(CHOICES) == 5 * 3 * 3 * 4 * 2
    results = explained({method: method for method in CHOICES})
    assert set(results) == set(CHOICES)
    for place, (method, result) in enumerate(results.items()):
        assert result.method == method
        expected = direct(vae, x_BCYX, method, epsilon_BD, normal).detach()
        close = functools.partial(torch.testing.assert_close, rtol=1e-4, msg=str(method))
        close(result.map_BYX, expected, atol=1e-5 * float(expected.max()))
        if place % 7 == 0:
            alone = explained(method)
            close(alone.map_BYX, expected, atol=1e-5 * float(expected.max()))
            close(alone.latents_BD, result.latents_BD, atol=0)


def test_several_methods_share_passes(vae, x_BCYX, monkeypatch):
    passes, calls, grad = [], [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a) or grad(*a, **k))

    def encode(x):
        passes.append(len(x))
        return vae.encode(x)

    def count(methods, **options):
        passes.clear()
        calls.clear()
        results = attention(encode, vae.encoder.conv2, x_BCYX, methods, route="loop", **options)
        return results, len(passes), len(calls)

    of_sum = {n: Method("sum_of_means", normaliser=n, channels="abs_of_sum") for n in ("image", "batch")}
    of_sum |= {"mixed": Method("sum_of_means", "mixed"), "Brongers": "brongers2021", "code": "liu2020_code"}
    results, forward, backward = count(of_sum)
    assert list(results) == list(of_sum)
    assert (forward, backward) == (1, 1)
    of_each = {f"each, {n}": Method("each_mean", normaliser=n, aggregate="sum") for n in ("none", "image", "batch")}
    results, forward, backward = count(of_sum | of_each)
    assert (forward, backward) == (1, 1 + 6)
    for name, method in (of_sum | of_each).items():
        alone, forward, backward = count(method)
        torch.testing.assert_close(results[name].map_BYX, alone.map_BYX)
        assert torch.equal(results[name].latents_BD, alone.latents_BD)
        assert not results[name].map_BYX.requires_grad
    after, _, backward = count({"after": Method(tensor="after"), "before": Method()}, latents=[3, 1])
    assert backward == 2  # one of each latent serves both places
    torch.testing.assert_close(after["after"].map_BYX, count(Method(tensor="after"), latents=[3, 1])[0].map_BYX)


def test_several_layers_share_passes(vae, x_BCYX, monkeypatch):
    calls, grad, normal = [], torch.autograd.grad, (torch.zeros(6), torch.ones(6))
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(a) or grad(*a, **k))
    passes, layers = [], (vae.encoder.conv1, vae.encoder.conv2)
    methods = dict(PRESETS) | {score: Method(score=score) for score in ("normal_difference", "most_deviant")}
    methods |= {"after": Method("sum_of_means", "after"), "mixed": Method("normal_difference", "mixed")}
    wanted = {(name, place): (layer, methods[name]) for name in methods for place, layer in enumerate(layers)}
    wanted |= {"module": (vae.encoder.relu1, "liu2020_code")}

    def encode(x):
        passes.append(len(x))
        return vae.encode(x)

    for route, backward in (("auto", None), ("loop", 6 + 1 + 6 + 1 + 1)):
        passes.clear()
        calls.clear()
        options = {"normal": normal, "route": route}
        results = attentions(encode, wanted, x_BCYX, generator=torch.Generator().manual_seed(3), **options)
        assert passes == [3]
        assert backward is None or len(calls) == backward
        assert list(results) == list(wanted)
        for name, (layer, method) in wanted.items():
            alone = attention(encode, layer, x_BCYX, method, generator=torch.Generator().manual_seed(3), **options)
            expected = alone.map_BYX
            assert (results[name].method, results[name].route) == (alone.method, alone.route)
            torch.testing.assert_close(results[name].map_BYX, expected, rtol=1e-4, atol=1e-5 * float(expected.max()))
            assert torch.equal(results[name].latents_BD, alone.latents_BD)
    assert not any(module._forward_hooks for module in vae.modules())


def test_several_layers_are_parts_of_one_graph(vae, x_BCYX):
    wanted = {layer: (f"encoder.{layer}", "liu2020_code") for layer in ("conv1", "conv2")}
    together = attentions(vae.encode, wanted, x_BCYX, graph="second_order")
    weight = vae.encoder.conv1.weight
    for name, (layer, method) in wanted.items():
        (slope,) = torch.autograd.grad(together[name].map_BYX.square().sum(), weight, retain_graph=True)
        alone = attention(vae.encode, layer, x_BCYX, method, graph="second_order")
        (expected,) = torch.autograd.grad(alone.map_BYX.square().sum(), weight)
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_several_methods_are_parts_of_one_graph(vae, x_BCYX):
    methods = {"paper": "liu2020_paper", "code": "liu2020_code"}
    together = attention(vae.encode, "encoder.conv1", x_BCYX, methods, graph="second_order")
    weight = vae.encoder.conv1.weight
    for name, result in together.items():
        (slope,) = torch.autograd.grad(result.map_BYX.square().sum(), weight, retain_graph=True)
        alone = attention(vae.encode, "encoder.conv1", x_BCYX, methods[name], graph="second_order")
        (expected,) = torch.autograd.grad(alone.map_BYX.square().sum(), weight)
        torch.testing.assert_close(slope, expected, rtol=1e-4, atol=1e-6 * float(expected.abs().max()))


def test_normal_difference_without_noise_is_minus_the_sum_of_means(vae, x_BCYX):
    """As its docstring derives; checked through a distribution without variance."""

    def encode(x):
        return vae.encode(x)[0], torch.full((len(x), 6), -1e9)

    normal = (torch.ones(6), torch.full((6,), -1e9))
    layer = vae.encoder.conv2
    difference = Method(score="normal_difference", channels="abs_of_sum")
    result = attention(encode, layer, x_BCYX, difference, normal=normal, generator=torch.Generator())
    summed = attention(encode, layer, x_BCYX, Method(score="sum_of_means", channels="abs_of_sum"))
    torch.testing.assert_close(result.alpha_BIC, -summed.alpha_BIC)
    torch.testing.assert_close(result.map_BYX, summed.map_BYX)
    torch.testing.assert_close(result.latents_BD, 1 - vae.encode(x_BCYX)[0].detach())


def test_chosen_latents_come_in_the_order_asked_for(vae, x_BCYX):
    everything = attention(vae.encode, "encoder.conv1", x_BCYX)
    some = attention(vae.encode, "encoder.conv1", x_BCYX, latents=[4, 1])
    torch.testing.assert_close(some.map_BIYX, everything.map_BIYX[:, [4, 1]], rtol=1e-4, atol=1e-9)
    assert some.latents_BD.shape == (3, 6)
    for same in (torch.tensor([4, 1]), torch.tensor([4, 1], dtype=torch.uint8), (4, 1)):
        again = attention(vae.encode, "encoder.conv1", x_BCYX, latents=same)
        assert torch.equal(again.alpha_BIC, some.alpha_BIC)


def test_the_most_deviant_latent_is_one_of_those_chosen(vae, x_BCYX):
    """By a normal image whose variances make another latent of each choice the furthest."""
    mu_BI = vae.encode(x_BCYX)[0].detach()
    normal = (mu_BI.mean(0), torch.tensor([-2.0, 4.0, -2.0, 4.0, 0.0, 1.0]))
    deviation_BI = (mu_BI - normal[0]).abs() / (0.5 * normal[1]).exp()
    each = attention(vae.encode, "encoder.conv1", x_BCYX)
    for latents in (None, [1, 3, 5]):
        chosen = latents or list(range(6))
        furthest_B = torch.tensor(chosen)[deviation_BI[:, chosen].argmax(1)]
        result = attention(
            vae.encode, "encoder.conv1", x_BCYX, Method(score="most_deviant"), latents=latents, normal=normal
        )
        expected = torch.stack([map_IYX[i] for map_IYX, i in zip(each.map_BIYX, furthest_B, strict=True)])
        torch.testing.assert_close(result.map_BYX, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    "latents",
    [[6], [-1], [], [True, False, True, False, False, False], torch.ones(6).bool(), torch.tensor([1.0]), torch.eye(2)],
    ids=str,
)
def test_what_names_no_latent_is_refused(vae, x_BCYX, latents):
    with pytest.raises(ValueError, match=r"latents=\[.*\] must be one or more indices between 0 and 5"):
        attention(vae.encode, "encoder.conv1", x_BCYX, latents=latents)


def test_a_latent_is_named_once(vae, x_BCYX):
    with pytest.raises(ValueError, match=r"latents=\[2, 5, 2\] must be .*, each named once"):
        attention(vae.encode, "encoder.conv1", x_BCYX, latents=[2, 5, 2])


def test_finite_values_whose_sum_overflows_are_finite():
    identity = torch.nn.Conv2d(1, 1, kernel_size=1, bias=False)
    torch.nn.init.ones_(identity.weight)
    x_BCYX = torch.full((1, 1, 2, 2), 3e38)
    result = attention(lambda x: (identity(x) * 1e-30).mean((2, 3)), identity, x_BCYX)
    assert result.values_BCHW.sum().isinf()
    torch.testing.assert_close(result.map_BYX, torch.full((1, 2, 2), 3e38 * 1e-30 / 4))


def test_highest_responses_are_aggregated(vae, x_BCYX):
    for channels in ("relu_of_sum", "abs_of_sum"):
        everything = attention(vae.encode, "encoder.conv2", x_BCYX, Method(channels=channels))
        two = attention(vae.encode, "encoder.conv2", x_BCYX, Method(channels=channels, highest=2))
        for b in range(3):
            order = sorted(range(6), key=lambda i, b=b: -float(everything.map_BIHW[b, i].mean()))
            assert two.highest_BK(2)[b].tolist() == order[:2]
            torch.testing.assert_close(two.map_BYX[b], everything.map_BIYX[b, order[:2]].mean(0))
    with pytest.raises(ValueError, match="k=7 must lie between 1 and 6"):
        everything.highest_BK(7)


def test_after_the_activation_equals_the_activation_as_layer(vae, x_BCYX):
    after = attention(vae.encode, "encoder.conv2", x_BCYX, Method(tensor="after"))
    torch.testing.assert_close(after.map_BYX, attention(vae.encode, "encoder.relu2", x_BCYX).map_BYX)


@pytest.mark.parametrize(
    "activation",
    [
        nn.ReLU(True),
        nn.LeakyReLU(0.3),
        nn.LeakyReLU(0.3, True),
        nn.SiLU(),
        nn.GELU(),
        nn.GELU("tanh"),
        nn.Sigmoid(),
        nn.Tanh(),
    ],
)
def test_activations_are_found(activation):
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 3, 3)
    encode = nn.Sequential(conv, activation, nn.Flatten(), nn.Linear(3 * 36, 4))
    x_BCYX = torch.rand(2, 1, 8, 8)
    result = attention(encode, conv, x_BCYX, Method(tensor="after"))
    torch.testing.assert_close(result.values_BCHW, activation(conv(x_BCYX)).detach())
    alpha_IC = encode[3].weight.detach().reshape(4, 3, 36).mean(2)
    torch.testing.assert_close(result.alpha_BIC, alpha_IC.expand(2, 4, 3))


# --- properties -------------------------------------------------------------------------------------------------


def small_net(seed, channels=3, latents=4):
    torch.manual_seed(seed)
    conv = nn.Conv2d(2, channels, 3, padding=1)
    return nn.Sequential(
        conv, nn.ReLU(), nn.Conv2d(channels, 2, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 9, latents)
    )


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 99),
    b=st.integers(1, 4),
    preset=st.sampled_from(["liu2020_paper", "liu2020_code", "brongers2021"]),
    factor=st.floats(0.5, 8),
)
def test_shapes_scale_and_permutations(seed, b, preset, factor):
    net, x_BCYX = small_net(seed), torch.rand(b, 2, 7, 7, generator=torch.Generator().manual_seed(seed))
    result = attention(net, "0", x_BCYX, preset)
    i = 4 if PRESETS[preset].score == "each_mean" else 1
    assert result.alpha_BIC.shape == (b, i, 3)
    assert result.map_BIYX.shape == (b, i, 7, 7)
    assert result.map_BYX.shape == (b, 7, 7)
    assert (result.map_BIYX >= 0).all()

    def close(actual, expected):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5 * float(expected.max()) + 1e-12)

    # Images in another order have the same maps in that order, also where the batch normalises.
    order = torch.randperm(b, generator=torch.Generator().manual_seed(seed))
    close(attention(net, "0", x_BCYX[order], preset).map_BYX, result.map_BYX[order])
    # The order of the channels inside does not matter.
    with torch.no_grad():
        conv, after = net[0], net[2]
        conv.weight.copy_(conv.weight[[2, 0, 1]])
        conv.bias.copy_(conv.bias[[2, 0, 1]])
        after.weight.copy_(after.weight[:, [2, 0, 1]])
    close(attention(net, "0", x_BCYX, preset).map_BYX, result.map_BYX)
    # Latents in another unit have maps in that unit; a normaliser takes the unit away.
    with torch.no_grad():
        net[5].weight *= factor
    plain = Method(channels=PRESETS[preset].channels, score=PRESETS[preset].score)
    scaled = attention(net, "0", x_BCYX, plain).map_BYX
    with torch.no_grad():
        net[5].weight /= factor
    close(scaled, factor * attention(net, "0", x_BCYX, plain).map_BYX)


# --- differentiable maps ----------------------------------------------------------------------------------------


def overlap(result):
    """A loss on maps in the way of the attention disentanglement loss."""
    first, second = result.map_BIYX[:, 0], result.map_BIYX[:, 1]
    return (first * second).sum() + (first**2).sum()


def smooth_net():
    torch.manual_seed(0)
    layers = (nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Conv2d(3, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 2))
    return nn.Sequential(*layers).double()


@pytest.mark.parametrize("channels", ["relu_of_sum", "abs_of_sum", "mean_of_abs", "sum_of_relu"])
def test_second_order_gradient_equals_finite_differences(channels):
    net, x_BCYX = smooth_net(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    method = Method(channels=channels)
    overlap(attention(net, "0", x_BCYX, method, graph="second_order")).backward()
    for parameter in (net[0].weight, net[2].weight, net[5].weight):
        for index in (0, parameter.numel() // 2, parameter.numel() - 1):
            values = []
            for step in (1e-6, -2e-6):
                with torch.no_grad():
                    parameter.view(-1)[index] += step
                values.append(float(overlap(attention(net, "0", x_BCYX, method))))
            with torch.no_grad():
                parameter.view(-1)[index] += 1e-6
            slope = (values[0] - values[1]) / 2e-6
            assert float(parameter.grad.view(-1)[index]) == pytest.approx(slope, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("route", ["auto", "loop", "batched", "pooled"])
def test_constant_alpha_touches_the_layers_below_only(route):
    net, x_BCYX = smooth_net(), torch.rand(2, 1, 8, 8, dtype=torch.float64)
    result = attention(net, "0", x_BCYX, graph="constant_alpha", route=route)
    overlap(result).backward()
    assert {name for name, value in net.named_parameters() if value.grad is not None} == {"0.weight", "0.bias"}
    alpha = attention(net, "0", x_BCYX).alpha_BIC
    small = torch.einsum("bic,bchw->bihw", alpha, net[0](x_BCYX)).relu()
    first, second = upsample(small, (8, 8)).unbind(1)
    (expected,) = torch.autograd.grad((first * second).sum() + (first**2).sum(), net[0].weight)
    torch.testing.assert_close(net[0].weight.grad, expected)


def test_latents_share_the_graph_of_the_maps(vae, x_BCYX):
    result = attention(
        vae.encode,
        "encoder.conv1",
        x_BCYX,
        "brongers2021_disentanglement",
        latents=[0, 1],
        generator=torch.Generator().manual_seed(0),
        graph="second_order",
    )
    parameters = [vae.encoder.conv1.weight, vae.mu.weight]
    for loss in (overlap(result), result.latents_BD.square().sum(), result.encoded[1].sum()):
        assert torch.autograd.grad(loss, parameters[0], retain_graph=True)[0].abs().sum() > 0
    assert torch.autograd.grad(overlap(result), parameters[1], retain_graph=True)[0].abs().sum() > 0
    still = attention(vae.encode, "encoder.conv1", x_BCYX)
    assert not any(t.requires_grad for t in (still.map_BYX, still.latents_BD, *still.encoded))


# --- any model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("preset", ["liu2020_paper", "liu2020_code"])
def test_precisions(x_BCYX, dtype, preset):
    net = small_net(1)
    x_BCYX = torch.rand(2, 2, 7, 7, generator=torch.Generator().manual_seed(1))
    expected = attention(net, "0", x_BCYX, preset).map_BYX
    result = attention(net.to(dtype), "0", x_BCYX.to(dtype), preset).map_BYX
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    tolerance = {torch.float16: 0.01, torch.bfloat16: 0.08, torch.float64: 1e-4}[dtype]
    assert (result - expected).abs().max() < tolerance * expected.max()


class Residual(nn.Module):
    """A residual block with batch normalisation and activations in place, as in torchvision's ResNet."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1, self.bn1 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(4 * 64, 5)
        for bn in (self.bn1, self.bn2):
            bn.running_mean.uniform_(-1, 1)
            bn.running_var.uniform_(0.5, 2)

    def forward(self, x_BCYX):
        identity = self.stem(x_BCYX)
        hidden = self.relu(self.bn1(self.conv1(identity)))
        hidden = self.bn2(self.conv2(hidden))
        hidden += identity
        return self.head(self.relu(hidden).flatten(1))


@pytest.mark.parametrize(
    ("layer", "route"), [("stem", "pooled"), ("conv1", "pooled"), ("bn1", "pooled"), ("conv2", "pooled")]
)
def test_residual_block_one_image_at_a_time(layer, route):
    torch.manual_seed(0)
    net, x_BCYX = Residual().eval(), torch.rand(3, 1, 8, 8)
    result = attention(net, layer, x_BCYX)
    assert result.route == route
    for b, i in itertools.product(range(3), range(5)):
        kept = []
        module = net.get_submodule(layer)
        handle = module.register_forward_hook(lambda _m, _i, out, kept=kept: (kept.append(out), out.clone())[1])
        score = net(x_BCYX[[b]])[0, i]
        handle.remove()
        (gradient,) = torch.autograd.grad(score, kept[0])
        torch.testing.assert_close(result.alpha_BIC[b, i], gradient[0].mean((1, 2)), rtol=1e-4, atol=1e-7)


def test_batch_normalisation_in_training_mode_is_refused_and_left_alone():
    net = Residual()
    before = net.bn1.running_mean.clone()
    with pytest.raises(ValueError, match=r"put the model in evaluation mode first: model.eval\(\)"):
        attention(net, "conv2", torch.rand(3, 1, 8, 8))
    assert torch.equal(net.bn1.running_mean, before)
    assert net.training
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert attention(net.eval(), "conv2", torch.rand(1, 1, 8, 8)).map_BYX.shape == (1, 8, 8)


def test_model_is_left_as_found_when_it_raises(x_BCYX):
    vae = MNISTVAE(latent_dim=2)

    def encode(x):
        vae.encode(x)
        raise RuntimeError("from within")

    with pytest.raises(RuntimeError, match="from within"):
        attention(encode, vae.encoder.conv1, x_BCYX)
    assert not any(module._forward_hooks for module in vae.modules())
    assert not torch.nn.modules.module._global_forward_pre_hooks


def test_threads_do_not_see_each_other(x_BCYX):
    vae = MNISTVAE(latent_dim=6)
    training = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    expected = attention(vae.encode, "encoder.conv2", x_BCYX).map_BYX

    def explain(_turn):
        return attention(vae.encode, "encoder.conv2", x_BCYX).map_BYX

    def train(_turn):
        return training(x_BCYX)

    with ThreadPoolExecutor(4) as pool:
        maps = [pool.submit(step, turn) for turn in range(20) for step in (explain, explain, train)]
        results = [future.result() for future in maps]
    for map_BYX in (result for result in results if result.ndim == 3):
        torch.testing.assert_close(map_BYX, expected, rtol=1e-4, atol=1e-8)


def test_autocast_around_the_call_changes_the_encoder_alone(vae, x_BCYX):
    def encode(x):
        with torch.autocast("cpu", torch.bfloat16):
            return vae.encode(x)

    for preset in ("liu2020_paper", "liu2020_code", "brongers2021"):
        inside = attention(encode, vae.encoder.conv2, x_BCYX, preset)
        with torch.autocast("cpu", torch.bfloat16):
            around = attention(vae.encode, "encoder.conv2", x_BCYX, preset)
            map_BYX = around.map_BYX
        assert map_BYX.dtype == around.alpha_BIC.dtype == torch.float32
        torch.testing.assert_close(map_BYX, inside.map_BYX)


def test_activation_after_flattening():
    torch.manual_seed(0)
    conv, head = nn.Conv2d(1, 3, 3), nn.Linear(3 * 36, 4)
    flat = nn.Sequential(conv, nn.Flatten(), nn.ReLU(), head)
    deep = nn.Sequential(conv, nn.ReLU(), nn.Flatten(), head)
    x_BCYX = torch.rand(2, 1, 8, 8)
    for tensor, normaliser in itertools.product(("before", "after", "mixed"), ("none", "image")):
        method = Method(tensor=tensor, normaliser=normaliser)
        maps = [attention(net, conv, x_BCYX, method).map_BYX for net in (flat, deep)]
        torch.testing.assert_close(*maps)


def test_second_order_where_a_score_has_no_gradient():
    net = smooth_net()
    nn.init.zeros_(net[5].weight[0])
    method = Method(normaliser="batch")
    overlap(attention(net, "0", torch.rand(2, 1, 8, 8, dtype=torch.float64), method, graph="second_order")).backward()
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in net.parameters())


def test_tiny_variances_keep_a_gradient(vae, x_BCYX):
    def encode(x):
        mu, logvar = vae.encode(x)
        return mu, logvar - 200

    method = Method(score="normal_difference")
    normal, generator = (torch.zeros(6), torch.full((6,), -200.0)), torch.Generator().manual_seed(0)
    result = attention(encode, vae.encoder.conv2, x_BCYX, method, normal=normal, generator=generator)
    summed = attention(encode, vae.encoder.conv2, x_BCYX, Method(score="sum_of_means"))
    torch.testing.assert_close(result.alpha_BIC, -summed.alpha_BIC)


def test_what_is_kept_is_not_overwritten():
    torch.manual_seed(0)
    same, conv, head = nn.Identity(), nn.Conv2d(1, 3, 3), nn.Linear(3 * 36, 4)

    def encode(x):
        hidden = conv(x)
        kept = same(hidden)
        hidden.relu_()
        return head((kept + 0 * hidden).flatten(1))

    x_BCYX = torch.rand(2, 1, 8, 8)
    torch.testing.assert_close(attention(encode, same, x_BCYX).values_BCHW, conv(x_BCYX).detach())


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("graph", ["none", "constant_alpha"])
def test_frozen_model(x_BCYX, frozen, graph):
    net = MNISTVAE(latent_dim=6).requires_grad_(not frozen)
    expected = attention(net.encode, "encoder.conv2", x_BCYX, route="loop").map_BYX
    result = attention(net.encode, "encoder.conv2", x_BCYX, graph=graph)
    assert result.route == "pooled"
    torch.testing.assert_close(result.map_BYX.detach(), expected, rtol=1e-4, atol=1e-8)


def test_model_is_left_as_found(x_BCYX):
    vae = MNISTVAE(latent_dim=2)
    before = {name: value.clone() for name, value in vae.state_dict().items()}
    attention(vae.encode, "encoder.conv1", x_BCYX)
    with pytest.raises(ValueError, match="not finite"):
        attention(vae.encode, "encoder.conv1", x_BCYX * float("nan"))
    assert all(parameter.grad is None for parameter in vae.parameters())
    assert all(module.training and not module._forward_hooks for module in vae.modules())
    assert all(torch.equal(value, before[name]) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("without_grad", [torch.no_grad, torch.inference_mode])
def test_works_without_grad(without_grad):
    tiny = Tiny()
    with without_grad():
        torch.testing.assert_close(attention(tiny, "conv", X.clone()).alpha_BIC, ALPHA)


def test_layer_as_module_and_encoder_as_function():
    tiny = Tiny()
    torch.testing.assert_close(attention(lambda x: tiny(x), tiny.conv, X).alpha_BIC, ALPHA)


@dataclasses.dataclass
class Posterior:
    """What an encoder may put out; its means need not come first."""

    logvar: torch.Tensor | None
    mean: torch.Tensor


POSTERIORS = {
    "tuple": lambda mu, logvar: (mu, logvar),
    "list": lambda mu, logvar: [mu, logvar, "more"],
    "dict": lambda mu, logvar: {"log_var": logvar, "mu": mu},
    "dataclass": lambda mu, logvar: Posterior(logvar, mu),
    "Normal": lambda mu, logvar: torch.distributions.Normal(mu, (0.5 * logvar).exp()),
    "Independent": lambda mu, logvar: torch.distributions.Independent(
        torch.distributions.Normal(mu, (0.5 * logvar).exp()), 1
    ),
}


@pytest.mark.parametrize("kind", POSTERIORS)
@pytest.mark.parametrize("preset", ["liu2020_paper", "brongers2021_disentanglement"])
def test_the_encoder_may_put_out_its_posterior_in_any_usual_form(vae, x_BCYX, kind, preset):
    def maps(encode):
        return attention(encode, vae.encoder.conv2, x_BCYX, preset, generator=torch.Generator().manual_seed(2))

    found, expected = maps(lambda x: POSTERIORS[kind](*vae.encode(x))), maps(vae.encode)
    torch.testing.assert_close(found.map_BIYX, expected.map_BIYX)
    torch.testing.assert_close(found.encoded[:2], expected.encoded)


def test_means_alone_do_where_nothing_is_sampled(vae, x_BCYX):
    expected = attention(vae.encode, "encoder.conv2", x_BCYX).map_BYX
    for output in (lambda mu: mu, lambda mu: (mu,), lambda mu: {"loc": mu}, lambda mu: Posterior(None, mu)):
        encode = lambda x, o=output: o(vae.encode(x)[0])  # noqa: E731
        torch.testing.assert_close(attention(encode, vae.encoder.conv2, x_BCYX).map_BYX, expected)
        with pytest.raises(ValueError, match=r"needs an encoder that gives \(mu, logvar\)"):
            attention(encode, vae.encoder.conv2, x_BCYX, Method(score="each_sample"), generator=torch.Generator())


def test_errors(vae, x_BCYX):
    with pytest.raises(
        ValueError, match=r"'conv9' is unknown; convolutions of this model: encoder.conv1, encoder.conv2"
    ):
        attention(vae.encode, "conv9", x_BCYX)
    for unknown in ("gradcam", {"first": "liu2020_code", "second": "gradcam"}):
        with pytest.raises(
            ValueError, match="'gradcam' is unknown; choose one of: liu2020_paper, liu2020_code, brongers2021"
        ):
            attention(vae.encode, "encoder.conv1", x_BCYX, unknown)
    with pytest.raises(ValueError, match="is not reached"):
        attention(vae.encode, "decoder.deconv1", x_BCYX)
    with pytest.raises(TypeError, match="encode is no module"):
        attention(lambda x: x, "conv", x_BCYX)
    with pytest.raises(ValueError, match=r"'mu' puts out \[3, 6\]"):
        attention(vae.encode, "mu", x_BCYX)
    with pytest.raises(ValueError, match="x_BCYX must hold at least one image"):
        attention(vae.encode, "encoder.conv1", x_BCYX[:0])
    with pytest.raises(ValueError, match="highest=7 is more than the 6 scores"):
        attention(vae.encode, "encoder.conv1", x_BCYX, Method(highest=7))
    for output, got in (
        (lambda mu: {"latents": mu}, "dict"),
        (lambda mu: {"mu": mu[:, 0]}, r"\[3\]"),
        (lambda mu: torch.distributions.Laplace(mu, 1), "Laplace"),
        (lambda mu: torch.distributions.Normal(mu[..., None], 1), r"\[3, 6, 1\]"),
        (lambda mu: mu[:, 0], r"\[3\]"),
        (lambda mu: [mu[..., None]], r"\[3, 6, 1\]"),
        (lambda mu: (), "tuple"),
        (lambda mu: None, "NoneType"),
    ):
        with pytest.raises(TypeError, match=rf"encode must put out latents \[B, D\].*got {got}: wrap it"):
            attention(lambda x, o=output: o(vae.encode(x)[0]), vae.encoder.conv1, x_BCYX)
    tiny = Tiny()
    with pytest.raises(ValueError, match="is reached 2 times"):
        attention(lambda x: tiny(x) + tiny(x), tiny.conv, X)
    with pytest.raises(ValueError, match="do not depend"):
        attention(lambda x: (tiny(x) * 0).detach() + tiny.head.weight.sum(), tiny.conv, X)
    with pytest.raises(ValueError, match="not finite"):
        attention(tiny, "conv", X * float("inf"))
    with pytest.raises(ValueError, match="route='fast' is unknown; choose one of: auto, loop, batched, pooled"):
        attention(tiny, "conv", X, route="fast")
    with pytest.raises(ValueError, match="graph='all' is unknown; choose one of: none, constant_alpha, second_order"):
        attention(tiny, "conv", X, graph="all")
    wrong = Method()
    object.__setattr__(wrong, "channels", "max")  # the type checker of the tests would be first to refuse it
    with pytest.raises(ValueError, match="channels='max' is unknown; choose one of: relu_of_sum, abs_of_sum"):
        wrong.__post_init__()
    with pytest.raises(ValueError, match="highest=0 must be 1 or more"):
        Method(highest=0)
    with pytest.raises(ValueError, match="score='each_sample' needs an encoder that gives"):
        attention(tiny, "conv", X, "brongers2021_disentanglement", generator=torch.Generator())
    with pytest.raises(ValueError, match="score='each_sample' draws samples; give generator="):
        attention(vae.encode, "encoder.conv1", x_BCYX, Method(score="each_sample"))
    with pytest.raises(ValueError, match="needs normal="):
        attention(vae.encode, "encoder.conv1", x_BCYX, Method(score="normal_difference"), generator=torch.Generator())
    with pytest.raises(ValueError, match="score='most_deviant' needs normal="):
        attention(vae.encode, "encoder.conv1", x_BCYX, Method(score="most_deviant"))
    with pytest.raises(ValueError, match=r"no activation \(Relu, .*\) follows it directly"):
        attention(vae.encode, "encoder.relu1", x_BCYX, Method(tensor="after"))
    with pytest.raises(ValueError, match="route='pooled' needs no normaliser"):
        attention(vae.encode, "encoder.conv1", x_BCYX, "liu2020_code", route="pooled")
    with pytest.raises(ValueError, match="route='batched' keeps no second-order graph"):
        attention(vae.encode, "encoder.conv1", x_BCYX, graph="second_order", route="batched")
