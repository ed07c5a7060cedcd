import numpy as np
import pandas as pd
import pytest
import torch
from IPython.display import Image, Markdown

from expvae import attention
from expvae.models import MNISTVAE
from expvae_book import figures, runs


def grid(scale=1.0, **options):
    images = np.linspace(0, 1, 2 * 4 * 4).reshape(2, 4, 4)
    rows = {"image": images, "map a": scale * images, "map b": images**2}
    options = {"titles": ["7", "4"], "label": "map", "credit": "Somebody's digits"} | options
    return figures.image_rows(rows, maps=["map a", "map b"], **options)


def drawn(figure):
    return [image for axis in figure.axes for image in axis.images]


def test_all_maps_of_a_grid_share_one_colour_scale():
    images = drawn(grid(scale=5.0))
    assert [image.get_cmap().name for image in images] == ["gray_r"] * 2 + [figures.MAPS] * 4
    assert {(image.norm.vmin, image.norm.vmax) for image in images} == {(0, 1)}


def test_zero_is_in_the_middle_of_the_scale_of_signed_maps():
    images = drawn(grid(scale=-1.0, signed=True))
    scales = [(image.get_cmap().name, image.norm.vmin, image.norm.vmax) for image in images]
    assert scales == [("gray_r", 0, 1)] * 2 + [(figures.SIGNED, -1, 1)] * 4


def test_a_grid_names_its_rows_columns_scale_and_source():
    figure = grid()
    labels = {axis.get_ylabel() for axis in figure.axes}
    assert {"image", "map a", "map b", "map"} <= labels
    assert [axis.get_title() for axis in figure.axes[:2]] == ["7", "4"]
    assert figure.get_supxlabel() == "Somebody's digits"


def test_intervals_are_drawn_where_the_numbers_are():
    table = pd.DataFrame(
        {"method": ["a", "b"], "group": "all", "value": [0.6, 0.8], "low": [0.5, 0.7], "high": [0.65, 0.95]}
    )
    axis = figures.intervals(table, label="AUROC", chance=0.5).axes[0]
    (container,) = axis.containers
    assert container[0].get_xdata().tolist() == [0.6, 0.8]
    (segments,) = (bars.get_segments() for bars in container[2])
    assert np.allclose([segment[:, 0] for segment in segments], [[0.5, 0.65], [0.7, 0.95]])
    assert [label.get_text() for label in axis.get_yticklabels()] == ["a", "b"]


def test_histograms_show_shares():
    axis = figures.histograms({"a": np.array([0.1, 0.1, 0.9])}, label="AUROC", mark=0.5).axes[0]
    heights = np.concatenate([patch.get_path().vertices[:, 1] for patch in axis.patches])
    assert heights.max() == pytest.approx(2 / 3)


def test_training_curves_hold_every_epoch():
    names = ("reconstruction", "kl", "validation_reconstruction", "validation_kl")
    losses = {name: [100.0, 50.0, 20.0, 10.0, 9.0, 8.0, 7.0] for name in names}
    for axis in figures.training_curves(losses).axes:
        assert [list(line.get_ydata()) for line in axis.lines] == [losses["kl"]] * 2


def test_bars_descend():
    axis = figures.bars([1.0, 3.0, 2.0], label="KL", index="latents").axes[0]
    assert [bar.get_height() for bar in axis.patches] == [3.0, 2.0, 1.0]


def test_attention_steps_show_the_maps_of_the_latents_asked_for():
    vae = MNISTVAE(latent_dim=6).eval()
    x_BCYX = torch.rand(1, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    paper, code = (attention(vae.encode, "encoder.conv2", x_BCYX, name) for name in ("liu2020_paper", "liu2020_code"))
    figure = figures.attention_steps(x_BCYX[0, 0].numpy(), paper, code, [4, 0, 1, 2, 3], "Noise")
    images = drawn(figure)[:10]
    assert np.array_equal(images[3].get_array(), paper.map_BYX[0].numpy())
    assert np.array_equal(images[5].get_array(), paper.map_BIYX[0, 4].numpy())
    assert len({(image.norm.vmin, image.norm.vmax) for image in images[5:]}) == 1


def test_show_takes_figures_and_stored_files(tmp_path):
    shown = figures.show(grid())
    assert isinstance(shown, Image)
    assert shown.data.startswith(b"\x89PNG")
    (tmp_path / "a.png").write_bytes(shown.data)
    assert figures.show(tmp_path / "a.png").data == shown.data
    with pytest.raises(FileNotFoundError, match=r"b\.png"):
        figures.show(tmp_path / "b.png")


def test_a_run_without_pictures_says_so(tmp_path):
    run = runs.Run("ucsd", {"seed": 1}, {"git": {"commit": "", "dirty": False}}, tmp_path / "run")
    missing = figures.kept(run, "frames")
    assert isinstance(missing, Markdown)
    assert missing.data.startswith("*This run keeps no pictures: those with seed 0 do")
    (run.folder / "figures").mkdir(parents=True)
    grid().savefig(run.folder / "figures" / "frames.png")
    shown = figures.kept(run, "frames")
    assert isinstance(shown, Image)
    assert shown.data == (run.folder / "figures" / "frames.png").read_bytes()
