"""The data sets as plain data: addresses, checksums, licences, official counts, and what images of MVTec AD permit.

All checksums are SHA-256. They were published by, and compared between: MNIST, TensorFlow Datasets (archives) and a
copy whose MD5 sums are the published ones (files); UCSD and MVTec AD, anomalib; dSprites, two unrelated projects that
pin the file.

`python -m expvae_book.data.catalogue` prints which of them have files below the data root. It is for the Makefile,
before anything is installed: nothing is imported here that has to be.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from expvae_book import data, places


@dataclass(frozen=True)
class Download:
    """One file to download and what becomes of it.

    Attributes:
        urls: Mirrors, tried in turn.
        sha256: Checksum of the file as downloaded.
        target: The file that it becomes, relative to the source's folder; empty where it becomes the folder itself.
        inner: The folder inside a tar archive that becomes the target; empty for the whole archive.
    """

    urls: tuple[str, ...]
    sha256: str
    target: str = ""
    inner: str = ""


@dataclass(frozen=True)
class Source:
    """One data set.

    Attributes:
        name: As typed on the command line.
        title: As printed.
        home: Page of the data set.
        licence: Licence, as its authors or distributors state it.
        credit: One line for figure captions.
        folder: Where it lies below the data root.
        patterns: For each split, which files below the folder belong to it.
        official: For each split, the number of images in the release.
        checksums: SHA-256 of files below the folder, where the release is told by them.
        downloads: What to fetch.
        suffix: Of all image files of the release, where files in another format are told by it.
        parts: Folders below the folder in which the patterns are looked for.
    """

    name: str
    title: str
    home: str
    licence: str
    credit: str
    folder: str
    patterns: dict[str, str]
    official: dict[str, int]
    checksums: dict[str, str]
    downloads: tuple[Download, ...]
    suffix: str = ""
    parts: tuple[str, ...] = ("",)


def _mnist(file: str, sha256: str) -> Download:
    mirrors = (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        "https://storage.googleapis.com/cvdf-datasets/mnist/",
        "http://yann.lecun.com/exdb/mnist/",
    )
    return Download(tuple(f"{mirror}{file}.gz" for mirror in mirrors), sha256, target=f"raw/{file}")


MNIST = Source(
    name="mnist",
    title="MNIST",
    home="http://yann.lecun.com/exdb/mnist/",
    licence="CC BY-SA 3.0",
    credit="MNIST (LeCun, Cortes and Burges, CC BY-SA 3.0)",
    folder="MNIST",
    patterns={"train": "raw/train-images-idx3-ubyte", "test": "raw/t10k-images-idx3-ubyte"},
    official={"train": 60_000, "test": 10_000},
    checksums={
        "raw/train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "raw/train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "raw/t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "raw/t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    downloads=(
        _mnist("train-images-idx3-ubyte", "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        _mnist("train-labels-idx1-ubyte", "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        _mnist("t10k-images-idx3-ubyte", "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        _mnist("t10k-labels-idx1-ubyte", "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
    ),
)

UCSD = Source(
    name="ucsd",
    title="UCSD Ped1",
    home="http://www.svcl.ucsd.edu/projects/anomaly/dataset.htm",
    licence="none stated",
    credit="UCSD Anomaly Detection Dataset, Ped1 (Mahadevan et al. 2010)",
    folder="UCSD_Anomaly_Dataset.v1p2",
    patterns={
        "train": "UCSDped1/Train/Train[0-9][0-9][0-9]/*",
        "test": "UCSDped1/Test/Test[0-9][0-9][0-9]/*",
        "masks": "UCSDped1/Test/Test[0-9][0-9][0-9]_gt/*",
    },
    official={"train": 6_800, "test": 7_200, "masks": 2_000},
    checksums={},
    downloads=(
        Download(
            ("http://www.svcl.ucsd.edu/projects/anomaly/UCSD_Anomaly_Dataset.tar.gz",),
            "2329af326951f5097fdd114c50e853957d3e569493a49d22fc082a9fd791915b",
            inner="UCSD_Anomaly_Dataset.v1p2",
        ),
    ),
)

# Training images, normal and defective test images; every defective one has a mask (Bergmann et al. 2019, Table 1).
MVTEC_OFFICIAL = {
    category: {"train": train, "test": good + defective, "masks": defective}
    | {"test good": good, "test defective": defective}
    for category, train, good, defective in (
        ("bottle", 209, 20, 63),
        ("cable", 224, 58, 92),
        ("capsule", 219, 23, 109),
        ("carpet", 280, 28, 89),
        ("grid", 264, 21, 57),
        ("hazelnut", 391, 40, 70),
        ("leather", 245, 32, 92),
        ("metal_nut", 220, 22, 93),
        ("pill", 267, 26, 141),
        ("screw", 320, 41, 119),
        ("tile", 230, 33, 84),
        ("toothbrush", 60, 12, 30),
        ("transistor", 213, 60, 40),
        ("wood", 247, 19, 60),
        ("zipper", 240, 32, 119),
    )
}

MVTEC = Source(
    name="mvtec",
    title="MVTec AD",
    home="https://www.mvtec.com/company/research/datasets/mvtec-ad",
    licence="CC BY-NC-SA 4.0",
    credit="MVTec AD (Bergmann et al. 2019, CC BY-NC-SA 4.0)",
    folder="mvtec",
    patterns={"train": "train/good/*", "test": "test/*/*", "masks": "ground_truth/*/*"},
    official={"train": 3_629, "test": 1_725, "masks": 1_258},
    checksums={},
    downloads=(
        # MVTec moves its share links now and then; the older ones are kept in case it moves them back.
        Download(
            (
                "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/download/"
                "420938113-1629960298/mvtec_anomaly_detection.tar.xz",
                "https://www.mydrive.ch/shares/38536/3830184030e49fe74747669442f0f283/download/"
                "420938113-1629960298/mvtec_anomaly_detection.tar.xz",
                "https://www.mydrive.ch/shares/38536/3830184030e49fe74747669442f0f282/download/"
                "420938113-1629952094/mvtec_anomaly_detection.tar.xz",
            ),
            "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d",
        ),
    ),
    suffix=".png",
    parts=tuple(MVTEC_OFFICIAL),  # and no folder that a user has put beside them
)


@dataclass(frozen=True)
class Motif:
    """What the images of a category permit.

    Attributes:
        horizontal: Left and right may be exchanged.
        vertical: Top and bottom may be exchanged.
        reason: Why, or why not.
        fills: Whether the motif goes on beyond the frame. What a rotation turns in from outside is then the reflection
            of what is inside; otherwise the colours of the border go on, which are those of the background.
    """

    horizontal: bool
    vertical: bool
    reason: str
    fills: bool = False


MOTIFS = {
    "bottle": Motif(True, True, "seen from above, the mouth of a bottle is round"),
    "cable": Motif(False, False, "the order of its three cores would change, which is one of the defects"),
    "capsule": Motif(False, False, "it bears a print, which would be in mirror writing"),
    "carpet": Motif(True, True, "a woven texture that looks alike from all sides", fills=True),
    "grid": Motif(True, True, "a regular grid is its own mirror image", fills=True),
    "hazelnut": Motif(True, True, "a natural object that lies in any direction"),
    "leather": Motif(True, True, "a texture without direction", fills=True),
    "metal_nut": Motif(False, False, "its teeth have a sense of rotation; a flipped nut is one of the defects"),
    "pill": Motif(False, False, "it bears a print, which would be in mirror writing"),
    "screw": Motif(False, False, "its thread has a sense of rotation, which mirroring would reverse"),
    "tile": Motif(True, True, "a texture without direction", fills=True),
    "toothbrush": Motif(True, False, "left and right of the head are alike, top and bottom are not"),
    "transistor": Motif(
        True, False, "left and right are alike; its leads point down, and a wrong place is a defect", fills=True
    ),
    "wood": Motif(True, True, "its grain runs up and down, mirrored or not", fills=True),
    "zipper": Motif(True, True, "both tapes are alike, and the chain shows no slider", fills=True),
}
# Of a user's own images: a reflection fits a texture, and an object on a plain ground whose edge is that ground.
OWN_MOTIF = Motif(False, False, "nobody has said what your own images permit", fills=True)
OWN = re.compile(r"[\w+-][\w.+-]*", re.ASCII)  # what the name of a run's folder may hold
OWN_NOTE = "Not MVTec AD: the user's own images, in its layout."

IMAGENET_FILE = "weights/resnet18_imagenet.safetensors"  # below the data root; no data set, but put beside them

_DSPRITES_FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
_DSPRITES_SHA256 = "857dc001287e8efa226e0025fac6b29e5745c621b380b0d3363e4e33f4e28fa2"

DSPRITES = Source(
    name="dsprites",
    title="dSprites",
    home="https://github.com/google-deepmind/dsprites-dataset",
    licence="Apache 2.0",
    credit="dSprites (Matthey et al. 2017, Apache 2.0)",
    folder="",
    patterns={"all": _DSPRITES_FILE},
    official={"all": 737_280},
    checksums={_DSPRITES_FILE: _DSPRITES_SHA256},
    downloads=(
        Download(
            (
                f"https://raw.githubusercontent.com/google-deepmind/dsprites-dataset/master/{_DSPRITES_FILE}",
                f"https://github.com/google-deepmind/dsprites-dataset/raw/master/{_DSPRITES_FILE}",
            ),
            _DSPRITES_SHA256,
            target=_DSPRITES_FILE,
        ),
    ),
)

SOURCES = {source.name: source for source in (MNIST, UCSD, MVTEC, DSPRITES)}


def source(name: str) -> Source:
    """The source of this name: one of `SOURCES`, or a category, `mvtec/<category>`, as a source of its own.

    A category is one of MVTec AD's, or any other folder beside those: a user's own images, of which there is no release
    and so no official count, and nothing to download.

    Raises:
        ValueError: If there is none.
    """
    if name in SOURCES:
        return SOURCES[name]
    prefix, _, category = name.partition("/")
    if prefix != "mvtec" or not OWN.fullmatch(category):
        known = f"{', '.join(SOURCES)}, or mvtec/ and one of {', '.join(MVTEC_OFFICIAL)} or a folder of your own"
        raise ValueError(f"name must be one of {known}; got {name!r}")
    # No pattern tells every folder but good/: the defective images are the rest of the test images.
    whole = SOURCES["mvtec"]
    made = replace(
        whole,
        name=name,
        title=f"{whole.title} {category}",
        folder=f"{whole.folder}/{category}",
        patterns=whole.patterns | {"test good": "test/good/*"},
        parts=("",),
    )
    if category in MVTEC_OFFICIAL:
        counts = {split: MVTEC_OFFICIAL[category][split] for split in made.patterns}
        downloads = tuple(replace(download, inner=category) for download in whole.downloads)
        return replace(made, official=counts, downloads=downloads)
    own = {"title": category, "home": "", "licence": "their owner's", "credit": f"Images of {category}:"}
    return replace(made, **own, official={}, downloads=(), suffix="")


def motif(category: str) -> Motif:
    """What the images of a category permit.

    Raises:
        ValueError: If there is no such category.
    """
    source(f"mvtec/{category}")
    return MOTIFS.get(category, OWN_MOTIF)


def files(source: Source, root: Path, split: str) -> Iterator[Path]:
    """The files of a split of a data set below the root, whatever they are."""
    folders = (root / source.folder / part for part in source.parts)
    return (path for folder in folders for path in folder.glob(source.patterns[split]) if path.is_file())


def is_at_hand(source: Source, root: Path) -> bool:
    """Whether there is a file of a data set below the root; none is opened."""
    return any(True for split in source.patterns for _ in files(source, root, split))


def at_hand(root: Path) -> list[str]:
    """Names of the data sets of which there is a file below the root."""
    return [name for name, source in SOURCES.items() if is_at_hand(source, root)]


if __name__ == "__main__":
    try:
        print(*at_hand(data.root()))
    except places.SettingError as error:
        sys.exit(f"{error}.")
