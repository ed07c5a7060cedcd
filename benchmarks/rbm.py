"""Training speed of a restricted Boltzmann machine, ours beside scikit-learn's BernoulliRBM.

Both train 500 hidden units on the same grey images in float32 by persistent contrastive divergence with one step of
sampling, the same batch size and learning rate: what scikit-learn knows, so without momentum, weight decay and a
falling rate. Scikit-learn works on the CPU whatever the device. How well both have learned is measured by one function.
"""

import dataclasses

import torch
from benchmarks import timing
from sklearn.neural_network import BernoulliRBM

from expvae.models import RBM, visible_values
from expvae_book import contrastive, recipes, runs
from expvae_book.recipes import RBMRecipe
from expvae_book.training import build

PEERS = ("scikit-learn",)
RECIPE = recipes.RBM["ours"]
IMAGES = 3000  # per turn, which is one epoch
HELD_OUT = 200
HIDDEN = 500
OURS, THEIRS = "expvae_book.contrastive", "scikit-learn BernoulliRBM"


def our_epoch(x_NYX: torch.Tensor, recipe: RBMRecipe, device: torch.device) -> RBM:
    model = build(lambda: RBM(x_NYX[0].numel(), HIDDEN), seed=0).to(device)
    contrastive.train(model, x_NYX, x_NYX[:2], recipe, epochs=1, seed=0, progress=False)
    return model.cpu()


def their_epoch(x_NYX: torch.Tensor, recipe: RBMRecipe) -> RBM:
    x_NV = visible_values(x_NYX, "binary").flatten(1).numpy()
    peer = BernoulliRBM(
        HIDDEN, learning_rate=recipe.learning_rate, batch_size=recipe.batch_size, n_iter=1, random_state=0
    ).fit(x_NV)
    model = RBM(x_NV.shape[1], HIDDEN)
    values = (peer.components_, peer.intercept_visible_, peer.intercept_hidden_)
    names = ("weight", "visible_bias", "hidden_bias")
    model.load_state_dict({name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)})
    return model


def measure(x_NYX: torch.Tensor, recipe: RBMRecipe, device: torch.device, rounds: int) -> list[dict]:
    """Images per second of both, their ratio, and the pseudo-log-likelihood of images that neither has seen."""
    x_NYX, held_out_NYX = x_NYX[:-HELD_OUT][:IMAGES], x_NYX[-HELD_OUT:]
    recipe = dataclasses.replace(recipe, steps=1, persistent=True, momentum=0.0, weight_decay=0.0, decay=False)
    trained = {}
    seconds = timing.race(
        {
            OURS: lambda: trained.update({OURS: our_epoch(x_NYX, recipe, device)}),
            THEIRS: lambda: trained.update({THEIRS: their_epoch(x_NYX, recipe)}),
        },
        rounds,
        device,
    )
    rows = timing.rows("images/s", {name: [len(x_NYX) / s for s in values] for name, values in seconds.items()})
    ours, theirs = (row["value"] for row in rows)
    rows.append(runs.row("ratio", ours / theirs, method=f"{OURS} / {THEIRS}"))
    v_NV = visible_values(held_out_NYX, "binary").flatten(1)
    for name, model in trained.items():
        with torch.no_grad():
            likelihood = model.pseudo_log_likelihood(v_NV).mean().item()
        rows.append(runs.row("pseudo-log-likelihood per image", likelihood, method=name, n=len(v_NV)))
    return rows
