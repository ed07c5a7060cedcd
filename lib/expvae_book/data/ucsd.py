"""UCSD Ped1: clips of a walkway in the official layout, or generated clips where they are absent."""

import hashlib
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor

import expvae_book.data
from expvae_book.data import catalogue, images, walkway
from expvae_book.data.card import IMAGES, DataCard, listed, survey, there

DATA = ("auto", "real", "sample")
MASK_RESIZES = ("nearest", "truncated")
OFFICIAL_CLIPS = {"train clips": 34, "test clips": 36, "masked clips": 10}  # of 200 frames each
RELEASED_MASKS = (3, 4, 14, 18, 19, 21, 22, 23, 24, 32)  # the test clips with pixel masks in the release
SAMPLE_MASKED = 4  # of the generated test clips, because the release has masks for a part of its clips only
SAMPLE_NOTE = (
    "Not UCSD Ped1: drawn pedestrians on a drawn walkway, and in every test clip a cart or a cyclist. The masks are "
    "exactly the pixels that show it; two of the six test clips have none."
)


@dataclass(frozen=True)
class UCSD:
    """Frames in memory, square and grey, in the order of their clips and within a clip of their names.

    Attributes:
        train_NYX: Training frames, which show pedestrians only.
        train_clip_N: Number of the clip that a training frame belongs to.
        test_NYX: Test frames, some of which show a vehicle.
        test_clip_N: Number of the clip that a test frame belongs to.
        test_mask: For each test frame its anomalous pixels, in the same size, or None where its clip has no masks.
        card: What they are. Its counts are frames and masks, and clips.
    """

    train_NYX: UInt8[Tensor, "train size size"]
    train_clip_N: Int64[Tensor, " train"]
    test_NYX: UInt8[Tensor, "test size size"]
    test_clip_N: Int64[Tensor, " test"]
    test_mask: list[Bool[Tensor, "size size"] | None]
    card: DataCard

    @property
    def test_anomalous(self) -> list[bool | None]:
        """For each test frame whether any of its pixels is anomalous, or None where its clip has no masks."""
        return [None if mask_YX is None else bool(mask_YX.any()) for mask_YX in self.test_mask]


def load(data: str = "auto", root: Path | None = None, mask_resize: str = "nearest", size: int = 100) -> UCSD:
    """Load Ped1 from `ROOT/UCSD_Anomaly_Dataset.v1p2/UCSDped1`, or the generated sample.

    Clips lie in Train/Train001, ... and Test/Test001, ..., masks in Test/Test001_gt, ... under the names of their
    frames. A clip may have any number of frames, of any size and in any format of `card.IMAGES`, which
    `images.read` reads as a viewer shows them. Frames become grey (ITU-R 601 luma) and size x size by Pillow's bilinear
    interpolation, which widens its triangle to the scale when it shrinks an image (what torchvision's Resize does by
    default).

    Args:
        data: "real" (the files), "sample" (the generated clips) or "auto" (the files where there are any).
        root: Data root; by default `expvae_book.data.root()`.
        mask_resize: How a mask, whose anomalous pixels are those of `images.read_mask`, is resized. "nearest" takes
            the pixel nearest to each centre. "truncated" is what published code comes to: bilinear as for frames, in
            [0, 1], then cut to a whole number, so that a pixel stays anomalous only where all that it was computed
            from is, and every region loses its border. A frame whose mask is left without anomalous pixels counts as
            normal, which is said on the error stream.
        size: Pixels along either side of a frame and of its mask, 8 or more. The network of the first report takes
            100, that of Brongers et al. 96.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If an argument is none of these, an image is damaged or refused, a clip has no frames or
            its masks do not fit its frames; the message names the file or folder.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}; got {data!r}")
    _check(mask_resize, size)
    if data == "sample":
        return sample(mask_resize=mask_resize, size=size)
    root = Path(root or expvae_book.data.root())
    folder = root / catalogue.UCSD.folder / "UCSDped1"
    command = f"python -m expvae_book.data fetch ucsd --root {shlex.quote(str(root))}"
    if data == "auto" and not folder.exists():
        # To the error stream: notebooks show it on a coloured ground, between code and results.
        print(
            f"UCSD Ped1 is not in {folder}{there(folder, root)}: using a generated SAMPLE of walkway scenes "
            f"instead, and marking every result. `{command}` fetches UCSD Ped1.",
            file=sys.stderr,
        )
        return sample(mask_resize=mask_resize, size=size)
    missing = [f"{name}/" for name in ("Train", "Test") if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {' and '.join(missing)}{there(folder, root)}; `{command}` fetches UCSD Ped1"
        )
    return _real(folder, root, mask_resize, size)


def sample(seed: int = 0, mask_resize: str = "nearest", size: int = 100) -> UCSD:
    """Generate clips of a walkway, with a cart or a cyclist in every test clip.

    Six training and six test clips of 24 frames each, drawn at 158x238 and made square like the release. The first
    four test clips have masks, which are at 158x238 exactly the pixels that show the vehicle; carts and cyclists take
    turns. The digest of the card is that of the drawn frames and masks, whatever becomes of them.

    Args:
        seed: Which scenes.
        mask_resize: As for `load`.
        size: As for `load`.

    Raises:
        ValueError: If mask_resize is unknown or size too small.
    """
    _check(mask_resize, size)
    digest = hashlib.sha256()
    frames, clips = {"train": [], "test": []}, {"train": [], "test": []}
    masks = []
    for name, clip, frame_YX, vehicle_YX in walkway.scenes(seed):
        frames[name].append(_resize(Image.fromarray(frame_YX), size))
        clips[name].append(clip)
        digest.update(frame_YX.tobytes())
        if name == "test" and clip <= SAMPLE_MASKED:
            masks.append(_resize_mask(vehicle_YX, mask_resize, size))
            digest.update(vehicle_YX.tobytes())
        elif name == "test":
            masks.append(None)
    card = DataCard(
        name="ucsd",
        kind="sample",
        counts={
            "train": len(frames["train"]),
            "test": len(frames["test"]),
            "masks": sum(mask_YX is not None for mask_YX in masks),
            "train clips": len(set(clips["train"])),
            "test clips": len(set(clips["test"])),
            "masked clips": SAMPLE_MASKED,
        },
        official=catalogue.UCSD.official | OFFICIAL_CLIPS,
        digest=digest.hexdigest(),
        licence="MIT",
        credit="Generated walkway scenes, not UCSD Ped1 (this book, MIT)",
        note=SAMPLE_NOTE,
    )
    return UCSD(
        train_NYX=_stack(frames["train"]),
        train_clip_N=torch.tensor(clips["train"]),
        test_NYX=_stack(frames["test"]),
        test_clip_N=torch.tensor(clips["test"]),
        test_mask=masks,
        card=card,
    )


def split(
    test_clip_N: Int64[Tensor, " n"], test_mask: list[Bool[Tensor, "size size"] | None], seed: int = 0
) -> tuple[Int64[Tensor, " v"], Int64[Tensor, " t"]]:
    """Divide the test clips at random into 20 % for validation and 80 % for testing, as the first report does.

    Whole clips go to one side, because neighbouring frames are nearly the same image. Clips with masks and clips
    without are divided each for themselves, so that neither side is left without masks. The division has a seed of its
    own: models that differ in the seed of their training are compared on the same clips.

    Args:
        test_clip_N: Number of the clip of each frame, as in `UCSD`.
        test_mask: A mask per frame, or None, as in `UCSD`.
        seed: Which division.

    Returns:
        The numbers of the validation clips (of each kind the nearest whole number to a fifth, and at least one with
        masks) and of the test clips, each in rising order. ``torch.isin(test_clip_N, clips)`` tells their frames.

    Raises:
        ValueError: If there are fewer than two clips with masks.
    """
    has_mask_N = torch.tensor([mask_YX is not None for mask_YX in test_mask], dtype=torch.bool)
    masked = torch.unique(test_clip_N[has_mask_N])
    unmasked = torch.unique(test_clip_N[~has_mask_N])
    if len(masked) < 2:
        raise ValueError(f"test_mask must hold masks of two clips or more to be divided; got {len(masked)}")
    rng = np.random.default_rng(seed)
    validation, test = [], []
    for clips, least in ((masked, 1), (unmasked, 0)):
        clips = clips[torch.from_numpy(rng.permutation(len(clips)))]
        held = max(least, round(len(clips) / 5))
        validation.append(clips[:held])
        test.append(clips[held:])
    return torch.cat(validation).sort().values, torch.cat(test).sort().values


def _real(folder: Path, root: Path, mask_resize: str, size: int) -> UCSD:
    train, test = (_clips(folder / name, name) for name in ("Train", "Test"))
    masks = {}
    for gt in sorted(path for path in (folder / "Test").glob("Test[0-9][0-9][0-9]_gt") if path.is_dir()):
        number = _number(gt.name.removesuffix("_gt"))
        if number not in test:
            raise ValueError(f"{gt} holds masks for a clip that is not there")
        masks[number] = _masks(gt, test[number])
    card = survey(catalogue.UCSD, root)
    counts = card.counts | {"train clips": len(train), "test clips": len(test), "masked clips": len(masks)}
    official = card.official | OFFICIAL_CLIPS
    kind = "complete" if card.kind == "complete" and counts == official else "partial"
    test_frames, test_mask, lost = [], [], []
    for number, files in test.items():
        for file, mask_file in zip(files, masks.get(number, [None] * len(files)), strict=True):
            frame = images.read(file, "L")
            test_frames.append(_resize(frame, size))
            test_mask.append(None)
            if mask_file is not None:
                mask_YX = _mask(mask_file, frame)
                test_mask[-1] = _resize_mask(mask_YX, mask_resize, size)
                if mask_YX.any() and not test_mask[-1].any():
                    lost.append(f"{mask_file.parent.name}/{mask_file.name}")
    if lost:
        print(
            f"At {size}x{size} pixels ({mask_resize}) nothing is left of the anomalies in {len(lost)} of "
            f"{counts['masks']} masks, whose frames count as normal: {listed(lost)}.",
            file=sys.stderr,
        )
    return UCSD(
        train_NYX=_stack([_resize(images.read(file, "L"), size) for files in train.values() for file in files]),
        train_clip_N=_numbers(train),
        test_NYX=_stack(test_frames),
        test_clip_N=_numbers(test),
        test_mask=test_mask,
        card=replace(card, kind=kind, counts=counts, official=official),
    )


def _clips(folder: Path, name: str) -> dict[int, list[Path]]:
    """The frames of every clip, by the clip's number."""
    clips = {
        _number(clip.name): _images(clip) for clip in sorted(folder.glob(f"{name}[0-9][0-9][0-9]")) if clip.is_dir()
    }
    if not clips:
        raise ValueError(f"{folder} holds no clips ({name}001, {name}002, ...){there(folder, folder)}")
    for number, files in clips.items():
        if not files:
            clip = folder / f"{name}{number:03d}"
            raise ValueError(f"{clip} holds no frames ({', '.join(sorted(IMAGES))}){there(clip, clip)}")
    return clips


def _masks(folder: Path, frames: list[Path]) -> list[Path]:
    """The masks of a clip, one per frame and of the same name."""
    masks = _images(folder)
    if len(masks) != len(frames):
        raise ValueError(f"{folder} holds {len(masks)} masks for the {len(frames)} frames of {frames[0].parent}")
    for mask, frame in zip(masks, frames, strict=True):
        if mask.stem != frame.stem:
            raise ValueError(f"{mask} has no frame of its name in {frame.parent}, where {frame.name} stands instead")
    return masks


def _number(name: str) -> int:
    return int(name[-3:])


def _images(folder: Path) -> list[Path]:
    # The release holds AppleDouble files (._001.tif) and .DS_Store.
    files = (file for file in folder.iterdir() if file.suffix.lower() in IMAGES and not file.name.startswith("."))
    return sorted(files, key=lambda file: file.name)


def _numbers(clips: dict[int, list[Path]]) -> Int64[Tensor, " n"]:
    return torch.tensor([number for number, files in clips.items() for _ in files])


def _stack(frames: list[UInt8[np.ndarray, "size size"]]) -> UInt8[Tensor, "n size size"]:
    return torch.from_numpy(np.stack(frames))


def _resize(grey: Image.Image, size: int) -> UInt8[np.ndarray, "{size} {size}"]:
    return np.array(grey.resize((size, size), Image.Resampling.BILINEAR))


def _mask(file: Path, frame: Image.Image) -> Bool[np.ndarray, "y x"]:
    mask_YX = images.read_mask(file)
    height, width = mask_YX.shape
    if (width, height) != frame.size:
        raise ValueError(f"{file} has {width}x{height} pixels for a frame of {frame.width}x{frame.height}")
    return mask_YX


def _resize_mask(mask_YX: Bool[np.ndarray, "y x"], mask_resize: str, size: int) -> Bool[Tensor, "{size} {size}"]:
    mask = Image.fromarray(np.where(mask_YX, 255, 0).astype(np.uint8))
    if mask_resize == "nearest":
        return torch.from_numpy(np.array(mask.resize((size, size), Image.Resampling.NEAREST)) > 0)
    return torch.from_numpy(_resize(mask, size) // 255 == 1)


def _check(mask_resize: str, size: int) -> None:
    if mask_resize not in MASK_RESIZES:
        raise ValueError(f"mask_resize must be one of {', '.join(MASK_RESIZES)}; got {mask_resize!r}")
    if not isinstance(size, int) or size < 8:
        raise ValueError(f"size must be a whole number of pixels, 8 or more; got {size!r}")
