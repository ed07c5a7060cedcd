"""The store of results: what was computed, with which parameters, by which code, on which data.

A run is a folder runs/<chapter>/<name=value,...>/ that holds

    record.json   parameters, what "auto" became, metrics, losses, budget, recipe, seconds, device, data card, commit,
                  versions of libraries, and versions of the protocols that it rests on (expvae_book.protocols)
    arrays.npz    the few maps and curves that the figures show (compressed; float16, float32 or integers)
    figures/      panels that show inputs, drawn when the run was computed

A run appears whole or not at all, and to read it nothing need be written (expvae_book.files). The environment variable
EXPVAE_RUNS names another folder for the store.
"""

import json
import os
import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float64
from matplotlib.animation import Animation, PillowWriter
from matplotlib.figure import Figure

from expvae_book import files, places, protocols, provenance
from expvae_book.data import root as data_root
from expvae_book.data.card import DataCard, sha256, survey
from expvae_book.data.catalogue import source
from expvae_book.names import ATTENTION, COMMON
from expvae_book.recipes import RBMRecipe, Recipe, StepRecipe
from expvae_book.rows import METRIC_COLUMNS, as_text, listed, read_text
from expvae_book.rows import order as order
from expvae_book.rows import row as row

if TYPE_CHECKING:
    from expvae_book.probes import Probe

FRAMES_PER_SECOND = 4
DIGEST = "arrays_sha256"  # in a record
TOLERANCE = 1e-3  # of the greatest number of a probe: what another processor or device may change

# What "auto" may become and then stands in the record and its folder's name; the first is taken before the second.
ALTERNATIVES = {"data": ("real", "sample"), "initial": ("imagenet", "random")}
# Chapters that share a store, so that a model which both show is trained once.
STORES = {"mvtec10": "mvtec", "mvtec15": "mvtec"}
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
            ValueError: If their file is damaged, or is not of the record because the run has been stored anew since it
                was read; the message names it. Runs from before there was a digest are not held against one.
        """
        with files.stored(self.folder, "arrays.npz") as file:
            (arrays, digest), expected = files.read_arrays(file), self.record.get(DIGEST)
            anew = expected != digest and (now := _read(self.folder)) and now.record.get(DIGEST) != expected
            if expected not in (None, digest) and not anew:
                raise ValueError("its SHA-256 is not that in the record")
        if anew:
            raise ValueError(
                f"{self.folder / 'arrays.npz'} has been stored anew since its run was read; load that again"
            )
        return arrays

    @property
    def maps(self) -> list[str]:
        """The maps of a job that holds those of several layers by several presets, such as "conv2, liu2020_code"."""
        return self.record.get("maps", [])

    def at(self, layer: str, preset: str) -> "Run":
        """The run as a page shows it that is asked for one layer and preset: the rows of their map are "attention".

        Rows of the other maps are left out, so that what comes has no maps of its own to show.

        Raises:
            KeyError: If it has no such map; the message lists those it has.
        """
        name = f"{layer}, {preset}"
        if name not in self.maps:
            raise KeyError(f"the run {self.label} has no map {name!r}; it has: {'; '.join(self.maps) or 'none'}")
        titles = {name: ATTENTION, f"mean of {name}": COMMON}
        others = {f"{prefix}{other}" for other in self.maps if other != name for prefix in ("", "mean of ")}
        rows = []
        for one in self.record["metrics"]:
            parts = one["method"].split(" − ")
            if others.isdisjoint([*parts, one["subset"]]):
                method = " − ".join(titles.get(part, part) for part in parts)
                rows.append(one | {"method": method, "subset": "" if one["subset"] == name else one["subset"]})
        parameters = self.parameters | {"layer": layer, "preset": preset}
        return replace(self, parameters=parameters, record=self.record | {"metrics": rows, "maps": []})

    def resamples(self, name: str) -> Float64[np.ndarray, "m r"]:
        """What every resample of the test units gave for the measures of a map that `record["resamples"]` lists.

        Of any two maps of the same units, of one run or two, the resamples are paired.

        Raises:
            KeyError: If the run has none of this map.
        """
        return self.arrays[f"resamples/{name}"].astype(np.float64)

    @property
    def card(self) -> DataCard:
        """The card of the data that the run used."""
        return DataCard(**self.record["data"])

    @property
    def label(self) -> str:
        """The run in one line: chapter, parameters and commit."""
        name = _folder_name(self.parameters).replace(",", ", ")
        return f"{self.chapter}: {name} ({commit_text(self.record['git'])})"

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
        return f"verified at {commit_text(verified['git'])}, {verified['date']}"

    @cached_property
    def of_data_at_hand(self) -> bool:
        """Whether it was made from the data that are at hand; true where there are none, or it needed none."""
        return self.card.generated or _data_digest(self.card.name) in (None, self.card.digest)

    def figure(self, name: str) -> Path:
        """Path of a stored figure, a PNG, or of a stored animation, a GIF.

        Raises:
            FileNotFoundError: If the run has no such figure; the message lists those it has.
        """
        figures = {path.stem: path for path in sorted(files.located(self.folder).glob("figures/*.*"))}
        if name not in figures:
            names = ", ".join(figures) or "none"
            raise FileNotFoundError(f"the run {self.label} has no figure {name!r}; it has: {names}")
        return figures[name]

    def metric(self, metric: str, method: str = "", subset: str = "") -> dict[str, Any]:
        """The row of one number, as a dict with value, low, high and n.

        Raises:
            KeyError: If the run does not have it.
        """
        for one in self.record["metrics"]:
            if (one["metric"], one["method"], one["subset"]) == (metric, method, subset):
                return one
        raise KeyError(f"the run {self.label} has no metric {metric!r} of {method!r} on {subset!r}")

    def rows(self, metric: str) -> pd.DataFrame:
        """All rows of one metric.

        Raises:
            KeyError: If the run has none.
        """
        rows = self.metrics[self.metrics["metric"] == metric]
        if rows.empty:
            raise KeyError(f"the run {self.label} has no metric {metric!r}")
        return rows

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


def reading() -> bool:
    """Whether stored runs are only to be read, as while Jupyter Book renders (EXPVAE_MODE is "read")."""
    return os.environ.get("EXPVAE_MODE") == "read"


def root() -> Path:
    """The folder of the store: EXPVAE_RUNS, or runs/ in the repository."""
    return places.folder(places.setting("EXPVAE_RUNS", "runs"), "EXPVAE_RUNS")


def find(chapter: str | None = None, **parameters: Any) -> list[Run]:
    """All stored runs, of one chapter or of all, that have the parameters given; ordered by their folders."""
    store = STORES.get(chapter, chapter) or "*"
    # Listed twice, because a listing can lack what is renamed meanwhile.
    folders = [folder for _ in range(2) for folder in root().glob(f"{store}/*")]
    of_runs = {folder.with_name(folder.name.removeprefix(files.ASIDE)) for folder in folders}
    runs = [_read(folder) for folder in sorted(of_runs) if not folder.name.startswith(".")]
    return [run for run in runs if run is not None and parameters.items() <= run.parameters.items()]


def load(chapter: str, parameters: Mapping[str, Any]) -> Run | None:
    """The stored run of a chapter with these parameters, or None.

    With data="auto" that is the run on real data where there is one, otherwise the run on the embedded sample, and
    with initial="auto" the one from ImageNet's weights before the one from random ones. A precision or device is looked
    at unless it is "auto".
    """
    wanted = _determining(parameters)
    values = [ALTERNATIVES.get(name, ("auto",)) if value == "auto" else (value,) for name, value in wanted.items()]
    names = (_folder_name(dict(zip(wanted, choice, strict=True))) for choice in product(*values))
    runs = (_read(root() / STORES.get(chapter, chapter) / name) for name in names)
    return next((run for run in runs if run is not None), None)


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
    chapter = STORES.get(chapter, chapter)
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
        "metrics": [listed(row) for row in metrics],
        "losses": dict(losses),
        "budget": dict(budget),
        "recipe": asdict(recipe),
        "seconds": dict(seconds),
        "device": device,
        "versions": provenance.versions(),
        "git": provenance.commit(),
        "data": asdict(card),
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
    for name, array in arrays.items():
        if np.asarray(array).dtype.hasobject:  # NumPy would pickle it
            raise ValueError(f"arrays[{name!r}] of the run {folder.name} holds Python objects; give it a numeric type")

    with files.replacing_folder(folder) as temporary:
        files.write_arrays(temporary / "arrays.npz", arrays)
        record[DIGEST] = sha256(temporary / "arrays.npz")
        (temporary / "record.json").write_text(as_text(record) + "\n", encoding="utf-8")
        (temporary / "figures").mkdir()
        for name, figure in figures.items():
            if isinstance(figure, Animation):
                figure.save(temporary / "figures" / f"{name}.gif", writer=PillowWriter(fps=FRAMES_PER_SECOND))
            else:
                figure.savefig(temporary / "figures" / f"{name}.png")
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
    with files.lock(run.folder):
        run = replace(run, record=_read(run.folder).record | dict(entries))
        text = as_text(run.record | {"metrics": [list(row.values()) for row in run.record["metrics"]]})
        with files.replacing(files.located(run.folder) / "record.json") as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")
    return run


def _read(folder: Path) -> Run | None:
    """The run of a folder; pages, which change none, share what was read since it was last written."""
    if not reading():
        return _read_now(folder)
    try:
        state = (files.located(folder) / "record.json").stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return _read_for_pages(folder, state.st_ino, state.st_mtime_ns)


@cache
def _read_for_pages(folder: Path, *_state: int) -> Run | None:
    return _read_now(folder)


def _read_now(folder: Path) -> Run | None:
    try:
        with files.stored(folder, "record.json") as file:
            record = read_text(file)
            DataCard(**record["data"])
            return Run(record["chapter"], record["parameters"], record, folder)
    except (FileNotFoundError, NotADirectoryError):
        return None


def commit_text(git: Mapping[str, Any]) -> str:
    """A commit as pages show it, such as "0123abcd with changes"."""
    return (git["commit"][:8] if git["commit"] else "no commit") + (" with changes" if git["dirty"] else "")


def _determining(parameters: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in parameters.items() if name not in WHERE_GIVEN or value != "auto"}


def _folder_name(parameters: Mapping[str, Any]) -> str:
    for name, value in parameters.items():
        if not re.fullmatch(r"[\w.+=-]*", f"{name}={value}", re.ASCII):
            raise ValueError(f"{name}={value!r} cannot be part of a folder's name; use letters, digits and . _ + -")
    return ",".join(f"{name}={value}" for name, value in sorted(parameters.items())) or "default"
