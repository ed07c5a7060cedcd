import pytest
import torch
from captum.attr import InputXGradient
from torch import nn

from expvae import gradient_times_input


@pytest.fixture
def encoder():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(2 * 5 * 4, 7), nn.Sigmoid(), nn.Linear(7, 6), nn.Tanh()).double()


@pytest.fixture
def x_BCYX():
    return torch.rand(3, 2, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("at_once", [1, 4, 100])
def test_the_map_is_that_of_captum_for_each_latent(encoder, x_BCYX, at_once, monkeypatch):
    monkeypatch.setattr("expvae._input_attention.CHUNK", at_once * x_BCYX.numel())
    explain = InputXGradient(encoder)
    expected = [explain.attribute(x_BCYX.clone().requires_grad_(), target=i).sum(1).relu() for i in range(6)]
    torch.testing.assert_close(gradient_times_input(encoder, x_BCYX), torch.stack(expected).mean(0).detach())


def test_a_pixel_that_is_zero_has_none_and_nothing_is_left_behind(encoder, x_BCYX):
    x_BCYX[:, :, 2, 1] = 0
    map_BYX = gradient_times_input(encoder, x_BCYX)
    assert (map_BYX[:, 2, 1] == 0).all()
    assert (map_BYX > 0).any()
    assert not map_BYX.requires_grad
    assert not x_BCYX.requires_grad
    assert all(parameter.grad is None for parameter in encoder.parameters())


def test_what_does_not_fit_is_refused(encoder, x_BCYX):
    with pytest.raises(ValueError, match="at least one image"):
        gradient_times_input(encoder, x_BCYX[:0])
    with pytest.raises(ValueError, match=r"latents \[B, D\] for 3 images, got \[3\]"):
        gradient_times_input(lambda x: encoder(x).sum(1), x_BCYX)
