"""MVTec AD: photographs of one category in the official layout, or generated workpieces where they are absent."""

import hashlib
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from PIL import Image
from torch import Tensor

import expvae_book.data
from expvae_book.data import catalogue, images, workpieces
from expvae_book.data.card import IMAGES, DataCard, listed, survey, there

DATA = ("auto", "real", "sample")
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
        name: One of `CATEGORIES`.
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


def load(category: str, data: str = "auto", root: Path | None = None, size: int = 256) -> Category:
    """Load one category from `ROOT/mvtec/<category>`, or its generated sample.

    Training images lie in train/good, test images in test/good and test/<defect>, masks in ground_truth/<defect>
    under the name of their image followed by `_mask`. Images and masks may have any size and any format of
    `card.IMAGES`, which `images.read` reads as a viewer shows them. Images become RGB (grey ones by repeating the
    channel) and size x size by Pillow's bilinear interpolation, which widens its triangle to the scale when it shrinks
    an image (what torchvision's Resize does by default); an image of that size stays as it is.

    The anomalous pixels of a mask are those of `images.read_mask`: in lossless files every one above 0. The mask of a
    defect must have some. Normal images need no masks; those that lie in ground_truth/good must have none. Masks are
    resized to the pixel nearest to each centre; a defect that is so thin that none is left stays in, without anomalous
    pixels, which is said on the error stream.

    A category may lack masks, normal test images or all test images; the note of its card says what that rules out.
    The card is complete where all counts are official, all images and masks are PNG files as in the release and no
    NOTE.txt lies in `ROOT/mvtec`.

    Args:
        category: One of `CATEGORIES`.
        data: "real" (the files), "sample" (generated images) or "auto" (the files where there are any).
        root: Data root; by default `expvae_book.data.root()`.
        size: Pixels along either side of an image and of its mask, 32 or more.

    Raises:
        FileNotFoundError: If there are no training images.
        ValueError: If an argument is none of these, an image is damaged or refused, or a mask does not fit its image
            or has none; the message names the file.
    """
    if data not in DATA:
        raise ValueError(f"data must be one of {', '.join(DATA)}; got {data!r}")
    _check(category, size)
    if data == "sample":
        return sample(category, size=size)
    root = Path(root or expvae_book.data.root())
    folder = root / catalogue.mvtec_category(category).folder
    command = f"python -m expvae_book.data fetch mvtec --categories {category} --root {shlex.quote(str(root))}"
    if data == "auto" and not folder.exists():
        # To the error stream: notebooks show it on a coloured ground, between code and results.
        print(
            f"MVTec AD {category} is not in {folder}{there(folder, root)}: using a generated SAMPLE of drawn "
            f"workpieces instead, and marking every result. `{command}` fetches MVTec AD {category}.",
            file=sys.stderr,
        )
        return sample(category, size=size)
    train = folder / "train/good"
    if not _images(train):
        raise FileNotFoundError(f"{train} holds no images{there(train, root)}; `{command}` fetches MVTec AD {category}")
    return _real(category, folder, root, size)


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
    _check(category, size)
    drawn = workpieces.draw(category, seed)
    digest = hashlib.sha256()
    for array in (drawn.train_NYXC, drawn.test_NYXC, drawn.test_mask_NYX):
        digest.update(array.tobytes())
    good = sum(defect == "good" for defect in drawn.test_defect)
    defective = len(drawn.test_defect) - good
    card = DataCard(
        name=catalogue.mvtec_category(category).name,
        kind="sample",
        counts={"train": len(drawn.train_NYXC), "test": good + defective, "masks": defective}
        | {"test good": good, "test defective": defective},
        official=dict(OFFICIAL[category]),
        digest=digest.hexdigest(),
        licence="MIT",
        credit="Generated workpieces, not MVTec AD (this book, MIT)",
        note=SAMPLE_NOTE,
    )
    return Category(
        name=category,
        train_NCYX=_stack([_resize(Image.fromarray(x_YXC), size) for x_YXC in drawn.train_NYXC], size),
        test_NCYX=_stack([_resize(Image.fromarray(x_YXC), size) for x_YXC in drawn.test_NYXC], size),
        test_defect=list(drawn.test_defect),
        test_mask=[_resize_mask(mask_YX, size) for mask_YX in drawn.test_mask_NYX],
        card=card,
    )


def available(root: Path | None = None) -> list[str]:
    """The categories of which there are training images, in alphabetical order.

    Args:
        root: Data root; by default `expvae_book.data.root()`.
    """
    folder = Path(root or expvae_book.data.root()) / catalogue.MVTEC.folder
    return [name for name in CATEGORIES if any(map(_is_image, (folder / name / "train/good").glob("*")))]


def _real(category: str, folder: Path, root: Path, size: int) -> Category:
    tests = {defect: _images(folder / "test" / defect) for defect in _folders(folder / "test")}
    masks = _masks(folder / "ground_truth", tests)
    masked = sum(file.parent.name != "good" for file in masks)
    test_images, test_mask, lost = [], [], []
    for defect, files in tests.items():
        for file in files:
            image = images.read(file, "RGB")
            test_images.append(_resize(image, size))
            mask_YX = _resize_mask(_mask(masks[file], file, image), size) if file in masks else None
            test_mask.append(torch.zeros(size, size, dtype=torch.bool) if defect == "good" else mask_YX)
            if defect != "good" and mask_YX is not None and not mask_YX.any():
                lost.append(f"{defect}/{masks[file].name}")
    if lost:
        print(
            f"At {size}x{size} pixels nothing is left of the defects in {len(lost)} of {masked} masks of {category}, "
            f"which pixel measures take for normal: {listed(lost)}.",
            file=sys.stderr,
        )
    return Category(
        name=category,
        train_NCYX=_stack([_resize(images.read(file, "RGB"), size) for file in _images(folder / "train/good")], size),
        test_NCYX=_stack(test_images, size),
        test_defect=[defect for defect, files in tests.items() for _ in files],
        test_mask=test_mask,
        card=_card(category, root, masked),
    )


def _card(category: str, root: Path, masks: int) -> DataCard:
    """What is at hand of a category, this many masks of defects among it, and what that rules out."""
    source = catalogue.mvtec_category(category)
    card = survey(source, root)
    counts = card.counts | {"test defective": card.counts["test"] - card.counts["test good"]}
    good, defective = counts["test good"], counts["test defective"]
    note_file = root / catalogue.MVTEC.folder / "NOTE.txt"
    notes = [note_file.read_text(encoding="utf-8").strip()] if note_file.is_file() else []
    notes += [card.note] if card.note else []
    encoded = []
    for what, patterns in (("images", ("train", "test")), ("masks", ("masks",))):
        files = (file for split in patterns for file in (root / source.folder).glob(source.patterns[split]))
        formats = {file.suffix.lower() for file in files if _is_image(file)} - {".png"}
        if formats:
            others = ", ".join(sorted(formats))
            encoded.append(f"The {what} are re-encoded: the release holds PNG files, these are {others}.")
    complete = card.kind == "complete" and not encoded and not notes
    notes += encoded
    if not good + defective:
        notes.append("No test images: training only.")
    elif not defective:
        notes.append("No defective test images: nothing to detect.")
    elif not good and not masks:
        notes.append("No normal test images and no masks: no measures.")
    elif not good:
        notes.append("No normal test images: pixel measures only.")
    elif not masks:
        notes.append("No masks: image-level measures only.")
    if 0 < masks < defective:
        notes.append(f"{defective - masks} of {defective} defective images have no mask.")
    return replace(
        card,
        kind="complete" if complete else "partial",
        counts=counts,
        official=dict(OFFICIAL[category]),
        note="\n".join(notes),
    )


def _masks(folder: Path, tests: dict[str, list[Path]]) -> dict[Path, Path]:
    """The mask of each test image that has one."""
    masks = {}
    for defect in _folders(folder):
        masked = {f"{file.stem}_mask": file for file in tests.get(defect, [])}
        for mask in _images(folder / defect):
            if mask.stem not in masked:
                raise ValueError(f"{mask} is the mask of no test image (test/{defect}/NAME has NAME_mask)")
            masks[masked[mask.stem]] = mask
    return masks


def _folders(folder: Path) -> list[str]:
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _images(folder: Path) -> list[Path]:
    """The images of a folder in the order of their names; none where there is no folder."""
    if not folder.is_dir():
        return []
    files = sorted(filter(_is_image, folder.iterdir()), key=lambda file: file.name)
    stems = {}
    for file in files:
        # A copy in another format would count twice, and its mask belong to two.
        if stems.setdefault(file.stem, file) != file:
            raise ValueError(f"{folder} holds the image {file.stem} twice: {stems[file.stem].name} and {file.name}")
    return files


def _is_image(file: Path) -> bool:
    # Copies made on other systems hold AppleDouble files (._000.png).
    return file.suffix.lower() in IMAGES and not file.name.startswith(".") and file.is_file()


def _stack(images: list[UInt8[np.ndarray, "{size} {size} 3"]], size: int) -> UInt8[Tensor, "n 3 {size} {size}"]:
    images_NCYX = torch.empty(len(images), 3, size, size, dtype=torch.uint8)
    for image_CYX, image_YXC in zip(images_NCYX, images, strict=True):
        image_CYX.copy_(torch.from_numpy(image_YXC).permute(2, 0, 1))
    return images_NCYX


def _resize(image: Image.Image, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    return np.array(image.resize((size, size), Image.Resampling.BILINEAR))


def _mask(file: Path, image_file: Path, image: Image.Image) -> Bool[np.ndarray, "y x"]:
    """The anomalous pixels of an image, checked against it."""
    mask_YX = images.read_mask(file)
    height, width = mask_YX.shape
    if (width, height) != image.size:
        raise ValueError(f"{file} has {width}x{height} pixels for the {image.width}x{image.height} of {image_file}")
    normal = image_file.parent.name == "good"
    if normal and mask_YX.any():
        raise ValueError(f"{file} marks anomalous pixels in {image_file}, which is a normal image")
    if not normal and not mask_YX.any():
        raise ValueError(f"{file} marks no pixel of the defect in {image_file}, which could not be measured so")
    return mask_YX


def _resize_mask(mask_YX: Bool[np.ndarray, "y x"], size: int) -> Bool[Tensor, "{size} {size}"]:
    mask = Image.fromarray(np.where(mask_YX, 255, 0).astype(np.uint8))
    return torch.from_numpy(np.array(mask.resize((size, size), Image.Resampling.NEAREST)) > 0)


def _check(category: str, size: int) -> None:
    if category not in CATEGORIES:
        raise ValueError(f"category must be one of {', '.join(CATEGORIES)}; got {category!r}")
    if not isinstance(size, int) or size < 32:
        raise ValueError(f"size must be a whole number of pixels, 32 or more; got {size!r}")
