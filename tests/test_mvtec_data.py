import re
import subprocess
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import interpolate

from expvae_book.data import catalogue, mvtec
from expvae_book.data.card import survey
from expvae_book.data.generated import workpieces

NO_TEST = "No test images: training only. Maps are made of the images in test/good and test/DEFECT."
COUNTS = {"train": 3, "test": 5, "masks": 3, "test good": 2, "test defective": 3}
TESTS = {"broken": ("000", "004"), "good": ("000", "001"), "stained": ("000",)}
SHAPE = (70, 90)
ROUNDING = 1.01  # grey levels: Pillow rounds once along either axis, and its weights


def noise(seed, shape=SHAPE, channels=3):
    return np.random.default_rng(seed).integers(0, 256, (*shape, channels), dtype=np.uint8)


def blob(seed, shape=SHAPE):
    """A mask of 0 and 255 as in the release."""
    return np.where(np.random.default_rng(seed).random(shape) < 0.3, 255, 0).astype(np.uint8)


def save(file, array, **options):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file, **options)
    return file


def bilinear(image_YXC, size):
    """What Pillow computes but for its rounding, by torch."""
    image_CYX = torch.from_numpy(image_YXC).permute(2, 0, 1)[None].double()
    return interpolate(image_CYX, size=(size, size), mode="bilinear", antialias=True)[0]


def nearest(mask_YX, size):
    """The pixel under each centre, one at a time; in the tests no centre is on a border."""
    resized_YX = np.zeros((size, size), bool)
    for y in range(size):
        for x in range(size):
            row, column = ((2 * i + 1) * source // (2 * size) for i, source in zip((y, x), mask_YX.shape, strict=True))
            resized_YX[y, x] = mask_YX[row, column]
    return resized_YX


def images():
    """Every image of the small category by its place, not in the order of the names."""
    places = [f"train/good/{stem}" for stem in ("002", "000", "001")]
    places += [f"test/{defect}/{stem}" for defect, stems in TESTS.items() for stem in reversed(stems)]
    return {place: noise(seed) for seed, place in enumerate(places)}


def masks():
    places = [f"ground_truth/{defect}/{stem}_mask" for defect in ("stained", "broken") for stem in TESTS[defect]]
    return {place: blob(seed) for seed, place in enumerate(places)}


def build(root, suffix=".png", mask_suffix=".png", leave_out="nothing"):
    folder = root / "mvtec/bottle"
    for arrays, ending in ((images(), suffix), (masks(), mask_suffix)):
        for place, array in arrays.items():
            if not place.startswith(leave_out):
                save(folder / f"{place}{ending}", array)
    return folder


@pytest.fixture
def official(monkeypatch):
    """A release in which bottle is the small category."""
    monkeypatch.setitem(catalogue.MVTEC_OFFICIAL, "bottle", COUNTS)


@pytest.fixture
def bottle(official, tmp_path):
    return build(tmp_path)


def load(folder, **options):
    return mvtec.load("bottle", "real", folder.parents[1], **options)


def fails(folder, error, *parts):
    """Both ways of asking for the files fail in one sentence that holds these parts."""
    for data in ("real", "auto"):
        with pytest.raises(error) as caught:
            mvtec.load("bottle", data, folder.parents[1])
        said = str(caught.value)
        assert "\n" not in said
        assert all(str(part) in said for part in parts), said


# Loading


@pytest.mark.parametrize(
    ("options", "size"), [({}, 256), ({"size": 224}, 224), ({"size": 32}, 32), ({"size": 100}, 100)]
)
def test_images_and_masks(options, size, bottle, capsys):
    # What copies made on other systems hold, and what is no image.
    for name in ("train/good/._000.png", "test/.DS_Store", "test/good/Thumbs.db", "ground_truth/broken/._000_mask.png"):
        (bottle / name).write_bytes(b"no image")
    (bottle / "test/.cache").mkdir()
    loaded = mvtec.load("bottle", "auto", bottle.parents[1], **options)
    assert capsys.readouterr().err == ""
    assert loaded.name == "bottle"
    assert loaded.test_defect == ["broken", "broken", "good", "good", "stained"]
    places = [f"train/good/{stem}" for stem in ("000", "001", "002")]
    places += [f"test/{defect}/{stem}" for defect, stems in TESTS.items() for stem in stems]
    both_NCYX = torch.cat([loaded.train_NCYX, loaded.test_NCYX])
    assert both_NCYX.dtype == torch.uint8
    assert both_NCYX.shape == (8, 3, size, size)
    for image_CYX, place in zip(both_NCYX, places, strict=True):
        assert (image_CYX - bilinear(images()[place], size)).abs().max() < ROUNDING
    for mask_YX, place in zip(loaded.test_mask, places[3:], strict=True):
        assert mask_YX.dtype == torch.bool
        if "good" in place:
            expected_YX = np.zeros((size, size), bool)
        else:
            expected_YX = nearest(masks()[place.replace("test", "ground_truth") + "_mask"] > 0, size)
        np.testing.assert_array_equal(mask_YX.numpy(), expected_YX)


def test_image_of_the_size_asked_for_stays_as_it_is(bottle):
    image_YXC, mask_YX = noise(7, (64, 64)), blob(7, (64, 64))
    save(bottle / "train/good/000.png", image_YXC)
    save(bottle / "test/stained/000.png", image_YXC)
    save(bottle / "ground_truth/stained/000_mask.png", mask_YX)
    loaded = load(bottle, size=64)
    for image_CYX in (loaded.train_NCYX[0], loaded.test_NCYX[-1]):
        np.testing.assert_array_equal(image_CYX.permute(1, 2, 0).numpy(), image_YXC)
    np.testing.assert_array_equal(loaded.test_mask[-1].numpy(), mask_YX > 0)


def test_grey_images_repeat_their_channel(bottle):
    grey_YX = noise(7, (64, 64), 1)[:, :, 0]
    save(bottle / "train/good/000.png", grey_YX)
    save(bottle / "test/good/001.png", np.dstack([grey_YX, np.full((64, 64), 255, np.uint8)]))  # opaque
    loaded = load(bottle, size=64)
    for image_CYX in (loaded.train_NCYX[0], loaded.test_NCYX[3]):
        np.testing.assert_array_equal(image_CYX.numpy(), np.stack([grey_YX] * 3))


@pytest.mark.parametrize("shape", [(1, 1), (33, 257), (300, 41)])
def test_odd_sizes(shape, bottle):
    image_YXC, mask_YX = noise(7, shape), blob(3, shape)
    save(bottle / "test/stained/000.png", image_YXC)
    save(bottle / "ground_truth/stained/000_mask.png", mask_YX)
    loaded = load(bottle, size=48)
    assert (loaded.test_NCYX[-1] - bilinear(image_YXC, 48)).abs().max() < ROUNDING
    np.testing.assert_array_equal(loaded.test_mask[-1].numpy(), nearest(mask_YX > 0, 48))


@pytest.mark.parametrize("suffix", [".bmp", ".tif", ".TIFF"])
def test_lossless_formats(suffix, official, tmp_path):
    png, other = load(build(tmp_path / "png")), load(build(tmp_path / "other", suffix, suffix))
    assert torch.equal(png.train_NCYX, other.train_NCYX)
    assert torch.equal(png.test_NCYX, other.test_NCYX)
    assert torch.equal(torch.stack(png.test_mask), torch.stack(other.test_mask))
    assert (png.card.mark, other.card.mark) == ("", "re-encoded")
    assert other.card.note.splitlines() == [
        f"The {what} are re-encoded: the release holds PNG files, these are {suffix.lower()}."
        for what in ("images", "masks")
    ]


def test_ringing_of_a_jpeg_mask_stays_out(bottle):
    mask_YX = np.zeros(SHAPE, np.uint8)
    mask_YX[13:40, 22:61] = 255
    (bottle / "ground_truth/stained/000_mask.png").unlink()
    file = save(bottle / "ground_truth/stained/000_mask.jpg", mask_YX, quality=60)
    decoded_YX = np.array(Image.open(file))
    assert ((decoded_YX > 0) != (mask_YX > 0)).any()
    np.testing.assert_array_equal(load(bottle, size=48).test_mask[-1].numpy(), nearest(mask_YX > 0, 48))


@pytest.mark.parametrize("form", ["bits", "ones", "colours", "palette"])
def test_masks_of_other_values(form, bottle):
    mask = Image.fromarray(blob(5))
    file = bottle / "ground_truth/stained/000_mask.png"
    if form == "ones":
        mask = mask.point(lambda value: value // 255)
    else:
        mask = mask.convert({"bits": "1", "colours": "RGBA", "palette": "P"}[form])
    mask.save(file)
    np.testing.assert_array_equal(load(bottle, size=48).test_mask[-1].numpy(), nearest(blob(5) > 0, 48))


def test_kinds_of_defect_in_a_mask(bottle):
    kinds_YX = np.random.default_rng(5).integers(0, 4, SHAPE, dtype=np.uint8)
    save(bottle / "ground_truth/stained/000_mask.png", kinds_YX)
    np.testing.assert_array_equal(load(bottle, size=48).test_mask[-1].numpy(), nearest(kinds_YX > 0, 48))


@pytest.mark.parametrize("turned", ["both", "image"])
def test_photograph_of_a_camera_on_its_side(turned, bottle):
    """The mask lies on the defect: drawn on what a viewer shows, or turned by its own orientation."""
    mask_YX = np.zeros((90, 70), np.uint8)
    mask_YX[10:30, 5:50] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    (bottle / "test/stained/000.png").unlink()
    save(bottle / "test/stained/000.jpg", np.rot90(np.dstack([mask_YX] * 3)), quality=95, exif=exif)
    mask = bottle / "ground_truth/stained/000_mask.png"
    if turned == "both":
        save(mask, np.rot90(mask_YX), exif=exif)
    else:
        save(mask, mask_YX)
    loaded = load(bottle, size=48)
    np.testing.assert_array_equal(loaded.test_mask[-1].numpy(), nearest(mask_YX > 0, 48))
    defect_YX = loaded.test_NCYX[-1, 0] > 127
    both, either = (defect_YX & loaded.test_mask[-1]).sum(), (defect_YX | loaded.test_mask[-1]).sum()
    assert both > 0.9 * either


def test_mask_that_marks_nothing_of_a_defect(bottle):
    file = save(bottle / "ground_truth/stained/000_mask.png", np.zeros(SHAPE, np.uint8))
    fails(bottle, ValueError, f"{file} marks no pixel of the defect in {bottle / 'test/stained/000.png'}")


def test_defect_that_is_lost_when_shrunk(bottle, capsys):
    line_YX = np.zeros(SHAPE, np.uint8)
    line_YX[:, 2] = 255  # at 32 pixels the first centres lie in columns 1 and 4
    save(bottle / "ground_truth/broken/004_mask.png", line_YX)
    assert load(bottle, size=256).test_mask[1].any()
    assert capsys.readouterr().err == ""
    assert not load(bottle, size=32).test_mask[1].any()
    assert capsys.readouterr().err == (
        "At 32x32 pixels (nearest) nothing is left of the anomalies in 1 of 3 masks, whose images count as normal: "
        "broken/004_mask.png.\n"
    )


# Less than a category


def test_no_masks(official, tmp_path):
    loaded = load(build(tmp_path, leave_out="ground_truth"))
    assert [mask_YX is None for mask_YX in loaded.test_mask] == [True, True, False, False, True]
    assert not loaded.test_mask[2].any()
    assert loaded.card.counts == COUNTS | {"masks": 0}
    assert (loaded.card.kind, loaded.card.note) == ("partial", "No masks: image-level measures only.")


def test_some_masks(bottle):
    (bottle / "ground_truth/broken/004_mask.png").unlink()
    loaded = load(bottle)
    assert [mask_YX is None for mask_YX in loaded.test_mask] == [False, True, False, False, False]
    assert (loaded.card.kind, loaded.card.note) == ("partial", "1 of 3 defective images have no mask: broken/004.png.")


@pytest.mark.parametrize(
    ("leave_out", "defects", "note"),
    [
        ("test/good", ["broken", "broken", "stained"], "No normal test images: pixel measures only."),
        (("test/good", "ground"), ["broken", "broken", "stained"], "No normal test images and no masks: no measures."),
        (("test", "ground"), [], NO_TEST),
        (("test/b", "test/s", "ground"), ["good", "good"], "No defective test images: nothing to detect."),
    ],
)
def test_missing_test_images(leave_out, defects, note, official, tmp_path):
    loaded = load(build(tmp_path, leave_out=leave_out), size=32)
    assert loaded.test_defect == defects
    assert loaded.test_NCYX.shape == (len(defects), 3, 32, 32)
    assert len(loaded.test_mask) == len(defects)
    assert loaded.train_NCYX.shape == (3, 3, 32, 32)
    assert (loaded.card.kind, loaded.card.note) == ("partial", note)


@pytest.mark.parametrize("there", [False, True])
def test_no_training_images(there, tmp_path):
    folder = build(tmp_path, leave_out="train")
    if there:
        (folder / "train/good").mkdir(parents=True)
    command = f"python -m expvae_book.data fetch mvtec --categories bottle --root {tmp_path}"
    fails(folder, FileNotFoundError, folder / "train/good", command)


@pytest.mark.parametrize(
    ("name", "found"), [("train/good/000.webp", "train/good holds 000.webp"), ("Train/good/0.png", " holds Train/,")]
)
def test_no_training_images_but_others(name, found, tmp_path):
    folder = build(tmp_path, leave_out="train")
    (folder / name).parent.mkdir(parents=True)
    (folder / name).touch()
    if "Train" in name and (folder / "train").exists():
        pytest.skip("this file system does not tell Train from train")
    fails(folder, FileNotFoundError, f"({folder}{'/' if 'train' in name else ''}{found}")


# What cannot be


@pytest.mark.parametrize(
    "place", ["train/good/001", "test/good/000", "test/broken/004", "ground_truth/broken/000_mask"]
)
@pytest.mark.parametrize("damage", ["cut", "empty", "text"])
def test_damaged_file_is_named(place, damage, bottle):
    file = bottle / f"{place}.png"
    content = file.read_bytes()
    file.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "text": b"no image"}[damage])
    fails(bottle, ValueError, f"{file} is damaged or no image")


@pytest.mark.parametrize("place", ["broken/001_mask", "broken/000", "other/000_mask", "good/002_mask"])
def test_orphan_mask_is_named(place, bottle):
    file = save(bottle / f"ground_truth/{place}.png", blob(0))
    fails(bottle, ValueError, f"{file} is the mask of no test image")


def test_masks_of_normal_images(bottle):
    black_YX, complete = np.zeros(SHAPE, np.uint8), load(bottle)
    for stem in TESTS["good"]:
        save(bottle / f"ground_truth/good/{stem}_mask.png", black_YX)
    loaded = load(bottle)
    assert torch.equal(torch.stack(loaded.test_mask), torch.stack(complete.test_mask))
    assert (loaded.card.counts["masks"], loaded.card.kind, loaded.card.note) == (5, "partial", "")
    (bottle / "ground_truth/broken/004_mask.png").unlink()
    assert load(bottle).card.note == "1 of 3 defective images have no mask: broken/004.png."
    for other in ("broken/000", "stained/000"):
        (bottle / f"ground_truth/{other}_mask.png").unlink()
    assert load(bottle).card.note == "No masks: image-level measures only."


@pytest.mark.parametrize("value", [1, 255])
def test_mask_that_marks_pixels_of_a_normal_image(value, bottle):
    black_YX = np.zeros(SHAPE, np.uint8)
    black_YX[3, 4] = value
    file = save(bottle / "ground_truth/good/000_mask.png", black_YX)
    fails(bottle, ValueError, f"{file} marks anomalous pixels in {bottle / 'test/good/000.png'}, which is a normal")


def test_mask_of_another_size(bottle):
    file = save(bottle / "ground_truth/broken/000_mask.png", blob(0, (90, 70)))
    fails(bottle, ValueError, f"{file} has 70x90 pixels for the 90x70 of {bottle / 'test/broken/000.png'}")


@pytest.mark.parametrize("place", ["train/good/001", "test/broken/004", "ground_truth/broken/000_mask"])
def test_image_in_two_formats(place, bottle):
    file = bottle / f"{place}.bmp"
    save(file, noise(0))
    fails(bottle, ValueError, f"{file.parent} holds the image {file.stem} twice: {file.name} and {file.stem}.png")


@pytest.mark.parametrize("category", ["", "Bottle", "metal nut", "../MNIST", "mvtec/bottle"])
@pytest.mark.parametrize("call", [mvtec.load, mvtec.sample])
def test_unknown_category(call, category, bottle):
    with pytest.raises(ValueError, match=f"must be .*one of bottle, cable, .*, zipper.*; got '{category}'$"):
        call(category)


def test_unknown_options(tmp_path):
    with pytest.raises(ValueError, match="data must be one of auto, real, sample; got 'fake'"):
        mvtec.load("pill", "fake", tmp_path)
    for size in (31, 0, -256):
        with pytest.raises(ValueError, match=f"size must be a whole number of pixels, 32 or more; got {size}"):
            mvtec.load("pill", "sample", tmp_path, size=size)


# The card


def test_card_of_a_complete_category(bottle):
    card = load(bottle).card
    assert (card.name, card.kind, card.mark, card.note) == ("mvtec/bottle", "complete", "", "")
    assert card.counts == card.official == COUNTS
    assert (card.licence, card.credit) == (catalogue.MVTEC.licence, catalogue.MVTEC.credit)
    # What `sha256sum FILES | sha256sum` prints, and what the surveys by the card's name find.
    files = sorted(path.relative_to(bottle).as_posix() for path in bottle.rglob("*.png"))
    lines = subprocess.check_output(["sha256sum", *files], cwd=bottle)
    assert card.digest == subprocess.check_output(["sha256sum"], input=lines).decode().split()[0]
    assert card.digest == survey(catalogue.source(card.name), bottle.parents[1]).digest
    assert load(bottle, size=64).card == card


def test_note_beside_the_data(bottle):
    (bottle.parent / "NOTE.txt").write_text("Cleaned by hand.\n")
    card = load(bottle).card
    assert (card.kind, card.mark, card.note) == ("partial", "partial", "Cleaned by hand.")
    (bottle / "NOTE.txt").write_text("Bottles too.\n")
    (bottle / "test/good/001.png").unlink()
    assert load(bottle).card.note == "Cleaned by hand.\nBottles too."


def test_jpeg_images_are_marked(official, tmp_path):
    folder = build(tmp_path, suffix=".jpg")
    loaded = load(folder)
    assert loaded.card.counts == COUNTS
    assert (loaded.card.kind, loaded.card.mark) == ("re-encoded", "re-encoded")
    assert loaded.card.note == "The images are re-encoded: the release holds PNG files, these are .jpg."
    assert all(mask_YX is not None for mask_YX in loaded.test_mask)
    next((folder / "train/good").iterdir()).unlink()
    assert load(folder).card.mark == "partial, re-encoded"


def test_a_missing_image_makes_it_partial(bottle):
    (bottle / "train/good/002.png").unlink()
    card = load(bottle).card
    assert (card.kind, card.note, card.counts["train"], card.official["train"]) == ("partial", "", 2, 3)


def test_categories(tmp_path):
    assert len(mvtec.CATEGORIES) == 15
    assert list(mvtec.CATEGORIES) == sorted(mvtec.CATEGORIES)
    assert set(mvtec.TEXTURES) < set(mvtec.CATEGORIES)
    assert mvtec.OFFICIAL["toothbrush"] == {
        "train": 60, "test": 42, "masks": 30, "test good": 12, "test defective": 30
    }  # fmt: skip
    assert mvtec.available(tmp_path) == []


def test_available(bottle, monkeypatch):
    root = bottle.parents[1]
    save(root / "mvtec/zipper/train/good/000.bmp", noise(0))
    save(root / "mvtec/cable/test/good/000.png", noise(0))
    save(root / "mvtec/spoon/train/good/000.png", noise(0))
    (root / "mvtec/pill/train/good").mkdir(parents=True)
    (root / "mvtec/pill/train/good/._000.png").touch()
    assert mvtec.available(root) == ["bottle", "zipper"]
    monkeypatch.setenv("EXPVAE_DATA", str(root))
    assert mvtec.available() == ["bottle", "zipper"]
    assert mvtec.load("bottle").card.name == "mvtec/bottle"


# The sample


@pytest.fixture(scope="module")
def drawings():
    """Draw every category once only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workpieces, "draw", cache(workpieces.draw))
        yield


@pytest.mark.usefixtures("drawings")
def test_auto_falls_back_to_the_sample_and_says_so(bottle, capsys):
    root = bottle.parents[1]
    loaded = mvtec.load("tile", "auto", root, size=64)
    assert loaded.card.kind == loaded.card.mark == "sample"
    said = capsys.readouterr().err
    assert "SAMPLE" in said
    assert str(root / "mvtec/tile") in said
    assert f"python -m expvae_book.data fetch mvtec --categories tile --root {root}" in said
    assert f"({root / 'mvtec'} holds bottle/)" in said
    with pytest.raises(FileNotFoundError, match=re.escape(str(root / "mvtec/tile"))):
        mvtec.load("tile", "real", root)
    (root / "mvtec").rename(root / "mvtec_anomaly_detection")
    mvtec.load("tile", "auto", root, size=64)
    assert f"({root} holds mvtec_anomaly_detection/)" in capsys.readouterr().err


@pytest.mark.usefixtures("drawings")
def test_sample_holds_what_is_drawn(capsys):
    loaded, drawn = mvtec.load("tile", "sample"), workpieces.draw("tile", 0)
    assert capsys.readouterr().err == ""
    np.testing.assert_array_equal(loaded.train_NCYX.permute(0, 2, 3, 1).numpy(), drawn.train_NYXC)
    np.testing.assert_array_equal(loaded.test_NCYX.permute(0, 2, 3, 1).numpy(), drawn.test_NYXC)
    np.testing.assert_array_equal(torch.stack(loaded.test_mask).numpy(), drawn.test_mask_NYX)
    assert loaded.test_defect == drawn.test_defect
    for defect, mask_YX in zip(loaded.test_defect, loaded.test_mask, strict=True):
        assert mask_YX.any() == (defect != "good")
    card = loaded.card
    good = drawn.test_defect.count("good")
    defective = len(drawn.test_defect) - good
    assert card.counts == {
        "train": len(drawn.train_NYXC), "test": good + defective, "masks": defective,
        "test good": good, "test defective": defective,
    }  # fmt: skip
    assert card.official == mvtec.OFFICIAL["tile"]
    assert (card.name, card.kind, card.licence) == ("mvtec/tile", "sample", "MIT")
    assert "not MVTec AD" in card.credit
    assert "Not MVTec AD" in card.note


@pytest.mark.usefixtures("drawings")
def test_sample_in_other_sizes_and_of_other_seeds():
    big, small, other = mvtec.sample("tile"), mvtec.sample("tile", size=64), mvtec.sample("tile", seed=1, size=64)
    assert small.card == big.card
    assert other.card.digest != small.card.digest
    image_YXC = big.train_NCYX[0].permute(1, 2, 0).numpy()
    assert (small.train_NCYX[0] - bilinear(image_YXC, 64)).abs().max() < ROUNDING
    for mask_YX, small_YX in zip(big.test_mask, small.test_mask, strict=True):
        np.testing.assert_array_equal(small_YX.numpy(), nearest(mask_YX.numpy(), 64))
