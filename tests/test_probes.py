"""Probes: a stored run held against the weights that made it, and against others."""

import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from expvae import attention
from expvae.models import MNISTVAE, RBM, ConvRBM, Stack
from expvae_book import __main__ as command
from expvae_book import probes, protocols, provenance, runs, weights
from expvae_book.data import mnist
from expvae_book.recipes import MNIST
from expvae_book.recipes import RBM as RBM_RECIPES
from expvae_book.training import to_unit

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("EXPVAE_RUNS", str(tmp_path / "runs"))
    return tmp_path


@pytest.fixture(scope="module")
def images():
    return mnist.load("sample")


@pytest.fixture
def trained(images):
    x_NCYX = images.train_NYX[:48, None]
    recipe = replace(MNIST["liu2020"], batch_size=16, latent_dim=3)
    return weights.trained(
        lambda: MNISTVAE(3), x_NCYX[:40], x_NCYX[40:], recipe, epochs=1, seed=0, device=CPU, progress=False
    )


def save(trained, images, layer="encoder.conv2", chapter="mnist"):
    probe = probes.take(trained.model, trained.file, images.test_NYX[:, None], layer, 5)
    return runs.save(
        chapter,
        {"digit": 1, "data": "sample"},
        metrics=[],
        losses={},
        arrays={"other": np.zeros(2)},
        figures={},
        card=images.card,
        recipe=MNIST["liu2020"],
        budget={"unit": "epochs", "asked": 1, "used": 1},
        seconds={},
        device="cpu: 1 threads",
        probe=probe,
    )


def test_a_probe_holds_means_and_coarse_maps_of_drawn_images(trained, images):
    run = save(trained, images)
    drawn_N = torch.randperm(297, generator=torch.Generator().manual_seed(5))[:64]
    x_BCYX = to_unit(images.test_NYX[drawn_N][:, None])
    means = trained.model.encode(x_BCYX)[0].detach()
    np.testing.assert_allclose(run.arrays["probe means"], means, rtol=1e-5, atol=1e-6)
    map_BYX = attention(trained.model.encode, "encoder.conv2", x_BCYX[:16], "liu2020_code").map_BYX
    for place, (row, column) in enumerate([(0, 0), (3, 5), (7, 7)]):
        top, left, bottom, right = (
            28 * row // 8,
            28 * column // 8,
            -(-28 * (row + 1) // 8),
            -(-28 * (column + 1) // 8),
        )
        expected = map_BYX[place, top:bottom, left:right].mean().item()
        assert run.arrays["probe maps"][place, row, column] == pytest.approx(expected, rel=1e-4, abs=1e-7)
    assert run.arrays["probe maps"].shape == (64, 8, 8)
    assert "other" in run.arrays
    assert run.record["probe"]["weights"] == trained.file
    assert run.state == "unverified"


def test_a_run_is_verified_by_its_own_weights_and_differs_from_others(trained, images, monkeypatch):
    monkeypatch.setattr(provenance, "commit", lambda: {"commit": "0123456789", "dirty": False})
    run = probes.verify(save(trained, images))
    verified = run.record["verified"]
    assert verified["difference"] < 1e-5
    assert verified["protocols"] == run.record["protocols"]
    assert verified["versions"] == provenance.versions()
    assert run.state == f"verified at 01234567, {verified['date']}"
    assert run.state in run.caption
    assert runs.load("mnist", run.parameters).record == run.record

    path = weights.folder() / trained.file
    tensors = load_file(path)
    tensors["encoder.conv2.bias"][0] += 0.5
    save_file(tensors, path, {"of": "a test"})
    run = probes.verify(run)
    assert run.differs
    assert run.state.startswith("differs by ")


class Normalising(MNISTVAE):
    """As expvae.models.MVTecVAE: no tensor tells whether it normalises its images."""

    normalises = False

    def encode(self, x_BCYX):
        return super().encode(2 * x_BCYX - 1 if self.normalises else x_BCYX)


@pytest.mark.parametrize("normalises", [False, True])
def test_a_network_that_normalises_its_images_is_built_again_as_it_was(trained, images, monkeypatch, normalises):
    monkeypatch.setitem(probes.VAES, "Normalising", Normalising)
    model = Normalising(3).eval()
    model.load_state_dict(trained.model.state_dict())
    model.normalises = normalises
    run = probes.verify(save(replace(trained, model=model), images))
    assert run.record["verified"]["difference"] < 1e-5


def test_another_map_differs_too(trained, images, monkeypatch):
    run = save(trained, images)
    monkeypatch.setattr(probes, "METHOD", "liu2020_paper")
    assert probes.verify(run).differs


def test_verified_holds_as_long_as_the_versions_do(trained, images, monkeypatch):
    run = probes.verify(save(trained, images))
    monkeypatch.setitem(protocols.VERSIONS, "ATTENTION", 9)
    run = runs.load("mnist", run.parameters)
    assert run.state == "outdated (ATTENTION 1, now 9)"
    later = runs.amend(run, {"protocols": run.record["protocols"] | {"ATTENTION": 9}})
    assert later.state == "unverified"  # a record of the new version, which nobody verified


@pytest.mark.parametrize(
    ("below", "above"), [((RBM, 784, 6), 6), ((ConvRBM, (1, 28, 28), 3, 7, 3), 3 * 8 * 8)], ids=["RBM", "ConvRBM"]
)
def test_a_stack_is_built_again_from_its_files(images, below, above):
    kind, *shape = below
    x_NCYX = images.train_NYX[:40, None]
    fitted = weights.trained(
        lambda: Stack([kind(*shape, "spin"), RBM(above, 4, "spin")]),
        x_NCYX[:30],
        x_NCYX[30:],
        RBM_RECIPES["ours"],
        epochs=1,
        seed=0,
        device=CPU,
        progress=False,
    )
    run = save(fitted, images, "maps.0", "rbm")
    run = runs.load("rbm", run.parameters)  # as JSON has it
    assert probes.verify(run).record["verified"]["difference"] < 1e-5


def test_what_a_verification_lacks_is_named(trained, images, monkeypatch):
    run = save(trained, images)
    with pytest.raises(probes.CannotVerifyError, match="it has no probe"):
        probes.verify(replace(run, record={key: value for key, value in run.record.items() if key != "probe"}))
    real = runs.amend(run, {"data": run.record["data"] | {"kind": "partial"}})
    with pytest.raises(probes.CannotVerifyError, match="its data are not at hand: "):
        probes.verify(real)
    monkeypatch.setattr(runs, "_data_digest", lambda name: "other files")
    with pytest.raises(probes.CannotVerifyError, match="the data at hand are not those of its card, mnist"):
        probes.verify(replace(real))
    (weights.folder() / trained.file).unlink()
    with pytest.raises(probes.CannotVerifyError, match="its weights are not in the cache, "):
        probes.verify(run)


def test_a_run_whose_weights_could_not_be_kept_stays_unverified(images, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "file" / "cache"))
    x_NCYX = images.train_NYX[:48, None]
    recipe = replace(MNIST["liu2020"], batch_size=16, latent_dim=3)
    data, options = (x_NCYX[:40], x_NCYX[40:]), {"epochs": 1, "seed": 0, "device": CPU, "progress": False}
    vae = weights.trained(lambda: MNISTVAE(3), *data, recipe, **options)
    stack = weights.trained(lambda: Stack([RBM(784, 6, "spin")]), *data, RBM_RECIPES["ours"], **options)
    for trained, layer, chapter in ((vae, "encoder.conv2", "mnist"), (stack, "maps.0", "rbm")):
        run = save(trained, images, layer, chapter)
        assert probes.verify(run, images.test_NYX[:, None].__getitem__).state == "unverified"
        assert "verified" not in runs.load(chapter, run.parameters).record
        with pytest.raises(probes.CannotVerifyError, match="its weights are not in the cache, "):
            probes.verify(run)


def test_a_checkpoint_of_a_stack_verifies_nothing(images, monkeypatch):
    x_NCYX = images.train_NYX[:48, None]
    options = {"epochs": 1, "seed": 0, "device": CPU, "progress": False}
    recipe = RBM_RECIPES["ours"]
    stack = weights.trained(lambda: Stack([RBM(784, 6, "spin")]), x_NCYX[:40], x_NCYX[40:], recipe, **options)
    run = save(stack, images, "maps.0", "rbm")
    path = weights.folder() / stack.file
    path.rename(path.with_suffix(".checkpoint0"))
    assert probes.verify(run, images.test_NYX[:, None].__getitem__).state == "unverified"


def main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["lib", *words])
    with pytest.raises(SystemExit) as ended:
        command.main()
    return ended.value.code


def test_the_command_verifies_what_it_can(trained, images, monkeypatch, capsys):
    run = save(trained, images)
    assert main(monkeypatch, "verify") == 0
    assert "verified at " in capsys.readouterr().out
    assert runs.load("mnist", run.parameters).state.startswith("verified at ")

    tensors = load_file(weights.folder() / trained.file)
    tensors["mu.bias"] += 1
    save_file(tensors, weights.folder() / trained.file, {"of": "a test"})
    assert main(monkeypatch, "verify", "mnist") == 1
    assert "differs by " in capsys.readouterr().out

    (weights.folder() / trained.file).unlink()
    assert main(monkeypatch, "verify") == 0
    assert "its weights are not in the cache" in capsys.readouterr().out


def test_the_command_names_the_chapters_that_have_runs(trained, images, monkeypatch, capsys):
    save(trained, images)
    assert main(monkeypatch, "verify", "ucsd") == 2
    assert "there is no stored run of 'ucsd'; there are runs of: mnist" in capsys.readouterr().err


def test_amending_leaves_no_temporary_file_and_keeps_what_is_there(trained, images):
    run = save(trained, images)
    before = json.loads((run.folder / "record.json").read_text())
    runs.amend(run, {"note": 1})
    assert json.loads((run.folder / "record.json").read_text()) == before | {"note": 1}
    assert sorted(path.name for path in run.folder.iterdir()) == ["arrays.npz", "figures", "record.json"]
    with pytest.raises(ValueError, match="Out of range"):
        runs.amend(run, {"note": float("nan")})
    assert json.loads((run.folder / "record.json").read_text()) == before | {"note": 1}
