"""The job of UCSD Ped1 and the published slips, against captum and scikit-learn."""

import dataclasses
import inspect
import subprocess
import sys
from collections import OrderedDict
from functools import partial
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from matplotlib.figure import Figure
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import nn

from expvae import Method, attention
from expvae.metrics import PixelMetrics, auroc_difference
from expvae.models import UCSDVAE
from expvae_book import measures, training
from expvae_book.chapters import BOOK, Job
from expvae_book.data import ucsd
from expvae_book.data.card import DataCard
from expvae_book.jobs import slips, steps
from expvae_book.jobs import ucsd as job
from expvae_book.weights import Trained

LAYERS = ("conv1", "conv2", "conv3")
SIDE = 20


def footage(clips, validation=(1,), every=1, batch=32):
    """What a job sees of these clips: the frames of some clips choose the threshold, all others are measured."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job, "EVERY", every)
        left = job.thinned(clips)
    validation_N = torch.isin(left.test_clip_N, torch.tensor(validation))
    train_NCYX = left.train_NYX[:, None]
    return job.Footage(clips, left, train_NCYX, train_NCYX[:10], validation_N, ~validation_N, batch)


@pytest.fixture(autouse=True)
def few_resamples(monkeypatch):
    """A hundred resamples instead of a thousand; no test here looks closely at the ends of an interval."""
    for measure in (PixelMetrics.intervals, PixelMetrics.auroc_interval, auroc_difference):
        monkeypatch.setitem(inspect.unwrap(measure).__kwdefaults__, "resamples", 100)
    monkeypatch.setattr(measures, "RESAMPLES", 100)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return UCSDVAE(3).eval()


@pytest.fixture(scope="module")
def x_BCYX():
    return torch.rand(2, 1, 100, 100, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def clips():
    """Five test clips of eight frames, one of which has no masks; anomalies in half of the others' frames."""
    generator = torch.Generator().manual_seed(2)
    frame_NYX = torch.randint(0, 256, (40, SIDE, SIDE), generator=generator, dtype=torch.uint8)
    clip_N = torch.arange(1, 6).repeat_interleave(8)
    mask_N = [None if clip == 2 else torch.zeros(SIDE, SIDE, dtype=torch.bool) for clip in clip_N.tolist()]
    for i in range(0, 40, 2):
        if mask_N[i] is not None:
            mask_N[i][3:9, 4 : 8 + i % 5] = True
    counts = {"train": 40, "test": 40}
    card = DataCard("ucsd", "sample", counts, counts, "digest", "licence", "credit")
    return ucsd.UCSD(frame_NYX, clip_N, frame_NYX, clip_N.clone(), mask_N, card)


@pytest.fixture(scope="module")
def maps(clips):
    generator = torch.Generator().manual_seed(3)
    names = ["conv2, liu2020_code", "mean image difference", "reconstruction", "reconstruction error"]
    return {name: torch.rand(40, SIDE, SIDE, generator=generator) for name in names}


def masked(clips):
    """The same without the clip that has no masks, and which of the frames are left."""
    return [i for i, mask in enumerate(clips.test_mask) if mask is not None]


class Small(nn.Module):
    """A VAE with the layers of the job's, for the small frames of `clips`."""

    def __init__(self):
        super().__init__()
        convolutions = {
            name: nn.Conv2d(before, after, kernel_size=4, stride=2, padding=1)
            for name, before, after in (("conv1", 1, 4), ("conv2", 4, 6), ("conv3", 6, 8))
        }
        layers = []
        for name, convolution in convolutions.items():
            layers += [(name, convolution), (f"relu_{name}", nn.ReLU())]
        self.encoder = nn.Sequential(OrderedDict([*layers, ("flatten", nn.Flatten())]))
        self.mu, self.logvar = nn.Linear(32, 16), nn.Linear(32, 16)
        self.decoder = nn.Linear(16, SIDE * SIDE)

    def encode(self, x_BCYX):
        hidden = self.encoder(x_BCYX)
        return self.mu(hidden), self.logvar(hidden)

    def decode(self, z_BI):
        return self.decoder(z_BI).unflatten(1, (1, SIDE, SIDE))


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(5)
    return Small().eval()


def found(rows, metric, method, subset="test clips"):
    return next(row for row in rows if (row["metric"], row["method"], row["subset"]) == (metric, method, subset))


def test_layers_give_different_maps_and_each_is_captums(model, x_BCYX):
    maps = {name: slips.gradcam(model, name, x_BCYX, first_stored=False) for name in LAYERS}
    for name, map_BYX in maps.items():
        captum = LayerGradCam(lambda x: model.encode(x)[0].sum(1), getattr(model.encoder, name))
        theirs_B1HW = captum.attribute(x_BCYX).detach()
        theirs_BYX = torch.nn.functional.interpolate(theirs_B1HW, (100, 100), mode="bilinear").abs()[:, 0]
        # Those of the slips are divided by the size of the gradient over the batch.
        torch.testing.assert_close(map_BYX / map_BYX.max(), theirs_BYX / theirs_BYX.max(), rtol=1e-4, atol=1e-5)
        ours = attention(model.encode, f"encoder.{name}", x_BCYX, "liu2020_code")
        torch.testing.assert_close(map_BYX, ours.map_BYX, rtol=1e-4, atol=1e-6)
    for one, other in (("conv1", "conv2"), ("conv2", "conv3"), ("conv1", "conv3")):
        assert np.corrcoef(maps[one].flatten(), maps[other].flatten())[0, 1] < 0.99


def test_the_slip_gives_one_map_for_all_layers(model, x_BCYX):
    slipped = [slips.gradcam(model, name, x_BCYX, first_stored=True) for name in LAYERS]
    right = slips.gradcam(model, "conv1", x_BCYX, first_stored=False)
    assert all(torch.equal(map_BYX, right) for map_BYX in slipped)


MEASURED = ("conv2, liu2020_code", "mean image difference")


@pytest.mark.parametrize("every", (1, 2, 3))
def test_clips_without_masks_are_left_out_and_frames_between(clips, every):
    kept = [i for i in masked(clips) if i % 8 % every == 0]  # a clip has eight frames
    left = footage(clips, every=every).clips
    assert len(kept) == 4 * -(-8 // every)
    torch.testing.assert_close(left.test_NYX, clips.test_NYX[kept])
    assert left.test_clip_N.tolist() == clips.test_clip_N[kept].tolist()
    assert all(one is clips.test_mask[i] for one, i in zip(left.test_mask, kept, strict=True))
    assert torch.equal(left.train_NYX, clips.train_NYX)


def measured_maps(clips, maps):
    """What a job measures of two maps, with the first clip for validation, and the frames that count."""
    kept = masked(clips)
    given = ((name, maps[name][kept]) for name in MEASURED)
    measured, moving = job.map_rows(given, footage(clips))
    return measured, moving, [i for i in kept if clips.test_clip_N[i] != 1]


def test_scores_are_scikit_learns(clips, maps):
    measured, moving, kept = measured_maps(clips, maps)
    rows, mask_N, clip_N = measured.rows + moving, clips.test_mask, clips.test_clip_N
    truth_MYX = torch.stack([mask_N[i] for i in kept]).numpy()
    moving_NYX = (clips.test_NYX / 255 - (clips.train_NYX / 255).mean(0)).abs() >= 0.1
    for name in MEASURED:
        score_MYX = maps[name][kept].numpy()
        flat = truth_MYX.ravel(), score_MYX.ravel()
        assert found(rows, "pixel AUROC", name)["value"] == pytest.approx(roc_auc_score(*flat), abs=1e-6)
        assert found(rows, "pixel AUROC", name)["n"] == len(set(clip_N[kept].tolist())) == 3
        precision = average_precision_score(*flat)
        assert found(rows, "average precision", name)["value"] == pytest.approx(precision, abs=1e-6)

        among_MYX = moving_NYX[kept].numpy()
        expected = roc_auc_score(truth_MYX[among_MYX], score_MYX[among_MYX])
        assert found(rows, "pixel AUROC among moving pixels", name)["value"] == pytest.approx(expected, abs=1e-6)
        normal = [i for i in kept if not mask_N[i].any()]
        expected = roc_auc_score(moving_NYX[normal].flatten(), maps[name][normal].flatten())
        row = found(rows, "AUROC of moving pixels on normal frames", name)
        assert row["value"] == pytest.approx(expected, abs=1e-6)

        flag_M = truth_MYX.any((1, 2))
        for how, score_M in {"mean": score_MYX.mean((1, 2)), "maximum": score_MYX.max((1, 2))}.items():
            row = found(rows, "image AUROC", name, how)
            assert row["value"] == pytest.approx(roc_auc_score(flag_M, score_M), abs=1e-6)


def test_the_threshold_comes_from_the_validation_clips(clips, maps):
    measured, _, kept = measured_maps(clips, maps)

    def iou(score_YX, truth_YX, threshold):
        flagged = score_YX >= threshold
        return float((flagged & truth_YX).sum() / (flagged | truth_YX).sum())

    def pooled(chosen):
        return maps[MEASURED[0]][chosen], torch.stack([clips.test_mask[i] for i in chosen])

    score, truth = pooled([i for i in masked(clips) if clips.test_clip_N[i] == 1])
    threshold = max(score.unique().tolist(), key=lambda value: iou(score, truth, value))
    expected = iou(*pooled(kept), threshold)
    row = found(measured.rows, "IoU, threshold from validation", MEASURED[0])
    assert row["value"] == pytest.approx(expected, abs=1e-6)
    row = found(measured.rows, "IoU, pooled, anomalous", MEASURED[0], "validation")
    assert row["value"] == pytest.approx(expected, abs=1e-6)
    assert expected <= found(measured.rows, "best IoU (oracle)", MEASURED[0])["value"]


def test_frames_are_drawn_from_as_many_clips_as_there_are(clips):
    seen = footage(clips)
    for anomalous in (True, False):
        at = job.drawn(seen, anomalous)
        assert [seen.clips.test_anomalous[i] for i in at] == [anomalous] * 4
        assert set(seen.clips.test_clip_N[at][:3].tolist()) == {3, 4, 5}
        assert len(set(at.tolist())) == 4


def auroc(map_NYX, mask_N, normal=False):
    """scikit-learn's, over the frames that have a mask, or over all with the others normal."""
    kept = [i for i, mask_YX in enumerate(mask_N) if normal or mask_YX is not None]
    truth = torch.stack([torch.zeros(SIDE, SIDE, dtype=torch.bool) if mask_N[i] is None else mask_N[i] for i in kept])
    return roc_auc_score(truth.flatten(), map_NYX[kept].flatten())


def test_every_map_of_a_job_is_that_of_the_library(clips, small):
    seen = footage(clips)
    maps = dict(seen.explain(small, torch.arange(len(seen.clips.test_NYX)), LAYERS, measures.PRESETS))
    assert list(maps) == job.MAPS == [f"{layer}, {by}" for layer in LAYERS for by in measures.PRESETS]
    for name in ("conv1, liu2020_paper", "conv3, liu2020_code"):
        layer, preset = name.split(", ")
        parts = [
            attention(small.encode, f"encoder.{layer}", x_BCYX / 255, preset).map_BYX
            for x_BCYX in seen.clips.test_NYX[:, None].split(32)
        ]
        torch.testing.assert_close(maps[name], torch.cat(parts), rtol=1e-4, atol=1e-6)


def test_differences_are_those_of_the_maps(clips, monkeypatch):
    monkeypatch.setattr(measures, "PRESETS", ("liu2020_code",))
    names = [f"{layer}, liu2020_code" for layer in LAYERS]
    monkeypatch.setattr(job, "MAPS", names)
    kept, left = masked(clips), footage(clips).clips
    generator = torch.Generator().manual_seed(8)
    baseline = job.SIMPLE
    maps = {name: torch.rand(len(kept), SIDE, SIDE, generator=generator) for name in [*names, *baseline]}
    truth = measures.Truth(torch.stack(left.test_mask), left.test_clip_N, "test clips")
    measured = measures.Measured()
    for name, map_NYX in maps.items():
        measured.pixels(name, map_NYX, truth, {"auroc": "pixel AUROC"})
    scores = {name: auroc(map_NYX, left.test_mask) for name, map_NYX in maps.items()}
    rows = job.difference_rows(measured)
    pairs = [(f"{one} − {other}", one, other) for one in names for other in baseline]
    pairs += [
        (f"liu2020_code, {one} − {other}", f"{one}, liu2020_code", f"{other}, liu2020_code")
        for one, other in combinations(LAYERS, 2)
    ]
    assert [row["method"] for row in rows] == [title for title, _, _ in pairs]
    for title, one, other in pairs:
        row = found(rows, "pixel AUROC, difference", title)
        assert row["value"] == pytest.approx(scores[one] - scores[other], abs=1e-6)
        assert row["low"] <= row["value"] <= row["high"]
        assert row["n"] == 4


def test_where_no_frame_is_anomalous_no_choice_is_judged(clips, small):
    normal = [None if mask is None else torch.zeros_like(mask) for mask in clips.test_mask]
    assert job.change_rows(small, footage(dataclasses.replace(clips, test_mask=normal))) == []


def test_what_is_pictured_is_of_two_frames_with_and_two_without_an_anomaly(clips, small, monkeypatch):
    monkeypatch.setattr(measures, "PRESETS", ("liu2020_code",))
    seen = footage(clips)
    left = seen.clips
    monkeypatch.setattr(job, "network", lambda recipe: Small)
    start = training.build(Small, 9).eval()
    asked = Job("ucsd", {"recipe": "report1", "seed": 9}, None)
    arrays = job.explain(asked, steps.Fit(lambda: Trained(small, training.History(), "", "", "", "", False)), seen)
    at = torch.cat([job.drawn(seen, flag)[:2] for flag in (True, False)])
    assert [left.test_anomalous[i] for i in at] == [True, True, False, False]
    kept = {f"{state}/{name}, liu2020_code" for state in ("trained", "untrained") for name in LAYERS}
    assert arrays.keys() == kept | {f"{name}, peak" for name in kept}
    for state, model in {"trained": small, "untrained": start}.items():
        map_BHW = attention(model.encode, "encoder.conv2", left.test_NYX[at, None] / 255, "liu2020_code").map_BIHW.mean(
            1
        )
        ours, peak = (arrays[f"{state}/conv2, liu2020_code{part}"] for part in ("", ", peak"))
        np.testing.assert_allclose(ours.astype(float) * peak, map_BHW, rtol=2**-10, atol=1e-6)
    asked.run = SimpleNamespace(arrays=arrays | {"course/conv2": np.zeros(1)})
    assert job.explain(asked, steps.Fit(must_not_train), seen).keys() == arrays.keys()


def test_the_strip_shows_the_largest_anomaly_of_four_clips(clips, monkeypatch):
    drawn = {}
    monkeypatch.setattr(job.figures, "image_rows", lambda rows, **_: drawn.update(rows) or Figure())
    job.strip(footage(clips))
    sizes = {
        clip: [int(m.sum()) for m, c in zip(clips.test_mask, clips.test_clip_N, strict=True) if c == clip]
        for clip in (3, 4, 5)
    }
    assert [len(images) for images in drawn.values()] == [3, 3, 3]  # clip 1 is held back, and 2 has no masks
    assert sorted(int(mask_YX.sum()) for mask_YX in drawn["mask"]) == sorted(map(max, sizes.values()))


def must_not_train():
    raise AssertionError("trained although the run is stored")


def test_every_switch_is_compared_with_the_case_without_it(clips, small, monkeypatch):
    monkeypatch.setattr(slips, "EVERY", 1)
    cut = dataclasses.replace(clips, test_mask=[None if m is None else m & m.roll(1, 0) for m in clips.test_mask])
    rows = slips.rows(small, clips, cut, 32)
    x_NCYX = clips.test_NYX[:, None] / 255
    score = partial(auroc, mask_N=clips.test_mask)

    def by(normaliser, batch):
        how = Method(score="sum_of_means", normaliser=normaliser, channels="abs_of_sum")
        parts = [attention(small.encode, "encoder.conv2", x, how).map_BYX for x in x_NCYX.split(batch)]
        return torch.cat(parts)

    corrected = by("image", 32)
    expected = {("corrected", ""): score(corrected), ("gradient", "per image"): score(corrected)}
    expected |= {("gradient", f"per batch of {batch}"): score(by("batch", batch)) for batch in (8, 32, 128)}
    expected["masks", "bilinear, truncated"] = auroc(corrected, cut.test_mask)
    released = [m if clip in (3, 4) else None for clip, m in zip(clips.test_clip_N, clips.test_mask, strict=True)]
    expected["masks", "the release's only"] = auroc(corrected, released)
    expected["masks", "the release's only, others normal"] = auroc(corrected, released, normal=True)
    for name in LAYERS:
        for slip, first in (("as asked", False), ("first stored", True)):
            parts = [slips.gradcam(small, name, x, first) for x in x_NCYX.split(32)]
            expected[f"hook, {slip}", name] = score(torch.cat(parts))
    got = {(row["method"], row["subset"]): row["value"] for row in rows if row["metric"] == "switch"}
    assert got == pytest.approx(expected, abs=1e-6)

    against = dict.fromkeys(expected, ("corrected", ""))
    against["masks", "the release's only, others normal"] = ("masks", "the release's only")
    against |= {("hook, first stored", name): ("hook, as asked", name) for name in LAYERS}
    for case in [("corrected", ""), *(("hook, as asked", name) for name in LAYERS)]:
        del against[case]
    changes = {(row["method"], row["subset"]): row for row in rows if row["metric"] == "switch, change"}
    assert {case: row["value"] for case, row in changes.items()} == pytest.approx(
        {case: expected[case] - expected[other] for case, other in against.items()}, abs=1e-6
    )
    assert changes["hook, first stored", "conv1"]["value"] == 0
    assert expected["hook, first stored", "conv3"] == expected["hook, as asked", "conv1"]


def test_where_all_clips_have_masks_those_of_the_release_are_taken(clips, small, monkeypatch):
    monkeypatch.setattr(slips, "EVERY", 1)
    complete = [torch.zeros(SIDE, SIDE, dtype=torch.bool) if m is None else m for m in clips.test_mask]
    masked = dataclasses.replace(clips, test_mask=complete)
    rows = slips.rows(small, masked, masked, 32)
    assert found(rows, "switch", "masks", "the release's only")["n"] == 2  # 3 and 4 of the clips 1 to 5
    assert found(rows, "switch", "masks", "the release's only, others normal")["n"] == 5


def test_the_noise_of_a_frame_does_not_depend_on_the_batch(clips, small):
    alike = dataclasses.replace(clips, test_NYX=clips.test_NYX[:1].repeat(40, 1, 1))
    frame_N = torch.arange(32)
    maps = [
        dict(footage(alike, batch=batch).explain(small, frame_N, ["conv2"], ["normal_difference"])) for batch in (8, 32)
    ]
    one, two = (each["conv2, normal_difference"] for each in maps)
    torch.testing.assert_close(one, two)
    assert (one - one[0]).flatten(1).abs().amax(1)[1:].min() > 0


def test_what_the_latents_carry(clips, small):
    seen = footage(clips)
    restored_NYX = torch.rand(32, SIDE, SIDE, generator=torch.Generator().manual_seed(6))
    rows, latents = job.latent_rows(small, seen, restored_NYX)
    clips = seen.clips
    with torch.no_grad():
        mu_NI = small.encode(clips.test_NYX[:, None] / 255)[0].numpy()
    np.testing.assert_allclose(latents["variance_of_mu_per_latent"], mu_NI.var(0, ddof=1), rtol=1e-4)
    active = found(rows, "active units", "", "masked clips")
    assert active["value"] == (mu_NI.var(0, ddof=1) > 0.01).sum()
    metric = "standard deviation of a pixel over the frames"
    for name, frames in (("frames", clips.test_NYX.numpy() / 255), ("reconstructions", restored_NYX.numpy())):
        expected = np.sqrt(frames.var(0, ddof=1).mean())
        assert found(rows, metric, name, "masked clips")["value"] == pytest.approx(expected, rel=1e-5)


def test_panels_hold_eight_frames_and_a_clip_in_motion(clips, maps, tmp_path):
    kept = masked(clips)
    figures = job.panels(footage(clips), {name: map_NYX[kept] for name, map_NYX in maps.items()})
    assert figures.keys() == {"frames", "clip"}
    figures["clip"].save(tmp_path / "clip.gif", writer="pillow")
    with Image.open(tmp_path / "clip.gif") as animation:
        assert animation.n_frames == 4  # of the eight of the clip, at most five
    titles = [axis.get_title() for axis in figures["frames"].axes if axis.get_title()]
    assert len(titles) == 8


def test_an_unknown_layer_is_refused_with_the_valid_ones(tmp_path):
    command = [
        Path(sys.executable).with_name("papermill"),
        "book/ucsd.md",
        tmp_path / "out.ipynb",
        "-p",
        "layer",
        "conv4",
    ]
    done = subprocess.run(command, cwd=BOOK.parent, capture_output=True, text=True)
    assert done.returncode != 0
    assert "layer = 'conv4' is not allowed; give text: conv1 | conv2 | conv3." in done.stderr
    assert not (tmp_path / "out.ipynb").exists()
