import dataclasses

import numpy as np
import pytest
import torch
from jaxtyping import config
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch.nn.functional import interpolate

from expvae_book.data import catalogue, images, ucsd
from expvae_book.data.card import survey
from expvae_book.data.generated import walkway

SHAPE = (158, 238)


def noise(seed, shape=SHAPE):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def box(top, left, height=40, width=60, shape=SHAPE):
    mask = np.zeros(shape, np.uint8)
    mask[top : top + height, left : left + width] = 255
    return mask


def bilinear(frames_NYX, size):
    frames_NCYX = torch.from_numpy(frames_NYX)[:, None].double()
    return interpolate(frames_NCYX, size=(size, size), mode="bilinear", antialias=True)[:, 0]


def nearest(mask_YX, size):
    rows, columns = (((np.arange(size) + 0.5) * source / size).astype(int) for source in mask_YX.shape)
    return mask_YX[np.ix_(rows, columns)]


def save(file, array):
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(file)
    return file


@pytest.fixture
def ped1(tmp_path):
    """Two training clips of two and one frames; test clips 3 (three frames, masks) and 12 (one frame, no masks)."""
    folder = tmp_path / "UCSD_Anomaly_Dataset.v1p2/UCSDped1"
    # Not in the order of the names, which a file system need not keep.
    for seed, name in enumerate(
        ["Train/Train004/001", "Train/Train001/010", "Train/Train001/002", "Test/Test012/001"]
        + [f"Test/Test003/{number}" for number in ("003", "001", "002")]
    ):
        save(folder / f"{name}.tif", noise(seed))
    for name, mask in (("002", box(10, 20)), ("003", box(100, 170)), ("001", np.zeros(SHAPE, np.uint8))):
        save(folder / f"Test/Test003_gt/{name}.bmp", mask)
    # What the release holds beside the frames.
    for name in ("Train/.DS_Store", "Train/Train001/._002.tif", "Test/Test003/Thumbs.db", "Test/Test003_gt/._001.bmp"):
        (folder / name).write_bytes(b"no image")
    (folder / "Test/UCSDped1.m").write_text("TestVideoFile = {};")
    return folder


def load(folder, data="real", **options):
    return ucsd.load(data, folder.parents[1], **options)


def fails(folder, error, *parts):
    """Both ways of asking for the files fail in one sentence that holds these parts."""
    for data in ("real", "auto"):
        with pytest.raises(error) as caught:
            load(folder, data)
        said = str(caught.value)
        assert "\n" not in said
        assert all(str(part) in said for part in parts), said


# Loading


@pytest.mark.parametrize(("options", "size"), [({}, 100), ({"size": 96}, 96), ({"size": 32}, 32), ({"size": 240}, 240)])
def test_clips_frames_and_masks(options, size, ped1):
    loaded = load(ped1, **options)
    assert loaded.train_clip_N.tolist() == [1, 1, 4]
    assert loaded.test_clip_N.tolist() == [3, 3, 3, 12]
    assert loaded.train_NYX.dtype == loaded.test_NYX.dtype == torch.uint8
    # The sources in the order of the names, resized by torch instead of Pillow.
    for frames_NYX, seeds in ((loaded.train_NYX, (2, 1, 0)), (loaded.test_NYX, (5, 6, 4, 3))):
        assert frames_NYX.shape == (len(seeds), size, size)
        assert (frames_NYX - bilinear(np.stack([noise(seed) for seed in seeds]), size)).abs().max() < 1
    sources = [np.zeros(SHAPE), box(10, 20), box(100, 170)]
    for mask_YX, source in zip(loaded.test_mask, sources, strict=False):
        np.testing.assert_array_equal(mask_YX, nearest(source, size) > 0)
    assert loaded.test_mask[3] is None
    assert loaded.test_anomalous == [False, True, True, None]


def test_card(ped1):
    (ped1.parent / "NOTE.txt").write_text("Seven frames.\n")
    card = load(ped1).card
    assert card.counts == {
        "train": 3,
        "test": 4,
        "masks": 3,
        "train clips": 2,
        "test clips": 2,
        "masked clips": 1,
    }
    assert card.official == {
        "train": 6800,
        "test": 7200,
        "masks": 2000,
        "train clips": 34,
        "test clips": 36,
        "masked clips": 10,
    }
    assert card.mark == "partial"
    assert card.note == "Seven frames."
    assert card.digest == survey(catalogue.UCSD, ped1.parents[1]).digest


def test_official_clips_and_frames():
    clips, images = ucsd.OFFICIAL_CLIPS, catalogue.UCSD.official
    pairs = (("train clips", "train"), ("test clips", "test"), ("masked clips", "masks"))
    assert all(images[image] == 200 * clips[clip] for clip, image in pairs)


def test_complete_only_with_the_official_clips(ped1, monkeypatch):
    monkeypatch.setattr(
        catalogue, "UCSD", dataclasses.replace(catalogue.UCSD, official={"train": 3, "test": 4, "masks": 3})
    )
    monkeypatch.setattr(ucsd, "OFFICIAL_CLIPS", {"train clips": 2, "test clips": 2, "masked clips": 1})
    assert load(ped1).card.mark == ""
    (ped1 / "Train/Train001/010.tif").rename(ped1 / "Train/Train004/010.tif")
    assert load(ped1).card.mark == ""  # the same clips and counts
    (ped1 / "Train/Train005").mkdir()
    (ped1 / "Train/Train004/010.tif").rename(ped1 / "Train/Train005/010.tif")
    assert load(ped1).card.mark == "partial"


@pytest.mark.parametrize(
    ("change", "clips", "mark"),
    [
        ({}, {}, "re-encoded"),
        ({"masks": 2}, {}, "re-encoded"),  # more masks than the release has
        ({"masks": 4}, {}, "partial, re-encoded"),
        ({"train": 4}, {}, "partial, re-encoded"),
        ({}, {"test clips": 3}, "partial, re-encoded"),
        ({}, {"masked clips": 2}, "partial, re-encoded"),
    ],
)
def test_all_frames_encoded_again_are_neither_complete_nor_partial(change, clips, mark, ped1, monkeypatch):
    official = {"train": 3, "test": 4, "masks": 3} | change
    monkeypatch.setattr(catalogue, "UCSD", dataclasses.replace(catalogue.UCSD, official=official))
    monkeypatch.setattr(ucsd, "OFFICIAL_CLIPS", {"train clips": 2, "test clips": 2, "masked clips": 1} | clips)
    (ped1.parent / "NOTE.txt").write_text("All clips, re-encoded.\n")
    assert load(ped1).card.mark == mark


@pytest.mark.parametrize("suffix", [".tif", ".TIFF", ".png", ".bmp", ".jpg"])
def test_formats(suffix, ped1):
    save(ped1 / f"Train/Train009/001{suffix}", np.full(SHAPE, 77, np.uint8))
    loaded = load(ped1)
    assert loaded.train_clip_N[-1] == 9
    assert (loaded.train_NYX[-1] == 77).all()


def test_colour_becomes_grey(ped1):
    save(ped1 / "Train/Train009/001.png", np.full((*SHAPE, 3), (200, 100, 50), np.uint8))
    grey = round(0.299 * 200 + 0.587 * 100 + 0.114 * 50)
    assert (load(ped1).train_NYX[-1] == grey).all()


def test_frames_of_other_sizes(ped1):
    save(ped1 / "Train/Train009/001.png", noise(9, (50, 70)))
    save(ped1 / "Train/Train009/002.png", same := noise(10, (100, 100)))
    np.testing.assert_array_equal(load(ped1).train_NYX[-1], same)


@pytest.mark.parametrize("size", [100, 96])
def test_truncated_masks_lose_their_border(size, ped1):
    shape = (2 * size, 2 * size)
    for number in ("001", "002", "003"):
        save(ped1 / f"Test/Test003/{number}.tif", noise(0, shape))
    masks = [box(0, 3, 31, 40, shape), box(20, 20, 3, 3, shape), noise(0, shape) // 250 * 255]
    for number, mask in zip(("001", "002", "003"), masks, strict=True):
        save(ped1 / f"Test/Test003_gt/{number}.bmp", 255 - mask if number == "003" else mask)
    loaded = load(ped1, mask_resize="truncated", size=size)
    for mask_YX, number in zip(loaded.test_mask, ("001", "002", "003"), strict=False):
        source = np.array(Image.open(ped1 / f"Test/Test003_gt/{number}.bmp")) > 0
        # At half the size the triangle takes in four pixels along either axis.
        around = [range(max(0, 2 * i - 1), min(2 * size, 2 * i + 3)) for i in range(size)]
        expected = [[source[np.ix_(ys, xs)].all() for xs in around] for ys in around]
        np.testing.assert_array_equal(mask_YX, expected)
    assert loaded.test_anomalous == [True, False, True, None]
    assert load(ped1, size=size).test_anomalous == [True, True, True, None]


def test_masks_of_ones(ped1):
    save(ped1 / "Test/Test003_gt/002.bmp", box(10, 20) // 255)
    for mask_resize in images.MASK_RESIZES:
        (ped1 / "Test/Test003_gt/001.bmp").write_bytes((ped1 / "Test/Test003_gt/003.bmp").read_bytes())
        mask_YX = load(ped1, mask_resize=mask_resize).test_mask[1]
        assert mask_YX[20, 20]
        assert not mask_YX[70, 70]


# What is wrong with the data


def test_ringing_of_a_jpeg_mask_stays_out(ped1):
    masks = ped1 / "Test/Test003_gt"
    (masks / "002.bmp").unlink()
    Image.fromarray(box(10, 20)).save(masks / "002.jpg", quality=60)
    with Image.open(masks / "002.jpg") as image:
        assert ((np.array(image) > 0) != (box(10, 20) > 0)).any()
    np.testing.assert_array_equal(load(ped1).test_mask[1], nearest(box(10, 20), 100) > 0)


@pytest.mark.parametrize("mask_resize", images.MASK_RESIZES)
def test_anomaly_that_is_lost_when_shrunk(mask_resize, ped1, capsys):
    load(ped1, mask_resize=mask_resize)
    assert capsys.readouterr().err == ""
    save(ped1 / "Test/Test003_gt/002.bmp", box(2, 2, 1, 1))  # at 50 pixels the first centres lie at 1.6 and 2.4
    assert load(ped1, mask_resize=mask_resize, size=50).test_anomalous[1] is False
    assert capsys.readouterr().err == (
        f"At 50x50 pixels ({mask_resize}) nothing is left of the anomalies in 1 of 3 masks, whose images count as "
        "normal: Test003_gt/002.bmp.\n"
    )


def remove(folder):
    for path in sorted(folder.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    folder.rmdir()


@pytest.mark.parametrize("names", [("Train",), ("Test",), ("Train", "Test")])
def test_missing_folder(names, ped1):
    for name in names:
        remove(ped1 / name)
    lacks = " and ".join(f"{name}/" for name in names)
    found = "".join(f" ({ped1} holds {name}/)" for name in ("Train", "Test") if name not in names and len(names) == 1)
    fails(ped1, FileNotFoundError, f"{ped1} lacks {lacks}{found};", "python -m expvae_book.data fetch ucsd --root")


@pytest.mark.parametrize("name", ["training", "UCSDped1"])
def test_folders_of_other_names(name, ped1):
    (ped1 / "Train").rename(ped1 / name)
    fails(ped1, FileNotFoundError, f"{ped1} lacks Train/ ({ped1} holds ", f"{name}/")


def test_missing_data(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks Train/ and Test/; `python -m expvae_book.data fetch ucsd"):
        ucsd.load("real", tmp_path)


@pytest.mark.parametrize("name", ["Train/Train001", "Test/Test012"])
def test_clip_without_frames(name, ped1):
    for file in (ped1 / name).glob("[0-9]*"):
        file.unlink()
    fails(ped1, ValueError, f"{ped1 / name} holds no frames")
    (ped1 / name / "001.webp").touch()
    fails(ped1, ValueError, f"{ped1 / name} holds no frames", f"({ped1 / name} holds 001.webp)")


def test_no_clips(ped1):
    remove(ped1 / "Train")
    (ped1 / "Train").mkdir()
    fails(ped1, ValueError, f"{ped1 / 'Train'} holds no clips (Train001, Train002, ...)")
    (ped1 / "Train/clip_1").mkdir()
    fails(ped1, ValueError, f"({ped1 / 'Train'} holds clip_1/)")


@pytest.mark.parametrize("left", [0, 2])
def test_masks_must_match_frames_in_number(left, ped1):
    masks = ped1 / "Test/Test003_gt"
    for number in ("001", "002", "003")[left:]:
        (masks / f"{number}.bmp").unlink()
    fails(ped1, ValueError, f"{masks} holds {left} masks for the 3 frames of {ped1 / 'Test/Test003'}")


def test_masks_must_match_frames_in_name(ped1):
    masks = ped1 / "Test/Test003_gt"
    (masks / "001.bmp").rename(masks / "004.bmp")
    fails(ped1, ValueError, masks / "002.bmp", "has no frame of its name", "001.tif")


def test_masks_must_match_frames_in_size(ped1):
    file = save(ped1 / "Test/Test003_gt/002.bmp", box(0, 0, shape=(100, 120)))
    fails(ped1, ValueError, file, "has 120x100 pixels for the 238x158 of", "Test/Test003/002.tif")


def test_masks_without_clip(ped1):
    (ped1 / "Test/Test003_gt").rename(ped1 / "Test/Test004_gt")
    fails(ped1, ValueError, ped1 / "Test/Test004_gt", "a clip that is not there")


def test_unknown_arguments(ped1):
    with pytest.raises(ValueError, match="auto, real, sample; got 'fake'"):
        load(ped1, "fake")
    for call in (lambda: load(ped1, mask_resize="cubic"), lambda: ucsd.sample(mask_resize="cubic")):
        with pytest.raises(ValueError, match="nearest, truncated; got 'cubic'"):
            call()


@pytest.mark.parametrize("size", [31, 0, -96, True, 96.0, "96", (96, 96), None])
def test_bad_size(size, ped1, monkeypatch):
    monkeypatch.setattr(config, "jaxtyping_disable", True)  # as outside of tests: the annotation would refuse it first
    for call in (lambda: load(ped1, size=size), lambda: ucsd.sample(size=size)):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value) == f"size must be a whole number of pixels, 32 or more; got {size!r}"


# The split


@pytest.mark.parametrize(
    ("masked", "unmasked", "validation"), [(2, 0, 1), (5, 0, 1), (8, 0, 2), (17, 0, 3), (4, 2, 1), (10, 26, 7)]
)
def test_split(masked, unmasked, validation):
    clips = masked + unmasked
    clip_N = torch.arange(100, 100 + clips).repeat_interleave(3)
    mask_N = [torch.zeros(8, 8, dtype=torch.bool) if clip < 100 + masked else None for clip in clip_N.tolist()]
    divisions = set()
    for seed in range(20):
        parts = ucsd.split(clip_N, mask_N, seed)
        assert [len(part) for part in parts] == [validation, clips - validation]
        assert sorted(torch.cat(parts).tolist()) == list(range(100, 100 + clips))
        assert all(part.tolist() == sorted(part.tolist()) for part in parts)
        assert all(any(clip < 100 + masked for clip in part.tolist()) for part in parts)
        assert torch.equal(ucsd.split(clip_N.flip(0), mask_N[::-1], seed)[0], parts[0])
        divisions.add(tuple(parts[0].tolist()))
    assert len(divisions) > 1


def test_split_of_one_clip_with_masks():
    mask_YX = torch.zeros(8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match="masks of two clips or more to be divided; got 1"):
        ucsd.split(torch.tensor([7, 7, 8]), [mask_YX, mask_YX, None])


# The sample


@pytest.fixture(scope="module")
def generated():
    return ucsd.load("sample")


@pytest.fixture
def short(monkeypatch):
    """A sample of two training and two test clips of 12 frames; the first test clip has masks."""
    monkeypatch.setattr(walkway, "CLIPS", 2)
    monkeypatch.setattr(walkway, "FRAMES", 12)
    monkeypatch.setattr(ucsd, "SAMPLE_MASKED", 1)


def test_auto_falls_back_to_the_sample_and_says_so(generated, monkeypatch, tmp_path, capsys):
    asked = []
    monkeypatch.setattr(ucsd, "sample", lambda **options: asked.append(options) or generated)
    (tmp_path / catalogue.UCSD.folder / "UCSDped2").mkdir(parents=True)
    loaded = ucsd.load("auto", tmp_path, mask_resize="truncated", size=96)
    assert asked == [{"mask_resize": "truncated", "size": 96}]
    assert loaded.card.kind == loaded.card.mark == "sample"
    said = capsys.readouterr().err
    assert "SAMPLE" in said
    assert str(tmp_path / catalogue.UCSD.folder / "UCSDped1") in said
    assert f"python -m expvae_book.data fetch ucsd --root {tmp_path}" in said
    assert f"({tmp_path / catalogue.UCSD.folder} holds UCSDped2/)" in said
    (tmp_path / catalogue.UCSD.folder).rename(tmp_path / "UCSD_Anomaly_Dataset")
    ucsd.load("auto", tmp_path)
    assert f"({tmp_path} holds UCSD_Anomaly_Dataset/)" in capsys.readouterr().err


def test_sample(generated):
    assert generated.train_NYX.shape == generated.test_NYX.shape == (144, 100, 100)
    for clip_N in (generated.train_clip_N, generated.test_clip_N):
        assert clip_N.bincount().tolist() == [0] + 6 * [24]
    assert [mask is None for mask in generated.test_mask] == 96 * [False] + 48 * [True]
    assert generated.card.counts == {
        "train": 144,
        "test": 144,
        "masks": 96,
        "train clips": 6,
        "test clips": 6,
        "masked clips": 4,
    }
    assert generated.card.official["train"] == 6800
    assert "Not UCSD Ped1" in generated.card.note
    # Every masked clip has frames of both kinds.
    shares = np.array(generated.test_anomalous[:96]).reshape(4, 24).mean(1)
    assert ((shares > 0.3) & (shares < 0.95)).all()


def test_sample_is_the_same_everywhere(generated):
    assert generated.card.digest == "75450590a67e3970e0726f6f19b8e03ecd40e10db1217f64fefe5a0b783fb776"


def test_same_seed_same_pixels(short):
    one, same, other = (ucsd.sample(seed) for seed in (5, 5, 6))
    assert torch.equal(one.train_NYX, same.train_NYX)
    assert torch.equal(one.test_NYX, same.test_NYX)
    assert torch.equal(torch.stack(one.test_mask[:12]), torch.stack(same.test_mask[:12]))
    assert one.test_mask[12:] == same.test_mask[12:] == 12 * [None]
    assert one.card == same.card
    assert one.card.digest != other.card.digest
    assert not torch.equal(one.train_NYX, other.train_NYX)


def test_truncated_sample(generated):
    truncated = ucsd.load("sample", mask_resize="truncated")
    assert truncated.card == generated.card
    assert torch.equal(truncated.test_NYX, generated.test_NYX)
    more, less = (torch.stack(loaded.test_mask[:96]) for loaded in (generated, truncated))
    assert not (less & ~more).any()
    assert 0 < less.sum() < more.sum()


@pytest.mark.parametrize("size", [100, 96])
def test_sample_shows_the_scenes(size, short):
    loaded, truncated = (ucsd.sample(2, mask_resize, size) for mask_resize in images.MASK_RESIZES)
    assert loaded.card == truncated.card == ucsd.sample(2, size=50).card
    scenes = list(walkway.scenes(2))
    frames_NYX = torch.cat([loaded.train_NYX, loaded.test_NYX])
    assert torch.equal(frames_NYX, torch.cat([truncated.train_NYX, truncated.test_NYX]))
    assert frames_NYX.shape == (48, size, size)
    assert (frames_NYX - bilinear(np.stack([frame_YX for _, _, frame_YX, _ in scenes]), size)).abs().max() < 1
    assert torch.cat([loaded.train_clip_N, loaded.test_clip_N]).tolist() == [clip for _, clip, _, _ in scenes]
    vehicle_NYX = np.stack([vehicle_YX for _, _, _, vehicle_YX in scenes[24:36]])
    for mask_YX, vehicle_YX in zip(loaded.test_mask[:12], vehicle_NYX, strict=True):
        np.testing.assert_array_equal(mask_YX, nearest(vehicle_YX, size))
    # Pillow rounds to whole grey levels before anything is cut off.
    less_NYX = torch.stack(truncated.test_mask[:12])
    assert torch.equal(less_NYX, bilinear(255 * vehicle_NYX, size) > 254.5)
    assert less_NYX.any()


def test_sample_is_a_scene_and_not_noise(generated):
    # A camera that stands still: nearly every pixel stays near its median, and yet people cross the image.
    median_YX = generated.train_NYX.median(0).values
    away = (generated.train_NYX.int() - median_YX.int()).abs() > 20
    assert 0.005 < away.float().mean() < 0.1
    assert away[:, 25:95].any(0).float().mean() > 0.2
    # The difference to the mean training frame finds vehicles, as it must in such scenes, but people too.
    score_NYX = (generated.test_NYX[:96].float() - generated.train_NYX.float().mean(0)).abs()
    auroc = roc_auc_score(torch.stack(generated.test_mask[:96]).flatten(), score_NYX.flatten())
    assert 0.85 < auroc < 0.999
