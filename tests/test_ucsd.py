"""The UCSD chapter: its code as it stands on the page, against captum and scikit-learn."""

import subprocess
import sys
from pathlib import Path

import jupytext
import numpy as np
import pytest
import torch
from captum.attr import LayerGradCam
from PIL import Image
from sklearn.metrics import average_precision_score, roc_auc_score

from lib.attention import attention
from lib.chapters import BOOK
from lib.data import ucsd
from lib.data.card import DataCard
from lib.models.ucsd import UCSDVAE

LAYERS = ("conv1", "conv2", "conv3")
SIDE = 20


@pytest.fixture(scope="module")
def chapter():
    """Names that the chapter's own cells define, up to its run."""
    names = {}
    for cell in jupytext.read(BOOK / "ucsd.md", fmt="md:myst").cells:
        if cell.cell_type == "code" and "remove-input" not in cell.metadata.get("tags", []):
            if "chapters.run(" in cell.source:
                break
            exec(cell.source, names)
    names["METHODS"] = ["attention", "mean image difference"]  # enough, and sooner done
    return names


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
def maps(chapter, clips):
    generator = torch.Generator().manual_seed(3)
    names = [*chapter["METHODS"], "reconstruction", "reconstruction error"]
    return {name: torch.rand(40, SIDE, SIDE, generator=generator) for name in names}


def found(rows, metric, method, subset="test clips"):
    return next(row for row in rows if (row["metric"], row["method"], row["subset"]) == (metric, method, subset))


def test_layers_give_different_maps_and_each_is_captums(chapter, model, x_BCYX):
    maps = {name: chapter["gradcam"](model, name, x_BCYX, first_stored=False) for name in LAYERS}
    for name, map_BYX in maps.items():
        captum = LayerGradCam(lambda x: model.encode(x)[0].sum(1), getattr(model.encoder, name))
        theirs_B1HW = captum.attribute(x_BCYX).detach()
        theirs_BYX = torch.nn.functional.interpolate(theirs_B1HW, (100, 100), mode="bilinear").abs()[:, 0]
        # The chapter's are divided by the size of the gradient over the batch.
        torch.testing.assert_close(map_BYX / map_BYX.max(), theirs_BYX / theirs_BYX.max(), rtol=1e-4, atol=1e-5)
        ours = attention(model.encode, f"encoder.{name}", x_BCYX, "liu2020_code")
        torch.testing.assert_close(map_BYX, ours.map_BYX, rtol=1e-4, atol=1e-6)
    for one, other in (("conv1", "conv2"), ("conv2", "conv3"), ("conv1", "conv3")):
        assert np.corrcoef(maps[one].flatten(), maps[other].flatten())[0, 1] < 0.99


def test_the_slip_gives_one_map_for_all_layers(chapter, model, x_BCYX):
    slipped = [chapter["gradcam"](model, name, x_BCYX, first_stored=True) for name in LAYERS]
    right = chapter["gradcam"](model, "conv1", x_BCYX, first_stored=False)
    assert all(torch.equal(map_BYX, right) for map_BYX in slipped)


def test_scores_are_scikit_learns(chapter, clips, maps):
    validation_N = clips.test_clip_N == 1
    test_N = ~validation_N
    mask_N, clip_N = clips.test_mask, clips.test_clip_N
    kept = [i for i in range(40) if test_N[i] and mask_N[i] is not None]
    truth_MYX = torch.stack([mask_N[i] for i in kept]).numpy()
    moving_NYX = clips.test_NYX > 180
    rows = chapter["pixel_rows"](maps, clips, validation_N, test_N)
    rows += chapter["moving_rows"](maps, clips, moving_NYX, test_N)
    rows += chapter["frame_rows"](maps, clips, test_N)
    for name in ("attention", "mean image difference"):
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
            row = found(rows, "frame AUROC", name, how)
            assert row["value"] == pytest.approx(roc_auc_score(flag_M, score_M), abs=1e-6)


def test_the_threshold_comes_from_the_validation_clips(chapter, clips, maps):
    validation_N = clips.test_clip_N == 1
    rows = chapter["pixel_rows"](maps, clips, validation_N, ~validation_N)

    def iou(score_YX, truth_YX, threshold):
        flagged = score_YX >= threshold
        return float((flagged & truth_YX).sum() / (flagged | truth_YX).sum())

    def pooled(where_N):
        kept = [i for i in torch.nonzero(where_N)[:, 0].tolist() if clips.test_mask[i] is not None]
        return maps["attention"][kept], torch.stack([clips.test_mask[i] for i in kept])

    score, truth = pooled(validation_N)
    threshold = max(score.unique().tolist(), key=lambda value: iou(score, truth, value))
    expected = iou(*pooled(~validation_N), threshold)
    assert found(rows, "IoU, threshold from validation", "attention")["value"] == pytest.approx(expected, abs=1e-6)
    assert expected <= found(rows, "best IoU (oracle)", "attention")["value"]


def test_frames_are_drawn_from_as_many_clips_as_there_are(chapter, clips):
    test_N = clips.test_clip_N != 1
    for anomalous in (True, False):
        at = chapter["drawn"](clips, test_N, anomalous)
        assert [clips.test_anomalous[i] for i in at] == [anomalous] * 4
        assert set(clips.test_clip_N[at][:3].tolist()) == {3, 4, 5}
        assert len(set(at.tolist())) == 4


def test_normal_posterior_is_that_of_all_frames_pooled(chapter, model):
    frame_NCYX = torch.randint(0, 256, (5, 1, 100, 100), generator=torch.Generator().manual_seed(4), dtype=torch.uint8)
    mean_D, logvar_D = chapter["normal_posterior"](model, frame_NCYX)
    with torch.no_grad():
        mu_ND, logvar_ND = model.encode(frame_NCYX / 255)
    draws = [
        mu_D + (0.5 * logvar_D).exp() * torch.randn(200_000, 3, generator=torch.Generator().manual_seed(i))
        for i, (mu_D, logvar_D) in enumerate(zip(mu_ND, logvar_ND, strict=True))
    ]
    pooled = torch.cat(draws)
    torch.testing.assert_close(mean_D, pooled.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(logvar_D.exp(), pooled.var(0), atol=0.01, rtol=0.01)


def test_panels_hold_eight_frames_and_a_clip_in_motion(chapter, clips, maps, tmp_path):
    figures = chapter["panels"](clips, maps, clips.test_clip_N != 1, "credit")
    assert figures.keys() == {"frames", "clip"}
    figures["clip"].save(tmp_path / "clip.gif", writer="pillow")
    with Image.open(tmp_path / "clip.gif") as animation:
        assert animation.n_frames == 8
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
