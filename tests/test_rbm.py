import itertools
import math
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.metrics import roc_auc_score
from sklearn.neural_network import BernoulliRBM
from torch.nn import functional as F

from expvae import Method, attention
from expvae.models import RBM, ConvRBM, Stack
from expvae.models import _rbm as rbm
from expvae_book import chapters, checkpoints, contrastive, names, protocols, runs, training, weights
from expvae_book.chapters import BOOK
from expvae_book.jobs import rbm as jobs
from expvae_book.jobs.digits import load
from expvae_book.recipes import RBM as RECIPES
from expvae_book.recipes import RBMRecipe, visible_units
from expvae_book.truth import ink_truth

pytestmark = pytest.mark.usefixtures("one_thread")

UNITS = ["binary", "spin"]
RECIPE = RBMRecipe(source="test", epochs=2, batch_size=10, learning_rate=0.05, momentum=0.5, weight_decay=1e-3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def randomised(model, scale=0.7, seed=0):
    """The machine in double precision, with parameters large enough for all terms to matter."""
    generator = seeded(seed)
    model = model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def small(units):
    return randomised(RBM(6, 4, units))


def small_conv(units, stride=1):
    """Two channels of 4x5 pixels, 40 in all; a hidden map of 2x3 positions for each of two filters."""
    return randomised(ConvRBM((2, 4, 5), filters=2, kernel=3, stride=stride, units=units), 0.4)


def states(count, units):
    """All states of so many units, one a row."""
    off = 0.0 if units == "binary" else -1.0
    return torch.tensor(list(itertools.product([off, 1.0], repeat=count)), dtype=torch.float64)


def joint(model):
    """p(v, h) of every pair of states of a fully connected machine, by the definition of its energy."""
    v, h = states(model.visible_shape[0], model.units), states(model.hidden_shape[0], model.units)
    energy_VH = -(v @ model.visible_bias)[:, None] - (h @ model.hidden_bias)[None] - v @ model.weight.T @ h.T
    return v, h, (-energy_VH).flatten().softmax(0).view_as(energy_VH)


def log_likelihood(model, v_BV):
    """Mean log p(v) by enumeration; `v_BV` holds states."""
    v, _, p_VH = joint(model)
    row = (v_BV[:, None] == v[None]).all(2).int().argmax(1)
    return p_VH.sum(1).log()[row].mean()


def zeros(model):
    return {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}


# --- energies and probabilities against enumeration ------------------------------------------------------------------


@pytest.mark.parametrize("units", UNITS)
def test_energy_and_free_energy_are_those_of_the_definition(units):
    model = small(units)
    v, h = states(6, units), states(4, units)
    b, c, weight = (value.tolist() for value in (model.visible_bias, model.hidden_bias, model.weight))
    for v_V in v[::7]:
        energies = []
        for h_H in h:
            energy = -sum(b[i] * v_V[i] for i in range(6)) - sum(c[j] * h_H[j] for j in range(4))
            energy -= sum(h_H[j] * weight[j][i] * v_V[i] for i in range(6) for j in range(4))
            energies.append(energy)
            assert model.energy(v_V[None], h_H[None]).item() == pytest.approx(float(energy))
        expected = -math.log(sum(math.exp(-energy) for energy in energies))
        assert model.free_energy(v_V[None]).item() == pytest.approx(expected)


@pytest.mark.parametrize("units", UNITS)
def test_conditional_probabilities_are_those_of_the_joint_distribution(units):
    model = small(units)
    v, h, p_VH = joint(model)
    p_VJ = p_VH @ (h == 1).double() / p_VH.sum(1, keepdim=True)
    p_HI = p_VH.T @ (v == 1).double() / p_VH.sum(0)[:, None]
    torch.testing.assert_close(model.hidden_logits(v).sigmoid(), p_VJ)
    torch.testing.assert_close(model.visible_logits(h).sigmoid(), p_HI)
    torch.testing.assert_close(model.activate(model(v)), rbm.in_units(p_VJ, model.units))


@pytest.mark.parametrize("units", UNITS)
def test_free_energy_keeps_its_digits_where_fields_are_large(units):
    model = RBM(1, 1, units).double()
    with torch.no_grad():
        model.hidden_bias.fill_(800.0)
    assert model.free_energy(torch.ones(1, 1, dtype=torch.float64)).item() == pytest.approx(-800, abs=0.1)
    with torch.no_grad():
        model.hidden_bias.fill_(-800.0)
    expected = {"binary": 0, "spin": -800}[units]
    assert model.free_energy(torch.ones(1, 1, dtype=torch.float64)).item() == pytest.approx(expected, abs=0.1)


def dense(model):
    """The fully connected machine with the weights that a convolutional one has, written out place by place."""
    (channels, height, width), (filters, rows, columns) = model.visible_shape, model.hidden_shape
    weight = np.zeros((filters, rows, columns, channels, height, width))
    kernel, (side, _) = model.weight.detach().numpy(), model.weight.shape[2:]
    for k, row, column, c, y, x in np.ndindex(filters, rows, columns, channels, side, side):
        weight[k, row, column, c, row * model.stride + y, column * model.stride + x] = kernel[k, c, y, x]
    machine = RBM(channels * height * width, filters * rows * columns, model.units).double()
    with torch.no_grad():
        machine.weight.copy_(torch.from_numpy(weight).reshape(machine.weight.shape))
        machine.visible_bias.copy_(model.visible_bias.repeat_interleave(height * width))
        machine.hidden_bias.copy_(model.hidden_bias.repeat_interleave(rows * columns))
    return machine


def grey(count, shape, units, seed=1):
    """Visible units that are means, not states."""
    return rbm.in_units(torch.rand(count, *shape, generator=seeded(seed), dtype=torch.float64), units)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("units", UNITS)
def test_a_convolutional_machine_is_the_fully_connected_one_with_its_weights_written_out(units, stride):
    model = small_conv(units, stride)  # with stride 2 no window reaches the last row
    flat, v = dense(model), grey(3, model.visible_shape, units)
    h = grey(3, model.hidden_shape, units, seed=2)
    torch.testing.assert_close(model.hidden_logits(v).flatten(1), flat.hidden_logits(v.flatten(1)))
    torch.testing.assert_close(model.visible_logits(h).flatten(1), flat.visible_logits(h.flatten(1)))
    torch.testing.assert_close(model.energy(v, h), flat.energy(v.flatten(1), h.flatten(1)))
    torch.testing.assert_close(model.free_energy(v), flat.free_energy(v.flatten(1)))
    torch.testing.assert_close(model.pseudo_log_likelihood(v), flat.pseudo_log_likelihood(v.flatten(1)))

    ours, theirs = zeros(model), zeros(flat)
    model.add_slopes(ours, v, h, 0.3)
    flat.add_slopes(theirs, v.flatten(1), h.flatten(1), 0.3)
    for bias, shape in (("visible_bias", model.visible_shape), ("hidden_bias", model.hidden_shape)):
        torch.testing.assert_close(ours[bias], theirs[bias].view(shape).sum((1, 2)))


@pytest.mark.parametrize("units", UNITS)
def test_free_energy_of_a_small_convolutional_machine_by_enumeration(units):
    model = randomised(ConvRBM((1, 3, 3), filters=2, kernel=2, units=units))
    h = states(8, units).view(-1, *model.hidden_shape)
    for v in grey(3, model.visible_shape, units):
        energy_N = model.energy(v.expand(len(h), -1, -1, -1), h)
        assert model.free_energy(v[None]).item() == pytest.approx(-energy_N.neg().logsumexp(0).item())


# --- pseudo-likelihood -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", UNITS)
def test_pseudo_likelihood_is_the_sum_over_units_of_their_conditional_probabilities(units):
    model = small(units)
    v, _, p_VH = joint(model)
    p = {tuple(v_V.tolist()): p_V.item() for v_V, p_V in zip(v, p_VH.sum(1), strict=True)}
    expected = []
    for v_V in v.tolist():
        others = [[*v_V[:i], 1 - v_V[i] if units == "binary" else -v_V[i], *v_V[i + 1 :]] for i in range(6)]
        expected.append(sum(math.log(p[tuple(v_V)] / (p[tuple(v_V)] + p[tuple(other)])) for other in others))
    torch.testing.assert_close(model.pseudo_log_likelihood(v), torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("make", [small, small_conv])
@pytest.mark.parametrize("units", UNITS)
def test_one_bit_pseudo_likelihood_has_the_exact_one_as_its_mean(units, make):
    model = make(units)
    v = grey(1, model.visible_shape, units)
    count = v.numel()
    ones = rbm.one_bit_pseudo_log_likelihood(model, v.expand(count, *v.shape[1:]), torch.arange(count))
    assert ones.mean().item() == pytest.approx(model.pseudo_log_likelihood(v).item())


# --- noise -----------------------------------------------------------------------------------------------------------


def test_hard_samples_are_on_as_often_as_their_log_odds_say():
    logits = torch.tensor([-3.0, -0.5, 0.0, 1.0, 4.0])
    share = rbm.hard(logits.expand(40_000, 5), seeded()).mean(0)
    p = logits.sigmoid()
    assert ((share - p).abs() < 4 * (p * (1 - p) / 40_000).sqrt()).all()


def relaxed(logits, temperature, generator):
    """Relaxed samples, by the definition of the logistic noise."""
    u = torch.rand(logits.shape, generator=generator, dtype=logits.dtype)
    return ((logits + (u / (1 - u)).log()) / temperature).sigmoid()


@pytest.mark.parametrize("units", UNITS)
def test_relaxed_units_tend_to_the_hard_ones_with_the_same_noise_as_the_temperature_falls(units):
    model = small(units)
    v = grey(500, (6,), units)
    sample = rbm.in_units(rbm.hard(model.hidden_logits(v), seeded(1)), units)
    values = [model.activate(model(v, t, seeded(1))) for t in (4.0, 1.0, 0.25, 0.01, 1e-6)]
    distances = [(value - sample).abs() for value in values]
    assert all((after <= before).all() for before, after in itertools.pairwise(distances))  # unit by unit
    assert distances[0].max() > 0.45
    assert distances[-1].max() < 1e-3


def test_relaxed_units_tend_to_one_half_as_the_temperature_rises():
    model = small("binary")
    assert (model.activate(model(grey(500, (6,), "binary"), 1e6, seeded(1))) - 0.5).abs().max() < 1e-4


def test_noise_is_finite_where_the_uniform_number_is_at_its_bounds(monkeypatch):
    for bound in (0.0, 1 - 2.0**-24):
        monkeypatch.setattr(torch, "rand", lambda shape, bound=bound, **_: torch.full(shape, bound))
        assert RBM(3, 2)(torch.zeros(1, 3), 1e-3, seeded()).isfinite().all()


@pytest.mark.parametrize("units", UNITS)
def test_relaxed_units_of_a_machine_are_relaxed_samples_of_its_log_odds(units):
    model = small(units)
    v = grey(5, (6,), units)
    expected = rbm.in_units(relaxed(model.hidden_logits(v), 0.6, seeded(3)), units)
    torch.testing.assert_close(model.activate(model(v, 0.6, seeded(3))), expected)


def test_visible_units_of_images():
    x = torch.tensor([0, 51, 255], dtype=torch.uint8)
    assert rbm.visible_values(x, "binary").tolist() == pytest.approx([0, 0.2, 1])
    assert rbm.visible_values(x, "spin").tolist() == pytest.approx([-1, -0.6, 1])


# --- sampling --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", UNITS)
def test_gibbs_sampling_has_the_marginals_of_the_model(units):
    model = small(units)
    start = rbm.in_units(torch.zeros(20_000, 6, dtype=torch.float64), units)
    sample = rbm.gibbs(model, start, 40, seeded())
    v, _, p_VH = joint(model)
    p_V = p_VH.sum(1)
    code = 2 ** torch.arange(6).double()
    counts = torch.bincount(((sample == 1).double() @ code).long(), minlength=64)
    share = counts[((v == 1).double() @ code).long()] / len(sample)
    # 64 states: the statistic of Pearson has 63 degrees of freedom, and passes 103 once in a thousand times.
    assert (len(sample) * (share - p_V).square() / p_V).sum() < 103


# --- the gradient ----------------------------------------------------------------------------------------------------


def exact_gradient(model, v):
    """Autograd of the log-likelihood that enumeration gives."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(log_likelihood(model, v), parameters), strict=True))


@pytest.mark.parametrize("units", UNITS)
def test_the_gradient_of_the_log_likelihood_is_the_slopes_at_the_data_less_those_of_the_model(units):
    model = small(units)
    data = states(6, units)[[3, 17, 17, 60]]
    expected = exact_gradient(model, data)

    v, _, p_VH = joint(model)
    p_V = p_VH.sum(1).detach()
    names, parameters = zip(*model.named_parameters(), strict=True)
    contrast = (p_V * model.free_energy(v)).sum() - model.free_energy(data).mean()
    for name, gradient in zip(names, torch.autograd.grad(contrast, parameters), strict=True):
        torch.testing.assert_close(gradient, expected[name])

    total = zeros(model)
    with torch.no_grad():
        model.add_slopes(total, data, model.activate(model(data)), 1.0)
        for v_V, p in zip(v, p_V.tolist(), strict=True):
            model.add_slopes(total, v_V[None], model.activate(model(v_V[None])), -p)
    torch.testing.assert_close(total, expected)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("units", UNITS)
def test_slopes_of_a_convolutional_machine_are_those_of_its_free_energy(units, stride):
    model = small_conv(units, stride)
    v = grey(3, model.visible_shape, units)
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(-0.7 * model.free_energy(v).mean(), parameters)
    total = zeros(model)
    with torch.no_grad():
        model.add_slopes(total, v, model.activate(model(v)), 0.7)
    torch.testing.assert_close(total, dict(zip(names, gradients, strict=True)))


@pytest.mark.parametrize("persistent", [False, True])
@pytest.mark.parametrize("units", UNITS)
def test_the_contrast_after_many_steps_is_the_gradient(units, persistent):
    """The mean over 6000 chains, which after 30 steps have forgotten their start."""
    model = randomised(RBM(6, 4, units), 0.7 if units == "binary" else 0.3)
    data, total = states(6, units)[[3, 17, 17, 60]].repeat(1500, 1), zeros(model)
    chain = states(4, units)[[0]].repeat(6000, 1) if persistent else None
    end = contrastive.add_contrast(total, model, data, chain, 30, seeded())
    # Four deviations of the mean of 6000 values between -1 and 1.
    torch.testing.assert_close(total, exact_gradient(model, data), rtol=0, atol=0.052)
    if persistent:
        _, h, p_VH = joint(model)
        assert set(end.unique().tolist()) == set(h.unique().tolist())
        torch.testing.assert_close(end.mean(0), p_VH.sum(0) @ h, rtol=0, atol=0.052)
    else:
        assert end is None


@pytest.mark.parametrize("settings", [{}, {"persistent": True}])
@pytest.mark.parametrize("units", UNITS)
def test_contrastive_divergence_raises_the_exact_likelihood(units, settings):
    """Three pairs of units, of which nine in ten agree: 3.0 nats of these data are as few as there can be."""
    first = torch.randint(2, (720, 3), generator=seeded()).double()
    second = torch.where(torch.rand(720, 3, generator=seeded(1)) < 0.1, 1 - first, first)
    data = rbm.in_units(torch.stack([first, second], 2).flatten(1), units)
    model = training.build(lambda: RBM(6, 4, units), 0).double()
    assert log_likelihood(model, data).item() == pytest.approx(-6 * math.log(2), abs=0.05)
    recipe = replace(RECIPE, batch_size=40, learning_rate=0.4, weight_decay=0.0, decay=True, **settings)
    contrastive.train(model, data[:640], data[640:], recipe, epochs=40, seed=0, progress=False)
    assert log_likelihood(model, data).item() > -3.3  # between -3.33 and -2.99 for four seeds of each


# --- scikit-learn ----------------------------------------------------------------------------------------------------


def digits():
    """Scikit-learn's digits in [0, 1], in a fixed order."""
    x_NV = torch.from_numpy(load_digits().data / 16)
    return x_NV[torch.randperm(len(x_NV), generator=seeded())]


def trained_peer(x_NV, hidden, epochs, seed, **settings):
    return BernoulliRBM(hidden, n_iter=epochs, random_state=seed, **settings).fit(x_NV.numpy())


def copied(theirs):
    ours = RBM(theirs.components_.shape[1], theirs.components_.shape[0]).double()
    with torch.no_grad():
        ours.weight.copy_(torch.from_numpy(theirs.components_))
        ours.hidden_bias.copy_(torch.from_numpy(theirs.intercept_hidden_))
        ours.visible_bias.copy_(torch.from_numpy(theirs.intercept_visible_))
    return ours


def test_free_energy_and_one_bit_pseudo_likelihood_are_those_of_scikit_learn():
    x_NV = digits()[:300]
    theirs = trained_peer(x_NV, 16, epochs=2, seed=3)
    ours = copied(theirs)
    np.testing.assert_allclose(ours.free_energy(x_NV).detach().numpy(), theirs._free_energy(x_NV.numpy()))
    np.testing.assert_allclose(ours.hidden_logits(x_NV).sigmoid().detach().numpy(), theirs.transform(x_NV.numpy()))
    unit_N = torch.from_numpy(np.random.RandomState(3).randint(0, 64, 300))  # as score_samples draws them
    estimate_N = rbm.one_bit_pseudo_log_likelihood(ours, x_NV, unit_N)
    np.testing.assert_allclose(estimate_N.detach().numpy(), theirs.score_samples(x_NV.numpy()), rtol=1e-6)


class Replayed:
    """Stands in for NumPy's random state, with the uniform numbers of a generator of PyTorch."""

    def __init__(self, generator):
        self.generator = generator

    def uniform(self, size):
        # A unit is on where this is below its probability p; where ours, u, is above 1 - p.
        return 1 - torch.rand(size, generator=self.generator, dtype=torch.float64).numpy()


def test_persistent_contrastive_divergence_is_that_of_scikit_learn_step_by_step():
    x_NV = digits()[:200]
    theirs = BernoulliRBM(16, batch_size=20, learning_rate=0.1, n_iter=0, random_state=5).fit(x_NV.numpy())
    ours = copied(theirs)
    recipe = RBMRecipe("test", 0, batch_size=20, learning_rate=0.1, persistent=True)
    contrastive.train(ours, x_NV, x_NV[:10], recipe, epochs=3, seed=7, progress=False)

    generator = seeded(7)
    order_N = torch.randperm(200, generator=generator)
    for _ in range(3):
        for chosen_B in order_N.split(20):
            theirs._fit(x_NV[chosen_B].numpy(), Replayed(generator))
        order_N = torch.randperm(200, generator=generator)
    expected = copied(theirs)
    for name, value in ours.named_parameters():
        torch.testing.assert_close(value, expected.get_parameter(name))
        assert value.abs().max() > 0.1  # something was learned


def test_pseudo_likelihood_on_digits_is_that_of_scikit_learn():
    x_NV = digits()
    train, test = x_NV[:1500], (x_NV[1500:] > 0.5).double()
    settings = {"batch_size": 20, "learning_rate": 0.1}
    recipe = RBMRecipe("test", 0, **settings, persistent=True)
    ours, theirs = [], []
    for seed in range(3):
        model = training.build(lambda: RBM(64, 32), seed).double()
        assert model.pseudo_log_likelihood(test).mean().item() == pytest.approx(-64 * math.log(2), abs=0.3)
        contrastive.train(model, train, test, recipe, epochs=4, seed=seed, progress=False)
        ours.append(model.pseudo_log_likelihood(test).mean().item())
        theirs.append(copied(trained_peer(train, 32, 4, seed, **settings)).pseudo_log_likelihood(test).mean().item())
    # From -44 to -24.7. Over eight seeds each the deviation was 0.12 for ours and 0.11 for theirs, which makes 0.09 for
    # the difference of two means of three: four times that.
    assert abs(np.mean(ours) - np.mean(theirs)) < 0.37
    assert np.mean(ours) == pytest.approx(-24.7, abs=0.4)


# --- the loop --------------------------------------------------------------------------------------------------------


def bars(count, side=6):
    """Bytes: a bright column on a dark ground, whose place depends on the number of the image."""
    x_NYX = torch.full((count, side, side), 20, dtype=torch.uint8)
    for n in range(count):
        x_NYX[n, n % 3 :, n * 5 % side] = 230
    return x_NYX[:, None]


def machine(kind, units="binary"):
    if kind == "rbm":
        return training.build(lambda: RBM(36, 5, units), 1)
    return training.build(lambda: ConvRBM((1, 6, 6), filters=3, kernel=3, stride=2, units=units), 1)


def fit(model, checkpoint=None, **options):
    """Train on 33 small images in steps of 10: four steps an epoch, the last of three images."""
    images = bars(41)
    options = {"recipe": RECIPE, "epochs": 4, "seed": 2, "progress": False} | options
    history = contrastive.train(model, images[8:], images[:8], checkpoint=checkpoint, **options)
    return model, history


def assert_same_training(ours, theirs):
    (model, history), (other, other_history) = ours, theirs
    for (name, value), other_value in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, other_value), name
    assert vars(history) | {"seconds": 0} == vars(other_history) | {"seconds": 0}


@pytest.mark.parametrize(
    ("kind", "units", "rates"),
    [
        ("rbm", "binary", {"weight": 1, "visible_bias": 1, "hidden_bias": 1}),
        ("rbm", "spin", {"weight": 1 / 16, "visible_bias": 1 / 4, "hidden_bias": 1 / 4}),
        (
            "conv",
            "binary",
            {"weight": 1 / 4, "visible_bias": 1 / 36, "hidden_bias": 1 / 4},
        ),  # 2x2 positions, 6x6 pixels
        ("conv", "spin", {"weight": 1 / 64, "visible_bias": 1 / 144, "hidden_bias": 1 / 16}),
    ],
)
def test_momentum_weight_decay_and_a_falling_rate_are_those_of_a_plain_loop(kind, units, rates, monkeypatch):
    """Sixteen steps with the same made-up contrasts."""
    plain = machine(kind, units)
    contrasts = [
        {name: torch.randn(p.shape, generator=seeded(step)) for name, p in plain.named_parameters()}
        for step in range(16)
    ]
    remaining = iter(contrasts)

    def add(total, *_):
        for name, value in next(remaining).items():
            total[name].add_(value)

    monkeypatch.setattr(contrastive, "add_contrast", add)
    recipe = replace(RECIPE, momentum=0.8, weight_decay=0.01, decay=True)
    model, history = fit(machine(kind, units), recipe=recipe)
    change = {name: torch.zeros_like(p) for name, p in plain.named_parameters()}
    for step, contrast in enumerate(contrasts):
        for name, p in plain.named_parameters():
            change[name] = 0.8 * change[name] + rates[name] * contrast[name]
            if name == "weight":
                change[name] -= 0.01 * p.detach()
            p.data += 0.05 * (16 - step) / 16 * change[name]
    for name, value in plain.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), value)
    assert history.images == 4 * 33


@pytest.mark.parametrize("units", UNITS)
def test_visible_biases_start_at_the_mean_image(units, monkeypatch):
    monkeypatch.setattr(contrastive, "VALIDATION_BATCH", 10)
    images = bars(33)
    p = (images.double() / 255).mean(0)[0]
    for kind in ("rbm", "conv"):
        model = machine(kind, units)
        contrastive.start_biases(model, images)
        start = model.visible_logits(torch.zeros(1, *model.hidden_shape)).sigmoid().view(6, 6)
        expected = p if kind == "rbm" else p.mean().expand(6, 6)
        torch.testing.assert_close(start, expected.float())
        hidden = model.hidden_logits(torch.zeros(1, *model.visible_shape))
        sparse = kind == "conv" and units == "binary"
        torch.testing.assert_close(hidden, torch.full_like(hidden, -4.0 if sparse else 0.0))
        contrastive.start_biases(model, 0 * images)  # never on
        assert model.visible_logits(torch.zeros(1, *model.hidden_shape)).sigmoid().view(-1)[0].item() == pytest.approx(
            0.01
        )


def test_the_history_holds_what_is_measured_after_each_epoch():
    model, history = fit(machine("rbm"))
    images = bars(41)
    assert len(history.pseudo_likelihood) == len(history.free_energy_gap) == 4
    assert (history.pseudo_likelihood[-1], history.free_energy_gap[-1]) == contrastive.validate(
        model, images[8:], images[:8]
    )
    v = rbm.visible_values(images, "binary").flatten(1)
    gap = model.free_energy(v[:8]).mean() - model.free_energy(v[8:16]).mean()
    assert history.free_energy_gap[-1] == pytest.approx(gap.item(), abs=1e-5)
    unit_N = torch.randint(36, (8,), generator=seeded(0))
    expected = rbm.one_bit_pseudo_log_likelihood(model, v[:8], unit_N).mean()
    assert history.pseudo_likelihood[-1] == pytest.approx(expected.item())


def test_validation_in_parts_is_that_of_the_whole(monkeypatch):
    images = bars(41)
    model, _ = fit(machine("conv"))
    whole = contrastive.validate(model, images[8:], images[:8])
    monkeypatch.setattr(contrastive, "VALIDATION_BATCH", 3)
    assert contrastive.validate(model, images[8:], images[:8]) == pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("units", ["binary", "spin"])
@pytest.mark.parametrize("bad", [1.5, -1.5, float("nan"), float("inf")])
def test_what_is_no_mean_of_units_is_refused(units, bad):
    stack = conv_stack(units)
    x = images()
    x[1, 0, 2, 2] = bad
    for take in (stack.encode, stack.reconstruct, stack.visible, partial(rbm.visible_values, units=units)):
        with pytest.raises(ValueError, match=r"x must lie in \[0, 1\] and hold no NaN, got values from"):
            take(x)
    bottom, least = stack.layers[0], {"binary": 0, "spin": -1}[units]
    flat = RBM(x[0].numel(), 3, units).to(x.dtype)
    for machine, v in ((bottom, x), (flat, x.flatten(1))):
        h = machine.hidden_fields(v)
        for take in (
            machine,
            machine.free_energy,
            machine.pseudo_log_likelihood,
            lambda v, machine=machine, h=h: machine.energy(v, h),
            lambda v, machine=machine: rbm.gibbs(machine, v, 1, seeded()),
            lambda v, machine=machine: rbm.one_bit_pseudo_log_likelihood(machine, v, torch.zeros(len(v)).long()),
            lambda v, machine=machine: contrastive.start_biases(machine, v),
            lambda v, machine=machine: contrastive.validate(machine, v, v),
        ):
            with pytest.raises(ValueError, match=rf"must lie in \[{least}, 1\] and hold no NaN, got values from"):
                take(v)
        good = torch.full_like(v, 0.5)
        for name, given in (("train", (v, good)), ("validation", (good, v))):
            with pytest.raises(ValueError, match=rf"{name} must lie in \[{least}, 1\]"):
                contrastive.train(machine, *given, RECIPE, epochs=1, seed=0, progress=False)


def test_the_bounds_of_means_are_means():
    for units, least in (("binary", 0.0), ("spin", -1.0)):
        assert RBM(2, 2, units)(torch.tensor([[least, 1.0]])).isfinite().all()
    assert conv_stack().encode(images().round()).isfinite().all()


def test_the_seed_fixes_a_training():
    first, again, other = (fit(machine("rbm"), seed=seed) for seed in (2, 2, 3))
    assert_same_training(first, again)
    assert not torch.equal(first[0].weight, other[0].weight)


# --- cut off and resumed ---------------------------------------------------------------------------------------------


class KilledError(Exception):
    pass


@contextmanager
def killed_after(steps):
    """Let so many more steps pass, and raise in the next."""
    add, done = contrastive.add_contrast, itertools.count(1)

    def counted(*given):
        if next(done) > steps:
            raise KilledError
        return add(*given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(contrastive, "add_contrast", counted)
        yield


@pytest.mark.parametrize("last", [1, 3, 4, 5, 15, 16])
@pytest.mark.parametrize(
    ("kind", "units", "settings"),
    [
        ("rbm", "binary", {"persistent": True, "decay": True}),
        ("rbm", "spin", {"steps": 2}),
        ("conv", "binary", {"persistent": True}),
    ],
)
def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path, kind, units, settings, last):
    """After the first step, around the end of an epoch, and around the end of the training."""
    recipe, checkpoint = replace(RECIPE, **settings), tmp_path / "checkpoint"
    expected = fit(machine(kind, units), recipe=recipe)
    if last < 16:
        with killed_after(last), pytest.raises(KilledError):
            fit(machine(kind, units), checkpoint, recipe=recipe, checkpoint_seconds=0.0)
    else:
        fit(machine(kind, units), checkpoint, recipe=recipe)  # the last step is kept whatever the time
    assert int(checkpoints.read_tensors(checkpoint)[1]["step"]) == last
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
    fresh = randomised(machine(kind, units)).float()  # nothing of it may be left
    assert_same_training(fit(fresh, checkpoint, recipe=recipe), expected)


def test_a_checkpoint_of_a_training_of_another_length_is_refused(tmp_path):
    fit(machine("rbm"), tmp_path / "checkpoint")
    with pytest.raises(ValueError, match=r"checkpoint is of a training of 16 steps, not of 12$"):
        fit(machine("rbm"), tmp_path / "checkpoint", epochs=3)


@pytest.mark.parametrize("step_of_nan", [2, 7, 15])
def test_nan_stops_the_training_and_keeps_the_last_good_checkpoint(tmp_path, monkeypatch, step_of_nan):
    add, step = contrastive.add_contrast, itertools.count()

    def poisoned(total, *given):
        if next(step) == step_of_nan:
            total["weight"][0, 0] = math.nan
        return add(total, *given)

    checkpoint = tmp_path / "checkpoint"
    with monkeypatch.context() as patch, pytest.raises(checkpoints.TrainingDivergedError) as caught:
        patch.setattr(contrastive, "add_contrast", poisoned)
        fit(machine("rbm"), checkpoint, checkpoint_seconds=0.0)
    assert str(caught.value) == (
        f"the loss or a weight is no longer finite by step {step_of_nan + 1}: try a smaller learning_rate; "
        f"the last good checkpoint is {checkpoint}"
    )
    assert int(checkpoints.read_tensors(checkpoint)[1]["step"]) == step_of_nan
    assert_same_training(fit(machine("rbm"), checkpoint), fit(machine("rbm")))  # the cause is gone


def test_too_large_a_learning_rate_stops_with_a_sentence():
    with pytest.raises(
        checkpoints.TrainingDivergedError, match=r"no longer finite by step \d+: try a smaller .*_rate$"
    ):
        fit(machine("rbm"), recipe=replace(RECIPE, learning_rate=1e38))


# --- stacks ----------------------------------------------------------------------------------------------------------


def flat_stack(units="binary", scale=0.7):
    return randomised(Stack([RBM(36, 12, units), RBM(12, 7, units), RBM(7, 4, units)], (1, 6, 6)), scale)


def conv_stack(units="binary"):
    first = ConvRBM((1, 6, 6), filters=3, kernel=3, units=units)
    return randomised(Stack([first, RBM(3 * 4 * 4, 5, units)], (1, 6, 6)), 0.5)


def images(count=4):
    return torch.rand(count, 1, 6, 6, generator=seeded(4), dtype=torch.float64)


@pytest.mark.parametrize("make", [flat_stack, conv_stack])
@pytest.mark.parametrize("units", UNITS)
def test_latents_are_the_means_of_each_layer_given_those_below(make, units):
    stack, x = make(units), images()
    values = x if units == "binary" else 2 * x - 1
    for layer in stack.layers:
        values = values.reshape(len(x), *layer.visible_shape)
        p = layer.hidden_logits(values).sigmoid()
        values = p if units == "binary" else 2 * p - 1
    torch.testing.assert_close(stack.encode(x), values)
    for layer in reversed(stack.layers):
        p = layer.visible_logits(values.reshape(len(x), *layer.hidden_shape)).sigmoid()
        values = p if units == "binary" else 2 * p - 1
    torch.testing.assert_close(stack.reconstruct(x), p.view_as(x))


@pytest.mark.parametrize("make", [flat_stack, conv_stack])
@pytest.mark.parametrize("units", UNITS)
def test_relaxed_latents_tend_to_a_sample_of_every_layer_as_the_temperature_falls(make, units):
    stack, x = make(units), images()
    generator = seeded(9)
    values = rbm.visible_values(x, units)
    for layer in stack.layers:
        logits = layer.hidden_logits(values.reshape(len(x), *layer.visible_shape))
        values = rbm.in_units(rbm.hard(logits, generator), units)
    torch.testing.assert_close(stack.encode(x, 1e-7, seeded(9)), values)
    assert not torch.equal(stack.encode(x, 1e-7, seeded(8)), values)


@pytest.mark.parametrize("make", [flat_stack, conv_stack])
@pytest.mark.parametrize("units", UNITS)
def test_relaxed_latents_have_the_gradient_of_finite_differences(make, units):
    stack, x = make(units), images().requires_grad_()
    (gradient,) = torch.autograd.grad(stack.encode(x, 0.8, seeded(9)).sum(), x)
    direction = torch.randn(x.shape, generator=seeded(2), dtype=torch.float64)
    with torch.no_grad():
        above, below = (stack.encode(x + step * direction, 0.8, seeded(9)).sum() for step in (1e-5, -1e-5))
    assert (gradient * direction).sum().item() == pytest.approx(((above - below) / 2e-5).item(), rel=1e-6)


def test_samples_of_a_stack_of_one_machine_have_its_marginals():
    stack = Stack([small("binary")], (1, 2, 3))
    v, _, p_VH = joint(stack.layers[0])
    torch.testing.assert_close(stack.visible(v.view(64, 1, 2, 3)), v)
    sample = stack.sample(4000, 30, seeded())
    assert sample.shape == (4000, 1, 2, 3)
    torch.testing.assert_close(sample.flatten(1).mean(0), p_VH.sum(1) @ v, rtol=0, atol=0.03)


@pytest.mark.parametrize("units", UNITS)
def test_samples_go_down_through_drawn_units(units):
    stack = conv_stack(units)
    sample = stack.sample(3, 2, seeded(1))
    assert torch.equal(stack.sample(3, 2, seeded(1)), sample)
    assert not torch.equal(stack.sample(3, 3, seeded(1)), sample)
    top, bottom = stack.layers[1], stack.layers[0]
    generator = seeded(1)
    v = rbm.in_units(rbm.hard(torch.zeros(3, 48, dtype=torch.float64), generator), units)
    v = rbm.gibbs(top, v, 2, generator)
    h = rbm.in_units(rbm.hard(top.hidden_logits(v), generator), units)
    v = rbm.in_units(rbm.hard(top.visible_logits(h), generator), units)
    torch.testing.assert_close(sample, bottom.visible_logits(v.view(3, 3, 4, 4)).sigmoid())


@pytest.mark.parametrize("tensor", ["before", "after", "mixed"])
@pytest.mark.parametrize("temperature", [None, 0.7])
@pytest.mark.parametrize("units", UNITS)
def test_attention_at_a_convolutional_layer_is_that_of_the_formula(units, temperature, tensor):
    """The maps of expvae.attention against Jacobians, written out, of the layers above."""
    stack, x = conv_stack(units), images()

    def encode(x):
        return stack.encode(x, temperature, None if temperature is None else seeded(5))

    result = attention(encode, stack.maps[0], x, Method(tensor=tensor))
    bottom, top = stack.layers
    generator = seeded(5)
    noise = (
        (lambda _: 0.0)
        if temperature is None
        else (lambda like: torch.rand(like.shape, generator=generator, dtype=torch.float64).logit())
    )
    heat = temperature or 1.0
    field_BCHW = bottom.hidden_fields(rbm.visible_values(x, units)).detach()
    field_BCHW = (field_BCHW + noise(field_BCHW) / bottom.step) / heat
    above = noise(torch.empty(len(x), 5))
    squash = torch.sigmoid if units == "binary" else torch.tanh

    def latents(h_BCHW):
        field = (F.linear(h_BCHW.flatten(1), top.weight, top.hidden_bias) + above / top.step) / heat
        return squash(field)

    start = squash(field_BCHW) if tensor == "after" else field_BCHW
    jacobian = torch.autograd.functional.jacobian(
        (lambda h: latents(h).sum(0)) if tensor == "after" else (lambda a: latents(squash(a)).sum(0)), start
    )
    alpha_BIC = jacobian.mean((3, 4)).transpose(0, 1)
    values = field_BCHW if tensor == "before" else squash(field_BCHW)
    map_BIHW = torch.einsum("bic,bchw->bihw", alpha_BIC, values).relu()
    torch.testing.assert_close(result.map_BIHW, map_BIHW)
    assert result.map_BYX.shape == (4, 6, 6)
    assert result.map_BIHW.max() > 0


@pytest.mark.parametrize("make", [flat_stack, conv_stack])
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_attention_takes_every_route_through_a_stack(make, temperature):
    stack, x = make(), images()

    def encode(x):
        return stack.encode(x, temperature, None if temperature is None else seeded(5))

    alphas = [attention(encode, stack.maps[0], x, route=route).alpha_BIC for route in ("pooled", "batched", "loop")]
    torch.testing.assert_close(alphas[0], alphas[2])
    torch.testing.assert_close(alphas[1], alphas[2])


def test_attention_at_a_fully_connected_layer_is_on_a_grid_without_meaning():
    stack, x = flat_stack(), images()
    result = attention(stack.encode, "maps.0", x)
    assert result.values_BCHW.shape == (4, 1, 3, 4)
    torch.testing.assert_close(result.values_BCHW.flatten(1), stack.layers[0].hidden_fields(x.flatten(1)).detach())
    assert [attention(stack.encode, f"maps.{n}", x).values_BCHW.shape[1:] for n in (1,)] == [(1, 1, 7)]


def test_attention_where_the_top_layer_is_convolutional():
    stack = randomised(Stack([ConvRBM((1, 6, 6), filters=3, kernel=3, stride=2)], (1, 6, 6)))
    result = attention(stack.encode, "maps.0", images(), latents=[0, 7])
    assert result.latents_BD.shape == (4, 12)
    assert result.map_BIYX.shape == (4, 2, 6, 6)


# --- training of a stack ---------------------------------------------------------------------------------------------


def make_stack(filters=3, units="binary"):
    return Stack([ConvRBM((1, 6, 6), filters, 3, 2, units), RBM(4 * filters, 5, units), RBM(5, 2, units)], (1, 6, 6))


STACK_RECIPE = replace(RECIPE, persistent=True)


def fit_stack(checkpoint=None, **options):
    """Three machines, three epochs each of four steps."""
    stack, x = training.build(make_stack, 3), bars(41)
    options = {"recipe": STACK_RECIPE, "epochs": 3, "seed": 2, "progress": False, "checkpoint": checkpoint} | options
    return stack, contrastive.train_stack(stack, x[8:], x[:8], **options)


def test_a_stack_is_trained_from_the_bottom_up_on_means():
    stack, histories = fit_stack()
    alone, values = training.build(make_stack, 3), rbm.visible_values(bars(41), "binary")
    for layer, trained, history in zip(alone.layers, stack.layers, histories, strict=True):
        v = values.reshape(41, *layer.visible_shape)
        contrastive.start_biases(layer, v[8:])
        expected = contrastive.train(layer, v[8:], v[:8], STACK_RECIPE, epochs=3, seed=2, progress=False)
        for ours, theirs in zip(trained.parameters(), layer.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs)
        assert history.free_energy_gap == pytest.approx(expected.free_energy_gap, rel=1e-3, abs=1e-4)
        values = layer.hidden_logits(v).sigmoid().detach()


@pytest.mark.parametrize("last", [1, 12, 13, 23, 24, 35])
def test_a_stack_resumes_in_every_machine(tmp_path, last):
    expected, expected_histories = fit_stack()
    with killed_after(last), pytest.raises(KilledError):
        fit_stack(tmp_path / "of", checkpoint_seconds=0.0)
    for killed in (killed_after(36 - last), killed_after(0)):  # the second time all is read, nothing trained
        with killed:
            stack, histories = fit_stack(tmp_path / "of")
        for index in range(3):
            ours = (stack.layers[index], histories[index])
            assert_same_training(ours, (expected.layers[index], expected_histories[index]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["of0", "of1", "of2"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path))
    return tmp_path


def trained(make=make_stack, **options):
    x = bars(41)
    options = {"train_NCYX": x[8:], "validation_NCYX": x[:8], "recipe": STACK_RECIPE, "epochs": 3, "seed": 3} | options
    return weights.trained(make, **options, device=torch.device("cpu"), progress=False)


def stored(cache):
    return sorted(path.name.partition(".")[2] for path in cache.iterdir())


def test_a_trained_stack_is_read_from_the_cache(cache):
    first = trained()
    (cache / f"{first.file}.123.tmp").touch()  # by a process that was killed
    with killed_after(0):
        again = trained()
    assert (again.key, again.reused) == (first.key, True)
    assert not again.model.training
    assert_same_training((again.model, again.history[2]), (first.model, first.history[2]))
    expected, _ = fit_stack(seed=3)
    assert_same_training((first.model, first.history[0]), (expected, first.history[0]))
    assert stored(cache) == ["lock", "safetensors"]


def test_a_killed_training_goes_on_from_the_cache(cache, monkeypatch):
    expected = trained()
    for path in cache.iterdir():
        path.unlink()
    with killed_after(14), pytest.raises(KilledError):
        trained()
    with killed_after(24):  # the first machine is whole, the second begins again
        again = trained()
    assert_same_training((again.model, again.history[1]), (expected.model, expected.history[1]))
    assert stored(cache) == ["lock", "safetensors"]


@pytest.mark.parametrize(
    "options",
    [
        {"seed": 4},
        {"epochs": 2},
        {"recipe": replace(STACK_RECIPE, steps=2)},
        {"train_NCYX": bars(42)[9:]},
        {"validation_NCYX": bars(42)[34:]},
        {"make": partial(make_stack, units="spin")},
        {"make": partial(make_stack, filters=2)},
    ],
)
def test_what_determines_a_stack_is_part_of_its_key(cache, options):
    assert trained(**options).key != trained().key
    assert len(list(cache.glob("*.safetensors"))) == 2


def test_the_source_and_the_epochs_of_a_recipe_do_not_determine_a_stack(cache):
    assert trained(recipe=replace(STACK_RECIPE, source="another", epochs=7)).key == trained().key


def test_the_version_of_the_protocol_determines_a_stack(cache, monkeypatch):
    before = trained().key
    monkeypatch.setitem(protocols.VERSIONS, "RBM", 7)
    assert trained().key != before


def test_a_stack_is_trained_in_float32_alone(cache):
    with pytest.raises(
        ValueError, match="stacks of Boltzmann machines are trained in float32; got precision='bfloat16'"
    ):
        trained(precision="bfloat16")


def test_a_damaged_file_is_named(cache):
    path = cache / trained().file
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=rf"{path.name} is damaged \(.*\); delete it and run again"):
        trained()


def test_a_full_disk_keeps_the_last_checkpoint(cache, monkeypatch, full_disk):
    written, save = [], checkpoints.save_file

    def limited(tensors, path, metadata):
        with full_disk() if len(written) == 2 else nullcontext():
            save(tensors, path, metadata)
        written.append(path)

    monkeypatch.setattr(checkpoints, "save_file", limited)
    with pytest.raises(OSError, match=r"\.checkpoint2 could not be written \(.*\); nothing was lost, "):
        trained()
    assert stored(cache) == ["checkpoint0", "checkpoint1", "lock"]
    monkeypatch.setattr(checkpoints, "save_file", save)
    with killed_after(12):  # the last machine alone
        trained()


def test_where_the_cache_cannot_be_written_a_stack_is_trained_without(monkeypatch, read_only, open_place, capsys):
    monkeypatch.setenv("EXPVAE_CACHE", str(open_place / "cache"))
    expected = trained()
    with read_only(open_place / "cache"), killed_after(0):
        again = trained()
    assert_same_training((again.model, again.history[1]), (expected.model, expected.history[1]))
    assert capsys.readouterr().err == ""

    (open_place / "cache" / expected.file).unlink()
    with killed_after(14), pytest.raises(KilledError):
        trained()
    before = sorted((open_place / "cache").rglob("*"))
    with read_only(open_place / "cache"):
        again = trained()
    assert_same_training((again.model, again.history[1]), (expected.model, expected.history[1]))
    assert (again.key, again.file) == (expected.key, expected.file)
    assert sorted((open_place / "cache").rglob("*")) == before
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"Trained weights cannot be kept in {open_place}/cache (Permission denied): ")

    (open_place / "file").touch()
    monkeypatch.setenv("EXPVAE_CACHE", str(open_place / "file" / "cache"))
    again = trained()
    assert_same_training((again.model, again.history[1]), (expected.model, expected.history[1]))
    assert "/file/cache (Not a directory): " in capsys.readouterr().err


# --- the chapter ------------------------------------------------------------------------------------------------------


def job(**given):
    wanted = {"layer": 1, "units": "binary", "device": "cpu", "seed": 0, "epochs": 1} | given
    return chapters.Job("rbm", wanted, runs.Run("rbm", wanted, {"losses": {}}, BOOK))


def test_the_recipe_of_the_second_reports_code():
    layers = jobs.networks("report2_code", "binary")["stacked RBM"]().layers
    sizes = [(layer.visible_shape[0], layer.hidden_shape[0]) for layer in layers]
    above = [784, 625, 484, 324, 256, 169, 64, 36]
    assert sizes == list(zip([784, *above[:-1]], above, strict=True))


def test_a_layer_that_the_stack_has_not_is_refused():
    digits = load("sample", 1, "liu2020")
    assert jobs.fit(job(recipe="report2_code", layer=8), digits).keys() == jobs.fit(job(layer=3), digits).keys()
    with pytest.raises(ValueError, match=r"^layer=4 must be 1 to 3, the machines of recipe='ours'$"):
        jobs.fit(job(layer=4), digits)


@pytest.mark.parametrize("recipe", sorted(RECIPES))
def test_curves_are_drawn_per_visible_unit(recipe):
    stacks = {name: make() for name, make in jobs.networks(recipe, "spin").items() if name in names.STACKS}
    expected = {
        f"{name}, machine {number}": math.prod(machine.visible_shape)
        for name, stack in stacks.items()
        for number, machine in enumerate(stack.layers, 1)
    }
    assert visible_units(recipe) == expected


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_the_score_of_the_second_reports_code_is_constant(temperature):
    x_BCYX = torch.rand(6, 1, 28, 28, generator=seeded(4))
    stack = Stack([randomised(RBM(784, 12), 0.05).float(), randomised(RBM(12, 9)).float()])
    x_BCYX.requires_grad_()

    # In the words of the code: a sample of torch's relaxed one-hot distribution, of units as logits.
    torch.manual_seed(5)
    theirs_BD = torch.distributions.RelaxedOneHotCategorical(temperature, logits=stack.encode(x_BCYX)).rsample()
    ours_BD = jobs.one_hot_sample(stack.encode(x_BCYX), temperature, seeded(5))
    for sample_BD in (theirs_BD, ours_BD):
        assert sample_BD.sum(1).tolist() == pytest.approx([1] * 6, rel=1e-6)
        assert torch.autograd.grad(sample_BD.sum(), x_BCYX)[0].abs().max() <= 1e-6

    rows = {row["method"]: row for row in jobs.gradient_rows(stack, x_BCYX.detach(), 0)}
    of_sum = torch.autograd.grad(stack.encode(x_BCYX).sum(), x_BCYX)[0].abs().max().item()
    assert of_sum > 1e-3
    assert rows["sum of the latents"]["value"] == pytest.approx(of_sum)
    assert 0 <= rows["one-hot score"]["value"] <= 1e-6


def test_the_one_hot_sample_is_that_of_torch_distributions():
    """Each unit's mean over many samples, which the score adds up to one."""
    h_BD = torch.tensor([[0.1, 0.9, 0.4]]).expand(20_000, 3)
    ours = jobs.one_hot_sample(h_BD, 0.5, seeded(6)).mean(0)
    torch.manual_seed(7)
    expected = torch.distributions.RelaxedOneHotCategorical(0.5, logits=h_BD).sample().mean(0)
    assert ours.max() - ours.min() > 0.1
    torch.testing.assert_close(ours, expected, rtol=0, atol=0.012)


def test_units_on_a_grid_of_the_size_of_the_images_are_no_map():
    digits = load("sample", 1, "liu2020")
    maps = {name: torch.rand(digits.test_NYX.shape, generator=seeded()) for name in ("map", "grid", "restored")}
    maps |= {name: torch.rand(len(digits.test_NYX), generator=seeded()) for name in jobs.IMAGE_SCORES}
    assert {row["method"] for row in jobs.pixel_rows(maps, digits, 0)} == {"map", "truth"}


@pytest.mark.parametrize("units", UNITS)
def test_the_chapter_measures_each_layer_of_a_stack(units):
    machines = [RBM(784, 12, units), RBM(12, 9, units), RBM(9, 4, units)]
    stack, digits = Stack([randomised(machine, 0.05).float() for machine in machines]), load("sample", 1, "liu2020")
    x_NCYX, levels, is_outlier_N = digits.test_NYX[:, None] / 255, digits.held_out_NCYX / 255, digits.label_N != 1
    truth_NYX = ink_truth(x_NCYX[is_outlier_N, 0], digits.inlier_NCYX[:, 0] / 255, 1)
    rows = jobs.layer_rows(stack, replace(digits, batch=len(x_NCYX)), 0)
    got = {(row["metric"], row["method"]): row["value"] for row in rows}

    expected = {}
    v, held_out = stack.visible(x_NCYX), stack.visible(levels)
    with torch.no_grad():
        for number, machine in enumerate(machines, 1):
            energy_N = machine.free_energy(v)
            expected["image AUROC", f"free energy, machine {number}"] = roc_auc_score(is_outlier_N, energy_N)
            v, held_out = machine.activate(machine(v)), machine.activate(machine(held_out))
            down = held_out
            for below in reversed(machines[:number]):
                p = below.visible_logits(down).sigmoid()
                down = p if units == "binary" else 2 * p - 1
            error = (p.view_as(levels) - levels).square().mean()
            expected["reconstruction error", f"stacked RBM, layers up to {number}"] = float(error)
    for number in (1, 2, 3):
        for tensor in ("before", "after"):
            how = Method(score="sum_of_means", normaliser="batch", channels="abs_of_sum", tensor=tensor)
            map_NYX = attention(stack.encode, f"maps.{number - 1}", x_NCYX, how).map_BYX[is_outlier_N]
            name = f"attention, layer {number}, {tensor} activation"
            expected["pixel AUROC", name] = roc_auc_score(truth_NYX.flatten(), map_NYX.flatten())
    assert got == pytest.approx(expected, abs=1e-5)
    assert {row["subset"] for row in rows if row["metric"] != "reconstruction error"} == {"all outliers"}


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RBM(6, 4, "ternary"), "units='ternary' is unknown; choose one of: binary, spin"),
        (lambda: RBM(0, 4), "visible=0 must be 1 or more"),
        (lambda: RBM(6, 0), "hidden=0 must be 1 or more"),
        (lambda: ConvRBM((1, 5, 9), 2, 6), "kernel=6 is larger than the image, 5x9"),
        (lambda: ConvRBM((1, 5, 9), 2, 3, 0), "stride=0 must be 1 or more"),
        (lambda: RBM(6, 4)(torch.zeros(1, 6), 0.0, seeded()), "temperature=0.0 must be positive"),
        (
            lambda: ConvRBM((1, 5, 9), 2, 3)(torch.zeros(1, 1, 5, 9), -1.0, seeded()),
            "temperature=-1.0 must be positive",
        ),
        (lambda: RBM(6, 4)(torch.zeros(1, 6), 1.0), "temperature and generator belong together"),
        (lambda: RBM(6, 4)(torch.zeros(1, 6), None, seeded()), "temperature and generator belong together"),
        (lambda: replace(RECIPE, steps=0), "steps=0 must be 1 or more"),
        (lambda: replace(RECIPE, batch_size=0), "batch_size=0 must be 1 or more"),
        (lambda: Stack([]), "layers must hold at least one machine, got none"),
        (lambda: Stack([RBM(784, 3), RBM(3, 2, "spin")]), "layers must have the same units, got: binary, spin"),
        (lambda: Stack([RBM(784, 3), RBM(4, 2)]), r"layers\[1\] has visible units of shape \[4\], but .* has \[3\]"),
        (lambda: Stack([RBM(36, 3)]), r"layers\[0\] has visible units of shape \[36\], but .* has \[1, 28, 28\]"),
    ],
)
def test_bad_input_gets_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
