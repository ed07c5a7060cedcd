"""Drawn workpieces, named after MVTec AD's categories: defects are planted in some, and their masks are exact.

Lengths are in pixels, x to the right and y downwards from the middle of the image. A depth says how far inside of a
shape a pixel lies, below 0 outside: the smaller of two depths is the overlap of the shapes, the larger both together.
Only sums, products, quotients, square roots and comparisons of float64 decide about pixels, so that every machine
draws the same bytes.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from numpy.random import Generator
from PIL import Image

SIZE = 256
TRAINING, GOOD, EACH = 24, 4, 2  # images for training, good test images, and test images with each kind of defect
DEFECTS = ("scratch", "hole", "stain", "missing_part")
NOISE = 3  # grey levels either way

Number = int | float
Plane = Float[np.ndarray, "256 256"]
Colour = tuple[int, int, int] | Float[np.ndarray, "3"] | Float[np.ndarray, "3 256 256"]
Layers = list[tuple[Plane, Colour]]

Y_YX, X_YX = np.indices((SIZE, SIZE)) - (SIZE - 1) / 2


@dataclass(frozen=True)
class Drawn:
    """Images of a category, split as in MVTec AD.

    Attributes:
        train_NYXC: Images without defects.
        test_NYXC: Test images.
        test_defect: For each of them "good", "scratch", "hole", "stain" or "missing_part".
        test_mask_NYX: Which pixels its defect changes.
    """

    train_NYXC: UInt8[np.ndarray, "train 256 256 3"]
    test_NYXC: UInt8[np.ndarray, "test 256 256 3"]
    test_defect: list[str]
    test_mask_NYX: Bool[np.ndarray, "test 256 256"]


@dataclass(frozen=True)
class Scene:
    """A workpiece without noise.

    Attributes:
        image_CYX: Its image, in grey levels.
        depth_YX: How far inside of the workpiece a pixel lies.
        bare: Colour where a part is missing.
        edge: Whether the missing part is at the workpiece's edge.
    """

    image_CYX: Float[np.ndarray, "3 256 256"]
    depth_YX: Plane
    bare: Float[np.ndarray, "3"]
    edge: bool


def draw(category: str, seed: int = 0) -> Drawn:
    """Draw the images of a category: 24 for training, and for testing 4 good ones and 2 with each kind of defect.

    Textures fill the image; objects lie on a plain background, and their defects on them. Place, angle and
    brightness differ a little between images, and noise of up to 3 grey levels lies on each. A mask holds exactly
    the pixels at which the image differs from the same image, noise included, without the defect.

    Args:
        category: One of MVTec AD's fifteen.
        seed: Which images.

    Returns:
        The images and masks; the same ones for the same category and seed.

    Raises:
        ValueError: If there is no such category.
    """
    if category not in CATEGORIES:
        raise ValueError(f"category must be one of {', '.join(CATEGORIES)}; got {category!r}")
    defects = ["good"] * GOOD + [defect for defect in DEFECTS for _ in range(EACH)]
    key = (seed, CATEGORIES.index(category))
    drawn = [_draw(category, kind, (*key, i)) for i, kind in enumerate(["good"] * TRAINING + defects)]
    images, masks = (np.stack(arrays) for arrays in zip(*drawn, strict=True))
    return Drawn(images[:TRAINING], images[TRAINING:], defects, masks[TRAINING:])


def write(folder: Path | str, category: str, seed: int = 0) -> None:
    """Write the images of `draw` into a folder in MVTec AD's layout, as PNG files, with a note that says what they are.

    Args:
        folder: The folder, which becomes a category by its name where it lies in `ROOT/mvtec`.
        category: As for `draw`.
        seed: As for `draw`.

    Raises:
        ValueError: As for `draw`.
    """
    drawn, number = draw(category, seed), Counter()
    images = [(f"train/good/{i:03}", x_YXC) for i, x_YXC in enumerate(drawn.train_NYXC)]
    for x_YXC, kind, mask_YX in zip(drawn.test_NYXC, drawn.test_defect, drawn.test_mask_NYX, strict=True):
        name = f"{kind}/{number[kind]:03}"
        number[kind] += 1
        images.append((f"test/{name}", x_YXC))
        if kind != "good":
            images.append((f"ground_truth/{name}_mask", mask_YX))
    for name, array in images:
        file = Path(folder, f"{name}.png")
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(file, compress_level=1)  # noise hardly shrinks
    Path(folder, "NOTE.txt").write_text("Generated workpieces of this book, no photographs.\n", encoding="utf-8")


def _draw(
    category: str, kind: str, key: tuple[int, ...]
) -> tuple[UInt8[np.ndarray, "256 256 3"], Bool[np.ndarray, "256 256"]]:
    """An image and its mask; for the same key the same workpiece and noise, whatever its defect."""
    rng = np.random.default_rng(key)
    brightness = _between(rng, 0.95, 1.05)
    noise_CYX = rng.integers(-NOISE, NOISE + 1, (3, SIZE, SIZE), np.int8)
    scene = _texture(category, rng) if category in TEXTURES else _object(category, rng)
    good_CYX = np.rint(brightness * scene.image_CYX)
    image_CYX = good_CYX if kind == "good" else np.rint(brightness * _spoil(scene, kind, rng))
    image_YXC = np.moveaxis(image_CYX + noise_CYX, 0, 2).astype(np.uint8)
    return image_YXC, (image_CYX != good_CYX).any(axis=0)


def _texture(category: str, rng: Generator) -> Scene:
    x_YX, y_YX = _turned(X_YX + _between(rng, 200, 300), Y_YX + _between(rng, 200, 300), _between(rng, -0.02, 0.02))
    image_CYX = TEXTURES[category](rng, x_YX, y_YX)
    return Scene(image_CYX, _box(X_YX, Y_YX, 128, 128), np.rint(image_CYX.mean(axis=(1, 2))), edge=False)


def _object(category: str, rng: Generator) -> Scene:
    layers_of, background, turn = OBJECTS[category]
    side = 1 if turn < 1 or rng.random() < 0.5 else -1  # a turn of ±1 is ±90°
    x_YX, y_YX = (side * (plane_YX + _between(rng, -5, 5)) for plane_YX in (X_YX, Y_YX))
    layers = layers_of(rng, *_turned(x_YX, y_YX, _between(rng, -turn, turn)))
    image_CYX = np.multiply.outer(np.array(background, float), np.ones((SIZE, SIZE)))
    for depth_YX, colour in layers:
        _paint(image_CYX, _cover(depth_YX), colour)
    depth_YX = np.max([depth_YX for depth_YX, _ in layers], axis=0)
    return Scene(image_CYX, depth_YX, np.array(background, float), edge=True)


def _spoil(scene: Scene, kind: str, rng: Generator) -> Float[np.ndarray, "3 256 256"]:
    """The image with a defect of this kind at a random place of the workpiece."""
    depth_YX, frame_YX = scene.depth_YX, _box(X_YX, Y_YX, 96, 96)
    at_edge = scene.edge and kind == "missing_part"
    there_YX = abs(depth_YX) < 1 if at_edge else depth_YX > min(24, 0.4 * depth_YX[frame_YX > 0].max())
    y, x = rng.choice(np.argwhere(there_YX & (frame_YX > 0))) - (SIZE - 1) / 2
    u_YX, v_YX = _turned(X_YX - x, Y_YX - y, _between(rng, -1, 1))
    if kind == "scratch":
        bend_YX = _between(rng, -0.006, 0.006) * (u_YX * u_YX)
        weight_YX = _cover(_box(u_YX, v_YX - bend_YX, _between(rng, 35, 60), _between(rng, 1.2, 2)))
        inks = [(20, 20, 20), (225, 225, 225)]
    elif kind == "hole":
        weight_YX, inks = _cover(_oval(u_YX, v_YX, _between(rng, 8, 12), _between(rng, 8, 12))), [(12, 12, 12)]
    elif kind == "stain":
        a, b = _between(rng, 24, 36), _between(rng, 24, 36)
        ragged_YX = 1 - (u_YX * u_YX) / (a * a) - (v_YX * v_YX) / (b * b) + 0.25 * _cloud(rng, X_YX, Y_YX, 12)
        weight_YX = 0.85 * np.clip(ragged_YX, 0, 1)
        inks = [(120, 25, 30), (40, 60, 150), (225, 205, 90)]
    else:
        weight_YX, inks = _cover(_box(u_YX, v_YX, _between(rng, 18, 27), _between(rng, 18, 27))), [scene.bare]
    if kind != "missing_part":  # which leaves nothing of the edge either
        weight_YX = weight_YX * _cover(depth_YX)
    below = scene.image_CYX[:, weight_YX > weight_YX.max() / 2].mean(axis=1)
    image_CYX = scene.image_CYX.copy()
    _paint(image_CYX, weight_YX, max(inks, key=lambda ink: abs(ink - below).sum()))  # the ink that shows most
    return image_CYX


def _paint(image_CYX: Float[np.ndarray, "3 256 256"], weight_YX: Plane, colour: Colour) -> None:
    for image_YX, level in zip(image_CYX, colour, strict=True):
        image_YX += weight_YX * (level - image_YX)


def _between(rng: Generator, low: Number, high: Number) -> float:
    return low + (high - low) * rng.random()


def _turned(x_YX: Plane, y_YX: Plane, turn: Number) -> tuple[Plane, Plane]:
    """Coordinates after a rotation; `turn` is the tangent of half of the angle, which makes do without a sine."""
    cos, sin = (1 - turn * turn) / (1 + turn * turn), 2 * turn / (1 + turn * turn)
    return cos * x_YX + sin * y_YX, cos * y_YX - sin * x_YX


def _cover(depth_YX: Plane) -> Plane:
    """Share of a pixel that a shape covers."""
    return np.clip(depth_YX + 0.5, 0, 1)


def _oval(x_YX: Plane, y_YX: Plane, a: Number, b: Number) -> Plane:
    return min(a, b) * (1 - np.sqrt((x_YX * x_YX) / (a * a) + (y_YX * y_YX) / (b * b)))


def _box(x_YX: Plane, y_YX: Plane, a: Number, b: Number) -> Plane:
    return np.minimum(a - abs(x_YX), b - abs(y_YX))


def _bar(x_YX: Plane, y_YX: Plane, a: Number, r: Number) -> Plane:
    """A box with half circles of radius r at its left and right."""
    return _oval(np.maximum(abs(x_YX) - a, 0), y_YX, r, r)


def _wave(phase_YX: Plane) -> Plane:
    """A triangle wave of period 1, from -1 at 0 to 1."""
    return 1 - 4 * abs(phase_YX - np.floor(phase_YX) - 0.5)


def _cloud(rng: Generator, x_YX: Plane, y_YX: Plane, width: Number, height: Number | None = None) -> Plane:
    """Smooth noise between -1 and 1: random values at points of a lattice, blended in between."""
    x_YX, y_YX = (x_YX - x_YX.min()) / width, (y_YX - y_YX.min()) / (height or width)
    i_YX, j_YX = y_YX.astype(int), x_YX.astype(int)
    values = 2 * rng.random((i_YX.max() + 2, j_YX.max() + 2)) - 1
    row = values.shape[1]
    at_YX = i_YX * row + j_YX
    b_YX, a_YX = ((3 - 2 * rest_YX) * (rest_YX * rest_YX) for rest_YX in (y_YX - i_YX, x_YX - j_YX))
    upper_YX, lower_YX = (
        values.take(at_YX + k) + a_YX * (values.take(at_YX + k + 1) - values.take(at_YX + k)) for k in (0, row)
    )
    return upper_YX + b_YX * (lower_YX - upper_YX)


def _chips(rng: Generator, x_YX: Plane, y_YX: Plane, pitch: Number, smallest: Number) -> Plane:
    """Discs with radii of up to 0.42 pitches, one in each square of a lattice; a radius below 0 is none."""
    x_YX, y_YX = x_YX - x_YX.min(), y_YX - y_YX.min()
    i_YX, j_YX = (y_YX / pitch).astype(int), (x_YX / pitch).astype(int)
    values = rng.random((3, i_YX.max() + 1, j_YX.max() + 1))
    radius_YX, right_YX, down_YX = (of_all.take(i_YX * of_all.shape[1] + j_YX) for of_all in values)
    radius_YX = smallest + (0.42 * pitch - smallest) * radius_YX
    x_YX = x_YX - pitch * j_YX - radius_YX - (pitch - 2 * radius_YX) * right_YX
    y_YX = y_YX - pitch * i_YX - radius_YX - (pitch - 2 * radius_YX) * down_YX
    return radius_YX - np.sqrt(x_YX * x_YX + y_YX * y_YX)


def _shaded(colour: tuple[int, int, int], shade_YX: Plane) -> Float[np.ndarray, "3 256 256"]:
    """A colour made brighter by these shares of it."""
    return np.multiply.outer(colour, 1 + shade_YX)


def _carpet(rng: Generator, x_YX: Plane, y_YX: Plane) -> Float[np.ndarray, "3 256 256"]:
    across_YX, along_YX = _wave(x_YX / 10), _wave(y_YX / 10)  # threads either way take turns on top
    thread_YX = np.where((np.floor(x_YX / 10) + np.floor(y_YX / 10)) % 2 == 0, across_YX, along_YX - 0.4)
    return _shaded((125, 118, 112), 0.3 * thread_YX + 0.1 * _cloud(rng, x_YX, y_YX, 3))


def _grid(rng: Generator, x_YX: Plane, y_YX: Plane) -> Float[np.ndarray, "3 256 256"]:
    sway_YX = 0.5 * _wave((x_YX - y_YX) / 64)
    wires_YX = np.maximum(_wave((x_YX + y_YX) / 32), _wave((x_YX - y_YX) / 32 + 0.05 * sway_YX))
    gap_YX = np.clip(6 * (0.65 - wires_YX), 0, 1)
    return _shaded((85, 88, 90), 1.3 * gap_YX + 0.05 * _cloud(rng, x_YX, y_YX, 6))


def _leather(rng: Generator, x_YX: Plane, y_YX: Plane) -> Float[np.ndarray, "3 256 256"]:
    # Creases run where the noise changes its sign.
    crease_YX = np.minimum(abs(_cloud(rng, x_YX, y_YX, 9)), abs(_cloud(rng, x_YX, y_YX, 13)))
    return _shaded((135, 84, 55), 2 * np.minimum(crease_YX, 0.2) - 0.2 + 0.08 * _cloud(rng, x_YX, y_YX, 40))


def _tile(rng: Generator, x_YX: Plane, y_YX: Plane) -> Float[np.ndarray, "3 256 256"]:
    u_YX, v_YX = _turned(x_YX, y_YX, 0.3)
    dark_YX = _cover(_chips(rng, u_YX, v_YX, 21, -6))
    light_YX = _cover(_chips(rng, v_YX, u_YX, 13, -2)) * (1 - dark_YX)
    return _shaded((165, 167, 163), 0.3 * light_YX - 0.6 * dark_YX + 0.06 * _cloud(rng, x_YX, y_YX, 30))


def _wood(rng: Generator, x_YX: Plane, y_YX: Plane) -> Float[np.ndarray, "3 256 256"]:
    ring_YX = _wave(x_YX / 26 + 0.9 * _cloud(rng, x_YX, y_YX, 60, 150))
    return _shaded((165, 112, 66), 0.2 * ring_YX + 0.15 * _cloud(rng, x_YX, y_YX, 3, 45))


def _bottle(rng: Generator, x_YX: Plane, y_YX: Plane) -> Layers:
    glints_YX = 0.25 * _wave(_between(rng, -0.1, 0.1) + x_YX / 130 + y_YX / 200)
    disc_YX = _oval(x_YX, y_YX, 102, 102)
    colours = [(0, (82, 60, 45)), (16, (165, 125, 80)), (34, (90, 66, 48)), (58, (140, 110, 78))]
    return [(disc_YX - inset, _shaded(colour, glints_YX)) for inset, colour in colours]


def _cable(rng: Generator, x_YX: Plane, y_YX: Plane) -> Layers:
    strands = _shaded((190, 130, 85), 0.2 * _cloud(rng, x_YX, y_YX, 5))
    layers: Layers = [(_oval(x_YX, y_YX, 108, 108), (105, 105, 112))]
    for x, y, colour in [(0, -56, (70, 150, 75)), (-48, 28, (75, 100, 185)), (48, 28, (150, 85, 60))]:
        core_YX = _oval(x_YX - x, y_YX - y, 42, 42)
        layers += [(core_YX, colour), (core_YX - 15, strands)]
    return layers


def _capsule(rng: Generator, x_YX: Plane, y_YX: Plane) -> Layers:
    shell_YX, seam = _bar(x_YX, y_YX, 62, 38), _between(rng, -4, 4)
    round_YX = -0.0002 * (y_YX * y_YX)
    return [
        (shell_YX, _shaded((95, 82, 92), round_YX)),
        (np.minimum(shell_YX, x_YX - seam), _shaded((220, 120, 55), round_YX)),
        (_bar(x_YX, y_YX + 18, 55, 3), (220, 200, 185)),
    ]


def _hazelnut(rng: Generator, x_YX: Plane, y_YX: Plane) -> Layers:
    nut_YX = np.minimum(_oval(x_YX, y_YX, 84, 96), _oval(x_YX, y_YX + 12, 92, 100))
    streaks_YX = 0.22 * _cloud(rng, x_YX, y_YX, 6, 50)
    cap_YX = np.minimum(nut_YX, y_YX - 48 + 5 * _cloud(rng, x_YX, y_YX, 14))
    rough_YX = 0.15 * _cloud(rng, x_YX, y_YX, 4)
    return [(nut_YX, _shaded((150, 94, 52), streaks_YX)), (cap_YX, _shaded((185, 152, 110), rough_YX))]


def _metal_nut(rng: Generator, x_YX: Plane, y_YX: Plane) -> Layers:
    # A regular hexagon: three strips, 60° from one another.
    strips = [abs(x_YX), abs(0.5 * x_YX + 0.866 * y_YX), abs(0.5 * x_YX - 0.866 * y_YX)]
    ring_YX = np.minimum(90 - np.max(strips, axis=0), -_oval(x_YX, y_YX, 44, 44))
    polish_YX = 0.12 * _cloud(rng, x_YX, y_YX, 90, 5)
    face_YX = np.minimum(ring_YX, _oval(x_YX, y_YX, 86, 86))
    rim_YX = np.minimum(ring_YX, _oval(x_YX, y_YX, 54, 54))
    colours = [(120, 122, 125), (170, 170, 165), (110, 110, 112)]
    return [
        (depth_YX, _shaded(colour, polish_YX))
        for depth_YX, colour in zip((ring_YX, face_YX, rim_YX), colours, strict=True)
    ]


def _pill(rng: Generator, x_YX: Plane, y_YX: Plane) -> Layers:
    pill_YX = _oval(x_YX, y_YX, 104, 62)
    specks_YX = np.minimum(pill_YX - 3, _chips(rng, x_YX, y_YX, 15, -3))
    groove_YX = np.minimum(pill_YX - 4, 3 - abs(x_YX))
    return [(pill_YX, (215, 210, 200)), (specks_YX, (185, 70, 60)), (groove_YX, (165, 160, 150))]


def _screw(rng: Generator, x_YX: Plane, y_YX: Plane) -> Layers:
    thread_YX = _wave(x_YX / 11 + y_YX / 60 + _between(rng, 0, 1))
    shaft_YX = np.minimum(13 + 2 * thread_YX, 0.7 * (106 - x_YX)) - abs(y_YX)
    shaft_YX = np.minimum(shaft_YX, x_YX + 85)
    head_YX = np.minimum(np.minimum(36, -0.9 * (x_YX + 60)) - abs(y_YX), x_YX + 108)
    return [(shaft_YX, _shaded((130, 126, 118), 0.35 * thread_YX)), (head_YX, (118, 115, 110))]


def _toothbrush(rng: Generator, x_YX: Plane, y_YX: Plane) -> Layers:
    head_YX = _bar(y_YX, x_YX, 52, 56)
    bristles = _shaded((215, 215, 210), 0.12 * _cloud(rng, x_YX, y_YX, 4) - 0.12)
    tufts_YX = _oval((x_YX + 12) % 24 - 12, (y_YX + 12) % 24 - 12, 9, 9)
    return [
        (head_YX, (75, 125, 185)),
        (np.minimum(tufts_YX, head_YX - 8), bristles),
        (np.minimum(tufts_YX, np.minimum(head_YX - 8, 14 - abs(x_YX))), (205, 120, 70)),
    ]


def _transistor(rng: Generator, x_YX: Plane, y_YX: Plane) -> Layers:
    lead_YX = x_YX - 36 * np.clip(np.rint(x_YX / 36), -1, 1)  # from the nearest of three
    body_YX = _box(x_YX, y_YX + 42, 66, 52)
    rough_YX = 0.08 * _cloud(rng, x_YX, y_YX, 3)
    return [
        (_box(lead_YX, y_YX - 55, 8, 55), (205, 205, 208)),
        (body_YX, _shaded((85, 85, 90), rough_YX)),
        (np.minimum(body_YX, -72 - y_YX), _shaded((115, 115, 118), rough_YX)),
    ]


def _zipper(rng: Generator, x_YX: Plane, y_YX: Plane) -> Layers:
    weave_YX = 0.12 * _wave(x_YX / 6) * _wave(y_YX / 6) + 0.08 * _cloud(rng, x_YX, y_YX, 8)
    shift = _between(rng, -9, 9)
    teeth = [_box(x_YX - side * 9, (y_YX + shift + side * 4.5) % 18 - 9, 15, 5.5) for side in (-1, 1)]
    return [(82 - abs(x_YX), _shaded((88, 88, 102), weave_YX))] + [(tooth_YX, (190, 188, 180)) for tooth_YX in teeth]


TEXTURES = {"carpet": _carpet, "grid": _grid, "leather": _leather, "tile": _tile, "wood": _wood}
# Of each object what draws it, its background, and how far it is turned either way: the tangent of half of the angle.
OBJECTS = {
    "bottle": (_bottle, (220, 220, 218), 0.03),
    "cable": (_cable, (190, 192, 190), 0.03),
    "capsule": (_capsule, (222, 222, 222), 0.03),
    "hazelnut": (_hazelnut, (24, 24, 26), 1.0),
    "metal_nut": (_metal_nut, (34, 33, 36), 1.0),
    "pill": (_pill, (22, 22, 24), 0.03),
    "screw": (_screw, (212, 214, 212), 1.0),
    "toothbrush": (_toothbrush, (28, 28, 30), 0.03),
    "transistor": (_transistor, (190, 150, 105), 0.03),
    "zipper": (_zipper, (222, 220, 215), 0.01),
}
CATEGORIES = tuple(sorted((*TEXTURES, *OBJECTS)))
