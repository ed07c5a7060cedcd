import math

import numpy as np
import pytest
import torch

from expvae_book import baselines, training


def test_input_intensity_is_the_mean_over_channels():
    x_BCYX = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.0]]]])
    assert baselines.input_intensity(x_BCYX).tolist() == [[[0.25, 0.5]]]


def test_reconstruction_error_is_the_squared_difference_averaged_over_channels():
    x_BCYX = torch.tensor([[[[0.0, 1.0]], [[0.5, 0.25]]]])
    reconstruction_BCYX = torch.tensor([[[[0.5, 0.0]], [[0.5, 0.75]]]])
    assert baselines.reconstruction_error(x_BCYX, reconstruction_BCYX).tolist() == [[[0.125, 0.625]]]


def test_mean_image_difference_equals_numpys():
    random = np.random.default_rng(0)
    train_NCYX = random.integers(0, 256, (7, 3, 4, 5), dtype=np.uint8)
    x_BCYX = random.random((2, 3, 4, 5), dtype=np.float32)
    mean_CYX = training.to_unit(torch.from_numpy(train_NCYX)).mean(0)
    ours_BYX = baselines.mean_image_difference(torch.from_numpy(x_BCYX), mean_CYX)
    theirs_BYX = np.mean((x_BCYX - np.mean(train_NCYX / 255, axis=0)) ** 2, axis=1)
    np.testing.assert_allclose(ours_BYX.numpy(), theirs_BYX, rtol=1e-5, atol=1e-7)


def test_mean_image_difference_is_nil_at_the_mean_and_blind_to_the_sign():
    mean_CYX = torch.rand(1, 4, 5, generator=torch.Generator().manual_seed(0))
    x_BCYX = mean_CYX + torch.tensor([0.0, 0.25, -0.25]).reshape(3, 1, 1, 1)
    map_BYX = baselines.mean_image_difference(x_BCYX, mean_CYX)
    expected_BYX = torch.tensor([0.0, 0.0625, 0.0625]).reshape(3, 1, 1).expand(3, 4, 5)
    torch.testing.assert_close(map_BYX, expected_BYX, rtol=0, atol=1e-6)


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


def test_position_prior_is_the_variance_of_each_pixel_and_the_expected_difference_from_the_mean():
    levels_NCYX = torch.randint(0, 256, (300, 3, 4, 5), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    map_1YX, x_NCYX = baselines.position_prior(levels_NCYX), levels_NCYX / 255
    assert map_1YX.shape == (1, 4, 5)
    np.testing.assert_allclose(map_1YX[0], x_NCYX.double().numpy().var(axis=0).mean(axis=0), rtol=1e-5)
    torch.testing.assert_close(map_1YX[0], baselines.mean_image_difference(x_NCYX, x_NCYX.mean(0)).mean(0))


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


def test_maps_are_all_baselines_by_name_in_the_form_of_attention_maps():
    images = torch.Generator().manual_seed(0)
    x_BCYX, reconstruction_BCYX = (torch.rand(4, 3, 6, 5, generator=images) for _ in range(2))
    mean_CYX = torch.rand(3, 6, 5, generator=images)
    found = baselines.maps(x_BCYX, reconstruction_BCYX, mean_CYX, torch.Generator().manual_seed(1))
    assert tuple(found) == baselines.NAMES
    expected = {
        "input intensity": x_BCYX.mean(1),
        "reconstruction error": ((x_BCYX - reconstruction_BCYX) ** 2).mean(1),
        "mean image difference": ((x_BCYX - mean_CYX) ** 2).mean(1),
        "centre prior": torch.stack([baselines.centre_prior(6, 5)[0]] * 4),
        "random": torch.rand(4, 6, 5, generator=torch.Generator().manual_seed(1)),
    }
    assert found.keys() == expected.keys()
    for name, map_BYX in found.items():
        torch.testing.assert_close(map_BYX, expected[name])


def test_maps_lie_on_the_device_of_the_images():
    # "meta" stands for any device that is not the generator's.
    x_BCYX, mean_CYX = torch.empty(4, 1, 6, 5, device="meta"), torch.empty(1, 6, 5, device="meta")
    found = baselines.maps(x_BCYX, x_BCYX, mean_CYX, torch.Generator().manual_seed(1))
    assert {map_BYX.device.type for map_BYX in found.values()} == {"meta"}
    assert {map_BYX.shape for map_BYX in found.values()} == {(4, 6, 5)}
