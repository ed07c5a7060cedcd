import dataclasses
import itertools
import time

import numpy as np
import pytest

from expvae_book.data.generated import workpieces

CATEGORIES = [
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
    "transistor",
    "wood",
    "zipper",
]
# Mean absolute difference in grey levels that a defect makes inside its mask, at least.
CONTRAST = {"scratch": 40, "hole": 40, "stain": 20, "missing_part": 8}


@pytest.fixture(scope="module", params=CATEGORIES)
def category(request):
    return request.param


@pytest.fixture(scope="module")
def drawn(category):
    return workpieces.draw(category)


@pytest.fixture(scope="module")
def clean(category):
    """The same test images, drawn where nothing is spoilt, and the scenes that were to be spoilt."""
    kinds = 4 * ["good"] + 8 * ["scratch"]
    scenes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workpieces, "_spoil", lambda scene, kind, rng: scenes.append(scene) or scene.image_CYX)
        drawn = [
            workpieces._draw(category, kind, (0, CATEGORIES.index(category), 24 + i)) for i, kind in enumerate(kinds)
        ]
    return np.stack([image_YXC for image_YXC, _ in drawn]), scenes


def test_names():
    assert list(workpieces.CATEGORIES) == CATEGORIES
    with pytest.raises(ValueError, match=r"^category must be one of bottle, .*, zipper; got 'bottles'$"):
        workpieces.draw("bottles")


def test_split(drawn):
    assert drawn.train_NYXC.shape == (24, 256, 256, 3)
    expected = 4 * ["good"] + [kind for kind in ("scratch", "hole", "stain", "missing_part") for _ in range(2)]
    assert drawn.test_defect == expected
    assert len(drawn.test_NYXC) == len(drawn.test_mask_NYX) == len(expected)


def test_masks_are_exact(drawn, clean):
    """A pixel is in the mask if and only if some channel of it is another one without the defect."""
    for image_YXC, clean_YXC, mask_YX in zip(drawn.test_NYXC, clean[0], drawn.test_mask_NYX, strict=True):
        r_YX, g_YX, b_YX = (image_YXC[..., c] != clean_YXC[..., c] for c in range(3))
        np.testing.assert_array_equal(r_YX | g_YX | b_YX, mask_YX)


def test_defects(drawn, clean):
    """Each shows, and looks like its kind."""
    for kind, image_YXC, clean_YXC, mask_YX in zip(
        drawn.test_defect, drawn.test_NYXC, clean[0], drawn.test_mask_NYX, strict=True
    ):
        if kind == "good":
            assert not mask_YX.any()
            continue
        assert 50 < mask_YX.sum() < 0.1 * mask_YX.size
        difference_N = abs(image_YXC.astype(int) - clean_YXC).mean(axis=2)[mask_YX]
        assert difference_N.mean() > CONTRAST[kind]
        height, width = (np.ptp(places) + 1 for places in np.nonzero(mask_YX))
        if kind == "scratch":  # thin
            assert mask_YX.sum() < 8 * np.hypot(height, width)
        elif kind == "hole":  # dark, and as full as an ellipse along a diagonal or fuller
            assert np.median(image_YXC[mask_YX]) < 20
            assert mask_YX.sum() > 0.6 * height * width
        elif kind == "stain":  # it fades away
            faint, strong = np.percentile(difference_N, [10, 90])
            assert faint < 0.35 * strong


def test_defects_lie_on_objects(category, drawn, clean):
    if category in workpieces.OBJECTS:
        background = np.array(workpieces.OBJECTS[category][1])
        for scene, mask_YX in zip(clean[1], drawn.test_mask_NYX[4:], strict=True):
            background_YX = (scene.image_CYX == background[:, None, None]).all(axis=0)
            assert background_YX.mean() > 0.2
            assert not (mask_YX & background_YX).any()


def test_missing_part(category, drawn, clean):
    """It is flat but for noise and its edge: the background of an object, the mean colour of a texture."""
    for image_YXC, clean_YXC, scene, mask_YX in zip(
        drawn.test_NYXC[-2:], clean[0][-2:], clean[1][-2:], drawn.test_mask_NYX[-2:], strict=True
    ):
        whole = clean_YXC.mean(axis=(0, 1)) if category in workpieces.TEXTURES else scene.bare
        np.testing.assert_allclose(np.median(image_YXC[mask_YX], axis=0), whole, rtol=0.05, atol=2)
        # Noise alone spans 6 grey levels between the percentiles.
        assert np.ptp(np.percentile(image_YXC[mask_YX], [15, 85], axis=0), axis=0).max() <= 6


@pytest.mark.parametrize("name", ["carpet", "screw"])
def test_seeds(name):
    drawn, same, other = (workpieces.draw(name, seed) for seed in (2, 2, 3))
    for field in dataclasses.fields(drawn):
        np.testing.assert_array_equal(getattr(same, field.name), getattr(drawn, field.name))
    assert (other.train_NYXC != drawn.train_NYXC).mean() > 0.5
    assert (other.test_mask_NYX != drawn.test_mask_NYX).any()


def test_all_images_differ(drawn):
    """By more than their noise, of which the mean of 4 × 4 pixels and 3 channels leaves 0.3 grey levels."""
    images_NYXC = np.concatenate([drawn.train_NYXC, drawn.test_NYXC])
    small_NYX = images_NYXC.reshape(36, 64, 4, 64, 4, 3).mean(axis=(2, 4, 5))
    for one_YX, other_YX in itertools.combinations(small_NYX, 2):
        assert abs(one_YX - other_YX).mean() > 1


def test_categories_differ():
    """In mean colour or in the spread of brightness."""
    images = [workpieces._draw(name, "good", (0, i, 0))[0] for i, name in enumerate(CATEGORIES)]
    looks = [np.array([*image_YXC.mean(axis=(0, 1)), image_YXC.std()]) for image_YXC in images]
    for one, other in itertools.combinations(looks, 2):
        assert np.linalg.norm(one - other) > 8


def test_noise(category):
    """Of 3 levels either way, of every level as much, and never cut off."""
    rounded = []
    rint = np.rint
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np, "rint", lambda array: rounded.append(rint(array)) or rounded[-1])
        image_YXC, _ = workpieces._draw(category, "good", (0, 0, 0))
    scene_YXC = np.moveaxis(rounded[-1], 0, 2)
    assert scene_YXC.min() >= 3
    assert scene_YXC.max() <= 252
    levels, counts = np.unique(image_YXC - scene_YXC, return_counts=True)
    assert levels.tolist() == [-3, -2, -1, 0, 1, 2, 3]
    np.testing.assert_allclose(counts / counts.sum(), 1 / 7, rtol=0.02)


def test_speed():
    start = time.process_time()
    workpieces.draw("cable")
    assert time.process_time() - start < 3  # 0.5 s without the annotations' checks on an idle core
