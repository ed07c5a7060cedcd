"""The command ``python -m expvae explain``: what it writes, and what it says where it cannot."""

import re
import runpy
import sys

import numpy as np
import pytest
import torch
from matplotlib import colormaps
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from expvae import __main__ as command
from expvae import attention
from expvae.models import DSpritesVAE


class Coloured(nn.Module):
    """An encoder of colours that normalises its batch, whose method has another name."""

    def __init__(self, width: int = 2, bias: bool = True, name: str = ""):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width))
        self.head = nn.Linear(width, 3, bias)
        self.name = name

    def posterior(self, x):
        return {"mu": self.head(self.conv(x).relu().mean((2, 3)))}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with grey images of 64x64 pixels and the weights of a VAE."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_file({name: value.half() for name, value in DSpritesVAE(4).state_dict().items()}, "vae.safetensors")
    (tmp_path / "images").mkdir()
    draw = np.random.default_rng(0)
    for name in ("b.png", "a.PNG", "c.bmp"):
        Image.fromarray(draw.integers(256, size=(64, 64), dtype=np.uint8)).save(f"images/{name}")
    return tmp_path


GIVEN = {
    "--model": "expvae.models:DSpritesVAE",
    "--argument": "latent_dim=4",
    "--weights": "vae.safetensors",
    "--layer": "encoder.conv2",
    "--out": "maps",
}


def arguments(images="images", **changed):
    options = GIVEN | {f"--{name}": value for name, value in changed.items()}
    return ["explain", images, *(part for name, value in options.items() for part in (name, str(value)))]


@pytest.fixture
def explain(monkeypatch, capsys):
    """Run the command in this process; returns what it printed, or its sentence if it ended with status 2."""

    def run(*given, **changed):
        monkeypatch.setattr(sys, "argv", ["expvae", *arguments(*given, **changed)])
        try:
            command.main()
        except SystemExit as ended:
            assert ended.code == 2
            usage, _, said = capsys.readouterr().err.rpartition("python -m expvae explain: error: ")
            assert usage
            return said
        return capsys.readouterr().out

    return run


def run_as_a_module(monkeypatch):
    """What ``python -m expvae`` does, in this process."""
    monkeypatch.delitem(sys.modules, "expvae.__main__")
    # What runpy compiles here holds the checks of the tests; cached, it would be what other processes import.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    runpy.run_module("expvae", run_name="__main__")


def expected(place, preset="liu2020_paper", names=("a.PNG", "b.png", "c.bmp"), **options):
    vae = DSpritesVAE(4)
    vae.load_state_dict(load_file(place / "vae.safetensors"))
    x_BYX = np.stack([np.asarray(Image.open(place / "images" / name)) for name in names])
    return attention(vae.encode, "encoder.conv2", torch.from_numpy(x_BYX)[:, None] / 255, preset, **options).map_BYX


def test_the_command_writes_a_map_and_a_picture_of_every_image(place, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["expvae", *arguments(batch=2)])
    run_as_a_module(monkeypatch)
    done = capsys.readouterr()
    assert "maps, by batch: 100%" in done.err
    maps = place / "maps"
    assert sorted(file.name for file in maps.iterdir()) == [f"{n}.{kind}" for n in "abc" for kind in ("npy", "png")]
    found = np.stack([np.load(maps / f"{name}.npy") for name in "abc"])
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected(place).numpy(), rtol=1e-4, atol=1e-5 * found.max())
    assert done.out == f"3 maps are in maps; their colours reach from 0 to {found.max():.3g}.\n"
    for name, file, map_YX in zip("abc", ("a.PNG", "b.png", "c.bmp"), found, strict=True):
        picture = np.asarray(Image.open(maps / f"{name}.png"))
        np.testing.assert_array_equal(picture[:, :64, 0], np.asarray(Image.open(place / "images" / file)))
        np.testing.assert_array_equal(picture[:, 64:], colormaps["cividis"](map_YX / found.max(), bytes=True)[..., :3])


def test_preset_latent_and_size_are_those_asked_for(place, explain):
    explain(preset="liu2020_code", latent=3)
    whole = expected(place, "liu2020_code", latents=[3])
    np.testing.assert_allclose(np.load("maps/b.npy"), whole[1], rtol=1e-3, atol=1e-5 * float(whole.max()))
    for file in (place / "images").iterdir():
        Image.open(file).resize((128, 128), Image.Resampling.NEAREST).save(file)
    explain(size=64, out="small", preset="brongers2021_disentanglement")
    assert np.load("small/b.npy").shape == (64, 64)
    assert np.asarray(Image.open("small/b.png")).shape == (64, 128, 3)


def test_an_encoder_of_ones_own_by_any_name(place, explain):
    torch.manual_seed(1)
    own = Coloured(4, bias=False).eval()
    save_file(own.state_dict(), "own.safetensors")
    given = {"model": "test_explain.Coloured", "weights": "own.safetensors", "layer": "conv", "encode": "posterior"}
    assert "3 maps are in maps" in explain(**given, argument='{"width": 4, "bias": false, "name": "x"}')
    x_BCYX = torch.from_numpy(np.asarray(Image.open("images/b.png").convert("RGB")) / np.float32(255))
    found = attention(own.posterior, own.conv, x_BCYX.permute(2, 0, 1)[None])
    np.testing.assert_allclose(np.load("maps/b.npy"), found.map_BYX[0].numpy(), rtol=1e-4, atol=1e-6)


def break_image(place):
    (place / "images" / "b.png").write_bytes(b"no image")


def spoil(place):
    """A PNG with another byte among its pixels, which its checksum does not fit."""
    content = (place / "images" / "b.png").read_bytes()
    at = content.index(b"IDAT") + 99
    (place / "images" / "b.png").write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])


def deepen(place):
    Image.fromarray(np.zeros((64, 64), np.uint16)).save(place / "images" / "b.png")


def shrink(place):
    Image.new("L", (32, 64)).save(place / "images" / "b.png")


def repeat(place):
    Image.new("L", (64, 64)).save(place / "images" / "a.jpg")


def make_out(place):
    (place / "maps").mkdir()


def pickle(place):
    torch.save({"weight": torch.zeros(3)}, place / "vae.safetensors")


def nothing(_place):
    pass


@pytest.mark.parametrize(
    ("change", "changed", "said"),
    [
        (nothing, {"images": "nowhere"}, r"nowhere is no folder with images \(\.bmp, \.gif, .*\)"),
        (nothing, {"images": "."}, r"\. is no folder with images"),
        (break_image, {}, r"images/b\.png cannot be read as an image: cannot identify image file"),
        (spoil, {}, r"images/b\.png cannot be read as an image: "),
        (deepen, {}, r"images/b\.png cannot be read as an image: it has more than 8 bits"),
        (shrink, {}, r"c\.bmp and b\.png have different sizes; give --size"),
        (repeat, {}, "images holds two images whose names differ in the suffix only; rename one"),
        (nothing, {"model": "nowhere:VAE"}, r"--model nowhere:VAE cannot be made from .*: No module named 'nowhere'"),
        (nothing, {"model": "expvae.models:VAE"}, "--model expvae.models:VAE cannot .* has no attribute 'VAE'"),
        (nothing, {"model": "VAE"}, "--model VAE cannot be made from"),
        (nothing, {"argument": "width=3"}, r"from \{'width': 3\}: .*unexpected keyword argument 'width'"),
        (nothing, {"argument": "{latent_dim: 4}"}, r"--argument \{latent_dim: 4\}: Expecting property name"),
        (
            nothing,
            {"argument": "latent_dim=5"},
            r"--weights vae\.safetensors do not fit .*: size mismatch for en",
        ),
        (nothing, {"model": "expvae.models:MNISTVAE"}, r"do not fit .*: MNISTVAE: (size mismatch|Missing key)"),
        (pickle, {}, r"--weights vae\.safetensors .* are not safetensors: Error while deserializing header"),
        (nothing, {"weights": "none.safetensors"}, "--weights none.safetensors .*: No such file or directory"),
        (nothing, {"layer": "conv9"}, "layer='conv9' is unknown; convolutions of this model: encoder.conv1"),
        (nothing, {"encode": "embed"}, "--encode embed of expvae.models:DSpritesVAE: .* no attribute 'embed'"),
        (nothing, {"preset": "gradcam"}, r"argument --preset: invalid choice: 'gradcam' \(choose from '?liu2020_paper"),
        (nothing, {"latent": "4"}, r"latents=\[4\] must be one or more indices between 0 and 3"),
        (nothing, {"latent": "all"}, "argument --latent: invalid int value: 'all'"),
        (nothing, {"size": "28"}, "L images of 28x28 pixels: "),
        (nothing, {"batch": "0"}, "--batch must be 1 or more"),
        (nothing, {"size": "-1"}, "--size must be 1 or more"),
        (nothing, {"device": "abacus"}, "--device abacus: Expected one of cpu, cuda"),
        (nothing, {"out": "no/maps"}, r"No such file or directory: 'no/\.maps\.part'"),
        (make_out, {}, "--out maps is there already"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_sentence_and_nothing_is_left(place, explain, change, changed, said):
    change(place)
    before = sorted(place.rglob("*"))
    told = explain(*filter(None, [changed.pop("images", None)]), **changed)
    assert re.search(said, told), told
    assert told.count("\n") == 1
    assert len(told) < 500
    assert sorted(place.rglob("*")) == before


def test_a_full_disk_and_a_kill_leave_nothing_that_hinders(place, explain, full_disk):
    before = sorted(place.rglob("*"))
    with full_disk():
        told = explain()
    assert re.fullmatch(r"--out maps could not be written \(.*\); nothing is left of it\n", told)
    assert sorted(place.rglob("*")) == before
    (place / ".maps.part").mkdir()
    (place / ".maps.part" / "half.npy").touch()  # as a process leaves it that was killed
    assert "3 maps are in maps" in explain()
    assert not {".maps.part", "maps/half.npy"} & {str(path.relative_to(place)) for path in place.rglob("*")}


def test_without_its_packages_the_command_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with pytest.raises(SystemExit, match=r"tqdm.*; what this command needs comes with the extra cli: pip install"):
        run_as_a_module(monkeypatch)
