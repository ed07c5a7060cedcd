"""A full disk at every place where something is written.

A disk of its own takes root's rights to mount. Here a limit on the size of files (RLIMIT_FSIZE) stands in for it: a
file cannot grow beyond so many bytes, and the kernel answers a write with EFBIG where a full disk answers ENOSPC. That
reaches the writers in C and Rust as well. Folders, links and names, which take room on a disk too, are still made. The
limits are none at all, one byte, half of the largest file that is written, and one byte less than that.
"""

import gzip
import hashlib
import os
import resource
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pooch
import torch
from benchmarks.endurance import inputs, kills, malformed
from matplotlib.animation import FuncAnimation
from matplotlib.figure import Figure
from nbformat.v4 import new_code_cell, new_notebook, new_output
from tqdm import tqdm

from expvae_book import chapters, checkpoints, example, outputs, runs, site, weights
from expvae_book.data import __main__ as fetching
from expvae_book.data import catalogue

Write = Callable[[Path, int], object]  # writes something into a folder, another content for each number


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Within it, no file can grow beyond so many bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def noise(number: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(number).random(shape or (64, 64), np.float32)


def save(folder: Path, number: int, **parts: object) -> runs.Run:
    with patch.dict(os.environ, EXPVAE_RUNS=str(folder)):
        return kills.store({"seed": 0}, seconds={"all": float(number)}, **parts)


def drawn(number: int, moving: bool = False) -> Figure | FuncAnimation:
    figure = Figure(figsize=(2, 2))
    shown = figure.add_subplot().imshow(noise(number))
    if not moving:
        return figure
    animation = FuncAnimation(figure, lambda frame: [shown.set_data(noise(number + frame))], 3)
    animation._draw_was_started = True  # or it warns, where there is no room, that nobody drew it
    return animation


def amend(folder: Path, number: int) -> None:
    with patch.dict(os.environ, EXPVAE_RUNS=str(folder)):
        (run,) = runs.find() or [save(folder, 0)]
        runs.amend(run, {"note": noise(number).tolist()})


def checkpoint(folder: Path, number: int) -> None:
    state = checkpoints.State({"a": torch.from_numpy(noise(number))}, {}, [], [], done=number)
    state.save(folder / "a.checkpoint")


def cached(folder: Path, number: int) -> None:
    made = [(str(number), {"a": torch.from_numpy(noise(number))}, [])]
    with patch.dict(os.environ, EXPVAE_CACHE=str(folder)):
        weights.cached("Kind", [str(number)], kills.CPU, lambda path: made)


def executed(number: int) -> new_notebook:
    shown = new_output("stream", name="stdout", text=str(noise(number).tolist()))
    return new_notebook(cells=[new_code_cell("noise", outputs=[shown])])


def page(folder: Path, number: int) -> None:
    with patch.dict(os.environ, EXPVAE_RUNS=str(folder)):
        outputs.store(executed(number), "page", {})


def pack(folder: Path, number: int) -> None:
    html = folder.parent / f"html {number}"
    if not html.exists():
        html.mkdir()
        (html / "index.html").write_bytes(noise(number).tobytes())
    with patch.dict(os.environ, EXPVAE_RUNS=str(folder / "runs")):
        site.pack(html, folder / "site.zip")


def take_example(folder: Path, number: int) -> None:
    with patch.dict(os.environ, EXPVAE_RUNS=str(folder.parent / f"runs {number}")):
        arrays = {"weights/a": noise(number), "shown": np.arange(3)}
        (run,) = runs.find() or [kills.store({"seed": 0}, arrays=arrays)]
    example.save(run, folder)


def explain(folder: Path, number: int) -> None:
    given = folder.parent / f"example {number}"
    if not given.exists():
        given.mkdir()
        inputs.make_example(given)
    inputs.explain(given, folder / f"maps {number}")


def fetch(folder: Path, number: int) -> None:
    """Fetch a file of MNIST from a server here, in place of another; its source is as the catalogue's."""
    content, packed = noise(number).tobytes(), folder.parent / f"{number}.gz"
    if not packed.exists():
        packed.write_bytes(gzip.compress(content, mtime=0))
    (target,) = [name for name in catalogue.MNIST.checksums if "train-labels" in name]
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=folder.parent)) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,)).start()
        url = f"http://127.0.0.1:{server.server_port}/{packed.name}"
        digests = (hashlib.sha256(part).hexdigest() for part in (packed.read_bytes(), content))
        download = catalogue.Download((url,), next(digests), target)
        checksums = {target: next(digests)}
        source = replace(catalogue.MNIST, downloads=(download,), checksums=checksums, patterns={}, official={})
        with patch.dict(catalogue.SOURCES, mnist=source), patch.dict(os.environ, no_proxy="127.0.0.1"):
            try:
                if fetching.main(["fetch", "mnist", "--root", str(folder)]):
                    raise OSError(sys.stderr.getvalue().splitlines()[-1])
            finally:
                server.shutdown()


SITES: dict[str, Write] = {
    "checkpoint": checkpoint,
    "weights": cached,
    "record": lambda folder, number: save(folder, number, losses={"kl": noise(number).ravel().tolist()}),
    "arrays": lambda folder, number: save(folder, number, arrays={"maps": noise(number)}),
    "figure": lambda folder, number: save(folder, number, figures={"panel": drawn(number)}),
    "animation": lambda folder, number: save(folder, number, figures={"panel": drawn(number, moving=True)}),
    "amended record": amend,
    "outputs of a page": page,
    "executed notebook": lambda folder, number: chapters.ChapterHandler.write(
        str(executed(number)), str(folder / "out.ipynb")
    ),
    "site": pack,
    "example": take_example,
    "maps of explain": explain,
    "fetched data": fetch,
}


def left(folder: Path) -> dict[Path, bytes | None]:
    """All that lies in a folder but locks."""
    files = (path for path in folder.rglob("*") if path.suffix != ".lock" and path.name != ".lock")
    return {path: path.read_bytes() if path.is_file() else None for path in files}


def measure(folder: Path) -> Counter:
    """Write everything once with room and some times without, and count what was not as it should be."""
    pooch.get_logger().setLevel("WARNING")
    counts = Counter({"write sites": len(SITES), "writes without room": 0, "failures": 0})
    for name, write in tqdm(SITES.items(), "write sites", file=sys.stderr):
        place = folder / name
        for number, there in ((1, place / "room"), (0, place / "disk")):  # what they need is then made
            there.mkdir(parents=True)
            _, error = malformed.told(write, there, number)
            if error:
                raise error
        largest = max(len(content or b"") for content in left(place / "room").values())
        before = left(place / "disk")
        for size in (0, 1, largest // 2, largest - 1):
            with full_disk(size):
                _, error = malformed.told(write, place / "disk", 1)
            counts["writes without room"] += 1
            said = error is not None and malformed.is_sentence(error, str(place / "disk"))
            if not said or left(place / "disk") != before:
                counts["failures"] += 1
                tqdm.write(f"{name}, {size} of {largest} bytes: {error!r}", file=sys.stderr)
    return counts
