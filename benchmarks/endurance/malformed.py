"""Malformed inputs: valid files that seeded chance has damaged, and parameters that are wrong, given to their readers.

An answer is right if it is an exception of a documented kind whose message is one sentence that names the file or the
parameter, or if what is read is the same as before; such damage is without effect, and not counted as malformed. Single
bytes are changed in formats with checksums alone (PNG, archives, what this book writes). Of the others, such as the
pixels of an idx file, the text of a record or weights of a user's own, a changed byte makes another valid file: digests
in data cards, git and the record of a run tell these apart, and no reader can.
"""

import io
import re
import shutil
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, redirect_stderr, redirect_stdout
from pathlib import Path

import numpy as np
from benchmarks.endurance import inputs
from tqdm import tqdm

DOCUMENTED = (ValueError, OSError, KeyError)
ANSWERS = ("answered by one sentence", "answered otherwise", "silently read as another")
LONGEST = 900  # characters of a sentence


def files(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock"}


def told(act: Callable, *arguments: object) -> tuple[object, Exception | None]:
    """What a function gives or raises; what it prints, and of what it warns, is left aside."""
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(io.StringIO()))
        stack.enter_context(redirect_stderr(io.StringIO()))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        try:
            return act(*arguments), None
        except Exception as error:
            return None, error


def is_sentence(error: Exception, name: str) -> bool:
    """Whether an error is of a documented kind and says in one sentence what it concerns."""
    said = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    one = "\n" not in said and len(said) < LONGEST and not re.search(r"[a-z)]\. [A-Z]", said)
    return isinstance(error, DOCUMENTED) and name in said and one


def measure(folder: Path, count: int, seed: int = 0) -> Counter:
    """Damage inputs of all kinds in turn until so many were malformed, and count how they were answered."""
    counts = Counter(dict.fromkeys(("malformed inputs", *ANSWERS, "half-written", "read the same, not counted"), 0))
    draw, expected, turn = np.random.default_rng(seed), {}, 0
    order = {name: draw.permutation(len(reader.damages)) for name, reader in inputs.READERS.items()}
    for name, reader in inputs.READERS.items():
        (folder / name).mkdir()
        reader.make(folder / name)
        expected[name], error = told(reader.read, folder / name)
        if error:
            raise error
    with tqdm(total=count, desc="malformed inputs", file=sys.stderr) as bar:
        while counts["malformed inputs"] < count:
            name = list(inputs.READERS)[turn % len(inputs.READERS)]
            reader, place = inputs.READERS[name], folder / "damaged"
            damage = reader.damages[order[name][turn // len(inputs.READERS) % len(reader.damages)]]
            turn += 1
            shutil.copytree(folder / name, place)
            concerned = damage(place, draw)
            before = files(place)
            value, error = told(reader.read, place)
            half = files(place) != before
            shutil.rmtree(place)
            if error is None and value == expected[name]:
                counts["read the same, not counted"] += 1
                continue
            answer = ANSWERS[2 if error is None else not is_sentence(error, concerned)]
            counts.update({"malformed inputs": 1, answer: 1, "half-written": half})
            bar.update()
            if half or answer != ANSWERS[0]:
                tqdm.write(f"{name}: {concerned} {answer}, {half=}: {error!r}", file=sys.stderr)
    return counts
