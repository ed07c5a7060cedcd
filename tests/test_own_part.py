"""A user's own images in MVTec AD's layout, of odd sizes and formats and as much as there is, through the chapter."""

import re
from functools import partial
from shutil import copytree, rmtree

import jupytext
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from expvae_book import claims, defects, figures, matching, measures, names, probes, publications, tables
from expvae_book.chapters import BOOK
from expvae_book.data import card as cards
from expvae_book.data import catalogue, mvtec
from expvae_book.data.__main__ import main
from expvae_book.jobs import controls
from expvae_book.jobs import mvtec as mvtec_job
from expvae_book.pages import mvtec as page
from test_mvtec import Small

SIDE = 64
SIZES = ((61, 47), (40, 90), (64, 64), (33, 120))  # height and width
FORMS = {".png": "RGBA", ".jpg": "RGB", ".bmp": "L", ".tif": "I;16"}
UNMASKED = "1 of 4 defective images have no mask: scratch/003.tif."
OWN = "Not MVTec AD: the user's own images, in its layout."
NOTES = {
    "my_part": UNMASKED,
    "no_masks": "No masks: image-level measures only.",
    "no_good": f"No normal test images: pixel measures only. {UNMASKED}",
    "no_test": "No test images: training only. Maps are made of the images in test/good and test/DEFECT.",
    "one_image": "One test image: maps, but no measures.",
}


def save(place, number, defect=False):
    """An image in one of the sizes and forms in which cameras write them, with a bright rectangle; its mask."""
    shape, (suffix, form) = SIZES[number % 4], list(FORMS.items())[number % 4]
    x_YXC = np.random.default_rng(number).integers(40, 120, (*shape, 3), np.uint8)
    mask_YX = np.zeros(shape, bool)
    mask_YX[shape[0] // 4 : shape[0] // 2, shape[1] // 4 : shape[1] // 2] = defect
    x_YXC[mask_YX] += 120
    place.parent.mkdir(parents=True, exist_ok=True)
    deep = form == "I;16"
    image = Image.fromarray(x_YXC[..., 0] * np.uint16(257)) if deep else Image.fromarray(x_YXC).convert(form)
    image.save(place.with_suffix(suffix))
    return mask_YX


def write(folder):
    """A part with five normal images to train on, two to test on, and four defects, the last without a mask."""
    for number in range(5):
        save(folder / f"train/good/{number:03}", number)
    for number in range(2):
        save(folder / f"test/good/{number:03}", 5 + number)
    for number in range(4):
        mask_YX = save(folder / f"test/scratch/{number:03}", number, defect=True)
        if number < 3:
            file = folder / f"ground_truth/scratch/{number:03}_mask.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask_YX).save(file)
    return folder


@pytest.fixture
def part(tmp_path, monkeypatch):
    """The folder of my_part below a data root."""
    monkeypatch.setenv("EXPVAE_DATA", str(tmp_path))
    return write(tmp_path / "mvtec/my_part")


# Loading


def test_any_size_and_format_with_as_many_masks_as_there_are(part):
    loaded = mvtec.load("my_part", size=SIDE)
    assert loaded.train_NCYX.shape == (5, 3, SIDE, SIDE)
    assert loaded.test_defect == ["good"] * 2 + ["scratch"] * 4
    assert [None if mask_YX is None else bool(mask_YX.any()) for mask_YX in loaded.test_mask] == (
        [False] * 2 + [True] * 3 + [None]
    )
    for x_CYX, mask_YX in zip(loaded.test_NCYX[2:5], loaded.test_mask[2:5], strict=True):
        grey_YX = x_CYX.float().mean(0)
        assert grey_YX[mask_YX].min() > 140 > grey_YX[~mask_YX].mean()
    card = loaded.card
    assert (card.name, card.kind, card.mark, card.official) == ("mvtec/my_part", "user's own", "user's own", {})
    assert card.counts == {"train": 5, "test": 6, "masks": 3, "test good": 2, "test defective": 4}
    assert card.note.splitlines() == [OWN, NOTES["my_part"]]
    assert not (card.published or card.generated)
    (part / "NOTE.txt").write_text("Taken on Monday.")
    (part.parent / "NOTE.txt").write_text("Of MVTec AD.")
    assert mvtec.load("my_part", size=SIDE).card.note.splitlines() == ["Taken on Monday.", OWN, NOTES["my_part"]]


def test_only_its_name_makes_a_folder_a_part_and_never_one_of_the_fifteen(part, capsys):
    save(part.parent / "a part/train/good/000", 0)
    save(part.parent / ".hidden/train/good/000", 0)
    assert cards.added() == ["a part", "my_part"]
    assert cards.available() == []
    assert not catalogue.is_at_hand(catalogue.MVTEC, part.parents[1])  # which `make reproduce` asks
    assert cards.survey(catalogue.MVTEC, part.parents[1]) is None
    assert main(["status"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"^mvtec/my_part +user's own +5 train, 6 test, 3 masks, 2 test good +\w{12} ", said, re.MULTILINE)
    assert f"mvtec/my_part: {OWN}\n" in said
    assert "mvtec: rename the folder 'a part' to use it: letters, digits and . _ + - alone." in said
    assert main(["fetch", "mvtec", "--categories", "my_part"]) == 1
    for wrong in ("a part", "my_prat", "my_part/train", ".hidden", ""):
        with pytest.raises(ValueError) as error:
            mvtec.load(wrong)
        assert str(error.value).startswith("category must be one of bottle, cable, ")
        assert str(error.value).endswith(f"alone (there: a part, my_part); got {wrong!r}")


@pytest.mark.parametrize(
    ("harm", "sentence"),
    [
        (
            lambda part: rmtree(part / "train"),
            "{}/train/good holds no images ({} holds ground_truth/, test/); put normal",
        ),
        (lambda part: (part / "test/good/000.jpg").write_bytes(b"no image"), "{}/test/good/000.jpg is damaged or no"),
        (
            lambda part: Image.new("L", (3, 2)).save(part / "ground_truth/scratch/000_mask.png"),
            "{}/ground_truth/scratch/000_mask.png has 3x2 pixels for the 47x61 of {}/test/scratch/000.png",
        ),
        (
            lambda part: (part / "test/scratch/002.bmp").unlink(),
            "{}/ground_truth/scratch/002_mask.png is the mask of no test image",
        ),
    ],
)
def test_what_cannot_be_read_is_named_in_one_sentence(part, harm, sentence):
    harm(part)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        mvtec.load("my_part")
    assert str(error.value).startswith(sentence.format(part, part))
    assert "\n" not in str(error.value)
    assert "fetch" not in str(error.value)


def test_no_drawn_stand_in_and_no_training_on_two_images(part):
    with pytest.raises(ValueError, match=r"^data='sample' draws MVTec AD's categories only, and my_part is your own"):
        mvtec.load("my_part", "sample")
    for number in (2, 3, 4):
        next((part / "train/good").glob(f"{number:03}.*")).unlink()
    parameters = {"category": "my_part", "data": "auto", "recipe": "report1", "initial": "random"}
    job = page.Job("mvtec15", parameters | {"encoder": "fine-tuned"}, None)
    with pytest.raises(ValueError, match=r"^train/good of my_part holds 2 images; it takes 3 or more, because a fifth"):
        mvtec_job.load(job)


# The chapter


class Chapter:
    """The cells of mvtec15, run one after the other, and what they show."""

    def __init__(self, monkeypatch):
        self.texts, self.pictures = [], 0
        monkeypatch.setattr("IPython.display.display", self.display)
        for module in ("expvae_book.pages.mvtec", "expvae_book.pages.mvtec_short"):
            monkeypatch.setattr(f"{module}.display", self.display)

    def display(self, *shown, **_):
        for one in shown:
            data = one if isinstance(one, dict) else {type(one).__name__: one.data}
            self.texts += [text for text in data.values() if isinstance(text, str)]
            self.pictures += sum(isinstance(of, bytes) for of in data.values())

    def run(self, **given):
        cells = jupytext.read(BOOK / "mvtec15.md", fmt="md:myst").cells
        self.names, self.texts = {"display": self.display}, []
        for cell in [cell for cell in cells if cell.cell_type == "code"]:
            exec(cell.source, self.names)
            self.names |= given if "parameters" in cell.metadata.get("tags", []) else {}
        return "\n".join(self.texts)


@pytest.fixture(scope="module")
def walked(tmp_path_factory):
    """All cases in one invocation, computed with a small network, and what the page says first once they are stored."""
    root = tmp_path_factory.mktemp("data")
    parts = {name: write(root / "mvtec/my_part") if name == "my_part" else root / "mvtec" / name for name in NOTES}
    for name, gone in {
        "no_masks": ("ground_truth",),
        "no_good": ("test/good",),
        "no_test": ("test", "ground_truth"),
    }.items():
        copytree(parts["my_part"], parts[name])
        for folder in gone:
            rmtree(parts[name] / folder)
    copytree(parts["no_test"], parts["one_image"])
    save(parts["one_image"] / "test/unknown/000", 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("EXPVAE_MODE", raising=False)
        for name, folder in {"DATA": root, "RUNS": root / "runs", "CACHE": root / "cache"}.items():
            patch.setenv(f"EXPVAE_{name}", str(folder))
        patch.setattr(mvtec, "load", partial(mvtec.load, size=SIDE))
        patch.setattr(mvtec_job, "network", lambda *_: (Small, "random, fine-tuned", ""))
        patch.setitem(probes.VAES, "Small", lambda latents: Small())
        for drawn in ("image_rows", "intervals", "curves"):
            patch.setattr(figures, drawn, lambda *_, **__: Figure(figsize=(1, 1)))
        patch.setattr(measures, "RESAMPLES", 100)
        patch.setattr(measures, "PRESETS", ("liu2020_code",))
        patch.setattr(defects, "CASES", ((("liu2020_code",), names.LAYERS[3:4], 1.0),))
        chapter = Chapter(patch)
        given = {
            "categories": ",".join(NOTES),
            "epochs": 1,
            "initial": "random",
            "device": "cpu",
            "precision": "float32",
        }
        first = chapter.run(**given)
        chapter.texts = []
        page.in_short("mvtec15", chapter.names["found"], chapter.names["layer"], chapter.names["preset"])
        second = "\n".join(chapter.texts)
    return chapter, first, second


def test_what_there_is_of_a_part_is_measured_and_what_is_not_has_a_word(walked):
    chapter, first, second = walked
    found = {name: job.run for name, job in chapter.names["jobs"].items()}
    measured = {name: {row["metric"] for row in run.record["metrics"]} for name, run in found.items()}
    assert {name for name, metrics in measured.items() if names.AUROC in metrics} == {"my_part", "no_good"}
    assert {name for name, metrics in measured.items() if names.IMAGE_AUROC in metrics} == {"my_part", "no_masks"}
    for name, note in NOTES.items():
        assert " ".join(found[name].card.note.splitlines()) == f"{OWN} {note}"
        title = names.plain(name).capitalize()
        assert f"> **{title}.** {OWN} {note} No published number compares with it, and no claim counts it." in first
        (short,) = [text for text in second.splitlines() if text.startswith(f"**In short.** {title}, by the rule")]
        assert f"{OWN} {note} No published number compares with them" in short
        assert ("the AUROC of pixels is **" in short) == (names.AUROC in measured[name])
        assert ("the AUROC of whole images (by the map's maximum) is **" in short) == (
            names.IMAGE_AUROC in measured[name]
        )
        assert ("nothing could be measured" in short) == (name in ("no_test", "one_image"))
    # Nothing is asked for that claims alone ask for.
    assert not {names.CHANGE, names.KEPT_RANKS} & measured["my_part"]
    assert not any(array.startswith(("course/", "judged/", "compared/")) for array in found["my_part"].arrays)


def test_no_table_stands_empty_under_its_caption(walked, monkeypatch):
    chapter = Chapter(monkeypatch)
    found = walked[0].names["found"]
    page.methods({name: found[name] for name in ("no_test", "one_image")})
    assert chapter.texts == [page.NO_PIXELS.data]
    page.methods({"no_masks": found["no_masks"]})
    assert "AUROC of whole images" in chapter.texts[-1]


def test_maps_are_kept_also_where_there_is_nothing_to_measure_them_by(walked):
    chapter, *_ = walked
    kept = {
        name: job.run.arrays.get("trained/layer2.1.conv1, liu2020_code") for name, job in chapter.names["jobs"].items()
    }
    assert {name: len(map_BHW) for name, map_BHW in kept.items() if map_BHW is not None} == {
        "my_part": 3, "no_masks": 4, "no_good": 3, "one_image": 1
    }  # fmt: skip
    thresholds = {name for name, job in chapter.names["jobs"].items() if "thresholds" in job.run.arrays}
    assert thresholds == {"my_part", "no_good"}


def test_an_image_without_a_mask_is_not_drawn_as_one_with_an_empty_mask(part):
    loaded = mvtec.load("my_part", size=SIDE)
    assert mvtec_job.shown(loaded) == [2, 3, 4]
    assert set(mvtec_job.pictures(loaded)) == {"image", "mask"}
    assert set(mvtec_job.pictures(loaded, [4, 5])) == {"image"}
    rmtree(part / "ground_truth")
    unmasked = mvtec.load("my_part", size=SIDE)
    assert mvtec_job.shown(unmasked) == [2, 3, 4, 5]
    labels = [axis.get_ylabel() for axis in mvtec_job.strip(unmasked).axes if axis.get_ylabel()]
    assert labels == ["training", "test"]


def test_no_claim_and_no_published_number_sees_a_part(walked):
    chapter, first, _ = walked
    stored = [job.run for job in chapter.names["jobs"].values()]
    reported = publications.read()
    assert matching.comparable(stored) == []
    assert claims.verdicts(stored, reported).equals(claims.verdicts([], reported))
    table = tables.results("R2", chapter.names["found"]).set_index("Category")
    assert table.index.tolist() == [names.plain(name) for name in NOTES]  # and no mean beside the published ones
    assert not table[[column for column in table if "Liu" in column or "Report" in column]].to_numpy().any()
    assert "The images of this page are a user's own: no published number compares with theirs." in first
    assert not re.search(r"\bnan\b", first)


def test_controls_measure_pixels_and_say_where_there_are_none(part, monkeypatch):
    wanted = {"dataset": "mvtec", "category": "my_part", "data": "auto"}
    monkeypatch.setattr(controls.imagenet, "load", lambda: None)
    assert controls.subject(wanted).measured_N.tolist() == [True] * 5 + [False]
    rmtree(part / "ground_truth")
    with pytest.raises(ValueError, match=r"^category='my_part' has no masks of defects, and this chapter measures pix"):
        controls.subject(wanted)
