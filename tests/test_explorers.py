"""What explorers carry onto a page: the record's maps, IoUs and traversals, and nothing where there are none."""

import io
import json
import subprocess
import sys
from base64 import b64decode
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from bs4 import BeautifulSoup
from IPython.display import Image

from expvae_book import explorers, names, report
from expvae_book.runs import Run

RNG = np.random.default_rng(0)
PICTURE = Image(data=b"a picture", format="png")


class Held(Run):
    """A run whose arrays are those of its record."""

    arrays = property(lambda self: self.record["arrays"])


def run(arrays):
    return Held("mnist", {"seed": 0}, {"arrays": arrays, "git": {"commit": "", "dirty": False}}, Path("nowhere"))


def figure(shown):
    """What the script is given, and the figure."""
    soup = BeautifulSoup(shown.data, "html.parser")
    return json.loads(soup.find("script").string), soup


def decoded(given):
    """What explorer.js makes of `embedded`."""
    byte_NHW = np.frombuffer(b64decode(given["bytes"]), np.uint8).reshape(-1, *given["shape"])
    return byte_NHW / 255 * np.array(given["peaks"])[:, None, None]


def maps(*shape):
    """Maps as a record holds them, some of which are all but dark."""
    share = RNG.random(shape) * 10 ** -RNG.uniform(0, 3, (*shape[:-2], 1, 1))
    return (share / share.max()).astype(np.float16)


@pytest.fixture
def digits():
    layer = names.SHOWN["mnist"][0]
    arrays = {"kl_per_latent": RNG.random(32).astype(np.float32)}
    shapes = {f"{layer}, {rule}": (10, 7, 7) for rule in names.PRESETS} | {"each latent": (10, 32, 7, 7)}
    for state in explorers.NETWORKS:
        for name, shape in shapes.items():
            arrays |= {f"{state}/{name}": maps(*shape), f"{state}/{name}, peak": np.float32(RNG.random() / 1000)}
    return arrays


def test_maps_of_digits_are_those_of_the_record(digits):
    spec, soup = figure(explorers.digits(run(digits)))
    assert all(image["alt"] and image["src"].startswith("data:image/png;base64,") for image in soup.find_all("img"))
    options = spec["controls"][1]["options"]
    for state in explorers.NETWORKS:
        for at, given in enumerate(spec["maps"][state]):
            if at < len(names.PRESETS):
                name, share = f"{state}/conv2, {names.PRESETS[at]}", slice(None)
                assert options[at].endswith(names.RULES[names.PRESETS[at]])
            else:
                latent = np.argsort(-digits["kl_per_latent"])[at - len(names.PRESETS)]
                name, share = f"{state}/each latent", (slice(None), latent)
                assert options[at].startswith(f"latent {latent} alone ({digits['kl_per_latent'][latent]:.1f} nats)")
            peak = digits[f"{name}, peak"]
            true_NHW = digits[name].astype(float)[share] * peak
            # Of each map's own peak, so that one that is all but dark keeps its shades on a scale of its own.
            off_NHW = np.abs(decoded(given) - true_NHW) / true_NHW.max((1, 2), keepdims=True)
            assert off_NHW.max() < 1 / 255
            assert given["top"] == peak
        assert len(spec["maps"][state]) == len(options) == len(names.PRESETS) + 32


def test_a_map_of_nothing_stays_dark():
    given = explorers.embedded(np.zeros((2, 3, 4), np.float16), 7.0)
    np.testing.assert_array_equal(decoded(given), np.zeros((2, 3, 4)))


@pytest.fixture
def defects():
    """Five test images, of which four are shown, as arrays of a record; and the maps and masks themselves."""
    map_NYX, mask_NYX = RNG.random((5, 6, 6)), RNG.random((5, 6, 6)) < 0.3
    mask_NYX[4] = False
    threshold_T = np.linspace(0.1, 1.1, 11)
    flagged_NTYX = map_NYX[:, None] >= threshold_T[:, None, None]
    true_NT = (flagged_NTYX & mask_NYX[:, None]).sum((2, 3))
    false_NT = (flagged_NTYX & ~mask_NYX[:, None]).sum((2, 3))
    counts = {"true": true_NT, "false": false_NT, "anomalous": mask_NYX.sum((1, 2)), "normal": (~mask_NYX).sum((1, 2))}
    arrays = {"thresholds": threshold_T}
    arrays |= {f"flagged/{name}": np.concatenate([of[:4], of.sum(0, keepdims=True)]) for name, of in counts.items()}
    layer = names.SHOWN["mvtec"][0]
    arrays |= {f"trained/{layer}, liu2020_code": maps(4, 3, 3), f"trained/{layer}, liu2020_code, peak": np.float32(9)}
    return arrays, map_NYX, mask_NYX


def test_ious_of_counts_are_those_of_maps_and_masks(defects):
    arrays, map_NYX, mask_NYX = defects
    spec, _ = figure(explorers.thresholds(run(arrays)))
    for place, images in enumerate([[0], [1], [2], [3], [0, 1, 2, 3, 4]]):
        for at, threshold in enumerate(arrays["thresholds"]):
            flagged, truth = map_NYX[images] >= threshold, mask_NYX[images]
            anomalous = (flagged & truth).sum() / (flagged | truth).sum()
            normal = (~flagged & ~truth).sum() / (~flagged | ~truth).sum()
            assert spec["ious"]["anomalous class"][place][at] == pytest.approx(anomalous, abs=1e-4)
            assert spec["ious"]["both classes"][place][at] == pytest.approx((anomalous + normal) / 2, abs=1e-4)
            assert spec["flagged"][place][at] == pytest.approx(flagged.mean(), abs=1e-5)
    best = spec["controls"][1]["start"]
    assert spec["ious"]["anomalous class"][-1][best] == max(spec["ious"]["anomalous class"][-1])


def test_traversals_are_those_of_the_record_in_the_order_of_their_kl():
    models = {
        title: run({"kl": RNG.random(4), "traversals": RNG.integers(0, 256, (4, 7, 8, 8), np.uint8)})
        for title in ("with", "without </script>")
    }
    models["with"].arrays.update({"traversal maps": maps(4, 7, 5, 5), "traversal maps, peak": np.float32(3)})
    spec, soup = figure(explorers.traversals(models, {'of "a" model': PICTURE}))
    assert soup.find("img")["alt"] == 'of "a" model'
    assert [sheet["title"] for sheet in spec["sheets"]] == list(models)
    assert ["maps" in sheet for sheet in spec["sheets"]] == [True, False]
    arrays = models["with"].arrays
    map_NHW = 3.0 * arrays["traversal maps"][np.argsort(-arrays["kl"])].reshape(28, 5, 5)
    off_NHW = np.abs(decoded(spec["sheets"][0]["maps"]) - map_NHW) / map_NHW.max((1, 2), keepdims=True)
    assert off_NHW.max() < 1 / 255
    for sheet, model in zip(spec["sheets"], models.values(), strict=True):
        sheet_YX = np.asarray(PIL.Image.open(io.BytesIO(b64decode(sheet["source"].partition(",")[2]))))
        for place, latent in enumerate(np.argsort(-model.arrays["kl"])):
            assert sheet["labels"][place] == f"latent {latent} ({model.arrays['kl'][latent]:.1f} nats)"
            for value in range(7):
                drawn_YX = sheet_YX[8 * place : 8 * place + 8, 8 * value : 8 * value + 8]
                np.testing.assert_array_equal(drawn_YX, model.arrays["traversals"][latent, value])


def test_a_record_without_maps_is_said_to_have_none(digits, defects):
    arrays = defects[0]
    partly = {name: map_ for name, map_ in digits.items() if not name.startswith("untrained/each")}
    uncounted = {name: map_ for name, map_ in arrays.items() if name != "thresholds"}
    for shown in (explorers.digits(run(partly)), explorers.thresholds(run(uncounted)), explorers.thresholds(run({}))):
        assert shown.data.strip("*").count(".") == 1
        assert shown.data.startswith("*There is nothing to explore here")
    assert explorers.digits(None) is report.NOT_YET


def test_explorers_need_no_torch():
    code = "import sys; from expvae_book import explorers; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
