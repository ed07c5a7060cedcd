import hashlib
import json
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from expvae import models
from expvae_book import checkpoints, devices, protocols, training, weights
from expvae_book.augmentation import turned_at_load
from expvae_book.recipes import Recipe

RECIPE = Recipe(source="test", epochs=100, batch_size=4, learning_rate=1e-2, latent_dim=2)
CPU = torch.device("cpu")
STEPS = 10  # two epochs of 20 images
HERE = Path(__file__)


class TinyVAE(nn.Module):
    """Calls `event` with the number of the training step, from 1, before the step."""

    __module__ = f"{models.__name__}.tiny"  # as one of the library's

    def __init__(self, event=lambda step: None):
        super().__init__()
        self.encoder, self.decoder = nn.Conv2d(1, 4, 4), nn.Linear(2, 16)
        self.event, self.steps = event, 0

    def encode(self, x_BCYX):
        if self.training:
            self.steps += 1
            self.event(self.steps)
        return self.encoder(x_BCYX).flatten(1).chunk(2, dim=1)

    def decode(self, z_BI):
        return self.decoder(z_BI).unflatten(1, (1, 4, 4))


class OtherVAE(TinyVAE):
    __module__ = f"{models.__name__}.tiny"


def images(count=20, first=0):
    return (torch.arange(first, first + count * 16) * 37 % 256).to(torch.uint8).reshape(count, 1, 4, 4)


def trained(make=TinyVAE, train_NCYX=None, validation_NCYX=None, recipe=RECIPE, **options):
    options = {"epochs": 2, "seed": 0, "device": CPU, "precision": "float32", "progress": False} | options
    train_NCYX = images() if train_NCYX is None else train_NCYX
    validation_NCYX = images(4, 1000) if validation_NCYX is None else validation_NCYX
    return weights.trained(make, train_NCYX, validation_NCYX, recipe, **options)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def frequent_checkpoints(monkeypatch):
    monkeypatch.setattr(weights, "CHECKPOINT_SECONDS", 0.0)


def stored(ending=".safetensors"):
    return sorted(path for path in weights.folder().iterdir() if path.name.endswith(ending))


def assert_same_model(ours, theirs):
    for (name, value), other in zip(ours.model.state_dict().items(), theirs.model.state_dict().values(), strict=True):
        assert torch.equal(value, other), name


def test_folder_of_the_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path))
    assert weights.folder() == tmp_path
    monkeypatch.delenv("EXPVAE_CACHE")
    assert weights.folder() == Path.home() / ".cache" / "expvae"


def test_nothing_is_trained_twice():
    first = trained()
    second = trained(lambda: TinyVAE(lambda step: pytest.fail("trained again")))
    assert (first.reused, second.reused) == (False, True)
    assert first.key == second.key
    assert first.history == second.history
    assert first.device == second.device == devices.describe_device(torch.device("cpu"))
    assert_same_model(first, second)
    assert not first.model.training
    assert not second.model.training
    assert sorted(path.suffix for path in weights.folder().iterdir()) == [".checkpoint", ".lock", ".safetensors"]


def test_the_model_is_the_one_that_the_loop_trains():
    expected = training.build(TinyVAE, 0)
    history = training.train(expected, images(), images(4, 1000), RECIPE, epochs=2, seed=0, progress=False)
    result = trained()
    for value, other in zip(result.model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value, other)
    assert result.history.kl == pytest.approx(history.kl)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"epochs": 3},
        {"make": OtherVAE},
        {"recipe": replace(RECIPE, batch_size=5)},
        {"recipe": replace(RECIPE, learning_rate=1e-3)},
        {"recipe": replace(RECIPE, latent_dim=3)},
        {"recipe": replace(RECIPE, reduction="mean")},
        {"recipe": replace(RECIPE, betas=(0.8, 0.999))},
        {"recipe": replace(RECIPE, epsilon=1e-7)},
        {"recipe": replace(RECIPE, kl_warmup_epochs=1)},
        {"recipe": replace(RECIPE, beta=0.5)},
        {"vary": turned_at_load},
        {"train_NCYX": images().flip(0)},
        {"train_NCYX": images() ^ torch.tensor([1] + [0] * 15, dtype=torch.uint8).reshape(1, 4, 4)},
        {"validation_NCYX": images(4, 1001)},
        {"variant": "imagenet, frozen"},
        {"precision": "bfloat16"},
    ],
    ids=lambda change: " ".join(map(str, change)),
)
def test_another_training_is_not_taken_for_this_one(change):
    first = trained()
    other = trained(**change)
    assert not other.reused
    assert other.key != first.key
    assert trained().reused  # beside it, not in its place


@pytest.mark.parametrize(
    ("options", "in_key"),
    [
        ({}, {}),
        ({"variant": "", "precision": "float32"}, {}),
        ({"variant": "random, frozen"}, {"variant": "random, frozen"}),
        ({"variant": "imagenet", "precision": "bfloat16"}, {"variant": "imagenet", "precision": "bfloat16"}),
        ({"recipe": replace(RECIPE, beta=0.5)}, {}),
        ({"vary": turned_at_load}, {"vary": "turned_at_load"}),
    ],
)
def test_the_key_is_the_one_that_stored_weights_have(options, in_key):
    """A choice that is not made is no part of it: weights from before there was the choice are still found."""
    later = () if "recipe" in options else ("beta",)
    recipe = asdict(options.get("recipe", RECIPE))
    recipe = {name: value for name, value in recipe.items() if name not in ("source", "epochs", *later)}
    determinants = {
        "model": "TinyVAE",
        "shapes": {
            "encoder.weight": [4, 1, 4, 4],
            "encoder.bias": [4],
            "decoder.weight": [16, 2],
            "decoder.bias": [16],
        },
        "recipe": recipe,
        "epochs": 2,
        "seed": 0,
        "train": weights.tensor_digest(images()),
        "validation": weights.tensor_digest(images(4, 1000)),
        "protocols": {"TRAINING": protocols.VERSIONS["TRAINING"]},
    }
    text = json.dumps(determinants | in_key, sort_keys=True)
    result = trained(**options)
    assert result.key == hashlib.sha256(text.encode()).hexdigest()
    assert [path.name for path in stored()] == [f"TinyVAE-{result.key[:20]}.safetensors"]


def test_weights_of_an_earlier_protocol_are_not_reused(monkeypatch):
    trained()
    monkeypatch.setitem(protocols.VERSIONS, "PIXEL", 7)
    assert trained().reused
    monkeypatch.setitem(protocols.VERSIONS, "TRAINING", 7)
    assert not trained().reused


def test_what_cannot_change_the_weights_does_not_count():
    trained()
    assert trained(recipe=replace(RECIPE, source="elsewhere", epochs=7)).reused


def test_a_model_that_is_not_the_librarys_is_refused():
    class Mine(TinyVAE):
        pass

    with pytest.raises(ValueError, match=rf"make builds a {__name__}\.\S*Mine, which is none of {models.__name__}: "):
        trained(Mine)
    assert not weights.folder().exists()


def test_a_training_that_was_cut_off_goes_on(frequent_checkpoints, monkeypatch, tmp_path):
    def interrupt(step):
        if step == 7:
            raise KeyboardInterrupt

    taken = []
    with pytest.raises(KeyboardInterrupt):
        trained(lambda: TinyVAE(interrupt))
    assert stored() == []
    resumed = trained(lambda: TinyVAE(taken.append))
    assert len(taken) == STEPS - 6
    assert not resumed.reused
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "empty cache"))
    uninterrupted = trained()
    assert not uninterrupted.reused
    assert_same_model(resumed, uninterrupted)
    assert resumed.history.kl == uninterrupted.history.kl


def test_more_epochs_go_on_from_fewer_and_fewer_begin_anew(monkeypatch, tmp_path):
    taken = []
    trained(epochs=1)
    further = trained(lambda: TinyVAE(taken.append))
    assert len(taken) == STEPS // 2
    (checkpoint,) = stored(".checkpoint")
    content = checkpoint.read_bytes()
    for path in stored():
        path.unlink()
    fewer = trained(lambda: TinyVAE(taken.append), epochs=1)
    assert len(taken) == STEPS
    assert stored(".checkpoint") == [checkpoint]
    assert checkpoint.read_bytes() == content
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "empty cache"))
    for ours, epochs in ((fewer, 1), (further, 2)):
        at_once = trained(epochs=epochs)
        assert_same_model(ours, at_once)
        assert ours.history.kl == at_once.history.kl
        assert ours.history.images == at_once.history.images
        for path in weights.folder().iterdir():
            path.unlink()


def test_a_training_that_is_told_to_end_stores_what_it_has_and_goes_on_when_asked_again(monkeypatch, tmp_path):
    taken = []
    monkeypatch.setenv("EXPVAE_MINUTES", "1e-9")
    early = trained()
    assert (early.steps, early.steps_asked) == (STEPS // 2, STEPS)
    assert (early.images, early.images_asked) == (early.history.images, 40) == (20, 40)
    assert len(early.history.kl) == 1
    monkeypatch.delenv("EXPVAE_MINUTES")
    fewer = trained(epochs=1)
    assert fewer.reused
    assert (fewer.key, fewer.file, fewer.steps, fewer.steps_asked) == (early.key, early.file, 5, 5)
    further = trained(lambda: TinyVAE(taken.append))
    assert len(taken) == STEPS // 2
    assert not further.reused
    assert (further.steps, further.steps_asked, len(further.history.kl)) == (STEPS, STEPS, 2)
    assert further.key != early.key
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "empty cache"))
    at_once = trained()
    assert_same_model(further, at_once)
    assert further.history.kl == at_once.history.kl


def test_each_kind_of_device_has_checkpoints_of_its_own(tmp_path):
    names = [weights.checkpoint_of(tmp_path / "a.safetensors", torch.device(kind)).name for kind in ("cpu", "cuda")]
    assert names == ["a.checkpoint", "a.cuda.checkpoint"]


def test_a_training_that_diverges_stores_no_weights():
    with pytest.raises(checkpoints.TrainingDivergedError, match="no longer finite"):
        trained(recipe=replace(RECIPE, learning_rate=1e39))
    assert stored() == []


def test_what_a_killed_process_left_is_swept_up():
    trained()
    (path,), (checkpoint,) = stored(), stored(".checkpoint")
    leftovers = [path.with_name(f"{path.name}.1.tmp"), path.with_name(f"{checkpoint.name}.1.tmp")]
    stranger = path.with_name("OtherVAE-0123.safetensors.1.tmp")
    for file in [*leftovers, stranger]:
        file.touch()
    assert trained().reused
    assert not any(file.exists() for file in leftovers)
    assert stranger.exists()


def test_cached_weights_can_be_asked_for_without_training():
    with weights.cached_only(), pytest.raises(weights.NotCachedError, match=r"TinyVAE-\w+\.safetensors is not there"):
        trained()
    assert not weights.folder().exists()
    first = trained()  # outside it trains as ever
    with weights.cached_only():
        second = trained(lambda: TinyVAE(lambda step: pytest.fail("trained again")))
        with pytest.raises(weights.NotCachedError):
            trained(seed=1)
    assert second.reused
    assert_same_model(first, second)
    assert len(stored()) == 1


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.99])
def test_damaged_weights_are_named(kept):
    trained()
    (path,) = stored()
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept)])
    with pytest.raises(ValueError, match=r"is damaged \(.*\); delete it and run again$") as caught:
        trained()
    assert str(caught.value).startswith(str(path))
    path.unlink()
    assert not trained().reused


def test_a_damaged_checkpoint_is_named():
    trained()
    (path,), (checkpoint,) = stored(), stored(".checkpoint")
    path.unlink()
    checkpoint.write_bytes(b"half a checkpoint")
    with pytest.raises(ValueError, match=r"\.checkpoint is damaged \(.*\); delete it and run again$"):
        trained()
    checkpoint.unlink()
    assert not trained().reused


def test_a_full_disk_keeps_the_last_checkpoint(frequent_checkpoints, full_disk, monkeypatch, tmp_path):
    taken, save = [], checkpoints.save_file

    def grow(step):
        if step == 7:
            monkeypatch.setattr(checkpoints, "save_file", limited)

    def limited(*arguments):
        with full_disk():
            save(*arguments)

    with pytest.raises(OSError, match=r"\.checkpoint could not be written \(.*\); nothing was lost") as caught:
        trained(lambda: TinyVAE(grow))
    (checkpoint,) = stored(".checkpoint")
    assert str(caught.value).startswith(f"{checkpoint} could")
    assert "damaged" not in str(caught.value)
    assert sorted(path.suffix for path in weights.folder().iterdir()) == [".checkpoint", ".lock"]
    monkeypatch.setattr(checkpoints, "save_file", save)
    resumed = trained(lambda: TinyVAE(taken.append))
    assert len(taken) == STEPS - 6
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "empty cache"))
    assert_same_model(resumed, trained())


# --- where nothing may be written ------------------------------------------------------------------------------------


def test_weights_are_read_from_a_cache_that_may_only_be_read(read_only, open_place, monkeypatch, capsys):
    monkeypatch.setenv("EXPVAE_CACHE", str(open_place / "cache"))
    first = trained()
    for with_lock in (True, False):
        if not with_lock:
            stored(".lock")[0].unlink()
        with read_only(weights.folder()):
            second = trained(lambda: TinyVAE(lambda step: pytest.fail("trained again")))
        assert second.reused
        assert_same_model(first, second)
    assert capsys.readouterr().err == ""


def test_in_a_cache_that_may_only_be_read_a_model_is_trained_without(
    read_only, open_place, monkeypatch, capsys, frequent_checkpoints
):
    monkeypatch.setenv("EXPVAE_CACHE", str(open_place / "cache"))
    expected, other = trained(), trained(seed=1)
    stored()[0].unlink(), stored()[0].unlink()
    before = sorted(weights.folder().iterdir())
    with read_only(weights.folder()):
        results = trained(), trained(seed=1)
    assert sorted(weights.folder().iterdir()) == before
    for ours, theirs in zip(results, (expected, other), strict=True):
        assert not ours.reused
        assert not ours.model.training
        assert_same_model(ours, theirs)
        assert (ours.key, ours.file, ours.device) == (theirs.key, theirs.file, theirs.device)
        assert ours.history.kl == theirs.history.kl
    (said,) = capsys.readouterr().err.splitlines()  # once, for both
    assert said.startswith(f"Trained weights cannot be kept in {weights.folder()} (Permission denied): ")
    assert "starts from the beginning when it is cut off" in said


@pytest.mark.parametrize("variable", ["EXPVAE_CACHE", "HOME"])
def test_where_no_cache_can_be_made_a_model_is_trained_without(variable, monkeypatch, capsys, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.delenv("EXPVAE_CACHE")
    monkeypatch.setenv(variable, str(tmp_path / "file" / "home"))
    result = trained()
    assert not result.reused
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith(f"Trained weights cannot be kept in {weights.folder()} (Not a directory): ")
    monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / "cache"))
    assert_same_model(result, trained())


def test_a_cache_that_may_not_be_entered_is_as_none(read_only, open_place, monkeypatch, capsys):
    monkeypatch.setenv("EXPVAE_CACHE", str(open_place / "cache"))
    first = trained()
    with read_only(weights.folder(), 0):
        second = trained()
        with weights.cached_only(), pytest.raises(weights.NotCachedError):
            trained()
    assert not second.reused
    assert_same_model(first, second)
    assert "(Permission denied): training goes on without." in capsys.readouterr().err


def test_the_files_of_the_cache_follow_the_umask(umask, odd_modes, frequent_checkpoints):
    seen = []

    def look(step):
        seen.extend(path for path in weights.folder().glob("*.checkpoint") if step > 2)
        assert odd_modes(weights.folder()) == {}

    trained(lambda: TinyVAE(look))
    assert seen
    assert odd_modes(weights.folder()) == {}


# --- bfloat16 --------------------------------------------------------------------------------------------------------


def test_bfloat16_trains_nearly_as_float32_does():
    kinds = []

    class Watched(TinyVAE):
        __module__ = TinyVAE.__module__

        def encode(self, x_BCYX):
            mu_BI, logvar_BI = super().encode(x_BCYX)
            kinds.append(mu_BI.dtype)
            return mu_BI, logvar_BI

    exact = trained(epochs=5)
    mixed = trained(Watched, epochs=5, precision="bfloat16")
    assert set(kinds) == {torch.bfloat16}  # in validation too
    assert {value.dtype for value in mixed.model.state_dict().values()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")
    assert not any(torch.equal(*pair) for pair in zip(mixed.model.parameters(), exact.model.parameters(), strict=True))
    for name, losses in vars(exact.history).items():
        if isinstance(losses, list):
            assert getattr(mixed.history, name) == pytest.approx(losses, rel=0.02, abs=0.02), name
    assert exact.history.reconstruction[-1] < 0.99 * exact.history.reconstruction[0]  # more than they differ


@pytest.mark.parametrize("faster", ["float32", "bfloat16"])
def test_a_vae_is_trained_in_what_proves_faster_unless_told_otherwise(monkeypatch, faster):
    monkeypatch.setattr(devices, "choose_precision", lambda name, device: {"auto": faster}.get(name, name))
    result = weights.trained(TinyVAE, images(), images(4, 1000), RECIPE, epochs=1, seed=0, device=CPU, progress=False)
    assert result.precision == faster
    assert trained(epochs=1, precision=faster).reused


def test_bfloat16_gives_the_same_bits_again_and_after_a_kill(frequent_checkpoints, monkeypatch, tmp_path):
    def interrupt(step):
        if step == 7:
            raise KeyboardInterrupt

    taken, results = [], []
    with pytest.raises(KeyboardInterrupt):
        trained(lambda: TinyVAE(interrupt), precision="bfloat16")
    assert not torch.is_autocast_enabled("cpu")
    results.append(trained(lambda: TinyVAE(taken.append), precision="bfloat16"))
    assert len(taken) == STEPS - 6
    for name in ("first", "second"):
        monkeypatch.setenv("EXPVAE_CACHE", str(tmp_path / name))
        results.append(trained(precision="bfloat16"))
    assert [result.reused for result in results] == [False] * 3
    for result in results[1:]:
        assert_same_model(results[0], result)
        assert results[0].history.kl == result.history.kl


@pytest.mark.parametrize("precision", ["float16", ""])
def test_an_unknown_precision_is_refused(precision):
    with pytest.raises(ValueError, match=rf"^precision must be one of auto, float32, bfloat16; got '{precision}'$"):
        trained(precision=precision)
    assert not weights.folder().exists()


# --- two processes ---------------------------------------------------------------------------------------------------


def child(cache, started):
    """Train, slowly from the moment that the file `started` is there."""

    def event(step):
        if step == 2:
            started.touch()
            time.sleep(1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EXPVAE_CACHE", str(cache))
        result = trained(lambda: TinyVAE(event))
    print(json.dumps({"reused": result.reused, "kl": result.history.kl}))


def test_two_processes_train_once(tmp_path):
    started = tmp_path / "started"
    call = f"child(Path({str(weights.folder())!r}), Path({str(started)!r}))"
    command = [sys.executable, "-c", f"from pathlib import Path; import {HERE.stem}; {HERE.stem}.{call}"]
    process = subprocess.Popen(command, cwd=HERE.parent, stdout=subprocess.PIPE, text=True)
    try:
        limit = time.monotonic() + 300
        while not started.exists():
            assert process.poll() is None
            assert time.monotonic() < limit
            time.sleep(0.02)
        assert stored() == []
        second = trained(lambda: TinyVAE(lambda step: pytest.fail("both processes train")))
        first = json.loads(process.communicate(timeout=300)[0])
    finally:
        process.kill()
        process.wait()
    assert (first["reused"], second.reused) == (False, True)
    assert first["kl"] == second.history.kl
