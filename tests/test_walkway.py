import dataclasses

import numpy as np
import pytest

from expvae_book.data.generated import walkway


@pytest.fixture(scope="module")
def drawn():
    """The scenes, and what was drawn for each: (background, actors, i)."""
    calls = []
    draw = walkway._draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(walkway, "_draw", lambda *arguments: calls.append(arguments) or draw(*arguments))
        scenes = list(walkway.scenes(0))
    return scenes, calls


def is_vehicle(actor):
    return actor.kind != "pedestrian"


def test_order(drawn):
    scenes, _ = drawn
    expected = [(name, clip) for name in ("train", "test") for clip in range(1, 7) for _ in range(24)]
    assert [(name, clip) for name, clip, _, _ in scenes] == expected


def test_seeds(drawn):
    _, _, frame_YX, _ = drawn[0][0]
    same_YX, other_YX = (next(walkway.scenes(seed))[2] for seed in (0, 1))
    np.testing.assert_array_equal(same_YX, frame_YX)
    assert (other_YX != frame_YX).mean() > 0.5


def test_training_clips_show_no_vehicle(drawn):
    scenes, calls = drawn
    assert not any(is_vehicle(actor) for _, actors, _ in calls[:144] for actor in actors)
    assert not any(vehicle_YX.any() for _, _, _, vehicle_YX in scenes[:144])
    kinds = [[actor.kind for actor in actors if is_vehicle(actor)] for _, actors, _ in calls[144::24]]
    assert kinds == 3 * [["cart"], ["cyclist"]]


@pytest.mark.parametrize("clip", range(6))
def test_vehicle_pixels_are_exact(drawn, clip):
    """A pixel shows the vehicle if and only if it changes with the vehicle's grey level."""
    scenes, calls = drawn
    hidden = 0
    for frame in range(144 + 24 * clip, 144 + 24 * clip + 24):
        _, _, _, vehicle_YX = scenes[frame]
        background_YX, actors, i = calls[frame]
        scene_YX = walkway._draw(background_YX, actors, i)[0]
        repainted = [
            dataclasses.replace(actor, shades=tuple(255 - shade for shade in actor.shades))
            if is_vehicle(actor)
            else actor
            for actor in actors
        ]
        np.testing.assert_array_equal(scene_YX != walkway._draw(background_YX, repainted, i)[0], vehicle_YX)
        # Without the vehicle nothing else changes.
        people = [actor for actor in actors if not is_vehicle(actor)]
        without_YX, nothing_YX = walkway._draw(background_YX, people, i)
        np.testing.assert_array_equal(scene_YX[~vehicle_YX], without_YX[~vehicle_YX])
        assert not nothing_YX.any()
        alone_YX = walkway._draw(background_YX, [actor for actor in actors if is_vehicle(actor)], i)[1]
        assert not (vehicle_YX & ~alone_YX).any()
        hidden += int((alone_YX & ~vehicle_YX).sum())
    assert hidden > 0 or clip not in (1, 3)  # where pedestrians walk in front of the vehicle


def test_noise(drawn):
    """Of 3 levels either way, of every level as much, and never cut off."""
    scenes, calls = drawn
    noise_NYX = []
    for (_, _, frame_YX, _), call in list(zip(scenes, calls, strict=True))[::20]:
        scene_YX = walkway._draw(*call)[0]
        assert scene_YX.min() >= 3
        assert scene_YX.max() <= 252
        noise_NYX.append(frame_YX - scene_YX)
    levels, counts = np.unique(noise_NYX, return_counts=True)
    assert levels.tolist() == [-3, -2, -1, 0, 1, 2, 3]
    np.testing.assert_allclose(counts / counts.sum(), 1 / 7, rtol=0.02)


def test_whoever_is_nearer_is_larger():
    assert walkway._height(150.0) > 2 * walkway._height(35.0)
