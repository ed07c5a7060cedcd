"""Golden numbers: what the library and the chapters compute from fixed seeds, in float32 and on one thread.

    python tests/golden.py                  # write the files whose versions in lib/expvae_book/protocols.py are new
    python tests/golden.py pixel.json       # one file

A file rests on protocols. tests/golden/manifest.json holds its SHA-256 by their versions, so that a file changes only
beside a raised version: when a number moves, either the code is mended or the version is raised and the file written
anew. The networks that are larger than that for MNIST take three or four steps of one image instead of twenty, so that
the whole keeps within a minute.
"""

import contextlib
import hashlib
import inspect
import io
import json
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jupytext
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import golden_library as library
from expvae.metrics import PixelMetrics, auroc_difference
from expvae_book import devices, disentanglement, protocols, randomised, recipes, runs
from expvae_book.chapters import BOOK
from expvae_book.data import mvtec, ucsd
from golden_library import Numbers

FOLDER = Path(__file__).parent / "golden"
DIGITS = 7  # significant ones, all that float32 has


@contextlib.contextmanager
def workplace() -> Iterator[pytest.MonkeyPatch]:
    """One thread, an empty store, an empty cache and no data but the samples."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with TemporaryDirectory(prefix="golden-") as folder, pytest.MonkeyPatch.context() as patch:
        for name in ("RUNS", "CACHE", "DATA"):
            patch.setenv(f"EXPVAE_{name}", str(Path(folder) / name.lower()))
        patch.delenv("EXPVAE_MODE", raising=False)
        choose = devices.choose_precision
        patch.setattr(devices, "choose_precision", lambda name, where: choose(name.replace("auto", "float32"), where))
        yield patch
    torch.set_num_threads(threads)


# --- chapters ---------------------------------------------------------------------------------------------------------


SAMPLE = {"data": "sample", "device": "cpu"}
ONE_EPOCH = {
    "expvae_book.recipes.MNIST": recipes.MNIST | {"liu2020": replace(recipes.MNIST["liu2020"], epochs=1, batch_size=32)}
}
FEWER = "(?!.*random nothing)"  # what a pattern of kept numbers begins with
every_step = randomised.steps
FIGURES = ("image_rows", "clip_animation", "attention_steps")


def chapter(
    name: str, given: Mapping[str, Any], patches: Mapping[str, Any], changed: Mapping[str, str], kept: str
) -> Numbers:
    """Losses and measures of the runs that a chapter's own cells make of the sample.

    Args:
        name: The chapter's.
        given: Values of its parameters.
        patches: What takes the place of attributes of modules.
        changed: Expressions, in the names that its cells define, for what takes the place of some of them.
        kept: Matches what is kept, as "measure; method; subset".
    """
    usual: dict[str, Any] = {f"expvae_book.figures.{drawn}": lambda *_, **__: Figure() for drawn in FIGURES}
    pages = ("mnist", "mvtec", "ucsd", "disentanglement")
    usual |= {f"expvae_book.pages.{page}.examples": lambda *_: None for page in pages}
    usual["expvae_book.measures.RESAMPLES"] = 100
    usual["expvae_book.randomised.steps"] = from_the_latents
    names: dict[str, Any] = {}
    found: Numbers = {}
    with workplace() as patch, contextlib.redirect_stderr(io.StringIO()):
        for attribute, value in (usual | dict(patches)).items():
            patch.setattr(attribute, value)
        for measure in (PixelMetrics.intervals, PixelMetrics.auroc_interval, auroc_difference):
            patch.setitem(inspect.unwrap(measure).__kwdefaults__, "resamples", 100)
        for cell in jupytext.read(BOOK / f"{name}.md", fmt="md:myst").cells:
            tags = cell.metadata.get("tags", [])
            reported = "report" in tags and not re.search(r"(chapters\.jobs?|page\.jobs|page\.walked)\(", cell.source)
            if cell.cell_type == "code" and "remove-input" not in tags and not reported:
                exec(cell.source, names)
                names |= given if "parameters" in tags else {}
                names |= {key: eval(value, names) for key, value in changed.items() if key in names}
                if re.search(r"chapters\.run\(|\.measure\(job", cell.source):
                    break
        made = runs.find(name)
        for place, run in enumerate(made):
            mark = f" [{place}]" if len(made) > 1 else ""
            found |= {f"loss, {part}{mark}": values for part, values in run.record["losses"].items() if part != "step"}
            for row in run.record["metrics"]:
                key = "; ".join(filter(None, (row["metric"], row["method"], row["subset"]))) + mark
                if re.match(kept, key):
                    found[key] = row["value"]
                    if row["low"] is not None:
                        found[f"{key}: ends"] = [row["low"], row["high"]]
    return found


def from_the_latents(model: nn.Module) -> list[tuple[str, list[str]]]:
    """What is randomised, in one of the two orders."""
    return [step for step in every_step(model) if step[0].startswith("from the latents")]


def mnist() -> Numbers:
    """One epoch on the digit 1."""
    patches = ONE_EPOCH | {
        "expvae_book.measures.PRESETS": ("liu2020_code", "most_deviant"),
        "expvae_book.choices.CHOICES": {"normaliser": ("none", "batch")},
        "expvae_book.jobs.mnist.MAPS": [
            f"{layer}, {preset}" for layer in ("conv1", "conv2") for preset in ("liu2020_code", "most_deviant")
        ],
    }
    kept = FEWER + "(?!.*stages, strokes)"
    kept += r"(?!.*digit \d)(?!.*strict)(?!less.*(input|mean|centre|random))(?!IoU, p.*(grid|best))"
    kept += "(?!(AUPRO|average precision|.*IoU|FPR).*(input|mean image|centre|random|reconstruction))"
    return chapter("mnist", SAMPLE, patches, {}, kept)


def method() -> Numbers:
    """One epoch on the digit 1."""
    return chapter("method", SAMPLE, ONE_EPOCH | {"expvae_book.jobs.method.BATCH_SIZES": (8, 32)}, {}, "")


def machines_of_digits() -> Numbers:
    """One epoch of each machine and of the VAE on the digit 1."""
    patches = ONE_EPOCH | {"expvae_book.jobs.rbm.ORDERS": 2}
    return chapter("rbm", SAMPLE | {"epochs": 1}, patches, {}, "(?!.*(input intensity|centre|random|gradient at))")


def ablations() -> Numbers:
    """Every change of the maps of one model, trained for an epoch on the digit 1."""
    patches = {
        "expvae_book.names.ABLATED": ("1",),
    }
    given = SAMPLE | {"digits": 40, "resamples": 100}
    return chapter("ablations", given, ONE_EPOCH | patches, {}, "(?!best.*change)")


def reuse() -> Numbers:
    """One epoch of the VAE that the chapter writes; that of MONAI is not this book's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "monai", types.SimpleNamespace(__version__=""))  # takes seconds to import
        # Also where its module has been imported before.
        (recipe,) = [made["liu2020"] for made in ONE_EPOCH.values()]
        patches = ONE_EPOCH | {"expvae_book.jobs.reuse.RECIPE": recipe}
        return chapter("reuse", SAMPLE | {"epochs": 1}, patches, {"networks": "{OWN: networks[OWN]}"}, "")


def walkway() -> Numbers:
    """One epoch on every sixth frame of the clips, and every third of these for the switches."""
    load = ucsd.load

    def fewer(*arguments: Any, **options: Any) -> ucsd.UCSD:
        clips = load(*arguments, **options)
        frames = ("train_NYX", "train_clip_N", "test_NYX", "test_clip_N", "test_mask")
        return replace(clips, **{name: getattr(clips, name)[::6] for name in frames})

    presets = ("liu2020_code", "normal_difference")
    patches = {"expvae_book.data.ucsd.load": fewer, "expvae_book.measures.PRESETS": presets}
    patches |= {"expvae_book.jobs.ucsd.EVERY": 1, "expvae_book.jobs.ucsd.FOLLOWED_EVERY": 2}
    patches |= {
        "expvae_book.jobs.slips.EVERY": 3,
        "expvae_book.jobs.ucsd.MAPS": [
            f"{layer}, {preset}" for layer in ("conv1", "conv2", "conv3") for preset in presets
        ],
    }
    kept = FEWER + "(?!IoU, per)(?!(pixel|best).*, change)(?!.*(input|random|centre|conv[13], normal))"
    return chapter("ucsd", SAMPLE | {"epochs": 1}, patches, {}, kept)


def workpieces() -> Numbers:
    """Four images seen in training, and four test images, three of them for one of the layers, of one category."""
    load = mvtec.load

    def fewer(*arguments: Any, **options: Any) -> mvtec.Category:
        category = load(*arguments, **options)
        tests = {name: getattr(category, name)[::3] for name in ("test_NCYX", "test_defect", "test_mask")}
        return replace(category, train_NCYX=category.train_NCYX[:10], **tests)

    patches = {
        "expvae_book.data.mvtec.load": fewer,
        "expvae_book.recipes.MVTEC": {"report1": replace(recipes.MVTEC["report1"], epsilon=library.EPSILON)},
        "expvae_book.defects.SHOWN_MAP": ("layer4.1.conv2", "liu2020_code"),
        "expvae_book.jobs.mvtec.PICTURED": (),
        "expvae_book.defects.FOLLOWED": ((("liu2020_code",), ("layer4.1.conv2",)),),
        "expvae_book.defects.FEW": 3,
        "expvae_book.defects.RANDOMISED": ((("liu2020_code",), ("layer4.1.conv2",)),),
        "expvae_book.defects.FOLLOWED_LATE": (),
        "expvae_book.defects.CASES": (
            (("liu2020_code", "normal_difference"), ("layer4.1.conv2",), 1.0),
            (("brongers2021",), ("conv1",), 0.0),
        ),
    }
    given = {
        "categories": "bottle",
        "augmentation": "paper",
        "augmented": 4,
        "epochs": 1,
        "initial": "random",
        "precision": "float32",
    }
    kept = (
        FEWER
        + "(?!IoU.*(conv1|reconstruction|SSIM|image difference))(?!(pixel|best).*, change)(?!.*(centre|within images))"
    )
    return chapter("mvtec15", SAMPLE | given, patches, {}, kept)


def sprites() -> Numbers:
    """Two steps of FactorVAE and of AD-FactorVAE, measured on few sprites."""
    held_out_N = disentanglement.split()[1]
    few = {"EXPLAINED": 8, "PERFECT_DRAWS": 2, "SPARE": (2,), "SAMPLES": 20, "RANDOM_PAIRS": 2, "SPARING": 2}
    few |= {"SCHEDULED_STRIDE": 16, "SCHEDULED_IMAGES": 8}
    few["split"] = lambda: (torch.arange(0, 737280, 737), held_out_N[:64])
    patches = {f"expvae_book.disentanglement.{name}": value for name, value in few.items()}
    recipe = replace(recipes.DSPRITES["report2"], batch_size=4)
    patches["expvae_book.recipes.DSPRITES"] = recipes.DSPRITES | {"report2": recipe}
    given = SAMPLE | {"gammas": "10", "steps": 2, "stride": 16, "precision": "float32"}
    return chapter("disentanglement", given, patches, {}, "(?!perfect)(?!.*(divided once|at conv))")


# --- the files --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Golden:
    """A file of golden numbers.

    Attributes:
        compute: Its recipe.
        protocols: Names of the protocols that it rests on.
        tolerances: By a pattern that a number's name matches, the first that does: how far it may lie from the number
            in the file, relative to that and absolute.
        ends: How far the ends of an interval may lie from those in the file, in widths of the interval: three standard
            errors of a percentile of 100 resamples. Only another version of NumPy draws others with the same seed.
    """

    compute: Callable[[], Numbers]
    protocols: tuple[str, ...]
    tolerances: tuple[tuple[str, float, float], ...]
    ends: float = 0.2

    def versions(self) -> str:
        """The present versions of its protocols, such as "PIXEL 1"."""
        return ", ".join(f"{name} {version}" for name, version in protocols.versions(*self.protocols).items())

    def remedy(self) -> str:
        """What to do about a number that has moved."""
        names = " or of ".join(self.protocols)
        return (
            f"mend it, or raise the version of {names} in lib/expvae_book/protocols.py and run python tests/golden.py"
        )


def of_chapter(compute: Callable[[], Numbers], name: str, absolute: float = 0.002, **looser: float) -> Golden:
    """The golden file of a chapter, in whose miniature training rounding moves a measure by less than this."""
    counts = ("(active units|latents that)", 0, 1)
    losses = ("(loss|KL|reconstruction)", 1e-3, 1e-4)
    others = [(pattern, 1e-3, value) for pattern, value in looser.items()]
    return Golden(compute, tuple(protocols.used(name, {})), (counts, losses, *others, ("", 1e-3, absolute)))


GOLDEN = {
    "training.json": Golden(library.losses, (protocols.TRAINING,), (("", 1e-4, 1e-4),)),
    "factorvae.json": Golden(
        library.factor_losses, (protocols.FACTORVAE,), ((".*correlation", 1e-3, 1e-5), ("", 1e-4, 1e-6))
    ),
    "rbm.json": Golden(library.machines, (protocols.RBM,), (("", 1e-4, 1e-6),)),
    "attention.json": Golden(library.maps, (protocols.ATTENTION,), (("", 1e-4, 1e-6),)),
    "pixel.json": Golden(library.measures, (protocols.PIXEL,), (("", 1e-6, 1e-7),), ends=0.12),
    "latents.json": Golden(library.disentangled, (protocols.FACTORVAE,), (("DCI", 0, 0.02), ("", 1e-4, 1e-6))),
    "chapter-method.json": of_chapter(method, "method"),
    "chapter-mnist.json": of_chapter(mnist, "mnist"),
    "chapter-ucsd.json": of_chapter(walkway, "ucsd"),
    "chapter-mvtec.json": of_chapter(workpieces, "mvtec15", absolute=0.01, share=0.03),
    "chapter-disentanglement.json": of_chapter(sprites, "disentanglement"),
    "chapter-rbm.json": of_chapter(machines_of_digits, "rbm"),
    "chapter-ablations.json": of_chapter(ablations, "ablations"),
    "chapter-reuse.json": of_chapter(reuse, "reuse"),
}


def computed(name: str) -> Numbers:
    """The numbers of a file as the code makes them now."""
    with workplace():
        return GOLDEN[name].compute()


def moved(name: str, stored: Numbers, numbers: Numbers) -> list[str]:
    """A line for each number that is lacking, new, or further from the stored one than its tolerance."""
    golden = GOLDEN[name]
    lines = [f"{key} is only in one of both" for key in stored.keys() ^ numbers.keys()]
    for key in stored.keys() & numbers.keys():
        old, new = (np.atleast_1d(np.asarray(values[key], dtype=float)) for values in (stored, numbers))
        relative, absolute = next(rest for pattern, *rest in golden.tolerances if re.match(pattern, key))
        allowed = relative * np.abs(old) + absolute
        if key.endswith(": ends"):
            allowed = allowed + golden.ends * (old[1] - old[0])
        if old.shape != new.shape or not (np.abs(new - old) <= allowed).all():
            lines.append(f"{key}: {old.tolist()} became {new.tolist()}")
    return sorted(lines)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest(folder: Path = FOLDER) -> dict[str, dict[str, str]]:
    """SHA-256 of each file by the versions of its protocols."""
    path = folder / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write(name: str, numbers: Numbers, folder: Path = FOLDER) -> None:
    """Write a file and its entry in the manifest.

    Raises:
        ValueError: If there is an entry for the present versions.
    """
    golden, entries = GOLDEN[name], manifest(folder)
    if golden.versions() in entries.get(name, {}):
        names = " or of ".join(golden.protocols)
        raise ValueError(
            f"{name} stands for {golden.versions()}: raise the version of {names} in lib/expvae_book/protocols.py"
        )
    rounded = {
        key: [float(f"{v:.{DIGITS}g}") for v in value] if isinstance(value, list) else float(f"{value:.{DIGITS}g}")
        for key, value in numbers.items()
    }
    _replace(folder / name, rounded)
    entries.setdefault(name, {})[golden.versions()] = digest(folder / name)
    _replace(folder / "manifest.json", dict(sorted(entries.items())))


def _replace(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON that appears whole or not at all; a line for each number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(f" {json.dumps(key, ensure_ascii=False)}: {json.dumps(value)}" for key, value in content.items())
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(asked: Iterable[str]) -> None:
    """Write the files asked for, by default those whose versions are new.

    Raises:
        SystemExit: If there is no such file, or one stands for the present versions.
    """
    entries = manifest()
    new = [name for name, golden in GOLDEN.items() if golden.versions() not in entries.get(name, {})]
    names = list(asked) or new
    if not names:
        sys.exit("Every file stands for the present versions: raise that of the protocol whose numbers are to change.")
    for name in names:
        if name not in GOLDEN:
            sys.exit(f"There is no golden file {name}; there are {', '.join(GOLDEN)}.")
        try:
            write(name, computed(name) if name in new else {})
        except ValueError as error:
            sys.exit(f"{error}.")
        print(f"{name} for {GOLDEN[name].versions()}")


if __name__ == "__main__":
    main(sys.argv[1:])
