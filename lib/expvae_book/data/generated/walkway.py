"""Drawn scenes of a walkway: pedestrians, and in test clips a cart or a cyclist, of which every pixel is known.

Scenes have the size of UCSD Ped1's frames. Only sums, products and comparisons of float64 decide about pixels, so that
every machine draws the same bytes.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, UInt8

CLIPS = 6  # for training, and as many for testing
FRAMES = 24  # of a clip; few enough to train on in a few minutes without a GPU
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


def scenes(seed: int) -> Iterator[tuple[str, int, UInt8[np.ndarray, "158 238"], Bool[np.ndarray, "158 238"]]]:
    """Draw clips of a walkway that a standing camera looks down upon.

    Pedestrians walk towards the camera and away from it, in every clip others before the same background. In every
    test clip a vehicle comes through, a cart in the odd clips and a cyclist in the even ones. Noise of up to 3 grey
    levels lies on every frame.

    Args:
        seed: Which scenes.

    Yields:
        For each frame, in the order of the clips and of time: "train" or "test"; the number of the clip, from 1 in
        either; the frame in grey levels; and which of its pixels show a vehicle.
    """
    rng = np.random.default_rng(seed)
    background_YX = _background(rng)
    for name in ("train", "test"):
        for clip in range(1, CLIPS + 1):
            actors = [_pedestrian(rng) for _ in range(rng.integers(5, 10))]
            if name == "test":
                actors.append(_vehicle(rng, "cart" if clip % 2 else "cyclist"))
            for i in range(FRAMES):
                scene_YX, vehicle_YX = _draw(background_YX, actors, i)
                noise_YX = rng.integers(-3, 4, scene_YX.shape)
                yield name, clip, (scene_YX + noise_YX).astype(np.uint8), vehicle_YX


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
