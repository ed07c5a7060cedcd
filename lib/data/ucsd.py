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

import lib.data
from lib.data import catalogue
from lib.data.card import IMAGES, DataCard, survey

DATA = ("auto", "real", "sample")
MASK_RESIZES = ("nearest", "truncated")
SIZE = 100  # pixels along either side of a loaded frame
OFFICIAL_CLIPS = {"train clips": 34, "test clips": 36, "masked clips": 10}  # of 200 frames each
SAMPLE_CLIPS = 6  # for training, and as many for testing
SAMPLE_MASKED = 4  # of the test clips, because the release has masks for a part of its clips only
SAMPLE_FRAMES = 40
SAMPLE_NOTE = (
    "Not UCSD Ped1: drawn pedestrians on a drawn walkway, and in every test clip a cart or a cyclist. The masks are "
    "exactly the pixels that show it; two of the six test clips have none."
)


@dataclass(frozen=True)
class UCSD:
    """Frames in memory, 100x100 and grey, in the order of their clips and within a clip of their names.

    Attributes:
        train_NYX: Training frames, which show pedestrians only.
        train_clip_N: Number of the clip that a training frame belongs to.
        test_NYX: Test frames, some of which show a vehicle.
        test_clip_N: Number of the clip that a test frame belongs to.
        test_mask: For each test frame its anomalous pixels, or None where its clip has no masks.
        card: What they are. Its counts are frames and masks, and clips.
    """

    train_NYX: UInt8[Tensor, "train 100 100"]
    train_clip_N: Int64[Tensor, " train"]
    test_NYX: UInt8[Tensor, "test 100 100"]
    test_clip_N: Int64[Tensor, " test"]
    test_mask: list[Bool[Tensor, "100 100"] | None]
    card: DataCard

    @property
    def test_anomalous(self) -> list[bool | None]:
        """For each test frame whether any of its pixels is anomalous, or None where its clip has no masks."""
        return [None if mask_YX is None else bool(mask_YX.any()) for mask_YX in self.test_mask]


def load(data: str = "auto", root: Path | None = None, mask_resize: str = "nearest") -> UCSD:
    """Load Ped1 from `ROOT/UCSD_Anomaly_Dataset.v1p2/UCSDped1`, or the generated sample.

    Clips lie in Train/Train001, ... and Test/Test001, ..., masks in Test/Test001_gt, ... under the names of their
    frames. A clip may have any number of frames, of any size and in any format of `lib.data.card.IMAGES`. Frames
    become grey (ITU-R 601 luma) and 100x100 by Pillow's bilinear interpolation, which widens its triangle to the
    scale when it shrinks an image (what torchvision's Resize does by default).

    Args:
        data: "real" (the files), "sample" (the generated clips) or "auto" (the files where there are any).
        root: Data root; by default `lib.data.root()`.
        mask_resize: How a mask, in which every pixel above 0 is anomalous, becomes 100x100. "nearest" takes the
            pixel nearest to each centre. "truncated" is what published code comes to: bilinear as for frames, in
            [0, 1], then cut to a whole number, so that a pixel stays anomalous only where all that it was computed
            from is, and every region loses its border.

    Raises:
        FileNotFoundError: If a folder is missing.
        ValueError: If an argument is none of these, an image is damaged, a clip has no frames or its masks do not
            fit its frames; the message names the file or folder.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}; got {data!r}")
    _check_mask_resize(mask_resize)
    if data == "sample":
        return sample(mask_resize=mask_resize)
    root = Path(root or lib.data.root())
    folder = root / catalogue.UCSD.folder / "UCSDped1"
    command = f"python -m lib.data fetch ucsd --root {shlex.quote(str(root))}"
    if data == "auto" and not folder.exists():
        # To the error stream: notebooks show it on a coloured ground, between code and results.
        print(
            f"UCSD Ped1 is not in {folder}: using a generated SAMPLE of walkway scenes instead, and marking every "
            f"result. `{command}` fetches UCSD Ped1.",
            file=sys.stderr,
        )
        return sample(mask_resize=mask_resize)
    missing = [f"{name}/" for name in ("Train", "Test") if not (folder / name).is_dir()]
    if missing:
        raise FileNotFoundError(f"{folder} lacks {' and '.join(missing)}; `{command}` fetches UCSD Ped1")
    return _real(folder, root, mask_resize)


def split(test_clip_N: Int64[Tensor, " n"], seed: int) -> tuple[Int64[Tensor, " v"], Int64[Tensor, " t"]]:
    """Divide the test clips at random into 20 % for validation and 80 % for testing, as the first report does.

    Whole clips go to one side, because neighbouring frames are nearly the same image.

    Args:
        test_clip_N: Number of the clip of each frame, as in `UCSD`.
        seed: Which division.

    Returns:
        The numbers of the validation clips (the nearest whole number to a fifth, and at least one) and of the test
        clips, each in rising order. ``torch.isin(test_clip_N, clips)`` tells their frames.

    Raises:
        ValueError: If there are fewer than two clips.
    """
    clips = torch.unique(test_clip_N)
    if len(clips) < 2:
        raise ValueError(f"test_clip_N must name two clips or more to be divided; got {len(clips)}")
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(clips)))
    validation = max(1, round(len(clips) / 5))
    return clips[order[:validation].sort().values], clips[order[validation:].sort().values]


def _real(folder: Path, root: Path, mask_resize: str) -> UCSD:
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
    test_frames, test_mask = [], []
    for number, files in test.items():
        for file, mask_file in zip(files, masks.get(number, [None] * len(files)), strict=True):
            frame = _grey(file)
            test_frames.append(_shrink(frame))
            test_mask.append(None if mask_file is None else _mask(mask_file, frame.size, mask_resize))
    return UCSD(
        train_NYX=_stack([_shrink(_grey(file)) for files in train.values() for file in files]),
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
        raise ValueError(f"{folder} holds no clips ({name}001, {name}002, ...)")
    for number, files in clips.items():
        if not files:
            raise ValueError(f"{folder / f'{name}{number:03d}'} holds no frames ({', '.join(sorted(IMAGES))})")
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


def _stack(frames: list[UInt8[np.ndarray, "100 100"]]) -> UInt8[Tensor, "n 100 100"]:
    return torch.from_numpy(np.stack(frames))


def _grey(file: Path) -> Image.Image:
    """An image file as 8-bit grey levels.

    Raises:
        ValueError: If the file is damaged or has more than 8 bits per channel; the message names it.
    """
    try:
        with Image.open(file) as image:
            mode = image.mode
            grey = image.convert("L")
    # Pillow's decoders answer damage with OSError, SyntaxError, ValueError, struct.error, KeyError and others.
    except Exception as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} is damaged or no image ({reason})") from error
    if mode.startswith(("I", "F")):
        # Pillow would cut 16 bits off at 255.
        raise ValueError(f"{file} must have 8 bits per channel; its mode is {mode}")
    return grey


def _shrink(grey: Image.Image) -> UInt8[np.ndarray, "100 100"]:
    return np.array(grey.resize((SIZE, SIZE), Image.Resampling.BILINEAR))


def _mask(file: Path, size: tuple[int, int], mask_resize: str) -> Bool[Tensor, "100 100"]:
    mask = _grey(file)
    if mask.size != size:
        raise ValueError(f"{file} has {mask.width}x{mask.height} pixels for a frame of {size[0]}x{size[1]}")
    return _shrink_mask(np.array(mask) > 0, mask_resize)


def _shrink_mask(mask_YX: Bool[np.ndarray, "y x"], mask_resize: str) -> Bool[Tensor, "100 100"]:
    mask = Image.fromarray(np.where(mask_YX, 255, 0).astype(np.uint8))
    if mask_resize == "nearest":
        return torch.from_numpy(np.array(mask.resize((SIZE, SIZE), Image.Resampling.NEAREST)) > 0)
    return torch.from_numpy(_shrink(mask) // 255 == 1)


def _check_mask_resize(mask_resize: str) -> None:
    if mask_resize not in MASK_RESIZES:
        raise ValueError(f"mask_resize must be one of {', '.join(MASK_RESIZES)}; got {mask_resize!r}")


# The sample. Scenes are drawn at the size of the release's frames and shrunk as they are. Only sums, products and
# comparisons of float64 decide about pixels, so that every machine draws the same bytes.

HEIGHT, WIDTH = 158, 238
FAR, NEAR = 34.0, 210.0  # rows of the feet between which somebody is in the scene; at 210 all of them is below it


@dataclass(frozen=True)
class Part:
    """An ellipse or a rectangle of an actor, in units of the actor's height, measured from between the feet.

    Attributes:
        shape: "ellipse" or "box".
        x: Centre to the right, for an actor that moves to the right.
        y: Centre upwards.
        width: Half of its width.
        height: Half of its height.
        shade: Grey level.
        hole: Share of an ellipse that stays empty (a wheel), or 0.
    """

    shape: str
    x: float
    y: float
    width: float
    height: float
    shade: int
    hole: float = 0.0


@dataclass(frozen=True)
class Actor:
    """Somebody or something that moves through a scene.

    Attributes:
        kind: "pedestrian", "cyclist" or "cart".
        start: First frame in which it is there.
        row: Row of its feet in that frame.
        lane: Where on the walkway, from 0 (left edge) to 1 (right edge).
        step: Rows that it moves in each frame, in units of its height there; below 0 is away from the camera.
        drift: Change of `lane` in each frame.
        shades: Grey levels of its parts.
        phase: Where in its step a pedestrian begins, in frames.
    """

    kind: str
    start: int
    row: float
    lane: float
    step: float
    drift: float
    shades: tuple[int, ...]
    phase: int


def sample(seed: int = 0, mask_resize: str = "nearest") -> UCSD:
    """Generate clips of a walkway, with a cart or a cyclist in every test clip.

    Six training and six test clips of 40 frames each, at 158x238, shrunk to 100x100 like the release. The first four
    test clips have masks, which are at 158x238 exactly the pixels that show the vehicle; carts and cyclists take
    turns.

    Args:
        seed: Which scenes.
        mask_resize: As for `load`.

    Raises:
        ValueError: If mask_resize is unknown.
    """
    _check_mask_resize(mask_resize)
    rng = np.random.default_rng(seed)
    background_YX = _background(rng)
    digest = hashlib.sha256()
    frames = {"train": [], "test": []}
    masks = []
    for name, shrunk in frames.items():
        for clip in range(SAMPLE_CLIPS):
            actors = [_pedestrian(rng) for _ in range(rng.integers(5, 10))]
            if name == "test":
                actors.append(_vehicle(rng, ("cart", "cyclist")[clip % 2]))
            for i in range(SAMPLE_FRAMES):
                scene_YX, vehicle_YX = _draw(background_YX, actors, i)
                noise_YX = rng.integers(-3, 4, scene_YX.shape)
                frame_YX = (scene_YX + noise_YX).astype(np.uint8)
                shrunk.append(_shrink(Image.fromarray(frame_YX)))
                digest.update(frame_YX.tobytes())
                if name == "test" and clip < SAMPLE_MASKED:
                    masks.append(_shrink_mask(vehicle_YX, mask_resize))
                    digest.update(vehicle_YX.tobytes())
                elif name == "test":
                    masks.append(None)
    clip_N = torch.arange(1, SAMPLE_CLIPS + 1).repeat_interleave(SAMPLE_FRAMES)
    card = DataCard(
        name="ucsd",
        kind="sample",
        counts={
            "train": len(frames["train"]),
            "test": len(frames["test"]),
            "masks": SAMPLE_MASKED * SAMPLE_FRAMES,
            "train clips": SAMPLE_CLIPS,
            "test clips": SAMPLE_CLIPS,
            "masked clips": SAMPLE_MASKED,
        },
        official=catalogue.UCSD.official | OFFICIAL_CLIPS,
        digest=digest.hexdigest(),
        licence="MIT",
        credit="Generated walkway scenes, not UCSD Ped1 (this book, MIT)",
        note=SAMPLE_NOTE,
    )
    return UCSD(_stack(frames["train"]), clip_N, _stack(frames["test"]), clip_N.clone(), masks, card)


def _left(row: np.ndarray | float) -> np.ndarray | float:
    """Column of the walkway's left edge in a row, which may lie outside the scene."""
    return 172 - 1.75 * (row - 30)


def _right(row: np.ndarray | float) -> np.ndarray | float:
    """Column of the walkway's right edge."""
    return 270 - 1.0 * (row - 30)


def _background(rng: np.random.Generator) -> Int64[np.ndarray, "158 238"]:
    """The walkway between trees and grass, in grey levels from 16 to 190."""
    y_YX, x_YX = np.indices((HEIGHT, WIDTH))

    def blotches(size: int, height: int) -> Int64[np.ndarray, "158 238"]:
        """Noise that is constant on squares of this size, up to this height either way."""
        squares = rng.integers(-height, height + 1, (-(-HEIGHT // size), -(-WIDTH // size)))
        return np.repeat(np.repeat(squares, size, axis=0), size, axis=1)[:HEIGHT, :WIDTH]

    trees_YX = 50 + blotches(13, 12) + blotches(5, 12) + blotches(2, 10)
    grass_YX = 82 + blotches(3, 5) + blotches(1, 10)
    walkway_YX = 130 + (y_YX - 30) * 30 // 128 + blotches(29, 3) + blotches(1, 2)
    on_walkway_YX = (y_YX > 30) & (x_YX > _left(y_YX)) & (x_YX < _right(y_YX))
    on_grass_YX = (y_YX > 30) & (x_YX >= _right(y_YX))
    path_YX = y_YX > 148 - (x_YX - 140) // 12
    scene_YX = np.where(on_walkway_YX, walkway_YX, np.where(on_grass_YX, grass_YX, trees_YX))
    return np.where(path_YX & (x_YX > 120), 175 + blotches(1, 4), scene_YX)


def _height(row: float) -> float:
    """Height in pixels of a grown person whose feet are in this row."""
    return 15 + 0.19 * (row - 30)


def _pedestrian(rng: np.random.Generator) -> Actor:
    return Actor(
        kind="pedestrian",
        start=0,
        row=float(rng.integers(40, 175)),
        lane=rng.integers(8, 93) / 100,
        step=(-1, 1)[rng.integers(0, 2)] * rng.integers(20, 41) / 1000,
        drift=rng.integers(-3, 4) / 1000,
        shades=(int(rng.integers(20, 70)), int(rng.integers(25, 225)), int(rng.integers(20, 60))),
        phase=int(rng.integers(0, 8)),
    )


def _vehicle(rng: np.random.Generator, kind: str) -> Actor:
    away = bool(rng.integers(0, 2))
    return Actor(
        kind=kind,
        start=int(rng.integers(4, 13)),
        row=205.0 if away else 40.0,
        lane=rng.integers(35, 66) / 100,
        step=(-1 if away else 1) * rng.integers(100, 131) / 1000,
        drift=rng.integers(-3, 4) / 1000,
        shades=(int(rng.integers(15, 40)), int(rng.integers(195, 236)), int(rng.integers(40, 110))),
        phase=0,
    )


def _parts(actor: Actor, i: int) -> list[Part]:
    """What an actor is made of in the i-th frame, from back to front."""
    dark, light, other = actor.shades
    if actor.kind == "cart":
        return [
            Part("ellipse", 0.12, 0.6, 0.13, 0.22, other),  # the driver
            Part("ellipse", 0.12, 0.84, 0.09, 0.09, dark),
            Part("box", 0.0, 0.36, 0.66, 0.18, light),
            Part("box", -0.6, 0.75, 0.03, 0.25, dark),
            Part("box", 0.6, 0.75, 0.03, 0.25, dark),
            Part("box", 0.0, 1.02, 0.68, 0.05, light),
            Part("ellipse", -0.42, 0.15, 0.15, 0.15, dark),
            Part("ellipse", 0.42, 0.15, 0.15, 0.15, dark),
        ]
    if actor.kind == "cyclist":
        return [
            Part("ellipse", -0.36, 0.2, 0.22, 0.2, dark, hole=0.4),
            Part("ellipse", 0.36, 0.2, 0.22, 0.2, dark, hole=0.4),
            Part("box", 0.0, 0.42, 0.36, 0.035, dark),
            Part("box", 0.36, 0.5, 0.03, 0.14, dark),
            Part("box", 0.02, 0.3, 0.06, 0.17, other),  # the rider's leg
            Part("ellipse", 0.06, 0.68, 0.17, 0.24, light),
            Part("ellipse", 0.16, 0.97, 0.085, 0.085, dark),
        ]
    # The feet swing to and fro, once in eight frames.
    swing = (abs((i + actor.phase) % 8 - 4) - 2) * 0.05
    return [
        Part("box", -swing, 0.12, 0.045, 0.12, other),
        Part("box", swing, 0.12, 0.045, 0.12, other),
        Part("box", -swing / 2, 0.34, 0.06, 0.12, other),
        Part("box", swing / 2, 0.34, 0.06, 0.12, other),
        Part("ellipse", 0.0, 0.64, 0.135, 0.22, light),
        Part("ellipse", 0.0, 0.92, 0.08, 0.085, dark),
    ]


def _draw(
    background_YX: Int64[np.ndarray, "158 238"], actors: list[Actor], i: int
) -> tuple[Int64[np.ndarray, "158 238"], Bool[np.ndarray, "158 238"]]:
    """Draw the i-th frame of a clip, without noise, and tell which of its pixels show a vehicle."""
    scene_YX = background_YX.copy()
    vehicle_YX = np.zeros(scene_YX.shape, bool)
    there = [(_row(actor, i), actor) for actor in actors if i >= actor.start]
    # Whoever is nearer hides who is behind.
    for row, actor in sorted(((row, actor) for row, actor in there if FAR <= row <= NEAR), key=lambda pair: pair[0]):
        height = _height(row)
        lane = actor.lane + actor.drift * (i - actor.start)
        column = _left(row) + lane * (_right(row) - _left(row))
        # The part of the scene that holds all of an actor, whatever its kind.
        y0, y1 = (max(0, min(HEIGHT, int(row - share * height))) for share in (1.2, -0.1))
        x0, x1 = (max(0, min(WIDTH, int(column + share * height))) for share in (-0.8, 0.8))
        up_YX, right_YX = np.mgrid[y0:y1, x0:x1].astype(float)
        up_YX = (row - up_YX) / height
        right_YX = (right_YX - column) / height
        # The walkway leads up to the right: who comes nearer moves to the left.
        right_YX = right_YX if actor.step < 0 else -right_YX
        for part in _parts(actor, i):
            a_YX, b_YX = (right_YX - part.x) / part.width, (up_YX - part.y) / part.height
            distance_YX = a_YX * a_YX + b_YX * b_YX
            inside_YX = (
                (distance_YX <= 1) & (distance_YX >= part.hole)
                if part.shape == "ellipse"
                else (abs(a_YX) <= 1) & (abs(b_YX) <= 1)
            )
            scene_YX[y0:y1, x0:x1][inside_YX] = part.shade
            vehicle_YX[y0:y1, x0:x1][inside_YX] = actor.kind != "pedestrian"
    return scene_YX, vehicle_YX


def _row(actor: Actor, i: int) -> float:
    """Row of an actor's feet in the i-th frame; who is far away crosses fewer rows."""
    row = actor.row
    for _ in range(actor.start, i):
        row += actor.step * _height(row)
    return row
