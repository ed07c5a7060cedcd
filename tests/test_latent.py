import numpy as np
import pytest
import torch

from expvae.metrics import active_units


def test_active_units_counts_latents_whose_mean_varies():
    spread_I = np.array([0.0, 0.05, 0.0999, 0.1001, 2.0])  # standard deviations; the threshold is 0.1 squared
    wave_N = np.sqrt(2) * np.sin(np.arange(1000) * 2 * np.pi / 1000)
    wave_N /= wave_N.std(ddof=1)
    mu_NI = torch.tensor(wave_N[:, None] * spread_I + 7.0)
    assert active_units(mu_NI) == 2
    assert active_units(mu_NI, threshold=1.0) == 1
    assert active_units(mu_NI, threshold=0.002) == 4


def test_active_units_needs_two_images():
    with pytest.raises(ValueError, match="two points or more to have a variance, got 1"):
        active_units(torch.zeros(1, 3))
