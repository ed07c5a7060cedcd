import math

import pytest
import torch

from lib import baselines


def test_input_intensity_is_the_mean_over_channels():
    x_BCYX = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.0]]]])
    assert baselines.input_intensity(x_BCYX).tolist() == [[[0.25, 0.5]]]


def test_reconstruction_error_is_the_squared_difference_averaged_over_channels():
    x_BCYX = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.25]]]])
    reconstruction_BCYX = torch.tensor([[[[0.5, 0.0]], [[0.5, 0.75]]]])
    assert baselines.reconstruction_error(x_BCYX, reconstruction_BCYX).tolist() == [[[0.125, 0.625]]]


@pytest.mark.parametrize(("y", "x"), [(28, 28), (5, 8), (1, 3)])
def test_centre_prior_is_symmetric_and_falls_from_the_centre(y, x):
    map_YX = baselines.centre_prior(y, x)[0]
    torch.testing.assert_close(map_YX, map_YX.flip(0))
    torch.testing.assert_close(map_YX, map_YX.flip(1))
    assert map_YX.argmax() == ((y - 1) // 2) * x + (x - 1) // 2
    assert (map_YX[:, x // 2 :].diff(dim=1) < 0).all()
    assert (map_YX[y // 2 :].diff(dim=0) < 0).all()


def test_centre_prior_follows_its_equation():
    map_1YX = baselines.centre_prior(5, 8)
    assert map_1YX.shape == (1, 5, 8)
    # Row 4 is 2 pixels from the centre row, column 6 is 2.5 from the centre; sigma is 1.25 and 2 pixels.
    assert map_1YX[0, 4, 6].item() == pytest.approx(math.exp(-0.5 * ((2 / 1.25) ** 2 + (2.5 / 2) ** 2)), rel=1e-6)
    assert map_1YX.expand(3, -1, -1).shape == (3, 5, 8)


def test_random_map_is_uniform_and_repeats_with_its_generator():
    first, again, other = (
        baselines.random_map((20, 28, 28), torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert first.shape == (20, 28, 28)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.min() >= 0 and first.max() < 1
    # The mean of 15 680 uniform values has a standard deviation of 0.0023.
    assert first.mean().item() == pytest.approx(0.5, abs=0.01)
    assert first.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.01)
