import hashlib
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.path import Path as Outline

import expvae_book.data.dsprites as dsprites
from expvae_book.data import catalogue
from expvae_book.data.card import survey
from expvae_book.data.dsprites import COUNT, FACTORS, SIZES, VALUES, Sprites
from expvae_book.data.generated import sprites
from expvae_book.data.generated.sprites import SHAPES

FILE = catalogue.DSPRITES.patterns["all"]


@pytest.fixture(scope="module")
def drawn():
    return dsprites.load("sample")


def factors(*rows):
    return torch.tensor(rows)


def factors_of(index_B):
    return torch.from_numpy(np.stack(np.unravel_index(index_B.numpy(), SIZES), axis=1))


def some(number, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).integers(0, COUNT, number))


# Factors and numbers


def test_numbers_are_numpys():
    assert COUNT == np.prod(SIZES) == catalogue.DSPRITES.official["all"]
    index_B = torch.cat([torch.arange(3000), some(3000), torch.tensor([COUNT - 1])])
    assert torch.equal(dsprites.index_of(factors_of(index_B)), index_B)
    # The formula of the release's page: the last factor changes fastest.
    assert dsprites.index_of(factors([0, 2, 3, 4, 5, 6])).tolist() == [(((2 * 6 + 3) * 40 + 4) * 32 + 5) * 32 + 6]


def test_values_are_the_releases():
    assert tuple(VALUES) == FACTORS
    assert tuple(len(values) for values in VALUES.values()) == SIZES
    # As the release's notebook prints them.
    np.testing.assert_allclose(
        VALUES["orientation"][1:3] + VALUES["orientation"][-1:], [0.16110732, 0.32221463, 6.28318531]
    )
    np.testing.assert_allclose(VALUES["x"][1:3] + VALUES["x"][-1:], [0.03225806, 0.06451613, 1], atol=1e-8)
    np.testing.assert_allclose(VALUES["scale"], [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])


# What is drawn


def outline(shape, number=2000):
    """The border of a shape at scale 1, upright, x to the right and y downwards."""
    t = np.linspace(0, 2 * np.pi, number)
    if shape == "square":
        corners = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1), (-1, -1)])
        return corners * sprites.SQUARE / 2
    if shape == "ellipse":
        return np.stack([np.cos(t), np.sin(t) / 2], 1) * sprites.ELLIPSE / 2
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x, (y.max() + y.min()) / 2 - y], 1) * sprites.HEART / 32


def area(points):
    (x, y), (x1, y1) = points.T, np.roll(points, -1, axis=0).T
    return abs((x * y1 - x1 * y).sum()) / 2


def test_images_equal_a_slow_loop(drawn):
    index_B = some(90)
    images_BCYX = drawn.images(index_B)
    assert images_BCYX.dtype == torch.uint8
    assert images_BCYX.shape == (90, 1, 64, 64)
    y_YX, x_YX = np.indices((64, 64))
    points = np.stack([x_YX.ravel(), y_YX.ravel()], 1)
    unequal = 0
    for image_YX, index in zip(images_BCYX[:, 0].numpy(), index_B.tolist(), strict=True):
        _, shape, scale, orientation, x, y = np.unravel_index(index, SIZES)
        angle = 2 * np.pi * orientation / 39
        turn = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
        border = outline(SHAPES[shape]) * (0.5 + 0.1 * scale) @ turn + (16.4 + x, 16.2 + y)
        unequal += (Outline(border).contains_points(points).reshape(64, 64) != image_YX).sum()
    # A polygon is a little inside of an ellipse.
    assert unequal <= 2


@pytest.mark.parametrize("shape", SHAPES)
def test_areas(shape):
    expected = area(outline(shape))
    assert shape != "square" or expected == pytest.approx(sprites.SQUARE**2)
    for scale in VALUES["scale"]:
        drawings = [sprites.draw(shape, scale, angle).sum() for angle in VALUES["orientation"]]
        assert np.mean(drawings) == pytest.approx(expected * scale**2, rel=0.02)
        border = 4 * np.sqrt(expected) * scale
        assert max(abs(np.array(drawings) - expected * scale**2)) < border


def test_mean_and_standard_deviation_are_the_releases(drawn):
    area_S = drawn.pixels.sum((1, 2)).double()
    mean_S = area_S / 64**2
    assert mean_S.mean() == pytest.approx(0.042494423521889584, rel=1e-3)
    assert (mean_S * (1 - mean_S) * 4096 / 4095).sqrt().mean() == pytest.approx(0.19516645880626055, rel=1e-3)


ANGLES = np.random.default_rng(0).uniform(0, 2 * np.pi, 50)


@pytest.mark.parametrize("scale", [0.5, 0.73, 1.0])
def test_symmetries(scale):
    same = {shape: {turn: 0 for turn in (90, 180)} for shape in SHAPES}
    for angle in ANGLES:
        for shape in SHAPES:
            for turn in (90, 180):
                drawings = [sprites.draw(shape, scale, angle + np.deg2rad(more)) for more in (0, turn)]
                same[shape][turn] += np.array_equal(*drawings)
    assert same == {
        "square": {90: 50, 180: 50},
        "ellipse": {90: 0, 180: 50},
        "heart": {90: 0, 180: 0},
    }


@pytest.mark.parametrize("scale", [0.5, 1.0])
def test_heart_has_one_axis(scale):
    upright_YX = sprites.draw("heart", scale, 0.0)
    np.testing.assert_array_equal(upright_YX, upright_YX[:, ::-1])
    # Mirrored at any other axis through its centre it is another picture: the mirror image of the upright heart,
    # turned by an angle, is the upright heart turned by it.
    turned = [sprites.draw("heart", scale, angle) for angle in np.deg2rad(range(15, 360, 15))]
    assert not any(np.array_equal(upright_YX, turned_YX) for turned_YX in turned)
    # It stands on its tip, and turns clockwise.
    rows = np.flatnonzero(upright_YX.any(1))
    assert upright_YX[rows[-1]].sum() < 4 < upright_YX[rows[0] + 2].sum()
    np.testing.assert_array_equal(sprites.draw("heart", scale, np.pi / 2), np.rot90(upright_YX, -1))


def test_only_the_ends_of_orientation_are_the_same(drawn):
    sprite_SYX = drawn.pixels.view(3, 6, 40, 95, 95)
    assert torch.equal(sprite_SYX[:, :, 0], sprite_SYX[:, :, 39])
    different = {image_YX.numpy().tobytes() for image_YX in sprite_SYX[:, :, :39].reshape(-1, 95, 95)}
    assert len(different) == 3 * 6 * 39


@pytest.mark.parametrize(("factor", "shift"), [(4, (0, 1)), (5, (1, 0))])
def test_a_step_is_a_pixel(factor, shift, drawn):
    factors_B6 = factors_of(some(200))
    factors_B6[:, factor] %= 31
    further_B6 = factors_B6.clone()
    further_B6[:, factor] += 1
    before, after = (drawn.images(dsprites.index_of(rows)) for rows in (factors_B6, further_B6))
    assert torch.equal(before.roll(shift, (2, 3)), after)


def test_nothing_is_cut(drawn):
    sizes_S = drawn.pixels.sum((1, 2)).repeat_interleave(4)
    base = torch.arange(720).repeat_interleave(4) * 1024
    corners = base + torch.tensor([0, 31, 31 * 32, 31 * 32 + 31]).repeat(720)
    images_BCYX = drawn.images(corners)
    assert torch.equal(images_BCYX.sum((1, 2, 3)), sizes_S)
    border = images_BCYX.clone()
    border[:, :, 1:-1, 1:-1] = 0
    assert not border.any()
    # The patch in which a sprite is drawn does not cut it either.
    for shape in SHAPES:
        for angle in ANGLES:
            inside_YX = sprites.draw(shape, 1.0, angle, sprites.CENTRE)
            assert not inside_YX[[0, -1]].any() and not inside_YX[:, [0, -1]].any()


def test_shape_must_be_known():
    with pytest.raises(ValueError, match="square, ellipse, heart; got 'star'"):
        sprites.draw("star", 1.0, 0.0)


def test_card_of_the_drawings(drawn):
    assert len(drawn) == COUNT
    assert drawn.card.mark == "rendered"
    assert drawn.card.counts == drawn.card.official == {"all": COUNT}
    assert drawn.card.digest == hashlib.sha256(drawn.pixels.numpy().tobytes()).hexdigest()
    assert dsprites.load("sample").card == drawn.card


def test_to(drawn):
    there = drawn.to("meta")
    assert (there.pixels.device.type, there.card) == ("meta", drawn.card)


# The file


def write(file, imgs, **others):
    np.savez_compressed(file, imgs=imgs, **others)
    return file


def noise(number):
    return np.random.default_rng(number).integers(0, 2, (number, 64, 64), dtype=np.uint8)


@pytest.mark.parametrize("number", [1, 7, 8, 20])
def test_packing(number, tmp_path, monkeypatch):
    monkeypatch.setattr(dsprites, "CHUNK", 8)
    monkeypatch.setattr(dsprites, "COUNT", number)
    imgs = noise(number)
    # An object array is a pickle, as the release's metadata is; it must not be opened.
    file = write(tmp_path / FILE, imgs, metadata=np.array({"author": "nobody"}, dtype=object))
    packed_NP = dsprites._pack(file)
    assert packed_NP.shape == (number, 512)
    sprites = Sprites(torch.from_numpy(packed_NP), dsprites.load("sample").card)
    assert len(sprites) == number
    index_B = torch.randint(number, (50,), generator=torch.Generator().manual_seed(0))
    images_BCYX = sprites.images(index_B)
    assert images_BCYX.dtype == torch.uint8
    np.testing.assert_array_equal(images_BCYX[:, 0], imgs[index_B])


def test_both_stores_give_the_same_images(drawn):
    index_B = some(300)
    packed_NP = np.packbits(drawn.images(index_B).reshape(300, -1).numpy(), axis=1)
    packed = Sprites(torch.from_numpy(packed_NP), drawn.card)
    assert torch.equal(packed.images(torch.arange(300)), drawn.images(index_B))


def test_loading_the_file(tmp_path, monkeypatch):
    imgs = noise(12)
    file = write(tmp_path / FILE, imgs)
    monkeypatch.setattr(dsprites, "COUNT", 12)
    for data in ("real", "auto"):
        loaded = dsprites.load(data, tmp_path)
        np.testing.assert_array_equal(loaded.images(torch.arange(12))[:, 0], imgs)
        assert loaded.card == survey(catalogue.DSPRITES, tmp_path)
        assert loaded.card.mark == "partial"
    content = file.read_bytes()
    monkeypatch.setattr(
        catalogue,
        "DSPRITES",
        replace(catalogue.DSPRITES, official={"all": 12}, checksums={FILE: hashlib.sha256(content).hexdigest()}),
    )
    assert dsprites.load("real", tmp_path).card.mark == ""


def fails(root, error, *parts):
    for data in ("real", "auto"):
        with pytest.raises(error) as caught:
            dsprites.load(data, root)
        said = str(caught.value)
        assert "\n" not in said
        assert all(str(part) in said for part in (root / FILE, "python -m expvae_book.data fetch dsprites", *parts)), (
            said
        )


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: content[: len(content) // 2],
        lambda content: b"",
        lambda content: b"no archive",
        # In the middle of the compressed images.
        lambda content: content[:3000] + bytes([content[3000] ^ 255]) + content[3001:],
    ],
)
def test_damaged_file_is_named(damage, tmp_path, monkeypatch):
    monkeypatch.setattr(dsprites, "COUNT", 12)
    file = write(tmp_path / FILE, noise(12))
    file.write_bytes(damage(file.read_bytes()))
    fails(tmp_path, ValueError, "is truncated or damaged")


@pytest.mark.parametrize(
    ("imgs", "reason"),
    [
        (noise(3)[:, :32], "imgs is uint8 of shape (3, 32, 64)"),
        (noise(3).astype(np.float32), "imgs is float32 of shape (3, 64, 64)"),
        (np.asfortranarray(noise(3)), "of shape (3, 64, 64) in Fortran order"),
        (noise(3) * 255, "a pixel is 255, not 0 or 1"),
        (noise(3)[0], "imgs is uint8 of shape (64, 64)"),
    ],
)
def test_other_arrays_are_refused(imgs, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(dsprites, "COUNT", 3)
    write(tmp_path / FILE, imgs)
    fails(tmp_path, ValueError, reason)


@pytest.mark.parametrize(("change", "reason"), [(-100, "cannot reshape array of size 12188"), (100, "longer")])
def test_length_must_fit_the_header(change, reason, tmp_path, monkeypatch):
    monkeypatch.setattr(dsprites, "COUNT", 3)
    write(tmp_path / "good.npz", noise(3))
    with zipfile.ZipFile(tmp_path / "good.npz") as archive:
        content = archive.read("imgs.npy")
    with zipfile.ZipFile(tmp_path / FILE, "w") as archive:
        archive.writestr("imgs.npy", content[:change] if change < 0 else content + bytes(change))
    fails(tmp_path, ValueError, reason)


def test_archive_without_images(tmp_path):
    np.savez(tmp_path / FILE, latents_classes=np.zeros(3))
    fails(tmp_path, ValueError, "imgs.npy")


def test_fewer_images_are_refused(tmp_path):
    write(tmp_path / FILE, noise(3))
    fails(tmp_path, ValueError, "imgs is uint8 of shape (3, 64, 64), not uint8 of (737280, 64, 64)")


def test_missing_file(drawn, tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match=f"lacks {FILE}; `python -m expvae_book.data fetch dsprites --root"):
        dsprites.load("real", tmp_path)
    assert dsprites.load("auto", tmp_path).card == drawn.card
    said = capsys.readouterr()
    assert said.out == ""
    assert "SAMPLE" in said.err and "fetch dsprites" in said.err
    assert "holds" not in said.err
    for name in ("dsprites.npz", ".hidden"):
        (tmp_path / name).touch()
    (tmp_path / "dsprites-dataset").mkdir()
    found = re.escape(f"({tmp_path} holds dsprites-dataset/, dsprites.npz)")
    with pytest.raises(FileNotFoundError, match=found):
        dsprites.load("real", tmp_path)
    assert dsprites.load("auto", tmp_path).card == drawn.card
    assert re.search(found, capsys.readouterr().err)
    with pytest.raises(ValueError, match="auto, real, sample; got 'fake'"):
        dsprites.load("fake", tmp_path)
