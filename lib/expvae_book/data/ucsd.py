"""UCSD Ped1: clips of a walkway in the official layout, or generated clips where they are absent."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Int64, UInt8
from PIL import Image
from torch import Tensor

import expvae_book.data
from expvae_book.data import catalogue, images
from expvae_book.data.card import IMAGES, DataCard, kind_of, survey, takes_sample, there
from expvae_book.data.generated import walkway

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
    `images.read` reads as a viewer shows them. Frames become grey (ITU-R 601 luma) and size x size, see `images.batch`.

    Args:
        data: "real" (the files), "sample" (the generated clips) or "auto" (the files where there are any).
        root: Data root; by default `expvae_book.data.root()`.
        mask_resize: How a mask, whose anomalous pixels are those of `images.read_mask`, is resized: "nearest" or
            "truncated", see `images.batch`. A frame whose mask is left without anomalous pixels counts as normal, which
            is said on the error stream.
        size: Pixels along either side of a frame and of its mask, 32 or more. The network of the first report takes
            100, that of Brongers et al. 96.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If an argument is none of these, an image is damaged or refused, a clip has no frames or
            its masks do not fit its frames; the message names the file or folder.
    """
    root = Path(root or expvae_book.data.root())
    folder = root / catalogue.UCSD.folder / "UCSDped1"
    missing = [f"{name}/" for name in ("Train", "Test") if not (folder / name).is_dir()]
    if takes_sample(
        data,
        catalogue.UCSD,
        root,
        folder,
        present=folder.exists(),
        missing=f"lacks {' and '.join(missing)}" if missing else "",
        stand_in="using a generated SAMPLE of walkway scenes",
    ):
        return sample(mask_resize=mask_resize, size=size)
    train, test = (_clips(folder / name, name) for name in ("Train", "Test"))
    masks = _masks(folder / "Test", test)
    batches = [
        images.load([frame for clip in clips.values() for frame in clip], masks_of, "L", size, mask_resize)
        for clips, masks_of in ((train, {}), (test, masks))
    ]
    numbers = ([number for number, frames in clips.items() for _ in frames] for clips in (train, test))
    return _assemble(*batches, *numbers, survey(catalogue.UCSD, root))


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
    digest = hashlib.sha256()
    pairs, numbers = {"train": [], "test": []}, {"train": [], "test": []}
    for name, clip, frame_YX, vehicle_YX in walkway.scenes(seed):
        mask_YX = vehicle_YX if name == "test" and clip <= SAMPLE_MASKED else None
        pairs[name].append((Image.fromarray(frame_YX), mask_YX))
        numbers[name].append(clip)
        digest.update(frame_YX.tobytes() + (b"" if mask_YX is None else mask_YX.tobytes()))
    card = DataCard(
        name="ucsd",
        kind="sample",
        counts={},
        official=catalogue.UCSD.official,
        digest=digest.hexdigest(),
        licence="MIT",
        credit="Generated walkway scenes, not UCSD Ped1 (this book, MIT)",
        note=SAMPLE_NOTE,
    )
    batches = (images.batch(pairs[name], "L", size, mask_resize) for name in pairs)
    return _assemble(*batches, *numbers.values(), card)


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


def _assemble(
    train: images.Batch, test: images.Batch, train_clips: list[int], test_clips: list[int], card: DataCard
) -> UCSD:
    """Frames with the numbers of their clips, and a card that counts both."""
    masked = {clip for clip, mask_YX in zip(test_clips, test.mask, strict=True) if mask_YX is not None}
    counts = {
        "train": len(train_clips),
        "test": len(test_clips),
        "masks": sum(mask_YX is not None for mask_YX in test.mask),
        "train clips": len(set(train_clips)),
        "test clips": len(set(test_clips)),
        "masked clips": len(masked),
    }
    official = card.official | OFFICIAL_CLIPS
    kind = card.kind if card.generated else kind_of(counts, official, card.note, altered=False)
    return UCSD(
        train_NYX=train.x_NCYX[:, 0],
        train_clip_N=torch.tensor(train_clips),
        test_NYX=test.x_NCYX[:, 0],
        test_clip_N=torch.tensor(test_clips),
        test_mask=test.mask,
        card=replace(card, kind=kind, counts=counts, official=official),
    )


def _clips(folder: Path, name: str) -> dict[int, list[Path]]:
    """The frames of every clip, by the clip's number."""
    clips = [clip for clip in sorted(folder.glob(f"{name}[0-9][0-9][0-9]")) if clip.is_dir()]
    if not clips:
        raise ValueError(f"{folder} holds no clips ({name}001, {name}002, ...){there(folder, folder)}")
    frames = {int(clip.name[-3:]): images.files(clip) for clip in clips}
    for clip, files in zip(clips, frames.values(), strict=True):
        if not files:
            raise ValueError(f"{clip} holds no frames ({', '.join(sorted(IMAGES))}){there(clip, clip)}")
    return frames


def _masks(folder: Path, clips: dict[int, list[Path]]) -> dict[Path, Path]:
    """The mask of each frame of the clips that have masks: one per frame and of the same name."""
    mask_of = {}
    for masked in sorted(path for path in folder.glob("Test[0-9][0-9][0-9]_gt") if path.is_dir()):
        frames, masks = clips.get(int(masked.name[4:7])), images.files(masked)
        if frames is None:
            raise ValueError(f"{masked} holds masks for a clip that is not there")
        if len(masks) != len(frames):
            raise ValueError(f"{masked} holds {len(masks)} masks for the {len(frames)} frames of {frames[0].parent}")
        for mask, frame in zip(masks, frames, strict=True):
            if mask.stem != frame.stem:
                raise ValueError(
                    f"{mask} has no frame of its name in {frame.parent}, where {frame.name} stands instead"
                )
        mask_of |= zip(frames, masks, strict=True)
    return mask_of
