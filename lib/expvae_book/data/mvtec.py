"""MVTec AD: photographs of one category in the official layout, or generated workpieces where they are absent.

Any other folder in that layout is a category too: a user's own images.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

import expvae_book.data
from expvae_book.data import catalogue, images
from expvae_book.data.card import (
    IMAGES,
    USERS,
    DataCard,
    categories,
    is_category,
    kind_of,
    listed,
    notes_in,
    survey,
    takes_sample,
)
from expvae_book.data.card import available as available
from expvae_book.data.generated import workpieces

OFFICIAL = catalogue.MVTEC_OFFICIAL  # by category and split
CATEGORIES = tuple(OFFICIAL)
TEXTURES = ("carpet", "grid", "leather", "tile", "wood")  # the other ten show objects
SAMPLE_NOTE = (
    "Not MVTec AD: drawn stand-ins that are only named after the category, with planted defects. The masks are exactly "
    "the pixels that a defect changed."
)


@dataclass(frozen=True)
class Category:
    """One category in memory: square RGB images in the order of their folders and within a folder of their names.

    Attributes:
        name: One of `CATEGORIES`, or the name of a user's folder.
        train_NCYX: Training images, all normal.
        test_NCYX: Test images; there may be none.
        test_defect: For each test image "good" where it is normal, otherwise the name of its defect.
        test_mask: For each test image its anomalous pixels, in the same size: all False where it is normal, None
            where it is defective and has no mask.
        card: What they are. Its counts are images and masks.
    """

    name: str
    train_NCYX: UInt8[Tensor, "train 3 size size"]
    test_NCYX: UInt8[Tensor, "test 3 size size"]
    test_defect: list[str]
    test_mask: list[Bool[Tensor, "size size"] | None]
    card: DataCard

    @property
    def masked(self) -> bool:
        """Whether a mask marks an anomaly."""
        return any(mask_YX is not None and bool(mask_YX.any()) for mask_YX in self.test_mask)

    @property
    def credit(self) -> str:
        """Whose images these are."""
        return f"{self.card.credit} {self.card.mark}".strip()


def load(category: str, data: str = "auto", root: Path | str | None = None, size: int = 256) -> Category:
    """Load one category from `ROOT/mvtec/<category>`, or the generated sample of one of MVTec AD's.

    Training images lie in train/good, test images in test/good and test/<defect>, masks in ground_truth/<defect>
    under the name of their image followed by `_mask`. Images and masks may have any size and any format of
    `card.IMAGES`, which `images.read` reads as a viewer shows them. Images become RGB (grey ones by repeating the
    channel) and size x size, see `images.batch`.

    The anomalous pixels of a mask are those of `images.read_mask`: in lossless files every one above 0. The mask of a
    defect must have some. Normal images need no masks; those that lie in ground_truth/good must have none. Masks are
    resized to the pixel nearest to each centre; a defect that is so thin that none is left stays in, without anomalous
    pixels, which is said on the error stream.

    A category may lack masks, normal test images or all test images; the note of its card says what that rules out.
    The card is complete where all counts are official, all images and masks are PNG files as in the release and no
    NOTE.txt lies in `ROOT/mvtec`; it is re-encoded where the files alone are others.

    Of a user's own images there is no release to be complete of; their card says whose they are.

    Args:
        category: One of `CATEGORIES`, or the name of a folder beside theirs.
        data: "real" (the files), "sample" (generated images) or "auto" (the files where there are any).
        root: Data root; by default `expvae_book.data.root()`.
        size: Pixels along either side of an image and of its mask, 32 or more.

    Raises:
        FileNotFoundError: If there are no training images.
        ValueError: If an argument is none of these, an image is damaged or refused, or a mask does not fit its image
            or has none; the message names the file.
    """
    root = Path(root or expvae_book.data.root())
    if not is_category(category, root):
        raise ValueError(f"category must be one of {categories(root)}; got {category!r}")
    source, own = catalogue.source(f"mvtec/{category}"), category not in OFFICIAL
    if own and data == "sample":
        raise ValueError(
            f"data='sample' draws MVTec AD's categories only, and {category} is your own; give data='real'"
        )
    folder = root / source.folder
    train = images.files(folder / "train/good") if data != "sample" else []
    if takes_sample(
        data,
        source,
        root,
        folder / "train/good",
        present=folder.exists(),
        missing="" if train else "holds no images",
        stand_in="using a generated SAMPLE of drawn workpieces",
        remedy=f"put normal images there to train on ({', '.join(sorted(IMAGES))})" if own else "",
    ):
        return sample(category, size=size)
    by_defect = {defect.name: images.files(defect) for defect in _folders(folder / "test")}
    masks = _masks(folder / "ground_truth", by_defect)
    tests = [file for files in by_defect.values() for file in files]
    test = images.load(tests, masks, "RGB", size)
    for file, marked in zip(tests, test.marked, strict=True):
        normal = file.parent.name == "good"
        if normal and marked:
            raise ValueError(f"{masks[file]} marks anomalous pixels in {file}, which is a normal image")
        if not normal and marked is False:
            raise ValueError(f"{masks[file]} marks no pixel of the defect in {file}, which could not be measured so")
    defects = [file.parent.name for file in tests]
    empty_YX = torch.zeros(size, size, dtype=torch.bool)
    masks_of = zip(test.mask, defects, strict=True)
    return Category(
        name=category,
        train_NCYX=images.load(train, {}, "RGB", size).x_NCYX,
        test_NCYX=test.x_NCYX,
        test_defect=defects,
        test_mask=[empty_YX.clone() if mask_YX is None and kind == "good" else mask_YX for mask_YX, kind in masks_of],
        card=_card(source, root, [file for file in tests if file.parent.name != "good" and file not in masks]),
    )


def sample(category: str, seed: int = 0, size: int = 256) -> Category:
    """Draw workpieces that stand in for a category, some of the test images with a planted defect.

    They are drawn at 256x256 with exact masks and resized like the release. The digest of the card is that of the
    drawn images and masks, whatever becomes of them.

    Args:
        category: One of `CATEGORIES`.
        seed: Which drawings.
        size: As for `load`.

    Raises:
        ValueError: If category is unknown or size too small.
    """
    drawn = workpieces.draw(category, seed)
    arrays = (drawn.train_NYXC, drawn.test_NYXC, drawn.test_mask_NYX)
    good = sum(defect == "good" for defect in drawn.test_defect)
    defective = len(drawn.test_defect) - good
    card = DataCard(
        name=f"mvtec/{category}",
        kind="sample",
        counts={"train": len(drawn.train_NYXC), "test": good + defective, "masks": defective}
        | {"test good": good, "test defective": defective},
        official=dict(OFFICIAL[category]),
        digest=hashlib.sha256(b"".join(array.tobytes() for array in arrays)).hexdigest(),
        licence="MIT",
        credit="Generated workpieces, not MVTec AD (this book, MIT)",
        note=SAMPLE_NOTE,
    )
    train = ((Image.fromarray(x_YXC), None) for x_YXC in drawn.train_NYXC)
    test = zip(map(Image.fromarray, drawn.test_NYXC), drawn.test_mask_NYX, strict=True)
    train, test = (images.batch(pairs, "RGB", size) for pairs in (train, test))
    return Category(category, train.x_NCYX, test.x_NCYX, drawn.test_defect, test.mask, card)


def _card(source: catalogue.Source, root: Path, unmasked: list[Path]) -> DataCard:
    """What is at hand of a category, these defective images without masks among it, and what that rules out."""
    card = survey(source, root)
    official = OFFICIAL.get(source.name.removeprefix("mvtec/"), {})
    good = card.counts["test good"]
    defective = card.counts["test"] - good
    masks = defective - len(unmasked)
    counts = card.counts | {"test defective": defective}
    notes = (notes_in(root / catalogue.MVTEC.folder) if official else []) + ([card.note] if card.note else [])
    kind = kind_of(counts, official, "\n".join(notes), altered=bool(notes)) if official else USERS
    limits = [
        (
            "No test images: training only. Maps are made of the images in test/good and test/DEFECT.",
            not card.counts["test"],
        ),
        ("One test image: maps, but no measures.", card.counts["test"] == 1),
        ("No defective test images: nothing to detect.", not defective),
        ("No normal test images and no masks: no measures.", not good + masks),
        ("No normal test images: pixel measures only.", not good),
        ("No masks: image-level measures only.", not masks),
    ]
    notes += [limit for limit, holds in limits if holds][:1]
    if 0 < masks < defective:
        lacking = listed([f"{file.parent.name}/{file.name}" for file in unmasked])
        notes.append(f"{len(unmasked)} of {defective} defective images have no mask: {lacking}.")
    return replace(card, kind=kind, counts=counts, official=dict(official), note="\n".join(notes))


def _masks(folder: Path, tests: dict[str, list[Path]]) -> dict[Path, Path]:
    """The mask of each test image that has one."""
    masks = {}
    for defect in _folders(folder):
        masked = {f"{file.stem}_mask": file for file in tests.get(defect.name, [])}
        for mask in images.files(defect):
            if mask.stem not in masked:
                raise ValueError(f"{mask} is the mask of no test image (test/{defect.name}/NAME has NAME_mask)")
            masks[masked[mask.stem]] = mask
    return masks


def _folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("[!.]*") if path.is_dir())
