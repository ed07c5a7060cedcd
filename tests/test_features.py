"""Features of a ResNet-18 and the maps made of them, against torchvision, scipy, scikit-learn and loops."""

import numpy as np
import pytest
import torch
from scipy.spatial.distance import mahalanobis
from sklearn.covariance import EmpiricalCovariance
from sklearn.neighbors import NearestNeighbors
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet18
from torchvision.transforms.functional import resize

from expvae_book import features, training
from expvae_book.data.imagenet import ImageNet

MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])


def images(n, c=3, side=32, seed=0):
    """Noise of little contrast around an image that they share."""
    random = np.random.default_rng(seed)
    shared_CYX = np.random.default_rng(99).integers(60, 190, (c, side, side))
    return torch.from_numpy((shared_CYX + random.integers(-5, 6, (n, c, side, side))).astype(np.uint8))


def fake_features(n, c=5, h=2, w=3, seed=0):
    """Correlated, of different means, and not of the same covariance at each position."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(h * w, c, c, generator=torch.Generator().manual_seed(7))
    means = 10 * torch.rand(h * w, c, generator=torch.Generator().manual_seed(8))
    A_NPC = torch.einsum("npc,pdc->npd", torch.randn(n, h * w, c, generator=generator), mixed) + means
    return A_NPC.permute(0, 2, 1).unflatten(2, (h, w))


def weights():
    """Of a ResNet-18 as ImageNet's come: trained statistics, neither classifier nor counters."""
    generator = torch.Generator().manual_seed(5)
    state = training.build(resnet18, 3).state_dict()
    for name in state:
        if "running" in name:
            state[name] = 0.5 + torch.rand(state[name].shape, generator=generator)
    return {name: value for name, value in state.items() if name[:3] != "fc." and not name.endswith("tracked")}


@pytest.fixture(scope="module")
def network():
    return features.backbone("random", images(16, side=64), 0, least=32)


def test_features_are_torchvisions_side_by_side(monkeypatch):
    monkeypatch.setattr(features.imagenet, "load", lambda: ImageNet(weights(), "ab12"))
    network = features.backbone("imagenet", images(2), 0, least=64)
    assert network.sha256 == "ab12"
    whole, seen = training.build(resnet18, 3).eval(), {}
    whole.load_state_dict(weights(), strict=False)
    for name in ("layer1", "layer2", "layer3"):
        getattr(whole, name).register_forward_hook(lambda _, __, A, name=name: seen.update({name: A.numpy().copy()}))
    x_BCYX = torch.randint(0, 256, (2, 3, 64, 96), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole(torch.from_numpy((x_BCYX.numpy() / np.float32(255) - MEAN[:, None, None]) / STD[:, None, None]))
    assert [A.shape for A in seen.values()] == [(2, 64, 16, 24), (2, 128, 8, 12), (2, 256, 4, 6)]
    times = {"layer1": 1, "layer2": 2, "layer3": 4}
    theirs = [A.repeat(times[name], axis=2).repeat(times[name], axis=3) for name, A in seen.items()]
    ours_BCHW = network(x_BCYX)
    assert not ours_BCHW.requires_grad
    np.testing.assert_allclose(ours_BCHW, np.concatenate(theirs, axis=1), rtol=1e-4, atol=1e-4)


def test_imagenets_statistics_stay_as_they_are(monkeypatch):
    monkeypatch.setattr(features.imagenet, "load", lambda: ImageNet(weights(), ""))
    first, other = (features.backbone("imagenet", images(4, seed=seed), seed) for seed in (0, 1))
    expected = {name: value for name, value in weights().items() if not name.startswith("layer4")}
    for network in (first, other):
        state = {name.removeprefix("stages."): value for name, value in network.state_dict().items()}
        assert not network.training
        assert {name for name in state if not name.endswith("tracked")} == expected.keys()
        for name, value in expected.items():
            assert torch.equal(state[name], value), name


def test_grey_images_are_repeated_and_of_any_shape(network):
    grey_B1YX = images(2, c=1)[..., :27]
    A_BCHW = network(grey_B1YX)
    assert A_BCHW.shape == (2, 448, 10, 8)  # 27 pixels become 32, and 32 become 38
    torch.testing.assert_close(A_BCHW, network(grey_B1YX.repeat(1, 3, 1, 1)))


def test_small_images_are_scaled_up_before_the_network_and_large_ones_are_not():
    network = features.backbone("random", images(4, side=28), 0)
    x_BCYX = images(2, side=28)
    standard_BCYX = (x_BCYX / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        expected_BCHW = network.stages(resize(standard_BCYX, [112, 112], antialias=False))["layer1"]
        A_BCHW = network(x_BCYX)
        assert A_BCHW.shape == (2, 448, 28, 28)
        torch.testing.assert_close(A_BCHW[:, :64], expected_BCHW, rtol=1e-4, atol=1e-4)
        assert network(images(1, side=128)).shape == (1, 448, 32, 32)


def test_random_weights_get_the_statistics_of_the_training_images(network):
    x_NCYX = images(16, side=64)
    state = training.build(lambda: features.Backbone(least=32), 0).stages
    unit_NCYX = (x_NCYX / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    with torch.no_grad():
        A_NCHW = state.conv1(unit_NCYX)
    assert torch.equal(state.conv1.weight, network.stages.conv1.weight)
    statistics = network.stages.bn1
    torch.testing.assert_close(statistics.running_mean, A_NCHW.mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(statistics.running_var, A_NCHW.var((0, 2, 3)), rtol=1e-4, atol=1e-5)
    # In evaluation mode every normalisation of the training images then gives mean 0 and variance 1, also deep inside.
    seen = {}
    for name, module in network.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda _, __, A, name=name: seen.update({name: A.clone()}))
    assert not network.training
    network(x_NCYX)
    assert len(seen) == 15
    for name, A_NCHW in seen.items():
        torch.testing.assert_close(A_NCHW.mean((0, 2, 3)), torch.zeros(A_NCHW.shape[1]), rtol=0, atol=0.05, msg=name)
        assert A_NCHW.var().item() == pytest.approx(1, abs=0.05), name


def test_statistics_are_of_every_image_once_in_even_batches():
    class Recorder(nn.BatchNorm2d):
        def forward(self, x_BCYX):
            seen.append((self.training, x_BCYX[:, 0, 0, 0].tolist()))
            return super().forward(x_BCYX.float())

    seen, n = [], 2 * features.AT_ONCE + 1
    x_NCYX = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1).expand(-1, -1, 2, 2)
    module = Recorder(1).eval()
    features.batch_statistics(module, x_NCYX, seed=0)
    assert [(training, len(batch)) for training, batch in seen] == [(True, 11)] * 3
    batches = [batch for _, batch in seen]
    assert sorted(np.ravel(batches)) == list(range(n)) != np.ravel(batches).tolist()
    assert module.running_mean.item() == pytest.approx(np.mean(batches), rel=1e-6)
    expected = np.mean([np.var(np.repeat(batch, 4), ddof=1) for batch in batches])
    assert module.running_var.item() == pytest.approx(expected, rel=1e-5)
    assert not module.training


def test_a_network_is_its_seeds_and_leaves_the_global_generator():
    before = torch.get_rng_state()
    first, again, other = (features.backbone("random", images(4), seed, least=32) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert first.sha256 == ""
    assert torch.equal(first(images(1)), again(images(1)))
    assert not torch.equal(first(images(1)), other(images(1)))


def test_what_a_network_cannot_start_from_is_refused(monkeypatch):
    with pytest.raises(ValueError, match=r"^initial must be one of imagenet, random; got 'auto'$"):
        features.backbone("auto", images(2), 0)
    monkeypatch.setattr(features.imagenet, "load", lambda: None)
    with pytest.raises(ValueError, match=r"^initial='imagenet' needs .* initial='random' does without them$"):
        features.backbone("imagenet", images(2), 0)


@pytest.mark.parametrize("n", [12, 3])  # with 3 images the covariance of 5 channels needs ε
def test_distances_equal_those_of_scipy_and_scikit_learn(n):
    train_NCHW, test_BCHW = fake_features(n), fake_features(4, seed=1)
    mean_P1C, factor_PCC = features.gaussians(train_NCHW.split(5), 0.01)
    ours_BHW = features.mahalanobis(mean_P1C, factor_PCC, test_BCHW)
    assert ours_BHW.shape == (4, 2, 3)
    for p, (h, w) in enumerate(np.ndindex(2, 3)):
        train_NC, test_BC = (A[:, :, h, w].double().numpy() for A in (train_NCHW, test_BCHW))
        reference = EmpiricalCovariance().fit(train_NC)
        covariance_CC = reference.covariance_ * n / (n - 1) + 0.01 * np.eye(5)
        np.testing.assert_allclose(mean_P1C[p, 0], reference.location_, rtol=1e-5)
        np.testing.assert_allclose(factor_PCC[p] @ factor_PCC[p].T, covariance_CC, rtol=1e-3, atol=1e-4)
        inverse_CC = np.linalg.inv(covariance_CC)
        theirs_B = [mahalanobis(test_C, reference.location_, inverse_CC) for test_C in test_BC]
        np.testing.assert_allclose(ours_BHW[:, h, w], theirs_B, rtol=2e-3)


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match=r"^train_NCYX must hold two images or more, for a covariance; got 1$"):
        features.gaussians([fake_features(1)], 0.01)


def test_nearest_distances_equal_those_of_scikit_learn(monkeypatch):
    monkeypatch.setattr(features, "COMPARED", 7)  # which does not divide the number of features
    train_NCHW, test_BCHW = fake_features(12), fake_features(4, seed=1)
    test_BCHW[0, :, 1, 2] = train_NCHW[3, :, 0, 0]  # found at another position
    bank_KC = features.bank(train_NCHW.split(5), 1000, torch.Generator().manual_seed(0))
    ours_BHW = features.nearest(bank_KC, test_BCHW)
    every_KC = train_NCHW.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy()
    neighbours = NearestNeighbors(n_neighbors=1, algorithm="brute").fit(every_KC)
    theirs_B1, _ = neighbours.kneighbors(test_BCHW.permute(0, 2, 3, 1).reshape(-1, 5).double().numpy())
    np.testing.assert_allclose(ours_BHW, theirs_B1.reshape(4, 2, 3), rtol=1e-3, atol=0.02)
    assert ours_BHW[0, 1, 2] < 0.02 < ours_BHW.flatten().sort().values[1]


def test_the_bank_is_drawn_evenly_whatever_the_batches():
    A_NCHW = torch.arange(24.0).view(6, 1, 2, 2)

    def drawn(seed, patches=6, batch=6):
        return features.bank(A_NCHW.split(batch), patches, torch.Generator().manual_seed(seed))[:, 0].int().tolist()

    assert sorted(drawn(0, patches=24)) == sorted(drawn(0, patches=25)) == list(range(24))
    assert drawn(0) == drawn(0, batch=1) == drawn(0, batch=4) != drawn(1)
    draws = [drawn(seed, batch=2) for seed in range(400)]
    assert all(len(set(draw)) == 6 for draw in draws)
    # The share of draws that hold a feature is 1/4 with a standard deviation of 0.022.
    shares = np.bincount(np.concatenate(draws), minlength=24) / 400
    np.testing.assert_allclose(shares, 0.25, atol=0.09)


def test_padim_with_all_channels_equals_a_loop(network):
    train_NCYX, test_NCYX = images(20), images(2, seed=1)
    ours_NYX = features.padim(train_NCYX, test_NCYX, network, seed=0, channels=448, epsilon=0.1, sigma=0.0)
    train_NCHW, test_NCHW = (network(x_NCYX).double().numpy() for x_NCYX in (train_NCYX, test_NCYX))
    theirs_NHW = np.empty((2, 8, 8))
    for h, w in np.ndindex(8, 8):
        covariance_CC = np.cov(train_NCHW[:, :, h, w].T) + 0.1 * np.eye(448)
        for n in range(2):
            deviation_C = test_NCHW[n, :, h, w] - train_NCHW[:, :, h, w].mean(0)
            theirs_NHW[n, h, w] = np.sqrt(deviation_C @ np.linalg.solve(covariance_CC, deviation_C))
    theirs_N1YX = F.interpolate(torch.from_numpy(theirs_NHW)[:, None], scale_factor=4, mode="bilinear")
    np.testing.assert_allclose(ours_NYX, theirs_N1YX[:, 0], rtol=1e-3)


@pytest.mark.parametrize(
    ("method", "options"), [(features.padim, {"channels": 40}), (features.nearest_neighbour, {"patches": 200})]
)
def test_maps_are_their_seeds_and_mark_what_the_training_lacks(network, method, options):
    train_NCYX, test_NCYX = images(20, side=64), images(18, side=64, seed=1)  # more than one batch of either
    test_NCYX[0, :, 4:20, 36:52] = 255 - test_NCYX[0, :, 4:20, 36:52]  # top right
    test_NCYX[1, :, 36:52, 4:20] = 255 - test_NCYX[1, :, 36:52, 4:20]  # bottom left
    first, again, other = (method(train_NCYX, test_NCYX, network, seed=seed, **options) for seed in (0, 0, 1))
    assert first.shape == (18, 64, 64)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    for map_NYX in (first, other):
        assert set(map_NYX.amax((1, 2)).topk(2).indices.tolist()) == {0, 1}
        excess_NYX = map_NYX[:2] - map_NYX[2:].mean(0)
        quarters_NQ = excess_NYX.view(2, 2, 32, 2, 32).mean((2, 4)).flatten(1)
        assert quarters_NQ.argmax(1).tolist() == [1, 2]


def test_numbers_of_channels_and_patches_that_cannot_be_are_refused(network):
    for channels in (0, 449):
        with pytest.raises(ValueError, match=rf"^channels must be from 1 to 448; got {channels}$"):
            features.padim(images(2), images(1), network, seed=0, channels=channels)
    with pytest.raises(ValueError, match=r"^patches must be 1 or more; got 0$"):
        features.nearest_neighbour(images(2), images(1), network, seed=0, patches=0)


def test_smoothing_is_a_gaussian_of_the_images_shorter_side():
    impulse_NYX = torch.zeros(2, 128, 150)
    impulse_NYX[0, 60, 70] = 1
    ours_NYX = features.to_image(impulse_NYX, (128, 150), 4.0)
    down_Y, right_X = (np.exp(-0.5 * ((np.arange(n) - at) / 2) ** 2) for n, at in ((128, 60), (150, 70)))
    expected_YX = np.outer(down_Y, right_X) / (2 * np.pi * 4)
    np.testing.assert_allclose(ours_NYX[0], expected_YX, atol=1e-5)
    assert not ours_NYX[1].any()


def test_maps_are_brought_to_the_image_bilinearly():
    ours_NYX = features.to_image(torch.tensor([[[0.0, 4.0]]]), (2, 8), 0.0)
    assert ours_NYX.tolist() == [[[0, 0, 0.5, 1.5, 2.5, 3.5, 4, 4]] * 2]
