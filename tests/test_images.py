import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from expvae_book.data import images

SHAPE = (40, 24)
# How each orientation of EXIF is undone, by numpy and not by Pillow.
UPRIGHT = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x),
}


def noise(*channels, shape=SHAPE):
    return np.random.default_rng(0).integers(0, 256, (*shape, *channels), dtype=np.uint8)


def half():
    """A mask with anomalous pixels on one side only."""
    mask_YX = np.zeros(SHAPE, np.uint8)
    mask_YX[3:12, 2:20] = 255
    return mask_YX


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def png(depth, colour, rows, width):
    """A PNG file of depths that Pillow does not write."""
    header = struct.pack(">IIBBBBB", width, len(rows), depth, colour, 0, 0, 0)
    parts = [(b"IHDR", header), (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    chunks = [struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
              for kind, body in parts]  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def palette(index_YX, *colours):
    image = Image.frombytes("P", index_YX.shape[::-1], index_YX.tobytes())
    image.putpalette([value for colour in colours for value in colour])
    return image


def refused(file, *parts):
    """Images and masks are refused in one sentence that names the file."""
    for call in (lambda: images.read(file, "L"), lambda: images.read(file, "RGB"), lambda: images.read_mask(file)):
        with pytest.raises(ValueError) as caught:
            call()
        said = str(caught.value)
        assert said.startswith(f"{file} ") and "\n" not in said
        assert all(part in said for part in parts), said


def test_a_png_whose_checksum_does_not_fit_is_refused(tmp_path):
    file = tmp_path / "x.png"
    Image.fromarray(noise()).save(file)
    content = file.read_bytes()
    for at in range(content.index(b"IDAT") + 4, len(content) - 16, 7):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
        refused(file, "is damaged or no image that can be taken")


# Images


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".jpg"])
@pytest.mark.parametrize("channels", [(), (3,)])
def test_grey_and_colour_keep_their_pixels(suffix, channels, tmp_path):
    file = tmp_path / f"x{suffix}"
    Image.fromarray(noise(*channels)).save(file)
    for mode in ("L", "RGB"):
        with Image.open(file) as image:
            np.testing.assert_array_equal(images.read(file, mode), image.convert(mode))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tif"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation(orientation, suffix, tmp_path):
    file, plain = tmp_path / f"x{suffix}", tmp_path / f"plain{suffix}"
    Image.fromarray(noise(3)).save(file, exif=oriented(orientation))
    Image.fromarray(noise(3)).save(plain)
    expected_YXC = UPRIGHT[orientation](np.array(Image.open(plain)))
    np.testing.assert_array_equal(images.read(file, "RGB"), expected_YXC)
    Image.fromarray(half()).save(file, exif=oriented(orientation))
    np.testing.assert_array_equal(images.read_mask(file), UPRIGHT[orientation](half()) > 0)


def test_palette_becomes_its_colours(tmp_path):
    colours = np.array([(10, 20, 30), (200, 100, 50), (0, 0, 255)], np.uint8)
    index_YX = noise() % 3
    palette(index_YX, *colours.tolist()).save(tmp_path / "x.png")
    np.testing.assert_array_equal(images.read(tmp_path / "x.png", "RGB"), colours[index_YX])
    luma = (colours @ [0.299, 0.587, 0.114]).round().astype(np.uint8)
    np.testing.assert_array_equal(images.read(tmp_path / "x.png", "L"), luma[index_YX])


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_bits_become_black_and_white(suffix, tmp_path):
    Image.fromarray(half()).convert("1").save(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(images.read(tmp_path / f"x{suffix}", "L"), half())


def test_two_bits(tmp_path):
    (tmp_path / "x.png").write_bytes(png(2, 0, [bytes([0b00011011])], 4))
    np.testing.assert_array_equal(images.read(tmp_path / "x.png", "L"), [[0, 85, 170, 255]])
    np.testing.assert_array_equal(images.read_mask(tmp_path / "x.png"), [[False, True, True, True]])


@pytest.mark.parametrize("suffix", [".png", ".tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_opaque_alpha_is_dropped(suffix, channels, tmp_path):
    x_YXC, alpha_YX = noise(channels), np.full(SHAPE, 255, np.uint8)
    Image.fromarray(np.dstack([x_YXC, alpha_YX])).save(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(images.read(tmp_path / f"x{suffix}", "RGB"), np.broadcast_to(x_YXC, (*SHAPE, 3)))
    if channels == 1:
        np.testing.assert_array_equal(images.read(tmp_path / f"x{suffix}", "L"), x_YXC[:, :, 0])


@pytest.mark.parametrize("form", ["LA", "RGBA", "P", "PA", "L", "RGB", "1"])
def test_transparent_pixels_lie_on_black(form, tmp_path):
    alpha_YX = np.full(SHAPE, 255, np.uint8)
    alpha_YX[5:9, 5] = 0, 1, 128, 254
    file, options = tmp_path / "x.png", {}
    image = {
        "LA": lambda: Image.fromarray(np.dstack([noise(), alpha_YX])),
        "RGBA": lambda: Image.fromarray(np.dstack([noise(3), alpha_YX])),
        "P": lambda: palette(noise() % 2, (0, 0, 0), (255, 0, 0)),
        "PA": lambda: palette(noise() % 2, (0, 0, 0), (255, 0, 0)),
        "L": lambda: Image.fromarray(noise()),
        "RGB": lambda: Image.fromarray(noise(3)),
        "1": lambda: Image.fromarray(half()).convert("1"),
    }[form]()
    # One level or colour that stands for no ink; of palettes also a byte for each.
    key = {"P": 0, "PA": bytes([255, 128]), "L": int(noise()[0, 0]), "RGB": tuple(noise(3)[0, 0].tolist()), "1": 0}
    if form in key:
        options["transparency"] = key[form]
    image.save(file, **options)
    with Image.open(file) as image:
        x_YXC = np.array(image.convert("RGBA")).astype(float)
    expected_YXC = x_YXC[..., :3] * x_YXC[..., 3:] / 255
    assert (x_YXC[..., 3] < 255).any()
    assert abs(np.array(images.read(file, "RGB")) - expected_YXC).max() <= 1
    sure_YX = abs(expected_YXC.max(-1) - 0.5) > 0.5  # what rounding does not decide
    np.testing.assert_array_equal(images.read_mask(file)[sure_YX], expected_YXC.max(-1)[sure_YX] > 0)


def test_unused_transparency_is_none(tmp_path):
    palette(1 + noise() % 2, (0, 0, 0), (255, 0, 0), (0, 0, 255)).save(tmp_path / "x.png", transparency=0)
    assert images.read(tmp_path / "x.png", "RGB").getpixel((0, 0)) in ((255, 0, 0), (0, 0, 255))


def deep():
    """Sixteen bits that use their whole range."""
    return np.random.default_rng(0).integers(0, 2**16, SHAPE).astype(np.uint16)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_of_sixteen_bits_the_upper_eight_are_taken_and_a_mask_counts_all(suffix, order, tmp_path):
    file = tmp_path / f"x{suffix}"
    Image.fromarray(deep().astype(f"{order}u2")).save(file)
    np.testing.assert_array_equal(images.read(file, "L"), deep() // 256)
    np.testing.assert_array_equal(images.read(file, "RGB"), np.dstack([deep() // 256] * 3))
    Image.fromarray((half() // 255).astype(f"{order}u2")).save(file)
    np.testing.assert_array_equal(images.read_mask(file), half() > 0)


@pytest.mark.parametrize(("colour", "channels"), [(2, 3), (4, 2), (6, 4)])
def test_of_sixteen_bit_colours_the_upper_eight_are_taken(colour, channels, tmp_path):
    x_YXC = np.dstack([np.roll(deep(), channel) for channel in range(channels)])
    if colour > 2:
        x_YXC[..., -1] = 2**16 - 1
    rows = [row.astype(">u2").tobytes() for row in x_YXC]
    (tmp_path / "x.png").write_bytes(png(16, colour, rows, SHAPE[1]))
    grey_or_colours = x_YXC[..., :3] if channels > 2 else np.dstack([x_YXC[..., 0]] * 3)
    np.testing.assert_array_equal(images.read(tmp_path / "x.png", "RGB"), grey_or_colours // 256)
    with pytest.raises(ValueError, match=r"x\.png is a mask in colours of 16 bits, of which low ones would be lost"):
        images.read_mask(tmp_path / "x.png")


def test_twelve_bits_in_sixteen_are_refused(tmp_path):
    Image.fromarray(deep() // 16).save(tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"x\.png has 16 bits per channel and no value above 4095: .*multiply the val"):
        images.read(tmp_path / "x.png", "L")


@pytest.mark.parametrize(
    ("form", "suffix"), [(form, ".tif") for form in ("F", "I", "CMYK", "LAB")] + [("CMYK", ".jpg")]
)
def test_other_modes_are_refused(form, suffix, tmp_path):
    image = Image.fromarray(noise(3))
    if form == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(image, *profiles, outputMode="LAB")
    else:
        image = image.convert("L" if form in "FI" else "RGB").convert(form)
    image.save(tmp_path / f"x{suffix}")
    refused(tmp_path / f"x{suffix}", f"must be grey or RGB with 8 or 16 bits per channel; its mode is {form}")


@pytest.mark.parametrize(("suffix", "kind"), [(".tif", "TIFF"), (".png", "PNG"), (".png", "GIF")])
def test_several_frames_are_refused(suffix, kind, tmp_path):
    first, second = (Image.fromarray(x) for x in (noise(), half()))
    first.save(tmp_path / f"x{suffix}", kind, save_all=True, append_images=[second])
    refused(tmp_path / f"x{suffix}", "must hold one image; it holds 2")


def test_previews_of_a_photograph_are_left_aside(tmp_path):
    first, second = (Image.fromarray(x) for x in (noise(3), noise(3)[::-1]))
    first.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[second])
    first.save(tmp_path / "plain.jpg")
    with Image.open(tmp_path / "x.jpg") as image:
        assert image.n_frames == 2
    np.testing.assert_array_equal(images.read(tmp_path / "x.jpg", "RGB"), Image.open(tmp_path / "plain.jpg"))


@pytest.mark.parametrize("damage", [lambda content: content[:300], lambda content: b"", lambda content: b"no image"])
def test_damage_is_named(damage, tmp_path):
    Image.fromarray(noise(3)).save(tmp_path / "x.png")
    (tmp_path / "x.png").write_bytes(damage((tmp_path / "x.png").read_bytes()))
    refused(tmp_path / "x.png", "is damaged or no image")


# Masks


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
@pytest.mark.parametrize("values", [(0, 1, 2, 3), (0, 1, 127, 255), (0, 60, 120, 180), (0, 1, 1, 1)])
def test_every_value_of_a_lossless_mask_is_a_defect(values, suffix, tmp_path):
    value_YX = np.array(values, np.uint8)[noise() % 4]
    Image.fromarray(value_YX).save(tmp_path / f"x{suffix}")
    np.testing.assert_array_equal(images.read_mask(tmp_path / f"x{suffix}"), value_YX > 0)


def test_every_colour_but_black_is_a_defect(tmp_path):
    index_YX = noise() % 4
    colours = [(0, 0, 0), (0, 0, 1), (255, 0, 0), (0, 1, 0)]  # the second is black as a grey level
    palette(index_YX, *colours).save(tmp_path / "palette.png")
    Image.fromarray(np.array(colours, np.uint8)[index_YX]).save(tmp_path / "colours.png")
    for name in ("palette.png", "colours.png"):
        np.testing.assert_array_equal(images.read_mask(tmp_path / name), index_YX > 0)


@pytest.mark.parametrize("top", [255, 120])
@pytest.mark.parametrize(("suffix", "options"), [(".jpg", {}), (".tif", {"compression": "jpeg"})])
def test_ringing_of_a_lossy_mask_stays_out(suffix, options, top, tmp_path):
    Image.fromarray(half() // 255 * np.uint8(top)).save(tmp_path / f"x{suffix}", quality=60, **options)
    with Image.open(tmp_path / f"x{suffix}") as image:
        assert ((np.array(image) > 0) != (half() > 0)).any()
    np.testing.assert_array_equal(images.read_mask(tmp_path / f"x{suffix}"), half() > 0)


@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_black_mask_marks_nothing(suffix, tmp_path):
    Image.fromarray(half() * 0).save(tmp_path / f"x{suffix}")
    assert not images.read_mask(tmp_path / f"x{suffix}").any()
