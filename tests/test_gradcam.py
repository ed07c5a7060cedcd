"""LatentGradCAM against captum's LayerGradCam, whose call it takes."""

import inspect

import pytest
import torch
from captum.attr import LayerGradCam
from torch import nn

from expvae import LatentGradCAM, attention, upsample
from expvae.models import MNISTVAE

X = torch.rand(4, 1, 28, 28, generator=torch.Generator().manual_seed(1))
TARGETS = [3, torch.tensor(3), torch.tensor([3]), [3, 0, 5, 0], torch.tensor([3, 0, 5, 0])]


@pytest.fixture(scope="module")
def vae():
    torch.manual_seed(0)
    return MNISTVAE(latent_dim=6).eval()


def both(vae):
    return (
        LatentGradCAM(vae.encode, vae.encoder.conv2),
        LayerGradCam(lambda x_BCYX: vae.encode(x_BCYX)[0], vae.encoder.conv2),
    )


@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_every_form_of_target_gives_the_map_that_captum_gives(vae, target, relu):
    ours, captum = (one.attribute(X, target=target, relu_attributions=relu) for one in both(vae))
    assert ours.shape == (4, 1, 7, 7)
    assert ours.abs().max() > 0
    torch.testing.assert_close(ours, captum.detach(), rtol=1e-4, atol=1e-5 * float(ours.abs().max()))


def test_a_single_latent_needs_no_target(vae):
    one = nn.Sequential(*vae.encoder, vae.mu, nn.Linear(6, 1))
    ours, captum = LatentGradCAM(one, "3"), LayerGradCam(one, one[3])
    torch.testing.assert_close(ours.attribute(X), captum.attribute(X).detach(), rtol=1e-4, atol=1e-7)


def test_without_a_target_it_is_the_mean_over_latents_and_with_relu_that_of_the_paper(vae):
    ours, captum = both(vae)
    each = torch.cat([captum.attribute(X, target=latent).detach() for latent in range(6)], 1)
    scale = 1e-5 * float(each.abs().max())
    torch.testing.assert_close(ours.attribute(X), each.mean(1, keepdim=True), rtol=1e-4, atol=scale)
    aggregated = upsample(ours.attribute(X, relu_attributions=True), (28, 28)).squeeze(1)
    torch.testing.assert_close(aggregated, attention(vae.encode, "encoder.conv2", X).map_BYX)


def test_what_it_takes_has_the_names_and_defaults_of_captum():
    ours, captum = (inspect.signature(one.attribute).parameters for one in (LatentGradCAM, LayerGradCam))
    assert [*ours][:3] == [*captum][:3]
    assert {name: ours[name].default for name in ours} == {name: captum[name].default for name in ours}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ([3, 0], r"target must be one latent, or one for each of 4 images; got \[3, 0\]"),
        ([], r"target must be one latent, or one for each of 4 images; got \[\]"),
        (6, r"latents=\[6\] must be one or more indices between 0 and 5"),
        (torch.tensor([0.5]), "must be one or more indices between 0 and 5"),
    ],
)
def test_a_target_that_is_none_is_refused(vae, target, said):
    with pytest.raises(ValueError, match=said):
        both(vae)[0].attribute(X, target)
