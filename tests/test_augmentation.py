"""Augmentation against torchvision's rotation and flips, and against what can be seen in the images."""

import math
from itertools import product

import pytest
import torch
from scipy import stats
from torchvision.transforms.functional import InterpolationMode, hflip, rotate, vflip

from expvae_book.augmentation import AUGMENTATIONS, augment, draw, transform, turned_at_load
from expvae_book.data import mvtec
from expvae_book.data.catalogue import MOTIFS

SIDE = 64
FLIPS = list(product([False, True], repeat=2))
DEGREES = {"paper": 30, "brongers2021": math.pi / 6}
# The reading of the paper's "when possible", once more: left and right, top and bottom.
ALLOWED = {
    **dict.fromkeys(["cable", "capsule", "metal_nut", "pill", "screw"], (False, False)),
    **dict.fromkeys(["toothbrush", "transistor"], (True, False)),
    **dict.fromkeys(["bottle", "carpet", "grid", "hazelnut", "leather", "tile", "wood", "zipper"], (True, True)),
}


def letter(y=SIDE, x=SIDE):
    """An F of 255 on black near the middle: no two of its flips are alike, whichever way it is turned."""
    image_YX = torch.zeros(y, x, dtype=torch.uint8)
    image_YX[y // 2 - 12 : y // 2 + 12, x // 2 - 8 : x // 2 - 2] = 255
    image_YX[y // 2 - 12 : y // 2 - 6, x // 2 - 8 : x // 2 + 9] = 255
    image_YX[y // 2 - 2 : y // 2 + 3, x // 2 - 8 : x // 2 + 5] = 255
    return image_YX


def torchvisions(x_CYX, angle, horizontal, vertical):
    """Turned and mirrored by torchvision, and where nothing came from outside."""

    def mirrored(image_CYX):
        image_CYX = hflip(image_CYX) if horizontal else image_CYX
        return vflip(image_CYX) if vertical else image_CYX

    inside_CYX = rotate(torch.ones_like(x_CYX), angle, InterpolationMode.BILINEAR) > 0.999
    return mirrored(rotate(x_CYX, angle, InterpolationMode.BILINEAR)), mirrored(inside_CYX)


def flags(*values):
    return torch.tensor(values, dtype=torch.bool)


def grey_levels(count, side=8):
    """Images that show one grey level each, which no rotation and no mirroring changes."""
    return torch.arange(1, count + 1, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, side, side)


# --- what is drawn ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augmentation", ["paper", "brongers2021"])
def test_angles_span_the_range_evenly_and_differ(augmentation):
    high = DEGREES[augmentation]
    low = -high
    angle_N, _, _ = draw("bottle", augmentation, 4000, seed=0)
    assert low <= angle_N.min() < low * 29 / 30
    assert high * 29 / 30 < angle_N.max() <= high
    assert stats.kstest(angle_N.numpy(), stats.uniform(low, high - low).cdf).pvalue > 0.01
    assert len(angle_N.unique()) > 3990
    assert abs(stats.pearsonr(angle_N[1:], angle_N[:-1]).statistic) < 0.05


def test_the_ranges_are_those_of_the_paper_and_of_the_code_of_brongers_et_al():
    assert draw("bottle", "paper", 4000, 1)[0].abs().max() > 29
    assert 0.5 < draw("bottle", "brongers2021", 4000, 1)[0].abs().max() < 0.5236  # degrees: half a pixel at the border
    assert not draw("bottle", "none", 4000, 1)[0].any()


def test_the_table_has_every_category_with_a_reason():
    assert set(MOTIFS) == set(ALLOWED) == set(mvtec.CATEGORIES)
    assert all(len(motif.reason) > 20 for motif in MOTIFS.values())
    assert all(MOTIFS[category].fills for category in mvtec.TEXTURES)


@pytest.mark.parametrize("category", [*mvtec.CATEGORIES, "my_part"])
def test_flags_are_drawn_only_where_mirroring_is_allowed(category):
    # A user's own part is mirrored by what mirrors everything, and by no table.
    for augmentation, allowed in {"paper": ALLOWED.get(category, (False, False)), "brongers2021": (True, True)}.items():
        _, *drawn = draw(category, augmentation, 2000, seed=3)
        for flag_N, permitted in zip(drawn, allowed, strict=True):
            assert 0.46 < flag_N.float().mean() < 0.54 if permitted else not flag_N.any()
        if all(allowed):  # one independent of the other
            assert 0.22 < (drawn[0] & drawn[1]).float().mean() < 0.28
    assert not any(flag_N.any() for flag_N in draw(category, "none", 2000, seed=3)[1:])


# --- what is seen ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def candidates():
    """The letter in every flip, turned by torchvision by every whole degree within ±30°."""
    image_CYX = letter()[None].float()
    angles = range(-30, 31)
    return {(angle, *flip): torchvisions(image_CYX, angle, *flip)[0] for angle in angles for flip in FLIPS}


def recognised(made_NCYX, candidates):
    """Angle and flips of each image: those of the most similar candidate."""
    stack_KCYX = torch.stack(list(candidates.values()))
    keys = list(candidates)
    return [keys[int((stack_KCYX - x_CYX.float()).abs().mean((1, 2, 3)).argmin())] for x_CYX in made_NCYX[:, :1]]


@pytest.mark.parametrize("category", mvtec.CATEGORIES)
def test_pixels_are_mirrored_only_where_the_table_allows(candidates, category):
    x_NCYX = letter().expand(1, 3, -1, -1)
    for augmentation, allowed in {"paper": ALLOWED[category], "brongers2021": (True, True)}.items():
        seen = recognised(augment(x_NCYX, category, augmentation, 32, seed=7), candidates)
        assert {tuple(flip) for _, *flip in seen} == {
            flip for flip in FLIPS if all(may or not does for may, does in zip(allowed, flip, strict=True))
        }
        angle_N = draw(category, augmentation, 32, seed=7)[0]
        assert max(abs(angle - float(drawn)) for (angle, *_), drawn in zip(seen, angle_N, strict=True)) <= 1


def test_without_augmentation_images_are_as_they_are():
    x_NCYX = torch.randint(0, 256, (5, 3, 9, 7), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    made_NCYX = augment(x_NCYX, "bottle", "none", 10, seed=2)
    originals = sorted(x_CYX.numpy().tobytes() for x_CYX in x_NCYX)
    for half_NCYX in made_NCYX.split(5):
        assert sorted(x_CYX.numpy().tobytes() for x_CYX in half_NCYX) == originals


@pytest.mark.parametrize(("augmentation", "category"), [("paper", "bottle"), ("paper", "carpet"), ("none", "bottle")])
def test_every_original_is_used_equally_often(augmentation, category):
    made_NCYX = augment(grey_levels(7), category, augmentation, 150, seed=4)
    assert made_NCYX.shape == (150, 3, 8, 8)
    assert made_NCYX.dtype == torch.uint8
    assert (made_NCYX == made_NCYX[:, :1, :1, :1]).all()  # nothing black turns in from outside
    counts = made_NCYX[:, 0, 0, 0].long().bincount()[1:]
    assert counts.sum() == 150
    assert counts.max() - counts.min() <= 1
    assert made_NCYX[:7, 0, 0, 0].tolist() != made_NCYX[7:14, 0, 0, 0].tolist()  # in random order


def test_fewer_images_than_there_are():
    made_NCYX = augment(grey_levels(9), "pill", "paper", 4, seed=4)
    assert len(made_NCYX[:, 0, 0, 0].unique()) == 4


def test_the_angle_of_an_image_says_nothing_of_its_original():
    count = 3000
    source_N = augment(grey_levels(60, side=2), "bottle", "none", count, seed=5)[:, 0, 0, 0]
    angle_N, horizontal_N, _ = draw("bottle", "paper", count, seed=5)
    for drawn_N in (angle_N, horizontal_N.float()):
        assert abs(stats.spearmanr(source_N, drawn_N).statistic) < 0.05
        first = slice(0, 60)  # drawn from the same seed
        assert stats.spearmanr(source_N[first], drawn_N[first]).pvalue > 0.01


def test_the_seed_fixes_everything():
    x_NCYX = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    first, again, other = (augment(x_NCYX, "tile", "paper", 20, seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    state = torch.random.get_rng_state()
    augment(x_NCYX, "tile", "paper", 20, 3)
    assert torch.equal(torch.random.get_rng_state(), state)


def test_batches_do_not_show():
    x_NCYX = torch.randint(0, 256, (3, 3, 16, 16), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)
    made_NCYX = augment(x_NCYX, "bottle", "paper", 130, seed=6)
    order = augment(grey_levels(3, side=16), "bottle", "none", 130, seed=6)[:, 0, 0, 0].long() - 1
    expected = transform(x_NCYX[order].float(), *draw("bottle", "paper", 130, 6)).round()
    assert torch.equal(made_NCYX.float(), expected)


# --- the transform ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("padding", ["border", "reflection"])
@pytest.mark.parametrize("shape", [(48, 48), (40, 64), (63, 33)])
def test_the_transform_is_torchvisions_inside_the_frame(shape, padding):
    x_CYX = torch.rand(3, *shape, generator=torch.Generator().manual_seed(8))
    for angle, flip in product([-30.0, -7.5, 0.0, 0.5, 18.0, 30.0], FLIPS):
        ours_CYX = transform(x_CYX[None], torch.tensor([angle]), *map(flags, flip), padding=padding)[0]
        theirs_CYX, inside_CYX = torchvisions(x_CYX, angle, *flip)
        assert inside_CYX.float().mean() > 0.6
        torch.testing.assert_close(ours_CYX[inside_CYX], theirs_CYX[inside_CYX], atol=1e-3, rtol=0)


def test_every_image_has_an_angle_and_flips_of_its_own():
    x_BCYX = torch.rand(8, 3, 20, 20, generator=torch.Generator().manual_seed(9))
    angle_B = torch.linspace(-30, 30, 8)
    horizontal_B, vertical_B = flags(0, 1, 0, 1, 0, 1, 0, 1), flags(0, 0, 1, 1, 0, 0, 1, 1)
    together = transform(x_BCYX, angle_B, horizontal_B, vertical_B)
    for i in range(8):
        alone = transform(x_BCYX[i : i + 1], angle_B[i : i + 1], horizontal_B[i : i + 1], vertical_B[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)


def test_what_turns_in_from_outside():
    x_BCYX = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(10))
    x_BCYX[..., 0, :], x_BCYX[..., -1, :], x_BCYX[..., 0], x_BCYX[..., -1] = 2.0, 2.0, 2.0, 2.0
    turned = {
        padding: transform(x_BCYX, torch.tensor([30.0]), flags(0), flags(0), padding=padding)
        for padding in ("border", "reflection")
    }
    outside = ~torchvisions(x_BCYX[0], 30.0, False, False)[1][None]
    outside &= rotate(torch.ones_like(x_BCYX), 30.0, InterpolationMode.BILINEAR) == 0
    assert outside.float().mean() > 0.1
    torch.testing.assert_close(turned["border"][outside], torch.full_like(turned["border"][outside], 2.0))
    assert turned["reflection"][outside].std() > 0.2  # the texture goes on


def test_what_is_turned_at_load_is_torchvisions_with_black_corners():
    x_BCYX = torch.rand(400, 1, 24, 24, generator=torch.Generator().manual_seed(11)) + 1
    turned_BCYX = turned_at_load(x_BCYX, torch.Generator().manual_seed(12))
    assert torch.equal(turned_BCYX, turned_at_load(x_BCYX, torch.Generator().manual_seed(12)))
    assert not torch.equal(turned_BCYX, turned_at_load(x_BCYX, torch.Generator().manual_seed(13)))
    angle_B, side_B = torch.rand(2, 400, generator=torch.Generator().manual_seed(12))
    found = {"angle": [], "mirrored": []}
    for x_CYX, turned_CYX, share, side in zip(x_BCYX, turned_BCYX, angle_B, side_B, strict=True):
        angle, mirrored = float(180 * share - 90), bool(side < 0.5)
        expected_CYX, inside_CYX = torchvisions(x_CYX, angle, mirrored, False)
        torch.testing.assert_close(turned_CYX[inside_CYX], expected_CYX[inside_CYX], atol=1e-3, rtol=0)
        found["angle"].append(angle)
        found["mirrored"].append(mirrored)
        if 30 < abs(angle) < 60:
            assert (turned_CYX[..., [0, 0, -1, -1], [0, -1, 0, -1]] == 0).all()
    assert stats.kstest(found["angle"], stats.uniform(-90, 180).cdf).pvalue > 0.01
    assert 0.42 < sum(found["mirrored"]) / 400 < 0.58


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"category": "a/b"}, rf"^name must be one of .*{', '.join(MOTIFS)} or a folder of your own; got 'mvtec/a/b'$"),
        ({"augmentation": "Paper"}, rf"^augmentation must be one of {', '.join(AUGMENTATIONS)}; got 'Paper'$"),
        ({"count": 0}, "^count must be 1 or more; got 0$"),
        ({"count": -3}, "^count must be 1 or more; got -3$"),
    ],
)
def test_what_is_refused_gets_one_sentence(change, sentence):
    arguments = {"category": "bottle", "augmentation": "paper", "count": 4, "seed": 0} | change
    with pytest.raises(ValueError, match=sentence):
        augment(grey_levels(2), **arguments)
    with pytest.raises(ValueError, match=sentence):
        draw(**arguments)
