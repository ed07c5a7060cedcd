"""The store of results: what was computed, with which parameters, by which code, on which data.

A run is a folder runs/<chapter>/<name=value,...>/ that holds

    record.json   parameters, what "auto" became, metrics, losses, budget, recipe, seconds, device, data card, commit,
                  versions of libraries, and versions of the protocols that it rests on (expvae_book.protocols)
    arrays.npz    the few maps and curves that the figures show (compressed; float16, float32 or integers)
    figures/      panels that show inputs, drawn when the run was computed

A run is written to a temporary folder that is renamed when it is whole. The one that it replaces is set aside before,
and the next reader puts it back if the writer was killed in between. To read, nothing need be written. The environment
variable EXPVAE_RUNS names another folder for the store.
"""

import json
import math
import os
import shutil
import struct
import time
import uuid
import zipfile
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import pandas as pd
from filelock import FileLock
from matplotlib.animation import Animation, PillowWriter
from matplotlib.figure import Figure

from expvae_book import places, protocols, provenance
from expvae_book.data import root as data_root
from expvae_book.data.card import DataCard, survey
from expvae_book.data.catalogue import source
from expvae_book.files import not_written, replacing
from expvae_book.recipes import RBMRecipe, Recipe, StepRecipe

if TYPE_CHECKING:
    from expvae_book.probes import Probe

T = TypeVar("T")
FRAMES_PER_SECOND = 4
TOLERANCE = 1e-3  # of the greatest number of a probe: what another processor or device may change
METRIC_COLUMNS = ["metric", "method", "subset", "value", "low", "high", "n"]

# What "auto" may become and then stands in the record and its folder's name; the first is taken before the second.
ALTERNATIVES = {"data": ("real", "sample"), "initial": ("imagenet", "random")}
# Tell runs apart only where they were given, so that a run that left them to "auto" answers on any machine.
WHERE_GIVEN = ("precision", "device")


@dataclass(frozen=True)
class Run:
    """A stored result.

    Attributes:
        chapter: Name of the chapter that computed it.
        parameters: What it was computed with.
        record: The content of record.json.
        folder: Where it is stored.
    """

    chapter: str
    parameters: dict[str, Any]
    record: dict[str, Any]
    folder: Path

    @cached_property
    def metrics(self) -> pd.DataFrame:
        """One row per number: metric, method, subset, value, 95 % interval (low, high) and sample size n."""
        return pd.DataFrame(self.record["metrics"], columns=METRIC_COLUMNS)

    @cached_property
    def arrays(self) -> dict[str, np.ndarray]:
        """Maps and curves, by name.

        Raises:
            ValueError: If their file is damaged; the message names it.
        """
        return _whole(self.folder, _arrays)

    @property
    def card(self) -> DataCard:
        """The card of the data that the run used."""
        return DataCard.from_dict(self.record["data"])

    @property
    def label(self) -> str:
        """The run in one line: chapter, parameters and commit."""
        name = _folder_name(self.parameters).replace(",", ", ")
        return f"{self.chapter}: {name} ({_commit(self.record['git'])})"

    @property
    def caption(self) -> str:
        """What a figure or a table says of the run that made it: label, data, budget, device and state."""
        card, budget = self.card, self.record["budget"]
        # Not added up: masks and clips are no images.
        data = [f"{count:,} {part}" for part, count in card.counts.items()]
        data += [f"{card.mark} data"] if card.mark else []
        return (
            f"Run {self.label}; data: {card.name} ({', '.join(data)}); "
            f"{budget['used']} of {budget['asked']} {budget['unit']}; {self.record['device']}; {self.state}."
        )

    @cached_property
    def outdated(self) -> list[str]:
        """The protocols that have another version now than when the run was made, such as "PIXEL 1, now 2"."""
        then = self.record["protocols"]
        return [
            f"{name} {version}, now {protocols.VERSIONS.get(name, 'gone')}"
            for name, version in sorted(then.items())
            if protocols.VERSIONS.get(name) != version
        ]

    @property
    def differs(self) -> bool:
        """Whether the code that last verified it gave something else than is stored."""
        return "verified" in self.record and self.record["verified"]["difference"] > TOLERANCE

    @property
    def state(self) -> str:
        """Whether today's code gives what is stored: verified, unverified, outdated or differs."""
        verified = self.record.get("verified")
        if self.outdated:
            return f"outdated ({'; '.join(self.outdated)})"
        if verified is None or verified["protocols"] != self.record["protocols"]:
            return "unverified"
        if self.differs:
            return f"differs by {verified['difference']:.1%}"
        return f"verified at {_commit(verified['git'])}, {verified['date']}"

    @cached_property
    def of_data_at_hand(self) -> bool:
        """Whether it was made from the data that are at hand; true where there are none, or it needed none."""
        return self.card.generated or _data_digest(self.card.name) in (None, self.card.digest)

    def figure(self, name: str) -> Path:
        """Path of a stored figure, a PNG, or of a stored animation, a GIF.

        Raises:
            FileNotFoundError: If the run has no such figure; the message lists those it has.
        """
        there = {path.stem: path for path in sorted((self.folder / "figures").glob("*.*"))}
        if name not in there:
            raise FileNotFoundError(
                f"the run {self.label} has no figure {name!r}; it has: {', '.join(there) or 'none'}"
            )
        return there[name]

    def metric(self, metric: str, method: str = "", subset: str = "") -> dict[str, Any]:
        """The row of one number, as a dict with value, low, high and n.

        Raises:
            KeyError: If the run does not have it.
        """
        for row in self.record["metrics"]:
            if (row["metric"], row["method"], row["subset"]) == (metric, method, subset):
                return row
        raise KeyError(f"the run {self.label} has no metric {metric!r} of {method!r} on {subset!r}")

    def rows(self, metric: str) -> pd.DataFrame:
        """All rows of one metric.

        Raises:
            KeyError: If the run has none.
        """
        found = self.metrics[self.metrics["metric"] == metric]
        if found.empty:
            raise KeyError(f"the run {self.label} has no metric {metric!r}")
        return found

    def text(
        self, metric: str, method: str = "", subset: str = "", form: str = ".3f", lacking: str | None = None
    ) -> str:
        """One number as text, such as "0.812 [0.780, 0.840]"; the interval only where there is one.

        Args:
            metric: The metric.
            method: Its method.
            subset: Its subset.
            form: How each number is written.
            lacking: What to return if the run does not have the number; None for an error.

        Raises:
            KeyError: If the run does not have it, or has a row without a value, and `lacking` is None.
        """
        try:
            row = self.metric(metric, method, subset)
            if row["value"] is None:
                raise KeyError(f"the run {self.label} has no value for {metric!r} of {method!r} on {subset!r}")
        except KeyError:
            if lacking is None:
                raise
            return lacking
        interval = "" if row["low"] is None else f" [{row['low']:{form}}, {row['high']:{form}}]"
        return f"{row['value']:{form}}{interval}"


def row(
    metric: str, value: float | int | None, method: str = "", subset: str = "", **interval: float | int | None
) -> dict:
    """One row of a run's metrics; `interval` may give low, high and n."""
    return {
        "metric": metric,
        "method": method,
        "subset": subset,
        "value": value,
        "low": None,
        "high": None,
        "n": None,
    } | (interval)


def order(row: Mapping[str, Any], other: Mapping[str, Any] | float) -> str:
    """How the interval of a row lies to that of another row, or to a number such as 0.5.

    Args:
        row: A row with low and high, as `Run.metric` gives it.
        other: Another such row, or a number.

    Returns:
        "above" or "below" where the intervals are apart, otherwise "not told apart from".

    Raises:
        ValueError: If a row has no interval.
    """
    if row["low"] is None or (isinstance(other, Mapping) and other["low"] is None):
        raise ValueError(f"order compares intervals, and one of these rows has none: {row}, {other}")
    low, high = (other["low"], other["high"]) if isinstance(other, Mapping) else (other, other)
    if row["low"] > high:
        return "above"
    return "below" if row["high"] < low else "not told apart from"


def reading() -> bool:
    """Whether stored runs are only to be read, as while Jupyter Book renders (EXPVAE_MODE is "read")."""
    return os.environ.get("EXPVAE_MODE") == "read"


def root() -> Path:
    """The folder of the store: EXPVAE_RUNS, or runs/ in the repository."""
    return places.folder(places.setting("EXPVAE_RUNS", "runs"), "EXPVAE_RUNS")


def find(chapter: str | None = None, **parameters: Any) -> list[Run]:
    """All stored runs, of one chapter or of all, that have the parameters given; ordered by their folders."""
    folders = (path.parent for path in root().glob(f"{chapter or '*'}/*/record.json"))
    of_runs = {folder.with_name(folder.name.removeprefix(_ASIDE)) for folder in folders}
    runs = [_read(folder) for folder in sorted(of_runs) if not folder.name.startswith(".")]
    return [run for run in runs if run is not None and parameters.items() <= run.parameters.items()]


def load(chapter: str, parameters: Mapping[str, Any]) -> Run | None:
    """The stored run of a chapter with these parameters, or None.

    With data="auto" that is the run on real data where there is one, otherwise the run on the embedded sample, and
    with initial="auto" the one from ImageNet's weights before the one from random ones. A precision or device is looked
    at unless it is "auto".
    """
    wanted = _determining(parameters)
    left = [name for name in ALTERNATIVES if wanted.get(name) == "auto"]
    for choice in product(*(ALTERNATIVES[name] for name in left)):
        run = _read(root() / chapter / _folder_name(wanted | dict(zip(left, choice, strict=True))))
        if run is not None:
            return run
    return None


def save(
    chapter: str,
    parameters: Mapping[str, Any],
    *,
    metrics: list[dict],
    losses: Mapping[str, list[float] | list[int]],
    arrays: Mapping[str, np.ndarray],
    figures: Mapping[str, Figure | Animation],
    card: DataCard,
    recipe: Recipe | StepRecipe | RBMRecipe,
    budget: Mapping[str, Any],
    seconds: Mapping[str, float],
    device: str,
    resolved: Mapping[str, Any] | None = None,
    probe: "Probe | None" = None,
    extra: Mapping[str, Any] | None = None,
) -> Run:
    """Store a run in place of any earlier one with the same chapter and parameters; whole, or not at all.

    Args:
        chapter: Name of the chapter.
        parameters: What determines the result. data="auto" is stored as "real" or "sample", whichever was used.
        metrics: Rows made by `row`.
        losses: Curves per epoch, or at the steps that a curve of steps names.
        arrays: Maps and curves for figures; never the images of a data set.
        figures: Panels that show inputs, saved as PNG, and animations, saved as GIF.
        card: The card of the data used.
        recipe: The recipe used.
        budget: unit, asked and used, such as epochs, 100 and 20.
        seconds: Wall-clock time by part.
        device: Which device computed it, as `devices.describe_device` says it.
        resolved: What other parameters that were "auto" have become, such as initial and precision.
        probe: What the trained model says of a few images (expvae_book.probes); kept with the run.
        extra: More facts for the record.

    Raises:
        ValueError: If a number is not finite, an array holds Python objects, or a parameter cannot be part of a
            folder's name or is still "auto".
        OSError: If the run cannot be written.
    """
    became = {"data": "sample" if card.generated else "real", "device": device.partition(":")[0], **(resolved or {})}
    stored = _determining(parameters)
    stored |= {name: became[name] for name in ALTERNATIVES if name in stored and name in became}
    if unknown := [name for name, value in stored.items() if value == "auto"]:
        raise ValueError(f"{unknown[0]}='auto' cannot be stored: say in `resolved` what it has become")
    record = {
        "chapter": chapter,
        "parameters": stored,
        "resolved": became,
        "protocols": protocols.used(chapter, stored),
        "metrics": metrics,
        "losses": dict(losses),
        "budget": dict(budget),
        "recipe": asdict(recipe),
        "seconds": dict(seconds),
        "device": device,
        "versions": provenance.versions(),
        "git": provenance.commit(),
        "data": card.to_dict(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        **({"probe": probe.facts} if probe else {}),
        **(extra or {}),
    }
    arrays = {**arrays, **(probe.arrays if probe else {})}
    folder = root() / chapter / _folder_name(stored)
    for part, value in record.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{part} of the run {folder.name} cannot be stored: JSON takes finite numbers, text, lists and dicts "
                f"of Python ({error})"
            ) from error
    text = json.dumps(record, indent=1, ensure_ascii=False)
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:  # NumPy would pickle it
            raise ValueError(f"arrays[{name!r}] of the run {folder.name} holds Python objects; give it a numeric type")

    temporary = folder.with_name(f".writing-{uuid.uuid4().hex}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        (temporary / "record.json").write_text(text + "\n", encoding="utf-8")
        np.savez_compressed(temporary / "arrays.npz", **arrays)
        (temporary / "figures").mkdir()
        for name, figure in figures.items():
            if isinstance(figure, Animation):
                figure.save(temporary / "figures" / f"{name}.gif", writer=PillowWriter(fps=FRAMES_PER_SECOND))
            else:
                figure.savefig(temporary / "figures" / f"{name}.png")
        _replace(temporary, folder)
    except OSError as error:
        raise not_written(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return _read(folder)


@cache
def _data_digest(name: str) -> str | None:
    """Digest of the data set at hand, once per process: hashing thousands of images takes a while."""
    try:
        card = survey(source(name), data_root())
    except ValueError:
        return "damaged"
    return card.digest if card else None


def amend(run: Run, entries: Mapping[str, Any]) -> Run:
    """Add entries to the record of a stored run, or replace them, and give the run as it is then."""
    path = run.folder / "record.json"
    with FileLock(run.folder.parent / ".lock"):
        record = _parsed(path.read_text(encoding="utf-8")) | dict(entries)
        text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
        with replacing(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return Run(run.chapter, run.parameters, record, run.folder)


def _replace(new: Path, folder: Path) -> None:
    """Put a whole folder in the place of another; a folder cannot be renamed over one that holds files."""
    with FileLock(folder.parent / ".lock"):
        old = _aside(folder)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed
            folder.rename(old)
        new.rename(folder)
        shutil.rmtree(old, ignore_errors=True)


def _aside(folder: Path) -> Path:
    """Where a run lies from the moment that it makes way for another until that one is in its place."""
    return folder.with_name(_ASIDE + folder.name)


def _read(folder: Path) -> Run | None:
    path = folder / "record.json"
    try:
        text, at = _whole(folder, lambda at: ((at / path.name).read_text(encoding="utf-8"), at))
        record = _parsed(text)
        return Run(record["chapter"], record["parameters"], record, at)
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:  # neither JSON nor UTF-8, or JSON of another form
        raise ValueError(f"{path} is damaged ({error!r}); delete its folder and run the chapter again") from error


def _parsed(text: str) -> dict[str, Any]:
    """The record in a text; NaN and infinity, which JSON has not and `save` refuses, are a ValueError."""

    def finite(number: str) -> float:
        if not math.isfinite(float(number)):
            raise ValueError(f"{number} is no finite number")
        return float(number)

    return json.loads(text, parse_constant=finite, parse_float=finite)


def _arrays(folder: Path) -> dict[str, np.ndarray]:
    path = folder / "arrays.npz"
    with path.open("rb") as opened:
        try:
            archive = np.load(opened, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("it is no archive")
            with archive:
                arrays = dict(archive)
            if strange := [name for name, array in arrays.items() if not isinstance(array, np.ndarray)]:
                raise ValueError(f"{strange[0]} in it is no array")
        except _DAMAGE as error:
            raise ValueError(f"{path} is damaged ({error!r}); delete its folder and run the chapter again") from error
    return arrays


def _whole(folder: Path, read: Callable[[Path], T]) -> T:
    """What `read` finds in the folder of a run.

    Also while another process puts a new run in its place, or after one was killed when it had set the old one aside.
    """
    try:
        return read(folder)
    except FileNotFoundError:
        lock = folder.parent / ".lock"
        if not lock.exists():  # nothing was ever written beside it
            raise
    old, at = _aside(folder), folder
    with ExitStack() as stack:
        try:
            stack.enter_context(FileLock(lock))
            if old.exists() and not folder.exists():
                old.rename(folder)
        except OSError:  # the store may only be read: where it was left, then
            at = old if old.exists() and not folder.exists() else folder
        return read(at)


def _commit(git: Mapping[str, Any]) -> str:
    """A commit as pages show it, such as "0123abcd with changes"."""
    return (git["commit"][:8] if git["commit"] else "no commit") + (" with changes" if git["dirty"] else "")


def _determining(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in WHERE_GIVEN or value != "auto"}


def _folder_name(parameters: Mapping[str, Any]) -> str:
    parts = []
    for name, value in sorted(parameters.items()):
        part = f"{name}={value}"
        if not set(part) <= _SAFE:
            raise ValueError(f"{name}={value!r} cannot be part of a folder's name; use letters, digits and . _ + -")
        parts.append(part)
    return ",".join(parts) or "default"


_ASIDE = ".old-"
# What zipfile, zlib and NumPy raise, by the place that is damaged.
_DAMAGE = (EOFError, KeyError, OSError, RuntimeError, ValueError, struct.error, zipfile.BadZipFile, zlib.error)
_SAFE = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._+-=")
