import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from expvae import elbo_terms, kl_divergence, reconstruction_loss, sample_latents
from expvae.models import MNISTVAE, Report2MVTecVAE
from expvae_book import checkpoints, training
from expvae_book.augmentation import turned_at_load
from expvae_book.recipes import MNIST, MVTEC, UCSD, Recipe

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE = Recipe(source="test", epochs=0, batch_size=8, learning_rate=1e-3, latent_dim=3)
INITIAL = 7


class TinyVAE(nn.Module):
    """Convolutions, for their memory layout, and few weights."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, stride=2, padding=1)
        self.heads = nn.Linear(64, 6)
        self.linear = nn.Linear(3, 64)
        self.deconv = nn.ConvTranspose2d(4, 1, 4, stride=2, padding=1)

    def encode(self, x_BCYX):
        return self.heads(self.conv(x_BCYX).relu().flatten(1)).chunk(2, dim=1)

    def decode(self, z_BI):
        return self.deconv(self.linear(z_BI).relu().unflatten(1, (4, 4, 4)))


class EventfulVAE(TinyVAE):
    """Calls `event` with the number of the training step, from 1, before the step."""

    def __init__(self, event):
        super().__init__()
        self.event, self.steps = event, 0

    def encode(self, x_BCYX):
        if self.training:
            self.steps += 1
            self.event(self.steps)
        return super().encode(x_BCYX)


def discs(count, size):
    """Grey discs with soft rims; integers only, so that every machine draws the same bytes."""
    y_Y1, x_1X = torch.arange(size)[:, None], torch.arange(size)[None]
    images = []
    for n in range(count):
        centre_y, centre_x, radius = 3 + n * 5 % (size - 5), 2 + n * 7 % (size - 4), 2 + n % 5
        squared = (y_Y1 - centre_y) ** 2 + (x_1X - centre_x) ** 2
        images.append((255 - 40 * (squared - radius**2)).clamp(0, 255))
    return torch.stack(images)[:, None].to(torch.uint8)


def fit(checkpoint=None, event=lambda step: None, **options):
    """Train on 52 small images in steps of 8: seven steps an epoch, the last of four images."""
    images = discs(60, 8)
    model = training.build(lambda: EventfulVAE(event), INITIAL)
    options = {"recipe": RECIPE, "epochs": 10, "seed": 1, "progress": False} | options
    history = training.train(model, images[8:], images[:8], checkpoint=checkpoint, **options)
    return model, history


def assert_same_training(ours, theirs):
    (model, history), (other, other_history) = ours, theirs
    for (name, value), other_value in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(value, other_value), name
    assert vars(history) | {"seconds": 0} == vars(other_history) | {"seconds": 0}


# --- the two terms ---------------------------------------------------------------------------------------------------


def test_reconstruction_loss_is_the_cross_entropy_of_the_probabilities():
    generator = torch.Generator().manual_seed(0)
    logits_BCYX = 3 * torch.randn(4, 2, 5, 6, generator=generator, dtype=torch.float64)
    x_BCYX = torch.rand(4, 2, 5, 6, generator=generator, dtype=torch.float64)
    expected = F.binary_cross_entropy(logits_BCYX.sigmoid(), x_BCYX, reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(reconstruction_loss(logits_BCYX, x_BCYX), expected, rtol=1e-12, atol=0)


def test_kl_divergence_equals_that_of_torch_distributions():
    generator = torch.Generator().manual_seed(0)
    mu_BI, logvar_BI = 2 * torch.randn(2, 5, 4, generator=generator, dtype=torch.float64)
    posterior = torch.distributions.Normal(mu_BI, (0.5 * logvar_BI).exp())
    prior = torch.distributions.Normal(torch.zeros_like(mu_BI), torch.ones_like(mu_BI))
    expected = torch.distributions.kl_divergence(posterior, prior)
    torch.testing.assert_close(kl_divergence(mu_BI, logvar_BI), expected, rtol=1e-12, atol=1e-14)


def test_latents_are_drawn_from_the_posterior():
    mu_BI, logvar_BI = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, math.log(9)]])
    z_NI = sample_latents(mu_BI.expand(50_000, 2), logvar_BI.expand(50_000, 2), torch.Generator())
    torch.testing.assert_close(z_NI.mean(0), mu_BI[0], rtol=0, atol=0.06)
    torch.testing.assert_close(z_NI.var(0), logvar_BI[0].exp(), rtol=0.03, atol=0)


def test_elbo_terms_decode_a_sample_of_the_posterior():
    model, x_BCYX = training.build(TinyVAE, 0), training.to_unit(discs(5, 8))
    reconstruction_B, kl_B = elbo_terms(model, x_BCYX, torch.Generator().manual_seed(3))
    mu_BI, logvar_BI = model.encode(x_BCYX)
    noise_BI = torch.randn(5, 3, generator=torch.Generator().manual_seed(3))
    p_BCYX = model.decode(mu_BI + logvar_BI.exp().sqrt() * noise_BI).sigmoid()
    expected = F.binary_cross_entropy(p_BCYX, x_BCYX, reduction="none").sum((1, 2, 3))
    torch.testing.assert_close(reconstruction_B, expected)
    torch.testing.assert_close(kl_B, 0.5 * (mu_BI**2 + logvar_BI.exp() - 1 - logvar_BI).sum(1))


def test_to_unit_maps_bytes_to_the_unit_interval():
    x_BCYX = torch.tensor([0, 51, 255], dtype=torch.uint8).reshape(1, 1, 1, 3)
    assert training.to_unit(x_BCYX).flatten().tolist() == pytest.approx([0, 0.2, 1])


def test_validation_is_the_mean_over_images_with_the_same_noise_every_time(monkeypatch):
    monkeypatch.setattr(training, "VALIDATION_BATCH", 4)
    model, x_NCYX = training.build(TinyVAE, 0).train(), discs(10, 8)
    reconstruction, kl = training.validate(model, x_NCYX)
    assert training.validate(model, x_NCYX) == (reconstruction, kl)
    assert model.training
    generator = torch.Generator().manual_seed(0)
    parts = [elbo_terms(model, training.to_unit(x), generator) for x in x_NCYX.split(4)]  # 4, 4 and 2 images
    assert reconstruction == pytest.approx(torch.cat([part[0] for part in parts]).mean().item())
    assert kl == pytest.approx(torch.cat([part[1] for part in parts]).mean().item())


# --- the split and the initial weights -------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "fraction", "held"), [(10, 0.1, 1), (57, 0.25, 14), (6131, 0.1, 613)])
def test_hold_out_is_a_partition(count, fraction, held):
    train, validation = training.hold_out(count, fraction)
    assert len(validation) == held
    assert torch.cat([train, validation]).sort().values.tolist() == list(range(count))
    assert train.tolist() == sorted(train.tolist())
    assert validation.tolist() == sorted(validation.tolist())


def test_hold_out_depends_on_its_own_seed_alone():
    torch.manual_seed(0)
    first = training.hold_out(100)
    torch.manual_seed(1)
    assert training.hold_out(100)[1].tolist() == first[1].tolist()
    assert training.hold_out(100, seed=1)[1].tolist() != first[1].tolist()
    assert first[1].tolist() != list(range(10))


@pytest.mark.parametrize(("count", "fraction"), [(4, 0.1), (10, 0.0), (10, 1.0), (0, 0.1), (10, -0.5), (10, 2.0)])
def test_hold_out_refuses_an_empty_part(count, fraction):
    with pytest.raises(ValueError, match=rf"fraction={fraction} of {count} images leaves no training or no validation"):
        training.hold_out(count, fraction)


def test_initial_weights_depend_on_the_seed_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = training.build(TinyVAE, 1).state_dict()
    assert torch.equal(torch.rand(3), expected)  # the global generator goes on as if nothing had been drawn
    again, other = training.build(TinyVAE, 1).state_dict(), training.build(TinyVAE, 2).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


# --- golden losses ---------------------------------------------------------------------------------------------------

# A smaller learning rate than the recipe's keeps rounding errors small: 20 steps of 1e-3 make 1e-7 into 1e-3.
GOLDEN_RECIPE = replace(MNIST["liu2020"], batch_size=16, learning_rate=1e-4)
# Reconstruction and KL, summed over the images of each of 20 steps: four steps an epoch, the last of eight images.
GOLDEN_STEPS = [
    (8107.277, 0.299933),
    (7960.291, 0.349601),
    (7847.311, 0.553039),
    (3812.362, 0.387292),
    (7531.614, 1.24502),
    (7373.702, 1.89149),
    (7283.999, 3.08832),
    (3622.221, 2.41634),
    (6945.315, 7.1015),
    (6689.869, 10.0707),
    (6505.974, 15.8686),
    (3113.882, 11.3535),
    (5914.395, 33.2291),
    (5717.999, 49.7371),
    (5461.439, 75.1617),
    (2654.192, 53.8758),
    (4529.839, 135.573),
    (4585.084, 204.204),
    (5074.125, 321.412),
    (1912.026, 154.855),
]
GOLDEN_VALIDATION = (274.20373, 23.110507)


@pytest.fixture(scope="module")
def golden_run():
    """Twenty steps of the MNIST VAE as the library takes them: the losses of each step, and the history."""
    images, steps, terms = discs(64, 28), [], elbo_terms
    model = training.build(MNISTVAE, 0)

    def recorded(model, x_BCYX, generator):
        result = terms(model, x_BCYX, generator)
        if model.training:
            steps.append([term_B.sum().item() for term_B in result])
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "elbo_terms", recorded)
        history = training.train(model, images[:56], images[56:], GOLDEN_RECIPE, epochs=5, seed=0, progress=False)
    return torch.tensor(steps), history


def plain_loop():
    """The same twenty steps in plain PyTorch."""
    images = discs(64, 28).float() / 255
    torch.manual_seed(0)
    model = MNISTVAE()
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, foreach=False, fused=False)
    generator, steps = torch.Generator().manual_seed(0), []
    for _ in range(5):
        for chosen in torch.randperm(56, generator=generator).split(16):
            x = images[chosen]
            mu, logvar = model.encode(x)
            z = mu + logvar.mul(0.5).exp() * torch.randn(len(x), 32, generator=generator)
            reconstruction = F.binary_cross_entropy(model.decode(z).sigmoid(), x, reduction="sum")
            kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum()
            adam.zero_grad()
            (reconstruction + kl).backward()
            adam.step()
            steps.append([reconstruction.item(), kl.item()])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        mu, logvar = model.encode(images[56:])
        z = mu + logvar.mul(0.5).exp() * torch.randn(8, 32, generator=generator)
        reconstruction = F.binary_cross_entropy(model.decode(z).sigmoid(), images[56:], reduction="sum") / 8
        kl = -0.5 * (1 + logvar - mu**2 - logvar.exp()).sum() / 8
    return torch.tensor(steps), (reconstruction.item(), kl.item())


def test_golden_losses_of_twenty_steps(golden_run):
    steps, history = golden_run
    torch.testing.assert_close(steps, torch.tensor(GOLDEN_STEPS), rtol=1e-4, atol=1e-4)
    assert (history.validation_reconstruction[-1], history.validation_kl[-1]) == pytest.approx(GOLDEN_VALIDATION, 1e-4)


def test_twenty_steps_equal_a_plain_loop(golden_run):
    steps, history = golden_run
    expected, validation = plain_loop()
    torch.testing.assert_close(steps, expected, rtol=1e-4, atol=1e-4)
    assert (history.validation_reconstruction[-1], history.validation_kl[-1]) == pytest.approx(validation, 1e-4)
    per_epoch = expected.reshape(5, 4, 2).sum(1) / 56
    torch.testing.assert_close(torch.tensor([history.reconstruction, history.kl]).T, per_epoch, rtol=1e-4, atol=1e-4)
    assert history.images == 5 * 56
    assert len(history.validation_kl) == 5


# --- the weights of the terms ----------------------------------------------------------------------------------------


class OneMean(nn.Module):
    """Only the KL term depends on its one weight: its gradient is (KL weight) x (number of images, or 1) x μ."""

    def __init__(self):
        super().__init__()
        self.mu = nn.Parameter(torch.tensor([[2.0]]))
        self.gradients = []
        self.mu.register_hook(lambda gradient: self.gradients.append((gradient / self.mu).item()))

    def encode(self, x_BCYX):
        mu_BI = self.mu.expand(len(x_BCYX), 1)
        return mu_BI, torch.zeros_like(mu_BI)

    def decode(self, z_BI):
        return torch.zeros(len(z_BI), 1, 8, 8)


def gradients(recipe, epochs):
    model, images = OneMean(), discs(28, 8)
    training.train(model, images[:20], images[20:], recipe, epochs=epochs, seed=0, progress=False)
    return model.gradients


def test_mean_divides_the_gradient_by_the_number_of_images():
    assert gradients(RECIPE, 2) == pytest.approx([8, 8, 4, 8, 8, 4])
    assert gradients(replace(RECIPE, reduction="mean"), 2) == pytest.approx([1, 1, 1, 1, 1, 1])


def test_kl_warm_up_rises_linearly_to_one_and_stays_there():
    recipe = replace(RECIPE, reduction="mean", kl_warmup_epochs=2)
    assert gradients(recipe, 3) == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1, 1, 1], abs=1e-6)


def test_beta_weighs_the_kl_term_after_the_warm_up_too():
    recipe = replace(RECIPE, reduction="mean", beta=0.25)
    assert gradients(recipe, 2) == pytest.approx([0.25] * 6)
    warm = replace(recipe, kl_warmup_epochs=1)
    assert gradients(warm, 2) == pytest.approx([0, 0.25 / 3, 0.5 / 3, 0.25, 0.25, 0.25], abs=1e-6)


class LogitsVAE(TinyVAE):
    """TinyVAE with the 32 latents of the reports."""

    def __init__(self):
        super().__init__()
        self.heads, self.linear = nn.Linear(64, 64), nn.Linear(32, 64)


class PixelsVAE(LogitsVAE):
    reconstruction_loss = staticmethod(Report2MVTecVAE.reconstruction_loss)


@pytest.mark.parametrize(("table", "vae"), [(MNIST, LogitsVAE), (UCSD, LogitsVAE), (MVTEC, PixelsVAE)])
def test_the_loss_of_the_second_reports_code(table, vae):
    """The gradient of a whole batch's first step is that of the loss as the code writes it."""
    recipe, found = table["report2_code"], {}
    images = discs(recipe.batch_size + 2, 8)
    ours, theirs = (training.build(vae, INITIAL) for _ in range(2))
    for name, parameter in ours.named_parameters():
        parameter.register_hook(lambda gradient, name=name: found.update({name: gradient.clone()}))
    training.train(ours, images[2:], images[:2], recipe, epochs=1, seed=0, progress=False)

    generator = torch.Generator().manual_seed(0)
    x_BCYX = images[2:][torch.randperm(recipe.batch_size, generator=generator)] / 255
    mu_BI, logvar_BI = theirs.encode(x_BCYX)
    posterior = torch.distributions.Normal(mu_BI, (logvar_BI / 2).exp())
    decoded_BCYX = theirs.decode(mu_BI + posterior.scale * torch.randn(mu_BI.shape, generator=generator))
    if vae is PixelsVAE:  # images and what is decoded from 0 to 1, there from -1 to 1
        loss = F.mse_loss(2 * decoded_BCYX - 1, 2 * x_BCYX - 1)
    else:
        loss = F.binary_cross_entropy(decoded_BCYX.sigmoid(), x_BCYX, reduction="sum")
    # There one sample of log q - log p stands for the KL divergence, its expectation.
    prior = torch.distributions.Normal(torch.zeros_like(mu_BI), torch.ones_like(mu_BI))
    (loss + 0.1 * torch.distributions.kl_divergence(posterior, prior).mean()).backward()
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-3, atol=1e-6 * parameter.grad.abs().max())


@pytest.mark.parametrize("name", ["learning_rate", "betas", "epsilon"])
def test_the_recipe_reaches_adam(name):
    changed = replace(RECIPE, **{name: {"learning_rate": 2e-3, "betas": (0.5, 0.9), "epsilon": 1.0}[name]})
    images = discs(16, 8)
    ours, theirs = (training.build(TinyVAE, INITIAL) for _ in range(2))
    training.train(ours, images[:8], images[8:], changed, epochs=2, seed=0, progress=False)

    adam = torch.optim.Adam(theirs.parameters(), changed.learning_rate, changed.betas, changed.epsilon, fused=False)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        chosen = torch.randperm(8, generator=generator)
        adam.zero_grad()
        sum(elbo_terms(theirs, training.to_unit(images[chosen]), generator)).sum().backward()
        adam.step()
    for value, expected in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5)


# --- cut off and resumed ---------------------------------------------------------------------------------------------


def slow_child(folder):
    """Train; write a checkpoint at step 31 and wait for the end at step 34."""

    def event(step):
        if step == 31:
            time.sleep(1)
        if step == 34:
            (folder / "waiting").touch()
            time.sleep(600)

    torch.set_num_threads(1)
    fit(folder / "checkpoint", event, checkpoint_seconds=1.0)


def test_a_killed_run_ends_with_the_weights_of_one_that_was_not(tmp_path):
    command = f"import pathlib, test_training; test_training.slow_child(pathlib.Path({str(tmp_path)!r}))"
    child = subprocess.Popen([sys.executable, "-c", command], cwd=Path(__file__).parent)
    try:
        limit = time.monotonic() + 300
        while not (tmp_path / "waiting").exists():
            assert child.poll() is None, "the training ended before it could be killed"
            assert time.monotonic() < limit
            time.sleep(0.05)
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    assert child.returncode == -signal.SIGKILL
    step = int(checkpoints.read_tensors(tmp_path / "checkpoint")[1]["step"])
    assert 31 <= step <= 33  # in the middle of the fifth epoch, steps 29 to 35

    resumed_steps = []
    resumed = fit(tmp_path / "checkpoint", resumed_steps.append)
    assert len(resumed_steps) == 70 - step
    assert_same_training(resumed, fit())


@pytest.mark.parametrize("last", [1, 6, 7, 8, 14, 20])
def test_a_run_resumes_from_every_kind_of_step(tmp_path, last):
    """After the first step, around the end of an epoch, and around a report, with KL warm-up and mean reduction."""

    def interrupt(step):
        if step > last:
            raise KeyboardInterrupt

    options = {"recipe": replace(RECIPE, reduction="mean", kl_warmup_epochs=2), "epochs": 3}
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "checkpoint", interrupt, checkpoint_seconds=0.0, **options)
    assert int(checkpoints.read_tensors(tmp_path / "checkpoint")[1]["step"]) == last
    assert_same_training(fit(tmp_path / "checkpoint", **options), fit(**options))


def test_images_are_turned_anew_in_every_epoch_and_after_a_resumption_as_without(tmp_path):
    seen = []

    def turned_and_seen(x_BCYX, generator):
        seen.append(turned_at_load(x_BCYX, generator))
        return seen[-1]

    def interrupt(step):
        if step > 8:
            raise KeyboardInterrupt

    options = {"vary": turned_and_seen, "epochs": 2}
    expected = fit(**options)
    assert len(seen) == 2 * 7
    sums = [sorted(torch.cat(part).sum((1, 2, 3)).tolist()) for part in (seen[:7], seen[7:])]
    assert sums[0] != sums[1]
    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path / "checkpoint", interrupt, checkpoint_seconds=0.0, **options)
    assert_same_training(fit(tmp_path / "checkpoint", **options), expected)


def test_another_seed_gives_another_training():
    weights = [fit(seed=seed, epochs=1)[0].state_dict() for seed in (1, 2)]
    assert not torch.equal(weights[0]["conv.weight"], weights[1]["conv.weight"])


def test_a_failed_write_leaves_the_earlier_file_alone(tmp_path, monkeypatch, full_disk):
    path = tmp_path / "weights"
    checkpoints.write_tensors(path, {"value": torch.ones(3)}, {"step": "1"})

    def fail(tensors, filename, metadata):
        Path(filename).write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoints, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.write_tensors(path, {"value": torch.zeros(3)}, {"step": "2"})
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]

    monkeypatch.undo()
    with full_disk(), pytest.raises(OSError, match=rf"^{path} could not be written \(.*\); nothing was lost, .*again$"):
        checkpoints.write_tensors(path, {"value": torch.zeros(99)}, {"step": "2"})
    assert [file.name for file in tmp_path.iterdir()] == ["weights"]
    tensors, metadata = checkpoints.read_tensors(path)
    assert tensors["value"].tolist() == [1, 1, 1]
    assert metadata == {"step": "1"}


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_a_file_that_is_found_damaged_is_named(tmp_path, kept):
    path = tmp_path / "weights"
    checkpoints.write_tensors(path, {"value": torch.ones(99)}, {"step": "1"})
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=rf"^{path} is damaged \(.*\); delete it and run again$"):
        checkpoints.read_tensors(path)


def test_a_changed_byte_is_found_wherever_it_lies(tmp_path):
    path, tensors = tmp_path / "weights", {"value": torch.arange(9.0), "count": torch.tensor(3)}
    checkpoints.write_tensors(path, tensors, {"step": "1"})
    content, silent = path.read_bytes(), 0
    for at in range(len(content)):
        path.write_bytes(content[:at] + bytes([content[at] ^ 0x05]) + content[at + 1 :])
        try:
            found, metadata = checkpoints.read_tensors(path)
        except ValueError as error:
            assert re.fullmatch(rf"{path} is damaged \(.*\); delete it and run again", str(error))
        else:  # but for the name under which the digest lies
            silent += 1
            assert all(torch.equal(found[name], value) for name, value in tensors.items())
            assert metadata.items() >= {"step": "1"}.items()
    assert silent <= len("sha256") + 8  # and spaces behind the header


def test_a_file_from_before_there_was_a_digest_is_read(tmp_path):
    checkpoints.save_file({"value": torch.ones(3)}, tmp_path / "weights", {"step": "1"})
    found, metadata = checkpoints.read_tensors(tmp_path / "weights")
    assert (found["value"].tolist(), metadata) == ([1, 1, 1], {"step": "1"})


def without(name):
    return lambda tensors, metadata: (tensors.pop(name, None), metadata.pop(name, None))


@pytest.mark.parametrize(
    "change",
    [
        *map(without, ("step", "total", "histories", "model/conv.weight", "generator/0")),
        lambda tensors, metadata: metadata.update(step="one"),
        lambda tensors, metadata: metadata.update(histories="[]"),
        lambda tensors, metadata: tensors.update({"model/conv.bias": tensors["model/conv.bias"][:1].clone()}),
    ],
)
def test_a_checkpoint_that_lacks_something_is_named(tmp_path, change):
    path = tmp_path / "checkpoint"
    fit(path, epochs=1, keep_last=True)
    tensors, metadata = checkpoints.read_tensors(path)
    change(tensors, metadata)
    checkpoints.write_tensors(path, tensors, metadata)
    with pytest.raises(ValueError, match=rf"^{path} is damaged \(.*\); delete it and run again$"):
        fit(path, epochs=2)


# --- how long it takes, and an early end -----------------------------------------------------------------------------


def terminate(at):
    """An event that sends the process SIGTERM before a step."""
    return lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == at else None


def test_a_training_that_is_told_to_end_ends_after_the_epoch_and_goes_on_later(tmp_path, capsys):
    before = signal.getsignal(signal.SIGTERM)
    model, history = fit(tmp_path / "checkpoint", terminate(9))
    assert model.steps == 14  # the second epoch was the one
    assert "ends at the next point where it can" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    assert_same_training((model, history), fit(epochs=2))
    resumed = fit(tmp_path / "checkpoint")
    assert resumed[0].steps == 70 - 14
    assert_same_training(resumed, fit())


def test_told_in_its_last_epoch_a_training_just_ends(tmp_path):
    assert_same_training(fit(epochs=2, event=terminate(13)), fit(epochs=2))


def test_a_second_signal_is_handled_as_ever():
    class StoppedError(Exception):
        pass

    def stop(number, frame):
        raise StoppedError

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with pytest.raises(StoppedError):
            fit(event=lambda step: terminate(step)(step) if step in (9, 11) else None)
        assert signal.getsignal(signal.SIGTERM) == stop
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_training_ends_after_the_epoch_in_which_its_minutes_are_over(monkeypatch):
    monkeypatch.setenv("EXPVAE_MINUTES", "600")
    assert fit(epochs=2)[0].steps == 14
    monkeypatch.setenv("EXPVAE_MINUTES", "1e-9")
    assert_same_training(fit(), fit(epochs=1))


@pytest.mark.parametrize("minutes", ["0", "-3", "nan", "soon"])
def test_minutes_that_are_none_are_refused(minutes, monkeypatch):
    monkeypatch.setenv("EXPVAE_MINUTES", minutes)
    message = rf"^EXPVAE_MINUTES='{minutes}' must be a number of minutes above 0, or be unset$"
    with pytest.raises(ValueError, match=message):
        fit()


def test_a_training_says_once_how_long_it_takes(capsys):
    fit(progress=True, epochs=2, event=lambda step: time.sleep(0.05))
    (said,) = re.findall(r"(\d+) steps are left at ([\d.]+) steps/s, about (\d+) seconds\.", capsys.readouterr().err)
    assert said[0] == "8"  # of 14, after one to warm up and five that are timed
    assert 0 < float(said[1]) <= 20
    assert int(said[2]) == math.ceil(8 / float(said[1]))
    fit(epochs=2)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "1 seconds"), (119.0, "119 seconds"), (720.0, "12 minutes"), (15_840.0, "4.4 hours")]
)
def test_durations_in_words(seconds, text):
    assert checkpoints.duration(seconds) == f"about {text}"


# --- divergence ------------------------------------------------------------------------------------------------------


def poisoned(step_of_nan):
    """An event that puts NaN into a weight."""

    def event(step):
        if step == step_of_nan:
            with torch.no_grad():
                model.heads.weight[0, 0] = math.nan

    model = training.build(lambda: EventfulVAE(event), INITIAL)  # `event` sees it too
    return model


@pytest.mark.parametrize("step_of_nan", [2, 11, 21])
def test_nan_stops_the_training_and_keeps_the_last_good_checkpoint(tmp_path, step_of_nan):
    model, images, checkpoint = poisoned(step_of_nan), discs(60, 8), tmp_path / "checkpoint"
    with pytest.raises(checkpoints.TrainingDivergedError) as caught:
        training.train(
            model,
            images[8:],
            images[:8],
            RECIPE,
            epochs=10,
            seed=1,
            checkpoint=checkpoint,
            checkpoint_seconds=0.0,
            progress=False,
        )
    assert str(caught.value) == (
        f"the loss or a weight is no longer finite by step {step_of_nan}: try a smaller learning_rate; "
        f"the last good checkpoint is {checkpoint}"
    )
    tensors, metadata = checkpoints.read_tensors(checkpoint)
    assert int(metadata["step"]) == step_of_nan - 1
    assert all(value.isfinite().all() for value in tensors.values())
    assert_same_training(fit(checkpoint), fit())  # the cause is gone


def test_nan_is_found_without_checkpoints():
    model, images = poisoned(9), discs(60, 8)
    with pytest.raises(checkpoints.TrainingDivergedError, match=r"by step 14: try a smaller learning_rate$"):
        training.train(model, images[8:], images[:8], RECIPE, epochs=10, seed=1, progress=False)


def test_a_last_step_that_leaves_no_finite_weights_is_found():
    images, recipe = discs(16, 8), replace(RECIPE, learning_rate=1e39)  # infinite in float32
    with pytest.raises(checkpoints.TrainingDivergedError, match=r"by step 1: try a smaller learning_rate$"):
        training.train(TinyVAE(), images[:8], images[8:], recipe, epochs=1, seed=1, progress=False)


def test_too_large_a_learning_rate_stops_with_a_sentence(tmp_path):
    checkpoint = tmp_path / "checkpoint"
    with pytest.raises(checkpoints.TrainingDivergedError, match=r"no longer finite by step \d+: try a smaller"):
        fit(checkpoint, recipe=replace(RECIPE, learning_rate=1e3), checkpoint_seconds=0.0)
    tensors, _ = checkpoints.read_tensors(checkpoint)
    assert all(value.isfinite().all() for name, value in tensors.items() if name.startswith("model/"))


def test_trainings_under_one_clock_share_their_minutes(monkeypatch):
    monkeypatch.setenv("EXPVAE_MINUTES", "0.01")  # 0.6 s
    with checkpoints.one_clock():
        time.sleep(0.7)
        with checkpoints.told_to_end(True) as due:
            assert due()
    with checkpoints.told_to_end(True) as due:
        assert not due()
