"""Every model on PyTorch's device "meta", which has shapes and no numbers: what is made on another device raises there.

So a tensor that would be left on the CPU while a GPU computes is found without a GPU. What reads values, as measures
and checks of finiteness do, cannot run there: `make gpu-check` runs that.
"""

from contextlib import nullcontext

import pytest
import torch

from expvae import attention, discriminator_loss, elbo_terms, permute_latents
from expvae.models import (
    MNISTVAE,
    RBM,
    UCSDVAE,
    BrongersMVTecVAE,
    BrongersUCSDVAE,
    ConvRBM,
    DSpritesVAE,
    MVTecVAE,
    Report2MVTecVAE,
    Stack,
)
from expvae_book import augmentation, contrastive, factorvae, training
from expvae_book.factorvae import VARIANTS, Candidate
from expvae_book.factorvae_losses import discriminate
from expvae_book.recipes import DSPRITES

META = torch.device("meta")
IMAGES = {
    MNISTVAE: (1, 28, 28),
    UCSDVAE: (1, 100, 100),
    BrongersUCSDVAE: (1, 96, 96),
    MVTecVAE: (3, 256, 256),
    BrongersMVTecVAE: (3, 256, 256),
    Report2MVTecVAE: (3, 256, 256),
    DSpritesVAE: (1, 64, 64),
}
LAYERS = {MNISTVAE: "conv2", UCSDVAE: "conv2", MVTecVAE: "layer2.1.conv1", Report2MVTecVAE: "layer1.0.conv2"}
RECIPE = DSPRITES["report2"]
CANDIDATES = {
    "β-VAE": Candidate(beta=4.0),
    "FactorVAE": Candidate(gamma=40.0),
    **{name: Candidate(gamma=40.0, attention_weight=1.0, penalty=penalty) for name, penalty in VARIANTS.items()},
}


def on_meta(build, *arguments):
    with META:
        return build(*arguments)


def bytes_of(build, count=2):
    return torch.empty(count, *IMAGES[build], dtype=torch.uint8, device=META)


@pytest.mark.parametrize("build", IMAGES)
def test_losses_and_their_gradients_of_both_orders(build):
    model = on_meta(build, 10)
    terms = elbo_terms(model, training.to_unit(bytes_of(build)), torch.Generator())
    assert [(term_B.device, term_B.shape) for term_B in terms] == [(META, (2,))] * 2
    parameters = list(model.parameters())
    first = torch.autograd.grad(sum(terms).sum(), parameters, create_graph=True)
    sum(gradient.square().sum() for gradient in first).backward()
    assert {parameter.grad.device for parameter in parameters if parameter.grad is not None} == {META}


def test_a_tensor_of_another_device_raises(monkeypatch):
    model, decode = on_meta(MNISTVAE, 10), MNISTVAE.decode
    monkeypatch.setattr(model, "decode", lambda z_BI: decode(model, z_BI) + torch.zeros(2, 1, 28, 28))
    with pytest.raises(RuntimeError, match="device"):
        elbo_terms(model, training.to_unit(bytes_of(MNISTVAE)), torch.Generator())


@pytest.fixture
def unread(monkeypatch):
    """Attention without what "meta" has not: values, whose finiteness is checked, and mixed precision."""
    monkeypatch.setattr("expvae._attention._finite", lambda values: True)
    monkeypatch.setattr(torch, "autocast", lambda *arguments, **options: nullcontext())


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("route", ["auto", "loop", "batched", "pooled"])
@pytest.mark.parametrize("build", LAYERS)
def test_attention_by_every_route(build, route):
    model, x_BCYX = on_meta(build, 32).eval(), training.to_unit(bytes_of(build))
    found = attention(model.encode, f"encoder.{LAYERS[build]}", x_BCYX, route=route)
    assert (found.map_BYX.device, found.map_BYX.shape) == (META, x_BCYX[:, 0].shape)


@pytest.mark.usefixtures("unread")
@pytest.mark.parametrize("graph", ["constant_alpha", "second_order"])
@pytest.mark.parametrize("build", [MNISTVAE, UCSDVAE])
def test_attention_that_is_differentiated_in_turn(build, graph):
    model, x_BCYX = on_meta(build, 10).eval(), training.to_unit(bytes_of(build))
    found = attention(model.encode, f"encoder.{LAYERS[build]}", x_BCYX, graph=graph)
    found.map_BYX.sum().backward()
    assert model.encoder.get_submodule(LAYERS[build]).weight.grad.device == META


@pytest.mark.parametrize("name", CANDIDATES)
def test_factorvaes_side_by_side(name, monkeypatch):
    generator = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device="cpu": generator())  # the device "meta" has none
    candidates = [CANDIDATES[name], CANDIDATES[name]]
    group = factorvae.Group(candidates, RECIPE, META)
    noise_MBI, drawn_MBI = torch.empty(2, 2, 3, RECIPE.latent_dim, device=META)
    random_M2 = torch.zeros(2, 2, dtype=torch.int64, device=META)
    parts, z_MBI = factorvae.losses(group, torch.empty(3, 2, 64, 64, device=META), noise_MBI, random_M2)
    total = sum(part_M.sum() for part_M in parts.values())
    weights = group.optimizer.param_groups[0]["params"]
    gradients = torch.autograd.grad(total, weights, create_graph=True, retain_graph=True)
    if candidates[0].gamma:
        permuted_MBI = permute_latents(z_MBI, drawn_MBI.argsort(1))
        judged = discriminate(group.discriminator, z_MBI, permuted_MBI)
        gradients += (judged.toward_latents_MBI, judged.leaked_MBI, *judged.gradients)
        both = [group.discriminator(draws_MBI).float() for draws_MBI in (z_MBI, permuted_MBI)]
        discriminator_loss(*both).sum().backward()
        assert {parameter.grad.device for parameter in group.discriminator.parameters()} == {META}
    assert {gradient.device for gradient in gradients} == {META}


@pytest.mark.parametrize("units", ["binary", "spin"])
def test_boltzmann_machines(units, monkeypatch):
    monkeypatch.setattr("expvae.models._rbm.require_means", lambda *arguments: None)  # reads values

    def build():
        return Stack([ConvRBM((1, 28, 28), 4, 4, 2, units), RBM(4 * 13 * 13, 8, units)])

    stack, x_BCYX = on_meta(build), training.to_unit(bytes_of(MNISTVAE))
    v = stack.visible(x_BCYX)
    for machine in stack.layers:
        chain = v.new_zeros(2, *machine.hidden_shape)
        slopes = {name: torch.zeros_like(value) for name, value in machine.named_parameters()}
        chain = contrastive.add_contrast(
            slopes, machine, v.view(2, *machine.visible_shape), chain, 2, torch.Generator()
        )
        v = machine.activate(machine(v.view(2, *machine.visible_shape)))
        assert {tensor.device for tensor in (chain, v, *slopes.values())} == {META}
    assert stack.encode(x_BCYX, temperature=0.5, generator=torch.Generator()).device == META
    assert stack.reconstruct(x_BCYX).device == META


def test_images_that_are_turned_at_load():
    x_BCYX = training.to_unit(bytes_of(MVTecVAE))
    zeros_B, never_B = torch.zeros(2, device=META), torch.zeros(2, dtype=torch.bool, device=META)
    assert augmentation.transform(x_BCYX, zeros_B, never_B, never_B).device == META
