import math
import shutil
from collections import OrderedDict
from contextlib import nullcontext
from dataclasses import replace
from itertools import combinations, pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from expvae import Method, attention, discriminator_loss, overlap, permute_latents, total_correlation
from expvae.models import DSPRITES_LAYERS, DSpritesVAE
from expvae_book import checkpoints, disentanglement, factorvae, factorvae_losses, weights
from expvae_book.checkpoints import TrainingDivergedError
from expvae_book.data import dsprites
from expvae_book.factorvae import Candidate
from expvae_book.factorvae_losses import VARIANTS, AttentionPenalty
from expvae_book.recipes import StepRecipe
from expvae_book.training import build

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
LATENTS = 4
RECIPE = StepRecipe(source="test", steps=0, batch_size=8, learning_rate=1e-4, latent_dim=LATENTS)
TRAIN_N = torch.arange(0, dsprites.COUNT, 97)
AD = {"beta": 2.0, "gamma": 3.0, "attention_weight": 1.0}
EVERY_PENALTY = {
    **VARIANTS,
    "all": AttentionPenalty(pairs="all", maps=3, layer="conv3"),
    "constant": AttentionPenalty(alpha="constant", enlarged=True),
    "sampled": AttentionPenalty(method=Method(score="each_sample", channels="sum_of_relu"), maps=3, layer="conv2"),
}


class NarrowVAE(DSpritesVAE):
    """The same layers with an eighth of the channels: what is tested does not depend on how many there are."""

    def __init__(self, latent_dim):
        super().__init__(latent_dim)
        self.encoder, self.decoder = narrowed(self.encoder), narrowed(self.decoder)


def narrowed(network):
    layers = OrderedDict(network.named_children())
    for name, layer in layers.items():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            inputs, outputs = (n if n < 32 else n // 8 for n in (layer.in_channels, layer.out_channels))
            layers[name] = type(layer)(inputs, outputs, layer.kernel_size, layer.stride, layer.padding)
    return nn.Sequential(layers)


def narrow_discriminator(latent_dim):
    layers = OrderedDict(linear1=nn.Linear(latent_dim, 16), relu1=nn.LeakyReLU(0.2), linear2=nn.Linear(16, 2))
    return nn.Sequential(layers)


@pytest.fixture(scope="module")
def sprites():
    return dsprites.sample()


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def float64(monkeypatch):
    """Networks, noise and losses in float64, where rounding stays far below what is compared."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    yield
    torch.set_default_dtype(before)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    monkeypatch.setattr(factorvae, "DSpritesVAE", NarrowVAE)
    monkeypatch.setattr(factorvae, "discriminator", narrow_discriminator)


@pytest.fixture
def wide(narrow, monkeypatch):
    """The VAE itself."""
    monkeypatch.setattr(factorvae, "DSpritesVAE", DSpritesVAE)


def train(candidates, draw, recipe=RECIPE, **options):
    options = {"steps": 12, "device": CPU, "data_digest": "test", "progress": False} | options
    return factorvae.train(candidates, draw, TRAIN_N, recipe, **options)


def assert_same_model(ours, theirs):
    for network, other in [(ours.vae, theirs.vae), (ours.discriminator, theirs.discriminator)]:
        for (name, value), other_value in zip(network.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(value, other_value), name


def curves(trained):
    return {name: value for name, value in vars(trained.curves).items() if name not in ("seconds", "beside")}


# --- the parts of the loss -------------------------------------------------------------------------------------------


def slow_ratio(first, second):
    """The AD ratio of two maps, pixel by pixel."""
    smaller, total = 0.0, 0.0
    for a, b in zip(first.flatten().tolist(), second.flatten().tolist(), strict=True):
        smaller += min(a, b)
        total += a + b
    return 2 * smaller / total if total else 0.0


def test_overlap_equals_a_slow_loop():
    first, second = torch.randn(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0)).relu().double()
    expected = [[slow_ratio(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(first, second, strict=True)]
    torch.testing.assert_close(overlap(first, second), torch.tensor(expected, dtype=torch.float64))


def test_limits_of_the_overlap():
    one = torch.tensor([[2.0, 1.0], [0.0, 0.0]])
    other = torch.tensor([[0.0, 0.0], [3.0, 0.0]])
    nothing = torch.zeros(2, 2, requires_grad=True)
    assert overlap(one, one).item() == 1
    assert overlap(one, other).item() == 0
    assert overlap(one, 3 * one).item() == pytest.approx(0.5)
    ratio = overlap(nothing, nothing)
    assert ratio.item() == 0
    assert torch.autograd.grad(ratio, nothing)[0].isfinite().all()


def test_total_correlation_is_the_difference_of_the_log_probabilities():
    logits_MB2 = 3 * torch.randn(3, 50, 2, generator=torch.Generator().manual_seed(0)).double()
    log_MB2 = logits_MB2.log_softmax(2)
    expected_M = (log_MB2[..., 0] - log_MB2[..., 1]).mean(1)
    torch.testing.assert_close(total_correlation(logits_MB2), expected_M, rtol=1e-12, atol=1e-12)


def test_total_correlation_of_an_ideal_discriminator_is_that_of_the_normal_distribution():
    rho, noise = 0.8, torch.randn(200_000, 2, generator=torch.Generator().manual_seed(0))
    z_BI = torch.stack([noise[:, 0], rho * noise[:, 0] + math.sqrt(1 - rho**2) * noise[:, 1]], 1)
    expected = -0.5 * math.log(1 - rho**2)
    x_B, y_B = z_BI.unbind(1)
    joint_B = expected - (x_B**2 - 2 * rho * x_B * y_B + y_B**2) / (2 * (1 - rho**2))
    logits_1B2 = torch.stack([joint_B, -z_BI.square().sum(1) / 2], 1)[None]
    assert total_correlation(logits_1B2).item() == pytest.approx(expected, abs=0.01)


def test_discriminator_loss_is_the_cross_entropy_of_both_classes():
    generator = torch.Generator().manual_seed(0)
    joint_MB2, permuted_MB2 = 3 * torch.randn(2, 3, 50, 2, generator=generator).double()
    expected = [
        0.5 * (F.cross_entropy(joint, torch.zeros(50).long()) + F.cross_entropy(permuted, torch.ones(50).long()))
        for joint, permuted in zip(joint_MB2, permuted_MB2, strict=True)
    ]
    found_M = discriminator_loss(joint_MB2, permuted_MB2)
    torch.testing.assert_close(found_M, torch.stack(expected), rtol=1e-12, atol=0)


def test_permuted_latents_keep_their_values_and_lose_their_partners():
    generator = torch.Generator().manual_seed(0)
    image_B = torch.arange(500.0)
    z_MBI = torch.stack([image_B, image_B + 1000, image_B + 2000], 1).expand(2, -1, -1)
    order_MBI = torch.rand(2, 500, 3, generator=generator).argsort(1)
    permuted_MBI = permute_latents(z_MBI, order_MBI)
    assert torch.equal(permuted_MBI.sort(1).values, z_MBI)
    for m in range(2):
        for i in range(3):
            assert permuted_MBI[m, :, i].tolist() == [z_MBI[m, b, i].item() for b in order_MBI[m, :, i].tolist()]
    images_MBI = permuted_MBI - 1000 * torch.arange(3)
    together = torch.stack([images_MBI[..., i] == images_MBI[..., j] for i, j in combinations(range(3), 2)])
    assert together.float().mean() < 0.02  # by chance, one pair of 500
    assert (images_MBI[0] == images_MBI[1]).float().mean() < 0.02


# --- maps and their overlap ------------------------------------------------------------------------------------------


def group_of(candidates, recipe=RECIPE):
    return factorvae.Group(candidates, recipe, CPU)


def pair_of_models(sprites, penalty, images=3):
    """Two models side by side, and their images, noise and random pairs."""
    group = group_of([Candidate(attention_weight=1.0, penalty=penalty, seed=seed) for seed in range(2)])
    with torch.no_grad():
        for name, value in group.encoder.weights.items():
            value.mul_(2 if name.endswith("weight") else 1)  # or else many initial maps are zero
    x_BMYX = sprites.images(torch.arange(2 * images) * 70_001).float().view(images, 2, 64, 64)
    noise_MBI = torch.stack(
        [torch.randn(images, LATENTS, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    )
    return group, x_BMYX, noise_MBI, torch.tensor([[0, 1], [3, 1]])


def slow_attention_loss(vae, x_BCYX, noise_BI, penalty, pair, graph="none"):
    """L_AD of one model, image by image, from the maps of expvae.attention and by 2 min(a, b) = a + b - |a - b|."""

    def encode(x_BCYX):
        mu_BI, logvar_BI = vae.encode(x_BCYX)
        return mu_BI if penalty.method.score == "each_mean" else mu_BI + (logvar_BI / 2).exp() * noise_BI

    found = attention(
        encode,
        vae.encoder.get_submodule(penalty.layer),
        x_BCYX,
        replace(penalty.method, score="each_mean"),
        graph=graph,
    )
    maps = found.map_BIYX if penalty.enlarged else found.map_BIHW
    ratios = []
    for b in range(len(x_BCYX)):
        chosen = pair if penalty.pairs == "random" else found.highest_BK(penalty.maps)[b].tolist()
        pairs = list(combinations(chosen, 2)) if penalty.pairs == "all" else list(pairwise(chosen))
        for i, j in pairs:
            total = (maps[b, i] + maps[b, j]).sum()
            apart = (maps[b, i] - maps[b, j]).abs().sum()
            ratios.append(1 - apart / total if total > 0 else total)
    loss = torch.stack(ratios).mean()
    return loss / len(x_BCYX) if penalty.per_batch else loss


@pytest.mark.parametrize("name", EVERY_PENALTY)
@pytest.mark.parametrize("graph", [False, True])
def test_maps_are_those_of_attention_on_each_model_alone(name, graph, sprites, float64):
    penalty = EVERY_PENALTY[name]
    group, x_BMYX, noise_MBI, _ = pair_of_models(sprites, penalty)
    A_BMCHW, mu_MBI, _, z_MBI = factorvae._encoded(group, x_BMYX, noise_MBI, penalty.layer)
    latents_MBI = mu_MBI if penalty.method.score == "each_mean" else z_MBI
    maps_MBIHW = factorvae_losses.attention_maps(A_BMCHW, latents_MBI, penalty, graph)
    for m in range(2):
        vae, generator = group.vae(m), torch.Generator().manual_seed(m)
        alone = attention(
            vae.encode, f"encoder.{penalty.layer}", x_BMYX[:, m : m + 1], penalty.method, generator=generator
        )
        torch.testing.assert_close(latents_MBI[m], alone.latents_BD, rtol=1e-12, atol=1e-14)
        scale = alone.map_BIHW.max().item()
        assert scale > 0
        torch.testing.assert_close(maps_MBIHW[m], alone.map_BIHW, rtol=1e-10, atol=1e-12 * scale)


@pytest.mark.parametrize(
    ("pairs", "maps"),
    [("consecutive", 2), ("consecutive", 3), ("consecutive", LATENTS), ("all", 3), ("all", LATENTS), ("random", 2)],
)
@pytest.mark.parametrize("name", EVERY_PENALTY)
def test_attention_loss_equals_a_loop_over_images(name, pairs, maps, sprites, float64):
    penalty = replace(EVERY_PENALTY[name], pairs=pairs, maps=maps)
    group, x_BMYX, noise_MBI, random_M2 = pair_of_models(sprites, penalty)
    A_BMCHW, mu_MBI, _, z_MBI = factorvae._encoded(group, x_BMYX, noise_MBI, penalty.layer)
    found_M = factorvae_losses.attention_loss(A_BMCHW, mu_MBI, z_MBI, penalty, random_M2)
    expected = [
        slow_attention_loss(group.vae(m), x_BMYX[:, m : m + 1], noise_MBI[m], penalty, random_M2[m].tolist()).item()
        for m in range(2)
    ]
    assert min(expected) > 0
    assert found_M.tolist() == pytest.approx(expected, rel=1e-9)


def test_per_batch_divides_by_the_number_of_images_once_more(sprites, float64):
    values = []
    for per_batch in (False, True):
        penalty = replace(VARIANTS["report2"], per_batch=per_batch)
        group, x_BMYX, noise_MBI, random_M2 = pair_of_models(sprites, penalty, images=5)
        A_BMCHW, mu_MBI, _, z_MBI = factorvae._encoded(group, x_BMYX, noise_MBI, penalty.layer)
        values.append(factorvae_losses.attention_loss(A_BMCHW, mu_MBI, z_MBI, penalty, random_M2))
    torch.testing.assert_close(values[1], values[0] / 5, rtol=1e-14, atol=0)


def test_the_same_latent_twice_overlaps_wholly(sprites, float64):
    penalty = VARIANTS["brongers2021"]
    group, x_BMYX, noise_MBI, _ = pair_of_models(sprites, penalty)
    A_BMCHW, mu_MBI, _, z_MBI = factorvae._encoded(group, x_BMYX, noise_MBI, penalty.layer)
    found_M = factorvae_losses.attention_loss(A_BMCHW, mu_MBI, z_MBI, penalty, torch.tensor([[1, 1], [1, 2]])) * 3
    assert found_M[0].item() == pytest.approx(1)
    assert found_M[1].item() < 0.99


# --- the gradient of the attention loss ------------------------------------------------------------------------------

ALL_PAIRS = AttentionPenalty(pairs="all", maps=LATENTS)  # nothing that switches as parameters move a little
RANDOM_PAIR = replace(VARIANTS["brongers2021"], alpha="second_order")


def attention_loss_of(group, x_BMYX, noise_MBI, random_M2):
    """L_AD of all models together, as a function of the parameters that the group holds."""
    penalty = group.candidates[0].penalty
    A_BMCHW, mu_MBI, _, z_MBI = factorvae._encoded(group, x_BMYX, noise_MBI, penalty.layer)
    return factorvae_losses.attention_loss(A_BMCHW, mu_MBI, z_MBI, penalty, random_M2).sum()


def gradients(loss, group):
    """By name; zeros where the loss does not depend on a parameter."""
    found = torch.autograd.grad(loss, list(group.encoder.weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(group.encoder.weights, found, strict=True))


def slope(function, parameter, direction, h=1e-7):
    """Central difference of a function of nothing along a direction of a parameter, which is put back.

    So short a way, in float64, passes none of the places where a ReLU switches; where one did, α would jump.
    """
    start, values = parameter.detach().clone(), []
    with torch.no_grad():
        for sign in (1, -1):
            parameter.copy_(start + sign * h * direction)
            with torch.enable_grad():
                values.append(function().item())
        parameter.copy_(start)
    return (values[0] - values[1]) / (2 * h)


@pytest.mark.parametrize(
    ("penalty", "names"),
    [
        (ALL_PAIRS, ["conv1_weight", "conv1_bias", "conv4_weight", "conv4_bias", "conv5_weight", "posterior_weight"]),
        (replace(ALL_PAIRS, layer="conv2", enlarged=True), ["conv1_weight", "conv3_weight", "posterior_weight"]),
        (
            replace(ALL_PAIRS, layer="conv5", method=Method(channels="sum_of_relu")),
            ["conv4_weight", "conv5_bias", "posterior_weight"],
        ),
        (RANDOM_PAIR, ["conv1_weight", "conv2_weight", "conv4_weight", "posterior_weight", "posterior_bias"]),
    ],
)
def test_second_order_gradient_equals_finite_differences(penalty, names, sprites, float64):
    group, *given = pair_of_models(sprites, penalty, images=2)
    found = gradients(attention_loss_of(group, *given), group)
    generator = torch.Generator().manual_seed(0)
    for name in names:
        parameter = group.encoder.weights[name]
        assert found[name].abs().max() > 0, name
        for _ in range(2):
            direction = torch.randn(parameter.shape, generator=generator)
            direction /= direction.norm()
            expected = slope(lambda: attention_loss_of(group, *given), parameter, direction)
            largest = found[name].norm().item()
            assert (found[name] * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-6 * largest), name


@pytest.mark.parametrize(
    ("name", "alpha", "moved"),
    [
        ("brongers2021", "constant", ["conv1_weight", "conv1_bias"]),
        ("liu2020", "constant", [f"conv{n}_{part}" for n in range(1, 5) for part in ("weight", "bias")]),
        (
            "liu2020",
            "second_order",
            [
                *[f"conv{n}_{part}" for n in range(1, 5) for part in ("weight", "bias")],
                "conv5_weight",
                "posterior_weight",
            ],
        ),
        (
            "brongers2021",
            "second_order",
            # Samples depend on the variance, and its gradient on the bias and on all before it.
            [f"{layer}_{part}" for layer in (*DSPRITES_LAYERS, "posterior") for part in ("weight", "bias")],
        ),
    ],
)
def test_what_the_attention_loss_moves(name, alpha, moved, sprites, float64):
    group, *given = pair_of_models(sprites, replace(VARIANTS[name], alpha=alpha))
    found = gradients(attention_loss_of(group, *given), group)
    assert [key for key, gradient in found.items() if gradient.abs().max() > 0] == moved
    decoder = torch.autograd.grad(attention_loss_of(group, *given), list(group.decoder.parameters()), allow_unused=True)
    assert decoder == (None,) * len(decoder)


def test_constant_alpha_at_conv1_moves_the_544_parameters_of_conv1(sprites, float64, wide):
    penalty = VARIANTS["brongers2021"]
    group, x_BMYX, noise_MBI, random_M2 = pair_of_models(sprites, penalty)
    parameters = list(group.encoder.weights.values())
    found = torch.autograd.grad(attention_loss_of(group, x_BMYX, noise_MBI, random_M2), parameters, allow_unused=True)
    reached = {key: value for key, value in zip(group.encoder.weights, found, strict=True) if value is not None}
    assert list(reached) == ["conv1_weight", "conv1_bias"]
    assert sum(value[: len(value) // 2].numel() for value in reached.values()) == 544
    for m in range(2):
        # The same with α frozen where it was: Σ_c ReLU(α_c ReLU(A_c)), enlarged, compared and divided by B.
        vae, x_BCYX = group.vae(m), x_BMYX[:, m : m + 1]
        frozen = attention(
            vae.encode, vae.encoder.conv1, x_BCYX, penalty.method, generator=torch.Generator().manual_seed(m)
        )
        alpha_BKC11 = frozen.alpha_BIC[:, random_M2[m], :, None, None]

        def loss(vae=vae, x_BCYX=x_BCYX, alpha_BKC11=alpha_BKC11):
            A_B1CHW = vae.encoder.conv1(x_BCYX).relu().unsqueeze(1)
            maps_BKHW = (alpha_BKC11 * A_B1CHW).relu().sum(2)
            a, b = F.interpolate(maps_BKHW, size=64, mode="bilinear", align_corners=True).unbind(1)
            return (1 - (a - b).abs().sum((1, 2)) / (a + b).sum((1, 2))).mean() / len(x_BCYX)

        alone = group.encoder.alone(m)
        for name, parameter in vae.encoder.conv1.named_parameters():
            assert torch.equal(alone[f"conv1.{name}"], parameter)
            gradient = reached[f"conv1_{name}"].chunk(2)[m]
            generator = torch.Generator().manual_seed(m)
            for _ in range(3):
                direction = torch.randn(parameter.shape, generator=generator)
                direction /= direction.norm()
                expected = slope(loss, parameter, direction)
                along = (gradient * direction).sum().item()
                assert along == pytest.approx(expected, rel=1e-5, abs=1e-6 * gradient.norm().item()), name


# --- one step --------------------------------------------------------------------------------------------------------


def plain_loop(candidate, draw, steps):
    """The same training of one model in plain PyTorch: its VAE, its discriminator and the parts of each step."""
    vae = build(lambda: NarrowVAE(LATENTS), candidate.seed)
    critic = build(lambda: narrow_discriminator(LATENTS), candidate.seed)
    adam = torch.optim.Adam(vae.parameters(), RECIPE.learning_rate, (0.9, 0.999), fused=False, foreach=False)
    critic_adam = torch.optim.Adam(critic.parameters(), 1e-4, (0.5, 0.9), fused=False, foreach=False)
    generator, size, history = torch.Generator().manual_seed(candidate.seed), RECIPE.batch_size, []
    classes = torch.arange(2)[:, None].expand(2, size)
    for _ in range(steps):
        chosen = TRAIN_N[torch.randint(len(TRAIN_N), (2 * size,), generator=generator)]
        noise = torch.randn(2, size, LATENTS, generator=generator)
        order = torch.rand(size, LATENTS, generator=generator).argsort(0)
        pair = torch.randint(LATENTS, (2,), generator=generator).tolist()
        x, other = draw(chosen).double().split(size)

        mu, logvar = vae.encode(x)
        posterior = torch.distributions.Normal(mu, (logvar / 2).exp())
        z = mu + posterior.scale * noise[0]
        parts = {
            "reconstruction": F.binary_cross_entropy(vae.decode(z).sigmoid(), x, reduction="sum") / size,
            "kl": torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).sum() / size,
        }
        loss = parts["reconstruction"] + candidate.beta * parts["kl"]
        if candidate.gamma:
            log_D = critic(z).log_softmax(1)
            parts["total_correlation"] = (log_D[:, 0] - log_D[:, 1]).mean()
            loss = loss + candidate.gamma * parts["total_correlation"]
            other_mu, other_logvar = vae.encode(other)
            other_z = (other_mu + (other_logvar / 2).exp() * noise[1]).detach()
            permuted = torch.stack([other_z[order[:, i], i] for i in range(LATENTS)], 1)
            joint = critic(z.detach() if candidate.detached else z)
            parts["discriminator"] = (
                F.cross_entropy(joint, classes[0]) + F.cross_entropy(critic(permuted), classes[1])
            ) / 2
        if candidate.attention_weight:
            graph = {"constant": "constant_alpha"}.get(candidate.penalty.alpha, candidate.penalty.alpha)
            parts["attention"] = slow_attention_loss(vae, x, noise[0], candidate.penalty, pair, graph)
            loss = loss + candidate.attention_weight * parts["attention"]

        adam.zero_grad()
        loss.backward(retain_graph=True)
        critic_adam.zero_grad()
        if candidate.gamma:
            parts["discriminator"].backward()  # undetached, it adds to the gradient of the VAE
            critic_adam.step()
        adam.step()
        history.append({name: part.item() for name, part in parts.items()})
    return vae, critic, history


@pytest.mark.parametrize(
    "candidate",
    [
        Candidate(beta=4.0),
        Candidate(gamma=10.0, seed=1),
        Candidate(gamma=10.0, seed=1, detached=False),
        *[Candidate(**AD, penalty=penalty) for penalty in EVERY_PENALTY.values()],
        Candidate(attention_weight=100.0, penalty=replace(VARIANTS["liu2020"], alpha="constant")),
    ],
    ids=lambda candidate: f"{candidate.gamma:g}-{candidate.attention_weight:g}",
)
def test_steps_equal_those_of_a_plain_loop(candidate, sprites, float64):
    group = group_of([candidate])
    steps = [factorvae.step(group, sprites.images, TRAIN_N, RECIPE.batch_size, "float32") for _ in range(5)]
    vae, critic, history = plain_loop(candidate, sprites.images, 5)
    for found, expected in zip(steps, history, strict=True):
        assert {name: part.item() for name, part in found.items()} == pytest.approx(expected, rel=1e-9, abs=1e-12)
    for network, beside in [(vae.encoder, group.encoder), (vae.decoder, group.decoder), (critic, group.discriminator)]:
        for name, value in beside.alone(0).items():
            torch.testing.assert_close(value, network.get_parameter(name).detach(), rtol=0, atol=1e-10)


def test_gradients_reach_adam_in_the_layout_of_their_weights(sprites, monkeypatch):
    """On the CPU the fused Adam goes through memory and takes no notice of strides."""
    unlike, step = [], torch.optim.Adam.step

    def check(adam):
        for parameter in adam.param_groups[0]["params"]:
            if parameter.grad.stride() != parameter.stride():
                unlike.append(tuple(parameter.shape))
        return step(adam)

    monkeypatch.setattr(torch.optim.Adam, "step", check)
    for name in VARIANTS:
        group = group_of([Candidate(**AD, seed=seed, penalty=VARIANTS[name]) for seed in range(2)])
        factorvae.step(group, sprites.images, TRAIN_N, 4, "float32")
    assert unlike == []


def test_an_attached_discriminator_adds_its_gradient_through_the_latents(sprites, float64, monkeypatch):
    seen = []
    monkeypatch.setattr(factorvae, "_apply", lambda optimizer, given: seen.append(list(given)))
    candidate = Candidate(gamma=5.0, seed=3)
    for detached in (True, False):
        group = group_of([replace(candidate, detached=detached)])
        factorvae.step(group, sprites.images, TRAIN_N, RECIPE.batch_size, "float32")
    critic, kept, attached_critic, attached = seen
    names = [f"{part}.{name}" for part in ("encoder", "decoder") for name in getattr(group, part).alone(0)]

    vae = build(lambda: NarrowVAE(LATENTS), 3)
    network = build(lambda: narrow_discriminator(LATENTS), 3)
    generator = torch.Generator().manual_seed(3)
    chosen = TRAIN_N[torch.randint(len(TRAIN_N), (16,), generator=generator)][:8]
    mu, logvar = vae.encode(sprites.images(chosen).double())
    z = mu + (logvar / 2).exp() * torch.randn(2, 8, LATENTS, generator=generator)[0]
    (0.5 * F.cross_entropy(network(z), torch.zeros(8).long())).backward()
    for name, without, with_leak in zip(names, kept, attached, strict=True):
        leak = vae.get_parameter(name).grad
        if leak is None:
            assert name.startswith("decoder.")
            assert torch.equal(without, with_leak)
        else:
            assert leak.abs().max() > 0
            torch.testing.assert_close(with_leak - without, leak, rtol=1e-7, atol=1e-11)
    for without, with_leak in zip(critic, attached_critic, strict=True):
        assert torch.equal(without, with_leak)


# --- side by side ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("weight", "name"), [(0.0, "liu2020"), (1.0, "report2"), (20.0, "brongers2021")])
def test_fifty_steps_side_by_side_equal_those_of_each_alone(weight, name, sprites, float64):
    options = {"attention_weight": weight, "penalty": VARIANTS[name]}
    candidates = [Candidate(beta=1.0, gamma=2.0, **options), Candidate(beta=4.0, gamma=40.0, seed=1, **options)]
    beside, alone = group_of(candidates), [group_of([one]) for one in candidates]
    start = beside.encoder.alone(0)
    for _ in range(50):
        together = factorvae.step(beside, sprites.images, TRAIN_N, 4, "float32")
        parts = [factorvae.step(one, sprites.images, TRAIN_N, 4, "float32") for one in alone]
        for part, part_M in together.items():
            assert part_M.tolist() == pytest.approx([one[part].item() for one in parts], rel=1e-9, abs=1e-12), part
    for m, one in enumerate(alone):
        for name, network in beside.named_children():
            expected = getattr(one, name).alone(0)
            for key, value in network.alone(m).items():
                torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-8)
    assert min((value - start[key]).abs().max() for key, value in beside.encoder.alone(0).items()) > 5e-4


def recorded(monkeypatch):
    """The parts of the loss of every step to come, in a list."""
    steps, step = [], factorvae.step

    def record(*arguments):
        steps.append(step(*arguments))
        return steps[-1]

    monkeypatch.setattr(factorvae, "step", record)
    return steps


def test_two_models_of_full_size_train_side_by_side_as_alone(sprites, wide, monkeypatch, tmp_path):
    """In float32, by `train`: to rounding, of which Adam makes a little more.

    A grouped convolution and a single one add in different orders. Adam divides a gradient by its own size: a weight
    whose gradient is nothing but rounding moves by up to the learning rate, 1e-4, either way in each step. A few
    weights may; nearly all differ by less than a tenth of one step, and what the models compute agrees.
    """
    candidates = [Candidate(**AD, seed=seed) for seed in range(2)]
    recipe = replace(RECIPE, batch_size=4)
    beside = train(candidates, sprites.images, recipe, steps=50)
    alone = []
    for one in candidates:
        monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / f"alone-{one.seed}"))
        alone += train([one], sprites.images, recipe, steps=50)
    x_BCYX = sprites.images(torch.arange(16) * 40_001).float()
    for ours, theirs in zip(beside, alone, strict=True):
        assert (ours.curves.beside, theirs.curves.beside) == (2, 1)
        assert min(theirs.curves.attention[:3]) > 0
        for name, relative, absolute in [
            ("reconstruction", 1e-5, 0),
            ("kl", 1e-4, 0),
            ("total_correlation", 0, 1e-5),
            ("discriminator", 1e-5, 0),
            ("attention", 0, 1e-4),
        ]:
            found, expected = (torch.tensor(getattr(model.curves, name)) for model in (ours, theirs))
            torch.testing.assert_close(found[:2], expected[:2], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found, expected, rtol=relative, atol=absolute)
        for network in ("vae", "discriminator"):
            found, expected = (
                torch.cat([value.flatten() for value in getattr(model, network).state_dict().values()])
                for model in (ours, theirs)
            )
            assert (found - expected).abs().max() < 1e-3
            assert ((found - expected).abs() > 1e-5).float().mean() < 0.01
        mean_BI, expected_BI = (model.vae.encode(x_BCYX)[0] for model in (ours, theirs))
        torch.testing.assert_close(mean_BI, expected_BI, rtol=0, atol=1e-5)
        logits_BCYX, expected_BCYX = (model.vae.decode(mean_BI) for model in (ours, theirs))
        torch.testing.assert_close(logits_BCYX, expected_BCYX, rtol=0, atol=1e-4)


# --- train -----------------------------------------------------------------------------------------------------------

KILLED = [Candidate(beta=4.0), Candidate(**AD), Candidate(**AD, seed=1)]  # two groups, the second of two models


@pytest.mark.parametrize("at", [4, 8])
def test_a_killed_training_goes_on_to_the_same_models(at, sprites, monkeypatch, tmp_path, cache):
    monkeypatch.setattr(factorvae, "POINTS", 4)  # an entry each three steps: a kill comes in between
    drawn, measured = [], []

    def draw(index_B):
        drawn.append(len(index_B))
        return sprites.images(index_B)

    def measure(vae):
        assert not vae.training
        measured.append(vae)
        return {"weight": sum(parameter.detach().sum().item() for parameter in vae.parameters())}

    def kill(vae):
        result = measure(vae)
        if len(measured) == 3 + 2 * (at // 4 - 1) + 1:  # the second group, at this step
            raise KeyboardInterrupt
        return result

    options = {"measure": measure, "measurements": 3}
    uninterrupted = train(KILLED, draw, **options)
    assert len(drawn) == 24

    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "killed"))
    monkeypatch.setattr(weights, "CHECKPOINT_SECONDS", 0.0)
    drawn.clear(), measured.clear()
    with pytest.raises(KeyboardInterrupt):
        train(KILLED, draw, **options | {"measure": kill})
    assert len(drawn) == 12 + at
    assert len(list((tmp_path / "killed").glob("*.checkpoint"))) == 1
    assert len(list((tmp_path / "killed").glob("*.safetensors"))) == 1
    drawn.clear()
    resumed = train(KILLED, draw, **options)
    assert len(drawn) == 12 - (at - 1)  # the first group is done, and step `at` was not yet in the checkpoint
    assert list((tmp_path / "killed").glob("*.checkpoint")) == []

    for ours, theirs in zip(resumed, uninterrupted, strict=True):
        assert_same_model(ours, theirs)
        assert curves(ours) == curves(theirs)
        assert ours.curves.step == [3, 6, 9, 12]
        assert list(ours.curves.measured) == ["4", "8", "12"]
        assert ours.curves.measured["12"] == measure(ours.vae)


def test_a_training_that_is_told_to_end_stores_what_it_has_and_goes_on_when_asked_again(
    sprites, monkeypatch, tmp_path, cache
):
    monkeypatch.setattr(factorvae, "POINTS", 4)  # an entry each three steps
    drawn = []

    def draw(index_B):
        drawn.append(len(index_B))
        return sprites.images(index_B)

    options = {"measure": lambda vae: {"bias": vae.encoder.conv1.bias.sum().item()}, "measurements": 2}
    monkeypatch.setenv("EXPVAE_MINUTES", "1e-9")
    early = train(KILLED, draw, **options)
    assert len(drawn) == 2 * 3
    for one in early:
        assert (one.steps, one.steps_asked, one.curves.step) == (3, 12, [3])
        assert one.curves.measured == {"3": options["measure"](one.vae)}
    assert len(list(cache.glob("*.checkpoint"))) == 2
    monkeypatch.delenv("EXPVAE_MINUTES")
    drawn.clear()
    resumed = train(KILLED, draw, **options)
    assert len(drawn) == 2 * 9
    assert list(cache.glob("*.checkpoint")) == []
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "at once"))
    for ours, theirs, before in zip(resumed, train(KILLED, draw, **options), early, strict=True):
        assert_same_model(ours, theirs)
        assert curves(ours) == curves(theirs)
        assert list(ours.curves.measured) == ["6", "12"]
        assert (ours.steps, ours.steps_asked, ours.key) == (12, 12, theirs.key)
        assert before.key != ours.key
        assert (cache / before.file).exists()


def test_nothing_is_trained_twice(sprites, cache):
    def refuse(index_B):
        raise AssertionError("a step was taken")

    candidates = [Candidate(gamma=2.0), Candidate(gamma=2.0, seed=1)]
    first = train(candidates[:1], sprites.images, steps=2)
    both = train(candidates, sprites.images, steps=2)
    again = train(candidates[::-1], refuse, steps=2)[::-1]
    assert_same_model(first[0], both[0])
    for ours, theirs in zip(both, again, strict=True):
        assert_same_model(ours, theirs)
        assert ours.curves == theirs.curves
        assert (ours.key, ours.candidate, ours.device) == (theirs.key, theirs.candidate, theirs.device)
        assert not ours.vae.training
    assert len(list(cache.glob("*.safetensors"))) == 2
    for changed in [{"steps": 3}, {"data_digest": "other"}, {"recipe": replace(RECIPE, batch_size=4)}]:
        with pytest.raises(AssertionError, match="a step was taken"):
            train(candidates[:1], refuse, **{"steps": 2} | changed)


def test_what_another_process_trained_while_this_one_waited_is_not_trained_again(sprites, cache, monkeypatch, tmp_path):
    candidates = [Candidate(gamma=2.0, seed=seed) for seed in range(2)]
    first = train(candidates, sprites.images, steps=2)

    class Waited(weights.FileLock):
        def __enter__(self):
            for path in cache.glob("*.safetensors"):
                shutil.copy(path, tmp_path / "waited")
            return super().__enter__()

    def refuse(index_B):
        raise AssertionError("a step was taken")

    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "waited"))
    monkeypatch.setattr(weights, "FileLock", Waited)
    for ours, theirs in zip(train(candidates, refuse, steps=2), first, strict=True):
        assert_same_model(ours, theirs)


@pytest.mark.parametrize("readable", [True, False])
def test_where_the_cache_cannot_be_written_models_are_trained_without(
    readable, sprites, monkeypatch, read_only, open_place, capsys
):
    monkeypatch.setattr(weights, "CHECKPOINT_SECONDS", 0.0)
    monkeypatch.setenv("EXPVAE_CACHE", str(open_place / "cache"))
    expected = train(KILLED, sprites.images, steps=3)
    if readable:
        with read_only(open_place / "cache"):
            train(KILLED, lambda index_B: pytest.fail("a step was taken"), steps=3)
        assert capsys.readouterr().err == ""
        (open_place / "cache" / expected[0].file).unlink()  # which stood alone
    before = sorted((open_place / "cache").iterdir())
    with read_only(open_place / "cache", 0o555 if readable else 0):
        results = train(KILLED, sprites.images, steps=3)
    assert sorted((open_place / "cache").iterdir()) == before
    for ours, theirs in zip(results, expected, strict=True):
        assert_same_model(ours, theirs)
        assert curves(ours) == curves(theirs)
        assert (ours.key, ours.candidate, ours.file) == (theirs.key, theirs.candidate, theirs.file)
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"Trained weights cannot be kept in {open_place}/cache (Permission denied): ")


def test_a_full_disk_keeps_the_last_checkpoint(sprites, cache, monkeypatch, full_disk):
    monkeypatch.setattr(weights, "CHECKPOINT_SECONDS", 0.0)
    drawn = []

    def draw(index_B):
        drawn.append(len(index_B))
        return sprites.images(index_B)

    def limited(*arguments):
        with full_disk() if len(drawn) == 3 else nullcontext():
            save(*arguments)

    save = checkpoints.save_file
    monkeypatch.setattr(checkpoints, "save_file", limited)
    with pytest.raises(OSError, match=r"FactorVAE-\w+\.checkpoint could not be written \(.*\); nothing was lost, "):
        train([Candidate()], draw, steps=4)
    assert sorted(path.suffix for path in cache.iterdir()) == [".checkpoint", ".lock"]
    monkeypatch.setattr(checkpoints, "save_file", save)
    train([Candidate()], draw, steps=4)
    assert len(drawn) == 3 + 2


@pytest.mark.parametrize("ending", ["safetensors", "checkpoint"])
def test_a_damaged_file_is_named(ending, sprites, cache, monkeypatch):
    train([Candidate()], sprites.images, steps=1)
    (path,) = cache.glob("*.safetensors")
    (lock,) = cache.glob("*.lock")
    damaged = path if ending == "safetensors" else lock.with_suffix(".checkpoint")
    content = path.read_bytes()
    path.unlink()
    damaged.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"^{damaged} is damaged \(.*\); delete it and run again$"):
        train([Candidate()], sprites.images, steps=1)


def test_the_source_and_the_own_steps_of_a_recipe_are_not_part_of_a_key(sprites):
    keys = [
        train([Candidate()], sprites.images, recipe, steps=1)[0].key
        for recipe in (RECIPE, replace(RECIPE, source="other", steps=9))
    ]
    assert keys[0] == keys[1]


def test_a_seed_fixes_everything(sprites, monkeypatch, tmp_path):
    candidates = [Candidate(**AD), Candidate(**AD, seed=1)]
    first = train(candidates, sprites.images, steps=2)
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "again"))
    again = train(candidates, sprites.images, steps=2)
    for ours, theirs in zip(first, again, strict=True):
        assert_same_model(ours, theirs)
        assert curves(ours) == curves(theirs)
    for ours, theirs in [(first[0].vae, first[1].vae), (first[0].discriminator, first[1].discriminator)]:
        for (name, value), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
            assert not torch.equal(value, other), name


def test_models_that_share_a_seed_start_alike_and_see_the_same_images(sprites, monkeypatch):
    steps = recorded(monkeypatch)
    train([Candidate(gamma=1.0), Candidate(gamma=30.0), Candidate(gamma=1.0, seed=1)], sprites.images, steps=1)
    first, second, third = steps[0]["reconstruction"].tolist()
    assert first == pytest.approx(second)
    assert first != pytest.approx(third)


def test_curves_are_the_means_over_the_steps_up_to_each_entry(sprites, monkeypatch):
    monkeypatch.setattr(factorvae, "POINTS", 2)
    steps = recorded(monkeypatch)
    candidates = [Candidate(**AD), Candidate(**AD, seed=1)]
    trained = train(candidates, sprites.images, steps=5)
    for m, one in enumerate(trained):
        assert one.curves.step == [2, 4, 5]
        assert one.curves.beside == 2
        assert one.curves.seconds > 0
        assert one.curves.measured == {}
        for name in steps[0]:
            values = [step[name][m].item() for step in steps]
            means = [sum(values[:2]) / 2, sum(values[2:4]) / 2, values[4]]
            assert getattr(one.curves, name) == pytest.approx(means, rel=1e-6), name


def test_beta_vae_leaves_the_discriminator_as_it_was(sprites):
    trained = train([Candidate(beta=4.0, seed=2)], sprites.images, steps=2)[0]
    start, vae = build(lambda: narrow_discriminator(LATENTS), 2), build(lambda: NarrowVAE(LATENTS), 2)
    for name, value in start.state_dict().items():
        assert torch.equal(trained.discriminator.state_dict()[name], value), name
    assert not any(torch.equal(trained.vae.state_dict()[name], value) for name, value in vae.state_dict().items())
    assert trained.curves.total_correlation == trained.curves.discriminator == trained.curves.attention == []
    assert len(trained.curves.kl) == 2


def test_bfloat16_is_close_to_float32_and_keeps_weights_in_float32(sprites, monkeypatch):
    steps = recorded(monkeypatch)
    for precision in ("float32", "bfloat16"):
        trained = train([Candidate(**AD)], sprites.images, steps=2, precision=precision)[0]
        assert {value.dtype for value in trained.vae.state_dict().values()} == {torch.float32}
    full, half = steps[0], steps[2]
    assert half["reconstruction"].item() == pytest.approx(full["reconstruction"].item(), rel=1e-2)
    assert half["discriminator"].item() == pytest.approx(full["discriminator"].item(), rel=1e-2)
    assert half["kl"].item() == pytest.approx(full["kl"].item(), rel=0.1)
    assert half["kl"].item() != full["kl"].item()
    assert steps[3]["kl"].item() != half["kl"].item()


def test_candidates_share_a_group_where_their_losses_have_the_same_parts():
    plain, factor, paper = Candidate(), Candidate(gamma=1.0), Candidate(gamma=1.0, attention_weight=1.0)
    other = replace(paper, penalty=VARIANTS["report2"])
    unused = replace(factor, penalty=VARIANTS["report2"])
    attached = replace(factor, detached=False)
    beside = [
        [plain, replace(plain, beta=4.0, seed=1)],
        [factor, replace(factor, gamma=40.0), unused],
        [paper, replace(paper, attention_weight=9.0, seed=3)],
        [other],
        [replace(paper, gamma=0.0)],
        [attached],
    ]
    shuffled = [group[place] for place in range(3) for group in beside if place < len(group)]
    assert factorvae.grouped(shuffled) == beside


# --- what is refused -------------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_training(sprites, cache, monkeypatch):
    recipe = replace(RECIPE, learning_rate=1e30)
    with pytest.raises(TrainingDivergedError, match="is no longer finite by step 2: try a smaller learning_rate"):
        train([Candidate(seed=1)], sprites.images, recipe)
    assert list(cache.glob("*.safetensors")) == list(cache.glob("*.checkpoint")) == []
    monkeypatch.setattr(weights, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(TrainingDivergedError, match=r"the last good checkpoint is .*FactorVAE-.*\.checkpoint"):
        train([Candidate(seed=1)], sprites.images, recipe)


def test_weights_that_are_not_finite_replace_no_checkpoint(sprites, cache, monkeypatch):
    """The loss of a step is taken before its update: it is finite once more than the weights."""
    monkeypatch.setattr(weights, "CHECKPOINT_SECONDS", 0.0)
    with pytest.raises(TrainingDivergedError, match=r"no longer finite by step 1: try a smaller learning_rate$"):
        train([Candidate()], sprites.images, replace(RECIPE, learning_rate=float("inf")))
    assert list(cache.glob("*.checkpoint")) == []


def test_equal_candidates_and_unknown_precisions_are_refused(sprites, cache):
    with pytest.raises(ValueError, match="two are equal"):
        train([Candidate(gamma=1.0), Candidate(gamma=1.0)], sprites.images)
    with pytest.raises(ValueError, match="precision must be one of auto, float32, bfloat16; got 'float16'"):
        train([Candidate()], sprites.images, precision="float16")
    assert not cache.exists()


@pytest.mark.parametrize("name", ["beta", "gamma", "attention_weight"])
def test_negative_weights_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name}=-0.5 must not be negative"):
        Candidate(**{name: -0.5})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"maps": 1}, "maps=1 must be 2 or more"),
        ({"method": Method(score="sum_of_means")}, "method must have score each_mean or each_sample"),
        ({"method": Method(score="normal_difference")}, "method must have score each_mean or each_sample"),
        ({"method": Method(tensor="after")}, "tensor before or mixed"),
        ({"method": Method(normaliser="image")}, "normaliser none"),
        ({"method": Method(channels="abs_of_sum")}, "channels relu_of_sum or sum_of_relu"),
        ({"method": Method(channels="mean_of_abs")}, "channels relu_of_sum or sum_of_relu"),
    ],
)
def test_choices_of_a_penalty_that_do_not_fit_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionPenalty(**options)


@pytest.mark.parametrize("layer", ["conv6", "posterior", "encoder.conv4"])
def test_unknown_layers_are_refused(layer):
    with pytest.raises(ValueError, match=f"layer='{layer}' is unknown; choose one of: conv1, conv2, .*conv5"):
        AttentionPenalty(layer=layer)


def test_more_maps_than_latents_are_refused(sprites):
    candidate = Candidate(attention_weight=1.0, penalty=replace(VARIANTS["report2"], maps=LATENTS + 1))
    with pytest.raises(ValueError, match="maps=5 is more than the 4 latents there are"):
        train([candidate], sprites.images, steps=1)


# --- images, split and codes of the models ---------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [1, 3, 4, 8, 40])
def test_a_lattice_holds_each_stride_th_orientation_and_position(stride):
    index_N, sizes = disentanglement.lattice(stride)
    assert sizes == (1, 3, 6, -(-40 // stride), -(-32 // stride), -(-32 // stride))
    every_N = torch.arange(dsprites.COUNT)
    kept_N = torch.cartesian_prod(*map(torch.arange, dsprites.SIZES))[:, 3:] % stride == 0
    assert torch.equal(index_N, every_N[kept_N.all(1)])
    assert len(index_N) == math.prod(sizes)


@pytest.mark.parametrize("stride", [0, -1])
def test_a_lattice_without_a_stride_is_refused(stride):
    with pytest.raises(ValueError, match=f"stride={stride} must be 1 or more"):
        disentanglement.lattice(stride)


def test_the_split_is_a_partition_and_the_same_each_time():
    train_N, held_out_N = disentanglement.split()
    assert len(held_out_N) == 7373  # a hundredth
    assert torch.equal(torch.cat([train_N, held_out_N]).sort().values, torch.arange(dsprites.COUNT))
    assert torch.equal(disentanglement.split()[1], held_out_N)


def test_codes_are_those_of_the_vae_in_the_order_of_the_images(sprites, monkeypatch):
    monkeypatch.setattr(disentanglement, "BATCH", 4)  # 4, 4 and 2 images
    vae = build(lambda: NarrowVAE(LATENTS), 0)
    index_N = torch.arange(10).flip(0) * 70_001
    expected = vae.encode(sprites.images(index_N).float())
    for found, value in zip(disentanglement.encode(vae, sprites, index_N), expected, strict=True):
        assert not found.requires_grad
        torch.testing.assert_close(found, value, rtol=1e-5, atol=1e-6)
